"Folders of classes: labels from folders, captions from templates, the split of `train` and `test`."
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from mmembed.core.files import read_bytes
from mmembed.data.folders import ClassFolder, Files, image_files
from mmembed.data.tables import PairsFile
from mmembed.data.captions import from_template
from tests.helpers import data_path


def make(folder, names):
    for n in names:
        (folder/n).parent.mkdir(parents=True, exist_ok=True)
        (folder/n).write_bytes(n.encode())
    return folder


def test_labels_captions_names_and_bytes(tmp_path):
    make(
        tmp_path,
        [
            'hat/b.JPG', 'hat/a.png', 'fur_coat/deep/er/1.webp', 'hat/.hidden.jpg', '.git/x.jpg',
            'hat/notes.txt', 'loose.jpg',
        ],
    )
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
    with pytest.raises(ValueError, match=r"a template wants \{\} where the class goes, got 'a photo'"):
        from_template('x', ['a photo'], 'y')


def test_links_that_loop(tmp_path):
    "Each folder once, by its own path: links to itself, to each other, up, across and out of the folder."
    make(tmp_path, ['in/z/1.jpg', 'in/z/deep/2.jpg', 'in/y/3.jpg', 'in/notes.txt', 'out/4.jpg', 'out/far/5.jpg'])
    folder = tmp_path/'in'
    for link, to in (
        ('a', folder),
        ('z/up', folder),
        ('z/deep/self', folder / 'z' / 'deep'),
        ('b', folder / 'z'),
        ('y/z', folder / 'z'),
        ('z/y', folder / 'y'),
        ('c', tmp_path / 'out'),
        ('d', tmp_path / 'out'),
        ('e', tmp_path / 'out' / 'far'),
        ('gone', tmp_path / 'nowhere'),
        ('round', folder / 'round'),
    ):
        (folder/link).symlink_to(to)
    (tmp_path/'out'/'back').symlink_to(folder)
    assert image_files(folder) == (
        ['c/4.jpg', 'c/far/5.jpg', 'y/3.jpg', 'z/1.jpg', 'z/deep/2.jpg'],
        ['gone', 'notes.txt', 'round'],
    )
    # two links in each folder: 2 to the power of the depth
    make(tmp_path, [f'in/{n}/{k}.jpg' for n in range(8) for k in range(2)])
    for n in range(8):
        for m in 'lr': (folder/str(n)/m).symlink_to(folder/str((n + (m == 'r') + 1) % 8))
    assert len(Files(folder)) == 5 + 16


def test_folders_that_cannot_be_read(tmp_path):
    folder = tempfile.mkdtemp()  # an own folder of the test's user is closed to others
    try:
        os.chmod(folder, 0o755)
        for name in ('open', 'closed'):
            os.mkdir(f'{folder}/{name}')
            with open(f'{folder}/{name}/1.jpg', 'w'): pass
        os.chmod(f'{folder}/closed', 0)
        user = os.geteuid()
        if not user: os.seteuid(65534)
        try:
            found = image_files(Path(folder))
            with pytest.raises(PermissionError, match='closed'): image_files(Path(folder)/'closed')
        finally:
            if not user: os.seteuid(user)
        assert found == (['open/1.jpg'], ['closed/ (Permission denied)'])
    finally:
        os.chmod(f'{folder}/closed', 0o755)
        shutil.rmtree(folder)


def test_tables_of_labels(tmp_path):
    make(tmp_path, ['0.jpg', '1.jpg'])
    (tmp_path/'labels.csv').write_text('image,class\n0.jpg,hat\n1.jpg,7\n')
    source = PairsFile(tmp_path/'labels.csv', text_key=None, label_key='class', templates=['one {}'])
    assert [source.label(i) for i in range(2)] == ['hat', '7'] and [source.text(i) for i in range(2)] == [
        'one hat',
        'one 7',
    ]
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
    assert (
        {train.label(i) for i in range(len(train))} == {test.label(i) for i in range(len(test))} == set(source.classes)
    )
    assert len(train) > 500 and len(test) > 200 and source.image(0).equal(read_bytes(source.path/source.name(0)))
