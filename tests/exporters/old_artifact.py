"""The recipe of the two artifacts that commit 04f7bea exported, kept as `old_artifact.pt.xz` and `old_artifact.pt2.xz`.

A file that is out in the world must load and answer equally for ever, so these are not made anew by the tests: they
hold random weights, the one exception to "no weights in git". They were made, with torch 2.15.0, by

    git worktree add old 04f7bea
    PYTHONPATH=old OMP_NUM_THREADS=1 python tests/exporters/old_artifact.py FOLDER

which imports the modules of that commit, not today's. `old_artifact.json` holds what the model answered there.
"""
import base64
import hashlib
import importlib
import io
import json
import lzma
import sys
from pathlib import Path

import torch
from PIL import Image

CAPTIONS = [
    'a small red circle', 'a large blue square', 'a green triangle above a red circle', '一个红色的圆',
    'Café au lait',
]
TEXTS = [
    'a small red circle',
    '',
    '一只猫坐在红色的圆上',
    'Привет, мир! 東京タワーの猫',
    'नमस्ते दुनिया مرحبا بالعالم',
    'Cafe\u0301 \U0001f408 ' + 'the quick brown fox ' * 8,
]


def image_files() -> list[bytes]:
    "A JPEG turned by EXIF, a transparent PNG, a palette GIF and a WebP, each of some 60 pixels."
    x = Image.linear_gradient('L').resize((64, 48))
    rgb = Image.merge('RGB', (x, x.rotate(180), x.point(lambda v: 255 - v // 2)))
    rgba, exif = rgb.copy(), Image.Exif()
    rgba.putalpha(x)
    exif[0x0112] = 6
    made = []
    for image, kind, options in (
        (rgb, 'JPEG', {'quality': 85, 'exif': exif}),
        (rgba, 'PNG', {}),
        (rgb.quantize(8), 'GIF', {}),
        (rgb, 'WEBP', {'quality': 70}),
    ):
        out = io.BytesIO()
        image.save(out, kind, **options)
        made.append(out.getvalue())
    return made


def tiny_model():
    from mmembed.models.dual import DualEncoder
    from mmembed.models.towers import ConvNet, TextTransformer
    from mmembed.text.pipeline import TextPipeline
    from mmembed.vision.pipeline import VisionPipeline

    tp, vp = TextPipeline.learn(CAPTIONS, vocab_size=200, max_length=16), VisionPipeline(size=48)
    torch.manual_seed(0)
    text, image = TextTransformer(tp, width=32, depth=2, heads=2), ConvNet(vp, channels=(8, 16), width=32)
    return DualEncoder(text, image, dim=24).eval()


def answers_of(model, files: list[bytes]) -> dict:
    "Token ids, a hash of the pixels, embeddings and scores of the model in the notebook, in one batch each."
    with torch.no_grad():
        tokens, pixels = model.text_pipeline(TEXTS), model.vision_pipeline(files)
        text, image = model.encode_text(tokens), model.encode_image(pixels)
        scores = model.logit_scale.exp() * text @ image.T
    return {
        'texts': TEXTS,
        'files': [base64.b64encode(f).decode() for f in files],
        'ids': tokens.ids.tolist(),
        'mask': tokens.mask.long().tolist(),
        'pixels_sha256': hashlib.sha256(pixels.numpy().tobytes()).hexdigest(),
        'text': text.tolist(),
        'image': image.tolist(),
        'scores': scores.tolist(),
    }


def main(folder: Path):
    export = importlib.import_module('mmembed.export.verify').export  # the address it had at that commit

    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_model()
    (folder/'old_artifact.json').write_text(json.dumps(answers_of(model, image_files()), ensure_ascii=False))
    for name, options in (('old_artifact.pt', {}), ('old_artifact.pt2', {'cpu': 'AVX2'})):
        print(export(model, folder/name, cpp=False, **options))
        kept = lzma.compress((folder/name).read_bytes(), preset=9 | lzma.PRESET_EXTREME)
        (folder/f'{name}.xz').write_bytes(kept)
        print(f'{name}: {(folder/name).stat().st_size:,} bytes, {len(kept):,} compressed')


if __name__ == '__main__': main(Path(sys.argv[1]))
