"open_clip's and timm's families: their own numbers, made again from a spec, exported whole."
import json

import open_clip
import pytest
import torch
from open_clip import factory

from mmembed.core.types import Tokens
from mmembed.exporters.export import export
from mmembed.models.dual import DualEncoder
from mmembed.models.open_clip import OpenClipText, open_clip_towers
from mmembed.models.towers import timm_tower
from mmembed.models.base import from_spec
from mmembed.runtime.embedder import load
from mmembed.text.pipeline import TextPipeline
from mmembed.vision.pipeline import VisionPipeline
from tests.alone import alone
from tests.helpers import FORMS, in_form

TEXTS = ['a photo of a cat', '', 'two dogs on a sofa, and more of them ' * 3, '!!! a cat!']
TEXT = dict(context_length=20, vocab_size=49408, width=32, heads=2, layers=2)
VISION = dict(image_size=32, layers=2, width=32, patch_size=16, head_width=16)
TIMM = dict(timm_model_name='resnet10t', timm_model_pretrained=False, timm_pool='avg', timm_proj=None, image_size=64)
FAMILIES = {
    'tiny-vit': dict(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT),
    'tiny-gelu': dict(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT, quick_gelu=True),
    'tiny-resnet': dict(
        embed_dim=16, vision_cfg=dict(image_size=32, layers=[1, 1, 1, 1], width=8, patch_size=None), text_cfg=TEXT
    ),
    'tiny-coca': dict(
        embed_dim=16,
        vision_cfg=VISION | dict(attentional_pool=True, attn_pooler_heads=2, output_tokens=True),
        custom_text=True,
        text_cfg=TEXT | dict(embed_cls=True, output_tokens=True),
        multimodal_cfg=TEXT | dict(attn_pooler_heads=2),
    ),
    'tiny-siglip': dict(
        embed_dim=32,
        init_logit_bias=-10,
        custom_text=True,
        vision_cfg=VISION,
        text_cfg=TEXT
        | dict(vocab_size=200, no_causal_mask=True, proj_bias=True, pool_type='last', hf_tokenizer_name='some/SigLIP'),
    ),
    'tiny-mobileclip': dict(embed_dim=16, vision_cfg=TIMM, text_cfg=TEXT | dict(no_causal_mask=True), custom_text=True),
}


@pytest.fixture(autouse=True)
def known(monkeypatch):
    "open_clip knows the tiny models while a test runs; it makes its table anew whenever somebody adds a model."
    monkeypatch.setattr(factory, '_MODEL_CONFIGS', factory._MODEL_CONFIGS | FAMILIES)


def siglip_pipeline(): return TextPipeline.learn(TEXTS * 9, vocab_size=150, max_length=20)


def made(name):
    torch.manual_seed(0)
    return DualEncoder.from_open_clip(name, text_pipeline=siglip_pipeline() if name == 'tiny-siglip' else None).eval()


def padded(model, tokens):
    "ids as open_clip's tokenizer gives them: always of the full length."
    n = model.text.length - tokens.ids.shape[1]
    return torch.nn.functional.pad(tokens.ids, (0, n), value=model.text.pad_id)


@pytest.mark.parametrize('name', FAMILIES)
def test_open_clip_numbers_in_every_form(name, tmp_path):
    reference = open_clip.create_model(name).eval()
    if name == 'tiny-coca':  # open_clip leaves this one as memory was, NaN now and then
        with torch.no_grad(): reference.text_decoder.text_projection.normal_()
    torch.save(reference.state_dict(), tmp_path/'weights.pt')
    model = DualEncoder.from_open_clip(
        name, str(tmp_path / 'weights.pt'), siglip_pipeline() if name == 'tiny-siglip' else None
    ).eval()
    tokens, pixels = model.text_pipeline(TEXTS), torch.randn(4, 3, *model.vision_pipeline.size)
    with torch.no_grad():
        text, image = (
            reference.encode_text(padded(model, tokens), normalize=True),
            reference.encode_image(pixels, normalize=True),
        )
        for form in FORMS:
            out = in_form(model, form)(tokens, pixels)
            assert torch.allclose(out[0], text, atol=1e-5) and torch.allclose(out[1], image, atol=1e-5), form
    assert model.logit_scale.exp().item() == pytest.approx(reference.logit_scale.exp().item())
    assert (model.logit_bias is None) == (reference.logit_bias is None)
    again = from_spec(json.loads(json.dumps(model.spec()))).eval()
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        for a, b in zip(model(tokens, pixels), again(tokens, pixels), strict=True): assert a.equal(b)


@pytest.mark.parametrize('name', ['tiny-vit', 'tiny-resnet', 'tiny-coca', 'tiny-mobileclip', 'tiny-siglip'])
@alone(lambda: factory._MODEL_CONFIGS.update(FAMILIES))
def test_exported_and_verified(name, tmp_path):
    model = made(name)
    if name == 'tiny-siglip':
        with torch.no_grad(): model.logit_bias.fill_(-3.5)
    report = export(model, tmp_path/'m.pt', decode=False, fresh=False, cpp=False)
    bias = -3.5 if name == 'tiny-siglip' else 0
    assert report.ok and report.card['logit_bias'] == bias
    picture = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    with torch.no_grad():
        out = model(model.text_pipeline(TEXTS), model.vision_pipeline([picture]))
        want = out.logit_scale * out.text @ out.image.T + bias
    assert torch.allclose(load(tmp_path/'m.pt').score(TEXTS, [picture]), want, atol=1e-4)


def test_short_batches_only_where_padding_is_not_seen():
    clip, siglip = made('tiny-vit'), made('tiny-siglip')
    assert not clip.text.fixed and siglip.text.fixed and made('tiny-coca').text.fixed
    ids = torch.tensor([[3, 5, 9]])
    with torch.no_grad():
        longer = torch.nn.functional.pad(ids, (0, 5), value=siglip.text.pad_id)
        assert siglip.text(Tokens(ids, ids)).equal(siglip.text(Tokens(longer, longer)))


@pytest.mark.parametrize(
    'name, pooling',
    [('resnet10t', None), ('resnet10t', 'max'), ('vit_tiny_patch16_224', 'cls'), ('vit_tiny_patch16_224', 'mean')],
)
def test_timm_is_timm(name, pooling, tmp_path):
    import timm
    kinds = {None: {}, 'max': {'global_pool': 'max'}, 'cls': {'global_pool': 'token'}, 'mean': {'global_pool': 'avg'}}
    net = timm.create_model(name, **kinds[pooling]).eval()
    torch.save(net.state_dict(), tmp_path/'w.pth')
    tower = timm_tower(name, str(tmp_path/'w.pth'), pooling=pooling).eval()
    again = from_spec(json.loads(json.dumps(tower.spec()))).eval()
    again.load_state_dict(tower.state_dict())
    pixels = torch.randn(2, 3, *tower.pipeline.size)
    with torch.no_grad():
        want = net.forward_head(net.forward_features(pixels), pre_logits=True)
        assert torch.allclose(tower(pixels), want, atol=1e-5) and tower.width == want.shape[1]
        assert torch.allclose(in_form(again, 'loaded')(pixels), want, atol=1e-5)


def test_mistakes(tmp_path):
    torch.save({'x': torch.zeros(1)}, tmp_path/'other.pth')
    for f, error, message in [
        (lambda: open_clip_towers('ViT-B-33'), ValueError, "knows no model 'ViT-B-33'"),
        (
            lambda: open_clip_towers('tiny-vit', 'nothing'),
            ValueError,
            "'nothing' is not a weights file, .* it knows none",
        ),
        (lambda: open_clip_towers('tiny-vit', str(tmp_path / 'other.pth')), ValueError, 'does not fit tiny-vit'),
        (lambda: open_clip_towers('ViT-B-16-SigLIP'), ValueError, 'SigLIP'),
        (lambda: open_clip_towers(f'local-dir:{tmp_path}'), ValueError, 'config file missing'),
        (
            lambda: open_clip_towers('tiny-vit', vision_pipeline=VisionPipeline(size=64)),
            ValueError,
            r'gives \(64, 64\) pixels, the model takes 32',
        ),
        (
            lambda: OpenClipText(TextPipeline.from_open_clip('ViT-B-32'), 16, TEXT),
            ValueError,
            'up to 77 tokens, the model takes 20',
        ),
        (
            lambda: OpenClipText(siglip_pipeline(), 16, {'hf_model_name': 'roberta-base'}),
            ValueError,
            r'make it with Bert.from_pretrained\(\)',
        ),
        (lambda: timm_tower('resnet19'), ValueError, "timm knows no model 'resnet19'"),
        (lambda: timm_tower('resnet10t', 'no.pth'), FileNotFoundError, 'no weights file no.pth'),
        (lambda: timm_tower('resnet10t', str(tmp_path / 'other.pth')), ValueError, 'does not fit resnet10t'),
        (
            lambda: timm_tower('resnet10t', pooling='sum'),
            ValueError,
            "pooling must be one of mean, max, cls or None, got 'sum'",
        ),
    ]:
        with pytest.raises(error, match=message): f()


def test_a_local_folder(tmp_path):
    reference = open_clip.create_model('tiny-vit').eval()
    (tmp_path / 'open_clip_config.json').write_text(
        json.dumps({'model_cfg': FAMILIES['tiny-vit'], 'preprocess_cfg': {'mean': [0.5] * 3, 'std': [0.5] * 3}})
    )
    torch.save(reference.state_dict(), tmp_path/'open_clip_pytorch_model.bin')
    model = DualEncoder.from_open_clip(f'local-dir:{tmp_path}').eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(model.encode_image(pixels), reference.encode_image(pixels, normalize=True), atol=1e-6)
    assert model.vision_pipeline.mean.flatten().tolist() == [0.5]*3 and model.text_pipeline.max_length == 20


def test_weights_that_open_clip_leaves_as_memory_was(monkeypatch):
    """CoCa's `text_projection` is not set in a model without weights: whatever stands there, also NaN, hinders nobody.

    In a file it is refused."""
    make = open_clip.create_model

    def unset(*args, **kw):
        model = make(*args, **kw)
        model.text_decoder.text_projection.data.fill_(float('nan'))
        return model
    monkeypatch.setattr(open_clip, 'create_model', unset)
    model = made('tiny-coca')
    assert model.encode_text(model.text_pipeline(['a'])).isfinite().all()
