"""Other people's losses against their own values, against float64 NumPy, and at their limits."""

from reference import methods  # isort: skip  (first: keeps TensorFlow quiet)
import ast
import inspect
import json
import math
import re
import shutil

import numpy as np
import pytest
import scipy.special
import tensorflow as tf
from method_cases import FILE, cases, features
from test_distiller import ROOT, on_a_backend
from test_notebooks import cells, defined_in

NAMES = ("AB AT CC CRD DIST-T1 DIST-T4 DKD-beta2 DKD-beta8 FSP FT FitNet KD-T1 KD-T4 "
         "KD-standardised-T2 NST PKT RKD SP TTM-power0.25 VID WTTM-power0.25").split()


def value_and_gradients(loss, teacher, student):
    """Losses as an array, and the gradient of their sum for each of the student's features."""
    variables = [tf.Variable(x) for x in student]
    with tf.GradientTape() as tape:
        losses = loss(teacher, variables)
        total = sum(losses) if isinstance(losses, list) else losses
    zero = tf.UnconnectedGradients.ZERO
    gradients = tape.gradient(total, variables, unconnected_gradients=zero)
    return np.asarray(losses), [np.asarray(g) for g in gradients]


def agrees(got, want, tolerance=1e-4):
    want = np.asarray(want)
    return np.abs(np.asarray(got) - want).max() <= tolerance * np.abs(want).max()


# --- the originals' own values --------------------------------------------------------


@pytest.fixture(scope="module")
def file():
    return dict(np.load(FILE, allow_pickle=False))


def test_every_entry_of_the_file_has_a_case(file):
    assert {key.partition("/")[0] for key in file} - {"labels"} == set(cases(file)) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_are_those_of_the_original(name, file):
    losses, gradients = value_and_gradients(
        cases(file)[name], features(file, name, "teacher"), features(file, name, "student"))
    assert agrees(losses.sum(), file[f"{name}/loss"])
    if f"{name}/losses" in file:
        assert agrees(losses, file[f"{name}/losses"])
    for got, want in zip(gradients, features(file, name, "gradient"), strict=True):
        assert agrees(got, want)


def test_memories_after_a_step_are_those_of_the_original(file):
    for role in ("teacher", "student"):
        rows = file[f"CRD/{role}0"] @ file[f"CRD/{role}_kernel"] + file[f"CRD/{role}_bias"]
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        after = methods.crd_remember(file[f"CRD/memory_{role}"], file["CRD/index"], rows)
        assert agrees(after, file[f"CRD/memory_{role}_after"])


def test_normalisers_are_the_mean_of_the_first_scores(file):
    """As the original sets them: of student and teacher, before it divides by them."""
    got = []
    for role, other in (("student", "teacher"), ("teacher", "student")):
        rows = file[f"CRD/{role}0"] @ file[f"CRD/{role}_kernel"] + file[f"CRD/{role}_bias"]
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        memory = file[f"CRD/memory_{other}"]
        got.append(np.mean(methods.crd_scores(rows, memory, file["CRD/sampled"])) * len(memory))
    assert agrees(got, file["CRD/normalisers"])


ON_ANOTHER_BACKEND = """
import json, keras, numpy as np
from method_cases import FILE, cases, features
file = dict(np.load(FILE))
name, answers = keras.backend.backend(), {}
for key, loss in cases(file).items():
    teacher, student = features(file, key, "teacher"), features(file, key, "student")
    def total(arrays):
        losses = loss([keras.ops.convert_to_tensor(t) for t in teacher], arrays)
        return sum(losses) if isinstance(losses, list) else losses
    if name == "torch":
        import torch
        leaves = [torch.tensor(s, requires_grad=True) for s in student]
        value = total(leaves)
        value.backward()
        gradients = [leaf.grad.numpy() for leaf in leaves]
    else:
        import jax
        leaves = [jax.numpy.asarray(s) for s in student]
        value, gradients = jax.jit(jax.value_and_grad(total))(leaves)
    answers[key] = [float(value), [np.asarray(g).tolist() for g in gradients]]
print(json.dumps([name, answers]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_values_and_gradients_on_other_backends(backend, tmp_path, file):
    for path in (ROOT / "reference" / "methods.py", ROOT / "tests" / "method_cases.py", FILE):
        shutil.copy(path, tmp_path)
    name, answers = json.loads(on_a_backend(backend, ON_ANOTHER_BACKEND, tmp_path))
    assert name == backend and set(answers) == set(NAMES)
    for key, (value, gradients) in answers.items():
        assert agrees(value, file[f"{key}/loss"]), key
        for got, want in zip(gradients, features(file, key, "gradient"), strict=True):
            assert agrees(got, want), key


# --- the same formulas in float64 NumPy, for inputs that no file has -------------------


def pooled(maps, size):
    """torch's adaptive_avg_pool2d, bin by bin."""
    height, width = maps.shape[1:3]
    out = np.empty((len(maps), *size, maps.shape[3]))
    for i in range(size[0]):
        for j in range(size[1]):
            rows = slice(i * height // size[0], int(np.ceil((i + 1) * height / size[0])))
            cols = slice(j * width // size[1], int(np.ceil((j + 1) * width / size[1])))
            out[:, i, j] = maps[:, rows, cols].mean((1, 2))
    return out


def same(t, s):
    size = [min(pair) for pair in zip(t.shape[1:3], s.shape[1:3], strict=True)]
    return pooled(t, size), pooled(s, size)


def unit(x, axis=-1):
    return x / np.maximum(np.linalg.norm(x, axis=axis, keepdims=True), 1e-12)


def attention64(x):
    return unit((x**2).mean(-1).reshape(len(x), -1))


def fitnet64(t, s):
    t, s = same(t, s)
    return ((t - s) ** 2).mean()


def at64(t, s):
    t, s = same(t, s)
    return ((attention64(t) - attention64(s)) ** 2).mean()


def ft64(t, s):
    t, s = same(t, s)
    return np.abs(attention64(t) - attention64(s)).mean()


def nst64(t, s):
    t, s = (unit(x.reshape(len(x), -1, x.shape[-1]).swapaxes(1, 2)) for x in same(t, s))

    def kernel(a, b):
        return ((a[:, :, None] * b[:, None]).sum(-1) ** 2).mean()

    return kernel(t, t) + kernel(s, s) - 2 * kernel(t, s)


def sp64(t, s):
    t, s = (unit(x.reshape(len(x), -1) @ x.reshape(len(x), -1).T) for x in (t, s))
    return ((t - s) ** 2).sum() / len(t) ** 2


def cc64(t, s):
    delta = np.abs(t - s)
    return np.mean([(a * b).sum() for a, b in zip(delta, delta[1:], strict=False)])


def huber64(x):
    return scipy.special.huber(1, x).mean()


def rkd64(t, s):
    found = []
    for x in (t, s):
        d = np.array([[np.linalg.norm(a - b) for b in x] for a in x])
        d = np.maximum(d, 1e-6) * (1 - np.eye(len(x)))
        direction = np.array([[unit(b - a) for b in x] for a in x])
        found += [d / d[d > 0].mean(), np.array([e @ e.T for e in direction])]
    return 25 * huber64(found[0] - found[2]) + 50 * huber64(found[1] - found[3])


def pkt64(t, s):
    p, q = ((unit(x) @ unit(x).T + 1) / 2 for x in (t, s))
    p, q = (x / x.sum(1, keepdims=True) for x in (p, q))
    return (p * np.log((p + 1e-7) / (q + 1e-7))).mean()


def ab64(t, s):
    """One stage, the last of its list."""
    t, s = same(t, s)
    off = np.where(t > 0, np.where(s <= 1, (s - 1) ** 2, 0), np.where(s > -1, (s + 1) ** 2, 0))
    return 0.003 * off.sum() / len(t)


KERNELS = [np.random.default_rng(k).normal(0, 0.5, (1, 1, *shape))
           for k, shape in enumerate(((3, 4), (4, 3), (3, 3)))]
SCALE = np.random.default_rng(3).normal(1, 1, 3)


def vid64(t, s):
    t, s = same(t, s)
    for k, kernel in enumerate(KERNELS):
        s = (np.maximum(s, 0) if k else s) @ kernel[0, 0]
    variance = np.log1p(np.exp(SCALE)) + 1e-5
    return 0.5 * ((t - s) ** 2 / variance + np.log(variance)).mean()


def fsp64(t, s):
    """Of a map and its square, as two stages."""
    t, s = (np.einsum("bhwc,bhwd->bcd", x, x**2) / np.prod(x.shape[1:3]) for x in (t, s))
    return ((t - s) ** 2).mean()


def fsp(*, teacher, student):
    return methods.fsp(teacher=[teacher, teacher**2], student=[student, student**2])[0]


def kl64(p, q):
    return scipy.special.rel_entr(p, q).sum(-1)


def soft64(z, temperature):
    return scipy.special.softmax(z / temperature, axis=-1)


def kd64(t, s, temperature=4.0):
    return temperature**2 * kl64(soft64(t, temperature), soft64(s, temperature)).mean()


def labels_of(rows):
    return np.arange(len(rows)) * 7 % rows.shape[1]


def dkd64(t, s):
    own = np.arange(t.shape[1]) == labels_of(t)[:, None]
    parts = []
    for z in (t, s):
        p = soft64(z, 4.0)
        binary = np.stack([p[own], 1 - p[own]], axis=1)
        rest = np.where(own, 0, p)
        parts.append((binary, rest / rest.sum(1, keepdims=True)))
    (binary_t, rest_t), (binary_s, rest_s) = parts
    return 16 * (kl64(binary_t, binary_s) + 8 * kl64(rest_t, rest_s)).mean()


def dkd(*, teacher, student):
    return methods.dkd(teacher=teacher, student=student, labels=labels_of(teacher))


def dist64(t, s):
    def correlation(a, b):  # scipy's, but for the 1e-8 that keeps it from 0 / 0
        a, b = a - a.mean(), b - b.mean()
        return a @ b / (np.sqrt(a @ a) * np.sqrt(b @ b) + 1e-8)

    p, q = soft64(t, 4.0), soft64(s, 4.0)
    rows = np.mean([correlation(a, b) for a, b in zip(p, q, strict=True)])
    columns = np.mean([correlation(a, b) for a, b in zip(p.T, q.T, strict=True)])
    return 16 * (1 - rows + 1 - columns)


def standardised64(t, s):
    t, s = ((z - z.mean(1, keepdims=True)) / z.std(1, ddof=1, keepdims=True) for z in (t, s))
    return kd64(t, s, 2.0)


def ttm64(t, s, weighted=False):
    power = soft64(t, 1) ** 0.25
    weight = power.sum(1)
    return (kl64(power / weight[:, None], soft64(s, 1)) * (weight if weighted else 1)).mean()


def wttm64(t, s):
    return ttm64(t, s, weighted=True)


def ab(*, teacher, student):
    return methods.ab(teacher=[teacher], student=[student])[0]


def vid(*, teacher, student):
    return methods.vid(teacher=teacher, student=student, kernels=KERNELS, log_scale=SCALE)


MAPS = {"fitnet": (methods.fitnet, fitnet64), "at": (methods.at, at64), "ft": (methods.ft, ft64),
        "nst": (methods.nst, nst64), "ab": (ab, ab64), "vid": (vid, vid64)}
VECTORS = {"sp": (methods.sp, sp64), "cc": (methods.cc, cc64), "rkd": (methods.rkd, rkd64),
           "pkt": (methods.pkt, pkt64)}
LOGITS = {"kd": (methods.kd, kd64), "dkd": (dkd, dkd64), "dist": (methods.dist, dist64),
          "standardised": (methods.standardised, standardised64), "ttm": (methods.ttm, ttm64),
          "wttm": (methods.wttm, wttm64)}
SIZES = [((4, 4), (4, 4)), ((8, 8), (4, 4)), ((4, 4), (8, 8)), ((7, 7), (4, 4)), ((3, 3), (5, 5)),
         ((1, 1), (6, 6)), ((6, 4), (3, 4))]


def drawn(*shapes, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return [scale * rng.normal(0, 1, shape) for shape in shapes]


def check(loss, reference, teacher, student):
    """Value against NumPy; gradient against a difference of NumPy's values in some directions."""
    def call(t, s):
        return loss(teacher=t[0], student=s[0])

    value, (gradient,) = value_and_gradients(call, [teacher], [student])
    assert value == pytest.approx(reference(teacher, student), rel=1e-5, abs=1e-9)
    assert gradient.dtype == student.dtype and np.isfinite(gradient).all()
    for seed in range(3):
        (way,) = drawn(student.shape, seed=seed)
        step = 1e-6
        slope = (reference(teacher, student + step * way)
                 - reference(teacher, student - step * way)) / (2 * step)
        assert np.sum(gradient * way) == pytest.approx(slope, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("batch", [1, 2, 9])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", MAPS)
def test_maps_against_float64(name, sizes, batch):
    teacher, student = drawn(*((batch, *size, 3) for size in sizes), seed=batch)
    check(*MAPS[name], teacher, student)


@pytest.mark.parametrize("channels", [(1, 1), (1, 5), (5, 1), (2, 6)])
@pytest.mark.parametrize("name", ["at", "ft", "nst"])
def test_maps_of_other_widths(name, channels):
    teacher, student = drawn(*((4, 6, 6, width) for width in channels))
    check(*MAPS[name], teacher, student)


@pytest.mark.parametrize("name", ["fitnet", "ab"])
def test_a_single_channel(name):
    check(*MAPS[name], *drawn((4, 6, 6, 1), (4, 3, 3, 1)))


@pytest.mark.parametrize("channels", [1, 3])
def test_fsp_against_float64(channels):
    check(fsp, fsp64, *drawn((4, 6, 6, channels), (4, 3, 3, channels)))


def test_fsp_pools_the_larger_of_two_stages():
    first, second = drawn((4, 8, 8, 2), (4, 3, 3, 5))
    got = methods._flow(first, second)
    want = np.einsum("bhwc,bhwd->bcd", pooled(first, (3, 3)), second) / 9
    np.testing.assert_allclose(got, want, rtol=1e-10)


@pytest.mark.parametrize("batch", [2, 3, 16])
@pytest.mark.parametrize("name", VECTORS)
def test_vectors_against_float64(name, batch):
    width = 6 if name == "cc" else 9
    check(*VECTORS[name], *drawn((batch, 6), (batch, width), seed=batch))


@pytest.mark.parametrize("shapes", [((4, 2, 2, 3), (4, 5, 5, 1)), ((4, 1), (4, 1))])
def test_sp_takes_maps_and_single_features(shapes):
    check(methods.sp, sp64, *drawn(*shapes))


@pytest.mark.parametrize("batch, classes", [(1, 10), (2, 3), (9, 10), (5, 2), (3, 100)])
@pytest.mark.parametrize("name", LOGITS)
def test_logits_against_float64(name, batch, classes):
    check(*LOGITS[name], *drawn((batch, classes), (batch, classes), seed=classes, scale=3))


def test_crd_against_a_loop():
    memory_t, memory_s, teacher, student = map(unit, drawn((30, 5), (30, 5), (4, 5), (4, 5)))
    sampled = np.random.default_rng(1).integers(0, 30, (4, 7))
    share, z = 6 / 30, (900.0, 1100.0)

    def reference(t, s):
        total = 0
        for k, own in enumerate(sampled):
            for row, memory, divisor in ((s[k], memory_t, z[0]), (t[k], memory_s, z[1])):
                p = np.exp(memory[own] @ row / 0.07) / divisor
                total -= np.log(p[0] / (p[0] + share + 1e-7))
                total -= np.log(share / (p[1:] + share + 1e-7)).sum()
        return total / len(sampled)

    def loss(*, teacher, student):
        return methods.crd(teacher=teacher, student=student, teacher_memory=memory_t,
                           student_memory=memory_s, sampled=sampled, normalisers=z)

    check(loss, reference, teacher, student)


# --- limits ---------------------------------------------------------------------------

ALL = {**MAPS, **VECTORS, **LOGITS, "fsp": (fsp, fsp64)}
SAME_SHAPE = {**{name: (4, 5, 5, 3) for name in (*MAPS, "fsp")},
              **{name: (4, 6) for name in (*VECTORS, *LOGITS)}}
NOT_ZERO_FOR_A_COPY = {"ab", "vid", "ttm", "wttm"}


@pytest.mark.parametrize("name", ALL)
def test_a_perfect_copy(name):
    """Zero, but for margins (AB), variances and a regressor (VID), and one-sided T (TTM)."""
    (teacher,) = (x.astype("float32") for x in drawn(SAME_SHAPE[name]))
    got, (gradient,) = value_and_gradients(
        lambda t, s: ALL[name][0](teacher=t[0], student=s[0]), [teacher], [teacher])
    assert got == pytest.approx(float(ALL[name][1](*[teacher.astype("float64")] * 2)), abs=1e-5)
    assert (got > 0.01) == (name in NOT_ZERO_FOR_A_COPY)
    assert np.isfinite(gradient).all()


def test_vid_of_a_perfect_prediction_is_half_the_mean_log_variance():
    (maps,) = drawn((4, 5, 5, 3))
    eye = [np.eye(3)[None, None]] * 3
    got = methods.vid(teacher=abs(maps), student=abs(maps), kernels=eye, log_scale=SCALE)
    assert float(got) == pytest.approx(np.log(np.log1p(np.exp(SCALE)) + 1e-5).mean() / 2)


def edge_inputs(shape):
    (some,) = drawn(shape)
    rows = np.repeat(some[:1], len(some), axis=0)  # all images alike: distances are 0
    flat = np.ones(shape)
    return {"zeros": (some, 0 * some), "both zero": (0 * some, 0 * some), "alike": (some, rows),
            "teacher alike": (rows, some), "constant": (some, flat), "equal": (some, some),
            "one": (some[:1], some[1:2]), "tiny": (some, 1e-12 * some), "dead": (
                some, some * (np.arange(shape[-1]) > 0)), "large": (some, 1e4 * some)}


@pytest.mark.parametrize("kind", edge_inputs((2, 2)))
@pytest.mark.parametrize("name", ALL)
def test_value_and_gradient_stay_finite(name, kind):
    teacher, student = (x.astype("float32") for x in edge_inputs(SAME_SHAPE[name])[kind])
    value, (gradient,) = value_and_gradients(
        lambda t, s: ALL[name][0](teacher=t[0], student=s[0]), [teacher], [student])
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("name", LOGITS)
def test_logits_of_a_thousand_stay_finite_and_agree(name):
    """Where float64 has a value: a probability of 0 beside a larger one is an infinite KL."""
    rng = np.random.default_rng(0)
    teacher, student = rng.choice([-1000.0, 0.0, 1000.0], (2, 16, 10)).astype("float32")
    value, (gradient,) = value_and_gradients(
        lambda t, s: LOGITS[name][0](teacher=t[0], student=s[0]), [teacher], [student])
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0
    if name in ("kd", "ttm"):
        t = teacher.astype("float64") / 4
        s = student.astype("float64") / (4 if name == "kd" else 1)
        log_p, log_q = (scipy.special.log_softmax(z, axis=-1) for z in (t, s))
        kl = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
        assert value == pytest.approx((16 if name == "kd" else 1) * kl, rel=1e-4)


@pytest.mark.parametrize("name", ["ttm", "wttm"])
def test_a_class_that_the_teacher_excludes_contributes_nothing(name):
    teacher, student = drawn((8, 10), (8, 10))
    teacher[:, 3] = -np.inf
    value, (gradient,) = value_and_gradients(
        lambda t, s: LOGITS[name][0](teacher=t[0], student=s[0]), [teacher], [student])
    with np.errstate(invalid="ignore"):
        kept = [np.delete(each, 3, axis=1) for each in (
            scipy.special.log_softmax(each, axis=-1) for each in (teacher / 4, student))]
    kl = (np.exp(kept[0]) * (kept[0] - kept[1])).sum(-1)
    share = (scipy.special.softmax(teacher, axis=-1) ** 0.25).sum(-1) if name == "wttm" else 1
    assert np.isfinite(gradient).all() and value == pytest.approx((share * kl).mean(), rel=1e-5)


def test_a_label_for_each_image_of_an_unknown_batch():
    rows = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")
    loss = tf.function(lambda rows, labels: methods.dkd(teacher=rows, student=-rows, labels=labels),
                       input_signature=[tf.TensorSpec((None, 6)), tf.TensorSpec((None,), "int32")])
    assert loss(rows, [1, 1, 1, 1]) > 0
    with pytest.raises(tf.errors.InvalidArgumentError):
        loss(rows, [1])


def test_fsp_needs_two_stages():
    with pytest.raises(ValueError, match="name at least two layers"):
        methods.fsp(teacher=[np.ones((2, 4, 4, 3))], student=[np.ones((2, 4, 4, 3))])


def test_dkd_at_a_thousand_agrees_with_logarithms():
    """The original's own class, moved by 1000, is still among the others here."""
    rng = np.random.default_rng(0)
    teacher, student = rng.choice([-1000.0, 0.0, 1000.0], (2, 16, 10))
    own = np.arange(10) == labels_of(teacher)[:, None]
    want = 0
    for inside in (True, False):
        logs = []
        for z in (teacher / 4, student / 4):
            rest = z[~own].reshape(16, 9)
            pair = np.stack([z[own], scipy.special.logsumexp(rest, axis=1)], axis=1)
            logs.append(scipy.special.log_softmax(pair if inside else rest, axis=-1))
        kl = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean()
        want += 16 * kl * (1 if inside else 8)
    assert float(dkd(teacher=teacher, student=student)) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("label", [-1, -2, 3, 99, 1.5])
@pytest.mark.parametrize("compiled", [False, True])
def test_dkd_has_no_own_class_for_an_unknown_label(label, compiled):
    """Not that of another class. The loss of a known one is as ever."""
    teacher, student = drawn((4, 3), (4, 3))
    loss = tf.function(methods.dkd, jit_compile=True) if compiled else methods.dkd
    for given in ([0, label, 2, 1], [[0], [label], [2], [1]]):
        given = np.array(given, "float32" if label == 1.5 else "int32")
        assert np.isnan(loss(teacher=teacher, student=student, labels=given))
    given = np.array([0, 1, 2, 1], "int32")
    np.testing.assert_allclose(loss(teacher=teacher, student=student, labels=given),
                               methods.dkd(teacher=teacher, student=student, labels=given + 0.0))


@pytest.mark.parametrize("labels", [1, [1], np.zeros(8, int), np.eye(4, 6), [[1, 2]] * 4])
def test_dkd_needs_a_label_for_each_image(labels):
    with pytest.raises(ValueError, match="labels have shape .* for 4 images"):
        methods.dkd(teacher=np.ones((4, 6)), student=np.zeros((4, 6)), labels=labels)


@pytest.mark.parametrize("name, settings, words", [
    *((name, {"temperature": wrong}, f"temperature is {wrong!r}") for name in ("dkd", "dist")
      for wrong in (-4, 0, math.nan, "4")),
    *((name, {"power": wrong}, f"power is {wrong!r}") for name in ("ttm", "wttm")
      for wrong in (-1, 0, math.inf, math.nan, True, "1"))])
def test_a_temperature_or_power_that_is_none(name, settings, words):
    logits = np.random.default_rng(0).normal(size=(2, 4, 6))
    labels = {"labels": np.zeros(4, int)} if name == "dkd" else {}
    wrong = [*settings.values()][0]
    error = TypeError if isinstance(wrong, (str, bool)) else ValueError
    with pytest.raises(error, match=re.escape(words)):
        getattr(methods, name)(teacher=logits[0], student=logits[1], **labels, **settings)


@pytest.mark.parametrize("kernels, scales", [
    ([(1, 1, 2, 5), (1, 1, 5, 5), (1, 1, 5, 3)], (1,)),  # it would be broadcast
    ([(3, 3, 2, 5), (1, 1, 5, 5), (1, 1, 5, 3)], (3,)),  # its corner alone would count
    ([(1, 1, 2, 5), (1, 1, 4, 5), (1, 1, 5, 3)], (3,)), ([(2, 5), (5, 5), (5, 3)], (3,)),
    ([(1, 1, 2, 5), (1, 1, 5, 4)], (3,)), ([(1, 1, 2, 3)], (3, 1))])
def test_vid_needs_kernels_that_lead_to_the_teacher(kernels, scales):
    with pytest.raises(ValueError, match="kernels have shapes .* from 2 channels to 3"):
        methods.vid(teacher=np.ones((4, 5, 5, 3)), student=np.ones((4, 5, 5, 2)),
                    kernels=[np.ones(shape) for shape in kernels], log_scale=np.ones(scales))


def test_crd_needs_numbers_for_each_image():
    rows, memory = np.eye(4, 8, dtype="float32"), np.eye(9, 8, dtype="float32")
    with pytest.raises(ValueError, match=r"sampled has shape \(1, 3\), student \(4, 8\)"):
        methods.crd(teacher=rows, student=rows, teacher_memory=memory, student_memory=memory,
                    sampled=np.array([[0, 1, 2]]), normalisers=(1.0, 1.0))
    with pytest.raises(ValueError, match=r"teacher_memory has shape \(9, 8\), student_memory \(5"):
        methods.crd(teacher=rows, student=rows, teacher_memory=memory, student_memory=memory[:5],
                    sampled=np.zeros((4, 3), "int32"), normalisers=(1.0, 1.0))


@pytest.mark.parametrize("name", ["ab", "fsp"])
def test_stages_come_in_pairs(name):
    maps = [np.ones((4, 5, 5, 3))] * 3
    with pytest.raises(ValueError, match="teacher gives 3 maps, student 2"):
        getattr(methods, name)(teacher=maps, student=maps[:2])
    given, once = (getattr(methods, name)(teacher=kind(maps), student=kind(maps))
                   for kind in (list, iter))
    np.testing.assert_array_equal(given, once)


def test_hints_of_nothing():
    with pytest.raises(TypeError, match="teacher are not a tensor of numbers"):
        methods.fitnet(teacher=None, student=np.ones((4, 6)))


def test_dkd_needs_two_classes():
    with pytest.raises(ValueError, match="have one class"):
        methods.dkd(teacher=[[1.0]], student=[[2.0]], labels=[0])


def test_a_vector_of_zeros_has_no_gradient_in_pkt():
    """A student whose last ReLU is silent for an image. The original's gradient is nan."""
    teacher, student = drawn((3, 4), (3, 2))
    student[0] = 0
    loss, (gradient,) = value_and_gradients(
        lambda t, s: methods.pkt(teacher=t[0], student=s[0]), [teacher], [student])
    assert agrees(loss, pkt64(teacher, student))
    assert (gradient[0] == 0).all() and 0 < abs(gradient[1:]).max() < 10


def test_hints_for_vectors():
    teacher, student = drawn((3, 5), (3, 5))
    np.testing.assert_allclose(methods.fitnet(teacher=teacher, student=student),
                               np.mean((teacher.astype("float64") - student) ** 2), rtol=1e-6)


def test_relations_ignore_scale_and_rkd_the_place():
    teacher, student = drawn((5, 4), (5, 6))
    for loss in (methods.sp, methods.rkd, methods.pkt):
        once, scaled = (float(loss(teacher=teacher, student=k * student)) for k in (1, 100))
        assert scaled == pytest.approx(once, rel=1e-5)
    moved = methods.rkd(teacher=teacher, student=student + 3)
    assert float(moved) == pytest.approx(float(methods.rkd(teacher=teacher, student=student)))


def test_standardised_and_dist_ignore_the_scale_of_logits():
    teacher, student = drawn((5, 10), (5, 10))
    once, scaled = (float(methods.standardised(teacher=teacher, student=k * student + k))
                    for k in (1, 50))
    assert scaled == pytest.approx(once, rel=1e-4)


# --- what is refused, and how the file is written --------------------------------------


@pytest.mark.parametrize("name, shapes, words", [
    ("at", ((4, 6), (4, 6)), "maps"), ("nst", ((4, 5, 5, 3), (4, 75)), "maps"),
    ("fitnet", ((4, 5, 5, 3), (4, 5, 5, 2)), "regressor"), ("cc", ((4, 6), (4, 5)), "embedding"),
    ("rkd", ((4, 6), (3, 6)), "same images"), ("dkd", ((4, 6), (4, 5)), "must agree"),
    ("dist", ((4, 6, 1), (4, 6, 1)), "rows"), ("sp", ((0, 6), (0, 6)), "same images")])
def test_shapes_that_do_not_fit_are_named(name, shapes, words):
    teacher, student = map(np.zeros, shapes)
    with pytest.raises(ValueError, match=f"teacher has shape .*{words}"):
        getattr(methods, name)(teacher=teacher, student=student, **(
            {"labels": np.zeros(4)} if name == "dkd" else {}))


PUBLIC = [f for name, f in vars(methods).items()
          if inspect.isfunction(f) and f.__module__ == methods.__name__]
LOSSES = "kd fitnet at sp cc vid rkd pkt ab ft fsp nst crd dkd dist standardised ttm wttm".split()


def test_each_function_is_short_and_the_file_too():
    assert len((ROOT / "reference" / "methods.py").read_text().splitlines()) <= 400
    for function in PUBLIC:
        lines = inspect.getsource(function).splitlines()
        doc = len((inspect.getdoc(function) or "").splitlines())
        blank = sum(not line.strip() or line.strip().startswith(("#", '"""')) for line in lines)
        assert len(lines) - doc - blank <= 12 + 2, function.__name__  # decorator and def lines


@pytest.mark.parametrize("name", LOSSES)
def test_teacher_and_student_by_name_only(name):
    loss = getattr(methods, name)
    kinds = {p.kind for p in inspect.signature(loss).parameters.values()}
    assert kinds == {inspect.Parameter.KEYWORD_ONLY}
    assert "``" in loss.__doc__ and " 20" in loss.__doc__  # a formula, and a source with its year
    with pytest.raises(TypeError):
        loss(np.zeros((2, 3)), np.zeros((2, 3)))


# --- the lesson -----------------------------------------------------------------------

NOTEBOOK = ROOT / "notebooks" / "09_other_methods.ipynb"


@pytest.mark.skipif(not NOTEBOOK.exists(), reason="no notebook 09 yet: it waits for its rows")
@pytest.mark.parametrize("name, helper, loss, shapes", [
    ("hint_loss", None, methods.fitnet, [(4, 5, 5, 3)] * 2),
    ("attention_loss", "attention", methods.at, [(4, 5, 5, 3), (4, 5, 5, 6)]),
    ("relation_loss", "relations", methods.rkd, [(9, 6), (9, 4)]),
    ("decoupled_loss", None, methods.dkd, [(9, 10), (9, 10)])])
def test_the_losses_in_09_are_those_of_methods(name, helper, loss, shapes):
    inline = defined_in(NOTEBOOK, *([helper] if helper else []), name)
    teacher, student = (x.astype("float32") for x in drawn(*shapes))
    more = {"labels": labels_of(teacher)} if name == "decoupled_loss" else {}
    want = float(loss(teacher=teacher, student=student, **more))
    assert float(inline(teacher=teacher, student=student, **more)) == pytest.approx(want, rel=1e-4)
    assert max(code_lines(NOTEBOOK, each) for each in (name, helper) if each) <= 10


def code_lines(path, name):
    source = "\n".join("".join(cell["source"]) for cell in cells(path, "code"))
    node = next(n for n in ast.parse(source).body if getattr(n, "name", "") == name)
    return node.end_lineno - node.lineno + 1
