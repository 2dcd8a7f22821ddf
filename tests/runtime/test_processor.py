"""Which kernel multiplies in float32: timed once for a processor, kept for all its processes, fixed where the bits
are to be the same."""
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mmembed import load
from mmembed.runtime import processor
from mmembed.core.torchscript import quietly
from mmembed.exporters.onednn import Linear
from mmembed.exporters.variants import SAME
from mmembed.runtime.artifact import prepack
from mmembed.runtime.processor import choose_kernel, processor_name, choices_folder

from tests.exporters import tiny
from tests.exporters.test_processors import called

TORCH, ONEDNN = dict(onednn=.021, torch=.018), dict(onednn=.018, torch=.021)
OWN = "fp32, linear layers by torch's own product"
SAYS = '''
import sys, json
from mmembed.runtime.processor import choose_kernel
print(choose_kernel(timing=lambda: json.loads(sys.argv[1])))
'''


@pytest.fixture
def kept(tmp_path, monkeypatch):
    "The folder of the user's cache, empty; nothing is named and nothing known."
    if not torch.backends.mkldnn.is_available(): pytest.skip('this torch has no oneDNN: there is no choice')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.delenv('MMEMBED_KERNELS', raising=False)
    processor._measured.cache_clear()
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as those that `elsewhere` starts, whatever tests before left here
    yield choices_folder()
    torch.set_num_threads(before)
    processor._measured.cache_clear()


def never(): raise AssertionError('nothing was to be timed')
def elsewhere(times):
    return subprocess.run(
        [sys.executable, '-c', SAYS, json.dumps(times)],
        env=os.environ | {'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def test_the_first_choice_is_kept_for_all_processes(kept):
    assert [elsewhere(TORCH), elsewhere(ONEDNN)] == ['torch', 'torch']
    assert [f.name for f in kept.iterdir()] == [f'{processor_name()}.json']
    assert choose_kernel(timing=never) == 'torch'
    assert json.loads((kept / f'{processor_name()}.json').read_text()) == {
        'linear': 'torch',
        'ms': {'onednn': 21.0, 'torch': 18.0},
    }


def test_processes_that_time_at_once_agree(kept):
    with ThreadPoolExecutor(6) as pool: found = list(pool.map(elsewhere, [TORCH, ONEDNN] * 3))
    assert len(set(found)) == 1 and len(list(kept.iterdir())) == 1


def test_what_is_close_is_not_decided_by_chance(kept):
    assert choose_kernel(timing=lambda: dict(onednn=.0100, torch=.0096)) == 'onednn'


def test_threads_and_limits_are_asked_apart(kept, monkeypatch):
    before = torch.get_num_threads()
    try:
        names = [torch.set_num_threads(n) or processor_name() for n in (1, 2)]
    finally: torch.set_num_threads(before)
    monkeypatch.setenv('ONEDNN_MAX_CPU_ISA', 'AVX2' if os.environ.get('ONEDNN_MAX_CPU_ISA') != 'AVX2' else 'SSE41')
    assert len({*names, processor_name()}) == 3


@pytest.mark.parametrize('content', ['', 'half of {"lin', '[]', '{"linear": "mkl"}', '{"linear": 3}', b'\xff\xfe'])
def test_a_damaged_file_is_replaced(kept, content):
    kept.mkdir(parents=True)
    (file := kept/f'{processor_name()}.json').write_bytes(content if isinstance(content, bytes) else content.encode())
    assert choose_kernel(timing=lambda: TORCH) == 'torch' and elsewhere(ONEDNN) == 'torch'
    assert json.loads(file.read_text())['linear'] == 'torch' and len(list(kept.iterdir())) == 1


@pytest.mark.parametrize('place', ['a file', 'relative', 'a folder for the file'])
def test_a_place_that_cannot_be_used_does_no_harm(kept, place, monkeypatch):
    if place == 'a file': kept.parents[1].joinpath('mmembed').write_text('')
    if place == 'relative': monkeypatch.setenv('XDG_CACHE_HOME', 'here')
    if place == 'a folder for the file': (kept/f'{processor_name()}.json').mkdir(parents=True)
    assert choose_kernel(timing=lambda: TORCH) == 'torch'
    assert not Path('here').exists()


def test_either_kernel_gives_the_numbers_of_the_other():
    torch.manual_seed(0)
    texts, images = (
        ['a small red circle', 'x', ''],
        [torch.randint(0, 256, (3, 50, 60), dtype=torch.uint8) for _ in range(3)],
    )
    a, b = (load(tiny.artifact(), kernels=k) for k in ('onednn', 'torch'))
    assert a.computes == 'fp32' and b.computes == OWN
    assert 'mkldnn::_linear_pointwise' in called(a.encode_text, texts) and 'mkldnn::_linear_pointwise' not in called(
        b.encode_text, texts
    )
    for f in 'encode_text', 'encode_image':
        torch.testing.assert_close(
            getattr(a, f)(texts if f == 'encode_text' else images),
            getattr(b, f)(texts if f == 'encode_text' else images),
            atol=SAME['fp32'],
            rtol=0,
        )


def test_a_file_is_loaded_with_what_was_timed(kept, monkeypatch):
    monkeypatch.setattr(processor, 'timed', lambda: TORCH)
    assert load(tiny.artifact()).computes == OWN
    processor._measured.cache_clear()  # as a new process
    monkeypatch.setattr(processor, 'timed', lambda: ONEDNN)
    assert load(tiny.artifact()).computes == OWN
    monkeypatch.setenv('MMEMBED_KERNELS', 'onednn')
    assert load(tiny.artifact()).computes == 'fp32' and load(tiny.artifact(), kernels='torch').computes == OWN


def test_deterministic_is_never_timed_and_always_the_same(kept, monkeypatch):
    monkeypatch.setattr(processor, 'timed', never)
    texts = ['a small red circle', 'x']
    want = load(tiny.artifact(), deterministic=True, batch_size=4, kernels='onednn').encode_text(texts)
    assert load(tiny.artifact(), deterministic=True, batch_size=4).encode_text(texts).equal(want) and not kept.exists()
    with pytest.raises(AssertionError, match='timed'): load(tiny.artifact())


def test_nothing_is_timed_where_there_is_no_choice(kept, monkeypatch):
    monkeypatch.setattr(processor, 'timed', never)
    load(tiny.portable())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_only_float32_is_left_to_torch(dtype):
    layer = torch.nn.Linear(40, 24).requires_grad_(False).to(dtype)
    ours, x = quietly(torch.jit.script, Linear(layer, gelu=True)), torch.randn(3, 40, dtype=dtype)
    before = ours(x)
    prepack(ours, 'torch')
    assert ours.own is (dtype == torch.float32)
    if ours.own:
        assert ours(x).equal(torch.nn.functional.gelu(layer(x))) and 'mkldnn::_linear_pointwise' not in called(ours, x)
    else: assert ours(x).equal(before)


def test_a_wrong_word_is_refused_by_name(monkeypatch):
    with pytest.raises(ValueError, match="kernels must be one of auto, onednn, torch, got 'mkl'"):
        load(tiny.artifact(), kernels='mkl')
    monkeypatch.setenv('MMEMBED_KERNELS', 'fast')
    with pytest.raises(ValueError, match="MMEMBED_KERNELS must be one of auto, onednn, torch, got 'fast'"):
        load(tiny.artifact())


def test_what_is_timed_are_both():
    if not torch.backends.mkldnn.is_available(): pytest.skip('this torch has no oneDNN')
    found = processor.timed(.01)
    assert set(found) == {'onednn', 'torch'} and all(0 < t < float('inf') for t in found.values())
