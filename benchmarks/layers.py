"""One linear layer by every kernel that could compute it: what makes an artifact of fp32, int8, bf16 or fp16 quick
on one processor and slow on another.

    python -m benchmarks.layers --both --json benchmarks/results/layers.json

Milliseconds of CPU of a call on one thread, for the layers of a vision transformer of 768 numbers: each contestant
has eight layers of the same shape, whose weights do not stay in the
cache from one call to the next, as in a tower; contestants take turns, and the median of the rounds counts. `--both`
asks a second process too, in which torch, oneDNN and MKL are held to AVX2:
a big processor behaves nearly like a small one then, not quite. A contestant that has run for more than five seconds
in its first turn is not asked again. Contestants:

    torch        nn.Linear in float32, and a GELU: what `portable=True` has
    oneDNN       the same with packed weights: `export.kernels.Linear`, what an exported tower has
    int8         `export.variants.Int8Linear`, as a file of `quantize='int8'` has it, whichever kernel it chooses;
    inputs are brought to int8 and back
    _int_mm      the product of int8 by int8 alone, by torch; it asks the processor itself, so that `--both` does not
    show its plain loop, 68 times as slow as fp32 on a real AVX2 machine
    qlinear      the same by oneDNN, packed, inputs of 8 bits
    bf16, fp16   nn.Linear in half precision, and a GELU
"""
import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import LIMITS, begun, held, instruction_sets
from mmembed.core.torchscript import quietly
from mmembed.exporters.onednn import Linear
from mmembed.exporters.int8 import Int8Linear, multiplied
from mmembed.runtime.artifact import prepack

SHAPES = (768, 3072), (3072, 768), (768, 2304)
ROWS = 1, 8, 50, 400
COPIES = 8
NAMES = 'torch', 'oneDNN', 'int8', '_int_mm', 'qlinear', 'bf16', 'fp16'


def contestants(layers: list[nn.Linear], x: torch.Tensor, gelu: bool) -> dict:
    "Functions of a number, each of which calls one of the layers."
    act, packed, int8, codes = (
        F.gelu if gelu else (lambda y: y),
        [],
        [],
        torch.randint(0, 127, x.shape, dtype=torch.uint8),
    )
    for layer in layers:
        packed.append(quietly(torch.jit.script, Linear(copy.deepcopy(layer), gelu).eval()))
        int8.append(Int8Linear(layer, gelu=gelu).eval())
    plain, ready = [m.weight.t() for m in int8], [torch.ops.onednn.qlinear_prepack(m.weight, None) for m in int8]
    scripted, signed, step = [quietly(torch.jit.script, m) for m in int8], codes.view(torch.int8), int8[0].step
    for m in (*packed, *scripted): prepack(m)
    out = {
        'torch': lambda i: act(layers[i](x)),
        'oneDNN': lambda i: packed[i](x),
        'int8': lambda i: scripted[i](x),
        '_int_mm': lambda i: torch._int_mm(signed, plain[i]),
        'qlinear': lambda i: multiplied(codes, ready[i], step, 0),
    }
    for name, dtype in (('bf16', torch.bfloat16), ('fp16', torch.float16)):
        half, y = [copy.deepcopy(layer).to(dtype) for layer in layers], x.to(dtype)
        out[name] = lambda i, half=half, y=y: act(half[i](y))
    return out


def measured(rounds: int, seconds: float, rows: tuple, shapes: tuple) -> list[dict]:
    "Records {sets, layer, rows, ms: by contestant}."
    torch.set_num_threads(1)
    torch._C._jit_set_profiling_mode(False)
    torch.manual_seed(0)
    out = []
    for a, b in shapes:
        layers = [nn.Linear(a, b).eval().requires_grad_(False) for _ in range(COPIES)]
        for n in rows:
            every, times = contestants(layers, torch.randn(n, a), b == 4 * a), {}
            for turn in range(rounds + 1):
                for name, f in every.items():
                    if times.get(name) and times[name][0] > 5: continue
                    calls, start = 0, time.process_time()
                    while not calls or time.process_time() - start < seconds and turn:
                        f(calls % COPIES)
                        calls += 1
                    took = (time.process_time() - start) / calls
                    if turn or took > 5: times.setdefault(name, []).append(took)
            out.append(
                dict(
                    sets=instruction_sets(),
                    held=held(),
                    layer=f"{a} → {b}{' + GELU' if b == 4 * a else ''}",
                    rows=n,
                    ms={k: round(1e3 * statistics.median(v), 3) for k, v in times.items()},
                )
            )
            print(json.dumps(out[-1], ensure_ascii=False), file=sys.stderr, flush=True)
    return out


def tabled(found: list[dict]) -> dict:
    "Columns and rows as tools/tables.py shows them, and how far int8 is ahead of the faster of the two in fp32."
    columns = ['processor', 'layer', 'rows', *NAMES, 'int8, times fp32']

    def line(r):
        return [
            'AVX2, imitated' if r['held'] else 'as it is',
            r['layer'],
            r['rows'],
            *(f"{r['ms'][n]:,.2f}" for n in NAMES),
            f"{min(r['ms']['torch'], r['ms']['oneDNN']) / r['ms']['int8']:.2f}",
        ]
    return dict(columns=columns, rows=[line(r) for r in found])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--both', action='store_true', help='this processor as it is, and in a second process held to AVX2'
    )
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--seconds', type=float, default=.1, help='of a turn')
    parser.add_argument('--quick', action='store_true', help='one shape, one row: to see that everything works')
    parser.add_argument('--records', action='store_true', help='print the records of this process alone, as JSON')
    parser.add_argument('--json', help='the file of results that the figures go into')
    args = begun(parser)
    if not torch.backends.mkldnn.is_available():
        raise SystemExit('this torch has no oneDNN: there is nothing to compare')
    found = measured(args.rounds, args.seconds, *((ROWS[:1], ((64, 128),)) if args.quick else (ROWS, SHAPES)))
    if args.records: return print(json.dumps(found))
    if args.both:
        words = ['--rounds', args.rounds, '--seconds', args.seconds, '--records', *['--quick'] * args.quick]
        done = subprocess.run(
            [sys.executable, '-W', 'ignore', '-m', 'benchmarks.layers', *map(str, words)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env=os.environ | LIMITS,
        )
        found += json.loads(done.stdout.splitlines()[-1])
    table = tabled(found)
    for line in (table['columns'], ['---'] * len(table['columns']), *table['rows']):
        print('| ' + ' | '.join(map(str, line)) + ' |')
    command = 'python -m benchmarks.layers --both'
    if args.json:
        Path(args.json).write_text(
            json.dumps(
                dict(kind='plain', command=command, processor=found[0]['sets'], found=found, records=table),
                indent=0,
                ensure_ascii=False,
            )
            + '\n'
        )


if __name__ == '__main__': main()
