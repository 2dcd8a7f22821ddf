"""nbs/sidebar.yml, the order in which the site lists the notebooks: `python tools/sidebar.py` writes it, `--check` fails if it is out of step."""
import re
import sys
from pathlib import Path

NBS = Path(__file__).resolve().parent.parent/'nbs'
SECTIONS = {  # title: folders, or beginnings of names beside index.ipynb; in the order in which one would read them
    'Tutorials': ['tutorials'], 'Core': ['00'], 'Text': ['text'], 'Images': ['vision'], 'Data': ['data'], 'Models': ['models'],
    'Training': ['19', '20', '40_show'], 'Export': ['export'], 'Running a file': ['30', '31', '32', '33'], 'Jobs and search': ['40', '41', '42', '43'],
    'Serving': ['serve'], 'Demo': ['demo'], 'Command line': ['50', 'commands'],
}


def belongs(path: Path, key: str) -> bool:
    "Whether a notebook, relative to nbs/, is of a folder or has a name that begins so."
    return path.parts[0] == key if len(path.parts) > 1 else path.name.startswith(key)


def natural(path: Path) -> list:
    "09, 10, 10a in this order."
    return [int(p) if p.isdigit() else p for p in re.split(r'(\d+)', str(path))]  # words at even places, numbers at odd ones


def sections(notebooks: list[Path]) -> dict[str, list[Path]]:
    "Every notebook once, under the first section that claims it, else under 'More'."
    left = sorted((p for p in notebooks if p.name not in ('index.ipynb', 'comparison.ipynb')), key=natural)
    found = {}
    for title, keys in SECTIONS.items():
        found[title] = [p for p in left if any(belongs(p, k) for k in keys)]
        left = [p for p in left if p not in found[title]]
    return {k: v for k, v in (found | {'More': left}).items() if v}


def sidebar() -> str:
    notebooks = [p.relative_to(NBS) for p in NBS.rglob('*.ipynb') if not any(o.startswith(('.', '_')) for o in p.relative_to(NBS).parts)]
    lines = ['website:', '  sidebar:', '    contents:', '    - index.ipynb']
    if Path('comparison.ipynb') in notebooks: lines.append('    - comparison.ipynb')
    for title, found in sections(notebooks).items():
        lines += [f'    - section: {title}', '      contents:', *(f'      - {p.as_posix()}' for p in found)]
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    path, text = NBS/'sidebar.yml', sidebar()
    if '--check' not in sys.argv: path.write_text(text, encoding='utf-8')
    elif not path.exists() or path.read_text(encoding='utf-8') != text: sys.exit('nbs/sidebar.yml is out of step with the notebooks: run `make export`')
