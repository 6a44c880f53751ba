"""How each entry of methods.npz calls reference/methods.py; runs on every backend."""

import functools
from pathlib import Path

from keras import ops

try:
    from reference import methods
except ImportError:  # alone in a folder, on a backend without TensorFlow
    import methods

FILE = Path(__file__).with_name("methods.npz")  # values of the authors' own code


def features(file, name, role):
    """``NAME/role0``, ``NAME/role1``, ... as a list."""
    return [file[f"{name}/{role}{k}"] for k in range(9) if f"{name}/{role}{k}" in file]


def one(loss, **settings):
    return lambda teacher, student: loss(teacher=teacher[0], student=student[0], **settings)


def each(loss):
    return lambda teacher, student: [
        loss(teacher=t, student=s) for t, s in zip(teacher, student, strict=True)]


def together(loss):
    return lambda teacher, student: loss(teacher=teacher, student=student)


def embedded(file, rows, role):
    kernel, bias = (ops.convert_to_tensor(file[f"CRD/{role}_{a}"]) for a in ("kernel", "bias"))
    rows = ops.matmul(rows, kernel) + bias  # PyTorch adds no NumPy array to a gradient
    return rows / ops.sqrt(ops.sum(rows * rows, axis=1, keepdims=True))


def contrast(file, teacher, student):
    return methods.crd(
        teacher=embedded(file, teacher[0], "teacher"),
        student=embedded(file, student[0], "student"),
        teacher_memory=file["CRD/memory_teacher"], student_memory=file["CRD/memory_student"],
        sampled=file["CRD/sampled"], normalisers=file["CRD/normalisers"])


def cases(file):
    """Each entry's call: function(teacher, student) of lists, to a scalar or a list of stages."""
    labels = file["labels"]
    table = {
        "AT": each(methods.at), "NST": each(methods.nst), "SP": one(methods.sp),
        "CC": one(methods.cc), "RKD": one(methods.rkd), "PKT": one(methods.pkt),
        "FitNet": one(methods.fitnet), "FT": one(methods.ft), "AB": together(methods.ab),
        "FSP": together(methods.fsp), "CRD": functools.partial(contrast, file),
        "VID": one(methods.vid, kernels=[file[f"VID/kernel{k}"] for k in range(3)],
                   log_scale=file["VID/log_scale"]),
        "KD-standardised-T2": one(methods.standardised, temperature=2.0),
        "TTM-power0.25": one(methods.ttm, power=0.25),
        "WTTM-power0.25": one(methods.wttm, power=0.25)}
    for temperature in (1, 4):
        table[f"KD-T{temperature}"] = one(methods.kd, temperature=temperature)
        table[f"DIST-T{temperature}"] = one(methods.dist, temperature=temperature)
    for beta in (2, 8):
        table[f"DKD-beta{beta}"] = one(methods.dkd, labels=labels, beta=beta, temperature=4.0)
    return table
