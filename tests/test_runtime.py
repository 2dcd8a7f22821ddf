import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmembed.core import as_bytes, pack
from mmembed.export import cases
from mmembed.runtime import Embedder, Encoded, load, reason

from .export import tiny

FILES = cases.images()


@pytest.fixture(scope='module')
def emb(): return load(tiny.artifact())


@pytest.fixture(scope='module')
def plain(): return load(tiny.artifact(False))


def test_it_imports_no_training_code():
    program = '''
import sys
from mmembed.runtime import load
emb = load(sys.argv[1])
assert emb.encode_text(['a']).shape == emb.encode_image([open(sys.argv[2], 'rb').read()]).shape == (1, 24)
heavy = ('lightning', 'transformers', 'tokenizers', 'open_clip', 'torchvision', 'pandas', 'pyarrow', 'torchcodec')
print([m for m in sys.modules if m.split('.')[0] in heavy or m.startswith(('mmembed.text', 'mmembed.vision', 'mmembed.models', 'mmembed.export'))])
'''
    picture = tiny.folder()/'p.jpg'
    picture.write_bytes(FILES['quality 75.jpg'])
    run = subprocess.run([sys.executable, '-W', 'ignore', '-c', program, tiny.artifact(), picture], capture_output=True, text=True)
    assert run.stdout.strip() == '[]', run


def test_texts(emb):
    model, texts = tiny.model(), cases.texts()
    tokens = emb.tokenize(texts)
    want = model.text_pipeline.tokenize(*pack(texts))
    assert torch.equal(tokens.ids, want.ids) and torch.equal(tokens.mask, want.mask) and type(tokens).__module__ == 'mmembed.core'
    with torch.no_grad(): assert torch.allclose(emb.encode_text(texts), model.encode_text(want), atol=1e-5)
    assert torch.equal(emb.encode_text(['Café', '一']), emb.encode_text(['Café'.encode(), bytearray('一'.encode())]))
    assert torch.equal(emb.encode_text(t for t in ['a', 'b']), emb.encode_text(('a', 'b')))


def test_images_of_every_form(emb, tmp_path):
    image = Image.open(io.BytesIO(FILES['quality 75.jpg']))
    path = tmp_path/'x.jpg'
    path.write_bytes(FILES['quality 75.jpg'])
    rgb = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())
    want = emb.preprocess(FILES['quality 75.jpg'])
    assert want.dtype == torch.uint8 and want.shape == (3, 48, 48)
    for form in (path, str(path), bytearray(FILES['quality 75.jpg']), memoryview(FILES['quality 75.jpg']), image, np.asarray(image),
                 as_bytes(FILES['quality 75.jpg']), rgb):
        assert torch.equal(emb.preprocess(form), want), type(form)


@pytest.mark.parametrize('name', [n for n in FILES if n.endswith(('.png', '.jpg', '.gif')) and n not in ('moving.gif', '16 bit rgb.png')])
def test_a_pil_image_is_its_file(emb, name):
    """Orientation, transparency, palettes and depth follow the artifact's one pixel rule, however the picture arrives.

    Left out: Pillow opens 16-bit RGB by cutting each value to its high byte, where the rule rounds."""
    result = emb.encode_image([FILES[name]], on_error='flag')
    if result.ok[0]: assert torch.equal(emb.preprocess(Image.open(io.BytesIO(FILES[name]))), emb.preprocess(FILES[name]))


def test_arrays_with_one_and_four_channels(emb):
    rgba = np.asarray(Image.open(io.BytesIO(FILES['RGBA.png'])))
    assert torch.equal(emb.preprocess(rgba), emb.preprocess(FILES['RGBA.png']))
    gray = np.asarray(Image.open(io.BytesIO(FILES['L.png'])))
    assert torch.equal(emb.preprocess(gray), emb.preprocess(FILES['L.png']))


def test_one_bad_item_harms_no_neighbour(emb):
    "Each broken file among good ones, at every place: the good rows are bit-equal to a batch of the same size without it."
    good = [FILES[n] for n in ('quality 75.jpg', 'RGBA.png', 'still.gif')]
    want = emb.encode_image(good)
    broken = [FILES[n] for n in list(FILES)[list(FILES).index('empty'):]] + [None, 7, 'no/such/file.png', Path('/'), torch.zeros(3, 4, 4), np.zeros((2, 2, 2), np.uint8)]
    for i, bad in enumerate(broken):
        at = i % 4
        result = emb.encode_image([*good[:at], bad, *good[at:]], on_error='flag')
        assert isinstance(result, Encoded) and result.ok.tolist() == [j != at for j in range(4)], (bad, result.errors)
        assert torch.equal(result.embedding[result.ok], want) and not result.embedding[at].any()
        assert result.errors[at] and '\n' not in result.errors[at] and len(result.errors[at]) < 200
        assert torch.equal(emb.encode_image([*good, bad], on_error='skip').embedding, want)
        with pytest.raises(ValueError, match=r'images\[2\]: ') as caught: emb.encode_image([*good[:2], bad, good[2]])
        assert str(caught.value) == f'images[2]: {result.errors[at]}'


def test_bad_texts(emb):
    result = emb.encode_text(['a', None, b'b', 3.5], on_error='flag')
    assert result.ok.tolist() == [True, False, True, False] and result.errors[1:2] == ['NoneType is no text: pass str or bytes']
    assert torch.equal(result.embedding[result.ok], emb.encode_text(['a', 'b']))
    assert emb.encode_text([None], on_error='skip').embedding.shape == (0, 24)
    with pytest.raises(ValueError, match=r'texts\[1\]: NoneType'): emb.encode_text(['a', None])


def test_empty_batches(emb):
    assert emb.encode_text([]).shape == emb.encode_image([]).shape == (0, 24)
    assert emb.encode_image([], on_error='flag').embedding.shape == (0, 24) and emb.encode_text([], on_error='skip').errors == []
    assert emb.tokenize([]).ids.shape == (0, 0)
    assert emb.score([], []).shape == (0, 0) and emb.score(['a', 'b'], []).shape == (2, 0)
    assert emb.rank(['a'], []).index.shape == (1, 0)


def test_a_single_item_is_not_a_batch(emb):
    image = Image.new('RGB', (4, 4))
    for call, name in ((emb.encode_text, 'texts'), (emb.tokenize, 'texts'), (emb.encode_image, 'images')):
        for single in ('a cat', b'a cat', Path('x.jpg'), torch.zeros(3), image, np.zeros((4, 4, 3), np.uint8), None, 7):
            with pytest.raises(TypeError, match=f'{name} is a single'): call(single)


def test_batches_of_any_size_agree():
    few = Embedder(tiny.artifact(), batch_size=3)
    many = Embedder(tiny.artifact(), batch_size=100)
    good = [f for f in FILES.values() if few.encode_image([f], on_error='flag').ok[0]]
    assert torch.allclose(few.encode_image(good), many.encode_image(good), atol=1e-5)
    assert torch.allclose(few.encode_text(cases.texts()), many.encode_text(cases.texts()), atol=1e-5)
    mixed = few.encode_image(list(FILES.values()), on_error='flag')
    assert int(mixed.ok.sum()) == len(good) and torch.allclose(mixed.embedding[mixed.ok], many.encode_image(good), atol=1e-5)
    with pytest.raises(ValueError, match='batch_size must be at least 1'): Embedder(tiny.artifact(), batch_size=0)


def test_scores_and_ranks(emb):
    texts, images = ['a red circle', 'b', 'c'], [FILES['RGB.png'], FILES['gray.jpg']]
    t, i = emb.encode_text(texts), emb.encode_image(images)
    scores = emb.score(texts, images)
    assert torch.allclose(scores, emb.card['logit_scale'] * t @ i.T, atol=1e-5) and torch.equal(emb.score(t, i), scores)
    by_text, by_image = emb.rank(texts, images, top_k=1), emb.rank(t, images, by='image')
    assert torch.equal(by_text.index[:, 0], scores.argmax(1)) and torch.equal(by_text.score[:, 0], scores.max(1).values)
    assert torch.equal(by_image.index, scores.T.argsort(1, descending=True))
    assert torch.allclose(by_image.probability.sum(1), torch.ones(2)) and torch.all(by_image.score.diff(dim=1) <= 0)
    with pytest.raises(ValueError, match="by must be 'text' or 'image'"): emb.rank(texts, images, by='texts')
    with pytest.raises(ValueError, match=r'images: embeddings must have the shape \(B, 24\)'): emb.score(t, i[:, :3])


def test_probe(emb):
    info = emb.probe(FILES['exif 6.jpg'])
    assert (info.format, info.width, info.height, info.orientation, info.error) == ('jpeg', 150, 110, 6, '')
    assert emb.probe(FILES['bomb.png']).error and emb.probe(b'').error
    assert emb.probe(torch.zeros(3, 5, 7, dtype=torch.uint8))[:3] == ('rgb', 7, 5)


def test_artifact_without_decoders(emb, plain):
    image = Image.open(io.BytesIO(FILES['quality 75.jpg']))
    assert torch.equal(plain.encode_image([image]), emb.encode_image([image]))
    assert torch.equal(plain.encode_image([np.asarray(image)]), emb.encode_image([image]))
    result = plain.encode_image([FILES['quality 75.jpg'], image], on_error='flag')
    assert result.ok.tolist() == [False, True] and 'decoded RGB' in result.errors[0]


def test_threads_share_one_embedder(emb):
    want = emb.encode_image([FILES['RGB.png']])
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: emb.encode_image([FILES['RGB.png']]), range(20)): assert torch.equal(got, want)


def test_files_that_do_not_load(tmp_path):
    def refused(content, match, error=ValueError):
        (tmp_path/'m.pt').write_bytes(content)
        with pytest.raises(error, match=match): load(tmp_path/'m.pt')
    whole = tiny.artifact().read_bytes()
    refused(whole[:len(whole)//2], 'm.pt is not an mmembed artifact, or is truncated')
    refused(b'', 'is not an mmembed artifact')
    hole = bytearray(whole)
    at = whole.index(b'archive/data.pkl')
    hole[at+40:at+400] = bytes(360)
    refused(bytes(hole), 'm.pt cannot be loaded')
    with pytest.raises(FileNotFoundError, match='none.pt not found'): load(tmp_path/'none.pt')


def test_missing_torchcodec_is_explained():
    program = '''
import sys; sys.modules['torchcodec'] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == 'torchcodec' else find(name, *a)
from mmembed.runtime import load
try: load(sys.argv[1])
except ImportError as e: print(e)
print(load(sys.argv[2]).encode_text(['a']).shape)
'''
    run = subprocess.run([sys.executable, '-W', 'ignore', '-c', program, tiny.artifact(), tiny.artifact(False)], capture_output=True, text=True)
    assert 'needs torchcodec: pip install torchcodec' in run.stdout and 'torch.Size([1, 24])' in run.stdout, run


def test_reprs(emb):
    assert emb.card['short_hash'] in repr(emb) and 'dim=24' in repr(emb) and 'tiny-True.pt' in repr(emb)
    assert emb.card['weights_sha256'] in emb._repr_html_()


def test_reason():
    assert reason(ValueError('The following operation failed\n  File "x"\nbuiltins.ValueError: pixels: no\n')) == 'pixels: no'
    assert reason(RuntimeError('read_png, /__w/a/b.cpp:12, broken')) == 'broken'
    assert reason(RuntimeError('CUDA error: no device\nCompile with X\n')) == 'CUDA error: no device'
    assert reason(ValueError()) == 'ValueError'
