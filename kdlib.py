"""Knowledge distillation with Keras 3, small enough to read in one sitting.

Losses and Distiller run on TensorFlow, JAX and PyTorch.
"""

import hashlib
import io
import math
import numbers
import os
import pickle
import shutil
import tempfile
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import keras
import numpy as np
import scipy.ndimage
import sklearn.datasets
from keras import layers, ops
from sklearn.model_selection import train_test_split


def require(condition, sentence: str, error: type[Exception] = ValueError) -> None:
    """Raise ``error(sentence)`` unless the condition holds."""
    if not condition:
        raise error(sentence)


# --- data -----------------------------------------------------------------------------

CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
CIFAR10_FILES = "cifar10.npz", "cifar-10-python.tar.gz", "cifar-10-batches-py"
# Of the two official parts, sorted by content: the images, then the labels as int32.
CIFAR10_SHA256 = ("b044585a9600f58df6e929c1dcb43693eb01d0157911ee5c4e62785abb5d754f",
                  "92acf42aaaa347850ecb75d594746f61ec9b6d1318ee3403b959266defb58885")
# Mean and standard deviation of CIFAR-10's training pixels, on the scale 0 to 255.
PIXEL_MEAN, PIXEL_STD = (125.31, 122.95, 113.87), (62.99, 62.09, 66.70)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels in a fixed training, validation and test split.

    Images are uint8 (N, height, width, channels) in 0 to 255, labels integers (N,); a training
    label of -1 is unknown. Choose on ``val``, look at ``test`` once per reported run. Raises
    ValueError for images that are not raw pixels of one size, or labels that do not fit.
    """

    name: str
    class_names: list[str]
    x_train: np.ndarray = field(repr=False)
    y_train: np.ndarray = field(repr=False)
    x_val: np.ndarray = field(repr=False)
    y_val: np.ndarray = field(repr=False)
    x_test: np.ndarray = field(repr=False)
    y_test: np.ndarray = field(repr=False)

    def __post_init__(self):
        for part in ("train", "val", "test"):
            x, y = getattr(self, f"x_{part}"), getattr(self, f"y_{part}")
            raw = isinstance(x, np.ndarray) and x.dtype == np.uint8 and x.ndim == 4 and len(x)
            require(raw and x.shape[1:] == self.x_train.shape[1:],
                    f"x_{part} is {_described(x)}, x_train {_described(self.x_train)}. Give raw "
                    "pixels: uint8 (images, height, width, channels) in 0 to 255, all of one size.")
            low, high = -1 if part == "train" else 0, len(self.class_names) - 1
            fits = isinstance(y, np.ndarray) and y.shape == (len(x),) and y.dtype.kind in "iu"
            require(fits and low <= y.min() and y.max() <= high, f"y_{part} is {_described(y)}. "
                    f"Give class numbers of shape ({len(x)},), integers from {low} to {high}.")


def _described(array) -> str:
    if not isinstance(array, np.ndarray) or not array.size or array.dtype.kind not in "biuf":
        return f"a {type(array).__name__} of shape {getattr(array, 'shape', 'unknown')}"
    return f"{array.dtype} of shape {array.shape} in {array.min():g} to {array.max():g}"


def load_dataset(name: str | None = None) -> Dataset:
    """Load "cifar10" or "digits"; None: what ``$KD_DATASET`` says, else CIFAR-10 if available.

    CIFAR-10 is read from the folder ``$KD_DATA_DIR`` (default ``data``): cifar10.npz, or the
    official archive, packed or not. If none is there and nothing was set, Keras downloads it.
    Raises ValueError for an unknown name or other data, FileNotFoundError where data are missing.
    """
    name = name or os.environ.get("KD_DATASET") or None
    require(name in (None, "cifar10", "digits"),
            f"name (or KD_DATASET) is {name!r}. Choose 'cifar10' or 'digits', or leave it out.")
    if name != "digits":
        try:
            return _cifar10()
        except ConnectionError as error:
            require(name is None, str(error), FileNotFoundError)
            print("NOTICE: CIFAR-10 was not found, so this notebook uses the DIGITS dataset. You "
                  f"can keep going. Reason: {error}")
    return _digits()


def _cifar10() -> Dataset:
    setting = os.environ.get("KD_DATA_DIR")
    folder = Path(__file__).resolve().parent / Path(setting or "data").expanduser()
    path = next((folder / name for name in CIFAR10_FILES if (folder / name).exists()), None)
    require(path or not setting, f"KD_DATA_DIR is {setting!r}, but the folder {folder} has none of "
            f"{', '.join(CIFAR10_FILES)}. Correct it, or set KD_DATASET=digits.", FileNotFoundError)
    parts = None if path else _download()
    try:
        parts = zip(parts or _read(path), CIFAR10_SHA256, strict=True)
        (x, y), test = [_by_content(*part, sha256) for part, sha256 in parts]
    except Exception as error:  # whatever a damaged file can do to its reader
        raise ValueError(f"{path or 'The download'} is damaged, or not CIFAR-10: {error}. Fetch "
                         "it again, or set KD_DATASET=digits to work without it.") from None
    train, val = train_test_split(np.arange(len(y)), test_size=0.1, stratify=y, random_state=0)
    return Dataset("cifar10", CIFAR10_CLASSES, x[train], y[train], x[val], y[val], *test)


def _download():
    try:
        return keras.datasets.cifar10.load_data()
    except Exception as error:  # whatever a network can do
        reason = str(error).rpartition(" -- ")[2] or type(error).__name__
        raise ConnectionError(f"The download failed ({reason}). Three ways out: set KD_DATA_DIR to "
                              f"a folder with {' or '.join(CIFAR10_FILES)}; connect to the "
                              "internet; or stay offline with KD_DATASET=digits.") from None


def _read(path: Path):
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return [(file[f"x_{part}"], file[f"y_{part}"]) for part in ("train", "test")]
    if path.suffix == ".gz":
        with tempfile.TemporaryDirectory() as unpacked:
            shutil.unpack_archive(path, unpacked, filter="data")
            return _read(Path(unpacked) / CIFAR10_FILES[-1])
    names = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
    files = [io.BytesIO((path / name).read_bytes()) for name in names]
    batches = [_OnlyArrays(file, encoding="bytes").load() for file in files]
    x = [batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) for batch in batches]
    y = [np.array(batch[b"labels"]) for batch in batches]
    return [(np.concatenate(x[:5]), np.concatenate(y[:5])), (x[5], y[5])]


class _OnlyArrays(pickle.Unpickler):
    def find_class(self, module, name):
        """Make NumPy arrays, and run no other code, whatever a file asks for."""
        known = module.startswith("numpy") and name in ("_reconstruct", "ndarray", "dtype")
        require(known or (module, name) == ("_codecs", "encode"), f"it asks for {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _by_content(x, y, sha256: str) -> tuple[np.ndarray, np.ndarray]:
    """Sort images by a hash of their pixels, and check that they are all there.

    Copies of CIFAR-10 come in different orders. Sorted like this, the split is the same for
    each of them, and no published teacher has seen *your* validation images.
    """
    order = np.argsort([hashlib.sha1(image.tobytes()).digest() for image in x], kind="stable")
    x, y = x[order], y.reshape(-1)[order].astype("int32")
    require(hashlib.sha256(x.tobytes() + y.tobytes()).hexdigest() == sha256,
            f"images {_described(x)}, labels {_described(y)}: not the official ones")
    return x, y


def _digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits, made hard: small, tilted, on noise."""
    digits = sklearn.datasets.load_digits()
    y = digits.target.astype("int32")
    rest, test = train_test_split(np.arange(len(y)), test_size=447, stratify=y, random_state=0)
    train, val = train_test_split(rest, test_size=150, stratify=y[rest], random_state=0)

    def scene(k, n):
        """Digit k for the n-th time, at random place, size and angle, on a noisy background."""
        rng = np.random.default_rng([2015, k, n])
        angle, size = rng.uniform(-0.5, 0.5), rng.uniform(1.8, 3.0)
        centre = 15.5 + rng.uniform(-1, 1, 2) * (15.5 - 4 * size)
        cos, sin = np.cos(angle), np.sin(angle)
        turn = np.array([[cos, -sin], [sin, cos]]) / size
        ink = scipy.ndimage.affine_transform(digits.images[k] / 16, turn, 3.5 - turn @ centre,
                                             output_shape=(32, 32), order=1)
        paper = rng.uniform(60, 195, 3)
        pen = paper + rng.choice([-1, 1]) * rng.uniform(50, 100, 3)  # darker or lighter
        blotches = scipy.ndimage.gaussian_filter(rng.normal(0, 1, (32, 32, 3)), (2, 2, 0))
        noise = 85 * blotches + rng.normal(0, 12, (32, 32, 3))
        return np.clip(np.rint(paper + ink[..., None] * (pen - paper) + noise), 0, 255)

    parts = []
    for chosen, times in ((train, 2), (val, 1), (test, 1)):
        images = [scene(k, n) for n in range(times) for k in chosen]
        parts += [np.array(images, "uint8"), np.tile(y[chosen], times)]
    return Dataset("digits", list("0123456789"), *parts)


def view_codes(*, images: int, views: int, shift: int, flip: bool) -> np.ndarray:
    """The shift and mirror of each view: int8 (views, images, 3) of (dy, dx, mirrored).

    View v of image i is always the same, so a teacher's answer to it can be stored. Shifts are
    uniform in [-shift, shift] pixels. Flips alternate: one of two views in a row is mirrored.
    """
    codes = np.zeros((views, images, 3), "int8")
    first = np.random.default_rng(1503).integers(0, 2, images)
    for v in range(views):
        rng = np.random.default_rng([2531, v])
        codes[v, :, :2] = rng.integers(-shift, shift + 1, (images, 2))
        codes[v, :, 2] = (first + v) % 2 if flip else 0
    return codes


def augment(images: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Show images (N, H, W, C) through codes (N, 3); pixels beyond the edge are reflected."""
    rows, cols = (size - 1 - np.abs(size - 1 - np.abs(np.arange(size) + codes[:, [axis]]))
                  for axis, size in enumerate(images.shape[1:3]))
    cols = np.where(codes[:, 2:] == 1, cols[:, ::-1], cols)
    return images[np.arange(len(images))[:, None, None], rows[:, :, None], cols[:, None, :]]


# --- models ---------------------------------------------------------------------------


def build_teacher(num_classes: int = 10) -> keras.Model:
    """VGG-like teacher: pixels (N, 32, 32, 3) in 0 to 255 in, logits (N, num_classes) out.

    Stages of 3x3 convolutions with pooling between them (VGG: Simonyan and Zisserman 2015,
    section 2), each with BatchNorm; Dropout before the classifier.
    """
    stages = ((24, 64), (64, 128), (128, 128), (128,))
    return _vgg(stages, num_classes=num_classes, first_kernel=2, dropout=0.2, name="teacher")


def build_student(num_classes: int = 10) -> keras.Model:
    """A sixth of the teacher's size: same pixels in, logits out, no Dropout."""
    stages = ((24,), (40, 40), (72, 56))
    return _vgg(stages, num_classes=num_classes, first_kernel=3, dropout=0.0, name="student")


def _vgg(stages, *, num_classes: int, first_kernel: int, dropout: float, name: str):
    pixels = keras.Input((32, 32, 3), name="pixels")
    # Inside the model, so that nobody can feed it differently normalised images.
    variance = [std**2 for std in PIXEL_STD]
    x = layers.Normalization(mean=PIXEL_MEAN, variance=variance, name="normalization")(pixels)
    kernel = first_kernel
    for stage, widths in enumerate(stages, start=1):
        for k, width in enumerate(widths, start=1):
            tag = f"{stage}_{k}"
            x = layers.Conv2D(width, kernel, padding="same", use_bias=False, name=f"conv{tag}")(x)
            if k == len(widths) and stage < len(stages):
                # Pooling before BatchNorm: the same maximum, a quarter of the work after it.
                x = layers.MaxPooling2D(name=f"pool{stage}")(x)
            x = layers.BatchNormalization(momentum=0.9, name=f"norm{tag}")(x)
            x = layers.ReLU(name=f"relu{tag}")(x)
            kernel = 3
    x = layers.GlobalMaxPooling2D(name=f"pool{len(stages)}")(x)
    x = layers.Dropout(dropout, name="dropout")(x) if dropout else x
    return keras.Model(pixels, layers.Dense(num_classes, name="logits")(x), name=name)


# --- losses ---------------------------------------------------------------------------


def soften(logits, temperature: float):
    """Soft labels, ``softmax(logits / temperature)``: (..., classes), each row sums to one.

    T = 1 is the ordinary softmax; a larger T spreads the probability over more classes.

    >>> round(float(soften([[2.0, 0.0]], temperature=2)[0, 0]), 3)
    0.731

    Raises TypeError or ValueError for a T that is not a positive number, or for bad logits.
    Source: Hinton, Vinyals, Dean 2015, section 2, equation 1.
    """
    return ops.softmax(_as_float("logits", logits) / _number("temperature", temperature), axis=-1)


def distillation_loss(*, teacher_logits, student_logits, temperature: float):
    """``T^2 * KL(p || q)``, batch mean, of the softened teacher p and student q: a scalar >= 0.

    ``KL(p || q) = sum(p * log(p / q))`` over the classes, in nats. T^2 is included: the
    gradient of KL shrinks as 1 / T^2, and the factor keeps its size when T changes.

    >>> logits = [[2.0, 1.0, 0.1]]
    >>> float(distillation_loss(teacher_logits=logits, student_logits=logits, temperature=4))
    0.0

    Both logits are (batch, classes), before the softmax. A teacher's logit of minus infinity is
    a class of probability 0, which contributes 0. Raises TypeError or ValueError for a bad T or
    shapes that differ. Source: Hinton, Vinyals, Dean 2015, section 2 (T^2: its last paragraph).
    """
    temperature = _number("temperature", temperature)
    teacher_logits = _as_float("teacher_logits", teacher_logits)
    student_logits = _as_float("student_logits", student_logits)
    taught, learned = tuple(teacher_logits.shape), tuple(student_logits.shape)
    require(len(taught) >= 2 and 0 not in taught and _agree(taught, learned),
            f"teacher_logits have shape {taught}, student_logits {learned}. Both need (batch, "
            "classes), with the same classes in the same order.")
    z, w = teacher_logits / temperature, student_logits / temperature
    p, q = ops.softmax(z, axis=-1), ops.softmax(w, axis=-1)
    # d = log(p / q). Where T makes it tiny, a difference of two logarithms is mostly rounding.
    s = z - w - ops.stop_gradient(ops.max(z - w, axis=-1, keepdims=True))
    change = ops.sum(q * ops.expm1(s), axis=-1, keepdims=True)
    d = ops.where(change > -0.5, s - ops.log1p(ops.maximum(change, -0.5)),
                  ops.log_softmax(z, axis=-1) - ops.log_softmax(w, axis=-1))
    # As p and q sum to 1, each term may be p * (exp(-d) - 1 + d), which is not negative.
    small = ops.abs(d) < 0.5
    s = ops.where(small, d, 0.0)
    series = s**2 / 2 * (1 - s / 3 * (1 - s / 4 * (1 - s / 5 * (1 - s / 6 * (1 - s / 7)))))
    terms = ops.where(small, p * series, q - p + p * ops.where(p > 0, d, 0.0))
    return temperature**2 * ops.mean(ops.sum(terms, axis=-1))


def _agree(a, b) -> bool:
    """Whether two shapes can be the same; None is any size."""
    return len(a) == len(b) and all(None in (m, n) or m == n for m, n in zip(a, b, strict=True))


def _as_float(name: str, logits):
    """At least float32: half precision is too coarse for differences of logarithms."""
    try:
        logits = ops.convert_to_tensor(logits)
        dtype = keras.backend.standardize_dtype(logits.dtype)
    except (TypeError, ValueError) as error:  # words, ragged lists, None
        raise TypeError(f"{name} are not a tensor of numbers: {str(error)[:200]}") from None
    require(dtype.startswith(("float", "bfloat", "int", "uint")) and len(logits.shape) > 0,
            f"{name} are {dtype} {tuple(logits.shape)}, not numbers (batch, classes).", TypeError)
    return logits if dtype in ("float32", "float64") else ops.cast(logits, "float32")


def _number(name: str, value) -> float:
    allowed, advice = {
        "temperature": (lambda t: 0 < t < math.inf, "It divides the logits, so it must be positive "
                        "and finite. Typical values are 2 to 8."),
        "alpha": (lambda a: 0 <= a <= 1, "It is the weight of the hard labels, so it must be 0 to "
                  "1. Typical values are 0.1 to 0.3.")}[name]
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    require(real, f"{name} is {value!r}, a {type(value).__name__}. {advice}", TypeError)
    require(allowed(value), f"{name} is {value}. {advice}")
    return float(value)


# --- distiller ------------------------------------------------------------------------


class Distiller(keras.Model):
    """Train a student on hard labels and on a teacher's soft labels (Hinton et al. 2015).

    ``loss = alpha * student_loss + (1 - alpha) * distillation_loss`` (+ the student's
    regularisers, with weight one). compile, fit, evaluate and predict take what Keras's take.
    ``fit(images, labels)`` asks the teacher live; ``fit((images, teacher_logits), labels)``
    uses stored answers: one array more than the student has inputs. A label of -1 is unknown:
    its image, like one of ``sample_weight`` 0, counts in the distillation_loss only.
    The teacher runs with ``training=False``, without gradient. No weight of it belongs to this
    model: what is counted, summarised, saved and exported is the student.

    Takes built Keras models with the same inputs and logits (batch, classes) out (teacher=None:
    stored answers only); temperature T > 0; alpha in [0, 1], the weight of the hard labels (at 0 they may be left out);
    soft_loss(teacher_logits=, student_logits=, temperature=), a batch mean. Raises TypeError or
    ValueError for anything else, and warns of a student larger than its teacher.
    """

    def __init__(self, *, student, teacher, temperature: float, alpha: float = 0.1,
                 soft_loss=distillation_loss):
        learned = check_model("student", student)
        if teacher is not None:
            taught, asked, seen = check_model("teacher", teacher), _inputs(teacher), _inputs(student)
            require(_agree([taught], [learned]) and (not (asked and seen) or str(asked) == str(seen)),
                    f"teacher takes {asked} and gives {taught} logits, student {seen} and {learned}."
                    " Both need the same inputs and classes; a Resizing layer fits inside a model.")
            require(not {id(w) for w in student.weights} & {id(w) for w in teacher.weights},
                    "student and teacher share weights, so training would change the teacher. Copy "
                    "it: keras.models.clone_model, then copy.set_weights(teacher.get_weights()).")
            if (own := student.count_params()) > (its := teacher.count_params()):
                warnings.warn(f"student has {own:,} parameters, more than the teacher's {its:,}. "
                              "Are the two swapped?", stacklevel=2)
        super().__init__(name="distiller", dtype=student.dtype_policy)  # float16: scale the loss
        self._temperature, self._alpha = _number("temperature", temperature), _number("alpha", alpha)
        self.student, self._soft_loss, self.built = student, soft_loss, True
        self.save, self.export, self.summary = student.save, student.export, student.summary
        self.save_weights = partial(self._with_optimizer, student.save_weights)
        self.load_weights = partial(self._with_optimizer, student.load_weights)
        self._losses_seen = [keras.metrics.Mean(n) for n in ("student_loss", "distillation_loss")]

        def ask(images):  # in a closure Keras does not find the teacher's weights
            require(teacher is not None, "teacher is None, so each batch needs stored teacher_logits: "
                    "fit((images, teacher_logits), labels).")
            return ops.stop_gradient(
                teacher(check_images("teacher", teacher, images), training=False))

        self._ask_teacher = ask

    # Read only: the first training step builds them into its graph.
    temperature = property(lambda self: self._temperature)
    alpha = property(lambda self: self._alpha)

    def compile(self, optimizer="rmsprop", loss=None, metrics=None, weighted_metrics=None, **more):
        """As Keras's. The student_loss is cross-entropy; without metrics it shows the accuracy."""
        fits = isinstance(loss, keras.losses.SparseCategoricalCrossentropy) and loss.from_logits
        require((loss is None or fits) and "loss_weights" not in more, f"loss is {loss!r}. Leave "
                "it out (SparseCategoricalCrossentropy(from_logits=True)); alpha is its weight.")
        if metrics is None and weighted_metrics is None:
            weighted_metrics = ["accuracy"]  # of images with a known label
        super().compile(optimizer, metrics=metrics, weighted_metrics=weighted_metrics, **more)

    def fit(self, x=None, y=None, batch_size=None, epochs=1, verbose="auto", callbacks=None,
            *args, **more):
        callbacks = self._guarded(x, callbacks)
        return super().fit(x, y, batch_size, epochs, verbose, callbacks, *args, **more)

    def evaluate(self, x=None, y=None, *args, callbacks=None, **more):
        return super().evaluate(x, y, *args, callbacks=self._guarded(x, callbacks), **more)

    def _guarded(self, x, callbacks):
        check_images("student", self.student, self._split(x)[0])

        def check(batch, logs):
            hard, soft = (math.isfinite(logs.get(loss.name, 0)) for loss in self._losses_seen)
            require(hard or not soft, f"labels of batch {batch} hold a value that is no class "
                    "number. Give whole numbers from 0 to classes - 1, or -1 for unknown.")
            require(soft or not hard, f"teacher_logits of batch {batch} hold nan or infinity.")
            require(hard, f"loss is not finite in batch {batch}: the training has diverged. Choose "
                    "a smaller learning rate, or look for nan in the images.", FloatingPointError)

        if isinstance(callbacks, keras.callbacks.CallbackList):  # evaluate in fit: it has ours
            return callbacks
        guard = keras.callbacks.LambdaCallback(on_train_batch_end=check, on_test_batch_end=check)
        return [guard, *keras.tree.flatten(callbacks or [])]

    def call(self, inputs, training=None):
        images = check_images("student", self.student, self._split(inputs)[0])
        return self.student(images, training=training)

    def _split(self, x):
        """The student's inputs and the teacher's stored logits, or None to ask it live."""
        stored = isinstance(x, (tuple, list)) and (
            len(keras.tree.flatten(x)) == 1 + (len(_inputs(self.student)) or 1))
        return (x[0] if len(x) == 2 else x[:-1], x[-1]) if stored else (x, None)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Called in each step of fit and evaluate. Bad labels and logits are left out of the loss,
        so that no weight is lost, and make a metric nan, so that the guard raises."""
        images, answers = self._split(x)
        answers = self._ask_teacher(images) if answers is None else answers
        answers = _as_float("teacher_logits", answers)
        sound = ops.logical_not(ops.any(ops.isnan(answers) | (answers == math.inf)))
        soft = self._soft_loss(teacher_logits=ops.where(sound, answers, ops.zeros_like(answers)),
                               student_logits=y_pred, temperature=self.temperature)
        y, weight, valid = self._labels(y, y_pred, sample_weight)
        hard = ops.mean(weight * keras.losses.sparse_categorical_crossentropy(
            y, _as_float("logits", y_pred), from_logits=True))
        batch = ops.shape(y_pred)[0]  # the last batch may be smaller, and counts for less
        for seen, loss, good in zip(self._losses_seen, (hard, soft), (valid, sound), strict=True):
            seen.update_state(ops.where(good, loss, math.nan), batch)
        loss = self.alpha * hard + (1 - self.alpha) * soft + sum(map(ops.sum, self.losses))
        strategy = getattr(self, "distribute_strategy", None)  # replicas' gradients are summed
        return loss / (strategy.num_replicas_in_sync if strategy else 1)

    def _labels(self, y, logits, weight):
        """Class numbers, the weight of each, and whether all were valid or -1 (unknown)."""
        if y is None and self.alpha == 0:
            y = ops.full(ops.shape(logits)[:1], -1)
        shape, classes = () if y is None else tuple(y.shape), logits.shape[-1]
        require(len(shape) == 1 or shape[1:] == (1,), f"labels have shape {shape}. Give class "
                "numbers of shape (batch,): fit(images, labels), or a data set of such pairs. "
                "np.argmax(labels, axis=-1) makes them from one-hot rows.")
        given, y = ops.reshape(y, (-1,)), ops.cast(ops.reshape(y, (-1,)), "int32")
        whole = ops.cast(given, "float32") == ops.cast(y, "float32")
        known = whole & (y >= 0) & (y < classes)
        weight = 1.0 if weight is None else ops.cast(ops.reshape(weight, (-1,)), "float32")
        return (ops.where(known, y, 0), ops.cast(known, "float32") * weight,
                ops.all(known | (whole & (y == -1))))

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        y, weight, _ = self._labels(y, y_pred, sample_weight)
        return super().compute_metrics(x, y, y_pred, weight)

    def _with_optimizer(self, act, *args, **more):
        """The student's weights and, as Keras does, the optimizer: BackupAndRestore needs it."""
        own, self.student.optimizer = getattr(self.student, "optimizer", None), self.optimizer
        act(*args, **more)
        self.student.optimizer = own


def _inputs(model) -> list[tuple]:
    """The shape of each input without the batch; none where only the author knows them."""
    return [tuple(tensor.shape[1:]) for tensor in getattr(model, "inputs", None) or ()]


def check_images(role: str, model, images):
    """Return the images if their size and scale are those that the model was built for."""
    expected, shape = _inputs(model), tuple(getattr(images, "shape", ()))
    require(len(expected) != 1 or not shape or _agree(shape[1:], expected[0]),
            f"images have shape {shape}, but the {role} takes {expected}: keras.ops.image.resize.")
    raw = any(isinstance(layer, layers.Normalization) and np.max(layer.mean) > 1
              for layer in getattr(model, "layers", ()))
    if raw and isinstance(images, np.ndarray) and images.dtype.kind == "f" and images.size:
        require(images.max() > 1 or np.ptp(images) == 0, f"images are {_described(images)}, but "
                f"the {role} takes raw pixels from 0 to 255 and normalises them itself.")
    return images


def check_model(role: str, model) -> int | None:
    """The number of logits that a model gives, asked about two images of noise."""
    require(isinstance(model, keras.Model) and model.built, f"{role} is a {type(model).__name__}. "
            "Give a built Keras model: load its file, call it once on images, or take a Run's "
            ".model.", TypeError)
    if not _inputs(model):
        return None  # a subclassed model: its first batch will tell
    rng = np.random.default_rng(0)
    noise = [ops.cast(rng.integers(0, 256, (2, *(n or 32 for n in tensor.shape[1:]))), tensor.dtype)
             for tensor in model.inputs]
    answers = model(noise if len(noise) > 1 else noise[0], training=False)
    shape = tuple(getattr(answers, "shape", ()))
    require(len(shape) == 2 and shape[-1] >= 2, f"{role} gives {shape or 'several outputs'}, not "
            "logits (batch, classes) alone: keras.Model(model.inputs, model.outputs[0]).")
    values, last = ops.convert_to_numpy(ops.cast(answers, "float32")), model.layers[-1]
    even = values.min() >= 0 and np.abs(values.sum(axis=-1) - 1).max() < 1e-2
    require(not even and getattr(last, "activation", 0) is not keras.activations.sigmoid,
            f"{role} gives probabilities, not logits. Build it without its last softmax or sigmoid "
            "and copy the weights: new.set_weights(model.get_weights()).")
    return shape[-1]
