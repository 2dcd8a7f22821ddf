"""README.md from nbs/index.ipynb, without Quarto: `python tools/readme.py` writes it, `--check` fails if it is out
of step.

The notebook is the first page of the site, too: its links to notebooks and pictures begin at nbs/, those to files
are URLs. In README.md both begin at the root."""
import re
import sys
from pathlib import Path

from fastcore.nbio import read_nb

ROOT = Path(__file__).resolve().parent.parent
FILES = re.compile(r'\]\(https://github\.com/mmembed/mmembed/(?:blob|tree)/main/')


def shown(output) -> str:
    "The text of one output of a code cell, as Markdown."
    data = output.get('data', {})
    text = data.get('text/markdown')
    if text is not None: return ''.join(text).strip()
    text = output.get('text') or data.get('text/plain') or ''
    text = ''.join(text).rstrip()
    return '\n'.join(f'    {line}'.rstrip() for line in text.split('\n')) if text else ''


def from_root(text: str) -> str:
    "Links as they are from the root of the repository."
    def moved(m):
        here = (ROOT/'nbs'/m[1]).exists() and not (ROOT/m[1]).exists()
        return f'](nbs/{m[1]}' if here else m[0]
    return FILES.sub('](', re.sub(r'\]\(([\w./-]+\.(?:ipynb|webp|svg))', moved, text))


def markdown(cell) -> str:
    "A cell as README.md has it; '' for a hidden one."
    source = cell.source.strip()
    if cell.cell_type == 'markdown': return from_root(source)
    if cell.cell_type != 'code' or source.startswith(('#| hide', '#|hide', '#| default_exp')): return ''
    code = '\n'.join(line for line in source.split('\n') if not line.startswith('#|')).strip()
    outputs = [shown(o) for o in cell.get('outputs', [])]
    return '\n\n'.join([f'```python\n{code}\n```', *(o for o in outputs if o)])


def readme() -> str:
    cells = read_nb(ROOT/'nbs'/'index.ipynb').cells
    head = '<!-- Made by tools/readme.py from nbs/index.ipynb: edit the notebook. -->'
    return '\n\n'.join([head, *(m for m in map(markdown, cells) if m)]) + '\n'


if __name__ == '__main__':
    path, text = ROOT/'README.md', readme()
    if '--check' not in sys.argv: path.write_text(text, encoding='utf-8')
    elif not path.exists() or path.read_text(encoding='utf-8') != text:
        sys.exit('README.md is out of step with nbs/index.ipynb: run `make export`')
