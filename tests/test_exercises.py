"""The exercises: every answer that the notebooks give, verified by doing what it says."""

from reference import controls, features, runs, store  # isort: skip  (first: keeps TensorFlow quiet)
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import kdlib
import keras
import nbformat
import numpy as np
import pandas as pd
import pytest
import scipy.special
import scipy.stats
import tensorflow as tf
from conftest import CIFAR10
from keras import ops

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
TABLE = pd.read_csv(runs.REFERENCE / "results.csv")
ROWS = runs.REFERENCE / "rows"


@pytest.fixture
def do(tmp_path):
    """Run a notebook's code with lines changed, to the end or up to one cell, and check what it
    leaves. Without a kernel: a lost message of its sockets let a test hang."""

    def run(name, changes, *, check, until=None, **environment):
        notebook = read(name)
        checks_itself = checking_cell(name).replace("DONE = False", "DONE = True")
        if until:
            last = next(k for k, cell in enumerate(notebook.cells)
                        if cell.cell_type == "code" and until in cell.source)
            del notebook.cells[last + 1:]
        for old, new in changes.items():
            found = [cell for cell in notebook.cells
                     if cell.cell_type == "code" and old in cell.source]
            assert found, f"{old!r} is in no cell of {name}"
            for cell in found:
                cell.source = cell.source.replace(old, new)
        code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
        script = tmp_path / "exercise.py"
        script.write_text("\n\n".join([*code, checks_itself, check, "print('to the end')"]))
        settings = {"KD_DATASET": "digits", "KD_RETRAIN": "0", "KD_RUNS_DIR": str(tmp_path),
                    "MPLBACKEND": "agg", **environment}
        done = subprocess.run([sys.executable, "-m", "IPython", "--colors=nocolor", script],
                              env={**os.environ, **settings}, cwd=NOTEBOOKS, capture_output=True,
                              text=True, timeout=900)
        assert done.returncode == 0 and "to the end" in done.stdout, done.stdout[-3000:]

    return run


def read(name):
    (path,) = NOTEBOOKS.glob(f"{name}_*.ipynb")
    return nbformat.read(path, as_version=4)


def exercises(name):
    prose = [cell.source for cell in read(name).cells if cell.cell_type == "markdown"]
    return prose[-1].split("## Exercises")[1].split("## ")[0]


def checking_cell(name):
    source = read(name).cells[-1].source
    assert source.startswith("# Exercise 2 checks itself")
    return source


NOT_DONE = {  # what a notebook holds when nothing was changed in it
    "01": {"VIEWS": 9},
    "03": {"TEMPERATURES": (1, 2, 4)},
    "04": {"run": SimpleNamespace(row={"method": "distilled", "alpha": 0.1})},
    "05": {"pairs": {"scratch": [0.88, 0.89]}, "rows": {"nll": [0.35, 0.36]}},
    "06": {"other": pd.DataFrame({0.5: [85.0], 0.1: [85.6]})},
    "08": {"estimate": lambda gains: (gains.mean() - 0.7, gains.mean() + 0.7, 0.1), "np": np},
    "07": {"batch": np.zeros(50), "dataset": SimpleNamespace(x_train=np.ones(99), y_train=[1] * 99),
           "np": np},
}


@pytest.mark.parametrize("name", NOT_DONE)
def test_an_exercise_that_was_not_done_is_told_so(name):
    code = checking_cell(name)
    exec(code, dict(NOT_DONE[name]))  # as it comes it says nothing
    with pytest.raises(AssertionError, match="."):
        exec(code.replace("DONE = False", "DONE = True"), dict(NOT_DONE[name]))


@pytest.mark.parametrize("points, right", [(9.84, True), (0.0984, False), (-9.84, False)])
def test_the_exercise_of_02_knows_the_answer(points, right):
    code = checking_cell("02").replace("BEHIND = None", f"BEHIND = {points}")
    if right:
        exec(code, {})
    else:
        with pytest.raises(AssertionError, match=str(points)):
            exec(code, {})


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_three_exercises_with_their_answers(path):
    questions, answers = exercises(path.stem[:2]).split("<details>")
    kinds = re.findall(r"^(\d)\. \*\*(.+?):\*\*", questions, re.MULTILINE)
    assert kinds == [("1", "Predict"), ("2", "Change one line"), ("3", "Explain")]
    assert re.findall(r"^(\d)\. ", answers, re.MULTILINE) == ["1", "2", "3"]


# --- 01 ---


def test_01_1_the_figure_that_tells():
    (number,) = re.findall(r"Figure (\d\.\d)", exercises("01"))
    assert f"*Figure {number}: confusion matrix" in (NOTEBOOKS / "02_teacher.ipynb").read_text()


@pytest.mark.slow
def test_01_2_nineteen_views(do):
    do("01", {"VIEWS = 9": "VIEWS = 19"}, until="again = kdlib.view_codes",
       check="assert views.shape == (19, 32, 32, 3) and np.array_equal(codes, again)")


@pytest.mark.parametrize("images, flip, different", [(45_000, True, 19), (2_400, False, 16)])
def test_01_2_do_two_of_nineteen_views_look_the_same(images, flip, different):
    codes = kdlib.view_codes(images=images, views=19, shift=4, flip=flip)
    k = int(np.random.default_rng(0).integers(images))  # as the notebook draws its image
    assert len(np.unique(codes[:, k], axis=0)) == different


def test_01_2_two_of_nineteen_views_probably_agree():
    none = np.prod(1 - np.arange(10) / 81) * np.prod(1 - np.arange(9) / 81)
    assert f"the chance is about {100 * (1 - none):.0f} %" in exercises("01")


def test_01_3_the_statistics_of_all_images_are_nearly_those_of_the_training_part():
    dataset = kdlib.load_dataset()
    every = np.concatenate([dataset.x_train, dataset.x_val, dataset.x_test])
    for statistic in (np.mean, np.std):
        assert abs(statistic(every[:, ::4]) - statistic(dataset.x_train[:, ::4])) < 0.5


# --- 02 ---


def test_02_1_parameters_of_a_convolution():
    layer = keras.layers.Conv2D(256, 3, use_bias=False)
    layer.build((None, 8, 8, 128))
    assert f"{layer.count_params():,}" in exercises("02")


def test_02_2_sgd_in_place_of_muon(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_RUNS_DIR", str(tmp_path))
    calls = re.findall(r"`(runs\.train_or_load\(.*?)`", exercises("02"))
    space = {"runs": runs, "replace": replace, "digits": kdlib.load_dataset("digits")}
    sgd, muon = (eval(call, space) for call in calls)
    digits = TABLE[(TABLE.dataset == "digits") & (TABLE.seed == 0)].set_index("method")
    for accuracy, method in ((sgd, "scratch-sgd"), (muon, "scratch")):
        assert accuracy == pytest.approx(digits.test_accuracy[method], abs=0.03)
        assert f"{100 * digits.test_accuracy[method]:.2f} %" in exercises("02")
    behind = digits.test_accuracy["scratch"] - digits.test_accuracy["scratch-sgd"]
    assert 0.08 < behind < 0.12  # "about ten points"


def test_02_3_validation_is_above_training_in_the_early_epochs():
    history = store.read_notes(ROWS / "cifar10-teacher-seed0.json")["history"]
    assert history["val_accuracy"][0] > history["accuracy"][0]


# --- 03 ---


def test_03_1_two_halves():
    assert "log 2 = 0.69 nats" in exercises("03")
    assert scipy.special.entr([0.5, 0.5, *8 * [0]]).sum() == pytest.approx(0.69, abs=0.005)


@pytest.mark.slow
def test_03_2_half_a_degree(do):
    do("03", {"TEMPERATURES = (1,": "TEMPERATURES = (0.5, 1,"},
       check="""sharp, plain = (np.asarray(soften(logits, t)).max(-1) for t in (0.5, 1))
assert len(TEMPERATURES) == 6 and (sharp >= plain).all()""")


def test_03_3_a_temperature_keeps_the_order():
    logits = np.random.default_rng(0).normal(0, 5, (100, 10))
    for temperature in (0.5, 4, 16):
        soft = np.asarray(kdlib.soften(logits, temperature))
        np.testing.assert_array_equal(soft.argsort(-1), logits.argsort(-1))


# --- 04 ---


def test_04_1_a_constant_added_to_all_logits():
    logits = np.random.default_rng(0).normal(0, 5, (100, 10)).astype("float32")
    loss = kdlib.distillation_loss(
        teacher_logits=logits, student_logits=logits + 7, temperature=4)
    assert float(loss) == pytest.approx(0, abs=1e-5)
    hard = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    labels = np.arange(100) % 10
    assert float(hard(labels, logits)) == pytest.approx(float(hard(labels, logits + 7)), rel=1e-4)


@pytest.mark.long
@pytest.mark.slow
def test_04_2_a_student_that_never_sees_a_label(do):
    do("04", {'train_or_load("distilled"': 'train_or_load("distilled-no-labels"',
              "temperature=TEMPERATURE, alpha=ALPHA)": "temperature=TEMPERATURE, alpha=0.0)"},
       until='train_or_load("distilled',
       check="""losses = run.history["student_loss"]
assert run.row["alpha"] == 0 and run.row["test_accuracy"] > 0.9 and losses[-1] < losses[0] / 2""")
    digits = TABLE[TABLE.dataset == "digits"].groupby("method").test_accuracy.mean()
    assert abs(digits["distilled"] - digits["distilled-no-labels"]) < 0.02  # "nearly as good"


def test_04_3_what_the_student_must_not_leave_out():
    teacher, student = np.log([[0.5, 0.5], [0.99, 0.01]])[:, None]
    right = kdlib.distillation_loss(teacher_logits=teacher, student_logits=student, temperature=1)
    other = kdlib.distillation_loss(teacher_logits=student, student_logits=teacher, temperature=1)
    assert float(right) > 2 * float(other)


# --- 05 ---


@pytest.mark.parametrize("shared, wider", [(0.8, True), (0.0, False)])
def test_05_1_pairs_help_where_a_seed_is_good_for_both(shared, wider):
    rng = np.random.default_rng(0)
    seed, other_seed = rng.normal(size=(2, 100_000))
    luck = np.sqrt(1 - shared**2) * rng.normal(size=(2, 100_000))
    paired = (shared * seed + luck[0]) - (shared * seed + luck[1])
    unpaired = (shared * seed + luck[0]) - (shared * other_seed + luck[1])
    assert abs(paired.mean() - unpaired.mean()) < 0.03
    assert (unpaired.std() > 1.2 * paired.std()) == wider


@pytest.mark.slow
def test_05_2_the_pairs_by_nll(do):
    cifar10 = TABLE[(TABLE.dataset == "cifar10") & TABLE.method.isin(["scratch", "distilled"])]
    nll = cifar10.pivot(index="seed", columns="method", values="nll")
    assert (nll.scratch < nll.distilled).all()
    digits = TABLE[(TABLE.dataset == "digits") & TABLE.method.isin(["scratch", "distilled"])]
    nll = digits.pivot(index="seed", columns="method", values="nll")
    assert (nll.distilled < nll.scratch).all()
    line = 'COLUMN, FACTOR, LABEL = "test_accuracy", 100, "test accuracy (%)"'
    do("05", {line: 'COLUMN, FACTOR, LABEL = "nll", 1, "nll"'}, until=line,
       check="assert len(pairs) == 6 and (pairs[list(METHODS)] > 0).all().all()")


def test_05_3_the_best_epoch_is_too_good_by_different_amounts():
    excess = {}
    for method in ("distilled", "scratch"):
        curves = [store.read_notes(path)["history"]["val_accuracy"]
                  for path in ROWS.glob(f"cifar10-{method}-seed?.json")]
        assert len(curves) == 6
        excess[method] = np.mean([max(curve) - curve[-1] for curve in curves])
    assert min(excess.values()) > 0 and excess["distilled"] != excess["scratch"]


def test_05_1_the_interval_without_pairs():
    cifar10 = TABLE[(TABLE.dataset == "cifar10") & TABLE.method.isin(["scratch", "distilled"])]
    pairs = 100 * cifar10.pivot(index="seed", columns="method", values="test_accuracy").dropna()
    in_pairs = scipy.stats.ttest_1samp(pairs.distilled - pairs.scratch, 0).confidence_interval()
    without = scipy.stats.ttest_ind(pairs.distilled, pairs.scratch).confidence_interval()
    said = "{:.2f} to {:.2f} points in pairs, {:.2f} to {:.2f}".format(*in_pairs, *without)
    assert said in exercises("05")


# --- 06 ---


def test_06_1_logits_twice_as_large():
    logits = np.random.default_rng(0).normal(0, 5, (100, 10)).astype("float32")
    np.testing.assert_array_equal(kdlib.soften(2 * logits, 2), kdlib.soften(logits, 1))


@pytest.mark.skipif(not CIFAR10.exists(), reason="no cifar10.npz in KD_DATA_DIR")
@pytest.mark.slow
def test_06_2_a_map_of_the_calibration_error(do):
    do("06", {'COLUMN = "agreement"': 'COLUMN = "ece"'}, until='COLUMN = "agreement"',
       check="assert other.max().max() < 10", KD_DATASET="cifar10")
    map_ = TABLE[(TABLE.dataset == "cifar10") & (TABLE.method == "distilled-5-epochs")
                 & (TABLE.seed == 0)].set_index(["temperature", "alpha"]).ece
    assert map_[1.0].between(0.015, 0.025).all() and 0.05 < map_[16.0, 0.0] < 0.07
    assert map_.idxmax()[0] >= 8 and map_.idxmax()[1] <= 0.1


def test_06_3_the_best_of_many_noisy_numbers_is_too_good():
    cells = np.random.default_rng(0).normal(85, 0.2, (10_000, 30))
    assert cells.max(axis=1).mean() > 85.3


# --- 07 ---


def test_07_1_what_a_test_for_a_positive_loss_finds():
    z, w = np.random.default_rng(0).normal(0, 3, (2, 2000, 10)).astype("float32")
    p, q = (np.asarray(kdlib.soften(logits, 4)) for logits in (z, w))
    loss = keras.losses.get("kl_divergence")
    default = np.asarray(loss(z / 4, w / 4))
    assert (default < 0).any() and (default > 0).any()  # 2: sometimes negative
    assert (p * (np.log(p) - q)).sum(-1).mean() < 0  # 6: without a logarithm
    shrunken = kdlib.distillation_loss(teacher_logits=z, student_logits=w, temperature=4) / 16
    assert float(shrunken) > 0  # 1
    assert float(ops.mean(ops.sum(p + q, axis=-1))) == pytest.approx(2, abs=1e-5)  # 7


@pytest.mark.long
@pytest.mark.slow
def test_07_2_and_3_a_whole_batch_and_stored_answers_out_of_step(do):
    do("07", {"dataset.x_train[dataset.y_train == 1][:50]": "dataset.x_train[:50]"},
       until='mixed = {alpha',
       check="""assert abs(accuracy(careless) - before) < 0.04  # 2: it does not forget
assert mixed[0.9].row["test_accuracy"] > 0.8 > 0.3 > mixed[0.1].row["test_accuracy"]  # 3""")


# --- 08 ---


@pytest.mark.long
@pytest.mark.skipif(not CIFAR10.exists(), reason="no cifar10.npz in KD_DATA_DIR")
@pytest.mark.slow
def test_08_2_no_floor_for_three_pairs(do):
    usual = TABLE[(TABLE.dataset == "cifar10") & TABLE.temperature.isin([np.nan, 4])
                  & TABLE.alpha.isin([np.nan, 0.1])].set_index(["method", "seed"]).test_accuracy
    gains = 100 * (usual["distilled-5-epochs"] - usual["scratch-5-epochs"]).dropna()
    narrow = scipy.stats.ttest_1samp(gains, 0).confidence_interval()
    said = "{:.2f} to {:.2f}".format(*narrow)
    assert f"It shrinks to {said}" in exercises("08")
    do("08", {"if n < 5": "if n < 2"}, until="questions = ",
       check=f"""shown = interval(questions["5 epochs"][2])
assert shown.split() == {said.split()}""", KD_DATASET="cifar10")


def test_08_3_shuffling_adds_false_similarities():
    logits = np.array([[9.0, 5.0, 1.0, 0.0]] * 50)
    mixed = controls.shuffled(logits, np.zeros(50, int), 4.0)
    assert (mixed[:, 0] == 9).all() and (mixed.argsort(-1)[:, -2] != 1).any()
    even = np.asarray(kdlib.soften(controls.evened(logits, np.zeros(50, int), 4.0), 4))
    assert np.allclose(even[:, 1:], even[:, 1:2]) and np.allclose(
        even[:, 0], np.asarray(kdlib.soften(logits, 4))[:, 0])


# --- 09 ---


def test_09_2_attention_needs_no_extra_layers():
    """The cell of the hints, changed as the exercise says, and as it stands."""
    cell = next(cell.source for cell in read("09").cells if "FeatureDistiller(" in cell.source)
    changed = cell.replace("features.Regressed(methods.fitnet, relu=True)", "methods.at")
    assert changed != cell
    check = checking_cell("09").replace("DONE = False", "DONE = True")
    space = {"keras": keras, "kdlib": kdlib, "features": features, "methods": features.methods,
             "teacher": kdlib.build_teacher(), "SEED": 0}
    exec(changed + "\n" + check, space)
    assert f"None, and {space['hints'].count_params():,} as before" in exercises("09")
    with pytest.raises(AssertionError, match="3 extra tensors"):
        exec(cell + "\n" + check, space)


# --- 11 ---


def test_11_2_one_view():
    source = next(cell.source for cell in read("11").cells if "def on_paper" in cell.source)
    costs = pd.read_csv(runs.REFERENCE / "scaling.csv")
    figures = {name: group.value for name, group in costs.groupby("figure")}
    asked = {"images": 45_000, "pixels": 32, "classes": 10}
    paper = []
    for code in (source, source.replace("views=20", "views=1")):
        space = {"figures": figures, "pd": pd}
        exec(code, space)
        paper.append(space["on_paper"]("CIFAR-10", **asked))
    ratio = paper[1] / paper[0]
    answers = ratio.index.str.contains("answers")
    assert answers.sum() == 3 and np.allclose(ratio[answers], 1 / 20)
    assert (ratio[~answers] == 1).all() and len(ratio) > 3
    assert "The three rows of answers (hours, bytes, bytes of the top five) fall to a twentieth. " \
        "All others stay" in exercises("11")


@pytest.mark.parametrize("with_norm", [False, True])
def test_11_3_gradients_of_two_halves(with_norm):
    """Their mean is the gradient of the whole batch, unless each half is normalised on its own."""
    keras.utils.set_random_seed(0)
    norm = [keras.layers.BatchNormalization()] if with_norm else []
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(8, "relu"), *norm,
                              keras.layers.Dense(3)])
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 6)).astype("float32"), rng.integers(0, 3, 20)

    def gradient(part):
        with tf.GradientTape() as tape:
            loss = keras.losses.sparse_categorical_crossentropy(
                y[part], model(x[part], training=True), from_logits=True)
            loss = tf.reduce_mean(loss)
        return np.concatenate([np.ravel(each) for each in tape.gradient(
            loss, model.trainable_variables)])

    halves = (gradient(slice(10)) + gradient(slice(10, None))) / 2
    apart = np.abs(halves - gradient(slice(None))).max()
    assert apart > 1e-2 if with_norm else apart < 1e-6
