"""Is the quickstart's recall real? Train it on the captions as they are and on captions dealt out again at random.

    python benchmarks/quickstart_control.py [--trainer.max_epochs 12 ...]     # about twice the quickstart's time

The control's loss can fall (it may memorise), but on held-out pairs its recall must be that of guessing. Prints a table in Markdown.
"""
import os
import sys
import time
from pathlib import Path

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')  # before torch: waiting threads that spin cost five times the time on a busy machine

from mmembed.train import run  # noqa: E402

CONFIG = Path(__file__).resolve().parents[1]/'configs'/'quickstart.yaml'


def measured(*argv):
    "Recall of one run, and its seconds of wall and CPU time, workers included."
    import resource
    def cpu(): return sum(r.ru_utime + r.ru_stime for r in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
    wall, before = time.perf_counter(), cpu()
    result = run(['--config', str(CONFIG), *argv])
    return result.recall, time.perf_counter() - wall, cpu() - before


def row(name, recall, kind, way):
    r = recall[kind][way]
    at = ' | '.join(f'{100*v:.1f} %' for v in r['at'].values())
    return f"| {name} | {way.replace('_', ' ')} | {kind} | {r['queries']:,} | {at} | {r['median_rank']:.0f} |"


def main(argv):
    lines = ['| captions | direction | combinations | queries | @1 | @5 | @10 | median rank |', '|---|---|---|---|---|---|---|---|']
    for name, extra in [('true', []), ('shuffled', ['--data.shuffle_captions', 'true'])]:
        recall, wall, cpu = measured('--name', f'control-{name}', *extra, *argv)
        lines += [row(name, recall, kind, way) for kind in recall for way in recall[kind]]
        print(f'{name}: {wall:.0f} s, {cpu:.0f} s of CPU', flush=True)
    chance = recall['all']['text_to_image']['chance']
    gallery = recall['all']['text_to_image']['gallery']
    print('\n'.join([*lines, f"| chance | | | | {' | '.join(f'{100*v:.1f} %' for v in chance.values())} | {(gallery + 1)/2:.0f} |"]))


if __name__ == '__main__': main(sys.argv[1:])
