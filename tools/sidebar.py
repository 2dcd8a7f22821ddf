"""nbs/sidebar.yml, the order in which the site lists the notebooks: `python tools/sidebar.py` writes it, `--check`
fails if it is out of step."""
import sys
from pathlib import Path

NBS = Path(__file__).resolve().parent.parent/'nbs'
ROOMS = {  # folder: title, in the order in which one would read them, which is that of dependency
    'tutorials': 'Tutorials',
    'core': 'Core',
    'text': 'Text',
    'vision': 'Images',
    'data': 'Data',
    'models': 'Models',
    'runtime': 'Running an artifact',
    'train': 'Training',
    'exporters': 'Export',
    'retrieval': 'Embedding jobs and search',
    'serve': 'Serving',
    'demo': 'Demo',
    'cli': 'Command line',
}


def sidebar() -> str:
    notebooks = [
        p.relative_to(NBS)
        for p in NBS.rglob('*.ipynb')
        if not any(o.startswith(('.', '_')) for o in p.relative_to(NBS).parts)
    ]
    lines = ['website:', '  sidebar:', '    contents:', '    - index.ipynb']
    if Path('comparison.ipynb') in notebooks: lines.append('    - comparison.ipynb')
    for room, title in ROOMS.items():
        found = sorted((p for p in notebooks if p.parts[0] == room), key=lambda p: (len(p.parts) > 2, p))
        lines += [f'    - section: {title}', '      contents:', *(f'      - {p.as_posix()}' for p in found)]
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    path, text = NBS/'sidebar.yml', sidebar()
    if '--check' not in sys.argv:
        path.write_text(text, encoding='utf-8')
    elif not path.exists() or path.read_text(encoding='utf-8') != text:
        sys.exit('nbs/sidebar.yml is out of step with the notebooks: run `make export`')
