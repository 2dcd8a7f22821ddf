"""A short run of benchmarks/fuzz_vision.py; the long one is `python -m benchmarks.fuzz_vision --n 50000`."""
import subprocess
import sys
from pathlib import Path

from tests.helpers import HANG

ROOT = Path(__file__).resolve().parents[2]


def test_mutated_files_never_crash_or_hang():
    command = [sys.executable, '-W', 'ignore', '-m', 'benchmarks.fuzz_vision', '--n', '2000', '--seed', '7']
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG)
    assert run.returncode == 0, run.stdout + run.stderr
    assert '0 crashes' in run.stdout and 'decoded' in run.stdout
