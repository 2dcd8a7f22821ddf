"""infinity-emb 0.0.78 on a folder in the form of Hugging Face, as `mmembed`'s benchmark writes it (`weights.hf`).

    python benchmarks/peers/serve_infinity.py FOLDER PORT THREADS    # in an environment with
    infinity-emb[all]==0.0.78 and aiohttp
"""
import os
import subprocess
import sys

if __name__ == '__main__':
    folder, port, threads = sys.argv[1:4]
    command = [
        os.path.join(os.path.dirname(sys.executable), 'infinity_emb'),
        'v2',
        '--model-id',
        os.path.abspath(folder),
        '--port',
        port,
        '--host',
        '127.0.0.1',
        '--engine',
        'torch',
        '--device',
        'cpu',
        '--batch-size',
        '16',
        '--served-model-name',
        'm',
        '--no-bettertransformer',
        '--dtype',
        'float32',
        '--no-model-warmup',
    ]
    raise SystemExit(
        subprocess.call(command, env=os.environ | dict(OMP_NUM_THREADS=threads, DO_NOT_TRACK='1', HF_HUB_OFFLINE='1'))
    )
