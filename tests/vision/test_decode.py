"""Decoded pixels against Pillow: equal bit for bit, and every exception is a rule with a test of its own."""
import json
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from mmembed.core.packing import as_bytes
from mmembed.core.torchscript import quietly
from mmembed.core.files import read_bytes
from mmembed.vision.decode import decode_image
from mmembed.core.images import opaque
from mmembed.vision.probe import probe, scan

from tests.helpers import data_path
from tests.vision.coded import ARITHMETIC, ARITHMETIC_PROGRESSIVE
from tests.vision.conftest import opened, picture, saved, upright

scripted = quietly(torch.jit.script, decode_image)


def hwc(x): return x.permute(1, 2, 0).numpy()


@pytest.mark.parametrize('alpha', ['white', 'black', 'drop'])
def test_generated_files_equal_pillow(file, alpha):
    ours, theirs = hwc(decode_image(file, alpha)), upright(opened(file), alpha)
    if alpha == 'drop' and probe(file).format == 'gif' and opened(file).info.get('transparency') is not None:
        seen = np.asarray(opened(file).convert('RGBA'))[..., 3] == 255  # a GIF's transparent pixels have no colour
        ours, theirs = ours[seen], theirs[seen]
    np.testing.assert_array_equal(ours, theirs)
    assert torch.equal(scripted(file, alpha), decode_image(file, alpha))


@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'WEBP', 'AVIF'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_upright(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(picture(21, 14), format, exif=exif)
    np.testing.assert_array_equal(hwc(decode_image(data)), upright(opened(data)))


@pytest.mark.parametrize('orientation', range(1, 9))
def test_upright_where_torchcodec_does_not_look(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    jpeg = saved(picture(21, 14), 'JPEG', exif=exif).numpy().tobytes()
    payload = b'http://ns.adobe.com/xap/1.0/\0<x/>'
    jpeg = as_bytes(jpeg[:2] + b'\xff\xe1' + struct.pack('>H', len(payload) + 2) + payload + jpeg[2:])
    png = saved(picture(21, 14), 'PNG', exif=exif).numpy().tobytes()
    at = png.index(b'eXIf') - 4
    end = at + 12 + struct.unpack('>I', png[at:at + 4])[0]
    png = as_bytes(png[:at] + png[end:-12] + png[at:end] + png[-12:])  # eXIf behind the pixels
    frames = dict(save_all=True, append_images=[picture(21, 14, 1)])
    for data in [jpeg, png, saved(picture(21, 14), 'WEBP', exif=exif, lossless=True, **frames)]:
        np.testing.assert_array_equal(hwc(decode_image(data)), upright(opened(data)))


@pytest.mark.parametrize('data', [ARITHMETIC, ARITHMETIC_PROGRESSIVE], ids=['sequential', 'progressive'])
def test_arithmetic_coding(data):
    assert tuple(probe(data)) == ('jpeg', 24, 16, 8, 3, 1, 1, '')
    np.testing.assert_array_equal(hwc(decode_image(data)), upright(opened(data)))
    # noise, at quality 60
    assert (
        decode_image(data).int() - torch.from_numpy(np.array(picture(24, 16))).permute(2, 0, 1)
    ).abs().float().mean() < 30


def test_ycck():
    cmyk = saved(picture(97, 64).convert('CMYK'), 'JPEG').numpy().tobytes()
    at = cmyk.index(b'Adobe') + 11
    assert cmyk[at] == 0
    ycck = as_bytes(cmyk[:at] + b'\2' + cmyk[at + 1:])  # the same numbers, declared YCCK
    assert opened(ycck).mode == 'CMYK' and probe(ycck).channels == 4
    np.testing.assert_array_equal(hwc(decode_image(ycck)), upright(opened(ycck)))
    assert not torch.equal(decode_image(ycck), decode_image(as_bytes(cmyk)))


def png(width, height, bits, kind, interlaced, seed=0):
    "A PNG of random levels, of any bit depth and colour type, Adam7 or not; the palette has 2**bits colours."
    rng = np.random.default_rng(seed)
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    levels = rng.integers(0, 1 << bits, (height, width, channels))
    # x, y, dx, dy
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    rows = b''
    for x, y, dx, dy in passes if interlaced else [(0, 0, 1, 1)]:
        part = levels[y::dy, x::dx]
        for row in part if part.shape[1] else []:
            digits = ''.join(f'{v:0{bits}b}' for v in row.ravel())
            digits += '0' * (-len(digits) % 8)
            rows += b'\0' + int(digits, 2).to_bytes(len(digits) // 8, 'big')

    def chunk(name, data):
        return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
    palette = chunk(b'PLTE', rng.integers(0, 256, (1 << bits) * 3, np.uint8).tobytes()) if kind == 3 else b''
    head = struct.pack('>IIBBBBB', width, height, bits, kind, 0, 0, interlaced)
    return as_bytes(
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', head)
        + palette
        + chunk(b'IDAT', zlib.compress(rows))
        + chunk(b'IEND', b'')
    ), levels


@pytest.mark.parametrize('interlaced', [0, 1])
@pytest.mark.parametrize(
    'kind, depths', [(0, (1, 2, 4, 8, 16)), (2, (8, 16)), (3, (1, 2, 4, 8)), (4, (8, 16)), (6, (8, 16))]
)
def test_every_kind_of_png(kind, depths, interlaced):
    for bits in depths:
        for width, height in [(1, 1), (3, 2), (9, 13), (33, 8)]:
            data, levels = png(width, height, bits, kind, interlaced)
            info, ours = probe(data), hwc(decode_image(data))
            assert tuple(info[:4]) == ('png', width, height, bits)
            assert np.array_equal(hwc(scripted(data)), ours)
            if bits < 16: np.testing.assert_array_equal(ours, upright(opened(data)))
            else:  # ours to round, see below
                eight = ((levels + 128) // 257).astype(np.uint8)
                modes = {1: 'L', 2: 'LA', 3: 'RGB', 4: 'RGBA'}
                flat = Image.frombytes(modes[eight.shape[2]], (width, height), eight.tobytes())
                np.testing.assert_array_equal(ours, upright(flat))


def test_16_bits_are_rounded():
    levels = torch.arange(65536, dtype=torch.int32).reshape(256, 256)
    data = saved(Image.fromarray(levels.numpy().astype(np.uint16)), 'PNG')
    ours = decode_image(data)
    assert torch.equal(ours, ((levels + 128) // 257).to(torch.uint8).expand(3, -1, -1))


def test_hidden_colours_do_not_show():
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[..., 0] = 200  # red, but wholly transparent
    for format in ['PNG', 'WEBP']:
        data = saved(Image.fromarray(rgba), format, **({'lossless': True, 'exact': True} if format == 'WEBP' else {}))
        assert decode_image(data).unique().tolist() == [255]
        assert decode_image(data, 'black').unique().tolist() == [0]
        assert decode_image(data, 'drop')[0].unique().tolist() == [200]


def test_first_frame_only():
    frames = [picture(33, 21, s) for s in range(4)]
    for format, options in [('GIF', {}), ('WEBP', dict(lossless=True)), ('PNG', {}), ('AVIF', {})]:
        data = saved(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert probe(data).frames > 1
        np.testing.assert_array_equal(hwc(decode_image(data)), upright(opened(data)))


def gif(width, height, left, top, w, h, pixels, colours=2, background=0):
    "An uncompressed GIF: one frame on a larger canvas, with as few colours as asked."
    table = bytes(range(30, 30 + 3 * colours))
    bits = max(colours.bit_length() - 1, 1)
    head = b'GIF89a' + struct.pack('<HHBBB', width, height, 0x80 | bits - 1, background, 0) + table
    code, stream = 1 << 8, []
    for p in pixels: stream += [code, p]  # a clear code before every pixel keeps the code size at nine bits
    bits_out = sum(c << (9 * i) for i, c in enumerate(stream + [code + 1]))
    body = bits_out.to_bytes((9 * (len(stream) + 1) + 7) // 8, 'little')
    blocks = b''.join(bytes([len(body[i:i + 255])]) + body[i:i + 255] for i in range(0, len(body), 255)) + b'\0'
    return as_bytes(head + b'\x2c' + struct.pack('<HHHHB', left, top, w, h, 0) + b'\x08' + blocks + b'\x3b')


def test_gif_canvas_grows_to_its_first_frame():
    data = gif(2, 2, 1, 1, 3, 2, [0, 1, 0, 1, 0, 1])
    assert opened(data).size == (4, 3) == tuple(probe(data)[1:3])
    ours = hwc(decode_image(data))
    assert ours.shape == (3, 4, 3)
    assert (
        ours[1:, 1:]
        == np.array([[[30, 31, 32], [33, 34, 35], [30, 31, 32]], [[33, 34, 35], [30, 31, 32], [33, 34, 35]]])
    ).all()
    assert (ours[0] == 255).all() and (ours[:, 0] == 255).all()


def test_gif_colours_beyond_the_table_are_black_and_not_memory():
    data = gif(4, 1, 0, 0, 4, 1, [0, 1, 2, 255], background=255)
    for _ in range(20): assert hwc(decode_image(data)).tolist() == [[[30, 31, 32], [33, 34, 35], [0, 0, 0], [0, 0, 0]]]


# Pillow takes an orientation from XMP where there is no EXIF, and refuses a bad animation or a missing end where all
# pixels of the first frame are there.
EXCEPTIONS = {
    'pillow/xmp_tags_orientation_exiftool.png', 'pillow/xmp_tags_orientation.png',
    'pillow/apng__chunk_no_fctl.png', 'pillow/truncated_end_chunk.png',
}
# Broken files that Pillow opens with what it could read.
STRICTER = {'pillow/broken_data_stream.png',
            'jpeg-decoder/tests__crashtest__images__imagetestsuite__5482a54657765056f1a94116a8dbffe7.jpg',
            'pngsuite/tests__bugfixes__x_interlaced_chck.png', 'pngsuite/tests__pngsuite__xcsn0g01.png'}


def test_awkward_files_equal_pillow():
    rows = json.loads(data_path('images', 'manifest.json').read_text())
    equal, rounded, refused = 0, 0, set()
    for r in rows:
        data = read_bytes(data_path('images', r['file']))
        info = probe(data)
        try: ours = decode_image(data)
        except (ValueError, RuntimeError):
            if r['pil'] == 'ok' and info.format: refused.add(r['file'])
            continue
        assert ours.dtype == torch.uint8 and ours.shape[0] == 3
        assert torch.equal(scripted(data), ours), r['file']
        if r['pil'] != 'ok' or r['file'] in EXCEPTIONS: continue
        image = opened(data)
        # 16-bit colours: Pillow drops the low byte, we round
        if info.format == 'png' and info.bits == 16 and info.channels > 1 or image.mode.startswith('I'):
            wide = torch.ops.torchcodec_ns.decode_png(data, 4 if info.channels in (2, 4) else 3, 1).to(torch.int32)
            wide = ((wide + 128) // 257).to(torch.uint8)
            theirs = upright(Image.fromarray(hwc(wide)))
            rounded += 1
        else: theirs, equal = upright(image), equal + 1
        np.testing.assert_array_equal(hwc(ours), theirs, r['file'])
    assert refused == STRICTER
    assert equal > 440 and rounded > 20


def test_figures_equal_pillow():
    rows = data_path('figures', 'pairs.jsonl').read_text().splitlines()
    for row in rows[::3]:
        path = data_path('figures', json.loads(row)['image'])
        np.testing.assert_array_equal(hwc(decode_image(read_bytes(path))), upright(Image.open(path)), str(path))


def test_emoji_equal_pillow_on_white():
    rows = data_path('emoji', 'pairs.jsonl').read_text().splitlines()
    for row in rows[::5]:
        path = data_path('emoji', json.loads(row)['image'])
        np.testing.assert_array_equal(hwc(decode_image(read_bytes(path))), upright(Image.open(path)), str(path))


@pytest.mark.parametrize('f', [decode_image, scripted])
def test_broken_files_raise(f, file):
    for part in [file[:0], file[:30], file[:min(len(file) // 2, 250)]]:
        with pytest.raises(Exception) as e: f(part)
        assert str(e.value)


def test_every_byte_changed_never_crashes(file):
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(file), 60):
        data = file.clone()
        data[at] = int(rng.integers(0, 256))
        try: out = decode_image(data, max_pixels=100_000)
        except (ValueError, RuntimeError): continue
        assert out.dtype == torch.uint8 and out.shape[0] == 3 and out[0].numel() <= 100_000


def test_an_animation_costs_its_first_frame():
    frames = [picture(600, 400, s) for s in range(12)]
    for format, options in [('GIF', {}), ('WEBP', dict(lossless=True, method=0))]:
        data = saved(frames[0], format, save_all=True, append_images=frames[1:], **options)
        cut = scan(data, 10**9).cut
        assert cut and cut[-1] < len(data) / 6
        assert decode_image(data, max_pixels=600 * 400).shape == (3, 400, 600)
    # decoded whole, so all frames count
    data = saved(frames[0], 'AVIF', save_all=True, append_images=frames[1:], speed=10)
    assert decode_image(data, max_pixels=12 * 600 * 400).shape == (3, 400, 600)
    with pytest.raises(ValueError, match='600 x 400 x 12 frames'): decode_image(data, max_pixels=11 * 600 * 400)


def test_transparency_of_a_large_picture_takes_little_memory():
    if sys.platform != 'linux': pytest.skip('sizes of a process are read from /proc')
    code = '''
import re, torch
from pathlib import Path
from mmembed.vision.decode import opaque
# ru_maxrss has that of the process which started this one
def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])
x = torch.zeros(3000, 3000, 4, dtype=torch.uint8).permute(2, 0, 1)
before = peak()
assert opaque(x, 'white').min() == 255
print(peak() - before)
'''
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 120_000  # kilobytes; the result itself takes 27,000


@pytest.mark.parametrize('alpha', ['white', 'black'])
def test_every_level_with_every_alpha(alpha):
    levels = torch.arange(256, dtype=torch.uint8)
    rgba = torch.stack([levels[:, None].expand(256, 256)] * 3 + [levels[None].expand(256, 256)])
    want = upright(Image.fromarray(hwc(rgba)), alpha)
    for x in [rgba, rgba.permute(1, 2, 0).contiguous().permute(2, 0, 1), rgba[:, :, 255:], rgba[:, :1]]:
        np.testing.assert_array_equal(hwc(opaque(x, alpha)), want[:x.shape[1], -x.shape[2]:])
