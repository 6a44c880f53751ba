"""What several test files share."""

import pytest


@pytest.fixture(scope="session")
def notebook_runs(tmp_path_factory):
    """One runs folder for all notebooks on digits, so that each model is trained once."""
    return tmp_path_factory.mktemp("runs")
