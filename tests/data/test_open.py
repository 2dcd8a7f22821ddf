"""`path` of the data module takes every name of data; what a source cannot follow is refused."""
import json
import tarfile

import pytest
import torch

from mmembed.train.pair_data import LabelData, MatchData
from mmembed.train.datamodule import PairData
from mmembed.data.open import open_pairs, source_kind
from mmembed.data.scenes import Scenes
from mmembed.data.open import open_source
from mmembed.text.pipeline import TextPipeline
from mmembed.vision.pipeline import VisionPipeline

N = 12


@pytest.fixture(scope='module')
def scenes(): return Scenes(train=N, valid=0)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def image(scenes, i): return bytes(scenes.image(i).tolist())


def classes(folder, scenes):
    for i in range(N):
        (place := folder/('red' if i % 2 else 'blue')).mkdir(parents=True, exist_ok=True)
        (place/f'{i}.jpg').write_bytes(image(scenes, i))


def shards(folder, scenes, ending='txt'):
    for n in range(2):
        with tarfile.open(folder/f'pairs-{n}.tar', 'w') as tar:
            for i in range(n, N, 2):
                for name, data in ((f'{i}.jpg', image(scenes, i)), (f'{i}.{ending}', scenes.text(i).encode())):
                    path = folder/name
                    path.write_bytes(data)
                    tar.add(path, name)
                    path.unlink()


def hub(folder, scenes):
    datasets = pytest.importorskip('datasets')
    rows = {
        'image': [{'bytes': image(scenes, i), 'path': None} for i in range(N)],
        'text': [scenes.text(i) for i in range(N)],
    }
    return datasets.Dataset.from_dict(
        rows, features=datasets.Features({'image': datasets.Image(), 'text': datasets.Value('string')})
    )


def written(kind, folder, scenes):
    "What `path` is for a source of this kind, written below `folder`."
    if kind == 'folder':
        classes(folder/'photos', scenes)
        return 'photos'
    if kind.startswith('shards'):
        shards(folder, scenes, kind.partition(' ')[2] or 'txt')
        return 'pairs-{0..1}.tar'
    if kind == 'table':
        for i in range(N): (folder/f'{i}.jpg').write_bytes(image(scenes, i))
        (folder / 'pairs.jsonl').write_text(
            '\n'.join(json.dumps(dict(image=f'{i}.jpg', text=scenes.text(i))) for i in range(N)), encoding='utf-8'
        )
        return 'pairs.jsonl'
    data = hub(folder, scenes)
    if kind == 'saved': data.save_to_disk(folder/'saved')
    elif kind == 'parquet': data.to_parquet(folder/'whole.parquet')
    else:
        (folder/'copy'/'data').mkdir(parents=True)
        data.to_parquet(folder/'copy'/'data'/'train-00000-of-00001.parquet')
    return {'saved': 'saved', 'hf:': 'hf:copy', 'copy': 'copy', 'parquet': 'whole.parquet'}[kind]


KINDS = ['table', 'folder', 'shards', 'shards text', 'saved', 'hf:', 'copy', 'parquet']


@pytest.mark.parametrize('kind', KINDS)
def test_path_takes_every_name_of_data(here, scenes, kind):
    path = written(kind, here, scenes)
    data = PairData(
        path,
        batch_size=4,
        valid_share=0.4,
        text_pipeline=TextPipeline.learn(['a red circle'], vocab_size=60),
        vision_pipeline=VisionPipeline(size=32),
    )
    batch = next(iter(data.val_dataloader()))
    assert len(data.train) + len(data.valid) == N and len(batch.pixels) and data.train.text(0).strip()
    if kind != 'folder': assert {data.source.text(i) for i in range(N)} == {scenes.text(i) for i in range(N)}
    files = sorted(bytes(data.source.image(i).tolist()) for i in range(N))
    assert files == sorted(image(scenes, i) for i in range(N))


@pytest.mark.parametrize('kind', KINDS)
def test_training_and_embedding_find_the_same_images(here, scenes, kind):
    path = written(kind, here, scenes)
    found, wanted = open_source(path if kind != 'copy' else 'hf:copy', 'image'), open_pairs(path)
    assert {bytes(found.image(i).tolist()) for i in range(len(found))} == {
        bytes(wanted.image(i).tolist()) for i in range(len(wanted))
    }


def test_what_lies_below_data_path_is_found(tmp_path, scenes, monkeypatch):
    classes(tmp_path/'kept'/'photos', scenes)
    (tmp_path/'settings.ini').write_text('[mmembed]\ndata_path = kept\n')
    (tmp_path/'work').mkdir()
    monkeypatch.chdir(tmp_path/'work')
    assert source_kind('photos') == 'folder' and len(open_pairs('photos')) == N == len(PairData('photos').source)


def test_a_folder_of_classes_is_classified(here, scenes):
    classes(here/'photos', scenes)
    data = LabelData(path='photos', valid_share=.4, templates=['one {}'])
    assert data.classes == ['blue', 'red'] and data.train.text(0) in ('one red', 'one blue')
    assert MatchData(path='photos', valid_share=.4).train.label(1) == 'mismatch'


@pytest.mark.parametrize(
    'kind, more, says',
    [
        (
            'folder',
            dict(group_key='year'),
            "photos is a folder of classes, which has no group_key: leave out group_key='year'",
        ),
        ('folder', dict(text_key='caption'), 'no text_key'),
        ('folder', dict(label_key='class'), 'no label_key'),
        ('folder', dict(image_root='x'), 'no image_root'),
        ('shards', dict(image_key='photo'), 'is shards, which has no image_key'),
        ('shards', dict(near_key='x'), 'no near_key'),
        ('saved', dict(image_root='x'), 'is a data set of Hugging Face, which has no image_root'),
        ('saved', dict(text_key='caption'), "no column 'caption'"),
        ('table', dict(text_key='caption'), "no column 'caption'"),
    ],
)
def test_a_key_that_cannot_be_followed_is_refused(here, scenes, kind, more, says):
    path = written(kind, here, scenes)
    with pytest.raises(ValueError, match=says): PairData(path, **more)


@pytest.mark.parametrize(
    'path', ['none', 'none.csv', 'none-{0..3}.tar', 'none-*.tar', 'none.parquet', 'hf:none', 'cat.jpg']
)
@pytest.mark.parametrize('module', [PairData, LabelData, MatchData])
def test_what_is_not_there_is_told(here, path, module):
    with pytest.raises(FileNotFoundError, match='no ') as e: module(path=path)
    assert '\n' not in str(e.value)


def test_an_image_alone_and_a_folder_without_classes(here, scenes):
    (here/'a.jpg').write_bytes(image(scenes, 0))
    with pytest.raises(ValueError, match='a.jpg is a single image'): PairData('a.jpg')
    with pytest.raises(ValueError, match='holds no folders of image files'): PairData('.')


def test_tables_in_memory(here, scenes):
    "What people try first: a DataFrame, a data set, a dict, a list, as path or as source."
    pd = pytest.importorskip('pandas')
    frame = pd.DataFrame({'image': ['a.jpg'], 'text': ['x']})
    for thing in (frame, {'image': ['a.jpg']}, ['a.jpg'], torch.zeros(2)):
        for kw in (dict(path=thing), dict(source=thing)):
            with pytest.raises(TypeError, match=f'{type(thing).__name__}.*(Parquet|want)') as e: PairData(**kw)
            assert '\n' not in str(e.value)
    data = hub(here, scenes)
    datasets = pytest.importorskip('datasets')
    for thing in (data, datasets.DatasetDict(train=data)):
        assert len(PairData(source=thing, valid_share=.4).source) == len(PairData(thing, valid_share=.4).source) == N
