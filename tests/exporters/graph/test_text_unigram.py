"""The exported forms of unigram models and Chinese words: ids equal to the scripted pipeline's, in torch.export and
in onnxruntime, with standard operators only."""
import functools
import json
import logging

import pytest

pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')
pytest.importorskip('sentencepiece')
jieba = pytest.importorskip('jieba')
from benchmarks import fuzz_segment, fuzz_text, fuzz_unigram  # noqa: E402
from benchmarks.fuzz_exits import differing  # noqa: E402
from mmembed.core.packing import pack  # noqa: E402
from mmembed.exporters.graph.program import export_program, operators  # noqa: E402
from mmembed.text.pipeline import TextPipeline  # noqa: E402
from tests.helpers import data_path, in_form  # noqa: E402
from tests.exporters.graph.test_text import exits_once  # noqa: E402
from tests.text.test_jieba import DICTIONARY  # noqa: E402

logging.getLogger('torch.__trace').setLevel(logging.ERROR)  # or pytest keeps every size that the tracer thinks about
AWKWARD = [
    '',
    ' ',
    '\0',
    'a',
    'aaaaaaaaaaaaaaaa',
    'l' * 300,
    b'\xff',
    b'\xe2\x82 a',
    '\r\n',
    '☃☃ ☃',
    'e\u0301\u0301',
    'ﬁ\u0308',
    '哈' * 70,
    '1.5ab.6%x.1a.2.3',
    '杭a研',
    '<s>' * 70,
    '一只猫红色的' * 20,
    '\u1100\u1161\u11a8',
    '👩\u200d👧',
    '   x  y ',
]


@functools.cache
# short pieces make a small program
def model(**options): return fuzz_unigram.learn(fuzz_unigram.LINES, max_sentencepiece_length=4, **options)


def file(kind, **options):
    return TextPipeline(json.loads(fuzz_unigram.as_file(model(), kind).to_str()), **{'max_length': 40, **options})


def chinese(hmm, dictionary=None):
    words = sorted({w for t in fuzz_segment.random_texts(200, seed=3) for w in jieba.lcut(t, HMM=True)})
    dictionary = dictionary or '\n'.join(f'{w} {c}' for w, c in jieba.dt.FREQ.items() if c and len(w) < 4)
    return TextPipeline.from_jieba(
        {w: i for i, w in enumerate(['[PAD]', '[UNK]', '[CLS]', '[SEP]', *words])},
        max_length=40,
        hmm=hmm,
        dictionary=dictionary,
    )


FAMILIES = {
    'sentencepiece': lambda: TextPipeline.from_sentencepiece(
        model(user_defined_symbols=('[SEP]', 'aa')), max_length=40, add_eos=True
    ),
    'tokenizer.json': lambda: file('converted, bytes'),
    'jieba': lambda: chinese(True),
}


WEEKLY = {'tokenizer.json'}  # the lattice is sentencepiece's


@pytest.fixture(scope='module', params=[pytest.param(k, marks=[pytest.mark.weekly] * (k in WEEKLY)) for k in FAMILIES])
def exported(request):
    "The scripted pipeline, the ONNX file, and its two exits as functions."
    tp = FAMILIES[request.param]().eval()
    return in_form(tp, 'scripted'), *exits_once(request.param, tp)


def some_texts(n, seed):
    return [
        *fuzz_text.random_texts(n, seed),
        *fuzz_text.random_bytes(n // 2, seed),
        *fuzz_segment.random_texts(n, seed),
        *fuzz_unigram.marked(n, seed),
    ]


def holds(run, scripted, texts):
    assert differing(run, scripted.tokenize, texts) == []
    for part in texts[:1], texts[1:2], ['', ''], texts[:7]: assert differing(run, scripted.tokenize, part) == []
    assert run(*pack([]))[0].shape[0] == 0


def test_standard_operators_only(exported):
    _, path, *_ = exported
    assert set(operators(path)) == {''}
    for word in b'site-packages', b'mmembed/text': assert word not in path.read_bytes()


def test_awkward_texts_alone_and_together(exported):
    scripted, _, program, onnx = exported
    for run in program, onnx: holds(run, scripted, AWKWARD)
    assert differing(onnx, scripted.tokenize, AWKWARD, batch=1) == []


def test_quick_fuzz(exported):
    scripted, _, program, onnx = exported
    assert differing(onnx, scripted.tokenize, some_texts(800, seed=21)) == []
    assert differing(program, scripted.tokenize, some_texts(60, seed=22)) == []


def test_code_points(exported):
    scripted, _, _, onnx = exported
    some = fuzz_text.code_points(41)
    assert differing(onnx, scripted.tokenize, some + [f'a{c}国' for c in some], batch=10_000) == []


def test_corpus_in_onnxruntime(exported):
    scripted, _, _, onnx = exported
    assert differing(onnx, scripted.tokenize, fuzz_text.corpus(data_path('text'))) == []


@pytest.mark.parametrize(
    'make',
    [
        lambda: TextPipeline.from_sentencepiece(model(byte_fallback=False, character_coverage=0.98), max_length=40),
        lambda: chinese(False, DICTIONARY),
    ],
    ids=['unknowns', 'no HMM'],
)
def test_other_rules_as_programs(make):
    tp = make().eval()
    holds(export_program(tp).module(), in_form(tp, 'scripted'), AWKWARD + some_texts(25, seed=23))


def test_ties_fall_as_they_do_there():
    tied, texts = fuzz_unigram.tied(1)
    tp = TextPipeline.from_sentencepiece(tied, max_length=1000).eval()
    run = export_program(tp).module()
    assert fuzz_unigram.differences(tied, run, texts) == []
