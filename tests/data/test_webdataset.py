"WebDataset shards: the rows are those that `webdataset` itself reads, from a disk, from memory and over HTTP."
import http.server
import io
import json
import pickle
import tarfile
import threading

import pytest
import torch

from mmembed.train.datamodule import PairData
from mmembed.data.scenes import Scenes
from mmembed.data.webdataset import ShardRows, Shards, shard_urls
from mmembed.text.pipeline import TextPipeline
from mmembed.vision.pipeline import VisionPipeline

braceexpand = pytest.importorskip('braceexpand')
N = 24


def same(a, b): return a[0] == b[0] and a[1].equal(b[1])


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def tarball(path, files):
    with tarfile.open(path, 'w') as tar:
        for name, content in files: add(tar, name, content)
    return path


@pytest.fixture(scope='module')
def scenes(): return Scenes(train=N, valid=0, lang='en')


@pytest.fixture(scope='module')
def folder(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp('shards')
    wds = pytest.importorskip('webdataset')
    with wds.ShardWriter(f'{folder}/s-%02d.tar', maxcount=6, verbose=0) as writer:
        for i in range(N):
            writer.write({'__key__': f'deep.er/{i:05}' if i % 2 else f'{i:05}', 'jpg': bytes(scenes.image(i).tolist()),
                          'txt': scenes.text(i), 'json': {'album': i // 5, 'caption': f'scene {i}'}, 'cls': i % 3})
    return folder


def test_rows_are_those_of_webdataset(folder, scenes):
    wds = pytest.importorskip('webdataset')
    theirs = list(wds.WebDataset(f'{folder}/s-{{00..03}}.tar', shardshuffle=False, empty_check=False))
    ours = Shards(f'{folder}/s-{{00..03}}.tar', label_key='cls', group_key='json:album')
    assert len(ours) == len(theirs) == N and not ours.left_out()
    for i, sample in enumerate(theirs):
        assert ours.keys[i] == sample['__key__']
        assert bytes(ours.image(i).tolist()) == sample['jpg'] == bytes(scenes.image(i).tolist())
        assert (ours.text(i).encode(), ours.label(i).encode()) == (sample['txt'], sample['cls'])
        assert ours.group(i) == str(i // 5)


def test_parts_of_a_sample(folder, tmp_path, scenes):
    files = [
        ('a/1.jpg', b'one'),
        ('a/1.txt', b'first'),
        ('a/1.json', b'{"album": 3, "caption": "other"}'),
        ('a/1.cls', b'7\n'),
        ('./b/2.PNG', b'two'),
        ('./b/2.txt', 'é'.encode()),
        ('./b/2.json', b'{}'),
        ('b/.hidden', b''),
        ('c.seg.png', b'three'),
        ('c.txt', b'third'),
    ]
    path = tarball(tmp_path/'x.tar', files)
    source = Shards(path, group_key='json:album')
    assert [source.text(i) for i in range(3)] == ['first', 'é', 'third'] and bytes(source.image(2).tolist()) == b'three'
    assert [source.group(i) for i in range(3)] == ['3', './b/2', 'c'] and source.name(1) == 'x.tar: ./b/2'
    fields = Shards(path, text_key='json:caption', label_key='cls')
    assert len(fields) == 1 and fields[0][0] == 'other' and fields.label(0) == '7'
    assert fields.left_out() == dict.fromkeys(('x.tar: ./b/2', 'x.tar: c'), 'there is no caption (json:caption)')
    labels = Shards(path, text_key=None, label_key='cls', templates=['a {}'])
    assert labels.text(0) == 'a 7' and len(labels) == 1


def test_order_splits_and_pickling(folder, scenes):
    source = Shards(f'{folder}/s-*.tar', group_key='shard')
    again = pickle.loads(pickle.dumps(source))
    for i in torch.randperm(N).tolist(): assert same(again[i], scenes[i]) and same(source[i], scenes[i])
    train, valid = source.split(0.5)
    assert len(train) % 6 == 0 and len(train) + len(valid) == N and repr(source) == '24 samples of 4 shards'


def test_the_index_is_kept_and_checked(folder, tmp_path, scenes, monkeypatch):
    import mmembed.data.webdataset as module
    calls, real = [], module.read_samples
    monkeypatch.setattr(module, 'read_samples', lambda *a: calls.append(a[0]) or real(*a))
    url = f'{folder}/s-{{00..03}}.tar'
    first = Shards(url, index=tmp_path)
    assert len(calls) == 4 and len(list(tmp_path.iterdir())) == 4
    second = Shards(url, index=tmp_path)
    assert len(calls) == 4 and (second.texts, second.places, second.keys) == (first.texts, first.places, first.keys)
    copy = tarball(tmp_path/'own.tar', [('1.jpg', b'x'), ('1.txt', b'y')])
    assert len(Shards(copy, index=tmp_path/'own')) == 1
    tarball(copy, [(f'{i}.{e}', b'x'*3000) for i in range(5) for e in ('jpg', 'txt')])
    assert len(Shards(copy, index=tmp_path/'own')) == 5  # the shard has another size: looked through again


class Ranges(http.server.BaseHTTPRequestHandler):
    "Serves byte ranges of one folder, or ignores them"
    folder, ranges = None, True

    def do_HEAD(self): self.do_GET(body=False)

    def do_GET(self, body=True):
        path = self.folder/self.path.lstrip('/')
        if not path.is_file(): return self.send_error(404)
        data, wanted = path.read_bytes(), self.headers.get('Range')
        part = data
        if self.ranges and wanted:
            a, b = wanted.removeprefix('bytes=').split('-')
            part = data[int(a):int(b) + 1 if b else None]
        self.send_response(206 if part is not data else 200)
        self.send_header('Accept-Ranges', 'bytes' if self.ranges else 'none')
        if part is not data: self.send_header('Content-Range', f'bytes {a}-{int(a) + len(part) - 1}/{len(data)}')
        self.send_header('Content-Length', str(len(part)))
        self.end_headers()
        if body: self.wfile.write(part)

    def log_message(self, *_): pass


@pytest.fixture
def server(folder):
    pytest.importorskip('aiohttp')
    handler = type('Here', (Ranges,), {'folder': folder})
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield handler, f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


def test_from_memory(folder, scenes):
    import fsspec
    for f in sorted(folder.glob('*.tar')): fsspec.filesystem('memory').pipe(f'/bucket/{f.name}', f.read_bytes())
    source = Shards('memory://bucket/s-*.tar')
    for i in (23, 0, 11): assert same(source[i], scenes[i])


def test_over_http_in_forked_workers_and_threads(server, scenes):
    _, url = server
    source = Shards(f'{url}/s-{{00..03}}.tar')
    tp = TextPipeline.learn([scenes.text(i) for i in range(N)], vocab_size=200, max_length=32)
    data = PairData(
        source=source, batch_size=4, valid_share=0.5, text_pipeline=tp,
        vision_pipeline=VisionPipeline(size=32), on_error='raise',
    )
    want = list(data.train_dataloader())
    for data.worker_type in ('processes', 'threads'):
        data.workers = 2
        for a, b in zip(data.train_dataloader(), want, strict=True):
            assert a.pixels.equal(b.pixels) and a.index.equal(b.index)


def test_a_server_without_ranges_is_found_out(server, scenes):
    handler, url = server
    source = Shards(f'{url}/s-00.tar')
    handler.ranges = False
    with pytest.raises(ValueError, match='bytes came where|does not serve ranges'): source.image(3)


@pytest.mark.parametrize('cut', [0, 100, 700, 1024, 3000, 4608, 5000, 9000])
def test_cut_shards_are_named(tmp_path, cut):
    path = tarball(
        tmp_path / 'a.tar', [('a.jpg', b'x' * 3000), ('a.txt', b'hello'), ('b.jpg', b'y' * 5000), ('b.txt', b'hello')]
    )
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match='a.tar is (truncated|not a readable tar file)'): Shards(path)


def test_mistakes(tmp_path):
    with pytest.raises(FileNotFoundError, match='no shards match'): Shards(f'{tmp_path}/*.tar')
    with pytest.raises(FileNotFoundError, match='no such shard: .*gone-0.tar'): Shards(f'{tmp_path}/gone-{{0..3}}.tar')
    path = tarball(tmp_path/'a.tar', [('a.jpg', b'x'), ('a.json', b'[1]')])
    with pytest.raises(ValueError, match="a.tar: no column 'txt'; there are: json"): Shards(path)
    bare = tarball(tmp_path/'b.tar', [('a.jpg', b'x'), ('b.txt', b'a cat')])
    why = 'no sample has an image and txt; the first of 2: b.tar: a: there is no caption'
    with pytest.raises(ValueError, match=why): Shards(bare)
    with pytest.raises(ValueError, match='a: json is not a JSON object'): Shards(path, text_key='json:caption')
    with pytest.raises(ValueError, match='want text_key or label_key'): Shards(path, text_key=None)
    assert shard_urls('a-{1,3}{x..z}.tar') == [f'a-{n}{c}.tar' for n in '13' for c in 'xyz']


def test_a_wrong_caption_costs_its_own_sample(tmp_path):
    "As in a table: the other samples stay, for training and for a job, and the reason is named."
    texts = ['a cat', 3, None, ['two', 'cats']]
    path = tarball(tmp_path/'a.tar', [(f'{i}.{end}', data) for i, text in enumerate(texts) for end, data in (
        ('jpg', b'x'), ('json', json.dumps({'text': text}).encode()))])
    for source in (Shards(path, text_key='json:text'), ShardRows(str(path), 'both', text_key='json:text')):
        assert [source.text(i) for i in range(len(source))] == ['a cat', 'two', 'cats']
        assert source.left_out() == {'a.tar: 1': 'json:text is int, not text: 3',
                                     'a.tar: 2': 'there is no caption (json:text)'}
    assert len(ShardRows(str(path), 'image', text_key='json:text')) == 4
