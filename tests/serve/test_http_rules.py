"""How HTTP is spoken: compressed bodies, charsets, names of models, errors, browsers; held to by the real server."""
import asyncio
import base64
import gzip
import json
import re
import signal
import socket
import zlib

import grpc
import httpx2
import numpy as np
import pytest
from starlette.exceptions import HTTPException
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.sync.client import connect

from mmembed.exporters.verify import samples as cases
from mmembed.runtime.embedder import load
from mmembed.serve.middleware import EXPOSED, decompressed
from mmembed.serve.protobuf import message
from mmembed.serve.server import running

from tests.exporters import tiny
from tests.serve.conftest import config
from tests.helpers import HANG

PNG = cases.images()['RGB.png']
APP, KEY = 'https://app.example', 's3cret-/+?~>'


@pytest.fixture(scope='module')
def emb(): return load(tiny.artifact())


@pytest.fixture(scope='module')
def browsers(tmp_path_factory):
    "A server with a key, for pages of one other origin, that takes any model's name and few connections."
    with running(
        config(
            tmp_path_factory.mktemp('browsers') / 'log', api_keys=(KEY,), cors=(APP,), any_model=True,
            max_connections=16, max_body=1 << 20, drain=30.0, name='mine',
        )
    ) as s:
        yield s


@pytest.fixture(scope='module')
def page(browsers):
    "A client as a page of the other origin is."
    with httpx2.Client(base_url=browsers.url, timeout=HANG, headers={'origin': APP}) as c: yield c


def post(http, content, kind='application/json', path='/v1/embeddings', **headers):
    return http.post(
        path, content=content, headers={'content-type': kind} | {k.replace('_', '-'): v for k, v in headers.items()}
    )
def ask(http, **body): return post(http, json.dumps(dict(dict(input='a red circle') | body)))
def vector(r): return np.float32(r.json()['data'][0]['embedding'])
def why(r): return r.status_code, r.json()['error']['message']


# ---- compressed bodies

@pytest.mark.parametrize(
    'coding,pack',
    [
        ('gzip', gzip.compress),
        ('x-gzip', gzip.compress),
        ('GZIP', gzip.compress),
        ('deflate', zlib.compress),
        ('identity', bytes),
        ('identity, gzip', gzip.compress),
    ],
)
def test_a_compressed_body_is_its_content(http, emb, coding, pack):
    text, image = emb.encode_text(['a red circle'])[0].numpy(), emb.encode_image([PNG])[0].numpy()
    assert np.allclose(vector(post(http, pack(b'{"input": "a red circle"}'), content_encoding=coding)), text, atol=1e-5)
    assert np.allclose(
        vector(post(http, pack(b'a red circle'), 'text/plain', content_encoding=coding)), text, atol=1e-5
    )
    assert np.allclose(vector(post(http, pack(PNG), 'image/png', content_encoding=coding)), image, atol=1e-5)
    name = http.get('/v1/models').json()['data'][0]['id']
    body = pack(b'{"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a red circle"]}]}')
    out = post(http, body, path=f'/v2/models/{name}/infer', content_encoding=coding).json()
    assert np.allclose(out['outputs'][0]['data'], text, atol=1e-5)
    assert np.allclose(
        vector(
            post(
                http,
                (pack(b'{"input": "a red circle"}')[k : k + 1] for k in range(len(pack(b'{"input": "a red circle"}')))),
                content_encoding=coding,
            )
        ),
        text,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    'coding,pack',
    [('br', bytes), ('zstd', bytes), ('gzip, gzip', lambda x: gzip.compress(gzip.compress(x))), ('compress', bytes)],
)
def test_a_coding_that_is_not_known_is_named(http, coding, pack):
    r = post(http, pack(b'{"input": "a"}'), content_encoding=coding)
    assert (
        r.status_code == 415
        and r.headers['accept-encoding'] == 'gzip, deflate'
        and coding in r.json()['error']['message']
    )
    assert post(http, pack(b'a'), 'text/plain', content_encoding=coding).status_code == 415


def test_a_body_that_is_not_what_it_says(http):
    good = gzip.compress(b'{"input": "a"}')
    for bad in (b'{"input": "a"}', good[:-3], good[:20], good + b'x', good + good, b''):
        assert post(http, bad, content_encoding='gzip').status_code == 400, bad


def test_a_bomb_is_unpacked_as_far_as_the_limit_and_no_further(http, server):
    bomb = gzip.compress(bytes(300 << 20))  # 300 KB
    for kind in ('application/json', 'text/plain', 'image/png'):
        assert post(http, bomb, kind, content_encoding='gzip').status_code == 413
    empty = zlib.compressobj(0, zlib.DEFLATED, 31)  # endless bytes that unpack to nothing
    nothing = (
        empty.compress(b'')
        + b''.join(empty.flush(zlib.Z_FULL_FLUSH) for _ in range(10))
        + b'\0\0\0\xff\xff' * (1 << 19)
    )
    assert (
        post(http, (nothing[k : k + 65536] for k in range(0, len(nothing), 65536)), content_encoding='gzip').status_code
        == 413
    )
    given = []
    async def unpack(limit):
        async def receive(): return {'type': 'http.request', 'body': bomb, 'more_body': False}
        body = decompressed(receive, 'gzip', limit)
        while True: given.append(len((await body())['body']))
    with pytest.raises(HTTPException) as e: asyncio.run(unpack(1 << 20))
    assert e.value.status_code == 413 and sum(given) <= 1 << 20 and max(given) <= 256 << 10


def test_bombs_by_the_other_protocols(server):
    with connect(server.url.replace('http', 'ws') + '/v1/stream') as ws:
        ws.send('x' * (50 << 20))
        with pytest.raises(ConnectionClosedError, match='1009'): ws.recv(60)
    with grpc.insecure_channel(server.grpc.removeprefix('grpc://'), compression=grpc.Compression.Gzip) as channel:
        encode = channel.unary_unary(
            '/mmembed.v1.Embedding/Encode',
            request_serializer=lambda m: m.SerializeToString(),
            response_deserializer=message('mmembed.v1.EncodeResponse').FromString,
        )
        q = message('mmembed.v1.EncodeRequest')()
        q.items.add(image=bytes(50 << 20))
        with pytest.raises(grpc.RpcError) as e: encode(q, timeout=HANG)
        assert e.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        q.items[0].image = PNG
        assert encode(q, timeout=HANG).results[0].status == 1


# ---- what a body is

def test_json_is_not_embedded_as_a_text(http, emb):
    for body in (
        b'{"input": "a cat"}',
        b' {"input": ["a"]}\n',
        b'["a", "b"]',
        '\ufeff{"input": "a"}'.encode(),
        '{"input": "a"}'.encode('utf-16'),
    ):
        r = post(http, body, 'text/plain;charset=UTF-8')
        assert r.status_code == 415 and 'send it as application/json' in r.json()['error']['message'], body
    for text in ('{a red} circle', '[sic]', '"a red circle"', '3'):
        assert np.allclose(
            vector(post(http, text.encode(), 'text/plain')), emb.encode_text([text])[0].numpy(), atol=1e-5
        ), text


def test_charsets_are_read_or_refused(http, emb):
    text = '一个红色的圆'
    want = emb.encode_text([text])[0].numpy()
    for coding in ('utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le', 'utf-16-be', 'utf-32'):
        assert np.allclose(
            vector(post(http, json.dumps(dict(input=text), ensure_ascii=False).encode(coding))), want, atol=1e-5
        ), coding
    for body, kind in (
        (text.encode('utf-8-sig'), 'text/plain'),
        (text.encode('utf-16'), 'text/plain'),
        (text.encode('utf-16-le'), 'text/plain; charset=UTF-16LE'),
        (text.encode(), 'text/plain; charset="utf-8"'),
    ):
        assert np.allclose(vector(post(http, body, kind)), want, atol=1e-5), kind
    r = http.post('/v1/embeddings', files=[('text', ('a.txt', text.encode('utf-16'), 'text/plain'))])
    assert np.allclose(vector(r), want, atol=1e-5)
    for charset in ('latin-1', 'gbk', 'unicode_escape', 'nonsense'):
        assert post(http, b'a', f'text/plain; charset={charset}').status_code == 415
    assert post(http, b'\xff\xfea', 'text/plain').status_code == post(http, b'\xff\xfe{').status_code == 400


def test_null_is_not_there_as_for_openai(http, emb, server):
    want = emb.encode_text(['a red circle'])[0].numpy()
    for more in (
        dict(model=None),
        dict(encoding_format=None),
        dict(dimensions=None),
        dict(user=None),
        dict(model=None, encoding_format=None, dimensions=None),
    ):
        assert np.allclose(vector(ask(http, **more)), want, atol=1e-5)
    image = dict(type='image', image=base64.b64encode(PNG).decode())
    # not for /v1/embeddings
    assert post(http, json.dumps(dict(query='a', candidates=[image], top_k=None, model=None))).status_code == 422
    assert http.post('/rank', json=dict(query='a', candidates=[image], top_k=None, model=None)).status_code == 200
    assert (
        http.post(
            '/classify', json=dict(input=image, labels=['a', 'b'], template=None, top_k=None, model=None)
        ).status_code
        == 200
    )
    assert http.post('/search', json=dict(query='a', top_k=None, where=None)).status_code == 404  # no index
    with connect(server.url.replace('http', 'ws') + '/v1/stream') as ws:
        ws.send('\ufeff' + json.dumps(dict(input='a red circle', encoding_format=None, model=None, id=None)))
        assert np.allclose(json.loads(ws.recv(60))['data'][0]['embedding'], want, atol=1e-5)


# ---- models and errors

def test_another_model_is_not_this_one(http, server, page):
    name = http.get('/v1/models').json()['data'][0]['id']
    unknown = dict(
        message=f'The model `gpt-9` does not exist; this server has `{name}`',
        type='invalid_request_error',
        param='model',
        code='model_not_found',
    )
    for r in (
        ask(http, model='gpt-9'),
        post(http, b'a', 'text/plain', '/v1/embeddings?model=gpt-9'),
        http.post('/rank', json=dict(query='a', candidates=['b'], model='gpt-9')),
        http.post('/classify', json=dict(input='a', labels=['b'], model='gpt-9')),
        http.post('/search', json=dict(query='a', model='gpt-9')),
        http.get('/v1/models/gpt-9'),
    ):
        assert r.status_code == 404 and r.json() == dict(error=unknown)
    for good in (name, '', None): assert ask(http, model=good).status_code == 200
    with connect(server.url.replace('http', 'ws') + '/v1/stream') as ws:
        ws.send(json.dumps(dict(input='a', model='gpt-9', id='q')))
        assert json.loads(ws.recv(60)) == dict(id='q', error=unknown)
    with grpc.insecure_channel(server.grpc.removeprefix('grpc://')) as channel:
        ready = channel.unary_unary(
            '/inference.GRPCInferenceService/ModelReady',
            request_serializer=lambda m: m.SerializeToString(),
            response_deserializer=bytes,
        )
        with pytest.raises(grpc.RpcError) as e:
            ready(message('inference.ModelReadyRequest')(name='gpt-9'), timeout=HANG)
        assert e.value.code() is grpc.StatusCode.NOT_FOUND
    page.headers['x-api-key'] = KEY
    assert ask(page, model='gpt-9').json()['model'] == 'mine' and page.get('/v2/models/gpt-9/ready').status_code == 200
    assert http.get('/v2/models/gpt-9/ready').status_code == 404


def test_the_type_of_an_error_is_that_of_its_status(http, page):
    del page.headers['x-api-key']
    def kind(r):
        e = r.json()['error']
        assert e['code'] == r.status_code and set(e) == {'message', 'type', 'param', 'code'}
        return r.status_code, e['type']

    assert kind(ask(page)) == (401, 'authentication_error') and kind(http.post('/admin/reload', json={})) == (
        403,
        'permission_error',
    )
    assert kind(http.get('/nothing')) == (404, 'invalid_request_error') and kind(post(http, b'{')) == (
        400,
        'invalid_request_error',
    )
    # a list of items, none of which was in time
    late = post(http, json.dumps(dict(input=['a'] * 60)), x_timeout='0.000001')
    assert kind(late) == (504, 'server_error')
    assert kind(ask(http, input=dict(type='image', image='eA=='))) == (422, 'invalid_request_error')


# ---- browsers

def test_a_page_can_read_why_it_was_refused(page):
    plain = {'access-control-allow-origin': APP, 'vary': 'Origin'}
    for r, status in (
        (ask(page), 401),
        (post(page, bytes(2 << 20), authorization='Bearer nothing'), 401),
        (post(page, bytes(2 << 20), x_api_key=KEY), 413),
        (post(page, (bytes(1 << 19) for _ in range(4)), x_api_key=KEY), 413),
        (post(page, b'{', x_api_key=KEY), 400),
        (post(page, b'', content_encoding='br', x_api_key=KEY), 415),
        (page.get('/nothing', headers={'x-api-key': KEY}), 404),
        (page.get('/livez'), 200),
    ):
        assert r.status_code == status and {k: r.headers[k] for k in plain} == plain, r.status_code
        shown = {x.strip() for x in r.headers['access-control-expose-headers'].split(',')}
        assert {'retry-after', *(k for k in r.headers if k.startswith('x-'))} <= shown == set(EXPOSED)
    r = page.post(
        '/v1/embeddings',
        content=PNG,
        headers={'content-type': 'image/png', 'accept': 'application/octet-stream', 'x-api-key': KEY},
    )
    assert (
        {k for k in r.headers if k.startswith('x-')}
        == {'x-shape', 'x-status', 'x-artifact', 'x-request-id'}
        <= set(EXPOSED)
    )
    ahead = {
        'access-control-request-method': 'POST',
        'access-control-request-headers': 'authorization, content-type, x-timeout',
    }
    r = page.options('/v1/embeddings', headers=ahead)
    assert (
        r.status_code == 200
        and r.headers['access-control-allow-origin'] == APP
        and 'x-timeout' in r.headers['access-control-allow-headers']
        and r.headers['x-request-id']
    )
    other = page.options('/v1/embeddings', headers=ahead | {'origin': 'https://evil.example'})
    assert 'access-control-allow-origin' not in other.headers


def open_socket(server, origin=None, key=None, headers=None, **kw):
    names = ['mmembed', 'mmembed.key.' + base64.urlsafe_b64encode(key.encode()).decode().rstrip('=')] if key else None
    return connect(
        server.url.replace('http', 'ws') + '/v1/stream',
        origin=origin,
        subprotocols=names,
        additional_headers=headers,
        **kw,
    )


def test_a_websocket_wants_a_key_and_an_origin_that_may_call(browsers, server):
    own = browsers.url
    for origin in (None, APP, own):
        with open_socket(browsers, origin, KEY) as ws:
            assert ws.subprotocol == 'mmembed'
            ws.send('{"input": "a red circle"}')
            assert len(json.loads(ws.recv(60))['data'][0]['embedding']) == 24
    with open_socket(browsers, headers={'authorization': f'Bearer {KEY}'}) as ws: assert ws.subprotocol is None
    for origin, key, status in (
        (None, None, 401),
        (APP, None, 401),
        (None, 'wrong', 401),
        ('https://evil.example', KEY, 403),
        ('null', KEY, 403),
        ('https://evil.example', None, 401),
    ):
        with pytest.raises(InvalidStatus) as e: open_socket(browsers, origin, key)
        assert (
            e.value.response.status_code == status
            and json.loads(e.value.response.body)['error']['message']
            and e.value.response.headers['x-request-id']
        )
    with open_socket(server, server.url): pass
    with pytest.raises(InvalidStatus): open_socket(server, APP)  # no origin is named to this one
    assert 'mmembed.key' not in open(browsers.config.log).read()


def test_head_is_get_without_the_body(http):
    name = http.get('/v1/models').json()['data'][0]['id']
    for path in (
        '/livez',
        '/readyz',
        '/metrics',
        '/info',
        '/v1/models',
        f'/v1/models/{name}',
        '/openapi.json',
        '/docs',
        '/v2',
        '/v2/health/ready',
        f'/v2/models/{name}',
    ):
        get, head = http.get(path), http.head(path)
        assert (
            head.status_code == get.status_code == 200
            and not head.content
            and head.headers['content-type'] == get.headers['content-type']
        ), path
        assert path == '/metrics' or head.headers['content-length'] == str(len(get.content)), path
    assert http.head('/v1/embeddings').status_code == 405 and http.head('/nothing').status_code == 404


def test_every_answer_has_its_date(http, server):
    for r in (
        http.get('/livez'),
        http.head('/livez'),
        http.get('/nothing'),
        post(http, b'{'),
        post(http, bytes(3 << 20)),
    ):
        assert re.fullmatch(r'\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT', r.headers['date'])
    with socket.create_connection(('127.0.0.1', int(server.url.rsplit(':', 1)[1])), timeout=HANG) as s:
        s.sendall(b'RUBBISH\r\n\r\n')
        assert b'\r\ndate: ' in s.recv(4096)


def test_the_docs_come_from_this_server_alone(http):
    r = http.get('/docs')
    assert (
        r.status_code == 200
        and not re.findall(r'''(?:src|href|url)\s*[=(]\s*["']?(?:https?:)?//''', r.text)
        and "default-src 'none'" in r.headers['content-security-policy']
    )
    assert (
        all(path in r.text for path in http.get('/openapi.json').json()['paths'])
        and http.get('/redoc').status_code == 404
    )


# ---- 503

def test_every_503_says_when_to_come_back(browsers, page):
    "Too many connections; then a server that drains."
    port = int(browsers.url.rsplit(':', 1)[1])
    held = [socket.create_connection(('127.0.0.1', port), timeout=HANG) for _ in range(16)]
    with httpx2.Client(base_url=browsers.url, timeout=HANG, headers={'origin': APP}) as h:
        r = ask(h)
        assert (
            why(r) == (503, '16 connections are open; try again later')
            and int(r.headers['retry-after']) > 0
            and r.headers['access-control-allow-origin'] == APP
        )
    # a busy server is alive
    with httpx2.Client(base_url=browsers.url, timeout=HANG) as h: assert h.get('/livez').status_code == 200
    for s in held: s.close()
    browsers.process.send_signal(signal.SIGTERM)
    with httpx2.Client(base_url=browsers.url, timeout=HANG) as h:
        while (r := h.get('/readyz')).status_code == 200: pass
        for path in ('/readyz', '/v2/health/ready'):
            r = h.get(path)
            assert r.status_code == 503 and int(r.headers['retry-after']) > 0
    browsers.process.send_signal(signal.SIGTERM)  # at once
