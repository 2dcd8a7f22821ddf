"""The client against a real server, by HTTP and by gRPC, and against servers that misbehave."""
import asyncio
import io
import json
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mmembed as mm
from mmembed.exporters.verify import samples as cases
from mmembed.runtime.embedder import load
from mmembed.serve.client import Client
from mmembed.serve.transport import ServiceError

from tests.exporters import tiny

FILES = cases.images()


@pytest.fixture(scope='module')
def emb(): return load(tiny.artifact())


@pytest.fixture(params=['http', 'grpc'])
def client(request, server):
    with Client(server.url if request.param == 'http' else server.grpc, batch_size=7) as c: yield c


def test_it_imports_no_torch():
    program = """
import sys, mmembed
mmembed.Client('grpc://x:1')
import mmembed.serve.protobuf
print([m for m in ('torch', 'fastapi', 'mmembed.core.types') if m in sys.modules])"""
    assert subprocess.run([sys.executable, '-c', program], capture_output=True, text=True).stdout.strip() == '[]'


def test_every_form_of_an_item_is_the_embedders(client, emb, tmp_path):
    (tmp_path/'x.jpg').write_bytes(FILES['quality 75.jpg'])
    picture = Image.open(io.BytesIO(FILES['quality 75.jpg']))
    items = [
        'a red circle',
        FILES['RGBA.png'],
        tmp_path / 'x.jpg',
        picture,
        np.asarray(picture),
        Image.open(io.BytesIO(FILES['exif 6.jpg'])),
        '一',
        bytearray(FILES['RGB.png']),
    ] * 3
    want = [emb.encode_text([i]) if isinstance(i, str) else emb.encode_image([i]) for i in items]
    got = client.encode(items)
    assert got.shape == (24, 24) and got.dtype == np.float32 and np.allclose(got, np.concatenate(want), atol=1e-5)
    assert np.allclose(asyncio.run(client.aencode(items)), got, atol=1e-6)


def test_what_is_broken_fails_alone(client, emb, tmp_path):
    files = list(FILES.values())
    want = emb.encode_image(files, on_error='flag')
    seen = []
    got = client.encode(
        [*files, tmp_path / 'none.jpg', 7, 'text'],
        on_error='flag',
        done_callback=lambda r: seen.append(r.index),
        error_callback=lambda r: seen.append(-r.index - 1),
        always_callback=lambda r: seen.append(r),
    )
    assert got.errors[:len(files)] == want.errors and np.allclose(got.embedding[:len(files)], want.embedding, atol=1e-5)
    assert (
        got.ok.tolist() == [*want.ok.tolist(), False, False, True]
        and 'No such file' in got.errors[-3]
        and 'int is neither' in got.errors[-2]
    )
    assert (
        [s if s >= 0 else -s - 1 for s in seen if isinstance(s, int)]
        == [s.index for s in seen if not isinstance(s, int)]
        == list(range(len(files) + 3))
    )
    assert client.encode([files[0], b'bad'], on_error='skip').embedding.shape == (1, 24)
    with pytest.raises(ValueError, match=r'items\[1\]: not an image'): client.encode(['a', b'bad', b'bad'])
    assert client.encode([]).shape == (0, 0) and client.encode([b'bad'], on_error='skip').embedding.shape[0] == 0


def test_on_error_means_what_it_does_in_an_embedder(client, emb):
    items = ['a', FILES['RGB.png'][:60], 'b']
    for policy in ('flag', 'skip'):
        got, want = client.encode(items, on_error=policy), emb.encode_text(['a', 'b'])
        rows = got.embedding if policy == 'skip' else got.embedding[[0, 2]]
        assert np.allclose(rows, want, atol=1e-5) and got.ok.tolist() == [True, False, True]
        assert len(asyncio.run(client.aencode(items, policy)).embedding) == len(got.embedding)
    with pytest.raises(ValueError, match=r'items\[1\]'): client.encode(items, on_error='raise')


def test_older_names_of_arguments_still_work(client):
    """What users of CLIP-as-service's client write: functions as on_done, on_error, on_always.

    And the older `errors`."""
    items, seen = ['a', b'bad', 'b'], []
    def noted(name): return lambda r: seen.append((name, r.index))
    with pytest.warns(DeprecationWarning, match='on_done is now done_callback'):
        client.encode(['a', 'b'], on_done=noted('done'), on_always=noted('always'))
    assert seen == [('done', 0), ('always', 0), ('done', 1), ('always', 1)]
    with pytest.warns(DeprecationWarning, match='errors is now on_error'):
        assert client.encode(items, errors='flag').ok.tolist() == [True, False, True]
    with pytest.warns(DeprecationWarning, match='a function as on_error is now error_callback'):
        got = client.encode(items, on_error=noted('error'), errors='skip')
    assert len(got.embedding) == 2 and seen[4:] == [('error', 1)]
    with pytest.warns(DeprecationWarning), pytest.raises(ValueError, match='items'):  # 'raise' is the default
        client.encode(items, on_error=noted('late'))
    assert seen[5:] == [('late', 1)]
    for wrong in (
        dict(error_callback=print, on_error=print),
        dict(done_callback=print, on_done=print),
        dict(on_dnoe=print),
    ):
        with pytest.raises(TypeError, match='pass only|no argument'): client.encode(items, **wrong)


def test_what_is_too_large_fails_alone(server, client, emb):
    "An item that no request may hold, amid others; and more items than the server takes at once."
    client.batch_bytes = 16 << 20
    got = client.encode(['a', bytes(3 << 20), FILES['RGB.png']], on_error='flag')
    assert (
        got.ok.tolist() == [True, False, True]
        and 'larger' in got.errors[1]
        and np.allclose(got.embedding[2], emb.encode_image([FILES['RGB.png']])[0], atol=1e-5)
    )


def test_more_than_the_server_takes_goes_in_parts(client, emb):
    "Items, candidates and labels beyond the 64 items of a request: the answers are those of one request."
    client.batch_size = 200
    texts = [f'text {k}' for k in range(150)]
    assert np.allclose(client.encode(texts), emb.encode_text(texts), atol=1e-5)
    score = emb.score(texts, [FILES['RGB.png']])[:, 0].double()
    ranked = client.rank(FILES['RGB.png'], [*texts[:75], 7, *texts[75:]])
    good = [m for m in ranked if not m.error]
    assert len(good) == 150 and ranked[-1].index == 75 and ranked[-1].error and np.isnan(ranked[-1].score)
    assert np.allclose([m.score for m in good], score.sort(descending=True).values, atol=1e-3)
    assert np.allclose([m.probability for m in good], score.softmax(0).sort(descending=True).values, atol=1e-5)
    # unknown words are alike: their order is not said
    def best(indices, n):
        return len(set(indices)) == n and np.allclose(score[indices], score.sort(descending=True).values[:n], atol=1e-3)
    assert best([m.index for m in client.rank(FILES['RGB.png'], texts, top_k=3)], 3)
    found = client.classify([FILES['RGB.png'], b'bad', FILES['quality 75.jpg']], texts, top_k=5)
    assert [len(row) for row in found] == [5, 0, 5] and best([texts.index(label) for label, _ in found[0]], 5)
    assert np.allclose([p for _, p in found[0]], [m.probability for m in good[:5]], atol=1e-5)


def test_a_str_that_names_an_image_is_not_embedded_as_words(client, emb, server, tmp_path):
    (tmp_path/'x.png').write_bytes(FILES['RGB.png'])
    path = str(tmp_path/'x.png')
    got = client.encode(
        ['a', path, mm.Text(path), mm.Image(path), 'https://example.org/x.png', mm.Image(FILES['RGB.png'])],
        on_error='flag',
    )
    assert got.ok.tolist() == [True, False, True, True, False, True] and all(
        'names an image' in e for e in np.array(got.errors)[~got.ok]
    )
    assert np.allclose(got.embedding[2], emb.encode_text([path.encode()])[0], atol=1e-5)
    assert np.allclose(got.embedding[[3, 5]], emb.encode_image([tmp_path/'x.png']), atol=1e-5)
    for ask in (
        lambda: client.rank('x.png', ['a']),
        lambda: client.search('x.png'),
        lambda: client.profile(['x.png'], n=1),
    ):
        with pytest.raises(ValueError, match='names an image'): ask()
    assert client.rank(mm.Image(path), ['x.png', 'a'])[-1].error and client.classify(['x.png', 'a'], ['b'])[0] == []
    assert client.rank(mm.Image(path), [mm.Text('x.png')])[0].error == ''


def test_generators_are_read_no_further_than_needed(client):
    read = []
    def many():
        for k in range(200):
            read.append(k)
            yield f'text {k}'
    stream = client.stream(many())
    assert next(stream).index == 0 and len(read) <= 7 * 4 + 1
    stream.close()
    async def slowly():
        for _ in range(20):
            await asyncio.sleep(.001)
            yield 'a'
    assert asyncio.run(client.aencode(slowly())).shape == (20, 24)


def test_threads_share_one_client(client):
    want = client.encode(['a', 'b', 'c'])
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda k: client.encode(['a', 'b', 'c'] * 10), range(24)):
            assert np.allclose(got, np.tile(want, (10, 1)), atol=1e-5)


def test_rank_info_profile(client, emb):
    texts = ['a red circle', 'x', '一个红色的圆']
    ranked, score = client.rank(FILES['RGB.png'], texts), emb.score(texts, [FILES['RGB.png']])[:, 0].numpy()
    assert [m.index for m in ranked] == list(np.argsort(-score)) and np.allclose(
        [m.score for m in ranked], np.sort(score)[::-1], atol=1e-4
    )
    assert client.rank('a', [b'bad', FILES['RGB.png'], Path('none.jpg')])[0].index == 1 and [
        m.error for m in client.rank('a', [Path('none.jpg')])
    ] == ['none.jpg: No such file or directory']
    assert (
        client.rank('a', [b'bad', FILES['RGB.png']])[-1].error
        and len(asyncio.run(client.arank('a', [FILES['RGB.png']] * 3, top_k=2))) == 2
    )
    assert client.info()['short_hash'] == emb.card['short_hash'] == asyncio.run(client.ainfo())['short_hash']
    times = client.profile([FILES['RGB.png']], n=3)
    assert times['round_trip'] >= times['total'] > times['forward'] > 0 and times['decode'] > 0 and times['queue'] >= 0


def test_wrong_use():
    for url in ('localhost:8000', 'ws://x', ''):
        with pytest.raises(ValueError, match='url must begin with'): Client(url)
    for single in ('a', b'a', np.zeros((2, 2), np.uint8), Image.new('L', (2, 2)), None, {}):
        with pytest.raises(TypeError, match='items is (a single|None)'): Client('http://x').encode(single)
    with pytest.raises(TypeError, match='items is a single str'): Client('http://x').profile('a')
    for items, n in (([], 3), (['a'], 0)):
        with pytest.raises(ValueError, match='profile needs items and n of at least 1'):
            Client('http://x').profile(items, n=n)
    with pytest.raises(ValueError, match='grpcs:// cannot leave TLS unverified'): Client('grpcs://x', verify=False)
    with pytest.raises(ValueError, match="'raise', 'flag' or 'skip'"): Client('http://x').encode(['a'], on_error='no')
    for url in ('http://127.0.0.1:9', 'grpc://127.0.0.1:9'):
        with pytest.raises(ServiceError): Client(url, retries=1).encode(['a'])


def test_it_tries_again_when_told_to_and_not_otherwise():
    """A server that is busy, then starting, then breaks the connection, then answers for half of the items, then for
    the rest."""
    script, seen = ['429', '503', 'cut', 'half', 'ok', '500'], []
    class Moody(BaseHTTPRequestHandler):
        protocol_version = 'HTTP/1.1'
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers['content-length'])))
            mood = script.pop(0)
            seen.append((mood, len(body['input'])))
            if mood == 'cut':
                self.close_connection = True
                return self.connection.shutdown(socket.SHUT_RDWR)
            rows = [
                dict(index=i, status='unavailable' if mood == 'half' and i % 2 else 'ok', embedding='AACAPw==')
                for i in range(len(body['input']))
            ]
            out = json.dumps(dict(data=rows) if mood in ('half', 'ok') else dict(error=dict(message='later'))).encode()
            self.send_response(int(mood) if mood.isdigit() else 200)
            self.send_header('content-length', str(len(out)))
            self.send_header('retry-after', '0')
            self.end_headers()
            self.wfile.write(out)
        def log_message(self, *_): pass
    web = ThreadingHTTPServer(('127.0.0.1', 0), Moody)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    with Client(f'http://127.0.0.1:{web.server_port}') as client:
        assert client.encode(['a', 'b', 'c', 'd']).tolist() == [[1.]] * 4
        assert seen == [('429', 4), ('503', 4), ('cut', 4), ('half', 4), ('ok', 2)]
        with pytest.raises(ServiceError, match='500: later'): client.encode(['a'])
    web.shutdown()
