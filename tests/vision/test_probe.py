"""The header reader against Pillow, and against files that lie."""
import io
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from mmembed.core import as_bytes, quietly, read_bytes
from mmembed.vision.probe import probe, scan

from ..helpers import data_path
from .conftest import FILES, opened, picture, saved

scripted = quietly(torch.jit.script, probe)


class Work(TorchDispatchMode):
    "Counts the operators that run, and the values that those which are no views make"
    def __init__(self):
        super().__init__()
        self.steps = self.values = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        self.steps += 1
        if isinstance(out, torch.Tensor) and not f.is_view: self.values += out.numel()
        return out


def test_generated_files_as_pillow_reads_them(file):
    info, image = probe(file), opened(file)
    assert info.error == ''
    assert (info.format, info.width, info.height) == (image.format.lower(), *image.size)
    assert info.orientation == image.getexif().get(0x0112, 1)
    assert (info.frames > 1) == (getattr(image, 'n_frames', 1) > 1)
    assert tuple(scripted(file)) == tuple(info)


@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'WEBP', 'AVIF'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_every_orientation(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert probe(saved(picture(12, 7), format, exif=exif)).orientation == orientation


def test_bits_and_channels():
    rgb = picture(9, 5)
    assert probe(saved(rgb.convert('L'), 'JPEG'))[3:5] == (8, 1)
    assert probe(saved(rgb.convert('CMYK'), 'JPEG'))[3:5] == (8, 4)
    assert probe(saved(rgb.convert('1'), 'PNG'))[3:5] == (1, 1)
    assert probe(saved(Image.fromarray(np.zeros((5, 9), np.uint16)), 'PNG'))[3:5] == (16, 1)
    assert probe(saved(rgb.convert('LA'), 'PNG'))[3:5] == (8, 2)
    assert probe(saved(rgb.convert('RGBA'), 'WEBP', lossless=True, exact=True))[3] == 8


# Pillow takes an orientation from XMP where there is no EXIF, counts an MPO's second picture as a frame, and counts
# the frames of a damaged APNG by its parts, where we believe its header.
XMP = {'pillow/xmp_tags_orientation_exiftool.png', 'pillow/xmp_tags_orientation.png'}
FRAMES = {'pillow/frame_size.mpo', 'pillow/ignore_frame_size.mpo', 'pillow/apng__split_fdat_zero_chunk.png'}


def test_real_files_as_pillow_reads_them():
    rows = json.loads(data_path('images', 'manifest.json').read_text())
    seen = 0
    for r in rows:
        data = read_bytes(data_path('images', r['file']))
        info = probe(data)
        assert tuple(scripted(data)) == tuple(info), r['file']
        if r['pil'] != 'ok' or r['format'] not in ('JPEG', 'MPO', 'PNG', 'GIF', 'WEBP', 'AVIF'): continue
        seen += 1
        try: (image := opened(data)).getexif(), getattr(image, 'n_frames', 1)
        except (SyntaxError, OSError): continue  # a damaged end, which a header's reader does not see
        assert info.error == '', r['file']
        assert (info.width, info.height) == image.size, r['file']
        if r['file'] not in XMP: assert info.orientation == image.getexif().get(0x0112, 1), r['file']
        if r['file'] in FRAMES: continue
        assert (info.frames > 1) == (getattr(image, 'n_frames', 1) > 1), r['file']
    assert seen > 450


def test_other_formats_are_named():
    rows = json.loads(data_path('images', 'manifest.json').read_text())
    for r in rows:
        if r['format'] in ('TIFF', 'BMP', 'JPEG2000') and r['pil'] == 'ok':
            name = 'JPEG 2000' if r['format'] == 'JPEG2000' else r['format']
            assert probe(read_bytes(data_path('images', r['file']))).error.startswith((f'{name} is not', 'not an')), r['file']


def chunk(name, payload): return struct.pack('>I', len(payload)) + name + payload + struct.pack('>I', zlib.crc32(name + payload))


def png_of(width, height):
    head = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0))
    return as_bytes(b'\x89PNG\r\n\x1a\n' + head + chunk(b'IDAT', zlib.compress(b'\0' * 1000)) + chunk(b'IEND', b''))


@pytest.mark.parametrize('data, reason', [
    (as_bytes(b''), 'the file is empty'),
    (as_bytes(b'hello, this is a text and not a picture'), 'not an image file'),
    (as_bytes(b'<!DOCTYPE html><html>'), 'HTML is not decoded'),
    (as_bytes(b'\xff\xd8\xff'), 'JPEG without a frame header'),
    (as_bytes(b'\x89PNG\r\n\x1a\n'), 'PNG without IHDR'),
    (as_bytes(b'GIF89a'), 'GIF without an image'),
    (as_bytes(b'RIFF\0\0\0\0WEBP'), 'WebP without a size'),
    (as_bytes(b'\0\0\0\x0cftypavif'), 'AVIF without a size'),
    (as_bytes(b'\0\0\0\x18ftypheic\0\0\0\0mif1heic'), 'HEIC is not decoded without heic=True'),
    (png_of(100_000, 100_000), 'more than max_pixels'),
    (png_of(0, 5), 'png of 0 x 5'),
    (torch.zeros(3, 4, 5, dtype=torch.uint8), '1-D uint8'),
    (torch.zeros(4), '1-D uint8'),
])
def test_refused(data, reason):
    info = probe(data)
    assert reason in info.error
    assert tuple(scripted(data)) == tuple(info)


def test_max_pixels_counts_stored_pixels():
    assert probe(FILES['png'], max_pixels=97 * 64).error == ''
    assert 'max_pixels=6207' in probe(FILES['png'], max_pixels=97 * 64 - 1).error


def test_every_truncation_is_answered(file):
    for n in [*range(min(len(file), 300)), len(file) // 2, len(file) - 1]:
        assert tuple(scripted(file[:n])) == tuple(probe(file[:n]))


def test_orientation_that_torchcodec_would_miss():
    exif = Image.Exif()
    exif[0x0112] = 3
    plain = saved(picture(9, 5), 'JPEG', exif=exif).numpy().tobytes()
    payload = b'http://ns.adobe.com/xap/1.0/\0<x/>'
    xmp_first = as_bytes(plain[:2] + b'\xff\xe1' + struct.pack('>H', len(payload) + 2) + payload + plain[2:])
    h = scan(xmp_first, 1000)
    assert (h.info.orientation, h.applied) == (3, 1)
    assert opened(xmp_first).getexif()[0x0112] == 3


@pytest.mark.parametrize('name, data', [
    ('jpeg segments', b'\xff\xd8' + b'\xff\xe0\0\x02' * 2_000_000),
    ('jpeg fill bytes', b'\xff\xd8' + b'\xff' * 8_000_000),
    ('jpeg garbage', b'\xff\xd8\xff\0' + b'\0' * 8_000_000),
    ('png chunks', png_of(9, 9).numpy().tobytes()[:33] + b'\0\0\0\0tEXtabcd' * 700_000),
    ('gif sub-blocks of one byte', b'GIF89a\1\0\1\0\0\0\0' + b'\x21\xfe' + b'\1a' * 4_000_000),
    ('gif extensions', b'GIF89a\1\0\1\0\0\0\0' + b'\x21\xfe\0' * 2_500_000),
    ('gif zeros', b'GIF89a\1\0\1\0\0\0\0' + b'\0' * 8_000_000),
    ('webp chunks', b'RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\x0a' + b'\0' * 9 + b'ABCD\0\0\0\0' * 1_000_000),
    ('avif boxes', b'\0\0\0\x0cftypavif' + b'\0\0\0\x08free' * 1_000_000),
    ('avif self', b'\0\0\0\x0cftypavif' + b'\0\0\0\x08meta' * 1_000_000),
    ('jpeg scans', saved(picture(64, 64), 'JPEG', progressive=True).numpy().tobytes()[:-2] + b'\xff\xda\0\x02' * 2_000_000),
])
def test_hostile_headers_take_bounded_work(name, data):
    data = as_bytes(data)
    with Work() as work: info = probe(data)
    assert work.steps <= 25_000 and work.values <= 4 * len(data), name  # a few passes over the file
    assert scripted(data) == info
    if not name.startswith(('png', 'webp')): assert info.error  # there the decoder has the last word


def test_a_long_file_costs_no_more():
    short = FILES['jpeg']
    long = torch.cat([short, torch.zeros(50_000_000, dtype=torch.uint8)])
    with Work() as a: found = probe(long)
    with Work() as b: assert probe(short) == found
    assert (a.steps, a.values) == (b.steps, b.values)
