"""Pixels in C++: bit-equal to the pipeline in Python, on awkward real files, on photos, and on every small size."""
import json

import pytest
import torch

from mmembed.core.packing import as_bytes
from mmembed.core.files import read_bytes
from mmembed.exporters.verify import cpp as host
from mmembed.exporters.export import export
from mmembed.models.dual import DualEncoder
from mmembed.models.towers import ConvNet, TextTransformer
from mmembed.runtime.embedder import load
from mmembed.vision.pipeline import VisionPipeline

from tests.exporters import tiny
from tests.helpers import data_path
from tests.vision.conftest import FILES, picture, saved

pytestmark = pytest.mark.skipif(bool(host.why_no_host()), reason=host.why_no_host())
OPTIONS = {'torch': {}, 'pillow': dict(resize='pillow', resize_mode='longest', fill=(9, 8, 7), alpha='black'),
           'float': dict(resize='float', resize_mode='squash', interpolation='bilinear')}


@pytest.fixture(scope='module')
def cli(): return host.build_host()


@pytest.fixture(scope='module', params=OPTIONS)
def artifact(request):
    tp, vp = tiny.pipelines()[0], VisionPipeline(size=(40, 48), **OPTIONS[request.param])

    def model():
        return DualEncoder(
            TextTransformer(tp, width=32, depth=1, heads=2), ConvNet(vp, channels=(8,), width=32), dim=8
        ).eval()
    return tiny.exported(f'vision-{request.param}', model), vp


def share(rows, artifact):
    "All rows for the usual resize, fewer for the others, which take longer."
    return rows[::{'torch': 1, 'pillow': 8, 'float': 40}[artifact[1].resize]]


def compare(cli, artifact, images):
    "How many of `images` C++ decodes to the pipeline's pixels, and how many it refuses with the Embedder's reason."
    path, vp = artifact
    emb, good, bad = load(path), 0, 0
    for start in range(0, len(images), 250):
        part = images[start:start + 250]
        answers = host.ask_host(cli, path, images=part)['image']
        assert [r['index'] for r in answers] == list(range(len(part)))
        for i, (row, image) in enumerate(zip(answers, part)):
            try: want = vp.preprocess(image)
            except (ValueError, RuntimeError):
                with pytest.raises(ValueError) as e: emb.preprocess(image)
                assert row['error'] == str(e.value), start + i
                bad += 1
            else:
                assert torch.equal(row['pixels'].view(3, *vp.size), want), start + i
                good += 1
    return good, bad


def test_generated_files_and_every_small_size(cli, artifact):
    sizes = [(h, w) for h in (1, 2, 5, 39, 40, 41) for w in (1, 2, 5, 47, 48, 49)] + [(1, 700), (700, 1), (333, 500)]
    images = [
        *FILES.values(),
        *(saved(picture(w, h, h), 'PNG') for h, w in sizes),
        *(saved(picture(w, h, w), 'JPEG') for h, w in sizes[::3]),
    ]
    images += [torch.randint(0, 256, (3, h, w), dtype=torch.uint8) for h, w in sizes]  # decoded already
    images += [as_bytes(b''), as_bytes(b'no picture'), FILES['jpeg'][:700], FILES['png'][:200], FILES['webp'][:90]]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2) if artifact[1].resize == 'torch' else (1,):  # the host is given the same
            torch.set_num_threads(threads)
            assert compare(cli, artifact, images) == (len(images) - 5, 5)
    finally: torch.set_num_threads(before)


def test_real_files(cli, artifact):
    rows = share(json.loads(data_path('images', 'manifest.json').read_text()), artifact)
    images = [read_bytes(data_path('images', r['file'])) for r in rows]
    good, bad = compare(cli, artifact, images)
    assert good > len(rows) // 2 and bad > len(rows) // 8, (good, bad)


def test_photos(cli, artifact):
    rows = share(data_path('figures', 'pairs.jsonl').read_text().splitlines()[::20], artifact)
    assert compare(cli, artifact, [read_bytes(data_path('figures', json.loads(r)['image'])) for r in rows]) == (
        len(rows),
        0,
    )


def test_heic(cli, tmp_path):
    from tests.vision.coded import HEIC, HEIC_ALPHA
    from tests.vision.test_heic import missing
    if missing: pytest.skip(missing)
    vp = VisionPipeline(size=32, heic=True)
    model = DualEncoder(
        TextTransformer(tiny.pipelines()[0], width=32, depth=1, heads=2), ConvNet(vp, channels=(8,), width=32), dim=8
    ).eval()
    export(model, tmp_path/'model.pt', fresh=False, cpp=False)
    assert compare(cli, (tmp_path/'model.pt', vp), [HEIC, FILES['jpeg'], HEIC_ALPHA, HEIC[:200]]) == (3, 1)
