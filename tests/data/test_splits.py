"A split is written once; a survey names what is broken, twice there, or on both sides."
import pytest

from mmembed.train.datamodule import PairData
from mmembed.data.scenes import Scenes
from mmembed.data.tables import PairsFile
from mmembed.data.source import Subset
from mmembed.data.splits import read_split, split_once, survey, write_split
from tests.helpers import data_path


class Book(Scenes):
    "Five rows a chapter"
    def group(self, i): return f'chapter "{i // 5}", é\n'
    def split(self, share=0.1): return super(Scenes, self).split(share)


def test_the_file_decides(tmp_path):
    book, path = Book(train=200, valid=0), tmp_path/'deep'/'split.csv'
    first = split_once(book, path, 0.3)
    content = path.read_bytes()
    assert {k: v.rows for k, v in first.items()} == dict(zip(('train', 'valid'), (p.rows for p in book.split(0.3))))
    for share in (0.1, 0.9):
        assert {k: v.rows for k, v in split_once(book, path, share).items()} == {k: v.rows for k, v in first.items()}
    assert path.read_bytes() == content and list(path.parent.iterdir()) == [path]
    groups = {k: {v.group(i) for i in range(len(v))} for k, v in first.items()}
    assert not groups['train'] & groups['valid'] and len(groups['train'] | groups['valid']) == 40


def test_a_third_part(tmp_path):
    book, path = Book(train=40, valid=0), tmp_path/'split.csv'
    train, valid = book.split(0.4)
    write_split({'train': Subset(book, train.rows[5:]), 'valid': valid, 'test': Subset(book, train.rows[:5])}, path)
    data = PairData(source=book, split_file=str(path))
    assert (len(data.train), len(data.valid), len(data.test)) == (len(train) - 5, len(valid), 5)
    assert PairData(source=book, valid_share=0.4).test is None


def test_mistakes(tmp_path):
    book, path = Book(train=40, valid=0), tmp_path/'split.csv'
    split_once(book, path, 0.5)
    with pytest.raises(FileExistsError, match='a split is written once'): write_split({}, path)
    with pytest.raises(ValueError, match='does not know 2 of the groups .10 rows., as'):
        read_split(Book(train=50, valid=0), path)
    train, _ = book.split(0.5)
    with pytest.raises(ValueError, match='is in train and in valid'):
        write_split({'train': train, 'valid': train}, tmp_path / 'x.csv')
    with pytest.raises(ValueError, match="a part is one of"): write_split({'dev': train}, tmp_path/'x.csv')
    for content in ('', 'a,b\n', 'group,part\nx,dev\n', 'group,part\nx\n'):
        path.write_text(content)
        with pytest.raises(ValueError, match='is not a split file: want lines'): read_split(book, path)
    with pytest.raises(ValueError, match='no rows for validation'):
        path.write_text('group,part\n' + ''.join(f'"chapter ""{i}"", é\n",train\n' for i in range(8)))
        PairData(source=book, split_file=str(path))


class Worn(Book):
    def image(self, i):
        if i == 11: raise OSError('gone')
        return super().image(i % 36)[:200 if i == 3 else None]
    def text(self, i): return {4: '', 8: ' '}.get(i, super().text(i % 30))


@pytest.mark.parametrize('threads', [1, 4])
def test_survey(threads):
    worn = Worn(train=40, valid=0)
    found = survey(worn, threads=threads)
    name = [worn.name(i) for i in range(40)]
    assert found.rows == 40 and set(found.broken) == {name[3], name[11]}
    assert found.broken[name[11]] == 'gone' and '.cpp' not in str(found)
    assert found.same_file[0] == [name[0], name[36]] and len(found.same_file) == 3  # row 39 is whole, row 3 is cut
    assert found.empty == [name[4], name[8]] and [name[0], name[30]] in found.same_text and not found.leaks
    parts = {'train': Subset(worn, range(20)), 'valid': Subset(worn, range(20, 38)), 'test': Subset(worn, [38, 39])}
    leaks = survey(parts, threads=threads).leaks
    assert leaks == [(name[0], name[36]), (name[1], name[37]), (name[2], name[38])]
    assert '<li>2 have no caption: scene train 4, scene train 8</li>' in found._repr_html_()
    assert str(survey(Scenes(train=5, valid=0))) == '5 rows'


def test_figures(tmp_path):
    source = PairsFile(data_path('figures', 'pairs.jsonl'), text_key='alt', group_key='section')
    parts = split_once(source, tmp_path/'split.csv', 0.2)
    found = survey(parts, decode=False)
    assert found.rows == 2895 and not found.broken and not found.empty
    assert len(found.same_file) == 5 and len(found.leaks) == 1  # one picture stands in two sections
