"""The program that makes the missing rows of results.csv, and publishes them.

    python reference/experiments.py --list          what there is, what is missing, how long
    python reference/experiments.py                 make everything that is missing
    python reference/experiments.py scratch best    make these experiments only
    python reference/experiments.py --workers 2     two at a time; see cluster.py

Interrupt it whenever you like: it goes on after the last whole epoch. plan.py says
what each row is.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

if __name__ == "__main__":  # run as a file: the project's folder is not on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from reference import accelerated, digests, evidence, fingerprints, runs, store  # isort: skip  (first: keeps TensorFlow quiet)
import filelock
import kdlib
import keras
import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from reference.controls import CONTROLS, SIGNALS, few_labels, wrong_labels
from reference.plan import EXPERIMENTS, Experiment

# --- making rows ----------------------------------------------------------------------


class Maker:
    """Trains or loads what the table describes; datasets are loaded once."""

    def __init__(self):
        self.data = functools.cache(kdlib.load_dataset)

    def teacher(self, each: Experiment, seed: int, **more):
        """The model that teaches a run, made of several if its signal says so."""
        if each.teacher is None:
            return None
        teachers = []
        for name in each.teachers(seed):
            found = run_of(f"{each.dataset}-{name}")
            teachers.append(self.make(*found, **more).model)
            _check_published(*found, teachers[-1])
        return SIGNALS[each.signal](*teachers) if each.signal else teachers[0]

    def settings(self, each: Experiment, seed: int, **more) -> dict:
        """What train_or_load needs, its teacher included."""
        kdlib.require(each.labels == 100 or not each.control, f"{each.method}: a control needs the "
                      "label of every image.")
        kdlib.require(not each.on_accelerator, f"{each.method} is made on an accelerator: python "
                      "reference/accelerated.py")
        data, teacher = self.data(each.dataset), self.teacher(each, seed, **more)
        if each.labels < 100:
            data = few_labels(data, each.labels, hide=each.distilled and each.hide, seed=seed)
        if each.wrong:
            data = wrong_labels(data, each.wrong)
        return dict(method=each.method, dataset=data, teacher=teacher,
                    answers=CONTROLS.get(each.control), build=each.build,
                    temperature=each.temperature, alpha=each.alpha, recipe=each.full_recipe(),
                    seed=seed, taught_by=each.taught_by(seed), trainer=each.trainer())

    def make(self, each: Experiment, seed: int, **more) -> runs.Run:
        settings, missing = self.settings(each, seed, **more), notes_of(each, seed) is None
        # Of a missing run there may be older weights in reference.
        with mock.patch.dict(os.environ, {"KD_RETRAIN": "1"} if missing else {}):
            return runs.train_or_load(**settings, **more)


def run_of(stem: str) -> tuple[Experiment, int]:
    """The experiment and seed behind the name of a run's files."""
    for each in EXPERIMENTS:
        for seed in each.seeds:
            if each.stem(seed) == stem:
                return each, seed
    raise ValueError(f"no experiment makes {stem!r}; --list shows what there is")


def notes_of(each: Experiment, seed: int) -> dict | None:
    """The published notes of a run, if they are of these settings, this code and this teacher."""
    path = runs.REFERENCE / "rows" / f"{each.stem(seed)}.json"
    if not path.exists():
        return None
    notes = store.read_notes(path)
    if notes.get("control") != _control(each) or "rounding" in notes:
        return None  # "rounding": its last bits are those of an older code
    return notes if _fits(notes, each, seed) else None


def _fits(notes: dict, each: Experiment, seed: int) -> bool:
    """Whether they are of these settings, this code and this teacher."""
    if any(notes_of(trial, 100) is None for trial in each.trials()):
        return False  # nobody knows which weight it has to have
    wanted = {"precision": None, **each.full_recipe().settings(), "code": runs.CODE,
              "trainer": _trainer(each)}
    found = {key: notes["spec"].get(key) for key in wanted}
    if digests.text(found) != digests.text(wanted):
        return False
    return not each.distilled or _digest_of_teacher(each, seed) == notes["judge"]


def _trainer(each: Experiment) -> dict | None:
    """What a run's spec says of its trainer: what fits it, and where."""
    parts = accelerated if each.on_accelerator else None, each.trainer()
    found = [fingerprints.identity_of(part) for part in parts if part is not None]
    if len(found) < 2:
        return found[0] if found else None
    return {**found[0], **found[1], "code": digests.digest(*(each["code"] for each in found))}


def _control(each: Experiment) -> str:
    """The digest of what acts on model, data and answers before a run sees them."""
    control, teaches = CONTROLS.get(each.control), each.method.startswith("teacher")
    usual = kdlib.build_teacher if teaches else kdlib.build_student
    used = [getattr(control, "func", control), SIGNALS.get(each.signal), each.build or usual,
            few_labels if each.labels < 100 else None, wrong_labels if each.wrong else None]
    settings = [each.control, each.signal, each.labels, each.hide, each.wrong,
                getattr(control, "keywords", None)]
    return digests.digest(settings, digests.code_digest(
        *digests.with_helpers(*filter(None, used))))


def _check_published(each: Experiment, seed: int, model) -> None:
    """A published student may only have learned from the teacher that its row names."""
    path = runs.REFERENCE / "rows" / f"{each.stem(seed)}.json"
    kdlib.require(not path.exists() or fingerprints.model_digest(model) == store.read_notes(
        path).get("model"), f"the teacher {each.stem(seed)} at hand is not the published one. Make "
        f"it first: python reference/experiments.py {each.method}")


def _digest_of_teacher(each: Experiment, seed: int) -> str | None:
    """Of the published models that teach; None where one of them is not there yet."""
    names = [f"{each.dataset}-{name}" for name in each.teachers(seed)]
    paths = [runs.REFERENCE / "rows" / f"{name}.json" for name in names]
    if not all(path.exists() for path in paths):
        return None
    digests = tuple(store.read_notes(path).get("model") for path in paths)
    if None in digests:  # one of them diverged
        return None
    return _digest_of_several(each.signal, tuple(names), digests) if each.signal else digests[0]


@functools.cache
def _digest_of_several(signal: str, names: tuple, digests: tuple) -> str:
    """Asked for each seed, so kept; digests tell when a teacher was made again."""
    return fingerprints.model_digest(SIGNALS[signal](*map(runs.published, names)))


def missing(experiments) -> list[tuple[Experiment, int]]:
    """Runs without published notes."""
    return [(each, seed) for each in experiments for seed in each.seeds
            if notes_of(each, seed) is None]


def to_make(experiments) -> list[tuple[Experiment, int]]:
    """What is missing of these and can be made here, each after the teachers and trials that it
    needs."""
    found = []

    def add(each, seed):
        if each.on_accelerator or (each, seed) in found or notes_of(each, seed) is not None:
            return
        for name in each.teachers(seed):
            add(*run_of(f"{each.dataset}-{name}"))
        for trial in each.trials():
            add(trial, 100)
        found.append((each, seed))

    for each, seed in missing(experiments):
        add(each, seed)
    return found


def publish(run: runs.Run, each: Experiment) -> None:
    """Copy a finished run from the runs folder into ``reference``, and renew results.csv."""
    name, notes = each.stem(run.row["seed"]), store.read_notes(run.folder / "model.json")
    if each.choice:
        notes["row"] |= dict.fromkeys(("test_accuracy", "nll", "ece", "agreement"))
    weights = runs.REFERENCE / "weights" / f"{name}.keras"
    with _publishing(name, notes, each):
        if each.weights:
            content = (run.folder / "model.keras").read_bytes()
            store.write_whole(weights, lambda aside: aside.write_bytes(content))
        else:  # perhaps it had some before
            weights.unlink(missing_ok=True)
        if not each.choice:
            _keep_answers(name, each, dict(np.load(run.folder / "answers.npz")))


def publish_divergence(error: FloatingPointError, each: Experiment, seed: int) -> bool:
    """A run that diverged is a row without figures: reported, not replaced."""
    name, folder = each.stem(seed), getattr(error, "folder", None)
    if folder is None or folder.name.rpartition("-")[0] != name:  # perhaps its teacher diverged
        return False
    with _publishing(name, store.read_notes(folder / "diverged.json"), each):
        (runs.REFERENCE / "weights" / f"{name}.keras").unlink(missing_ok=True)
        _keep_answers(name, each, {})
    return True


def _alone():
    """One process at a time writes into reference. It may be entered again."""
    return filelock.FileLock(runs.REFERENCE / ".lock", is_singleton=True)


@contextlib.contextmanager
def _publishing(name: str, notes: dict, each: Experiment):
    """Notes are written last, beside what they speak of."""
    with _alone():
        target = runs.REFERENCE / "rows" / f"{name}.json"
        target.unlink(missing_ok=True)  # never new weights beside old notes
        yield
        store.write_notes(target, notes | {"control": _control(each)})
        write_table()


def _keep_answers(name: str, each: Experiment, new: dict) -> None:
    """The answers to each validation and test image, one file an experiment.

    ``NAME/val``, ``NAME/test``: float16 logits; the answered class is their argmax.
    """
    path = runs.REFERENCE / "answers" / f"{each.dataset}-{each.method}.npz"
    kept = dict(np.load(path)) if path.exists() else {}
    kept = {key: value for key, value in kept.items() if not key.startswith(f"{name}/")} | new
    if kept:
        store.write_whole(path, lambda aside: np.savez_compressed(aside, **kept))
    else:
        path.unlink(missing_ok=True)


def write_table() -> None:
    """results.csv: one row for each of the published notes."""
    with _alone():
        rows = [store.read_notes(path)["row"] for path in (runs.REFERENCE / "rows").glob("*.json")]
        table = pd.DataFrame(rows, columns=runs.RESULT_COLUMNS).sort_values(
            ["dataset", "method", "temperature", "alpha", "seed"])
        store.write_whole(runs.REFERENCE / "results.csv",
                          lambda aside: table.to_csv(aside, index=False))


def students_by_epochs(dataset: str) -> pd.DataFrame:
    """The published students of T = 4 and alpha = 0.1, whatever the length of their training.

    Columns student ("scratch", "distilled"), epochs, seed, and in points test, val and gap:
    accuracy on the training views in the last epoch, minus validation.
    """
    notes = [store.read_notes(path) for path in (runs.REFERENCE / "rows").glob("*.json")]
    table = pd.DataFrame([note["row"] | {"training": note["history"]["accuracy"][-1]}
                          for note in notes if "diverged" not in note])
    table = evidence.usual_students(table[(table.dataset == dataset) & (table.seed < 100)])
    table = table.assign(test=100 * table.test_accuracy, val=100 * table.val_accuracy,
                         gap=100 * (table.training - table.val_accuracy))
    columns = ["student", "epochs", "seed", "test", "val", "gap"]
    return table.sort_values("method")[columns].drop_duplicates(columns[:3])


# --- the command ----------------------------------------------------------------------


def seconds_per_epoch() -> Callable[[Experiment], float]:
    """From plain float32 rows made on processors: the median of a model and dataset, else a guess.
    What a loss on live features costs beyond that was measured by tests/benchmark.py."""
    table = pd.read_csv(runs.REFERENCE / "results.csv")
    cost = pd.read_csv(runs.REFERENCE / "benchmark.csv", index_col="figure")["value"]

    def half(each):
        return each.full_recipe().precision == "bfloat16"

    plain = {each.method for each in EXPERIMENTS if not (
        each.on_accelerator or each.loss or half(each))}
    table = table[table.method.isin(plain)]
    rate = (table.seconds / table.epochs).groupby([table.dataset, table.model]).median()

    def estimate(each: Experiment) -> float:
        model = "teacher" if each.method.startswith("teacher") else "student"
        usual = float(rate.get((each.dataset, model), 15.0))
        live = cost[f"{each.loss}_over_distilling_step"] if each.loss and not each.stored else 1
        return usual * live * (0.5 if half(each) else 1)

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
    parser.add_argument("--workers", type=int, help="so many trainings at a time, with Ray")
    parser.add_argument("--cores", type=int, help="threads of one training; all by default, or "
                        "1 with --workers")
    parser.add_argument("--address", help="of a running Ray cluster; by default one is started")
    parser.add_argument("--restamp", metavar="COMMIT", nargs="?", const="HEAD",
                        help="after a refactoring: see restamp()")
    options = parser.parse_args(arguments)
    if options.restamp:
        from reference.restamp import restamp  # it needs this file
        print(f"{restamp(options.restamp)} notes carry the digest of today's code")
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
    from reference import cluster  # it needs this file
    if options.workers is None:
        cluster.limit_threads(options.cores)
    else:
        cluster.needed("ray", "--workers")
    write_table()  # a kill may have come between the last notes and it
    estimate, todo, maker = seconds_per_epoch(), to_make(chosen), Maker()
    total = sum(estimate(each) * each.full_recipe().epochs for each, _ in todo)
    with tqdm(total=total, unit="s", unit_scale=True, smoothing=0.05) as bar:
        made = []
        while todo:
            if options.workers is None:
                each, seed = todo[0]
                made.append(todo[0])
                progress = Progress(bar, each.stem(seed), estimate(each))
                try:
                    publish(maker.make(each, seed, callbacks=[progress]), each)
                except FloatingPointError as error:  # the others go on
                    publish_divergence(error, each, seed)
                    bar.write(f"{each.stem(seed)}: {error}")
            else:
                made += todo
                cluster.make([each.stem(seed) for each, seed in todo], workers=options.workers,
                             cores=options.cores or 1, address=options.address, bar=bar,
                             publish=publish)
            # A teacher that was made anew makes its students missing, so look again.
            todo = [pair for pair in to_make(chosen) if pair not in made]


for _each in EXPERIMENTS:  # read now: a file edited later is not what runs
    _control(_each)

if __name__ == "__main__":
    main()
