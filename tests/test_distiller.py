"""Models and Distiller: what is trained, what is not, what is refused."""

import reference  # isort: skip  (keeps TensorFlow quiet)
import ast
import doctest
import inspect
import io
import math
import os
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import kdlib
import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from keras import layers

ROOT = Path(reference.__file__).parents[1]
IMAGES = np.random.default_rng(0).integers(0, 256, (32, 32, 32, 3)).astype("uint8")
LABELS = np.random.default_rng(1).integers(0, 10, 32).astype("int32")
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def tiny(width=4, classes=10, *, dropout=0.0, activation=None, seed=0):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((32, 32, 3))
    x = layers.Rescaling(1 / 255)(inputs)
    x = layers.Conv2D(width, 3, strides=4)(x)
    x = layers.BatchNormalization()(x)
    x = layers.GlobalAveragePooling2D()(layers.ReLU()(x))
    x = layers.Dropout(dropout)(x)
    return keras.Model(inputs, layers.Dense(classes, activation=activation)(x))


def distiller(*, temperature=4, alpha=0.1, student=None, teacher=None):
    student = student or tiny(seed=1)
    teacher = teacher or tiny(8, dropout=0.5)
    made = kdlib.Distiller(
        student=student, teacher=teacher, temperature=temperature, alpha=alpha
    )
    made.compile(keras.optimizers.SGD(0.1))
    return made


# --- models ---


@pytest.mark.parametrize(
    "build, low, high",
    [(kdlib.build_teacher, 495_000, 605_000), (kdlib.build_student, 0, 90_000)],
)
def test_budget_and_parts(build, low, high):
    model = build()
    kinds = {type(layer).__name__ for layer in model.layers}
    assert low <= model.count_params() <= high
    assert "BatchNormalization" in kinds
    assert ("Dropout" in kinds) == (build is kdlib.build_teacher)
    assert not any("softmax" in str(layer.get_config()) for layer in model.layers)


@pytest.mark.parametrize("build", [kdlib.build_teacher, kdlib.build_student])
def test_copies_of_every_kind_answer_alike(build, tmp_path):
    model = build(num_classes=7)
    want = np.asarray(model(IMAGES))
    model.save(tmp_path / "model.keras")
    copies = [
        keras.models.clone_model(model),
        type(model).from_config(model.get_config()),
        keras.saving.load_model(tmp_path / "model.keras"),
    ]
    for copy in copies:
        copy.set_weights(model.get_weights())
        np.testing.assert_array_equal(copy(IMAGES), want)
    assert want.shape == (32, 7)


def test_pixels_are_normalised_inside():
    normalise = kdlib.build_student().get_layer("normalization")
    pixels = np.array(kdlib.PIXEL_MEAN, "float32").reshape(1, 1, 1, 3)
    np.testing.assert_allclose(normalise(pixels), 0, atol=1e-5)
    np.testing.assert_allclose(normalise(pixels + kdlib.PIXEL_STD), 1, atol=1e-5)


# --- what is trained ---


def test_fit_leaves_the_teacher_alone():
    teacher, student = tiny(8, dropout=0.5), tiny(seed=1)
    before = [np.copy(w) for w in teacher.get_weights()]
    student_before = [np.copy(w) for w in student.get_weights()]
    made = distiller(student=student, teacher=teacher)
    made.fit(IMAGES, LABELS, epochs=2, verbose=0)
    for old, new in zip(before, teacher.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)  # BatchNorm statistics are among them
    assert all(
        np.any(old != new)
        for old, new in zip(student_before, student.get_weights(), strict=True)
    )
    assert len(made.trainable_variables) == len(student.trainable_variables)


def test_teacher_answers_without_dropout():
    teacher = tiny(8, dropout=0.5)
    live, stored = distiller(teacher=teacher), distiller(teacher=teacher)
    answers = np.asarray(teacher(IMAGES))
    a, b = (made.evaluate(x, LABELS, return_dict=True, verbose=0)["distillation_loss"]
            for made, x in ((live, IMAGES), (stored, (IMAGES, answers))))
    assert a == pytest.approx(b, rel=1e-5)


def test_temperature_one_and_alpha_one_is_plain_training_to_the_last_bit():
    plain, distilled = tiny(seed=1), tiny(seed=1)
    plain.compile(keras.optimizers.SGD(0.1), CROSS_ENTROPY)
    keras.utils.set_random_seed(5)
    plain.fit(IMAGES, LABELS, epochs=3, batch_size=8, verbose=0)
    made = distiller(student=distilled, temperature=1, alpha=1)
    keras.utils.set_random_seed(5)
    made.fit(IMAGES, LABELS, epochs=3, batch_size=8, verbose=0)
    for a, b in zip(plain.get_weights(), distilled.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_alpha_zero_ignores_labels():
    weights = []
    for labels in (LABELS, LABELS[::-1]):
        student = tiny(seed=1)
        distiller(student=student, alpha=0).fit(
            IMAGES, labels, batch_size=32, shuffle=False, verbose=0
        )
        weights.append(student.get_weights())
    for a, b in zip(*weights, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("batch_size", [32, 9])  # 9: the last batch is smaller
def test_loss_is_the_weighted_sum_of_its_parts(batch_size):
    made = distiller(alpha=0.3)
    logs = made.evaluate(IMAGES, LABELS, batch_size=batch_size, return_dict=True, verbose=0)
    want = 0.3 * logs["student_loss"] + 0.7 * logs["distillation_loss"]
    assert logs["loss"] == pytest.approx(want, rel=1e-5)
    whole = made.evaluate(IMAGES, LABELS, return_dict=True, verbose=0)
    assert logs["distillation_loss"] == pytest.approx(whole["distillation_loss"], rel=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_regularisers_have_weight_one_whatever_alpha(alpha):
    inputs = keras.Input((32, 32, 3))
    x = layers.GlobalAveragePooling2D()(layers.Rescaling(1 / 255)(inputs))
    student = keras.Model(inputs, layers.Dense(10, kernel_regularizer="l2")(x))
    logs = distiller(student=student, alpha=alpha).evaluate(
        IMAGES, LABELS, return_dict=True, verbose=0)
    penalty = 0.01 * float(np.sum(np.square(student.layers[-1].kernel)))
    want = alpha * logs["student_loss"] + (1 - alpha) * logs["distillation_loss"] + penalty
    assert logs["loss"] == pytest.approx(want, rel=1e-5) and penalty > 0.01


def test_an_image_without_a_label_counts_in_the_distillation_loss_only():
    weights = np.array([1.0] * 16 + [0.0] * 16)
    made = distiller(alpha=0.5)
    whole = made.evaluate(IMAGES, LABELS, return_dict=True, verbose=0)
    part = made.evaluate(IMAGES, LABELS, sample_weight=weights, return_dict=True, verbose=0)
    alone = made.evaluate(IMAGES[:16], LABELS[:16], return_dict=True, verbose=0)
    assert part["distillation_loss"] == pytest.approx(whole["distillation_loss"], rel=1e-5)
    assert part["student_loss"] == pytest.approx(alone["student_loss"] / 2, rel=1e-4)


def test_no_gradient_reaches_the_teacher():
    teacher = tiny(8)
    made = distiller(teacher=teacher)
    with tf.GradientTape() as tape:
        loss = made.compute_loss(IMAGES, LABELS, made(IMAGES, training=True))
    ours, theirs = tape.gradient(
        loss, [made.student.trainable_variables, teacher.trainable_variables])
    assert all(each is not None for each in ours) and all(each is None for each in theirs)


@pytest.mark.parametrize("policy, optimizer", [
    ("mixed_float16", "LossScaleOptimizer"), ("mixed_bfloat16", "SGD")])
def test_half_precision_students_learn_from_a_full_precision_teacher(policy, optimizer):
    keras.config.set_dtype_policy(policy)
    try:
        student = tiny(seed=1)
    finally:
        keras.config.set_dtype_policy("float32")
    made = distiller(student=student)
    assert np.isfinite(made.fit(IMAGES, LABELS, verbose=0).history["loss"]).all()
    assert type(made.optimizer).__name__ == optimizer


def test_stored_answers_train_as_the_live_teacher_does():
    teacher, weights = tiny(8), []
    answers = np.asarray(teacher(IMAGES))
    for x in (IMAGES, (IMAGES, answers)):
        student = tiny(seed=1)
        distiller(student=student, teacher=teacher).fit(
            x, LABELS, batch_size=8, shuffle=False, verbose=0
        )
        weights.append(student.get_weights())
    for live, stored in zip(*weights, strict=True):
        np.testing.assert_allclose(live, stored, rtol=1e-4, atol=1e-5)


def test_the_saved_student_predicts_what_the_distiller_predicted(tmp_path):
    student = tiny(seed=1)
    made = distiller(student=student)
    made.fit(IMAGES, LABELS, verbose=0)
    want = made.predict(IMAGES, verbose=0)
    made.save(tmp_path / "student.keras")
    loaded = keras.saving.load_model(tmp_path / "student.keras")
    np.testing.assert_array_equal(loaded.predict(IMAGES, verbose=0), want)
    assert loaded.count_params() == student.count_params()


# --- what is refused ---


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_outside_its_interval(alpha):
    with pytest.raises(ValueError, match="alpha is .*weight of the hard labels"):
        distiller(alpha=alpha)


@pytest.mark.parametrize("alpha", ["0.1", None, True])
def test_alpha_that_is_no_number(alpha):
    with pytest.raises(TypeError, match="alpha is"):
        distiller(alpha=alpha)


def test_bad_temperature():
    with pytest.raises(ValueError, match="temperature is 0"):
        distiller(temperature=0)


def test_swapped_models_are_warned_about():
    with pytest.warns(UserWarning, match="swapped"):
        distiller(student=tiny(16), teacher=tiny(4))


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_softmax_at_the_end(role):
    with pytest.raises(ValueError, match=f"{role} gives probabilities, not logits"):
        distiller(**{role: tiny(activation="softmax")})


class Softening(layers.Layer):
    def call(self, logits):
        return keras.ops.softmax(logits)


ENDINGS = {
    "a softmax layer": lambda model: layers.Softmax()(model.output),
    "an activation layer": lambda model: layers.Activation("softmax")(model.output),
    "an operation": lambda model: keras.ops.softmax(model.output),
    "a sigmoid": lambda model: layers.Activation("sigmoid")(model.output),
    "a sigmoid operation": lambda model: keras.ops.sigmoid(model.output),
    "a cast behind it": lambda model: layers.Activation("linear", dtype="float32")(
        layers.Softmax()(model.output)),
    "a reshape behind it": lambda model: layers.Reshape((10,))(layers.Softmax()(model.output)),
    "a layer of one's own": lambda model: Softening()(model.output),
    "a lambda": lambda model: layers.Lambda(keras.ops.softmax, output_shape=(10,))(model.output),
    "a model within the model": lambda model: keras.Sequential(
        [keras.Input((10,)), layers.Softmax()])(model.output),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_softmax_in_disguise(ending):
    model = tiny()
    disguised = keras.Model(model.input, ENDINGS[ending](model))
    with pytest.raises(ValueError, match="student gives probabilities, not logits.*set_weights"):
        distiller(student=disguised)


def test_logits_behind_a_cast_are_welcome():
    model = tiny(seed=1)
    output = layers.Activation("linear", dtype="float32")(model.output)
    distiller(student=keras.Model(model.input, output)).fit(IMAGES, LABELS, verbose=0)


class Focal(keras.losses.SparseCategoricalCrossentropy):
    """Its settings are those of cross-entropy, and what it computes is not."""

    def call(self, labels, logits):
        return super().call(labels, logits) ** 2


@pytest.mark.parametrize("loss", [
    "sparse_categorical_crossentropy", Focal(from_logits=True), CROSS_ENTROPY,
    keras.losses.SparseCategoricalCrossentropy(),
    keras.losses.sparse_categorical_crossentropy, ["sparse_categorical_crossentropy"], {"a": 1},
    keras.losses.MeanSquaredError(), keras.losses.KLDivergence(), keras.losses.Poisson(),
    keras.losses.BinaryCrossentropy(from_logits=True)])
def test_a_student_loss_that_is_no_cross_entropy_from_logits(loss):
    with pytest.raises(ValueError, match="loss is .*from_logits=True"):
        distiller().compile("sgd", loss)


@pytest.mark.parametrize("settings, given", [
    ({}, True), ({"metrics": []}, False), ({"metrics": ["accuracy"]}, True),
    ({"weighted_metrics": []}, False), ({"weighted_metrics": ["accuracy"]}, True)])
def test_metrics_are_those_of_keras(settings, given):
    made = kdlib.Distiller(student=tiny(seed=1), teacher=tiny(8), temperature=4)
    made.compile("sgd", **settings)
    logs = made.evaluate(IMAGES, LABELS, return_dict=True, verbose=0)
    assert ("accuracy" in logs) == given


def test_an_image_without_a_label_does_not_count_in_the_accuracy():
    made = distiller()
    right = made.predict(IMAGES, verbose=0).argmax(-1)
    labels = np.where(np.arange(32) < 16, right, (right + 1) % 10)
    logs = made.evaluate(IMAGES, labels, sample_weight=(np.arange(32) < 16).astype("float32"),
                         return_dict=True, verbose=0)
    assert logs["accuracy"] == 1


def test_an_unknown_label_is_no_class_to_metrics_without_weights():
    """They count it as wrong, as Keras does. Class 0 would be right by chance."""
    zero = tiny(seed=1)
    zero.layers[-1].bias.assign(np.eye(10)[0] * 100)  # says 0, always
    made = kdlib.Distiller(student=zero, teacher=tiny(8), temperature=4)
    made.compile("sgd", metrics=["accuracy"])
    for labels, want in ((np.repeat([5, -1], 16), 0), (np.repeat([0, -1], 16), 0.5)):
        for weight in (None, np.repeat([0.0, 1.0], 16)):  # no matter to these metrics
            logs = made.evaluate(IMAGES, labels, sample_weight=weight, return_dict=True, verbose=0)
            assert logs["accuracy"] == want


def test_loss_weights_would_change_the_meaning_of_alpha():
    for places, names in (((), {"loss_weights": [0.5]}), ((None, [0.5]), {})):
        with pytest.raises(ValueError, match="alpha is its weight"):
            distiller().compile("sgd", *places, **names)


def test_compile_takes_its_arguments_in_the_order_of_keras():
    ours, theirs = (list(inspect.signature(each.compile).parameters)
                    for each in (kdlib.Distiller, keras.Model))
    assert ours[:6] == theirs[:6]


def test_a_student_that_is_its_own_teacher():
    model = tiny()
    with pytest.raises(ValueError, match="share weights.*clone_model"):
        distiller(student=model, teacher=model)


@pytest.mark.parametrize("outputs", [
    lambda a, b: [a, b], lambda a, b: {"logits": a}, lambda a, b: {"a": a, "b": b}])
def test_a_model_of_several_outputs(outputs):
    inner = tiny()
    other = layers.Dense(4)(inner.layers[-2].output)
    with pytest.raises(ValueError, match="student gives .*model.outputs"):
        distiller(student=keras.Model(inner.inputs, outputs(inner.output, other)))


def test_the_way_out_of_a_softmax():
    with_softmax = tiny(8, activation="softmax")
    teacher = tiny(8, seed=1)
    teacher.set_weights(with_softmax.get_weights())
    distiller(teacher=teacher)
    np.testing.assert_allclose(kdlib.soften(teacher.predict(IMAGES, verbose=0), 1),
                               with_softmax.predict(IMAGES, verbose=0), atol=1e-6)


@pytest.mark.slow
def test_two_replicas_do_what_one_device_does():
    code = """
import sys
import tensorflow as tf
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2)
sys.path[:0] = [".", "tests"]
import kdlib, keras, numpy as np
from test_distiller import IMAGES, LABELS, tiny
logs, weights = [], []
for devices in (["CPU:0"], ["CPU:0", "CPU:1"]):
    with tf.distribute.MirroredStrategy(devices).scope():
        made = kdlib.Distiller(student=tiny(seed=1), teacher=tiny(8), temperature=4)
        for layer in made.student.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.trainable = False  # its statistics are those of a replica
            if isinstance(layer, keras.layers.Dense):
                layer.kernel.regularizer = keras.regularizers.L2(0.01)
        made.compile(keras.optimizers.SGD(0.1))
        logs.append(made.fit(IMAGES, LABELS, batch_size=32, epochs=1, verbose=0).history)
        weights.append(made.student.get_weights())
for a, b in zip(*weights):
    np.testing.assert_allclose(a, b, atol=1e-6)
for key in ("loss", "student_loss", "distillation_loss"):
    np.testing.assert_allclose(logs[0][key], logs[1][key], rtol=1e-5)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_no_stderr_to_write_to():
    done = subprocess.run([sys.executable, "-c", "import os; os.close(2); import reference"],
                          cwd=ROOT)
    assert done.returncode == 0


def test_temperature_and_alpha_cannot_change_unnoticed():
    made = distiller(temperature=4, alpha=0.1)
    assert (made.temperature, made.alpha) == (4, 0.1)
    with pytest.raises(AttributeError):
        made.alpha = 0.9


def test_different_numbers_of_classes():
    with pytest.raises(ValueError, match="They must agree"):
        distiller(student=tiny(classes=9))


def test_one_logit_is_no_distribution():
    with pytest.raises(ValueError, match="student gives .*not logits"):
        distiller(student=tiny(classes=1))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.pool, self.dense = layers.GlobalAveragePooling2D(), layers.Dense(10)

    def call(self, images):
        return self.dense(self.pool(keras.ops.cast(images, "float32") / 255))


def test_subclassed_models_are_taken_once_they_are_built():
    teacher, student = tiny(8), Subclassed()
    with pytest.raises(TypeError, match="student is a Subclassed. Give a built"):
        distiller(teacher=teacher, student=student)
    student(IMAGES)
    distiller(teacher=teacher, student=student).fit(IMAGES, LABELS, verbose=0)


def test_something_that_is_no_model():
    with pytest.raises(TypeError, match="teacher is a function"):
        kdlib.Distiller(student=tiny(), teacher=lambda x: x, temperature=4)


def test_one_hot_labels():
    with pytest.raises(ValueError, match=r"labels are \(.*10\).*argmax"):
        distiller().fit(IMAGES, np.eye(10)[LABELS], verbose=0)


def test_no_labels():
    with pytest.raises(ValueError, match="labels are"):
        distiller().fit(IMAGES, verbose=0)
    with_none, with_any = distiller(alpha=0), distiller(alpha=0)
    for made, labels in ((with_none, None), (with_any, LABELS)):
        made.fit(IMAGES, labels, batch_size=32, shuffle=False, verbose=0)
    for a, b in zip(with_none.get_weights(), with_any.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def pairs(labels):
    return tf.data.Dataset.from_tensor_slices((IMAGES, labels)).batch(8)


class Pairs(keras.utils.PyDataset):
    def __init__(self, labels):
        super().__init__()
        self.labels = labels

    def __len__(self):
        return 4

    def __getitem__(self, k):
        return IMAGES[8 * k : 8 * k + 8], self.labels[8 * k : 8 * k + 8]


DOORS = {
    "arrays": lambda made, y: made.fit(IMAGES, y, verbose=0),
    "tensors": lambda made, y: made.fit(tf.constant(IMAGES), tf.constant(y), verbose=0),
    "a data frame": lambda made, y: made.fit(IMAGES, pd.DataFrame({"y": y}), verbose=0),
    "tf.data": lambda made, y: made.fit(pairs(y), shuffle=False, verbose=0),
    "PyDataset": lambda made, y: made.fit(Pairs(y), shuffle=False, verbose=0),
    "validation": lambda made, y: made.fit(IMAGES, LABELS, validation_data=(IMAGES, y), verbose=0),
    "evaluate": lambda made, y: made.evaluate(IMAGES, y, verbose=0),
}


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
def test_labels_that_no_class_has(door):
    """Refused at each door, and no weight is lost. At the first: each kind of wrong label."""
    made, some_unknown = distiller(), np.where(LABELS > 4, -1, LABELS)
    nan = np.where(LABELS == LABELS[0], np.nan, LABELS)
    kinds = (LABELS + 1, LABELS - 2, LABELS + 0.5, nan)  # too large, below -1, fractions
    where = "validation batch" if door == "validation" else "batch"
    for labels in kinds if door == "arrays" else kinds[:1]:
        with pytest.raises(ValueError, match=f"labels in {where} .* neither class numbers nor -1"):
            DOORS[door](made, labels)
        assert all(np.isfinite(w).all() for w in made.get_weights())
    DOORS[door](made, LABELS)
    DOORS[door](made, some_unknown)


def test_data_sets_without_labels_or_with_names():
    for data, said in ((IMAGES, "labels are NoneType. Give class numbers"),
                       ({"image": IMAGES, "label": LABELS}, "keys .*image.*label")):
        with pytest.raises(ValueError, match=said):
            distiller().fit(tf.data.Dataset.from_tensor_slices(data).batch(8), shuffle=False,
                            verbose=0)


@pytest.mark.slow
def test_an_unknown_label_is_minus_one_everywhere():
    weights = np.array([1.0] * 16 + [0.0] * 16)
    hidden = np.where(weights == 1, LABELS, -1)
    by_weight, by_label = (
        distiller(alpha=0.5).evaluate(IMAGES, y, sample_weight=w, return_dict=True, verbose=0)
        for y, w in ((LABELS, weights), (hidden, None)))
    assert by_label == pytest.approx(by_weight, rel=1e-6)
    distiller().fit(pairs(hidden), shuffle=False, verbose=0)


@pytest.mark.slow
def test_answers_that_are_no_numbers_cost_no_weight():
    answers = np.array(tiny(8)(IMAGES))
    answers[3, 3] = np.nan
    made = distiller()
    with pytest.raises(ValueError, match="teacher_logits in batch 0 hold nan"):
        made.fit((IMAGES, answers), LABELS, batch_size=32, verbose=0)
    assert all(np.isfinite(w).all() for w in made.get_weights())


def test_a_training_that_diverges_is_named():
    made = distiller()
    made.compile(keras.optimizers.SGD(1e38))
    with pytest.raises(FloatingPointError, match=r"loss in batch \d+ is not finite.*learning"):
        made.fit(IMAGES, LABELS, batch_size=8, epochs=3, verbose=0)


def test_a_loss_that_the_student_adds_as_a_vector():
    class Adds(layers.Layer):
        def call(self, x):
            self.add_loss(keras.ops.mean(keras.ops.square(x), axis=0))
            return x

    inner = tiny(seed=1)
    student = keras.Model(inner.input, Adds()(inner.output))
    made = distiller(student=student, alpha=0.5)
    logs = made.evaluate(IMAGES, LABELS, return_dict=True, verbose=0)
    added = np.square(student.predict(IMAGES, verbose=0)).mean(axis=0).sum()
    want = 0.5 * logs["student_loss"] + 0.5 * logs["distillation_loss"] + added
    assert logs["loss"] == pytest.approx(want, rel=1e-4)


WRONG_IMAGES = [(IMAGES[:, :28, :28], "images have shape .* but the student takes"),
                ((IMAGES / 255).astype("float32"), "raw pixels from 0 to 255")]


@pytest.fixture(scope="module")
def published():
    """The models of the lessons, after they have seen images of the right size."""
    made = distiller(student=kdlib.build_student(), teacher=kdlib.build_teacher())
    made.evaluate(IMAGES[:2], LABELS[:2], verbose=0)
    return made


@pytest.mark.parametrize("images, said", WRONG_IMAGES)
def test_images_of_another_size_or_scale(published, images, said):
    for door in (
        lambda: published.fit(images, LABELS, verbose=0),
        lambda: published.evaluate(images, LABELS, verbose=0),
        lambda: published.fit((images, np.zeros((32, 10), "float32")), LABELS, verbose=0),
        lambda: published.fit(IMAGES[:2], LABELS[:2], verbose=0, validation_data=(images, LABELS)),
    ):
        with pytest.raises(ValueError, match=said):
            door()


def test_models_of_different_sizes():
    larger = keras.Input((64, 64, 3))
    teacher = keras.Model(larger, tiny(8)(layers.Resizing(32, 32)(larger)))
    with pytest.raises(ValueError, match="teacher takes .*64.*Resizing"):
        distiller(teacher=teacher)


def test_stored_answers_without_a_teacher():
    answers = np.asarray(tiny(8, dropout=0.5)(IMAGES))
    students = tiny(seed=1), tiny(seed=1)
    for student, teacher in zip(students, (tiny(8, dropout=0.5), None), strict=True):
        made = kdlib.Distiller(student=student, teacher=teacher, temperature=4)
        made.compile(keras.optimizers.SGD(0.1))
        made.fit((IMAGES, answers), LABELS, shuffle=False, verbose=0)
    for a, b in zip(*(student.get_weights() for student in students), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="teacher is None"):
        made.fit(IMAGES, LABELS, verbose=0)


def two_inputs(width, seed=0, *, named=False):
    keras.utils.set_random_seed(seed)
    a, b = keras.Input((8,), name="a"), keras.Input((4,), name="b")
    hidden = layers.Dense(width, "relu")(layers.Concatenate()([a, b]))
    return keras.Model({"a": a, "b": b} if named else [a, b], layers.Dense(3)(hidden))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The structure of `inputs`")
@pytest.mark.parametrize("named", [False, True])
def test_stored_answers_are_told_from_a_second_input(named):
    rng, weights = np.random.default_rng(0), []
    a, b = rng.normal(size=(20, 8)).astype("float32"), rng.normal(size=(20, 4)).astype("float32")
    both = {"a": a, "b": b} if named else (a, b)
    teacher = two_inputs(16, named=named)
    answers = teacher.predict(both, verbose=0)
    for x in (both, (both, answers), [both, answers] if named else (a, b, answers)):
        student = two_inputs(4, seed=1, named=named)
        made = distiller(student=student, teacher=teacher)
        made.fit(x, np.arange(20) % 3, shuffle=False, verbose=0)
        weights.append(student.get_weights())
        np.testing.assert_array_equal(made.predict(x, verbose=0), student.predict(both, verbose=0))
    for live, nested, other in zip(*weights, strict=True):
        np.testing.assert_allclose(live, nested, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(nested, other)


def test_another_soft_loss():
    def squared(*, teacher_logits, student_logits, temperature):
        return keras.ops.mean(keras.ops.square(teacher_logits - student_logits)) * temperature

    student, teacher = tiny(seed=1), tiny(8)
    made = kdlib.Distiller(student=student, teacher=teacher, temperature=2.0, soft_loss=squared)
    made.compile("sgd")
    logs = made.evaluate(IMAGES, LABELS, return_dict=True, verbose=0)
    gap = np.asarray(teacher(IMAGES)) - np.asarray(student(IMAGES))
    assert logs["distillation_loss"] == pytest.approx(2 * np.mean(gap**2), rel=1e-4)


def test_another_soft_loss_has_numbers_of_one_kind_in_mixed_precision():
    def kinds(*, teacher_logits, student_logits, temperature):
        assert teacher_logits.dtype == student_logits.dtype == "float32"
        return keras.ops.mean(teacher_logits - student_logits)

    pixels = keras.Input((32, 32, 3))
    half = layers.Flatten(dtype="float16")(pixels)
    student = keras.Model(pixels, layers.Dense(10, dtype="mixed_float16")(half))
    made = kdlib.Distiller(student=student, teacher=tiny(64), temperature=2, soft_loss=kinds)
    made.compile("sgd")
    made.evaluate(IMAGES, LABELS, verbose=0)


def test_a_teacher_of_two_inputs_and_a_student_of_one():
    """Its second input would be taken for the stored logits."""
    vector = keras.Input((8,))
    with pytest.raises(ValueError, match=r"teacher takes \[\(8,\), \(4,\)\].*They must agree"):
        kdlib.Distiller(student=keras.Model(vector, layers.Dense(3)(vector)),
                        teacher=two_inputs(16), temperature=4)


def test_one_batch_at_a_time():
    made, alike = distiller(), distiller()
    hard, soft = (made.test_on_batch(IMAGES, LABELS, return_dict=True)[f"{name}_loss"]
                  for name in ("student", "distillation"))
    logs = made.evaluate(IMAGES, LABELS, batch_size=32, return_dict=True, verbose=0)
    assert (hard, soft) == pytest.approx((logs["student_loss"], logs["distillation_loss"]))
    assert len(made.train_on_batch(IMAGES, LABELS)) == len(logs)
    alike.fit(IMAGES, LABELS, batch_size=32, shuffle=False, verbose=0)
    for one, other in zip(made.get_weights(), alike.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
    for step in (made.train_on_batch, made.test_on_batch):
        with pytest.raises(ValueError, match="neither class numbers nor -1"):
            step(IMAGES, LABELS + 1)
        with pytest.raises(ValueError, match="raw pixels"):
            step(IMAGES / 255, LABELS)
        step(IMAGES, LABELS)
    with pytest.raises(ValueError, match="raw pixels"):
        made.predict_on_batch(IMAGES / 255)
    assert np.isfinite(made.predict_on_batch(IMAGES)).all()


def test_weights_before_it_is_compiled(tmp_path):
    made = kdlib.Distiller(student=tiny(seed=1), teacher=tiny(8), temperature=4)
    made.save_weights(tmp_path / "a.weights.h5")
    other = kdlib.Distiller(student=tiny(seed=2), teacher=tiny(8), temperature=4)
    other.load_weights(tmp_path / "a.weights.h5")
    for a, b in zip(made.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_backup_and_restore_goes_on_exactly(tmp_path):
    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def run(*callbacks):
        made = distiller(student=tiny(seed=1), teacher=tiny(8))
        made.compile(keras.optimizers.SGD(0.05, momentum=0.9))
        made.fit(IMAGES, LABELS, epochs=4, shuffle=False, batch_size=8, verbose=0,
                 callbacks=list(callbacks))
        return made.get_weights()

    whole = run()
    with pytest.raises(KeyboardInterrupt):
        run(keras.callbacks.BackupAndRestore(tmp_path / "backup"), Stop())
    again = run(keras.callbacks.BackupAndRestore(tmp_path / "backup"))
    for a, b in zip(whole, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_checkpoints(tmp_path):
    """Of weights, for a distiller that goes on, and of the student alone."""
    weights, model = tmp_path / "last.weights.h5", tmp_path / "last.keras"
    made, fresh = distiller(), distiller(student=tiny(seed=5))
    made.fit(IMAGES, LABELS, verbose=0, callbacks=[
        keras.callbacks.ModelCheckpoint(weights, save_weights_only=True),
        keras.callbacks.ModelCheckpoint(model)])
    fresh.load_weights(weights)
    for copy in (fresh.student, keras.saving.load_model(model)):
        for a, b in zip(made.get_weights(), copy.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_student_that_was_compiled_keeps_its_optimizer(tmp_path):
    student = tiny(seed=1)
    student.compile("adam", CROSS_ENTROPY)
    own = student.optimizer
    distiller(student=student).save_weights(tmp_path / "a.weights.h5")
    assert student.optimizer is own


def test_what_leaves_the_distiller_is_the_student(tmp_path, capsys):
    made = distiller()
    assert made.count_params() == made.student.count_params()
    for a, b in zip(made.get_weights(), made.student.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    made.summary(print_fn=print)
    said = capsys.readouterr().out
    assert made.student.name in said and f"Total params: {made.count_params()}" in said
    made.export(tmp_path / "exported", verbose=False)
    exported = tf.saved_model.load(tmp_path / "exported")
    _, inputs = exported.signatures["serving_default"].structured_input_signature
    assert [spec.shape for spec in inputs.values()] == [(None, 32, 32, 3)]
    np.testing.assert_allclose(exported.serve(IMAGES.astype("float32")),
                               made.student.predict(IMAGES, verbose=0), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_steps_together():
    made, logs = distiller(), []
    for more in ({}, {"steps_per_execution": 3}, {"jit_compile": True}, {"run_eagerly": True}):
        made = distiller(student=tiny(seed=1), teacher=tiny(8))
        made.compile(keras.optimizers.SGD(0.1), **more)
        logs.append(made.fit(IMAGES, LABELS, batch_size=8, shuffle=False,
                             verbose=0).history["loss"][0])
    assert logs[1:] == pytest.approx(logs[:1] * 3, rel=1e-4)


@pytest.mark.parametrize("weights", [
    {"sample_weight": np.linspace(0, 2, 32)}, {"class_weight": {k: 0.5 * k for k in range(10)}}])
def test_weights_of_samples_and_classes_are_those_of_keras(weights):
    plain, distilled = tiny(seed=1), tiny(seed=1)
    plain.compile(keras.optimizers.SGD(0.1), CROSS_ENTROPY)
    for model in (plain, distiller(student=distilled, alpha=1)):
        model.fit(IMAGES, LABELS, batch_size=8, shuffle=False, verbose=0, **weights)
    for a, b in zip(plain.get_weights(), distilled.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_stored_answers_are_split_with_their_images():
    teacher = tiny(8)
    made = distiller(teacher=teacher)
    logs = made.fit((IMAGES, teacher.predict(IMAGES, verbose=0)), LABELS, validation_split=0.25,
                    verbose=0).history
    alone = made.evaluate(IMAGES[24:], LABELS[24:], return_dict=True, verbose=0)
    for key, value in alone.items():
        assert logs[f"val_{key}"][0] == pytest.approx(value, rel=1e-4)


# --- one mechanism, every door ---


def batches_of(x, y=LABELS, size=16):
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(size)


@pytest.mark.slow
@pytest.mark.parametrize("door", [
    lambda made, x: made.predict(x, verbose=0),
    lambda made, x: made.fit(batches_of(x, size=8), shuffle=False, verbose=0)])
def test_images_of_another_size_at_other_doors(door):
    made = distiller()
    door(made, IMAGES)
    with pytest.raises(ValueError, match="images have shape .* but the student takes"):
        door(made, IMAGES[:, :28, :28])


@pytest.mark.parametrize("scale", [lambda x: x / 255, lambda x: (x - 127) / 64],
                         ids=["0 to 1", "standardised"])
@pytest.mark.parametrize("door", [
    lambda made, x: made.predict(x, verbose=0),
    lambda made, x: made.predict(tf.constant(x), verbose=0),
    lambda made, x: made.predict(tf.data.Dataset.from_tensor_slices(x).batch(16), verbose=0),
    lambda made, x: made.predict_on_batch(x),
    lambda made, x: made.evaluate(tf.constant(x), LABELS, verbose=0),
    lambda made, x: made.evaluate(batches_of(x), verbose=0),
    lambda made, x: made.fit([x], LABELS, verbose=0),
    lambda made, x: made.fit(batches_of(x), verbose=0)])
def test_images_of_another_scale_at_other_doors(published, door, scale):
    before = [v.numpy() for v in published.trainable_variables]
    with pytest.raises(ValueError, match="raw pixels from 0 to 255"):
        door(published, scale(IMAGES.astype("float32")))
    for old, new in zip(before, published.trainable_variables, strict=True):
        np.testing.assert_array_equal(old, new.numpy())


def test_predictions_for_images_of_another_scale_are_no_numbers(published):
    """A call within a graph can't raise, so the answers themselves say it."""
    assert np.isnan(published((IMAGES / 255).astype("float32"))).all()
    assert np.isfinite(published.predict(batches_of(IMAGES).map(lambda x, y: x), verbose=0)).all()


@pytest.mark.parametrize("scaled, pixel, compiled", [
    (True, math.nan, False), (True, math.inf, False), (True, -math.inf, False),
    (False, math.nan, False), (True, math.nan, True)])  # XLA's min and max pass over nan
def test_a_pixel_that_is_no_number_costs_no_weights(scaled, pixel, compiled):
    """Neither kernels nor BatchNorm's averages: one nan among the pixels would reach them all."""
    inputs = keras.Input((32, 32, 3))
    scaling = layers.Normalization(mean=127.0, variance=4096.0) if scaled else layers.Identity()
    hidden = layers.BatchNormalization()(layers.Conv2D(2, 8, strides=8)(scaling(inputs)))
    logits = layers.Dense(10)(layers.GlobalAveragePooling2D()(hidden))
    made = distiller(student=keras.Model(inputs, logits), teacher=tiny(40))
    made.compile(keras.optimizers.SGD(0.1), jit_compile=compiled)
    images = IMAGES.astype("float32")
    images[20, 5, 5, 1] = pixel
    before = [w.numpy() for w in made.trainable_variables]
    for door in (lambda: made.fit(images, LABELS, verbose=0),
                 lambda: made.evaluate(batches_of(images), verbose=0),
                 lambda: made.predict(images, verbose=0)):
        with pytest.raises(ValueError, match="images in batch .* are not raw pixels"):
            door()
    for old, new in zip(before, made.trainable_variables, strict=True):
        np.testing.assert_array_equal(old, new.numpy())
    assert all(np.isfinite(w).all() for w in made.get_weights())
    made.fit(IMAGES, LABELS, verbose=0)


def contrasts(width):
    """It divides each image by its spread, so that an image of zeros would be no number."""
    inputs = keras.Input((32, 32, 3))
    spread = keras.ops.std(inputs, axis=(1, 2, 3), keepdims=True)
    hidden = layers.BatchNormalization()(layers.Conv2D(width, 3, strides=4)(inputs / spread))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(hidden)))


def of_vectors(width):
    inputs = keras.Input((6,))
    hidden = layers.Dense(width)(layers.BatchNormalization()(inputs))
    return keras.Model(inputs, layers.Dense(10)(hidden))


@pytest.mark.parametrize("net, shape", [(contrasts, (32, 32, 32, 3)), (of_vectors, (32, 6))])
def test_an_input_that_is_no_number_costs_no_weights(net, shape):
    made = distiller(student=net(2), teacher=net(4))
    x = np.random.default_rng(0).uniform(0, 255, shape).astype("float32")
    x[20].flat[3] = math.nan
    with pytest.raises(ValueError, match="images in batch .* are not raw pixels"):
        made.fit(x, LABELS, verbose=0)
    assert all(np.isfinite(w).all() for w in made.get_weights())


def of_two_inputs(width):
    images, numbers = keras.Input((32, 32, 3)), keras.Input((6,))
    seen = layers.GlobalAveragePooling2D()(layers.Conv2D(width, 3)(images))
    return keras.Model([images, numbers], layers.Dense(10)(layers.Concatenate()([seen, numbers])))


@pytest.mark.parametrize("where", [0, 1])
def test_one_of_two_inputs_that_is_no_number_costs_no_weights(where):
    made = distiller(student=of_two_inputs(2), teacher=of_two_inputs(4))
    x = [IMAGES.astype("float32"), np.ones((32, 6), "float32")]
    made.fit(x, LABELS, verbose=0)
    x[where][20].flat[3] = math.nan
    with pytest.raises(ValueError, match="images in batch .* are not raw pixels"):
        made.fit(x, LABELS, verbose=0)
    with pytest.raises(ValueError, match="images in batch .* are not raw pixels"):
        made.predict(x, verbose=0)
    assert all(np.isfinite(w).all() for w in made.get_weights())


def test_weights_that_are_lost_are_not_taken_for_wrong_images():
    made = distiller()
    made.student.set_weights([np.full_like(w, math.nan) for w in made.student.get_weights()])
    for ask in (made.predict, made.predict_on_batch):
        with pytest.raises(ValueError, match="raw pixels.* Or the student's weights are nan"):
            ask(IMAGES)


@pytest.mark.parametrize("wrap", [
    lambda model: model,
    lambda model: keras.Model(pixels := keras.Input((32, 32, 3)), model(pixels))],
    ids=["plain", "inside another model"])
def test_a_teacher_that_gets_images_of_another_scale(wrap):
    inputs = keras.Input((32, 32, 3))  # the student takes what comes
    student = keras.Model(inputs, layers.Dense(10)(layers.Flatten()(inputs)))
    made = distiller(student=student, teacher=wrap(tiny(8)), alpha=0.0)
    before = [v.numpy() for v in made.trainable_variables]
    with pytest.raises(ValueError, match="the teacher.s images are not raw pixels"):
        made.fit(batches_of((IMAGES / 255).astype("float32")), verbose=0)
    for old, new in zip(before, made.trainable_variables, strict=True):
        np.testing.assert_array_equal(old, new.numpy())


@pytest.mark.parametrize("become", [
    lambda x: (x - 128.0).astype("int8"), lambda x: x.astype("int16") - 128, lambda x: x > 127,
    lambda x: (x > 127).astype("int64")], ids=["int8", "int16", "bool", "0 and 1"])
def test_whole_numbers_that_are_no_pixels(become):
    made, images = distiller(), become(IMAGES)
    for door in (lambda: made.fit(images, LABELS, verbose=0),
                 lambda: made.evaluate(images, LABELS, verbose=0),
                 lambda: made.predict(images, verbose=0)):
        with pytest.raises(ValueError, match="images in batch 0 are not raw pixels"):
            door()


def test_pixels_may_be_wider_whole_numbers():
    made = distiller()
    np.testing.assert_array_equal(made.predict(IMAGES.astype("int32"), verbose=0),
                                  made.predict(IMAGES, verbose=0))


def test_a_student_inside_another_model_knows_its_scale():
    pixels = keras.Input((32, 32, 3))
    made = distiller(student=keras.Model(pixels, tiny(seed=1)(pixels)))
    with pytest.raises(ValueError, match="raw pixels from 0 to 255"):
        made.fit((IMAGES / 255).astype("float32"), LABELS, verbose=0)


def test_the_first_scale_counts():
    """Here it is that of images from 0 to 1, which go to a model of raw pixels."""
    pixels = keras.Input((32, 32, 3))
    larger = layers.Rescaling(255)(pixels)
    student, teacher = (keras.Model(pixels, model(larger)) for model in (tiny(seed=1), tiny(8)))
    distiller(student=student, teacher=teacher).fit(
        (IMAGES / 255).astype("float32"), LABELS, verbose=0)


def test_images_whose_size_changes_between_batches():
    def batches():
        yield IMAGES[:8].astype("float32"), LABELS[:8]
        yield IMAGES[8:16, :28, :28].astype("float32"), LABELS[8:16]

    spec = (tf.TensorSpec((None, None, None, 3)), tf.TensorSpec((None,), "int32"))
    with pytest.raises(ValueError, match="images have shape .*None.* set_shape"):
        distiller().fit(tf.data.Dataset.from_generator(batches, output_signature=spec), verbose=0)


def test_images_without_batches():
    data = tf.data.Dataset.from_tensor_slices((IMAGES, LABELS))
    with pytest.raises(ValueError, match=r"images have shape \(32, 32, 3\).*data.batch"):
        distiller().fit(data, verbose=0)


def test_a_weight_that_is_no_number():
    weights = np.where(np.arange(32) == 3, np.nan, 1.0)
    made = distiller()
    with pytest.raises(ValueError, match="sample_weight is not finite"):
        made.fit(IMAGES, LABELS, sample_weight=weights, verbose=0)
    assert all(np.isfinite(w).all() for w in made.get_weights())


@pytest.mark.parametrize("settings", [{"ignore_class": 3}, {"reduction": "sum"}])
def test_settings_of_the_loss_that_would_be_ignored(settings):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, **settings)
    with pytest.raises(ValueError, match="loss is .*Leave it out"):
        distiller().compile("sgd", loss)


def test_labels_by_name():
    with pytest.raises(ValueError, match="labels are"):
        distiller().fit(IMAGES, {"a": LABELS}, verbose=0)


def test_a_teacher_of_words():
    """Noise of up to 255 would be words that a small vocabulary does not have."""
    def reader(width, seed):
        keras.utils.set_random_seed(seed)
        tokens = keras.Input((6,), dtype="int32")
        x = layers.GlobalAveragePooling1D()(layers.Embedding(20, width)(tokens))
        return keras.Model(tokens, layers.Dense(3)(x))

    tokens = np.random.default_rng(0).integers(0, 20, (30, 6))
    made = distiller(student=reader(2, 1), teacher=reader(8, 0))
    loss = made.fit(tokens, np.arange(30) % 3, epochs=3, verbose=0).history["loss"]
    assert loss[-1] < loss[0]
    with pytest.raises(ValueError, match="student gives probabilities"):
        distiller(student=keras.Sequential([reader(2, 1), layers.Softmax()]), teacher=reader(8, 0))


def test_a_teacher_of_any_size():
    inputs = keras.Input((None, None, 3))
    pooled = layers.GlobalAveragePooling2D()(inputs)
    teacher = keras.Model(inputs, layers.Dense(10)(layers.Dense(50)(pooled)))
    distiller(teacher=teacher, student=tiny(2, seed=1)).fit(IMAGES, LABELS, verbose=0)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_softmax_in_a_subclassed_model(role):
    class Hidden(Subclassed):
        def call(self, images):
            return keras.ops.softmax(super().call(images))

    model = Hidden()
    model(IMAGES)
    with pytest.raises(ValueError, match=f"{role} gives probabilities"):
        distiller(**{role: model}).fit(IMAGES, LABELS, verbose=0)


@pytest.mark.parametrize("row", [
    np.full(10, math.nan), np.full(10, -math.inf), np.full(10, math.inf),
    np.array([math.nan] + 9 * [0.0]), np.array([math.inf] + 9 * [0.0])],
    ids=["nan", "no class", "infinity", "one nan", "one infinity"])
def test_answers_that_are_no_numbers_teach_nothing(row):
    made, answers = distiller(alpha=0), np.random.default_rng(0).normal(size=(32, 10))
    answers[20] = row
    before = [w.numpy() for w in made.trainable_variables]
    with pytest.raises(ValueError, match="teacher_logits"):
        made.fit((IMAGES, answers.astype("float32")), LABELS, batch_size=32, verbose=0)
    for old, new in zip(before, made.trainable_variables, strict=True):
        np.testing.assert_array_equal(old, new.numpy())


def test_a_checkpoint_of_weights_in_a_student(tmp_path):
    made, fresh = distiller(), tiny(seed=5)
    made.save_weights(tmp_path / "a.weights.h5")
    fresh.load_weights(tmp_path / "a.weights.h5")
    for a, b in zip(made.get_weights(), fresh.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_list_of_callbacks_made_by_keras_is_guarded_too():
    made, seen = distiller(), []
    callbacks = keras.callbacks.CallbackList([keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(batch))], model=made)
    with pytest.raises(ValueError, match="neither class numbers nor -1"):
        made.fit(IMAGES, LABELS + 10, callbacks=callbacks, verbose=0)
    made.fit(IMAGES, LABELS, callbacks=callbacks, validation_data=(IMAGES, LABELS), verbose=0)
    assert seen


def test_a_callback_that_holds_callbacks_is_called_itself():
    both, seen = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: seen.append(1)), []
    both.callbacks = [keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: seen.append(2))]
    distiller().fit(IMAGES, LABELS, callbacks=both, verbose=0)
    assert seen == [1]


def test_callbacks_by_position_as_keras_takes_them():
    seen = keras.callbacks.History()
    distiller().fit(IMAGES, LABELS, 8, 1, 0, [seen])
    assert seen.epoch == [0]


def test_probabilities_among_the_stored_answers():
    stored = np.asarray(kdlib.soften(np.random.default_rng(0).normal(size=(32, 10)), 1))
    with pytest.raises(ValueError, match="teacher_logits.*probabilities"):
        distiller().fit((IMAGES, stored), LABELS, verbose=0)
    with pytest.raises(ValueError, match="teacher_logits.*probabilities"):
        distiller().fit(batches_of(IMAGES).map(lambda x, y: ((x, stored[:16]), y)), verbose=0)


ANY_SETTING = st.one_of(
    st.none(), st.booleans(), st.text(max_size=2), st.integers(-2, 9), st.floats(),
    st.complex_numbers(), st.lists(st.floats(0, 5), max_size=2),
    hnp.arrays("float32", hnp.array_shapes(min_dims=0, max_dims=1, max_side=2)),
)


@settings(deadline=None, derandomize=True)
@given(ANY_SETTING)
def test_any_temperature_and_alpha_are_taken_or_named(setting):
    for name, low, high in (("temperature", 1e-3, 1e6), ("alpha", 0, 1)):
        try:
            taken = kdlib._number(name, setting)  # what Distiller and the losses ask
        except (TypeError, ValueError) as error:
            assert str(error).startswith(f"{name} is"), error
        else:
            assert low <= taken == setting <= high


# --- one file, liftable, on each backend ---


def code_lines(text):
    """Lines that hold more than a comment; docstrings aside."""
    kinds = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    docstrings = [t for k, t in enumerate(tokens) if t.type == tokenize.STRING
                  and tokens[k - 1].type in kinds and tokens[k + 1].type == tokenize.NEWLINE]
    return len({line for t in tokens if t.type not in kinds and t not in docstrings and t.string
                for line in range(t.start[0], t.end[0] + 1)})


def test_the_library_stays_small():
    """The lesson in 280 lines of code, what it refuses in 70 of their own."""
    text = (ROOT / "kdlib.py").read_text()
    tree = ast.parse(text)
    lengths = [node.end_lineno - node.lineno + 1 for node in ast.walk(tree)
               if isinstance(node, ast.FunctionDef)]
    imported = {name.split(".")[0] for node in ast.walk(tree)
                if isinstance(node, (ast.Import, ast.ImportFrom))
                for name in [getattr(node, "module", None) or node.names[0].name]}
    assert text.count("\n") <= 489 and max(lengths) <= 40
    *lesson, refused, distiller = re.split("# --- [a-z ]+ -+\n", text)
    assert sum(map(code_lines, [*lesson, distiller])) <= 280 and code_lines(refused) <= 70
    assert imported - set(sys.stdlib_module_names) == {"keras", "numpy", "scipy", "sklearn"}


def test_its_examples_run():
    assert doctest.testmod(kdlib) == (0, 3)


@pytest.mark.slow
def test_importing_it_changes_nothing():
    code = ("import os, sys, keras, scipy.ndimage, sklearn.datasets, sklearn.model_selection; "
            "before, modules = dict(os.environ), set(sys.modules); import kdlib; "
            "assert dict(os.environ) == before; "
            "assert set(sys.modules) - modules == {'kdlib'}")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "", done.stderr[-500:]


ON_A_BACKEND = """
import kdlib, keras, numpy as np
from keras import layers
def net(width, seed, regularizer=None):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((8,))
    hidden = layers.Normalization(mean=2.0, variance=1.0)(inputs)
    hidden = layers.BatchNormalization()(layers.Dense(width, "relu")(hidden))
    return keras.Model(inputs, layers.Dense(3, kernel_regularizer=regularizer)(hidden))
def trained(x, y, teacher, alpha=0.1, regularizer=None):
    student = net(4, 1, regularizer)
    made = kdlib.Distiller(student=student, teacher=teacher, temperature=4, alpha=alpha)
    made.compile(keras.optimizers.SGD(0.1))
    logs = made.fit(x, y, epochs=3, batch_size=10, shuffle=False, verbose=0).history
    return student, logs
def refused(call, *sentences):
    try:
        call()
    except ValueError as error:
        assert any(sentence in str(error) for sentence in sentences), error
    else:
        raise AssertionError("no refusal")
def same(a, b):
    return all(np.allclose(p, q, rtol=1e-4, atol=1e-6)
               for p, q in zip(a.get_weights(), b.get_weights()))
x = np.random.default_rng(0).normal(size=(40, 8)).astype("float32")
y, teacher = np.arange(40) % 3, net(16, 0)
before, answers = teacher.get_weights(), teacher.predict(x, verbose=0)
live, logs = trained(x, y, teacher)
assert logs["loss"][-1] < logs["loss"][0]
assert all(map(np.array_equal, before, teacher.get_weights()))
assert same(live, trained((x, answers), y, teacher)[0])
assert same(trained(x, y, teacher, alpha=0)[0], trained(x, y[::-1].copy(), teacher, alpha=0)[0])
plain = net(4, 1)
plain.compile(keras.optimizers.SGD(0.1),
              keras.losses.SparseCategoricalCrossentropy(from_logits=True))
plain.fit(x, y, epochs=3, batch_size=10, shuffle=False, verbose=0)
assert all(map(np.array_equal, plain.get_weights(),
               trained(x, y, teacher, alpha=1)[0].get_weights()))
for alpha in (0, 0.3, 1):
    student = net(4, 1, "l2")
    made = kdlib.Distiller(student=student, teacher=teacher, temperature=4, alpha=alpha)
    made.compile("sgd")
    logs = made.evaluate(x, y, batch_size=15, return_dict=True, verbose=0)
    kernel = keras.ops.convert_to_numpy(student.layers[-1].kernel)
    want = alpha * logs["student_loss"] + (1 - alpha) * logs["distillation_loss"]
    assert np.isclose(logs["loss"], want + 0.01 * np.sum(kernel**2), rtol=1e-5), logs
refused(lambda: trained(x, y + 1, teacher), "labels in batch")  # no class has them
refused(lambda: made.train_on_batch(x, y + 1), "labels in batch")
made.train_on_batch(x, y)

# A refusal brings the weights back, and no nan has reached them.
def of_images(width):
    keras.utils.set_random_seed(0)
    pixels = keras.Input((8, 8, 3))
    hidden = layers.BatchNormalization()(layers.Flatten()(layers.Rescaling(1 / 255)(pixels)))
    return keras.Model(pixels, layers.Dense(3)(layers.Dense(width)(hidden)))
images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3)).astype("float32")
made = kdlib.Distiller(student=of_images(2), teacher=of_images(4), temperature=4)
made.compile("adam")
made.fit(images, y, verbose=0)
answers, wrong = made.predict(images, verbose=0), images.copy()
wrong[35, 0, 0, 0] = np.nan
answers[35] = -np.inf
for door in (lambda: made.fit(wrong, y, verbose=0), lambda: made.evaluate(wrong, y, verbose=0),
             lambda: made.predict(wrong, verbose=0), lambda: made.train_on_batch(wrong, y),
             lambda: made.fit((images, answers), y, verbose=0)):
    refused(door, "images in batch", "teacher_logits in batch")
    assert all(np.isfinite(w).all() for w in made.get_weights())
made.fit(images, y, verbose=0)

# So does one that comes before the first step, and it brings back no older ones.
def trainable():  # PyTorch sees the labels after the student has seen the images, as does BatchNorm
    return [np.copy(keras.ops.convert_to_numpy(w)) for w in made.student.trainable_weights]
for before in (lambda: made.train_on_batch(images, y),
               lambda: refused(lambda: made.fit(wrong, y, verbose=0), "images in batch")):
    before()
    made.student.set_weights([w / 2 for w in made.student.get_weights()])
    given = trainable()
    small, one_hot = images[:, :7], np.eye(3)[y]
    for door in (lambda: made.fit(small, y, verbose=0), lambda: made.train_on_batch(small, y),
                 lambda: made.evaluate(small, y, verbose=0), lambda: made.predict(small, verbose=0),
                 lambda: made.fit(images, one_hot, verbose=0)):
        refused(door, "images have shape", "labels are (")
        assert all(map(np.array_equal, given, trainable()))
made.fit(images, y, verbose=0)
assert not any(map(np.array_equal, given, trainable()))

# Each door asks a teacher that has changed anew, and makes no new graph for one that has not.
traced = []
def counted(**given):
    traced.append(given)
    return kdlib.distillation_loss(**given)
teacher = of_images(4)
taught = teacher.get_weights()
made = kdlib.Distiller(student=of_images(2), teacher=teacher, temperature=4, soft_loss=counted)
made.compile(keras.optimizers.SGD(0.0))
def evaluate():
    return made.evaluate(images, y, batch_size=40, return_dict=True, verbose=0)
def fit():
    logs = made.fit(images, y, batch_size=40, shuffle=False, verbose=0).history
    return {key: each[0] for key, each in logs.items()}
def train_on_batch():
    return made.train_on_batch(images, y, return_dict=True)
doors = evaluate, fit, train_on_batch
for k, (door, factor) in enumerate(zip(doors * 3, (1, 1, 1, 1, 1, 1, 3, 0, 2))):
    before = len(traced)
    if factor != 1:
        teacher.set_weights([factor * w for w in taught])
    found = door()["distillation_loss"]
    want = kdlib.distillation_loss(teacher_logits=teacher(images), temperature=4, student_logits=
                                   made.student(images, training=door is not evaluate))
    assert np.isclose(found, float(want), rtol=1e-4), (k, found, float(want))
    assert keras.backend.backend() != "jax" or k not in (3, 4, 5) or len(traced) == before
    teacher.predict(images, verbose=0)  # Keras puts new arrays in place of the old weights

# What is compiled later counts.
made.compile(keras.optimizers.SGD(0.1, clipvalue=1e-9))
given = trainable()
made.train_on_batch(images, y)
assert all(np.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(given, trainable()))

# What a callback changes at the end of an epoch counts in the next one.
made.compile(keras.optimizers.SGD(0.0))
losses = made.fit(images, y, batch_size=40, epochs=2, shuffle=False, verbose=0, callbacks=[
    keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: epoch or teacher.set_weights(
        [4 * w for w in teacher.get_weights()]))]).history["distillation_loss"]
want = kdlib.distillation_loss(teacher_logits=teacher(images), temperature=4,
                               student_logits=made.student(images, training=True))
assert np.isclose(losses[1], float(want), rtol=1e-4) and losses[1] > 2 * losses[0], losses
print("fine on", keras.backend.backend())
"""


def python_with(backend):
    """An interpreter that has the backend: KD_JAX_PYTHON, KD_TORCH_PYTHON, else our own."""
    python = os.environ.get(f"KD_{backend.upper()}_PYTHON", sys.executable)
    found = subprocess.run([python, "-c", f"import {backend}"], capture_output=True)
    return python if found.returncode == 0 else pytest.skip(f"{backend} is not installed")


def on_a_backend(backend, code, folder):
    """The last line that the code prints, with a copy of kdlib.py and no other file of ours."""
    shutil.copy(ROOT / "kdlib.py", folder)
    fast = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # JAX compiles in two thirds
    done = subprocess.run([python_with(backend), "-c", code], capture_output=True, text=True,
                          cwd=folder, env={**os.environ, "KERAS_BACKEND": backend, **fast})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_the_distiller_on_other_backends(backend, tmp_path):
    """What the tests above ask of TensorFlow."""
    assert on_a_backend(backend, ON_A_BACKEND, tmp_path) == f"fine on {backend}"
