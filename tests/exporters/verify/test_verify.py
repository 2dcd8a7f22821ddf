import copy
import importlib
import inspect
import json
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
import torch.nn.functional as F

import mmembed
from mmembed.core.torchscript import quietly
from mmembed.exporters.verify import samples as cases
from mmembed.exporters.archive import save
from mmembed.exporters.verify.hosts import program
from mmembed.exporters.reference import ANSWERS
from mmembed.exporters.verify.report import Comparison, Report, VerifyError
from mmembed.exporters.export import export
from mmembed.exporters.verify.verify import verify
from mmembed.models.towers import ConvNet
from mmembed.vision.pipeline import VisionPipeline

from tests.helpers import data_path
from tests.exporters import tiny


def quick(path, *args, **kwargs): return verify(path, *args, **{'fresh': False, 'cpp': False} | kwargs)


def test_every_stage_agrees():
    report = verify(
        tiny.artifact(), tiny.model(), texts=['mein Text', b'\xff'], images=[b'no image'], cpp=False
    ).check()
    assert report.ok and not report.failures
    for stage in ('artifact', 'fresh process'):
        rows = {r.what: r for r in report.rows if r.stage == stage}
        assert set(rows) == set(ANSWERS) - {'pair scores', 'class probability'}
        assert rows['token ids'].difference == rows['pixels'].difference == 0
        assert rows['image status'].n == len(cases.images()) + 1
        assert rows['text embedding'].n == 24 * (len(cases.texts()) + 2) * 3
    loader = {r.what: r for r in report.rows if r.stage == 'DataLoader'}
    assert (
        loader['pixels'].n > 30 * 3 * 48 * 48
        and loader['token ids'].n
        and all(r.difference == 0 for r in loader.values())
    )
    assert quick(tiny.artifact(False), tiny.model()).check().ok


def test_without_a_model_the_artifact_is_the_reference():
    report = verify(tiny.artifact(), cpp=False)
    assert report.ok and {r.stage for r in report.rows} == {'card', 'fresh process'}


def altered(tmp_path, change):
    "The artifact with `change` applied to the loaded module, its card as it was."
    module = quietly(torch.jit.load, str(tiny.artifact()))
    with torch.no_grad(): change(module)
    save(module, tmp_path/'altered.pt', module.card())
    return tmp_path/'altered.pt'


def failing(report): return {(r.stage, r.what) for r in report.failures}


def test_an_altered_table_entry_is_found(tmp_path):
    tp, _ = tiny.pipelines()
    token = int(tp(['red']).ids[0, 1])
    def change(m):
        tables = [t for name, t in m.text_pipeline.named_buffers() if name.endswith('.ids') and (t == token).sum() == 1]
        tables[0][tables[0] == token] += 1
    report = quick(altered(tmp_path, change), tiny.model())
    assert failing(report) >= {('card', 'tensors'), ('artifact', 'token ids')}
    assert ('artifact', 'pixels') not in failing(report)
    with pytest.raises(VerifyError, match='altered.pt fails verification: card, tensors'): report.check()


def test_one_altered_weight_is_found(tmp_path):
    def change(m): m.model.net.image_proj.weight[0, 0].add_(0.05)
    report = quick(altered(tmp_path, change), tiny.model())
    assert failing(report) == {
        ('card', 'tensors'),
        ('artifact', 'image embedding'),
        ('artifact', 'raw batch'),
        ('artifact', 'score'),
    }
    def slightly(m): m.model.net.text_proj.weight[0, 0].add_(1e-9 + m.model.net.text_proj.weight[0, 0].abs() * 1e-6)
    assert failing(quick(altered(tmp_path, slightly), tiny.model())) == {('card', 'tensors')}
    assert failing(quick(altered(tmp_path, slightly))) == {('card', 'tensors')}


def test_another_resize_mode_is_found(tmp_path):
    model = tiny.model()
    other = copy.deepcopy(model)
    other.image = ConvNet(VisionPipeline(size=48, resize_mode='squash'), channels=(8, 16), width=32).eval()
    other.image.load_state_dict(model.image.state_dict())
    export(other, tmp_path/'squash.pt', fresh=False, cpp=False)
    assert failing(quick(tmp_path/'squash.pt', model)) == {('card', 'model'), ('DataLoader', 'pixels'),
        *(('artifact', k) for k in ('pixels', 'image embedding', 'raw batch', 'score'))}


def test_another_card_is_found(tmp_path):
    module = quietly(torch.jit.load, str(tiny.artifact()))
    card = json.loads(module.card()) | {'dim': 25}
    save(module, tmp_path/'card.pt', json.dumps(card))
    assert ('card', 'identity card') in failing(quick(tmp_path/'card.pt'))


def rewritten(source, path, changes):
    """A copy of the archive, its checksums in order, with (part of a record's name, old bytes, new bytes) changed in
    the records that hold them."""
    done = set()
    with zipfile.ZipFile(source) as z, zipfile.ZipFile(path, 'w') as out:
        for i in z.infolist():
            data = z.read(i)
            for name, old, new in changes:
                if name in i.filename and old in data: data, _ = data.replace(old, new), done.add((name, old))
            out.writestr(i.filename, data)
    assert len(done) == len(changes)
    return path


def pickled(text): return b'X' + len(text).to_bytes(4, 'little') + text.encode()


def test_changed_code_is_found(tmp_path):
    "A sentence of an error, a number of the code, a record more: all answers are as they were, or nearly."
    for old, new in ((b'must not be negative', b'should not be minus '), (b'def classify', b'def  classify')):
        report = quick(
            rewritten(tiny.artifact(), tmp_path / 'code.pt', [('/code/__torch__/mmembed/exporters/artifact', old, new)])
        )
        assert failing(report) == {('card', 'records')}
    with pytest.raises(
        VerifyError,
        match='code.pt fails verification: card, records: a record of the archive, code or data, was changed after the '
              'export',
    ):
        report.check()
    shutil.copy(tiny.artifact(), tmp_path/'more.pt')
    with zipfile.ZipFile(tmp_path/'more.pt', 'a') as z: z.writestr('archive/code/more.py', 'x = 1')
    assert failing(quick(tmp_path/'more.pt')) == {('card', 'records')}
    assert quick(rewritten(tiny.artifact(), tmp_path/'same.pt', [])).ok


def test_changed_labels_are_found(tmp_path):
    swapped = [('data.pkl', pickled('circle'), pickled('zircle'))]
    assert failing(quick(rewritten(tiny.labelled(), tmp_path / 'x.pt', swapped))) == {
        ('card', 'records'),
        ('card', 'names'),
    }
    both = swapped + [(name, b'"circle"', b'"zircle"') for name in ('data.pkl', 'card.json')]
    assert failing(quick(rewritten(tiny.labelled(), tmp_path / 'x.pt', both))) == {
        ('card', 'records'),
        ('card', 'content hash'),
    }
    names = [(name, b'"match"', b'"patch"') for name in ('data.pkl', 'card.json')]
    assert failing(quick(rewritten(tiny.pair_artifact(), tmp_path / 'x.pt', names))) == {
        ('card', 'records'),
        ('card', 'content hash'),
        ('card', 'names'),
    }


def test_every_entry_of_the_card_is_held(tmp_path):
    "Entries that the content hash leaves out too, changed in both of the card's places."
    for old, new in ((b'"max_pixels": 8', b'"max_pixels": 9'), (b'"torch": "', b'"torch": "9')):
        changes = [(name, old, new) for name in ('data.pkl', 'card.json')]
        if len(old) != len(new): changes = changes[1:]  # a string in a pickle keeps its length
        assert ('card', 'records') in failing(quick(rewritten(tiny.artifact(), tmp_path/'x.pt', changes)))


def test_a_damaged_record_is_named(tmp_path):
    whole = bytearray(tiny.artifact().read_bytes())
    weight = tiny.model().image_proj.weight.detach().numpy().tobytes()
    at = bytes(whole).index(weight)
    whole[at + 2] ^= 64
    (tmp_path/'x.pt').write_bytes(whole)
    report = quick(tmp_path/'x.pt')
    assert {('card', 'records'), ('card', 'tensors')} <= failing(report)
    assert next(r.note for r in report.failures if r.what == 'records').startswith(
        'a record is damaged: Bad CRC-32 for file'
    )


class TwoFaced(torch.nn.Linear):
    "Scripted it answers otherwise than in eager Python: what verification exists for"
    def forward(self, x):
        if torch.jit.is_scripting(): x = x + 0.01
        return F.linear(x, self.weight)


def test_export_leaves_no_file_that_fails(tmp_path):
    model, path = tiny.model(), tmp_path/'deep'/'model.pt'
    export(model, path, fresh=False, cpp=False)
    before = path.read_bytes()
    bad = copy.deepcopy(model)
    bad.text_proj = TwoFaced(32, 24, bias=False).eval()
    for p in (path, tmp_path/'deep'/'new.pt'):
        with pytest.raises(VerifyError, match=f'{p.name} fails verification: artifact, text embedding'):
            export(bad, p, fresh=False, cpp=False)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ['model.pt']


def test_a_host_that_does_not_answer_fails(monkeypatch):
    answers = importlib.import_module('mmembed.exporters.verify.hosts').answers

    def dumb(module, **asked):
        return {k: v for k, v in answers(module, **asked).items() if k not in (('score', 3), ('pixels', 1))}
    want = answers(tiny.model_as_eager(), [], [], [0])
    assert ('text embedding', 0) in want
    monkeypatch.setattr(
        'mmembed.exporters.verify.verify.fresh_answers', lambda path, asked, decode: dumb(tiny.loaded(), **asked)
    )
    report = verify(tiny.artifact(), cpp=False)
    assert failing(report) == {('fresh process', 'pixels'), ('fresh process', 'score')}
    with pytest.raises(VerifyError, match=r'fresh process, pixels: no answer for batches of \[1\]'): report.check()


def test_the_file_is_asked_as_its_hosts_run_it(monkeypatch):
    """Without the executor that recompiles in the first calls, functions left apart.

    Afterwards the process has its own again."""
    module, seen = importlib.import_module('mmembed.exporters.verify.verify'), []
    def noted(asked, **inputs):
        seen.extend([torch._C._jit_set_profiling_mode(False), torch._C._get_graph_executor_optimize()])
        return {}
    monkeypatch.setattr(module, 'answers', noted)
    before, inlined = torch._C._jit_set_profiling_mode(True), torch._C._get_graph_executor_optimize(True)
    try: verify(tiny.artifact(), fresh=False, cpp=False)
    finally: after = torch._C._jit_set_profiling_mode(before), torch._C._get_graph_executor_optimize(inlined)
    assert seen and not any(seen) and all(after)


def test_the_difference_is_the_largest_and_not_the_mean(monkeypatch):
    "One value of one text among thousands of values is off."
    answers = importlib.import_module('mmembed.exporters.verify.hosts').answers
    def nearly(path, asked, decode):
        got = answers(tiny.loaded(), **asked)
        got['text embedding', 64][0][3, 5] += 0.01
        return got
    monkeypatch.setattr('mmembed.exporters.verify.verify.fresh_answers', nearly)
    report = verify(tiny.artifact(), cpp=False)
    row, = report.failures
    assert (row.stage, row.what, row.n) == (
        'fresh process',
        'text embedding',
        24 * 3 * len(cases.texts()),
    ) and row.difference == pytest.approx(0.01, abs=1e-6)


def test_a_value_that_is_not_a_number_is_a_difference(monkeypatch):
    answers = importlib.import_module('mmembed.exporters.verify.hosts').answers
    def broken(path, asked, decode):
        got = answers(tiny.loaded(), **asked)
        got['image embedding', 3][1][0, 7] = float('nan')
        return got
    monkeypatch.setattr('mmembed.exporters.verify.verify.fresh_answers', broken)
    row, = verify(tiny.artifact(), cpp=False).failures
    assert (row.stage, row.what, row.difference) == ('fresh process', 'image embedding', float('inf'))


def test_samples_of_ones_own_are_asked():
    files = [(t, cases.images()['gray.jpg']) for t in ('mine', b'\xffbytes')]
    plain, more = (
        quick(tiny.artifact(), tiny.model()),
        quick(tiny.artifact(), tiny.model(), samples=files, sizes=(0, 5)),
    )
    n = lambda report, what: next(r.n for r in report.rows if (r.stage, r.what) == ('artifact', what))
    assert n(more, 'image status') == n(plain, 'image status') + 2
    assert n(more, 'text embedding') * 3 == (n(plain, 'text embedding') + 2 * 3 * 24)


def test_wrong_calls(tmp_path):
    with pytest.raises(ValueError, match='is a folder'): export(tiny.model(), tmp_path)
    with pytest.raises(TypeError, match='has no text_pipeline'): export(torch.nn.Linear(1, 1), tmp_path/'x.pt')
    with pytest.raises(FileNotFoundError, match='x.pt not found'): verify(tmp_path/'x.pt')
    (tmp_path/'x.pt').write_bytes(tiny.artifact().read_bytes()[:-100])
    with pytest.raises(ValueError, match='is truncated'): verify(tmp_path/'x.pt')


def test_the_fresh_process_knows_no_mmembed():
    head = program().split('import importlib')[0]
    run = subprocess.run(
        [sys.executable, '-I', '-c', head + 'import mmembed.core.types'], capture_output=True, text=True
    )
    assert run.returncode and 'ModuleNotFoundError' in run.stderr


def test_a_fresh_process_that_dies_is_a_failing_stage(monkeypatch):
    monkeypatch.setattr(
        importlib.import_module('mmembed.exporters.verify.hosts'),
        'program',
        lambda: 'import sys; sys.exit("no such luck")',
    )
    report = verify(tiny.artifact(), cpp=False)
    assert failing(report) == {('fresh process', 'runs')} and report.failures[0].note == 'no such luck'
    with pytest.raises(VerifyError, match='fresh process, runs: no such luck'): report.check()


def test_report_in_three_forms():
    report = quick(tiny.artifact(), tiny.model())
    said = json.loads(report.to_json())
    assert (
        said['ok'] is True
        and said['short_hash'] in str(report)
        and 'verified' in str(report)
        and len(said['rows']) == len(report.rows)
    )
    assert said['not_run'] == ['fresh process: not asked for (fresh=False)', 'c++: not asked for (cpp=False)']
    assert 'not compared: c++' in str(report) and 'not compared: c++' in report._repr_html_()
    rows = {tuple(line.split()) for line in str(report).splitlines()}
    assert ('host', 'compared', 'values', 'difference', 'allowed') in rows
    assert ('card', 'names', '1', 'none', 'none', 'ok') in rows  # and not 0e+00
    bad = Report(
        report.path, report.card, [*report.rows, Comparison('c++', 'pixels', 0, float('inf'), 0.0, 'shape <1>')], 1.0
    )
    assert not bad.ok and 'FAILED: shape <1>' in str(bad) and 'FAILED: shape &lt;1&gt;' in bad._repr_html_()
    assert json.loads(bad.to_json())['rows'][-1]['difference'] is None


def test_export_is_a_function_that_shows_its_options(tmp_path):
    assert inspect.isfunction(mmembed.export)
    assert {'precision', 'labels', 'onnx', 'graphs'} <= set(inspect.signature(mmembed.export).parameters)
    report = mmembed.export(tiny.model(), tmp_path/'model.pt', fresh=False, cpp=False)
    assert report.path == tmp_path/'model.pt' and report.ok


def test_real_files_and_texts():
    "Every awkward file of three decoders' own test suites, and every text of the corpora, in all hosts that are there."
    files = [p for p in sorted(data_path('images').rglob('*')) if p.is_file() and p.suffix != '.json']
    texts = json.loads(data_path('text', 'naughty_strings.json').read_text())
    for corpus in sorted(data_path('text').glob('ud_*.txt')): texts += corpus.read_text().splitlines()[:100]
    report = verify(tiny.artifact(), tiny.model(), texts, [p.read_bytes() for p in files],
                    sizes=(0, 64)).check()
    status = next(r for r in report.rows if r.what == 'image status')
    assert status.n == len(files) + len(cases.images()) and len(files) > 300


def test_an_older_file_is_checked_as_far_as_it_goes(tmp_path):
    "As a file exported before labels were known and records hashed: neither method nor entry is there."
    old = rewritten(
        tiny.artifact(),
        tmp_path / 'old.pt',
        [
            ('/code/__torch__/mmembed/exporters/artifact', b'def labels(', b'def labelz('),
            *((name, b'"records_sha256"', b'"records_sha25_"') for name in ('data.pkl', 'card.json')),
        ],
    )
    report = verify(old, tiny.model(), cpp=False).check()
    assert {'artifact', 'fresh process'} <= {r.stage for r in report.rows} and 'records' not in {
        r.what for r in report.rows
    }
    assert {
        'card: the records of the archive; this file is older than their hash',
        'card: class names; this file is older than labels',
    } <= set(report.notes)
    assert 'not compared: card: class names; this file is older than labels' in str(report)
