"""The files in deploy/ are readable, and speak of metrics, options and paths that the service has."""
import json
import re
from pathlib import Path

import pytest
import yaml

from mmembed.commands.serving import serve
from mmembed.serve.edge import OPEN
from mmembed.serve.observe import STAGES, Metrics

DEPLOY = Path(__file__).resolve().parents[2]/'deploy'


@pytest.fixture(scope='module')
def names():
    "All series of the service."
    return {s.name + e for m in Metrics().registry.collect() for s in [m] for e in ('', '_total', '_bucket', '_sum', '_count')}


@pytest.mark.parametrize('file', ['dashboard.json', 'rules.yml'])
def test_metrics_are_the_services(file, names):
    text = (DEPLOY/file).read_text()
    found = json.loads(text) if file.endswith('json') else yaml.safe_load(text)
    exprs = [t['expr'] for p in found['panels'] for t in p['targets']] if file.endswith('json') else [r['expr'] for g in found['groups'] for r in g['rules']]
    assert len(exprs) > 3
    for e in exprs:
        used = set(re.findall(r'\bmmembed_\w+', e))
        assert used and used <= names, (e, used - names)
        assert set(re.findall(r'stage="(\w+)"', e)) <= set(STAGES)


def test_the_pods_probes_and_options_exist():
    import inspect
    options = {'--' + p.replace('_', '-') for p in inspect.signature(serve).parameters}
    docs = list(yaml.safe_load_all((DEPLOY/'kubernetes'/'mmembed.yml').read_text()))
    [pod] = [d['spec']['template']['spec'] for d in docs if d['kind'] == 'Deployment']
    [c] = pod['containers']
    assert {a for a in c['args'] if a.startswith('--')} <= options
    assert {c[p]['httpGet']['path'] for p in ('startupProbe', 'livenessProbe', 'readinessProbe')} <= set(OPEN)
    grace = int(c['args'][c['args'].index('--grace') + 1]) + int(c['args'][c['args'].index('--drain') + 1])
    assert pod['terminationGracePeriodSeconds'] > grace
    rule = next(d for d in docs if d['kind'] == 'HorizontalPodAutoscaler')['spec']['metrics'][0]['object']['metric']['name']
    assert rule in (DEPLOY/'rules.yml').read_text()
    command = json.loads(re.search(r'^CMD (\[.*\])$', (DEPLOY/'Dockerfile').read_text(), re.M)[1])
    assert {a for a in command if a.startswith('--')} <= options
    for file in ('collector.yml', 'compose.yml', 'prometheus.yml'): assert yaml.safe_load((DEPLOY/file).read_text())
