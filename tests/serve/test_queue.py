"""Who goes in which batch: lengths, shares of requests, bounds on waiting; towers wait for the test."""
import threading

import pytest

from mmembed.exporters.verify import samples as cases
from mmembed.runtime.embedder import Embedder
from mmembed.serve.engine import Engine, Options
from mmembed.serve.queue import Item
from mmembed.serve.queue import PendingRequest, BatchQueue

from tests.exporters import tiny
from tests.helpers import HANG, until


def offer(queue, data, count=1, key=0, **kw):
    "One request of `count` items that all hold `data`."
    job = PendingRequest([Item('text', data) for _ in range(count)], lambda job: None, **kw)
    queue.expect(count), queue.put(job.items, [key] * count)
    return job


def batches(queue, count): return [[i.data for i in queue.take(wait=False)] for _ in range(count)]


def test_the_oldest_due_bucket_goes_first():
    queue = BatchQueue(largest=2)
    for key, data in ((8, 'old'), (16, 'x'), (16, 'y'), (8, 'young')): offer(queue, data, key=key)
    assert batches(queue, 2) == [['old', 'young'], ['x', 'y']]


@pytest.mark.parametrize('before', [0, 1])
@pytest.mark.parametrize('key', [8, 64])
@pytest.mark.parametrize('largest', [1, 2, 8])
def test_a_single_item_waits_for_two_batches_at_most(largest, key, before):
    "Behind a client that has sent 256 items three times; of the same length or of another, whatever went before."
    queue = BatchQueue(largest)
    for name in 'abc': offer(queue, name, 256, key=8)
    batches(queue, before)
    offer(queue, 'single', key=key)
    assert any('single' in batch for batch in batches(queue, 3))


@pytest.mark.parametrize('largest', [1, 8])
def test_a_large_request_keeps_half_of_the_places(largest):
    "However many small ones keep coming."
    queue = BatchQueue(largest)
    large, served = offer(queue, 'large', 128), 0
    for round in range(2 * 128 // largest):
        for k in range(largest): offer(queue, f'small {round} {k}')
        served += sum(data == 'large' for data in batches(queue, 1)[0])
    assert served == 128 and max(large.had.values()) == 128


def test_places_are_shared_between_requests():
    "Each has had as many as the others, but for those places that go by age."
    queue = BatchQueue(largest=8)
    for name in 'abcd': offer(queue, name, 100)
    had = ''.join(data for batch in batches(queue, 20) for data in batch)
    assert had.count('a') >= 80 and {had.count(name) for name in 'bcd'} <= set(range(20, 28)), had


def test_a_rare_length_goes_with_the_third_batch_at_the_latest():
    "Full batches of another length keep coming, each is answered at once, and somebody is always on the way."
    queue = BatchQueue(largest=4)
    queue.alone, queue.patience = False, 60.
    queue.expect(1)
    offer(queue, 'rare', key=64)
    seen = []
    for _ in range(40):
        offer(queue, 'common', 4, key=8)
        seen += batches(queue, 1)
        queue.answered(4, seconds=480.)
    assert ['rare'] in seen[:3], seen[:3]


def test_a_batch_that_is_not_full_waits_for_those_who_have_just_been_answered():
    """Also when another length has just had its batch: else clients of two lengths fall apart into small batches for
    good."""
    queue = BatchQueue(largest=8)
    queue.alone = False
    offer(queue, 'short', 3, key=8), offer(queue, 'long', 2, key=16)
    assert batches(queue, 1) == [['short'] * 3]
    queue.answered(3, seconds=480.)
    assert batches(queue, 1) == [[]]
    for _ in range(3): offer(queue, 'again', key=16)
    assert batches(queue, 1) == [['long'] * 2 + ['again'] * 3]


def test_a_rare_length_does_not_starve_behind_older_requests():
    "Every length has its turn, as old as its items are."
    queue = BatchQueue(largest=4)
    for _ in range(8): offer(queue, 'old', 64, key=8)
    for k in range(4): offer(queue, f'rare {k}', key=16 + k)
    assert [x[0] for x in batches(queue, 10) if x[0] != 'old'] == [f'rare {k}' for k in range(4)]


def test_an_urgent_request_goes_before_all_singles():
    "The canary: hundreds of clients with one item each have had no place either."
    queue = BatchQueue(largest=4)
    for k in range(300): offer(queue, f'client {k}')
    offer(queue, 'canary', urgent=True)
    assert 'canary' in batches(queue, 1)[0]


def test_an_item_is_settled_once():
    "Whoever comes second changes nothing, and the request ends with its last item."
    done, items = [], [Item('text', 'a'), Item('text', 'b')]
    job = PendingRequest(items, done.append)
    assert job.settle(items[0], 'ok', value=1) and not job.settle(items[0], 'expired', 'too late')
    assert (items[0].status, items[0].error, items[0].value) == ('ok', '', 1) and not done
    assert job.settle(items[1], 'failed', 'no luck') and done == [job]
    assert not job.settle(items[1], 'ok') and not job.settle(items[0], 'ok') and done == [job]


def test_a_settled_job_leads_to_nobody():
    "What waits for the garbage collector does not keep an engine alive."
    seen = []
    job = PendingRequest([Item('text', 'a')], seen.append)
    assert job.settle(job.items[0], 'ok') and seen == [job] and job.done is None


class Stepped:
    "The tower of an engine computes a batch when the test says so; `batches` holds what it was given."
    def __init__(self, engine):
        self.engine, self.tower, self.batches = engine, engine._tower, []
        self.go, self.came, self.open = threading.Semaphore(0), threading.Semaphore(0), False
        engine._tower = self

    def __call__(self, items):
        self.batches.append([i.data for i in items])
        self.came.release()
        assert self.open or self.go.acquire(timeout=HANG)
        return self.tower(items)

    def next(self):
        "Lets the batch in the tower go, and waits for the next."
        self.go.release()
        assert self.came.acquire(timeout=HANG)


@pytest.mark.parametrize('kind', ['text', 'image'])
def test_a_single_item_passes_by_the_whole_engine(kind):
    "Texts and images: neither the stage before the tower nor the tower keeps it for more than two batches."
    engine = Engine(Embedder(tiny.artifact()), Options(batch=4, decoders=2))
    tower, png = Stepped(engine), cases.images()['RGB.png']
    many, single = ('many', 'single') if kind == 'text' else (png, png + b'\0')
    first, queue = engine.entry_queues[kind], engine.tower_queues[kind]
    def settled(): return not first.size if kind == 'text' else queue.size >= queue.room  # the stage before rests
    def ask(data, count): return engine.submit([Item(kind, data) for _ in range(count)], lambda job: None)
    for _ in range(3): ask(many, 64)
    assert tower.came.acquire(timeout=HANG)  # the first batch is in the tower
    until(settled)
    ask(single, 1)
    until(settled)
    for _ in range(3):
        tower.next()
        until(settled)
    assert any(single in batch for batch in tower.batches[1:4]), [len(b) for b in tower.batches]
    tower.open = True
    tower.go.release()
    assert engine.close(HANG)
