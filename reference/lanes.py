"""Train the seeds of an experiment side by side on one accelerator, with JAX. For part I.

    KERAS_BACKEND=jax TF_CPP_MIN_LOG_LEVEL=1 python reference/lanes.py OUT NAME...
    python reference/lanes.py OUT --publish

The first line trains, where the accelerator is; it needs no TensorFlow. The second measures what
came back, on any machine, and publishes it. A lane is one seed, or one trial of a weight. All lanes
take Keras's own training step at once, and an epoch is one call to the device. It is compiled once
for experiments that differ in alpha and weight alone. Convolutions compute in bfloat16, everything
else in float32. Sums may run in another order the next time, so a
second training need not give the same bits.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # run as a file: the project's folder is not on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import kdlib
import keras
import numpy as np
from keras import layers, ops

from reference import accelerated, digests, features, fingerprints, recipes, store
from reference.accelerated import augment

with contextlib.suppress(ImportError):  # publishing needs none
    import jax

LANES = 5  # fewer are filled up, so that one compiled epoch serves seeds and trials
DRAWING = threading.Lock()  # first weights come from one generator, which threads share


# --- on the device --------------------------------------------------------------------


class _Rounded(layers.Conv2D):
    """Conv2D in bfloat16."""

    def call(self, inputs):
        outputs = ops.cast(self._convolved(ops.cast(inputs, "bfloat16"),
                                           ops.cast(self.kernel, "bfloat16")), "float32")
        return self.activation(outputs + self.bias if self.use_bias else outputs)

    def _convolved(self, images, kernel):
        return ops.conv(images, kernel, padding="same")


class _AsProduct(_Rounded):
    """The same as a matrix product, which stays one if each lane has a kernel of its own."""

    def _convolved(self, images, kernel):
        (rows, cols), (height, width) = self.kernel_size, images.shape[1:3]
        padded = ops.pad(images, [[0, 0], [(rows - 1) // 2, rows // 2],
                                  [(cols - 1) // 2, cols // 2], [0, 0]])
        patches = ops.concatenate([padded[:, r : r + height, c : c + width]
                                   for r in range(rows) for c in range(cols)], axis=-1)
        kernel = ops.reshape(kernel, (-1, self.filters))
        return jax.lax.dot_general(patches, kernel, (((3,), (0,)), ((), ())), precision="default")


def rounded(model, kind) -> None:
    """Let a model's convolutions compute in bfloat16. Its weights stay what they are."""
    for layer in model._flatten_layers():
        if type(layer) is layers.Conv2D:
            plain = layer.strides == layer.dilation_rate == (1, 1) and layer.groups == 1
            kdlib.require(plain and (layer.padding == "same" or layer.kernel_size == (1, 1)),
                          f"{layer.name} has strides, dilation, groups, or another padding than "
                          "'same'. That is not known here.")
            layer.__class__ = kind


class Kind:
    """What lanes share: the trainer, and its epoch, which is compiled once.

    each: one of the experiments that are alike. teacher: computes in bfloat16, for losses on
    features.
    """

    def __init__(self, each, dataset, teacher):
        self.each, self.dataset, self.recipe = each, dataset, each.full_recipe()
        on_features = each.loss and not features.METHODS[each.loss].on_logits
        self.teacher = teacher if on_features else None
        self.steps = len(dataset.y_train) // self.recipe.batch_size
        kdlib.require(self.steps * self.recipe.batch_size == len(dataset.y_train),
                      f"batch_size is {self.recipe.batch_size}. It has to divide the images.")
        self.trainer = self.made(each.seeds[0])
        self.student = getattr(self.trainer, "student", self.trainer)
        recipes.compile_for(self.trainer, self.recipe, dataset, distilled=each.distilled,
                            last_layer=self.student.layers[-1].name)
        self.trainer.optimizer.build(self.trainer.trainable_variables)
        self.trainer.optimizer._learning_rate = accelerated._Given()
        self.clean = [[np.asarray(v) for v in kept] for kept in (
            self.trainer.optimizer.variables, self.trainer.metrics_variables)]
        every = *self.trainer.trainable_variables, *self.trainer.non_trainable_variables
        place = {id(variable): k for k, variable in enumerate(every)}
        self.places = [[place[id(variable)] for variable in own] for own in (
            self.student.trainable_variables, self.student.non_trainable_variables,
            self.student.weights)]
        rounded(self.trainer, _AsProduct)

    def made(self, seed: int):
        """The student of a seed, inside of what trains it."""
        each = replace(self.each, factor=1.0)  # weight and alpha come with each epoch
        with DRAWING:
            keras.utils.set_random_seed(seed)
            student = (each.build or kdlib.build_student)()
            if not each.distilled:
                return student
            settings = dict(student=student, teacher=self.teacher, alpha=each.alpha,
                            temperature=each.temperature)
            if each.loss is None:
                return kdlib.Distiller(**settings)
            return each.trainer()(**settings, labels=self.dataset.y_train)

    def first(self, seed: int) -> tuple:
        """A lane before its first step, as Keras's train_step takes it."""
        made = self.made(seed)
        return ([np.asarray(v) for v in made.trainable_variables],
                [np.asarray(v) for v in made.non_trainable_variables], *self.clean)

    def run_epoch(self, state, weight, alpha, x, y, codes, answers, order, rates):
        """One epoch of one lane. Returns its state and what Keras logs."""
        def step(state, given):
            index, rate = given
            seen = augment(x[index], codes[index])
            if answers is not None:
                number = [ops.cast(index, "float32")[:, None]] if self.each.loss == "crd" else []
                seen = seen, ops.concatenate([answers[index], *number], axis=-1)
            self.trainer.optimizer._learning_rate.now = rate
            if self.each.distilled:
                self.trainer._alpha, self.trainer.weight = alpha, weight
            logs, state = self.trainer.train_step(state, (seen, y[index]))
            return state, logs

        state = (*state[:3], self.clean[1])  # each epoch's metrics begin anew
        state, logs = jax.lax.scan(step, state, (order, rates))
        return state, {key: value[-1] for key, value in logs.items()}

    def traced(self, x, y):
        """The epoch of all lanes, not yet compiled."""
        def shape(like, *more):
            return jax.ShapeDtypeStruct((*more, *like.shape), like.dtype)

        own = (self.trainer.trainable_variables, self.trainer.non_trainable_variables, *self.clean)
        state = [[shape(np.asarray(v), LANES) for v in kept] for kept in own]
        answers = np.zeros((len(y), len(self.dataset.class_names)), "float32")
        order = np.zeros((LANES, self.steps, self.recipe.batch_size), "int32")
        rates, number = np.zeros(self.steps, "float32"), np.zeros(LANES, "float32")
        every = jax.vmap(self.run_epoch, in_axes=(0, 0, 0, None, None, None, None, 0, None))
        return jax.jit(every, donate_argnums=0).lower(
            tuple(state), number, number, x, y, np.zeros((len(y), 3), "int8"),
            answers if self.each.distilled else None, order, rates)

    def rates(self) -> np.ndarray:
        """The learning rate of each step: (epochs, steps)."""
        schedule = recipes.make_optimizer(self.recipe, self.steps, last_layer="")._learning_rate
        steps = np.arange(self.recipe.epochs * self.steps, dtype="float32")
        return np.reshape(jax.vmap(schedule)(steps), (-1, self.steps)).astype("float32")

    def values(self, state) -> list[list]:
        """The student's trainable variables, its others, and its weights in Keras's order."""
        every = *state[0], *state[1]
        return [[every[k] for k in own] for own in self.places]


def alike(each) -> tuple:
    """Equal for experiments that differ in weight and alpha alone."""
    return each.distilled, each.temperature, each.build, replace(each, factor=1.0).trainer()


@functools.cache
def _judging(build: Callable):
    """A function (students, images, labels) that gives the accuracy of each lane, in float32."""
    judge = build()

    def accuracy(student, x, y):
        logits = jax.lax.map(lambda images: judge.stateless_call(
            *student, images, training=False)[0], _blocks(x, 500))
        logits = ops.reshape(logits, (-1, logits.shape[-1]))
        return ops.mean(ops.cast(ops.argmax(logits, axis=-1) == y, "float32"))
    return jax.jit(lambda students, x, y: jax.lax.map(lambda one: accuracy(one, x, y), students))


def _blocks(array, size: int):
    """In blocks that fit into memory."""
    return ops.reshape(array, (-1, math.gcd(len(array), size), *array.shape[1:]))


def train(kind: Kind, epoch: Callable, lanes: list, x, y, codes, answers) -> list[dict]:
    """Train all lanes, (seed, weight, alpha) each. Returns weights and history of each.

    Batches and views are those of recipes.Batches. answers: the teacher's, for each view.
    """
    asked = len(lanes)
    lanes = lanes + lanes[-1:] * (LANES - asked)  # as many as were compiled for
    seeds, *numbers = zip(*lanes, strict=True)
    state = jax.tree.map(lambda *parts: np.stack(parts), *map(kind.first, seeds))
    numbers, rates = np.array(numbers, "float32"), kind.rates()
    judge = _judging(kind.each.build or kdlib.build_student)
    history = [{} for _ in range(asked)]
    for k in range(kind.recipe.epochs):
        started, view = time.perf_counter(), k % kind.recipe.views
        order = np.stack([np.random.default_rng([seed, k]).permutation(len(y))
                          for seed in seeds]).astype("int32")
        state, logs = epoch(state, *numbers, x, y, codes[view],
                            answers[view] if kind.each.distilled else None,
                            order.reshape(len(lanes), kind.steps, -1), rates[k])
        logs = {key: np.asarray(value) for key, value in logs.items()}
        logs["val_accuracy"] = np.asarray(
            judge(kind.values(state)[:2], kind.dataset.x_val, kind.dataset.y_val))
        share = (time.perf_counter() - started) / asked
        for lane, one in enumerate(history):
            for key, values in (logs | {"seconds": np.full(asked, share)}).items():
                one.setdefault(key, []).append(round(float(values[lane]), 5))
    weights = [np.asarray(value) for value in kind.values(state)[2]]
    return [{"weights": [value[lane] for value in weights], "history": one}
            for lane, one in enumerate(history)]


# --- what to train --------------------------------------------------------------------


def chosen(names: list[str]) -> list:
    """The experiments of these names, in this order. Raises ValueError for one of others."""
    from reference import plan

    known = {each.method: each for each in plan.EXPERIMENTS
             if each.engine == "lanes" and not each.choice}
    for name in names:
        kdlib.require(name in known, f"{name} is not made by lanes.py; plan.py says what is.")
    return [known[name] for name in names]


class Session:
    """Trains experiments of one teacher, one after the other, each after its trials."""

    def __init__(self, folder: Path, experiments: list, dataset=None, log=print):
        jax.config.update("jax_default_matmul_precision", "float32")
        self.folder, self.experiments, self.begun = folder, experiments, time.perf_counter()
        self.dataset, self.log = dataset or kdlib.load_dataset("cifar10"), log
        self.data = jax.device_put((self.dataset.x_train, self.dataset.y_train))
        self.digest = fingerprints.data_digest(self.dataset)
        self.teacher, self.rounded = (_published("teacher-seed0") for _ in range(2))
        rounded(self.rounded, _Rounded)
        recipe, *others = {each.full_recipe() for each in experiments}
        kdlib.require(not others and recipe.views, "these experiments have several recipes, or no "
                      "views. Give those of one recipe, with stored answers.")
        self.codes = kdlib.view_codes(images=len(self.dataset.y_train), views=recipe.views,
                                      shift=recipe.shift, flip=recipe.flip)
        self.answers = self._ask(min(recipe.views, recipe.epochs))

    def _ask(self, views: int) -> list:
        """The teacher's logits for each view of all training images, kept on the device."""
        def ask(x, codes):
            found = jax.lax.map(lambda two: self.teacher(augment(*two), training=False),
                                (_blocks(x, 1000), _blocks(codes, 1000)))
            return ops.reshape(found, (-1, found.shape[-1]))

        compiled = jax.jit(ask)
        return [compiled(self.data[0], codes) for codes in self.codes[:views]]

    def __call__(self, seconds: float = math.inf) -> None:
        """Train them all; begin nothing after so many seconds."""
        tracing, compiling = ThreadPoolExecutor(1), ThreadPoolExecutor()

        def prepare(each):
            kind = Kind(each, self.dataset, self.rounded)
            return kind, compiling.submit(kind.traced(*self.data).compile)

        ready = {}
        for each in self.experiments:
            if alike(each) not in ready:
                ready[alike(each)] = tracing.submit(prepare, each)
        for each in self.experiments:
            if time.perf_counter() - self.begun > seconds:
                self.log(f"{each.method} is left out: no time is left")
                continue
            try:
                kind, epoch = ready[alike(each)].result()
                self._make(each, kind, epoch.result())
            except Exception as error:  # time on the device is scarce: the others go on
                self.log(f"{each.method} failed: {error!r}"[:2000])
        for pool in (tracing, compiling):
            pool.shutdown(cancel_futures=True)

    def _make(self, each, kind: Kind, epoch: Callable) -> None:
        if each.loss and each.factor is None:
            trials = each.trials()
            found = self._trained([(trial, 100) for trial in trials], kind, epoch)
            worth = [_worth(one["history"]) for one in found]
            if max(worth) < 0:
                self.log(f"all trials of {each.method} diverged")
                return
            each = replace(each, factor=trials[worth.index(max(worth))].factor)
        self._trained([(each, seed) for seed in each.seeds], kind, epoch)

    def _trained(self, todo: list, kind: Kind, epoch: Callable) -> list[dict]:
        """Train what is to be done, (experiment, seed) each, and write it."""
        kdlib.require(len(todo) <= LANES, f"{len(todo)} runs at once, but LANES is {LANES}.")
        lanes = [(seed, each.trainer().weight if each.loss else 1.0, each.alpha)
                 for each, seed in todo]
        found = train(kind, epoch, lanes, *self.data, self.codes, self.answers)
        for one, (each, seed) in zip(found, todo, strict=True):
            write(self.folder, one, terms(each, seed, self.digest, self.teacher))
        accuracies = " ".join(f"{100 * _worth(one['history']):.2f}" for one in found)
        self.log(f"{todo[0][0].method}: {accuracies}, "
                 f"after {time.perf_counter() - self.begun:.0f} s")
        return found


def _published(name: str):
    from reference import runs

    return runs.published(f"cifar10-{name}")


def _worth(history: dict) -> float:
    """The last validation accuracy, -1 if the training diverged."""
    finite = all(np.isfinite(values).all() for values in history.values())
    return history["val_accuracy"][-1] if finite else -1.0


def terms(each, seed: int, data: str, teacher) -> dict:
    """What has to be the same where a run is trained and where it is published."""
    from reference import lanes, runs  # by its name, also where this file is the program

    code = lanes, *([each.trainer()] if each.loss else [])
    return {"code": [runs.CODE, *(fingerprints.identity_of(part)["code"] for part in code)],
            "name": each.method, "seed": seed, "data": data, "temperature": each.temperature,
            "alpha": each.alpha, "recipe": each.full_recipe().settings(),
            "weight": each.trainer().weight if each.loss else None,
            "teacher": digests.digest(*teacher.get_weights()) if each.distilled else None}


def write(folder: Path, one: dict, terms: dict) -> None:
    """Weights and notes of a run, in one file."""
    notes = {"terms": terms, "history": one["history"], "machine": jax.devices()[0].device_kind,
             "versions": f"jax {jax.__version__}, keras {keras.__version__}, "
                         f"numpy {np.__version__}"}
    weights = {f"{k:03d}": value for k, value in enumerate(one["weights"])}
    folder.mkdir(parents=True, exist_ok=True)
    store.write_whole(folder / f"{terms['name']}-seed{terms['seed']}.npz",
                      lambda aside: np.savez(aside, notes=json.dumps(notes), **weights))


# --- publishing -----------------------------------------------------------------------


def identity() -> tuple[dict, list]:
    """Settings that no recipe has, and the code that acts on the numbers."""
    return {"engine": "lanes", "convolutions": "bfloat16"}, [
        augment, _Rounded, _AsProduct, rounded, Kind, _judging, _blocks, train, Session, _worth,
        accelerated._Given]


def publish(folder: Path, log=print) -> None:
    """Measure every run in a folder on this machine, in float32, and publish it."""
    from reference import experiments, plan

    dataset, teacher = kdlib.load_dataset("cifar10"), _published("teacher-seed0")
    data = fingerprints.data_digest(dataset)
    for each in plan.EXPERIMENTS:  # trials come before what they choose
        for seed in each.seeds if each.engine == "lanes" else ():
            path = folder / f"{each.method}-seed{seed}.npz"
            if path.exists() and experiments.notes_of(each, seed) is None:
                try:
                    log(path.stem, publish_one(path, each, seed, dataset, data, teacher))
                except store.UNREADABLE as error:  # the others are published
                    log(path.stem, "is not published:", error)


def publish_one(path: Path, each, seed: int, dataset, data: str, teacher) -> str:
    """Publish one run; returns a word on it. data: the digest of the dataset. Raises ValueError if
    it was trained on other terms."""
    from reference import experiments

    with np.load(path) as file:
        notes = json.loads(str(file["notes"]))
        weights = [file[key] for key in file.files if key != "notes"]
    for key, value in terms(each, seed, data, teacher).items():
        kdlib.require(notes["terms"][key] == value, f"{path.name} was trained with another {key} "
                      f"({notes['terms'][key]}) than it is published with ({value}).")
    model, history = (each.build or kdlib.build_student)(), notes["history"]
    kdlib.require(len(history["loss"]) == each.full_recipe().epochs,
                  f"{path.name} has {len(history['loss'])} epochs.")
    model.set_weights(weights)
    target = path.with_name(f"{each.stem(seed)}-lanes")
    target.mkdir(exist_ok=True)
    told = model, teacher if each.distilled else None, dataset, (each, seed), history, notes
    if _worth(history) < 0:
        error = FloatingPointError(f"{path.stem}: its loss is not finite")
        error.folder = target
        store.write_notes(target / "diverged.json",
                          accelerated._notes(*told, {}) | {"diverged": str(error)})
        kdlib.require(experiments.publish_divergence(error, each, seed), f"{target} is unknown.")
        return "diverged"
    run = accelerated._measured(target, *told)
    experiments.publish(run, each)
    return f"{run.row['val_accuracy']}, on the device {history['val_accuracy'][-1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Train or publish what plan.py gives to lanes.")
    parser.add_argument("out", type=Path, help="the folder of weights and notes")
    parser.add_argument("name", nargs="*", help="methods to train")
    parser.add_argument("--seconds", type=float, default=math.inf,
                        help="begin nothing after so many")
    parser.add_argument("--publish", action="store_true", help="measure and publish what is there")
    options = parser.parse_args()
    if options.publish:
        publish(options.out)
        return
    if not options.name:
        parser.error("name is missing: which experiments of plan.py?")
    log = functools.partial(print, flush=True)
    Session(options.out, chosen(options.name), log=log)(options.seconds)


if __name__ == "__main__":
    main()
