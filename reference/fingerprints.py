"""What a run is known by: digests of arrays, models and code; libraries; the machine."""

from __future__ import annotations

import ast
import contextlib
import dis
import functools
import hashlib
import inspect
import json
import os
import platform
import re
import sys
import textwrap
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from kdlib import require


LIBRARIES = {"keras", "tensorflow", "numpy", *sys.stdlib_module_names, *sys.builtin_module_names}
SHAPES = "input_shape", "batch_shape"


def text(value) -> str:
    """JSON with sorted keys: equal values give equal text."""
    return json.dumps(value, sort_keys=True, default=str)


def digest(*parts) -> str:
    """SHA-256 of arrays (dtype, shape, content) and of anything that has a text."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            found.update(f"{part.dtype}{part.shape}".encode())
            found.update(np.ascontiguousarray(part).reshape(-1).view("uint8"))  # no copy
        else:
            found.update(text(part).encode())
    return found.hexdigest()


def data_digest(dataset) -> str:
    """Of all pixels and labels as they are now."""
    return digest(*(getattr(dataset, f"{a}_{part}") for a in "xy"
                    for part in ("train", "val", "test")))


def model_digest(model) -> str | None:
    return None if model is None else digest(architecture(model), *model.get_weights())


def architecture(model) -> str:
    """Of layers, settings and wiring, whatever numbers Keras put behind the names of layers."""
    try:
        config = json.loads(text(model.get_config()))
    except NotImplementedError:  # a subclassed model; runs.py compares its answers as well
        return digest(type(model).__qualname__, [list(w.shape) for w in model.weights],
                      *_own_code(model))
    nodes = [*model._flatten_layers(), *getattr(model, "operations", ())]
    number = {node.name: k for k, node in enumerate(nodes)}

    def unnamed(value, named=False):
        """Names become numbers where they name a layer. The first batch had any size."""
        if isinstance(value, dict):  # a dtype policy has a name alone, and keeps it
            return {k: [None, *v[1:]] if k.endswith(SHAPES) and isinstance(v, list) else
                    unnamed(v, k == "name" and len(value) > 1) for k, v in value.items()}
        if isinstance(value, list):  # [name, node, tensor] is a wire
            wire = len(value) == 3 and isinstance(value[1], int)
            return [unnamed(part, wire and k == 0) for k, part in enumerate(value)]
        return number.get(value, value) if named else value

    return digest(unnamed(config), *_own_code(model))


def _own_code(model) -> list:
    """What the config does not tell, if a model holds code that is not Keras's: of its layers, and
    of what a layer holds (an activation, a Lambda's function, a regularizer), the code with its
    helpers, closures, defaults and class attributes; and the settings of layers inside."""
    layers = [model, *model._flatten_layers(include_self=False)]
    held = [part for layer in layers for name, whole in vars(layer).items()
            for part in (whole if isinstance(whole, (list, tuple)) else [whole])
            if name not in ("loss", "optimizer")]  # how it was compiled does not change a model
    kinds = {kind for part in (*layers, *held) if _is_own(type(part))
             and not isinstance(part, (keras.Loss, keras.Optimizer, keras.Metric))
             for kind in type(part).__mro__ if _is_own(kind)}
    parts = [*held, *(part for kind in kinds for part in vars(kind).values())]
    parts = [inspect.unwrap(getattr(part, "fget", part)) for part in parts]
    parts = [getattr(part, "__func__", part) for part in parts]
    own = {part for part in filter(inspect.isfunction, parts)
           if _is_own(part) and part.__name__ != "<lambda>"}  # a config holds all of a lambda
    own = with_helpers(*sorted(own, key=lambda part: (
        part.__qualname__, part.__module__ or "", part.__code__.co_firstlineno)))
    attributes = sorted(text(_plain(vars(kind))) for kind in kinds)
    inside = [*map(_settings, layers[1:])]
    return [code_digest(*own), [*map(_bound, own)], attributes, inside] if own else []


def _is_own(part) -> bool:
    return (part.__module__ or "").split(".")[0] not in LIBRARIES


def _settings(layer):
    """A layer's config without names; None for a model, whose layers come one by one."""
    with contextlib.suppress(NotImplementedError):
        return None if isinstance(layer, keras.Model) else _unnamed(layer.get_config())


def _unnamed(config):
    if isinstance(config, dict):
        return {key: _unnamed(value) for key, value in config.items() if key != "name"}
    return [*map(_unnamed, config)] if isinstance(config, (list, tuple)) else config


def _bound(function) -> dict:
    """The closure and the defaults of a function."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    found = {**(function.__kwdefaults__ or {}), **dict(enumerate(function.__defaults__ or ()))}
    for name, cell in cells.items():
        with contextlib.suppress(ValueError):  # still empty
            found[name] = cell.cell_contents
    return _plain({str(name): value for name, value in found.items()})


def _plain(values: dict) -> dict:
    """Those of the values that tell what they are: numbers, words, arrays, lists and sets."""
    found = {}
    for name, value in values.items():
        with contextlib.suppress(TypeError, ValueError):  # an object, or one inside
            if isinstance(value, np.ndarray):
                value = digest(value)
            elif isinstance(value, (set, frozenset)):
                value = sorted(map(json.dumps, value))
            if name[:2] != "__":
                found[name] = json.loads(json.dumps(value, sort_keys=True))
    return found


def code_digest(*functions) -> str:
    """Of what functions and classes do: their syntax trees, without comments and docstrings, and
    the numbers and words that they read by a global name."""
    read = [_plain({name: method.__globals__.get(name, dis)
                    for name in _read_names(method.__code__)})
            for function in functions for method in _methods(function)]
    return digest([_tree(function) for function in functions], *filter(None, read))


def _methods(part) -> list:
    """The function itself, or those of a class."""
    return [each for each in (part, *vars(part).values()) if inspect.isfunction(each)]


def alike(model, answers, others) -> bool:
    """Whether two arrays of a model's logits differ by rounding alone: by a thousandth, where it
    computes in half precision by a fiftieth."""
    half = any("16" in layer.compute_dtype for layer in model._flatten_layers())
    answers, others = np.asarray(answers), np.asarray(others)
    with np.errstate(invalid="ignore"):  # excluded classes: -inf in both
        gap = np.where(answers == others, 0, answers - others)
    size = np.linalg.norm(answers[np.isfinite(answers)])
    return np.linalg.norm(gap) <= (2e-2 if half else 1e-3) * size


def with_helpers(*code) -> list:
    """These functions and classes, and the functions of their own modules that they call.

    Those come by name: the order in which they are met depends on the version of Python.
    """
    found = dict.fromkeys(code)
    queue = [(each, each.__code__) for part in code for each in _methods(part)]
    while queue:
        caller, block = queue.pop()
        queue += [(caller, each) for each in block.co_consts if inspect.iscode(each)]
        for part in map(caller.__globals__.get, block.co_names):
            own = inspect.isfunction(part) and part.__module__ == caller.__module__
            if own and part not in found:
                found[part] = None
                queue.append((part, part.__code__))
    return [*code, *sorted(list(found)[len(code):], key=lambda part: part.__qualname__)]


def answers_digest(answers) -> str | None:
    """Of arrays their content. Of a function what it does: its code, its helpers, and what
    functools.partial binds. Other modules count as libraries.

    Raises TypeError, ValueError for a function of which that does not tell what it does.
    """
    if answers is None:
        return None
    if not callable(answers):
        return digest(*answers)
    plain = getattr(answers, "func", answers)
    require(inspect.isfunction(plain) and plain.__name__ != "<lambda>", f"answers are {answers!r}. "
            "Give arrays, or a function that has a name.", TypeError)
    functions = with_helpers(plain)
    for each in functions:
        known = {key: each.__globals__.get(key, dis) for key in _read_names(each.__code__)}
        loose = [*each.__code__.co_freevars, *(key for key, value in known.items()
                                               if not _is_told(value, each.__module__))]
        require(not loose and not each.__defaults__ and not each.__kwdefaults__, "answers are made "
                f"by {each.__name__}, which reads {', '.join(loose) or 'a default'}: its code does "
                "not tell the value. Write it into the function, or bind it: functools.partial.")
    bound = getattr(answers, "args", ()), getattr(answers, "keywords", {})
    try:
        return digest(json.dumps(bound), code_digest(*functions))
    except TypeError as error:
        raise TypeError(f"answers bind {bound}: {error}. Bind numbers and words.") from None


def _read_names(block) -> set[str]:
    """The global names that a function reads, functions inside it included."""
    inside = (_read_names(each) for each in block.co_consts if inspect.iscode(each))
    return {step.argval for step in dis.get_instructions(block)
            if step.opname == "LOAD_GLOBAL"}.union(*inside)


def _is_told(value, module: str) -> bool:
    """Whether a global is covered: a function, a module, or what another module defines."""
    own = getattr(value, "__module__", None) == module
    return inspect.isfunction(value) or inspect.ismodule(value) or (
        not own and (inspect.isroutine(value) or inspect.isclass(value)))


@functools.cache  # of the code that was imported: a file edited later does not change it
def _tree(function) -> str:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # made by exec; or a lambda, cut out of its line
        return text([_bytecode(method.__code__) for method in _methods(function)])
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            node.body = node.body[1:]
    return text(_bare(tree))


def _bytecode(block) -> list:
    constants = [_bytecode(each) if inspect.iscode(each) else
                 sorted(map(repr, each)) if isinstance(each, frozenset) else repr(each)
                 for each in block.co_consts]
    return [block.co_code.hex(), block.co_names, constants]


def _bare(node):
    """A syntax tree as lists. Empty fields are left out: each version of Python has others."""
    if isinstance(node, ast.AST):
        fields = [(name, _bare(value)) for name, value in ast.iter_fields(node)]
        return [type(node).__name__, *(field for field in fields if field[1] not in ("None", []))]
    return [_bare(each) for each in node] if isinstance(node, list) else repr(node)


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
