import csv
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

pytest.importorskip('lancedb', reason='the extra "search" is not installed')

from mmembed.cli.main import main
from mmembed.data.scenes import Scenes
from mmembed.exporters.export import export
from mmembed.retrieval.ann import KINDS, approximate, measure_recall
from mmembed.retrieval.clusters import clusters, duplicates, near_pairs
from mmembed.retrieval.index import Index
from mmembed.retrieval.embed import embed
from mmembed.models.dual import DualEncoder
from mmembed.models.towers import ConvNet, TextTransformer
from mmembed.retrieval.query import Found, Query, merged
from mmembed.runtime.embedder import Embedder
from mmembed.text.pipeline import TextPipeline
from mmembed.retrieval.lance import asked
from mmembed.vision.pipeline import VisionPipeline

from tests.helpers import HANG, built_once

N, D = 60, 12


class Worn(Scenes):
    "Some pictures are cut off or missing"
    def image(self, i):
        if i == 7: raise OSError('no such picture')
        return super().image(i)[:200] if i % 20 == 3 else super().image(i)


def artifact(path, seed=0):
    scenes = Scenes(train=N, valid=0)
    tp = TextPipeline.learn([scenes.text(i) for i in range(N)], vocab_size=200, max_length=24)
    torch.manual_seed(seed)
    model = DualEncoder(
        TextTransformer(tp, width=16, depth=1, heads=2), ConvNet(VisionPipeline(size=24), channels=(8,)), dim=D
    )
    shutil.copy(built_once(f'index-{seed}.pt', lambda made: export(model.eval(), made, fresh=False, cpp=False)), path)
    return path


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('index')
@pytest.fixture(scope='module')
def model(folder): return artifact(folder/'model.pt')
@pytest.fixture(scope='module')
def emb(model): return Embedder(model)
@pytest.fixture(scope='module')
def other(folder): return artifact(folder/'other.pt', seed=1)
@pytest.fixture(scope='module')
def scenes(): return Scenes(train=N, valid=0)
@pytest.fixture(scope='module')
def index(folder, model, scenes): return Index.build(model, scenes, folder/'scenes.idx')


def points(n, seed=0, name='p'):
    x = torch.nn.functional.normalize(torch.randn(n, D, generator=torch.Generator().manual_seed(seed)), dim=1).numpy()
    return table([f'{name}{i}' for i in range(n)], x)


def table(ids, x, **columns):
    x = np.asarray(x, 'f')
    return pa.table(
        dict(
            id=pa.array(ids, pa.string()),
            vector=pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1]),
            **columns,
        )
    )


def matrix(t): return np.stack(t['vector'].to_pylist()).astype('f')


@pytest.mark.parametrize('exact', [True, None])
def test_every_query_finds_what_brute_force_finds(index, emb, scenes, exact):
    x = emb.encode_image(scenes.image(i) for i in range(N))
    ids = [scenes.name(i) for i in range(N)]
    for i in range(0, N, 4):
        for q, v in ((bytes(scenes.image(i).tolist()), x[i]), (scenes.text(i), emb.encode_text([scenes.text(i)])[0])):
            found = index.search(q, top_k=N, exact=exact)
            cosine = (x @ v).numpy()
            np.testing.assert_allclose(found.scores, np.sort(cosine)[::-1], atol=1e-5)
            np.testing.assert_allclose([cosine[ids.index(n)] for n in found.ids], found.scores, atol=1e-5)


def test_sums_of_queries(index, emb, scenes, tmp_path):
    (tmp_path/'a.jpg').write_bytes(bytes(scenes.image(4).tolist()))
    t, p, m = (
        emb.encode_text(['a red circle'])[0],
        emb.encode_image([scenes.image(4)])[0],
        emb.encode_text(['green'])[0],
    )
    want = torch.nn.functional.normalize(t + .5*p - 2*m, dim=0).numpy()
    query = Query('a red circle') + .5*Query(tmp_path/'a.jpg') - 2*Query('green')
    np.testing.assert_allclose(query.vector(lambda: emb, D), want, atol=1e-5)
    assert index.search(query, 5).ids == index.search(want, 5).ids
    assert index.like(scenes.name(4), 3).ids == index.search(p.numpy(), 4).ids[1:]
    with pytest.raises(KeyError): index.like('nobody')


@pytest.mark.parametrize(
    'query, error',
    [
        ('', 'empty text'),
        ('  \n', 'empty text'),
        (None, 'nothing to search for'),
        (np.zeros(D, 'f'), 'zero'),
        (np.full(D, np.nan, 'f'), 'NaN'),
        (np.ones(D + 1, 'f'), 'holds vectors of 12'),
        (b'no picture', 'images'),
        (Query('a') - 'a', 'cancel out'),
        (3, 'is not a query'),
        (['a'], 'is not a query'),
    ],
)
def test_queries_that_cannot_be_asked(index, query, error):
    with pytest.raises((ValueError, TypeError), match=error): index.search(query)


def test_k(index):
    with pytest.raises(ValueError, match='at least 1'): index.search('a', 0)
    assert len(index.search('a', 10*N)) == N


def test_columns_of_a_table_keep_their_types(model, scenes, tmp_path):
    with open(tmp_path/'pairs.csv', 'w', newline='') as f:
        out = csv.writer(f)
        out.writerow(['image', 'text', 'year', 'price', 'taken'])
        for i in range(20):
            (tmp_path/f'{i}.jpg').write_bytes(bytes(scenes.image(i).tolist()))
            out.writerow([f'{i}.jpg', scenes.text(i), 2010 + i, i / 4, f'20{10 + i}-05-01'])
    index = Index.build(model, tmp_path/'pairs.csv', tmp_path/'out.idx', columns=['year', 'price', 'taken'])
    assert (
        index.columns['year'] == 'int64'
        and index.columns['price'] == 'double'
        and index.columns['taken'].startswith('timestamp')
    )
    assert sorted(r['year'] for r in index.search('x', 99, where='year > 2020')) == list(range(2021, 2030))
    assert {r['id'] for r in index.search('x', 99, where="taken < timestamp '2012-01-01' or price = 4.75")} == {
        '0.jpg',
        '1.jpg',
        '19.jpg',
    }
    row = index.search('x', 1, where='year = 2013')[0]
    assert row['text'] == scenes.text(3) and Path(row['file']) == (tmp_path/'3.jpg').resolve()
    assert json.dumps(index.find(np.ones(D), 3, 'price > 1'))
    assert index.thumbnails(['3.jpg'])['3.jpg'][:2] == b'\xff\xd8'
    assert 'data:image/jpeg' in index.search('x', 3)._repr_html_()
    for where, error in [('nothing > 3', 'No field named nothing'), ('year >', 'year >'), ("year > 'x' 3", 'where=')]:
        with pytest.raises(ValueError, match=error): index.search('x', where=where)
    with pytest.raises(ValueError, match='no column'):
        Index.build(model, tmp_path / 'pairs.csv', tmp_path / 'no.idx', columns=['size'])


def test_bad_items_are_listed_and_not_indexed(model, tmp_path):
    index = Index.build(model, Worn(train=N, valid=0), tmp_path/'a')
    bad = {r['id']: r['error'] for r in index.failures()}
    assert (
        set(bad) == {'scene train 7', *(f'scene train {i}' for i in range(3, N, 20))}
        and bad['scene train 7'] == 'no such picture'
    )
    assert len(index) == N - len(bad) and not set(bad) & set(index.ids())
    assert index.info()['failures'] == len(bad)
    index.add(Scenes(train=N, valid=0), on_duplicate='skip')  # the same rows, whole now
    assert len(index) == N and not index.failures()


def test_vectors_that_mean_nothing(model, tmp_path):
    x = matrix(points(6))
    x[1], x[2], x[3], x[4] = np.nan, 0, np.inf, 3*x[4]
    index = Index.build(model, table([f'v{i}' for i in range(6)], x), tmp_path/'a')
    assert sorted(index.ids()) == ['v0', 'v4', 'v5'] and {r['id'] for r in index.failures()} == {'v1', 'v2', 'v3'}
    assert np.linalg.norm(index.vector_of('v4')) == pytest.approx(1)
    with pytest.raises(ValueError, match='13 wide; this index holds vectors of 12'):
        index.add(table(['w'], np.ones((1, D + 1))))
    assert len(index) == 3


def test_ids_that_come_twice(model, tmp_path, scenes):
    twice = pa.concat_tables([points(5), points(1)])
    with pytest.raises(ValueError, match="the id 'p0' comes twice"): Index.build(model, twice, tmp_path/'a')
    with pytest.raises(FileNotFoundError, match='holds no index'): Index(tmp_path/'a')
    index = Index.build(model, twice, tmp_path/'a', on_duplicate='skip')
    assert len(index) == 5 and index.failures() == [dict(id='p0', error='another row has this id')]
    with pytest.raises(ValueError, match="the id 'p4' comes twice"):
        index.add(pa.concat_tables([points(2, 1, 'q'), points(5).slice(4)]))
    assert len(index) == 5
    new = points(7, seed=3)
    assert index.add(new, on_duplicate='skip') == 2 and index.add(new, on_duplicate='replace') == 7 and len(index) == 7
    np.testing.assert_allclose(index.vector_of('p0'), matrix(new)[0], atol=1e-6)
    with pytest.raises(ValueError, match='holds an index; add to it'): Index.build(model, new, tmp_path/'a')


def test_mixed_artifacts(index, model, other, scenes, tmp_path):
    embed(other, scenes, tmp_path/'vectors', keep=['text'])
    with pytest.raises(ValueError, match='vectors of two models cannot be mixed'):
        Index.build(model, tmp_path / 'vectors', tmp_path / 'a')
    with pytest.raises(ValueError, match='vectors of two models cannot be mixed'): index.add(tmp_path/'vectors')
    with pytest.raises(ValueError, match='cannot ask an index'): Index(index.folder, other).search('a red circle')
    with pytest.raises(ValueError, match='cannot ask an index'): index.check(Embedder(other).card)
    mine = Index.build(model, points(9), tmp_path/'a')
    reader = Index(tmp_path/'a', Embedder(model))
    reader.search('a red circle')
    Index.build(other, tmp_path/'vectors', tmp_path/'a', overwrite=True)
    # it was open all the time
    with pytest.raises(ValueError, match='cannot ask an index'): reader.search('a red circle')
    assert len(mine) == N and Index(tmp_path/'a').search(scenes.text(0), 1)[0]['text']


def test_what_embed_wrote(emb, model, scenes, tmp_path):
    for precision in ('float32', 'int8'):
        embed(model, Worn(train=N, valid=0), tmp_path/precision, modality='both', keep=['text'], precision=precision)
    a, b = (Index.build(model, tmp_path/p, tmp_path/f'{p}.idx') for p in ('float32', 'int8'))
    assert a.ids() == b.ids() and len(a) == N - 4 and a.failures() == b.failures()
    same = Index.build(model, Worn(train=N, valid=0), tmp_path/'direct.idx')
    np.testing.assert_array_equal(a.vectors()[1], same.vectors()[1])
    assert float((a.vectors()[1] * b.vectors()[1]).sum(1).min()) > .99
    texts = Index.build(model, tmp_path/'float32', tmp_path/'texts.idx', modality='text')
    np.testing.assert_allclose(texts.vector_of(scenes.name(0)), emb.encode_text([scenes.text(0)])[0], atol=1e-5)


HOSTILE = [
    "it's",
    "x'); DROP TABLE items; --",
    "' OR '1'='1",
    '\\',
    "\\'",
    '"',
    '""',
    "''",
    '%',
    '_',
    '../../etc/passwd',
    'new\nline',
    'nul\0l',
    '\u202e',
    '🦊',
    '<script>alert(1)</script>',
    '${x}',
    '{}',
    ';',
    '--',
    '/* */',
    '`',
    'a' * 5000,
    '-rf',
    ' ',
    '\t',
    'NULL',
    '0',
    "id) OR (1=1",
]


def test_hostile_ids_and_captions(model, tmp_path):
    x = matrix(points(len(HOSTILE) + 1))
    index = Index.build(
        model, table([*HOSTILE, 'plain'], x, text=pa.array([*HOSTILE, 'plain'])), tmp_path / "it's; an \"index\""
    )
    for i, name in enumerate(HOSTILE):
        assert index.ids() == [*HOSTILE[i:], 'plain'] and index.like(name, 3)
        assert index.thumbnails([name]) == {} and '<script>' not in index.search(x[i], 3)._repr_html_()
        index.search(x[0], words=name)
        assert index.delete([name]) == 1
    for where in ("1=1; DROP TABLE items", "id = 'x'); DELETE FROM items; --"):
        try: index.search(x[0], where=where)
        except ValueError: pass
        assert index.ids() == ['plain']
    assert index.delete([]) == 0 and index.delete(['nobody']) == 0


def test_hostile_file_names(model, scenes, tmp_path):
    (tmp_path/'in').mkdir()
    names = [
        b"it's.jpg",
        b'--rf.jpg',
        b'new\nline.jpg',
        b'caf\xe9.jpg',
        b'$(rm).jpg',
        b'"q".jpg',
        '猫.jpg'.encode(),
        b'%s.jpg',
    ]
    for i, n in enumerate(names):
        (tmp_path / 'in').joinpath(n.decode('utf-8', 'surrogateescape')).write_bytes(bytes(scenes.image(i).tolist()))
    index = Index.build(model, tmp_path/'in', tmp_path/'a')
    assert len(index) == len(names) and not index.failures()
    for i, name in enumerate(index.ids(), 1):
        assert (
            index.search(index.vector_of(name), 1).scores[0] > 0.999
            and index.delete([name]) == 1
            and len(index) == len(names) - i
        )


def test_an_empty_index(model, scenes, tmp_path):
    index = Index.build(model, points(3), tmp_path/'a')
    assert index.delete(where='true') == 3 and len(index) == 0
    assert index.search('a red circle') == [] and repr(index.search('a')) == "nothing found for 'a'"
    assert duplicates(index) == [] and index.info()['items'] == 0 and index.vectors()[1].shape == (0, D)
    assert index.add(points(4)) == 4 and len(index.search('a red circle')) == 4
    assert len(Index.build(model, table(['z'], np.zeros((1, D))), tmp_path/'b')) == 0


def test_words(index, scenes):
    found = index.search(words='circle', top_k=N)
    assert set(found.ids) == {scenes.name(i) for i in range(N) if 'circle' in scenes.text(i).split()}
    chinese = next(scenes.text(i) for i in range(N) if not scenes.text(i).isascii())
    assert any(r['text'] == chinese for r in index.search(words=chinese, top_k=5))
    for hostile in ('a"b (c OR', '*', 'text:x', 'NOT', '\0'): index.search(words=hostile, top_k=3)
    both = index.search('a red circle', top_k=8, words='circle')
    assert (
        len(both) == 8
        and all(-1.001 <= s <= 1.001 for s in both.scores)
        and [r['relevance'] for r in both] == sorted((r['relevance'] for r in both), reverse=True)
    )
    x = dict(zip(*index.vectors()))
    v = index.embedder().encode_text(['a red circle'])[0]
    np.testing.assert_allclose(both.scores, [float(x[i] @ v) for i in both.ids], atol=1e-5)


def test_two_rankings_are_merged_by_reciprocal_ranks():
    """As Cormack, Clarke and Buettcher (SIGIR 2009) have it: a row counts 1 / (60 + place) in each.

    Equal sums in the order of the words."""
    near, said = (
        [dict(id=i, score=s) for i, s in (('a', 0.9), ('b', 0.8), ('c', 0.7))],
        [dict(id=i, score=9.0) for i in 'bdea'],
    )
    found = merged(near, said, 10)
    assert [r['id'] for r in found] == ['b', 'a', 'd', 'e', 'c']
    np.testing.assert_allclose(
        [r['relevance'] for r in found], [1 / 62 + 1 / 61, 1 / 61 + 1 / 64, 1 / 62, 1 / 63, 1 / 63], rtol=1e-12
    )
    assert [r['score'] for r in found] == [0.8, 0.9, None, None, 0.7] and [r['id'] for r in merged(near, said, 2)] == [
        'b',
        'a',
    ]


def test_approximate(model, tmp_path):
    rows = points(2000)
    index = Index.build(model, rows, tmp_path/'a')
    with pytest.raises(ValueError, match='no approximate index'): measure_recall(index)
    found = approximate(index, 'ivf_flat', recall=.9, partitions=16)
    assert found.recall >= .9 and index.info()['approximate']['kind'] == 'ivf_flat'
    x, again = matrix(rows), Index(tmp_path/'a')
    best = [{f'p{i}' for i in np.argsort(-(x @ v))[:10]} for v in x[:50]]
    for exact, least in ((True, 1.), (None, .8)):
        assert np.mean([len(b & set(again.search(v, 10, exact=exact).ids)) / 10 for b, v in zip(best, x[:50])]) >= least
    again.add(points(5, 9, 'new'))
    assert again.search(matrix(points(5, 9))[2], 1).ids == ['new2']
    with pytest.raises(ValueError, match='at least 256'): approximate(Index.build(model, points(20), tmp_path/'b'))
    with pytest.raises(ValueError, match='kind must be'): approximate(index, 'tree')


@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_answers_for_every_k(kind, model, tmp_path):
    "A graph must keep k x refine candidates; partitions that are not looked at may hold what a condition asks for."
    rows, more = points(600), dict(num_sub_vectors=4) if kind.endswith('pq') else {}
    captions = pa.array([f'number {i % 3}' for i in range(600)])
    index, x = Index.build(model, rows.append_column('text', captions), tmp_path/'a'), matrix(rows)
    # the knobs as low as they go
    approximate(index, kind, recall=.01, partitions=None if kind.startswith('hnsw') else 30, **more)
    for k in (1, 10, 32, 33, 64, 65, 150, 599, 600, 601, 5000):
        assert len(index.search(x[0], k)) == min(k, 600)
        assert len(index.search(x[0], k, where="id LIKE 'p1_'")) == min(k, 10)
        assert len(index.search(x[0], k, words='number')) == min(k, 600) and len(index.like('p0', k)) == min(k, 599)
    for neighbours in (40, 599): assert duplicates(index, .999, "id LIKE 'p1_'", neighbours) == []


def test_recall_of_text_queries(model, tmp_path, capsys, scenes):
    index = Index.build(model, points(400), tmp_path/'a')
    (tmp_path/'captions.csv').write_text('said\n' + '\n'.join(scenes.text(i) for i in range(N)))
    assert (
        main(
            [
                'index',
                'approximate',
                str(tmp_path / 'a'),
                '--queries',
                str(tmp_path / 'captions.csv'),
                '--text-key',
                'said',
            ]
        )
        == 0
    )
    first, second = capsys.readouterr().out.splitlines()
    assert f'over {N} queries' in first and 'with rows as queries: hnsw_sq' in second and 'over 100 queries' in second
    assert index.info()['approximate']['queries'] == N
    x = index.embedder().encode_text([scenes.text(i) for i in range(N)])
    assert measure_recall(index, x)[0].recall == pytest.approx(index.info()['approximate']['recall'])
    for wrong, error in ((dict(recall=1.5), 'a share of 0 to 1, got 1.5'), (dict(queries=x[:0]), 'no queries')):
        with pytest.raises(ValueError, match=error): approximate(index, **wrong)


def test_near_duplicates_and_clusters(model, tmp_path):
    x = matrix(points(300))
    x[200:220] = x[:20] + .01 * x[100:120]
    index = Index.build(model, table([f'p{i}' for i in range(300)], x), tmp_path/'a')
    groups = duplicates(index, .99)
    assert {frozenset(g.ids) for g in groups} == {frozenset((f'p{i}', f'p{200 + i}')) for i in range(20)}
    assert {frozenset(g.ids) for g in duplicates(index, .99, neighbours=5)} == {frozenset(g.ids) for g in groups}
    pytest.importorskip('faiss')
    five = clusters(index, 5)
    assert sorted(i for g in five for i in g.ids) == sorted(index.ids())
    assert all(g.scores == sorted(g.scores, reverse=True) for g in five)
    assert [g.ids for g in clusters(index, 5)] == [g.ids for g in five]


def test_near_pairs_are_told_once_and_in_order():
    x = matrix(points(90))
    x[50:70] = x[:20]
    near = x @ x.T >= .9
    want = [(i, j) for i in range(90) for j in range(i + 1, 90) if near[i, j]]
    assert len(want) >= 20
    for block in (1, 7, 64, 90, 1024):
        first, second = near_pairs(torch.from_numpy(x), .9, block)
        assert sorted(zip(first.tolist(), second.tolist())) == want


def test_readers_see_whole_additions_only(model, tmp_path):
    index, seen, stop = Index.build(model, points(100), tmp_path/'a'), set(), threading.Event()
    def read():
        reader = Index(tmp_path/'a')
        while not stop.is_set():
            seen.add(len(reader))
            assert len(reader.search(np.ones(D, 'f'), 5)) == 5
    errors = []
    def safe():
        try: read()
        except BaseException as e: errors.append(e)
    threads = [threading.Thread(target=safe) for _ in range(2)]
    for t in threads: t.start()
    for i in range(8): index.add(points(50, i, f'g{i}-'))
    stop.set()
    for t in threads: t.join()
    assert not errors and seen <= {100 + 50*i for i in range(9)} and len(seen) > 1


def test_one_writer_at_a_time(model, tmp_path):
    index = Index.build(model, points(5), tmp_path/'a')
    import fcntl
    with (tmp_path/'a'/'.lock').open('w') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        for write in (
            lambda: index.add(points(2, 1, 'q')),
            lambda: index.delete(['p0']),
            lambda: Index.build(model, points(2), tmp_path / 'a', overwrite=True),
        ):
            with pytest.raises(ValueError, match='another process is writing'): write()
        assert len(index.search(np.ones(D, 'f'))) == 5


KILLER = '''
import os, random, resource, signal, sys, time
sys.path.insert(0, {root!r})
import lancedb
from tests.retrieval.test_index import *
folder, model, seed = Path(sys.argv[1]), sys.argv[2], random.Random(0)

def child(f):
    pid = os.fork()
    if pid: return pid
    try: f()
    except BaseException as e:
        print(type(e).__name__, e, flush=True)
        os._exit(1)
    os._exit(0)

def whole():
    index = Index(folder)
    ids = index.ids()
    made = {{i.split('-')[0] for i in ids}}
    assert len(ids) == 400 * len(made), (len(ids), made)
    # of one build, with what was added to it
    assert sum(name == 'base' or int(name.split('x')[0]) % 2 == 0 for name in made) == 1, made
    assert len(index.search(np.ones(D, 'f'), 5)) == 5

def write(turn):
    for n in range(1000):
        name = f'{{turn}}x{{n}}-'
        if turn % 2: Index(folder).add(points(400, n, name))
        else: Index.build(model, points(400, n, name), folder, overwrite=True)

def full():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before, text = len(Index(folder)), 'no text at all '
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
    try: Index(folder).add(points(20_000, 5, 'full-'))
    except OSError as e: print('refused:', str(e)[:60], flush=True)
    assert len(Index(folder)) == before

assert os.waitpid(child(lambda: Index.build(model, points(400, 0, 'base-'), folder)), 0)[1] == 0
for turn in range(4):
    pid = child(lambda: write(turn))
    time.sleep(seed.uniform(.3, 1.2))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert os.waitpid(child(whole), 0)[1] == 0, turn
assert os.waitpid(child(full), 0)[1] == 0
assert os.waitpid(child(whole), 0)[1] == 0
print('sound')
'''


def test_killed_writers_and_full_disks_lose_nothing(model, tmp_path):
    code = KILLER.format(root=str(Path(__file__).parents[2]))
    run = subprocess.run(
        [sys.executable, '-c', code, str(tmp_path / 'a'), str(model)], capture_output=True, text=True, timeout=HANG
    )
    assert run.returncode == 0 and run.stdout.endswith('sound\n'), (run.stdout + run.stderr)[-2000:]
    assert 'refused: nothing was changed' in run.stdout
    index = Index(tmp_path/'a')
    index.compact()
    assert len(index) % 400 == 0 and index.info()['unfinished'] == []


class Stops(Scenes):
    "Ends the process, as a kill would, when picture 40 is read"
    def image(self, i):
        if i == 40: raise KeyboardInterrupt
        self.read = getattr(self, 'read', 0) + 1
        return super().image(i)


def test_an_interrupted_build_goes_on(emb, scenes, tmp_path):
    with pytest.raises(KeyboardInterrupt): Index.build(emb, Stops(train=N, valid=0), tmp_path/'a', threads=1)
    with pytest.raises(FileNotFoundError, match='did not finish; run it again'): Index(tmp_path/'a')
    index = Index.build(emb, scenes, tmp_path/'a')
    assert len(index) == N and index.info()['unfinished'] == []
    before = index.ids()
    with pytest.raises(KeyboardInterrupt): index.add(Stops(train=N, valid=0), prefix='more/', threads=1)
    assert index.ids() == before and index.info()['unfinished']
    assert index.add(scenes, prefix='more/') == N and index.info()['unfinished'] == []


def test_commands(model, scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for part, rows in (('photos', range(12)), ('more', range(12, 16))):
        (tmp_path/part).mkdir()
        for i in rows: (tmp_path/part/f'{i}.jpg').write_bytes(bytes(scenes.image(i).tolist()))
    (tmp_path/'photos'/'broken.jpg').write_bytes(b'no picture')
    def run(*words, status=0):
        assert main(list(map(str, words))) == status, capsys.readouterr().err
        return capsys.readouterr().out
    assert '12 images' in run('index', 'build', model, 'photos', '-o', 'my.idx', status=1)
    assert '4 added' in run('index', 'add', 'my.idx', 'more')
    found = json.loads(run('search', 'my.idx', 'photos/5.jpg', '-k', '3', '--json'))
    assert len(found) == 3 and found[0]['id'] == '5.jpg' and found[0]['score'] > .999
    assert json.loads(
        run(
            'search', 'my.idx', 'a red circle', 'photos/5.jpg', '--minus', 'blue', '--filter',
            "id LIKE '1_.jpg'", '--exact', '--json',
        )
    )
    assert '14.jpg' in run('search', 'my.idx', 'more/14.jpg')
    assert '1 deleted' in run('index', 'delete', 'my.idx', '5.jpg', 'never.jpg')
    info = json.loads(run('index', 'info', 'my.idx', '--json'))
    assert info['items'] == 15 and info['failures'] == 1
    for words, error in (
        (('search', 'none', 'x'), 'holds no index'),
        (('search', 'my.idx', 'x', '--filter', 'year >'), 'where='),
        (('search', 'my.idx', 'missing.jpg'), 'No such file'),
        (('index', 'add', 'my.idx', 'more'), 'already'),
    ):
        assert main(list(words)) == 1 and error in capsys.readouterr().err
    monkeypatch.setattr('webbrowser.open', lambda url: print('opened', url))
    assert 'opened file://' in run('search', 'my.idx', 'a red circle', '--open')



def test_failures_are_listed_and_tried_again_and_the_index_compacted(model, scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'photos').mkdir()
    for i in range(6): (tmp_path/'photos'/f'{i}.jpg').write_bytes(bytes(scenes.image(i).tolist()))
    for name in ('two\nlines.jpg', 'gone.jpg'): (tmp_path/'photos'/name).write_bytes(b'no picture')
    def run(*words, status=0):
        assert main(list(map(str, words))) == status, capsys.readouterr().err
        return capsys.readouterr().out
    assert r'not indexed: two\nlines.jpg: ' in run('index', 'build', model, 'photos', '-o', 'my.idx', status=1)
    lines = run('index', 'failures', 'my.idx').splitlines()
    assert sorted(line.split(': ')[0] for line in lines) == ['gone.jpg', r'two\nlines.jpg']
    assert {json.loads(line)['id'] for line in run('index', 'failures', 'my.idx', '--json').splitlines()} == {
        'gone.jpg',
        'two\nlines.jpg',
    }
    (tmp_path/'photos'/'two\nlines.jpg').write_bytes(bytes(scenes.image(7).tolist()))
    (tmp_path/'photos'/'new.jpg').write_bytes(bytes(scenes.image(8).tolist()))  # never tried, so not tried again
    assert '1 added to my.idx, 7 there now' in run('index', 'failures', 'my.idx', '--retry', 'photos', status=1)
    assert run('index', 'failures', 'my.idx').startswith('gone.jpg: ') and 'new.jpg' not in Index('my.idx').ids()
    (tmp_path/'photos'/'gone.jpg').write_bytes(bytes(scenes.image(9).tolist()))
    run('index', 'failures', 'my.idx', '--retry', 'photos')
    assert run('index', 'failures', 'my.idx') == 'no failures\n' and len(Index('my.idx')) == 8
    index = Index('my.idx')
    before, ids = index.info()['bytes'], sorted(index.ids())
    (tmp_path/'my.idx'/'.add-left').mkdir()
    assert 'bytes freed' in run('index', 'compact', 'my.idx')
    info = Index('my.idx').info()
    assert info['bytes'] < before and not info['unfinished'] and sorted(Index('my.idx').ids()) == ids


def test_a_search_asks_again_where_another_process_has_compacted(model, tmp_path, recwarn):
    """LanceDB warns that who reads an older version fails, which is true: so it is asked again, and the warning
    stays away."""
    index, x = Index.build(model, points(300), tmp_path/'my own.idx'), np.ones(D, 'f')
    held = index._db.open_table('items')
    held.checkout(held.version)  # what a search holds that has begun
    index.delete(index.ids()[100:])
    recwarn.clear()
    index.compact()
    assert not [str(w.message) for w in recwarn]
    with pytest.raises(RuntimeError, match='Not found'): held.search(x).limit(5).to_list()
    for where in (None, "id <> 'x'"):
        turns = iter([held, held, index._table]).__next__
        assert len(asked(lambda turns=turns: turns().search(x).limit(5).to_list(), where)) == 5
        with pytest.raises(OSError, match='a file of the index is missing: .*Not found') as e:
            asked(held.search(x).limit(5).to_list, where)
        assert 'cargo' not in str(e.value)
    late = Index(tmp_path/'my own.idx')
    late._table = held
    for question in (
        lambda: late.search(x),
        lambda: late.search(x, where="id <> 'x'"),
        late.ids,
        late.vectors,
        lambda: late.vector_of('p3'),
        lambda: late.vectors(ids=['p3']),
        lambda: late.select(['id']),
    ):
        with pytest.raises(OSError, match='a file of the index is missing'): question()


def test_retry_says_what_it_cannot_do(model, tmp_path):
    (tmp_path/'photos').mkdir()
    for name in ('a.jpg', 'b.jpg'): (tmp_path/'photos'/name).write_bytes(b'no picture')
    index = Index.build(model, tmp_path/'photos', tmp_path/'my.idx')
    with pytest.raises(ValueError, match='none of the 2 rows that failed'): index.retry(tmp_path/'photos', prefix='x/')
    with pytest.raises(ValueError, match='ready vectors'): index.retry(points(3))
    assert index.retry(tmp_path/'photos') == 0 and len(index.failures()) == 2


def test_one_row_a_line(emb, scenes, tmp_path, monkeypatch, capsys):
    raw = os.fsdecode(b'caf\xe9.jpg')
    names = ['a\nb.jpg', 'red\x1b[31m.jpg', 'l\u2028s.jpg', 'turn\u202e.jpg', raw]
    (tmp_path/'photos').mkdir()
    for i, name in enumerate(names): (tmp_path/'photos'/name).write_bytes(bytes(scenes.image(i).tolist()))
    index = Index.build(emb, tmp_path/'photos', tmp_path/'my.idx')
    shown = repr(index.search('a circle', 9))
    assert len(shown.splitlines()) == len(names) and '\x1b' not in shown and '\u202e' not in shown
    for name in (r'a\nb.jpg', r'red\x1b[31m.jpg', r'l\u2028s.jpg', r'turn\u202e.jpg', r'caf\udce9.jpg'):
        assert name in shown
    assert len(repr(duplicates(index, -1.)).splitlines()) == 2
    monkeypatch.setattr('webbrowser.open', lambda url: None)
    assert main(['search', str(tmp_path/'my.idx'), str(tmp_path/'photos'/raw), '--open']) == 0  # the page is UTF-8
    assert r'caf\udce9.jpg' in capsys.readouterr().out.splitlines()[0]
    assert (
        main(['search', str(tmp_path / 'my.idx'), '--like', raw]) == 0
        and len(capsys.readouterr().out.splitlines()) == len(names) - 1
    )
    assert len(repr(Found([dict(id='x', score=None, text='two\nlines')])).splitlines()) == 1
    assert main(['index', 'delete', str(tmp_path/'my.idx'), raw]) == 0 and len(index) == len(names) - 1


def test_an_error_tells_how_dates_are_written(tmp_path, model):
    day = pa.array(np.array(['2024-01-01', '2024-06-01', '2025-01-01'], 'datetime64[D]'))
    index = Index.build(
        model, table(['a', 'b', 'c'], np.eye(3, D), day=day, at=day.cast(pa.timestamp('us'))), tmp_path / 'my.idx'
    )
    for where in (
        "day > '2024-06-01'", 'day > 2024', 'at > 2024', "at < '2024'", 'year(day) = 2024', "day LIKE '2024%'",
        'extract(year from day) = 2024', "at > now() - interval '1 day'",
    ):
        with pytest.raises(ValueError, match="a date is written date '2024-12-31', a time timestamp") as e:
            index.ids(where)
        assert len(str(e.value).splitlines()) == 1
    for where in ("day > date '2024-03-01'", "at > timestamp '2024-03-01 18:30:00'"):
        assert index.ids(where) == ['b', 'c']
    assert index.ids("date_part('year', day) = 2024") == ['a', 'b']
    with pytest.raises(ValueError, match='No field named taken') as e: index.ids("taken > 'x day'")
    assert 'is written' not in str(e.value)


HOSTILE_CONDITIONS = {  # each ends a process in which the engine gets it, or takes it seconds
    ' OR '.join(["id = 'x'"] * 50_000): 'up to 262,144 characters',
    "id = 'x'" + ' IS TRUE' * 1000: 'up to 256 words and signs',
    '||'.join(['id'] * 4000) + " = 'x'": 'up to 256 words and signs',
    'id IN (' + ', '.join(map(str, range(20_000))) + ')': 'lists up to 10,000 values',
    "repeat(id, 100000000) = 'x'": 'cannot call repeat',
    "id = 'x' OR \"lpad\" (id, 2000000000) = 'x'": 'cannot call "lpad"',
    "id = 'x' --'": 'has no comments'}

DOORS = '''
import json, sys
from pathlib import Path
import numpy as np
from mmembed.cli.main import main
from mmembed.retrieval.clusters import clusters, duplicates
from mmembed.retrieval.faiss import to_faiss
from mmembed.retrieval.index import Index
folder = sys.argv[1]
index, x = Index(folder), np.ones(12, 'f')
doors = dict(search=lambda w: index.search(x, where=w), find=lambda w: index.find(x, where=w),
             words=lambda w: index.search(words='circle', where=w), like=lambda w: index.like(index.ids()[0], where=w),
             ids=index.ids, vectors=index.vectors, duplicates=lambda w: duplicates(index, where=w),
             clusters=lambda w: clusters(index, 2, w), delete=lambda w: index.delete(where=w),
             faiss=lambda w: to_faiss(index, Path(folder)/'x.faiss', where=w))
for where, error in json.load(sys.stdin).items():
    for name, door in doors.items():
        try: door(where)
        except ValueError as e: assert error in str(e) and len(str(e)) < 1500, (name, str(e)[:2000])
        else: raise AssertionError((name, where[:100]))
    assert main(['search', folder, 'x', '--filter', where]) == 1
    assert main(['index', 'delete', folder, '--filter', where]) == 1
print(len(index))'''

CHAINS = '''
import json, sys
from mmembed.retrieval.index import Index
index, n = Index(sys.argv[1]), 0
for where in json.load(sys.stdin):
    n += 1
    try: index.ids(where)
    except ValueError: pass
print(n)'''


def alone(program, index, given):
    "What `program` prints, run on the folder of `index` in a process of its own."
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', program, index.folder], input=json.dumps(given),
                          capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout)


@pytest.mark.parametrize(
    'where',
    ["id = 'p1' garbage", "id = 'p1'; true", "id = 'p1') OR (true", "false) OR (true", "id = 'p1' true", "(id = 'p1'"],
)
def test_all_of_a_condition_counts(model, tmp_path, where):
    "LanceDB reads as far as it understands, and leaves out the rest without a word."
    index = Index.build(model, points(4), tmp_path/'i')
    for ask in (
        lambda: index.delete(where=where),
        lambda: index.ids(where),
        lambda: index.search(np.ones(D, 'f'), where=where),
    ):
        with pytest.raises(ValueError, match='where='): ask()
    assert index.ids("id = 'p1' OR id = 'a--;)('") == ['p1'] and len(index) == 4


def test_no_condition_ends_the_process(index):
    "By every door that takes one; and what is just short enough is answered or refused by the engine."
    assert alone(DOORS, index, HOSTILE_CONDITIONS) == len(index)
    after = ((' IS TRUE', 126), (' IS NULL', 126), ('::int', 84), ('[1]', 84), (" OR id = 'y'", 63), (' || id', 126),
             (' NOT', 253), ('.n', 126))
    before = (('NOT ', '', 253), ('(', ')', 126), ('CASE WHEN ', '', 84), ('lower(', ')', 84), ('- ', '', 253))
    chains = ["id = 'x'" + x*n for x, n in after] + [a*n + "id = 'x'" + b*n for a, b, n in before]
    assert alone(CHAINS, index, chains) == len(chains)
    many = ', '.join(f"'{i}'" for i in [*index.ids(), *range(9_000)])
    assert index.ids(f'id IN ({many})') == index.ids()
    assert index.ids("starts_with(lower(id), 'scene') AND text IS NOT NULL AND length(text) > 0") == index.ids()


def test_found_is_a_list_that_shows_itself():
    found = Found([dict(id=f'i{k}', score=.5) for k in range(30)], '<x>')
    assert (
        '<x>' not in found._repr_html_()
        and '6 more' in found._repr_html_()
        and '10 more' in repr(found)
        and found.page().startswith('<!doctype html>')
    )
