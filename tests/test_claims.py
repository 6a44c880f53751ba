"""Comparisons in words: a sentence of a page, and what must hold for it to be true.

A sentence that compares needs a line in CLAIMS, with an expression over the published rows, or
in NOT_MEASURED, with the reason why nothing is to be measured. Pages are added one by one.
"""

from reference import runs, store  # isort: skip  (first: keeps TensorFlow quiet)
import functools
import re

import kdlib
import keras
import numpy as np
import pandas as pd
import pytest
import scipy.special
import scipy.stats
from conftest import CIFAR10, ROOT
from test_notebooks import cells, outputs, source, text_of

TABLE = pd.read_csv(ROOT / "reference" / "results.csv")
IMAGES_ALONE = 0.28  # points: what the test images alone add to the gain of one pair (notebook 05)


def points(method, dataset="cifar10"):
    """Test accuracies in points, by seed. Of several settings: T = 4 and alpha = 0.1."""
    rows = TABLE[(TABLE.dataset == dataset) & (TABLE.method == method)]
    usual = rows.temperature.isna() | ((rows.temperature == 4) & (rows.alpha == 0.1))
    return 100 * rows[usual].set_index("seed").test_accuracy


def gains(distilled="distilled", scratch="scratch"):
    """Within pairs: only seeds that both have."""
    return (points(distilled) - points(scratch)).dropna()


def lower_limit(values):
    return scipy.stats.ttest_1samp(values, 0).confidence_interval().low


@functools.cache
def cifar10():
    return kdlib.load_dataset("cifar10")


@functools.cache
def teacher_logits():
    """The published teacher's, on validation."""
    model = keras.saving.load_model(ROOT / "reference/weights/cifar10-teacher-seed0.keras")
    return runs.predict_logits(model, cifar10().x_val)


def soft(logits, temperature):
    return scipy.special.softmax(np.asarray(logits, "float64") / temperature, axis=-1)


def entropies(temperature):
    return scipy.special.entr(soft(teacher_logits(), temperature)).sum(-1)


def convolutions():
    """Parameters of each of the teacher's convolutions, and its multiplications an image."""
    found = [layer for layer in kdlib.build_teacher().layers
             if isinstance(layer, keras.layers.Conv2D)]
    parameters = np.array([layer.count_params() for layer in found])
    return parameters, parameters * [np.prod(layer.output.shape[1:3]) for layer in found]


def history(stem):
    return store.read_notes(ROOT / "reference" / "rows" / f"{stem}.json")["history"]


def printed(name, pattern):
    """Numbers in the outputs of a committed notebook, by a pattern with groups."""
    found = re.findall(pattern, "".join(map(text_of, outputs(ROOT / name))))
    assert found, f"{name} does not print {pattern}"
    return [tuple(map(float, each if isinstance(each, tuple) else (each,))) for each in found]


def hesitant():
    """The four images of Figure 3.1."""
    one, y = soft(teacher_logits(), 1), cifar10().y_val
    doubt = np.where(one.argmax(-1) == y, np.sort(one, axis=-1)[:, -2], -1)
    return one[[np.argmax(np.where(y == k, doubt, -1)) for k in (2, 3, 7, 9)]]


@functools.cache
def fresh_logits():
    """Of the student that notebook 04 begins with: 250 validation images, then IMAGE."""
    keras.utils.set_random_seed(0)
    images = cifar10().x_val[[*range(250), IMAGE]]
    return runs.predict_logits(kdlib.build_student(), images)


def gap(temperature, size=1.0):
    """q - p of each class, for 250 images and for IMAGE."""
    z = teacher_logits()[[*range(250), IMAGE]]
    return soft(size * fresh_logits(), temperature) - soft(size * z, temperature)


def gradient_length(temperature, size=1.0):
    """With T², the mean over 250 images."""
    return temperature * np.linalg.norm(gap(temperature, size)[:-1], axis=-1).mean()


def falls(temperature, size=1.0):
    """How many times smaller the gradient without T² is at 4 T."""
    return 16 * gradient_length(temperature, size) / gradient_length(4 * temperature, size)


def loss_against_t():
    """T² · KL over the grid of Figure 4.3, and its limit."""
    z, s = teacher_logits()[:250].astype("float64"), fresh_logits()[:250].astype("float64")
    losses = [t**2 * scipy.special.rel_entr(soft(z, t), soft(s, t)).sum(-1).mean() for t in GRID]
    centred = (z - z.mean(-1, keepdims=True)) - (s - s.mean(-1, keepdims=True))
    return np.array(losses), (centred**2).sum(-1).mean() / 20


GRID = np.geomspace(1, 256, 49)
IMAGE = 1009  # the image of the series
NOTEBOOK_1, NOTEBOOK_2, NOTEBOOK_3, NOTEBOOK_4 = (
    f"notebooks/{name}.ipynb"
    for name in ("01_dataset", "02_teacher", "03_soft_labels", "04_distillation"))
CLAIMS = {"README.md": {
    "in each of which the distilled one is better":
        lambda: len(gains()) == 5 and (gains() > 0).all(),
    "In the second, distilling lost":  # the PyTorch tutorial's numbers, as it prints them
        lambda: "| 75.60 % | 70.41 % | 70.19 % |" in page("README.md"),
    "That is little, but more than the students' seeds explain":
        lambda: gains().mean() < 1 and lower_limit(gains()) > 0,
    "**After 5 epochs** the distilled students reach 85.68 %, those from scratch 83.94 %":
        lambda: lower_limit(gains("distilled-5-epochs", "scratch-5-epochs")) > 0,
    "one pair, and within the noise":
        lambda: len(gains("distilled-100-epochs", "scratch-100-epochs")) == 1 and np.abs(
            gains("distilled-100-epochs", "scratch-100-epochs")).max() < 1.96 * IMAGES_ALONE,
    "a student alone reaches 49.48 % in 5 epochs, one with the teacher's answers to all images":
        lambda: gains("distilled-5-epochs-1-percent", "scratch-5-epochs-1-percent").min() > 30,
}, NOTEBOOK_1: {
    "They differ from what we just measured by less than 0.2":
        lambda: max(np.abs(cifar10().x_train.mean((0, 1, 2)) - kdlib.PIXEL_MEAN).max(),
                    np.abs(cifar10().x_train.std((0, 1, 2)) - kdlib.PIXEL_STD).max()) < 0.2,
}, NOTEBOOK_2: {
    "The last three hold most of the parameters":
        lambda: convolutions()[0][-3:].sum() > convolutions()[0].sum() / 2,
    "The first four do most of the work":
        lambda: convolutions()[1][:4].sum() > convolutions()[1].sum() / 2,
    "does next to none": lambda: convolutions()[1][0] < 0.01 * convolutions()[1].sum(),
    "On digits it beats plain SGD by about ten points":
        lambda: 8 < points("scratch", "digits")[0] - points("scratch-sgd", "digits")[0] < 12,
    "Validation goes up and down in the first 12 epochs and rises steadily in the last 8":
        lambda: (np.diff(history("cifar10-teacher-seed0")["val_accuracy"])[:11] < 0).any()
        and (np.diff(history("cifar10-teacher-seed0")["val_accuracy"])[11:] > 0).all(),
    "the truck is less than half a unit ahead of the automobile, and that makes 0.59 against 0.41":
        lambda: 0 < np.diff(teacher_logits()[IMAGE][[1, 9]])[0] < 0.5
        and soft(teacher_logits()[IMAGE], 1)[[9, 1]].round(2).tolist() == [0.59, 0.41],
    "For all other classes it prints 0.00":
        lambda: np.sort(soft(teacher_logits()[IMAGE], 1))[-3] < 0.005,
    "**You should see** both losses fall":
        lambda: all(last < first for first, last in printed(
            NOTEBOOK_2, r"loss ([\d.]+) in epoch 1, ([\d.]+) in epoch")),
}, NOTEBOOK_3: {
    "**You should see** the first share fall and the last one rise with T":
        lambda: (np.diff([soft([6, 3, -1], t) for t in (1, 2, 4, 8, 16)], axis=0)[:, 0] < 0).all()
        and (np.diff([soft([6, 3, -1], t) for t in (1, 2, 4, 8, 16)], axis=0)[:, 2] > 0).all(),
    "three shares between 0.30 and 0.39":
        lambda: np.sort(soft(soft([6, 3, -1], 1), 4))[[0, 2]].round(2).tolist() == [0.3, 0.39],
    "At T = 1 two to four classes share nearly everything":
        lambda: all(2 <= np.sum(np.cumsum(np.sort(each)[::-1]) < 0.95) + 1 <= 4
                    for each in hesitant()),
    "after truck and automobile comes the ship, ahead of every animal":
        lambda: teacher_logits()[IMAGE].argsort()[::-1][:3].tolist() == [9, 1, 8],
    "At T = 1 most labels are nearly hard": lambda: np.median(entropies(1)) < 0.05,
    "At high T they are nearly flat": lambda: np.median(entropies(64)) > 0.99 * np.log(10),
    "a correlation of about 0.7 and the same favourite in six classes of ten":
        lambda: 0.65 < printed(NOTEBOOK_3, r"over 90 cells: ([\d.]+)")[0][0] < 0.75
        and printed(NOTEBOOK_3, r"same favourite in (\d+) of (\d+)") == [(6, 10)],
}, NOTEBOOK_4: {
    "**You should see** the same gradients, and a floor far from zero":
        lambda: printed(NOTEBOOK_4, r"largest difference ([\d.]+)") == [(0.0,)]
        and printed(NOTEBOOK_4, r"cross-entropy: \[([\d.]+)")[0][0] > 1,
    "On CIFAR-10 these are two classes, truck and automobile":
        lambda: np.flatnonzero(gap(4)[-1] < 0).tolist() == [1, 9],
    "q − p fall by about a factor of four per line once T is large":
        lambda: all(3.5 < gap(t)[-1, 9] / gap(4 * t)[-1, 9] < 5 for t in (4, 16, 64)),
    "The third column falls by about sixteen":
        lambda: all(14 < 4 * gap(t)[-1, 9] / gap(4 * t)[-1, 9] < 20 for t in (4, 16, 64)),
    "**You should see** 16 at the lower right": lambda: 15.9 < falls(16, 0.01) < 16.1,
    "it starts at about 6 (and overshoots later)": lambda: 5.5 < falls(1) < 6.5 and falls(4) > 16,
    "it stays within a factor of about three on the left, and is level on the right":
        lambda: max(map(gradient_length, GRID)) / min(map(gradient_length, GRID)) < 3.3
        and np.ptp([gradient_length(t, 0.01) for t in GRID]) < 0.1 * gradient_length(1, 0.01),
    "it ends up tens of thousands of times smaller":
        lambda: 10_000 < 256**2 * gradient_length(1) / gradient_length(256) < 100_000,
    "It rises first, and then approaches the limit from above":
        lambda: np.diff(loss_against_t()[0])[0] > 0 and np.diff(loss_against_t()[0])[-1] < 0
        and loss_against_t()[0][-1] > loss_against_t()[1],
    "**You should see** the same loss twice, a smaller one after the epoch, and an accuracy above":
        lambda: (by_hand := printed(NOTEBOOK_4, r"by hand ([\d.]+), in the D\w+ ([\d.]+)")[0])[0]
        == by_hand[1] > printed(NOTEBOOK_4, r"epoch: loss ([\d.]+)")[0][0]
        and printed(NOTEBOOK_4, r"accuracy (\d+)%")[0][0] > 10,
    "**You should see** that SGD loses nearly everything":
        lambda: min(printed(NOTEBOOK_4, r"SGD   alpha = [\d.]+: (\d+)%")) > (80,),
    "With Muon and alpha = 0 the step stays practically the same":
        lambda: printed(NOTEBOOK_4, r"Muon  alpha = 0.0: (\d+)%") < [(2,)],
    "With alpha = 0.1 it does change the step":
        lambda: printed(NOTEBOOK_4, r"Muon  alpha = 0.1: (\d+)%") > [(10,)],
    "**You should see** both losses fall":
        lambda: all(losses[-1] < losses[0] for losses in map(
            history("cifar10-distilled-seed0").get, ("distillation_loss", "student_loss"))),
    "Nearly as good: 94.0 % on digits, against 94.2 % with labels":
        lambda: 0 < points("distilled", "digits")[0] - 100 * TABLE[
            TABLE.method == "distilled-no-labels"].test_accuracy.item() < 0.5,
}}
NOT_MEASURED = {"README.md": {
    "Compare within a row": "advice",
    "speaks of one teacher": "says what the interval covers",
    "Run all tests": "times",
    "Best read in order": "advice",
    "see the same view of an image": "how it works",
    "give other numbers than those above": "other data",
    "ends with the same weights": "test_kill and test_runs",
    '"The same" means': "test_runs",
    "beside the same networks in PyTorch": "benchmark.csv",
    "with the same input and logits out": "what is asked for",
}, NOTEBOOK_1: {
    "never choose and report on the same images": "what is learned here",
    "makes more mistakes": "claims of 05",
    "see the same image": "how it works",
    "trains the same student without a teacher": "what comes",
    "is partly the luckiest": "a fact about maxima",
    "says more about an image": "an example",
    "draws the same share": "the output beside it", "Why are the parts": "a question",
    "It's the habit that matters": "advice", "| confidence |": "definitions",
    "it's the same for every model": "the data are the same",
    "45,000 images become more": "a question",
    "The label stays the same": "how it works",
    "Are the views the same": "a question",
    "*the same views in the same order*": "test_runs",
    "trains almost as fast": "benchmark.csv, distill_over_scratch_epoch",
    "which two classes": "a question",
    "look the same?": "a question",
    "more likely than not": "test_exercises",
    "The same goes for": "an explanation",
    "the same views for teacher and student": "a title",
    "| word | 中文 |": "definitions",
}, NOTEBOOK_2: {
    "halve the picture": "how it works", "half as high": "the output beside it",
    "show them twice": "how it works", "between 30 and 45 %": "depends on the processor",
    "differs in four ways": "a list", "better optimizer": "a claim of exercise 2",
    "at the same pace": "how Muon works", "a better Adam": "advice",
    "falls to zero along a cosine": "test_runs", "shrinks the kernels a little": "how it works",
    "than one sitting": "a heading", "in the same way, with the two": "how it works",
    "bit for bit on the same machine": "test_runs", "rise steadily?": "a question",
    "As it falls, they settle": "an explanation", "never pick the best epoch": "a rule",
    "of about the same size": "the course's own words", "mixed up most": "the output below",
    "hardly says more than the hard label": "an explanation", "are alike": "what 03 measures",
    "Where the learning rate is highest": "an explanation",
}, NOTEBOOK_3: {
    "finds alike": "a goal", "find alike?": "a heading", "a larger number means": "a definition",
    "differences shrink": "arithmetic", "as T grows": "a question",
    "differ by at most 0.25": "arithmetic", "hesitates most": "how they are chosen",
    "Why does this teach more": "a question", "hardly anything else": "an example",
    "most images are not like that": "a heading", "A higher temperature": "arithmetic",
    "no more than the top answer": "a limit", "look the same to the eye": "a limit",
    "We average": "how it is done", "gets the most:": "the output below",
    "point to the same classes?": "a question", "show the same thing": "the six of ten above",
    "The image is the same": "how it is made", "it is nearly flat": "the claim above",
    "which classes are alike": "the claim above", "can a temperature change": "a question",
    "even sharper": "arithmetic", "by the same positive number": "arithmetic",
    "What differs on digits": "of other data",
}, NOTEBOOK_4: {
    "is the same formula": "test_notebooks", "how do the two losses differ": "a question",
    "narrower and shallower": "the table beside it", "the teacher sees more": "arithmetic",
    "and twice over": "the steps below", "shrinks like 1/T as well": "derived there",
    "should fall 16-fold": "derived there", "with a tenth and a hundredth": "how it is done",
    "more or less than 16": "a question", "can't be larger than 1": "arithmetic",
    "unlikely classes hardly count": "an explanation",
    "the same images (that's Dropout)": "the output beside it",
    "find the same loss": "a question", "weigh 16 times more": "arithmetic",
    "means little": "advice", "Would the student_loss fall": "a question",
    "on the same batches": "what comes", "larger than the teacher's own": "arithmetic",
    "falls all the same": "test_exercises", "must see it too": "arithmetic",
    "What differs on digits": "of other data",
}}
COMPARES = re.compile(
    r"\b(more|less|fewer|most|least|hardly|nearly|almost|better|worse|best|worst|higher|lower"
    r"|larger|smaller|greater|falls?|rises?|grows?|shrinks?|same|differs?|alike|faster|slower"
    r"|los[et]s?|beats?|within|exceeds?|twice|half|little|than|reach(?:es)?)\b", re.IGNORECASE)


@functools.cache
def page(name):
    """The prose of a page in one line."""
    path = ROOT / name
    text = "\n\n".join(map(source, cells(path, "markdown"))) if path.suffix == ".ipynb" else (
        path.read_text())
    return re.sub(r"[ \n]+", " ", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def sentences(name):
    return re.split(r"(?<=[.!?:)*]) (?=[-A-Z*`!(\"|#])", page(name))


@pytest.mark.parametrize("name, claim", [(name, each) for name in CLAIMS for each in CLAIMS[name]])
def test_claims_hold(name, claim):
    if name.endswith(".ipynb") and not CIFAR10.exists():
        pytest.skip("no cifar10.npz in KD_DATA_DIR")
    assert page(name).count(claim) == 1
    assert CLAIMS[name][claim]()


@pytest.mark.parametrize("name", CLAIMS)
def test_every_comparison_is_a_claim(name):
    known = [*CLAIMS[name], *NOT_MEASURED[name]]
    bare = [each for each in sentences(name)
            if COMPARES.search(each) and not any(part in each for part in known)]
    assert bare == []
    assert all(part in page(name) for part in NOT_MEASURED[name])


def test_the_table_of_part_a_is_that_of_the_rows():
    text = (ROOT / "reference" / "PROTOCOL.md").read_text().partition("### A. The recipe, after")[2]
    rows = TABLE[(TABLE.seed == 100) & TABLE.method.str.contains("-8-epochs")]
    assert sorted(re.findall(r"\b\d\d\.\d\d\b", text.partition("## Changes")[0])) == sorted(
        f"{100 * accuracy:.2f}" for accuracy in rows.val_accuracy)
    best = 100 * rows.set_index("method").val_accuracy
    gain = best["scratch-8-epochs-smoothing"] - best["scratch-8-epochs"]
    assert f"by {gain:.2f}" in text
