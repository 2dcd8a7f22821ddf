"""How much of the towers' own speed does a batch job reach, what do others need, and what would a hundred million pictures take?

    python -m benchmarks.embed share                       # CPU time of the thread of the towers: alone, and within a job
    python -m benchmarks.embed workers --workers 1 2 4     # rows a second by number of Ray workers, as a table and a plot
    python -m benchmarks.embed peers                       # CPU-seconds a picture: ours and three ways that others publish
    python -m benchmarks.embed estimate --tower-ms 7.66 --decode-ms 1.56 --dim 512    # machines, hours, bytes

`share`: decoding has cores of its own on a machine for such work, so what bounds a job is the thread that runs the towers. Its CPU time a picture alone,
divided by its CPU time a picture within a job, is the share of the raw throughput that is reached while decoding keeps up; whether it does is the second figure
(decoding's CPU time against the towers'). Neither depends on what else the machine does. `peers` runs every contender as a process of its own, over N and over 2 N
rows, and takes the difference of the CPU-seconds of its whole process tree, so that imports and loading drop out.
"""
import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from mmembed.data.scenes import Scenes
from mmembed.data.sources import Part, PairsFile
from mmembed.jobs import embed
from mmembed.runtime import Embedder

PEERS = ('mmembed', 'clip-retrieval approach', 'sentence-transformers', 'ray data example')


def artifact(folder, size=224, clip=False):
    "An artifact of random weights: a ResNet-like image tower, or open_clip's ViT-B-32."
    from mmembed.export.verify import export
    from mmembed.models.dual import DualEncoder
    from mmembed.models.towers import ConvNet, TextTransformer
    from mmembed.text.pipeline import TextPipeline
    from mmembed.vision.pipeline import VisionPipeline
    torch.manual_seed(0)
    if clip: model = DualEncoder.from_open_clip('ViT-B-32', pretrained=None)
    else:
        tp = TextPipeline.learn(['a red circle', 'a blue square'], vocab_size=100, max_length=16)
        model = DualEncoder(TextTransformer(tp, width=64, depth=1), ConvNet(VisionPipeline(size=size), channels=(64, 128, 256, 512)), dim=512)
    export(model.eval(), folder/'model.pt', fresh=False, cpp=False)
    return folder/'model.pt'


def photos(rows):
    "Pictures of a publisher where the data is here, generated ones elsewhere."
    path = Path(os.environ.get('MMEMBED_DATA') or Path(__file__).resolve().parents[2]/'shared'/'data')/'figures'/'pairs.jsonl'
    source = PairsFile(path, text_key='alt') if path.exists() else Scenes(train=rows, valid=0)
    return Part(source, [i % len(source) for i in range(rows)])


def share(args, tmp):
    class Timed(Embedder):
        forward = 0.
        def encode_pixels(self, pixels):
            start = time.thread_time()
            try: return super().encode_pixels(pixels)
            finally: self.forward += time.thread_time() - start
    emb = Timed(args.model or artifact(tmp), threads=1, batch_size=args.batch_size, deterministic=True)
    source = photos(args.rows)
    start = time.thread_time()
    levels = torch.stack([emb.preprocess(source.image(i)) for i in range(args.batch_size)])
    decode = (time.thread_time() - start) / args.batch_size
    emb.encode_pixels(levels)
    alone, busy, forward = [], [], []
    for k in range(args.rounds):
        start = time.thread_time()
        for _ in range(0, args.rows, args.batch_size): emb.encode_pixels(levels)
        alone.append((time.thread_time() - start) / args.rows)
        emb.forward, start = 0., time.thread_time()
        embed(emb, source, tmp/f'out{k}', threads=args.threads, shard_rows=max(args.batch_size, args.rows // 4))
        busy.append((time.thread_time() - start) / args.rows)
        forward.append(emb.forward / args.rows)
    a, b, f = (sorted(x)[len(x) // 2] * 1e3 for x in (alone, busy, forward))
    print(f'{args.rows} rows, batches of {args.batch_size}, {args.threads} threads, CPU milliseconds a picture, median of {args.rounds}\n')
    print('| towers alone | towers in the job | their thread, all in all | share: alone / all | the thread outside the towers | decoding |\n|---|---|---|---|---|---|')
    print(f'| {a:.3f} | {f:.3f} | {b:.3f} | {a/b:.1%} | {(b - f)/b:.2%} | {decode*1e3:.3f} |')


def workers(args, tmp):
    from mmembed.rayjobs import embed_ray
    model, source, rates = args.model or artifact(tmp), photos(args.rows), {}
    for n in args.workers:
        first = []
        def progress(ready, rows): first.append((time.perf_counter(), ready))
        embed_ray(model, source, tmp/f'out{n}', shard_rows=max(16, args.rows // (8 * n)), batch_size=args.batch_size, threads=1, workers=(n, n), progress=progress)
        (t0, r0), (t1, r1) = first[0], first[-1]
        rates[n] = (r1 - r0) / (t1 - t0)
    print(f'{os.cpu_count()} cores, one for each worker\n\n| workers | rows a second | times one worker |\n|---|---|---|')
    for n, r in rates.items(): print(f'| {n} | {r:.1f} | {r/rates[args.workers[0]]*args.workers[0]:.2f} |')
    if args.plot:
        from matplotlib import pyplot as plt
        plt.plot(list(rates), list(rates.values()), 'o-', label='measured')
        plt.plot(list(rates), [n * rates[args.workers[0]] / args.workers[0] for n in rates], ':', label='in proportion')
        plt.xlabel('workers'), plt.ylabel('rows a second'), plt.legend()
        plt.savefig(args.plot)


def estimate(args):
    "Cores of the towers and cores of decoding side by side, at the measured CPU time of each."
    each = (args.tower_ms / args.share + args.decode_ms) / 1e3
    print(f'{args.cores} cores a machine; {each*1e3:.2f} ms of a core a picture; {args.file_kb:.0f} kB a file\n')
    print('| pictures | core-hours | hours of one machine | machines for 24 hours | read | float32 | float16 | int8 | binary |\n|---|---|---|---|---|---|---|---|---|')
    for n in (1e8, 1e10):
        hours = n * each / 3600
        size = [n * args.dim * b / 1e12 for b in (4, 2, 1, 1/8)]
        print(f'| {n:,.0f} | {hours:,.0f} | {hours/args.cores:,.0f} | {hours/args.cores/24:,.1f} | {n*args.file_kb/1e9:,.1f} TB | ' + ' | '.join(f'{s:,.2f} TB' for s in size) + ' |')


def peers(args, tmp):
    artifact(tmp, clip=True)
    source = photos(2 * args.rows)
    for n in (args.rows, 2 * args.rows):
        (tmp/f'{n}').mkdir()
        for i in range(n): (tmp/f'{n}'/f'{i:05}.jpg').write_bytes(bytes(source.image(i).tolist()))
    import psutil
    print('| | CPU-seconds a picture | times ours |\n|---|---|---|')
    ours = None
    for name in args.only or PEERS:
        used = []
        for n in (args.rows, 2 * args.rows):
            p = subprocess.Popen([sys.executable, '-m', 'benchmarks.embed', 'one', '--name', name, '--model', str(tmp), '--rows', str(n)], stdout=subprocess.DEVNULL)
            seen: dict = {}
            while p.poll() is None:
                for q in [psutil.Process(p.pid), *psutil.Process(p.pid).children(recursive=True)]:
                    try: seen[q.pid] = sum(q.cpu_times()[:2])
                    except psutil.Error: pass
                time.sleep(.1)
            if p.returncode: raise SystemExit(f'{name} failed')
            used.append(sum(seen.values()))
        cost = (used[1] - used[0]) / args.rows
        ours = ours or cost
        print(f'| {name} | {cost:.4f} | {cost/ours:.2f} |', flush=True)


def one(args):
    "A contender over the pictures of a folder; batches of 16, one thread for the towers."
    torch.set_num_threads(1)
    folder, out = Path(args.model)/str(args.rows), Path(tempfile.mkdtemp(dir=args.model))
    files = sorted(map(str, folder.glob('*.jpg')))
    if args.name == 'mmembed':
        from mmembed.intake import open_source
        return embed(Embedder(Path(args.model)/'model.pt', threads=1, batch_size=16, deterministic=True), open_source(folder), out, threads=1)
    import numpy as np
    if args.name == 'sentence-transformers':  # random weights of the same size: transformers' CLIP of ViT-B-32
        from PIL import Image
        from sentence_transformers import SentenceTransformer
        from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel
        CLIPModel(CLIPConfig()).save_pretrained(out), CLIPImageProcessor().save_pretrained(out)
        clip, process = CLIPModel.from_pretrained(out).eval(), CLIPImageProcessor.from_pretrained(out)
        class Tower(torch.nn.Module):
            def preprocess(self, images, **_): return process(images=images, return_tensors='pt')
            tokenize = preprocess
            def forward(self, features, **_):
                found = clip.get_image_features(pixel_values=features['pixel_values'])
                return features | {'sentence_embedding': getattr(found, 'pooler_output', found)}
        return np.save(out/'x.npy', SentenceTransformer(modules=[Tower()], device='cpu').encode([Image.open(f).convert('RGB') for f in files], batch_size=16))
    import open_clip
    model, _, preprocess = open_clip.create_model_and_transforms('ViT-B-32', pretrained=None)
    model.eval()
    if args.name == 'clip-retrieval approach':  # WebDataset shards, a DataLoader with a worker that preprocesses, batches through the model
        import webdataset as wds
        with wds.TarWriter(str(out/'x.tar')) as tar:
            for i, f in enumerate(files): tar.write({'__key__': f'{i:05}', 'jpg': Path(f).read_bytes()})
        data = wds.WebDataset(str(out/'x.tar'), shardshuffle=False).decode('pil').to_tuple('jpg').map_tuple(preprocess)
        with torch.no_grad():
            found = [model.encode_image(x, normalize=True) for (x,) in torch.utils.data.DataLoader(data, batch_size=16, num_workers=1)]
        return np.save(out/'x.npy', torch.cat(found).numpy())
    import ray.data  # read_images, then a class on map_batches, as in Ray's example of CLIP embeddings
    from PIL import Image
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    class Embed:
        def __init__(self):
            torch.set_num_threads(1)
            self.model, _, self.preprocess = open_clip.create_model_and_transforms('ViT-B-32', pretrained=None)
            self.model.eval()
        def __call__(self, batch):
            with torch.no_grad(): batch['vector'] = self.model.encode_image(torch.stack([self.preprocess(Image.fromarray(x)) for x in batch.pop('image')])).numpy()
            return batch
    ray.data.read_images(str(folder), mode='RGB').map_batches(Embed, batch_size=16, compute=ray.data.ActorPoolStrategy(size=1)).write_parquet(str(out/'x'))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['share', 'workers', 'peers', 'estimate', 'one'])
    parser.add_argument('--model')
    parser.add_argument('--rows', type=int, default=400)
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--workers', type=int, nargs='+', default=[1, 2])
    parser.add_argument('--plot', help='an image file')
    parser.add_argument('--only', nargs='+', choices=PEERS)
    parser.add_argument('--name')
    for name, value in dict(tower_ms=7.66, decode_ms=1.56, share=.95, file_kb=60, dim=512, cores=64).items():
        parser.add_argument('--' + name.replace('_', '-'), type=type(value), default=value)
    args = parser.parse_args()
    if args.what in ('estimate', 'one'): return globals()[args.what](args)
    with tempfile.TemporaryDirectory() as tmp: globals()[args.what](args, Path(tmp))


if __name__ == '__main__': main()
