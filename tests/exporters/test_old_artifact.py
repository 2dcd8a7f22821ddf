"Files that commit 04f7bea exported load today and answer equally (`old_artifact.py`: how they were made)."
import base64
import hashlib
import json
import lzma
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mmembed
from mmembed.core.packing import as_bytes, pack
from mmembed.exporters.card import make_card, same_cards
from mmembed.exporters.verify.verify import verify
from mmembed.runtime.aot import opened
from mmembed.runtime.artifact import read_card
from mmembed.vision.augment import Augmentation

from tests.exporters import old_artifact
from tests.helpers import built_once

HERE = Path(__file__).parent
FILES = ['old_artifact.pt', 'old_artifact.pt2']
BOUND = 1e-5  # of embeddings, as `verify` holds them; the .pt2 sums in another order
LEVELS = ['DEFAULT', 'AVX2', 'AVX512']


def unpacked(name):
    """The path of an old artifact.

    Skips the test where a compiled one cannot run: on another processor, system or torch, or a glibc from 2.41 on."""
    path = built_once(name, lambda p: p.write_bytes(lzma.decompress((HERE/f'{name}.xz').read_bytes())))
    if path.suffix != '.pt2': return path
    made = read_card(path)['compiled']
    here = torch.backends.cpu.get_cpu_capability()
    if here not in LEVELS or LEVELS.index(here) < LEVELS.index(made['cpu']):
        pytest.skip(f'{name} was compiled for {made["cpu"]}, this processor has {here}')
    for key, found in (('torch', torch.__version__), ('system', sys.platform)):
        if found != made[key]: pytest.skip(f'{name} was compiled for {key} {made[key]}, here is {found}')
    kind, number = platform.libc_ver()
    if kind == 'glibc' and tuple(map(int, number.split('.'))) >= (2, 41):
        pytest.skip(f'{name} asks for an executable stack, as all did then, and glibc {number} refuses that')
    return path


@pytest.fixture(scope='module')
def known():
    found = json.loads((HERE/'old_artifact.json').read_text(encoding='utf-8'))
    return found | {'files': [base64.b64decode(f) for f in found['files']]}


@pytest.mark.parametrize('name', FILES)
def test_an_old_file_answers_equally(name, known):
    e = mmembed.load(unpacked(name))
    text, image = e.encode_text(known['texts']), e.encode_image(known['files'])
    torch.testing.assert_close(torch.as_tensor(text), torch.tensor(known['text']), rtol=0, atol=BOUND)
    torch.testing.assert_close(torch.as_tensor(image), torch.tensor(known['image']), rtol=0, atol=BOUND)
    scores = torch.as_tensor(e.score(known['texts'], known['files']))
    torch.testing.assert_close(scores, torch.tensor(known['scores']), rtol=0, atol=100 * BOUND)


@pytest.mark.parametrize('name', FILES)
def test_an_old_file_has_the_same_ids_and_pixels(name, known):
    path = unpacked(name)
    module = opened(path, read_card(path))
    ids, mask = module.tokenize(*pack(known['texts']))  # int64 (B, L)
    assert ids.tolist() == known['ids'] and mask.long().tolist() == known['mask']
    for text, row, marks in zip(known['texts'], known['ids'], known['mask']):  # a text alone takes another way
        alone, _ = module.tokenize(*pack([text]))
        assert alone[0].tolist() == row[:alone.shape[1]] and not any(marks[alone.shape[1]:])
    pixels = torch.stack([module.preprocess_image(as_bytes(f)) for f in known['files']])  # uint8 (B, 3, S, S)
    normalized = module.vision_pipeline.normalize(pixels)
    assert hashlib.sha256(normalized.numpy().tobytes()).hexdigest() == known['pixels_sha256']


def test_an_old_package_keeps_its_fast_path():
    "`Packaged` knows by a class name inside the file that no step precedes the tokenizer."
    path = unpacked('old_artifact.pt2')
    assert opened(path, read_card(path)).plain


def test_an_old_file_is_verified():
    "Here and in a process without mmembed; a file without a hash of its records is checked as far as it goes."
    report = verify(unpacked('old_artifact.pt'), cpp=False, sizes=(3,)).check()
    assert {r.stage for r in report.rows} == {'card', 'fresh process'}
    assert all(r.difference == 0 for r in report.rows if r.what in ('token ids', 'pixels', 'image status'))


def model_row(model):
    "Verify the old file against `model`; return the row that says whether it is the same model."
    report = verify(unpacked('old_artifact.pt'), model, cpp=False, fresh=False, sizes=(3,))
    return next(r for r in report.rows if (r.stage, r.what) == ('card', 'model'))


def test_an_old_file_is_verified_against_the_model_of_today():
    "Its hash counts options of training and tables of its version: the rules themselves are compared instead."
    row = model_row(old_artifact.tiny_model())
    assert row.difference == 0, row
    augmented = old_artifact.tiny_model()
    augmented.vision_pipeline.augmentation = Augmentation(flip=0.25, re_prob=0.5)
    assert model_row(augmented).difference == 0


@pytest.mark.parametrize('change', ['weights', 'pixels', 'tokenizer', 'dim'])
def test_an_old_file_is_told_from_another_model(change):
    then, model = read_card(unpacked('old_artifact.pt')), old_artifact.tiny_model()
    if change == 'weights':
        with torch.no_grad(): model.text_proj.weight[0, 0] += 1e-6
    if change == 'pixels': model.vision_pipeline.alpha = 'black'
    if change == 'tokenizer': model.text_pipeline.pad_to = 16
    made = make_card(model, then['dim'] + (change == 'dim'), True, None, None, {}, None)
    assert not same_cards(then, made)


def test_these_are_the_only_weights_in_the_repository():
    kinds = 'pt', 'pt2', 'ckpt', 'safetensors', 'onnx', 'pth', 'bin', 'xz', 'npz'
    allowed = [f'tests/exporters/{name}.xz' for name in FILES]
    for name in FILES: assert (HERE/f'{name}.xz').stat().st_size < 1_000_000
    root = HERE.parents[1]
    if not (root/'.git').exists(): pytest.skip('not a checkout: git lists what is tracked')
    tracked = subprocess.run(['git', 'ls-files'], cwd=root, capture_output=True, text=True, check=True).stdout
    assert sorted(n for n in tracked.split('\n') if n.rpartition('.')[2] in kinds) == allowed
