import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from datetime import date
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')  # tests never reach for a hub
# no test depends on a choice that is timed; those of the choice itself delete this
os.environ.setdefault('MMEMBED_KERNELS', 'onednn')
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')  # before torch: threads that wait must not spin
cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
workers = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 1))
os.environ.setdefault('OMP_NUM_THREADS', str(max(1, cores // workers)))  # workers share the cores

import pytest
import torch

from benchmarks import instruction_sets
from mmembed.core.threads import give_back

from tests.helpers import SHARED

# As the runtimes have it. Both executors have quirks of their own: the notebooks run the profiling one, with functions
# written out in their callers.
torch._C._jit_set_profiling_mode(False)
torch._C._get_graph_executor_optimize(False)
FOLDER = pytest.StashKey()
WEEKLY = Path(__file__).resolve().parents[1]/'benchmarks'/'results'/'weekly.json'


def pytest_addoption(parser):
    parser.addoption(
        '--weekly',
        action='store_true',
        help=f'run the weekly set instead of the others, and record it in {WEEKLY.name}',
    )


def pytest_configure(config):
    "What tests build for one another lies in a folder of the whole run, and goes with it."
    if SHARED not in os.environ: os.environ[SHARED] = config.stash[FOLDER] = tempfile.mkdtemp(prefix='mmembed-tests-')


def pytest_unconfigure(config):
    if FOLDER in config.stash: shutil.rmtree(os.environ.pop(SHARED), ignore_errors=True)


def pytest_report_header():
    return f'processor: {instruction_sets()}'


def pytest_runtest_setup(item):
    """Lightning's log handler keeps the stderr of the moment it was imported in, which a test that captures output
    has closed."""
    for handler in logging.getLogger('lightning').handlers:
        if type(handler) is logging.StreamHandler: handler.stream = sys.stderr  # setStream would flush the closed one


def pytest_runtest_teardown(item, nextitem):
    """What a module's tests kept for one another goes with the last of them.

    And memory that is free goes back to the system, which glibc would keep."""
    over = getattr(nextitem, 'module', None) is not item.module
    if over:
        for made in vars(item.module).values():
            if hasattr(made, 'cache_clear') and made.__module__ == item.module.__name__: made.cache_clear()
    if over or resident() > Spent.resident + (500 << 20):
        give_back()
        Spent.resident = resident()


def pytest_runtest_logstart():
    Spent.since = cpu()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    "A report carries the CPU seconds of its phase, for the totals at the end."
    report = yield
    report.cpu, Spent.since = cpu() - Spent.since, cpu()
    return report


def pytest_terminal_summary(terminalreporter, config):
    "Prints how much each folder of tests took: what a slow machine, or a slow test, changes is seen."
    tests, seconds, spent = Counter(), Counter(), Counter()
    for report in (r for rows in terminalreporter.stats.values() for r in rows if hasattr(r, 'cpu')):
        folder = str(Path(report.nodeid.partition('::')[0]).parent)
        tests[folder] += report.when == 'call'
        seconds[folder] += report.duration
        spent[folder] += report.cpu
    terminalreporter.section(f'by folder ({instruction_sets()})')
    for folder, s in seconds.most_common():
        terminalreporter.line(f'{folder:16}{tests[folder]:6} tests {s:8.0f} s {spent[folder]:8.0f} s of CPU')
    if config.getoption('weekly') and not config.getoption('collectonly'): record(terminalreporter.stats)
    terminalreporter.line(last_weekly())


def pytest_collection_modifyitems(config, items):
    "The weekly set or the others; the longest first: notebooks, a folder at a time."
    weekly = config.getoption('weekly')
    left_out = [item for item in items if (item.get_closest_marker('weekly') is not None) != weekly]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    items.sort(key=lambda item: 'notebooks_run' not in item.name)


def record(stats):
    "Writes what the weekly set gave."
    rows = {
        r.nodeid: dict(outcome=kind, seconds=round(r.duration, 1))
        for kind in ('passed', 'failed', 'error', 'skipped')
        for r in stats.get(kind, [])
        if r.when == 'call' or kind != 'passed'
    }
    commit = subprocess.run(
        ['git', 'rev-parse', '--short', 'HEAD'], cwd=WEEKLY.parent, capture_output=True, text=True
    ).stdout.strip()
    last = json.loads(WEEKLY.read_text()) if WEEKLY.exists() else {}
    if last.get('commit') == commit: rows = last['tests'] | rows  # what is run again replaces its own row
    WEEKLY.write_text(
        json.dumps(
            dict(
                date=date.today().isoformat(),
                commit=commit,
                processor=instruction_sets(),
                torch=torch.__version__,
                tests=rows,
            ),
            indent=1,
        )
        + '\n'
    )


def last_weekly() -> str:
    "When the weekly set last ran, and how it went."
    if not WEEKLY.exists(): return 'weekly set: never run (make weekly)'
    last = json.loads(WEEKLY.read_text())
    outcomes = Counter(row['outcome'] for row in last['tests'].values())
    days = (date.today() - date.fromisoformat(last['date'])).days
    told = ', '.join(f'{n} {kind}' for kind, n in outcomes.items())
    return f"weekly set: {told}, {days} days ago at {last['commit']} (make weekly)"


class Spent:
    since, resident = 0., 0


def resident() -> int: # bytes of memory that this process has, 0 where the system does not say
    try: return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')
    except OSError: return 0


def cpu() -> float: # seconds, of this process and of those that it has waited for
    return sum(os.times()[:4])
