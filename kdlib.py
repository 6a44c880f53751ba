"""Knowledge distillation with Keras 3: data, models, losses and Distiller, in one sitting."""

import hashlib
import inspect
import io
import os
import pickle
import tarfile
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial, partialmethod, wraps
from pathlib import Path

import keras
import numpy as np
import sklearn.datasets
from keras import callbacks, layers, ops, tree
from scipy import ndimage
from sklearn.model_selection import train_test_split


def require(condition, sentence: str, error: type[Exception] = ValueError) -> None:
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
    Images are uint8 (N, height, width, channels) in 0 to 255, labels integers (N,), -1 where a
    training label is unknown. Choose on ``val``, report on ``test``. Raises ValueError."""

    name: str
    class_names: list[str]
    x_train: np.ndarray = field(repr=False)
    y_train: np.ndarray = field(repr=False)
    x_val: np.ndarray = field(repr=False)
    y_val: np.ndarray = field(repr=False)
    x_test: np.ndarray = field(repr=False)
    y_test: np.ndarray = field(repr=False)

    def __post_init__(self):
        for part, low in (("train", -1), ("val", 0), ("test", 0)):
            x, y, n = getattr(self, f"x_{part}"), getattr(self, f"y_{part}"), len(self.class_names)
            a, b = (f"{getattr(z, 'dtype', type(z))} {getattr(z, 'shape', '')}" for z in (x, y))
            raw = isinstance(x, np.ndarray) and x.dtype == np.uint8 and x.ndim == 4 and len(x)
            require(raw and x.shape[1:] == self.x_train.shape[1:], f"x_{part} is {a}. Give "
                    "raw pixels of one size: uint8 (images, height, width, channels).")
            fits = isinstance(y, np.ndarray) and y.shape == (len(x),) and y.dtype.kind in "iu"
            require(fits and low <= y.min() and y.max() < n, f"y_{part} is {b}. Give {len(x)} "
                    f"class numbers, integers from {low} to {n - 1}.")


def load_dataset(name: str | None = None) -> Dataset:
    """Load "cifar10" or "digits"; None: what ``$KD_DATASET`` says, else CIFAR-10 if available.
    CIFAR-10 is read from the folder ``$KD_DATA_DIR`` (default ``data``): cifar10.npz, or the
    official archive, packed or not; where nothing is set or there, Keras downloads it. Raises
    ValueError for a wrong name or other data, FileNotFoundError where data are missing."""
    name = name or os.environ.get("KD_DATASET") or None
    require(name in (None, "cifar10", "digits"),
            f"name (or KD_DATASET) is {name!r}. Choose 'cifar10' or 'digits', or leave it out.")
    try:
        return _digits() if name == "digits" else _cifar10()
    except ConnectionError as reason:
        require(name is None, str(reason), FileNotFoundError)
        print("NOTICE: this notebook uses the DIGITS dataset. You can keep going. Reason:", reason)
        return _digits()


def _cifar10() -> Dataset:
    setting = os.environ.get("KD_DATA_DIR")
    folder = Path(__file__).resolve().parent / Path(setting or "data").expanduser()
    path = next((folder / name for name in CIFAR10_FILES if (folder / name).exists()), None)
    require(path or not setting, f"KD_DATA_DIR is {setting!r}, but the folder {folder} has none of "
            f"{', '.join(CIFAR10_FILES)}. Correct it, or set KD_DATASET=digits.", FileNotFoundError)
    try:
        parts = None if path else keras.datasets.cifar10.load_data()
    except Exception as error:  # whatever a network can do to a download
        raise ConnectionError(f"CIFAR-10 was not found, and its download failed ({error!r}). Set "
            "KD_DATA_DIR to its folder, go online, or stay offline: KD_DATASET=digits.") from None
    try:
        (x, y), test = parts = [_by_content(*part) for part in parts or _read(path)]
        found = tuple(hashlib.sha256(x.tobytes() + y.tobytes()).hexdigest() for x, y in parts)
        require(found == CIFAR10_SHA256, "these are not the official images and labels")
    except Exception as error:  # whatever a damaged file can do to its reader
        raise ValueError(f"{path or 'The download'} is damaged, or not CIFAR-10: {error}. Fetch "
                         "it again, or set KD_DATASET=digits.") from None
    train, val = train_test_split(np.arange(len(y)), test_size=0.1, stratify=y, random_state=0)
    return Dataset("cifar10", CIFAR10_CLASSES, x[train], y[train], x[val], y[val], *test)


def _read(path: Path):
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return [(file[f"x_{part}"], file[f"y_{part}"]) for part in ("train", "test")]
    names = "data_batch_1 data_batch_2 data_batch_3 data_batch_4 data_batch_5 test_batch".split()
    with nullcontext() if path.is_dir() else tarfile.open(path) as archive:
        files = [archive.extractfile(f"cifar-10-batches-py/{name}").read() if archive else
                 (path / name).read_bytes() for name in names]
    batches = [_OnlyArrays(io.BytesIO(file), encoding="bytes").load() for file in files]
    x = [batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) for batch in batches]
    y = [np.array(batch[b"labels"]) for batch in batches]
    return [(np.concatenate(x[:5]), np.concatenate(y[:5])), (x[5], y[5])]


class _OnlyArrays(pickle.Unpickler):
    def find_class(self, module, name):
        """Make NumPy arrays, and run no other code, whatever a file asks for."""
        known = {"numpy": ("_reconstruct", "ndarray", "dtype"), "_codecs": ("encode",)}
        require(name in known.get(module.split(".")[0], ()), f"it asks for {module}.{name}")
        return super().find_class(module, name)


def _by_content(x, y):
    """Copies differ in order. Sorted, all split alike: no teacher saw *your* validation images."""
    order = np.argsort([hashlib.sha1(image.tobytes()).digest() for image in x], kind="stable")
    return x[order], y.reshape(-1)[order].astype("int32")


def _digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits, made hard: small, tilted, on noise."""
    digits = sklearn.datasets.load_digits()
    ink, y = digits.images / 16, digits.target.astype("int32")
    rest, test = train_test_split(np.arange(len(y)), test_size=447, stratify=y, random_state=0)
    train, val = train_test_split(rest, test_size=150, stratify=y[rest], random_state=0)

    def scene(k, n):
        rng = np.random.default_rng([2015, k, n])
        angle, size = rng.uniform(-0.5, 0.5), rng.uniform(1.8, 3.0)
        centre = 15.5 + rng.uniform(-1, 1, 2) * (15.5 - 4 * size)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / size
        drawn = ndimage.affine_transform(ink[k], turn, 3.5 - turn @ centre, (32, 32), order=1)
        paper = rng.uniform(60, 195, 3)
        pen = paper + rng.choice([-1, 1]) * rng.uniform(50, 100, 3)  # darker or lighter
        blotches = ndimage.gaussian_filter(rng.normal(0, 1, (32, 32, 3)), (2, 2, 0))
        noise = 85 * blotches + rng.normal(0, 12, (32, 32, 3))
        return np.clip(np.rint(paper + drawn[..., None] * (pen - paper) + noise), 0, 255)

    parts = []
    for chosen, times in ((train, 2), (val, 1), (test, 1)):
        images = [scene(k, n) for n in range(times) for k in chosen]
        parts += [np.array(images, "uint8"), np.tile(y[chosen], times)]
    return Dataset("digits", list("0123456789"), *parts)


def view_codes(*, images: int, views: int, shift: int, flip: bool) -> np.ndarray:
    """The shift and mirror of each view: int8 (views, images, 3) of (dy, dx, mirrored).
    View v of image i is always the same, so a teacher's answer to it can be stored. Shifts are
    in [-shift, shift] pixels. Flips alternate: one of two views in a row is mirrored."""
    codes = np.zeros((views, images, 3), "int8")
    first = np.random.default_rng(1503).integers(0, 2, images)
    for v in range(views):
        codes[v, :, :2] = np.random.default_rng([2531, v]).integers(-shift, shift + 1, (images, 2))
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
    3x3 convolutions in stages, pooling between them (Simonyan and Zisserman 2015, section 2)."""
    stages = ((24, 64), (64, 128), (128, 128), (128,))
    return _vgg(stages, num_classes=num_classes, name="teacher", kernel=2, dropout=0.2)


def build_student(num_classes: int = 10) -> keras.Model:
    """A sixth of the teacher's size; no Dropout."""
    return _vgg(((24,), (40, 40), (72, 56)), num_classes=num_classes, name="student")


def _vgg(stages, *, num_classes: int, name: str, kernel: int = 3, dropout: float = 0.0):
    pixels = keras.Input((32, 32, 3), name="pixels")
    # Inside the model, so that nobody can feed it differently normalised images.
    variance = [std**2 for std in PIXEL_STD]
    x = layers.Normalization(mean=PIXEL_MEAN, variance=variance, name="normalization")(pixels)
    for stage, widths in enumerate(stages, start=1):
        for k, width in enumerate(widths, start=1):
            tag = f"{stage}_{k}"
            x = layers.Conv2D(width, kernel, padding="same", use_bias=False, name=f"conv{tag}")(x)
            if k == len(widths) and stage < len(stages):
                # Pooling before BatchNorm: the same maximum, a quarter of the work after it.
                x = layers.MaxPooling2D(name=f"pool{stage}")(x)
            x = layers.BatchNormalization(momentum=0.9, name=f"norm{tag}")(x)
            x = layers.ReLU(name=f"relu{tag}")(x)
            kernel = 3  # of every layer but the first
    x = layers.GlobalMaxPooling2D(name=f"pool{len(stages)}")(x)
    x = layers.Dropout(dropout, name="dropout")(x) if dropout else x
    return keras.Model(pixels, layers.Dense(num_classes, name="logits")(x), name=name)


# --- losses ---------------------------------------------------------------------------
def soften(logits, temperature: float):
    """Soft labels, ``softmax(logits / T)``: probabilities of the same shape (..., classes).
    Raises TypeError, ValueError for a bad T. Source: Hinton et al. 2015, section 2, equation 1.

    >>> round(float(soften([[2.0, 0.0]], temperature=2)[0, 0]), 3)
    0.731
    """
    return ops.softmax(_as_float("logits", logits) / _number("temperature", temperature), axis=-1)


def distillation_loss(*, teacher_logits, student_logits, temperature: float):
    """``T^2 * KL(p || q)``, batch mean, of the softened teacher p and student q: a scalar >= 0.
    ``KL(p || q) = sum(p * log(p / q))`` over the classes, in nats. T^2 is included: the
    gradient of KL shrinks as 1 / T^2, and the factor keeps its size when T changes.
    Logits are (batch, classes), before the softmax; a teacher's may be -inf: probability 0.
    Raises TypeError, ValueError for a bad T or shapes. Source: Hinton et al. 2015, section 2.

    >>> logits = [[2.0, 1.0, 0.1]]
    >>> float(distillation_loss(teacher_logits=logits, student_logits=logits, temperature=4))
    0.0
    """
    temperature = _number("temperature", temperature)
    student = _as_float("student_logits", student_logits)
    teacher = ops.cast(_as_float("teacher_logits", teacher_logits), student.dtype)
    taught, learned = tuple(teacher.shape), tuple(student.shape)
    require(len(taught) > 1 and 0 not in taught and _agree(taught, learned), f"teacher_logits have "
            f"shape {taught}, student_logits {learned}. Both need the same (batch, classes).")
    # Where both exclude a class, the student's -inf would make the gradient nan.
    student = ops.maximum(student, ops.where(teacher == -np.inf, -1e38, -np.inf))
    # What all classes of a row share does not matter, but it takes digits from what they differ by.
    z, w = (x - ops.stop_gradient(ops.where(ops.max(ops.abs(x), -1, True) > 64,
                                            ops.max(x, -1, True), 0.0)) for x in (teacher, student))
    gap = ops.where(ops.max(ops.abs(teacher - student), -1, True) > 64, z - w, teacher - student)
    z, w = z / temperature, w / temperature  # only now: gap is of the logits, before T
    p, q = ops.softmax(z, axis=-1), ops.softmax(w, axis=-1)
    # d = log(p / q). A small difference of quotients or logarithms is mostly their rounding.
    s = (gap - ops.stop_gradient(ops.max(gap, axis=-1, keepdims=True))) / temperature
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
    advice = {"temperature": "It divides the logits: from 0.001 to a million, typically 2 to 8.",
              "alpha": "It is the weight of the hard labels, from 0 to 1."}[name]
    real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    fits = real and (1e-3 <= value <= 1e6 if name == "temperature" else 0 <= value <= 1)
    require(fits, f"{name} is {value!r}. {advice}", ValueError if real else TypeError)
    return float(value)


# --- what is refused ------------------------------------------------------------------
def _inputs(model) -> list[tuple]:
    return [tuple(tensor.shape[1:]) for tensor in getattr(model, "inputs", None) or ()]


def _are_probabilities(rows):
    return ops.all(rows >= 0) & ops.all(ops.abs(ops.sum(rows, axis=-1) - 1) < 1e-2)


def check_model(role: str, model) -> int | None:
    """The number of logits that a model gives, asked about two black images."""
    require(isinstance(model, keras.Model) and model.built, f"{role} is a {type(model).__name__}. "
            "Give a built Keras model: call it once on images, of a Run take .model.", TypeError)
    asked = (model.get_build_config() or {}).get("input_shape") or getattr(model, "input", None)
    if asked is None:
        return None  # its first batch will tell
    black = tree.map_shape_structure(
        lambda each: np.zeros([n or 32 for n in (2, *getattr(each, "shape", each)[1:])]), asked)
    shape = tuple(getattr(answers := model(black, training=False), "shape", ()))
    require(len(shape) == 2 and shape[-1] >= 2, f"{role} gives {shape or 'several outputs'}, not "
            "logits (batch, classes) alone: keras.Model(model.inputs, model.outputs[0]).")
    last = (getattr(model, "operations", model.layers) or [None])[-1]
    last = getattr(last, "activation", None) or type(last)  # an operation in place of a layer
    require(getattr(last, "__name__", "").lower() != "sigmoid" and not _are_probabilities(
        ops.cast(answers, "float32")), f"{role} gives probabilities, not logits. Build it without "
        "a softmax at its end: new.set_weights(model.get_weights()).")
    return shape[-1]


def _scales(model) -> list:  # also of models inside
    return [each for layer in getattr(model, "layers", ()) for each in (
        [layer] if isinstance(layer, (layers.Normalization, layers.Rescaling)) else _scales(layer))]


def check_images(role: str, model, images):
    """The images, with 0 for what is not finite, and whether they are raw: finite, and of the scale
    that the model's first layer expects. Raises ValueError for another size, or an unknown one."""
    expected, shape = _inputs(model), tuple(getattr(images, "shape", None) or ())
    fits = len(expected) != 1 or not shape or _agree([n or 0 for n in shape[1:]], expected[0])
    require(fits, f"images have shape {shape}, but the {role} takes {expected}: "
            "keras.ops.image.resize, set_shape where the size is right, or data.batch(size).")
    wide = [ops.cast(x, "float32") for x in tree.flatten(images)
            if not any(kind in str(x.dtype) for kind in ("uint8", "str"))  # of files; words
            and 0 not in (x.shape or ())] or [ops.zeros(1)]
    x, first = wide[0], (_scales(model) or [None])[0]
    large = len(tree.flatten(images)) == 1 and len(x.shape or ()) == 4 and (
        np.max(first.scale) < 0.1 if isinstance(first, layers.Rescaling) else
        first is not None and np.max(ops.convert_to_numpy(first.mean)) > 1)  # not in the graph
    fits = (ops.min(x) >= 0) & ((ops.max(x) > 1) | (ops.min(x) == ops.max(x))) if large else True
    raw = ops.all(ops.stack([ops.all(ops.isfinite(x)) for x in wide])) & fits  # max may skip nan
    return tree.map_structure(lambda x: ops.nan_to_num(x, 0.0, 0.0, 0.0), images), raw


def _guarded(name: str):
    method = getattr(keras.Model, name)
    @wraps(method)
    def guarded(self, *args, **more):
        call = inspect.signature(method).bind(self, *args, **more)
        takes, own = call.signature.parameters, call.arguments.get("callbacks")  # by fit: as a list
        own = tree.flatten(own.callbacks if isinstance(own, callbacks.CallbackList) else own or [])
        if not any(getattr(each, "on_train_batch_end", 0) is _look for each in own):
            look = callbacks.LambdaCallback(on_train_batch_end=_look, on_test_batch_end=partial(
                _look, part="validation " * (name == "fit")), on_predict_batch_end=_look)
            call.arguments["callbacks"] = [look, *own]  # unheeded where the method takes none
        try:
            found = method(*call.args, **call.kwargs)
        finally:  # JAX keeps the weights while it computes, and would not bring them back
            getattr(self, "jax_state_sync", bool)()
            self._jax_state = None  # old by the next call
        if "callbacks" not in takes:  # train_on_batch, test_on_batch, predict_on_batch
            _look(0, self.get_metrics_result() if "y" in takes else {"outputs": found})
        return found
    return guarded


def _look(batch, logs, part=""):
    hard, soft = (float(logs.get(f"{key}_loss", 0)) for key in ("student", "distillation"))
    raw = np.isfinite(ops.convert_to_numpy(logs.get("outputs", 0))).any(-1).all()
    require(hard != -np.inf and raw, f"images in {part}batch {batch} are not raw pixels from 0 to "
            "255." + " Or the student's weights are nan." * (not raw))  # predict sees logits alone
    require(np.isfinite(hard) or np.isfinite(soft), f"loss in {part}batch {batch} is not finite: "
            "the training has diverged. Lower the learning rate.", FloatingPointError)
    require(np.isfinite(hard), f"labels in {part}batch {batch} are neither class numbers nor -1, "
            "unknown (look at np.unique(labels)), or a sample_weight is not finite.")
    require(np.isfinite(soft), f"teacher_logits in {part}batch {batch} hold nan, infinity, or "
            "probabilities (store logits, or np.log), or the teacher's images are not raw pixels.")


# --- distiller ------------------------------------------------------------------------
class Distiller(keras.Model):
    """Train a student on hard labels and on a teacher's soft labels (Hinton et al. 2015).
    ``loss = alpha * student_loss + (1 - alpha) * distillation_loss`` (+ regularisers).
    compile, fit, evaluate and predict take what Keras's take: ``fit(images, labels)`` asks the
    teacher live, ``fit((images, teacher_logits), labels)`` uses stored answers. Where a label is
    -1 (unknown) or a ``sample_weight`` 0, only the distillation_loss counts. The teacher runs with
    ``training=False``, without gradient. What is counted, saved and exported is the student.

    student, teacher: built models, same inputs, logits (batch, classes) out (teacher=None: stored
    answers); temperature 1e-3 to 1e6; alpha 0 to 1; soft_loss(teacher_logits=, student_logits=,
    temperature=). Raises TypeError, ValueError. JAX sees a changed teacher from the next epoch."""

    def __init__(self, *, student, teacher, temperature: float, alpha: float = 0.1,
                 soft_loss=distillation_loss):
        classes, seen = check_model("student", student), _inputs(student)
        if teacher is not None:
            taught, asks = check_model("teacher", teacher), _inputs(teacher)
            same = not (asks and seen) or len(asks) == len(seen) and all(map(_agree, asks, seen))
            require(same and _agree([taught], [classes]), f"teacher takes {asks}, gives {taught} "
                    f"logits, student {seen}, {classes}. They must agree (sizes: layers.Resizing).")
            require(not {id(w) for w in student.weights} & {id(w) for w in teacher.weights},
                    "student and teacher share weights. Copy one: clone_model, set_weights.")
            if student.count_params() > teacher.count_params():
                warnings.warn("student is larger than teacher. Are they swapped?", stacklevel=2)
        super().__init__(name="distiller", dtype=student.dtype_policy)  # float16: scale the loss
        self._soft_loss, self._temperature = soft_loss, _number("temperature", temperature)
        self.student, self._alpha, self.built = student, _number("alpha", alpha), True
        self._losses_seen = [keras.metrics.Mean(n) for n in ("student_loss", "distillation_loss")]
        self.save, self.export, self.summary = student.save, student.export, student.summary

        def ask(x):  # in a closure Keras does not find the teacher: it is not trained or saved
            require(teacher is not None, "teacher is None: fit((images, teacher_logits), labels).")
            images, raw = check_images("teacher", teacher, x)
            return ops.stop_gradient(ops.where(raw, teacher(images, training=False), np.nan))

        self._ask_teacher, ask.weights = ask, lambda: getattr(teacher, "weights", ())

    optimizer, _asked = None, None  # until compile, and until the first batch
    temperature = property(lambda self: self._temperature)  # built into the graph: read only
    alpha = property(lambda self: self._alpha)

    def _lend(self, verb, *args, **more):  # a checkpoint goes on, and fits the student alone
        own, self.student.optimizer = getattr(self.student, "optimizer", None), self.optimizer
        try:
            getattr(self.student, f"{verb}_weights")(*args, **more)
        finally:
            self.student.optimizer = own

    def _get_jax_state(self, purge_model_variables=False, **parts):
        was, self._asked = self._asked, [np.array(w).tobytes() for w in self._ask_teacher.weights()]
        if was not in (None, self._asked):  # the weights that are compiled into the steps
            self.train_step, self.test_step = partial(self.train_step), partial(self.test_step)
            self.make_train_function(force=True)  # of a function that JAX has not seen
            self.make_test_function(force=True)
            self.train_step, self.test_step = self.train_step.func, self.test_step.func
        return super()._get_jax_state(**parts)  # not purged: a refused graph would lose them

    save_weights, load_weights = partialmethod(_lend, "save"), partialmethod(_lend, "load")

    def compile(self, optimizer="rmsprop", loss=None, loss_weights=None, metrics=None,
                weighted_metrics=None, **more):
        """As Keras's. The student_loss is cross-entropy; without metrics it shows the accuracy."""
        require(loss is loss_weights is None, f"loss is {loss!r}. Leave it out: it is "
                "SparseCategoricalCrossentropy(from_logits=True), and alpha is its weight.")
        weighted_metrics = ["accuracy"] if metrics is weighted_metrics is None else weighted_metrics
        super().compile(optimizer, metrics=metrics, weighted_metrics=weighted_metrics, **more)

    fit, evaluate, predict, train_on_batch, test_on_batch, predict_on_batch = map(
        _guarded, "fit evaluate predict train_on_batch test_on_batch predict_on_batch".split())

    def call(self, inputs, training=None):
        images, raw = check_images("student", self.student, self._split(inputs)[0])
        logits = self.student(images, training=training)
        return logits if training else ops.where(raw, logits, np.nan)

    def _split(self, x):
        """The student's inputs and the teacher's stored logits, or None to ask it live."""
        stored = isinstance(x, (tuple, list)) and (
            len(tree.flatten(x)) == 1 + (len(_inputs(self.student)) or 1))
        return (x[0] if len(x) == 2 else x[:-1], x[-1]) if stored else (x, None)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        # What is wrong makes a metric nan or -inf, the loss 0. Momentum and BatchNorm still see it.
        images, stored = self._split(x)
        logits = _as_float("logits", y_pred)
        given = self._ask_teacher(images) if stored is None else stored
        answers = ops.cast(_as_float("teacher_logits", given), logits.dtype)
        sound = ops.all(answers < np.inf) & ops.all(ops.max(answers, axis=-1) > -np.inf) & (
            ~_are_probabilities(answers) | (ops.shape(answers)[0] < 8))  # a few look so by chance
        soft = self._soft_loss(teacher_logits=ops.where(sound, answers, 0.0),
                               student_logits=logits, temperature=self.temperature)
        y, weight, _, valid = self._labels(y, y_pred, sample_weight)
        hard = ops.mean(weight * keras.losses.sparse_categorical_crossentropy(y, logits, True))
        _, raw = check_images("student", self.student, images)
        for metric, loss, good in zip(self._losses_seen, (hard, soft), (valid, sound), strict=True):
            loss = ops.where(good, ops.where(raw, loss, -np.inf), np.nan)
            metric.update_state(loss, ops.shape(y_pred)[0])  # the last batch may be smaller
        loss = self.alpha * hard + (1 - self.alpha) * soft + sum(map(ops.sum, self.losses))
        # Divided by the number of replicas, as gradients are summed.
        return self._aggregate_additional_loss(ops.where(raw & sound & valid, loss, 0.0))

    def _labels(self, y, logits, weight):
        """Class numbers, their weights, which are known, and whether all were valid or -1."""
        y = ops.full(ops.shape(logits)[:1], -1) if y is None and self.alpha == 0 else y
        shape, classes = tuple(getattr(y, "shape", ())), logits.shape[-1]
        require(len(shape) == 1 or shape[1:] == (1,), f"labels are {shape or type(y).__name__}. "
                "Give class numbers: fit(images, labels). Of one-hot rows take np.argmax.")
        y = ops.cast(ops.reshape(y, (-1,)), "float32")  # exact up to 16 million classes
        known = (y == ops.floor(y)) & (y >= 0) & (y < classes)
        weight = ops.cast(1 if weight is None else ops.reshape(weight, (-1,)), "float32")
        valid = (known | (y == -1)) & ops.isfinite(weight)
        weight = ops.where(known & valid, weight, 0.0)
        return ops.cast(ops.where(known, y, 0.0), "int32"), weight, known, ops.all(valid)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        y, weight, known, _ = self._labels(y, y_pred, sample_weight)
        return super().compute_metrics(x, ops.where(known, y, -1), y_pred, weight)
