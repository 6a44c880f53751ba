"""Digests of values and of code: equal content gives an equal digest, in each process."""

from __future__ import annotations

import ast
import contextlib
import dis
import functools
import hashlib
import inspect
import json
import re
import sys
import sysconfig
import textwrap
import tokenize
import warnings
from pathlib import Path

import numpy as np

INSTALLED = {"site-packages", "dist-packages"}
PLAIN = bool, int, float, complex, str, bytes, type(None)


def text(value) -> str:
    """JSON with sorted keys: equal values give equal text, NumPy's numbers like Python's."""
    return json.dumps(value, sort_keys=True, default=lambda each: (
        each.item() if isinstance(each, np.number | np.bool_) else
        re.sub(" at 0x[0-9a-f]+", "", str(each))))  # its address is another in each process


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


def code_digest(*code) -> str:
    """Of what functions and classes do: their syntax trees, without comments and docstrings, and
    the values that they read by name."""
    found = [methods(part) for part in code]
    read = [told(reached(method)) for each in found for method in each]
    trees = [_tree(part, *(method.__code__ for method in each))
             for part, each in zip(code, found, strict=True)]
    return digest(trees, *filter(None, read))


def with_helpers(*code) -> list:
    """These functions and classes, and those that they call, libraries aside.

    Those come by name: the order in which they are met depends on the version of Python.
    """
    found, queue = dict.fromkeys(code), [*code]
    while queue:
        for method in methods(queue.pop()):
            for part in map(carrier, parts_of(*reached(method).values())):
                if part not in found and is_own(part):
                    found[part] = None
                    queue.append(part)
    return [*code, *sorted((part for part in found if part not in code), key=by_name)]


def carrier(part):
    """What holds the code of a part: a function or class itself, or else its type."""
    return part if inspect.isfunction(part) or inspect.isclass(part) else type(part)


def by_name(part) -> tuple:
    return part.__qualname__, part.__module__ or ""


def is_own(part) -> bool:
    """Whether a function, class or module is in a file of yours, or in a notebook."""
    name = part.__name__ if inspect.ismodule(part) else part.__module__
    path = (part.__code__.co_filename if inspect.isfunction(part) else
            getattr(sys.modules.get(name), "__file__", None) or "")
    return not (name in sys.builtin_module_names or _is_of_a_library(path))


@functools.cache
def _is_of_a_library(path: str) -> bool:
    return (path.startswith((sysconfig.get_path("stdlib"), "<frozen"))
            or not INSTALLED.isdisjoint(Path(path).parts))


def methods(part) -> list:
    """The function itself, or those of a class, and those inside what decorates them."""
    values = vars(part).values() if inspect.isclass(part) else [part]
    return [*filter(inspect.isfunction, parts_of(*values))]


def parts_of(*values) -> list:
    """Values, and what is inside them: in lists, in functools.partial, under a decorator."""
    found, queue = {}, [*values]
    while queue:
        value = queue.pop(0)
        if id(value) not in found and not isinstance(value, PLAIN):
            found[id(value)] = value
            queue += _inside(value)
    return [*found.values()]


def _inside(value) -> list:
    if isinstance(value, (list, tuple)):
        return [*value]
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=lambda each: getattr(each, "__qualname__", str(type(each))))
    if isinstance(value, dict):
        return [*value.values()]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, (property, functools.cached_property)):
        return [value.fget if isinstance(value, property) else value.func]
    if isinstance(value, (classmethod, staticmethod)) or inspect.ismethod(value):
        return [value.__func__]
    wrapped = inspect.getattr_static(value, "__wrapped__", None)
    return [] if wrapped is None else [wrapped]


def told(values: dict, depth: int = 6) -> dict:
    """The values by name: numbers, words, arrays as they are; of other things their kind."""
    return {str(name): _told(value, depth) for name, value in values.items()
            if not (str(name).startswith("__") and str(name).endswith("__"))}


def _told(value, depth: int):
    kind = type(value)
    if hasattr(kind, "__array__") and not hasattr(kind, "trainable"):  # also a tensor, no weight
        array = np.asarray(value)
        return digest(array) if array.dtype != object else "object"
    if isinstance(value, PLAIN):
        return value if isinstance(value, (int, float, str)) else repr(value)
    if depth and isinstance(value, (list, tuple)):
        return [_told(each, depth - 1) for each in value]
    if depth and isinstance(value, (set, frozenset)):
        return sorted(text(_told(each, depth - 1)) for each in value)
    if depth and isinstance(value, functools.partial):
        return [_told([value.func, *value.args], depth), told(value.keywords, depth - 1)]
    if depth and isinstance(value, dict):
        return told(value, depth - 1)
    if depth and all(each is object or is_own(each) for each in kind.__mro__):
        return [kind.__qualname__, told(getattr(value, "__dict__", {}), depth - 1)]
    return kind.__qualname__


def reached(function) -> dict:
    """By name: the globals that a function reads, what it may take from modules of your own, its
    closure and its defaults."""
    found, code = {}, function.__code__
    for block in _blocks(code):
        for step in dis.get_instructions(block):
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                found[step.argval] = function.__globals__.get(step.argval, dis)
            elif step.opname == "IMPORT_NAME" and step.argval in sys.modules:
                found[step.argval] = sys.modules[step.argval]
        queue = [*filter(inspect.ismodule, found.values())]
        for module in filter(is_own, queue):  # which grows by modules inside
            taken = {f"{module.__name__}.{key}": vars(module)[key] for key in block.co_names
                     if key in vars(module) and f"{module.__name__}.{key}" not in found}
            queue += filter(inspect.ismodule, taken.values())
            found |= taken
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # still empty
            found[name] = cell.cell_contents
    found.pop("__class__", None)  # that of super()
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return found | ({"a default": defaults} if defaults else {})


def attributes(operation: str, code) -> set:
    """The attributes that functions and classes set (STORE_ATTR) or read (LOAD_ATTR), by name."""
    return {step.argval for part in code for method in methods(part)
            for block in _blocks(method.__code__) for step in dis.get_instructions(block)
            if step.opname == operation}


def _blocks(code) -> list:
    """The code of a function, and of those inside it."""
    return [code, *(each for part in code.co_consts if inspect.iscode(part)
                    for each in _blocks(part))]


@functools.cache  # by code: a file that is edited later does not change what runs
def _tree(part, *code) -> str:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(part)))
        path = inspect.getsourcefile(part)
        lambdas = any(each.co_name == "<lambda>" for each in code)  # its source is the whole line
    except (OSError, TypeError, SyntaxError, tokenize.TokenError):  # made by exec, for one
        lambdas = True
    if not lambdas and (edited := _is_edited(path, code)):
        warnings.warn(f"{path} was edited after its import, so {part.__qualname__} is still the "
                      "old one. Start the kernel again to run the new one.", stacklevel=2)
    if lambdas or edited:
        return text([*map(_bytecode, code)])
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            node.body = node.body[1:]
    return text(_bare(tree))


def _is_edited(path: str, code) -> bool:
    """Whether a file says something else by now than what was imported from it."""
    code = [each for each in code if each.co_filename == path]
    if not code or not Path(path).is_file():  # a cell of a notebook
        return False
    there = _lines_of(path, Path(path).stat().st_mtime_ns)
    return not all([each.co_firstlineno, _bytecode(each)] in there for each in code)


@functools.cache
def _lines_of(path: str, changed: int) -> list:
    """The first line of each function in a file, as it is now, and its bytecode."""
    try:
        whole = compile(Path(path).read_bytes(), path, "exec", dont_inherit=True)
    except (OSError, SyntaxError, ValueError):
        return []
    return [[each.co_firstlineno, _bytecode(each)] for each in _blocks(whole)]


def _bytecode(code) -> list:
    constants = [_bytecode(each) if inspect.iscode(each) else
                 sorted(map(repr, each)) if isinstance(each, frozenset) else repr(each)
                 for each in code.co_consts]
    return [code.co_name, code.co_code.hex(), list(code.co_names), constants]


def _bare(node):
    """A syntax tree as lists. Empty fields are left out: each version of Python has others."""
    if isinstance(node, ast.AST):
        fields = [(name, _bare(value)) for name, value in ast.iter_fields(node)]
        return [type(node).__name__, *(field for field in fields if field[1] not in ("None", []))]
    return [_bare(each) for each in node] if isinstance(node, list) else repr(node)
