"""Clients as they are: what other packages send, and whether they can read the answer."""
import base64
import json

import numpy as np
import pytest
from websockets.sync.client import connect

from mmembed.export import cases
from mmembed.runtime import load

from ..export import tiny

FILES = cases.images()


@pytest.fixture(scope='module')
def emb(): return load(tiny.artifact())


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


TRITON = """
import base64, json, queue, sys
import numpy as np
import tritonclient.grpc, tritonclient.http
host, rpc, file = sys.argv[1:]
file, out = base64.b64decode(file), {}
for name, m, at in (('http', tritonclient.http, host), ('grpc', tritonclient.grpc, rpc)):
    with m.InferenceServerClient(at) as c:
        kw = {} if name == 'http' else dict(as_json=True)
        [found] = c.get_model_repository_index(**kw) if name == 'http' else c.get_model_repository_index(**kw)['models']
        model = found['name']
        def inputs(*values):
            made = m.InferInput('text' if isinstance(values[0], str) else 'image', [len(values)], 'BYTES')
            made.set_data_from_numpy(np.array([v.encode() if isinstance(v, str) else v for v in values], object))
            return made
        def rows(r, kind='text'): return r.as_numpy(f'{kind}_embedding').tolist()
        both = [inputs('a red circle'), inputs(file, b'bad')]
        plain = c.infer(model, both)
        said = dict(index=found, live=c.is_server_live(), ready=c.is_model_ready(model), meta=c.get_server_metadata(**kw)['extensions'],
                    config=c.get_model_config(model, **kw), text=rows(plain), image=rows(plain, 'image'),
                    status=[s.decode() for s in plain.as_numpy('image_status')], squeezed=[])
        for how in ('gzip', 'deflate'):
            r = c.infer(model, both, **(dict(request_compression_algorithm=how, response_compression_algorithm=how)
                                        if name == 'http' else dict(compression_algorithm=how)))
            said['squeezed'].append([rows(r), rows(r, 'image')])
        said['stats'] = [c.get_inference_statistics(*args, **kw)['model_stats'] for args in ((), (model,))]
        if name == 'grpc':
            answers = queue.Queue()
            c.start_stream(lambda result, error: answers.put((result, error)))
            asked = [['x' * 400] * 60, ['a'], [''] * 3]  # the first takes longest
            for k, texts in enumerate(asked): c.async_stream_infer(model, [inputs(*texts)], request_id=str(k))
            c.async_stream_infer('other', [inputs('a')])
            got = [answers.get(timeout=120) for _ in range(4)]
            c.stop_stream()
            said['stream'] = [[r.get_response().id, len(rows(r))] for r, e in got[:3]]
            said['refused'] = got[3][1].message()
        out[name] = said
print(json.dumps(out))
"""


def test_tritonclient(server, python, emb, http):
    "Configuration, statistics, index, compressed requests, and a stream whose answers come in the order of the requests."
    file = FILES['RGB.png']
    out = python(TRITON, server.url.removeprefix('http://'), server.grpc.removeprefix('grpc://'), base64.b64encode(file).decode())
    name, text, image = http.get('/v1/models').json()['data'][0]['id'], emb.encode_text(['a red circle']), emb.encode_image([file])
    for said in out.values():
        assert said['index'] | dict(reason='') == dict(name=name, version=emb.card['short_hash'], state='READY', reason='')
        assert said['live'] and said['ready'] and said['status'][0] == 'ok' and said['status'][1].startswith('invalid: ')
        assert {'model_configuration', 'statistics', 'binary_tensor_data'} <= set(said['meta'])
        for got_text, got_image in [(said['text'], said['image']), *said['squeezed']]:
            assert np.allclose(got_text, text, atol=1e-5) and np.allclose(got_image[0], image[0], atol=1e-5) and not np.any(got_image[1])
    assert out['http']['config'] == dict(name=name, platform='mmembed', max_batch_size=0,
        input=[dict(name=k, data_type='TYPE_STRING', dims=[-1], optional=True) for k in ('text', 'image')],
        output=[t for k in ('text', 'image') for t in (dict(name=f'{k}_embedding', data_type='TYPE_FP32', dims=[-1, emb.dim]),
                                                       dict(name=f'{k}_status', data_type='TYPE_STRING', dims=[-1]))])
    config = out['grpc']['config']['config']
    assert [t['dims'] for t in config['output']] == [['-1', str(emb.dim)], ['-1']] * 2 and config['input'][0]['data_type'] == 'TYPE_STRING'
    before, after = (out[k]['stats'][0][0] for k in ('http', 'grpc'))  # gRPC's came later
    assert before['inference_count'] >= 6 and int(after['inference_count']) >= before['inference_count'] + 6  # items: three requests of two good ones
    stats = before['inference_stats']
    assert stats['success']['count'] == before['inference_count'] and stats['fail']['count'] >= 3 and before['execution_count'] >= 1
    assert stats['success']['ns'] > stats['compute_infer']['ns'] > 0 and before['last_inference'] > 1.7e12
    assert [s['name'] for by in (out['http'], out['grpc']) for [s] in by['stats']] == [name] * 4
    assert out['grpc']['stream'] == [['0', 60], ['1', 1], ['2', 3]] and out['grpc']['refused'].startswith("NOT_FOUND: there is no model 'other'")
