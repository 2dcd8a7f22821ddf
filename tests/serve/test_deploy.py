"""The files in deploy/ are read by the tools that they are written for, and speak of metrics, options and paths that the service has."""
import json
import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import httpx2
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


def run(*command, **kw):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=300, **kw)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return done.stdout


def test_kubernetes_manifests_fit_the_schemas():
    validate = pytest.importorskip('kubernetes_validate').validate
    docs = [d for f in (DEPLOY/'kubernetes').glob('*.yml') for d in yaml.safe_load_all(f.read_text())]
    assert {d['kind'] for d in docs} >= {'Deployment', 'Service', 'HorizontalPodAutoscaler', 'PodDisruptionBudget'}
    for d in docs: validate(d, '1.33', strict=True)
    wrong = next(d for d in docs if d['kind'] == 'Deployment')
    wrong['spec']['template']['spec']['containers'][0]['readinessprobe'] = {}
    with pytest.raises(Exception, match='readinessprobe'): validate(wrong, '1.33', strict=True)


def test_the_container_file_copies_what_is_there():
    parse = pytest.importorskip('dockerfile_parse').DockerfileParser
    steps = parse(str(DEPLOY/'Dockerfile')).structure
    names = [s['instruction'] for s in steps if s['instruction'] != 'COMMENT']
    assert names[:1] == ['FROM'] and {'USER', 'HEALTHCHECK', 'ENTRYPOINT', 'CMD'} <= set(names) and names.index('USER') < names.index('ENTRYPOINT')
    root, copied = DEPLOY.parent, [w for s in steps if s['instruction'] == 'COPY' for w in s['value'].split()[:-1]]
    assert len(copied) > 4 and all((root/c).exists() for c in copied), copied
    [install] = [s['value'] for s in steps if s['instruction'] == 'RUN' and 'pip install' in s['value']]
    assert '[serve]' in install and 'constraints.txt' in install


def test_terraform_refers_to_what_it_declares():
    "Without terraform: every `kind.name` that is used is declared."
    text = (DEPLOY/'terraform'/'main.tf').read_text()
    found = pytest.importorskip('hcl2').loads(text)
    plain = lambda x: x.strip('"')
    declared = {f'{prefix}{plain(kind)}.{plain(name)}' for key, prefix in (('resource', ''), ('data', 'data.')) for block in found[key] for kind, named in block.items() for name in named}
    declared |= {f'var.{plain(v)}' for block in found['variable'] for v in block}
    used = set(re.findall(r'(?<![\w.])((?:data\.)?aws_\w+\.\w+|var\.\w+)', re.sub(r'"(aws_\w+)" "(\w+)"', '', text)))
    assert len(used) > 10 and used <= declared, used - declared


def test_terraform_accepts_it(tmp_path):
    "The real one, with the real schema of AWS."
    if not shutil.which('terraform') or not os.environ.get('TF_PLUGIN_DIR'): pytest.skip('needs terraform, and TF_PLUGIN_DIR with its AWS provider')
    shutil.copy(DEPLOY/'terraform'/'main.tf', tmp_path)
    env = {k: v for k, v in os.environ.items() if k != 'TF_CLI_CONFIG_FILE'}
    run('terraform', f'-chdir={tmp_path}', 'init', f'-plugin-dir={os.environ["TF_PLUGIN_DIR"]}', '-input=false', env=env)
    assert 'configuration is valid' in run('terraform', f'-chdir={tmp_path}', 'validate', '-no-color', env=env)
    run('terraform', 'fmt', '-check', tmp_path/'main.tf', env=env)


def test_the_collectors_pipelines_are_made_of_what_is_configured():
    c = yaml.safe_load((DEPLOY/'collector.yml').read_text())
    for line in c['service']['pipelines'].values():
        for part in ('receivers', 'processors', 'exporters'): assert line[part] and set(line[part]) <= set(c[part])
    compose = yaml.safe_load((DEPLOY/'compose.yml').read_text())['services']
    mounted = [v.split(':')[0] for s in compose.values() for v in s.get('volumes', []) if not v.startswith('../model.pt')]
    assert len(mounted) > 2 and all((DEPLOY/m).exists() for m in mounted)
    assert f':{urlport(c["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"])}' in ' '.join(compose['mmembed']['command'])
    assert c['exporters']['otlp/jaeger']['endpoint'].split(':')[0] in compose


def urlport(endpoint): return endpoint.rsplit(':', 1)[1]


def test_a_real_prometheus_takes_the_configuration_and_answers_every_panel(server, tmp_path):
    if not shutil.which('promtool') or not shutil.which('prometheus'): pytest.skip('needs Prometheus (package prometheus)')
    run('promtool', 'check', 'config', DEPLOY/'prometheus.yml')
    run('promtool', 'check', 'rules', DEPLOY/'rules.yml')
    shutil.copy(DEPLOY/'rules.yml', tmp_path)
    text = (DEPLOY/'prometheus.yml').read_text()
    (tmp_path/'prometheus.yml').write_text(text.replace('127.0.0.1:8000', server.url.removeprefix('http://')).replace('scrape_interval: 5s', 'scrape_interval: 1s'))
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        at = f'127.0.0.1:{s.getsockname()[1]}'
    p = subprocess.Popen(['prometheus', f'--config.file={tmp_path}/prometheus.yml', f'--storage.tsdb.path={tmp_path}/data', f'--web.listen-address={at}', '--log.level=error'], stderr=subprocess.DEVNULL)
    try:
        with httpx2.Client(base_url=f'http://{at}', timeout=30) as h:
            def ask(expr):
                try: return h.get('/api/v1/query', params=dict(query=expr)).json()
                except (httpx2.TransportError, ValueError): return {}
            end = time.monotonic() + 60
            httpx2.post(f'{server.url}/v1/embeddings', json=dict(input=['a']), timeout=30)
            while not ask('mmembed_items_total').get('data', {}).get('result'): assert time.monotonic() < end and not time.sleep(.2)
            assert ask('mmembed_ready')['data']['result'] and ask('up')['data']['result'][0]['value'][1] == '1'
            for panel in json.loads((DEPLOY/'dashboard.json').read_text())['panels']:
                for t in panel['targets']: assert ask(t['expr'].replace('$__rate_interval', '1m').replace('$__interval', '1m'))['status'] == 'success', t['expr']
            assert {r['name'] for g in h.get('/api/v1/rules').json()['data']['groups'] for r in g['rules']} >= {'mmembed:queue_seconds:p99', 'MmembedNotReady'}
    finally:
        p.kill()
        p.wait()
