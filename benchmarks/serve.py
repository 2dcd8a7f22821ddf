"""The service under load over loopback, through real sockets, from another process.

    python -m benchmarks.serve artifacts/quickstart.pt             # throughput, latency and CPU at concurrency 1, 8
    and 32
    python -m benchmarks.serve artifacts/quickstart.pt --load --record serve.json      # also latency against offered
    load
    python -m benchmarks.serve --record serve.json --plot serve.png                    # that as a picture
    python -m benchmarks.serve artifacts/quickstart.pt --soak 3600        # memory over an hour of mixed load with
    broken items
    python -m benchmarks.serve artifacts/quickstart.pt --reloads 200      # memory of so many reloads, beside that
    after the third
    python -m benchmarks.serve artifacts/quickstart.pt --soak 1200 --attacks --json soak.json   # hostile requests
    among them
    python -m benchmarks.serve artifacts/quickstart.pt --heavy            # short texts beside what is large, and the
    memory that this takes
    python -m benchmarks.serve artifacts/quickstart.pt --heavy --limit 2048   # the same, and the system gives the
    server 2 GB of data at most
    python -m benchmarks.serve --clip --peers
    litserve=env1/bin/python,ray=.venv/bin/python,clip=env2/bin/python,infinity=env3/bin/python

`--clip`: a ViT-B-32 with random weights; peers (their programs and what they need: benchmarks/peers/serve_*.py)
answer beside it on the
same weights. LitServe and Ray Serve hold the very same artifact, so what differs is the serving layer; the other two
are a stack of their own.
CPU time is that of the server's whole process tree, per item; wall time on shared cores is noise. `raw` is the
artifact's own
batched rate in the server's own conditions: files decoded one by one, towers in batches of 16, one process, nothing
else."""
import argparse
import asyncio
import base64
import contextlib
import gc
import io
import itertools
import json
import math
import os
import random
import resource
import signal
import socket
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import psutil

from benchmarks import begun

CAPTIONS = [
    'a small red circle above a large blue square', 'two dogs on a beach', 'the letter A',
    'a photograph of a city at night, seen from a hill',
]


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


def requests(what, files, broken=False, peer=''):
    "HTTP requests of one item each, as bytes, in the form that `peer` reads."
    def request(entry):
        path, body = '/v1/embeddings', dict(input=[entry], encoding_format='base64')
        if peer == 'clip':
            path, body = (
                '/post',
                dict(
                    data=[dict(text=entry) if isinstance(entry, str) else dict(blob=entry['image'])], execEndpoint='/'
                ),
            )
        if peer == 'infinity':
            kind = 'text' if isinstance(entry, str) else 'image'
            path, body = (
                '/embeddings',
                dict(
                    model='m',
                    modality=kind,
                    encoding_format='base64',
                    input=[entry if kind == 'text' else f'data:image/jpeg;base64,{entry["image"]}'],
                ),
            )
        body = json.dumps(body).encode()
        return (
            b'POST %s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n'
            % (path.encode(), len(body))
            + body
        )
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
        head = head.lower()
        if b'content-length: ' in head:
            await reader.readexactly(int(head.split(b'content-length: ')[1].split(b'\r\n')[0]))
        else:  # in chunks
            while size := int(await reader.readline(), 16): await reader.readexactly(size + 2)
            await reader.readline()
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


def raw(path, what, threads, seconds, batch=16):
    "(items a second, CPU seconds an item) of the artifact itself; in a process of its own."
    import mmembed as mm
    emb, files = mm.Embedder(path, threads=threads, batch_size=batch), pictures()
    def go(n):
        wall, used, half = time.perf_counter(), time.process_time(), n if what != 'mix' else n // 2
        if what in ('text', 'mix'): emb.encode_text([CAPTIONS[i % 4] for i in range(half)])
        if what in ('image', 'mix'): emb.encode_image([files[i % 64] for i in range(half)])
        return n / (time.perf_counter() - wall), (time.process_time() - used) / n
    go(2 * batch)
    return go(max(64, int(go(2 * batch)[0] * seconds) // 64 * 64))


def alone(f, *args):
    "`f(*args)` in a new process."
    with ProcessPoolExecutor(1, get_context('spawn')) as pool: return pool.submit(f, *args).result()


def pinned(cores):
    "This process and those that it starts from now on stay on `cores`."
    if cores: os.sched_setaffinity(0, cores)


def batches(port):
    "Batches that mmembed's towers have run, and the items in them."
    text = urlopen(f'http://127.0.0.1:{port}/metrics').read().decode()
    return [
        sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f'mmembed_batch_items_{x}{{'))
        for x in ('count', 'sum')
    ]


class Peer:
    "Another server, in an environment of its own, on the same weights."
    def __init__(self, name, python, weights, threads, first):
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            self.port = s.getsockname()[1]
        program = Path(__file__).parent/'peers'/f'serve_{name}.py'
        env = os.environ | dict(
            OMP_NUM_THREADS=str(threads),
            PYTHONPATH=str(Path(__file__).resolve().parents[1]) if name in ('litserve', 'ray') else '',
        )
        self.process = subprocess.Popen(
            [python, '-W', 'ignore', program, Path(weights).resolve(), str(self.port), str(threads)],
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=None if os.environ.get('PEER_ERRORS') else subprocess.DEVNULL,
        )
        end = time.time() + 240
        while time.time() < end and self.process.poll() is None:
            try:
                if asyncio.run(Connection(self.port).ask(first))[1] == 200: return
            except (OSError, asyncio.IncompleteReadError): pass
            time.sleep(.5)
        self.__exit__()
        raise RuntimeError(f'{name} does not answer')
    def __enter__(self): return self
    def __exit__(self, *_):
        for p in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
            try: p.kill()
            except psutil.NoSuchProcess: pass
        self.process.wait()


def clip():
    "An artifact of open_clip's ViT-B-32 with random weights, and the weights themselves beside it."
    import open_clip
    import torch
    import mmembed as mm
    path = Path(tempfile.gettempdir())/'mmembed-vit-b-32.pt'
    weights = path.with_suffix('.weights')
    if not path.is_file() or not weights.is_file():
        torch.manual_seed(0)
        torch.save(open_clip.create_model('ViT-B-32').state_dict(), weights)
        mm.export(mm.DualEncoder.from_open_clip('ViT-B-32', pretrained=str(weights)), path, cpp=False, fresh=False)
    return path


def hugging_face(weights):
    """The folder that transformers and infinity load: the same ViT-B-32 under their names, with CLIP's tokenizer and
    image settings."""
    import open_clip
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer
    folder = Path(weights).with_suffix('.hf')
    if (folder/'config.json').is_file(): return folder
    given = torch.load(weights)
    model = CLIPModel(
        CLIPConfig(
            text_config=dict(hidden_act='gelu', eos_token_id=49407, bos_token_id=49406),
            vision_config=dict(hidden_act='gelu', patch_size=32),
        )
    ).eval()
    out = {
        'logit_scale': given['logit_scale'],
        'text_projection.weight': given['text_projection'].T,
        'visual_projection.weight': given['visual.proj'].T,
        'text_model.embeddings.token_embedding.weight': given['token_embedding.weight'],
        'text_model.embeddings.position_embedding.weight': given['positional_embedding'],
        'text_model.final_layer_norm.weight': given['ln_final.weight'],
        'text_model.final_layer_norm.bias': given['ln_final.bias'],
        'vision_model.embeddings.class_embedding': given['visual.class_embedding'],
        'vision_model.embeddings.patch_embedding.weight': given['visual.conv1.weight'],
        'vision_model.embeddings.position_embedding.weight': given['visual.positional_embedding'],
    }
    for theirs, ours in (('pre_layrnorm', 'ln_pre'), ('post_layernorm', 'ln_post')):
        for x in ('weight', 'bias'): out[f'vision_model.{theirs}.{x}'] = given[f'visual.{ours}.{x}']
    for tower, stem in (('text_model', 'transformer'), ('vision_model', 'visual.transformer')):
        for k in range(12):
            to, of = f'{tower}.encoder.layers.{k}', f'{stem}.resblocks.{k}'
            for x in ('weight', 'bias'):
                for name, part in zip('qkv', given[f'{of}.attn.in_proj_{x}'].chunk(3)):
                    out[f'{to}.self_attn.{name}_proj.{x}'] = part
                for theirs, ours in (
                    ('self_attn.out_proj', 'attn.out_proj'),
                    ('layer_norm1', 'ln_1'),
                    ('layer_norm2', 'ln_2'),
                    ('mlp.fc1', 'mlp.c_fc'),
                    ('mlp.fc2', 'mlp.c_proj'),
                ):
                    out[f'{to}.{theirs}.{x}'] = given[f'{of}.{ours}.{x}']
    left = model.load_state_dict({k: v.clone().contiguous() for k, v in out.items()}, strict=False)
    assert not left.unexpected_keys and all('position_ids' in k for k in left.missing_keys), left
    t = open_clip.tokenizer.SimpleTokenizer()
    (folder/'raw').mkdir(parents=True)
    names = {'<start_of_text>': '<|startoftext|>', '<end_of_text>': '<|endoftext|>'}
    (folder/'raw'/'vocab.json').write_text(json.dumps({names.get(k, k): v for k, v in t.encoder.items()}))
    merges = sorted(t.bpe_ranks, key=t.bpe_ranks.get)
    (folder/'raw'/'merges.txt').write_text('#version: 0.2\n' + '\n'.join(' '.join(m) for m in merges))
    CLIPTokenizer(
        str(folder / 'raw' / 'vocab.json'), str(folder / 'raw' / 'merges.txt'), model_max_length=77
    ).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def row(record, name, what, concurrency, out, elapsed, used, ran=None):
    good = [s for s, status in out if status == 200]
    p50, p99 = (np.percentile(good, [50, 99]) * 1e3) if good else (0, 0)
    record.append(
        dict(
            server=name, items=what, concurrency=concurrency, rate=len(good) / elapsed,
            cpu_ms=used / max(len(good), 1) * 1e3, p50_ms=p50, p99_ms=p99, failed=len(out) - len(good),
        )
    )
    size = f'{ran[1] / max(ran[0], 1):6.1f}' if ran is not None else ''
    print(
        f'{name:10} {what:6} {concurrency:>4} {len(good) / elapsed:9.1f} {used / max(len(good), 1) * 1e3:10.2f} '
        f'{p50:9.1f} {p99:9.1f} {len(out) - len(good):6} {size}',
        flush=True,
    )
    return len(good) / elapsed


def soak(config, files, seconds, attacks=False):
    """Memory over `seconds` of mixed load with broken items, in ten parts.

    With `attacks` those of benchmarks/attacks.py are mixed in."""
    from mmembed.serve.server import running
    todo = requests('mix', files, broken=True)
    if attacks:
        from mmembed.runtime.embedder import Embedder
        from . import attacks as hostile
        host = hostile.dripping()
        config = config._replace(grpc_port=0, api_keys=('soak',), index=str(hostile.index(config.artifact)),
                                 fetch_hosts=(f'127.0.0.1:{host.server_port}',))
        todo = [t.replace(b'host: x\r\n', b'host: x\r\nx-api-key: soak\r\n', 1) for t in todo]
        want = Embedder(config.artifact).encode_text(CAPTIONS[:1])[0].numpy()
    with running(config) as s:
        port, pid, memory, total = int(s.url.rsplit(':', 1)[1]), s.process.pid, [], {}
        attack = hostile.Attacks(s, host, want, CAPTIONS[0]) if attacks else None
        asyncio.run(closed(port, todo, 8, min(20, seconds / 5)))
        for k in range(10):
            out, _ = asyncio.run(closed(port, todo, 8, seconds / 10))
            states = {c: sum(x == c for _, x in out) for c in sorted({x for _, x in out})}
            for c, n in states.items(): total[c] = total.get(c, 0) + n
            memory.append(psutil.Process(pid).memory_info().rss / 2**20)
            print(f'{(k + 1) * seconds / 10:7.0f} s  {memory[-1]:7.1f} MiB  {states}', flush=True)
        if attack: attack.stop()
        alive = s.process.poll() is None and sum(x['event'] == 'serving' for x in s.said) == 1
    found = dict(
        seconds=seconds,
        same_process=alive,
        memory_mib=memory,
        flat=max(memory[5:]) <= 1.2 * max(memory[1:5]),
        load=total,
    )
    if attack: found |= dict(attacks=dict(attack.counts), wrong=attack.wrong)
    found['sound'] = found['flat'] and alive and set(total) <= {200, 422, 429, 503, 504} and not found.get('wrong')
    print(json.dumps(found, indent=1))
    return found


def reloads(config, count):
    "Memory and threads over `count` reloads of the same artifact, each after a request."
    from mmembed.serve.server import running
    with running(config) as s:
        port, process, rss = int(s.url.rsplit(':', 1)[1]), psutil.Process(s.process.pid), []
        for k in range(1, count + 1):
            asyncio.run(Connection(port).ask(requests('text', [])[0]))
            process.send_signal(signal.SIGHUP)
            done = f'mmembed_reloads_total{{status="ok"}} {k}.0'
            while done not in urlopen(f'{s.url}/metrics').read().decode(): time.sleep(.01)
            rss.append(process.memory_info().rss / 2**20)
            if k <= 3 or k % max(count // 10, 1) == 0:
                print(f'{k:5} reloads  {rss[-1]:7.1f} MiB  {process.num_threads()} threads', flush=True)
        print(f'largest after the third: {max(rss[3:], default=rss[-1]) / rss[min(2, count - 1)]:.3f} of it')


def heavy():
    "What may arrive beside short texts: name -> (requests, how many are sent at once, again and again)."
    from PIL import Image

    def post(data, kind='application/json'):
        return (
            b'POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n'
            % (kind.encode(), len(data))
            + data
        )
    def flat(side):
        out = io.BytesIO()
        Image.new('P', (side, side)).save(out, 'GIF')
        return out.getvalue()
    chinese = '一个红色的小圆在蓝色方块左边'
    sixty = json.dumps(dict(input=[chinese * 23_000] * 60), ensure_ascii=False).encode()  # 60 texts of 966 kB
    mega = {
        '1 MB of words': 'a red circle ' * 75_000,
        '1 MB of Chinese': chinese * 23_000,
        '1 MB of blanks, then words': ' ' * 900_000 + 'a red circle ' * 5_000,
        '1 MB of one word': 'q' * 1_000_000,
    }
    many = post(json.dumps(dict(input=['a small red circle'] * 256)).encode())
    return {name: ([post(t.encode(), 'text/plain')], 1) for name, t in mega.items()} | {
        '24 clients of 256 texts': ([many], 24),
        '3 x 60 MB of Chinese': ([post(sixty)], 3),
        '3 x 60 MB of one word': ([post(json.dumps(dict(input=['q' * 1_000_000] * 60)).encode())], 3),
        '40 uploads of 60 MB': ([post(bytes(60 << 20), 'image/png')], 40),
        '16 GIFs of 33 megapixels': ([post(flat(5792), 'image/gif')], 16),
        '16 GIFs of 50 megapixels': ([post(flat(7072), 'image/gif')], 16),
    }


@contextlib.contextmanager
def limited(mebibytes):
    "Processes that are started in the block may have so much data; None: any amount."
    before = resource.getrlimit(resource.RLIMIT_DATA)
    if mebibytes: resource.setrlimit(resource.RLIMIT_DATA, (mebibytes << 20, before[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_DATA, before)


def beside(config, seconds, limit=None):
    """Short texts alone and beside each of `heavy`: their latency, that of the probes, what the large ones were
    answered, the largest resident memory."""
    from mmembed.serve.server import running
    context, short = get_context('spawn'), requests('text', [])
    with contextlib.ExitStack() as stack:
        with limited(limit): s = stack.enter_context(running(config))
        port, process = int(s.url.rsplit(':', 1)[1]), psutil.Process(s.process.pid)
        print(
            f'{"beside":28} {"p50 ms":>8} {"p99 ms":>8} {"max ms":>8} {"failed":>6} {"probe p99":>9} {"max ms":>8} '
            f'{"MiB":>6}  answers'
        )
        asyncio.run(closed(port, short, 2, 3))
        for name, (large, n) in ({'nothing': ([], 0)} | heavy()).items():
            with ProcessPoolExecutor(1, context) as pool:
                done = pool.submit(_send, port, large, n, seconds) if large else None
                peak, probes = [], []
                async def probed():  # as an orchestrator does, on a connection of its own
                    for k in itertools.count():
                        c, began = Connection(port), time.perf_counter()
                        _, status = await c.ask(b'GET %s HTTP/1.1\r\nhost: x\r\n\r\n' % (b'/livez', b'/readyz')[k % 2])
                        c.pair[1].close()
                        probes.append(time.perf_counter() - began if status == 200 else math.inf)
                        await asyncio.sleep(.05)
                async def watched():
                    task, probe = (
                        asyncio.ensure_future(closed(port, short, 2, seconds)),
                        asyncio.ensure_future(probed()),
                    )
                    while not task.done():
                        peak.append(process.memory_info().rss)
                        await asyncio.sleep(.01)
                    probe.cancel()
                    return await task
                out, _ = asyncio.run(watched())
                answers = done.result() if done else {}
            times, probes = np.array([t for t, _ in out]) * 1e3, np.array(probes) * 1e3
            print(
                f'{name:28} {np.percentile(times, 50):8.1f} {np.percentile(times, 99):8.1f} {times.max():8.1f} '
                f'{sum(c != 200 for _, c in out):6} {np.percentile(probes, 99):9.1f} {probes.max():8.1f} '
                f'{max(peak) / 2**20:6.0f}  {answers}',
                flush=True,
            )
        print('the same process lives' if s.process.poll() is None else f'THE SERVER DIED: {s.process.poll()}')


def _send(port, large, n, seconds): # in a process of its own
    answers, end = {}, time.perf_counter() + seconds
    async def client():
        while time.perf_counter() < end:
            c = Connection(port)  # a new one each time: what is turned away is closed
            try: _, status = await c.ask(large[0])
            except (OSError, asyncio.IncompleteReadError) as e: status = type(e).__name__
            if c.pair: c.pair[1].close()
            answers[status] = answers.get(status, 0) + 1
    async def clients(): await asyncio.gather(*[client() for _ in range(n)])
    asyncio.run(clients())
    return answers


def main():
    from mmembed.serve.engine import Options
    from mmembed.serve.server import running
    from mmembed.serve.service import Config
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('artifact', nargs='?', default='artifacts/quickstart.pt')
    a.add_argument('--clip', action='store_true')
    a.add_argument('--threads', type=int, default=1)
    a.add_argument(
        '--pin',
        action='store_true',
        help='the server, or the artifact alone, on all cores but the last, which the load generator has to itself',
    )
    a.add_argument('--only-peers', action='store_true', help='leave out mmembed and the artifact alone')
    a.add_argument('--seconds', type=float, default=10.)
    a.add_argument('--what', default='text,image,mix')
    a.add_argument('--concurrency', default='1,8,32')
    a.add_argument(
        '--peers',
        default='',
        help='name=python of its environment, separated by commas; names: litserve, ray, clip, infinity',
    )
    a.add_argument('--record', help='a JSON file to add the rows to')
    a.add_argument('--load', action='store_true', help='also latency against offered load')
    a.add_argument(
        '--plot',
        help='draw the recorded load (of the first kind of items in the file) as this picture, and nothing else',
    )
    a.add_argument('--soak', type=float)
    a.add_argument('--reloads', type=int, help='measure the memory of so many reloads, and nothing else')
    a.add_argument(
        '--attacks', action='store_true', help='mix hostile requests into the soak, and say what was answered'
    )
    a.add_argument('--json', help='a file for the result of the soak')
    a.add_argument(
        '--heavy',
        action='store_true',
        help='only short texts beside large ones, large bodies and large images, with the budgets of a machine of 2 GB',
    )
    a.add_argument(
        '--limit',
        type=int,
        help="with --heavy: MiB of data that the system lets the server have (RLIMIT_DATA, as of `prlimit --data`); "
             "its budgets go by that",
    )
    args = begun(a)
    gc.freeze(), gc.disable()  # a pause of the load generator would look like one of the server
    if args.plot: return draw(json.loads(Path(args.record).read_text()), Path(args.plot))
    path, files = clip() if args.clip else args.artifact, pictures()
    config = Config(path, port=0, threads=args.threads, log=os.devnull, engine=Options(batch=16, timeout=120))
    if args.reloads: return reloads(config, args.reloads)
    if args.soak:
        found = soak(config, files, args.soak, args.attacks)
        if args.json: Path(args.json).write_text(json.dumps(found, indent=1))
        raise SystemExit(not found['sound'])
    if args.heavy:
        short = config._replace(engine=config.engine._replace(timeout=30))
        if not args.limit: short = short._replace(bodies=128 << 20, engine=short.engine._replace(pixels=64 << 20))
        return beside(short, args.seconds, args.limit)

    cores = sorted(os.sched_getaffinity(0))
    ours, theirs = (cores[:-1], cores[-1:]) if args.pin else ([], [])
    peers, record = dict(p.split('=') for p in args.peers.split(',') if p), []
    names = [*(['mmembed'] if not args.only_peers else []), *peers]
    print(
        f'{"server":10} {"items":6} {"conc":>4} {"items/s":>9} {"CPU ms":>10} {"p50 ms":>9} {"p99 ms":>9} '
        f'{"failed":>6} {"batch":>6}'
    )
    kinds = args.what.split(',')
    pinned(ours)
    for what in kinds if not args.only_peers else ():
        rate, used = alone(raw, path, what, args.threads, args.seconds)
        record.append(dict(server='raw', items=what, rate=rate, cpu_ms=used * 1e3))
        print(f'{"raw":10} {what:6} {"":>4} {rate:9.1f} {used * 1e3:10.2f}', flush=True)
    for name in names:
        weights = dict(
            clip=lambda: Path(path).with_suffix('.weights'),
            infinity=lambda: hugging_face(Path(path).with_suffix('.weights')),
        ).get(name, lambda: path)
        pinned(ours)
        with (
            running(config)
            if name == 'mmembed'
            else Peer(name, peers[name], weights(), args.threads, requests('text', files, peer=name)[0]) as s
        ):
            pinned(theirs)
            port = s.port if name in peers else int(s.url.rsplit(':', 1)[1])
            for what in kinds:
                todo = requests(what, files, peer=name)
                asyncio.run(closed(port, todo, 8, min(2, args.seconds)))  # warm
                for n in map(int, args.concurrency.split(',')):
                    before, ran = cpu(s.process.pid), batches(port) if name == 'mmembed' else None
                    out, elapsed = asyncio.run(closed(port, todo, n, args.seconds))
                    used = cpu(s.process.pid) - before
                    best = row(record, name, what, n, out, elapsed, used, ran and np.subtract(batches(port), ran))
                if args.load and name == 'mmembed':
                    for share in (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25):
                        record.append(loaded(what, port, todo, best, share, args.seconds))
    if args.record:
        file = Path(args.record)
        done = json.loads(file.read_text()) if file.is_file() else []
        file.write_text(
            json.dumps(
                done
                + [
                    dict(r, model='vit-b-32' if args.clip else Path(args.artifact).stem, threads=args.threads)
                    for r in record
                ],
                indent=1,
            )
        )


def loaded(what, port, todo, best, share, seconds):
    "Latency when `share` of what the server can do is offered."
    out, elapsed = asyncio.run(offered(port, todo, best * share, seconds))
    good = [s for s, c in out if c == 200]
    p50, p99 = np.percentile(good, [50, 99]) * 1e3
    r = dict(
        server='mmembed', items=what, offered=best * share, answered=len(good) / elapsed, p50_ms=p50,
        p99_ms=p99, failed=len(out) - len(good),
    )
    print(
        f'offered {r["offered"]:8.1f}/s: answered {r["answered"]:8.1f}/s  p50 {p50:8.1f} ms  p99 {p99:8.1f} ms  turned '
        f'away {100 * r["failed"] / len(out):.1f} %',
        flush=True,
    )
    return r


def draw(record, path):
    "p50 and p99 against offered load."
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    what = next(r['items'] for r in record if 'offered' in r)
    rows = sorted((r for r in record if r['items'] == what and 'offered' in r), key=lambda r: r['offered'])
    best = max(r['rate'] for r in record if r['items'] == what and r['server'] == 'mmembed' and 'rate' in r)
    plt.figure(figsize=(6, 4))
    for k in ('p50', 'p99'): plt.plot([r['offered'] for r in rows], [r[f'{k}_ms'] for r in rows], 'o-', label=k)
    plt.axvline(best, color='gray', linewidth=.8)
    (
        plt.xlabel('offered requests a second'),
        plt.ylabel('milliseconds'),
        plt.yscale('log'),
        plt.legend(),
        plt.title(f'{what}, one item a request'),
    )
    plt.tight_layout()
    plt.savefig(path, dpi=90)


if __name__ == '__main__': main()
