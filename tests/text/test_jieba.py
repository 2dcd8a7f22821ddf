"""Chinese words against `jieba.cut`, in every form, and the ids behind them."""
import functools
import json
import pickle

import pytest
import torch

from mmembed.core.packing import pack
from mmembed.text.pipeline import TextPipeline
from tests.helpers import FORMS, data_path, in_form

jieba = pytest.importorskip('jieba')
from benchmarks import fuzz_segment, fuzz_text  # noqa: E402

TEXTS = [
    '小明硕士毕业于中国科学院计算所，后在日本京都大学深造', '他来到了网易杭研大厦', '一只猫坐在红色的垫子上。',
    '今天 iPhone5.5 降价 3.5%', '',
]
DICTIONARY = '一只 20 m\n猫 30 n\n一 50 m\n只 10 m\n红色 40 n\n红 5\n的 100 uj\n哈哈 7\n哈 3\n一只猫 2\n零 0'


@functools.cache
def cutter(hmm, form): return fuzz_segment.Cut(hmm) if form == 'eager' else in_form(cutter(hmm, 'eager'), form)


@functools.cache
def vocabulary():
    words = sorted({w for t in TEXTS for h in (False, True) for w in jieba.lcut(t, HMM=h)[::2]} - {' '})
    return {w: i for i, w in enumerate(['[PAD]', '[UNK]', '[CLS]', '[SEP]', *words])}


@functools.cache
def pipeline(): return TextPipeline.from_jieba(vocabulary(), max_length=24)


def agree(texts, hmm, form='scripted', batch=1000):
    assert fuzz_segment.differences(cutter(hmm, form), texts, hmm, batch)[:5] == []


@pytest.mark.parametrize('hmm', [False, True])
@pytest.mark.parametrize('form', FORMS)
def test_every_form(form, hmm): agree(TEXTS + fuzz_segment.random_texts(400, seed=1), hmm, form)


@pytest.mark.parametrize('hmm', [False, True])
def test_random_strings(hmm):
    agree(
        fuzz_segment.random_texts(3000, seed=2)
        + fuzz_text.random_texts(500, seed=3)
        + fuzz_text.random_bytes(500, seed=4),
        hmm,
    )
    agree(fuzz_segment.random_texts(60, seed=5), hmm, 'eager', batch=1)


@pytest.mark.parametrize('hmm', [False, True])
def test_code_points(hmm):
    some = fuzz_text.code_points(step=5)
    agree(some + [f'a{c}国' for c in some], hmm, batch=20_000)


@pytest.mark.parametrize('hmm', [False, True])
def test_real_corpora(hmm): agree(fuzz_text.corpus(data_path('text')), hmm)


@pytest.mark.parametrize('hmm', [False, True])
def test_awkward_batches(hmm):
    for texts in [
        [],
        [''],
        ['', ''],
        ['\0'],
        ['\r\n' * 500],
        ['哈' * 3000],
        ['1.' * 3000],
        ['龥' * 500],
        ['国' * 20_000 + '。' * 20_000],
    ]:
        agree(texts, hmm, 'eager')


@pytest.mark.parametrize('hmm', [False, True])
def test_own_dictionary(hmm, tmp_path):
    (tmp_path/'d.txt').write_text(DICTIONARY, encoding='utf-8')
    own = jieba.Tokenizer(str(tmp_path/'d.txt'))
    own.cache_file = str(tmp_path/'cache')
    vocab = {w: i for i, w in enumerate(['[UNK]', *(line.split(' ')[0] for line in DICTIONARY.split('\n'))])}
    tp = TextPipeline.from_jieba(vocab, max_length=1000, hmm=hmm, dictionary=DICTIONARY)
    for t in ['一只猫红色的', '哈哈哈哈哈', '一只只一猫猫', '零零 abc', '的' * 50 + '哈' * 51]:
        assert tp([t]).ids[0][tp([t]).mask[0] > 0].tolist() == [
            vocab.get(w, 0) for w in own.lcut(t, HMM=hmm) if not w.isspace()
        ]


@pytest.mark.parametrize('form', FORMS)
def test_ids_mask_and_segment_ids(form):
    tp, vocab = in_form(pipeline(), form), vocabulary()
    def ids(t): return [vocab.get(w, 1) for w in jieba.lcut(t) if not w.isspace()]
    tokens = tp.tokenize(*pack(TEXTS))
    assert [r[m > 0].tolist() for r, m in zip(*tokens)] == [[2, *ids(t)[:22], 3] for t in TEXTS]
    enc = tp.encode(TEXTS, TEXTS[::-1])
    for a, b, row, mask, segment in zip(TEXTS, TEXTS[::-1], enc.ids, enc.mask, enc.segment_ids):
        if len(ids(a)) + len(ids(b)) > 21: continue
        assert row[mask > 0].tolist() == [2, *ids(a), 3, *ids(b), 3]
        assert segment[mask > 0].tolist() == [0] * (len(ids(a)) + 2) + [1] * (len(ids(b)) + 1)


def test_spans_are_the_words():
    enc = pipeline().encode(['小明 在日本'])
    spans = enc.spans[0, 1:int(enc.mask.sum()) - 1].tolist()
    text = '小明 在日本'
    assert [text.encode()[a:b].decode() for a, b in spans] == [w for w in jieba.lcut(text) if w != ' ']


def test_spec_and_pickle_rebuild_it():
    tp = pipeline()
    for other in [TextPipeline.from_spec(json.loads(json.dumps(tp.spec()))), pickle.loads(pickle.dumps(tp))]:
        assert torch.equal(other(TEXTS).ids, tp(TEXTS).ids) and other.spec() == tp.spec()


def test_decode_joins_the_words():
    text = jieba.lcut(TEXTS[0])[0]
    assert pipeline().decode(pipeline()([text]).ids[0]) == text


def test_what_is_refused():
    with pytest.raises(ValueError, match='line 1 of the dictionary'):
        TextPipeline.from_jieba(vocabulary(), dictionary='猫')
    with pytest.raises(ValueError, match="no '\\[UNK\\]'"): TextPipeline.from_jieba({'猫': 0})
