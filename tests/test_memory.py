"""Large data stay on the disk: what is held in memory does not grow with them."""

from reference import digests, measures, runs, store  # isort: skip  (keeps TensorFlow quiet)
import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import kdlib
import numpy as np
import pytest
from keras import Input, Model, layers
from test_distiller import tiny

ROOT = Path(__file__).resolve().parents[1]
MANY = """
import re, sys, threading, time
from dataclasses import replace
from pathlib import Path
from reference import runs
import kdlib
import numpy as np
from test_distiller import tiny

peak = 0  # of memory of its own, kB: pages of mapped files can be dropped when others need room


def watch():
    global peak
    while True:
        status = Path("/proc/self/status").read_text()
        peak = max(peak, int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]))
        time.sleep(0.02)


threading.Thread(target=watch, daemon=True).start()
path, count = sys.argv[1], 100_000
images = np.lib.format.open_memmap(path, "w+", "uint8", (count, 32, 32, 3))
rng = np.random.default_rng(0)
for k in range(0, count, 10_000):
    images[k : k + 10_000] = rng.integers(0, 256, (10_000, 32, 32, 3), "uint8")
images.flush()
del images
digits = kdlib.load_dataset("digits")
data = replace(digits, x_train=np.load(path, mmap_mode="r"),
               y_train=np.arange(count, dtype="int32") % 10)
before = peak
recipe = runs.Recipe(epochs=1, batch_size=1000, views=1, flip=True)
run = runs.train_or_load("distilled", data, build=lambda: tiny(4, seed=1), teacher=tiny(8),
                         recipe=recipe)
assert len(run.history["loss"]) == 1
print(before // 1024, peak // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted in other units")
def test_100_000_images_stay_on_the_disk(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", MANY, str(tmp_path / "images.npy")], capture_output=True, text=True,
        env={**os.environ, "KD_RUNS_DIR": str(tmp_path),
             "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])})
    assert done.returncode == 0, done.stderr[-3000:]
    before, peak = map(int, done.stdout.split()[-2:])  # in MiB
    assert peak < 2000
    assert peak - before < 250, "a copy of the images would be 293"


def test_stored_answers_are_mapped(tmp_path):
    array = np.random.default_rng(0).normal(size=(50, 10)).astype("float32")
    store.write_array(tmp_path / "a.npy", array)
    kept = store.read_array(tmp_path / "a.npy")
    assert isinstance(kept, np.memmap)
    np.testing.assert_array_equal(kept, array)
    content = (tmp_path / "a.npy").read_bytes()
    assert content[-32:] == hashlib.sha256(content[:-32]).digest()
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), array)


@pytest.mark.parametrize("array", [
    np.arange(6, dtype="int32").reshape(2, 3).T, np.float32(3.5), np.zeros((0, 4)),
    np.array(["a", "bc"])], ids=["strided", "number", "empty", "words"])
def test_a_digest_is_of_dtype_shape_and_bytes(array):
    array = np.asarray(array)
    want = hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()
    assert digests.digest(array) == want


def test_answers_in_pieces_are_those_in_one(monkeypatch):
    digits, teacher = kdlib.load_dataset("digits"), tiny(8)
    images = digits.x_train[:60]
    codes = kdlib.view_codes(images=60, views=1, shift=4, flip=True)[0]
    seen = kdlib.augment(images, codes)
    whole = teacher.predict(seen, batch_size=60, verbose=0)
    monkeypatch.setattr(measures, "batch_size", lambda images: 1)  # pieces of 20 images
    np.testing.assert_allclose(runs.predict_logits(teacher, images, codes=codes), whole,
                               rtol=1e-5, atol=1e-5)


def test_large_images_come_in_smaller_batches():
    assert measures.batch_size(np.zeros((1, 32, 32, 3))) == 500
    assert measures.batch_size(np.zeros((1, 8, 8, 3))) == 500
    assert measures.batch_size(np.zeros((1, 224, 224, 3))) == 10
    assert measures.batch_size(np.zeros((1, 4000, 4000, 3))) == 1


@pytest.mark.long
@pytest.mark.slow
def test_images_of_224_pixels(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_RUNS_DIR", str(tmp_path))
    digits = kdlib.load_dataset("digits")

    def large(images):
        return np.kron(images[:12], np.ones((1, 7, 7, 1), "uint8"))

    def build():
        pixels = Input((224, 224, 3))
        x = layers.AveragePooling2D(7)(layers.Rescaling(1 / 255)(pixels))
        return Model(pixels, layers.Dense(10)(layers.GlobalMaxPooling2D()(x)))

    data = replace(digits, **{f"{a}_{part}": (large if a == "x" else lambda y: y[:12])(
        getattr(digits, f"{a}_{part}")) for a in "xy" for part in ("train", "val", "test")})
    recipe = runs.Recipe(epochs=1, batch_size=4, views=1)
    run = runs.train_or_load("distilled", data, build=build, teacher=build(), recipe=recipe)
    assert np.isfinite(run.history["loss"]).all()
