"How many copies of a model's weights there are: in an export, in the file, and in a process that has loaded it."
import gc
import importlib
import pickle
import subprocess
import sys
import weakref
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from mmembed.core.torchscript import quietly
from mmembed.exporters.verify import samples as cases
from mmembed.exporters.archive import save, storage_bytes
from mmembed.exporters.assemble import assemble
from mmembed.exporters.int8 import Int8Embedding, int8_linear, with_linear_attention
from mmembed.exporters.variants import Variant, prepared
from mmembed.runtime.artifact import prepack, read_card, records_hash, records_of
from mmembed.runtime.aot import mapped, opened
from mmembed.runtime.embedder import load

from tests.helpers import needs_exact_int8
from tests.exporters import tiny


def towers(artifact): return storage_bytes(artifact.model)


def block():
    "A block that attends with torch's own module, as open_clip's and torchvision's do."
    from torchvision.models.vision_transformer import EncoderBlock
    return EncoderBlock(2, 32, 64, 0., 0.).eval()


def test_an_export_has_the_weights_of_the_model_and_no_copies():
    model = tiny.model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    own, shared, copied = storage_bytes(model), towers(assemble(model, share=True)), towers(assemble(model))
    new = sum(n for at, n in shared.items() if at not in own)
    assert new < .1 * sum(shared.values()) and not own.keys() & copied.keys()
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize('v', [Variant(precision='bf16'), Variant(quantize='int8'), Variant(attention='math')], ids=str)
def test_a_variant_of_shared_weights_leaves_the_model_as_it_is(v):
    if v.quantize: needs_exact_int8()
    model = tiny.model()
    before = {k: (x, x.clone(), x.data_ptr()) for k, x in model.state_dict().items()}
    prepared(model, v, kernels=True, share=True)
    for k, x in model.state_dict().items():
        _, value, at = before[k]
        assert x.dtype == value.dtype and x.data_ptr() == at and torch.equal(x, value), k


def test_attention_made_of_linear_layers_shares_its_weights():
    tower = nn.Sequential(block()).requires_grad_(False)
    own, x = storage_bytes(tower), torch.randn(3, 5, 32)
    want = tower(x)
    found = with_linear_attention(tower)
    assert torch.allclose(found(x), want, atol=1e-5)
    assert storage_bytes(found).keys() <= own.keys() and not any(p.requires_grad for p in found.parameters())


def test_layers_that_are_packed_give_up_what_they_were_packed_from():
    loaded = opened(tiny.artifact(), read_card(tiny.artifact()))
    for p in loaded.parameters(): p.requires_grad_(True)  # as a file of before has its attention
    layers = [m for m in loaded.modules() if hasattr(m, 'pack')]
    held = [StorageWeakRef(m.weight.untyped_storage()) for m in layers]
    assert held and not any(r.expired() for r in held)
    if not prepack(loaded): pytest.skip('this torch has no oneDNN')
    gc.collect()
    assert all(m.packed.numel() for m in layers) and all(r.expired() for r in held)


def test_functions_are_prepared_once_and_not_in_every_caller(tmp_path):
    "What calls of every kind add to a process. Written out in each caller, they added 131 MB."
    if sys.platform != 'linux': pytest.skip('sizes of a process are read from /proc')
    program = '''
import re, sys, torch
from pathlib import Path
import mmembed as mm
from mmembed.core.threads import give_back
def held():
    give_back()
    return int(re.search(r'RssAnon:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) / 1024
torch.set_num_threads(1)
e, picture = mm.load(sys.argv[1]), Path(sys.argv[2]).read_bytes()
before = held()
e.encode_text(['a red boat']), e.probe(picture), e.count_pixels(picture), e.encode_image([picture])
print(held() - before, torch._C._get_graph_executor_optimize())
'''
    picture = tmp_path/'a.jpg'
    picture.write_bytes(cases.images()['quality 75.jpg'])
    command = [sys.executable, '-W', 'ignore', '-c', program, tiny.artifact(), picture]
    run = subprocess.run(command, capture_output=True, text=True)
    grown, switched = run.stdout.split()
    assert run.returncode == 0 and float(grown) < 30 and switched == 'True', run


def mapped_at(path):
    "Where pages of the file lie in this process."
    rows = [r.split() for r in Path('/proc/self/maps').read_text().splitlines() if r.endswith(str(path))]
    return [range(*(int(x, 16) for x in r[0].split('-'))) for r in rows]


@pytest.mark.parametrize('made', [tiny.artifact, tiny.portable, tiny.pair_artifact])
def test_weights_stay_in_the_file(made):
    if sys.platform != 'linux': pytest.skip('mappings are read from /proc')
    path, images = made().resolve(), [cases.images()['quality 75.jpg']]
    e, want = load(path, mmap=True), load(path)
    at, held = mapped_at(path), storage_bytes(e.module)
    inside = sum(n for place, n in held.items() if any(place in m for m in at))
    assert inside == sum(held.values()) > 0
    if e.pairs: assert torch.equal(e.score_pairs(['a red circle'], images), want.score_pairs(['a red circle'], images))
    else:
        assert torch.equal(e.encode_text(['a red circle', '']), want.encode_text(['a red circle', '']))
        assert torch.equal(e.encode_image(images), want.encode_image(images))
    assert e.given['mmap'] and torch.equal(e.tokenize(['x']).ids, pickle.loads(pickle.dumps(e)).tokenize(['x']).ids)
    del e
    gc.collect()
    assert not mapped_at(path)


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
def test_constants_of_a_file_are_not_taken_for_its_weights(tmp_path):
    "Both folders of an archive count from 0."
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.full((3,), 2.))
        def forward(self, x): return x * self.weight + torch.tensor([5., 6., 7.])
    traced = quietly(torch.jit.trace, Shifted(), torch.ones(3))
    quietly(torch.jit.save, traced, str(tmp_path/'m.pt'))
    names = [n for n, _ in records_of(tmp_path/'m.pt')]
    assert 'data/0' in names and 'constants/0' in names
    assert torch.equal(quietly(mapped, tmp_path/'m.pt')(torch.ones(3)), torch.tensor([7., 8., 9.]))


def test_verification_has_the_weights_once(monkeypatch):
    "What the file holds is the model's own, where it is equal; what is not is the file's, and is told."
    module, model, held = importlib.import_module('mmembed.exporters.verify.verify'), tiny.model(), []
    real = module.opened
    def watched(*args, **kwargs):
        found = real(*args, **kwargs)
        held.append(storage_bytes(found))
        return found
    monkeypatch.setattr(module, 'opened', watched)
    assert module.verify(tiny.artifact(), model, fresh=False, cpp=False).ok
    own = storage_bytes(model)
    assert sum(n for at, n in held[0].items() if at in own) > .9 * sum(own.values())
    report = module.verify(tiny.other(), model, fresh=False, cpp=False)
    assert not report.ok and 'model' in {r.what for r in report.failures}


def test_an_int8_table_is_a_quarter_and_near():
    torch.manual_seed(0)
    class Texts(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places = nn.Embedding(3000, 64), nn.Embedding(16, 64)
            self.capped = nn.Embedding(3000, 64, max_norm=1.)
            self.out = nn.Linear(64, 8)
        def forward(self, ids): return self.out(self.words(ids) + self.places(ids % 16))
    tower, ids = Texts().eval().requires_grad_(False), torch.randint(3000, (4, 7))
    words, capped, whole = tower.words, tower.capped, sum(storage_bytes(tower.words).values())
    assert int8_linear(tower, ids) == 1
    assert isinstance(tower.words, Int8Embedding) and type(tower.places) is nn.Embedding and tower.capped is capped
    assert sum(storage_bytes(tower.words).values()) < .27 * whole
    assert nn.functional.cosine_similarity(tower.words(ids), words(ids), dim=-1).min() > .9999
    scripted = quietly(torch.jit.script, tower.words)
    assert torch.equal(scripted(ids), tower.words(ids)) and scripted(ids[:0]).shape == (0, 7, 64)
    words.weight[5] = 0
    assert not Int8Embedding(words)(torch.tensor([5])).any()


def test_a_file_is_written_without_a_copy_in_memory(tmp_path):
    "A module of 128 MB: the peak of its process while it is saved, over what it had before."
    if sys.platform != 'linux': pytest.skip('sizes of a process are read from /proc')
    program = '''
import re, sys, torch
from pathlib import Path
from mmembed.core.torchscript import quietly
from mmembed.exporters.archive import save
def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) / 1024
scripted = quietly(torch.jit.script, torch.nn.ModuleList([torch.nn.Linear(1024, 1024) for _ in range(32)]))
before = peak()
save(scripted, sys.argv[1], '{}')
print(peak() - before)
'''
    command = [sys.executable, '-W', 'ignore', '-c', program, tmp_path/'m.pt']
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0 and float(run.stdout) < 32, run
    assert [p.name for p in tmp_path.iterdir()] == ['m.pt'] and (tmp_path/'m.pt').stat().st_size > 128 << 20


@pytest.mark.parametrize('limit', [1000, 2_000_000])
def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path, limit):
    program = '''
import resource, sys, torch
from mmembed.core.torchscript import quietly
from mmembed.exporters.archive import save
scripted = quietly(torch.jit.script, torch.nn.Linear(1024, 1024))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try: save(scripted, sys.argv[1], '{}')
except OSError as e: print(e.strerror, e.filename == sys.argv[1])
'''
    command = [sys.executable, '-W', 'ignore', '-c', program, tmp_path/'m.pt', str(limit)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == 'File too large True\n', run
    assert not [p for p in tmp_path.iterdir() if p.stat().st_size]


def test_what_torchs_writer_cannot_write_is_an_error_afterwards(tmp_path):
    "Its first pass had room; the disk fills during the second."
    module = importlib.import_module('mmembed.exporters.archive')
    scripted = quietly(torch.jit.script, nn.Linear(512, 512))
    class Full:
        def __init__(self, file): self.file, self.left = file, 200_000
        def write(self, data):
            self.left -= len(data)
            if self.left < 0: raise OSError(28, 'No space left on device')
            self.file.write(data)
        def flush(self): self.file.flush()
    real = module._Out.__init__
    with pytest.MonkeyPatch.context() as m:
        m.setattr(module._Out, '__init__', lambda self, file: real(self, Full(file)))
        with pytest.raises(OSError, match='No space left on device'): save(scripted, tmp_path/'m.pt', '{}')
    assert not (tmp_path/'m.pt.rough').exists()


def test_an_error_of_ours_while_torch_writes_is_that_error(tmp_path, monkeypatch):
    """torch's writer ends its archive as it goes.

    The file is closed by then, and an exception there would end the process."""
    module = importlib.import_module('mmembed.exporters.archive')
    real = module.records_of
    def cut_off(*args, **kwargs):
        for i, record in enumerate(real(*args, **kwargs)):
            if i == 3: raise zipfile.BadZipFile('cut off')
            yield record
    monkeypatch.setattr(module, 'records_of', cut_off)
    with pytest.raises(zipfile.BadZipFile, match='cut off'):
        save(quietly(torch.jit.script, nn.Linear(512, 512)), tmp_path/'m.pt', '{}')
    assert not (tmp_path/'m.pt.rough').exists()


def test_records_in_one_buffer_are_those_of_the_archive(tmp_path):
    path = tmp_path/'m.pt'
    save(quietly(torch.jit.script, nn.Sequential(nn.Linear(700, 700), nn.Linear(700, 3))), path, '{}')
    want = dict(records_of(path))
    assert {name: bytes(record) for name, record in records_of(path, reuse=True)} == want and max(
        map(len, want.values())
    ) > 1 << 20
    assert records_hash(records_of(path, reuse=True)) == records_hash(want.items())
    data = bytearray(path.read_bytes())
    data[data.index(want['data/0' if 'data/0' in want else 'constants/0'][:64]) + 7] ^= 1
    (tmp_path/'n.pt').write_bytes(data)
    with pytest.raises(zipfile.BadZipFile): list(records_of(tmp_path/'n.pt', reuse=True))


def test_the_artifact_is_let_go_before_another_process_loads_it(monkeypatch):
    module, held = importlib.import_module('mmembed.exporters.verify.verify'), []
    real_opened, real_fresh = module.opened, module.fresh_answers
    def watched(*args, **kwargs):
        found = real_opened(*args, **kwargs)
        held.append(weakref.ref(found))
        return found
    def asked(*args, **kwargs):
        gc.collect()
        assert held and not any(r() for r in held)
        held.append(None)
        return real_fresh(*args, **kwargs)
    monkeypatch.setattr(module, 'opened', watched)
    monkeypatch.setattr(module, 'fresh_answers', asked)
    assert module.verify(tiny.artifact(), tiny.model(), cpp=False).ok and held[-1] is None
