import json

import pytest
import torch

from mmembed.runtime.benchmark import in_turns, measure, benchmark_items
from mmembed.cli.main import main
from mmembed.exporters.verify import samples as cases

from tests.exporters import tiny


def test_bench_from_the_shell(tmp_path, capsys):
    "A folder of the user's own, as JSON; the same figures are a table without --json."
    (tmp_path/'a.png').write_bytes(cases.images()['RGB.png'])
    (tmp_path/'captions.txt').write_text('one\ntwo words\n')
    assert (
        main(['bench', str(tiny.artifact()), '--data', str(tmp_path), '--batches', '1,3', '--rounds', '1', '--json'])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert [(r['kind'], r['threads'], r['batch']) for r in found['rows']] == [
        (k, 1, b) for b in (1, 3) for k in ('text', 'image')
    ]
    assert all(
        r['per_second'] > 0 and r['ms'] == pytest.approx(1e3 * r['batch'] / r['per_second']) for r in found['rows']
    )
    assert (
        found['cold']['import torch'] > 0 and found['cold']['first image'] > 0 and found['machine']['device'] == 'cpu'
    )
    for args, message in (
        (['--batches', '0'], 'batches must be at least 1, got 0'),
        (['--threads', 'x'], "threads must be whole numbers"),
        (['--data', 'no'], 'holds no image files'),
    ):
        assert main(['bench', str(tiny.artifact()), *args]) == 1 and message in capsys.readouterr().err


def test_threads_are_left_as_they_were():
    before = torch.get_num_threads()
    found = measure(tiny.pair_artifact(), batches=[2], threads=[1, 2], rounds=1, cold=False)
    assert torch.get_num_threads() == before and [(r['kind'], r['threads']) for r in found['rows']] == [
        ('pair', 1),
        ('pair', 2),
    ]


def test_contestants_take_turns():
    order = []
    in_turns({'a': lambda: order.append('a'), 'b': lambda: order.append('b')}, 2)
    assert order == ['a', 'b'] * 3 and len(benchmark_items(None, 20)[1]) == 20
