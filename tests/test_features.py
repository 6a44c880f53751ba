"""Training with features: what is trained, what is thrown away, what is refused."""

from reference import answers, digests, features, fingerprints, methods, networks, plan, runs  # isort: skip  (first: keeps TensorFlow quiet)
import math
import shutil
from dataclasses import replace
from unittest import mock

import kdlib
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from test_distiller import ROOT, on_a_backend

DIGITS = kdlib.load_dataset("digits")
X, Y = DIGITS.x_train[:24], DIGITS.y_train[:24]
NUMBERS = np.arange(24, dtype="float32")[:, None]
LAYERS = {"hint": ["two"], "stages": ["one", "two"], "before": ["one", "two"], "last map": ["two"],
          "vector": ["pool"], "logits": []}


def net(width, seed=0, size=4):
    """Teacher and student alike have layers of these names, of other widths and sizes."""
    keras.utils.set_random_seed(seed)
    pixels = keras.Input((32, 32, 3))
    x = layers.Rescaling(1 / 255)(pixels)
    x = layers.Conv2D(width, 3, strides=size, name="one")(x)
    x = layers.Conv2D(2 * width, 3, strides=2, name="two")(layers.ReLU()(x))
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(layers.ReLU(name="relu")(x))
    return keras.Model(pixels, layers.Dense(10, name="logits")(layers.Dropout(0.2)(x)))


def distiller(method="at", *, student=None, teacher=None, weight=0.5, labels=Y, alpha=0.3, **more):
    names = LAYERS[features.METHODS[method].where] if method in features.METHODS else ["two"]
    settings = dict(student_layers=names, teacher_layers=names, feature_loss=(
        features.METHODS[method].make() if method in features.METHODS else method)) | more
    made = features.FeatureDistiller(student=student or net(3, seed=1), teacher=teacher or net(
        6, size=3), weight=weight, labels=labels, alpha=alpha, **settings)
    made.compile(keras.optimizers.SGD(0.01))
    return made


def copies(variables):
    return [np.copy(v) for v in variables]


def changed(before, variables):
    return [not np.array_equal(old, v) for old, v in zip(before, variables, strict=True)]


# --- what is trained ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", features.METHODS)
def test_one_step_on_digits(method, tmp_path):
    teacher, student = net(6, size=3), net(3, seed=1)
    made = distiller(method, student=student, teacher=teacher)
    frozen, learning = copies(teacher.weights), copies(student.trainable_variables)
    own = {id(v) for v in student.trainable_variables}
    extra = [v for v in made.trainable_variables if id(v) not in own]
    kinds = (features.Regressed, features.Embedded, features.Information, features.Factors)
    assert bool(extra) == isinstance(made.feature_loss, kinds)
    thrown_away = copies(extra)
    stored = np.hstack([teacher(X), NUMBERS]) if made.feature_loss.images else teacher(X)
    logs = made.train_on_batch((X, stored), Y, return_dict=True)
    total = 0.3 * logs["student_loss"] + 0.7 * logs["distillation_loss"]
    assert logs["loss"] == pytest.approx(total + 0.5 * logs["feature_loss"], rel=1e-5)
    assert logs["feature_loss"] > 0
    assert not any(changed(frozen, teacher.weights))
    assert all(changed(learning, student.trainable_variables))
    assert all(changed(thrown_away, extra))
    made.save(tmp_path / "student.keras")
    saved = keras.saving.load_model(tmp_path / "student.keras")
    assert saved.count_params() == made.count_params() == net(3).count_params()
    np.testing.assert_array_equal(saved(X), student(X))


def test_the_feature_loss_is_that_of_the_two_features():
    """Teacher without Dropout, student with its own; here it has none."""
    teacher, student = net(6, size=3), net(3, seed=1)
    made = distiller("sp", student=student, teacher=teacher)
    taps = [keras.Model(model.inputs, model.get_layer("two").output)(X, training=False)
            for model in (teacher, student)]  # nothing before "two" differs in training
    want = float(methods.sp(teacher=taps[0], student=taps[1]))
    logs = made.train_on_batch(X, Y, return_dict=True)
    assert logs["feature_loss"] == pytest.approx(want, rel=1e-4)


def test_weight_zero_is_the_plain_distiller_to_the_last_bit():
    trained = []
    for kind in ("plain", "features"):
        student, teacher = net(3, seed=1), net(6, size=3)
        made = (distiller("at", student=student, teacher=teacher, weight=0.0) if kind == "features"
                else kdlib.Distiller(student=student, teacher=teacher, temperature=4.0, alpha=0.3))
        made.compile(keras.optimizers.SGD(0.1))
        keras.utils.set_random_seed(5)
        made.fit(X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0)
        trained.append(student.get_weights())
    for one, other in zip(*trained, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_stored_logits_serve_as_well_as_live_ones():
    teacher, trained = net(6, size=3), []
    answers = np.asarray(teacher(X))
    for x in (X, (X, answers)):
        student = net(3, seed=1)
        distiller("at", student=student, teacher=teacher).fit(
            x, Y, batch_size=8, shuffle=False, verbose=0)
        trained.append(student.get_weights())
    for other in trained[1:]:
        for a, b in zip(trained[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def strayed(one, other):
    """How far two students' weights lie apart, beside how far one has moved."""
    apart, way = (sum(np.sum((a - b) ** 2) for a, b in zip(one, those, strict=True)) ** 0.5
                  for those in (other, net(3, seed=1).get_weights()))
    return apart / way


@pytest.mark.slow
@pytest.mark.parametrize("method", [
    pytest.param(name, marks=() if name in ("at", "crd") else pytest.mark.long)
    for name, each in features.METHODS.items() if not each.on_logits])
def test_stored_features_serve_as_well_as_live_ones(method):
    """And in half precision nearly as well."""
    teacher, trained = net(6, size=3), []
    names = LAYERS[features.METHODS[method].where]
    live = features.watch("teacher", teacher, names)(X, training=False)[1:]
    answers = np.hstack([teacher(X), NUMBERS]) if method == "crd" else np.asarray(teacher(X))
    for given in (answers, (answers, *live), (answers, *(np.float16(each) for each in live))):
        student = net(3, seed=1)
        made = distiller(method, student=student, teacher=teacher)
        keras.utils.set_random_seed(7)  # of the images that CRD draws
        made.fit((X, given), Y, batch_size=8, shuffle=False, verbose=0)
        trained.append(student.get_weights())
    assert strayed(*trained[:2]) < 1e-4 and strayed(trained[0], trained[2]) < 1e-2


def test_stored_features_are_the_ones_that_count():
    """And as many as the teacher has layers; else it is one input too many."""
    made = distiller("sp", teacher=net(6, size=3))
    features_ = np.random.default_rng(0).normal(size=(24, 3, 3, 12)).astype("float32")
    student = keras.Model(made.student.inputs, made.student.get_layer("two").output)(X)
    want = float(methods.sp(teacher=features_, student=student))
    answers = np.zeros((24, 10), "float32")
    logs = made.train_on_batch((X, (answers, features_)), Y, return_dict=True)
    assert logs["feature_loss"] == pytest.approx(want, rel=1e-4)
    with pytest.raises(ValueError):
        made.train_on_batch((X, (answers, features_, features_)), Y)


@pytest.mark.slow
def test_stored_logits_are_the_ones_that_count():
    """Not the teacher's own: here they are somebody else's."""
    student, other = net(3, seed=1), np.asarray(net(4, seed=7)(X))
    logs = distiller("at", student=student).train_on_batch((X, other), Y, return_dict=True)
    plain = kdlib.Distiller(student=net(3, seed=1), teacher=None, temperature=4.0, alpha=0.3)
    plain.compile(keras.optimizers.SGD(0.01))
    want = plain.train_on_batch((X, other), Y, return_dict=True)
    assert logs["distillation_loss"] == pytest.approx(want["distillation_loss"], rel=0.05)
    far = distiller("at").train_on_batch(X, Y, return_dict=True)["distillation_loss"]
    assert abs(far / want["distillation_loss"] - 1) > 0.1


def test_evaluate_and_predict_are_those_of_the_student():
    made = distiller("fitnet")
    logs = made.evaluate(X, Y, return_dict=True, verbose=0)
    assert "feature_loss" not in logs and logs["loss"] == pytest.approx(
        0.3 * logs["student_loss"] + 0.7 * logs["distillation_loss"], rel=1e-5)
    np.testing.assert_array_equal(made.predict(X, verbose=0), made.student.predict(X, verbose=0))


@pytest.mark.filterwarnings("error::UserWarning")
def test_fit_shows_all_three_losses_and_validates():
    history = distiller("at").fit(X, Y, batch_size=8, validation_data=(X, Y), verbose=0).history
    assert {"loss", "student_loss", "distillation_loss", "feature_loss", "val_accuracy"} <= set(
        history) and "val_feature_loss" not in history


def test_a_function_of_your_own():
    def both_means(*, teacher, student):
        return (keras.ops.mean(teacher) - keras.ops.mean(student)) ** 2

    logs = distiller(both_means).train_on_batch(X, Y, return_dict=True)
    assert logs["feature_loss"] > 0


def test_a_layer_inside_another_model_is_found_where_it_is_used():
    inner = net(3, seed=1)
    body = keras.Model(inner.inputs, inner.get_layer("two").output, name="body")
    pixels = keras.Input((32, 32, 3))
    x = layers.GlobalAveragePooling2D()(body(pixels))
    student = keras.Model(pixels, layers.Dense(10)(x))
    made = distiller("at", student=student, student_layers=["body"], teacher_layers=["two"])
    assert made.train_on_batch(X, Y, return_dict=True)["feature_loss"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dkd", "dist"])
def test_unknown_labels_take_the_teachers_class(method):
    teacher = net(6, size=3)
    guess, losses = np.argmax(teacher(X), -1), []
    for labels in (np.full(24, -1), guess):
        made = distiller(method, teacher=teacher, alpha=0.0)
        losses.append(made.train_on_batch(X, labels, return_dict=True)["feature_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


# --- the memories of CRD --------------------------------------------------------------


@pytest.mark.slow
def test_memories_change_where_an_image_was_seen_and_nowhere_else():
    made = distiller("crd")
    before = copies(made.feature_loss.memories)
    which = np.array([3, 5, 8, 20])
    made.train_on_batch((X[which], NUMBERS[which]), Y[which])
    for old, new in zip(before, made.feature_loss.memories, strict=True):
        moved = np.any(old != np.asarray(new), axis=1)
        assert list(np.flatnonzero(moved)) == list(which)
        np.testing.assert_allclose(np.linalg.norm(new, axis=1)[which], 1, rtol=1e-5)
    assert (np.asarray(made.feature_loss.normalisers) > 0).all()
    first = np.copy(made.feature_loss.normalisers)
    made.train_on_batch((X, NUMBERS), Y)
    np.testing.assert_array_equal(first, made.feature_loss.normalisers)


def test_negatives_come_from_all_images_of_other_classes_alike():
    labels = np.array([0, 1, 1, 2, 0, 3, 3, 3, 9, 1])
    loss = features.Contrast(negatives=10)
    loss.prepare(teacher=[(None, 4)], student=[(None, 4)], labels=labels)
    numbers = np.arange(10, dtype="int32")
    drawn = np.concatenate([np.asarray(loss._draw(numbers)) for _ in range(300)], axis=1)
    drawn = drawn.reshape(10, 300, 11)
    assert (drawn[:, :, 0] == numbers[:, None]).all()
    for k in numbers:
        others, counts = np.unique(drawn[k, :, 1:], return_counts=True)
        assert set(others) == set(np.flatnonzero(labels != labels[k]))
        assert counts.min() > 0.8 * counts.mean() and counts.max() < 1.2 * counts.mean()


# --- what is refused ------------------------------------------------------------------


def twice():
    pixels, conv = keras.Input((32, 32, 3)), layers.Conv2D(3, 3, padding="same", name="conv")
    x = layers.GlobalAveragePooling2D()(conv(conv(pixels)))
    return keras.Model(pixels, layers.Dense(10)(x))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(10)

    def call(self, x):
        return self.dense(keras.ops.mean(keras.ops.cast(x, "float32"), axis=(1, 2)))


def subclassed():
    model = Subclassed()
    model(X)
    return model


@pytest.mark.parametrize("change, words", [
    (dict(student_layers=["three"]), "student_layers names 'three'. The student has .*one, .*two"),
    (dict(teacher_layers=["three"]), "teacher_layers names 'three'. The teacher has"),
    (dict(teacher_layers=["one", "two"]), "Name one of the teacher for each"),
    (dict(student_layers=["pool"]), r"student_layers give \(None, 6\). This loss needs maps"),
    (dict(teacher_layers=["logits"]), r"teacher_layers give \(None, 10\). This loss needs maps"),
    (dict(weight=-1.0), "weight is -1.0"), (dict(weight=float("nan")), "weight is nan"),
    (dict(weight=None), "weight is None"), (dict(weight=True), "weight is True")])
def test_a_sentence_at_once(change, words):
    with pytest.raises(ValueError, match=words):
        distiller("fitnet", **change)


def test_a_sentence_about_the_model():
    with pytest.raises(ValueError, match="'conv', which gives 2 outputs"):
        distiller("fitnet", student=twice(), student_layers=["conv"])
    with pytest.raises(ValueError, match="student is a Subclassed without a graph"):
        distiller("fitnet", student=subclassed(), student_layers=["dense"])
    with pytest.raises(ValueError, match="Features are computed live: pass the teacher"):
        features.FeatureDistiller(student=net(3), teacher=None, feature_loss=methods.at, weight=1,
                                  student_layers=["two"], teacher_layers=["two"])


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_graph_that_is_not_what_the_model_does(role):
    class Inverted(keras.Model):
        def call(self, x, training=None):
            return super().call(255 - keras.ops.cast(x, "float32"), training=training)

    plain = net(3)
    with pytest.raises(ValueError, match=f"{role} is a Inverted with a call of its own"):
        distiller("at", **{role: Inverted(plain.inputs[0], plain.outputs[0])})


def of_each_image(*, teacher, student, labels=None):
    return keras.ops.mean(student**2, axis=list(range(1, len(student.shape))))


@pytest.mark.parametrize("loss, names", [
    (of_each_image, ["two"]), (features.LabelledLoss(of_each_image), [])])
def test_a_feature_loss_is_one_number(loss, names):
    made = distiller(loss, student_layers=names, teacher_layers=names)
    with pytest.raises(ValueError, match=r"feature_loss gives shape \(24,\).*take the mean"):
        made.train_on_batch(X, Y)


def test_losses_together_may_come_one_by_one():
    def both(*, teacher, student):
        return (methods.at(teacher=t, student=s) for t, s in zip(teacher, student, strict=True))

    names = dict(student_layers=["one", "two"], teacher_layers=["one", "two"])
    losses = [distiller(loss, **names).train_on_batch(X, Y, return_dict=True)["feature_loss"]
              for loss in (features.FeatureLoss(both, together=True), methods.at)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0] > 0


def test_features_of_unknown_size_serve_a_loss_that_takes_them():
    def wide(width):
        pixels = keras.Input((None, None, 3))
        x = layers.Conv2D(width, 3, strides=4, name="two")(layers.Rescaling(1 / 255)(pixels))
        return keras.Model(pixels, layers.Dense(10)(layers.GlobalAveragePooling2D(name="pool")(x)))

    def means(*, teacher, student):
        return (keras.ops.mean(teacher) - keras.ops.mean(student)) ** 2

    logs = distiller(means, student=wide(2), teacher=wide(4)).train_on_batch(
        X, Y, return_dict=True)
    assert logs["feature_loss"] > 0
    for loss in ("at", "cc"):
        with pytest.raises(ValueError, match="This loss needs .* of known size"):
            distiller(loss, student=wide(2), teacher=wide(4), student_layers=["two"],
                      teacher_layers=["two"])


@pytest.mark.slow
def test_stored_logits_count_beside_image_numbers():
    other = np.asarray(net(4, seed=7)(X))  # unlike the teacher's
    losses = [distiller("crd", student=net(3, seed=1)).train_on_batch(
        (X, np.hstack([each, NUMBERS])), Y, return_dict=True)["distillation_loss"]
        for each in (other, other[::-1])]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    made = distiller("crd")
    made.evaluate((X, np.hstack([other, NUMBERS])), Y, verbose=0)
    # TensorFlow traces once more, for any width. That must not be taken for no logits at all.
    with pytest.raises(ValueError, match=r"teacher_logits have shape \(None, None\).*the same"):
        made.evaluate((X, other), Y, verbose=0)


@pytest.mark.parametrize("method, names", [("crd", ["one", "two"]), ("ft", ["one", "two"])])
def test_layers_that_would_be_ignored(method, names):
    with pytest.raises(ValueError, match="teacher_layers give 2 features. This loss compares one"):
        distiller(method, student_layers=names, teacher_layers=names)


@pytest.mark.slow
def test_image_numbers_that_are_none_cost_no_weights():
    made = distiller("crd")
    loss = made.feature_loss
    kept = [*made.trainable_variables, *loss.memories, loss.normalisers]
    before = copies(kept)
    for wrong in (24, -1, 2.5, math.nan):
        numbers = NUMBERS.copy()
        numbers[20] = wrong
        with pytest.raises(ValueError, match="teacher_logits in batch 0 hold nan"):
            made.fit((X, numbers), Y, batch_size=24, verbose=0)
        assert not any(changed(before, kept)), wrong


@pytest.mark.parametrize("stored", [False, True])
def test_a_teacher_that_gets_images_of_another_scale(stored):
    """Its features would mean nothing, also where its answers were stored."""
    pixels = keras.Input((32, 32, 3))
    maps = layers.Conv2D(3, 3, strides=4, name="one")(pixels)  # this student takes what comes
    student = keras.Model(pixels, layers.Dense(10)(layers.GlobalAveragePooling2D()(maps)))
    made = features.FeatureDistiller(
        student=student, teacher=net(4), temperature=4, alpha=0.0, feature_loss=methods.at,
        weight=1.0, student_layers=["one"], teacher_layers=["one"])
    made.compile("sgd")
    x, before = (X / 255).astype("float32"), student.get_weights()
    answers = np.random.default_rng(1).normal(size=(24, 10)).astype("float32")
    with pytest.raises(ValueError, match="the teacher.s images are not raw pixels"):
        made.fit((x, answers) if stored else x, Y, verbose=0)
    assert all(map(np.array_equal, before, student.get_weights()))


def test_a_sentence_about_numbers_and_labels():
    distiller("fitnet", weight=np.float32(0.5))  # a number of NumPy's is one, too
    with pytest.raises(ValueError, match="labels are missing"):
        distiller("crd", labels=None)
    with pytest.raises(ValueError, match="labels hold -1 .unknown.*leave those images out"):
        distiller("crd", labels=np.where(np.arange(len(Y)) < 3, -1, Y))
    with pytest.raises(ValueError, match="image numbers are missing"):
        distiller("crd").train_on_batch(X, Y)
    with pytest.raises(ValueError, match=r"labels have shape \(24, 10\).*np.argmax"):
        distiller("crd", labels=np.eye(10)[Y])
    for made, columns in ((distiller("crd", labels=Y[:, None]), 7), (distiller("at"), 7),
                          (distiller("at"), 11), (distiller("at"), 1)):  # at takes no numbers
        with pytest.raises(ValueError, match=rf"teacher_logits have shape \(24, {columns}\)"):
            made.train_on_batch((X, np.zeros((24, columns), "float32")), Y)
    with pytest.raises(ValueError, match="image numbers are float16, which can't hold them"):
        distiller("crd").train_on_batch((X, tf.zeros((24, 11), "float16")), Y)


def test_a_method_or_a_trainer_that_is_none():
    with pytest.raises(ValueError, match="method is 'hint'. Choose one of fitnet"):
        features.Trainer("hint", 1.0)
    with pytest.raises(ValueError, match="Only a distilled run has one"):
        runs.Task("scratch", DIGITS, trainer=features.Trainer("dkd", 1.0))


def test_a_feature_loss_that_is_not_finite_is_said_aloud():
    def broken(*, teacher, student):
        return keras.ops.mean(student) * np.float32("nan")

    with pytest.raises(FloatingPointError, match="loss in batch 0 is not finite"):
        distiller(broken).fit(X, Y, verbose=0)


# --- identity, and going on after a kill ----------------------------------------------


class Killed(Exception):
    pass


class Kill(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        if epoch == 1:
            raise Killed


def student():
    return net(3)


FEW = replace(DIGITS, x_train=DIGITS.x_train[:600], y_train=DIGITS.y_train[:600])


def train(method, *, callbacks=None, weight=0.1, kind=features.Trainer, **more):
    names = tuple(LAYERS[features.METHODS[method].where])
    trainer = kind(method, weight, names, names)
    return runs.train_or_load(
        f"distilled-{method}", FEW, teacher=net(6, size=3), build=student, trainer=trainer,
        callbacks=callbacks or [keras.callbacks.Callback()], recipe=runs.Recipe(
            epochs=3, batch_size=100, views=2, flip=False, warmup=0.0), **more)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["crd", pytest.param("fitnet", marks=pytest.mark.long)])
def test_a_killed_run_ends_with_the_same_weights(method, tmp_path, monkeypatch):
    """Memories, regressors and the draw of the negatives go on where they were."""
    ended = []
    for folder, killed in (("whole", False), ("cut", True)):
        monkeypatch.setenv("KD_RUNS_DIR", str(tmp_path / folder))
        if killed:
            with pytest.raises(Killed):
                train(method, callbacks=[Kill()])
        run = train(method)
        ended.append(run.model.get_weights())
        assert run.row["parameters"] == student().count_params()
        assert set(run.history) >= {"feature_loss", "val_accuracy"}
    for one, other in zip(*ended, strict=True):
        np.testing.assert_array_equal(one, other)


def seen_by(teacher, layer, recipe, view=0):
    codes = kdlib.view_codes(images=len(FEW.x_train), views=2, shift=recipe.shift, flip=False)
    watched = keras.Model(teacher.inputs, teacher.get_layer(layer).output)
    return np.asarray(watched(kdlib.augment(FEW.x_train, codes[view]), training=False))


def test_kept_features_are_the_teachers_own(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_RUNS_DIR", str(tmp_path))
    teacher, recipe = net(6, size=3), runs.Recipe(epochs=3, views=2, flip=False)
    kept = runs.teacher_features(teacher, FEW, recipe, ["two", "pool"])
    for view, both in enumerate(kept):
        for name, each in zip(("two", "pool"), both, strict=True):
            assert isinstance(each, np.memmap) and each.dtype == np.float16
            np.testing.assert_allclose(each, seen_by(teacher, name, recipe, view), rtol=1e-3,
                                       atol=1e-3)
    asked = mock.Mock(wraps=answers._features)
    monkeypatch.setattr(answers, "_features", asked)
    runs.teacher_features(teacher, FEW, recipe, ["pool"])
    assert [len(call.args[1]) for call in asked.call_args_list] == [8, 8]  # compared, no more

    # The same architecture and weights, but its layers have changed their names.
    swapped = net(6, size=3)
    swapped.get_layer("two").name, swapped.get_layer("one").name = "one", "two"
    with pytest.warns(UserWarning, match="not this teacher's"):
        (first, _) = runs.teacher_features(swapped, FEW, recipe, ["two"])
    assert first[0].shape == (600, 10, 10, 6)

    large = net(6, size=3)
    large.get_layer("two").kernel.assign(large.get_layer("two").kernel * 1e8)
    with pytest.raises(ValueError, match="above 65,504"):
        runs.teacher_features(large, FEW, recipe, ["two"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["crd", pytest.param("at", marks=pytest.mark.long)])
def test_a_run_on_kept_features_is_nearly_the_live_one(method):
    ended, losses = [], []
    for kind in (features.Trainer, features.StoredTrainer):
        run = train(method, kind=kind)
        ended.append(run.model.get_weights())
        losses.append(run.history["feature_loss"])
    np.testing.assert_allclose(*losses, rtol=1e-2)
    assert 0 < strayed(*ended) < 0.02  # half precision is told


def test_kept_features_are_part_of_what_a_run_is():
    live, kept = (fingerprints.identity_of(kind("at", 1.0, ("two",), ("two",)))
                  for kind in (features.Trainer, features.StoredTrainer))
    assert kept["stored"] and kept["code"] != live["code"] and "stored" not in live
    with pytest.raises(ValueError, match="stored features are of views"):
        features.StoredTrainer("at", 1.0, ("two",), ("two",)).lend(None)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["crd", pytest.param("fitnet", marks=pytest.mark.long)])
def test_extra_layers_do_not_depend_on_what_was_drawn_before(method, tmp_path, monkeypatch):
    """The first run of a process fills caches, and to do so it makes a layer."""
    ended, described = [], fingerprints.architecture
    for folder in ("first", "later"):
        monkeypatch.setenv("KD_RUNS_DIR", str(tmp_path / folder))
        ended.append(train(method).model.get_weights())
        monkeypatch.setattr(fingerprints, "architecture", lambda model: (
            layers.Dense(1).build((1, 1)), described(model))[1])
    for one, other in zip(*ended, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_weight_layers_and_code_are_part_of_what_a_run_is(monkeypatch):
    def spec(method="at", weight=1.0, names=("two",)):
        return runs.Task("distilled-x", DIGITS, teacher=net(6), build=student,
                         trainer=features.Trainer(method, weight, names, names)).spec

    base = digests.digest(spec())
    assert base == digests.digest(spec())
    others = [spec(weight=2.0), spec(names=("one",)), spec(method="nst")]
    assert len({base, *map(digests.digest, others)}) == 4
    plain = runs.Task("distilled-x", DIGITS, teacher=net(6), build=student).spec
    assert "trainer" not in plain  # published runs without one keep their identity


def test_the_digest_covers_what_a_loss_calls():
    for method, helper in (("at", methods._pool), ("rkd", methods._norm), ("dkd", methods._split),
                           ("crd", methods.crd_remember), ("ft", features._convolutions),
                           ("crd", features.Embedded), ("vid", methods._same_size)):
        assert helper in features.Trainer(method, 1.0).identity()[1], method
    assert methods._pool not in features.Trainer("ttm", 1.0).identity()[1]


# --- other backends -------------------------------------------------------------------

ON_A_BACKEND = """
import keras, numpy as np
from keras import layers
import features, kdlib
rng = np.random.default_rng(0)
x, y = rng.integers(0, 256, (12, 16, 16, 3)).astype("uint8"), np.arange(12) % 4
def net(width, seed):
    keras.utils.set_random_seed(seed)
    pixels = keras.Input((16, 16, 3))
    h = layers.ReLU()(layers.Conv2D(width, 3, strides=4, name="map")(
        layers.Rescaling(1 / 255)(pixels)))
    h = layers.GlobalAveragePooling2D(name="pool")(layers.BatchNormalization()(h))
    return keras.Model(pixels, layers.Dense(4, name="logits")(h))
places = {"vector": ["pool"], "logits": [], "stages": ["map"], "hint": ["map"], "last map": ["map"]}
for method in ("fitnet", "vid", "crd", "dkd"):  # each kind of extra layer, and none
    names = places[features.METHODS[method].where]
    teacher, student = net(6, 0), net(3, 1)
    made = features.Trainer(method, 0.5, names, names)(
        student=student, teacher=teacher, temperature=4.0, alpha=0.3, labels=y)
    made.compile(keras.optimizers.SGD(0.01))
    before = [np.copy(keras.ops.convert_to_numpy(v)) for v in made.variables]
    answers = keras.ops.convert_to_numpy(teacher(x))
    if method == "crd":
        answers = np.hstack([answers, np.arange(12)[:, None]]).astype("float32")
    logs = made.fit((x, answers), y, batch_size=12, verbose=0).history
    total = 0.3 * logs["student_loss"][0] + 0.7 * logs["distillation_loss"][0]
    assert np.isclose(logs["loss"][0], total + 0.5 * logs["feature_loss"][0], rtol=1e-4), method
    moved = [not np.array_equal(old, keras.ops.convert_to_numpy(v))
             for old, v in zip(before, made.variables)]
    still = [v.path for v, m in zip(made.variables, moved) if not m]
    assert not still, (method, still)
made.evaluate((x, answers), y, verbose=0)
print("fine on", keras.backend.backend())
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_a_step_on_other_backends(backend, tmp_path):
    for name in ("methods", "features"):
        shutil.copy(ROOT / "reference" / f"{name}.py", tmp_path)
    assert on_a_backend(backend, ON_A_BACKEND, tmp_path) == f"fine on {backend}"


def test_mixed_precision_compares_in_float32():
    loss = methods.at(teacher=tf.ones((2, 4, 4, 3), "float16"),
                      student=1e-3 * tf.ones((2, 4, 4, 2), "float16"))
    assert loss.dtype == "float32" and float(loss) == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method, policy", [("crd", "mixed_float16"), ("ft", "mixed_bfloat16")])
def test_extra_layers_in_mixed_precision(method, policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        made = distiller(method)
        x = (X, NUMBERS) if method == "crd" else X
        logs = made.train_on_batch(x, Y, return_dict=True)
    finally:
        keras.config.set_dtype_policy(before)
    assert np.isfinite(logs["loss"]) and logs["feature_loss"] > 0


# --- rows as data ---------------------------------------------------------------------


def test_each_variant_has_the_same_trials_and_its_authors_weight_among_them():
    table = plan._methods()
    finals = [each for each in table if each.dataset == "cifar10" and not each.choice
              and each.loss and each.factor is None]
    assert {each.loss for each in finals} == set(features.METHODS)
    for each in finals:
        trials = [t for t in table if t.choice and (t.loss, t.alpha) == (each.loss, each.alpha)]
        assert sorted(t.factor for t in trials) == [0.1, 1.0, 10.0]
        assert all(t.seeds == (100,) for t in trials)
        own = next(t for t in trials if t.factor == 1)
        assert own.trainer().weight == features.METHODS[each.loss].weight


@pytest.mark.parametrize("build", [networks.residual_student, networks.separable_student])
def test_other_students_keep_the_budget(build):
    model = build()
    assert 80_000 <= model.count_params() <= 90_000
    assert model(X, training=False).shape == (24, 10)
    strided = [layer for layer in model.layers if isinstance(layer, layers.Conv2D)
               and layer.strides != (1, 1)]
    assert not strided  # TensorFlow's 1x1 with a stride dies on some processors


def test_places_are_layers_of_the_published_pair():
    """And those of one pair have the axes that the method needs."""
    student, teacher = kdlib.build_student(), kdlib.build_teacher()
    for mine, theirs in plan.PLACES.values():
        assert len(mine) == len(theirs)
        features.watch("student", student, mine)
        features.watch("teacher", teacher, theirs)
