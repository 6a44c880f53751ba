"""Each notebook on digits: one file, so one process, so each model is trained once.

04 trains what is published. The others load that, and train the rest for real. 07 and 11 know
digits alone, so test_notebooks runs them.
"""

import pytest
from test_notebooks import NOTEBOOKS, run_nbval


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.stem[:2] not in ("07", "11")],
                         ids=lambda path: path.stem)
def test_trained_for_real_on_digits(path, notebook_runs):
    retrain = "1" if path.stem.startswith("04") else "0"
    run_nbval(
        "--nbval-lax", path, KD_DATASET="digits", KD_RETRAIN=retrain,
        KD_RUNS_DIR=str(notebook_runs))
