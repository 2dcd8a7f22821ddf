"""The house keeps its order: imports point one way, nothing private is borrowed, chapters build on earlier ones, a
public name has one home."""
import ast
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from fastcore.nbio import read_nb

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ['core', 'text vision', 'data models runtime', 'train', 'exporters', 'retrieval', 'serve', 'demo', 'cli']
RANK = {room: i for i, rooms in enumerate(LAYERS) for room in rooms.split()}
NEVER = {'runtime': 'text vision', 'serve': 'text models train exporters', 'retrieval': 'text models train exporters'}
FREE = {'__init__.py', '__main__.py', '_modidx.py'}  # made by hand, or by nbdev


def modules(root=ROOT):
    "Every generated module, as its dotted name within the package, with its syntax tree."
    folder = root/'mmembed'
    for path in sorted(folder.rglob('*.py')):
        if path.name not in FREE:
            yield '.'.join(path.relative_to(folder).with_suffix('').parts), ast.parse(path.read_text())


def imports(tree, module=''):
    """Yield (line, module of ours, names) of every import, those inside functions too.

    Relative ones as seen from `module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            parts = module.split('.')[:-node.level] if node.level else []
            target = '.'.join(filter(None, [*parts, node.module])) if node.level else node.module
            if node.level or target.split('.')[0] == 'mmembed':
                yield node.lineno, target.removeprefix('mmembed').lstrip('.'), [a.name for a in node.names]
        elif isinstance(node, ast.Import):
            for a in node.names:
                if a.name.split('.')[0] == 'mmembed' and '.' in a.name:
                    yield node.lineno, a.name.removeprefix('mmembed.'), []


def resolved(target, names, known):
    "The modules that `from target import names` loads."
    whole = [f'{target}.{n}'.lstrip('.') for n in names]
    found = [w for w in whole if w in known]
    return found + ([target] if target and len(found) < len(names) or not names else [])


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
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)): names = [node.name]
            elif isinstance(node, ast.Assign): names = [t.id for t in node.targets if isinstance(t, ast.Name)]
            else: continue
            for n in names:
                if not n.startswith('_'): homes[n].append(module)
    return {n: m for n, m in homes.items() if len(set(m)) > 1}


if __name__ == '__main__':
    import collections

    for title, found in (
        ('arrows', [*arrows()]),
        ('later', sorted(set(later()))),
        ('numbering', [*numbering()]),
        ('twice', [f'{k}: {v}' for k, v in twice().items()]),
    ):
        print('##', title, len(found)); print('\n'.join(found))
