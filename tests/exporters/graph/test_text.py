"The exported forms: ids equal to the pipeline's, in torch.export and in onnxruntime, with standard operators only."
import functools
import json
import logging
import random
import re

import pytest
import torch
from torch import nn

from benchmarks.fuzz_bpe import bpe_texts, clip_tokenizer
from benchmarks.fuzz_exits import AWKWARD, FAMILIES, LONG, differing, learnt, onnx_runner, uncased, words
from benchmarks.fuzz_text import bert_tokenizer, code_points, corpus, random_bytes, random_texts
from mmembed.core.packing import pack
from mmembed.exporters.graph import program as exits
from mmembed.text.bpe import BytePairs, byte_letters
from mmembed.exporters.graph.program import export_program, operators, text_to_onnx
from mmembed.exporters.graph.text import exported_form
from mmembed.exporters.graph.text import LoopedBytePairs, LoopedNfc
from mmembed.text.nfc import Nfc, nfc_rules
from mmembed.text.pipeline import TextPipeline
from mmembed.text.hash_table import VocabTable
from mmembed.text.unicode import Codes, Utf8
from tests.helpers import built_once, data_path

pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')
logging.getLogger('torch.__trace').setLevel(logging.ERROR)  # or pytest keeps every size that the tracer thinks about


@functools.cache
def program(folder):
    "What `exits_once` saved there, loaded once a process, which takes seconds."
    return torch.export.load(folder/'text.pt2').module()


def exits_once(name, tp):
    "The ONNX file of `tp`, and both exits as functions; traced, saved and translated once a run."
    def build(folder):
        folder.mkdir()
        made = export_program(tp)
        torch.export.save(made, folder/'text.pt2')
        text_to_onnx(made, folder/'text.onnx')
    folder = built_once(re.sub(r'\W+', '-', f'exits {name}'), build)
    return folder/'text.onnx', program(folder), onnx_runner(folder/'text.onnx')


# open_clip's, the uncased one and CLIP's bytes are of the same models
WEEKLY = {'CLIP, tokenizer.json', 'WordPiece, cased, Chinese', 'whole words', 'GPT-2 style'}


@pytest.fixture(scope='module', params=[pytest.param(k, marks=[pytest.mark.weekly] * (k in WEEKLY)) for k in FAMILIES])
def exported(request):
    "A pipeline, the ONNX file, and its two exits as functions."
    tp = FAMILIES[request.param]().eval()
    return tp, *exits_once(request.param, tp)


def test_standard_operators_only(exported):
    _, path, *_ = exported
    assert set(operators(path)) == {''}
    for word in b'site-packages', b'mmembed/text', b'stack_trace': assert word not in path.read_bytes()


def test_awkward_texts_alone_and_together(exported):
    tp, _, *runs = exported
    for run in runs:
        for batch in 1, 7, 256: assert differing(run, tp.tokenize, AWKWARD, batch) == []
        for part in ['', ''], [' '], ['a']: assert differing(run, tp.tokenize, part) == []
        ids, mask = run(*pack([]))
        assert ids.shape[0] == mask.shape[0] == 0


def test_words_of_5000_characters(exported):
    tp, _, *runs = exported
    for run in runs: assert differing(run, tp.tokenize, LONG) == []


def test_quick_fuzz(exported):
    tp, _, program, onnx = exported
    marks = [
        '[[', '[', ']]', 'S', '<l>', '<r>', '<w>', 'a', 'b', ' ', '\u3000', '[SEP]', '-', '猫', '<mask>',
        '<|endoftext|>', "'s", '\u0301',
    ]
    rng = random.Random(3)
    texts = (
        bpe_texts(2000, seed=11)
        + random_bytes(1000, seed=12)
        + [''.join(rng.choices(marks, k=rng.randrange(1, 12))) for _ in range(1500)]
    )
    assert differing(onnx, tp.tokenize, texts) == []
    assert differing(program, tp.tokenize, texts[::4]) == []


def test_every_code_point(exported):
    tp, _, program, onnx = exported
    assert differing(onnx, tp.tokenize, code_points(7), batch=20_000) == []
    assert differing(program, tp.tokenize, code_points(61), batch=20_000) == []


def test_corpus(exported):
    tp, _, program, onnx = exported
    texts = corpus(data_path('text'))
    assert differing(onnx, tp.tokenize, texts) == []
    assert differing(program, tp.tokenize, texts[::8]) == []


def test_rules_without_shortcuts():
    vocab = learnt()
    for rules in (
        dict(lowercase=True, strip_accents=False),
        dict(lowercase=False, strip_accents=True),
        dict(clean_text=False),
        dict(handle_chinese_chars=False),
    ):
        tp = TextPipeline(json.loads(bert_tokenizer(vocab, **rules).to_str()), max_length=48).eval()
        assert differing(exported_form(tp), tp.tokenize, AWKWARD + random_texts(500, seed=13), 550) == []


def test_clip_rules_without_shortcuts():
    texts = AWKWARD + bpe_texts(500, seed=14)
    for tp in (
        TextPipeline(json.loads(clip_tokenizer(False, True).to_str())),
        TextPipeline.from_open_clip('ViT-B-32', cleaned=True),
    ):
        assert differing(exported_form(tp.eval()), tp.tokenize, texts, 550) == []


def test_fixed_length():
    tp = TextPipeline(words(), max_length=16, pad_to=0).eval()
    ids, mask = export_program(tp).module()(*pack(['a b']))
    assert ids.shape == mask.shape == (1, 16)
    assert torch.equal(ids, tp(['a b']).ids)


def test_a_collision_does_not_deceive():
    "A table whose keys answer for other strings: every hit must be confirmed."
    tp = TextPipeline(uncased(), max_length=48).eval()
    _, program, _ = exits_once('WordPiece, uncased', tp)
    lex = tp.model.lexicon
    taken, told = lex.table.ids >= 0, [b for b in program.buffers() if torch.equal(b, lex.table.ids)]
    honest = tp(AWKWARD).ids
    keys, ids = lex.table.keys[taken], lex.table.ids[taken]
    lex.table = VocabTable(keys, ids.flip(0))
    form = exported_form(tp)
    fooled = tp(AWKWARD).ids
    assert not torch.equal(fooled, honest)
    assert torch.equal(form(*pack(AWKWARD))[0], fooled)
    before = [b.clone() for b in told]
    try:
        for b in told: b.copy_(lex.table.ids)
        assert told and torch.equal(program(*pack(AWKWARD))[0], fooled)
    finally:
        for b, was in zip(told, before): b.copy_(was)


def pieces(model, words):
    "Each word, a row of its own, through a BytePairs."
    data, offsets = pack(words)
    flags = torch.zeros(data.numel(), dtype=torch.int64).index_fill_(0, offsets[:-1][offsets[1:] > offsets[:-1]], 256)
    p = model(Codes(data.long() | flags, offsets))
    return [p.ids[a:b].tolist() for a, b in zip(p.offsets, p.offsets[1:])]


def looped(module, form):
    module.__class__, module.shortcuts = form, False
    return module


@pytest.mark.parametrize('seed', range(6))
def test_made_up_merges(seed):
    "Random merge tables, in the order in which they were learnt and in any other."
    rng = random.Random(seed)
    tokens, merges = list('abc'), []
    while len(merges) < 25:
        pair = rng.choice(tokens), rng.choice(tokens)
        if pair in merges or len(pair[0] + pair[1]) > 9: continue
        merges.append(pair)
        tokens.append(pair[0] + pair[1])
    if seed % 2: rng.shuffle(merges)
    vocab = {c: i for i, c in enumerate([*byte_letters().values(), *dict.fromkeys(tokens[3:])])}
    words = [''.join(rng.choices('abc', k=rng.randrange(1, 60))) for _ in range(400)] + ['a' * n for n in range(1, 40)]
    words += [''.join(rng.choice('abc') * rng.randrange(1, 12) for _ in range(9)) for _ in range(200)]
    model = BytePairs(vocab, merges, drops=False)
    want = pieces(model, words)
    assert model.orderly is not bool(seed % 2) and pieces(looped(model, LoopedBytePairs), words) == want
    assert pieces(model, []) == [] and pieces(model, ['', '']) == [[], []]


def test_composition():
    rules, rng = nfc_rules(), random.Random(0)
    odd = (
        ''.join(map(chr, rules.pairs[:930].ravel()))
        + ''.join(map(chr, range(0x300, 0x330))) * 4
        + '\u1112\u1161\u11ab각' * 40
    )
    texts = [''.join(rng.choices(odd, k=rng.randrange(9))) for _ in range(5000)] + ['', 'a', '\u0301']
    x, nfc = Utf8()(*pack(texts))[0], Nfc(rules)
    (want, rows), source = nfc(x)
    for m in nfc.modules():
        if hasattr(m, 'shortcuts'): m.shortcuts = False
    (got, places), where = looped(nfc, LoopedNfc)(x)
    assert torch.equal(got, want) and torch.equal(places, rows) and torch.equal(where, source)


def test_a_family_without_a_form_is_refused():
    tp = TextPipeline(uncased())
    class Mine(nn.Module): pass
    tp.model = Mine()
    with pytest.raises(ValueError, match='Mine has no exported form'): export_program(tp)


def test_a_pipeline_is_translated_once(tmp_path, monkeypatch):
    "The second file of the same content is the first; any number or table that differs makes another."
    made = []
    def translated(program, path):
        made.append(path)
        path.write_bytes(b'%d' % len(made))
        return path
    monkeypatch.setattr(exits, 'export_program', lambda tp: tp)
    monkeypatch.setattr(exits, '_translated', translated)
    monkeypatch.setattr(exits, '_files', {})
    tp, same, longer, other = (TextPipeline(words(), max_length=n).eval() for n in (16, 16, 17, 16))
    next(b for b in other.model.buffers() if b.numel()).add_(1)
    files = [text_to_onnx(p, tmp_path/f'{i}').read_bytes() for i, p in enumerate((tp, same, longer, other, tp))]
    assert files == [b'1', b'1', b'2', b'3', b'1'] and len(made) == 3
