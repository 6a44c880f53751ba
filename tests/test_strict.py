"""Each notebook on CIFAR-10: every output is the committed one, from what is published."""

import pytest
from conftest import CIFAR10, ROOT
from test_notebooks import NOTEBOOKS, run_nbval


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10.exists(), reason="no cifar10.npz in KD_DATA_DIR")
@pytest.mark.parametrize("path", [
    pytest.param(path, marks=[pytest.mark.long] if path.stem.startswith("11") else [])
    for path in NOTEBOOKS], ids=lambda path: path.stem)
def test_every_output_on_cifar10(path, tmp_path):
    run_nbval("--nbval", path, KD_DATASET="cifar10", KD_RETRAIN="0", KD_RUNS_DIR=str(tmp_path),
              TF_NUM_INTRAOP_THREADS="0")  # as many as a reader has: rounding depends on them
    published = [path.stem for path in (ROOT / "reference" / "weights").glob("*.keras")]
    again = [name for name in published if list(tmp_path.glob(f"{name}-*"))]
    assert not again, "trained instead of loaded from reference"
