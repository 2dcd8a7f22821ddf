"""One pipeline in every form, in every worker, against open_clip; and what it says when things go wrong."""
import io
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from mmembed.core.packing import as_bytes
from mmembed.core.torchscript import quietly
from mmembed.core.files import read_bytes
from mmembed.vision.augment import Augmentation
from mmembed.vision.pipeline import VisionPipeline
from mmembed.core.images import as_image

from tests.helpers import FORMS, HANG, data_path, in_form
from tests.vision.conftest import FILES, opened, picture, saved

PIPELINES = {
    'clip': dict(size=64), 'pillow': dict(size=64, resize='pillow'),
    'longest': dict(size=(48, 64), resize_mode='longest', fill=(1, 2, 3), interpolation='bilinear', alpha='black'),
    'squash': dict(size=33, resize_mode='squash', interpolation='nearest', alpha='drop', mean=0.5, std=0.5),
    'float, half': dict(size=40, resize='float', dtype='float16'),
}


def raises(f, text):
    with pytest.raises(Exception) as e: f()
    assert text in str(e.value)


@pytest.mark.parametrize('options', PIPELINES.values(), ids=PIPELINES)
@pytest.mark.parametrize('form', FORMS)
def test_every_form_gives_the_same_bits(form, options):
    eager = VisionPipeline(**options)
    vp = in_form(VisionPipeline(**options), form)
    files = [*FILES.values(), as_image(picture(50, 40))]
    for _ in range(3):  # the profiling executor recompiles between calls
        assert torch.equal(vp(files), eager(files))
    for x in files:
        level = vp.preprocess(x)
        assert level.dtype == torch.uint8 and torch.equal(level, eager.preprocess(x))
        if x.ndim == 1:
            assert tuple(vp.probe(x)) == tuple(eager.probe(x))
            assert torch.equal(vp.decode(x), eager.decode(x))
            assert torch.equal(vp.transform(vp.decode(x)), level)
    assert torch.equal(vp.normalize(torch.stack([eager.preprocess(x) for x in files])), eager(files))
    assert torch.equal(vp.preprocess_all(files, True), eager.preprocess_all(files, False))
    assert vp([]).shape == (0, 3, *eager.size)


def test_any_batch_composition():
    vp = VisionPipeline(size=40)
    files = list(FILES.values())
    whole = vp(files)
    for i, x in enumerate(files): assert torch.equal(vp([x])[0], whole[i])
    assert torch.equal(vp(files[::-1]), whole.flip(0))


def test_normalize_is_torchvisions():
    from torchvision.transforms.functional import normalize
    vp = VisionPipeline()
    levels = torch.randint(0, 256, (2, 3, 9, 8), dtype=torch.uint8)
    theirs = normalize(levels.float().div(255), vp.spec()['mean'], vp.spec()['std'])
    assert torch.equal(vp.normalize(levels), theirs)


@pytest.mark.parametrize('form', ['eager', 'scripted'])
@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16', 'uint8'])
def test_dtype_of_the_pixels(dtype, form):
    files, plain = [FILES['jpeg'], FILES['png-rgba']], VisionPipeline(size=32)
    vp = in_form(VisionPipeline(size=32, dtype=dtype), form)
    ours = vp(files)
    assert ours.dtype == getattr(torch, dtype) and vp([]).shape == (0, 3, 32, 32) and vp([]).dtype == ours.dtype
    assert torch.equal(ours, plain.preprocess_all(files, False) if dtype == 'uint8' else plain(files).to(ours.dtype))


def test_pixels_lie_as_towers_read_them():
    vp = VisionPipeline(size=32)
    levels = vp.preprocess_all([FILES['jpeg']] * 3, False)
    want = levels.float().div(255).sub(vp.mean).div(vp.std)
    for x in [vp([FILES['jpeg']] * 3), vp.normalize(levels), vp.normalize(levels.contiguous())]:
        assert x.is_contiguous(memory_format=torch.channels_last) and torch.equal(x, want)


def test_blank_is_near_zero():
    vp = VisionPipeline(size=(8, 9))
    assert vp.blank().dtype == torch.uint8 and vp.normalize(vp.blank()[None]).abs().max() < 0.01


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_transform_on_a_gpu():
    files = [FILES['jpeg'], FILES['png-rgba'], as_image(picture(500, 333))]
    cpu, gpu = VisionPipeline(size=64, resize='float'), VisionPipeline(size=64, resize='float').to('cuda')
    a, b = cpu.preprocess_all(files, False), gpu.preprocess_all(files, False)
    assert b.is_cuda and gpu(files).is_cuda and (a.int() - b.cpu().int()).abs().max() <= 2
    assert VisionPipeline(size=64).to('cuda')(files).is_cuda  # transformed on the CPU, normalised on the GPU


class Files(Dataset):
    def __init__(self, vp, files): self.vp, self.files = vp, files
    def __len__(self): return len(self.files)
    def __getitem__(self, i):
        g = torch.Generator().manual_seed(i)
        return self.vp([self.files[i]])[0], self.vp.augment(self.files[i], g)


@pytest.mark.parametrize('context', ['fork', 'spawn'])
def test_workers_give_the_same_bits(context):
    vp = VisionPipeline(size=32, augmentation=Augmentation(scale=(0.3, 1.0)))
    data = Files(vp, list(FILES.values()))
    scripted = quietly(torch.jit.script, vp)
    scripted.preprocess_all(data.files, True)  # the parent has used its threads before it forks
    here = [data[i] for i in range(len(data))]
    loader = DataLoader(data, batch_size=5, num_workers=2, multiprocessing_context=context, timeout=HANG)
    batches = list(loader)
    assert torch.equal(torch.cat([b[0] for b in batches]), torch.stack([h[0] for h in here]))
    assert torch.equal(torch.cat([b[1] for b in batches]), torch.stack([h[1] for h in here]))


def test_threads_give_the_same_bits():
    vp = VisionPipeline(size=64)
    files, before = list(FILES.values()), torch.get_num_threads()
    whole = vp(files)
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert torch.equal(vp(files), whole)
    finally: torch.set_num_threads(before)


def levels_of(transform, vp, image):
    x = transform(image) * vp.std + vp.mean
    return (x * 255).round().to(torch.uint8)


@pytest.mark.parametrize('mode', ['shortest', 'longest', 'squash'])
@pytest.mark.parametrize('interpolation', ['bicubic', 'bilinear'])
def test_transform_is_open_clips(mode, interpolation):
    from open_clip.transform import PreprocessCfg, image_transform_v2
    cfg = dict(size=64, resize_mode=mode, interpolation=interpolation)
    theirs = image_transform_v2(PreprocessCfg(fill_color=9, **cfg), is_train=False)
    fast, exact = VisionPipeline(fill=9, **cfg), VisionPipeline(fill=9, resize='pillow', **cfg)
    differ = total = 0
    for w, h in [(1, 1), (2, 90), (64, 64), (65, 64), (63, 65), (97, 301), (640, 480), (333, 777), (64, 1000)]:
        data = saved(picture(w, h, w), 'JPEG', quality=90)
        want = levels_of(theirs, fast, opened(data))
        assert torch.equal(exact.preprocess(data), want), (w, h)
        assert torch.equal(exact([data])[0], theirs(opened(data)))  # the floats too
        difference = (fast.preprocess(data).int() - want.int()).abs()
        assert difference.max() <= 2
        differ, total = differ + int((difference > 0).sum()), total + difference.numel()
    assert differ / total <= 0.005


def test_transform_of_real_photos_is_open_clips():
    from open_clip.transform import PreprocessCfg, image_transform_v2
    rows = data_path('figures', 'pairs.jsonl').read_text().splitlines()
    theirs = image_transform_v2(PreprocessCfg(), is_train=False)
    fast, exact, in_floats = VisionPipeline(), VisionPipeline(resize='pillow'), VisionPipeline(resize='float')
    differ = total = 0
    for row in rows[::10]:
        path = data_path('figures', json.loads(row)['image'])
        want = levels_of(theirs, fast, Image.open(path))
        assert torch.equal(exact.preprocess(read_bytes(path)), want), path
        assert (in_floats.preprocess(read_bytes(path)).int() - want.int()).abs().max() <= 2, path
        difference = (fast.preprocess(read_bytes(path)).int() - want.int()).abs()
        assert difference.max() <= 2, path
        differ, total = differ + int((difference > 0).sum()), total + difference.numel()
    assert differ / total <= 0.005


def test_presets():
    assert VisionPipeline.from_open_clip('ViT-B-32').spec() == VisionPipeline().spec()
    siglip = VisionPipeline.from_open_clip('ViT-B-16-SigLIP').spec()
    assert (siglip['size'], siglip['resize_mode'], siglip['mean']) == ([224, 224], 'squash', [0.5] * 3)
    assert VisionPipeline.from_open_clip('ViT-B-32', size=96, resize='pillow').size == (96, 96)
    assert VisionPipeline.from_open_clip('ViT-L-14').spec()['mean'][0] == 0.48145466
    assert VisionPipeline.from_open_clip('ViT-L-14', 'laion2b_s32b_b82k').spec()['mean'] == [0.5] * 3
    raises(lambda: VisionPipeline.from_open_clip('ViT-Z'), 'ViT-Z')
    raises(lambda: VisionPipeline.from_open_clip('ViT-B-32', 'no-tag'), 'laion2b_s34b_b79k')


def test_transformers_preset_is_the_fast_processor():
    from transformers import CLIPImageProcessor, ViTImageProcessor

    for processor in [
        CLIPImageProcessor(),
        CLIPImageProcessor(size={'shortest_edge': 72}, crop_size={'height': 64, 'width': 64}),
        ViTImageProcessor(size={'height': 96, 'width': 96}),
    ]:
        vp = VisionPipeline.from_transformers(processor.to_dict())
        for size in [(97, 64), (64, 97), (33, 500), (640, 481)]:
            image = picture(*size)
            theirs = processor(image, return_tensors='pt')['pixel_values'][0]
            assert theirs.shape[1:] == vp.size
            # its fast form folds / 255 into mean and std, so its floats differ in the last bits
            assert (vp([image])[0] - theirs).abs().max() < 1e-5


def test_transformers_preset_of_a_square_size():
    "KOSMOS-2's setting, which decides the shape that is resized to."
    from transformers import CLIPImageProcessor
    config = dict(CLIPImageProcessor().to_dict(), use_square_size=True)
    vp = VisionPipeline.from_transformers(config)
    for size in [(64, 97), (640, 481), (33, 500)]:
        image = picture(*size)
        theirs = CLIPImageProcessor(**config)(image, return_tensors='pt')['pixel_values'][0]
        assert theirs.shape[1:] == vp.size == (224, 224) and (vp([image])[0] - theirs).abs().max() < 1e-5
    with pytest.raises(ValueError, match="size={'shortest_edge': 336} with use_square_size"):
        VisionPipeline.from_transformers(config | dict(size={'shortest_edge': 336}, crop_size=336))


def test_torchvision_preset_is_its_transform():
    from torchvision.models import get_weight

    for name in [
        'ResNet18_Weights.IMAGENET1K_V1',
        'ResNet50_Weights.IMAGENET1K_V2',
        'EfficientNet_B0_Weights.IMAGENET1K_V1',
    ]:
        theirs = get_weight(name).transforms()
        vp = VisionPipeline.from_torchvision(name, resize='pillow')
        for size in [(97, 64), (64, 97), (640, 481)]:
            image = picture(*size)
            assert torch.equal(vp([image])[0], theirs(image)), name


def test_presets_refuse_what_they_cannot_express():
    base = dict(size=224, do_center_crop=True, crop_size=224, image_mean=[.5]*3, image_std=[.5]*3)
    for bad in [
        dict(do_pad=True),
        dict(resample=1),
        dict(rescale_factor=1 / 127.5),
        dict(do_normalize=False),
        dict(crop_pct=0.9),
        dict(size={'longest_edge': 300}),
        dict(size={'shortest_edge': 224}, do_center_crop=False),
    ]:
        with pytest.raises(ValueError) as e: VisionPipeline.from_transformers(base | bad)
        assert 'preprocessor_config: ' in str(e.value)
    with pytest.raises(OSError): VisionPipeline.from_transformers('/no/such/folder')


def test_augmentations_of_training():
    vp = VisionPipeline(size=32, augmentation=Augmentation(color_jitter=(.4, .4, .4, .1), color_jitter_prob=.8,
                                                           gray_scale_prob=.2, re_prob=.5))
    data = FILES['jpeg']
    a, b = ([vp.augment(data, torch.Generator().manual_seed(s)) for s in range(30)] for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    gray = sum(int((x[0] == x[1]).all() and (x[1] == x[2]).all()) for x in a)
    mean = torch.tensor([round(255 * m) for m in vp.spec()['mean']])[:, None, None]
    erased = sum(int((x == mean).all(0).sum() > 15) for x in a)
    assert 1 <= gray <= 15 and 8 <= erased <= 25
    assert vp.spec()['augmentation']['re_prob'] == .5


def test_show_and_html():
    pytest.importorskip('matplotlib').use('agg')
    for options in PIPELINES.values():
        vp = VisionPipeline(**options)
        figure = vp.show(FILES['jpeg'])
        # the margins that are cut away
        assert len(figure.axes[0].patches) == (4 if vp.resize_mode == 'shortest' else 0)
        assert figure.axes[1].get_images()[0].get_array().shape == (*vp.size, 3)
        assert f'{vp.size[0]} x {vp.size[1]}' in vp._repr_html_()
        import matplotlib.pyplot as plt
        plt.close(figure)


@pytest.mark.parametrize('options', PIPELINES.values(), ids=PIPELINES)
def test_spec_is_complete(options):
    vp = VisionPipeline(**options)
    again = VisionPipeline.from_spec(json.loads(json.dumps(vp.spec())))
    assert again.spec() == vp.spec()
    files = list(FILES.values())
    assert torch.equal(again(files), vp(files))
    assert torch.equal(pickle.loads(pickle.dumps(vp))(files), vp(files))
    assert set(vp.spec()) == set(VisionPipeline.__init__.__annotations__)


def test_everything_that_holds_a_picture():
    vp, rgb = VisionPipeline(size=32), picture(50, 40)
    hwc = np.array(rgb)
    want = vp([as_image(rgb)])
    png = saved(rgb, 'PNG')
    same = [
        rgb,
        hwc,
        torch.from_numpy(hwc),
        torch.from_numpy(hwc).permute(2, 0, 1),
        png,
        png.numpy().tobytes(),
        bytearray(png.numpy()),
    ]
    for x in same: assert torch.equal(vp([x]), want)
    for x in [hwc.transpose(2, 0, 1), np.asfortranarray(hwc), hwc[:, ::-1][:, ::-1]]: assert torch.equal(vp([x]), want)
    gray = np.array(rgb.convert('L'))
    assert torch.equal(vp([gray]), vp([rgb.convert('L')])) and torch.equal(vp([gray[..., None]]), vp([gray]))


def test_where_a_shape_can_be_read_both_ways():
    both = np.arange(45, dtype=np.uint8).reshape(3, 5, 3)
    assert torch.equal(as_image(both), torch.from_numpy(both).permute(2, 0, 1))  # an array is (H, W, C)
    assert torch.equal(as_image(torch.from_numpy(both)), torch.from_numpy(both))  # a tensor is (C, H, W)


def test_the_embedder_reads_pictures_the_same_way():
    from mmembed.runtime.embedder import load
    from tests.exporters import tiny
    emb, vp, rgb = load(tiny.artifact()), tiny.pipelines()[1], picture(50, 40)
    hwc, both = np.array(rgb), np.arange(45, dtype=np.uint8).reshape(3, 5, 3)
    forms = [
        rgb,
        hwc,
        hwc.transpose(2, 0, 1),
        torch.from_numpy(hwc),
        torch.from_numpy(hwc).permute(2, 0, 1),
        both,
        torch.from_numpy(both),
        rgb.convert('L'),
        np.array(rgb.convert('L')),
        FILES['png-rgba'],
        opened(FILES['png-rgba']),
        opened(FILES['jpeg-exif']),
    ]
    for x in forms: assert torch.equal(emb.preprocess(x), vp.preprocess(as_image(x)))


def test_a_picture_opened_by_pillow_is_the_file(tmp_path, file):
    vp = VisionPipeline(size=32)
    (tmp_path/'x').write_bytes(file.numpy().tobytes())
    want = vp([file])
    assert torch.equal(vp([str(tmp_path/'x')]), want)
    assert torch.equal(vp([opened(file)]), want)


def test_errors_name_the_item():
    vp, good = VisionPipeline(size=32), FILES['jpeg']
    raises(lambda: vp([good, as_bytes(b'')]), 'images[1]: the file is empty')
    raises(lambda: vp([good, good, good[:500]]), 'images[2]: ')
    raises(lambda: vp([3]), 'images[0]: int is not an image')
    raises(lambda: vp([torch.zeros(3, 4, 4)]), 'must be uint8')
    raises(lambda: vp([torch.zeros(7, 4, 5, dtype=torch.uint8)]), '(7, 4, 5)')
    raises(lambda: vp(b'abc'), 'pass a list')
    raises(lambda: vp('no/such/file'), 'pass a list')
    raises(lambda: vp(['no/such/file']), 'images[0]: ')
    raises(lambda: VisionPipeline(size=32, max_pixels=100)([good]), 'max_pixels=100')


@pytest.mark.parametrize('form', FORMS)
def test_errors_in_every_form(form):
    vp = in_form(VisionPipeline(size=32), form)
    raises(lambda: vp.decode(as_bytes(b'')), 'the file is empty')
    raises(lambda: vp.preprocess(as_bytes(b'no picture at all')), 'not an image file')
    raises(lambda: vp.transform(torch.zeros(3, 4, 4)), 'must be uint8')
    raises(lambda: vp.preprocess(torch.zeros(2, 4, 4, dtype=torch.uint8)), 'must be uint8 (3, H, W)')
    assert vp.probe(as_bytes(b'')).error == 'the file is empty'


@pytest.mark.parametrize('form', FORMS)
def test_without_file_decoders(form):
    vp = in_form(VisionPipeline(size=32, file_decode=False), form)
    rgb = as_image(picture(50, 40))
    assert torch.equal(vp([rgb]), VisionPipeline(size=32)([rgb]))
    raises(lambda: vp.preprocess(FILES['jpeg']), 'file_decode=False')
    assert vp.probe(FILES['jpeg']).width == 97


def test_no_decoder_operator_is_left_without_file_decode():
    f = io.BytesIO()
    quietly(torch.jit.save, quietly(torch.jit.script, VisionPipeline(file_decode=False)), f)
    import zipfile
    code = [zipfile.ZipFile(f).read(n) for n in zipfile.ZipFile(f).namelist() if n.endswith('.py')]
    assert code and not any(b'torchcodec_ns' in c for c in code)


@pytest.mark.parametrize(
    'bad',
    [
        dict(resize_mode='fit'),
        dict(interpolation='lanczos'),
        dict(alpha='pink'),
        dict(size=0),
        dict(mean=(1, 2)),
        dict(std=0),
        dict(fill=300),
        dict(resize='pil'),
        dict(resize='pillow', antialias=False),
        dict(dtype='int8'),
    ],
)
def test_bad_options_are_named(bad):
    with pytest.raises(ValueError) as e: VisionPipeline(**bad)
    assert next(iter(bad)) in str(e.value)


def test_describe_states_the_rule():
    text = VisionPipeline(resize_mode='longest', fill=9, alpha='black', max_pixels=1000).describe()
    for part in ['fit into 224 x 224', '(9, 9, 9)', 'transparency on black', 'bicubic', 'antialiased', '1,000 pixels']:
        assert part in text
    assert (
        'in float16' in VisionPipeline(dtype='float16').describe()
        and 'levels in uint8' in VisionPipeline(dtype='uint8').describe()
    )
    assert 'float32 rounded to levels' in VisionPipeline(resize='float').describe()
    assert text in repr(VisionPipeline(resize_mode='longest', fill=9, alpha='black', max_pixels=1000))
