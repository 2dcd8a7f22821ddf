"""The towers of one model under every acceleration, as tables: milliseconds of a batch, memory, and what it costs in accuracy.

    python -m benchmarks.gpu                                  # ViT-B-32, batches 1 to 16, on cuda; "not run" in every row where there is none
    python -m benchmarks.gpu --checkpoint runs/quickstart/best.ckpt --data pairs.csv
    python -m benchmarks.gpu --device cpu --quick             # a small model and two sizes: that the program itself works

Shapes: ids (B, 77) and pixels (B, 3, 224, 224), B from 1 to 16; the median of the rounds, the device synchronised before and after each. Rows:

    plain fp32, bf16, fp16    the towers as Python runs them
    artifact fp32, fp16       the exported file's scripted towers on this device
    math, sdpa                attention in several kernels, or in one (flash; memory-efficient where CLIP's causal mask forbids it)
    graphs                    CUDA graphs over the frozen towers
    compile                   torch.compile
    int8 graph                linear layers of the torch.export graph in int8
    aotinductor               an exported package (mmembed export --out model.pt2)
    tensorrt                  the ONNX export behind ONNX Runtime's TensorRT provider

Accuracy is held to the fp32 towers on the CPU: the worst cosine, and, with --data, recall at 1 of the same pairs. Weights of ViT-B-32 are random where none are given,
which changes no time. Nothing is written but the table, and JSON with --json.
"""
import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import mmembed as mm
from mmembed.core import Tokens
from mmembed.export.accelerate import accelerated

ROWS = {'plain fp32': ('plain', 'fp32'), 'plain bf16': ('plain', 'bf16'), 'plain fp16': ('plain', 'fp16'), 'artifact fp32': ('artifact', 'fp32'),
        'artifact fp16': ('artifact', 'fp16'), 'math fp16': ('math', 'fp16'), 'sdpa fp16': ('sdpa', 'fp16'), 'graphs fp16': ('graphs', 'fp16'),
        'compile fp16': ('compile', 'fp16'), 'int8 graph': ('int8', 'fp32'), 'aotinductor fp16': ('aotinductor', 'fp16'), 'tensorrt fp16': ('tensorrt', 'fp16')}


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
    "text(ids, mask) and image(pixels) of a row."
    how, precision = ROWS[row]
    if how == 'artifact':
        path = folder/f'{precision}.pt'
        mm.export(model, path, decode=False, fresh=False, cpp=False, precision=precision)
        net = mm.load(path, device=str(device)).module.model
        return lambda ids, mask: net.encode_text(Tokens(ids, mask)), lambda pixels: net.encode_image(pixels)
    if how == 'aotinductor':
        if device.type == 'cuda': raise RuntimeError('mmembed.export.compiled compiles for processors; a package for a GPU is not made')
        path = folder/'model.pt2'
        mm.export(model, path, decode=False, fresh=False, cpp=False)
        net = mm.load(path).module.model
        return lambda ids, mask: net.encode_text(Tokens(ids, mask)), lambda pixels: net.encode_image(pixels)
    if how == 'tensorrt': return tensorrt(model, folder, device)
    return accelerated(model, how, str(device), precision, sizes)


def tensorrt(model, folder, device):
    import onnxruntime as ort
    if 'TensorrtExecutionProvider' not in ort.get_available_providers():
        raise RuntimeError('this onnxruntime has no TensorRT provider: pip install onnxruntime-gpu tensorrt')
    class Tower(torch.nn.Module):
        def __init__(self, f): super().__init__(), setattr(self, 'f', f), setattr(self, 'net', model)
        def forward(self, *x): return self.f(*x)
    length, runs = model.text_pipeline.max_length, []
    word, batch = torch.ones(2, length, dtype=torch.int64), torch.export.Dim('B', min=1, max=16)
    for name, f, x in (('text', lambda i, m: model.encode_text(Tokens(i, m)), (word, word)), ('image', model.encode_image, (torch.zeros(2, 3, *model.vision_pipeline.size),))):
        path = folder/f'{name}.onnx'
        torch.onnx.export(Tower(f), x, str(path), dynamo=True, dynamic_shapes=(tuple({0: batch} for _ in x),), verbose=False)
        given = ort.InferenceSession(str(path), providers=[('TensorrtExecutionProvider', {'trt_fp16_enable': True}), 'CUDAExecutionProvider'])
        runs.append(lambda *x, s=given: torch.from_numpy(s.run(None, {i.name: v.cpu().numpy() for i, v in zip(s.get_inputs(), x)})[0]).to(device))
    return runs


def measured(row, model, device, sizes, rounds, samples, folder):
    "What one row says: milliseconds by shape, memory, cosine, recall."
    tokens, pixels, want, pairs = samples
    if device.type == 'cuda': torch.cuda.reset_peak_memory_stats(device)
    text, image = towers(row, model, device, sizes, folder)
    words, pictures = [x.to(device) for x in tokens], pixels.to(device)
    out = {'ms': {}}
    with torch.no_grad():
        n = min(len(words[0]), max(sizes))
        got = text(*(x[:n] for x in words)).float().cpu(), image(pictures[:n]).float().cpu()
        out['cosine'] = min(float(F.cosine_similarity(g, w[:n]).min()) for g, w in zip(got, want))
        for b in sizes:
            ids, mask = (x[:1].expand(b, -1).contiguous() for x in words)
            x = pictures[:1].expand(b, -1, -1, -1).contiguous()
            out['ms'][b] = clocked(lambda: text(ids, mask), device, rounds), clocked(lambda: image(x), device, rounds)
        if pairs:
            step, (ids, mask), found = max(sizes), [x.to(device) for x in pairs[0]], []
            t = torch.cat([text(ids[i:i+step], mask[i:i+step]) for i in range(0, len(ids), step)])
            v = torch.cat([image(pairs[1][i:i+step].to(device)) for i in range(0, len(ids), step)])
            found = (t.float() @ v.float().T).argmax(1)
            out['recall'] = float((found == torch.arange(len(found), device=found.device)).float().mean())
    if device.type == 'cuda': out['MiB'] = torch.cuda.max_memory_allocated(device) / 2**20
    return out


def table(found, sizes, pairs):
    columns = [f'{k}, {b}' for b in sizes for k in ('texts', 'images')]
    lines = [f'| ms a batch of | {" | ".join(columns)} | peak MiB | worst 1 - cosine |' + ' recall@1 |' * bool(pairs), '|---' * (len(columns) + 3 + bool(pairs)) + '|']
    for row, x in found.items():
        if isinstance(x, str): lines.append(f'| {row} | not run: {x} |' + ' |' * (len(columns) + 1 + bool(pairs)))
        else:
            cells = [f'{ms:.2f}' for b in sizes for ms in x['ms'][b]] + [f'{x["MiB"]:.0f}' if 'MiB' in x else '', f'{max(0., 1 - x["cosine"]):.1e}']
            lines.append(f'| {row} | {" | ".join(cells)} |' + (f' {x["recall"]:.1%} |' if pairs else ''))
    return '\n'.join(lines)


def small():
    "A model of a minute."
    from mmembed.models.dual import DualEncoder
    from mmembed.models.towers import ConvNet, TextTransformer
    torch.manual_seed(0)
    tp = mm.TextPipeline.learn(['a photo of a small red circle'] * 9, vocab_size=60, max_length=77)
    return DualEncoder(TextTransformer(tp, width=64, depth=2), ConvNet(mm.VisionPipeline(size=64), channels=(8, 16), width=64), dim=32)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--sizes', default='1,2,4,8,16')
    parser.add_argument('--rounds', type=int, default=20)
    parser.add_argument('--rows', default=','.join(ROWS))
    parser.add_argument('--quick', action='store_true', help='a small model, two sizes, two rounds')
    parser.add_argument('--weights', help="ViT-B-32's, a file; random without")
    parser.add_argument('--checkpoint', help='what mmembed train printed, instead of ViT-B-32')
    parser.add_argument('--data', help='a table of pairs (.csv, .jsonl, .parquet) with a column image: recall of the first 1,000 is the task')
    parser.add_argument('--text-key', default='text', help='its column of captions')
    parser.add_argument('--json', help='where the figures go')
    args = parser.parse_args(argv)
    sizes, rounds = ([1, 2], 2) if args.quick else ([int(b) for b in args.sizes.split(',')], args.rounds)
    if unknown := set(args.rows.split(',')) - ROWS.keys(): raise SystemExit(f'no such rows: {", ".join(unknown)}; there are {", ".join(ROWS)}')
    device, found, pairs = torch.device(args.device), {}, None
    if device.type == 'cuda' and not torch.cuda.is_available(): found = dict.fromkeys(args.rows.split(','), 'torch sees no CUDA device here')
    else:
        if args.checkpoint:
            from mmembed.train import load_checkpoint
            model = load_checkpoint(args.checkpoint).eval()
        else:
            from mmembed.models.dual import DualEncoder
            model = small() if args.quick else DualEncoder.from_open_clip('ViT-B-32', args.weights)
        model, tp, g = model.eval(), model.text_pipeline, torch.Generator().manual_seed(0)
        ids = torch.randint(1, tp.vocab_size, (16, tp.max_length), generator=g)
        ids[:, -1] = tp.vocab_size - 1  # CLIP's end of text
        tokens, pixels = (ids, torch.ones_like(ids)), torch.randn(16, 3, *model.vision_pipeline.size, generator=g)
        with torch.no_grad(): want = model.encode_text(Tokens(*tokens)), model.encode_image(pixels)
        if args.data:
            from mmembed.data.sources import PairsFile
            source = PairsFile(args.data, text_key=args.text_key)
            n = min(len(source), 1000)
            words = tp([source.text(i) for i in range(n)])
            wide = torch.nn.functional.pad
            pairs = ([wide(words.ids, (0, tp.max_length - words.ids.shape[1]), value=tp.pad_id), wide(words.mask, (0, tp.max_length - words.ids.shape[1]))],
                     torch.cat([model.vision_pipeline([source.image(i)]) for i in range(n)]))
        for row in args.rows.split(','):
            with tempfile.TemporaryDirectory() as d:
                try: found[row] = measured(row, model, device, sizes, rounds, (tokens, pixels, want, pairs), Path(d))
                except Exception as e: found[row] = f'{type(e).__name__}: {(str(e).splitlines() or [""])[0][:120]}'.replace('|', '/')
            print(row, found[row] if isinstance(found[row], str) else 'done', flush=True)
    where = torch.cuda.get_device_name(device) if device.type == 'cuda' and torch.cuda.is_available() else args.device
    print(f'\n{where}, torch {torch.__version__}\n\n{table(found, sizes, pairs)}')
    if args.json: Path(args.json).write_text(json.dumps({'device': where, 'torch': torch.__version__, 'sizes': sizes, 'rows': found}, indent=1))
    return found


if __name__ == '__main__': main()
