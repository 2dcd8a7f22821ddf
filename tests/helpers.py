"""What every room's tests share: one body run in every form of a module, and the optional real data."""
import io
import os
from pathlib import Path

import pytest
import torch
from torch._jit_internal import FunctionModifiers

from mmembed.core import quietly

FORMS = ['eager', 'scripted', 'frozen', 'loaded']


def in_form(module, form):
    "`module` as it is, scripted, saved and loaded again; or frozen, then saved and loaded, as an artifact is."
    module = module.eval()
    if form == 'eager': return module
    scripted = quietly(torch.jit.script, module)
    if form == 'scripted': return scripted
    if form == 'frozen':
        keep = [m for m in dir(type(module)) if getattr(getattr(type(module), m), '_torchscript_modifier', None) is FunctionModifiers.EXPORT]
        scripted = quietly(torch.jit.freeze, scripted, preserved_attrs=keep)
    buffer = io.BytesIO()
    quietly(torch.jit.save, scripted, buffer)
    buffer.seek(0)
    return quietly(torch.jit.load, buffer)


def data_path(*parts):
    "A path in the real data (`MMEMBED_DATA`, default ../shared/data beside the checkout); skips the test where it is absent."
    root = Path(os.environ.get('MMEMBED_DATA') or Path(__file__).resolve().parents[2]/'shared'/'data')
    path = root.joinpath(*parts)
    if not path.exists(): pytest.skip(f'{path.relative_to(root)} not found in {root}: set MMEMBED_DATA to run this test')
    return path
