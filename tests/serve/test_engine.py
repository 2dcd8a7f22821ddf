"""The engine in this process: who gets what, in which company, and what ends."""
import asyncio
import functools
import random
import threading
import time
from concurrent.futures import Future

import numpy as np
import pytest
import torch

from mmembed.exporters.verify import samples as cases
from mmembed.runtime.embedder import Embedder
from mmembed.serve.engine import Busy, Engine, Options, Unfit
from mmembed.serve.queue import Item

from tests.exporters import tiny
from tests.helpers import HANG, until

FILES = cases.images()


@functools.cache
def embedder(): return Embedder(tiny.artifact())


@pytest.fixture
def engine():
    e = Engine(embedder(), Options(batch=8, decoders=2))
    yield e
    assert e.close(HANG) and e.waiting == dict(text=0, image=0) and not e.bytes


def ask(engine, items, **kw):
    "The settled items of one request, synchronously."
    done = Future()
    engine.submit(items, done.set_result, **kw)
    return done.result(HANG).items


def test_every_case_has_the_embedders_answer(engine):
    """All texts, and all image files, good and broken, in one request each: status, reason and embedding are the
    Embedder's."""
    emb, texts, files = embedder(), cases.texts(), list(FILES.values())
    got = ask(engine, [Item('text', t) for t in texts])
    assert torch.allclose(torch.tensor(np.stack([i.value for i in got])), emb.encode_text(texts), atol=1e-5)
    want = emb.encode_image(files, on_error='flag')
    got = ask(engine, [Item('image', f) for f in files])
    assert [i.error for i in got] == want.errors and [i.status == 'ok' for i in got] == want.ok.tolist()
    assert torch.allclose(
        torch.tensor(np.stack([i.value for i in got if i.status == 'ok'])), want.embedding[want.ok], atol=1e-5
    )


def test_deterministic_is_the_embedder_bit_by_bit():
    "Whatever the traffic: requests of random sizes at random times, with broken files among them."
    emb = Embedder(tiny.artifact(), batch_size=4, deterministic=True)
    engine, rng = (
        Engine(Embedder(tiny.artifact(), batch_size=4, deterministic=True), Options(wait=0.001)),
        random.Random(0),
    )
    texts, files = cases.texts(), list(FILES.values())
    pool = [('text', t, v) for t, v in zip(texts, emb.encode_text(texts).numpy())]
    for f, ok, v in zip(files, *emb.encode_image(files, on_error='flag')[1::-1]):
        pool.append(('image', f, v.numpy() if ok else None))
    jobs = []
    for _ in range(60):
        picked = rng.choices(pool, k=rng.randint(1, 9))
        done = Future()
        engine.submit([Item(k, d) for k, d, _ in picked], done.set_result)
        jobs.append((picked, done))
        time.sleep(rng.random() * .004)
    for picked, done in jobs:
        for item, (_, _, want) in zip(done.result(HANG).items, picked):
            if want is None: assert item.status == 'invalid' and item.value is None
            else: assert item.status == 'ok' and np.array_equal(item.value, want)
    assert engine.close()


def test_requests_share_batches(engine):
    "Many requests of one item are answered in few passes of the tower."
    sizes = []
    engine.on_batch = lambda kind, stage, items, took: sizes.append(len(items)) if stage == 'forward' else None
    engine.tower_queues['text'].alone = False
    jobs = [Future() for _ in range(40)]
    for f in jobs: engine.submit([Item('text', 'a')], f.set_result)
    assert all(f.result(HANG).items[0].status == 'ok' for f in jobs)
    assert sum(sizes) == 40 and len(sizes) <= 20 and max(sizes) <= 8, sizes


def test_lengths_do_not_mix(engine):
    short, long = 'a', 'a green triangle above a red circle ' * 3
    items = ask(engine, [Item('text', short), Item('text', long)])
    assert [i.ready.ids.shape[1] for i in items] == [8, 16] and [i.batch for i in items] == [1, 1]


def test_lengths_are_the_embedders():
    """One rule of lengths: a deterministic engine batches texts by the length to which the Embedder fills them,
    whatever tokens they have."""
    emb = Embedder(tiny.artifact(), batch_size=4, deterministic=True)
    same, words = (
        Engine(emb),
        ['a', 'red', 'circle', 'above', 'a', 'blue', 'square', 'triangle', 'green', 'a', 'red', 'large', 'small'],
    )
    items = ask(same, [Item('text', ' '.join(words[:n])) for n in range(len(words))])
    assert [i.ready.ids.shape[1] for i in items] == emb._lengths(
        emb.tokenize([i.data for i in items])
    ).tolist() and len({i.ready.ids.shape[1] for i in items}) == 3
    assert same.close()


def test_wrong_kinds_of_data_fail_alone(engine):
    items = ask(
        engine,
        [Item('text', None), Item('text', 'a'), Item('image', 7), Item('text', 'x' * (2 << 20)), Item('image', None)],
    )
    assert [i.status for i in items] == ['invalid', 'ok', 'invalid', 'invalid', 'invalid'] and all(
        i.error for i in items if i.status != 'ok'
    )


def test_pixels_are_limited_by_the_header():
    engine = Engine(embedder(), Options(max_pixels=100))
    [item] = ask(engine, [Item('image', FILES['quality 75.jpg'])])
    assert item.status == 'invalid' and 'takes up to 100' in item.error and engine.close()


def hold(engine, kind='text'):
    """Keeps the tower of `kind` busy until the event it returns is set.

    Its `entered` is set when the tower has something."""
    go, tower = threading.Event(), engine._tower
    go.entered = threading.Event()
    def held(items):
        go.entered.set()
        go.wait(HANG)
        return tower(items)
    engine._tower = held
    return go


def test_queue_is_bounded_and_whole_requests_are_admitted():
    engine = Engine(embedder(), Options(queue=6, queue_bytes=1000))
    go, done = hold(engine), [Future(), Future()]
    engine.submit([Item('text', t, 100) for t in 'abcd'], done[0].set_result)
    with pytest.raises(Busy) as e: engine.submit([Item('text', 'x'), Item('text', 'y'), Item('text', 'z')], None)
    assert .1 <= e.value.retry <= 60 and engine.waiting['text'] == 4
    with pytest.raises(Busy): engine.submit([Item('image', b'', 601)], None)  # too many bytes
    engine.submit([Item('image', b'', 600)], done[1].set_result)  # the other queue has room
    go.set()
    assert done[0].result(HANG) and done[1].result(HANG) and engine.close() and not engine.bytes


def test_expired_and_cancelled_items_never_reach_the_tower(engine):
    go, seen = hold(engine), []
    engine.on_batch = lambda kind, stage, items, took: (
        seen.extend(i.data for i in items) if stage == 'forward' else None
    )
    async def main():
        first = asyncio.ensure_future(engine.run([Item('text', 'first')]))
        await asyncio.to_thread(go.entered.wait, HANG)
        gone = asyncio.ensure_future(engine.run([Item('text', 'gone'), Item('text', 'gone')]))
        late = asyncio.ensure_future(engine.run([Item('text', 'late')], timeout=.1))
        last = asyncio.ensure_future(engine.run([Item('text', 'last')]))
        await asyncio.sleep(.05)
        gone.cancel()
        assert [i.status for i in (await late).items] == ['expired']
        with pytest.raises(asyncio.CancelledError): await gone
        go.set()
        assert [i.status for j in (await first, await last) for i in j.items] == ['ok', 'ok']
    asyncio.run(main())
    assert seen == ['first', 'last']


def test_a_batch_that_fails_is_tried_item_by_item(engine):
    tower = engine._tower
    def picky(items):
        if any(i.data == 'poison' for i in items): raise RuntimeError('Traceback\nbuiltins.ValueError: no such token\n')
        return tower(items)
    engine._tower, engine.tower_queues['text'].alone = picky, False
    items = ask(engine, [Item('text', t) for t in ('a', 'poison', 'b')])
    assert (
        [i.status for i in items] == ['ok', 'failed', 'ok']
        and items[1].error == 'no such token'
        and not engine.health()
    )


def test_what_is_not_finite_is_no_answer(engine):
    tower = engine._tower
    def bad(items):
        out = tower(items).copy()
        out[[i.data == 'nan' for i in items]] = np.nan
        return out
    engine._tower = bad
    assert [i.status for i in ask(engine, [Item('text', 'a'), Item('text', 'nan')])] == ['ok', 'failed']


@pytest.mark.parametrize(
    'error',
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        SystemExit(3),
        KeyError('bug'),
    ],
)
def test_a_dead_worker_or_no_memory_ends_the_engine(error):
    told = []
    engine = Engine(embedder(), on_unfit=told.append)
    def dies(items): raise error
    engine._tower = dies
    items = ask(engine, [Item('text', 'a'), Item('image', FILES['RGB.png'])])
    assert {i.status for i in items} == {'unavailable'} and len(told) == 1 and engine.health() == told[0]
    with pytest.raises(Unfit): engine.submit([Item('text', 'a')], None)


def test_a_stuck_worker_is_seen():
    engine = Engine(embedder(), Options(stall=HANG))
    hold(engine)
    job = engine.submit([Item('text', 'a')], lambda job: None)
    assert not engine.health()
    engine.options = Options(stall=.2)
    assert 'stuck' in until(engine.health) and job.items[0].status == 'unavailable'


def test_closing_answers_what_was_admitted(engine):
    done = [Future() for _ in range(30)]
    for f in done: engine.submit([Item('text', 'a'), Item('image', FILES['RGB.png'])], f.set_result)
    assert engine.close(HANG)
    assert {i.status for f in done for i in f.result(0).items} == {'ok'}
    with pytest.raises(Unfit): engine.submit([Item('text', 'a')], None)


def test_storm(engine):
    """Threads that submit, cancel and let expire: every job is answered once, nothing is left behind, good answers
    are right."""
    files, counts, lock = FILES, {}, threading.Lock()
    emb = embedder()
    want = {f: emb.encode_image([f])[0].numpy() for f in (files['RGB.png'], files['quality 75.jpg'])} | {
        t: emb.encode_text([t])[0].numpy() for t in ('a', 'a red circle')
    }
    jobs = []
    def one(seed):
        rng = random.Random(seed)
        for _ in range(25):
            data = [rng.choice([*want, files['bomb.png'], b'']) for _ in range(rng.randint(1, 5))]
            job = engine.submit(
                [Item('text' if isinstance(d, str) else 'image', d) for d in data],
                count,
                timeout=rng.choice([0.001, 0.02, 20]),
            )
            if rng.random() < .2: job.cancelled = True
            with lock: jobs.append(job)
            time.sleep(rng.random() * .003)
    def count(job):
        with lock: counts[id(job)] = counts.get(id(job), 0) + 1
    threads = [threading.Thread(target=one, args=(k,)) for k in range(6)]
    for t in threads: t.start()
    for t in threads: t.join()
    until(lambda: not engine._jobs)
    assert len(counts) == len(jobs) == 150 and set(counts.values()) == {1}
    for item in (i for j in jobs for i in j.items):
        assert item.status in ('ok', 'invalid', 'expired', 'cancelled'), (item.status, item.error)
        if item.status == 'ok': assert np.allclose(item.value, want[item.data], atol=1e-5)
    assert sum(i.status == 'ok' for j in jobs for i in j.items) > 50
    assert all(
        queue.size == 0 and queue.coming == 0
        for queue in (*engine.entry_queues.values(), *engine.tower_queues.values())
    )


def test_pairs_have_spans():
    "Each stage of a pair is a span below its request's, as a text's and an image's are."
    spans = pytest.importorskip('opentelemetry.sdk.trace.export.in_memory_span_exporter').InMemorySpanExporter()
    from mmembed.serve.tracing import Tracer
    engine, tracer, done = Engine(Embedder(tiny.pair_artifact())), Tracer(exporter=spans), Future()
    engine.submit([Item('pair', ('a', FILES['RGB.png']))], done.set_result)
    span = tracer.begin('/v1/scores', {})
    tracer.stages(span, done.result(HANG))
    tracer.end(span, 200)
    assert {s.name for s in spans.get_finished_spans() if s.parent} >= {
        'decode', 'transform', 'forward', 'queue',
    } and engine.close()
