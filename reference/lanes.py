"""Train the seeds of an experiment side by side on one accelerator, with JAX.

    KERAS_BACKEND=jax TF_CPP_MIN_LOG_LEVEL=1 python reference/lanes.py OUT NAME...
    python reference/lanes.py OUT --publish

The first line trains, where the accelerator is; it needs no TensorFlow. The second measures what
came back, on any machine, and publishes it. A lane is one seed, or one trial of a weight. All lanes
take Keras's own training step at once, and an epoch is one call to the device. Convolutions
compute in bfloat16, everything else in float32. Sums may run in another order the next time, so a
second training need not give the same bits.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # run as a file: the project's folder is not on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import kdlib
import keras
import numpy as np
from keras import layers, ops

from reference import accelerated, controls, features, fingerprints, recipes
from reference.accelerated import augment

LANES = 5  # shorter lists of seeds are filled up, so that one compiled epoch serves them all


# --- on the device --------------------------------------------------------------------


class _Rounded(layers.Conv2D):
    """Conv2D in bfloat16."""

    def call(self, inputs):
        outputs = ops.cast(self._convolved(ops.cast(inputs, "bfloat16"),
                                           ops.cast(self.kernel, "bfloat16")), "float32")
        return self.activation(outputs + self.bias if self.use_bias else outputs)

    def _convolved(self, images, kernel):
        return ops.conv(images, kernel, padding="same")


class _AsProduct(_Rounded):
    """The same as a matrix product, which stays one if each lane has a kernel of its own."""

    def _convolved(self, images, kernel):
        import jax

        (rows, cols), (height, width) = self.kernel_size, images.shape[1:3]
        padded = ops.pad(images, [[0, 0], [(rows - 1) // 2, rows // 2],
                                  [(cols - 1) // 2, cols // 2], [0, 0]])
        patches = ops.concatenate([padded[:, r : r + height, c : c + width]
                                   for r in range(rows) for c in range(cols)], axis=-1)
        kernel = ops.reshape(kernel, (-1, self.filters))
        return jax.lax.dot_general(patches, kernel, (((3,), (0,)), ((), ())), precision="default")


def rounded(model, kind=_AsProduct) -> None:
    """Let a model's convolutions compute in bfloat16. Its weights stay what they are."""
    for layer in model._flatten_layers():
        if type(layer) is layers.Conv2D:
            plain = layer.strides == layer.dilation_rate == (1, 1) and layer.groups == 1
            kdlib.require(plain and (layer.padding == "same" or layer.kernel_size == (1, 1)),
                          f"{layer.name} has strides, dilation, groups, or another padding than "
                          "'same'. That is not known here.")
            layer.__class__ = kind


class _Lent:
    """Let a teacher in a closure compute with these values while an epoch is traced."""

    def __init__(self, teacher, values):
        self.variables, self.values = teacher.variables if teacher else [], values

    def __enter__(self):
        self.own = [variable._value for variable in self.variables]
        self._set(self.values)

    def __exit__(self, *_):
        self._set(self.own)

    def _set(self, values):
        for variable, value in zip(self.variables, values, strict=True):
            variable._value = value


class Arm:
    """What experiments of one kind share: the trainer, and its epoch, which is compiled once."""

    def __init__(self, each, dataset, teacher):
        self.each, self.dataset, self.recipe = each, dataset, each.full_recipe()
        self.live = teacher is not None and (self.recipe.views == 0 or bool(
            each.loss and features.METHODS[each.loss].where != "logits"))
        self.several = self.live and len({each.teachers(seed)[0] for seed in each.seeds}) > 1
        self.numbered, self.teacher = each.loss == "crd", teacher if self.live else None
        self.steps = len(dataset.y_train) // self.recipe.batch_size
        kdlib.require(self.steps * self.recipe.batch_size == len(dataset.y_train),
                      f"batch_size is {self.recipe.batch_size}. It has to divide the images.")
        self.trainer = self._made(each.seeds[0])
        self.student = getattr(self.trainer, "student", self.trainer)
        recipes.compile_for(self.trainer, self.recipe, dataset, distilled=each.distilled,
                            last_layer=self.student.layers[-1].name)
        self.trainer.optimizer.build(self.trainer.trainable_variables)
        self.trainer.optimizer._learning_rate = accelerated._Given()
        self.clean = [[np.asarray(v) for v in kept] for kept in (
            self.trainer.optimizer.variables, self.trainer.metrics_variables)]
        rounded(self.trainer)
        if self.live:
            rounded(teacher, _AsProduct if self.several else _Rounded)

    def _made(self, seed: int):
        """The student of a seed, and what trains it."""
        keras.utils.set_random_seed(seed)
        each, student = self.each, _built(self.each)
        if not each.distilled:
            return student
        settings = dict(student=student, teacher=self.teacher, temperature=each.temperature,
                        alpha=each.alpha)
        if each.loss is None:
            return kdlib.Distiller(**settings)
        made = replace(each, factor=1.0).trainer()
        return made(**settings, labels=self.dataset.y_train)

    def first(self, seed: int) -> tuple:
        """A lane before its first step, as Keras's train_step takes it."""
        made = self._made(seed)
        return ([np.asarray(v) for v in made.trainable_variables],
                [np.asarray(v) for v in made.non_trainable_variables], *self.clean)

    def epoch(self, state, weight, taught, x, y, codes, answers, order, rates):
        """One epoch of one lane. Returns its state and what Keras logs."""
        import jax

        def step(state, given):
            index, rate = given
            seen = augment(x[index], codes[index])
            if answers is not None:
                number = [ops.cast(index, "float32")[:, None]] if self.numbered else []
                seen = seen, ops.concatenate([answers[index], *number], axis=-1)
            self.trainer.optimizer._learning_rate.now = rate
            if self.each.loss:
                self.trainer.weight = weight
            logs, state = self.trainer.train_step(state, (seen, y[index]))
            return state, logs

        state = (*state[:3], self.clean[1])  # each epoch's metrics begin anew
        with _Lent(self.teacher if self.live else None, taught):
            state, logs = jax.lax.scan(step, state, (order, rates))
        return state, {key: value[-1] for key, value in logs.items()}

    def compiled(self, data, taught, answers, lanes: int):
        """The epoch of all lanes: traced now, compiled by the function that is returned."""
        import jax

        kind = jax.ShapeDtypeStruct
        every = jax.tree.map(lambda v: kind((lanes, *v.shape), v.dtype), self.first(0))
        axes = (0, 0, 0 if self.several else None, None, None, None, 0, 0, None)
        return jax.jit(jax.vmap(self.epoch, in_axes=axes), donate_argnums=0).lower(
            every, kind((lanes,), "float32"), taught, *data,
            kind((len(data[1]), 3), "int8"), answers,
            kind((lanes, self.steps, self.recipe.batch_size), "int32"),
            kind((self.steps,), "float32")).compile

    def students(self, state) -> list[list]:
        """Of all that is trained the student's own: trainable variables, and the others."""
        return [[kept[[id(v) for v in all_].index(id(own))] for own in owns]
                for kept, all_, owns in (
                    (state[0], self.trainer.trainable_variables, self.student.trainable_variables),
                    (state[1], self.trainer.non_trainable_variables,
                     self.student.non_trainable_variables))]

    def validation(self, state) -> np.ndarray:
        """The validation accuracy of each lane, in float32."""
        judge = _judging(_builder(self.each))
        return np.asarray(judge(self.students(state), self.dataset.x_val, self.dataset.y_val))

    def weights(self, state, lane: int) -> list[np.ndarray]:
        """A lane's student, as Keras orders its weights."""
        found = dict(zip(map(id, (*self.student.trainable_variables,
                                  *self.student.non_trainable_variables)),
                         sum(self.students(state), []), strict=True))
        return [np.asarray(found[id(v)][lane]) for v in self.student.weights]


@functools.cache
def _judging(build: Callable):
    """A function (students, images, labels) that gives the accuracy of each lane, in float32."""
    import jax

    judge = build()

    def accuracy(student, x, y):
        logits = jax.lax.map(lambda images: judge.stateless_call(
            *student, images, training=False)[0], _blocks(x, 500))
        logits = ops.reshape(logits, (-1, logits.shape[-1]))
        return ops.mean(ops.cast(ops.argmax(logits, axis=-1) == y, "float32"))
    return jax.jit(lambda students, x, y: jax.lax.map(lambda one: accuracy(one, x, y), students))


@functools.cache
def _asking(model):
    """A function (images, codes) that gives the model's logits, in blocks that fit into memory."""
    import jax

    def ask(x, codes):
        blocks = [_blocks(x, 1000), _blocks(codes, 1000)]
        with jax.default_matmul_precision("tensorfloat32"):
            found = jax.lax.map(lambda two: model(augment(*two), training=False), blocks)
        return ops.reshape(found, (-1, found.shape[-1]))
    return jax.jit(ask)


def _blocks(array, size: int):
    return ops.reshape(array, (-1, math.gcd(len(array), size), *array.shape[1:]))


def train(arm: Arm, epoch: Callable, recipe, data, lanes: list, codes, taught, answers) -> list:
    """Train all lanes, (seed, weight) each. Returns weights and history of each lane.

    Batches and views are those of recipes.Batches. answers: of each lane, for each view.
    """
    import jax

    images = len(arm.dataset.y_train)
    states = [arm.first(seed) for seed, _ in lanes]
    state = jax.tree.map(lambda *parts: np.stack(parts), *states)
    weight = np.array([weight for _, weight in lanes], "float32")
    rates = accelerated.Arm.rates(arm, recipe.epochs).astype("float32")
    history = [{} for _ in lanes]
    for k in range(recipe.epochs):
        started, view = time.perf_counter(), k % (recipe.views or recipe.epochs)
        order = np.stack([np.random.default_rng([seed, k]).permutation(images)
                          for seed, _ in lanes]).astype("int32")
        given = None if answers is None else ops.stack([each[view] for each in answers])
        state, logs = epoch(state, weight, taught, *data, codes[view], given,
                            order.reshape(len(lanes), arm.steps, -1), rates[k])
        logs = {key: np.asarray(value) for key, value in logs.items()}
        logs["val_accuracy"] = arm.validation(state)
        logs["seconds"] = np.full(len(lanes), (time.perf_counter() - started) / len(lanes))
        for lane, one in enumerate(history):
            for key, values in logs.items():
                one.setdefault(key, []).append(round(float(values[lane]), 5))
    return [{"weights": arm.weights(state, lane), "history": one}
            for lane, one in enumerate(history)]


def experiment(name: str):
    """What plan.py says of a run of CIFAR-10."""
    from reference import plan

    method = name.rpartition("-seed")[0]
    return next(each for each in plan.EXPERIMENTS
                if (each.dataset, each.method) == ("cifar10", method))


def _builder(each) -> Callable:
    teaches = each.method.startswith("teacher")
    return each.build or (kdlib.build_teacher if teaches else kdlib.build_student)


def _built(each):
    return _builder(each)()


# --- what to train --------------------------------------------------------------------


class Run:
    """The experiments of these names, one after the other, each after its trials."""

    def __init__(self, folder: Path, experiments: list, dataset=None, log=print):
        import jax

        jax.config.update("jax_default_matmul_precision", "float32")
        self.folder, self.experiments, self.log = folder, experiments, log
        self.dataset, self.begun = dataset or kdlib.load_dataset("cifar10"), time.perf_counter()
        self.digest = fingerprints.data_digest(self.dataset)
        self.data = jax.device_put((self.dataset.x_train, self.dataset.y_train))
        self.made, self.arms = {}, {}  # weights of teachers by name; compiled epochs by kind
        self.factors = {}  # of the methods' weights, as chosen
        self.codes = functools.cache(lambda views, shift, flip: kdlib.view_codes(
            images=len(self.dataset.y_train), views=views, shift=shift, flip=flip))
        self.loaded, self.answered = functools.cache(self._teacher), {}
        self.pool = ThreadPoolExecutor()

    def __call__(self, seconds: float) -> None:
        tracing = ThreadPoolExecutor(1)
        futures = [tracing.submit(self.arm, each) for each in self.experiments]
        for each, future in zip(self.experiments, futures, strict=True):
            if time.perf_counter() - self.begun > seconds:
                self.log(f"{each.method} is left out: no time is left")
                continue
            try:
                self.make(each, *future.result())
            except Exception as error:  # the others go on
                self.log(f"{each.method} failed: {error!r}"[:2000])

    def arm(self, each):
        """The arm of an experiment, and its epoch, which is being compiled."""
        own = len({each.teachers(seed)[0] for seed in each.seeds}) > 1 if each.distilled else False
        live = each.loss or not each.full_recipe().views
        key = (each.loss, each.alpha, each.build, each.place, each.full_recipe().smoothing,
               each.full_recipe().views > 0, each.distilled, live and own,
               each.method.startswith("teacher"))
        if key not in self.arms:
            lanes = LANES if len(each.seeds) > 1 else 1
            teacher = (_built(experiment(each.teachers(each.seeds[0])[0]))
                       if each.distilled and live else None)
            arm = Arm(each, self.dataset, teacher)
            taught = self._shapes(teacher, lanes if arm.several else 0) if arm.live else []
            compile_ = arm.compiled(self.data, taught, self._answers_shape(arm, lanes), lanes)
            self.arms[key] = arm, self.pool.submit(compile_), lanes
            self.log(f"{each.method} traced after {time.perf_counter() - self.begun:.0f} s")
        return self.arms[key]

    @staticmethod
    def _shapes(teacher, lanes: int) -> list:
        import jax

        return [jax.ShapeDtypeStruct((lanes, *v.shape) if lanes else tuple(v.shape), v.dtype)
                for v in teacher.variables]

    def _answers_shape(self, arm, lanes: int):
        import jax

        if not arm.each.distilled or not arm.recipe.views:
            return None
        shape = lanes, len(self.dataset.y_train), len(self.dataset.class_names)
        return jax.ShapeDtypeStruct(shape, "float32")

    def _teacher(self, name: str):
        """A teacher that was trained here, or a published one."""
        from reference import runs

        if name not in self.made:
            return keras.saving.load_model(runs.REFERENCE / "weights" / f"cifar10-{name}.keras",
                                           compile=False)
        model = _built(experiment(name))
        model.set_weights(self.made[name])
        return model

    def _answers(self, each, recipe, seed: int) -> list:
        """A teacher's logits for each view that is shown, kept on the device."""
        codes = self.codes(recipe.views, recipe.shift, recipe.flip)
        names = each.teachers(seed)
        key = (*names, each.signal)
        kept = self.answered.setdefault(key, [])
        if len(kept) < min(recipe.views, recipe.epochs):
            models = [self.loaded(name) for name in names]
            model = controls.SIGNALS[each.signal](*models) if each.signal else models[0]
            ask = _asking(model)
            kept += [ask(self.data[0], codes[k])
                     for k in range(len(kept), min(recipe.views, recipe.epochs))]
        return kept

    def make(self, each, arm: Arm, compiled, lanes: int) -> None:
        """Train an experiment, after the trials that choose its weight."""
        epoch, factor, authors = compiled.result(), each.factor, 1.0
        if each.loss:
            authors, which = features.METHODS[each.loss].weight, (each.loss, each.alpha)
            if factor is None and which not in self.factors:
                trials = each.trials()
                wanted = [(trial.method, 100, trial.factor * authors) for trial in trials]
                found = self._trained(each, arm, epoch, wanted, lanes, trials[0])
                worth = [_worth(one["history"]) for one in found]
                self.factors[which] = trials[worth.index(max(worth))].factor
            factor = self.factors[which] if factor is None else factor
        found = self._trained(each, arm, epoch, [(each.method, seed, (factor or 1.0) * authors)
                                                 for seed in each.seeds], lanes, each)
        if each.method.startswith("teacher"):
            self.made |= {f"{each.method}-seed{one['seed']}": one["weights"] for one in found}

    def _trained(self, each, arm, epoch, wanted: list, lanes: int, of) -> list[dict]:
        """Train what is wanted, (name, seed, weight) each, with the recipe of one, and write it."""
        import jax

        recipe, started = of.full_recipe(), time.perf_counter()
        filled = [*wanted, *wanted[-1:] * (lanes - len(wanted))]
        home = [seed if seed in each.seeds else each.seeds[0] for _, seed, _ in filled]
        answers = ([self._answers(each, recipe, seed) for seed in home]
                   if each.distilled and recipe.views else None)
        taught = []
        if arm.live:
            models = [self.loaded(each.teachers(seed)[0]) for seed in home]
            taught = [[np.asarray(v) for v in model.variables] for model in models]
            taught = jax.tree.map(lambda *v: np.stack(v), *taught) if arm.several else taught[0]
        codes = self.codes(recipe.views or recipe.epochs, recipe.shift, recipe.flip)
        found = train(arm, epoch, recipe, self.data, [two[1:] for two in filled], codes, taught,
                      answers)[:len(wanted)]
        for one, (name, seed, weight) in zip(found, wanted, strict=True):
            one |= {"name": name, "seed": seed, "weight": weight if each.loss else None}
            write(self.folder, one, self.digest)
        worth = " ".join(f"{100 * _worth(one['history']):.2f}" for one in found)
        self.log(f"{wanted[0][0]}: {worth}, {time.perf_counter() - started:.0f} s, "
                 f"after {time.perf_counter() - self.begun:.0f} s")
        return found


def _worth(history: dict) -> float:
    """The last validation accuracy, -1 if the training diverged."""
    finite = all(np.isfinite(values).all() for values in history.values())
    return history["val_accuracy"][-1] if finite else -1.0


def write(folder: Path, one: dict, data: str) -> None:
    """Weights and notes of a run, in one file. data: the digest of its images and labels."""
    import jax

    notes = {"data": data, "machine": jax.devices()[0].device_kind,
             "versions": f"jax {jax.__version__}, keras {keras.__version__}, "
                         f"numpy {np.__version__}",
             **{key: one[key] for key in ("name", "seed", "weight", "history")}}
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / f"{one['name']}-seed{one['seed']}.npz", notes=json.dumps(notes),
             **{f"{k:03d}": value for k, value in enumerate(one["weights"])})


# --- publishing -----------------------------------------------------------------------


def identity() -> tuple[dict, list]:
    """Settings that no recipe has, and the code that acts on the numbers."""
    return {"engine": "lanes", "convolutions": "bfloat16"}, [
        augment, _Rounded, _AsProduct, rounded, _Lent, Arm, _asking, train, accelerated._Given]


def publish(folder: Path) -> None:
    """Measure every run in a folder on this machine, in float32, and publish it."""
    from reference import experiments, plan

    dataset, teacher = kdlib.load_dataset("cifar10"), functools.partial(_teacher, folder, {})
    for each in plan.EXPERIMENTS:  # trials and teachers come first there
        for seed in each.seeds if each.engine == "lanes" else ():
            path = folder / f"{each.method}-seed{seed}.npz"
            if path.exists() and experiments.notes_of(each, seed) is None:
                print(path.stem, _publish(path, each, seed, dataset, teacher(each, seed)))


def _publish(path: Path, each, seed: int, dataset, teacher) -> str:
    from reference import experiments, store

    with np.load(path) as file:
        notes = json.loads(str(file["notes"]))
        weights = [file[key] for key in file.files if key != "notes"]
    kdlib.require(notes["data"] == fingerprints.data_digest(dataset),
                  f"{path.name} was trained with other images, labels or another split.")
    kdlib.require(len(notes["history"]["loss"]) == each.full_recipe().epochs,
                  f"{path.name} has {len(notes['history']['loss'])} epochs.")
    kdlib.require(not each.loss or np.isclose(notes["weight"], each.trainer().weight),
                  f"{path.name} has weight {notes['weight']}, but the trials chose another.")
    model, history = _built(each), notes.pop("history")
    model.set_weights(weights)
    target = path.with_name(f"{each.stem(seed)}-{path.parent.name}")
    target.mkdir(exist_ok=True)
    if _worth(history) < 0:
        error = FloatingPointError(f"{path.stem}: its loss is not finite")
        error.folder = target
        store.write_notes(target / "diverged.json", accelerated._notes(
            model, teacher, dataset, (each, seed), history, notes, {}) | {"diverged": str(error)})
        experiments.publish_divergence(error, each, seed)
        return "diverged"
    run = accelerated._measured(target, model, teacher, dataset, (each, seed), history, notes)
    experiments.publish(run, each)
    return f"{run.row['val_accuracy']}, on the device {history['val_accuracy'][-1]}"


def _teacher(folder: Path, known: dict, each, seed: int):
    """The model that taught a run, of this folder or published; made of several if need be."""
    from reference import runs

    names = each.teachers(seed)
    for name in names:
        path, published = folder / f"{name}.npz", runs.REFERENCE / f"weights/cifar10-{name}.keras"
        if name not in known and path.exists():
            known[name] = _built(experiment(name))
            with np.load(path) as file:
                known[name].set_weights([file[key] for key in file.files if key != "notes"])
        elif name not in known:
            known[name] = keras.saving.load_model(published, compile=False)
    models = [known[name] for name in names]
    return controls.SIGNALS[each.signal](*models) if each.signal else (models or [None])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train or publish what plan.py gives to lanes.")
    parser.add_argument("out", type=Path, help="the folder of weights and notes")
    parser.add_argument("name", nargs="*", help="methods to train")
    parser.add_argument("--seconds", type=float, default=3600, help="begin nothing after so many")
    parser.add_argument("--publish", action="store_true", help="measure and publish what is there")
    options = parser.parse_args()
    if options.publish:
        publish(options.out)
        return
    Run(options.out, wanted(options.name), log=functools.partial(print, flush=True))(
        options.seconds)


def wanted(names: list[str]) -> list:
    """The experiments of these names, in this order; seeds of one method together."""
    from reference import plan

    found = []
    for name in names:
        parts = [each for each in plan.EXPERIMENTS if each.engine == "lanes"
                 and (each.dataset, each.method) == ("cifar10", name)]
        kdlib.require(parts, f"{name} is not made by lanes.py; plan.py says what is.")
        found.append(replace(parts[0], seeds=sum((each.seeds for each in parts), ())))
    return found


if __name__ == "__main__":
    main()
