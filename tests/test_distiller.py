"""Models and Distiller: what is trained, what is not, what is refused."""

import kdlib  # isort: skip
import importlib.util
import os
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from keras import layers

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
    want = model.predict(IMAGES, verbose=0)
    model.save(tmp_path / "model.keras")
    copies = [
        keras.models.clone_model(model),
        type(model).from_config(model.get_config()),
        keras.saving.load_model(tmp_path / "model.keras"),
    ]
    for copy in copies:
        copy.set_weights(model.get_weights())
        np.testing.assert_array_equal(copy.predict(IMAGES, verbose=0), want)
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
    made = distiller(teacher=teacher)
    x, _, _ = made._with_teacher((IMAGES, LABELS, None))
    np.testing.assert_allclose(x[1], teacher.predict(IMAGES, verbose=0), rtol=1e-5, atol=1e-6)


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


def test_the_teacher_is_outside_the_tape():
    """Else its activations would be kept for a backward pass that never comes."""
    teacher = tiny(8)
    made = distiller(teacher=teacher)
    made.compile(keras.optimizers.SGD(0.1), run_eagerly=True)
    watched = []

    class Tape(tf.GradientTape):
        def gradient(self, *args, **kwargs):
            watched.extend(id(v) for v in self.watched_variables())
            return super().gradient(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tf, "GradientTape", Tape)
        made.fit(IMAGES, LABELS, verbose=0)
    theirs = {id(v.value) for v in teacher.trainable_variables}
    ours = {id(v.value) for v in made.student.trainable_variables}
    assert ours <= set(watched) and not theirs & set(watched)


def test_half_precision_students_learn_from_a_full_precision_teacher():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        student = tiny(seed=1)
    finally:
        keras.config.set_dtype_policy("float32")
    logs = distiller(student=student).fit(IMAGES, LABELS, verbose=0).history
    assert np.isfinite(logs["loss"]).all()


def test_stored_answers_train_as_the_live_teacher_does():
    teacher, weights = tiny(8), []
    answers = teacher.predict(IMAGES, verbose=0)
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
    with pytest.raises(ValueError, match="alpha is .*weight of the hard-label loss"):
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
    with pytest.raises(ValueError, match=f"{role} ends in a softmax.*logits"):
        distiller(**{role: tiny(activation="softmax")})


ENDINGS = {
    "a softmax layer": lambda model: layers.Softmax()(model.output),
    "an activation layer": lambda model: layers.Activation("softmax")(model.output),
    "an operation": lambda model: keras.ops.softmax(model.output),
    "a sigmoid": lambda model: layers.Activation("sigmoid")(model.output),
    "a cast behind it": lambda model: layers.Activation("linear", dtype="float32")(
        layers.Softmax()(model.output)),
    "a model within the model": lambda model: keras.Sequential(
        [keras.Input((10,)), layers.Softmax()])(model.output),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_softmax_in_disguise(ending):
    model = tiny()
    disguised = keras.Model(model.input, ENDINGS[ending](model))
    with pytest.raises(ValueError, match="student ends in a softmax or sigmoid"):
        distiller(student=disguised)


def test_logits_behind_a_cast_are_welcome():
    model = tiny(seed=1)
    output = layers.Activation("linear", dtype="float32")(model.output)
    distiller(student=keras.Model(model.input, output)).fit(IMAGES, LABELS, verbose=0)


@pytest.mark.parametrize("loss", [
    "sparse_categorical_crossentropy", keras.losses.SparseCategoricalCrossentropy(),
    keras.losses.sparse_categorical_crossentropy, ["sparse_categorical_crossentropy"], {"a": 1}])
def test_a_student_loss_that_expects_probabilities(loss):
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


def test_loss_weights_would_change_the_meaning_of_alpha():
    with pytest.raises(ValueError, match="loss_weights .* alpha"):
        distiller().compile("sgd", loss_weights=[0.5])


def test_probabilities_among_the_stored_answers():
    stored = np.asarray(kdlib.soften(np.random.default_rng(0).normal(size=(32, 10)), 1))
    with pytest.raises(ValueError, match="teacher_logits are probabilities"):
        distiller().fit((IMAGES, stored), LABELS, verbose=0)


def test_a_student_that_is_its_own_teacher():
    model = tiny()
    with pytest.raises(ValueError, match="share weights.*clone_model"):
        distiller(student=model, teacher=model)


@pytest.mark.parametrize("outputs", [
    lambda a, b: [a, b], lambda a, b: {"logits": a}, lambda a, b: {"a": a, "b": b}])
def test_a_model_of_several_outputs(outputs):
    inner = tiny()
    other = layers.Dense(4)(inner.layers[-2].output)
    with pytest.raises(ValueError, match="student gives several outputs.*model.outputs"):
        distiller(student=keras.Model(inner.inputs, outputs(inner.output, other)))


def test_the_way_out_of_a_softmax():
    with_softmax = tiny(8, activation="softmax")
    teacher = tiny(8, seed=1)
    teacher.set_weights(with_softmax.get_weights())
    distiller(teacher=teacher)
    np.testing.assert_allclose(kdlib.soften(kdlib.predict_logits(teacher, IMAGES), 1),
                               with_softmax.predict(IMAGES, verbose=0), atol=1e-6)


def test_two_replicas_do_what_one_device_does():
    code = """
import sys
import tensorflow as tf
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2)
sys.path.insert(0, "tests")
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
                          cwd=kdlib.ROOT)
    assert done.returncode == 0, done.stderr[-3000:]


def test_no_stderr_to_write_to():
    done = subprocess.run([sys.executable, "-c", "import os; os.close(2); import kdlib"],
                          cwd=kdlib.ROOT)
    assert done.returncode == 0


def test_temperature_and_alpha_cannot_change_unnoticed():
    made = distiller(temperature=4, alpha=0.1)
    assert (made.temperature, made.alpha) == (4, 0.1)
    with pytest.raises(AttributeError):
        made.alpha = 0.9


def test_different_numbers_of_classes():
    with pytest.raises(ValueError, match="same classes"):
        distiller(student=tiny(classes=9))


def test_one_logit_is_no_distribution():
    with pytest.raises(ValueError, match="two classes or more"):
        distiller(student=tiny(classes=1))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.pool, self.dense = layers.GlobalAveragePooling2D(), layers.Dense(10)

    def call(self, images):
        return self.dense(self.pool(keras.ops.cast(images, "float32") / 255))


def test_subclassed_models_are_taken_once_they_are_built():
    teacher, student = tiny(8), Subclassed()
    with pytest.raises(TypeError, match="student is a Subclassed: give a built"):
        distiller(teacher=teacher, student=student)
    student(IMAGES)
    distiller(teacher=teacher, student=student).fit(IMAGES, LABELS, verbose=0)


def test_one_hot_labels_are_welcome_where_the_loss_expects_them():
    made = distiller()
    made.compile("sgd", keras.losses.CategoricalCrossentropy(from_logits=True))
    made.fit(IMAGES, np.eye(10)[LABELS], verbose=0)


def test_something_that_is_no_model():
    with pytest.raises(TypeError, match="teacher is a function"):
        kdlib.Distiller(student=tiny(), teacher=lambda x: x, temperature=4)


def test_one_hot_labels():
    with pytest.raises(ValueError, match="not one-hot"):
        distiller().fit(IMAGES, np.eye(10)[LABELS], verbose=0)


@pytest.mark.parametrize("labels", [LABELS + 1, LABELS - 1, np.where(LABELS == 3, 255, LABELS)])
def test_labels_that_no_class_has(labels):
    with pytest.raises(ValueError, match=r"labels go from .* but there are 10 classes"):
        distiller().fit(IMAGES, labels, verbose=0)


ANY_SETTING = st.one_of(
    st.none(), st.booleans(), st.text(max_size=2), st.integers(-2, 9), st.floats(),
    st.complex_numbers(), st.lists(st.floats(0, 5), max_size=2),
    hnp.arrays("float32", hnp.array_shapes(min_dims=0, max_dims=1, max_side=2)),
)


@settings(deadline=None, derandomize=True)
@given(ANY_SETTING, ANY_SETTING)
def test_any_temperature_and_alpha_are_taken_or_named(temperature, alpha):
    try:
        made = kdlib.Distiller(student=STUDENT, teacher=TEACHER, temperature=temperature,
                               alpha=alpha)
    except (TypeError, ValueError) as error:
        assert str(error).startswith(("temperature is", "alpha is")), error
    else:
        assert made.temperature > 0 and 0 <= made.alpha <= 1


STUDENT, TEACHER = tiny(), tiny(8)


# --- lifted into another project ---

LIFTED_INTO = """
import math, numbers, warnings
import keras
from keras import layers, ops
{sections}
import numpy as np
def net(width):
    inputs = keras.Input((8,))
    hidden = layers.Dense(width, "relu")(inputs)
    return keras.Model(inputs, layers.Dense(3)(hidden))
teacher, student = net(16), net(4)
before = [np.copy(w) for w in teacher.get_weights()]
distiller = Distiller(student=student, teacher=teacher, temperature=4, alpha=0.1)
distiller.compile(optimizer="adam")
x, y = np.random.default_rng(0).normal(size=(40, 8)), np.arange(40) % 3
losses = distiller.fit(x.astype("float32"), y, epochs=30, verbose=0).history["loss"]
assert losses[-1] < losses[0], losses
assert all(map(np.array_equal, before, teacher.get_weights()))
assert "tensorflow" in sys.modules or keras.backend.backend() != "tensorflow"
print("lifted")
"""


@pytest.mark.parametrize("backend", ["tensorflow", "torch", "jax"])
def test_losses_and_distiller_can_be_lifted_out(backend):
    """The two sections alone, with the imports that the README names."""
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    source = (kdlib.ROOT / "kdlib.py").read_text()
    sections = re.search(r"# --- losses -.*?(?=# --- training -)", source, re.DOTALL)[0]
    done = subprocess.run(
        [sys.executable, "-c", "import sys" + LIFTED_INTO.replace("{sections}", sections)],
        capture_output=True, text=True, env={**os.environ, "KERAS_BACKEND": backend})
    if backend == "jax":
        assert "NotImplementedError: Keras runs on jax" in done.stderr
    else:
        assert done.stdout.endswith("lifted\n"), done.stderr[-2000:]
