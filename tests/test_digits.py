"""Each notebook on digits: one file, so one process, so each model is trained once.

What is published is loaded, as a reader does, and the rest is trained for real. 07 and 11 know
digits alone, so test_strict runs them; 02 and 03 run in test_browser.
"""

import pytest
from test_notebooks import NOTEBOOKS, run_nbval


LONG = ("02", "03", "04", "08", "09", "10")


@pytest.mark.slow
@pytest.mark.parametrize("path", [
    pytest.param(path, marks=[pytest.mark.long] if path.stem[:2] in LONG else [])
    for path in NOTEBOOKS if path.stem[:2] not in ("07", "11")], ids=lambda path: path.stem)
def test_runs_on_digits(path, notebook_runs):
    run_nbval(
        "--nbval-lax", path, KD_DATASET="digits", KD_RETRAIN="0",
        KD_RUNS_DIR=str(notebook_runs))
