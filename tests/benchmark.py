"""Speed, start and memory, side by side with PyTorch. Run by hand, on a quiet machine:

    python -m venv elsewhere && elsewhere/bin/pip install torch==2.13.0 numpy
    KD_TORCH_PYTHON=elsewhere/bin/python KD_DATA_DIR=... python tests/benchmark.py --twice

Prints a table and writes reference/benchmark.csv. With names of parts: only those. Notebooks 08
and 10 read its rates: run them again afterwards.
- PyTorch runs in a process of its own: both libraries in one can crash. Its networks are ours,
  and so is its work: views made by kdlib.augment, loss, step, accuracy. Images lie channels last
  in memory, and, in the rows "usual", channels first. (The tutorial's networks do what the
  tutorial does: batches lie ready in memory.)
  What comes before the first batch of a ``fit`` (0.05 s) doesn't count: epochs are longer.
- A rented machine gives half its rate for seconds at a time. So what is compared runs in short
  bursts, in turn. Each counts with a low quantile over many rounds, its time when nothing
  disturbs it. Low and high: a bootstrap over the rounds (95 %). --twice does all of it again.
"""

import argparse
import ast
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
import timeit
from dataclasses import replace
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
QUANTILE = 0.1  # beside other work, PyTorch's median was 2.7 times as much, ours 1.2 times
seconds = functools.partial(timeit.timeit, number=1)  # of a function's single call

# --- the other process: PyTorch -------------------------------------------------------

NETS = {  # first kernel; width of each convolution, and whether pooling follows; parameters
    "student": (3, [(24, 1), (40, 0), (40, 1), (72, 0), (56, 0)], 86_930),
    "teacher": (2, [(24, 0), (64, 1), (64, 0), (128, 1), (128, 0), (128, 1), (128, 0)], 569_690),
    "tutorial student": (3, [(16, 1), (16, 1)], 267_738),
    "tutorial teacher": (3, [(128, 0), (64, 1), (64, 0), (32, 1)], 1_186_986)}


@functools.cache
def torch_net(role, usual=False):
    """A kdlib network, or one of the public PyTorch tutorial on distillation. Its optimizer."""
    (kernel, widths, parameters), parts, c, tutorial = NETS[role], [], 3, "tutorial" in role
    for width, pooled in widths:
        conv = nn.Conv2d(c, width, kernel, padding="same", bias=tutorial)
        pool, kernel, c = [nn.MaxPool2d(2)] * pooled, 3, width
        parts += ([conv, nn.ReLU(), *pool] if tutorial else
                  [conv, *pool, nn.BatchNorm2d(width), nn.ReLU(inplace=True)])
    parts += ([nn.Flatten(), nn.Linear(64 * c, 16 * c), nn.ReLU(), nn.Dropout(0.1)] if tutorial else
              [nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Dropout(0.2 * (role == "teacher"))])
    net = nn.Sequential(*parts, nn.Linear(16 * c if tutorial else c, 10))
    assert sum(p.numel() for p in net.parameters()) == parameters
    if tutorial:
        return net, torch.optim.Adam(net.parameters(), 1e-3)
    if not usual:
        net.to(memory_format=torch.channels_last)  # faster here than PyTorch's usual order
    return net, torch.optim.SGD(net.parameters(), 0.01, 0.9, weight_decay=5e-4, nesterov=True)


@functools.cache
def ready(role, batch, count):
    """Batches of images (N, H, W, C), in the order that is fastest here, and labels."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, batch, 32, 32, 3), "uint8")
    if "tutorial" in role:
        images = [torch.from_numpy(some).permute(0, 3, 1, 2).contiguous() for some in images]
    return list(zip(images, torch.from_numpy(rng.integers(0, 10, (count, batch))), strict=True))


@functools.cache
def lifted(name):
    """A function of kdlib.py, without Keras."""
    (code,) = [node for node in ast.parse((ROOT / "kdlib.py").read_text()).body
               if getattr(node, "name", None) == name]
    exec(compile(ast.Module([code], []), "kdlib.py", "exec"), space := {"np": np})
    return space[name]


def on_its_scale(pixels):
    if not torch.is_tensor(pixels):
        pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2)  # stays channels last in memory
    return (pixels.float() - 122) / 63


def torch_training(role, batch, count, teacher=None, usual=False):
    """So many steps. With a teacher: the tutorial's distillation. usual: channels first."""
    net, optimizer = torch_net(role, usual)
    codes = lifted("view_codes")(images=batch, views=1, shift=4, flip=True)[0]
    right = 0
    for pixels, labels in ready(role, batch, count):
        images = on_its_scale(pixels if "tutorial" in role else lifted("augment")(pixels, codes))
        images = images.contiguous() if usual else images
        optimizer.zero_grad()
        answers = net.train()(images)
        loss = F.cross_entropy(answers, labels)
        if teacher:
            with torch.no_grad():
                soft = F.softmax(torch_net(teacher)[0].eval()(images) / 2, dim=-1)
            learned = F.log_softmax(answers / 2, dim=-1)
            loss = 0.75 * loss + 0.25 * 4 * F.kl_div(learned, soft, reduction="batchmean")
        loss.backward()
        optimizer.step()
        right += (answers.argmax(-1) == labels).sum()


def torch_inference(role, batch, count):
    with torch.inference_mode():
        for pixels, _ in ready(role, batch, count):
            torch_net(role)[0].eval()(on_its_scale(pixels))


if sys.argv[1:] == ["pytorch"]:  # a line in: which burst, with which arguments. Seconds out.
    import numpy as np
    import torch
    from torch import nn
    from torch.nn import functional as F
    print(torch.__version__, flush=True)
    for line in sys.stdin:
        kind, given = json.loads(line)
        print(seconds(functools.partial(globals()[kind], **given)), flush=True)
    sys.exit()


# --- this process ---------------------------------------------------------------------

sys.path.insert(0, str(ROOT))
from reference import features, fingerprints, plan, recipes, runs  # isort: skip  (keeps TensorFlow quiet)
import kdlib
import keras
import numpy as np
import pandas as pd
import tensorflow as tf


@functools.cache
def torch_process():
    """It ends when its standard input does. -W: it warns of padding for kernels of 2 x 2."""
    python = os.environ.get("KD_TORCH_PYTHON", sys.executable)
    process = subprocess.Popen([python, "-W", "ignore", __file__, "pytorch"], text=True, bufsize=1,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    version = process.stdout.readline().strip()
    kdlib.require(version, f"{python} has no PyTorch. Set KD_TORCH_PYTHON to one that has.")
    print("PyTorch", version)
    return process


def in_torch(kind, **given):
    """A burst of the other process."""
    process, line = torch_process(), json.dumps([kind, given]) + "\n"
    return lambda: process.stdin.write(line) and float(process.stdout.readline())


def in_turn(bursts, rounds):
    """Seconds of each burst in each round. A burst is a function that returns its seconds."""
    order, times = np.random.default_rng(0), {name: [] for name in bursts}
    for _ in range(1 + rounds):
        for name in order.permutation(list(bursts)):  # nothing always runs behind the same other
            times[name].append(bursts[name]())
    return {name: np.array(values[1:]) for name, values in times.items()}  # the first traces


def figure(name, unit, times, formula):
    """A row: a formula of the bursts' undisturbed seconds. Its range: other draws of rounds."""
    rounds = len(next(iter(times.values())))
    draws = [np.arange(rounds), *np.random.default_rng(0).integers(rounds, size=(400, rounds))]
    value, *others = [formula({key: np.quantile(t[draw], QUANTILE) for key, t in times.items()})
                      for draw in draws]
    return row(name, unit, value, *np.quantile(others, [0.025, 0.975]))


def row(name, unit, value, low=np.nan, high=np.nan):
    print(f"{name:42} {value:10.3f} {low:10.3f} {high:10.3f}  {unit}", flush=True)
    return {"figure": name, "value": value, "low": low, "high": high, "unit": unit}


def ratio(name, times, above, below):
    return figure(name, "ratio", times, lambda t: t[above] / t[below])


class Clock(keras.callbacks.Callback):
    """Seconds of each execution, by model. A wrapper trains, the model in it predicts."""

    def __init__(self):
        super().__init__()
        self.spent = {}

    def on_train_batch_begin(self, batch, logs=None):
        self.first, self.begin = batch == 0, time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        now = time.perf_counter()
        self.spent.setdefault((self.model, self.first), []).append(now - self.begin)

    on_predict_batch_begin, on_predict_batch_end = on_train_batch_begin, on_train_batch_end

    def lost(self):
        """What slow spells took, beyond the undisturbed time. A call's first one may trace."""
        later = [np.array(spent) for (_, first), spent in self.spent.items() if not first]
        return sum(np.maximum(0, some - np.quantile(some, QUANTILE)).sum() for some in later)


def on_the_clock(run):
    """Seconds of all executions in ``run``."""
    run(clock=(clock := Clock()))
    return sum(map(sum, clock.spent.values()))


def predict_logits(model, images, *, role=None, clock):
    """What runs.predict_logits does, but for its checks."""
    return model.predict(images, batch_size=500, verbose=0, callbacks=[clock])


def fitting(dataset, role, steps, *, teacher=None, answers=None, make=None, **changes):
    """A burst: so many steps of ``fit``, as in runs.Task.train. make: a features.Trainer."""
    recipe = replace(runs.recipe_for(dataset, role), epochs=1, views=1, **changes)
    images = slice(steps * recipe.batch_size)
    short = replace(dataset, x_train=dataset.x_train[images], y_train=dataset.y_train[images])
    model = getattr(kdlib, f"build_{role}")()
    if teacher is None:
        trainer = keras.Sequential([model])
    elif make is None:
        trainer = kdlib.Distiller(student=model, teacher=teacher, temperature=4, alpha=0.1)
    else:
        trainer = make(student=model, teacher=teacher, temperature=4, alpha=0.1,
                       labels=short.y_train)
        answers = make.lend(answers)
    trainer.compile(
        optimizer=runs.make_optimizer(recipe, 10_000, last_layer="logits"), jit_compile=False,
        loss=None if teacher else keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[], weighted_metrics=["accuracy"], steps_per_execution=steps)

    def fit(clock):
        with recipes.fused_norm(model):
            trainer.fit(runs.Batches(short, recipe, seed=0, answers=answers), epochs=1,
                        shuffle=False, verbose=0, callbacks=[clock])

    return functools.partial(on_the_clock, fit)


# --- the parts: each yields its rows --------------------------------------------------

def start(dataset, rounds):
    """Seconds that kdlib and its data need beyond ``import keras``."""
    def run(code):
        return lambda: seconds(lambda: subprocess.run(
            [sys.executable, "-c", code], check=True, cwd=ROOT, stderr=subprocess.DEVNULL))

    load = "import reference, kdlib; kdlib.load_dataset('cifar10')"
    times = in_turn({"keras": run("import keras"), "ours": run(load)}, -(-rounds // 3))
    yield figure("import_keras", "s", times, lambda t: t["keras"])
    yield figure("start_beyond_keras", "s", times, lambda t: t["ours"] - t["keras"])


def training(dataset, rounds):
    """Training and inference, ours and PyTorch's."""
    square = tf.random.normal((2048, 2048))
    product = tf.function(lambda: tf.linalg.matmul(square, square))
    for role, steps, asked in (("student", 24, 8), ("teacher", 6, 3)):
        model, batch = getattr(kdlib, f"build_{role}")(), runs.recipe_for(dataset, role).batch_size
        assert sum(w.numpy().size for w in model.trainable_weights) == NETS[role][2]
        ask = functools.partial(predict_logits, model, dataset.x_val[: asked * 500])
        times = in_turn({
            "products": lambda: seconds(lambda: [product().numpy() for _ in range(10)]),
            "train": fitting(dataset, role, steps),  # with Muon
            "train_sgd": fitting(dataset, role, steps, optimizer="sgd", weight_decay=5e-3),
            "train_pytorch": in_torch("torch_training", role=role, batch=batch, count=steps),
            "train_pytorch_usual": in_torch("torch_training", role=role, batch=batch, count=steps,
                                            usual=True),
            "inference": functools.partial(on_the_clock, ask),
            "inference_pytorch": in_torch("torch_inference", role=role, batch=500, count=asked),
        }, rounds)
        if role == "student":
            yield figure("matmul_rate", "GFLOP/s", times, lambda t: 20 * 2.048**3 / t["products"])
        for name in list(times)[1:]:
            images = asked * 500 if "inference" in name else steps * batch
            yield figure(f"{role}_{name}", "images/s", times,
                         lambda t, name=name, images=images: images / t[name])
        yield ratio(f"{role}_train_over_pytorch", times, "train_pytorch", "train_sgd")
        yield ratio(f"{role}_train_over_pytorch_usual", times, "train_pytorch_usual", "train_sgd")
        yield ratio(f"{role}_inference_over_pytorch", times, "inference_pytorch", "inference")


def distilling(dataset, rounds):
    learning = functools.partial(fitting, dataset, "student", 24)
    answers = np.random.default_rng(0).normal(0, 3, (1, 24 * 125, 10)).astype("float32")
    times = in_turn({"scratch": learning(), "live": learning(teacher=kdlib.build_teacher()),
                     "stored": learning(teacher=kdlib.build_teacher(), answers=answers)}, rounds)
    yield ratio("distill_over_scratch_epoch", times, "stored", "scratch")
    yield ratio("live_distill_over_scratch_epoch", times, "live", "scratch")


def methods(dataset, rounds):
    """A step of each method of notebook 09, beside a distilling one with stored answers; and the
    peak of a process that makes 24 of them, on few images, as all of CIFAR-10 would hide it."""
    teacher, steps = kdlib.build_teacher(), 12
    answers = np.random.default_rng(0).normal(0, 3, (1, steps * 125, 10)).astype("float32")
    burst = functools.partial(fitting, dataset, "student", steps, teacher=teacher, answers=answers)
    times = in_turn({"plain": burst()} | {name: burst(make=own_trainer(name))
                                          for name in features.METHODS}, -(-rounds // 3))
    code = ("import sys; sys.path.insert(0, 'tests'); import benchmark, kdlib, numpy as np;"
            "images, labels = np.zeros((3000, 32, 32, 3), 'uint8'), np.arange(3000) % 10;"
            "data = kdlib.Dataset('cifar10', kdlib.CIFAR10_CLASSES, *3 * (images, labels));"
            "make = benchmark.own_trainer(name) if (name := {!r}) else None;"
            "answers = np.zeros((1, 3000, 10), 'float32');"
            "benchmark.fitting(data, 'student', 24, teacher=kdlib.build_teacher(),"
            "                  answers=answers, make=make)();")
    yield row("peak_memory_distilling", "GiB", peak(code.format(None)))
    for name in features.METHODS:
        yield ratio(f"{name}_over_distilling_step", times, name, "plain")
        yield row(f"peak_memory_{name}", "GiB", peak(code.format(name)))


def own_trainer(name):
    """A method with its authors' weight, at its own layers of the published pair."""
    method = features.METHODS[name]
    return features.Trainer(name, method.weight, *plan.PLACES[method.where])


def table(dataset, rounds):
    """Until models are at least as good as the original course's: one epoch each is enough. The
    peer is the tutorial."""
    steps = {"teacher": 2, "student": 20, "distilled": 5}
    peer = functools.partial(in_torch, "torch_training", batch=128)
    bursts = {name: peer(role=f"tutorial {name}", count=steps[name]) for name in list(steps)[:2]}
    bursts["distilled"] = peer(role="tutorial student", count=5, teacher="tutorial teacher")
    clock, short = Clock(), replace(runs.recipe_for(dataset, "teacher"), epochs=1)
    ask = functools.partial(predict_logits, clock=clock)
    spent, teacher, peers = seconds(lambda: kdlib.load_dataset("cifar10")), None, []
    with (tempfile.TemporaryDirectory() as folder,
          mock.patch.dict(os.environ, KD_RETRAIN="1", KD_RUNS_DIR=folder),
          mock.patch.object(runs, "predict_logits", ask)):
        for method, original in {"teacher": 0.7665, "distilled": 0.7075, "scratch": 0.646}.items():
            peers.append(in_turn(bursts, -(-rounds // 3)))
            begin = time.perf_counter()
            run = runs.train_or_load(method, dataset, teacher=teacher, recipe=short,
                                     callbacks=[clock])
            spent, teacher = spent + time.perf_counter() - begin, teacher or run
            reached = run.row["test_accuracy"]
            kdlib.require(reached >= original, f"{method} has only {reached}: give it more epochs")
            yield row(f"ours_{method}_accuracy", f"originally {original}", reached)
    times = {name: np.concatenate([some[name] for some in peers]) / steps[name] * 391 * 10
             for name in steps}  # 391 steps an epoch, 10 epochs
    ours = spent - clock.lost()
    yield row("ours_to_original_table", "s, as it was", spent)
    yield row("ours_undisturbed", "s, without slow spells", ours)
    yield figure("peer_seconds", "s, without slow spells", times, lambda t: sum(t.values()))
    yield figure("peer_seconds_over_ours_to_original_table", "ratio", times,
                 lambda t: sum(t.values()) / ours)


def memory(dataset, rounds):
    """Peak of a process that trains a teacher on the whole dataset and measures it."""
    code = ("from dataclasses import replace; from reference import runs; import kdlib;"
            "data = kdlib.load_dataset('cifar10'); recipe = runs.recipe_for(data, 'teacher');"
            "runs.train_or_load('teacher', data, recipe=replace(recipe, epochs=1));")
    yield row("training_peak_memory", "GiB", peak(code))


def peak(code):
    """GiB that a process needs for some code."""
    with tempfile.TemporaryDirectory() as folder:
        status = subprocess.check_output(
            [sys.executable, "-c", code + "print(open('/proc/self/status').read())"], cwd=ROOT,
            text=True, stderr=subprocess.DEVNULL,
            env={**os.environ, "KD_RETRAIN": "1", "KD_RUNS_DIR": folder})
    # in KiB; ru_maxrss counts the parent
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20


PARTS = {part.__name__: part for part in (start, training, distilling, methods, table, memory)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; by default all")
    parser.add_argument("--twice", action="store_true", help="measure all of it again")
    parser.add_argument("--rounds", type=int, default=40, help="how often each burst runs")
    given = parser.parse_args()
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"there is no part {unknown}")
    dataset, path = kdlib.load_dataset("cifar10"), runs.REFERENCE / "benchmark.csv"
    first, *again = [pd.DataFrame(found for name in PARTS if name in (given.parts or PARTS)
                                  for found in PARTS[name](dataset, given.rounds))
                     for _ in range(1 + given.twice)]
    rows = first.assign(again=again[0].value if again else np.nan, machine=fingerprints.machine())
    if given.twice:
        ratios = rows[rows.unit == "ratio"].assign(apart=lambda r: r.again / r.value - 1)
        print(ratios[["figure", "value", "again", "apart"]].to_string(index=False))
        print(f"furthest apart: {ratios.apart.abs().max():.1%}")
    if given.parts:  # rows of other parts stay as they were
        before = pd.read_csv(path)
        rows = pd.concat([before[~before.figure.isin(rows.figure)], rows])
    rows.round(4).to_csv(path, index=False)


if __name__ == "__main__":
    main()
