import json
import os
import subprocess

import pytest
import torch

from mmembed.core import as_bytes
from mmembed.export import cases, host
from mmembed.export.verify import verify
from mmembed.runtime import load

from ..export import tiny

pytestmark = pytest.mark.skipif(bool(host.missing()), reason=host.missing())


@pytest.fixture(scope='module')
def cli(): return host.build()


def call(cli, *args, **env):
    return subprocess.run([cli, *map(str, args)], capture_output=True, text=True, env=os.environ | env)


def test_verify_holds_cpp_to_the_model(cli):
    for decode in (True, False):
        report = verify(tiny.artifact(decode), tiny.model(), fresh=False, cpp=cli).check()
        rows = {r.what: r for r in report.rows if r.stage == 'c++'}
        assert rows['token ids'].n > 1000 and rows['pixels'].n > 10000
        assert rows['token ids'].difference == rows['pixels'].difference == rows['image status'].difference == 0
        assert rows['text embedding'].difference <= 1e-5 and rows['image embedding'].difference <= 1e-5


def test_answers_are_the_embedders(cli):
    emb, texts, images = load(tiny.artifact()), cases.texts(), [as_bytes(b) for b in cases.images().values()]
    answers = host.ask(cli, tiny.artifact(), texts, images)
    tokens, want = emb.tokenize(texts), emb.encode_image(images, on_error='flag')
    assert [r['index'] for r in answers['text']] == list(range(len(texts))) and len(answers['image']) == len(images)
    text = emb.encode_text(texts)
    for i, row in enumerate(answers['text']):
        assert row['ids'][row['mask'] > 0].tolist() == tokens.ids[i][tokens.mask[i] > 0].tolist()
        assert torch.allclose(row['embedding'], text[i], atol=1e-5)
    for i, row in enumerate(answers['image']):
        assert row.get('error', '') == want.errors[i]
        if want.ok[i]:
            assert torch.equal(row['pixels'].view(3, 48, 48), emb.preprocess(images[i]))
            assert torch.allclose(row['embedding'], want.embedding[i], atol=1e-5)
    assert 0 < want.ok.sum() < len(images)


def test_the_header_in_a_program(tmp_path):
    picture = tmp_path/'x.jpg'
    picture.write_bytes(cases.images()['exif 6.jpg'])
    done = call(host.build('mmembed_test'), tiny.artifact(), picture)
    assert (done.returncode, done.stdout, done.stderr) == (0, 'ok\n', '')


def test_command_line(cli, tmp_path):
    (tmp_path/'lines.txt').write_bytes('a red circle\n一只猫\n\n'.encode() + b'caf\xe9')
    (tmp_path/'ok.png').write_bytes(cases.images()['RGB.png'])
    (tmp_path/'bad "1".png').write_bytes(b'nothing')
    done = call(cli, tiny.artifact(), '--text', 'a', '--lines', tmp_path/'lines.txt', '--batch', 2, tmp_path/'ok.png',
                tmp_path/'bad "1".png', '--image', tmp_path/'no "2".png', tmp_path)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1 and not done.stderr
    assert [(r['kind'], r['index']) for r in rows] == [('text', i) for i in range(5)] + [('image', i) for i in range(4)]
    emb = load(tiny.artifact())
    assert torch.allclose(torch.tensor([r['embedding'] for r in rows[:5]]), emb.encode_text(['a', 'a red circle', '一只猫', '', b'caf\xe9']), atol=1e-5)
    flagged = emb.encode_image([tmp_path/'ok.png', tmp_path/'bad "1".png', tmp_path/'no "2".png', tmp_path], on_error='flag')
    assert [r.get('error', '') for r in rows[5:]] == flagged.errors
    assert flagged.errors[2].endswith('No such file or directory') and flagged.errors[3].endswith('Is a directory')
    assert call(cli, tiny.artifact(), '--text', 'a').returncode == 0


def test_card(cli):
    done = call(cli, tiny.artifact(), '--card')
    assert json.loads(done.stdout) == load(tiny.artifact()).card and done.returncode == 0


@pytest.mark.parametrize('content, message', [
    (None, 'No such file or directory'), (b'', 'is not an mmembed artifact'), (b'hello world', 'is not an mmembed artifact'), (0.5, 'is truncated'),
    (0.999, 'is truncated'), ('torch', 'holds no identity card')])
def test_what_is_no_artifact(cli, tmp_path, content, message):
    path = tmp_path/'model.pt'
    if content == 'torch': torch.save({'a': torch.ones(2)}, path)
    elif isinstance(content, float): path.write_bytes(tiny.artifact().read_bytes()[:int(tiny.artifact().stat().st_size * content)])
    elif content is not None: path.write_bytes(content)
    done = call(cli, path, '--text', 'a')
    assert done.returncode == 2 and not done.stdout
    assert message in done.stderr and done.stderr.count('\n') == 1 and len(done.stderr) < 300, done.stderr


@pytest.mark.parametrize('args, message', [
    (['--batch', '0'], "--batch wants a whole number of at least 1, got '0'"), (['--batch', 'x'], "got 'x'"), (['--text'], '--text wants a value'),
    (['--frobnicate'], 'unknown option --frobnicate'), (['--device', 'toaster'], "--device wants cpu, cuda"), (['--rgb', 'x.bin'], '--rgb wants HxW:FILE'),
    (['--text-file', '/no/such/file'], '/no/such/file: No such file'), (['--text', 'a', '--threads', '-1'], '--threads wants')])
def test_wrong_options(cli, args, message):
    done = call(cli, tiny.artifact(), *args)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count('\n') == 1, done.stderr


def test_no_arguments_prints_usage(cli):
    assert call(cli).returncode == 2 and call(cli).stderr.startswith('usage:') and call(cli, '--help').returncode == 0


def test_missing_image_operators_are_explained(cli):
    done = call(cli, tiny.artifact(), '--text', 'a', MMEMBED_TORCHCODEC='/no/such.so')
    assert done.returncode == 2 and 'set MMEMBED_TORCHCODEC' in done.stderr and 'decode=False' in done.stderr
    assert call(cli, tiny.artifact(False), '--text', 'a', MMEMBED_TORCHCODEC='/no/such.so').returncode == 0


def test_the_build_is_kept(cli):
    before = cli.stat().st_mtime_ns
    assert host.build() == cli == host.built() and cli.stat().st_mtime_ns == before
