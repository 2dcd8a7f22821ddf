"""Training crops: distributed as torchvision's, and reproducible."""
import json

import numpy as np
import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser
from torchvision.transforms import ColorJitter, RandomResizedCrop, v2

from mmembed.core.torchscript import quietly
from mmembed.vision.augment import (
    Augmentation, color_jitter, random_crop, random_erasing, random_flip, random_gray, random_resized_crop,
)
from mmembed.vision.pipeline import VisionPipeline

from tests.vision.conftest import FILES, picture


@pytest.mark.parametrize(
    'scale, ratio', [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.9, 1.0), (3 / 4, 4 / 3)), ((0.2, 0.4), (1.0, 2.0))]
)
@pytest.mark.parametrize('height, width', [(480, 640), (97, 31), (10, 400)])
def test_crops_are_distributed_as_torchvisions(scale, ratio, height, width):
    g = torch.Generator().manual_seed(0)
    n = 4000
    ours = np.array([random_crop(height, width, scale, ratio, g) for _ in range(n)], float)
    torch.manual_seed(1)
    x = torch.zeros(1, height, width)
    theirs = np.array([RandomResizedCrop.get_params(x, scale, ratio) for _ in range(n)], float)
    assert (
        (ours[:, :2] >= 0).all()
        and (ours[:, 0] + ours[:, 2] <= height).all()
        and (ours[:, 1] + ours[:, 3] <= width).all()
    )
    for k in range(4):
        for q in (0.1, 0.5, 0.9):
            a, b = np.quantile(ours[:, k], q), np.quantile(theirs[:, k], q)
            assert abs(a - b) <= 0.04 * (height if k % 2 == 0 else width) + 1, (k, q, a, b)


def test_scripted_draws_the_same():
    x = torch.randint(0, 256, (3, 70, 90), dtype=torch.uint8)
    f = quietly(torch.jit.script, random_resized_crop)
    for seed in range(5):
        args = x, (32, 40), (0.3, 1.0), (3/4, 4/3), 'bicubic', True, 'torch'
        a, b = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
        assert torch.equal(f(*args, a), random_resized_crop(*args, b))
        assert torch.equal(a.get_state(), b.get_state())


def test_flip_is_as_often_as_asked():
    g = torch.Generator().manual_seed(0)
    x = torch.arange(2).reshape(1, 1, 2)
    assert 0.27 < np.mean([int(random_flip(x, 0.3, g)[0, 0, 0]) for _ in range(4000)]) < 0.33


def test_augment_is_reproducible_and_independent_of_the_global_state(file):
    vp = VisionPipeline(size=(24, 32), augmentation=Augmentation(scale=(0.3, 1.0)))
    def draw(seed): return vp.augment(file, torch.Generator().manual_seed(seed))
    a = draw(3)
    torch.rand(100)
    assert a.shape == (3, 24, 32) and a.dtype == torch.uint8
    assert torch.equal(a, draw(3))
    if len(file) > 2000: assert not torch.equal(a, draw(4))


def test_the_generator_moves_on_by_the_same_amount_for_every_picture():
    vp = VisionPipeline(size=16, augmentation=Augmentation(scale=(0.3, 1.0)))
    states = set()
    for data in FILES.values():
        g = torch.Generator().manual_seed(0)
        vp.augment(data, g)
        states.add(g.get_state().numpy().tobytes())
    assert len(states) == 1


# torchvision's own transforms, made to take the numbers that ours draw from the same seed

def drawn(transform, params, x):
    transform.make_params = lambda flat_inputs: params
    return transform(x)


PICTURES = [torch.from_numpy(np.array(picture(w, h, w))).permute(2, 0, 1) for w, h in [(97, 64), (40, 200), (333, 500)]]


@pytest.mark.parametrize('interpolation', ['bicubic', 'bilinear'])
@pytest.mark.parametrize('x', PICTURES, ids=lambda x: 'x'.join(map(str, x.shape[1:])))
def test_crop_is_torchvisions(x, interpolation):
    mode = v2.InterpolationMode(interpolation)
    for seed in range(10):
        args, ratio = (x.shape[1], x.shape[2], (0.08, 1.0)), (3/4, 4/3)
        top, left, height, width = random_crop(*args, ratio, torch.Generator().manual_seed(seed))
        theirs = drawn(v2.RandomResizedCrop((48, 64), (0.08, 1.0), ratio, mode, antialias=True),
                       dict(top=top, left=left, height=height, width=width), x)
        ours = random_resized_crop(
            x, (48, 64), (0.08, 1.0), ratio, interpolation, True, 'torch', torch.Generator().manual_seed(seed)
        )
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize('x', PICTURES, ids=lambda x: 'x'.join(map(str, x.shape[1:])))
def test_colours_are_torchvisions(x, monkeypatch):
    amount = (0.4, 0.4, 0.4, 0.1)
    for seed in range(12):
        g = torch.Generator().manual_seed(seed)
        u, order = torch.rand(5, generator=g).tolist(), torch.randperm(4, generator=g)
        factors = [(-a if k == 3 else 1 - a) + v * 2 * a for k, (a, v) in enumerate(zip(amount, u))]
        monkeypatch.setattr(ColorJitter, 'get_params', lambda *a: (order, *factors))
        assert torch.equal(color_jitter(x, amount, 1.0, torch.Generator().manual_seed(seed)), ColorJitter(*amount)(x))
    assert torch.equal(random_gray(x, 1.0), v2.RandomGrayscale(1.0)(x))
    assert torch.equal(random_flip(x, 1.0, None), v2.RandomHorizontalFlip(1.0)(x))


@pytest.mark.parametrize('x', PICTURES, ids=lambda x: 'x'.join(map(str, x.shape[1:])))
def test_erasing_is_torchvisions(x):
    erased = 0
    for seed in range(20):
        ours = random_erasing(x, 1.0, [7, 8, 9], torch.Generator().manual_seed(seed))
        where = (ours != x).any(0).nonzero()
        if not len(where): continue
        (i, j), (bottom, right) = where.amin(0).tolist(), where.amax(0).tolist()
        v = torch.tensor([7, 8, 9], dtype=torch.uint8)[:, None, None]
        theirs = drawn(v2.RandomErasing(1.0), dict(i=i, j=j, h=bottom - i + 1, w=right - j + 1, v=v), x)
        assert torch.equal(ours, theirs)
        erased += 1
        share = (bottom - i + 1) * (right - j + 1) / x[0].numel()
        assert 0.015 < share < 0.36  # torchvision's 0.02 to 0.33, rounded to pixels
    assert erased > 15


def test_options_are_named_as_open_clips():
    from dataclasses import fields
    from open_clip.transform import AugmentationCfg
    theirs = {f.name for f in fields(AugmentationCfg)} - {'use_timm', 're_count'}
    assert theirs <= {f.name for f in fields(Augmentation)}


OLD = [dict(scale=(0.3, 1.0)), dict(flip=0.5, ratio=(0.5, 2.0)),
       dict(color_jitter=(.4, .4, .4, .1), color_jitter_prob=.8, gray_scale_prob=.2, re_prob=.5)]


@pytest.mark.parametrize('options', OLD)
def test_options_of_earlier_versions_work_and_warn_with_the_new_spelling(options):
    with pytest.warns(FutureWarning, match=r'VisionPipeline\(augmentation=Augmentation\(') as caught:
        old = VisionPipeline(size=24, **options)
    assert caught[0].filename == __file__ and all(f'{k}=' in str(caught[0].message) for k in options)
    new = VisionPipeline(size=24, augmentation=Augmentation(**options))
    assert old.spec() == new.spec() and old.augmentation == new.augmentation
    for seed in range(10):
        a, b = (vp.augment(FILES['jpeg'], torch.Generator().manual_seed(seed), 0.5) for vp in (old, new))
        assert torch.equal(a, b)


@pytest.mark.parametrize('options', OLD)
def test_specs_of_earlier_versions_load_without_a_warning(options, recwarn):
    new = VisionPipeline(size=24, resize='pillow', augmentation=Augmentation(**options))
    flat = new.spec() | new.spec()['augmentation']  # as commit 04f7bea wrote it
    del flat['augmentation']
    again = VisionPipeline.from_spec(json.loads(json.dumps(flat)))
    assert again.spec() == new.spec() and again.augmentation == new.augmentation
    assert VisionPipeline.from_spec(json.loads(json.dumps(new.spec()))).augmentation == new.augmentation
    assert VisionPipeline.from_spec(new.spec() | {'flip': 1.}).augmentation.flip == 1
    assert not [w for w in recwarn if w.category is FutureWarning]


def test_augmentation_reads_like_a_sentence():
    assert repr(Augmentation()) == ('Augmentation(crop 90 % to 100 % of the area, 0.75 to 1.33 times as wide as high; '
                                    'mirror images of classes half of the time, images with captions never)')
    said = repr(Augmentation((1, 1), flip=0, color_jitter=(.4, 0, 0, .1), color_jitter_prob=.8, gray_scale_prob=.2))
    assert 'crop 100 % of the area' in said and 'never mirror' in said
    assert 'change brightness by up to 0.4, hue by up to 0.1 80 % of the time' in said
    assert 'take out the colour 20 % of the time' in said and 'erase' not in said
    assert VisionPipeline().augmentation.describe() in VisionPipeline()._repr_html_()


@pytest.mark.parametrize('wrong, message', [
    (dict(flip=50), 'flip is a probability, 0 to 1, got 50'), (dict(re_prob=-1), 're_prob is a probability'),
    (dict(scale=(0.5,)), 'scale wants 2 numbers'), (dict(ratio=(2, 1)), 'ratio must be two rising numbers above 0'),
    (dict(color_jitter=(1, 1)), 'color_jitter wants 4 numbers'),
])
def test_a_wrong_option_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message): Augmentation(**wrong)
    with pytest.raises(ValueError, match=message): VisionPipeline(augmentation=wrong)
    with pytest.raises(ValueError, match="augmentation has no option 'mirror'"):
        VisionPipeline(augmentation={'mirror': 1})


@pytest.mark.parametrize(
    'given, warns',
    [
        (['--image.pipeline', '{size: 32, augmentation: {scale: [0.5, 1.0], flip: 0}}'], 0),
        (['--image.pipeline', '{size: 32, scale: [0.5, 1.0], flip: 0}'], 1),
        (
            [
                '--image.pipeline',
                '{size: 32, augmentation: {scale: [0.5, 1.0]}}',
                '--image.pipeline.augmentation.flip',
                '0',
            ],
            0,
        ),
        (['--image.pipeline', '{size: 32, scale: [0.5, 1.0]}', '--image.pipeline.init_args.flip', '0'], 1),
    ],
)
def test_configs_of_either_spelling(given, warns, recwarn):
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_argument('--image', type=torch.nn.Module)
    path = 'mmembed.vision.pipeline.VisionPipeline'
    if given[1].startswith('{'): given[1] = f'{{class_path: {path}, init_args: {given[1]}}}'
    config = parser.parse_args(['--image', 'mmembed.models.towers.ConvNet', *given])
    tower = parser.instantiate_classes(config).image
    assert tower.pipeline.augmentation == Augmentation((0.5, 1.0), flip=0)
    assert len([w for w in recwarn if 'VisionPipeline(' in str(w.message)]) == warns
