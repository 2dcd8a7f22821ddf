"""Clients as they are: what other packages send, and whether they can read the answer."""
import asyncio
import base64
import json

import httpx2
import numpy as np
import pytest
from websockets.sync.client import connect

from mmembed.cli.main import main
from mmembed.exporters.verify import samples as cases
from mmembed.runtime.embedder import load
from mmembed.serve.engine import Busy
from mmembed.serve.queue import Item
from mmembed.serve.queue import PendingRequest
from mmembed.serve.server import running
from mmembed.serve.token_ids import text_of, token_table
from mmembed.serve.entries import _in_parts, run

from tests.exporters import tiny
from tests.serve.conftest import config
from tests.helpers import HANG

FILES = cases.images()


@pytest.fixture(scope='module')
def emb(): return load(tiny.artifact())


@pytest.mark.parametrize('name', ['cat.jpg', 'https://example.org/cat.png', 'data:image/png;base64,AAAA'])
def test_a_plain_string_that_names_an_image_fails_alone(http, server, name):
    "At every door that takes mixed items; an entry of type text is a text, and no file of the server is looked up."
    rows = http.post('/v1/embeddings', json=dict(input=['a', name, dict(type='text', text=name)])).json()['data']
    assert [r['status'] for r in rows] == [
        'ok',
        'invalid',
        'ok',
    ] and 'names an image: pass an entry of type image' in rows[1]['error']
    assert (
        http.post('/v1/embeddings', content=name, headers={'content-type': 'text/plain'}).json()['data'][0]['status']
        == 'ok'
    )
    assert (
        http.post('/classify', json=dict(input=['a', name], labels=['b'])).json()['results'][1]['status'] == 'invalid'
    )
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
        said = dict(index=found, live=c.is_server_live(), ready=c.is_model_ready(model),
                    meta=c.get_server_metadata(**kw)['extensions'],
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
            got = [answers.get(timeout=300) for _ in range(4)]
            c.stop_stream()
            said['stream'] = [[r.get_response().id, len(rows(r))] for r, e in got[:3]]
            said['refused'] = got[3][1].message()
        out[name] = said
print(json.dumps(out))
"""


@pytest.mark.weekly
def test_tritonclient(server, python, emb, http):
    """Configuration, statistics, index, compressed requests, and a stream whose answers come in the order of the
    requests."""
    file = FILES['RGB.png']
    out = python(
        TRITON, server.url.removeprefix('http://'), server.grpc.removeprefix('grpc://'), base64.b64encode(file).decode()
    )
    name, text, image = (
        http.get('/v1/models').json()['data'][0]['id'],
        emb.encode_text(['a red circle']),
        emb.encode_image([file]),
    )
    for said in out.values():
        assert said['index'] | dict(reason='') == dict(
            name=name, version=emb.card['short_hash'], state='READY', reason=''
        )
        assert (
            said['live'] and said['ready'] and said['status'][0] == 'ok' and said['status'][1].startswith('invalid: ')
        )
        assert {'model_configuration', 'statistics', 'binary_tensor_data'} <= set(said['meta'])
        for got_text, got_image in [(said['text'], said['image']), *said['squeezed']]:
            assert (
                np.allclose(got_text, text, atol=1e-5)
                and np.allclose(got_image[0], image[0], atol=1e-5)
                and not np.any(got_image[1])
            )
    assert out['http']['config'] == dict(
        name=name,
        platform='mmembed',
        max_batch_size=0,
        input=[dict(name=k, data_type='TYPE_STRING', dims=[-1], optional=True) for k in ('text', 'image')],
        output=[
            t
            for k in ('text', 'image')
            for t in (
                dict(name=f'{k}_embedding', data_type='TYPE_FP32', dims=[-1, emb.dim]),
                dict(name=f'{k}_status', data_type='TYPE_STRING', dims=[-1]),
            )
        ],
    )
    config = out['grpc']['config']['config']
    assert [t['dims'] for t in config['output']] == [['-1', str(emb.dim)], ['-1']] * 2 and config['input'][0][
        'data_type'
    ] == 'TYPE_STRING'
    before, after = (out[k]['stats'][0][0] for k in ('http', 'grpc'))  # gRPC's came later
    # items: three requests of two good ones
    assert before['inference_count'] >= 6 and int(after['inference_count']) >= before['inference_count'] + 6
    stats = before['inference_stats']
    assert (
        stats['success']['count'] == before['inference_count']
        and stats['fail']['count'] >= 3
        and before['execution_count'] >= 1
    )
    assert stats['success']['ns'] > stats['compute_infer']['ns'] > 0 and before['last_inference'] > 1.7e12
    assert [s['name'] for by in (out['http'], out['grpc']) for [s] in by['stats']] == [name] * 4
    assert out['grpc']['stream'] == [['0', 60], ['1', 1], ['2', 3]] and out['grpc']['refused'].startswith(
        "NOT_FOUND: there is no model 'other'"
    )


OPENAI = """
import json, sys
import openai
url, *texts = sys.argv[1:]
c, out = openai.OpenAI(base_url=f'{url}/v1', api_key='none'), {}
out['embedding'] = [d.embedding for d in c.embeddings.create(model='tiny', input=texts).data]
out['plain'] = [d.embedding for d in c.embeddings.create(model='tiny', input=texts, encoding_format='float').data]
mixed = c.embeddings.create(model='tiny', input=[texts[0], {'type': 'image', 'image': 'AAAA'}, texts[1]])
out['mixed'] = [[d.embedding, d.status] for d in mixed.data]
out['many'] = len(c.embeddings.create(model='tiny', input=['a'] * 2048).data)
for k, bad in dict(ids=[[1, 2]], dimensions=texts).items():
    try: c.embeddings.create(model='tiny', input=bad, dimensions=9999 if k == 'dimensions' else openai.omit)
    except openai.APIStatusError as e: out[k] = [e.status_code, e.message]
print(json.dumps(out))
"""

OPENAI_NODE = """
import OpenAI from 'openai';
const [url, ...texts] = process.argv.slice(2);
const c = new OpenAI({baseURL: `${url}/v1`, apiKey: 'none'}), out = {}, model = 'tiny';
out.embedding = (await c.embeddings.create({model, input: texts})).data.map(d => d.embedding);
out.plain = (await c.embeddings.create({model, input: texts, encoding_format: 'float'})).data.map(d => d.embedding);
const mixed = await c.embeddings.create({model, input: [texts[0], {type: 'image', image: 'AAAA'}, texts[1]]});
out.mixed = mixed.data.map(d => [d.embedding, d.status]);
out.many = (await c.embeddings.create({model, input: Array(2048).fill('a')})).data.length;
for (const [k, bad] of [['ids', {input: [[1, 2]]}], ['dimensions', {input: texts, dimensions: 9999}]])
    try { await c.embeddings.create({model, ...bad}); } catch (e) { out[k] = [e.status, e.message]; }
console.log(JSON.stringify(out));
"""

# with only `model` and `base_url`, whose tokenizer LangChain would download; the table made here stands in for it
LANGCHAIN = """
import base64, json, sys
import tiktoken
from langchain_openai import OpenAIEmbeddings
url, table, name, *texts = sys.argv[1:]
ranks = {base64.b64decode(w): int(i) for w, i in map(str.split, open(table))}
ours = tiktoken.Encoding('ours', pat_str=r'(?s)\\\\s?\\\\w+|.', mergeable_ranks=ranks, special_tokens={})
tiktoken.encoding_for_model = tiktoken.get_encoding = lambda name: ours
out = {}
emb = OpenAIEmbeddings(model=name, base_url=f'{url}/v1', api_key='none')
try: out['ids'] = emb.embed_documents(texts)
except Exception as e: out['error'] = str(e)
emb = OpenAIEmbeddings(model=name, base_url=f'{url}/v1', api_key='none', check_embedding_ctx_length=False)
out['texts'] = emb.embed_documents(texts)
print(json.dumps(out))
"""
TEXTS = ['a red circle', '一个红色的圆 é 🐈']


@pytest.fixture(scope='module')
def tiktoken(tmp_path_factory):
    "A table of a byte-level BPE in the form of tiktoken."
    pieces = [bytes([i]) for i in range(256)] + [b' r', b' re', b' red', b'ci', 'é'.encode()]
    path = tmp_path_factory.mktemp('tiktoken')/'ours.tiktoken'
    path.write_text(''.join(f'{base64.b64encode(p).decode()} {i}\n' for i, p in enumerate(pieces)))
    return path


@pytest.fixture(scope='module')
def roomy(log, tiktoken):
    "A server that is told the table of its clients' token ids, with the items of a request that are taken by default."
    with running(config(log, token_ids=str(tiktoken), name='tiny', queue=300, timeout=HANG)) as s: yield s


@pytest.mark.parametrize('language', ['python', 'node'])
def test_openai(language, roomy, emb, request):
    """A bad item is an empty vector among good ones, and breaks neither the parser nor its neighbours.

    2,048 items go through a queue of 300."""
    out = request.getfixturevalue(language)(OPENAI if language == 'python' else OPENAI_NODE, roomy.url, *TEXTS)
    want = emb.encode_text(TEXTS)
    assert (
        np.allclose(out['embedding'], want, atol=1e-5)
        and np.allclose(out['plain'], want, atol=1e-5)
        and out['many'] == 2048
    )
    assert [s for _, s in out['mixed']] == ['ok', 'invalid', 'ok'] and out['mixed'][1][0] == []
    assert np.allclose([out['mixed'][0][0], out['mixed'][2][0]], want, atol=1e-5)
    assert out['dimensions'][0] == 422 and 'the model has 24' in out['dimensions'][1] and 'ids' not in out


def test_langchain(roomy, server, python, tiktoken, emb):
    "It sends the ids of another tokenizer; a server without their table says what to set."
    want, name = emb.encode_text(TEXTS), tiny.artifact().stem
    told = python(LANGCHAIN, roomy.url, tiktoken, 'tiny', *TEXTS)
    assert np.allclose(told['ids'], want, atol=1e-5) and np.allclose(told['texts'], want, atol=1e-5)
    out = python(LANGCHAIN, server.url, tiktoken, name, *TEXTS)
    assert (
        'Error code: 400' in out['error']
        and 'check_embedding_ctx_length=False' in out['error']
        and '--token-ids FILE' in out['error']
    )
    assert np.allclose(out['texts'], want, atol=1e-5)


def test_token_ids(roomy, server, emb, tmp_path):
    "One text or several; an id that is not in the table fails alone; a text cut inside a character is a text."
    with httpx2.Client(base_url=roomy.url, timeout=HANG) as http:
        def ask(ids): return http.post('/v1/embeddings', json=dict(input=ids)).json()['data']
        red = [97, 258, 32, 259, *b'rcle']
        assert np.allclose(
            [ask(red)[0]['embedding'], ask([red, [1]])[0]['embedding']],
            emb.encode_text(['a red circle'])[[0, 0]],
            atol=1e-5,
        )
        assert np.allclose(ask(list('é'.encode())[:1])[0]['embedding'], emb.encode_text([b'\xc3'])[0], atol=1e-5)
        rows = ask([red, [99_999], 'a', red])
        assert [r['status'] for r in rows] == ['ok', 'invalid', 'ok', 'ok'] and 'token id 99999' in rows[1]['error']
        for wrong in ([1, 'a'], [[1.5]], [[-1]], [['a']]):
            assert http.post('/v1/embeddings', json=dict(input=wrong)).status_code == 422
    r = httpx2.post(f'{server.url}/v1/embeddings', json=dict(input=['a', [1]]), timeout=HANG)
    assert r.status_code == 400 and r.json()['error']['type'] == 'invalid_request_error'


def test_tables_of_token_ids(tmp_path, tiktoken, capsys):
    """A tokenizer.json of a byte-level BPE gives each token's bytes.

    What cannot be turned back is refused before the server starts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(
        TEXTS * 3,
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=['<end>'], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    bpe.save(str(tmp_path/'tokenizer.json'))
    table = token_table(tmp_path/'tokenizer.json')
    for text in [*TEXTS, *(bytes(range(256)).decode('latin-1'),)]:
        ids = bpe.encode(text).ids
        assert text_of(ids, table).decode() == text == bpe.decode(ids)
    assert text_of([bpe.token_to_id('<end>')], table) == b''
    wordpiece = Tokenizer(models.WordPiece({'a': 0}, unk_token='a'))
    wordpiece.save(str(tmp_path/'words.json'))
    (tmp_path/'noise').write_bytes(bytes(range(256)))
    for name, why in (
        ('words.json', 'neither a table of tiktoken nor'),
        ('noise', 'neither a table of tiktoken nor'),
        ('none', 'No such file'),
    ):
        assert (
            main(['serve', str(tiny.artifact()), '--token-ids', str(tmp_path / name)]) != 0
            and why in capsys.readouterr().err
        )


def test_a_request_in_parts_is_numbered_as_a_whole():
    class Service:
        config = config('/dev/null', queue=2)
        async def run(self, items, timeout, span): PendingRequest(items, lambda job: None)
    items = [Item('text', 'a') for _ in range(5)]
    assert [i.index for i in asyncio.run(run(Service(), items))] == [0, 1, 2, 3, 4]


def test_parts_of_a_request_wait_for_the_queue_but_the_first_is_turned_away():
    asked, full = [], [False, True, True, False, False]
    class Service:
        config = config('/dev/null', queue=2)
        async def run(self, items, timeout, span):
            asked.append(len(items))
            if full.pop(0): raise Busy(.001)
    items = [Item('text', 'a') for _ in range(5)]
    asyncio.run(_in_parts(Service(), items, 60., None))
    assert asked == [2, 2, 2, 2, 1]
    full[:] = [True]
    with pytest.raises(Busy): asyncio.run(_in_parts(Service(), items, 60., None))
