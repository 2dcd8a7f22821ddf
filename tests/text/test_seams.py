"""Where a text may be cut: what is left of a seam has the tokens that it has in the whole text, for every family."""
import functools
import json
import random
import re

import pytest
import torch

from benchmarks import fuzz_text, fuzz_unigram
from mmembed.core.packing import pack
from mmembed.runtime.inputs import enough
from mmembed.text.pipeline import TextPipeline
from mmembed.text.seams import LETTERS, seams

from tests.text import test_inputs

BERT = {
    'lower': dict(lowercase=True),
    'cased': dict(lowercase=False),
    'not spaced': dict(lowercase=True, handle_chinese_chars=False),
    'not cleaned': dict(clean_text=False),
}
PARTS = [
    'a ', ' b', 'x', '中', '文', '，', '。', '、', ' ', '  ', 'é', 'Σ', 'ſ', "'s", "don't", '\u0301', '가', '\u1100',
    '\u11a8', 'Я', '1', '\n', '[SEP]', '<|endoftext|>', '▁', '\u3000', 'the', 'circle', '\0', '\u200d', '👩',
    '的', '一个', '红色', ':', '!', '！', '\xa0', '<mask>', '<unk>', '\u0345', '²',
]


def bert(rules):
    return TextPipeline(
        json.loads(
            fuzz_text.bert_tokenizer(
                {
                    t: i
                    for i, t in enumerate(
                        [
                            '[PAD]',
                            '[UNK]',
                            '[CLS]',
                            '[SEP]',
                            '[MASK]',
                            *'abcdexit中文的',
                            '##a',
                            '##b',
                            '##x',
                            'the',
                            'circle',
                            ',',
                            '。',
                        ]
                    )
                },
                **rules,
            ).to_str()
        ),
        max_length=16,
    )


FAMILIES = (
    {name: functools.partial(test_inputs.made, name) for name in test_inputs.FAMILIES}
    | {f'bert {name}': functools.partial(bert, r) for name, r in BERT.items()}
    | {
        f'sentencepiece {name}': functools.partial(
            lambda o: TextPipeline.from_sentencepiece(fuzz_unigram.learn(fuzz_unigram.LINES, **o), max_length=16),
            options,
        )
        for name, options in fuzz_unigram.VARIANTS.items()
    }
    | {
        f'file {name}': functools.partial(
            lambda kind: TextPipeline(
                json.loads(fuzz_unigram.as_file(fuzz_unigram.learn(fuzz_unigram.LINES), kind).to_str()), max_length=16
            ),
            name,
        )
        for name in fuzz_unigram.FILES
    }
)
families = pytest.mark.parametrize('family', FAMILIES)


@functools.cache
def made(family):
    tp = FAMILIES[family]().eval()
    return tp, re.compile(seams(tp).encode())


@functools.cache
def texts():
    rng = random.Random(5)
    some = [''.join(rng.choices(PARTS, k=rng.randrange(4, 40))) for _ in range(400)]
    return [
        t.encode()
        for t in some + [f'{a} {b}' for a, b in zip(fuzz_text.random_texts(200, 1), fuzz_text.random_texts(200, 2))]
    ] + fuzz_text.random_bytes(200, 3)


def pieces(tp, rows):
    with torch.no_grad(): p = tp.pieces(*pack(rows))
    return [x.tolist() for x in p.ids.tensor_split(p.offsets[1:-1])]


def test_letters_are_spelt_right():
    every = [(c, chr(c).encode()) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    for spelling, codes in LETTERS.values():
        form = re.compile(spelling.encode())
        assert [c for c, spelt in every if form.fullmatch(spelt)] == codes


@families
def test_what_is_left_of_a_seam_keeps_its_tokens(family):
    tp, found = made(family)
    cuts = [(t, m.end()) for t in texts() for m in found.finditer(t)]
    assert len(cuts) > (150 if 'across' not in family else 50)
    whole = dict(zip(texts(), pieces(tp, texts())))
    for (t, at), head in zip(cuts, pieces(tp, [t[:at] for t, at in cuts])):
        assert whole[t][: len(head)] == head, (t[:at], t)


LONG = {
    'words': 'a small red circle ' * 100,
    'blanks first': ' \n\u3000' * 233 + 'a red circle ' * 100,
    'a long word first': 'q' * 1000 + ' a red circle' * 100,
    'letters': 'ab' * 1000,
    'Chinese': '一个红色的小圆，在蓝色方块左边。' * 33,
    'Chinese without stops': '一个红色的小圆在蓝色方块左边' * 33,
    'marks': 'e\u0301 ' * 300 + '\u0301' * 300,
    'jamo': '\u1100\u1161\u11a8' * 166,
    'Korean': '작은 빨간 원 ' * 100,
    'controls': 'a\0 red\u200b ' * 133,
    'tokens': '[SEP]<|endoftext|> ' * 100,
    'sigmas': 'ΑΣ ΣΑΣ ' * 100,
    'apostrophes': "don't I'll " * 100,
    'surrogates': 'red\ud800 circle ' * 100,
    'UTF-8 cut': (b'red \xe4\xb8 circle \xf0\x9f ') * 100,
    'ASCII in Chinese': '一a个 b' * 166,
    'emoji': '👩\u200d👩\u200d👧🏽 ' * 100,
}


@families
def test_enough_of_a_text_is_as_good_as_all_of_it(family):
    """Whatever the first size, the ids are those of the whole text, and a text of common words is read no further
    than its first hundred bytes or so."""
    tp, found = made(family)
    def tokens(text):
        with torch.no_grad(): return [x.tolist() for x in tp.tokenize(*pack([text]))]
    for name, text in LONG.items():
        want = tokens(text)
        for first in (7, 300):
            read = []
            def fills(head, read=read):
                read.append(len(head))
                return sum(tokens(head)[1][0]) == tp.max_length
            kept = enough(text, found, fills, first)
            assert tokens(kept) == want, (name, first)
            assert read == sorted(read) and sum(read) <= 3 * len(pack([text])[0])
            if name in ('words', 'Korean') and sum(want[1][0]) == tp.max_length and 'across' not in family:
                assert len(kept) <= 8 * max(first, 64)


def test_none_where_something_reaches_across():
    spaced = made('sentencepiece byte fallback')[0]
    assert ' ' in seams(spaced) and '(?= ' not in seams(made('sentencepiece pieces across words')[0])
    tok = made('wordpiece')[0].spec()['tokenizer']
    mark = dict(id=5, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    with_space = TextPipeline({**tok, 'added_tokens': [*tok['added_tokens'], dict(mark, content='red circle')]})
    assert '(?= ' not in seams(with_space)
    assert not re.search(
        seams(TextPipeline({**tok, 'added_tokens': [*tok['added_tokens'], dict(mark, content='红色')]})).encode(),
        '一个，红色'.encode(),
    )
    # inside a word, whose end CLIP's vocabulary marks
    assert not re.search(seams(made('clip')[0]).encode(), '一个'.encode())
