import logging
import os
import sys

os.environ.setdefault('HF_HUB_OFFLINE', '1')  # tests never reach for a hub
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')  # before torch: threads that wait must not spin

import torch

# As the runtimes have it. Both executors have quirks of their own: the notebooks run the profiling one.
torch._C._jit_set_profiling_mode(False)


def pytest_runtest_setup(item):
    "Lightning's log handler keeps the stderr of the moment it was imported in, which a test that captures output has closed."
    for handler in logging.getLogger('lightning').handlers:
        if type(handler) is logging.StreamHandler: handler.stream = sys.stderr  # setStream would flush the closed one


def pytest_collection_modifyitems(items):
    "The longest first: notebooks, a folder at a time."
    items.sort(key=lambda item: 'notebooks_run' not in item.name)
