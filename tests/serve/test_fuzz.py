"""Random requests to a real server: every answer is as described or stated, none is lost, and good items keep
getting their vectors."""
import numpy as np
import pytest

from benchmarks import fuzz_serve as fuzz
from mmembed.runtime.embedder import load
from mmembed.serve.client import Client
from mmembed.serve.service import canary_png

from tests.exporters import tiny



@pytest.fixture(autouse=True)
def still_right(server, http):
    "After each: the right vectors by both protocols, nothing waiting, ready."
    yield
    emb = load(tiny.artifact())
    want = np.concatenate([emb.encode_text(['a red circle']), emb.encode_image([canary_png()])])
    for url in (server.url, server.grpc):
        with Client(url) as c: fuzz.right(c, want)
    assert http.get('/readyz').json()['ready']
    assert all(
        line.endswith(' 0.0')
        for line in http.get('/metrics').text.splitlines()
        if line.startswith('mmembed_queue_items')
    )


def test_http_is_as_its_description_says(server, http):
    pytest.importorskip('schemathesis')
    seen = fuzz.http(server.url, 12, name=http.get('/v1/models').json()['data'][0]['id'])
    assert {label for label, status in seen if status == 200} >= {
        'POST /v1/embeddings', 'GET /info', 'GET /v2/models/{name}', 'GET /metrics',
    }
    assert {status for label, status in seen if label == 'POST /v2/models/{name}/infer'} >= {400, 404} and sum(
        seen.values()
    ) > 120


def test_every_grpc_method_answers_every_message(server):
    seen = fuzz.rpc(server.grpc, 600)
    assert {n for n, status in seen if status == 'OK'} >= {
        'Encode', 'EncodeStream', 'EncodeStream, messages', 'Info', 'ServerLive',
    }
    assert {status for _, status in seen} >= {'OK', 'INVALID_ARGUMENT', 'NOT_FOUND', 'FAILED_PRECONDITION'}


def test_every_message_of_a_websocket_is_answered(server):
    assert set(fuzz.websocket(server.url, 300)) == {200, 400, 422}
