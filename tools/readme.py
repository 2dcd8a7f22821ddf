"""README.md from nbs/index.ipynb, without Quarto: `python tools/readme.py` writes it, `--check` fails if it is out of step."""
import sys
from pathlib import Path

from fastcore.nbio import read_nb

ROOT = Path(__file__).resolve().parent.parent


def shown(output) -> str:
    "The text of one output of a code cell, as Markdown."
    data = output.get('data', {})
    text = data.get('text/markdown')
    if text is not None: return ''.join(text).strip()
    text = output.get('text') or data.get('text/plain') or ''
    text = ''.join(text).rstrip()
    return '\n'.join(f'    {line}'.rstrip() for line in text.split('\n')) if text else ''


def markdown(cell) -> str:
    "A cell as README.md has it; '' for a hidden one."
    source = cell.source.strip()
    if cell.cell_type == 'markdown': return source
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
