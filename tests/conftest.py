import logging
import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')  # tests never reach for a hub
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')  # before torch: threads that wait must not spin
workers = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 1))
os.environ.setdefault('OMP_NUM_THREADS', str(max(1, len(os.sched_getaffinity(0)) // workers)))  # workers share the cores

import pytest
import torch

from .helpers import SHARED, instruction_sets

# As the runtimes have it. Both executors have quirks of their own: the notebooks run the profiling one.
torch._C._jit_set_profiling_mode(False)
FOLDER, CLOCK = pytest.StashKey(), pytest.StashKey()


def pytest_configure(config):
    "What tests build for one another lies in a folder of the whole run, and goes with it."
    if SHARED not in os.environ: os.environ[SHARED] = config.stash[FOLDER] = tempfile.mkdtemp(prefix='mmembed-tests-')


def pytest_unconfigure(config):
    if FOLDER in config.stash: shutil.rmtree(os.environ.pop(SHARED), ignore_errors=True)


def pytest_report_header():
    return f'processor: {instruction_sets()}'


def pytest_runtest_setup(item):
    "Lightning's log handler keeps the stderr of the moment it was imported in, which a test that captures output has closed."
    for handler in logging.getLogger('lightning').handlers:
        if type(handler) is logging.StreamHandler: handler.stream = sys.stderr  # setStream would flush the closed one


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


def pytest_collection_modifyitems(items):
    "The longest first: notebooks, a folder at a time."
    items.sort(key=lambda item: 'notebooks_run' not in item.name)


class Spent:
    since = 0.


def cpu() -> float: # seconds, of this process and of those that it has waited for
    return sum(os.times()[:4])
