"One place switches what TorchScript's executor inlines, and puts it back."
import pytest
import torch

from mmembed.core.threads import steady
from mmembed.core.torchscript import frozen, inlining, quietly

switch = torch._C._get_graph_executor_optimize


@pytest.mark.parametrize('before', [True, False])
@pytest.mark.parametrize('block, inside', [(lambda: inlining(True), True), (lambda: inlining(False), False),
                                           (steady, False)])
def test_the_switch_is_put_back(before, block, inside):
    "After an error, too."
    with inlining(before):
        with block(): assert switch() == inside
        assert switch() == before
        with pytest.raises(ZeroDivisionError), block(): raise ZeroDivisionError
        assert switch() == before


def test_blocks_lie_in_each_other():
    with inlining(False):
        with inlining(True), steady(): assert not switch()
        assert not switch()


def test_freezing_leaves_the_switch_alone():
    scripted = quietly(torch.jit.script, torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU()).eval())
    for before in True, False:
        with inlining(before):
            assert torch.equal(frozen(scripted)(torch.ones(1, 2)), scripted(torch.ones(1, 2)))
            assert switch() == before
