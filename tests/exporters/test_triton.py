import json
import re
import shutil

import pytest
import torch

from mmembed.cli.main import main
from mmembed.core.packing import pack
from mmembed.core.torchscript import quietly
from mmembed.exporters.verify import samples as cases
from mmembed.exporters.export import export
from mmembed.runtime.embedder import load
from mmembed.core.errors import reason
from mmembed.exporters.triton.check import check_repository
from mmembed.exporters.triton.config import read_pbtxt
from mmembed.exporters.triton.repository import export_triton

from tests.exporters import tiny


@pytest.fixture(scope='module')
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp('models')
    for path, name in ((tiny.artifact(), 'clip'), (tiny.artifact(False), 'rgb'), (tiny.pair_artifact(), 'pairs')):
        export_triton(path, folder, name)
    return folder


def model(repository, name): return quietly(torch.jit.load, str(repository/name/'1'/'model.pt'))


@pytest.mark.weekly
def test_texts_of_many_requests(repository):
    "Every built-in text, as the server hands them over: bytes one after the other, int32 offsets."
    data, offsets = pack(cases.texts())
    assert torch.allclose(
        model(repository, 'clip_text')(data, offsets.int()), load(tiny.artifact()).encode_text(cases.texts()), atol=1e-5
    )
    assert model(repository, 'clip_text')(data[:0], torch.zeros(2, dtype=torch.int32)).shape == (1, 24)


def test_images_one_by_one_and_in_batches(repository):
    "Each file by itself: the Embedder's pixels or its error; then all good ones as one batch of pixels."
    emb, preprocess, levels = load(tiny.artifact()), model(repository, 'clip_preprocess'), []
    good = emb.encode_image(cases.images().values(), on_error='flag')
    for file, error in zip(cases.images().values(), good.errors):
        x = torch.frombuffer(bytearray(file), dtype=torch.uint8)[None] if file else torch.empty(1, 0, dtype=torch.uint8)
        try: levels.append(preprocess(x))
        except (RuntimeError, torch.jit.Error) as e: assert reason(e) == error
        else: assert not error and torch.equal(levels[-1][0], emb.preprocess(file))
    assert torch.allclose(model(repository, 'clip_pixels')(torch.cat(levels)), good.embedding[good.ok], atol=1e-5)
    with pytest.raises((RuntimeError, torch.jit.Error), match='image: one a request'):
        preprocess(torch.zeros(2, 9, dtype=torch.uint8))


def test_decoded_pictures(repository):
    x = cases.arrays()[3]
    assert torch.equal(model(repository, 'rgb_preprocess')(x[None])[0], load(tiny.artifact(False)).preprocess(x))
    assert 'dims: [ 3, -1, -1 ]' in (repository/'rgb_preprocess'/'config.pbtxt').read_text()


def test_pairs(repository):
    emb, files = load(tiny.pair_artifact()), [cases.images()[n] for n in ('RGB.png', 'gray.jpg')]
    data, offsets = pack(['a red circle', '一'])
    got = model(repository, 'pairs_pairs')(data, offsets.int(), torch.stack([emb.preprocess(f) for f in files]))
    assert torch.allclose(got, emb.score_pairs(['a red circle', '一'], files), atol=1e-5)


def test_configurations_are_protocol_buffers(repository):
    "Each by Triton's own message, and read alike by the small parser that checks them where that is not installed."
    try: from tritonclient.grpc import model_config_pb2 as pb
    except (ImportError, RuntimeError): pytest.skip('no tritonclient[grpc]')
    from google.protobuf import text_format
    for path in repository.glob('*/config.pbtxt'):
        got, own = text_format.Parse(path.read_text(), pb.ModelConfig()), read_pbtxt(path.read_text())
        assert got.name == path.parent.name == own['name'][0] and got.max_batch_size == own['max_batch_size'][0]
        for kind in ('input', 'output'):
            assert [(s.name, pb.DataType.Name(s.data_type), list(s.dims)) for s in getattr(got, kind)] == [
                (s['name'][0], s['data_type'][0], s['dims']) for s in own[kind]
            ]
        if got.batch_input: assert pb.BatchInput.Kind.Name(got.batch_input[0].kind) == own['batch_input'][0]['kind'][0]
        assert got.HasField('dynamic_batching') == ('dynamic_batching' in own) and len(
            got.ensemble_scheduling.step
        ) in (0, 2)


def test_one_model_holds_one_tower(repository):
    # which would hold paths of this machine
    for path in repository.glob('*/1/model.pt'): assert b'.debug_pkl' not in path.read_bytes()
    size = lambda name: (repository/name/'1'/'model.pt').stat().st_size
    assert size('clip_pixels') < size('clip_text') and not any(
        'text' in k for k in dict(model(repository, 'clip_pixels').named_buffers())
    )


@pytest.mark.parametrize(
    'name, old, new, message',
    [
        (
            'clip_text',
            'dims: [ 24 ]',
            'dims: [ 25 ]',
            r'clip_text: EMBEDDING__0 is TYPE_FP32 \[1, 24\], not TYPE_FP32 \[1, 25\]',
        ),
        ('clip_pixels', 'PIXELS__0', 'PIXELS__1', r'clip_pixels: inputs \[1\] for 1 arguments'),
        ('clip_pixels', 'PIXELS__0', 'PIXELS', 'has no place of its own'),
        ('clip_image', '"clip_pixels"', '"other"', 'the model other is not in the repository'),
        ('clip_image', 'key: "PIXELS__0"', 'key: "X"', 'has the outputs PIXELS__0'),
        ('clip_image', 'dims: [ -1 ]', 'dims: [ 3, -1, -1 ]', 'clip_image: IMAGE does not fit IMAGE__0'),
        ('clip_text', 'instance_group', 'instances', 'unknown field instances'),
        ('clip_text', 'count: 1', 'count 1', 'clip_text/config.pbtxt: no : after count'),
    ],
)
def test_what_does_not_fit_is_named(repository, tmp_path, name, old, new, message):
    for part in ['clip_preprocess', 'clip_pixels', name] if name == 'clip_image' else [name]:
        shutil.copytree(repository / part, tmp_path / part)
    path = tmp_path/name/'config.pbtxt'
    good = path.read_text()
    assert old in good
    path.write_text(good.replace(old, new))
    with pytest.raises(ValueError, match=message): check_repository(tmp_path)


def test_from_the_shell(tmp_path, capsys):
    assert main(['export', str(tiny.artifact()), '--triton', str(tmp_path/'m')]) == 0
    name = tiny.artifact().stem
    assert sorted(p.name for p in (tmp_path / 'm').iterdir()) == [
        f'{name}_{k}' for k in ('image', 'pixels', 'preprocess', 'text')
    ]
    assert f'Triton: {name}_preprocess' in capsys.readouterr().out
    assert (
        main(['export', '--triton', str(tmp_path / 'm')]) == 1 and 'name either a checkpoint' in capsys.readouterr().err
    )
    with pytest.raises(ValueError, match='max_batch must be at least 1'):
        export_triton(tiny.artifact(), tmp_path, max_batch=0)
    with pytest.raises(ValueError, match="name: 'a/b' is not a name for Triton"):
        export_triton(tiny.artifact(), tmp_path, 'a/b')


@pytest.mark.weekly
def test_open_clip_weights_without_training(tmp_path, capsys, monkeypatch):
    "A model of open_clip's from a local weights file, by the command line alone; what it lacks is one sentence."
    import open_clip
    folder = tmp_path/'small'
    folder.mkdir()
    config = dict(embed_dim=32, vision_cfg=dict(image_size=32, layers=1, width=32, patch_size=16, head_width=16),
                  text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=1))
    (folder/'triton-vit.json').write_text(json.dumps(config))
    open_clip.add_model_config(folder/'triton-vit.json')
    torch.manual_seed(0)
    net = open_clip.create_model('triton-vit').eval()
    torch.save(net.state_dict(), tmp_path/'weights.pt')
    assert (
        main(
            [
                'export',
                '--open-clip',
                'triton-vit',
                '--weights',
                str(tmp_path / 'weights.pt'),
                '--out',
                str(tmp_path / 'clip.pt'),
            ]
        )
        == 0
    ), capsys.readouterr()
    emb = load(tmp_path/'clip.pt')
    with torch.no_grad(): want = net.encode_text(open_clip.tokenize(['a photo of a cat']), normalize=True)
    assert torch.allclose(emb.encode_text(['a photo of a cat']), want, atol=1e-5) and emb.card['training'][
        'config'
    ] == {'open_clip': 'triton-vit', 'weights': 'weights.pt'}
    for args, message in (
        (['--open-clip', 'ViT-B-32'], 'wants --weights'),
        (['--open-clip', 'ViT-B-99', '--weights', 'x'], "open_clip knows no model 'ViT-B-99'"),
        (['--open-clip', 'ViT-B-32', '--weights', 'no.bin'], "'no.bin' is not a weights file"),
        (['a.ckpt', '--weights', 'x'], '--weights goes with --open-clip'),
    ):
        assert main(['export', *args]) == 1
        error = capsys.readouterr().err
        assert message in error and len(re.findall('\n', error)) == 1


@pytest.mark.weekly
def test_instances_are_options_and_hand_edits_stay(tmp_path):
    folder = tmp_path/'models'
    export_triton(tiny.artifact(), folder, 'clip', instances=2, preprocess=3)
    path, tower = folder/'clip_preprocess'/'config.pbtxt', folder/'clip_text'/'config.pbtxt'
    group = lambda p: read_pbtxt(p.read_text())['instance_group'][0]['count']
    assert (group(path), group(tower), group(folder/'clip_pixels'/'config.pbtxt')) == ([3], [2], [2])
    path.write_text(
        path.read_text().replace('count: 3', 'count: 7') + 'version_policy { latest { num_versions: 2 } }\n'
    )
    with pytest.warns(UserWarning, match='clip_preprocess/config.pbtxt was edited by hand and stays'):
        export_triton(tiny.artifact(), folder, 'clip', instances=4)
    assert (group(path), group(path.with_suffix('.pbtxt.new')), group(tower)) == ([7], [1], [4])
    for option in ('instances', 'preprocess'):
        with pytest.raises(ValueError, match=f'{option} must be at least 1'):
            export_triton(tiny.artifact(), folder, 'clip', **{option: 0})


@pytest.mark.weekly
def test_options_warm_up_strings_and_labels(tmp_path, capsys):
    """From the shell.

    Each model is run with what its configuration says, and texts as BYTES answer as the artifact does."""
    options = dict(name='p', max_batch=4, delay=7, device='cuda:1', instances=2)
    args = [a for k, v in options.items() for a in (f'--triton-{k.replace("_", "-")}', str(v))]
    assert (
        main(
            [
                'export',
                str(tiny.pair_artifact()),
                '--triton',
                str(tmp_path),
                *args,
                '--triton-warm-up',
                '--triton-strings',
            ]
        )
        == 0
    ), capsys.readouterr()
    c = read_pbtxt((tmp_path/'p_pairs_strings'/'config.pbtxt').read_text())
    assert c['max_batch_size'] == [4] and c['dynamic_batching'][0]['max_queue_delay_microseconds'] == [7]
    assert c['instance_group'] == [{'count': [2], 'kind': ['KIND_GPU'], 'gpus': [1]}] and [
        w['batch_size'] for w in c['model_warmup']
    ] == [[1], [4]]
    assert c['input'][0]['data_type'] == ['TYPE_STRING'] and c['output'][0]['label_filename'] == ['labels.txt']
    emb, file = load(tiny.pair_artifact()), cases.images()['RGB.png']
    got = model(tmp_path, 'p_pairs_strings')(['一个', ''], torch.stack([emb.preprocess(file)] * 2))
    assert torch.allclose(got, emb.score_pairs(['一个', ''], [file] * 2), atol=1e-5)
    labels = tmp_path/'p_match'/'labels.txt'
    assert labels.read_text() == 'mismatch\nmatch\n'
    labels.write_text('no\nyes\n')
    with pytest.warns(UserWarning) as said: export_triton(tiny.pair_artifact(), tmp_path, 'p')
    assert labels.read_text() == 'no\nyes\n' and any('labels.txt was edited by hand' in str(w.message) for w in said)
    assert any('p_pairs_strings is of an earlier export' in str(w.message) for w in said)
    labels.write_text('one\n')
    with pytest.raises(ValueError, match='p_match: labels.txt has 1 lines for 2 labels'):
        check_repository(tmp_path)
    assert (
        main(['export', str(tiny.artifact()), '--triton-delay', '3']) == 1
        and '--triton-delay wants --triton FOLDER' in capsys.readouterr().err
    )
    with pytest.raises(ValueError, match="device must be cpu, cuda or cuda:N, got 'gpu'"):
        export_triton(tiny.artifact(), tmp_path, device='gpu')


@pytest.mark.weekly
def test_probabilities_of_an_artifacts_labels(tmp_path):
    """A text tower with labels: the server names the classes by the file beside the model, in the order in which the
    model gives them."""
    names = ['red\n circle', 'blue square', '一个圆']
    export(tiny.model(), tmp_path/'m.pt', fresh=False, cpp=False, labels=names, templates=['a {}'])
    for made in export_triton(tmp_path/'m.pt', tmp_path/'models', 'm'):
        outputs = read_pbtxt((made/'config.pbtxt').read_text())['output']
        labelled = [o for o in outputs if 'label_filename' in o]
        if made.name not in ('m_pixels', 'm_image'): assert not labelled and not (made/'labels.txt').exists(), made
        else:
            assert [o['name'][0].partition('__')[0] for o in outputs] == [
                'EMBEDDING',
                'CLASS_PROBABILITY',
            ] and labelled == outputs[1:]
            assert (
                outputs[1]['dims'] == [3]
                and outputs[1]['data_type'] == ['TYPE_FP32']
                and outputs[1]['label_filename'] == ['labels.txt']
            )
            assert (made/'labels.txt').read_text() == 'red circle\nblue square\n一个圆\n'
    emb, files = load(tmp_path/'m.pt'), [cases.images()[n] for n in ('RGB.png', 'gray.jpg')]
    embedding, probability = model(tmp_path/'models', 'm_pixels')(torch.stack([emb.preprocess(f) for f in files]))
    assert torch.allclose(embedding, emb.encode_image(files), atol=1e-5) and probability.shape == (2, 3)
    assert torch.allclose(
        probability, emb.module.class_probability(emb.encode_image(files)), atol=1e-5
    ) and torch.allclose(probability.sum(1), torch.ones(2))
    (tmp_path/'models'/'m_image'/'labels.txt').write_text('one\n' * 4)
    with pytest.raises(ValueError, match='m_image: labels.txt has 4 lines for 3 labels'):
        check_repository(tmp_path / 'models')
