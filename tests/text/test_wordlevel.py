"""Whole-word vocabularies against Hugging Face `tokenizers`, in every form."""
import json

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from benchmarks import fuzz_text
from mmembed.text.pipeline import TextPipeline
from tests.helpers import FORMS, data_path, in_form

RULES = {
    'Whitespace': (None, pre_tokenizers.Whitespace()),
    'lower': (normalizers.Lowercase(), pre_tokenizers.Whitespace()),
    'WhitespaceSplit': (normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()),
    'Bert': (normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()),
    'Bert at signs': (normalizers.BertNormalizer(lowercase=False), pre_tokenizers.Whitespace()),
    'CJK not spaced': (normalizers.BertNormalizer(handle_chinese_chars=False), pre_tokenizers.WhitespaceSplit()),
}
CAPTIONS = [
    'A small red circle, left of a large BLUE square!', '一个红色的小圆 在蓝色方块左边', 'Crème brûlée, naïve café!?',
    'ไทย ที่นี่', '각 한국어 가각', "don't I'll",
]


def tokenizer(rules, texts=CAPTIONS, special=True):
    tok = Tokenizer(models.WordLevel({}, unk_token='[UNK]'))
    tok.normalizer, tok.pre_tokenizer = RULES[rules]
    words = {
        w
        for t in texts
        for w, _ in tok.pre_tokenizer.pre_tokenize_str(tok.normalizer.normalize_str(t) if tok.normalizer else t)
    }
    tok.model = models.WordLevel(
        {w: i for i, w in enumerate(['[UNK]', '[PAD]', *sorted(words - {'[UNK]', '[PAD]'})])}, unk_token='[UNK]'
    )
    if special: tok.add_special_tokens(['[PAD]', '[SEP]', '[MASK]'])
    return tok


def agree(tok, texts, form='scripted', **kwargs):
    tp = in_form(TextPipeline(json.loads(tok.to_str()), max_length=128), form, ['tokenize'])
    assert fuzz_text.differences(tok, tp.tokenize, texts, **kwargs)[:5] == []


@pytest.mark.parametrize('form', FORMS)
def test_every_form(form): agree(tokenizer('lower'), CAPTIONS + fuzz_text.random_texts(500, seed=1), form)


@pytest.mark.parametrize('rules', RULES)
def test_random_strings(rules):
    texts = fuzz_text.random_texts(2000, seed=2)
    agree(tokenizer(rules, CAPTIONS + texts[::2]), texts + fuzz_text.random_bytes(500, seed=3))


@pytest.mark.parametrize('rules', ['Whitespace', 'lower', 'WhitespaceSplit'])
def test_code_points(rules):
    some = fuzz_text.code_points(step=29)
    agree(tokenizer(rules, some[::3]), some + [f'a{c}{c}b' for c in some], batch=20_000)


@pytest.mark.parametrize('rules', ['lower', 'Bert'])
def test_real_corpora(rules):
    texts = fuzz_text.corpus(data_path('text'))
    agree(tokenizer(rules, texts[::4]), texts)


def test_awkward_batches():
    tok = tokenizer('lower', special=False)
    for texts in [[''], ['', ' '], ['\0'], ['a' * 1_000_000, 'a ' * 100_000]]: agree(tok, texts)


def test_rules_that_are_not_known():
    for part, value in [
        ('normalizer', {'type': 'NFKC'}),
        ('pre_tokenizer', {'type': 'Digits'}),
        ('pre_tokenizer', None),
    ]:
        with pytest.raises(ValueError, match=part):
            TextPipeline({**json.loads(tokenizer('lower').to_str()), part: value})
