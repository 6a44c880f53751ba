"""Part H's engine: one epoch a call, on JAX, beside Keras's own fit."""

from reference import accelerated, experiments, plan, runs, store  # isort: skip  (first: keeps TensorFlow quiet)
import os
import subprocess

import kdlib
import numpy as np
import pytest
from conftest import ROOT
from test_distiller import python_with

PART_H = plan._best()


def test_part_h_is_published_by_todays_code():
    assert not experiments.missing(PART_H)
    for each in PART_H:
        assert (each.temperature, each.alpha) == (accelerated.TEMPERATURE, accelerated.ALPHA)


def test_the_candidate_was_chosen_on_validation():
    trials = {each.method: store.read_notes(runs.REFERENCE / "rows" / f"{each.stem(100)}.json")
              for each in PART_H if each.choice}
    best = max(trials, key=lambda method: trials[method]["row"]["val_accuracy"])
    assert trials[best]["row"]["model"] == plan.networks.best_student_pooled().name
    assert all(notes["row"]["test_accuracy"] is None for notes in trials.values())


def test_all_six_had_the_same_training():
    notes = [store.read_notes(runs.REFERENCE / "rows" / f"{each.stem(seed)}.json")
             for each in PART_H if each.weights for seed in each.seeds]
    assert len(notes) == 6
    assert {len(each["history"]["loss"]) for each in notes} == {110}
    own = {"method", "seed", "temperature", "alpha", "teacher"}
    specs = [{key: value for key, value in each["spec"].items() if key not in own}
             for each in notes]
    assert all(spec == specs[0] for spec in specs)


def test_views_are_many_and_the_student_is_small_in_parameters_only():
    codes = kdlib.view_codes(images=50, views=110, shift=4, flip=True)
    assert min(len(np.unique(codes[:, k], axis=0)) for k in range(50)) > 2 * 20

    def products(model):  # multiplications of an image, in convolutions
        return sum(np.prod(layer.output.shape[1:3]) * layer.kernel.shape[0] * layer.kernel.shape[1]
                   * layer.kernel.shape[2] * (1 if "depthwise" in layer.name else layer.filters)
                   for layer in model.layers if "conv" in layer.name)

    ours, usual = plan.networks.best_student_pooled(), kdlib.build_student()
    assert products(ours) > 1.5 * products(usual) and ours.count_params() < usual.count_params()


def test_elsewhere_it_is_refused_with_a_sentence():
    with pytest.raises(ValueError, match="made on an accelerator"):
        experiments.Maker().settings(PART_H[-1], 0)


def test_a_depthwise_and_a_1x1_kernel_act_as_one_dense_kernel():
    images = np.random.default_rng(0).uniform(0, 255, (8, 32, 32, 3)).astype("float32")
    model = plan.networks.best_student_pooled()
    before = np.asarray(model(images, training=True))
    accelerated.merge(model)
    np.testing.assert_allclose(model(images, training=True), before, rtol=1e-3, atol=1e-4)


ON_JAX = """
import sys
sys.path.insert(0, "tests")
from dataclasses import replace
from pathlib import Path

import jax
import kdlib
import keras
import numpy as np
from pictures import data
from reference import accelerated, networks
from reference.recipes import make_optimizer

codes = kdlib.view_codes(images=100, views=2, shift=4, flip=True)
assert (np.asarray(accelerated.augment(data.x_train, codes[1]))
        == kdlib.augment(data.x_train, codes[1])).all()


def small():
    return networks._student("small", lambda x: networks._stages(x, (8, 1), (8, 0)), 10)


def trained_by_fit(recipe, teacher):
    keras.utils.set_random_seed(3)
    student = small()
    distiller = kdlib.Distiller(student=student, teacher=teacher, temperature=4, alpha=0.1)
    distiller.compile(make_optimizer(recipe, 2, last_layer="logits"))
    for k, view in enumerate(codes):
        order = np.random.default_rng([3, k]).permutation(100)
        images = kdlib.augment(data.x_train, view)[order]
        distiller.fit(images, data.y_train[order], batch_size=50, shuffle=False, verbose=0)
    return student.get_weights()


def strayed(recipe):
    # how far one engine's weights lie from the other's, beside how far they moved
    arm = accelerated.Arm(small, recipe, 100, teacher)
    epoch = arm.lowered(given, taught).compile()
    got, _ = accelerated.train(arm, epoch, data, given, taught, name="small", seed=3, epochs=2)
    keras.utils.set_random_seed(3)
    first, want = small().get_weights(), trained_by_fit(recipe, teacher)
    apart, way = (np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(want, each, strict=True)))
                  for each in (got.weights, first))
    return apart / way, want, got


keras.utils.set_random_seed(9)
teacher, given = small(), jax.device_put((data.x_train, data.y_train))
taught = ([np.asarray(v) for v in teacher.trainable_variables],
          [np.asarray(v) for v in teacher.non_trainable_variables])
recipe = replace(accelerated.RECIPE, epochs=2, batch_size=50)
share, want, got = strayed(replace(recipe, optimizer="sgd"))
assert share < 1e-4, share
share, *_ = strayed(recipe)  # steps of one length: rounding grows
assert share < 1e-2, share
assert set(got.history) == {"loss", "accuracy", "val_accuracy", "seconds"}

folder = Path(sys.argv[1])
done = [accelerated.Trained("teacher-best", 0, 2, got.weights, got.history)]
accelerated.write(folder, done, jax)
accelerated.write(folder, [*done, accelerated.Trained("best", 1, 2, want, {})], jax)
found = accelerated._read(folder)
for name, weights in (("teacher-best-seed0", got.weights), ("best-seed1", want)):
    for a, b in zip(found[f"cifar10-{name}"], weights, strict=True):
        np.testing.assert_array_equal(a, b)
print("fine")
"""


@pytest.mark.ci
@pytest.mark.long
@pytest.mark.slow
def test_an_epoch_in_one_call_trains_as_fit_does(tmp_path):
    """Same first weights, batches, views, teacher and optimizer: the same student."""
    done = subprocess.run(
        [python_with("jax"), "-c", ON_JAX, str(tmp_path)], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": "jax", "TF_CPP_MIN_LOG_LEVEL": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "fine"
