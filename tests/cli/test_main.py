"""The command line from end to end on a tiny run, and one clear sentence with a non-zero exit for every mistake."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmembed.cli.main import COMMANDS, main
from mmembed.core.settings import config_path
from mmembed.data.scenes import Scenes

from tests.helpers import built_once

SMALL = [
    '--data.workers', '0', '--trainer.max_epochs', '1', '--trainer.check_val_every_n_epoch', '1',
    '--trainer.enable_progress_bar', 'false', '--trainer.accelerator', 'cpu',
]

# of configs/pairs.yaml
NARROW = [
    '--model.model.image.channels', '[8, 16]', '--model.model.image.pipeline.size', '32',
    '--model.model.text.depth', '1',
]


def pairs(folder, n=40, name='pairs.jsonl'):
    "A table of generated pairs with its image files."
    scenes = Scenes(train=n, valid=2)
    for i in range(n): (folder/f'{i}.jpg').write_bytes(bytes(scenes.image(i).tolist()))
    rows = [dict(image=f'{i}.jpg', text=scenes.text(i)) for i in range(n)]
    (folder/name).write_text('\n'.join(json.dumps(r) for r in rows), encoding='utf-8')
    return folder/name


def train(*argv):
    return ['train', '--config', str(config_path('pairs')), *SMALL, *NARROW, '--data.batch_size', '8', *argv]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope='module')
def artifact():
    "What train and export make of a small table, by the command line alone."
    def build(folder):
        folder.mkdir()
        with pytest.MonkeyPatch.context() as m:
            m.chdir(folder)
            assert main(train('--data.path', str(pairs(folder)))) == 0
            assert main(['export', 'runs/pairs/best.ckpt', '--out', 'model.pt']) == 0
    return built_once('cli', build)/'model.pt'


def test_info_verify_embed(artifact, here, capsys):
    capsys.readouterr()
    assert main(['info', str(artifact)]) == 0
    card = json.loads(capsys.readouterr().out)
    assert card['training']['config']['name'] == 'pairs' and 'red' not in json.dumps(card['training'])
    assert main(['verify', str(artifact), '--json']) == 0
    assert json.loads(capsys.readouterr().out)['ok']
    (here/'bad.jpg').write_bytes(b'not an image')
    image = artifact.parent/'0.jpg'
    assert main(['embed', str(artifact), str(image), 'bad.jpg', 'none.jpg', '--text', 'a red circle']) == 1
    text, good, bad, none = map(json.loads, capsys.readouterr().out.splitlines())
    assert len(text['embedding']) == len(good['embedding']) == card['dim']
    assert 'embedding' not in bad and 'not an image' in bad['error'] and 'No such file' in none['error']


def test_embed_reads_bytes_from_a_pipe(artifact):
    done = subprocess.run(
        [Path(sys.executable).parent / 'mmembed', 'embed', artifact, '--stdin'],
        input='a red circle\n红色\n\n'.encode() + b'caf\xe9',
        capture_output=True,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(rows) == 4, done.stderr
    import mmembed as mm
    want = mm.load(artifact).encode_text(['a red circle', '红色', '', b'caf\xe9'])
    assert torch.allclose(torch.tensor([r['embedding'] for r in rows]), want, atol=1e-6)


def test_two_exports_have_one_hash(artifact, here, capsys):
    assert main(['export', str(artifact.parent/'runs'/'pairs'/'best.ckpt'), '--out', 'again.pt']) == 0
    capsys.readouterr()
    cards = []
    for path in (artifact, here/'again.pt'):
        main(['info', str(path)])
        cards.append(json.loads(capsys.readouterr().out))
    assert cards[0]['content_hash'] == cards[1]['content_hash']


def test_export_without_decoders(artifact, here, capsys):
    assert main(['export', str(artifact.parent/'runs'/'pairs'/'best.ckpt'), '--out', 'rgb.pt', '--no-decode']) == 0
    import mmembed as mm
    emb = mm.load('rgb.pt')
    assert emb.encode_image([torch.zeros(3, 50, 40, dtype=torch.uint8)]).shape == (1, emb.dim)
    assert 'no file decoders' in emb.encode_image([(artifact.parent/'0.jpg').read_bytes()], on_error='flag').errors[0]


def mistakes(folder):
    "name -> (argv, what the sentence must say)"
    table = pairs(folder)
    lines = table.read_text().splitlines()
    (folder/'empty.csv').write_text('image,text\n')
    (folder/'broken.jsonl').write_text(lines[0] + '\n{"image": \n')
    (folder/'lost.jsonl').write_text(lines[0] + '\n' + json.dumps(dict(image='gone.jpg', text='x')))
    for i in range(6): (folder/f'corrupt{i}.jpg').write_bytes((folder/'0.jpg').read_bytes()[:200])
    (folder / 'corrupt.jsonl').write_text(
        '\n'.join(lines + [json.dumps(dict(image=f'corrupt{i}.jpg', text='x')) for i in range(6)])
    )
    (folder/'bad.yaml').write_text('data: [1, 2')
    (folder/'typo.yaml').write_text('modle: 1')
    (folder/'notes.txt').write_text('not a model')
    (folder/'truncated.pt').write_bytes(b'PK\x03\x04' + b'0' * 5000)
    return {
        'no command': (['trian'], 'no command'),
        'missing config': (['train', '--config', 'none.yaml'], 'none.yaml'),
        'malformed config': (['train', '--config', 'bad.yaml'], 'bad.yaml'),
        'unknown option': (['train', '--config', 'typo.yaml'], 'modle'),
        'missing table': (train('--data.path', 'none.csv'), 'none.csv'),
        'empty data set': (train('--data.path', 'empty.csv'), 'empty.csv'),
        'malformed line': (train('--data.path', 'broken.jsonl'), 'line 2'),
        'caption without image': (train('--data.path', 'lost.jsonl'), 'gone.jpg'),
        'no such column': (train('--data.path', 'pairs.jsonl', '--data.text_key', 'caption'), 'caption'),
        'strict': (train('--data.path', 'corrupt.jsonl', '--data.on_error', 'raise'), 'corrupt'),
        'missing artifact': (['info', 'none.pt'], 'none.pt'),
        'no artifact': (['verify', 'notes.txt'], 'not an mmembed artifact'),
        'truncated artifact': (['embed', 'truncated.pt', '--text', 'x'], 'truncated'),
        'no checkpoint': (['export', 'none.ckpt'], 'none.ckpt'),
        'nothing to embed': (['embed', 'truncated.pt'], 'nothing to embed'),
        'resume from nowhere': (train('--data.path', 'pairs.jsonl', '--resume', 'x.ckpt'), 'x.ckpt'),
    }


NAMES = [
    'no command', 'missing config', 'malformed config', 'unknown option', 'missing table', 'empty data set',
    'malformed line', 'caption without image', 'no such column', 'strict', 'missing artifact', 'no artifact',
    'truncated artifact', 'no checkpoint', 'nothing to embed', 'resume from nowhere',
]


@pytest.mark.parametrize('name', NAMES)
def test_mistakes_end_in_one_sentence(name, here, capsys):
    argv, says = mistakes(here)[name]
    assert main(argv) in (1, 2)
    out = capsys.readouterr()
    sentence = [line for line in out.err.splitlines() if line.startswith('mmembed: error: ')]
    assert len(sentence) == 1 and says in sentence[0], out.err[-2000:]
    assert 'Traceback' not in out.err + out.out


def test_truncated_real_artifact(artifact, here, capsys):
    (here/'cut.pt').write_bytes(artifact.read_bytes()[:-5000])
    assert main(['embed', 'cut.pt', '--text', 'x']) == 1
    assert 'truncated' in capsys.readouterr().err


def test_corrupt_images_are_skipped_counted_and_named(here, capsys):
    mistakes(here)
    assert main(train('--data.path', 'corrupt.jsonl')) == 0
    out = capsys.readouterr()
    said = out.out + out.err
    assert 'skipped' in said and all(f'corrupt{i}.jpg' in said for i in range(6)), said[-2000:]


@pytest.mark.parametrize('name', [n for n in COMMANDS if n != 'train'])
def test_help_tells_the_options(name, capsys):
    assert main([*name.split(), '--help']) == 0
    text = capsys.readouterr().out
    assert f'mmembed {name}' in text and 'examples:' in text


def test_train_has_a_short_help_and_a_whole_one(here, capsys):
    assert main(['train', '--help']) == 0
    short = capsys.readouterr().out
    assert main(['train', '--config', str(config_path('pairs')), '--help-all']) == 0
    whole, named = capsys.readouterr().out, re.findall(r'^  (--[a-z_.-]+)', short, re.M)
    assert len(short.splitlines()) < 30 and len(named) > 9 and 'examples:' in short
    for option in set(named) - {'--help-all'}: assert option in whole, option


def test_train_help_and_print_config(here, capsys):
    assert main(['train', '--config', str(config_path('pairs')), '--print_config']) == 0
    assert 'max_epochs' in capsys.readouterr().out


def test_quickstart_on_a_few_scenes(here, capsys):
    options = '--data.source.init_args.train 64 --data.source.init_args.valid 16 --data.batch_size 32 ' + ' '.join(
        SMALL
    )
    assert main(['quickstart', '--options', options]) == 0
    out = capsys.readouterr().out
    assert (
        'verified' in out
        and 'chance' in out
        and Path('artifacts/quickstart.pt').is_file()
        and len(list(Path('artifacts/quickstart').glob('*.jpg'))) == 8
    )
    program = out[out.index('    import mmembed as mm'):].split('\n\n')[0]
    done = subprocess.run(
        [sys.executable, '-c', '\n'.join(line.strip() for line in program.splitlines())], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_eval_prints_json(artifact, capsys):
    capsys.readouterr()
    assert (
        main(
            [
                'eval',
                str(artifact.parent / 'runs' / 'pairs' / 'best.ckpt'),
                '--json',
                '--out',
                str(artifact.parent / 'figures.json'),
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert json.loads(out[out.index('{\n'):]) == json.loads((artifact.parent/'figures.json').read_text())


@pytest.mark.parametrize('shell', ['bash', 'zsh'])
def test_completion_knows_every_command(shell, capsys):
    assert main(['completion', shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for name in COMMANDS for word in name.split()) and '--max-pixels' in script
    if shell == 'bash': assert subprocess.run(['bash', '-n'], input=script, text=True).returncode == 0


def test_wrong_calls_name_the_next_step(capsys):
    for argv, says in [
        (['trian'], 'is `mmembed train` meant?'),
        (['index', 'biuld'], 'is `mmembed index build` meant?'),
        (['info', '--colour', 'red', 'x.pt'], 'mmembed info --help'),
        (['verify'], 'mmembed verify --help'),
    ]:
        assert main(argv) == 2
        err = capsys.readouterr().err
        assert says in err and err.count('\n') == 1, err


def test_modules_of_commands_import_no_torch():
    program = (
        'import sys; from mmembed.cli.main import COMMANDS, command; '
        "[command(n) for n in COMMANDS]; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert done.stdout.strip() == 'False', done.stderr
