"""experiments and plan: how rows are made and published, and what is published now."""

from reference import controls, digests, experiments, fingerprints, measures  # isort: skip  (first: keeps TensorFlow quiet)
from reference import cluster, networks, plan, restamp, runs, store  # isort: skip
import functools
import re
from dataclasses import replace
from unittest import mock

import filelock
import kdlib
import keras
import numpy as np
import pandas as pd
import pytest
import scipy
from conftest import CIFAR10
from test_distiller import tiny

RECIPE = runs.Recipe(epochs=3, batch_size=10, learning_rate=0.01, views=2, flip=False)


def small():
    return tiny(4)


def large():
    return tiny(8)


SHORT = dict(dataset="digits", build=small, recipe=vars(RECIPE))
WILD = vars(replace(RECIPE, optimizer="sgd", learning_rate=1e30, warmup=0.0))


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Make a table's missing rows in an empty reference folder; returns results.csv."""
    digits, reference = kdlib.load_dataset("digits"), tmp_path / "reference"
    data = replace(digits, **{f"{a}_{part}": getattr(digits, f"{a}_{part}")[:60]
                              for a in "xy" for part in ("train", "val", "test")})
    (reference / "rows").mkdir(parents=True)
    monkeypatch.setenv("KD_RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setattr(runs, "REFERENCE", reference)
    monkeypatch.setattr(experiments, "seconds_per_epoch", lambda: lambda each: 1.0)
    monkeypatch.setattr(experiments.kdlib, "load_dataset", lambda name: data)

    def made(*table):
        monkeypatch.setattr(experiments, "EXPERIMENTS", table)
        experiments.main([])
        assert experiments.missing(table) == []
        return pd.read_csv(reference / "results.csv")

    return made


@pytest.mark.slow
def test_making_and_publishing_rows(make):
    """Three experiments from nothing: rows, weights, answers, table."""
    rows = make(
        plan.Experiment("teacher", weights=True, **SHORT | {"build": large}),
        plan.Experiment("distilled", (0, 1), teacher="teacher-seed0", **SHORT),
        plan.Experiment("distilled-x", (100,), teacher="teacher-seed0", choice=True,
                        control="shuffled", **SHORT))
    assert list(rows.method) == ["distilled", "distilled", "distilled-x", "teacher"]
    assert rows.test_accuracy.isna().tolist() == [False, False, True, False]
    assert rows.teacher[0] == "teacher-seed0"
    kept = np.load(runs.REFERENCE / "answers" / "digits-distilled.npz")
    assert set(kept) == {f"digits-distilled-seed{k}/{part}" for k in (0, 1)
                         for part in ("val", "test")}
    assert [path.name for path in (runs.REFERENCE / "weights").iterdir()] == [
        "digits-teacher-seed0.keras"]


@pytest.mark.slow
def test_a_teacher_made_anew_makes_its_students_anew_in_the_same_call(make):
    student = plan.Experiment("distilled", teacher="teacher-seed0", **SHORT)
    judges = []
    for epochs in (1, 2):
        recipe = vars(replace(RECIPE, epochs=epochs))
        make(plan.Experiment("teacher", weights=True, dataset="digits", build=large,
                             recipe=recipe), student)
        teacher, taught = (store.read_notes(runs.REFERENCE / "rows" / f"digits-{name}-seed0.json")
                           for name in ("teacher", "distilled"))
        assert taught["judge"] == teacher["model"]
        judges.append(taught["judge"])
    assert judges[0] != judges[1]


def test_workers_look_again_as_one_process_does(make, monkeypatch):
    """A teacher made anew makes its students missing."""
    first, second = plan.Experiment("teacher", **SHORT), plan.Experiment("scratch", **SHORT)
    found, asked = iter([[(first, 0)], [(first, 0), (second, 0)], []]), []
    monkeypatch.setattr(experiments, "to_make", lambda chosen: next(found))
    monkeypatch.setattr(cluster, "needed", mock.Mock())
    monkeypatch.setattr(cluster, "make", lambda stems, **settings: asked.append(stems))
    experiments.main(["--workers", "2"])
    assert asked == [["digits-teacher-seed0"], ["digits-scratch-seed0"]]


def test_a_row_whose_trials_are_gone_is_missing(make):
    each = plan.Experiment("distilled-at", loss="at", teacher="teacher-seed0", **SHORT)
    store.write_notes(runs.REFERENCE / "rows" / f"{each.stem(0)}.json", {
        "control": experiments._control(each)})
    assert experiments.missing([each]) == [(each, 0)]


@pytest.mark.slow
def test_weights_go_with_the_row_that_had_them(make):
    each = plan.Experiment("scratch", weights=True, **SHORT)
    make(each)
    (path,) = (runs.REFERENCE / "weights").iterdir()
    (runs.REFERENCE / "rows" / "digits-scratch-seed0.json").unlink()
    make(replace(each, weights=False))
    assert not path.exists()


@pytest.mark.slow
def test_a_run_that_diverges_is_a_row_and_the_others_go_on(make, capsys):
    table = (plan.Experiment("scratch-wild", **SHORT | {"recipe": WILD}),
             plan.Experiment("scratch", **SHORT))
    for _ in range(2):  # the second time there is nothing to do
        rows = make(*table).set_index("method")
        assert rows.val_accuracy.isna().to_dict() == {"scratch": False, "scratch-wild": True}
        assert rows.epochs["scratch-wild"] == 3 and rows.parameters["scratch-wild"] > 0
    notes = store.read_notes(runs.REFERENCE / "rows" / "digits-scratch-wild-seed0.json")
    assert "it diverged" in notes["diverged"]
    again = plan.Experiment("scratch-wild", **SHORT)  # the same name with a tamer recipe
    assert make(again, table[1]).val_accuracy.notna().all()


@pytest.mark.slow
def test_an_interrupt_while_publishing_leaves_nothing_half(make, monkeypatch):
    """At each of its writes: afterwards the run is missing, and made whole when asked again."""
    each, write = plan.Experiment("scratch", weights=True, **SHORT), store.write_whole
    make(each)
    files = [path for path in runs.REFERENCE.rglob("*") if path.suffix in (
        ".keras", ".npz", ".json", ".csv")]
    whole = {path: path.read_bytes() for path in files}
    assert len(whole) == 4  # weights, answers, notes, table, in this order
    for last in range(4):
        writes = []

        def interrupted(path, how, last=last, writes=writes):
            writes.append(path)
            if len(writes) > last:
                raise KeyboardInterrupt
            write(path, how)

        (runs.REFERENCE / "rows" / "digits-scratch-seed0.json").unlink()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            run = experiments.Maker().make(each, 0)
            patch.setattr(store, "write_whole", interrupted)
            experiments.publish(run, each)
        assert (experiments.notes_of(each, 0) is None) == (last < 3)
        make(each)
        assert {path: path.read_bytes() for path in files} == whole


def test_a_published_run_is_known_by_its_control_and_its_trainer(monkeypatch):
    """And by what they call: another rule for softening is another control."""
    each, seed = experiments.run_of("digits-distilled-shuffled-seed0")
    assert experiments.notes_of(each, seed)
    for change in ({"control": "evened"}, {"control": None}, {"signal": "mirrored"},
                   {"labels": 50}, {"wrong": 20}, {"hide": False},
                   {"build": networks.residual_student}):
        assert not experiments.notes_of(replace(each, **change), seed), change
    each, seed = experiments.run_of("digits-distilled-7-epochs-top2-seed0")
    assert not experiments.notes_of(replace(each, control="top3"), seed)
    assert kdlib._vgg in digests.with_helpers(kdlib.build_student)
    assert controls._softened in digests.with_helpers(controls.evened)
    assert networks._unit in digests.with_helpers(networks.residual_student)
    each, seed = experiments.run_of("digits-distilled-3-epochs-at-kd-seed0")
    assert experiments.notes_of(each, seed)
    for change in ({"factor": 2.0}, {"loss": "nst"}, {"place": "misplaced"}, {"loss": None}):
        assert not experiments.notes_of(replace(each, **change), seed), change


def test_a_run_comes_after_its_teacher_and_its_trials(monkeypatch):
    monkeypatch.setattr(experiments, "notes_of", lambda each, seed: None)
    each, _ = experiments.run_of("cifar10-distilled-5-epochs-at-kd-seed0")
    order = [one.stem(seed) for one, seed in experiments.to_make([each])]
    assert order[:4] == ["cifar10-teacher-seed0", *(
        f"cifar10-distilled-5-epochs-at-kd-x{x}-seed100" for x in ("1", "0.1", "10"))]
    assert order[4:] == [each.stem(seed) for seed in each.seeds]


@pytest.mark.parametrize("accuracies, factor", [
    ((0.8, 0.9, 0.7), 0.1), ((0.9, 0.9, 0.9), 1.0), ((None, 0.2, 0.3), 10.0),
    ((None, None, None), None), ((0.8, 0.9), None)])
def test_the_best_trial_chooses_the_weight(accuracies, factor, tmp_path, monkeypatch):
    """None: it diverged. Two of three: one is missing."""
    each, _ = experiments.run_of("cifar10-distilled-5-epochs-at-kd-seed0")
    monkeypatch.setattr(runs, "REFERENCE", tmp_path)
    for trial, accuracy in zip(each.trials(), accuracies, strict=False):
        store.write_notes(tmp_path / "rows" / f"{trial.stem(100)}.json", {
            "row": {"val_accuracy": accuracy}, **({} if accuracy else {"diverged": "so"})})
    if factor:
        assert plan.chosen_factor(each) == factor
        assert each.trainer().weight == factor * plan.features.METHODS["at"].weight
    else:
        with pytest.raises(ValueError, match="all trials .* diverged|at-kd-x10 .* is missing"):
            plan.chosen_factor(each)


@pytest.mark.slow
def test_a_teacher_that_is_not_the_published_one_teaches_nobody(make, monkeypatch):
    table = (plan.Experiment("teacher", **SHORT | {"build": large}),  # a row, no weights
             plan.Experiment("distilled", teacher="teacher-seed0", **SHORT))
    make(table[0])
    path = runs.REFERENCE / "rows" / "digits-teacher-seed0.json"
    store.write_notes(path, store.read_notes(path) | {"model": "of another machine"})
    monkeypatch.setattr(experiments, "EXPERIMENTS", table)
    with pytest.raises(ValueError, match="teacher digits-teacher-seed0 at hand is not the pub"):
        experiments.Maker().teacher(table[1], 0)


def test_only_notes_of_proven_code_get_todays_digest(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "REFERENCE", tmp_path)
    codes = {"digits-scratch-seed0": "proven", "digits-scratch-seed1": "older"}
    for stem, code in codes.items():
        store.write_notes(tmp_path / "rows" / f"{stem}.json", {
            "spec": {"code": code, "architecture": "a", "teacher": None, "answers": "was"},
            "control": "c", "judge": None, "model": "m"})
    assert restamp._write_digests({"proven"}, {"was": "is", "other": "too"}) == 1
    after = {stem: store.read_notes(tmp_path / "rows" / f"{stem}.json")["spec"] for stem in codes}
    assert {stem: (spec["code"], spec["answers"]) for stem, spec in after.items()} == {
        "digits-scratch-seed0": (runs.CODE, "is"), "digits-scratch-seed1": ("older", "was")}


def test_code_that_trains_otherwise_stamps_nothing(monkeypatch):
    before_and_now(monkeypatch, ["scratch a", "distilled b", "{}", "old code"],
                   ["scratch a", "distilled c", "{}", "new"])
    monkeypatch.setattr(restamp, "_write_digests", lambda *_: pytest.fail("stamped"))
    with pytest.raises(ValueError, match="other numbers than that of HEAD"):
        restamp.restamp()


def test_controls_are_found_again_by_their_names(monkeypatch):
    """Whatever their order, and whether one of them is new."""
    before_and_now(monkeypatch, ["a", '{"smoothed": "s", "evened": "e"}', "old code"],
                   ["a", '{"new": "n", "evened": "e2", "smoothed": "s2"}', "new"])
    stamped = mock.Mock()
    monkeypatch.setattr(restamp, "_write_digests", stamped)
    restamp.restamp()
    stamped.assert_called_once_with({"old code"}, {"s": "s2", "e": "e2"})


def before_and_now(monkeypatch, *printed):
    trained = iter(printed)
    monkeypatch.setattr(restamp, "_trained", lambda *where: list(next(trained)))
    monkeypatch.setattr(restamp, "subprocess", mock.Mock())
    monkeypatch.setattr(restamp, "tarfile", mock.MagicMock())


def test_one_process_publishes_at_a_time(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "REFERENCE", tmp_path)
    monkeypatch.setenv("KD_RUNS_DIR", str(tmp_path))
    row = dict.fromkeys(runs.RESULT_COLUMNS, 0)
    with experiments._publishing("one", {"row": row}, plan.Experiment("one")):
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(tmp_path / ".lock").acquire(timeout=0)
    assert list(pd.read_csv(tmp_path / "results.csv").seed) == [0]


# --- what is published ---

PUBLISHED = sorted(path.stem for path in (runs.REFERENCE / "weights").glob("*.keras"))


def test_the_table_holds_the_rows_of_all_published_runs():
    table = pd.read_csv(runs.REFERENCE / "results.csv")
    rows = [store.read_notes(path)["row"] for path in (runs.REFERENCE / "rows").glob("*.json")]
    want = pd.DataFrame(rows, columns=runs.RESULT_COLUMNS)
    order = ["dataset", "method", "temperature", "alpha", "seed", "val_accuracy"]
    pd.testing.assert_frame_equal(
        table.sort_values(order, ignore_index=True), want.sort_values(order, ignore_index=True),
        check_dtype=False)


def test_every_row_that_the_notebooks_show_is_published():
    for each, seed in experiments.missing(plan.PUBLISHED):  # there, but of another rounding
        assert "rounding" in store.read_notes(runs.REFERENCE / "rows" / f"{each.stem(seed)}.json")


@pytest.mark.slow
def test_every_row_was_made_with_the_settings_of_its_experiment():
    """Also those that are to be made again, because their last bits are of an older code."""
    for path in sorted((runs.REFERENCE / "rows").glob("*.json")):
        (each, seed), notes = experiments.run_of(path.stem), store.read_notes(path)
        assert notes.get("control") == experiments._control(each), path.stem
        assert experiments._fits(notes, each, seed), path.stem


def test_published_runs_are_of_todays_code():
    """When this fails: experiments.py --restamp proves them, or they have to be made again."""
    codes = {store.read_notes(path)["spec"]["code"]
             for path in (runs.REFERENCE / "rows").glob("*.json")}
    assert codes == {runs.CODE}


def test_the_list_of_experiments(capsys):
    experiments.main(["--list", "--dataset", "digits"])
    assert "scratch-90-epochs" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        experiments.main(["no-such-method"])


def test_what_an_accelerator_made_is_not_made_here(monkeypatch):
    best = [each for each in experiments.EXPERIMENTS if each.on_accelerator]
    monkeypatch.setattr(experiments, "notes_of", lambda each, seed: None)
    assert experiments.missing(best) and not experiments.to_make(best)


published_data = functools.cache(kdlib.load_dataset)


@pytest.mark.slow
def test_published_runs_are_of_todays_data():
    """Splits, and the draws of few and of wrong labels."""
    wanted = {}
    for path in sorted((runs.REFERENCE / "rows").glob("*.json")):
        each, seed = experiments.run_of(path.stem)
        if each.dataset == "cifar10" and not CIFAR10.exists():
            continue
        kind = each.dataset, each.labels, each.distilled and each.hide, each.wrong, seed
        if each.labels == 100 and not each.wrong:
            kind = each.dataset
        if kind not in wanted:
            data = published_data(each.dataset)
            if each.labels < 100:
                data = controls.few_labels(data, each.labels, hide=kind[2], seed=seed)
            if each.wrong:
                data = controls.wrong_labels(data, each.wrong)
            wanted[kind] = fingerprints.data_digest(data)
        assert store.read_notes(path)["spec"]["data"] == wanted[kind], path.stem
    assert wanted


@pytest.mark.parametrize("path", sorted((runs.REFERENCE / "answers").glob("*.npz")),
                         ids=lambda path: path.stem)
def test_published_answers_give_the_published_figures(path):
    name = path.stem.split("-")[0]
    if name == "cifar10" and not CIFAR10.exists():
        pytest.skip("no cifar10.npz in KD_DATA_DIR")
    dataset = published_data(name)
    for stem in {key.partition("/")[0] for key in np.load(path)}:
        row = store.read_notes(runs.REFERENCE / "rows" / f"{stem}.json")["row"]
        logits = measures.read_logits(path, stem)
        assert row["val_accuracy"] == np.mean(logits["val"].argmax(-1) == dataset.y_val).round(4)
        assert row["test_accuracy"] == np.mean(logits["test"].argmax(-1) == dataset.y_test).round(4)
        nll = scipy.special.logsumexp(logits["test"], axis=-1) - logits["test"][
            np.arange(len(dataset.y_test)), dataset.y_test]
        assert row["nll"] == pytest.approx(nll.mean(), abs=2e-3)
        assert row["ece"] == pytest.approx(measures.expected_calibration_error(
            scipy.special.softmax(logits["test"], axis=-1), dataset.y_test),
            abs=5 / len(dataset.y_test)), stem  # rounded, an image may be in the next bin
        taught = row["teacher"] and measures.read_logits(
            path.with_name(f"{name}-{row['teacher'].rpartition('-seed')[0]}.npz"),
            f"{name}-{row['teacher']}")
        if taught:
            alike = np.mean(logits["test"].argmax(-1) == taught["test"].argmax(-1))
            assert row["agreement"] == pytest.approx(alike, abs=1e-4), stem


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10", "digits"])
def test_published_weights_are_those_of_their_notes_and_answers(name):
    """And so, by the test before, of their figures."""
    dataset = published_data(name) if name == "digits" or CIFAR10.exists() else None
    for stem in PUBLISHED:
        if not stem.startswith(name):
            continue
        notes = store.read_notes(runs.REFERENCE / "rows" / f"{stem}.json")
        model = keras.saving.load_model(runs.REFERENCE / "weights" / f"{stem}.keras")
        assert digests.digest(*model.get_weights()) == notes["weights"], stem
        if dataset is not None:
            kept = kept_logits(name, notes["row"], stem)
            np.testing.assert_allclose(kept["val"][:8], model(dataset.x_val[:8]), rtol=2e-3,
                                       atol=2e-2, err_msg=stem)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("stem", ["digits-scratch-7-epochs-25-percent-seed0",
                                  "digits-distilled-dkd-T4-alpha1-seed0"])
def test_a_published_run_trained_again_is_the_same_to_the_last_bit(stem, tmp_path, monkeypatch):
    """On the kind of processor that made it: another one rounds otherwise."""
    notes = store.read_notes(runs.REFERENCE / "rows" / f"{stem}.json")
    here = [fingerprints.machine()], fingerprints.libraries()
    if here != (notes["machines"], notes["row"]["versions"]):
        pytest.skip(f"it was made on {notes['machines']}, this is {here}")
    monkeypatch.setenv("KD_RUNS_DIR", str(tmp_path))
    settings = experiments.Maker().settings(*experiments.run_of(stem))
    monkeypatch.setenv("KD_RETRAIN", "1")
    run = runs.train_or_load(**settings)
    assert run.folder.parent == tmp_path  # trained, not loaded
    assert digests.digest(*run.model.get_weights()) == notes["weights"]


def kept_logits(name, row, stem):
    return measures.read_logits(runs.REFERENCE / "answers" / f"{name}-{row['method']}.npz", stem)


@pytest.mark.slow
@pytest.mark.parametrize("stem", [
    "digits-teacher-seed0", "digits-distilled-seed0", "cifar10-distilled-100-epochs-seed0",
    *(pytest.param(stem, marks=pytest.mark.long) for stem in PUBLISHED
      if re.fullmatch("digits-.*-.*-seed0", stem) or stem == "digits-scratch-seed0")])
def test_published_weights_give_the_published_figures(stem):
    name = stem.split("-")[0]
    if name == "cifar10" and not CIFAR10.exists():
        pytest.skip("no cifar10.npz in KD_DATA_DIR")
    dataset = published_data(name)
    weights = runs.REFERENCE / "weights"
    row = store.read_notes(runs.REFERENCE / "rows" / f"{stem}.json")["row"]
    teacher = row["teacher"] if name == "digits" else ""  # slow on CIFAR-10; its answers are kept
    teacher = keras.saving.load_model(weights / f"{name}-{teacher}.keras") if teacher else None
    model = keras.saving.load_model(weights / f"{stem}.keras")
    got = runs.measure(model, dataset, teacher)
    for key, value in got.items():
        if value is not None:
            assert row[key] == pytest.approx(value, abs=0.003), key
    live = runs.predict_logits(model, dataset.x_val[:500])
    kept = kept_logits(name, row, stem)["val"][:500]
    np.testing.assert_allclose(kept, live, rtol=2e-3, atol=2e-2)
