"""Training crops: distributed as torchvision's, and reproducible."""
import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from mmembed.core import quietly
from mmembed.vision.augment import random_crop, random_flip, random_resized_crop
from mmembed.vision.pipeline import VisionPipeline

from .conftest import FILES


@pytest.mark.parametrize('scale, ratio', [((0.08, 1.0), (3/4, 4/3)), ((0.9, 1.0), (3/4, 4/3)), ((0.2, 0.4), (1.0, 2.0))])
@pytest.mark.parametrize('height, width', [(480, 640), (97, 31), (10, 400)])
def test_crops_are_distributed_as_torchvisions(scale, ratio, height, width):
    g = torch.Generator().manual_seed(0)
    n = 4000
    ours = np.array([random_crop(height, width, scale, ratio, g) for _ in range(n)], float)
    torch.manual_seed(1)
    x = torch.zeros(1, height, width)
    theirs = np.array([RandomResizedCrop.get_params(x, scale, ratio) for _ in range(n)], float)
    assert (ours[:, :2] >= 0).all() and (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()
    for k in range(4):
        for q in (0.1, 0.5, 0.9):
            a, b = np.quantile(ours[:, k], q), np.quantile(theirs[:, k], q)
            assert abs(a - b) <= 0.04 * (height if k % 2 == 0 else width) + 1, (k, q, a, b)


def test_scripted_draws_the_same():
    x = torch.randint(0, 256, (3, 70, 90), dtype=torch.uint8)
    f = quietly(torch.jit.script, random_resized_crop)
    for seed in range(5):
        args = x, (32, 40), (0.3, 1.0), (3/4, 4/3), 'bicubic', True, False
        a, b = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
        assert torch.equal(f(*args, a), random_resized_crop(*args, b))
        assert torch.equal(a.get_state(), b.get_state())


def test_flip_is_as_often_as_asked():
    g = torch.Generator().manual_seed(0)
    x = torch.arange(2).reshape(1, 1, 2)
    assert 0.27 < np.mean([int(random_flip(x, 0.3, g)[0, 0, 0]) for _ in range(4000)]) < 0.33


def test_augment_is_reproducible_and_independent_of_the_global_state(file):
    vp = VisionPipeline(size=(24, 32), scale=(0.3, 1.0))
    def draw(seed): return vp.augment(file, torch.Generator().manual_seed(seed))
    a = draw(3)
    torch.rand(100)
    assert a.shape == (3, 24, 32) and a.dtype == torch.uint8
    assert torch.equal(a, draw(3))
    if len(file) > 2000: assert not torch.equal(a, draw(4))


def test_the_generator_moves_on_by_the_same_amount_for_every_picture():
    vp = VisionPipeline(size=16, scale=(0.3, 1.0))
    states = set()
    for data in FILES.values():
        g = torch.Generator().manual_seed(0)
        vp.augment(data, g)
        states.add(g.get_state().numpy().tobytes())
    assert len(states) == 1
