"""A tiny model and its artifact, made once a run for all tests of export, runtime, serve and C++, in whichever
worker asks first."""
import functools
import pickle

import torch

from mmembed.core.torchscript import quietly
from mmembed.exporters.reference import Eager
from mmembed.exporters.export import export
from mmembed.models.dual import DualEncoder
from mmembed.models.pair import PairClassifier
from mmembed.models.towers import ConvNet, TextTransformer
from mmembed.text.pipeline import TextPipeline
from mmembed.vision.pipeline import VisionPipeline

from tests.helpers import built_once

CAPTIONS = [
    'a small red circle', 'a large blue square', 'a green triangle above a red circle', '一个红色的圆',
    'Café au lait',
]


@functools.cache
def pipelines(): return TextPipeline.learn(CAPTIONS, vocab_size=200, max_length=16), VisionPipeline(size=48)


def model(seed=0, dim=24):
    tp, vp = pipelines()
    torch.manual_seed(seed)
    text, image = TextTransformer(tp, width=32, depth=2, heads=2), ConvNet(vp, channels=(8, 16), width=32)
    return DualEncoder(text, image, dim=dim).eval()


def exported(name, model, **options):
    """The path of the verified artifact `name` of what `model()` gives, exported once a run: the same name means the
    same model and options."""
    return built_once(f'{name}.pt', lambda path: export(model(), path, fresh=False, cpp=False, **options))


def artifact(decode=True): return exported(f'tiny-{decode}', model, decode=decode)


def other(): return exported('tiny-other', lambda: model(seed=1))


def portable(): return exported('tiny-portable', model, portable=True)


def labelled(): return exported('tiny-labels', model, labels=['circle', 'square', 'star'])


def int8_labelled(): return exported('tiny-int8', model, output='int8', labels=['x', 'y'])


def reported(name, model, onnx=False, **options):
    "An artifact, the folder of its ONNX files (with `onnx`) and the report, made once a run."
    def build(folder):
        folder.mkdir()
        report = export(
            model(), folder / 'model.pt', onnx=folder / 'graphs' if onnx else None, fresh=False, cpp=False, **options
        )
        (folder/'report').write_bytes(pickle.dumps(report))
    folder = built_once(name, build)
    return folder/'model.pt', folder/'graphs', pickle.loads((folder/'report').read_bytes())


def pair_model(seed=0):
    tp, vp = pipelines()
    torch.manual_seed(seed)
    text, image = TextTransformer(tp, width=32, depth=2, heads=2), ConvNet(vp, channels=(8, 16), width=32)
    return PairClassifier(text, image, ['mismatch', 'match'], dim=24).eval()


def pair_artifact(): return exported('pairs', pair_model)


def model_as_eager(): return Eager(model())


def loaded(decode=True): return quietly(torch.jit.load, str(artifact(decode)))
