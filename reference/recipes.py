"""How a published model is trained: recipe, batches, optimizer. Notebook 02 shows them."""

from __future__ import annotations

import contextlib
import os
from dataclasses import asdict, dataclass
from unittest import mock

import kdlib
import keras
import numpy as np
from kdlib import require
from keras import layers, ops

with contextlib.suppress(ImportError):  # the optimizer and the batches need Keras alone
    import tensorflow as tf


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
    precision: str = "float32"  # of convolutions; or "bfloat16", where a processor has it

    def __post_init__(self):
        for name, low in (("epochs", 1), ("batch_size", 1), ("views", 0), ("shift", 0)):
            value = getattr(self, name)
            require(isinstance(value, (int, np.integer)) and value >= low,
                    f"{name} is {value!r}. Give a whole number from {low} on.")
        for name, high in (("warmup", 1), ("momentum", 1), ("smoothing", 1), ("average", 1),
                           ("learning_rate", np.inf), ("weight_decay", np.inf)):
            value = getattr(self, name)
            require(isinstance(value, (int, float, np.number)) and 0 <= value < high,
                    f"{name} is {value!r}. Give a number from 0 to below {high}.")
        require(self.optimizer in ("muon", "sgd", "adam"),
                f"optimizer is {self.optimizer!r}. Choose 'muon', 'sgd' or 'adam'.")
        require(self.precision in ("float32", "bfloat16"),
                f"precision is {self.precision!r}. Choose 'float32' or 'bfloat16'.")

    def settings(self) -> dict:
        """What a run is known by. The usual precision is left out, as older runs had no other."""
        return {name: value for name, value in asdict(self).items()
                if (name, value) != ("precision", "float32")}


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


def head(model) -> str:
    """The name of the last layer that has weights: what comes after it may be a cast."""
    inside = [layer for layer in getattr(model, "layers", ()) if layer.weights]
    return head(inside[-1]) if inside else model.name


def compile_for(trainer, recipe: Recipe, dataset, *, distilled: bool, last_layer: str) -> None:
    """Compile what is fitted on the dataset. A distilled one has losses of its own."""
    steps = -(-len(dataset.y_train) // recipe.batch_size)
    trainer.compile(
        optimizer=make_optimizer(recipe, steps, last_layer=last_layer),
        loss=(None if distilled else
              SmoothedCrossentropy(recipe.smoothing) if recipe.smoothing else
              keras.losses.SparseCategoricalCrossentropy(from_logits=True)),
        metrics=[], weighted_metrics=["accuracy"], steps_per_execution=min(steps, 24),
        jit_compile=False)  # slower on the CPU
    # Keras would make the accuracy's variables in the first step, and trace that step twice.
    trainer.compute_metrics(None, dataset.y_val[:1], np.zeros((1, len(dataset.class_names))))
    trainer.reset_metrics()


class Muon(keras.optimizers.Muon):
    """Keras's Muon, for convolutions too: a kernel is a matrix (inputs, outputs).

    The momentum of a kernel is made orthogonal before each step, so that every direction
    learns at the same pace. Everything else is left to AdamW: vectors, embeddings, kernels with
    one output (so depthwise ones), and the excluded layers. A step does not depend on the size
    of the loss.

    Source: Jordan et al. 2024 (kellerjordan.github.io/posts/muon); the size of a step: Liu
    et al. 2025, section 2.2.
    """

    def _should_use_adamw(self, variable):
        *_, layer, name = ("/" + variable.path).split("/")
        vector = len(variable.shape) < 2 or variable.shape[-1] == 1
        return name != "kernel" or vector or layer in self.exclude_layers

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
    """Let BatchNorm train on TensorFlow's one-pass kernel, in place of three passes."""
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


KEPT = {  # what stays float32 beside the convolutions
    "TF_AUTO_MIXED_PRECISION_GRAPH_REWRITE_ALLOWLIST_REMOVE":
        "MatMul,BatchMatMul,BatchMatMulV2,BatchMatMulV3,Einsum"}


@contextlib.contextmanager
def convolutions_in(precision: str):
    """Compute convolutions, and what lies between two of them, in this precision.

    Losses, matrix products and weights stay float32. The old setting comes back at the end.
    Raises RuntimeError where the processor has no bfloat16: TensorFlow would go on in float32.
    """
    if precision == "float32":
        yield
        return
    options, name = tf.config.optimizer, "auto_mixed_precision_onednn_bfloat16"
    before = options.get_experimental_options().get(name, False)
    with mock.patch.dict(os.environ, KEPT):
        options.set_experimental_options({name: True})
        try:
            require(_rounds(), "precision is 'bfloat16', but this processor computes in float32. "
                    "Use another machine, or a recipe with 'float32'.", RuntimeError)
            yield
        finally:
            options.set_experimental_options({name: before})


def _rounds() -> bool:
    """Whether a convolution takes 1 + 2^-12 for 1, as bfloat16 does and float32 doesn't."""
    convolved = tf.function(lambda x: tf.nn.conv2d(x, tf.ones((3, 3, 16, 16)), 1, "SAME"))
    ones = tf.ones((1, 8, 8, 16))
    return bool(tf.reduce_all(convolved(ones * (1 + 2**-12)) == convolved(ones)))


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
