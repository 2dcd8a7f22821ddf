"A tiny model and its artifact, made once for all tests of export, runtime and C++."
import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import torch

from mmembed.core import quietly
from mmembed.export.answers import Eager
from mmembed.export.verify import export
from mmembed.models.dual import DualEncoder
from mmembed.models.pair import PairClassifier
from mmembed.models.towers import ConvNet, TextTransformer
from mmembed.text.pipeline import TextPipeline
from mmembed.vision.pipeline import VisionPipeline

CAPTIONS = ['a small red circle', 'a large blue square', 'a green triangle above a red circle', '一个红色的圆', 'Café au lait']


@functools.cache
def pipelines(): return TextPipeline.learn(CAPTIONS, vocab_size=200, max_length=16), VisionPipeline(size=48)


def model(seed=0, dim=24):
    tp, vp = pipelines()
    torch.manual_seed(seed)
    text, image = TextTransformer(tp, width=32, depth=2, heads=2), ConvNet(vp, channels=(8, 16), width=32)
    return DualEncoder(text, image, dim=dim).eval()


@functools.cache
def folder():
    path = Path(tempfile.mkdtemp(prefix='mmembed-tests-'))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def artifact(decode=True):
    "The path of a verified artifact of `model()`."
    path = folder()/f'tiny-{decode}.pt'
    export(model(), path, decode=decode, fresh=False, cpp=False)
    return path


def pair_model(seed=0):
    tp, vp = pipelines()
    torch.manual_seed(seed)
    text, image = TextTransformer(tp, width=32, depth=2, heads=2), ConvNet(vp, channels=(8, 16), width=32)
    return PairClassifier(text, image, ['mismatch', 'match'], dim=24).eval()


@functools.cache
def pair_artifact():
    "The path of a verified artifact of `pair_model()`."
    path = folder()/'pairs.pt'
    export(pair_model(), path, fresh=False, cpp=False)
    return path


def model_as_eager(): return Eager(model())


def loaded(decode=True): return quietly(torch.jit.load, str(artifact(decode)))
