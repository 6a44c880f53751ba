"""What a student learns from besides a teacher's own answers, and from how many labels.

Controls take something away from the answers, signals make several answers one, and few_labels
and wrong_labels change what is known. Notebooks 08 and 11 show what each is for.
"""

import functools
from dataclasses import replace

import keras
import numpy as np
import scipy.optimize
import scipy.special
from keras import layers
from sklearn.model_selection import train_test_split

# --- controls: what a student learns from a teacher that knows less -------------------


def _softened(logits, temperature: float):
    return scipy.special.softmax(logits.astype("float64") / temperature, axis=-1)


def smoothed(logits, labels, temperature: float):
    """Label smoothing with the mean entropy of the teacher's soft labels.

    Every image gets the same soft label but for the place of its class. logits (N, classes),
    labels (N,); returns logits. Source: Szegedy et al. 2016, section 7.
    """
    classes = logits.shape[-1]
    soft = _softened(logits, temperature)
    wanted = scipy.special.entr(soft).sum(-1).mean()

    def excess(wrong):
        return (scipy.special.entr(1 - wrong)
                + (classes - 1) * scipy.special.entr(wrong / (classes - 1)) - wanted)

    wrong = scipy.optimize.brentq(excess, 1e-12, 1 - 1 / classes)
    smooth = np.where(np.arange(classes) == labels[:, None], 1 - wrong, wrong / (classes - 1))
    return temperature * np.log(smooth)


def evened(logits, labels, temperature: float):
    """How sure the teacher is of the true class, and nothing about the others.

    The true class keeps its softened probability; the rest is spread evenly.
    """
    sure = _softened(logits, temperature)[np.arange(len(labels)), labels]
    return _spread(np.clip(sure, 1e-12, 1 - 1e-12)[:, None], logits, labels, temperature)


def levelled(logits, labels, temperature: float):
    """How sure the teacher is of the true class *in the mean*, and nothing about the others.

    Every image gets that mean of the softened probability. The rest is spread evenly.
    """
    sure = _softened(logits, temperature)[np.arange(len(labels)), labels].mean()
    return _spread(sure, logits, labels, temperature)


def _spread(sure, logits, labels, temperature: float):
    """So sure of the true class, and the rest evenly over the others, as logits."""
    classes = logits.shape[-1]
    even = np.where(np.arange(classes) == labels[:, None], sure, (1 - sure) / (classes - 1))
    return temperature * np.log(even)


def shuffled(logits, labels, temperature: float):
    """The teacher's logits, those of the wrong classes permuted.

    Each image has its own permutation, the same in all its views: how sure the teacher is
    stays true, which classes are alike becomes false. Source: Furlanello et al. 2018,
    section 3.2 (dark knowledge with permuted predictions).
    """
    keys = np.random.default_rng(2018).random(logits.shape)
    keys[np.arange(len(labels)), labels] = -1
    origin = keys.argsort(-1)[:, 1:]  # the wrong classes in random order
    mixed = logits.copy()
    np.put_along_axis(mixed, np.sort(origin), np.take_along_axis(logits, origin, -1), -1)
    return mixed


def out_of_step(logits, labels, temperature: float):
    """Each image gets the answer to another one: a mistake, shown in notebook 07."""
    return np.random.default_rng(0).permutation(logits)


def top(logits, labels, temperature: float, *, k: int):
    """The teacher's k likeliest classes keep their softened probability.

    The rest is spread evenly over the others. What is stored for an image: k class numbers and
    k probabilities. Source: Shen and Xing 2022 (marginal smoothing).
    """
    classes = logits.shape[-1]
    soft = _softened(logits, temperature)
    kept = np.argsort(-soft, axis=-1)[:, :k]
    probabilities = np.take_along_axis(soft, kept, -1)
    rest = np.clip(1 - probabilities.sum(-1, keepdims=True), 1e-12, None) / (classes - k)
    known = np.tile(rest, (1, classes))
    np.put_along_axis(known, kept, np.clip(probabilities, 1e-12, None), -1)
    return temperature * np.log(known)


TOP = (1, 2, 3, 5)
CONTROLS = {function.__name__: function for function in (
    smoothed, evened, levelled, shuffled, out_of_step)}
CONTROLS |= {f"top{k}": functools.partial(top, k=k) for k in TOP}


def few_labels(dataset, percent: float, *, hide: bool, seed: int = 0):
    """The dataset when only so many training labels are known, the same share of each class.

    hide=True: all images, unknown labels are -1. Else the labelled images alone, again and
    again, so that an epoch has as many steps. The seed draws the images whose label is known.
    """
    every = np.arange(len(dataset.y_train))
    known, _ = train_test_split(every, train_size=percent / 100, random_state=seed,
                                stratify=dataset.y_train)
    known.sort()
    if not hide:
        again = np.resize(known, len(every))
        return replace(dataset, x_train=dataset.x_train[again], y_train=dataset.y_train[again])
    hidden = np.full_like(dataset.y_train, -1)
    hidden[known] = dataset.y_train[known]
    return replace(dataset, y_train=hidden)


def wrong_labels(dataset, percent: float):
    """The dataset with so many training labels replaced by another class, drawn at random.

    Validation and test labels stay right. Source: Zhang et al. 2017, section 2.2.
    """
    rng, labels = np.random.default_rng(2017), dataset.y_train.copy()
    which = rng.permutation(len(labels))[:round(len(labels) * percent / 100)]
    classes = len(dataset.class_names)
    labels[which] = (labels[which] + rng.integers(1, classes, len(which))) % classes
    return replace(dataset, y_train=labels)


# --- signals: several answers as one teacher ------------------------------------------


def mirrored(teacher):
    """The mean of the logits for an image and for its mirror image."""
    pixels = keras.Input(teacher.inputs[0].shape[1:], name="pixels")
    answers = [teacher(pixels), teacher(keras.ops.flip(pixels, axis=2))]
    return keras.Model(pixels, layers.Average()(answers), name="mirrored")


def together(*teachers):
    """The mean of the teachers' probabilities, as logits. Source: Hinton et al. 2015, section 5."""
    pixels = keras.Input(teachers[0].inputs[0].shape[1:], name="pixels")
    own = [keras.Model(each.input, each.output, name=f"{each.name}_{k}")  # six have one name
           for k, each in enumerate(teachers)]
    answers = [keras.ops.log_softmax(teacher(pixels)) for teacher in own]
    # The logarithm of a sum, not of a mean: logits may differ by a constant.
    return keras.Model(pixels, keras.ops.logsumexp(keras.ops.stack(answers), axis=0),
                       name="together")


SIGNALS = {function.__name__: function for function in (mirrored, together)}
