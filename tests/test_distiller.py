"""Models and Distiller: what is trained, what is not, what is refused."""

import kdlib  # isort: skip
import keras
import numpy as np
import pytest
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


def test_loss_is_the_weighted_sum_of_its_parts():
    logs = distiller(alpha=0.3).evaluate(IMAGES, LABELS, return_dict=True, verbose=0)
    want = 0.3 * logs["student_loss"] + 0.7 * logs["distillation_loss"]
    assert logs["loss"] == pytest.approx(want, rel=1e-5)


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


def test_different_numbers_of_classes():
    with pytest.raises(ValueError, match="same classes"):
        distiller(student=tiny(classes=9))


def test_something_that_is_no_model():
    with pytest.raises(TypeError, match="teacher is a function"):
        kdlib.Distiller(student=tiny(), teacher=lambda x: x, temperature=4)


def test_one_hot_labels():
    with pytest.raises(ValueError, match="not one-hot"):
        distiller().fit(IMAGES, np.eye(10)[LABELS], verbose=0)
