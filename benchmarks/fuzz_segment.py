"""Holds TextPipeline's Chinese words to `jieba.cut` on random strings, every code point, and (where present) the
real corpora.

    python -m benchmarks.fuzz_segment --n 200000

prints a line a mode and corpus: texts compared, texts whose words differ. Exits 1 if any differ."""
import argparse
import random
import sys

import jieba
import torch

from benchmarks import fuzz_text
from mmembed.core.packing import pack
from mmembed.core.torchscript import quietly
from mmembed.text.jieba import Segmenter, Utf8Front, read_jieba
from mmembed.text.unicode import Codes

jieba.setLogLevel(60)
NAMES = [
    '1.5',
    '3.5%',
    '.',
    '%',
    'iPhone',
    'C++',
    'c#',
    'AT&T',
    '+#&_-',
    '..',
    '1.2.3',
    'a1.b',
    'T恤',
    'B超',
    '\r\n',
    '\r',
    '\n',
    'γ',
    '\x1c',
    '\u3000',
    '哈哈哈哈',
]


def random_texts(n, seed=0):
    "`n` strings of dictionary words, rare characters, numbers, names and anything else."
    rng, words = random.Random(seed), []
    jieba.initialize()
    words = sorted(w for w, c in jieba.dt.FREQ.items() if c)
    common = ''.join(w for w in words if len(w) == 1 and jieba.dt.FREQ[w] > 20_000)
    other = fuzz_text.random_texts(2000, seed)
    def piece():
        r = rng.random()
        if r < .3: return rng.choice(words)
        if r < .45: return ''.join(rng.choices(common, k=rng.randrange(1, 6)))
        if r < .6: return ''.join(chr(rng.randrange(0x4E00, 0x9FE0)) for _ in range(rng.randrange(1, 5)))
        if r < .75: return rng.choice(words)[:rng.randrange(1, 4)]
        if r < 0.93:
            return (
                rng.choice(NAMES)
                if rng.random() < 0.5
                else ''.join(rng.choices('ab019..%%+#&_-', k=rng.randrange(1, 9)))
            )
        return rng.choice(other)
    return [''.join(piece() for _ in range(rng.randrange(1, 10))) for _ in range(n)]


def differences(cut, texts, hmm, batch=1000):
    "The texts whose words from `cut(data, offsets)` (code points, starts, row offsets) are not those of jieba."
    wrong = []
    for i in range(0, len(texts), batch):
        part = [t if isinstance(t, str) else t.decode(errors='replace') for t in texts[i:i + batch]]
        _, start, offsets = cut(*pack(texts[i:i + batch]))
        rows, bounds, at = start.tolist(), offsets.tolist(), 0
        for t, a, b in zip(part, bounds, bounds[1:]):
            starts = [s - at for s in rows[a:b]]
            if [t[s:e] for s, e in zip(starts, [*starts[1:], len(t)])] != jieba.lcut(t, HMM=hmm): wrong.append(t)
            at += len(t)
    return wrong


class Cut(torch.nn.Module):
    "Packed UTF-8 -> code points, the starts of words, and the rows' offsets among them."
    def __init__(self, hmm):
        super().__init__()
        self.front, self.segmenter = Utf8Front(), Segmenter(read_jieba(hmm=hmm))

    def forward(self, data: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = self.front(data, offsets, False)
        words = self.segmenter(Codes(x.codes, x.offsets))
        return x.codes, words.start, words.offsets


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--n', type=int, default=200_000, help='random strings a mode')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--quick', action='store_true', help='few code points and real lines, to see that it works')
    args = parser.parse_args()
    torch.set_num_threads(1)
    root, total = fuzz_text.data_root()/'text', 0
    sets = {
        'Chinese strings': random_texts(args.n, args.seed),
        'random strings': fuzz_text.random_texts(args.n // 4, args.seed),
        'broken UTF-8': fuzz_text.random_bytes(args.n // 8, args.seed),
        'code points': fuzz_text.code_points(),
        'between letters': [f'a{c}国b' for c in fuzz_text.code_points(3)],
    }
    if root.exists(): sets['real corpora'] = fuzz_text.real_lines(root)
    for hmm in (False, True):
        scripted = quietly(torch.jit.script, Cut(hmm))
        for what, texts in sets.items():
            wrong = differences(
                scripted, texts, hmm, batch=20_000 if what in ('code points', 'between letters') else 1000
            )
            total += len(wrong)
            print(
                f'HMM={hmm!s:5} {what:16} {len(texts):>9,} texts {len(wrong):>5} differ',
                *map(ascii, wrong[:3]),
                flush=True,
            )
    sys.exit(total > 0)


if __name__ == '__main__': main()
