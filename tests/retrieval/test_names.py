"One word a concept in the arguments of this room and of the sources it opens; the older words work with a warning."
import ast
import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip('lancedb', reason='the extra "search" is not installed')

from mmembed.data.open import open_source
from mmembed.data.scenes import Scenes
from mmembed.exporters.export import export
from mmembed.models.dual import DualEncoder
from mmembed.models.towers import ConvNet, TextTransformer
from mmembed.retrieval.embed import embed
from mmembed.retrieval.index import Index
from mmembed.retrieval.ingest import About
from mmembed.retrieval.parts import Job, load_vectors, read_job
from mmembed.retrieval.writers import embed_to
from mmembed.text.pipeline import TextPipeline
from mmembed.vision.pipeline import VisionPipeline

from tests.helpers import built_once

ROOT = Path(__file__).parents[2]/'mmembed'
OLD = {'what', 'side', 'filter', 'ledger', 'bad'}


@pytest.fixture(scope='module')
def scenes(): return Scenes(train=6, valid=0)


@pytest.fixture(scope='module')
def model(scenes):
    def make(path):
        tp = TextPipeline.learn([scenes.text(i) for i in range(6)], vocab_size=100, max_length=24)
        torch.manual_seed(0)
        dual = DualEncoder(
            TextTransformer(tp, width=16, depth=1, heads=2), ConvNet(VisionPipeline(size=24), channels=(8,)), dim=12
        )
        export(dual.eval(), path, fresh=False, cpp=False)
    return built_once('names.pt', make)


@pytest.fixture(scope='module')
def index(tmp_path_factory, model, scenes):
    return Index.build(model, scenes, tmp_path_factory.mktemp('names')/'scenes.idx')


def old_words():
    "Find arguments of public functions and methods that have an older name."
    for path in sorted([*(ROOT/'retrieval').glob('*.py'), ROOT/'data'/'open.py']):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith('_'):
                yield from (f'{path.name}: {node.name}({a.arg})' for a in node.args.args if a.arg in OLD)


def test_no_argument_has_an_older_name(): assert [*old_words()] == []


@pytest.mark.parametrize('name,argument', [
    ('search', np.ones(12, 'f')), ('find', np.ones(12, 'f')), ('nearest', np.ones(12, 'f')/12**.5),
    ('like', 'scene train 0'), ('matching', 'circle'),
])
def test_k_is_top_k(index, name, argument):
    method = getattr(index, name)
    assert 'top_k' in inspect.signature(method).parameters and 'k' not in inspect.signature(method).parameters
    with pytest.warns(DeprecationWarning, match=rf'{name}\(k=\) is now {name}\(top_k=\)') as seen:
        found = method(argument, k=2)
    assert seen[0].filename == __file__ and found == method(argument, 2) == method(argument, top_k=2)


def test_bad_is_failures(index):
    with pytest.warns(DeprecationWarning, match='Index.bad is now Index.failures'): assert index.bad() == []
    assert index.failures() == []


def test_side_and_what_are_modality(model, scenes, tmp_path):
    with pytest.warns(DeprecationWarning, match=r'build\(side=\) is now build\(modality=\)'):
        texts = Index.build(model, scenes, tmp_path/'texts.idx', side='text')
    assert texts.about.modality == 'text'
    with pytest.warns(DeprecationWarning, match='About.side'): assert texts.about.side == 'text'
    with pytest.warns(DeprecationWarning, match=r'embed\(what=\) is now embed\(modality=\)'):
        done = embed(model, scenes, tmp_path/'vectors', what='both')
    with pytest.warns(DeprecationWarning, match=r'load_vectors\(side=\)'):
        assert load_vectors(tmp_path/'vectors', side='text').vectors.shape == (6, 12)
    with pytest.warns(DeprecationWarning, match='Done.ledger'): assert done.ledger == done.failures
    with pytest.warns(DeprecationWarning, match='Job.what'): assert read_job(tmp_path/'vectors').what == 'both'
    with pytest.warns(DeprecationWarning, match=r'embed_to\(what=\)'):
        assert embed_to(model, scenes, tmp_path/'one.npy', what='text').written == 6
    (tmp_path/'lines.csv').write_text('text\na cat\n')
    with pytest.warns(DeprecationWarning, match=r'open_source\(what=\)'):
        assert open_source(tmp_path/'lines.csv', what='text').text(0) == 'a cat'


def test_files_of_before_are_read(model, scenes, tmp_path):
    "Manifests say `what`, and indexes `side`, as they did before the arguments were renamed."
    embed(model, scenes, tmp_path, modality='text')
    manifest = json.loads((tmp_path/'_manifest.json').read_text())
    assert manifest['what'] == 'text' and 'modality' not in manifest and read_job(tmp_path).modality == 'text'
    about = About('a'*12, 3, 'text')
    assert json.loads(about.to_bytes())['side'] == 'text' and About.from_bytes(about.to_bytes()) == about
    with pytest.raises(ValueError, match="modality is 'text' there and 'image' here"):
        embed(model, scenes, tmp_path, modality='image')


def private_uses():
    "Find attributes of other objects that are private to them: `index._table` in a function over an index."
    for path in sorted([*(ROOT/'retrieval').glob('*.py'), *(ROOT/'demo').glob('*.py')]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr.startswith('_') and not node.attr.startswith('__'):
                owner = ast.unparse(node.value)
                public = node.attr in (*dir(Job), '_repr_html_')
                if owner in ('self', 'cls', 'super()') or public: continue
                yield f'{path.relative_to(ROOT)}:{node.lineno}: {owner}.{node.attr}'


def test_functions_over_an_index_use_its_public_methods(): assert [*private_uses()] == []
