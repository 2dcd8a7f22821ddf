"""gRPC through real sockets: streams, statuses, health, reflection, the Open Inference Protocol, and bytes that are
no messages."""
import signal
import struct
import threading

import grpc
import numpy as np
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from mmembed.exporters.verify import samples as cases
from mmembed.runtime.embedder import load
from mmembed.serve import protobuf as protos
from mmembed.serve.protobuf import message, methods
from mmembed.serve.server import running

from tests.exporters import tiny
from tests.helpers import HANG
from tests.serve.conftest import config

FILES = cases.images()
OURS, V2 = 'mmembed.v1.Embedding', 'inference.GRPCInferenceService'
Item, Encode, Rank, Infer = (
    message(n)
    for n in ('mmembed.v1.Item', 'mmembed.v1.EncodeRequest', 'mmembed.v1.RankRequest', 'inference.ModelInferRequest')
)


@pytest.fixture(scope='module')
def emb(): return load(tiny.artifact())


@pytest.fixture(scope='module')
def channel(server):
    with grpc.insecure_channel(server.grpc.removeprefix('grpc://')) as c: yield c


def call(channel, name, service=OURS):
    q, a, many, _ = methods(service)[name]
    return (channel.stream_stream if many else channel.unary_unary)(
        f'/{service}/{name}', q.SerializeToString, a.FromString
    )


def code(f, *args, **kw):
    with pytest.raises(grpc.RpcError) as e: f(*args, **kw)
    return e.value.code().name


def test_the_compiled_description_is_in_step():
    assert (protos.proto_folder()/'compiled.binpb').read_bytes() == protos.compiled()


def test_every_text_and_file(channel, emb):
    texts, files = (
        [t if isinstance(t, bytes) else t.encode('utf-8', 'surrogatepass') for t in cases.texts()],
        list(FILES.values()),
    )
    want = emb.encode_image(files, on_error='flag')
    mixed = [(Item(text_utf8=t), v, '') for t, v in zip(texts, emb.encode_text(texts))] + [
        (Item(image=f), v, e) for f, v, e in zip(files, want.embedding, want.errors)
    ]
    def requests():
        for k in range(0, len(mixed), 20): yield Encode(id=str(k), items=[m[0] for m in mixed[k:k+20]])
    count = 0
    for answer in call(channel, 'EncodeStream')(requests(), timeout=HANG):
        for r, (_, v, e) in zip(answer.results, mixed[int(answer.id):], strict=False):
            assert (r.error, r.status) == (e, 2 if e else 1)
            if not e: assert np.allclose(np.frombuffer(r.embedding, '<f4'), v, atol=1e-5)
            count += 1
    assert count == len(mixed)


def test_statuses(channel):
    encode = call(channel, 'Encode')
    assert (
        code(encode, Encode()) == 'INVALID_ARGUMENT'
        and code(encode, Encode(items=[Item(text='a')], dimensions=25)) == 'INVALID_ARGUMENT'
    )
    assert (
        code(encode, Encode(items=[Item(text='a')] * 65)) == 'RESOURCE_EXHAUSTED'
        and code(encode, Encode(items=[Item(image=bytes(3 << 20))])) == 'RESOURCE_EXHAUSTED'
    )
    try:
        statuses = {
            r.status for r in encode(Encode(items=[Item(image=FILES['quality 75.jpg'])] * 60), timeout=0.001).results
        }
    except grpc.RpcError as e:
        assert e.code().name == 'DEADLINE_EXCEEDED'
    else: assert 3 in statuses  # the server saw the time run out first: those items are late
    assert [r.status for r in encode(Encode(items=[Item(), Item(text='a'), Item(image=b'')])).results] == [2, 1, 2]
    cut = encode(Encode(items=[Item(text='a')], dimensions=5)).results[0]
    assert len(cut.embedding) == 20 and abs(np.linalg.norm(np.frombuffer(cut.embedding, '<f4')) - 1) < 1e-5
    assert code(call(channel, 'Rank'), Rank(query=Item(text='a'), candidates=[Item(text='b')])) == 'INVALID_ARGUMENT'


def test_rank(channel, emb):
    texts, images = ['a red circle', 'a blue square', 'x'], [FILES['RGB.png'], FILES['quality 75.jpg']]
    score = emb.score(texts, images).numpy()
    r = call(channel, 'Rank')(Rank(query=Item(image=images[1]), candidates=[Item(text=t) for t in texts]))
    assert [x.index for x in r.results] == list(np.argsort(-score[:, 1])) and np.allclose(
        [x.score for x in r.results], np.sort(score[:, 1])[::-1], atol=1e-4
    )
    answers = list(
        call(channel, 'RankStream')(
            iter([Rank(id='1', query=Item(text='a'), candidates=[Item(image=images[0])], top_k=1), Rank(id='2')])
        )
    )
    assert {a.id: len(a.results) or a.failure.code for a in answers} == {'1': 1, '2': 3}
    assert call(channel, 'Info')(message('mmembed.v1.InfoRequest')()).artifact == emb.card['short_hash']


def test_a_stream_that_is_cut_off_leaves_nothing(channel, http):
    def forever():
        while True: yield Encode(items=[Item(text='a')] * 10)
    stream = call(channel, 'EncodeStream')(forever())
    assert next(stream).results[0].status == 1
    stream.cancel()
    assert call(channel, 'Encode')(Encode(items=[Item(text='a')])).results[0].status == 1
    assert 'status="CANCELLED"' in http.get('/metrics').text


def test_health_and_reflection(channel):
    check = health_pb2_grpc.HealthStub(channel).Check
    for service in ('', OURS, V2): assert check(health_pb2.HealthCheckRequest(service=service)).status == 1
    ask = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
    [answer] = ask(iter([reflection_pb2.ServerReflectionRequest(list_services='')]))
    assert {OURS, V2, 'grpc.health.v1.Health'} <= {s.name for s in answer.list_services_response.service}
    [answer] = ask(iter([reflection_pb2.ServerReflectionRequest(file_containing_symbol=OURS)]))
    assert b'EncodeStream' in answer.file_descriptor_response.file_descriptor_proto[0]


def test_health_keeps_nothing_that_a_client_names(server, channel):
    "Large names of services that are not here, before any key: not found, not echoed, and not in memory afterwards."
    def memory(): return psutil.Process(server.process.pid).memory_info().rss / 2**20
    stub, names = health_pb2_grpc.HealthStub(channel), [f'{k}' * 633_000 for k in range(100, 160)]
    ask = lambda name: health_pb2.HealthCheckRequest(service=name)
    for name in names[:6]: assert code(stub.Check, ask(name)) == 'NOT_FOUND'
    before = memory()
    for name in names:
        with pytest.raises(grpc.RpcError) as e: stub.Check(ask(name))
        assert e.value.code().name == 'NOT_FOUND' and len(e.value.details()) < 200
    seen = []
    with pytest.raises(grpc.RpcError) as e:
        for answer in stub.Watch(ask('nobody'), timeout=HANG): seen.append(answer.status)
    assert e.value.code().name == 'NOT_FOUND' and seen == [health_pb2.HealthCheckResponse.SERVICE_UNKNOWN]
    assert memory() - before < 57  # half of the names
    serving = health_pb2.HealthCheckResponse(status='SERVING')
    assert dict(stub.List(health_pb2.HealthListRequest()).statuses) == dict.fromkeys(('', OURS, V2), serving)


def test_nothing_idle_holds_up_the_end(tmp_path):
    "A watch and streams with nothing to do: the watch hears of the end, and the process ends long before its grace."
    patient = config(tmp_path/'log', grace=3600.)
    with running(patient) as s, grpc.insecure_channel(s.grpc.removeprefix('grpc://')) as channel:
        closing = threading.Event()
        def idle(*first):
            yield from first
            closing.wait(HANG)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=OURS))
        reflect = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        streams = [call(channel, 'EncodeStream')(idle(Encode(id='1', items=[Item(text='a')]))),
                   call(channel, 'RankStream')(idle(Rank(id='1'))),
                   reflect(idle(reflection_pb2.ServerReflectionRequest(list_services='')))]
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING and all(next(x) for x in streams)
        streams.append(call(channel, 'EncodeStream')(idle()))
        s.process.send_signal(signal.SIGTERM)
        assert [x.status for x in watch] == [health_pb2.HealthCheckResponse.NOT_SERVING]
        codes = [code(next, x) for x in streams]
        assert codes.pop(2) in ('UNAVAILABLE', 'CANCELLED') and set(codes) == {'UNAVAILABLE'}
        assert s.process.wait(HANG) == 0
        closing.set()


def test_open_inference_protocol(channel, emb):
    get = lambda method, **kw: call(channel, method, V2)(message(f'inference.{method}Request')(**kw))
    assert get('ServerLive').live and get('ServerReady').ready and get('ServerMetadata').name == 'mmembed'
    [name] = {call(channel, 'Info')(message('mmembed.v1.InfoRequest')()).name}
    meta = get('ModelMetadata', name=name)
    assert (
        get('ModelReady', name=name).ready
        and [t.name for t in meta.inputs] == ['text', 'image']
        and list(meta.outputs[0].shape) == [-1, 24]
    )
    infer, texts, raw = (
        call(channel, 'ModelInfer', V2),
        [b'a red circle', b'\xff'],
        lambda xs: b''.join(struct.pack('<I', len(x)) + x for x in xs),
    )
    files = [FILES['RGB.png'], b'bad']
    tensors = [dict(name='text', datatype='BYTES', shape=[2]), dict(name='image', datatype='BYTES', shape=[2])]
    r = infer(Infer(model_name=name, id='7', inputs=tensors, raw_input_contents=[raw(texts), raw(files)]))
    out = dict(zip([o.name for o in r.outputs], r.raw_output_contents))
    assert (
        np.allclose(np.frombuffer(out['text_embedding'], '<f4').reshape(2, 24), emb.encode_text(texts), atol=1e-5)
        and r.id == '7'
    )
    table = np.frombuffer(out['image_embedding'], '<f4').reshape(2, 24)
    assert (
        np.allclose(table[0], emb.encode_image(files[:1])[0], atol=1e-5)
        and not table[1].any()
        and b'invalid' in out['image_status']
    )
    one = infer(
        Infer(
            model_name=name,
            inputs=[tensors[0] | dict(contents=dict(bytes_contents=texts))],
            outputs=[dict(name='text_status')],
        )
    )
    assert [o.name for o in one.outputs] == ['text_status']
    for bad in (
        dict(model_name='other'),
        dict(),
        dict(inputs=[tensors[0]]),
        dict(inputs=[tensors[0] | dict(shape=[3], contents=dict(bytes_contents=texts))]),
        dict(inputs=[tensors[0] | dict(shape=[2**62, 2**62])]),
        dict(inputs=[tensors[0] | dict(datatype='FP32')]),
        dict(inputs=[tensors[0]] * 2, raw_input_contents=[raw(texts)] * 2),
        dict(inputs=[tensors[0]], raw_input_contents=[b'\1\0']),
    ):
        assert code(infer, Infer(**dict(model_name=name) | bad)) in ('INVALID_ARGUMENT', 'NOT_FOUND'), bad


@pytest.mark.parametrize('method', ['ModelReady', 'ModelMetadata', 'ModelConfig', 'ModelStatistics', 'ModelInfer'])
def test_a_version_that_is_not_here_is_refused_as_by_http(channel, http, method):
    [mine] = http.get('/v2/models/stats').json()['model_stats']
    ask, kind = call(channel, method, V2), message(f'inference.{method}Request')
    name, version = ('model_name', 'model_version') if method == 'ModelInfer' else ('name', 'version')
    text = dict(name='text', datatype='BYTES', shape=[1], contents=dict(bytes_contents=[b'a cat']))
    more = dict(inputs=[text]) if method == 'ModelInfer' else {}
    assert code(ask, kind(**{name: mine['name'], version: '7'}, **more)) == 'NOT_FOUND'
    assert http.get(f'/v2/models/{mine["name"]}/versions/7').status_code == 404
    ask(kind(**{name: mine['name'], version: mine['version']}, **more), timeout=HANG)
