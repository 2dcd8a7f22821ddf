"""Byte-level BPE against open_clip's tokenizer and Hugging Face `tokenizers`, in every form."""
import copy
import functools
import json
import pickle
import random

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, processors

from benchmarks import fuzz_bpe, fuzz_text
from mmembed.core.packing import pack
from mmembed.text.bpe import BytePairs, byte_letters
from mmembed.text.byte_classes import needs_cleaning, open_clip_clean
from mmembed.text.pipeline import TextPipeline
from mmembed.text.unicode import Codes
from tests.helpers import FORMS, data_path, in_form

CAPTIONS = [
    'a small red circle left of a large blue square', "it isn't the dog's", '一个红色的小圆在蓝色方块左边',
    'Crème brûlée, naïve café!', 'ไทย ที่นี่', '각 한국어', '  two  spaces\n',
] * 3


@functools.cache
def gpt2(): return fuzz_bpe.gpt2_tokenizer(CAPTIONS, 600)


@functools.cache
def gpt2_prefix(): return fuzz_bpe.gpt2_tokenizer(CAPTIONS, 600, prefix=True)


@functools.cache
def clip(): return fuzz_bpe.clip_tokenizer()


@functools.cache
def clip_hub(): return fuzz_bpe.clip_tokenizer(listed=False, normalized=True)


MAKERS = [clip, clip_hub, gpt2, gpt2_prefix]


@functools.lru_cache(8)
def built(tokenizer): return TextPipeline(json.loads(tokenizer))


@functools.lru_cache(8)
def pipeline(tokenizer, form, max_length):
    "Built once a tokenizer, whatever its length; in one of its forms."
    tp = copy.deepcopy(built(tokenizer))
    tp.max_length = max_length
    return in_form(tp, form, ['tokenize'])


@functools.lru_cache(5)
def open_clips(form, cleaned=False):
    return in_form(TextPipeline.from_open_clip('ViT-B-32', cleaned=cleaned), form, ['tokenize'])


def agree(tok, texts, form='scripted', batch=1000, max_length=128):
    tp = pipeline(tok.to_str(), form, max_length)
    assert fuzz_text.differences(tok, tp.tokenize, texts, batch, max_length)[:5] == []


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('make', MAKERS)
def test_random_strings(make, form): agree(make(), fuzz_bpe.bpe_texts(1500, seed=1), form)


@pytest.mark.parametrize('form', FORMS)
def test_open_clip(form):
    texts = fuzz_bpe.in_graph(fuzz_bpe.bpe_texts(1500, seed=2))
    tp = open_clips(form)
    assert len(texts) > 1000 and fuzz_bpe.open_clip_differences(tp.tokenize, texts)[:5] == []


def test_open_clip_after_its_own_cleaning():
    texts = fuzz_bpe.bpe_texts(1500, seed=3) + ['R&amp;B', 'schÃ¶n', '&amp;lt;', '<b>&rdquo;', '\x1b[1mx']
    tp = open_clips('scripted', cleaned=True)
    assert fuzz_bpe.cleaned_differences(tp.tokenize, texts)[:5] == []
    assert needs_cleaning('R&amp;B') and not needs_cleaning('AT&T “ﬁne”') and open_clip_clean('R&amp;B') == 'R&B'


@pytest.mark.parametrize('batch', [1, 7, 64])
def test_batch_sizes(batch):
    for make in (clip, gpt2_prefix): agree(make(), fuzz_bpe.bpe_texts(200, seed=4), batch=batch)


@pytest.mark.parametrize('max_length', [3, 8, 17, 512])
def test_truncation(max_length): agree(clip(), fuzz_bpe.bpe_texts(300, seed=5), max_length=max_length)


def test_truncation_is_open_clips():
    tp = TextPipeline.from_open_clip('ViT-B-32', pad_to=0)
    texts = ['tablecloth ' * n for n in (1, 36, 37, 38, 100)] + ['']
    assert torch.equal(tp(texts).ids, fuzz_bpe.open_clip_reference()(texts))
    assert (tp.max_length, tp.pad_id, tp.vocab_size) == (77, 0, 49408)


@pytest.mark.parametrize('make', MAKERS)
def test_code_points_alone_and_between_letters(make):
    some = fuzz_text.code_points(step=37)
    agree(make(), some + [f'a{c}b' for c in some], batch=20_000)


def test_code_points_as_open_clip():
    some = fuzz_text.code_points(step=97)
    tp = open_clips('scripted')
    assert (
        fuzz_bpe.open_clip_differences(tp.tokenize, fuzz_bpe.in_graph(some + [f'a{c}b' for c in some]), 20_000)[:5]
        == []
    )


@pytest.mark.parametrize('make', MAKERS)
def test_invalid_utf8(make): agree(make(), fuzz_text.random_bytes(2000, seed=6))


@pytest.mark.parametrize('make', [clip, gpt2])
def test_real_corpora(make): agree(make(), fuzz_text.corpus(data_path('text'))[::2])


def test_real_corpora_as_open_clip():
    texts = fuzz_text.corpus(data_path('text'))[::8]
    tp = open_clips('scripted')
    kept = fuzz_bpe.in_graph(texts)
    assert len(kept) > .99 * len(texts) and fuzz_bpe.open_clip_differences(tp.tokenize, kept)[:5] == []


LONG = [
    'a' * 1000,
    'ha' * 999,
    'x' + 'a' * 333,
    'ab' * 500,
    '!' * 777,
    '!?' * 300,
    '一' * 300,
    'é' * 501,
    ' ' * 999,
    '\n ' * 200,
    '1' * 300,
]


@pytest.mark.parametrize('make', MAKERS)
def test_long_words(make):
    rng = random.Random(7)
    texts = LONG + [
        ''.join(rng.choices(alphabet, k=rng.randrange(30, 900)))
        for alphabet in ('abcdefghijklmnopqrstuvwxyz', 'aab', 'thecatonmat', '!-=.', 'éü一猫')
        for _ in range(20)
    ]
    texts += [''.join(rng.choice('abhx!é') * rng.randrange(1, 40) for _ in range(9)) for _ in range(300)]
    agree(make(), texts, max_length=2000)
    agree(make(), texts[:12], batch=1, max_length=2000)


@pytest.mark.parametrize('form', FORMS)
def test_awkward_batches(form):
    for make in (clip, gpt2_prefix):
        tok = make()
        tp = pipeline(tok.to_str(), form, 16)
        for texts in [
            [''],
            ['', ''],
            ['\x00'],
            [' \n'],
            ['a' * 300_000],
            ['a ' * 50_000],
            ['<|endoftext|>' * 3000],
            ['\u0301' * 1000],
            ['\ud800x'],
            ['<mask> ' * 99, ' <s>', 'a  <mask>'],
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


def bpe(vocab, merges, **options):
    vocab = {**{c: i for i, c in enumerate(byte_letters().values())}, **{t: 256 + i for i, t in enumerate(vocab)}}
    return Tokenizer(models.BPE(vocab, merges, **options)), BytePairs(
        vocab, merges, whole=options.get('ignore_merges', False), drops=False
    )


def merged(model, words):
    "Each word, a row of its own, through `model`."
    data, offsets = pack(words)
    flags = torch.zeros(data.numel(), dtype=torch.int64).index_fill_(0, offsets[:-1], 256)
    p = model(Codes(data.long() | flags, offsets))
    return [p.ids[a:b].tolist() for a, b in zip(p.offsets, p.offsets[1:])]


@pytest.mark.parametrize('seed', range(12))
@pytest.mark.parametrize('learnt', [True, False], ids=['in order', 'any order'])
def test_made_up_merges(seed, learnt):
    "Random merge tables, those in which a merge makes an earlier one possible among them."
    rng = random.Random(seed)
    tokens, merges = list('abc'), []
    while len(merges) < 25:
        pair = rng.choice(tokens), rng.choice(tokens)
        if pair in merges or len(pair[0] + pair[1]) > 9: continue
        merges.append(pair)
        tokens.append(pair[0] + pair[1])
    if not learnt: rng.shuffle(merges)
    hf, ours = bpe(dict.fromkeys(tokens[3:]), merges)
    words = [''.join(rng.choices('abc', k=rng.randrange(1, 60))) for _ in range(400)] + ['a' * n for n in range(1, 40)]
    words += [''.join(rng.choice('abc') * rng.randrange(1, 12) for _ in range(9)) for _ in range(200)]
    assert merged(ours, words) == [hf.encode(w).ids for w in words]
    # without long words, which take another way
    for w in (w for w in words if len(w) < 9): assert merged(ours, [w]) == [hf.encode(w).ids]
    assert learnt or not ours.orderly


def test_ignore_merges():
    hf, ours = bpe(['ab', 'abc', 'bc'], [('a', 'b'), ('b', 'c')], ignore_merges=True)
    words = ['abc', 'ab', 'abcabc', 'bc', 'x']
    assert merged(ours, words) == [hf.encode(w).ids for w in words]


def test_spans_are_the_bytes_of_each_token():
    text = 'Ein Straßenbahn-Ｔicket: e\u0301 <end_of_text> 猫'
    enc = open_clips('scripted').encode([text])
    spans = enc.spans[0][enc.mask[0] > 0][1:-1].tolist()
    pieces = [text.encode()[a:b].decode(errors='replace') for a, b in spans]
    covered = {i for a, b in spans for i in range(a, b)}  # tokens within one character share its bytes
    assert covered == {i for i, c in enumerate(text.encode()) if c != 32}
    assert {'Ein', '-', 'Ｔicket', ':', 'e\u0301', '<end_of_text>'} <= set(pieces)


def test_spans_are_the_references():
    tok = Tokenizer.from_str(gpt2().to_str())
    tok.no_truncation()
    tok.post_processor = processors.RobertaProcessing(
        ('</s>', 2), ('<s>', 0), trim_offsets=False, add_prefix_space=False
    )
    tp = in_form(TextPipeline(json.loads(tok.to_str()), max_length=4000), 'scripted')
    texts = [t for t in fuzz_bpe.bpe_texts(400, seed=8) if t]
    enc = tp.encode(texts)
    for i, e in enumerate(tok.encode_batch(texts)):
        n = int(enc.mask[i].sum())
        want = [[len(texts[i][:c].encode()) for c in o] for o in e.offsets]
        assert enc.ids[i, :n].tolist() == e.ids and enc.spans[i, 1:n - 1].tolist() == want[1:-1]


def test_spec_pickle_and_file_rebuild_it(tmp_path):
    for tp in (
        TextPipeline(json.loads(clip().to_str()), 64),
        TextPipeline(json.loads(gpt2().to_str()), 64),
        TextPipeline.from_open_clip('ViT-B-32', 64),
    ):
        tp.to_tokenizer_file(tmp_path/'tokenizer.json')
        texts = fuzz_bpe.bpe_texts(100, seed=9)
        others = [
            TextPipeline.from_spec(json.loads(json.dumps(tp.spec()))),
            pickle.loads(pickle.dumps(tp)),
            TextPipeline.from_tokenizer_file(tmp_path, max_length=64),
        ]
        for other in others: assert torch.equal(other(texts).ids, tp(texts).ids) and other.spec() == tp.spec()


def test_decode():
    assert open_clips('eager').decode([320, 1125, 539, 320, 2368]) == 'a photo of a cat '
    tp = TextPipeline(json.loads(gpt2().to_str()))
    assert tp.decode(tp(['a small red circle']).ids[0]) == 'a small red circle'


def test_open_clip_names():
    assert TextPipeline.from_open_clip('ViT-B-32', max_length=20).max_length == 20
    for name, says in [
        ('no-such-model', 'knows no model'),
        ('ViT-B-16-SigLIP', 'SigLIP'),
        ('roberta-ViT-B-32', 'roberta-base'),
        ('hf-hub:x/y', 'knows no model'),
    ]:
        with pytest.raises(ValueError, match=says): TextPipeline.from_open_clip(name)


def changed(tok, **parts): return {**json.loads(tok.to_str()), **parts}


def level(**options): return dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True, use_regex=True) | options


@pytest.mark.parametrize(
    'parts, says',
    [
        (dict(normalizer=dict(type='NFKC')), 'NFKC'),
        (dict(normalizer=dict(type='Sequence', normalizers=[dict(type='Lowercase'), dict(type='NFC')])), 'normalizer'),
        (dict(pre_tokenizer=None), 'pre_tokenizer'),
        (dict(pre_tokenizer=level(use_regex=False)), 'use_regex'),
        (
            dict(
                pre_tokenizer=dict(
                    type='Sequence', pretokenizers=[dict(type='Digits', individual_digits=True), level()]
                )
            ),
            'Digits',
        ),
        (dict(added_tokens=[dict(id=0, content='x', normalized=True, single_word=True)]), 'single_word'),
    ],
)
def test_unknown_rules_are_refused(parts, says):
    with pytest.raises(ValueError, match=says): TextPipeline(changed(gpt2(), **parts))


@pytest.mark.parametrize('rule, value', [('dropout', .1), ('byte_fallback', True), ('continuing_subword_prefix', '##')])
def test_unknown_model_rules_are_refused(rule, value):
    tok = json.loads(gpt2().to_str())
    tok['model'][rule] = value
    with pytest.raises(ValueError, match=rule): TextPipeline(tok)


def test_vocabularies_that_do_not_hold_together():
    tok = json.loads(gpt2().to_str())
    del tok['model']['vocab']['Ġ']
    with pytest.raises(ValueError, match='no token for the byte 32'): TextPipeline(tok)
    tok = json.loads(gpt2().to_str())
    tok['model']['merges'].append(['a', 'Ċ'])
    with pytest.raises(ValueError, match='the merge that makes'): TextPipeline(tok)


def test_normalizers_one_by_one():
    for norm in (
        normalizers.NFC(),
        normalizers.Lowercase(),
        normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]),
    ):
        tok = Tokenizer.from_str(gpt2().to_str())
        tok.normalizer = norm
        agree(tok, fuzz_bpe.bpe_texts(800, seed=10))


def test_open_clips_file_is_read_once(monkeypatch):
    "All its models of this kind have one vocabulary; what a caller does to the answer is the caller's."
    from open_clip import tokenizer
    from mmembed.text.bpe_files import open_clip_tokenizer
    first = open_clip_tokenizer('ViT-B-32')[0]
    monkeypatch.setattr(tokenizer, 'SimpleTokenizer', None)
    second, again = open_clip_tokenizer('ViT-L-14')[0], first['model']['vocab'].pop('a</w>')
    assert second['model']['vocab']['a</w>'] == again and second['model']['merges'] == first['model']['merges']
