"""Data that come divided: columns, folders, data sets of the hub and shards are split as they say.

What is not known is refused by name."""
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmembed.data.folders import ClassFolder, Files
from mmembed.data.hub import HubData
from mmembed.train.pair_data import LabelData
from mmembed.train.datamodule import PairData
from mmembed.data.webdataset import Shards
from mmembed.data.split_names import PART_NAMES, part_in, part_named
from mmembed.data.source import Subset
from mmembed.data.tables import PairsFile
from mmembed.data.splits import read_split
from tests.data.test_folders import make
from tests.data.test_webdataset import tarball


def table(folder, values, key='split', ending='.csv', **more):
    "A table of as many rows as values, with a column of them."
    rows = [dict(image=f'{i}.jpg', text=f'caption {i}', **{key: v}) for i, v in enumerate(values)]
    for r in rows: (folder/r['image']).write_bytes(b'\xff\xd8')
    path = folder/f'pairs{ending}'
    if ending == '.parquet': pq.write_table(pa.Table.from_pylist(rows), path)
    elif ending == '.jsonl': path.write_text(''.join(json.dumps(r) + '\n' for r in rows))
    else: path.write_text('\n'.join(','.join(map(str, r)) for r in [list(rows[0]), *(r.values() for r in rows)]) + '\n')
    return path


def rows(found): return {k: v.rows for k, v in found.items()}


def test_names_of_parts_are_those_of_datasets():
    files = pytest.importorskip('datasets.data_files')
    theirs = {str(k).replace('validation', 'valid'): set(v) for k, v in files.SPLIT_KEYWORDS.items()}
    assert {k: set(v) for k, v in PART_NAMES.items()} == theirs
    assert [part_named(x) for x in ('TRAIN', ' Val ', 'dev', 'Evaluation', 'section', '')] == [
        'train', 'valid', 'valid', 'test', '', '',
    ]
    assert [
        part_in(x) for x in ('a/val/0.tar', 'coco_val2017.tar', 'train/dev-0.tar', 'train-test.tar', 'latest.tar')
    ] == ['val', 'val', 'dev', '', '']


COLUMNS = [
    ('split', ['train', 'val', 'train', 'test']),
    ('split', ['TRAIN', 'VAL', 'TRAIN', 'TEST']),
    ('set', ['training', 'dev', 'Train', 'eval']),
]


@pytest.mark.parametrize('ending', ['.csv', '.jsonl', '.parquet'])
@pytest.mark.parametrize('key, values', COLUMNS)
def test_a_column_of_parts_is_the_split(tmp_path, key, values, ending):
    source = PairsFile(table(tmp_path, values, key, ending), split_key=key)
    assert rows(source.splits(0.5)) == {'train': [0, 2], 'valid': [1], 'test': [3]}
    data = PairData(path=str(source.path), split_key=key, split_file=str(tmp_path/'split.csv'))
    assert (data.train.rows, data.valid.rows, data.test.rows) == ([0, 2], [1], [3])
    assert rows(read_split(source, tmp_path/'split.csv')) == {'train': [0, 2], 'valid': [1], 'test': [3]}


@pytest.mark.parametrize('ending', ['.csv', '.jsonl', '.parquet'])
@pytest.mark.parametrize(
    'key, values, held_out',
    [
        ('is_train', [1, 0, 1], [1]),
        ('is_train', [True, False, True], [1]),
        ('isValid', [0, 0, 1], [2]),
        ('is_test', [False, False, True], [2]),
        ('held_out', [1, 0, 0], [0]),
    ],
)
def test_a_column_of_yes_and_no_says_its_part(tmp_path, key, values, held_out, ending):
    train, valid = PairsFile(table(tmp_path, values, key, ending), split_key=key).split(0.9)
    assert valid.rows == held_out and train.rows == [i for i in range(3) if i not in held_out]


def test_test_rows_are_held_out_where_there_are_no_others(tmp_path):
    source = PairsFile(table(tmp_path, ['train', 'test', 'train']), split_key='split')
    assert rows(source.splits(0.5)) == {'train': [0, 2], 'valid': [1]}


@pytest.mark.parametrize('values, message', [
    (['0', '1', '1'], 'split holds .0., .1., which does not say what is training: call it is_train'),
    (['0', '1', '2'], "split is '0', not a part such as train, val or test"),
    (['train', 'val', 'holdout2'], "split is 'holdout2', not a part"),
    (['train', 'val', ''], "split is '', not a part"),
    (['chapter 1', 'chapter 2', 'chapter 1'], 'to keep rows of one split together, give it as group_key')])
def test_a_column_that_is_not_understood_is_refused(tmp_path, values, message):
    path = table(tmp_path, values)
    with pytest.raises(ValueError, match=message) as e: PairData(path=str(path), split_key='split')
    assert str(path) in str(e.value) and '\n' not in str(e.value)


def test_a_user_says_what_values_mean(tmp_path):
    path = table(tmp_path, [0, 1, 2, 0])
    data = PairData(path=str(path), split_key='split', parts={0: 'train', 1: 'valid', 2: None})
    assert (data.train.rows, data.valid.rows, data.test) == ([0, 3], [1], None)
    for parts, message in [
        ({3: 'train'}, "has no '3'; it has '0', '1', '2'"),
        ({0: 'dev'}, "'0' may be 'train', 'valid', 'test' or None, got 'dev'"),
    ]:
        with pytest.raises(ValueError, match=message): PairsFile(path, split_key='split', parts=parts)
    with pytest.raises(ValueError, match='parts want split_key'): PairsFile(path, parts={0: 'train'})


@pytest.mark.parametrize(
    'key, values', [('split', ['train', 'val', 'train']), ('is_train', [1, 0, 1]), ('subset', ['DEV', 'TEST', 'DEV'])]
)
def test_parts_are_not_groups(tmp_path, key, values):
    with pytest.raises(ValueError, match=rf'pairs.csv: {key} holds parts \(.*\), not groups: give it as split_key'):
        PairsFile(table(tmp_path, values, key), group_key=key)


def test_parts_without_training_are_refused(tmp_path):
    source = PairsFile(table(tmp_path, ['val', 'test', 'val']), split_key='split')
    with pytest.raises(ValueError, match="divided into 'val', 'test', and none of them is training"): source.split()
    alone = PairsFile(table(tmp_path, ['test']*40), split_key='split')  # all there is: nothing is mixed
    assert len(alone.split(0.5)[0]) + len(alone.split(0.5)[1]) == 40


def test_a_part_of_a_source_keeps_its_split(tmp_path):
    source = PairsFile(table(tmp_path, ['train', 'val', 'train', 'dev']), split_key='split')
    assert [p.rows for p in Subset(source, [3, 2, 1, 0]).split()] == [[1, 3], [0, 2]]


@pytest.mark.parametrize(
    'names', [('train', 'val', 'test'), ('Training', 'dev', 'eval'), ('train', 'valid', 'testing')]
)
def test_folders_of_parts(tmp_path, names):
    make(tmp_path, [f'{part}/{c}/{i}.jpg' for part in names for c in ('cat', 'dog') for i in range(2)])
    source = ClassFolder(tmp_path)
    assert source.classes == ['cat', 'dog'] and {source.text(i) for i in range(12)} == {
        'a photo of a cat',
        'a photo of a dog',
    }
    found = source.splits()
    assert {k: {v.name(i).split('/')[0] for i in range(len(v))} for k, v in found.items()} == dict(
        zip(('train', 'valid', 'test'), ({n} for n in names))
    )
    assert len(PairData(source=source).test) == 4 == len(LabelData(source=source).test)


def test_a_folder_of_one_part(tmp_path):
    make(tmp_path, [f'train/{c}/{i}.jpg' for c in ('cat', 'dog') for i in range(20)])
    source = ClassFolder(tmp_path)
    assert source.classes == ['cat', 'dog'] and 0 < len(source.split(0.5)[1]) < 40


def test_folders_that_are_not_understood(tmp_path):
    make(tmp_path, ['train/cat/1.jpg', 'val/cat/1.jpg', 'extra/cat/1.jpg'])
    with pytest.raises(
        ValueError,
        match=r"beside train, val lies extra, neither training, validation nor test: .*parts=\{'extra': 'train'\}",
    ):
        ClassFolder(tmp_path)
    assert [len(p) for p in ClassFolder(tmp_path, parts={'extra': 'train'}).split()] == [2, 1]
    assert [len(p) for p in ClassFolder(tmp_path, parts={'extra': None}).split(0.5)] == [1, 1]
    assert ClassFolder(tmp_path, parts={}).classes == ['extra', 'train', 'val']
    make(tmp_path/'flat', ['train/1.jpg', 'val/2.jpg'])
    with pytest.raises(ValueError, match='train, val hold images, but no folders of classes'):
        ClassFolder(tmp_path / 'flat')


def test_two_folders_of_one_class_are_told(tmp_path):
    make(tmp_path, ['hot_dog/1.jpg', 'hot dog/2.jpg', 'cat/1.jpg'])
    with pytest.raises(ValueError, match="the folders 'hot dog' and 'hot_dog' are both the class 'hot dog'"):
        ClassFolder(tmp_path)
    assert ClassFolder(tmp_path, names={'hot_dog': 'sausage'}).classes == ['cat', 'hot dog', 'sausage']
    assert ClassFolder(tmp_path, names={'hot_dog': 'hot dog', 'hot dog': 'hot dog'}).labels == [
        'cat',
        'hot dog',
        'hot dog',
    ]


LEFT_BEHIND = [
    '@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg',
    'cat/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg',
    'cat/.DS_Store',
    'cat/Thumbs.db',
    '__MACOSX/cat/._1.jpg',
    '__MACOSX/cat/1.jpg',
    'desktop.ini',
    '#recycle/old.jpg',
    'lost+found/x.png',
    '.thumbnails/1.jpg',
    'System Volume Information/x.jpg',
]


def test_files_of_other_systems_are_no_classes(tmp_path):
    make(tmp_path, ['cat/1.jpg', 'dog/1.jpg', *LEFT_BEHIND])
    source = ClassFolder(tmp_path)
    assert source.classes == ['cat', 'dog'] and source.files == ['cat/1.jpg', 'dog/1.jpg'] and source.ignored == []
    assert Files(tmp_path).files == ['cat/1.jpg', 'dog/1.jpg']


def test_files_of_other_systems_in_shards(tmp_path):
    files = [('cat/1.jpg', b'x'), ('cat/1.txt', b'a cat')]
    for name in LEFT_BEHIND: files += [(name, b'y')] + [(name[:-4] + '.txt', b'z')]*name.endswith(('.jpg', '.png'))
    source = Shards(tarball(tmp_path/'a.tar', files))
    assert source.keys == ['cat/1'] and not source.left_out()


@pytest.mark.parametrize(
    'names', [('train-0.tar', 'val-0.tar', 'test-0.tar'), ('train/0.tar', 'dev/0.tar', 'eval/0.tar')]
)
def test_shards_of_parts(tmp_path, names):
    for name in names:
        (tmp_path/name).parent.mkdir(exist_ok=True)
        tarball(tmp_path/name, [(f'{i}.{e}', f'{name} {i}'.encode()) for i in range(3) for e in ('jpg', 'txt')])
    source = Shards([str(tmp_path/name) for name in names])
    found = source.splits()
    assert [{found[k].text(i).split()[0] for i in range(3)} for k in ('train', 'valid', 'test')] == [{n} for n in names]


def test_shards_that_are_not_understood(tmp_path):
    for name in ('train-0', 'cc12m-0', 'cc12m-1'):
        tarball(tmp_path / f'{name}.tar', [('1.jpg', b'x'), ('1.txt', b'y'), ('1.json', b'{"part": "dev"}')])
    urls = f'{tmp_path}/{{train-0,cc12m-0,cc12m-1}}.tar'
    with pytest.raises(ValueError, match="divided into 'train', 'cc12m', and 'cc12m' is neither"): Shards(urls).split()
    assert [len(p) for p in Shards(urls, parts={'cc12m': 'valid'}).split()] == [1, 2]
    assert Shards(urls, split_key='json:part').part(0) == 'dev'
    with pytest.raises(ValueError, match='json:part holds parts .*give it as split_key'):
        Shards(urls, group_key='json:part')


@pytest.fixture(scope='module')
def datasets():
    found = pytest.importorskip('datasets')
    found.disable_progress_bars()
    return found


def hub(datasets, **parts):
    "A data set with so many rows in each part; the captions name it."
    features = datasets.Features(
        image=datasets.Value('binary'), text=datasets.Value('string'), kind=datasets.ClassLabel(names=['disc', 'bar'])
    )
    return datasets.DatasetDict(
        {
            part: datasets.Dataset.from_list(
                [dict(image=b'x', text=f'{part} {i}', kind=i % 2) for i in range(n)], features=features
            )
            for part, n in parts.items()
        }
    )


@pytest.mark.parametrize('form', ['memory', 'saved', 'parquet', 'folders'])
@pytest.mark.parametrize('valid', ['validation', 'valid', 'val', 'dev'])
def test_parts_of_the_hub(datasets, tmp_path, form, valid):
    whole = hub(datasets, train=4, **{valid: 3}, test=2)
    if form == 'saved': whole.save_to_disk(tmp_path/'d')
    for part in whole:
        if form == 'parquet': whole[part].to_parquet(tmp_path/'d'/f'{part}-0.parquet')
        if form == 'folders': whole[part].to_parquet(tmp_path/'d'/part/'0000.parquet')
    found = HubData(whole if form == 'memory' else tmp_path/'d').splits(0.5)
    assert {k: [v.text(i) for i in range(len(v))] for k, v in found.items()} == {
        'train': [f'train {i}' for i in range(4)],
        'valid': [f'{valid} {i}' for i in range(3)],
        'test': ['test 0', 'test 1'],
    }


def test_parts_of_the_hub_that_are_not_understood(datasets, tmp_path):
    whole = hub(datasets, train=4, unsupervised=3)
    for part in whole: whole[part].to_parquet(tmp_path/'d'/f'{part}-00000-of-00001.parquet')
    for where in (whole, tmp_path/'d'):
        with pytest.raises(
            ValueError, match="divided into .*, and 'unsupervised' is neither training, validation nor test"
        ):
            HubData(where).split()
    assert [len(p) for p in HubData(whole, parts={'unsupervised': 'valid'}).split()] == [4, 3]
    assert len(HubData(tmp_path/'d')) == 7  # to embed them all there is nothing to be split
    for part in ('0', '1'): hub(datasets, train=5)['train'].to_parquet(tmp_path/'plain'/f'{part}.parquet')
    assert len(HubData(tmp_path/'plain').split(0.5)[0]) < 10


def test_a_column_of_the_hub(datasets):
    rows = [
        dict(image=b'x', text=str(i), split=s, part=n, album=i // 2)
        for i, (s, n) in enumerate([('train', 0), ('dev', 1), ('train', 0), ('test', 2)])
    ]
    features = datasets.Features(
        image=datasets.Value('binary'),
        text=datasets.Value('string'),
        split=datasets.Value('string'),
        part=datasets.ClassLabel(names=['train', 'val', 'test']),
        album=datasets.Value('int64'),
    )
    d = datasets.Dataset.from_list(rows, features=features)
    for key in ('split', 'part'):
        assert [v.rows for v in HubData(d, split_key=key).splits().values()] == [[0, 2], [1], [3]]
    with pytest.raises(
        ValueError, match="album holds '0', '1', which does not say .*if they are groups, give it as group_key"
    ):
        HubData(d, split_key='album')
    for key in ('split', 'part'):
        with pytest.raises(ValueError, match='not groups: give it as split_key'): HubData(d, group_key=key)


@pytest.mark.parametrize('form', [None, 'torch', 'numpy'])
def test_a_format_changes_nothing(datasets, form):
    d = hub(datasets, train=4)['train'].with_format(form)
    source = HubData(d, text_key=None, label_key='kind')
    assert [(source.label(i), source.text(i)) for i in range(2)] == [
        ('disc', 'a photo of a disc'),
        ('bar', 'a photo of a bar'),
    ]
    assert HubData(d).text(1) == 'train 1' and bytes(source.image(0).tolist()) == b'x'


def test_no_class_is_not_the_last_class(datasets):
    features = datasets.Features(image=datasets.Value('binary'), kind=datasets.ClassLabel(names=['disc', 'bar']))
    d = datasets.Dataset.from_list([dict(image=b'x', kind=k) for k in (0, -1, 1)], features=features)
    assert [HubData(d, text_key=None, label_key='kind').label(i) for i in range(3)] == ['disc', '', 'bar']


def test_a_test_part_without_labels_is_left_out(datasets):
    features = datasets.Features(image=datasets.Value('binary'), kind=datasets.ClassLabel(names=['disc', 'bar']))
    whole = datasets.DatasetDict(
        {
            part: datasets.Dataset.from_list(
                [dict(image=b'x', kind=-1 if part == 'test' else i % 2) for i in range(4)], features=features
            )
            for part in ('train', 'valid', 'test')
        }
    )
    data = LabelData(source=HubData(whole, text_key=None, label_key='kind'))
    assert (
        (len(data.train), len(data.valid)) == (4, 4)
        and not data.test
        and set(data.ledger) == {f'test {i}' for i in range(4)}
    )


def test_two_ways_to_say_what_is_held_out(tmp_path):
    path = table(tmp_path, ['train', 'val', 'train', 'test'])
    source = PairsFile(path, split_key='split')
    for option in (dict(split_key='split'), dict(group_key='split'), dict(parts={'0': 'train'})):
        with pytest.raises(ValueError, match=f'{next(iter(option))} goes with path, not with source'):
            PairData(source=source, **option)
    make(tmp_path/'f', [f'{part}/{c}/1.jpg' for part in ('train', 'val') for c in ('cat', 'dog')])
    make(tmp_path/'g', ['cat/1.jpg', 'dog/1.jpg'])
    with pytest.raises(
        ValueError, match=r'the data are divided themselves \(train, valid\), and valid_path says what is held out too'
    ):
        PairData(path=str(tmp_path/'f'), valid_path=str(tmp_path/'g'))
    assert len(PairData(path=str(tmp_path/'f'), test_path=str(tmp_path/'g')).train) == 2
