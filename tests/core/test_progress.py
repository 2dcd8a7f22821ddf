"""One progress bar: lines where standard error is not a terminal, and the items as they were."""
import subprocess
import sys
import time

import pytest

from mmembed.core.progress import duration, progress_bar, watched


def test_lines_of_progress(capsys):
    with progress_bar('rows', every=0) as show:
        show(0, 100)
        time.sleep(.02)
        show(50, 100)
        show(60, None)
    out, err = capsys.readouterr()
    first, last = err.splitlines()
    assert out == '' and first.startswith('rows: 50 of 100 rows, ') and first.endswith(' left')
    assert last.startswith('rows: 60 rows, ') and last.endswith(' a second')


@pytest.mark.parametrize('progress', [False, True, 'counting'])
def test_watched_items_are_the_items(progress, capsys):
    assert list(watched([3, 1, 2], progress)) == [3, 1, 2] and list(watched(iter('ab'), progress)) == ['a', 'b']
    assert capsys.readouterr().out == ''


def test_a_consumer_may_stop_early():
    items = watched(iter(range(10)), True)
    assert next(items) == 0
    items.close()


@pytest.mark.parametrize('seconds, says', [(5.4, '5 s'), (200, '3 min'), (4000, '1 h 6 min'), (1e6, '11.6 days')])
def test_duration(seconds, says): assert duration(seconds) == says


@pytest.mark.parametrize('module', ['progress', 'errors', 'markers'])
def test_a_client_shows_progress_without_torch(module):
    program = f"import sys, mmembed.core.{module}\nprint('torch' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', program], capture_output=True, text=True).stdout.strip() == 'False'
