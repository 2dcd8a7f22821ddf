"""Who should prepare the batches: this process, worker processes, or threads?

    python -m benchmarks.loader                       # figures (or generated pictures) through a CLIP-sized pipeline
    python -m benchmarks.loader --workers 0 1 2 4 --size 224 --batch-size 64 --rounds 5

Each contender runs whole passes over the same rows with the same draws; contenders take turns within a round, and a
figure is the
median over rounds of the ratio to "no workers" in the same round. Two settings: the loader alone, and beside a training
step (a matrix product on one core for as long as a batch takes to prepare without workers, so that loading can hide
behind it entirely at best). Columns: items a second from the first batch on, as a multiple of no workers; and the time
to the first batch in seconds, start of the workers included.
`--check` compares every batch of every contender bit by bit first.
"""
import argparse
import multiprocessing
import os
import statistics
import time
from pathlib import Path

import torch

from benchmarks import begun
from mmembed.train.loader import _stop
from mmembed.train.datamodule import PairData
from mmembed.data.scenes import Scenes
from mmembed.data.tables import PairsFile
from mmembed.text.pipeline import TextPipeline
from mmembed.vision.pipeline import VisionPipeline


def source():
    "The data folder's figures where there are some, generated scenes otherwise."
    path = (
        Path(os.environ.get('MMEMBED_DATA') or Path(__file__).resolve().parents[2] / 'shared' / 'data')
        / 'figures'
        / 'pairs.jsonl'
    )
    return (
        (PairsFile(path, text_key='alt', group_key='section'), 'figures')
        if path.exists()
        else (Scenes(train=2000, valid=10), 'scenes')
    )


class Step:
    "Stands for a training step: matrix products for about so many seconds of one core"
    def __init__(self, seconds):
        self.x, self.n = torch.randn(256, 256), 1
        start, n = time.perf_counter(), 0
        while time.perf_counter() - start < 0.3:
            self.x @ self.x
            n += 1
        self.n = max(1, round(seconds * n / 0.3))

    def __call__(self):
        for _ in range(self.n): self.x @ self.x


def one_pass(data, batches, epoch, step=None):
    "Items a second from the first batch on, CPU seconds an item, seconds to the first batch, of a fresh loader."
    start = time.perf_counter()
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    items, first, passing = 0, None, iter(loader)
    for _ in range(batches):
        batch = next(passing)
        if first is None: first, begin = time.perf_counter() - start, time.perf_counter()
        else: items += len(batch.index)
        if step: step()
    seconds = time.perf_counter() - begin
    passing.close()
    if loader._iterator is not None: _stop(loader._iterator)
    loader._iterator = None
    return items / seconds, first


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workers', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument(
        '--methods',
        nargs='+',
        default=[m for m in ('fork',) if m in multiprocessing.get_all_start_methods()],
        help='of processes; spawn takes long to start',
    )
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--batch-size', type=int, default=32)
    parser.add_argument('--batches', type=int, default=12)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--check', action='store_true')
    args = begun(parser)
    torch.set_num_threads(1)
    rows, what = source()
    texts = [rows.text(i) for i in range(0, len(rows), 4)]
    common = dict(
        source=rows,
        batch_size=args.batch_size,
        text_pipeline=TextPipeline.learn(texts, vocab_size=4000, max_length=64),
        vision_pipeline=VisionPipeline(size=args.size),
        seed=0,
    )
    contenders = {'no workers': {}}
    for n in args.workers:
        if n: contenders |= {f'{n} threads': dict(workers=n, worker_type='threads')}
        if n: contenders |= {f'{n} processes, {m}': dict(workers=n, start_method=m) for m in args.methods}
    data = {name: PairData(**common, **kw) for name, kw in contenders.items()}
    if args.check:
        loaders = {name: iter(d.train_dataloader()) for name, d in data.items()}
        for _ in range(args.batches):
            got = [next(i) for i in loaders.values()]
            for b in got[1:]:
                assert all(
                    x.equal(y)
                    for x, y in zip([*b.tokens, b.pixels, b.index], [*got[0].tokens, got[0].pixels, got[0].index])
                )
        print(f'{args.batches} batches: all contenders equal bit for bit')
        for i in loaders.values(): i.close()
        del loaders
    rate, _ = one_pass(data['no workers'], args.batches, 0)
    step = Step(args.batch_size / rate)
    print(
        f'{what}, {args.size} px, batches of {args.batch_size}, {os.cpu_count()} cores; no workers: {rate:.0f} items a '
        f'second'
    )
    for title, busy in [('loader alone', None), ('beside a step that takes as long as a batch', step)]:
        seen = {name: [] for name in contenders}
        for r in range(args.rounds):
            for name in sorted(contenders, key=lambda n: hash((n, r))):
                seen[name].append(one_pass(data[name], args.batches, r, busy))
        base = seen['no workers']
        print(f'\n| {title} | items a second | first batch, s |\n|---|---|---|')
        for name, figures in seen.items():
            ratio = statistics.median(f[0] / b[0] for f, b in zip(figures, base))
            print(f'| {name} | {ratio:.2f} | {statistics.median(f[1] for f in figures):.2f} |')


if __name__ == '__main__': main()
