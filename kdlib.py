"""Knowledge distillation with Keras 3, small enough to read in one sitting.

Sections: data, models, losses, distiller, training, plots. The losses are written with
``keras.ops`` and run on every Keras backend, the Distiller on TensorFlow and PyTorch; all
else uses TensorFlow, whose log this module quietens.

    teacher = kdlib.build_teacher()
    student = kdlib.build_student()
    distiller = kdlib.Distiller(student=student, teacher=teacher, temperature=4, alpha=0.1)
    distiller.compile(optimizer="adam")
    distiller.fit(images, labels)
    student.save("student.keras")
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import numbers
import operator
import os
import platform
import time
import warnings
import zipfile
import zlib
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

# TensorFlow's C++ libraries greet on stderr before they heed any log level, and every reader
# would find that under the first cell. So: no stderr while they load.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@contextlib.contextmanager
def _without_stderr():
    try:
        kept = os.dup(2)
    except OSError:  # closed, so there is nothing to hold back
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


with _without_stderr():
    import tensorflow as tf

tf.get_logger().setLevel("ERROR")  # a new model is a new graph: no warning is due

import filelock
import keras
import matplotlib.pyplot as plt
import numpy as np
import scipy
import seaborn as sns
import sklearn.datasets
from keras import layers, ops
from sklearn.model_selection import train_test_split
from tqdm.auto import tqdm

# Raised whenever the same call would train other weights: no older run is taken for its own.
__version__ = "0.2"

ROOT = Path(__file__).resolve().parent  # relative paths in KD_... variables begin here
REFERENCE = ROOT / "reference"

# --- data -----------------------------------------------------------------------------

CIFAR10_CLASSES = (
    "airplane automobile bird cat deer dog frog horse ship truck".split()
)
CIFAR10_SHAPES = {
    "x_train": (50_000, 32, 32, 3),
    "y_train": (50_000,),
    "x_test": (10_000, 32, 32, 3),
    "y_test": (10_000,),
}
# Mean and standard deviation of CIFAR-10's training pixels, on the scale 0 to 255.
PIXEL_MEAN = (125.31, 122.95, 113.87)
PIXEL_STD = (62.99, 62.09, 66.70)


@dataclass(frozen=True)
class Dataset:
    """Images and labels, split once and for all.

    Images are uint8 of shape (N, height, width, channels), here (N, 32, 32, 3), labels int32
    of shape (N,); a training label of -1 is unknown: a distilled student learns from its
    image all the same.
    Settings are chosen on ``val``; ``test`` is looked at once per reported run.

    Raises:
        ValueError: images that are no raw pixels or not all of one size, no images at all,
            labels that fit neither them nor the class names.
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
            if not isinstance(x, np.ndarray) or x.dtype != np.uint8 or x.ndim != 4:
                raise ValueError(
                    f"x_{part} is {_described(x)}: give raw pixels, uint8 of shape (images, "
                    "height, width, channels) in 0 to 255; the models normalise them."
                )
            if not len(x) or x.shape[1:] != self.x_train.shape[1:]:
                raise ValueError(
                    f"x_{part} is {_described(x)}, x_train {_described(self.x_train)}: each part "
                    "needs one image or more, all of one size."
                )
            low, high = -1 if part == "train" else 0, len(self.class_names) - 1
            whole = isinstance(y, np.ndarray) and y.shape == (len(x),) and y.dtype.kind in "iu"
            if not whole or (y.size and not low <= y.min() <= y.max() <= high):
                raise ValueError(
                    f"y_{part} is {_described(y)}: give class numbers of shape ({len(x)},), "
                    f"integers from {low} to {high}."
                )

    @cached_property
    def digest(self) -> str:
        """A fingerprint of all pixels and labels: a part of a run's name."""
        return _digest(self.x_train, self.y_train, self.x_val, self.y_val,
                       self.x_test, self.y_test)

    @cached_property
    def image_digest(self) -> str:
        """A fingerprint of the pixels alone: a teacher's answers do not depend on labels."""
        return _digest(self.x_train, self.x_val, self.x_test)


def _described(array) -> str:
    if not isinstance(array, np.ndarray):
        return f"a {type(array).__name__}"
    has_range = array.size and array.dtype.kind in "biuf"
    values = f" in {array.min():g} to {array.max():g}" if has_range else ""
    return f"{array.dtype} of shape {array.shape}{values}"


def load_dataset(name: str | None = None) -> Dataset:
    """Load CIFAR-10, or the offline digits where CIFAR-10 cannot be had.

    CIFAR-10 comes from ``$KD_DATA_DIR/cifar10.npz`` (default ``data/cifar10.npz``), else
    from ``keras.datasets.cifar10``, which downloads it once.

    Args:
        name: ``"cifar10"``, ``"digits"``, or None for the environment variable
            ``KD_DATASET`` and, without it, whatever there is: CIFAR-10, else digits
            with a notice.

    Raises:
        ValueError: an unknown name, or a ``cifar10.npz`` that is damaged.
        FileNotFoundError: ``"cifar10"`` was asked for and cannot be had.
    """
    name = name or os.environ.get("KD_DATASET") or None
    if name not in (None, "cifar10", "digits"):
        raise ValueError(
            f"name (or KD_DATASET) is {name!r}: choose 'cifar10' or 'digits', "
            "or leave it out to take CIFAR-10 where it is at hand."
        )
    if name == "digits":
        return _digits()
    try:
        return _cifar10()
    except FileNotFoundError as error:
        if name == "cifar10":
            raise
        print("NOTICE: no CIFAR-10 here, so everything below runs on DIGITS; there is nothing you "
              f"have to do.\n{error}")
        return _digits()


def _cifar10() -> Dataset:
    path = ROOT / (os.environ.get("KD_DATA_DIR") or "data") / "cifar10.npz"
    if path.exists():
        arrays = _read_cifar10(path)
    else:
        try:
            (a, b), (c, d) = keras.datasets.cifar10.load_data()
        except Exception as error:  # whatever a network can do
            reason = " ".join(str(error).rpartition(" -- ")[2].split()) or type(error).__name__
            raise FileNotFoundError(
                f"There is no {path.name} in KD_DATA_DIR, and the download failed "
                f"({reason}). Three ways out: put cifar10.npz (x_train, y_train, x_test, "
                "y_test) into a folder and set KD_DATA_DIR to it; connect to the internet "
                "and run this again; or stay offline with KD_DATASET=digits (both are set in "
                "front of the command that starts Jupyter)."
            ) from None
        arrays = dict(x_train=a, y_train=b.ravel(), x_test=c, y_test=d.ravel())
    # pop: each array is 150 MB, and none is kept longer than its sorted copy needs it.
    x, y = _by_content(arrays.pop("x_train"), arrays.pop("y_train"))
    x_test, y_test = _by_content(arrays.pop("x_test"), arrays.pop("y_test"))
    return _split("cifar10", CIFAR10_CLASSES, x, y, x_test, y_test, validation=5_000)


def _read_cifar10(path: Path) -> dict[str, np.ndarray]:
    """Read the four arrays, or say by name what is wrong with the file."""
    advice = "Fetch the file again, or set KD_DATASET=digits to work without it."
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = sorted(set(CIFAR10_SHAPES) - set(file.files))
            if missing:
                raise ValueError(f"the arrays {', '.join(missing)} are missing")
            arrays = {key: file[key] for key in CIFAR10_SHAPES}
        for key in ("y_train", "y_test"):  # Keras's own copy has them as (N, 1)
            if arrays[key].shape[1:] == (1,):
                arrays[key] = arrays[key].ravel()
        for key, shape in CIFAR10_SHAPES.items():
            if arrays[key].shape != shape or arrays[key].dtype.kind not in "iu":
                raise ValueError(
                    f"{key} is {arrays[key].dtype}{list(arrays[key].shape)}, "
                    f"not integers of shape {list(shape)}"
                )
            if arrays[key].min() < 0 or arrays[key].max() > (9 if key[0] == "y" else 255):
                raise ValueError(f"{key} has values out of range")
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path.name} in KD_DATA_DIR is damaged: {error}. {advice}") from None
    return arrays


def _by_content(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort images by a hash of their pixels.

    Copies of CIFAR-10 come in different orders. Sorted like this, the split below is the
    same for each of them, and no published teacher has seen *your* validation images.
    """
    order = np.argsort([hashlib.sha1(image).digest() for image in x], kind="stable")
    return x[order].astype("uint8", copy=False), y[order].astype("int32")


def _split(name, class_names, x, y, x_test, y_test, *, validation: int) -> Dataset:
    train, val = train_test_split(
        np.arange(len(y)), test_size=validation, stratify=y, random_state=0
    )
    return Dataset(name, list(class_names), x[train], y[train], x[val], y[val], x_test, y_test)


def _digits(renderings: int = 2) -> Dataset:
    """scikit-learn's 1,797 handwritten digits, made hard: small, tilted, on noise.

    Each training digit is set into several scenes, each other digit into one.
    """
    digits = sklearn.datasets.load_digits()
    names, y = [str(k) for k in range(10)], digits.target.astype("int32")
    which = np.arange(len(y))
    rest, test = train_test_split(which, test_size=447, stratify=y, random_state=0)
    train, val = train_test_split(rest, test_size=150, stratify=y[rest], random_state=0)

    def scenes(chosen, count):
        return np.stack([
            _scene(digits.images[k] / 16, np.random.default_rng([2015, k, n]))
            for n in range(count) for k in chosen
        ]), np.tile(y[chosen], count)

    return Dataset(
        "digits", names, *scenes(train, renderings), *scenes(val, 1), *scenes(test, 1)
    )


def _scene(digit: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One 8x8 digit, at random place, size and angle, on a noisy 32x32x3 background."""
    angle, size = rng.uniform(-0.5, 0.5), rng.uniform(1.8, 3.0)
    centre = 15.5 + rng.uniform(-1, 1, 2) * (15.5 - 4 * size)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / size
    ink = scipy.ndimage.affine_transform(
        digit, turn, offset=3.5 - turn @ centre, output_shape=(32, 32), order=1
    )
    paper = rng.uniform(60, 195, 3)
    pen = paper + rng.choice([-1, 1]) * rng.uniform(50, 100, 3)  # darker or lighter
    blotches = scipy.ndimage.gaussian_filter(rng.normal(0, 1, (32, 32, 3)), (2, 2, 0))
    noise = 85 * blotches + rng.normal(0, 12, (32, 32, 3))
    scene = paper + ink[..., None] * (pen - paper) + noise
    return np.clip(np.rint(scene), 0, 255).astype("uint8")


# A view is an image seen through a shift and perhaps a mirror. View v of image i is always
# the same, so a teacher's answer to it can be kept; and a view is only a choice of pixels,
# so one indexing makes it.


def view_codes(*, images: int, views: int, shift: int, flip: bool) -> np.ndarray:
    """The shift and mirror of each view: int array (views, images, 3) of (dy, dx, mirrored).

    Shifts are uniform in [-shift, shift]. An image mirrored in one view is not mirrored in
    the next (alternating flips: every two epochs show both sides).
    """
    codes = np.zeros((views, images, 3), "int8")
    first = np.random.default_rng(1503).integers(0, 2, images)
    for v in range(views):
        codes[v, :, :2] = np.random.default_rng([2531, v]).integers(
            -shift, shift + 1, (images, 2)
        )
        codes[v, :, 2] = (first + v) % 2 if flip else 0
    return codes


def augment(images: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Show images (N, H, W, C) through codes (N, 3); what a shift uncovers is mirrored in."""
    height, width = images.shape[1:3]
    rows = _reflect(np.arange(height) + codes[:, :1], height)
    cols = _reflect(np.arange(width) + codes[:, 1:2], width)
    cols = np.where(codes[:, 2:] == 1, cols[:, ::-1], cols)
    return images[np.arange(len(images))[:, None, None], rows[:, :, None], cols[:, None, :]]


def _reflect(index: np.ndarray, size: int) -> np.ndarray:
    return size - 1 - np.abs(size - 1 - np.abs(index))


# --- models ---------------------------------------------------------------------------


def build_teacher(num_classes: int = 10) -> keras.Model:
    """VGG-like teacher: raw pixels (N, 32, 32, 3) in 0..255 in, logits (N, num_classes) out.

    Stages of 3x3 convolutions with max pooling between them, as in VGG (Simonyan and
    Zisserman 2015, section 2), each with BatchNorm; Dropout before the classifier. The first
    convolution is a cheap 2x2, which lets the second be wide where the image is largest.
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
    x = layers.Normalization(
        mean=PIXEL_MEAN, variance=[s**2 for s in PIXEL_STD], name="normalization"
    )(pixels)
    kernel = first_kernel
    for stage, widths in enumerate(stages, start=1):
        for k, width in enumerate(widths, start=1):
            tag = f"{stage}_{k}"
            x = layers.Conv2D(
                width, kernel, padding="same", use_bias=False, name=f"conv{tag}"
            )(x)
            if k == len(widths) and stage < len(stages):
                # Pooling before BatchNorm: the same maximum, a quarter of the work after it.
                x = layers.MaxPooling2D(name=f"pool{stage}")(x)
            x = layers.BatchNormalization(momentum=0.9, name=f"norm{tag}")(x)
            x = layers.ReLU(name=f"relu{tag}")(x)
            kernel = 3
    x = layers.GlobalMaxPooling2D(name=f"pool{len(stages)}")(x)
    if dropout:
        x = layers.Dropout(dropout, name="dropout")(x)
    return keras.Model(pixels, layers.Dense(num_classes, name="logits")(x), name=name)


# --- losses ---------------------------------------------------------------------------


def soften(logits, temperature: float):
    """Soft labels: ``softmax(logits / temperature)``.

    Args:
        logits: (..., classes), any backend's tensor or NumPy array, before the softmax.
        temperature: T > 0. T = 1 is the ordinary softmax; a larger T spreads the
            probability over more classes.

    Returns:
        Probabilities of the same shape; each row sums to one.

    Raises:
        TypeError, ValueError: the temperature is not a number, or not positive and finite;
            the logits are no numbers.

    Source: Hinton, Vinyals, Dean 2015, section 2, equation 1.
    """
    temperature = _check_temperature(temperature)
    return ops.softmax(_as_float("logits", logits) / temperature, axis=-1)


def distillation_loss(*, teacher_logits, student_logits, temperature: float):
    """``T^2 * KL(soften(teacher_logits, T) || soften(student_logits, T))``, batch mean.

    The sum runs over the classes, the mean over the batch. T^2 is inside: the gradient of
    the KL divergence shrinks as 1 / T^2, and the factor keeps its size when T changes.

    Args:
        teacher_logits, student_logits: (batch, classes), before the softmax.
        temperature: T > 0, the same for both.

    Returns:
        A scalar, in nats times T^2; zero only when both soften to the same distributions.

    Raises:
        TypeError, ValueError: the temperature is not a positive finite number, or the
            shapes differ.

    Source: Hinton, Vinyals, Dean 2015, section 2 (the factor: its last paragraph).
    """
    temperature = _check_temperature(temperature)
    teacher_logits = _as_float("teacher_logits", teacher_logits)
    student_logits = _as_float("student_logits", student_logits)
    taught, learned = tuple(teacher_logits.shape), tuple(student_logits.shape)
    if len(taught) < 2 or len(taught) != len(learned) or 0 in taught or any(
        map(_differ, taught, learned)
    ):
        raise ValueError(
            f"teacher_logits have shape {taught}, student_logits {learned}: both need "
            "(batch, classes), with the same classes in the same order."
        )
    log_p = ops.log_softmax(teacher_logits / temperature, axis=-1)
    log_q = ops.log_softmax(student_logits / temperature, axis=-1)
    kl = ops.sum(ops.exp(log_p) * (log_p - log_q), axis=-1)
    return temperature**2 * ops.mean(kl)


def _differ(a, b) -> bool:
    return a is not None and b is not None and a != b


def _as_float(name: str, logits):
    """At least float32: half precision is too coarse for differences of logarithms."""
    try:
        logits = ops.convert_to_tensor(logits)
        dtype = keras.backend.standardize_dtype(logits.dtype)
    except (TypeError, ValueError) as error:  # words, ragged lists, None
        reason = str(error).splitlines()[0]
        raise TypeError(f"{name} cannot become a tensor of numbers: {reason}") from None
    if not dtype.startswith(("float", "bfloat", "int", "uint")) or len(logits.shape) == 0:
        raise TypeError(
            f"{name} are {dtype} of shape {tuple(logits.shape)}: give real numbers of shape "
            "(batch, classes), before the softmax."
        )
    return logits if dtype in ("float32", "float64") else ops.cast(logits, "float32")


def _check_temperature(temperature) -> float:
    return _check_number(
        "temperature", temperature, lambda t: math.isfinite(t) and t > 0,
        "it divides the logits, so it has to be a positive finite number; 1 leaves them as "
        "they are, 2 to 8 is usual",
    )


def _check_alpha(alpha) -> float:
    return _check_number(
        "alpha", alpha, lambda a: 0 <= a <= 1,
        "it is the weight of the hard-label loss and has to be a number in [0, 1]; "
        "0.1 to 0.3 is usual",
    )


def _check_number(name: str, value, allowed, advice: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}, a {type(value).__name__}: {advice}.")
    if not allowed(value):
        raise ValueError(f"{name} is {value}: {advice}.")
    return float(value)


# --- distiller ------------------------------------------------------------------------


class Distiller(keras.Model):
    """Train a student on hard labels and on a teacher's soft labels.

    ``loss = alpha * student_loss + (1 - alpha) * distillation_loss`` (+ the student's
    regularisers, if it has any, with weight one)

    compile, fit, evaluate and predict work as in Keras, on TensorFlow and PyTorch.
    ``fit(images, labels)`` asks the teacher live; ``fit((images, teacher_logits), labels)``
    uses answers computed before (so the images have to be one tensor).
    The teacher runs with ``training=False``, outside the gradient tape; none of its
    weights belong to this model. ``save`` saves the student alone; for its weights, for
    ``export``, or to evaluate it without a teacher, use ``student`` itself.
    A ``sample_weight`` weighs the student_loss only: 0 marks an image without a label (its
    label may be any valid class number).

    Args:
        student, teacher: built Keras models with one and the same input, logits (batch,
            classes) out.
        temperature: T > 0, softens both sides of the distillation_loss.
        alpha: weight of the hard-label loss, in [0, 1].

    Raises:
        TypeError, ValueError: a bad temperature or alpha, a model that visibly ends in a
            softmax or sigmoid, models with different numbers of classes or with weights in
            common. A student larger than its teacher is warned about.
        NotImplementedError: Keras runs on JAX, whose training steps carry their state.

    Source: Hinton, Vinyals, Dean 2015, section 2.
    """

    def __init__(self, *, student, teacher, temperature: float, alpha: float = 0.1):
        if keras.config.backend() == "jax":
            raise NotImplementedError(
                "Keras runs on jax: Distiller needs tensorflow or torch (KERAS_BACKEND); "
                "distillation_loss runs on each."
            )
        super().__init__(name="distiller")
        self._temperature = _check_temperature(temperature)
        self._alpha = _check_alpha(alpha)
        taught = _check_gives_logits("teacher", teacher)
        learned = _check_gives_logits("student", student)
        if _differ(taught, learned):
            raise ValueError(
                f"teacher gives {taught} logits, student {learned}: both need the same classes, "
                "in the same order."
            )
        if {id(w) for w in student.weights} & {id(w) for w in teacher.weights}:
            raise ValueError(
                "student and teacher share weights, so that the student's training would change "
                "the teacher: give it a copy, keras.models.clone_model(teacher) with "
                "copy.set_weights(teacher.get_weights())."
            )
        if student.count_params() > teacher.count_params():
            warnings.warn(
                f"student has {student.count_params():,} parameters, more than the teacher's "
                f"{teacher.count_params():,}: are the two swapped?", stacklevel=2,
            )
        self.student = student
        self._classes = learned or taught
        # In a closure Keras does not find the teacher's weights: they are not trained, not
        # counted, and not saved with the student.
        self._ask_teacher = lambda images: ops.stop_gradient(teacher(images, training=False))
        self._student_loss = keras.metrics.Mean(name="student_loss")
        self._distillation_loss = keras.metrics.Mean(name="distillation_loss")

    # Read only: the first training step builds them into its graph.
    temperature = property(lambda self: self._temperature)
    alpha = property(lambda self: self._alpha)

    def compile(self, optimizer="rmsprop", loss=None, *, metrics=None, weighted_metrics=None,
                loss_weights=None, **kwargs):
        """As Keras's; the loss is the student_loss, by default cross-entropy from logits.

        Without metrics: the accuracy, in which an image counts as its sample_weight says.
        """
        loss = loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        if not isinstance(loss, keras.losses.Loss) or (
            loss.get_config().get("from_logits") is False
        ):
            raise ValueError(
                f"loss is {loss!r}, which may take its input for probabilities, but the student "
                "gives logits: pass a keras.losses object with from_logits=True."
            )
        if loss_weights is not None:
            raise ValueError(
                f"loss_weights are {loss_weights!r}: the two losses are weighed by alpha."
            )
        if metrics is None and weighted_metrics is None:
            weighted_metrics = ["accuracy"]
        super().compile(optimizer=optimizer, loss=loss, metrics=metrics,
                        weighted_metrics=weighted_metrics, **kwargs)

    def fit(self, x=None, y=None, *args, **kwargs):
        """As Keras's; in arrays, impossible labels and logits are named before it begins."""
        if hasattr(y, "min") and len(y) and self._classes and not (
            y.min() >= 0 and y.max() < self._classes
        ):
            raise ValueError(
                f"labels go from {y.min()} to {y.max()}, but there are {self._classes} classes: "
                f"give class numbers from 0 to {self._classes - 1}."
            )
        logits = x[1] if isinstance(x, (tuple, list)) and len(x) == 2 else None
        if hasattr(logits, "min") and logits.min() >= 0 and (
            abs(logits.sum(axis=-1) - 1).max() < 1e-3
        ):
            raise ValueError(
                "teacher_logits are probabilities (none is negative, and each row sums to 1): "
                "give the teacher's outputs before its softmax."
            )
        return super().fit(x, y, *args, **kwargs)

    def call(self, inputs, training=None):
        images = inputs[0] if isinstance(inputs, (tuple, list)) else inputs
        return self.student(images, training=training)

    # The teacher answers before Keras opens its gradient tape, so that none of its
    # activations are kept for a backward pass that never comes.

    def train_step(self, data):
        return super().train_step(self._with_teacher(data))

    def test_step(self, data):
        return super().test_step(self._with_teacher(data))

    def _with_teacher(self, data):
        """Add the teacher's logits, unless they came with the batch."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        sparse = isinstance(self.loss, keras.losses.SparseCategoricalCrossentropy)
        if y is None or (sparse and len(y.shape) > 1 and y.shape[-1] != 1):
            raise ValueError(
                f"labels are {None if y is None else tuple(y.shape)}: give class numbers of "
                "shape (batch,), not one-hot rows; np.argmax(labels, axis=-1) turns one into "
                "the other."
            )
        return self._pair(x), y, sample_weight

    def _pair(self, x):
        return x if isinstance(x, (tuple, list)) else (x, self._ask_teacher(x))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        # Keras divides a loss by the number of TensorFlow's replicas, and sums gradients.
        strategy = getattr(self, "distribute_strategy", None)
        replicas = strategy.num_replicas_in_sync if strategy else 1
        regularisers = sum(self.losses)
        keras_loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        student_loss = replicas * keras_loss - regularisers
        distilled = distillation_loss(
            teacher_logits=self._pair(x)[1], student_logits=y_pred, temperature=self.temperature
        )
        batch = ops.shape(y_pred)[0]  # the last batch may be smaller, and counts for less
        self._student_loss.update_state(student_loss, sample_weight=batch)
        self._distillation_loss.update_state(distilled, sample_weight=batch)
        loss = self.alpha * student_loss + (1 - self.alpha) * distilled + regularisers
        return loss / replicas

    def save(self, filepath, **kwargs):
        """Save the student alone, as ``student.save`` would: that is what one ships."""
        self.student.save(filepath, **kwargs)


def _check_gives_logits(role: str, model) -> int | None:
    """The number of classes, where the model knows it (a subclassed one does not)."""
    if not isinstance(model, keras.Model) or not model.built:
        raise TypeError(
            f"{role} is a {type(model).__name__}: give a built Keras model. A file becomes one "
            "by keras.saving.load_model, an unbuilt model by a call on a batch of images; of "
            "what train_or_load returns it is .model."
        )
    shape = getattr(model, "output_shape", None)
    one = isinstance(shape, tuple) and all(isinstance(n, (int, type(None))) for n in shape)
    if isinstance(getattr(model, "output", None), dict) or not (one or shape is None):
        raise ValueError(
            f"{role} gives several outputs, or a dictionary ({shape}): make a model of its logits "
            "alone, keras.Model(model.inputs, model.outputs[0])."
        )
    if shape is not None and (len(shape) != 2 or shape[-1] is None or shape[-1] < 2):
        raise ValueError(
            f"{role} gives outputs of shape {shape}: distillation needs logits of shape "
            "(batch, classes), with two classes or more."
        )
    last = _last_operation(model)
    if type(last).__name__ in ("Softmax", "Sigmoid") or getattr(last, "activation", None) in (
        keras.activations.softmax, keras.activations.sigmoid
    ):
        raise ValueError(
            f"{role} ends in a softmax or sigmoid ({last.name!r}): distillation needs logits. "
            "Build the same model without that last activation, and give it the trained weights: "
            "new.set_weights(model.get_weights())."
        )
    return shape and shape[-1]


def _last_operation(operation):
    """What computes the output, seen through nested models and idle activations."""
    if isinstance(operation, keras.Model) and getattr(operation, "outputs", None):
        return _last_operation(operation.outputs[0]._keras_history.operation)
    if getattr(operation, "activation", None) is keras.activations.linear and (
        isinstance(operation, layers.Activation)
    ):
        return _last_operation(operation.input._keras_history.operation)
    return operation


# --- training -------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training besides model, data and seed.

    Chosen on validation. The distilled student and the student from scratch share one.
    """

    epochs: int
    batch_size: int = 125  # divides 45,000: no image is left out of an epoch
    optimizer: str = "muon"  # or "sgd" (Nesterov): warm-up, cosine decay; "adam": constant rate
    learning_rate: float = 0.02  # the peak of the schedule
    warmup: float = 0.1  # part of all steps that the rate takes to climb to its peak
    momentum: float = 0.9
    weight_decay: float = 0.1  # decoupled, times the rate, on kernels only
    views: int = 20  # of each image; epoch e shows view e modulo views. 0: always new ones, by
    # which a distilled run has to ask its teacher live
    shift: int = 4  # pixels
    flip: bool = True  # not for digits or letters

    def __post_init__(self):
        for name, lowest in (("epochs", 1), ("batch_size", 1), ("views", 0), ("shift", 0)):
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral) or value < lowest:
                raise ValueError(f"{name} is {value!r}: give a whole number from {lowest} on.")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup}: give a part of all steps, below 1.")
        if not self.learning_rate >= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}: it cannot be negative.")


RECIPES = {
    ("cifar10", "teacher"): Recipe(epochs=20),
    ("cifar10", "student"): Recipe(epochs=20),
    ("digits", "teacher"): Recipe(epochs=20, batch_size=50, flip=False),
    ("digits", "student"): Recipe(epochs=7, batch_size=50, flip=False),
}


@dataclass(frozen=True)
class Run:
    """A finished training: the model, its history per epoch, and its row of results.csv."""

    model: keras.Model
    history: dict[str, list[float]]
    row: dict


def recipe_for(dataset: Dataset, method: str) -> Recipe:
    """The published recipe of a dataset for ``"teacher"`` or any student method.

    A dataset of one's own has CIFAR-10's, which mirrors images: see Recipe.flip.
    """
    role = _role(method)
    return RECIPES.get((dataset.name, role), RECIPES["cifar10", role])


def _role(method: str) -> str:
    return "teacher" if method.startswith("teacher") else "student"


def train_or_load(
    method: str, dataset: Dataset, *, build=None, teacher=None, temperature: float = 4.0,
    alpha: float = 0.1, recipe: Recipe | None = None, seed: int = 0, rewrite=None,
) -> Run:
    """Train a model, or load it if this very training was done before.

    A finished run is loaded from ``$KD_RUNS_DIR`` (default ``runs``), or from ``reference``
    where it is a published one. A run that was cut off goes on after its last whole epoch
    and ends with the same weights, bit for bit on one machine. ``KD_RETRAIN=1`` ignores
    ``reference``; delete ``runs`` to begin from nothing. Sets the global random seed.

    Args:
        method: ``"teacher"``, ``"scratch"`` or ``"distilled"``, perhaps with a label of
            your own behind a dash: ``"distilled-adam"``.
        build: function without arguments that returns a Keras model with logits out, new
            or loaded from a file to be trained further; by default build_teacher or
            build_student, which take images of 32 x 32 x 3 and have ten classes.
        teacher: needed by a distilled run; the others use it only to measure agreement.
        temperature, alpha: see Distiller; only a distilled run uses them.
        recipe: by default ``recipe_for(dataset, method)``.
        seed: decides first weights, order of batches and Dropout.
        rewrite: a control: function (logits, labels, temperature) -> logits, which changes
            the teacher's answers before the student sees them, as ``without_dark_knowledge``.

    Raises:
        TypeError, ValueError: an unknown method, a distilled run without a teacher, a bad
            recipe; a model whose classes are not the dataset's, or that Keras cannot load.
        RuntimeError: the run is under way in another process, or was begun with other
            versions of the libraries.
    """
    kind = method.partition("-")[0]
    if kind not in ("teacher", "scratch", "distilled"):
        raise ValueError(
            f"method is {method!r}: begin it with 'teacher', 'scratch' or 'distilled'; a label "
            "of your own may follow after a dash, as in 'distilled-adam'."
        )
    distilled = kind == "distilled"
    if distilled and teacher is None:
        raise ValueError(f"teacher is None, but method is {method!r}: pass a trained teacher.")
    if teacher is not None:
        _check_gives_logits("teacher", teacher)
    recipe, seed = recipe or recipe_for(dataset, method), operator.index(seed)
    if rewrite is not None and not (distilled and recipe.views):
        raise ValueError(
            "rewrite changes a teacher's stored answers: it goes with a distilled run whose "
            f"recipe has views > 0, but method is {method!r} and recipe.views {recipe.views}."
        )
    if rewrite is not None and dataset.y_train.min() < 0:
        raise ValueError("rewrite needs every label, but some in y_train are -1, unknown.")
    if recipe.batch_size > len(dataset.y_train):
        raise ValueError(
            f"recipe.batch_size is {recipe.batch_size}: choose 1 to {len(dataset.y_train)}, "
            "the number of training images."
        )
    own = build is None
    build = build or (build_teacher if _role(method) == "teacher" else build_student)

    def first_weights():
        keras.utils.set_random_seed(seed)
        return build()

    model, classes = first_weights(), len(dataset.class_names)
    if (given := _check_gives_logits(_role(method), model)) not in (None, classes):
        raise ValueError(
            f"build gives a model of {given} logits, but {dataset.name} has {classes} classes."
        )
    spec = {
        "kdlib": __version__, "dataset": dataset.name, "data": dataset.digest, "method": method,
        "seed": seed, "architecture": _architecture_digest(model), **asdict(recipe),
        "begins_with": None if own else _digest(*model.get_weights()),
        "temperature": _check_temperature(temperature) if distilled else None,
        "alpha": _check_alpha(alpha) if distilled else None,
        "teacher": _model_digest(teacher) if distilled else None,
        **({"rewrite": _behaviour_digest(rewrite, classes)} if rewrite else {}),
    }
    name = f"{dataset.name}-{method}-seed{seed}"
    folder = runs_folder() / f"{name}-{_digest(_json(spec))[:10]}"
    published = () if _retrain() else (REFERENCE / name,)
    for stem in (folder / "model", *published):
        if (run := _load_run(stem, spec, dataset, teacher)) is not None:
            return run
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder / "lock").acquire(timeout=0):
            if (run := _load_run(folder / "model", spec, dataset, teacher)) is not None:
                return run  # another process has just finished it
            first, model = model, first_weights()  # the search may have drawn random numbers
            if not own:
                _check_build(first, model, folder)
            history = _train(model, dataset, teacher if distilled else None, recipe, spec, folder,
                             rewrite)
            return _finish(model, history, dataset, teacher, spec, folder)
    except filelock.Timeout:
        raise RuntimeError(
            f"the run {folder.name} is under way in another process: wait for it, or stop it."
        ) from None


def _check_build(first, second, folder: Path) -> None:
    """Before the training: what ``build`` returned is new, and can be loaded afterwards."""
    if first is second:
        raise ValueError(
            "build returned one and the same model twice: let it build a new one, or load it."
        )
    path = folder / "aside-first.keras"
    try:
        first.save(path)
        keras.saving.load_model(path, compile=False)
    except (TypeError, ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"Keras cannot load back what build returns ({reason}): build it from Keras's own "
            "layers, or register its classes with keras.saving.register_keras_serializable."
        ) from None
    finally:
        path.unlink(missing_ok=True)


def runs_folder() -> Path:
    """Where runs and cached logits are kept: ``$KD_RUNS_DIR``, by default ``runs``."""
    return ROOT / (os.environ.get("KD_RUNS_DIR") or "runs")


def _retrain() -> bool:
    value = os.environ.get("KD_RETRAIN") or "0"
    if value not in ("0", "1"):
        raise ValueError(f"KD_RETRAIN is {value!r}: 1 trains anew, 0 or nothing loads reference.")
    return value == "1"


def _train(model, dataset, teacher, recipe, spec, folder, rewrite) -> dict[str, list[float]]:
    """Fit ``model`` from where ``folder`` says it stopped; returns the whole history."""
    validation = (dataset.x_val, dataset.y_val)
    fast = _with_fused_norm(model)
    logits, trainer = None, fast
    if teacher is not None:
        trainer = Distiller(student=fast, teacher=teacher,
                            temperature=spec["temperature"], alpha=spec["alpha"])
        if recipe.views:
            logits = teacher_logits(teacher, dataset, recipe)
        if rewrite is not None:
            logits = np.stack([rewrite(view, dataset.y_train, spec["temperature"])
                               for view in logits]).astype("float32")
        answers = _kept_logits(teacher, _logits_folder(teacher, dataset) / "val.npy",
                               lambda: dataset.x_val)
        validation = ((dataset.x_val, answers), dataset.y_val)
    steps = len(dataset.y_train) // recipe.batch_size
    trainer.compile(
        optimizer=_optimizer(recipe, steps, last_layer=_last_operation(model).name),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[], weighted_metrics=["accuracy"],
        steps_per_execution=max(k for k in range(1, 25) if steps % k == 0),
        jit_compile=False,  # slower on the CPU
    )
    keeper = _StateKeeper(folder, spec, recipe.epochs, steps)
    keeper.restore(trainer)
    if keeper.epoch < recipe.epochs:
        try:
            trainer.fit(
                batches(dataset, recipe, seed=spec["seed"], first_epoch=keeper.epoch,
                        teacher_logits=logits),
                steps_per_epoch=steps, initial_epoch=keeper.epoch, epochs=recipe.epochs,
                validation_data=validation, validation_batch_size=500, shuffle=False, verbose=0,
                callbacks=[keeper],
            )
        finally:
            if keeper.bar is not None:
                keeper.bar.close()
    model.set_weights(fast.get_weights())
    return keeper.history


def batches(dataset, recipe, *, seed, first_epoch=0, teacher_logits=None) -> tf.data.Dataset:
    """All batches from ``first_epoch`` to the end; order and views follow from the seed.

    Elements are (images, labels), with ``teacher_logits`` ((images, logits), labels); where
    some labels are negative, which stands for unknown, a third part weighs these with 0.
    """
    count, size = len(dataset.y_train), recipe.batch_size
    steps, views = count // size, recipe.views or recipe.epochs
    codes = view_codes(images=count, views=views, shift=recipe.shift, flip=recipe.flip)
    known = (dataset.y_train >= 0).astype("float32")
    labels, weigh = np.maximum(dataset.y_train, 0), not known.all()

    def produce():
        for epoch in range(first_epoch, recipe.epochs):
            order = np.random.default_rng([seed, epoch]).permutation(count)
            view = epoch % views
            for index in order[: steps * size].reshape(steps, size):
                images = augment(dataset.x_train[index], codes[view, index])
                if teacher_logits is not None:
                    images = (images, teacher_logits[view, index])
                yield (images, labels[index], known[index]) if weigh else (images, labels[index])

    images = tf.TensorSpec((size, *dataset.x_train.shape[1:]), tf.uint8)
    if teacher_logits is not None:
        images = (images, tf.TensorSpec((size, teacher_logits.shape[-1]), tf.float32))
    signature = (images, tf.TensorSpec((size,), tf.int32))
    if weigh:
        signature += (tf.TensorSpec((size,), tf.float32),)
    return tf.data.Dataset.from_generator(produce, output_signature=signature).prefetch(24)


def _optimizer(recipe: Recipe, steps: int, *, last_layer: str) -> keras.optimizers.Optimizer:
    if recipe.optimizer == "adam":
        return keras.optimizers.Adam(recipe.learning_rate)
    warmup = int(recipe.warmup * recipe.epochs * steps)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, recipe.epochs * steps - warmup,
        warmup_target=recipe.learning_rate, warmup_steps=warmup,
    )
    common = dict(learning_rate=schedule, momentum=recipe.momentum, nesterov=True,
                  weight_decay=recipe.weight_decay)
    if recipe.optimizer == "muon":
        optimizer = Muon(**common, adam_weight_decay=recipe.weight_decay, adam_lr_ratio=0.5,
                         exclude_layers=[last_layer])
    elif recipe.optimizer == "sgd":
        optimizer = keras.optimizers.SGD(**common)
    else:
        raise ValueError(
            f"recipe.optimizer is {recipe.optimizer!r}: choose 'muon', 'sgd' or 'adam'."
        )
    optimizer.exclude_from_weight_decay(var_names=["gamma", "beta", "bias"])
    return optimizer


class Muon(keras.optimizers.Muon):
    """Keras's Muon, for convolutions too: a kernel is a matrix (inputs, outputs).

    Momentum whose matrix is made orthogonal before each step, so that every direction of a
    kernel learns at the same pace; vectors and the excluded layers are left to AdamW. A step
    does not depend on the size of the loss, so T and alpha do not change the pace.

    Source: Jordan et al. 2024 (kellerjordan.github.io/posts/muon); the size of a step: Liu
    et al. 2025, section 2.2.
    """

    def _should_use_adamw(self, variable):
        excluded = any(name in variable.path for name in self.exclude_layers)
        return len(variable.shape) < 2 or excluded

    def zeropower_via_newtonschulz5(self, x, steps):
        return _as_matrix(x, lambda m: super(Muon, self).zeropower_via_newtonschulz5(m, steps))

    def lr_adjust(self, x):
        return _as_matrix(x, super().lr_adjust)


def _as_matrix(kernel, function):
    return ops.reshape(function(ops.reshape(kernel, (-1, kernel.shape[-1]))), kernel.shape)


def _with_fused_norm(model):
    """A twin with the same weights whose BatchNorm trains on TensorFlow's one-pass kernel."""

    def twin(layer):
        kind = type(layer)
        if kind is layers.BatchNormalization and layer.center and layer.scale and (
            layer.axis in (-1, 3) and layer.compute_dtype == "float32" and not layer.synchronized
        ):
            kind = _FusedBatchNormalization
        return kind.from_config(layer.get_config())

    try:
        fast = keras.models.clone_model(model, clone_function=twin, recursive=True)
    except ValueError:  # a subclassed model: only its author could build a twin
        return model
    fast.set_weights(model.get_weights())
    return fast


class _FusedBatchNormalization(layers.BatchNormalization):
    """The same numbers as Keras's layer, which passes three times over the images."""

    def call(self, inputs, training=None, mask=None):
        if not (training and self.trainable and mask is None and len(inputs.shape) == 4):
            return super().call(inputs, training=training, mask=mask)
        outputs, mean, variance = tf.compat.v1.nn.fused_batch_norm(
            inputs, self.gamma, self.beta, epsilon=self.epsilon
        )[:3]
        count = tf.cast(tf.size(inputs) // inputs.shape[-1], tf.float32)
        variance *= (count - 1) / count  # the kernel divides by count - 1, Keras by count
        for moving, batch in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moving.assign(moving * self.momentum + batch * (1 - self.momentum))
        return outputs


def teacher_logits(teacher, dataset: Dataset, recipe: Recipe) -> np.ndarray:
    """The teacher's logits for every view: float32 (views, images, classes).

    Computed once and kept in the runs folder. Source: a patient teacher sees what the student
    sees (Beyer et al. 2022); stored answers: Shen and Xing 2022.
    """
    views = min(recipe.views, recipe.epochs)
    codes = view_codes(images=len(dataset.y_train), views=views, shift=recipe.shift,
                       flip=recipe.flip)
    folder = _logits_folder(teacher, dataset)
    return np.stack([
        _kept_logits(teacher, folder / f"view{v:02d}-shift{recipe.shift}-flip{recipe.flip:d}.npy",
                     lambda v=v: augment(dataset.x_train, codes[v]))
        for v in tqdm(range(views), desc="teacher's answers", unit="view", leave=False, delay=2)
    ])


def _logits_folder(teacher, dataset) -> Path:
    """Its name is a digest of teacher and images: no other answers can be taken for these."""
    key = _json([__version__, dataset.image_digest, _model_digest(teacher)])
    return runs_folder() / f"logits-{_digest(key)[:16]}"


def _kept_logits(teacher, path: Path, images) -> np.ndarray:
    """The teacher's logits for ``images()``, asked once and kept at ``path``."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        answer = predict_logits(teacher, images())
        _write_whole(path, lambda aside: np.save(aside, answer))
    return np.load(path, allow_pickle=False)


# Controls: what a student learns from a teacher that knows less.


def without_dark_knowledge(logits, labels, temperature: float):
    """Label smoothing with the mean entropy of the teacher's soft labels.

    Every image gets the same soft label but for the place of its class: one probability for
    that, another for each wrong class. logits (N, classes), labels (N,); returns logits.
    Source: label smoothing: Szegedy et al. 2016, section 7.
    """
    classes = logits.shape[-1]
    soft = scipy.special.softmax(logits.astype("float64") / temperature, axis=-1)
    wanted = scipy.special.entr(soft).sum(-1).mean()

    def entropy(wrong):
        return scipy.special.entr(1 - wrong) + scipy.special.entr(wrong / (classes - 1)) * (
            classes - 1)

    wrong = scipy.optimize.brentq(lambda w: entropy(w) - wanted, 1e-12, 1 - 1 / classes)
    smooth = np.where(np.arange(classes) == labels[:, None], 1 - wrong, wrong / (classes - 1))
    return temperature * np.log(smooth)


def with_shuffled_dark_knowledge(logits, labels, temperature: float):
    """The teacher's logits, those of the wrong classes dealt out anew.

    Each image has its own shuffle, the same in all its views: the student still learns how
    sure the teacher is, and something false about which classes are alike. Source: after
    Furlanello et al. 2018, section 3.2 (dark knowledge with permuted predictions).
    """
    keys = np.random.default_rng(2018).random(logits.shape)
    keys[np.arange(len(labels)), labels] = -1
    origin = keys.argsort(-1)[:, 1:]  # the wrong classes in random order
    shuffled = logits.copy()
    np.put_along_axis(shuffled, np.sort(origin), np.take_along_axis(logits, origin, -1), -1)
    return shuffled


def _behaviour_digest(rewrite, classes: int) -> str:
    """What a function does to some fixed logits: its name or source would say less."""
    logits = np.random.default_rng(0).normal(0, 4, (200, classes))
    return _digest(np.round(rewrite(logits, np.arange(200) % classes, 4.0), 2))


def predict_logits(model, images: np.ndarray) -> np.ndarray:
    """Logits of many images, in batches: float32 (N, classes)."""
    return model.predict(images, batch_size=500, verbose=0)


class _StateKeeper(keras.callbacks.Callback):
    """Keeps the state of a training after each epoch, and shows its progress.

    Keras's BackupAndRestore writes weights and epoch into two files, one after the other: a
    kill between them repeats or skips an epoch. Here a state is one file with checksums, and
    the last two are kept, in turn.
    """

    def __init__(self, folder: Path, spec: dict, epochs: int, steps: int):
        super().__init__()
        self.folder, self.epochs, self.steps = folder, epochs, steps
        self.meta = {"spec": json.loads(_json(spec)), "versions": _versions()}
        self.epoch, self.history, self.postfix, self.bar = 0, {}, {}, None

    def restore(self, trainer) -> None:
        trainer.optimizer.build(trainer.trainable_variables)
        states = [state for path in sorted(self.folder.glob("state-?.npz"))
                  if (state := self._read(path))]
        if not states:
            return
        meta, values = max(states, key=lambda state: state[0]["epoch"])
        for key, mine in self.meta.items():
            if meta[key] != mine:
                raise RuntimeError(
                    f"the run {self.folder.name} was begun with other {key} ({meta[key]}, now "
                    f"{mine}): delete its folder to begin anew, or go back to those."
                )
        for variable, value in zip(_state_of(trainer), values, strict=True):
            variable.assign(value)
        self.epoch, self.history = meta["epoch"], meta["history"]

    def _read(self, path: Path):
        try:
            with np.load(path, allow_pickle=False) as file:
                return (json.loads(str(file["meta"])),
                        [file[f"v{k}"] for k in range(len(file.files) - 1)])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            warnings.warn(
                f"{path.name} of {self.folder.name} is damaged ({error}): going on from the "
                "state before it.", stacklevel=2,
            )

    def on_train_begin(self, logs=None):
        self.bar = tqdm(total=self.epochs * self.steps, initial=self.epoch * self.steps,
                        unit="step", desc=self.meta["spec"]["method"], leave=False)

    def on_epoch_begin(self, epoch, logs=None):
        self.started = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.postfix["loss"] = f"{logs['loss']:.3f}"
        self.bar.set_postfix({"epoch": f"{self.epoch + 1}/{self.epochs}", **self.postfix},
                             refresh=False)
        self.bar.update(self.epoch * self.steps + batch + 1 - self.bar.n)

    def on_epoch_end(self, epoch, logs=None):
        logs = dict(logs, seconds=time.perf_counter() - self.started)
        for key, value in logs.items():
            self.history.setdefault(key, []).append(round(float(value), 5))
        self.epoch = epoch + 1
        self.postfix["val_accuracy"] = f"{logs['val_accuracy']:.3f}"
        self._save()

    def _save(self) -> None:
        meta = _json({**self.meta, "epoch": self.epoch, "history": self.history})
        values = {f"v{k}": np.asarray(v) for k, v in enumerate(_state_of(self.model))}
        _write_whole(self.folder / f"state-{self.epoch % 2}.npz",
                     lambda aside: np.savez(aside, meta=np.array(meta), **values))


def _state_of(trainer) -> list:
    """All that training changes: weights, statistics, Dropout's seeds, the optimizer."""
    return [*trainer.variables, *trainer.optimizer.variables]


def _finish(model, history, dataset, teacher, spec, folder) -> Run:
    """Measure a trained model, write it down, and only then drop the way back."""
    row = {
        **{key: spec[key] for key in RESULT_COLUMNS if key in spec},
        "model": _role(spec["method"]),
        "parameters": model.count_params(),
        **_measure(model, dataset, _test_answers(teacher, dataset)),
        "seconds": round(sum(history["seconds"])),
        "machine": _machine(),
        "versions": _versions(),
    }
    row = {key: row[key] for key in RESULT_COLUMNS}
    _write_whole(folder / "model.keras", model.save)
    judge = None if teacher is None else _model_digest(teacher)
    text = _json({"spec": spec, "row": row, "history": history, "judge": judge,
                  "weights": _digest(*model.get_weights())})
    _write_whole(folder / "model.json", lambda aside: aside.write_text(text))
    for leftover in (*folder.glob("state-?.npz"), *folder.glob("aside-*")):
        leftover.unlink()
    return Run(model, history, row)


def _load_run(stem: Path, spec: dict, dataset, teacher) -> Run | None:
    """The finished run at ``stem``.keras and .json, if it is the one that ``spec`` describes."""
    notes, weights = (stem.parent / f"{stem.name}.{kind}" for kind in ("json", "keras"))
    if not (notes.exists() and weights.exists()):
        return None
    try:
        found = json.loads(notes.read_text())
        if found["spec"] != json.loads(_json(spec)):
            return None
        model = keras.saving.load_model(weights, compile=False)
        if _digest(*model.get_weights()) != found["weights"]:
            raise ValueError("its weights are not those of its notes")
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        warnings.warn(f"{stem.name} in {stem.parent.name} is damaged ({error}): it is not used.",
                      stacklevel=3)
        return None
    row = {key: found["row"][key] for key in RESULT_COLUMNS}
    if teacher is not None and found["judge"] != _model_digest(teacher):
        answers = _test_answers(teacher, dataset).argmax(-1)
        guess = predict_logits(model, dataset.x_test).argmax(-1)
        row["agreement"] = round(float(np.mean(guess == answers)), 4)
    return Run(model, found["history"], row)


def publish(run: Run, *, weights: bool = True) -> None:
    """Copy a finished run from the runs folder into ``reference`` (for maintainers).

    Without its weights it is a row of results.csv, which anyone can train again.
    """
    import pandas as pd

    row = run.row
    name = f"{row['dataset']}-{row['method']}-seed{row['seed']}"
    (folder,) = [p.parent for p in runs_folder().glob(f"{name}-*/model.json")
                 if json.loads(p.read_text())["row"] == row]
    target = REFERENCE / name if weights else REFERENCE / "rows" / folder.name
    target.parent.mkdir(exist_ok=True)
    notes = target.with_name(f"{target.name}.json")
    notes.unlink(missing_ok=True)  # never new weights beside old notes
    for kind in ("keras", "json") if weights else ("json",):
        data = (folder / f"model.{kind}").read_bytes()
        _write_whole(target.with_name(f"{target.name}.{kind}"),
                     lambda aside, data=data: aside.write_bytes(data))
    rows = [json.loads(path.read_text())["row"] for path in REFERENCE.rglob("*.json")]
    table = pd.DataFrame(rows, columns=RESULT_COLUMNS).sort_values(
        ["dataset", "method", "temperature", "alpha", "seed"])
    _write_whole(REFERENCE / "results.csv", lambda aside: table.to_csv(aside, index=False))


RESULT_COLUMNS = (
    "dataset model method temperature alpha seed epochs parameters val_accuracy test_accuracy "
    "nll ece agreement seconds machine versions".split()
)


def measure(model, dataset: Dataset, teacher=None) -> dict[str, float]:
    """val_accuracy; and on the test set: accuracy, nll (nats), ece, agreement with a teacher."""
    return _measure(model, dataset,
                    None if teacher is None else predict_logits(teacher, dataset.x_test))


def _measure(model, dataset, teacher_answers) -> dict[str, float]:
    logits = predict_logits(model, dataset.x_test).astype("float64")
    log_p = scipy.special.log_softmax(logits, axis=-1)
    guess = logits.argmax(-1)
    figures = {
        "val_accuracy": np.mean(predict_logits(model, dataset.x_val).argmax(-1) == dataset.y_val),
        "test_accuracy": np.mean(guess == dataset.y_test),
        "nll": -log_p[np.arange(len(guess)), dataset.y_test].mean(),
        "ece": expected_calibration_error(np.exp(log_p), dataset.y_test),
        "agreement": (None if teacher_answers is None
                      else np.mean(guess == teacher_answers.argmax(-1))),
    }
    return {key: value if value is None else round(float(value), 4)
            for key, value in figures.items()}


def _test_answers(teacher, dataset):
    if teacher is None:
        return None
    return _kept_logits(teacher, _logits_folder(teacher, dataset) / "test.npy",
                        lambda: dataset.x_test)


def expected_calibration_error(probabilities, labels, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal bins of confidence.

    Args: probabilities (N, classes), labels (N,). Source: Guo et al. 2017, section 2.
    """
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == labels
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(which, right - confidence, bins)
    return float(np.abs(gaps).sum() / len(labels))


def _write_whole(path: Path, write) -> None:
    """Write a file aside, flush it, rename it: a kill or a full disk leaves the old one."""
    aside = path.with_name(f"aside-{os.getpid()}-{path.name}")
    try:
        write(aside)
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _json(value) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _digest(*parts) -> str:
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).data)
        else:
            digest.update(str(part).encode())
    return digest.hexdigest()


def _model_digest(model) -> str:
    return _digest(_architecture_digest(model), *model.get_weights())


def _architecture_digest(model) -> str:
    """Layers, settings and wiring, without the names that Keras counts up."""
    try:
        config = json.loads(_json(model.get_config()))
    except NotImplementedError:  # a subclassed model: what can be seen of it
        return _digest(type(model).__qualname__, *(w.shape for w in model.weights))
    text = _json(config)
    for k, name in enumerate(dict.fromkeys(_names(config))):
        text = text.replace(f'"{name}"', f'"layer {k}"')
    return _digest(text)


def _names(config):
    """The names of layers in a configuration, nested ones too; a dtype has a name alone."""
    if isinstance(config, dict):
        if isinstance(config.get("name"), str) and len(config) > 1:
            yield config["name"]
        config = list(config.values())
    for value in config if isinstance(config, list) else ():
        yield from _names(value)


def _versions() -> str:
    return (f"kdlib {__version__}, tensorflow {tf.__version__}, keras {keras.__version__}, "
            f"numpy {np.__version__}")


def _machine() -> str:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((s.split(": ")[1] for s in lines if s.startswith("model name")), cpu)
    return f"{os.cpu_count()} cores, {cpu}"


# --- plots ----------------------------------------------------------------------------

# One colour a role, everywhere (Okabe and Ito's, safe for colour-blind readers), and a
# second cue for readers of a grey print.
COLOURS = {
    "hard labels": "#000000", "teacher": "#0072B2", "distilled": "#D55E00", "scratch": "#009E73"
}
DASHES = {"hard labels": ":", "teacher": "-.", "distilled": "-", "scratch": "--"}
MARKERS = {"hard labels": "x", "teacher": "s", "distilled": "o", "scratch": "^"}
HATCHES = {"hard labels": "", "teacher": "//", "distilled": "", "scratch": ".."}


def temperature_colours(count: int) -> list:
    """One sequential ramp for temperatures, cold to hot, dark enough at its light end."""
    return list(sns.color_palette("flare", count))


def plot_images(images, titles=None, *, columns: int = 10, title: str = ""):
    """A grid of images (N, H, W, 3) with a line above each; returns the figure."""
    rows = -(-len(images) // columns)
    fig, axes = plt.subplots(
        rows, columns, figsize=(10, 10 / columns * rows * 1.25), squeeze=False,
        layout="constrained",
    )
    for ax in axes.flat:
        ax.axis("off")
    for k, (ax, image) in enumerate(zip(axes.flat, images, strict=False)):
        ax.imshow(image, interpolation="nearest")
        if titles is not None:
            ax.set_title(titles[k], fontsize=9)
    fig.suptitle(title)
    return fig


def plot_curves(curves: dict[str, list[float]], *, title: str, ylabel: str, role=None, ax=None):
    """Curves over epochs, each labelled at its end; a name that is a role has its colour.

    Other names have the colour of ``role``, and "training" is dashed.
    """
    ax = ax or plt.subplots(figsize=(7, 4), layout="constrained")[1]
    highest = max(values[-1] for values in curves.values())
    for name, values in curves.items():
        epochs = np.arange(1, len(values) + 1)
        (line,) = ax.plot(
            epochs, values, DASHES.get(name, "--" if name == "training" else "-"), label=name,
            color=COLOURS.get(name, COLOURS.get(role, "0.5")), marker=MARKERS.get(name),
            markersize=4,
        )
        ax.annotate(f" {name}", (epochs[-1], values[-1]), color=line.get_color(),
                    va="bottom" if values[-1] == highest else "top", annotation_clip=False)
    ax.set(title=title, xlabel="epoch", ylabel=ylabel)
    ax.margins(x=0.02)
    ax.xaxis.get_major_locator().set_params(integer=True)
    sns.despine(ax=ax)
    return ax.figure


def plot_matrix(matrix, class_names, *, title: str, xlabel: str, ylabel: str, fmt="d",
                cmap="Blues", **settings):
    """A classes-by-classes heat map with its numbers; returns the figure."""
    fig, ax = plt.subplots(figsize=(7, 6), layout="constrained")
    sns.heatmap(matrix, annot=True, fmt=fmt, cmap=cmap, xticklabels=class_names,
                yticklabels=class_names, annot_kws={"size": 8}, ax=ax, **settings)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    ax.tick_params(axis="x", rotation=45)
    return fig


def plot_soft_labels(image, logits, label: int, class_names, temperatures, *, axes, names=True):
    """A row: the image, its hard label, and its soft labels at each temperature."""
    classes = np.arange(len(class_names))
    axes[0].imshow(image, interpolation="nearest")
    axes[0].set_axis_off()
    axes[0].set_title(class_names[label], fontsize=10)
    axes[1].bar(classes, classes == label, color=COLOURS["hard labels"])
    axes[1].set_title("hard label", fontsize=10)
    colours = temperature_colours(len(temperatures))
    for ax, temperature, colour in zip(axes[2:], temperatures, colours, strict=True):
        ax.bar(classes, soften(logits, temperature), color=colour)
        ax.set_title(f"T = {temperature:g}", fontsize=10)
    for ax in axes[1:]:
        ax.set(ylim=(0, 1), xticks=classes)
        ax.set_xticklabels(class_names if names else [], rotation=90, fontsize=7)
        ax.tick_params(axis="y", labelsize=7)
        sns.despine(ax=ax)
