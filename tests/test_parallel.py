"""One training on two processes or two devices: the weights of one."""

from reference import parallel  # isort: skip  (first: keeps TensorFlow quiet)
import importlib.util
import sys

import pytest
from test_distiller import python_with

# One process on the same backend, computed once.
ALONE = {}


def difference(way, python):
    """Largest difference of each process's weights to those of one process."""
    reports = parallel.launch(way, python=python, timeout=500)
    errors = [report["error"] for report in reports if "error" in report]
    assert not errors, errors
    backend = parallel.WAYS[way][1]
    if (backend, python) not in ALONE:
        alone = "one" if backend == "jax" else "one-tensorflow"
        ALONE[backend, python] = parallel.launch(alone, python=python, timeout=500)[0]
    one = ALONE[backend, python]
    return [parallel.difference(one["weights"], each["weights"]) for each in reports], reports, one


@pytest.mark.ci
@pytest.mark.long
@pytest.mark.slow
def test_two_processes_with_a_slice_each_are_one():
    apart, reports, one = difference("slices", python_with("jax"))
    assert max(apart) < 1e-6 and len(apart) == 2
    assert [each["images"] for each in reports] == [one["images"] // 2] * 2


@pytest.mark.long
@pytest.mark.slow
def test_whole_batches_in_each_process_go_unnoticed():
    apart, reports, one = difference("whole", python_with("jax"))
    assert max(apart) < 1e-6
    assert [each["images"] for each in reports] == [one["images"]] * 2


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("jax"), reason="needs JAX beside TensorFlow")
def test_a_dataset_that_keras_splits_gives_the_same_weights():
    """Which process reads which image can't be counted in a pipeline of TensorFlow's."""
    apart, _, _ = difference("dataset", sys.executable)
    assert max(apart) < 1e-6


@pytest.mark.long
@pytest.mark.slow
def test_arrays_are_refused():
    reports = parallel.launch("arrays", python=python_with("jax"), timeout=500)
    assert all("auto-sharding enabled" in report["error"] for report in reports)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("way, low, high", [
    pytest.param("mirrored-synchronized", 0, 1e-6, marks=pytest.mark.ci),
    ("mirrored", 1e-4, 10)])
def test_two_devices(way, low, high):
    """BatchNorm over the whole batch is one process's; over halves it is another training."""
    (apart,), _, _ = difference(way, sys.executable)
    assert low <= apart < high


@pytest.mark.long
@pytest.mark.slow
def test_several_workers_with_fit_fail():
    """When this fails, say so in notebook 11: it works now."""
    reports = parallel.launch("workers-fit", timeout=500)
    assert any("PerReplica" in report["error"] for report in reports)


@pytest.mark.long
@pytest.mark.slow
def test_several_workers_in_an_own_loop_have_statistics_of_their_own():
    _, (a, b), _ = difference("workers-loop", sys.executable)
    apart = [abs(x - y).max() for x, y in zip(a["weights"], b["weights"], strict=True)]
    assert max(apart) > 1e-4
    assert apart[0] < 1e-6 and apart[-1] < 1e-6  # what has a gradient agrees
