import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import mmembed.core.files as written
import mmembed.retrieval.embed as jobs
from mmembed.cli.main import main
from mmembed.data.scenes import Scenes
from mmembed.data.source import Source
from mmembed.exporters.export import export
from mmembed.data.webdataset import ShardRows
from mmembed.data.open import open_source, read_lines
from mmembed.retrieval.embed import embed
from mmembed.models.dual import DualEncoder
from mmembed.models.towers import ConvNet, TextTransformer
from mmembed.retrieval.writers import FORMS, embed_to
from mmembed.runtime.embedder import Embedder
from mmembed.serve.engine import Engine, Options
from mmembed.serve.queue import Item
from mmembed.core.quantize import PRECISIONS, dequantize, quantize, quantize_fixed
from mmembed.exporters.tiny import tiny_model
from mmembed.retrieval.index import Index
from mmembed.retrieval.parts import load_vectors, part_table, read_job, save_part
from mmembed.text.pipeline import TextPipeline
from mmembed.vision.pipeline import VisionPipeline

from tests.helpers import HANG, built_once, interruptible, until

ROOT = Path(__file__).parents[2]
N = 150


class Worn(Scenes):
    "Some pictures are cut off or missing, one caption cannot be read"
    def image(self, i):
        if i == 77: raise OSError('no such picture')
        return super().image(i)[:200] if i % 40 == 7 else super().image(i)

    def text(self, i):
        if i == 90: raise ValueError('no caption')
        return super().text(i)


def artifact(path):
    scenes = Scenes(train=N, valid=0)
    tp = TextPipeline.learn([scenes.text(i) for i in range(N)], vocab_size=200, max_length=24)
    torch.manual_seed(0)
    model = DualEncoder(
        TextTransformer(tp, width=16, depth=1, heads=2), ConvNet(VisionPipeline(size=24), channels=(8,)), dim=12
    )
    shutil.copy(built_once('jobs.pt', lambda made: export(model.eval(), made, fresh=False, cpp=False)), path)
    return path


@pytest.fixture(scope='module')
def model(tmp_path_factory): return artifact(tmp_path_factory.mktemp('model')/'model.pt')


@pytest.fixture(scope='module')
def source(): return Worn(train=N, valid=0)


def files(folder): return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.name != '.lock'}


KW = dict(modality='both', keep=['text'], shard_rows=32)


@pytest.fixture(scope='module')
def whole(model, source, tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole')
    done = embed(model, source, folder, **KW)
    assert (done.rows, done.written, done.failed) == (N, N, 6)
    return folder


def test_rows_are_the_embedders(model, source, whole):
    emb = Embedder(model, deterministic=True)
    table = pq.read_table(sorted(whole.glob('*.parquet')))
    assert table.column_names == ['row', 'id', 'text', 'image_vector', 'text_vector', 'error']
    assert table['row'].to_pylist() == list(range(N)) and table['id'].to_pylist() == [source.name(i) for i in range(N)]
    assert table['text'].to_pylist() == [source.text(i) if i != 90 else None for i in range(N)]
    assert [i for i, v in enumerate(table['image_vector'].to_pylist()) if v is None] == [7, 47, 77, 87, 90, 127]
    bad = [i for i, e in enumerate(table['error'].to_pylist()) if e]
    assert bad == sorted({7, 47, 77, 87, 90, 127})
    for side, encode in [
        ('image', lambda i: emb.encode_image([source.image(i)])),
        ('text', lambda i: emb.encode_text([source.text(i)])),
    ]:
        found = load_vectors(whole, side)
        assert found.ids == [source.name(i) for i in range(N)] and (~found.ok).nonzero().flatten().tolist() == bad
        for i in [0, 6, 8, 31, 32, 63, 149]: assert found.vectors[i].equal(encode(i)[0])  # bit for bit, in any company
        assert not found.vectors[bad].any()


def test_the_ledger(whole, source):
    ledger = [json.loads(line) for line in (whole/'_errors.jsonl').read_text().splitlines()]
    assert [(r['row'], r['id']) for r in ledger] == [(i, source.name(i)) for i in (7, 47, 77, 87, 90, 127)]
    assert ledger[2]['error'] == 'no such picture' and ledger[4]['error'] == 'no caption' and '.cpp' not in str(ledger)


KILLED = '''
import os, random, signal, sys, time
from pathlib import Path
from tests.retrieval.test_embed import KW, N, Worn
from mmembed.retrieval.embed import embed

class Slow(Worn):
    def image(self, i):
        time.sleep(0.004)
        return super().image(i)

model, out, kills, partial = sys.argv[1], Path(sys.argv[2]), 0, 0
rng = random.Random(3)
for attempt in range(60):
    child = os.fork()
    if not child:
        try: embed(model, Slow(train=N, valid=0), out, **KW)
        finally: os._exit(0)
    patience = time.monotonic() + (rng.uniform(0.02, 0.9) if kills < 5 else 300)
    while time.monotonic() < patience and not os.waitpid(child, os.WNOHANG)[0]: time.sleep(0.005)
    try: os.kill(child, signal.SIGKILL)
    except ProcessLookupError: break
    os.waitpid(child, 0)
    kills += 1
    partial += 0 < len(list(out.glob('part-*'))) < 5
print(kills, partial)
'''


def test_killed_again_and_again(model, source, whole, tmp_path):
    run = subprocess.run(
        [sys.executable, '-c', KILLED, str(model), str(tmp_path / 'out')],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    kills, partial = map(int, run.stdout.split())
    assert kills >= 2, run.stdout
    embed(model, source, tmp_path/'out', **KW)  # in case the last attempt was one of the killed
    assert files(tmp_path/'out') == files(whole)


def test_a_half_written_file_is_no_file(model, source, whole, tmp_path, monkeypatch):
    real, calls = pq.write_table, []
    def full(table, path, **options):
        calls.append(path)
        if len(calls) != 3: return real(table, path, **options)
        Path(path).write_bytes(b'half')
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(pq, 'write_table', full)
    with pytest.raises(
        OSError, match='No space left on device; what was written before is kept'
    ):
        embed(model, source, tmp_path, **KW)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        '.lock', '_manifest.json', 'part-000000.parquet', 'part-000001.parquet',
    ]
    with pytest.raises(ValueError, match='is not finished: 3 of 5 files are missing; run it again'): read_job(tmp_path)
    (tmp_path/'.part-000002.parquet.1a2b.draft').write_bytes(b'half')
    # a copy that was cut off
    (tmp_path/'part-000003.parquet').write_bytes((whole/'part-000003.parquet').read_bytes()[:-100])
    monkeypatch.setattr(pq, 'write_table', real)
    assert embed(model, source, tmp_path, threads=3, **KW).written == N - 64
    assert files(tmp_path) == files(whole)


def test_a_part_with_fewer_rows_is_made_again(model, source, whole, tmp_path):
    "A sound file of the same job that lacks rows, as another program may leave it."
    shutil.copytree(whole, tmp_path/'out')
    for k, rows in ((1, 31), (4, 0)):
        path = tmp_path/'out'/f'part-{k:06}.parquet'
        pq.write_table(pq.read_table(path).slice(0, rows), path)
    assert embed(model, source, tmp_path/'out', **KW).written == 32 + 22
    assert files(tmp_path/'out') == files(whole)


class Torn(Scenes):
    "The first and the last picture cannot be read"
    def image(self, i):
        if i in (0, len(self) - 1): raise OSError('torn')
        return super().image(i)


def test_failures_of_every_part_are_listed(model, tmp_path):
    for shard_rows in (2, 3, 5, 100):
        done = embed(model, Torn(train=5, valid=0), tmp_path/str(shard_rows), shard_rows=shard_rows)
        rows = [json.loads(line) for line in done.failures.read_text().splitlines()]
        assert done.failed == 2 and [(r['row'], r['error']) for r in rows] == [(0, 'torn'), (4, 'torn')]


def test_a_file_is_on_the_disk_before_its_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    "What a power cut leaves is whole: the file is flushed, renamed, and its folder is flushed."
    synced = []
    def sync(handle, really=os.fsync):
        synced.append((os.fstat(handle).st_ino, (tmp_path/'x').exists()))
        really(handle)
    monkeypatch.setattr(written.os, 'fsync', sync)
    written.write_whole(tmp_path/'x', b'data')
    assert synced == [((tmp_path/'x').stat().st_ino, False), (tmp_path.stat().st_ino, True)]


def test_no_space_while_writing_leaves_no_draft(tmp_path, monkeypatch):
    def fail(_): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(written.os, 'fsync', fail)
    with pytest.raises(OSError, match='No space'): written.write_whole(tmp_path/'x', b'data')
    assert not list(tmp_path.iterdir())


def test_another_job_in_the_folder(model, source, whole, tmp_path):
    before, other = files(whole), Embedder(model, deterministic=True)
    other.card = other.card | {'content_hash': 'of another model'}
    for args, hint in [((other, source, KW), 'artifact is .*another model made the vectors'),
                       ((model, Worn(train=N + 1, valid=0), KW), 'source is .*the source has changed since'),
                       ((model, source, KW | dict(shard_rows=64)), 'shard_rows is 32 there and 64 here'),
                       ((model, source, KW | dict(precision='int8')), "precision is 'float32' there and 'int8' here"),
                       ((model, source, KW | dict(keep=[])), 'keep is')]:
        with pytest.raises(ValueError, match=f'belongs to another job: {hint}'): embed(*args[:2], whole, **args[2])
    assert files(whole) == before
    (tmp_path/'part-000000.parquet').write_bytes(b'')
    with pytest.raises(ValueError, match='holds part-000000.parquet and no manifest'):
        embed(model, source, tmp_path, **KW)
    (tmp_path/'_manifest.json').write_text('{')
    with pytest.raises(ValueError, match='is not a manifest'): embed(model, source, tmp_path, **KW)


def test_one_job_at_a_time(model, source, tmp_path):
    with written.writing(tmp_path):
        with pytest.raises(ValueError, match='another process is writing to'): embed(model, source, tmp_path, **KW)
    assert embed(model, source, tmp_path, **KW).written == N


@pytest.mark.parametrize('precision', PRECISIONS)
def test_precisions(model, source, whole, tmp_path, precision):
    embed(model, source, tmp_path, modality='image', precision=precision, shard_rows=100)
    found, exact = load_vectors(tmp_path), load_vectors(whole, 'image')
    assert found.vectors[exact.ok].equal(quantize(exact.vectors[exact.ok], precision))
    assert found.ok.sum() == exact.ok.sum() + 1
    cosine = (found.float() * exact.vectors).sum(1)[exact.ok]
    assert cosine.min() > {'float32': 0.9999, 'float16': 0.999, 'int8': 0.9999, 'binary': 0.5}[precision]


@pytest.mark.parametrize('dim', [29, 512])
def test_precision_round_trip(dim):
    x = torch.nn.functional.normalize(torch.randn(50, dim, generator=torch.Generator().manual_seed(0)), dim=1)
    assert dequantize(quantize(x, 'float32'), 'float32', dim).equal(x)
    assert (dequantize(quantize(x, 'int8'), 'int8', dim) * x).sum(1).min() >= .9999
    bits = quantize(x, 'binary')
    assert bits.equal(torch.from_numpy(np.packbits(x.numpy() > 0, axis=1)))
    assert dequantize(bits, 'binary', dim).shape == (50, dim) and (dequantize(bits, 'binary', dim) > 0).equal(x > 0)


def begun_by_the_older_rule(model, source, folder, rows=64):
    "A folder as `mmembed embed --precision int8` left it when it multiplied by 127: its manifests name no rule."
    embed(model, source, folder, modality='image', precision='int8', shard_rows=rows)
    job = read_job(folder)._replace(int8='fixed')
    (folder/'_manifest.json').write_text(job.to_json())
    assert 'int8' not in json.loads(job.to_json()) and json.loads(job.to_json())['precision'] == 'int8'
    exact = embed_exact(model, source, folder.with_name(f'{folder.name}-exact'), rows)
    for k in range(job.shards()):
        table = pq.read_table(exact/job.file(k))
        good = [not e for e in table['error'].to_pylist()]
        x = torch.from_numpy(np.stack(table['image_vector'].combine_chunks().drop_null().to_numpy(False)))
        assert len(x) == sum(good)
        columns = [table[c].to_pylist() for c in ('row', 'id', 'error')]
        save_part(folder, job, k, part_table(job, *columns[:2], {}, columns[2], {'image': x}))
    return job


def embed_exact(model, source, folder, rows):
    embed(model, source, folder, modality='image', shard_rows=rows)
    return folder


def test_vectors_of_the_older_int8_are_read(model, source, tmp_path):
    job = begun_by_the_older_rule(model, source, tmp_path/'old')
    old, exact = load_vectors(tmp_path/'old'), load_vectors(tmp_path/'old-exact')
    assert old.job == job and old.vectors[old.ok].equal(quantize_fixed(exact.vectors[exact.ok]))
    assert not old.vectors[old.ok].equal(quantize(exact.vectors[exact.ok], 'int8'))
    assert (old.float() * exact.vectors).sum(1)[old.ok].min() > .999
    assert torch.allclose(old.float()[old.ok].norm(dim=1), torch.ones(int(old.ok.sum())), atol=1e-5)
    Index.build(model, tmp_path/'old', tmp_path/'idx')
    assert (torch.tensor(Index(tmp_path/'idx').vector_of(old.ids[0])) * exact.vectors[0]).sum() > .999


@pytest.mark.parametrize('run', ['folder', 'file'])
def test_a_job_of_the_older_int8_is_finished_by_its_rule(model, source, tmp_path, run):
    out = tmp_path/'all.parquet'
    folder = tmp_path/'old' if run == 'folder' else tmp_path/'all.parquet.parts'
    job = begun_by_the_older_rule(model, source, folder)
    before = files(folder)
    (folder/job.file(1)).unlink()
    if run == 'folder':
        done = embed(model, source, folder, modality='image', precision='int8', shard_rows=64)
        assert files(folder) == before
    else:
        done = embed_to(model, source, out, modality='image', precision='int8', shard_rows=64)
        whole = pq.read_table(out)['image_vector'].combine_chunks().drop_null().to_numpy(False)
        exact = load_vectors(tmp_path/f'{folder.name}-exact')
        assert torch.from_numpy(np.stack(whole)).equal(quantize_fixed(exact.vectors[exact.ok]))
        assert 'int8' not in json.loads((tmp_path/'all.parquet.manifest.json').read_text())
    assert done.written == len(job.shard(1))


def test_int8_by_an_unknown_rule_is_refused(model, source, tmp_path):
    embed(model, source, tmp_path, modality='image', precision='int8')
    manifest = json.loads((tmp_path/'_manifest.json').read_text())
    assert manifest['int8'] == 'rowwise'
    (tmp_path/'_manifest.json').write_text(json.dumps(manifest | dict(int8='log')))
    with pytest.raises(ValueError, match="stores int8 by the rule 'log', which this mmembed does not know"):
        load_vectors(tmp_path)
    with pytest.raises(ValueError, match="int8 is 'log' there and 'rowwise' here"):
        embed(model, source, tmp_path, modality='image', precision='int8')


@pytest.mark.parametrize('output', ['int8', 'binary'])
def test_artifacts_that_store_small_embeddings(source, tmp_path, output):
    "Their int8 was multiplied by 127 once more, and their bits were taken for numbers."
    path = tmp_path/'small.pt'
    export(tiny_model(), path, output=output, fresh=False, cpp=False)
    emb = Embedder(path, batch_size=16, deterministic=True)
    rows = [0, 1, 2]
    want = dequantize(emb.encode_image([source.image(i) for i in rows]), output)
    for precision in ('float32', 'int8'):
        embed(emb, source, tmp_path/precision, modality='image', precision=precision)
        found = load_vectors(tmp_path/precision).float()
        assert found.shape[1] == want.shape[1] and (found[rows] * want).sum(1).min() > .9999
    Index.build(emb, tmp_path/'float32', tmp_path/'idx')
    assert Index(tmp_path/'idx', emb).search(bytes(source.image(2).tolist()), 1).ids == [source.name(2)]


@pytest.mark.parametrize('form, precision', [*zip(FORMS, PRECISIONS), ('.lance', 'float16')])
def test_one_file(model, source, whole, tmp_path, form, precision):
    from safetensors.torch import load_file
    out = tmp_path/f'all{form}'
    done = embed_to(model, source, out, **KW, precision=precision)
    assert (done.rows, done.failed, done.folder) == (N, 6, out)
    want = {side: quantize(load_vectors(whole, side).vectors, precision) for side in ('image', 'text')}
    ok = load_vectors(whole, 'image').ok
    if form == '.npy': found = {side: torch.from_numpy(np.load(tmp_path/f'all.{side}.npy')) for side in want}
    elif form == '.safetensors': found = load_file(out)
    else:
        if form == '.parquet': table = pq.read_table(out)
        else:
            import lancedb
            table = lancedb.connect(tmp_path).open_table('all').to_arrow()
        assert table['row'].to_pylist() == list(range(N)) and [not e for e in table['error'].to_pylist()] == ok.tolist()
        found = {}
        for side in want:
            column = table[f'{side}_vector'].combine_chunks()
            assert column.is_valid().to_pylist() == ok.tolist()
            found[side] = torch.from_numpy(np.stack(column.drop_null().to_numpy(zero_copy_only=False)))
    for side, v in want.items(): assert (found[side][ok] if len(found[side]) == N else found[side]).equal(v[ok])
    if FORMS[form].ids:
        rows = [json.loads(line) for line in (tmp_path/f'all{form}.ids.jsonl').read_text().splitlines()]
        assert [r['id'] for r in rows] == [source.name(i) for i in range(N)] and [
            not r['error'] for r in rows
        ] == ok.tolist()
        assert not found['image'][~ok].any() or precision == 'binary'
    assert len((tmp_path / f'all{form}.errors.jsonl').read_text().splitlines()) == 6 and not list(
        tmp_path.glob('*.parts')
    )
    assert embed_to(model, source, out, **KW, precision=precision)[1:4] == (N, 0, 6)


ENDED = '''
import os, sys
from pathlib import Path
import pyarrow.parquet as pq
import mmembed.retrieval.writers as outputs
from tests.retrieval.test_embed import KW, N, Worn

model, out, ended = Path(sys.argv[1]), Path(sys.argv[2]), 0

def last_step(at):
    "This process ends at once before step `at` of putting the parts together."
    calls = 0
    def wrap(place, name):
        real = getattr(place, name)
        def wrapped(*args, **kw):
            nonlocal calls
            calls += 1
            if calls == at: os._exit(9)
            return real(*args, **kw)
        setattr(place, name, wrapped)
    steps = [(pq, 'read_table'), (outputs.shutil, 'rmtree')]
    steps += [(outputs, name) for name in ('write_whole', 'write_failures', 'save_ids')]
    for place, name in steps: wrap(place, name)

for at in (7, 9, 12, 15, 17, 18, 24):
    child = os.fork()
    if not child:
        last_step(at)
        try: outputs.embed_to(model, Worn(train=N, valid=0), out, **KW)
        finally: os._exit(0)
    ended += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
print(ended)
'''


@pytest.mark.parametrize('form', ['.npy', '.lance'])
def test_ended_while_the_parts_are_put_together(model, source, whole, tmp_path, form):
    """Ended before step after step of the last phase, and started again each time: the file is whole, and no other
    is left."""
    out = tmp_path/f'x{form}'
    run = subprocess.run(
        [sys.executable, '-c', ENDED, str(model), str(out)], cwd=ROOT, capture_output=True, text=True, timeout=HANG
    )
    assert run.returncode == 0 and int(run.stdout) >= 3, run.stdout + run.stderr[-2000:]
    assert embed_to(model, source, out, **KW).failed == 6
    want = load_vectors(whole, 'text').vectors
    if form == '.npy': assert torch.from_numpy(np.load(tmp_path/'x.text.npy')).equal(want)
    else:
        import lancedb
        assert lancedb.connect(tmp_path).open_table('x').to_arrow()['row'].to_pylist() == list(range(N))
    assert sorted(p.suffix for p in tmp_path.iterdir()) == (
        ['.json', '.jsonl', '.jsonl', '.npy', '.npy'] if form == '.npy' else ['.json', '.jsonl', '.lance']
    )


def refused_by_spark(path):
    """Columns for which `ParquetToSparkSchemaConverter.convertPrimitiveField` has no type, by Parquet's own names.

    https://github.com/apache/spark/blob/master/sql/core/src/main/scala/org/apache/spark/sql/execution/datasources/parquet/ParquetSchemaConverter.scala"""
    plain = {'BOOLEAN', 'FLOAT', 'DOUBLE', 'INT32', 'INT64', 'BYTE_ARRAY', 'FIXED_LEN_BYTE_ARRAY'}
    numbers = {
        f'INT{32 if bits < 64 else 64} INT {bits} {sign}' for bits in (8, 16, 32, 64) for sign in ('true', 'false')
    }
    known = (
        numbers
        | {f'{t} NONE' for t in plain}
        | {'BYTE_ARRAY STRING', 'INT32 DATE', 'INT64 TIMESTAMP microseconds', 'INT64 TIMESTAMP milliseconds'}
    )
    def named(column):
        about = json.loads(column.logical_type.to_json())
        return ' '.join(
            map(
                str,
                [
                    column.physical_type,
                    about['Type'].upper(),
                    *(str(about[k]).lower() for k in ('bitWidth', 'isSigned', 'timeUnit') if k in about),
                ],
            )
        )
    schema = pq.ParquetFile(path).schema
    return {
        schema.column(i).path.split('.')[0]: named(schema.column(i))
        for i in range(len(schema))
        if named(schema.column(i)) not in known
    }


def test_spark_reads_what_is_written_for_it(model, source, tmp_path):
    "Its reader of Parquet has no half floats, and one such column makes it refuse the file."
    for i in range(3): (tmp_path/f'{i}.jpg').write_bytes(bytes(source.image(i).tolist()))
    at = pa.array(np.array(['2024-01-01T01:02:03.123456789'] * 3, 'datetime64[ns]'))
    columns = dict(
        image=[f'{i}.jpg' for i in range(3)], small=pa.array([1, 2, 3], pa.uint8()),
        half=pa.array(np.ones(3, 'e')), at=at, zoned=at.cast(pa.timestamp('ns', 'UTC')),
        day=at.cast(pa.date32()), clock=at.cast(pa.time64('ns')), tags=[['a'], [], None], raw=[b'x'] * 3,
        yes=[True] * 3, large=pa.array([1, 2, 3], pa.uint64()),
    )
    pq.write_table(pa.table(columns), tmp_path/'t.parquet')

    def run(*words):
        assert (
            main(
                ['embed', str(model), str(tmp_path / 't.parquet'), '--keep', ','.join([*columns][1:]), *map(str, words)]
            )
            == 0
        )
    for precision in PRECISIONS:
        for out in (f'{precision}', f'{precision}.parquet'):
            for flags in ([], ['--spark']):
                place = tmp_path/'-'.join([*flags, out]).strip('-')
                run('-o', place, '--precision', precision, *flags)
                path = place if place.is_file() else place/'part-000000.parquet'
                assert refused_by_spark(path) == (
                    {'image_vector': 'FIXED_LEN_BYTE_ARRAY FLOAT16'} if precision == 'float16' and not flags else {}
                ), path
    assert load_vectors(tmp_path/'spark-float16').vectors.equal(load_vectors(tmp_path/'float32').vectors)
    run('-o', tmp_path/'spark-float16', '--precision', 'float16', '--spark')  # goes on with its own folder


def test_spark_is_for_parquet(model, source, tmp_path, capsys):
    for out in ('x.npy', 'x.lance', 'x.safetensors'):
        with pytest.raises(ValueError, match='Spark reads Parquet: want a name that ends in .parquet, or a folder'):
            embed_to(model, source, tmp_path / out, spark=True)
    (tmp_path/'p').mkdir()
    (tmp_path/'p'/'0.jpg').write_bytes(bytes(source.image(0).tolist()))
    assert (
        main(['embed', str(model), str(tmp_path / 'p'), '--spark']) == 1
        and '--spark is of files: name them with -o' in capsys.readouterr().err
    )


def test_the_folder_is_a_data_set(whole):
    "Programs that read a folder of Parquet files take every part and nothing else."
    import pandas as pd
    import pyarrow.dataset as ds
    frame = pd.read_parquet(whole)
    assert frame['row'].tolist() == list(range(N)) and ds.dataset(whole).count_rows() == N
    assert all(p.name.startswith(('.', '_')) for p in whole.iterdir() if p.suffix != '.parquet')


def test_files_of_one_name_and_several_endings(model, tmp_path):
    "Each has a manifest, failures and ids of its own, and none takes the other for its own."
    source = Worn(train=20, valid=0)
    for form, what in (('.npy', 'image'), ('.parquet', 'text'), ('.safetensors', 'both'), ('.lance', 'image')):
        assert embed_to(model, source, tmp_path / f'x{form}', modality=what).written == 20
    for form, what in (('.npy', 'image'), ('.parquet', 'text'), ('.safetensors', 'both'), ('.lance', 'image')):
        assert embed_to(model, source, tmp_path/f'x{form}', modality=what).written == 0
        assert json.loads((tmp_path/f'x{form}.manifest.json').read_text())['what'] == what
    with pytest.raises(
        ValueError, match="x.npy.manifest.json belongs to another job: modality is 'image' there and 'text' here"
    ):
        embed_to(model, source, tmp_path / 'x.npy', modality='text')


def test_unknown_endings(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(2): (tmp_path/f'{i}.jpg').write_bytes(bytes(Scenes(train=2, valid=0).image(i).tolist()))
    for name in ('x.np', 'x.csv', 'x.NPY', 'vectors.v2'):
        assert main(['embed', str(model), '0.jpg', '1.jpg', '-o', name]) == 1
        assert (
            f'{name}: {Path(name).suffix} is not a form that vectors are written in: want .npy, .safetensors, '
            f'.parquet, .lance, or a folder'
            in capsys.readouterr().err
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ['0.jpg', '1.jpg']
    for name in ('run-1.5', 'vectors.v2/', 'vectors.v2'):  # the last is there by then
        assert (
            main(['embed', str(model), '0.jpg', '1.jpg', '-o', name]) == 0
            and len(load_vectors(tmp_path / name).ids) == 2
        )


def test_control_c_says_how_to_go_on(model, tmp_path):
    "A real interrupt in the middle: exit status 130, a sentence, whole parts; the same command goes on."
    for i in range(4): (tmp_path/f'{i}.jpg').write_bytes(bytes(Scenes(train=4, valid=0).image(i).tolist()))
    (tmp_path/'t.csv').write_text('image\n' + ''.join(f'{i % 4}.jpg\n' for i in range(3000)))
    argv = [
        sys.executable,
        '-c',
        'import sys; from mmembed.cli.main import main; sys.exit(main())',
        'embed',
        str(model),
        't.csv',
        '-o',
        'out',
        '--rows',
        '1',
    ]
    env = os.environ | dict(PYTHONPATH=str(ROOT))
    run = subprocess.Popen(
        argv, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=interruptible
    )
    until(lambda: len(list((tmp_path/'out').glob('part-*'))) > 2)
    run.send_signal(signal.SIGINT)
    said = run.communicate(timeout=HANG)[1]
    assert run.returncode == 130 and 'Traceback' not in said, said
    stopped = 'mmembed: stopped; the shards that are complete stay in out, and the same command goes on from there'
    assert stopped in said, said
    there = len(list((tmp_path/'out').glob('part-*')))
    assert there < 3000
    assert (
        f'{3000 - there:,} of them now'
        in subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=HANG).stdout
    )


class Odd(Source):
    "Names and captions that no UTF-8 holds, the same name twice"
    def __len__(self): return 4
    def name(self, i): return ['a\udcff.jpg', 'b\n"\x00', 'same', 'same'][i]
    def text(self, i): return ['\ud800', '一', '', 'x'][i]
    def image(self, i): return Scenes(train=4, valid=0).image(i)


def test_hostile_names(model, tmp_path):
    done = embed(model, Odd(), tmp_path, modality='both', keep=['text', 'label', 'group'])
    assert (done.failed, done.repeated, done.example) == (
        0,
        1,
        'same',
    ) and "1 have the id of an earlier row, such as 'same'" in str(done)
    found = load_vectors(tmp_path, 'text')
    assert found.ids == ['a\\udcff.jpg', 'b\n"\x00', 'same', 'same'] and found.ok.all()
    with pytest.raises(ValueError, match="1 rows have the id of an earlier row, such as 'same'"):
        embed(model, Odd(), tmp_path / 'u', unique=True)
    assert not (tmp_path/'u').exists()


HOSTILE = [
    b'line\nbreak.jpg',
    b'caf\xe9.jpg',
    b'-o.jpg',
    b'--help.jpg',
    'naïve 一.jpg'.encode(),
    b"';drop.jpg",
    b'$(touch pwned).jpg',
    b'.hidden.jpg',
    b'tab\t.jpg',
]


def test_hostile_files_of_a_folder_and_of_a_pipe(model, tmp_path, monkeypatch, capsys):
    """Every name opens its file, however it is spelled, by the folder or by `find -print0`.

    Nothing is written outside of OUT."""
    folder = tmp_path/'in'/'deep'
    folder.mkdir(parents=True)
    scenes = Scenes(train=len(HOSTILE), valid=0)
    for i, name in enumerate(HOSTILE):
        Path(os.fsdecode(os.path.join(os.fsencode(folder), name))).write_bytes(bytes(scenes.image(i).tolist()))
    monkeypatch.chdir(folder)
    rows = {
        jobs.readable_id(os.fsdecode(n)): Embedder(model, deterministic=True, batch_size=16).encode_image(
            [scenes.image(i)]
        )[0]
        for i, n in enumerate(HOSTILE)
    }
    assert main(['embed', str(model), '.', '-o', '../../folder']) == 0
    found = load_vectors(tmp_path/'folder')
    assert set(found.ids) == set(rows) - {'.hidden.jpg'} and all(
        v.equal(rows[n]) for n, v in zip(found.ids, found.vectors)
    )
    names = [b'./' + n for n in HOSTILE] + [b'../deep/' + HOSTILE[0]]
    monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(b'\0'.join(names) + b'\0')))
    assert main(['embed', str(model), '-', '--null', '-o', '../../pipe']) == 0
    found = load_vectors(tmp_path/'pipe')
    assert found.ids[-1] == '../deep/line\nbreak.jpg'
    assert all(v.equal(rows[n.split('/')[-1]]) for n, v in zip(found.ids, found.vectors))
    monkeypatch.chdir(folder)
    assert main(['embed', '-o', '../../dash', str(model), '--', '-o.jpg', '--help.jpg']) == 0
    assert load_vectors(tmp_path/'dash').ids == ['-o.jpg', '--help.jpg']
    assert sorted(p.name for p in tmp_path.iterdir()) == ['dash', 'folder', 'in', 'pipe'] and len(
        os.listdir(os.fsencode(folder))
    ) == len(HOSTILE)


def test_a_mistake_in_a_source_names_the_row(model, tmp_path):
    class Typo(Scenes):
        def image(self, i): return super().image(i) if i != 60 else [][1]

    with pytest.raises(RuntimeError, match='scene train 60: IndexError'):
        embed(model, Typo(train=N, valid=0), tmp_path, shard_rows=32)
    assert len(list(tmp_path.glob('part-*'))) == 1  # the rows before it are there


def test_all_rows_broken(model, tmp_path):
    class Gone(Scenes):
        def image(self, i): raise OSError('gone')
    assert embed(model, Gone(train=5, valid=0), tmp_path/'a').failed == 5
    assert not load_vectors(tmp_path/'a').ok.any() and load_vectors(tmp_path/'a').vectors.shape == (5, 12)


def tar(path, samples):
    with tarfile.open(path, 'w') as t:
        for name, content in samples:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            t.addfile(info, io.BytesIO(content))
    return path


def test_open_source(tmp_path, source, monkeypatch):
    for i in range(3): (tmp_path/f'{i}.jpg').write_bytes(bytes(source.image(i).tolist()))
    (tmp_path/'deep').mkdir()
    (tmp_path/'deep'/'3.PNG').write_bytes(b'x')
    (tmp_path/'t.csv').write_text('image,text\n0.jpg,a cat\n')
    tar(
        tmp_path / 's.tar',
        [('0.jpg', b'x'), ('0.txt', b'hello'), ('0.json', b'{"year": 2021}'), ('1.jpg', b'y'), ('2.txt', b'alone')],
    )
    assert [open_source(tmp_path).name(i) for i in range(4)] == ['0.jpg', '1.jpg', '2.jpg', 'deep/3.PNG']
    listed = read_lines(io.BytesIO(f'{tmp_path}/1.jpg\n\n{tmp_path}/0.jpg\n'.encode()))
    assert [listed.name(i) for i in range(2)] == [f'{tmp_path}/{n}.jpg' for n in (1, 0)] and listed.image(0).equal(
        source.image(1)
    )
    assert open_source(tmp_path / 't.csv', 'both').text(0) == 'a cat' and isinstance(
        open_source(f'{tmp_path}/s.tar'), ShardRows
    )
    assert [len(open_source(f'{tmp_path}/s.tar', what)) for what in ('image', 'text', 'both')] == [2, 2, 1]
    kept = open_source(f'{tmp_path}/s.tar', keep=['year', 'text'])
    assert kept.types()['year'] == pa.int64() and [kept.value(i, 'year') for i in range(2)] == [2021, None]
    with pytest.raises(FileNotFoundError, match='no such file'): open_source(tmp_path/'nowhere')
    with pytest.raises(FileNotFoundError, match='no data set no/where'): open_source('hf:no/where')
    with pytest.raises(ValueError, match='image_root is for tables'): open_source('hf:x', image_root='y')


def test_kept_columns_keep_their_types(model, tmp_path):
    scenes = Scenes(train=5, valid=0)
    for i in range(5): (tmp_path/f'{i}.jpg').write_bytes(bytes(scenes.image(i).tolist()))
    columns = dict(
        image=[f'{i}.jpg' for i in range(5)],
        text=[scenes.text(i) for i in range(5)],
        code=['007', '8', '9', None, '11'],
        year=pa.array([1999, 2000, None, 2002, 2003], pa.int16()),
        price=[1.5, 2, None, 4, 5],
        sold=[True, False, None, True, True],
        tags=[['a'], [], None, ['b', 'c'], []],
    )
    pq.write_table(pa.table(columns), tmp_path/'t.parquet')
    keep = ['code', 'year', 'price', 'sold', 'tags', 'text']
    embed(
        model,
        open_source(tmp_path / 't.parquet', 'both', keep=keep, id_key='code'),
        tmp_path / 'out',
        modality='both',
        keep=keep,
        shard_rows=2,
    )
    table = pq.read_table(sorted((tmp_path/'out').glob('*.parquet')))
    assert table['id'].to_pylist() == ['007', '8', '9', 'row 3', '11']
    assert {k: str(table.schema.field(k).type) for k in keep} == dict(
        code='string', year='int64', price='double', sold='bool', tags='string', text='string'
    )
    for k in keep:
        assert table[k].to_pylist() == (
            ['["a"]', '[]', None, '["b", "c"]', '[]'] if k == 'tags' else pa.array(columns[k]).to_pylist()
        )
    for kind in ('csv', 'jsonl'):
        path = tmp_path/f't.{kind}'
        rows = [dict(image=f'{i}.jpg', text=scenes.text(i), year=2000 + i) for i in range(5)]
        path.write_text(
            '\n'.join(
                ['image,text,year', *[f'{r["image"]},"{r["text"]}",{r["year"]}' for r in rows]]
                if kind == 'csv'
                else map(json.dumps, rows)
            )
        )
        embed(model, open_source(path, 'both', keep=['year']), tmp_path/kind, modality='both', keep=['year'])
        assert pq.read_table(tmp_path/kind/'part-000000.parquet')['year'].to_pylist() == [2000 + i for i in range(5)]
        assert load_vectors(tmp_path/kind, 'text').vectors.equal(load_vectors(tmp_path/'out', 'text').vectors)


def test_hub_rows_and_pictures_inside_parquet(model, tmp_path):
    from datasets import Dataset, Image
    scenes = Scenes(train=5, valid=0)
    images = [dict(bytes=bytes(scenes.image(i).tolist()), path=None) for i in range(5)]
    data = Dataset.from_dict(
        dict(image=images, text=[scenes.text(i) for i in range(5)], year=list(range(5)))
    ).cast_column('image', Image())
    data.to_parquet(tmp_path/'pictures.parquet')
    data.save_to_disk(tmp_path/'set')
    embed(model, scenes, tmp_path/'want', modality='both')
    for where in ('pictures.parquet', 'set'):
        embed(
            model,
            open_source(tmp_path / where, 'both', keep=['year']),
            tmp_path / f'{where}.out',
            modality='both',
            keep=['year'],
            shard_rows=3,
        )
        for side in ('image', 'text'):
            assert load_vectors(tmp_path / f'{where}.out', side).vectors.equal(
                load_vectors(tmp_path / 'want', side).vectors
            )
        assert pq.read_table(sorted((tmp_path/f'{where}.out').glob('*.parquet')))['year'].to_pylist() == list(range(5))


def test_excerpts_are_the_rows(tmp_path, source):
    import pickle
    for i in range(6): (tmp_path/f'{i}.jpg').write_bytes(bytes(source.image(i).tolist()))
    (tmp_path/'t.csv').write_text('image,text,year\n' + ''.join(f'{i}.jpg,text {i},{i}\n' for i in range(6)))
    tar(
        tmp_path / 's.tar',
        [x for i in range(6) for x in [(f'{i}.jpg', bytes(source.image(i).tolist())), (f'{i}.txt', b'%d' % i)]],
    )
    for whole in [
        open_source(tmp_path),
        open_source(tmp_path / 't.csv', 'both', keep=['year']),
        open_source(str(tmp_path / 's.tar'), 'both', keep=['text']),
        Worn(train=6, valid=0),
    ]:
        part = pickle.loads(pickle.dumps(whole.excerpt(range(2, 5))))
        assert len(part) == 3
        for i in range(3):
            assert (
                part.name(i) == whole.name(i + 2)
                and part.image(i).equal(whole.image(i + 2))
                and part.text(i) == whole.text(i + 2)
            )


def test_rows_are_the_services(model, source, whole):
    "Bit for bit what the engine of `mmembed serve --deterministic` answers, in other company and other order."
    engine = Engine(Embedder(model, batch_size=16, deterministic=True), Options(wait=.001))
    answered, stored = threading.Event(), {side: load_vectors(whole, side) for side in ('image', 'text')}
    rows = [i for i in reversed(range(40)) if stored['image'].ok[i]]
    items = [
        (kind, i, Item(kind, source.image(i) if kind == 'image' else source.text(i).encode()))
        for i in rows
        for kind in stored
    ]
    engine.submit([item for *_, item in items], lambda job: answered.set(), timeout=HANG)
    assert answered.wait(HANG) and engine.close()
    for kind, i, item in items: assert torch.from_numpy(item.value).equal(stored[kind].vectors[i]), (kind, i)


def test_texts_of_every_length_in_any_company(model, tmp_path):
    """A job sorts texts by length and fills each up to a size that only its own tokens decide: alone it has the same
    bits, in a job of other parts too."""
    words, rng = ['red', 'blue', 'circle', 'square', 'a'], np.random.default_rng(0)
    texts = [' '.join(rng.choice(words, n % 30)).encode() for n in range(200)]
    emb, source = (
        Embedder(model, batch_size=4, deterministic=True),
        read_lines(io.BytesIO(b'\n'.join([*texts, b''])), 'text'),
    )
    alone = torch.cat([emb.encode_text([t]) for t in texts])
    assert len(emb._lengths(emb.tokenize(texts)).unique()) == 5  # 8, 12, 16, 20, 24
    for rows in (7, 64, 500):
        embed(emb, source, tmp_path/str(rows), modality='text', shard_rows=rows)
        assert load_vectors(tmp_path/str(rows)).vectors.equal(alone)
    loose = Embedder(model, batch_size=4)
    embed(loose, source, tmp_path/'loose', modality='text')
    torch.testing.assert_close(load_vectors(tmp_path/'loose').vectors, alone, atol=1e-5, rtol=0)


def test_texts_of_a_part_are_tokenized_at_once(model, tmp_path, monkeypatch):
    "A chunk of 8,192 rows, or a part if that is smaller, in one call."
    texts, calls = [b'a red circle %d' % i for i in range(3000)], []
    source, emb, real = (
        read_lines(io.BytesIO(b'\n'.join([*texts, b''])), 'text'),
        Embedder(model, batch_size=16),
        Embedder.tokenize,
    )
    monkeypatch.setattr(Embedder, 'tokenize', lambda self, texts: calls.append(len(texts)) or real(self, texts))
    embed(emb, source, tmp_path/'one', modality='text')
    assert calls == [3000]
    calls.clear()
    embed(emb, source, tmp_path/'two', modality='text', shard_rows=2000)
    assert sorted(calls) == [1000, 2000]
    assert [load_vectors(tmp_path/f).vectors.shape for f in ('one', 'two')] == [(3000, 12)] * 2


LIMITED = '''
import resource, sys
from mmembed.cli.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), -1))
sys.exit(main(sys.argv[2:]))
'''


def test_no_space_left(model, tmp_path):
    "The kernel refuses bytes in the middle: one sentence, what is whole stays, and the same command goes on."
    scenes = Scenes(train=90, valid=0)
    (tmp_path/'in').mkdir()
    for i in range(90):
        (tmp_path / 'in' / f'{i:02}{"x" * (150 if i >= 60 else 0)}.jpg').write_bytes(bytes(scenes.image(i).tolist()))
    argv = ['embed', str(model), str(tmp_path/'in'), '-o', str(tmp_path/'out'), '--rows', '30']
    assert main([*argv[:-3], str(tmp_path/'again'), *argv[-2:]]) == 0
    sizes = [p.stat().st_size for p in sorted((tmp_path/'again').glob('part-*'))]
    assert len(sizes) == 3 and sizes[2] > max(sizes[:2]) + 200
    run = subprocess.run(
        [sys.executable, '-c', LIMITED, str((sizes[2] + max(sizes[:2])) // 2), *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert (
        run.returncode == 1
        and 'File too large; what was written before is kept' in run.stderr
        and 'Traceback' not in run.stderr
    ), run.stderr[-2000:]
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == [
        '.lock', '_manifest.json', 'part-000000.parquet', 'part-000001.parquet',
    ]
    assert main(argv) == 0
    assert files(tmp_path/'out') == files(tmp_path/'again')


def test_unreadable_files_fail_alone(model, tmp_path, capsys):
    scenes = Scenes(train=8, valid=0)
    for i in range(8): (tmp_path/f'{i}.jpg').write_bytes(bytes(scenes.image(i).tolist()))
    (tmp_path/'1.jpg').write_bytes(b'')
    (tmp_path/'2.jpg').write_bytes(b'no picture')
    (tmp_path/'3.jpg').unlink()
    (tmp_path/'4.jpg').unlink()
    (tmp_path/'4.jpg').mkdir()
    (tmp_path/'5.jpg').unlink()
    (tmp_path/'5.jpg').symlink_to(tmp_path/'5.jpg')
    (tmp_path/'t.tsv').write_text('image\n' + ''.join(f'{i}.jpg\n' for i in range(8)))
    assert main(['embed', str(model), str(tmp_path/'t.tsv'), '-o', str(tmp_path/'out')]) == 1
    assert '5 could not be embedded' in capsys.readouterr().out
    ledger = [json.loads(line) for line in (tmp_path/'out'/'_errors.jsonl').read_text().splitlines()]
    assert [r['id'] for r in ledger] == [f'{i}.jpg' for i in range(1, 6)]
    for r, says in zip(ledger, ['empty', 'not an image', 'No such file', 'Is a directory', 'Too many levels']):
        assert says in r['error'], r
    assert load_vectors(tmp_path/'out').ok.tolist() == [True] + [False]*5 + [True]*2


def test_not_finite_is_no_vector(model, tmp_path):
    class Sick(Embedder):
        def encode_pixels(self, pixels):
            out = super().encode_pixels(pixels)
            out[1, 2], out[2, -1] = float('nan'), float('inf')  # one value of many is enough
            return out
    assert embed(Sick(model, batch_size=4, deterministic=True), Scenes(train=8, valid=0), tmp_path).failed == 4
    assert [json.loads(line)['error'] for line in (tmp_path / '_errors.jsonl').read_text().splitlines()] == [
        'the model gave no finite embedding'
    ] * 4


def test_parts_of_another_artifact_are_found_out(model, source, whole, tmp_path):
    embed(model, source, tmp_path, **KW)
    other = Embedder(model, batch_size=16, deterministic=True)
    other.card = other.card | {'content_hash': 'of another model'}
    embed(other, source, tmp_path/'other', **KW)
    (tmp_path/'part-000002.parquet').write_bytes((tmp_path/'other'/'part-000002.parquet').read_bytes())
    for f in (lambda: embed(model, source, tmp_path, **KW), lambda: load_vectors(tmp_path, 'text')):
        with pytest.raises(
            ValueError, match="part-000002.parquet is of another job: artifact is 'of another model' there"
        ):
            f()


def test_a_source_that_changes(model, tmp_path, monkeypatch):
    """A file that goes fails alone; a table or a shard that says something else is refused.

    A shard that changes meanwhile ends the job."""
    scenes = Scenes(train=60, valid=0)
    (tmp_path/'in').mkdir()
    for i in range(60): (tmp_path/'in'/f'{i:02}.jpg').write_bytes(bytes(scenes.image(i).tolist()))
    folder = open_source(tmp_path/'in')
    for i in (3, 40): (tmp_path/'in'/f'{i:02}.jpg').unlink()
    assert embed(model, folder, tmp_path/'a', shard_rows=20).failed == 2
    with pytest.raises(ValueError, match='the source has changed since'):
        embed(model, open_source(tmp_path / 'in'), tmp_path / 'a', shard_rows=20)

    (tmp_path/'t.csv').write_text('text\na boat\na cat\n')
    embed(model, open_source(tmp_path/'t.csv', 'text'), tmp_path/'t', modality='text')
    (tmp_path/'t.csv').write_text('text\na boat\na dog\n')
    with pytest.raises(ValueError, match='the source has changed since'):
        embed(model, open_source(tmp_path / 't.csv', 'text'), tmp_path / 't', modality='text')

    samples = [(f'{i}.jpg', bytes(scenes.image(i).tolist())) for i in range(40)]
    shards = open_source(f'{tar(tmp_path/"s.tar", samples)}')
    def rewrite(ready, rows):
        if ready == 32: tar(tmp_path/'s.tar', samples[::-1])

    with pytest.raises(ValueError, match='s.tar has changed while the job was running'):
        embed(model, shards, tmp_path / 's', shard_rows=16, progress=rewrite)
    with pytest.raises(ValueError, match='the source has changed since'):
        embed(model, open_source(f'{tmp_path}/s.tar'), tmp_path / 's', shard_rows=16)


ODD = [
    b'{"id": 7, "text": "a boat", "n": 1, "when": "2020-01-02"}',
    b'{"id": "b", "text": 3, "n": 2.5}',
    b'{"id": 1.5, "text": "\\ud800", "n": "x"}',
    b'',
    b'{"id": null, "text": null, "n": [1]}',
    b'{"id": "\\udcff", "text": ["a cat", "a dog"], "n": "\\ud800"}',
    b'{"id": true, "text": {"en": "x"}, "n": 36893488147419103232}',
    b'{"id": "caf\xe9", "text": "caf\xe9", "n": NaN}',
    b'{"id": "last", "text": "' + b'x' * 3_000_000 + b'"}',
]


def test_odd_values_in_lines_of_json(model, tmp_path, monkeypatch):
    "A row fails, not the file; a number is a name as well; from a file and from standard input."
    (tmp_path/'t.jsonl').write_bytes(b'\n'.join(ODD))
    keep = ['n', 'when']
    for source in (
        open_source(tmp_path / 't.jsonl', 'text', id_key='id', keep=keep),
        read_lines(io.BytesIO(b'\n'.join(ODD)), 'both', image_key='id', id_key='id', keep=keep),
    ):
        if source.path.name == 't.jsonl':
            assert [source.name(i) for i in range(len(source))] == [
                '7', 'b', '1.5', 'row 3', '\\udcff (1)', '\\udcff (2)', 'true', 'caf\\udce9', 'last',
            ]
            said = []
            for i in range(9):
                try: said.append(source.text(i)[:9])
                except ValueError as e: said.append(str(e))
            half = 'text is not UTF-8: it holds a byte or half a character that no UTF-8 has'
            assert said == [
                'a boat', 'text is int, not text: 3', half, 'text is empty', 'a cat', 'a dog',
                "text is dict, not text: {'en': 'x'}", half, 'xxxxxxxxx',
            ]
        assert [source.value(i, 'n') for i in range(9)] == [
            '1', '2.5', 'x', '[1]', '\ufffd', '\ufffd', '36893488147419103232', None, None,
        ]
        assert str(source.value(0, 'when'))[:10] == '2020-01-02' and source.value(1, 'when') is None
    done = embed(
        model,
        open_source(tmp_path / 't.jsonl', 'text', id_key='id', keep=keep),
        tmp_path / 'out',
        modality='text',
        keep=keep,
    )
    assert (done.rows, done.failed) == (9, 5)
    for lines, error in (
        (b'{"text": "a"}\n{"text": 3}\n{"text": ', r't.jsonl, line 3: not JSON'),
        (b'{"text": "a"}\n[3]', 'line 2: want an object like'),
        (b'{"x": 1}\n', "no column 'text'"),
    ):
        (tmp_path/'t.jsonl').write_bytes(lines)
        with pytest.raises(ValueError, match=error): open_source(tmp_path/'t.jsonl', 'text')
        with pytest.raises(ValueError, match='standard input'): read_lines(io.BytesIO(lines), 'both')
    numbers = b'\n'.join(b'{"id": %d, "text": "number %d"}' % (i, i) for i in range(5))
    (tmp_path/'n.jsonl').write_bytes(numbers)
    assert [open_source(tmp_path/'n.jsonl', 'text', id_key='id').name(i) for i in range(5)] == list('01234')


def test_images_that_change(model, tmp_path, capsys):
    """Between two runs, finished or not, in a folder, a table, shards and a data set: nothing old is kept, nothing
    mixed."""
    from datasets import Dataset, Image
    scenes, folder = Scenes(train=60, valid=0), tmp_path/'in'
    folder.mkdir()
    image = lambda i: bytes(scenes.image(i).tolist())
    for i in range(40): (folder/f'{i:02}.jpg').write_bytes(image(i))
    (tmp_path/'t.csv').write_text('image\n' + ''.join(f'in/{i:02}.jpg\n' for i in range(40)))

    def parquet():
        Dataset.from_dict(
            dict(image=[dict(bytes=(folder / f'{i:02}.jpg').read_bytes(), path=None) for i in range(40)])
        ).cast_column('image', Image()).to_parquet(tmp_path / 't.parquet')

    def shard():
        tar(
            tmp_path / 's.tar',
            [(f'{i:02}.jpg', (folder / f'{i:02}.jpg').read_bytes().ljust(4000, b'\0')) for i in range(40)],
        )
    parquet(), shard()
    where = dict(folder=folder, table=tmp_path/'t.csv', shard=f'{tmp_path}/s.tar', hub=tmp_path/'t.parquet')
    def run(name, **kw): return embed(model, open_source(where[name]), tmp_path/f'{name}.out', shard_rows=16, **kw)
    class Stopped(Exception): pass
    def stop(ready, rows):
        if ready > 32: raise Stopped
    for name in ('folder', 'table'):
        with pytest.raises(Stopped): run(name, progress=stop)
    for name in ('shard', 'hub'): assert run(name).written == 40 and run(name).written == 0
    before = {name: files(tmp_path/f'{name}.out') for name in where}
    was = os.stat(folder/'03.jpg')
    (folder/'03.jpg').write_bytes(image(50))
    os.utime(folder/'03.jpg', ns=(was.st_atime_ns, was.st_mtime_ns + 1000))
    stamp = os.stat(tmp_path/'s.tar')
    parquet(), shard()
    os.utime(tmp_path/'s.tar', ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1000))
    for name in where:
        with pytest.raises(
            ValueError, match='the source has changed since: other rows, or an image of another size and time'
        ):
            run(name)
    assert before == {name: files(tmp_path/f'{name}.out') for name in where}
    argv = ['embed', str(model), str(folder), '-o', str(tmp_path/'c'), '--content-hash']
    assert main(argv) == 0
    for f in folder.iterdir(): os.utime(f)  # a copy of the same
    assert main(argv) == 0 and ', 0 of them now' in capsys.readouterr().out
    assert main(argv[:-1]) == 1 and 'told apart by content there and by size and time here' in capsys.readouterr().err
    same = (folder/'03.jpg').stat()
    (folder/'03.jpg').write_bytes((folder/'03.jpg').read_bytes()[:-1] + b'x')
    os.utime(folder/'03.jpg', ns=(same.st_atime_ns, same.st_mtime_ns))
    assert main(argv) == 1 and 'an image of another content' in capsys.readouterr().err


def test_captions_that_change(model, tmp_path):
    "Also those of a source that has no digest of its own."
    class Told(Scenes):
        said = 'a cat'
        def text(self, i): return self.said if i == 7 else super().text(i)
    source = Told(train=20, valid=0)
    for what in ('text', 'both'): embed(model, source, tmp_path/what, modality=what)
    embed(model, source, tmp_path/'image')
    source.said = 'a dog'
    for what in ('text', 'both'):
        with pytest.raises(ValueError, match='the source has changed since'):
            embed(model, source, tmp_path / what, modality=what)
    assert embed(model, source, tmp_path/'image').written == 0


def test_the_command_prints_what_it_would_write(model, tmp_path, capsys, monkeypatch):
    scenes = Scenes(train=5, valid=0)
    for i in range(5): (tmp_path/f'{i}.jpg').write_bytes(bytes(scenes.image(i).tolist()))
    (tmp_path/'4.jpg').write_bytes(b'')
    assert main(['embed', str(model), str(tmp_path)]) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    emb = Embedder(model, batch_size=16, deterministic=True)
    assert [r['id'] for r in rows] == [f'{i}.jpg' for i in range(5)] and rows[4]['error'] == 'the file is empty'
    for r in rows[:4]: assert torch.tensor(r['image_vector']).equal(emb.encode_image([tmp_path/r['id']])[0])
    monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO('a boat\n\n红色\n'.encode())))
    assert main(['embed', str(model), '--stdin', '-o', str(tmp_path/'texts.npy')]) == 0
    assert torch.from_numpy(np.load(tmp_path/'texts.npy')).equal(emb.encode_text(['a boat', '', '红色']))
    monkeypatch.setattr(
        'sys.stdin', io.TextIOWrapper(io.BytesIO(f'{{"image": "{tmp_path}/1.jpg", "text": "a boat"}}\n'.encode()))
    )
    assert main(['embed', str(model), '-', '--what', 'both', '-o', str(tmp_path/'both.safetensors')]) == 0


def test_mistakes(model, source, tmp_path):
    for kw, message in [
        (dict(modality='sound'), "modality must be 'image', 'text' or 'both', got 'sound'"),
        (dict(precision='int4'), "got 'int4'"),
        (dict(keep=['price']), 'has no column price; it has text, label and group'),
        (dict(threads=-1), 'want 0 or more threads, got -1'),
        (dict(shard_rows=0), 'at least 1, got 0'),
    ]:
        with pytest.raises(ValueError, match=message): embed(model, source, tmp_path, **kw)
    with pytest.raises(ValueError, match='holds no rows'): embed(model, Scenes(train=0, valid=0), tmp_path)
    with pytest.raises(FileNotFoundError, match='holds no embeddings'): load_vectors(tmp_path)
    embed(model, Scenes(train=3, valid=0), tmp_path, modality='text')
    with pytest.raises(ValueError, match='has vectors of text, not of image'): load_vectors(tmp_path, 'image')
