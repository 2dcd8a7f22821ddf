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
W, H, DX, DY = 168, 46, 214, 92


def uses() -> dict[str, set[str]]:
    "Return the rooms that each room imports."
    found = {room: set() for room in HOLDS}
    for path in (ROOT/'mmembed').rglob('*.py'):
        inside = path.relative_to(ROOT/'mmembed').parts
        if len(inside) == 1: continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom): continue
            up = [*inside[:-1]][:len(inside) - node.level] if node.level else []
            parts = [*up, *(node.module or '').split('.')] if node.level else (node.module or '').split('.')[1:]
            if (node.level or (node.module or '').startswith('mmembed.')) and parts and parts[0] in HOLDS:
                found[inside[0]].add(parts[0])
    return {room: used - {room} for room, used in found.items()}


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
