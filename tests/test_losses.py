"""The losses against float64 NumPy and closed forms."""

import kdlib  # isort: skip  (quietens TensorFlow before its import)
import keras
import numpy as np
import pytest
import tensorflow as tf

TEMPERATURES = [0.5, 1.0, 2.0, 4.0, 10.0, 100.0]


def log_softmax64(logits, temperature):
    z = np.asarray(logits, "float64") / temperature
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def loss64(teacher, student, temperature):
    p, q = log_softmax64(teacher, temperature), log_softmax64(student, temperature)
    return temperature**2 * np.mean(np.sum(np.exp(p) * (p - q), axis=-1))


def some_logits(scale, seed=0, shape=(2, 32, 10)):
    return (np.random.default_rng(seed).uniform(-scale, scale, shape)).astype("float32")


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0, 300.0])
def test_loss_agrees_with_float64(temperature, scale):
    teacher, student = some_logits(scale)
    got = kdlib.distillation_loss(
        teacher_logits=teacher, student_logits=student, temperature=temperature
    )
    want = loss64(teacher, student, temperature)
    rounding = 1e-7 * temperature**2  # of log-probabilities near -2.3 in float32, times T^2
    assert want > 2 * rounding  # so that a loss of zero fails
    assert float(got) == pytest.approx(want, rel=2e-4, abs=rounding)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_soften_agrees_with_float64(temperature):
    logits = some_logits(300)[0]
    want = np.exp(log_softmax64(logits, temperature))
    np.testing.assert_allclose(kdlib.soften(logits, temperature), want, rtol=1e-4, atol=1e-7)


def test_integer_logits_are_welcome():
    np.testing.assert_allclose(kdlib.soften([[1, 1]], 2), [[0.5, 0.5]])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_gradient_against_its_closed_form(temperature):
    teacher, student = some_logits(5)
    variable = tf.Variable(student)
    with tf.GradientTape() as tape:
        loss = kdlib.distillation_loss(
            teacher_logits=teacher, student_logits=variable, temperature=temperature
        )
    p, q = (np.exp(log_softmax64(z, temperature)) for z in (teacher, student))
    want = temperature * (q - p) / len(student)  # T^2 outside, 1 / T from the chain rule
    np.testing.assert_allclose(tape.gradient(loss, variable), want, rtol=1e-4, atol=1e-6)


def test_infinite_temperature_matches_centred_logits():
    """Hinton et al. 2015, section 2.1: the loss tends to half the variance of the difference."""
    teacher, student = some_logits(3).astype("float64")
    difference = teacher - student
    difference -= difference.mean(-1, keepdims=True)
    want = np.mean(np.sum(difference**2, axis=-1)) / (2 * 10)
    got = kdlib.distillation_loss(
        teacher_logits=tf.constant(teacher), student_logits=tf.constant(student), temperature=1e4
    )
    assert float(got) == pytest.approx(want, rel=1e-3)


def test_loss_of_equal_logits_is_zero_and_constants_do_not_matter():
    teacher, student = some_logits(5)

    def loss(t, s):
        return float(kdlib.distillation_loss(teacher_logits=t, student_logits=s, temperature=3))

    assert loss(teacher, teacher) == pytest.approx(0, abs=1e-5)
    assert loss(teacher + 7, student - 5) == pytest.approx(loss(teacher, student), rel=1e-4)


def test_loss_agrees_with_keras_kl_divergence():
    teacher, student = some_logits(5)
    soft = [np.asarray(kdlib.soften(z, 4)) for z in (teacher, student)]
    want = 16 * float(keras.losses.KLDivergence()(*soft))
    got = kdlib.distillation_loss(teacher_logits=teacher, student_logits=student, temperature=4)
    assert float(got) == pytest.approx(want, rel=1e-4)


BAD_TEMPERATURES = [
    (0, ValueError), (-1, ValueError), (float("nan"), ValueError), (float("inf"), ValueError),
    ("4", TypeError), (None, TypeError), (True, TypeError),
]


@pytest.mark.parametrize("temperature, error", BAD_TEMPERATURES)
def test_bad_temperature_is_named(temperature, error):
    with pytest.raises(error, match="temperature is"):
        kdlib.soften(np.zeros((1, 3)), temperature)
    with pytest.raises(error, match="temperature is"):
        kdlib.distillation_loss(
            teacher_logits=np.zeros((1, 3)), student_logits=np.zeros((1, 3)),
            temperature=temperature,
        )


@pytest.mark.parametrize("shapes", [((4, 10), (4, 9)), ((4, 10), (3, 10)), ((1, 10), (8, 10))])
def test_logits_of_different_shapes_are_refused(shapes):
    teacher, student = (np.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match="teacher_logits have shape .* student_logits"):
        kdlib.distillation_loss(teacher_logits=teacher, student_logits=student, temperature=4)


def test_expected_calibration_error_by_hand():
    # Bin (0.8, 0.87]: confidence 0.82 twice, right once; bin of 0.55: right. Gaps: 0.64, 0.45.
    probabilities = np.array([[0.82, 0.18], [0.82, 0.18], [0.55, 0.45]])
    got = kdlib.expected_calibration_error(probabilities, np.array([0, 1, 0]))
    assert got == pytest.approx((abs(1 - 1.64) + 0.45) / 3)
