"""The networks that are neither kdlib's teacher nor its student: parts A, D, H and J."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import kdlib
import keras
from keras import layers


def residual_teacher(num_classes: int = 10) -> keras.Model:
    """A teacher's budget, with two residual pairs. For parts A and J."""
    return _residual("residual", (24, 64, 96, 128), _unit, num_classes)


def large_teacher(num_classes: int = 10) -> keras.Model:
    """The residual network of part D: about 5 million parameters, three residual pairs."""
    return _residual("residual_large", (52, 104, 208, 416), _pair, num_classes)


def _residual(name: str, widths: tuple, last: Callable, num_classes: int) -> keras.Model:
    pixels = keras.Input((32, 32, 3), name="pixels")
    variance = [std**2 for std in kdlib.PIXEL_STD]
    x = layers.Normalization(mean=kdlib.PIXEL_MEAN, variance=variance)(pixels)
    x = _unit(_unit(x, widths[0], kernel=2), widths[1], pool=True)
    for width, after in itertools.pairwise(widths[1:]):
        x = _unit(_pair(x, width), after, pool=True)
    x = layers.GlobalMaxPooling2D()(last(x, widths[-1]))
    return keras.Model(pixels, layers.Dense(num_classes)(layers.Dropout(0.2)(x)), name=name)


def residual_student(num_classes: int = 10) -> keras.Model:
    """At most 90,000 parameters, with two residual pairs."""
    return _student("residual_student", _residual_body, num_classes)


def separable_student(num_classes: int = 10) -> keras.Model:
    """At most 90,000 parameters: depthwise 3x3, then 1x1 (Howard et al. 2017, section 3.1)."""
    return _student("separable_student", _separable_body, num_classes)


def _student(name: str, body: Callable, num_classes: int) -> keras.Model:
    pixels = keras.Input((32, 32, 3), name="pixels")
    variance = [std**2 for std in kdlib.PIXEL_STD]
    x = layers.Normalization(mean=kdlib.PIXEL_MEAN, variance=variance)(pixels)
    x = layers.GlobalMaxPooling2D(name="pool")(body(x))
    return keras.Model(pixels, layers.Dense(num_classes, name="logits")(x), name=name)


def _unit(x, width: int, *, kernel: int = 3, pool: bool = False):
    x = layers.Conv2D(width, kernel, padding="same", use_bias=False)(x)
    x = layers.MaxPooling2D()(x) if pool else x
    return layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))


def _pair(x, width: int):
    return layers.Add()([x, _unit(_unit(x, width), width)])


def _residual_body(x):
    # No convolution of 1x1 with a stride: see TensorFlow on AVX-512 with few channels.
    x = _unit(x, 24, pool=True)
    for width, pool in ((32, False), (48, True)):
        x = _pair(_unit(x, width, pool=pool), width)
    return x


def _separable_body(x):
    x = _unit(x, 32, pool=True)
    for width, pool in ((64, False), (128, True), (128, False), (192, False), (128, False)):
        x = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
        x = _unit(x, width, kernel=1, pool=pool)
    return x


def best_student(num_classes: int = 10) -> keras.Model:
    """Part H, first candidate: separable, 7 layers at 32 x 32, 11 at 16 x 16."""
    return _student("best_student", lambda x: _stages(x, (48, 3), (72, 5)), num_classes)


def best_student_pooled(num_classes: int = 10) -> keras.Model:
    """Part H, second candidate: separable, 5 layers at 32 x 32, 7 at 16 x 16, 3 at 8 x 8."""
    return _student("best_student_pooled", lambda x: _stages(x, (48, 2), (72, 3), (96, 1)),
                    num_classes)


def _stages(x, *stages):
    for k, (width, pairs) in enumerate(stages):
        x = layers.ReLU()(_separable(x, width, pool=True)) if k else _unit(x, width)
        for _ in range(pairs):
            more = _separable(layers.ReLU()(_separable(x, width)), width)
            x = layers.ReLU()(layers.Add()([x, more]))
    return x


def _separable(x, width: int, *, pool: bool = False):
    x = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
    x = layers.Conv2D(width, 1, use_bias=False)(x)
    x = layers.MaxPooling2D()(x) if pool else x
    return layers.BatchNormalization(momentum=0.9)(x)
