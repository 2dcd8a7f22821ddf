"""Checkpoints, specs and configs that name modules of older versions still load."""
import importlib
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mmembed.models.base import OLD, from_spec, renewed
from mmembed.models.dual import DualEncoder
from mmembed.train.checkpoint import load_checkpoint
from mmembed.vision.pipeline import VisionPipeline

# addresses in checkpoints and configs written by commit 04f7bea, and where the class is now
ADDRESSES = {
    'mmembed.models.pretrained.OpenClipText': 'mmembed.models.open_clip.OpenClipText',
    'mmembed.models.pretrained.OpenClipImage': 'mmembed.models.open_clip.OpenClipImage',
    'mmembed.models.huggingface.TransformersText': 'mmembed.models.transformers.TransformersText',
    'mmembed.models.huggingface.TransformersImage': 'mmembed.models.transformers.TransformersImage',
    'mmembed.models.huggingface.ProjectedBert': 'mmembed.models.transformers.ProjectedBert',
    'mmembed.models.pretrained.TimmTower': 'mmembed.models.towers.TimmTower',
    'mmembed.models.towers.Bert': 'mmembed.models.bert.Bert',
    'mmembed.models.tower.Tower': 'mmembed.models.base.Tower',
    'mmembed.models.weights.read_weights': 'mmembed.models.base.read_weights',
    'mmembed.data.module.PairData': 'mmembed.train.datamodule.PairData',
    'mmembed.data.labels.MatchData': 'mmembed.train.pair_data.MatchData',
    'mmembed.data.labels.LabelData': 'mmembed.train.pair_data.LabelData',
    'mmembed.data.shards.Shards': 'mmembed.data.webdataset.Shards',
    'mmembed.data.sources.PairsFile': 'mmembed.data.tables.PairsFile',
    'mmembed.data.sources.Source': 'mmembed.data.source.Source',
    'mmembed.shells.LitDualEncoder': 'mmembed.train.modules.LitDualEncoder',
    'mmembed.shells.LitPairClassifier': 'mmembed.train.modules.LitPairClassifier',
    'mmembed.train.Checkpoint': 'mmembed.train.checkpoint.Checkpoint',
}
STAY = [
    'mmembed.models.dual.DualEncoder', 'mmembed.models.dual.DualEncoder.from_open_clip',
    'mmembed.models.pair.PairClassifier', 'mmembed.models.bert.bert', 'mmembed.models.towers.image_tower',
    'mmembed.models.towers.TextTransformer', 'mmembed.models.towers.ConvNet', 'mmembed.models.losses.SigmoidLoss',
    'mmembed.vision.pipeline.VisionPipeline', 'mmembed.data.scenes.Scenes', 'mmembed.data.folders.ClassFolder',
    'mmembed.data.hub.HubData', 'mmembed.train.checkpoint.Checkpoint', 'mmembed.data.source.Source',
]


def found(path):
    "The object at an address; a class may own the last name."
    parts = path.split('.')
    for n in (1, 2):
        try: at = importlib.import_module('.'.join(parts[:-n]))
        except ModuleNotFoundError: continue
        for name in parts[-n:]: at = getattr(at, name)
        return at
    raise AssertionError(f'nothing at {path}')


@pytest.mark.parametrize('old', ADDRESSES)
def test_an_old_address_is_renewed(old):
    assert renewed(old) == ADDRESSES[old]
    assert found(renewed(old)).__name__ == old.rpartition('.')[2]
    assert renewed(renewed(old)) == renewed(old)


@pytest.mark.parametrize('path', STAY)
def test_an_address_that_did_not_move_stays(path):
    assert renewed(path) == path
    found(path)


def test_every_new_address_of_the_table_exists():
    for new in OLD.values():
        try: importlib.import_module(f'mmembed.{new}')
        except ModuleNotFoundError: found(f'mmembed.{new}')


def test_only_addresses_of_ours_change():
    for text in ('my.mmembed.shells.X', 'mmembed.shellscript', 'mmembed.intake_more', 'torch.nn.Linear', ''):
        assert renewed(text) == ('my.mmembed.train.modules.X' if text.startswith('my.') else text)


def small():
    "A CLIP of open_clip's smallest parts, by the same classes as a big one."
    from tests.models.test_open_clip import TEXT, VISION
    from mmembed.models.open_clip import OpenClipImage, OpenClipText
    from mmembed.text.pipeline import TextPipeline
    torch.manual_seed(0)
    text = OpenClipText(TextPipeline.from_open_clip('ViT-B-32', max_length=TEXT['context_length']), 16, TEXT)
    return DualEncoder(text, OpenClipImage(VisionPipeline(size=VISION['image_size']), 16, VISION), None).eval()


def aged(spec):
    "A spec as commit 04f7bea wrote it."
    return json.loads(json.dumps(spec).replace('mmembed.models.open_clip.', 'mmembed.models.pretrained.'))


def test_a_spec_with_old_addresses_is_made_again():
    model = small()
    old = aged(model.spec())
    assert old['init_args']['text']['class_path'] == 'mmembed.models.pretrained.OpenClipText'
    again = from_spec(old)
    assert again.spec() == model.spec()
    again.load_state_dict(model.state_dict())
    tokens, pixels = model.text_pipeline(['a cat', 'two dogs']), torch.randn(2, 3, *model.vision_pipeline.size)
    with torch.no_grad(): assert all(map(torch.equal, again.eval()(tokens, pixels), model(tokens, pixels)))


@pytest.mark.parametrize('ending', ['.ckpt', '.safetensors'])
def test_a_checkpoint_with_old_addresses_loads(tmp_path, ending):
    model, path = small(), tmp_path/f'best{ending}'
    note = {'model': aged(model.spec())}
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    if ending == '.safetensors': save_file(state, path, {'mmembed': json.dumps(note)})
    else: torch.save({'mmembed': note, 'state_dict': {f'model.{k}': v for k, v in state.items()}}, path)
    loaded = load_checkpoint(path)
    assert loaded.spec() == model.spec()
    assert all(v.equal(state[k]) for k, v in loaded.state_dict().items())


def test_a_class_of_the_reader_is_found_where_it_is(monkeypatch):
    import sys
    import types
    module = types.ModuleType('own_layers')
    module.Layer = type('Layer', (nn.Linear,), {'__module__': 'own_layers'})
    monkeypatch.setitem(sys.modules, 'own_layers', module)
    assert type(from_spec({'class_path': 'own_layers.Layer', 'init_args': dict(in_features=1, out_features=2)})) \
        is module.Layer


def test_a_config_of_old_addresses_is_read(tmp_path):
    from jsonargparse import ActionConfigFile
    from lightning.pytorch.cli import LightningArgumentParser
    from mmembed.models.towers import TimmTower
    from mmembed.train.config import renewed_args
    (tmp_path/'old.yaml').write_text('image:\n  class_path: mmembed.models.pretrained.TimmTower.from_timm\n'
                                     '  init_args: {name: test_resnet, pooling: max}\n')
    (tmp_path/'new.yaml').write_text('image: null\n')
    for args in (['--config', str(tmp_path/'old.yaml')], [f'--config={tmp_path}/old.yaml'],
                 ['--image', 'mmembed.models.pretrained.TimmTower.from_timm', '--image.name', 'test_resnet',
                  '--image.pooling', 'max']):
        parser = LightningArgumentParser(exit_on_error=False)
        parser.add_argument('--config', action=ActionConfigFile)
        parser.add_argument('--image', type=nn.Module)
        config = parser.parse_args(renewed_args(args))
        tower = parser.instantiate_classes(config).image
        assert type(tower) is TimmTower and tower.made_with == dict(name='test_resnet', pooling='max')
    now = ['--config', str(tmp_path/'new.yaml'), '--image.init_args.name', 'x']
    assert renewed_args(now) == now


def test_the_old_address_of_a_function_is_renewed():
    "`bert` is a class method under an old name, so its own name is another."
    assert renewed('mmembed.models.towers.bert') == 'mmembed.models.bert.bert'
    assert found(renewed('mmembed.models.towers.bert')) == found('mmembed.models.bert.Bert.from_pretrained')
