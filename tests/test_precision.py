"""Convolutions in bfloat16: what is rounded, what is not, and what a run says of it."""

from reference import features, recipes, runs  # isort: skip  (first: keeps TensorFlow quiet)
from reference import plan  # isort: skip
import re
from dataclasses import replace

import kdlib
import keras
import numpy as np
import pytest
import tensorflow as tf
from test_distiller import tiny


@pytest.fixture
def bfloat16():
    """Skip where the processor has none."""
    try:
        with recipes.convolutions_in("bfloat16"):
            pass
    except RuntimeError as error:
        pytest.skip(str(error))


def finest(function):
    """The smallest step from 1, as a power of 2, that a function of a number can tell from none."""
    return next(k for k in range(40) if not np.any(function(1 + 2.0**-k) != function(1.0))) - 1


@tf.function
def convolved(number):
    return tf.nn.conv2d(tf.fill((1, 8, 8, 16), number), tf.ones((3, 3, 16, 16)), 1, "SAME")


@tf.function
def multiplied(number):
    return tf.fill((4, 16), number) @ tf.ones((16, 16))


def test_convolutions_are_rounded_and_matrix_products_are_not(bfloat16):
    with recipes.convolutions_in("bfloat16"):
        assert finest(lambda n: convolved(tf.constant(n, "float32")).numpy()) == 7  # bits
        assert finest(lambda n: multiplied(tf.constant(n, "float32")).numpy()) >= 19
    assert finest(lambda n: convolved(tf.constant(n, "float32")).numpy()) >= 19


def test_a_processor_without_bfloat16_is_refused(monkeypatch):
    monkeypatch.setattr(recipes, "_rounds", lambda: False)
    with pytest.raises(RuntimeError, match="this processor computes in float32. Use another"):
        with recipes.convolutions_in("bfloat16"):
            pass
    after = tf.config.optimizer.get_experimental_options()
    assert not after.get("auto_mixed_precision_onednn_bfloat16", False)


def test_another_precision_is_another_run(bfloat16, tmp_path, monkeypatch):
    monkeypatch.setenv("KD_RUNS_DIR", str(tmp_path))
    data = kdlib.load_dataset("digits")
    data = replace(data, x_train=data.x_train[:100], y_train=data.y_train[:100])
    recipe = runs.Recipe(epochs=1, batch_size=50, flip=False)
    assert "precision" not in recipe.settings()  # as in older notes
    half = replace(recipe, precision="bfloat16")
    made = [runs.train_or_load("scratch", data, build=tiny, recipe=each)
            for each in (recipe, half, half)]
    cpu, word = re.escape(made[0].row["machine"]), ", bfloat16"
    assert [re.sub(cpu, "", run.row["machine"]) for run in made] == ["", word, word]
    assert made[0].folder != made[1].folder == made[2].folder
    weights = [run.model.get_weights() for run in made]
    assert any(np.any(a != b) for a, b in zip(*weights[:2], strict=True))
    for a, b in zip(*weights[1:], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rkd", "sp", "at"])
def test_the_losses_of_features_stay_what_they_are(name, bfloat16):
    images = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3)).astype("uint8")
    labels, method, losses = np.arange(50, dtype="int32") % 10, features.METHODS[name], []
    for precision in ("float32", "bfloat16"):
        keras.utils.set_random_seed(0)
        trainer = features.Trainer(name, method.weight, *plan.PLACES[method.where])(
            student=kdlib.build_student(), teacher=kdlib.build_teacher(), temperature=4.0,
            alpha=1.0, labels=labels)
        trainer.compile(keras.optimizers.SGD(0.0))
        with recipes.convolutions_in(precision):
            losses.append(trainer.train_on_batch(images, labels, return_dict=True)["feature_loss"])
    assert losses[0] != losses[1]
    np.testing.assert_allclose(*losses, rtol=0.02)


def test_who_is_compared_has_one_precision():
    """The students of parts D, G and I, each with those that they are measured against."""
    def student(each):
        return each.dataset == "cifar10" and not each.on_accelerator and not each.choice

    known = {each.method: each for each in plan.EXPERIMENTS if student(each)}
    parts = {
        "D": [f"distilled-{name}" for name in (
            "bfloat16", "mirrored", "six", "large", "early", "smooth-teacher")],
        "fresh": ["scratch-100-epochs-fresh", "distilled-100-epochs-fresh"],
        "G": [f"{who}-{share}-wrong" for share in (20, 40) for who in ("scratch", "distilled")]
        + ["scratch-40-wrong-smoothing"],
        "I": ["scratch-5-epochs-bfloat16", "distilled-5-epochs-bfloat16",
              *(name for name, each in known.items() if each.loss and "-5-" in name)],
        "I, 20 epochs": ["distilled-bfloat16", *(name for name, each in known.items()
                                                 if each.loss and "-5-" not in name)]}
    assert len(parts["I"]) == 2 + 29 + 2 and len(parts["I, 20 epochs"]) == 5
    for part, names in parts.items():
        found = {known[name].full_recipe().precision for name in names}
        assert found == {"bfloat16"}, part
    others = [known[name] for name in ("scratch", "distilled", "teacher")]
    assert {each.full_recipe().precision for each in others} == {"float32"}
