"""Does the teacher win back what rounding loses? Distillation of a student that is rounded.

    python reference/quantisation.py --list      which rows of quantisation.csv are missing
    python reference/quantisation.py             make them; begun again, it goes on
    python reference/quantisation.py --choose    try learning rates, on validation

Each row begins with a published distilled student. "post-training" rounds it and no more.
"aware-distilled" trains it on, rounded in every step as the file will round it, on the float
teacher's answers; "aware-labels" on hard labels alone. "float-distilled" and "float-labels"
train on without rounding: what more epochs are worth. Accuracies of 8 bits are those of the
real LiteRT file ("litert"), and of 4 bits those of a Keras model that rounds ("simulated").

Seeds 0, 1, 2 begin with the students of these seeds. Seed 100 is for choosing: it begins with
the student of seed 3, and its rows have no test figures. The teacher's arms and the labels'
arms have a rate of their own: of RATES, the one that is best at 4 bits on validation. Where the
smallest or the largest wins, the next one (a factor of three) is tried, too.

The table also has the rows of a first attempt: one epoch, and a rate that was chosen for the
teacher's arm alone.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":  # run as a file: the project's folder is not on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from reference import fingerprints, recipes, runs, shipping, store  # isort: skip  (first: quiet)
import kdlib
import keras
import numpy as np
import pandas as pd
from kdlib import require
from keras import layers, ops
from tqdm.auto import tqdm

COLUMNS = ("dataset method bits runs_on student seed epochs temperature alpha learning_rate "
           "val_accuracy test_accuracy agreement kib seconds machine versions").split()
MEASURED = dict.fromkeys(("val_accuracy", "test_accuracy", "agreement"), 4)  # decimals
SEEDS = (0, 1, 2)
BEGINS = "distilled-one-teacher"
EPOCHS = 3
RATES = (0.0003, 0.001, 0.003)
CHOSEN = {"distilled": 0.001, "labels": 0.001}  # of RATES
CALIBRATION = shipping.CALIBRATION

# --- fake quantisation ----------------------------------------------------------------


def rounded(kernel, *, bits: int):
    """A kernel on the grid that LiteRT uses: symmetric, a scale for each output channel.

    The gradient passes as if nothing had been rounded (straight through). Source: Jacob et
    al. 2018, section 3; Bengio et al. 2013 for the gradient.
    """
    axes = tuple(range(len(kernel.shape) - 1))
    scale = ops.max(ops.abs(kernel), axis=axes, keepdims=True) / (2 ** (bits - 1) - 1)
    scale = ops.maximum(scale, 1e-12)  # of a channel without weights
    return kernel + ops.stop_gradient(ops.round(kernel / scale) * scale - kernel)


class RoundedConv2D(layers.Conv2D):
    bits = 8

    def convolution_op(self, inputs, kernel):
        return super().convolution_op(inputs, rounded(kernel, bits=self.bits))


class RoundedDense(layers.Dense):
    bits = 8

    def call(self, inputs, training=None):
        x = ops.matmul(inputs, rounded(self.kernel, bits=self.bits))
        return self.activation(x if self.bias is None else x + self.bias)


class RoundedActivations(layers.Layer):
    """Activations on a grid of 8 bits between the lowest and the highest that it has watched.

    0 is on the grid. Beyond its ends there is no gradient.
    """

    watching = False

    def build(self, shape):
        self.low = self.add_weight(name="low", initializer="zeros", trainable=False)
        self.high = self.add_weight(name="high", initializer="zeros", trainable=False)

    def call(self, inputs):
        if self.watching:
            self.low.assign(ops.minimum(self.low, ops.min(inputs)))
            self.high.assign(ops.maximum(self.high, ops.max(inputs)))
            return inputs
        scale = ops.maximum((self.high - self.low) / 255, 1e-12)
        zero = ops.round(-self.low / scale)
        inside = ops.clip(inputs, -zero * scale, (255 - zero) * scale)
        return inside + ops.stop_gradient(ops.round(inside / scale) * scale - inside)


def make_rounded(student, *, bits: int, calibration):
    """The same network and weights; kernels have so many bits, activations 8.

    calibration: training images, whose activations decide the ranges.
    """
    require(bits in range(2, 9), f"bits is {bits}. Kernels take 2 to 8 of them.")
    kinds = {layers.Conv2D: RoundedConv2D, layers.Dense: RoundedDense}

    def clone(layer):
        kind = kinds.get(type(layer), type(layer))
        require(not layer.weights or kind is not type(layer) or type(layer) in (
            layers.BatchNormalization, layers.Normalization),
            f"layer {layer.name!r} is a {type(layer).__name__}, and its weights would not be "
            "rounded. Take Conv2D, Dense and BatchNormalization.")
        copy = kind.from_config(layer.get_config())
        copy.bits = bits
        return copy

    def call(layer, *inputs, **more):
        outputs = layer(*inputs, **more)
        ends = isinstance(layer, (layers.Normalization, layers.MaxPooling2D, layers.ReLU,
                                  layers.Dense))
        return RoundedActivations(name=f"rounded_{layer.name}")(outputs) if ends else outputs

    made = keras.models.clone_model(student, clone_function=clone, call_function=call)
    give_weights(made, student)
    calibrate(made, calibration)
    return made


def give_weights(model, source) -> None:
    """Copy the weights of layers of the same name."""
    names = {layer.name for layer in source.layers}
    for layer in model.layers:
        if layer.name in names:
            layer.set_weights(source.get_layer(layer.name).get_weights())


def calibrate(model, images) -> None:
    """Find the ranges of the activations anew, on these images."""
    watchers = [layer for layer in model.layers if isinstance(layer, RoundedActivations)]
    for layer in watchers:
        layer.low.assign(0.0)
        layer.high.assign(0.0)
        layer.watching = True
    model(images, training=False)  # not in a graph: each layer sees its watching
    for layer in watchers:
        layer.watching = False


# --- the trainings --------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """A row of quantisation.csv for each seed."""

    method: str
    bits: int  # of the kernels; 32: nothing is rounded
    alpha: float | None = None  # None: no training

    @property
    def runs_on(self) -> str:
        return {32: "keras", 8: "litert"}.get(self.bits, "simulated")


ARMS = (Arm("float", 32), Arm("float-distilled", 32, 0.1), Arm("float-labels", 32, 1.0),
        Arm("post-training", 8), Arm("aware-distilled", 8, 0.1),
        Arm("post-training", 4), Arm("aware-distilled", 4, 0.1), Arm("aware-labels", 4, 1.0))


def recipe_for(dataset, arm: Arm, *, epochs: int = EPOCHS):
    """The published recipe, shorter and with the arm's own rate: the student is trained already."""
    return replace(runs.recipe_for(dataset, "distilled"), epochs=epochs,
                   learning_rate=CHOSEN.get(arm.method.rpartition("-")[-1], RATES[0]))


def train_on(model, dataset, *, answers, alpha: float, recipe, seed: int,
             temperature: float = 4.0) -> float:
    """Distil a student that is trained already. Returns the seconds that fit took."""
    keras.utils.set_random_seed(seed)
    distiller = kdlib.Distiller(student=model, teacher=None, temperature=temperature, alpha=alpha)
    steps = -(-len(dataset.y_train) // recipe.batch_size)
    distiller.compile(recipes.make_optimizer(recipe, steps, last_layer="logits"),
                      steps_per_execution=min(steps, 24))
    batches = recipes.Batches(dataset, recipe, seed=seed, answers=answers)
    start = time.perf_counter()
    with recipes.fused_norm(model):
        distiller.fit(batches, epochs=recipe.epochs, shuffle=False, verbose=0)
    return time.perf_counter() - start


def make(arm: Arm, student, dataset, *, answers, recipe, seed: int):
    """Train as the arm says; returns a plain student, a function to logits, and the seconds.

    The plain student has the weights before they are rounded.
    """
    images = dataset.x_train[:CALIBRATION]
    plain, seconds = keras.models.clone_model(student), 0.0
    plain.set_weights(student.get_weights())
    model = plain if arm.bits == 32 else make_rounded(student, bits=arm.bits, calibration=images)
    if arm.alpha is not None:
        seconds = train_on(model, dataset, answers=answers, alpha=arm.alpha, recipe=recipe,
                           seed=seed)
        if arm.bits < 32:
            calibrate(model, images)
            give_weights(plain, model)
    return plain, (lambda x: runs.predict_logits(model, x)), seconds


def measure(arm: Arm, student, dataset, *, answers, recipe, seed: int) -> dict:
    """The row of an arm and a seed."""
    plain, ask, seconds = make(arm, student, dataset, answers=answers, recipe=recipe, seed=seed)
    kib = None
    with tempfile.TemporaryDirectory() as folder:
        if arm.runs_on == "litert":
            path = shipping.export(plain, Path(folder) / "student.tflite", kind="int8",
                                   class_names=dataset.class_names,
                                   calibration=dataset.x_train[:CALIBRATION])
            ask, kib = shipping.LiteRT(path), round(shipping.kib(path), 1)
    trained = arm.alpha is not None
    row = {"dataset": dataset.name, "method": arm.method, "bits": arm.bits, "seed": seed,
           "runs_on": arm.runs_on, "student": known_by(student), "kib": kib,
           "seconds": round(seconds),
           "val_accuracy": np.mean(ask(dataset.x_val).argmax(-1) == dataset.y_val),
           "test_accuracy": None, "agreement": None,
           "epochs": recipe.epochs if trained else 0,
           "temperature": 4.0 if trained else None, "alpha": arm.alpha,
           "learning_rate": recipe.learning_rate if trained else None,
           "machine": fingerprints.machine(), "versions": shipping.versions()}
    if seed < 100:
        test, before = ask(dataset.x_test), runs.predict_logits(student, dataset.x_test)
        row |= {"test_accuracy": np.mean(test.argmax(-1) == dataset.y_test),
                "agreement": np.mean(test.argmax(-1) == before.argmax(-1))}
    return {key: row[key] for key in COLUMNS}


# --- the command ----------------------------------------------------------------------


def begins_with(dataset: str, seed: int):
    """The published student that a row begins with; rates are tried on another one."""
    return runs.published(f"{dataset}-{BEGINS}-seed{3 if seed >= 100 else seed}")


def known_by(student) -> str:
    """What the column student says: the beginning of a digest of network and weights."""
    return fingerprints.model_digest(student)[:12]


def missing(table, recipes_and_arms, dataset: str, students: dict[int, str]) -> list[tuple]:
    """The arms that the table lacks; students: seed and what its student is known by."""
    keys = ["dataset", "method", "bits", "student", "seed", "alpha", "epochs", "learning_rate"]
    done = {tuple(row) for row in table[keys].fillna(0).itertuples(index=False)}
    return [(arm, recipe, seed) for seed in students for arm, recipe in recipes_and_arms
            if (dataset, arm.method, arm.bits, students[seed], seed, arm.alpha or 0, *(
                (0, 0) if arm.alpha is None else (recipe.epochs, recipe.learning_rate)))
            not in done]


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description="Make the missing rows of quantisation.csv.")
    parser.add_argument("--list", action="store_true", help="say what is missing")
    parser.add_argument("--choose", action="store_true", help="try learning rates")
    parser.add_argument("--dataset", choices=("cifar10", "digits"), default="cifar10")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--out", type=Path, default=runs.REFERENCE / "quantisation.csv")
    options = parser.parse_args(arguments)
    table = pd.read_csv(options.out) if options.out.exists() else pd.DataFrame(columns=COLUMNS)
    dataset = kdlib.load_dataset(options.dataset)
    arms = [(arm, recipe_for(dataset, arm, epochs=options.epochs)) for arm in ARMS]
    if options.choose:
        arms = [(arm, replace(recipe, learning_rate=rate)) for rate in RATES
                for arm, recipe in arms if arm.bits == 4 and arm.alpha is not None]
    students = {seed: begins_with(dataset.name, seed)
                for seed in ((100,) if options.choose else options.seeds)}
    todo = missing(table, arms, dataset.name, {seed: known_by(student)
                                               for seed, student in students.items()})
    if options.list:
        for arm, recipe, seed in todo:
            print(f"{dataset.name} {arm.method} bits {arm.bits} seed {seed} "
                  f"rate {recipe.learning_rate if arm.alpha is not None else None}")
        return
    answers = runs.teacher_answers(runs.published(f"{dataset.name}-teacher-seed0"), dataset,
                                   arms[0][1])
    rows = table.to_dict("records")
    for arm, recipe, seed in tqdm(todo, unit="row"):
        rows.append(measure(arm, students[seed], dataset, answers=answers, recipe=recipe,
                            seed=seed))
        made = pd.DataFrame(rows)[COLUMNS].round(MEASURED)
        store.write_whole(options.out, lambda aside, made=made: made.to_csv(aside, index=False))


if __name__ == "__main__":
    main()
