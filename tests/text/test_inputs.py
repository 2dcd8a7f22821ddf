"""What becomes of odd and wrong input: the table in the pipeline's notebook, for every family in every form."""
import functools
import itertools

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks import fuzz_text
from mmembed.core.packing import pack
from mmembed.text.pipeline import TextPipeline
from tests.helpers import in_form, reloaded

CAPTIONS = [
    'a small red circle left of a large blue square', '一个红色的小圆在蓝色方块左边', 'Crème brûlée, naïve café!',
    "don't I'll be UNAFFABLE",
] * 5
VOCAB = {
    w: i
    for i, w in enumerate(
        ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '一个', '红色', '的', '小', '圆', 'a', 'red', ',', '\0', '\ufffd']
    )
}
FAMILIES = {
    model: functools.partial(TextPipeline.learn, CAPTIONS, 400, max_length=16, model=model)
    for model in ('wordpiece', 'words', 'bpe', 'unigram')
} | {
    'clip': lambda: TextPipeline.from_open_clip('ViT-B-32', max_length=16),
    'jieba': lambda: TextPipeline.from_jieba(VOCAB, 16),
}
everywhere = pytest.mark.parametrize('form', ['eager', 'scripted', 'loaded'])
families = pytest.mark.parametrize('family', FAMILIES)


@functools.cache
def made(family): return FAMILIES[family]().eval()


@functools.cache
def module(family, form): return in_form(made(family), form)


@families
@everywhere
def test_empty(family, form):
    tp, m = made(family), module(family, form)
    special = sum(map(len, tp.single.ids))
    for ids, mask in m([]), m.tokenize(*pack([])):
        assert ids.shape == mask.shape == (0, special) and ids.dtype == mask.dtype == torch.int64
    ids, mask = m(['', ''])
    assert ids.shape == (2, 8) and mask.sum(1).tolist() == [special] * 2
    enc = m.encode([], []) if form == 'eager' else m.encode([], None)
    assert enc[0].shape[0] == 0 and enc[3].shape[2] == 2


@pytest.mark.parametrize('family', ['clip', 'unigram', 'jieba'])  # WordPiece: what Triton gets, in test_triton.py
def test_what_is_frozen_is_saved_and_loaded(family):
    frozen = in_form(made(family), 'frozen', ['tokenize'])
    texts = pack([*CAPTIONS, '', ' ', '\0\ud800', 'a' * 300, "it's 한국어 \u0301e\u0301 🎉 [SEP] <|endoftext|>"])
    for want, *got in zip(made(family).tokenize(*texts), frozen.tokenize(*texts), reloaded(frozen).tokenize(*texts)):
        assert all(torch.equal(want, x) for x in got)


@families
@everywhere
def test_texts_of_a_million_characters(family, form):
    m, n = module(family, form), 1_000_000 if form == 'loaded' else 50_000
    for text in ['a' * n, 'red circle ' * (n // 10), '\0' * n]:
        ids, mask = m.tokenize(*pack([text, 'a red']))
        assert ids.shape == mask.shape and ids.shape[0] == 2 and ids.shape[1] in (8, 16)
        assert torch.equal(ids[1, :8], made(family)(['a red']).ids[0]) and (' ' not in text or int(mask[0].sum()) == 16)
        few = made(family)([text[:2000]]).ids[0]
        assert torch.equal(ids[0, :len(few)], few)


@families
@everywhere
def test_surrogates_nul_and_bytes(family, form):
    tp, m = made(family), module(family, form)
    same = [
        (['\ud800x', 'a'], [b'\xed\xa0\x80x', 'a']),
        (['\ud800x'], ['\ufffd\ufffd\ufffdx']),
        ([b'a red \xff\xe4\xb8'], ['a red \ufffd\ufffd']),
        ([bytearray(b'red'), memoryview(b'a')], ['red', 'a']),
    ]
    for a, b in same: assert torch.equal(m.tokenize(*pack(a)).ids, m.tokenize(*pack(b)).ids)
    texts = ['a\0red', '\0', 'red\0', 'red']
    for x in m(texts), m.tokenize(*pack(texts)): assert torch.equal(x[0], tp(texts).ids)
    assert family in ('wordpiece', 'words') or len({tuple(r) for r in tp(texts).ids.tolist()}) > 2


@families
@everywhere
def test_wrong_texts(family, form):
    m = module(family, form)
    wrong = [['a', None], [1], [['a']], None, 5] + [{'a': 1}, {'a'}, 'a cat', ['a', '\ud800', 3]] * (form == 'eager')
    for texts in wrong:
        with pytest.raises(TypeError if form == 'eager' else RuntimeError, match='texts'): m(texts)
    if form == 'eager':
        with pytest.raises(TypeError, match=r'texts\[1\] is NoneType'): m(['a', None])
        with pytest.raises(TypeError, match=r'texts\[1\] is NoneType'): m.encode(['a', 'b'], ['a', None])


@families
@everywhere
def test_wrong_tensors(family, form):
    m, (d, o) = module(family, form), pack(['ab', 'c'])
    error = RuntimeError if form == 'eager' else torch.jit.Error
    cases = [
        ('data must be a uint8', [(d.float(), o), (d.long(), o), (d[None], o), (d.to(torch.int8), o), (d[0], o)]),
        ('offsets must be an int64', [(d, o.int()), (d, o[:0]), (d, o[None]), (d, o.float()), (d, o[0])]),
        (
            'offsets must rise from 0 to the 3',
            [
                (d, torch.tensor(x))
                for x in ([0, 3, 2, 3], [0, 9], [0, 2], [1, 3], [-1, 3], [0, -1, 3], [0, 1 << 40, 3], [0], [3])
            ],
        ),
    ]
    for says, tensors in cases:
        for x in tensors:
            for call in m.tokenize, m.pieces, m.encode_bytes:
                with pytest.raises(error, match=says): call(*x)
    with pytest.raises(error, match='2 texts, but 1 pairs'): m.encode_bytes(d, o, *pack(['x']))
    with pytest.raises(error, match='offsets must rise'): m.encode_bytes(d, o, d, torch.tensor([0, 9, 3]))
    if form == 'eager':
        with pytest.raises(RuntimeError, match='must be tensors'): m.tokenize('ab', o)
    assert torch.equal(m.tokenize(d, o).ids, made(family)(['ab', 'c']).ids)


@families
def test_spans_decode_and_explain(family):
    "Spans lie inside their texts and rise; the tokens of plain text decode to it; explain shows what encode says."
    tp = TextPipeline.from_spec({**made(family).spec(), 'max_length': 200})
    texts = CAPTIONS[:4] + fuzz_text.random_texts(60, seed=31) + ['']
    enc = tp.encode(texts, texts[::-1])
    for i, t in enumerate(texts):
        size = len(t.encode())
        spans = enc.spans[i][(enc.mask[i] > 0)]
        assert (
            int(spans.min()) >= 0
            and int(spans.max()) <= max(size, len(texts[::-1][i].encode()))
            and bool((spans[:, 1] >= spans[:, 0]).all())
        )
    alone = tp.encode(texts)
    for i, t in enumerate(texts):
        n = int(alone.mask[i].sum())
        inner = [s for s in alone.spans[i, :n].tolist() if s != [0, 0]]
        # NFC puts marks in order
        assert all(e <= len(t.encode()) for _, e in inner) and (
            family == 'clip' or sorted(b for b, _ in inner) == [b for b, _ in inner]
        )
        one = tp.encode([t])
        assert torch.equal(alone.ids[i, :n], one.ids[0, :n]) and torch.equal(alone.spans[i, :n], one.spans[0, :n])
        shown = tp.explain(t)
        assert shown.ids == alone.ids[i, :n].tolist() and shown.spans == [tuple(s) for s in alone.spans[i, :n].tolist()]
        assert [tp.token(k) for k in shown.ids] == shown.tokens and repr(shown) and '<table' in shown._repr_html_()
    plain = '一个红色的圆' if family == 'jieba' else 'a small red circle left of a large blue square'
    assert tp.decode(tp([plain]).ids[0]).strip() == plain
    with pytest.raises(KeyError): tp.token(1 << 40)


@families
@pytest.mark.parametrize('strategy', ['LongestFirst', 'OnlyFirst', 'OnlySecond'])
def test_pairs_are_cut_as_the_reference_does(family, strategy, monkeypatch):
    "By its own ids: a text alone gives the tokens, `truncate_encodings` of `tokenizers` says how many of each remain."
    tp = made(family)
    f, edge = tp.pair.ids, sum(map(len, tp.pair.ids))
    letters = Tokenizer(models.WordLevel({'a': 0}, unk_token='a'))
    letters.pre_tokenizer = pre_tokenizers.Whitespace()
    texts = [' '.join(CAPTIONS[0].split()[:n]) for n in (0, 1, 3, 6)]
    whole = [tp.pieces(*pack([t])).ids.tolist() for t in texts]
    monkeypatch.setattr(tp, 'strategy', strategy)
    for longest in range(edge + 1, edge + 14, 2):
        monkeypatch.setattr(tp, 'max_length', longest)
        letters.enable_truncation(
            longest - edge,
            strategy=dict(LongestFirst='longest_first', OnlyFirst='only_first', OnlySecond='only_second')[strategy],
        )
        for a, b in itertools.product(range(4), repeat=2):
            try: kept = letters.encode('a ' * len(whole[a]), 'a ' * len(whole[b])).sequence_ids
            except Exception:  # the reference refuses
                with pytest.raises(RuntimeError, match=strategy): tp.encode([texts[a]], [texts[b]])
                continue
            enc = tp.encode([texts[a]], [texts[b]])
            want = f[0] + whole[a][:kept.count(0)] + f[1] + whole[b][:kept.count(1)] + f[2]
            assert enc.ids[0, :int(enc.mask.sum())].tolist() == want


def test_pack_of_all_kinds_of_texts():
    class Marked(str): pass

    for texts in (
        [],
        [''],
        ['a', ''],
        ['a', b'b', 'c'],
        [Marked('ab'), 'c'],
        ['é', 'a'],
        ['\ud800'],
        ('ab', 'c'),
        [bytearray(b'\xff'), memoryview(b'a')],
        ['a' * 9] * 3000,
    ):
        rows = [t.encode('utf-8', 'surrogatepass') if isinstance(t, str) else bytes(t) for t in texts]
        data, offsets = pack(texts)
        assert bytes(data.tolist()) == b''.join(rows) and offsets.tolist() == [
            sum(map(len, rows[:k])) for k in range(len(rows) + 1)
        ]
        assert (data.dtype, offsets.dtype) == (torch.uint8, torch.int64)
    assert pack(t for t in ['a', 'é'])[1].tolist() == [0, 1, 3]
    for wrong in (['a', 1], ['a', None], ['é', ['b']]):
        with pytest.raises(TypeError, match=r'texts\[1\] is'): pack(wrong)
