"""MATXScript's own example tokenizer, for `benchmarks/text.py --matxscript`: batches in on stdin, CPU seconds out on stdout.

    python3.11 -m venv ENV && ENV/bin/pip install matxscript==1.8.1 "numpy<2" && git clone https://github.com/bytedance/matxscript SRC
    ENV/bin/python benchmarks/peers/text_matxscript.py SRC VOCAB.txt [--plain]

`--plain` runs the same source uncompiled. A batch is a line with the number of texts, then a line each."""
import importlib.util
import sys
import time
from pathlib import Path

import matx
import matx.text


def batches(stream):
    "Lists of texts until the stream ends."
    while line := stream.readline(): yield [stream.readline().rstrip(b'\n').decode() for _ in range(int(line))]


def example(source: Path):
    "The module of the project's end-to-end example, with the one name that it forgets to import."
    spec = importlib.util.spec_from_file_location('text_modal', source/'examples'/'e2e_multi_modal'/'text_modal.py')
    module = importlib.util.module_from_spec(spec)
    module.WordPieceTokenizer = matx.text.WordPieceTokenizer
    sys.modules['text_modal'] = module
    spec.loader.exec_module(module)
    return module.MatxBertTokenizer


def main():
    source, vocab, plain = Path(sys.argv[1]), sys.argv[2], '--plain' in sys.argv
    made = example(source)
    run = (made if plain else matx.script(made))(vocab, True, 64)
    print('ready', flush=True)
    for texts in batches(sys.stdin.buffer):
        start = time.process_time()
        out = run([t.encode() for t in texts])
        ids, _ = out['input_ids'].asnumpy(), out['input_mask'].asnumpy()
        print(time.process_time() - start, int(ids.sum()), flush=True)


if __name__ == '__main__': main()
