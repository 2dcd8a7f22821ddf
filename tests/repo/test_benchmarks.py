"""The commands that the pages of the benchmarks name, each run once as small as it goes, from nothing: a copy of the
checkout, so that no result is written over."""
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mmembed as mm
from benchmarks import LIMITS, TOLD

from tests.helpers import HANG

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get('MMEMBED_DATA') or ROOT.parent/'shared'/'data').resolve()
PAGES = 'README.md', 'benchmarks/README.md'

SMALL = {  # program, or program and its first word: what makes it small, behind the page's own words
    'quickstart_control': '--trainer.max_epochs 1 --data.source.init_args.train 64 --data.source.init_args.valid 40 '
                          '--data.batch_size 32 --data.workers 0',
    'mirror': '1',
    'figures': '--quick',
    'practice': '--quick',
    'search': '--quick --rows 2000 --seconds .2',
    'gpu': '--quick --device cpu --rows "eager fp32,file fp32"',
    'layers': '--quick --rounds 1 --seconds .01',
    'loader': '--batches 2 --rounds 1 --size 32 --batch-size 2 --workers 0 1',
    'train': '--pairs 64 --epochs 1 --rounds 1 --batch 16',
    'text': '--rounds 1 --batches 1',
    'vision': '--sides 64 --threads 1 --files 2 --rounds 1',
    'fuzz_vision': '--n 40',
    'fuzz_text': '--n 20 --quick',
    'fuzz_bpe': '--n 20 --quick',
    'fuzz_unigram': '--n 20 --quick',
    'fuzz_segment': '--n 20 --quick',
    'fuzz_exits': '--n 10 --quick',
    'fuzz_serve': '--examples 1 --calls 40',
    'build': '--quick',
    'serve': '--seconds .5 --concurrency 1 --what text',
    'serve artifacts/quickstart.pt': '--soak 3',
    'artifact prepare': '--model tiny --parts artifact',
    'artifact run': '--model tiny --batches 1 --rounds 1 --seconds .01 --threads 1 --only artifact',
    'memory prepare': '--model ViT-S-32-alt --parts fp32 --alone',
    'memory run': '--parts fp32',
    'memory cold': '--rounds 1',
    'artifact cold': '',
    'compiled': '--model small --seconds .01',
    'compiled --check': '--quick',
    'variants prepare': '--quick --only "fp32;bf16"',
    'variants time': '--quick --only "fp32;bf16" --seconds 1',
    'int8 prepare': '--quick --model squeezenet1_1',
    'int8 run': '--quick --model squeezenet1_1 --rounds 1',
    'embed share': '--rows 16 --rounds 1',
    'embed workers': '--rows 64 --rounds 1 --workers 1',
    'embed estimate': '',
    'embed peers': '--rows 8 --rounds 1 --net ViT-S-32-alt --only photos:mmembed captions:mmembed',
}
STANDS_FOR = {'SEED': '0', 'FLIP': '0', 'FILE': 'file.webp', 'FOLDER': 'work', 'ViT-B-32': 'ViT-S-32-alt'}
FIRST = {  # what a command goes on from
    'artifact run': 'python -m benchmarks.artifact prepare --model clip',
    **dict.fromkeys(['memory run', 'memory cold'], 'python -m benchmarks.memory prepare'),
    'int8 run': 'python -m benchmarks.int8 prepare --model resnet50 --peers PYTHON',
    'serve --record': 'python -m benchmarks.serve --clip --pin --what mix --load --record serve.json',
    **dict.fromkeys(
        [
            'figures soup', 'figures compare', 'figures errors', 'practice match', 'practice classes',
            'practice transfer', 'variants prepare --figures',
        ],
        'python -m benchmarks.figures finetune 6 256 2e-4 SEED',
    ),
    'variants time --figures': 'python -m benchmarks.variants prepare --figures finetuned-0',
    'variants time '
    '--open-clip': "python -m benchmarks.variants prepare --open-clip ViT-B-32 --only 'bf16;int8;fold;output binary'",
}


def commands():
    "What the pages name, as it stands there."
    found = {}
    for page in PAGES:
        for line in re.findall(r'python -m benchmarks\.\w+[^`\n#]*', (ROOT / page).read_text()):
            found[re.sub(r'[ ;,.)]+$', '', line)] = page
    return list(found)


def parted(command):
    "Program and words."
    words = shlex.split(command)[2:]
    return words[0].removeprefix('benchmarks.'), words[1:]


def listed(table, program, words):
    "The longest entry that the command begins with."
    return next((key for k in (2, 1, 0) if (key := ' '.join([program, *words[:k]])) in table), None)


def small(command):
    """Its arguments for Python, as small as it goes.

    What stands in the pages for something of the reader's own is filled in."""
    program, words = parted(command)
    for peers, given in (('--matxscript', 2), ('--peers', 1)):  # interpreters of environments of their own
        if peers in words: del words[words.index(peers):words.index(peers) + 1 + given]
    words = [w for w in words if w != '--peer' and not w.endswith('=ENV/bin/python')]
    words = [STANDS_FOR.get(w, w) for w in words if w not in ('--clip', '...')]
    if program == 'embed' and '--model' in words: words[words.index('--model') + 1] = 'artifacts/quickstart.pt'
    own = shlex.split(SMALL[listed(SMALL, program, words)])
    kept, option = [], ''
    for w in words:  # without the options that are given anew
        if w.startswith('--'): option = w
        if option not in own: kept.append(w)
    return ['-m', f'benchmarks.{program}', *kept, *own]


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
    "A copy of what the commands want, with a small artifact where the pages have the quickstart's."
    made = tmp_path_factory.mktemp('checkout')
    for name in ('benchmarks', 'configs', 'cpp', 'mmembed', 'tools'):
        shutil.copytree(ROOT / name, made / name, ignore=shutil.ignore_patterns('__pycache__', 'build'))
    for name in ('settings.ini', 'pyproject.toml'): shutil.copy(ROOT/name, made)
    for name in ('artifacts', 'nbs/images'): (made/name).mkdir(parents=True)
    torch.manual_seed(0)
    captions = ['a red circle above a blue ring', 'two green stars'] * 3
    text = mm.TextTransformer(mm.TextPipeline.learn(captions, max_length=16), width=16, depth=1)
    mm.export(
        mm.DualEncoder(text, mm.ConvNet(mm.VisionPipeline(size=32)), dim=16).eval(),
        made / 'artifacts' / 'quickstart.pt',
        fresh=False,
        cpp=False,
    )
    return made, {}


def ran(command, checkout):
    "What it printed; run once in this checkout, after what it goes on from."
    folder, done = checkout
    if (key := tuple(small(command))) not in done:  # several commands may have one small form
        program, words = parted(command)
        first = FIRST.get(listed(FIRST, program, [w for w in words if w not in ('--clip', '--pin')]))
        if first: ran(first, checkout)
        env = dict(os.environ, PYTHONPATH=str(folder), MMEMBED_DATA=str(DATA), OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1')
        done[key] = subprocess.run(
            [sys.executable, *key], cwd=folder, env=env, capture_output=True, text=True, timeout=4 * HANG
        )
    run = done[key]
    last = (run.stderr.strip().splitlines() or [''])[-1]
    if run.returncode and re.search('MMEMBED_DATA|not installed|No module named|pip install', last): pytest.skip(last)
    assert run.returncode == 0, f'{shlex.join(small(command))}\n{run.stdout[-1500:]}\n{run.stderr[-3000:]}'
    return run.stdout


def test_every_command_of_the_pages_has_a_small_form():
    found = {(listed(SMALL, *parted(c)), c) for c in commands()}
    assert len(found) > 40 and not [c for key, c in found if key is None]
    assert {key for key, _ in found} == set(SMALL), 'no page names it'
    assert set(FIRST.values()) <= set(commands())
    for command in commands(): assert (ROOT/'benchmarks'/f'{parted(command)[0]}.py').is_file(), command


@pytest.fixture
def search(monkeypatch):
    "The module, without what it sets for its own process."
    before = dict(os.environ)
    monkeypatch.syspath_prepend(ROOT)
    module = importlib.import_module('benchmarks.search')
    os.environ.clear()
    os.environ.update(before)
    return module


def test_faiss_is_built_as_lance_is(search, monkeypatch):
    "The same graph and lists, the same questions."
    pytest.importorskip('faiss')
    rows, kinds = 100_000, ('flat', 'ivf_pq', 'ivf_sq', 'hnsw_sq', 'hnsw_flat')
    assert {n.partition('_')[2] for n in search.CONTENDERS} == set(kinds) and len(search.CONTENDERS) == 2*len(kinds)
    made = {}
    class Lance:  # takes what `lance_build` asks LanceDB for
        def __init__(self, folder): self._table = self
        def create_index(self, column, config, **kw): made[kind] = config
        def info(self): return dict(bytes=0)
    monkeypatch.setattr('mmembed.retrieval.index.Index', Lance)
    monkeypatch.setattr(search.shutil, 'copytree', lambda *a, **kw: None)
    for kind in kinds[1:]: search.lance_build(kind, ROOT, rows)
    for kind in kinds[1:]:
        ours, theirs = made[kind], search.faiss_index(kind, rows)
        assert ours.distance_type == 'cosine' and theirs.metric_type == 0  # the inner product
        if kind.startswith('hnsw'):
            assert (theirs.hnsw.nb_neighbors(1), theirs.hnsw.nb_neighbors(0)) == (
                ours.m,
                2 * ours.m,
            ) and theirs.hnsw.efConstruction == ours.ef_construction
        else:
            assert theirs.nlist == ours.num_partitions == 24 and (
                theirs.cp.niter,
                theirs.cp.max_points_per_centroid,
            ) == (ours.max_iterations, ours.sample_rate)
            if kind == 'ivf_pq': assert theirs.pq.M == ours.num_sub_vectors == 64 and theirs.pq.nbits == ours.num_bits


def test_a_library_that_is_not_installed_stands_as_not_run(search):
    table = search.results(dict(faiss_flat=dict(not_run='faiss is not installed')))
    assert table['rows'][0][:2] == ['FAISS FLAT', 'not run: faiss is not installed'] and len(table['rows'][0]) == len(
        table['columns']
    )


@pytest.mark.weekly
@pytest.mark.parametrize('command', commands())
def test_commands_of_the_pages(command, checkout):
    folder, _ = checkout
    printed = ran(command, checkout)
    print(f'$ {shlex.join(small(command))}\n{printed}')
    assert printed.strip() or list(folder.glob('*.webp')) or list((folder / 'nbs' / 'images').iterdir()), (
        'it prints nothing and draws nothing'
    )


def test_a_benchmark_says_and_limits_its_instructions():
    program = (
        'import argparse, os, sys; from benchmarks import LIMITS, begun; a = begun(argparse.ArgumentParser()); '
        'print(a.avx2, [os.environ.get(k) for k in LIMITS], sys.argv[1:])'
    )
    def run(*words, **more):
        env = {k: v for k, v in os.environ.items() if k not in LIMITS} | more
        return subprocess.run(
            [sys.executable, '-c', program, *words], cwd=ROOT, env=env, capture_output=True, text=True, check=True
        ).stdout.splitlines()
    assert run()[1:] == ['False [None, None, None] []'] and run()[0].startswith('processor: ')
    told, held = run('--avx2')
    assert held == f"True {list(LIMITS.values())} ['--avx2']" and all(f'{k}={v}' in told for k, v in LIMITS.items())
    assert run(**{TOLD: '1'}) == ['False [None, None, None] []']  # what a benchmark starts says nothing of its own
