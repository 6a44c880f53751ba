"""After a change that is not meant to change any number: published runs under today's code.

    python reference/experiments.py --restamp
"""

from __future__ import annotations

import os
import tempfile
from unittest import mock

from reference import experiments, fingerprints, runs, store  # isort: skip  (keeps TensorFlow quiet)
import keras
import numpy as np


def restamp() -> int:
    """Write the digest of today's code into the published notes, if it gives their numbers.

    Published runs are found only under the code that made them. After a change that is not
    meant to change any number, this trains a scratch and a distilled student on digits and
    compares their losses, epoch by epoch, with the published ones: to the last bit on the
    kind of machine that made them, else to one per cent in the first epoch: on digits another
    processor's rounding has grown to ten per cent by the second. What neither of them uses (other
    optimizers, trainers, controls) it takes your word for, and names. Notes of yet another code
    than the two stay as they are.
    """
    maker, proven = experiments.Maker(), set()
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(
            os.environ, KD_RUNS_DIR=folder, KD_RETRAIN="1"):
        data = maker.data("digits")
        teacher = keras.saving.load_model(runs.REFERENCE / "weights" / "digits-teacher-seed0.keras")
        for method in ("scratch", "distilled"):
            path = runs.REFERENCE / "rows" / f"digits-{method}-seed0.json"
            run, notes = runs.train_or_load(method, data, teacher=teacher), store.read_notes(path)
            new, old = run.history["loss"], notes["history"]["loss"]
            print(method, "loss published", old, "now", new)
            alike = all(run.row[key] == notes["row"][key] for key in ("machine", "versions"))
            if new != old if alike else not np.allclose(old[:1], new[:1], rtol=0.01):
                raise SystemExit("The code gives other numbers now: make the runs again.")
            proven.add(notes["spec"]["code"])
    with experiments._alone():
        return _write_digests(proven)


def _write_digests(proven: set[str]) -> int:
    """Today's digests of code, architectures and models, where the code was one of these."""
    paths = {path.stem: path for path in (runs.REFERENCE / "rows").glob("*.json")
             if store.read_notes(path)["spec"]["code"] in proven}
    today, words = {}, set()
    for weights in (runs.REFERENCE / "weights").glob("*.keras"):
        if weights.stem not in paths:
            continue
        notes, model = store.read_notes(paths[weights.stem]), keras.saving.load_model(weights)
        today[notes["spec"]["architecture"]] = fingerprints.architecture(model)
        today[notes["model"]] = fingerprints.model_digest(model)
    for path in paths.values():
        notes = store.read_notes(path)
        each, _ = experiments.run_of(path.stem)
        before = notes["control"], notes["spec"].get("trainer")
        notes["spec"]["code"], notes["control"] = runs.CODE, experiments._control(each)
        if before[1]:
            notes["spec"]["trainer"] = {**before[1], "code": experiments._trainer(each)["code"]}
        if before != (notes["control"], notes["spec"].get("trainer")):
            words.add(each.method)
        for holder, keys in ((notes["spec"], ("architecture", "teacher")),
                             (notes, ("model", "judge"))):
            holder |= {key: today.get(holder[key], holder[key]) for key in keys if key in holder}
        store.write_notes(path, notes)
    print("By your word, as their control or trainer is another:", *sorted(words) or ["none"])
    return len(paths)
