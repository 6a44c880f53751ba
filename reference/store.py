"""What a run is known by, and how it survives: fingerprints, whole writes, exact resume."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import inspect
import io
import json
import math
import os
import platform
import textwrap
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

UNREADABLE = (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error)

# --- fingerprints ---------------------------------------------------------------------


def text(value) -> str:
    """JSON with sorted keys: equal values give equal text."""
    return json.dumps(value, sort_keys=True, default=str)


def digest(*parts) -> str:
    """SHA-256 of arrays (dtype, shape, content) and of anything that has a text."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            found.update(f"{part.dtype}{part.shape}".encode())
            found.update(np.ascontiguousarray(part).tobytes())
        else:
            found.update(text(part).encode())
    return found.hexdigest()


def model_digest(model) -> str:
    """Of layers, settings, wiring and weights."""
    return digest(architecture(model), *model.get_weights())


def architecture(model) -> str:
    """Of layers, settings and wiring, whatever numbers Keras put behind the names of layers."""
    try:
        config = json.loads(text(model.get_config()))
    except NotImplementedError:  # a subclassed model; runs.py compares its answers as well
        return digest(type(model).__qualname__, [list(w.shape) for w in model.weights])
    return digest(_unnamed(config, {}))


def _unnamed(value, numbers: dict):
    """Replace the names of layers by numbers where they name a layer, and nowhere else."""
    def number(name):
        return numbers.setdefault(name, len(numbers))

    if isinstance(value, list):
        return [_unnamed(part, numbers) for part in value]
    if not isinstance(value, dict):
        return value
    value = dict(value)
    if isinstance(value.get("layers"), list) or "module" in value and (
            "layers" in str(value["module"]) or "inbound_nodes" in value):
        for holder in (value, value.get("config")):
            if isinstance(holder, dict) and isinstance(holder.get("name"), str):
                holder["name"] = number(holder["name"])
    for key in ("keras_history", "input_layers", "output_layers"):
        if isinstance(value.get(key), list):
            value[key] = _numbered(value[key], number)
    return {key: _unnamed(part, numbers) for key, part in value.items()}


def _numbered(entry, number):
    """[name, node, tensor], or a list of such."""
    if entry and isinstance(entry[0], str):
        return [number(entry[0]), *entry[1:]]
    return [_numbered(part, number) if isinstance(part, list) else part for part in entry]


def code_digest(*functions) -> str:
    """Of what functions do: their syntax trees, without comments and docstrings."""
    trees = []
    for function in functions:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
                node.body = node.body[1:]
        trees.append(ast.dump(tree))
    return digest(trees)


def libraries() -> str:
    return f"tensorflow {tf.__version__}, keras {keras.__version__}, numpy {np.__version__}"


def machine() -> str:
    """What rounding depends on besides the libraries: the number of threads, the processor."""
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), cpu)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = tf.config.threading.get_intra_op_parallelism_threads() or cores
    return f"{threads} cores, {cpu}"


# --- whole writes ---------------------------------------------------------------------


@contextlib.contextmanager
def named(path: Path):
    """Let an error of the operating system say which setting and folder it is about."""
    try:
        yield
    except OSError as error:
        value = os.environ.get("KD_RUNS_DIR")
        raise type(error)(error.errno, f"{error.strerror or error}: cannot write {path}. KD_RUNS_DIR "
                          f"is {value!r} (default: runs). Free some space there, or set it to a "
                          "folder that you may write to") from error


def write_whole(path: Path, write) -> None:
    """Write a file aside, flush it, rename it: a kill or a full disk leaves the old one."""
    aside = path.with_name(f"aside-{os.getpid()}-{path.name}")
    with named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(aside)
            with open(aside, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)


def write_array(path: Path, array: np.ndarray) -> None:
    """A .npy file with its SHA-256 behind it, which NumPy does not read."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    content = buffer.getvalue()
    write_whole(path, lambda aside: aside.write_bytes(content + hashlib.sha256(content).digest()))


def read_array(path: Path) -> np.ndarray | None:
    """The array, or None with a warning where a bit of it changed."""
    content = path.read_bytes()
    if hashlib.sha256(content[:-32]).digest() == content[-32:]:
        return np.load(io.BytesIO(content), allow_pickle=False)
    warnings.warn(f"{path.name} in {path.parent.name} is damaged: it is made again.", stacklevel=2)


def write_notes(path: Path, notes: dict) -> None:
    notes = json.loads(text(notes))
    write_whole(path, lambda aside: aside.write_text(text({**notes, "seal": digest(notes)})))


def read_notes(path: Path) -> dict:
    """Notes as they were written. Raises ValueError if somebody changed them."""
    notes = json.loads(path.read_text())
    if notes.pop("seal") != digest(notes):
        raise ValueError("its notes were changed after they were written")
    return notes


# --- exact resume ---------------------------------------------------------------------


class Keeper(keras.callbacks.Callback):
    """Keeps the whole state of a training after each epoch, in one file.

    Keras's BackupAndRestore writes weights and epoch into two files, one after the other: a
    kill between them repeats or skips an epoch. Here a state is one file with checksums, and
    the last two are kept, in turn.
    """

    def __init__(self, folder: Path, spec: dict):
        super().__init__()
        self.folder, self.epoch, self.history = folder, 0, {}
        self.meta = {"spec": json.loads(text(spec)), "libraries": libraries()}
        self.machines = [machine()]

    def restore(self, trainer) -> None:
        trainer.optimizer.build(trainer.trainable_variables)
        states = [state for path in sorted(self.folder.glob("state-?.npz"))
                  if (state := self._read(path))]
        if not states:
            return
        meta, values = max(states, key=lambda state: state[0]["epoch"])
        for key, mine in self.meta.items():
            if meta[key] != mine:
                raise RuntimeError(f"the run {self.folder.name} was begun with other {key} ("
                                   f"{meta[key]}, now {mine}). Delete its folder to begin anew, or "
                                   "go back to those.")
        if meta["machines"][-1] != self.machines[0]:
            warnings.warn(f"the run {self.folder.name} was begun on {meta['machines'][-1]} and goes "
                          f"on with {self.machines[0]}: rounding differs, so the weights will not "
                          "be those of an uninterrupted run.", stacklevel=4)
            self.machines = [*meta["machines"], *self.machines]
        else:
            self.machines = meta["machines"]
        for variable, value in zip(_state_of(trainer), values, strict=True):
            variable.assign(value)
        self.epoch, self.history = meta["epoch"], meta["history"]

    def _read(self, path: Path):
        try:
            with np.load(path, allow_pickle=False) as file:
                return (json.loads(str(file["meta"])),
                        [file[f"v{k}"] for k in range(len(file.files) - 1)])
        except UNREADABLE as error:
            warnings.warn(f"{path.name} of {self.folder.name} is damaged ({error}): going on from "
                          "the state before it.", stacklevel=2)

    def on_epoch_begin(self, epoch, logs=None):
        self.started = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        if not math.isfinite(logs["loss"]):
            sentence = (f"the loss of {self.folder.name} is {logs['loss']} in epoch "
                        f"{self.epoch + 1}: the training has diverged. Choose a smaller learning "
                        "rate, or look for nan in what it learns from.")
            write_whole(self.folder / "diverged.txt", lambda aside: aside.write_text(sentence))
            raise FloatingPointError(sentence)

    def on_epoch_end(self, epoch, logs=None):
        for key, value in dict(logs, seconds=time.perf_counter() - self.started).items():
            self.history.setdefault(key, []).append(round(float(value), 5))
        self.epoch = epoch + 1
        self._save()

    def _save(self) -> None:
        meta = text({**self.meta, "machines": self.machines, "epoch": self.epoch,
                     "history": self.history})
        values = {f"v{k}": np.asarray(v) for k, v in enumerate(_state_of(self.model))}
        write_whole(self.folder / f"state-{self.epoch % 2}.npz",
                    lambda aside: np.savez(aside, meta=np.array(meta), **values))


def _state_of(trainer) -> list:
    """All that training changes: weights, statistics, Dropout's seeds, the optimizer."""
    return [*trainer.variables, *trainer.optimizer.variables]
