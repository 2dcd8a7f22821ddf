"Labelled batches: mismatches from the same group, new in each epoch, the same in every worker; classes by number."
import pytest
import torch

from mmembed.core.types import Tokens
from mmembed.data.folders import ClassFolder
from mmembed.train.pair_data import LabelBatch, LabelData, MatchData, Matches
from mmembed.train.datamodule import PairData
from mmembed.data.scenes import Scenes
from mmembed.data.tables import PairsFile
from mmembed.text.pipeline import TextPipeline
from mmembed.vision.pipeline import VisionPipeline
from tests.helpers import data_path


class Chapters(Scenes):
    "Rows in groups of four, the last alone; two rows of a group have one caption"
    def group(self, i): return f'chapter {i // 4}'
    def text(self, i): return super().text(i - 1 if i % 4 == 3 else i)


@pytest.fixture(scope='module')
def scenes(): return Chapters(train=41, valid=12, lang='en')


@pytest.fixture(scope='module')
def pipelines(scenes):
    tp = TextPipeline.learn([scenes.text(i) for i in range(40)], vocab_size=200, max_length=32)
    return dict(text_pipeline=tp, vision_pipeline=VisionPipeline(size=32))


@pytest.mark.parametrize('mismatches', [1, 3])
def test_mismatches_are_of_the_same_group_and_say_something_else(scenes, mismatches):
    train = scenes.split()[0]
    matches, seen = Matches(train, mismatches), set()
    assert len(matches) == 41 * (1 + mismatches)
    groups = {}
    for i in range(41): groups.setdefault(train.group(i), set()).add(train.text(i))
    for epoch in range(5):
        for i in range(len(matches)):
            text, label = matches.pair(epoch, i)
            own = i // (1 + mismatches)
            assert matches.image(i).equal(train.image(own)) and (label == 1) == (i % (1 + mismatches) == 0)
            assert (text == train.text(own)) == (label == 1) and matches.label(i) == ['mismatch', 'match'][label]
            if own != 40: assert text in groups[train.group(own)]  # the last row's group holds no other
            if not label and own != 40: seen.add((own, text))
    assert 70 < len(seen) <= 80  # rows meet both other captions of their group
    far = Matches(train, mismatches, near=0.0)
    inside = sum(far.pair(0, i)[0] in groups[far.group(i)] for i in range(len(far)) if i % (1 + mismatches))
    assert inside < 10 * mismatches


def test_rows_of_one_class_do_not_mismatch():
    class Kinds(Scenes):
        def label(self, i): return 'a' if i % 5 else 'b'
    matches = Matches(Kinds(train=20, valid=0))
    texts = {matches.source.text(i): i for i in range(20)}
    for i in range(1, 40, 2): assert matches.source.label(texts[matches.pair(0, i)[0]]) != matches.source.label(i // 2)


@pytest.mark.parametrize('kind', [dict(), dict(workers=2), dict(workers=2, worker_type='threads')], ids=str)
def test_match_batches(scenes, pipelines, kind):
    data = MatchData(source=scenes, batch_size=8, seed=4, **kind, **pipelines)
    loader, texts = data.train_dataloader(), []
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            assert type(batch) is LabelBatch and type(batch.tokens) is Tokens and batch.label.dtype == torch.int64
            rows = batch.index.tolist()
            pairs = [data.train.pair(epoch, i) for i in rows]
            assert batch.tokens.ids.equal(pipelines['text_pipeline']([t for t, _ in pairs]).ids)
            assert batch.label.tolist() == [n for _, n in pairs] == [int(i % 2 == 0) for i in rows]
            texts.append([t for t, _ in pairs])
    assert len(texts) == 20
    for _ in (0, 1):  # validation pairs stay
        valid = [b for b in data.val_dataloader()]
        assert sum(int(b.label.sum()) for b in valid) == 12 == sum(len(b.label) for b in valid) - 12
    assert list(data.captions())[:3] == [scenes.text(0)]*2 + [scenes.text(1)]


def test_broken_images_keep_labels_in_place(pipelines):
    class Broken(Chapters):
        def image(self, i): return super().image(i)[:200] if i % 5 == 2 else super().image(i)
    data = MatchData(source=Broken(train=20, valid=4), batch_size=10, **pipelines)
    for batch in data.train_dataloader():
        assert len(batch.label) == len(batch.index) == len(batch.pixels) and batch.label.equal(
            (batch.index % 2 == 0).long()
        )
    assert len(data.ledger) == 4


def test_classes_of_a_folder(tmp_path, pipelines):
    scenes = Scenes(train=12, valid=0)
    for i in range(12):
        for part in ('train', 'test'):
            folder = tmp_path/part/f'{scenes.scenes[i].first.size}_thing'
            folder.mkdir(parents=True, exist_ok=True)
            (folder/f'{i}.jpg').write_bytes(bytes(scenes.image(i).tolist()))
    data = LabelData(source=ClassFolder(tmp_path), question='what size?', batch_size=4, **pipelines)
    assert data.classes == ['large thing', 'small thing'] and (len(data.train), len(data.valid)) == (12, 12)
    for batch in data.val_dataloader():
        assert [data.classes[n] for n in batch.label] == [data.valid.label(i) for i in batch.index.tolist()]
        assert batch.tokens.ids.equal(pipelines['text_pipeline'](['what size?']*4).ids)
    pairs = PairData(source=ClassFolder(tmp_path, templates=['one {}']), batch_size=4, **pipelines)
    assert set(pairs.captions()) == {'one large thing', 'one small thing'} and pairs.valid.label(0) == 'large thing'


def test_classes_of_a_table(tmp_path, pipelines):
    scenes = Scenes(train=30, valid=0)
    rows = ''.join(f'{i}.jpg,"{scenes.text(i)}",{scenes.scenes[i].relation},{i // 3}\n' for i in range(30))
    for i in range(30): (tmp_path/f'{i}.jpg').write_bytes(bytes(scenes.image(i).tolist()))
    (tmp_path/'t.csv').write_text('image,text,where,album\n' + rows)
    data = LabelData(
        path=str(tmp_path / 't.csv'), label_key='where', group_key='album', valid_share=0.4, batch_size=4, **pipelines
    )
    assert data.classes == sorted({s.relation for s in scenes.scenes})
    batch = next(iter(data.val_dataloader()))
    assert [data.classes[n] for n in batch.label] == [data.valid.label(i) for i in batch.index.tolist()]
    assert batch.tokens.ids.equal(pipelines['text_pipeline']([data.valid.text(i) for i in batch.index.tolist()]).ids)


def test_rows_of_some_classes_have_the_numbers_of_all(pipelines):
    """Data that show only some classes of a model are numbered as the model numbers them.

    Another class is refused by name."""
    class Kinds(Scenes):
        def label(self, i): return 'dog' if i % 2 else 'emu'
    data = LabelData(source=Kinds(train=4, valid=4), classes=['ant', 'dog', 'emu'], **pipelines)
    assert [data.valid.pair(0, i)[1] for i in range(4)] == [2, 1, 2, 1] and data.classes == ['ant', 'dog', 'emu']
    with pytest.raises(ValueError, match="scene train 1 has the class 'dog', which is not one of ant, emu"):
        LabelData(source=Kinds(train=4, valid=4), classes=['ant', 'emu'], **pipelines)


def test_mistakes(scenes, tmp_path):
    class One(Scenes):
        def label(self, i): return 'scene'
        def text(self, i): return 'a scene'
    with pytest.raises(ValueError, match='mismatches must be at least 1, got 0'): MatchData(source=scenes, mismatches=0)
    with pytest.raises(ValueError, match='near is a share between 0 and 1, got 2'): MatchData(source=scenes, near=2)
    with pytest.raises(ValueError, match='scene train 1: no other row has another caption'):
        Matches(One(train=3, valid=0)).pair(0, 3)
    with pytest.raises(ValueError, match='scene train 0 has no label'): LabelData(source=scenes)
    with pytest.raises(ValueError, match="has a single class, 'scene'"): LabelData(source=One(train=4, valid=4))


@pytest.mark.parametrize('near_key', [None, 'book'])
def test_figures_mismatch_within_their_section_or_book(near_key):
    source = PairsFile(data_path('figures', 'pairs.jsonl'), text_key='alt', group_key='section', near_key=near_key)
    _, valid = source.split(0.2)
    matches = Matches(valid)
    of = {}
    for i in range(len(valid)): of.setdefault(valid.near(i), set()).add(valid.text(i))
    alone = wrong = 0
    for i in range(1, len(matches), 2):
        text, label = matches.pair(0, i)
        wrong += text == valid.text(i // 2)
        alone += text not in of[valid.near(i // 2)]
        assert label == 0
    assert wrong == 0 and alone == sum(len(of[valid.near(i)]) == 1 for i in range(len(valid)))
    assert (alone > 0) == (near_key is None) and len(of) == len({valid.near(i) for i in range(len(valid))})
