"""How much of the towers' own speed does a batch job reach?

    python benchmarks/embed.py                                # an artifact with random weights, figures or generated pictures
    python benchmarks/embed.py --model model.pt --device cuda --threads 8 --rows 20000

Three rates on the same rows: the image tower alone, on pixels that lie ready; decoding alone, by as many threads as the job has; and the
whole job, from files to finished Parquet. With cores of its own for decoding a job cannot be faster than the slower
of the two; on cores that both share it cannot be faster than 1 / (1/tower + 1/decoding) of all cores. Both bounds are
printed, and the job's share of each; contenders take turns and the median of the rounds counts.
"""
import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from mmembed.data.loader import thread_pool
from mmembed.data.scenes import Scenes
from mmembed.data.sources import Part, PairsFile
from mmembed.jobs import embed
from mmembed.runtime import Embedder


def artifact(folder, size):
    "An artifact with a small text tower and a ResNet-like image tower of random weights."
    from mmembed.export.verify import export
    from mmembed.models.dual import DualEncoder
    from mmembed.models.towers import ConvNet, TextTransformer
    from mmembed.text.pipeline import TextPipeline
    from mmembed.vision.pipeline import VisionPipeline
    tp = TextPipeline.learn(['a red circle', 'a blue square'], vocab_size=100, max_length=16)
    torch.manual_seed(0)
    model = DualEncoder(TextTransformer(tp, width=64, depth=1), ConvNet(VisionPipeline(size=size), channels=(64, 128, 256, 512)), dim=512)
    export(model.eval(), folder/'model.pt', fresh=False, cpp=False)
    return folder/'model.pt'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--rows', type=int, default=1000)
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--cores', type=int, default=1, help="of one operation of the tower")
    parser.add_argument('--rounds', type=int, default=3)
    args = parser.parse_args()
    path = Path(os.environ.get('MMEMBED_DATA') or Path(__file__).resolve().parents[2]/'shared'/'data')/'figures'/'pairs.jsonl'
    source = PairsFile(path, text_key='alt') if path.exists() else Scenes(train=args.rows, valid=0)
    source = Part(source, [i % len(source) for i in range(args.rows)])
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        emb = Embedder(args.model or artifact(tmp, args.size), args.device, args.cores, args.batch_size, deterministic=True)
        def wait(): args.device.startswith('cuda') and torch.cuda.synchronize()

        def towers():
            for _ in range(0, args.rows, args.batch_size): emb.encode_pixels(levels).cpu()
            wait()

        def decoding():
            with thread_pool(args.threads) as pool: list(pool.map(lambda i: emb.preprocess(source.image(i)), range(args.rows)))

        def job(): embed(emb, source, tmp/f'out{time.monotonic_ns()}', threads=args.threads)

        levels = torch.stack([emb.preprocess(source.image(i)) for i in range(args.batch_size)]).to(args.device)
        towers()
        rates = {f.__name__: [] for f in (towers, decoding, job)}
        for _ in range(args.rounds):
            for f in (towers, decoding, job):
                start = time.perf_counter()
                f()
                rates[f.__name__].append(args.rows / (time.perf_counter() - start))
    t, d, j = (statistics.median(r) for r in rates.values())
    print(f'{args.rows} rows, batches of {args.batch_size}, {args.threads} threads, {os.cpu_count()} cores, {args.device}\n')
    print('| towers alone | decoding alone | job | of the slower | of both on shared cores |\n|---|---|---|---|---|')
    print(f'| {t:.0f} a second | {d:.0f} a second | {j:.0f} a second | {j/min(t, d):.0%} | {j*(1/t + 1/d):.0%} |')


if __name__ == '__main__': main()
