import copy
import json
import zipfile

import pytest
import torch

from mmembed.exporters.card import canonical_json, make_card, sha256, abridged
from mmembed.runtime.artifact import read_card
from mmembed.exporters.export import export
from mmembed.models.towers import ConvNet
from mmembed.text.pipeline import TextPipeline
from mmembed.vision.augment import Augmentation
from mmembed.vision.pipeline import VisionPipeline

from tests.exporters import tiny


def test_two_exports_share_their_hashes(tmp_path):
    "Of one process: TorchScript numbers its classes and orders their constants by what the process has done before."
    for name in ('one.pt', 'two.pt'): export(tiny.model(), tmp_path/name, fresh=False, cpp=False)
    one, two = (read_card(tmp_path/name) for name in ('one.pt', 'two.pt'))
    assert one == two and one['short_hash'] == one['content_hash'][:12]


def test_what_decides_the_numbers_decides_the_hash():
    model = tiny.model()

    def hashes(m, **kw):
        return {k: make_card(m, 24, **kw)[k] for k in ('content_hash', 'weights_sha256', 'preprocessing_sha256')}
    base, seen = hashes(model), set()
    variants = {
        'seed': tiny.model(1),
        'weight': copy.deepcopy(model),
        'scale': copy.deepcopy(model),
        'pixels': copy.deepcopy(model),
        'tokenizer': copy.deepcopy(model),
    }
    with torch.no_grad():
        variants['weight'].text_proj.weight[3, 3] += 1e-7
        variants['scale'].logit_scale += 0.01
    image = ConvNet(VisionPipeline(size=48, resize_mode='squash'), channels=(8, 16), width=32)
    image.load_state_dict(model.image.state_dict())
    variants['pixels'].image = image
    spec = json.loads(json.dumps(tiny.pipelines()[0].spec()))
    spec['max_length'] = 15
    object.__setattr__(variants['tokenizer'].text, 'pipeline', TextPipeline.from_spec(spec))
    for name, m in variants.items():
        h = hashes(m)
        assert h['content_hash'] not in seen | {base['content_hash']}, name
        assert (h['weights_sha256'] == base['weights_sha256']) == (name in ('pixels', 'tokenizer')), name
        assert (h['preprocessing_sha256'] == base['preprocessing_sha256']) == (name not in ('pixels', 'tokenizer')), (
            name
        )
        seen.add(h['content_hash'])
    assert hashes(model, decode=False)['content_hash'] != base['content_hash']
    assert hashes(model, training={'metrics': {'recall@1': .5}}) == base


def with_pixels(**options):
    "The model of `tiny` behind another pixel rule, with the same weights."
    model, other = tiny.model(), copy.deepcopy(tiny.model())
    image = ConvNet(VisionPipeline(size=48, **options), channels=(8, 16), width=32)
    image.load_state_dict(model.image.state_dict())
    other.image = image
    return make_card(other, 24)


def test_what_only_training_does_is_not_hashed():
    "Augmentation stands in the card, to be read; an artifact does not augment."
    plain = with_pixels()
    for option in (dict(flip=0.5), dict(scale=(0.2, 1)), dict(color_jitter_prob=0.8), dict(re_prob=0.1)):
        card = with_pixels(augmentation=Augmentation(**option))
        assert card['pixels']['augmentation'] != plain['pixels']['augmentation']
        for key in ('preprocessing_sha256', 'content_hash', 'short_hash'): assert card[key] == plain[key], option
    served = (dict(alpha='black'), dict(crop='floor'), dict(max_pixels=1000), dict(mean=(0, 0, 0)), dict(fill=9))
    hashes = {with_pixels(**option)['content_hash'] for option in served}
    assert len(hashes | {plain['content_hash']}) == len(served) + 1


def test_tables_that_only_make_the_tokenizer_fast_are_not_hashed():
    model = copy.deepcopy(tiny.model())
    tables = [t for k, t in model.text_pipeline.state_dict().items() if k.startswith('words.')]
    assert tables
    for t in tables: t.zero_()
    assert make_card(model, 24)['content_hash'] == make_card(tiny.model(), 24)['content_hash']


def test_the_card_says_what_it_must():
    card = read_card(tiny.artifact())
    needed = (
        'format_version kind dim dtype normalized logit_scale logit_bias max_length vocab_size image_size pixels '
        'tokenizer '
        'preprocessing_sha256 weights_sha256 tensors_sha256 content_hash short_hash versions training parameters decode'
    )
    assert set(needed.split()) <= set(card)
    model = tiny.model()
    assert card['pixels'] == json.loads(json.dumps(model.vision_pipeline.spec()))
    assert card['parameters'] == sum(p.numel() for p in model.parameters())
    assert card['logit_scale'] == pytest.approx(float(model.logit_scale.detach().exp()))
    assert card['decode'] and not read_card(tiny.artifact(False))['decode']


def test_a_large_vocabulary_is_not_in_the_card():
    tokenizer = {'vocab': {f'token{i}': i for i in range(30000)}, 'lower': True}
    short = abridged({'tokenizer': tokenizer})
    assert (
        len(json.dumps(short)) < 200
        and short['tokenizer']['lower'] is True
        and short['tokenizer']['vocab']['count'] == 30000
    )
    tokenizer['vocab']['token7'] = 8
    assert abridged({'tokenizer': tokenizer}) != short


def test_training_record_holds_no_examples_and_no_paths(tmp_path):
    record = {
        'config': {'data': {'path': str(tmp_path / 'pairs.csv')}, 'home': '~/x', 'lr': 1e-3},
        'metrics': {'loss': float('inf'), 'recall@1': torch.tensor(0.5)},
    }
    card = make_card(tiny.model(), 24, training=record)
    assert card['training'] == {
        'config': {'data': {'path': 'pairs.csv'}, 'home': 'x', 'lr': 1e-3},
        'metrics': {'loss': None, 'recall@1': 0.5},
    }
    assert str(tmp_path) not in canonical_json(card)
    with pytest.raises(ValueError, match="'captions'.*never examples"):
        make_card(tiny.model(), 24, training={'captions': ['a']})
    with pytest.raises(TypeError, match='training.config.f is of type function'):
        make_card(tiny.model(), 24, training={'config': {'f': lambda: 0}})


def test_every_truncation_is_one_clear_error(tmp_path):
    whole, path = tiny.artifact().read_bytes(), tmp_path/'cut.pt'
    for n in [0, 1, 30, 100, *range(1000, len(whole), len(whole)//40), len(whole) - 1000, len(whole) - 1]:
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match='cut.pt is not an mmembed artifact, or is truncated'): read_card(path)


def test_other_files(tmp_path):
    def refused(content, match, error=ValueError):
        (tmp_path/'x.pt').write_bytes(content)
        with pytest.raises(error, match=match): read_card(tmp_path/'x.pt')
    refused(b'hello', 'not an mmembed artifact')
    torch.save({'a': 1}, tmp_path/'x.pt')
    with pytest.raises(ValueError, match='no identity card'): read_card(tmp_path/'x.pt')
    for card, match in (
        ('{"format_version": 99}', 'upgrade mmembed'),
        ('not json', 'not an mmembed artifact'),
        ('[]', 'no identity card'),
    ):
        with zipfile.ZipFile(tmp_path/'x.pt', 'w') as z: z.writestr('archive/extra/card.json', card)
        with pytest.raises(ValueError, match=match): read_card(tmp_path/'x.pt')
    whole = read_card(tiny.artifact())
    odd = [
        ('{}', 'x.pt is not an mmembed artifact: its card is not an mmembed card'),
        ('{"format": 1}', 'not an mmembed card'),
        ('{"format": "mmembed"}', 'format_version is missing'),
        (json.dumps(whole | {'dim': '24'}), "damaged: dim is '24'"),
        (json.dumps({k: v for k, v in whole.items() if k != 'decode'}), 'damaged: decode is missing'),
        (json.dumps(whole | {'format_version': 'two'}), "format_version is 'two'"),
        ('[' * 100_000, 'not an mmembed artifact'),
        ('9' * 5000, 'not an mmembed artifact'),
    ]
    for card, match in odd:
        with zipfile.ZipFile(tmp_path/'x.pt', 'w') as z: z.writestr('archive/extra/card.json', card)
        with pytest.raises(ValueError, match=match): read_card(tmp_path/'x.pt')
    with pytest.raises(FileNotFoundError, match='none.pt not found'): read_card(tmp_path/'none.pt')
    with pytest.raises(ValueError, match='it is a folder'): read_card(tmp_path)


def test_tensor_hash_sees_names_types_and_shapes():
    x = torch.arange(6.)
    hashes = [
        sha256(d)
        for d in ({'x': x}, {'y': x}, {'x': x.double()}, {'x': x.view(2, 3)}, {'x': x + 1}, {}, {'x': x, 'y': x})
    ]
    assert len(set(hashes)) == len(hashes)
    assert sha256({'x': x.view(2, 3).T}) == sha256({'x': x.view(2, 3).T.contiguous()})
    assert sha256({'x': torch.ones(3, dtype=torch.bfloat16), 's': torch.tensor(1)}) == sha256(
        {'s': torch.tensor(1), 'x': torch.ones(3, dtype=torch.bfloat16)}
    )
