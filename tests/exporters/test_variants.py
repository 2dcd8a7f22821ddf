import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmembed.core.torchscript import quietly
from mmembed.exporters.verify import samples as cases
from mmembed.exporters.assemble import assemble
from mmembed.runtime.artifact import read_card
from mmembed.core.quantize import dequantize
from mmembed.exporters.steps import Steps, read_classes
from mmembed.exporters.variants import PRECISION_BOUNDS, Variant, prepared
from mmembed.exporters.int8 import Int8Linear, channel_peaks, evened, int8_linear
from mmembed.exporters.verify.report import VerifyError
from mmembed.exporters.export import export

from tests.exporters import tiny

TEXTS = [t.decode() for t in cases.texts()[:40]]


def scripted(model=None, **options): return quietly(torch.jit.script, assemble(model or tiny.model(), **options))


class Inverted(nn.Module):
    def forward(self, rgb: Tensor) -> Tensor: return 255 - rgb


class NoDigits(nn.Module):
    def forward(self, data: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        keep = (data < 48) | (data > 57)
        return data[keep], torch.cat([torch.zeros(1, dtype=torch.int64), keep.long().cumsum(0)])[offsets]


@torch.no_grad()
@pytest.mark.parametrize(
    'v',
    [
        Variant(precision='bf16'),
        Variant(precision='fp16'),
        Variant(quantize='int8'),
        Variant(trim=4),
        Variant(output='int8'),
    ],
    ids=str,
)
def test_a_variant_is_near_the_model(v):
    want, got = tiny.model().encode_text(tiny.pipelines()[0](TEXTS)), scripted(variant=v).encode_text(TEXTS)
    cosine = F.cosine_similarity(want, dequantize(got, v.output), dim=1).min()
    assert cosine > (.99 if v.quantize else .999) and len(got) == len(TEXTS)


@torch.no_grad()
def test_fewer_dimensions_are_the_first_of_unit_length():
    whole, some = (
        tiny.model().encode_text(tiny.pipelines()[0](TEXTS)),
        scripted(variant=Variant(dim=8)).encode_text(TEXTS),
    )
    assert torch.allclose(some, F.normalize(whole[:, :8], dim=1), atol=1e-6)


@torch.no_grad()
def test_deterministic_in_any_company():
    a = scripted(variant=Variant(deterministic=4))
    whole = a.encode_text(TEXTS)
    pixels = torch.stack([a.preprocess_image(x) for x in cases.arrays()])
    images = a.encode_pixels(pixels)
    for n in (1, 3, 7):
        assert torch.cat([a.encode_text(TEXTS[i:i+n]) for i in range(0, len(TEXTS), n)]).equal(whole)
        assert torch.cat([a.encode_pixels(pixels[i:i+n]) for i in range(0, len(pixels), n)]).equal(images)
    assert a.encode_text([]).shape == (0, 24)


def test_an_int8_row_does_not_depend_on_its_neighbours():
    layer, x = Int8Linear(nn.Linear(32, 16)), torch.randn(9, 32) * torch.logspace(-3, 3, 9)[:, None]
    for i in range(9): assert layer(x[i:i+1]).equal(layer(x)[i:i+1])
    assert layer(x[:0]).shape == (0, 16) and layer(torch.zeros(1, 32)).equal(layer.bias[None])


def loud(times=100.):
    "The same function, but that two channels in each normalised state are loud, and read as much more quietly."
    model = tiny.model()
    for block in model.text.blocks:
        for norm, reader in ((block.norm1, block.qkv), (block.norm2, block.up)):
            for x in (norm.weight, norm.bias): x.data[[3, 9]] *= times
            reader.weight.data[:, [3, 9]] /= times
    return model


@torch.no_grad()
def test_int8_bears_loud_channels():
    model, tokens = loud(), tiny.pipelines()[0](TEXTS)
    want, plain, evened = (
        tiny.model().encode_text(tokens),
        prepared(model).model,
        prepared(model, Variant(quantize='int8')).model,
    )
    assert int8_linear(plain.text) == 8
    assert torch.allclose(model.encode_text(tokens), want, atol=1e-5)
    def off(net): return float(1 - F.cosine_similarity(want, net.encode_text(tokens)).min())
    assert off(evened) < PRECISION_BOUNDS['int8'] / 20 and off(plain) > PRECISION_BOUNDS['int8']


@torch.no_grad()
def test_int8_weights_are_the_same_whenever_they_are_made():
    threads, made = torch.get_num_threads(), []
    try:
        for n in (1, 2, 1):
            torch.set_num_threads(n)
            made.append(prepared(loud(), Variant(quantize='int8')).model.state_dict())
            assert torch.get_num_threads() == n
    finally: torch.set_num_threads(threads)
    assert all(x.equal(other[k]) for other in made[1:] for k, x in made[0].items())


@torch.no_grad()
def test_peaks_are_of_every_input_of_a_linear_layer():
    tower, x = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1)), torch.tensor([[1., -5., 0.], [2., 3., 0.]])
    first, second = channel_peaks(tower, x[:1], x[1:]).values()
    assert first.equal(torch.tensor([2., 5., 0.])) and torch.allclose(second, tower[:2](x).amax(0))
    assert not any(m._forward_hooks for m in tower.modules())


@torch.no_grad()
def test_peaks_are_those_behind_a_gelu():
    tower, x = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)).eval(), torch.randn(50, 16)
    want = evened(tower[2].weight, tower[:2](x).abs().amax(0))
    answer = tower(x)
    assert int8_linear(tower, x) == 2 and tower[0].gelu and tower[2].scale.equal(want)
    assert torch.allclose(tower(x), answer, atol=.02)


@torch.no_grad()
def test_an_int8_layer_in_slabs_is_the_layer_at_once():
    for gelu in (False, True):
        layer = Int8Linear(nn.Linear(24, 40), torch.rand(24), gelu)
        for n in (0, 1, 256, 257, 700):
            x = torch.randn(n, 24)
            assert torch.allclose(quietly(torch.jit.script, layer)(x), layer(x), atol=1e-6) and layer(x).shape == (
                n,
                40,
            )


def test_variants_have_cards_and_hashes_of_their_own(tmp_path):
    options = dict(
        precision='bf16',
        dim=16,
        output='int8',
        labels={'circle': ['a small red circle'], 'square': ['a large blue square']},
        top_k=1,
        threshold={'circle': 0.1},
        before_image=Inverted(),
        before_text=NoDigits(),
    )
    report = export(tiny.model(), tmp_path/'small.pt', fresh=False, cpp=False, **options)
    card, plain = report.card, read_card(tiny.artifact())
    assert card['variant'] == {'precision': 'bf16', 'dim': 16, 'output': 'int8'} and card['dtype'] == 'bfloat16'
    assert card['steps'].keys() == {'before_text', 'before_image'} and card['classes']['names'] == ['circle', 'square']
    assert card['weights_sha256'] == plain['weights_sha256'] and card['content_hash'] != plain['content_hash']
    assert {r.stage for r in report.rows} == {'card', 'artifact', 'against fp32'}
    assert (
        export(tiny.model(), tmp_path / 'again.pt', fresh=False, cpp=False, **options).card['content_hash']
        == card['content_hash']
    )
    a = quietly(torch.jit.load, str(tmp_path/'small.pt'))
    assert a.labels() == ['circle', 'square'] and a.classify_text(['a small red circle']).labels == [['circle']]
    assert a.tokenize(torch.tensor([49, 97], dtype=torch.uint8), torch.tensor([0, 2])).ids.equal(
        tiny.pipelines()[0](['a']).ids
    )
    with pytest.raises(Exception, match='embedding must be of the type'): a.class_probability(torch.zeros(1, 16))


def test_a_step_that_answers_otherwise_when_scripted_is_found(tmp_path):
    class TwoFaced(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if torch.jit.is_scripting(): return x + 0.01
            return x

    with pytest.raises(VerifyError, match='artifact, text embedding'):
        export(tiny.model(), tmp_path / 'x.pt', fresh=False, cpp=False, after=TwoFaced())
    assert not list(tmp_path.iterdir())


def test_labels_are_the_eager_models():
    model, tp = tiny.model(), tiny.pipelines()[0]
    a = scripted(model, classes=read_classes(['red', 'blue'], ('a {} circle', 'my {}'), top_k=2, threshold=.3))
    with torch.no_grad():
        rows = torch.stack(
            [F.normalize(model.encode_text(tp([f'a {c} circle', f'my {c}'])).mean(0), dim=0) for c in ('red', 'blue')]
        )
        want = (model.logit_scale.exp() * model.encode_text(tp(TEXTS)) @ rows.T).softmax(-1)
        got = a.classify_text(TEXTS)
    best, index = want.sort(1, descending=True)
    assert torch.allclose(got.probability, best.where(best >= 0.3, 0), atol=1e-5) and got.index.equal(
        index.where(best >= 0.3, -1)
    )
    assert got.labels == [[a.labels()[i] for i in row if i >= 0] for row in got.index.tolist()]


WRONG = {
    'precision must be one of': dict(variant=Variant(precision='int4')),
    'dim=25: an embedding has 24 numbers': dict(variant=Variant(dim=25)),
    'first convolution of ConvNet pads': dict(variant=Variant(fold=True)),
    'after: Linear fails': dict(steps=Steps(after=nn.Linear(3, 2))),
    'before_text: Inverted fails': dict(steps=Steps(before_text=Inverted())),
}


@pytest.mark.parametrize('message', WRONG)
def test_wrong_options_are_named(message):
    with pytest.raises(ValueError, match=message): assemble(tiny.model(), **WRONG[message])


def test_the_model_is_left_as_it_is():
    model = tiny.model()
    before = copy.deepcopy(model.state_dict())
    for v in (Variant(precision='bf16'), Variant(quantize='int8')): prepared(model, v)
    assert all(v.equal(before[k]) and v.dtype == before[k].dtype for k, v in model.state_dict().items())
