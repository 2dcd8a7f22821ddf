"""What the pages say: links lead somewhere, names in backticks exist, every notebook is on the site, tables of the
API can be made."""
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
NBS, HOME = ROOT/'nbs', 'https://github.com/mmembed/mmembed/'
NOTEBOOKS = sorted(p for p in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
TUTORIALS = sorted((NBS/'tutorials').glob('*.ipynb'))
PAGES = [*sorted(ROOT.glob('*.md')), ROOT/'benchmarks'/'README.md', *NOTEBOOKS]


def cells(path, kind='markdown'):
    return [''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == kind]


def prose(path):
    return '\n\n'.join(cells(path)) if path.suffix == '.ipynb' else path.read_text()


def unfenced(text):
    return re.sub(r'```.*?```', '', text, flags=re.S)


def anchors(path):
    "The headings of a page as links name them."
    heads = re.findall(r'^#+ (.+)$', prose(path), re.M)
    return {re.sub(r'[^\w\- ]', '', re.sub(r'[`*]', '', h.lower())).strip().replace(' ', '-') for h in heads}


def links(path):
    text = re.sub(r'`[^`\n]*`', '', unfenced(prose(path)))
    return [m.strip() for m in re.findall(r'\]\(([^)\s]+)(?:\s+"[^"]*")?\)', text)]


@pytest.mark.parametrize('page', PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in links(page):
        target, _, anchor = link.partition('#')
        colab = re.fullmatch(r'https://colab\.research\.google\.com/github/mmembed/mmembed/blob/main/(.+)', target)
        if target.startswith((HOME + 'blob/main/', HOME + 'tree/main/')) or colab:
            to = ROOT/(colab[1] if colab else target.split('/main/', 1)[1])
        elif re.match(r'[a-z]+:', target): continue  # somebody else's page
        else: to = (page.parent/target).resolve() if target else page
        if page == NBS/'index.ipynb' and not to.exists(): to = ROOT/target  # it is README.md too
        assert to.exists(), f'{link} leads nowhere'
        if anchor and to.suffix in ('.md', '.ipynb'): assert anchor in anchors(to), f'{link}: no such heading'


def test_links_are_found():
    assert len(links(NBS/'tutorials'/'01_ten_minutes.ipynb')) > 5 and len(links(ROOT/'README.md')) > 5


def resolve(name):
    "The object a dotted name stands for; raises `AttributeError` or `ImportError`."
    parts = name.split('.')
    if parts[0] == 'mm': parts[0] = 'mmembed'
    found, at = importlib.import_module(parts[0]), parts[0]
    for p in parts[1:]:
        at += '.' + p
        try: found = getattr(found, p)
        except AttributeError: found = importlib.import_module(at)
    return found


@pytest.mark.parametrize('page', PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_names_in_backticks_exist(page):
    from mmembed.cli.main import COMMANDS
    text = prose(page)
    tops = {p.name for p in ROOT.iterdir()} - {'build', 'data', 'runs', 'artifacts'}
    for said in re.findall(r'`([^`\n]+)`', unfenced(text)):
        if m := re.match(r'(?:mm|mmembed)((?:\.[A-Za-z_]\w*)+)', said):
            if m[1] not in ('.hpp', '.proto'): resolve('mmembed' + m[1])
        path = said.split()[0]
        if re.fullmatch(r'[\w.-]+(/[\w.-]+)+\.\w+', path) and path.split('/')[0] in tops:
            assert (ROOT / path).exists(), f'`{said}`: no such file'
    typed = '\n'.join(re.findall(r'```.*?```', text, re.S) + re.findall(r'^    \S.*$', text, re.M))
    commands = re.findall(r'`mmembed ([a-z]+)', text) + re.findall(r'^ *(?:\.venv/bin/)?mmembed ([a-z]+)', typed, re.M)
    for c in commands: assert c in {k.split()[0] for k in COMMANDS}, f'`mmembed {c}`: no such command'
    for config in re.findall(r'configs/[\w.]+\.yaml', text): assert (ROOT/config).is_file(), f'{config}: no such file'


@pytest.mark.parametrize('tool', ['sidebar', 'rooms', 'pictures'])
def test_what_tools_write_is_in_step(tool):
    subprocess.run([sys.executable, ROOT/'tools'/f'{tool}.py', '--check'], check=True)


def test_sidebar_lists_every_notebook_once():
    def listed(x):
        return (
            [x] if isinstance(x, str) else [o for y in (x['contents'] if isinstance(x, dict) else x) for o in listed(y)]
        )
    found = listed(yaml.safe_load((NBS/'sidebar.yml').read_text())['website']['sidebar']['contents'])
    assert sorted(found) == [p.relative_to(NBS).as_posix() for p in NOTEBOOKS]


def test_site_settings():
    "What nbdev and Quarto read is there, and the workflow calls what the Makefile has."
    from nbdev.config import get_config
    quarto, c = yaml.safe_load((NBS/'_quarto.yml').read_text()), get_config(ROOT)
    assert quarto['metadata-files'] == ['nbdev.yml', 'sidebar.yml'] and (NBS/quarto['format']['html']['css']).is_file()
    for k in ('title', 'description', 'branch', 'git_url', 'doc_host', 'doc_baseurl', 'doc_path'): assert str(c[k]), k
    assert c.custom_sidebar
    make = (ROOT/'Makefile').read_text()
    for flow in (ROOT/'.github'/'workflows').glob('*.yml'):
        said = yaml.safe_load(flow.read_text())
        assert said[True] and said['jobs']  # YAML 1.1 reads `on` as true
        steps = [s for job in said['jobs'].values() for s in job['steps']]
        assert all('run' in s or '@' in s['uses'] for s in steps)
        for run in (s['run'] for s in steps if 'run' in s):
            for goal in re.findall(r'\bmake (\w+)', run):
                assert re.search(rf'^{goal}:', make, re.M), f'{flow.name}: no make {goal}'
            for file in re.findall(r'\bbash (\S+)', run): assert (ROOT/file).is_file(), f'{flow.name}: no {file}'


@pytest.mark.parametrize('page', TUTORIALS, ids=lambda p: p.stem)
def test_tutorials_open_anywhere(page):
    "A badge that leads here, a hidden cell that installs, outputs that are small and no errors."
    assert f'blob/main/{page.relative_to(ROOT).as_posix()})' in cells(page)[0], (
        'no Colab badge, or that of another page'
    )
    assert any(
        c.startswith('#| hide') and 'except ImportError' in c and 'pip install' in c for c in cells(page, 'code')
    ), 'no cell that installs'
    assert page.stat().st_size < 400_000
    code = [c for c in json.loads(page.read_text())['cells'] if c['cell_type'] == 'code']
    assert not [o for c in code for o in c['outputs'] if o['output_type'] == 'error']
    shown = [c for c in code if c['outputs']]
    assert len(shown) >= 5, 'outputs are to be committed'


@pytest.mark.parametrize('page', NOTEBOOKS, ids=lambda p: str(p.relative_to(NBS)))
def test_notebooks_open_with_title_and_summary(page):
    first = cells(page)[0]
    assert re.match(r'# \S.*\n+> \S', first), 'want an H1 and a one-line summary'


def exported():
    "Every public function and class: (module, name, its definition)."
    import ast
    for p in sorted((ROOT/'mmembed').rglob('*.py')):
        if p.name.startswith('_') or not (m := re.search(r'^__all__ = (\[.*?\])', p.read_text(), re.M | re.S)): continue
        defined = {
            n.name: n
            for n in ast.parse(p.read_text()).body
            if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        }
        yield from (
            (p.relative_to(ROOT).as_posix(), name, defined[name])
            for name in re.findall(r"'(\w+)'", m[1])
            if name in defined
        )


def test_every_public_name_says_what_it_is():
    import ast
    def told(module, node):  # by a docstring, by the comment at what is returned, or by being a single line
        head = (ROOT/module).read_text().splitlines()[node.lineno - 1:node.body[0].lineno]
        return (
            ast.get_docstring(node)
            or node.lineno == node.end_lineno
            or any(re.search(r'-> .*: *# ', line) for line in head)
        )
    found = [(module, name) for module, name, node in exported() if not told(module, node)]
    assert found == [] and sum(1 for _ in exported()) > 300


def test_tables_of_the_api():
    """`show_doc`, from which the site's tables are made, has the signature and the parameters of what the package
    offers at its top."""
    import mmembed
    from nbdev.showdoc import show_doc
    tables = 0
    for name in set(mmembed.__all__) - {'export'}:
        offered = getattr(mmembed, name)
        page = show_doc(offered, renderer=None)._repr_markdown_()
        # `bert` is an older name of `Bert.from_pretrained`
        assert getattr(offered, '__name__', name) in page and '```python' in page
        tables += '| **' in page or '\n    ' in page
    assert tables > 15


def test_changelog_knows_this_version():
    from mmembed import __version__
    assert re.search(rf'^## {re.escape(__version__)}\b', (ROOT/'CHANGELOG.md').read_text(), re.M)


def test_measured_tables_are_in_step():
    subprocess.run([sys.executable, ROOT/'tools'/'tables.py', '--check'], check=True)
