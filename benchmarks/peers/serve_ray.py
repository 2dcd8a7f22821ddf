"""Ray Serve's plain `@serve.batch` app, as its guide writes it, on an artifact of mmembed.

    python benchmarks/peers/serve_ray.py model.pt PORT THREADS     # in the environment of mmembed with its extra `ray`
"""
import base64
import os
import sys
import time

os.environ.update(RAY_USAGE_STATS_ENABLED='0', RAY_DISABLE_IMPORT_WARNING='1')
import ray
import torch
from ray import serve

from mmembed.runtime.embedder import Embedder


@serve.deployment(ray_actor_options=dict(num_cpus=1), max_ongoing_requests=256)
class App:
    def __init__(self, path, threads): self.emb = Embedder(path, threads=threads)

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=.002)
    async def many(self, entries):
        out = [None] * len(entries)
        texts, images = (
            [i for i, x in enumerate(entries) if isinstance(x, str)],
            [i for i, x in enumerate(entries) if not isinstance(x, str)],
        )
        if texts:
            for i, v in zip(texts, self.emb.encode_text([entries[i] for i in texts])): out[i] = v
        if images:
            pixels = torch.stack([self.emb.preprocess(base64.b64decode(entries[i]['image'])) for i in images])
            for i, v in zip(images, self.emb.encode_pixels(pixels)): out[i] = v
        return [base64.b64encode(v.numpy().tobytes()).decode() for v in out]

    async def __call__(self, request): return {'embedding': await self.many((await request.json())['input'][0])}


if __name__ == '__main__':
    path, port, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False, logging_level='error'
    )
    serve.start(http_options=dict(host='127.0.0.1', port=port))
    serve.run(App.bind(os.path.abspath(path), threads), route_prefix='/v1/embeddings')
    while True: time.sleep(1)
