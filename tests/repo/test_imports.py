"""Running an artifact needs no training code: what the modules of the rooms that do so import, each in a process of
its own."""
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRAINING = {'lightning', 'transformers', 'tokenizers', 'open_clip'}
# rooms of ours that a room does without; the pipelines of `data` are what a model is trained with
WITHOUT = {room: {'text', 'models', 'train', 'exporters'} for room in ('runtime', 'serve', 'retrieval')} | {
    'data': set()
}
MODULES = [
    f'mmembed.{room}.{path.stem}'
    for room in WITHOUT
    for path in sorted((ROOT/'mmembed'/room).glob('*.py'))
    if path.stem != '__init__'
]
PROGRAM = '''
import importlib, json, os, sys
import torch
for name in sys.argv[1:]:
    if os.fork(): os.wait(); continue # torch is imported once, each module in a process that has only seen torch
    try: importlib.import_module(name)
    except ImportError as e: found = f'{type(e).__name__}: {e}'
    else: found = sorted(sys.modules)
    print(json.dumps([name, found]), flush=True)
    os._exit(0)
'''


@functools.cache
def imported() -> dict: # module: the names that it loads, or the error of an extra that is not installed
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', PROGRAM, *MODULES],
        capture_output=True,
        text=True,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-1000:]
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize('module', MODULES)
def test_running_an_artifact_needs_no_training_code(module):
    names = imported()[module]
    if isinstance(names, str):
        assert 'mmembed' not in names, names
        pytest.skip(names)
    assert not {n.partition('.')[0] for n in names} & TRAINING
    ours = {n.split('.')[1] for n in names if n.startswith('mmembed.')}
    assert not ours & WITHOUT[module.split('.')[1]]
