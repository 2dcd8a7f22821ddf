"Scenes: the same everywhere, honest splits, captions that mean one thing."
import hashlib
import io
import pickle
import random

import pytest
from PIL import Image

from mmembed.data.scenes import (
    COLOURS, HELD_OUT, RELATIONS, SHAPES, SIZES, Scene, Scenes, Thing, canonical_scene, caption, draw,
    is_held_out,
)


@pytest.fixture(scope='module')
def scenes(): return Scenes(train=3000, valid=1000)


def test_rows_depend_on_seed_and_row_alone(scenes):
    order = random.Random(0).sample(range(60), 60)
    again = Scenes(train=50, valid=10)
    rows = {i: again[i] for i in order}
    state = random.getstate()
    for i in range(60):
        j = i if i < 50 else i - 50 + 3000
        assert rows[i][0] == scenes.text(j) and rows[i][1].equal(scenes.image(j))
    assert random.getstate() == state
    other = Scenes(train=50, valid=10, seed=7)
    assert sum(other.text(i) == again.text(i) for i in range(60)) < 3


def test_captions_and_scenes_are_the_same_on_every_machine(scenes):
    text = '\n'.join(scenes.text(i) for i in [*range(100), *range(3000, 3100)])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == 'ea951c1ecca36d4f'


def test_splits(scenes):
    train, valid = scenes.split()
    seen = {canonical_scene(scenes.scenes[i]) for i in train.rows}
    held = [canonical_scene(scenes.scenes[i]) for i in valid.rows]
    assert not seen & set(held) and len(set(held)) == len(held) == 1000
    assert not any(is_held_out(s) for s in seen)
    assert [valid.kind(i) for i in range(1000)] == ['unseen' if i % 4 == 3 else 'seen' for i in range(1000)]
    assert all(is_held_out(s) == (valid.kind(i) == 'unseen') for i, s in enumerate(held))
    colours, shapes = ({getattr(t, f) for s in seen for t in (s.first, s.second)} for f in ('colour', 'shape'))
    assert colours == set(COLOURS) and shapes == set(SHAPES)  # every part of a held-out combination is met
    assert len({valid.text(i) for i in range(1000)}) == 1000


def test_another_split_of_the_same_scenes_does_not_leak():
    a, b = Scenes(train=2000, valid=0, seed=1), Scenes(train=0, valid=500, seed=2)
    assert not {canonical_scene(s) for s in a.scenes} & {canonical_scene(s) for s in b.scenes}


def test_canonical():
    rng = random.Random(0)
    for _ in range(500):
        a, b = (Thing(rng.choice([*SIZES]), rng.choice([*COLOURS]), rng.choice([*SHAPES])) for _ in range(2))
        assert (
            canonical_scene(Scene(a, 'left of', b))
            == canonical_scene(Scene(b, 'right of', a))
            == Scene(a, 'left of', b)
        )
        assert canonical_scene(Scene(a, 'above', b)) == canonical_scene(Scene(b, 'below', a)) == Scene(a, 'above', b)


@pytest.mark.parametrize('lang', ['en', 'zh'])
def test_every_caption_means_one_scene(lang):
    meanings = {}
    things = [Thing(s, c, h) for s in SIZES for c in ('red', 'blue', 'orange') for h in ('circle', 'ring', 'star')]
    for a in things:
        for b in things:
            for relation in RELATIONS:
                for way in range(4):
                    scene = Scene(a, relation, b)
                    assert meanings.setdefault(caption(scene, lang, way), canonical_scene(scene)) == canonical_scene(
                        scene
                    )
    ways = {'en': 2*4 + 2*3, 'zh': 4*4}[lang]  # 'to the left of', but just 'above'
    assert len(meanings) == len(things)**2 * ways


def test_languages(scenes):
    texts = [scenes.text(i) for i in range(1000)]
    chinese = sum(any('\u4e00' <= c <= '\u9fff' for c in t) for t in texts)
    assert 400 < chinese < 600
    for lang in ('en', 'zh', 'both'):
        other = Scenes(train=20, valid=0, lang=lang)
        assert all(other.image(i).equal(scenes.image(i)) for i in range(20))
        assert all((' / ' in other.text(i)) == (lang == 'both') for i in range(20))
        assert all(('圆' in (t := other.text(i)) or '形' in t) == (lang != 'en') for i in range(20))


def test_pictures(scenes):
    sides, qualities = set(), set()
    for i in range(300):
        data = bytes(scenes.image(i).tolist())
        picture = Image.open(io.BytesIO(data))
        assert picture.format == 'JPEG' and picture.mode == 'RGB'
        sides.update(picture.size)
        qualities.add(tuple(picture.quantization[0]))
    assert min(sides) == 64 and max(sides) == 96 and len(qualities) > 20


@pytest.mark.parametrize('relation', RELATIONS)
def test_the_picture_shows_what_the_caption_says(relation):
    "Each colour's pixels are found in the drawing: centre by relation, area by size."
    for i in range(40):
        rng = random.Random(i)
        scene = Scene(Thing('small', 'red', 'circle'), relation, Thing('large', 'blue', 'square'))
        image = draw(scene, rng)
        found = {}
        for y in range(image.height):
            for x in range(image.width):
                p = image.getpixel((x, y))
                for colour in ('red', 'blue'):
                    if sum(abs(a - b) for a, b in zip(p, COLOURS[colour][1])) < 60:
                        found.setdefault(colour, []).append((x, y))
        red, blue = ([sum(p[k] for p in found[c])/len(found[c]) for k in (0, 1)] for c in ('red', 'blue'))
        dx, dy = red[0] - blue[0], red[1] - blue[1]
        assert {'left of': -dx, 'right of': dx, 'above': -dy, 'below': dy}[relation] > 2*min(abs(dx), abs(dy))
        assert len(found['blue']) > 1.5*len(found['red'])
        side, off = min(image.size), [(n - min(image.size))/2 for n in image.size]
        # kept by a centre crop
        for c in found.values(): assert all(o <= v <= o + side for p in c for v, o in zip(p, off))


def test_pickles_small(scenes):
    scenes.image(0)
    again = pickle.loads(pickle.dumps(scenes))
    assert again._files == {} and again[0][1].equal(scenes[0][1]) and again[0][0] == scenes[0][0]


def test_bad_options():
    with pytest.raises(ValueError, match='lang must be'): Scenes(lang='fr')
    with pytest.raises(ValueError, match='got 1 and 9999'): Scenes(1, 9999)


def test_held_out_covers_every_shape_once():
    assert sorted(s for _, s in HELD_OUT) == sorted(SHAPES) and len({c for c, _ in HELD_OUT}) == len(HELD_OUT)
