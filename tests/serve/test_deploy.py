"""The files in deploy/ are read by the tools that they are written for, and speak of metrics, options and paths that
the service has."""
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import httpx2
import pytest
import yaml
from packaging.requirements import Requirement

from mmembed.cli.serve import serve
from mmembed.serve.middleware import OPEN
from mmembed.serve.telemetry import STAGES, Metrics

from tests.exporters import tiny
from tests.helpers import HANG, ended, free_port, until

DEPLOY = Path(__file__).resolve().parents[2]/'deploy'
# tools/setup.sh lays Prometheus beside Python
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get('PATH', '')])


def tool(name):
    "The program, or the test is skipped."
    return shutil.which(name, path=PATH) or pytest.skip(f'needs {name} (`make dev`, or the Debian package prometheus)')


@pytest.fixture(scope='module')
def names():
    "All series of the service."
    return {
        s.name + e
        for m in Metrics().registry.collect()
        for s in [m]
        for e in ('', '_total', '_bucket', '_sum', '_count')
    }


@pytest.mark.parametrize('file', ['dashboard.json', 'rules.yml'])
def test_metrics_are_the_services(file, names):
    text = (DEPLOY/file).read_text()
    found = json.loads(text) if file.endswith('json') else yaml.safe_load(text)
    exprs = (
        [t['expr'] for p in found['panels'] for t in p['targets']]
        if file.endswith('json')
        else [r['expr'] for g in found['groups'] for r in g['rules']]
    )
    assert len(exprs) > 3
    for e in exprs:
        used = set(re.findall(r'\bmmembed_\w+', e))
        assert used | set(re.findall(r'\bup\b', e)) and used <= names, (e, used - names)
        assert set(re.findall(r'stage="(\w+)"', e)) <= set(STAGES)


def manifests(): return list(yaml.safe_load_all((DEPLOY/'kubernetes'/'mmembed.yml').read_text()))


def found(kind, name='mmembed'):
    return next(d for d in manifests() if d['kind'] == kind and d['metadata']['name'] == name)


def test_the_autoscaler_is_given_a_metric_of_its_pods():
    "Scrape, rule, adapter and autoscaler name the same series by the same labels."
    [metric] = found('HorizontalPodAutoscaler')['spec']['metrics']
    [rule] = yaml.safe_load((DEPLOY/'prometheus-adapter.yml').read_text())['rules']['custom']
    [job] = yaml.safe_load((DEPLOY/'prometheus-kubernetes.yml').read_text())['scrape_configs']
    records = {
        r['record']: r['expr']
        for g in yaml.safe_load((DEPLOY / 'rules.yml').read_text())['groups']
        for r in g['rules']
        if 'record' in r
    }
    assert metric['type'] == 'Pods' and metric['pods']['metric']['name'] == rule['name']['as']
    expr = records[rule['seriesQuery'].partition('{')[0]]
    labels = {'namespace', 'pod'}
    assert set(rule['resources']['overrides']) == labels and all(
        f'{x}!=""' in rule['seriesQuery'] and x in expr for x in labels
    )
    assert labels <= {r.get('target_label') for r in job['relabel_configs']} and f'job="{job["job_name"]}"' in expr
    app, port = job['relabel_configs'][0]['regex'].split(';')
    pod = found('Deployment')['spec']['template']
    assert pod['metadata']['labels']['app'] == app and port in {
        p['name'] for p in pod['spec']['containers'][0]['ports']
    }


def test_volumes_are_claimed_and_many_nodes_may_read_them():
    claims = {d['metadata']['name']: d['spec'] for d in manifests() if d['kind'] == 'PersistentVolumeClaim'}
    loader = yaml.safe_load((DEPLOY/'loader.yml').read_text())['spec']
    used = {
        v['persistentVolumeClaim']['claimName']
        for p in (loader, found('Deployment')['spec']['template']['spec'])
        for v in p['volumes']
        if 'persistentVolumeClaim' in v
    }
    assert used == set(claims) and all(
        set(c['accessModes']) <= {'ReadWriteMany', 'ReadOnlyMany'} for c in claims.values()
    )
    text = (DEPLOY/'terraform'/'main.tf').read_text()
    made = yaml.safe_load(re.sub(r'\$\{[\w.]+\}', 'fs-1', re.search(r'<<-EOT\n(.*?)\n *EOT', text, re.S)[1]))
    pytest.importorskip('kubernetes_validate').validate(made, '1.33', strict=True)
    assert {c['storageClassName'] for c in claims.values()} == {made['metadata']['name']}
    assert made['provisioner'] == 'efs.csi.aws.com' and 'aws-efs-csi-driver' in text


def test_grpc_is_balanced_by_its_clients():
    "The name of the headless service stands for many addresses; `Client` calls each of them in turn."
    import grpc
    from mmembed.serve.client import Client
    from mmembed.serve.protobuf import message

    assert found('Service', 'mmembed-grpc')['spec']['clusterIP'] == 'None' and [
        p['name'] for p in found('Service')['spec']['ports']
    ] == ['http']
    calls, servers, ports = [0, 0, 0], [], []
    for k in range(3):
        def info(q, context, k=k):
            calls[k] += 1
            return message('mmembed.v1.InfoResponse')(name='x', card='{}')
        server = grpc.server(ThreadPoolExecutor(1))
        answer = grpc.unary_unary_rpc_method_handler(info, response_serializer=lambda m: m.SerializeToString())
        server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler('mmembed.v1.Embedding', dict(Info=answer))]
        )
        ports.append(server.add_insecure_port('127.0.0.1:0'))
        servers.append(server.start() or server)
    client = Client('grpc://ipv4:' + ','.join(f'127.0.0.1:{p}' for p in ports))
    for _ in range(300):
        client.info()
        if all(calls): break
    client.close()
    for s in servers: s.stop(0)
    assert all(calls), calls


def test_the_pods_probes_and_options_exist():
    import inspect
    options = {'--' + p.replace('_', '-') for p in inspect.signature(serve).parameters}
    [pod], [c] = (
        [found('Deployment')['spec']['template']['spec']],
        found('Deployment')['spec']['template']['spec']['containers'],
    )
    assert {a for a in c['args'] if a.startswith('--')} <= options
    assert {c[p]['httpGet']['path'] for p in ('startupProbe', 'livenessProbe', 'readinessProbe')} <= set(OPEN)
    grace = int(c['args'][c['args'].index('--grace') + 1]) + int(c['args'][c['args'].index('--drain') + 1])
    assert pod['terminationGracePeriodSeconds'] > grace
    command = json.loads(re.search(r'^CMD (\[.*\])$', (DEPLOY/'Dockerfile').read_text(), re.M)[1])
    assert {a for a in command if a.startswith('--')} <= options


def run(*command, **kw):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=HANG, **kw)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return done.stdout


def test_kubernetes_manifests_fit_the_schemas():
    validate = pytest.importorskip('kubernetes_validate').validate
    docs = [
        d
        for f in [DEPLOY / 'loader.yml', *(DEPLOY / 'kubernetes').glob('*.yml')]
        for d in yaml.safe_load_all(f.read_text())
    ]
    assert {d['kind'] for d in docs} >= {
        'Deployment', 'Service', 'HorizontalPodAutoscaler', 'PodDisruptionBudget', 'PersistentVolumeClaim',
        'Pod',
    }
    for d in docs: validate(d, '1.33', strict=True)
    wrong = next(d for d in docs if d['kind'] == 'Deployment')
    wrong['spec']['template']['spec']['containers'][0]['readinessprobe'] = {}
    with pytest.raises(Exception, match='readinessprobe'): validate(wrong, '1.33', strict=True)


@pytest.fixture(scope='module')
def steps():
    "(instruction, value) of the container file."
    parse = pytest.importorskip('dockerfile_parse').DockerfileParser
    return [
        (s['instruction'], s['value'])
        for s in parse(str(DEPLOY / 'Dockerfile')).structure
        if s['instruction'] != 'COMMENT'
    ]


def test_the_container_file_copies_what_is_there(steps):
    "And nothing that `.dockerignore` leaves out; what is copied is enough for the package and for its commands."
    root, kept = DEPLOY.parent, {w[1:] for w in (DEPLOY.parent/'.dockerignore').read_text().split() if w[0] == '!'}
    assert '*' in (root/'.dockerignore').read_text().split()
    copied = {
        w for kind, value in steps if kind == 'COPY' and not value.startswith('--from') for w in value.split()[:-1]
    }
    assert copied == kept and all((root/c).exists() for c in copied), copied ^ kept
    names = [kind for kind, _ in steps]
    last = names[len(names) - names[::-1].index('FROM'):]  # the stage that is shipped
    assert {'USER', 'HEALTHCHECK', 'ENTRYPOINT', 'CMD'} <= set(last) and last.index('USER') < last.index('ENTRYPOINT')
    for module, name in re.findall(r'from (mmembed[\w.]*) import (\w+)', ' '.join(v for _, v in steps)):
        assert hasattr(import_module(module), name)


def test_the_container_takes_no_cuda_and_names_no_host(steps):
    "PyTorch comes from an index that must be named; nothing else brings it again."
    args = dict(v.partition('=')[::2] for kind, v in steps if kind == 'ARG')
    assert args['TORCH_INDEX'] == '' and any('TORCH_INDEX' in v and 'exit 1' in v for kind, v in steps if kind == 'RUN')
    installs = [v for kind, v in steps if kind == 'RUN' and 'pip install' in v]
    assert '--index-url "$TORCH_INDEX"' in installs[0] and '--no-deps' in installs[0] and ' torch ' in installs[0]
    assert all('--no-deps' in v or '-r requirements.txt' in v for v in installs) and all(
        '-c constraints.txt' in v or v.endswith('pip') for v in installs
    )
    for file in [DEPLOY / 'Dockerfile', DEPLOY / 'compose.yml', *DEPLOY.glob('**/*.yml')]:
        assert not re.search(r'https?://\S*\.(org|com|io)\b', file.read_text()), file
    assert yaml.safe_load((DEPLOY / 'compose.yml').read_text())['services']['mmembed']['build']['args'][
        'TORCH_INDEX'
    ].startswith('${TORCH_INDEX:?')


def test_a_server_loads_only_what_its_image_has():
    "It starts and answers where nothing is installed but deploy/requirements.txt and what these need."
    root = DEPLOY.parent
    listed = [
        line for line in (DEPLOY / 'requirements.txt').read_text().splitlines() if line and not line.startswith('#')
    ]
    pinned = {
        canonical(line.partition('==')[0])
        for line in (root / 'constraints.txt').read_text().splitlines()
        if '==' in line
    }
    assert {canonical(re.split(r'[\[<>=]', r)[0]) for r in listed} <= pinned
    allowed, todo = {'torchcodec', 'mmembed'}, [*listed]
    while todo:
        requirement = Requirement(todo.pop())
        if (name := canonical(requirement.name)) in allowed and not requirement.extras: continue
        allowed.add(name)
        try: needs = [Requirement(r) for r in importlib.metadata.requires(name) or ()]
        except importlib.metadata.PackageNotFoundError: continue
        todo += [
            str(r).partition(';')[0]
            for r in needs
            if not r.marker or any(r.marker.evaluate(dict(extra=e)) for e in requirement.extras or {''})
        ]
    missing = [
        m
        for m, owners in importlib.metadata.packages_distributions().items()
        if not {canonical(d) for d in owners} & allowed
    ]
    assert {'transformers', 'lightning', 'open_clip', 'PIL', 'pyarrow', 'tokenizers'} <= set(missing)
    program = """
        import asyncio, sys
        class Missing:
            def find_spec(self, name, path=None, target=None):
                if name.partition('.')[0] in sys.argv[2:]:
                    raise ModuleNotFoundError(f'No module named {name!r}', name=name)
        sys.meta_path.insert(0, Missing())
        from mmembed.cli.main import main
        from mmembed.serve import grpc_server, server
        from mmembed.serve.service import Config, Service
        service = Service(Config(sys.argv[1], grpc_port=0, traces='http://127.0.0.1:1'))
        server.app(service)
        async def go():
            grpc, _ = await grpc_server.start(service)
            assert not await service.ready() and service.metrics.page()
            await grpc.stop(0)
        asyncio.run(go())"""
    run(sys.executable, '-c', textwrap.dedent(program), tiny.artifact(), *missing)


def canonical(name): return re.sub('[-_.]+', '-', name).lower()


def test_the_healthcheck_knows_port_and_tls(server):
    spec = importlib.util.spec_from_file_location('healthcheck', DEPLOY/'healthcheck.py')
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    for words, url in (
        ('mmembed serve /models/model.pt --host 0.0.0.0', 'http://127.0.0.1:8000/readyz'),
        ('serve m.pt --port=9000 --host ::', 'http://[::1]:9000/readyz'),
        (
            '/sbin/docker-init -- mmembed serve m.pt --tls-key k --tls-cert c --port 8443 --drain 5',
            'https://127.0.0.1:8443/readyz',
        ),
    ):
        assert check.target(words.split()) == url
    port = server.url.rsplit(':', 1)[1]
    for at, status in ((port, 0), ('1', 1)):
        # whose command line is that of a server
        with ended(
            subprocess.Popen([sys.executable, '-c', 'input()', 'serve', 'm.pt', '--port', at], stdin=subprocess.PIPE)
        ) as p:
            done = subprocess.run([sys.executable, DEPLOY/'healthcheck.py', str(p.pid)], capture_output=True, text=True)
            p.communicate(b'\n')
        assert done.returncode == status and bool(done.stdout) == bool(status), done


def test_terraform_refers_to_what_it_declares():
    "Without terraform: every `kind.name` that is used is declared."
    text = (DEPLOY/'terraform'/'main.tf').read_text()
    found = pytest.importorskip('hcl2').loads(text)
    plain = lambda x: x.strip('"')
    declared = {
        f'{prefix}{plain(kind)}.{plain(name)}'
        for key, prefix in (('resource', ''), ('data', 'data.'))
        for block in found[key]
        for kind, named in block.items()
        for name in named
    }
    declared |= {f'var.{plain(v)}' for block in found['variable'] for v in block}
    used = set(re.findall(r'(?<![\w.])((?:data\.)?aws_\w+\.\w+|var\.\w+)', re.sub(r'"(aws_\w+)" "(\w+)"', '', text)))
    assert len(used) > 10 and used <= declared, used - declared


def test_terraform_accepts_it(tmp_path):
    "The real one, with the real schema of AWS."
    if not shutil.which('terraform') or not os.environ.get('TF_PLUGIN_DIR'):
        pytest.skip('needs terraform, and TF_PLUGIN_DIR with its AWS provider')
    shutil.copy(DEPLOY/'terraform'/'main.tf', tmp_path)
    env = {k: v for k, v in os.environ.items() if k != 'TF_CLI_CONFIG_FILE'}
    run(
        'terraform', f'-chdir={tmp_path}', 'init', f'-plugin-dir={os.environ["TF_PLUGIN_DIR"]}', '-input=false', env=env
    )
    assert 'configuration is valid' in run('terraform', f'-chdir={tmp_path}', 'validate', '-no-color', env=env)
    run('terraform', 'fmt', '-check', tmp_path/'main.tf', env=env)


def test_compose_shows_what_it_promises():
    "Ports, Grafana's source and dashboard, versions: each is in the file and in what the file mounts."
    text = (DEPLOY/'compose.yml').read_text()
    services = yaml.safe_load(text)['services']
    published = {p.split(':')[0] for s in services.values() for p in s.get('ports', ())}
    assert set(re.findall(r':(\d+)\b', text.partition('services:')[0])) == published
    assert all(re.search(r':v?\d+\.\d+\.\d+$', s['image']) for s in services.values() if 'image' in s)
    mounts = dict(v.split(':')[:2] for v in services['grafana']['volumes'])
    read = lambda name: yaml.safe_load((DEPLOY/'grafana'/name).read_text())
    [source], [provider] = read('datasources.yml')['datasources'], read('dashboards.yml')['providers']
    assert mounts['./grafana/datasources.yml'].startswith('/etc/grafana/provisioning/datasources/') and mounts[
        './grafana/dashboards.yml'
    ].startswith('/etc/grafana/provisioning/dashboards/')
    assert (
        Path(mounts['./dashboard.json']).is_relative_to(provider['options']['path']) and source['type'] == 'prometheus'
    )
    host, port = source['url'].removeprefix('http://').split(':')
    assert f'{port}:{port}' in services[host]['ports'] and 'network_mode' not in services[host]
    [job] = yaml.safe_load((DEPLOY/'prometheus.yml').read_text())['scrape_configs']
    assert job['static_configs'][0]['targets'] == ['mmembed:8000'] and '8000:8000' in services['mmembed']['ports']


def test_the_collectors_pipelines_are_made_of_what_is_configured():
    c = yaml.safe_load((DEPLOY/'collector.yml').read_text())
    for line in c['service']['pipelines'].values():
        for part in ('receivers', 'processors', 'exporters'): assert line[part] and set(line[part]) <= set(c[part])
    compose = yaml.safe_load((DEPLOY/'compose.yml').read_text())['services']
    mounted = [
        v.split(':')[0] for s in compose.values() for v in s.get('volumes', []) if not v.startswith('../model.pt')
    ]
    assert len(mounted) > 2 and all((DEPLOY/m).exists() for m in mounted)
    assert f':{urlport(c["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"])}' in ' '.join(
        compose['mmembed']['command']
    )
    assert c['exporters']['otlp/jaeger']['endpoint'].split(':')[0] in compose


CRITICAL = ('MmembedDown', 'MmembedAbsent', 'MmembedNotReady', 'MmembedFails')
SERVER = '{job="mmembed", instance="a:8000", namespace="shop", pod="a"}'
STATES = dict(  # what Prometheus saw for twenty minutes, and what must burn then
    idle=({f'up{SERVER}': '1x20', f'mmembed_ready{SERVER}': '1x20'}, {}),
    healthy=(
        {
            f'up{SERVER}': '1x20',
            f'mmembed_ready{SERVER}': '1x20',
            'mmembed_items_total{status="ok"}': '0+60x20',
            'mmembed_items_total{status="failed"}': '3x20',
            'mmembed_rejected_total': '5x20',
        },
        {},
    ),
    killed=({f'up{SERVER}': '1x10 0x10', f'mmembed_ready{SERVER}': '1x10 stale'}, {'MmembedDown'}),
    gone=({f'up{SERVER}': '1x10 stale', f'mmembed_ready{SERVER}': '1x10 stale'}, {'MmembedAbsent'}),
    never=({}, {'MmembedAbsent'}),
    unready=({f'up{SERVER}': '1x20', f'mmembed_ready{SERVER}': '1x10 0x10'}, {'MmembedNotReady'}),
    silent=({f'up{SERVER}': '1x20', f'mmembed_ready{SERVER}': '1x10 stale'}, {'MmembedNotReady'}),
    failing=(
        {f'up{SERVER}': '1x20', f'mmembed_ready{SERVER}': '1x20', 'mmembed_items_total{status="failed"}': '0+1x20'},
        {'MmembedFails'},
    ),
)


def test_alerts_burn_when_they_should_and_only_then(tmp_path):
    """`promtool test rules`: nothing critical for an idle healthy server.

    A killed, absent, unready, silent or failing one is told from the others."""
    promtool, tests = tool('promtool'), []
    for series, burning in STATES.values():
        expect = [
            dict(
                expr=f'count(ALERTS{{alertstate="firing", alertname="{a}", severity="critical"}})',
                eval_time='20m',
                exp_samples=[dict(labels='{}', value=1)] if a in burning else [],
            )
            for a in CRITICAL
        ]
        tests.append(
            dict(
                interval='1m',
                input_series=[dict(series=k, values=v) for k, v in series.items()],
                promql_expr_test=expect,
            )
        )
    bucket = lambda le: (
        'mmembed_stage_seconds_bucket{stage="queue", kind="text", namespace="shop", pod="a", instance="a:8000", '
        f'job="mmembed", le="{le}"}}'
    )
    waits = {f'up{SERVER}': '1x20', bucket('0.1'): '0+0x20', bucket('0.2'): '0+100x20', bucket('+Inf'): '0+100x20'}
    idle = waits | {bucket(le): '7x20' for le in ('0.1', '0.2', '+Inf')}
    label = 'mmembed:queue_seconds:p99{namespace="shop", pod="a", instance="a:8000"}'
    # an autoscaler can do nothing with NaN, or with nothing
    for series, value in ((waits, .199), (idle, 0), ({f'up{SERVER}': '1x20'}, 0)):
        tests.append(
            dict(
                interval='1m',
                input_series=[dict(series=k, values=v) for k, v in series.items()],
                promql_expr_test=[
                    dict(
                        expr='mmembed:queue_seconds:p99', eval_time='20m', exp_samples=[dict(labels=label, value=value)]
                    )
                ],
            )
        )
    (tmp_path / 'tests.yml').write_text(
        yaml.safe_dump(dict(rule_files=[str(DEPLOY / 'rules.yml')], evaluation_interval='1m', tests=tests))
    )
    run(promtool, 'test', 'rules', tmp_path/'tests.yml')


def urlport(endpoint): return endpoint.rsplit(':', 1)[1]


def test_a_real_prometheus_takes_the_configuration_and_answers_every_panel(server, tmp_path):
    promtool, prometheus = tool('promtool'), tool('prometheus')
    shutil.copy(DEPLOY/'rules.yml', tmp_path)
    cluster = yaml.safe_load((DEPLOY/'prometheus-kubernetes.yml').read_text())
    # Debian builds Prometheus without it
    assert cluster['scrape_configs'][0].pop('kubernetes_sd_configs') == [dict(role='pod')]
    (tmp_path/'cluster.yml').write_text(yaml.safe_dump(cluster))
    for file in (DEPLOY / 'prometheus.yml', tmp_path / 'cluster.yml'):
        run(promtool, 'check', 'config', '--lint-fatal', file)
    run(promtool, 'check', 'rules', '--lint-fatal', DEPLOY/'rules.yml')
    text = (DEPLOY/'prometheus.yml').read_text()
    (tmp_path / 'prometheus.yml').write_text(
        text.replace('mmembed:8000', server.url.removeprefix('http://')).replace(
            'scrape_interval: 5s', 'scrape_interval: 1s'
        )
    )
    at = f'127.0.0.1:{free_port()}'
    p = subprocess.Popen(
        [
            prometheus,
            f'--config.file={tmp_path}/prometheus.yml',
            f'--storage.tsdb.path={tmp_path}/data',
            f'--web.listen-address={at}',
            '--log.level=error',
        ],
        stderr=subprocess.DEVNULL,
    )
    try:
        with httpx2.Client(base_url=f'http://{at}', timeout=HANG) as h:
            def ask(expr):
                try: return h.get('/api/v1/query', params=dict(query=expr)).json()
                except (httpx2.TransportError, ValueError): return {}
            httpx2.post(f'{server.url}/v1/embeddings', json=dict(input=['a']), timeout=HANG)
            until(lambda: ask('mmembed_items_total').get('data', {}).get('result'))
            assert (
                ask('mmembed_ready')['data']['result']
                and ask('mmembed:queue_seconds:p99')['status'] == 'success'
                and ask('up')['data']['result'][0]['value'][1] == '1'
            )
            for panel in json.loads((DEPLOY/'dashboard.json').read_text())['panels']:
                for t in panel['targets']:
                    assert (
                        ask(t['expr'].replace('$__rate_interval', '1m').replace('$__interval', '1m'))['status']
                        == 'success'
                    ), t['expr']
            assert {r['name'] for g in h.get('/api/v1/rules').json()['data']['groups'] for r in g['rules']} >= {
                'mmembed:queue_seconds:p99',
                'MmembedNotReady',
            }
    finally:
        p.kill()
        p.wait()
