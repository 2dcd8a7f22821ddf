"""What a process holds: torch alone, an artifact loaded and asked, two of them, the service, the ONNX host, an export.

    python -m benchmarks.memory prepare    # exports ViT-B-32 into runs/memory as fp32, int8 and ONNX (minutes)
    python -m benchmarks.memory run        # loads what is there and asks it, one contestant at a time
    python -m benchmarks.memory cold       # CPU seconds to a first answer, beside those of `import torch`

Linux alone: sizes are those of /proc. `resident` counts every page that a process maps, `proportional` those that n
processes share as an nth, `private` those that nobody else has; `peak` is VmHWM. `beyond torch` is what a process that
only imported torch does not have. Weights are random, which changes no size. One thread.
"""
import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import begun

PARTS = {'fp32': {}, 'int8': {'quantize': 'int8'}, 'onnx': {}, 'onnx-int8': {'quantize': 'int8'}}
PYTHON, ENV = [sys.executable, '-W', 'ignore'], os.environ | {'OMP_NUM_THREADS': '1'}
PICTURES = '[torch.randint(0, 256, (3, 480, 640), dtype=torch.uint8) for i in range({n})]'
TEXTS = "['a photo of a red boat in a small harbour', 'two dogs'] * {n}"
BLACK = '[np.zeros((480, 640, 3), np.uint8)]'
TORCH = 'import torch; torch.set_num_threads(1)'
LOADED = {
    'load': TORCH + '; import mmembed as mm; e = mm.load({path!r})',
    'first calls': f'e.encode_text({TEXTS.format(n=1)}); e.encode_image({PICTURES.format(n=1)})',
    'batches of 64': f'e.encode_text({TEXTS.format(n=32)}); e.encode_image({PICTURES.format(n=64)})'}
HOST = {
    'load': 'import sys; sys.path.insert(0, {path!r}); import numpy as np; from embed import OnnxModel; '
            'e = OnnxModel({path!r})',
    'first calls': f'e.encode_text({TEXTS.format(n=1)}); e.encode_image({BLACK})',
    'batches of 64': f'e.encode_text({TEXTS.format(n=32)}); e.encode_image({BLACK} * 64)'}
PHASES = {'torch': {'import': TORCH}, 'fp32': LOADED, 'int8': LOADED, 'onnx': HOST, 'onnx-int8': HOST}


def status(pid, name):
    "MB of one line of /proc/PID/status."
    return int(re.search(rf'{name}:\s+(\d+) kB', Path(f'/proc/{pid}/status').read_text())[1]) * 1.024 / 1e3


def sizes(pid='self'):
    "MB of a process."
    rollup = Path(f'/proc/{pid}/smaps_rollup').read_text()
    mb = {k: int(v) * 1.024 / 1e3 for k, v in re.findall(r'(\w+):\s+(\d+) kB', rollup)}
    return dict(resident=mb['Rss'], proportional=mb['Pss'], private=mb['Private_Clean'] + mb['Private_Dirty'],
                peak=status(pid, 'VmHWM'))


def family(pid):
    "A process and those that it started."
    found = [pid]
    for task in Path(f'/proc/{pid}/task').glob('*/children'):
        found += [p for child in task.read_text().split() for p in family(int(child))]
    return found


class Held:
    "A process that goes through the phases of a contestant when it is told to, and stays."
    def __init__(self, name, path=''):
        self.steps = {phase: code.replace('{path!r}', repr(str(path))) for phase, code in PHASES[name].items()}
        program = 'import json, sys\nfor line in sys.stdin: exec(json.loads(line)); print("done", flush=True)'
        self.process = subprocess.Popen([*PYTHON, '-c', program], text=True, env=ENV, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE)

    def go(self, phase):
        print(json.dumps(self.steps[phase]), file=self.process.stdin, flush=True)
        if self.process.stdout.readline().strip() != 'done': raise RuntimeError(f'{phase}: the process ended')
        return sizes(self.process.pid)

    def __enter__(self): return self
    def __exit__(self, *_): self.process.stdin.close(), self.process.wait()


def prepare(folder, parts, alone, model):
    "Each export in a process of its own; what it held at its peak goes into NAME.json."
    folder.mkdir(parents=True, exist_ok=True)
    for name in parts:
        given = ['--files', str(folder), '--parts', name, '--model', model, *['--alone'] * alone]
        child = subprocess.Popen([*PYTHON, '-m', 'benchmarks.memory', 'make', *given], env=ENV)
        most = dict(tree=0., peak=0.)
        while child.poll() is None:
            try:
                tree = sum(status(p, 'RssAnon') for p in family(child.pid))
                found = dict(tree=tree, peak=status(child.pid, 'VmHWM'))
            except (OSError, TypeError): continue  # it has just ended
            most = {k: max(v, found[k]) for k, v in most.items()}
            time.sleep(.5)
        if child.returncode: raise SystemExit(f'{name}: the export failed')
        (folder/f'{name}.json').write_text(json.dumps(most))
        print(name, most, flush=True)


def make(folder, name, alone, model):
    "What the process of `prepare` does: a model as a user has it, one export."
    import torch
    torch.set_num_threads(1)
    from mmembed.models.dual import DualEncoder
    torch.manual_seed(0)
    model = DualEncoder.from_open_clip(model).eval()
    print('model', {k: round(v) for k, v in sizes().items()}, flush=True)
    if name.startswith('onnx'):
        from mmembed.exporters.onnx.export import export_onnx
        from mmembed.exporters.variants import Variant
        return export_onnx(model, folder/name, Variant(**PARTS[name]))
    from mmembed.exporters.export import export
    export(model, folder/f'{name}.pt', fresh=not alone, cpp=False, **PARTS[name])


def service(path):
    "A service and its address."
    command = [*PYTHON, '-m', 'mmembed', 'serve', str(path), '--port', '0', '--threads', '1', '--log', os.devnull]
    p = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENV)
    return p, f"http://127.0.0.1:{json.loads(p.stdout.readline())['http']}"


def served(path):
    "What `mmembed serve` holds before and after its first answers."
    import mmembed as mm
    from PIL import Image
    with tempfile.TemporaryDirectory() as d:
        picture = Path(d, 'a.jpg')
        Image.effect_noise((640, 480), 60).convert('RGB').save(picture)
        p, url = service(path)
        try:
            before = sizes(p.pid)
            with mm.Client(url) as c:
                for n in (1, 16): c.encode(['a red boat'] * n), c.encode([picture] * n)
            return {'load': before, 'first calls': sizes(p.pid)}
        finally: p.terminate(), p.wait()


def run(folder, names):
    weights = (folder/'fp32.pt').stat().st_size / 1e6
    with Held('torch') as t: torch = t.go('import')
    rows = [['import torch', '', *(f'{torch[k]:,.0f}' for k in ('resident', 'private', 'peak')), '', '']]
    def row(name, phase, found, base=torch['resident']):
        beyond = found['resident'] - base
        held = [f'{found[k]:,.0f}' for k in ('resident', 'private', 'peak')]
        rows.append([name, phase, *held, f'{beyond:,.0f}', f'{beyond / weights:.2f}'])
        print(*rows[-1], sep='\t', flush=True)
    for name in names:
        onnx = name.startswith('onnx')
        path = folder/(name if onnx else f'{name}.pt')
        called = name if onnx else f'{name}, {path.stat().st_size / 1e6:,.0f} MB'
        with Held(name, path) as h:
            for phase in h.steps: row(called, phase, h.go(phase), 0. if onnx else torch['resident'])
        if onnx: continue
        with Held(name, path) as a, Held(name, path) as b:
            for h in (a, b): h.go('load'), h.go('first calls')
            for h in (a, b):
                print(f'one of two processes of {name}:', {k: round(v) for k, v in sizes(h.process.pid).items()})
        for phase, found in served(path).items(): row(f'mmembed serve, {name}', phase, found)
    for name in names:
        if not (folder/f'{name}.json').exists(): continue
        most = json.loads((folder/f'{name}.json').read_text())
        beyond = (most['peak'] - torch['resident']) / weights
        print(f"export of {name}: peak {most['peak']:,.0f} MB, {most['peak'] / weights:.2f} of the weights, "
              f"{beyond:.2f} beyond torch; anonymous memory of all its processes {most['tree']:,.0f} MB")
    heads = ['process', 'after', 'MB resident', 'private', 'peak', 'beyond torch', 'of the weights']
    return dict(command='python -m benchmarks.memory run', records=dict(columns=heads, rows=rows))


def cpu(command):
    "CPU seconds of a command, user and system."
    before = os.times()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=ENV)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def answered(path):
    "CPU seconds of a service up to its first answer."
    import mmembed as mm
    p, url = service(path)
    try:
        with mm.Client(url) as c: c.encode(['a red boat'])
        ticks = Path(f'/proc/{p.pid}/stat').read_text().rpartition(')')[2].split()[11:13]
        return sum(map(float, ticks)) / os.sysconf('SC_CLK_TCK')
    finally: p.terminate(), p.wait()


def cold(folder, rounds):
    "In turns; the least counts, since anything else on the machine only adds."
    from PIL import Image
    index, path = folder/'cold.idx', folder/'fp32.pt'
    if not index.exists():
        with tempfile.TemporaryDirectory() as d:
            for i in range(8):
                Image.effect_noise((64, 64), 10 * i).convert('RGB').save(f'{d}/{i}.png')
            build = [*PYTHON, '-m', 'mmembed', 'index', 'build', str(path), d, '-o', str(index)]
            subprocess.run(build, check=True)
    found = {'import torch': [], 'mmembed search': [], 'mmembed serve': []}
    for _ in range(rounds):
        found['import torch'].append(cpu([*PYTHON, '-c', 'import torch']))
        found['mmembed search'].append(cpu([*PYTHON, '-m', 'mmembed', 'search', str(index), 'a red boat']))
        found['mmembed serve'].append(answered(path))
    base = min(found['import torch'])
    for k, v in found.items():
        least, median = min(v), statistics.median(v)
        print(f'{k:16} CPU s: least {least:.2f}, median {median:.2f}; {least / base:.2f} of torch', flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('do', choices=['prepare', 'run', 'cold', 'make'], help='`make` is what `prepare` starts')
    parser.add_argument('--files', default='runs/memory')
    parser.add_argument('--model', default='ViT-B-32', help="of `prepare`: a name of open_clip's")
    parser.add_argument('--parts', default=','.join(PARTS))
    parser.add_argument('--alone', action='store_true', help='of `prepare`: verify without a fresh process')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--json', help='the file of results that the figures go into')
    args = begun(parser)
    folder, parts = Path(args.files), args.parts.split(',')
    if args.do == 'prepare': return prepare(folder, parts, args.alone, args.model)
    if args.do == 'make': return make(folder, *parts, args.alone, args.model)
    if args.do == 'cold': return cold(folder, args.rounds)
    found = run(folder, [p for p in parts if (folder/(p if p.startswith('onnx') else f'{p}.pt')).exists()])
    if args.json: Path(args.json).write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__': main()
