"""One training on two processes or devices, and how far its weights are from those of one.

    python reference/parallel.py slices        two processes on this machine, with JAX
    python reference/parallel.py --list        all ways, those that fail too

Needs kdlib and Keras; the ways on JAX need no TensorFlow, but for ``tf.data``. A way is a
function below. Each process prints what it did, or the error that it met.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
IMAGES, BATCH, EPOCHS, RATE, MOMENTUM = 320, 32, 1, 0.01, 0.9


def data():
    """Images, labels and stored answers, the same in each process and on each backend."""
    import kdlib

    digits = kdlib.load_dataset("digits")
    images, labels = digits.x_train[:IMAGES], digits.y_train[:IMAGES]
    answers = np.random.default_rng(0).normal(0, 3, (IMAGES, 10)).astype("float32")
    answers[np.arange(IMAGES), labels] += 6  # of a made-up teacher that knows the labels
    return images, answers, labels


def student(*, synchronized=False):
    """A small student with BatchNorm and nothing that jumps.

    The ways round differently. With ReLU and max pooling a rounding can decide which of two
    pixels gets the gradient, and after a few steps two correct trainings differ by 1e-4.
    """
    import kdlib
    import keras
    from keras import layers

    pixels = keras.Input((32, 32, 3))
    variance = [std**2 for std in kdlib.PIXEL_STD]
    x = layers.Normalization(mean=kdlib.PIXEL_MEAN, variance=variance)(pixels)
    for width in (16, 32):
        x = layers.Conv2D(width, 3, strides=2, padding="same", use_bias=False)(x)
        x = layers.BatchNormalization(momentum=0.9, synchronized=synchronized)(x)
        x = layers.Activation("silu")(x)
    return keras.Model(pixels, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def distiller(*, synchronized=False):
    """On stored answers, from the same first weights on every backend."""
    import kdlib
    import keras

    made, rng = student(synchronized=synchronized), np.random.default_rng(0)
    made.set_weights([w if w.ndim < 2 else rng.normal(0, np.sqrt(2 / np.prod(w.shape[:-1])),
                                                     w.shape) for w in made.get_weights()])
    made = kdlib.Distiller(student=made, teacher=None, temperature=4.0)
    made.compile(keras.optimizers.SGD(RATE, momentum=MOMENTUM))
    return made


def batches(*, rank: int, processes: int, counted: list):
    """A PyDataset that gives each process its slice of every batch."""
    import keras

    images, answers, labels = data()

    class Slices(keras.utils.PyDataset):
        def __len__(self):
            return IMAGES // BATCH

        def __getitem__(self, k):
            part = slice(k * BATCH + rank, (k + 1) * BATCH, processes)
            counted.append(len(labels[part]))
            return (images[part], answers[part]), labels[part]

    return Slices()


def tf_data():
    import tensorflow as tf

    images, answers, labels = data()
    return tf.data.Dataset.from_tensor_slices(((images, answers), labels)).batch(BATCH)


def fit(made, x, y=None, **settings):
    made.fit(x, y, epochs=EPOCHS, shuffle=False, verbose=0, **settings)
    return made.student


# --- JAX: keras.distribution ----------------------------------------------------------


def share(place, *, auto_shard_dataset: bool):
    """Join the processes, and let Keras split each batch between them."""
    import keras

    if place.processes > 1:
        keras.distribution.initialize(place.address, place.processes, place.rank)
    keras.distribution.set_distribution(
        keras.distribution.DataParallel(auto_shard_dataset=auto_shard_dataset))


def one(place):
    """One process, for comparison."""
    return fit(distiller(), batches(rank=0, processes=1, counted=place.counted))


def slices(place):
    """Each process reads its own part of every batch; no TensorFlow."""
    share(place, auto_shard_dataset=False)
    return fit(distiller(), batches(rank=place.rank, processes=place.processes,
                                    counted=place.counted))


def dataset(place):
    """A tf.data pipeline that Keras splits."""
    share(place, auto_shard_dataset=True)
    return fit(distiller(), tf_data())


def arrays(place):
    """NumPy arrays, which Keras does not split: refused."""
    share(place, auto_shard_dataset=True)
    images, answers, labels = data()
    return fit(distiller(), (images, answers), labels, batch_size=BATCH)


def whole(place):
    """Splitting switched off, but every process gives the whole batch: twice the work."""
    share(place, auto_shard_dataset=False)
    return fit(distiller(), batches(rank=0, processes=1, counted=place.counted))


# --- TensorFlow: tf.distribute --------------------------------------------------------


def logical(place, synchronized):
    import tensorflow as tf

    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        made = distiller(synchronized=synchronized)
    return fit(made, tf_data())


def mirrored(place):
    """MirroredStrategy on two logical devices; BatchNorm sees half a batch."""
    return logical(place, synchronized=False)


def mirrored_synchronized(place):
    """The same with BatchNormalization(synchronized=True)."""
    return logical(place, synchronized=True)


def workers(place):
    """The strategy of two processes."""
    import tensorflow as tf

    ports = [int(port) for port in place.ports.split(",")]
    os.environ["TF_CONFIG"] = json.dumps({
        "cluster": {"worker": [f"127.0.0.1:{port}" for port in ports]},
        "task": {"type": "worker", "index": place.rank}})
    return tf.distribute.MultiWorkerMirroredStrategy()


def workers_fit(place):
    """MultiWorkerMirroredStrategy with fit: an error."""
    with workers(place).scope():
        made = distiller()
    return fit(made, tf_data())


def workers_loop(place):
    """MultiWorkerMirroredStrategy with a loop of our own: BatchNorm's statistics differ."""
    import tensorflow as tf

    strategy = workers(place)
    with strategy.scope():
        made = distiller()
        variables = made.student.trainable_variables
        speeds = [tf.Variable(tf.zeros_like(variable.value)) for variable in variables]

    def replica(x, y):
        with tf.GradientTape() as tape:
            loss = made.compute_loss(x, y, made(x, training=True))
        context = tf.distribute.get_replica_context()
        found = context.all_reduce("SUM", tape.gradient(loss, [v.value for v in variables]))
        for variable, speed, gradient in zip(variables, speeds, found, strict=True):
            speed.assign(MOMENTUM * speed - RATE * gradient)
            variable.value.assign_add(speed)

    @tf.function
    def step(x, y):
        strategy.run(replica, args=(x, y))

    for _ in range(EPOCHS):
        for x, y in strategy.experimental_distribute_dataset(tf_data()):
            step(x, y)
    return made.student


# name: (function, backend, processes)
WAYS = {"one": (one, "jax", 1), "slices": (slices, "jax", 2), "dataset": (dataset, "jax", 2),
        "arrays": (arrays, "jax", 2), "whole": (whole, "jax", 2),
        "one-tensorflow": (one, "tensorflow", 1), "mirrored": (mirrored, "tensorflow", 1),
        "mirrored-synchronized": (mirrored_synchronized, "tensorflow", 1),
        "workers-fit": (workers_fit, "tensorflow", 2),
        "workers-loop": (workers_loop, "tensorflow", 2)}

# --- processes ------------------------------------------------------------------------


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def launch(way: str, *, python: str = sys.executable, timeout: float = 300) -> list[dict]:
    """Run all processes of a way on this machine; what each reports, with its weights."""
    _, backend, processes = WAYS[way]
    ports = ",".join(map(str, free_ports(2)))
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    end = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        begun = []
        try:
            for rank in range(processes):
                # Files, not pipes: a full pipe would stop one process, and it the other.
                out, error = (stack.enter_context(open(f"{folder}/{rank}.{kind}", "w"))
                              for kind in ("out", "error"))
                begun.append(subprocess.Popen(
                    [python, __file__, way, "--rank", str(rank), "--ports", ports, "--out",
                     f"{folder}/{rank}"], env=environment, stdout=out, stderr=error))
            with contextlib.suppress(subprocess.TimeoutExpired):
                for each in begun:
                    each.wait(max(0, end - time.monotonic()))
        finally:  # one that waits for another that died
            for each in begun:
                each.kill()
                each.wait()
        return [_report(Path(f"{folder}/{rank}"), timeout) for rank in range(processes)]


def _report(path: Path, timeout: float) -> dict:
    lines = [line for line in path.with_suffix(".out").read_text().splitlines()
             if line.startswith("{")]
    error = path.with_suffix(".error").read_text()[-2000:] or f"no word after {timeout:.0f} s"
    report = json.loads(lines[-1]) if lines else {"error": error}
    if path.with_suffix(".npz").exists():
        with np.load(path.with_suffix(".npz")) as file:
            report["weights"] = [file[name] for name in file.files]
    return report


def difference(a: list, b: list) -> float:
    """The largest difference between two lists of weights, BatchNorm's statistics included."""
    return float(max(np.abs(x - y).max() for x, y in zip(a, b, strict=True)))


def take_part(place) -> None:
    """What one process does."""
    sys.path[0] = str(ROOT)
    place.processes, place.counted = WAYS[place.way][2], []
    place.address = f"127.0.0.1:{place.ports.split(',')[0]}"
    began = time.perf_counter()
    try:
        student = WAYS[place.way][0](place)
        weights = [np.asarray(w) for w in student.get_weights()]
        np.savez(f"{place.out}.npz", *weights)
        report = {"rank": place.rank, "images": sum(place.counted),
                  "seconds": round(time.perf_counter() - began, 1)}
    except Exception as error:
        report = {"rank": place.rank, "error": f"{type(error).__name__}: {error}"}
    print(json.dumps(report), flush=True)
    if "error" in report:
        os._exit(1)  # at its end a process would wait for the other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("way", nargs="?", choices=WAYS, default="slices")
    parser.add_argument("--list", action="store_true", help="what the ways are")
    for name, kind in (("--rank", int), ("--ports", str), ("--out", str)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    place = parser.parse_args()
    if place.rank is not None:
        take_part(place)
    elif place.list:
        for name, (function, backend, processes) in WAYS.items():
            print(f"{name:22} {backend:10} {processes}  {function.__doc__}")
    else:
        for report in (reports := launch(place.way)):
            print({key: value for key, value in report.items() if key != "weights"})
        alone = launch("one" if WAYS[place.way][1] == "jax" else "one-tensorflow")[0]
        for report in reports:
            if "weights" in report:
                print("largest difference to one process:",
                      difference(alone["weights"], report["weights"]))


if __name__ == "__main__":
    main()
