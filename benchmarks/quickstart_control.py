"""Is the quickstart's recall real? Train it on the captions as they are and on captions dealt out again at random.

    python -m benchmarks.quickstart_control [--trainer.max_epochs 12 ...]     # about twice the quickstart's time

The control's loss can fall (it may memorise), but on held-out pairs its recall must be that of guessing. Prints a
table in Markdown.

Run once at ten epochs (each run 189 s of CPU on a busy machine with 2 cores), a gallery of 1,000 distinct held-out
captions:

| captions | direction | combinations | queries | @1 | @5 | @10 | median rank |
|---|---|---|---|---|---|---|---|
| true | text to image | all | 1,000 | 71.4 % | 99.3 % | 99.9 % | 1 |
| true | image to text | all | 1,000 | 72.0 % | 99.3 % | 99.9 % | 1 |
| true | text to image | unseen | 250 | 68.4 % | 98.4 % | 99.6 % | 1 |
| true | image to text | unseen | 250 | 72.0 % | 98.4 % | 99.6 % | 1 |
| shuffled | text to image | all | 1,000 | 0.1 % | 0.5 % | 0.7 % | 491 |
| shuffled | image to text | all | 1,000 | 0.3 % | 0.7 % | 1.0 % | 508 |
| shuffled | text to image | unseen | 250 | 0.4 % | 0.8 % | 0.8 % | 480 |
| shuffled | image to text | unseen | 250 | 0.4 % | 1.2 % | 1.2 % | 570 |
| chance | | | | 0.1 % | 0.5 % | 1.0 % | 500 |
"""
import os
import sys
import time
from pathlib import Path

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')  # before torch: threads that wait must not spin

from mmembed.train.run import run  # noqa: E402

CONFIG = Path(__file__).resolve().parents[1]/'configs'/'quickstart.yaml'


def measured(*argv):
    "Recall of one run, and its seconds of wall and CPU time, workers included."
    import resource

    def cpu():
        return sum(
            r.ru_utime + r.ru_stime for r in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        )
    wall, before = time.perf_counter(), cpu()
    result = run(['--config', str(CONFIG), *argv])
    return result.recall, time.perf_counter() - wall, cpu() - before


def row(name, recall, kind, way):
    r = recall[kind][way]
    at = ' | '.join(f'{100*v:.1f} %' for v in r['at'].values())
    return f"| {name} | {way.replace('_', ' ')} | {kind} | {r['queries']:,} | {at} | {r['median_rank']:.0f} |"


def main(argv):
    lines = [
        '| captions | direction | combinations | queries | @1 | @5 | @10 | median rank |',
        '|---|---|---|---|---|---|---|---|',
    ]
    for name, extra in [('true', []), ('shuffled', ['--data.shuffle_captions', 'true'])]:
        recall, wall, cpu = measured('--name', f'control-{name}', *extra, *argv)
        lines += [row(name, recall, kind, way) for kind in recall for way in recall[kind]]
        print(f'{name}: {wall:.0f} s, {cpu:.0f} s of CPU', flush=True)
    chance = recall['all']['text_to_image']['chance']
    gallery = recall['all']['text_to_image']['gallery']
    print(
        '\n'.join(
            [
                *lines,
                f"| chance | | | | {' | '.join(f'{100 * v:.1f} %' for v in chance.values())} | {(gallery + 1) / 2:.0f} "
                f"|",
            ]
        )
    )


if __name__ == '__main__': main(sys.argv[1:])
