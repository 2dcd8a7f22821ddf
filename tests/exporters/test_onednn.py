"The layers of a TorchScript file, computed by oneDNN, against torch's own."
import copy
import io
import zipfile

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18

from mmembed import load
from mmembed.core.torchscript import quietly
from mmembed.exporters.onednn import Conv, Linear, Patches, folded, quick
from mmembed.runtime.artifact import prepack

from tests.helpers import instruction_sets
from tests.exporters import tiny

LAYERS = {
    'linear': (nn.Linear(40, 24), torch.randn(3, 5, 40)),
    'linear without bias': (nn.Linear(40, 24, bias=False), torch.randn(7, 40)),
    'rows apart': (nn.Linear(40, 24), torch.randn(5, 3, 40).transpose(0, 1)),
    'convolution': (nn.Conv2d(6, 8, 3, 2, 1), torch.randn(2, 6, 11, 13)),
    'dilated, in groups': (nn.Conv2d(6, 12, 3, groups=2, dilation=2, bias=False), torch.randn(2, 6, 11, 13)),
    'patches': (nn.Conv2d(3, 8, 16, 16), torch.randn(2, 3, 50, 64))}


def made(layer):
    return (
        Linear(layer)
        if isinstance(layer, nn.Linear)
        else Patches(layer)
        if layer.kernel_size == (16, 16)
        else Conv(layer)
    )


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', LAYERS)
def test_a_layer_is_torchs_own(name, dtype):
    layer, x = LAYERS[name]
    layer, x = copy.deepcopy(layer).requires_grad_(False).to(dtype), x.to(dtype)
    want, bound = layer(x).float(), {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}[dtype]
    ours = quietly(torch.jit.script, made(layer))
    file = io.BytesIO()
    quietly(torch.jit.save, ours, file)
    file.seek(0)
    loaded = quietly(torch.jit.load, file)
    for f in (made(layer), ours, loaded): torch.testing.assert_close(f(x).float(), want, atol=bound, rtol=bound)
    assert prepack(loaded) == 1
    torch.testing.assert_close(loaded(x).float(), want, atol=bound, rtol=bound)


def test_a_network_is_folded_and_keeps_its_answer():
    torch.manual_seed(0)
    net = resnet18().eval().requires_grad_(False)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_(0, .2), m.running_var.uniform_(.5, 2)
    x = torch.randn(2, 3, 64, 64)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded(net).modules())
    class Tower(nn.Module):
        def __init__(self): super().__init__(), setattr(self, 'net', net)
        def forward(self, x): return self.net(x)
    want, tower = net(x), quick(copy.deepcopy(Tower()).eval())
    assert not any(type(m) in (nn.Conv2d, nn.Linear, nn.BatchNorm2d) for m in tower.modules())
    torch.testing.assert_close(tower(x), want, atol=1e-4, rtol=1e-4)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def said_by_onednn(capfd, f, *args):
    "What oneDNN logs of a call."
    capfd.readouterr()
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON): f(*args)
    return capfd.readouterr().out


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_packed_weights_have_the_order_of_the_shapes_that_come(dtype, capfd, one_thread):
    """oneDNN chooses the order by the shape of the picture; weights in another are reordered at every call, which
    took ten times what ResNet-50 takes.
    With several threads the order of float32 weights depends on the number of rows as well."""
    tower = (
        nn.Sequential(
            nn.Conv2d(3, 256, 1),
            nn.Conv2d(256, 512, 1, 2),
            nn.Conv2d(512, 1024, 1),
            nn.Conv2d(1024, 512, 1),
            nn.Conv2d(512, 576, 1),
        )
        .eval()
        .requires_grad_(False)
    )
    ours = quietly(torch.jit.script, quick(tower, torch.zeros(1, 3, 28, 28)).to(dtype))
    assert prepack(ours) == 5
    plain = said_by_onednn(capfd, tower.to(dtype), torch.randn(1, 3, 28, 28, dtype=dtype))
    if 'exec,cpu,convolution,jit' not in plain and 'exec,cpu,convolution,brg' not in plain:
        pytest.skip(f'oneDNN has no {dtype} convolutions on this processor (it wants AVX-512): {instruction_sets()}')
    said = ''
    for rows in 1, 8:
        x = torch.randn(rows, 3, 28, 28, dtype=dtype)
        ours(x)
        said += said_by_onednn(capfd, ours, x)
    assert said.count('exec,cpu,convolution') == 10
    assert 'exec,cpu,reorder,simple' not in said


def test_no_weights_are_copied_for_rows():
    """The product of the attention's input is one of two axes: of three, torch copied its bfloat16 weights for every
    row."""
    from mmembed.models.open_clip import open_clip_towers
    text = open_clip_towers('ViT-B-32').text.eval().requires_grad_(False)
    tokens = text.pipeline(['a photo of a cat', 'two dogs'])
    half = quick(copy.deepcopy(text)).to(torch.bfloat16)
    with torch.no_grad():
        want = text(tokens)
        with torch.profiler.profile() as p: got = half(tokens)
    assert not any(e.key == 'aten::bmm' for e in p.key_averages())
    assert F.cosine_similarity(got.float(), want).min() > .999


def test_a_portable_file_calls_no_onednn(monkeypatch):
    def calls(portable):
        with zipfile.ZipFile(tiny.portable() if portable else tiny.artifact()) as z:
            return any(b'mkldnn' in z.read(n) for n in z.namelist() if n.endswith('.py'))
    assert [calls(True), calls(False)] == [False, True]

    def elsewhere(*args, **kwargs):
        raise RuntimeError("Unknown builtin op: mkldnn::_linear_pointwise.\nCould not find any similar ops")
    monkeypatch.setattr(torch.jit, 'load', elsewhere)
    with pytest.raises(ValueError, match='export it with portable=True'): load(tiny.artifact())


def test_query_key_and_value_are_one_product_that_is_forgotten():
    "What the query's product gave waits for the key and the value of the same rows, once, and for no others."
    from transformers import BertConfig

    from mmembed.models.bert import Bert
    tp, _ = tiny.pipelines()
    config = BertConfig(vocab_size=tp.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=48, max_position_embeddings=tp.max_length + 2)
    tower = quick(Bert(tp, config.to_dict()).eval())
    first, second = (layer.attention.self for layer in tower.net.encoder.layer)
    x, y = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    with torch.no_grad():
        first.query(x), second.query(y)
        key, value, other = first.key(x), first.value(x), second.key(y)
        assert key.shape == value.shape == x.shape and not torch.equal(key, value) and not torch.equal(key, other)
        for ask in (lambda: first.key(x), lambda: second.value(x)):
            with pytest.raises(RuntimeError, match='keys or values of other rows than its queries'): ask()
    assert first.query.rows is None and first.query.kept == {}
