import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from mmembed.exporters.verify import samples as cases
from mmembed.serve.engine import Options
from mmembed.serve.server import running
from mmembed.serve.service import Config

from tests.exporters import tiny
from tests.helpers import HANG

os.environ.setdefault('OMP_NUM_THREADS', '1')  # for the servers: tests share few cores


def config(log, **options):
    "A server's configuration for tests; `engine` and other fields by name."
    engine = {k: options.pop(k) for k in list(options) if k in Options._fields}
    return Config(
        tiny.artifact(),
        port=0,
        grpc_port=0,
        log=str(log),
        engine=Options(**dict(batch=8, decoders=2) | engine),
        **options,
    )


@pytest.fixture(scope='session')
def log(tmp_path_factory): return tmp_path_factory.mktemp('serve')/'access.jsonl'


@pytest.fixture(scope='session')
def server(log):
    "One server for all tests that leave it as it is."
    with running(config(log, fetch_hosts=('127.0.0.1:*',), max_items=64, max_body=2 << 20)) as s:
        yield s
        if s.process.poll() is not None: pytest.fail('the server has died')
    assert s.process.returncode == 0


@pytest.fixture(scope='session')
def http(server):
    with httpx2.Client(base_url=server.url, timeout=HANG) as c: yield c


@pytest.fixture(scope='session')
def files(): return cases.images()


# what other people's clients are made of; they do not go with the versions in constraints.txt, so each has a place of
# its own
PYTHON_CLIENTS = ['openai==3.57.0', 'langchain-openai==1.7.4', 'tritonclient[http,grpc]==2.73.0']
NODE_CLIENTS = ['openai@7.59.0']


def _installed(name, wanted, *commands):
    "A folder in the cache in which `commands` have installed `wanted`; skips the test where they cannot."
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home()/'.cache')/'mmembed'
    folder = cache/f"{name}-{hashlib.sha256(' '.join([*wanted, sys.version]).encode()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder/'lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker of pytest may be at it
        if (folder/'done').exists(): return folder
        for command in commands:
            done = subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True)
            if done.returncode: pytest.skip(f'{command[0]} cannot install {wanted}: {done.stderr.strip()[-300:]}')
        (folder/'done').touch()
    return folder


def _answers(program, folder, *args):
    "The JSON on the last line that an interpreter prints, which reads `program` from standard input in `folder`."
    done = subprocess.run([*map(str, args)], input=program, cwd=folder, capture_output=True, text=True, timeout=HANG,
                          env=os.environ | dict(PYTHONPATH=''))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope='session')
def python():
    "Runs a program with the Python clients: (source, arguments) to the JSON on its last line."
    pip = (
        Path('bin') / 'python',
        '-m',
        'pip',
        'install',
        '-q',
        '--disable-pip-version-check',
        '--retries',
        '1',
        '--timeout',
        '30',
    )
    folder = _installed('python-clients', PYTHON_CLIENTS, [sys.executable, '-m', 'venv', '.'], [*pip, *PYTHON_CLIENTS])
    return lambda program, *args: _answers(program, folder, folder/'bin'/'python', '-', *args)


@pytest.fixture(scope='session')
def node():
    "Runs a program with the Node clients: (source, arguments) to the JSON on its last line."
    if not (shutil.which('node') and shutil.which('npm')): pytest.skip('there is no node or no npm')
    folder = _installed('node-clients', NODE_CLIENTS, ['npm', 'install', '--no-audit', '--no-fund', *NODE_CLIENTS])
    return lambda program, *args: _answers(program, folder, 'node', '--input-type=module', '-', *args)
