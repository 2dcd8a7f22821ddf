"""Fuzzes a running service: HTTP by its own description, gRPC and WebSocket by random and mutilated messages.

    python -m benchmarks.fuzz_serve artifacts/quickstart.pt --examples 300 --calls 30000

schemathesis sends what `/openapi.json` allows and what it forbids; every answer must have a status, a content type
and a shape
that stand there, and none may be 500. Every gRPC method, unary and streaming, gets bytes; every call must end with a
status
of `STATED`, every message of a stream must be answered. All the while and afterwards good items get their right
vectors."""
import argparse
import asyncio
import json
import os
import random
from collections import Counter

import grpc
import numpy as np
from google.protobuf.descriptor import FieldDescriptor as F

from mmembed.exporters.verify import samples as cases
from mmembed.serve.client import Client
from mmembed.serve.protobuf import message, methods
from mmembed.serve.service import canary_png

SERVICES = 'mmembed.v1.Embedding', 'inference.GRPCInferenceService'
STATED = {'OK', 'INVALID_ARGUMENT', 'NOT_FOUND', 'FAILED_PRECONDITION', 'RESOURCE_EXHAUSTED', 'DEADLINE_EXCEEDED'}
FILES = [f for f in cases.images().values() if len(f) < 20_000]


def http(url: str, examples: int, seed: int = 0, name: str = '') -> Counter:
    """(operation, status) -> answers; raises where one is not as described.

    `examples`: of each operation, allowed and forbidden."""
    import hypothesis
    import requests
    import schemathesis
    from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance
    schema, seen, session = schemathesis.openapi.from_url(f'{url}/openapi.json'), Counter(), requests.Session()
    for op in (r.ok() for r in schema.get_all_operations()):
        for mode in schemathesis.GenerationMode:
            @hypothesis.seed(seed)
            @hypothesis.settings(
                max_examples=examples,
                deadline=None,
                database=None,
                suppress_health_check=list(hypothesis.HealthCheck),
                phases=[hypothesis.Phase.generate],
            )
            @hypothesis.given(case=op.as_strategy(generation_mode=mode), known=hypothesis.strategies.booleans())
            def one(case, known):
                if named := known and 'name' in case.path_parameters: case.path_parameters['name'] = name
                r = case.call(session=session)
                seen[op.label, r.status_code] += 1
                # the schema cannot say that candidates are of the other kind, or that an image must be one
                without = [positive_data_acceptance]
                # a form's number is a text
                if named or case.media_type not in (None, 'application/json'): without.append(negative_data_rejection)
                case.validate_response(r, excluded_checks=without)
                assert r.status_code != 500, (op.label, case.body)
            try: one()
            except hypothesis.errors.Unsatisfiable: pass  # nothing can be wrong with a request without parameters
    return seen


def filled(kind: type, rng: random.Random, depth: int = 3):
    "A message of `kind` with random fields: often sensible, never checked."
    m = kind()
    chosen = {o.name: rng.choice(o.fields) for o in m.DESCRIPTOR.oneofs}  # of fields that exclude each other
    for f in m.DESCRIPTOR.fields:
        if rng.random() < .3 or f.containing_oneof and chosen[f.containing_oneof.name].name != f.name: continue
        many = f.is_repeated if hasattr(f, 'is_repeated') else f.label == F.LABEL_REPEATED
        if f.message_type and f.message_type.GetOptions().map_entry: continue
        values = [value(f, rng, depth) for _ in range(rng.choice([0, 1, 1, 2, 5]) if many else 1)]
        values = [v for v in values if v is not None]
        if not values: continue
        if many: getattr(m, f.name).extend(values)
        elif f.message_type: getattr(m, f.name).CopyFrom(values[0])
        else: setattr(m, f.name, values[0])
    return m


def value(f, rng, depth):
    if f.message_type: return filled(message(f.message_type.full_name), rng, depth - 1) if depth else None
    if f.cpp_type == F.CPPTYPE_STRING and f.type == F.TYPE_BYTES:
        return rng.choice([rng.choice(FILES), rng.randbytes(rng.randint(0, 200)), b'', 'ä'.encode(), b'\1\0\0\0a'])
    if f.cpp_type == F.CPPTYPE_STRING:
        return rng.choice(
            [
                'a red circle',
                'text',
                'image',
                'BYTES',
                'FP32',
                'quickstart',
                '{}',
                '',
                '\0',
                '一' * 50,
                'x' * 3000,
                "'; drop",
            ]
        )
    if f.cpp_type == F.CPPTYPE_BOOL: return rng.random() < .5
    if f.cpp_type in (F.CPPTYPE_FLOAT, F.CPPTYPE_DOUBLE): return rng.choice([0., -1., 1e30, float('nan')])
    if f.cpp_type == F.CPPTYPE_ENUM: return rng.choice([x.number for x in f.enum_type.values])
    return rng.choice([0, 1, 2, 3, 5, 1001, 2**31 - 1])


def mutilated(data: bytes, rng: random.Random) -> bytes:
    "`data` with some bytes changed, left out, doubled or cut."
    out = bytearray(data)
    for _ in range(rng.choice([0, 0, 1, 2, 6])):
        if not out: return rng.randbytes(rng.randint(0, 80))
        at = rng.randrange(min(len(out), 400))
        match rng.randrange(5):
            case 0: out[at] = rng.randrange(256)
            case 1: del out[at:at + rng.randint(1, 9)]
            case 2: out[at:at] = out[at:at + rng.randint(1, 9)]
            case 3: out[at:at] = rng.randbytes(rng.randint(1, 9))
            case 4: del out[at:]
    return bytes(out)


def _said(answer) -> str: # the status of a message of a stream
    if hasattr(answer, 'error_message'): return answer.error_message.partition(':')[0] or 'OK'
    code = answer.failure.code
    return next(c.name for c in grpc.StatusCode if c.value[0] == code)


def rpc(target: str, calls: int, seed: int = 0, at_once: int = 16, api_key: str = '') -> Counter:
    """(method, status) -> calls; of streams also the messages, each of which was answered.

    Raises for a status that is not stated."""
    seen, left = Counter(), iter(range(calls))
    kinds = [(s, n, m) for s in SERVICES for n, m in methods(s).items()]
    meta = [('x-api-key', api_key)] if api_key else []

    async def one(channel):
        for k in left:
            rng = random.Random(f'{seed} {k}')  # the same messages whatever the order of the answers
            service, name, (kind, answer, many, _) = rng.choice(kinds)
            make = lambda: (
                mutilated(filled(kind, rng).SerializeToString(), rng)
                if rng.random() < 0.9
                else rng.randbytes(rng.randint(0, 80))
            )
            try:
                if many:
                    sent = [make() for _ in range(rng.randint(0, 12))]
                    got = [
                        answer.FromString(a)
                        async for a in channel.stream_stream(f'/{service}/{name}')(
                            iter(sent), timeout=60, metadata=meta
                        )
                    ]
                    assert len(got) == len(sent), f'{name}: {len(sent)} messages, {len(got)} answers'
                    for a in got: seen[f'{name}, messages', _said(a)] += 1
                else:
                    answer.FromString(
                        await channel.unary_unary(f'/{service}/{name}')(make(), timeout=60, metadata=meta)
                    )
                seen[name, 'OK'] += 1
            except grpc.aio.AioRpcError as e: seen[name, e.code().name] += 1

    async def main():
        async with grpc.aio.insecure_channel(target.removeprefix('grpc://')) as channel:
            await asyncio.gather(*[one(channel) for _ in range(at_once)])
    asyncio.run(main())
    wrong = {k: n for k, n in seen.items() if k[1] not in STATED}
    assert not wrong, wrong
    return seen


def websocket(url: str, messages: int, seed: int = 0) -> Counter:
    "Codes of the answers to random messages, of which each has one."
    from websockets.sync.client import connect
    rng, seen = random.Random(seed), Counter()
    bases = [
        json.dumps(x).encode()
        for x in (
            dict(id='q', input=['a', dict(type='image', image='aGk=')], dimensions=2, encoding_format='base64'),
            dict(id=3, input='x'),
            [1],
            None,
        )
    ]
    while messages > 0:
        n = min(messages, rng.randint(1, 30))
        messages -= n
        with connect(url.replace('http', 'ws', 1) + '/v1/stream', open_timeout=60) as ws:
            for _ in range(n):
                data = mutilated(rng.choice(bases), rng)
                ws.send(rng.choice([*FILES, data]) if rng.random() < .2 else data.decode('utf-8', 'replace'))
            for _ in range(n): seen[json.loads(ws.recv(60)).get('error', {}).get('code', 200)] += 1
    assert set(seen) <= {200, 400, 413, 422, 429}, seen
    return seen


def right(client: Client, want: np.ndarray):
    "Good items beside a broken one still get their vectors."
    got = client.encode(['a red circle', b'broken', canary_png()], on_error='flag')
    assert got.ok.tolist() == [True, False, True] and abs(got.embedding[[0, 2]] - want).max() < 1e-5, got


def main():
    from mmembed.serve.engine import Options
    from mmembed.serve.server import running
    from mmembed.serve.service import Config
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('artifact', nargs='?', default='artifacts/quickstart.pt')
    a.add_argument('--examples', type=int, default=100, help='of each HTTP operation, allowed and forbidden')
    a.add_argument('--calls', type=int, default=10_000, help='of gRPC, and messages by WebSocket')
    a.add_argument('--seed', type=int, default=0)
    args = a.parse_args()
    memory = lambda pid: int(next(x for x in open(f'/proc/{pid}/status') if x.startswith('VmRSS')).split()[1]) / 1024
    with running(
        Config(
            args.artifact, port=0, grpc_port=0, log=os.devnull, max_items=64, max_body=2 << 20,
            engine=Options(batch=16, timeout=60),
        )
    ) as s:
        client, by_rpc = Client(s.url), Client(s.grpc)
        want = client.encode(['a red circle', canary_png()])
        model = client._submit(client._again(lambda way: way.ask('/v1/models'))).result()[0]['data'][0]['id']
        for what, go in (
            ('HTTP', lambda: http(s.url, args.examples, args.seed, model)),
            ('gRPC', lambda: rpc(s.grpc, args.calls, args.seed)),
            ('WebSocket', lambda: websocket(s.url, args.calls, args.seed)),
        ):
            before, seen = memory(s.process.pid), go()
            for c in (client, by_rpc): right(c, want)
            by = Counter()
            for k, n in seen.items(): by[k[1] if isinstance(k, tuple) else k] += n
            print(
                f'{what:10} {sum(seen.values()):7,} answers  {dict(sorted(by.items(), key=str))}  {before:.0f} -> '
                f'{memory(s.process.pid):.0f} MiB',
                flush=True,
            )
    assert s.process.returncode == 0


if __name__ == '__main__': main()
