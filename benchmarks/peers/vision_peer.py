"""A peer of `benchmarks/vision.py` in an environment of its own: photos in, float32 (3, 224, 224) out, and the time
it took.

    python3.11 -m venv DALI && DALI/bin/pip install nvidia-dali-cuda120 numpy
    python3.11 -m venv MATX && MATX/bin/pip install matxscript==1.8.1 "numpy<2" pillow "opencv-python-headless<4.12"
    python -m benchmarks.vision --peer dali=DALI/bin/python --peer matxscript=MATX/bin/python --peer
    opencv=MATX/bin/python

Called with a peer's name and a number of threads. Each line on stdin names a folder; the answer is a line with the
CPU and
the wall seconds that its *.jpg took. Reading the files is not timed.
"""
import sys
import time
from pathlib import Path

import numpy as np

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def opencv(threads):
    import cv2
    cv2.setNumThreads(threads)
    mean, std = np.array(MEAN, np.float32), np.array(STD, np.float32)
    def one(b):
        x = cv2.cvtColor(cv2.imdecode(b, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        h, w = x.shape[:2]
        w, h = (224, int(224 * h / w)) if w <= h else (int(224 * w / h), 224)
        x = cv2.resize(x, (w, h), interpolation=cv2.INTER_AREA)  # OpenCV's only antialiased reduction
        top, left = (h - 224) // 2, (w - 224) // 2
        x = (x[top:top + 224, left:left + 224].astype(np.float32) / 255 - mean) / std
        return np.ascontiguousarray(x.transpose(2, 0, 1))
    return lambda files: [one(b) for b in files]


def dali(threads):
    from nvidia.dali import fn, pipeline_def, types
    queue = []

    @pipeline_def(
        batch_size=64, num_threads=threads, device_id=None, prefetch_queue_depth=1, exec_pipelined=False,
        exec_async=False,
    )
    def pipeline():
        files = fn.external_source(source=lambda: queue.pop(), device='cpu', batch=True)
        x = fn.decoders.image(files, device='cpu', output_type=types.RGB)
        x = fn.resize(x, resize_shorter=224, interp_type=types.INTERP_CUBIC, antialias=True)
        return fn.crop_mirror_normalize(x, crop=(224, 224), mean=[255 * v for v in MEAN], std=[255 * v for v in STD],
                                        output_layout='CHW', dtype=types.FLOAT)
    p = pipeline()
    p.build()
    def run(files):
        queue.append(list(files))
        return p.run()[0].as_array()
    return run


def matxscript(threads):
    import matx
    from matx import vision as v
    cpu = matx.Device('cpu')
    decode = v.ImdecodeOp(cpu, 'RGB', threads)
    resize = v.ResizeOp(cpu, size=(224, 224), interp=v.INTER_AREA, mode=v.RESIZE_NOT_SMALLER)
    crop = v.CenterCropOp(cpu, (224, 224))
    normalize = v.NormalizeOp(cpu, [255 * m for m in MEAN], [255 * s for s in STD])
    def run(files):  # its transposition is for GPUs only
        images = normalize(crop(resize(decode([b.tobytes() for b in files]))))
        return np.stack([np.ascontiguousarray(x.asnumpy().transpose(2, 0, 1)) for x in images])
    return run


def main():
    run, read = {'opencv': opencv, 'dali': dali, 'matxscript': matxscript}[sys.argv[1]](int(sys.argv[2])), {}
    for line in sys.stdin:
        folder = line.strip()
        if folder not in read:
            read = {folder: [np.fromfile(p, np.uint8) for p in sorted(Path(folder).glob('*.jpg'))]}
            y = run(read[folder])
            y = np.asarray(y)
            assert y.shape == (len(read[folder]), 3, 224, 224) and y.dtype == np.float32, (y.shape, y.dtype)
            np.save(Path(folder)/f'{sys.argv[1]}.npy', y)
            run(read[folder])
        cpu, wall = time.process_time(), time.perf_counter()
        run(read[folder])
        print(time.process_time() - cpu, time.perf_counter() - wall, flush=True)


if __name__ == '__main__': main()
