"""A teacher's answers and features: asked once, kept in the runs folder, compared when read."""

from __future__ import annotations

import warnings

import kdlib
import numpy as np
from kdlib import require
from tqdm.auto import tqdm

from reference import digests, features, fingerprints, store
from reference.measures import batch_size, check_pixels, predict_logits
from reference.recipes import Recipe

VIEW_CODE = digests.code_digest(kdlib.view_codes, kdlib.augment)


def teacher_answers(teacher, dataset, recipe: Recipe) -> list[np.ndarray]:
    """The teacher's logits for every view: float32 (images, classes) each.

    Computed once and kept in the runs folder. Some of them are compared with the teacher at
    hand each time. Source: teacher and student see the same views (Beyer et al. 2022); stored
    answers: Shen and Xing 2022.
    """
    return [stored_answers(teacher, dataset, view, recipe)
            for view in _views(recipe, "teacher's answers")]


def stored_answers(teacher, dataset, part, recipe: Recipe | None = None) -> np.ndarray:
    """The teacher's logits for "val", "test", or a view of the training images (a number)."""
    whole = isinstance(part, str)
    images = getattr(dataset, f"x_{part}") if whole else dataset.x_train
    codes = None if whole else _codes(dataset, part, recipe)

    def ask(which):
        return [predict_logits(teacher, images[which], role="teacher",
                               codes=None if codes is None else codes[which])]

    return _kept(teacher, images, [part if whole else _view_name(part, recipe)], ask)[0]


def teacher_features(teacher, dataset, recipe: Recipe, names) -> list[list[np.ndarray]]:
    """The teacher's features at these layers for every view, float16, on the disk:
    ``[view][layer]`` (images, ...). CIFAR-10's largest maps take 1.5 GB a view."""
    watched = features.watch("teacher", teacher, names)

    def of(view):
        codes = _codes(dataset, view, recipe)

        def ask(which):
            return _features(watched, dataset.x_train[which], codes[which])

        files = [f"{_view_name(view, recipe)}-{name}" for name in names]
        return _kept(teacher, dataset.x_train, files, ask)

    return [of(view) for view in _views(recipe, "teacher's features")]


def _features(watched, images, codes) -> list[np.ndarray]:
    found = [np.empty((len(images), *each.shape[1:]), "float16") for each in watched.outputs[1:]]
    size = batch_size(images)
    for k in range(0, len(images), size):
        seen = kdlib.augment(images[k : k + size], codes[k : k + size])
        check_pixels("teacher", watched, seen)
        few = len(seen) < size  # predict would compile another graph
        answers = watched(seen, training=False) if few else watched.predict_on_batch(seen)
        for kept, each in zip(found, answers[1:], strict=True):
            kept[k : k + size] = each
            require(np.isfinite(kept[k : k + size]).all(), "a feature of the teacher is not "
                    "finite, or above 65,504, which half precision cannot hold.")
    return found


def _views(recipe: Recipe, what: str):
    return tqdm(range(min(recipe.views, recipe.epochs)), desc=what, unit="view", leave=False,
                delay=2)


def _codes(dataset, view: int, recipe: Recipe) -> np.ndarray:
    return kdlib.view_codes(images=len(dataset.x_train), views=view + 1, shift=recipe.shift,
                            flip=recipe.flip)[view]


def _view_name(view: int, recipe: Recipe) -> str:
    return f"view{view:02d}-shift{recipe.shift}-flip{recipe.flip:d}"


def _kept(teacher, images, names: list[str], ask) -> list[np.ndarray]:
    """Arrays of a teacher for these images, from its folder if they are there and still its own.
    ask: the arrays of some images (an index), one a name."""
    key = digests.digest(VIEW_CODE, images, fingerprints.model_digest(teacher))
    folder = store.runs_folder() / f"answers-{key[:16]}"
    paths = [folder / f"{name}.npy" for name in names]
    kept = [store.read_array(path) if path.exists() else None for path in paths]
    if not any(each is None for each in kept):
        some = np.linspace(0, len(images) - 1, 8).astype(int)
        if all(fingerprints.alike(teacher, now, each[some])
               for now, each in zip(ask(some), kept, strict=True)):
            return kept
        warnings.warn(f"the stored answers in {folder.name} are not this teacher's: it is asked "
                      "again.", stacklevel=3)
    for path, array in zip(paths, ask(slice(None)), strict=True):
        store.write_array(path, array)
    return [store.read_array(path) for path in paths]
