"""Requests that once ended, confused or filled the service, mixed into its load: `python -m benchmarks.serve
ARTIFACT --soak 1200 --attacks`."""
import atexit
import re
import shutil
import socket
import tempfile
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import httpx2
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

KEY = {'x-api-key': 'soak'}
BUSY = {413, 422, 429, 503, 504}  # what the documentation allows for what is too much
CONDITIONS = [
    ' OR '.join(["id = 'x'"] * 50_000),
    f'id IN ({", ".join(map(str, range(200_000)))})',
    "id = 'x'" + ' IS TRUE' * 1000,
    "repeat(id, 100000000) = 'x'",
]


class Dripping(BaseHTTPRequestHandler):
    "A byte now and then, without end"
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(b'x')
                threading.Event().wait(.2)
        except OSError: pass
    def log_message(self, *_): pass


def dripping() -> ThreadingHTTPServer:
    "A host on this machine that serves `Dripping`."
    host = ThreadingHTTPServer(('127.0.0.1', 0), Dripping)
    host.daemon_threads = True
    threading.Thread(target=host.serve_forever, daemon=True).start()
    return host


def index(artifact) -> Path:
    "The folder of a small index, so that conditions have something to be asked of."
    from mmembed.retrieval.index import Index
    folder = Path(tempfile.mkdtemp(prefix='mmembed-soak-'))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder/'images').mkdir()
    for color in ('red', 'green', 'blue'): Image.new('RGB', (48, 48), color).save(folder/'images'/f'{color}.png')
    Index.build(artifact, folder/'images', folder/'index')
    return folder/'index'


class Attacks:
    "Threads that attack a server until they are stopped; each answer is counted, and is wrong where it is not expected"
    def __init__(self, server, host: ThreadingHTTPServer, want: np.ndarray, text: str):
        self.server, self.host, self.want, self.text = server, host, want, text
        self.counts, self.wrong, self.over = Counter(), [], threading.Event()
        self.http = httpx2.Client(base_url=server.url, headers=KEY, timeout=120)
        kinds = (self.smuggling, self.condition, self.chinese, self.keyless, self.health, self.drip, self.innocent)
        self.threads = [threading.Thread(target=self._repeat, args=(kind,)) for kind in kinds]
        for t in self.threads: t.start()

    def stop(self):
        self.over.set()
        for t in self.threads: t.join(150)

    def _repeat(self, kind):
        turn = 0
        while not self.over.wait(.05 if kind == self.innocent else 1):
            try: answer, right = kind(turn)
            except Exception as e: answer, right = f'{type(e).__name__}: {e}'[:200], False
            self.counts[f'{kind.__name__} {answer}'] += 1
            if not right: self.wrong.append(f'{kind.__name__} {answer}')
            turn += 1

    def _post(self, path, body, **head): return self.http.post(path, json=body, headers=head)

    def smuggling(self, turn):
        "A body that is a request, behind an upgrade that is not taken; one more request in the same connection."
        inner = b'POST /v1/embeddings HTTP/1.1\r\nhost: x\r\nx-api-key: soak\r\ncontent-length: 2\r\n\r\n{}'
        def request(body, kind, more=b''):
            return (b'POST /v1/embeddings HTTP/1.1\r\nhost: x\r\nx-api-key: soak\r\n' + more +
                    b'content-type: %s\r\ncontent-length: %d\r\n\r\n' % (kind, len(body)) + body)
        upgrade = b'connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n'
        with socket.create_connection(('127.0.0.1', int(self.server.url.rsplit(':', 1)[1])), timeout=60) as s:
            s.sendall(request(inner, b'text/plain', upgrade) + request(b'a', b'text/plain', b'connection: close\r\n'))
            out = b''.join(iter(lambda: s.recv(65536), b''))
        found = re.findall(rb'HTTP/1.1 (\d+)', out)
        return b' '.join(found).decode(), found == [b'200'] * 2

    def condition(self, turn):
        r = self._post('/search', dict(query=self.text, where=CONDITIONS[turn % len(CONDITIONS)]))
        return r.status_code, r.status_code in BUSY

    def chinese(self, turn):
        r = self._post('/v1/embeddings', dict(input='猫' * (20 << 20)))
        return r.status_code, r.status_code in BUSY

    def keyless(self, turn):
        try:
            with connect(self.server.url.replace('http', 'ws') + '/v1/stream'): return 101, False
        except InvalidStatus as e: return e.response.status_code, e.response.status_code in (401, 403)

    def health(self, turn):
        with grpc.insecure_channel(self.server.grpc.removeprefix('grpc://')) as channel:
            try:
                health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=f'{turn} ' * (4 << 20)))
            except grpc.RpcError as e:
                return e.code().name, e.code().name in ('NOT_FOUND', 'RESOURCE_EXHAUSTED')
            return 'OK', False

    def drip(self, turn):
        url = f'http://127.0.0.1:{self.host.server_port}/{turn}.png'
        r = self._post('/v1/embeddings', dict(input=[dict(type='image_url', image_url=url)]), **{'x-timeout': '2'})
        return r.status_code, r.status_code in (429, 503, 504)

    def innocent(self, turn):
        "Whoever else asks gets the right vector, or is told to come again."
        r = self._post('/v1/embeddings', dict(input=self.text))
        if r.status_code != 200: return r.status_code, r.status_code in (429, 503, 504)
        right = np.allclose(r.json()['data'][0]['embedding'], self.want, atol=1e-4)
        return 'right' if right else 'wrong vector', right
