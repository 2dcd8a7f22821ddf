"""Files of weights from elsewhere: the right ones are taken and named, wrong ones refused in a sentence, whatever
loads them."""
import argparse
import functools
import io
import json
import warnings

import numpy as np
import open_clip
import pytest
import timm
import torch
import torchvision
from open_clip import factory
from torch import nn

from mmembed.core.torchscript import quietly
from mmembed.models.dual import DualEncoder
from mmembed.models.transformers import transformers_towers
from mmembed.models.open_clip import open_clip_towers
from mmembed.models.bert import bert
from mmembed.models.towers import image_tower, timm_tower
from mmembed.text.pipeline import TextPipeline
from mmembed.train.checkpoint import load_checkpoint
from mmembed.vision.pipeline import VisionPipeline

from tests.models.test_open_clip import TEXT, VISION


SMALL = dict(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT | dict(vocab_size=200))
NET = 'shufflenet_v2_x0_5'


@pytest.fixture(autouse=True)
def small(monkeypatch): monkeypatch.setattr(factory, '_MODEL_CONFIGS', factory._MODEL_CONFIGS | {'small': SMALL})


@functools.cache
def words(): return TextPipeline.learn(['a photo of a cat', 'two dogs'] * 9, vocab_size=150, max_length=20)


def clip_weights(): return open_clip.create_model('small', force_custom_text=True).state_dict()


def torchvision_weights(): return torchvision.models.get_model(NET, num_classes=10).state_dict()


def timm_weights(): return timm.create_model('test_resnet', num_classes=10).state_dict()


LOADERS = {
    'open_clip': (
        clip_weights,
        lambda path, **more: open_clip_towers('small', path, words(), **more).image.net,
        'visual.',
    ),
    'torchvision': (torchvision_weights, lambda path, **more: image_tower(NET, path, **more).net, ''),
    'timm': (timm_weights, lambda path, **more: timm_tower('test_resnet', path, **more).net, ''),
}
each_loader = pytest.mark.parametrize('make, load, begin', LOADERS.values(), ids=LOADERS)


def zeros(state): return {k: torch.zeros_like(v) for k, v in state.items()}


def holds(net, state, begin):
    "Whether all weights of `net` are those of `state`, below `begin`."
    return all(v.equal(state[begin + k].to(v.dtype)) for k, v in net.state_dict().items())


@each_loader
def test_an_average_is_taken_and_named(make, load, begin, tmp_path):
    "Zeros called state_dict beside the weights called state_dict_ema, and the other way round."
    good, path = make(), str(tmp_path/'run.pth')
    torch.save(
        {
            'epoch': 3,
            'state_dict': zeros(good),
            'state_dict_ema': good,
            'optimizer': {'state': {0: {'exp_avg': torch.zeros(2)}}},
        },
        path,
    )
    with pytest.warns(
        UserWarning, match=r'holds several states \(state_dict, state_dict_ema\): state_dict_ema was taken'
    ):
        net = load(path)
    assert holds(net, good, begin)
    assert holds(load(path, state='state_dict'), zeros(good), begin)
    with pytest.raises(ValueError, match="holds no state 'teacher'; it holds 'state_dict', 'state_dict_ema'"):
        load(path, state='teacher')


@each_loader
@pytest.mark.parametrize('key', [None, 'state_dict', 'model'])
def test_wrappers_in_any_nesting(make, load, begin, key, tmp_path):
    """Names as torch.compile, DataParallel and Lightning leave them, outside and inside of one another, beside
    things that are no weights."""
    good, path = make(), str(tmp_path/'run.pth')
    # a module that was compiled for itself
    first = next(k for k in good if k.startswith(begin)).removeprefix(begin).partition('.')[0]
    inside = {k.replace(f'{begin}{first}.', f'{begin}{first}._orig_mod.module.', 1): v for k, v in good.items()}
    for wrapper in (
        'module.', '_orig_mod.', 'model.', 'module._orig_mod.', '_orig_mod.module.',
        'model.module._orig_mod.model.',
    ):
        for state in (good, inside):
            wrapped = {wrapper + k: v for k, v in state.items()} | (
                {'loss.scale': torch.ones(1)} if wrapper == 'model.' else {}
            )
            torch.save(
                wrapped if key is None else {key: wrapped, 'args': argparse.Namespace(lr=0.1), 'best': np.float64(0.5)},
                path,
            )
            with warnings.catch_warnings():
                warnings.simplefilter('error')
                assert holds(load(path), good, begin), (wrapper, state is inside)


def test_torch_writes_such_names():
    "The names above are those that torch gives."
    net = nn.Sequential(nn.Linear(2, 2))
    assert (
        list(nn.DataParallel(torch.compile(nn.DataParallel(net))).state_dict())[0] == 'module._orig_mod.module.0.weight'
    )


@each_loader
def test_numbers_that_are_none_are_refused_by_name(make, load, begin, tmp_path):
    good = make()
    name = [k for k, v in good.items() if k.startswith(begin) and v.dim() > 1][2]
    for value in (torch.nan, torch.inf):
        bad = {k: v.clone() for k, v in good.items()}
        bad[name].view(-1)[1] = value
        torch.save({'state_dict': bad}, tmp_path/'bad.pth')
        with pytest.raises(
            ValueError, match=rf'bad.pth: {name} holds NaN or infinity \(1 of {good[name].numel():,} numbers\)'
        ):
            load(str(tmp_path / 'bad.pth'))


def test_numbers_that_are_none_in_folders_and_checkpoints(tmp_path):
    from safetensors.torch import load_file, save_file
    from tests.models.test_transformers import bert as saved_dual, sentences
    from tests.exporters import tiny
    saved_dual(tmp_path), (tmp_path/'text').mkdir(), sentences(tmp_path/'text')
    for folder, name, load in ((tmp_path, 'text_model.encoder.layer.0.output.dense.weight', transformers_towers),
                               (tmp_path/'text', 'encoder.layer.0.output.dense.weight', lambda f: bert(str(f)))):
        load(folder)
        weights = load_file(folder/'model.safetensors')
        weights[name][0, 0] = torch.nan
        save_file(weights, folder/'model.safetensors', {'format': 'pt'})
        with pytest.raises(ValueError, match=f'{name} holds NaN or infinity'): load(folder)
    model = tiny.model()
    with torch.no_grad(): model.image_proj.weight[0, 0] = torch.nan
    save_file(model.state_dict(), tmp_path/'run.safetensors', {'mmembed': json.dumps({'model': model.spec()})})
    with pytest.raises(
        ValueError, match=r'run.safetensors: image_proj.weight holds NaN or infinity \(1 of 768 numbers\)'
    ):
        load_checkpoint(tmp_path / 'run.safetensors')


def broken():
    "name: content, what is said of it"
    whole, cut = io.BytesIO(), io.BytesIO()
    torch.save(nn.Linear(2, 2), whole)
    torch.save({'weight': torch.zeros(1000)}, cut)
    return {
        'module.pt': (whole.getvalue(), r'holds Python objects \(torch.nn.modules.linear.Linear\) that would run code'),
        'page.pt': (b'\n<!DOCTYPE html>\n<html><title>Sign in</title></html>', 'is a web page, not weights'),
        'page.safetensors': (b'<html><title>Sign in</title></html>', 'is a web page, not weights'),
        'pointer.pt': (
            b'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 605157884\n',
            'is a pointer of Git LFS',
        ),
        'empty.pt': (b'', 'is empty'),
        'cut.pt': (cut.getvalue()[:-700], 'is not a readable checkpoint'),
        'cut.safetensors': (b'\x40\0\0\0\0\0\0\0{"weight"', 'is not a readable checkpoint'),
        'words.pt': (b'these are no weights', 'is not a readable checkpoint'),
    }


@pytest.mark.parametrize('name', broken())
def test_what_is_no_file_of_weights_is_told_in_a_sentence(name, tmp_path):
    content, said = broken()[name]
    (tmp_path/name).write_bytes(content)
    for load in (*(load for _, load, _ in LOADERS.values()), load_checkpoint):
        with pytest.raises(ValueError, match=f'{name} {said}') as e: load(str(tmp_path/name))
        assert '\n' not in str(e.value) and len(str(e.value)) < 300 + len(str(tmp_path))


def test_a_torchscript_archive_is_read_for_its_weights(tmp_path):
    "OpenAI's files of CLIP are such archives."
    class Clip(nn.Module):
        def __init__(self):
            super().__init__()
            self.visual, self.logit_scale = nn.Linear(3, 4), nn.Parameter(torch.ones(()))
            for k in ('input_resolution', 'context_length', 'vocab_size'): self.register_buffer(k, torch.tensor(32))
        def forward(self, x): return self.visual(x) * self.logit_scale

    from mmembed.models.base import read_weights
    net = Clip()
    quietly(torch.jit.trace, net, torch.zeros(1, 3)).save(tmp_path/'clip.pt')
    found = read_weights(tmp_path/'clip.pt', ['visual.weight', 'visual.bias'])
    assert found.keys() == {'visual.weight', 'visual.bias', 'logit_scale'} and all(
        net.state_dict()[k].equal(v) for k, v in found.items()
    )


def test_what_lies_beside_the_weights_wanted(tmp_path):
    "Flat names of a teacher and a student: refused with both names, and chosen by one."
    good, path = torchvision_weights(), str(tmp_path/'dino.pth')
    torch.save(
        {f'{who}.backbone.{k}': v for who, s in (('student', zeros(good)), ('teacher', good)) for k, v in s.items()},
        path,
    )
    with pytest.raises(ValueError, match='say which with state=, one of student.backbone, teacher.backbone'):
        image_tower(NET, path)
    assert holds(image_tower(NET, path, state='teacher').net, good, '')
    torch.save({'epoch': 3, 'lr': .1}, path)
    with pytest.raises(ValueError, match='dino.pth holds no weights'): image_tower(NET, path)


@pytest.mark.parametrize(
    'make, name, near',
    [
        (DualEncoder.from_open_clip, 'vit-b-32', 'ViT-B-32'),
        (DualEncoder.from_open_clip, 'ViT_L_14', 'ViT-L-14'),
        (DualEncoder.from_open_clip, 'rn50', 'RN50'),
        (VisionPipeline.from_open_clip, 'vit-b-32', 'ViT-B-32'),
        (TextPipeline.from_open_clip, 'vit_b/32', 'ViT-B-32'),
        (timm_tower, 'resnet-50', 'resnet50'),
        (timm_tower, 'ViT_Small_Patch16_224', 'vit_small_patch16_224'),
        (image_tower, 'ResNet-18', 'resnet18'),
    ],
)
def test_names_as_people_write_them(make, name, near):
    with pytest.raises(ValueError, match=f"{name!r}.*is '{near}' meant"): make(name)


def test_names_of_other_places():
    with pytest.raises(
        ValueError,
        match=r"knows no model 'openai/clip-vit-base-patch32'.*; a model of the Hugging Face hub is "
              r"from_transformers\(",
    ):
        DualEncoder.from_open_clip('openai/clip-vit-base-patch32')
    with pytest.raises(ValueError, match="knows no such weights of ViT-B-32.*is 'laion2b_s34b_b79k' meant"):
        DualEncoder.from_open_clip('ViT-B/32', 'laion2b-s34b-b79k')
    with pytest.raises(OSError, match="is DualEncoder.from_open_clip\\('ViT-B-32'\\) meant"):
        DualEncoder.from_transformers('ViT-B-32')
    assert VisionPipeline.from_open_clip('ViT-B/32').spec() == VisionPipeline.from_open_clip('ViT-B-32').spec()
