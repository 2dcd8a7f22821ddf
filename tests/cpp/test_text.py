"""Every family of TextPipeline in C++: the ids of the scripted, saved pipeline equal Python's, batch by batch."""
import functools
import struct
import subprocess

import numpy as np
import pytest
import torch

from benchmarks import fuzz_bpe, fuzz_text
from mmembed.core.packing import pack
from mmembed.core.torchscript import quietly
from mmembed.exporters.verify import cpp as host
from mmembed.text.pipeline import TextPipeline

pytestmark = pytest.mark.skipif(bool(host.why_no_host()), reason=host.why_no_host())
CAPTIONS = [
    'a small red circle left of a large blue square', '一个红色的小圆在蓝色方块左边', 'Crème brûlée, naïve café!',
    'ไทย ที่นี่', '각 한국어', "don't I'll",
] * 9


@functools.cache
def texts():
    """2,000 of what there is: real lines and the Unicode test files where they are at hand, random strings, broken
    UTF-8."""
    root = fuzz_text.data_root()/'text'
    real = fuzz_text.corpus(root) if root.exists() else CAPTIONS
    some = real[::max(len(real) // 1000, 1)][:1000]
    return (
        some
        + fuzz_text.random_texts(400, seed=11)
        + fuzz_text.random_bytes(400, seed=12)
        + fuzz_bpe.bpe_texts(198, seed=13)
        + ['', 'a' * 30_000]
    )


def learnt(**kwargs):
    return lambda: TextPipeline.learn(
        CAPTIONS + [t for t in texts()[:1000] if isinstance(t, str)], vocab_size=1500, **kwargs
    )


def segmented():
    chinese = set('一个红色的小圆在蓝色方块左边') | {'红色', '方块', '蓝色'}
    words = sorted({w for t in CAPTIONS for w in t.split()} | chinese)
    return TextPipeline.from_jieba(
        {w: i for i, w in enumerate(['[PAD]', '[UNK]', '[CLS]', '[SEP]', *words])}, max_length=64
    )


FAMILIES = {
    'WordPiece, uncased': learnt(),
    'WordPiece, cased': learnt(lowercase=False),
    'words': learnt(model='words'),
    'GPT-2 style': learnt(model='bpe'),
    'unigram': learnt(model='unigram'),
    'CLIP': lambda: TextPipeline.from_open_clip('ViT-B-32'),
    'jieba': segmented,
}


@pytest.mark.parametrize('family', FAMILIES)
def test_ids_are_pythons(family, tmp_path):
    tp = FAMILIES[family]()
    quietly(torch.jit.script, tp.eval()).save(str(tmp_path/'pipeline.pt'))
    data, offsets = pack(texts())
    (tmp_path/'texts').write_bytes(struct.pack('q', len(texts())) + offsets.numpy().tobytes() + data.numpy().tobytes())
    done = subprocess.run(
        [
            host.build_host('mmembed_test'),
            '--tokenize',
            tmp_path / 'pipeline.pt',
            tmp_path / 'texts',
            tmp_path / 'out',
            '300',
        ],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, 'ok\n'), done.stderr[-500:]
    flat = torch.from_numpy(np.fromfile(tmp_path/'out', np.int64))
    at = 0
    for i in range(0, len(texts()), 300):
        want = torch.stack(tuple(tp(texts()[i:i + 300])))
        assert flat[at:at + 2].tolist() == list(want.shape[1:])
        got = flat[at + 2:at + 2 + want.numel()].view_as(want)
        wrong = (got != want).any(2).any(0).nonzero().flatten().tolist()
        assert [ascii(texts()[i + r])[:200] for r in wrong[:3]] == []
        at += 2 + want.numel()
    assert at == len(flat)
