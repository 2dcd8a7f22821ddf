"""One set of reasons for pictures that cannot be read, and what training does with them."""
import pytest
import torch

from mmembed.core.packing import as_bytes
from mmembed.train.datamodule import PairData
from mmembed.train.batches import Rows
from mmembed.data.scenes import Scenes
from mmembed.data.source import Source
from mmembed.exporters.verify import samples as cases
from mmembed.runtime.embedder import load
from mmembed.text.pipeline import TextPipeline
from mmembed.vision.augment import Augmentation
from mmembed.vision.pipeline import VisionPipeline

from tests.exporters import tiny


class Cases(Source):
    "The awkward files of `export.cases` as pairs"
    def __init__(self): self.files = [as_bytes(b) for b in cases.images().values()]
    def __len__(self): return len(self.files)
    def text(self, i): return 'a'
    def image(self, i): return self.files[i]


def test_embedder_training_and_probe_give_the_same_reason():
    emb, files, vp = load(tiny.artifact()), Cases(), tiny.pipelines()[1]
    flagged = emb.encode_image(files.files, on_error='flag').errors
    assert sum(map(bool, flagged)) >= 10
    for augment in [False, True]:
        rows = Rows(files, vp, augment=augment)
        assert [rows[i].error for i in range(len(files))] == flagged
    for file, error in zip(files.files, flagged):
        if found := vp.probe(file).error: assert found == error


class Broken(Scenes):
    def image(self, i): return super().image(i)[:300] if i % 5 == 2 else super().image(i)


class AllBroken(Scenes):
    def image(self, i): return super().image(i)[:100]


def data(on_error, source=None, **options):
    scenes = Broken(train=20, valid=10) if source is None else source
    tp = TextPipeline.learn([scenes.text(i) for i in range(20)], vocab_size=300, max_length=48)
    return PairData(source=scenes, batch_size=5, on_error=on_error, text_pipeline=tp,
                    vision_pipeline=VisionPipeline(size=48, augmentation=Augmentation(scale=(0.5, 1.0))), **options)


def batches(d, epoch):
    loader = d.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


@pytest.mark.parametrize('workers', [0, 2])
def test_blank_keeps_every_row(workers):
    d = data('blank', workers=workers)
    for epoch in (0, 3):
        seen = batches(d, epoch)
        assert [len(b.index) for b in seen] == [5] * 4
        assert sorted(torch.cat([b.index for b in seen]).tolist()) == list(range(20))
        for b in seen:
            for i, pixels in zip(b.index.tolist(), b.pixels): assert (pixels.abs().max() < 0.01) == (i % 5 == 2)
    assert set(d.ledger) == {f'scene train {i}' for i in (2, 7, 12, 17)}
    assert str(d.ledger).startswith('4 images could not be read and were replaced by the mean colour:\n  scene train ')
    again = batches(data('blank'), 3)  # another run, resumed in epoch 3, with another number of workers
    for a, b in zip(seen, again, strict=True): assert torch.equal(a.pixels, b.pixels) and torch.equal(a.index, b.index)


def test_skip_and_blank_agree_on_the_rest():
    skipped = {i: p for b in batches(data('skip'), 1) for i, p in zip(b.index.tolist(), b.pixels)}
    blank = {i: p for b in batches(data('blank'), 1) for i, p in zip(b.index.tolist(), b.pixels)}
    assert set(blank) - set(skipped) == {2, 7, 12, 17}
    for i, p in skipped.items(): assert torch.equal(p, blank[i])


def test_nothing_readable_and_wrong_names():
    with pytest.raises(ValueError, match='none of 20 images could be read'):
        batches(data('blank', AllBroken(train=20, valid=5)), 0)
    with pytest.raises(ValueError, match="'skip', 'raise' or 'blank', got 'drop'"): data('drop')
