"One table has the kinds of answer that hosts are compared in."
import importlib.util

import torch

from mmembed.core.packing import pack
from mmembed.exporters.reference import ANSWERS, Eager
from mmembed.exporters.steps import read_classes
from mmembed.exporters.verify import hosts
from mmembed.exporters.verify.hosts import answers

from tests.exporters import tiny

ASKED = dict(
    texts=[pack([t])[0] for t in ('a small red circle', 'blue', '')],
    images=[torch.zeros(3, 50, 60, dtype=torch.uint8), torch.zeros(9, dtype=torch.uint8)],
)


def asked(sizes):
    "The batch sizes in which each kind was answered, by a model with labels and by one of pairs."
    found = {}
    for module in Eager(tiny.model(), classes=read_classes(['circle', 'square'])), Eager(tiny.pair_model()):
        for kind, size in answers(module, **ASKED, sizes=sizes): found.setdefault(kind, set()).add(size)
    return found


def test_the_table_has_every_kind_of_answer():
    assert asked([3]).keys() == ANSWERS.keys()


def test_what_is_batched_is_asked_in_every_size():
    for kind, sizes in asked([0, 2, 3]).items(): assert (sizes == {0, 2, 3}) == ANSWERS[kind].batched, kind


def test_what_the_command_line_host_skips_follows_the_table(monkeypatch):
    "Of a table in which it prints labels too, it skips all but these."
    monkeypatch.setitem(ANSWERS, 'labels', ANSWERS['labels']._replace(cpp=True))
    spec = importlib.util.spec_from_file_location('mmembed.exporters.verify.hosts_again', hosts.__file__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert set(hosts.CPP_SKIPS) - set(again.CPP_SKIPS) == {'labels'}
    assert set(again.CPP_SKIPS) == {kind for kind, answer in ANSWERS.items() if not answer.cpp}
