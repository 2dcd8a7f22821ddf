"Fine-tuning practice: what is trained, at which rate, with which gradient."
import copy

import pytest
import torch
from torch import nn

from mmembed.models.dual import DualEncoder
from mmembed.models.losses import InfoNCE
from mmembed.train.finetune import (
    ZeroShot, add_lora, checkpointed, depths, embed_in_chunks, interpolate, layers, lock, merge_lora, parameter_groups,
    still, trade_off,
)
from mmembed.models.open_clip import OpenClipImage, OpenClipText
from mmembed.models.bert import Bert
from mmembed.models.towers import TextTransformer, image_tower
from mmembed.text.pipeline import TextPipeline
from mmembed.vision.pipeline import VisionPipeline

TP = TextPipeline.learn(['a red circle', 'a blue square'] * 9, vocab_size=60, max_length=12)
VP = VisionPipeline(size=32)
BERT = dict(
    model_type='bert', vocab_size=TP.vocab_size, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
    intermediate_size=48,
)


def small(): return DualEncoder(TextTransformer(TP, width=32, depth=3), image_tower('resnet18', pipeline=VP), dim=16)
def public(): return DualEncoder(Bert(TP, BERT), image_tower('mobilenet_v2', pipeline=VP), dim=16)


def clip():
    text = dict(context_length=20, vocab_size=100, width=32, heads=2, layers=3)
    vision = dict(image_size=32, layers=3, width=32, patch_size=16, head_width=16)
    return DualEncoder(OpenClipText(TP, 16, text), OpenClipImage(VP, 16, vision), dim=None)


MODELS = {'small': small, 'public': public, 'clip': clip}
TOKENS = TP(['a red circle', 'a blue square', 'red'] * 4)


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]()


def test_every_parameter_has_a_depth(model):
    for tower in (model.text, model.image):
        found, n = depths(tower), len(layers(tower))
        assert (
            found.keys() == dict(tower.named_parameters()).keys()
            and set(found.values()) <= set(range(n + 2))
            and n >= 3
        )
    heights = depths(clip().image)
    assert (
        heights['net.proj'] == heights['net.ln_post.weight'] == 4
        and heights['net.positional_embedding'] == heights['net.conv1.weight'] == 0
    )
    heights = depths(public().text)
    assert (
        heights['net.embeddings.word_embeddings.weight'] == 0
        and heights['net.encoder.layer.2.output.dense.weight'] == 3
    )


def test_groups_hold_every_parameter_once_at_its_rate(model):
    groups = parameter_groups(model, 1e-3, 0.1, layer_decay=0.5)
    assert sorted(id(p) for g in groups for p in g['params']) == sorted(map(id, model.parameters()))
    rate = {id(p): g['lr'] for g in groups for p in g['params']}
    assert rate[id(model.logit_scale)] == 1e-3
    for tower in (model.text, model.image):
        found, top = depths(tower), max(depths(tower).values())
        for k, p in tower.named_parameters(): assert rate[id(p)] == pytest.approx(1e-3 * 0.5 ** (top + 1 - found[k])), k
    decay = {id(p): g['weight_decay'] for g in groups for p in g['params']}
    for k, p in model.named_parameters():
        assert (decay[id(p)] > 0) == (p.ndim > 1 and not k.endswith('positional_embedding')), k


def test_locks(model):
    lock(model, ['text', 'image-1'])
    assert not any(p.requires_grad for p in model.text.parameters())
    found, n = depths(model.image), len(layers(model.image))
    assert {k for k, p in model.image.named_parameters() if p.requires_grad} == {k for k, h in found.items() if h >= n}
    still(model.train())
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): assert m.training == all(p.requires_grad for p in m.parameters())
    with pytest.raises(ValueError, match='cannot lock'): lock(model, ['text-x'])


def gradients(model, encode):
    model = copy.deepcopy(model).train()
    still(model, every=True)
    torch.manual_seed(1)
    pixels = torch.randn(12, 3, 32, 32)
    loss = InfoNCE()(encode(model, TOKENS, pixels), TOKENS)
    loss.backward()
    return loss.detach(), {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize('size', [1, 5, 12])
def test_chunks_have_the_gradient_of_the_whole_batch(model, size):
    model.double()
    if hasattr(model.text, 'net') and hasattr(model.text.net, 'config'):  # dropout draws other numbers for other chunks
        for m in model.modules():
            if isinstance(m, nn.Dropout): m.p = 0.
    def double(f): return lambda m, t, p: f(m, t, p.double())
    loss, want = gradients(model, double(lambda m, t, p: m(t, p)))
    got_loss, got = gradients(model, double(lambda m, t, p: embed_in_chunks(m, t, p, size)))
    assert torch.allclose(loss, got_loss, atol=1e-10) and want.keys() == got.keys()
    for k in want: assert torch.allclose(want[k], got[k], atol=1e-10), k


def test_recomputed_blocks_have_the_same_gradient(model):
    def within(m, t, p):
        with checkpointed(m): return m(t, p)
    torch.manual_seed(2)
    for m in model.modules():
        if isinstance(m, nn.Dropout): m.p = 0.
    loss, want = gradients(model, lambda m, t, p: m(t, p))
    got_loss, got = gradients(model, within)
    assert torch.allclose(loss, got_loss, atol=1e-6) and all(torch.allclose(want[k], got[k], atol=1e-5) for k in want)


def test_chunks_refuse_batch_statistics():
    with pytest.raises(ValueError, match='batch norm in train mode'):
        embed_in_chunks(small().train(), TOKENS, torch.zeros(12, 3, 32, 32), 4)


@pytest.mark.parametrize('name, towers', [('small', ['text']), ('public', ['text']), ('clip', ['text', 'image'])])
def test_adapters_begin_as_nothing_and_are_merged(name, towers):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    keys, pixels = list(model.state_dict()), torch.randn(3, 3, 32, 32)
    tokens = TP(['a red circle', 'a blue square', 'red'])
    with torch.no_grad(): before = model(tokens, pixels)
    add_lora(model, rank=2, towers=towers)
    with torch.no_grad():
        for a, b in zip(before, model(tokens, pixels), strict=True): assert torch.allclose(a, b, atol=1e-6)
        for k, p in model.named_parameters():
            if 'lora_B' in k: p.normal_(std=0.1)
        for side in towers:
            assert {
                k for k, p in getattr(model, side).named_parameters() if p.requires_grad and 'lora_' not in k
            } == set()
        adapted = model.eval()(tokens, pixels)
        merge_lora(model)
        for a, b in zip(adapted, model(tokens, pixels), strict=True): assert torch.allclose(a, b, atol=1e-5)
    assert sorted(model.state_dict()) == sorted(keys) and (adapted.text - before.text).abs().max() > 1e-3


def test_wise_ft_lies_between():
    a, b = small().state_dict(), small().state_dict()
    half = interpolate(a, b, 0.5)
    for k in a:
        # two that nearly cancel leave the rounding of both
        if a[k].is_floating_point(): assert torch.allclose(half[k], (a[k] + b[k]) / 2, atol=1e-6)
    for k, v in interpolate(a, b, 0).items(): assert v.equal(a[k])
    model = small()
    table = trade_off(model, a, b, {'norm': lambda m: m.text_proj.weight.norm().item()}, (0, 1))
    assert table == {
        'alpha': [0, 1],
        'norm': [a['text_proj.weight'].norm().item(), b['text_proj.weight'].norm().item()],
    }
    with pytest.raises(ValueError, match='different models'): interpolate(a, public().state_dict(), 0.5)


def test_zero_shot_accuracy_by_prompts():
    class Told(nn.Module):
        "Embeddings that say which class: texts by their last word, pictures by their first value"
        logit_scale = torch.zeros(())
        text_pipeline, vision_pipeline = TP, staticmethod(lambda x: torch.stack(x).float()[:, :1, 0, 0])
        def encode_text(self, tokens): return nn.functional.one_hot((tokens.ids == circle).any(1).long(), 2).float()
        def encode_image(self, x): return nn.functional.one_hot(x[:, 0].long(), 2).float()
    circle = int(TP(['circle']).ids[0, 1])
    pictures = [torch.full((3, 2, 2), i % 2, dtype=torch.uint8) for i in range(10)]
    check = ZeroShot(pictures, [i % 2 for i in range(9)] + [0], ['square', 'circle'], ('a {}',), batch_size=4)
    assert check(Told()) == pytest.approx(0.9) and check.figures(Told())['accuracy@5'] == 1
