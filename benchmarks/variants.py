"""What each variant of an export costs and brings: time, size, and accuracy against fp32 on real pairs.

    python -m benchmarks.variants prepare --figures finetuned-0   # writes the files and asks them for all held-out
    pairs (minutes)
    python -m benchmarks.variants time --figures finetuned-0 --json benchmarks/results/variants.json
    python -m benchmarks.variants prepare --open-clip ViT-B-32    # random weights: no recall
    python -m benchmarks.variants prepare runs/quickstart/best.ckpt --data pairs.csv

Files stay in runs/variants/NAME. `--figures` names a model that benchmarks/figures.py left (MiniLM-L6 and
MobileNetV2, fine-tuned) and takes its 590 held-out
pairs; their pictures serve `--open-clip` too. Recall is scored with the embeddings as they are stored: int8 by
cosine, bits by Hamming distance, fewer numbers made
unit length again. The cosine is with the fp32 file's embedding of the same item, the worst and the mean.

`time`: CPU milliseconds an item, one thread, from texts and from uint8 pixels; the files take turns, and the fastest
round of each counts. `--only` names some, so
that it can be cut into pieces; the figures are merged into the file of `--json`."""
import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

import torch
import torch.nn.functional as F

from benchmarks import begun
import mmembed as mm
from mmembed.core.torchscript import quietly
from mmembed.exporters.archive import save
from mmembed.exporters.assemble import assemble
from mmembed.exporters.card import make_card
from mmembed.core.quantize import quantize, dequantize
from mmembed.exporters.variants import Variant
from mmembed.exporters.card import sha256
from mmembed.exporters.verify.verify import all_tensors
from mmembed.train.modules import judge

VARIANTS = {
    'fp32': Variant(),
    'bf16': Variant(precision='bf16'),
    'int8': Variant(quantize='int8'),
    'fold': Variant(fold=True),
    'dim 128': Variant(dim=128),
    'dim 64': Variant(dim=64),
    'output int8': Variant(output='int8'),
    'output binary': Variant(output='binary'),
    'int8, output int8': Variant(quantize='int8', output='int8'),
    'portable': Variant(portable=True),
    'deterministic 8': Variant(deterministic=8),
    'trim 8': Variant(trim=8),
    'fp16': Variant(precision='fp16'),
}
BATCHES = 1, 16
COLUMNS = [
    'variant',
    *(f'ms {x}, batch {b}' for x in ('a text', 'an image') for b in BATCHES),
    'file, MB',
    'bytes an embedding',
    'cosine of texts, worst (mean)',
    'cosine of images, worst (mean)',
    'text to image @1 / 5 / 10',
    'image to text @1 / 5 / 10',
]


def chosen(args):
    "The model, its pairs (captions and a part of a source), the folder."
    from benchmarks import figures
    if args.figures: return figures.saved(args.figures), figures.parts(figures.source())[1], args.figures
    if args.checkpoint:
        from mmembed.data.tables import PairsFile
        from mmembed.train.checkpoint import load_checkpoint

        return (
            load_checkpoint(args.checkpoint).eval(),
            PairsFile(args.data).split(0.2)[1],
            Path(args.checkpoint).parent.name,
        )
    from mmembed.models.dual import DualEncoder
    torch.manual_seed(0)
    return (
        DualEncoder.from_open_clip(args.open_clip, args.weights).eval(),
        figures.parts(figures.source())[1],
        args.open_clip,
    )


def inputs(model, part, n):
    "n captions, and the pictures as uint8 (n, 3, S, S)."
    rows = range(0, len(part), max(1, len(part) // n))[:n]
    return [part.text(i) for i in rows], model.vision_pipeline.preprocess_all([part.image(i) for i in rows], False)


def written(model, v, path):
    "The file of a variant as `export` writes it, without its verification."
    artifact = assemble(model, variant=v)
    card = make_card(model, artifact.dim, True, None, v.changes()) | {'tensors_sha256': sha256(all_tensors(artifact))}
    artifact.identity = json.dumps(card, indent=1)
    save(quietly(torch.jit.script, artifact), path, artifact.identity)


def finished(x, v):
    "Embeddings of the full towers in fewer numbers and fewer bits, as `Encoder.finish` does it."
    return quantize(F.normalize(x[:, :v.dim], dim=-1) if v.dim else x, v.output)


def loaded(path): return mm.load(path, threads=1)


@torch.no_grad()
def prepare(args, model, part, folder):
    n = len(part) if not args.open_clip else 64
    texts, pixels = inputs(model, part, n)
    torch.save((texts[:16], pixels[:16]), folder/'timed.pt')
    known, full, answers = folder/'accuracy.json', None, {}
    rows = json.loads(known.read_text()) if known.exists() else {}
    for name, v in VARIANTS.items():
        if name != 'fp32' and (name in rows or args.only and name not in args.only): continue
        path = folder/f'{name}.pt'
        try: written(model, v, path)
        except ValueError as e:
            rows[name] = {'refused': str(e)}
            print(name, e, flush=True)
            continue
        module = loaded(path).module

        def ask(n):
            return [
                torch.cat([module.encode_text(texts[i : i + 16]) for i in range(0, n, 16)]),
                torch.cat([module.encode_pixels(p) for p in pixels[:n].split(16)]),
            ]
        towers = v._replace(dim=0, output='float32')
        if towers in answers:  # the same towers: what follows them is all that differs, and the file is asked for some
            pair = [finished(x, v) for x in answers[towers]]
            for x, y in zip(pair, ask(16)):
                assert (x[:16].float() - y.float()).abs().max() <= (
                    1 if y.dtype == torch.int8 else 255 if y.dtype == torch.uint8 else 1e-4
                )
        else: pair = answers[v] = ask(n)
        text, pair = pair[0], [dequantize(x, v.output) for x in pair]
        if full is None: full = pair
        c = [
            '–'
            if v.dim
            else '{:.5f} ({:.5f})'.format(
                *(f(F.cosine_similarity(x.double(), y.double(), dim=1)) for f in (torch.min, torch.mean))
            )
            for x, y in zip(pair, full)
        ]
        recall = (
            [None, None]
            if args.open_clip and not args.weights
            else [
                ' / '.join(f'{100 * r.at[k]:.1f}' for k in (1, 5, 10)) for r in judge(*pair, texts, [])['all'].values()
            ]
        )
        rows[name] = {'cells': [f'{path.stat().st_size / 1e6:.1f}', text[0].numel() * text.element_size(), *c, *recall]}
        print(name, rows[name]['cells'], flush=True)
        known.write_text(json.dumps(rows, indent=1))


def spent(f, x):
    start = time.process_time()
    f(x)
    return time.process_time() - start


@torch.no_grad()
def timed(args, folder):
    texts, pixels = torch.load(folder/'timed.pt')
    accuracy = json.loads((folder/'accuracy.json').read_text())
    names = [k for k in VARIANTS if 'cells' in accuracy.get(k, {}) and (not args.only or k in args.only)]
    modules, best = {k: loaded(folder/f'{k}.pt').module for k in names}, {}
    start, rounds = time.perf_counter(), 0
    while time.perf_counter() - start < args.seconds or rounds < 3:
        for name, m in modules.items():
            for key, f, x in (('text', m.encode_text, texts), ('image', m.encode_pixels, pixels)):
                took = {1: sum(spent(f, x[i:i+1]) for i in range(16)) / 16, 16: spent(f, x) / 16}
                for b in BATCHES: best[name, key, b] = min(best.get((name, key, b), 1e9), took[b] * 1e3)
        rounds += 1
    print(rounds, 'rounds')
    path = Path(args.json)
    kept = {r[0]: r for r in json.loads(path.read_text())['records']['rows']} if path.exists() else {}
    for name in names:
        kept[name] = [
            name,
            *(f'{best[name, key, b]:.2f}' for key in ('text', 'image') for b in BATCHES),
            *(c for c in accuracy[name]['cells'] if c is not None),
        ]
    rows = [kept[k] for k in VARIANTS if k in kept]
    columns = COLUMNS[:len(rows[0])]
    path.write_text(
        json.dumps(
            {
                'kind': 'plain',
                'command': f'python -m benchmarks.variants time '
                           f'{"--figures " + args.figures if args.figures else "--open-clip " + args.open_clip}',
                'records': {'columns': columns, 'rows': rows},
            },
            indent=0,
        )
        + '\n'
    )
    for r in [columns, *rows]: print('| ' + ' | '.join(map(str, r)) + ' |')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['prepare', 'time'])
    parser.add_argument('checkpoint', nargs='?', help='of `mmembed train`')
    parser.add_argument('--figures', help='a model in runs/figures, e.g. finetuned-0')
    parser.add_argument('--open-clip', help='a model of open_clip, with --weights or random')
    parser.add_argument('--weights')
    parser.add_argument(
        '--quick', action='store_true', help='few pairs, as in figures.py: to see that everything works'
    )
    parser.add_argument('--data', help='a .csv, .tsv, .jsonl or .parquet file of pairs')
    parser.add_argument('--only', type=lambda x: x.split(';'), help='variants, semicolons between')
    parser.add_argument('--seconds', type=float, default=100)
    parser.add_argument('--json', default='runs/variants/table.json')
    args = begun(parser)
    if sum(map(bool, (args.checkpoint, args.figures, args.open_clip))) != 1:
        parser.error('name one of a checkpoint, --figures and --open-clip')
    torch.set_num_threads(1)
    torch._C._jit_set_profiling_mode(False)
    name = args.figures or args.open_clip or Path(args.checkpoint).parent.name
    folder = Path('runs/variants')/name
    folder.mkdir(parents=True, exist_ok=True)
    if args.what == 'time': return timed(args, folder)
    model, part, _ = chosen(args)
    prepare(args, model, part, folder)


if __name__ == '__main__': main()
