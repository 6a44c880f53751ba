"""What several test files share."""

import os
from pathlib import Path

import pytest

# Several processes share the cores (pyproject.toml). More threads would only wait for each other.
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
CIFAR10 = ROOT / Path(os.environ.get("KD_DATA_DIR") or "data").expanduser() / "cifar10.npz"


@pytest.fixture(scope="session")
def notebook_runs(tmp_path_factory):
    """One runs folder for all notebooks on digits, so that each model is trained once."""
    return tmp_path_factory.mktemp("runs")


LONGEST = ("test_strict", "test_digits", "test_browser", "test_kill")


def pytest_collection_modifyitems(items):
    """The longest files first: a file stays in one process, and nobody waits for it at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST
               else len(LONGEST))
