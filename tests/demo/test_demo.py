"""The demo page through gradio_client and in a real browser: every endpoint, every tab, nothing from another host,
no error in the console."""
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mmembed as mm

pytest.importorskip('gradio', reason='gradio is not installed: pip install "mmembed[demo]"')
from gradio_client import Client, handle_file

from mmembed.demo import gallery
from mmembed.demo.app import serve_page
from mmembed.demo.handlers import Panels
from mmembed.demo.gallery import IndexImages, embed_files, embed_folder, embed_scenes

from tests.helpers import HANG, ended


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "An artifact of random weights and some files."
    d = tmp_path_factory.mktemp('demo')
    torch.manual_seed(0)
    text = mm.TextTransformer(
        mm.TextPipeline.learn(['a red circle above a blue ring'] * 3, max_length=16), width=16, depth=1
    )
    mm.export(mm.DualEncoder(text, mm.ConvNet(mm.VisionPipeline(size=32)), dim=16).eval(), d/'tiny.pt')
    (d/'photos').mkdir()
    for i, colour in enumerate(['red', 'green', 'blue', 'white']):
        Image.new('RGB', (60 + 20 * i, 60), colour).save(d / 'photos' / f'{colour}.png')
    Image.new('RGBA', (90, 60), (255, 0, 0, 90)).save(d/'photos'/'clear.png')
    (d/'photos'/'broken.jpg').write_bytes(b'not an image')
    return d


@pytest.fixture(scope='module')
def page(folder):
    "The page as it is served: panels and address."
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        emb = mm.load(folder/'tiny.pt')
        panels = Panels(emb, [embed_scenes(emb, 30), embed_folder(emb, folder/'photos')])
    blocks, address = serve_page(panels, block=False)
    yield panels, address
    blocks.close()


@pytest.fixture(scope='module')
def client(page):
    c = Client(page[1], verbose=False)
    yield c
    c.close()


def test_search(page, client, folder):
    panels, _ = page
    scenes, photos = panels.sets
    green = handle_file(str(folder/'photos'/'green.png'))
    found, rows, status = client.predict('', green, '', 3, photos, api_name='/search')
    assert (
        [r['name'] for r in rows][0] == 'green.png'
        and rows[0]['cosine'] == pytest.approx(1, abs=1e-5)
        and len(found) == 3
        and ' ms' in status
    )
    _, rows, _ = client.predict('a red circle', None, '', 5, scenes, api_name='/search')
    want = panels.emb.encode_text(['a red circle']) @ panels.sets[scenes].vectors.T
    assert [r['row'] for r in rows] == want[0].topk(5).indices.tolist()
    both = client.predict('a red circle', green, '', 1, scenes, api_name='/search')[1]
    assert both[0]['cosine'] < 1 and client.predict('', None, '7', 1, scenes, api_name='/search')[1][0]['row'] == 7
    _, rows, status = client.predict(
        '', handle_file(str(folder / 'photos' / 'broken.jpg')), '', 3, photos, api_name='/search'
    )
    assert 'broken.jpg: not an image' in rows['error'] and 'mm-bad' in status and str(folder) not in status
    assert 'Type a text' in client.predict(' ', None, '', 3, photos, api_name='/search')[1]['error']
    assert 'no longer held' in client.predict('x', None, '', 3, 'upload 000000 (1)', api_name='/search')[1]['error']


def test_visitors_are_answered_in_one_batch(page, client):
    panels, _ = page
    scenes = next(iter(panels.sets))
    alone = client.predict('a blue ring', None, '', 4, scenes, api_name='/search')[1]
    jobs = [
        client.submit(t, None, '', 4, scenes, api_name='/search')
        for t in ['a blue ring', '', 'a blue ring', 'a red circle'] * 3
    ]
    found = [j.result(timeout=HANG)[1] for j in jobs]
    assert all([r['row'] for r in found[i]] == [r['row'] for r in alone] for i in range(0, 12, 2)) and all(
        'error' in found[i] for i in (1, 5, 9)
    )


def test_match(client, folder, page):
    emb = page[0].emb
    red = str(folder/'photos'/'red.png')
    rows, _, html = client.predict(handle_file(red), 'a red circle\n<script>alert(1)</script>', api_name='/match_texts')
    want = emb.score(['a red circle', '<script>alert(1)</script>'], [red]).flatten()
    assert {r['label']: r['score'] for r in rows}['a red circle'] == pytest.approx(want[0].item(), abs=1e-4)
    assert sum(r['probability'] for r in rows) == pytest.approx(1, abs=1e-5) and '<script>' not in html
    rows, _, html = client.predict(
        'a red circle', [handle_file(red), handle_file(str(folder / 'photos' / 'broken.jpg'))], api_name='/match_images'
    )
    assert rows[0]['label'] == 'red.png' and 'not an image' in rows[1]['error'] and 'mm-bad' in html
    rows, _, _ = client.predict(handle_file(red), 'red, blue', 'a {} circle\na {} ring', api_name='/classify')
    prompts = emb.encode_text(['a red circle', 'a red ring', 'a blue circle', 'a blue ring']).view(2, 2, -1).mean(1)
    want = emb.score(torch.nn.functional.normalize(prompts, dim=1), [red]).flatten().softmax(0)
    assert {r['label']: r['probability'] for r in rows}['red'] == pytest.approx(want[0].item(), abs=1e-5)
    assert 'needs {}' in client.predict(handle_file(red), 'red', 'a circle', api_name='/classify')[0]['error']


def test_inside(client, folder, page):
    rows, status, shown = client.predict(handle_file(str(folder/'photos'/'clear.png')), api_name='/inside_image')
    said = ' '.join(rows['warnings'])
    assert (
        'transparent parts are drawn on white' in said and '33% of the image is cut away' in said and len(shown) == 3
    )
    seen = np.asarray(Image.open(shown[1]['image']).convert('RGB'))
    assert (torch.from_numpy(seen.copy()).permute(2, 0, 1) == page[0].emb.preprocess(folder/'photos'/'clear.png')).all()
    text = 'a red circle ' * 10
    rows, status, html = client.predict(text, api_name='/inside_text')
    ids = page[0].emb.tokenize([text]).ids[0].tolist()
    assert [t['id'] for t in rows['tokens']] == ids and all(
        text.encode()[t['begin'] : t['end']].decode() == t['piece'] for t in rows['tokens']
    )
    assert 'The model reads 16 tokens' in rows['warnings'][0] and f'<s>{rows["rest"]}</s>' in html


def test_embeddings(client, folder, page):
    panels, _ = page
    photos = [*panels.sets][1]
    rows, _, svg, file = client.predict('a red circle', None, api_name='/embed')
    assert (
        np.allclose(np.load(file), panels.emb.encode_text(['a red circle'])[0], atol=1e-6)
        and len(rows['embedding']) == 16
        and '<svg' in svg
    )
    assert 'either a text or an image' in client.predict('', None, api_name='/embed')[0]['error']
    saved = np.load(client.predict(photos, api_name='/download'))
    assert saved['names'].tolist() == panels.sets[photos].names and np.allclose(
        saved['vectors'], panels.sets[photos].vectors
    )
    rows, status, heat, plane = client.predict(photos, api_name='/overview')
    assert (
        len(rows['at']) == 5
        and '1 could not be read' in status
        and plane.count('<image') == 5
        and heat.count('<td') == 25
    )


def test_own_pictures(client, folder, page):
    files = [handle_file(str(folder/'photos'/n)) for n in ('blue.png', 'broken.jpg', 'white.png')]
    update, said = client.predict(files, api_name='/index')
    key = update['value'] if isinstance(update, dict) else update
    assert '2 images can be searched' in said and 'broken.jpg: not an image' in said
    rows = client.predict('', handle_file(str(folder/'photos'/'white.png')), '', 2, key, api_name='/search')[1]
    assert rows[0]['name'] == 'white.png' and rows[0]['cosine'] == pytest.approx(1, abs=1e-5)


def test_the_artifact_alone_answers(folder):
    "No training code, no other framework: in a process of its own."
    program = (
        "import sys, mmembed as mm; from mmembed.demo.app import build_page; from mmembed.demo.handlers import Panels; "
        "from mmembed.demo.gallery import embed_scenes\n"
        f"emb = mm.load({str(folder / 'tiny.pt')!r}); build_page(Panels(emb, [embed_scenes(emb, 4)]))\n"
        "import json; print(json.dumps([m for m in ('lightning', 'transformers', 'open_clip', 'torchvision', "
        "'matplotlib', 'mmembed.train.run', 'mmembed.models.dual', 'mmembed.train.datamodule') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1]) == [], done.stderr[-2000:] + done.stdout


@pytest.fixture(scope='module')
def indexed(folder):
    "The page of an index with captions and years; its images are larger than what is shown of them."
    pytest.importorskip('lancedb', reason='an index needs LanceDB: pip install "mmembed[search]"')
    from mmembed.retrieval.index import Index
    with (folder/'large.csv').open('w') as table:
        table.write('image,text,year\n')
        for i, colour in enumerate(['red', 'green', 'blue', 'white', 'black', 'pink']):
            Image.new('RGB', (900 + i, 600), colour).save(folder/f'large-{i}.png')
            table.write(f'large-{i}.png,a {colour} wall,{2000 + i}\n')
    emb = mm.load(folder/'tiny.pt')
    panels = Panels(
        emb,
        [
            IndexImages(Index.build(emb, str(folder / 'large.csv'), folder / 'index', columns=['year'])),
            embed_scenes(emb, 12),
        ],
    )
    blocks, address = serve_page(panels, block=False)
    yield panels, address
    blocks.close()


def test_filter_and_words_of_an_index(indexed):
    panels, address = indexed
    index, scenes = panels.sets
    assert panels.columns_of(index) == 'id, text, year' and panels.columns_of(scenes) is None
    c = Client(address, verbose=False)
    def ask(text, where, words, key=index):
        found, rows, status = c.predict(text, None, '', 6, key, where, words, api_name='/search')
        assert 'error' in rows or [f['caption'].endswith(r['name']) for f, r in zip(found, rows, strict=True)]
        return rows, found
    rows, found = ask('a red circle', 'year > 2003', '')
    assert {r['text'] for r in rows} == {'a black wall', 'a pink wall'} and all(
        f"{r['cosine']:.3f} · {r['text']} · {r['name']}" == f['caption'] for r, f in zip(rows, found)
    )
    assert rows[0]['cosine'] >= rows[1]['cosine'] and len(ask('a red circle', '', '')[0]) == 6
    rows, found = ask('', '', 'green')
    assert [(r['text'], r['cosine']) for r in rows] == [('a green wall', None)] and found[0][
        'caption'
    ] == 'a green wall · large-1.png'
    rows, _ = ask('a red circle', 'year < 2002', 'wall')
    assert {r['text'] for r in rows} == {'a red wall', 'a green wall'} and all(-1 <= r['cosine'] <= 1 for r in rows)
    for where, why in (('year >', 'where'), ('nothing = 3', 'nothing')): assert why in ask('a', where, '')[0]['error']
    for where, words in (('year > 1', ''), ('', 'circle')):
        assert '--index' in ask('a', where, words, scenes)[0]['error']
    file, said = panels.large(ask('', '', 'pink')[0][0], index)
    assert Image.open(file).size == (905, 600) and 'a pink wall' in said
    (panels.emb.path.parent/'large-4.png').unlink()  # then what the index holds of it is shown
    assert Image.open(panels.large(ask('', '', 'black')[0][0], index)[0]).size[0] == 112
    c.close()


WRITER = """import json, sys
from mmembed.retrieval.index import Index
index = Index(sys.argv[1])
def churn(table, rounds):
    for i in range(rounds):
        index.add(table, prefix=f'{i}/')
        index.delete(where=f"id LIKE '{i}/%' AND id <> '{i}/new-1.png'")
        index.compact()
for line in sys.stdin:
    name, *given = json.loads(line)
    result = churn(*given) if name == 'churn' else getattr(index, name)(*given)
    print(json.dumps(result), flush=True)
"""


@pytest.fixture
def changing(folder, tmp_path):
    "Panels over an index of three images, and a call that another process makes of it."
    pytest.importorskip('lancedb', reason='an index needs LanceDB: pip install "mmembed[search]"')
    from mmembed.retrieval.index import Index
    for name, colours in (('old', ['red', 'green', 'blue']), ('new', ['white', 'black', 'pink'])):
        with (tmp_path/f'{name}.csv').open('w') as table:
            table.write('image,text\n')
            for i, colour in enumerate(colours):
                Image.new('RGB', (60 + i, 40), colour).save(tmp_path/f'{name}-{i}.png')
                table.write(f'{name}-{i}.png,a {colour} wall\n')
    emb = mm.load(folder/'tiny.pt')
    panels = Panels(emb, [IndexImages(Index.build(emb, str(tmp_path/'old.csv'), tmp_path/'my.idx'))])
    with ended(
        subprocess.Popen(
            [sys.executable, '-c', WRITER, str(tmp_path / 'my.idx')],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    ) as other:
        def begin(*call):
            other.stdin.write(json.dumps(call) + '\n')
            other.stdin.flush()
            return lambda: json.loads(other.stdout.readline())
        yield panels, next(iter(panels.sets)), begin, tmp_path


def found(panels, key, row='', text='a wall', words=''):
    answer = panels.search(['' if row or words else text], [None], [str(row)], [60], [key], [''], [words])[0]
    return answer.rows if 'error' in answer.rows else {r['name']: r for r in answer.rows}


def colour(panels, key, row):
    return Image.open(panels.large({'row': row['row'], 'name': row['name'], 'cosine': None}, key)[0]).getpixel((20, 20))


def test_the_page_follows_an_index_that_another_process_changes(changing):
    panels, key, begin, d = changing
    before = found(panels, key)
    assert set(before) == {'old-0.png', 'old-1.png', 'old-2.png'} and colour(panels, key, before['old-1.png'])[0] < 50
    assert begin('add', str(d/'new.csv'))() == 3
    rows = found(panels, key)
    assert set(rows) == {*before, 'new-0.png', 'new-1.png', 'new-2.png'} and all(
        rows[n]['row'] == before[n]['row'] for n in before
    )
    assert len({r['row'] for r in rows.values()}) == 6 and set(found(panels, key, rows['new-2.png']['row'])) == set(
        rows
    )
    Image.new('RGB', (60, 40), 'yellow').save(d/'old-1.png')
    assert begin('add', str(d/'old.csv'), [], 'replace')() == 3
    assert (
        found(panels, key)['old-1.png']['row'] == before['old-1.png']['row']
        and colour(panels, key, before['old-1.png'])[0] > 200
    )

    assert begin('delete', ['old-0.png', 'new-0.png'])() == 2
    gone = before['old-0.png']
    assert set(found(panels, key)) == {'old-1.png', 'old-2.png', 'new-1.png', 'new-2.png'}
    with pytest.raises(ValueError, match='old-0.png has been deleted from index my.idx meanwhile'):
        panels.large(gone, key)
    assert found(panels, key, gone['row']) == {'error': 'old-0.png has been deleted from index my.idx meanwhile'}
    assert 'rows go from 0 to 5' in found(panels, key, 6)['error'] and 'no image' in found(panels, key, -1)['error']
    answer, svg = panels.overview(key)
    assert (
        sorted(answer.rows['names']) == ['new-1.png', 'new-2.png', 'old-1.png', 'old-2.png']
        and svg.count('<image') == 4
        and '4 of 4 images' in answer.status
    )
    saved = np.load(panels.download(key))
    assert sorted(saved['names'].tolist()) == sorted(answer.rows['names']) and saved['vectors'].shape == (4, 16)
    at = saved['names'].tolist().index('new-2.png')
    assert np.allclose(saved['vectors'][at], panels.emb.encode_image([d/'new-2.png'])[0], atol=1e-5)
    begin('delete', None, 'true')()
    assert (
        found(panels, key) == {}
        and 'no images to map' in panels.overview(key)[0].rows['error']
        and len(np.load(panels.download(key))['names']) == 0
    )


def test_questions_while_another_process_writes(changing):
    panels, key, begin, d = changing
    held, wait, rounds = {}, begin('churn', str(d/'new.csv'), 4), 0
    done = []
    thread = threading.Thread(target=lambda: done.append(wait()))
    thread.start()
    while not done and thread.is_alive():
        for rows in (found(panels, key), found(panels, key, words='wall'), found(panels, key, 0)):
            assert {'old-0.png', 'old-1.png', 'old-2.png'} <= set(rows), rows
            for name, r in rows.items(): assert held.setdefault(name, r['row']) == r['row']
        answer, _ = panels.overview(key)
        assert 'error' not in answer.rows or 'meanwhile' in answer.rows['error']
        assert len(np.load(panels.download(key))['names']) >= 3
        rounds += 1
    thread.join()
    assert (
        done == [None]
        and rounds
        and set(found(panels, key)) == {'old-0.png', 'old-1.png', 'old-2.png', *(f'{i}/new-1.png' for i in range(4))}
    )
    kept = list(Path(panels.of(key)._thumbs.name).iterdir())
    assert len(kept) <= 4 * len(panels.of(key).names)  # of each row two versions, in two sizes


def test_an_index_of_another_artifact_is_refused(changing, folder):
    panels, key, _, d = changing
    from mmembed.retrieval.index import Index
    torch.manual_seed(1)
    text = mm.TextTransformer(
        mm.TextPipeline.learn(['a red circle above a blue ring'] * 3, max_length=16), width=16, depth=1
    )
    mm.export(
        mm.DualEncoder(text, mm.ConvNet(mm.VisionPipeline(size=32)), dim=16).eval(),
        d / 'other.pt',
        fresh=False,
        cpp=False,
    )
    with pytest.raises(ValueError, match='cannot ask an index that artifact'):
        IndexImages(Index(d / 'my.idx', mm.load(d / 'other.pt')))
    Index.build(d/'other.pt', str(d/'old.csv'), d/'my.idx', overwrite=True)
    assert 'cannot ask an index that artifact' in found(panels, key)['error']


def test_a_picture_that_was_removed_is_left_out(folder, tmp_path):
    for colour in ('red', 'blue'): Image.new('RGB', (60, 40), colour).save(tmp_path/f'{colour}.png')
    emb = mm.load(folder/'tiny.pt')
    panels = Panels(emb, [embed_files(emb, [tmp_path/'red.png', tmp_path/'blue.png'])])
    key = next(iter(panels.sets))
    (tmp_path/'red.png').unlink()
    answer = panels.search(['a wall'], [None], [''], [9], [key])[0]
    assert [r['name'] for r in answer.rows] == [
        'blue.png'
    ] and '1 of 2 images, 1 cannot be shown any more (' in answer.status
    answer, svg = panels.overview(key)
    assert answer.rows['names'] == ['blue.png'] and svg.count('<image') == 1


def test_a_folder_embeds_only_what_is_new(folder, tmp_path, monkeypatch):
    "What was added or changed since the last start; what is gone is forgotten; a start that was ended goes on."
    monkeypatch.chdir(tmp_path)
    emb, seen = mm.load(folder/'tiny.pt'), []
    def preprocess(image, really=emb.preprocess):
        seen.append(len(image))
        return really(image)
    emb.preprocess = preprocess
    def start(how_many):
        seen.clear()
        found = embed_folder(emb, tmp_path/'p')
        assert len(seen) == how_many
        want = embed_files(emb, sorted((tmp_path/'p').glob('*.*')))
        assert (
            found.names == want.names
            and torch.allclose(found.vectors, want.vectors, atol=1e-5)
            and found.failed == want.failed
        )
        return found
    shutil.copytree(folder/'photos', tmp_path/'p')
    assert len(start(6)) == 5 and len(start(0)) == 5
    Image.new('RGB', (50, 50), 'yellow').save(tmp_path/'p'/'yellow.png')
    Image.new('RGB', (50, 99), 'purple').save(tmp_path/'p'/'red.png')
    (tmp_path/'p'/'blue.png').unlink()
    assert len(start(2)) == 5
    (tmp_path/'p'/'broken.jpg').write_bytes((folder/'photos'/'blue.png').read_bytes())
    assert not start(1).failed
    for i in range(5): Image.new('RGB', (30 + i, 30), 'teal').save(tmp_path/'p'/f'new-{i}.png')
    monkeypatch.setattr(gallery, 'CHUNK', 2)
    written, keep = [], gallery._keep
    def kept(*args):
        keep(*args)
        written.append(1)
        if len(written) == 2: raise KeyboardInterrupt
    monkeypatch.setattr(gallery, '_keep', kept)
    with pytest.raises(KeyboardInterrupt): embed_folder(emb, tmp_path/'p')
    start(1)
    for path in (tmp_path/'artifacts').rglob('*.npz'): path.write_bytes(b'not what was written')
    start(11)


@pytest.fixture(scope='module')
def browser():
    sync = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    if not shutil.which('chromium'): pytest.skip('no chromium: apt-get install chromium')
    with sync.sync_playwright() as p:
        b = p.chromium.launch(
            executable_path=shutil.which('chromium'),
            args=['--headless', '--no-sandbox', '--disable-gpu', '--disable-background-networking'],
        )
        yield b
        b.close()


FAINT = """() => {  // visible texts that stand out from what is behind them by less than 4.5 to 1 (WCAG 2, level AA)
  const parsed = c => { const [r, g, b, a] = c.match(/[\\d.]+/g).map(Number); return [r, g, b, a ?? 1] }
  const over = (a, b) => [0, 1, 2].map(k => a[k]*a[3] + b[k]*(1 - a[3]))
  const light = c => {
    const [r, g, b] = c.map(v => (v /= 255) <= .04045 ? v/12.92 : ((v + .055)/1.055)**2.4)
    return .2126*r + .7152*g + .0722*b
  }
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + .05)/(y + .05) }
  const chain = e => e ? [e, ...chain(e.parentElement)] : []
  function behind(e) {
    const layers = chain(e).map(p => parsed(getComputedStyle(p).backgroundColor))
    const last = layers.findIndex(c => c[3] === 1)
    return layers.slice(0, last < 0 ? undefined : last + 1).reverse().reduce((b, c) => over(c, b), [255, 255, 255])
  }
  const seen = []
  function judge(e, colour, what) {
    const [r, g, b, a] = parsed(colour), back = behind(e)
    const opacity = chain(e).reduce((o, p) => o*getComputedStyle(p).opacity, 1)
    seen.push([ratio(over([r, g, b, a*opacity], back), back), what])
  }
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  for (let n; n = texts.nextNode();) {
    const e = n.parentElement, text = n.textContent.trim()
    const drawn = e.checkVisibility({visibilityProperty: true, opacityProperty: true})
    if (!text || ['SCRIPT', 'STYLE', 'NOSCRIPT'].includes(e.tagName) || !drawn || e.closest('[disabled]')) continue
    const style = getComputedStyle(e)
    judge(e, e.closest('svg') ? style.fill : style.color, `${e.tagName} ${text.slice(0, 40)}`)
  }
  for (const e of document.querySelectorAll('input, textarea'))
    if (e.placeholder && e.checkVisibility()) judge(e, getComputedStyle(e, '::placeholder').color, e.placeholder)
  if (seen.length < 20) throw Error(`only ${seen.length} texts are seen`)
  return seen.filter(([r]) => r < 4.5).map(([r, what]) => `${r.toFixed(2)} ${what}`)
}"""


def stands_out(tab):
    "Every text, once nothing fades in any more."
    try: tab.wait_for_function(f'() => !({FAINT})().length')
    except tab.Late: assert tab.evaluate(FAINT) == []


def opened(browser, address, width, height=850, theme='light'):
    "A tab with the page; what it logs as errors and what it asks for; visible elements."
    from playwright.sync_api import TimeoutError
    tab = browser.new_page(viewport={'width': width, 'height': height})
    tab.set_default_timeout(HANG * 1000)
    tab.Late, errors, requests = TimeoutError, [], []
    tab.on('console', lambda m: errors.append(m.text) if m.type == 'error' else None)
    tab.on('pageerror', lambda e: errors.append(str(e)))
    tab.on('request', lambda r: requests.append(r.url))
    tab.goto(f'{address}?__theme={theme}')
    def quiet():
        others = [u for u in requests if u.startswith(('http', 'ws')) and u.split('/')[2] != address.split('/')[2]]
        assert not others and not errors, (others, errors)
        tab.close()
    return tab, quiet, lambda selector: tab.locator(selector).locator('visible=true')


@pytest.mark.parametrize(['width', 'theme'], [(1200, 'dark'), (390, 'light')])
def test_an_index_in_a_browser(browser, indexed, width, theme):
    "Captions, filter and words; an image opens large, and Escape closes it."
    tab, quiet, shown = opened(browser, indexed[1], width, theme=theme)
    shown('textarea').first.fill('a red circle')
    shown('textarea').first.press('Enter')
    shown('.mm-found img').nth(5).wait_for()
    assert 'wall' in shown('.mm-found .caption-label').first.inner_text()
    if width < 640: tab.get_by_role('button', name='By an image, and more').click()
    tab.get_by_label('Filter').fill("year > 2001 AND text <> 'a pink wall'")
    tab.get_by_label('Words in the captions').fill('blue')
    shown('textarea').first.fill('')
    tab.get_by_label('Filter').press('Enter')
    tab.wait_for_function('document.querySelectorAll(".mm-found img").length === 1')
    assert shown('.mm-found .caption-label').inner_text().startswith('a blue wall')
    stands_out(tab)
    shown('.mm-found button').first.click()
    shown('#mm-large-image img').wait_for()
    tab.wait_for_function('document.querySelector("#mm-large-image img").naturalWidth === 902')
    box = shown('#mm-large-image img').bounding_box()
    assert (
        box['width'] > 0.8 * width
        and box['y'] + box['height'] <= 850
        and 'a blue wall' in shown('.mm-told').first.inner_text()
    )
    stands_out(tab)
    tab.keyboard.press('Escape')
    tab.locator('#mm-large').wait_for(state='hidden')
    tab.get_by_label('Filter').fill('year >')
    tab.get_by_label('Filter').press('Enter')
    shown('.mm-bad').wait_for()
    tab.get_by_label('Images').click()
    tab.get_by_role('option', name='generated scenes').click()
    tab.get_by_label('Filter').wait_for(state='hidden')
    shown('textarea').first.fill('a red circle')
    shown('textarea').first.press('Enter')
    shown('.mm-found img').nth(11).wait_for()
    quiet()


@pytest.mark.parametrize(['width', 'theme'], [(1200, 'light'), (390, 'dark')])
def test_in_a_browser(browser, page, folder, width, theme):
    panels, address = page
    tab, quiet, shown = opened(browser, address, width, theme=theme)
    def fits():
        assert tab.evaluate('document.documentElement.scrollWidth') <= width
        stands_out(tab)
    red = str(folder/'photos'/'red.png')

    if width < 640: tab.set_viewport_size({'width': width, 'height': 664})  # what Safari leaves of an iPhone's screen
    shown('textarea').first.fill('a red circle')
    fits()
    shown('textarea').first.press('Enter')
    shown('.mm-found img').nth(11).wait_for()
    fits()
    if width < 640:  # the first results, with nothing scrolled
        box = shown('.mm-found img').nth(1).bounding_box()
        assert tab.evaluate('scrollY') == 0 and box['x'] + box['width'] <= width and box['y'] + box['height'] <= 664
    first = shown('.mm-found .caption-label').first.inner_text()
    shown('textarea').first.fill('a blue ring')
    tab.get_by_role('button', name='Search', exact=True).click()
    tab.wait_for_function('text => document.querySelector(".mm-found .caption-label").innerText !== text', arg=first)
    second = shown('.mm-found .caption-label').nth(1).inner_text().split(' · ')[1]
    shown('.mm-found button').nth(1).click()
    shown('#mm-large-image img').wait_for()
    fits()
    tab.get_by_role('button', name='More like this').click()
    tab.locator('#mm-large').wait_for(state='hidden')
    tab.wait_for_function(
        'name => document.querySelector(".mm-found .caption-label")?.textContent.trim().startsWith("1.000 · " + name)',
        arg=second[:20],
    )
    if width < 640: tab.get_by_role('button', name='By an image, and more').click()
    shown('#mm-search img').wait_for()
    assert shown('textarea').first.input_value() == ''

    tab.get_by_role('tab', name='Match').click()
    tab.locator('#mm-match input[type=file]').set_input_files(red)
    shown('#mm-match img').wait_for()
    shown('button:has-text("Compare")').click()
    shown('.mm-bars > div').nth(2).wait_for()
    tab.get_by_role('tab', name='Classes').click()
    tab.locator('#mm-classify input[type=file]').set_input_files(red)
    shown('#mm-classify img').wait_for()
    shown('button:has-text("Classify")').click()
    shown('.mm-bars > div').nth(5).wait_for()
    fits()

    tab.get_by_role('tab', name='Look inside').click()
    tab.locator('#mm-inside input[type=file]').set_input_files(str(folder/'photos'/'clear.png'))
    shown('.mm-found img').nth(2).wait_for()
    assert 'transparent' in shown('ul.mm-warn').inner_text()
    shown('textarea').fill('a <b>red</b> ${alert(1)} {{x}} circle')
    tab.get_by_role('button', name='Look at the text').click()
    shown('.mm-token').nth(5).wait_for()
    assert '$' in shown('.mm-tokens').inner_text() and not shown('.mm-tokens b').count()
    fits()

    tab.get_by_role('tab', name='Embeddings').click()
    shown('svg.mm-map image').nth(29).wait_for()
    shown('textarea').fill('a red circle')
    tab.get_by_role('button', name='Embed', exact=True).click()
    shown('svg.mm-spectrum').wait_for()
    fits()

    quiet()
