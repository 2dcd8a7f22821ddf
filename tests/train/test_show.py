"Show: what is drawn is what the model gets, and the right answers are those that are framed."
import warnings

import matplotlib
import pytest
import torch

from mmembed.train.pair_data import MatchData
from mmembed.train.datamodule import PairData
from mmembed.data.scenes import Scenes
from mmembed.models.dual import DualEncoder
from mmembed.models.towers import ConvNet, TextTransformer
from mmembed.train.results import Gallery, gallery, show_captions, show_results, show_scores
from mmembed.train.datamodule import first_rows
from mmembed.train.show import levels, show_batch, wrapped
from mmembed.text.pipeline import TextPipeline
from mmembed.vision.pipeline import VisionPipeline

matplotlib.use('Agg')


@pytest.fixture(scope='module')
def data():
    scenes = Scenes(train=40, valid=12)  # Chinese captions too
    tp = TextPipeline.learn([scenes.text(i) for i in range(40)], vocab_size=300, max_length=20)
    return PairData(
        source=scenes, batch_size=5, text_pipeline=tp, vision_pipeline=VisionPipeline(size=32)
    )


@pytest.fixture(scope='module')
def model(data):
    torch.manual_seed(0)
    return DualEncoder(
        TextTransformer(data.text_pipeline, width=16, depth=1, heads=2),
        ConvNet(data.vision_pipeline, channels=(8,)),
        dim=16,
    )


@pytest.mark.parametrize(
    'mean, std', [(0.5, 0.5), ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)), (0, 1 / 255)]
)
def test_levels_come_back(mean, std):
    vp = VisionPipeline(
        size=16,
        mean=[mean] * 3 if isinstance(mean, (int, float)) else mean,
        std=[std] * 3 if isinstance(std, float) else std,
    )
    x = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    assert levels(vp.normalize(x), vp).equal(x) and levels(vp.normalize(x)[0], vp).equal(x[0])


def test_seen_is_what_the_loader_gives(data):
    seen = first_rows(data, 6, epoch=2)
    rows = data.rows(data.train, True)
    assert all(x.equal(rows[2, i].levels) for i, x in enumerate(seen.levels()))
    assert seen.names == [f'scene train {i}' for i in range(6)] and seen.label(0) == ''
    for i, tokens in enumerate(seen.tokens()):
        ids = data.text_pipeline([data.train.text(i)]).ids[0]
        assert tokens == [data.text_pipeline.token(t) for t in ids if t]
    plain = first_rows(data, 4, training=False)
    assert plain.levels()[3].equal(data.vision_pipeline.preprocess(data.valid.image(3)))
    html = first_rows(
        MatchData(source=data.source, text_pipeline=data.text_pipeline, vision_pipeline=data.vision_pipeline), 3
    )._repr_html_()
    assert html.count('<img') == 3 and '<b>mismatch</b>' in html and html.count('<b>match</b>') == 2
    assert '<table>' in data._repr_html_() and 'no processes besides' in data._repr_html_()


def test_hostile_names_and_captions_are_escaped(data):
    class Hostile(Scenes):
        def name(self, i): return '"><script>alert(1)</script>'
        def text(self, i): return '<script>$\\frac{$ 一'

    bad = PairData(
        source=Hostile(train=4, valid=2),
        text_pipeline=TextPipeline.learn(['<script>$\\frac{$ 一'], vocab_size=60, max_length=30),
        vision_pipeline=data.vision_pipeline,
    )
    seen = first_rows(bad, 2)
    assert '<script' not in seen._repr_html_()
    matplotlib.pyplot.close(show_batch(seen))  # a dollar sign is no formula


def test_figures(data, model):
    g = gallery(model, data)
    assert len(g.index) == 12 and g.text.shape == g.image.shape == (12, 16) and model.training
    model.eval()
    with torch.no_grad():
        assert torch.allclose(
            g.image, model.encode_image(data.vision_pipeline([data.valid.image(i) for i in range(12)])), atol=1e-5
        )
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        fig = show_scores(g, 5)
        texts = [t.get_text() for t in fig.axes[0].texts]
        assert texts == [f'{v:.2f}' for row in g.scores()[:5, :5].tolist() for v in row]
        fig = show_results(g, [7, 2], k=4)
        order = g.scores()[7].topk(4).indices.tolist()
        shown = [torch.from_numpy(ax.images[0].get_array().data.copy()).permute(2, 0, 1) for ax in fig.axes[1:5]]
        assert all(x.equal(g.picture(j)) for x, j in zip(shown, order))
        assert [ax.spines['top'].get_visible() for ax in fig.axes[1:5]] == [j == 7 for j in order]
        rank = 1 + int((g.scores()[7] > g.scores()[7, 7]).sum())
        assert f'right one: rank {rank} of 12' in fig.axes[0].texts[0].get_text()
        fig = show_captions(g, 2, k=3)
        assert len(fig.axes[1].texts) == 3
        show_batch(first_rows(data, 3), columns=2)
    matplotlib.pyplot.close('all')


def test_captions_that_say_the_same_are_right():
    class Twins(Scenes):
        def text(self, i): return super().text(i // 2)
    part = Twins(train=0, valid=6)
    g = Gallery(torch.eye(6), torch.eye(6), list(range(6)), part, VisionPipeline(size=8))
    assert g.relevant().long().equal(torch.block_diag(*[torch.ones(2, 2)]*3).long())
    class Languages(Scenes):
        def picture(self, i): return f'{i % 3}'
    g = g._replace(source=Languages(train=0, valid=6))
    assert g.relevant().equal(torch.eye(3).repeat(2, 2).bool())


def test_broken_rows(data, model):
    class Broken(Scenes):
        def image(self, i): return super().image(i)[:100 if i in (0, 5) else None]

    bad = PairData(
        source=Broken(train=4, valid=4),
        batch_size=2,
        text_pipeline=data.text_pipeline,
        vision_pipeline=data.vision_pipeline,
    )
    with pytest.raises(ValueError, match='scene train 0: '): first_rows(bad)
    assert gallery(model, bad).index == [0, 2, 3]
    assert wrapped('a b c d e f', 3, 2) == 'a b\nc …'
