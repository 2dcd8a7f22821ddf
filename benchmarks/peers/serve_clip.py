"""CLIP-as-service 0.8.3 with local weights (an open_clip state dict of ViT-B-32), over its HTTP gateway.

    python benchmarks/peers/serve_clip.py weights.pt PORT THREADS    # in an environment of clip-server's own

The only change is where the weights come from: its `download_model` is replaced, since there is no network."""
import os
import sys

import torch
from clip_server.executors.clip_torch import CLIPEncoder
from clip_server.model import openclip_model
from jina import Flow

openclip_model.download_model = lambda *args, **kwargs: os.environ['WEIGHTS']


class Local(CLIPEncoder):
    def __init__(self, **kw):
        super().__init__(**kw)
        torch.set_num_threads(int(os.environ['THREADS']))


if __name__ == '__main__':
    os.environ.update(
        WEIGHTS=os.path.abspath(sys.argv[1]), THREADS=sys.argv[3], JINA_OPTOUT_TELEMETRY='1', NO_VERSION_CHECK='1'
    )
    with Flow(protocol='http', port=int(sys.argv[2])).add(
        uses=Local, uses_with=dict(name='ViT-B-32::laion2b_e16', device='cpu'), timeout_ready=-1
    ) as f:
        f.block()
