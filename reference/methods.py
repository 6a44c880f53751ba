"""Other people's distillation losses, equal to their originals.

Every loss is written in keras.ops, so it runs on TensorFlow, JAX and PyTorch. It takes the
teacher and the student by name and returns a scalar (a list of scalars, one for each stage, where
it says so). Feature maps are (batch, height, width, channels), vectors (batch, width) and logits
(batch, classes). Maps of two sizes are pooled to the smaller height and width (the originals take
square maps). Where a norm or a distance is 0 its gradient is 0, not 0 / 0. "RepDistiller" is
github.com/HobbitLong/RepDistiller.
"""

import itertools
import math
import numbers

import kdlib
import numpy as np
from kdlib import require
from keras import ops

# --- what the losses share ------------------------------------------------------------


def _floats(teacher, student, *, rank=None, equal=False):
    """Both as float tensors, or a sentence about their shapes."""
    teacher, student = kdlib._as_float("teacher", teacher), kdlib._as_float("student", student)
    teacher, student = ops.cast(teacher, student.dtype), student + 0  # of a variable, its value
    taught, learned = tuple(teacher.shape), tuple(student.shape)
    wanted = {4: "maps (batch, height, width, channels)", 2: "rows (batch, width)"}.get(rank, "")
    require(rank in (None, len(taught)) and rank in (None, len(learned)),
            f"teacher has shape {taught}, student {learned}. This loss compares {wanted}.")
    require(kdlib._agree(taught[:1], learned[:1]) and 0 not in (*taught, *learned),
            f"teacher has shape {taught}, student {learned}. Both need the same images.")
    require(not equal or kdlib._agree(taught[1:], learned[1:]), f"teacher has shape {taught}, "
            f"student {learned}. They must agree: put a regressor or an embedding between them.")
    return teacher, student


def _same_size(teacher, student):
    """Two maps of one height and width: the larger is pooled, as by adaptive_avg_pool2d."""
    teacher, student = _floats(teacher, student, rank=4)
    size = [min(pair) for pair in zip(teacher.shape[1:3], student.shape[1:3], strict=True)]
    return _pool(teacher, size), _pool(student, size)


def _pool(maps, size):
    for axis, new, rule in zip((1, 2), size, ("bhwc,ih->biwc", "bhwc,iw->bhic"), strict=True):
        old, k = maps.shape[axis], np.arange(maps.shape[axis])
        ends = [(i * old // new, -(-(i + 1) * old // new)) for i in range(new)]
        weights = np.array([((a <= k) & (k < b)) / (b - a) for a, b in ends])
        maps = maps if new == old else ops.einsum(rule, maps, ops.cast(weights, maps.dtype))
    return maps


def _flat(x):
    return ops.reshape(x, (-1, math.prod(x.shape[1:])))


def _norm(x, axis=-1):
    square = ops.sum(x * x, axis=axis, keepdims=True)
    return ops.where(square > 0, ops.sqrt(ops.where(square > 0, square, 1.0)), 0.0)


def _unit(x, axis=-1, *, epsilon=0.0):
    """x / (|x| + epsilon), and 0 for 0."""
    norm = _norm(x, axis)
    return x * ops.where(norm > 0, 1 / ops.maximum(norm + epsilon, 1e-12), 0.0)


def _mean_square(x):
    return ops.mean(x * x)


def _stages(teacher, student) -> list:
    """The two maps of each stage."""
    teacher, student = list(teacher), list(student)
    require(len(teacher) == len(student), f"teacher gives {len(teacher)} maps, student "
            f"{len(student)}. Give a list of as many for each.")
    return list(zip(teacher, student, strict=True))


def _power(power) -> float:
    real = isinstance(power, numbers.Real) and not isinstance(power, bool)
    require(real and 0 < power < math.inf, f"power is {power!r}. It is 1 / T of the teacher: a "
            "finite number above 0, typically 0.1 to 1.", ValueError if real else TypeError)
    return float(power)


def _kl(teacher, student):
    """KL(softmax(teacher) || softmax(student)) of each row; a huge logit is no infinity here."""
    log_p, log_q = ops.log_softmax(teacher, axis=-1), ops.log_softmax(student, axis=-1)
    p = ops.exp(log_p)  # 0 where a teacher's logit is -inf: that class contributes nothing
    return ops.sum(p * ops.where(p > 0, log_p - log_q, 0.0), axis=-1)


# --- RepDistiller's thirteen ----------------------------------------------------------


def kd(*, teacher, student, temperature=4.0):
    """``T^2 KL(softmax(t / T) || softmax(s / T))`` of logits. Hinton et al. 2015, section 2."""
    return kdlib.distillation_loss(teacher_logits=teacher, student_logits=student,
                                   temperature=temperature)


def fitnet(*, teacher, student):
    """``mean((t - s)^2)`` of maps with equal channels, or of vectors of equal width; a regressor
    makes them equal. Romero et al. 2015, section 2.2; RepDistiller FitNet.py.
    """
    teacher, student = _floats(teacher, student)
    if len(teacher.shape) == 4:
        teacher, student = _same_size(teacher, student)
    teacher, student = _floats(teacher, student, equal=True)
    return _mean_square(teacher - student)


def at(*, teacher, student):
    """``mean((a(t) - a(s))^2)``: a map's channels are squared, averaged and scaled to length 1.

    One stage; add up the stages. Zagoruyko and Komodakis 2017, section 3.1; RepDistiller AT.py.
    """
    teacher, student = (attention(x) for x in _same_size(teacher, student))
    return _mean_square(teacher - student)


def attention(maps):
    """Where a map (batch, height, width, channels) looks: (batch, height * width), length 1."""
    return _unit(_flat(ops.mean(maps * maps, axis=-1)))


def sp(*, teacher, student):
    """``|G(t) - G(s)|^2 / batch^2``: G holds the images' dot products, its rows of length 1.

    Maps or vectors of any two widths. Tung and Mori 2019, section 3; RepDistiller SP.py.
    """
    flat = [_flat(x) for x in _floats(teacher, student)]
    taught, learned = (_unit(ops.matmul(x, ops.transpose(x))) for x in flat)
    return _mean_square(taught - learned)


def cc(*, teacher, student):
    """``mean_i sum(|t_i - s_i| |t_i+1 - s_i+1|)`` of neighbours in the batch; 0 for one image.

    Vectors of one width; embeddings make them equal. Peng et al. 2019 as in RepDistiller CC.py.
    """
    teacher, student = _floats(teacher, student, rank=2, equal=True)
    delta = ops.abs(teacher - student)
    pairs = ops.maximum(ops.shape(delta)[0] - 1, 1)
    return ops.sum(delta[:-1] * delta[1:]) / ops.cast(pairs, delta.dtype)


def vid(*, teacher, student, kernels, log_scale):
    """``mean(((t - f(s))^2 / v + log v) / 2)``, ``v = softplus(log_scale) + 1e-5`` a channel.

    f is three 1x1 convolutions with ReLU between: kernels are (1, 1, channels in, channels out).
    log_scale is (channels of t,). Ahn et al. 2019, equation 6; RepDistiller VID.py.
    """
    teacher, student = _same_size(teacher, student)
    kernels, log_scale = [*map(ops.convert_to_tensor, kernels)], ops.convert_to_tensor(log_scale)
    _check_chain(teacher.shape[-1], student.shape[-1], kernels, log_scale)
    for k, kernel in enumerate(kernels):
        kernel = ops.cast(kernel[0, 0], student.dtype)
        student = ops.matmul(ops.relu(student) if k else student, kernel)
    variance = ops.softplus(ops.cast(log_scale, student.dtype)) + 1e-5
    teacher, student = _floats(teacher, student, equal=True)
    return ops.mean((teacher - student) ** 2 / variance + ops.log(variance)) / 2


def _check_chain(taught, learned, kernels, log_scale):
    shapes, scales = [tuple(each.shape) for each in kernels], tuple(log_scale.shape)
    widths = [learned, *(shape[-1] for shape in shapes)]
    fits = shapes == [(1, 1, *pair) for pair in itertools.pairwise(widths)]
    require(fits and (widths[-1],) == scales == (taught,), f"kernels have shapes {shapes}, "
            f"log_scale {scales}. They must lead from {learned} channels to {taught}, one by one.")


def rkd(*, teacher, student, distance=25.0, angle=50.0):
    """``25 h(d(t) - d(s)) + 50 h(c(t) - c(s))``: d holds distances of images divided by their
    mean, c the cosines of the angles in all triangles, h is the mean of the smooth L1 loss.

    Vectors of any two widths. Park et al. 2019, section 3.2; RepDistiller RKD.py.
    """
    relations = [_distances_and_cosines(_flat(x)) for x in _floats(teacher, student)]
    (taught_d, taught_c), (learned_d, learned_c) = relations
    return distance * _smooth(learned_d - taught_d) + angle * _smooth(learned_c - taught_c)


def _distances_and_cosines(rows):
    between = ops.expand_dims(rows, 0) - ops.expand_dims(rows, 1)
    others = 1 - ops.eye(ops.shape(rows)[0], dtype=rows.dtype)
    # The original counts the distance of two equal images as 1e-6.
    d = others * ops.maximum(_norm(between)[..., 0], 1e-6)
    mean = ops.sum(d) / ops.maximum(ops.sum(others), 1.0)
    unit = _unit(between)
    return d / ops.maximum(mean, 1e-12), ops.matmul(unit, ops.transpose(unit, (0, 2, 1)))


def _smooth(x):
    size = ops.abs(x)
    return ops.mean(ops.where(size < 1, x * x / 2, size - 0.5))


def pkt(*, teacher, student):
    """``mean(p log(p / q))``: p and q are the images' cosines, moved to 0 to 1, rows of sum 1.

    Vectors of any two widths. Passalis and Tefas 2018, section 3; RepDistiller PKT.py.
    """
    rows = [_unit(_flat(x), epsilon=1e-7) for x in _floats(teacher, student)]
    p, q = ((ops.matmul(x, ops.transpose(x)) + 1) / 2 for x in rows)
    p, q = (x / ops.sum(x, axis=1, keepdims=True) for x in (p, q))
    return ops.mean(p * ops.log((p + 1e-7) / (q + 1e-7)))


def ab(*, teacher, student, margin=1.0):
    """``sum(max(0, 1 - s)^2)`` where t > 0, else ``sum(max(0, 1 + s)^2)``: s is to be active alike.

    Lists of maps before their ReLU, equal channels; returns a list: stage k of n is summed, divided
    by the batch and weighed 0.003 * 2^(k - n), k from 1. Heo et al. 2019; RepDistiller AB.py.
    """
    losses = []
    for t, s in _stages(teacher, student):
        t, s = _floats(*_same_size(t, s), equal=True)
        off = (s + margin) ** 2 * ops.cast((s > -margin) & (t <= 0), s.dtype) + (
            (s - margin) ** 2 * ops.cast((s <= margin) & (t > 0), s.dtype))
        losses.append(ops.mean(ops.sum(_flat(off), axis=-1)))
    return [0.003 * 2.0 ** (k + 1 - len(losses)) * loss for k, loss in enumerate(losses)]


def ft(*, teacher, student):
    """``mean(|a(t) - a(s)|)`` of factors: maps out of paraphraser and translator, a as in at.

    Kim et al. 2018, section 3.3; RepDistiller FT.py.
    """
    teacher, student = (attention(x) for x in _same_size(teacher, student))
    return ops.mean(ops.abs(teacher - student))


def fsp(*, teacher, student):
    """``mean((F(t) - F(s))^2)``, F the products of the channels of two stages in a row, their mean
    over all places. Lists of maps, stage for stage with equal channels; returns a list, one for
    each two stages. Yim et al. 2017, section 3.2; RepDistiller FSP.py.
    """
    stages = _stages(teacher, student)
    require(len(stages) > 1, f"teacher and student give {len(stages)} stage. This loss compares "
            "what happens from one stage to the next: name at least two layers.")
    flows = [[_flow(*two) for two in itertools.pairwise(maps)]
             for maps in zip(*stages, strict=True)]
    return [_mean_square(ops.subtract(*_floats(t, s, equal=True)))
            for t, s in zip(*flows, strict=True)]


def _flow(first, second):
    first, second = _same_size(first, second)
    return ops.einsum("bhwc,bhwd->bcd", first, second) / math.prod(first.shape[1:3])


def nst(*, teacher, student):
    """``k(t, t) + k(s, s) - 2 k(s, t)``, k the mean of (a . b)^2 over the channels of two maps.

    Channels have length 1. One stage. Huang and Wang 2017, section 4.2; RepDistiller NST.py.
    """
    t, s = (_unit(ops.reshape(x, (-1, math.prod(x.shape[1:3]), x.shape[3])), axis=1)
            for x in _same_size(teacher, student))

    def kernel(a, b):
        return _mean_square(ops.einsum("bpc,bpd->bcd", a, b))

    return kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)


def crd(*, teacher, student, teacher_memory, student_memory, sampled, normalisers,
        temperature=0.07):
    """Tell an image's own memory from those of others, for student and teacher, and add both.

    ``-mean(log(P0 / (P0 + c)) + sum_k log(c / (Pk + c)))``, P = exp(memory . v / 0.07) / Z,
    c = negatives / images. teacher, student: embeddings (batch, d) of length 1; memories (images,
    d); sampled (batch, 1 + negatives): image numbers, the own one first; normalisers Z, of student
    and teacher. Tian et al. 2020, section 3; RepDistiller crd/criterion.py.
    """
    teacher, student = _floats(teacher, student, rank=2, equal=True)
    _check_sampled(tuple(student.shape), tuple(teacher_memory.shape), tuple(student_memory.shape),
                   tuple(sampled.shape))
    temperature = kdlib._number("temperature", temperature)
    share = (sampled.shape[1] - 1) / student_memory.shape[0]
    loss = 0.0
    for rows, memory, z in ((student, teacher_memory, normalisers[0]),
                            (teacher, student_memory, normalisers[1])):
        p = crd_scores(rows, memory, sampled, temperature) / z
        own = ops.log(p[:, :1] / (p[:, :1] + share + 1e-7))
        others = ops.log(share / (p[:, 1:] + share + 1e-7))
        loss = loss - ops.mean(ops.sum(ops.concatenate([own, others], axis=1), axis=1))
    return loss


def _check_sampled(rows, taught, learned, sampled):
    require(len(sampled) == 2 and kdlib._agree(sampled[:1], rows[:1]), f"sampled has shape "
            f"{sampled}, student {rows}. Give a row of image numbers for each image.")
    require(taught == learned == (*taught[:1], rows[1]), f"teacher_memory has shape {taught}, "
            f"student_memory {learned}. Both hold a row of {rows[1]} for each training image.")


def crd_scores(rows, memory, sampled, temperature=0.07):
    """``exp(memory . row / 0.07)`` of the sampled memories: (batch, 1 + negatives)."""
    dots = ops.matmul(rows, ops.transpose(memory))
    return ops.exp(ops.take_along_axis(dots, sampled, axis=1) / temperature)


def crd_remember(memory, numbers, rows, momentum=0.5):
    """The memory after a step: each image's row moves half way to its embedding, at length 1."""
    kept = momentum * ops.take(memory, numbers, axis=0) + (1 - momentum) * rows
    return ops.scatter_update(memory, ops.expand_dims(numbers, 1), _unit(kept))


# --- newer losses on logits -----------------------------------------------------------


def dkd(*, teacher, student, labels, alpha=1.0, beta=8.0, temperature=4.0):
    """``alpha KL(own class against the rest) + beta KL(among the other classes)``, times T^2.

    labels (batch,): class numbers; any other makes the loss nan. Finite for logits of any usual
    size: the own class is taken out, where the original moves it by 1000. Zhao et al. 2022,
    equation 7; mdistiller DKD.py.
    """
    temperature = kdlib._number("temperature", temperature)
    teacher, student = _floats(teacher, student, rank=2, equal=True)
    require(teacher.shape[-1] > 1, "teacher and student have one class. Nothing is left beside it.")
    labels = _numbers_of(teacher, labels)
    (own_t, rest_t), (own_s, rest_s) = (_split(z, labels, temperature) for z in (teacher, student))
    loss = alpha * kd(teacher=own_t, student=own_s, temperature=temperature)
    if teacher.shape[-1] > 2:  # of two classes, one is left: it has nothing to compare
        loss = loss + beta * kd(teacher=rest_t, student=rest_s, temperature=temperature)
    return loss


def _numbers_of(rows, labels):
    """One label for each row, as a column."""
    labels = ops.convert_to_tensor(labels)
    shape, batch = tuple(labels.shape), tuple(rows.shape[:1])
    require(kdlib._agree(shape[:1], batch) and shape[1:] in ((), (1,)), f"labels have shape "
            f"{shape} for {batch[0]} images. Give class numbers (batch,): of one-hot rows, "
            "np.argmax.")
    return ops.reshape(labels, (ops.shape(rows)[0], 1))  # in a graph the batch may be unknown


def _split(logits, given, temperature):
    """The own class against all others, as two logits; and the logits of the others."""
    classes = logits.shape[-1]
    labels = ops.clip(ops.cast(given, "int32"), 0, classes - 1)
    known = ops.cast(given, "float32") == ops.cast(labels, "float32")
    own = ops.where(known, ops.take_along_axis(logits, labels, axis=1), math.nan)
    rest = ops.take_along_axis(logits, (labels + ops.arange(1, classes)) % classes, axis=1)
    together = temperature * ops.logsumexp(rest / temperature, axis=1, keepdims=True)
    return ops.concatenate([own, together], axis=1), rest


def dist(*, teacher, student, beta=1.0, gamma=1.0, temperature=4.0):
    """``T^2 (beta (1 - r of rows) + gamma (1 - r of columns))``: r is Pearson's correlation of the
    soft labels, the mean over images and over classes. Huang et al. 2022, equations 8 to 10.
    """
    temperature = kdlib._number("temperature", temperature)
    teacher, student = _floats(teacher, student, rank=2, equal=True)
    soft = [ops.softmax(z / temperature, axis=-1) for z in (teacher, student)]
    rows, columns = (1 - ops.mean(_pearson(*soft, axis=axis)) for axis in (1, 0))
    return temperature**2 * (beta * rows + gamma * columns)


def _pearson(a, b, *, axis):
    a, b = (x - ops.mean(x, axis=axis, keepdims=True) for x in (a, b))
    return ops.sum(a * b, axis=axis, keepdims=True) / (_norm(a, axis) * _norm(b, axis) + 1e-8)


def standardised(*, teacher, student, temperature=2.0):
    """``kd((t - mean) / deviation, (s - mean) / deviation)``, both of each row of logits.

    The deviation is the unbiased one. Logits have to be finite. Sun et al. 2024, section 4.
    """
    teacher, student = _floats(teacher, student, rank=2, equal=True)
    centred = [z - ops.mean(z, axis=-1, keepdims=True) for z in (teacher, student)]
    root = math.sqrt(max(teacher.shape[-1] - 1, 1))
    teacher, student = (z / (_norm(z) / root + 1e-7) for z in centred)
    return kd(teacher=teacher, student=student, temperature=temperature)


def ttm(*, teacher, student, power=0.25):
    """``KL(p || q)``, p proportional to softmax(t)^power, q = softmax(s): T = 1 / power for the
    teacher alone. A copy of the teacher has a positive loss. Zheng and Yang 2024, section 3.
    """
    teacher, student = _floats(teacher, student, rank=2, equal=True)
    return ops.mean(_kl(_power(power) * teacher, student))


def wttm(*, teacher, student, power=0.25):
    """ttm with a weight for each image: ``sum(softmax(t)^power)``. Zheng and Yang 2024, section 4.
    """
    teacher, student = _floats(teacher, student, rank=2, equal=True)
    power = _power(power)
    weight = ops.sum(ops.exp(power * ops.log_softmax(teacher, axis=-1)), axis=-1)
    return ops.mean(weight * _kl(power * teacher, student))
