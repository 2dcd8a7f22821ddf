"""Convolutions in int8: the sums are exact on every kind of processor, the networks answer as in float32, and what
does not gain stays as it is."""
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mmembed as mm
from mmembed.cli.export import calibration
from mmembed.exporters.assemble import assemble
from mmembed.exporters.convolutions import converted, int8_convolutions, traced
from mmembed.exporters.int8_conv import Int8Conv, Largest, Span, safe_step
from mmembed.exporters.variants import PRECISION_BOUNDS, SAME, Variant, prepared
from mmembed.exporters.export import export
from mmembed.core.torchscript import quietly
from mmembed.models.dual import DualEncoder
from mmembed.models.towers import TorchvisionTower
from mmembed.runtime.artifact import prepack
from mmembed.vision.pipeline import VisionPipeline

from tests.helpers import on_avx2
from tests.exporters import tiny

SHAPES = [
    (3, 32, 7, 2, 3, 1, 64),
    (3, 16, 3, 2, 1, 1, 33),
    (4, 16, 3, 1, 1, 1, 17),
    (6, 8, 3, 1, 0, 1, 15),
    (16, 32, 1, 1, 0, 1, 14),
    (17, 33, 3, 1, 1, 1, 14),
    (64, 64, 3, 1, 1, 1, 28),
    (96, 96, 7, 1, 3, 96, 14),
    (40, 40, 3, 2, 1, 40, 15),
    (5, 7, 5, 1, 2, 1, 9),
    (512, 64, 1, 1, 0, 1, 7),
    (100, 50, 3, 2, 1, 1, 13),
    (128, 256, 3, 1, 1, 1, 7),
]


def furthest_off():
    "The largest error of a sum, as a part of the largest sum, with inputs and weights at the ends of their ranges."
    torch.manual_seed(0)
    worst = 0.
    for i, o, k, s, p, g, side in SHAPES:
        for zero in 0, 100:
            layer = nn.Conv2d(i, o, k, s, p, groups=g).requires_grad_(False)
            if k == 3: layer.weight.fill_(.5)  # all of them large
            else: layer.weight.abs_()
            made = Int8Conv(layer, Span(.01, zero))
            x = torch.full((2, i, side, side), 255, dtype=torch.uint8)
            x[:, :, ::2] = 254
            weight = made.weight.double() * made.step.double()[:, None, None, None]
            want = F.conv2d((x.double() - zero) * .01, weight, layer.bias.double(), s, p, 1, g)
            for y in made(x), (made.pack(), made(x))[1]:
                worst = max(worst, float((y - want).abs().max() / want.abs().max()))
    return worst


def test_sums_are_exact_here(): assert furthest_off() < 1e-5


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp('int8')/'m.pt'
    return export(model(), path, quantize='int8', fresh=False, cpp=False), path


@pytest.fixture(scope='module')
def elsewhere(made):
    "What a smaller processor answers: the error of sums, and the embeddings of a file that was made here."
    program = f'''import json, warnings
warnings.simplefilter('ignore')
from tests.exporters.test_convolutions import answered, furthest_off, model
from mmembed.exporters.verify.verify import verify
path = {str(made[1])!r}
print(json.dumps([furthest_off(), verify(path, model(), fresh=True, cpp=False).ok, *answered(path)]))'''
    return on_avx2(made[1].parent, program)


def model(name='resnet18'):
    "A tower of torchvision beside the tiny text tower, with norms that do something."
    torch.manual_seed(0)
    tower = TorchvisionTower(VisionPipeline(64), name)
    for m in tower.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_(0, .1), m.running_var.uniform_(.5, 1.5)
    return DualEncoder(tiny.model().text, tower, dim=24).eval()


def images(n=3):
    return [
        torch.randint(0, 256, (3, 80, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        for i in range(n)
    ]


def answered(path):
    emb = mm.load(path)
    with torch.no_grad(), torch.profiler.profile() as p: x = emb.encode_image(images())
    calls = {e.key for e in p.key_averages()}
    return x.tolist(), 'onednn::qconv2d_pointwise' in calls, 'mkldnn::_convolution_pointwise' in calls


def test_a_file_is_verified_and_multiplies_bytes(made):
    report, path = made
    assert report.ok and next(r for r in report.rows if r.what == 'image cosine').difference <= PRECISION_BOUNDS['int8']
    x, int8, float32 = answered(path)
    assert int8 and not float32
    want = prepared(model()).model.encode_image(model().vision_pipeline(images()))
    assert (1 - F.cosine_similarity(torch.tensor(x), want)).max() < PRECISION_BOUNDS['int8']


def test_one_file_has_one_answer_on_avx2(made, elsewhere):
    """Sums of pairs saturate there at 16 bits, without a word, with weights of all eight bits: an error of 8 % in a
    1 × 1 layer."""
    off, verified, x, int8, float32 = elsewhere
    assert off < 1e-5 and verified and int8 and not float32
    torch.testing.assert_close(torch.tensor(x), torch.tensor(answered(made[1])[0]), atol=SAME['int8'] / 2, rtol=0)


def test_no_pair_of_neighbours_exceeds_sixteen_bits():
    for shape in (8, 64, 3, 3), (8, 3, 7, 7), (8, 5, 1, 1), (8, 1, 3, 3):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        codes = (weight / safe_step(weight)[:, None, None, None]).round().flatten(2)
        for x in codes.clamp(min=0), (-codes).clamp(min=0):
            assert x.max() <= 127
            if shape[1] > 1: assert (x[:, :-1] + x[:, 1:]).max() * 255 < 2 ** 15
        assert codes.abs().flatten(1).amax(1).min() > 50  # and no more than that is given up


@pytest.mark.parametrize('script', [False, True])
@pytest.mark.parametrize(
    'name, least',
    [
        ('resnet18', 20),
        ('resnet50', 53),
        ('mobilenet_v2', 52),
        ('squeezenet1_1', 25),
        ('mobilenet_v3_small', 20),
        ('densenet121', 100),
    ],
)
def test_networks_answer_as_in_float32(name, least, script):
    net = model(name).image.net.requires_grad_(False)
    x = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    made = traced(copy.deepcopy(net))
    inside, of = converted(made, [x], script)
    assert least <= inside <= of
    if script: made = quietly(torch.jit.script, made)
    with torch.no_grad():
        want, before = net(x), made(x)
        assert float((1 - F.cosine_similarity(before, want)).max()) < 2e-3
        # float32 sums depend on the batch
        torch.testing.assert_close(made(x[:1]), before[:1], atol=0 if least == of else 1e-2, rtol=0)
        prepack(made) if script else [m.pack() for m in made.modules() if hasattr(m, 'pack')]
        assert made(x).equal(before)


def test_what_is_added_is_not_written_into_where_it_is_used_again():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.drop = (
                nn.Conv2d(8, 8, 1),
                nn.Conv2d(8, 8, 3, padding=1),
                nn.Conv2d(8, 8, 1),
                nn.Dropout(),
            )
        def forward(self, x):
            x = F.relu(self.a(x))
            y = self.drop(x)
            z = F.relu(self.b(x) + y)
            return self.c(z) + self.c(x) + y
    torch.manual_seed(0)
    net, x = Twice().eval().requires_grad_(False), torch.randn(2, 8, 9, 9)
    made = traced(copy.deepcopy(net))
    assert converted(made, [x])[0] == 4  # `c` is called twice
    torch.testing.assert_close(made(x), net(x), atol=.05, rtol=0)


@pytest.mark.parametrize(
    'pool',
    [
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.MaxPool2d((2, 3), (2, 1), (1, 0)),
        nn.MaxPool2d(2, ceil_mode=True, padding=1),
    ],
)
def test_the_largest_byte_of_windows(pool):
    for side in (7, 9), (30, 33), (112, 5):
        x = torch.randint(0, 256, (2, 5, *side)).to(torch.uint8)
        for made in Largest(pool), quietly(torch.jit.script, Largest(pool)):
            assert made(x).float().equal(pool(x.float())), side


@pytest.mark.weekly
def test_a_graph_answers_like_the_file(tmp_path):
    "ONNX has no bytes in it: float32 that is rounded alike."
    m = model()
    report = export(m, tmp_path/'m.pt', quantize='int8', fresh=False, cpp=False, onnx=tmp_path/'onnx')
    assert report.ok and any(r.stage == 'onnx' and r.what == 'image embedding' for r in report.rows)


def test_what_stands_alone_stays_float32_and_is_told(tmp_path):
    m = model('convnext_tiny')
    with pytest.warns(UserWarning, match='22 convolutions of the image tower stay float32: they stand alone'):
        artifact = assemble(m, variant=Variant(quantize='int8'))
    assert not any(
        type(x).__name__ == 'Int8Conv' or getattr(x, 'original_name', '') == 'Int8Conv' for x in artifact.modules()
    )


def test_what_loses_its_cosine_stays_float32():
    m = model().image
    with torch.no_grad(): want = m(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    x = [torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))]
    count, why = int8_convolutions(m, x, x, 1e-9)
    assert count == 0 and 'in int8 its embeddings lose' in why and 'give images of your own to calibrate=' in why
    with torch.no_grad(): assert m(x[0]).equal(want)


def test_images_for_the_ranges(tmp_path):
    m = model()
    ours, theirs = (
        prepared(m, Variant(quantize='int8'), calibrate=c, decode=False).model.image.state_dict()
        for c in ((), images())
    )
    assert any(not torch.equal(ours[k], theirs[k]) for k in ours if k.endswith('bias'))
    assert export(m, tmp_path/'m.pt', quantize='int8', calibrate=images(), fresh=False, cpp=False).ok
    with pytest.raises(ValueError, match="calibrate: images for quantize='int8', which was not asked for"):
        export(m, tmp_path / 'n.pt', calibrate=images())
    with pytest.raises(ValueError, match=r'calibrate\[1\]: '):
        export(m, tmp_path / 'n.pt', quantize='int8', calibrate=[images()[0], b'not an image'])


def test_the_images_of_a_folder_are_those_that_other_commands_see(tmp_path):
    "Without what a system leaves there under an image's ending; evenly chosen by name."
    for i in range(5): (tmp_path/'sub').mkdir(exist_ok=True), (tmp_path/'sub'/f'{i}.PNG').write_bytes(b'%d' % i)
    for name in ('._0.png', 'notes.txt'): (tmp_path/name).write_bytes(b'other')
    assert calibration(tmp_path) == [b'0', b'1', b'2', b'3', b'4'] and calibration(tmp_path, 2) == [b'0', b'2']
    for empty in (tmp_path/'none', tmp_path/'notes.txt'):
        with pytest.raises(ValueError, match='there are no images'): calibration(empty)


def test_a_portable_file_names_no_onednn(tmp_path):
    artifact = assemble(model(), variant=Variant(quantize='int8', portable=True))
    assert not any(isinstance(m, Int8Conv) or getattr(m, 'original_name', '') == 'Int8Conv' for m in artifact.modules())
