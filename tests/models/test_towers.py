"""Towers: padding is not seen, scripting changes nothing, a spec makes the same again, public weights give public
answers."""
import json
import pickle

import pytest
import torch
import torchvision
from lightning.pytorch.cli import LightningArgumentParser

from mmembed.core.types import Tokens
from mmembed.exporters.export import export
from mmembed.models.dual import DualEncoder
from mmembed.models.bert import Bert, bert
from mmembed.models.towers import (
    ConvNet, TextTransformer, TimmTower, TorchvisionTower, image_tower, timm_tower,
)
from mmembed.models.base import from_spec
from mmembed.text.pipeline import TextPipeline
from mmembed.vision.pipeline import VisionPipeline
from tests.alone import alone
from tests.helpers import FORMS, in_form

TEXTS = ['a red circle', 'a blue square left of a red ring', '一个红色圆形', '', 'a ' * 60]
TP = TextPipeline.learn(TEXTS * 9, vocab_size=200, max_length=32)
VP = VisionPipeline(size=(64, 48))


def text_tower(): return TextTransformer(TP, width=32, depth=2)


@pytest.fixture(autouse=True)
def no_grad():
    torch.manual_seed(0)
    with torch.no_grad(): yield


@pytest.fixture(scope='module')
def bert_folder(tmp_path_factory):
    from transformers import BertConfig, BertModel
    folder = tmp_path_factory.mktemp('bert')
    torch.manual_seed(1)
    BertModel(BertConfig(vocab_size=TP.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                         intermediate_size=48, max_position_embeddings=40)).save_pretrained(folder)
    TP.to_tokenizer_file(folder/'tokenizer.json')
    return folder


@pytest.mark.parametrize('form', FORMS)
def test_text_transformer_in_every_form(form):
    tower = text_tower().eval()
    got = in_form(tower, form)
    for texts in (TEXTS, TEXTS[:1], TEXTS[3:4]):
        tokens = TP(texts)
        assert torch.allclose(got(tokens), tower(tokens), atol=1e-6) and got(tokens).shape == (len(texts), 32)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize(
    'make', [lambda: ConvNet(VP, channels=(8, 16), width=24), lambda: image_tower('resnet18', pipeline=VP)]
)
def test_image_towers_in_every_form(form, make):
    tower = make().eval()
    pixels = torch.randn(3, 3, *tower.pipeline.size)
    got = in_form(tower, form)(pixels)
    assert torch.allclose(got, tower(pixels), atol=1e-5) and got.shape == (3, tower.width)


@pytest.mark.parametrize('make', [text_tower, lambda: Bert(TP, _config()), lambda: Bert(TP, _config(), 'cls')])
def test_padding_is_not_seen(make):
    tower = make().eval()
    together = tower(TP(TEXTS))
    for i, text in enumerate(TEXTS): assert torch.allclose(tower(TP([text]))[0], together[i], atol=1e-5)
    tokens = TP(TEXTS)
    junk = Tokens(tokens.ids.where(tokens.mask > 0, torch.tensor(7)), tokens.mask)
    assert torch.allclose(tower(junk), together, atol=1e-6)


def test_order_of_words_is_seen():
    tower = text_tower().eval()
    a, b = tower(TP(['a red circle a blue square', 'a blue circle a red square']))
    assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize(
    'make',
    [
        text_tower,
        lambda: ConvNet(VP, channels=(8, 16), width=24),
        lambda: Bert(TP, _config(), 'cls'),
        lambda: image_tower('mobilenet_v2', pipeline=VP),
    ],
)
def test_a_spec_makes_the_same_tower(make):
    tower = make().eval()
    spec = json.loads(json.dumps(tower.spec()))
    again = from_spec(spec).eval()
    again.load_state_dict(tower.state_dict())
    assert again.spec() == tower.spec() == spec and type(again) is type(tower)
    x = TP(TEXTS) if isinstance(tower.pipeline, TextPipeline) else torch.randn(2, 3, 64, 48)
    assert again(x).equal(tower(x))


def test_the_pipeline_is_carried_but_is_no_part_of_the_network():
    tower = ConvNet(VP, channels=(8, 16))
    assert tower.pipeline is VP and list(dict(tower.named_children())) == ['stem', 'norm', 'blocks', 'pool', 'head']
    assert not {k for k in tower.state_dict() if 'pipeline' in k or k.endswith(('mean', 'std')) and 'running' not in k}
    tower.double()
    assert VP.mean.dtype == torch.float32
    again = pickle.loads(pickle.dumps(tower))
    assert again.pipeline.spec() == VP.spec()


def test_tokenizer_file_or_folder(tmp_path):
    TP.to_tokenizer_file(tmp_path/'tokenizer.json')
    for where in (tmp_path, tmp_path/'tokenizer.json'):
        tower = TextTransformer(str(where), width=32, max_length=20)
        assert tower.pipeline.max_length == 20 and tower.pipeline(TEXTS[:3]).ids.equal(TP(TEXTS[:3]).ids)


def test_bert_is_the_reference_model(bert_folder):
    from transformers import AutoModel
    net = AutoModel.from_pretrained(bert_folder).eval()
    tokens = TP(TEXTS)
    hidden = net(input_ids=tokens.ids, attention_mask=tokens.mask).last_hidden_state
    weight = tokens.mask[:, :, None].float()
    assert torch.allclose(
        bert(bert_folder, max_length=32).eval()(tokens), (hidden * weight).sum(1) / weight.sum(1), atol=1e-6
    )
    assert torch.allclose(bert(bert_folder, 'cls', max_length=32).eval()(tokens), hidden[:, 0], atol=1e-6)


def test_a_traced_bert_follows_batch_and_length(bert_folder):
    tower = bert(bert_folder, max_length=32).eval()
    class Flat(torch.nn.Module):
        def __init__(self): super().__init__(); self.tower = tower
        def forward(self, ids, mask): return self.tower(Tokens(ids, mask))
    traced = torch.jit.trace(Flat(), tuple(TP(TEXTS[:2])), check_trace=False)
    assert (
        'device("cpu")' not in traced.inlined_graph.__str__().replace("'", '"').split('prim::Constant[value="cpu"]')[0]
    )
    for texts in (TEXTS, TEXTS[:1], TEXTS[4:]): assert torch.allclose(traced(*TP(texts)), tower(TP(texts)), atol=1e-6)


def test_image_weights_from_a_file(tmp_path):
    full = torchvision.models.resnet18().eval()
    torch.save(full.state_dict(), tmp_path/'w.pth')
    from safetensors.torch import save_file
    save_file(full.state_dict(), tmp_path/'w.safetensors')
    pixels = torch.randn(2, 3, 64, 64)
    for name in ('w.pth', 'w.safetensors'):
        assert full.fc(image_tower('resnet18', str(tmp_path/name)).eval()(pixels)).equal(full(pixels))


def test_mistakes(tmp_path):
    torch.save({'x': torch.zeros(1)}, tmp_path/'other.pth')
    for f, error, message in [
        (lambda: TextTransformer('no.json'), FileNotFoundError, 'no tokenizer file no.json'),
        (lambda: TextTransformer(TP, width=10, heads=3), ValueError, 'heads must divide width, got 3 and 10'),
        (lambda: image_tower('resnet7'), ValueError, "torchvision knows no classifier 'resnet7'"),
        (lambda: image_tower('fcn_resnet50'), ValueError, "torchvision knows no classifier 'fcn_resnet50'"),
        (lambda: image_tower('resnet18', 'no.pth'), FileNotFoundError, 'no weights file no.pth'),
        (lambda: image_tower('resnet18', 'BEST'), ValueError, "resnet18 has no weights 'BEST'; want a file or one of"),
        (lambda: image_tower('resnet18', str(tmp_path / 'other.pth')), ValueError, 'does not fit resnet18'),
        (lambda: bert('no such/folder'), FileNotFoundError, 'no folder no such/folder'),
        (lambda: Bert(TP, _config(), 'sum'), ValueError, "pooling must be one of mean, cls, max, got 'sum'"),
        (
            lambda: from_spec({'class_path': 'no.such.Tower', 'init_args': {}}),
            ValueError,
            'cannot rebuild no.such.Tower',
        ),
        (
            lambda: from_spec({'class_path': 'subprocess.Popen', 'init_args': {'args': 'x'}}),
            ValueError,
            'is not an nn.Module',
        ),
    ]:
        with pytest.raises(error, match=message): f()


KINDS = {
    'roberta': {'pad_token_id': 1},
    'xlm-roberta': {'pad_token_id': 1},
    'distilbert': dict(dim=32, n_layers=1, n_heads=2, hidden_dim=48),
    'electra': {'embedding_size': 32},
    'albert': {'embedding_size': 16},
    'mpnet': {},
    'deberta-v2': {},
}


@pytest.mark.parametrize('kind', KINDS)
def test_the_bert_family_is_the_reference_and_traces(kind):
    tower = Bert(TP, _config() | {'model_type': kind} | KINDS[kind], 'max').eval()
    pad = tower.net.config.pad_token_id
    tokens = TP(TEXTS)
    ids = tokens.ids.where(tokens.mask > 0, torch.tensor(pad))  # RoBERTa finds its positions by the padding's id
    ids = ids.where((tokens.mask == 0) | (ids != pad), torch.tensor(9))
    hidden = tower.net(input_ids=ids, attention_mask=tokens.mask).last_hidden_state
    want = torch.stack([h[m > 0].amax(0) for h, m in zip(hidden, tokens.mask)])
    assert torch.allclose(tower(Tokens(ids, tokens.mask)), want, atol=1e-6)
    from mmembed.exporters.assemble import trace_text
    traced = trace_text(tower, [TP(TEXTS), TP(TEXTS[:1]), TP(TEXTS[4:])])
    assert torch.allclose(traced(tokens), tower(tokens), atol=1e-6)


def test_a_hub_name_that_cannot_be_downloaded(monkeypatch):
    def offline(*_, **__): raise OSError('no network')
    monkeypatch.setattr('huggingface_hub.snapshot_download', offline)
    with pytest.raises(OSError, match='bert-base-uncased is not a folder here, and cannot be downloaded'):
        bert('bert-base-uncased')


def test_image_pooling_and_squeezenet():
    full = torchvision.models.squeezenet1_1().eval()
    tower = image_tower('squeezenet1_1', pipeline=VP).eval()
    tower.net.load_state_dict({k: v for k, v in full.state_dict().items() if not k.startswith('classifier.')})
    pixels = torch.randn(2, 3, 64, 48)
    assert torch.allclose(tower(pixels), full.features(pixels).mean((2, 3)), atol=1e-6) and tower.width == 512
    tower = image_tower('resnet18', pipeline=VP, pooling='max').eval()
    net = tower.net
    x = net.layer4(net.layer3(net.layer2(net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(pixels))))))))
    assert tower(pixels).equal(x.amax((2, 3))) and from_spec(tower.spec()).made_with['pooling'] == 'max'
    with pytest.raises(ValueError, match="no pooling that pooling='max'"):
        image_tower('vit_b_16', pipeline=VP, pooling='max')


def test_a_download_that_fails_says_what_to_do(monkeypatch):
    def offline(*_, **__): raise OSError('no network')
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', offline)
    with pytest.raises(
        OSError, match=r'cannot download the weights DEFAULT of resnet18 \(no network\); give a local file'
    ):
        image_tower('resnet18', 'DEFAULT')


def _config():
    return dict(
        model_type='bert', vocab_size=TP.vocab_size, hidden_size=32, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=48,
    )


def test_a_pipeline_with_more_ids_than_the_model_has_rows():
    """It would fail at the first text that has one of them.

    A model with more rows than ids, as many are padded, is taken."""
    from mmembed.models.transformers import ProjectedBert, TransformersText
    from mmembed.models.open_clip import OpenClipText

    small = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32
    )
    words = TextPipeline.learn([f'a photo of the {n}th cat' for n in range(300)], vocab_size=150, max_length=16)
    towers = [
        lambda rows: OpenClipText(words, 16, dict(context_length=16, vocab_size=rows, width=32, heads=2, layers=1)),
        lambda rows: TransformersText(words, 'CLIPTextModel', small | dict(vocab_size=rows), 16),
        lambda rows: TransformersText(words, 'SiglipTextModel', small | dict(vocab_size=rows, projection_size=32), 32),
        lambda rows: Bert(words, small | dict(model_type='bert', vocab_size=rows)),
        lambda rows: ProjectedBert(words, small | dict(model_type='bert', vocab_size=rows), 'cls', []),
    ]
    for make in towers:
        for rows in (words.vocab_size, words.vocab_size + 10): make(rows)
        message = f'has {words.vocab_size} ids, the model only {words.vocab_size - 1} rows'
        with pytest.raises(ValueError, match=message): make(words.vocab_size - 1)


def test_a_pipeline_with_longer_texts_than_the_encoder_has_positions(bert_folder):
    "The folder of a saved encoder gives texts that it can take, though `max_length` allows more."
    with pytest.raises(ValueError, match='gives up to 48 tokens, the model takes 40'):
        Bert(TextPipeline.learn(TEXTS * 9, vocab_size=150, max_length=48), bert(str(bert_folder)).made_with['config'])
    tower = bert(str(bert_folder), max_length=128).eval()
    assert tower.pipeline.max_length == 40 and tower(tower.pipeline(['a ' * 200])).isfinite().all()


IMAGE_TOWERS = {
    'ConvNet': lambda: ConvNet(VP),
    'torchvision': lambda: image_tower('shufflenet_v2_x0_5', pipeline=VisionPipeline(size=64)),
    'timm': lambda: timm_tower('test_vit'),
    'timm convolutions': lambda: timm_tower('test_resnet'),
}


@pytest.mark.parametrize('name', IMAGE_TOWERS)
@alone(lambda: torch.set_grad_enabled(False))
def test_exported_and_verified(name, tmp_path):
    "Each in a process where nothing was scripted before."
    model = DualEncoder(text_tower(), IMAGE_TOWERS[name](), dim=16).eval()
    assert export(model, tmp_path/'m.pt', decode=False, fresh=False, cpp=False).ok


def test_towers_are_made_by_classmethods_as_pipelines_are(tmp_path):
    torch.manual_seed(0)
    net = torchvision.models.resnet18()
    torch.save(net.state_dict(), tmp_path/'r18.pth')
    tower = TorchvisionTower.from_torchvision('resnet18', str(tmp_path/'r18.pth'))
    assert tower.net.layer1[0].conv1.weight.equal(net.layer1[0].conv1.weight) and tower.pipeline.size == (224, 224)
    assert isinstance(TimmTower.from_timm('test_resnet', pooling='max'), TimmTower)
    with pytest.raises(FileNotFoundError, match='no folder no such/folder'): Bert.from_pretrained('no such/folder')
    # the names of earlier versions are the same functions
    for old, new in ((image_tower, TorchvisionTower.from_torchvision), (timm_tower, TimmTower.from_timm),
                     (bert, Bert.from_pretrained)):
        assert old == new


@pytest.mark.parametrize('path', ['mmembed.models.towers.image_tower',
                                  'mmembed.models.towers.TorchvisionTower.from_torchvision'])
def test_configs_name_towers_by_function_or_classmethod(path):
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_argument('--image', type=torch.nn.Module)
    config = parser.parse_args(['--image', f'{{class_path: {path}, init_args: {{name: resnet18, pooling: max}}}}'])
    tower = parser.instantiate_classes(config).image
    assert isinstance(tower, TorchvisionTower) and tower.made_with == dict(name='resnet18', pooling='max')
