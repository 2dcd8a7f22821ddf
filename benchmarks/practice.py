"""What a fine-tuned encoder is good for, on real data: judging pairs, classes, transfer and forgetting, names in
many languages.

    python -m benchmarks.practice match      # PairClassifier on matched against mismatched figures of one book,
    beside cosines
    python -m benchmarks.practice classes    # clothing: a PairClassifier's classes, and prompts without any training
    python -m benchmarks.practice transfer   # the encoder of figures.py finetune, fine-tuned on clothing: gained,
    forgotten, WiSE-FT
    python -m benchmarks.practice emoji      # names in seven languages, one text tower from nothing
    python -m benchmarks.practice plot FILE  # draws the table that transfer left in benchmarks/results/wise_ft.json

With --quick each takes a few rows and one epoch, to see that it works, on what `figures.py finetune ... --quick` left.

Needs what figures.py needs, and its finetune run first (match, classes, transfer). Prints tables in Markdown, which
stand in benchmarks/README.md.
"""
import json
import sys
import time

import torch
from torch import nn

from benchmarks import figures as f
from mmembed.core.types import Tokens
from mmembed.core.packing import pack
from mmembed.data.folders import ClassFolder
from mmembed.train.pair_data import Matches
from mmembed.data.tables import PairsFile
from mmembed.data.source import Subset
from mmembed.models.metrics import TEMPLATES, class_embeddings, classification
from mmembed.models.pair import PairClassifier
from mmembed.train.finetune import interpolate, lock, parameter_groups, still
from mmembed.train.modules import judge
from mmembed.train.shell import warm_cosine


def encoder(name):
    "The encoder with the weights that figures.py finetune left."
    model = f.encoder((nn.Identity(), nn.Identity()), torch.tensor(0.))
    from mmembed.models.dual import projection
    model.text_proj, model.image_proj = projection(384, 256, 512, 0.2), projection(1280, 256, 512, 0.2)
    if not (f.CACHE / f'{name}.pt').is_file():
        raise SystemExit(
            f'{name}.pt is not in {f.CACHE}: run `python -m benchmarks.figures finetune 6 256 2e-4 0` first'
        )
    saved = torch.load(f.CACHE/f'{name}.pt')
    model.load_state_dict(saved.get('state', saved))
    return model.eval()


def weights(model): return {k: v.clone() for k, v in model.state_dict().items()}


# -- matched against mismatched pairs

def pairs_of(part, epoch, seed=0, mismatches=1):
    """Rows (text, row of the part, label): every picture with its own caption, and with that of other figures of its
    book."""
    rows = Matches(part, mismatches=mismatches, near=1.0, seed=seed)
    return [(text, i // (1 + mismatches), label) for i in range(len(rows)) for text, label in [rows.pair(epoch, i)]]


def show(name, score, label, threshold):
    got = classification(torch.stack([-score, score], 1), label)
    print(
        f"| {name} | {100 * float(((score >= threshold) == label.bool()).float().mean()):.1f} | {got['auc']:.3f} |",
        flush=True,
    )


def match(epochs='3', lr='2e-4'):
    """Half the pairs are right: guessing gives 50 % and 0.5. A cosine is called a match above the median of all.

    `epochs` are those of the upper layers; 0: frozen towers alone; cosine: no classifier that begins from nothing."""
    pairs = PairsFile(f.DATA/'figures'/'pairs.jsonl', text_key='alt', group_key='section', near_key='book')
    train, valid = f.parts(pairs)
    tests, start = pairs_of(valid, 0, seed=1), time.process_time()
    label = torch.tensor([y for *_, y in tests])
    print(f'\n{len(tests)} pairs of {len(valid)} held-out figures\n\n| scores | accuracy % | AUC |\n|---|---|---|')
    held, plain = f.lower(valid, 'valid')[0], f.lower(train, 'train', f.CROPS)
    for name, file in (
        ('cosine, frozen features with trained heads', 'probe-0'),
        ('cosine, fine-tuned encoder of (a)', 'finetuned-0'),
    ):
        top = f.Top(encoder(file))
        def cosine(rows, pictures):
            texts = list(dict.fromkeys(t for t, *_ in rows))
            at = {t: n for n, t in enumerate(texts)}
            t, v = top.of_part(texts, pictures)
            return torch.stack([t[at[x]] @ v[i] for x, i, _ in rows])
        score = cosine(tests, held)
        show(name, score, label, score.median())
    for name, file in (('frozen towers', 'probe-0'), ('the towers of (a)', 'finetuned-0')):
        on_cosine(name, encoder(file), train, valid, tests, label, held, plain[0])
    if epochs == 'cosine': return
    for mismatches in (5, 1):
        torch.manual_seed(0)
        model = PairClassifier(f.minilm(), f.mobilenet(), ['mismatch', 'match'], dim=256, dropout=0.3)
        on_frozen(model, train, valid, tests, label, mismatches)
    model.image.net.features.to(memory_format=torch.channels_last)
    if int(epochs) < 1: return
    on_towers(model, train, tests, label, held, plain, int(epochs), float(lr), start)


def on_cosine(name, dual, train, valid, tests, label, held, plain, epochs=3, mismatches=5):
    """A classifier that begins at an encoder's cosine, the threshold half-way of training pairs.

    Its towers stay, what they say of the pictures as they are is computed once."""
    torch.manual_seed(0)
    model = PairClassifier.from_dual(dual, dropout=0.3).eval()
    top, rows = f.Top(model), [pairs_of(train, epoch, mismatches=mismatches) for epoch in range(epochs)]
    said = {}
    with torch.no_grad():
        texts = sorted({t for some in (*rows, tests) for t, *_ in some}, key=len)
        for i in range(0, len(texts), 59):
            said |= dict(zip(texts[i : i + 59], top.words(model.text_pipeline.tokenize(*pack(texts[i : i + 59])))))
        seen = {
            k: torch.cat([top.picture(x[i : i + 59].float()) for i in range(0, len(x), 59)])
            for k, x in (('train', plain), ('valid', held))
        }
    def scored(some, part):
        scores = model.fusion(
            torch.stack([said[t] for t, *_ in some]), torch.stack([seen[part][j] for _, j, _ in some]), MASK
        )
        return scores[:, 1] - scores[:, 0]
    def row(when):
        with torch.no_grad(): scores = scored(tests, 'valid')
        show(f'PairClassifier.from_dual, {name}, {when}', scores, label, 0.)
        show('the same, a match above the median', scores, label, scores.median())
    with torch.no_grad():
        own = scored(rows[0], 'train').view(-1, 1 + mismatches)
        model.fusion.cosine.bias += torch.tensor([.5, -.5]) * (own[:, 0].median() + own[:, 1:].median()) / 2
    row('before training')
    optimizer = torch.optim.AdamW(model.fusion.parameters(), lr=1e-4, weight_decay=0.1)
    weight = torch.tensor([1/mismatches, 1.])
    for epoch in range(epochs):
        model.train()
        for some in torch.randperm(len(rows[epoch])).split(256):
            some = [rows[epoch][j] for j in some.tolist()]
            score = scored(some, 'train')
            loss = nn.functional.cross_entropy(
                torch.stack([-score, score], 1) / 2, torch.tensor([y for *_, y in some]), weight
            )
            optimizer.zero_grad(); loss.backward(); optimizer.step()  # noqa: E702
        model.eval()
        row(f'{epoch + 1} epochs')


MASK = torch.ones(1, 1, dtype=torch.int64)  # late fusion asks for none


def on_frozen(model, train, valid, tests, label, mismatches, epochs=12):
    "The fusion alone, on what the pretrained towers say."
    ft, fv = f.features(train), f.features(valid)
    said = {p.text(i): x[0][i] for p, x in ((train, ft), (valid, fv)) for i in range(len(p))}
    optimizer, weight = (
        torch.optim.AdamW(model.fusion.parameters(), lr=1e-3, weight_decay=0.1),
        torch.tensor([1 / mismatches, 1.0]),
    )
    for epoch in range(epochs):
        model.train()
        rows = pairs_of(train, epoch, mismatches=mismatches)
        for g in optimizer.param_groups: g['lr'] = 1e-3 * warm_cosine(epoch, epochs, 0.1)
        for some in torch.randperm(len(rows)).split(256):
            some = [rows[j] for j in some.tolist()]
            scores = model.fusion(
                torch.stack([said[t] for t, *_ in some]), torch.stack([ft[1][j] for _, j, _ in some]), MASK
            )
            loss = nn.functional.cross_entropy(scores, torch.tensor([y for *_, y in some]), weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        scores = model.fusion(
            torch.stack([said[t] for t, *_ in tests]), torch.stack([fv[1][j] for _, j, _ in tests]), MASK
        )
    show(f'PairClassifier, frozen towers, {mismatches} mismatches a pair', scores[:, 1] - scores[:, 0], label, 0.)


def on_towers(model, train, tests, label, held, plain, epochs, lr, start, batch=64):
    "The upper layers of both towers, too."
    top, tp = f.Top(model), model.text_pipeline
    lock(model, [f'text-{6 - f.TEXT_CUT}', f'image-{19 - f.IMAGE_CUT}'])
    optimizer = torch.optim.AdamW(parameter_groups(model, lr, 0.05, 0.85), betas=(0.9, 0.98))
    rates, steps, step = [g['lr'] for g in optimizer.param_groups], epochs * (len(train) // batch), 0
    for epoch in range(epochs):
        still(model.train(), every=True)
        rows, order = pairs_of(train, 100 + epoch), torch.randperm(len(train)).tolist()
        for i in range(0, len(order) - batch + 1, batch):
            for g, r in zip(optimizer.param_groups, rates): g['lr'] = r * warm_cosine(step, steps, 0.1)
            mine = order[i:i+batch]
            crop = torch.randint(len(plain), (batch,)).tolist()
            texts = [rows[2*j + k][0] for k in (0, 1) for j in mine]
            tokens = tp.tokenize(*pack(texts))
            with torch.autocast('cpu', torch.bfloat16):
                v = top.picture(torch.stack([plain[c][j] for c, j in zip(crop, mine)]))
                by = tokens.mask.sum(1).argsort()
                t = torch.cat(
                    [
                        top.words(Tokens(*(x[q, : int(tokens.mask[q].sum(1).max())] for x in tokens)))
                        for q in by.split(64)
                    ]
                )[by.argsort()]
            loss = nn.functional.cross_entropy(
                model.fusion(t, torch.cat([v, v]), MASK), torch.tensor([1] * batch + [0] * batch)
            )
            optimizer.zero_grad(); loss.backward()  # noqa: E702
            nn.utils.clip_grad_norm_(model.parameters(), 5.)
            optimizer.step()
            step += 1
        model.eval()
        with torch.no_grad():
            texts = list(dict.fromkeys(t for t, *_ in tests))
            t = torch.cat([top.words(tp.tokenize(*pack(texts[i:i+59]))) for i in range(0, len(texts), 59)])
            v = torch.cat([top.picture(held[i:i+59]) for i in range(0, len(held), 59)])
            at = {x: n for n, x in enumerate(texts)}
            scores = model.fusion(
                torch.stack([t[at[x]] for x, *_ in tests]), torch.stack([v[j] for _, j, _ in tests]), MASK
            )
        show(
            f'PairClassifier, upper layers too, {epoch + 1} epochs, {time.process_time() - start:.0f} s of CPU',
            scores[:, 1] - scores[:, 0],
            label,
            0.0,
        )


# -- clothing

def clothing():
    folder = ClassFolder(f.DATA/'clothing')
    train, test = folder.split()
    if f.QUICK: train, test = (Subset(part, list(range(0, len(part), max(1, len(part)//40)))) for part in (train, test))
    return folder.classes, train, test


def numbers(part, classes): return torch.tensor([classes.index(part.label(i)) for i in range(len(part))])


def classes():
    "Ten classes; guessing gives 10 %."
    names, train, test = clothing()
    target, want = numbers(train, names), numbers(test, names)
    print(
        f'\n{len(train)} pictures for training, {len(test)} for the test\n\n| model | accuracy % | top 5 % | macro F1 '
        f'| AUC |\n|---|---|---|---|---|'
    )
    def row(name, scores):
        got = classification(scores, want)
        print(
            f"| {name} | {100 * got['accuracy']:.1f} | {100 * got['accuracy@5']:.1f} | {got['f1']:.3f} | "
            f"{got['auc']:.3f} |",
            flush=True,
        )

    for name, file in (
        ('prompts, heads of (a) on frozen towers, no clothing seen', 'probe-0'),
        ('prompts, fine-tuned encoder of (a), no clothing seen', 'finetuned-0'),
    ):
        top = f.Top(encoder(file))
        row(name, prompted(top, f.lower(test, 'clothing-test')[0], names))
    pictures, held = f.lower(train, 'clothing-train', 2), f.lower(test, 'clothing-test')[0]
    model = PairClassifier(f.minilm(), f.mobilenet(), names, dim=128, dropout=0.3)
    top, question = f.Top(model), 'which piece of clothing is this?'
    with torch.no_grad():
        model.eval()
        v = [torch.cat([top.picture(x[i:i+60].float()) for i in range(0, len(x), 60)]) for x in (*pictures, held)]
        t = top.words(model.text_pipeline([question]))
    torch.manual_seed(0)
    optimizer, mask, steps, start = (
        torch.optim.AdamW(model.fusion.parameters(), lr=1e-3, weight_decay=0.1),
        torch.ones(1, 1, dtype=torch.int64),
        200,
        time.process_time(),
    )
    model.train()
    for step in range(steps):
        for g in optimizer.param_groups: g['lr'] = 1e-3 * warm_cosine(step, steps, 0.1)
        rows, crop = torch.randint(len(train), (128,)), int(torch.randint(len(pictures), ()))
        loss = nn.functional.cross_entropy(model.fusion(t.expand(128, -1), v[crop][rows], mask), target[rows])
        optimizer.zero_grad(); loss.backward(); optimizer.step()  # noqa: E702
    model.eval()
    with torch.no_grad():
        row(
            f'PairClassifier, frozen towers, one question, {time.process_time() - start:.0f} s of CPU',
            model.fusion(t.expand(len(test), -1), v[-1], mask),
        )


def prompted(top, pictures, names):
    "Scores of pictures for classes by the mean of each class's prompts."
    model = top.model.eval()
    with torch.no_grad():
        c = class_embeddings(lambda texts: model.encode_text(model.text_pipeline(texts)), names, TEMPLATES)
        v = torch.cat([top.image(pictures[i:i+60].float()) for i in range(0, len(pictures), 60)])
    return v @ c.T * 20


# -- transfer and forgetting

def transfer(epochs='6', lr='2e-4'):
    "Fine-tuned on clothing from the encoder of (a); the mixtures of both weights, judged on both."
    names, train, test = clothing()
    figures, held = f.parts(f.source())[1], f.lower(None, 'valid')[0]
    captions = [figures.text(i) for i in range(len(figures))]
    pictures, tests, want = f.lower(train, 'clothing-train', 2), f.lower(test, 'clothing-test')[0], numbers(test, names)
    model = encoder('finetuned-0')
    before = weights(model)
    def both(top):
        found = judge(*top.of_part(captions, held), captions, [])['all']
        return [
            classification(prompted(top, tests, names), want)['accuracy'],
            *(found[w].at[k] for w in found for k in (1, 10)),
        ]

    columns, rows = (
        ['model', 'clothing: accuracy by prompts %', 'figures, text to image @1', '@10', 'image to text @1', '@10'],
        [],
    )
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    def row(name, values):
        rows.append([name, *(f'{100 * x:.1f}' for x in values)])
        print(f"| {' | '.join(rows[-1])} |", flush=True)
    row('before', both(f.Top(model)))
    generator = torch.Generator().manual_seed(0)

    def texts_of(rows):
        return [
            TEMPLATES[int(torch.randint(len(TEMPLATES), (), generator=generator))].format(train.label(i)) for i in rows
        ]

    f.fit(
        model,
        texts_of,
        pictures,
        int(epochs),
        120,
        float(lr),
        0,
        lambda name, top: print(name, file=sys.stderr, flush=True),
    )
    after = weights(model)
    for alpha in (0.25, 0.5, 0.75, 1.):
        model.load_state_dict(interpolate(before, after, alpha))
        row(f'{alpha:g} of the way' if alpha < 1 else 'after', both(f.Top(model)))
    WISE.write_text(
        json.dumps(
            {
                'kind': 'plain',
                'command': f'benchmarks/practice.py transfer {epochs}',
                'records': {'columns': columns, 'rows': rows},
            },
            indent=0,
        )
        + '\n'
    )


WISE = (f.CACHE if f.QUICK else f.ROOT/'benchmarks'/'results')/'wise_ft.json'


def plot(out):
    """The trade-off of old and new task between both weights: figures (recall@10, the mean of both directions) and
    clothing (accuracy by prompts)."""
    import matplotlib
    matplotlib.use('Agg')
    from mmembed.train.finetune import show_trade_off

    rows = [
        [float(x) for x in r[1:]]
        for r in json.loads((f.ROOT / 'benchmarks' / 'results' / 'wise_ft.json').read_text())['records']['rows']
    ]
    old, new = 'figures, recall@10, %', 'clothing, accuracy, %'
    show_trade_off(
        {'alpha': [0, 0.25, 0.5, 0.75, 1], old: [(r[2] + r[4]) / 2 for r in rows], new: [r[0] for r in rows]}, old, new
    ).savefig(out, dpi=110)


# -- names in many languages

LANGUAGES = ('en', 'de', 'fr', 'es', 'ru', 'zh', 'ja')


def emoji(epochs='25', lr='1e-3', batch='256'):
    """A fifth of the emoji held out.

    MobileNetV2 stays frozen, the text tower learns all languages from nothing, one vocabulary."""
    from mmembed.models.dual import DualEncoder
    from mmembed.models.losses import InfoNCE
    from mmembed.core.types import Embeddings
    from mmembed.models.towers import TextTransformer
    from mmembed.text.pipeline import TextPipeline
    pairs = PairsFile(f.DATA/'emoji'/'pairs.jsonl', text_key=f"name.{','.join(LANGUAGES)}", group_key='emoji')
    train, valid = pairs.split(0.2)
    if f.QUICK: train, valid, epochs, batch = Subset(pairs, train.rows[:256]), Subset(pairs, valid.rows[:128]), 1, 64
    once, start = {}, time.process_time()
    for part in (train, valid):
        for i in range(len(part)): once.setdefault(part.picture(i), part.rows[i])
    tower, files = f.mobilenet(), list(once)
    with torch.no_grad():
        v = torch.cat(
            [tower(tower.pipeline([pairs.image(once[n]) for n in files[i : i + 32]])) for i in range(0, len(files), 32)]
        )
    at = {n: k for k, n in enumerate(files)}
    print(f'pictures: {time.process_time() - start:.0f} s of CPU', file=sys.stderr)
    tp = TextPipeline.learn([train.text(i) for i in range(len(train))], vocab_size=4000, max_length=32)
    torch.manual_seed(0)
    model = DualEncoder(TextTransformer(tp, width=192, depth=2, heads=4), tower, dim=128, hidden=256, dropout=0.2)
    lock(model, ['image'])
    optimizer, loss_of, batch = (
        torch.optim.AdamW(parameter_groups(model, float(lr), 0.05), betas=(0.9, 0.98)),
        InfoNCE(),
        int(batch),
    )
    picture = torch.tensor([at[train.picture(i)] for i in range(len(train))])
    steps, step = int(epochs) * (len(train) // batch), 0
    def image(x): return nn.functional.normalize(model.image_proj(x), dim=1)
    for epoch in range(int(epochs)):
        model.train()
        order, total = torch.randperm(len(train)), 0.
        for rows in order.split(batch):
            if len(rows) < batch: continue
            for g in optimizer.param_groups: g['lr'] = float(lr) * warm_cosine(step, steps, 0.1)
            tokens = tp.tokenize(*pack([train.text(i) for i in rows.tolist()]))
            out = Embeddings(model.encode_text(tokens), image(v[picture[rows]]), model.logit_scale.exp())
            loss = loss_of(out, tokens, None, picture[rows])
            optimizer.zero_grad(); loss.backward(); optimizer.step()  # noqa: E702
            step, total = step + 1, total + loss.item()
        print(
            f'{epoch + 1} epochs, loss {total / (len(train) // batch):.2f}, {time.process_time() - start:.0f} s of CPU',
            file=sys.stderr,
            flush=True,
        )
    model.eval()
    texts = [valid.text(i) for i in range(len(valid))]
    with torch.no_grad():
        t = torch.cat([model.encode_text(tp.tokenize(*pack(texts[i : i + 256]))) for i in range(0, len(texts), 256)])
    with torch.no_grad(): w = image(v[torch.tensor([at[valid.picture(i)] for i in range(len(valid))])])
    found = judge(
        t, w, texts, [valid.kind(i) for i in range(len(valid))], [valid.picture(i) for i in range(len(valid))]
    )
    some = found['all']['text_to_image']
    print(
        f"\n{some.gallery} held-out emoji, {len(texts)} names\n\n| names | queries | text to image @1 | @5 | @10 | "
        f"image to text @1 | @5 | @10 |\n|---|---|---|---|---|---|---|---|"
    )
    for kind, ways in found.items():
        print(
            f"| {kind} | {ways['text_to_image'].queries} | "
            + ' | '.join(f'{100 * r.at[k]:.1f}' for r in ways.values() for k in (1, 5, 10))
            + ' |'
        )
    print(
        '| chance | | '
        + ' | '.join(f'{100 * r.chance[k]:.1f}' for r in found['all'].values() for k in (1, 5, 10))
        + ' |'
    )


if __name__ == '__main__':
    torch.set_num_threads(1)
    {'match': match, 'classes': classes, 'transfer': transfer, 'plot': plot, 'emoji': emoji}[sys.argv[1]](
        *(a for a in sys.argv[2:] if a != '--quick')
    )
