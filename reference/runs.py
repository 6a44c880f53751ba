"""Train or load: recipes, batches, teachers' answers, and the numbers that a run is judged by.

Nothing here has to be read to follow a lesson. Notebook 02 shows ``Batches`` and
``make_optimizer``; what a run is known by, and how it survives a kill, is in store.py.
"""

from __future__ import annotations

import contextlib
import operator
import os
import re
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import filelock
import kdlib
import keras
import numpy as np
import scipy.special
import tensorflow as tf
from kdlib import require
from keras import layers, ops
from tqdm.auto import tqdm
from tqdm.keras import TqdmCallback

from reference import store

ROOT = Path(__file__).resolve().parents[1]  # relative paths in KD_RUNS_DIR begin here
REFERENCE = ROOT / "reference"

# --- recipes --------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training besides model, data and seed.

    Chosen on validation. The distilled student and the student from scratch share one.
    """

    epochs: int
    batch_size: int = 125
    optimizer: str = "muon"  # or "sgd" (Nesterov): warm-up, cosine decay; "adam": constant rate
    learning_rate: float = 0.02  # the peak of the schedule
    warmup: float = 0.1  # share of all steps in which the rate climbs to its peak
    momentum: float = 0.9
    weight_decay: float = 0.1  # decoupled, times the rate, on kernels only
    smoothing: float = 0.0  # of the hard labels, when there is no teacher
    average: float = 0.0  # momentum of an average over steps that replaces the last weights
    views: int = 20  # augmented views per image, reused in turn (epoch e shows view e % views).
    # 0 makes new views every epoch, so the teacher must run live.
    shift: int = 4  # pixels
    flip: bool = True  # not for digits or letters

    def __post_init__(self):
        for name, low in (("epochs", 1), ("batch_size", 1), ("views", 0), ("shift", 0)):
            value = getattr(self, name)
            require(isinstance(value, (int, np.integer)) and value >= low,
                    f"{name} is {value!r}. Give a whole number from {low} on.")
        for name in ("warmup", "momentum", "smoothing", "average"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name} is {value}. Give a number from 0 to below 1.")
        require(self.optimizer in ("muon", "sgd", "adam"),
                f"optimizer is {self.optimizer!r}. Choose 'muon', 'sgd' or 'adam'.")
        require(self.learning_rate >= 0,
                f"learning_rate is {self.learning_rate}. It cannot be negative.")


RECIPES = {
    ("cifar10", "teacher"): Recipe(epochs=20),
    ("cifar10", "student"): Recipe(epochs=20),
    ("digits", "teacher"): Recipe(epochs=20, batch_size=50, flip=False),
    ("digits", "student"): Recipe(epochs=7, batch_size=50, flip=False),
}


def recipe_for(dataset, method: str) -> Recipe:
    """The published recipe of a dataset for ``"teacher"`` or any student.

    A dataset of your own gets CIFAR-10's, which mirrors images: see Recipe.flip.
    """
    role = "teacher" if method.startswith("teacher") else "student"
    return RECIPES.get((dataset.name, role), RECIPES["cifar10", role])


# --- batches and optimizer ------------------------------------------------------------


class Batches(keras.utils.PyDataset):
    """(images, labels) of every epoch. Order and views follow from the seed and the epoch.

    With ``answers``, one array (images, classes) a view: ((images, logits), labels). The
    answer always belongs to the image and the view beside it. Each epoch shows every image
    once; the last batch may be smaller.
    """

    def __init__(self, dataset, recipe: Recipe, *, seed: int, first_epoch: int = 0, answers=None):
        super().__init__()
        self.x, self.y, self.answers = dataset.x_train, dataset.y_train, answers
        self.recipe, self.seed, self.epoch = recipe, seed, first_epoch - 1
        self.views = recipe.views or recipe.epochs
        self.codes = kdlib.view_codes(images=len(self.y), views=self.views, shift=recipe.shift,
                                      flip=recipe.flip)
        self._shuffle(first_epoch)

    def __len__(self):
        return -(-len(self.y) // self.recipe.batch_size)

    def on_epoch_begin(self):
        self.epoch += 1
        self._shuffle(self.epoch)

    def _shuffle(self, epoch):
        self.order = np.random.default_rng([self.seed, epoch]).permutation(len(self.y))
        self.view = epoch % self.views

    def __getitem__(self, batch):
        size = self.recipe.batch_size
        index = self.order[batch * size : (batch + 1) * size]
        images = kdlib.augment(self.x[index], self.codes[self.view, index])
        if self.answers is not None:
            images = images, self.answers[self.view][index]
        return images, self.y[index]


def make_optimizer(recipe: Recipe, steps: int, *, last_layer: str) -> keras.optimizers.Optimizer:
    """The recipe's optimizer for so many steps an epoch; the last layer goes to AdamW."""
    average = dict(use_ema=bool(recipe.average), ema_momentum=recipe.average or 0.99)
    if recipe.optimizer == "adam":
        return keras.optimizers.Adam(recipe.learning_rate, **average)
    warmup = int(recipe.warmup * recipe.epochs * steps)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, recipe.epochs * steps - warmup, warmup_target=recipe.learning_rate,
        warmup_steps=warmup)
    settings = dict(learning_rate=schedule, momentum=recipe.momentum, nesterov=True,
                    weight_decay=recipe.weight_decay, **average)
    if recipe.optimizer == "sgd":
        optimizer = keras.optimizers.SGD(**settings)
    else:
        optimizer = Muon(**settings, adam_weight_decay=recipe.weight_decay, adam_lr_ratio=0.5,
                         exclude_layers=[last_layer])
    optimizer.exclude_from_weight_decay(var_names=["gamma", "beta", "bias"])
    return optimizer


class Muon(keras.optimizers.Muon):
    """Keras's Muon, for convolutions too: a kernel is a matrix (inputs, outputs).

    The momentum of a kernel is made orthogonal before each step, so that every direction
    learns at the same pace. Everything else is left to AdamW: vectors, embeddings, depthwise
    kernels, and the excluded layers. A step does not depend on the size of the loss.

    Source: Jordan et al. 2024 (kellerjordan.github.io/posts/muon); the size of a step: Liu
    et al. 2025, section 2.2.
    """

    def _should_use_adamw(self, variable):
        *_, layer, name = ("/" + variable.path).split("/")
        return name != "kernel" or len(variable.shape) < 2 or layer in self.exclude_layers

    def zeropower_via_newtonschulz5(self, x, steps):
        return _as_matrix(x, lambda m: super(Muon, self).zeropower_via_newtonschulz5(m, steps))

    def lr_adjust(self, x):
        return _as_matrix(x, super().lr_adjust)


def _as_matrix(kernel, function):
    return ops.reshape(function(ops.reshape(kernel, (-1, kernel.shape[-1]))), kernel.shape)


class FusedBatchNormalization(layers.BatchNormalization):
    """The same numbers as Keras's layer, which passes three times over the images."""

    def call(self, inputs, training=None, mask=None):
        if not (training and self.trainable and mask is None and len(inputs.shape) == 4):
            return super().call(inputs, training=training, mask=mask)
        outputs, mean, variance = tf.compat.v1.nn.fused_batch_norm(
            inputs, self.gamma, self.beta, epsilon=self.epsilon)[:3]
        count = tf.cast(tf.size(inputs) // inputs.shape[-1], tf.float32)
        variance *= (count - 1) / count  # the kernel divides by count - 1, Keras by count
        for moving, batch in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moving.assign(moving * self.momentum + batch * (1 - self.momentum))
        return outputs


@contextlib.contextmanager
def fused_norm(model):
    """Let BatchNorm train on TensorFlow's one-pass kernel: 7 to 19 % faster."""
    plain = [layer for layer in model._flatten_layers() if type(layer) is layers.BatchNormalization
             and layer.center and layer.scale and layer.axis in (-1, 3)
             and layer.compute_dtype == "float32" and not layer.synchronized]
    for layer in plain:
        layer.__class__ = FusedBatchNormalization
    try:
        yield
    finally:
        for layer in plain:
            layer.__class__ = layers.BatchNormalization


# --- train or load --------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A finished training: the model, its history per epoch, and its row of results.csv."""

    model: keras.Model
    history: dict[str, list[float]]
    row: dict

    @property
    def name(self) -> str:
        return f"{self.row['method']}-seed{self.row['seed']}"


def train_or_load(
    method: str, dataset, *, build=None, teacher=None, answers=None, temperature: float = 4.0,
    alpha: float = 0.1, recipe: Recipe | None = None, seed: int = 0, taught_by: str | None = None,
    callbacks=None,
) -> Run:
    """Train a model, or load it if this very training was done before.

    A finished run is loaded from ``$KD_RUNS_DIR`` (default ``runs``), or from ``reference``
    where it is published. A run that was cut off goes on after its last whole epoch and ends
    with the same weights, bit for bit for the same processor, threads and libraries.
    ``KD_RETRAIN=1`` ignores ``reference``; delete ``runs`` to begin from nothing. Sets the
    global random seed.

    Args:
        method: ``"teacher"``, ``"scratch"`` or ``"distilled"``, perhaps with a label of your
            own behind a dash: ``"distilled-adam"``. Other names need ``answers``, or no teacher.
        build: function without arguments that returns a Keras model with logits out. By
            default build_teacher or build_student: images of 32 x 32 x 3, ten classes.
        teacher: a Run or a Keras model. A distilled student learns from it; others use it
            only to measure agreement.
        answers: the logits that the student learns from, instead of the teacher's own: one
            array (images, classes) for each view of the recipe. Another framework's teacher,
            an average of several, a control.
        temperature, alpha: see Distiller; only a distilled run uses them.
        recipe: by default ``recipe_for(dataset, method)``.
        seed: decides first weights, order of batches and Dropout.
        taught_by: what the column teacher of results.csv says; by default the teacher's name.
        callbacks: Keras callbacks instead of the progress bar.

    Raises:
        TypeError, ValueError: an argument that does not fit; the sentence names it.
        FloatingPointError: the training has diverged.
        RuntimeError: the run is under way in another process, or was begun with other
            versions of the libraries.
    """
    require(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", method), f"method is {method!r}. Use "
            "letters, digits, dots and dashes, as in 'distilled-adam'.")
    distilled = method.startswith("distilled") or answers is not None
    known = method.partition("-")[0] in ("teacher", "scratch", "distilled")
    require(known or distilled or teacher is None, f"method is {method!r}. Begin it with 'teacher', "
            "'scratch' or 'distilled', or give answers, or no teacher.")
    name_of_teacher = getattr(teacher, "name", None)
    teacher = getattr(teacher, "model", teacher)
    require(not distilled or teacher is not None or answers is not None,
            f"teacher is None, but method is {method!r}. Pass a trained teacher, or answers.")
    recipe, seed = recipe or recipe_for(dataset, method), operator.index(seed)
    require(distilled or dataset.y_train.min() >= 0, f"y_train holds -1 (unknown), but {method!r} "
            "learns from labels alone. Leave those images out.")
    if teacher is not None:
        _check_fits("teacher", teacher, dataset)
    if answers is not None:
        answers = _check_answers(answers, recipe, (len(dataset.y_train), len(dataset.class_names)))
    own = build is None
    build = build or (kdlib.build_teacher if method.startswith("teacher") else kdlib.build_student)
    keras.utils.set_random_seed(seed)
    model = build()
    first_answers = _check_fits("build's model", model, dataset)
    spec = {
        "code": CODE, "dataset": dataset.name, "data": data_digest(dataset), "method": method,
        "seed": seed, "architecture": store.architecture(model), **asdict(recipe),
        "begins_with": None if own else store.digest(*model.get_weights()),
        "temperature": kdlib._number("temperature", temperature) if distilled else None,
        "alpha": kdlib._number("alpha", alpha) if distilled else None,
        "teacher": store.model_digest(teacher) if distilled and answers is None else None,
        "answers": store.digest(*answers) if answers is not None else None,
    }
    row = {"model": re.sub(r"_\d+$", "", model.name), "parameters": model.count_params(),
           "teacher": taught_by or name_of_teacher if distilled else None}
    folder = runs_folder() / f"{stem(spec)}-{store.digest(spec)[:10]}"
    search = [(folder / "model.json", folder / "model.keras")]
    if not _retrain():
        search.append((REFERENCE / "rows" / f"{stem(spec)}.json",
                       REFERENCE / "weights" / f"{stem(spec)}.keras"))
    for notes, weights in search:
        if (run := _load(notes, weights, spec, first_answers, dataset, teacher)) is not None:
            return run
    with store.named(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if (folder / "diverged.txt").exists():
        raise FloatingPointError((folder / "diverged.txt").read_text())
    try:
        with filelock.FileLock(folder / "lock").acquire(timeout=0):
            run = _load(*search[0], spec, first_answers, dataset, teacher)
            if run is not None:
                return run  # another process has just finished it
            if not own:
                _check_loads(model, folder)
            keeper = _train(model, dataset, teacher if distilled else None, answers, recipe, spec,
                            folder, callbacks)
            return _finish(model, keeper, dataset, teacher, {**spec, **row}, spec, first_answers)
    except filelock.Timeout:
        raise RuntimeError(f"the run {folder.name} is under way in another process. Wait for it, "
                           "or stop it.") from None


def stem(row: dict) -> str:
    """The name of a run's files: dataset, method, T and alpha if unusual, seed."""
    usual = row["temperature"] is None or (row["temperature"], row["alpha"]) == (4.0, 0.1)
    setting = "" if usual else f"-T{row['temperature']:g}-alpha{row['alpha']:g}"
    return f"{row['dataset']}-{row['method']}{setting}-seed{row['seed']}"


def data_digest(dataset) -> str:
    """Of all pixels and labels as they are now."""
    return store.digest(*(getattr(dataset, f"{a}_{part}") for a in "xy"
                          for part in ("train", "val", "test")))


def runs_folder() -> Path:
    """Where runs and stored answers are kept: ``$KD_RUNS_DIR``, by default ``runs``."""
    return ROOT / Path(os.environ.get("KD_RUNS_DIR") or "runs").expanduser()


def _retrain() -> bool:
    value = os.environ.get("KD_RETRAIN") or "0"
    require(value in ("0", "1"),
            f"KD_RETRAIN is {value!r}. 1 trains anew, 0 or nothing loads published runs.")
    return value == "1"


def _check_fits(role: str, model, dataset) -> np.ndarray:
    """A model's answers to two images of the dataset, if it takes them and knows the classes."""
    classes = kdlib.check_model(role, model)
    require(classes in (None, len(dataset.class_names)), f"{role} gives {classes} logits, but "
            f"{dataset.name} has {len(dataset.class_names)} classes.")
    return predict_logits(model, dataset.x_train[:2], role=role)


def _check_loads(model, folder: Path) -> None:
    """Before the training: what ``build`` returns can be loaded afterwards."""
    path = folder / "aside-first.keras"
    try:
        model.save(path)
        keras.saving.load_model(path, compile=False)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"Keras cannot load back what build returns ({str(error).splitlines()[0]}). Build it "
            "from Keras's own layers, or register its classes with "
            "keras.saving.register_keras_serializable.") from None
    finally:
        path.unlink(missing_ok=True)


def _train(model, dataset, teacher, answers, recipe, spec, folder, callbacks) -> store.Keeper:
    """Fit ``model`` from where ``folder`` says it stopped; returns the keeper of its state."""
    trainer, validation = model, (dataset.x_val, dataset.y_val)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if spec["temperature"] is not None:
        trainer = kdlib.Distiller(student=model, teacher=teacher,
                                  temperature=spec["temperature"], alpha=spec["alpha"])
        if answers is None and recipe.views:
            answers = teacher_answers(teacher, dataset, recipe)
        judged = (stored_answers(teacher, dataset, "val") if teacher is not None
                  else np.zeros((len(dataset.y_val), len(dataset.class_names)), "float32"))
        validation = ((dataset.x_val, judged), dataset.y_val)
    elif recipe.smoothing:
        loss = SmoothedCrossentropy(recipe.smoothing)
    steps = -(-len(dataset.y_train) // recipe.batch_size)
    trainer.compile(optimizer=make_optimizer(recipe, steps, last_layer=model.layers[-1].name),
                    loss=loss, metrics=[], weighted_metrics=["accuracy"],
                    steps_per_execution=min(steps, 24), jit_compile=False)  # slower on the CPU
    keeper = store.Keeper(folder, spec)
    keeper.restore(trainer)
    bar = [] if callbacks else [TqdmCallback(verbose=0, desc=spec["method"], leave=False)]
    try:
        with fused_norm(model):
            if keeper.epoch < recipe.epochs:
                trainer.fit(
                    Batches(dataset, recipe, seed=spec["seed"], first_epoch=keeper.epoch,
                            answers=answers),
                    initial_epoch=keeper.epoch, epochs=recipe.epochs, shuffle=False, verbose=0,
                    validation_data=validation, validation_batch_size=500,
                    callbacks=[keeper, *(callbacks or bar)])
    finally:
        for own in bar:
            own.on_train_end()
    if recipe.average:
        trainer.optimizer.finalize_variable_values(trainer.trainable_variables)
    return keeper


class SmoothedCrossentropy(keras.losses.Loss):
    """Cross-entropy from logits with hard labels of which a share goes to all classes alike.

    Source: Szegedy et al. 2016, section 7.
    """

    def __init__(self, share: float):
        super().__init__(name="smoothed_crossentropy")
        self.share = share

    def call(self, labels, logits):
        hard = keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
        even = -ops.mean(ops.log_softmax(logits, axis=-1), axis=-1)
        return (1 - self.share) * hard + self.share * even


def _finish(model, keeper, dataset, teacher, facts, spec, first_answers) -> Run:
    """Measure the model and save the result. Delete the states last: nothing can be lost."""
    folder, history = keeper.folder, keeper.history
    if teacher is None:  # nobody to be compared with
        for key in ("val_loss", "val_distillation_loss") if spec["answers"] else ():
            history.pop(key, None)
    logits = {part: predict_logits(model, getattr(dataset, f"x_{part}")) for part in ("val", "test")}
    row = {**facts, **_figures(logits, dataset, teacher), "seconds": round(sum(history["seconds"])),
           "machine": keeper.machines[-1], "versions": store.libraries()}
    row = {key: row[key] for key in RESULT_COLUMNS}
    store.write_whole(folder / "answers.npz", lambda aside: np.savez_compressed(
        aside, **{part: each.astype("float16") for part, each in logits.items()}))
    store.write_whole(folder / "model.keras", model.save)
    store.write_notes(folder / "model.json", {
        "spec": spec, "row": row, "history": history, "machines": keeper.machines,
        "judge": None if teacher is None else store.model_digest(teacher),
        "model": store.model_digest(model),
        "first_answers": first_answers.tolist(), "weights": store.digest(*model.get_weights())})
    for leftover in (*folder.glob("state-?.npz"), *folder.glob("aside-*")):
        leftover.unlink()
    return Run(model, history, row)


def _load(notes: Path, weights: Path, spec, first_answers, dataset, teacher) -> Run | None:
    """The finished run in these two files, if it is the one that ``spec`` describes."""
    if not (notes.exists() and weights.exists()):
        return None
    try:
        found = store.read_notes(notes)
        if store.text(found["spec"]) != store.text(spec) or not np.allclose(
                found["first_answers"], first_answers, rtol=1e-2, atol=1e-2):
            return None
        model = keras.saving.load_model(weights, compile=False)
        require(store.digest(*model.get_weights()) == found["weights"],
                "its weights are not those of its notes")
    except store.UNREADABLE as error:
        warnings.warn(f"{notes.stem} in {notes.parent.name} is damaged ({error}): it is not used.",
                      stacklevel=3)
        return None
    row = found["row"]
    if row["versions"] != store.libraries():
        warnings.warn(f"{notes.stem} was made with {row['versions']}; here is {store.libraries()}. "
                      "KD_RETRAIN=1 trains it anew.", stacklevel=3)
    if teacher is not None and found["judge"] != store.model_digest(teacher):
        logits = {"test": predict_logits(model, dataset.x_test)}
        row["agreement"] = _agreement(logits, dataset, teacher)
    return Run(model, found["history"], row)


# --- the teacher's answers ------------------------------------------------------------


def predict_logits(model, images: np.ndarray, *, role: str = "model") -> np.ndarray:
    """Logits of many images, in batches: float32 (N, classes)."""
    kdlib.check_images(role, model, images)
    return np.asarray(model.predict(images, batch_size=500, verbose=0), "float32")


def teacher_answers(teacher, dataset, recipe: Recipe) -> list[np.ndarray]:
    """The teacher's logits for every view: float32 (images, classes) each.

    Computed once and kept in the runs folder. Some of them are compared with the teacher at
    hand each time. Source: teacher and student see the same views (Beyer et al. 2022); stored
    answers: Shen and Xing 2022.
    """
    views = range(min(recipe.views, recipe.epochs))
    bar = tqdm(views, desc="teacher's answers", unit="view", leave=False, delay=2)
    return [stored_answers(teacher, dataset, v, recipe) for v in bar]


def stored_answers(teacher, dataset, part, recipe: Recipe | None = None) -> np.ndarray:
    """The teacher's logits for "val", "test", or a view of the training images (a number)."""
    if isinstance(part, str):
        images, codes, name = getattr(dataset, f"x_{part}"), None, part
    else:
        images, name = dataset.x_train, f"view{part:02d}-shift{recipe.shift}-flip{recipe.flip:d}"
        codes = kdlib.view_codes(images=len(images), views=part + 1, shift=recipe.shift,
                                 flip=recipe.flip)[part]

    def ask(which):
        return predict_logits(teacher, images[which] if codes is None
                              else kdlib.augment(images[which], codes[which]), role="teacher")

    key = store.digest(VIEW_CODE, images,
                       store.model_digest(teacher))
    path = runs_folder() / f"answers-{key[:16]}" / f"{name}.npy"
    if path.exists() and (kept := store.read_array(path)) is not None:
        some = np.linspace(0, len(images) - 1, 8).astype(int)
        if np.allclose(kept[some], ask(some), rtol=1e-2, atol=1e-2):
            return kept
        warnings.warn(f"the stored answers in {path.parent.name} are not this teacher's: it is "
                      "asked again.", stacklevel=2)
    store.write_array(path, ask(slice(None)))
    return store.read_array(path)


def _check_answers(answers, recipe: Recipe, shape: tuple) -> list[np.ndarray]:
    """One array of logits for each view, or a sentence."""
    views = min(recipe.views or recipe.epochs, recipe.epochs)
    shapes = [getattr(each, "shape", None) for each in answers]
    require(len(shapes) >= views and all(each == shape for each in shapes), f"answers have shapes "
            f"{shapes}. Give {views} arrays of logits of shape {shape}, one a view.")
    answers = [np.asarray(each, "float32") for each in answers[:views]]
    require(not any(np.isnan(each).any() or (each == np.inf).any() for each in answers),
            "answers hold nan or infinity. Compute the logits again.")
    require(answers[0].min() < 0 or np.abs(answers[0].sum(-1) - 1).max() > 1e-2,
            "answers are probabilities (each row sums to 1). Give logits: np.log(answers) will do.")
    return answers


# --- measurements ---------------------------------------------------------------------

RESULT_COLUMNS = (
    "dataset model method teacher temperature alpha seed epochs parameters val_accuracy "
    "test_accuracy nll ece agreement seconds machine versions".split()
)


def measure(model, dataset, teacher=None) -> dict[str, float]:
    """val_accuracy; and on the test set: accuracy, nll (nats), ece, agreement with a teacher."""
    logits = {part: predict_logits(model, getattr(dataset, f"x_{part}")) for part in ("val", "test")}
    return _figures(logits, dataset, teacher)


def _figures(logits, dataset, teacher) -> dict[str, float]:
    log_p = scipy.special.log_softmax(logits["test"].astype("float64"), axis=-1)
    guess, labels = log_p.argmax(-1), dataset.y_test
    figures = {
        "val_accuracy": np.mean(logits["val"].argmax(-1) == dataset.y_val),
        "test_accuracy": np.mean(guess == labels),
        "nll": -log_p[np.arange(len(labels)), labels].mean(),
        "ece": expected_calibration_error(np.exp(log_p), labels),
    }
    return {**{key: round(float(value), 4) for key, value in figures.items()},
            "agreement": _agreement(logits, dataset, teacher)}


def _agreement(logits, dataset, teacher) -> float | None:
    if teacher is None:
        return None
    theirs = stored_answers(teacher, dataset, "test")
    return round(float(np.mean(logits["test"].argmax(-1) == theirs.argmax(-1))), 4)


def expected_calibration_error(probabilities, labels, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal bins of confidence.

    Args: probabilities (N, classes), labels (N,). Source: Guo et al. 2017, section 2.
    """
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == labels
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(which, right - confidence, bins)
    return float(np.abs(gaps).sum() / len(labels))


# A digest of the code that acts on the numbers of a run, comments and docstrings aside. Taken
# here, once: a file that is edited while a training runs does not change what has been read.
VIEW_CODE = store.code_digest(kdlib.view_codes, kdlib.augment)
CODE = store.digest(VIEW_CODE, store.code_digest(
    kdlib.distillation_loss, kdlib.Distiller.compute_loss, kdlib.Distiller._labels, Batches,
    make_optimizer, Muon, _as_matrix, FusedBatchNormalization, SmoothedCrossentropy, _train))
