"""One reader a format: a training run, an embedding job and an index give the same answer, or raise the same error,
for the same file."""
import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmembed.data.open import open_pairs, open_source, survey_names
from mmembed.data.source import Source
from mmembed.data.tables import PairsFile, Table
from mmembed.retrieval.ingest import open_rows
from tests.data.test_webdataset import tarball

FORMATS = ['.csv', '.tsv', '.json', '.jsonl', '.parquet']
NESTED = ['.json', '.jsonl', '.parquet']


def write(folder, form, rows):
    "The rows as a table of this form, and an image file for each."
    path = folder/f'pairs{form}'
    for image in {r['image'] for r in rows}:
        (folder/image).write_bytes(b'\xff\xd8')
    if form == '.json': path.write_text(json.dumps(rows))
    elif form == '.jsonl': path.write_text(''.join(json.dumps(r) + '\n' for r in rows))
    elif form == '.parquet': pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open('w', newline='') as f:
            w = csv.DictWriter(f, rows[0], delimiter='\t' if form == '.tsv' else ',')
            w.writeheader()
            w.writerows(rows)
    return path


def answers(path, **keys):
    "What a training run, an embedding job and an index find: (name, text) of all rows, or the error."
    def read(source, text): return [(source.name(i), text(source, i)) for i in range(len(source))]
    def job(source, i):
        try: return source.text(i)
        except ValueError: return ''
    def index(): return open_rows(path, 'text', options=keys)[0]
    found = []
    for make, text in ((lambda: open_pairs(path, on_error='skip', **keys), lambda s, i: s.text(i)),
                       (lambda: open_source(path, 'both', **keys), job), (index, job)):
        try: rows = read(make(), text)
        except (ValueError, FileNotFoundError) as e: rows = str(e)
        found.append(rows)
    if isinstance(found[2], list): found[2] = [(n, t) for (n, _), (_, t) in zip(found[1], found[2])]  # no images there
    return found


def alike(path, **keys):
    training, job, index = answers(path, **keys)
    assert training == job == index
    return training


ROWS = [dict(image=f'{i}.jpg', text=t) for i, t in enumerate(['a cat', '', 'nan', '[photo] of a dog', ' ', 'a bird'])]


@pytest.mark.parametrize('form', FORMATS)
def test_empty_captions_and_nan(tmp_path, form):
    assert [t for _, t in alike(write(tmp_path, form, ROWS))] == ['a cat', '', '', '[photo] of a dog', '', 'a bird']


@pytest.mark.parametrize('form', NESTED)
def test_null_and_lists(tmp_path, form):
    rows = [dict(image='0.jpg', text=['a', 'b']), dict(image='1.jpg', text=None), dict(image='2.jpg', text=['c'])]
    assert alike(write(tmp_path, form, rows)) == [('0.jpg (1)', 'a'), ('0.jpg (2)', 'b'), ('1.jpg', ''), ('2.jpg', 'c')]


@pytest.mark.parametrize('key, found', [
    ('text.en', [('0.jpg', 'cat'), ('1.jpg', '')]),
    ('text.*', [('0.jpg (de)', 'Katze'), ('0.jpg (en)', 'cat'), ('1.jpg (de)', 'Hund')]),
    ('text.en,de', [('0.jpg (en)', 'cat'), ('0.jpg (de)', 'Katze'), ('1.jpg (de)', 'Hund')]),
])
@pytest.mark.parametrize('form', NESTED)
def test_nested_keys(tmp_path, form, key, found):
    rows = [dict(image='0.jpg', text=dict(en='cat', de='Katze')), dict(image='1.jpg', text=dict(en=None, de='Hund'))]
    path = write(tmp_path, form, rows)
    assert alike(path, text_key=key) == found
    assert "no column 'text.fr'; there are: image, text" in alike(path, text_key='text.fr')
    assert Table(path, 'text', text_key='text.de', keep=['text.en']).value(0, 'text.en') == 'cat'


def elsewhere(folder, form, rows):
    "The rows as a data set of Hugging Face, or as a tar shard with a JSON file for each row: its name, and its keys."
    if form == 'shards':
        files = [(f'{i}.{end}', data) for i, row in enumerate(rows) for end, data in (
            ('jpg', b'\xff\xd8'), ('json', json.dumps({k: v for k, v in row.items() if k != 'image'}).encode()))]
        return str(tarball(folder/'s.tar', files)), 'json:'
    datasets = pytest.importorskip('datasets')
    found = datasets.Dataset.from_list([row | dict(image=b'\xff\xd8') for row in rows])
    if form == 'hub': found.save_to_disk(folder/'saved')
    else: found.to_parquet(folder/'copy'/'train-00000-of-00001.parquet')
    return f'hf:{folder}/{"saved" if form == "hub" else "copy"}', ''


DEEP = [dict(image='0.jpg', text=dict(en='cat', de=['Katze', 'Kater']), about=dict(album='a', year=2019)),
        dict(image='1.jpg', text=dict(en=None, de=['Hund']), about=dict(album='b', year=2021)),
        dict(image='2.jpg', text=dict(en='bird', de=['Vogel']), about=dict(album='a', year=2020))]


@pytest.mark.parametrize('key', ['text.en', 'text.de', 'text.*', 'text.de,en'])
@pytest.mark.parametrize('form', ['hub', 'copy', 'shards'])
def test_nested_keys_beyond_tables(tmp_path, form, key):
    "A data set of the hub and a shard have the captions that a table of the same rows has, for train, embed and index."
    want = [(name.partition(' ')[2], text) for name, text in alike(write(tmp_path, '.jsonl', DEEP), text_key=key)
            if text]
    where, begin = elsewhere(tmp_path, form, DEEP)
    found = alike(where, text_key=begin + key)
    assert [(name[name.index('('):] if '(' in name else '', text) for name, text in found if text] == want
    for missing in ('text.fr', 'texts.en', 'text.fr,it'):
        assert f'no column {begin + missing!r}; there are: ' in alike(where, text_key=begin + missing)


@pytest.mark.parametrize('form', ['hub', 'copy', 'shards'])
def test_other_columns_may_be_nested_too(tmp_path, form):
    where, begin = elsewhere(tmp_path, form, DEEP)
    pairs = open_pairs(where, text_key=f'{begin}text.*', label_key=f'{begin}about.album',
                       group_key=f'{begin}about.album', split_key=None)
    assert [pairs.kind(i) for i in range(len(pairs))] == ['de', 'de', 'en', 'de', 'de', 'en']
    assert [pairs.group(i) for i in range(6)] == [pairs.label(i) for i in range(6)] == list('aaabaa')
    assert len({pairs.picture(i) for i in range(3)}) == 1
    rows = open_source(where, 'both', text_key=f'{begin}text.en', id_key=f'{begin}about.year', keep=['about.year'])
    assert rows.types()['about.year'] == pa.int64()
    assert [rows.value(i, 'about.year') for i in range(len(rows))] == [int(rows.name(i)) for i in range(len(rows))]
    assert rows.excerpt(range(len(rows) - 1, len(rows))).text(0) == 'bird'
    for options in (dict(id_key=f'{begin}about.name'), dict(keep=['about.name'])):
        with pytest.raises(ValueError, match="no column '.*about.name'; there are: "):
            open_source(where, 'image', **options)


@pytest.mark.parametrize('form', NESTED)
def test_only_captions_may_be_several_fields(tmp_path, form):
    "A path, or a column that is kept, is one field; a column with a dot in its name is still found."
    path = write(tmp_path, form, [dict(image='0.jpg', text=dict(en='cat', de='Katze'), **{'text.en': 'own'})])
    for make in (lambda: Table(path, 'text', text_key='text.de', keep=['text.*']),
                 lambda: PairsFile(path, text_key='text.de', group_key='text.en,de')):
        with pytest.raises(ValueError, match="'text.*' names several fields; want one"): make()
    assert Table(path, 'text', text_key='text.en').text(0) == 'own'
    assert Table(path, 'text', text_key='text.de').text(0) == 'Katze'


@pytest.mark.parametrize('form', ['.csv', '.tsv', '.json', '.jsonl'])
def test_an_unused_column_of_mixed_types(tmp_path, form):
    "Numbers for longer than the reader looks ahead, then a word."
    rows = [dict(image='0.jpg', text=f'text {i}', note=i if i < 60_000 else 'unknown') for i in range(60_010)]
    path = write(tmp_path, form, rows)
    pairs, table = PairsFile(path), Table(path, 'both', keep=['note'])
    assert len(pairs) == len(table) == 60_010 and pairs.text(60_009) == table.text(60_009) == 'text 60009'
    assert (table.value(0, 'note'), table.value(60_009, 'note')) == ('0', 'unknown')
    assert len(Table(path, 'both')) == 60_010


@pytest.mark.parametrize('header', ['image,text,text', 'image,text,image'])
def test_a_name_that_a_header_has_twice(tmp_path, header):
    (tmp_path/'0.jpg').write_bytes(b'x')
    (tmp_path/'a.csv').write_text(f'{header}\n0.jpg,a cat,0.jpg\n')
    twice = header.rpartition(',')[2]
    message = f"a.csv: the header has the column {twice!r} 2 times"
    for make in (PairsFile, lambda p: Table(p, 'both')):
        with pytest.raises(ValueError, match=message): make(tmp_path/'a.csv')
    (tmp_path/'b.csv').write_text('image,text,x,x\n0.jpg,a cat,1,2\n')
    assert alike(tmp_path/'b.csv') == [('0.jpg', 'a cat')]


@pytest.mark.parametrize('name, content', [
    ('a.csv', '\ufeffimage,text\n0.jpg,a cat\n'), ('a.tsv', '\ufeffimage\ttext\n0.jpg\ta cat\n'),
    ('a.jsonl', '\ufeff{"image": "0.jpg", "text": "a cat"}\n'),
    ('a.json', '\ufeff[{"image": "0.jpg", "text": "a cat"}]'),
])
def test_a_byte_order_mark(tmp_path, name, content):
    (tmp_path/'0.jpg').write_bytes(b'x')
    (tmp_path/name).write_text(content, encoding='utf-8')
    assert alike(tmp_path/name) == [('0.jpg', 'a cat')]


@pytest.mark.parametrize('name, content, message', [
    ('a.csv', b'image,text\n0.jpg,x\n0.jpg\n', 'a.csv, line 3: 1 columns where the header has 2'),
    ('a.csv', b'image,text\n0.jpg,"two\nlines"\n0.jpg,x,y\n', 'a.csv, line 4: 3 columns where the header has 2'),
    ('a.tsv', b'image\ttext\n0.jpg\n', 'a.tsv, line 2: 1 columns where the header has 2'),
    ('a.csv', b'image,text\n0.jpg,"x\n1.jpg,y\n', 'a.csv, line 3: unexpected end of data'),
    ('a.csv', b'image,text\n0.jpg,\xff\n', 'a.csv is not UTF-8'),
    ('a.csv', b'', 'a.csv holds no rows'), ('a.csv', b'image,text\n', 'a.csv holds no rows'),
    ('a.csv', b'image,alt\n0.jpg,x\n', "a.csv: no column 'text'; there are: image, alt"),
    ('a.jsonl', b'{"image": "0.jpg", "text": "x"}\n\n{"image"\n', 'a.jsonl, line 3: not JSON'),
    ('a.jsonl', b'{"image": "0.jpg", "text": 3}\n', 'a.jsonl, line 1: text is int, not text: 3'),
    ('a.jsonl', b'{"image": "0.jpg", "text": "\xff"}\n', 'a.jsonl, line 1: text is not UTF-8'),
    ('a.jsonl', b'{"image": "0.jpg"}\n', "a.jsonl: no column 'text'; there are: image"),
    ('a.jsonl', b'[1]\n', 'a.jsonl, line 1: want an object'), ('a.jsonl', b'\n', 'a.jsonl holds no rows'),
    ('a.json', b'[{"image": "0.jpg"}, 3]', 'a.json, row 2: want an object'),
    ('a.json', b'[{"image": "0.jpg"', 'a.json, line 1: not JSON'),
    ('a.parquet', b'PAR1', 'a.parquet is not a readable Parquet file'),
    ('a.xlsx', b'', "want a .jsonl, .json, .csv, .tsv or .parquet file, got '.xlsx'"),
])
def test_the_same_error(tmp_path, name, content, message):
    (tmp_path/'0.jpg').write_bytes(b'x')
    (tmp_path/name).write_bytes(content)
    said = []
    for make in (lambda: PairsFile(tmp_path/name), lambda: Table(tmp_path/name, 'both')):
        with pytest.raises(ValueError) as e:
            source = make()
            for i in range(len(source)): source.text(i)
        said.append(str(e.value))
    assert said[0] == said[1] and message in said[0] and '\n' not in said[0]


def test_a_number_among_texts_costs_its_row(tmp_path):
    path = write(tmp_path, '.jsonl', [dict(image='0.jpg', text='a'), dict(image='1.jpg', text=3)])
    assert alike(path) == [('0.jpg', 'a'), ('1.jpg', '')]
    assert PairsFile(path, on_error='skip').missing('text') == {1: 'text is int, not text: 3'}
    with pytest.raises(ValueError, match='line 2: text is int, not text: 3'): PairsFile(path)
    with pytest.raises(ValueError, match='text is int, not text: 3'): Table(path, 'text').text(1)


@pytest.mark.parametrize('form', FORMATS)
def test_texts_that_look_like_numbers_and_dates(tmp_path, form):
    rows = [dict(image='0.jpg', text='007', id='01'), dict(image='1.jpg', text='2020-01-02', id='02')]
    path = write(tmp_path, form, rows)
    assert [t for _, t in alike(path)] == ['007', '2020-01-02']
    table = Table(path, 'image', id_key='id', keep=['text'])
    assert (table.name(0), table.value(1, 'text')) == ('01', '2020-01-02')


def test_data_path_is_for_jobs_too(tmp_path, monkeypatch):
    (tmp_path/'kept').mkdir()
    write(tmp_path/'kept', '.csv', ROWS[:1])
    (tmp_path/'settings.ini').write_text('[mmembed]\ndata_path = kept\n')
    (tmp_path/'work').mkdir()
    monkeypatch.chdir(tmp_path/'work')
    assert open_source('pairs.csv', 'both').text(0) == PairsFile('pairs.csv').text(0) == 'a cat'


class Own(Source):
    def __len__(self): return 4
    def text(self, i): return f'text {i}'
    def image(self, i): raise ValueError('there is no image')


def test_every_source_has_the_methods_of_a_job():
    own = Own()
    assert (own.types(), own.digest(), own.version(), own.changed(range(4))) == ({}, b'', b'', '')
    assert [own.excerpt(range(1, 3)).value(i, 'text') for i in range(2)] == ['text 1', 'text 2']
    with pytest.raises(KeyError, match='no column year'): own.value(0, 'year')
    part = own.split(.5)[0]
    assert survey_names(part, 'text').rows == len(part) and part.digest() == b''


def test_a_subset_keeps_what_its_source_knows(tmp_path):
    path = write(tmp_path, '.csv', [dict(image=f'{i}.jpg', text=f'text {i}', year=2000 + i) for i in range(4)])
    table = Table(path, 'both', keep=['year'])
    some = table.excerpt(range(4)).split(.5)[0]
    assert some.types() == table.types() and some.value(0, 'year') == 2000 + some.rows[0]
    assert some.digest() and some.digest() != table.digest()

    class Worn(Table):
        def changed(self, rows): return 'a.tar' if 2 in rows else ''

    whole = Worn(path, 'both')
    found = [type(some)(whole, rows).changed(range(2)) for rows in ([0, 2], [0, 1], range(2, 4))]
    assert found == ['a.tar', '', 'a.tar']
