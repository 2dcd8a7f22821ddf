"""A million vectors, 512 wide: how long an index takes to build, what it holds, how fast and how right it answers.

    python benchmarks/search.py                          # one million; about an hour on one busy core, 8 GB of disk below --work
    python benchmarks/search.py --rows 100000 --only lance_flat lance_ivf_pq faiss_hnsw

Stopped and started again it goes on with the contenders that have no result below --work yet.

The vectors are made around real ones: frozen MiniLM and MobileNetV2 with heads of 512 trained on textbook figures (see figures.py)
embed the figures' training part, pictures and captions, and 25,014 captions of photographs. A made vector is a real one plus
a step along the difference of two other real ones, 0.2 to 0.6 long, scaled to length 1: what is generated keeps the directions in which real
vectors differ. Queries are the held-out figures of other sections, half pictures and half captions, real and never a source.

Each contender runs in a process of its own on one core, one query at a time; recall@10 is against the exact answer of numpy.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('LANCE_CPU_THREADS', '2')  # with one, lancedb 0.40 waits for ever when it builds a graph
os.environ.setdefault('LANCE_LOG', 'error')
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402

DIM, CHUNK = 512, 10_000


def real():
    "Real vectors float32 (N, 512) to make others around, and held-out ones for queries."
    import gzip
    import torch
    from benchmarks import figures as f
    from mmembed.core import pack
    torch.set_num_threads(1)
    train, valid = f.parts(f.source())
    ft, fv, cache = f.features(train, 'train'), f.features(valid, 'valid'), f.CACHE/'coco.pt'
    if not cache.is_file():
        lines = gzip.open(f.DATA/'text'/'coco_captions.txt.gz', 'rt', encoding='utf-8').read().splitlines()
        tower = f.minilm()
        order, out = sorted(range(len(lines)), key=lambda i: len(lines[i])), [None]*len(lines)
        with torch.no_grad():
            for i in range(0, len(order), 64):
                for j, v in zip(order[i:i+64], tower(tower.pipeline.tokenize(*pack([lines[j] for j in order[i:i+64]])))): out[j] = v
        torch.save(torch.stack(out), cache)
    heads, _ = f.heads(ft, dim=DIM)
    with torch.no_grad(): unit = lambda head, x: torch.nn.functional.normalize(head(x), dim=1)
    with torch.no_grad():
        base = torch.cat([unit(heads[0], ft[0]), unit(heads[1], ft[1]), unit(heads[0], torch.load(cache))])
        queries = torch.cat([unit(heads[0], fv[0]), unit(heads[1], fv[1])])
    return base.numpy(), queries.numpy()


def made(base, rows, seed=0):
    "Chunks of vectors float32 (n, 512) around `base`."
    for k, start in enumerate(range(0, rows, CHUNK)):
        rng, n = np.random.default_rng([seed, k]), min(CHUNK, rows - start)
        a, b, c = rng.integers(0, len(base), (3, n))
        step = base[b] - base[c]
        step *= rng.uniform(.2, .6, (n, 1)).astype('f') / np.maximum(np.linalg.norm(step, axis=1, keepdims=True), 1e-6)
        x = base[a] + step
        yield x / np.linalg.norm(x, axis=1, keepdims=True)


CONTENDERS = {
    'lance_flat': 'LanceDB, every row', 'lance_ivf_pq': 'LanceDB IVF_PQ', 'lance_ivf_sq': 'LanceDB IVF_SQ', 'lance_hnsw_sq': 'LanceDB HNSW_SQ',
    'faiss_flat': 'FAISS flat', 'faiss_hnsw': 'FAISS HNSW'}


def resident(peak=False):
    "MiB of this process; its own pages, and those of files it has mapped."
    if peak: return int(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))) / 1024  # ru_maxrss outlives an exec
    return int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20


def vectors_file(work, rows):
    "The made vectors on disk, with the real queries and their exact neighbours, computed once."
    data, truth = work/f'vectors-{rows}.npy', work/f'truth-{rows}.npz'
    if truth.is_file(): return
    base, queries = real()
    queries = queries[np.random.default_rng(0).permutation(len(queries))[:1000]]
    out = np.lib.format.open_memmap(data, 'w+', 'f4', (rows, DIM))
    best, names = np.full((len(queries), 10), -2, 'f'), np.zeros((len(queries), 10), 'i8')
    for k, x in enumerate(made(base, rows)):
        out[k*CHUNK:k*CHUNK + len(x)] = x
        score = np.concatenate([best, queries @ x.T], 1)
        index = np.concatenate([names, np.broadcast_to(np.arange(k*CHUNK, k*CHUNK + len(x)), (len(queries), len(x)))], 1)
        top = np.argpartition(-score, 9, 1)[:, :10]
        best, names = np.take_along_axis(score, top, 1), np.take_along_axis(index, top, 1)
    out.flush()
    np.savez(truth, queries=queries, ids=names)


def rates(ask, queries, truth, most, knobs):
    "Recall@10 and queries a second, one at a time, in at most so many seconds."
    ask(queries[0])
    start, cpu, found = time.perf_counter(), time.process_time(), 0
    for n, (q, right) in enumerate(zip(queries, truth), 1):
        found += len(set(ask(q)) & set(right.tolist()))
        if time.perf_counter() - start > most: break
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    return dict(knobs=knobs, recall=found / (10*n), queries=n, qps=n / wall, cpu_ms=1e3 * cpu / n)


def lance(kind, work, rows, most):
    import pyarrow as pa
    from mmembed.index import Index
    folder, x = work/f'lance-{rows}', np.load(work/f'vectors-{rows}.npy', mmap_mode='r')
    truth = np.load(work/f'truth-{rows}.npz')
    card = work/'model.pt'
    out = {}
    if not (folder/'items.lance').is_dir():
        def batches():
            for i in range(0, rows, CHUNK):
                part = np.ascontiguousarray(x[i:i + CHUNK])
                ids = pa.array([str(j) for j in range(i, i + len(part))])
                yield pa.RecordBatch.from_pydict(dict(id=ids, vector=pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), DIM)))
        first = next(batches())
        start = time.perf_counter()
        Index.build(named_model(card), pa.RecordBatchReader.from_batches(first.schema, batches()), folder)
        (work/f'lance-{rows}.json').write_text(json.dumps(dict(ingest=time.perf_counter() - start, ingest_peak=resident(True))))
    index = Index(folder)
    out |= json.loads((work/f'lance-{rows}.json').read_text())
    before, start, cpu = resident(), time.perf_counter(), time.process_time()
    if kind != 'flat':
        import lancedb.index as kinds
        from mmembed.index import KINDS
        more = dict(num_partitions=max(1, rows >> (20 if 'hnsw' in kind else 12)))
        if 'hnsw' in kind: more |= dict(m=16, ef_construction=100)
        if kind.endswith('pq'): more |= dict(num_sub_vectors=DIM // 8)
        index._table.create_index('vector', config=getattr(kinds, KINDS[kind])(distance_type='cosine', **more), replace=True, name='vector_idx')
    out |= dict(build=time.perf_counter() - start, build_cpu=time.process_time() - cpu, peak=resident(True), disk=index.info()['bytes'] / 2**20)
    steps = [dict(nprobes=1, refine=0, ef=0)]
    if kind.startswith('ivf'): steps = [dict(nprobes=n, refine=5 if kind.endswith('pq') else 2, ef=0) for n in (4, 8, 16, 32, 64)]
    if kind.startswith('hnsw'): steps = [dict(nprobes=1, refine=2, ef=e) for e in (32, 64, 128, 256)]
    def asking(knobs): return lambda q: [int(r['id']) for r in index._nearest(q, 10, None, kind == 'flat', knobs)]
    out['rates'] = [rates(asking(s), truth['queries'], truth['ids'], most, s) for s in steps]
    return out | dict(serving=resident() - before)


def named_model(path):
    "The card of an artifact is all that an index of ready vectors wants; this one's vectors are 512 wide."
    if not path.is_file():
        import torch
        import mmembed as mm
        tp = mm.TextPipeline.learn(['a red circle', 'a blue square'], vocab_size=100, max_length=16)
        model = mm.DualEncoder(mm.TextTransformer(tp, width=32, depth=1, heads=2), mm.ConvNet(mm.VisionPipeline(size=64), channels=(8, 16), width=32), dim=DIM)
        mm.export(model.eval(), path, fresh=False, cpp=False)
    return path


def faiss(kind, work, rows, most):
    import faiss
    faiss.omp_set_num_threads(1)
    x, truth = np.load(work/f'vectors-{rows}.npy', mmap_mode='r'), np.load(work/f'truth-{rows}.npz')
    before, start, cpu = resident(), time.perf_counter(), time.process_time()
    index = faiss.IndexFlatIP(DIM) if kind == 'flat' else faiss.IndexHNSWFlat(DIM, 16, faiss.METRIC_INNER_PRODUCT)
    if kind == 'hnsw': index.hnsw.efConstruction = 40
    for i in range(0, rows, CHUNK):
        index.add(np.ascontiguousarray(x[i:i + CHUNK]))
        if kind == 'hnsw' and i % (10 * CHUNK) == 0: print(f'{i + CHUNK:,} rows, {time.perf_counter() - start:.0f} s', file=sys.stderr, flush=True)
    out = dict(ingest=0., build=time.perf_counter() - start, build_cpu=time.process_time() - cpu)
    del x
    out |= dict(serving=resident() - before, peak=resident(True), rates=[])
    path = work/f'faiss-{kind}-{rows}.index'
    for ef in [0] if kind == 'flat' else [16, 32, 64, 128, 256]:
        if ef: index.hnsw.efSearch = ef
        out['rates'].append(rates(lambda q: index.search(q[None], 10)[1][0].tolist(), truth['queries'], truth['ids'], most, dict(ef=ef)))
    faiss.write_index(index, str(path))
    out['disk'] = path.stat().st_size / 2**20
    path.unlink()
    return out


def table(found, rows):
    print(f'\n{rows:,} vectors, {DIM} wide; one thread, one query at a time; recall@10 of held-out real queries\n')
    print('| store | knobs | build | of CPU | peak memory | held while asked | on disk | recall@10 | queries/s | CPU a query |\n|---|---|---|---|---|---|---|---|---|---|')
    for name, r in found.items():
        for i, q in enumerate(r['rates']):
            knobs = ', '.join(f'{k} {v}' for k, v in q['knobs'].items() if v) or '-'
            head = f"{r['ingest'] + r['build']:,.0f} s | {r['build_cpu']:,.0f} s | {r['peak']:,.0f} MiB | {r['serving']:,.0f} MiB | {r['disk']:,.0f} MiB" if i == 0 else '| | | |'
            print(f"| {CONTENDERS[name] if i == 0 else ''} | {knobs} | {head} | {q['recall']:.3f} | {q['qps']:,.1f} | {q['cpu_ms']:.1f} ms |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', type=int, default=1_000_000)
    parser.add_argument('--only', nargs='*', choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument('--work', type=Path, default=Path('runs/search'))
    parser.add_argument('--seconds', type=float, default=30, help='of queries for each setting, at most')
    parser.add_argument('--one', choices=list(CONTENDERS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.one:
        library, _, kind = args.one.partition('_')
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        result = (lance if library == 'lance' else faiss)(kind, args.work, args.rows, args.seconds)
        (args.work/f'{args.one}-{args.rows}.json').write_text(json.dumps(result))
        return
    vectors_file(args.work, args.rows)
    found = {}
    for name in args.only:
        if not (args.work/f'{name}-{args.rows}.json').is_file(): subprocess.run([sys.executable, __file__, '--one', name, '--rows', str(args.rows), '--work', str(args.work), '--seconds', str(args.seconds)], check=True)
        found[name] = json.loads((args.work/f'{name}-{args.rows}.json').read_text())
        table({name: found[name]}, args.rows)
    table(found, args.rows)


if __name__ == '__main__': main()
