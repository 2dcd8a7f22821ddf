"""nbs/images/rooms.svg, the map of the rooms drawn from the imports: `python tools/rooms.py` writes it, `--check` fails
if it is out of step."""
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOLDS = {
    'core': 'types, errors, files', 'text': 'text to token ids', 'vision': 'image files to pixels',
    'data': 'pairs from anywhere', 'models': 'towers, losses, recall', 'runtime': 'run an artifact',
    'train': 'Lightning modules', 'exporters': 'artifact, ONNX, verify', 'retrieval': 'jobs, index, search',
    'serve': 'HTTP, gRPC, client', 'demo': 'the Gradio page', 'cli': 'mmembed ...',
}
# from top to bottom, as they are drawn
ROWS = ['cli', 'exporters demo serve', 'train retrieval', 'models data runtime', 'text vision', 'core']
TRAINING = {'text', 'vision', 'models', 'train', 'exporters'}  # what running an artifact does without
FREE = {'__init__.py', '__main__.py', '_modidx.py'}  # made by hand, or by nbdev
W, H, DX, DY = 168, 46, 214, 92


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


def uses() -> dict[str, set[str]]:
    "Return the rooms that each room imports."
    known, found = dict(modules()), {room: set() for room in HOLDS}
    for module, tree in known.items():
        room = module.split('.')[0]
        for _, target, names in imports(tree, module):
            found[room] |= {used.split('.')[0] for used in resolved(target, names, known)} - {room, ''}
    return found


def direct(used: dict[str, set[str]]) -> dict[str, set[str]]:
    "Leave out what a room reaches through another room."
    def reach(room): return used[room] | {r for u in used[room] for r in reach(u)}
    return {room: {u for u in mine if not any(u in reach(o) for o in mine - {u})} for room, mine in used.items()}


def svg() -> str:
    "Draw the rooms, an arrow from each to those that it uses."
    widest = max(len(row.split()) for row in ROWS)
    place = {}
    for y, row in enumerate(ROWS):
        rooms = row.split()
        for x, room in enumerate(rooms): place[room] = (20 + (x + (widest - len(rooms)) / 2) * DX, 20 + y*DY)
    out = ['<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif">'
           % (40 + (widest - 1)*DX + W, 40 + (len(ROWS) - 1)*DY + H),
           '<rect width="100%" height="100%" fill="#fff"/>',
           '<marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
           '<path d="M0 0L8 4L0 8z" fill="#889"/></marker>']
    for room, used in direct(uses()).items():
        for other in sorted(used):
            (x, y), (u, v) = place[room], place[other]
            ends = x + W/2, y + H, u + W/2, v
            out.append('<line x1="%g" y1="%g" x2="%g" y2="%g" stroke="#889" marker-end="url(#a)"/>' % ends)
    for room, (x, y) in place.items():
        fill = '#e8f0fe' if room in TRAINING else '#f6f1e4'
        out.append('<rect x="%g" y="%g" width="%d" height="%d" rx="6" fill="%s" stroke="#99a"/>' % (x, y, W, H, fill))
        for below, style, words in ((19, 'font-size="14" font-weight="bold"', room),
                                    (36, 'font-size="11.5" fill="#445"', HOLDS[room])):
            at = (x + W/2, y + below, style, words)
            out.append('<text x="%g" y="%g" text-anchor="middle" %s>%s</text>' % at)
    return '\n'.join([*out, '</svg>']) + '\n'


if __name__ == '__main__':
    path, text = ROOT/'nbs'/'images'/'rooms.svg', svg()
    if '--check' not in sys.argv: path.write_text(text, encoding='utf-8')
    elif not path.exists() or path.read_text(encoding='utf-8') != text:
        sys.exit('nbs/images/rooms.svg is out of step with the imports: run `make export`')
