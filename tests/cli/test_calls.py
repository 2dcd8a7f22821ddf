"""Calls as people type them: names of configurations, mistyped options, closed streams, full disks.

One sentence and the right exit status each."""
import argparse
import inspect
import io
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout

import pytest

from mmembed.cli import main as cli
from mmembed.cli.main import COMMANDS, main, parser
from mmembed.core.settings import config_names, config_path
from mmembed.cli.options import describe_parameters
from mmembed.train.pair_data import LabelData, MatchData
from mmembed.train.datamodule import PairData

MMEMBED = [sys.executable, '-m', 'mmembed']


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shell(line, **env):
    "A line of a shell in which `mmembed` is the command."
    command = ' '.join(f"'{w}'" for w in MMEMBED)
    return subprocess.run(
        ['bash', '-c', re.sub(r'\bmmembed\b', lambda _: command, line, count=1)],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != 'PYTHONUNBUFFERED'} | env,
    )


def test_a_module_is_the_same_command():
    done = shell('mmembed --version')
    assert done.returncode == 0 and done.stdout.startswith('mmembed ')
    done = shell('mmembed info none.pt')
    assert done.returncode == 1 and done.stderr.startswith('mmembed: error: none.pt') and done.stderr.count('\n') == 1


@pytest.mark.parametrize('columns', ['abc', '', '-3', '0', '1e9', '20', '200'])
def test_any_width_of_the_terminal(columns, monkeypatch, capsys):
    monkeypatch.setenv('COLUMNS', columns)
    for argv in (['verify', '--help'], ['eval', '--help'], ['train', '--help'], ['index', 'build', '--help']):
        assert main(argv) == 0
    assert 'artifact to verify' in ' '.join(capsys.readouterr().out.split())


CLOSED = [
    ('mmembed --help <&-', 0, ''),
    ('mmembed --help >&-', 0, ''),
    ('mmembed --help 2>&-', 0, ''),
    ('mmembed --help <&- >&- 2>&-', 0, ''),
    ('mmembed info none.pt >&-', 1, 'none.pt'),
    ('mmembed info none.pt <&- >&-', 1, 'none.pt'),
    ('mmembed info none.pt 2>&-', 1, ''),
    ('mmembed embed none.pt --stdin <&-', 1, 'nothing to embed'),
    ('mmembed embed notes.txt - -o x.npy <&-', 1, 'notes.txt'),
    ('mmembed --help > /dev/full', 1, 'standard output: No space left on device'),
    ('mmembed completion bash > /dev/full', 1, 'standard output: No space left on device'),
    ('mmembed verify --help > /dev/full', 1, 'standard output: No space left on device'),
    ('mmembed --help | true', None, ''),
]


@pytest.mark.parametrize('unbuffered', [False, True])
@pytest.mark.parametrize('line, status, says', CLOSED, ids=[line for line, *_ in CLOSED])
def test_closed_and_full_streams(here, line, status, says, unbuffered):
    (here/'notes.txt').write_text('not a model')
    done = shell(line, **({'PYTHONUNBUFFERED': '1'} if unbuffered else {}))
    if unbuffered and line.startswith('mmembed verify'): return  # argparse itself passes over the error
    assert status is None or done.returncode == status, done.stderr
    assert (
        says in done.stderr
        and 'Traceback' not in done.stderr
        and 'Exception ignored' not in done.stderr
        and done.stderr.count('\n') <= 1
    ), done.stderr


def test_no_file_takes_the_number_of_a_closed_stream(here):
    "A file that is opened in place of a closed standard output would receive what is printed."
    program = (
        "import os, sys\nfrom mmembed.cli.main import open_streams\nopen_streams()\nf = open('new.txt', 'w')\n"
        "print('printed')\nsys.stdout.flush()\nassert f.fileno() > 2 and sys.stdin.read() == ''"
    )
    assert (
        subprocess.run(
            ['bash', '-c', f'exec {sys.executable} -c "$0" <&- >&-', program], capture_output=True
        ).returncode
        == 0
    )
    assert (here/'new.txt').read_text() == ''


@pytest.mark.parametrize(
    'error', [KeyError('weights'), AttributeError('no such'), AssertionError(), Exception('two\nlines')]
)
def test_no_error_of_any_kind_is_a_traceback(error, monkeypatch, capsys):
    def fails(_): raise error
    monkeypatch.setattr(cli, 'dispatch', fails)
    assert main([]) == 1
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and type(error).__name__ in err and 'MMEMBED_DEBUG=1' in err
    monkeypatch.setenv('MMEMBED_DEBUG', '1')
    with pytest.raises(type(error)): main([])


@pytest.mark.parametrize('name', ['pairs', 'pairs.yaml', 'configs/pairs.yaml'])
@pytest.mark.parametrize('form', [['--config', '{}'], ['--config={}']])
def test_configurations_are_found_by_name_from_every_folder(here, name, form, capsys):
    argv = ['train', *(a.format(name) for a in form)]
    assert main([*argv, '--print_config']) == 0
    assert 'name: pairs' in capsys.readouterr().out
    assert main([*argv, '--data.path', 'none.csv']) == 1
    assert 'no such file: none.csv' in capsys.readouterr().err and not (here/'runs').exists()


def test_a_file_of_ones_own_comes_before_a_shipped_configuration(here, capsys):
    (here/'pairs.yaml').write_text('name: mine\nmodel: {model: {class_path: mmembed.models.dual.DualEncoder}}\n')
    main(['train', '--config', 'pairs.yaml', '--print_config'])
    assert 'name: mine' in capsys.readouterr().out


WRONG = [
    (['train'], 2, 'mmembed train --config pairs --data.path'),
    (['train', '--data.path', 'x.csv'], 2, 'clip_vitb32'),
    (['train', '--config', 'configs/pears.yaml'], 1, 'is pairs.yaml meant?'),
    (['train', '--config', 'none/other.yaml'], 1, 'no configuration none/other.yaml'),
    (['train', '--config', 'pairs', '--data.bath_size', '3'], 2, 'is --data.batch_size meant?'),
    (['train', '--config', 'pairs', '--resmue=x'], 2, 'is --resume meant?'),
    (['train', '--config', 'pairs', '--model.model.text.widht', '8'], 2, 'is --model.model.text.width meant?'),
    (['train', '--config', 'pairs', '--trainer.max_epocs', '8'], 2, 'is --trainer.max_epochs meant?'),
    (['train', '--config', 'typo.yaml'], 2, "'bath_size'; is --data.batch_size meant?"),
    (['train', '--config', 'pairs', '--model.lr', 'fast'], 2, 'Got value: fast'),
    (['train', '--config', 'pairs', '--data.on_error', 'ignore'], 2, 'ignore'),
    (['train', '--config', 'pairs', '--config'], 2, 'expected one argument'),
    (['eval'], 2, 'checkpoint'),
    (['eval', 'x.ckpt', '--jsno'], 2, 'is --json meant?'),
    (['verify', 'x.pt', '--sampels', '3'], 2, 'is --samples meant?'),
    (['serve', 'x.pt', '--prot', '8000'], 2, 'is --port meant?'),
    (['index', 'build', 'x.pt', 'y', '--image-kye', 'a', '-o', 'z'], 2, 'is --image-key meant?'),
    (['search', 'x', '--wheer', 'a'], 2, 'is --where meant?'),
    (['info', 'x.pt', '--wholly-other'], 2, 'unrecognized arguments: --wholly-other; `mmembed info --help`'),
]


@pytest.mark.parametrize('argv, status, says', WRONG, ids=[' '.join(a) for a, *_ in WRONG])
def test_a_wrong_call_says_what_is_meant(here, argv, status, says, capsys):
    (here/'typo.yaml').write_text(config_path('pairs').read_text().replace('batch_size', 'bath_size'))
    assert main(argv) == status
    err = [line for line in capsys.readouterr().err.splitlines() if 'Seed set' not in line]
    assert len(err) == 1 and err[0].startswith('mmembed: error: ') and says in err[0], err
    assert not (here/'runs').exists()


@pytest.mark.parametrize('task, module', [('retrieval', PairData), ('match', MatchData), ('classify', LabelData)])
def test_the_whole_help_explains_our_options(here, task, module, capsys):
    assert main(['train', '--config', 'pairs', '--task', task, '--help-all']) == 0
    text = capsys.readouterr().out
    plain, options = ' '.join(text.split()), list(describe_parameters(module, 'data.'))
    assert {o.name for o in options} >= {f'data.{p}' for p in inspect.signature(PairData).parameters}
    for o in options:
        assert f'--{o.name} ' in plain and o.help and o.help in plain, o
    for own in (
        '--model.lr', '--trainer.max_epochs', '--model.model.text.width', '--name', '--resume',
        '--print_config',
    ):
        assert f'  {own} ' in text, own
    assert 'torch.nn' not in text and ':func:' not in text and len(text.splitlines()) < 320
    assert not re.search(r'^  (--\S+)( \S+)?$\n(?!  +\S)', text, re.M), 'an option without a word of help'


@pytest.fixture(scope='module')
def scripts():
    """As the command prints them: in this process, where what reads the options of training is imported once for the
    three."""
    def printed(name):
        with redirect_stdout(io.StringIO()) as out: assert main(['completion', name]) == 0
        return out.getvalue()
    return {name: printed(name) for name in ('bash', 'zsh', 'fish')}


@pytest.mark.parametrize('name', ['bash', 'zsh', 'fish'])
def test_completion_knows_every_option_of_every_command(scripts, name):
    for command in COMMANDS:
        for option in [o for a in parser(command)._actions if a.help != argparse.SUPPRESS for o in a.option_strings]:
            if option.startswith('--'):
                assert (option.removeprefix('--') if name == 'fish' else option) in scripts[name], (command, option)
    for option in ('--data.path', '--model.lr', '--trainer.max_epochs', '--model.model.text.width', '--save_every'):
        assert option.removeprefix('--') in scripts[name]


def test_fish_completes(scripts, here):
    if not shutil.which('fish'): pytest.skip('fish is not installed')
    (here/'mmembed.fish').write_text(scripts['fish'])

    def offers(line):
        return [
            x.split('\t')[0]
            for x in subprocess.run(
                ['fish', '-c', f'source mmembed.fish; complete -C "{line}"'], capture_output=True, text=True, check=True
            ).stdout.splitlines()
        ]
    assert offers('mmembed ver') == ['verify'] and offers('mmembed index b') == ['build']
    assert set(offers('mmembed train --data.batch')) == {'--data.batch_size'} and '--data.path' in offers(
        'mmembed eval --data.'
    )
    assert offers('mmembed train --data.on_error ') == ['skip', 'raise', 'blank']


def test_bash_completes_options_of_train(scripts):
    ask = 'COMP_WORDS=(mmembed train "--data.batch"); COMP_CWORD=2; _shtab_mmembed; printf "%s\\n" "${COMPREPLY[@]}"'
    assert subprocess.run(
        ['bash', '-c', f'{scripts["bash"]}\n{ask}'], capture_output=True, text=True
    ).stdout.split() == ['--data.batch_size']


def test_configurations_are_listed_by_name():
    assert {'pairs', 'clip_vitb32', 'bert_resnet', 'quickstart'} <= set(config_names())


@pytest.mark.parametrize('name', [n for n in COMMANDS if n != 'train'])
def test_help_explains_every_option_and_names_values_without_python(name):
    p = parser(name)
    assert not re.search(r'\((str|int|float|path|path_or_name)\)', p.format_help())
    assert [a.dest for a in p._actions if not a.help] == []


def test_options_that_do_not_go_together_end_before_a_model_is_loaded(here, capsys):
    assert main(['export', 'none.ckpt', '--calibrate', 'photos']) == 1
    assert '--calibrate goes with --quantize int8' in capsys.readouterr().err
