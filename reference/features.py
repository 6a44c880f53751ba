"""Train a student with the losses of methods.py, on features and on logits.

The extra layers that a method needs (regressors, embeddings, memories) are trained with the
student and thrown away with the distiller. What is saved is the student.
"""

import functools
import math
import numbers
from collections.abc import Callable
from dataclasses import asdict, dataclass

import kdlib
import keras
import numpy as np
from kdlib import require
from keras import layers, ops

try:
    from reference import methods
except ImportError:  # beside this file, on a backend without TensorFlow
    import methods

# --- a loss and the layers that it needs while it trains -------------------------------


class FeatureLoss(layers.Layer):
    """A loss on features, and the layers that it trains and throws away: here none.

    loss(*, teacher, student) compares the features of one layer each, and losses are added. With
    together=True it takes the lists of all layers, and gives a list. A loss is one number for a
    batch. maps: features must have spatial axes. For a loss of your own write compute, and in
    prepare make its layers. One that needs the numbers of the images sets self.images there: how
    many the training set has.
    """

    alone = False  # whether it compares one pair of features and no more
    sized = False  # whether its layers have to know how large features are
    images = None

    def __init__(self, loss, *, maps: bool = False, together: bool = False):
        super().__init__()
        self.loss, self.maps, self.together, self.built = loss, maps, together, True

    def check(self, **shapes) -> None:
        """Whether it can compare features of these shapes: lists of the teacher and the student."""
        for role, each in shapes.items():
            require(len(each) == 1 or not self.alone, f"{role}_layers give {len(each)} features. "
                    "This loss compares one of the teacher with one of the student.")
            kind = "maps (batch, height, width, channels)" if self.maps else "features"
            for shape in each:
                known = None not in shape[1:] or not (self.maps or self.sized)
                require(known and (len(shape) == 4 or not self.maps),
                        f"{role}_layers give {shape}. This loss needs {kind} of known size.")

    def prepare(self, *, teacher, student, labels=None) -> None:
        """Make the extra layers for features of these shapes; labels: of all training images."""

    def compute(self, *, teacher, student, labels, numbers):
        """The loss of a batch: lists of features, class numbers, image numbers (or None)."""
        if self.together:
            return sum(self.loss(teacher=teacher, student=student))
        return sum(self.loss(teacher=t, student=s) for t, s in zip(teacher, student, strict=True))


class LabelledLoss(FeatureLoss):
    """A loss on logits that also takes the labels."""

    alone = True

    def compute(self, *, teacher, student, labels, numbers):
        return self.loss(teacher=teacher[0], student=student[0], labels=labels)


class Regressed(FeatureLoss):
    """The student's maps get the teacher's channels by a 1x1 convolution and BatchNorm.

    relu: as the hints have it; maps from before a ReLU do without. Of two sizes the loss pools the
    larger map, where RepDistiller's regressor strides.
    """

    def __init__(self, loss, *, relu: bool = False, together: bool = False):
        super().__init__(loss, maps=True, together=together)
        self.relu = relu

    def prepare(self, *, teacher, student, labels=None):
        self.regressors = [keras.Sequential([
            layers.Input(s[1:]), layers.Conv2D(t[-1], 1, use_bias=False),
            layers.BatchNormalization(), *([layers.ReLU()] if self.relu else [])])
            for t, s in zip(teacher, student, strict=True)]

    def compute(self, *, teacher, student, **more):
        student = [regress(s, training=True)
                   for regress, s in zip(self.regressors, student, strict=True)]
        return super().compute(teacher=teacher, student=student, **more)


class Embedded(FeatureLoss):
    """Features of both are flattened and pass a linear layer of 128, each its own."""

    width, sized = 128, True

    def prepare(self, *, teacher, student, labels=None):
        self.embeddings = [[keras.Sequential([
            layers.Input(shape[1:]), layers.Flatten(), layers.Dense(self.width)])
            for shape in shapes] for shapes in (teacher, student)]

    def compute(self, *, teacher, student, **more):
        teacher, student = (
            [embed(x) for embed, x in zip(*two, strict=True)]
            for two in zip(self.embeddings, (teacher, student), strict=True))
        return super().compute(teacher=teacher, student=student, **more)


class Information(FeatureLoss):
    """VID's three 1x1 convolutions from student to teacher, and its variances (5 at first)."""

    def __init__(self):
        super().__init__(methods.vid, maps=True)

    def prepare(self, *, teacher, student, labels=None):
        self.kernels, self.scales = [], []
        for t, s in zip(teacher, student, strict=True):
            self.kernels.append([self.add_weight(shape=(1, 1, width, t[-1]), name="kernel")
                                 for width in (s[-1], t[-1], t[-1])])
            start = keras.initializers.Constant(math.log(math.exp(5 - 1e-5) - 1))
            # Called a bias, so that weight decay leaves it alone.
            self.scales.append(self.add_weight(shape=(t[-1],), initializer=start, name="bias"))

    def compute(self, *, teacher, student, labels, numbers):
        parts = zip(teacher, student, self.kernels, self.scales, strict=True)
        return sum(methods.vid(teacher=t, student=s, kernels=[ops.convert_to_tensor(k) for k in ks],
                               log_scale=ops.convert_to_tensor(scale)) for t, s, ks, scale in parts)


class Factors(FeatureLoss):
    """Factor transfer: a paraphraser that restores the teacher's map, a translator for the student.

    The original trains the paraphraser first, on its own. Here it learns beside the student, from
    its own reconstruction alone.
    """

    alone = True

    def __init__(self):
        super().__init__(methods.ft, maps=True)

    def prepare(self, *, teacher, student, labels=None):
        (t,), (s,) = teacher, student
        half = max(t[-1] // 2, 1)
        self.paraphraser = _convolutions(t[1:], (t[-1], half, half))
        self.restorer = _convolutions((*t[1:3], half), (half, t[-1], t[-1]))
        self.translator = _convolutions(s[1:], (s[-1], half, half), norm=True)

    def compute(self, *, teacher, student, labels, numbers):
        factor = self.paraphraser(teacher[0])
        lost = methods.fitnet(teacher=teacher[0], student=self.restorer(factor))
        translated = self.translator(student[0], training=True)
        return lost + methods.ft(teacher=ops.stop_gradient(factor), student=translated)


def _convolutions(shape, widths, *, norm: bool = False):
    parts = [layers.Input(shape)]
    for width in widths:
        parts.append(layers.Conv2D(width, 3, padding="same"))
        parts += [layers.BatchNormalization()] if norm else []
        parts.append(layers.LeakyReLU(0.1))
    return keras.Sequential(parts)


class Contrast(Embedded):
    """CRD: embeddings, a memory of every training image on both sides, images to tell apart.

    They are drawn from the other classes, with replacement, 16,384 for each image, or as many as
    there are images. Needs the labels of the training set, and the number of each image in it
    beside the logits.
    """

    alone = True

    def __init__(self, negatives: int = 16384):
        super().__init__(methods.crd)
        self.negatives = negatives

    def prepare(self, *, teacher, student, labels=None):
        shape = np.shape([] if labels is None else labels)
        labels = np.reshape([] if labels is None else labels, -1)
        require(len(set(labels.tolist())) > 1, "labels are missing, or all the same. This loss "
                "draws images of other classes: pass the labels of the whole training set.")
        require(shape[1:] in ((), (1,)), f"labels have shape {shape}. Give class numbers, one for "
                "each image: of one-hot rows, np.argmax.")
        require((labels >= 0).all(), f"labels hold {min(labels)} (unknown). This loss needs the "
                "class of every image: leave those images out.")
        super().prepare(teacher=teacher, student=student)
        self.images = len(labels)
        self.order = np.argsort(labels, kind="stable").astype("int32")
        values, first, sizes = np.unique(np.asarray(labels)[self.order], return_index=True,
                                         return_counts=True)
        which = np.searchsorted(values, labels)  # where an image's class lies in that order
        self.first, self.size = first[which].astype("int32"), sizes[which].astype("int32")
        edge = 1 / math.sqrt(self.width / 3)
        start = keras.initializers.RandomUniform(-edge, edge)
        self.memories = [self.add_weight(shape=(len(labels), self.width), initializer=start,
                                         trainable=False, name="memory") for _ in range(2)]
        self.normalisers = self.add_weight(shape=(2,), initializer="zeros", trainable=False,
                                           name="normalisers")
        self.random = keras.random.SeedGenerator()

    def compute(self, *, teacher, student, labels, numbers):
        require(numbers is not None, "image numbers are missing. Give them as one more column "
                "behind the stored logits, or alone: fit((images, numbers[:, None]), labels).")
        rows = [methods._unit(each) for each in methods._floats(*(
            embed[0](x[0]) for embed, x in zip(self.embeddings, (teacher, student), strict=True)))]
        known, numbers = ops.all(numbers >= 0), ops.maximum(numbers, 0)
        memories = [ops.copy(memory) for memory in self.memories]  # as before this step
        sampled = self._draw(numbers)
        first = ops.stop_gradient(ops.stack(  # of student and teacher, as the loss wants them
            [ops.mean(methods.crd_scores(rows[k], memories[1 - k], sampled)) for k in (1, 0)]))
        kept = ops.convert_to_tensor(self.normalisers)
        z = ops.where(kept > 0, kept, first * self.images)
        self.normalisers.assign(ops.where(known, z, kept))
        loss = methods.crd(teacher=rows[0], student=rows[1], teacher_memory=memories[0],
                           student_memory=memories[1], sampled=sampled, normalisers=(z[0], z[1]))
        for memory, before, new in zip(self.memories, memories, rows, strict=True):
            now = methods.crd_remember(before, numbers, ops.stop_gradient(new))
            memory.assign(ops.where(known, now, before))
        return loss

    def _draw(self, numbers):
        """Each image's own number, then those of images of other classes."""
        images = len(self.order)
        first, size = (ops.expand_dims(ops.take(x, numbers), 1) for x in (self.first, self.size))
        shape = (ops.shape(numbers)[0], min(self.negatives, images))
        others = ops.cast(images - size, "float32")
        place = ops.cast(keras.random.uniform(shape, seed=self.random) * others, "int32")
        place = ops.minimum(place, images - size - 1)  # rounding
        place = place + ops.where(place >= first, size, 0)
        return ops.concatenate([ops.expand_dims(numbers, 1), ops.take(self.order, place)], axis=1)


# --- the distiller --------------------------------------------------------------------


class FeatureDistiller(kdlib.Distiller):
    """A Distiller with one more loss, on features or on logits.

    ``loss = alpha * student_loss + (1 - alpha) * distillation_loss + weight * feature_loss``.
    The teacher's features are computed live, in one pass, without gradient. Stored logits still
    serve the distillation_loss, and stored features may come with them, one for each of
    teacher_layers: ``fit((images, (logits, feature, ...)), labels)``. feature_loss counts in
    training only, so validation shows the other two, and a sample_weight leaves it alone.
    ``count_params``, ``save`` and ``export`` are the student's; a checkpoint of ``save_weights``
    holds the student and the optimizer, and extra layers begin anew after it.

    student_layers, teacher_layers: names, pair by pair; none: the loss compares the logits.
    feature_loss: a FeatureLoss, or a function(teacher=, student=) of two features. labels: of all
    training images, where the loss draws from them. For such a loss stored logits carry the number
    of each image as one more column, or are replaced by it (in float32: half precision can't tell
    2,049 from 2,048). Raises TypeError, ValueError.
    """

    def __init__(self, *, student, teacher, feature_loss, weight: float, student_layers=(),
                 teacher_layers=(), temperature: float = 4.0, alpha: float = 0.1, labels=None):
        super().__init__(student=student, teacher=teacher, temperature=temperature, alpha=alpha)
        real = isinstance(weight, numbers.Real) and not isinstance(weight, bool)
        require(real and 0 <= weight < math.inf, f"weight is {weight!r}. It multiplies the feature "
                "loss: a finite number from 0 on.")
        require(len(student_layers) == len(teacher_layers), f"student_layers are {student_layers}, "
                f"teacher_layers {teacher_layers}. Name one of the teacher for each.")
        require(teacher is not None or not teacher_layers, "teacher is None, but teacher_layers "
                f"are {teacher_layers}. Features are computed live: pass the teacher.")
        # In closures Keras does not find these models: their layers are not counted twice.
        watched = watch("student", student, student_layers)
        self._classes, self.weight = watched.outputs[0].shape[-1], float(weight)
        self._watch_student = lambda images: keras.tree.flatten(watched(images, training=True))
        asked = watch("teacher", teacher, teacher_layers) if teacher_layers else None

        def watch_teacher(images):
            images, raw = kdlib.check_images("teacher", teacher, images)
            return [raw, *map(ops.stop_gradient, asked(images, training=False))]

        self._watch_teacher, self._stored_parts = asked and watch_teacher, 1 + len(teacher_layers)
        given = isinstance(feature_loss, FeatureLoss)
        self.feature_loss = feature_loss if given else FeatureLoss(feature_loss)
        shapes = {role: [tuple(x.shape) for x in model.outputs[bool(layers_):]] if model else
                  [(None, self._classes)] for role, model, layers_ in (
                      ("teacher", asked, teacher_layers), ("student", watched, student_layers))}
        self.feature_loss.check(**shapes)
        self.feature_loss.prepare(**shapes, labels=labels)
        self._seen = keras.metrics.Mean("feature_loss")

    def count_params(self):
        return self.student.count_params()

    def call(self, inputs, training=None):
        if training is not True:
            return super().call(inputs, training=training)
        images, _ = kdlib.check_images("student", self.student, self._split(inputs)[0])
        return self._watch_student(images)

    def _split(self, x):
        *images, given = x if isinstance(x, (tuple, list)) else (x,)
        several = isinstance(given, (tuple, list)) and len(given) == self._stored_parts
        return (images[0], given) if several and len(images) == 1 else super()._split(x)

    def _stored(self, given):
        """Stored logits (batch, classes) and image numbers, -1 for what is none; or None."""
        if given is None:
            return None, None
        width = given.shape[-1] if len(given.shape) == 2 else None
        images, classes = self.feature_loss.images, self._classes
        require(width == classes or images and width in (1, classes + 1), f"teacher_logits have "
                f"shape {tuple(given.shape)}. Give {classes} logits" + (
                    ", image numbers behind them, or those alone, and always the same. Of a "
                    "pipeline set_shape." if images else " (of a pipeline set_shape)."))
        logits = None if width == 1 else given[:, :classes]
        if width == classes:
            return logits, None
        dtype = keras.backend.standardize_dtype(given.dtype)
        require("float16" not in dtype, f"image numbers are {dtype}, which can't hold them all. "
                "Give float32.")
        column = ops.cast(given[:, -1], "float32")
        known = (column == ops.floor(column)) & (column >= 0) & (column < images)
        return logits, ops.cast(ops.where(known, column, -1.0), "int32")

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        images, given = self._split(x)
        given, *taught = given if isinstance(given, (list, tuple)) else [given]
        answers, image_numbers = self._stored(given)
        taught = [ops.cast(each, "float32") for each in taught]  # stored in half precision
        logits, *learned = y_pred if isinstance(y_pred, (list, tuple)) else [y_pred]
        trains, raw = isinstance(y_pred, (list, tuple)), True
        if trains and self._watch_teacher and not taught:
            raw, live, *taught = self._watch_teacher(images)
            answers = ops.where(raw, live if answers is None else answers, math.nan)
        answers = self._ask_teacher(images) if answers is None else answers
        if trains and image_numbers is not None:  # where they are none, the guard of fit raises
            raw = raw & ops.all(image_numbers >= 0)
            answers = ops.where(raw, answers, math.nan)
        several = images if isinstance(images, (list, tuple)) else [images]
        loss = super().compute_loss((*several, answers), y, logits, sample_weight, training)
        if not trains:
            return loss
        y, _, known, _ = self._labels(y, logits, None)
        labels = ops.where(known, y, ops.cast(ops.argmax(answers, axis=-1), y.dtype))
        extra = self.feature_loss.compute(teacher=taught or [answers], student=learned or [logits],
                                          labels=labels, numbers=image_numbers)
        require(tuple(getattr(extra, "shape", ())) == (), f"feature_loss gives shape "
                f"{tuple(getattr(extra, 'shape', ()))}. It has to be one number for a batch: take "
                "the mean over images.")
        extra = ops.where(raw, extra, 0.0)  # else the answers are nan, and the guard raises
        self._seen.update_state(extra, ops.shape(logits)[0])
        for metric in self._losses_seen:  # not finite: the guard of fit raises
            metric.update_state(ops.where(ops.isfinite(extra), 0.0, math.nan), 0.0)
        return loss + self._aggregate_additional_loss(self.weight * extra)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        trains = isinstance(y_pred, (list, tuple))
        logs = super().compute_metrics(x, y, y_pred[0] if trains else y_pred, sample_weight)
        return {key: value for key, value in logs.items() if trains or key != "feature_loss"}


def watch(role: str, model, names):
    """The model with more outputs: its logits, then those of the named layers, as a list."""
    require(getattr(model, "inputs", None), f"{role} is a {type(model).__name__} without a graph, "
            "so its layers have no outputs to name. Build it as a functional model.")
    known, outputs = [layer.name for layer in model.layers], []
    for name in names:
        require(name in known, f"{role}_layers names {name!r}. The {role} has {', '.join(known)}.")
        graph = getattr(model, "_functional", None) or model
        calls = [node.outputs for level in graph._nodes_by_depth.values() for node in level
                 if node.operation is model.get_layer(name)]
        require(len(calls) == 1 and len(calls[0]) == 1, f"{role}_layers names {name!r}, which "
                f"gives {sum(map(len, calls))} outputs. Choose a layer that is used once.")
        outputs += calls[0]
    inputs = model.inputs if len(model.inputs) > 1 else model.inputs[0]
    watched = keras.Model(inputs, [model.outputs[0], *outputs])
    require(type(model).call in (type(watched).call, keras.Sequential.call), f"{role} is a "
            f"{type(model).__name__} with a call of its own, which its graph doesn't show. Build "
            "it as a functional model.")
    return watched


# --- methods as data ------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """How one of the methods is trained: its loss, its authors' weight, where it looks."""

    make: Callable[[], FeatureLoss]
    weight: float  # beside cross-entropy of weight 1; RepDistiller's scripts, or the authors'
    where: str  # "hint", "stages", "before" (their ReLU), "last map", "vector" or "logits"
    parts: tuple = ()  # what make uses, for the digest of its code

    @property
    def on_logits(self) -> bool:
        """Whether it takes the place of the soft labels, and asks no teacher for features."""
        return self.where == "logits"


def _method(where: str, weight: float, loss, kind=FeatureLoss, **settings) -> Method:
    if where in ("hint", "stages", "last map") and kind is FeatureLoss:
        settings["maps"] = True
    return Method(lambda: kind(loss, **settings), weight, where, (kind, loss, str(settings)))


_with = functools.partial  # the settings are those of its authors' CIFAR-100 experiments

METHODS = {
    "fitnet": _method("hint", 100, methods.fitnet, Regressed, relu=True),
    "at": _method("stages", 1000, methods.at),
    "sp": _method("last map", 3000, methods.sp),
    "cc": _method("vector", 0.02, methods.cc, Embedded),
    "vid": Method(Information, 1, "stages", (Information, methods.vid)),
    "rkd": _method("vector", 1, methods.rkd),
    "pkt": _method("vector", 30000, methods.pkt),
    "ab": _method("before", 1, methods.ab, Regressed, together=True),
    "ft": Method(Factors, 200, "last map", (Factors, _convolutions, methods.ft)),
    "fsp": _method("stages", 50, methods.fsp, Regressed, together=True),
    "nst": _method("stages", 50, methods.nst),
    "crd": Method(Contrast, 0.8, "vector", (Contrast, Embedded, methods.crd, methods.crd_scores,
                                            methods.crd_remember)),
    "dkd": _method("logits", 1, _with(methods.dkd, beta=8.0, temperature=4.0), LabelledLoss),
    "dist": _method("logits", 2, _with(methods.dist, temperature=4.0)),
    "standardised": _method("logits", 9, _with(methods.standardised, temperature=2.0)),
    "ttm": _method("logits", 45, _with(methods.ttm, power=0.1)),
    "wttm": _method("logits", 4, _with(methods.wttm, power=0.2)),
}


@dataclass(frozen=True)
class Trainer:
    """Makes the FeatureDistiller of a method: what train_or_load takes as ``trainer``."""

    method: str
    weight: float
    student_layers: tuple[str, ...] = ()
    teacher_layers: tuple[str, ...] = ()

    def __post_init__(self):
        require(self.method in METHODS,
                f"method is {self.method!r}. Choose one of {', '.join(METHODS)}.")

    def __call__(self, *, student, teacher, temperature, alpha, labels):
        return FeatureDistiller(
            student=student, teacher=teacher, temperature=temperature, alpha=alpha, labels=labels,
            feature_loss=METHODS[self.method].make(), weight=self.weight,
            student_layers=self.student_layers, teacher_layers=self.teacher_layers)

    def lend(self, answers, ask=None):
        """The stored logits of all views, with the number of each image where it is needed."""
        if self.method != "crd":
            return answers
        require(answers is not None, "views are 0, but CRD needs the number of each image, which "
                "comes with stored answers. Give the recipe some views.")
        return [np.column_stack([each, np.arange(len(each))]).astype("float32")
                for each in answers]

    def identity(self) -> tuple[dict, list]:
        """What the trained weights depend on: settings, and the functions that act on them."""
        from reference import digests  # which a lifted file may not have
        parts = METHODS[self.method].parts
        settings = [part if isinstance(part, str) else str(getattr(part, "keywords", ""))
                    for part in parts]
        code = [getattr(part, "func", part) for part in parts if callable(part)]
        return {**asdict(self), "settings": settings}, [
            FeatureDistiller, watch, FeatureLoss, *digests.with_helpers(*code)]


@dataclass(frozen=True)
class StoredTrainer(Trainer):
    """A Trainer that reads the teacher's features from files, in half precision, where many
    students learn from one teacher. ask(layers): the features, ``[view][layer]``."""

    def lend(self, answers, ask=None):
        answers = super().lend(answers)
        if not self.teacher_layers:
            return answers
        require(answers is not None, "views are 0, but stored features are of views. Give the "
                "recipe some, or take Trainer, which asks live.")
        return list(map(_Together, answers, ask(self.teacher_layers)))

    def identity(self):
        from reference import answers
        settings, code = super().identity()
        stored = [_Together, answers._features] if self.teacher_layers else []
        return {**settings, "stored": bool(stored)}, [*code, *stored]


@dataclass(frozen=True)
class _Together:
    """Logits and features of one view, to be indexed as one array."""

    logits: np.ndarray
    features: list

    def __getitem__(self, index):
        return self.logits[index], *(each[index] for each in self.features)
