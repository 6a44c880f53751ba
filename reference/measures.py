"""The figures that a row of results.csv holds, and the logits behind them."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import kdlib
import numpy as np
import scipy.special
from kdlib import require

from reference import fingerprints, store

RESULT_COLUMNS = ("dataset model method teacher temperature alpha seed epochs parameters "
                  "val_accuracy test_accuracy nll ece agreement seconds machine versions").split()


def notes(spec: dict, model, figures: dict, history: dict, machines: list[str], *, teacher,
          taught_by: str | None, versions: str | None = None) -> dict:
    """What is kept of a training: what it was, its row of results.csv, its history."""
    row = {**spec, **figures, "teacher": taught_by, "model": re.sub(r"_\d+$", "", model.name),
           "parameters": model.count_params(), "seconds": round(sum(history.get("seconds", ()))),
           "machine": ", ".join([machines[-1], *filter(None, [spec.get("precision")])]),
           "versions": versions or fingerprints.libraries()}
    return {"spec": spec, "row": {key: row.get(key) for key in RESULT_COLUMNS}, "history": history,
            "machines": machines, "judge": fingerprints.model_digest(teacher)}


def batch_size(images) -> int:
    """500 images of 32 x 32, fewer of larger ones: a batch that fits into memory."""
    return max(1, min(500, 500 * 32 * 32 // int(np.prod(images.shape[1:3]))))


def check_pixels(role: str, model, images: np.ndarray) -> None:
    """Refuse an array of images of another size or scale than the model takes: ValueError."""
    _, raw = kdlib.check_images(role, model, images)
    require(raw, "images are not finite, at most 1, or negative. "
            f"The {role} takes raw pixels from 0 to 255, and normalises them itself.")


def predict_logits(model, images: np.ndarray, *, role: str = "model", codes=None) -> np.ndarray:
    """Logits of many images, perhaps seen through codes: float32 (N, classes)."""
    size, parts = batch_size(images), []
    for k in range(0, len(images), 20 * size):  # no more than these are copied
        some = images[k : k + 20 * size]
        check_pixels(role, model, some)
        some = some if codes is None else kdlib.augment(some, codes[k : k + 20 * size])
        few = len(some) <= 8  # not worth compiling a graph for them
        parts.append(np.asarray(model(some, training=False)) if few else
                     model.predict(some, batch_size=size, verbose=0))
    return np.concatenate(parts).astype("float32", copy=False)


def figures(logits: dict[str, np.ndarray], dataset) -> dict[str, float]:
    """val_accuracy; and on the test set: accuracy, nll (nats) and ece, rounded to four digits.

    logits: {"val": (N, classes), "test": (M, classes)}.
    """
    log_p = scipy.special.log_softmax(logits["test"].astype("float64"), axis=-1)
    guess, labels = log_p.argmax(-1), dataset.y_test
    found = {"val_accuracy": np.mean(logits["val"].argmax(-1) == dataset.y_val),
             "test_accuracy": np.mean(guess == labels),
             "nll": -log_p[np.arange(len(labels)), labels].mean(),
             "ece": expected_calibration_error(np.exp(log_p), labels)}
    return {key: round(float(value), 4) for key, value in found.items()}


def expected_calibration_error(probabilities, labels, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal bins of confidence.

    Args: probabilities (N, classes), labels (N,). Source: Guo et al. 2017, section 2.
    """
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == labels
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(which, right - confidence, bins)
    return float(np.abs(gaps).sum() / len(labels))


# --- the logits behind them, as they are kept -----------------------------------------


def halved(logits: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rounded to what half precision can hold, as float32. The answered class stays the same.

    logits: arrays (N, classes).
    """
    return {part: _halved(each) for part, each in logits.items()}


def _halved(logits):
    half, best = logits.astype("float16"), logits.argmax(-1)
    tied = np.flatnonzero(half.argmax(-1) != best)
    half[tied, best[tied]] = np.nextafter(half.max(-1)[tied], np.float16(np.inf))
    return half.astype("float32")


def write_logits(path: Path, name: str, logits: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Keep a run's logits as float16 ``NAME/val`` and ``NAME/test``. Returns what was kept."""
    half = halved(logits)
    named = {f"{name}/{part}": each.astype("float16") for part, each in half.items()}
    store.write_whole(path, lambda aside: np.savez(aside, **named))
    return half


def read_logits(path: Path, name: str) -> dict[str, np.ndarray] | None:
    """A run's logits as they were kept, as float32; None where there are none to be read."""
    with contextlib.suppress(*store.UNREADABLE), np.load(path) as kept:
        return {part: kept[f"{name}/{part}"].astype("float32") for part in ("val", "test")}


def check_answers(answers, recipe, shape: tuple) -> list[np.ndarray]:
    """One array of logits for each view, or a sentence."""
    views = min(recipe.views or recipe.epochs, recipe.epochs)
    shapes = [getattr(each, "shape", None) for each in answers]
    require(len(shapes) >= views and all(each == shape for each in shapes), f"answers are "
            f"{len(shapes)} of shapes {shapes[:3]}. Give a list of {views} arrays of logits of "
            f"shape {shape}, one a view.")
    answers = [np.asarray(each, "float32") for each in answers[:views]]
    require(not any(np.isnan(each).any() or (each == np.inf).any() for each in answers),
            "answers hold nan or infinity. Compute the logits again.")
    require(not any(map(kdlib._are_probabilities, answers)),
            "answers are probabilities (each row sums to 1). Give logits: np.log(answers) will do.")
    return answers
