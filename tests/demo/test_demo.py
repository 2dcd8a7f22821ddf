"""The demo page through gradio_client and in a real browser: every endpoint, every tab, nothing from another host, no error in the console."""
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import mmembed as mm

pytest.importorskip('gradio', reason='gradio is not installed: pip install "mmembed[demo]"')
from gradio_client import Client, handle_file

from mmembed.demo.app import serve
from mmembed.demo.panels import Panels
from mmembed.demo.pictures import embed_folder, embed_scenes

from tests.helpers import HANG


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "An artifact of random weights and some files."
    d = tmp_path_factory.mktemp('demo')
    torch.manual_seed(0)
    text = mm.TextTransformer(mm.TextPipeline.learn(['a red circle above a blue ring'] * 3, max_length=16), width=16, depth=1)
    mm.export(mm.DualEncoder(text, mm.ConvNet(mm.VisionPipeline(size=32)), dim=16).eval(), d/'tiny.pt')
    (d/'photos').mkdir()
    for i, colour in enumerate(['red', 'green', 'blue', 'white']): Image.new('RGB', (60 + 20*i, 60), colour).save(d/'photos'/f'{colour}.png')
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
    blocks, address = serve(panels, block=False)
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
    assert [r['name'] for r in rows][0] == 'green.png' and rows[0]['cosine'] == pytest.approx(1, abs=1e-5) and len(found) == 3 and ' ms' in status
    _, rows, _ = client.predict('a red circle', None, '', 5, scenes, api_name='/search')
    want = panels.emb.encode_text(['a red circle']) @ panels.sets[scenes].vectors.T
    assert [r['row'] for r in rows] == want[0].topk(5).indices.tolist()
    both = client.predict('a red circle', green, '', 1, scenes, api_name='/search')[1]
    assert both[0]['cosine'] < 1 and client.predict('', None, '7', 1, scenes, api_name='/search')[1][0]['row'] == 7
    _, rows, status = client.predict('', handle_file(str(folder/'photos'/'broken.jpg')), '', 3, photos, api_name='/search')
    assert 'broken.jpg: not an image' in rows['error'] and 'mm-bad' in status and str(folder) not in status
    assert 'Type a text' in client.predict(' ', None, '', 3, photos, api_name='/search')[1]['error']
    assert 'no longer held' in client.predict('x', None, '', 3, 'upload 000000 (1)', api_name='/search')[1]['error']


def test_visitors_are_answered_in_one_batch(page, client):
    panels, _ = page
    scenes = next(iter(panels.sets))
    alone = client.predict('a blue ring', None, '', 4, scenes, api_name='/search')[1]
    jobs = [client.submit(t, None, '', 4, scenes, api_name='/search') for t in ['a blue ring', '', 'a blue ring', 'a red circle']*3]
    found = [j.result(timeout=HANG)[1] for j in jobs]
    assert all([r['row'] for r in found[i]] == [r['row'] for r in alone] for i in range(0, 12, 2)) and all('error' in found[i] for i in (1, 5, 9))


def test_match(client, folder, page):
    emb = page[0].emb
    red = str(folder/'photos'/'red.png')
    rows, _, html = client.predict(handle_file(red), 'a red circle\n<script>alert(1)</script>', api_name='/match_texts')
    want = emb.score(['a red circle', '<script>alert(1)</script>'], [red]).flatten()
    assert {r['label']: r['score'] for r in rows}['a red circle'] == pytest.approx(want[0].item(), abs=1e-4)
    assert sum(r['probability'] for r in rows) == pytest.approx(1, abs=1e-5) and '<script>' not in html
    rows, _, html = client.predict('a red circle', [handle_file(red), handle_file(str(folder/'photos'/'broken.jpg'))], api_name='/match_images')
    assert rows[0]['label'] == 'red.png' and 'not an image' in rows[1]['error'] and 'mm-bad' in html
    rows, _, _ = client.predict(handle_file(red), 'red, blue', 'a {} circle\na {} ring', api_name='/classify')
    prompts = emb.encode_text(['a red circle', 'a red ring', 'a blue circle', 'a blue ring']).view(2, 2, -1).mean(1)
    want = emb.score(torch.nn.functional.normalize(prompts, dim=1), [red]).flatten().softmax(0)
    assert {r['label']: r['probability'] for r in rows}['red'] == pytest.approx(want[0].item(), abs=1e-5)
    assert 'needs {}' in client.predict(handle_file(red), 'red', 'a circle', api_name='/classify')[0]['error']


def test_inside(client, folder, page):
    rows, status, shown = client.predict(handle_file(str(folder/'photos'/'clear.png')), api_name='/inside_image')
    said = ' '.join(rows['warnings'])
    assert 'transparent parts are drawn on white' in said and '33% of the picture is cut away' in said and len(shown) == 3
    seen = np.asarray(Image.open(shown[1]['image']).convert('RGB'))
    assert (torch.from_numpy(seen.copy()).permute(2, 0, 1) == page[0].emb.preprocess(folder/'photos'/'clear.png')).all()
    text = 'a red circle ' * 10
    rows, status, html = client.predict(text, api_name='/inside_text')
    ids = page[0].emb.tokenize([text]).ids[0].tolist()
    assert [t['id'] for t in rows['tokens']] == ids and all(text.encode()[t['begin']:t['end']].decode() == t['piece'] for t in rows['tokens'])
    assert 'The model reads 16 tokens' in rows['warnings'][0] and f'<s>{rows["rest"]}</s>' in html


def test_embeddings(client, folder, page):
    panels, _ = page
    photos = [*panels.sets][1]
    rows, _, svg, file = client.predict('a red circle', None, api_name='/embed')
    assert np.allclose(np.load(file), panels.emb.encode_text(['a red circle'])[0], atol=1e-6) and len(rows['embedding']) == 16 and '<svg' in svg
    assert 'either a text or an image' in client.predict('', None, api_name='/embed')[0]['error']
    saved = np.load(client.predict(photos, api_name='/download'))
    assert saved['names'].tolist() == panels.sets[photos].names and np.allclose(saved['vectors'], panels.sets[photos].vectors)
    rows, status, heat, plane = client.predict(photos, api_name='/overview')
    assert len(rows['at']) == 5 and '1 could not be read' in status and plane.count('<image') == 5 and heat.count('<td') == 25


def test_own_pictures(client, folder, page):
    files = [handle_file(str(folder/'photos'/n)) for n in ('blue.png', 'broken.jpg', 'white.png')]
    update, said = client.predict(files, api_name='/index')
    key = update['value'] if isinstance(update, dict) else update
    assert '2 pictures can be searched' in said and 'broken.jpg: not an image' in said
    rows = client.predict('', handle_file(str(folder/'photos'/'white.png')), '', 2, key, api_name='/search')[1]
    assert rows[0]['name'] == 'white.png' and rows[0]['cosine'] == pytest.approx(1, abs=1e-5)


def test_the_artifact_alone_answers(folder):
    "No training code, no other framework: in a process of its own."
    program = ("import sys, mmembed as mm; from mmembed.demo.app import build; from mmembed.demo.panels import Panels; from mmembed.demo.pictures import embed_scenes\n"
               f"emb = mm.load({str(folder/'tiny.pt')!r}); build(Panels(emb, [embed_scenes(emb, 4)]))\n"
               "import json; print(json.dumps([m for m in ('lightning', 'transformers', 'open_clip', 'torchvision', 'matplotlib', 'mmembed.train', 'mmembed.models.dual', 'mmembed.data.module') if m in sys.modules]))")
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1]) == [], done.stderr[-2000:] + done.stdout


@pytest.fixture(scope='module')
def browser():
    sync = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    if not shutil.which('chromium'): pytest.skip('no chromium: apt-get install chromium')
    with sync.sync_playwright() as p:
        b = p.chromium.launch(executable_path=shutil.which('chromium'), args=['--headless', '--no-sandbox', '--disable-gpu', '--disable-background-networking'])
        yield b
        b.close()


@pytest.mark.parametrize('width', [1200, 390])
def test_in_a_browser(browser, page, folder, width):
    panels, address = page
    tab = browser.new_page(viewport={'width': width, 'height': 850})
    tab.set_default_timeout(20000)
    errors, requests = [], []
    tab.on('console', lambda m: errors.append(m.text) if m.type == 'error' else None)
    tab.on('pageerror', lambda e: errors.append(str(e)))
    tab.on('request', lambda r: requests.append(r.url))
    shown = lambda selector: tab.locator(selector).locator('visible=true')
    def fits(): assert tab.evaluate('document.documentElement.scrollWidth') <= width
    red = str(folder/'photos'/'red.png')

    tab.goto(address)
    shown('textarea').first.fill('a red circle')
    tab.get_by_role('button', name='Search', exact=True).click()
    shown('.mm-found img').nth(11).wait_for()
    fits()
    second = shown('.mm-found .caption-label').nth(1).inner_text().split(' · ')[1]
    shown('.mm-found button').nth(1).click()
    tab.wait_for_function('name => document.querySelector(".mm-found .caption-label")?.textContent.trim().startsWith("1.000 · " + name)', arg=second[:20])
    assert shown('#mm-search img').count() and shown('textarea').first.input_value() == ''

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

    others = [u for u in requests if u.startswith(('http', 'ws')) and u.split('/')[2] != address.split('/')[2]]
    assert not others and not errors, (others, errors)
    tab.close()
