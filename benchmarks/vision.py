"""Speed of the image pipeline beside its peers: the same files in, the same size of picture out.

    python -m benchmarks.vision                     # one thread, then two; a table for each
    python -m benchmarks.vision --threads 1 --sides 500 2000 --rounds 15
    python -m benchmarks.vision --peer dali=PYTHON --peer matxscript=PYTHON --peer opencv=PYTHON

Photos are re-encoded as JPEG (quality 90) with a longest side of 500, 1,000, 2,000 and 4,000 pixels; the source is
the data
folder's `figures` and `images` where `MMEMBED_DATA` has them (enlarged where they are smaller), otherwise generated
pictures. Every
contender gets the bytes of a file and gives float32 (3, 224, 224), normalised. Contenders take turns within a round,
files
in the same order, each after an untimed one, and a figure is the median over rounds of the ratio to Pillow +
torchvision in the same round, so that
a noisy machine harms all alike. Peers that want an environment of their own take part as processes that get the same
files
in turn (`benchmarks/peers/vision_peer.py` says how to make their environments); what is not there is listed as not run.
"""
import argparse
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import begun
from mmembed.core.packing import as_bytes
from mmembed.core.torchscript import quietly
from mmembed.core.images import stack_levels
from mmembed.vision.pipeline import VisionPipeline

MEAN, STD = VisionPipeline().spec()['mean'], VisionPipeline().spec()['std']


NAMES = {'dali': 'NVIDIA DALI (CPU), a batch', 'matxscript': 'MATXScript, a batch', 'opencv': 'OpenCV, area, a batch'}


def photos(side, n, seed=0):
    "`n` JPEG files with a longest side of `side`."
    root = Path(os.environ.get('MMEMBED_DATA') or Path(__file__).resolve().parents[2]/'shared'/'data')/'figures'
    rng = np.random.default_rng(seed)
    if (root/'pairs.jsonl').exists():
        rows = [json.loads(r) for r in (root/'pairs.jsonl').read_text().splitlines()]
        rows = [r for r in rows if r.get('kind', '').startswith('photo')] or rows
        images = [Image.open(root/rows[i]['image']).convert('RGB') for i in rng.permutation(len(rows))[:n]]
    else: images = [Image.effect_noise((300, 200), 60).convert('RGB') for _ in range(n)]
    out = []
    for image in images:
        scale = side / max(image.size)
        image = image.resize([max(round(v * scale), 1) for v in image.size], Image.BICUBIC)
        # an enlarged picture is smoother than a photo: grain makes the decoder work
        grain = rng.normal(0, 4, (image.height, image.width, 1))
        image = Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))
        f = io.BytesIO()
        image.save(f, 'JPEG', quality=90)
        out.append(f.getvalue())
    return out


def contenders():
    "name -> a function from the bytes of a file to float32 (3, 224, 224); and the reasons of those that do not run."
    from torchvision.transforms import v2
    from open_clip.transform import PreprocessCfg, image_transform_v2
    found, missing = {}, {}

    clip = image_transform_v2(PreprocessCfg(), is_train=False)
    found['Pillow + torchvision (open_clip)'] = lambda b: clip(Image.open(io.BytesIO(b)))

    vp = VisionPipeline()
    found['mmembed, eager'] = lambda b: vp([as_bytes(b)])[0]
    scripted = quietly(torch.jit.freeze, quietly(torch.jit.script, vp.eval()))
    found['mmembed, scripted and frozen'] = lambda b: scripted([as_bytes(b)])[0]
    exact = quietly(torch.jit.freeze, quietly(torch.jit.script, VisionPipeline(resize='pillow').eval()))
    found["mmembed, resize='pillow', scripted"] = lambda b: exact([as_bytes(b)])[0]

    import torchcodec  # noqa: F401 (registers the operator)
    after = v2.Compose([v2.Resize(224, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(224),
                        v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    found['torchcodec + torchvision v2'] = lambda b: after(torch.ops.torchcodec_ns.decode_jpeg(as_bytes(b), 3))
    try:
        from torchvision.io import decode_jpeg
        decode_jpeg(as_bytes(photos(64, 1)[0]))
        found['torchvision.io + torchvision v2'] = lambda b: after(decode_jpeg(as_bytes(b)))
    except Exception as e: missing['torchvision.io + torchvision v2'] = str(e).splitlines()[0]

    try:
        from transformers import CLIPImageProcessor
        fast = CLIPImageProcessor()
        found['transformers CLIPImageProcessor (fast)'] = lambda b: fast(
            Image.open(io.BytesIO(b)), return_tensors='pt'
        )['pixel_values'][0]
    except ImportError as e: missing['transformers CLIPImageProcessor (fast)'] = str(e)

    try:
        import cv2
        mean, std = np.array(MEAN, np.float32), np.array(STD, np.float32)
        def opencv(b):
            x = cv2.cvtColor(cv2.imdecode(np.frombuffer(b, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
            h, w = x.shape[:2]
            w, h = (224, int(224 * h / w)) if w <= h else (int(224 * w / h), 224)
            x = cv2.resize(x, (w, h), interpolation=cv2.INTER_AREA)  # OpenCV's only antialiased reduction
            top, left = (h - 224) // 2, (w - 224) // 2
            x = (x[top:top + 224, left:left + 224].astype(np.float32) / 255 - mean) / std
            return torch.from_numpy(np.ascontiguousarray(x.transpose(2, 0, 1)))
        found['OpenCV, area'] = opencv
    except ImportError as e: missing['OpenCV, area'] = str(e)

    return found, missing


class Peer:
    "A contender in another environment: it is told a folder, and answers with its CPU and wall seconds"
    def __init__(self, name, python, threads):
        self.name, program = name, Path(__file__).resolve().parent/'peers'/'vision_peer.py'
        self.process = subprocess.Popen(
            [python, program, name, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, folder):
        "CPU and wall seconds for the folder; raises `RuntimeError` with what the peer said last."
        try:
            print(folder, file=self.process.stdin, flush=True)
            return tuple(map(float, self.process.stdout.readline().split()[-2:]))
        except (BrokenPipeError, ValueError):
            raise RuntimeError((self.process.stderr.read().strip().splitlines() or ['no answer'])[-1]) from None

    def close(self):
        self.process.stdin.close()
        self.process.wait()


@torch.inference_mode()
def measure(found, files, rounds, peers=()):
    "Seconds a file of every contender in every round; peers that fail are left out, and said so."
    folder = tempfile.TemporaryDirectory(prefix='photos_')
    for i, b in enumerate(files): (Path(folder.name)/f'{i:04}.jpg').write_bytes(b)
    ready = []
    for peer in peers:
        try:
            peer(folder.name)
            ready.append(peer)
        except RuntimeError as e: print(f'not run: {peer.name}: {e}')
    peers = {NAMES[p.name]: p for p in ready}
    for f in found.values():
        for b in files[:3] * 2:
            y = f(b)
            assert y.shape == (3, 224, 224) and y.dtype == torch.float32
    names = [*found, *peers]
    seconds, one = {k: [] for k in names}, torch.get_num_threads() == 1
    for r in range(rounds):
        for k in names[r % len(names):] + names[:r % len(names)]:
            if k in peers:
                seconds[k].append(peers[k](folder.name)[0 if one else 1] / len(files))
                continue
            found[k](files[0])  # untimed: its code and tables come back into the caches that the one before had filled
            start = time.process_time() if one else time.perf_counter()
            for b in files: found[k](b)
            end = time.process_time() if one else time.perf_counter()
            seconds[k].append((end - start) / len(files))
    return seconds


def parts(files, rounds=9):
    "Where the CPU time of a file goes, milliseconds; the operator's own part of decoding is `decode_jpeg`."
    vp, op = VisionPipeline(), torch.ops.torchcodec_ns.decode_jpeg
    xs = [as_bytes(b) for b in files]
    rgb = [vp.decode(x) for x in xs]
    levels = [vp.transform(x) for x in rgb]
    stacked = [stack_levels([x]) for x in levels]
    jobs = {'probe': (vp.probe, xs), 'decode_jpeg': (lambda x: op(x, 3), xs), 'transform': (vp.transform, rgb),
            'stack': (lambda x: stack_levels([x]), levels), 'normalize': (vp.normalize, stacked)}
    out = {k: [] for k in jobs}
    for _ in range(rounds):
        for k, (f, inputs) in jobs.items():
            start = time.process_time()
            for x in inputs: f(x)
            out[k].append((time.process_time() - start) / len(files) * 1e3)
    return {k: statistics.median(v) for k, v in out.items()}


def scaled(files, rounds=5):
    """What decoding at an eighth to a half of the size would save, by Pillow's `draft`: milliseconds, and levels it
    is off."""
    vp, whole, draft, off = VisionPipeline(), [], [], []
    for _ in range(rounds):
        for b in files:
            t = time.process_time()
            full = Image.open(io.BytesIO(b)).convert('RGB')
            whole.append(time.process_time() - t)
            t = time.process_time()
            image = Image.open(io.BytesIO(b))
            image.draft('RGB', (448, 448))
            image = image.convert('RGB')
            draft.append(time.process_time() - t)
            if len(off) < len(files):
                off.append(float((vp([image])[0] - vp([full])[0]).mul(vp.std).mul(255).abs().max()))
    return statistics.median(whole) * 1e3, statistics.median(draft) * 1e3, max(off)


def batches(files, rounds):
    """A batch of 16 in the scripted module: one after the other, by `parallel`, by two Python threads.

    Wall milliseconds."""
    scripted, pool = quietly(torch.jit.script, VisionPipeline()), ThreadPoolExecutor(2)
    xs = [as_bytes(b) for b in files][:16]
    ways = {'one after the other': lambda: scripted.preprocess_all(xs, False),
            'parallel=True': lambda: scripted.preprocess_all(xs, True),
            'two Python threads': lambda: torch.stack(list(pool.map(scripted.preprocess, xs)))}
    seconds, want = {k: [] for k in ways}, scripted.preprocess_all(xs, False)
    for f in ways.values(): assert all(torch.equal(f(), want) for _ in range(3))
    for _ in range(rounds):
        for k, f in ways.items():
            start = time.perf_counter()
            f()
            seconds[k].append((time.perf_counter() - start) * 1e3)
    return {k: statistics.median(v) for k, v in seconds.items()}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--sides', type=int, nargs='+', default=[500, 1000, 2000, 4000])
    p.add_argument('--threads', type=int, nargs='+', default=[1, 2])
    p.add_argument('--files', type=int, default=32)
    p.add_argument('--rounds', type=int, default=9)
    p.add_argument(
        '--peer',
        action='append',
        default=[],
        metavar='NAME=PYTHON',
        help=f'one of {", ".join(NAMES)}, and its interpreter',
    )
    p.add_argument('--json', type=Path, help='write the figures here too')
    a = begun(p)
    for o in a.peer:
        if o.split('=')[0] not in NAMES or '=' not in o:
            p.error(f'--peer wants NAME=PYTHON with NAME one of {", ".join(NAMES)}, got {o!r}')
    found, missing = contenders()
    print(f'{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}')
    base, results = next(iter(found)), []
    for threads in a.threads:
        torch.set_num_threads(threads)
        if 'OpenCV, area' in found: __import__('cv2').setNumThreads(threads)
        peers = [Peer(*o.split('=', 1), threads) for o in a.peer]
        for side in a.sides:
            n = max(a.files * 500 // side, 4) if side > 500 else a.files
            files = photos(side, n)
            seconds = measure(found, files, a.rounds, peers)
            clock = 'CPU time' if threads == 1 else 'wall time'
            print(
                f'\n{side} px, {n} photos of {statistics.mean(map(len, files)) / 1e3:.0f} kB, {threads} '
                f'thread{"s" * (threads > 1)}, {clock}'
            )
            print(f'  {"":42}{"ms a photo":>11}{"times Pillow":>14}{"quartiles":>14}')
            for k, v in seconds.items():
                ratios = sorted(b / s for b, s in zip(seconds[base], v))
                low, high = ratios[len(ratios)//4], ratios[-1 - len(ratios)//4]
                print(f'  {k:42}{statistics.median(v)*1e3:11.2f}{statistics.median(ratios):14.2f}{low:8.2f}-{high:.2f}')
                results.append(
                    dict(
                        side=side,
                        threads=threads,
                        name=k,
                        ms=statistics.median(v) * 1e3,
                        ratio=statistics.median(ratios),
                    )
                )
            print('  of mmembed, eager, CPU time:', ', '.join(f'{k} {v:.2f} ms' for k, v in parts(files).items()))
            if threads == 1 and side >= 1000:
                whole, draft, off = scaled(files)
                print(
                    f'  Pillow decodes a photo in {whole:.2f} ms, by draft for 448 px in {draft:.2f} ms, then up to '
                    f'{off:.0f} levels off'
                )
        for peer in peers: peer.close()
    torch.set_num_threads(1)
    print(
        '\n16 photos of 500 px, scripted: '
        + ', '.join(f'{k} {v:.1f} ms' for k, v in batches(photos(500, 16), a.rounds).items())
    )
    for k in set(NAMES) - {o.split('=')[0] for o in a.peer}: print(f'not run: {NAMES[k]}: no --peer {k}=PYTHON')
    for k, v in missing.items(): print(f'not run: {k}: {v}')
    command = re.sub(r'/\S+', 'PATH', ' '.join(['python -m benchmarks.vision', *sys.argv[1:]]))
    if a.json: a.json.write_text(json.dumps(dict(kind='vision', command=command, records=results), indent=1) + '\n')


if __name__ == '__main__': sys.exit(main())
