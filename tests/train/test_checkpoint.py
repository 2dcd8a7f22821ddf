"""How a run ends that does not end well: mistakes leave no folder, Ctrl-C says what goes on, a full disk is told
with the file."""
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mmembed.cli.main import main
from mmembed.data.scenes import Scenes

from tests.helpers import HANG, interruptible, until

N = 24
TRAIN = [
    'train', '--config', 'pairs', '--data.path', 'pairs.jsonl', '--data.workers', '0', '--data.batch_size',
    '8', '--data.valid_share', '.3', '--trainer.enable_progress_bar', 'false',
    '--trainer.enable_model_summary', 'false', '--trainer.accelerator', 'cpu', '--trainer.max_epochs', '1',
]
MMEMBED = [sys.executable, '-m', 'mmembed']


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A folder with a small table of pairs."
    scenes = Scenes(train=N, valid=0)
    for i in range(N): (tmp_path/f'{i}.jpg').write_bytes(bytes(scenes.image(i).tolist()))
    rows = [json.dumps(dict(image=f'{i}.jpg', text=scenes.text(i))) for i in range(N)]
    (tmp_path/'pairs.jsonl').write_text('\n'.join(rows), encoding='utf-8')
    for i in range(N): (tmp_path/f'broken{i}.jpg').write_bytes(b'no image')
    (tmp_path / 'broken.jsonl').write_text(
        '\n'.join(json.dumps(dict(image=f'broken{i}.jpg', text=f'{i}')) for i in range(N))
    )
    (tmp_path/'corrupt.ckpt').write_bytes(b'PK\x03\x04' + b'0' * 500)
    (tmp_path/'notes.safetensors').write_text('not weights')
    monkeypatch.chdir(tmp_path)
    return tmp_path


MISTAKES = {
    '--trainer.accelerator gpuu': 'gpuu',
    '--trainer.accelerator tpu': 'torch_xla',
    '--trainer.devices 0': 'devices',
    '--trainer.strategy foo': 'foo',
    '--trainer.max_epochs -5': 'max_epochs',
    '--trainer.precision 17': 'trainer.precision',
    '--resume corrupt.ckpt': 'corrupt.ckpt',
    '--resume notes.safetensors': 'notes.safetensors',
    '--resume pairs.jsonl': 'pairs.jsonl',
    '--model.model.text.heads 3': 'heads must divide',
    '--model.lock [images]': 'images',
    '--model.lock image': 'model.lock',
    '--model.loss foo': 'foo',
    '--data.path broken.jsonl --data.on_error raise': 'broken',
    '--data.path broken.jsonl': 'none of',
    '--data.path none.jsonl': 'none.jsonl',
    '--data.text_key alt': 'alt',
    '--model.model.text.tokenizer none.json': 'none.json',
    '--data.batch_size 0': 'batch_size',
    '--trainer.limit_train_batches many': 'limit_train_batches',
}


@pytest.mark.parametrize('options', MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_no_folder(here, options, capfd):
    before = sorted(p.name for p in here.iterdir())
    assert main([*TRAIN, *options.split()]) in (1, 2)
    err = capfd.readouterr().err
    said = [line for line in err.splitlines() if line.startswith('mmembed: error: ')]
    assert (
        len(said) == 1
        and MISTAKES[options] in said[0]
        and len(said[0]) < 500
        and 'Traceback' not in err
        and 'fault of mmembed' not in err
    ), err[-2000:]
    assert sorted(p.name for p in here.iterdir()) == before


def test_a_gpu_that_is_not_there(here, capfd):
    import torch
    if torch.cuda.is_available() or torch.backends.mps.is_available(): pytest.skip('there is a GPU')
    assert main([*TRAIN, '--trainer.accelerator', 'gpu']) == 1
    err = capfd.readouterr().err
    assert (
        'the Trainer cannot do that: No supported gpu backend found' in err
        and 'Traceback' not in err
        and not (here / 'runs').exists()
    )


def test_the_folder_of_all_runs_stays_if_it_was_there(here):
    (here/'runs').mkdir()
    assert main([*TRAIN, '--data.path', 'broken.jsonl']) == 1
    assert (here/'runs').is_dir() and not list((here/'runs').iterdir())


def test_a_learnt_tokenizer_lies_in_the_folder_of_the_run(here):
    import yaml
    assert main(TRAIN) == 0
    config = yaml.safe_load((here/'runs'/'pairs'/'config.yaml').read_text())
    kept = Path(config['model']['model']['init_args']['text']['init_args']['tokenizer'])
    assert kept.resolve() == (here/'runs'/'pairs'/'tokenizer.json').resolve() and kept.is_file()
    assert sorted(p.name for p in (here/'runs'/'pairs').glob('tokenizer*')) == ['tokenizer.json']


def test_an_interrupted_run_says_how_it_goes_on(here):
    options = [*TRAIN, '--trainer.max_epochs', '100000', '--trainer.log_every_n_steps', '1']
    p = subprocess.Popen(
        [*MMEMBED, *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=interruptible
    )
    try:
        until(lambda: p.poll() is not None or (here/'runs'/'pairs'/'last.safetensors').is_file())
        p.send_signal(signal.SIGINT)
        err = p.communicate(timeout=HANG)[1]
    finally: p.kill()
    said = [line for line in err.splitlines() if line.startswith('mmembed: ')]
    assert (
        p.returncode == 130
        and len(said) == 1
        and 'interrupted at step' in said[0]
        and ' goes on from step ' in said[0]
        and 'Traceback' not in err
    ), err[-2000:]
    words = said[0].partition('mmembed train ')[2].partition(' goes on')[0].split()
    step = int(said[0].rpartition(' ')[2])
    done = subprocess.run(
        [*MMEMBED, 'train', *words, '--trainer.max_epochs', '-1', '--trainer.max_steps', str(step + 1)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and 'checkpoint: runs/pairs-2/' in done.stdout, done.stderr[-2000:]


def limited(argv, kilobytes):
    "A command that may write files of so many kilobytes only, as where the disk is full."
    return subprocess.run(
        ['bash', '-c', f'ulimit -f {kilobytes}; exec "$@"', 'bash', *MMEMBED, *argv], capture_output=True, text=True
    )


def test_what_cannot_be_written_is_told_with_its_name(here):
    done = limited(TRAIN, 2000)
    assert (
        done.returncode == 1
        and 'mmembed: error: runs/pairs/' in done.stderr
        and '.ckpt: File too large' in done.stderr
        and 'Traceback' not in done.stderr
    ), done.stderr[-2000:]
