"""Whole servers: keys and TLS, draining, reloading, killed replicas, workers that die, full disks, overload."""
import asyncio
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import httpx2
import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.multiprocess import mark_process_dead

from mmembed.cli.main import main
from mmembed.exporters.verify import samples as cases
from mmembed.runtime.embedder import Embedder
from mmembed.runtime.artifact import read_card
from mmembed.serve.client import Client
from mmembed.serve.transport import ServiceError
from mmembed.serve.engine import Options
from mmembed.serve.tracing import Tracer
from mmembed.serve.server import UNFIT, listen, running, serve
from mmembed.serve.service import Config, Service

from tests.helpers import HANG, ended, until
from tests.exporters import tiny
from tests.serve.conftest import config

FILES = cases.images()


class Load:
    """Threads that keep asking, but leave a moment in between to the processes that start meanwhile.

    Every answer is kept."""
    def __init__(self, url, threads=4, **kw):
        self.answers, self.stop = [], threading.Event()
        self.threads = [threading.Thread(target=self.one, args=(url, kw)) for _ in range(threads)]
        for t in self.threads: t.start()

    def one(self, url, kw):
        with Client(url, **dict(retries=12) | kw) as c:
            while not self.stop.wait(.01):
                try:
                    self.answers.append(
                        c.encode(
                            ['a red circle', FILES['RGB.png'], FILES['quality 75.jpg'][:300]], on_error='flag'
                        ).ok.tolist()
                    )
                except ServiceError as e:
                    self.answers.append(str(e))

    def end(self):
        self.stop.set()
        for t in self.threads: t.join(HANG)
        return self.answers


GOOD = [True, True, False]


def test_deterministic_with_key_and_tls_reloaded_under_load_and_drained(tmp_path):
    """One server, many duties: keys and TLS on both protocols; vectors bit-equal to the Embedder's in any company; a
    new artifact
    without one lost answer; SIGTERM answers what runs."""
    subprocess.run(
        [
            'openssl',
            'req',
            '-x509',
            '-newkey',
            'rsa:2048',
            '-nodes',
            '-keyout',
            tmp_path / 'key.pem',
            '-out',
            tmp_path / 'cert.pem',
            '-days',
            '2',
            '-subj',
            '/CN=localhost',
            '-addext',
            'subjectAltName=DNS:localhost,IP:127.0.0.1',
        ],
        check=True,
        capture_output=True,
    )
    path = tmp_path/'model.pt'
    path.write_bytes(tiny.artifact().read_bytes())
    c = config(
        '/dev/full', api_keys=('k1', 's3cret'), deterministic=True, batch=4,
        tls_cert=str(tmp_path / 'cert.pem'), tls_key=str(tmp_path / 'key.pem'), drain=0.3,
        cors=('https://app.example',),
    )
    with running(c._replace(artifact=path)) as s:
        ways = dict(api_key='s3cret', verify=str(tmp_path/'cert.pem'))
        trust = ssl.create_default_context(cafile=str(tmp_path/'cert.pem'))
        with httpx2.Client(base_url=s.url, verify=trust, timeout=HANG) as h:
            assert h.get('/readyz').status_code == h.get('/metrics').status_code == h.get('/livez').status_code == 200
            for key in ({}, {'x-api-key': 'wrong'}, {'authorization': 'Bearer'}, {'authorization': 'Basic s3cret'}):
                assert (
                    h.post('/v1/embeddings', json=dict(input='x'), headers=key).status_code == 401
                    and h.get('/info', headers=key).status_code == 401
                )
            assert h.get('/info', headers={'authorization': 'Bearer k1'}).status_code == 200
            assert (
                h.options(
                    '/v1/embeddings', headers={'origin': 'https://app.example', 'access-control-request-method': 'POST'}
                ).headers['access-control-allow-origin']
                == 'https://app.example'
            )
            with pytest.raises(ServiceError, match='UNAUTHENTICATED'):
                Client(s.grpc, **ways | dict(api_key='no')).encode(['a'])

            same = Embedder(tiny.artifact(), batch_size=4, deterministic=True)
            texts, files = (
                [t for t in (t.decode('utf-8', 'ignore') for t in cases.texts()) if t.isprintable()],
                list(FILES.values()),
            )
            want = np.concatenate([same.encode_text(texts), same.encode_image(files, on_error='flag').embedding])
            for url, size in ((s.url, 3), (s.grpc, 16)):
                got = Client(url, batch_size=size, **ways).encode([*texts, *files], on_error='flag')
                assert np.array_equal(got.embedding, want)

            load = Load(s.url, **ways)
            until(lambda: len(load.answers) > 5)
            shutil.copy(tiny.other(), tmp_path/'new.pt')
            before, after = read_card(path)['short_hash'], read_card(tmp_path/'new.pt')['short_hash']
            assert (
                h.post(
                    '/admin/reload', json=dict(artifact=str(tmp_path / 'none.pt')), headers={'x-api-key': 'k1'}
                ).status_code
                == 422
            )
            os.replace(tmp_path/'new.pt', path)
            assert h.post('/admin/reload', json={}, headers={'x-api-key': 'k1'}, timeout=HANG).json() == dict(
                before=before, after=after
            )
            seen = len(load.answers)
            until(lambda: len(load.answers) > seen + 10)
            os.kill(s.process.pid, signal.SIGHUP)
            assert (
                h.get('/info', headers={'x-api-key': 'k1'}).json()['short_hash'] == after
                and h.get('/readyz').json()['ready']
            )
            assert all(a == GOOD for a in load.end()), [a for a in load.answers if a != GOOD][:3]
            last = Load(s.url, **ways | dict(retries=0))
            until(lambda: len(last.answers) > 5)
            s.process.send_signal(signal.SIGTERM)
            until(lambda: h.get('/readyz').status_code == 503)
            assert s.process.wait(HANG) == 0
            # what was asked before the door closed is answered; then nobody is there
            left = [a for a in last.end() if a != GOOD]
            assert all('Connect' in a or 'Protocol' in a or 'Read' in a for a in left), left[:3]


def test_a_killed_replica_loses_nothing_and_is_replaced(tmp_path):
    "Nor does a new artifact, which reaches every replica, also the one that is started later."
    with running(config(tmp_path/'log', replicas=2, threads=1, api_keys=('k',))) as s:
        loads = [Load(s.url, 3, api_key='k'), Load(s.grpc, 2, api_key='k')]
        until(lambda: all(len(x.answers) > 3 for x in loads))
        victim = next(x['pid'] for x in s.said if x['event'] == 'serving')
        os.kill(victim, signal.SIGKILL)
        until(lambda: sum(x['event'] == 'serving' for x in s.said) == 3)
        seen = [len(x.answers) for x in loads]
        until(lambda: all(len(x.answers) > n + 3 for x, n in zip(loads, seen)))
        text = httpx2.get(f'{s.url}/metrics', timeout=HANG).text  # of all replicas together
        assert 'mmembed_items_total{kind="text",status="ok"}' in text
        shutil.copy(tiny.other(), tmp_path/'new.pt')
        head, new = {'x-api-key': 'k', 'connection': 'close'}, read_card(tmp_path/'new.pt')['short_hash']
        assert (
            httpx2.post(
                f'{s.url}/admin/reload', json=dict(artifact=str(tmp_path / 'new.pt')), headers=head, timeout=HANG
            ).json()['after']
            == new
        )
        until(
            lambda: (
                {httpx2.get(f'{s.url}/info', headers=head, timeout=HANG).json()['short_hash'] for _ in range(12)}
                == {new}
            )
        )
        os.kill([x['pid'] for x in s.said if x['event'] == 'serving'][-1], signal.SIGKILL)
        until(lambda: sum(x['event'] == 'serving' for x in s.said) == 4)
        assert [x['artifact'] for x in s.said if x['event'] == 'serving'][-1] == new
        assert {x['computes'] for x in s.said if x['event'] == 'serving'} == {Embedder(tiny.artifact()).computes}
        wrong = [a for x in loads for a in x.end() if a != GOOD]
        assert not wrong, wrong[:3]
        series = [
            line
            for line in httpx2.get(f'{s.url}/metrics', timeout=HANG).text.splitlines()
            if line.startswith(('mmembed_artifact_info', 'mmembed_queue_items'))
        ]
        assert [x for x in series if 'artifact' in x] == [
            f'mmembed_artifact_info{{dim="24",hash="{new}",kind="DualEncoder"}} 1.0'
        ]
        # also after two processes died with items in theirs
        assert {x.split()[-1] for x in series if 'queue' in x} == {'0.0'}, series
        assert httpx2.get(f'{s.url}/readyz', timeout=HANG).json()['ready']
    assert s.process.returncode == 0 and [x['event'] for x in s.said].count('replica died') == 2


def test_gauges_speak_of_the_living(tmp_path):
    "A replica that died while it was not ready, and served another artifact, leaves its counts and nothing else."
    program = textwrap.dedent("""
        import os, sys
        from mmembed.serve.telemetry import Metrics
        m = Metrics()
        m.ready.set(sys.argv[1] == 'alive'), m.artifact.labels(sys.argv[1], 'dual', 24).set(1)
        m.queue_items.labels('text').inc(), m.reloads.labels('ok').inc()
        print(os.getpid() if sys.argv[1] == 'dead' else m.page().decode())""")
    def one(state):
        return subprocess.run(
            [sys.executable, '-c', program, state],
            env=os.environ | dict(PROMETHEUS_MULTIPROC_DIR=str(tmp_path)),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    mark_process_dead(int(one('dead')), str(tmp_path))
    page = one('alive')
    assert (
        'mmembed_ready 1.0' in page and 'hash="dead"' not in page and 'mmembed_queue_items{kind="text"} 1.0' in page
    ), page
    assert 'mmembed_reloads_total{status="ok"} 2.0' in page


@pytest.mark.parametrize(
    'replicas, ignored', [(1, False), (1, True), (2, False)], ids=['one', 'one under nohup', 'two']
)
def test_a_hangup_at_the_very_start_is_a_reload_later(replicas, ignored, tmp_path):
    """Each process that serves gets SIGHUP from the first line that Python runs in it: it loads its artifact again
    once it can, and does not die."""
    (tmp_path / 'sitecustomize.py').write_text(
        "import os, signal, sys\nif len(sys.orig_argv) > 4 and '_child' in sys.orig_argv[4]: os.kill(os.getpid(), "
        "signal.SIGHUP)\n"
    )
    program = (
        "import json, os, signal, sys, threading\nfrom mmembed.serve import server\nif os.environ['REPLICAS'] == '1':\n"
        "    old = threading.Thread(target=threading.Event().wait, daemon=True)  # it does not block the signal\n    "
        "old.start()\n"
        "    Service = server.Service\n    def early(*args):\n        signal.pthread_kill(old.ident, signal.SIGHUP)\n  "
        "      return Service(*args)\n    server.Service = early\nserver._alone()"
    )
    path = os.pathsep.join([str(tmp_path), *os.environ.get('PYTHONPATH', '').split(os.pathsep)])
    p = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', program], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                         env=os.environ | dict(PYTHONPATH=path, REPLICAS=str(replicas)),
                         preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL))
    with ended(p):
        p.stdin.write(json.dumps(config(tmp_path/'log', replicas=replicas, threads=1), default=str).encode())
        p.stdin.close()
        said = []
        while sum(x['event'] == 'serving' for x in said) < replicas and (line := p.stdout.readline()):
            said.append(json.loads(line))
        if p.poll() is None: until(lambda: (tmp_path/'log').read_text().count('"event": "reload"') == replicas)
        p.terminate()
        assert p.wait(HANG) == 0 and [x['event'] for x in said].count('replica died') == 0, said


@pytest.fixture(scope='module')
def collector():
    "A real OTLP receiver over gRPC: its port, and the spans that have come."
    spans = []
    class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, q, context):
            spans.extend(x for r in q.resource_spans for scope in r.scope_spans for x in scope.spans)
            return trace_service_pb2.ExportTraceServiceResponse()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Receiver(), server)
    port = server.add_insecure_port('127.0.0.1:0')
    server.start()
    yield port, spans
    server.stop(0)


@pytest.fixture(scope='module')
def small(tmp_path_factory, collector):
    "A server with a short queue and little patience, that sends its traces to the collector."
    with running(
        config(
            tmp_path_factory.mktemp('small') / 'log',
            queue=12,
            batch=2,
            body_timeout=3.0,
            traces=f'grpc://127.0.0.1:{collector[0]}',
        ),
        env=dict(OTEL_BSP_SCHEDULE_DELAY='100'),
    ) as s: yield s


def test_overload_is_turned_away_with_a_hint(small):
    """A queue of 12 items and eighty clients that do not wait: 429 with Retry-After, good answers for the rest, all
    of them for a patient client."""
    async def many():
        async with httpx2.AsyncClient(base_url=small.url, timeout=HANG) as h:
            return await asyncio.gather(
                *[h.post('/v1/embeddings', json=dict(input=['a red circle'] * 4)) for _ in range(80)]
            )
    answers = asyncio.run(many())
    turned = [r for r in answers if r.status_code == 429]
    assert (
        {r.status_code for r in answers} == {200, 429}
        and all(int(r.headers['retry-after']) >= 1 for r in turned)
        and turned[0].json()['error']['type'] == 'rate_limit_error'
    )
    assert (
        f'mmembed_rejected_total{{reason="queue full"}} {len(turned)}.0'
        in httpx2.get(f'{small.url}/metrics', timeout=HANG).text
    )
    ask = lambda url: Client(url, batch_size=4, prefetch=8).encode(['a red circle'] * 60).shape
    assert ask(small.url) == ask(small.grpc) == (60, 24)


def serve_with(patch, tmp_path):
    "A server whose process first runs `patch`."
    program = (
        textwrap.dedent(patch)
        + textwrap.dedent(f'''
        import sys
        from mmembed.serve.server import serve
        from mmembed.serve.service import Config
        from mmembed.serve.engine import Options
        engine = Options(batch=4, stall=5.)
        sys.exit(serve(Config({str(tiny.artifact())!r}, port=0, log={str(tmp_path / 'log')!r}, engine=engine)))''')
    )  # what is not stuck comes back by then
    p = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', program], stdout=subprocess.PIPE, text=True)
    return p, f"http://127.0.0.1:{json.loads(p.stdout.readline())['http']}"


@pytest.mark.parametrize('what', ["raise MemoryError('out of memory')", 'time.sleep(3600)'])
def test_no_memory_or_a_stuck_worker_ends_the_process(what, tmp_path):
    p, url = serve_with(f'''
        import time
        import mmembed.runtime.embedder as r
        good = r.Embedder.encode_tokens
        def bad(self, tokens):
            if len(tokens.ids) == 4: {what}
            return good(self, tokens)
        r.Embedder.encode_tokens = bad''', tmp_path)
    with ended(p):
        assert httpx2.post(f'{url}/v1/embeddings', json=dict(input='a'), timeout=HANG).status_code == 200
        try: assert httpx2.post(f'{url}/v1/embeddings', json=dict(input=['a'] * 4), timeout=HANG).status_code == 503
        except httpx2.TransportError: pass
        assert p.wait(HANG) == UNFIT
    assert '"event": "unfit"' in (tmp_path/'log').read_text()


def test_slow_clients_are_cut_off_and_hold_up_nobody(small):
    port = int(small.url.rsplit(':', 1)[1])
    slow = [socket.create_connection(('127.0.0.1', port), timeout=HANG) for _ in range(20)]
    for x in slow:
        x.sendall(
            b'POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: '
            b'100\r\n\r\n{"in'
        )
    assert httpx2.post(f'{small.url}/v1/embeddings', json=dict(input='a'), timeout=HANG).status_code == 200
    assert all(b' 408 ' in x.recv(4096) for x in slow)


def test_traces_reach_a_collector(small, collector):
    "Spans of all stages, in the client's trace, linked to their batch; from both protocols."
    spans, trace = collector[1], 'ab' * 16
    assert Client(small.grpc).encode(['a']).shape == (1, 24)
    r = httpx2.post(
        f'{small.url}/v1/embeddings',
        files=[('image', FILES['RGB.png']), ('text', (None, 'a'))],
        headers={'traceparent': f'00-{trace}-{"cd" * 8}-01'},
        timeout=HANG,
    )
    assert r.status_code == 200
    until(lambda: any(x.trace_id.hex() == trace and x.name == 'POST /v1/embeddings' for x in spans))
    mine = [x for x in spans if x.trace_id.hex() == trace]
    root = next(x for x in mine if x.name == 'POST /v1/embeddings')
    assert {x.name for x in mine} == {
        'POST /v1/embeddings', 'queue', 'decode', 'transform', 'tokenize', 'forward',
    } and root.parent_span_id.hex() == 'cd' * 8
    assert all(x.parent_span_id == root.span_id for x in mine if x is not root) and 'mmembed.v1.Embedding/Encode' in {
        x.name for x in spans
    }
    batches = {x.span_id for x in spans if x.name == 'batch'}
    assert all(x.links[0].span_id in batches for x in mine if x.name == 'forward')
    plain = lambda x: {a.key: a.value.string_value or a.value.int_value for a in x.attributes}
    assert {
        'http.request.method': 'POST',
        'http.route': '/v1/embeddings',
        'url.path': '/v1/embeddings',
        'http.response.status_code': 200,
    }.items() <= plain(root).items()
    # other tests have asked, too
    rpc = next(
        x for x in spans if x.name == 'mmembed.v1.Embedding/Encode' and plain(x).get('rpc.response.status_code') == 'OK'
    )
    assert (
        {'rpc.system.name': 'grpc', 'rpc.method': rpc.name}.items() <= plain(rpc).items()
        and not root.status.code
        and not rpc.status.code
    )
    path = small.config.log
    until(lambda: any(trace == json.loads(line).get('trace_id') for line in open(path)))


def test_spans_have_a_status_and_the_name_of_the_service(monkeypatch):
    spans = InMemorySpanExporter()
    monkeypatch.setenv('OTEL_SERVICE_NAME', 'shop-search')
    tracer = Tracer(exporter=spans)
    for status in (200, 404, 503, 'OK', 'INVALID_ARGUMENT', 'INTERNAL'): tracer.end(tracer.begin('x', {}), status)
    found = spans.get_finished_spans()
    assert [s.status.status_code.name for s in found] == ['UNSET', 'UNSET', 'ERROR'] * 2 and found[2].attributes[
        'error.type'
    ] == '503'
    assert {s.resource.attributes['service.name'] for s in found} == {'shop-search'}
    monkeypatch.delenv('OTEL_SERVICE_NAME')
    spans = InMemorySpanExporter()
    tracer = Tracer(exporter=spans)
    tracer.end(tracer.begin('x', {}), 200)
    assert spans.get_finished_spans()[0].resource.attributes['service.name'] == 'mmembed'


def test_every_line_is_json_and_the_file_is_opened_anew(tmp_path):
    """Lines of other loggers, warnings and exceptions that nobody caught, in a thread, in the event loop and at the
    end; after the file was moved away, in a new one."""
    program = """
        import asyncio, logging, os, sys, threading, warnings
        from mmembed.serve.telemetry import open_log, redirect_logs
        from mmembed.serve.tracing import Tracer
        redirect_logs()
        logging.getLogger('uvicorn.error').error('before the log is open')
        log = open_log(sys.argv[1])
        Tracer().begin('x', {'traceparent': '00-' + 'ab' * 16 + '-' + 'cd' * 8 + '-01'})
        logging.getLogger('uvicorn.error').error('line one\\nline two')
        logging.getLogger('grpc._cython').warning('from gRPC')
        warnings.warn('deprecated')
        threading.Thread(target=lambda: 1 / 0).start()
        async def fails(): asyncio.get_running_loop().call_soon(lambda: [][0])
        asyncio.run(fails())
        log.close()
        os.rename(sys.argv[1], sys.argv[1] + '.1')
        log = open_log(sys.argv[1])
        log.info('second')
        while not os.path.getsize(sys.argv[1]): pass
        os.rename(sys.argv[1], sys.argv[1] + '.2')
        log.info('third')
        raise RuntimeError('the end')"""
    done = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(program), tmp_path / 'log'], capture_output=True, text=True
    )
    read = lambda name: [json.loads(line) for line in (tmp_path/name).read_text().splitlines()]
    assert done.returncode == 1 and [json.loads(line)['event'] for line in done.stderr.splitlines()] == [
        'before the log is open'
    ], done.stderr
    first = read('log.1')
    assert {x.get('logger') for x in first} == {'uvicorn.error', 'grpc._cython', 'py.warnings', 'asyncio', None}
    assert {x['trace_id'] for x in first if x.get('logger') in ('uvicorn.error', 'py.warnings')} == {'ab' * 16}
    assert any('ZeroDivisionError' in x.get('error', '') for x in first) and any(
        'IndexError' in x.get('error', '') for x in first
    )
    assert [x['event'] for x in read('log.2')] == ['second'] and [x['event'] for x in read('log')] == [
        'third',
        'uncaught exception',
    ]


def test_memory_stays_flat(server):
    """Mixed load with broken items: after warming up the process does not grow.

    What is kept of every answer grows in each of the windows; a heap that still settles, in one."""

    def memory():
        return (
            int(
                next(line for line in open(f'/proc/{server.process.pid}/status') if line.startswith('VmRSS')).split()[1]
            )
            / 1024
        )
    load = Load(server.url, 4)
    until(lambda: len(load.answers) > 100)
    sizes = [memory()]
    while len(sizes) < 2 or (sizes[-1] - sizes[-2] >= 25 and len(sizes) < 5):
        answers = 100 + 300 * len(sizes)
        until(lambda answers=answers: len(load.answers) > answers)
        sizes.append(memory())
    assert all(a == GOOD for a in load.end()) and sizes[-1] - sizes[-2] < 25, sizes


def test_a_start_that_fails_says_why(tmp_path, capsys):
    taken = listen('127.0.0.1', 0)
    (tmp_path/'no.pt').write_text('x')
    for argv, what in (
        ((str(tiny.artifact()), '--port', str(taken.getsockname()[1])), 'cannot listen on 127.0.0.1'),
        ((str(tmp_path / 'no.pt'),), 'is not an mmembed artifact'),
        ((str(tiny.artifact()), '--replicas', '0'), 'replicas must be a whole number from 1'),
        ((str(tiny.artifact()), '--tls-key', 'x'), 'go together'),
    ):
        assert main(['serve', *argv]) == 1
        said = capsys.readouterr().err
        assert what in said and said.count('\n') == 1 and said.startswith('mmembed: error: '), said
    taken.close()


WRONG = dict(  # option of `Config` or `Options`: a value that cannot be, and what is said
    port=99_999,
    grpc_port=-1,
    threads=0,
    replicas=0,
    max_body=0,
    max_items=0,
    max_connections=0,
    body_timeout=0,
    drain=-1.0,
    grace=float('nan'),
    trace_ratio=1.5,
    host='',
    device='tpu',
    name=3,
    deterministic='yes',
    tls_cert='none.pem',
    tls_key='none.pem',
    cors=('app.example',),
    fetch_hosts=('http://a/',),
    index='none',
    log='none/log',
    traces='collector:4317',
    api_keys='secret',
    artifact='none.pt',
    token_ids='none.json',
    engine=(1, 2),
    any_model='no',
    batch=0,
    wait=-0.001,
    queue=0,
    queue_bytes=0,
    decoders=-1,
    timeout=-1.0,
    stall=0.0,
    max_pixels=-1,
    pixels=-1,
    bodies=-1,
    max_text='all',
)


def options():
    given = {**Config._field_defaults, **Options._field_defaults, 'artifact': None}
    return [k for k in given if k not in MORE]


MORE: set = set()  # options that another test holds


@pytest.mark.parametrize('name', options())
def test_no_option_takes_what_cannot_be(name, tmp_path):
    "Every one of them, also those of tomorrow; with one line, before a process is started or a socket is opened."
    value = WRONG[name]
    c = (
        config(tmp_path / 'log', tls_key=str(tiny.artifact()))
        if name == 'tls_cert'
        else config(tmp_path / 'log', tls_cert=str(tiny.artifact()))
        if name == 'tls_key'
        else config(tmp_path / 'log')
    )
    c = (
        c._replace(engine=c.engine._replace(**{name: value}))
        if name in Options._fields
        else c._replace(**{name: value})
    )
    for start in (Service, serve, running, lambda c: serve(c._replace(replicas=2)) if name != 'replicas' else serve(c)):
        with pytest.raises(ValueError, match=name) as e: start(c)
        assert '\n' not in str(e.value)


def test_options_that_do_not_go_together_are_refused(tmp_path, capsys):
    "By the command (one line, exit status 1, nothing said to be serving), by Ray and in Python."
    (tmp_path/'no.pem').write_text('x')
    pem = str(tmp_path/'no.pem')
    for argv, what in (
        ('--max-items 0', 'max_items'),
        ('--port 8001 --grpc-port 8001', 'port and grpc_port are both 8001'),
        (f'--tls-cert {pem}', 'go together'),
        (f'--tls-cert {pem} --tls-key {pem}', 'not a certificate and its key'),
        ('--tls-cert a --tls-key b', "tls_cert: there is no file 'a'"),
        ('--max-replicas 3', 'max_replicas goes with ray'),
        ('--decoders -1', 'decoders'),
        ('--wait-ms -1', 'wait'),
        ('--port 99999', 'port'),
        ('--max-body 4096', 'max_body'),
        ('--batch-size -1', 'batch'),
        ('--drain -1', 'drain'),
        ('--traces nowhere', 'traces'),
        ('--timeout nan', 'timeout'),
        ('--replicas 2 --tls-cert a --tls-key b', "tls_cert: there is no file 'a'"),
        ('--ray --replicas 3 --max-replicas 2', 'max_replicas (2) is less than'),
        ('--ray --cors nowhere', 'cors'),
        ('--ray --max-replicas -1', 'max_replicas'),
    ):
        assert main(['serve', str(tiny.artifact()), *argv.split()]) == 1, argv
        said = capsys.readouterr()
        assert (
            what in said.err and said.err.count('\n') == 1 and said.err.startswith('mmembed: error: ') and not said.out
        ), (argv, said)
