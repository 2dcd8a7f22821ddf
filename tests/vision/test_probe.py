"""The header reader against Pillow, and against files that lie."""
import json
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from mmembed.core.packing import as_bytes
from mmembed.core.torchscript import quietly
from mmembed.core.files import read_bytes
from mmembed.vision.chain import chain
from mmembed.vision.probe import probe, scan

from tests.helpers import data_path
from tests.vision.conftest import FILES, opened, picture, saved, upright

scripted = quietly(torch.jit.script, probe)


class Work(TorchDispatchMode):
    """Counts the operators that run, the values that those which are no views make, and those that `nonzero` looks
    at, which is slow at it"""
    def __init__(self):
        super().__init__()
        self.steps = self.values = self.searched = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        self.steps += 1
        if isinstance(out, torch.Tensor) and not f.is_view: self.values += out.numel()
        if f is torch.ops.aten.nonzero.default: self.searched += args[0].numel()
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


# Pillow counts an MPO's second picture as a frame, and the frames of a damaged APNG by its parts, where we believe its
# header.
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
        assert info.orientation == image.getexif().get(0x0112, 1), r['file']
        if r['file'] in FRAMES: continue
        assert (info.frames > 1) == (getattr(image, 'n_frames', 1) > 1), r['file']
    assert seen > 450


def test_other_formats_are_named():
    rows = json.loads(data_path('images', 'manifest.json').read_text())
    for r in rows:
        if r['format'] in ('TIFF', 'BMP', 'JPEG2000') and r['pil'] == 'ok':
            name = 'JPEG 2000' if r['format'] == 'JPEG2000' else r['format']
            assert probe(read_bytes(data_path('images', r['file']))).error.startswith((f'{name} is not', 'not an')), r[
                'file'
            ]


def chunk(name, payload):
    return struct.pack('>I', len(payload)) + name + payload + struct.pack('>I', zlib.crc32(name + payload))


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


@pytest.mark.parametrize(
    'name, data',
    [
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
        (
            'jpeg scans',
            saved(picture(64, 64), 'JPEG', progressive=True).numpy().tobytes()[:-2] + b'\xff\xda\0\x02' * 2_000_000,
        ),
    ],
)
def test_hostile_headers_take_bounded_work(name, data):
    data = as_bytes(data)
    with Work() as work: info = probe(data)
    # a few passes over the file; a chain is followed in some more
    most = {'png chunks': 24, 'webp chunks': 16}.get(name, 4)
    assert work.steps <= 25_000 and work.values <= most * len(data), name
    assert scripted(data) == info
    if not name.startswith(('png', 'webp')): assert info.error  # there the decoder has the last word


PACKETS = [
    b'<x tiff:Orientation="6"/>',
    b'<tiff:Orientation>8</tiff:Orientation>',
    b"tiff:Orientation='6' tiff:Orientation=\"3\"",
    b'tiff:Orientation="9" tiff:Orientation="2"',
    b'tiff:Orientation>',
    b'tiff:Orientation="',
    b't' * 60_000,
    b'tiff:Orientation' * 2000 + b'>5',
    b'',
]


def with_xmp(format, packet, exif=b''):
    image = picture(9, 5)
    if format == 'JPEG': return saved(image, 'JPEG', xmp=packet or b' ', exif=exif)
    if format == 'WEBP': return saved(image, 'WEBP', xmp=packet, exif=exif)
    from PIL.PngImagePlugin import PngInfo
    info = PngInfo()
    if format == 'tEXt': info.add_text('XML:com.adobe.xmp', packet.decode())
    else: info.add_itxt('XML:com.adobe.xmp', packet.decode(), 'en', 'name')
    return saved(image, 'PNG', pnginfo=info, exif=exif)


@pytest.mark.parametrize('format', ['JPEG', 'WEBP', 'PNG', 'tEXt'])
@pytest.mark.parametrize('packet', PACKETS, ids=range(len(PACKETS)))
def test_orientation_of_xmp_where_exif_has_none(format, packet):
    sideways, empty, odd = Image.Exif(), Image.Exif(), Image.Exif()
    sideways[0x0112], empty[0x010F], odd[0x0112] = 4, 'maker', 9
    for exif in [b'', sideways, empty, odd]:
        file = with_xmp(format, packet, exif)
        image = opened(file)
        image.load()
        wanted = image.getexif().get(0x0112, 1)
        info = probe(file)
        assert info.orientation == (wanted if 1 <= wanted <= 8 else 1) and tuple(scripted(file)) == tuple(info)


def test_the_last_xmp_of_a_jpeg_and_text_behind_the_pixels_count():
    file = with_xmp('JPEG', b'tiff:Orientation="6"').numpy().tobytes()
    payload = b'http://ns.adobe.com/xap/1.0/\0tiff:Orientation="3"'
    twice = as_bytes(file[:2] + b'\xff\xe1' + struct.pack('>H', len(payload) + 2) + payload + file[2:])
    assert probe(twice).orientation == opened(twice).getexif()[0x0112] == 6
    plain = FILES['png'].numpy().tobytes()
    late = as_bytes(plain[:-12] + chunk(b'iTXt', b'XML:com.adobe.xmp\0\0\0\0\0tiff:Orientation="8"') + plain[-12:])
    (image := opened(late)).load()
    assert probe(late).orientation == image.getexif()[0x0112] == 8


def test_xmp_of_the_case_turns_the_image():
    from mmembed.vision.decode import decode_image
    data = read_bytes(data_path('cases', 'xmp_orientation_only.jpg'))
    assert probe(data).orientation == 6 and tuple(decode_image(data).shape) == (3, 97, 61)
    assert (
        np.abs(decode_image(data).permute(1, 2, 0).numpy().astype(int) - upright(opened(data)).astype(int)).max() == 0
    )


def texts(n): return b''.join(chunk(b'tEXt', b'Comment\0text number %d' % i) for i in range(n))


def test_thousands_of_text_chunks_hide_nothing_and_cost_little():
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = picture(9, 5).quantize(16)
    clear.info['transparency'] = 3
    file = saved(clear, 'PNG', exif=exif).numpy().tobytes()
    want = scan(as_bytes(file), 1000)
    frames = chunk(b'acTL', struct.pack('>II', 7, 0))
    assert want.alpha and want.info.orientation == 6
    for n in [30, 60, 61, 62, 63, 64, 65, 5000]:
        many = as_bytes(file[:33] + texts(n) + frames + texts(n) + file[33:-12] + texts(n) + file[-12:] + texts(n))
        with Work() as work: found = scan(many, 1000)
        assert found._replace(info=want.info) == want and found.info == want.info._replace(frames=7), n
        assert tuple(scripted(many)) == tuple(found.info)
        assert work.steps <= 300 and work.values <= 20 * len(many) and work.searched <= .6 * len(many), n
    late = as_bytes(
        file[:33]
        + texts(5000)
        + chunk(b'iTXt', b'XML:com.adobe.xmp\0\0\0\0\0tiff:Orientation="8"')
        + FILES['png'].numpy().tobytes()[33:]
    )
    assert probe(late).orientation == 8
    false = as_bytes(file[:33] + chunk(b'tEXt', frames * 3) * 70 + file[33:])  # what looks like a chunk inside another
    assert scan(false, 1000) == want


def test_a_chain_is_what_a_walk_finds():
    """Chunks of every kind, false ones inside others, damage and cuts.

    The shortcut for a chain without false ones gives what the long way does."""
    r = random.Random(0)
    def walk(data, at):
        found, n = [], len(data) - 7
        while (
            at < n
            and (data[at] == 0 and data[at + 4 : at + 8].isalpha())
            and (end := at + 12 + int.from_bytes(data[at : at + 4], 'big')) <= len(data) + 1
        ):
            if end < n and not (data[end] == 0 and data[end + 4:end + 8].isalpha()): break
            found.append(at)
            at = end
        return found
    for _ in range(150):
        kinds = r.choices(
            [b'tEXt', b'iTXt', b'IDAT', b'zTXt', b'aBcD', b'n0pe'], [9, 2, 2, 1, 1, 0.01], k=r.choice([1, 9, 80, 400])
        )
        inside = [b'Comment\0nothing', b'', chunk(b'tEXt', b'abc') * 4, b'\0\0\0\5tEXtEXtEX', bytes(r.randbytes(70))]
        data = bytearray(
            b'x' * 33
            + b''.join(chunk(k, r.choice(inside) + bytes(r.randbytes(r.randrange(9)))) for k in kinds)
            + chunk(b'IEND', b'')
            + b'junk' * r.randrange(3)
        )
        if r.random() < .3: data[r.randrange(33, len(data))] = r.randrange(256)
        if r.random() < .3: del data[r.randrange(33, len(data)):]
        assert chain(as_bytes(bytes(data)), 33, True).tolist() == walk(bytes(data), 33)


def test_a_webp_of_many_chunks():
    exif = Image.Exif()
    exif[0x0112] = 6
    for file in [
        saved(picture(9, 5), 'WEBP', exif=exif),
        saved(picture(9, 5), 'WEBP', save_all=True, append_images=[picture(9, 5, s) for s in range(90)]),
    ]:
        want, file = scan(file, 1000), file.numpy().tobytes()
        for n in [60, 64, 5000]:
            odd = as_bytes(file[:30] + b'ABCD\3\0\0\0xyz\0' * n + file[30:])
            found = scan(odd, 1000)
            assert (
                found.info == want.info and found.applied == want.applied and tuple(scripted(odd)) == tuple(found.info)
            )
            assert found.cut == [c + 12 * n for c in want.cut]
    assert want.info.frames == 90


TGA = struct.pack('<3B2HB4H2B', 0, 0, 2, 0, 0, 0, 0, 0, 8, 8, 24, 0)


@pytest.mark.parametrize(
    'name, data',
    [
        ('JPEG XL', b'\xff\x0a\x1f\0'),
        ('JPEG XL', b'\0\0\0\x0cJXL \r\n\x87\n'),
        ('QOI', b'qoif\0\0\0\1'),
        ('PSD', b'8BPS\0\1'),
        ('OpenEXR', b'v/1\1'),
        *(('PNM', b'P%d%c3 3 255 ' % (k, c)) for k in range(1, 8) for c in b'\n #'),
        ('PFM', b'PF\n3 3\n'),
        ('TGA', TGA + b'\0' * 192),
        ('TGA', b'\7' * 60 + b'TRUEVISION-XFILE.\0'),
        ('ICO', b'\0\0\1\0\1\0'),
        ('TIFF', b'II+\0'),
        ('DDS', b'DDS |'),
        ('ZIP', b'PK\3\4'),
        ('DICOM', b'\0' * 128 + b'DICM'),
        ('SVG', b'<svg xmlns="x"/>'),
        ('SVG', b'\xef\xbb\xbf \n<?xml version="1.0"?>\n<!-- a > b ? --><SVG>'),
        ('SVG', b'<!-- ' + b'licence ' * 4000 + b'--><svg/>'),
        ('SVG', b'<!DOCTYPE svg PUBLIC "x">'),
        ('SVG', '<?xml version="1.0"?> <svg/>'.encode('utf-16')),
        ('SVG', b'\xfe\xff' + '<svg/>'.encode('utf-16-be')),
        ('HTML', b'\r\n\t <html>'),
        ('HTML', b'<!-- saved page --><!doctype HTML>'),
        ('HTML', b'<head><title>404'),
        ('HTML', b'<!DOCTYPE\n html>'),
        ('XML', b'<Error><Code>AccessDenied'),
        ('XML', b'<?xml version="1.0"?><note/>'),
        ('XML', b'<!-- never ends'),
    ],
)
def test_what_is_not_decoded_is_named(name, data):
    info = probe(as_bytes(data))
    assert info.error.startswith(f'{name} is not decoded here') and tuple(scripted(as_bytes(data))) == tuple(info)


@pytest.mark.parametrize(
    'data',
    [
        b'   \n',
        b'<',
        b'<3 and a heart',
        b'P6',
        b'P8\n',
        b'MZ\x90',
        b'{"error": 1}',
        TGA[:17],
        b'\0' * 500,
        b'\xef\xbb\xbf',
    ],
)
def test_what_is_nothing_is_not_named(data):
    assert probe(as_bytes(data)).error == scripted(as_bytes(data)).error == 'not an image file that is known here'


def test_a_long_file_costs_no_more():
    short = FILES['jpeg']
    long = torch.cat([short, torch.zeros(50_000_000, dtype=torch.uint8)])
    with Work() as a: found = probe(long)
    with Work() as b: assert probe(short) == found
    assert (a.steps, a.values) == (b.steps, b.values)
