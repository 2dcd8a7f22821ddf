"""The house keeps its order: imports point one way, nothing private is borrowed, chapters build on earlier ones, a
public name has one home."""
import ast
import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from fastcore.nbio import read_nb

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # this file is run by itself too

from tools.rooms import FREE, imports, modules, resolved

LAYERS = ['core', 'text vision', 'data models runtime', 'train', 'exporters', 'retrieval', 'serve', 'demo', 'cli']
RANK = {room: i for i, rooms in enumerate(LAYERS) for room in rooms.split()}
NEVER = {'runtime': 'text vision', 'serve': 'text models train exporters', 'retrieval': 'text models train exporters'}


def arrows(root=ROOT):
    known = dict(modules(root))
    for module, tree in known.items():
        room = module.split('.')[0]
        if room not in RANK: yield f'{module}: there is no room {room}'; continue
        for line, target, names in imports(tree, module):
            for used in resolved(target, names, known):
                other = used.split('.')[0]
                if other and other != room and RANK.get(other, -1) >= RANK[room]:
                    yield f'{module}:{line}: {room} may not use {used}'
                if other in NEVER.get(room, '').split(): yield f'{module}:{line}: {room} never uses {other}'
            for n in names:
                if n.startswith('_') and n != '__version__': yield f'{module}:{line}: {n} is private to {target}'


def chapters(root=ROOT):
    "Every notebook of a room that exports: its path below nbs/, the module, its code cells."
    for path in sorted((root/'nbs').rglob('*.ipynb')):
        cells = [c.source for c in read_nb(path).cells if c.cell_type == 'code']
        found = [m[1] for s in cells if (m := re.match(r'#\s*\|\s*default_exp\s+(\S+)', s.strip()))]
        if found: yield path.relative_to(root/'nbs'), found[0], cells


def code_of(source): return '\n'.join('' if re.match(r'\s*[%!]', line) else line for line in source.split('\n'))


def later(root=ROOT):
    """Chapters that use a later one, in exported code or in an example: of the same folder by number, of another
    room by the arrows."""
    found = list(chapters(root))
    place = {module: path for path, module, _ in found}
    for path, module, cells in found:
        room = module.split('.')[0]
        for source in cells:
            for _, target, names in imports(ast.parse(code_of(source)), module):
                for used in resolved(target, names, place):
                    if used not in place: continue
                    other = place[used]
                    if other.parent == path.parent and other.name > path.name:
                        yield f'{path}: uses {used}, which comes later'
                    if RANK[used.split('.')[0]] > RANK[room]: yield f'{path}: uses {used}, of a later room'


def numbering(root=ROOT):
    folders = defaultdict(list)
    for path, module, _ in chapters(root): folders[path.parent.as_posix()].append((path.name, module))
    for folder, names in folders.items():
        want = [f'{i:02}_{module.rpartition(".")[2]}.ipynb' for i, (_, module) in enumerate(sorted(names), 1)]
        if sorted(n for n, _ in names) != want: yield f'{folder}: {sorted(n for n, _ in names)}'


def twice(root=ROOT):
    "Public names that more than one module defines."
    homes = defaultdict(list)
    for module, tree in modules(root):
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                # a method of a class that stands elsewhere is no name of the module
                names = [] if any(ast.unparse(d).startswith('patch') for d in node.decorator_list) else [node.name]
            elif isinstance(node, ast.Assign): names = [t.id for t in node.targets if isinstance(t, ast.Name)]
            else: continue
            for n in names:
                if not n.startswith('_'): homes[n].append(module)
    return {n: m for n, m in homes.items() if len(set(m)) > 1}


# Names that several modules may define, since they are called by others: commands, and schemas of the service.
ENDPOINTS = {
    'commands of the command line': {'embed', 'export', 'verify', 'info', 'add', 'compact', 'serve', 'evaluate',
                                     'approximate', 'duplicates', 'clusters'},
    'schemas in /openapi.json, named as the results they carry': {'Embeddings', 'Ranking'},
}


def test_arrows_point_down():
    assert [*arrows()] == []


def test_no_chapter_uses_a_later_one():
    assert [*later()] == []


def test_chapters_are_numbered_without_gaps():
    assert [*numbering()] == []


def test_nothing_lies_flat():
    assert {p.name for p in (ROOT/'mmembed').glob('*.py')} == FREE
    assert {p.name for p in (ROOT/'nbs').glob('*.ipynb')} == {'index.ipynb', 'comparison.ipynb'}
    assert {p.name for p in (ROOT/'tests').glob('test_*.py')} == set()


def test_tests_and_notebooks_have_the_rooms_of_the_library():
    def folders(top):
        tracked = {
            p.parent.relative_to(ROOT / top).as_posix()
            for p in (ROOT / top).rglob('*.*')
            if '__pycache__' not in p.parts
        }
        return {f.split('/')[0] for f in tracked} - {'.'}
    assert folders('mmembed') == set(RANK)
    assert {p.name for p in (ROOT / 'nbs').iterdir() if p.is_dir() and any(p.rglob('*.ipynb'))} == set(RANK) | {
        'tutorials'
    }
    assert {p.name for p in (ROOT/'tests').iterdir() if any(p.glob('**/test_*.py'))} == set(RANK) | {'cpp', 'repo'}


def test_a_public_name_has_one_home():
    found = {n: m for n, m in twice().items() if n not in set().union(*ENDPOINTS.values())}
    assert found == {}


def test_ruff():
    """Lines of at most 120 columns, no unused names, no known bugs, no function that is too complex.

    The lines of `__all__` are nbdev's own, which breaks them at 130."""
    done = subprocess.run(
        [
            Path(sys.executable).parent / 'ruff',
            'check',
            '--no-cache',
            '--output-format',
            'json',
            'mmembed',
            'tests',
            'benchmarks',
            'tools',
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    def generated(row):
        lines = Path(row['filename']).read_text().splitlines()[: row['location']['row']]
        begins = [i for i, line in enumerate(lines) if line.startswith('__all__')]
        return bool(begins) and all(line.startswith(('__all__', ' ')) for line in lines[begins[0] :])
    left = [r for r in json.loads(done.stdout) if not (r['code'] == 'E501' and generated(r))]
    assert [
        f"{Path(r['filename']).relative_to(ROOT)}:{r['location']['row']}: {r['code']} {r['message']}" for r in left
    ] == []


def long_cells(root=ROOT):
    "Exported cells of more than 60 lines that define anything but one scripted module: chapter and first name."
    for path, _, cells in chapters(root):
        for source in cells:
            if not re.match(r'#\s*\|\s*export', source) or len(source.split('\n')) <= 60: continue
            defined = [n for n in ast.parse(code_of(source)).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
            scripted = {'Module', 'Tower', 'Unigram', 'Served'}
            bases = [b.id if isinstance(b, ast.Name) else b.attr for n in defined for b in getattr(n, 'bases', [])]
            if len(defined) == 1 and scripted & set(bases): continue
            yield f'{path.with_suffix("")}: {defined[0].name}'


def test_exported_cells_are_short():
    "Only a class that TorchScript compiles stands as one body, and may be longer."
    assert [*long_cells()] == []


@pytest.fixture
def small(tmp_path):
    "A house of two rooms in which every rule is broken once."
    def write(name, text):
        path = tmp_path/name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    write('mmembed/core/first.py', 'def f():\n    from mmembed.text.second import g\n')
    write('mmembed/text/second.py', 'from ..core.first import _hidden\ndef g(): pass\n')
    write('mmembed/text/third.py', 'def g(): pass\n')
    def book(name, module, code):
        cells = [
            dict(cell_type='code', source=f'#| default_exp {module}', metadata={}, outputs=[], execution_count=None)
        ]
        cells.append(dict(cell_type='code', source=code, metadata={}, outputs=[], execution_count=None))
        write(name, json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    book('nbs/core/01_first.ipynb', 'core.first', 'from mmembed.text.second import g')
    book('nbs/text/01_second.ipynb', 'text.second', 'from mmembed.text.third import g')
    book('nbs/text/03_third.ipynb', 'text.third', 'x = 1')
    return tmp_path


def test_the_rules_fail_where_they_are_broken(small):
    assert [m.split(': ')[1] for m in arrows(small)] == [
        'core may not use text.second',
        '_hidden is private to core.first',
    ]
    assert sorted(later(small)) == [
        'core/01_first.ipynb: uses text.second, of a later room',
        'text/01_second.ipynb: uses text.third, which comes later',
    ]
    assert [*numbering(small)] == ["text: ['01_second.ipynb', '03_third.ipynb']"]
    assert twice(small) == {'g': ['text.second', 'text.third']}


if __name__ == '__main__':

    for title, found in (
        ('arrows', [*arrows()]),
        ('later', sorted(set(later()))),
        ('numbering', [*numbering()]),
        ('twice', [f'{k}: {v}' for k, v in twice().items()]),
    ):
        print('##', title, len(found)); print('\n'.join(found))
