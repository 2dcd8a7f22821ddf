"""Captions and images that are missing, and lists of captions: alike in every format, left out, counted and listed
by `on_error: skip`."""
import csv
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmembed.data.folders import ClassFolder
from mmembed.data.hub import HubData
from mmembed.train.pair_data import LabelData, MatchData
from mmembed.train.batches import Ledger
from mmembed.train.datamodule import PairData
from mmembed.data.webdataset import Shards
from mmembed.data.tables import PairsFile
from mmembed.data.captions import captions_of
from mmembed.data.hub import HubRows
from mmembed.data.webdataset import ShardRows
from mmembed.data.tables import Table
from mmembed.text.pipeline import TextPipeline
from mmembed.vision.pipeline import VisionPipeline
from tests.data.test_webdataset import tarball


def png(n):
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), n, np.uint8)).save(out, 'PNG')
    return out.getvalue()


FORMATS = ['.csv', '.tsv', '.jsonl', '.parquet', 'hub', 'shards']
CELLS = ['a cat', None, '', ['two', 'captions'], ' ', [], ['one'], [None, 'left']]  # of rows 0 to 7
TEXTS = {0: ['a cat'], 3: ['two', 'captions'], 6: ['one'], 7: ['left']}


def opened(folder, form, cells=CELLS, images=None):
    "The cells as captions of a table, data set or shard, as pandas and its like write them."
    images = images or [f'{i}.png' for i in range(len(cells))]
    for i in range(len(cells)): (folder/f'{i}.png').write_bytes(png(i))
    rows = [dict(image=image, text=cell) for image, cell in zip(images, cells)]
    path = folder/f'pairs{form}'
    if form in ('.csv', '.tsv'):
        with path.open('w', newline='') as f:
            csv.writer(f, delimiter=',' if form == '.csv' else '\t').writerows(
                [['image', 'text'], *([r['image'], '' if r['text'] is None else str(r['text'])] for r in rows)]
            )
    elif form == '.jsonl':
        path.write_text(
            ''.join(json.dumps(r).replace('null', 'NaN' if i % 2 else 'null') + '\n' for i, r in enumerate(rows))
        )
    elif form == '.parquet':
        lists = [r['text'] if r['text'] is None or isinstance(r['text'], list) else [r['text']] for r in rows]
        pq.write_table(pa.table({'image': images, 'text': pa.array(lists, pa.list_(pa.string()))}), path)
    if form == 'hub':
        datasets = pytest.importorskip('datasets')
        lists = [c if c is None or isinstance(c, list) else [c] for c in cells]
        features = datasets.Features(image=datasets.Value('binary'), text=datasets.List(datasets.Value('string')))
        return HubData(
            datasets.Dataset.from_list([dict(image=png(i), text=c) for i, c in enumerate(lists)], features=features)
        )
    if form == 'shards':
        pytest.importorskip('braceexpand')
        return Shards(
            tarball(
                folder / 's.tar',
                [
                    (f'{i}.{e}', b)
                    for i, c in enumerate(cells)
                    for e, b in (
                        ('png', png(i)),
                        ('json', json.dumps({'text': float('nan') if c is None else c}).encode()),
                    )
                ],
            ),
            text_key='json:text',
        )
    return PairsFile(path, on_error='skip')


@pytest.fixture(scope='module')
def pipelines():
    return dict(
        text_pipeline=TextPipeline.learn(['a cat', 'two captions', 'one left'], vocab_size=60, max_length=8),
        vision_pipeline=VisionPipeline(size=8),
    )


@pytest.mark.parametrize('form', FORMATS)
def test_every_format_has_the_same_captions(tmp_path, form, pipelines):
    source = opened(tmp_path, form)
    data = PairData(source=source, valid_share=1, **pipelines)
    found = {}
    for i in range(len(data.valid)):
        found.setdefault(data.vision_pipeline.decode(data.valid.image(i))[0, 0, 0].item(), []).append(
            data.valid.text(i)
        )
    assert found == TEXTS
    assert len(data.ledger) == 4 and all(reason.startswith('there is no caption') for reason in data.ledger.values())
    assert str(data.ledger).startswith('4 rows have no caption and were left out:\n')
    both = [i for i in range(len(source)) if source.text(i) in TEXTS[3]]
    assert [source.name(i) for i in both] == [f'{source.picture(both[0])} ({n})' for n in (1, 2)]
    # never on two sides
    assert source.picture(both[0]) == source.picture(both[1]) and source.group(both[0]) == source.group(both[1])
    with pytest.raises(ValueError, match=r'there is no caption.* \(and 3 more of \d+ rows\)'):
        PairData(source=source, valid_share=1, on_error='raise', **pipelines)


@pytest.mark.parametrize('form', FORMATS)
def test_a_number_is_no_caption_in_any_format(tmp_path, form):
    if form in ('.csv', '.tsv'): return  # where everything is text
    if form == '.parquet':
        pq.write_table(pa.table({'image': ['0.png'], 'text': [3]}), tmp_path/'n.parquet')
        def make(): return PairsFile(tmp_path/'n.parquet')
    elif form == 'hub':
        datasets = pytest.importorskip('datasets')
        def make(): return HubData(datasets.Dataset.from_list([dict(image=b'x', text=3)]))
    else:
        def make(): return opened(tmp_path, form, [3])
    with pytest.raises(ValueError, match='text is int, not text: 3'): make()


WRITTEN = [
    (str(['a cat', "it's", 'two\n"lines"']), ['a cat', "it's", 'two\n"lines"']),
    (json.dumps(['a cat', 'é🐈']), ['a cat', 'é🐈']),
    (json.dumps(['a cat', 'é🐈'], ensure_ascii=False), ['a cat', 'é🐈']),
    (str(np.array(['a cat', 'two', "it's"])), ['a cat', 'two', "it's"]),
    (str(np.array(['a cat ' * 20, 'two ' * 30], dtype=object)), ['a cat ' * 20, 'two ' * 30]),
    (str(('a', 'b')), ['a', 'b']),
    (str(['a', None, float('nan')]), ['a']),
    ('["a", null]', ['a']),
    ('[]', []),
    (' nan ', []),
    ('NaN', []),
]


@pytest.mark.parametrize('written, captions', WRITTEN)
def test_lists_that_were_written_as_text(written, captions): assert captions_of(written) == captions


@pytest.mark.parametrize(
    'text',
    [
        '[photo] of a cat', '[Figure 3]', "['a' cat]", '(a cat)', "('a cat')", "['open", '[1, 2]', "[b'x']",
        "it's ['a', 'b']", '[', '()', 'nan bread', '{"a": "b"}',
    ],
)
def test_texts_that_only_look_like_lists(text): assert captions_of(text) == [text]


def test_an_array_and_what_is_not_understood():
    assert (
        captions_of(np.array(['a', 'b'])) == captions_of(('a', 'b')) == ['a', 'b'] and captions_of(float('nan')) == []
    )
    for value in (3, {'a': 'b'}, 3.5, True, [['a']], [3]):
        with pytest.raises(ValueError, match='not text'): captions_of(value)


def table(folder, rows=200):
    "Rows of which every tenth has no image file, every fifteenth no caption and every fiftieth neither name nor file."
    for i in range(rows):
        if i % 10 != 3: (folder/f'{i}.png').write_bytes(png(i))
    (folder/'7.png').write_bytes(b'broken')
    with (folder/'pairs.csv').open('w', newline='') as f:
        csv.writer(f).writerows(
            [
                ['image', 'text', 'kind'],
                *(
                    ['' if i % 50 == 9 else f'{i}.png', '' if i % 15 == 1 else f'caption {i}', 'ab'[i % 2]]
                    for i in range(rows)
                ),
            ]
        )
    gone = {f'{i}.png' for i in range(rows) if i % 10 == 3}
    bare = {f'{i}.png' for i in range(rows) if i % 15 == 1} - gone
    return str(folder/'pairs.csv'), gone | {f'line {i + 2}' for i in range(9, rows, 50)}, bare


def test_skip_leaves_out_counts_and_lists(tmp_path, pipelines):
    path, gone, bare = table(tmp_path)
    data = PairData(path=path, batch_size=8, **pipelines)
    assert set(data.ledger) == gone | bare and len(data.train) + len(data.valid) == 200 - len(gone | bare)
    # batches are full: what is known is not drawn
    assert [len(b.index) for b in data.train_dataloader()].count(8) >= len(data.train)//8 - 1
    data.ledger.keep(tmp_path/'failures.jsonl')
    list(data.train_dataloader()), list(data.val_dataloader()), list(data.train_dataloader())
    listed = [json.loads(line) for line in (tmp_path/'failures.jsonl').open()]
    assert (
        len(listed) == len(gone | bare) + 1
        and {x['name']: x['reason'] for x in listed} == dict(data.ledger)
        and listed[-1]['name'] == '7.png'
    )
    assert f'{len(gone) + 1} images could not be read and were skipped' in str(data.ledger)
    assert f'{len(bare)} rows have no caption and were left out' in str(data.ledger)
    assert (
        '<td style="text-align:left">35 rows' in data._repr_html_() or f'{len(data.ledger)} rows' in data._repr_html_()
    )


def test_raise_and_blank(tmp_path, pipelines):
    path, gone, bare = table(tmp_path)
    with pytest.raises(FileNotFoundError, match=r'pairs.csv, line 5: no image file .*3.png \(and 23 more of 200\)'):
        PairData(path=path, on_error='raise', **pipelines)
    for i in range(200):
        if not (tmp_path/f'{i}.png').exists(): (tmp_path/f'{i}.png').write_bytes(png(i))
    (tmp_path/'pairs.csv').write_text((tmp_path/'pairs.csv').read_text().replace('\n,', '\n0.png,'))
    with pytest.raises(
        ValueError,
        match=r'^1.png: there is no caption \(and \d+ more of \d+ rows\); on_error: skip leaves such rows out',
    ):
        PairData(path=path, on_error='raise', **pipelines)
    path, gone, bare = table(tmp_path)
    for name in gone: (tmp_path/name).unlink(missing_ok=True)
    data = PairData(path=path, on_error='blank', batch_size=4, valid_share=0.5, **pipelines)
    bare = {n for n, reason in data.ledger.items() if 'caption' in reason}
    assert set(data.ledger) == bare and len(data.train) + len(data.valid) == 200 - len(bare)
    list(data.train_dataloader()), list(data.val_dataloader())
    assert gone - bare <= set(data.ledger) and 'replaced by the mean colour' in str(data.ledger)


def test_nothing_usable_is_an_error(tmp_path, pipelines):
    (tmp_path/'a.csv').write_text('image,text\n' + ''.join(f'{i}.png,a cat\n' for i in range(20)))
    with pytest.raises(FileNotFoundError, match=r'a.csv, line 2: no image file .*0.png \(and 19 more of 20\)'):
        PairData(path=str(tmp_path / 'a.csv'), **pipelines)
    for i in range(20): (tmp_path/f'{i}.png').write_bytes(png(i))
    (tmp_path/'b.csv').write_text('image,text\n' + ''.join(f'{i}.png,\n' for i in range(20)))
    with pytest.raises(ValueError, match='no rows for training.*; 20 are left out, .*png: there is no caption'):
        PairData(path=str(tmp_path / 'b.csv'), **pipelines)


def test_rows_of_jsonl_without_the_key(tmp_path):
    for i in range(3): (tmp_path/f'{i}.png').write_bytes(png(i))
    rows = [
        {'image': '0.png', 'text': 'a cat', 'name': {'en': 'x'}},
        {'image': '1.png'},
        {'text': 'b', 'name': {'en': None, 'de': 'y'}},
    ]
    (tmp_path/'a.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    source = PairsFile(tmp_path/'a.jsonl', on_error='skip')
    assert (
        source.missing('text') == {1: 'there is no caption'}
        and source.missing('image') == {2: 'there is no image'}
        and source.name(2) == 'line 3'
    )
    assert PairsFile(tmp_path / 'a.jsonl', text_key='name.en', on_error='skip').missing('text') == {
        1: 'there is no caption',
        2: 'there is no caption',
    }
    for more in (dict(text_key='alt'), dict(image_key='file'), dict(text_key='name.fr')):
        with pytest.raises(ValueError, match='no column'): PairsFile(tmp_path/'a.jsonl', on_error='skip', **more)


@pytest.mark.parametrize('form', ['.csv', '.jsonl', '.parquet'])
def test_a_missing_label_makes_no_caption(tmp_path, form, pipelines):
    for i in range(30): (tmp_path/f'{i}.png').write_bytes(png(i))
    labels = ['', None, 'hat', 'shoe', 'hat']*6 if form != '.csv' else ['', '', 'hat', 'shoe', 'hat']*6
    path = tmp_path/f'a{form}'
    if form == '.csv': path.write_text('image,kind\n' + ''.join(f'{i}.png,{k}\n' for i, k in enumerate(labels)))
    if form == '.jsonl':
        path.write_text(''.join(json.dumps(dict(image=f'{i}.png', kind=k)) + '\n' for i, k in enumerate(labels)))
    if form == '.parquet': pq.write_table(pa.table({'image': [f'{i}.png' for i in range(30)], 'kind': labels}), path)
    data = PairData(path=str(path), text_key=None, label_key='kind', valid_share=0.4, **pipelines)
    assert (
        len(data.ledger) == 12
        and set(data.ledger.values()) == {'there is no label'}
        and set(data.captions()) == {'a photo of a hat', 'a photo of a shoe'}
    )
    labelled = LabelData(path=str(path), text_key=None, label_key='kind', valid_share=0.4, **pipelines)
    assert labelled.classes == ['hat', 'shoe'] and labelled.ledger == data.ledger and len(labelled.part('all')) == 18
    assert (
        LabelData(
            path=str(path), text_key=None, label_key='kind', valid_share=0.4, question='what?', **pipelines
        ).ledger
        == data.ledger
    )
    with pytest.raises(ValueError, match=r'png: there is no label \(and \d+ more of'):
        LabelData(path=str(path), text_key=None, label_key='kind', valid_share=0.4, on_error='raise', **pipelines)


def test_a_question_needs_no_captions(tmp_path, pipelines):
    path, gone, bare = table(tmp_path)
    data = LabelData(path=path, label_key='kind', question='which?', **pipelines)
    assert set(data.ledger) == gone
    assert set(LabelData(path=path, label_key='kind', **pipelines).ledger) == gone | bare
    matches = MatchData(path=path, **pipelines)
    assert set(matches.ledger) == gone | bare and all(matches.train.pair(0, i)[0] for i in range(len(matches.train)))


class Bare(ClassFolder):
    def text(self, i): return '' if i % 4 == 1 else super().text(i)


def test_a_source_that_does_not_know_is_skipped_row_by_row(tmp_path, pipelines):
    for i in range(20):
        (tmp_path/'ab'[i % 2]).mkdir(exist_ok=True)
        (tmp_path/'ab'[i % 2]/f'{i:02}.png').write_bytes(png(i))
    data = PairData(source=Bare(tmp_path), batch_size=4, valid_share=0.3, **pipelines)
    seen = sum(len(b.index) for loader in (data.train_dataloader(), data.val_dataloader()) for b in loader)
    assert set(data.ledger.values()) == {'there is no caption'} and seen + len(data.ledger) >= 20 - 3


def test_several_processes_write_one_list(tmp_path):
    ranks = [Ledger(a='known'), Ledger(a='known')]
    for rank, ledger in enumerate(ranks): ledger.keep(tmp_path/'failures.jsonl', rank == 0)
    ranks[0]['b'], ranks[1]['c'], ranks[1]['b'], ranks[0]['c'] = 'x', 'y', 'x', 'y'
    assert [json.loads(line) for line in (tmp_path / 'failures.jsonl').open()] == [
        {'name': n, 'reason': r} for n, r in [('a', 'known'), ('b', 'x'), ('c', 'y')]
    ]
    Ledger().keep(tmp_path/'none.jsonl')
    assert not (tmp_path/'none.jsonl').exists()


def test_rows_that_are_embedded_are_expanded_too(tmp_path):
    source = opened(tmp_path, 'shards')
    rows = ShardRows(str(tmp_path/'s.tar'), 'text', text_key='json:text')
    assert [(rows.name(i), rows.text(i)) for i in range(len(rows))] == [
        (source.name(i), source.text(i)) for i in range(len(source))
    ]
    assert len(ShardRows(str(tmp_path/'s.tar'), 'image', text_key='json:text')) == len(CELLS)
    assert rows.excerpt(range(1, 3)).name(1) == rows.name(2)
    assert ShardRows(str(tmp_path/'s.tar'), 'text', text_key='json:text', id_key='json:text').name(2)[-3:] == '(2)'
    datasets = pytest.importorskip('datasets')
    d = datasets.Dataset.from_list([dict(image=png(0), text=['a', 'b']), dict(image=png(1), text=['c'])])
    assert (
        [HubRows(d, 'text').text(i) for i in range(3)]
        == ['a', 'b', 'c']
        == [HubRows(d, 'both').text(i) for i in range(3)]
    )
    assert len(HubRows(d, 'image')) == 2


@pytest.mark.parametrize('form', ['.csv', '.tsv', '.jsonl', '.parquet'])
def test_tables_that_are_embedded_read_cells_alike(tmp_path, form):
    source = opened(tmp_path, form if form != '.jsonl' else '.csv')
    path = tmp_path/f'pairs{form}'
    if form == '.jsonl':
        path.write_text(
            ''.join(
                json.dumps(dict(image=f'{i}.png', text=[c] if isinstance(c, str) else c)) + '\n'
                for i, c in enumerate(CELLS)
            )
        )
    found = Table(path, 'both', keep=['text'])
    assert [found.name(i) for i in range(len(found))] == [source.name(i) for i in range(len(source))]
    for i in range(len(found)):
        assert found.value(i, 'text') == (source.text(i) or None)
        if source.text(i): assert found.text(i) == source.text(i)
        else:
            with pytest.raises(ValueError, match='text is empty'): found.text(i)
    assert [found.excerpt(range(3, 5)).name(i) for i in range(2)] == ['3.png (1)', '3.png (2)']
    assert len(Table(path, 'image')) == len(CELLS)


def test_plain_texts_of_a_table_stay(tmp_path):
    (tmp_path / 'a.jsonl').write_text(
        ''.join(json.dumps(dict(text=t)) + '\n' for t in ['2020-01-01', '[photo]', 'nan', '7'])
    )
    found = Table(tmp_path/'a.jsonl', 'text')
    assert [found.columns['text'][i].as_py() for i in range(4)] == [
        '2020-01-01', '[photo]', None, '7',
    ] and found.numbers is None
    (tmp_path/'b.csv').write_text('text,n\n7,1\n8,2\n')
    assert Table(tmp_path/'b.csv', 'text').text(0) == '7'
