"The dual encoder: unit vectors, the same in every form, made again from its spec."
import json

import pytest
import torch

from mmembed.core.types import Embeddings, Tokens
from mmembed.data.scenes import Scenes
from mmembed.models.dual import DualEncoder
from mmembed.models.pair import PairClassifier
from mmembed.train.finetune import lock
from mmembed.models.towers import ConvNet, TextTransformer
from mmembed.models.base import from_spec
from mmembed.text.pipeline import TextPipeline
from mmembed.train.modules import LitDualEncoder
from mmembed.vision.pipeline import VisionPipeline
from tests.helpers import FORMS, in_form

SCENES = Scenes(train=12, valid=0)
TP = TextPipeline.learn([SCENES.text(i) for i in range(12)], vocab_size=200, max_length=48)
VP = VisionPipeline(size=48)


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return DualEncoder(TextTransformer(TP, width=32, depth=1), ConvNet(VP, channels=(8, 16), width=24), dim=16).eval()


@pytest.fixture(scope='module')
def inputs(): return TP([SCENES.text(i) for i in range(12)]), VP([SCENES.image(i) for i in range(12)])


@pytest.mark.parametrize('form', FORMS)
def test_every_form(model, inputs, form):
    other = in_form(model, form)
    with torch.no_grad():
        want, got = model(*inputs), Embeddings(*other(*inputs))
        for a, b in zip(want, got, strict=True): assert torch.allclose(a, b, atol=1e-6)
        assert torch.allclose(other.encode_text(inputs[0]), want.text, atol=1e-6)
        assert torch.allclose(other.encode_image(inputs[1]), want.image, atol=1e-6)


def test_unit_vectors_and_scale(model, inputs):
    with torch.no_grad(): out = model(*inputs)
    assert out.text.shape == out.image.shape == (12, 16)
    for side in out[:2]: assert torch.allclose(side.norm(dim=1), torch.ones(12), atol=1e-6)
    assert out.logit_scale.item() == pytest.approx(1/0.07, rel=1e-6)
    assert set(dict(model.named_children())) == {'text', 'image', 'text_proj', 'image_proj'}


def test_made_again(model, inputs):
    spec = json.loads(json.dumps(model.spec()))
    again = from_spec(spec).eval()
    again.load_state_dict(model.state_dict())
    assert again.spec() == spec
    assert again.text_pipeline.spec() == TP.spec() and again.vision_pipeline.spec() == VP.spec()
    with torch.no_grad():
        for a, b in zip(model(*inputs), again(*inputs), strict=True): assert a.equal(b)


def test_towers_of_ones_own(inputs):
    class Mean(torch.nn.Module):
        width = 3
        def forward(self, pixels): return pixels.mean((2, 3))
    model = DualEncoder(TextTransformer(TP, width=32, depth=1), Mean(), dim=4)
    assert model(*inputs).image.shape == (12, 4) and model.vision_pipeline is None
    with pytest.raises(TypeError, match=r'Mean has no spec\(\)'): model.spec()


def test_it_can_learn_a_dozen_pairs(inputs):
    from mmembed.models.losses import info_nce
    torch.manual_seed(0)
    model = DualEncoder(TextTransformer(TP, width=32, depth=1), ConvNet(VP, channels=(8, 16), width=24), dim=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        out = model(*inputs)
        loss = info_nce(out.logit_scale * out.text @ out.image.T)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2 and (out.text @ out.image.T).argmax(1).equal(torch.arange(12))


@pytest.mark.parametrize('classify', [False, True], ids=['dual', 'pair'])
def test_what_is_no_tokens_or_pixels_is_told(model, inputs, classify):
    "Texts, files, levels, and tokens of another tokenizer: a sentence that says what makes the right ones."
    tokens, pixels = inputs
    m = PairClassifier(model.text, model.image, ['no', 'yes'], dim=8).eval() if classify else model
    text = (lambda x: m(x, pixels[:len(x[0])])) if classify else m.encode_text
    image = (lambda x: m(tokens, x)) if classify else m.encode_image
    other = Tokens(torch.full((12, 4), 49407), torch.ones(12, 4, dtype=torch.int64))
    for call, given, kind, said in (
        (text, ['a cat'], TypeError, r'not list: model.text_pipeline'),
        (text, other, ValueError, r'token id 49,407 is beyond the \d+ that'),
        (text, Tokens(tokens.ids[0], tokens.mask[0]), ValueError, r'shape \(B, L\)'),
        (image, ['cat.jpg'], TypeError, r'not list: model.vision_pipeline'),
        (image, pixels[0], ValueError, r'shape \(B, 3, H, W\)'),
        (
            image,
            torch.zeros(12, 3, 48, 48, dtype=torch.uint8),
            TypeError,
            r'not uint8: model.vision_pipeline.normalize',
        ),
    ):
        with pytest.raises(kind, match=said): call(given)


def test_one_name_may_be_locked(model):
    from copy import deepcopy
    m = deepcopy(model)
    lock(m, 'image')
    assert not any(p.requires_grad for p in m.image.parameters()) and all(p.requires_grad for p in m.text.parameters())
    lit = LitDualEncoder(m, lock='image')
    assert lit.hparams.lock == ['image'] and lit.adapters()['towers'] == ['text']
