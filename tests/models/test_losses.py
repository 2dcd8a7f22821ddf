"The contrastive loss against formulas written out."
import math

import pytest
import torch

from mmembed.core.types import Tokens
from mmembed.core.types import Embeddings
from mmembed.models.losses import (
    InfoNCE, SigmoidLoss, distill, gather, harden, info_nce, same_rows, same_text, sigmoid_loss,
)


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


def test_sigmoid_as_written_out_and_as_open_clip():
    from open_clip.loss import SigLipLoss
    torch.manual_seed(0)
    t, i = (torch.nn.functional.normalize(torch.randn(9, 8), dim=1) for _ in range(2))
    scale, bias = torch.tensor(7.), torch.tensor(-3.)
    logits = scale * t @ i.T + bias
    want = (
        sum(
            math.log1p(math.exp(-v if a == b else v))
            for a, row in enumerate(logits.tolist())
            for b, v in enumerate(row)
        )
        / 9
    )
    got = SigmoidLoss()(Embeddings(t, i, scale), None, bias)
    assert float(got) == pytest.approx(want, rel=1e-5) and torch.allclose(
        got, SigLipLoss()(i, t, scale, bias), atol=1e-6
    )
    same = torch.eye(9).bool()
    same[2, 5] = same[5, 2] = True
    assert float(sigmoid_loss(logits, same) - got) == pytest.approx(float(-logits[2, 5] - logits[5, 2]) / 9, abs=1e-5)


def test_hard_negatives_weigh_as_said():
    torch.manual_seed(0)
    logits = torch.randn(4, 6)
    match = torch.nn.functional.one_hot(torch.arange(4), 6).bool()
    weight = (harden(logits, match, 0.7) - logits).exp()
    assert torch.allclose(weight[match], torch.ones(4))
    assert torch.allclose(weight.masked_fill(match, 0).sum(1) / 5, torch.ones(4), atol=1e-5)
    rows = logits.masked_fill(match, -torch.inf).argsort(1)[:, 1:]
    assert (weight.gather(1, rows).diff(dim=1) > 0).all()
    assert harden(torch.zeros(1, 1), torch.ones(1, 1).bool(), 1.).equal(torch.zeros(1, 1))


def test_distillation_is_a_divergence():
    torch.manual_seed(0)
    a, b = torch.randn(5, 5, requires_grad=True), torch.randn(5, 5, requires_grad=True)
    p, q = b.softmax(1), a.softmax(1)
    rows = (p * (p / q).log()).sum(1).mean()
    p, q = b.T.softmax(1), a.T.softmax(1)
    columns = (p * (p / q).log()).sum(1).mean()
    assert torch.allclose(distill(a, b), (rows + columns) / 2, atol=1e-6)
    distill(a, b).backward()
    assert a.grad.abs().sum() > 0 and b.grad is None


def shared_batch():
    "A batch of 12 with two equal captions that stand in different processes, and a linear tower a side."
    from mmembed.core.types import Tokens
    torch.manual_seed(3)
    ids = torch.arange(1, 13)[:, None].repeat(1, 3)
    ids[9] = ids[2]
    towers = torch.nn.ModuleList([torch.nn.Linear(7, 5), torch.nn.Linear(4, 5)]).double()
    return towers, torch.randn(12, 7).double(), torch.randn(12, 4).double(), Tokens(ids, torch.ones_like(ids))


LOSSES = {
    'infonce': lambda: InfoNCE(),
    'hard': lambda: InfoNCE(hard=0.5),
    'apart': lambda: InfoNCE(share_targets=False),
    'sigmoid': lambda: SigmoidLoss(),
}
SPLITS = [(6, 6), (7, 5), (1, 11), (12, 0), (0, 12)]  # rows of each process: what could be read


def loss_and_gradients(name, rows, pictures=None):
    "Of a process that has these rows of the batch, perhaps none."
    towers, texts, images, tokens = shared_batch()
    a, b = (torch.nn.functional.normalize(t(x[rows]), dim=1) for t, x in zip(towers, (texts, images)))
    length = 0 if rows.start == rows.stop else None if rows.start == 0 else 3  # a batch is as wide as its longest text
    ids, mask = (x[rows, :length] for x in tokens)
    loss = LOSSES[name]()(
        Embeddings(a, b, torch.tensor(9.0).double()),
        Tokens(ids, mask),
        torch.tensor(-4.0).double(),
        pictures[rows] if pictures is not None else None,
    )
    loss.backward()
    return [loss.detach(), *(p.grad for p in towers.parameters())]


def one_of_two(rank, folder):
    import os
    import torch.distributed as dist
    os.environ.update(MASTER_ADDR='127.0.0.1', GLOO_SOCKET_IFNAME='lo')
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    result = {}
    for split in SPLITS:
        rows = slice(0, split[0]) if rank == 0 else slice(split[0], 12)
        for name, pictures in [(name, None) for name in LOSSES] + [('infonce', PICTURES)]:
            result[split, name, pictures is None] = loss_and_gradients(name, rows, pictures)
            for x in result[split, name, pictures is None]:
                dist.all_reduce(x)
                x /= 2  # as DistributedDataParallel averages
        x = torch.arange(24.).double().view(12, 2)[rows].requires_grad_()
        everything = gather(x)
        (everything * torch.arange(1., 13).double()[:, None] * (rank + 1)).sum().backward()
        result[split, 'gather', rank] = [everything.detach(), x.grad]
    x = torch.zeros(0, 2).double().requires_grad_()
    result['none'] = [
        InfoNCE()(
            Embeddings(x, x, torch.tensor(9.0).double()), Tokens(torch.zeros(0, 0).long(), torch.zeros(0, 0).long())
        ).detach(),
        gather(x).detach(),
    ]
    torch.save(result, f'{folder}/result-{rank}.pt')
    dist.destroy_process_group()


PICTURES = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 1, 9, 10, 0])


def test_two_processes_are_one(tmp_path):
    """Value and gradient of the joined batch, though images could not be read and left the processes unequal
    batches, or one of them none."""
    import torch.multiprocessing as mp
    mp.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    got, other = (torch.load(tmp_path/f'result-{rank}.pt') for rank in (0, 1))
    for split in SPLITS:
        for name, pictures in [(name, None) for name in LOSSES] + [('infonce', PICTURES)]:
            for a, b in zip(
                got[split, name, pictures is None], loss_and_gradients(name, slice(0, 12), pictures), strict=True
            ):
                assert torch.allclose(a, b, atol=1e-12), (split, name)
        whole = torch.arange(24.).double().view(12, 2)
        for rank, result in enumerate((got, other)):
            rows, (everything, grad) = (
                slice(0, split[0]) if rank == 0 else slice(split[0], 12),
                result[split, 'gather', rank],
            )
            # what both want of them
            assert everything.equal(whole) and grad.equal(
                (torch.arange(1.0, 13).double()[:, None] * 3).expand(12, 2)[rows]
            )
    assert got['none'][0] == 0 and got['none'][1].shape == (0, 2)


def test_captions_of_one_picture_share_it():
    "Both losses, with pictures that occur twice in the batch, against the formula with the joined matches."
    torch.manual_seed(0)
    text, image = (torch.nn.functional.normalize(torch.randn(6, 8), dim=1) for _ in range(2))
    ids = torch.tensor([[1], [2], [1], [3], [4], [5]])
    tokens, pictures = Tokens(ids, torch.ones_like(ids)), torch.tensor([7, 8, 9, 8, 5, 5])
    want = torch.eye(6).bool()
    for a, b in ((0, 2), (1, 3), (4, 5)): want[a, b] = want[b, a] = True
    assert same_rows(tokens, pictures).equal(want)
    out = Embeddings(text, image, torch.tensor(10.))
    assert float(InfoNCE()(out, tokens, None, pictures)) == pytest.approx(
        written_out(10 * text @ image.T, want), abs=1e-5
    )
    assert SigmoidLoss()(out, tokens, torch.tensor(-3.), pictures).equal(sigmoid_loss(10 * text @ image.T - 3, want))
    assert InfoNCE(share_targets=False)(out, tokens, None, pictures).equal(info_nce(10 * text @ image.T))
