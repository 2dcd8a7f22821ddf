"""torchcodec's wheel beside a libtorch without CUDA: stand-ins that the loader is content with."""
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TORCH = Path(importlib.util.find_spec('torch').origin).parent
CODEC = Path(importlib.util.find_spec('torchcodec').origin).parent/'libtorchcodec_image.so'
pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ('cmake', 'g++', 'readelf'))) or not CODEC.exists(), reason='wants cmake, g++ and readelf'
)
LOADS = """
import ctypes, sys
torch, codec, folder, *names = sys.argv[1:]
for name in names: ctypes.CDLL(f'{folder}/{name}', ctypes.RTLD_GLOBAL)
for name in ('libc10.so', 'libtorch_cpu.so', 'libtorch.so'): ctypes.CDLL(f'{torch}/lib/{name}', ctypes.RTLD_GLOBAL)
ctypes.CDLL(codec, ctypes.RTLD_GLOBAL)
mapped = [line.strip() for line in open('/proc/self/maps')]
print(*sorted({'/' + line.split('/', 1)[1] for line in mapped if line.endswith(('_cuda.so', 'nvrtc.so.13'))}))
"""


def configured(tmp_path, torch):
    done = subprocess.run(
        [
            'cmake',
            '-S',
            ROOT / 'cpp',
            '-B',
            tmp_path / 'build',
            f'-DTORCH_DIR={torch}',
            f'-DTORCHCODEC_IMAGE={CODEC}',
            '-DMMEMBED_HEADERS_ONLY=ON',
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    made = tmp_path/'build'/'mmembed_cuda_stand_ins'
    return sorted(p.name for p in made.glob('*.so*')), made, done.stdout


@pytest.fixture
def without_cuda(tmp_path):
    "A libtorch without libtorch_cuda.so: this Python's, but for that file."
    folder = tmp_path/'libtorch'
    (folder/'lib').mkdir(parents=True)
    (folder/'include').symlink_to(TORCH/'include')
    for name in ('libc10.so', 'libtorch_cpu.so', 'libtorch.so'): (folder/'lib'/name).symlink_to(TORCH/'lib'/name)
    return folder


def test_stand_ins_are_all_that_the_wheel_wants_of_cuda(tmp_path, without_cuda):
    names, made, said = configured(tmp_path, without_cuda)
    needed = subprocess.run(['readelf', '-d', CODEC], capture_output=True, text=True).stdout
    wanted = sorted(n for n in (line.split('[')[-1].split(']')[0] for line in needed.splitlines() if 'NEEDED' in line)
                    if n.startswith(('libnvrtc', 'libcudart', 'libc10_cuda', 'libtorch_cuda')))
    assert names == wanted
    if not wanted: pytest.skip('this torchcodec links no CUDA')
    assert 'libtorch without CUDA: stand-ins' in said
    for name in names:
        symbols = subprocess.run(['readelf', '-W', '--dyn-syms', made/name], capture_output=True, text=True).stdout
        for function in ('cudaGetDevice', 'cudaStreamSynchronize', 'aoti_torch_get_current_cuda_stream'):
            assert f'{function}@@{name}' in symbols
    others = [n for n in names if 'cudart' not in n]  # this Python's libtorch_cpu.so wants more of the real one
    run = subprocess.run([sys.executable, '-c', LOADS, TORCH, CODEC, made, *others], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert str(TORCH/'lib') not in run.stdout and f'{made}/libtorch_cuda.so' in run.stdout.split()


def test_a_libtorch_with_cuda_gets_none(tmp_path):
    if not (TORCH/'lib'/'libtorch_cuda.so').exists(): pytest.skip('this torch is without CUDA')
    assert configured(tmp_path, TORCH)[0] == []
