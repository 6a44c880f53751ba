"""A training that is cut off goes on after its last whole epoch, to the same weights."""

from __future__ import annotations

import json
import math
import time
import warnings
from pathlib import Path

import keras
import numpy as np

from reference import digests, fingerprints, store


class Keeper(keras.callbacks.Callback):
    """Keeps the whole state of a training after each epoch, in one file.

    Keras's BackupAndRestore writes weights and epoch into two files, one after the other: a
    kill between them repeats or skips an epoch. Here a state is one file with checksums, and
    the last two are kept, in turn.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self.folder, self.epoch, self.history = folder, 0, {}
        self.libraries = fingerprints.libraries()
        self.machines = [fingerprints.machine()]

    def restore(self, trainer) -> None:
        trainer.optimizer.build(trainer.trainable_variables)
        states = [state for path in sorted(self.folder.glob("state-?.npz"))
                  if (state := self._read(path))]
        if not states:
            return
        meta, values = max(states, key=lambda state: state[0]["epoch"])
        if meta["libraries"] != self.libraries:
            raise RuntimeError(f"the run {self.folder.name} was begun with other libraries ("
                               f"{meta['libraries']}, now {self.libraries}). Delete its "
                               "folder to begin anew, or go back to those.")
        if meta["machines"][-1] != self.machines[0]:
            warnings.warn(f"the run {self.folder.name} was begun on {meta['machines'][-1]} and "
                          f"goes on with {self.machines[0]}. Rounding differs, so the weights will "
                          "not be those of an uninterrupted run.", stacklevel=4)
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
        except store.UNREADABLE as error:
            warnings.warn(f"{path.name} of {self.folder.name} is damaged ({error}): going on from "
                          "the state before it.", stacklevel=2)

    def on_epoch_begin(self, epoch, logs=None):
        self.started = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        if not math.isfinite(logs["loss"]):
            raise FloatingPointError  # as kdlib's guard does, where a Distiller is trained

    on_test_batch_end = on_train_batch_end  # the last step may be the one that diverges

    def on_epoch_end(self, epoch, logs=None):
        for key, value in dict(logs, seconds=time.perf_counter() - self.started).items():
            self.history.setdefault(key, []).append(round(float(value), 5))
        self.epoch = epoch + 1
        self._save()

    def _save(self) -> None:
        meta = digests.text({"libraries": self.libraries, "machines": self.machines,
                             "epoch": self.epoch, "history": self.history})
        values = {f"v{k}": _plain(np.asarray(v)) for k, v in enumerate(_state_of(self.model))}
        store.write_whole(self.folder / f"state-{self.epoch % 2}.npz",
                          lambda aside: np.savez(aside, meta=np.array(meta), **values))


def _plain(array: np.ndarray) -> np.ndarray:
    """In a type that NumPy can read back: bfloat16 goes into float32 and back without loss."""
    return array.astype("float32") if array.dtype.kind == "V" else array


def _state_of(trainer) -> list:
    """All that training changes: weights, statistics, Dropout's seeds, the optimizer."""
    return [*trainer.variables, *trainer.optimizer.variables]


class _NoModel:
    """What a callback finds in place of the model."""

    def __getattr__(self, name):
        raise TypeError(f"a callback asks for model.{name}, but here callbacks may only watch: a "
                        "run is known by its recipe, and they would change what it trains. Put "
                        "the change into the recipe, or fit a model of your own.")

    def __setattr__(self, name, value):
        getattr(self, name)

    def __call__(self, *images, **settings):
        self.call  # noqa: B018  (says what is wrong)


class Watching(keras.callbacks.CallbackList):
    """Callbacks that see epochs, batches and logs, and can't reach what is trained."""

    def __init__(self, callbacks):
        super().__init__([*callbacks])
        for each in self.callbacks:
            each.set_model(_NoModel())

    def set_model(self, model):
        """Called by fit, with what it trains."""


def check_loads(model, folder: Path) -> None:
    """Before the training: what ``build`` returns can be loaded afterwards."""
    path = folder / "aside-first.keras"
    try:
        with store.named(path):
            model.save(path)
        keras.saving.load_model(path, compile=False)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"Keras cannot load back what build returns ({str(error)[:200]}). Use "
                         "keras.saving.register_keras_serializable for its classes.") from None
    finally:
        path.unlink(missing_ok=True)
