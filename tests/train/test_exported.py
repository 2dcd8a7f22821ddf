"What the loader gives a model in training, the exported file gives it afterwards, from the same raw bytes."
import io
import random

import pytest
import torch
from PIL import Image

from mmembed.train.pair_data import MatchData
from mmembed.train.datamodule import PairData
from mmembed.data.scenes import Scenes
from mmembed.exporters.export import export
from mmembed.models.dual import DualEncoder
from mmembed.models.towers import ConvNet, TextTransformer
from mmembed.runtime.embedder import Embedder
from mmembed.text.pipeline import TextPipeline
from mmembed.vision.pipeline import VisionPipeline


class Mixed(Scenes):
    "Scenes as JPEG, PNG with transparency, palette, grey, turned by EXIF, of many sizes; captions with odd letters"

    def text(self, i):
        return super().text(i) + random.Random(i).choice(['', ' ÀÉ', ' 🐈‍⬛', '\x00', ' ' * 9, ' ' + 'w' * 300])

    def image(self, i):
        rng, out = random.Random(i), io.BytesIO()
        image = Image.open(io.BytesIO(bytes(super().image(i).tolist()))).resize(
            (rng.randint(9, 200), rng.randint(9, 200))
        )
        kind = rng.choice(['RGB', 'RGBA', 'P', 'L', 'turned', 'cut'])
        if kind == 'RGBA': image.putalpha(rng.randint(0, 255))
        if kind in 'PL': image = image.convert(kind)
        exif = Image.Exif()
        if kind == 'turned': exif[0x0112] = rng.randint(2, 8)
        image.save(out, 'JPEG' if kind == 'turned' else 'PNG', exif=exif)
        data = out.getvalue()
        return torch.frombuffer(bytearray(data[:len(data)//2] if kind == 'cut' else data), dtype=torch.uint8)


@pytest.fixture(scope='module')
def source(): return Mixed(train=20, valid=60)


@pytest.fixture(scope='module')
def exported(source, tmp_path_factory):
    tp = TextPipeline.learn([source.text(i) for i in range(20)], vocab_size=300, max_length=32)
    torch.manual_seed(0)
    model = DualEncoder(
        TextTransformer(tp, width=16, depth=1, heads=2), ConvNet(VisionPipeline(size=40), channels=(8,)), dim=8
    ).eval()
    path = tmp_path_factory.mktemp('exported')/'model.pt'
    export(model, path, fresh=False, cpp=False)
    return model, Embedder(path)


@pytest.mark.parametrize('kind', [dict(), dict(workers=2), dict(workers=2, worker_type='threads')], ids=str)
@pytest.mark.parametrize('data_type', [PairData, MatchData])
def test_a_validation_batch_is_the_artifacts(source, exported, kind, data_type):
    model, emb = exported
    data = data_type(
        source=source, batch_size=16, text_pipeline=model.text_pipeline, vision_pipeline=model.vision_pipeline, **kind
    )
    seen = []
    for batch in data.val_dataloader():
        rows = batch.index.tolist()
        tokens = emb.tokenize([data.valid.pair(0, i)[0] for i in rows])
        assert all(a.equal(b) for a, b in zip(tokens, batch.tokens, strict=True))
        levels = torch.stack([emb.preprocess(bytes(data.valid.image(i).tolist())) for i in rows])
        assert emb.module.vision_pipeline.normalize(levels).equal(batch.pixels)
        seen += rows
    bad = [i for i in range(len(data.valid)) if i not in seen]
    assert len(bad) > 3 and set(data.ledger) == {data.valid.name(i) for i in bad}
    for i in bad:  # what the loader could not read, the artifact refuses for the same reason
        with pytest.raises(ValueError) as e: emb.preprocess(data.valid.image(i))
        assert data.ledger[data.valid.name(i)] == str(e.value)
