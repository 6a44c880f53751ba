"""Each notebook on digits: one file, so one process, so each model is trained once.

02 and 04 train what is published. The others load that, and train the rest for real.
"""

import pytest
from test_notebooks import each_notebook, run_nbval


@pytest.mark.slow
@each_notebook
def test_trained_for_real_on_digits(path, notebook_runs):
    retrain = "1" if path.stem[:2] in ("02", "04") else "0"
    run_nbval(
        "--nbval-lax", path, KD_DATASET="digits", KD_RETRAIN=retrain,
        KD_RUNS_DIR=str(notebook_runs))
