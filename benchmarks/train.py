"""The same small CLIP trained by three loops: ours, sentence-transformers' and open_clip's; CPU seconds a pair and
recall at the end.

    python -m benchmarks.train                       # built-in scenes, 2,000 pairs, 4 epochs: the three, one after
    the other, twice
    python -m benchmarks.train --data figures --epochs 1 --rounds 1   # textbook figures (long captions, large files)
    python -m benchmarks.train --crops                                # ours and open_clip crop, an area of 0.9 to 1;
    sentence-transformers has no crops
    python -m benchmarks.train --json benchmarks/results/train.json   # a run more for that file, which
    tools/tables.py puts into the pages
    python -m benchmarks.train --one ours ...        # one of them: ours, sentence_transformers, open_clip

All begin with the same weights, see the same files in the same number of steps of the same batch size, AdamW,
warm-up and cosine, one thread and no workers, in fp32.
The CPU time is that of the loop alone: reading, decoding, tokenising, both passes, the optimizer. Recall is measured
for all by one function, on the weights each leaves,
with open_clip's own preprocessing and tokenizer. Without --crops all three see the same pixels. Needs
sentence-transformers, datasets, pandas.
"""
import argparse
import csv
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import begun

os.environ.setdefault('OMP_NUM_THREADS', '1')

CONFIG = {
    'embed_dim': 128,
    'vision_cfg': {'image_size': 64, 'layers': 4, 'width': 192, 'head_width': 64, 'patch_size': 8},
    'text_cfg': {'context_length': 77, 'vocab_size': 49408, 'width': 192, 'heads': 3, 'layers': 3},
}
WHO = ('ours', 'sentence_transformers', 'open_clip')


def prepare(folder, args):
    "Files, lists of pairs, the model in both forms."
    import torch
    if args.data == 'scenes':
        from mmembed.data.scenes import Scenes
        train, valid = Scenes(train=args.pairs, valid=400, lang='en').split()
    else:
        from benchmarks.figures import parts, source
        train, valid = parts(source())
    for name, part in (('train', train), ('valid', valid)):
        with (folder/f'{name}.csv').open('w', newline='', encoding='utf-8') as out:
            rows = csv.writer(out)
            rows.writerow(['image', 'text'])
            for i in range(min(len(part), args.pairs)):
                path = folder/f'{name}-{i}.img'
                path.write_bytes(part.image(i).numpy().tobytes())
                rows.writerow([str(path), part.text(i)])
    torch.manual_seed(0)
    (folder/'clip').mkdir()
    (folder/'clip'/'open_clip_config.json').write_text(json.dumps({'model_cfg': CONFIG, 'preprocess_cfg': {}}))
    model = known(folder, random=True)
    from safetensors.torch import save_file

    save_file(
        {k: v.clone().contiguous() for k, v in model.state_dict().items()},
        folder / 'clip' / 'open_clip_model.safetensors',
    )
    hugging_face(model.state_dict(), folder/'hf')


def known(folder, random=False):
    "The small CLIP, from its folder or with random weights."
    import open_clip
    (folder/'SmallCLIP.json').write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder/'SmallCLIP.json')
    return open_clip.create_model('SmallCLIP') if random else open_clip.create_model(f"local-dir:{folder/'clip'}")


def names_of(state):
    "(our name, its part) of each tensor in Hugging Face's form, under its name there."
    out = {
        'logit_scale': 'logit_scale',
        'text_projection.weight': 'text_projection.T',
        'visual_projection.weight': 'visual.proj.T',
        'text_model.embeddings.token_embedding.weight': 'token_embedding.weight',
        'text_model.embeddings.position_embedding.weight': 'positional_embedding',
        'vision_model.embeddings.class_embedding': 'visual.class_embedding',
        'vision_model.embeddings.patch_embedding.weight': 'visual.conv1.weight',
        'vision_model.embeddings.position_embedding.weight': 'visual.positional_embedding',
    }
    for theirs, ours in (
        ('text_model.final_layer_norm', 'ln_final'),
        ('vision_model.pre_layrnorm', 'visual.ln_pre'),
        ('vision_model.post_layernorm', 'visual.ln_post'),
    ):
        for x in ('weight', 'bias'): out[f'{theirs}.{x}'] = f'{ours}.{x}'
    for tower, stem in (('text_model', 'transformer'), ('vision_model', 'visual.transformer')):
        for k in range(sum(n.startswith(f'{stem}.resblocks.') and n.endswith('ln_1.weight') for n in state)):
            to, of = f'{tower}.encoder.layers.{k}', f'{stem}.resblocks.{k}'
            for x in ('weight', 'bias'):
                for n, name in enumerate('qkv'): out[f'{to}.self_attn.{name}_proj.{x}'] = f'{of}.attn.in_proj_{x}/{n}'
                for theirs, ours in (
                    ('self_attn.out_proj', 'attn.out_proj'),
                    ('layer_norm1', 'ln_1'),
                    ('layer_norm2', 'ln_2'),
                    ('mlp.fc1', 'mlp.c_fc'),
                    ('mlp.fc2', 'mlp.c_proj'),
                ):
                    out[f'{to}.{theirs}.{x}'] = f'{of}.{ours}.{x}'
    return out


def hugging_face(state, folder):
    "The same weights as transformers and sentence-transformers load them."
    import open_clip
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer
    v, t = CONFIG['vision_cfg'], CONFIG['text_cfg']
    size = dict(hidden_act='gelu', projection_dim=CONFIG['embed_dim'])
    model = CLIPModel(
        CLIPConfig(
            projection_dim=CONFIG['embed_dim'],
            text_config=size
            | dict(
                hidden_size=t['width'], intermediate_size=4 * t['width'], num_hidden_layers=t['layers'],
                num_attention_heads=t['heads'], eos_token_id=49407, bos_token_id=49406,
            ),
            vision_config=size
            | dict(
                hidden_size=v['width'],
                intermediate_size=4 * v['width'],
                num_hidden_layers=v['layers'],
                num_attention_heads=v['width'] // v['head_width'],
                patch_size=v['patch_size'],
                image_size=v['image_size'],
            ),
        )
    )
    def value(name):
        if name.endswith('.T'): return state[name[:-2]].T
        name, _, part = name.partition('/')
        return state[name].chunk(3)[int(part)] if part else state[name]
    left = model.load_state_dict({k: value(x).clone().contiguous() for k, x in names_of(state).items()}, strict=False)
    assert not left.unexpected_keys and all('position_ids' in k for k in left.missing_keys), left
    tokens = open_clip.tokenizer.SimpleTokenizer()
    (folder/'raw').mkdir(parents=True)
    # the other library's names for them
    special = {'<start_of_text>': '<|startoftext|>', '<end_of_text>': '<|endoftext|>'}
    (folder/'raw'/'vocab.json').write_text(json.dumps({special.get(k, k): v for k, v in tokens.encoder.items()}))
    merges = sorted(tokens.bpe_ranks, key=tokens.bpe_ranks.get)
    (folder/'raw'/'merges.txt').write_text('#version: 0.2\n' + '\n'.join(' '.join(m) for m in merges))
    CLIPTokenizer(
        str(folder / 'raw' / 'vocab.json'), str(folder / 'raw' / 'merges.txt'), model_max_length=77
    ).save_pretrained(folder)
    s = v['image_size']
    CLIPImageProcessor(size={'shortest_edge': s}, crop_size={'height': s, 'width': s}).save_pretrained(folder)
    model.save_pretrained(folder)


def back(state, like):
    "Hugging Face's weights under open_clip's names."
    import torch
    out, parts = {}, {}
    for k, x in names_of(like).items():
        if x.endswith('.T'): out[x[:-2]] = state[k].T
        elif '/' in x: parts.setdefault(x.partition('/')[0], []).append(state[k])
        else: out[x] = state[k]
    return out | {k: torch.cat(v) for k, v in parts.items()}


def rows_of(folder, name):
    with (folder/f'{name}.csv').open(newline='', encoding='utf-8') as f: return list(csv.DictReader(f))


def ours(folder, args):
    import logging
    import warnings
    import torch
    from lightning.pytorch import Trainer
    from mmembed.train.datamodule import PairData
    from mmembed.data.tables import PairsFile
    from mmembed.models.dual import DualEncoder
    from mmembed.train.modules import LitDualEncoder
    from mmembed.vision.pipeline import VisionPipeline
    warnings.filterwarnings('ignore')
    logging.getLogger('lightning.pytorch').setLevel(logging.ERROR)
    torch.manual_seed(args.seed)
    spec = VisionPipeline.from_open_clip(known(folder)).spec() | {'flip': 0.}
    model = DualEncoder.from_open_clip(f"local-dir:{folder/'clip'}", vision_pipeline=VisionPipeline.from_spec(spec))
    data = PairData(
        source=PairsFile(folder / 'train.csv'),
        valid_share=0.2,
        batch_size=args.batch,
        augment=args.crops,
        seed=args.seed,
    )
    data.train = data.source
    lit = LitDualEncoder(model, lr=args.lr, weight_decay=args.decay, warmup=0.1)
    trainer = Trainer(
        max_epochs=args.epochs, accelerator='cpu', limit_val_batches=0, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    start = time.process_time()
    trainer.fit(lit, data)
    spent = time.process_time() - start
    state = known(folder).state_dict()
    mine = model.state_dict()
    done = {k: mine[j] for k in state for j in (f'image.net.{k[7:]}', f'text.net.{k}', k) if j in mine}
    assert done.keys() == state.keys(), state.keys() - done.keys()
    return spent, trainer.global_step, done


def sentence_transformers(folder, args):
    import torch
    from datasets import Dataset
    from PIL import Image
    from sentence_transformers import (
        SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    torch.manual_seed(args.seed)
    model = SentenceTransformer(str(folder/'hf'), device='cpu')
    rows = rows_of(folder, 'train')
    data = Dataset.from_dict({k: [r[k] for r in rows] for k in ('text', 'image')})
    data.set_transform(
        lambda batch: {'text': batch['text'], 'image': [Image.open(x).convert('RGB') for x in batch['image']]}
    )
    loss = MultipleNegativesRankingLoss(
        model, scale=1 / 0.07, directions=('query_to_doc', 'doc_to_query'), partition_mode='per_direction'
    )
    options = SentenceTransformerTrainingArguments(
        output_dir=str(folder / 'st'), num_train_epochs=args.epochs, per_device_train_batch_size=args.batch,
        learning_rate=args.lr, weight_decay=args.decay, warmup_ratio=0.1, lr_scheduler_type='cosine',
        adam_beta2=0.98, max_grad_norm=0.0, dataloader_drop_last=True, save_strategy='no', report_to='none',
        disable_tqdm=True, seed=args.seed, use_cpu=True,
    )
    trainer = SentenceTransformerTrainer(model=model, args=options, train_dataset=data, loss=loss)
    start = time.process_time()
    trainer.train()
    spent = time.process_time() - start
    like = known(folder).state_dict()
    state = next(
        m for m in model.modules() if type(m).__name__ == 'CLIPModel' and hasattr(m, 'text_projection')
    ).state_dict()
    return spent, trainer.state.global_step, back(state, like)


def open_clip(folder, args):
    import torch
    from open_clip_train import main, train
    inner, spent = train.train_one_epoch, []
    def timed(*a, **k):
        start = time.process_time()
        inner(*a, **k)
        spent.append(time.process_time() - start)
    main.train_one_epoch = timed
    steps = args.epochs * (len(rows_of(folder, 'train')) // args.batch)
    main.main(
        [
            '--model',
            f"local-dir:{folder / 'clip'}",
            '--dataset-type',
            'csv',
            '--train-data',
            str(folder / 'train.csv'),
            '--csv-img-key',
            'image',
            '--csv-caption-key',
            'text',
            '--csv-separator',
            ',',
            '--batch-size',
            str(args.batch),
            '--epochs',
            str(args.epochs),
            '--lr',
            str(args.lr),
            '--wd',
            str(args.decay),
            '--beta2',
            '0.98',
            '--eps',
            '1e-8',
            '--warmup',
            str(max(1, round(0.1 * steps))),
            '--precision',
            'fp32',
            '--workers',
            '0',
            '--device',
            'cpu',
            '--logs',
            str(folder / 'logs'),
            '--name',
            'run',
            '--seed',
            str(args.seed),
            '--save-frequency',
            '1',
            '--save-most-recent',
            '--local-loss',
            # no crop fits, so torchvision takes the middle square
            *([] if args.crops else ['--aug-cfg', 'scale=(1.0,1.0)', 'ratio=(1.0,1.0)']),
        ]
    )
    state = torch.load(folder/'logs'/'run'/'checkpoints'/'epoch_latest.pt', weights_only=False)['state_dict']
    return sum(spent), steps, state


def recall(folder, state):
    "Of the weights, by open_clip's own preprocessing and tokenizer."
    import open_clip
    import torch
    from PIL import Image
    from mmembed.train.modules import judge
    model = known(folder).eval()
    model.load_state_dict(state)
    rows, look = rows_of(folder, 'valid'), open_clip.image_transform(CONFIG['vision_cfg']['image_size'], is_train=False)
    tokens = open_clip.tokenizer.SimpleTokenizer()
    with torch.no_grad():
        t, v = [], []
        for i in range(0, len(rows), 100):
            t.append(model.encode_text(tokens([r['text'] for r in rows[i:i+100]]), normalize=True))
            v.append(
                model.encode_image(
                    torch.stack([look(Image.open(r['image']).convert('RGB')) for r in rows[i : i + 100]]),
                    normalize=True,
                )
            )
    found = judge(torch.cat(t), torch.cat(v), [r['text'] for r in rows], [])['all']
    return [found[w].at[k] for w in found for k in (1, 10)]


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--data', choices=['scenes', 'figures'], default='scenes')
    for name, value in dict(pairs=2000, epochs=4, batch=64, lr=5e-4, decay=0.05, rounds=2, seed=0).items():
        a.add_argument(f'--{name}', type=type(value), default=value)
    a.add_argument('--who', default=','.join(WHO))
    a.add_argument('--crops', action='store_true')
    a.add_argument('--json', type=Path)
    a.add_argument('--one')
    a.add_argument('--folder')
    args = begun(a)
    if args.one:
        import torch
        torch.set_num_threads(1)
        spent, steps, state = globals()[args.one](Path(args.folder), args)
        print('RESULT ' + json.dumps([spent, steps, *recall(Path(args.folder), state)]))
        return
    with tempfile.TemporaryDirectory() as d:
        folder, results = Path(d), {w: [] for w in args.who.split(',')}
        prepare(folder, args)
        for k in range(args.rounds):
            for who in results:
                done = subprocess.run(
                    [
                        sys.executable,
                        '-m',
                        'benchmarks.train',
                        *sys.argv[1:],
                        '--one',
                        who,
                        '--folder',
                        d,
                        '--seed',
                        str(args.seed + k),
                    ],
                    capture_output=True,
                    text=True,
                )
                line = [s for s in done.stdout.splitlines() if s.startswith('RESULT ')]
                if not line: sys.exit(f'{who}: {done.stderr[-1500:]}')
                results[who].append(json.loads(line[0][7:]))
                subprocess.run(['rm', '-rf', str(folder/'logs'), str(folder/'st')])
        report(results, args)


COLUMNS = [
    'data', 'loop', 'pairs seen', 'CPU ms a pair', 'pairs a CPU second', 'text to image @1', '@10',
    'image to text @1', '@10',
]


def report(results, args):
    "The table, and the same as a part of the file of results."
    rows = []
    for who, runs in results.items():
        mean = [math.fsum(x) / len(runs) for x in zip(*runs)]
        each = mean[0] / (mean[1] * args.batch)
        rows.append(
            [
                f"{args.data}{', crops' if args.crops else ''}",
                who.replace('_', '-'),
                f'{mean[1] * args.batch:,.0f}',
                f'{1000 * each:.2f}',
                f'{1 / each:.1f}',
                *(f'{100 * x:.1f}' for x in mean[2:]),
            ]
        )
    print(
        f"\nbatch {args.batch}, {args.epochs} epochs, mean of {args.rounds}\n\n| {' | '.join(COLUMNS)} "
        f"|\n{'|---' * len(COLUMNS)}|"
    )
    for row in rows: print('| ' + ' | '.join(row) + ' |', flush=True)
    if not args.json: return
    file = (
        json.loads(args.json.read_text())
        if args.json.exists()
        else {'kind': 'plain', 'command': '', 'records': {'columns': COLUMNS, 'rows': []}}
    )
    said = shlex.join(
        ['python', '-m', 'benchmarks.train', *(x for x in sys.argv[1:] if x != '--json' and x != str(args.json))]
    )
    file['command'] = '; '.join(x for x in (file['command'], said) if x)
    file['records']['rows'] = [r for r in file['records']['rows'] if r[:2] not in [x[:2] for x in rows]] + rows
    args.json.write_text(json.dumps(file, indent=1) + '\n')


if __name__ == '__main__': main()
