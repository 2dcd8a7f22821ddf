"Folders of classes: labels from folders, captions from templates, the split of `train` and `test`."
import pytest

from mmembed.core import read_bytes
from mmembed.data.folders import ClassFolder
from mmembed.data.sources import PairsFile, from_template
from tests.helpers import data_path


def make(folder, names):
    for n in names:
        (folder/n).parent.mkdir(parents=True, exist_ok=True)
        (folder/n).write_bytes(n.encode())
    return folder


def test_labels_captions_names_and_bytes(tmp_path):
    make(tmp_path, ['hat/b.JPG', 'hat/a.png', 'fur_coat/deep/er/1.webp', 'hat/.hidden.jpg', '.git/x.jpg', 'hat/notes.txt', 'loose.jpg'])
    source = ClassFolder(tmp_path, templates=['a {}', 'one {} on a table'])
    assert [source.name(i) for i in range(len(source))] == ['fur_coat/deep/er/1.webp', 'hat/a.png', 'hat/b.JPG']
    assert [source.label(i) for i in range(3)] == ['fur coat', 'hat', 'hat'] and source.classes == ['fur coat', 'hat']
    assert sorted(source.ignored) == ['hat/notes.txt', 'loose.jpg']
    assert all(source.text(i) in {f'a {source.label(i)}', f'one {source.label(i)} on a table'} for i in range(3))
    assert bytes(source.image(1).tolist()) == b'hat/a.png' and source[1][0] == source.text(1)
    assert source.prompts() == {c: [f'a {c}', f'one {c} on a table'] for c in source.classes}
    assert ClassFolder(tmp_path, names={'fur_coat': 'winter coat'}).classes == ['hat', 'winter coat']


@pytest.mark.parametrize('valid', ['valid', 'val', 'test'])
def test_train_and_valid_are_the_split(tmp_path, valid):
    make(tmp_path, ['train/a/1.jpg', 'train/b/1.jpg', f'{valid}/a/1.jpg', f'{valid}/a/2.jpg'])
    train, held_out = ClassFolder(tmp_path).split(0.5)
    assert [train.name(i) for i in range(len(train))] == ['train/a/1.jpg', 'train/b/1.jpg']
    assert [held_out.label(i) for i in range(len(held_out))] == ['a', 'a']


def test_classes_that_are_called_train(tmp_path):
    make(tmp_path, ['train/1.jpg', 'ship/1.jpg', 'test/1.jpg'])
    assert ClassFolder(tmp_path).classes == ['ship', 'test', 'train']


def test_mistakes(tmp_path):
    make(tmp_path, ['loose.jpg', 'a/notes.txt'])
    with pytest.raises(ValueError, match='holds no folders of image files'): ClassFolder(tmp_path)
    with pytest.raises(FileNotFoundError, match='no such folder: nowhere'): ClassFolder('nowhere')
    with pytest.raises(ValueError, match=r"a template wants \{\} where the class goes, got 'a photo'"): from_template('x', ['a photo'], 'y')


def test_tables_of_labels(tmp_path):
    make(tmp_path, ['0.jpg', '1.jpg'])
    (tmp_path/'labels.csv').write_text('image,class\n0.jpg,hat\n1.jpg,7\n')
    source = PairsFile(tmp_path/'labels.csv', text_key=None, label_key='class', templates=['one {}'])
    assert [source.label(i) for i in range(2)] == ['hat', '7'] and [source.text(i) for i in range(2)] == ['one hat', 'one 7']
    (tmp_path/'both.csv').write_text('image,class,title\n0.jpg,hat,Bowler\n')
    both = PairsFile(tmp_path/'both.csv', text_key='title', label_key='class', group_key='class')
    assert (both.text(0), both.label(0), both.group(0)) == ('Bowler', 'hat', 'hat')
    with pytest.raises(ValueError, match='want text_key or label_key'): PairsFile(tmp_path/'both.csv', text_key=None)
    with pytest.raises(ValueError, match="no column 'kind'; there are: image, class, title"):
        PairsFile(tmp_path/'both.csv', text_key=None, label_key='kind')


def test_clothing():
    source = ClassFolder(data_path('clothing'), templates=['a photo of a {}, a piece of clothing'])
    train, test = source.split()
    assert len(source.classes) == 10 and 't-shirt' in source.classes and source.ignored == ['LICENSE']
    assert {train.label(i) for i in range(len(train))} == {test.label(i) for i in range(len(test))} == set(source.classes)
    assert len(train) > 500 and len(test) > 200 and source.image(0).equal(read_bytes(source.path/source.name(0)))
