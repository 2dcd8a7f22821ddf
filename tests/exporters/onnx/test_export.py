"""The model as ONNX: held to the artifact by `verify`, run by numpy and onnxruntime alone, refused when one number
is altered."""
import importlib.util
import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from torch import nn

import mmembed as mm
from mmembed.core.packing import pack
from mmembed.exporters.verify import samples as cases
from mmembed.exporters.graph import vision as pixels
from mmembed.exporters.onnx.builder import write_graph
from mmembed.exporters.onnx.model import OnnxModel
from mmembed.exporters.onnx.export import export_onnx
from mmembed.exporters.onnx.builder import intact, read_onnx_card
from mmembed.exporters.onnx.files import add_files
from mmembed.exporters.steps import Steps
from mmembed.exporters.variants import Variant
from mmembed.exporters.export import export
from mmembed.exporters.verify.verify import verify
from mmembed.models.dual import DualEncoder
from mmembed.models.towers import ConvNet, TextTransformer
from mmembed.exporters.graph import program as exits
from mmembed.exporters.graph.program import operators
from mmembed.text.pipeline import TextPipeline
from mmembed.vision.pipeline import VisionPipeline

from tests.helpers import built_once, needs_exact_int8
from tests.exporters import tiny
from tests.exporters.test_variants import Inverted, NoDigits

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')


@pytest.fixture(scope='module', autouse=True)
def tokenizer():
    "The tiny models' own, and their resize, which all these files hold: translated once a run, for every worker."
    tp, vp = tiny.pipelines()
    exits._files[exits._content(tp)] = built_once(
        'tiny-tokenizer.onnx', lambda path: exits.text_to_onnx(tp, path)
    ).read_bytes()
    pixels._files[pixels._content(vp)] = built_once(
        'tiny-pixels.onnx', lambda path: pixels.vision_to_onnx(vp, path)
    ).read_bytes()


@pytest.fixture(scope='module')
def made(): return tiny.reported('onnx', tiny.model, onnx=True)


@pytest.fixture(scope='module')
def pairs(): return tiny.reported('onnx-pairs', tiny.pair_model, onnx=True)


def stage(report): return {r.what: r for r in report.rows if r.stage == 'onnx'}


def test_every_case_in_every_batch(made):
    "All built-in texts, and all pictures that decode, in batches of 0, 1, 3 and 64, pictures of all sizes together."
    _, folder, report = made
    rows, dim = stage(report), 24
    assert report.ok and set(rows) == {
        'identity card', 'tensors', 'token ids', 'pixels', 'text embedding', 'image embedding', 'image cosine',
    }
    assert rows['token ids'].difference == 0 and rows['token ids'].n > 6 * 8 * len(cases.texts())
    assert rows['text embedding'].n == 3 * dim * len(cases.texts()) and rows['text embedding'].difference < 1e-5
    assert (
        rows['image embedding'].n == rows['pixels'].n // (3 * 48 * 48) * dim
        and rows['image embedding'].n % (3 * dim) == 0
    )
    assert (
        rows['image embedding'].n // (3 * dim) >= 30
        and rows['pixels'].difference <= 2
        and rows['image cosine'].difference < 1e-4
    )
    assert {p.name for p in folder.iterdir()} == {'text.onnx', 'image.onnx', 'embed.py'}
    assert (
        any(r['stage'] == 'onnx' for r in json.loads(report.to_json())['rows'])
        and 'onnx' in str(report)
        and 'onnx' in report._repr_html_()
    )


def test_pairs(pairs):
    _, folder, report = pairs
    rows = stage(report)
    assert report.ok and set(rows) == {
        'identity card', 'tensors', 'token ids', 'pixels', 'pair scores', 'class probability', 'labels',
        'pair probability',
    }
    assert rows['pair scores'].n == 3 * 2 * len(cases.texts()) and rows['pair scores'].difference < 1e-4
    assert {p.name for p in folder.iterdir()} == {'pairs.onnx', 'embed.py'}


def test_standard_operators_and_no_traces_of_this_machine(made, pairs):
    for path in *made[1].glob('*.onnx'), *pairs[1].glob('*.onnx'):
        assert set(operators(path)) == {''}
        onnx.checker.check_model(str(path))
        for word in b'site-packages', b'stack_trace', b'/work', b'/home', b'/tmp': assert word not in path.read_bytes()
    card = read_onnx_card(made[1]/'text.onnx')
    assert card['content_hash'] == made[2].card['content_hash'] and card['logit_scale'] == made[2].card['logit_scale']


def loaded(folder):
    spec = importlib.util.spec_from_file_location('embed', folder/'embed.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.OnnxModel(folder)


def test_the_recipe_beside_the_files(made):
    run, model = loaded(made[1]), tiny.model()
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((48, 48), (90, 50))]
    with torch.no_grad(): want = model.encode_text(model.text_pipeline(tiny.CAPTIONS))
    text, image = run.encode_text(tiny.CAPTIONS), run.encode_image(pictures)
    assert np.abs(text - want.numpy()).max() < 1e-5 and run.score(text, image).shape == (5, 2)
    assert np.allclose(run.score(text, image), model.logit_scale.exp().item() * text @ image.T)
    for bad in pictures[0].astype(np.float32), pictures[0].transpose(2, 0, 1), pictures[0][:0]:
        with pytest.raises(ValueError, match=r'images\[1\] must be uint8 \(H, W, 3\)'):
            run.encode_image([pictures[0], bad])
    with pytest.raises(ValueError, match='no pairs.onnx here'): run.score_pairs(['a'], pictures[:1])


def altered(made, tmp_path, name, change):
    "The report on the files with `change` made to one of them."
    shutil.copytree(made[1], tmp_path/'g')
    model = onnx.load(tmp_path/'g'/name)
    change(model)
    onnx.save(model, tmp_path/'g'/name)
    return verify(made[0], onnx=tmp_path/'g', fresh=False, cpp=False, sizes=(3,))


def numbers(model, wanted): return [t for t in model.graph.initializer if wanted(t, onnx.numpy_helper.to_array(t))]


def put(tensor, array): tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def failing(report): return [(r.stage, r.what) for r in report.failures]


def test_one_altered_weight_is_found(made, tmp_path):
    def change(model):
        weight = numbers(model, lambda t, x: x.dtype == np.float32 and x.shape in ((32, 24), (24, 32)))[-1]
        x = onnx.numpy_helper.to_array(weight).copy()
        x[0, 0] += 0.05
        put(weight, x)
    report = altered(made, tmp_path, 'text.onnx', change)
    assert failing(report) == [('onnx', 'tensors'), ('onnx', 'text embedding')]
    with pytest.raises(RuntimeError, match='onnx, tensors: text.onnx is not as it was written'): report.check()


def test_one_altered_table_entry_is_found(made, tmp_path):
    token = int(tiny.pipelines()[0](['red']).ids[0, 1])
    def change(model):
        tables = numbers(
            model, lambda t, x: x.dtype.kind == "i" and x.ndim == 1 and x.size > 200 and (x == token).sum() == 1
        )
        assert tables
        for t in tables: put(t, np.where((x := onnx.numpy_helper.to_array(t)) == token, token + 1, x).astype(x.dtype))

    assert set(failing(altered(made, tmp_path, "text.onnx", change))) == {
        ("onnx", "tensors"),
        ("onnx", "token ids"),
        ("onnx", "text embedding"),
    }


def test_another_resize_is_found(made, tmp_path):
    def change(model):
        resizes = [
            (n, a)
            for node in model.graph.node
            if node.op_type == 'Loop'
            for n in node.attribute[0].g.node
            if n.op_type == 'Resize'
            for a in n.attribute
            if a.name == 'mode'
        ]
        for _, a in resizes: a.s = b'linear'
        assert len(resizes) == 2
    report = altered(made, tmp_path, 'image.onnx', change)
    assert set(failing(report)) >= {('onnx', 'tensors'), ('onnx', 'pixels')} and (
        'onnx',
        'image embedding',
    ) not in failing(report)


def test_files_of_another_model_and_no_files(made, pairs, tmp_path):
    report = verify(made[0], onnx=pairs[1], fresh=False, cpp=False, sizes=(3,))
    assert [(r.what, r.note) for r in report.failures] == [
        ('runs', f'{pairs[1] / "text.onnx"} not found: no such ONNX file')
    ]
    shutil.copytree(made[1], tmp_path/'g')
    for p in tmp_path.glob('g/*.onnx'):
        m = onnx.load(p)
        onnx.helper.set_model_props(
            m, {x.key: x.value.replace(made[2].card['content_hash'], 'f' * 64) for x in m.metadata_props}
        )
        onnx.save(m, p)
    assert intact(p) and failing(verify(made[0], onnx=tmp_path / 'g', fresh=False, cpp=False, sizes=(3,))) == [
        ('onnx', 'identity card')
    ]


def test_numbers_beside_the_file(made, tmp_path):
    "Weights above the limit of a protocol buffer: onnxruntime finds them, the hash covers them."
    import onnx_ir as ir

    write_graph(
        ir.load(made[1] / 'text.onnx'), tmp_path / 'text.onnx', json.dumps(read_onnx_card(made[1] / 'text.onnx')), 1000
    )
    data = tmp_path/'text.onnx.data'
    assert data.stat().st_size > 10 * (tmp_path/'text.onnx').stat().st_size > 0 and intact(tmp_path/'text.onnx')
    assert np.array_equal(OnnxModel(tmp_path).encode_text(tiny.CAPTIONS), OnnxModel(made[1]).encode_text(tiny.CAPTIONS))
    data.write_bytes(data.read_bytes()[:-1] + b'\x55')
    assert not intact(tmp_path/'text.onnx')


def test_a_resize_is_translated_once(tmp_path, monkeypatch):
    "The second file of the same rules is the first; another rule makes another."
    made = []
    def translated(program, path):
        made.append(path)
        path.write_bytes(b'%d' % len(made))
        return path
    monkeypatch.setattr(pixels, 'vision_program', lambda vp: vp)
    monkeypatch.setattr(pixels, '_translated', translated)
    monkeypatch.setattr(pixels, '_files', {})
    rules = [
        dict(),
        dict(),
        dict(crop='floor'),
        dict(resize_mode='longest'),
        dict(resize_mode='longest', fill=(1, 2, 3)),
        dict(interpolation='bilinear'),
        dict(size=(32, 48)),
        dict(shortest=40),
        dict(shortest=40),
    ]
    files = [
        pixels.vision_to_onnx(VisionPipeline(**{'size': 32} | r), tmp_path / f'{i}').read_bytes()
        for i, r in enumerate(rules)
    ]
    assert files == [b'1', b'1', b'2', b'3', b'4', b'5', b'6', b'7', b'7'] and len(pixels._files) == 4
    with pytest.raises(ValueError, match="resize='pillow' has no exported form"):
        pixels.vision_to_onnx(VisionPipeline(size=32, resize='pillow'), tmp_path / 'x')


class Last(nn.Module):
    def forward(self, x): return nn.functional.normalize(x[:, 1:17] * 2 + .1, dim=-1)


def of_words():
    "A model of whole words, whose tokenizer is quickly translated: what is trimmed is another tokenizer."
    tp, vp = TextPipeline.learn(tiny.CAPTIONS, model='words', max_length=16), tiny.pipelines()[1]
    torch.manual_seed(0)
    return DualEncoder(
        TextTransformer(tp, width=32, depth=2, heads=2), ConvNet(vp, channels=(8, 16), width=32), dim=24
    ).eval()


def test_half_precision_a_users_steps_labels_and_stored_numbers(tmp_path):
    "Everything before and after the towers in one graph, held to the artifact in batches of every size."
    options = dict(
        precision='fp16', before_text=NoDigits(), before_image=Inverted(), after=Last(), trim=4, output='int8',
        labels=['cat', 'dog', 'cow'], top_k=2, threshold={'cat': 0.5, 'dog': 0.1},
    )
    report = export(of_words(), tmp_path/'m.pt', onnx=tmp_path/'g', fresh=False, cpp=False, **options)
    rows, run = stage(report), OnnxModel(tmp_path/'g')
    assert {
        'token ids', 'pixels', 'text embedding', 'image embedding', 'class probability', 'labels',
        'image cosine',
    } <= set(rows) and report.ok
    text, labels, index = run.encode_text(['a red circle 77', 'a red circle '], ('embedding', 'labels', 'index'))
    assert text.dtype == np.int8 and text.shape == (2, 16) and (text[0] == text[1]).all()
    names = np.array(['cat', 'dog', 'cow', ''])
    assert (
        labels.shape == (2, 2) and (names[index] == labels).all() and run.encode_text([], ('labels',)).shape == (0, 2)
    )
    assert set(operators(tmp_path/'g'/'text.onnx')) == set(operators(tmp_path/'g'/'image.onnx')) == {''}


class Patches(nn.Module):
    "A tower whose first convolution does not pad."
    def __init__(self, pipeline):
        super().__init__()
        object.__setattr__(self, 'pipeline', pipeline)
        self.width, self.cut, self.mix = 32, nn.Conv2d(3, 32, 16, 16), nn.Linear(32, 32)
    def forward(self, pixels): return self.mix(self.cut(pixels).flatten(2).mean(2))


def test_int8_folded_bits_in_fixed_batches(tmp_path):
    "An embedding is bit-equal in any company, and the rest within the bounds of verify."
    needs_exact_int8()
    torch.manual_seed(0)
    tp, vp = tiny.pipelines()
    model = DualEncoder(TextTransformer(tp, width=32, depth=2, heads=2), Patches(vp), dim=24).eval()
    assert export(
        model, tmp_path / 'm.pt', onnx=tmp_path / 'b', fresh=False, cpp=False, quantize='int8', fold=True,
        dim=16, output='binary', deterministic=4,
    ).ok
    assert OnnxModel(tmp_path/'b').encode_text(['x']).shape == (1, 2)
    export_onnx(model, tmp_path/'g', Variant(deterministic=4))
    run, texts, pictures = (
        OnnxModel(tmp_path / 'g', threads=2),
        cases.texts(),
        [x.permute(1, 2, 0).contiguous().numpy() for x in cases.arrays()],
    )
    for encode, items in (run.encode_text, texts), (run.encode_image, pictures):
        whole = encode(items)
        for n in 1, 3, 7:
            assert np.array_equal(np.concatenate([encode(items[i : i + n]) for i in range(0, len(items), n)]), whole)
        assert encode([]).shape == (0, 24)


def test_pairs_in_half_precision_fixed_batches(tmp_path):
    report = export(
        tiny.pair_model(), tmp_path / 'm.pt', onnx=tmp_path / 'g', fresh=False, cpp=False, precision='fp16',
        deterministic=3, top_k=1, threshold=0.6,
    )
    run, picture = OnnxModel(tmp_path/'g'), np.full((9, 5, 3), 77, np.uint8)
    assert report.ok and 'labels' in stage(report)
    p, labels = run.score_pairs(['a', 'b'], [picture] * 2, ('class_probability', 'labels'))
    assert labels.tolist() == [[['mismatch', 'match'][r.argmax()] if r.max() >= .6 else ''] for r in p]


def test_inputs_that_do_not_fit_are_errors(made, pairs):
    """No answer for bytes that belong to no item, nor for an item without bytes.

    Invalid UTF-8 is a text, as for the artifact."""
    run, both = OnnxModel(made[1]), OnnxModel(pairs[1])
    def fails(model, name, message, **inputs):
        with pytest.raises(Exception, match=message): model.run(name, ('levels' if name == 'image' else 'ids',), inputs)

    good = {
        'data': np.frombuffer(b'ab cd', np.uint8),
        'offsets': np.array([0, 2, 5]),
        'images': np.zeros(12, np.uint8),
        'sizes': np.array([[1, 2], [2, 1]]),
    }
    for offsets in [0, 2, 4], [0, 2, 6], [1, 5], [0, 4, 2, 5], [0, -1, 5], []:
        fails(
            run,
            'text',
            'offsets must rise from 0 to the length of data',
            data=good['data'],
            offsets=np.array(offsets, np.int64),
        )
    for sizes in [[1, 2]], [[1, 2], [2, 2]], [[2, 2], [1, 0]], [[-1, -2], [1, 2]], []:
        fails(
            run,
            'image',
            'sizes must be at least 1, 3 H W bytes of images for each',
            images=good['images'],
            sizes=np.array(sizes, np.int64).reshape(-1, 2),
        )
    fails(
        both,
        'pairs',
        'as many texts as images make pairs|Shape mismatch',
        **good | {'images': np.zeros(6, np.uint8), 'sizes': np.array([[1, 2]])},
    )
    assert (
        run.run('text', ('ids',), {k: good[k] for k in ('data', 'offsets')}).shape[0]
        == both.run('pairs', ('scores',), good).shape[0]
        == 2
    )
    for t in cases.texts():
        assert np.array_equal(*(run.encode_text([x], ('ids',)) for x in (t, t.decode(errors='replace'))))


def test_labels_that_the_graph_lacks_or_confuses_are_found(tmp_path):
    export(tiny.model(), tmp_path/'m.pt', onnx=tmp_path/'g', fresh=False, cpp=False, labels=['cat', 'dog', 'cow'])
    def check(folder): return failing(verify(tmp_path/'m.pt', onnx=folder, fresh=False, cpp=False, sizes=(3,)))
    assert check(tmp_path/'g') == []
    model = onnx.load(tmp_path/'g'/'text.onnx')
    for n in model.graph.node:
        for a in n.attribute:
            if a.name == 'value_strings': a.strings[0], a.strings[1] = a.strings[1], a.strings[0]
    onnx.save(model, tmp_path/'g'/'text.onnx')
    assert check(tmp_path/'g') == [('onnx', 'tensors'), ('onnx', 'labels')]
    export_onnx(tiny.model(), tmp_path/'g', card=read_onnx_card(tmp_path/'g'/'image.onnx'))
    assert check(tmp_path/'g') == [('onnx', 'labels')]


def test_files_in_front(made, tmp_path):
    """JPEG and PNG files by another decoder: equal pixels where its colours are, the orientation of the camera, no
    row for what it would not survive."""
    pytest.importorskip('onnxruntime_extensions', reason='onnxruntime-extensions has no wheel for Python 3.14')
    shutil.copytree(made[1], tmp_path/'g')
    assert set(operators(add_files(tmp_path/'g'))) == {'', 'com.microsoft.extensions'}
    report = verify(made[0], onnx=tmp_path/'g', fresh=False, cpp=False, sizes=(3,))
    rows, files, run = stage(report), cases.images(), OnnxModel(tmp_path/'g')
    assert (
        report.ok
        and rows['file pixels'].n > 0
        and rows['file pixels, mean'].difference < 3
        and rows['file status'].n == 6
    )
    upright, *turned = run.encode_files([files[f'exif {o}.jpg'] for o in range(1, 9)], ('levels',))
    assert all(not np.array_equal(upright, x) for x in turned)
    assert run.encode_files([]).shape == (0, 24)
    with pytest.raises(ValueError, match=r'files\[1\] is not a whole JPEG or PNG file'):
        run.encode_files([files['L.png'], files['still.gif']])
    with pytest.raises(ValueError, match='no files.onnx here: mmembed export --onnx-files writes it'):
        OnnxModel(made[1]).encode_files([b''])


class Halved(nn.Module):
    def forward(self, rgb: torch.Tensor) -> torch.Tensor:
        while int(rgb.sum()) > 255 * rgb.numel() // 2: rgb = rgb // 2
        return rgb


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(variant=Variant(precision='bf16')), "precision='bf16' has no ONNX form"),
        (dict(steps=Steps(before_image=Halved())), 'before_image has no ONNX form'),
    ],
)
def test_what_a_graph_cannot_hold(options, message, tmp_path):
    with pytest.raises(ValueError, match=message): export_onnx(tiny.model(), tmp_path/'g', **options)
    assert not list(tmp_path.rglob('*.onnx'))


@pytest.mark.weekly
def test_triton_serves_both(made, pairs, tmp_path, capsys):
    import onnxruntime
    from mmembed.cli.main import main
    from mmembed.exporters.triton.check import check_repository
    from mmembed.exporters.triton.config import read_pbtxt
    from mmembed.exporters.triton.repository import export_triton
    assert main(['export', str(made[0]), '--triton', str(tmp_path/'m'), '--onnx', str(made[1])]) == 0
    assert 'model_text_onnx, model_image_onnx' in capsys.readouterr().out
    export_triton(pairs[0], tmp_path/'m', 'both', onnx=pairs[1])
    data, offsets = pack(cases.texts())
    path = tmp_path/'m'/'model_text_onnx'
    (got,) = onnxruntime.InferenceSession(path / '1' / 'model.onnx').run(
        None, {'data': data.numpy(), 'offsets_32': offsets.int().numpy()}
    )
    with torch.no_grad(): want = tiny.model().encode_text(tiny.model().text_pipeline.tokenize(data, offsets))
    assert np.abs(got - want.numpy()).max() < 1e-5
    try: from tritonclient.grpc import model_config_pb2 as pb
    except (ImportError, RuntimeError): pb = None
    for name in 'model_text_onnx', 'model_image_onnx', 'both_pairs_onnx':
        config = tmp_path/'m'/name/'config.pbtxt'
        read = read_pbtxt(config.read_text())
        assert (
            read['platform'] == ['onnxruntime_onnx'] and read['max_batch_size'] == [64] and 'dynamic_batching' in read
        )
        if pb:
            from google.protobuf import text_format
            assert text_format.Parse(config.read_text(), pb.ModelConfig()).platform == 'onnxruntime_onnx'
    config, good = path/'config.pbtxt', (path/'config.pbtxt').read_text()
    for old, new, message in (
        ('dims: [ 24 ]', 'dims: [ 25 ]', r'model_text_onnx: embedding is TYPE_FP32 \[1, 24\], not TYPE_FP32 \[1, 25\]'),
        ('"data"', '"bytes"', 'inputs bytes, offsets_32 for a model that takes data, offsets_32'),
        ('TYPE_INT32', 'TYPE_INT64', 'does not take what config.pbtxt says'),
    ):
        assert old in good
        config.write_text(good.replace(old, new))
        with pytest.raises(ValueError, match=message): check_repository(tmp_path/'m')
    shutil.copy(made[1]/'text.onnx', tmp_path/'pairs.onnx')
    with pytest.raises(ValueError, match='was exported from another model'):
        export_triton(pairs[0], tmp_path / 'n', onnx=tmp_path)


def test_a_file_cannot_be_traced_again(made, tmp_path, capsys):
    from mmembed.cli.main import main
    assert main(['export', str(made[0]), '--onnx', str(tmp_path)]) == 1
    assert '--onnx wants the model that' in capsys.readouterr().err


def test_a_changed_card_is_found(made, tmp_path):
    "`OnnxModel.score` multiplies by what the card says."
    def change(model):
        card = json.loads(next(p.value for p in model.metadata_props if p.key == 'mmembed.card'))
        marks = {p.key: p.value for p in model.metadata_props}
        onnx.helper.set_model_props(model, marks | {'mmembed.card': json.dumps(card | {'logit_scale': 1.})})
    report = altered(made, tmp_path, 'text.onnx', change)
    assert [(r.stage, r.what, r.note) for r in report.failures] == [
        ('onnx', 'identity card', 'the card in text.onnx is not as it was written')
    ]


def test_embed_py_takes_lists_of_texts(made):
    """A bare string is no list of characters, a number no row of zero bytes, and half of a pair of surrogates is
    read as `Embedder` reads it."""
    run, emb = loaded(made[1]), mm.load(made[0])
    for single in ('a cat', b'a cat', bytearray(b'a')):
        with pytest.raises(TypeError, match='texts is a single (str|bytes|bytearray); pass a list'):
            run.encode_text(single)
    wrong = r'texts\[1\] is not a text: pass str or bytes, got int'
    with pytest.raises(TypeError, match=wrong): run.encode_text(['a', 5])
    for call, item, name in ((run.encode_files, b'x', 'files'), (run.encode_image, 'x.jpg', 'images')):
        with pytest.raises((TypeError, ValueError), match=f'{name} is a single|no files.onnx'): call(item)
    with pytest.raises(TypeError, match=r'images\[0\] must be an array'): run.encode_image(['x.jpg'])
    odd = ['\ud83d', 'a\udce9b', 'red \ud83d circle']
    assert np.abs(run.encode_text(odd) - emb.encode_text(odd).numpy()).max() < 1e-5


def test_an_onnx_model_pickles_by_its_folder(made, tmp_path, monkeypatch):
    monkeypatch.chdir(made[1].parent)
    data = pickle.dumps(OnnxModel(made[1].name))
    monkeypatch.chdir(tmp_path)
    assert len(data) < 500 and np.array_equal(
        pickle.loads(data).encode_text(['a']), OnnxModel(made[1]).encode_text(['a'])
    )


def test_a_folder_that_is_not_utf8(made, tmp_path):
    folder = tmp_path/os.fsdecode(b'caf\xe9')
    shutil.copytree(made[1], folder)
    assert np.array_equal(loaded(folder).encode_text(['a']), OnnxModel(made[1]).encode_text(['a']))
    assert verify(made[0], onnx=folder, fresh=False, cpp=False, sizes=(3,)).ok
