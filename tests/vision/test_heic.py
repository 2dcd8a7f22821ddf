"""HEIC: an error that says what to do, and with libheif pictures."""
import json
import multiprocessing

import numpy as np
import pytest
import torch
from PIL import ImageFilter

from mmembed.core.packing import as_bytes
from mmembed.core.torchcodec import load_heic
from mmembed.vision.pipeline import VisionPipeline
from mmembed.vision.probe import probe

from tests.helpers import FORMS, in_form
from tests.vision.coded import HEIC, HEIC_ALPHA, HEIC_TWO
from tests.vision.conftest import FILES, picture

try: load_heic()
except ImportError as e: missing = str(e)
else: missing = ''
with_libheif = pytest.mark.skipif(bool(missing), reason=missing)


def test_without_asking_it_is_an_error_that_says_so():
    assert probe(HEIC).error == 'HEIC is not decoded without heic=True, which needs libheif; or use JPEG'
    with pytest.raises(ValueError, match='heic=True'): VisionPipeline(size=32)([HEIC])


def test_probe():
    for data, frames in [(HEIC, 1), (HEIC_ALPHA, 1), (HEIC_TWO, 2)]:
        assert tuple(probe(data, heic=True)) == ('heic', 64, 48, 8, 3, 1, frames, '')
    assert 'x 2 frames pixels is more' in probe(HEIC_TWO, 64 * 48, True).error
    for n in range(len(HEIC)): assert isinstance(probe(HEIC[:n], heic=True).error, str)


def test_without_libheif_the_error_names_it(monkeypatch):
    def fails(path): raise OSError('libheif.so.1: cannot open shared object file')
    monkeypatch.setattr(torch.ops, 'load_library', fails)
    with pytest.raises(ImportError, match='needs libheif: apt install libheif1'): VisionPipeline(heic=True)


def want():
    image = picture(64, 48).filter(ImageFilter.GaussianBlur(2))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).int()


@with_libheif
@pytest.mark.parametrize('form', FORMS)
def test_pixels(form):
    vp = in_form(VisionPipeline(size=32, heic=True), form)
    for data in [HEIC, HEIC_TWO]:
        rgb = vp.decode(data)
        assert rgb.shape == (3, 48, 64) and (rgb.int() - want()).abs().float().mean() < 6  # lossy
    clear = VisionPipeline(size=32, heic=True, alpha='drop').decode(HEIC_ALPHA)
    assert (clear.int() - want()).abs().float().mean() < 6
    assert (vp.decode(HEIC_ALPHA).int() >= clear.int() - 1).all() and not torch.equal(vp.decode(HEIC_ALPHA), clear)
    eager = VisionPipeline(size=32, heic=True)
    assert torch.equal(vp([HEIC, FILES['jpeg'], HEIC_ALPHA]), eager([HEIC, FILES['jpeg'], HEIC_ALPHA]))
    with pytest.raises(Exception, match='HEIC|heif|corrupt|truncated|nvalid'): vp.decode(HEIC[:300])


def decoded(vp): return vp([HEIC])


@with_libheif
def test_a_spawned_worker_registers_the_operator():
    vp = VisionPipeline(size=32, heic=True)
    with multiprocessing.get_context('spawn').Pool(1) as pool: assert torch.equal(pool.apply(decoded, [vp]), vp([HEIC]))
    assert VisionPipeline.from_spec(json.loads(json.dumps(vp.spec()))).heic and 'HEIC too' in vp.describe()


@with_libheif
def test_broken_files():
    vp, rng = VisionPipeline(size=32, heic=True, max_pixels=100_000), np.random.default_rng(0)
    done = failed = 0
    for _ in range(400):
        b = bytearray(HEIC.numpy())
        for at in rng.integers(0, len(b), 3): b[at] = rng.integers(0, 256)
        try: x = vp.preprocess(as_bytes(bytes(b)))
        except (ValueError, RuntimeError) as e: failed += bool(str(e))
        else: done += x.shape == (3, 32, 32)
    assert done + failed == 400 and failed > 50 and done > 20


@with_libheif
def test_the_operator_is_in_the_artifact_only_where_asked():
    for heic in [False, True]:
        graph = str(in_form(VisionPipeline(heic=heic), 'scripted').decode.inlined_graph)
        assert ('decode_heic' in graph) == heic and 'decode_jpeg' in graph
