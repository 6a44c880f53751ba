"""Speed, start and memory, side by side with public baselines. Run by hand, on a quiet machine:

    pip install torch==2.13.0  (of the benchmark only; never of the project)
    KD_DATA_DIR=... python tests/benchmark.py [start training distilling table memory]

Prints one table and writes reference/benchmark.csv. Every ratio is the median over pairs
measured in turn, with its range. The PyTorch side gets its batches ready-made in memory; ours
runs its whole pipeline, augmentation and metrics included.
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from reference import recipes, runs, store  # isort: skip  (first: keeps TensorFlow quiet)
import kdlib
import keras
import numpy as np
import pandas as pd
import tensorflow as tf
import torch
from torch import nn
from torch.nn import functional as F

REPEATS = 5
STEPS = 48  # in an "epoch" of the comparisons
ROWS = []


def record(figure, values, unit):
    """Keep the median and the range of some measurements."""
    values = np.atleast_1d(np.asarray(values, float))
    row = {"figure": figure, "value": np.median(values), "low": values.min(),
           "high": values.max(), "unit": unit, "machine": store.machine()}
    ROWS.append(row)
    print("{figure:38} {value:10.3f} {low:10.3f} {high:10.3f}  {unit}".format(**row), flush=True)
    return row["value"]


def seconds(function):
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def in_turn(functions, repeats=REPEATS):
    """Seconds of each function, called in turn so that a slow moment hits all alike."""
    for function in functions.values():
        function()  # compile, warm caches
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return {name: np.array(values) for name, values in times.items()}


def matmul_rate():
    """GFLOP/s of a large float32 product: what the machine can do at best."""
    a = tf.random.normal((2048, 2048))
    product = tf.function(lambda: tf.linalg.matmul(a, a))
    times = in_turn({"matmul": lambda: product().numpy()}, repeats=20)["matmul"]
    return record("matmul_rate", 2 * 2048**3 / times / 1e9, "GFLOP/s")


def forward_flops(model):
    kinds = (keras.layers.Conv2D, keras.layers.Dense)
    return 2 * sum(np.prod(layer.kernel.shape) * np.prod(layer.output.shape[1:-1])
                   for layer in model.layers if isinstance(layer, kinds))


# --- ours ---


def trainer_epochs(dataset, recipe, model, *, teacher=None, logits=None):
    """A function that trains for one short epoch, as runs.py does it."""
    trainer = keras.Sequential([model]) if teacher is None else kdlib.Distiller(
        student=model, teacher=teacher, temperature=4, alpha=0.1)
    trainer.compile(
        optimizer=runs.make_optimizer(recipe, STEPS, last_layer="logits"), jit_compile=False,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[], weighted_metrics=["accuracy"], steps_per_execution=24,
    )

    def epoch():
        batches = runs.Batches(dataset, replace(recipe, views=1), seed=0, answers=logits)
        with recipes.fused_norm(model):
            trainer.fit(batches, steps_per_epoch=STEPS, epochs=1, shuffle=False, verbose=0)

    return epoch


# --- the same networks in PyTorch ---


def torch_twin(model):
    """The layers of a kdlib network, one by one, in PyTorch."""
    twin, channels = [Normalise()], 3
    for layer in model.layers:
        if isinstance(layer, keras.layers.Conv2D):
            size = layer.kernel_size[0]
            twin += [nn.ZeroPad2d((0, 1, 0, 1))] if size == 2 else []
            twin += [nn.Conv2d(channels, layer.filters, size, bias=False,
                               padding=size // 2 if size % 2 else 0)]
            channels = layer.filters
        elif isinstance(layer, keras.layers.MaxPooling2D):
            twin += [nn.MaxPool2d(2)]
        elif isinstance(layer, keras.layers.BatchNormalization):
            twin += [nn.BatchNorm2d(channels)]
        elif isinstance(layer, keras.layers.ReLU):
            twin += [nn.ReLU(inplace=True)]
        elif isinstance(layer, keras.layers.GlobalMaxPooling2D):
            twin += [nn.AdaptiveMaxPool2d(1), nn.Flatten()]
        elif isinstance(layer, keras.layers.Dropout):
            twin += [nn.Dropout(layer.rate)]
        elif isinstance(layer, keras.layers.Dense):
            twin += [nn.Linear(channels, layer.units)]
    twin = nn.Sequential(*twin).to(memory_format=torch.channels_last)
    trainable = sum(np.prod(v.shape) for v in model.trainable_variables)
    assert sum(p.numel() for p in twin.parameters()) == trainable
    return twin


class Normalise(nn.Module):
    def forward(self, x):
        return (x.float() - 122.0) / 63.0


def torch_images(count, layout=torch.channels_last):
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    return images.contiguous(memory_format=layout), torch.randint(0, 10, (count,))


def torch_epochs(net, optimizer, batch):
    images, labels = torch_images(batch)

    def epoch():
        net.train()
        for _ in range(STEPS):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()

    return epoch


# --- the figures ---


def training_and_inference(dataset):
    rate = matmul_rate()
    for role, build in (("student", kdlib.build_student), ("teacher", kdlib.build_teacher)):
        recipe = replace(runs.recipe_for(dataset, role), epochs=1)
        sgd = replace(recipe, optimizer="sgd", weight_decay=5e-3)
        model, twin = build(), torch_twin(build())
        images, count = dataset.x_val[:2000], STEPS * recipe.batch_size
        ready = torch_images(2000)[0]
        optimizer = torch.optim.SGD(twin.parameters(), 0.01, momentum=0.9, nesterov=True,
                                    weight_decay=5e-4)

        def torch_inference(twin=twin, ready=ready):
            twin.eval()
            with torch.inference_mode():
                for chunk in ready.split(500):
                    twin(chunk)

        times = in_turn({
            "muon": trainer_epochs(dataset, recipe, build()),
            "sgd": trainer_epochs(dataset, sgd, build()),
            "torch": torch_epochs(twin, optimizer, recipe.batch_size),
            "inference": lambda m=model, x=images: runs.predict_logits(m, x),
            "torch_inference": torch_inference,
        })
        flops = forward_flops(model)
        record(f"{role}_train", count / times["muon"], "images/s, Muon")
        record(f"{role}_train_sgd", count / times["sgd"], "images/s, SGD")
        record(f"{role}_train_pytorch", count / times["torch"], "images/s, SGD")
        record(f"{role}_train_over_pytorch", times["torch"] / times["sgd"], "ratio, SGD both")
        record(f"{role}_train_share", 3 * flops * count / times["muon"] / rate / 1e9,
               "of matmul_rate")
        record(f"{role}_inference", 2000 / times["inference"], "images/s")
        record(f"{role}_inference_pytorch", 2000 / times["torch_inference"], "images/s")
        record(f"{role}_inference_share", flops * 2000 / times["inference"] / rate / 1e9,
               "of matmul_rate")


def distilling_over_scratch(dataset):
    recipe = replace(runs.recipe_for(dataset, "student"), epochs=1)
    teacher = kdlib.build_teacher()
    logits = np.random.default_rng(0).normal(0, 3, (1, len(dataset.y_train), 10))
    logits = logits.astype("float32")
    times = in_turn({
        "scratch": trainer_epochs(dataset, recipe, kdlib.build_student()),
        "stored": trainer_epochs(dataset, recipe, kdlib.build_student(), teacher=teacher,
                                 logits=logits),
        "live": trainer_epochs(dataset, recipe, kdlib.build_student(), teacher=teacher),
    })
    record("distill_over_scratch_epoch", times["stored"] / times["scratch"], "ratio")
    record("live_distill_over_scratch_epoch", times["live"] / times["scratch"], "ratio")


def tutorial_net(channels, hidden):
    """The networks of the public PyTorch tutorial on distillation."""
    parts, before = [], 3
    for k, width in enumerate(channels):
        parts += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
        parts += [nn.MaxPool2d(2)] if k in (len(channels) // 2 - 1, len(channels) - 1) else []
        before = width
    inner = nn.Sequential(*parts, nn.Flatten())
    size = inner(torch.zeros(1, 3, 32, 32)).shape[1]
    return nn.Sequential(inner, nn.Linear(size, hidden), nn.ReLU(), nn.Dropout(0.1),
                         nn.Linear(hidden, 10))


def tutorial_seconds(steps=100, epochs=10, batch=128):
    """Its teacher, student and distilled student, 10 epochs each, from 100 steps of each."""
    teacher, student = tutorial_net((128, 64, 64, 32), 512), tutorial_net((16, 16), 256)
    images = torch.randn(batch, 3, 32, 32)
    labels = torch.randint(0, 10, (batch,))

    def train(net, teacher=None):
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            logits = net(images)
            loss = F.cross_entropy(logits, labels)
            if teacher is not None:
                with torch.no_grad():
                    soft = F.softmax(teacher(images) / 2, dim=-1)
                loss = loss + 4 * F.kl_div(F.log_softmax(logits / 2, dim=-1), soft,
                                           reduction="batchmean")
            loss.backward()
            optimizer.step()

    spent = seconds(lambda: (train(teacher), train(student), train(student, teacher)))
    return spent / steps * epochs * -(-50_000 // batch)


def time_to_the_original_table(dataset):
    """Seconds from data on disk to models at least as good as those of the original course.

    Two epochs for each of the three; whether that is enough, the accuracies below say.
    """
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(
        os.environ, KD_RETRAIN="1", KD_RUNS_DIR=folder
    ):
        short, rows = replace(runs.recipe_for(dataset, "teacher"), epochs=2), {}

        def everything():
            teacher = runs.train_or_load("teacher", dataset, recipe=short)
            rows["teacher"] = teacher.row["test_accuracy"]
            for method in ("distilled", "scratch"):
                run = runs.train_or_load(method, dataset, teacher=teacher, recipe=short)
                rows[method] = run.row["test_accuracy"]

        ours = record("ours_to_original_table", seconds(everything), "s")
    for name, floor in (("teacher", 0.7665), ("distilled", 0.7075), ("scratch", 0.0)):
        record(f"ours_{name}_accuracy", rows[name], "test accuracy")
        assert rows[name] >= floor, f"{name} stays below the original course"
    peer = [tutorial_seconds() for _ in range(3)]
    record("peer_seconds", peer, "s, from 100 steps of each")
    record("peer_seconds_over_ours_to_original_table", np.array(peer) / ours, "ratio")


def start():
    """Seconds that kdlib and its data need beyond ``import keras``."""
    def run(code):
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    times = in_turn({"keras": lambda: run("import keras"),
                     "kdlib": lambda: run("import reference, kdlib; kdlib.load_dataset()")})
    record("import_keras", times["keras"], "s")
    record("start_beyond_keras", times["kdlib"] - times["keras"], "s")


def memory():
    """Peak of a process that trains a teacher on the whole dataset and measures it."""
    # VmHWM: ru_maxrss would count what this process here had when it forked.
    code = ("from dataclasses import replace; from reference import runs; import kdlib;"
            "data = kdlib.load_dataset(); recipe = runs.recipe_for(data, 'teacher');"
            "runs.train_or_load('teacher', data, recipe=replace(recipe, epochs=1));"
            "print(open('/proc/self/status').read())")
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "KD_RETRAIN": "1", "KD_RUNS_DIR": folder}
        done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, text=True,
                              env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    kilobytes = int(done.stdout.partition("VmHWM:")[2].split()[0])
    record("training_peak_memory", kilobytes / 2**20, "GiB")


def main(parts):
    """Measure the named parts, by default all; rows of other parts stay as they were."""
    dataset = kdlib.load_dataset("cifar10")
    for name, part in PARTS.items():
        if not parts or name in parts:
            part(dataset)
    path = runs.REFERENCE / "benchmark.csv"
    rows = pd.DataFrame(ROWS).round(4)
    if parts and path.exists():
        before = pd.read_csv(path)
        rows = pd.concat([before[~before.figure.isin(rows.figure)], rows])
    rows.to_csv(path, index=False)


PARTS = {
    "start": lambda dataset: start(),
    "training": training_and_inference,
    "distilling": distilling_over_scratch,
    "table": time_to_the_original_table,
    "memory": lambda dataset: memory(),
}


if __name__ == "__main__":
    main(sys.argv[1:])
