"""Files are written whole or not at all, and one process at a time writes to a folder."""
import errno
import os
import subprocess
import sys
import threading

import pytest

from mmembed.core.files import draft, write_once, write_whole, writing


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path/'a.txt'
    write_whole(path, b'old')
    with pytest.raises(KeyboardInterrupt), draft(path) as half:
        half.write_bytes(b'ne')
        raise KeyboardInterrupt
    assert path.read_bytes() == b'old' and os.listdir(tmp_path) == ['a.txt']


def test_an_error_names_the_file_that_was_not_written(tmp_path):
    with pytest.raises(OSError, match='what was written before is kept') as e, draft(tmp_path/'a.txt'):
        raise OSError(errno.ENOSPC, 'No space left on device')
    assert e.value.filename == str(tmp_path/'a.txt') and e.value.errno == errno.ENOSPC
    with pytest.raises(FileNotFoundError) as e, draft(tmp_path/'a.txt'): (tmp_path/'other').read_bytes()
    assert e.value.filename == str(tmp_path/'other')  # it was another file that failed


def test_a_draft_may_need_an_ending(tmp_path):
    with draft(tmp_path/'a.pt2', '.pt2') as temporary:
        assert temporary.suffix == '.pt2'
        temporary.write_bytes(b'x')
    assert os.listdir(tmp_path) == ['a.pt2']


def test_the_first_of_many_writers_wins(tmp_path):
    path, got, start = tmp_path/'note', [], threading.Barrier(8)
    def write(i):
        start.wait()
        got.append(write_once(path, str(i).encode()))
    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(set(got)) == 1 and path.read_bytes() == got[0] and os.listdir(tmp_path) == ['note']


HOLD = """
import sys
from pathlib import Path
from mmembed.core.files import writing
with writing(Path(sys.argv[1])):
    print('held', flush=True)
    sys.stdin.readline()
"""


def test_one_process_at_a_time(tmp_path):
    other = subprocess.Popen(
        [sys.executable, '-c', HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == 'held\n'
    with pytest.raises(ValueError, match=f'another process is writing to {tmp_path}'), writing(tmp_path): pass
    threading.Timer(.3, other.kill).start()  # the lock goes with its process
    with writing(tmp_path, wait=True): assert other.wait() < 0
    with writing(tmp_path): pass
