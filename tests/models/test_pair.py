"The pair classifier: the same in every form, from its file, and able to learn what only a pair can tell."
import json

import pytest
import torch

import mmembed as mm
from mmembed.core.packing import pack
from mmembed.core.torchscript import quietly
from mmembed.data.scenes import Scenes
from mmembed.exporters.verify.report import VerifyError
from mmembed.exporters.verify.verify import verify
from mmembed.models.dual import DualEncoder
from mmembed.models.pair import PairClassifier
from mmembed.models.base import from_spec
from mmembed.models.bert import Bert
from mmembed.models.towers import ConvNet, TextTransformer, image_tower
from mmembed.runtime.artifact import read_card
from mmembed.text.pipeline import TextPipeline
from mmembed.vision.pipeline import VisionPipeline
from tests.alone import alone
from tests.helpers import FORMS, in_form

SCENES = Scenes(train=16, valid=0)
TP = TextPipeline.learn([SCENES.text(i) for i in range(16)], vocab_size=200, max_length=48)
VP = VisionPipeline(size=64)
TEXTS, IMAGES = [SCENES.text(i) for i in range(16)], [SCENES.image(i) for i in range(16)]


def made(fusion, text=None, image=None):
    torch.manual_seed(0)
    text, image = text or TextTransformer(TP, width=32, depth=1), image or ConvNet(VP, channels=(8, 16), width=24)
    return PairClassifier(text, image, ['mismatch', 'match'], fusion, dim=32, dropout=0.).eval()


def bert():
    return Bert(
        TP,
        dict(
            model_type='bert', vocab_size=TP.vocab_size, hidden_size=32, num_hidden_layers=1,
            num_attention_heads=2, intermediate_size=48,
        ),
    )


@pytest.mark.parametrize('fusion', ['late', 'cosine', 'cross'])
@pytest.mark.parametrize('form', FORMS)
def test_every_form(fusion, form):
    model = made(fusion)
    tokens, pixels = TP(TEXTS), VP(IMAGES)
    with torch.no_grad():
        want = model(tokens, pixels)
        assert torch.allclose(in_form(model, form)(tokens, pixels), want, atol=1e-5)
        alone = torch.cat([model(TP([t]), pixels[i:i+1]) for i, t in enumerate(TEXTS[:4])])
        assert torch.allclose(alone, want[:4], atol=1e-5)


@pytest.mark.parametrize('fusion', ['late', 'cosine', 'cross'])
def test_it_learns_what_neither_side_alone_tells(fusion):
    model = made(fusion).train()
    tokens, pixels = TP(TEXTS), VP(IMAGES)
    label = torch.tensor([1, 0]).repeat_interleave(16)
    swapped = pixels.roll(1, 0)
    both = type(tokens)(*(x.repeat(2, 1) for x in tokens))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4 if fusion == 'cross' else 3e-3)
    for _ in range(150):
        loss = torch.nn.functional.cross_entropy(model(both, torch.cat([pixels, swapped])), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.25: break
    assert loss < 0.3  # log(2) is what either side alone allows


@pytest.mark.parametrize('fusion', ['late', 'cosine', 'cross'])
def test_made_again(fusion):
    model = made(fusion, bert(), image_tower('resnet18', pipeline=VP))
    spec = json.loads(json.dumps(model.spec()))
    again = from_spec(spec).eval()
    again.load_state_dict(model.state_dict())
    assert again.spec() == spec
    with torch.no_grad(): assert again(TP(TEXTS), VP(IMAGES)).equal(model(TP(TEXTS), VP(IMAGES)))


@pytest.mark.parametrize('fusion', ['late', 'cosine', 'cross'])
@alone()
def test_the_file_scores_as_the_model(fusion, tmp_path):
    model = made(fusion, bert() if fusion == 'cross' else None)
    report = mm.export(model, tmp_path/'pairs.pt', decode=False, fresh=False, cpp=False)
    assert report.ok and {'token ids', 'pixels', 'pair scores'} <= {r.what for r in report.rows}
    card = read_card(tmp_path/'pairs.pt')
    assert (card['kind'], card['labels'], card['normalized'], card['dim']) == (
        'PairClassifier',
        ['mismatch', 'match'],
        False,
        2,
    )
    artifact = quietly(torch.jit.load, str(tmp_path/'pairs.pt'))
    pictures = [VP.decode(x) for x in IMAGES[:3]]
    with torch.no_grad(): want = model(TP(TEXTS[:3]), VP(pictures))
    assert torch.allclose(artifact(TEXTS[:3], pictures), want, atol=1e-5) and artifact.labels() == ['mismatch', 'match']
    levels = torch.stack([artifact.preprocess_image(x) for x in pictures])
    assert artifact.score_pairs(*pack(TEXTS[:3]), levels).equal(artifact(TEXTS[:3], pictures))
    assert artifact([], []).shape == (0, 2)
    for call, message in [
        (lambda: artifact(TEXTS[:2], pictures), '2 texts and 3 images are not pairs'),
        (lambda: artifact.score_pairs(*pack(TEXTS[:2]), levels), '2 texts and 3 images are not pairs'),
    ]:
        with pytest.raises((RuntimeError, torch.jit.Error), match=message): call()
    with torch.no_grad(): next(model.fusion.parameters()).add_(0.1)
    with pytest.raises(VerifyError): verify(tmp_path/'pairs.pt', model, fresh=False, cpp=False).check()


def encoder(bias=None, hidden=24, dim=16):
    torch.manual_seed(1)
    return DualEncoder(
        TextTransformer(TP, width=32, depth=1), ConvNet(VP, channels=(8, 16), width=32), dim, 10.0, bias, hidden=hidden
    ).eval()


@pytest.mark.parametrize('dual', [dict(), dict(bias=-3.), dict(hidden=None), dict(hidden=None, dim=None)], ids=str)
def test_it_begins_at_the_cosine_of_an_encoder(dual):
    dual = encoder(**dual)
    torch.manual_seed(2)
    model = PairClassifier.from_dual(dual, ['no', 'yes', 'unsure'], 'yes')
    assert model.training
    model.eval()
    with torch.no_grad(): e, scores = dual(TP(TEXTS), VP(IMAGES)), model(TP(TEXTS), VP(IMAGES))
    want = e.logit_scale * (e.text * e.image).sum(1) + (dual.logit_bias if dual.logit_bias is not None else 0.)
    assert torch.allclose(scores[:, 1] - scores[:, 0], want, atol=1e-4) and scores[:, 0].equal(scores[:, 2])
    again = from_spec(json.loads(json.dumps(model.spec()))).eval()
    again.load_state_dict(model.state_dict())
    with torch.no_grad(): assert again(TP(TEXTS), VP(IMAGES)).equal(scores)
    torch.nn.functional.cross_entropy(model(TP(TEXTS), VP(IMAGES)), torch.zeros(16, dtype=torch.long)).backward()
    assert all(
        bool(p.grad.abs().sum() > 0)
        for k, p in model.fusion.named_parameters()
        if k.startswith(('out', 'cosine', 'text_proj'))
    )


def test_mistakes():
    class Mine(torch.nn.Linear): width = 8
    for f, message in [
        (lambda: PairClassifier(Mine(2, 8), ConvNet(VP), ['yes']), 'two or more, all different'),
        (lambda: PairClassifier(Mine(2, 8), ConvNet(VP), ['a', 'a']), 'two or more, all different'),
        (
            lambda: PairClassifier(Mine(2, 8), ConvNet(VP), ['a', 'b'], 'early'),
            "fusion must be 'late', 'cosine' or 'cross'",
        ),
        (lambda: PairClassifier(Mine(2, 8), ConvNet(VP), ['a', 'b'], dim=None), "are for fusion='cosine'"),
        (lambda: PairClassifier.from_dual(encoder(), ['a', 'b'], 'match'), 'match must be one of'),
        (lambda: PairClassifier(Mine(2, 8), ConvNet(VP), ['a', 'b'], 'cross'), 'a vector a token, which Mine'),
        (lambda: made('cross', image=image_tower('vit_b_16')), 'wants a grid, which TorchvisionTower'),
    ]:
        with pytest.raises(ValueError, match=message): f()
