"""Pictures that every test of the room uses: generated ones always, the data folder's where it is present."""
import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from mmembed.core.packing import as_bytes


def picture(width, height, seed=0, mode='RGB'):
    "A picture with edges, gradients and noise."
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    x, y = x / max(width, 1), y / max(height, 1)
    levels = np.stack([255 * x, 255 * y, 127 + 127 * np.sin(20 * (x + y) + seed)], -1)
    levels += rng.normal(0, 12, levels.shape)
    levels[height//4:height//2, width//3:width//2] = rng.integers(0, 256, 3)
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8)).convert(mode)


def saved(image, format, **kwargs):
    "`image` as a file in memory."
    f = io.BytesIO()
    image.save(f, format, **kwargs)
    return as_bytes(f.getvalue())


def opened(data):
    "A file in memory as Pillow opens it."
    return Image.open(io.BytesIO(data.numpy().tobytes()))


def upright(image, alpha='white'):
    "Our rule, in Pillow's terms: turned by the EXIF, RGB, transparency on a colour; uint8 (H, W, 3)."
    image = ImageOps.exif_transpose(image)
    if image.mode in ('RGBA', 'LA', 'PA') or 'transparency' in image.info:
        rgba = image.convert('RGBA')
        if alpha == 'drop': return np.asarray(rgba)[..., :3]
        image = Image.new('RGB', rgba.size, alpha)
        image.paste(rgba, mask=rgba.getchannel('A'))
    return np.asarray(image.convert('RGB'))


def files():
    "One generated file of every kind, by name."
    rgb, gif = picture(97, 64), picture(97, 64).quantize(64)
    rgba = rgb.copy()
    rgba.putalpha(picture(97, 64, 3, 'L'))
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = dict(save_all=True, append_images=[picture(97, 64, s) for s in (1, 2)])
    clear = gif.copy()
    clear.info['transparency'] = 3
    return {
        'jpeg': saved(rgb, 'JPEG'),
        'jpeg-progressive': saved(rgb, 'JPEG', progressive=True, quality=91),
        'jpeg-444': saved(rgb, 'JPEG', subsampling=0),
        'jpeg-gray': saved(rgb.convert('L'), 'JPEG'),
        'jpeg-cmyk': saved(rgb.convert('CMYK'), 'JPEG'),
        'jpeg-exif': saved(rgb, 'JPEG', exif=exif),
        'png': saved(rgb, 'PNG'),
        'png-gray': saved(rgb.convert('L'), 'PNG'),
        'png-1': saved(rgb.convert('1'), 'PNG'),
        'png-palette': saved(gif, 'PNG'),
        'png-rgba': saved(rgba, 'PNG'),
        'png-la': saved(rgba.convert('LA'), 'PNG'),
        'png-trns': saved(clear, 'PNG', transparency=3),
        'png-exif': saved(rgb, 'PNG', exif=exif),
        'png-animated': saved(rgb, 'PNG', **frames),
        'gif': saved(gif, 'GIF'),
        'gif-trns': saved(clear, 'GIF', transparency=3),
        'gif-animated': saved(gif, 'GIF', **frames),
        'webp': saved(rgb, 'WEBP'),
        'webp-lossless': saved(rgb, 'WEBP', lossless=True),
        'webp-rgba': saved(rgba, 'WEBP', lossless=True),
        'webp-lossy-rgba': saved(rgba, 'WEBP'),
        'webp-exif': saved(rgb, 'WEBP', exif=exif),
        'webp-animated': saved(rgb, 'WEBP', **frames),
        'webp-animated-exif': saved(rgb, 'WEBP', exif=exif, **frames),
        'avif': saved(rgb, 'AVIF'),
        'avif-rgba': saved(rgba, 'AVIF'),
        'avif-exif': saved(rgb, 'AVIF', exif=exif),
        'avif-animated': saved(rgb, 'AVIF', **frames),
    }


FILES = files()


@pytest.fixture(params=FILES)
def file(request): return FILES[request.param]
