"""The notebooks are kept clean, and say what the library does and the table holds."""

from reference import evidence, plots, runs  # isort: skip  (first: keeps TensorFlow quiet)
import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import kdlib
import keras
import numpy as np
import pandas as pd
import pytest
import scipy.stats
from test_distiller import tiny

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def run_nbval(flag, path, **environment):
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", flag,
        "--nbval-cell-timeout=900", "--nbval-current-env", "-n0", str(path),
    ]
    done = subprocess.run(
        command, env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout


# --- hygiene ---


def cells(path, kind=None):
    return [cell for cell in json.loads(path.read_text())["cells"]
            if kind in (None, cell["cell_type"])]


def source(cell):
    return "".join(cell["source"])


def outputs(path):
    return [output for cell in cells(path, "code") for output in cell["outputs"]]


def text_of(output):
    return "".join(output.get("text", [])) + "".join(
        output.get("data", {}).get("text/plain", []))


@each_notebook
def test_executed_in_order(path):
    counts = [cell["execution_count"] for cell in cells(path, "code")]
    assert counts == list(range(1, len(counts) + 1))


@each_notebook
def test_outputs_are_clean(path):
    for output in outputs(path):
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr", text_of(output)
        text = text_of(output)
        assert not re.search(r"0x[0-9a-f]{6,}", text), text
        assert not re.search(r"%\||(epoch|view)s?/s|s/(epoch|view)", text), "a bar that stays"
        assert not re.search(r"/(home|root|tmp|work|Users|usr)/", text), text
    assert path.stat().st_size < 500_000


@each_notebook
def test_shape(path):
    code = [source(cell) for cell in cells(path, "code")]
    prose = [source(cell) for cell in cells(path, "markdown")]
    assert 20 <= len(code) + len(prose) <= 50
    for cell in code:
        assert len(cell.splitlines()) <= 25
        assert max(map(len, cell.splitlines())) <= 88
    number = path.stem[:2]
    assert prose[0].startswith(f"# {number} · ")
    assert "Running time" in prose[0] and "## Summary" in prose[-1]
    assert "## Exercises" in prose[-1] and "<details>" in prose[-1]
    captions = re.findall(rf"\*Figure {int(number)}\.(\d+):", "\n".join(prose))
    figures = [int(n) for n in captions]
    assert figures == list(range(1, len(figures) + 1)) and figures


@each_notebook
def test_headings_in_order_and_a_caption_below_each_figure(path):
    prose = "\n".join(source(cell) for cell in cells(path, "markdown"))
    levels = [len(marks) for marks in re.findall(r"^(#+) ", prose, re.MULTILINE)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(below <= above + 1 for above, below in zip(levels, levels[1:], strict=False))
    for cell, after in zip(cells(path), cells(path)[1:], strict=False):
        figures = [o for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
        if figures:
            assert source(after).startswith("*Figure "), source(cell)[-200:]


@each_notebook
def test_links_resolve(path):
    for cell in cells(path, "markdown"):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", source(cell)):
            assert (path.parent / link).exists(), link


def defined_in(path, *names):
    """Functions and classes as the notebook defines them, with the names that it imports."""
    code = "\n".join(source(cell) for cell in cells(path, "code"))
    found = [node for node in ast.parse(code).body
             if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in names]
    assert [node.name for node in found] == list(names)
    space = {"keras": keras, "ops": keras.ops, "np": np}
    exec(compile(ast.Module(found, []), path.name, "exec"), space)
    return space[names[-1]]


def test_soften_in_03_is_that_of_kdlib():
    inline = defined_in(ROOT / "notebooks" / "03_soft_labels.ipynb", "soften")
    logits = np.random.default_rng(0).normal(0, 5, (9, 10)).astype("float32")
    for temperature in (0.5, 1.0, 4.0):
        np.testing.assert_array_equal(
            inline(logits, temperature), kdlib.soften(logits, temperature))


def test_distillation_loss_in_04_is_that_of_kdlib():
    inline = defined_in(ROOT / "notebooks" / "04_distillation.ipynb", "distillation_loss")
    teacher, student = np.random.default_rng(0).normal(0, 5, (2, 9, 10)).astype("float32")
    for temperature in (0.5, 1.0, 4.0):
        arguments = dict(teacher_logits=teacher, student_logits=student, temperature=temperature)
        want = float(kdlib.distillation_loss(**arguments))
        assert float(inline(**arguments)) == pytest.approx(want, rel=1e-4)


def test_holm_in_08_is_that_of_evidence():
    inline = defined_in(ROOT / "notebooks" / "08_when_it_pays.ipynb", "holm")
    for p in np.random.default_rng(0).random((20, 6)) ** 3:
        np.testing.assert_allclose(inline(p), evidence.holm(p))


def test_the_distiller_in_04_is_that_of_kdlib():
    """The same losses and, after some steps of training, the same weights."""
    path = ROOT / "notebooks" / "04_distillation.ipynb"
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 32, 3)).astype("uint8")
    labels, trained = np.arange(32) % 10, []
    for kind in (defined_in(path, "distillation_loss", "Distiller"), kdlib.Distiller):
        student = tiny(seed=1)
        made = kind(student=student, teacher=tiny(8, dropout=0.5), temperature=4.0, alpha=0.3)
        made.compile(optimizer=keras.optimizers.SGD(0.1))
        history = made.fit(images, labels, batch_size=8, epochs=2, shuffle=False, verbose=0)
        trained.append((history.history["loss"], student.get_weights()))
    (losses, weights), (want_losses, want_weights) = trained
    np.testing.assert_allclose(losses, want_losses, rtol=1e-4)
    for got, want in zip(weights, want_weights, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)


def test_nobody_has_to_open_the_engine():
    """02 compiles and fits with plain Keras before it loads the published teacher."""
    code = [source(cell) for cell in cells(ROOT / "notebooks" / "02_teacher.ipynb", "code")]
    first = {word: next(k for k, cell in enumerate(code) if word in cell)
             for word in (".compile(", ".fit(", "train_or_load(")}
    assert first[".compile("] <= first[".fit("] < first["train_or_load("]


# --- numbers in prose ---

TABLE = pd.read_csv(ROOT / "reference" / "results.csv")
# Other people's results, quoted with their source beside them.
CITED = {"76.65", "70.75", "64.6", "48.16", "75.60", "70.41", "70.19", "88.98"}


def measured_percentages():
    figures = ["val_accuracy", "test_accuracy", "agreement"]
    means = TABLE.groupby(["dataset", "method", "temperature", "alpha"], dropna=False)[
        figures].mean()
    columns = np.concatenate([TABLE[figures].to_numpy().ravel(), means.to_numpy().ravel()])
    return {f"{100 * value:.{digits}f}" for value in columns for digits in (1, 2)}


@pytest.mark.parametrize(
    "path", [*NOTEBOOKS, *sorted(ROOT.glob("*.md")), *sorted((ROOT / "reference").glob("*.md"))],
    ids=lambda path: path.stem,
)
def test_percentages_in_prose_were_measured(path):
    prose = [source(c) for c in cells(path, "markdown")] if path.suffix == ".ipynb" else [
        path.read_text()]
    quoted = set(re.findall(r"(\d+\.\d+)\s?%", "\n".join(prose)))
    assert quoted <= measured_percentages() | CITED


README, CHINESE = ROOT / "README.md", ROOT / "reference" / "README.zh-CN.md"
each_readme = pytest.mark.parametrize("path", [README, CHINESE], ids=lambda path: path.name)


@each_readme
def test_results_in_the_readme_are_those_of_the_table(path):
    methods = ["teacher", "distilled", "scratch"]
    mine = TABLE[(TABLE.dataset == "cifar10") & TABLE.method.isin(methods)].pivot(
        index="seed", columns="method", values="test_accuracy")
    text = path.read_text()
    pairs = mine.dropna()  # each with a teacher of its own
    teacher, scratch, distilled = (100 * pairs[m].mean() for m in (
        "teacher", "scratch", "distilled"))
    assert f"| {teacher:.2f} % | {scratch:.2f} % | {distilled:.2f} % |" in text
    gain = 100 * (pairs.distilled - pairs.scratch)
    low, high = scipy.stats.ttest_1samp(gain, 0).confidence_interval()
    words = (f"{gain.mean():.2f} points. The 95 % interval is {low:.2f} to {high:.2f},",
             f"{gain.mean():.2f} 个百分点（95 % 置信区间 {low:.2f} 到 {high:.2f}")
    assert any(sentence in text for sentence in words)


@each_readme
def test_each_cell_of_the_table_in_the_readme(path):
    """Five rows under their headings. The two of others are only put in order: who lost."""
    names = {"teacher": "teacher", "student from scratch": "scratch",
             "student distilled": "distilled",
             "教师": "teacher", "从零训练的学生": "scratch", "蒸馏学生": "distilled"}
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in path.read_text().split("##")[0].splitlines() if line.startswith("|")]
    head, _, *body = rows
    assert [len(row) for row in body] == [4] * 5
    said = pd.DataFrame([[float(cell.removesuffix(" %")) for cell in row[1:]] for row in body],
                        columns=[names[each] for each in head[1:]])
    mean = 100 * TABLE[(TABLE.dataset == "cifar10") & (TABLE.seed < 100)
                       & TABLE.temperature.isin([np.nan, 4])
                       & TABLE.alpha.isin([np.nan, 0.1])].groupby("method").test_accuracy.mean()
    long = TABLE[(TABLE.method == "distilled-100-epochs") & TABLE.seed.lt(3)]
    taught = TABLE[(TABLE.dataset == "cifar10") & (TABLE.method == "teacher")].set_index(
        "seed").test_accuracy[long.seed]
    want = [[mean.teacher, mean.scratch, mean.distilled],
            [100 * taught.mean(), mean["scratch-100-epochs"], mean["distilled-100-epochs"]],
            [mean["teacher-best"], mean["best-scratch"], mean.best]]
    np.testing.assert_allclose(said[["teacher", "scratch", "distilled"]][2:], want, atol=0.0051)
    assert said.scratch[0] < said.distilled[0] and said.distilled[1] < said.scratch[1]


def test_the_results_in_chinese_have_the_numbers_of_those_in_english():
    """Which are claims."""
    found = [sorted(re.findall(r"-?\d+\.\d\d", "".join(
        line for line in re.split(r"\n(?=- |\n)", path.read_text().split("\n## ")[0])
        if line.startswith("- ")))) for path in (README, CHINESE)]
    assert found[0] == found[1] and len(found[0]) > 40


@each_readme
def test_the_figure_of_the_readme_shows_the_gains_of_the_table(path):
    drawn = plots.gains(TABLE.query("dataset == 'cifar10' and seed < 100"))
    picture = re.search(r"!\[([^\]]*)\]\([^)]*results.png\)", path.read_text())[1]
    said = re.findall(r"\d\.\d\d", picture)
    assert said == [f"{drawn[epochs].mean():.2f}" for epochs in (5, 20, 100)]
    for epochs, label in ((5, "-5-epochs"), (20, ""), (100, "-100-epochs")):
        rows = TABLE[(TABLE.dataset == "cifar10") & ~((TABLE.alpha != 0.1) & TABLE.alpha.notna())
                     & ~((TABLE.temperature != 4) & TABLE.temperature.notna())]
        taught, alone = (100 * rows[rows.method == f"{student}{label}"].set_index("seed")
                         .test_accuracy for student in ("distilled", "scratch"))
        np.testing.assert_allclose(drawn[epochs], (taught - alone).dropna())
        if epochs == 100:  # like with like: students of both kinds, with the same seeds
            labels = {text.get_text() for text in plots.results().axes[0].texts}
            assert {f"{each[drawn[epochs].index].mean():.2f} % (100 epochs)"
                    for each in (taught, alone)} <= labels
            best = 100 * TABLE.set_index("method").test_accuracy
            assert {f"{best[name].mean():.2f} % (best small student)"
                    for name in ("best", "best-scratch")} <= labels


@each_readme
def test_links_in_the_readme_resolve(path):
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
        assert (path.parent / link).exists(), link


@each_readme
def test_the_code_in_the_readme_runs(path, tmp_path, monkeypatch):
    """Every block, one after the other, with small models where it says teacher and student."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3)).astype("uint8")
    space = {"student": tiny(2), "teacher": tiny(8), "images": images,
             "labels": np.arange(20) % 10, "teacher_logits": tiny(8).predict(images, verbose=0)}
    for code in blocks:
        exec(code, space)
    saved = keras.saving.load_model(tmp_path / "student.keras")
    assert saved.count_params() == space["student"].count_params()
    kdlib.Distiller(student=space["student"], teacher=space["teacher"], temperature=4)


@each_readme
def test_parameters_in_the_readme_are_those_of_the_table(path):
    quoted = set(re.findall(r"\d{1,3}(?:,\d{3})+", path.read_text()))
    measured = {f"{n:,}" for n in TABLE[TABLE.seed < 100].parameters}
    assert measured == quoted


def test_results_are_a_tidy_table():
    assert list(TABLE) == runs.RESULT_COLUMNS
    assert not TABLE.duplicated(["dataset", "method", "temperature", "alpha", "seed"]).any()
    choice = TABLE.seed >= 100  # runs for choosing on validation: the test set was not looked at
    assert TABLE[choice][["test_accuracy", "nll", "ece", "agreement"]].isna().all(axis=None)
    accuracies = TABLE[["val_accuracy", "test_accuracy"]].where(~choice, TABLE.val_accuracy, axis=0)
    diverged = TABLE.val_accuracy.isna()
    assert (((0 <= accuracies) & (accuracies <= 1)).all(axis=1) | diverged).all()
    assert TABLE[diverged][["val_accuracy", "test_accuracy", "nll"]].isna().all(axis=None)


def test_the_linter_passes():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
