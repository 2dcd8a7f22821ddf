"""The resize against Pillow: bit-equal where that is promised, within two levels where it is not."""
import hashlib
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import functional as TF

from mmembed.core.torchscript import quietly
from mmembed.vision.pipeline import VisionPipeline
from mmembed.vision.resize import crop_or_pad, fit, pillow_resize, resize, resized, trimmed

from tests.helpers import data_path
from tests.vision.conftest import picture

ROOT = Path(__file__).resolve().parents[2]
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
            ours = resize(chw(image), *to, [0, 0, *to], name, True, 'pillow')
            assert torch.equal(ours, chw(image.resize((to[1], to[0]), FILTERS[name]))), (h, w, to)


@pytest.mark.parametrize('name', FILTERS)
def test_pillow_resize_of_noise(name):
    g = torch.Generator().manual_seed(1)
    for h, w, height, width in sizes(60, 2, 400):
        # the hardest case for rounding and clipping
        x = torch.randint(0, 2, (3, h, w), dtype=torch.uint8, generator=g) * 255
        theirs = chw(Image.fromarray(x.permute(1, 2, 0).numpy()).resize((width, height), FILTERS[name]))
        assert torch.equal(resize(x, height, width, [0, 0, height, width], name, True, 'pillow'), theirs)
        top, left = height // 3, width // 4
        rows, columns = max(height // 2, 1), max(width // 2, 1)
        for how in ['torch', 'float', 'pillow']:
            whole = resize(x, height, width, [0, 0, height, width], name, True, how)
            assert torch.equal(resize(x, height, width, [top, left, rows, columns], name, True, how),
                               whole[:, top:top + rows, left:left + columns])


@pytest.mark.parametrize('shape', [(4000, 3000), (1, 5000), (5000, 1), (2999, 17)])
def test_pillow_resize_of_large_pictures(shape):
    image = picture(shape[1], shape[0], 5)
    for to in [(224, 299), (7, 1)]:
        assert torch.equal(
            pillow_resize(chw(image), *to, [0, 0, *to], 'bicubic'), chw(image.resize(to[::-1], Image.BICUBIC))
        )


@pytest.mark.parametrize('how', ['torch', 'float'])
@pytest.mark.parametrize('name, most', [('bicubic', 2), ('bilinear', 2), ('nearest', 0)])
def test_other_resizes_are_near_pillow(name, most, how):
    differ = total = 0
    tiny = list(itertools.product((1, 2, 3, 7), repeat=4))  # torch's own kernels fail on some sides of 1
    for h, w, height, width in sizes(150, 3, 300) + tiny:
        image = picture(w, h, h)
        ours = resize(chw(image), height, width, [0, 0, height, width], name, True, how).int()
        difference = (ours - chw(image.resize((width, height), FILTERS[name])).int()).abs()
        assert difference.max() <= most, (h, w, height, width)
        differ, total = differ + int((difference > 0).sum()), total + difference.numel()
    assert differ / total <= (0.015 if how == 'float' and name == 'bilinear' else 0.005)  # ties are frequent there


@pytest.mark.parametrize('name', ['bicubic', 'bilinear'])
def test_two_passes_and_a_window_are_one_interpolate(name):
    for h, w, height, width in sizes(120, 8, 300):
        hwc = torch.from_numpy(np.array(picture(w, h, w)))
        for antialias in [True, False]:
            whole = F.interpolate(
                hwc.permute(2, 0, 1).contiguous()[None],
                size=[height, width],
                mode=name,
                align_corners=False,
                antialias=antialias,
            )[0]
            top, left, rows, columns = height // 3, width // 4, max(height // 2, 1), max(width // 2, 1)
            for x in [hwc.permute(2, 0, 1), hwc.permute(2, 0, 1).contiguous()]:
                ours = resize(x, height, width, [top, left, rows, columns], name, antialias, 'torch')
                assert torch.equal(ours, whole[:, top:top + rows, left:left + columns]), (h, w, height, width)


def resized_bits():
    seen = hashlib.sha256()
    for h, w, height, width in sizes(25, 9, 300):
        x, window = chw(picture(w, h, w)), [0, width // 5, height, max(width // 2, 1)]
        for laid in [x, x.permute(1, 2, 0).contiguous().permute(2, 0, 1)]:
            seen.update(resize(laid, height, width, window, 'bicubic', True, 'torch').contiguous().numpy().tobytes())
    return seen.hexdigest()


def test_another_cpu_capability_gives_the_same_bits():
    code = (
        'import torch; from tests.vision.test_resize import resized_bits; '
        'print(torch.backends.cpu.get_cpu_capability(), resized_bits())'
    )
    run = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=ROOT,
                         env=os.environ | {'ATEN_CPU_CAPABILITY': 'default'})
    assert run.stdout.split() == ['DEFAULT', resized_bits()], run.stderr[-2000:]


def test_a_gpu_wants_its_own_resize():
    x = torch.zeros(3, 9, 9, dtype=torch.uint8, device='meta')
    for how in ['torch', 'pillow']:
        with pytest.raises(ValueError, match="resize='float'"): resize(x, 5, 5, [0, 0, 5, 5], 'bicubic', True, how)
    assert resize(x, 5, 5, [0, 0, 5, 5], 'bicubic', True, 'float').shape == (3, 5, 5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_a_gpu_is_near_the_cpu():
    for h, w, height, width in sizes(40, 10, 400):
        x, window = chw(picture(w, h, w)), [0, 0, height, width]
        a = resize(x, height, width, window, 'bicubic', True, 'float')
        b = resize(x.cuda(), height, width, window, 'bicubic', True, 'float').cpu()
        assert (a.int() - b.int()).abs().max() <= 2 and (a != b).float().mean() < 0.001


def test_one_answer_for_threads_layouts_and_slices():
    before = torch.get_num_threads()
    for h, w, height, width in sizes(12, 4, 200):
        x = chw(picture(w, h, w))
        for f in [lambda x: resize(x, height, width, [0, 0, height, width], 'bicubic', True, 'torch'),
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
        for mode in ['shortest', 'longest', 'squash']:
            assert scripted(h, w, (a, b), mode) == resized(h, w, (a, b), mode)


def test_crop_is_torchvisions_and_open_clips():
    from open_clip.transform import center_crop_or_pad
    scripted = quietly(torch.jit.script, crop_or_pad)
    for h, w, a, b in sizes(300, 7, 40):
        x = torch.randint(0, 256, (3, h, w), dtype=torch.uint8)
        assert torch.equal(crop_or_pad(x, (a, b), [0, 0, 0]), TF.center_crop(x, [a, b]))
        assert torch.equal(crop_or_pad(x, (a, b), [7, 7, 7]), center_crop_or_pad(x, [a, b], fill=7))
        assert torch.equal(scripted(x, (a, b), [1, 2, 3]), crop_or_pad(x, (a, b), [1, 2, 3]))


@pytest.mark.parametrize('how', ['torch', 'pillow', 'float'])
@pytest.mark.parametrize('interpolation', FILTERS)
@pytest.mark.parametrize('mode', ['shortest', 'longest', 'squash'])
def test_fit_answers_every_shape(mode, interpolation, how):
    scripted = quietly(torch.jit.script, fit)
    shapes = [(h, w) for h in (1, 2, 3, 31, 32, 33, 200) for w in (1, 2, 3, 31, 32, 33, 200)] + [(1, 4000), (4000, 1)]
    for h, w in shapes:
        args = torch.randint(0, 256, (3, h, w), dtype=torch.uint8), (32, 40), mode, interpolation, True, [1, 2, 3], how
        assert fit(*args).shape == (3, 32, 40)
        assert torch.equal(scripted(*args), fit(*args))


def test_a_strip_takes_little_memory():
    "The peak while it is resized, in a process that may have had a higher one before."
    if not os.access('/proc/self/clear_refs', os.W_OK): pytest.skip('the system forgets no peak')
    def figures(): return dict(re.findall(r'(VmHWM|VmRSS):\s+(\d+)', Path('/proc/self/status').read_text()))
    strip = torch.zeros(3, 1, 20_000_000, dtype=torch.uint8)
    Path('/proc/self/clear_refs').write_text('5')  # the peak is what there is now
    before = int(figures()['VmRSS'])
    for how in ['torch', 'pillow']: fit(strip, (224, 224), 'shortest', 'bicubic', True, [0, 0, 0], how)
    assert int(figures()['VmHWM']) - before < 350_000  # kilobytes


def open_clips(x, size):
    image = TF.resize(Image.fromarray(x.permute(1, 2, 0).numpy()), size, interpolation=TF.InterpolationMode.BICUBIC)
    return chw(TF.center_crop(image, [size, size]))


STRIPS = [(n, m) for m in (1, 2, 3, 7) for n in (100 * m, 100 * m + 1, 201 * m, 400 * m + 3, 1001 * m)]


@pytest.mark.parametrize('size', [32, 64, 224])
@pytest.mark.parametrize('n, m', STRIPS)
def test_a_long_strip_is_open_clips(n, m, size):
    g = torch.Generator().manual_seed(n)
    for h, w in [(n, m), (m, n)]:
        x = torch.randint(0, 2, (3, h, w), dtype=torch.uint8, generator=g) * 255
        theirs = open_clips(x, size).int()
        for how, most in [('pillow', 0), ('torch', 2), ('float', 2)]:
            ours = fit(x, (size, size), 'shortest', 'bicubic', True, [0, 0, 0], how)
            assert (ours.int() - theirs).abs().max() <= most, (h, w, how)


def test_strips_of_the_cases():
    for name in ['1001x1', '2001x2', '500x3']:
        x = chw(Image.open(data_path('cases', f'size_{name}.png')).convert('RGB'))
        for how, most in [('pillow', 0), ('torch', 2), ('float', 2)]:
            ours = VisionPipeline(resize=how).transform(x)
            assert (ours.int() - open_clips(x, 224).int()).abs().max() <= most, (name, how)


def test_what_stays_of_a_strip_does_not_move():
    for side in (1, 3, 32, 224):
        for m in (1, 2, 7, 300):
            for n in [m, 150 * m + 1, *range(200 * m, 200 * m + 9), 89_478_485]:
                new, most = side * n // m, 200 * side
                kept, shorter = trimmed(n, new, most)
                assert (n - kept) % 2 == (new - shorter) % 4 == 0 and 0 < kept <= n and shorter < most + 4
                assert abs(kept * new - shorter * n) <= new  # the scale, to a pixel in all
                assert (kept, shorter) == (n, new) or new > most


def test_nearest_copies_every_pixel_of_a_strip():
    x = chw(picture(1501, 1, 3))
    theirs = TF.center_crop(
        Image.fromarray(x.permute(1, 2, 0).numpy()).resize((224 * 1501, 224), Image.NEAREST), [224, 224]
    )
    assert torch.equal(fit(x, (224, 224), 'shortest', 'nearest', True, [0, 0, 0], 'torch'), chw(theirs))
