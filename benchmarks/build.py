"""How long each kind of TextPipeline takes to build, what its buffers weigh and how large its scripted file is.

    python -m benchmarks.build

Each is built in a process of its own, first with an empty cache folder (the reference is asked about every code
point), then with the
one that left. Printed, in CPU seconds of one thread (what an idle machine would need): imports (torch and the
libraries that the kind needs), the pipeline cold and warm; MiB of
buffers, MiB of the saved file. Vocabularies of 32,000 are trained on the texts of the data folder where it is at
hand."""
import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import begun

SIZE = 32_000


def texts():
    from benchmarks.fuzz_text import corpus, data_root
    root = data_root()/'text'
    if not root.exists(): raise SystemExit('no texts to train vocabularies on: set MMEMBED_DATA')
    return [t for t in corpus(root) if t.strip() and '\0' not in t]


def prepare(folder, quick=False):
    "Writes the files that pipelines are built from; small ones of few texts with `quick`."
    import sentencepiece
    from benchmarks.fuzz_bpe import gpt2_tokenizer
    from benchmarks.fuzz_text import minilm
    from mmembed.text.trainers import learn_words
    lines, size = (texts()[:3000], 4000) if quick else (texts(), SIZE)
    if minilm(): minilm().save(str(folder/'wordpiece.json'))
    gpt2_tokenizer(lines, size).save(str(folder/'bpe.json'))
    (folder/'words.json').write_text(json.dumps(learn_words(lines, size)))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / 'unigram'), vocab_size=size,
        hard_vocab_limit=False, byte_fallback=True, character_coverage=0.9995, minloglevel=2,
        max_sentence_length=1 << 16,
    )
    vocab = json.loads((folder/'wordpiece.json').read_text())['model']['vocab'] if minilm() else {}
    if vocab: (folder/'vocab.txt').write_text('\n'.join(sorted(vocab, key=vocab.get)) + '\n', encoding='utf-8')


def kinds(folder):
    "name -> (what its libraries are, how it is made)."
    from mmembed.text.pipeline import TextPipeline as T
    return {'WordPiece, tokenizer.json, 30,522': ('', lambda: T.from_pretrained(folder/'wordpiece.json')),
            'WordPiece, cased, vocab.txt, 30,522': ('', lambda: T.from_vocab(folder/'vocab.txt', lowercase=False)),
            'words, tokenizer.json, 32,000': ('', lambda: T.from_pretrained(folder/'words.json')),
            'CLIP, open_clip, 49,408': ('open_clip', lambda: T.from_open_clip('ViT-B-32')),
            'GPT-2 style, tokenizer.json, 32,000': ('', lambda: T.from_pretrained(folder/'bpe.json')),
            'unigram, SentencePiece, 32,000': ('sentencepiece', lambda: T.from_sentencepiece(folder/'unigram.model')),
            'Chinese words, jieba, 349,045': ('jieba jieba.finalseg', lambda: T.from_jieba({'[UNK]': 0, '一': 1}))}


def one(folder, name):
    "Builds one kind; prints its figures as JSON."
    start = time.process_time()
    import importlib

    import torch
    from mmembed.core.torchscript import quietly
    torch.set_num_threads(1)
    libraries, make = kinds(folder)[name]
    for m in libraries.split(): importlib.import_module(m)
    imported = time.process_time()
    tp = make()
    built = time.process_time()
    again = time.process_time()
    make()
    second = time.process_time() - again
    buffer = io.BytesIO()
    quietly(torch.jit.save, quietly(torch.jit.script, tp.eval()), buffer)
    tables = sum(b.numel() * b.element_size() for b in tp.buffers())
    print(
        json.dumps(
            dict(
                imports=imported - start,
                built=built - imported,
                second=second,
                buffers=tables / 2**20,
                file=len(buffer.getvalue()) / 2**20,
            )
        )
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--one', help=argparse.SUPPRESS)
    parser.add_argument('--folder', type=Path, help='keep the trained vocabularies here and use them again')
    parser.add_argument(
        '--quick', action='store_true', help='few texts, small vocabularies: to see that everything works'
    )
    args = begun(parser)
    if args.one: return one(args.folder, args.one)
    with tempfile.TemporaryDirectory() as d:
        folder = args.folder or Path(d)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder/'unigram.model').exists(): prepare(folder, args.quick)
        print(
            '| kind, source, entries | imports, s | cold, s | warm, s | second in a process, s | buffers, MiB | '
            'scripted file, MiB |\n|---|---|---|---|---|---|---|'
        )
        for name in kinds(folder):
            cache = Path(d)/'cache'/name.replace(' ', '_')
            env = {**os.environ, 'XDG_CACHE_HOME': str(cache), 'OMP_NUM_THREADS': '1'}
            runs = []
            for _ in range(2):
                done = subprocess.run(
                    [sys.executable, '-m', 'benchmarks.build', '--one', name, '--folder', str(folder)],
                    env=env,
                    capture_output=True,
                    text=True,
                )
                if done.returncode: raise SystemExit(f'{name}: {done.stderr[-500:]}')
                runs.append(json.loads(done.stdout.splitlines()[-1]))
            cold, warm = runs
            print(
                f'| {name} | {warm["imports"]:.1f} | {cold["built"]:.2f} | {warm["built"]:.2f} | {warm["second"]:.2f} '
                f'| {warm["buffers"]:.1f} | {warm["file"]:.1f} |',
                flush=True,
            )


if __name__ == '__main__': main()
