"""The resize against Pillow: bit-equal where that is promised, within two levels where it is not."""
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from mmembed.core import quietly
from mmembed.vision.resize import crop_or_pad, fit, pillow_resize, resize, resized

from .conftest import picture

FILTERS = {'bicubic': Image.BICUBIC, 'bilinear': Image.BILINEAR, 'nearest': Image.NEAREST}


def chw(image): return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def sizes(n, seed, limit):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(1, limit, (4,), generator=g).tolist() for _ in range(n)]


@pytest.mark.parametrize('name', FILTERS)
def test_pillow_resize_from_every_small_size(name):
    for h in range(1, 33):
        for w in range(1, 33):
            image = picture(w, h, h * w)
            to = (h * 7 % 40 + 1, w * 11 % 40 + 1)
            ours = pillow_resize(chw(image), *to, [0, 0, *to], name)
            assert torch.equal(ours, chw(image.resize((to[1], to[0]), FILTERS[name]))), (h, w, to)


@pytest.mark.parametrize('name', FILTERS)
def test_pillow_resize_of_noise(name):
    g = torch.Generator().manual_seed(1)
    for h, w, height, width in sizes(60, 2, 400):
        x = torch.randint(0, 2, (3, h, w), dtype=torch.uint8, generator=g) * 255  # the hardest case for rounding and clipping
        theirs = chw(Image.fromarray(x.permute(1, 2, 0).numpy()).resize((width, height), FILTERS[name]))
        assert torch.equal(pillow_resize(x, height, width, [0, 0, height, width], name), theirs)
        top, left = height // 3, width // 4
        rows, columns = max(height // 2, 1), max(width // 2, 1)
        assert torch.equal(pillow_resize(x, height, width, [top, left, rows, columns], name),
                           theirs[:, top:top + rows, left:left + columns])


@pytest.mark.parametrize('shape', [(4000, 3000), (1, 5000), (5000, 1), (2999, 17)])
def test_pillow_resize_of_large_pictures(shape):
    image = picture(shape[1], shape[0], 5)
    for to in [(224, 299), (7, 1)]:
        assert torch.equal(pillow_resize(chw(image), *to, [0, 0, *to], 'bicubic'), chw(image.resize(to[::-1], Image.BICUBIC)))


@pytest.mark.parametrize('name, most', [('bicubic', 2), ('bilinear', 2), ('nearest', 0)])
def test_torch_resize_is_near_pillow(name, most):
    differ = total = 0
    for h, w, height, width in sizes(150, 3, 300):
        image = picture(w, h, h)
        ours = resize(chw(image), height, width, name, True).int()
        difference = (ours - chw(image.resize((width, height), FILTERS[name])).int()).abs()
        assert difference.max() <= most, (h, w, height, width)
        differ, total = differ + int((difference > 0).sum()), total + difference.numel()
    assert differ / total <= 0.005


def test_one_answer_for_threads_layouts_and_slices():
    before = torch.get_num_threads()
    for h, w, height, width in sizes(12, 4, 200):
        x = chw(picture(w, h, w))
        for f in [lambda x: resize(x, height, width, 'bicubic', True),
                  lambda x: pillow_resize(x, height, width, [0, 0, height, width], 'bicubic')]:
            y = f(x)
            wide = torch.zeros(3, h + 4, w + 6, dtype=torch.uint8)
            wide[:, 2:-2, 3:-3] = x
            for other in [x.contiguous(), x.clone(memory_format=torch.preserve_format), wide[:, 2:-2, 3:-3]]:
                assert torch.equal(f(other), y)
            try:
                torch.set_num_threads(1 if before > 1 else 2)
                assert torch.equal(f(x), y)
            finally: torch.set_num_threads(before)


def test_pillow_resize_does_not_depend_on_the_precision_of_products():
    x = chw(picture(90, 70))
    y = pillow_resize(x, 33, 44, [0, 0, 33, 44], 'bicubic')
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision('medium')
        assert torch.equal(pillow_resize(x, 33, 44, [0, 0, 33, 44], 'bicubic'), y)
    finally: torch.set_float32_matmul_precision(before)


def test_size_rule_is_torchvisions_and_open_clips():
    from open_clip.transform import ResizeKeepRatio
    from torchvision.transforms.functional import _compute_resized_output_size
    for h, w, a, b in sizes(2000, 5, 700):
        assert resized(h, w, (a, a), 'shortest') == list(_compute_resized_output_size((h, w), [a]))
        image = type('Image', (), {'size': (w, h)})
        for mode, longest in [('shortest', 0.), ('longest', 1.)]:
            if mode == 'shortest' and a == b: continue
            theirs = ResizeKeepRatio.get_params(image, (a, b), longest)
            assert resized(h, w, (a, b), mode) == [max(t, 1) for t in theirs]
    scripted = quietly(torch.jit.script, resized)
    for h, w, a, b in sizes(500, 6, 700):
        for mode in ['shortest', 'longest', 'squash']: assert scripted(h, w, (a, b), mode) == resized(h, w, (a, b), mode)


def test_crop_is_torchvisions_and_open_clips():
    from open_clip.transform import center_crop_or_pad
    scripted = quietly(torch.jit.script, crop_or_pad)
    for h, w, a, b in sizes(300, 7, 40):
        x = torch.randint(0, 256, (3, h, w), dtype=torch.uint8)
        assert torch.equal(crop_or_pad(x, (a, b), [0, 0, 0]), TF.center_crop(x, [a, b]))
        assert torch.equal(crop_or_pad(x, (a, b), [7, 7, 7]), center_crop_or_pad(x, [a, b], fill=7))
        assert torch.equal(scripted(x, (a, b), [1, 2, 3]), crop_or_pad(x, (a, b), [1, 2, 3]))


@pytest.mark.parametrize('exact', [False, True])
@pytest.mark.parametrize('interpolation', FILTERS)
@pytest.mark.parametrize('mode', ['shortest', 'longest', 'squash'])
def test_fit_answers_every_shape(mode, interpolation, exact):
    scripted = quietly(torch.jit.script, fit)
    shapes = [(h, w) for h in (1, 2, 3, 31, 32, 33, 200) for w in (1, 2, 3, 31, 32, 33, 200)] + [(1, 4000), (4000, 1)]
    for h, w in shapes:
        args = torch.randint(0, 256, (3, h, w), dtype=torch.uint8), (32, 40), mode, interpolation, True, [1, 2, 3], exact
        assert fit(*args).shape == (3, 32, 40)
        assert torch.equal(scripted(*args), fit(*args))


def test_a_strip_takes_little_memory():
    import resource
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    strip = torch.zeros(3, 1, 20_000_000, dtype=torch.uint8)
    for exact in [False, True]: fit(strip, (224, 224), 'shortest', 'bicubic', True, [0, 0, 0], exact)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # kilobytes
