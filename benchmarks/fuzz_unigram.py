"""Holds TextPipeline to `sentencepiece`, and to `tokenizers` for the same models as a tokenizer.json, on random
strings, every code point, and (where
present) the real corpora.

    python -m benchmarks.fuzz_unigram --n 200000

learns unigram models (one of 32,000 pieces where the real texts are present, kept in build/), and prints a line a
model and corpus: texts
compared, texts whose ids differ. Exits 1 if any differ."""
import argparse
import functools
import io
import json
import random
import sys
from pathlib import Path

import sentencepiece
import torch
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from benchmarks import fuzz_text
from mmembed.core.torchscript import quietly
from mmembed.text.pipeline import TextPipeline

LINES = [
    'A small red circle left of a large blue square.', 'Crème brûlée; naïve café!', '一个红色的小圆在蓝色方块左边',
    'ไทย ที่นี่', '각 한국어 가각힣', 'unaffable, affable: internationalization', "don't I'll 10000 200",
    'Ωμέγα straße', '👩‍👩‍👧🏽🇩🇪❤️', 'اَبُّتِ ١٢٣',
] * 20


def learn(lines, **options):
    "A model learnt from `lines`, as the content of its file."
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        minloglevel=2,
        hard_vocab_limit=False,
        num_threads=1,
        **{'vocab_size': 500, 'byte_fallback': True, **options},
    )
    return out.getvalue()


def multilingual(root, cache):
    "The model of up to 32,000 pieces learnt from the real texts, kept in the folder `cache`."
    path = cache/f'multilingual-{sentencepiece.__version__}.model'
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            t
            for t in fuzz_text.corpus(root)
            if t.strip() and '\0' not in t and not any(0xD800 <= ord(c) < 0xE000 for c in t)
        ]
        own = path.with_suffix('.tmp')
        own.write_bytes(learn(lines, vocab_size=32_000, character_coverage=.9995))
        own.replace(path)
    return path.read_bytes()


def scored(pieces, **normalizer):
    "A model of given (piece, score), with the identity for a normaliser."
    m = sentencepiece_model_pb2.ModelProto()
    for p, s, kind in [('<unk>', 0., 2), *((p, s, 1) for p, s in pieces)]: m.pieces.add(piece=p, score=s, type=kind)
    m.trainer_spec.model_type, m.trainer_spec.unk_id, m.normalizer_spec.name = 1, 0, 'identity'
    for k, v in normalizer.items(): setattr(m.normalizer_spec, k, v)
    return m.SerializeToString()


def tied(seed, texts=False):
    "A model whose pieces tie and nearly tie, and texts over its few letters."
    rng, pieces = random.Random(seed), {'a', 'b', '▁'}
    while len(pieces) < 16: pieces.add(rng.choice(['', '▁']) + ''.join(rng.choices('abc', k=rng.randrange(1, 6))))

    def score():
        return rng.choice([-1.0, -2.0, -3.0, -1.1, -2.2, -3.3, -rng.random() * 5, -1.0 - rng.randrange(4) * 2**-20])

    model = scored(
        [(p, score()) for p in sorted(pieces)],
        add_dummy_prefix=rng.random() < 0.5,
        remove_extra_whitespaces=rng.random() < 0.5,
    )
    return model, [
        ''.join(rng.choices('abcx ', weights=[5, 5, 2, 1, 1], k=rng.randrange(1, rng.choice([8, 40, 400]))))
        for _ in range(200)
    ]


VARIANTS = {
    'byte fallback': {},
    'unknowns': dict(byte_fallback=False, character_coverage=0.98),
    'no dummy prefix': dict(add_dummy_prefix=False),
    'spaces kept': dict(remove_extra_whitespaces=False, allow_whitespace_only_pieces=True),
    'pieces across words': dict(split_by_whitespace=False),
    'identity': dict(normalization_rule_name='identity'),
    'NFKC, case folded': dict(normalization_rule_name='nmt_nfkc_cf'),
    'user symbols': dict(user_defined_symbols=['[SEP]', '[sep', 'don', ' x', 'é', 'aa']),
}


def _converted(charsmap): return [*charsmap, normalizers.Strip(left=False), normalizers.Replace(Regex(' {2,}'), '▁')]


def _canonical(charsmap):
    return [
        normalizers.Lowercase(),
        normalizers.Replace(Regex(r'[!"\#\$%\&\'\(\)\*\+,\-\.:;=\?@\[\\\]\^_`\{\|\}\~]'), ''),
        normalizers.Replace(Regex(r'\s+'), ' '),
        normalizers.Strip(),
        *charsmap,
    ]


# as a tokenizer.json: (normalizers, given the charsmap's; pre-tokenizers; byte fallback)
FILES = {
    'T5 of transformers 5': (list, [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()], False),
    'converted': (_converted, [pre_tokenizers.Metaspace()], False),
    'converted, bytes': (_converted, [pre_tokenizers.Metaspace()], True),
    'lower-cased, no signs': (_canonical, [pre_tokenizers.Metaspace()], True),
    'prefix first': (list, [pre_tokenizers.Metaspace(prepend_scheme='first')], False),
    'no prefix, not split': (_converted, [pre_tokenizers.Metaspace(prepend_scheme='never', split=False)], True),
    'white space only': (lambda c: [normalizers.Replace('a', 'bb'), *c], [pre_tokenizers.WhitespaceSplit()], True),
    'no words': (lambda c: [*c, normalizers.Replace(' ', '▁')], [], True),
}


def as_file(model, kind):
    "The SentencePiece model as `tokenizers` reads it from a tokenizer.json."
    proto, (steps, splits, byte_fallback) = sentencepiece_model_pb2.ModelProto(), FILES[kind]
    proto.ParseFromString(model)
    pieces, charsmap = [(p.piece, p.score) for p in proto.pieces], proto.normalizer_spec.precompiled_charsmap
    marks = ['<unk>', '<s>', '</s>', '<mask>']
    numbers = {p: i for i, (p, _) in enumerate(pieces)}
    pieces += [(m, 0.) for m in marks if m not in numbers]
    tok = Tokenizer(models.Unigram(pieces, numbers['<unk>'], byte_fallback and '<0x00>' in numbers))
    tok.normalizer = normalizers.Sequence(steps([normalizers.Precompiled(charsmap)] if charsmap else []))
    if splits: tok.pre_tokenizer = pre_tokenizers.Sequence(splits) if len(splits) > 1 else splits[0]
    tok.add_special_tokens([AddedToken(m, normalized=False, lstrip=m == '<mask>') for m in marks])
    frame = [(m, tok.token_to_id(m)) for m in ('<s>', '</s>')]
    tok.post_processor = processors.TemplateProcessing(
        single='<s> $A </s>', pair='<s> $A </s> </s> $B </s>', special_tokens=frame
    )
    return Tokenizer.from_str(tok.to_str())  # a file's numbers are what the reference's parser makes of them


def file_differences(tok, tokenize, texts, batch=1000):
    return fuzz_text.differences(tok, tokenize, texts, batch, max_length=1 << 20)


def marked(n, seed=0):
    "`n` strings with added tokens, signs that look like them, clusters and spaces of all kinds."
    rng = random.Random(seed)
    parts = [
        '<s>', '</s>', '<mask>', '<unk>', '＜unk＞', '＜s＞', '<0x41>', '▁', ' ', '  ', '\u3000', '\u200b', '\r\n',
        'a', '☃', '\u2603\u200d\u00a9\u0301', 'ﬁ\u0308', 'e\u0301', 'e\u0301\u0301\u0301', '가\u11a8',
        '\u1100\u1161', 'क\u094dष', '½\u0301', '🇩🇪🇫', '\u0600a', '\u0300', '\ufe0f', 'Å\u0327', '\u0e33',
        'か\u3099', '\0', '\x01',
    ]
    return [''.join(rng.choices(parts, k=rng.randrange(1, 10))) for _ in range(n)]


def differences(model, tokenize, texts, batch=1000):
    "The texts (str or bytes) whose ids from `tokenize(data, offsets)` are not those of the SentencePiece model."
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    return fuzz_text.wrong_rows(sp.encode, tokenize, texts, batch)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--n', type=int, default=200_000, help='random strings a model')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--quick', action='store_true', help='few code points and real lines, to see that it works')
    args = parser.parse_args()
    torch.set_num_threads(1)
    root, models = fuzz_text.data_root()/'text', {}
    if root.exists(): models['multilingual, 32,000'] = multilingual(root, Path(__file__).resolve().parents[1]/'build')
    models |= {name: learn(LINES, **options) for name, options in VARIANTS.items()}
    sets = {
        'random strings': fuzz_text.random_texts(args.n, args.seed),
        'broken UTF-8': fuzz_text.random_bytes(args.n // 4, args.seed),
        'code points': fuzz_text.code_points(),
        'between letters': [f'a{c}b' for c in fuzz_text.code_points()],
    }
    if root.exists(): sets['real corpora'] = fuzz_text.real_lines(root)
    total, marks = 0, marked(args.n // 4, args.seed)
    def compare(name, find, tokenize, part):
        wrong = 0
        for what, texts in sets.items():
            if part and what in ('code points', 'between letters', 'real corpora'): texts = texts[part % 7::7]
            found = find(tokenize, texts, batch=20_000 if what in ('code points', 'between letters') else 1000)
            wrong += len(found)
            print(
                f'{name:24} {what:16} {len(texts):>9,} texts {len(found):>5} differ', *map(ascii, found[:3]), flush=True
            )
        return wrong
    for k, (name, model) in enumerate(models.items()):
        scripted = quietly(torch.jit.script, TextPipeline.from_sentencepiece(model, max_length=1 << 20))
        total += compare(name, functools.partial(differences, model), scripted.tokenize, k)
    sets['marks, clusters'] = marks
    for k, kind in enumerate(FILES):
        tok = as_file(next(iter(models.values())), kind)
        scripted = quietly(torch.jit.script, TextPipeline(json.loads(tok.to_str()), max_length=1 << 20))
        total += compare(kind, functools.partial(file_differences, tok), scripted.tokenize, k)
    texts = wrong = 0
    for seed in range(args.n // 2000):
        model, strings = tied(seed + args.seed)
        found = differences(model, TextPipeline.from_sentencepiece(model, max_length=1 << 20).tokenize, strings)
        texts, wrong = texts + len(strings), wrong + len(found)
        tok = as_file(model, ('converted', 'white space only', 'no words')[seed % 3])
        found = file_differences(tok, TextPipeline(json.loads(tok.to_str()), max_length=1 << 20).tokenize, strings)
        texts, wrong = texts + len(strings), wrong + len(found)
    print(f'{"tied scores":24} {"few letters":16} {texts:>9,} texts {wrong:>5} differ', flush=True)
    sys.exit(total + wrong > 0)


if __name__ == '__main__': main()
