"""Part H, the best student: on one accelerator, with JAX.

    KERAS_BACKEND=jax TF_CPP_MIN_LOG_LEVEL=1 python reference/accelerated.py OUT
    python reference/accelerated.py OUT --publish

The first line trains, where the accelerator is; it needs no TensorFlow. The second measures
what came back, on any machine, and publishes it. An epoch is one call to the device: views,
teacher and optimizer included. Networks compute in bfloat16, and sums may run in another order the
next time, so a second training need not give the same bits.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":  # run as a file: the project's folder is not on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import kdlib
import keras
import numpy as np
from keras import layers, ops

from reference import networks, store
from reference.recipes import Recipe, make_optimizer

# As published, but batches that fill an accelerator, a rate that grows with their root, and
# views that are new in each epoch.
RECIPE = Recipe(epochs=10, batch_size=500, learning_rate=0.04, views=0)
TEACHER_EPOCHS, CANDIDATE_EPOCHS, MOST_EPOCHS = 60, 10, 200
TEMPERATURE, ALPHA, POLICY = 4.0, 0.1, "mixed_bfloat16"
CANDIDATES = {"full": networks.best_student, "pooled": networks.best_student_pooled}
SEEDS = (0, 1, 2)


# --- on the device --------------------------------------------------------------------


def augment(images, codes):
    """kdlib.augment, on the device."""
    rows, cols = (size - 1 - ops.abs(size - 1 - ops.abs(ops.arange(size) + codes[:, axis, None]))
                  for axis, size in enumerate(images.shape[1:3]))
    cols = ops.where(codes[:, 2:] == 1, cols[:, ::-1], cols)
    return images[ops.arange(len(images))[:, None, None], rows[:, :, None], cols[:, None, :]]


def merge(model) -> None:
    """Let each depthwise kernel and the 1x1 kernel behind it act as one dense kernel.

    The same function and the same weights, in the form that an accelerator is fast at.
    """
    for layer in model.layers:
        if type(layer) is layers.DepthwiseConv2D:
            (node,) = layer._outbound_nodes
            node.operation.__class__ = _dense(layer)
            layer.__class__ = _Passing


class _Passing(layers.DepthwiseConv2D):
    def call(self, inputs):
        return inputs


def _dense(depthwise):
    class Dense(layers.Conv2D):
        def call(self, inputs):
            kernel = depthwise.kernel * self.kernel  # (3, 3, in, 1) * (1, 1, in, out)
            return ops.conv(inputs, kernel, padding="same")
    return Dense


class _Given(keras.optimizers.schedules.LearningRateSchedule):
    """A rate that comes with each step, so that another length of training compiles nothing."""

    now = 0.0

    def __call__(self, step):
        return self.now


class Arm:
    """A network with or without a teacher: its epoch is compiled once, for all seeds."""

    def __init__(self, build, recipe: Recipe, images: int, teacher=None):
        self.build, self.recipe, self.teacher = build, recipe, teacher
        self.model = self._made(0)
        self.steps = images // recipe.batch_size
        self.optimizer = make_optimizer(recipe, self.steps, last_layer=self.model.layers[-1].name)
        self.optimizer.build(self.model.trainable_variables)
        self.optimizer._learning_rate = _Given()
        self.clean = [np.asarray(variable) for variable in self.optimizer.variables]

    def _made(self, seed: int):
        keras.utils.set_random_seed(seed)
        model = self.build()
        merge(model)
        return model

    def first(self, seed: int) -> tuple:
        """Weights, statistics and the optimizer's variables before the first step."""
        model = self._made(seed)
        return ([np.asarray(v) for v in model.trainable_variables],
                [np.asarray(v) for v in model.non_trainable_variables], self.clean)

    def rates(self, epochs: int) -> np.ndarray:
        """The learning rate of each step: (epochs, steps)."""
        import jax

        recipe = replace(self.recipe, epochs=epochs)
        schedule = make_optimizer(recipe, self.steps, last_layer="logits")._learning_rate
        rates = jax.vmap(schedule)(np.arange(epochs * self.steps, dtype="float32"))
        return np.reshape(rates, (epochs, self.steps))

    def lowered(self, data, taught):
        """The epoch, traced and not yet compiled."""
        import jax

        epoch = jax.jit(functools.partial(_epoch, self), donate_argnums=0)
        order = np.zeros((self.steps, self.recipe.batch_size), "int32")
        codes = np.zeros((len(data[1]), 3), "int8")
        return epoch.lower(self.first(0), taught, *data, codes, order,
                           np.zeros(self.steps, "float32"))


def _epoch(arm: Arm, state, taught, x, y, codes, order, rates):
    """One epoch. Returns the state and the mean loss and accuracy of its batches."""
    import jax

    def step(state, given):
        index, rate = given
        images = augment(x[index], codes[index])
        answers = arm.teacher and arm.teacher.stateless_call(*taught, images, training=False)[0]
        (loss, (other, right)), gradients = jax.value_and_grad(functools.partial(
            _loss, arm.model, answers), has_aux=True)(state[0], state[1], images, y[index])
        arm.optimizer._learning_rate.now = rate
        trained, kept = arm.optimizer.stateless_apply(state[2], gradients, state[0])
        return (trained, other, kept), (loss, right)

    state, seen = jax.lax.scan(step, state, (order, rates))
    return state, [ops.mean(each) for each in seen]


def _loss(model, answers, trained, other, images, labels):
    logits, other = model.stateless_call(trained, other, images, training=True)
    logits = ops.cast(logits, "float32")
    loss = ops.mean(keras.losses.sparse_categorical_crossentropy(labels, logits, True))
    if answers is not None:
        loss = ALPHA * loss + (1 - ALPHA) * kdlib.distillation_loss(
            teacher_logits=ops.cast(answers, "float32"), student_logits=logits,
            temperature=TEMPERATURE)
    return loss, (other, ops.mean(ops.cast(ops.argmax(logits, axis=-1) == labels, "float32")))


@functools.cache
def _answering(model):
    import jax

    def answers(trained, other, images):
        return model.stateless_call(trained, other, images, training=False)[0]
    return jax.jit(answers)


def accuracy(model, state, x, y, batch: int = 1000) -> float:
    found = [_answering(model)(*state[:2], x[k : k + batch]) for k in range(0, len(x), batch)]
    return float(np.mean(np.concatenate([np.argmax(each, axis=-1) for each in found]) == y))


@dataclass
class Trained:
    """What comes back from the device: weights as Keras orders them, and a history."""

    name: str
    seed: int
    epochs: int
    weights: list
    history: dict


def train(arm: Arm, epoch, dataset, data, taught, *, name: str, seed: int, epochs: int,
          log=print) -> tuple[Trained, tuple]:
    """Train one network. Batches follow from the seed, as in recipes.Batches; views do not."""
    state, history, rates = arm.first(seed), {}, arm.rates(epochs).astype("float32")
    codes = kdlib.view_codes(images=len(dataset.y_train), views=epochs, shift=arm.recipe.shift,
                             flip=arm.recipe.flip)
    for k in range(epochs):
        started = time.perf_counter()
        order = np.random.default_rng([seed, k]).permutation(len(dataset.y_train))
        order = order[: arm.steps * arm.recipe.batch_size].astype("int32")
        state, (loss, right) = epoch(state, taught, *data, codes[k],
                                     order.reshape(arm.steps, -1), rates[k])
        now = {"loss": float(loss), "accuracy": float(right),
               "val_accuracy": accuracy(arm.model, state, dataset.x_val, dataset.y_val),
               "seconds": time.perf_counter() - started}
        for key, value in now.items():
            history.setdefault(key, []).append(round(value, 5))
        if not np.isfinite(now["loss"]):
            log(f"{name} seed {seed} diverged in epoch {k + 1}")
            break
    log(f"{name} seed {seed}: {epochs} epochs, validation {now['val_accuracy']:.4f}, "
        f"{np.median(history['seconds']):.2f} s an epoch, {sum(history['seconds']):.0f} s")
    for variable, value in zip([*arm.model.trainable_variables,
                                *arm.model.non_trainable_variables], [*state[0], *state[1]],
                               strict=True):
        variable.assign(value)
    return Trained(name, seed, epochs, arm.model.get_weights(), history), state


# --- the plan of part H ---------------------------------------------------------------


def run(folder: Path, seconds: float, dataset=None, log=print) -> list[Trained]:
    """Teacher, candidates, then three seeds of both arms, in about so many seconds."""
    import jax

    begun = time.perf_counter()
    keras.config.set_dtype_policy(POLICY)
    dataset = dataset or kdlib.load_dataset("cifar10")
    data = jax.device_put((dataset.x_train, dataset.y_train))
    log(f"{jax.devices()[0].device_kind}, data after {time.perf_counter() - begun:.0f} s")
    images, done = len(dataset.y_train), []
    teaching = Arm(networks.large_teacher, RECIPE, images)
    arms = {("teacher", ""): teaching}
    for candidate, build in CANDIDATES.items():
        arms[candidate, "scratch"] = Arm(build, RECIPE, images)
        arms[candidate, "distilled"] = Arm(build, RECIPE, images, teaching.model)
    first = teaching.first(0)[:2]
    with ThreadPoolExecutor() as pool:
        compiled = {}
        for key, arm in arms.items():
            lowered = arm.lowered(data, first if arm.teacher else ())
            compiled[key] = pool.submit(lowered.compile)
            log(f"{key} traced after {time.perf_counter() - begun:.0f} s")

        def go(key, name, seed, epochs, taught=()):
            epoch = compiled[key].result()
            trained, state = train(arms[key], epoch, dataset, data, taught, name=name, seed=seed,
                                   epochs=epochs, log=log)
            done.append(trained)
            write(folder, done, jax)
            return trained, state[:2]

        _, taught = go(("teacher", ""), "teacher-best", 0, TEACHER_EPOCHS)
        best, rate = {}, {}
        for key in list(arms)[1:]:
            made, _ = go(key, "-".join([*reversed(key), f"{CANDIDATE_EPOCHS}-epochs"]), 100,
                         CANDIDATE_EPOCHS, taught if key[1] == "distilled" else ())
            best[key[0]] = max(best.get(key[0], 0), made.history["val_accuracy"][-1])
            rate[key] = np.median(made.history["seconds"]) * 1.1
        chosen = max(best, key=best.get)
        left = seconds - (time.perf_counter() - begun)
        fits = left / len(SEEDS) / sum(rate[chosen, arm] for arm in ("scratch", "distilled"))
        epochs = max(10, min(MOST_EPOCHS, int(fits) // 10 * 10))
        log(f"chosen: {chosen}, {epochs} epochs, {left:.0f} s left")
        for seed in SEEDS:
            go((chosen, "distilled"), "best", seed, epochs, taught)
            go((chosen, "scratch"), "best-scratch", seed, epochs)
    return done


def write(folder: Path, done: list[Trained], jax) -> None:
    """The teacher in two files of npz, all students in a third, the rest in notes.json."""
    folder.mkdir(parents=True, exist_ok=True)
    teacher = done[0].weights
    if len(done) == 1:
        sizes = np.cumsum([each.size for each in teacher])
        half = int(np.searchsorted(sizes, sizes[-1] / 2))
        np.savez(folder / "teacher-0.npz", *teacher[:half])
        np.savez(folder / "teacher-1.npz", *teacher[half:])
    students = {f"{each.name}-seed{each.seed}/{k:03d}": value
                for each in done[1:] for k, value in enumerate(each.weights)}
    store.write_whole(folder / "students.npz", lambda aside: np.savez(aside, **students))
    notes = {"machine": jax.devices()[0].device_kind,
             "versions": f"jax {jax.__version__}, keras {keras.__version__}, "
                         f"numpy {np.__version__}",
             "runs": [{"name": each.name, "seed": each.seed, "epochs": each.epochs,
                       "history": each.history} for each in done]}
    store.write_whole(folder / "notes.json", lambda aside: aside.write_text(json.dumps(notes)))


# --- publishing -----------------------------------------------------------------------


def identity() -> tuple[dict, list]:
    """Settings that no recipe has, and the code that acts on the numbers."""
    return {"engine": "accelerated", "policy": POLICY}, [
        augment, merge, _Passing, _dense, _Given, Arm, _epoch, _loss, train]


def publish(folder: Path) -> None:
    """Measure every run on this machine, in float32, and publish it."""
    from reference import experiments

    notes, dataset = json.loads((folder / "notes.json").read_text()), kdlib.load_dataset("cifar10")
    weights, teacher = _read(folder), None
    for found in notes["runs"]:
        stem = f"cifar10-{found['name']}-seed{found['seed']}"
        each, seed = experiments.run_of(stem)
        kdlib.require(each.full_recipe().epochs == found["epochs"] and
                      len(found["history"]["loss"]) == found["epochs"],
                      f"{stem} has {len(found['history']['loss'])} epochs, the plan "
                      f"{each.full_recipe().epochs}.")
        model = each.build()
        model.set_weights(weights[stem])
        teacher = model if teacher is None else teacher
        target = folder / stem
        target.mkdir(exist_ok=True)
        run = _measured(target, model, teacher if each.distilled else None, dataset,
                        (each, seed), found["history"], notes)
        experiments.publish(run, each)
        print(stem, run.row["val_accuracy"])


def _read(folder: Path) -> dict[str, list]:
    """The weights of each run, by the name of its files."""
    halves = [np.load(folder / f"teacher-{k}.npz") for k in (0, 1)]
    found = {"cifar10-teacher-best-seed0": [half[key] for half in halves for key in half.files]}
    students = np.load(folder / "students.npz")
    for key in sorted(students.files):
        found.setdefault(f"cifar10-{key.partition('/')[0]}", []).append(students[key])
    return found


def _measured(folder: Path, model, teacher, dataset, which: tuple, history, notes: dict):
    """The files that experiments.publish copies, and the run that they are of."""
    from reference import runs

    logits = runs._both_logits(model, dataset)
    found = _notes(model, teacher, dataset, which, history, notes,
                   runs._figures(logits, dataset, teacher))
    return runs.save(folder, model, logits, found, first_answers=logits["val"][:2])


def _notes(model, teacher, dataset, which: tuple, history, notes: dict, figures: dict) -> dict:
    """What is kept of a training elsewhere. notes: its machine and versions."""
    from reference import experiments, fingerprints, measures, runs

    each, seed = which
    spec = {
        "code": runs.CODE, "dataset": "cifar10", "data": fingerprints.data_digest(dataset),
        "method": each.method, "seed": seed, **each.full_recipe().settings(),
        "architecture": fingerprints.architecture(model), "begins_with": None,
        "temperature": each.temperature if each.distilled else None,
        "alpha": each.alpha if each.distilled else None, "answers": None,
        "teacher": fingerprints.model_digest(teacher), "trainer": experiments._trainer(each)}
    return measures.notes(spec, model, figures, history, [notes["machine"]], teacher=teacher,
                          taught_by=each.taught_by(seed), versions=notes["versions"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Train or publish the best student of part H.")
    parser.add_argument("out", type=Path, help="the folder of weights and notes")
    parser.add_argument("--seconds", type=float, default=700, help="about how long it may take")
    parser.add_argument("--publish", action="store_true", help="measure and publish what is there")
    options = parser.parse_args()
    if options.publish:
        publish(options.out)
    else:
        run(options.out, options.seconds, log=functools.partial(print, flush=True))


if __name__ == "__main__":
    main()
