import os

import httpx2
import pytest

from mmembed.export import cases
from mmembed.serve.engine import Options
from mmembed.serve.server import running
from mmembed.serve.service import Config

from ..export import tiny

os.environ.setdefault('OMP_NUM_THREADS', '1')  # for the servers: tests share few cores


def config(log, **options):
    "A server's configuration for tests; `engine` and other fields by name."
    engine = {k: options.pop(k) for k in list(options) if k in Options._fields}
    return Config(tiny.artifact(), port=0, grpc_port=0, log=str(log), engine=Options(**dict(batch=8, decoders=2) | engine), **options)


@pytest.fixture(scope='session')
def log(tmp_path_factory): return tmp_path_factory.mktemp('serve')/'access.jsonl'


@pytest.fixture(scope='session')
def server(log):
    "One server for all tests that leave it as it is."
    with running(config(log, fetch_hosts=('127.0.0.1',), max_items=64, max_body=2 << 20)) as s:
        yield s
        if s.process.poll() is not None: pytest.fail('the server has died')
    assert s.process.returncode == 0


@pytest.fixture(scope='session')
def http(server):
    with httpx2.Client(base_url=server.url, timeout=30) as c: yield c


@pytest.fixture(scope='session')
def files(): return cases.images()
