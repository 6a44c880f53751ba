"""How cost grows with data, students, views and classes: measured, into scaling.csv.

    python reference/scaling.py                costs, bytes, errors
    python reference/scaling.py --students     8 students on 1 and on 2 workers, with Ray

Columns: figure, size, value, unit, machine. Times are of the processor, not of the clock, so that
other work on the machine counts little. Costs are measured on digits, the errors of shortened
answers on the validation images of CIFAR-10, or of digits where CIFAR-10 is not at hand.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

if __name__ == "__main__":  # run as a file: the project's folder is not on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from reference import cluster, controls, fingerprints, runs, store  # isort: skip  (first: keeps TensorFlow quiet)
import kdlib
import keras
import numpy as np
import pandas as pd
import scipy.special

SIZES = (1, 2, 4)
CLASSES = (10, 100, 1000)
TEMPERATURE = 4.0
EPOCHS = 3  # the first one compiles, and is not counted


def spent(job) -> float:
    """Processor seconds of a call."""
    began = time.process_time()
    job()
    return time.process_time() - began


class Clock(keras.callbacks.Callback):
    """Processor seconds of each epoch."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self.began = time.process_time()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.process_time() - self.began)


def larger(dataset, times: int):
    """So many times the training images."""
    return replace(dataset, x_train=np.concatenate([dataset.x_train] * times),
                   y_train=np.tile(dataset.y_train, times))


def epoch_of_a_student(dataset, *, teacher=None, classes: int = 10) -> float:
    """Processor seconds of an epoch: distilled from random answers, or by a live teacher."""
    recipe = replace(runs.recipe_for(dataset, "student"), epochs=EPOCHS, views=1)
    student, clock = kdlib.build_student(num_classes=classes), Clock()
    answers = None
    if teacher is None:
        shape = (len(dataset.y_train), classes)
        answers = [np.random.default_rng(0).normal(0, 3, shape).astype("float32")]
    made = kdlib.Distiller(student=student, teacher=teacher, temperature=TEMPERATURE)
    batches = runs.Batches(dataset, recipe, seed=0, answers=answers)
    made.compile(runs.make_optimizer(recipe, len(batches), last_layer="logits"))
    made.fit(batches, epochs=EPOCHS, shuffle=False, verbose=0, callbacks=[clock])
    return min(clock.seconds[1:])


def costs(dataset, teacher):
    """(figure, size, value, unit): an epoch against data and classes, answers against views."""
    for size in SIZES:
        yield ("student, epoch, times the data", size,
               epoch_of_a_student(larger(dataset, size)), "s")
    for size in CLASSES:
        yield ("student, epoch, classes", size,
               epoch_of_a_student(dataset, classes=size), "s")
    yield "student, epoch, live teacher", 1, epoch_of_a_student(dataset, teacher=teacher), "s"
    recipe = replace(runs.recipe_for(dataset, "student"), epochs=max(SIZES))
    runs.predict_logits(teacher, dataset.x_train[:500])  # compiled once
    for views in SIZES:
        with tempfile.TemporaryDirectory() as folder, mock.patch.dict(
                os.environ, KD_RUNS_DIR=folder):
            seconds = spent(lambda views=views: runs.teacher_answers(
                teacher, dataset, replace(recipe, views=views)))
            size = sum(path.stat().st_size for path in Path(folder).glob("answers-*/*.npy"))
        yield "teacher, answers, views", views, seconds, "s"
        yield "teacher, answers on disk, views", views, size, "bytes"
    yield "images", 1, len(dataset.y_train), "images"


def errors(logits):
    """(figure, size, value, unit): what is lost when answers are stored in less space."""
    logits = logits.astype("float64")
    p = scipy.special.softmax(logits / TEMPERATURE, axis=-1)

    def lost(changed):
        # In half precision a softmax has errors of its own, and larger ones.
        q = scipy.special.softmax(changed.astype("float64") / TEMPERATURE, axis=-1)
        return float(scipy.special.rel_entr(p, q).sum(-1).mean())

    yield "KL lost, float16", logits.shape[-1], lost(logits.astype("float16")), "nats"
    for k in controls.TOP:
        yield "KL lost, top k", k, lost(controls.top(logits, None, TEMPERATURE, k=k)), "nats"
        kept = np.sort(p, axis=-1)[:, -k:].sum(-1).mean()
        yield "probability kept, top k", k, float(kept), "share"


def measure() -> list[tuple]:
    digits = kdlib.load_dataset("digits")
    rows = list(costs(digits, runs.published("digits-teacher-seed0")))
    try:
        judged = kdlib.load_dataset("cifar10")
    except FileNotFoundError:
        judged = digits
    teacher = runs.published(f"{judged.name}-teacher-seed0")
    answers = runs.predict_logits(teacher, judged.x_val)
    return rows + [(f"{judged.name}: {figure}", *rest) for figure, *rest in errors(answers)]


def students() -> list[tuple]:
    """Seconds of the clock for eight short trainings, the start of the cluster included."""
    stems = [f"digits-distilled-7-epochs-top{k}-seed{seed}"
             for k in controls.TOP for seed in (0, 1)]
    rows = []
    for workers in (1, 2):
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder, mock.patch.dict(
                os.environ, KD_RUNS_DIR=folder, KD_RETRAIN="0"):
            cluster.make(stems, workers=workers, cores=1)
        rows.append(("8 students, workers", workers, time.perf_counter() - began, "s of the clock"))
    return rows


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--students", action="store_true", help="8 students on 1 and 2 workers")
    rows = students() if parser.parse_args(arguments).students else measure()
    table = pd.DataFrame(rows, columns=["figure", "size", "value", "unit"])
    table = table.assign(value=[float(f"{value:.4g}") for value in table.value],
                         machine=fingerprints.machine())
    path = runs.REFERENCE / "scaling.csv"
    if path.exists():  # what was not measured now stays
        old = pd.read_csv(path)
        table = pd.concat([old[~old.figure.isin(table.figure)], table])
    store.write_whole(path, lambda aside: table.to_csv(aside, index=False))
    print(table.drop(columns="machine").to_string(index=False))


if __name__ == "__main__":
    main()
