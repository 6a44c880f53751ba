"""What a run is known by, and how files survive: fingerprints, whole writes, checked reads."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import inspect
import json
import os
import platform
import re
import shutil
import tempfile
import textwrap
import warnings
import zipfile
import zlib
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

UNREADABLE = (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error)


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


def model_digest(model) -> str:
    return digest(architecture(model), *model.get_weights())


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
    kinds = {type(layer) for layer in (model, *model._flatten_layers())}
    own = sorted((kind for kind in kinds if not kind.__module__.startswith("keras.")),
                 key=lambda kind: kind.__qualname__)
    return [code_digest(*filter(inspect.isfunction, vars(kind).values())) for kind in own]


def code_digest(*functions) -> str:
    """Of what functions do: their syntax trees, without comments and docstrings."""
    return digest([_tree(function) for function in functions])


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


def libraries() -> str:
    return f"tensorflow {tf.__version__}, keras {keras.__version__}, numpy {np.__version__}"


def machine() -> str:
    """What rounding depends on besides the libraries: the number of threads, the processor."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)", info.read_text() if info.exists() else "", re.M)
    cpu = found[1] if found else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = tf.config.threading.get_intra_op_parallelism_threads() or cores
    return f"{threads} cores, {cpu}"


@contextlib.contextmanager
def named(path: Path):
    """Let an error of the operating system say which setting and folder it is about."""
    try:
        yield
    except OSError as error:
        value = os.environ.get("KD_RUNS_DIR")
        raise type(error)(error.errno, f"{error.strerror or error}: {path}. Free some space, or "
                          f"choose another folder (KD_RUNS_DIR, for runs, is {value!r})") from error


def write_whole(path: Path, write) -> None:
    """Write a file aside, flush it, rename it: a kill or a full disk leaves the old one."""
    with named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # A folder of its own: no other process has it, and nobody who lists files reads it.
        folder = tempfile.mkdtemp(prefix="aside-", dir=path.parent)
        try:
            aside = Path(folder) / path.name
            write(aside)
            with open(aside, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def write_array(path: Path, array: np.ndarray) -> None:
    """A .npy file with its SHA-256 behind it, which NumPy does not read."""
    def write(aside):
        with open(aside, "wb+") as file:
            np.save(file, array)
            file.seek(0)
            file.write(hashlib.file_digest(file, "sha256").digest())  # it has read to the end

    write_whole(path, write)


def read_array(path: Path) -> np.ndarray | None:
    """The array, left on the disk; or None with a warning where a bit of it changed."""
    if path.stat().st_size > 32:
        content = np.memmap(path, "uint8", "r")
        if hashlib.sha256(content[:-32]).digest() == content[-32:].tobytes():
            return np.load(path, mmap_mode="r", allow_pickle=False)
    warnings.warn(f"{path.name} in {path.parent.name} is damaged: it is made again.", stacklevel=2)


def write_notes(path: Path, notes: dict) -> None:
    sealed = text(notes | {"seal": digest(json.loads(text(notes)))})
    write_whole(path, lambda aside: aside.write_text(sealed))


def read_notes(path: Path) -> dict:
    """Notes as they were written. Raises ValueError if somebody changed them."""
    notes = json.loads(path.read_text())
    if notes.pop("seal") != digest(notes):
        raise ValueError("its notes were changed after they were written")
    return notes
