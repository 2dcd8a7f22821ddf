"""A new artifact while requests run: one engine answers a request, and an engine that all have left is gone."""
import asyncio
import base64
import contextlib
import gc
import json
import os
import re
import signal
import socket
import threading
import weakref

import grpc
import httpx2
import numpy as np
import pytest
import uvicorn
from websockets.asyncio.client import connect

from mmembed.exporters.verify import samples as cases
from mmembed.runtime.embedder import Embedder
from mmembed.serve import open_inference as inference, grpc_server as rpc
from mmembed.serve.queue import Item
from mmembed.serve.engine import Options
from mmembed.serve.http import app
from mmembed.serve.protobuf import message, methods
from mmembed.serve.service import Config, Service

from tests.exporters import tiny
from tests.helpers import HANG, until

PNG, JPEG = (cases.images()[name] for name in ('RGB.png', 'quality 75.jpg'))
TEXTS = ['a red circle', 'a blue square', 'x']


def image(data): return dict(type='image', image=base64.b64encode(data).decode())


@pytest.fixture(scope='module')
def artifacts():
    "Two artifacts of other weights, another width and other labels: their paths, and an Embedder for each short hash."
    paths = [tiny.labelled(), tiny.exported('tiny-16', lambda: tiny.model(seed=1, dim=16), labels=['circle', 'square'])]
    made = [Embedder(path) for path in paths]
    return paths, {emb.card['short_hash']: emb for emb in made}


@contextlib.asynccontextmanager
async def served(service):
    "The ports of `service` on this event loop: HTTP, gRPC."
    with socket.create_server(('127.0.0.1', 0)) as sock:
        options = uvicorn.Config(app(service), lifespan='off', log_config=None, ws='websockets-sansio')
        http, (grpc_server, port) = uvicorn.Server(options), await rpc.start(service)
        task = asyncio.ensure_future(http.serve([sock]))
        yield sock.getsockname()[1], port
        http.should_exit = True
        await asyncio.gather(task, grpc_server.stop(5))
    await asyncio.to_thread(service.close)


def call(channel, name, service='mmembed.v1.Embedding'):
    q, a, many, _ = methods(service)[name]
    way = channel.stream_stream if many else channel.unary_unary
    return way(f'/{service}/{name}', q.SerializeToString, a.FromString)


async def stream(channel, name, request):
    return [answer async for answer in call(channel, name)(iter([request]), timeout=HANG)][0]


class Asked:
    "One request by every way, and what came back."
    def __init__(self, http, ws, channel, name):
        self.http, self.ws, self.channel, self.name = http, ws, channel, name
        self.Item = message('mmembed.v1.Item')

    async def post(self, path, body, **headers):
        r = await self.http.post(path, json=body, headers=headers)
        assert r.status_code == 200, r.text[:300]
        return r

    async def embeddings(self):
        return (await self.post('/v1/embeddings', dict(input=[TEXTS[0], image(b'bad'), image(PNG)]))).json()

    async def table(self):
        body = dict(input=[TEXTS[0], image(b'bad')])
        return await self.post('/v1/embeddings', body, accept='application/octet-stream')

    async def rank(self): return (await self.post('/rank', dict(query=image(PNG), candidates=TEXTS))).json()

    async def classify(self, **labels):
        return (await self.post('/classify', dict(input=[image(PNG)], **labels))).json()
    async def given_labels(self): return await self.classify(labels=TEXTS)

    async def infer(self):
        tensor = dict(name='text', datatype='BYTES', shape=[1], data=TEXTS[:1])
        broken = dict(name='image', datatype='BYTES', shape=[2], data=[image(x)['image'] for x in (b'bad', PNG)])
        return (await self.post(f'/v2/models/{self.name}/infer', dict(inputs=[tensor, broken]))).json()

    async def websocket(self):
        await self.ws.send(json.dumps(dict(input=[TEXTS[0], image(PNG)])))
        return json.loads(await self.ws.recv())

    async def grpc_encode(self, way='unary'):
        items = self.Item(text=TEXTS[0]), self.Item(image=b'bad'), self.Item(image=PNG)
        q = message('mmembed.v1.EncodeRequest')(items=items)
        return await (stream(self.channel, 'EncodeStream', q) if way == 'stream' else call(self.channel, 'Encode')(q))
    async def grpc_encode_stream(self): return await self.grpc_encode('stream')

    async def grpc_rank(self, way='unary'):
        q = message('mmembed.v1.RankRequest')(query=self.Item(image=PNG), candidates=[self.Item(text=t) for t in TEXTS])
        return await (stream(self.channel, 'RankStream', q) if way == 'stream' else call(self.channel, 'Rank')(q))
    async def grpc_rank_stream(self): return await self.grpc_rank('stream')

    async def grpc_classify(self):
        q = message('mmembed.v1.ClassifyRequest')(items=[self.Item(image=PNG)])
        return await call(self.channel, 'Classify')(q)

    async def grpc_infer(self):
        raw, tensor = inference.tensor_bytes([b'bad', PNG]), dict(name='image', datatype='BYTES', shape=[2])
        q = message('inference.ModelInferRequest')(model_name=self.name, inputs=[tensor], raw_input_contents=[raw])
        return await call(self.channel, 'ModelInfer', 'inference.GRPCInferenceService')(q)


WAYS = [name for name in vars(Asked) if not name.startswith('_') and name != 'post']


@pytest.fixture(scope='module')
def answers(artifacts):
    """What every way answers when another artifact comes into force between its vectors and its answer: all wait
    with theirs until it has."""
    paths, _ = artifacts
    async def main():
        service, out = Service(Config(paths[0], grpc_port=0, log=os.devnull, engine=Options(batch=8, decoders=2))), {}
        embed, waiting, reloaded = service.run, set(WAYS), asyncio.Event()
        async def ready(way):
            waiting.discard(way)
            if not waiting and not reloaded.is_set():
                await service.reload(paths[1])
                reloaded.set()
        async def run(*args, **kw):
            job = await embed(*args, **kw)
            await ready(next(iter(waiting), None))  # each way comes here once before the reload
            await reloaded.wait()
            return job
        service.run = run
        async with (served(service) as (port, grpc_port), connect(f'ws://127.0.0.1:{port}/v1/stream') as ws,
                    httpx2.AsyncClient(base_url=f'http://127.0.0.1:{port}', timeout=HANG) as http,
                    grpc.aio.insecure_channel(f'127.0.0.1:{grpc_port}') as channel):
            asked = Asked(http, ws, channel, service.name)
            async def ask(way):
                try: out[way] = await getattr(asked, way)()
                except (AssertionError, grpc.RpcError) as e: out[way] = e
            await asyncio.wait_for(asyncio.gather(*map(ask, WAYS)), HANG)
        return out
    return asyncio.run(main())


def scores(emb): return emb.score(TEXTS, [PNG])[:, 0].numpy()


@pytest.mark.parametrize('way', WAYS)
def test_one_engine_answers_a_request(answers, artifacts, way):
    "By every protocol: vectors, widths, scores and labels are those of the artifact that the answer names."
    _, embs = artifacts
    a = answers[way]
    assert not isinstance(a, Exception), a
    if way in ('grpc_infer', 'infer'): hashed = a['model_version'] if way == 'infer' else a.model_version
    elif way == 'table': hashed = a.headers['x-artifact']
    else: hashed = a['artifact'] if isinstance(a, dict) else a.artifact
    emb = embs[hashed]
    text, picture = emb.encode_text(TEXTS[:1])[0].numpy(), emb.encode_image([PNG])[0].numpy()
    if way == 'table':
        assert a.headers['x-shape'] == f'2,{emb.dim}'
        assert np.allclose(np.frombuffer(a.content, '<f4').reshape(2, emb.dim)[0], text, atol=1e-5)
    elif way in ('embeddings', 'websocket'):
        assert np.allclose([a['data'][k]['embedding'] for k in (0, -1)], [text, picture], atol=1e-5)
    elif way.startswith('grpc_encode'):
        assert np.allclose([np.frombuffer(a.results[k].embedding, '<f4') for k in (0, 2)], [text, picture], atol=1e-5)
    elif way == 'infer':
        table = next(o for o in a['outputs'] if o['name'] == 'image_embedding')
        assert table['shape'] == [2, emb.dim] and np.allclose(table['data'][emb.dim:], picture, atol=1e-5)
    elif way == 'grpc_infer':
        table = np.frombuffer(a.raw_output_contents[0], '<f4').reshape(2, -1)
        assert list(a.outputs[0].shape) == [2, emb.dim] and np.allclose(table[1], picture, atol=1e-5)
    elif way in ('classify', 'grpc_classify'):
        [want] = emb.classify_image([PNG])
        row = a['results'][0]['labels'] if way == 'classify' else a.results[0].labels
        got = [(x['label'], x['probability']) if isinstance(x, dict) else (x.label, x.probability) for x in row]
        assert [label for label, _ in got] == [label for label, _ in want]
        assert np.allclose([p for _, p in got], [p for _, p in want], atol=1e-4)
    elif way == 'given_labels':
        assert np.allclose(sorted(x['score'] for x in a['results'][0]['labels']), np.sort(scores(emb)), atol=1e-3)
    else:
        rows = a['results'] if isinstance(a, dict) else a.results
        found = dict((x['index'], x['score']) if isinstance(x, dict) else (x.index, x.score) for x in rows)
        assert np.allclose([found[k] for k in range(3)], scores(emb), atol=1e-3)


def workers(): return sorted(t.name for t in threading.enumerate() if not t.name.startswith('asyncio'))


def retired():
    "Waits until no engine is on its way out."
    for t in threading.enumerate():
        if t.name == 'retire': t.join(HANG)


def test_an_engine_ends_with_the_last_request_that_holds_it(artifacts):
    "Its threads, its model, itself; without the garbage collector, which overlooks what was there before `gc.freeze`."
    (path, other), _ = artifacts
    async def main():
        service = Service(Config(path, log=os.devnull))
        threads, gone = workers(), []
        async def request(answered):
            before = service.card['short_hash']
            job = await service.run([Item('text', 'a'), Item('image', PNG)])
            await answered.wait()
            service.scores(job.items[0].value, [job.items[1].value])
            return before, job.hash, service.card['short_hash']
        for target in (other, path, path):
            answered, engine = asyncio.Event(), service.engine
            busy = asyncio.ensure_future(service.pinned(request(answered)))
            while not engine._holders: await asyncio.sleep(0)
            gone += [weakref.ref(engine), weakref.ref(engine.emb), weakref.ref(engine.emb.module)]
            before = engine.emb.card['short_hash']
            await service.reload(target)
            while engine.enter(): engine.leave()  # until it is out of force
            assert not engine.closing and all(t.is_alive() for t in engine._threads)
            del engine
            answered.set()
            assert await busy == (before,) * 3
            del busy
            await asyncio.to_thread(retired)
            assert [ref() for ref in gone] == [None] * len(gone)
        assert workers() == threads
        service.close()
    gc.collect()
    gc.disable()
    try: asyncio.run(main())
    finally: gc.enable()


def test_a_client_that_does_not_read_its_answer_holds_no_engine(artifacts):
    "The engine is let go when the answer begins."
    async def main():
        service, held = Service(Config(artifacts[0][0], log=os.devnull)), []
        body = [dict(type='http.request', body=b'{"input": "a"}', more_body=False)]
        async def receive():
            if body: return body.pop()
            await asyncio.Event().wait()
        async def send(message): held.append((message['type'], service.engine._holders))
        scope = dict(type='http', method='POST', path='/v1/embeddings', raw_path=b'', query_string=b'', scheme='http',
                     http_version='1.1', headers=[(b'content-type', b'application/json')], root_path='',
                     client=('x', 1), server=('x', 1))
        await app(service)(scope, receive, send)
        assert held[0] == ('http.response.start', 0), held
        service.close()
    asyncio.run(main())


def test_reloads_leave_no_memory(server, http):
    """A real process, its first engine frozen for the collector: after six it is within a fifth of what it was after
    the second (70 MB a reload were kept once).

    Where free pages were not given back yet, six more may follow: what is kept of each reload only grows by them."""
    def figures():
        rows = (line.split(':') for line in open(f'/proc/{server.process.pid}/status'))
        return {k: int(v.split()[0]) for k, v in rows if k in ('VmRSS', 'Threads')}
    def reloads():
        found = re.search(r'reloads_total{status="ok"} (\S+)', http.get('/metrics').text)
        return float(found[1]) if found else 0
    before = reloads()
    for k in range(1, 13):
        assert http.post('/v1/embeddings', json=dict(input=[image(PNG), 'a'])).status_code == 200
        os.kill(server.process.pid, signal.SIGHUP)
        until(lambda k=k: reloads() >= before + k)
        if k == 2: second = figures()
        if k < 6: continue
        until(lambda second=second: figures()['Threads'] <= second['Threads'])
        if (last := figures())['VmRSS'] < 1.2 * second['VmRSS']: break
    assert last['Threads'] <= second['Threads'] and last['VmRSS'] < 1.2 * second['VmRSS'], (second, last)
