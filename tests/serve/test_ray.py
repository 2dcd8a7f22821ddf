"""The service as an application of Ray Serve, over a real cluster of two nodes on this machine."""
import json
import os
import signal
import subprocess
import sys

import httpx2
import pytest

os.environ.update(RAY_USAGE_STATS_ENABLED='0', RAY_ENABLE_UV_RUN_RUNTIME_ENV='0')
ray = pytest.importorskip('ray', reason='Ray is not installed')
serve = pytest.importorskip('ray.serve', reason='Ray Serve is not installed')

from mmembed.exporters.verify import samples as cases
from mmembed.runtime.embedder import Embedder
from mmembed.serve.client import Client
from mmembed.serve.transport import ServiceError
from mmembed.serve.ray import ray_app

from tests.exporters import tiny
from tests.helpers import HANG, free_port, until


def start(artifact):
    args = dict(
        artifact=artifact, min_replicas=2, max_replicas=3, num_cpus=0.5, per_node=1, batch=8, decoders=1, log=os.devnull
    )
    serve.run(ray_app(args), name='mmembed', route_prefix='/')


@pytest.fixture(scope='module')
def url():
    "Two nodes with one replica each."
    from ray.cluster_utils import Cluster
    small = dict(num_cpus=1, object_store_memory=80 << 20)
    cluster = Cluster(initialize_head=True, head_node_args=small | dict(include_dashboard=False))
    port = free_port()
    try:
        cluster.add_node(**small)
        ray.init(address=cluster.address, log_to_driver=False, logging_level='error')
        serve.start(http_options=dict(host='127.0.0.1', port=port, location='HeadOnly'))
        start(tiny.artifact())
        yield f'http://127.0.0.1:{port}'
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


def places():
    "Process id -> where each replica is."
    handle = serve.get_app_handle('mmembed')
    found = [handle.where.remote() for _ in range(24)]
    return {w['pid']: w for w in (f.result(timeout_s=HANG) for f in found)}


@pytest.mark.weekly
def test_two_nodes_answer_survive_a_kill_and_change_the_artifact(url, tmp_path):
    emb, files, texts = Embedder(tiny.artifact()), list(cases.images().values()), tiny.CAPTIONS * 3
    want = emb.encode_text(texts).numpy()
    with Client(url, batch_size=4, retries=20) as client:
        assert abs(client.encode(texts) - want).max() < 1e-5
        good = emb.encode_image(files, on_error='flag').ok.tolist()
        assert client.encode(files, on_error='flag').ok.tolist() == good and not all(good)
        assert (
            httpx2.get(f'{url}/readyz', timeout=HANG).json()['ready']
            and httpx2.post(f'{url}/v1/embeddings', content=b'{', timeout=HANG).status_code == 400
        )

        before = places()
        assert len(before) == 2 and len({w['node'] for w in before.values()}) == 2
        os.kill(next(iter(before)), signal.SIGKILL)
        for _ in range(20):
            try: assert abs(client.encode(texts[:8]) - want[:8]).max() < 1e-5
            # what was under way in the dead replica; Ray's proxy says 500
            except ServiceError as e: assert e.status == 500, e
        # Ray brings it back when it comes to it
        until(lambda: len(after := places()) == 2 and set(after) != set(before))

        start(tiny.other())
        hashes = {w['artifact'] for w in places().values()}
        assert len(hashes) == 1 and hashes != {emb.card['short_hash']}
        assert abs(client.encode(texts[:8]) - want[:8]).max() > 1e-3


@pytest.mark.weekly
def test_the_command_serves_and_ends_on_sigterm(tmp_path):
    "`mmembed serve --ray` as a process, with a cluster of its own: right vectors by HTTP, an orderly end."
    port = free_port()
    command = [
        sys.executable,
        '-m',
        'mmembed',
        'serve',
        str(tiny.artifact()),
        '--ray',
        '--port',
        str(port),
        '--decoders',
        '1',
        '--log',
        os.devnull,
    ]
    env = {k: v for k, v in os.environ.items() if k != 'RAY_ADDRESS'}
    with (
        open(tmp_path / 'said', 'w+') as said,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, env=env) as p,
    ):
        try:
            line = p.stdout.readline()
            assert line, (tmp_path/'said').read_text()[-2000:]
            assert json.loads(line)['event'] == 'serving' and json.loads(line)['http'] == port
            texts = tiny.CAPTIONS[:2]
            with Client(f'http://127.0.0.1:{port}', retries=20) as client:
                assert abs(client.encode(texts) - Embedder(tiny.artifact()).encode_text(texts).numpy()).max() < 1e-5
            p.send_signal(signal.SIGTERM)
            assert p.wait(HANG) == 0
        finally: p.kill()
    with pytest.raises(httpx2.TransportError): httpx2.get(f'http://127.0.0.1:{port}/livez', timeout=HANG)
