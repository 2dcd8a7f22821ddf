"""LitServe (0.2.19) with dynamic batching, on an artifact of mmembed: what a framework's layer costs round the same
computation.

    python benchmarks/peers/serve_litserve.py model.pt PORT THREADS     # in an environment with litserve and
    mmembed's packages
"""
import base64
import sys

import litserve as ls
import torch

from mmembed.runtime.embedder import Embedder


class Api(ls.LitAPI):
    def setup(self, device): self.emb = Embedder(sys.argv[1], threads=int(sys.argv[3]))
    def decode_request(self, request):
        entry = request['input'][0]
        return entry if isinstance(entry, str) else self.emb.preprocess(base64.b64decode(entry['image']))
    def batch(self, inputs): return inputs  # its own stacks them, which texts among images do not survive
    def unbatch(self, output): return output
    def predict(self, batch):
        out = [None] * len(batch)
        texts, images = (
            [i for i, x in enumerate(batch) if isinstance(x, str)],
            [i for i, x in enumerate(batch) if not isinstance(x, str)],
        )
        if texts:
            for i, v in zip(texts, self.emb.encode_text([batch[i] for i in texts])): out[i] = v
        if images:
            for i, v in zip(images, self.emb.encode_pixels(torch.stack([batch[i] for i in images]))): out[i] = v
        return out
    def encode_response(self, output): return {'embedding': base64.b64encode(output.numpy().tobytes()).decode()}


if __name__ == '__main__':
    api = Api(max_batch_size=16, batch_timeout=.002, api_path='/v1/embeddings')
    ls.LitServer(api, accelerator='cpu', workers_per_device=1).run(
        port=int(sys.argv[2]), generate_client_file=False, log_level='error'
    )
