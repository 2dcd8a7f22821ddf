"""MATXScript's own example tokenizer, for `benchmarks/text.py --matxscript`: batches in on stdin, CPU seconds out on
stdout.

    python3.11 -m venv ENV && ENV/bin/pip install matxscript==1.8.1 "numpy<2" && git clone
    https://github.com/bytedance/matxscript SRC
    ENV/bin/python benchmarks/peers/text_matxscript.py SRC VOCAB.txt [--plain | --words]

`--plain` runs the same source uncompiled; `--words` is its first example, a table from words to ids, with the
splitting and padding that this leaves to the caller compiled as well. A batch is a line with the number of texts,
then a line each."""
import importlib.util
import sys
import time
from pathlib import Path
from typing import Dict, List, Tuple

import matx
import matx.text


def batches(stream):
    "Lists of texts until the stream ends."
    while line := stream.readline(): yield [stream.readline().rstrip(b'\n').decode() for _ in range(int(line))]


def example(path: Path):
    "The module of one of the project's examples, with the one name that it forgets to import."
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    module.WordPieceTokenizer = matx.text.WordPieceTokenizer
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


class Padded:
    "Texts -> padded ids and mask, by the example's table of words."
    def __init__(self, words: List[str]) -> None:
        self.table: Dict[str, int] = {}
        for i in range(len(words)): self.table[words[i]] = i

    def __call__(self, texts: List[str]) -> Tuple[matx.NDArray, matx.NDArray]:
        rows: List = []
        longest = 0
        for text in texts:
            row = [self.table.get(word, -1) for word in text.split()]
            longest = max(longest, len(row))
            rows.append(row)
        ids: List = []
        mask: List = []
        for row in rows:
            rest = [0] * (longest - len(row))
            mask.append([1] * len(row) + rest)
            ids.append(row + rest)
        return matx.NDArray(ids, [], 'int64'), matx.NDArray(mask, [], 'int64')


def main():
    source, vocab = Path(sys.argv[1])/'examples', sys.argv[2]
    if '--words' in sys.argv: run = matx.script(Padded)(Path(vocab).read_text(encoding='utf-8').split('\n'))
    else:
        made = example(source/'e2e_multi_modal'/'text_modal.py').MatxBertTokenizer
        tokenizer = (made if '--plain' in sys.argv else matx.script(made))(vocab, True, 64)
        def run(texts):
            out = tokenizer([t.encode() for t in texts])
            return out['input_ids'], out['input_mask']
    print('ready', flush=True)
    for texts in batches(sys.stdin.buffer):
        start = time.process_time()
        ids, mask = (x.asnumpy() for x in run(texts))
        print(time.process_time() - start, int((ids * mask).sum()), flush=True)


if __name__ == '__main__': main()
