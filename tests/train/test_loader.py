"The loader: whoever prepares a batch, and wherever a run goes on, the batches are the same."
import gc
import threading
import time

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset

from mmembed.train.loader import Loader, Share, Shuffle, even_batches
from mmembed.core.threads import thread_pool

from tests.helpers import until


class Keys(Dataset):
    "Row i of epoch e is (e, i), after a while that differs from row to row"
    def __init__(self, n, broken=None): self.n, self.broken = n, broken
    def __len__(self): return self.n

    def __getitem__(self, key):
        if key[1] == self.broken: raise KeyError(f'row {key[1]} is broken')
        time.sleep(key[1] % 4 / 2000)
        return torch.tensor(key)


def make(n=23, batch_size=4, seed=3, broken=None, rank=0, world=1, **kw):
    return Loader(Keys(n, broken), batch_size, sampler=Shuffle(n, seed, rank, world), **kw)


def rows(batches): return [tuple(map(tuple, b.tolist())) for b in batches]
def mine(): return [t.name for t in threading.enumerate() if t.name.startswith('mmembed-loader')]


@pytest.mark.parametrize('kind', [dict(threads=1), dict(threads=3), dict(threads=9, ahead=1),
                                  dict(num_workers=2, persistent_workers=True)], ids=str)
def test_workers_of_any_kind_give_the_same_batches(kind):
    plain, helped = make(), make(**kind)
    for epoch in (0, 1, 5):
        for loader in (plain, helped): loader.sampler.set_epoch(epoch)
        want = rows(plain)
        assert rows(helped) == want and len(want) == 6 == len(helped)
        assert sorted(i for b in want for _, i in b) == list(range(23)) and {e for b in want for e, _ in b} == {epoch}
    assert not mine()


def test_no_draw_from_the_global_generator():
    state = torch.get_rng_state()
    for kind in (dict(), dict(threads=2), dict(num_workers=1)): list(make(**kind))
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize('kind', [dict(), dict(threads=2), dict(num_workers=2, persistent_workers=True)], ids=str)
@pytest.mark.parametrize('at', [0, 1, 3, 6])
def test_going_on_in_the_middle_of_an_epoch(kind, at):
    first, again, whole = make(**kind), make(**kind), make()
    for loader in (first, whole): loader.sampler.set_epoch(2)
    batches = iter(first)
    seen = [next(batches) for _ in range(at)]
    state = first.state_dict() if at else {'epoch': 2, 'rows': 0}
    again.load_state_dict(state)
    assert again.state_dict() == state == {'epoch': 2, 'rows': 4*at}
    again.sampler.set_epoch(2)
    assert rows(seen) + rows(again) == rows(whole)
    for loader in (again, whole): loader.sampler.set_epoch(3)
    assert rows(again) == rows(whole)  # what was left out is left out once
    assert again.state_dict() == {'epoch': 3, 'rows': 24}


@pytest.mark.parametrize('kind', [dict(threads=2), dict(num_workers=2, persistent_workers=True)], ids=str)
def test_passes_given_up_half_way_change_nothing(kind):
    loader, plain = make(**kind), make()
    for epoch in range(3):  # as Trainer(limit_train_batches=2) does it
        for l in (loader, plain): l.sampler.set_epoch(epoch)
        batches = iter(loader)
        assert rows([next(batches), next(batches)]) == rows(plain)[:2]
        del batches
    loader.sampler.set_epoch(3)
    plain.sampler.set_epoch(3)
    assert rows(loader) == rows(plain)


def test_a_given_up_pass_leaves_no_thread():
    batches = iter(make(threads=3))
    next(batches)
    assert len(mine()) == 3
    batches.close()
    assert not mine()
    batches = iter(make(threads=3))
    next(batches)
    del batches
    gc.collect()
    assert not mine()


@pytest.mark.parametrize('kind', [dict(), dict(threads=3), dict(num_workers=2)], ids=str)
def test_an_exception_arrives_with_its_batch(kind):
    order = [i for _, i in Shuffle(23, 3)]
    loader, seen = make(broken=order[9], **kind), []
    with pytest.raises(KeyError, match=f'row {order[9]} is broken'):
        for batch in loader: seen.append(batch)
    assert [i for b in rows(seen) for _, i in b] == order[:8]
    assert not mine()


def test_threads_run_ahead_but_not_far():
    asked = []
    class Counting(Keys):
        def __getitem__(self, key):
            asked.append(key)
            return super().__getitem__(key)
    loader = Loader(Counting(400), 4, threads=2, ahead=3, sampler=Shuffle(400, 0))
    batches = iter(loader)
    next(batches)
    until(lambda: len(asked) == 4*(1 + 2*3))
    time.sleep(0.2)  # time for those that must not come
    assert len(asked) == 4*(1 + 2*3)
    batches.close()


def test_a_pool_does_not_change_the_callers_cores():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with thread_pool(4) as pool: assert set(pool.map(lambda _: torch.get_num_threads(), range(40))) == {1}
        assert torch.get_num_threads() == 3
    finally: torch.set_num_threads(before)


@pytest.mark.parametrize('n, batch_size, world', [(23, 4, 2), (24, 3, 4), (30, 7, 3)])
def test_processes_share_the_joined_batch(n, batch_size, world):
    joined = rows(make(n, batch_size*world))
    ranks = [rows(make(n, batch_size, rank=r, world=world)) for r in range(world)]
    for k in range(n // (batch_size*world)):
        assert {row for r in ranks for row in r[k]} == set(joined[k])
    assert len({len(r) for r in ranks}) == 1
    half = make(n, batch_size, rank=1, world=world)
    next(iter(half))
    again = make(n, batch_size, rank=1, world=world)
    again.load_state_dict(half.state_dict())
    assert half.state_dict() == {'epoch': 0, 'rows': batch_size*world} and rows(again) == ranks[1][1:]
    alone = make(n, batch_size*world)  # the same run goes on in one process
    alone.load_state_dict(half.state_dict())
    assert rows(alone) == joined[1:]


def test_validation_shares():
    for n in range(3, 40):
        for world in (1, 2, 3):
            shares = [list(Share(n, r, world)) for r in range(world)]
            assert sorted(sum(shares, [])) == list(range(n))
            for b in range(1, 9):
                size = even_batches(n, b, world)
                assert size >= b and len({-(-len(s) // size) for s in shares}) == 1
    assert list(Share(5)) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match='2 rows do not give each of 3 processes one'): even_batches(2, 4, 3)


def test_another_batch_size_cannot_go_on_in_the_middle():
    state = {'epoch': 0, 'rows': 12}
    with pytest.raises(ValueError, match='after 12 rows of epoch 0 with batches of 5: resume with the batch size'):
        loader = make(batch_size=5)
        loader.load_state_dict(state)
        list(loader)
    loader = make(batch_size=5)
    loader.load_state_dict(state)
    loader.sampler.set_epoch(1)
    assert len(list(loader)) == 5
    with pytest.raises(ValueError, match='want threads or num_workers, got 2 and 1'): make(threads=2, num_workers=1)


class Steps(LightningModule):
    "Notes what it sees"
    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(2, 1), []

    def training_step(self, batch, i):
        self.seen.append((self.current_epoch, i, *map(tuple, batch.tolist())))
        return self.layer(batch.float()).mean()

    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), 1e-4)


@pytest.mark.parametrize('kind', [dict(threads=2), dict(num_workers=1, persistent_workers=True)], ids=str)
def test_lightning_goes_on_where_it_stopped(tmp_path, kind):
    def fit(resume=None):
        lit = Steps()
        keep = ModelCheckpoint(tmp_path, '{step}', every_n_train_steps=1, save_top_k=0 if resume else -1)
        trainer = Trainer(max_epochs=3, accelerator='cpu', logger=False, callbacks=[keep], enable_progress_bar=False,
                          enable_model_summary=False, default_root_dir=tmp_path)
        trainer.fit(lit, make(n=20, **kind), ckpt_path=resume)
        return lit.seen
    whole = fit()
    assert len(whole) == 15
    for step in (2, 5, 8):  # in the first epoch, at its end, in the second
        assert fit(tmp_path/f'step={step}.ckpt') == whole[step:]
    assert not mine()


def test_it_is_a_data_loader():
    loader = make(threads=2, drop_last=True)
    assert isinstance(loader, DataLoader) and len(loader) == 5 and len(rows(loader)) == 5
