"""What every room's tests share: one body run in every form of a module, what is built once a run, and the optional
real data."""
import io
import json
import os
import platform
import random
import shlex
import shutil
import signal
import site
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch._jit_internal import FunctionModifiers

from filelock import FileLock

from benchmarks import LIMITS, instruction_sets
from mmembed.core.torchscript import frozen, quietly
from mmembed.text.pipeline import TextPipeline

SHARED = 'MMEMBED_TESTS_SHARED'  # a folder of the run, for all its processes
HANG = 300  # seconds: no test decides by a clock; what takes so long hangs
FORMS = ['eager', 'scripted', 'frozen', 'loaded']


def in_form(module, form, calls=None):
    """`module` as it is, scripted, saved and loaded again; or frozen, then saved and loaded.

    `calls`: the exported methods that the test calls beside `forward`, by default all. A frozen module holds the
    whole of its code once for each, which takes
    seconds and a gigabyte to load for a tokenizer with four. So a frozen text pipeline is not loaded again here, but
    in one test a family (test_what_is_frozen_is_saved_and_loaded)."""
    module = module.eval()
    if form == 'eager': return module
    scripted = quietly(torch.jit.script, module)
    if form == 'scripted': return scripted
    if form == 'frozen':
        keep = calls or [
            m
            for m in dir(type(module))
            if getattr(getattr(type(module), m), '_torchscript_modifier', None) is FunctionModifiers.EXPORT
        ]
        scripted = frozen(scripted, preserved_attrs=keep)
        if isinstance(module, TextPipeline): return scripted
    return reloaded(scripted)


def reloaded(scripted):
    "A scripted module, saved and loaded."
    buffer = io.BytesIO()
    quietly(torch.jit.save, scripted, buffer)
    buffer.seek(0)
    return quietly(torch.jit.load, buffer)


def data_path(*parts):
    """A path in the real data (`MMEMBED_DATA`, default ../shared/data beside the checkout).

    Skips the test where it is absent."""
    root = Path(os.environ.get('MMEMBED_DATA') or Path(__file__).resolve().parents[2]/'shared'/'data')
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(f'{path.relative_to(root)} not found in {root}: set MMEMBED_DATA to run this test')
    return path


def built_once(name, build):
    """The path of `name` in the folder of the run, made by `build(path)` in the first process that asks: tests and
    workers share it."""
    path = Path(os.environ[SHARED])/name
    with FileLock(f'{path}.lock'):
        if not (done := Path(f'{path}.done')).exists():
            build(path)
            done.touch()
    return path


def until(happened):
    "Waits for an event, asked for again and again; what it returned."
    began = time.monotonic()
    while not (found := happened()):
        assert time.monotonic() - began < HANG, 'what was waited for has not happened'
        time.sleep(.02)
    return found


def free_port() -> int:
    """A port that nobody listens on, and below those that the system gives to outgoing connections, of which another
    test may open thousands before it is bound."""
    while True:
        with socket.socket() as s:
            try: s.bind(('127.0.0.1', port := random.SystemRandom().randrange(20_000, 32_000)))
            except OSError: continue
        return port


@contextmanager
def ended(process):
    """`process`, killed if it is still there at the end of the block: one that is left over would be waited for, or
    go on for ever."""
    with process:
        try: yield process
        finally: process.kill()


def interruptible():
    "For `preexec_fn`: Ctrl-C reaches the process, also where the tests run in the background, to which it is nothing."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def on_avx2(folder, program, *words, emulated=False):
    """What `program` prints last, as JSON, in a process on a smaller processor.

    Held to AVX2 by torch, oneDNN and MKL; or `emulated`: an AVX2 processor made of software (QEMU's Haswell), ten
    times as slow, on which nothing can use more."""
    if platform.machine() not in ('x86_64', 'AMD64') or 'avx2' not in instruction_sets():
        pytest.skip(f'no AVX2 to be held to: {instruction_sets()}')
    root = Path(__file__).resolve().parents[1]
    env = os.environ | {
        'OMP_NUM_THREADS': '1',
        'PYTHONPATH': os.pathsep.join(filter(None, [str(root), os.environ.get('PYTHONPATH', '')])),
    }
    python = sys.executable
    if emulated:
        if not shutil.which('qemu-x86_64'): pytest.skip('qemu-x86_64 is not installed (qemu-user)')
        python = Path(folder)/'python'  # what it starts itself is emulated, too
        python.write_text(
            f'#!/bin/sh\nexec qemu-x86_64 -cpu Haswell {shlex.quote(os.path.realpath(sys.executable))} "$@"\n'
        )
        python.chmod(0o755)
        env['PYTHONPATH'] += os.pathsep + os.pathsep.join(site.getsitepackages())
        program = f'import sys; sys.executable = {str(python)!r}\n{program}'
    done = subprocess.run(
        [python, '-c', program, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=root,
        env=env if emulated else env | LIMITS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def needs_exact_int8():
    "Skips where oneDNN is held to less than the processor has, and then saturates sums of int8 products."
    from mmembed.exporters.int8 import exact_products
    if not exact_products(): pytest.skip(f'products of int8 saturate here: {instruction_sets()}')
