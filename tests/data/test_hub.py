"Hugging Face data sets: rows are the files' own bytes, from a saved folder, from Parquet and from memory."
import pickle

import pytest

from mmembed.data.hub import HubData, HubRows
from mmembed.train.datamodule import PairData
from mmembed.data.scenes import Scenes
from mmembed.text.pipeline import TextPipeline
from mmembed.vision.pipeline import VisionPipeline

datasets = pytest.importorskip('datasets')
datasets.disable_progress_bars()


@pytest.fixture(scope='module')
def scenes(): return Scenes(train=16, valid=4, lang='en')


@pytest.fixture(scope='module')
def whole(scenes):
    rows = [
        dict(
            image=dict(bytes=bytes(scenes.image(i).tolist()), path=None),
            text=scenes.text(i),
            many=[scenes.text(i), 'x'],
            raw=bytes(scenes.image(i).tolist()),
            album=i // 4,
            shape=i % 2,
            empty=None,
        )
        for i in range(20)
    ]
    features = datasets.Features(
        image=datasets.Image(),
        text=datasets.Value('string'),
        many=datasets.List(datasets.Value('string')),
        raw=datasets.Value('binary'),
        album=datasets.Value('int64'),
        empty=datasets.Value('string'),
        shape=datasets.ClassLabel(names=['disc', 'bar']),
    )
    return datasets.DatasetDict({part: datasets.Dataset.from_list(rows[a:b], features=features)
                                 for part, a, b in [('train', 0, 16), ('validation', 16, 20)]})


def same(a, b): return a[0] == b[0] and a[1].equal(b[1])


@pytest.mark.parametrize('form', ['saved', 'saved one', 'parquet file', 'parquet folder', 'memory', 'bytes', 'pickled'])
def test_rows_are_the_files_own(whole, scenes, tmp_path, form):
    n, more = 20, {}
    if form in ('saved', 'bytes', 'pickled'): whole.save_to_disk(tmp_path/'d')
    if form == 'bytes': more = dict(image_key='raw')
    if form == 'saved one': n = len(whole['train'].save_to_disk(tmp_path/'d') or whole['train'])
    if form == 'parquet file': n = whole['train'].to_parquet(tmp_path/'d.parquet') and 16
    if form == 'parquet folder':
        for part in whole: whole[part].to_parquet(tmp_path/'d'/'data'/f'{part}-00000-of-00001.parquet')
    where = {'parquet file': tmp_path/'d.parquet', 'memory': whole['train']}.get(form, tmp_path/'d')
    source = HubData(where, group_key='album', label_key='shape', **more)
    if form == 'memory': n = 16
    if form == 'pickled': source = pickle.loads(pickle.dumps(source))
    assert len(source) == n
    for i in range(n):
        assert same(source[i], scenes[i])
        assert (source.group(i), source.label(i)) == (str(i // 4), ['disc', 'bar'][i % 2])
    train, valid = source.split(0.5)
    if n == 20: assert (len(train), len(valid)) == (16, 4) and valid.text(0) == scenes.text(16)
    else: assert not {train.group(i) for i in range(len(train))} & {valid.group(i) for i in range(len(valid))}


def test_paths_and_templates(tmp_path):
    (tmp_path/'1.jpg').write_bytes(b'x')
    d = datasets.Dataset.from_list([dict(image=str(tmp_path/'1.jpg'), kind='hat'), dict(image=None, kind='shoe')])
    source = HubData(d, text_key=None, label_key='kind', templates=['one {}'])
    assert bytes(source.image(0).tolist()) == b'x' and [source.text(i) for i in range(2)] == ['one hat', 'one shoe']
    with pytest.raises(ValueError, match='there is no image'): source.image(1)
    image = d.cast_column('image', datasets.Image())
    assert bytes(HubData(image, text_key=None, label_key='kind').image(0).tolist()) == b'x'


def test_several_captions_and_none(whole, scenes):
    source = HubData(whole, text_key='many')
    assert [source.text(i) for i in range(40)] == [t for i in range(20) for t in (scenes.text(i), 'x')] and source.name(
        33
    ) == 'validation 0 (2)'
    assert all(source.image(i).equal(scenes.image(i // 2)) for i in range(40)) and [len(p) for p in source.split()] == [
        32,
        8,
    ]
    assert HubData(whole['train'], text_key='empty').missing('text') == dict.fromkeys(range(16), 'there is no caption')


def test_in_workers(whole, scenes):
    tp = TextPipeline.learn([scenes.text(i) for i in range(16)], vocab_size=200, max_length=32)
    data = PairData(source=HubData(whole['train'], group_key='album'), batch_size=4, valid_share=0.5, text_pipeline=tp,
                    vision_pipeline=VisionPipeline(size=32), on_error='raise')
    want = list(data.train_dataloader())
    for data.worker_type in ('processes', 'threads'):
        data.workers = 2
        for a, b in zip(data.train_dataloader(), want, strict=True):
            assert a.pixels.equal(b.pixels) and a.index.equal(b.index)


def test_mistakes(whole, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no column 'alt'; there are: image, text, many"):
        HubData(whole['train'], text_key='alt')
    with pytest.raises(ValueError, match='row 0: album is int, not text: 0'): HubData(whole['train'], text_key='album')
    with pytest.raises(ValueError, match='want'): HubData(whole['train'], text_key=None)
    with pytest.raises(ValueError, match='neither a folder of `save_to_disk` nor of Parquet files'): HubData(tmp_path)
    with pytest.raises(ValueError, match='holds no rows'): HubData(whole['train'].select([]))
    with pytest.raises(
        FileNotFoundError, match=r'no data set some/thing: it is not a folder here, .*HF_HUB_OFFLINE is set'
    ):
        HubData('some/thing')


def test_a_job_embeds_no_empty_text():
    "As of a table, a row without a text fails alone, with its reason, instead of being embedded as nothing."
    d = datasets.Dataset.from_list([dict(text='a cat'), dict(text=None), dict(text=' ')])
    rows = HubRows(d, 'text')
    assert rows.text(0) == 'a cat'
    for i in (1, 2):
        with pytest.raises(ValueError, match='text is empty'): rows.text(i)
