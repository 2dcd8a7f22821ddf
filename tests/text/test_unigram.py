"""Unigram models against `sentencepiece`, and their tokenizer.json against `tokenizers`, in every form."""
import functools
import json
import pickle
import re

import pytest
import torch

from mmembed.core.packing import pack
from mmembed.text.graphemes import Graphemes
from mmembed.text.pipeline import TextPipeline
from mmembed.text.unicode import Utf8
from tests.helpers import FORMS, data_path, in_form

sentencepiece = pytest.importorskip('sentencepiece')
from benchmarks import fuzz_text, fuzz_unigram  # noqa: E402


@functools.cache
def small(name='byte fallback'): return fuzz_unigram.learn(fuzz_unigram.LINES, **fuzz_unigram.VARIANTS[name])


@pytest.fixture(scope='module')
def large(tmp_path_factory, request):
    return fuzz_unigram.multilingual(data_path('text'), request.config.cache.mkdir('mmembed'))


def agree(model, texts, form='scripted', batch=1000, **options):
    tp = in_form(TextPipeline.from_sentencepiece(model, **{'max_length': 1 << 20, **options}), form, ['tokenize'])
    assert fuzz_unigram.differences(model, tp.tokenize, texts, batch)[:5] == []


@pytest.mark.parametrize('form', FORMS)
def test_every_form(form): agree(small(), fuzz_unigram.LINES[:12] + fuzz_text.random_texts(800, seed=1), form)


@pytest.mark.parametrize('name', fuzz_unigram.VARIANTS)
def test_rules_of_the_model(name):
    texts = [
        *fuzz_text.random_texts(1000, seed=2),
        *fuzz_text.random_bytes(300, seed=3),
        '  a  b ',
        '▁a▁ ▁',
        ' ',
        '\u200b',
        '\ufdfa x',
        '¨ ¨',
        'don x[SEP]é[sep]',
    ]
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
    tp, sp = (
        in_form(TextPipeline.from_sentencepiece(model, max_length=16), form, ['tokenize']),
        sentencepiece.SentencePieceProcessor(model_proto=model),
    )
    for texts in [
        [''],
        ['', ''],
        ['\0'],
        [' \n'],
        ['a ' * 500_000],
        ['\u0301' * 1000],
        ['a' * 20_000],
        ['e\u0301' * 300, ''],
        ['\ud800x'],
    ]:
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
    assert ''.join(text.encode()[a:b].decode() for i, (a, b) in enumerate(spans) if spans[i - 1] != [a, b]).replace(
        ' ', ''
    ) == text.replace(' ', '')


def test_decode_is_the_references():
    model = small()
    tp, sp = TextPipeline.from_sentencepiece(model), sentencepiece.SentencePieceProcessor(model_proto=model)
    for t in [*fuzz_unigram.LINES[:10], *fuzz_text.random_texts(300, seed=6)]:
        assert tp.decode(sp.encode(t)) == sp.decode(sp.encode(t))


def test_spec_and_pickle_rebuild_it():
    tp = TextPipeline.from_sentencepiece(small(), max_length=32, add_eos=True)
    texts = fuzz_text.random_texts(100, seed=7)
    for other in [TextPipeline.from_spec(json.loads(json.dumps(tp.spec()))), pickle.loads(pickle.dumps(tp))]:
        assert torch.equal(other(texts).ids, tp(texts).ids) and other.spec() == tp.spec()


def test_what_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError): TextPipeline.from_sentencepiece(tmp_path/'none.model')
    (tmp_path/'x.model').write_bytes(b'no model')
    with pytest.raises(ValueError, match='not a SentencePiece model'):
        TextPipeline.from_sentencepiece(tmp_path / 'x.model')
    for options, says in [
        (dict(model_type='bpe'), "'BPE'"),
        (dict(treat_whitespace_as_suffix=True), 'treat_whitespace_as_suffix'),
    ]:
        with pytest.raises(ValueError, match=says):
            TextPipeline.from_sentencepiece(fuzz_unigram.learn(fuzz_unigram.LINES, **options))
    with pytest.raises(ValueError, match='add_eos'):
        TextPipeline.from_sentencepiece(fuzz_unigram.learn(fuzz_unigram.LINES, eos_id=-1), add_eos=True)


# ---- the same models as a tokenizer.json

KINDS = list(fuzz_unigram.FILES)


@functools.cache
def small_file(kind): return fuzz_unigram.as_file(small(), kind)


def pipeline_of(tok, **options): return TextPipeline(json.loads(tok.to_str()), **{'max_length': 1 << 20, **options})


def agree_with_file(tok, texts, form='scripted', batch=1000):
    assert (
        fuzz_unigram.file_differences(tok, in_form(pipeline_of(tok), form, ['tokenize']).tokenize, texts, batch)[:5]
        == []
    )


@pytest.mark.parametrize('form', FORMS)
def test_files_in_every_form(form):
    agree_with_file(
        small_file('converted, bytes'),
        fuzz_unigram.LINES[:12] + fuzz_text.random_texts(500, seed=8) + fuzz_unigram.marked(300, seed=8),
        form,
    )


@pytest.mark.parametrize('kind', KINDS)
def test_rules_of_files(kind):
    texts = [
        *fuzz_text.random_texts(600, seed=9),
        *fuzz_text.random_bytes(200, seed=10),
        *fuzz_unigram.marked(1500, seed=11),
        '  a  b ',
        '▁a▁ ▁',
        ' ',
        '',
    ]
    agree_with_file(small_file(kind), texts, 'eager')
    agree_with_file(small_file(kind), texts[::40], 'eager', batch=1)


def test_files_at_every_code_point():
    some = fuzz_text.code_points(step=23)
    agree_with_file(
        small_file('T5 of transformers 5'), some + [f'a{c}b' for c in some] + [f'e{c}' for c in some], batch=20_000
    )


def test_multilingual_file_on_real_texts(large):
    agree_with_file(
        fuzz_unigram.as_file(large, 'converted, bytes'),
        fuzz_text.corpus(data_path('text')) + fuzz_text.random_texts(1000, seed=12),
    )


@pytest.mark.parametrize('seed', range(6))
def test_ties_in_files(seed):
    model, texts = fuzz_unigram.tied(seed)
    for kind in ('white space only', 'no words'): agree_with_file(fuzz_unigram.as_file(model, kind), texts, 'eager')


@pytest.mark.parametrize('form', FORMS)
def test_awkward_batches_of_files(form):
    tok = small_file('converted')
    tp = in_form(pipeline_of(tok, max_length=16), form, ['tokenize'])
    tok = type(tok).from_str(tok.to_str())
    tok.enable_truncation(16)
    for texts in [
        [''],
        ['', ''],
        ['\0'],
        [' \n'],
        ['\u0301' * 1000],
        ['a' * 5000],
        ['e\u0301' * 300, ''],
        ['\ud800x'],
        ['</s>' * 9, '<mask>'],
    ]:
        ids, mask = tp.tokenize(*pack(texts))
        want = [tok.encode(t.encode('utf-8', 'surrogatepass').decode(errors='replace')).ids for t in texts]
        assert [r[m > 0].tolist() for r, m in zip(ids, mask)] == want
    assert tp.tokenize(*pack([])).ids.shape[0] == 0


@pytest.mark.parametrize('kind', KINDS)
def test_pairs_spans_and_decode_of_files(kind):
    tok = small_file(kind)
    tp = pipeline_of(tok, max_length=64)
    texts = ['A small red circle', 'Crème brûlée; naïve', '一个红色的小圆 ☃☃ x', 'a <mask> b</s>c', '각 한국어']
    texts += ["don't, I'll", '']
    enc = tp.encode(texts, texts[::-1])
    for i, (a, b) in enumerate(zip(texts, texts[::-1])):
        e = tok.encode(a, b)
        n = int(enc.mask[i].sum())
        assert enc.ids[i, :n].tolist() == e.ids and enc.segment_ids[i, :n].tolist() == e.type_ids
        for span, theirs, seq in zip(enc.spans[i].tolist(), e.offsets, e.sequence_ids):
            if seq is not None: assert span == [len((a, b)[seq][:c].encode()) for c in theirs]
        assert tp.decode(e.ids) == tok.decode(e.ids)


def test_unicodes_own_clusters():
    lines = data_path('text', 'unicode', 'GraphemeBreakTest.txt').read_text(encoding='utf-8').split('\n')
    cases = [
        [[chr(int(h, 16)) for h in c.split('×')] for c in line.split('#')[0].strip(' ÷\t').split('÷')]
        for line in lines
        if line[:1] == '÷'
    ]
    texts = [''.join(map(''.join, c)) for c in cases if not any('\ud800' <= h < '\ue000' for part in c for h in part)]
    assert len(texts) > 600
    x = Utf8()(*pack(texts))[0]
    begins = in_form(Graphemes(), 'scripted')(x)
    ours = [[int(j - a) for j in range(a, b) if begins[j]] for a, b in zip(x.offsets.tolist(), x.offsets[1:].tolist())]
    sizes = [[len(part) for part in c] for c in cases if not any('\ud800' <= h < '\ue000' for part in c for h in part)]
    assert ours == [[sum(s[:k]) for k in range(len(s))] for s in sizes]


@pytest.mark.filterwarnings('ignore:The sentencepiece tokenizer')
def test_what_transformers_makes_of_a_model(tmp_path):
    convert = pytest.importorskip('transformers.convert_slow_tokenizer')
    (tmp_path/'m.model').write_bytes(small())

    class Slow:
        vocab_file, _extra_ids, convert_tokens_to_ids = (
            str(tmp_path / 'm.model'),
            10,
            staticmethod({'<s>': 1, '</s>': 2}.get),
        )
    texts = fuzz_unigram.LINES[:10] + fuzz_unigram.marked(200, seed=13) + ['<extra_id_3> x']
    for kind in (convert.T5Converter, convert.XLMRobertaConverter):
        tok = kind(Slow()).converted()
        agree_with_file(type(tok).from_str(tok.to_str()), texts, 'eager')


def test_what_is_refused_of_files():
    good = json.loads(small_file('converted').to_str())
    for change, says in [
        ({'normalizer': {'type': 'NFKC'}}, "normalizer is 'NFKC'"),
        ({'pre_tokenizer': {'type': 'ByteLevel'}}, "pre_tokenizer is 'ByteLevel'"),
        ({'model': {**good['model'], 'unk_id': None}}, 'unk_id is None'),
        ({'added_tokens': [{'id': 0, 'content': 'x', 'normalized': True}]}, 'normalized=true'),
        (
            {'normalizer': {'type': 'Replace', 'pattern': {'Regex': 'a|b'}, 'content': ''}},
            "Replace of {'Regex': 'a|b'}",
        ),
    ]:
        with pytest.raises(ValueError, match=re.escape(says)): TextPipeline({**good, **change})
