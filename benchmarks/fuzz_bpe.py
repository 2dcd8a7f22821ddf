"""Holds byte-level BPE to open_clip's tokenizer and Hugging Face `tokenizers`, as fuzz_text.py does for WordPiece.

    python -m benchmarks.fuzz_bpe --n 200000

prints a line a tokenizer and set of texts: texts compared, texts whose ids differ. Exits 1 if any differ.
`open_clip` is compared
on the texts that need none of its guesses (HTML entities, wrongly decoded text); `open_clip, cleaned` on all, after
`open_clip_clean`."""
import argparse
import functools
import json
import os
import random
import sys

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from benchmarks.fuzz_text import code_points, data_root, differences, random_bytes, random_texts, real_lines
from mmembed.core.packing import pack
from mmembed.core.torchscript import quietly
from mmembed.text.bpe_files import CLIP_PATTERN, CLIP_STRINGS
from mmembed.text.byte_classes import needs_cleaning, open_clip_clean
from mmembed.text.pipeline import TextPipeline

ATOMS = [
    "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'", "'S", "'ſ", "’s", "''", 'don’t', '<|startoftext|>',
    '<|endoftext|>', '<|ENDOFTEXT|>', '<|endof', '<start_of_text>', '<end_of_text>', '<START_of_text>',
    '<ſtart_of_text>', '<end_of_text><end_of_text>', '<', '|>', '<mask>', '<s>', '</s>', '&amp;', '&', 'ΟΔΟΣ',
    'Σ', 'ΑΣ.', 'aΣb', 'K', 'Å', 'ﬀ', 'ＡＢ', '“x”', 'e\u0301', 'a\u0323\u0302', '\u1112\u1161\u11ab', '각\u11a8',
    '\u0958', '  ', '\n\n', ' \t ', '\u3000', '\x1c', '\x85', '\u200b', '1234', '½²', '\u0345', 'a\u0345s',
    '!\u0345', 'aaaaaaaaa', 'hahahahaha', '!!!!!!', '......', '_', 'ⅣⅤ', '🧑🏽‍🚀', 'tablecloth', 'Straßenbahn',
    'ʼn', 'Ǆ',
]


def bpe_texts(n, seed=0):
    "`n` strings of what the patterns look at, mixed with the strings of fuzz_text."
    rng, others = random.Random(seed), random_texts(n, seed)
    mixed = [
        ''.join(
            rng.choice(ATOMS) if rng.random() < 0.7 else rng.choice(' abcdeilmrstvwz\'') * rng.randrange(1, 3)
            for _ in range(rng.randrange(1, 12))
        )
        for _ in range(n // 2)
    ]
    return mixed + others[:n - len(mixed)]


def clip_tokenizer(listed=True, normalized=False):
    "CLIP as transformers writes it: today's (`listed`), or that of the files on the hub."
    from open_clip.tokenizer import SimpleTokenizer
    t = SimpleTokenizer()
    vocab = {**t.encoder, **dict(zip(CLIP_STRINGS, t.all_special_ids))}
    for s in ('<start_of_text>', '<end_of_text>'): del vocab[s]
    tok = Tokenizer(models.BPE(vocab, list(t.bpe_ranks), end_of_word_suffix='</w>', unk_token='<|endoftext|>'))
    tok.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r'\s+'), ' '), normalizers.Lowercase()]
    )
    pattern = '|'.join([*(s.replace('|', r'\|') for s in CLIP_STRINGS * listed), CLIP_PATTERN])
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), 'removed', invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tok.add_special_tokens(
        [AddedToken(CLIP_STRINGS[0], normalized=normalized), AddedToken(CLIP_STRINGS[1], normalized=False)]
    )
    tok.decoder = decoders.ByteLevel()
    tok.post_processor = processors.RobertaProcessing(
        (CLIP_STRINGS[1], 49407), (CLIP_STRINGS[0], 49406), trim_offsets=False, add_prefix_space=False
    )
    return tok


def gpt2_tokenizer(texts, vocab_size=8000, prefix=False):
    "A byte-level BPE in the manner of RoBERTa, trained on `texts`."
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=prefix), decoders.ByteLevel()
    special = ['<s>', '<pad>', '</s>', '<unk>', AddedToken('<mask>', lstrip=True, normalized=False)]
    tok.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tok.post_processor = processors.RobertaProcessing(('</s>', 2), ('<s>', 0), add_prefix_space=prefix)
    return tok


@functools.cache
def open_clip_reference():
    from open_clip.tokenizer import SimpleTokenizer
    return SimpleTokenizer()


def open_clip_differences(tokenize, texts, batch=1000):
    "The texts whose ids are not those of open_clip's tokenizer (77 positions)."
    wrong, theirs = [], open_clip_reference()
    for i in range(0, len(texts), batch):
        part = texts[i:i + batch]
        strings = [t if isinstance(t, str) else t.decode(errors='replace') for t in part]
        want = theirs(strings)
        got, mask = tokenize(*pack(part))
        full = torch.zeros_like(want)
        full[:, :got.shape[1]] = got * mask
        wrong += [part[j] for j in (full != want).any(1).nonzero().flatten().tolist()]
    return wrong


def cleaned_differences(tokenize, texts, batch=1000):
    "The same, when each text has been through `open_clip_clean`."
    wrong, theirs = [], open_clip_reference()
    for i in range(0, len(texts), batch):
        part = [t if isinstance(t, str) else t.decode(errors='replace') for t in texts[i:i + batch]]
        want = theirs(part)
        got, mask = tokenize(*pack([open_clip_clean(t) for t in part]))
        full = torch.zeros_like(want)
        full[:, :got.shape[1]] = got * mask
        wrong += [part[j] for j in (full != want).any(1).nonzero().flatten().tolist()]
    return wrong


def in_graph(texts):
    "The texts of which open_clip's cleaning makes nothing that the graph does not."
    return [t for t in texts if not needs_cleaning(t if isinstance(t, str) else t.decode(errors='replace'))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--n', type=int, default=200_000, help='random strings a tokenizer')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--quick', action='store_true', help='few code points and real lines, to see that it works')
    parser.add_argument('--only', default='', help='tokenizers whose name contains this')
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'
    root = data_root()/'text'
    sets = {
        'random strings': bpe_texts(args.n, args.seed),
        'broken UTF-8': random_bytes(args.n // 4, args.seed),
        'code points': code_points(),
        'between letters': [f'a{c}b' for c in code_points()],
    }
    if root.exists(): sets['real corpora'] = real_lines(root)
    learn_from = sets.get('real corpora', sets['random strings'])[:60_000]
    checks = [
        (name, TextPipeline(json.loads(tok.to_str())), tok)
        for name, tok in [
            ('CLIP, transformers today', clip_tokenizer()),
            ('CLIP, as on the hub', clip_tokenizer(False, True)),
            ('GPT-2 style', gpt2_tokenizer(learn_from, 30_000)),
            ('GPT-2 style, prefix space', gpt2_tokenizer(learn_from, prefix=True)),
        ]
    ]
    checks += [
        ('open_clip', TextPipeline.from_open_clip('ViT-B-32'), None),
        ('open_clip, cleaned', TextPipeline.from_open_clip('ViT-B-32', cleaned=True), None),
    ]
    total = 0
    for name, tp, tok in checks:
        if args.only not in name: continue
        scripted = quietly(torch.jit.script, tp)
        for what, texts in sets.items():
            batch = 20_000 if what in ('code points', 'between letters') else 1000
            if tok: wrong = differences(tok, scripted.tokenize, texts, batch)
            elif 'cleaned' in name: wrong = cleaned_differences(scripted.tokenize, texts, batch)
            else:
                texts = in_graph(texts)
                wrong = open_clip_differences(scripted.tokenize, texts, batch)
            total += len(wrong)
            print(
                f'{name:26} {what:16} {len(texts):>9,} texts {len(wrong):>5} differ', *map(ascii, wrong[:3]), flush=True
            )
    sys.exit(total > 0)


if __name__ == '__main__': main()
