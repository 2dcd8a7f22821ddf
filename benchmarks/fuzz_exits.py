"""Holds the two exits of a text pipeline, the `torch.export` program and the ONNX file, to its scripted form.

    python -m benchmarks.fuzz_exits --n 20000

prints a line a family (what was exported, in how many seconds, to how many KiB) and a line a set of texts: texts
compared, and the
texts whose ids or mask differ, in the program and in onnxruntime. Exits 1 if any differ, or if an operator is not
ONNX's own.

    python -m benchmarks.fuzz_exits --whole

exports a small model of each family with its ONNX files instead, for a DualEncoder with labels, a PairClassifier and
`decode=False`, and prints what
`verify` found in onnxruntime: built-in texts and pictures in batches of 0, 1, 3 and 64."""
import argparse
import functools
import json
import logging
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from benchmarks.fuzz_bpe import bpe_texts, clip_tokenizer, gpt2_tokenizer
from benchmarks.fuzz_text import bert_tokenizer, code_points, data_root, minilm, random_bytes, random_texts, real_lines
from mmembed.core.packing import pack
from mmembed.core.torchscript import quietly
from mmembed.exporters.graph.program import export_program, operators, text_to_onnx
from mmembed.text.pipeline import TextPipeline

LONG = [
    'q' * 5000,
    ''.join(random.Random(1).choices('abcdeilnorst', k=5000)),
    'un' * 2500,
    '一' * 1700,
    'e\u0301' * 2500,
    '!?' * 2500,
    ' ' * 5000,
]
AWKWARD = [
    '',
    ' ',
    '\0',
    'a',
    'q' * 101,
    'q' * 100,
    'un' * 300,
    '[[SEP][MASK]]',
    '[[S[[SEP]]]]',
    'aabaaba aaaaa abababa',
    '<l> x <l><r>  <r> <w>y <w>',
    '[SEP]' * 70,
    '\U0001d15e\u0301\U0001d16d',
    'a\u0323\u0301\u0302',
    '\u0301\u0323',
    b'\xff',
    b'\xe2\x82',
    b'\xf0\x9f',
    '\ufffd',
    '각',
    'a \t\n b',
    "?!'?!",
    'a\0',
    '\0a\0',
    "it's they'll",
    "'",
    "'l",
    '<|endoftext|>',
    '<end_of_text>!<end_of_text>',
    '<mask> <s>',
    'ΟΔΟΣ',
    'Σ.',
    '\u1112\u1161\u11ab',
    '\u0958',
]


@functools.cache
def learnt():
    "A WordPiece vocabulary of many scripts, so that words fall apart into pieces in all of them."
    texts = random_texts(400, seed=5) + ['unaffable international words'] * 3
    return TextPipeline.learn(texts, vocab_size=3000).spec()['tokenizer']['model']['vocab']


def uncased():
    "bert-base-uncased where it is at hand, with added tokens that overlap and have conditions."
    tok = minilm() or bert_tokenizer(learnt(), lowercase=True)
    added = {'[[': {}, ']]': {}, '[[S': {}, 'aba': {}, 'aa': {}}
    added |= {'<l>': dict(lstrip=True), '<r>': dict(rstrip=True), '<w>': dict(single_word=True)}
    tok.add_special_tokens([AddedToken(c, normalized=False, **k) for c, k in added.items()])
    return json.loads(tok.to_str())


def cased():
    "bert-base-chinese's vocabulary where it is at hand, cased."
    path = data_root()/'text'/'vocab'/'bert-base-chinese-vocab.txt'
    vocab = (
        {t: i for i, t in enumerate(path.read_text(encoding='utf-8').rstrip('\n').split('\n'))}
        if path.exists()
        else learnt()
    )
    return json.loads(bert_tokenizer(vocab, lowercase=False).to_str())


def words():
    "A whole-word vocabulary."
    vocab = {
        '[UNK]': 0,
        'a': 1,
        'b': 2,
        '一': 3,
        "'": 4,
        'é': 5,
        '?!': 6,
        'ab': 7,
        '[PAD]': 8,
        'the': 9,
        '。': 10,
        '.': 11,
    }
    tok = Tokenizer(models.WordLevel(vocab, unk_token='[UNK]'))
    tok.normalizer, tok.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tok.add_special_tokens(['[PAD]'])
    return json.loads(tok.to_str())


FAMILIES = {  # name -> the pipeline
    'WordPiece, uncased': lambda: TextPipeline(uncased(), max_length=48),
    'WordPiece, cased, Chinese': lambda: TextPipeline(cased(), max_length=3000),
    'whole words': lambda: TextPipeline(words(), max_length=3000),
    'CLIP, open_clip': lambda: TextPipeline.from_open_clip('ViT-B-32'),
    'CLIP, tokenizer.json': lambda: TextPipeline(json.loads(clip_tokenizer().to_str()), max_length=3000),
    'GPT-2 style': lambda: TextPipeline(
        json.loads(gpt2_tokenizer(random_texts(400, seed=5) + ['unaffable words'] * 9, 3000, prefix=True).to_str()),
        max_length=3000,
    ),
}


def lattices():
    """Families whose references are packages of their own: the models of `fuzz_unigram`, as a .model and as a
    tokenizer.json, and jieba's words."""
    import jieba
    from benchmarks import fuzz_segment, fuzz_unigram
    def model():
        real, cache = data_root()/'text', Path(__file__).resolve().parents[1]/'build'
        return fuzz_unigram.multilingual(real, cache) if real.exists() else fuzz_unigram.learn(fuzz_unigram.LINES)
    def chinese(hmm):
        words = sorted({w for t in fuzz_segment.random_texts(2000, seed=3) for w in jieba.lcut(t)})
        return TextPipeline.from_jieba(
            {w: i for i, w in enumerate(['[PAD]', '[UNK]', *words])}, max_length=3000, hmm=hmm
        )
    return {
        'sentencepiece': lambda: TextPipeline.from_sentencepiece(model(), max_length=3000),
        'Unigram, tokenizer.json': lambda: TextPipeline(
            json.loads(fuzz_unigram.as_file(model(), 'converted, bytes').to_str()), max_length=3000
        ),
        'jieba, HMM=False': lambda: chinese(False),
        'jieba, HMM=True': lambda: chinese(True),
    }


def onnx_runner(path):
    "An ONNX file as a function (data, offsets) -> (ids, mask)."
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    s = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])

    def run(data, offsets):
        return tuple(map(torch.from_numpy, s.run(None, dict(data=data.numpy(), offsets=offsets.numpy()))))
    return run


def exits(tp, path):
    "Both exits, traced once: the program and the ONNX file at `path`, as functions (data, offsets) -> (ids, mask)."
    program = export_program(tp)
    run = program.module()
    return run, onnx_runner(text_to_onnx(program, path))


def differing(run, tokenize, texts, batch=256):
    "The texts whose ids or mask from `run` are not those from `tokenize`; all of a batch whose shape differs."
    wrong = []
    for i in range(0, len(texts), batch):
        part = texts[i:i + batch]
        (ids, mask), (want, marks) = run(*pack(part)), tokenize(*pack(part))
        if ids.shape != want.shape or mask.shape != marks.shape: wrong += part
        else: wrong += [part[j] for j in ((ids != want) | (mask != marks)).any(1).nonzero().flatten().tolist()]
    return wrong


def small_model(tp, pairs):
    "Towers of random weights behind a tokenizer."
    from mmembed.models.dual import DualEncoder
    from mmembed.models.pair import PairClassifier
    from mmembed.models.towers import ConvNet, TextTransformer
    from mmembed.vision.pipeline import VisionPipeline
    tp.max_length = 48
    torch.manual_seed(0)
    text, image = (
        TextTransformer(tp, width=32, depth=1, heads=2),
        ConvNet(VisionPipeline(size=48), channels=(8, 16), width=32),
    )
    return (
        PairClassifier(text, image, ['mismatch', 'match'], dim=24) if pairs else DualEncoder(text, image, dim=24)
    ).eval()


def whole(families):
    "The number of exports that fail."
    from mmembed.exporters.export import export
    failed = 0
    for i, (name, make) in enumerate(families.items()):
        pairs, began = i % 2 > 0, time.process_time()
        options = (
            {} if pairs else dict(labels=['a cat', 'a dog', 'a red circle'], top_k=2, threshold=0.2, decode=i % 3 > 0)
        )
        with tempfile.TemporaryDirectory() as d:
            try:
                rows = [
                    r
                    for r in export(
                        small_model(make().eval(), pairs), Path(d) / 'm.pt', onnx=Path(d) / 'g', fresh=False,
                        cpp=False, **options,
                    ).rows
                    if r.stage == 'onnx'
                ]
            except (RuntimeError, ValueError, TypeError) as e:
                rows, failed = [], failed + (print(f'{name}: {e}') or 1)
        told = ', '.join(f'{r.what} {r.difference:.2g}' for r in rows if r.n > 1)
        if rows:
            print(
                f'{name}, {"pairs" if pairs else "two towers"}{", ".join([""] + sorted(options))}: '
                f'{time.process_time() - began:.0f} s of CPU, {told}',
                flush=True,
            )
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--n', type=int, default=20_000, help='random strings a family')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--quick', action='store_true', help='few code points and real lines, to see that it works')
    parser.add_argument('--only', default='', help='families whose name contains this')
    parser.add_argument('--whole', action='store_true', help='export small models instead')
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in ('torch.__trace', 'onnx_ir'): logging.getLogger(name).setLevel(logging.ERROR)
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'
    if args.whole: sys.exit(whole({k: v for k, v in {**FAMILIES, **lattices()}.items() if args.only in k}) > 0)
    root = data_root()/'text'
    sets = {
        'awkward': AWKWARD + LONG,
        'random strings': bpe_texts(args.n, args.seed),
        'broken UTF-8': random_bytes(args.n // 4, args.seed),
        'code points': code_points(),
        'between letters': [f'a{c}b' for c in code_points(7)],
    }
    if root.exists(): sets['real corpora'] = real_lines(root)
    total = 0
    for name, make in {**FAMILIES, **lattices()}.items():
        if args.only not in name: continue
        tp, began = make().eval(), time.perf_counter()
        with tempfile.TemporaryDirectory() as d:
            path = Path(d)/'text.onnx'
            program, onnx = exits(tp, path)
            foreign, size = set(operators(path)) - {''}, path.stat().st_size >> 10
        total += len(foreign)
        print(
            f'{name}: both exits in {time.perf_counter() - began:.0f} s, ONNX {size:,} KiB, domains beside ONNX\'s '
            f'own: {sorted(foreign) or "none"}',
            flush=True,
        )
        scripted = quietly(torch.jit.script, tp)
        for what, texts in sets.items():
            batch = 20_000 if what in ('code points', 'between letters') else 256
            wrong = [differing(run, scripted.tokenize, texts, batch) for run in (program, onnx)]
            if what == 'awkward':
                wrong = [w + differing(run, scripted.tokenize, texts, 1) for w, run in zip(wrong, (program, onnx))]
            total += sum(map(len, wrong))
            print(
                f'  {what:16} {len(texts):>9,} texts, differ: {len(wrong[0])} in the program, {len(wrong[1])} in '
                f'onnxruntime',
                *map(ascii, sum(wrong, [])[:3]),
                flush=True,
            )
    sys.exit(total > 0)


if __name__ == '__main__': main()
