"""What the benchmarks share: they say which instructions the figures were made with, and can be held to those of a
smaller processor."""
import os
import platform
import sys
from pathlib import Path

# of torch, oneDNN and MKL
LIMITS = dict(ATEN_CPU_CAPABILITY='avx2', ONEDNN_MAX_CPU_ISA='AVX2', MKL_ENABLE_INSTRUCTIONS='AVX2')
TOLD = 'MMEMBED_BENCHMARK' # set in what a benchmark starts: one line a run is enough


def instruction_sets() -> str:
    "What this processor can do that decides speed and rounding, and what the environment holds it to."
    import torch

    try:
        flags = set(
            next(
                line
                for line in Path('/proc/cpuinfo').read_text().splitlines()
                if line.startswith(('flags', 'Features'))
            ).split()
        )
    except (OSError, StopIteration):
        flags = set()
    known = [
        f
        for f in (
            'avx2', 'avx_vnni', 'avx512f', 'avx512_vnni', 'avx512_bf16', 'avx512_fp16', 'amx_bf16', 'amx_int8',
            'asimd', 'bf16', 'i8mm',
        )
        if f in flags
    ]
    held = [f'{k}={os.environ[k]}' for k in LIMITS if k in os.environ]
    return ', '.join(
        [
            f'{platform.machine()}, torch uses {torch.backends.cpu.get_cpu_capability()}',
            *([' '.join(known)] if known else []),
            *held,
        ]
    )


def held() -> bool:
    "Whether this process is held to AVX2."
    return all(os.environ.get(k) == v for k, v in LIMITS.items())


def begun(parser):
    """The arguments that `parser` finds; with --avx2 the whole command starts again, held to AVX2.

    Prints the processor's instruction sets."""
    parser.add_argument(
        '--avx2',
        action='store_true',
        help='hold torch, oneDNN and MKL to AVX2; what is built on none of them (tokenizers, Pillow, ONNX Runtime) '
        'uses what the processor has, and a row that is held down on a bigger processor is an imitation',
    )
    args = parser.parse_args()
    if args.avx2 and not held():
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, os.environ | LIMITS)
    if TOLD not in os.environ:
        print(f'processor: {instruction_sets()}', flush=True)
        os.environ[TOLD] = '1'
    return args
