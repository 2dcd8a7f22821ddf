"""The package without the repository: a wheel that runs elsewhere, extras that stay extra, an import that is quick."""
import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mmembed.exporters.verify import samples as cases

from tests.exporters import tiny

ROOT = Path(__file__).resolve().parents[2]


def python(*args, cwd=None, **env):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(('COV', 'PYTEST', 'PYTHONPATH'))}
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=clean | env, capture_output=True, text=True)


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "The wheel, built from a copy of what is tracked, so that nothing lands in the checkout."
    import shutil
    source, out = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('wheel')
    for name in ('mmembed', 'configs'):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('pyproject.toml', 'README.md', 'LICENSE'): shutil.copy(ROOT/name, source/name)
    done = python('-m', 'build', '--wheel', '--no-isolation', '--outdir', out, source)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(out.glob('*.whl'))


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
    "A folder of its own with the wheel in it; torch and the rest come from this environment."
    to = tmp_path_factory.mktemp('site')
    done = python('-m', 'pip', 'install', '-q', '--no-deps', '--disable-pip-version-check', '--target', to, wheel)
    assert done.returncode == 0, done.stderr[-2000:]
    return to


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT/'mmembed').rglob('*.py')}
    assert modules <= set(names)
    top = {n.split('/')[0] for n in names}
    assert len(top) == 3 and 'mmembed' in top, top  # the package, its metadata, its data
    assert {Path(n).name for n in names if n.endswith('.yaml')} == {p.name for p in (ROOT/'configs').glob('*.yaml')}
    data = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / 'mmembed').rglob('*')
        if p.is_file() and p.suffix not in ('.py', '.pyc')
    }
    assert data <= set(names), 'package data is missing: [tool.setuptools.package-data]'


def test_wheel_runs_without_the_repository(installed, tmp_path):
    "Command, version, an export, `info` and the shipped configurations, in a folder where there is no checkout."
    program = f'''
import sys; sys.path[:0] = [{str(installed)!r}]
import mmembed as mm
from pathlib import Path
from mmembed.cli.main import main
assert Path(mm.__file__).is_relative_to({str(installed)!r}), mm.__file__
assert main(['--version']) == 0
text = mm.TextPipeline.learn(['a red circle', 'a blue square'], vocab_size=60, max_length=8)
image = mm.ConvNet(mm.VisionPipeline(size=16), channels=(4,), width=16)
model = mm.DualEncoder(mm.TextTransformer(text, width=16, depth=1, heads=2), image, dim=8).eval()
report = mm.export(model, 'model.pt', fresh=False)
assert report.ok and any('c++' in n for n in report.notes), report
assert main(['info', 'model.pt']) == 0
assert main(['train', '--config', 'nothing.yaml']) == 1
'''
    done = python('-c', program, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    assert done.stdout.startswith('mmembed ') and 'short_hash' in done.stdout
    assert (installed / 'share' / 'mmembed' / 'configs' / 'quickstart.yaml').is_file() or list(
        installed.rglob('quickstart.yaml')
    )


def test_command_is_declared(wheel):
    z = zipfile.ZipFile(wheel)
    entry = z.read(next(n for n in z.namelist() if n.endswith('entry_points.txt'))).decode()
    assert 'mmembed = mmembed.cli.main:main' in entry


LATE = (
    'lightning', 'transformers', 'tokenizers', 'gradio', 'ray', 'open_clip', 'torchvision', 'pandas', 'PIL',
    'pyarrow', 'fastapi', 'grpc', 'lancedb', 'faiss', 'psycopg', 'onnx', 'onnxruntime', 'matplotlib', 'timm',
    'peft', 'tensorboard', 'jsonargparse', 'torch',
)


def test_import_is_light():
    """`import mmembed` brings no other package, not even torch.

    Neither does `mmembed --version`, and `--help` at most torch."""
    program = 'import sys; import mmembed; print(*sorted({m.split(".")[0] for m in sys.modules}))'
    got = set(python('-c', program).stdout.split())
    assert 'mmembed' in got and not got & set(LATE)
    program = (
        'import sys; from mmembed.cli.main import main; main(["--version"]); a = set(sys.modules); '
        'main(["--help"]); print(*a, "|", *sys.modules)'
    )
    version, everything = (
        {m.split('.')[0] for m in part.split()} for part in python('-c', program).stdout.splitlines()[-1].split('|')
    )
    assert not version & set(LATE) and not everything & (set(LATE) - {'torch'})


def test_running_a_file_needs_no_training_code(tmp_path):
    "What loads an artifact imports neither Lightning nor the tokenizer's reference nor a server."
    program = 'import sys; import mmembed.runtime.embedder; print(*sorted({m.split(".")[0] for m in sys.modules}))'
    done = python('-c', program)
    assert done.returncode == 0, done.stderr[-1000:]
    assert not set(done.stdout.split()) & {
        'lightning', 'transformers', 'tokenizers', 'open_clip', 'torchvision', 'gradio', 'ray', 'fastapi',
        'matplotlib', 'pandas', 'pyarrow',
    }


def test_verifying_needs_no_trainer():
    "The loader's rows, which `verify` and `export` compare, are made without Lightning, which takes seconds to import."
    program = '''
import sys
from mmembed.core.packing import as_bytes
from mmembed.exporters.tiny import tiny_model
from mmembed.exporters.verify import samples, verify
from mmembed.exporters.verify.hosts import loaded_rows
files = samples.images()
(rows, *_), = loaded_rows(tiny_model(), [as_bytes(b'a')], [as_bytes(files[k]) for k in ('truncated.jpg', 'RGB.png')])
print(rows, 'lightning' in sys.modules)
'''
    done = python('-c', program, cwd=ROOT)
    assert done.stdout.strip() == '[1] False', done.stderr[-1000:]


EXTRAS = (
    'gradio', 'gradio_client', 'lancedb', 'psycopg', 'pgvector', 'faiss', 'ray', 'datasets', 'braceexpand',
    'fsspec', 'onnx', 'onnxruntime', 'onnxscript', 'onnx_ir', 'httpx2', 'httpx', 'orjson', 'grpc',
    'google.protobuf', 'peft', 'fastapi', 'uvicorn', 'prometheus_client', 'opentelemetry', 'matplotlib',
    'sentencepiece', 'jieba', 'webdataset', 'IPython', 'nbdev', 'execnb', 'pytest', 'hypothesis',
)
NEED = {'mmembed.serve', 'mmembed.demo'}  # rooms that exist for an extra


def test_extras_are_extra():
    "With every optional package blocked each module still imports, or says in one sentence which extra it wants."
    program = f'''
import importlib, importlib.abc, sys, warnings
warnings.simplefilter('ignore')
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        mine = sys._getframe(1)
        while mine and 'importlib' in mine.f_code.co_filename: mine = mine.f_back
        asks = mine.f_globals.get('__name__', '') if mine else ''
        if asks.startswith('mmembed') and any(name == b or name.startswith(b + '.') for b in {EXTRAS!r}):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
for m in sys.argv[1:]:
    try: importlib.import_module(m); print('fine', m, sep='\\t')
    except ImportError as e: print('wants', m, str(e).replace('\\n', ' / '), sep='\\t')
'''
    modules = ['.'.join(p.relative_to(ROOT).with_suffix('').parts) for p in sorted((ROOT/'mmembed').rglob('*.py'))
               if not p.name.startswith('_')]
    done = python('-c', program, *modules)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split('\t') for line in done.stdout.splitlines() if line.startswith(('fine\t', 'wants\t'))]
    assert len(rows) == len(modules)
    for how, module, *said in rows:
        if how == 'wants':
            assert any(module.startswith(n) for n in NEED) or 'mmembed[' in said[0], f'{module}: {said[0]}'
    assert sum(how == 'fine' for how, *_ in rows) > 0.6 * len(rows)


def test_extras_are_declared():
    "Every package that a module imports, at its top or inside a function, is one of the dependencies or extras."
    import re
    import tomllib
    project = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']
    wanted = [*project['dependencies'], *(d for k, v in project['optional-dependencies'].items() for d in v)]
    names = {re.match(r'[\w.-]+', d)[0].lower().replace('-', '_') for d in wanted}
    # other names for what is declared, and what that brings along
    known = names | {
        'docstring_parser', 'ftfy', 'httptools', 'regex', 'torchmetrics', 'uvloop', 'grpc_tools', 'open_clip',
        'PIL', 'yaml', 'google', 'grpc', 'httpx2', 'faiss', 'psycopg', 'opentelemetry', 'prometheus_client',
        'safetensors', 'huggingface_hub', 'starlette', 'pydantic', 'timm', 'IPython', 'grpc_health',
        'grpc_reflection', 'onnx_ir', 'gradio_client', 'mmembed', 'ray',
    }
    own = {m.split('.')[0] for m in sys.stdlib_module_names}
    strange = set()
    for p in (ROOT/'mmembed').rglob('*.py'):
        for node in ast.walk(ast.parse(p.read_text())):
            tops = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )
            strange |= {(p.name, t.split('.')[0]) for t in tops if t.split('.')[0] not in known | own}
    assert strange == set()


# beside torch, what a cold start could wait for
HEAVY = (
    *(m for m in LATE if m != 'torch'),
    'mmembed.train',
    'mmembed.models',
    'mmembed.exporters',
    'mmembed.text',
    'mmembed.demo',
)


def loaded_by(program, *args):
    "Those of `HEAVY` that a process has imported at its end, and what it printed before."
    told = f"{program}\nimport sys; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = python('-W', 'ignore', '-c', told, *args)
    assert done.returncode == 0, done.stderr[-1000:]
    said, _, found = done.stdout.strip().rpartition('\n')
    return said, set(ast.literal_eval(found))


def test_a_search_imports_its_index_and_what_runs_a_file(tmp_path):
    "No trainer, tokenizer's reference, server, or reader of images; pandas where LanceDB's own import finds it."
    pytest.importorskip('lancedb')
    for i, content in enumerate(list(cases.images().values())[:3]): (tmp_path/f'{i}.jpg').write_bytes(content)
    built = python('-m', 'mmembed', 'index', 'build', str(tiny.artifact()), str(tmp_path), '-o', str(tmp_path/'x.idx'))
    assert built.returncode == 0, built.stderr
    said, found = loaded_by(
        'import sys; from mmembed.cli.main import main; main(["search", sys.argv[1], "a red circle"])',
        str(tmp_path / 'x.idx'),
    )
    assert said.count('.jpg') == 3 and found <= {'lancedb', 'pyarrow', 'pandas'}


def test_a_service_imports_its_server_and_what_runs_a_file():
    "No gRPC without its port, no LanceDB without an index."
    program = '''
import sys
from mmembed.serve.server import Config, Service, app
service = Service(Config(sys.argv[1]), lambda why: None)
app(service)
service.close()
'''
    assert loaded_by(program, str(tiny.artifact()))[1] <= {'fastapi', 'PIL'}
