"""What each variant of an export costs and brings: CPU time of the towers, size of the weights, cosine with fp32.

    python benchmarks/variants.py --open-clip ViT-B-32                      # random weights, built-in texts and pictures
    python benchmarks/variants.py runs/quickstart/best.ckpt --data pairs.csv

One thread, CPU time of the fastest of several passes over one batch; the cosine is the worst and the mean of all items."""
import argparse
import time

import torch
import torch.nn.functional as F

from mmembed.core import as_bytes
from mmembed.export import cases
from mmembed.export.encoder import Encoder, unstored
from mmembed.export.steps import Same
from mmembed.export.variants import Variant, prepared

VARIANTS = Variant(), Variant(precision='bf16'), Variant(precision='fp16'), Variant(quantize='int8'), Variant(fold=True), Variant(output='int8'), Variant(output='binary')


def items(data, n):
    "n texts and image files, of a file of pairs or built in."
    if not data: return [t.decode() for t in cases.texts()[4:12]], [as_bytes(b) for k, b in cases.images().items() if k.startswith(('quality', 'exif'))]
    from mmembed.data.sources import PairsFile
    pairs = PairsFile(data)
    rows = range(0, len(pairs), max(1, len(pairs) // n))
    return [pairs.text(i) for i in rows][:n], [pairs.image(i) for i in rows][:n]


def fastest(f, *args, n=4):
    "Milliseconds of CPU time."
    seconds = []
    for _ in range(n):
        start = time.process_time()
        f(*args)
        seconds.append(time.process_time() - start)
    return min(seconds) * 1e3


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', nargs='?', help='of `mmembed train`')
    parser.add_argument('--open-clip', help='a model of open_clip, with --weights or random')
    parser.add_argument('--weights')
    parser.add_argument('--data', help='a .csv, .tsv, .jsonl or .parquet file of pairs')
    parser.add_argument('-n', type=int, default=64, help='pairs of it')
    parser.add_argument('--batch', type=int, default=4, help='rows that are timed')
    args = parser.parse_args()
    if bool(args.checkpoint) == bool(args.open_clip): parser.error('name either a checkpoint or --open-clip MODEL')
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.checkpoint:
        from mmembed.train import load_checkpoint
        model = load_checkpoint(args.checkpoint).eval()
    else:
        from mmembed.models.dual import DualEncoder
        model = DualEncoder.from_open_clip(args.open_clip, args.weights).eval()
    texts, files = items(args.data, args.n)
    tokens, levels = model.text_pipeline(texts), model.vision_pipeline.preprocess_all(files, False)
    print(f'{len(texts)} texts, {len(files)} images; timed in batches of {args.batch}, one thread\n'
          '| variant | ms a text | ms an image | weights, MB | bytes an embedding | cosine text, worst (mean) | cosine image, worst (mean) |\n|---|---|---|---|---|---|---|')
    first = None
    for v in VARIANTS:
        try: net = prepared(model, v, kernels=True)
        except ValueError as e:
            print(f'| {v.words()} | {e} | | | | | |')
            continue
        encoder = Encoder(net.model, Same(), v, model.text_pipeline.max_length, model.text_pipeline.pad_id)
        pixels = levels.float() if v.fold else net.vision_pipeline.normalize(levels)
        text = torch.cat([encoder.encode_text(type(tokens)(*(x[i:i+16] for x in tokens))) for i in range(0, len(texts), 16)])
        image = torch.cat([encoder.encode_image(p) for p in pixels.split(16)])
        first = first or (text, image)
        cosines = [F.cosine_similarity(unstored(x, v.output), want, dim=1) for x, want in zip((text, image), first)]
        n, some = args.batch, type(tokens)(*(x[:args.batch] for x in tokens))
        size = sum(q.numel() * q.element_size() for q in [*net.model.parameters(), *net.model.buffers()]) / 1e6
        print(f'| {v.words()} | {fastest(encoder.encode_text, some)/n:.1f} | {fastest(encoder.encode_image, pixels[:n])/n:.1f} | {size:.0f} | '
              f'{text[0].numel() * text.element_size()} | ' + ' | '.join(f'{c.min():.5f} ({c.mean():.5f})' for c in cosines) + ' |', flush=True)


if __name__ == '__main__': main()
