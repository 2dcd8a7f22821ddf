"The contrastive loss against formulas written out."
import math

import pytest
import torch

from mmembed.core import Tokens
from mmembed.models.losses import info_nce, same_text


def written_out(logits, share):
    "Mean over rows of −Σ target · log softmax, both ways, in plain Python floats."
    total, n = 0., len(logits)
    for m, s in ((logits.tolist(), share.tolist()), (logits.T.tolist(), share.T.tolist())):
        for row, match in zip(m, s):
            z = math.log(sum(math.exp(v - max(row)) for v in row)) + max(row)
            total += sum(z - v for v, k in zip(row, match) if k) / sum(match)
    return total / (2*n)


@pytest.mark.parametrize('n', [1, 2, 7, 33])
@pytest.mark.parametrize('scale', [1., 30.])
def test_as_written_out(n, scale):
    torch.manual_seed(n)
    logits = scale * torch.randn(n, n, dtype=torch.float64)
    assert float(info_nce(logits)) == pytest.approx(written_out(logits, torch.eye(n)), abs=1e-9)
    group = torch.randint(0, max(1, n//2), (n,))
    same = group[:, None] == group[None, :]
    assert float(info_nce(logits, same)) == pytest.approx(written_out(logits, same), abs=1e-9)


def test_same_as_open_clip():
    from open_clip.loss import ClipLoss
    torch.manual_seed(0)
    t, i = (torch.nn.functional.normalize(torch.randn(16, 8), dim=1) for _ in range(2))
    assert torch.allclose(info_nce(20 * t @ i.T), ClipLoss()(i, t, torch.tensor(20.)), atol=1e-6)


def test_gradient_is_correct():
    torch.manual_seed(0)
    logits = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    same = torch.eye(5, dtype=torch.bool)
    same[0, 3] = same[3, 0] = True
    assert torch.autograd.gradcheck(lambda x: info_nce(x, same), logits)


def test_same_text_ignores_what_stands_in_padding():
    ids = torch.tensor([[5, 6, 0, 0], [5, 6, 7, 0], [5, 6, 9, 9], [5, 6, 7, 8]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    assert same_text(Tokens(ids, mask)).int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
