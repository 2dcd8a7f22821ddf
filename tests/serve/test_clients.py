"""Clients as they are: what other packages send, and whether they can read the answer."""
import json

import pytest
from websockets.sync.client import connect


@pytest.mark.parametrize('name', ['cat.jpg', 'https://example.org/cat.png', 'data:image/png;base64,AAAA'])
def test_a_plain_string_that_names_an_image_fails_alone(http, server, name):
    "At every door that takes mixed items; an entry of type text is a text, and no file of the server is looked up."
    rows = http.post('/v1/embeddings', json=dict(input=['a', name, dict(type='text', text=name)])).json()['data']
    assert [r['status'] for r in rows] == ['ok', 'invalid', 'ok'] and 'names an image: pass an entry of type image' in rows[1]['error']
    assert http.post('/v1/embeddings', content=name, headers={'content-type': 'text/plain'}).json()['data'][0]['status'] == 'ok'
    assert http.post('/classify', json=dict(input=['a', name], labels=['b'])).json()['results'][1]['status'] == 'invalid'
    r = http.post('/rank', json=dict(query=name, candidates=[dict(type='image', image='AAAA')]))
    assert r.status_code == 422 and 'names an image' in r.text
    with connect(f'ws{server.url[4:]}/v1/stream') as ws:
        ws.send(json.dumps(dict(input=[name, 'a'])))
        assert [r['status'] for r in json.loads(ws.recv())['data']] == ['invalid', 'ok']
