"""The C++ host under the address, leak and undefined-behaviour sanitizers: its test program, every case of `verify`,
and thousands of calls.

    python -m benchmarks.sanitize                  # = make sanitize: builds build/sanitize, minutes
    python -m benchmarks.sanitize --calls 1000

The header's code and the programs' are instrumented, libtorch is not; what the sanitizers say of libtorch's own
allocations is suppressed by tests/cpp/lsan.supp.
"""
import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

from mmembed.exporters.verify import samples as cases, cpp as host
from mmembed.exporters.verify.verify import verify

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT/'build'/'sanitize'
# freed memory is kept back for a while, which the leak loop would take for growth; libtorch is compiled without
# instrumentation: containers that it fills, and globals that several of its libraries define, look wrong from outside
SETTINGS = dict(
    ASAN_OPTIONS='detect_leaks=1:detect_container_overflow=0:detect_odr_violation=0:abort_on_error=0:exitcode=66:quarantine_size_mb=4',
    UBSAN_OPTIONS='print_stacktrace=1:halt_on_error=1',
    LSAN_OPTIONS=f"suppressions={ROOT / 'tests' / 'cpp' / 'lsan.supp'}:print_suppressions=0",
)


def build() -> Path:
    "The folder with the instrumented programs; raises `RuntimeError` when they do not compile."
    if why := host.why_no_host(): raise RuntimeError(why)
    defines = [
        '-DMMEMBED_SANITIZE=ON',
        '-DMMEMBED_TESTS=ON',
        '-DCMAKE_BUILD_TYPE=RelWithDebInfo',
        f'-DPython_EXECUTABLE={sys.executable}',
    ]
    for command in (
        [host._cmake(), '-S', ROOT / 'cpp', '-B', FOLDER, *defines],
        [host._cmake(), '--build', FOLDER, '-j2', '--target', 'mmembed_cli', 'mmembed_test'],
    ):
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
        if done.returncode: raise RuntimeError((done.stdout + done.stderr)[-3000:])
    return FOLDER


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--calls', type=int, default=200, help='rounds of the leak loop, nine calls each')
    args = parser.parse_args()
    from tests.export import tiny
    folder, failed = build(), False
    os.environ.update(SETTINGS)
    torch.set_num_threads(1)
    picture = tiny.folder()/'photo.jpg'
    picture.write_bytes(cases.images()['exif 6.jpg'])

    def ran(name, *command):
        nonlocal failed
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, errors='replace')
        reports = [line for line in done.stderr.splitlines() if 'ERROR: ' in line or 'runtime error' in line]
        failed |= bool(done.returncode or reports)
        print(
            f'{name}: exit status {done.returncode}, reports {len(reports)}, printed {done.stdout.strip()[:80]!r}',
            *reports,
            *(done.stderr.splitlines()[-30:] if done.returncode else []),
            sep='\n  ',
            flush=True,
        )
    ran('test program', folder/'mmembed_test', tiny.artifact(), tiny.pair_artifact(), picture)
    ran(
        f'{args.calls} rounds of nine calls', folder / 'mmembed_test', '--leak', tiny.artifact(),
        tiny.pair_artifact(), picture, args.calls,
    )
    for name, path, model in (
        ('embeds', tiny.artifact(), tiny.model()),
        ('decoded RGB', tiny.artifact(False), tiny.model()),
        ('pairs', tiny.pair_artifact(), tiny.pair_model()),
    ):
        rows = [r for r in verify(path, model, fresh=False, cpp=folder/'mmembed_cli').rows if r.stage == 'c++']
        failed |= not rows or not all(r.ok for r in rows)
        print(
            f'verify, {name}: {sum(r.n for r in rows):,} values, ' + ', '.join(f'{r.what} {r.verdict}' for r in rows),
            flush=True,
        )
    sys.exit(failed)


if __name__ == '__main__': main()
