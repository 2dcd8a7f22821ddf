"""The image operators: found without importing torchcodec, and an error in one sentence where it is not installed."""
import subprocess
import sys

WITHOUT = """
import sys
sys.modules['torchcodec'] = None
from mmembed.core.torchcodec import load_heic, register_image_ops
for f in (register_image_ops, load_heic):
    try: f()
    except ImportError as e: print(e)
"""


def run(program):
    return subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True).stdout


def test_a_host_without_torchcodec_is_told_what_to_install():
    told = run(WITHOUT).splitlines()
    assert len(told) == 2 and all('needs torchcodec: pip install torchcodec' in line for line in told)


def test_operators_are_registered_without_importing_torchcodec():
    assert run(
        'import sys\nfrom mmembed.core.torchcodec import register_image_ops\nregister_image_ops()\nimport torch\n'
        "print('torchcodec' in sys.modules, hasattr(torch.ops.torchcodec_ns, 'decode_jpeg'))"
    ).split() == ['False', 'True']
