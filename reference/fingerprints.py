"""What a run is known by: digests of arrays, models and code; libraries; the machine."""

from __future__ import annotations

import ast
import dis
import functools
import hashlib
import inspect
import json
import os
import platform
import re
import textwrap
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from kdlib import require


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
        return digest(type(model).__qualname__, [list(w.shape) for w in model.weights])
    nodes = [*model._flatten_layers(), *getattr(model, "operations", ())]
    number = {node.name: k for k, node in enumerate(nodes)}

    def unnamed(value, named=False):
        """Names become numbers where they name a layer, and nowhere else."""
        if isinstance(value, dict):  # a dtype policy has a name alone, and keeps it
            return {k: unnamed(v, k == "name" and len(value) > 1) for k, v in value.items()}
        if isinstance(value, list):  # [name, node, tensor] is a wire
            wire = len(value) == 3 and isinstance(value[1], int)
            return [unnamed(part, wire and k == 0) for k, part in enumerate(value)]
        return number.get(value, value) if named else value

    return digest(unnamed(config), *_own_code(model))


def _own_code(model) -> list:
    """Of layers that are not Keras's: the digest of their methods, which no config tells."""
    kinds = {kind for layer in (model, *model._flatten_layers()) for kind in type(layer).__mro__}
    own = sorted((kind for kind in kinds if kind.__module__.split(".")[0] not in (
        "keras", "tensorflow", "builtins")), key=lambda kind: kind.__qualname__)
    return [code_digest(*filter(inspect.isfunction, vars(kind).values())) for kind in own]


def code_digest(*functions) -> str:
    """Of what functions do: their syntax trees, without comments and docstrings."""
    return digest([_tree(function) for function in functions])


def with_helpers(*code) -> list:
    """These functions and classes, and the functions of their own modules that they call.

    Those come by name: the order in which they are met depends on the version of Python.
    """
    found, queue = dict.fromkeys(code), [(part, part.__code__) for part in code
                                         if inspect.isfunction(part)]
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
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            node.body = node.body[1:]
    return text(_bare(tree))


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
    """What rounding depends on besides the libraries: the number of threads, the processor."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)", info.read_text() if info.exists() else "", re.M)
    cpu = found[1] if found else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    asked = os.environ.get("TF_NUM_INTRAOP_THREADS", "")  # TensorFlow obeys it, and does not say so
    threads = (tf.config.threading.get_intra_op_parallelism_threads()
               or (int(asked) if asked.isdecimal() else 0) or cores)
    return f"{threads} cores, {cpu}"
