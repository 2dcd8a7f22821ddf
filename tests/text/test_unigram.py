"""Unigram models against `sentencepiece`, in every form."""
import functools
import json
import pickle

import pytest
import torch

from mmembed.core import pack
from mmembed.text.pipeline import TextPipeline
from tests.helpers import FORMS, data_path, in_form

sentencepiece = pytest.importorskip('sentencepiece')
from benchmarks import fuzz_text, fuzz_unigram  # noqa: E402


@functools.cache
def small(name='byte fallback'): return fuzz_unigram.learn(fuzz_unigram.LINES, **fuzz_unigram.VARIANTS[name])


@pytest.fixture(scope='module')
def large(tmp_path_factory, request):
    return fuzz_unigram.multilingual(data_path('text'), request.config.cache.mkdir('mmembed'))


def agree(model, texts, form='scripted', batch=1000, **options):
    tp = in_form(TextPipeline.from_sentencepiece(model, **{'max_length': 1 << 20, **options}), form)
    assert fuzz_unigram.differences(model, tp.tokenize, texts, batch)[:5] == []


@pytest.mark.parametrize('form', FORMS)
def test_every_form(form): agree(small(), fuzz_unigram.LINES[:12] + fuzz_text.random_texts(800, seed=1), form)


@pytest.mark.parametrize('name', fuzz_unigram.VARIANTS)
def test_rules_of_the_model(name):
    texts = [*fuzz_text.random_texts(1000, seed=2), *fuzz_text.random_bytes(300, seed=3), '  a  b ', '▁a▁ ▁', ' ', '\u200b', '\ufdfa x', '¨ ¨', 'don x[SEP]é[sep]']
    agree(small(name), texts, 'eager')
    agree(small(name), texts[::5], batch=1)


def test_code_points():
    some = fuzz_text.code_points(step=7)
    agree(small(), some + [f'a{c}b' for c in some], batch=20_000)


@pytest.mark.parametrize('seed', range(12))
def test_ties_fall_as_they_do_there(seed):
    model, texts = fuzz_unigram.tied(seed)
    agree(model, texts, 'eager')


def test_long_texts_are_summed_as_they_are_there():
    model, _ = fuzz_unigram.tied(1)
    agree(model, [t * 50 for t in fuzz_unigram.tied(2)[1][:20]], 'eager')


def test_multilingual_model_on_real_texts(large):
    agree(large, fuzz_text.corpus(data_path('text')) + fuzz_text.random_texts(3000, seed=4))


@pytest.mark.parametrize('batch', [1, 7, 64])
def test_batch_sizes(batch): agree(small(), fuzz_text.random_texts(200, seed=5), batch=batch)


@pytest.mark.parametrize('form', FORMS)
def test_awkward_batches(form):
    model = small()
    tp, sp = in_form(TextPipeline.from_sentencepiece(model, max_length=16), form), sentencepiece.SentencePieceProcessor(model_proto=model)
    for texts in [[''], ['', ''], ['\0'], [' \n'], ['a ' * 500_000], ['\u0301' * 1000], ['a' * 20_000], ['e\u0301' * 300, ''], ['\ud800x']]:
        ids, mask = tp.tokenize(*pack(texts))
        assert ids.dtype == torch.int64 and ids.shape == mask.shape
        want = [sp.encode(t.encode('utf-8', 'surrogatepass').decode(errors='replace'))[:16] for t in texts]
        assert [r[m > 0].tolist() for r, m in zip(ids, mask)] == want
    assert tp.tokenize(*pack([])).ids.shape == (0, 0)


def test_frame_and_padding():
    model = fuzz_unigram.learn(fuzz_unigram.LINES, pad_id=3)
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    tp = TextPipeline.from_sentencepiece(model, max_length=12, pad_to=0, add_bos=True, add_eos=True)
    texts = ['a small circle', 'a', '', 'a large blue square ' * 9]
    ids, mask = tp(texts)
    assert ids.shape == (4, 12) and (ids[mask == 0] == 3).all()
    want = [sp.encode(t)[:10] for t in texts]
    assert [r[m > 0].tolist() for r, m in zip(ids, mask)] == [[sp.bos_id(), *w, sp.eos_id()] for w in want]


def test_spans_cover_the_characters():
    tp = TextPipeline.from_sentencepiece(small(), max_length=64)
    text = 'A small ﬁﬆ café ☃ e\u0301'
    enc = tp.encode([text])
    spans = enc.spans[0, :int(enc.mask.sum())].tolist()
    assert ''.join(text.encode()[a:b].decode() for i, (a, b) in enumerate(spans) if spans[i - 1] != [a, b]).replace(' ', '') == text.replace(' ', '')


def test_decode_is_the_references():
    model = small()
    tp, sp = TextPipeline.from_sentencepiece(model), sentencepiece.SentencePieceProcessor(model_proto=model)
    for t in [*fuzz_unigram.LINES[:10], *fuzz_text.random_texts(300, seed=6)]: assert tp.decode(sp.encode(t)) == sp.decode(sp.encode(t))


def test_spec_and_pickle_rebuild_it():
    tp = TextPipeline.from_sentencepiece(small(), max_length=32, add_eos=True)
    texts = fuzz_text.random_texts(100, seed=7)
    for other in [TextPipeline.from_spec(json.loads(json.dumps(tp.spec()))), pickle.loads(pickle.dumps(tp))]:
        assert torch.equal(other(texts).ids, tp(texts).ids) and other.spec() == tp.spec()


def test_what_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError): TextPipeline.from_sentencepiece(tmp_path/'none.model')
    (tmp_path/'x.model').write_bytes(b'no model')
    with pytest.raises(ValueError, match='not a SentencePiece model'): TextPipeline.from_sentencepiece(tmp_path/'x.model')
    for options, says in [(dict(model_type='bpe'), "'BPE'"), (dict(treat_whitespace_as_suffix=True), 'treat_whitespace_as_suffix')]:
        with pytest.raises(ValueError, match=says): TextPipeline.from_sentencepiece(fuzz_unigram.learn(fuzz_unigram.LINES, **options))
    with pytest.raises(ValueError, match='from_sentencepiece'): TextPipeline({'model': {'type': 'Unigram', 'vocab': [['a', -1.]]}})
    with pytest.raises(ValueError, match='add_eos'): TextPipeline.from_sentencepiece(fuzz_unigram.learn(fuzz_unigram.LINES, eos_id=-1), add_eos=True)
