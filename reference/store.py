"""How files survive: whole writes, checked reads."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import warnings
import zipfile
import zlib
from pathlib import Path

import filelock
import numpy as np

from reference.digests import digest, text

ROOT = Path(__file__).resolve().parents[1]  # relative paths in KD_RUNS_DIR begin here
UNREADABLE = (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error)


def runs_folder() -> Path:
    """Where runs and stored answers are kept: ``$KD_RUNS_DIR``, by default ``runs``."""
    return ROOT / Path(os.environ.get("KD_RUNS_DIR") or "runs").expanduser()


@contextlib.contextmanager
def named(path: Path):
    """Let an error of the operating system say which setting and folder it is about."""
    try:
        yield
    except OSError as error:
        value = os.environ.get("KD_RUNS_DIR")
        raise type(error)(error.errno, f"{error.strerror or error}: {path}. Free some space, or "
                          f"choose another folder (KD_RUNS_DIR, for runs, is {value!r})") from error


def lock(path: Path, busy: str | None = None):
    """Take the lock of a file, until the context ends. Where another process has it, wait, or
    raise RuntimeError(busy)."""
    with named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return filelock.FileLock(path).acquire(timeout=0 if busy else -1)
        except filelock.Timeout:
            raise RuntimeError(busy) from None


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


def kept_notes(path: Path) -> dict | None:
    """Notes that may not be there; None with a warning where they are damaged."""
    try:
        return read_notes(path) if path.exists() else None
    except UNREADABLE as error:
        warnings.warn(f"{path} is damaged ({error}): it is made again.", stacklevel=3)


def read_notes(path: Path) -> dict:
    """Notes as they were written. Raises ValueError if they are damaged, or somebody changed them.
    """
    try:
        notes = json.loads(path.read_text())
        sound = notes.pop("seal") == digest(notes)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no whole notes ({error!r}). Fetch it again, or make the "
                         "run again") from None
    if not sound:
        raise ValueError(f"{path}: its notes were changed after they were written")
    return notes
