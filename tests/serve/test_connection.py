"""Bytes on a socket of the real server: every request is answered once, in order, and no body is read as a request."""
import json
import shutil
import socket
import subprocess

import numpy as np
import pytest

from mmembed.runtime.embedder import load

from tests.exporters import tiny
from tests.serve.test_server import serve_with
from tests.helpers import HANG, ended

# the body of the first request; an answer to it is a request smuggled in
HIDDEN = 'GET /info HTTP/1.1\r\nx-request-id: hidden\r\n\r\n'


@pytest.fixture(scope='module')
def emb(): return load(tiny.artifact())


def address(server): return '127.0.0.1', int(getattr(server, 'url', server).rsplit(':', 1)[1])


def answers(server, *writes):
    "The answers (status, headers, body) to bytes, until the server closes."
    with socket.create_connection(address(server), timeout=HANG) as s:
        data = b''
        try:
            for w in writes: s.sendall(w)
        except ConnectionError: pass  # closed before all had come
        try:
            while piece := s.recv(65536): data += piece
        except ConnectionResetError: pass  # closed with bytes unread
    out = []
    while data:
        head, _, data = data.partition(b'\r\n\r\n')
        line, *fields = head.decode('latin-1').split('\r\n')
        assert line.startswith('HTTP/1.1 '), line
        fields = dict(x.lower().split(': ', 1) for x in fields)
        size = int(fields.get('content-length', 0))
        if (status := int(line.split()[1])) >= 200: out.append((status, fields, data[:size]))
        data = data[size:]
    return out


def post(text, rid, *head, target='POST /v1/embeddings HTTP/1.1', length='content-length', body=None):
    "A request that embeds `text`, with more lines in its head, or instead of its length a `body` as it stands."
    data = text.encode() if body is None else body
    lines = [target, 'host: x', 'content-type: text/plain', f'x-request-id: {rid}', *head] + (
        [f'{length}: {len(data)}'] if body is None else []
    )
    return '\r\n'.join(lines).encode() + b'\r\n\r\n' + data


def chunked(text, extension=b'', trailers=b''):
    data = text.encode()
    pieces = [data[:7], data[7:]]
    return (
        b''.join(b'%x%s\r\n%s\r\n' % (len(p), extension, p) for p in pieces)
        + b'0'
        + extension
        + b'\r\n'
        + trailers
        + b'\r\n'
    )


LAST = post('a red circle', 'second') + post('a blue square', 'last', 'connection: close')
TE = 'transfer-encoding: chunked'
TRAILERS = b'x-request-id: trailer\r\nx-api-key: trailer\r\n'
READ = {  # heads after which the body is read as a body
    'plain': post(HIDDEN, 'first'),
    **{
        f'upgrade {u}': post(HIDDEN, 'first', 'connection: Upgrade', f'upgrade: {u}')
        for u in ('h2c', 'TLS/1.0', 'foo', 'websocket', 'h2c, websocket', '')
    },
    'java': post(
        HIDDEN,
        'first',
        'Connection: Upgrade, HTTP2-Settings',
        'Upgrade: h2c',
        'HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA',
    ),
    'two connections': post(HIDDEN, 'first', 'connection: upgrade', 'connection: keep-alive', 'upgrade: websocket'),
    'two upgrades': post(HIDDEN, 'first', 'connection: upgrade', 'upgrade: h2c', 'upgrade: websocket'),
    'case and blanks': post(HIDDEN, 'first', 'CONNECTION:  keep-alive ,UPGRADE ', 'UpGrade:\th2c '),
    'not named in connection': post(HIDDEN, 'first', 'upgrade: h2c', 'http2-settings: AA'),
    'chunks': post('', 'first', TE, body=chunked(HIDDEN)),
    'chunks with extensions and trailers': post('', 'first', TE, body=chunked(HIDDEN, b';a="b"', TRAILERS)),
    'upgrade and chunks': post(
        '', 'first', 'connection: upgrade', 'upgrade: h2c', TE, body=chunked(HIDDEN, b';x=y', TRAILERS)
    ),
    'expect': post(HIDDEN, 'first', 'expect: 100-continue'),
    'expect and upgrade': post(HIDDEN, 'first', 'expect: 100-continue', 'connection: upgrade', 'upgrade: h2c'),
    'empty lines before': b'\r\n\r\n' + post(HIDDEN, 'first'),
    'host in the target': post(HIDDEN, 'first', target='POST http://elsewhere/v1/embeddings HTTP/1.1'),
}
ENDS = {  # the first is answered, and then the connection ends
    'http 1.0': post(HIDDEN, 'first', target='POST /v1/embeddings HTTP/1.0'),
    'http 1.0, kept alive': post(HIDDEN, 'first', 'connection: keep-alive', target='POST /v1/embeddings HTTP/1.0'),
    'http 1.0, upgrade': post(
        HIDDEN, 'first', 'connection: upgrade', 'upgrade: websocket', target='POST /v1/embeddings HTTP/1.0'
    ),
    'close': post(HIDDEN, 'first', 'connection: close'),
    'close and upgrade': post(HIDDEN, 'first', 'connection: close, upgrade', 'upgrade: h2c'),
}
WRONG = {  # 400, once, and the connection ends
    'length and chunks': post(HIDDEN, 'first', TE),
    'chunks and length': post(HIDDEN, 'first', 'content-length: 0', TE, body=chunked(HIDDEN)),
    'upgrade, length and chunks': post(HIDDEN, 'first', 'connection: upgrade', 'upgrade: h2c', TE),
    'the same length twice': post(HIDDEN, 'first', f'content-length: {len(HIDDEN)}'),
    'two lengths': post(HIDDEN, 'first', 'content-length: 0'),
    **{
        f'length {v!r}': post('', 'first', f'content-length: {v}', body=HIDDEN.encode())
        for v in ('5, 5', '+5', '-5', '0x5', '5 5', '', '1' * 30)
    },
    'a blank before the colon': post(HIDDEN, 'first', length='content-length '),
    'a folded line': post(HIDDEN, 'first', 'x-a: b', ' content-length: 0'),
    'line feeds alone': post(HIDDEN, 'first').replace(b'\r\n', b'\n'),
    'one line feed alone': post(HIDDEN, 'first', 'x-a: b\nx-c: d'),
    'a carriage return alone': post(HIDDEN, 'first', 'x-a: b\rcontent-length: 0'),
    'a zero byte': post(HIDDEN, 'first', 'x-a: b\0c'),
    **{
        f'coding {v}': post('', 'first', f'transfer-encoding: {v}', body=chunked(HIDDEN))
        for v in ('xchunked', 'chunked, identity', 'chunked, chunked', 'gzip')
    },
    'a length in the trailers': post('', 'first', TE, body=chunked(HIDDEN, b'', b'content-length: 3\r\n')),
    'chunked twice': post('', 'first', TE, TE, body=chunked(HIDDEN)),
    'upgrade and no chunks': post(
        '', 'first', 'connection: upgrade', 'upgrade: h2c', 'transfer-encoding: gzip', body=HIDDEN.encode()
    ),
    **{
        f'chunk {v}': post('', 'first', TE, body=v + b'\r\n\r\n')
        for v in (b'zz\r\nabc', b'-3\r\nabc', b'3\nabc', b'f' * 20 + b'\r\nabc', b'3\r\nabcd', b'3 \r\nabc')
    },
    'http 2': b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0',
    'http 1.2': post(HIDDEN, 'first', target='POST /v1/embeddings HTTP/1.2'),
    'a method in lower case': post(HIDDEN, 'first', target='post /v1/embeddings HTTP/1.1'),
    'connect': post(HIDDEN, 'first', target='CONNECT /v1/embeddings HTTP/1.1'),
    'connect to a host': post(HIDDEN, 'first', target='CONNECT example.com:443 HTTP/1.1'),
    'a target beyond ASCII': post(HIDDEN, 'first', target='POST /v1/émbeddings HTTP/1.1'),
}


def told(server, emb, *writes):
    "(status, id) of each answer; a vector is held to the text of the request whose id it bears."
    out = answers(server, *writes)
    texts = dict(first=HIDDEN, second='a red circle', last='a blue square')
    for status, fields, body in out:
        if status == 200 and (rid := fields.get('x-request-id')) in texts:
            assert np.allclose(
                json.loads(body)['data'][0]['embedding'], emb.encode_text([texts[rid]])[0].numpy(), atol=1e-5
            ), rid
    return [(status, fields.get('x-request-id')) for status, fields, _ in out]


def parts(data):
    "In one write, and with a pause of the sender behind the head, in the middle of it, and in the body."
    at = data.index(b'\n\r\n', 30) + 3 if b'\n\r\n' in data[30:] else 40
    return (data,), (data[:at], data[at:]), (data[:30], data[30:at + 3], data[at + 3:])


@pytest.mark.parametrize('case', READ)
def test_what_cannot_be_granted_is_ignored_and_the_body_read(server, emb, case):
    for writes in parts(READ[case] + LAST):
        assert told(server, emb, *writes) == [(200, 'first'), (200, 'second'), (200, 'last')]


@pytest.mark.parametrize('case', ENDS)
def test_a_last_request_is_the_last(server, emb, case):
    for writes in parts(ENDS[case] + LAST): assert told(server, emb, *writes) == [(200, 'first')]


@pytest.mark.parametrize('case', WRONG)
def test_what_cannot_be_parsed_is_answered_once(server, emb, case):
    for writes in parts(WRONG[case] + LAST): assert [status for status, _ in told(server, emb, *writes)] == [400]


def test_what_is_broken_does_not_take_the_place_of_what_came_before(server, emb):
    good, broken = post('a red circle', 'second'), post('', 'third', TE, body=b'3\r\nabc\r\nzz\r\n')
    for rubbish in (b'RUBBISH\r\n\r\n', WRONG['two lengths'], broken):
        assert told(server, emb, good + rubbish) == [(200, 'second'), (400, None)]
    assert told(server, emb, good * 3 + broken + good) == [(200, 'second')] * 3 + [(400, None)]


def test_a_transfer_coding_that_is_not_known(server, emb):
    assert told(server, emb, post('', 'first', 'transfer-encoding: gzip, chunked', body=chunked(HIDDEN)) + LAST)[0] == (
        501,
        'first',
    )


HANDSHAKE = (
    'connection: Upgrade', 'upgrade: websocket', 'sec-websocket-version: 13',
    'sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==',
)


def test_a_websocket_begins_where_nothing_else_is_under_way(server, emb):
    ask = lambda *more, target='GET /v1/stream HTTP/1.1': '\r\n'.join(
        [target, 'host: x', 'x-request-id: socket', *HANDSHAKE, *more, '', '']
    ).encode()
    def opened(data, n=4096):
        with socket.create_connection(address(server), timeout=HANG) as s:
            s.sendall(data)
            return s.recv(n)
    assert opened(ask()).startswith(b'HTTP/1.1 101 ')
    # frames before the answer
    assert told(server, emb, ask() + b'\x81\x80\0\0\0\0' + LAST) == [(400, None)]
    assert told(server, emb, ask('content-length: 5') + b'abcde' + LAST) == [
        (404, 'socket'),
        (200, 'second'),
        (200, 'last'),
    ]
    assert told(server, emb, post('a red circle', 'second') + ask() + LAST) == [
        (200, 'second'),
        (404, 'socket'),
        (200, 'second'),
        (200, 'last'),
    ]
    assert told(server, emb, ask(target='GET /v1/stream HTTP/1.0') + LAST) == [(404, 'socket')]


def test_who_was_not_told_to_continue_is_not_waited_for(server, emb):
    "The body does not follow a refusal; what follows instead is no body."
    out = answers(
        server,
        post('', 'first', 'expect: 100-continue', 'content-length: 50', target='POST /nothing HTTP/1.1', body=b''),
    )
    assert [(status, fields['connection']) for status, fields, _ in out] == [(404, 'close')]


@pytest.mark.parametrize(
    'data',
    [b'GET / HTTP/1.1\r\nx: ', post('', 'first', TE, body=b'3;'), post('', 'first', TE, body=b'0\r\nx: ')],
    ids=['head', 'extension', 'trailer'],
)
def test_what_never_ends_is_cut_off(server, data):
    with socket.create_connection(address(server), timeout=HANG) as s:
        s.sendall(data)
        with pytest.raises(ConnectionError):
            for _ in range(10_000): s.sendall(b'y' * 65536)


def test_curl_offers_http2(server, emb):
    curl = shutil.which('curl')
    if not curl or 'HTTP2' not in subprocess.run([curl, '--version'], capture_output=True, text=True).stdout:
        pytest.skip('needs a curl with HTTP/2')
    said = subprocess.run(
        [
            curl,
            '-sv',
            '--http2',
            f'{server.url}/v1/embeddings',
            '-H',
            'content-type: text/plain',
            '-d',
            'a red circle',
            '--next',
            '-s',
            '--http2',
            f'{server.url}/v1/embeddings',
            '-H',
            'content-type: text/plain',
            '-d',
            'a blue square',
        ],
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert 'Upgrade: h2c' in said.stderr
    got = [json.loads(x)['data'][0]['embedding'] for x in said.stdout.replace('}{', '}\n{').splitlines()]
    assert np.allclose(got, emb.encode_text(['a red circle', 'a blue square']).numpy(), atol=1e-5)


JAVA = '''
import java.net.URI;
import java.net.http.*;
import java.net.http.HttpRequest.BodyPublishers;
public class Ask {
    public static void main(String[] args) throws Exception {
        HttpClient client = HttpClient.newHttpClient();
        for (String kind : new String[] {"application/json", "text/plain"}) for (int i = 0; i < 8; i++) {
            String text = "a red circle " + i;
            String body = kind.equals("text/plain") ? text : "{\\"input\\": [\\"" + text + "\\"]}";
            HttpRequest request = HttpRequest.newBuilder(URI.create(args[0] + "/v1/embeddings"))
                .header("content-type", kind).POST(BodyPublishers.ofString(body)).build();
            HttpResponse<String> r = client.send(request, HttpResponse.BodyHandlers.ofString());
            System.out.println(r.statusCode() + " " + r.body());
        }
    }
}'''


def test_javas_client_as_it_comes(server, emb, tmp_path):
    java = shutil.which('java')
    if (
        not java
        or 'jdk.compiler' not in subprocess.run([java, '--list-modules'], capture_output=True, text=True).stdout
    ):
        pytest.skip('needs a JDK')
    (tmp_path/'Ask.java').write_text(JAVA)
    said = subprocess.run(
        [java, '-XX:TieredStopAtLevel=1', str(tmp_path / 'Ask.java'), server.url],
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert said.returncode == 0, said.stderr[-2000:]
    rows = [line.split(' ', 1) for line in said.stdout.splitlines()]
    assert [status for status, _ in rows] == ['200'] * 16
    want = emb.encode_text([f'a red circle {i}' for i in range(8)] * 2).numpy()
    assert np.allclose([json.loads(body)['data'][0]['embedding'] for _, body in rows], want, atol=1e-5)


def test_behind_a_proxy_that_loses_bodies_nothing_is_smuggled_in(tmp_path):
    """uvicorn's own protocol, as in Ray's proxy: the request is refused, the connection ends, and what was its body
    is not answered."""
    p, url = serve_with('''
        import mmembed.serve.server as s
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
        s.Protocol = HttpToolsProtocol''', tmp_path)
    with ended(p):
        for case in ('java', 'upgrade and chunks', 'two connections'):
            for writes in parts(READ[case] + LAST): assert [status for status, _, _ in answers(url, *writes)] == [400]
        assert [status for status, _, _ in answers(url, READ['plain'] + LAST)] == [200] * 3
