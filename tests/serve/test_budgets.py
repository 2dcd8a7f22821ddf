"""Bytes and pixels have an end: long texts hold nobody up, and neither bodies nor pictures fill the memory."""
import asyncio
import functools
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
from concurrent.futures import Future

import grpc
import httpx2
import pytest
from PIL import Image
from websockets.sync.client import connect

from mmembed.exporters.verify import samples as cases
from mmembed.runtime.embedder import Embedder
from mmembed.serve.engine import Engine, Options
from mmembed.serve.queue import Item
from mmembed.serve.queue import PendingRequest
from mmembed.serve.protobuf import message, methods
from mmembed.serve.server import running
from mmembed.serve.service import Config, Service
from mmembed.serve.entries import Downloads, run

from tests.exporters import tiny
from tests.serve.conftest import config
from tests.helpers import HANG, until

FILES = cases.images()
WORD = 'q' * 200_000  # which has no place where it may be cut


def embedder(make=tiny.artifact):
    "One of the test's own, whose methods may be replaced."
    return Embedder(make())


def submit(engine, *items):
    done = Future()
    engine.submit([Item(*i) for i in items], done.set_result)
    return done


def settled(done): return done.result(HANG).items


@functools.cache
def flat_gif(width, height):
    out = io.BytesIO()
    Image.new('P', (width, height)).save(out, 'GIF')
    return out.getvalue()


def test_a_client_gets_no_more_time_than_the_server_gives(monkeypatch):
    "By the engine, for the parts of a long request, and for what is fetched."
    service, given = (
        Service(Config(tiny.artifact(), log=os.devnull, engine=Options(batch=4, decoders=2, timeout=HANG))),
        [],
    )
    asked, most = (None, HANG / 2, 1e6), [HANG, HANG / 2, HANG]
    async def told(items, timeout=None, *_):
        given.append(timeout)
        return PendingRequest(items, None)
    async def left(seconds): return Downloads(service, seconds).end - asyncio.get_running_loop().time()
    try:
        monkeypatch.setattr(service.engine, 'run', told)
        for seconds in asked: asyncio.run(service.run([Item('text', 'a')], seconds))
        assert given == most
        assert all(asyncio.run(left(s)) <= limit for s, limit in zip(asked, most))
        monkeypatch.setattr(service, 'run', told)
        for seconds in asked: asyncio.run(run(service, [Item('text', 'a')], seconds))
        assert all(0 < t <= limit for t, limit in zip(given[3:], most, strict=True))
    finally: service.close()


def test_a_long_text_holds_up_no_short_one():
    emb = embedder()
    engine, go, began, tokenize = Engine(emb), threading.Event(), threading.Event(), emb.tokenize
    def slow(texts):
        if any(len(t) > 100_000 for t in texts):
            began.set()
            go.wait(HANG)
        return tokenize(texts)
    emb.tokenize = slow
    long = [submit(engine, ('text', WORD)) for _ in range(3)]
    assert began.wait(HANG)
    # while the long one is under way
    for _ in range(20): assert settled(submit(engine, ('text', 'a red circle')))[0].status == 'ok'
    assert not any(d.done() for d in long)
    go.set()
    assert [settled(d)[0].status for d in long] == ['ok'] * 3 and engine.close()


def test_a_turn_of_the_tokenizer_has_an_end_in_bytes():
    emb = embedder()
    engine, turns, tokenize, go = Engine(emb, Options(batch=16)), [], emb.tokenize, threading.Event()
    def counted(texts):
        go.wait(HANG)
        turns.append([len(t) for t in texts])
        return tokenize(texts)
    emb.tokenize = counted
    done = submit(engine, *[('text', 'x' * 900)] * 100, *[('text', 'x' * 20_000)] * 20, ('text', WORD))
    go.set()
    assert {i.status for i in settled(done)} == {'ok'} and engine.close()
    assert (
        sum(map(len, turns)) == 121
        and all(len(t) == 1 or sum(t) <= 1 << 16 for t in turns)
        and max(map(len, turns)) > 10
    )


@pytest.mark.parametrize('form', [str, str.encode])
def test_the_bytes_of_a_text_are_those_of_its_utf8(form):
    engine = Engine(embedder(), Options(max_text=12))
    items = settled(
        submit(
            engine,
            *[('text', form(t)) for t in ('圆' * 4, '圆' * 5, 'a' * 12, 'a' * 13, '\U0001f534' * 3, '\U0001f534' * 4)],
        )
    )
    assert [i.size for i in items] == [12, 15, 12, 13, 12, 16]
    assert [i.status for i in items] == ['ok', 'invalid'] * 3 and items[
        1
    ].error == '15 bytes of text; this server takes up to 12'
    assert engine.close()


def test_the_text_of_a_pair_is_shortened_or_goes_alone():
    emb = embedder(tiny.pair_artifact)
    engine, batches, pairs, go = Engine(emb, Options(batch=8)), [], emb._pairs, threading.Event()
    def counted(texts, levels):
        go.wait(HANG)
        batches.append([len(t) for t in texts])
        return pairs(texts, levels)
    emb._pairs = counted
    image = FILES['RGB.png']
    done = submit(
        engine,
        *[('pair', (t, image)) for t in ('a', 'a red circle ' * 9000, WORD, 'b', WORD)],
        ('pair', ('圆' * 400_000, image)),
    )
    go.set()
    assert [i.status for i in settled(done)] == ['ok'] * 5 + ['invalid'] and engine.close()
    assert sorted(n for b in batches for n in b if n < 10) == [1, 1] and sum(len(b) for b in batches) == 5
    assert all(len(b) == 1 for b in batches if max(b) > 2000) and sum(max(b) > 2000 for b in batches) == 2


def test_pixels_that_are_being_decoded_have_a_budget():
    emb = embedder()
    picture, threads = flat_gif(100, 80), 4
    engine, decode, go, inside = (
        Engine(emb, Options(decoders=threads, pixels=2 * 100 * 80)),
        emb.decode,
        threading.Event(),
        [],
    )
    def held(image):
        inside.append(engine.pixels.held)
        go.wait(HANG)
        return decode(image)
    emb.decode = held
    done = submit(engine, *[('image', picture)] * 6)
    until(lambda: len(inside) + len(engine.pixels._queue) >= threads)
    assert len(inside) == 2 and not engine.health()  # the others wait, and are not stuck
    go.set()
    assert (
        {i.status for i in settled(done)} == {'ok'}
        and max(inside) <= 2 * 100 * 80
        and not engine.pixels.held
        and engine.close()
    )


def test_a_small_file_of_many_pixels_is_refused_unread():
    emb = embedder()
    emb.decode, engine = None, Engine(emb)
    [item] = settled(submit(engine, ('image', flat_gif(7072, 7072))))
    assert (
        item.status == 'invalid'
        and item.error == '7072 x 7072 pixels; this server takes up to 33,554,432'
        and engine.close()
    )


# ---- the server process

@pytest.fixture(scope='module')
def narrow(tmp_path_factory):
    with running(config(tmp_path_factory.mktemp('narrow')/'log', bodies=300_000, max_body=400_000)) as s: yield s


def upload(server, size, part):
    "A connection on which `part` of `size` bytes of an image have been sent."
    s = socket.create_connection(('127.0.0.1', int(server.url.rsplit(':', 1)[1])), timeout=HANG)
    s.sendall(
        f'POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-type: image/png\r\ncontent-length: {size}\r\n\r\n'.encode()
        + bytes(part)
    )
    return s


def asked(server):
    "The status of a request that announces 200,000 bytes and sends none: 429 while they do not fit, else 100."
    with socket.create_connection(('127.0.0.1', int(server.url.rsplit(':', 1)[1])), timeout=HANG) as s:
        s.sendall(
            b'POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-type: image/png\r\nexpect: '
            b'100-continue\r\ncontent-length: 200000\r\n\r\n'
        )
        return int(s.recv(65536).split()[1])


def reached(f, found):
    "What `f` returns once `found` is true of it."
    return until(lambda: [x] if found(x := f()) else None)[0]


def test_bodies_in_hand_have_a_budget(narrow):
    """While one request holds its bytes another that does not fit is told to come again, by every way in.

    Then it is answered."""
    Encode, OneItem = message('mmembed.v1.EncodeRequest'), message('mmembed.v1.Item')
    q, a, _, _ = methods('mmembed.v1.Embedding')['Encode']
    with (
        httpx2.Client(base_url=narrow.url, timeout=HANG) as http,
        grpc.insecure_channel(narrow.grpc.removeprefix('grpc://')) as channel,
        connect(narrow.url.replace('http', 'ws') + '/v1/stream') as ws,
    ):
        encode = channel.unary_unary('/mmembed.v1.Embedding/Encode', q.SerializeToString, a.FromString)
        def post(): return http.post('/v1/embeddings', content=bytes(200_000), headers={'content-type': 'image/png'})
        def by_rpc():
            try: return encode(Encode(items=[OneItem(image=bytes(200_000))])).results[0].status
            except grpc.RpcError as e: return e.code().name
        def by_socket():
            ws.send(bytes(200_000))
            return json.loads(ws.recv(60))
        assert post().status_code == 422 and by_rpc() == 2 and 'error' not in by_socket()
        with upload(narrow, 200_000, 150_000) as first:
            assert reached(lambda: asked(narrow), lambda status: status == 429) == 429  # all its bytes are in
            r = post()
            assert (
                r.status_code == 429
                and int(r.headers['retry-after']) >= 1
                and 'as many bytes as they may' in r.json()['error']['message']
            )
            assert by_rpc() == 'RESOURCE_EXHAUSTED' and by_socket()['error']['code'] == 429
            assert http.post('/v1/embeddings', json=dict(input='a red circle')).status_code == 200  # what is small fits
            first.sendall(bytes(50_000))
            assert b' 422 ' in first.recv(65536).split(b'\r\n')[0]  # zeros are no image
        # and one that goes away gives them back
        with upload(narrow, 200_000, 150_000): reached(lambda: asked(narrow), lambda status: status == 429)
        assert reached(post, lambda r: r.status_code == 422).status_code == 422
        assert reached(by_rpc, lambda r: r == 2) == 2 and 'error' not in by_socket()


def test_a_body_that_grows_beyond_the_budget_is_refused_while_it_comes(narrow):
    def chunk(n): return b'%x\r\n%s\r\n' % (n, bytes(n))

    with (
        upload(narrow, 200_000, 150_000),
        socket.create_connection(('127.0.0.1', int(narrow.url.rsplit(':', 1)[1])), timeout=HANG) as s,
    ):
        reached(lambda: asked(narrow), lambda status: status == 429)
        s.sendall(
            b'POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-type: image/png\r\ntransfer-encoding: chunked\r\n\r\n'
        )
        for _ in range(3): s.sendall(chunk(60_000))
        s.sendall(b'0\r\n\r\n')
        assert re.match(rb'HTTP/1.1 429 ', s.recv(65536))


def test_many_large_uploads_leave_the_server_alive(narrow):
    "Each is answered or told to come again; afterwards nothing is held."
    results = []
    def send():
        try:
            results.append(
                httpx2.post(
                    narrow.url + '/v1/embeddings',
                    content=flat_gif(3000, 3000) + bytes(150_000),
                    headers={'content-type': 'image/gif'},
                    timeout=HANG,
                ).status_code
            )
        except httpx2.HTTPError as e:
            results.append(type(e).__name__)
    threads = [threading.Thread(target=send) for _ in range(12)]
    for t in threads: t.start()
    for t in threads: t.join(HANG)
    assert len(results) == 12 and 200 in results and set(results) <= {200, 429}, results
    assert (
        reached(
            lambda: (
                httpx2.post(
                    narrow.url + '/v1/embeddings',
                    content=flat_gif(300, 300),
                    headers={'content-type': 'image/gif'},
                    timeout=HANG,
                ).status_code
            ),
            lambda c: c == 200,
        )
        == 200
    )


@pytest.mark.parametrize('kind', ['RLIMIT_AS', 'RLIMIT_DATA'])
def test_budgets_go_by_the_limit_that_ulimit_sets(kind):
    "As by that of a container: budgets of a machine's whole memory would let a process run into its own limit."
    program = f'''
import resource as r
from mmembed.core.threads import memory
before = memory()
r.setrlimit(r.{kind}, (10 ** 8, r.getrlimit(r.{kind})[1]))
print(before > 10 ** 8, memory())'''
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', program], capture_output=True, text=True)
    assert done.stdout.split() == ['True', str(10 ** 8)], done
