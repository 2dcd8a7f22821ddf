"""The towers of one model under every acceleration, as tables: milliseconds of a batch, memory, and what it costs in
accuracy.

    python -m benchmarks.gpu                                  # ViT-B-32, batches 1 to 16, on cuda; "not run" in
    every row where there is none
    python -m benchmarks.gpu --checkpoint runs/quickstart/best.ckpt --data pairs.csv
    python -m benchmarks.gpu --device cpu --quick             # a small model and two sizes: that the program itself
    works

Shapes: ids (B, 77) and levels uint8 (B, 3, 224, 224), B from 1 to 16, normalisation included; the median of the
rounds, the device synchronised before and after each. Rows:

    eager fp32, bf16, fp16    the towers as Python runs them
    eager fp16 compile        and through torch.compile
    file fp32, bf16, fp16     what `mmembed export` writes, on this device
    file fp16 math            --attention math; the others ask for one kernel (flash; memory-efficient where CLIP's
    causal mask forbids it)
    file fp16 graphs          --cuda-graphs 1,2,4,8,16
    file int8                 --quantize int8
    package fp32, int8        --compiled model.pt2, by AOTInductor; int8: the linear layers of the exported graph
    onnx, onnx-cuda, tensorrt --onnx folder, by that provider of ONNX Runtime; from bytes of text, tokenizer
    included, and from decoded pictures

Accuracy is held to the fp32 towers on the CPU: the worst cosine, and, with --data, recall at 1 of the same pairs.
Weights of ViT-B-32 are random where none are given,
which changes no time. Nothing is written but the table, and JSON with --json.
"""
import argparse
import copy
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import mmembed as mm
from mmembed.core.types import Tokens
from mmembed.exporters.variants import Variant, prepared

ACCELERATIONS = {  # name: (how to ask for it, what it is)
    'fp16': ("export(precision='fp16')", 'weights and activations of 16 bits'),
    'bf16': ("export(precision='bf16')", '16 bits with the range of fp32'),
    'int8': (
        "export(quantize='int8')",
        'linear layers and convolutions multiply int8 by int8; in a .pt2, linear layers of the torch.export graph',
    ),
    'sdpa': (
        "export(attention='sdpa'), the default",
        'attention in one kernel: flash, or memory-efficient where there is a mask',
    ),
    'math': ("export(attention='math')", 'attention as matrix products and a softmax'),
    'graphs': ('export(graphs=(1, 2, 4, 8, 16))', 'batches of a few sizes, each captured once as a CUDA graph'),
    'aotinductor': ("export(model, 'model.pt2')", 'tokenizer and towers compiled ahead of time'),
    'onnx-cuda': ("OnnxModel(folder, device='cuda')", "ONNX Runtime's CUDA provider"),
    'tensorrt': ("OnnxModel(folder, device='tensorrt')", "ONNX Runtime's TensorRT provider"),
    'compile': ('eager_towers(compile=True)', 'torch.compile, which takes eager Python, not TorchScript'),
}

ROWS = {
    'eager fp32': {},
    'eager bf16': dict(precision='bf16'),
    'eager fp16': dict(precision='fp16'),
    'eager fp16 compile': dict(precision='fp16', compile=True),
    'file fp32': {},
    'file bf16': dict(precision='bf16'),
    'file fp16': dict(precision='fp16'),
    'file fp16 math': dict(precision='fp16', attention='math'),
    'file fp16 graphs': dict(precision='fp16', graphs=True),
    'file int8': dict(quantize='int8'),
    'package fp32': {},
    'package int8': dict(quantize='int8'),
    'onnx': {},
    'onnx-cuda': {},
    'tensorrt': {},
}


def why_not(name, device=''):
    """Why an acceleration cannot be had on `device` ('cpu' or 'cuda'; '': the one that it is for); empty when it can.

    Raises `ValueError` for an unknown name."""
    if name not in ACCELERATIONS: raise ValueError(f'no acceleration {name!r}; there are {", ".join(ACCELERATIONS)}')
    cuda = (device or ('cuda' if name == 'graphs' else 'cpu')).startswith('cuda')
    if name in ('onnx-cuda', 'tensorrt'):
        from mmembed.exporters.onnx.model import provider_of
        try: return provider_of(name.removeprefix('onnx-')) and ''
        except (ImportError, ValueError) as e: return str(e)
    if cuda and not torch.cuda.is_available(): return 'torch sees no CUDA device here'
    if name == 'compile' and cuda:
        from torch.utils._triton import has_triton
        return '' if has_triton() else 'torch.compile needs triton on a GPU: pip install triton'
    reasons = {
        ('graphs', False): 'CUDA graphs need a GPU',
        ('int8', True): 'the int8 layers are for a CPU: on a GPU torch._int_mm takes no fewer than 17 rows',
        ('aotinductor', True): 'a package is compiled for the CPU',
    }
    if (name, cuda) in reasons: return reasons[name, cuda]
    if name not in ('compile', 'aotinductor'): return ''
    from mmembed.exporters.aot import why_no_compiler
    return why_no_compiler()


def eager_towers(model, variant=Variant(), device='cpu', compile=False):
    """Both towers of a DualEncoder as `variant` has them, as functions: text(ids, mask), image(normalised pixels).

    `compile`: by torch.compile, when first called. Raises `RuntimeError` with the reason where a machine cannot."""
    if why := why_not('compile' if compile else 'sdpa', device): raise RuntimeError(why)
    net = prepared(model, variant).model.to(device)
    def encode_text(ids, mask): return net.encode_text(Tokens(ids, mask))
    def without_gradients(f):
        f = torch.compile(f, dynamic=True) if compile else f
        def g(*x):
            with torch.no_grad(): return f(*x)
        return g
    return without_gradients(encode_text), without_gradients(net.encode_image)


def clocked(f, device, rounds):
    "Median milliseconds, after three calls that do not count."
    wait = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    times = []
    for i in range(rounds + 3):
        wait()
        start = time.perf_counter()
        f()
        wait()
        if i >= 3: times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def towers(row, model, device, sizes, folder):
    "text(texts, ids, mask) and image(levels) of a row."
    kind, more = row.split()[0], dict(ROWS[row])
    if kind in ('onnx', 'onnx-cuda', 'tensorrt'):
        return onnx(model, folder, kind.removeprefix('onnx-').replace('onnx', 'cpu'), device)
    name = {'package': 'aotinductor'}.get(kind) or next(
        (k for k in ('compile', 'graphs', 'quantize') if k in more), 'sdpa'
    ).replace('quantize', 'int8')
    if why := why_not(name, device.type): raise RuntimeError(why)
    if kind == 'eager':
        compiled, vp = more.pop('compile', False), copy.deepcopy(model.vision_pipeline).to(device)
        text, image = eager_towers(model, Variant(**more), str(device), compiled)
        return lambda texts, ids, mask: text(ids, mask), lambda levels: image(vp.normalize(levels))
    graphs, path = sizes if more.pop('graphs', False) else (), folder/('model.pt2' if kind == 'package' else 'model.pt')
    mm.export(model, path, decode=False, fresh=False, cpp=False, graphs=graphs, **more)
    module = mm.load(path, device=str(device)).module
    return lambda texts, ids, mask: module.model.encode_text(Tokens(ids, mask)), module.encode_pixels


def onnx(model, folder, provider, device):
    from mmembed.exporters.onnx.model import OnnxModel, provider_of
    from mmembed.exporters.onnx.export import export_onnx
    if provider != 'cpu' and device.type == 'cpu': raise RuntimeError('this row wants --device cuda')
    provider_of(provider)
    export_onnx(model, folder)
    run = OnnxModel(folder, torch.get_num_threads(), provider)

    def image(levels):
        return torch.from_numpy(run.encode_image(list(levels.permute(0, 2, 3, 1).contiguous().cpu().numpy())))
    return lambda texts, ids, mask: torch.from_numpy(run.encode_text(texts)), image


def measured(row, model, device, sizes, rounds, samples, folder):
    "What one row says: milliseconds by shape, memory, cosine, recall."
    texts, tokens, levels, want, pairs = samples
    if device.type == 'cuda': torch.cuda.reset_peak_memory_stats(device)
    text, image = towers(row, model, device, sizes, folder)
    words, pictures = [x.to(device) for x in tokens], levels.to(device)
    out, most = {'ms': {}}, max(sizes)
    with torch.no_grad():
        got = text(texts[:most], *(x[:most] for x in words)).float().cpu(), image(pictures[:most]).float().cpu()
        out['cosine'] = min(float(F.cosine_similarity(g, w[:most]).min()) for g, w in zip(got, want))
        for b in sizes:
            ids, mask = (x[:b].contiguous() for x in words)
            x = pictures[:b].contiguous()
            out['ms'][b] = (
                clocked(partial(text, texts[:b], ids, mask), device, rounds),
                clocked(partial(image, x), device, rounds),
            )
        if pairs:
            said, (ids, mask), shown = pairs[0], [x.to(device) for x in pairs[1]], pairs[2]
            t = torch.cat([text(said[i:i+most], ids[i:i+most], mask[i:i+most]) for i in range(0, len(ids), most)])
            v = torch.cat([image(shown[i:i+most].to(device)) for i in range(0, len(ids), most)])
            found = (t.float() @ v.float().T).argmax(1)
            out['recall'] = float((found == torch.arange(len(found), device=found.device)).float().mean())
    if device.type == 'cuda': out['MiB'] = torch.cuda.max_memory_allocated(device) / 2**20
    return out


def table(found, sizes, pairs):
    columns = [f'{k}, {b}' for b in sizes for k in ('texts', 'images')]
    lines = [
        f'| ms a batch of | {" | ".join(columns)} | peak MiB | worst 1 - cosine |' + ' recall@1 |' * bool(pairs),
        '|---' * (len(columns) + 3 + bool(pairs)) + '|',
    ]
    for row, x in found.items():
        if isinstance(x, str): lines.append(f'| {row} | not run: {x} |' + ' |' * (len(columns) + 1 + bool(pairs)))
        else:
            cells = [f'{ms:.2f}' for b in sizes for ms in x['ms'][b]] + [
                f'{x["MiB"]:.0f}' if 'MiB' in x else '',
                f'{max(0.0, 1 - x["cosine"]):.1e}',
            ]
            lines.append(f'| {row} | {" | ".join(cells)} |' + (f' {x["recall"]:.1%} |' if pairs else ''))
    return '\n'.join(lines)


def small():
    "A model of a minute."
    from mmembed.models.dual import DualEncoder
    from mmembed.models.towers import ConvNet, TextTransformer
    torch.manual_seed(0)
    tp = mm.TextPipeline.learn(['a photo of a small red circle'] * 9, vocab_size=60, max_length=77)
    return DualEncoder(
        TextTransformer(tp, width=64, depth=2), ConvNet(mm.VisionPipeline(size=64), channels=(8, 16), width=64), dim=32
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--threads', type=int, default=1, help='of the CPU')
    parser.add_argument('--sizes', default='1,2,4,8,16')
    parser.add_argument('--rounds', type=int, default=20)
    parser.add_argument('--rows', default=','.join(ROWS))
    parser.add_argument('--quick', action='store_true', help='a small model, two sizes, two rounds')
    parser.add_argument('--weights', help="ViT-B-32's, a file; random without")
    parser.add_argument('--checkpoint', help='what mmembed train printed, instead of ViT-B-32')
    parser.add_argument(
        '--data',
        help='a table of pairs (.csv, .jsonl, .parquet) with a column image: recall of the first 1,000 is the task',
    )
    parser.add_argument('--text-key', default='text', help='its column of captions')
    parser.add_argument('--json', help='where the figures go')
    parser.add_argument('--list', action='store_true', help='print how to ask for each acceleration, and run nothing')
    args = parser.parse_args(argv)
    if args.list:
        for name, (option, what) in ACCELERATIONS.items():
            print(f'{name:12}{option:42}{f"not here: {why}" if (why := why_not(name)) else what}')
        return {}
    sizes, rounds = ([1, 2], 2) if args.quick else ([int(b) for b in args.sizes.split(',')], args.rounds)
    torch.set_num_threads(args.threads)
    if unknown := set(args.rows.split(',')) - ROWS.keys():
        raise SystemExit(f'no such rows: {", ".join(unknown)}; there are {", ".join(ROWS)}')
    device, found, pairs = torch.device(args.device), {}, None
    if device.type == 'cuda' and not torch.cuda.is_available():
        found = dict.fromkeys(args.rows.split(','), 'torch sees no CUDA device here')
    else:
        if args.checkpoint:
            from mmembed.train.checkpoint import load_checkpoint
            model = load_checkpoint(args.checkpoint).eval()
        else:
            from mmembed.models.dual import DualEncoder
            model = small() if args.quick else DualEncoder.from_open_clip('ViT-B-32', args.weights)
        model, tp, g = model.eval(), model.text_pipeline, torch.Generator().manual_seed(0)
        texts = [f'{i} ' + 'a photo of a small red circle beside a large blue square ' * 9 for i in range(16)]
        tokens, levels = (
            tp(texts),
            torch.randint(0, 256, (16, 3, *model.vision_pipeline.size), dtype=torch.uint8, generator=g),
        )
        with torch.no_grad():
            want = model.encode_text(tokens), model.encode_image(model.vision_pipeline.normalize(levels))
        if args.data:
            from mmembed.data.tables import PairsFile
            source = PairsFile(args.data, text_key=args.text_key)
            n = min(len(source), 1000)
            said = [source.text(i) for i in range(n)]
            pairs = (
                said,
                tp(said),
                torch.stack(
                    [model.vision_pipeline.preprocess(model.vision_pipeline.decode(source.image(i))) for i in range(n)]
                ),
            )
        for row in args.rows.split(','):
            with tempfile.TemporaryDirectory() as d:
                try:
                    found[row] = measured(
                        row, model, device, sizes, rounds, (texts, tokens, levels, want, pairs), Path(d)
                    )
                except Exception as e:
                    found[row] = f'{type(e).__name__}: {(str(e).splitlines() or [""])[0][:120]}'.replace('|', '/')
            print(row, found[row] if isinstance(found[row], str) else 'done', flush=True)
    where = torch.cuda.get_device_name(device) if device.type == 'cuda' and torch.cuda.is_available() else args.device
    print(f'\n{where}, torch {torch.__version__}\n\n{table(found, sizes, pairs)}')
    if args.json:
        Path(args.json).write_text(
            json.dumps({'device': where, 'torch': torch.__version__, 'sizes': sizes, 'rows': found}, indent=1)
        )
    return found


if __name__ == '__main__': main()
