"A batch job on a cluster of two nodes, one of which dies in the middle: the files of a local run."
import os
import time
from pathlib import Path

import pytest

os.environ.update(
    RAY_USAGE_STATS_ENABLED='0',
    RAY_ENABLE_UV_RUN_RUNTIME_ENV='0',
    RAY_raylet_start_wait_time_s='240',
    RAY_worker_register_timeout_seconds='240',
)
ray = pytest.importorskip('ray', reason='Ray is not installed')

from mmembed.retrieval.embed import embed
from mmembed.retrieval.ray import embed_ray

from tests.retrieval.test_embed import Worn, artifact, files

KW = dict(modality='both', keep=['text'], shard_rows=10)


class Slow(Worn):
    def image(self, i):
        time.sleep(.02)
        return super().image(i)


@pytest.mark.weekly
def test_a_node_dies_in_the_middle(tmp_path):
    from ray.cluster_utils import Cluster
    model, source = artifact(tmp_path/'model.pt'), Slow(train=150, valid=0)
    small = dict(num_cpus=1, object_store_memory=80 << 20)
    cluster = Cluster(initialize_head=True, head_node_args=small | dict(num_cpus=2, include_dashboard=False))
    seen, killed = [], []
    try:
        node = cluster.add_node(**small)
        ray.init(address=cluster.address, log_to_driver=False, logging_level='error')
        def progress(ready, rows):
            seen.append(ready)
            if not killed:
                killed.append(ready)
                cluster.remove_node(node, allow_graceful=False)
        done = embed_ray(model, source, tmp_path/'ray', **KW, workers=(2, 2), progress=progress)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert (done.rows, done.written, done.failed) == (150, 150, 6) and seen[-1] == 150 and killed[0] < 150
    embed(model, source, tmp_path/'local', **KW)
    assert files(tmp_path/'ray') == files(tmp_path/'local')
    assert Path(done.failures).is_file()
