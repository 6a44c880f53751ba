"""Every row of results.csv as data, and the program that makes the missing ones.

    python reference/experiments.py --list          what there is, what is missing, how long
    python reference/experiments.py                 make everything that is missing
    python reference/experiments.py scratch best    make these experiments only

Interrupt it whenever you like: it goes on after the last whole epoch. PROTOCOL.md says what
each group of rows was made for, before it was made.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

if __name__ == "__main__":  # run as a file: the project's folder is not on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from reference import features, runs, store  # isort: skip  (first: keeps TensorFlow quiet)
import kdlib
import keras
import numpy as np
import pandas as pd
import scipy.optimize
import scipy.special
from keras import layers
from sklearn.model_selection import train_test_split
from tqdm.auto import tqdm

# --- controls: what a student learns from a teacher that knows less -------------------


def smoothed(logits, labels, temperature: float):
    """Label smoothing with the mean entropy of the teacher's soft labels.

    Every image gets the same soft label but for the place of its class. logits (N, classes),
    labels (N,); returns logits. Source: Szegedy et al. 2016, section 7.
    """
    classes = logits.shape[-1]
    soft = scipy.special.softmax(logits.astype("float64") / temperature, axis=-1)
    wanted = scipy.special.entr(soft).sum(-1).mean()

    def excess(wrong):
        return (scipy.special.entr(1 - wrong)
                + (classes - 1) * scipy.special.entr(wrong / (classes - 1)) - wanted)

    wrong = scipy.optimize.brentq(excess, 1e-12, 1 - 1 / classes)
    smooth = np.where(np.arange(classes) == labels[:, None], 1 - wrong, wrong / (classes - 1))
    return temperature * np.log(smooth)


def evened(logits, labels, temperature: float):
    """How sure the teacher is of the true class, and nothing about the others.

    The true class keeps its softened probability; the rest is spread evenly.
    """
    classes = logits.shape[-1]
    soft = scipy.special.softmax(logits.astype("float64") / temperature, axis=-1)
    sure = np.clip(soft[np.arange(len(labels)), labels], 1e-12, 1 - 1e-12)[:, None]
    even = np.where(np.arange(classes) == labels[:, None], sure, (1 - sure) / (classes - 1))
    return temperature * np.log(even)


def shuffled(logits, labels, temperature: float):
    """The teacher's logits, those of the wrong classes permuted.

    Each image has its own permutation, the same in all its views: how sure the teacher is
    stays true, which classes are alike becomes false. Source: Furlanello et al. 2018,
    section 3.2 (dark knowledge with permuted predictions).
    """
    keys = np.random.default_rng(2018).random(logits.shape)
    keys[np.arange(len(labels)), labels] = -1
    origin = keys.argsort(-1)[:, 1:]  # the wrong classes in random order
    mixed = logits.copy()
    np.put_along_axis(mixed, np.sort(origin), np.take_along_axis(logits, origin, -1), -1)
    return mixed


CONTROLS = {function.__name__: function for function in (smoothed, evened, shuffled)}


def few_labels(dataset, percent: float, *, hide: bool):
    """The dataset when only so many training labels are known, the same share of each class.

    hide=True: all images, unknown labels are -1. Else the labelled images alone, again and
    again, so that an epoch has as many steps.
    """
    every = np.arange(len(dataset.y_train))
    known, _ = train_test_split(every, train_size=percent / 100, random_state=0,
                                stratify=dataset.y_train)
    known.sort()
    if not hide:
        again = np.resize(known, len(every))
        return replace(dataset, x_train=dataset.x_train[again], y_train=dataset.y_train[again])
    hidden = np.full_like(dataset.y_train, -1)
    hidden[known] = dataset.y_train[known]
    return replace(dataset, y_train=hidden)


def wrong_labels(dataset, percent: float):
    """The dataset with so many training labels replaced by another class, drawn at random.

    Validation and test labels stay right. Source: Zhang et al. 2017, section 2.2.
    """
    rng, labels = np.random.default_rng(2017), dataset.y_train.copy()
    which = rng.permutation(len(labels))[:round(len(labels) * percent / 100)]
    classes = len(dataset.class_names)
    labels[which] = (labels[which] + rng.integers(1, classes, len(which))) % classes
    return replace(dataset, y_train=labels)


# --- signals: several answers as one teacher ------------------------------------------


def mirrored(teacher):
    """The mean of the logits for an image and for its mirror image."""
    pixels = keras.Input(teacher.inputs[0].shape[1:], name="pixels")
    answers = [teacher(pixels), teacher(keras.ops.flip(pixels, axis=2))]
    return keras.Model(pixels, layers.Average()(answers), name="mirrored")


def together(*teachers):
    """The mean of the teachers' probabilities, as logits. Source: Hinton et al. 2015, section 5."""
    pixels = keras.Input(teachers[0].inputs[0].shape[1:], name="pixels")
    answers = [keras.ops.log_softmax(teacher(pixels)) for teacher in teachers]
    # The logarithm of a sum, not of a mean: logits may differ by a constant.
    return keras.Model(pixels, keras.ops.logsumexp(keras.ops.stack(answers), axis=0),
                       name="together")


SIGNALS = {function.__name__: function for function in (mirrored, together)}

# --- the table ------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """Some rows of results.csv: one training for each seed."""

    method: str  # the name in results.csv
    seeds: tuple[int, ...] = (0,)
    dataset: str = "cifar10"
    teacher: str | None = None  # the runs that teach; "{seed}" stands for the pair's own seed
    signal: str | None = None  # how they answer as one: a name in SIGNALS
    control: str | None = None  # what becomes of the teacher's answers: a name in CONTROLS
    temperature: float = 4.0
    alpha: float = 0.1
    recipe: dict = field(default_factory=dict)  # where it differs from the published recipe
    labels: float = 100.0  # per cent of the training labels that are known
    wrong: float = 0.0  # per cent of the training labels that are wrong
    build: Callable | None = None
    loss: str | None = None  # one more loss: a name in features.METHODS
    factor: float | None = None  # times its authors' weight; None: as chosen on validation
    place: str | None = None  # which layers it compares: a name in PLACES; None: the method's own
    weights: bool = False  # publish the trained model, not only its row
    choice: bool = False  # only for choosing on validation: the test set is not looked at

    @property
    def distilled(self) -> bool:
        return self.teacher is not None

    def stem(self, seed: int) -> str:
        return runs.stem({
            "dataset": self.dataset, "method": self.method, "seed": seed,
            "temperature": self.temperature if self.distilled else None, "alpha": self.alpha})

    def teachers(self, seed: int) -> list[str]:
        return (self.teacher or "").format(seed=seed).split()

    def taught_by(self, seed: int) -> str | None:
        """What the column teacher of results.csv says."""
        return "+".join([*self.teachers(seed), *([self.signal] if self.signal else [])]) or None

    def trainer(self) -> features.Trainer | None:
        """What fits the student where there is one more loss."""
        if self.loss is None:
            return None
        method = features.METHODS[self.loss]
        factor = chosen_factor(self) if self.factor is None else self.factor
        student, teacher = PLACES[self.place or method.where]
        return features.Trainer(self.loss, factor * method.weight, student, teacher)

    def full_recipe(self) -> runs.Recipe:
        return replace(runs.recipe_for(_Name(self.dataset), self.method), **self.recipe)


@dataclass(frozen=True)
class _Name:
    name: str  # all that recipe_for asks of a dataset


PAIRS = (0, 1, 2, 3, 4)
TRIPLE = (0, 1, 2)
FIVE, TEN = {"epochs": 5}, {"epochs": 10}


def _published() -> list[Experiment]:
    """The rows behind notebooks 02 to 07."""
    one = "teacher-seed0"
    table = [
        Experiment("teacher", weights=True),
        Experiment("scratch", PAIRS, weights=True),
        Experiment("distilled", PAIRS, teacher=one, weights=True),
        # how long?
        Experiment("scratch-5-epochs", TRIPLE, recipe=FIVE),
        Experiment("scratch-10-epochs", recipe=TEN),
        Experiment("distilled-10-epochs", teacher=one, recipe=TEN),
        Experiment("scratch-40-epochs", recipe={"epochs": 40}),
        Experiment("distilled-40-epochs", teacher=one, recipe={"epochs": 40}),
        Experiment("scratch-100-epochs", TRIPLE, recipe={"epochs": 100}),
        Experiment("distilled-100-epochs", teacher=one, recipe={"epochs": 100}, weights=True),
        # what the gain consists of
        Experiment("distilled-5-epochs-smoothing", TRIPLE, teacher=one, control="smoothed",
                   recipe=FIVE),
        Experiment("distilled-5-epochs-shuffled", TRIPLE, teacher=one, control="shuffled",
                   recipe=FIVE),
        Experiment("distilled-5-epochs-twin", TRIPLE, teacher="scratch-seed0", recipe=FIVE),
        # views
        Experiment("distilled-5-epochs-2-views", TRIPLE, teacher=one, recipe=FIVE | {"views": 2}),
        Experiment("distilled-5-epochs-live", TRIPLE, teacher=one, recipe=FIVE | {"views": 0}),
        Experiment("scratch-no-augmentation", recipe={"shift": 0, "flip": False}),
    ]
    repeated = {(1.0, 0.5), (4.0, 0.1), (16.0, 0.0)}  # to see the noise of the map
    table += [Experiment("distilled-5-epochs", TRIPLE if (t, a) in repeated else (0,),
                         teacher=one, temperature=t, alpha=a, recipe=FIVE)
              for t in (1.0, 2.0, 4.0, 8.0, 16.0) for a in (0.0, 0.1, 0.3, 0.5, 0.9)]
    table += [Experiment(f"distilled-5-epochs-rate-{rate}", teacher=one,
                         recipe=FIVE | {"learning_rate": float(rate)})
              for rate in ("1e-5", "1e-4", "1e-3", "1e-2", "1e-1")]
    table += [Experiment(f"distilled-adam-{rate}", teacher=one, weights=True,
                         recipe=TEN | {"optimizer": "adam", "learning_rate": float(rate)})
              for rate in ("1e-3", "1e-5")]
    for percent in (1, 5, 10, 50):
        name = f"5-epochs-{percent}-percent"
        table += [Experiment(f"scratch-{name}", recipe=FIVE, labels=percent),
                  Experiment(f"distilled-{name}", teacher=one, recipe=FIVE, labels=percent)]
    return table + [replace(each, dataset="digits") for each in _digits()]


def _digits() -> list[Experiment]:
    one = "teacher-seed0"
    table = [
        Experiment("teacher", weights=True),
        Experiment("scratch", PAIRS, weights=True),
        Experiment("distilled", PAIRS, teacher=one, weights=True),
        Experiment("distilled-no-labels", teacher=one, alpha=0.0, weights=True),
        Experiment("scratch-sgd", weights=True,
                   recipe={"optimizer": "sgd", "learning_rate": 0.03, "weight_decay": 5e-3}),
        Experiment("distilled-7-epochs-smoothing", TRIPLE, teacher=one, control="smoothed"),
        Experiment("distilled-7-epochs-shuffled", TRIPLE, teacher=one, control="shuffled"),
        Experiment("distilled-7-epochs-twin", TRIPLE, teacher="scratch-seed0"),
        Experiment("scratch-90-epochs", TRIPLE, recipe={"epochs": 90}),
    ]
    for epochs in (3, 7, 28):
        table += [Experiment(f"scratch-{epochs}-epochs", TRIPLE, recipe={"epochs": epochs}),
                  Experiment(f"distilled-{epochs}-epochs", TRIPLE, teacher=one,
                             recipe={"epochs": epochs})]
    table += [Experiment(f"distilled-adam-{rate}", teacher=one, weights=True,
                         recipe=TEN | {"optimizer": "adam", "learning_rate": float(rate)})
              for rate in ("1e-3", "1e-5")]
    return table


def _recipe_choice() -> list[Experiment]:
    """Part A of PROTOCOL.md: candidates after 8 epochs, then 20 for what passed."""
    eight, seed = {"epochs": 8}, (100,)
    changes = {"": {}, "-average": {"average": 0.998}, "-rate-3e-2": {"learning_rate": 0.03},
               "-decay-5e-2": {"weight_decay": 0.05}}
    table = [Experiment(f"teacher-8-epochs{name}", seed, recipe=eight | change, choice=True)
             for name, change in changes.items()]
    table.append(Experiment("teacher-8-epochs-residual", seed, recipe=eight, choice=True,
                            build=residual_teacher))
    for name, change in changes.items():
        table += [Experiment(f"scratch-8-epochs{name}", seed, recipe=eight | change, choice=True),
                  Experiment(f"distilled-8-epochs{name}", seed, recipe=eight | change, choice=True,
                             teacher="teacher-seed0")]
    table.append(Experiment("scratch-8-epochs-smoothing", seed, choice=True,
                            recipe=eight | {"smoothing": 0.1}))
    # What passed (+0.36 points) goes on.
    return table + [
        Experiment("scratch-20-epochs", (100, 101), choice=True),
        Experiment("scratch-20-epochs-smoothing", (100, 101), choice=True,
                   recipe={"smoothing": 0.1})]


def residual_teacher(num_classes: int = 10) -> keras.Model:
    """A candidate of part A: a teacher's budget with two residual pairs."""
    pixels = keras.Input((32, 32, 3), name="pixels")
    variance = [std**2 for std in kdlib.PIXEL_STD]
    x = layers.Normalization(mean=kdlib.PIXEL_MEAN, variance=variance)(pixels)

    def unit(x, width, *, kernel=3, pool=False):
        x = layers.Conv2D(width, kernel, padding="same", use_bias=False)(x)
        x = layers.MaxPooling2D()(x) if pool else x
        return layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))

    x = unit(unit(x, 24, kernel=2), 64, pool=True)
    for width, after in ((64, 96), (96, 128)):
        x = layers.Add()([x, unit(unit(x, width), width)])
        x = unit(x, after, pool=True)
    x = layers.GlobalMaxPooling2D()(unit(x, 128))
    return keras.Model(pixels, layers.Dense(num_classes)(layers.Dropout(0.2)(x)), name="residual")


def _evidence() -> list[Experiment]:
    """Parts B to G of PROTOCOL.md.

    Of part B only the teachers and the sixth scratch student stand here. The distilled students,
    each with a teacher of its own, take the place of those of one teacher when all are there.
    """
    one, own = "teacher-seed0", "teacher-seed{seed}"
    six = " ".join(f"teacher-seed{k}" for k in range(6))
    table = [  # B, C
        Experiment("teacher", (1, 2, 3, 4, 5), weights=True),
        Experiment("scratch", (5,), weights=True),
        Experiment("distilled-smoothed", PAIRS, teacher=one, control="smoothed"),
        Experiment("distilled-evened", PAIRS, teacher=one, control="evened"),
        Experiment("distilled-shuffled", PAIRS, teacher=one, control="shuffled"),
        Experiment("distilled-twin", PAIRS, teacher="scratch-seed0"),
        # D: better teachers, and worse ones
        Experiment("distilled-mirrored", PAIRS, teacher=own, signal="mirrored"),
        Experiment("distilled-six", PAIRS, teacher=six, signal="together"),
        Experiment("teacher-5-epochs", PAIRS, recipe=FIVE),
        Experiment("distilled-early", PAIRS, teacher="teacher-5-epochs-seed{seed}"),
        Experiment("teacher-smoothing", PAIRS, recipe={"smoothing": 0.1}),
        Experiment("distilled-smooth-teacher", PAIRS, teacher="teacher-smoothing-seed{seed}"),
    ]
    for epochs in (10, 40):  # E
        recipe = {"epochs": epochs}
        table += [Experiment(f"scratch-{epochs}-epochs", (1, 2), recipe=recipe),
                  Experiment(f"distilled-{epochs}-epochs-own", TRIPLE, teacher=own, recipe=recipe)]
    for percent in (1, 5, 10, 25):  # F
        name, known = f"{percent}-percent", {"labels": percent}
        table += [
            Experiment(f"teacher-10-epochs-{name}", TRIPLE, recipe=TEN, **known),
            Experiment(f"distilled-5-epochs-{name}-own", TRIPLE, recipe=FIVE, **known,
                       teacher=f"teacher-10-epochs-{name}-seed{{seed}}"),
            Experiment(f"scratch-5-epochs-{name}", TRIPLE if percent == 25 else (1, 2),
                       recipe=FIVE, **known),
            Experiment(f"scratch-15-epochs-{name}", TRIPLE, recipe={"epochs": 15}, **known)]
    for percent in (20, 40):  # G
        name, wrong = f"{percent}-wrong", {"wrong": percent}
        table += [Experiment(f"teacher-{name}", TRIPLE, **wrong),
                  Experiment(f"scratch-{name}", TRIPLE, **wrong),
                  Experiment(f"distilled-{name}", TRIPLE, teacher=f"teacher-{name}-seed{{seed}}",
                             **wrong)]
    return table


# --- other methods, other architectures ------------------------------------------------

# Of the published student and teacher: the layers that a method compares. As in RepDistiller, but
# without its first stage, which this student does not have.
PLACES = {
    "hint": (("relu2_2",), ("relu2_2",)),
    "stages": (("relu1_1", "relu2_2", "relu3_2"), ("relu1_2", "relu2_2", "relu4_1")),
    "before": (("norm1_1", "norm2_2", "norm3_2"), ("norm1_2", "norm2_2", "norm4_1")),
    "last map": (("relu3_2",), ("relu4_1",)),
    "vector": (("pool3",), ("pool4",)),
    "logits": ((), ()),
    "misplaced": (("relu1_1",), ("relu4_1",)),  # the student's first stage, the teacher's last
}
FACTORS = (1.0, 0.1, 10.0)  # three trials for each method: its authors' weight, less and more
TAUGHT = ("fitnet", "at", "rkd", "dkd")  # in notebook 09


def _trial(loss: str, alpha: float, factor: float) -> Experiment:
    kd = "-kd" if alpha < 1 else ""
    return Experiment(f"distilled-5-epochs-{loss}{kd}-x{factor:g}", (100,), loss=loss, alpha=alpha,
                      teacher="teacher-seed0", factor=factor, recipe=FIVE, choice=True)


def chosen_factor(each: Experiment) -> float:
    """The factor of the best trial on validation. Between equals, the authors' own weight."""
    found = {}
    for factor in FACTORS:
        trial = _trial(each.loss, each.alpha, factor)
        path = runs.REFERENCE / "rows" / f"{trial.stem(100)}.json"
        kdlib.require(path.exists(), f"the trial {trial.method} of {each.method} is missing. Make "
                      f"it first: python reference/experiments.py {trial.method}")
        found[factor] = store.read_notes(path)["row"]["val_accuracy"]
    return max(FACTORS, key=found.get)


def _methods() -> list[Experiment]:
    """Part I of PROTOCOL.md: the trials, then each method with its chosen weight, five pairs.

    alpha = 1: hard labels and the method alone. -kd: hard and soft labels as ever, and the method.
    A loss on logits takes the place of the soft labels, so it has no -kd.
    """
    one, table = "teacher-seed0", []
    variants = [(loss, alpha) for loss, method in features.METHODS.items()
                for alpha in ((1.0,) if method.where == "logits" else (1.0, 0.1))]
    table += [_trial(*variant, factor) for variant in variants for factor in FACTORS]
    for loss, alpha in variants:
        name = f"distilled-{loss}{'-kd' if alpha < 1 else ''}"
        each = Experiment(name, PAIRS, teacher=one, loss=loss, alpha=alpha)
        if alpha == 1 and loss in TAUGHT:
            table += [replace(each, seeds=(0,), weights=True), replace(each, seeds=PAIRS[1:])]
        else:
            table.append(each)
        table.append(replace(each, dataset="digits", seeds=(0,), factor=1.0, recipe={"epochs": 3}))
    harm = Experiment("distilled-fitnet-misplaced", TRIPLE, teacher=one, loss="fitnet", alpha=1.0,
                      factor=10.0, place="misplaced")
    return table + [harm, replace(harm, dataset="digits", recipe={"epochs": 3})]


def residual_student(num_classes: int = 10) -> keras.Model:
    """At most 90,000 parameters, with two residual pairs."""
    return _student("residual_student", _residual_body, num_classes)


def separable_student(num_classes: int = 10) -> keras.Model:
    """At most 90,000 parameters: depthwise 3x3, then 1x1 (Howard et al. 2017, section 3.1)."""
    return _student("separable_student", _separable_body, num_classes)


def _student(name: str, body: Callable, num_classes: int) -> keras.Model:
    pixels = keras.Input((32, 32, 3), name="pixels")
    variance = [std**2 for std in kdlib.PIXEL_STD]
    x = layers.Normalization(mean=kdlib.PIXEL_MEAN, variance=variance)(pixels)
    x = layers.GlobalMaxPooling2D(name="pool")(body(x))
    return keras.Model(pixels, layers.Dense(num_classes, name="logits")(x), name=name)


def _unit(x, width: int, *, kernel: int = 3, pool: bool = False):
    x = layers.Conv2D(width, kernel, padding="same", use_bias=False)(x)
    x = layers.MaxPooling2D()(x) if pool else x
    return layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))


def _residual_body(x):
    # No convolution of 1x1 with a stride: see TensorFlow on AVX-512 with few channels.
    x = _unit(x, 24, pool=True)
    for width, pool in ((32, False), (48, True)):
        x = _unit(x, width, pool=pool)
        x = layers.Add()([x, _unit(_unit(x, width), width)])
    return x


def _separable_body(x):
    x = _unit(x, 32, pool=True)
    for width, pool in ((64, False), (128, True), (128, False), (192, False), (128, False)):
        x = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
        x = _unit(x, width, kernel=1, pool=pool)
    return x


STUDENTS = {"vgg": None, "residual": residual_student, "separable": separable_student}
TEACHERS = {"vgg": "teacher-seed0", "residual": "teacher-residual-seed0"}


def _architectures() -> list[Experiment]:
    """Part J of PROTOCOL.md: two teachers times three students, and each student from scratch.

    The published teacher and its students are the pair vgg to vgg.
    """
    table = [Experiment("teacher-residual", weights=True, build=residual_teacher)]
    for student, build in STUDENTS.items():
        if build:
            table.append(Experiment(f"scratch-{student}", TRIPLE, build=build))
        table += [Experiment(f"distilled-{teacher}-to-{student}", TRIPLE, teacher=run, build=build)
                  for teacher, run in TEACHERS.items() if (teacher, student) != ("vgg", "vgg")]
    return table + [replace(each, dataset="digits", seeds=(0,)) for each in table]


PUBLISHED = _published()  # what the notebooks show
PLANNED = _recipe_choice() + _evidence() + _methods() + _architectures()
EXPERIMENTS = PUBLISHED + PLANNED

# --- making rows ----------------------------------------------------------------------


class Maker:
    """Trains or loads what the table describes; datasets are loaded once."""

    def __init__(self, experiments=None):
        self.experiments = EXPERIMENTS if experiments is None else experiments
        self.datasets = {}

    def data(self, name: str):
        if name not in self.datasets:
            self.datasets[name] = kdlib.load_dataset(name)
        return self.datasets[name]

    def find(self, dataset: str, name: str) -> tuple[Experiment, int]:
        """The experiment and seed behind a run's name, as ``teacher-seed0``."""
        method, _, seed = name.rpartition("-seed")
        for each in self.experiments:
            if (each.dataset, each.method) == (dataset, method) and int(seed) in each.seeds:
                return each, int(seed)
        raise ValueError(f"no experiment makes the run {name!r} of {dataset}")

    def settings(self, each: Experiment, seed: int, **more) -> dict:
        """What train_or_load needs, its teacher included."""
        data, teacher, answers = self.data(each.dataset), None, None
        recipe = each.full_recipe()
        if each.teacher is not None:
            teachers = [self.make(*self.find(each.dataset, name), **more).model
                        for name in each.teachers(seed)]
            teacher = SIGNALS[each.signal](*teachers) if each.signal else teachers[0]
        if each.control:
            change = CONTROLS[each.control]
            answers = [change(logits, data.y_train, each.temperature)
                       for logits in runs.teacher_answers(teacher, data, recipe)]
        if each.labels < 100:
            data = few_labels(data, each.labels, hide=each.distilled)
        if each.wrong:
            data = wrong_labels(data, each.wrong)
        return dict(method=each.method, dataset=data, teacher=teacher, answers=answers,
                    build=each.build, temperature=each.temperature, alpha=each.alpha,
                    recipe=recipe, seed=seed, taught_by=each.taught_by(seed),
                    trainer=each.trainer())

    def make(self, each: Experiment, seed: int, **more) -> runs.Run:
        return runs.train_or_load(**self.settings(each, seed, **more), **more)


def notes_of(each: Experiment, seed: int) -> dict | None:
    """The published notes of a run, if they are of these settings and this teacher."""
    path = runs.REFERENCE / "rows" / f"{each.stem(seed)}.json"
    if not path.exists():
        return None
    notes, wanted = store.read_notes(path), vars(each.full_recipe())
    if any(notes["spec"].get(key) != wanted[key] for key in wanted):
        return None
    if each.distilled and _digest_of_teacher(each, seed) != notes["judge"]:
        return None
    if each.loss and notes["spec"]["trainer"]["weight"] != each.trainer().weight:
        return None
    return notes


def _digest_of_teacher(each: Experiment, seed: int) -> str | None:
    """Of the published models that teach; None where one of them is not there yet."""
    names = [f"{each.dataset}-{name}" for name in each.teachers(seed)]
    paths = [runs.REFERENCE / "rows" / f"{name}.json" for name in names]
    if not all(path.exists() for path in paths):
        return None
    if not each.signal:
        return store.read_notes(paths[0])["model"]
    models = [keras.saving.load_model(runs.REFERENCE / "weights" / f"{name}.keras", compile=False)
              for name in names]
    return store.model_digest(SIGNALS[each.signal](*models))


def missing(experiments) -> list[tuple[Experiment, int]]:
    """Runs without published notes, teachers before their students."""
    return [(each, seed) for each in experiments for seed in each.seeds
            if notes_of(each, seed) is None]


def publish(run: runs.Run, each: Experiment) -> None:
    """Copy a finished run from the runs folder into ``reference``, and renew results.csv."""
    name = each.stem(run.row["seed"])
    (folder,) = [path.parent for path in runs.runs_folder().glob(f"{name}-*/model.json")
                 if store.read_notes(path)["row"] == run.row]
    notes = store.read_notes(folder / "model.json")
    if each.choice:
        notes["row"] |= dict.fromkeys(("test_accuracy", "nll", "ece", "agreement"))
    target = runs.REFERENCE / "rows" / f"{name}.json"
    target.unlink(missing_ok=True)  # never new weights beside old notes
    if each.weights:
        content = (folder / "model.keras").read_bytes()
        store.write_whole(runs.REFERENCE / "weights" / f"{name}.keras",
                          lambda aside: aside.write_bytes(content))
    if not each.choice:
        _keep_answers(folder / "answers.npz", f"{each.dataset}-{each.method}", name)
    store.write_notes(target, notes)
    write_table()


def _keep_answers(source: Path, experiment: str, name: str) -> None:
    """The answers to each validation and test image, one file an experiment.

    ``NAME/val``, ``NAME/test``: float16 logits; the answered class is their argmax.
    """
    path = runs.REFERENCE / "answers" / f"{experiment}.npz"
    kept = dict(np.load(path)) if path.exists() else {}
    kept |= {f"{name}/{part}": logits for part, logits in np.load(source).items()}
    store.write_whole(path, lambda aside: _save(aside, kept))


def _save(path: Path, arrays: dict) -> None:
    with open(path, "wb") as file:
        np.savez_compressed(file, **arrays)


def write_table() -> None:
    """results.csv: one row for each of the published notes."""
    rows = [store.read_notes(path)["row"] for path in (runs.REFERENCE / "rows").glob("*.json")]
    table = pd.DataFrame(rows, columns=runs.RESULT_COLUMNS).sort_values(
        ["dataset", "method", "temperature", "alpha", "seed"])
    store.write_whole(runs.REFERENCE / "results.csv",
                      lambda aside: table.to_csv(aside, index=False))


def restamp() -> int:
    """Write the digest of today's code into all published notes, if it gives their numbers.

    Published runs are found only under the code that made them. After a change that is not
    meant to change any number, this trains a scratch and a distilled student on digits and
    compares their losses, epoch by epoch, with the published ones: to the last bit on the
    kind of machine that made them, else to one per cent in the first epoch: on digits another
    processor's rounding has grown to ten per cent by the second.
    """
    maker = Maker()
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(
            os.environ, KD_RUNS_DIR=folder, KD_RETRAIN="1"):
        data = maker.data("digits")
        teacher = keras.saving.load_model(runs.REFERENCE / "weights" / "digits-teacher-seed0.keras")
        for method in ("scratch", "distilled"):
            path = runs.REFERENCE / "rows" / f"digits-{method}-seed0.json"
            new = runs.train_or_load(method, data, teacher=teacher).history["loss"]
            old = store.read_notes(path)["history"]["loss"]
            print(method, "loss published", old, "now", new)
            if not np.allclose(old[:1], new[:1], rtol=0.01):
                raise SystemExit("The code gives other numbers now: make the runs again.")
    return _write_digests()


def _write_digests() -> int:
    """Today's digests of code, architectures and models, in the place of the older ones."""
    paths = {path.stem: path for path in (runs.REFERENCE / "rows").glob("*.json")}
    today = {}
    for weights in (runs.REFERENCE / "weights").glob("*.keras"):
        notes, model = store.read_notes(paths[weights.stem]), keras.saving.load_model(weights)
        today[notes["spec"]["architecture"]] = store.architecture(model)
        today[notes["model"]] = store.model_digest(model)
    for path in paths.values():
        notes = store.read_notes(path)
        notes["spec"]["code"] = runs.CODE
        for holder, keys in ((notes["spec"], ("architecture", "teacher")),
                             (notes, ("model", "judge"))):
            holder |= {key: today.get(holder[key], holder[key]) for key in keys if key in holder}
        store.write_notes(path, notes)
    return len(paths)


# --- the command ----------------------------------------------------------------------


def seconds_per_epoch() -> Callable[[Experiment], float]:
    """From the rows that there are: the median of a model and dataset, else a guess."""
    table = pd.read_csv(runs.REFERENCE / "results.csv")
    rate = (table.seconds / table.epochs).groupby([table.dataset, table.model]).median()

    def estimate(each: Experiment) -> float:
        model = "teacher" if each.method.startswith("teacher") else "student"
        live = each.loss and features.METHODS[each.loss].where != "logits"  # the teacher runs, too
        return float(rate.get((each.dataset, model), 15.0)) * (2 if live else 1)

    return estimate


class Progress(keras.callbacks.Callback):
    """Moves the one bar over all runs, in estimated seconds."""

    def __init__(self, bar, name: str, seconds: float):
        super().__init__()
        self.bar, self.name, self.weight = bar, name, seconds

    def on_epoch_end(self, epoch, logs=None):
        self.bar.set_postfix_str(f"{self.name}, epoch {epoch + 1}, validation "
                                 f"{logs['val_accuracy']:.4f}", refresh=False)
        self.bar.update(self.weight)


def list_experiments(experiments) -> None:
    estimate, total = seconds_per_epoch(), 0.0
    print(f"{'dataset':8} {'method':34} {'T':>4} {'alpha':>5} {'epochs':>6}  rows   missing  hours")
    for each in experiments:
        epochs, lacking = each.full_recipe().epochs, len(missing([each]))
        hours = lacking * epochs * estimate(each) / 3600
        total += hours
        t, a = (f"{each.temperature:g}", f"{each.alpha:g}") if each.distilled else ("", "")
        print(f"{each.dataset:8} {each.method:34} {t:>4} {a:>5} {epochs:6}  "
              f"{len(each.seeds) - lacking} of {len(each.seeds)}  {lacking:7}  {hours:5.1f}")
    print(f"about {total:.1f} hours to go, teachers' answers not counted")


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description="Make the missing rows of results.csv.")
    parser.add_argument("name", nargs="*", help="methods to make; all by default")
    parser.add_argument("--list", action="store_true", help="say what is missing, and how long")
    parser.add_argument("--dataset", choices=("cifar10", "digits"), help="this dataset only")
    parser.add_argument("--restamp", action="store_true", help="after a refactoring: see restamp()")
    options = parser.parse_args(arguments)
    if options.restamp:
        print(f"{restamp()} notes carry the digest of today's code")
        return
    known = {each.method for each in EXPERIMENTS}
    for name in options.name:
        if name not in known:
            parser.error(f"{name!r} is no method of the table; --list shows them")
    chosen = [each for each in EXPERIMENTS if (not options.name or each.method in options.name)
              and options.dataset in (None, each.dataset)]
    if options.list:
        list_experiments(chosen)
        return
    estimate, todo, maker = seconds_per_epoch(), missing(chosen), Maker()
    total = sum(estimate(each) * each.full_recipe().epochs for each, _ in todo)
    with tqdm(total=round(total), unit="s", unit_scale=True, smoothing=0.05) as bar:
        for each, seed in todo:
            progress = Progress(bar, each.stem(seed), estimate(each))
            publish(maker.make(each, seed, callbacks=[progress]), each)


if __name__ == "__main__":
    main()
