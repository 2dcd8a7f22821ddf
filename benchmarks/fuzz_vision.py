"""Mutated image files through probe and decode: no crash, no hang, bounded memory, and every refusal has a reason.

    python -m benchmarks.fuzz_vision --n 50000
    python -m benchmarks.fuzz_vision --n 50000 --heic     # nothing but HEIC, through libheif

Each file is decoded in a child process; the parent notices a child that dies or takes longer than --limit seconds
for one
file, names the file (it can be made again from its number and the seed) and goes on. Exits with 1 if there was any.
Seeds are generated files of every kind and, where `MMEMBED_DATA` has them, the awkward files of its `images`.
"""
import argparse
import io
import json
import multiprocessing as mp
import os
import random
import resource
import sys
import time
from pathlib import Path

import torch
from PIL import Image

from mmembed.core.packing import as_bytes
from mmembed.vision.decode import decode_image
from mmembed.vision.pipeline import VisionPipeline
from mmembed.vision.probe import probe


def heic_seeds():
    "The HEIC files of the tests."
    from tests.vision import coded
    return {k: bytes(getattr(coded, k).numpy()) for k in ('HEIC', 'HEIC_ALPHA', 'HEIC_TWO')}


def seeds(heic=False):
    "Files to mutate, by name: generated ones, then the data folder's of at most 100 kB."
    if heic: return heic_seeds()
    rgb = Image.effect_mandelbrot((61, 40), (-3, -2.5, 2, 2.5), 100).convert('RGB')
    alpha = rgb.copy()
    alpha.putalpha(rgb.convert('L'))
    exif = Image.Exif()
    exif[0x0112] = 6
    more = dict(save_all=True, append_images=[rgb.rotate(90), rgb.rotate(180)])
    made = {}
    for name, image, format, options in [
        ('jpeg', rgb, 'JPEG', dict(exif=exif)),
        ('jpeg-progressive', rgb, 'JPEG', dict(progressive=True)),
        ('jpeg-gray', rgb.convert('L'), 'JPEG', {}),
        ('jpeg-cmyk', rgb.convert('CMYK'), 'JPEG', {}),
        ('png', rgb, 'PNG', dict(exif=exif)),
        ('png-rgba', alpha, 'PNG', {}),
        ('png-palette', rgb.quantize(16), 'PNG', {}),
        ('apng', rgb, 'PNG', more),
        ('gif', rgb.quantize(16), 'GIF', {}),
        ('gif-animated', rgb.quantize(64), 'GIF', more),
        ('webp', rgb, 'WEBP', dict(exif=exif)),
        ('webp-lossless', alpha, 'WEBP', dict(lossless=True)),
        ('webp-animated', rgb, 'WEBP', dict(exif=exif) | more),
        ('avif', alpha, 'AVIF', dict(exif=exif)),
        ('avif-animated', rgb, 'AVIF', more),
    ]:
        f = io.BytesIO()
        image.save(f, format, **options)
        made[name] = f.getvalue()
    root = Path(os.environ.get('MMEMBED_DATA') or Path(__file__).resolve().parents[2]/'shared'/'data')/'images'
    if (root/'manifest.json').exists():
        for r in json.loads((root/'manifest.json').read_text()):
            p = root/r['file']
            if r['format'] in ('JPEG', 'MPO', 'PNG', 'GIF', 'WEBP', 'AVIF', None) and p.stat().st_size <= 100_000:
                made[r['file']] = p.read_bytes()
    return made


def mutate(files, names, seed, i):
    "The `i`-th mutated file, and the name of its seed."
    rng = random.Random(seed * 1_000_003 + i)
    name = rng.choice(names)
    b = bytearray(files[name])
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        if not b: break
        # headers are where the damage is done
        at = rng.randrange(min(len(b), 64)) if rng.random() < 0.4 else rng.randrange(len(b))
        kind = rng.randrange(8)
        if kind == 0: b[at] = rng.randrange(256)
        elif kind == 1: b[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            b[at : at + 4] = rng.choice(
                [b'\xff\xff\xff\xff', b'\0\0\0\0', b'\x7f\xff\xff\xff', b'\x80\0\0\0', b'\0\0\0\1']
            )
        elif kind == 3: del b[at:at + rng.choice([1, 2, 8, 100])]
        elif kind == 4: b[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice([1, 2, 8, 100])))
        elif kind == 5: b = b[:at]
        elif kind == 6: b[at:at] = b[at:at + rng.choice([4, 12, 64, 1000])]
        else:
            other = files[rng.choice(names)]
            n = rng.choice([4, 16, 200])
            start = rng.randrange(max(len(other) - n, 1))
            b[at:at + n] = other[start:start + n]
    return name, bytes(b)


def work(start, n, step, seed, max_pixels, state, totals, quiet, heic):
    "Decode files `start`, `start + step`, ... below `n`; `state` is [index, time it began]."
    torch.set_num_threads(1)
    if quiet: os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libjpeg and libpng report on stderr
    files = seeds(heic)
    names = list(files)
    if heic:
        vp = VisionPipeline(heic=True, max_pixels=max_pixels)
        eager, again_by = vp.decode, torch.jit.script(vp).decode
    else:
        one = torch.jit.script(decode_image)
        def eager(data): return decode_image(data, 'white', max_pixels)
        def again_by(data): return one(data, 'white', max_pixels)
    eager(as_bytes(files[names[0]]))
    totals[5] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for i in range(start, n, step):
        state[0], state[1] = i, time.time()
        data = as_bytes(mutate(files, names, seed, i)[1])
        info = probe(data, max_pixels, heic)
        out, error = None, ''
        try: out = eager(data)
        except (ValueError, RuntimeError) as e: error = str(e)
        if info.error:
            assert info.error in error, (i, info, error)
            totals[0] += 1
        elif out is None:
            assert error, i
            totals[1] += 1
        else:
            h, w = out.shape[1:]
            assert out.dtype == torch.uint8 and out.shape[0] == 3 and h * w <= max_pixels, (i, info, out.shape)
            # several pictures: each has its size
            assert heic or {h, w} == {info.height, info.width}, (i, info, out.shape)
            totals[2] += 1
        if i % 10 == 0:
            try: again = again_by(data)
            except Exception: again = None
            same = out is None or again is None or torch.equal(out, again)
            # libheif guesses what a broken HEVC stream leaves open, each time anew
            assert heic or ((again is None) == (out is None) and same), (i, 'scripted differs')
        totals[3] = max(totals[3], time.time() - state[1])
        totals[4] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    state[0] = -1


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--n', type=int, default=50_000, help='how many files')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--workers', type=int, default=1)
    p.add_argument('--limit', type=float, default=30, help='seconds for one file, more is a hang')
    p.add_argument('--max-pixels', type=int, default=4_000_000)
    p.add_argument('--heic', action='store_true', help='mutate HEIC files only; needs libheif')
    p.add_argument('--verbose', action='store_true', help="let the decoders' own messages through")
    a = p.parse_args()
    began, bad, names = time.time(), [], list(seeds(a.heic))
    context = mp.get_context('spawn')
    print(f'{a.n:,} files from {len(names)} seeds, seed {a.seed}')
    jobs = []
    for k in range(a.workers):
        jobs.append(dict(start=k, state=context.Array('d', [k, time.time() + 60]), totals=context.Array('d', 6)))
    def begin(j, start):
        j['state'][0], j['state'][1] = start, time.time() + 60  # the child needs time to import
        args = start, a.n, a.workers, a.seed, a.max_pixels, j['state'], j['totals'], not a.verbose, a.heic
        j['process'] = context.Process(target=work, args=args, daemon=True)
        j['process'].start()
    for j in jobs: begin(j, j['start'])
    running = list(jobs)
    while running:
        time.sleep(0.2)
        for j in list(running):
            i, alive = int(j['state'][0]), j['process'].is_alive()
            if not alive and i == -1: running.remove(j)
            elif not alive or time.time() - j['state'][1] > a.limit:
                what = 'hang' if alive else f'died with {j["process"].exitcode}'
                j['process'].kill()
                j['process'].join()
                name, _ = mutate(seeds(a.heic), names, a.seed, i)
                bad.append(i)
                print(f'file {i} (from {name}): {what}')
                if i + a.workers < a.n and len(bad) < 20: begin(j, i + a.workers)
                else: running.remove(j)
    refused, failed, decoded = (int(sum(j['totals'][k] for j in jobs)) for k in range(3))
    print(f'refused by the header {refused:,}, by the decoder {failed:,}, decoded {decoded:,}')
    print(
        f'slowest file {max(j["totals"][3] for j in jobs):.2f} s, peak memory of a process '
        f'{max(j["totals"][4] for j in jobs):.0f} MB ({max(j["totals"][5] for j in jobs):.0f} MB before the first '
        f'file), {time.time() - began:.0f} s in all'
    )
    print(f'{len(bad)} crashes, hangs or broken promises')
    return 1 if bad else 0


if __name__ == '__main__': sys.exit(main())
