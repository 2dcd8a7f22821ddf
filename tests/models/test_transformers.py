"""Folders of transformers and sentence-transformers: one artifact, the ids, pixels and embeddings that their own
classes give."""
import gzip
import io
import json
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from transformers import (
    BertConfig, BertModel, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer,
    CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast, SiglipConfig, SiglipImageProcessor,
    SiglipModel, VisionTextDualEncoderModel,
)

from mmembed.exporters.verify import samples as cases
from mmembed.exporters.export import export
from mmembed.models.dual import DualEncoder
from mmembed.models.transformers import ProjectedBert, TransformersText, transformers_towers
from mmembed.models.base import from_spec
from mmembed.runtime.embedder import load
from mmembed.text.pipeline import TextPipeline
from tests.alone import alone

TEXTS = [
    'a photo of a cat',
    '',
    'Zwei Hunde auf dem Sofa, ' * 30,
    "!!! it's a CAT <|endoftext|> é 一只猫",
    '  two   spaces\n',
    '123 456',
]
SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
PICTURES = [
    (k, v)
    for k, v in cases.images().items()
    if k in ('RGB.png', 'RGBA.png', 'quality 75.jpg', 'large.jpg', 'tall.jpg', 'palette transparent.png', 'exif 6.jpg')
]


@pytest.fixture(scope='module', autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def no_grad():
    torch.manual_seed(0)
    with torch.no_grad(): yield


def learned(folder, length):
    TextPipeline.learn([t for t in TEXTS if t] * 9, vocab_size=200, max_length=length).to_tokenizer_file(
        folder / 'tokenizer.json'
    )
    tok = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / 'tokenizer.json'), pad_token='[PAD]', model_max_length=length
    )
    tok.save_pretrained(folder)
    return tok


def clip(folder):
    merges = (
        gzip.open(Path(open_clip.__file__).parent / 'bpe_simple_vocab_16e6.txt.gz').read().decode().split('\n')[1:48895]
    )
    vocab = list(open_clip.get_tokenizer('ViT-B-32').encoder)[:-2] + ['<|startoftext|>', '<|endoftext|>']
    (folder/'vocab.json').write_text(json.dumps({t: i for i, t in enumerate(vocab)}))
    (folder/'merges.txt').write_text('\n'.join(['#version: 0.2', *merges]))
    tok = CLIPTokenizer.from_pretrained(folder, model_max_length=77)
    processor = CLIPProcessor(
        CLIPImageProcessor(size={'shortest_edge': 32}, crop_size={'height': 32, 'width': 32}), tok
    )
    processor.save_pretrained(folder)
    CLIPModel(
        CLIPConfig(projection_dim=16, text_config=SMALL, vision_config=SMALL | dict(image_size=32, patch_size=16))
    ).save_pretrained(folder)
    return processor.tokenizer, processor.image_processor


def siglip(folder):
    config = SiglipConfig(
        text_config=SMALL | dict(vocab_size=200, max_position_embeddings=16, projection_size=32),
        vision_config=SMALL | dict(image_size=32, patch_size=16),
    )
    config.text_config.bos_token_id = config.text_config.eos_token_id = config.text_config.pad_token_id = 1
    model = SiglipModel(config)
    model.logit_bias.data.fill_(-7.)
    model.save_pretrained(folder)
    pictures = SiglipImageProcessor(size={'height': 32, 'width': 32})
    pictures.save_pretrained(folder)
    return learned(folder, 16), pictures


def bert(folder):
    text = BertModel(BertConfig(vocab_size=200, max_position_embeddings=40, **SMALL))
    vision = CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=16, **SMALL))
    model = VisionTextDualEncoderModel(vision_model=vision, text_model=text)
    model.config.projection_dim = 16
    model.visual_projection, model.text_projection = (
        torch.nn.Linear(32, 16, bias=False),
        torch.nn.Linear(32, 16, bias=False),
    )
    model.save_pretrained(folder)
    pictures = CLIPImageProcessor(size={'shortest_edge': 32}, crop_size={'height': 32, 'width': 32})
    pictures.save_pretrained(folder)
    return learned(folder, 40), pictures


def theirs(folder, tokenizer, pictures, fixed):
    "ids, pixels and both embeddings, as the README of such a model has it."
    model = transformers.AutoModel.from_pretrained(folder).eval()
    words = tokenizer(
        TEXTS,
        padding='max_length' if fixed else True,
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors='pt',
    )
    pixels = pictures([Image.open(io.BytesIO(x)) for _, x in PICTURES], return_tensors='pt').pixel_values
    given = {'input_ids': words.input_ids} if fixed else {k: words[k] for k in ('input_ids', 'attention_mask')}
    text, image = (
        model.get_text_features(**given).pooler_output,
        model.get_image_features(pixel_values=pixels).pooler_output,
    )
    return words.input_ids, pixels, F.normalize(text, dim=-1), F.normalize(image, dim=-1), model


def begin():
    "What the fixtures above do, in a process of its own."
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)


@pytest.mark.parametrize('make', [clip, siglip, bert])
@alone(begin)
def test_one_artifact_with_their_numbers(make, tmp_path):
    (tmp_path/'m').mkdir()
    ids, pixels, text, image, reference = theirs(tmp_path/'m', *make(tmp_path/'m'), make is siglip)
    model = DualEncoder.from_transformers(tmp_path/'m').eval()
    report = export(model, tmp_path/'m.pt', fresh=False, cpp=False)
    emb = load(tmp_path/'m.pt')
    got = emb.tokenize(TEXTS).ids
    n = min(got.shape[1], ids.shape[1])
    assert got[:, :n].equal(ids[:, :n]) and (emb.tokenize(TEXTS).mask[:, n:] == 0).all()
    assert (emb.encode_text(TEXTS) - text).abs().max() <= 1e-5
    assert (emb.module.model.encode_image(pixels) - image).abs().max() <= 1e-5
    ours = torch.stack([emb.preprocess(x) for _, x in PICTURES if not _.startswith('exif')])
    kept = torch.tensor([not k.startswith('exif') for k, _ in PICTURES])
    level = (emb.module.normalized(ours) - pixels[kept]).abs() * emb.module.vision_pipeline.std * 255
    assert level.max() < 1.5 and (level < .5).float().mean() > .99
    assert F.cosine_similarity(emb.encode_pixels(ours), image[kept]).min() > .999
    assert report.card['logit_scale'] == pytest.approx(float(reference.logit_scale.exp())) and report.card[
        'logit_bias'
    ] == (-7 if make is siglip else 0)
    if make is clip: return  # its 49,408 tokens take seconds to arrange
    again = from_spec(json.loads(json.dumps(model.spec()))).eval()
    again.load_state_dict(model.state_dict())
    assert again.encode_text(model.text_pipeline(TEXTS)).equal(model.encode_text(model.text_pipeline(TEXTS)))


def test_the_first_clips_end_at_their_largest_id():
    "Their configurations say eos_token_id=2, and transformers then looks for the largest id."
    pipeline = TextPipeline.learn([t for t in TEXTS if t] * 9, vocab_size=200, max_length=40)
    net = CLIPModel(
        CLIPConfig(
            text_config=SMALL | dict(vocab_size=200, eos_token_id=2, bos_token_id=1),
            vision_config=SMALL | dict(image_size=32, patch_size=16),
        )
    ).text_model.eval()
    tower, tokens = (
        TransformersText(pipeline, 'CLIPTextModel', net.config.to_dict(), 32, net, torch.nn.Identity()),
        pipeline(TEXTS),
    )
    assert torch.allclose(tower(tokens), net(tokens.ids).pooler_output, atol=1e-5)


def sentences(folder, layers=()):
    "As sentence-transformers saves a text encoder with a mean and dense layers."
    modules = ['Transformer', 'Pooling', *['Dense'] * len(layers), 'Normalize']
    paths = ['', *(f'{i}_{m}' for i, m in enumerate(modules) if i)]
    for p in paths: (folder/p).mkdir(exist_ok=True, parents=True)
    (folder / 'modules.json').write_text(
        json.dumps(
            [
                dict(idx=i, name=str(i), path=p, type=f'sentence_transformers.models.{m}')
                for i, (m, p) in enumerate(zip(modules, paths))
            ]
        )
    )
    (folder / '1_Pooling' / 'config.json').write_text(
        json.dumps(dict(word_embedding_dimension=32, pooling_mode_cls_token=False, pooling_mode_mean_tokens=True))
    )
    (folder/'sentence_bert_config.json').write_text(json.dumps(dict(max_seq_length=24, do_lower_case=False)))
    net = BertModel(BertConfig(vocab_size=200, max_position_embeddings=40, **SMALL))
    net.save_pretrained(folder)
    for p, layer in zip(paths[2:], layers):
        (folder / p / 'config.json').write_text(
            json.dumps(
                dict(
                    in_features=layer.in_features,
                    out_features=layer.out_features,
                    bias=True,
                    activation_function='torch.nn.modules.activation.Tanh',
                )
            )
        )
        torch.save({f'linear.{k}': v for k, v in layer.state_dict().items()}, folder/p/'pytorch_model.bin')
    return learned(folder, 40), net.eval()


def test_sentence_transformers(tmp_path):
    "A model of two towers that lies in a module's folder, and a text encoder that was trained to meet its images."
    (tmp_path/'s'/'0_CLIPModel').mkdir(parents=True)
    siglip(tmp_path/'s'/'0_CLIPModel')
    (tmp_path / 's' / 'modules.json').write_text(
        json.dumps([dict(idx=0, name='0', path='0_CLIPModel', type='sentence_transformers.models.CLIPModel')])
    )
    plain = DualEncoder.from_transformers(tmp_path/'s').eval()
    dense = torch.nn.Linear(32, 32)
    tokenizer, net = sentences(tmp_path/'t', [dense])
    model = DualEncoder.from_transformers(tmp_path/'t', tmp_path/'s').eval()
    words = tokenizer(TEXTS, padding=True, truncation=True, max_length=24, return_tensors='pt')
    x, keep = net(words.input_ids, words.attention_mask).last_hidden_state, words.attention_mask[:, :, None]
    want = F.normalize(torch.tanh(dense((x * keep).sum(1) / keep.sum(1))), dim=-1)
    tokens, pixels = model.text_pipeline(TEXTS), torch.randn(2, 3, 32, 32)
    assert tokens.ids[:, : words.input_ids.shape[1]].equal(words.input_ids) and torch.allclose(
        model.encode_text(tokens), want, atol=1e-5
    )
    assert model.encode_image(pixels).equal(plain.encode_image(pixels)) and plain.text_pipeline.max_length == 16
    again = from_spec(json.loads(json.dumps(model.spec()))).eval()
    again.load_state_dict(model.state_dict())
    assert again.encode_text(tokens).equal(model.encode_text(tokens))


def test_what_cannot_be_built_is_named(tmp_path):
    for d in ('dual', 'text', 'wide', 'blip', 'none'): (tmp_path/d).mkdir()
    bert(tmp_path/'dual'), sentences(tmp_path/'text'), sentences(tmp_path/'wide', [torch.nn.Linear(32, 17)])
    (tmp_path/'blip'/'config.json').write_text('{"model_type": "blip"}')

    def said(folder, name, **values):
        (tmp_path / folder / name).write_text(json.dumps(json.loads((tmp_path / folder / name).read_text()) | values))
    def fails(error, message, *folders):
        with pytest.raises(error, match=message): transformers_towers(*(tmp_path/f for f in folders))
    fails(FileNotFoundError, 'no config.json', 'none')
    fails(ValueError, 'holds a blip', 'blip')
    fails(ValueError, 'holds a bert.*wants image=', 'text')
    fails(ValueError, 'has an image tower of its own', 'dual', 'dual')
    fails(ValueError, 'gives 17 numbers, the image tower 16', 'wide', 'dual')
    said('wide', '1_Pooling/config.json', pooling_mode_mean_tokens=False, pooling_mode_weightedmean_tokens=True)
    fails(ValueError, 'pooling_mode_weightedmean_tokens is not supported', 'wide', 'dual')
    said('text', 'sentence_bert_config.json', do_lower_case=True)
    fails(ValueError, 'do_lower_case', 'text', 'dual')
    (tmp_path/'dual'/'preprocessor_config.json').rename(tmp_path/'kept')
    fails(FileNotFoundError, 'does not say how images are prepared', 'dual')
    (tmp_path / 'dual' / 'preprocessor_config.json').write_text(
        json.dumps(json.loads((tmp_path / 'kept').read_text()) | {'size': {'shortest_edge': 64}, 'crop_size': 64})
    )
    fails(ValueError, r'gives \(64, 64\) pixels, the model takes 32', 'dual')
    from safetensors.torch import load_file, save_file
    weights = load_file(tmp_path/'dual'/'model.safetensors')
    save_file(
        {k: v for k, v in weights.items() if k != 'text_projection.weight'},
        tmp_path / 'dual' / 'model.safetensors',
        {'format': 'pt'},
    )
    fails(ValueError, 'the weights lack text_projection.weight', 'dual')
    (tmp_path/'dual'/'model.safetensors').unlink()
    fails(OSError, 'model.safetensors', 'dual')


@pytest.mark.parametrize('layers', [0, 1])
def test_a_text_encoder_alone(layers, tmp_path):
    "`ProjectedBert.from_pretrained` reads the encoder and the layers behind it; without layers it is a `Bert`."
    dense = [torch.nn.Linear(32, 20)] * layers
    (tmp_path/'t').mkdir()
    tokenizer, net = sentences(tmp_path/'t', dense)
    tower = ProjectedBert.from_pretrained(tmp_path/'t').eval()
    words = tokenizer(TEXTS, padding=True, truncation=True, max_length=24, return_tensors='pt')
    x, keep = net(words.input_ids, words.attention_mask).last_hidden_state, words.attention_mask[:, :, None]
    want = (x * keep).sum(1) / keep.sum(1)
    for layer in dense: want = torch.tanh(layer(want))
    assert tower.width == want.shape[1] and torch.allclose(tower(tower.pipeline(TEXTS)), want, atol=1e-5)
    first = ProjectedBert.from_pretrained(tmp_path/'t', pooling='cls', max_length=9)
    assert (first.pooling, first.pipeline.max_length) == ('cls', 9)


def test_a_model_of_both_is_not_a_text_encoder(tmp_path):
    bert(tmp_path)
    with pytest.raises(ValueError, match='vision-text-dual-encoder, a model of images and texts: .*from_transformers'):
        ProjectedBert.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match='no config.json'): ProjectedBert.from_pretrained(tmp_path.parent)
