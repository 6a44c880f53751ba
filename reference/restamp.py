"""After a change that is not meant to change any number: published runs under today's code.

    python reference/experiments.py --restamp           today's code beside the last commit's
    python reference/experiments.py --restamp COMMIT    beside another commit's
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from reference import experiments, fingerprints, runs, store  # isort: skip  (keeps TensorFlow quiet)
import keras
from kdlib import require

TRAINING = """
import json, os, sys
from contextlib import suppress
from dataclasses import replace
sys.path.insert(0, os.getcwd())
from reference import controls, experiments, fingerprints, runs
import keras
data = experiments.Maker().data("digits")
teacher = keras.saving.load_model(runs.REFERENCE / "weights" / "digits-teacher-seed0.keras")
for method in ("scratch", "distilled"):
    for precision in ("float32", "bfloat16"):
        recipe = replace(runs.recipe_for(data, method), precision=precision)
        with suppress(RuntimeError):  # a processor without bfloat16
            model = runs.train_or_load(method, data, teacher=teacher, recipe=recipe).model
            print(method, precision, fingerprints.digest(*model.get_weights()))
print(json.dumps({name: fingerprints.answers_digest(each)
                  for name, each in controls.CONTROLS.items()}))
print(runs.CODE)
"""


def restamp(commit: str = "HEAD") -> int:
    """Write the digest of today's code into the published notes of a commit's, if they train alike.

    Published runs are found only under the code that made them. After a change that is not
    meant to change any number, this trains a scratch and a distilled student on digits in each
    precision with either code, and compares the weights: to the last bit. What none of them
    uses (other optimizers, trainers, controls) it takes your word for, and names. Notes of yet
    another code stay as they are. Needs git. Raises ValueError if the weights differ.
    """
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder, "before")
        subprocess.run(["git", "archive", "-o", before.with_suffix(".tar"), commit, "kdlib.py",
                        "reference"], cwd=runs.ROOT, check=True)
        with tarfile.open(before.with_suffix(".tar")) as archive:
            archive.extractall(before, filter="data")
        *old, was, code = _trained(before, Path(folder, "runs-before"))
        *new, now, _ = _trained(runs.ROOT, Path(folder, "runs-today"))
    print(*old, *new, sep="\n")
    require(old == new, f"today's code gives other numbers than that of {commit}. Make the runs "
            "again.")
    with experiments._alone():
        was, now = json.loads(was), json.loads(now)
        return _write_digests({code}, {was[name]: now[name] for name in was.keys() & now.keys()})


def _trained(tree: Path, folder: Path) -> list[str]:
    """What the code in a folder prints of its training."""
    settings = {"KD_RUNS_DIR": str(folder), "KD_RETRAIN": "1"}
    done = subprocess.run([sys.executable, "-c", TRAINING], cwd=tree, env=os.environ | settings,
                          check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.splitlines()


def _write_digests(proven: set[str], answers: dict[str, str]) -> int:
    """Today's digests of code, architectures and models, where the code was one of these; and of
    functions that made the answers, by their digests before."""
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
        made_by = notes["spec"]["answers"]
        notes["spec"]["answers"] = answers.get(made_by, made_by)
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
