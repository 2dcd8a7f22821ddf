"""Measured tables from what the benchmarks wrote: `python tools/tables.py` writes them between their markers,
`--check` fails if a page is out of step.

A benchmark's `--json benchmarks/results/NAME.json` leaves {"kind", "command", "records"}. Where a page has

    <!-- table NAME -->
    <!-- /table -->

the table of that file goes between. A kind of table is a function from the records to columns and rows; a benchmark
that needs none of its own
writes the kind "plain", whose records are {"columns": [...], "rows": [[...], ...]}.
"""
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT/'benchmarks'/'results'
PAGES = ['benchmarks/README.md', 'nbs/index.ipynb', 'nbs/comparison.ipynb']
TEXT = {
    'ours, scripted': 'scripted',
    'ours, List[str]': '`List[str]` entry',
    'ours, eager': 'eager',
    'tokenizers': '`tokenizers`',
    'scripted loop': 'scripted character loop',
    'ours, C++': 'ours from C++',
}
VISION = {
    "mmembed, resize='pillow', scripted": 'mmembed, `resize="pillow"`',
    'OpenCV, area, a batch': 'OpenCV, area resize',
    'transformers CLIPImageProcessor (fast)': 'transformers `CLIPImageProcessor` (fast)',
    'MATXScript, a batch': 'MATXScript, area resize',
    'NVIDIA DALI (CPU), a batch': 'NVIDIA DALI on the CPU',
}


def plain(records) -> tuple[list, list]:
    return records['columns'], records['rows']


def text(records) -> tuple[list, list]:
    "Records {captions, batch, ms, ratios: {contestant: its time / ours}} of benchmarks/text.py."
    names = list(records[0]['ratios'])
    rows = [
        [r['captions'], f"{r['batch']:,}", f"{r['ms']:.3f}", *(f"{r['ratios'][n]:.2f}" for n in names)] for r in records
    ]
    return ['captions', 'batch', 'ours, ms', *(TEXT.get(n, n) for n in names)], rows


def vision(records) -> tuple[list, list]:
    """Records {side, threads, name, ratio: times as fast as the first contender} of benchmarks/vision.py, the
    quickest first."""
    base, columns = records[0]['name'], list(dict.fromkeys((r['threads'], r['side']) for r in records))
    names = list(dict.fromkeys(r['name'] for r in records if r['name'] != base))
    at = {(r['name'], r['threads'], r['side']): f"{r['ratio']:.2f}" for r in records}
    heads = [
        f'{f"{t} threads: " if t > 1 and s == min(o for u, o in columns if u == t) else ""}{s:,} px' for t, s in columns
    ]
    return ['contender', *heads], [[VISION.get(n, n), *(at.get((n, *c), '') for c in columns)] for n in names]


SERVERS = dict(mmembed="mmembed", litserve="LitServe", infinity="infinity", ray="Ray Serve", clip="CLIP-as-service")


def serve(records) -> tuple[list, list]:
    """Records {server, items, concurrency, rate, cpu_ms, p50_ms, p99_ms} of benchmarks/serve.py.

    The server `raw` is the artifact itself. The highest rate is bold."""
    names = [n for n in SERVERS if any(r["server"] == n for r in records)]
    at = {(r["server"], r["items"], r.get("concurrency")): r for r in records if "rate" in r}
    def cell(r, best):
        if not r: return ""
        rate = f"**{r['rate']:.1f}**" if r["rate"] == best else f"{r['rate']:.1f}"
        return f"{rate} · {r['cpu_ms']:.1f}" + (f" · {r['p50_ms']:.0f} / {r['p99_ms']:.0f}" if "p50_ms" in r else "")
    rows = []
    for items, n in dict.fromkeys((r["items"], r["concurrency"]) for r in records if "concurrency" in r):
        found = [at.get((s, items, n)) for s in names]
        best = max(r["rate"] for r in found if r)
        rows.append([items, n, cell(at.get(("raw", items, None)), 0), *(cell(r, best) for r in found)])
    return ["items", "at once", "the artifact alone", *(SERVERS[n] for n in names)], rows


KINDS = dict(serve=serve, plain=plain, text=text, vision=vision)


def table(name: str) -> str:
    "The Markdown of one file of results."
    file = json.loads((RESULTS/f'{name}.json').read_text(encoding='utf-8'))
    columns, rows = KINDS[file['kind']](file['records'])
    return '\n'.join('| ' + ' | '.join(map(str, row)) + ' |' for row in [columns, *rows]).replace(
        '|\n', '|\n' + '|---' * len(columns) + '|\n', 1
    )


def filled(page: str) -> str:
    "`page` with its tables anew. Raises `FileNotFoundError` for one that has no results."
    return re.sub(
        r'(<!-- table ([\w-]+) -->\n).*?(<!-- /table -->)',
        lambda m: f'{m[1]}\n{table(m[2])}\n\n{m[3]}',
        page,
        flags=re.S,
    )


def renewed(path: Path) -> tuple[str, str]:
    "What the page says, and what it should say; of a notebook its Markdown cells."
    said = path.read_text(encoding='utf-8')
    if path.suffix != '.ipynb': return said, filled(said)
    nb = json.loads(said)
    for c in nb['cells']:
        if c['cell_type'] == 'markdown' and '<!-- table ' in (source := ''.join(c['source'])):
            c['source'] = filled(source).splitlines(keepends=True)
    return said, json.dumps(nb, ensure_ascii=False, indent=1) + '\n' if nb != json.loads(said) else said


if __name__ == '__main__':
    for name in PAGES:
        path = ROOT/name
        if not path.exists(): continue
        said, should = renewed(path)
        if said == should: continue
        if '--check' in sys.argv:
            sys.exit(f'{name} is out of step with benchmarks/results: run `python tools/tables.py`')
        path.write_text(should, encoding='utf-8')
