"""Notebooks, library and README in step; notebooks clean; every notebook runs; no test decides by a clock."""
import ast
import filecmp
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def run(*args, cwd=ROOT, **env):
    done = subprocess.run(
        [str(a) for a in args], cwd=cwd, env={**os.environ, **env}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )
    assert done.returncode == 0, f'{args} exited {done.returncode}:\n{done.stdout[-4000:]}'
    return done.stdout


def differences(a, b):
    "Files that differ between two trees, or are in only one of them."
    skip = shutil.ignore_patterns('__pycache__', '*.pyc')
    found = []
    for top, dirs, files in os.walk(a):
        ignored = skip(top, dirs + files)
        dirs[:] = [d for d in dirs if d not in ignored]
        other = Path(b)/Path(top).relative_to(a)
        found += [str((Path(top)/f).relative_to(a)) for f in files if f not in ignored and
                  not ((other/f).is_file() and filecmp.cmp(Path(top)/f, other/f, shallow=False))]
    return found


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "The project, copied, with notebooks cleaned and exported anew."
    to = tmp_path_factory.mktemp('project')
    for folder in ('nbs', 'mmembed'):
        shutil.copytree(ROOT / folder, to / folder, ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('pyproject.toml', 'settings.ini'): shutil.copy(ROOT/name, to/name)
    run(BIN/'nbdev-clean', cwd=to)
    run(BIN/'nbdev-export', cwd=to)
    return to


def test_notebooks_are_clean(copy):
    assert differences(ROOT/'nbs', copy/'nbs') == [], 'run `make export`'


def test_library_is_in_step(copy):
    assert differences(ROOT / 'mmembed', copy / 'mmembed') + differences(copy / 'mmembed', ROOT / 'mmembed') == [], (
        'run `make export`'
    )


def test_every_module_has_a_notebook():
    modules = [p for p in (ROOT/'mmembed').rglob('*.py') if p.name not in ('__init__.py', '__main__.py', '_modidx.py')]
    assert modules
    for p in modules:
        head = next(line for line in p.read_text().splitlines() if 'File to edit' in line)
        notebook = (p.parent/head.split('File to edit: ')[1].rstrip('.')).resolve()
        assert notebook.is_file() and notebook.stem.split('_', 1)[1] == p.stem, f'{p} comes from {notebook}'


def test_readme_is_in_step():
    run(sys.executable, ROOT/'tools'/'readme.py', '--check')


FOLDERS = sorted(
    p.relative_to(ROOT / 'nbs').as_posix() for p in (ROOT / 'nbs').rglob('*') if p.is_dir() and any(p.glob('*.ipynb'))
) + ['']
# in one process, which imports everything once
TOGETHER = [
    ['core', 'vision', 'data', 'models'],
    ['exporters/graph', 'exporters/onnx', 'exporters/verify'],
    ['cli', 'demo', ''],
]
ROOMS = [*TOGETHER, *([f] for f in FOLDERS if f not in sum(TOGETHER, []))]


@pytest.mark.parametrize('rooms', ROOMS, ids=['+'.join(f or 'top' for f in r) for r in ROOMS])
def test_notebooks_run(rooms):
    names = '|'.join(f'{f}/' if f else '' for f in rooms)
    done = run(BIN/'nbdev-test', ROOT/'nbs', '--path-re', f'/nbs/({names})[^/]*$', '--n-workers', '0', '--timing')
    ran = sorted(line.split(':')[0] for line in done.splitlines() if line.endswith(' secs'))
    assert ran == sorted(p.name for f in rooms for p in (ROOT/'nbs'/f).glob('*.ipynb'))


def test_settings_keys_are_known():
    from mmembed.core.settings import Settings, _read_settings
    assert set(_read_settings(ROOT/'settings.ini')) == set(Settings._fields)


def test_no_machine_paths():
    "No notebook, module or document names a folder of the machine it was written on."
    tracked = run('git', 'ls-files').split() if (ROOT/'.git').exists() else []
    folders = [f'{ROOT}/', f'{Path.home()}/', '/root/', '/work/', 'lib/python3']
    for name in set(tracked) - {'tests/repo/test_project.py'}:
        text = (ROOT/name).read_bytes()
        for folder in folders: assert folder.encode() not in text, f'{name} contains {folder}'


CLOCKS = {'monotonic', 'perf_counter', 'time', 'process_time'}
ASKS = {'get', 'post', 'put', 'delete', 'options', 'head', 'request', 'stream', 'Client', 'AsyncClient'}


def clocks(path):
    "Where a test reads a clock, or ends after a second or more instead of with the event that it waits for."
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, (ast.Attribute, ast.Name)): continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
        owner = getattr(getattr(node.func, 'value', None), 'id', '')
        if owner == 'time' and name in CLOCKS: yield node.lineno, f'time.{name}()'
        if owner == 'httpx2' and name in ASKS and not any(k.arg in ('timeout', None) for k in node.keywords):
            yield node.lineno, f'httpx2.{name}() waits for five seconds'
        limits = [k.value for k in node.keywords if k.arg in ('timeout', 'timeout_s')] + (
            node.args[:1] if name in ('wait', 'result', 'join', 'close') else []
        )
        for limit in limits:  # under a second it is there to run out
            if isinstance(limit, ast.Constant) and isinstance(limit.value, (int, float)) and limit.value >= 1:
                yield node.lineno, f'{name}({limit.value})'


def test_no_test_decides_by_a_clock(tmp_path):
    "A machine may be slow or busy: waits end with the event (`until` and `HANG` in tests/helpers.py)."
    (tmp_path / 't.py').write_text(
        'import time\nend = time.monotonic() + 40\np.wait(30)\nget(url, timeout=30)\nget(url, '
        'timeout=.01)\np.wait(HANG)\nhttpx2.get(url)\nhttpx2.get(url, timeout=HANG)\n'
    )
    assert sorted(line for line, _ in clocks(tmp_path/'t.py')) == [2, 3, 4, 7]
    found = {
        (str(p.relative_to(ROOT)), *c)
        for p in (ROOT / 'tests').rglob('*.py')
        if p.name != 'helpers.py'
        for c in clocks(p)
    }
    assert not found


@pytest.fixture(scope='module')
def mutants():
    "tools/mutants.py as a module."
    spec = importlib.util.spec_from_file_location('mutants', ROOT/'tools'/'mutants.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_mutants_fits_the_code(mutants):
    "Every old text occurs once, and the tests that must notice its change exist; the whole is run by hand."
    assert mutants.faults(mutants.TABLE) == []
    rooms = {p.name for p in (ROOT/'mmembed').iterdir() if (p/'__init__.py').is_file()}
    assert len(mutants.TABLE) >= 60 and rooms <= {m.file.split('/')[1] for m in mutants.TABLE}


def test_a_mutant_that_no_test_notices_is_told(mutants, tmp_path, capsys):
    for folder in ('mmembed', 'tests'): (tmp_path/folder).mkdir()
    (tmp_path/'mmembed'/'sums.py').write_text('def add(a, b): return a + b\n\ndef less(a, b): return a - b\n')
    (tmp_path / 'tests' / 'test_sums.py').write_text(
        'import sys\nfrom mmembed.sums import add, less\n\ndef test_add(): assert add(2, 3) == 5\n\n'
        'def test_less(): assert less(2, 0) == 2\n\ndef test_broken(): assert add(1, 1) == 3\n'
    )

    def row(name, old, new, test):
        return mutants.Mutant(name, 'mmembed/sums.py', old, new, f'tests/test_sums.py::{test}')
    good, idle = row('sums/product', 'a + b', 'a * b', 'test_add'), row('sums/sign', 'a - b', 'a + b', 'test_less')
    assert mutants.main(['--only', 'sums/product'], [good, idle], tmp_path) == 0
    assert mutants.main([], [good, idle, row('sums/other', 'a + b', 'b', 'test_broken')], tmp_path) == 1
    said = capsys.readouterr().out
    assert '1 of 3 changes were noticed' in said and 'sums/sign: survived' in said
    assert 'sums/other: not judged: fails or is skipped without it: tests/test_sums.py::test_broken' in said
    assert (tmp_path / 'mmembed' / 'sums.py').read_text().count('a + b') == 1 and mutants.main(
        ['--only', 'none'], [good], tmp_path
    ) == 2
    for wrong, why in (
        (row('sums/gone', 'a ** b', 'a', 'test_add'), 'occurs 0 times'),
        (row('sums/both', '(a, b)', '(b, a)', 'test_add'), 'occurs 2 times'),
        (row('sums/same', 'a + b', 'a + b', 'test_add'), 'changes nothing'),
        (row('sums/odd', 'a + b', 'a +', 'test_add'), 'is no Python'),
        (row('sums/test', 'a + b', 'a', 'test_none'), 'no test tests/test_sums.py::test_none'),
    ):
        assert mutants.main([], [wrong], tmp_path) == 2 and why in capsys.readouterr().err
