"""train_or_load: exact resume, damaged states, caches, what is loaded and what is not."""

import kdlib  # isort: skip
import json
from dataclasses import replace

import keras
import numpy as np
import pandas as pd
import pytest
import scipy
import tensorflow as tf
from conftest import CIFAR10
from test_distiller import tiny

RECIPE = kdlib.Recipe(epochs=3, batch_size=10, learning_rate=0.01, views=2, flip=False)


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


def damage(path):
    content = bytearray(path.read_bytes())
    third = len(content) // 3
    content[third : 2 * third] = bytes(third)
    path.write_bytes(content)


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
    (state,) = runs.glob("digits-scratch*/state-0.npz")  # that of epoch 2
    damage(state)
    with pytest.warns(UserWarning, match="state-0.npz .* is damaged"):
        resumed = train(data)
    assert_same_weights(whole, resumed)


@pytest.mark.parametrize("which", ["model.keras", "model.json"])
def test_a_damaged_finished_run_is_named_and_trained_again(data, runs, which):
    first = train(data)
    (path,) = runs.glob(f"digits-scratch*/{which}")
    damage(path)
    with pytest.warns(UserWarning, match="model in digits-scratch.* is damaged"):
        assert_same_weights(first, train(data))


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
        train(data, recipe=replace(RECIPE, learning_rate=0.02))


def test_batches_carry_the_teachers_answer_to_the_very_image(data):
    teacher = tiny(8)
    logits = kdlib.teacher_logits(teacher, data, RECIPE)
    for (images, answers), _ in kdlib.batches(data, RECIPE, seed=3, teacher_logits=logits):
        live = teacher.predict(images, verbose=0)
        np.testing.assert_allclose(answers, live, rtol=1e-4, atol=1e-5)


def test_new_views_with_a_live_teacher_are_the_stored_ones(data):
    """As many views as epochs: nothing is shown twice, so live and stored have to agree."""
    teacher = tiny(8)
    stored = train(data, method="distilled", teacher=teacher, recipe=replace(RECIPE, views=3))
    live = train(data, method="distilled", teacher=teacher, recipe=replace(RECIPE, views=0))
    np.testing.assert_allclose(live.history["loss"], stored.history["loss"], rtol=1e-3)


def test_an_unknown_label_weighs_nothing(data):
    some, none = data.y_train.copy(), np.full_like(data.y_train, -1)
    some[::3] = -1
    for part in kdlib.batches(replace(data, y_train=some), RECIPE, seed=0):
        images, labels, weights = part
        assert labels.numpy().min() >= 0 and set(weights.numpy()) <= {0.0, 1.0}
    seen = list(kdlib.batches(replace(data, y_train=some), RECIPE, seed=0).take(6))
    assert sum(weights.numpy().sum() for *_, weights in seen) == np.sum(some >= 0)
    run = train(replace(data, y_train=none), method="distilled", teacher=tiny(8))
    assert run.history["student_loss"] == [0.0] * RECIPE.epochs
    assert run.history["distillation_loss"][-1] > 0


def test_another_teacher_has_another_cache(data, runs):
    a = kdlib.teacher_logits(tiny(8), data, RECIPE)
    b = kdlib.teacher_logits(tiny(8, seed=1), data, RECIPE)
    assert np.any(a != b) and len(list(runs.glob("logits-*"))) == 2


# --- controls ---


def some_answers(count=200):
    rng = np.random.default_rng(3)
    return rng.normal(0, 4, (count, 10)).astype("float32"), rng.integers(0, 10, count)


def test_smoothed_labels_are_as_uncertain_as_the_teacher():
    logits, labels = some_answers()
    soft = scipy.special.softmax(kdlib.without_dark_knowledge(logits, labels, 4.0) / 4, axis=-1)
    teacher = scipy.special.softmax(logits.astype("float64") / 4, axis=-1)
    want = scipy.stats.entropy(teacher, axis=-1).mean()
    np.testing.assert_allclose(scipy.stats.entropy(soft, axis=-1), want, rtol=1e-6)
    np.testing.assert_array_equal(soft.argmax(-1), labels)
    ranked = np.sort(soft, axis=-1)  # nine wrong classes, all alike
    np.testing.assert_allclose(ranked[:, :9], ranked[:, :1].repeat(9, axis=1), rtol=1e-9)


def test_a_shuffle_keeps_every_value_and_that_of_the_label():
    logits, labels = some_answers()
    shuffled = kdlib.with_shuffled_dark_knowledge(logits, labels, 4.0)
    rows = np.arange(len(labels))
    np.testing.assert_array_equal(np.sort(shuffled), np.sort(logits))
    np.testing.assert_array_equal(shuffled[rows, labels], logits[rows, labels])
    assert np.mean(shuffled != logits) > 0.7  # one value in nine stays by chance
    places = np.tile(np.arange(10.0), (200, 1))  # another view, the same shuffle
    moved = kdlib.with_shuffled_dark_knowledge(places, labels, 4.0).astype(int)
    np.testing.assert_array_equal(np.take_along_axis(logits, moved, -1), shuffled)


def test_a_control_is_a_run_of_its_own(data, runs):
    settings = dict(method="distilled", teacher=tiny(8))
    plain = train(data, **settings)
    control = train(data, rewrite=kdlib.with_shuffled_dark_knowledge, **settings)
    assert np.any(plain.model.get_weights()[0] != control.model.get_weights()[0])
    assert_same_weights(control, train(
        data, rewrite=lambda a, b, t: kdlib.with_shuffled_dark_knowledge(a, b, t), **settings))
    assert len(list(runs.glob("digits-distilled*"))) == 2


def test_a_control_needs_stored_answers(data):
    for settings in (dict(), dict(method="distilled", recipe=replace(RECIPE, views=0))):
        with pytest.raises(ValueError, match="rewrite changes a teacher's stored answers"):
            train(data, teacher=tiny(8), rewrite=kdlib.without_dark_knowledge, **settings)


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


@pytest.mark.parametrize("name", ["muon", "sgd"])
def test_weight_decay_spares_everything_but_kernels(name):
    """A step with gradients of zero moves what decays, and nothing else."""
    model = tiny()
    optimizer = kdlib._optimizer(replace(RECIPE, optimizer=name, warmup=0.0), steps=6,
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
    model.compile(kdlib._optimizer(recipe, 6, last_layer="none"), "mse")
    model.fit(np.zeros((6, 32, 32, 3)), np.zeros((6, 10)), batch_size=1, epochs=10, verbose=0,
              callbacks=[Watch()])
    peak = recipe.learning_rate
    assert rates[0] == 0 and max(rates) == pytest.approx(peak)
    assert rates[12] == pytest.approx(peak) and rates[36] == pytest.approx(peak / 2)
    assert rates[6] == pytest.approx(peak / 2) and rates[-1] < peak / 100


def test_an_unknown_optimizer(data):
    with pytest.raises(ValueError, match="recipe.optimizer is 'lion': choose 'muon'"):
        train(data, recipe=replace(RECIPE, optimizer="lion"))


def test_muon_sees_a_kernel_as_a_matrix():
    """Against Keras's own Muon on the same numbers, laid out as a matrix."""
    rng = np.random.default_rng(0)
    kernel, steps = rng.normal(size=(3, 3, 4, 8)), rng.normal(size=(3, 3, 3, 4, 8))
    image = keras.Variable(kernel.astype("float32"), name="kernel")
    matrix = keras.Variable(kernel.reshape(36, 8).astype("float32"), name="kernel")
    settings = dict(learning_rate=0.02, momentum=0.9, weight_decay=0.1)
    ours, theirs = kdlib.Muon(**settings), keras.optimizers.Muon(**settings)
    for step in steps.astype("float32"):
        ours.apply([step], [image])
        theirs.apply([step.reshape(36, 8)], [matrix])
    np.testing.assert_allclose(np.reshape(image, (36, 8)), matrix, rtol=1e-5, atol=1e-6)


def test_a_step_of_muon_is_nearly_orthogonal():
    kernel = keras.Variable(np.zeros((3, 3, 4, 8), "float32"), name="kernel")
    optimizer = kdlib.Muon(learning_rate=1.0, weight_decay=0.0, rms_rate=None)
    optimizer.apply([np.random.default_rng(0).normal(size=(3, 3, 4, 8))], [kernel])
    singular = np.linalg.svd(np.reshape(kernel, (36, 8)), compute_uv=False)
    assert (0.5 < singular).all() and (singular < 1.5).all()


def test_fused_norm_is_keras_norm():
    """Outputs, gradients and statistics of a twin against those of Keras's own layer."""
    model = tiny(dropout=0.0)
    twin = kdlib._with_fused_norm(model)
    kinds = [type(layer).__name__ for layer in twin.layers]
    assert "_FusedBatchNormalization" in kinds and "BatchNormalization" not in kinds
    images = data_like(40)
    gradients = []
    for each in (model, twin):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(each(images, training=True) ** 2)
        gradients.append(tape.gradient(loss, each.trainable_variables))
    for a, b in zip(*gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    for a, b in zip(model.get_weights(), twin.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model(images), twin(images), rtol=1e-4, atol=1e-5)


def data_like(count):
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3)).astype("uint8")


@pytest.mark.parametrize("method", ["distiled", "student", ""])
def test_an_unknown_method(data, method):
    with pytest.raises(ValueError, match="method is .*begin it with 'teacher', 'scratch'"):
        train(data, method=method, teacher=tiny(8))


def test_a_batch_larger_than_the_data(data):
    with pytest.raises(ValueError, match="recipe.batch_size is 61: choose 1 to 60"):
        train(data, recipe=replace(RECIPE, batch_size=61))


@pytest.mark.parametrize("name, value", [
    ("epochs", 0), ("epochs", 1.5), ("batch_size", 0), ("views", -1), ("shift", -1),
    ("warmup", 1), ("learning_rate", -1)])
def test_a_recipe_that_cannot_be_followed(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        replace(RECIPE, **{name: value})


def test_a_model_of_other_classes_than_the_data(data):
    with pytest.raises(ValueError, match="build gives a model of 12 logits, but digits has 10"):
        train(data, build=lambda: tiny(classes=12))


def test_a_run_in_place_of_its_model_as_the_teacher(data):
    with pytest.raises(TypeError, match="teacher is a Run.*is .model"):
        train(data, teacher=train(data, method="teacher"))


def test_a_build_that_builds_nothing_new(data):
    model = tiny()
    with pytest.raises(ValueError, match="build returned one and the same model twice"):
        train(data, build=lambda: model)


def test_a_model_that_keras_could_not_load_back(data):
    class Own(keras.layers.Dense):
        pass

    def build():
        inner = tiny()
        return keras.Model(inner.inputs, Own(10)(inner.layers[-2].output))

    with pytest.raises(ValueError, match="cannot load back what build returns.*register"):
        train(data, build=build)


def test_controls_need_every_label(data):
    hidden = replace(data, y_train=np.where(np.arange(60) < 9, -1, data.y_train))
    with pytest.raises(ValueError, match="rewrite needs every label"):
        train(hidden, method="distilled", teacher=tiny(8), rewrite=kdlib.without_dark_knowledge)


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
        inner = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8, activation)])
        x = inner(pixels)
        return keras.Model(pixels, keras.layers.Dense(3)(x + pixels if skip else x))

    digest = kdlib._architecture_digest
    model = net()
    assert digest(model) == digest(net())
    assert len({digest(m) for m in (model, net(skip=True), net(activation="tanh"))}) == 3
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert kdlib._model_digest(loaded) == kdlib._model_digest(model)
    assert kdlib._model_digest(net()) != kdlib._model_digest(model)


def test_a_model_is_trained_further(data, tmp_path):
    first = train(data, method="teacher")
    first.model.save(tmp_path / "teacher.keras")
    further = train(data, method="teacher-more", recipe=replace(RECIPE, learning_rate=0.001),
                    build=lambda: keras.saving.load_model(tmp_path / "teacher.keras"))
    assert further.history["loss"][0] < first.history["loss"][0]


def test_agreement_is_with_the_teacher_at_hand(data):
    alone = train(data)
    assert alone.row["agreement"] is None
    for teacher in (tiny(8), tiny(8, seed=1)):
        run = train(data, teacher=teacher)
        want = kdlib.measure(run.model, data, teacher)["agreement"]
        assert_same_weights(alone, run)
        assert run.row["agreement"] == want


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


@pytest.mark.parametrize("build", [residual, transformer])
def test_other_families_can_teach(data, monkeypatch, tmp_path, build):
    """Trained, cut off and resumed, asked, cached, and distilled from."""
    monkeypatch.setenv("KD_RUNS_DIR", str(tmp_path / "whole"))
    whole = train(data, method="teacher", build=build)
    monkeypatch.setenv("KD_RUNS_DIR", str(tmp_path / "cut"))
    train_and_cut(data, monkeypatch, 2, method="teacher", build=build)
    teacher = train(data, method="teacher", build=build)
    assert_same_weights(whole, teacher)
    logits = kdlib.teacher_logits(teacher.model, data, RECIPE)
    (images, answers), _ = next(iter(kdlib.batches(data, RECIPE, seed=0, teacher_logits=logits)))
    np.testing.assert_allclose(answers, teacher.model.predict(images, verbose=0),
                               rtol=1e-4, atol=1e-5)
    before = [np.copy(w) for w in teacher.model.get_weights()]
    distilled = train(data, method="distilled", teacher=teacher.model,
                      build=lambda: tiny(2, seed=1))
    assert distilled.row["agreement"] is not None
    for old, new in zip(before, teacher.model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_fused_norm_reaches_into_nested_models():
    twin = kdlib._with_fused_norm(residual())
    (nested,) = [layer for layer in twin.layers if isinstance(layer, keras.Model)]
    assert any(isinstance(v, kdlib._FusedBatchNormalization) for v in nested.layers)


# --- what is published ---

PUBLISHED = sorted(path.stem for path in kdlib.REFERENCE.glob("*.json"))


def test_the_table_holds_the_rows_of_all_published_runs():
    table = pd.read_csv(kdlib.REFERENCE / "results.csv")
    rows = [json.loads(path.read_text())["row"] for path in kdlib.REFERENCE.rglob("*.json")]
    want = pd.DataFrame(rows, columns=kdlib.RESULT_COLUMNS)
    order = ["dataset", "method", "temperature", "alpha", "seed", "test_accuracy"]
    pd.testing.assert_frame_equal(
        table.sort_values(order, ignore_index=True), want.sort_values(order, ignore_index=True),
        check_dtype=False)


def test_publishing_with_and_without_weights(data, monkeypatch, tmp_path):
    monkeypatch.setattr(kdlib, "REFERENCE", tmp_path / "reference")
    (tmp_path / "reference").mkdir()
    kdlib.publish(train(data, method="teacher"))
    kdlib.publish(train(data), weights=False)
    kept = sorted(path.name for path in (tmp_path / "reference").iterdir())
    assert kept == ["digits-teacher-seed0.json", "digits-teacher-seed0.keras", "results.csv",
                    "rows"]
    assert len(list((tmp_path / "reference" / "rows").glob("digits-scratch-seed0-*.json"))) == 1
    table = pd.read_csv(tmp_path / "reference" / "results.csv")
    assert list(table["method"]) == ["scratch", "teacher"]
    monkeypatch.delenv("KD_RETRAIN")
    monkeypatch.setenv("KD_RUNS_DIR", str(tmp_path / "none"))
    monkeypatch.setattr(kdlib, "_train", lambda *a, **k: pytest.fail("trained again"))
    assert train(data, method="teacher").row["method"] == "teacher"


@pytest.mark.parametrize("stem", [stem for stem in PUBLISHED if stem.startswith("digits")]
                         + ["cifar10-distilled-100-epochs-seed0"])
def test_published_weights_give_the_published_figures(stem):
    name = stem.split("-")[0]
    if name == "cifar10" and not CIFAR10.exists():
        pytest.skip("no cifar10.npz in KD_DATA_DIR")
    dataset = kdlib.load_dataset(name)
    teacher = keras.saving.load_model(kdlib.REFERENCE / f"{name}-teacher-seed0.keras")
    row = json.loads((kdlib.REFERENCE / f"{stem}.json").read_text())["row"]
    model = keras.saving.load_model(kdlib.REFERENCE / f"{stem}.keras")
    got = kdlib.measure(model, dataset, None if row["method"] == "teacher" else teacher)
    for key, value in got.items():
        if value is not None:
            assert row[key] == pytest.approx(value, abs=0.003), key
