"""The service under load over loopback, through real sockets, from another process.

    python -m benchmarks.serve artifacts/quickstart.pt             # throughput, latency and CPU at concurrency 1, 8 and 32
    python -m benchmarks.serve artifacts/quickstart.pt --plot serve.png   # p50 and p99 against offered load
    python -m benchmarks.serve artifacts/quickstart.pt --soak 3600        # memory over an hour of mixed load with broken items
    python -m benchmarks.serve --clip --litserve env/bin/python           # a ViT-B/32 (random weights), beside LitServe on the same file

CPU time is that of the server's whole process tree, per item; wall time on shared cores is noise. `raw` is the artifact's own
batched rate in the server's own conditions: files decoded one by one, towers in batches of 16, one process, nothing else."""
import argparse
import asyncio
import base64
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

CAPTIONS = ['a small red circle above a large blue square', 'two dogs on a beach', 'the letter A', 'a photograph of a city at night, seen from a hill']


def pictures(n=64):
    "JPEG files of photographs' size, made here: smooth colour with noise."
    from PIL import Image
    rng, out = np.random.default_rng(0), []
    for _ in range(n):
        h, w = rng.integers(300, 640, 2)
        small = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).resize((w, h), Image.BICUBIC)
        pixels = np.asarray(small).astype(np.int16) + rng.normal(0, 6, (h, w, 3)).astype(np.int16)
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, 'JPEG', quality=85)
        out.append(file.getvalue())
    return out


def requests(what, files, broken=False):
    "HTTP requests of one item each, as bytes."
    def request(entry):
        body = json.dumps(dict(input=[entry], encoding_format='base64')).encode()
        return b'POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n' % len(body) + body
    image = lambda f: request(dict(type='image', image=base64.b64encode(f).decode()))
    texts, images = [request(t) for t in CAPTIONS], [image(f) for f in files]
    if broken: images[::4] = [image(f[:len(f) // 2]) for f in files[::4]]
    return dict(text=texts, image=images, mix=[x for pair in zip(texts * len(images), images) for x in pair])[what]


class Connection:
    "One keep-alive connection."
    def __init__(self, port): self.port, self.pair = port, None
    async def ask(self, request):
        "Seconds until the answer, and its status."
        if not self.pair: self.pair = await asyncio.open_connection('127.0.0.1', self.port, limit=1 << 24)
        reader, writer = self.pair
        start = time.perf_counter()
        writer.write(request)
        head = await reader.readuntil(b'\r\n\r\n')
        await reader.readexactly(int(head.lower().split(b'content-length: ')[1].split(b'\r\n')[0]))
        return time.perf_counter() - start, int(head[9:12])


async def closed(port, requests, concurrency, seconds):
    "Clients that wait for each answer before they ask again: (latencies, statuses, elapsed)."
    end, out = time.perf_counter() + seconds, []
    async def client(k):
        c, rng = Connection(port), random.Random(k)
        while time.perf_counter() < end: out.append(await c.ask(rng.choice(requests)))
    start = time.perf_counter()
    await asyncio.gather(*[client(k) for k in range(concurrency)])
    return out, time.perf_counter() - start


async def offered(port, requests, rate, seconds):
    "Requests at random times, `rate` a second on average, whether or not earlier ones are answered."
    rng, free, tasks, out = random.Random(0), [], [], []
    async def one():
        c = free.pop() if free else Connection(port)
        out.append(await c.ask(rng.choice(requests)))
        free.append(c)
    at = start = time.perf_counter()
    while at < start + seconds:
        at += rng.expovariate(rate)
        await asyncio.sleep(max(0, at - time.perf_counter()))
        tasks.append(asyncio.ensure_future(one()))
    await asyncio.gather(*tasks)
    return out, time.perf_counter() - start


def cpu(pid):
    "CPU seconds of a process and its children so far."
    total = 0
    for p in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try: total += sum(p.cpu_times()[:2])
        except psutil.NoSuchProcess: pass
    return total


def raw(path, what, files, threads, batch=16, n=192):
    "(items a second, CPU seconds an item) of the artifact itself."
    import mmembed as mm
    emb = mm.Embedder(path, threads=threads, batch_size=batch)
    texts, images = [CAPTIONS[i % 4] for i in range(n)], [files[i % len(files)] for i in range(n)]
    def go():
        if what in ('text', 'mix'): emb.encode_text(texts if what == 'text' else texts[:n // 2])
        if what in ('image', 'mix'): emb.encode_image(images if what == 'image' else images[:n // 2])
    go()
    wall, used = time.perf_counter(), time.process_time()
    go()
    return n / (time.perf_counter() - wall), (time.process_time() - used) / n


LITSERVE = '''
import base64, os, sys, torch
import litserve as ls
from mmembed.runtime import Embedder
class Api(ls.LitAPI):
    def setup(self, device): self.emb = Embedder(sys.argv[1], threads=int(sys.argv[3]))
    def decode_request(self, request):
        entry = request["input"][0]
        return entry if isinstance(entry, str) else self.emb.preprocess(base64.b64decode(entry["image"]))
    def predict(self, batch):
        out = [None] * len(batch)
        texts, images = [i for i, x in enumerate(batch) if isinstance(x, str)], [i for i, x in enumerate(batch) if not isinstance(x, str)]
        if texts:
            for i, v in zip(texts, self.emb.encode_text([batch[i] for i in texts])): out[i] = v
        if images:
            for i, v in zip(images, self.emb.encode_pixels(torch.stack([batch[i] for i in images]))): out[i] = v
        return out
    def encode_response(self, output): return {"embedding": base64.b64encode(output.numpy().tobytes()).decode()}
if __name__ == "__main__":
    ls.LitServer(Api(max_batch_size=16, batch_timeout=.002, api_path="/v1/embeddings"), accelerator="cpu", workers_per_device=1).run(port=int(sys.argv[2]), generate_client_file=False, log_level="error")
'''


class litserve:
    "LitServe with dynamic batching on the same artifact."
    def __init__(self, python, path, threads):
        import socket
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            self.port = s.getsockname()[1]
        self.folder = tempfile.TemporaryDirectory()
        program = Path(self.folder.name)/'app.py'
        program.write_text(LITSERVE)
        self.process = subprocess.Popen([python, program, Path(path).resolve(), str(self.port), str(threads)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(600):
            try: return socket.create_connection(('127.0.0.1', self.port), 1).close() or time.sleep(5)
            except OSError: time.sleep(.2)
    def __enter__(self): return self
    def __exit__(self, *_):
        for p in [*psutil.Process(self.process.pid).children(recursive=True), self.process]: p.kill()


def clip():
    "An artifact of open_clip's ViT-B-32 with random weights."
    import torch
    import mmembed as mm
    torch.manual_seed(0)
    path = Path(tempfile.gettempdir())/'mmembed-vit-b-32.pt'
    if not path.is_file(): mm.export(mm.DualEncoder.from_open_clip('ViT-B-32', pretrained=None), path, cpp=False, fresh=False)
    return path


def row(name, what, concurrency, out, elapsed, used):
    good = [s for s, status in out if status == 200]
    p50, p99 = (np.percentile(good, [50, 99]) * 1e3) if good else (0, 0)
    print(f'{name:10} {what:6} {concurrency:>4} {len(good) / elapsed:9.1f} {used / max(len(good), 1) * 1e3:10.2f} {p50:9.1f} {p99:9.1f} {len(out) - len(good):6}', flush=True)
    return len(good) / elapsed


def main():
    from mmembed.serve.engine import Options
    from mmembed.serve.server import running
    from mmembed.serve.service import Config
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('artifact', nargs='?', default='artifacts/quickstart.pt')
    a.add_argument('--clip', action='store_true')
    a.add_argument('--threads', type=int, default=1)
    a.add_argument('--seconds', type=float, default=10.)
    a.add_argument('--what', default='text,image,mix')
    a.add_argument('--concurrency', default='1,8,32')
    a.add_argument('--litserve', help="the Python of an environment with litserve and this project's packages")
    a.add_argument('--plot')
    a.add_argument('--soak', type=float)
    args = a.parse_args()
    path, files = clip() if args.clip else args.artifact, pictures()
    config = Config(path, port=0, threads=args.threads, log=os.devnull, engine=Options(batch=16, timeout=120))

    if args.soak:
        with running(config) as s:
            port, pid, seen = int(s.url.rsplit(':', 1)[1]), s.process.pid, []
            todo = requests('mix', files, broken=True)
            for k in range(10):
                out, _ = asyncio.run(closed(port, todo, 8, args.soak / 10))
                seen.append(psutil.Process(pid).memory_info().rss / 2**20)
                states = {c: sum(x == c for _, x in out) for c in sorted({x for _, x in out})}
                print(f'{(k + 1) * args.soak / 10:7.0f} s  {seen[-1]:7.1f} MiB  {states}', flush=True)
        return

    print(f'{"server":10} {"items":6} {"conc":>4} {"items/s":>9} {"CPU ms":>10} {"p50 ms":>9} {"p99 ms":>9} {"failed":>6}')
    for what in args.what.split(','):
        rate, used = raw(path, what, files, args.threads)
        print(f'{"raw":10} {what:6} {"":>4} {rate:9.1f} {used * 1e3:10.2f}', flush=True)
        servers = [('mmembed', lambda: running(config))] + ([('litserve', lambda: litserve(args.litserve, path, args.threads))] if args.litserve else [])
        for name, start in servers:
            with start() as s:
                port = s.port if name != 'mmembed' else int(s.url.rsplit(':', 1)[1])
                todo = requests(what, files)
                asyncio.run(closed(port, todo, 8, 2))  # warm
                for n in map(int, args.concurrency.split(',')):
                    before = cpu(s.process.pid)
                    out, elapsed = asyncio.run(closed(port, todo, n, args.seconds))
                    best = row(name, what, n, out, elapsed, cpu(s.process.pid) - before)
                if args.plot and name == 'mmembed': draw(args.plot, what, port, todo, best, args.seconds)


def draw(path, what, port, todo, best, seconds):
    "p50 and p99 against offered load, up to a quarter more than the server can do."
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    shares, rows = (.2, .4, .6, .7, .8, .9, 1., 1.1, 1.25), []
    for share in shares:
        out, elapsed = asyncio.run(offered(port, todo, best * share, seconds))
        good = [s for s, c in out if c == 200]
        rows.append([len(out) / elapsed, *(np.percentile(good, [50, 99]) * 1e3), 100 * (1 - len(good) / len(out))])
        print(f'offered {best * share:8.1f}/s: answered {len(good) / elapsed:8.1f}/s  p50 {rows[-1][1]:8.1f} ms  p99 {rows[-1][2]:8.1f} ms  turned away {rows[-1][3]:.1f} %', flush=True)
    plt.figure(figsize=(6, 4))
    for k, label in ((1, 'p50'), (2, 'p99')): plt.plot([best * s for s in shares], [r[k] for r in rows], 'o-', label=label)
    plt.axvline(best, color='gray', linewidth=.8)
    plt.xlabel('offered requests a second'), plt.ylabel('milliseconds'), plt.yscale('log'), plt.legend(), plt.title(f'{what}, one item a request')
    plt.tight_layout()
    plt.savefig(Path(path).with_stem(f'{Path(path).stem}-{what}'), dpi=110)
    plt.close()


if __name__ == '__main__': main()
