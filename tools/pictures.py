"""Pictures in the outputs of notebooks, with a palette: `python tools/pictures.py` rewrites those of more than 20 kB, a
third to a fifth of what matplotlib saves; `--check` fails where one has more than 80 kB (DPI, or a photo)."""
import base64
import io
import json
import sys
from pathlib import Path

from PIL import Image

NBS = Path(__file__).resolve().parent.parent/'nbs'
SMALL, LARGEST = 20_000, 80_000  # bytes


def with_palette(png: bytes) -> bytes:
    "Return the picture in 256 colours, or as it was where that is not smaller."
    image = Image.open(io.BytesIO(png))
    if image.mode == 'P': return png
    out = io.BytesIO()
    small = image.convert('RGB').quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
    small.save(out, 'png', optimize=True)
    return min(png, out.getvalue(), key=len)


def pictures(notebook: dict):
    "Yield the outputs that hold a PNG file, and the file."
    for cell in notebook['cells']:
        for output in cell.get('outputs', ()):
            if data := output.get('data', {}).get('image/png'): yield output['data'], base64.b64decode(''.join(data))


if __name__ == '__main__':
    wrong = []
    for path in sorted(NBS.rglob('*.ipynb')):
        if '.ipynb_checkpoints' in path.parts: continue
        text = path.read_text(encoding='utf-8')
        notebook, changed = json.loads(text), False
        for data, png in pictures(notebook):
            small = with_palette(png) if len(png) > SMALL and '--check' not in sys.argv else png
            if small != png: data['image/png'], changed = base64.b64encode(small).decode(), True
            if len(small) > LARGEST: wrong.append(f'{path.relative_to(NBS)}: a picture of {len(small)/1000:.0f} kB')
        if changed: path.write_text(json.dumps(notebook, ensure_ascii=False, indent=1) + '\n', encoding='utf-8')
    if wrong: sys.exit('\n'.join(wrong))
