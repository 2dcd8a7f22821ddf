"""Images by URL from hosts that drip, send without end, pack bombs or redirect: bounded in bytes and time, and let
go with their client."""
import json
import socket
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import pytest

from mmembed.exporters.verify import samples as cases
from mmembed.serve.server import running
from mmembed.serve.entries import RefusedEntry, check_url

from tests.serve.conftest import config
from tests.helpers import HANG, until

PNG, LIMIT = cases.images()['RGB.png'], 2 << 20


class Host(ThreadingHTTPServer):
    "A web server that counts what is asked of it and what it could send, and says when its client has left."
    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.asked, self.sent, self.began, self.left = Counter(), Counter(), threading.Event(), threading.Event()
        self.url = f'http://127.0.0.1:{self.server_port}'
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        host, kind = self.server, self.path.split('?')[0]
        host.asked[kind] += 1
        self.send_response(302 if kind == '/moved' else 200)
        if kind == '/moved': self.send_header('location', '/good')
        if kind == '/declared': self.send_header('content-length', str(1 << 40))
        if kind == '/packed': self.send_header('content-encoding', 'gzip')
        self.end_headers()
        size = dict(drip=1, endless=65536, declared=65536).get(kind[1:])
        try:
            if not size: self.write({'/half': bytes(LIMIT // 2 - 1)}.get(kind, PNG), kind)
            while size:
                self.write(bytes(size), kind)
                host.began.set()
                if size == 1: threading.Event().wait(.05)
        except OSError: host.left.set()

    def write(self, data, kind):
        self.wfile.write(data)
        self.server.sent[kind] += len(data)

    def log_message(self, *_): pass


@pytest.fixture(scope='module')
def fetching(tmp_path_factory):
    "A server that may fetch from one port, with room for the bytes of one request."
    host = Host()
    limits = dict(max_body=LIMIT, bodies=3 << 20, max_items=64, timeout=2. * HANG)
    c = config(tmp_path_factory.mktemp('fetch')/'log', fetch_hosts=(f'127.0.0.1:{host.server_port}',), **limits)
    with running(c) as s, httpx2.Client(base_url=s.url, timeout=HANG) as client: yield s, client, host
    host.shutdown()


def ask(client, *urls, **head):
    entries = [dict(type='image_url', image_url=u) for u in urls]
    r = client.post(
        '/v1/embeddings', json=dict(input=entries), headers={k.replace('_', '-'): v for k, v in head.items()}
    )
    return r.status_code, [(d['status'], d.get('error', '')) for d in r.json()['data']]


def test_bytes_are_bounded_before_they_come(fetching):
    _, client, host = fetching
    for kind, why in dict(
        endless='larger than 2,097,152 bytes', declared='larger than 2,097,152 bytes', packed='packed', moved='302'
    ).items():
        status, [(state, error)] = ask(client, f'{host.url}/{kind}')
        assert (status, state) == (422, 'invalid') and why in error, kind
    assert host.sent['/endless'] < 16 * LIMIT and host.asked['/good'] == 0  # what the sockets hold comes on top


def test_the_urls_of_a_request_share_its_bytes(fetching):
    _, client, host = fetching
    _, rows = ask(client, *[f'{host.url}/half?{k}' for k in range(6)])
    assert sum('the images of the request are larger' in e for _, e in rows) >= 3
    assert ask(client, f'{host.url}/good') == (200, [('ok', '')])  # and gives them back


def test_what_is_fetched_counts_among_the_bytes_in_hand(fetching):
    "Downloads that wait hold nearly all the room; others are told to come again, and find room when those have gone."
    server, client, host = fetching
    waiting = [_post(server, [f'{host.url}/half?{k}', f'{host.url}/drip']) for k in range(4)]
    try:
        until(lambda: host.sent['/half'] >= 3 * (LIMIT // 2 - 1) and host.asked['/drip'] >= 4)
        status, rows = ask(client, f'{host.url}/half')
        assert (status, rows[0][0]) == (503, 'unavailable') and 'hold as many bytes' in rows[0][1]
    finally:
        for s in waiting: s.close()
    until(lambda: ask(client, f'{host.url}/half')[1][0][0] == 'invalid')  # it came whole, and is not an image


def test_a_dripping_host_has_the_time_of_the_request(fetching):
    _, client, host = fetching
    host.left.clear()
    for seconds in 1, 4, 16, HANG // 2:  # on a busy machine the good one needs longer, too
        status, rows = ask(client, f'{host.url}/good', f'{host.url}/drip', x_timeout=str(seconds))
        assert rows[1] == ('expired', 'the image did not arrive in time') and host.left.wait(HANG)
        if rows[0][0] == 'ok': break
    assert rows[0][0] == 'ok'
    assert ask(client, f'{host.url}/drip', x_timeout='1')[0] == 504


@pytest.mark.parametrize('path', ['/v1/embeddings', '/rank', '/classify'])
def test_downloads_end_with_their_client(fetching, path):
    server, _, host = fetching
    host.began.clear(), host.left.clear()
    s = _post(server, [f'{host.url}/drip'], path)
    assert host.began.wait(HANG)
    host.left.clear()
    s.close()
    assert host.left.wait(HANG)  # the server's own deadline would come later


NAMED = {
    'h.org': (
        ['http://h.org/', 'https://H.org/', 'http://h.org:80/'],
        ['http://h.org:6379/', 'http://h.org:443/', 'http://x.h.org/'],
    ),
    'h.org:81': (['http://h.org:81/', 'https://h.org:81'], ['http://h.org/', 'http://h.org:82/']),
    '[::1]:*': (['http://[::1]:5/'], ['http://[::2]:5/', 'http://1/']),
}


def test_ports_are_named():
    for host, (good, bad) in NAMED.items():
        hosts = (host,)
        for url in good: assert check_url(url, hosts) == url
        for url in bad:
            with pytest.raises(RefusedEntry): check_url(url, hosts)


def _post(server, urls, path='/v1/embeddings'):
    "A socket on which a request has been sent."
    entries = [dict(type='image_url', image_url=u) for u in urls]
    body = json.dumps(dict(input=entries, labels=['a'], query='a', candidates=entries))
    s = socket.create_connection(('127.0.0.1', int(server.url.rsplit(':', 1)[1])))
    head = f'POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n'
    s.sendall((head + body).encode())
    return s
