"Batch jobs: killed at any moment and started again, the files are those of an uninterrupted run."
import errno
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import mmembed.jobs as jobs
from mmembed.data.scenes import Scenes
from mmembed.data.shards import Shards
from mmembed.data.sources import Source
from mmembed.export.verify import export
from mmembed.jobs import PRECISIONS, embed, from_precision, load_vectors, open_source, read_job, save_npy, save_safetensors, to_precision
from mmembed.models.dual import DualEncoder
from mmembed.models.towers import ConvNet, TextTransformer
from mmembed.runtime import Embedder
from mmembed.text.pipeline import TextPipeline
from mmembed.vision.pipeline import VisionPipeline

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
    model = DualEncoder(TextTransformer(tp, width=16, depth=1, heads=2), ConvNet(VisionPipeline(size=24), channels=(8,)), dim=12)
    export(model.eval(), path, fresh=False, cpp=False)
    return path


@pytest.fixture(scope='module')
def model(tmp_path_factory): return artifact(tmp_path_factory.mktemp('model')/'model.pt')


@pytest.fixture(scope='module')
def source(): return Worn(train=N, valid=0)


def files(folder): return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.name != '.lock'}


KW = dict(what='both', keep=['text'], shard_rows=32)


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
    assert table['text'].to_pylist() == [source.text(i) if i != 90 else '' for i in range(N)]
    assert [i for i, v in enumerate(table['image_vector'].to_pylist()) if v is None] == [7, 47, 77, 87, 90, 127]
    bad = [i for i, e in enumerate(table['error'].to_pylist()) if e]
    assert bad == sorted({7, 47, 77, 87, 90, 127})
    for side, encode in [('image', lambda i: emb.encode_image([source.image(i)])), ('text', lambda i: emb.encode_text([source.text(i)]))]:
        found = load_vectors(whole, side)
        assert found.ids == [source.name(i) for i in range(N)] and (~found.ok).nonzero().flatten().tolist() == bad
        for i in [0, 6, 8, 31, 32, 63, 149]: assert found.vectors[i].equal(encode(i)[0])  # bit for bit, in any company
        assert not found.vectors[bad].any()


def test_the_ledger(whole, source):
    ledger = [json.loads(line) for line in (whole/'errors.jsonl').read_text().splitlines()]
    assert [(r['row'], r['id']) for r in ledger] == [(i, source.name(i)) for i in (7, 47, 77, 87, 90, 127)]
    assert ledger[2]['error'] == 'no such picture' and ledger[4]['error'] == 'no caption' and '.cpp' not in str(ledger)


KILLED = '''
import os, random, signal, sys, time
from pathlib import Path
from tests.test_jobs import KW, N, Worn
from mmembed.jobs import embed

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
    root = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, '-c', KILLED, str(model), str(tmp_path/'out')], cwd=root, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr[-2000:]
    kills, partial = map(int, run.stdout.split())
    assert kills >= 2, run.stdout
    embed(model, source, tmp_path/'out', **KW)  # in case the last attempt was one of the killed
    assert files(tmp_path/'out') == files(whole)


def test_a_half_written_file_is_no_file(model, source, whole, tmp_path, monkeypatch):
    real, calls = jobs._save, []
    def full(path, table):
        calls.append(path.name)
        if len(calls) == 3: raise OSError(errno.ENOSPC, 'No space left on device')
        real(path, table)
    monkeypatch.setattr(jobs, '_save', full)
    with pytest.raises(OSError, match='No space left'): embed(model, source, tmp_path, **KW)
    assert sorted(p.name for p in tmp_path.glob('part*')) == ['part-000000.parquet', 'part-000001.parquet']
    with pytest.raises(ValueError, match='is not finished: 3 of 5 files are missing; run it again'): read_job(tmp_path)
    (tmp_path/'.part-000002.parquet.draft').write_bytes(b'half')
    monkeypatch.setattr(jobs, '_save', real)
    assert embed(model, source, tmp_path, threads=3, **KW).written == N - 64
    assert files(tmp_path) == files(whole)


def test_no_space_while_writing_leaves_no_draft(tmp_path, monkeypatch):
    def fail(_): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(jobs.os, 'fsync', fail)
    with pytest.raises(OSError, match='No space'): jobs._write(tmp_path/'x', b'data')
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
    with pytest.raises(ValueError, match='holds part-000000.parquet and no manifest'): embed(model, source, tmp_path, **KW)
    (tmp_path/'manifest.json').write_text('{')
    with pytest.raises(ValueError, match='is not a manifest'): embed(model, source, tmp_path, **KW)


def test_one_job_at_a_time(model, source, tmp_path):
    with jobs._alone(tmp_path):
        with pytest.raises(ValueError, match='another job is writing to'): embed(model, source, tmp_path, **KW)
    assert embed(model, source, tmp_path, **KW).written == N


@pytest.mark.parametrize('precision', PRECISIONS)
def test_precisions(model, source, whole, tmp_path, precision):
    embed(model, source, tmp_path, what='image', precision=precision, shard_rows=100)
    found, exact = load_vectors(tmp_path), load_vectors(whole, 'image')
    assert found.vectors[exact.ok].equal(to_precision(exact.vectors[exact.ok], precision)) and found.ok.sum() == exact.ok.sum() + 1
    cosine = (found.float() * exact.vectors).sum(1)[exact.ok]
    assert cosine.min() > {'float32': 0.9999, 'float16': 0.999, 'int8': 0.99, 'binary': 0.5}[precision]


def test_precision_round_trip():
    x = torch.nn.functional.normalize(torch.randn(50, 29), dim=1)
    assert from_precision(to_precision(x, 'float32'), 'float32', 29).equal(x)
    bits = to_precision(x, 'binary')
    assert bits.equal(torch.from_numpy(np.packbits(x.numpy() > 0, axis=1)))
    assert (from_precision(bits, 'binary', 29) > 0).equal(x > 0)


def test_other_formats(whole):
    from safetensors.torch import load_file
    try:
        written = [p.name for p in save_npy(whole) + save_safetensors(whole)]
        assert written == ['image.npy', 'text.npy', 'ids.jsonl', 'vectors.safetensors', 'ids.jsonl']
        for side in ('image', 'text'):
            found = load_vectors(whole, side)
            assert torch.from_numpy(np.load(whole/f'{side}.npy')).equal(found.vectors)
            assert load_file(whole/'vectors.safetensors')[side].equal(found.vectors)
        rows = [json.loads(line) for line in (whole/'ids.jsonl').read_text().splitlines()]
        assert [r['id'] for r in rows] == found.ids and [r['ok'] for r in rows] == found.ok.tolist()
    finally:
        for name in set(written): (whole/name).unlink()


def test_progress_reaches_the_end(model, source, tmp_path):
    seen = []
    embed(model, source, tmp_path, shard_rows=40, batch_size=16, progress=lambda n, of: seen.append((n, of)))
    assert seen[-1] == (N, N) and seen == sorted(seen) and len(seen) == 3*3 + 2
    (tmp_path/'part-000001.parquet').unlink()
    seen.clear()
    embed(model, source, tmp_path, shard_rows=40, batch_size=16, progress=lambda n, of: seen.append((n, of)))
    assert seen == [(N - 24, N), (N - 8, N), (N, N)]


class Odd(Source):
    "Names and captions that no UTF-8 holds, the same name twice"
    def __len__(self): return 4
    def name(self, i): return ['a\udcff.jpg', 'b\n"\x00', 'same', 'same'][i]
    def text(self, i): return ['\ud800', '一', '', 'x'][i]
    def image(self, i): return Scenes(train=4, valid=0).image(i)


def test_hostile_names(model, tmp_path):
    assert embed(model, Odd(), tmp_path, what='both', keep=['text', 'label', 'group']).failed == 0
    found = load_vectors(tmp_path, 'text')
    assert found.ids == ['a\ufffd\ufffd\ufffd.jpg', 'b\n"\x00', 'same', 'same'] and found.ok.all()


def test_a_mistake_in_a_source_names_the_row(model, tmp_path):
    class Typo(Scenes):
        def image(self, i): return super().image(i) if i != 60 else [][1]
    with pytest.raises(RuntimeError, match='scene train 60: IndexError'): embed(model, Typo(train=N, valid=0), tmp_path, shard_rows=32)
    assert len(list(tmp_path.glob('part-*'))) == 1  # the rows before it are there


def test_all_rows_broken(model, tmp_path):
    class Gone(Scenes):
        def image(self, i): raise OSError('gone')
    assert embed(model, Gone(train=5, valid=0), tmp_path/'a').failed == 5
    assert not load_vectors(tmp_path/'a').ok.any() and load_vectors(tmp_path/'a').vectors.shape == (5, 12)


def test_open_source(tmp_path, source, monkeypatch):
    import io
    import tarfile
    for i in range(3): (tmp_path/f'{i}.jpg').write_bytes(bytes(source.image(i).tolist()))
    (tmp_path/'deep').mkdir()
    (tmp_path/'deep'/'3.PNG').write_bytes(b'x')
    (tmp_path/'t.csv').write_text('image,text\n0.jpg,a cat\n')
    with tarfile.open(tmp_path/'s.tar', 'w') as tar:
        for name, content in [('0.jpg', b'x'), ('0.txt', b'hello')]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert [open_source(tmp_path).name(i) for i in range(4)] == ['0.jpg', '1.jpg', '2.jpg', 'deep/3.PNG']
    monkeypatch.setattr('sys.stdin', io.StringIO(f'{tmp_path}/1.jpg\n\n{tmp_path}/0.jpg\n'))
    listed = open_source('-')
    assert [listed.name(i) for i in range(2)] == [f'{tmp_path}/{n}.jpg' for n in (1, 0)] and listed.image(0).equal(source.image(1))
    assert open_source(tmp_path/'t.csv')[0][0] == 'a cat' and isinstance(open_source(f'{tmp_path}/s.tar'), Shards)
    with pytest.raises(FileNotFoundError, match='no such file'): open_source(tmp_path/'nowhere')
    with pytest.raises(FileNotFoundError, match='no data set no/where'): open_source('hf:no/where')


def test_mistakes(model, source, tmp_path):
    for kw, message in [(dict(what='sound'), "what must be 'image', 'text' or 'both', got 'sound'"), (dict(precision='int4'), "got 'int4'"),
                        (dict(keep=['price']), 'keep knows text, label and group, got price'), (dict(threads=0), 'at least 1, got 8192 and 0')]:
        with pytest.raises(ValueError, match=message): embed(model, source, tmp_path, **kw)
    with pytest.raises(ValueError, match='holds no rows'): embed(model, Scenes(train=0, valid=0), tmp_path)
    with pytest.raises(FileNotFoundError, match='holds no embeddings'): load_vectors(tmp_path)
    embed(model, Scenes(train=3, valid=0), tmp_path, what='text')
    with pytest.raises(ValueError, match='has vectors of text, not of image'): load_vectors(tmp_path, 'image')
