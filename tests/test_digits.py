"""Each notebook on digits, trained for real: one file, so one process, so each model once."""

import pytest
from test_notebooks import each_notebook, run_nbval


@pytest.mark.slow
@each_notebook
def test_trained_for_real_on_digits(path, notebook_runs):
    run_nbval(
        "--nbval-lax", path, KD_DATASET="digits", KD_RETRAIN="1", KD_RUNS_DIR=str(notebook_runs)
    )
