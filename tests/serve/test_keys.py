"Nothing but what is meant for everybody answers without a key, and a server never loses its keys unnoticed."
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import grpc
import httpx2
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from mmembed.cli.main import main
from mmembed.serve.middleware import OPEN
from mmembed.serve.http import ROUTERS, app
from mmembed.serve.protobuf import methods
from mmembed.serve.ray import deployment_options
from mmembed.serve.grpc_server import SERVICES
from mmembed.serve.server import running
from mmembed.serve.service import Config, Service

from tests.exporters import tiny
from tests.serve.conftest import config
from tests.helpers import HANG

API = app(SimpleNamespace(config=Config('m.pt'), name='m')).inner.api
# FastAPI keeps the routes of a router apart
ALL = [r for router in (API, *ROUTERS) for r in router.routes if hasattr(r, 'path')]
ROUTES = sorted({(method, re.sub(r'{name(:path)?}', 'm', route.path))
                 for route in ALL for method in getattr(route, 'methods', None) or {'WEBSOCKET'}} |
                {('GET', '/nothing'), ('POST', '/livez/'), ('GET', '//v1/models')})
CALLS = [(service, name) for service in SERVICES for name in methods(service)]
WRONG = {}, {'x-api-key': 'wrong'}, {'x-api-key': ''}, {'authorization': 'Bearer'}, {'authorization': 'Basic s3cret'}


@pytest.fixture(scope='module')
def locked(tmp_path_factory):
    with running(config(tmp_path_factory.mktemp('locked')/'log', api_keys=('s3cret',))) as s: yield s


def test_the_routes_are_found():
    some = {('WEBSOCKET', '/v1/stream'), ('POST', '/search'), ('POST', '/admin/reload'), ('GET', '/openapi.json')}
    assert some <= set(ROUTES) and {path for _, path in ROUTES} >= set(OPEN) and len(CALLS) > 10


@pytest.mark.parametrize('method, path', ROUTES, ids=lambda x: x)
def test_every_route_needs_a_key(locked, method, path):
    def status(head):
        if method != 'WEBSOCKET':
            body = {} if method == 'POST' else None
            return httpx2.request(method, locked.url + path, headers=head, json=body, timeout=HANG).status_code
        try:
            with connect(locked.url.replace('http', 'ws') + path, additional_headers=head) as ws:
                ws.send('{"input": "a"}')
                ws.recv(60)
                return 101
        except InvalidStatus as e: return e.response.status_code
    refused = {status(head) in (401, 403) for head in WRONG}
    assert refused == {path not in OPEN} and status({'x-api-key': 's3cret'}) not in (401, 403)


@pytest.mark.parametrize('service, name', CALLS, ids=lambda x: x)
def test_every_call_needs_a_key(locked, service, name):
    q, a, many, _ = methods(service)[name]
    with grpc.insecure_channel(locked.grpc.removeprefix('grpc://')) as channel:
        kind = channel.stream_stream if many else channel.unary_unary
        call = kind(f'/{service}/{name}', q.SerializeToString, a.FromString)
        def code(head):
            how = dict(metadata=tuple(head.items()), timeout=HANG)
            try: list(call(iter([q()]), **how)) if many else call(q(), **how)
            except grpc.RpcError as e: return e.code().name
        assert {code(head) for head in WRONG} == {'UNAUTHENTICATED'} != {code({'x-api-key': 's3cret'})}


@pytest.mark.parametrize('content', ['', '\n \n', ' \t ', '\ufeff\n'])
def test_a_key_file_without_a_key_starts_no_server(tmp_path, content, monkeypatch, capsys):
    monkeypatch.setattr('mmembed.serve.server.serve', lambda config: pytest.fail('a server has started'))
    monkeypatch.setattr('mmembed.serve.ray.run_cluster', lambda config, **cluster: pytest.fail('a server has started'))
    (tmp_path/'keys.txt').write_text(content)
    monkeypatch.setenv('MMEMBED_API_KEYS', 'k')  # the option is stronger, so its file decides
    for more in ([], ['--ray']):
        for name, why in (('keys.txt', 'holds no API key'), ('', 'directory'), ('none.txt', 'No such file')):
            path = tmp_path/name if name else ''
            assert main(['serve', str(tiny.artifact()), '--api-keys', str(path), *more]) == 1
            said = capsys.readouterr().err
            assert why in said and said.count('\n') == 1, said
        for keys in ('', ' ', ' , ,'):
            monkeypatch.setenv('MMEMBED_API_KEYS', keys)
            assert main(['serve', str(tiny.artifact()), *more]) == 1
            assert 'MMEMBED_API_KEYS holds no API key' in capsys.readouterr().err
            with pytest.raises(ValueError, match='holds no API key'): deployment_options(dict(artifact='m.pt'))
            with pytest.raises(ValueError, match='holds no API key'):
                deployment_options(dict(artifact='m.pt', api_keys=keys))


def test_keys_are_read_whole(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr('mmembed.serve.server.serve', lambda config: started.append(config.api_keys) or 0)
    (tmp_path/'keys.txt').write_text('\ufefffirst key \r\n\n second\n')
    for words in (['--api-keys', str(tmp_path/'keys.txt')], []):
        assert main(['serve', str(tiny.artifact()), *words]) == 0
        monkeypatch.setenv('MMEMBED_API_KEYS', ' a, b ')
        assert deployment_options(dict(artifact='m.pt'))[1]['api_keys'] == ('a', 'b')
    assert started == [('first key', 'second'), ('a', 'b')]


@pytest.mark.parametrize('keys', [('',), ('k', ' \n'), 'k', (None,)])
def test_a_blank_key_opens_nothing(keys, tmp_path):
    wrong = Config(tiny.artifact(), api_keys=keys, log=os.devnull)
    with pytest.raises(ValueError, match='api_keys must be'): Service(wrong)
    if isinstance(keys, tuple) and '' in keys:  # neither does the process
        program = f"import mmembed.serve.server as s\ns.serve(s.Config('{tiny.artifact()}', port=0, api_keys={keys}))"
        run = dict(capture_output=True, text=True, timeout=HANG)
        done = subprocess.run([sys.executable, '-W', 'ignore', '-c', program], **run)
        assert done.returncode == 1 and 'serving' not in done.stdout and 'api_keys must be' in done.stderr
