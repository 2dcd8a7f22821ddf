"Whole runs: from a configuration to a checkpoint that stands alone; resuming; what a user's mistakes say."
import csv
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from mmembed.data.scenes import Scenes
from mmembed.models.dual import DualEncoder
from mmembed.models.towers import ConvNet, TextTransformer
from mmembed.train.finetune import parameter_groups
from mmembed.train.modules import image_numbers, plain_recall
from mmembed.cli.main import main
from mmembed.train.pair_data import LabelData
from mmembed.train.evaluate import evaluate, judged_data, show_recall
from mmembed.train.checkpoint import load_checkpoint, training_record
from mmembed.train.config import new_folder
from mmembed.train.run import prepare, run
from mmembed.train.modules import judge
from mmembed.train.shell import warm_cosine
from mmembed.text.pipeline import TextPipeline
from mmembed.vision.pipeline import VisionPipeline

from tests.helpers import HANG, built_once, until

ROOT = Path(__file__).resolve().parents[2]
TINY = """
name: tiny
vocab_size: 150
data:
  source: {class_path: mmembed.data.scenes.Scenes, init_args: {train: 96, valid: 40}}
  batch_size: 32
model:
  model:
    class_path: mmembed.models.dual.DualEncoder
    init_args:
      dim: 16
      text:
        class_path: mmembed.models.towers.TextTransformer
        init_args: {tokenizer: learn, width: 32, depth: 1, max_length: 40}
      image:
        class_path: mmembed.models.towers.ConvNet
        init_args:
          channels: [8, 16]
          width: 32
          pipeline: {class_path: mmembed.vision.pipeline.VisionPipeline, init_args: {size: 32, flip: 0}}
trainer:
  max_epochs: 2
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: 1
"""
SMALL = ['--config', 'tiny.yaml']


@pytest.fixture
def work(tmp_path, monkeypatch):
    "An empty working folder of its own, with the tiny configuration."
    (tmp_path/'settings.ini').write_text('[mmembed]\nruns_path = out\nseed = 5\n')
    (tmp_path/'tiny.yaml').write_text(TINY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def embed(model, data, n=8):
    with torch.no_grad():
        return (model.encode_text(model.text_pipeline([data.valid.text(i) for i in range(n)])),
                model.encode_image(model.vision_pipeline([data.valid.image(i) for i in range(n)])))


def table(source, folder, n=60):
    for i in range(n): (folder/f'{i}.jpg').write_bytes(bytes(source.image(i).tolist()))
    with (folder/'pairs.csv').open('w', newline='', encoding='utf-8') as f:
        csv.writer(f).writerows([['image', 'text'], *([f'{i}.jpg', source.text(i)] for i in range(n))])
    return folder/'pairs.csv'


def test_a_run_and_its_checkpoint(work):
    result = run(SMALL)
    assert result.folder == work/'out'/'tiny' and result.checkpoint.name == 'best.ckpt'
    assert {'config.yaml', 'tokenizer.json', 'best.ckpt', 'last.ckpt', 'logs'} <= {
        p.name for p in result.folder.iterdir()
    }
    assert (
        list((result.folder / 'logs').glob('events*'))
        and 'train/loss' in (result.folder / 'logs' / 'metrics.csv').read_text()
    )
    some = result.recall['all']['text_to_image']
    assert some['queries'] == some['gallery'] == 40 and some['chance']['1'] == pytest.approx(1/40)
    assert {k: v['text_to_image']['queries'] for k, v in result.recall.items()} == {'all': 40, 'seen': 30, 'unseen': 10}
    (result.folder/'tokenizer.json').unlink()  # the checkpoint needs no other file
    again = load_checkpoint(result.checkpoint)
    for a, b in zip(embed(result.model, result.data), embed(again, result.data), strict=True): assert a.equal(b)
    text, image = embed(again, result.data, 40)
    found = judge(text, image, [result.data.valid.text(i) for i in range(40)], [])['all']
    assert {str(k): v for k, v in found['text_to_image'].at.items()} == pytest.approx(some['at'], abs=0.051)


def test_a_checkpoint_loads_in_a_process_of_its_own(work):
    result = run([*SMALL, '--trainer.max_steps', '2'])
    code = (
        "import json, sys, torch; from mmembed.train.checkpoint import load_checkpoint; m = "
        "load_checkpoint(sys.argv[1])\n"
        "with torch.no_grad(): print(json.dumps(m.encode_text(m.text_pipeline(['a red ring', '红色'])).tolist()))"
    )
    out = subprocess.run(
        [sys.executable, '-c', code, result.checkpoint], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    with torch.no_grad(): want = result.model.encode_text(result.model.text_pipeline(['a red ring', '红色']))
    assert torch.allclose(torch.tensor(json.loads(out.splitlines()[-1])), want, atol=1e-6)


@pytest.fixture
def fixed(work):
    "The tiny configuration with a tokenizer of its own, so that a run depends on nothing but its seed."
    TextPipeline.learn([Scenes(96, 0).text(i) for i in range(96)], vocab_size=150).to_tokenizer_file(
        work / 'tokenizer.json'
    )
    return [*SMALL, '--model.model.text.tokenizer', 'tokenizer.json']


def test_runs_repeat(fixed):
    a, b = (run([*fixed, '--trainer.max_epochs', '1', '--data.workers', w]) for w in ('0', '1'))
    assert (a.folder.name, b.folder.name) == ('tiny', 'tiny-2')
    assert all(x.equal(y) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True))
    c = run([*fixed, '--trainer.max_epochs', '1', '--seed_everything', '6'])
    assert not a.model.text_proj.weight.equal(c.model.text_proj.weight)


def test_the_kept_configuration_repeats_the_run(work):
    a = run([*SMALL, '--trainer.max_steps', '3', '--model.lr', '0.002'])
    b = run(['--config', str(a.folder/'config.yaml')])
    assert all(x.equal(y) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True))


def test_a_resumed_run_ends_where_an_unbroken_one_does(fixed):
    argv = [*fixed, '--trainer.max_epochs', '4']
    whole = run(argv)
    half = run([*argv, '--name', 'half', '--trainer.callbacks+=tests.train.test_run.StopAfterTwo'])
    rest = run([*argv, '--name', 'rest', '--resume', str(half.folder/'last.ckpt')])
    a, b, c = (torch.load(r.folder/'last.ckpt', weights_only=True) for r in (whole, rest, half))
    assert (a['epoch'], b['epoch'], c['epoch']) == (3, 3, 1) and a['global_step'] == b['global_step'] == 12
    assert all(torch.allclose(a['state_dict'][k], b['state_dict'][k], atol=1e-6) for k in a['state_dict'])
    assert not torch.allclose(
        a['state_dict']['model.image.head.weight'], c['state_dict']['model.image.head.weight'], atol=1e-4
    )


def losses(folder):
    "{step: loss} as the run logged it; a step that was done twice must have had the same loss."
    found = {}
    for row in csv.DictReader((folder/'logs'/'metrics.csv').open()):
        if row['train/loss']: found[int(row['step'])] = row['train/loss']
    return found


def test_a_run_that_was_killed_goes_on_as_if_nothing_had_been(fixed, work):
    """SIGKILL from outside in the middle of an epoch, with crops and two workers.

    The same losses and the same weights in the end."""
    import os
    import signal

    text = (
        (work / 'tiny.yaml')
        .read_text()
        .replace('flip: 0', 'flip: 0.5, scale: [0.5, 1.0]')
        .replace('train: 96', 'train: 320')
    )
    (work/'tiny.yaml').write_text(text)
    argv = [*fixed, '--data.workers', '2', '--save_every', '3', '--trainer.max_epochs', '2']
    whole = run([*argv, '--name', 'whole'])
    slow = [*argv, '--name', 'killed', '--trainer.callbacks+=tests.train.test_run.Waits']
    threads = torch.get_num_threads()  # sums depend on it, and another test may have changed it here
    program = (
        f'import sys, torch; sys.path.insert(0, {str(ROOT)!r}); torch.set_num_threads({threads})\n'
        f'from mmembed.train.run import run\nrun({slow!r})'
    )
    process = subprocess.Popen(
        [sys.executable, '-W', 'ignore', '-c', program],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    last = work/'out'/'killed'/'last.ckpt'
    def in_the_second_epoch():  # ten steps each, saved after every third
        assert process.poll() is None, process.stderr.read()[-2000:]
        try: return torch.load(last, weights_only=True)['global_step'] == 15
        except (OSError, RuntimeError, EOFError): return False
    try: until(in_the_second_epoch)
    finally: os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    saved = torch.load(last, weights_only=True)['global_step']
    assert 10 < saved < 20 and saved % 10
    rest = run([*argv, '--name', 'rest', '--resume', str(last)])
    assert losses(rest.folder).items() <= losses(whole.folder).items() and min(losses(rest.folder)) == saved
    a, b = (torch.load(r.folder/'last.ckpt', weights_only=True) for r in (whole, rest))
    assert a['global_step'] == b['global_step'] == 20
    assert all(a['state_dict'][k].equal(b['state_dict'][k]) for k in a['state_dict'])


def test_evaluation_of_a_checkpoint(work):
    result = run(SMALL)
    for name in ('best.ckpt', 'best.safetensors'):
        found = evaluate(result.folder/name)
        assert found['recall'] == json.loads(json.dumps(result.recall)) and 0 < found['map']['text_to_image'] < 1
    table(Scenes(train=60, valid=0), work, 60)
    other = evaluate(
        result.checkpoint, ['--data.source', 'null', '--data.path', 'pairs.csv', '--data.valid_share', '0.5']
    )
    assert other['recall']['all']['text_to_image']['gallery'] not in (0, 40)
    with pytest.raises(ValueError, match='bath_size'): evaluate(result.checkpoint, ['--data.bath_size', '3'])
    (work/'alone').mkdir()
    (result.folder/'best.ckpt').rename(work/'alone'/'best.ckpt')
    with pytest.raises(FileNotFoundError, match='configuration that the run kept'): evaluate(work/'alone'/'best.ckpt')


def saved(path): return torch.load(path, weights_only=True)


def pairs_of(source, folder, name='pairs.csv', rows=range(60)):
    "A table of these rows, its images in a folder of its own name."
    (folder/name).with_suffix('').mkdir()
    for i in rows: (folder/name).with_suffix('').joinpath(f'{i}.jpg').write_bytes(bytes(source.image(i).tolist()))
    with (folder/name).open('w', newline='', encoding='utf-8') as f:
        csv.writer(f).writerows([['image', 'text'], *([f'{Path(name).stem}/{i}.jpg', source.text(i)] for i in rows)])
    return name


def test_another_file_is_judged_whole_and_beside_its_own_name(work, capsys):
    source = Scenes(train=120, valid=0)
    (
        pairs_of(source, work),
        pairs_of(source, work, 'other.csv', range(60, 100)),
        pairs_of(source, work, 'few.csv', range(100, 103)),
    )
    result = run(
        [
            *SMALL,
            '--data.source',
            'null',
            '--data.path',
            'pairs.csv',
            '--data.valid_share',
            '0.3',
            '--trainer.max_epochs',
            '1',
        ]
    )
    ckpt = str(result.checkpoint)
    def judged(*argv):
        capsys.readouterr()
        assert main(['eval', ckpt, *argv]) == 0
        said = capsys.readouterr().out
        out = work/said.rpartition('figures: ')[2].strip()
        return out.name, json.loads(out.read_text()), said
    own, figures, said = judged()
    assert (
        own == 'best.json'
        and figures['data']['rows'] == len(result.data.valid) < 40
        and figures['data']['part'] == 'valid'
    )
    assert (
        f'judged: {len(result.data.valid)} rows of pairs.csv, split valid' in said
        and figures['step'] == saved(ckpt)['global_step']
    )
    for name, rows in (('other', 40), ('few', 3)):  # of three rows a share would leave none
        out, found, said = judged('--data.path', f'{name}.csv')
        assert (
            out == f'best.{name}.csv.json'
            and found['recall']['all']['text_to_image']['queries'] <= rows == found['data']['rows']
        )
        assert found['data']['part'] == 'all' and f'judged: {rows} rows of {name}.csv, split all' in said
    assert json.loads((result.folder/'best.json').read_text()) == figures  # as it was
    (work/'deep').mkdir()
    (work/'other').rename(work/'deep'/'other')
    (work/'other.csv').rename(work/'deep'/'other.csv')
    assert judged('--data.path', 'deep/other.csv')[0] == 'best.other.csv.2.json'  # another file of that name
    share, found, _ = judged('--data.path', 'deep/other.csv', '--part', 'valid')
    assert share == 'best.other.csv.valid.json' and found['data']['rows'] < 40
    for same in (str(work/'pairs.csv'), 'deep/../pairs.csv'): assert judged('--data.path', same)[0] == 'best.json'
    assert judged('--part', 'train')[1]['data']['rows'] == len(result.data.train)
    for k, v in (('valid_share', '0.9'), ('group_key', 'text'), ('split_file', 'split.csv')):
        with pytest.raises(ValueError, match=f'--data.{k} would divide the data of the run anew'):
            evaluate(ckpt, [f'--data.{k}', v])
    with pytest.raises(ValueError, match='has no rows for test: give test_path'): evaluate(ckpt, part='test')


def test_the_third_part_is_judged(work, capsys):
    source = Scenes(train=60, valid=0)
    pairs_of(source, work)
    groups = [f'pairs/{i}.jpg,{"train" if i < 30 else "valid" if i < 48 else "test"}\n' for i in range(60)]
    (work/'split.csv').write_text('group,part\n' + ''.join(groups))
    result = run(
        [
            *SMALL,
            '--data.source',
            'null',
            '--data.path',
            'pairs.csv',
            '--data.split_file',
            'split.csv',
            '--trainer.max_epochs',
            '1',
        ]
    )
    assert main(['eval', str(result.checkpoint), '--part', 'test']) == 0
    assert (
        'judged: 12 rows of pairs.csv, split test' in capsys.readouterr().out
        and (result.folder / 'best.test.json').is_file()
    )
    assert len(evaluate(result.checkpoint)['recall']) and evaluate(result.checkpoint)['data']['rows'] == 18


def test_files_of_their_own_for_validation_and_test(work):
    source = Scenes(train=80, valid=0)
    names = [
        pairs_of(source, work, f'{name}.csv', rows)
        for name, rows in (('train', range(40)), ('valid', range(40, 60)), ('test', range(60, 75)))
    ]
    files = [x for k, v in zip(('path', 'valid_path', 'test_path'), names) for x in (f'--data.{k}', v)]
    result = run([*SMALL, '--data.source', 'null', *files, '--trainer.max_epochs', '1'])
    assert (len(result.data.train), result.recall['all']['image_to_text']['gallery']) == (
        40,
        len({source.text(i) for i in range(40, 60)}),
    )
    found = evaluate(result.checkpoint, part='test')
    assert found['data'] | {'options': 0} == {
        'path': str(work / 'test.csv'),
        'part': 'test',
        'other': False,
        'options': 0,
        'rows': 15,
        'skipped': 0,
    }
    pairs_of(source, work, 'late.csv', range(75, 80))
    assert evaluate(result.checkpoint, ['--data.test_path', 'late.csv'])['data']['rows'] == 5
    assert evaluate(result.checkpoint, ['--data.path', 'late.csv'])['data']['rows'] == 5


def test_classes_are_numbered_as_the_model_numbers_them(work):
    pairs_of(Scenes(train=8, valid=0), work, rows=range(8))
    lines = (work/'pairs.csv').read_text().splitlines()
    (work / 'pairs.csv').write_text(
        '\n'.join([lines[0] + ',label', *(f'{x},{"bc"[i % 2]}' for i, x in enumerate(lines[1:]))])
    )
    data, _ = judged_data(
        LabelData,
        {'path': 'none.csv', 'label_key': 'label', 'classes': ['a', 'b', 'c']},
        ['--data.path', 'pairs.csv'],
        None,
    )
    assert [data.valid.pair(0, i)[1] for i in range(4)] == [1, 2, 1, 2]


def test_the_kept_configuration_is_right_in_every_folder(work, monkeypatch):
    pairs_of(Scenes(train=60, valid=0), work)
    result = run(
        [
            *SMALL,
            '--data.source',
            'null',
            '--data.path',
            'pairs.csv',
            '--data.valid_share',
            '0.3',
            '--trainer.max_epochs',
            '1',
        ]
    )
    want = evaluate(result.checkpoint)
    (work/'elsewhere').mkdir()
    monkeypatch.chdir(work/'elsewhere')
    (work/'elsewhere'/'pairs.csv').write_text('image,text\n')  # what a relative path would find here
    assert evaluate(result.checkpoint) == want
    again = run(['--config', str(result.folder/'config.yaml'), '--name', 'again'])
    assert all(
        x.equal(y) for x, y in zip(again.model.state_dict().values(), result.model.state_dict().values(), strict=True)
    )


def test_figures_say_which_step_they_were_measured_at(work, capsys):
    "Ten steps an epoch, validated after the second: what is saved in between carries no figures of other weights."
    argv = [
        *SMALL,
        '--data.source.train',
        '320',
        '--trainer.check_val_every_n_epoch',
        '2',
        '--save_every',
        '5',
        '--trainer.callbacks+=tests.train.test_run.Keeps',
    ]
    result = run([*argv, '--trainer.max_epochs', '4'])
    notes = {n: json.loads((result.folder/f'{n}.json').read_text()) for n in (5, 15, 25, 35)}
    assert [note['measured_at'] for note in notes.values()] == [None, None, 20, 20] and [
        note['step'] for note in notes.values()
    ] == [5, 15, 25, 35]
    note = saved(result.folder/'last.ckpt')['mmembed']
    assert (
        note['measured_at'] == note['step'] == 40
        and note['recall'] == saved(result.folder / 'last.ckpt')['mmembed']['recall']
    )
    best = saved(result.checkpoint)
    assert best['mmembed']['measured_at'] == best['mmembed']['step'] == best['global_step'] in (20, 40)
    for ending in ('.ckpt', '.safetensors'):
        record = training_record(result.checkpoint.with_suffix(ending))
        assert record['metrics'] == result.recall and record['counts'] == {
            'epochs': best['global_step'] // 10,
            'steps': best['global_step'],
        }
    stale = saved(result.folder/'last.ckpt')
    stale['mmembed']['step'] = 45
    torch.save(stale, result.folder/'last.ckpt')
    assert training_record(result.folder/'last.ckpt')['metrics'] == {}


@pytest.mark.parametrize(
    'options, steps',
    [
        (['--trainer.max_epochs', '1'], 3),
        (['--trainer.max_epochs', '3'], 9),
        (['--trainer.max_steps', '4', '--trainer.max_epochs', '-1'], 4),
        (['--trainer.max_epochs', '1', '--trainer.limit_train_batches', '2'], 2),
        (['--trainer.max_epochs', '4', '--trainer.callbacks+=tests.train.test_run.StopAfterTwo'], 6),
    ],
    ids=lambda x: ' '.join(x)[10:40] if isinstance(x, list) else '',
)
def test_every_run_ends_with_a_validation(work, options, steps):
    result = run([*SMALL, '--trainer.check_val_every_n_epoch', '5', *options])
    assert result.checkpoint.name == 'best.ckpt' and result.checkpoint.with_suffix('.safetensors').is_file()
    note = saved(result.checkpoint)['mmembed']
    assert (
        note['measured_at'] == note['step'] == steps
        and result.recall['all']['text_to_image']['queries'] == note['recall']['all']['text_to_image']['queries'] > 0
    )


def test_a_resumed_run_remembers_the_best(fixed, work, capsys):
    argv = [*fixed, '--trainer.max_epochs', '1']
    first = run(argv)
    best, last = first.folder/'best.ckpt', first.folder/'last.ckpt'
    content = saved(best)
    content['mmembed']['recall']['all']['text_to_image']['at']['1'] = 0.97  # no later epoch comes near
    torch.save(content, best)
    capsys.readouterr()
    rest = run([*fixed, '--trainer.max_epochs', '3', '--resume', str(last)])
    assert 'the best so far: recall@1 0.970 at step 3' in capsys.readouterr().out
    assert (
        rest.folder != first.folder
        and rest.checkpoint == rest.folder / 'best.ckpt'
        and rest.recall['all']['text_to_image']['at']['1'] == 0.97
    )
    assert all(
        x.equal(y)
        for x, y in zip(rest.model.state_dict().values(), load_checkpoint(best).state_dict().values(), strict=True)
    )
    assert saved(rest.folder/'last.ckpt')['global_step'] == 9
    more = run([*fixed, '--trainer.max_epochs', '4', '--resume', str(rest.folder/'last.ckpt')])  # and once more
    assert more.recall['all']['text_to_image']['at']['1'] == 0.97
    other = run([*fixed, '--trainer.max_epochs', '2', '--resume', str(last), '--data.source.valid', '44'])
    assert (
        'is not taken over: other rows are validated on now' in capsys.readouterr().out
        and other.recall['all']['text_to_image']['at']['1'] < 0.97
    )
    best.unlink()
    assert run([*fixed, '--trainer.max_epochs', '2', '--resume', str(last)]).checkpoint.is_file()
    assert 'best.ckpt is gone' in capsys.readouterr().out


def test_a_finished_run_says_so(fixed):
    done = run([*fixed, '--trainer.max_epochs', '1'])
    with pytest.raises(ValueError, match='has done its 1 epochs, nothing is left to train: --trainer.max_epochs 2'):
        run([*fixed, '--trainer.max_epochs', '1', '--resume', str(done.folder/'last.ckpt')])
    with pytest.raises(ValueError, match='has done its 3 steps, nothing is left to train: --trainer.max_steps 4'):
        run([*fixed, '--trainer.max_epochs', '9', '--trainer.max_steps', '3', '--resume', str(done.folder/'last.ckpt')])


def test_what_no_run_can_go_on_from(fixed):
    done = run([*fixed, '--trainer.max_epochs', '1'])
    with pytest.raises(
        ValueError, match='best.safetensors holds the weights alone: --resume wants the .ckpt beside it'
    ):
        run([*fixed, '--resume', str(done.folder/'best.safetensors')])
    content = {k: v for k, v in saved(done.folder/'last.ckpt').items() if k != 'optimizer_states'}
    torch.save(content, 'weights.ckpt')
    with pytest.raises(ValueError, match='weights.ckpt does not hold the state of an optimizer'):
        run([*fixed, '--resume', 'weights.ckpt'])
    for argv, message in [
        (['--model.model.text.max_length', '32'], r'model.text.pipeline.max_length was 40 in the run and is 32 now'),
        (['--model.model.image.pipeline.size', '48'], r'model.image.pipeline.size was \[32, 32\]'),
        (['--model.lock', '[image]'], r"lock was \[\] in the run to resume and is \['image'\] now"),
    ]:
        with pytest.raises(ValueError, match=message): run([*fixed, *argv, '--resume', str(done.folder/'last.ckpt')])
    # only training sees it
    run([*fixed, '--model.model.image.pipeline.flip', '0.5', '--resume', str(done.folder/'last.ckpt')])


def test_a_resumed_run_has_the_tokenizer_of_its_own(work):
    "Ten more rows would give another vocabulary of the same size."
    source = Scenes(train=90, valid=0)
    pairs_of(source, work)
    argv = [*SMALL, '--data.source', 'null', '--data.path', 'pairs.csv', '--data.valid_share', '0.3']
    first = run([*argv, '--trainer.max_epochs', '1'])
    with (work / 'pairs.csv').open('a') as f:
        f.writelines(f'pairs/{i}.jpg,quick brown foxes jump over lazy dogs {i}\n' for i in range(40))
    rest = run([*argv, '--resume', str(first.folder/'last.ckpt')])
    assert rest.model.text_pipeline.spec() == first.model.text_pipeline.spec() and rest.folder != first.folder
    a, b = (json.loads((r.folder/'tokenizer.json').read_text()) for r in (first, rest))
    assert a | {'truncation': 0} == b | {'truncation': 0}  # this is the model's own in the second
    fresh = run([*argv, '--trainer.max_epochs', '1'])
    assert fresh.model.text_pipeline.spec() != first.model.text_pipeline.spec()
    with pytest.raises(ValueError, match='model.text.pipeline.tokenizer is not the one that the run had'):
        run(
            [
                *argv,
                '--model.model.text.tokenizer',
                str(fresh.folder / 'tokenizer.json'),
                '--resume',
                str(first.folder / 'last.ckpt'),
            ]
        )


def test_the_rate_of_the_configuration_is_used_on_resume(fixed):
    first = run([*fixed, '--trainer.max_epochs', '1', '--model.layer_decay', '0.9'])
    rest = run(
        [
            *fixed,
            '--trainer.max_epochs',
            '2',
            '--model.layer_decay',
            '0.9',
            '--model.lr',
            '0',
            '--model.weight_decay',
            '0.3',
            '--resume',
            str(first.folder / 'last.ckpt'),
        ]
    )
    a, b = (saved(r.folder/'last.ckpt') for r in (first, rest))
    assert b['global_step'] == 6 and all(
        a['state_dict'][k].equal(v) for k, v in b['state_dict'].items() if 'num_batches' not in k and 'running' not in k
    )
    assert {g['weight_decay'] for g in b['optimizer_states'][0]['param_groups']} == {0, 0.3}
    assert {g['weight_decay'] for g in a['optimizer_states'][0]['param_groups']} == {0, 0.05}
    kept = (rest.folder/'config.yaml').read_text()
    assert 'lr: 0.0' in kept or 'lr: 0\n' in kept


@pytest.mark.parametrize('task', ['retrieval', 'match'])
def test_a_loss_that_is_no_number_ends_the_run(work, capsys, task):
    text = (work/'tiny.yaml').read_text()
    if task == 'match':
        text = text.replace('models.dual.DualEncoder', 'models.pair.PairClassifier').replace(
            'dim: 16', 'labels: [mismatch, match]'
        )
    (work/'tiny.yaml').write_text(f'task: {task}\n{text}')
    assert (
        main(
            [
                'train',
                *SMALL,
                '--model.lr',
                '1e30',
                '--model.warmup',
                '0',
                '--save_every',
                '1',
                '--trainer.max_epochs',
                '3',
            ]
        )
        == 1
    )
    said = capsys.readouterr().err
    assert (
        re.match(r'mmembed: error: the (loss|weights) became (NaN|infinite)', said)
        and 'try a lower --model.lr than 1e+30' in said
        and '\n' not in said.strip()
    )
    for file in (work / 'out' / 'tiny').glob('*.ckpt'):
        assert all(v.isfinite().all() for v in load_checkpoint(file).state_dict().values())


def test_batches_of_one_pair_are_refused(work):
    for argv in (
        ['--data.batch_size', '1'],
        ['--data.source.train', '1'],
        [
            '--data.batch_size', '1', '--model.loss', 'mmembed.models.losses.SigmoidLoss',
            '--model.model.logit_bias', '-10',
        ],
    ):
        with pytest.raises(ValueError, match='a contrastive loss compares the pairs of a batch and wants 2 at least'):
            run([*SMALL, *argv, '--model.model.text.tokenizer', own(work)])


def own(work):
    "A tokenizer file of its own."
    TextPipeline.learn([Scenes(96, 0).text(i) for i in range(96)], vocab_size=150).to_tokenizer_file(
        work / 'tokenizer.json'
    )
    return 'tokenizer.json'


def test_averages_adapters_and_early_stops(fixed, work):
    result = run(
        [*fixed, '--model.ema', '0.5', '--model.lora_rank', '2', '--model.lock', '[image]', '--trainer.max_epochs', '1']
    )
    note, weights = (
        torch.load(result.checkpoint, weights_only=True)['mmembed'],
        load_checkpoint(result.checkpoint).state_dict(),
    )
    assert note['lora'] == {'rank': 2, 'alpha': 16, 'towers': ['text']} and not any('lora' in k for k in weights)
    start = prepare(fixed).model.model.state_dict()
    assert weights['image.stem.weight'].equal(start['image.stem.weight'])
    assert not weights['text.blocks.0.qkv.weight'].equal(start['text.blocks.0.qkv.weight'])
    saved = torch.load(result.checkpoint, weights_only=True)
    assert not saved['state_dict']['model.text_proj.weight'].equal(
        saved['current_model_state']['model.text_proj.weight']
    )
    result = run([*fixed, '--patience', '1', '--trainer.max_epochs', '30', '--model.lr', '0'])
    assert torch.load(result.folder/'last.ckpt', weights_only=True)['epoch'] == 1


def test_the_average_of_the_weights_has_its_decay(fixed):
    "The first step's weights, then `ema` parts of the average and the rest of the newest weights, step by step."
    cli, weights = (
        prepare([*fixed, '--model.ema', '0.7', '--trainer.max_steps', '3', '--trainer.limit_val_batches', '0']),
        [],
    )
    weight = cli.model.model.text_proj.weight
    cli.model.on_train_batch_end = lambda *_: weights.append(weight.detach().clone())
    cli.trainer.fit(cli.model, cli.datamodule)
    want = weights[0]
    for w in weights[1:]: want = 0.7 * want + 0.3 * w
    kept = torch.load(cli.folder/'last.ckpt', weights_only=True)['state_dict']['model.text_proj.weight']
    assert len(weights) == 3 and torch.allclose(kept, want, atol=1e-7) and (weights[2] - want).abs().max() > 1e-4


def test_layers_learn_at_the_rates_of_the_configuration(fixed):
    cli = prepare(
        [
            *fixed,
            '--model.layer_decay',
            '0.5',
            '--model.lr',
            '0.004',
            '--trainer.max_steps',
            '1',
            '--trainer.limit_val_batches',
            '0',
        ]
    )
    cli.trainer.fit(cli.model, cli.datamodule)
    rate, model = (
        {id(p): g['initial_lr'] for g in cli.trainer.optimizers[0].param_groups for p in g['params']},
        cli.model.model,
    )
    assert rate[id(model.logit_scale)] == rate[id(model.text_proj.weight)] == 0.004
    block, bottom = rate[id(model.text.blocks[0].qkv.weight)], min(rate[id(p)] for p in model.text.parameters())
    # the norm above the block stands between
    assert bottom == pytest.approx(block / 2) and block == pytest.approx(0.004 / 4)


def test_the_best_checkpoint_has_the_highest_figure(work):
    "Right three times in four, then once in four: the first is the best, and patience runs out with the second."
    (work / 'tiny.yaml').write_text(
        TINY.replace(
            'models.dual.DualEncoder\n    init_args:\n',
            'models.pair.PairClassifier\n    init_args:\n      labels: [mismatch, match]\n',
        )
    )
    result = run(
        [
            *SMALL,
            '--task',
            'match',
            '--data.mismatches',
            '3',
            '--patience',
            '1',
            '--trainer.max_epochs',
            '4',
            '--trainer.callbacks+=tests.train.test_run.WorseAndWorse',
        ]
    )
    assert result.checkpoint.name == 'best.ckpt' and result.figures['accuracy'] == 0.75
    assert [torch.load(result.folder/f'{name}.ckpt', weights_only=True)['epoch'] for name in ('best', 'last')] == [0, 1]


def test_a_learning_rate_is_found(fixed, capsys):
    "It is in the kept configuration, and a resumed run does not look for another."
    argv = [*fixed, '--find_lr', 'true', '--data.batch_size', '2']
    result = run([*argv, '--trainer.max_epochs', '1'])
    assert 'learning rate ' in capsys.readouterr().out and result.checkpoint.is_file()
    rest = run([*argv, '--trainer.max_epochs', '2', '--resume', str(result.folder/'last.ckpt')])
    assert 'learning rate ' not in capsys.readouterr().out
    kept, again = (yaml.safe_load((r.folder/'config.yaml').read_text()) for r in (result, rest))
    used = saved(rest.folder/'last.ckpt')['optimizer_states'][0]['param_groups'][0]['initial_lr']
    assert kept['model']['lr'] == again['model']['lr'] == used != 1e-3 and not kept['find_lr'] and not again['find_lr']


def test_a_teacher_is_followed(fixed):
    from mmembed.train.modules import LitDualEncoder
    from lightning.pytorch import Trainer
    cli = prepare(fixed)
    teacher = prepare([*fixed, '--seed_everything', '9']).model.model
    lit = LitDualEncoder(cli.model.model, lr=3e-3, teacher=teacher, distill_weight=10.)
    trainer = Trainer(
        max_epochs=6, accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )
    first = []
    lit.on_train_batch_end = lambda *_: first.append(float(trainer.callback_metrics['train/distill']))
    trainer.fit(lit, cli.datamodule)
    assert first[-1] < 0.6 * first[0] and not any('teacher' in k for k in lit.state_dict())


def test_a_table_of_pairs_by_the_command_line(work):
    table(Scenes(train=60, valid=0), work)
    result = run(
        [
            *SMALL,
            '--data.source',
            'null',
            '--data.path',
            'pairs.csv',
            '--data.valid_share',
            '0.3',
            '--trainer.max_steps',
            '2',
        ]
    )
    assert list(result.recall) == ['all'] and len(result.data.train) + len(result.data.valid) == 60


def test_broken_images_in_a_run(work, capsys):
    table(Scenes(train=60, valid=0), work)
    for name in ('7.jpg', '30.jpg'): (work/name).write_bytes((work/name).read_bytes()[:200])
    argv = [
        *SMALL,
        '--data.source',
        'null',
        '--data.path',
        'pairs.csv',
        '--data.batch_size',
        '8',
        '--trainer.max_epochs',
        '1',
    ]
    result = run(argv)
    assert set(result.data.ledger) == {'7.jpg', '30.jpg'}
    said = capsys.readouterr().out
    assert '2 images could not be read and were skipped' in said and '30.jpg: ' in said
    with pytest.raises(ValueError, match=r'^(7|30)\.jpg: '): run([*argv, '--data.on_error', 'raise'])


def test_what_a_run_leaves_out_is_listed_in_its_folder(work, capsys):
    path = table(Scenes(train=60, valid=0), work)
    (work/'7.jpg').write_bytes((work/'7.jpg').read_bytes()[:200])
    (work/'30.jpg').unlink()
    rows = list(csv.reader(path.open(newline='', encoding='utf-8')))
    rows[5 + 1][1], rows[9 + 1][1] = '', str(['a red ring', 'a ring that is red'])
    with path.open('w', newline='', encoding='utf-8') as f: csv.writer(f).writerows(rows)
    result = run(
        [
            *SMALL,
            '--data.source',
            'null',
            '--data.path',
            'pairs.csv',
            '--data.batch_size',
            '8',
            '--trainer.max_epochs',
            '1',
        ]
    )
    listed = [json.loads(line) for line in (result.folder/'failures.jsonl').read_text().splitlines()]
    assert (
        {x['name'] for x in listed} == {'5.jpg', '7.jpg', '30.jpg'}
        and len(listed) == 3
        and {x['name']: x['reason'] for x in listed} == dict(result.data.ledger)
    )
    assert len(result.data.train) + len(result.data.valid) == 61 - 2
    said = capsys.readouterr().out
    assert (
        '1 row has no caption and was left out:\n  5.jpg: there is no caption' in said
        and '30.jpg: there is no file ' in said
    )
    clean = run([*SMALL, '--trainer.max_steps', '1'])
    assert not (clean.folder/'failures.jsonl').exists()


def test_shuffled_captions_by_option(work):
    cli = prepare([*SMALL, '--data.shuffle_captions', 'true'])
    assert type(cli.datamodule.train).__name__ == 'Shuffled'


def test_the_vocabulary_is_learnt_from_training_captions_alone(work):
    rows = [('x.jpg', f'word{"abcdefghij"[i % 10]} only{i}') for i in range(200)]
    (work/'x.jpg').write_bytes(bytes(Scenes(1, 0).image(0).tolist()))
    (work/'pairs.csv').write_text('image,text\n' + ''.join(f'{a},{b}\n' for a, b in rows))
    cli = prepare(
        [
            *SMALL,
            '--data.source',
            'null',
            '--data.path',
            'pairs.csv',
            '--data.group_key',
            'text',
            '--vocab_size',
            '5000',
        ]
    )
    tp = cli.model.model.text_pipeline
    train = {w for t in cli.datamodule.captions() for w in t.split()}
    valid = {w for i in range(len(cli.datamodule.valid)) for w in cli.datamodule.valid.text(i).split()} - train
    assert len(valid) > 5
    whole = set(json.loads((cli.folder/'tokenizer.json').read_text())['model']['vocab'])
    assert not valid & whole and len(train & whole) > 100 and tp.vocab_size == len(whole)


MISTAKES = [
    (['--config', 'none.yaml'], 'does not exist: .*none.yaml'),
    (['--config', 'broken.yaml'], 'Problems parsing'),
    (['--config', 'empty.yaml'], 'not a configuration, .*the file is empty'),
    (['--config', 'words.yaml'], 'not a configuration, .*just words'),
    ([*SMALL, '--data.bath_size', '3'], 'unrecognized arguments: --data.bath_size'),
    ([*SMALL, '--model.lr', 'fast'], 'Parser key "model.lr": Expected a float. Got value: fast'),
    ([*SMALL, '--data.source.lang', 'fr'], r"data.source \(Scenes\): .*Got value: fr"),
    ([*SMALL, '--data.path', 'x.csv'], 'wants either path, the name of the data, or source'),
    ([*SMALL, '--data.source', 'null', '--data.path', 'none.csv'], 'no such file: none.csv'),
    ([*SMALL, '--data.source', 'null', '--data.path', 'empty.csv'], 'empty.csv holds no rows'),
    ([*SMALL, '--data.source', 'null', '--data.path', 'gone.csv'], 'gone.csv, line 2: no image file'),
    ([*SMALL, '--model.model.text.tokenizer', 'none.json'], 'no tokenizer file none.json'),
    ([*SMALL, '--resume', 'none.ckpt'], 'no checkpoint none.ckpt'),
    ([*SMALL, '--task', 'translate'], 'task must be one of retrieval, match, classify, got translate'),
    ([*SMALL, '--model.lock', '[images]'], "cannot lock 'images'"),
]


@pytest.mark.parametrize('argv, message', MISTAKES, ids=[m for _, m in MISTAKES])
def test_mistakes_are_one_sentence(work, argv, message):
    (work/'broken.yaml').write_text('data: [1,\n x: {')
    (work/'words.yaml').write_text('just words')
    (work/'empty.yaml').write_text('')
    (work/'empty.csv').write_text('image,text\n')
    (work/'gone.csv').write_text('image,text\nx.jpg,a cat\n')
    with pytest.raises((ValueError, OSError), match=message) as e: run(argv)
    assert '\n' not in str(e.value) and len(str(e.value)) < 300
    assert not (work/'out').exists()  # a run that cannot start leaves no folder


def test_bad_checkpoints(work):
    (work/'a.ckpt').write_bytes(b'PK\x03\x04')
    torch.save({'state_dict': {}}, work/'b.ckpt')
    torch.save({'state_dict': {}, 'mmembed': {'model': None}}, work/'c.ckpt')
    for name, error, message in [
        ('none.ckpt', FileNotFoundError, 'no checkpoint'),
        ('a.ckpt', ValueError, 'not a readable checkpoint'),
        ('b.ckpt', ValueError, 'not a checkpoint of mmembed'),
        ('c.ckpt', ValueError, 'does not describe its model'),
    ]:
        with pytest.raises(error, match=message) as e: load_checkpoint(name)
        assert '\n' not in str(e.value)


def test_print_config(work, capsys):
    with pytest.raises(SystemExit) as e: run([*SMALL, '--print_config'])
    assert e.value.code == 0 and 'batch_size: 32' in capsys.readouterr().out and not (work/'out').exists()


@pytest.fixture
def networks(work):
    "Small stand-ins for the public networks that the configurations name, all as files of this folder."
    import open_clip
    import torchvision
    from open_clip.factory import _MODEL_CONFIGS
    from transformers import BertConfig, BertModel

    _MODEL_CONFIGS['tiny-vit'] = dict(
        embed_dim=16,
        vision_cfg=dict(image_size=32, layers=2, width=32, patch_size=16, head_width=16),
        text_cfg=dict(context_length=20, vocab_size=49408, width=32, heads=2, layers=2),
    )
    def build(folder):
        folder.mkdir()
        torch.save(open_clip.create_model('tiny-vit').state_dict(), folder/'clip.pt')
        tp = TextPipeline.learn(['a red circle', 'a blue square'] * 9, vocab_size=60)
        BertModel(
            BertConfig(
                vocab_size=tp.vocab_size,
                hidden_size=32,
                num_hidden_layers=4,
                num_attention_heads=2,
                intermediate_size=48,
            )
        ).save_pretrained(folder / 'bert')
        tp.to_tokenizer_file(folder/'bert'/'tokenizer.json')
        torch.save(torchvision.models.resnet18().state_dict(), folder/'resnet.pth')
    for made in built_once('networks', build).iterdir(): (work/made.name).symlink_to(made)
    yield
    del _MODEL_CONFIGS['tiny-vit']


CLIP = ['--model.model.name', 'tiny-vit', '--model.model.pretrained', 'clip.pt']
BERT = [
    '--model.model.text.folder', 'bert', '--model.model.image.name', 'resnet18', '--model.model.image.weights',
    'resnet.pth',
]
STAND_INS = {'clip_vitb32': CLIP, 'clip_lora': CLIP, 'bert_resnet': BERT, 'bert_resnet_scores': BERT}


@pytest.mark.parametrize('path', sorted((ROOT/'configs').glob('*.yaml')), ids=lambda p: p.stem)
def test_configs_are_short_and_run(work, networks, path):
    assert 8 <= len(path.read_text().splitlines()) <= 40
    table(Scenes(train=24, valid=0), work, 24)
    data = (
        ['--data.path', 'pairs.csv', '--data.text_key', 'text', '--data.group_key', 'null', '--data.valid_share', '0.3']
        if '\n  path:' in path.read_text()
        else ['--data.source.train', '24', '--data.source.valid', '8']
    )
    result = run(
        [
            '--config',
            str(path),
            *data,
            *STAND_INS.get(path.stem, []),
            '--data.batch_size',
            '8',
            '--data.workers',
            '0',
            '--trainer.limit_train_batches',
            '2',
            '--trainer.max_epochs',
            '1',
            '--trainer.accelerator',
            'cpu',
            '--trainer.enable_progress_bar',
            'false',
            '--trainer.logger',
            'false',
            '--trainer.enable_model_summary',
            'false',
            '--trainer.check_val_every_n_epoch',
            '1',
        ]
    )
    found = result.figures or result.recall['all']['text_to_image']
    assert found['queries'] > 0 and not any('lora' in k for k in result.model.state_dict())
    again = load_checkpoint(result.checkpoint.with_suffix('.safetensors'))
    other = again.state_dict()
    assert other.keys() == result.model.state_dict().keys()
    for k, v in result.model.state_dict().items(): assert torch.allclose(v, other[k], atol=1e-6), k


def test_parameter_groups_hold_every_parameter_once():
    tp = TextPipeline.learn(['a red ring'] * 9, vocab_size=50)
    model = DualEncoder(TextTransformer(tp, width=32, depth=1), ConvNet(VisionPipeline(size=32), channels=(8, 16)))
    groups = parameter_groups(model, 1e-3, 0.1)
    assert (
        sorted(id(p) for g in groups for p in g['params']) == sorted(map(id, model.parameters())) and len(groups) == 2
    )
    names = {id(p): n for n, p in model.named_parameters()}
    free = {names[id(p)] for p in groups[1]['params']}
    assert [g['weight_decay'] for g in groups] == [0.1, 0]
    assert (
        'logit_scale' in free
        and 'image.stem.weight' not in free
        and {n for n in names.values() if n.endswith('bias')} <= free
    )
    model.text.requires_grad_(False)
    assert not {id(p) for g in parameter_groups(model, 1e-3, 0.1) for p in g['params']} & set(
        map(id, model.text.parameters())
    )


def test_schedule():
    values = [warm_cosine(s, 200, 0.1) for s in range(201)]
    assert values[0] == 1/20 and max(values) == 1 == values[19] and values[200] == pytest.approx(0, abs=1e-9)
    assert all(a < b for a, b in zip(values[:19], values[1:20])) and all(
        a >= b for a, b in zip(values[20:], values[21:])
    )
    assert warm_cosine(0, 1, 0.) == 1


def test_the_logit_scale_is_held(work):
    cli = prepare([*SMALL, '--trainer.max_steps', '2', '--model.max_logit_scale', '10'])
    cli.trainer.fit(cli.model, cli.datamodule)
    assert cli.model.model.logit_scale.exp().item() <= 10 + 1e-4


def test_captions_that_say_the_same_are_all_right():
    eye = torch.eye(4)
    swapped = eye[[1, 0, 2, 3]]
    assert judge(eye, swapped, ['a', 'a', 'b', 'c'], [])['all']['text_to_image'].at[1] == 1
    assert judge(eye, swapped, ['a', 'd', 'b', 'c'], [])['all']['text_to_image'].at[1] == 0.5
    kinds = judge(eye, swapped, ['a', 'd', 'b', 'c'], ['x', 'x', 'y', 'y'])
    assert (
        kinds['x']['text_to_image'].at[1],
        kinds['y']['text_to_image'].at[1],
        kinds['y']['text_to_image'].gallery,
    ) == (0, 1, 4)


def test_several_captions_of_a_picture():
    "Judged with every picture once: its captions are all right, and a kind is looked for in the whole gallery."
    image, text = torch.eye(3), torch.tensor([[1., 0, 0], [0, .9, .5], [0, 1, 0], [0, .2, 1]])
    found = judge(text, image[[0, 0, 1, 2]], ['a', 'b', 'c', 'd'], ['de', 'en', 'en', 'en'], ['p', 'p', 'q', 'r'])
    assert found['all']['text_to_image'].at[1] == 0.75 and found['all']['image_to_text'].at[1] == 1
    assert [found['all'][w].gallery for w in ('text_to_image', 'image_to_text')] == [3, 4]
    assert (
        found['de']['text_to_image'].at[1],
        found['de']['image_to_text'].queries,
        found['de']['image_to_text'].gallery,
    ) == (1, 1, 4)
    assert found['en']['image_to_text'].queries == 3


def test_a_folder_of_classes_is_judged_by_its_classes(capsys):
    """200 images of 10 classes, each caption 20 times: one query and one item a class, and what guessing gives among
    those."""
    torch.manual_seed(0)
    label, right = torch.arange(200) % 10, torch.rand(200) < 0.4
    text = torch.eye(10)[label]
    image = torch.nn.functional.normalize(
        torch.eye(10)[torch.where(right, label, (label + 1) % 10)] + 0.01 * torch.rand(200, 10), dim=1
    )
    found = judge(text, image, label.tolist(), [])
    back, there = found['all']['image_to_text'], found['all']['text_to_image']
    assert (back.queries, back.gallery, there.queries, there.gallery) == (200, 10, 10, 200)
    assert back.at[1] == pytest.approx(float(right.float().mean())) and back.at[1] < back.at[5] < back.at[10] == 1
    assert back.chance == pytest.approx({1: 0.1, 5: 0.5, 10: 1.}) and there.chance[1] == pytest.approx(20/200)
    assert there.chance[5] == pytest.approx(1 - math.comb(180, 5)/math.comb(200, 5))
    show_recall(plain_recall(found))
    chances = [re.findall(r'[\d.]+%', line) for line in capsys.readouterr().out.splitlines() if 'chance' in line]
    assert chances == [['10.0%', '41.3%', '66.0%'], ['10.0%', '50.0%', '100.0%']]


def test_training_knows_which_rows_show_one_picture(work, monkeypatch):
    class Several(Scenes):
        def picture(self, i): return f'{i // 2}'
    cli = prepare([*SMALL, '--trainer.max_steps', '1', '--trainer.limit_val_batches', '0'])
    cli.datamodule.train = Several(train=len(cli.datamodule.train), valid=0)
    seen = []
    monkeypatch.setattr(
        cli.model.loss, 'forward', lambda out, tokens, bias, pictures: seen.append(pictures) or out.text.sum() * 0
    )
    cli.trainer.fit(cli.model, cli.datamodule)
    assert len(seen) == 1 and 0 < len(seen[0].unique()) < len(seen[0])
    cli.datamodule.train = Scenes(train=8, valid=0)
    assert image_numbers(cli.datamodule.train) is None


SHARDED = """
trainer:
  devices: 2
  strategy:
    class_path: lightning.pytorch.strategies.ModelParallelStrategy
    init_args: {data_parallel_size: 2, tensor_parallel_size: 1, save_distributed_checkpoint: false}
"""


@pytest.mark.weekly
def test_two_processes_keep_half_of_the_weights_each(work):
    "torchrun, weights sharded: one folder, and the weights of one process that has the joined batches."
    import os
    (work/'sharded.yaml').write_text(SHARDED)
    options = [
        '--trainer.max_steps', '2', '--model.freeze_norms', 'true', '--model.warmup', '0',
        '--trainer.limit_val_batches', '0',
    ]
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc_per_node',
            '2',
            str(Path(sys.executable).with_name('mmembed')),
            'train',
            *SMALL,
            '--config',
            'sharded.yaml',
            '--name',
            'sharded',
            '--data.batch_size',
            '16',
            *options,
        ],
        env=os.environ | {'OMP_NUM_THREADS': '1', 'GLOO_SOCKET_IFNAME': 'lo'},
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stderr[-1500:]
    assert [p.name for p in (work/'out').iterdir()] == ['sharded']
    whole = run([*SMALL, '--name', 'whole', *options]).model.state_dict()
    parts = load_checkpoint(work/'out'/'sharded'/'last.ckpt').state_dict()
    assert whole.keys() == parts.keys()
    # a key's bias has no gradient, and Adam moves it by its rounding
    for k, x in whole.items(): assert (x.float() - parts[k].float()).abs().mean() < 2e-4, k


class Gone(Scenes):
    "Scenes of which the images of the rows `gone` are cut off"
    gone = ()
    def image(self, i): return super().image(i)[:100] if i in self.gone else super().image(i)


def trained(kind, gone, **options):
    """Three steps in float64 on batches of 8 over all processes, some images of which cannot be read.

    The weights, and how many steps there were."""
    from lightning.pytorch import Trainer
    from mmembed.train.pair_data import MatchData
    from mmembed.train.datamodule import PairData
    from mmembed.models.pair import PairClassifier
    from mmembed.train.modules import LitDualEncoder, LitPairClassifier
    torch.manual_seed(0)
    source = Gone(train=24, valid=4)
    source.gone = gone
    tp = TextPipeline.learn([source.text(i) for i in range(24)], vocab_size=150, max_length=40)
    towers = (
        TextTransformer(tp, width=16, depth=1, heads=2),
        ConvNet(VisionPipeline(size=32), channels=(8, 8), width=16),
    )
    world = options.get('devices', 1)
    data = {'retrieval': PairData, 'match': MatchData}[kind](source=source, batch_size=8 // world, seed=0)
    lit = LitDualEncoder(DualEncoder(*towers, dim=8), freeze_norms=True, warmup=0) if kind == 'retrieval' else \
        LitPairClassifier(PairClassifier(*towers, MatchData.classes, dim=8, dropout=0.), freeze_norms=True, warmup=0)
    trainer = Trainer(
        max_steps=3, accelerator='cpu', precision='64-true', logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )
    trainer.fit(lit, data)
    return lit.model.state_dict(), trainer.global_step


def one_of_two(rank, folder, gone):
    import os
    import torch.distributed as dist
    os.environ.update(GLOO_SOCKET_IFNAME='lo', LOCAL_RANK=str(rank))
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    torch.save(
        {kind: trained(kind, rows, devices=2, strategy='ddp') for kind, rows in gone.items()},
        f'{folder}/trained-{rank}.pt',
    )
    dist.destroy_process_group()


def test_two_processes_and_broken_images(tmp_path):
    """A whole batch of one process cannot be read, and one image of the other: they take equally many steps, and
    learn what one process learns."""
    import torch.multiprocessing as mp
    from mmembed.train.loader import Shuffle
    gone = {}
    for kind, n, times in (('retrieval', 24, 1), ('match', 48, 2)):
        mine, other = ([i // times for _, i in Shuffle(n, 0, rank, 2)] for rank in (0, 1))
        gone[kind] = {*mine[4:8], other[1]}  # the second batch of the first process, which others take their norms from
    mp.spawn(one_of_two, (str(tmp_path), gone), nprocs=2)
    for kind in gone:
        whole, steps = trained(kind, gone[kind])
        for rank in (0, 1):
            weights, count = torch.load(tmp_path/f'trained-{rank}.pt')[kind]
            assert count == steps == 3
            for k, x in whole.items(): assert torch.allclose(x.double(), weights[k].double(), atol=1e-7), (kind, k)


def test_new_folder(tmp_path):
    for want in ('a', 'a-2', 'a-3'):
        folder = new_folder(tmp_path/'a')
        assert folder.name == want
        folder.mkdir()


from lightning.pytorch.callbacks import Callback  # noqa: E402


class WorseAndWorse(Callback):
    "Every validation finds a classifier that gives one answer: no pair matches, later all do"
    def on_validation_start(self, trainer, module):
        with torch.no_grad():
            module.model.fusion.out.weight.zero_()
            module.model.fusion.out.bias.copy_(torch.tensor([9., -9.] if trainer.current_epoch == 0 else [-9., 9.]))


class StopAfterTwo(Callback):
    "Ends a run of four epochs after its second, as a crash would"
    def on_train_epoch_end(self, trainer, _): trainer.should_stop = trainer.current_epoch == 1


class Waits(Callback):
    "Stops in the middle of the second epoch, until it is killed"
    def on_train_batch_end(self, trainer, *_):
        import signal
        if trainer.global_step == 16: signal.pause()


class Keeps(Callback):
    "Writes down what last.ckpt says after every fifth step between two epochs"
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step % 10 != 6: return
        folder = Path(trainer.default_root_dir)
        (folder / f'{trainer.global_step - 1}.json').write_text(
            json.dumps(torch.load(folder / 'last.ckpt', weights_only=True)['mmembed'])
        )
