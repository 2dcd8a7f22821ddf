"""Commands with relative paths, from a folder that is not the checkout: the README's own, in its order, and every
option that names a file."""
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from mmembed.cli.main import COMMANDS, main, parser, path, path_or_name, takes_argv, typed
from mmembed.cli.main import command as function
from mmembed.core.settings import config_path

from tests.cli.test_main import SMALL, pairs

ROOT = Path(__file__).resolve().parents[2]
STAY = 'serve', 'demo'  # answer until they are stopped
ROWS = 'source', 'query', 'minus', 'ids'  # a row is called as it was named


def of_readme():
    "The commands of the README's blocks."
    return [
        shlex.split(line, comments=True)[1:]
        for line in re.findall(r'^mmembed .*$', (ROOT / 'README.md').read_text(), re.M)
    ]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "What the README speaks of: pairs.csv, configs/, photo.jpg, photos/."
    made = tmp_path_factory.mktemp('elsewhere')
    rows = [json.loads(line) for line in pairs(made).read_text().splitlines()]
    (made/'pairs.csv').write_text('image,caption\n' + ''.join(f'{r["image"]},"{r["text"]}"\n' for r in rows))
    shutil.copytree(config_path('pairs').parent, made/'configs')
    shutil.copy(made/'0.jpg', made/'photo.jpg')
    (made/'photos').mkdir()
    for i in range(4): shutil.copy(made/f'{i}.jpg', made/'photos')
    return made


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def run(words): assert main([*words, *SMALL] if words[0] == 'train' else words) == 0, words


def compiles(words): return '--cpp' in words or '--compiled' in words


@pytest.mark.weekly
def test_the_commands_of_the_readme_in_their_order(here, capsys):
    ran = [words for words in of_readme() if words[0] not in STAY and 'FILE' not in words and not compiles(words)]
    assert {w[0] for w in ran} == {'train', 'eval', 'export', 'embed', 'index', 'search'}
    for words in [
        *ran,
        ['export', 'runs/pairs/best.ckpt', '--out', 'model.pt', '--onnx', 'onnx', '--onnx-files'],
        ['verify', 'model.pt', '--onnx', 'onnx', '--data', 'pairs.jsonl', '--samples', '3'],
        ['export', 'model.pt', '--triton', 'models', '--onnx', 'onnx'],
        ['eval', 'runs/pairs/best.ckpt', '--out', 'figures.json'],
        ['info', 'model.pt'],
    ]: run(words)
    assert all(
        (here / name).exists()
        for name in ('model.pt', 'onnx/files.onnx', 'vectors', 'photos.idx', 'models', 'figures.json')
    )
    assert str(here) not in capsys.readouterr().out.replace(str(here/'photos.idx'), '')


@pytest.mark.weekly
def test_the_commands_that_compile(here):
    for made, command in (('runs', 'train'), ('model.pt', 'export')):
        if not (here/made).exists(): run(next(words for words in of_readme() if words[0] == command))
    compiled = ['export', 'runs/pairs/best.ckpt', '--out', 'model.pt', '--compiled', 'model.pt2']
    for words in [*filter(compiles, of_readme()), compiled]: run(words)
    assert (here/'model.pt2').exists()


def options(name):
    "The actions of a command's parser that take a value."
    return [a for a in parser(name)._actions if a.nargs != 0 and a.dest not in ('xtra', *ROWS)]


@pytest.mark.parametrize(
    'name',
    [
        n
        for n in COMMANDS
        if n not in ('train', 'eval', 'completion')
        and not (takes_argv(function(n)) and not hasattr(function(n), 'parser'))
    ],
)
def test_every_option_that_names_a_file_is_resolved_at_the_door(name, tmp_path, monkeypatch):
    "By its help, and by the examples of its help: no word of them that is there is handed on relative."
    for a in options(name):
        if re.match(
            r'(an?|the|what .*:) (exported |FAISS |new |artifact)*(file|folder)\b|write .* (file|folder)\b|PEM file',
            a.help or '',
        ):
            assert a.type in (path, path_or_name), f'{name} {a.dest}: {a.help}'
    monkeypatch.chdir(tmp_path)
    examples = [
        shlex.split(line, comments=True) for line in re.findall(rf'mmembed {name} .*', parser(name).epilog or '')
    ]
    for words in examples + [['mmembed', *w] for w in of_readme() if ' '.join(w).startswith(name)]:
        words = words[1 + len(name.split()):]
        if {'<', '|', '>'} & set(words): continue
        for w in words:
            if re.fullmatch(r'[\w./-]*\w\.[a-z]\w*|[\w-]+/', w) and not w.startswith('-'):
                (tmp_path / w).mkdir(parents=True, exist_ok=True)
        found = vars(parser(name).parse_intermixed_args(words))
        for k, v in found.items():
            if k not in ROWS and isinstance(v, str) and v and '/' not in v[:1]:
                assert not (tmp_path / v).exists(), f'{name}: {k} is {v}'


def test_messages_name_a_file_as_it_was_typed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(['info', 'none.pt']) == 1
    assert capsys.readouterr().err == 'mmembed: error: none.pt not found: no such artifact\n'
    assert typed(f'{tmp_path}/a and /b') == 'a and /b'
    monkeypatch.chdir('/')
    assert typed('/a') == '/a'
