"""The figures that a row of results.csv holds."""

import numpy as np
import scipy.special


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
