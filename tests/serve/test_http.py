"""HTTP and WebSocket through real sockets: answers, statuses, limits, and clients that behave badly."""
import asyncio
import base64
import json
import os
import re
import socket
import string
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.sync.client import connect

from mmembed.exporters.verify import samples as cases
from mmembed.runtime.embedder import load
from mmembed.serve import tasks as scores
from mmembed.serve.queue import Item

from tests.exporters import tiny
from tests.helpers import HANG, until

FILES = cases.images()


def b64(data): return base64.b64encode(data).decode()
def image(data): return dict(type='image', image=b64(data))
def ask(http, input, status=200, **kw):
    r = http.post('/v1/embeddings', json=dict(input=input, **kw))
    assert r.status_code == status, r.text[:500]
    return r.json()
def vectors(answer): return np.float32([d['embedding'] for d in answer['data'] if d['status'] == 'ok'])


@pytest.fixture(scope='module')
def emb(): return load(tiny.artifact())


def test_every_file_and_text_in_one_mixed_list(http, emb):
    """Texts and all image files, good and broken, shuffled into requests: every status, reason and vector is the
    Embedder's."""
    texts = [t.decode('utf-8', 'ignore') for t in cases.texts()]
    files, want = list(FILES.values()), emb.encode_image(list(FILES.values()), on_error='flag')
    mixed = [(t, v.numpy(), '') for t, v in zip(texts, emb.encode_text(texts))] + [
        (image(f), v.numpy(), e) for f, v, e in zip(files, want.embedding, want.errors)
    ]
    mixed = mixed[::2] + mixed[1::2]
    for k in range(0, len(mixed), 32):
        part = mixed[k:k+32]
        r = http.post('/v1/embeddings', json=dict(input=[m[0] for m in part], encoding_format='base64')).json()
        assert [d['index'] for d in r['data']] == list(range(len(part))) and r['artifact'] == emb.card['short_hash']
        for d, (_, v, e) in zip(r['data'], part):
            assert (d.get('error', ''), d['status']) == (e, 'invalid' if e else 'ok')
            if not e: assert np.allclose(np.frombuffer(base64.b64decode(d['embedding']), '<f4'), v, atol=1e-5)


def test_a_bad_item_leaves_its_neighbours_alone(http):
    good = [image(FILES['RGB.png']), 'a red circle', image(FILES['quality 75.jpg'])]
    want = vectors(ask(http, good))
    for bad in (
        image(FILES['quality 75.jpg'][:300]),
        image(FILES['bomb.png']),
        image(b''),
        dict(type='image', image='no base64!'),
        dict(type='image_url', image_url=dict(url='http://example.org/x.png')),
    ):
        r = ask(http, [good[0], bad, *good[1:]])
        assert (
            [d['status'] for d in r['data']] == ['ok', 'invalid', 'ok', 'ok']
            and r['data'][1]['embedding'] is None
            and r['data'][1]['error']
        )
        assert np.abs(vectors(r) - want).max() < 1e-6
    assert ask(http, [image(b'x')], 422)['data'][0]['status'] == 'invalid'


def test_answers_are_numbered_by_their_places_in_the_request(http):
    "Also where some items were refused before they reached the engine."
    refused = dict(type='image', image='no base64!')
    r = ask(http, [refused, 'a red circle', image(FILES['RGB.png']), refused, 'b'])['data']
    assert [(d['index'], d['kind'], d['status']) for d in r] == [
        (0, 'image', 'invalid'),
        (1, 'text', 'ok'),
        (2, 'image', 'ok'),
        (3, 'image', 'invalid'),
        (4, 'text', 'ok'),
    ]


def test_the_forms_of_openai(http, emb):
    want = emb.encode_text(['a red circle'])[0].numpy()
    assert np.allclose(vectors(ask(http, 'a red circle', model=None))[0], want, atol=1e-5)
    cut = vectors(ask(http, ['a red circle'], dimensions=5))[0]
    assert np.allclose(cut, want[:5] / np.linalg.norm(want[:5]), atol=1e-5)
    url = 'data:image/png;base64,' + b64(FILES['RGB.png'])
    r = ask(
        http,
        [
            image(FILES['RGB.png']),
            dict(type='image_url', image_url=url),
            dict(type='image_url', image_url=dict(url=url)),
            dict(type='image', image=url),
        ],
    )
    assert np.abs(np.diff(vectors(r), axis=0)).max() < 1e-6 and ask(http, ['a', 'b c'])['usage']['prompt_tokens'] > 4
    model = http.get('/v1/models').json()['data'][0]
    assert model['computes'] == emb.computes
    assert http.get(f'/v1/models/{model["id"]}').json() == model and http.get('/v1/models/gpt').status_code == 404
    assert http.get('/info').json()['short_hash'] == emb.card['short_hash']


def test_raw_bodies(http, emb):
    png, want = FILES['RGB.png'], emb.encode_image([FILES['RGB.png']])[0].numpy()
    for kind in ('application/octet-stream', 'image/png', 'image/jpeg; q=1'):
        r = http.post('/v1/embeddings?encoding_format=base64', content=png, headers={'content-type': kind}).json()
        assert np.allclose(np.frombuffer(base64.b64decode(r['data'][0]['embedding']), '<f4'), want, atol=1e-5)
    r = http.post(
        '/v1/embeddings',
        files=[('image', b'bad'), ('image', png), ('text', (None, 'a red circle'))],
        headers={'accept': 'application/octet-stream'},
    )
    assert r.headers['x-shape'] == '3,24' and r.headers['x-status'] == 'invalid,ok,ok'
    table = np.frombuffer(r.content, '<f4').reshape(3, 24)
    assert not table[0].any() and np.allclose(table[1], want, atol=1e-5)
    broken = http.post(
        '/v1/embeddings?dimensions=24', content=b'caf\xe9', headers={'content-type': 'text/plain'}
    ).json()
    assert np.allclose(vectors(broken)[0], emb.encode_text([b'caf\xe9'])[0].numpy(), atol=1e-5)


def test_rank_and_classify_are_the_models_own_scores(http, emb):
    texts, images = ['a red circle', 'a blue square', '一个红色的圆'], [FILES['RGB.png'], FILES['quality 75.jpg']]
    score = emb.score(texts, images).numpy()
    r = http.post(
        '/rank', json=dict(query=texts[0], candidates=[image(images[0]), image(b'bad'), image(images[1])])
    ).json()['results']
    assert [x['index'] for x in r] == [*(2 * np.argsort(-score[0])), 1] and r[2]['status'] == 'invalid'
    assert (
        np.allclose([x['score'] for x in r[:2]], np.sort(score[0])[::-1], atol=1e-4)
        and abs(sum(x['probability'] for x in r[:2]) - 1) < 1e-5
    )
    r = http.post('/rank', json=dict(query=image(images[1]), candidates=texts, top_k=1)).json()['results']
    assert len(r) == 1 and r[0]['index'] == int(score[:, 1].argmax())
    assert http.post('/rank', json=dict(query='a', candidates=['b'])).status_code == 422
    assert http.post('/rank', json=dict(query=image(b'bad'), candidates=['b'])).status_code == 422
    r = http.post(
        '/classify', json=dict(input=[image(images[0]), image(b'bad')], labels=['red', 'blue'], template='a {} circle')
    ).json()['results']
    want = emb.score(['a red circle', 'a blue circle'], images[:1]).softmax(0)[:, 0].tolist()
    assert (
        np.allclose(sorted(x['probability'] for x in r[0]['labels']), sorted(want), atol=1e-4)
        and r[1]['status'] == 'invalid'
    )


def test_equal_scores_keep_the_order_of_the_request():
    "Of candidates and of labels, more of them than a small sort keeps in order by itself."
    score = np.repeat(np.float32([[1, 3, 2]]), 40, axis=0).ravel()  # 1, 3, 2, 1, 3, 2, ...
    want = [*range(1, 120, 3), *range(2, 120, 3), *range(0, 120, 3)]
    class Service:
        def scores(self, query, values): return score, np.exp(score) / np.exp(score).sum()
    async def embed(items):
        for i in items: i.status = 'ok'
        return items
    rows, _ = asyncio.run(scores.rank(Service(), embed, Item('image', b''), [Item('text', 'a') for _ in score]))
    assert [r['index'] for r in rows] == want
    rows, _ = asyncio.run(scores.classify(Service(), embed, [Item('image', b'')], [str(k) for k in range(120)]))
    assert [int(x['label']) for x in rows[0]['labels']] == want


def test_mistakes_have_their_status(http):
    def status(path='/v1/embeddings', **kw):
        r = http.post(path, **kw)
        assert r.json()['error']['message'] and r.json()['error']['code'] == r.status_code
        return r.status_code
    assert status(content=b'{"input": ') == 400 and status(content=b'\xff\xfe') == 400
    for body in (
        {},
        [],
        'x',
        dict(input=[]),
        dict(input=None),
        dict(input=[None]),
        dict(input=[['a']]),
        dict(input='x', dimensions=0),
        dict(input='x', dimensions=25),
        dict(input='x', encoding_format='xml'),
        dict(input=[dict(type='audio')]),
    ):
        assert status(json=body) == 422, body
    assert status(json=dict(input=['x'] * 65)) == 413 and status(content=b'x' * (2 << 20) + b'y') == 413
    assert status(content=(b'x' * 65536 for _ in range(40))) == 413  # of unknown length
    assert status(content=b'x', headers={'content-type': 'video/mp4'}) == 415
    assert (
        status('/search', json=dict(query='x')) == 404
        and status('/admin/reload', json={}) == 403
        and status('/rank', json={}) == 422
    )
    assert status(files=[('video', b'x')]) == 422 and status(
        content=b'--x', headers={'content-type': 'multipart/form-data; boundary=x'}
    ) in (400, 422)
    assert status(json=dict(input='x'), headers={'x-timeout': 'soon'}) == 422
    assert http.get('/nothing').status_code == 404 and http.get('/v1/embeddings').status_code == 405


def test_the_time_of_a_request_is_limited(http):
    r = http.post('/v1/embeddings', json=dict(input=['a'] * 60), headers={'x-timeout': '0.000001'})
    assert r.status_code == 504 and {d['status'] for d in r.json()['data']} <= {'expired'}


def test_request_ids_and_timing_and_log(http, log):
    r = http.post(
        '/v1/embeddings', json=dict(input=[image(FILES['RGB.png']), 'a']), headers={'x-request-id': 'order-17'}
    )
    assert (
        r.headers['x-request-id'] == 'order-17'
        and len(http.get('/info', headers={'x-request-id': 'a b'}).headers['x-request-id']) == 32
    )
    assert set(re.findall(r'(\w+);dur=', r.headers['server-timing'])) == {
        'queue', 'decode', 'transform', 'tokenize', 'forward', 'total',
    }
    until(lambda: 'order-17' in log.read_text())
    row = next(json.loads(line) for line in log.read_text().splitlines() if 'order-17' in line)
    assert (row['path'], row['status'], row['items'], row['protocol']) == ('/v1/embeddings', 200, 2, 'http') and row[
        'seconds'
    ] > 0


def test_metrics(http):
    def read(): return {m[1]: float(m[2]) for m in re.finditer(r'^(\S+) (\S+)$', http.get('/metrics').text, re.M)}
    before = read()
    ask(http, ['a', 'b', image(FILES['RGB.png']), image(b'bad')])
    after = read()
    grown = {k: v - before.get(k, 0) for k, v in after.items()}
    assert (
        grown['mmembed_items_total{kind="text",status="ok"}'] == 2
        and grown['mmembed_items_total{kind="image",status="invalid"}'] == 1
    )
    assert (
        grown['mmembed_batch_items_sum{kind="image"}'] == 1
        and grown['mmembed_stage_seconds_count{kind="image",stage="decode"}'] == 1
    )
    assert (
        grown['mmembed_requests_total{protocol="http",route="/v1/embeddings",status="200"}'] == 1
        and after['mmembed_queue_items{kind="text"}'] == 0
    )
    assert any(k.startswith('mmembed_artifact_info') and tiny_hash() in k for k in after)


def tiny_hash():
    from mmembed.runtime.artifact import read_card
    return read_card(tiny.artifact())['short_hash']


def test_images_are_fetched_only_from_hosts_that_are_named(http, emb):
    """A real little web server: allowed by name.

    Redirects, other hosts, other schemes and large files are refused, one by one."""
    class Pictures(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == '/moved':
                self.send_response(302)
                self.send_header('location', '/red.png')
                return self.end_headers()
            data = FILES['RGB.png'] if self.path == '/red.png' else bytes(3 << 20)
            self.send_response(200)
            self.end_headers()
            try: self.wfile.write(data)
            except OSError: pass
        def log_message(self, *_): pass
    web = ThreadingHTTPServer(('127.0.0.1', 0), Pictures)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    base = f'http://127.0.0.1:{web.server_port}'
    urls = [
        f'{base}/red.png',
        f'{base}/moved',
        f'{base}/large',
        f'http://localhost:{web.server_port}/red.png',
        'file:///etc/passwd',
        'http://127.0.0.1:1/',
        'http://[::1',
        '',
    ]
    r = ask(http, [dict(type='image_url', image_url=u) for u in urls])
    assert [d['status'] for d in r['data']] == ['ok'] + ['invalid'] * 7, r
    assert (
        '302' in r['data'][1]['error']
        and 'larger' in r['data'][2]['error']
        and 'does not fetch' in r['data'][3]['error']
    )
    assert np.allclose(vectors(r)[0], emb.encode_image([FILES['RGB.png']])[0].numpy(), atol=1e-5)
    web.shutdown()


def test_websocket(server, emb):
    with connect(server.url.replace('http', 'ws') + '/v1/stream') as ws:
        for k in range(20): ws.send(json.dumps(dict(id=f'q{k}', input=['a red circle', image(b'bad')] * (k % 3 + 1))))
        ws.send(FILES['RGB.png'])
        ws.send('{"input": [')
        ws.send('{"input": "x", "dimensions": 1000, "id": 7}')
        for bad in (
            '{"input": 3, "id": "named"}', '{"input": "x", "id": 99999999999999999999}',
            '{"input": "x", "id": [1]}', '[]',
        ):
            ws.send(bad)
        got = {a['id']: a for a in (json.loads(ws.recv(20)) for _ in range(27))}
    want = emb.encode_text(['a red circle'])[0].numpy()
    for k in range(20):
        assert [d['status'] for d in got[f'q{k}']['data']] == ['ok', 'invalid'] * (k % 3 + 1)
        assert np.allclose(vectors(got[f'q{k}'])[0], want, atol=1e-5)
    assert np.allclose(vectors(got[20])[0], emb.encode_image([FILES['RGB.png']])[0].numpy(), atol=1e-5)
    assert got[21]['error']['code'] == 400 and [got[k]['error']['code'] for k in (7, 'named', 24, 25, 26)] == [422] * 5


def raw(server, data, wait=5.):
    "What the server says to bytes on a socket, until it closes or is silent."
    host, port = server.url.removeprefix('http://').split(':')
    with socket.create_connection((host, int(port)), timeout=wait) as s:
        s.sendall(data)
        out = b''
        try:
            while piece := s.recv(65536): out += piece
        except (TimeoutError, ConnectionError): pass
    return out


def test_bytes_that_are_no_http(server, http):
    for data in (
        b'\0' * 100,
        b'GET\r\n\r\n',
        b'GET / HTTP/9.9\r\n\r\n',
        b'POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n',
        os.urandom(1000) + b'\r\n\r\n',
        b'POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n',
    ):
        assert b' 200 ' not in raw(server, data, 1.0)
    assert raw(server, b'GET / HTTP/1.1\r\nx: ' + b'y' * 200_000, 5.) == b''  # a head without an end: closed
    assert http.get('/livez').status_code == 200


def test_clients_that_vanish_take_their_items_with_them(server, http):
    host, port = server.url.removeprefix('http://').split(':')
    body = json.dumps(dict(input=[image(FILES['quality 75.jpg'])] * 64)).encode()
    fields = f'host: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n'
    head = f'POST /v1/embeddings HTTP/1.1\r\n{fields}'.encode()

    def gone():
        return sum(float(n) for n in re.findall(r'requests_total{.*status="499"} (\S+)', http.get('/metrics').text))
    before = gone()
    for k in range(12):
        s = socket.create_connection((host, int(port)))
        s.sendall(head + body[:len(body) if k % 3 else 1000])  # some in mid-body
        s.close()
    until(lambda: gone() >= before + 12)
    assert gone() == before + 12 and re.search(r'mmembed_queue_items{kind="image"} 0\.0', http.get('/metrics').text)
    assert http.get('/readyz').status_code == 200 and 'status="500"' not in http.get('/metrics').text


def test_ten_thousand_connections(server, http):
    "As many as this process may open: they cost little memory, and others are answered meanwhile."
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    n = min(10_000, hard - 1000)
    host, port = server.url.removeprefix('http://').split(':')
    def memory(): return int(re.search(r'VmRSS:\s+(\d+)', open(f'/proc/{server.process.pid}/status').read())[1]) / 1024
    before = memory()
    async def many():
        async def one():
            try: return await asyncio.open_connection(host, int(port))
            except OSError: return None
        held = []
        for k in range(0, n, 500):
            held += await asyncio.gather(*[one() for _ in range(min(500, n - k))])
        async with httpx2.AsyncClient(timeout=HANG) as c:
            r = await c.post(f'{server.url}/v1/embeddings', json=dict(input='a'))
        grown = memory() - before
        for pair in held:
            if pair: pair[1].close()
        return r.status_code, grown, sum(p is not None for p in held)
    status, grown, opened = asyncio.run(many())
    assert status == 200 and grown < 400 and opened >= .99 * n, (status, grown, opened)
    assert http.get('/readyz').json()['ready']


ALLOWED = {200, 400, 401, 404, 405, 408, 411, 413, 415, 422, 429, 503}
leaf = (
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.text(string.printable + 'é一\0', max_size=8)
    | st.sampled_from(['text', 'image', 'image_url', 'float', 'base64', b64(FILES['RGB.png'])])
)
keys = st.sampled_from(
    [
        'input', 'type', 'text', 'image', 'image_url', 'url', 'dimensions', 'encoding_format', 'query',
        'candidates', 'labels', 'template', 'top_k', 'artifact',
    ]
)
tree = st.recursive(leaf, lambda x: st.lists(x, max_size=4) | st.dictionaries(keys, x, max_size=5), max_leaves=12)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    path=st.sampled_from(['/v1/embeddings', '/rank', '/classify', '/search']),
    body=st.dictionaries(keys, tree, max_size=6) | tree,
)
def test_no_json_is_a_server_error(http, path, body):
    assert http.post(path, content=json.dumps(body).encode('utf-8', 'replace')).status_code in ALLOWED


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    kind=st.sampled_from(
        ['application/json', 'text/plain', 'image/png', 'multipart/form-data; boundary=b', 'multipart/form-data', 'x']
    ),
    body=st.binary(max_size=200),
)
def test_no_bytes_are_a_server_error(http, kind, body):
    if 'boundary=b' in kind:
        body = b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\n' + body + b'\r\n--b--\r\n'
    assert http.post('/v1/embeddings', content=body, headers={'content-type': kind}).status_code in ALLOWED


def test_the_description_is_complete(http):
    api = http.get('/openapi.json').json()
    text = json.dumps(api)
    for ref in set(re.findall(r'"#/components/schemas/(\w+)"', text)): assert ref in api['components']['schemas'], ref
    assert {
        '/v1/embeddings', '/rank', '/classify', '/search', '/info', '/livez', '/readyz', '/metrics',
        '/admin/reload',
    } <= set(api['paths'])
    assert set(api['paths']['/v1/embeddings']['post']['requestBody']['content']) == {
        'application/json', 'application/octet-stream', 'text/plain', 'multipart/form-data',
    }
    assert http.get('/docs').status_code == 200
