"""The engine of parts D and I: seeds side by side, beside Keras's own fit."""

import os
import subprocess

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
rounded, lanes.rounded = lanes.rounded, lambda model: None
for each in (of("scratch-5-epochs-lanes"), of("distilled-5-epochs-lanes"),
             of("distilled-5-epochs-at-kd", factor=0.01), of("distilled-lanes")):
    share = strayed(each, folder)
    print(each.method, share)
    assert share < 1e-4, share

model, images = small(), pictures(20)[0]
exact = np.asarray(model(images, training=False))
rounded(model)
close = np.asarray(model(images, training=False))
assert np.any(exact != close)
np.testing.assert_allclose(close, exact, atol=0.05 * np.abs(exact).max())
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
