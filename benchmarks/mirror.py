"""What mirrored images do to captions: `configs/pairs.yaml` on the textbook figures, with flips and without.

    python -m benchmarks.mirror SEED FLIP [EPOCHS]    # FLIP: 0 or 0.5; wants MMEMBED_DATA

Prints recall over all held-out pairs and over those whose caption says left or right, and how often the image of such a
caption is nearer to it than the same image in a mirror (50 %: the model does not know left from right)."""
import os
import re
import sys
from pathlib import Path

import torch

from mmembed.train.run import run

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get('MMEMBED_DATA') or ROOT.parent/'shared'/'data')/'figures'/'pairs.jsonl'


def recall(scores, k):
    "Share of rows whose own column is among the `k` highest."
    own = scores.diagonal()[:, None]
    return ((scores > own).sum(1) < k).float().mean().item()


@torch.no_grad()
def main(seed, flip, epochs='10'):
    result = run(
        [
            '--config',
            str(ROOT / 'configs' / 'pairs.yaml'),
            '--name',
            f'mirror-{flip}-{seed}',
            '--data.path',
            str(DATA),
            '--data.text_key',
            'alt',
            '--data.group_key',
            'section',
            '--seed_everything',
            seed,
            '--trainer.max_epochs',
            epochs,
            '--trainer.enable_progress_bar',
            'false',
            '--model.model.image.pipeline.init_args.augmentation.flip',
            flip,
        ]
    )
    model, valid = result.model, result.data.valid
    levels = torch.stack([model.vision_pipeline.preprocess(valid.image(i)) for i in range(len(valid))])
    text = torch.cat([model.encode_text(model.text_pipeline([valid.text(i)])) for i in range(len(valid))])
    straight, mirrored = (
        torch.cat([model.encode_image(model.vision_pipeline.normalize(x)) for x in some.split(64)])
        for some in (levels, levels.flip(3))
    )
    sides = torch.tensor([bool(re.search(r'\b(left|right)\b', valid.text(i), re.I)) for i in range(len(valid))])
    scores = text @ straight.T
    own, other = (text * straight).sum(1), (text * mirrored).sum(1)
    row = lambda of: ' / '.join(f'{100*recall(s, k):.1f}' for s in (of, of.T) for k in (1, 10))
    right = (own > other).float()
    print(
        f'| {flip} | {seed} | {row(scores)} | {row(scores[sides][:, sides])} | {100 * right[sides].mean():.1f} of '
        f'{int(sides.sum())} | '
        f'{100 * right[~sides].mean():.1f} of {int((~sides).sum())} |',
        flush=True,
    )


if __name__ == '__main__': main(*sys.argv[1:])
