"""int8 of image towers against float32, ONNX Runtime and OpenVINO: time, cosine and what a probe finds.

    python -m benchmarks.int8 prepare --model resnet50    # writes the tower as ours, ONNX and their int8 forms into
    runs/int8/resnet50, once
    python -m benchmarks.int8 run --model resnet50 --json benchmarks/results/int8.json

Models: squeezenet1_1 and mobilenet_v2 with ImageNet's weights (`MMEMBED_DATA`); resnet18, resnet50, convnext_tiny of
torchvision and RN50 of open_clip with random ones, which
changes no time, but makes the cosine one of a network that has learnt nothing. All are calibrated on the same 32
training photos of clothes. Contestants:

    fp32, int8             mmembed's tower, as the file has it, packed
    ORT, ORT dynamic       onnxruntime in float32, and `quantize_dynamic` (which wants ConvInteger for convolutions)
    ORT static             `quantize_static`: QDQ, int8 weights a channel, uint8 activations; `reduce_range` where
    there is no VNNI
    OpenVINO, OpenVINO int8  float32, and `nncf.quantize` of the same ONNX file

`--peers PYTHON` names an environment's interpreter with `pip install onnx onnxruntime openvino nncf`; without, this
one is asked. What is not installed, or fails, is "not run"
with its reason. One thread; CPU milliseconds an image, the fastest of `--rounds` turns, at batches of 1, 8 and 64.
"cosine" is with the float32 tower, of the 250 test photos,
the worst and the mean; "probe" the share of them whose class the nearest mean of the training photos' float32
embeddings gives. `--avx2` holds torch and OpenVINO's
oneDNN down, not onnxruntime."""
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
BATCHES = 1, 8, 64
PEERS = 'ORT', 'ORT dynamic', 'ORT static', 'OpenVINO', 'OpenVINO int8'
COLUMNS = [
    'model',
    'contestant',
    *(f'ms, batch {b}' for b in BATCHES),
    'times fp32',
    'cosine, worst (mean)',
    'probe, %',
]


def tower_of(name):
    "A tower of mmembed, in eval mode."
    import numpy as np
    import torch
    from torch import nn
    from mmembed.models.towers import image_tower
    torch.manual_seed(0)
    if name == 'mobilenet_v2':
        from benchmarks.figures import mobilenet
        return mobilenet()
    if name == 'RN50':
        from mmembed.models.open_clip import open_clip_towers
        return open_clip_towers('RN50').image.eval()
    tower = image_tower(name)
    if name == 'squeezenet1_1':
        from benchmarks.figures import DATA
        saved = np.load(DATA/'weights'/'squeezenet1_1-webnn'/'squeezenet1_1.npz')
        keys, used = [k for k in saved.files if k.endswith('weight')], set()
        for m in tower.modules():  # in torchvision's order, layers of one shape one after the other
            if not isinstance(m, nn.Conv2d): continue
            key = next(k for k in keys if k not in used and saved[k].shape == tuple(m.weight.shape))
            used.add(key)
            with torch.no_grad():
                (
                    m.weight.copy_(torch.from_numpy(saved[key])),
                    m.bias.copy_(torch.from_numpy(saved[key.replace('weight', 'bias')])),
                )
    for m in tower.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_(0, .1), m.running_var.uniform_(.5, 1.5)
    return tower.eval()


def photos(tower, quick):
    "Pixels of training photos, their classes, and the same of test photos."
    import torch
    import mmembed as mm
    from benchmarks.figures import DATA
    vp, out = tower.pipeline, []
    for part, step in ('train', 8), ('test', 1):
        files = sorted((DATA/'clothing'/part).glob('*/*'))[::step * (20 if quick else 1)]
        names = sorted(d.name for d in (DATA/'clothing'/part).iterdir())
        out += [
            torch.cat([vp.normalize(vp.preprocess(vp.decode(mm.read_bytes(f)))[None]) for f in files]),
            torch.tensor([names.index(f.parent.name) for f in files]),
        ]
    return out


def prepare(args, folder):
    import numpy as np
    import torch
    from mmembed.core.torchscript import quietly
    from mmembed.exporters.assemble import trace_image
    from mmembed.exporters.convolutions import int8_convolutions
    from mmembed.exporters.onednn import quick
    from mmembed.exporters.variants import PRECISION_BOUNDS
    from mmembed.exporters.int8 import int8_linear
    import copy
    tower = tower_of(args.model).requires_grad_(False)
    size = tower.pipeline.size
    train, classes, test, truth = photos(tower, args.quick)
    given = train[::max(1, len(train) // 32)][:32]
    np.savez(folder/'photos.npz', train=train, classes=classes, test=test, truth=truth, given=given)
    made, said = {}, ''
    for name in 'fp32', 'int8':
        made[name] = copy.deepcopy(tower)
        object.__setattr__(made[name], 'pipeline', None)
        if name == 'int8':
            layers = int8_linear(made[name], given[:8], script=True)
            count, said = int8_convolutions(
                made[name],
                list(given.split(8)),
                list(given.split(8)),
                PRECISION_BOUNDS['int8'] / (1e-9 if args.anyway else 2),
                script=True,
            )
            said = f'{count} convolutions and {layers} linear layers in int8{"; " * bool(said)}{said}'
            print(said)
        made[name] = trace_image(quick(made[name], torch.zeros(1, 3, *size)), size)
        quietly(torch.jit.save, made[name], str(folder/f'{name}.pt'))
    (folder/'said.txt').write_text(said)
    quietly(
        torch.onnx.export, tower, (test[:2],), str(folder / 'fp32.onnx'), input_names=['x'],
        output_names=['y'], dynamo=False, opset_version=17, dynamic_axes={'x': {0: 'B'}, 'y': {0: 'B'}},
    )
    print(subprocess.run([args.peers, __file__, 'peers', str(folder)], capture_output=True, text=True).stdout, end='')


def make_peers(folder):
    "The int8 forms of `fp32.onnx`; this runs in the peers' environment."
    import numpy as np
    given = np.load(folder/'photos.npz')['given']
    failed = {}
    def dynamic():
        from onnxruntime.quantization import quantize_dynamic
        quantize_dynamic(folder/'fp32.onnx', folder/'dynamic.onnx')
    def static():
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process
        class Reader(CalibrationDataReader):
            def __init__(self): self.rows = iter([{'x': x[None]} for x in given])
            def get_next(self): return next(self.rows, None)
        quant_pre_process(str(folder/'fp32.onnx'), str(folder/'before.onnx'), skip_symbolic_shape=True)
        vnni = 'vnni' in Path('/proc/cpuinfo').read_text()
        quantize_static(
            str(folder / 'before.onnx'), str(folder / 'static.onnx'), Reader(), quant_format=QuantFormat.QDQ,
            per_channel=True, reduce_range=not vnni, activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    def openvino():
        import nncf
        import openvino as ov

        ov.save_model(
            nncf.quantize(ov.Core().read_model(folder / 'fp32.onnx'), nncf.Dataset([x[None] for x in given])),
            folder / 'nncf.xml',
        )
    for name, f in (('ORT dynamic', dynamic), ('ORT static', static), ('OpenVINO int8', openvino)):
        try: f()
        except Exception as e: failed[name] = f'{type(e).__name__}: {str(e).splitlines()[0][:150]}'
    (folder/'failed.json').write_text(json.dumps(failed))


def contestant(name, folder):
    "A function of pixels, numpy in and out."
    import numpy as np
    if name in ('fp32', 'int8'):
        import torch
        from mmembed.core.torchscript import quietly
        from mmembed.runtime.artifact import prepack
        torch.set_num_threads(1)
        torch._C._jit_set_profiling_mode(False)
        module = quietly(torch.jit.load, str(folder/f'{name}.pt'))
        prepack(module)
        def ask(x):
            with torch.no_grad(): return module(torch.from_numpy(x)).numpy()
        return ask
    if name.startswith('ORT'):
        import onnxruntime as ort
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(
            str(folder / {'ORT': 'fp32.onnx', 'ORT dynamic': 'dynamic.onnx', 'ORT static': 'static.onnx'}[name]),
            options,
            providers=['CPUExecutionProvider'],
        )
        return lambda x: session.run(None, {'x': np.ascontiguousarray(x)})[0]
    import openvino as ov
    model = ov.Core().compile_model(
        str(folder / ('fp32.onnx' if name == 'OpenVINO' else 'nncf.xml')),
        'CPU',
        {
            'INFERENCE_NUM_THREADS': 1,
            'NUM_STREAMS': 1,
            'INFERENCE_PRECISION_HINT': 'f32',
            'EXECUTION_MODE_HINT': 'PERFORMANCE',
        },
    )
    return lambda x: model(x)[0]


def serve(name, folder):
    "Answers lines on standard input: a batch size with CPU milliseconds an image, 'answers' with a file of embeddings."
    import numpy as np
    ask, data = contestant(name, folder), np.load(folder/'photos.npz')
    x = np.resize(data['test'], (max(BATCHES), *data['test'].shape[1:]))
    print('ready', flush=True)
    for line in sys.stdin:
        if line.strip() == 'answers':
            path = folder/f'{name.replace(" ", "_")}.npz'
            np.savez(
                path,
                **{
                    k: np.concatenate([ask(data[k][i : i + 8]) for i in range(0, len(data[k]), 8)]).reshape(
                        len(data[k]), -1
                    )
                    for k in ('train', 'test')
                },
            )
            print(path, flush=True)
            continue
        batch = int(line)
        start = time.process_time()
        ask(x[:batch])
        print((time.process_time() - start) * 1e3 / batch, flush=True)


def started(args, folder, failed):
    "The processes that are ready, by name; what does not start is noted in `failed`."
    running = {}
    for name in ('fp32', 'int8', *PEERS):
        if args.only and name not in args.only or name in failed: continue
        python = args.peers if name in PEERS else sys.executable
        process = subprocess.Popen(
            [python, __file__, 'serve', str(folder), '--name', name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ
            | {
                'PYTHONPATH': os.pathsep.join(
                    [str(Path(__file__).resolve().parents[1]), os.environ.get('PYTHONPATH', '')]
                )
            },
        )
        if process.stdout.readline().strip() == 'ready': running[name] = process
        else: failed[name] = (process.communicate()[1].strip().splitlines() or ['it ended'])[-1][:150]
    return running


def run(args, folder):
    import numpy as np
    failed, rows, best = json.loads((folder/'failed.json').read_text()), [], {}
    data, running = np.load(folder/'photos.npz'), started(args, folder, failed)
    def ask(name, line):
        running[name].stdin.write(f'{line}\n')
        running[name].stdin.flush()
        return running[name].stdout.readline().strip()
    sizes = BATCHES[:2] if args.quick else BATCHES
    for name in list(running):
        if float(ask(name, 1) or 'nan') != float(ask(name, 1) or 'nan') and not running[name].poll() is None:
            failed[name] = 'it ended'
    for b in sizes:
        for _ in range(args.rounds):
            for name in running: best[name, b] = min(best.get((name, b), 1e9), float(ask(name, b)))
    answers = {name: np.load(ask(name, 'answers')) for name in running}
    for p in running.values(): p.stdin.close(), p.wait()
    def unit(x): return x / np.linalg.norm(x, axis=1, keepdims=True)
    full = {k: unit(answers['fp32'][k].astype('f8')) for k in ('train', 'test')}
    means = unit(np.stack([full['train'][data['classes'] == c].mean(0) for c in np.unique(data['classes'])]))
    for name in ('fp32', 'int8', *PEERS):
        if name in failed: rows.append([args.model, name, f'not run: {failed[name]}', *[''] * (len(COLUMNS) - 3)])
        if name not in running: continue
        test = unit(answers[name]['test'].astype('f8'))
        cosine = (test * full['test']).sum(1)
        probe = 100 * (np.unique(data['classes'])[(test @ means.T).argmax(1)] == data['truth']).mean()
        times = [f'{best[name, b]:.2f}' if b in sizes else '' for b in BATCHES]
        ratio = ' / '.join(f'{best["fp32", b] / best[name, b]:.2f}' for b in sizes)
        rows.append([args.model, name, *times, ratio, f'{cosine.min():.4f} ({cosine.mean():.4f})', f'{probe:.1f}'])
    path = Path(args.json)
    kept = [r for r in (json.loads(path.read_text())['records']['rows'] if path.exists() else []) if r[0] != args.model]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(
            {
                'kind': 'plain',
                'command': 'python -m benchmarks.int8 run --model NAME',
                'records': {'columns': COLUMNS, 'rows': kept + rows},
            },
            indent=0,
        )
        + '\n'
    )
    print(f'one thread; ours: {(folder/"said.txt").read_text()}')
    for r in [COLUMNS, *rows]: print('| ' + ' | '.join(r) + ' |')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['prepare', 'run', 'peers', 'serve'])
    parser.add_argument('folder', nargs='?', help='of `peers` and `serve`, which the others start')
    parser.add_argument('--name', help='of `serve`: a contestant')
    parser.add_argument('--model', default='squeezenet1_1')
    parser.add_argument(
        '--peers', default=sys.executable, metavar='PYTHON', help='an interpreter with onnxruntime, openvino and nncf'
    )
    parser.add_argument('--only', type=lambda x: x.split(';'), help='contestants, semicolons between; fp32 must be one')
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--anyway', action='store_true', help='int8 whatever the cosine, to see what it would be')
    parser.add_argument(
        '--quick', action='store_true', help='few photos, batches of 1 and 8: to see that everything works'
    )
    parser.add_argument('--json', default='runs/int8/table.json')
    if sys.argv[1:2] in (['peers'], ['serve']): args = parser.parse_args()  # in an environment without torch
    else:
        from benchmarks import begun
        args = begun(parser)
    if args.what == 'peers': return make_peers(Path(args.folder))
    if args.what == 'serve': return serve(args.name, Path(args.folder))
    folder = Path('runs/int8')/args.model
    folder.mkdir(parents=True, exist_ok=True)
    (prepare if args.what == 'prepare' else run)(args, folder)


if __name__ == '__main__': main()
