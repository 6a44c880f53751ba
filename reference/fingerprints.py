"""What a run is known by: data, models, answers, code; libraries; the machine."""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import json
import os
import platform
import re
from pathlib import Path

import keras
import numpy as np
from kdlib import require

from reference.digests import (
    attributes, carrier, code_digest, digest, is_own, methods, parts_of, reached, text, told,
    with_helpers)

with contextlib.suppress(ModuleNotFoundError):  # only what tells libraries and threads needs it
    import tensorflow as tf

SHAPES = "input_shape", "batch_shape"


def data_digest(dataset) -> str:
    """Of all pixels and labels as they are now."""
    return digest(*(getattr(dataset, f"{a}_{part}") for a in "xy"
                    for part in ("train", "val", "test")))


def model_digest(model) -> str | None:
    return None if model is None else digest(architecture(model), *model.get_weights())


def architecture(model) -> str:
    """Of layers, settings and wiring, whatever numbers Keras put behind the names of layers; and
    of code that is not Keras's."""
    layers = model._flatten_layers()
    nodes = [*layers, *(node for layer in layers for node in getattr(layer, "operations", ()))]
    number = {node.name: k for k, node in enumerate(nodes)}
    config = _config(model, number) or [  # a subclassed model; runs.py compares its answers as well
        type(model).__qualname__, [list(w.shape) for w in model.weights]]
    own = [_own_code(layer) for layer in layers]
    if any(own):
        config = [config, own, [None if isinstance(layer, keras.Model) else _config(layer, number)
                                for layer in layers]]
    return digest(config)


def _config(layer, number: dict):
    """Its settings, with numbers in place of layers' names; None if Keras has no way to tell."""
    with contextlib.suppress(NotImplementedError, TypeError, ValueError):
        return _numbered(json.loads(text(layer.get_config())), number)


def _numbered(value, number: dict, named: bool = False):
    if isinstance(value, dict):
        if value.get("class_name") == "__lambda__":  # its code comes apart: the config holds the
            return None                              # number of its line, too
        return {key: [None, *part[1:]] if key.endswith(SHAPES) and isinstance(part, list) else
                _numbered(part, number, key == "name")  # the first batch had any size
                for key, part in value.items()}
    if isinstance(value, list):  # [name, node, tensor] is a wire
        wire = len(value) == 3 and isinstance(value[1], int)
        return [_numbered(part, number, wire and k == 0) for k, part in enumerate(value)]
    return number.get(value, value) if named else value


def odd_variables(model) -> list:
    """How a model is trained, as far as no config tells: the settings of single variables. They are
    not saved with it, so they don't belong to what a teacher is known by."""
    return [[k, *each] for k, layer in enumerate(model._flatten_layers())
            for each in _odd_variables(layer)]


def _odd_variables(layer) -> list:
    found, learned = [], len(layer._trainable_variables)
    for k, each in enumerate([*layer._trainable_variables, *layer._non_trainable_variables]):
        frozen = layer.trainable and each.trainable != (k < learned)
        rules = {name: getattr(each, name) for name in ("regularizer", "constraint")}
        if frozen or any(rule is not getattr(layer, f"{each.name}_{name}", None)
                         for name, rule in rules.items()):
            found.append([k, each.trainable, [_rule(rule) for rule in rules.values()]])
    return found


def _rule(rule) -> list | None:
    """What a regularizer or constraint is: its settings, and the code of your own in it."""
    if rule is None:
        return None
    held = getattr(rule, "__dict__", {})
    used = dict.fromkeys(map(carrier, parts_of(rule, *held.values())))
    return [told({"rule": rule, **held}), code_digest(*with_helpers(*filter(is_own, used)))]


def _own_code(layer) -> list:
    """What its config may not tell: code that is not Keras's, of the layer and of what it holds (an
    activation, a regularizer, a Lambda's function), with helpers and the values that they read;
    attributes of its class, and those that this code sets or reads; what it binds by partial."""
    set_by_compile = _set_by_compile() if isinstance(layer, keras.Model) else ()
    held = {name: value for name, value in vars(layer).items() if name not in set_by_compile}
    parts = parts_of(*held.values())
    types = dict.fromkeys(map(type, (layer, *parts)))
    kinds = dict.fromkeys(kind for each in types for kind in each.__mro__ if is_own(kind))
    classes = [*filter(inspect.isclass, parts), *kinds]
    functions = dict.fromkeys(filter(is_own, (
        *filter(inspect.isfunction, parts), *(each for kind in classes for each in methods(kind)))))
    bound = [part for part in parts if isinstance(part, functools.partial)]
    if not functions and not bound:
        return []
    code = with_helpers(*functions)
    acting = attributes("STORE_ATTR", code) | attributes("LOAD_ATTR", code) - _of_any_layer()
    return [code_digest(*code), [told(vars(kind)) for kind in kinds],
            told({name: value for name, value in held.items() if name in acting}),
            told(dict(enumerate(bound)))]


@functools.cache
def _of_any_layer() -> set:
    """What Keras keeps in each layer, such as whether it is built."""
    return {*vars(keras.layers.Layer()), *vars(keras.Sequential())}


@functools.cache
def _set_by_compile() -> set:
    """How a model is compiled does not change what it is."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    before = vars(model).copy()
    model.compile("sgd", "mse", metrics=["mse"])
    return {name for name, value in vars(model).items()
            if before.get(name, dis) is not value or name.startswith("_self_")}  # TensorFlow's list


def alike(model, answers, others) -> bool:
    """Whether two arrays of a model's answers differ by rounding alone: by a thousandth, where it
    computes in half precision by a fiftieth."""
    half = any("16" in layer.compute_dtype for layer in model._flatten_layers())
    answers, others = (np.asarray(each).astype("float64") for each in (answers, others))
    if answers.shape != others.shape:
        return False
    with np.errstate(invalid="ignore"):  # excluded classes: -inf in both
        gap = np.where(answers == others, 0, answers - others)
    size = np.linalg.norm(answers[np.isfinite(answers)])
    return np.linalg.norm(gap) <= (2e-2 if half else 1e-3) * size


def answers_digest(answers) -> str | None:
    """Of arrays their content. Of a function what it does: its code, its helpers, and what
    functools.partial binds.

    Raises TypeError, ValueError for a function of which that does not tell what it does.
    """
    if answers is None:
        return None
    if not callable(answers):
        return digest(*map(np.asarray, answers))
    maker = getattr(answers, "func", answers)
    require(inspect.isfunction(maker) and maker.__name__ != "<lambda>", f"answers are {answers!r}. "
            "Give arrays, or a function that has a name.", TypeError)
    code = with_helpers(maker)
    for each in filter(inspect.isfunction, code):
        loose = [name for name, value in reached(each).items()
                 if each.__module__ == maker.__module__ and not _is_told(name, value, each)]
        require(not loose, f"answers are made by {each.__name__}, which reads {', '.join(loose)}: "
                "its code does not tell the value. Write it into the function, or bind it: "
                "functools.partial.")
    bound = getattr(answers, "args", ()), getattr(answers, "keywords", {})
    try:
        return digest(json.dumps(bound, sort_keys=True), code_digest(*code))
    except TypeError as error:
        raise TypeError(f"answers bind {bound}: {error}. Bind numbers and words.") from None


def _is_told(name: str, value, function) -> bool:
    """Whether what a function reads is covered: a module and what is in it, or a function or class
    that is no closure of its own."""
    if name in function.__code__.co_freevars:
        return False
    own = getattr(value, "__module__", None) == function.__module__
    return "." in name or inspect.isfunction(value) or inspect.ismodule(value) or (
        not own and (inspect.isroutine(value) or inspect.isclass(value)))


def identity_of(trainer) -> dict:
    """A trainer's settings, and the digest of the code that acts on the numbers."""
    settings, code = trainer.identity()
    return {**settings, "code": code_digest(*code)}


def libraries() -> str:
    return f"tensorflow {tf.__version__}, keras {keras.__version__}, numpy {np.__version__}"


def machine() -> str:
    """What rounding depends on besides the libraries: threads, processor, kernels asked for."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)", info.read_text() if info.exists() else "", re.M)
    cpu = found[1] if found else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    asked = os.environ.get("TF_NUM_INTRAOP_THREADS", "")  # TensorFlow obeys it, and does not say so
    threads = (tf.config.threading.get_intra_op_parallelism_threads()
               or (int(asked) if asked.isdecimal() else 0) or cores)
    kernels = ("TF_ENABLE_ONEDNN_OPTS", "ONEDNN_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE")
    chosen = [f"{name}={os.environ[name]}" for name in kernels
              if os.environ.get(name, "1") not in ("1", "")]
    return ", ".join([f"{threads} cores, {cpu}", *chosen])
