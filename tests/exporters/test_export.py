"The signature of `export` is its documentation: every option, in groups, with a comment, and nothing half-written."
import inspect

import pytest
from fastcore.docments import docments
from torch import nn

import mmembed as mm
from mmembed.exporters.verify.report import VerifyError

from tests.exporters import tiny

GROUPS = {
    'content': 'decode labels templates top_k threshold training',
    'where': 'onnx onnx_files cpu graphs',
    'numbers': 'precision quantize calibrate fold trim deterministic dim output attention portable',
    'steps': 'before_text before_image after',
    'checks': 'texts images samples fresh cpp device',
}


def test_the_signature_shows_every_option_in_groups():
    signature = inspect.signature(mm.export)
    options = ' '.join(['model path', *GROUPS.values()]).split()
    assert inspect.isfunction(mm.export) and [*signature.parameters] == options
    kinds = {p.kind for name, p in signature.parameters.items() if name not in ('model', 'path')}
    assert kinds == {inspect.Parameter.KEYWORD_ONLY}  # an order that readers like may change


def test_every_option_has_a_comment_of_its_own():
    told = docments(mm.export)
    told.pop('return')
    assert [name for name, comment in told.items() if not comment] == []
    assert len({*told.values()}) == len(told) and not any('as in' in comment for comment in told.values())


def test_an_option_by_position_is_refused(tmp_path):
    with pytest.raises(TypeError, match='takes 2 positional arguments but 3 were given'):
        mm.export(tiny.model(), tmp_path/'m.pt', False)


@pytest.mark.parametrize('kept', [True, False])
def test_a_failing_export_leaves_the_folder_as_it_was(tmp_path, kept):
    "The old file, or none; no draft, no folder of ONNX files."
    if kept: (tmp_path/'m.pt').write_bytes(b'of before')
    class Noisy(nn.Module):
        def forward(self, x): return x + nn.functional.dropout(x, 0.5, True)
    with pytest.raises(VerifyError, match='m.pt fails verification'):
        mm.export(tiny.model(), tmp_path/'m.pt', after=Noisy(), fresh=False, cpp=False)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [('m.pt', b'of before')] * kept
