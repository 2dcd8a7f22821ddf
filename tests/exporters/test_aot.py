"AOTInductor packages: one tiny model compiled once, asked by everything that opens an artifact."
import copy
import functools
import logging
import os
import random
import shutil
import struct
import sys
import zipfile
from unittest.mock import patch

import pytest
import torch

from mmembed.core.packing import as_bytes, pack
from mmembed.exporters import aot as compiled
from mmembed.exporters.verify import cpp as host
from mmembed.exporters.assemble import assemble
from mmembed.exporters.card import make_card
from mmembed.exporters.variants import DTYPES, SAME, Variant
from mmembed.exporters.int8 import Int8Linear, exact_products, int8_steps
from mmembed.exporters.verify.report import VerifyError
from mmembed.exporters.export import export
from mmembed.exporters.verify.verify import verify
from mmembed.runtime.artifact import computes, read_card
from mmembed.runtime.aot import opened
from mmembed.runtime.embedder import load

from tests.helpers import built_once
from tests.exporters import tiny

logging.getLogger('torch.__trace').setLevel(logging.ERROR)  # or pytest keeps every size that the tracer thinks about
pytestmark = pytest.mark.skipif(bool(compiled.why_no_compiler()), reason=compiled.why_no_compiler())


@functools.cache
def package():
    def build(path):
        compiled.save_package(
            assemble(tiny.model(), script=False), path, make_card(tiny.model(), 24), options=compiled.QUICK
        )
    return built_once('tiny.pt2', build)


def test_every_host_answers_as_the_model():
    report = verify(package(), tiny.model(), cpp=host.build_host() if not host.why_no_host() else False).check()
    rows = {(r.stage, r.what): r for r in report.rows}
    for stage in ('compiled', 'fresh process', *(() if host.why_no_host() else ('c++',))):
        assert (
            rows[stage, 'token ids'].n > 1000
            and rows[stage, 'pixels'].n > 10000
            and rows[stage, 'text embedding'].n > 1000
        )
        assert (
            rows[stage, 'token ids'].difference
            == rows[stage, 'pixels'].difference
            == rows[stage, 'image status'].difference
            == 0
        )


@pytest.mark.skipif(sys.platform != 'linux', reason='ELF is the format of Linux')
def test_no_program_asks_for_an_executable_stack():
    "glibc from 2.41 on does not load a library that does (Debian 13, Ubuntu 25.04, Python 3.14's Debian)."
    asked = {}
    with zipfile.ZipFile(package()) as z:
        for name in (n for n in z.namelist() if n.endswith('.so')):
            library = z.read(name)
            start, (size, count) = struct.unpack_from('<Q', library, 32)[0], struct.unpack_from('<HH', library, 54)
            heads = [struct.unpack_from('<II', library, start + i * size) for i in range(count)]
            asked[name.split('/')[-2]] = [flags & 1 for kind, flags in heads if kind == 0x6474e551]
    assert len(asked) == 4 and all(flags == [0] for flags in asked.values()), asked


def test_who_tokenizes():
    """A few known words are one quick program's, other short texts the whole tokenizer's, many texts the scripted
    one's: ids are the model's either way."""
    tp, m, asked = tiny.model().text_pipeline, load(package()).module, []
    run = m._run
    m._run = lambda name, *inputs: asked.append(name) or run(name, *inputs)
    rng, words = random.Random(0), 'a red blue circle square above Café . , \' é 一个 zz  \t'.split(' ')
    few = [
        [
            ' '.join(rng.choice(words[:6] if rng.random() < 0.7 else words) for _ in range(rng.randrange(20)))
            for _ in range(rng.choice([1, 2, 5]))
        ]
        for _ in range(200)
    ]
    cases = {
        ('known',): [['a red circle'], ['a red circle', 'a blue square', ''], ['a ' * 40]],
        ('known', 'tokenize'): [['Café'], ['a red zz', 'a'], ['\x00']],
        ('tokenize',): [['a red circle ' * 50]],
        (): [['a red circle'] * 200, ['a red zz', 'Café'] * 200],
    }
    for expected, batches in [*cases.items(), (None, few)]:
        for texts in batches:
            asked.clear()
            assert all(map(torch.equal, m.tokenize(*pack(texts)), tp(texts))) and (
                expected is None or tuple(asked) == expected
            ), (texts[:3], asked)


def test_int8_in_the_exported_graph():
    "`quantize='int8'` of a package: the products of the torch.export graph are int8 by int8."
    artifact = assemble(tiny.pair_model(), variant=Variant(quantize='int8'), script=False)
    if int8_steps() or not exact_products():  # no kernel here
        with pytest.raises(ValueError, match='torch._int_mm, which has no kernel on this processor'):
            compiled.programs(artifact)
        return
    with patch.object(compiled, 'export_program', lambda tp: None), patch.object(compiled, 'unsized', lambda p: p):
        made = compiled.programs(artifact)
    count = [str(n.target) for n in made['pair'].graph.nodes].count('aten._int_mm.default')
    assert (
        list(made) == ['tokenize', 'known', 'pair']
        and count == sum(isinstance(m, Int8Linear) for m in artifact.modules()) > 8
    )


def dtypes(artifact):
    return {
        x.dtype
        for tower in (artifact.model.net.text, artifact.model.net.image)
        for x in [*tower.parameters(), *tower.buffers()]
        if x.is_floating_point()
    }


@pytest.mark.parametrize('cpu', ['', 'AVX2'])
def test_a_package_is_not_compiled_for_what_would_be_emulated(cpu, tmp_path):
    "bf16 for AVX2, or where the processor has no such instructions, becomes a program in float32; the card says so."
    class Enough(Exception): pass
    def seen(artifact): raise Enough(dtypes(artifact))

    with (
        patch.object(compiled, 'programs', seen),
        patch.object(compiled, 'multiplies', lambda kind: kind == 'fp32' or bool(cpu)),
    ):
        card = make_card(tiny.model(), 24, variant={'precision': 'bf16'})
        with pytest.raises(Enough) as found:
            compiled.save_package(
                assemble(tiny.model(), variant=Variant('bf16'), script=False), tmp_path / 'm.pt2', card, cpu
            )
    assert found.value.args == ({torch.float32},)
    with patch.object(compiled, 'multiplies', lambda kind: True):
        assert [compiled.computed_in('bf16', c) for c in ('', 'AVX512', 'AVX2')] == ['bf16', 'bf16', 'fp32']
    with patch.object(compiled, 'multiplies', lambda kind: kind == 'fp32'):
        assert [compiled.computed_in(k) for k in ('fp32', 'bf16', 'fp16')] == ['fp32'] * 3


@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_towers_in_float32_answer_as_those_of_half_precision(precision):
    artifact = assemble(tiny.model(), variant=Variant(precision), script=False)
    tokens, pixels = artifact.text_pipeline(['a small red circle', 'x']), torch.rand(2, 3, 48, 48)
    def ask():
        with torch.no_grad(): return artifact.model.encode_text(tokens), artifact.model.encode_image(pixels)
    assert dtypes(artifact) == {DTYPES[precision]}
    before = ask()
    compiled.widened_towers(artifact.model)
    assert dtypes(artifact) == {torch.float32}
    for a, b in zip(before, ask()): torch.testing.assert_close(a, b, atol=SAME[precision], rtol=0)


def test_a_package_that_would_be_emulated_is_refused():
    card = read_card(package())
    other = card | {'compiled': card['compiled'] | {'multiplies': 'bf16'}, 'variant': {'precision': 'bf16'}}
    assert card['compiled']['multiplies'] == 'fp32' and load(package()).computes == 'fp32'
    with patch('mmembed.runtime.aot.multiplies', lambda kind: kind == 'fp32'):
        with pytest.raises(
            ValueError,
            match=r'was compiled to multiply in bf16, which this processor \(\w+\) would emulate: export it here, or '
                  r'take the .pt',
        ):
            opened(package(), other)
        old = other | {'compiled': {k: v for k, v in other['compiled'].items() if k != 'multiplies'}}
        with pytest.raises(ValueError, match='was compiled to multiply in bf16'): opened(package(), old)
        opened(package(), card | {'variant': {'precision': 'bf16'}})  # of half precision, compiled in float32
    assert (
        computes(card | {'variant': {'precision': 'bf16'}})
        == 'fp32: compiled for a processor that does not multiply bf16'
    )


def altered(path, program, old, new):
    "A copy of the package in whose library of `program` the bytes of the tensor `old` are those of `new`."
    done = 0
    with zipfile.ZipFile(package()) as z, zipfile.ZipFile(path, 'w') as out:
        for i in z.infolist():
            data = z.read(i)
            if f'/{program}/' in i.filename and i.filename.endswith('.so'):
                done += data.count(raw(old))
                data = data.replace(raw(old), raw(new))
            out.writestr(i.filename, data)
    assert done == 1
    return path


def raw(t): return t.detach().contiguous().numpy().tobytes()


def failing(report): return {(r.stage, r.what) for r in report.failures}


def test_what_is_altered_fails_and_is_named(tmp_path):
    model = copy.deepcopy(tiny.model())  # its pipelines are everyone's
    weight = model.text.embed.weight
    other = weight.detach().clone()
    other[model.text_pipeline(['a']).ids[0, 0], 0] += 1
    found = failing(verify(altered(tmp_path/'weight.pt2', 'text', weight, other), model, fresh=False, cpp=False))
    assert {('card', 'programs'), ('card', 'records'), ('compiled', 'text embedding')} <= found and (
        'compiled',
        'image embedding',
    ) not in found
    table = model.text_pipeline.model.ids
    found = failing(verify(altered(tmp_path/'table.pt2', 'tokenize', table, table + 1), model, fresh=False, cpp=False))
    assert {('card', 'programs'), ('compiled', 'token ids')} <= found and ('compiled', 'image embedding') not in found
    model.vision_pipeline.interpolation = 'bilinear'
    assert ('compiled', 'pixels') in failing(verify(package(), model, fresh=False, cpp=False))
    found = failing(verify(package(), tiny.model(seed=1), fresh=False, cpp=False))
    assert {('card', 'model'), ('compiled', 'text embedding'), ('compiled', 'image embedding')} <= found


def test_export_leaves_no_package_that_fails(tmp_path):
    def save(artifact, path, card, cpu): shutil.copy(package(), path)
    with patch('mmembed.exporters.export.save_package', save):
        assert export(tiny.model(), tmp_path / 'm.pt2', fresh=False, cpp=False).ok and [
            p.name for p in tmp_path.iterdir()
        ] == ['m.pt2']
        with pytest.raises(VerifyError, match='n.pt2 fails verification: card, model'):
            export(tiny.model(seed=1), tmp_path / 'n.pt2', fresh=False, cpp=False)
    assert [p.name for p in tmp_path.iterdir()] == ['m.pt2']


def test_the_embedder_takes_either_file():
    from mmembed.exporters.verify import samples as cases
    fast, slow, images = load(package()), load(tiny.artifact()), [as_bytes(b) for b in cases.images().values()]
    a, b = (e.encode_image(images, on_error='flag') for e in (fast, slow))
    assert a.errors == b.errors and 0 < a.ok.sum() < len(images) and torch.allclose(a.embedding, b.embedding, atol=1e-5)
    assert torch.allclose(fast.encode_text(cases.texts()), slow.encode_text(cases.texts()), atol=1e-5)
    even = load(package(), batch_size=4, deterministic=True)
    x = even.encode_text(['a small red circle', 'b', 'c'])
    assert torch.equal(x[:1], even.encode_text(['a small red circle'])) and even.encode_text([]).shape == (0, 24)
    assert fast.card['content_hash'] == slow.card['content_hash'] and fast.profile(['a'], images[:1], repeats=1)


def test_a_package_names_no_folder_of_this_machine():
    with zipfile.ZipFile(package()) as z: whole = b''.join(z.read(n) for n in z.namelist())
    for folder in (os.path.dirname(os.path.dirname(torch.__file__)), os.path.expanduser('~') + '/', '/tmp/tmp'):
        assert folder.encode() not in whole


def test_what_cannot_be_compiled_or_loaded(tmp_path):
    with patch('shutil.which', lambda *a, **k: None), patch.dict(os.environ):
        os.environ.pop('CXX', None)
        with pytest.raises(RuntimeError, match=r'a compiled package needs a C\+\+ compiler: apt install g\+\+'):
            export(tiny.model(), tmp_path / 'x.pt2')
    with pytest.raises(ValueError, match="cpu must be AVX2 or AVX512, got '486'"):
        export(tiny.model(), tmp_path / 'x.pt2', cpu='486')
    with pytest.raises(ValueError, match='deterministic'): export(tiny.model(), tmp_path/'x.pt2', deterministic=4)
    with pytest.raises(ValueError, match='compiled for the CPU, not for cuda'):
        opened(package(), read_card(package()), torch.device('cuda'))
    assert not list(tmp_path.iterdir()) and read_card(package())['compiled']['system'] == 'linux'


def test_a_path_that_is_not_utf8_is_refused_before_anything_is_compiled(tmp_path):
    path = tmp_path/os.fsdecode(b'caf\xe9.pt2')
    with patch.object(compiled, 'programs', side_effect=AssertionError('compiled')):
        with pytest.raises(
            ValueError, match=r"'\S+/caf\\udce9.pt2': torch writes a package only where the path is UTF-8"
        ):
            compiled.save_package(assemble(tiny.model(), script=False), path, make_card(tiny.model(), 24))
        with pytest.raises(
            ValueError, match=r"'\S+/caf\\udce9.pt2': torch writes a package only where the path is UTF-8"
        ):
            export(tiny.model(), path, fresh=False, cpp=False)
        (folder := tmp_path/os.fsdecode(b'in\xff')).mkdir()
        with pytest.raises(ValueError, match=r"in\\udcff/m.pt2': torch writes"):
            export(tiny.model(), folder / 'm.pt2', fresh=False, cpp=False)
    assert sorted(p.name for p in tmp_path.rglob('*')) == [folder.name]
