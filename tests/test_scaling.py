"""Costs of scaling.csv, and what notebook 11 says about them."""

from reference import controls, measures, runs, scaling  # isort: skip  (keeps TensorFlow quiet)
import numpy as np
import pandas as pd
import pytest
import scipy.special
from conftest import CIFAR10

TABLE = pd.read_csv(runs.REFERENCE / "scaling.csv")
FIGURES = {figure: group.set_index("size")["value"] for figure, group in TABLE.groupby("figure")}


def test_the_table_is_tidy():
    assert list(TABLE) == ["figure", "size", "value", "unit", "machine"]
    assert not TABLE.duplicated(["figure", "size"]).any()
    assert (TABLE.value >= 0).all() and TABLE.notna().all(axis=None)


def test_costs_grow_as_the_notebook_says():
    """In proportion to data and views; a hundred times the classes cost less than twice the data"""
    data, views, classes = (FIGURES[name] for name in (
        "student, epoch, times the data", "teacher, answers, views", "student, epoch, classes"))
    for times in (2, 4):
        assert data[times] / data[1] == pytest.approx(times, rel=0.15)
        assert views[times] / views[1] == pytest.approx(times, rel=0.15)
    assert classes[1000] / classes[10] < data[2] / data[1]


def test_answers_on_disk_are_what_they_hold():
    """Float32 logits of ten classes, a header and a digest for each view."""
    images, kept = FIGURES["images"][1], FIGURES["teacher, answers on disk, views"]
    for views, size in kept.items():
        assert size == pytest.approx(views * (images * 10 * 4 + 128 + 32), rel=1e-3)


def test_what_shortened_answers_lose():
    """Against a divergence by hand; and the table falls with k."""
    logits = np.array([[4.0, 2.0, 0.0, -2.0]] * 2)
    p = scipy.special.softmax(logits[0] / scaling.TEMPERATURE)
    q = np.array([p[0], *[(1 - p[0]) / 3] * 3])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(controls, "TOP", (1, 2))
        rows = {(figure, size): value for figure, size, value, _ in scaling.errors(logits)}
    assert rows["KL lost, top k", 1] == pytest.approx(np.sum(p * np.log(p / q)), rel=1e-9)
    assert rows["probability kept, top k", 2] == pytest.approx(p[:2].sum(), rel=1e-9)
    (name,) = {figure for figure in FIGURES if "KL lost, top k" in figure}
    lost = FIGURES[name]
    assert list(lost.index) == list(controls.TOP) and (np.diff(lost) < 0).all()


@pytest.mark.skipif(not CIFAR10.exists(), reason="no cifar10.npz in KD_DATA_DIR")
def test_the_table_of_shortened_answers_is_that_of_the_published_teacher():
    kept = measures.read_logits(runs.REFERENCE / "answers" / "cifar10-teacher.npz",
                                "cifar10-teacher-seed0")["val"]
    for figure, size, value, _ in scaling.errors(kept):
        (name,) = {each for each in FIGURES if figure in each}
        assert FIGURES[name][size] == pytest.approx(value, rel=1e-2, abs=2e-4), (figure, size)
