"""Choosing T and alpha: a fixed budget, a median, and going on after a kill."""

from reference import runs, search  # isort: skip  (keeps TensorFlow quiet)
import importlib.util

import keras
import pandas as pd
import pytest

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("optuna"),
                                reason=search.cluster.EXTRA)


class Fake:
    """A training without a network: the closer to T = 4, the better; epochs are reported."""

    def __init__(self, monkeypatch, cut_at=None):
        self.trained, self.cut_at = [], cut_at
        monkeypatch.setattr(search.runs, "train_or_load", self)
        monkeypatch.setattr(search.cluster, "_maker", lambda: self)

    def make(self, *name):
        return None

    def data(self, name):
        return None

    def __call__(self, method, data, *, teacher, seed, temperature, alpha, recipe, callbacks):
        self.trained.append((round(temperature, 6), round(alpha, 6), seed))
        if len(self.trained) == self.cut_at:
            raise KeyboardInterrupt
        value = 0.9 - abs(temperature - 4) / 100
        for callback in callbacks:
            callback.params = {"epochs": recipe.epochs}
            for epoch in range(recipe.epochs):
                callback.on_epoch_end(epoch, {"val_accuracy": value})
        return runs.Run(None, {"val_accuracy": [value] * recipe.epochs}, {"val_accuracy": value})


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_RUNS_DIR", str(tmp_path))
    return tmp_path


def test_a_search_is_known_by_what_it_searches(monkeypatch):
    names = [search.Search(**settings).name for settings in (
        {}, {"epochs": 3}, {"random_trials": 6}, {"alphas": (0.0, 0.5)},
        {"temperatures": (1.0, 8.0)}, {"dataset": "cifar10"})]
    monkeypatch.setattr(search.runs, "CODE", "other code")
    names.append(search.Search().name)
    assert len(set(names)) == len(names) and search.Search().name == names[-1]


def test_a_budget_is_kept_and_poor_trials_are_given_up(monkeypatch):
    fake = Fake(monkeypatch)
    study = search.run(search.Search(), trials=14)
    assert len(study.trials) == 14 == len(fake.trained)
    states = [trial.state.name for trial in study.trials]
    assert states.count("PRUNED") >= 1 and states[:5] == ["COMPLETE"] * 5
    pruned = [t for t in study.trials if t.state.name == "PRUNED"]
    assert all(3 < len(t.intermediate_values) < 7 for t in pruned)  # not before half
    assert {seed for _, _, seed in fake.trained} == {100}
    assert all(1 <= t <= 16 and 0 <= a <= 0.9 for t, a, _ in fake.trained)
    assert abs(study.best_params["temperature"] - 4) < 1
    table = search.table(search.Search())
    assert list(table) == search.COLUMNS and len(table) == 14
    search.run(search.Search(), trials=14)
    assert len(fake.trained) == 14  # nothing is left to do


@pytest.mark.parametrize("cut_at", [3, 8])
def test_a_search_that_was_cut_off_goes_on_as_it_would_have(monkeypatch, tmp_path, cut_at):
    whole = Fake(monkeypatch)
    want = search.run(search.Search(), trials=10)
    monkeypatch.setenv("KD_RUNS_DIR", str(tmp_path / "other"))
    cut = Fake(monkeypatch, cut_at=cut_at)
    with pytest.raises(KeyboardInterrupt):
        search.run(search.Search(), trials=10)
    got = search.run(search.Search(), trials=10)
    assert cut.trained[cut_at - 1] == cut.trained[cut_at]  # the same trial again
    assert cut.trained[:cut_at] + cut.trained[cut_at + 1:] == whole.trained
    assert [t.params for t in got.trials] == [t.params for t in want.trials]
    assert [t.state for t in got.trials] == [t.state for t in want.trials]


def test_a_run_that_was_only_loaded_counts_in_the_median(monkeypatch):
    fake = Fake(monkeypatch)
    monkeypatch.setattr(search, "Judged", lambda trial: keras.callbacks.Callback())
    study = search.run(search.Search(), trials=2)
    assert [len(trial.intermediate_values) for trial in study.trials] == [7, 7]
    assert len(fake.trained) == 2


def test_a_trial_that_diverges_does_not_stop_the_search(monkeypatch):
    fake, calls = Fake(monkeypatch), []

    def wild(*given, **more):
        calls.append(1)
        if len(calls) == 2:
            raise FloatingPointError("it diverged")
        return fake(*given, **more)

    monkeypatch.setattr(search.runs, "train_or_load", wild)
    study = search.run(search.Search(), trials=4)
    assert [trial.state.name for trial in study.trials].count("FAIL") == 1
    assert len(study.trials) == 4 and all(trial.state.is_finished() for trial in study.trials)


def test_a_trial_that_was_cut_off_at_once_does_not_stop_the_search(monkeypatch):
    """A kill between its number and its settings leaves a trial without any."""
    Fake(monkeypatch)
    search.Search().study().ask()
    study = search.run(search.Search(), trials=2)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE"]
    table = search.table(search.Search())
    assert table.state.tolist() == ["fail", "complete"] and pd.isna(table.machine[0])


def test_a_database_is_a_url(monkeypatch, tmp_path):
    Fake(monkeypatch)
    study = search.run(search.Search(storage=f"sqlite:///{tmp_path}/study.db"), trials=2)
    assert len(study.trials) == 2 and (tmp_path / "study.db").exists()


def test_no_trial_is_no_search():
    with pytest.raises(ValueError, match="trials is 0"):
        search.run(search.Search(), trials=0)


@pytest.mark.slow
def test_two_real_trials_on_digits():
    one = search.Search(epochs=1)
    study = search.run(one, trials=2)
    assert all(0 <= trial.value <= 1 for trial in study.trials)
    assert search.table(one).epochs_done.tolist() == [1, 1]
