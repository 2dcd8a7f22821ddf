"The data module: batches are the pipelines' own, repeatable in any worker, and a broken image costs one row."
import multiprocessing
import warnings
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from mmembed.core.types import PairBatch, Tokens
from mmembed.data.folders import ClassFolder
from mmembed.train.pair_data import LabelData, MatchData
from mmembed.train.batches import Ledger
from mmembed.train.datamodule import PairData, Shuffled
from mmembed.train.loader import Shuffle
from mmembed.data.scenes import Scenes
from mmembed.data.source import Source
from mmembed.text.pipeline import TextPipeline
from mmembed.vision.augment import Augmentation
from mmembed.vision.pipeline import VisionPipeline


class Broken(Scenes):
    """Scenes of which every fifth training image, from row 2 on, is cut off.

    Defined here so that spawned workers find it"""
    def image(self, i): return super().image(i)[:300] if i < self.train and i % 5 == 2 else super().image(i)


class AllBroken(Scenes):
    def image(self, i): return super().image(i)[:100]


@pytest.fixture(scope='module')
def scenes(): return Scenes(train=60, valid=20)


@pytest.fixture(scope='module')
def pipelines(scenes):
    tp = TextPipeline.learn([scenes.text(i) for i in range(60)], vocab_size=300, max_length=48)
    return dict(text_pipeline=tp, vision_pipeline=VisionPipeline(size=48, augmentation=Augmentation(scale=(0.5, 1.0))))


def same(a, b):
    return all(x.equal(y) for x, y in zip([*a.tokens, a.pixels, a.index], [*b.tokens, b.pixels, b.index], strict=True))


def batches(data, epoch=0):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def test_validation_batches_are_the_pipelines_own(scenes, pipelines):
    data = PairData(source=scenes, batch_size=8, **pipelines)
    tp, vp = pipelines.values()
    seen = []
    for batch in data.val_dataloader():
        assert type(batch) is PairBatch and type(batch.tokens) is Tokens
        texts, images = zip(*(data.valid[i] for i in batch.index.tolist()))
        assert all(a.equal(b) for a, b in zip(batch.tokens, tp(list(texts)), strict=True))
        assert batch.pixels.equal(vp(list(images)))
        seen += batch.index.tolist()
    assert seen == list(range(20))


def test_training_batches_are_augment_of_the_pipeline(scenes, pipelines):
    data = PairData(source=scenes, batch_size=16, seed=5, **pipelines)
    tp, vp = pipelines.values()
    for batch in batches(data, epoch=2):
        rows = batch.index.tolist()
        levels = [vp.augment(scenes.image(i), torch.Generator().manual_seed(hash((5, 2, i)))) for i in rows]
        assert batch.pixels.equal(vp.normalize(torch.stack(levels)))
        assert batch.tokens.ids.equal(tp([scenes.text(i) for i in rows]).ids)
    plain = PairData(source=scenes, batch_size=16, seed=5, augment=False, **pipelines)
    for batch in batches(plain): assert batch.pixels.equal(vp([scenes.image(i) for i in batch.index.tolist()]))


def mirrored(data, part='train'):
    "How many of 64 draws of the first row of a part are mirrored, of a pipeline that takes the whole image."
    part, (_, vp) = getattr(data, part), data.pipelines()
    straight, rows = vp.preprocess(part.image(0)), data.rows(part, training=True)
    seen = [rows[epoch, 0].levels for epoch in range(64)]
    assert all(x.equal(straight) or x.equal(straight.flip(2)) for x in seen) and not straight.equal(straight.flip(2))
    return sum(x.equal(straight.flip(2)) for x in seen)


@pytest.mark.parametrize(
    'flip, of_captions, of_classes',
    [(None, range(1), range(16, 49)), (0, range(1), range(1)), (1, range(64, 65), range(64, 65))],
)
def test_captions_are_not_mirrored_but_classes_are(tmp_path, scenes, pipelines, flip, of_captions, of_classes):
    import io
    from PIL import Image
    ramp = torch.arange(32, dtype=torch.uint8).mul(8).expand(32, 32)
    file = io.BytesIO()
    Image.fromarray(ramp.contiguous().numpy()).save(file, 'PNG')
    for i in range(20):
        path = tmp_path/('left', 'right')[i % 2]/f'{i}.png'
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(file.getvalue())
    (tmp_path / 't.csv').write_text(
        'image,text,side\n'
        + ''.join(f'{s}/{i}.png,the {s} one,{s}\n' for i in range(20) for s in [('left', 'right')[i % 2]])
    )
    options = dict(
        text_pipeline=pipelines['text_pipeline'],
        vision_pipeline=VisionPipeline(size=32, augmentation=Augmentation((1, 1), (1, 1), flip)),
        valid_share=0.5,
    )
    table = dict(path=str(tmp_path/'t.csv'), label_key='side', **options)
    for data in (PairData(**table), MatchData(**table), LabelData(**table), PairData(shuffle_captions=True, **table)):
        assert mirrored(data) in of_captions
    for data in (
        PairData(text_key=None, **table),
        LabelData(question='which?', **table),
        PairData(source=ClassFolder(tmp_path), **options),
    ):
        assert mirrored(data) in of_classes


METHODS = [m for m in ('fork', 'spawn') if m in multiprocessing.get_all_start_methods()]
WORKERS = [dict(start_method=m) for m in METHODS] + [dict(worker_type='threads')]


@pytest.mark.parametrize('kind', WORKERS, ids=lambda k: next(iter(k.values())))
def test_workers_change_nothing(scenes, pipelines, kind):
    alone = PairData(source=scenes, batch_size=16, **pipelines)
    helped = PairData(source=scenes, batch_size=16, workers=2, **kind, **pipelines)
    loader = helped.train_dataloader()
    for epoch in (0, 1):  # the second epoch reaches workers that were born in the first
        loader.sampler.set_epoch(epoch)
        want, got = batches(alone, epoch), list(loader)
        assert len(got) == len(want) == 3 and all(map(same, got, want))


def test_epochs_and_seeds_differ(scenes, pipelines):
    def order(seed, epoch): return [i for _, i in Shuffle(60, seed).__class__.__iter__(_at(60, seed, epoch))]
    assert sorted(order(1, 0)) == list(range(60))
    assert order(1, 0) == order(1, 0) and order(1, 0) != order(1, 1) and order(1, 0) != order(2, 0)
    state = torch.random.get_rng_state()
    batches(PairData(source=scenes, batch_size=16, **pipelines))
    assert torch.random.get_rng_state().equal(state)  # neither crops nor the loader draw from the run's own generator


def _at(n, seed, epoch):
    shuffle = Shuffle(n, seed)
    shuffle.set_epoch(epoch)
    return shuffle


@pytest.mark.parametrize('workers, kind', [(0, 'processes'), (2, 'processes'), (2, 'threads')])
def test_broken_images_are_skipped_and_named(pipelines, workers, kind):
    data = PairData(source=Broken(train=20, valid=10), batch_size=5, workers=workers, worker_type=kind, **pipelines)
    index = torch.cat([b.index for b in data.train_dataloader()])
    assert sorted(index.tolist()) == [i for i in range(20) if i % 5 != 2]
    assert set(data.ledger) == {f'scene train {i}' for i in (2, 7, 12, 17)}
    assert str(data.ledger).startswith('4 images could not be read and were skipped:\n  scene train ')
    assert '.cpp' not in str(data.ledger) and all(data.ledger.values())


@pytest.mark.parametrize('workers, kind', [(0, 'processes'), (1, 'processes'), (2, 'threads')])
def test_strict_runs_stop_at_a_broken_image(pipelines, workers, kind):
    data = PairData(
        source=Broken(train=20, valid=10), batch_size=5, workers=workers, worker_type=kind, on_error='raise',
        **pipelines,
    )
    with pytest.raises(ValueError, match=r'^scene train (2|7|12|17): [^\n]+$'): list(data.train_dataloader())
    assert len(list(data.val_dataloader())) == 2


def test_a_data_set_without_one_readable_image(pipelines):
    data = PairData(source=AllBroken(train=4, valid=2), batch_size=2, **pipelines)
    with pytest.raises(ValueError, match='none of 4 images could be read; scene train'): list(data.train_dataloader())


class Gone(Scenes):
    "Scenes of which the images of the rows `gone` are cut off"
    gone = ()
    def image(self, i): return super().image(i)[:100] if i in self.gone else super().image(i)


@pytest.mark.parametrize('make', [PairData, MatchData])
@pytest.mark.parametrize('workers, kind', [(0, 'processes'), (2, 'threads')])
def test_ranks_take_equally_many_steps_whatever_can_be_read(pipelines, make, workers, kind):
    """A batch of which nothing can be read is a blank row without an index where other processes wait, and is left
    out where there are none."""
    def loaders(gone, part='train', world=2):
        source = Gone(train=22, valid=20)
        source.gone = gone
        for rank in range(world):
            data = make(source=source, batch_size=4, workers=workers, worker_type=kind, **pipelines)
            data.trainer = SimpleNamespace(global_rank=rank, world_size=world)
            yield data, data.train_dataloader() if part == 'train' else data.val_dataloader()
    for part in ('train', 'valid'):
        rows = [[b.index.tolist() for b in loader] for _, loader in loaders((), part)]
        data, loader = next(loaders((), part))
        times = 2 if make is MatchData else 1
        # a whole batch of one process, a row of the other
        gone = {i // times + (0 if part == 'train' else 22) for i in [*rows[1][1], rows[0][0][0]]}
        got = [list(loader) for _, loader in loaders(gone, part)]
        assert len(got[0]) == len(got[1]) == len(rows[0])
        for rank in (0, 1):
            for batch, whole in zip(got[rank], rows[rank]):
                left = [i for i in whole if i // times + (0 if part == 'train' else 22) not in gone]
                assert batch.index.tolist() == left and type(batch) is type(next(iter(loader)))
                assert len(batch.tokens.ids) == len(batch.tokens.mask) == len(batch.pixels) == max(1, len(left))
                assert make is PairData or len(batch.label) == len(left)
        assert not got[1][1].index.numel() and got[1][1].pixels.abs().max() < 0.02  # the mean colour
    alone = [list(loader) for _, loader in loaders(range(22, 26), 'valid', 1)]
    assert all(len(b.index) == len(b.pixels) > 0 for b in alone[0])


class Typo(Scenes):
    def text(self, i): return super().text(i) if i != 7 else {}['caption']


@pytest.mark.parametrize('workers, kind', [(0, 'processes'), (1, 'processes'), (2, 'threads')])
def test_a_mistake_in_a_source_stops_the_run_and_names_the_row(pipelines, workers, kind):
    data = PairData(source=Typo(train=20, valid=10), batch_size=5, workers=workers, worker_type=kind, **pipelines)
    with pytest.raises(RuntimeError, match="scene train 7: KeyError: 'caption'"): list(data.train_dataloader())


def test_ledger_text():
    assert str(Ledger()) == 'nothing was skipped'
    assert str(Ledger(a='b')) == '1 image could not be read and was skipped:\n  a: b'
    assert str(Ledger({str(i): 'x' for i in range(25)})).endswith('and 5 more')


def test_shuffled_captions(scenes, pipelines):
    data = PairData(source=scenes, shuffle_captions=True, seed=3, **pipelines)
    texts = [data.train.text(i) for i in range(60)]
    assert sorted(texts) == sorted(scenes.text(i) for i in range(60)) and texts != [scenes.text(i) for i in range(60)]
    assert data.train.image(4).equal(scenes.image(4)) and isinstance(data.train, Shuffled)
    # validation is left as it is
    assert [data.valid.text(i) for i in range(20)] == [scenes.text(60 + i) for i in range(20)]


@pytest.mark.parametrize('workers, kind', [(0, 'processes'), (2, 'threads')])
def test_ranks_share_the_data(scenes, pipelines, workers, kind):
    def rank(r, world, batch_size, n):
        data = PairData(
            source=Scenes(train=60, valid=n), batch_size=batch_size, workers=workers, worker_type=kind, **pipelines
        )
        data.trainer = SimpleNamespace(global_rank=r, world_size=world)
        return data
    whole = list(rank(0, 1, 8, 17).train_dataloader())
    parts = [list(rank(r, 2, 4, 17).train_dataloader()) for r in (0, 1)]
    assert [len(p) for p in parts] == [7, 7] == [len(whole)]*2
    for one, *both in zip(whole, *parts, strict=True):
        pixels = {int(i): x for b in both for i, x in zip(b.index, b.pixels)}
        assert set(one.index.tolist()) == set(pixels) and all(
            pixels[int(i)].equal(x) for i, x in zip(one.index, one.pixels)
        )
    valid = [list(rank(r, 2, 8, 17).val_dataloader()) for r in (0, 1)]  # 9 and 8 rows: batches of 8 would be 2 and 1
    assert len(valid[0]) == len(valid[1])
    assert sorted(i for part in valid for b in part for i in b.index.tolist()) == list(range(17))


def test_overfitting_goes_on_without_shuffling(scenes, pipelines, tmp_path):
    seen = []
    class Steps(LightningModule):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(()))
        def training_step(self, batch, _):
            seen.append(batch.index.tolist())
            return self.w * batch.pixels.mean()
        def configure_optimizers(self): return torch.optim.SGD(self.parameters(), 0.1)
    data = PairData(source=Broken(train=20, valid=10), batch_size=4, workers=2, worker_type='threads', **pipelines)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        Trainer(
            max_epochs=2, overfit_batches=2, accelerator='cpu', logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        ).fit(Steps(), data)
    assert seen == [[0, 1, 3], [4, 5, 6]]*2 and set(data.ledger) == {'scene train 2', 'scene train 7'}


def test_small_data_is_not_dropped(pipelines):
    data = PairData(source=Scenes(train=3, valid=1), batch_size=16, **pipelines)
    assert [len(b.index) for b in data.train_dataloader()] == [3]


def test_a_table_by_path(tmp_path, scenes, pipelines):
    for i in range(40): (tmp_path/f'{i}.jpg').write_bytes(bytes(scenes.image(i).tolist()))
    (tmp_path / 'pairs.csv').write_text(
        'file,alt,album\n' + ''.join(f'{i}.jpg,"{scenes.text(i)}",{i // 4}\n' for i in range(40))
    )
    data = PairData(
        path=str(tmp_path / 'pairs.csv'), image_key='file', text_key='alt', group_key='album', valid_share=0.3,
        batch_size=4, **pipelines,
    )
    assert len(data.train) + len(data.valid) == 40 and len(data.train) % 4 == 0
    assert sorted(data.captions()) == sorted(data.train.text(i) for i in range(len(data.train)))
    batch = next(iter(data.val_dataloader()))
    assert batch.pixels.equal(pipelines['vision_pipeline']([data.valid.image(i) for i in range(4)]))


def test_files_of_their_own_for_each_part(tmp_path, scenes, pipelines):
    "`path` is trained on as a whole, whatever its share would be; classes are those of all files."
    for name, rows in (('train', range(12)), ('valid', range(12, 20)), ('test', range(20, 25))):
        (tmp_path/name).mkdir()
        for i in rows: (tmp_path/name/f'{i}.jpg').write_bytes(bytes(scenes.image(i).tolist()))
        (tmp_path / f'{name}.csv').write_text(
            'image,text,label\n' + ''.join(f'{name}/{i}.jpg,"{scenes.text(i)}",{"ab"[i > 20]}\n' for i in rows)
        )
    train, valid, test = (str(tmp_path/f'{k}.csv') for k in ('train', 'valid', 'test'))
    data = PairData(path=train, valid_path=valid, test_path=test, batch_size=4, **pipelines)
    for part, rows in (('train', range(12)), ('valid', range(12, 20)), ('test', range(20, 25)), ('all', range(12))):
        assert [data.part(part).text(i) for i in range(len(data.part(part)))] == [scenes.text(i) for i in rows]
    assert sorted(data.captions()) == sorted(scenes.text(i) for i in range(12))
    seen = [b.pixels for b in data.test_dataloader()]
    assert torch.cat(seen).equal(pipelines['vision_pipeline']([scenes.image(i) for i in range(20, 25)]))
    assert len(PairData(path=train, test_path=test, valid_share=0.4).part('test')) == 5
    labelled = LabelData(path=train, valid_path=valid, test_path=test, label_key='label', **pipelines)
    assert labelled.classes == ['a', 'b'] and [labelled.part('test').pair(0, i)[1] for i in range(5)] == [0, 1, 1, 1, 1]
    assert len(MatchData(path=train, test_path=test, mismatches=2, valid_share=0.4).part('test')) == 15
    for kw, message in [
        (dict(split_file='x.csv', valid_path=valid), 'split_file and valid_path both say what is held out'),
        (dict(valid_path=train), 'valid_path is path itself'),
        (dict(test_path=str(tmp_path / 'none.csv')), 'no such file'),
    ]:
        with pytest.raises((ValueError, OSError), match=message): PairData(path=train, **kw)
    with pytest.raises(ValueError, match='valid_path goes with path, not with source'):
        PairData(source=scenes, valid_path=valid)


def test_a_part_that_is_not_there(scenes, pipelines):
    "No figure of a test set is one of the validation rows."
    data = PairData(source=scenes, **pipelines)
    with pytest.raises(ValueError, match='has no rows for test: give test_path'): data.test_dataloader()
    with pytest.raises(ValueError, match='a part is one of train, valid, test, all'): data.part('dev')


def test_all_rows_to_judge_a_model_by(pipelines):
    rows = Scenes(train=3, valid=0)
    class Own(Scenes):
        def split(self, share): return super(Scenes, self).split(share)
    for source in (rows, Own(train=3, valid=0)):
        data = PairData(source=source, valid_share=1, **pipelines)
        assert len(data.valid) == 3 and not len(data.train)
        with pytest.raises(ValueError, match='has no rows for train'): data.train_dataloader()


def test_mistakes(scenes, pipelines):
    for kw, message in [
        ({}, 'wants either path'),
        (dict(path='x.csv', source=scenes), 'wants either path'),
        (dict(source=scenes, batch_size=0), 'batch_size must be at least 1, got 0'),
        (dict(source=scenes, valid_share=1.1), 'valid_share must be between 0 and 1'),
        (dict(source=scenes, worker_type='fibres'), "worker_type must be 'processes' or 'threads', got 'fibres'"),
        (dict(source=Scenes(train=0, valid=3)), 'no rows for training'),
        (dict(source=Scenes(train=3, valid=0)), 'no rows for validation'),
    ]:
        with pytest.raises(ValueError, match=message): PairData(**kw)
    with pytest.raises(ValueError, match='no vision_pipeline'):
        PairData(source=scenes, text_pipeline=pipelines['text_pipeline']).train_dataloader()


def test_an_empty_source():
    class Empty(Source):
        def __len__(self): return 0
    with pytest.raises(ValueError, match='no rows for training'): PairData(source=Empty())


def test_show_batch(scenes, pipelines):
    import matplotlib
    matplotlib.use('Agg')
    figure = PairData(source=scenes, augment=False, **pipelines).show_batch(3, columns=2)
    assert len(figure.axes) == 4
    shown = torch.from_numpy(figure.axes[1].images[0].get_array().data)
    assert shown.permute(2, 0, 1).equal(pipelines['vision_pipeline'].preprocess(scenes.image(1)))
    tp = pipelines['text_pipeline']
    tokens = [tp.token(i) for i in tp([scenes.text(1)]).ids[0] if i]
    assert (
        figure.axes[1].get_title() == 'scene train 1'
        and figure.axes[1].texts[0].get_text().split() == ' · '.join(tokens).split()
    )
