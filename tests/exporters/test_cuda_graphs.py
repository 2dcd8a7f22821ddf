"""Accelerations are options that answer like the plain model; what a machine lacks is one sentence.

Nothing names a device that map_location would leave behind."""
import functools

import pytest
import torch
from torch import Tensor, nn

from benchmarks.fuzz_exits import AWKWARD, FAMILIES
from benchmarks.fuzz_text import random_texts
from benchmarks.gpu import ACCELERATIONS, eager_towers, main as gpu, why_not
from mmembed.core.types import Tokens
from mmembed.core.packing import as_bytes, pack
from mmembed.core.torchscript import quietly
from mmembed.exporters.cuda_graphs import left_behind, waits
from mmembed.exporters.assemble import assemble
from mmembed.exporters.card import make_card
from mmembed.exporters.onnx.model import provider_of
from mmembed.exporters.int8 import SelfAttention
from mmembed.exporters.variants import Variant, prepared
from mmembed.exporters.export import export
from mmembed.runtime.cuda_graphs import Captured, Graphed
from mmembed.models.dual import DualEncoder
from mmembed.models.pair import PairClassifier
from mmembed.models.bert import Bert
from mmembed.runtime.embedder import load
from mmembed.vision.pipeline import VisionPipeline
from tests.rehearsal import Away, Mixed, Rehearsal, here, moved, there

from tests.helpers import needs_exact_int8
from tests.exporters import tiny


@pytest.fixture(autouse=True)
def no_grad():
    torch.manual_seed(0)
    with torch.no_grad(): yield


def bert():
    from transformers import BertConfig
    tp, _ = tiny.pipelines()
    config = BertConfig(
        vocab_size=tp.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=tp.max_length + 2,
    )
    return Bert(tp, config.to_dict())


def traced(): return DualEncoder(bert(), tiny.model().image, dim=16).eval()


def cross():
    return PairClassifier(tiny.model().text, tiny.model().image, ['mismatch', 'match'], fusion='cross', dim=24).eval()


def operators(f):
    with torch.profiler.profile() as p: f()
    return {e.key for e in p.key_averages() if 'scaled_dot_product' in e.key or 'native_multi_head' in e.key}


@pytest.mark.parametrize('make', [tiny.model, traced, cross])
def test_attention_takes_the_kernel_that_is_asked_for(make):
    "In the scripted file, and with the same answers."
    model, words, said = make(), ['a small red circle', '', 'blue'], {}
    picture = torch.randint(0, 256, (3, 3, 48, 48), dtype=torch.uint8)
    for how in ('sdpa', 'math'):
        a = quietly(torch.jit.script, assemble(model, variant=Variant(attention=how)))
        def call(a=a): return a(words, list(picture)) if hasattr(a, 'score_pairs') else a.encode_text(words)
        said[how], used = call(), operators(call)
        assert (
            ('aten::_scaled_dot_product_attention_math' in used)
            == (how == 'math')
            != ('aten::scaled_dot_product_attention' in used)
        ), used
    assert torch.allclose(said['math'], said['sdpa'], atol=1e-5)


@functools.cache
def exported():
    "A file with both options that change nothing but the way of computing, verified."
    path, _, report = tiny.reported('accelerated', tiny.model, attention='math', graphs=[4, 1, 4])
    return path, report


def test_options_are_verified_and_in_the_card():
    """The sizes stand in the card, batches filled up as for them are verified.

    Hosts on a CPU leave them aside and say so."""
    path, report = exported()
    rows = {(r.stage, r.what) for r in report.rows}
    assert {('against fp32', 'text cosine'), ('graphs', 'text embedding'), ('graphs', 'image embedding')} <= rows
    assert report.card['variant'] == {'attention': 'math'} and report.card['graphs'] == [1, 4]
    assert any(n.startswith('CUDA graphs: only a GPU captures them') for n in report.notes)
    assert report.card['content_hash'] == make_card(tiny.model(), 24, variant={'attention': 'math'})['content_hash']
    emb = load(path)
    assert emb.graphs == () and 'graphs on CUDA alone' in repr(emb)
    with pytest.raises(ValueError, match="graphs needs device='cuda', got 'cpu'"): load(path, graphs=(1, 2))


def test_options_that_do_not_go_together(tmp_path):
    with pytest.raises(ValueError, match='graphs must be batch sizes such as'):
        export(tiny.model(), tmp_path / 'm.pt', graphs=(0,))
    with pytest.raises(ValueError, match='m.pt2 is compiled for the CPU'):
        export(tiny.model(), tmp_path / 'm.pt2', graphs=(1,))
    with pytest.raises(ValueError, match='m.pt2 is compiled for the CPU'):
        export(tiny.model(), tmp_path / 'm.pt2', device='cuda')


def test_attention_that_cannot_be_chosen():
    class Own(nn.Module):
        width = 32
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(48, 2, batch_first=True)
            self.out = nn.Linear(48, 32)
        def forward(self, pixels: Tensor):
            x = pixels[:, 0]
            return self.out(self.attention(x, x, x)[0].mean(1))
    model = tiny.model()
    model.image = Own()
    model.image.pipeline = tiny.pipelines()[1]
    with pytest.raises(ValueError, match='the image tower, Own, attends in a way of its own'):
        prepared(model.eval(), Variant(attention='math'))
    class Mean(nn.Module):
        width = 32
        def __init__(self, embed): super().__init__(); self.embed = embed
        def forward(self, tokens: Tokens): return self.embed(tokens.ids).mean(1)
    still = tiny.model()
    pipeline, still.text = still.text.pipeline, Mean(still.text.embed)
    still.text.pipeline = pipeline
    with pytest.raises(ValueError, match="attention='math': neither tower has attention"):
        prepared(still.eval(), Variant(attention='math'))


def test_self_attention_in_steps():
    attention, x, mask = (
        SelfAttention(nn.MultiheadAttention(16, 2, batch_first=True)).eval(),
        torch.randn(2, 5, 16),
        torch.full((5, 5), float('-inf')).triu(1),
    )
    for m in (None, mask, mask < 0):
        attention.fused = True
        want = attention(x, x, x, attn_mask=m)[0]
        attention.fused = False
        assert torch.allclose(attention(x, x, x, attn_mask=m)[0], want, atol=1e-6)


def test_graphs_fill_batches_up():
    seen = []
    def f(x):
        seen.append(len(x))
        return x.sum(1)
    g, x = Graphed(f, (torch.zeros(1, 3),), (8, 2)), torch.arange(15.).view(5, 3)
    assert g(x).equal(x.sum(1)) and g(x[:2]).equal(x[:2].sum(1)) and seen == [8, 2]
    with pytest.raises(ValueError, match='a batch of 9 is larger than those captured: 2, 8'): g(torch.zeros(9, 3))


def test_pairs_behind_graphs():
    model, tp = tiny.pair_model(), tiny.pipelines()[0]
    a = assemble(model, script=False)
    b = Captured(a, make_card(model, 2), (1, 4))
    for n in (0, 1, 3, 6):
        data, levels = (
            pack((['a small red circle', 'b', ''] * 2)[:n]),
            torch.randint(0, 256, (n, 3, 48, 48), dtype=torch.uint8),
        )
        assert (
            torch.allclose(b.score_pairs(*data, levels), a.score_pairs(*data, levels), atol=1e-5)
            and len(b.score_pairs(*data, levels)) == n
        )
    assert torch.allclose(
        b(tp(['a', 'b']), b.normalized(levels[:2])), a.model(tp(['a', 'b']), a.normalized(levels[:2])), atol=1e-5
    )
    assert not hasattr(Captured(assemble(tiny.model(), script=False), make_card(tiny.model(), 24), 1), 'score_pairs')


def test_an_embedder_behind_graphs():
    "Every way in, for sizes that are captured and larger ones; from several threads."
    from concurrent.futures import ThreadPoolExecutor
    from mmembed.exporters.verify import samples as cases
    plain, emb, texts = load(exported()[0]), load(exported()[0]), cases.texts()[:20]
    images = [as_bytes(b) for b in cases.images().values()]
    emb.module = Captured(emb.module, emb.card, (1, 4))
    emb.graphs = emb.module.sizes
    want, (good, ok, errors) = plain.encode_text(texts), plain.encode_image(images, on_error='flag')
    assert torch.allclose(emb.encode_text(texts), want, atol=1e-5) and torch.allclose(
        emb.encode_tokens(emb.tokenize(texts[:3])), want[:3], atol=1e-5
    )
    got = emb.encode_image(images, on_error='flag')
    assert torch.allclose(got.embedding, good, atol=1e-5) and got.errors == errors
    with ThreadPoolExecutor(4) as pool: rows = list(pool.map(lambda t: emb.encode_text([t])[0], texts * 3))
    assert torch.allclose(torch.stack(rows), want.repeat(3, 1), atol=1e-5)
    assert (
        emb.profile(['a'], [x for x, o in zip(images, ok) if o][:2], repeats=1).image_tower > 0
        and emb.warmup((1, 4)) is emb
    )


def test_a_tower_that_waits_is_not_captured(tmp_path):
    class Impatient(nn.Module):
        def __init__(self, tower):
            super().__init__()
            self.tower, self.width, self.pipeline = tower, tower.width, tower.pipeline

        def forward(self, tokens: Tokens):
            return self.tower(tokens) if int(tokens.mask.sum()) > 0 else self.tower(tokens)
    model = tiny.model()
    model.text = Impatient(model.text)
    with pytest.raises(ValueError, match=r'graphs: the text tower cannot be captured: aten\._local_scalar_dense waits'):
        export(model.eval(), tmp_path / 'm.pt', graphs=(1,))
    for make in (tiny.model, tiny.pair_model, traced, cross): assert waits(assemble(make(), script=False)) == ''


@pytest.mark.skipif(torch.cuda.is_available(), reason='a GPU is here')
def test_without_a_gpu_it_says_so():
    assert why_not('graphs') == why_not('fp16', 'cuda') == 'torch sees no CUDA device here'
    assert why_not('graphs', 'cpu') == 'CUDA graphs need a GPU' and all(
        not why_not(k) for k in ('fp16', 'bf16', 'int8', 'sdpa', 'math')
    )
    with pytest.raises(RuntimeError, match='torch sees no CUDA device here'):
        eager_towers(tiny.model(), device='cuda', compile=True)
    with pytest.raises(ValueError, match="no acceleration 'fast'; there are fp16"): why_not('fast')
    assert ACCELERATIONS.keys() >= {'fp16', 'int8', 'sdpa', 'graphs', 'aotinductor', 'tensorrt', 'compile'}


def test_the_benchmark_lists_what_a_machine_lacks(capsys):
    "One line an acceleration; none is a name of the library."
    import mmembed.exporters.cuda_graphs as module
    assert gpu(['--list']) == {}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*ACCELERATIONS]
    if not torch.cuda.is_available():
        assert any(x.startswith('graphs') and x.endswith('torch sees no CUDA device here') for x in lines)
    assert not {'ACCELERATIONS', 'why_not', 'eager_towers'} & vars(module).keys()


@pytest.mark.parametrize('how', [Variant(), Variant(attention='math'), Variant(precision='bf16')])
def test_eager_towers_answer_like_the_model(how):
    model = tiny.model()
    tokens = model.text_pipeline(['a small red circle', ''])
    text, _ = eager_towers(model, how)
    assert nn.functional.cosine_similarity(text(*tokens), model.encode_text(tokens)).min() > .999


def test_providers_of_onnxruntime():
    onnxruntime = pytest.importorskip('onnxruntime')
    assert provider_of('cpu') == ['CPUExecutionProvider']
    with pytest.raises(ValueError, match='device must be cpu, cuda or tensorrt, got .tpu.'): provider_of('tpu')
    if 'TensorrtExecutionProvider' not in onnxruntime.get_available_providers():
        assert (
            why_not('tensorrt')
            == "device='tensorrt': this onnxruntime has no TensorrtExecutionProvider: pip install onnxruntime-gpu "
               "tensorrt"
        )


@pytest.mark.parametrize(
    'make, variant',
    [(tiny.model, Variant()), (tiny.pair_model, Variant()), (traced, Variant(precision='fp16', attention='math'))],
)
def test_an_artifact_moves_whole(make, variant):
    """map_location moves parameters, buffers and the constants of the code.

    A device that is written into the code stays."""
    assert left_behind(quietly(torch.jit.script, assemble(make(), variant=variant))) == []


def test_towers_on_the_meta_device():
    "Every tensor of the traced and scripted towers follows `to`: one that stayed would meet meta tensors and fail."
    artifact = quietly(torch.jit.script, assemble(traced())).to('meta')
    ids = torch.ones(2, 8, dtype=torch.int64, device='meta')
    text = artifact.model.encode_text(Tokens(ids, ids))
    image = artifact.model.encode_image(torch.zeros(2, 3, *tiny.pipelines()[1].size, device='meta'))
    assert text.device.type == image.device.type == 'meta' and text.shape == image.shape == (2, 16)


def test_map_location_moves_every_tensor():
    artifact = quietly(torch.jit.load, str(exported()[0]), map_location='meta')
    assert {t.device.type for t in (*artifact.parameters(), *artifact.buffers())} == {'meta'}


def test_a_device_in_a_trace_is_found():
    class Forgets(nn.Module):
        def forward(self, x): return x + torch.arange(x.shape[1], device=x.device)
    found = left_behind(quietly(torch.jit.trace, Forgets(), torch.zeros(2, 3)))
    assert found and all('on cpu' in f for f in found) and any('aten::arange' in f for f in found)


def rehearsed(module, call):
    """What `call` gives for the module as it is and for a copy whose tensors lie elsewhere, where none may meet a
    tensor that has stayed."""
    want = call(module)
    with Rehearsal(): got = call(moved(module))
    flat = lambda x: list(x) if isinstance(x, tuple) else [x]
    return [(here(g), w, isinstance(g, Away)) for g, w in zip(flat(got), flat(want))]


@pytest.mark.parametrize('family', ['WordPiece, cased, Chinese', 'GPT-2 style'])
def test_tokenizers_on_another_device(family):
    tp = FAMILIES[family]().eval()
    for texts in AWKWARD[::9] + random_texts(20, seed=5), ['a small red circle']:
        data, offsets = pack(texts)
        def tokenize(m, packed=(data, offsets)): return m.tokenize(*(packed if m is tp else map(there, packed)))
        for got, want, away in rehearsed(tp, tokenize):
            assert away and got.equal(want)


VARIANTS = [
    (tiny.model, Variant()),
    (tiny.model, Variant(precision='bf16', attention='math')),
    (tiny.model, Variant(deterministic=4, dim=8, output='int8')),
    (tiny.model, Variant(output='binary', trim=4)),
    (tiny.model, Variant(quantize='int8')),
    (traced, Variant(precision='fp16')),
    (tiny.pair_model, Variant()),
    (cross, Variant()),
]


@pytest.mark.parametrize('make, variant', VARIANTS, ids=lambda x: x.words() if isinstance(x, Variant) else x.__name__)
def test_an_artifact_on_another_device(make, variant):
    "Bytes of text and levels come from the CPU, answers lie where the artifact does."
    if variant.quantize: needs_exact_int8()
    a, levels = (
        assemble(make(), variant=variant, script=False),
        torch.randint(0, 256, (3, 3, 48, 48), dtype=torch.uint8),
    )
    packed, calls = pack(['a small red circle', 'Café 一个', '']), []
    if hasattr(a, 'score_pairs'):
        calls += [lambda m: m.score_pairs(*packed, levels), lambda m: m.score_pairs(*pack([]), levels[:0])]
    else:
        calls += [
            lambda m: m.encode_text_bytes(*packed),
            lambda m: m.encode_pixels(levels),
            lambda m: m.encode_pixels(levels[:0]),
            lambda m: m.score(m.encode_text_bytes(*packed), m.encode_pixels(levels)),
        ]
    for call in calls:
        for got, want, away in rehearsed(a, call):
            assert away and torch.allclose(got.float(), want.float(), atol=2e-2 if variant != Variant() else 1e-4)


def test_pixels_on_another_device():
    "resize='float' computes where the picture lies, the others on the CPU, and say so."
    rgb = torch.randint(0, 256, (3, 61, 80), dtype=torch.uint8)
    # torch.tensor(device=...) makes a tensor that the rehearsal does not see
    for resize_mode in ('shortest', 'squash'):
        vp = VisionPipeline(size=32, resize='float', resize_mode=resize_mode)
        def preprocess(m, vp=vp): return m.preprocess(rgb if m is vp else there(rgb))
        def normalize(m, vp=vp): return m.normalize(rgb[None] if m is vp else there(rgb[None]))
        for got, want, away in rehearsed(vp, preprocess): assert away and (got.int() - want.int()).abs().max() <= 1
        for got, want, away in rehearsed(vp, normalize): assert away and torch.allclose(got, want)
    with pytest.raises(ValueError, match="resize='torch' runs on the CPU"), Rehearsal():
        VisionPipeline(size=32).preprocess(there(rgb))


def test_the_rehearsal_finds_what_stays():
    class Forgets(nn.Module):
        def forward(self, x): return x + torch.arange(x.shape[1])

    with pytest.raises(Mixed, match='aten.add.Tensor got tensors of two devices'):
        rehearsed(Forgets(), lambda m: m(there(torch.zeros(2, 3))))
