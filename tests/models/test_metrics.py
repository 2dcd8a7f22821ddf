"Recall and ranks against sorting by hand."
import math
import random

import pytest
import torch

from mmembed.models.metrics import correct_images, both_ways, mean_average_precision, ranks, recall_at_k


def by_hand(row, right):
    "The best right item's place when every wrong item of the same score goes first."
    order = sorted(range(len(row)), key=lambda j: (-row[j], right[j]))
    wrong_before, best = 0, None
    for j in order:
        if right[j]: best = wrong_before + 1; break
        wrong_before += 1
    return best


@pytest.mark.parametrize('levels', [2, 5, 10**6])  # few levels: many ties
def test_ranks_by_hand(levels):
    rng = random.Random(levels)
    for _ in range(60):
        q, n = rng.randint(1, 12), rng.randint(1, 12)
        scores = [[float(rng.randrange(levels)) for _ in range(n)] for _ in range(q)]
        right = [[rng.random() < 0.3 for _ in range(n)] for _ in range(q)]
        for r in right: r[rng.randrange(n)] = True
        got = ranks(torch.tensor(scores), torch.tensor(right))
        assert got.tolist() == [by_hand(s, r) for s, r in zip(scores, right)]


def test_recall_median_and_rows():
    torch.manual_seed(0)
    scores, relevant = torch.randn(40, 30), torch.rand(40, 30) < 0.1
    relevant[:, 0] = True
    r = ranks(scores, relevant).tolist()
    got = recall_at_k(scores, relevant, ks=(1, 3, 10))
    assert got.at == {k: pytest.approx(sum(x <= k for x in r)/40) for k in (1, 3, 10)}
    assert got.median_rank == pytest.approx(torch.tensor(r).double().quantile(0.5).item()) and (
        got.queries,
        got.gallery,
    ) == (40, 30)
    rows = torch.arange(40) % 3 == 0
    part = recall_at_k(scores, relevant, rows=rows)
    assert (
        part.at[1] == pytest.approx(sum(x <= 1 for x, k in zip(r, rows.tolist()) if k) / int(rows.sum()))
        and part.gallery == 30
    )


def test_chance_is_what_guessing_gives():
    torch.manual_seed(0)
    relevant = torch.zeros(20000, 12, dtype=torch.bool)
    relevant[:, :3] = True
    got = recall_at_k(torch.rand(20000, 12), relevant, ks=(1, 5, 10, 50))
    for k, v in got.chance.items():
        exact = 1 - math.comb(9, k)/math.comb(12, k) if k <= 12 else 1.
        assert v == pytest.approx(exact) and got.at[k] == pytest.approx(v, abs=0.02)


@pytest.mark.parametrize('value', [1., 0., float('nan'), float('inf'), -float('inf')])
def test_a_collapsed_model_finds_nothing(value):
    assert recall_at_k(torch.full((30, 30), value)).at == {1: 0, 5: 0, 10: 0}


def test_nan_never_helps():
    scores = torch.tensor([[0.9, float('nan'), 0.1], [float('nan'), 0.5, 0.1]])
    assert ranks(scores).tolist() == [2, 2]


def test_both_ways():
    torch.manual_seed(0)
    text, image = torch.randn(25, 8), torch.randn(25, 8)
    got = both_ways(text, image)
    assert got['text_to_image'] == recall_at_k(text @ image.T) and got['image_to_text'] == recall_at_k(image @ text.T)
    group = torch.arange(25) // 2
    relevant = group[:, None] == group[None, :]
    assert both_ways(text, image, relevant)['image_to_text'].at[1] >= got['image_to_text'].at[1]


def average_precision(row, right):
    "Over the places of the right items, wrong ones of the same score going first."
    order = sorted(range(len(row)), key=lambda j: (-row[j], right[j]))
    hits, total = 0, 0.
    for place, j in enumerate(order, 1):
        if right[j]: hits += 1; total += hits/place
    return total/hits


@pytest.mark.parametrize('levels', [3, 10**6])
def test_several_captions_by_hand(levels):
    "Captions and pictures that occur several times: recall and average precision against loops over the rows."
    rng = random.Random(levels)
    for _ in range(20):
        rows = rng.randint(2, 14)
        captions, pictures = ([rng.randrange(n) for _ in range(rows)] for n in (rng.randint(1, 14), rng.randint(1, 8)))
        right = correct_images(captions, pictures)
        shown = list(dict.fromkeys(pictures))
        said = list(dict.fromkeys(captions))
        for keys, different, of, first in (
            (pictures, shown, right.image, right.first_image),
            (captions, said, right.text, right.first_text),
        ):
            assert first.tolist() == [keys.index(k) for k in different] and [different[i] for i in of.tolist()] == keys
        given = set(zip(captions, pictures))
        by_text = [[(c, p) in given for p in shown] for c in said]
        assert right.relevant.tolist() == by_text
        text, image = torch.eye(len(said)), torch.tensor([[float(rng.randrange(levels)) for _ in said] for _ in shown])
        scores, got = image.T.tolist(), both_ways(text, image, right.relevant, ks=(1, 3))
        by_image = [list(x) for x in zip(*by_text)]
        for way, s, r in (('text_to_image', scores, by_text), ('image_to_text', image.tolist(), by_image)):
            places = [by_hand(a, b) for a, b in zip(s, r)]
            assert got[way].at == {k: pytest.approx(sum(x <= k for x in places)/len(places)) for k in (1, 3)}
            assert (got[way].queries, got[way].gallery) == (len(s), len(s[0]))
            want = sum(average_precision(a, b) for a, b in zip(s, r))/len(s)
            assert mean_average_precision(torch.tensor(s), torch.tensor(r)) == pytest.approx(want)


def test_mistakes():
    with pytest.raises(ValueError, match='got 2 captions and 3 pictures'): correct_images(['a', 'b'], [1, 2, 3])
    for f, message in [
        (lambda: ranks(torch.randn(3, 2)), '3 queries need as many items, got 2'),
        (lambda: ranks(torch.randn(2, 2), torch.ones(3, 2).bool()), r'relevant is \(3, 2\), scores \(2, 2\)'),
        (lambda: ranks(torch.randn(1, 2), torch.zeros(1, 2).bool()), 'query 0 has no relevant item'),
        (lambda: recall_at_k(torch.randn(0, 2)), 'no queries'),
    ]:
        with pytest.raises(ValueError, match=message): f()
