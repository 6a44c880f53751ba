"""What several test files share."""

import gc
import os
from pathlib import Path

import pytest

# Three processes share the cores (pyproject.toml). More threads would only wait for each other.
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
CIFAR10 = ROOT / Path(os.environ.get("KD_DATA_DIR") or "data").expanduser() / "cifar10.npz"


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    """Python throws hundreds of graphs away at once, and some test waits minutes for that."""
    yield
    gc.collect()
    gc.freeze()  # what is left stays, and isn't looked through again and again


@pytest.fixture(scope="session")
def notebook_runs(tmp_path_factory):
    """One runs folder for all notebooks on digits, so that each model is trained once."""
    return tmp_path_factory.mktemp("runs")


# The longest files first: a file stays in one process, and nobody waits for it at the end. Each of
# the three processes takes two files at once, so the second three are short ones.
FIRST = ("test_strict", "test_distiller", "test_runs", "test_evidence", "test_search",
         "test_scaling", "test_features", "test_experiments", "test_digits", "test_browser",
         "test_kill", "test_parallel", "test_shipping", "test_exercises", "test_methods")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST
               else len(FIRST))
