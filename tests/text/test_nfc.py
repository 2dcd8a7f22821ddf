"""Composition where a starter joins the one before it and the one after it, as since Unicode 16: left to right."""
import functools
import itertools
import random
import unicodedata

import numpy as np
import pytest

from mmembed.core.packing import pack
from mmembed.exporters.graph.text import LoopedNfc
from mmembed.text.nfc import Nfc, nfc_rules
from mmembed.text.unicode import Utf8

from tests.helpers import FORMS, in_form

# Kirat Rai, Tulu-Tigalari and Gurung Khema: composite -> its two parts
PAIRS = {
    0x16d68: (0x16d67, 0x16d67), 0x16d69: (0x16d63, 0x16d67), 0x16d6a: (0x16d69, 0x16d67),
    0x113c5: (0x113c2, 0x113c2), 0x1138e: (0x1138b, 0x113c2), 0x16121: (0x1611e, 0x1611e), 0x16122: (0x1611e, 0x16129),
}


def parts(code): return [*parts(PAIRS[code][0]), PAIRS[code][1]] if code in PAIRS else [code]


@functools.cache
def rules():
    "Python's own, with the pairs above where its Unicode is older."
    r = nfc_rules(python=True)
    if unicodedata.normalize('NFC', '\U00016d67\U00016d67') == '\U00016d68': return r
    counts, images, touched, ends = r.counts.copy(), r.images, r.touched.copy(), r.counts.cumsum()
    for code in sorted(PAIRS, reverse=True):  # from behind, so that the places before stay what they are
        images = np.concatenate([images[:ends[code] - counts[code]], parts(code), images[ends[code]:]])
        counts[code] = len(parts(code))
        touched[[code, PAIRS[code][1]]] = True
    return r._replace(
        counts=counts, images=images, touched=touched,
        pairs=np.concatenate([r.pairs, [(*two, one) for one, two in PAIRS.items()]]),
    )


@functools.cache
def table(): return {(a, b): c for a, b, c in rules().pairs.tolist()}


def reference(text):
    "The Unicode standard's algorithm (§3.11), a character at a time."
    text = unicodedata.normalize('NFD', ''.join(chr(p) for c in text for p in parts(ord(c))))
    done, starter, before = [], None, 0
    for c in map(ord, text):
        rank = unicodedata.combining(chr(c))
        free = starter is not None and (before < rank or starter == len(done) - 1)
        if free and (whole := table().get((done[starter], c))) is not None:
            done[starter] = whole
            continue
        if rank == 0: starter = len(done)
        before = rank
        done.append(c)
    return ''.join(map(chr, done))


def texts():
    rng = random.Random(0)
    kirat = [chr(c) for c in (0x16d63, 0x16d67, 0x16d68, 0x16d69, 0x16d6a)] + ['e', '\u0301']
    odd = [chr(c) for code, two in PAIRS.items() for c in (code, *two)]
    odd += [*'ae\u0301\u0323\u0334', *'\u1112\u1161\u11ab각']
    return [''.join(t) for n in range(5) for t in itertools.product(kirat, repeat=n)] + [
        ''.join(rng.choices(odd, k=rng.randrange(2, 12))) for _ in range(3000)
    ]


@pytest.mark.parametrize('form', [*FORMS, 'looped'])
def test_starters_that_join_both_neighbours(form):
    made, some = Nfc(rules()), texts()
    assert made.chains
    if form == 'looped': made.__class__ = LoopedNfc  # the exported form
    (codes, offsets), source = in_form(made, 'eager' if form == 'looped' else form)(Utf8()(*pack(some))[0])
    got = [''.join(map(chr, codes[a:b])) for a, b in itertools.pairwise(offsets.tolist())]
    want = [reference(t) for t in some]
    assert [(t, g, w) for t, g, w in zip(some, got, want) if g != w][:5] == []
    if '\U00016d68' == unicodedata.normalize('NFC', '\U00016d67\U00016d67'):
        assert want == [unicodedata.normalize('NFC', t) for t in some]
    assert source.numel() == codes.numel()


def test_the_tables_of_before_take_the_same_steps():
    assert not Nfc(nfc_rules()).chains
    assert [reference(t) for t in ('cafe\u0301', '\u1112\u1161\u11ab', 'a\u0323\u0302')] == [
        unicodedata.normalize('NFC', t) for t in ('cafe\u0301', '\u1112\u1161\u11ab', 'a\u0323\u0302')
    ]
