import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mmembed.runtime import processor
from mmembed.core.packing import as_bytes
from mmembed.exporters.verify import samples as cases, cpp as host
from mmembed.exporters.export import export
from mmembed.exporters.verify.verify import verify
from mmembed.runtime.embedder import load

from tests.exporters import tiny
from tests.helpers import HANG

pytestmark = pytest.mark.skipif(bool(host.why_no_host()), reason=host.why_no_host())


@pytest.fixture(scope='module')
def cli(): return host.build_host()


def call(cli, *args, **env):
    return subprocess.run([cli, *map(str, args)], capture_output=True, text=True, env=os.environ | env)


def test_verify_holds_cpp_to_the_model(cli):
    for decode in (True, False):
        report = verify(tiny.artifact(decode), tiny.model(), fresh=False, cpp=cli).check()
        rows = {r.what: r for r in report.rows if r.stage == 'c++'}
        assert rows['token ids'].n > 1000 and rows['pixels'].n > 10000
        assert rows['token ids'].difference == rows['pixels'].difference == rows['image status'].difference == 0
        assert rows['text embedding'].difference <= 1e-5 and rows['image embedding'].difference <= 1e-5
    rows = {
        r.what: r
        for r in verify(tiny.pair_artifact(), tiny.pair_model(), fresh=False, cpp=cli).check().rows
        if r.stage == 'c++'
    }
    assert (
        rows['pair scores'].n > 300
        and rows['pixels'].difference == rows['token ids'].difference == rows['image status'].difference == 0
    )


def test_answers_are_the_embedders(cli):
    emb, texts, images = load(tiny.artifact()), cases.texts(), [as_bytes(b) for b in cases.images().values()]
    answers = host.ask_host(cli, tiny.artifact(), texts, images)
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


def test_the_host_and_python_keep_one_choice(cli, tmp_path, monkeypatch):
    "What one has timed, the other takes; the line says what is computed in what."
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.delenv('MMEMBED_KERNELS', raising=False)
    ask = lambda *more: call(cli, tiny.artifact(), '--threads', torch.get_num_threads(), '--computes', *more).stdout
    says = {'onednn': 'fp32\n', 'torch': "fp32, linear layers by torch's own product\n"}
    first, file = ask(), processor.choices_folder()/f'{processor.processor_name()}.json'
    made = json.loads(file.read_text())
    assert (
        first == says[made['linear']]
        and set(made['ms']) == {'onednn', 'torch'}
        and [f.name for f in file.parent.iterdir()] == [file.name]
    )
    processor._measured.cache_clear()
    assert processor.choose_kernel(timing=lambda: 1 / 0) == made['linear']
    for choice in 'torch', 'onednn':
        file.write_text(json.dumps(dict(linear=choice)))
        assert (
            ask() == says[choice]
            and ask('--kernels', 'torch') == says['torch']
            and ask('--kernels', 'onednn') == says['onednn']
        )
    file.write_text('{"lin')
    assert ask() in says.values() and json.loads(file.read_text())['linear'] in says
    monkeypatch.setenv('XDG_CACHE_HOME', '/proc/none')
    assert ask() in says.values()
    monkeypatch.setenv('MMEMBED_KERNELS', 'torch')
    assert ask() == says['torch']
    processor._measured.cache_clear()


def test_a_portable_int8_file_in_the_host(cli):
    "Where torch's product of int8 is a plain loop, it computes in float32, and says so."
    path = tiny.exported('tiny-portable-int8', tiny.model, portable=True, quantize='int8')
    held = dict(ATEN_CPU_CAPABILITY='avx2', ONEDNN_MAX_CPU_ISA='AVX2', MKL_ENABLE_INSTRUCTIONS='AVX2')
    says, answers = 'fp32: torch has no int8 kernel for this processor', []
    assert (
        call(cli, path, '--computes', **held).stdout.startswith(says)
        and call(cli, path, '--computes').stdout.strip() == load(path).computes
    )
    for env in {}, held:
        answers.append(
            torch.tensor(json.loads(call(cli, path, '--text', 'a small red circle', **env).stdout)['embedding'])
        )
    torch.testing.assert_close(*answers, atol=2e-2, rtol=0)


def test_both_kernels_answer_alike_in_the_host(cli):
    texts, answers = ['a small red circle', 'x'], []
    for choice in 'onednn', 'torch':
        done = call(cli, tiny.artifact(), '--kernels', choice, *sum((['--text', t] for t in texts), []))
        answers.append(torch.tensor([json.loads(line)['embedding'] for line in done.stdout.splitlines()]))
    torch.testing.assert_close(*answers, atol=1e-5, rtol=0)


@pytest.fixture
def picture(tmp_path):
    (tmp_path/'x.jpg').write_bytes(cases.images()['exif 6.jpg'])
    return tmp_path/'x.jpg'


def test_the_header_in_a_program(picture):
    done = call(host.build_host('mmembed_test'), tiny.artifact(), tiny.pair_artifact(), picture)
    assert (done.returncode, done.stdout, done.stderr) == (0, 'ok\n', '')


def test_thousands_of_calls_do_not_grow(picture):
    """Nine calls a round, good items and broken ones, after 40 rounds that may still fill caches, in each of four
    windows; benchmarks/README.md has more rounds."""
    done = call(host.build_host('mmembed_test'), '--leak', tiny.artifact(), tiny.pair_artifact(), picture, 200)
    assert done.returncode == 0 and float(done.stdout.split()[1]) < 4, done


def test_pairs(cli):
    """Every built-in text with an image, broken ones too: the Embedder's scores and errors, ids and pixels, in
    batches of seven."""
    emb, texts, files = load(tiny.pair_artifact(), batch_size=7), cases.texts(), list(cases.images().values())
    images = [as_bytes(files[i % len(files)]) for i in range(len(texts))]
    answers, want = (
        host.ask_host(cli, tiny.pair_artifact(), texts, images, batch=7),
        emb.score_pairs(texts, images, on_error='flag'),
    )
    assert [r.get('error', '') for r in answers['pair']] == want.errors and 0 < want.ok.sum() < len(texts)
    got = torch.stack([r['scores'] for r in answers['pair'] if 'scores' in r])
    assert torch.allclose(got, want.scores[want.ok], atol=1e-5)
    for row, x, good in zip(answers['image'], images, want.ok):
        if good: assert torch.equal(row['pixels'].view(3, 48, 48), emb.preprocess(x)) and 'embedding' not in row
    for i in range(0, len(texts), 7):
        tokens = emb.tokenize(texts[i:i+7])
        assert torch.equal(torch.stack([r['ids'] for r in answers['text'][i:i+7]]), tokens.ids)


def test_stored_embeddings(cli, tmp_path):
    export(tiny.model(), tmp_path/'m.pt', fresh=False, cpp=cli, output='int8', labels=['a', 'b'])
    emb, file = load(tmp_path/'m.pt'), as_bytes(cases.images()['RGB.png'])
    answers = host.ask_host(cli, tmp_path/'m.pt', [b'a', b'red'], [file])
    assert answers['image'][0]['embedding'].dtype == torch.int8
    for got, want in (
        (answers['image'][0], emb.encode_image([file])[0]),
        (answers['text'][1], emb.encode_text(['a', 'red'])[1]),
    ):
        assert (got['embedding'].int() - want.int()).abs().max() <= 1


def test_counts_of_pairs_must_agree(cli):
    apart = call(cli, tiny.pair_artifact(), '--text', 'a', '--text', 'b', '--image', '/no/such.png')
    assert apart.returncode == 2 and '2 texts and 1 images are not pairs' in apart.stderr


def test_decoders_change_no_answer(cli, tmp_path):
    images = [as_bytes(b) for b in cases.images().values()][:12]
    paths = [tmp_path/f'd{i}' for i in range(len(images))]
    for p, x in zip(paths, images): p.write_bytes(bytes(x.tolist()))
    one, three = (call(cli, tiny.artifact(), '--decoders', n, *paths) for n in (1, 3))
    assert one.stdout == three.stdout and one.returncode == three.returncode == 0


def test_times(cli):
    done = call(cli, tiny.artifact(), '--text', 'a', '--text', 'b', '--time', 3)
    row = json.loads(done.stdout)
    assert (row['kind'], row['items'], len(row['wall_ms']), len(row['cpu_ms'])) == ('text', 2, 3, 3) and min(
        row['wall_ms']
    ) > 0


@pytest.fixture(scope='module')
def server(): return host.build_host('example_server')


def lines(server, model, *requests, args=()):
    done = subprocess.run(
        [server, model, *map(str, args)],
        input='\n'.join(r if isinstance(r, str) else json.dumps(r) for r in requests) + '\n',
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_server_on_standard_input(server, picture):
    emb = load(tiny.artifact())
    file = base64.b64encode(cases.images()['RGB.png']).decode()
    got = lines(
        server, tiny.artifact(), {'id': 1, 'text': 'Café "x"\n😀'}, '', {'id': 'two', 'image': str(picture)},
        {'image_base64': file}, 'no JSON', {'id': 3, 'image': '/no/such'}, {'id': 4}, {'id': 5, 'tekst': 'a'},
        {'id': 6, 'image_base64': '!'}, {'id': 7, 'text': ''},
    )
    assert [r['id'] for r in got] == [1, 'two', None, None, 3, 4, None, None, 7]
    for row, want in (
        (got[0], emb.encode_text(['Café "x"\n😀'])),
        (got[1], emb.encode_image([picture])),
        (got[2], emb.encode_image([cases.images()['RGB.png']])),
        (got[8], emb.encode_text([''])),
    ):
        assert torch.allclose(torch.tensor(row['embedding']), want[0], atol=1e-5)
    assert [r.get('error', '') for r in got[3:8]] == [
        got[3]['error'],
        '/no/such: No such file or directory',
        'send either text or image',
        'unknown key tekst',
        'image_base64 is not base 64',
    ]
    assert got[3]['error'].startswith('not a flat JSON object')


def test_server_over_tcp(server, picture):
    "Two callers at once, an image of either, and a local path, which is not for callers from outside."
    process = subprocess.Popen(
        [server, tiny.artifact(), '--port', '0', '--batch', '4'], stderr=subprocess.PIPE, text=True
    )
    try:
        port = int(process.stderr.readline().rsplit(':', 1)[1])
        emb, file = load(tiny.artifact()), base64.b64encode(picture.read_bytes()).decode()

        def ask(name):
            with socket.create_connection(('127.0.0.1', port), timeout=HANG) as s:
                rows = [{'id': f'{name}{i}', 'text': f'{name} {i}'} for i in range(20)] + [
                    {'id': 'i', 'image_base64': file},
                    {'id': 'p', 'image': str(picture)},
                ]
                s.sendall(''.join(json.dumps(r) + '\n' for r in rows).encode())
                s.shutdown(socket.SHUT_WR)
                return [json.loads(line) for line in s.makefile()]
        with ThreadPoolExecutor(2) as pool: answers = list(pool.map(ask, 'ab'))
        for name, rows in zip('ab', answers):
            assert [r['id'] for r in rows[:21]] == [f'{name}{i}' for i in range(20)] + ['i']
            want = torch.cat([emb.encode_text([f'{name} {i}' for i in range(20)]), emb.encode_image([picture])])
            assert torch.allclose(torch.tensor([r['embedding'] for r in rows[:21]]), want, atol=1e-5)
            assert rows[21]['error'] == 'unknown key image: send image_base64'
    finally:
        process.kill()
        process.wait()


def test_server_of_pairs(server, picture):
    want = load(tiny.pair_artifact()).score_pairs(['a'], [picture])[0]
    got = lines(
        server,
        tiny.pair_artifact(),
        {'id': 1, 'text': 'a', 'image': str(picture)},
        {'id': 2, 'text': 'a'},
        {'id': 3, 'text': 'a', 'image': '/no'},
    )
    assert torch.allclose(torch.tensor(got[0]['scores']), want, atol=1e-5) and got[0]['labels'] == ['mismatch', 'match']
    assert (
        got[1]['error'] == 'this model scores pairs: send text and image'
        and got[2]['error'] == '/no: No such file or directory'
    )


@pytest.mark.weekly
def test_other_projects_find_the_package(tmp_path):
    """Installed to a folder of its own, moved, found by a small project that knows nothing of this checkout,
    compiled and run."""
    cmake, root = host._cmake(), host._root()

    def run(*args):
        done = subprocess.run([str(a) for a in args], capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return done.stdout

    run(
        cmake, '-S', root / 'cpp', '-B', tmp_path / 'b', '-DMMEMBED_HEADERS_ONLY=ON',
        f'-DPython_EXECUTABLE={sys.executable}',
    )
    run(cmake, '--install', tmp_path/'b', '--prefix', tmp_path/'first')
    (tmp_path/'first').rename(tmp_path/'moved')
    shutil.copytree(root/'tests'/'cpp'/'consumer', tmp_path/'consumer')
    configure = (
        cmake,
        '-S',
        tmp_path / 'consumer',
        '-B',
        tmp_path / 'c',
        f'-DPython_EXECUTABLE={sys.executable}',
        f'-Dmmembed_ROOT={tmp_path}/moved',
    )
    run(*configure)
    run(cmake, '--build', tmp_path/'c')
    assert run(tmp_path/'c'/'consumer', tiny.artifact(False)) == '1 x 24\n'
    lost = subprocess.run([*configure, '-DTORCH_DIR=/no/torch'], capture_output=True, text=True)
    assert lost.returncode and '/no/torch holds no include/torch/script.h' in ' '.join(lost.stderr.split())


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
    assert torch.allclose(
        torch.tensor([r['embedding'] for r in rows[:5]]),
        emb.encode_text(['a', 'a red circle', '一只猫', '', b'caf\xe9']),
        atol=1e-5,
    )
    flagged = emb.encode_image(
        [tmp_path / 'ok.png', tmp_path / 'bad "1".png', tmp_path / 'no "2".png', tmp_path], on_error='flag'
    )
    assert [r.get('error', '') for r in rows[5:]] == flagged.errors
    assert flagged.errors[2].endswith('No such file or directory') and flagged.errors[3].endswith('Is a directory')
    assert call(cli, tiny.artifact(), '--text', 'a').returncode == 0


def test_card(cli):
    done = call(cli, tiny.artifact(), '--card')
    assert json.loads(done.stdout) == load(tiny.artifact()).card and done.returncode == 0


@pytest.mark.parametrize(
    'content, message',
    [
        (None, 'No such file or directory'),
        (b'', 'is not an mmembed artifact'),
        (b'hello world', 'is not an mmembed artifact'),
        (0.5, 'is truncated'),
        (0.999, 'is truncated'),
        ('torch', 'holds no identity card'),
    ],
)
def test_what_is_no_artifact(cli, tmp_path, content, message):
    path = tmp_path/'model.pt'
    if content == 'torch':
        torch.save({'a': torch.ones(2)}, path)
    elif isinstance(content, float):
        path.write_bytes(tiny.artifact().read_bytes()[: int(tiny.artifact().stat().st_size * content)])
    elif content is not None: path.write_bytes(content)
    done = call(cli, path, '--text', 'a')
    assert done.returncode == 2 and not done.stdout
    assert message in done.stderr and done.stderr.count('\n') == 1 and len(done.stderr) < 300, done.stderr


@pytest.mark.parametrize(
    'args, message',
    [
        (['--batch', '0'], "--batch wants a whole number of at least 1, got '0'"),
        (['--batch', 'x'], "got 'x'"),
        (['--text'], '--text wants a value'),
        (['--frobnicate'], 'unknown option --frobnicate'),
        (['--device', 'toaster'], "--device wants cpu, cuda"),
        (['--rgb', 'x.bin'], '--rgb wants HxW:FILE'),
        (['--text-file', '/no/such/file'], '/no/such/file: No such file'),
        (['--text', 'a', '--threads', '-1'], '--threads wants'),
        (['--kernels', 'mkl'], "kernels must be one of auto, onednn, torch, got 'mkl'"),
    ],
)
def test_wrong_options(cli, args, message):
    done = call(cli, tiny.artifact(), *args)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count('\n') == 1, done.stderr


def test_a_damaged_byte_is_found_when_asked(cli, tmp_path):
    whole = bytearray(tiny.artifact().read_bytes())
    whole[bytes(whole).index(tiny.model().image_proj.weight.detach().numpy().tobytes()) + 2] ^= 1
    (tmp_path/'m.pt').write_bytes(whole)
    for more in ((), ('--memory',)):
        done = call(cli, tmp_path/'m.pt', '--text', 'a', '--check', *more)
        assert done.returncode == 2 and ' is damaged: data/' in done.stderr and done.stderr.count('\n') == 1, (
            done.stderr
        )
    assert call(cli, tmp_path/'m.pt', '--text', 'a').returncode == 0
    assert (
        call(cli, tiny.artifact(), '--text', 'a', '--check').stdout
        == call(cli, tiny.artifact(), '--text', 'a', '--check', '--memory').stdout
        != ''
    )
    with zipfile.ZipFile(tmp_path/'z.pt', 'w', zipfile.ZIP_DEFLATED) as out, zipfile.ZipFile(tiny.artifact()) as z:
        for n in z.namelist(): out.writestr(n, z.read(n))
    assert call(cli, tmp_path/'z.pt', '--text', 'a', '--check').returncode == 0


def test_a_card_that_is_none(cli, tmp_path):
    with zipfile.ZipFile(tmp_path/'m.pt', 'w') as out, zipfile.ZipFile(tiny.artifact()) as z:
        for n in z.namelist(): out.writestr(n, b'{}' if n.endswith('card.json') else z.read(n))
    done = call(cli, tmp_path/'m.pt', '--text', 'a')
    assert done.returncode == 2 and done.stderr.endswith(
        'm.pt is not an mmembed artifact: its card is not an mmembed card\n'
    )


def test_decoders_are_silent(cli, tmp_path):
    """What libjpeg and libpng think of a file is not the log of whoever runs the host: a JPEG with bytes too many
    decodes, a PNG with a bad chunk fails alone."""
    jpeg, png = cases.images()['quality 75.jpg'], cases.images()['RGB.png']
    at = jpeg.index(b'\xff\xdb')
    (tmp_path/'more.jpg').write_bytes(jpeg[:at] + bytes(5) + jpeg[at:])
    chunk = b'cHRM' + bytes(3)
    (tmp_path / 'odd.png').write_bytes(
        png[:33] + (3).to_bytes(4, 'big') + chunk + zlib.crc32(chunk).to_bytes(4, 'big') + png[33:]
    )
    (tmp_path / 'bits.png').write_bytes(
        png[:24] + b'\x05' + png[25:29] + zlib.crc32(png[12:24] + b'\x05' + png[25:29]).to_bytes(4, 'big') + png[33:]
    )
    done = call(cli, tiny.artifact(), tmp_path/'more.jpg', tmp_path/'odd.png', tmp_path/'bits.png')
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert ['error' in r for r in rows] == [False, False, True] and done.stderr == '', done


def test_no_arguments_prints_usage(cli):
    assert call(cli).returncode == 2 and call(cli).stderr.startswith('usage:') and call(cli, '--help').returncode == 0


def test_missing_image_operators_are_explained(cli):
    done = call(cli, tiny.artifact(), '--text', 'a', MMEMBED_TORCHCODEC='/no/such.so')
    assert done.returncode == 2 and 'set MMEMBED_TORCHCODEC' in done.stderr and 'decode=False' in done.stderr
    assert call(cli, tiny.artifact(False), '--text', 'a', MMEMBED_TORCHCODEC='/no/such.so').returncode == 0


def test_the_build_is_kept(cli):
    before = cli.stat().st_mtime_ns
    assert host.build_host() == cli == host.built() and cli.stat().st_mtime_ns == before
