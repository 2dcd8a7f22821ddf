"""What a process holds: torch alone, an artifact loaded and asked, two of them, the service, the ONNX host, and an export at its peak.

    python -m benchmarks.memory prepare    # exports ViT-B-32 into runs/memory as fp32, int8 and ONNX, each in a process that is watched (minutes)
    python -m benchmarks.memory run        # loads what is there and asks it, one contestant at a time
    python -m benchmarks.memory cold       # CPU seconds to a first right answer of `mmembed search` and `mmembed serve`, and of `import torch`

Linux alone: sizes are those of /proc/PID/smaps_rollup. `resident` counts every page that a process maps, `proportional` (Pss) those that n processes share as an nth, and so adds up,
`private` those that nobody else has. `peak` is VmHWM. `beyond torch` is what a process that only imported torch does not have. Weights are random, which changes no size.
One thread, as a second changes little; glibc keeps what is freed in a heap for each thread that allocates, so a service with more decoding threads may hold some MB more.
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

PARTS = {'fp32': {}, 'int8': {'quantize': 'int8'}, 'onnx': {}}
PICTURES = "[torch.randint(0, 256, (3, 480, 640), dtype=torch.uint8, generator=torch.Generator().manual_seed(i)) for i in range({n})]"
TEXTS = "['a photo of a red boat in a small harbour', 'two dogs'] * {n}"
TORCH = 'import torch; torch.set_num_threads(1)'
LOADED = [('load', TORCH + '; import mmembed as mm; e = mm.load({path!r})'),
          ('first calls', f'e.encode_text({TEXTS.format(n=1)}); e.encode_image({PICTURES.format(n=1)})'),
          ('batches of 64', f'e.encode_text({TEXTS.format(n=32)}); e.encode_image({PICTURES.format(n=64)})')]
PHASES = {
    'torch': [('import', TORCH)],
    'fp32': LOADED, 'int8': LOADED,
    'onnx': [('load', 'import sys; sys.path.insert(0, {path!r}); import numpy as np; from embed import OnnxModel; e = OnnxModel({path!r})'),
             ('first calls', f"e.encode_text({TEXTS.format(n=1)}); e.encode_image([np.zeros((480, 640, 3), np.uint8)])"),
             ('batches of 64', f"e.encode_text({TEXTS.format(n=32)}); e.encode_image([np.zeros((480, 640, 3), np.uint8)] * 64)")]}


def status(pid, name):
    "MB of one line of /proc/PID/status."
    return int(re.search(rf'{name}:\s+(\d+) kB', Path(f'/proc/{pid}/status').read_text())[1]) * 1.024 / 1e3


def sizes(pid='self'):
    "MB of a process."
    mb = {k: int(v) * 1.024 / 1e3 for k, v in re.findall(r'(\w+):\s+(\d+) kB', Path(f'/proc/{pid}/smaps_rollup').read_text())}
    return dict(resident=mb['Rss'], proportional=mb['Pss'], private=mb['Private_Clean'] + mb['Private_Dirty'], peak=status(pid, 'VmHWM'))


def family(pid):
    "A process and those that it started."
    found = [pid]
    for task in Path(f'/proc/{pid}/task').glob('*/children'): found += [p for child in task.read_text().split() for p in family(int(child))]
    return found


class Held:
    "A process that goes through the phases of a contestant when it is told to, and stays."
    def __init__(self, name, path=''):
        steps = [(phase, code.replace('{path!r}', repr(str(path)))) for phase, code in PHASES[name]]
        program = 'import json, sys\nfor line in sys.stdin: exec(json.loads(line)); print("done", flush=True)'
        self.steps, self.process = dict(steps), subprocess.Popen([sys.executable, '-W', 'ignore', '-c', program], text=True, env=os.environ | {'OMP_NUM_THREADS': '1'},
                                                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def go(self, phase):
        print(json.dumps(self.steps[phase]), file=self.process.stdin, flush=True)
        if self.process.stdout.readline().strip() != 'done': raise RuntimeError(f'{phase}: the process ended')
        return sizes(self.process.pid)

    def __enter__(self): return self
    def __exit__(self, *_): self.process.stdin.close(), self.process.wait()


def prepare(folder, parts, fresh):
    "Each export in a process of its own; what it held at its peak goes into NAME.json."
    folder.mkdir(parents=True, exist_ok=True)
    for name in parts:
        child = subprocess.Popen([sys.executable, '-W', 'ignore', '-m', 'benchmarks.memory', 'make', '--files', str(folder), '--parts', name, *['--alone'] * (not fresh)], env=os.environ | {'OMP_NUM_THREADS': '1'})
        most = {'tree': 0., 'peak': 0.}
        while child.poll() is None:
            try: most = {'tree': max(most['tree'], sum(status(p, 'RssAnon') for p in family(child.pid))), 'peak': max(most['peak'], status(child.pid, 'VmHWM'))}
            except (OSError, TypeError): pass  # it has just ended
            time.sleep(.5)
        if child.returncode: raise SystemExit(f'{name}: the export failed')
        (folder/f'{name}.json').write_text(json.dumps(most))
        print(name, most, flush=True)


def make(folder, name, fresh):
    "What the process of `prepare` does: a model as a user has it, one export."
    import torch
    torch.set_num_threads(1)
    from mmembed.models.dual import DualEncoder
    torch.manual_seed(0)
    model = DualEncoder.from_open_clip('ViT-B-32').eval()
    print('model', {k: round(v) for k, v in sizes().items()}, flush=True)
    if name == 'onnx':
        from mmembed.export.onnx import export_onnx
        return export_onnx(model, folder/name)
    from mmembed.export.verify import export
    export(model, folder/f'{name}.pt', fresh=fresh, cpp=False, **PARTS[name])


def served(path):
    "What `mmembed serve` holds after its first answers."
    import mmembed as mm
    from PIL import Image
    with tempfile.TemporaryDirectory() as d:
        Image.effect_noise((640, 480), 60).convert('RGB').save(f'{d}/a.jpg')
        p = subprocess.Popen([sys.executable, '-W', 'ignore', '-m', 'mmembed', 'serve', str(path), '--port', '0', '--threads', '1', '--decoders', '1', '--log', f'{d}/log'],
                             stdout=subprocess.PIPE, text=True)
        try:
            port = json.loads(p.stdout.readline())['http']
            before, c = sizes(p.pid), mm.Client(f'http://127.0.0.1:{port}')
            for n in (1, 16): c.encode(['a red boat'] * n), c.encode([Path(d, 'a.jpg')] * n)
            return {'load': before, 'first calls': sizes(p.pid)}
        finally: p.terminate(), p.wait()


def run(folder, names):
    weights = (folder/'fp32.pt').stat().st_size / 1e6
    with Held('torch') as t: torch = t.go('import')
    rows = [['import torch', '', *(f'{torch[k]:,.0f}' for k in ('resident', 'private', 'peak')), '', '']]
    def row(name, phase, found, base=torch['resident']):
        beyond = found['resident'] - base
        rows.append([name, phase, *(f'{found[k]:,.0f}' for k in ('resident', 'private', 'peak')), f'{beyond:,.0f}', f'{beyond / weights:.2f}'])
        print(*rows[-1], sep='\t', flush=True)
    for name in names:
        path = folder/('onnx' if name == 'onnx' else f'{name}.pt')
        with Held(name, path) as h:
            for phase in h.steps: row(f"{name}{'' if name == 'onnx' else f', {path.stat().st_size / 1e6:,.0f} MB'}", phase, h.go(phase), 0. if name == 'onnx' else torch['resident'])
    for name in [n for n in names if n != 'onnx']:
        with Held(name, folder/f'{name}.pt') as a, Held(name, folder/f'{name}.pt') as b:
            for h in (a, b): h.go('load'), h.go('first calls')
            both = [sizes(h.process.pid) for h in (a, b)]
            print(f'two processes of {name}: proportional', *(f"{s['proportional']:,.0f}" for s in both), 'private', *(f"{s['private']:,.0f}" for s in both), flush=True)
        for phase, found in served(folder/f'{name}.pt').items(): row(f'mmembed serve, {name}', phase, found)
    for name in names:
        if (note := folder/f'{name}.json').exists():
            most = json.loads(note.read_text())
            print(f"export of {name}: peak {most['peak']:,.0f} MB, {most['peak'] / weights:.2f} of the weights, beyond torch {(most['peak'] - torch['resident']) / weights:.2f}; with its fresh process {most['tree']:,.0f} MB that are no file's")
    return dict(command='python -m benchmarks.memory run', records=dict(columns=['process', 'after', 'MB resident', 'private', 'peak', 'beyond torch', 'of the weights'], rows=rows))


def cpu(command, **kwargs):
    "CPU seconds of a command, user and system, its children included."
    before = os.times()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {'OMP_NUM_THREADS': '1'}, **kwargs)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def cold(folder, rounds):
    "Interleaved; the least counts, since anything else on the machine only adds."
    from PIL import Image
    import mmembed as mm
    index, path = folder/'cold.idx', folder/'fp32.pt'
    if not index.exists():
        with tempfile.TemporaryDirectory() as d:
            for i in range(8): Image.effect_noise((64, 64), 10 * i).convert('RGB').save(f'{d}/{i}.png')
            subprocess.run([sys.executable, '-m', 'mmembed', 'index', 'build', str(path), d, '-o', str(index)], check=True)
    python = [sys.executable, '-W', 'ignore']
    def service():
        before = os.times()
        p = subprocess.Popen([*python, '-m', 'mmembed', 'serve', str(path), '--port', '0', '--threads', '1', '--log', os.devnull], stdout=subprocess.PIPE, text=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
        port = json.loads(p.stdout.readline())['http']
        mm.Client(f'http://127.0.0.1:{port}').encode(['a red boat'])
        spent = sum(map(float, Path(f'/proc/{p.pid}/stat').read_text().rpartition(')')[2].split()[11:13])) / os.sysconf('SC_CLK_TCK')
        p.terminate(), p.wait()
        return spent
    found = {'import torch': [], 'mmembed search': [], 'mmembed serve': []}
    for _ in range(rounds):
        found['import torch'].append(cpu([*python, '-c', 'import torch']))
        found['mmembed search'].append(cpu([*python, '-m', 'mmembed', 'search', str(index), 'a red boat']))
        found['mmembed serve'].append(service())
    least = {k: min(v) for k, v in found.items()}
    for k, v in found.items(): print(f'{k:16} CPU s: least {min(v):.2f}, median {statistics.median(v):.2f}, {least[k] / least["import torch"]:.2f} of torch', flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('do', choices=['prepare', 'run', 'cold', 'make'], help='`make` is what `prepare` starts')
    parser.add_argument('--files', default='runs/memory')
    parser.add_argument('--parts', default=','.join(PARTS))
    parser.add_argument('--alone', action='store_true', help='of `prepare`: verify in its own process, without a fresh one')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--json', help='the file of results that the figures go into')
    args = parser.parse_args()
    folder, parts = Path(args.files), args.parts.split(',')
    if args.do == 'prepare': return prepare(folder, parts, not args.alone)
    if args.do == 'make': return make(folder, *parts, not args.alone)
    if args.do == 'cold': return cold(folder, args.rounds)
    found = run(folder, [p for p in parts if (folder/('onnx' if p == 'onnx' else f'{p}.pt')).exists()])
    if args.json: Path(args.json).write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__': main()
