"""Train or load a run, and measure what came out.

Nothing here has to be read to follow a lesson. How a model is trained is in recipes.py, what its
teacher answered in answers.py, what a run is known by in fingerprints.py and digests.py, how it
survives a kill in resume.py.
"""

from __future__ import annotations

import functools
import operator
import os
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import kdlib
import keras
import numpy as np
from kdlib import require
from tqdm.keras import TqdmCallback

from reference import digests, fingerprints, measures, recipes, resume, store
from reference.answers import VIEW_CODE, stored_answers, teacher_answers, teacher_features
from reference.measures import RESULT_COLUMNS, batch_size, predict_logits
from reference.recipes import Batches, Recipe, make_optimizer, recipe_for  # noqa: F401
from reference.store import ROOT, runs_folder

REFERENCE = ROOT / "reference"

# --- train or load --------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A finished training: the model, its history per epoch, its row of results.csv, its logits
    for "val" and "test" images, rounded as measures.halved says, and the folder of its files."""

    model: keras.Model
    history: dict[str, list[float]]
    row: dict
    logits: dict[str, np.ndarray] | None = None
    folder: Path | None = None

    @property
    def name(self) -> str:
        return f"{self.row['method']}-seed{self.row['seed']}"


def train_or_load(method: str, dataset, *, callbacks=None, **settings) -> Run:
    """Train a model, or load it if this very training was done before.

    A finished run is loaded from ``$KD_RUNS_DIR`` (default ``runs``), or from ``reference``
    where it is published. A run that was cut off goes on after its last whole epoch and ends
    with the same weights, bit for bit for the same processor, threads and libraries.
    ``KD_RETRAIN=1`` ignores ``reference``. Sets the global random seed.

    method: "teacher", "scratch" or "distilled", perhaps with a label of your own behind a dash.
    settings: build, teacher, answers, temperature, alpha, recipe, seed, ...; see Task.
    callbacks: Keras callbacks instead of the progress bar. They see epochs and logs, not the model.

    Raises TypeError or ValueError for an argument that does not fit, FloatingPointError if the
    training diverges, RuntimeError if another process trains this run, or if it was begun with
    other versions of the libraries.
    """
    task = Task(method, dataset, **settings)
    if (run := task.load(published=not _retrain())) is not None:
        return run
    with store.lock(task.folder / "lock", f"the run {task.folder.name} is under way in another "
                    "process. Wait for it, or stop it."):
        if (error := task.divergence()) is not None:
            raise error
        # Another process may have just finished it.
        return task.load(published=False) or task.finish(task.train(callbacks))


class Task:
    """One training, as it was asked for: checked, built and named, and not yet done.

    Args:
        build: function without arguments that returns a Keras model with logits out. By
            default build_teacher or build_student: images of 32 x 32 x 3, ten classes.
        teacher: a Run or a Keras model. A distilled student learns from it; others use it
            only to measure agreement.
        answers: the logits that the student learns from, instead of the teacher's own: one array
            (images, classes) for each view of the recipe, or a function (logits, labels,
            temperature) that changes the teacher's. With answers, any method is a distilled one.
        temperature, alpha: see Distiller; only a distilled run uses them.
        recipe: by default ``recipe_for(dataset, method)``.
        seed: decides first weights, order of batches and Dropout.
        taught_by: what the column teacher of results.csv says; by default the teacher's name.
        trainer: makes what is fitted, instead of kdlib.Distiller, from student, teacher,
            temperature, alpha and labels; see features.Trainer. Its identity() is the run's.
    """

    def __init__(self, method, dataset, *, build=None, teacher=None, answers=None,
                 temperature=4.0, alpha=0.1, recipe=None, seed=0, taught_by=None, trainer=None):
        self.distilled = method.startswith("distilled") or answers is not None
        self.taught_by = (taught_by or getattr(teacher, "name", None)) if self.distilled else None
        self.dataset, self.recipe = dataset, recipe or recipe_for(dataset, method)
        self.teacher, self.answers = getattr(teacher, "model", teacher), answers
        self.make_trainer = trainer
        self._check(method)
        self.own, self.seed = build is not None, operator.index(seed)
        self.model = self._first_model(method, build)
        self.first_answers = _check_fits("build's model", self.model, dataset)
        by_teacher = self.distilled and (not isinstance(self.answers, list) or trainer is not None)
        self.spec = {
            "code": CODE, "dataset": dataset.name, "data": fingerprints.data_digest(dataset),
            "method": method, "seed": self.seed, **self.recipe.settings(),
            "architecture": fingerprints.architecture(self.model),
            "begins_with": digests.digest(*self.model.get_weights()) if self.own else None,
            "temperature": kdlib._number("temperature", temperature) if self.distilled else None,
            "alpha": kdlib._number("alpha", alpha) if self.distilled else None,
            "teacher": fingerprints.model_digest(self.teacher) if by_teacher else None,
            "answers": fingerprints.answers_digest(self.answers),
        }
        if odd := fingerprints.odd_variables(self.model):
            self.spec["variables"] = odd
        if trainer is not None:
            self.spec["trainer"] = fingerprints.identity_of(trainer)
        self.folder = runs_folder() / f"{stem(self.spec)}-{digests.digest(self.spec)[:10]}"

    def _first_model(self, method, build):
        keras.utils.set_random_seed(self.seed)
        usual = kdlib.build_teacher if method.startswith("teacher") else kdlib.build_student
        return (build or usual)()

    def _check(self, method) -> None:
        require(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", method), f"method is {method!r}. Use "
                "letters, digits, dots and dashes, as in 'distilled-adam'.")
        name = self.dataset.name
        require(isinstance(name, str) and re.fullmatch(r"[^/\\]+", name), f"dataset.name is "
                f"{name!r}. Give words without slashes: files are named after it.")
        known = method.partition("-")[0] in ("teacher", "scratch", "distilled")
        require(known or self.distilled or self.teacher is None, f"method is {method!r}. Begin it "
                "with 'teacher', 'scratch' or 'distilled', or give answers, or no teacher.")
        require(not self.distilled or self.teacher is not None or self.answers is not None,
                f"teacher is None, but method is {method!r}. Pass a trained teacher, or answers.")
        require(self.make_trainer is None or self.distilled, f"trainer is {self.make_trainer!r}, "
                f"but method is {method!r}. Only a distilled run has one.")
        labels, classes = self.dataset.y_train, len(self.dataset.class_names)
        smallest = min(*self.dataset.x_train.shape[1:3], 128)
        require(self.recipe.shift < smallest, f"shift is {self.recipe.shift}. It has to be smaller "
                f"than {smallest}, so that what is beyond the edge can be reflected.")
        require(self.distilled or labels.min() >= 0, f"y_train holds -1 (unknown), but {method!r} "
                "learns from labels alone. Leave those images out.")
        if self.teacher is not None:
            _check_fits("teacher", self.teacher, self.dataset)
        if callable(self.answers):
            require(self.teacher is not None and self.recipe.views, "answers are a function of a "
                    "teacher's stored logits. Pass a teacher, and a recipe with views.")
        elif self.answers is not None:
            self.answers = measures.check_answers(self.answers, self.recipe, (len(labels), classes))

    def load(self, *, published: bool) -> Run | None:
        """The finished run of this task, from the runs folder or from reference."""
        name, experiment = stem(self.spec), f"{self.dataset.name}-{self.spec['method']}"
        places = [[self.folder / file for file in ("model.json", "model.keras", "answers.npz")]]
        if published:
            places += [[REFERENCE / "rows" / f"{name}.json", REFERENCE / f"weights/{name}.keras",
                        REFERENCE / f"answers/{experiment}.npz"]]
        found = (_load(*place, self) for place in places if all(f.exists() for f in place[:2]))
        return next((run for run in found if run is not None), None)

    def train(self, callbacks=None) -> resume.Keeper:
        """Fit the model from where the folder says it stopped; returns the keeper of its state."""
        if self.own:
            resume.check_loads(self.model, self.folder)
        trainer, validation, answers = self._trainer()
        recipes.compile_for(trainer, self.recipe, self.dataset, distilled=self.distilled,
                            last_layer=recipes.head(self.model))
        keeper = resume.Keeper(self.folder)
        keeper.restore(trainer)
        watching = resume.Watching(callbacks or ())
        bar = [] if watching.callbacks else [
            TqdmCallback(verbose=0, desc=self.spec["method"], leave=False)]
        try:
            if keeper.epoch < self.recipe.epochs:
                batches = Batches(self.dataset, self.recipe, seed=self.seed,
                                  first_epoch=keeper.epoch, answers=answers)
                with (recipes.fused_norm(self.model),
                      recipes.convolutions_in(self.recipe.precision)):
                    trainer.fit(batches, initial_epoch=keeper.epoch, epochs=self.recipe.epochs,
                                shuffle=False, verbose=0, validation_data=validation,
                                validation_batch_size=batch_size(self.dataset.x_val),
                                callbacks=[keeper, *bar, watching])
        except FloatingPointError:
            raise self._diverged(keeper) from None
        finally:
            for own in bar:
                own.on_train_end()
        if self.recipe.average:
            trainer.optimizer.finalize_variable_values(trainer.trainable_variables)
        return keeper

    def _trainer(self):
        """What is fitted, on which validation data, and the stored answers it learns from."""
        data, answers = self.dataset, self.answers
        if not self.distilled:  # the wrapper is compiled, so that the model is saved without Muon
            return keras.Sequential([self.model]), (data.x_val, data.y_val), None
        settings = dict(student=self.model, teacher=self.teacher, alpha=self.spec["alpha"],
                        temperature=self.spec["temperature"])
        keras.utils.set_random_seed(self.seed)  # whatever was drawn since: a trainer's layers draw
        trainer = (self.make_trainer(**settings, labels=data.y_train) if self.make_trainer
                   else kdlib.Distiller(**settings))
        if answers is None or callable(answers):  # no views: it is asked live
            answers = teacher_answers(self.teacher, data, self.recipe) or None
        if callable(change := self.answers):
            made = [change(each, data.y_train, self.spec["temperature"]) for each in answers]
            answers = measures.check_answers(made, self.recipe, answers[0].shape)
        if self.make_trainer:
            answers = self.make_trainer.lend(answers, functools.partial(
                teacher_features, self.teacher, data, self.recipe))
        judged = (np.zeros((len(data.y_val), len(data.class_names)), "float32")
                  if self.teacher is None else stored_answers(self.teacher, data, "val"))
        return trainer, ((data.x_val, judged), data.y_val), answers

    def finish(self, keeper) -> Run:
        """Measure the model and save the result. Delete the states last: nothing can be lost."""
        logits = _both_logits(self.model, self.dataset)
        notes = self._notes(keeper, _figures(logits, self.dataset, self.teacher))
        run = save(self.folder, self.model, logits, notes, first_answers=self.first_answers)
        for leftover in (*self.folder.glob("state-?.npz"), *self.folder.glob("aside-*")):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        return run

    def _notes(self, keeper, figures: dict) -> dict:
        history = keeper.history
        if self.teacher is None and self.distilled:
            history = _unjudged(history)
        return measures.notes(self.spec, self.model, figures, history, keeper.machines,
                              teacher=self.teacher, taught_by=self.taught_by)

    def _diverged(self, keeper) -> FloatingPointError:
        """The error to raise. It is kept: the same training would diverge again."""
        sentence = (f"the loss of {self.folder.name} is not finite in epoch {keeper.epoch + 1}: "
                    "it diverged. Choose a smaller learning rate, or look for nan in its data. To "
                    "try the same again, delete its folder.")
        store.write_notes(self.folder / "diverged.json",
                          self._notes(keeper, {}) | {"diverged": sentence})
        return self.divergence()

    def divergence(self) -> FloatingPointError | None:
        """The error of this training if it diverged before, with these libraries."""
        notes = store.kept_notes(self.folder / "diverged.json")
        if notes is None or notes["row"]["versions"] != fingerprints.libraries():
            return None
        error = FloatingPointError(notes["diverged"])
        error.folder = self.folder  # where its notes are; see experiments.publish_divergence
        return error


# A digest of the code that acts on the numbers of a run, comments and docstrings aside. Taken
# once, here: a file that is edited while a training runs does not change what has been read.
CODE = digests.digest(VIEW_CODE, digests.code_digest(*digests.with_helpers(
    kdlib.distillation_loss, kdlib.Distiller.__init__, kdlib.Distiller.call,
    kdlib.Distiller._split, kdlib.Distiller.compute_loss, kdlib.Distiller._labels,
    measures.figures, predict_logits, Batches, make_optimizer, recipes.Muon, recipes.head,
    recipes.compile_for, recipes.SmoothedCrossentropy, recipes.fused_norm,
    recipes.FusedBatchNormalization, recipes.convolutions_in)),
    digests.code_digest(Task._first_model, Task._trainer, Task.train))


def save(folder: Path, model, logits, notes: dict, *, first_answers) -> Run:
    """Write the files of a finished run, its notes last."""
    half = measures.write_logits(folder / "answers.npz", stem(notes["spec"]), logits)
    store.write_whole(folder / "model.keras", model.save)
    store.write_notes(folder / "model.json", notes | {
        "model": fingerprints.model_digest(model), "first_answers": first_answers.tolist(),
        "weights": digests.digest(*model.get_weights())})
    return Run(model, notes["history"], notes["row"], half, folder)


def stem(row: dict) -> str:
    """The name of a run's files: dataset, method, T and alpha if unusual, seed."""
    usual = row["temperature"] is None or (row["temperature"], row["alpha"]) == (4.0, 0.1)
    setting = "" if usual else f"-T{row['temperature']:g}-alpha{row['alpha']:g}"
    return f"{row['dataset']}-{row['method']}{setting}-seed{row['seed']}"


def _retrain() -> bool:
    value = os.environ.get("KD_RETRAIN") or "0"
    require(value in ("0", "1"), f"KD_RETRAIN is {value!r}. Set 1 to train anew, else 0.")
    return value == "1"


def _check_fits(role: str, model, dataset) -> np.ndarray:
    """A model's answers to two images of the dataset, if it takes them and knows the classes."""
    classes = kdlib.check_model(role, model)
    require(classes in (None, len(dataset.class_names)), f"{role} gives {classes} logits, but "
            f"{dataset.name} has {len(dataset.class_names)} classes.")
    return predict_logits(model, dataset.x_train[:2], role=role)


def _load(notes: Path, weights: Path, answers: Path, task: Task) -> Run | None:
    """The finished run in these files, if it is the one that the task describes."""
    try:
        found = store.read_notes(notes)
        spec = digests.text({**found["spec"], "code": CODE})
        if spec != digests.text(task.spec) or not fingerprints.alike(
                task.model, task.first_answers, found["first_answers"]):
            return None
        if found["spec"]["code"] != CODE:
            warnings.warn(f"{notes.stem} was made by other code than today's: it is not used. If "
                          "no number changed: python reference/experiments.py --restamp.",
                          stacklevel=5)
            return None
        model = keras.saving.load_model(weights, compile=False)
        require(digests.digest(*model.get_weights()) == found["weights"],
                "its weights are not those of its notes")
    except store.UNREADABLE as error:
        warnings.warn(f"{notes.stem} in {notes.parent.name} is damaged ({error}): it is not used.",
                      stacklevel=5)
        return None
    row = {key: found["row"][key] for key in RESULT_COLUMNS}
    if row["versions"] != fingerprints.libraries():
        again = "KD_RETRAIN=1" if notes.parent.name == "rows" else "Without its folder"
        warnings.warn(f"{notes.stem} was made with {row['versions']}; here is "
                      f"{fingerprints.libraries()}. {again} it is trained anew.", stacklevel=5)
    logits = _kept_logits(answers, stem(task.spec), model, task.dataset)
    row["teacher"], history = task.taught_by, found["history"]
    if fingerprints.model_digest(task.teacher) != found["judge"]:
        row["agreement"] = _agreement(logits, task.dataset, task.teacher)
        history = _unjudged(history) if task.distilled else history
    return Run(model, history, row, logits, notes.parent)


def _unjudged(history: dict) -> dict:
    """Without what came of comparing validation answers with those of a teacher."""
    return {key: values for key, values in history.items()
            if key not in ("val_loss", "val_distillation_loss")}


def published(name: str) -> keras.Model:
    """The published model of this name, as "cifar10-teacher-seed0"."""
    return keras.saving.load_model(REFERENCE / "weights" / f"{name}.keras", compile=False)


def _kept_logits(path: Path, name: str, model, dataset) -> dict[str, np.ndarray]:
    """A run's logits as they were kept, if they are this model's; else it is asked again."""
    found, parts = measures.read_logits(path, name), {"val": dataset.x_val, "test": dataset.x_test}
    if found and all(len(found[part]) == len(images) and fingerprints.alike(
            model, model(images[:4], training=False), found[part][:4])
            for part, images in parts.items()):
        return found
    return measures.halved(_both_logits(model, dataset))


# --- measurements ---------------------------------------------------------------------

def measure(model, dataset, teacher=None) -> dict[str, float]:
    """val_accuracy; and on the test set: accuracy, nll (nats), ece, agreement with a teacher."""
    return _figures(_both_logits(model, dataset), dataset, teacher)


def _both_logits(model, dataset) -> dict[str, np.ndarray]:
    return {part: predict_logits(model, getattr(dataset, f"x_{part}")) for part in ("val", "test")}


def _figures(logits, dataset, teacher) -> dict[str, float]:
    return {**measures.figures(logits, dataset), "agreement": _agreement(logits, dataset, teacher)}


def _agreement(logits, dataset, teacher) -> float | None:
    if teacher is None:
        return None
    theirs = stored_answers(teacher, dataset, "test")
    return round(float(np.mean(logits["test"].argmax(-1) == theirs.argmax(-1))), 4)
