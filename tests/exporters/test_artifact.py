import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from mmembed.core.types import Tokens
from mmembed.core.packing import as_bytes, pack
from mmembed.core.torchscript import quietly
from mmembed.exporters.verify import samples as cases
from mmembed.exporters.archive import save
from mmembed.exporters.assemble import assemble, trace_text
from mmembed.models.base import Tower
from mmembed.core.errors import reason
from mmembed.core.torchcodec import register_image_ops
from mmembed.vision.pipeline import VisionPipeline

from tests.helpers import FORMS, in_form
from tests.exporters import tiny

VALID = [t.decode() for t in cases.texts() if '\ufffd' not in t.decode(errors='replace')]
GOOD = [as_bytes(b) for b in cases.images().values()]


CALLED = [
    'tokenize', 'encode_text', 'encode_text_bytes', 'probe', 'preprocess_image', 'encode_image',
    'encode_pixels', 'score',
]


@pytest.fixture(scope='module', params=FORMS)
def artifact(request): return in_form(assemble(tiny.model()), request.param, CALLED)


def batches(items, size): return [items[i:i+size] for i in range(0, len(items), size)]


@torch.no_grad()
def test_texts_are_the_models(artifact):
    model = tiny.model()
    for batch in batches(cases.texts(), 7):
        tokens = model.text_pipeline.tokenize(*pack(batch))
        for want, got in zip(tokens, artifact.tokenize(*pack(batch))): assert torch.equal(want, got)
        assert torch.allclose(model.encode_text(tokens), artifact.encode_text_bytes(*pack(batch)), atol=1e-6)


@torch.no_grad()
def test_strings_are_their_bytes(artifact):
    for batch in batches(VALID, 5):
        assert torch.equal(artifact.encode_text(batch), artifact.encode_text_bytes(*pack(batch)))


@torch.no_grad()
def test_images_are_the_models(artifact):
    model, good = tiny.model(), 0
    for image in GOOD:
        info = artifact.probe(image)
        try: want = model.vision_pipeline.preprocess(image)
        except (ValueError, RuntimeError) as e:
            with pytest.raises((ValueError, RuntimeError, torch.jit.Error)) as caught: artifact.preprocess_image(image)
            assert reason(caught.value) == reason(e) == (info.error or reason(e))
            continue
        assert info.error == '' and torch.equal(artifact.preprocess_image(image), want)
        pixels = model.vision_pipeline.normalize(want[None])
        for got in (artifact.encode_image([image]), artifact.encode_pixels(want[None]), artifact.encode_pixels(pixels)):
            assert torch.allclose(got, model.encode_image(pixels), atol=1e-6)
        good += 1
    assert good > 30


@torch.no_grad()
def test_scores(artifact):
    text, image = artifact.encode_text(VALID[3:6]), artifact.encode_image(GOOD[:2])
    want = tiny.model().logit_scale.exp() * text @ image.T
    assert torch.allclose(artifact.score(text, image), want, atol=1e-5)
    assert torch.equal(artifact(VALID[3:6], GOOD[:2]), artifact.score(text, image))


@torch.no_grad()
def test_empty_batches(artifact):
    assert artifact.encode_text([]).shape == artifact.encode_image([]).shape == (0, 24)
    assert artifact.encode_text_bytes(*pack([])).shape == (0, 24)
    assert artifact.tokenize(*pack([])).ids.shape == (0, 0)
    assert artifact.encode_pixels(torch.zeros(0, 3, 48, 48, dtype=torch.uint8)).shape == (0, 24)
    assert artifact.encode_pixels(torch.zeros(0, 3, 48, 48)).shape == (0, 24)
    assert artifact([], []).shape == (0, 0)
    assert artifact(VALID[:2], []).shape == (2, 0)


U8 = dict(dtype=torch.uint8)
WRONG = {
    'data must be a uint8': lambda a: a.tokenize(torch.zeros(3), torch.tensor([0, 3])),
    'offsets must be an int64': lambda a: a.tokenize(torch.zeros(3, **U8), torch.tensor([0, 3], dtype=torch.int32)),
    'offsets must rise': lambda a: a.encode_text_bytes(torch.zeros(3, **U8), torch.tensor([0, 2, 1, 3])),
    'offsets must rise from 0': lambda a: a.encode_text_bytes(torch.zeros(3, **U8), torch.tensor([0, 4])),
    'images[1]: the file is empty': lambda a: a.encode_image([torch.zeros(3, 4, 4, **U8), torch.zeros(0, **U8)]),
    'images[0]: decoded RGB': lambda a: a.encode_image([torch.zeros(1, 4, 4, **U8)]),
    'images[0]: image must be uint8': lambda a: a.encode_image([torch.zeros(3, 4, 4)]),
    'pixels must have the shape (B, 3, 48, 48)': lambda a: a.encode_pixels(torch.zeros(2, 3, 40, 40)),
    'pixels must be uint8': lambda a: a.encode_pixels(torch.zeros(2, 3, 48, 48, dtype=torch.int64)),
    'text must have the shape (T, 24)': lambda a: a.score(torch.zeros(24), torch.zeros(1, 24)),
    'image must have the shape (I, 24)': lambda a: a.score(torch.zeros(1, 24), torch.zeros(1, 23)),
}


@pytest.mark.parametrize('message', WRONG)
def test_wrong_inputs_name_the_argument(artifact, message):
    with pytest.raises((ValueError, RuntimeError, torch.jit.Error)) as caught: WRONG[message](artifact)
    assert message in reason(caught.value)


def test_the_file_holds_no_paths_of_this_machine():
    traces = {
        str(Path.cwd()),
        str(Path.home()),
        sys.prefix,
        str(Path(torch.__file__).parent),
        str(tiny.artifact().parent),
    } - {'/'}
    with zipfile.ZipFile(tiny.artifact()) as z:
        assert not [n for n in z.namelist() if n.endswith('.debug_pkl')]
        for name in z.namelist():
            content = z.read(name)
            assert not [t for t in traces if t.encode() in content], name


def test_a_function_has_a_file_of_its_own():
    "torch's reader copies a whole file for each name that one branch of an `if` defines: long files are slow to load."
    with zipfile.ZipFile(tiny.artifact()) as z:
        code = {n.partition('/code/')[2]: z.read(n) for n in z.namelist() if '/code/' in n}
    heads = {n: re.findall(rb'^(?:def|class) (\w+)', text, re.M) for n, text in code.items()}
    assert not [n for n, text in code.items() if re.search(rb'^def ', text, re.M) and len(heads[n]) > 1]
    assert heads['__torch__/mmembed/vision/probe_jpeg/scan_jpeg.py'] == [b'scan_jpeg']
    assert [b'Header'] in heads.values()


def test_what_was_loaded_is_saved_again(tmp_path):
    "Functions that have a file of their own keep it, whatever the module is part of now."
    class Round(torch.nn.Module):
        def __init__(self, artifact):
            super().__init__()
            self.artifact = artifact

        def forward(self, texts: list[str], images: list[torch.Tensor]) -> torch.Tensor:
            return self.artifact(texts, images)

    register_image_ops()
    loaded = quietly(torch.jit.load, str(tiny.artifact()))
    for name, module in ('again.pt', loaded), ('round.pt', torch.jit.script(Round(loaded))):
        save(module, tmp_path/name, '{}')
        again = quietly(torch.jit.load, str(tmp_path/name))
        images = [as_bytes(x) for x in list(cases.images().values())[:2]]
        assert torch.equal(again(['one', 'two'], images), loaded(['one', 'two'], images))
        with zipfile.ZipFile(tmp_path/name) as z: assert not [n for n in z.namelist() if 'scan_jpeg/scan_jpeg' in n]


def test_the_model_is_left_alone():
    model = tiny.model().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assemble(model)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_without_the_decoders_torchcodec_is_not_needed():
    program = '''
import sys; sys.modules['torchcodec'] = sys.modules['mmembed'] = None
import torch
m = torch.jit.load(sys.argv[1])
with torch.no_grad():
    print(tuple(m.encode_image([torch.zeros(3, 50, 70, dtype=torch.uint8)]).shape), tuple(m.encode_text(['a']).shape))
    try: m.preprocess_image(torch.zeros(50, dtype=torch.uint8))
    except Exception as e: print(str(e).strip().splitlines()[-1])
'''
    run = subprocess.run(
        [sys.executable, '-I', '-W', 'ignore', '-c', program, tiny.artifact(False)], capture_output=True, text=True
    )
    assert run.stdout.startswith('(1, 24) (1, 24)\n') and 'decoded RGB' in run.stdout, run
    with_decoders = subprocess.run(
        [sys.executable, '-I', '-W', 'ignore', '-c', program, tiny.artifact()], capture_output=True, text=True
    )
    assert 'torchcodec_ns' in with_decoders.stderr


def test_bert_is_traced():
    pytest.importorskip('transformers')
    from mmembed.models.bert import Bert
    tp, _ = tiny.pipelines()
    torch.manual_seed(0)
    config = dict(
        model_type='bert', vocab_size=tp.vocab_size, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64,
    )
    model = tiny.model()
    model.text = Bert(tp, config).eval()
    loaded = in_form(assemble(model), 'loaded')
    with torch.no_grad():
        for size in (1, 3, 64):
            for batch in batches(cases.texts(), size):
                want = model.encode_text(tp.tokenize(*pack(batch)))
                assert torch.allclose(loaded.encode_text_bytes(*pack(batch)), want, atol=1e-5)
        assert loaded.encode_text([]).shape == (0, 24)


def test_a_trace_that_does_not_follow_the_length_is_refused():
    class Fixed(Tower):
        traceable, width = True, 4
        def forward(self, tokens): return tokens.ids.float() @ torch.ones(int(tokens.ids.shape[1]), 4)
    tower = Fixed()
    tokens = [Tokens(torch.ones(2, n, dtype=torch.int64), torch.ones(2, n, dtype=torch.int64)) for n in (4, 6)]
    with pytest.raises(ValueError, match=r'text tower Fixed, traced with ids of shape \(2, 4\), is wrong for \(2, 6\)'):
        trace_text(tower, tokens)


def test_a_model_without_pipelines_is_refused():
    with pytest.raises(TypeError, match='Linear has no text_pipeline'): assemble(torch.nn.Linear(1, 1))


def test_pictures_of_another_type_are_refused():
    model = tiny.model()
    model.image.pipeline = VisionPipeline.from_spec({**model.vision_pipeline.spec(), 'dtype': 'float16'})
    with pytest.raises(ValueError, match="gives float16, the towers take float32"): assemble(model)
