"""One function turns an exception into a sentence, one guard refuses a single item, and nothing else does either."""
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mmembed
from mmembed.core.errors import items_of, naming, reason
from mmembed.core.packing import pack
from mmembed.text.trainers import learn_words
from mmembed.vision.pipeline import VisionPipeline

ROOT = Path(mmembed.__file__).parent


def scripted(x: torch.Tensor) -> torch.Tensor:
    if x.dim() != 1: raise ValueError('want one dimension')
    return x


@pytest.mark.parametrize(
    'error, says',
    [
        (ValueError('bad'), 'bad'),
        (KeyError(), 'KeyError'),
        (ValueError('  \n '), 'ValueError'),
        (ValueError('first\nsecond'), 'first'),
        (RuntimeError('Error(s) in loading state_dict for A:\n\tMissing key(s): "w".'), 'Missing key(s): "w".'),
        (FileNotFoundError(2, 'No such file or directory', 'a.jpg'), 'a.jpg: No such file or directory'),
        (OSError(28, 'No space left on device'), 'No space left on device'),
        (RuntimeError('read_header, /__w/x/DecodeJpeg.cpp:208, Image is truncated.\n'), 'Image is truncated.'),
        (ValueError('lance error: bad, /src/x/y.rs:12:3\nmore'), 'lance error: bad'),
        (RuntimeError('Traceback\n  File x\nbuiltins.RuntimeError: data must be uint8\n'), 'data must be uint8'),
    ],
)
def test_an_exception_is_one_sentence(error, says): assert reason(error) == says


def test_torchscripts_page_is_one_sentence():
    with pytest.raises(Exception) as e: torch.jit.script(scripted)(torch.zeros(2, 2))
    assert len(str(e.value).splitlines()) > 1 and reason(e.value) == 'want one dimension'


def test_a_short_message_of_several_lines_is_joined():
    error = ValueError('one\n two')
    assert reason(error, joined=80) == 'one two' and reason(error, joined=3) == 'one'


def test_the_file_is_named():
    with pytest.raises(OSError, match="No space left on device: 'model.pt'"), naming('model.pt'):
        raise OSError(28, 'No space left on device')


SINGLE = ['a cat', b'a cat', Path('a.jpg'), {'a': 1}, torch.zeros(2), np.zeros((2, 2, 3)), Image.new('RGB', (2, 2)), 3]


@pytest.mark.parametrize('x', SINGLE, ids=[type(x).__name__ for x in SINGLE])
def test_a_single_item_is_refused(x):
    with pytest.raises(TypeError, match='texts is a single .*; pass a list: '): items_of(x, 'texts')
    with pytest.raises(TypeError, match='texts is a single .*; pass a list: '): pack(x)
    with pytest.raises(TypeError, match='captions is a single .*; pass a list: '): learn_words(x)


@pytest.mark.parametrize('x', ['a.jpg', b'...', Path('a.jpg'), Image.new('RGB', (2, 2))])
def test_a_single_image_is_refused(x):
    with pytest.raises(TypeError, match='images is a single .*; pass a list: '): VisionPipeline(8)(x)


def test_batches_of_every_kind_are_taken():
    assert pack(('a', 'b'))[1].tolist() == pack(t for t in 'ab')[1].tolist() == pack(np.array(['a', 'b']))[1].tolist()
    for x in (set('ab'), None):
        with pytest.raises(TypeError, match='texts is .*; pass a list'): pack(x)


ALONE = {'core/errors.py', 'core/files.py', 'core/progress.py'}  # where each is defined
COPIES = {
    'a sentence made by hand': r'str\((e|error|err)\)[^\n]*\.splitlines\(|str\((e|error|err)\)\.split\(\)',
    'a lock of its own': r'\bfcntl\b',
    'an atomic write of its own': r'\bos\.(replace|link)\(|\.with_(name|suffix)\([^\n]*getpid',
    'a bar of its own': r'rich\.progress|\btqdm\b',
}


@pytest.mark.parametrize('what', COPIES)
def test_there_is_one_of_each(what):
    found = [
        f'{path.relative_to(ROOT)}:{n}'
        for path in sorted(ROOT.rglob('*.py'))
        if str(path.relative_to(ROOT)) not in ALONE
        for n, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(COPIES[what], line)
    ]
    assert found == [], f'{what}: use core'
