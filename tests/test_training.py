"""train_or_load: exact resume, damaged states, caches, what is loaded and what is not."""

import kdlib  # isort: skip
import json
from dataclasses import replace

import keras
import numpy as np
import pytest
from test_distiller import tiny

RECIPE = kdlib.Recipe(epochs=3, batch_size=10, learning_rate=0.05, views=2, flip=False)


@pytest.fixture(scope="module")
def data():
    digits = kdlib.load_dataset("digits")
    cut = {f"{a}_{part}": getattr(digits, f"{a}_{part}")[:60]
           for a in "xy" for part in ("train", "val", "test")}
    return replace(digits, **cut)


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_RUNS_DIR", str(tmp_path))
    monkeypatch.setenv("KD_RETRAIN", "1")
    return tmp_path


def train(data, method="scratch", **settings):
    settings = {"build": lambda: tiny(dropout=0.3), "recipe": RECIPE, **settings}
    return kdlib.train_or_load(method, data, **settings)


def assert_same_weights(a, b):
    for x, y in zip(a.model.get_weights(), b.model.get_weights(), strict=True):
        np.testing.assert_array_equal(x, y)


class Cut(Exception):
    pass


def train_and_cut(data, monkeypatch, after_epoch, **settings):
    """Train, and be struck down after an epoch, as by a kill."""
    save = kdlib._StateKeeper._save

    def save_then_die(self):
        save(self)
        if self.epoch == after_epoch:
            raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(kdlib._StateKeeper, "_save", save_then_die)
        with pytest.raises(Cut):
            train(data, **settings)


def test_same_seed_same_weights(data, monkeypatch, tmp_path):
    first = train(data)
    monkeypatch.setenv("KD_RUNS_DIR", str(tmp_path / "other"))
    assert_same_weights(first, train(data))
    other = train(data, seed=1)
    assert np.any(other.model.get_weights()[0] != first.model.get_weights()[0])


@pytest.mark.parametrize("method", ["scratch", "distilled"])
@pytest.mark.parametrize("after_epoch", [1, 2])
def test_a_run_that_was_cut_ends_with_the_same_weights(
    data, monkeypatch, tmp_path, method, after_epoch
):
    teacher = tiny(8)
    monkeypatch.setenv("KD_RUNS_DIR", str(tmp_path / "whole"))
    whole = train(data, method=method, teacher=teacher)
    monkeypatch.setenv("KD_RUNS_DIR", str(tmp_path / "cut"))
    train_and_cut(data, monkeypatch, after_epoch, method=method, teacher=teacher)
    resumed = train(data, method=method, teacher=teacher)
    assert_same_weights(whole, resumed)
    assert len(resumed.history["loss"]) == 3
    assert resumed.history["val_accuracy"] == whole.history["val_accuracy"]


def test_a_damaged_state_is_named_and_the_one_before_taken(data, monkeypatch, runs, tmp_path):
    monkeypatch.setenv("KD_RUNS_DIR", str(tmp_path / "whole"))
    whole = train(data)
    monkeypatch.setenv("KD_RUNS_DIR", str(runs))
    train_and_cut(data, monkeypatch, 2)
    (state,) = runs.glob("digits-scratch*/state.npz")
    state.write_bytes(state.read_bytes()[:2000])
    with pytest.warns(UserWarning, match="state.npz .* is damaged"):
        resumed = train(data)
    assert_same_weights(whole, resumed)


def test_a_state_of_other_versions_is_not_continued(data, monkeypatch, runs):
    train_and_cut(data, monkeypatch, 1)
    monkeypatch.setattr(kdlib, "_versions", lambda: "tensorflow 1.0")
    with pytest.raises(RuntimeError, match="other versions"):
        train(data)


def test_another_process_on_the_same_run(data, runs):
    run = train(data)
    (folder,) = runs.glob("digits-scratch*")
    (folder / "model.json").unlink()
    with kdlib.filelock.FileLock(folder / "lock", thread_local=False, is_singleton=False):
        with pytest.raises(RuntimeError, match="under way in another process"):
            train(data)
    assert run.row["method"] == "scratch"


def test_a_finished_run_is_loaded_and_another_recipe_is_not(data, monkeypatch):
    first = train(data)
    monkeypatch.setattr(kdlib, "_train", lambda *a, **k: pytest.fail("trained again"))
    loaded = train(data)
    assert_same_weights(first, loaded)
    assert loaded.row == first.row and list(loaded.row) == list(kdlib.RESULT_COLUMNS)
    with pytest.raises(pytest.fail.Exception):
        train(data, recipe=replace(RECIPE, learning_rate=0.01))


def test_batches_carry_the_teachers_answer_to_the_very_image(data):
    teacher = tiny(8)
    logits = kdlib.teacher_logits(teacher, data, RECIPE)
    for (images, answers), _ in kdlib.batches(data, RECIPE, seed=3, teacher_logits=logits):
        live = teacher.predict(images, verbose=0)
        np.testing.assert_allclose(answers, live, rtol=1e-4, atol=1e-5)


def test_another_teacher_has_another_cache(data, runs):
    a = kdlib.teacher_logits(tiny(8), data, RECIPE)
    b = kdlib.teacher_logits(tiny(8, seed=1), data, RECIPE)
    assert np.any(a != b) and len(list(runs.glob("logits-*"))) == 2


def test_batches_show_every_image_once_an_epoch(data):
    labels = np.concatenate([y for _, y in kdlib.batches(data, RECIPE, seed=0)])
    for epoch in np.split(labels, RECIPE.epochs):
        np.testing.assert_array_equal(np.bincount(epoch), np.bincount(data.y_train))


def test_batches_from_the_middle_are_those_of_the_whole(data):
    whole = [y.numpy() for _, y in kdlib.batches(data, RECIPE, seed=0)]
    rest = [y.numpy() for _, y in kdlib.batches(data, RECIPE, seed=0, first_epoch=2)]
    np.testing.assert_array_equal(whole[-len(rest):], rest)


def test_both_students_begin_with_the_same_weights(data, monkeypatch):
    still = replace(RECIPE, epochs=1, learning_rate=0.0, optimizer="adam")
    build = kdlib.build_student
    scratch = train(data, recipe=still, build=build)
    distilled = train(data, method="distilled", teacher=kdlib.build_teacher(),
                      recipe=still, build=build)
    for a, b in zip(scratch.model.trainable_variables,
                    distilled.model.trainable_variables, strict=True):
        np.testing.assert_array_equal(a, b)


def test_weight_decay_spares_everything_but_kernels():
    optimizer = kdlib._optimizer(RECIPE, steps=6)
    model = tiny()
    optimizer.build(model.trainable_variables)
    decayed = {v.path.split("/")[-1] for v in model.trainable_variables
               if optimizer._use_weight_decay(v)}
    assert decayed == {"kernel"}


def test_the_schedule_climbs_and_falls():
    rate = kdlib._optimizer(replace(RECIPE, epochs=10, warmup=0.2), steps=10).learning_rate
    optimizer = kdlib._optimizer(replace(RECIPE, epochs=10, warmup=0.2), steps=10)
    schedule = optimizer._learning_rate
    assert float(rate) == 0
    assert float(schedule(20)) == pytest.approx(RECIPE.learning_rate)
    assert float(schedule(60)) == pytest.approx(RECIPE.learning_rate / 2)
    assert float(schedule(100)) == pytest.approx(0, abs=1e-9)


def test_a_distilled_run_needs_a_teacher(data):
    with pytest.raises(ValueError, match="teacher is None"):
        train(data, method="distilled")


def test_measured_figures_by_hand(data):
    model, teacher = tiny(), tiny(8)
    logits = model.predict(data.x_test, verbose=0).astype("float64")
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    got = kdlib.measure(model, data, teacher)
    right = p.argmax(-1) == data.y_test
    alike = p.argmax(-1) == teacher.predict(data.x_test, verbose=0).argmax(-1)
    assert got["test_accuracy"] == pytest.approx(right.mean(), abs=1e-4)
    assert got["agreement"] == pytest.approx(alike.mean(), abs=1e-4)
    assert got["nll"] == pytest.approx(-np.log(p[np.arange(60), data.y_test]).mean(), abs=1e-4)


def test_published_weights_give_the_published_figures(monkeypatch):
    """Every model in reference answers as its row of results.csv says (digits)."""
    monkeypatch.setenv("KD_RETRAIN", "0")
    digits = kdlib.load_dataset("digits")
    teacher = keras.saving.load_model(kdlib.REFERENCE / "digits-teacher-seed0.keras")
    for method in ("teacher", "scratch", "distilled"):
        notes = json.loads((kdlib.REFERENCE / f"digits-{method}-seed0.json").read_text())
        model = keras.saving.load_model(kdlib.REFERENCE / f"digits-{method}-seed0.keras")
        got = kdlib.measure(model, digits, None if method == "teacher" else teacher)
        for key, value in got.items():
            if value is not None:
                assert notes["row"][key] == pytest.approx(value, abs=0.005), (method, key)
