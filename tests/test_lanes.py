"""The engine of parts D and I: seeds side by side, beside Keras's own fit."""

from reference import experiments, fingerprints, lanes, runs, store  # isort: skip  (first: keeps TensorFlow quiet)
import json
import os
import subprocess

import kdlib
import numpy as np
import pytest
from conftest import ROOT
from test_distiller import python_with

ON_JAX = """
import sys
from dataclasses import replace
from pathlib import Path

import kdlib
import keras
import numpy as np
from reference import lanes, recipes

rng = np.random.default_rng(0)
colours = rng.integers(40, 216, (10, 1, 1, 3))


def pictures(count):
    labels = np.arange(count, dtype="int32") % 10
    noisy = colours[labels] + rng.normal(0, 40, (count, 32, 32, 3))
    return np.clip(noisy, 0, 255).astype("uint8"), labels


data = kdlib.Dataset("cifar10", kdlib.CIFAR10_CLASSES, *pictures(100), *pictures(50), *pictures(50))


def small():  # its layers have the usual names
    return kdlib._vgg(((8,), (8, 8), (8, 8)), num_classes=10, name="small")


short = {"epochs": 2, "batch_size": 50, "optimizer": "sgd"}


def of(name, **more):
    each = lanes.wanted([name])[0]
    recipe = each.recipe | short
    return replace(each, build=small, seeds=(0, 1), recipe=recipe, **more)


def fitted(each, seed, run):
    # the same by Keras's fit, on the answers that the lanes had
    recipe = each.full_recipe()
    teacher = run.loaded(each.teachers(seed)[0]) if each.distilled else None
    keras.utils.set_random_seed(seed)
    student = small()
    answers, trainer = None, student
    if each.distilled:
        answers = [np.asarray(a) for a in run._answers(each, recipe, seed)] or None
        settings = dict(student=student, teacher=teacher, temperature=each.temperature,
                        alpha=each.alpha)
        trainer = (each.trainer()(**settings, labels=data.y_train) if each.loss
                   else kdlib.Distiller(**settings))
    recipes.compile_for(trainer, recipe, data, distilled=each.distilled, last_layer="logits")
    codes = kdlib.view_codes(images=100, views=recipe.views, shift=recipe.shift, flip=recipe.flip)
    for k in range(recipe.epochs):
        order = np.random.default_rng([seed, k]).permutation(100)
        images = kdlib.augment(data.x_train, codes[k])[order]
        seen = images if answers is None else (images, answers[k][order])
        trainer.fit(seen, data.y_train[order], batch_size=50, shuffle=False, verbose=0)
    return student.get_weights()


def strayed(each, folder):
    lanes.LANES = 2
    run = lanes.Run(folder, [each], data)
    run.make(each, *run.arm(each))
    worst = 0
    for seed in each.seeds:
        with np.load(folder / f"{each.method}-seed{seed}.npz") as file:
            got = [file[key] for key in file.files if key != "notes"]
        keras.utils.set_random_seed(seed)
        first, want = small().get_weights(), fitted(each, seed, run)
        apart, way = (np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(want, other, strict=True)))
                      for other in (got, first))
        worst = max(worst, apart / way)
    return worst


folder = Path(sys.argv[1])
rounded, lanes.rounded = lanes.rounded, lambda *_: None
for each in (of("scratch-5-epochs-lanes"),  # and a small weight, as a large one magnifies rounding
             of("distilled-5-epochs-at-kd", factor=0.01, teacher="teacher-seed{seed}")):
    share = strayed(each, folder)
    print(each.method, share)
    assert share < 1e-4, share

images, found = pictures(20)[0], []
for kind in (lanes._Rounded, lanes._AsProduct):
    keras.utils.set_random_seed(0)
    model = small()
    exact = np.asarray(model(images, training=False))
    rounded(model, kind)
    found.append(np.asarray(model(images, training=False)))
    assert np.any(exact != found[-1])
for close in (exact, found[1]):
    np.testing.assert_allclose(found[0], close, atol=0.05 * np.abs(exact).max())
print("fine")
"""


@pytest.mark.slow
def test_lanes_train_as_fit_does(tmp_path):
    """Same first weights, batches, views, answers and optimizer: the same students."""
    done = subprocess.run(
        [python_with("jax"), "-c", ON_JAX, str(tmp_path)], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": "jax", "TF_CPP_MIN_LOG_LEVEL": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "fine"


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A function that writes a run as it comes back, and publishes it beside nothing else."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (30, 32, 32, 3)).astype("uint8") for _ in range(3)]
    labels = np.arange(30, dtype="int32") % 10
    data = kdlib.Dataset("cifar10", kdlib.CIFAR10_CLASSES, images[0], labels, images[1], labels,
                         images[2], labels)
    monkeypatch.setattr(runs, "REFERENCE", tmp_path)
    (tmp_path / "rows").mkdir()
    (tmp_path / "answers").mkdir()
    (tmp_path / "weights").mkdir()
    (each,), path = lanes.wanted(["scratch-5-epochs-lanes"]), tmp_path / "back" / "run.npz"
    path.parent.mkdir()
    weights = kdlib.build_student().get_weights()

    def publish(**changed):
        history = {key: [1.0] * 5 for key in ("loss", "accuracy", "val_accuracy", "seconds")}
        notes = {"data": fingerprints.data_digest(data), "weight": None, "machine": "a machine",
                 "versions": "jax 1", "history": history} | changed
        np.savez(path, notes=json.dumps(notes),
                 **{f"{k:03d}": value for k, value in enumerate(weights)})
        lanes._publish(path, each, 0, data, None)
        return store.read_notes(tmp_path / "rows" / f"{each.stem(0)}.json")["row"]

    return publish


def test_what_comes_back_is_measured_here(trained):
    row = trained()
    assert (row["machine"], row["versions"], row["seconds"]) == ("a machine", "jax 1", 5)
    assert 0 <= row["test_accuracy"] <= 1 and row["epochs"] == 5


def test_a_run_of_other_images_is_refused(trained):
    with pytest.raises(ValueError, match="other images, labels or another split"):
        trained(data="another")


def test_a_run_that_is_cut_off_is_refused(trained):
    with pytest.raises(ValueError, match="has 2 epochs"):
        trained(history={"loss": [1.0, 1.0]})


def test_a_run_that_diverged_is_a_row_without_figures(trained):
    history = {key: [1.0] * 5 for key in ("accuracy", "val_accuracy", "seconds")}
    row = trained(history=history | {"loss": [1.0, np.nan, np.nan, np.nan, np.nan]})
    assert row["test_accuracy"] is None and row["machine"] == "a machine"


def test_elsewhere_it_is_refused_with_a_sentence():
    (each,) = lanes.wanted(["distilled-5-epochs-lanes"])
    with pytest.raises(ValueError, match="python reference/lanes.py"):
        experiments.Maker().settings(each, 0)
    with pytest.raises(ValueError, match="scratch is not made by lanes.py"):
        lanes.wanted(["scratch"])
