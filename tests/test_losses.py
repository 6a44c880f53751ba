"""The losses against float64 NumPy, SciPy, Keras's own, closed forms, and on every backend."""

from reference import measures  # isort: skip  (first: keeps TensorFlow quiet)
import json

import kdlib
import keras
import numpy as np
import pytest
import scipy.special
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_distiller import on_a_backend

settings.register_profile("house", deadline=None, derandomize=True)  # the same in every run
settings.load_profile("house")

TEMPERATURES = [0.5, 1.0, 4.0, 20.0, 100.0]


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
@pytest.mark.parametrize("scale", [0.01, 0.1, 1.0, 30.0, 300.0, 1000.0])
def test_loss_and_gradient_agree_with_float64(temperature, scale):
    """Also where the loss is a millionth: the values are made of float32, the oracle is not."""
    teacher, student = some_logits(scale)
    variable = tf.Variable(student)
    with tf.GradientTape() as tape:
        loss = kdlib.distillation_loss(
            teacher_logits=teacher, student_logits=variable, temperature=temperature)
    assert float(loss) == pytest.approx(loss64(teacher, student, temperature), rel=1e-3)
    p, q = (np.exp(log_softmax64(z, temperature)) for z in (teacher, student))
    want = temperature * (q - p) / len(student)
    error = np.linalg.norm(tape.gradient(loss, variable) - want)
    assert error < 1e-3 * np.linalg.norm(want)


@pytest.mark.parametrize("temperature", [3, 4, 20, 100])
@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0])
@pytest.mark.parametrize("gap", [1e-3, 1e-2, 1e-1])
def test_a_student_close_to_its_teacher(temperature, scale, gap):
    """Where both are large and alike, rounding of either may be larger than what they differ by."""
    teacher, noise = some_logits(scale)[0], some_logits(gap, seed=1)[0]
    student = tf.Variable(teacher + noise)
    with tf.GradientTape() as tape:
        loss = kdlib.distillation_loss(teacher_logits=teacher, student_logits=student,
                                       temperature=temperature)
    p, q = (log_softmax64(z, temperature) for z in (teacher, student.numpy()))
    d = p - q
    exact = temperature**2 * np.mean(np.sum(np.exp(p) * (np.expm1(-d) + d), axis=-1))
    assert float(loss) == pytest.approx(exact, rel=1e-3)
    want = temperature * (np.exp(q) - np.exp(p)) / len(teacher)
    assert np.linalg.norm(tape.gradient(loss, student) - want) < 1e-3 * np.linalg.norm(want)


@pytest.mark.parametrize("teacher, student, temperature", [
    ([0.01, 0.02], [500.0, 500.0], 4), ([0.01, 0.02], [-500.0, -500.0], 4),
    ([1000, 999.38, 991.7], [1000, 999.36, 988.2], 0.7),
    ([-1.5, -8.3, -49.2, -1.52], [581.25, 574.44, 533.56, 581.24], 33),
    ([0.0003, 3.01, -0.0064, 0.033], [535.8, 538.8, 535.79, 535.83], 20)])
def test_what_the_classes_share_takes_no_digits(teacher, student, temperature):
    """Nor does a class far off, where the others are large and close."""
    teacher, student = (np.array([row], "float32") for row in (teacher, student))
    variable = tf.Variable(student)
    with tf.GradientTape() as tape:
        loss = kdlib.distillation_loss(teacher_logits=teacher, student_logits=variable,
                                       temperature=temperature)
    p, q = (log_softmax64(z, temperature) for z in (teacher, student))
    exact = temperature**2 * np.sum(np.exp(p) * (np.expm1(q - p) + p - q))
    assert float(loss) == pytest.approx(exact, rel=1e-3)
    want = temperature * (np.exp(q) - np.exp(p))
    assert np.linalg.norm(tape.gradient(loss, variable) - want) < 1e-3 * np.linalg.norm(want)


def test_a_class_of_probability_zero_contributes_nothing():
    student = tf.Variable([[0.0, 0.0]])
    with tf.GradientTape() as tape:
        loss = kdlib.distillation_loss(teacher_logits=np.array([[0.0, -np.inf]], "float32"),
                                       student_logits=student, temperature=1)
    assert float(loss) == pytest.approx(np.log(2), rel=1e-6)
    np.testing.assert_allclose(tape.gradient(loss, student), [[-0.5, 0.5]], rtol=1e-6)


def test_a_class_that_both_exclude_leaves_the_others_alone():
    """And a class that the student alone excludes costs it everything, as the formula has it."""
    teacher, student = some_logits(5)
    excluded = np.full((len(teacher), 1), -np.inf, "float32")
    variable = tf.Variable(np.hstack([student, excluded]))
    with tf.GradientTape() as tape:
        loss = kdlib.distillation_loss(teacher_logits=np.hstack([teacher, excluded]),
                                       student_logits=variable, temperature=4)
    assert float(loss) == pytest.approx(loss64(teacher, student, 4), rel=1e-5)
    p, q = (np.exp(log_softmax64(z, 4)) for z in (teacher, student))
    want = np.hstack([4 * (q - p) / len(student), np.zeros_like(excluded)])
    np.testing.assert_allclose(tape.gradient(loss, variable), want, rtol=1e-4, atol=1e-6)
    assert np.isinf(kdlib.distillation_loss(
        teacher_logits=[[1.0, 2.0]], student_logits=[[1.0, -np.inf]], temperature=4))


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


@pytest.mark.parametrize("kinds", [("float64", "float32"), ("float32", "float64"),
                                   ("float16", "float64")])
def test_a_teacher_of_another_precision(kinds):
    """NumPy's stored logits are float64, a student's float32."""
    teacher, student = (z.astype(kind) for z, kind in zip(some_logits(3), kinds, strict=True))
    got = kdlib.distillation_loss(teacher_logits=teacher, student_logits=student, temperature=4)
    assert float(got) == pytest.approx(loss64(teacher, student, 4), rel=1e-5)


def test_loss_of_equal_logits_is_zero_and_constants_do_not_matter():
    teacher, student = some_logits(5)

    def loss(t, s):
        return float(kdlib.distillation_loss(teacher_logits=t, student_logits=s, temperature=3))

    assert loss(teacher, teacher) == pytest.approx(0, abs=1e-10)
    assert loss(teacher + 7, student - 5) == pytest.approx(loss(teacher, student), rel=1e-4)


def test_loss_agrees_with_keras_kl_divergence():
    teacher, student = some_logits(5)
    soft = [np.asarray(kdlib.soften(z, 4)) for z in (teacher, student)]
    want = 16 * float(keras.losses.KLDivergence()(*soft))
    got = kdlib.distillation_loss(teacher_logits=teacher, student_logits=student, temperature=4)
    assert float(got) == pytest.approx(want, rel=1e-4)


BAD_TEMPERATURES = [
    (0, ValueError), (-1, ValueError), (float("nan"), ValueError), (float("inf"), ValueError),
    (1e-30, ValueError), (1e30, ValueError),  # the loss, or T^2, would leave float32
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
    got = measures.expected_calibration_error(probabilities, np.array([0, 1, 0]))
    assert got == pytest.approx((abs(1 - 1.64) + 0.45) / 3)


# --- properties, on whatever hypothesis comes up with ---

SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=12)
TEMPERATURE = st.floats(0.25, 100)


@st.composite
def two_logits(draw, size=1e4):
    shape = draw(SHAPES)
    elements = st.floats(-size, size, width=32)
    return tuple(draw(hnp.arrays("float32", shape, elements=elements)) for _ in range(2))


def loss_of(teacher, student, temperature):
    return float(kdlib.distillation_loss(
        teacher_logits=teacher, student_logits=student, temperature=temperature))


@given(two_logits(), TEMPERATURE)
def test_loss_is_finite_and_no_smaller_than_pinsker_allows(logits, temperature):
    """KL >= 2 TV^2: so it is never negative, and zero only where the soft labels are equal."""
    loss = loss_of(*logits, temperature)
    p, q = (np.exp(log_softmax64(z, temperature)) for z in logits)
    distance = np.abs(p - q).sum(-1) / 2
    assert np.isfinite(loss) and loss >= 0
    rounding = 1e-5 * (1 + temperature**2 + temperature * np.abs(logits).max() * 1e-2)
    assert loss >= temperature**2 * np.mean(2 * distance**2) * (1 - 1e-4) - rounding


@given(two_logits(), TEMPERATURE)
def test_loss_agrees_with_scipy(logits, temperature):
    p, q = (scipy.special.softmax(z.astype("float64") / temperature, axis=-1) for z in logits)
    want = temperature**2 * scipy.special.rel_entr(p, q).sum(-1).mean()
    if np.isfinite(want):  # where SciPy's softmax has not underflown
        rounding = 1e-5 * temperature**2 + 1e-6 * temperature * float(np.abs(logits).max())
        assert loss_of(*logits, temperature) == pytest.approx(want, rel=1e-3, abs=rounding)


@given(two_logits(size=50), TEMPERATURE, st.floats(-100, 100), st.floats(-100, 100))
def test_a_constant_added_to_a_row_changes_nothing(logits, temperature, a, b):
    teacher, student = logits
    shifted = loss_of(teacher + np.float32(a), student + np.float32(b), temperature)
    tolerance = 1e-4 * (1 + temperature**2)
    assert shifted == pytest.approx(loss_of(*logits, temperature), rel=1e-3, abs=tolerance)


@given(two_logits(size=3), st.sampled_from([8, 16, 32]))
def test_t_squared_keeps_the_size_of_the_gradient(logits, temperature):
    teacher, student = logits
    student = student + np.eye(*student.shape, dtype="float32")  # never equal up to a constant
    sizes = []
    for t in (temperature, 2 * temperature):
        variable = tf.Variable(student.astype("float64"))
        with tf.GradientTape() as tape:
            loss = kdlib.distillation_loss(
                teacher_logits=teacher.astype("float64"), student_logits=variable, temperature=t)
        sizes.append(np.linalg.norm(tape.gradient(loss, variable)))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.35, abs=1e-3)


@settings(max_examples=25)
@given(two_logits(size=20), st.sampled_from([1.0, 4.0]))
def test_gradient_against_finite_differences(logits, temperature):
    teacher, student = (z.astype("float64") for z in logits)
    variable = tf.Variable(student)
    with tf.GradientTape() as tape:
        loss = kdlib.distillation_loss(
            teacher_logits=teacher, student_logits=variable, temperature=temperature)
    got, step = np.asarray(tape.gradient(loss, variable)), 1e-5
    row, column = np.unravel_index(np.argmax(np.abs(got)), got.shape)
    for at in ((row, column), (0, 0)):
        ahead, behind = student.copy(), student.copy()
        ahead[at] += step
        behind[at] -= step
        slope = (loss64(teacher, ahead, temperature) - loss64(teacher, behind, temperature))
        assert got[at] == pytest.approx(slope / (2 * step), rel=1e-3, abs=1e-6)


@given(two_logits(size=2**-7), st.floats(20, 100))
def test_a_tiny_loss_is_never_negative(logits, temperature):
    """Where a difference of logarithms would be rounding, times T^2."""
    got, want = loss_of(*logits, temperature), loss64(*logits, temperature)
    assert got >= 0 and got == pytest.approx(want, rel=1e-3, abs=1e-12)


# --- bad input: a sentence, never a traceback from deep inside ---

ANYTHING = st.one_of(
    st.none(), st.text(max_size=3), st.booleans(), st.integers(-3, 3), st.floats(),
    st.complex_numbers(), st.lists(st.one_of(st.none(), st.text(max_size=2), st.floats()),
                                   max_size=3),
    st.lists(st.lists(st.floats(-5, 5), max_size=3), max_size=3),
    hnp.arrays(st.sampled_from(["float16", "float32", "float64", "int8", "int64", "bool",
                                "complex64"]),
               hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)),
)


@settings(max_examples=300)
@given(ANYTHING, ANYTHING, ANYTHING)
def test_bad_input_is_answered_with_a_sentence(teacher, student, temperature):
    try:
        value = kdlib.distillation_loss(
            teacher_logits=teacher, student_logits=student, temperature=temperature)
    except (TypeError, ValueError) as error:
        said = str(error)
        assert said.startswith(("temperature is", "teacher_logits", "student_logits")), said
    else:
        assert np.shape(value) == ()
    try:
        kdlib.soften(teacher, temperature)
    except (TypeError, ValueError) as error:
        assert str(error).startswith(("temperature is", "logits")), str(error)


# --- other backends, where they are installed ---

ON_ANOTHER_BACKEND = """
import json, kdlib, keras, numpy as np
name, answers = keras.backend.backend(), []


def value_and_gradient(teacher, student, temperature):
    loss = lambda logits: kdlib.distillation_loss(
        teacher_logits=teacher, student_logits=logits, temperature=temperature)
    if name == "torch":
        import torch
        leaf = torch.tensor(student, requires_grad=True)
        value = loss(leaf)
        value.backward()
        return float(value), leaf.grad.numpy()
    import jax
    value, gradient = jax.value_and_grad(loss)(jax.numpy.asarray(student))
    return float(value), np.asarray(gradient)


for scale in (0.01, 1.0, 30.0, 1000.0):
    rng = np.random.default_rng(0)
    teacher, student = rng.uniform(-scale, scale, (2, 32, 10)).astype("float32")
    for temperature in (0.5, 1, 4, 20, 100):
        value, gradient = value_and_gradient(teacher, student, temperature)
        soft = keras.ops.convert_to_numpy(kdlib.soften(teacher, temperature))
        answers.append([scale, temperature, value, gradient.tolist(), soft.tolist()])
for temperature in (0.5, 1, 4, 20, 100):  # both exclude a class
    _, gradient = value_and_gradient(np.array([[0, -np.inf, 1]], "float32"),
                                     np.array([[2, -np.inf, 0]], "float32"), temperature)
    assert np.isfinite(gradient).all() and gradient[0, 1] == 0, gradient
masked = kdlib.distillation_loss(teacher_logits=np.array([[0, -np.inf]], "float32"),
                                 student_logits=np.zeros((1, 2), "float32"), temperature=1)
print(json.dumps([name, float(masked), answers]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_losses_and_their_gradient_on_other_backends(backend, tmp_path):
    name, masked, answers = json.loads(on_a_backend(backend, ON_ANOTHER_BACKEND, tmp_path))
    assert name == backend and masked == pytest.approx(np.log(2), rel=1e-6)
    assert len(answers) == 20
    for scale, temperature, loss, gradient, soft in answers:
        teacher, student = some_logits(scale)
        p, q = (np.exp(log_softmax64(z, temperature)) for z in (teacher, student))
        want = temperature * (q - p) / len(student)
        assert loss == pytest.approx(loss64(teacher, student, temperature), rel=1e-3)
        assert np.linalg.norm(gradient - want) < 1e-3 * np.linalg.norm(want)
        np.testing.assert_allclose(soft, p, rtol=2e-4, atol=1e-7)


def test_keras_own_default_is_still_the_one_that_notebook_07_shows():
    """When this fails, Keras has mended its default: then rewrite mistake 6 of 07."""
    strategy = keras.distillation.LogitsDistillation(temperature=4.0)
    theirs = float(strategy.compute_loss(keras.ops.array([[2.0, 1.0, 0.1]]),
                                         keras.ops.array([[0.5, 1.5, 0.0]])))
    ours = loss64([[2.0, 1.0, 0.1]], [[0.5, 1.5, 0.0]], 4)
    assert theirs == pytest.approx(0.9025, abs=1e-3) and ours == pytest.approx(0.3842, abs=1e-3)
