"""The engine of part I after 5 epochs: seeds side by side, beside Keras's own fit."""

from reference import experiments, features, fingerprints, lanes, plan, runs, store  # isort: skip  (first: keeps TensorFlow quiet)
import json
import os
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import kdlib
import numpy as np
import pytest
from conftest import ROOT
from test_distiller import python_with

ON_JAX = """
import sys
sys.path.insert(0, "tests")
from dataclasses import replace
from pathlib import Path

import kdlib
import keras
import numpy as np
from pictures import data, pictures
from reference import lanes, recipes

codes = kdlib.view_codes(images=100, views=20, shift=4, flip=True)


def small():  # its layers have the usual names
    return kdlib._vgg(((8,), (8, 8), (8, 8)), num_classes=10, name="small")


def of(name, optimizer="sgd", **more):
    each = lanes.chosen([name])[0]
    recipe = each.recipe | {"epochs": 2, "batch_size": 50, "optimizer": optimizer}
    return replace(each, build=small, seeds=(0, 1), recipe=recipe, **more)


def fitted(each, seed, teacher):
    # the same by Keras's fit
    keras.utils.set_random_seed(seed)
    student = trainer = small()
    if each.distilled:
        settings = dict(student=student, teacher=teacher, temperature=each.temperature,
                        alpha=each.alpha)
        trainer = (each.trainer()(**settings, labels=data.y_train) if each.loss
                   else kdlib.Distiller(**settings))
    recipes.compile_for(trainer, each.full_recipe(), data, distilled=each.distilled,
                        last_layer="logits")
    trainer.jit_compile = True
    for k in range(2):
        order = np.random.default_rng([seed, k]).permutation(100)
        seen = kdlib.augment(data.x_train, codes[k])[order]
        if each.distilled:
            answers = np.asarray(teacher(seen, training=False))
            number = [order[:, None]] if each.loss == "crd" else []
            seen = seen, np.concatenate([answers, *number], axis=-1).astype("float32")
        trainer.fit(seen, data.y_train[order], batch_size=50, shuffle=False, verbose=0)
    return student.get_weights()


def strayed(experiments, folder):
    # how far the weights lie from fit's, beside how far they moved: the worst of each experiment
    session = lanes.Session(folder, experiments, data)
    session()
    found = {}
    for each in experiments:
        for seed in each.seeds[each.distilled:]:  # of a distilled one the last: fit takes its time
            with np.load(folder / f"{each.method}-seed{seed}.npz") as file:
                got = [file[key] for key in file.files if key != "notes"]
            keras.utils.set_random_seed(seed)
            first, want = small().get_weights(), fitted(each, seed, session.teacher)
            apart, way = (sum(np.sum((a - b) ** 2) for a, b in zip(want, other, strict=True)) ** 0.5
                          for other in (got, first))
            found[each.method] = max(found.get(each.method, 0), apart / way)
    print(found)
    return found


code = lanes.terms(of("distilled-5-epochs-crd-kd", factor=1.0), 0, "", small())["code"]
folder, kinds, kind = Path(sys.argv[1]), [], lanes.Kind
lanes.Kind = lambda *given: kinds.append(given) or kind(*given)
rounded, lanes.rounded, lanes.LANES = lanes.rounded, lambda *_: None, 3  # one lane fills up
if sys.argv[2] == "muon":  # its steps have one length: rounding grows
    shares = strayed([of("scratch-5-epochs-lanes", "muon")], folder)
    assert max(shares.values()) < 1e-2, shares
else:
    shares = strayed([of("scratch-5-epochs-lanes"),
                      of("distilled-5-epochs-crd", factor=0.1),  # a large one magnifies rounding
                      of("distilled-5-epochs-crd-kd", factor=0.1)], folder)
    assert max(shares.values()) < 1e-4, shares
    assert len(kinds) == 2  # alpha alone differs between the last two: they share their epoch

images, found = pictures(20)[0], []
for kind in (lanes._Rounded, lanes._AsProduct):
    keras.utils.set_random_seed(0)
    model = small()
    exact = np.asarray(model(images, training=False))
    rounded(model, kind)
    found.append(np.asarray(model(images, training=False)))
    assert np.any(exact != found[-1])
for close in (exact, found[1]):
    np.testing.assert_allclose(found[0], close, atol=0.05 * np.abs(exact).max())
print(*code, "fine")
"""


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("muon", marks=pytest.mark.long)])
def test_lanes_train_as_fit_does(optimizer, tmp_path):
    """Same first weights, batches, views, answers and optimizer: the same students."""
    done = subprocess.run(
        [python_with("jax"), "-c", ON_JAX, str(tmp_path), optimizer],
        capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": "jax", "TF_CPP_MIN_LOG_LEVEL": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    (each,) = lanes.chosen(["distilled-5-epochs-crd-kd"])
    code = lanes.terms(replace(each, factor=1.0), 0, "", kdlib.build_student())["code"]
    said = f"{' '.join(code)} fine"  # the same with and without JAX at hand
    assert done.stdout.splitlines()[-1] == said, done.stdout


# --- the choice of a weight ---


def history_of(accuracy, loss=1.0):
    found = {"loss": loss, "accuracy": 0.5, "val_accuracy": accuracy, "seconds": 1.0}
    return {key: [value] * 5 for key, value in found.items()}


@pytest.mark.parametrize("accuracies, factor", [
    ((0.8, 0.9, 0.7), 0.1), ((0.9, 0.9, 0.9), 1.0), ((-1, 0.2, 0.3), 10.0), ((-1, -1, -1), None)])
def test_the_best_trial_chooses_the_weight(accuracies, factor, tmp_path, monkeypatch):
    """For the seeds that follow on the device, and for the notes that are published."""
    each, trained = lanes.chosen(["distilled-5-epochs-at"])[0], []
    histories = [history_of(a, 1.0 if a >= 0 else np.nan) for a in accuracies]

    def train(todo, kind, epoch):
        trained.append([(one.method, seed, one.factor) for one, seed in todo])
        return [{"history": history} for history in histories]

    session = SimpleNamespace(_trained=train, log=lambda *_: None)
    lanes.Session._make(session, each, None, None)
    assert trained[0] == [(f"{each.method}-x{x:g}", 100, x) for x in (1.0, 0.1, 10.0)]
    assert trained[1:] == ([[(each.method, seed, factor) for seed in each.seeds]] if factor else [])

    monkeypatch.setattr(runs, "REFERENCE", tmp_path)
    for trial, history, accuracy in zip(each.trials(), histories, accuracies, strict=True):
        store.write_notes(tmp_path / "rows" / f"{trial.stem(100)}.json", {
            "history": history, **({"diverged": "so"} if accuracy < 0 else {})})
    if factor:
        assert plan.chosen_factor(each) == factor
        assert each.trainer().weight == factor * features.METHODS["at"].weight
    else:
        with pytest.raises(ValueError, match="all trials .* diverged"):
            plan.chosen_factor(each)


# --- publishing ---


@pytest.fixture
def back(tmp_path, monkeypatch):
    """A function that writes a run as it comes back, publishes it, and returns its row."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (30, 32, 32, 3)).astype("uint8") for _ in range(3)]
    labels = np.arange(30, dtype="int32") % 10
    data = kdlib.Dataset("cifar10", kdlib.CIFAR10_CLASSES, images[0], labels, images[1], labels,
                         images[2], labels)
    monkeypatch.setattr(runs, "REFERENCE", tmp_path)
    for name in ("rows", "answers", "weights"):
        (tmp_path / name).mkdir()
    teacher, digest = kdlib.build_teacher(), fingerprints.data_digest(data)
    weights = {f"{k:03d}": v for k, v in enumerate(kdlib.build_student().get_weights())}

    def publish(method="distilled-5-epochs-lanes", history=None, **changed):
        each = replace(lanes.chosen([method.removesuffix("-x1")])[0], method=method,
                       choice=method.endswith("-x1"), factor=1.0)
        notes = {"terms": json.loads(json.dumps(lanes.terms(each, 0, digest, teacher))) | changed,
                 "history": history or history_of(0.5), "machine": "a machine",
                 "versions": "jax 1"}
        path = tmp_path / "what-came-back" / "run.npz"
        path.parent.mkdir(exist_ok=True)
        np.savez(path, notes=json.dumps(notes), **weights)
        lanes.publish_one(path, each, 0, data, digest, teacher)
        return store.read_notes(tmp_path / "rows" / f"{each.stem(0)}.json")["row"]

    return publish


def test_what_comes_back_is_measured_here(back):
    row = back()
    assert (row["machine"], row["versions"], row["seconds"]) == ("a machine", "jax 1", 5)
    assert 0 <= row["test_accuracy"] <= 1 and row["epochs"] == 5
    assert 0 <= row["agreement"] <= 1 and row["teacher"] == "teacher-seed0"


def test_a_trial_is_not_tested(back):
    row = back("distilled-5-epochs-at-x1")
    assert row["val_accuracy"] is not None and row["test_accuracy"] is None


@pytest.mark.parametrize("term", ["code", "name", "seed", "data", "teacher", "recipe",
                                  "temperature", "alpha", "weight"])
def test_a_run_on_other_terms_is_refused(back, term):
    with pytest.raises(ValueError, match=f"trained with another {term}"):
        back(**{term: "another"})


def test_a_run_that_is_cut_off_is_refused(back):
    with pytest.raises(ValueError, match="has 2 epochs"):
        back(history={"loss": [1.0, 1.0]})


def test_a_run_that_diverged_is_a_row_without_figures(back):
    row = back(history=history_of(0.5, np.nan))
    assert row["test_accuracy"] is None and row["machine"] == "a machine"


def test_a_damaged_file_costs_no_other(tmp_path, monkeypatch):
    one = np.zeros(1)
    monkeypatch.setattr(kdlib, "load_dataset", lambda _: SimpleNamespace(**{
        f"{a}_{part}": one for a in "xy" for part in ("train", "val", "test")}))
    monkeypatch.setattr(lanes, "_published", lambda name: None)
    monkeypatch.setattr(experiments, "notes_of", lambda *_: None)
    for seed, content in enumerate([b"", b"PK", None]):
        path = tmp_path / f"scratch-5-epochs-lanes-seed{seed}.npz"
        path.write_bytes(content) if content is not None else np.savez(path, notes="{}")
    said = []
    lanes.publish(tmp_path, log=lambda *words: said.append(words))
    assert [words[:2] for words in said] == [
        (f"scratch-5-epochs-lanes-seed{seed}", "is not published:") for seed in range(3)]


def test_elsewhere_it_is_refused_with_a_sentence():
    (each,) = lanes.chosen(["distilled-5-epochs-lanes"])
    with pytest.raises(ValueError, match="python reference/lanes.py"):
        experiments.Maker().settings(each, 0)
    with pytest.raises(ValueError, match="scratch is not made by lanes.py"):
        lanes.chosen(["scratch"])


def test_what_waits_for_trials_from_elsewhere_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "REFERENCE", tmp_path)
    wanted = [each for each in plan.EXPERIMENTS if each.method in ("distilled-dkd", "scratch")
              and each.dataset == "cifar10"]
    assert {each.method for each, _ in experiments.to_make(wanted)} == {"scratch"}
