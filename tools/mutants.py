"""Changes of the code that tests must notice: `python tools/mutants.py [--only NAME ...] [--list]`.

Each is made alone in a copy of the project; of the tests that are named with it at least one has to fail then. The exit status is 1 when a
change survives, or cannot be judged because its tests fail or are skipped without it."""
import argparse
import ast
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 900  # seconds: a change that makes its tests hang is noticed, too
LEFT_OUT = shutil.ignore_patterns('.*', '__pycache__', '*.egg-info', 'build', 'dist', 'runs', 'artifacts', 'node_modules')


class Mutant(NamedTuple):
    "A change of one file"
    name: str   # ROOM/what is changed
    file: str   # below the project
    old: str    # occurs once in it
    new: str
    tests: str  # FILE::FUNCTION, with blanks between several: the quickest that must notice


TABLE = [Mutant(*row) for row in (
    # ---- training
    ('train/decay of the average', 'mmembed/shells.py',
     'EMAWeightAveraging(decay=self.hparams.ema)', 'EMAWeightAveraging(decay=0.999)',
     'tests/test_train.py::test_the_average_of_the_weights_has_its_decay'),
    ('train/best is the least', 'mmembed/train.py',
     "monitor=self.monitor, mode='max', enable", "monitor=self.monitor, mode='min', enable",
     'tests/test_train.py::test_the_best_checkpoint_has_the_highest_figure'),
    ('train/patience with the least', 'mmembed/train.py',
     "EarlyStopping(self.monitor, mode='max'", "EarlyStopping(self.monitor, mode='min'",
     'tests/test_train.py::test_the_best_checkpoint_has_the_highest_figure'),
    ('train/layer_decay ignored', 'mmembed/shells.py',
     'h.lr, h.weight_decay, h.layer_decay)', 'h.lr, h.weight_decay)',
     'tests/test_train.py::test_layers_learn_at_the_rates_of_the_configuration'),
    # ---- export
    ('export/mean of the differences', 'mmembed/export/verify.py',
     'd = float((w.double() - g.double()).abs().max())', 'd = float((w.double() - g.double()).abs().mean())',
     'tests/export/test_verify.py::test_the_difference_is_the_largest_and_not_the_mean'),
    # ---- running a file
    ('runtime/order of equal scores', 'mmembed/results.py',
     'descending=True, stable=True)', 'descending=True)',
     'tests/test_runtime.py::test_equal_scores_keep_the_order_of_the_candidates'),
    # ---- jobs
    ('jobs/fsync of the folder', 'mmembed/tables.py',
     'try: os.fsync(handle)', 'try: pass',
     'tests/test_jobs.py::test_a_file_is_on_the_disk_before_its_name_and_the_name_before_the_end'),
    ('jobs/fsync of the file', 'mmembed/tables.py',
     "with temporary.open('rb') as f: os.fsync(f.fileno())", "with temporary.open('rb') as f: f.fileno()",
     'tests/test_jobs.py::test_a_file_is_on_the_disk_before_its_name_and_the_name_before_the_end'),
    ('jobs/rows of a part', 'mmembed/tables.py',
     'return about.num_rows == len(job.shard(k))', 'return True',
     'tests/test_jobs.py::test_a_part_with_fewer_rows_is_made_again'),
    ('jobs/failures of the last part', 'mmembed/tables.py',
     "        for k in range(job.shards()):\n            bad =", "        for k in range(job.shards() - 1):\n            bad =",
     'tests/test_jobs.py::test_failures_of_every_part_are_listed'),
    # ---- index
    ('index/constant of reciprocal ranks', 'mmembed/queries.py', '1 / (60 + place)', '1 / (10 + place)',
     'tests/test_index.py::test_two_rankings_are_merged_by_reciprocal_ranks'),
    # ---- serving
    ('serve/index of a mixed request', 'mmembed/serve/wire.py',
     'for at, i in enumerate(items): i.index = at', 'pass',
     'tests/serve/test_http.py::test_answers_are_numbered_by_their_places_in_the_request '
     'tests/serve/test_clients.py::test_a_request_in_parts_is_numbered_as_a_whole'),
    ('serve/time of a request', 'mmembed/serve/service.py',
     'timeout = min(timeout or 1e9, self.config.engine.timeout)', 'timeout = timeout or self.config.engine.timeout',
     'tests/serve/test_budgets.py::test_a_client_gets_no_more_time_than_the_server_gives'),
    ('serve/time of a long request', 'mmembed/serve/wire.py',
     'min(timeout or options.timeout, options.timeout)', '(timeout or options.timeout)',
     'tests/serve/test_budgets.py::test_a_client_gets_no_more_time_than_the_server_gives'),
    ('serve/time of downloads', 'mmembed/serve/wire.py',
     'min(seconds or 1e9, service.config.engine.timeout)', '(seconds or service.config.engine.timeout)',
     'tests/serve/test_budgets.py::test_a_client_gets_no_more_time_than_the_server_gives'),
    ('serve/order of equal candidates', 'mmembed/serve/scores.py',
     "for k in np.argsort(-score, kind='stable')]\n    rows +=", 'for k in np.argsort(-score)]\n    rows +=',
     'tests/serve/test_http.py::test_equal_scores_keep_the_order_of_the_request'),
    ('serve/order of equal labels', 'mmembed/serve/scores.py',
     "np.argsort(-score, kind='stable')[:top_k or None]", 'np.argsort(-score)[:top_k or None]',
     'tests/serve/test_http.py::test_equal_scores_keep_the_order_of_the_request'),
)]


def functions(path: Path) -> set[str]:
    "The names of the test functions in a file."
    return {n.name for n in ast.parse(path.read_text()).body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))}


def faults(table: list[Mutant], root: Path = ROOT) -> list[str]:
    "What is wrong with the table itself: old text that does not occur exactly once, a change that is no Python, tests that do not exist."
    found = [f'{name} stands {n} times in the table' for name, n in Counter(m.name for m in table).items() if n > 1]
    for m in table:
        text = (root/m.file).read_text() if (root/m.file).is_file() else ''
        if (n := text.count(m.old)) != 1: found.append(f'{m.name}: the old text occurs {n} times in {m.file}')
        elif m.new == m.old: found.append(f'{m.name}: the change changes nothing')
        else:
            try: ast.parse(text.replace(m.old, m.new))
            except SyntaxError as e: found.append(f'{m.name}: {m.file} is no Python with the change: {e.msg}, line {e.lineno}')
        if not m.tests.split(): found.append(f'{m.name}: no test is named')
        for test in m.tests.split():
            path, _, name = test.partition('::')
            if not (root/path).is_file() or name not in functions(root/path): found.append(f'{m.name}: there is no test {test}')
    return found


def outcomes(root: Path, tests: list[str], *options: str) -> dict[str, Counter] | None:
    "What became of each test function, in a process of its own: how many of its cases 'passed', 'failed' or were 'skipped'. None: it took too long."
    env = os.environ | dict(PYTHONPATH=str(root), OMP_NUM_THREADS='1',
                            MMEMBED_DATA=os.environ.get('MMEMBED_DATA') or str(ROOT.parent/'shared'/'data'))
    report = root/'.outcomes.xml'
    report.unlink(missing_ok=True)
    command = [sys.executable, '-m', 'pytest', '-q', '-n', '0', '-p', 'no:cacheprovider', f'--junitxml={report}', *options, *tests]
    process = subprocess.Popen(command, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try: said, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        return None
    if process.returncode not in (0, 1): raise RuntimeError(f'pytest cannot run {" ".join(tests)}:\n{said[-3000:]}')
    found: dict[str, Counter] = defaultdict(Counter)
    for case in ET.parse(report).iter('testcase'):
        kinds = {child.tag for child in case}
        kind = 'failed' if kinds & {'failure', 'error'} else 'skipped' if 'skipped' in kinds else 'passed'
        name = case.get('classname').replace('.', '/') + '.py::' + case.get('name').partition('[')[0]
        found[name][kind] += 1
    return dict(found)


def written(path: Path, text: str):
    "Writes a module, and forgets what was compiled of it: a change of equal length within a second would not be seen."
    path.write_text(text)
    for left in (path.parent/'__pycache__').glob(f'{path.stem}.*.pyc'): left.unlink()


def judged(table: list[Mutant], root: Path = ROOT, say=print) -> dict[str, str]: # name: 'noticed', 'survived', or why it is neither
    "The verdict on every change; the project itself stays as it is."
    verdicts: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix='mmembed-mutants-') as folder:
        copy = Path(folder)/'project'
        shutil.copytree(root, copy, ignore=LEFT_OUT)
        sound = outcomes(copy, sorted({t for m in table for t in m.tests.split()})) or {}
        for n, m in enumerate(table, 1):
            usual = [t for t in m.tests.split() if sound.get(t, {}).get('passed') and not sound[t].get('failed')]
            if len(usual) < len(m.tests.split()): verdict = f'not judged: fails or is skipped without it: {" ".join(set(m.tests.split()) - set(usual))}'
            else:
                text = (copy/m.file).read_text()
                written(copy/m.file, text.replace(m.old, m.new))
                try:
                    found = outcomes(copy, usual, '-x')
                    failed = [t for t, kinds in (found or {}).items() if kinds['failed']]
                    verdict = 'noticed: it hangs' if found is None else f'noticed: {failed[0]}' if failed else 'survived'
                except RuntimeError as e: verdict = f'not judged: {e}'
                finally: written(copy/m.file, text)
            verdicts[m.name] = verdict
            say(f'{n:3}/{len(table)}  {m.name:45} {verdict}')
    return verdicts


def main(argv: list[str] | None = None, table: list[Mutant] = TABLE, root: Path = ROOT) -> int:
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--only', nargs='+', metavar='NAME', help='entries whose names begin so: a room, or a whole name')
    p.add_argument('--list', action='store_true', help='show the table, change nothing')
    args = p.parse_args(argv)
    if wrong := faults(table, root): print(*wrong, sep='\n', file=sys.stderr)
    some = [m for m in table if not args.only or m.name.startswith(tuple(args.only))]
    if not some: print(f'no entry begins with {" or ".join(args.only)}', file=sys.stderr)
    if wrong or not some: return 2
    if args.list:
        for m in some: print(f'{m.name}: {m.file}\n  - {m.old.strip()}\n  + {m.new.strip()}\n  {m.tests}')
        return 0
    verdicts = judged(some, root, lambda line: print(line, flush=True))
    missed = {name: v for name, v in verdicts.items() if not v.startswith('noticed')}
    print(f'{len(verdicts) - len(missed)} of {len(verdicts)} changes were noticed' + ''.join(f'\n  {name}: {v}' for name, v in missed.items()))
    return bool(missed)


if __name__ == '__main__': sys.exit(main())
