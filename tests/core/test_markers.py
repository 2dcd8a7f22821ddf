"""A `str` that names an image is not embedded as its words, at whatever door it comes in, unless it is marked as
`Text`."""
import pytest
import torch

import mmembed as mm
from mmembed.exporters.verify import samples as cases
from mmembed.core.markers import doubt, names_image
from mmembed.retrieval.query import Query
from mmembed.runtime.embedder import load

from tests.exporters import tiny

NAMES = [
    'cat.jpg', 'photos/CAT.JPEG', '/my photos/a cat.webp', 'https://example.org/a/cat.png?size=1',
    'file:///cat.gif', 'data:image/png;base64,AAAA', r'C:\a cat.tif',
]
WORDS = [
    '', 'a cat', 'a photo called cat.jpg', 'see https://example.org/cat.png', 'https://example.org/cats',
    'cat.jpg\ndog.jpg', 'http://[x', 'jpg', '.',
]


@pytest.fixture(scope='module')
def emb(): return load(tiny.artifact())


@pytest.mark.parametrize('name', NAMES)
def test_what_names_an_image(name, emb):
    assert names_image(name) and not doubt(mm.Text(name))
    with pytest.raises(ValueError, match=r'texts\[1\]: .* names an image: .*Text\(\.\.\.\) for the words'):
        emb.encode_text(['a', name])
    marked, flagged = emb.encode_text([mm.Text(name)]), emb.encode_text(['a', name, 'b'], on_error='flag')
    assert (
        torch.equal(marked, emb.encode_text([name.encode()]))
        and flagged.ok.tolist() == [True, False, True]
        and 'names an image' in flagged.errors[1]
    )


def test_what_does_not(emb):
    assert [w for w in WORDS if names_image(w)] == [] and emb.encode_text(WORDS).shape == (len(WORDS), emb.dim)


def test_a_file_that_is_there_may_have_blanks_in_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not names_image('a cat.jpg')
    (tmp_path/'a cat.jpg').write_bytes(b'')
    assert names_image('a cat.jpg') and not names_image('a cat.jpg', local=False)


def test_images_are_marked_too(emb, tmp_path):
    path = tmp_path/'x'
    path.write_bytes(cases.images()['RGB.png'])
    want = emb.encode_image([path])
    assert torch.equal(emb.encode_image([mm.Image(str(path))]), want) and torch.equal(
        emb.encode_image([mm.Image(path.read_bytes())]), want
    )
    assert repr(mm.Image('cat.jpg')) == "Image('cat.jpg')" and repr(mm.Text('cat.jpg')) == "Text('cat.jpg')"
    with pytest.raises(ValueError, match='fetch it and pass its bytes'): mm.Image('https://example.org/cat.jpg')
    with pytest.raises(ValueError, match='Image is not a text'): emb.encode_text([mm.Image(path)])


def test_a_query_and_every_way_to_score(emb, tmp_path):
    with pytest.raises(ValueError, match='names an image'): Query('cat.jpg').vector(lambda: emb, emb.dim)
    (tmp_path/'x.png').write_bytes(cases.images()['RGB.png'])
    assert (
        Query(mm.Image(str(tmp_path / 'x.png'))).vector(lambda: emb, emb.dim)
        @ emb.encode_image([tmp_path / 'x.png'])[0].numpy()
        > 0.999
    )
    for ask in (emb.score, emb.rank, emb.similarity):
        with pytest.raises(ValueError, match='names an image'): ask(['cat.jpg'], [tmp_path/'x.png'])


def test_what_is_declared_a_text_is_one(emb):
    "A column of texts holds whatever it holds."
    from mmembed.retrieval.spark import predict_texts
    assert torch.isfinite(torch.from_numpy(predict_texts(tiny.artifact())()(['cat.jpg', 'a']))).all()
