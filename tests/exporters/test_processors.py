"""What is computed by which kernel on another kind of processor: one process that is held to AVX2 answers all
questions, and a second one the same."""
import hashlib

import pytest
import torch

from mmembed import load
from mmembed.core.torchscript import quietly
from mmembed.exporters.variants import DTYPES, SAME
from mmembed.exporters.int8 import Int8Linear, int8_steps
from mmembed.exporters.export import export
from mmembed.runtime.artifact import prepack

from tests.helpers import on_avx2
from tests.exporters import tiny
from tests.exporters.test_cuda_graphs import traced

PROGRAM = '''
import hashlib, json, sys, warnings
warnings.simplefilter('ignore')
from pathlib import Path
import torch
import torch.nn.functional as F
import mmembed as mm
from mmembed.core.torchscript import quietly
from mmembed.exporters.int8 import Int8Linear, int8_steps
from mmembed.exporters.export import export
from mmembed.runtime.artifact import prepack
from tests.exporters import tiny
from tests.exporters.test_processors import called
torch.manual_seed(0)
texts = ['a small red circle', '一个红色的圆', '', 'Café au lait ' * 9]
told = {'texts': texts, 'capability': torch.backends.cpu.get_cpu_capability(), 'steps': int8_steps()}
layer, x = torch.nn.Linear(192, 96), torch.randn(600, 192)
with torch.no_grad():
    want = layer(x)
    made = quietly(torch.jit.script, Int8Linear(layer).eval())
    plain = made(x)
    told['plain calls'] = called(made, x)
    prepack(made)
    told['packed calls'], packed = called(made, x), made(x)
    told['same packed'], told['freed'] = packed.equal(plain), made.weight.numel() == 0
    told['alone'] = all(made(x[i:i + 1]).equal(packed[i:i + 1]) for i in range(0, 600, 97))
    told['off'] = float((packed - want).abs().max() / want.abs().max())
    loud = Int8Linear(torch.nn.Linear(192, 8))
    loud.weight.fill_(127), loud.step.fill_(1.), loud.bias.zero_(), loud.sums.fill_(127. * 192)
    ends = torch.ones(2, 192)
    ends[:, 0] = -1  # all but one at the end of the range: what saturates first
    told['largest'] = float((loud(ends) - ends @ torch.full((192, 8), 127.)).abs().max() / (127 * 192))
folder = Path(sys.argv[1])
images = [torch.randint(0, 256, (3, 50, 60), dtype=torch.uint8) for _ in range(3)]
def digest(*tensors): return hashlib.sha256(b''.join(t.numpy().tobytes() for t in tensors)).hexdigest()
options = {'fp32': {}, 'bf16': dict(precision='bf16'), 'int8': dict(quantize='int8', deterministic=4),
           'portable int8': dict(quantize='int8', portable=True)}
for name, how in options.items():
    if not (folder/f'{name}.pt').exists():
        report = export(tiny.model(), folder/f'{name}.pt', fresh=name == 'int8', cpp=False, **how)
        told['verified ' + name] = report.ok
    emb = mm.load(folder/f'{name}.pt')
    a, b, ids = emb.encode_text(texts), emb.encode_image(images), emb.tokenize(texts)
    told[name] = {'digest': digest(a, b), 'ids': digest(*ids)}
    told[name]['calls'] = called(emb.encode_text, texts)
    told[name]['computes'] = emb.computes
    told[name]['types'] = sorted({str(p.dtype) for p in emb.module.model.net.text.parameters()})
    if name == 'fp32':
        one, other = (mm.load(folder/'fp32.pt', kernels=k).encode_text(texts) for k in ('onednn', 'torch'))
        told['kernels differ'] = float((one - other).abs().max())
    told[name]['row'] = emb.encode_text(texts[:1]).equal(a[:1])
print(json.dumps(told))
'''


def called(f, x):
    "The matrix products that `f` calls, by name."
    with torch.no_grad(), torch.profiler.profile() as p: f(x)
    return sorted(
        {e.key for e in p.key_averages()}
        & {'onednn::qlinear_pointwise', 'aten::_int_mm', 'mkldnn::_linear_pointwise', 'aten::addmm', 'aten::linear'}
    )


@pytest.fixture(scope='module')
def asked(tmp_path_factory):
    "What `PROGRAM` prints in a process on a smaller processor, which exports what it does not find in its folder."
    folder = tmp_path_factory.mktemp('avx2')
    return lambda: on_avx2(folder, PROGRAM, folder)


@pytest.fixture(scope='module')
def small(asked): return asked()


def test_int8_multiplies_by_onednn_where_torch_has_no_kernel(small):
    assert small['capability'] == 'AVX2' and small['steps'] == 126
    for calls in small['plain calls'], small['packed calls'], small['int8']['calls']:
        assert 'onednn::qlinear_pointwise' in calls and 'aten::_int_mm' not in calls


def test_a_portable_int8_file_computes_in_float32_where_torch_has_no_kernel(small):
    """torch's product of int8 is a plain loop there, 68 times as slow as float32.

    The weights are converted once, in `verify` too."""
    assert small['verified portable int8'] and 'aten::_int_mm' not in small['portable int8']['calls']
    assert (
        small['portable int8']['computes']
        == 'fp32: torch has no int8 kernel for this processor (AVX2), and a portable file calls no oneDNN'
    )
    layer = quietly(torch.jit.script, Int8Linear(torch.nn.Linear(64, 32), portable=True).eval())
    x = torch.randn(8, 64)
    before = layer(x)
    layer.widen(), layer.widen()
    torch.testing.assert_close(layer(x), before, atol=SAME['int8'], rtol=0)
    assert (
        'aten::_int_mm' not in called(layer, x)
        and not layer.weight.numel()
        and prepack(layer) in (0, 1)
        and not layer.packed.numel()
    )


def test_either_kernel_is_within_the_bound(small): assert small['kernels differ'] < SAME['fp32']


def test_int8_is_exact_where_pairs_of_products_are_added_in_16_bits(small):
    "254 steps saturate there: the largest numbers came out at a hundredth of what they are."
    assert small['largest'] < 1e-3 and small['off'] < .02
    assert small['same packed'] and small['freed'] and small['alone']


def test_artifacts_are_verified_and_the_same_in_two_processes(small, asked):
    again = asked()
    for name in 'fp32', 'bf16', 'int8', 'portable int8': assert small[f'verified {name}'] and small[name] == again[name]
    assert small['int8']['row'] and small['int8']['ids'] == small['fp32']['ids']


def test_ids_are_those_of_this_processor(small):
    ids, mask = load(tiny.artifact()).tokenize(small['texts'])
    assert small['fp32']['ids'] == hashlib.sha256(ids.numpy().tobytes() + mask.numpy().tobytes()).hexdigest()


def test_half_precision_computes_in_float32_where_it_is_emulated(small):
    assert small['bf16']['types'] == ['torch.float32'] and small['bf16']['calls'] == small['fp32']['calls']
    assert small['bf16']['computes'] == 'fp32: this processor (AVX2) does not multiply bf16'
    assert (
        small['fp32']['computes'] == 'fp32' and small['int8']['computes'] == 'int8, inputs of 7 bits by oneDNN (AVX2)'
    )


@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_a_traced_tower_is_widened_with_what_tracing_wrote_down(precision, tmp_path, monkeypatch):
    "Conversions of BERT's mask, and its constants, are of the type that it was traced in."
    export(traced(), tmp_path/'m.pt', precision=precision, fresh=False, cpp=False)
    texts, answers = ['a small red circle', 'a'], {}
    for own in True, False:
        monkeypatch.setattr('mmembed.runtime.artifact.multiplies', lambda p, own=own: own)
        emb = load(tmp_path/'m.pt')
        answers[own] = emb.encode_text(texts)
        assert {p.dtype for p in emb.module.model.net.text.parameters() if p.numel()} == {
            torch.float32 if not own else DTYPES[precision]
        }
        assert emb.computes.startswith('fp32: ') is not own
    bound = SAME[precision]
    torch.testing.assert_close(answers[True], answers[False], atol=bound, rtol=bound)


def test_int8_calls_one_kernel_here():
    layer, x = Int8Linear(torch.nn.Linear(64, 32)).eval(), torch.randn(8, 64)
    want = 'onednn::qlinear_pointwise' if int8_steps() else 'aten::_int_mm'
    scripted = quietly(torch.jit.script, layer)
    plain = scripted(x)
    for f in layer, scripted: assert want in called(f, x)  # beside the question which it is
    # in order once, the same numbers
    packed = 'aten::_int_mm' if torch.ops.mkldnn._is_mkldnn_acl_supported() else 'onednn::qlinear_pointwise'
    assert prepack(scripted) == 1 and scripted(x).equal(plain) and called(scripted, x) == [packed]
    portable = quietly(torch.jit.script, Int8Linear(torch.nn.Linear(64, 32), portable=True).eval())
    assert 'onednn' not in portable.choose.code and called(portable, x) == ['aten::_int_mm']


EMULATED = '''
import json
import numpy as np, onnxruntime, torch
from onnx import TensorProto as T, helper
from mmembed.exporters.int8 import int8_steps, multiplied
from tests.exporters.test_convolutions import furthest_off
told = {'capability': torch.backends.cpu.get_cpu_capability(), 'steps': int8_steps(), 'convolutions': furthest_off()}
def errors(steps): # of sums, with all numbers at their ends and with random ones
    g = torch.Generator().manual_seed(0)
    def some(low, high, rows, dtype): return torch.randint(low, high, (rows, 768), generator=g, dtype=dtype)
    ends = torch.full((8, 768), steps, dtype=torch.uint8), torch.full((96, 768), 127, dtype=torch.int8)
    for codes, weight in (ends, (some(0, steps + 1, 8, torch.uint8), some(-127, 128, 96, torch.int8))):
        got = multiplied(codes, torch.ops.onednn.qlinear_prepack(weight, None), torch.ones(96), steps // 2)
        yield float((got - (codes.long() - steps // 2) @ weight.long().t()).abs().max())
told['errors'] = {steps: list(errors(steps)) for steps in (126, 254)}
def product(a, b): # as the graphs of an int8 artifact have it, by onnxruntime
    kind = {np.dtype(np.int8): T.INT8, np.dtype(np.uint8): T.UINT8}
    taken = helper.make_tensor_value_info('a', kind[a.dtype], a.shape)
    given = helper.make_tensor_value_info('y', T.INT32, [a.shape[0], b.shape[1]])
    weight = helper.make_tensor('b', kind[b.dtype], b.shape, b.tobytes(), raw=True)
    graph = helper.make_graph([helper.make_node('MatMulInteger', ['a', 'b'], ['y'])], 'g', [taken], [given], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=['CPUExecutionProvider'])
    return session.run(None, {'a': a})[0]
b = np.full((768, 96), 127, np.int8)
ends = {'int8': np.full((50, 768), 127, np.int8), 'uint8': np.full((50, 768), 255, np.uint8)}
told['onnx'] = {name: int(np.abs(product(a, b) - a.astype(int) @ b.astype(int)).max()) for name, a in ends.items()}
print(json.dumps(told))
'''


@pytest.mark.weekly
def test_a_processor_that_has_no_more_multiplies_exactly(tmp_path):
    """By 7 bits with oneDNN, by the grid of convolutions, and by the types of the ONNX graphs.

    The other way each saturates there, which shows that the limit is real."""
    pytest.importorskip('onnxruntime')
    told = on_avx2(tmp_path, EMULATED, emulated=True)
    assert told['capability'] == 'AVX2' and told['steps'] == 126
    assert told['errors']['126'] == [0, 0] and min(told['errors']['254']) > 1e4
    assert told['convolutions'] < 1e-5 and told['onnx']['int8'] == 0 and told['onnx']['uint8'] > 1e6
