"""A test in a process of its own: what passes only because another test scripted or traced something before fails
there.

One process with the libraries loaded, in which nothing was ever made, is forked for each such test: that costs tens
of milliseconds."""
import atexit
import functools
import importlib
import os
import pickle
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

LIBRARIES = [
    'torch',
    'torchvision',
    'torchcodec',
    'open_clip',
    'timm',
    'transformers',
    'mmembed.exporters.verify.verify',
    'mmembed.models.dual',
    # as a user's process loads them before it makes a model
    'mmembed.models.pair',
    'mmembed.models.transformers',
]


def alone(setup=lambda: None):
    "Runs a test in a process of its own, after `setup()`, since fixtures stay behind; parameters must pickle."
    def decorate(test):
        @functools.wraps(test)
        def run(**kwargs):
            kind, text = ask((test.__module__, test.__name__, kwargs))
            if kind == 'skipped': pytest.skip(text)
            assert kind == 'passed', text
        run.setup, run.test = setup, test
        return run
    return decorate


@functools.cache
def server():
    root = Path(__file__).resolve().parents[1]
    paths = os.pathsep.join([str(root), *(p for p in os.environ.get('PYTHONPATH', '').split(os.pathsep) if p)])
    p = subprocess.Popen(
        [sys.executable, '-m', 'tests.alone'],
        cwd=root,
        env=os.environ | {'PYTHONPATH': paths},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    atexit.register(p.stdin.close)  # which ends it
    return p


def ask(message):
    p = server()
    pickle.dump(message, p.stdin)
    p.stdin.flush()
    return pickle.load(p.stdout)


def outcome(module, name, kwargs):
    try:
        found = getattr(importlib.import_module(module), name)
        found.setup()
        found.test(**kwargs)
        return 'passed', ''
    except pytest.skip.Exception as e: return 'skipped', str(e)
    except BaseException: return 'failed', traceback.format_exc()


def serve():
    "Answers each message from a process of its own."
    answers, messages = os.fdopen(os.dup(1), 'wb'), sys.stdin.buffer
    os.dup2(2, 1)  # what tests print must not come among the answers
    for name in LIBRARIES: importlib.import_module(name)
    importlib.import_module('tests.conftest')
    while True:
        try: message = pickle.load(messages)
        except EOFError: return
        receive, send = os.pipe()
        if (pid := os.fork()) == 0:
            with os.fdopen(send, 'wb') as out: pickle.dump(outcome(*message), out)
            os._exit(0)
        os.close(send)
        with os.fdopen(receive, 'rb') as given: answer = given.read()
        _, status = os.waitpid(pid, 0)
        pickle.dump(
            pickle.loads(answer)
            if answer
            else ('failed', f'the process ended with {os.waitstatus_to_exitcode(status)}'),
            answers,
        )
        answers.flush()


if __name__ == '__main__': serve()
