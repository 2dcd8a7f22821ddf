"""Another tokenizer over the same tokenizer.json, for `benchmarks/text.py --family gpt2 --peer`: batches in on
stdin, CPU seconds out on stdout.

    python3.11 -m venv ENV && ENV/bin/pip install gigatoken tiktoken openvino openvino-tokenizers transformers
    ENV/bin/python benchmarks/peers/text_peer.py gigatoken | tiktoken | openvino TOKENIZER.json

gigatoken and tiktoken give ragged ids, OpenVINO padded ones; special tokens are left to the caller by the first two.
A batch is a line with the number of texts,
then a line each; the answer is CPU seconds and the number of ids."""
import json
import os
import sys
import time

os.environ.update(RAYON_NUM_THREADS='1', OMP_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false')


def byte_of():
    "The byte that each letter of a byte-level vocabulary stands for (GPT-2's `bytes_to_unicode`, backwards)."
    plain = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + k): b for k, b in enumerate(rest)}


def gigatoken(path):
    from gigatoken import Tokenizer
    tok = Tokenizer(path)
    return lambda texts: len(tok.encode_batch(texts, parallel=False).layout.content)


def tiktoken(path):
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str
    with open(path, encoding='utf-8') as f: tok = json.load(f)
    special, byte = {t['content']: t['id'] for t in tok['added_tokens']}, byte_of()
    ids = {bytes(byte[c] for c in t): i for t, i in tok['model']['vocab'].items() if t not in special}
    enc = tiktoken.Encoding('of-the-file', pat_str=r50k_pat_str, mergeable_ranks=ids, special_tokens=special)
    return lambda texts: sum(map(len, enc.encode_ordinary_batch(texts, num_threads=1)))


def openvino(path):
    import openvino as ov
    from openvino_tokenizers import convert_tokenizer
    from transformers import PreTrainedTokenizerFast
    with open(path, encoding='utf-8') as f: added = [t['content'] for t in json.load(f)['added_tokens']]
    pad = next(t for t in ('<pad>', '[PAD]', '<|endoftext|>', '[UNK]', None) if t is None or t in added)
    tok = PreTrainedTokenizerFast(tokenizer_file=path, pad_token=pad)
    model = ov.Core().compile_model(convert_tokenizer(tok), 'CPU', {'INFERENCE_NUM_THREADS': 1})
    return lambda texts: int(model(texts)['attention_mask'].sum())


def main():
    run = dict(gigatoken=gigatoken, tiktoken=tiktoken, openvino=openvino)[sys.argv[1]](sys.argv[2])
    print('ready', flush=True)
    while line := sys.stdin.buffer.readline():
        texts = [sys.stdin.buffer.readline().rstrip(b'\n').decode() for _ in range(int(line))]
        start = time.process_time()
        n = run(texts)
        print(time.process_time() - start, n, flush=True)


if __name__ == '__main__': main()
