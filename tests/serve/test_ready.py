"""What readiness says, and when: at once whatever waits, of an engine that answers rightly, also when nobody asks."""
import asyncio
import os
import threading

import pytest

from mmembed.runtime.embedder import Embedder
from mmembed.serve import service as module
from mmembed.serve.engine import Engine, Options
from mmembed.serve.queue import Item
from mmembed.serve.queue import PendingRequest
from mmembed.serve.service import Canary, Config, Service
from mmembed.serve.entries import to_items

from tests.exporters import tiny
from tests.serve.test_queue import Stepped
from tests.helpers import HANG, until


@pytest.fixture
def service():
    s = Service(Config(tiny.artifact(), log=os.devnull, engine=Options(batch=4, decoders=2)))
    yield s
    s.close()


def gauge(service): return service.metrics.registry.get_sample_value('mmembed_ready')


def at_once(work):
    "The result of a coroutine that waits for nothing."
    with pytest.raises(StopIteration) as e: work.send(None)
    return e.value.value


def test_readiness_waits_for_nothing(service):
    "A batch is in the tower and hundreds of items wait for it: the answer is there without one turn of an event loop."
    tower = Stepped(service.engine)
    for _ in range(3): service.engine.submit([Item('text', 'a') for _ in range(256)], lambda job: None)
    assert tower.came.acquire(timeout=HANG)
    assert at_once(service.ready()) == ''
    service.draining = True
    assert at_once(service.ready()) == 'shutting down'
    service.draining, tower.open = False, True
    tower.go.release()


@pytest.mark.parametrize('what', ['reads', 'answers'])
@pytest.mark.parametrize('count', [1, 256])
def test_large_requests_are_read_and_answered_one_at_a_time(service, monkeypatch, count, what):
    "However many are there at once: the loop looks at its sockets between two. Small ones do not wait for one another."
    turns = 0

    async def ticking():
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async def settled(items, timeout):
        job = PendingRequest(items, lambda job: None)
        for i in items: job.settle(i, 'invalid', 'no text')
        return job

    async def ask():
        if what == 'reads': await to_items(['a'] * count, service)
        else: await service.run([Item('text', '') for _ in range(count)])
        return turns

    async def main():
        ticker = asyncio.ensure_future(ticking())
        try: return await asyncio.gather(*[ask() for _ in range(24)])
        finally: ticker.cancel()

    monkeypatch.setattr(service.engine, 'run', settled)
    at = asyncio.run(main())
    assert len(set(at)) == (1 if count == 1 else 24), at


def test_the_canary_does_not_wait_behind_the_load():
    "It is in the second batch after it came, however many clients wait, and the queue is full."
    engine = Engine(Embedder(tiny.artifact()), Options(batch=4, decoders=2, queue=300))
    canary = Canary(engine.emb)
    tower = Stepped(engine)
    for k in range(300): engine.submit([Item('text', f'a red circle {k}')], lambda job: None)
    assert tower.came.acquire(timeout=HANG)  # the first batch is in the tower
    until(lambda: not engine.entry_queues['text'].size)
    said = []
    thread = threading.Thread(target=lambda: said.append(canary.check(engine, 120)))
    thread.start()
    until(lambda: engine.waiting['text'] == 301 and not engine.entry_queues['text'].size)
    for _ in range(3): tower.next()
    texts = [next(data for kind, data in canary.items if kind == 'text') in batch for batch in tower.batches]
    assert any(texts[1:3]), texts
    tower.open = True
    for _ in range(2): tower.go.release()
    thread.join(HANG)
    assert said == [''] and engine.close(HANG)


def test_the_gauge_is_right_when_nobody_asks(service, monkeypatch):
    "From the start on, and after the answers have become wrong and right again."
    assert gauge(service) == 1
    monkeypatch.setattr(module, 'CANARY', .01)
    monkeypatch.setattr(service, '_closed', fast := threading.Event())
    threading.Thread(target=service._watch, daemon=True).start()  # as the service's own, but quicker
    right = service.canary.want
    service.canary.want = -right
    until(lambda: gauge(service) == 0)
    assert 'wrong embedding' in at_once(service.ready())
    service.canary.want = right
    until(lambda: gauge(service) == 1)
    assert at_once(service.ready()) == ''
    fast.set()


def test_the_service_asks_by_itself(service):
    "By a thread of its own, which ends with it."
    def watching(): return [t for t in threading.enumerate() if t.name == 'canary']
    assert (mine := watching()[-1]).is_alive()
    service.close()
    mine.join(HANG)
    assert not mine.is_alive()


def test_a_dead_worker_is_not_ready_before_the_next_canary(service):
    "Readiness and liveness look at the workers when they are asked."
    def dies(items): raise MemoryError('out of memory')
    service.engine._tower = dies
    asyncio.run(service.run([Item('text', 'a')]))
    assert 'died' in at_once(service.ready()) and 'died' in service.engine.health()


def test_a_reload_that_fails_leaves_the_readiness(service):
    "And the artifact in force, in the metrics too."
    with pytest.raises(FileNotFoundError): asyncio.run(service.reload('no such file'))
    assert at_once(service.ready()) == '' and gauge(service) == 1
