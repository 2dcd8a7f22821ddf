import io
import os
import pickle
import re
import shutil
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmembed.core.types import Tokens
from mmembed.core.packing import as_bytes, pack
from mmembed.core.torchscript import quietly
from mmembed.exporters.verify import samples as cases
from mmembed.exporters.verify.verify import verify
from mmembed.runtime.inputs import enough
from mmembed.runtime.results import ranking
from mmembed.runtime.embedder import Embedder, load
from mmembed.runtime.loaded import BYTES, portions
from mmembed.runtime.results import Encoded
from mmembed.core.errors import reason

from tests.exporters import tiny

FILES = cases.images()


@pytest.fixture(scope='module')
def emb(): return load(tiny.artifact())


@pytest.fixture(scope='module')
def plain(): return load(tiny.artifact(False))


def test_it_imports_no_training_code(tmp_path):
    program = '''
import sys
import zlib
from mmembed.runtime.embedder import load
emb = load(sys.argv[1])
assert emb.encode_text(['a']).shape == emb.encode_image([open(sys.argv[2], 'rb').read()]).shape == (1, 24)
heavy = ('lightning', 'transformers', 'tokenizers', 'open_clip', 'torchvision', 'pandas', 'pyarrow', 'torchcodec')
ours = tuple('mmembed.' + room for room in ('text', 'vision', 'models', 'train', 'exporters'))
print([m for m in sys.modules if m.split('.')[0] in heavy or m.startswith(ours)])
'''
    picture = tmp_path/'p.jpg'
    picture.write_bytes(FILES['quality 75.jpg'])
    run = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', program, tiny.artifact(), picture], capture_output=True, text=True
    )
    assert run.stdout.strip() == '[]', run


def test_texts(emb):
    model, texts = tiny.model(), cases.texts()
    tokens = emb.tokenize(texts)
    want = model.text_pipeline.tokenize(*pack(texts))
    assert (
        torch.equal(tokens.ids, want.ids)
        and torch.equal(tokens.mask, want.mask)
        and type(tokens).__module__ == 'mmembed.core.types'
    )
    with torch.no_grad(): assert torch.allclose(emb.encode_text(texts), model.encode_text(want), atol=1e-5)
    assert torch.equal(emb.encode_text(['Café', '一']), emb.encode_text(['Café'.encode(), bytearray('一'.encode())]))
    assert torch.equal(emb.encode_text(t for t in ['a', 'b']), emb.encode_text(('a', 'b')))


def test_many_texts_are_tokenized_at_once(emb, monkeypatch):
    "As many as are at hand, up to a bound on their bytes; errors name the item as ever."
    texts, calls = [f'a red circle {i}' for i in range(300)], []
    real = emb._packed
    monkeypatch.setattr(emb, '_packed', lambda part: calls.append(len(part)) or real(part))
    torch.testing.assert_close(
        emb.encode_text(texts), torch.cat([emb.encode_text([t]) for t in texts]), atol=1e-5, rtol=0
    )
    assert calls == [300] + [1] * 300
    calls.clear()
    flagged = emb.encode_text([*texts, None], on_error='flag')
    assert calls == [300] and flagged.ok.tolist() == [True] * 300 + [False] and 'NoneType' in flagged.errors[300]
    long = ['a ' * 300_000, 'b ' * 300_000, 'a', 'c ' * 600_000, 'a']
    assert (
        [len(part) for part in portions(long)] == [1, 2, 1, 1]
        and sum(portions(long), []) == long
        and sum(map(len, long[:2])) > BYTES
    )
    once = emb.module.tokenize(*pack([emb.enough(t) for t in long]))
    assert all(map(torch.equal, emb.tokenize(long), once))
    with pytest.raises(TypeError, match=r'texts\[4\] is int'): emb.tokenize([*long[:4], 3])


def test_images_of_every_form(emb, tmp_path):
    image = Image.open(io.BytesIO(FILES['quality 75.jpg']))
    path = tmp_path/'x.jpg'
    path.write_bytes(FILES['quality 75.jpg'])
    rgb = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())
    want = emb.preprocess(FILES['quality 75.jpg'])
    assert want.dtype == torch.uint8 and want.shape == (3, 48, 48)
    for form in (
        path,
        str(path),
        bytearray(FILES['quality 75.jpg']),
        memoryview(FILES['quality 75.jpg']),
        image,
        np.asarray(image),
        as_bytes(FILES['quality 75.jpg']),
        rgb,
    ):
        assert torch.equal(emb.preprocess(form), want), type(form)


@pytest.mark.parametrize(
    'name', [n for n in FILES if n.endswith(('.png', '.jpg', '.gif')) and n not in ('moving.gif', '16 bit rgb.png')]
)
def test_a_pil_image_is_its_file(emb, name):
    """Orientation, transparency, palettes and depth follow the artifact's one pixel rule, however the picture arrives.

    Left out: Pillow opens 16-bit RGB by cutting each value to its high byte, where the rule rounds."""
    result = emb.encode_image([FILES[name]], on_error='flag')
    if result.ok[0]:
        assert torch.equal(emb.preprocess(Image.open(io.BytesIO(FILES[name]))), emb.preprocess(FILES[name]))


def test_arrays_with_one_and_four_channels(emb):
    rgba = np.asarray(Image.open(io.BytesIO(FILES['RGBA.png'])))
    assert torch.equal(emb.preprocess(rgba), emb.preprocess(FILES['RGBA.png']))
    gray = np.asarray(Image.open(io.BytesIO(FILES['L.png'])))
    assert torch.equal(emb.preprocess(gray), emb.preprocess(FILES['L.png']))


def test_one_bad_item_harms_no_neighbour(emb):
    """Each broken file among good ones, at every place: the good rows are bit-equal to a batch of the same size
    without it."""
    good = [FILES[n] for n in ('quality 75.jpg', 'RGBA.png', 'still.gif')]
    want = emb.encode_image(good)
    broken = [FILES[n] for n in list(FILES)[list(FILES).index('empty') :]] + [
        None,
        7,
        'no/such/file.png',
        Path('/'),
        torch.zeros(3, 4, 4),
        np.zeros((2, 2, 2), np.uint8),
    ]
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
    assert result.ok.tolist() == [True, False, True, False] and result.errors[1:2] == [
        'NoneType is not a text: pass str or bytes'
    ]
    assert torch.equal(result.embedding[result.ok], emb.encode_text(['a', 'b']))
    assert emb.encode_text([None], on_error='skip').embedding.shape == (0, 24)
    with pytest.raises(ValueError, match=r'texts\[1\]: NoneType'): emb.encode_text(['a', None])


def test_empty_batches(emb):
    assert emb.encode_text([]).shape == emb.encode_image([]).shape == (0, 24)
    assert (
        emb.encode_image([], on_error='flag').embedding.shape == (0, 24)
        and emb.encode_text([], on_error='skip').errors == []
    )
    assert emb.tokenize([]).ids.shape == (0, 0)
    assert emb.score([], []).shape == (0, 0) and emb.score(['a', 'b'], []).shape == (2, 0)
    assert emb.rank(['a'], []).index.shape == (1, 0)


def test_a_single_item_is_not_a_batch(emb):
    image = Image.new('RGB', (4, 4))
    for call, name in ((emb.encode_text, 'texts'), (emb.tokenize, 'texts'), (emb.encode_image, 'images')):
        for single in ('a cat', b'a cat', Path('x.jpg'), torch.zeros(3), image, np.zeros((4, 4, 3), np.uint8), None, 7):
            with pytest.raises(TypeError, match=f'{name} is (a single|None)'): call(single)


def test_batches_of_any_size_agree():
    few = Embedder(tiny.artifact(), batch_size=3)
    many = Embedder(tiny.artifact(), batch_size=100)
    good = [f for f in FILES.values() if few.encode_image([f], on_error='flag').ok[0]]
    assert torch.allclose(few.encode_image(good), many.encode_image(good), atol=1e-5)
    assert torch.allclose(few.encode_text(cases.texts()), many.encode_text(cases.texts()), atol=1e-5)
    mixed = few.encode_image(list(FILES.values()), on_error='flag')
    assert int(mixed.ok.sum()) == len(good) and torch.allclose(
        mixed.embedding[mixed.ok], many.encode_image(good), atol=1e-5
    )
    with pytest.raises(ValueError, match='batch_size must be at least 1'): Embedder(tiny.artifact(), batch_size=0)


def test_texts_of_many_lengths_come_back_in_their_order():
    emb = Embedder(tiny.artifact(), batch_size=4, deterministic=True)
    texts = ['a small red circle ' * n for n in (5, 1, 4, 1, 1, 3, 1)]
    got = emb.encode_text(texts)
    assert (
        len(emb.lengths) > 1
        and got.equal(torch.cat([emb.encode_text([t]) for t in texts]))
        and not got[0].equal(got[1])
    )


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


@pytest.mark.parametrize('n', [3, 17, 300])  # a short row is sorted in another way
def test_equal_scores_keep_the_order_of_the_candidates(n):
    scores = (torch.arange(n) % 3).float().expand(2, n)
    found = ranking(scores, n, sigmoid=False)
    assert found.index[0].tolist() == [i for level in (2, 1, 0) for i in range(level, n, 3)] and found.index[1].equal(
        found.index[0]
    )


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


def test_threads_share_one_embedder(emb, judge):
    """Texts, images, scores and pairs from six threads at once, the images decoded in threads of their own: the same
    bits as alone."""
    texts, images = cases.texts()[:9], [FILES['RGB.png'], b'broken', FILES['quality 75.jpg'], FILES['RGBA.png']]

    def ask(kind):
        if kind == 'text': return [emb.encode_text(texts), *emb.tokenize(texts)]
        if kind == 'image': return [emb.encode_image(images, on_error='flag', decoders=2).embedding]
        if kind == 'score': return [emb.score(texts[:2], images[:1])]
        return [judge.score_pairs(texts[:4], images, on_error='skip').scores]
    want = {kind: ask(kind) for kind in ('text', 'image', 'score', 'pairs')}
    with ThreadPoolExecutor(6) as pool:
        kinds = list(want) * 6
        for kind, got in zip(kinds, pool.map(ask, kinds)): assert all(map(torch.equal, got, want[kind])), kind


def test_decoders_change_no_bit_and_no_order(emb):
    files = list(FILES.values()) * 2
    want = emb.encode_image(files, on_error='flag', decoders=0)
    for n in (1, 3):
        got = emb.encode_image(iter(files), on_error='flag', decoders=n)
        assert torch.equal(got.embedding, want.embedding) and torch.equal(got.ok, want.ok) and got.errors == want.errors
    with pytest.raises(ValueError, match=r'images\[2\]: '):
        emb.encode_image([FILES['RGB.png'], FILES['RGB.png'], b'x', FILES['RGB.png']], decoders=3)
    with pytest.raises(ValueError, match='decoders must be 0 or more, got -2'): emb.encode_image(files, decoders=-2)


def test_generators_are_read_as_needed(capsys):
    "No more files are asked for than can soon be used, whether or not somebody stops early."
    few, asked = Embedder(tiny.artifact(), batch_size=4), []

    def files(n):
        for i in range(n):
            asked.append(i)
            yield b'broken' if i == 20 else FILES['RGB.png']
    with pytest.raises(ValueError, match=r'images\[20\]'): few.encode_image(files(10_000), decoders=2)
    assert len(asked) <= 21 + 2 * 4 + 1
    before = few.encode_image(files(12))
    assert (
        torch.equal(few.encode_image(files(12), progress='pictures', decoders=0), before)
        and 'pictures' not in capsys.readouterr().out
    )
    assert few.encode_text((t for t in ['a', 'b']), progress=True).shape == (2, 24)


def test_numpy_answers(emb):
    files = [FILES['RGB.png'], b'broken']
    for got, want in (
        (emb.encode_text(['a'], numpy=True), emb.encode_text(['a'])),
        (emb.score(['a'], files[:1], numpy=True), emb.score(['a'], files[:1])),
        (emb.rank(['a'], files[:1], numpy=True).probability, emb.rank(['a'], files[:1]).probability),
    ):
        assert isinstance(got, np.ndarray) and np.array_equal(got, want.numpy())
    flagged = emb.encode_image(files, on_error='flag', numpy=True)
    assert flagged.ok.tolist() == [True, False] and isinstance(flagged.embedding, np.ndarray) and flagged.errors[1]


@pytest.fixture(scope='module')
def judge(): return load(tiny.pair_artifact())


def test_pairs(judge):
    model, texts, files = (
        tiny.pair_model(),
        ['a red circle', 'b', '一只猫'],
        [FILES[n] for n in ('RGB.png', 'gray.jpg', 'quality 75.jpg')],
    )
    vp, tp = model.vision_pipeline, model.text_pipeline
    with torch.no_grad(): want = model(tp(texts), vp([as_bytes(f) for f in files]))
    got = judge.score_pairs(texts, files)
    assert judge.labels == ['mismatch', 'match'] and torch.allclose(got, want, atol=1e-5)
    assert torch.allclose(judge.score_pairs(iter(texts), iter(files), decoders=2), want, atol=1e-5)
    assert torch.allclose(load(tiny.pair_artifact(), batch_size=2).score_pairs(texts, files), want, atol=1e-5)
    same = load(tiny.pair_artifact(), batch_size=4, deterministic=True)
    assert torch.equal(same.score_pairs(texts[1:2], files[1:2])[0], same.score_pairs(texts, files)[1])
    for row, probability in zip(judge.classify(texts, files, top_k=9), want.softmax(-1)):
        assert (
            dict(row) == pytest.approx(dict(zip(judge.labels, probability.tolist())), abs=1e-5)
            and row[0][1] >= row[1][1]
        )
    assert judge.score_pairs([], []).shape == (0, 2)
    assert 'mismatch' in repr(judge)


def test_the_old_name_of_score_pairs_warns(judge):
    with pytest.warns(DeprecationWarning, match='score_pairs'): old = judge.scores(['a'], [FILES['RGB.png']])
    assert torch.equal(old, judge.score_pairs(['a'], [FILES['RGB.png']]))


def test_bad_pairs(judge):
    texts, files = ['a', None, 'c', 'd'], [FILES['RGB.png'], FILES['RGB.png'], b'broken', FILES['gray.jpg']]
    flagged = judge.score_pairs(texts, files, on_error='flag')
    assert (
        flagged.ok.tolist() == [True, False, False, True]
        and flagged.errors[1].startswith('NoneType')
        and flagged.errors[2]
    )
    want = judge.score_pairs(['a', 'd'], [files[0], files[3]])
    assert torch.equal(flagged.scores[flagged.ok], want) and flagged.scores[~flagged.ok].isnan().all()
    assert torch.equal(judge.score_pairs(texts, files, on_error='skip').scores, want)
    with pytest.raises(ValueError, match=r'pairs\[1\]: NoneType'): judge.score_pairs(texts, files)
    with pytest.raises(ValueError, match='2 images are fewer than the texts'):
        judge.score_pairs(['a', 'b', 'c'], files[:2])
    with pytest.raises(ValueError, match='1 texts are fewer than the images'): judge.score_pairs(['a'], files)


def test_each_kind_of_artifact_names_its_calls(emb, judge):
    for call in (
        lambda: judge.encode_text(['a']),
        lambda: judge.encode_image([]),
        lambda: judge.rank(['a'], []),
        lambda: judge.similarity(['a'], []),
    ):
        with pytest.raises(TypeError, match='scores pairs and has no embeddings: call score_pairs'): call()
    for call in (emb.scores, emb.classify):
        with pytest.raises(TypeError, match='does not score pairs: call score'): call(['a'], [FILES['RGB.png']])
    for call in (emb.classify_text, emb.classify_image):
        with pytest.raises(TypeError, match='has no labels: export it with labels='): call([])


def test_labels_of_an_artifact_that_embeds():
    named = load(tiny.labelled())
    found = named.classify_image([FILES['RGB.png'], FILES['gray.jpg']], top_k=3)
    want = quietly(torch.jit.load, str(tiny.labelled())).classify(
        [as_bytes(FILES['RGB.png']), as_bytes(FILES['gray.jpg'])], 3
    )
    assert named.labels == ['circle', 'square', 'star'] and [[n for n, _ in row] for row in found] == want.labels
    assert torch.allclose(torch.tensor([[p for _, p in row] for row in found]), want.probability, atol=1e-5)
    assert named.classify_text(named.encode_text(['a circle']), 1) == named.classify_text(['a circle'], 1)
    with pytest.raises(ValueError, match='top_k must be 0 or more, got -1'): named.classify_text(['a'], -1)


@pytest.mark.parametrize('output, dtype, width', [('int8', torch.int8, 24), ('binary', torch.uint8, 3)])
def test_stored_embeddings(output, dtype, width):
    """Embeddings that the artifact stores small come as they are stored, from every call.

    Scores and heat maps take them back."""
    small, file = (
        load(tiny.int8_labelled() if output == 'int8' else tiny.exported('tiny-binary', tiny.model, output=output)),
        FILES['RGB.png'],
    )
    for x in (
        small.encode_text(['a']),
        small.encode_image([file]),
        small.encode_text([]),
        small.encode_tokens(small.tokenize(['a'])),
    ):
        assert x.dtype == dtype and x.shape[1] == width == small.dim
    flagged = small.encode_image([b'broken', file], on_error='flag')
    assert (
        flagged.embedding.dtype == dtype
        and not flagged.embedding[0].any()
        and torch.equal(flagged.embedding[1:], small.encode_image([file]))
    )
    assert small.similarity(['a', 'b'], [file]).cosine.abs().max() <= 1 + 1e-5 and small.rank(
        ['a'], [file]
    ).index.tolist() == [[0]]


def test_probabilities_follow_the_kind_of_model(emb, monkeypatch):
    texts, files = ['a', 'b', 'c'], [FILES['RGB.png'], FILES['gray.jpg']]
    assert torch.allclose(emb.rank(texts, files).probability.sum(1), torch.ones(3))
    monkeypatch.setitem(emb.card, 'logit_bias', -10.)  # as SigLIP's card has it
    r = emb.rank(texts, files)
    assert torch.equal(r.probability, r.score.sigmoid())
    with pytest.raises(ValueError, match='top_k must be at least 1'): emb.rank(texts, files, top_k=0)


def test_heat_map(emb, tmp_path):
    (tmp_path/'<x>.png').write_bytes(FILES['RGB.png'])
    s = emb.similarity(['a & b', b'c'], [tmp_path/'<x>.png', FILES['gray.jpg']])
    assert torch.allclose(
        s.cosine,
        emb.encode_text(['a & b', 'c']) @ emb.encode_image([tmp_path / '<x>.png', FILES['gray.jpg']]).T,
        atol=1e-5,
    )
    assert (
        s.texts == ['a & b', 'c']
        and s.images == ['<x>.png', '1']
        and torch.equal(s.pixels[1], emb.preprocess(FILES['gray.jpg']))
    )
    html = s._repr_html_()
    assert 'a &amp; b' in html and '&lt;x&gt;' in html and html.count('<img') == 2 and f'{s.cosine[1, 1]:.3f}' in html
    given = emb.similarity(emb.encode_text(['a', 'b']), emb.encode_image([FILES['RGB.png']]))
    assert given.pixels == [None] and given.images == ['0'] and emb.similarity(['a'], []).cosine.shape == (1, 0)


def test_the_old_name_of_pixels_warns(emb):
    s = emb.similarity(['a'], [FILES['gray.jpg']])
    with pytest.warns(DeprecationWarning, match='Similarity.levels is now Similarity.pixels'): old = s.levels
    assert torch.equal(old[0], s.pixels[0])


def test_the_old_name_of_an_argument_of_settle_warns():
    from mmembed.runtime.results import Scored, settle
    with pytest.warns(DeprecationWarning, match=r'settle\(kind=\) is now settle\(result=\)'):
        assert isinstance(settle([], ['x'], torch.zeros(0, 2), 'flag', kind=Scored), Scored)


def test_a_heat_map_in_a_terminal_is_a_table(emb):
    lines = str(emb.similarity(['a red circle', 'x' * 99], [FILES['gray.jpg']] * 2)).splitlines()
    assert [len(line) for line in lines] == [54] * 3 and lines[1].startswith('a red circle  ')


def test_methods_added_in_steps_are_those_of_a_plain_class(emb):
    "Signature, docstring, parameters' comments and qualified names, which help and the docs show."
    import inspect
    from fastcore.docments import docments
    for cls in type(emb).__mro__[:2]:
        for name, f in vars(cls).items():
            if not inspect.isfunction(f) or name.startswith('_'): continue
            assert f.__qualname__ == f'{cls.__name__}.{name}' and f.__doc__
            assert next(iter(inspect.signature(f).parameters)) == 'self'
            assert all(v for k, v in docments(f).items() if k not in ('self', 'args', 'kwargs', 'return')), name


def test_warmup_and_profile(emb, judge, plain):
    for e in (emb, judge, plain): assert e.warmup([1, 3]) is e
    p = emb.profile(['a', 'b'], [FILES['quality 75.jpg']], repeats=2)
    assert (p.texts, p.images) == (2, 1) and min(p[2:]) > 0 and 0 < p.shares['image'] and 'preprocessing adds' in str(p)
    assert (
        plain.profile([], [torch.zeros(3, 9, 9, dtype=torch.uint8)], 1).decode == 0
        and judge.profile(['a'], [FILES['RGB.png']], 1).image_tower > 0
    )
    with pytest.raises(ValueError, match='repeats must be at least 1'): emb.profile(['a'], [], 0)


@pytest.mark.parametrize(
    'change, error',
    [
        (lambda t: None, 'tokens must be Tokens'),
        (lambda t: ['a'], 'tokens must be Tokens'),
        (lambda t: Tokens(*(x.numpy() for x in t)), 'tokens must be Tokens'),
        (lambda t: Tokens(t.ids.float(), t.mask), r'tokens.ids must be int64 \(B, L\), got float32 \(2, 8\)'),
        (lambda t: Tokens(t.ids[0], t.mask[0]), 'tokens.ids must be int64'),
        (
            lambda t: Tokens(t.ids, t.mask[:, :1]),
            r'tokens.mask must be int64 \(2, 8\) as tokens.ids is, got int64 \(2, 1\)',
        ),
        (lambda t: Tokens(t.ids, t.mask > 0), 'got bool'),
        (lambda t: Tokens(t.ids + torch.tensor([[0], [999]]), t.mask), r'tokens.ids\[1\] must be 0 to \d+, got'),
        (lambda t: Tokens(t.ids - 1, t.mask), r'tokens.ids\[0\] must be 0 to'),
        (lambda t: Tokens(t.ids, t.mask * 7), r'tokens.mask\[0\] must be 0 to 1, got 0 to 7'),
        (lambda t: Tokens(*(x.repeat(1, 9) for x in t)), 'tokens must be 1 to 16 a row, got 72'),
    ],
)
def test_tokens_made_by_hand_are_checked(emb, change, error):
    "Compiled towers end the process for an id that they do not have, TorchScript prints its own code."
    with pytest.raises((ValueError, TypeError), match=error): emb.encode_tokens(change(emb.tokenize(['a', 'b'])))


def test_pixels_made_by_hand_are_checked(emb):
    good = emb.preprocess(FILES['RGB.png'])
    for bad in (None, [good], good.numpy()):
        with pytest.raises(
            TypeError, match=f'pixels must be a tensor, as preprocess gives them, got {type(bad).__name__}'
        ):
            emb.encode_pixels(bad)
    for bad in (
        good,
        good[None, :2],
        good[None, :, 1:],
        good[None].permute(0, 2, 3, 1),
        good[None].double(),
        good[None] > 0,
    ):
        with pytest.raises(ValueError, match=r'pixels must be uint8 or normalised float32 \(B, 3, 48, 48\), got '):
            emb.encode_pixels(bad)
    assert emb.encode_pixels(good[None][:0]).shape == (0, 24)
    few, batch = load(tiny.artifact(), batch_size=2, deterministic=True), good[None].expand(5, 3, 48, 48)
    # in twos, and the last one filled
    assert torch.equal(few.encode_pixels(batch), few.encode_pixels(batch[:1]).expand(5, 24))


def test_counts_are_checked(emb):
    for wrong, error in (('2', TypeError), (1.5, TypeError), (True, TypeError), (-1, ValueError)):
        for name, call in (
            ('top_k', lambda: emb.rank(['a'], [FILES['RGB.png']], top_k=wrong)),
            ('decoders', lambda: emb.encode_image([], decoders=wrong)),
            ('repeats', lambda: emb.profile([], [], wrong)),
            ('sizes', lambda: emb.warmup([wrong])),
            ('threads', lambda: load(tiny.artifact(), threads=wrong)),
            ('batch_size', lambda: load(tiny.artifact(), batch_size=wrong)),
        ):
            with pytest.raises(error, match=f'{name} must be'): call()
    with pytest.raises(TypeError, match='sizes must be a list of whole numbers, got 3'): emb.warmup(3)


def test_errors_name_the_item_everywhere(emb, judge):
    good = FILES['RGB.png']
    for call in (
        lambda: emb.similarity(['a'], [good, b'broken']),
        lambda: emb.profile(['a'], [good, b'broken'], 1),
        lambda: emb.rank(['a'], [good, b'broken']),
    ):
        with pytest.raises(ValueError, match=r'^images\[1\]: '): call()
    for call in (
        lambda: emb.similarity(['a', 3], [good]),
        lambda: emb.profile(['a', 3], [good], 1),
        lambda: emb.score(['a', 3], [good]),
    ):
        with pytest.raises(ValueError, match=r'^texts\[1\]: int is not a text'): call()
    with pytest.raises(ValueError, match='2 texts and 1 images are not pairs'): judge.profile(['a', 'b'], [good], 1)
    for name in ('texts', 'images'):
        with pytest.raises(TypeError, match=f'{name} is a set, which has no order'):
            emb.encode_text({'a'}) if name == 'texts' else emb.encode_image({good})


def test_embeddings_as_arrays(emb):
    t, i = emb.encode_text(['a', 'b']), emb.encode_image([FILES['RGB.png']])
    assert torch.equal(emb.score(t.numpy(), i.numpy()), emb.score(t, i)) and torch.equal(
        emb.similarity(t.numpy(), i).cosine, emb.similarity(t, i).cosine
    )
    assert torch.equal(emb.encode_text(np.array(['a', 'b'])), t)
    with pytest.raises(
        ValueError, match=r'texts: embeddings must have the shape \(B, 24\) and the type float32, got float64 \(2, 24\)'
    ):
        emb.score(t.double(), i)
    with pytest.raises(TypeError, match='texts is a result, Encoded; pass its rows: texts.embedding'):
        emb.score(emb.encode_text(['a'], on_error='flag'), i)


def test_pairs_refuse_what_is_for_embeddings(judge):
    pixels, tokens = judge.preprocess(FILES['RGB.png'])[None], judge.tokenize(['a'])
    for call in (
        lambda: judge.encode_tokens(tokens),
        lambda: judge.encode_pixels(pixels),
        lambda: judge.similarity(['a'], [FILES['RGB.png']]),
        lambda: judge.classify_text(torch.zeros(1, 24)),
        lambda: judge.score(torch.zeros(1, 24), torch.zeros(1, 24)),
    ):
        with pytest.raises(TypeError, match='scores pairs and has no embeddings'): call()


def test_pictures_of_pillow_need_no_decoder(emb, plain):
    """Gray, palettes, transparency and 16 bits: what an artifact without decoders makes of an opened picture is what
    another makes of its file."""
    seen = set()
    for name in ('RGB.png', 'RGBA.png', 'L.png', 'still.gif', *(n for n in FILES if '16' in n or 'palette' in n)):
        if name == '16 bit rgb.png' or not emb.encode_image([FILES[name]], on_error='flag').ok[0]: continue
        image = Image.open(io.BytesIO(FILES[name]))
        seen.add(image.mode)
        assert torch.equal(plain.preprocess(image), emb.preprocess(FILES[name])), name
    assert {'RGB', 'RGBA', 'L', 'P'} <= seen
    for mode in ('PA', 'La', 'RGBa', 'RGBX', 'CMYK', 'I', 'I;16', '1'):
        assert plain.preprocess(Image.new(mode, (5, 4))).shape == (3, 48, 48)
    with pytest.raises(ValueError, match='mode F'): plain.preprocess(Image.new('F', (5, 4)))


def test_what_pillow_raises_stays_with_its_item(emb):
    "A picture is opened lazily: its pixels may turn out broken when they are read, with errors of any kind."
    class Broken(Image.Image):
        def getexif(self): raise SyntaxError('broken PNG file')
    e = emb.encode_image([Broken(), FILES['RGB.png']], on_error='flag')
    assert e.ok.tolist() == [False, True] and e.errors[0] == 'Pillow cannot read this image: broken PNG file'


def test_a_file_that_fills_its_batches_itself():
    """Exported with deterministic=4: the Embedder fills nothing more, asked for it or not, and an item has the same
    bits in any company."""
    path = tiny.exported('tiny-deterministic', tiny.model, deterministic=4)
    emb, asked = load(path), load(path, batch_size=16, deterministic=True)
    assert emb.deterministic and not emb.fills and not asked.fills and emb.lengths == [16]
    texts, files = (
        ['a', 'a green triangle above a red circle', 'b'] * 3,
        [FILES['RGB.png'], FILES['gray.jpg'], FILES['quality 75.jpg']] * 3,
    )
    assert torch.equal(emb.encode_text(texts), torch.cat([asked.encode_text([t]) for t in texts]))
    assert torch.equal(emb.encode_tokens(emb.tokenize(texts)), emb.encode_text(texts))
    assert torch.equal(emb.encode_image(files), torch.cat([asked.encode_image([f]) for f in files]))


def test_devices_and_threads_are_checked():
    with pytest.raises(ValueError, match="device must be 'cpu', 'cuda', 'cuda:1' or the like, got 'toaster'"):
        load(tiny.artifact(), 'toaster')
    with pytest.raises(ValueError, match='threads must be at least 1, got 0'): load(tiny.artifact(), threads=0)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device='cuda': torch sees no CUDA device here"):
            load(tiny.artifact(), 'cuda')


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
    refused(bytes(hole), r'm.pt is damaged: \S+ is not as it was written')
    with pytest.raises(FileNotFoundError, match='none.pt not found'): load(tmp_path/'none.pt')


def test_a_damaged_byte_is_found_when_asked(tmp_path):
    """One bit of a weight, of a table, of a text of the code: by the card's hash, or by the CRCs, which torch leaves
    alone, where a card has none."""
    whole = tiny.artifact().read_bytes()
    table = tiny.pipelines()[0].model.ids.numpy().tobytes()
    from tests.exporters.verify.test_verify import rewritten
    rewritten(tiny.artifact(), tmp_path/'old.pt', [('/extra/card.json', b'"records_sha256"', b'"records_sha2_6"')])
    assert 'records_sha256' not in load(tmp_path/'old.pt', check=True).card
    for what in (tiny.model().image_proj.weight.detach().numpy().tobytes(), table, b'top_k must not be negative'):
        for content in (whole, (tmp_path/'old.pt').read_bytes()):
            hurt = bytearray(content)
            hurt[content.index(what) + 2] ^= 1
            (tmp_path/'m.pt').write_bytes(hurt)
            with pytest.raises(ValueError, match=r'm.pt is damaged: (data|code)/\S+ is not as it was written'):
                load(tmp_path / 'm.pt', check=True)
            assert load(tmp_path/'m.pt').encode_text(['a']).shape == (1, 24)
    for check in (True, False): assert load(tiny.artifact(), check=check).encode_text(['a']).shape == (1, 24)


def test_changed_code_is_refused_when_asked(tmp_path):
    from tests.exporters.verify.test_verify import rewritten

    rewritten(
        tiny.artifact(),
        tmp_path / 'm.pt',
        [('/code/__torch__/mmembed/exporters/artifact', b'must not be negative', b'should not be minus ')],
    )
    with pytest.raises(ValueError, match='m.pt is damaged: a record, of code or data, is not as it was written'):
        load(tmp_path / 'm.pt', check=True)
    assert load(tmp_path/'m.pt').encode_text(['a']).shape == (1, 24)


def test_missing_torchcodec_is_explained():
    program = '''
import sys; sys.modules['torchcodec'] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == 'torchcodec' else find(name, *a)
from mmembed.runtime.embedder import load
try: load(sys.argv[1])
except ImportError as e: print(e)
print(load(sys.argv[2]).encode_text(['a']).shape)
'''
    run = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', program, tiny.artifact(), tiny.artifact(False)],
        capture_output=True,
        text=True,
    )
    assert 'needs torchcodec: pip install torchcodec' in run.stdout and 'torch.Size([1, 24])' in run.stdout, run


def test_reprs(emb):
    assert emb.card['short_hash'] in repr(emb) and 'dim=24' in repr(emb) and 'tiny-True.pt' in repr(emb)
    assert emb.card['weights_sha256'] in emb._repr_html_()


def test_reason():
    assert (
        reason(ValueError('The following operation failed\n  File "x"\nbuiltins.ValueError: pixels: no\n'))
        == 'pixels: no'
    )
    assert reason(RuntimeError('read_png, /__w/a/b.cpp:12, broken')) == 'broken'
    assert reason(RuntimeError('CUDA error: no device\nCompile with X\n')) == 'CUDA error: no device'
    assert reason(ValueError()) == 'ValueError'


class Recorder:
    "A loaded module that counts the bytes of text it is given."
    def __init__(self, module): self.module, self.read = module, []
    def __getattr__(self, name):
        inner = getattr(self.module, name)
        if name not in ('tokenize', 'encode_text_bytes', 'score_pairs'): return inner
        def call(data, offsets, *rest):
            self.read.append(len(data))
            return inner(data, offsets, *rest)
        return call


@pytest.mark.parametrize(
    'text',
    ['a small red circle ' * 50_000, '一个红色的圆，' * 50_000, b'a small red circle ' * 50_000],
    ids=['words', 'Chinese', 'bytes'],
)
def test_of_a_long_text_no_more_is_tokenized_than_can_matter(text):
    emb, judge = load(tiny.artifact()), load(tiny.pair_artifact())
    short, image = (
        text[:2000] if isinstance(text, str) else text[:2000].decode(),
        torch.zeros(3, 40, 40, dtype=torch.uint8),
    )
    want, scores = emb.encode_text([short, 'a']), judge.score_pairs([short], [image])
    emb.module, judge.module = Recorder(emb.module), Recorder(judge.module)
    assert torch.equal(emb.encode_text([text, 'a']), want) and torch.equal(judge.score_pairs([text], [image]), scores)
    emb.tokenize([text])
    assert emb.module.read and sum(emb.module.read) < 40_000 and sum(judge.module.read) < 20_000


def test_a_beginning_that_fills_no_row_is_not_enough():
    "A cut is taken only where the tokens up to it fill a row; else four times as much is tried."
    head = enough('a ' * 400, re.compile(b'a(?= )'), lambda head: len(head) > 100, 10)
    assert 100 < len(head) <= 160 and ('a ' * 400).encode().startswith(head)
    assert enough('a ' * 400, re.compile(b'a(?= )'), lambda head: False, 10) == 'a ' * 400


def test_what_cannot_be_cut_is_read_whole(emb):
    for text in ['q' * 50_000, ' ' * 50_000 + 'a red circle', '\u0301' * 20_000]:
        assert emb.enough(text) == text
        assert torch.equal(emb.tokenize([text]).ids, emb.module.tokenize(*pack([text]))[0])


def test_an_item_that_failed_is_never_first(emb, judge, tmp_path):
    "A row of zeros would beat every image that is unlike the text."
    done = emb.encode_image([b'broken', FILES['quality 75.jpg'], FILES['RGBA.png']], on_error='flag')
    scores = emb.score(['a', 'b'], done.embedding)
    assert scores[:, 0].isnan().all() and torch.equal(scores[:, 1:], emb.score(['a', 'b'], done.embedding[1:]))
    r, want = emb.rank(['a', 'b'], done.embedding), emb.rank(['a', 'b'], done.embedding[1:])
    assert (
        torch.equal(r.index[:, :2], want.index + 1)
        and r.index[:, 2].eq(0).all()
        and torch.allclose(r.probability[:, :2], want.probability)
    )
    assert r.score[:, 2].isnan().all() and r.probability[:, 2].eq(0).all() and 'nan' in r._repr_html_()
    assert emb.rank(['a'], torch.zeros(2, 24)).probability.eq(0).all() and emb.rank(
        ['a'], done.embedding, by='image'
    ).index.shape == (3, 1)
    assert 'nan' in emb.similarity(['a'], done.embedding)._repr_html_()
    named = load(tiny.int8_labelled())
    rows = named.encode_image([b'broken', FILES['RGBA.png']], on_error='flag').embedding
    assert named.score(['a'], rows)[0].isnan().tolist() == [True, False] and [
        len(x) for x in named.classify_image(rows)
    ] == [0, 2]


def test_the_callers_autocast_changes_nothing(emb, judge):
    "Where texts failed, and a file of torch's own layers was off by 0.002; the first call of a fresh file too."
    images = [FILES['RGBA.png'], FILES['quality 75.jpg']]
    for path in (tiny.artifact(), tiny.portable()):
        cold, want = load(path), load(path)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            got = (
                cold.encode_text(tiny.CAPTIONS),
                cold.encode_image(images),
                cold.score(['a'], images),
                cold.encode_tokens(cold.tokenize(['a'])),
            )
            assert torch.is_autocast_enabled('cpu') and (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        assert torch.equal(got[0], want.encode_text(tiny.CAPTIONS)) and torch.equal(got[1], want.encode_image(images))
        assert (
            torch.equal(got[2], want.score(['a'], images))
            and torch.equal(got[3], want.encode_text(['a']))
            and torch.equal(cold.encode_text(tiny.CAPTIONS), got[0])
        )
    with torch.autocast('cpu'): scores = load(tiny.pair_artifact()).score_pairs(['a'], images[:1])
    assert torch.equal(scores, judge.score_pairs(['a'], images[:1]))


def test_an_embedder_pickles_by_its_path(emb, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny.artifact().parent)
    mine = Embedder(tiny.artifact().name, batch_size=3, deterministic=True)
    data = pickle.dumps(mine)
    monkeypatch.chdir(tmp_path)
    again = pickle.loads(data)
    assert (
        len(data) < 1000
        and (again.batch_size, again.deterministic) == (3, True)
        and torch.equal(again.encode_text(['a']), mine.encode_text(['a']))
    )
    shutil.copy(tiny.artifact(), tmp_path/'m.pt')
    data = pickle.dumps(load(tmp_path/'m.pt'))
    shutil.copy(tiny.other(), tmp_path/'m.pt')
    with pytest.raises(ValueError, match='m.pt is not the artifact that was pickled'): pickle.loads(data)


def test_a_path_that_is_not_utf8(emb, tmp_path):
    path = tmp_path/os.fsdecode(b'caf\xe9')/os.fsdecode(b'm\xff.pt')
    path.parent.mkdir()
    path.write_bytes(tiny.artifact().read_bytes())
    again = load(path)
    assert torch.equal(again.encode_text(['a']), emb.encode_text(['a'])) and repr(again).startswith('Embedder(')
    assert verify(path, fresh=False, cpp=False).ok  # the command below asks a fresh process, too
    program = 'import sys; from mmembed.cli.main import main; sys.exit(main(sys.argv[1:]))'
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', program, 'verify', path], capture_output=True)
    assert done.returncode == 0 and done.stdout.startswith(b'm\xff.pt '), done


def test_decoders_are_silent(tmp_path):
    "libjpeg and libpng say nothing about anybody's file; what others print on standard error stays."
    jpeg, png = FILES['quality 75.jpg'], FILES['RGB.png']
    at, chunk, wrong = jpeg.index(b'\xff\xdb'), b'cHRM' + bytes(3), png[12:24] + b'\x05' + png[25:29]
    for name, data in (
        ('more.jpg', jpeg[:at] + bytes(5) + jpeg[at:]),
        ('odd.png', png[:33] + (3).to_bytes(4, 'big') + chunk + zlib.crc32(chunk).to_bytes(4, 'big') + png[33:]),
        ('bits.png', png[:12] + wrong + zlib.crc32(wrong).to_bytes(4, 'big') + png[33:]),
    ):
        (tmp_path / name).write_bytes(data)
    program = '''
import ctypes, sys
from mmembed.runtime.embedder import load
emb = load(sys.argv[1])
for _ in range(2): done = emb.encode_image(sys.argv[2:], on_error='flag')
print(done.ok.tolist())
libc = ctypes.CDLL(None)
libc.perror(b'still here')
load(sys.argv[1]).encode_image(sys.argv[2:4])
'''
    files = [tmp_path/n for n in ('more.jpg', 'odd.png', 'bits.png')]
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', program, tiny.artifact(), *files], capture_output=True, text=True
    )
    assert done.stdout == '[True, True, False]\n' and re.fullmatch(r'still here: \w.*\n', done.stderr), done
