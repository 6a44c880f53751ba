"""runs, recipes, resume, store: what is found again, what survives, what is measured."""

from reference import answers, controls, digests, fingerprints, measures  # isort: skip  (first: keeps TensorFlow quiet)
from reference import plan, recipes, resume, runs, store  # isort: skip
import ast
import contextlib
import functools
import importlib.util
import json
import math
import os
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import filelock
import kdlib
import keras
import numpy as np
import pytest
import scipy
import tensorflow as tf
from test_distiller import tiny

RECIPE = runs.Recipe(epochs=3, batch_size=10, learning_rate=0.01, views=2, flip=False)


@pytest.fixture(scope="module")
def data():
    digits = kdlib.load_dataset("digits")
    cut = {f"{a}_{part}": getattr(digits, f"{a}_{part}")[:60]
           for a in "xy" for part in ("train", "val", "test")}
    return replace(digits, **cut)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_RUNS_DIR", str(tmp_path))
    monkeypatch.setenv("KD_RETRAIN", "1")
    return tmp_path


def train(data, method="scratch", **settings):
    settings = {"build": lambda: tiny(dropout=0.3), "recipe": RECIPE, **settings}
    return runs.train_or_load(method, data, **settings)


def assert_same_weights(a, b):
    for x, y in zip(a.model.get_weights(), b.model.get_weights(), strict=True):
        np.testing.assert_array_equal(x, y)


def damage(path):
    content = bytearray(path.read_bytes())
    third = len(content) // 3
    content[third : 2 * third] = bytes(third)
    path.write_bytes(content)


def every_batch(data, recipe, *, first_epoch=0, **settings):
    """All batches in the order in which Keras asks for them."""
    batches = runs.Batches(data, recipe, first_epoch=first_epoch, **settings)
    for _ in range(first_epoch, recipe.epochs):
        batches.on_epoch_begin()
        yield from (batches[k] for k in range(len(batches)))


class Cut(Exception):
    pass


def train_and_cut(data, monkeypatch, after_epoch, **settings):
    """Train, and be struck down after an epoch, as by a kill."""
    save = resume.Keeper._save

    def save_then_die(self):
        save(self)
        if self.epoch == after_epoch:
            raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(resume.Keeper, "_save", save_then_die)
        with pytest.raises(Cut):
            train(data, **settings)


@pytest.mark.slow
def test_same_seed_same_weights(data, monkeypatch, tmp_path):
    first = train(data)
    monkeypatch.setenv("KD_RUNS_DIR", str(tmp_path / "other"))
    assert_same_weights(first, train(data))
    other = train(data, seed=1)
    assert np.any(other.model.get_weights()[0] != first.model.get_weights()[0])


@pytest.mark.slow
@pytest.mark.parametrize("method, after_epoch", [("scratch", 2), ("distilled", 1)])
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


@pytest.mark.slow
def test_a_damaged_state_is_named_and_the_one_before_taken(data, monkeypatch, folder, tmp_path):
    monkeypatch.setenv("KD_RUNS_DIR", str(tmp_path / "whole"))
    whole = train(data)
    monkeypatch.setenv("KD_RUNS_DIR", str(folder))
    train_and_cut(data, monkeypatch, 2)
    (state,) = folder.glob("digits-scratch*/state-0.npz")  # that of epoch 2
    damage(state)
    with pytest.warns(UserWarning, match="state-0.npz .* is damaged"):
        resumed = train(data)
    assert_same_weights(whole, resumed)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["model.keras", "model.json"])
def test_a_damaged_finished_run_is_named_and_trained_again(data, folder, which):
    first = train(data)
    (path,) = folder.glob(f"digits-scratch*/{which}")
    damage(path)
    with pytest.warns(UserWarning, match="model in digits-scratch.* is damaged"):
        assert_same_weights(first, train(data))


@pytest.mark.slow
def test_a_full_disk_leaves_the_state_before(data, monkeypatch, tmp_path):
    monkeypatch.setenv("KD_RUNS_DIR", str(tmp_path / "whole"))
    whole = train(data)
    monkeypatch.setenv("KD_RUNS_DIR", str(tmp_path / "full"))
    write, writes = np.savez, []

    def full_at_the_second(path, **arrays):
        writes.append(path)
        if len(writes) == 2:
            path.write_bytes(b"PK half a state")
            raise OSError(28, "No space left on device")
        write(path, **arrays)

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full_at_the_second)
        with pytest.raises(OSError, match="No space left"):
            train(data)
    assert [path.name for path in (tmp_path / "full").glob("*/state*")] == ["state-1.npz"]
    assert not list((tmp_path / "full").glob("*/aside-*"))
    assert_same_weights(whole, train(data))


def test_a_state_of_other_versions_is_not_continued(data, monkeypatch, folder):
    train_and_cut(data, monkeypatch, 1)
    monkeypatch.setattr(fingerprints, "libraries", lambda: "tensorflow 1.0")
    with pytest.raises(RuntimeError, match="begun with other libraries"):
        train(data)


@pytest.mark.slow
def test_another_process_on_the_same_run(data, folder):
    run = train(data)
    (run_folder,) = folder.glob("digits-scratch*")
    (run_folder / "model.json").unlink()
    with filelock.FileLock(run_folder / "lock", thread_local=False, is_singleton=False):
        with pytest.raises(RuntimeError, match="under way in another process"):
            train(data)
    assert run.row["method"] == "scratch"


@pytest.mark.slow
def test_a_finished_run_is_loaded_and_another_recipe_is_not(data, monkeypatch):
    first = train(data)
    monkeypatch.setattr(runs.Task, "train", lambda *a, **k: pytest.fail("trained again"))
    loaded = train(data)
    assert_same_weights(first, loaded)
    assert loaded.row == first.row and list(loaded.row) == list(runs.RESULT_COLUMNS)
    with pytest.raises(pytest.fail.Exception):
        train(data, recipe=replace(RECIPE, learning_rate=0.02))


def test_batches_carry_the_teachers_answer_to_the_very_image(data):
    teacher = tiny(8)
    logits = runs.teacher_answers(teacher, data, RECIPE)
    for (images, given), _ in every_batch(data, RECIPE, seed=3, answers=logits):
        live = np.asarray(teacher(images))
        np.testing.assert_allclose(given, live, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_new_views_with_a_live_teacher_are_the_stored_ones(data):
    """As many views as epochs: nothing is shown twice, so live and stored have to agree."""
    teacher = tiny(8)
    stored = train(data, method="distilled", teacher=teacher, recipe=replace(RECIPE, views=3))
    live = train(data, method="distilled", teacher=teacher, recipe=replace(RECIPE, views=0))
    np.testing.assert_allclose(live.history["loss"], stored.history["loss"], rtol=1e-3)


@pytest.mark.slow
def test_a_student_without_a_single_label(data):
    none = np.full_like(data.y_train, -1)
    run = train(replace(data, y_train=none), method="distilled", teacher=tiny(8))
    assert run.history["student_loss"] == [0.0] * RECIPE.epochs
    assert run.history["distillation_loss"][-1] > 0
    with pytest.raises(ValueError, match="y_train holds -1.*scratch"):
        train(replace(data, y_train=none))


def test_another_teacher_has_another_cache(data, folder):
    a = np.stack(runs.teacher_answers(tiny(8), data, RECIPE))
    b = np.stack(runs.teacher_answers(tiny(8, seed=1), data, RECIPE))
    assert np.any(a != b) and len(list(folder.glob("answers-*"))) == 2


# --- controls ---


def some_answers(count=200):
    rng = np.random.default_rng(3)
    return rng.normal(0, 4, (count, 10)).astype("float32"), rng.integers(0, 10, count)


def test_smoothed_labels_are_as_uncertain_as_the_teacher():
    logits, labels = some_answers()
    soft = scipy.special.softmax(controls.smoothed(logits, labels, 4.0) / 4, axis=-1)
    teacher = scipy.special.softmax(logits.astype("float64") / 4, axis=-1)
    want = scipy.stats.entropy(teacher, axis=-1).mean()
    np.testing.assert_allclose(scipy.stats.entropy(soft, axis=-1), want, rtol=1e-6)
    np.testing.assert_array_equal(soft.argmax(-1), labels)
    ranked = np.sort(soft, axis=-1)  # nine wrong classes, all alike
    np.testing.assert_allclose(ranked[:, :9], ranked[:, :1].repeat(9, axis=1), rtol=1e-9)


def test_a_shuffle_keeps_every_value_and_that_of_the_label():
    logits, labels = some_answers()
    shuffled = controls.shuffled(logits, labels, 4.0)
    rows = np.arange(len(labels))
    np.testing.assert_array_equal(np.sort(shuffled), np.sort(logits))
    np.testing.assert_array_equal(shuffled[rows, labels], logits[rows, labels])
    assert np.mean(shuffled != logits) > 0.7  # one value in nine stays by chance
    places = np.tile(np.arange(10.0), (200, 1))  # another view, the same shuffle
    moved = controls.shuffled(places, labels, 4.0).astype(int)
    np.testing.assert_array_equal(np.take_along_axis(logits, moved, -1), shuffled)


def test_evened_answers_keep_how_sure_the_teacher_is():
    logits, labels = some_answers()
    soft = scipy.special.softmax(controls.evened(logits, labels, 4.0) / 4, axis=-1)
    teacher = scipy.special.softmax(logits.astype("float64") / 4, axis=-1)
    rows = np.arange(len(labels))
    np.testing.assert_allclose(soft[rows, labels], teacher[rows, labels], rtol=1e-6)
    wrong = soft[np.arange(10) != labels[:, None]].reshape(len(labels), 9)
    np.testing.assert_allclose(wrong, wrong[:, :1].repeat(9, axis=1), rtol=1e-9)


def test_levelled_answers_are_as_sure_of_each_image():
    logits, labels = some_answers()
    soft = scipy.special.softmax(controls.levelled(logits, labels, 4.0) / 4, axis=-1)
    teacher = scipy.special.softmax(logits.astype("float64") / 4, axis=-1)
    mine = np.eye(10, dtype=bool)[labels]
    np.testing.assert_allclose(soft[mine], teacher[mine].mean(), rtol=1e-6)
    np.testing.assert_allclose(soft[~mine], (1 - teacher[mine].mean()) / 9, rtol=1e-6)


def test_the_seed_draws_whose_label_is_known(data):
    known = [np.flatnonzero(controls.few_labels(data, 50, hide=True, seed=seed).y_train >= 0)
             for seed in (0, 0, 1)]
    assert np.array_equal(*known[:2]) and not np.array_equal(*known[1:])
    alone = controls.few_labels(data, 50, hide=False, seed=1)
    np.testing.assert_array_equal(np.unique(alone.x_train, axis=0),
                                  np.unique(data.x_train[known[2]], axis=0))


def answers_of(teacher, data, change=lambda logits: logits):
    return [change(logits) for logits in runs.teacher_answers(teacher, data, RECIPE)]


@pytest.mark.parametrize("k", [1, 2, 3, 5, 9])
def test_top_answers_keep_the_likeliest_and_share_out_the_rest(k):
    logits = np.random.default_rng(0).normal(0, 5, (50, 10)).astype("float32")
    soft = scipy.special.softmax(logits.astype("float64") / 4, axis=-1)
    known = scipy.special.softmax(controls.top(logits, None, 4.0, k=k) / 4, axis=-1)
    for row, want in zip(known, soft, strict=True):
        best = sorted(range(10), key=lambda c: -want[c])
        np.testing.assert_allclose(row[best[:k]], want[best[:k]], rtol=1e-9)
        np.testing.assert_allclose(row[best[k:]], want[best[k:]].mean(), rtol=1e-9)


def test_a_mirrored_teacher_is_the_mean_of_two_answers(data):
    teacher = tiny()
    logits = [np.asarray(teacher(images)) for images in (data.x_val, data.x_val[:, :, ::-1])]
    found = np.asarray(controls.mirrored(teacher)(data.x_val))
    np.testing.assert_allclose(found, np.mean(logits, axis=0), atol=1e-5)


def test_teachers_together_give_their_mean_probability(data):
    teachers = [kdlib.build_teacher() for _ in range(3)]  # all of one name, as published
    soft = [scipy.special.softmax(np.asarray(each(data.x_val)).astype("float64"), axis=-1)
            for each in teachers]
    found = np.asarray(controls.together(*teachers)(data.x_val))
    np.testing.assert_allclose(np.exp(found) / 3, np.mean(soft, axis=0), rtol=1e-4)


@pytest.mark.parametrize("signal", controls.SIGNALS.values())
def test_a_signal_made_twice_is_the_same_teacher(signal):
    teachers = [tiny(seed=0)] + [tiny(seed=1)] * (signal is controls.together)
    one, other = (fingerprints.model_digest(signal(*teachers)) for _ in range(2))
    assert one == other


def test_wrong_labels_are_as_many_as_asked(data):
    wrong = controls.wrong_labels(data, 20)
    changed = wrong.y_train != data.y_train
    assert changed.sum() == 12 and (wrong.y_val == data.y_val).all()
    assert (wrong.y_train == controls.wrong_labels(data, 20).y_train).all()
    assert (wrong.y_train >= 0).all() and (wrong.y_train < 10).all()


@pytest.mark.slow
def test_answers_are_known_by_their_content(data, folder):
    teacher = tiny(8)
    plain = train(data, method="distilled", teacher=teacher)
    same = train(data, method="mine", answers=answers_of(teacher, data), taught_by="an array")
    assert_same_weights(plain, same)
    assert same.row["teacher"] == "an array" and "val_distillation_loss" not in same.history
    assert same.row["agreement"] is None  # with nobody
    for _ in range(2):  # another content is another run; the same content is found again
        other = train(data, method="mine", answers=answers_of(teacher, data, np.negative))
        assert np.any(other.model.get_weights()[0] != plain.model.get_weights()[0])
    assert len(list(folder.glob("digits-mine*"))) == 2


def turned(logits, labels, temperature):
    return temperature * _less(logits)


def _less(logits):
    return -logits / 4


def with_a_constant(logits, labels, temperature):
    return logits * len(labels) * LIMIT


LIMIT = 3.0


@functools.cache
def _limit():
    return LIMIT


class Limit:
    value = 3.0


def with_a_cache(logits, labels, temperature):
    return [logits * _limit() for _ in range(1)][0]


def with_a_class(logits, labels, temperature):
    return logits * Limit.value


@pytest.mark.slow
def test_answers_may_be_a_function_known_by_its_code(data, folder):
    teacher, changed = tiny(8), functools.partial(controls.top, k=2)
    made = train(data, method="mine", teacher=teacher, answers=changed)
    arrays = [changed(logits, data.y_train, 4.0) for logits in answers_of(teacher, data)]
    assert_same_weights(made, train(data, method="mine-too", answers=arrays))
    with mock.patch.object(runs, "teacher_answers", side_effect=AssertionError("asked again")):
        train(data, method="mine", teacher=teacher, answers=changed)
    # Its helpers count, and so does what partial binds.
    specs = [runs.Task("mine", data, teacher=teacher, answers=each, build=tiny).spec for each in (
        turned, changed, functools.partial(controls.top, k=3), controls.shuffled)]
    assert len({spec["answers"] for spec in specs}) == 4
    other = runs.Task("mine", data, teacher=tiny(6), answers=turned, build=tiny).spec
    assert other["answers"] == specs[0]["answers"] and other["teacher"] != specs[0]["teacher"]


def test_answers_are_told_by_what_they_are():
    """Not by how they are given."""
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 2000, 10))
    other[:3], other[-3:] = one[:3], one[-3:]  # as a print shows it
    assert fingerprints.answers_digest([tf.constant(one)]) == fingerprints.answers_digest(
        [one]) != fingerprints.answers_digest([tf.constant(other)])
    bound = functools.partial(mixed, a=1, b=2), functools.partial(mixed, b=2, a=1)
    assert len({*map(fingerprints.answers_digest, bound)}) == 1


def mixed(logits, labels, temperature, a, b):
    return a * logits + b


def closing_over(factor):
    def scaled(logits, labels, temperature):
        return factor * logits
    return scaled


def by_default(logits, labels, temperature, factor=2):
    return factor * logits


@pytest.mark.parametrize("function, error, said", [
    (lambda logits, labels, temperature: logits, TypeError, "answers are <function <lambda>"),
    (tiny(8), TypeError, "answers are <Functional"),
    (with_a_constant, ValueError, "by with_a_constant, which reads LIMIT: its code does not tell"),
    (with_a_cache, ValueError, "by with_a_cache, which reads _limit: its code does not tell"),
    (with_a_class, ValueError, "by with_a_class, which reads Limit: its code does not tell"),
    (functools.partial(controls.top, k=np.arange(2)), TypeError, "answers bind .*Bind numbers"),
    (closing_over(2), ValueError, "by scaled, which reads factor: its code"),
    (by_default, ValueError, "by by_default, which reads a default: its code"),
])
def test_functions_whose_code_does_not_tell_what_they_do(data, function, error, said):
    with pytest.raises(error, match=said):
        train(data, method="mine", teacher=tiny(8), answers=function)


def test_a_function_of_the_teachers_answers_needs_some(data):
    for settings in ({"teacher": None}, {"teacher": tiny(8), "recipe": replace(RECIPE, views=0)}):
        with pytest.raises(ValueError, match="answers are a function of a teacher's stored logits"):
            train(data, method="mine", answers=turned, **settings)

    def short(logits, labels, temperature):
        return logits[:, :9]

    with pytest.raises(ValueError, match="answers are 2 of shapes"):
        train(data, method="mine", teacher=tiny(8), answers=short)


@pytest.mark.parametrize("change, said", [
    (lambda a: a[:1], "answers are 1 of shapes .*Give a list of 2 arrays of logits of shape .60"),
    (lambda a: [each[:, :9] for each in a], "answers are 2 of shapes"),
    (lambda a: [np.where(each == each.max(), np.nan, each) for each in a], "answers hold nan"),
    (lambda a: [np.full_like(each, 0.1) for each in a], "answers are probabilities"),
    (lambda a: [a[0], np.full_like(a[1], 0.1)], "answers are probabilities"),
])
def test_answers_that_cannot_teach(data, change, said):
    with pytest.raises(ValueError, match=said):
        train(data, method="mine", answers=change(answers_of(tiny(8), data)))


def test_batches_show_every_image_once_an_epoch(data):
    labels = np.concatenate([y for _, y in every_batch(data, RECIPE, seed=0)])
    for epoch in np.split(labels, RECIPE.epochs):
        np.testing.assert_array_equal(np.bincount(epoch), np.bincount(data.y_train))


def test_batches_from_the_middle_are_those_of_the_whole(data):
    whole = [y for _, y in every_batch(data, RECIPE, seed=0)]
    rest = [y for _, y in every_batch(data, RECIPE, seed=0, first_epoch=2)]
    np.testing.assert_array_equal(whole[-len(rest):], rest)
    assert len(rest) == len(whole) // 3


@pytest.mark.slow
def test_both_students_begin_with_the_same_weights(data, monkeypatch):
    still = replace(RECIPE, epochs=1, learning_rate=0.0, optimizer="adam")
    build = kdlib.build_student
    scratch = train(data, recipe=still, build=build)
    distilled = train(data, method="distilled", teacher=kdlib.build_teacher(),
                      recipe=still, build=build)
    for a, b in zip(scratch.model.trainable_variables,
                    distilled.model.trainable_variables, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["muon", "sgd"])
def test_weight_decay_spares_everything_but_kernels(name):
    """A step with gradients of zero moves what decays, and nothing else."""
    model = tiny()
    optimizer = runs.make_optimizer(replace(RECIPE, optimizer=name, warmup=0.0), steps=6,
                                 last_layer=model.layers[-1].name)
    before = [np.copy(v) for v in model.trainable_variables]
    zeros = [np.zeros(v.shape, "float32") for v in model.trainable_variables]
    optimizer.apply(zeros, model.trainable_variables)
    for variable, old in zip(model.trainable_variables, before, strict=True):
        moved = np.any(np.asarray(variable) != old)
        assert moved == (variable.path.endswith("kernel")), variable.path
        if moved:
            kept = 1 - RECIPE.learning_rate * RECIPE.weight_decay
            np.testing.assert_allclose(variable, kept * old, rtol=1e-6)


def test_the_schedule_climbs_and_falls(data):
    """The rate of each epoch of a real fit: up to the peak, down to nothing."""
    rates = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            rates.append(float(self.model.optimizer.learning_rate))

    recipe = replace(RECIPE, epochs=10, warmup=0.2)
    model = tiny()
    model.compile(runs.make_optimizer(recipe, 6, last_layer="none"), "mse")
    model.fit(np.zeros((6, 32, 32, 3)), np.zeros((6, 10)), batch_size=1, epochs=10, verbose=0,
              callbacks=[Watch()])
    peak = recipe.learning_rate
    assert rates[0] == 0 and max(rates) == pytest.approx(peak)
    assert rates[12] == pytest.approx(peak) and rates[36] == pytest.approx(peak / 2)
    assert rates[6] == pytest.approx(peak / 2) and rates[-1] < peak / 100


def test_an_unknown_optimizer(data):
    with pytest.raises(ValueError, match="optimizer is 'lion'. Choose 'muon'"):
        replace(RECIPE, optimizer="lion")


def test_muon_sees_a_kernel_as_a_matrix():
    """Against Keras's own Muon on the same numbers, laid out as a matrix."""
    rng = np.random.default_rng(0)
    kernel, steps = rng.normal(size=(3, 3, 4, 8)), rng.normal(size=(3, 3, 3, 4, 8))
    image = keras.Variable(kernel.astype("float32"), name="kernel")
    matrix = keras.Variable(kernel.reshape(36, 8).astype("float32"), name="kernel")
    settings = dict(learning_rate=0.02, momentum=0.9, weight_decay=0.1)
    ours, theirs = recipes.Muon(**settings), keras.optimizers.Muon(**settings)
    for step in steps.astype("float32"):
        ours.apply([step], [image])
        theirs.apply([step.reshape(36, 8)], [matrix])
    np.testing.assert_allclose(np.reshape(image, (36, 8)), matrix, rtol=1e-5, atol=1e-6)


def test_muon_leaves_depthwise_kernels_to_adamw():
    pixels = keras.Input((8, 8, 3))
    x = keras.layers.DepthwiseConv2D(3, name="thin")(pixels)
    x = keras.layers.Conv2D(4, 1, name="dense")(x)
    optimizer, found = recipes.Muon(), {}
    for layer in keras.Model(pixels, x).layers[1:]:
        found[layer.name] = [optimizer._should_use_adamw(v) for v in layer.trainable_variables]
    assert found == {"thin": [True, True], "dense": [False, True]}  # kernel, bias


def test_the_last_layer_and_embeddings_are_kept_from_muon():
    words = keras.Input((8,), dtype="int32")
    x = keras.layers.Flatten()(keras.layers.Embedding(5, 3, name="words")(words))
    x = keras.layers.Dense(4, name="fc1")(x)
    model = keras.Model(words, keras.layers.Dense(4, name="fc")(x))
    optimizer = recipes.make_optimizer(replace(RECIPE, optimizer="muon"), 5, last_layer="fc")
    found = {v.path: optimizer._should_use_adamw(v) for v in model.trainable_variables}
    assert [path for path, adamw in found.items() if not adamw] == ["fc1/kernel"]


@pytest.mark.parametrize("wrap", [
    lambda head: [head], lambda head: [head, keras.layers.Activation("linear", dtype="float32")],
    lambda head: [keras.Sequential([keras.layers.Dense(4), head])]], ids=["", "a cast", "inside"])
def test_the_head_is_the_last_layer_that_has_weights(wrap):
    head = keras.layers.Dense(10, name="answers")
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4), *wrap(head)])
    assert recipes.head(model) == "answers"


def test_a_model_without_a_single_layer_of_weights_has_a_head():
    assert recipes.head(keras.Sequential([keras.Input((8,))], name="bare")) == "bare"


def test_a_step_of_muon_is_nearly_orthogonal():
    kernel = keras.Variable(np.zeros((3, 3, 4, 8), "float32"), name="kernel")
    optimizer = recipes.Muon(learning_rate=1.0, weight_decay=0.0, rms_rate=None)
    optimizer.apply([np.random.default_rng(0).normal(size=(3, 3, 4, 8))], [kernel])
    singular = np.linalg.svd(np.reshape(kernel, (36, 8)), compute_uv=False)
    assert (0.5 < singular).all() and (singular < 1.5).all()


def test_fused_norm_is_keras_norm():
    """Outputs, gradients and statistics against those of Keras's own layer."""
    plain, fused, gradients = tiny(), tiny(), []
    images = data_like(40)
    for model, context in ((plain, contextlib.nullcontext()), (fused, recipes.fused_norm(fused))):
        with context, tf.GradientTape() as tape:
            kinds = {type(layer) for layer in model.layers}
            assert (recipes.FusedBatchNormalization in kinds) == (model is fused)
            loss = tf.reduce_mean(model(images, training=True) ** 2)
        gradients.append(tape.gradient(loss, model.trainable_variables))
    for a, b in zip(*gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    for a, b in zip(plain.get_weights(), fused.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(plain(images), fused(images), rtol=1e-4, atol=1e-5)
    assert recipes.FusedBatchNormalization not in {type(layer) for layer in fused.layers}


def data_like(count):
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3)).astype("uint8")


@pytest.mark.parametrize("method", ["distiled", "student"])
def test_an_unknown_method(data, method):
    with pytest.raises(ValueError, match="method is"):
        train(data, method=method, teacher=tiny(8))


def test_a_batch_larger_than_the_data_is_the_data(data):
    assert len(runs.Batches(data, replace(RECIPE, batch_size=61), seed=0)) == 1


@pytest.mark.parametrize("name, value", [
    ("epochs", 0), ("epochs", 1.5), ("batch_size", 0), ("views", -1), ("shift", -1),
    ("warmup", 1), ("learning_rate", -1), ("learning_rate", math.nan), ("weight_decay", math.nan),
    ("weight_decay", -1), ("momentum", "much")])
def test_a_recipe_that_cannot_be_followed(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value!r}"):
        replace(RECIPE, **{name: value})


def test_a_model_of_other_classes_than_the_data(data):
    with pytest.raises(ValueError, match="build.* gives 12 logits, but digits has 10"):
        train(data, build=lambda: tiny(classes=12))


@pytest.mark.slow
def test_a_run_may_be_the_teacher(data):
    run = train(data, method="distilled", teacher=train(data, method="teacher"))
    assert run.row["teacher"] == "teacher-seed0"


def test_a_model_that_keras_could_not_load_back(data):
    class Own(keras.layers.Dense):
        pass

    def build():
        inner = tiny()
        return keras.Model(inner.inputs, Own(10)(inner.layers[-2].output))

    with pytest.raises(ValueError, match="cannot load back what build returns.*register"):
        train(data, build=build)


def test_a_seed_may_be_a_numpy_number_and_no_fraction(data):
    assert_same_weights(train(data, seed=np.int64(3)), train(data, seed=3))
    with pytest.raises(TypeError):
        train(data, seed=0.5)


def test_a_bad_kd_retrain(data, monkeypatch):
    monkeypatch.setenv("KD_RETRAIN", "false")
    with pytest.raises(ValueError, match="KD_RETRAIN is 'false'"):
        train(data)


def test_the_digest_of_a_model_ignores_names_and_heeds_all_else(tmp_path):
    def net(*, skip=False, activation="relu"):
        pixels = keras.Input((8,))
        inner = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8)])
        x = keras.layers.Dense(8, activation=activation, name=activation)(inner(pixels))
        return keras.Model(pixels, keras.layers.Dense(3)(x + pixels if skip else x))

    digest = fingerprints.architecture
    model = net()
    assert digest(model) == digest(net())
    assert len({digest(m) for m in (model, net(skip=True), net(activation="tanh"))}) == 3
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert fingerprints.model_digest(loaded) == fingerprints.model_digest(model)
    assert fingerprints.model_digest(net()) != fingerprints.model_digest(model)


@pytest.mark.slow
def test_a_model_is_trained_further(data, tmp_path):
    first = train(data, method="teacher")
    first.model.save(tmp_path / "teacher.keras")
    further = train(data, method="teacher-more", recipe=replace(RECIPE, learning_rate=0.001),
                    build=lambda: keras.saving.load_model(tmp_path / "teacher.keras"))
    assert further.history["loss"][0] < first.history["loss"][0]


@pytest.mark.slow
def test_agreement_is_with_the_teacher_at_hand(data):
    alone = train(data)
    assert alone.row["agreement"] is None
    for teacher in (tiny(8), tiny(8, seed=1)):
        run = train(data, teacher=teacher)
        want = runs.measure(run.model, data, teacher)["agreement"]
        assert_same_weights(alone, run)
        assert run.row["agreement"] == want


def test_a_loaded_history_tells_of_the_teacher_at_hand_alone(data):
    """What was measured beside another teacher's validation answers is left out, not repeated."""
    answers, judge, other = answers_of(tiny(8), data), tiny(8, seed=1), tiny(8, seed=2)
    first = train(data, "mine", answers=answers, teacher=judge, taught_by="somebody")
    again = train(data, "mine", answers=answers, teacher=judge, taught_by="somebody else")
    elsewhere = train(data, "mine", answers=answers, teacher=other)
    assert first.history == again.history and "val_distillation_loss" in first.history
    assert first.history.keys() - elsewhere.history.keys() == {"val_loss", "val_distillation_loss"}
    assert [run.row["teacher"] for run in (first, again)] == ["somebody", "somebody else"]


class Stops(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = True


@pytest.mark.parametrize("change", [
    Stops(), keras.callbacks.EarlyStopping("val_accuracy"),
    keras.callbacks.LearningRateScheduler(lambda epoch: 0.0)], ids=lambda each: type(each).__name__)
def test_a_callback_cannot_change_what_a_run_is_known_by(data, folder, change):
    with pytest.raises(TypeError, match="callback asks for model.*only watch.*recipe"):
        train(data, callbacks=[change])
    assert not list(folder.glob("*/model.json"))
    model = tiny()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(True), metrics=["accuracy"])
    model.fit(data.x_train, data.y_train, validation_data=(data.x_val, data.y_val), verbose=0,
              callbacks=[change])  # a model of one's own


def test_a_training_shows_how_far_it_is(data, capsys):
    train(data)
    # The later epochs are not drawn where one takes less than a tenth of a second.
    assert "scratch:" in (shown := capsys.readouterr().err) and "0/3" in shown


def test_a_callback_sees_every_epoch(data):
    seen = []
    watch = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(logs))
    run = train(data, callbacks=(each for each in [[watch]]))
    assert [round(logs["val_accuracy"], 5) for logs in seen] == run.history["val_accuracy"]


def test_a_distilled_run_needs_a_teacher(data):
    with pytest.raises(ValueError, match="teacher is None"):
        train(data, method="distilled")


def test_measured_figures_by_hand(data):
    model, teacher = tiny(), tiny(8)
    logits = np.asarray(model(data.x_test)).astype("float64")
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    got = runs.measure(model, data, teacher)
    right = p.argmax(-1) == data.y_test
    alike = p.argmax(-1) == np.asarray(teacher(data.x_test)).argmax(-1)
    assert got["test_accuracy"] == pytest.approx(right.mean(), abs=1e-4)
    assert got["agreement"] == pytest.approx(alike.mean(), abs=1e-4)
    assert got["nll"] == pytest.approx(-np.log(p[np.arange(60), data.y_test]).mean(), abs=1e-4)


# --- any Keras model with logits out ---


def residual():
    pixels = keras.Input((32, 32, 3))
    x = keras.layers.Conv2D(8, 4, strides=4)(keras.layers.Rescaling(1 / 255)(pixels))
    inner = keras.Sequential([keras.Input((8, 8, 8)), keras.layers.Conv2D(8, 3, padding="same"),
                              keras.layers.BatchNormalization(), keras.layers.ReLU()])
    x = keras.layers.GlobalAveragePooling2D()(x + inner(x))
    return keras.Model(pixels, keras.layers.Dense(10)(x))


def transformer():
    pixels = keras.Input((32, 32, 3))
    x = keras.layers.Conv2D(16, 8, strides=8)(keras.layers.Rescaling(1 / 255)(pixels))
    x = keras.layers.Reshape((16, 16))(x)
    y = keras.layers.LayerNormalization()(x)
    x = x + keras.layers.MultiHeadAttention(2, 8, dropout=0.1)(y, y)
    x = keras.layers.GlobalAveragePooling1D()(x + keras.layers.Dense(16, "gelu")(x))
    return keras.Model(pixels, keras.layers.Dense(10)(x))


@pytest.mark.slow
@pytest.mark.parametrize("build", [pytest.param(residual, marks=pytest.mark.long), transformer])
def test_other_families_can_teach(data, monkeypatch, tmp_path, build):
    """Trained, cut off and resumed, asked, cached, and distilled from."""
    monkeypatch.setenv("KD_RUNS_DIR", str(tmp_path / "whole"))
    whole = train(data, method="teacher", build=build)
    monkeypatch.setenv("KD_RUNS_DIR", str(tmp_path / "cut"))
    train_and_cut(data, monkeypatch, 2, method="teacher", build=build)
    teacher = train(data, method="teacher", build=build)
    assert_same_weights(whole, teacher)
    logits = runs.teacher_answers(teacher.model, data, RECIPE)
    (images, answers), _ = runs.Batches(data, RECIPE, seed=0, answers=logits)[0]
    np.testing.assert_allclose(answers, np.asarray(teacher.model(images)),
                               rtol=1e-4, atol=1e-5)
    before = [np.copy(w) for w in teacher.model.get_weights()]
    distilled = train(data, method="distilled", teacher=teacher.model,
                      build=lambda: tiny(2, seed=1))
    assert distilled.row["agreement"] is not None
    for old, new in zip(before, teacher.model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_fused_norm_reaches_into_nested_models():
    model = residual()
    (nested,) = [layer for layer in model.layers if isinstance(layer, keras.Model)]
    with recipes.fused_norm(model):
        assert any(isinstance(v, recipes.FusedBatchNormalization) for v in nested.layers)


# --- identity: no old result for a new question ---


@pytest.mark.slow
def test_labels_changed_in_place_are_other_data(data):
    mine = replace(data, y_train=data.y_train.copy())
    first = train(mine)
    mine.y_train[:] = mine.y_train[::-1].copy()
    assert np.any(train(mine).model.get_weights()[0] != first.model.get_weights()[0])


def weak(kernel):
    return 0.1 * keras.ops.sum(kernel**2)


def strong(kernel):
    return 0.2 * keras.ops.sum(kernel**2)


def as_strong_as(kernel, by):
    return by * keras.ops.sum(kernel**2)


def with_variable(**settings):
    """A model of which one variable was given settings that no config tells."""
    model = tiny(seed=1)
    for name, value in settings.items():
        setattr(model.layers[-1].kernel, name, value)
    return model


@pytest.mark.parametrize("one, other", [
    ({}, {"trainable": False}), ({}, {"regularizer": keras.regularizers.L2(0.1)}),
    ({"regularizer": keras.regularizers.L2(0.1)}, {"regularizer": keras.regularizers.L2(0.2)}),
    ({}, {"constraint": keras.constraints.NonNeg()}),
    ({"regularizer": weak}, {"regularizer": strong}),
    ({"regularizer": functools.partial(as_strong_as, by=0.1)},
     {"regularizer": functools.partial(as_strong_as, by=0.2)})])
def test_settings_of_a_single_variable_are_part_of_a_run(data, one, other):
    specs = [runs.Task("scratch", data, build=lambda each=each: with_variable(**each)).spec
             for each in (one, one, other)]
    assert specs[0] == specs[1] != specs[2]


def test_a_teacher_is_known_by_what_is_saved_of_it(tmp_path):
    teacher = with_variable(trainable=False)
    teacher.save(tmp_path / "teacher.keras")
    again = keras.saving.load_model(tmp_path / "teacher.keras")
    assert fingerprints.model_digest(again) == fingerprints.model_digest(teacher)


@pytest.mark.parametrize("build", [
    lambda: keras.Sequential([keras.Input((8, 8, 3)), keras.layers.DepthwiseConv2D(3)]),
    lambda: keras.Sequential([keras.Input((4,)), keras.layers.Dense(
        3, kernel_regularizer="l2", bias_constraint="non_neg"), keras.layers.BatchNormalization()]),
    kdlib.build_student])
def test_usual_variables_add_nothing_to_it(build):
    """So what was published before they were looked at is found again."""
    model, frozen = build(), build()
    frozen.layers[-1].trainable = False
    assert fingerprints.odd_variables(model) == fingerprints.odd_variables(frozen) == []


@keras.saving.register_keras_serializable("tests")
class Changing(keras.Model):
    factor, hidden = 1.0, SimpleNamespace(by=1.0)  # no text tells an object

    def __init__(self, **settings):
        super().__init__(**settings)
        self.pool, self.dense = keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10)

    def call(self, images):
        pixels = keras.ops.cast(images, "float32") / 255
        return self.factor * self.hidden.by * self.dense(self.pool(pixels))


def changing():
    model = Changing()
    model(np.zeros((1, 32, 32, 3)))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"factor": 3.0}, {"hidden": SimpleNamespace(by=1.01)}])
def test_a_model_whose_code_changed_is_not_found_again(data, monkeypatch, change):
    first = train(data, build=changing)
    assert_same_weights(first, train(data, build=changing))
    monkeypatch.setattr(Changing, *change.popitem())
    assert np.any(train(data, build=changing).model.get_weights()[0]
                  != first.model.get_weights()[0])


def test_a_teacher_whose_code_changed_is_asked_again(data, monkeypatch):
    teacher = changing()
    first = runs.stored_answers(teacher, data, "val").copy()
    monkeypatch.setattr(Changing, "factor", 1.001)  # seen in the code, however small
    teacher.make_predict_function(force=True)
    again = runs.stored_answers(teacher, data, "val").copy()
    np.testing.assert_allclose(again, 1.001 * first, rtol=1e-5)
    monkeypatch.setattr(Changing.hidden, "by", 1.01)  # seen in the answers
    teacher.make_predict_function(force=True)
    with pytest.warns(UserWarning, match="are not this teacher's"):
        third = runs.stored_answers(teacher, data, "val")
    np.testing.assert_allclose(third, 1.01 * again, rtol=1e-5)


@pytest.mark.parametrize("damaged", [lambda c: c[:-5], lambda c: c[:200] + b"x" + c[201:]])
def test_damaged_answers_are_made_again(data, folder, damaged):
    teacher = tiny(8)
    first = np.array(runs.stored_answers(teacher, data, "val"))  # not the file that is damaged
    (path,) = folder.glob("answers-*/val.npy")
    path.write_bytes(damaged(path.read_bytes()))
    with pytest.warns(UserWarning, match="val.npy in answers-.* is damaged"):
        np.testing.assert_array_equal(runs.stored_answers(teacher, data, "val"), first)


@pytest.mark.slow
@pytest.mark.parametrize("become", ["whole", "short", "another's", "gone"])
def test_a_loaded_run_has_the_logits_of_its_model(data, folder, become):
    run = train(data)
    (path,) = folder.glob("*/answers.npz")
    if become == "short":
        path.write_bytes(path.read_bytes()[:-50])
    elif become == "another's":
        kept = {name: logits[::-1] for name, logits in np.load(path).items()}
        np.savez(path, **kept)
    elif become == "gone":
        path.unlink()
    loaded = train(data)
    for part, images in (("val", data.x_val), ("test", data.x_test)):
        want = run.model.predict(images, verbose=0)
        for logits in (run.logits[part], loaded.logits[part]):
            assert logits.dtype == "float32"
            np.testing.assert_allclose(logits, want, rtol=1e-3, atol=1e-4)
            np.testing.assert_array_equal(logits.argmax(-1), want.argmax(-1))


def test_half_precision_keeps_the_answered_class():
    """Logits closer to each other than half precision can tell."""
    rng = np.random.default_rng(0)
    logits = np.float32(20 + 1e-3 * rng.normal(size=(500, 10)))
    assert np.mean(logits.astype("float16").argmax(-1) == logits.argmax(-1)) < 0.9
    half = measures.halved({"val": logits})["val"]
    np.testing.assert_array_equal(half, half.astype("float16"))
    np.testing.assert_array_equal(half.argmax(-1), logits.argmax(-1))
    np.testing.assert_allclose(half, logits, atol=2 * 2**-6)  # the steps between 16 and 32


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"row": 1, "seal": "another"}'])
def test_damaged_notes_are_named(content, tmp_path):
    path = tmp_path / "digits-scratch-seed7.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="digits-scratch-seed7.json"):
        store.read_notes(path)


@pytest.mark.parametrize("value", [np.int64(3), np.float32(0.5), np.bool_(True)])
def test_a_number_of_numpys_is_the_number(value):
    """epochs=table.epochs.max() is no other run than epochs=3."""
    assert digests.text({"a": value}) == digests.text({"a": value.item()})


def test_a_state_in_bfloat16_is_read_back_to_the_bit(tmp_path):
    values = np.array([1.5, -3e38, 2**-130], "float32")
    first, again = (SimpleNamespace(
        variables=[keras.Variable(start, dtype="bfloat16")], trainable_variables=[],
        optimizer=SimpleNamespace(variables=[], build=lambda variables: None))
        for start in (values, 0 * values))
    keeper = resume.Keeper(tmp_path)
    keeper._model = first
    keeper._save()
    resume.Keeper(tmp_path).restore(again)
    np.testing.assert_array_equal(*(np.asarray(each.variables[0]).view("uint16")
                                    for each in (first, again)))


def test_notes_that_somebody_changed_are_not_believed(data, folder):
    train(data)
    (path,) = folder.glob("digits-scratch*/model.json")
    notes = json.loads(path.read_text())
    notes["row"]["test_accuracy"] = 0.99
    path.write_text(json.dumps(notes))
    with pytest.warns(UserWarning, match="is damaged .*notes were changed"):
        assert train(data).row["test_accuracy"] < 0.9


@pytest.mark.slow
def test_a_run_of_other_libraries_is_loaded_with_a_word(data, monkeypatch):
    first = train(data)
    monkeypatch.setattr(fingerprints, "libraries", lambda: "tensorflow 1.0")
    with pytest.warns(UserWarning, match="was made with tensorflow 2.*Without its folder"):
        assert_same_weights(first, train(data))


@pytest.mark.slow
def test_a_published_run_of_other_code_is_trained_anew_with_a_word(data, folder, monkeypatch):
    """Two folders of the same spec differ in the digest of code: reference is found by name."""
    first = train(data)
    reference = folder / "reference"
    for kind, suffix in (("rows", "json"), ("weights", "keras")):
        (reference / kind).mkdir(parents=True)
        (made,) = folder.glob(f"*/model.{suffix}")
        shutil.copy(made, reference / kind / f"digits-scratch-seed0.{suffix}")
    monkeypatch.setattr(runs, "REFERENCE", reference)
    monkeypatch.setattr(runs, "CODE", "of tomorrow")
    monkeypatch.setenv("KD_RETRAIN", "0")
    with pytest.warns(UserWarning, match="digits-scratch-seed0 was made by other code.*--restamp"):
        again = train(data)
    assert_same_weights(first, again)
    assert len(list(folder.glob("*/model.keras"))) == 2


def test_a_tree_is_the_same_on_each_version_of_python():
    """Newer ones have fields more, which are empty in code that older ones can read."""
    tree = ast.parse("def f(x, y=None): return [x, 'None', None]")
    before = digests._bare(tree)
    assert digests._bare(ast.parse("def f(x, y=None): return [x, 'None', 0]")) != before
    tree.body[0].type_params, tree.body[0].new = [], None
    tree.body[0]._fields += ("type_params", "new")
    assert digests._bare(tree) == before


def imported(path, text):
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_code_is_read_before_its_file_is_edited(tmp_path):
    path, text = tmp_path / "edited.py", "def f(x):\n    return x\n"
    module, asked_late = imported(path, text), imported(path, text)
    first = digests.code_digest(module.f)
    edited = "def g(x):\n    return 2 * x\n\n\ndef f(x):\n    return 3 * x\n"
    path.write_text(edited)
    assert digests.code_digest(module.f) == first
    with pytest.warns(UserWarning, match="edited.py was edited after its import, so f is still"):
        late = digests.code_digest(asked_late.f)
    assert late != digests.code_digest(imported(path, edited).f)
    path.write_text(f"# A comment moves its lines.\n{text}")
    assert digests.code_digest(imported(path, path.read_text()).f) == first


def test_a_file_that_became_no_code_is_edited_too(tmp_path):
    module = imported(tmp_path / "edited.py", "def f(x):\n    return x\n")
    (tmp_path / "edited.py").write_text("def f(x):\n    return x\n\n\ndef g(:\n")
    with pytest.warns(UserWarning, match="edited.py was edited after its import"):
        assert digests.code_digest(module.f)


def test_lines_that_moved_are_not_taken_for_a_functions_source(tmp_path):
    text = "def g(x):\n    return x\n\n\ndef f(x):\n    return 2 * x\n"
    module = imported(tmp_path / "edited.py", text)
    (tmp_path / "edited.py").write_text(f"# one\n# two\n# three\n{text}")
    with pytest.warns(UserWarning, match="edited.py was edited after its import"):
        late = digests.code_digest(module.f)
    moved = imported(tmp_path / "edited.py", (tmp_path / "edited.py").read_text())
    assert late not in {digests.code_digest(moved.f), digests.code_digest(moved.g)}


def test_code_that_was_replaced_in_place_is_another():
    """As IPython's autoreload does."""
    def f(x):
        return x

    first = digests.code_digest(f)
    f.__code__ = (lambda x: 3 * x).__code__
    assert digests.code_digest(f) != first


def test_the_code_of_own_layers_is_part_of_an_architecture():
    def made(factor):
        class Base(keras.layers.Layer):
            if factor == 2:
                def call(self, x, training=None):
                    return 2 * x if training else x
            else:
                def call(self, x, training=None):
                    return 3 * x if training else x

        class Own(Base):  # what it inherits counts, too
            pass

        return keras.Sequential([keras.Input((4,)), Own(name="own"), keras.layers.Dense(2)])

    two, again, three = (fingerprints.architecture(made(factor)) for factor in (2, 2, 3))
    assert two == again != three


SLOPE = 2.0


def bend(x):
    return keras.ops.maximum(x, SLOPE * x)


def bent(x):
    return bend(x)


class Bending(keras.layers.Layer):
    slope = 1.0

    @property
    def twice(self):
        return 2 * self.slope

    def call(self, x):
        return bend(x) * self.twice


class Bender(keras.regularizers.Regularizer):
    def __call__(self, x):
        return keras.ops.sum(bend(x))

    def get_config(self):
        return {}


class Settings:
    """What no config can hold, so that the model has none."""


class Bare(keras.Model):
    def __init__(self, settings):
        super().__init__()
        self.dense = keras.layers.Dense(2)

    def call(self, x):
        return bend(self.dense(x))


def bare(pixels):
    model = Bare(Settings())
    model(np.zeros((1, 4)))
    return model


@pytest.mark.parametrize("make", [
    lambda x: keras.Model(x, keras.layers.Lambda(bent)(x)),
    lambda x: keras.Model(x, keras.layers.Dense(2, activation=bent)(x)),
    lambda x: keras.Model(x, keras.layers.Dense(2, kernel_regularizer=Bender())(x)),
    lambda x: keras.Model(x, Bending()(x)), bare],
    ids=["Lambda", "activation", "regularizer", "layer", "bare"])
@pytest.mark.parametrize("change", [("SLOPE", 3.0), ("bend", keras.activations.gelu)],
                         ids=["constant", "helper"])
def test_what_a_model_calls_and_reads_is_part_of_its_architecture(make, change, monkeypatch):
    first, again = (fingerprints.architecture(make(keras.Input((4,)))) for _ in range(2))
    monkeypatch.setitem(globals(), *change)
    assert first == again != fingerprints.architecture(make(keras.Input((4,))))


@pytest.mark.parametrize("change, same", [
    (lambda z: z * 1.0005, True), (lambda z: z * 1.002, False), (lambda z: z + np.inf, False),
    (lambda z: np.where(z > 0, -np.inf, z), False), (lambda z: z * np.nan, False)])
def test_answers_are_alike_where_they_differ_by_rounding(change, same):
    model, logits = tiny(), np.random.default_rng(0).normal(0, 20, (8, 10))
    assert fingerprints.alike(model, logits, change(logits)) == same
    logits[:, 3] = -np.inf  # a class that the teacher excludes
    assert fingerprints.alike(model, logits, logits)


def test_a_function_without_a_source_has_its_bytecode():
    def made(factor):
        space = {}
        exec(f"def f(x):\n    return sum(k * x for k in ({factor},))", space)
        return digests.code_digest(space["f"])

    assert made(2) == made(2) != made(3)


@pytest.mark.parametrize("taken", ["from far import double", "import far"])
@pytest.mark.parametrize("inside", [False, True], ids=["above", "inside"])
@pytest.mark.parametrize("change", [("(2)", "(3)"), ("* x", "+ x"), ("range(1)", "range(2)")])
def test_helpers_in_another_module_of_ones_own_count(taken, inside, change, tmp_path, monkeypatch):
    """Of a model, and of a function that makes answers; libraries do not."""
    call, found = "double(x)" if "from" in taken else "far.double(x)", []
    far = ("import functools\nimport numpy as np\n\nTWO = np.float32(2)\n\n\n@functools.cache\n"
           "def some():\n    return [0 for _ in range(1)]\n\n\n"
           "def double(x):\n    return TWO * x + some()\n")
    above, within = ("", f"    {taken}\n") if inside else (f"{taken}\n", "")
    near = f"import numpy as np\n{above}\n\ndef made(x, y, t):\n{within}    return np.abs({call})\n"
    for k, text in enumerate((far, far, far.replace(*change))):
        (tmp_path / f"{k}").mkdir()
        monkeypatch.setitem(sys.modules, "far", imported(tmp_path / f"{k}" / "far.py", text))
        made = imported(tmp_path / f"{k}" / "near.py", near).made
        assert np.abs not in digests.with_helpers(made)
        pixels = keras.Input((4,))
        model = keras.Model(pixels, keras.layers.Dense(2, activation=made)(pixels))
        found.append((fingerprints.architecture(model), fingerprints.answers_digest(made)))
    (one, two), again, others = found
    assert (one, two) == again and one != others[0] and two != others[1]


class Untold(keras.layers.Layer):
    def __init__(self, settings):  # no config tells them
        super().__init__()


class Holds(keras.layers.Layer):
    """It uses what it holds in training only: neither answers nor its config tell it."""

    def __init__(self, held):
        super().__init__()
        self.held = held

    def get_config(self):
        return {}

    def call(self, x, training=None):
        return ops_on(x, self.held) if training else x


def ops_on(x, held):
    return held(x) if callable(held) else held["a"](x) if isinstance(held, dict) else held * x


class Scale:
    def __init__(self, by):
        self.by = by

    def __call__(self, x):
        return self.by * x


def scaled(by):
    def scale(x):
        return by * x
    return scale


def decorated(by):
    @functools.wraps(bend)
    def scale(x):
        return by * bend(x)
    return scale


def either(value):
    return bend if value == 1 else bent


HELD = {
    "closure": scaled, "decorator": decorated, "object": Scale, "number": float,
    "dict": lambda value: {"a": either(value)},
    "cache": lambda value: functools.cache(either(value)),
    "lambda": lambda value: (lambda x: x) if value == 1 else (lambda x: -x),
    "partial": lambda value: functools.partial(either(value)),
    "bound": lambda value: functools.partial(keras.ops.power, x2=np.float32(value)),
    "bound with a function": lambda value: functools.partial(bend, bent, value)}


@pytest.mark.parametrize("held", HELD)
def test_what_a_layer_holds_is_part_of_an_architecture(held):
    one, again, two = (in_a_model(Holds(HELD[held](value))) for value in (1, 1, 2))
    assert one == again != two


def in_a_model(*some):
    x = pixels = keras.Input((4,))
    for layer in some:
        x = layer(x)
    return fingerprints.architecture(keras.Model(pixels, x))


def test_which_layer_holds_what():
    found = [in_a_model(*(Holds(scaled(by)) for by in order))
             for order in ((2, 3), (3, 2), (2, 2, 3), (2, 3, 3))]
    assert len({*found, in_a_model(Holds(scaled(2)), Holds(scaled(3)))}) == 4


def test_a_regularizer_of_activities_and_a_partial_that_keras_cannot_save():
    for made in (lambda value: {"activity_regularizer": either(value)},
                 lambda value: {"activation": functools.partial(
                     keras.ops.leaky_relu, negative_slope=value / 10)}):
        one, again, two = (in_a_model(keras.layers.Dense(3, **made(value))) for value in (1, 1, 2))
        assert one == again != two


def test_operations_in_place_of_layers():
    """Keras numbers them anew in each model."""
    def added(by=1):
        pixels = keras.Input((4,))
        return keras.Model(pixels, keras.layers.Dense(4)(pixels) + pixels * by)

    def nested():
        pixels = keras.Input((4,))
        return keras.Model(pixels, added()(pixels))

    one, again, two = (fingerprints.architecture(added(by)) for by in (1, 1, 2))
    assert one == again != two
    assert fingerprints.architecture(nested()) == fingerprints.architecture(nested())


def test_a_lambda_is_the_same_after_loading(tmp_path):
    pixels = keras.Input((4,))
    model = keras.Model(pixels, keras.layers.Lambda(lambda x: 2 * x)(pixels))
    model.save(tmp_path / "a.keras")
    loaded = keras.saving.load_model(tmp_path / "a.keras", safe_mode=False)
    assert fingerprints.architecture(loaded) == fingerprints.architecture(model)
    assert digests.code_digest(*(lambda x: x, lambda x: -x)) != digests.code_digest(
        *(lambda x: x, lambda x: x))


class AttrDict(dict):
    __getattr__ = dict.__getitem__


class Itself:
    def __getattr__(self, name):
        return self


def endless():
    value = [1]
    value.append(value)
    return value


@pytest.mark.parametrize("made", [lambda: AttrDict(k=2), Itself, endless])
def test_odd_objects_are_no_trap(made, monkeypatch):
    value = made()
    if made is not endless:  # which no layer can hold
        assert in_a_model(Holds(value)) == in_a_model(Holds(value))
    monkeypatch.setitem(globals(), "SLOPE", value)
    assert digests.code_digest(bend)


def closure(value):
    class Noisy(keras.layers.Layer):
        def call(self, x, training=None):
            return x + value if training else x
    return Noisy()


def default(value):
    class Noisy(keras.layers.Layer):
        def call(self, x, training=None, k=value):
            return x + k if training else x
    return Noisy()


def listed(value):
    class Noisy(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.steps = [bend if value == 1 else bent]

        def call(self, x, training=None):
            return self.steps[0](x) if training else x
    return Noisy()


def setting(value):
    class Noisy(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.dropout, self.untold = keras.layers.Dropout(value / 10), Untold(Settings())

        def call(self, x, training=None):
            return self.dropout(x, training=training)
    return Noisy()


def inner(value):
    class Noisy(keras.layers.Layer):
        def call(self, x, training=None):
            return self.dropout(x, training=training)
    layer = Noisy()
    layer.dropout = keras.layers.Dropout(value / 10)
    return layer


def outside(value):
    class Noisy(keras.layers.Layer):
        def call(self, x, training=None):
            return shifted(self, x) if training else x
    layer = Noisy()
    layer.shift = value
    return layer


def shifted(layer, x):
    return (lambda: x + layer.shift)()


def tensor(value):
    class Noisy(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.shift = keras.ops.convert_to_tensor([0.5, value])

        def call(self, x, training=None):
            return x + self.shift[1] if training else x
    return Noisy()


@pytest.mark.parametrize("layer", [closure, default, listed, setting, inner, outside, tensor])
def test_what_acts_in_training_only_is_part_of_an_architecture(layer):
    """No answer tells it."""
    pixels = keras.Input((4,))
    one, again, two = (fingerprints.architecture(keras.Model(pixels, layer(value)(pixels)))
                       for value in (1, 1, 2))
    assert one == again != two


@pytest.mark.parametrize("value, other", [
    (np.array([0.1]), np.array([0.9])), ({1, "a"}, {2, "a"}), ([1, "a"], [2, "a"])])
def test_a_constant_may_be_an_array_or_a_set(value, other, monkeypatch):
    found = []
    for each in (value, value.copy(), other):
        monkeypatch.setitem(globals(), "SLOPE", each)
        found.append(digests.code_digest(bend))
    assert found[0] == found[1] != found[2]


def test_a_constant_that_no_text_tells_is_left_out(monkeypatch):
    monkeypatch.setitem(globals(), "SLOPE", {1: "a", "b": 2})
    assert digests.code_digest(bend) == digests.code_digest(bend)


def test_what_keras_keeps_in_each_layer_is_no_part_of_an_architecture():
    """Though code of one's own reads it."""
    class Telling(keras.layers.Layer):
        def call(self, x):
            return x if self.built and self.trainable else 2 * x

    pixels = keras.Input((4,))
    model = keras.Model(pixels, Telling()(pixels))
    first = fingerprints.architecture(model)
    model(np.zeros((1, 4)))
    model.compile("sgd", "mse")
    model.fit(np.zeros((1, 4)), np.zeros((1, 4)), verbose=0)
    assert fingerprints.architecture(model) == first


def test_the_size_of_the_first_batch_does_not_change_a_model():
    digests = []
    for size in (1, 8):
        model = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(3)])
        model(np.zeros((size, 4, 4)))
        digests.append(fingerprints.architecture(model))
    assert digests[0] == digests[1]


def test_how_a_model_was_compiled_does_not_change_it():
    def own_loss(y, z):
        return keras.ops.mean((y - z) ** 2)

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    first = fingerprints.model_digest(model)
    model.compile(recipes.Muon(), loss=own_loss, metrics=[own_loss])
    assert fingerprints.model_digest(model) == first


@pytest.mark.parametrize("change", [("slope", 2.0), ("twice", property(lambda self: 3.0))])
def test_attributes_and_properties_of_a_layer_are_part_of_it(change, monkeypatch):
    pixels = keras.Input((4,))
    model = keras.Model(pixels, Bending()(pixels))
    first = fingerprints.architecture(model)
    monkeypatch.setattr(Bending, *change)
    assert fingerprints.architecture(model) != first


@pytest.mark.parametrize("part", ["_as_float", "check_images", "_are_probabilities", "_scales"])
def test_the_code_of_a_run_holds_what_the_distiller_calls(part):
    """Also through the closure in which a Distiller asks its teacher."""
    parts = digests.with_helpers(
        kdlib.distillation_loss, kdlib.Distiller.__init__, kdlib.Distiller.compute_loss)
    assert getattr(kdlib, part) in parts and recipes._as_matrix in digests.with_helpers(
        recipes.Muon)


def test_a_file_that_is_being_written_is_in_no_list(tmp_path):
    seen = []

    def write(aside):
        aside.write_text("half")
        seen.extend(tmp_path.glob("*.json"))
        assert aside.suffix == ".json"  # some writers look at it

    store.write_whole(tmp_path / "row.json", write)
    assert seen == [] and [path.name for path in tmp_path.iterdir()] == ["row.json"]


def test_a_trainers_teacher_is_part_of_the_run_beside_given_answers(data):
    answers = [np.full((60, 10), k, "float32") - np.eye(10, dtype="float32")[data.y_train]
               for k in range(2)]
    trainer = plan.features.Trainer("dist", 1.0)
    specs = [runs.Task("distilled-dist", data, build=tiny, teacher=tiny(8, seed=seed),
                       answers=answers, recipe=RECIPE, trainer=trainer).spec for seed in (0, 1)]
    assert specs[0]["teacher"] != specs[1]["teacher"]


def test_a_shift_that_no_reflection_fills(data):
    with pytest.raises(ValueError, match="shift is 32. It has to be smaller than 32"):
        train(data, recipe=replace(RECIPE, shift=32))


@pytest.mark.slow
def test_another_number_of_threads_is_named_on_resume(data, monkeypatch, folder):
    train_and_cut(data, monkeypatch, 1)
    monkeypatch.setattr(fingerprints, "machine", lambda: "1 cores, something else")
    with pytest.warns(UserWarning, match="was begun on .* and goes on with 1 cores"):
        train(data)
    (path,) = folder.glob("digits-scratch*/model.json")
    assert len(store.read_notes(path)["machines"]) == 2


@pytest.mark.parametrize("asked, threads", [("3", "3"), ("0", None), ("", None), ("many", None)])
def test_threads_asked_for_in_the_environment_are_named(asked, threads, monkeypatch):
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", asked)
    usual = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
                else os.cpu_count())
    assert fingerprints.machine().startswith(f"{threads or usual} cores, ")


def test_other_kernels_asked_for_in_the_environment_are_named(monkeypatch):
    usual = fingerprints.machine()
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "1")
    assert fingerprints.machine() == usual
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "0")
    assert fingerprints.machine() == f"{usual}, TF_ENABLE_ONEDNN_OPTS=0"


@pytest.mark.parametrize("method", ["distilled-/../../x", "../x", "distilled x", ""])
def test_a_method_cannot_leave_the_runs_folder(data, method):
    with pytest.raises(ValueError, match="method is"):
        train(data, method=method, teacher=tiny(8))


@pytest.mark.parametrize("name", ["../../x", "/x", "", None])
def test_a_dataset_cannot_either(data, name):
    with pytest.raises(ValueError, match="dataset.name is"):
        train(replace(data, name=name))


def test_a_dataset_may_have_any_other_name(data, folder):
    assert train(replace(data, name="Blümchen (small)")).folder.parent == folder


# --- small data, half precision, divergence, the disk ---


@pytest.mark.parametrize("count, size", [(59, 10), (60, 31), (53, 1)])
def test_every_image_is_in_each_epoch(data, count, size):
    few = replace(data, x_train=data.x_train[:count], y_train=data.y_train[:count])
    labels = np.concatenate([y for _, y in every_batch(
        few, replace(RECIPE, epochs=1, batch_size=size), seed=0)])
    np.testing.assert_array_equal(np.bincount(labels), np.bincount(few.y_train))


def test_a_prime_number_of_steps_trains_each_of_them(data, monkeypatch):
    few = replace(data, x_train=data.x_train[:29], y_train=data.y_train[:29])
    steps, save = [], resume.Keeper._save

    def count(keeper):
        steps.append([int(keeper.model.optimizer.iterations), keeper.model.steps_per_execution])
        save(keeper)

    monkeypatch.setattr(resume.Keeper, "_save", count)
    train(few, recipe=replace(RECIPE, batch_size=1))
    assert steps == [[29, 24], [58, 24], [87, 24]]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "bfloat16"])
def test_half_precision_teachers(data, policy):
    keras.config.set_dtype_policy(policy)
    try:
        teacher = tiny(8)
    finally:
        keras.config.set_dtype_policy("float32")
    assert runs.predict_logits(teacher, data.x_val).dtype == np.float32
    assert np.isfinite(train(data, method="distilled", teacher=teacher).history["loss"]).all()


@pytest.mark.parametrize("method", ["scratch", "distilled"])
def test_divergence_is_named_and_remembered(method, data, folder):
    wild = replace(RECIPE, optimizer="sgd", learning_rate=1e30, warmup=0.0)
    sentences, teacher = [], tiny(8) if method == "distilled" else None
    for _ in range(2):
        with pytest.raises(FloatingPointError, match=f"digits-{method}.*Choose a smaller") as error:
            train(data, method, recipe=wild, teacher=teacher)
        sentences.append(str(error.value))
    assert sentences[0] == sentences[1] and "in epoch 1" in sentences[0]


@keras.saving.register_keras_serializable()
class Breaks(keras.layers.Layer):
    """Passes on what comes, and infinity from its tenth step of training on."""

    def build(self, shape):
        self.steps = self.add_weight(initializer="zeros", trainable=False)

    def call(self, inputs, training=False):
        if training:
            self.steps.assign_add(1.0)
        return keras.ops.where(self.steps > 9, np.inf, 1.0) * inputs


def test_the_epoch_of_a_divergence(data):
    def build():
        inputs = keras.Input((32, 32, 3))
        seen = keras.layers.GlobalAveragePooling2D()(Breaks()(inputs))
        return keras.Model(inputs, keras.layers.Dense(10)(seen))

    with pytest.raises(FloatingPointError, match="not finite in epoch 2: it diverged"):
        train(data, build=build)  # six steps an epoch


def test_the_last_step_may_be_the_one_that_diverges(data):
    one_step = replace(RECIPE, epochs=1, batch_size=60, optimizer="sgd", learning_rate=1e30,
                       warmup=0.0)
    with pytest.raises(FloatingPointError, match="digits-scratch.*it diverged"):
        train(data, recipe=one_step)


def test_a_kept_divergence_that_is_damaged_or_of_other_libraries_is_tried_again(data, folder):
    wild = replace(RECIPE, optimizer="sgd", learning_rate=1e30, warmup=0.0)

    def diverge():
        with pytest.raises(FloatingPointError) as error:
            train(data, recipe=wild)
        return error.value.folder / "diverged.json"

    path = diverge()
    damage(path)
    with pytest.warns(UserWarning, match="diverged.json is damaged"):
        assert diverge() == path
    notes = store.read_notes(path)
    store.write_notes(path, notes | {"row": notes["row"] | {"versions": "older"}})
    diverge()
    assert store.read_notes(path)["row"]["versions"] == fingerprints.libraries()


@pytest.mark.slow
def test_averaged_weights_survive_a_cut(data, monkeypatch, tmp_path):
    averaged = replace(RECIPE, average=0.9)
    monkeypatch.setenv("KD_RUNS_DIR", str(tmp_path / "whole"))
    whole = train(data, recipe=averaged)
    assert np.any(whole.model.get_weights()[0] != train(data).model.get_weights()[0])
    monkeypatch.setenv("KD_RUNS_DIR", str(tmp_path / "cut"))
    train_and_cut(data, monkeypatch, 2, recipe=averaged)
    assert_same_weights(whole, train(data, recipe=averaged))


def test_bad_settings_are_refused_before_the_teacher_is_asked(data, monkeypatch):
    monkeypatch.setattr(answers, "stored_answers", lambda *a, **k: pytest.fail("asked"))
    for settings in ({"temperature": 0}, {"alpha": 2}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            train(data, method="distilled", teacher=tiny(8), **settings)


def test_images_of_another_size(data):
    small = {f"x_{part}": getattr(data, f"x_{part}")[:, :28, :28]
             for part in ("train", "val", "test")}
    with pytest.raises(ValueError, match="images have shape .*28.* but the teacher takes"):
        train(replace(data, **small), teacher=tiny(8))
    with pytest.raises(ValueError, match="raw pixels"):
        runs.predict_logits(kdlib.build_student(), (data.x_val / 255).astype("float32"))


def test_a_runs_folder_that_cannot_be_written(data, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("KD_RUNS_DIR", str(tmp_path / "file"))
    with pytest.raises(OSError, match="KD_RUNS_DIR, for runs, is .*file"):
        train(data)
    monkeypatch.setenv("KD_RUNS_DIR", str(tmp_path / "runs"))
    (runs.Task("scratch", data, build=tiny, recipe=RECIPE).folder / "lock").mkdir(parents=True)
    with pytest.raises(OSError, match="lock.*KD_RUNS_DIR, for runs, is .*runs"):
        train(data, build=tiny)
    monkeypatch.setattr(keras.Model, "save", mock.Mock(side_effect=OSError(28, "full")))
    with pytest.raises(OSError, match="full: .*KD_RUNS_DIR, for runs, is .*runs"):
        train(data)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KD_RUNS_DIR", "~/mine")
    assert runs.runs_folder() == tmp_path / "mine"
