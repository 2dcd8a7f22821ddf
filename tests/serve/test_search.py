"""/search over a real index, and /classify with labels given, with the artifact's own, and for pairs: all as the
Embedder answers."""
import asyncio

import httpx2
import numpy as np
import pytest

from mmembed.exporters.verify import samples as cases
from mmembed.runtime.embedder import Embedder
from mmembed.serve.client import Client
from mmembed.serve.transport import ServiceError
from mmembed.serve.server import running

from tests.helpers import HANG
from tests.exporters import tiny
from tests.retrieval.test_index import HOSTILE_CONDITIONS
from tests.serve.conftest import config

FILES = cases.images()
GOOD = [k for k in FILES if k in ('RGB.png', 'quality 75.jpg')]


@pytest.fixture(scope='module')
def index(tmp_path_factory):
    "The folder of an index over pictures of three colours, and its model."
    pytest.importorskip('lancedb', reason='needs the extra search')
    from PIL import Image
    from mmembed.retrieval.index import Index
    folder = tmp_path_factory.mktemp('search')
    (folder/'pictures').mkdir()
    for k, color in enumerate(('red', 'green', 'blue', 'black', 'white')):
        Image.new('RGB', (40 + k, 40), color).save(folder / 'pictures' / f'{color}.png')
    Index.build(tiny.artifact(), folder/'pictures', folder/'index')
    return folder/'index', folder/'pictures'


@pytest.fixture(scope='module')
def searching(index, tmp_path_factory):
    with running(config(tmp_path_factory.mktemp('searching')/'log', index=str(index[0]), api_keys=('k',))) as s: yield s


@pytest.mark.parametrize('way', ['url', 'grpc'])
def test_search_answers_as_the_index(searching, index, way):
    from mmembed.retrieval.index import Index
    local = Index.load(index[0])
    with Client(getattr(searching, way), api_key='k') as c:
        for query in ('a small red circle', index[1]/'blue.png'):
            got, want = c.search(query, 3), local.search(query, 3)
            assert [r['id'] for r in got] == want.ids and np.allclose([r['score'] for r in got], want.scores, atol=1e-4)
        assert c.search(index[1]/'blue.png', 1)[0]['id'].endswith('blue.png') and len(c.search('x', 1000)) == 5
        one = c.search('x', 1)[0]['id']
        assert [r['id'] for r in c.search('x', 5, f"id = '{one}'")] == [one]
        for where in ('nothing = 3', "'; drop"):
            with pytest.raises(ServiceError, match='(422|INVALID_ARGUMENT): where'): c.search('x', 5, where)
        with pytest.raises(ServiceError, match='(422|INVALID_ARGUMENT): query'): c.search(FILES['RGB.png'][:100])
        assert asyncio.run(c.asearch('x', 2)) == c.search('x', 2)


def test_answers_hold_no_path_of_the_server(searching, index):
    rows = httpx2.post(
        f'{searching.url}/search',
        json=dict(query='a small red circle', top_k=5),
        headers={'x-api-key': 'k'},
        timeout=HANG,
    ).json()['results']
    with Client(searching.grpc, api_key='k') as c: rows += c.search('a small red circle', 5)
    assert (
        len(rows) == 10
        and str(index[1]) not in str(rows)
        and not [v for r in rows for v in r.values() if str(v).startswith('/')]
    )


@pytest.mark.parametrize('way', ['url', 'grpc'])
def test_no_condition_ends_the_server(searching, way):
    "Chains that overflow the stack of the SQL engine, functions that take all memory: a sentence instead."
    with Client(getattr(searching, way), api_key='k') as c:
        one = c.search('x', 1)
        for where, error in HOSTILE_CONDITIONS.items():
            refused = rf'(422|INVALID_ARGUMENT): where.*{error}'
            with pytest.raises(ServiceError, match=refused) as e: c.search('x', 1, where)
            assert len(str(e.value)) < 1500 and c.search('x', 1) == one
    assert searching.process.poll() is None


def test_an_artifact_that_cannot_ask_the_index_is_not_taken(searching):
    other = tiny.pair_artifact()
    r = httpx2.post(
        f'{searching.url}/admin/reload', json=dict(artifact=str(other)), headers={'x-api-key': 'k'}, timeout=HANG
    )
    assert r.status_code == 422 and 'cannot ask an index' in r.json()['error']['message']


def test_an_index_of_another_artifact_is_refused(index, tmp_path):
    with pytest.raises(RuntimeError, match='did not start'):
        running(config(tmp_path/'log', index=str(index[0]))._replace(artifact=tiny.pair_artifact()))


def test_pairs_are_scored_and_bad_ones_fail_alone(tmp_path):
    emb = Embedder(tiny.pair_artifact())
    texts, files = ['a small red circle', 'a large blue square', '', '一个红色的圆'], [FILES[k] for k in GOOD] * 2
    want = emb.classify(texts, files)
    with running(config(tmp_path/'log')._replace(artifact=tiny.pair_artifact())) as s:
        assert httpx2.get(f'{s.url}/readyz', timeout=HANG).json()['ready']
        for c in (Client(s.url, batch_size=3), Client(s.grpc, batch_size=3)):
            got = c.classify([*zip(texts, files), ('a', files[0][:50]), ('a', 'b'), ('a', tmp_path/'none.jpg')])
            assert got[4:] == [[], [], []] and [[x for x, _ in row] for row in got[:4]] == [
                [x for x, _ in row] for row in want
            ]
            assert all(abs(p - q) < 1e-5 for row, other in zip(got, want) for (_, p), (_, q) in zip(row, other))
            assert c.classify([('a', files[0][:50])]) == [[]]
            with pytest.raises(ServiceError, match='scores pairs'): c.encode(['a'])
            c.close()
        assert 'mmembed_items_total{kind="pair",status="ok"} 8.0' in httpx2.get(f'{s.url}/metrics', timeout=HANG).text


@pytest.mark.parametrize('way', ['url', 'grpc'])
def test_labels_that_are_given(server, way):
    emb = Embedder(tiny.artifact())
    files = [FILES[k] for k in GOOD]
    with Client(getattr(server, way), batch_size=1) as c:
        got = c.classify([*files, b'broken'], ['circle', 'square'], 'a red {}')
        scores = emb.score(['a red circle', 'a red square'], files).T.softmax(-1)
        for row, want in zip(got, scores.tolist()):
            assert dict(row) == pytest.approx(dict(zip(('circle', 'square'), want)), abs=1e-5) and row == sorted(
                row, key=lambda x: -x[1]
            )
        assert got[2:] == [[]] and [len(r) for r in asyncio.run(c.aclassify(files, ['circle', 'square'], top_k=1))] == [
            1,
            1,
        ]
        for wrong, args in (('none of its own', [files]), ('scores no pairs', [[('a', files[0])], ['x']])):
            with pytest.raises(ServiceError, match=wrong): c.classify(*args)
