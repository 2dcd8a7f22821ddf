"Sources: every form of a table says the same, rows stay on their side of a split, mistakes are named."
import csv
import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmembed.core.files import read_bytes
from mmembed.data.tables import PairsFile
from mmembed.data.source import Subset, Source
from tests.helpers import data_path

ROWS = [dict(image=f'{i}.jpg', alt=t, section=f's{i // 3}') for i, t in enumerate(
    ['a cat, on a mat', '一只猫', 'two\nlines', 'quote " inside', '', ' tab\tinside', 'é', '🐈', 'last'])]


def write(folder, ending, rows=ROWS):
    for r in rows: (folder/r['image']).write_bytes(b'\xff\xd8' + r['image'].encode())
    path = folder/f'pairs{ending}'
    if ending == '.parquet': pq.write_table(pa.Table.from_pylist(rows), path)
    elif ending == '.jsonl': path.write_text(''.join(json.dumps(r) + '\n' for r in rows), encoding='utf-8')
    else:
        with path.open('w', newline='', encoding='utf-8') as f:
            w = csv.DictWriter(f, rows[0], delimiter='\t' if ending == '.tsv' else ',')
            w.writeheader()
            w.writerows(rows)
    return path


@pytest.mark.parametrize('ending', ['.jsonl', '.csv', '.tsv', '.parquet'])
def test_every_form_reads_alike(tmp_path, ending):
    source = PairsFile(write(tmp_path, ending), text_key='alt', group_key='section')
    assert len(source) == len(ROWS)
    for i, r in enumerate(ROWS):
        text, image = source[i]
        assert text == source.text(i) == r['alt']
        assert bytes(image.tolist()) == (tmp_path/r['image']).read_bytes()
        assert (source.name(i), source.group(i), source.kind(i)) == (r['image'], r['section'], '')


def test_byte_order_mark_and_unnamed_index_column(tmp_path):
    write(tmp_path, '.csv')
    (tmp_path/'bom.csv').write_text('\ufeff,image,text\n0,0.jpg,a cat\n', encoding='utf-8')
    assert PairsFile(tmp_path/'bom.csv')[0][0] == 'a cat'


def test_image_root_and_data_path(tmp_path, monkeypatch):
    (tmp_path/'pictures').mkdir()
    write(tmp_path/'pictures', '.csv')
    (tmp_path/'x.csv').write_text('image,text\n0.jpg,a cat\n')
    (tmp_path/'settings.ini').write_text('[mmembed]\ndata_path = .\n')
    (tmp_path/'work').mkdir()
    monkeypatch.chdir(tmp_path/'work')
    assert PairsFile('x.csv', image_root=tmp_path/'pictures').image(0).numel() > 0


def test_split_keeps_groups_together_and_rows_in_place(tmp_path):
    rows = [dict(image='0.jpg', alt=str(i), section=f's{i // 5}') for i in range(500)]
    source = PairsFile(write(tmp_path, '.jsonl', rows), text_key='alt', group_key='section')
    train, valid = source.split(0.2)
    assert sorted([*train.rows, *valid.rows]) == list(range(500))
    sides = [{part.group(i) for i in range(len(part))} for part in (train, valid)]
    assert not sides[0] & sides[1] and 10 <= len(sides[1]) <= 30
    shorter = PairsFile(write(tmp_path, '.jsonl', rows[:300]), text_key='alt', group_key='section')
    assert shorter.split(0.2)[1].rows == [i for i in valid.rows if i < 300]
    assert [valid.text(i) for i in range(3)] == [source.text(i) for i in valid.rows[:3]]


def test_sources_pickle(tmp_path):
    source = PairsFile(write(tmp_path, '.jsonl'), text_key='alt').split(0.3)[0]
    again = pickle.loads(pickle.dumps(source))
    assert isinstance(again, Subset) and [again.text(i) for i in range(len(again))] == [
        source.text(i) for i in range(len(source))
    ]


@pytest.mark.parametrize('ending', ['.jsonl', '.parquet'])
def test_several_captions_for_an_image(tmp_path, ending):
    rows = [
        dict(image=f'{i}.jpg', name={'en': f'apple {i}', 'de': f'Apfel {i}', 'fr': None if i == 1 else f'pomme {i}'})
        for i in range(3)
    ]
    path = write(tmp_path, ending, rows)
    every = PairsFile(path, text_key='name.*')
    assert [(every.text(i), every.kind(i), every.name(i), every.group(i)) for i in range(2)] == [
        ('Apfel 0', 'de', '0.jpg (de)', '0.jpg'), ('apple 0', 'en', '0.jpg (en)', '0.jpg')]
    assert len(every) == 8 and [every.kind(i) for i in range(len(every))] == [
        'de', 'en', 'fr', 'de', 'en', 'de', 'en', 'fr',
    ]
    some = PairsFile(path, text_key='name.fr,de')
    assert [some.text(i) for i in range(5)] == ['pomme 0', 'Apfel 0', 'Apfel 1', 'pomme 2', 'Apfel 2']
    one = PairsFile(path, text_key='name.en')
    assert (
        [one.text(i) for i in range(3)] == ['apple 0', 'apple 1', 'apple 2']
        and one.kind(0) == ''
        and one.name(0) == '0.jpg'
    )
    assert PairsFile(path, text_key='name.fr').missing('text') == {1: 'there is no caption'}
    with pytest.raises(ValueError, match="no column 'name.it'; there are: image, name"):
        PairsFile(path, text_key='name.it')
    with pytest.raises(ValueError, match="name is dict, not text"): PairsFile(path, text_key='name')
    assert [every.picture(i) for i in range(4)] == ['0.jpg']*3 + ['1.jpg']
    train, valid = every.split(0.5)
    assert not {train.group(i) for i in range(len(train))} & {valid.group(i) for i in range(len(valid))}


def test_emoji_in_several_languages():
    source = PairsFile(data_path('emoji', 'pairs.jsonl'), text_key='name.en,de,zh')
    assert len(source) == 3*825 and {source.kind(i) for i in range(9)} == {'en', 'de', 'zh'}
    assert (source.text(2), source.name(2)) == ('按键: #', 'png/emoji_u0023_20e3.png (zh)')
    assert len(PairsFile(data_path('emoji', 'pairs.jsonl'), text_key='name.*')) == 20*825


BAD = [
    ('a.jsonl', b'{"image": "0.jpg", "text": "x"}\n\n{"image"\n', 'a.jsonl, line 3: not JSON'),
    ('a.jsonl', b'[1]\n', 'line 1: want an object'),
    ('a.jsonl', b'{"image": "0.jpg"}\n', "a.jsonl: no column 'text'; there are: image"),
    ('a.jsonl', b'{"image": "0.jpg", "text": 3}\n', 'line 1: text is int, not text: 3'),
    ('a.jsonl', b'{"image": "0.jpg", "text": "\xff"}\n', 'not UTF-8'),
    ('a.jsonl', b'\n\n', 'holds no rows'),
    ('a.csv', b'', 'holds no rows'),
    ('a.csv', b'image,text\n', 'holds no rows'),
    ('a.csv', b'image,caption\n0.jpg,x\n', "a.csv: no column 'text'; there are: image, caption"),
    ('a.csv', b'image,text\n0.jpg\n', 'line 2: 1 columns where the header has 2'),
    ('a.csv', b'image,text\n0.jpg,x,y\n', 'line 2: 3 columns where the header has 2'),
    ('a.csv', b'image,text\n0.jpg,"x\n', 'line 2: unexpected end of data'),
    ('a.csv', b'image,text\nno.jpg,x\n0.jpg,x\nnor.jpg,y\n', 'no.jpg (and 1 more of 3)'),
    ('a.parquet', b'PAR1', 'not a readable Parquet file'),
    ('a.txt', b'', "want a .jsonl, .json, .csv, .tsv or .parquet file, got '.txt'"),
]


@pytest.mark.parametrize('name, content, message', BAD)
def test_bad_tables_are_named(tmp_path, name, content, message):
    (tmp_path/'0.jpg').write_bytes(b'x')
    (tmp_path/name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError)) as e: PairsFile(tmp_path/name)
    assert message in str(e.value) and '\n' not in str(e.value)


def test_bad_places_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='no such file: nowhere.csv'): PairsFile('nowhere.csv')
    with pytest.raises(ValueError, match='is a folder'): PairsFile(tmp_path)
    path = write(tmp_path, '.parquet')
    with pytest.raises(ValueError, match="no column 'text'; there are: image, alt, section"): PairsFile(path)
    with pytest.raises(FileNotFoundError, match='image_root .* is not a folder'):
        PairsFile(path, image_root=tmp_path / 'no')


def test_a_source_has_to_be_written():
    for f in (len, lambda s: s.text(0), lambda s: s.image(0)):
        with pytest.raises(NotImplementedError): f(Source())


def test_figures():
    path = data_path('figures', 'pairs.jsonl')
    source = PairsFile(path, text_key='alt', group_key='section')
    rows = [json.loads(line) for line in path.open(encoding='utf-8')]
    assert [source.text(i) for i in range(len(source))] == [r['alt'] for r in rows]
    assert (source.image(7) == read_bytes(path.parent/rows[7]['image'])).all()
    train, valid = source.split(0.2)
    assert not {train.group(i) for i in range(len(train))} & {valid.group(i) for i in range(len(valid))}
    assert 0.1 < len(valid)/len(source) < 0.3
