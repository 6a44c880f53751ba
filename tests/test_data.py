"""Data: splits, views, and files that are not what they should be."""

from reference import fingerprints, store  # isort: skip  (first: keeps TensorFlow quiet)
import hashlib
import pickle
import shutil
import tarfile
from dataclasses import replace

import kdlib
import keras
import numpy as np
import pytest
from conftest import CIFAR10, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp


@pytest.fixture(scope="module")
def digits():
    return kdlib.load_dataset("digits")


def test_digits_shapes_and_determinism(digits):
    for part in ("train", "val", "test"):
        x, y = getattr(digits, f"x_{part}"), getattr(digits, f"y_{part}")
        assert x.dtype == np.uint8 and x.shape[1:] == (32, 32, 3)
        assert y.dtype == np.int32 and len(x) == len(y) and set(y) == set(range(10))
    again = kdlib.load_dataset("digits")
    assert fingerprints.data_digest(digits) == fingerprints.data_digest(again)
    assert len(digits.x_val) == 150 and len(digits.x_test) == 447


def test_digits_do_not_leak(digits):
    seen = {image.tobytes() for image in digits.x_train}
    assert not any(image.tobytes() in seen for image in [*digits.x_val, *digits.x_test])


def test_the_environment_chooses(monkeypatch):
    monkeypatch.setenv("KD_DATASET", "digits")
    assert kdlib.load_dataset().name == "digits"


def test_unknown_name():
    with pytest.raises(ValueError, match="'mnist'.*'cifar10' or 'digits'"):
        kdlib.load_dataset("mnist")


# --- cifar10.npz ---


def small_arrays():
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (600, 32, 32, 3)).astype("uint8"),
        "y_train": np.arange(600) % 10,
        "x_test": rng.integers(0, 256, (100, 32, 32, 3)).astype("uint8"),
        "y_test": np.arange(100) % 10,
    }


def sha256(x, y):
    order = np.argsort([hashlib.sha1(image.tobytes()).digest() for image in x])
    return hashlib.sha256(x[order].tobytes() + y[order].astype("int32").tobytes()).hexdigest()


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A folder that stands for KD_DATA_DIR, and arrays of a CIFAR-10 small enough to write."""
    monkeypatch.setenv("KD_DATA_DIR", str(tmp_path))
    monkeypatch.delenv("KD_DATASET", raising=False)
    arrays = small_arrays()
    monkeypatch.setattr(kdlib, "CIFAR10_SHA256", tuple(
        sha256(arrays[f"x_{part}"], arrays[f"y_{part}"]) for part in ("train", "test")))
    return tmp_path / "cifar10.npz", arrays


def refused(path, match=""):
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"(?s)cifar10.npz is damaged, or not CIFAR-10.*{match}"
                                         ".*Fetch it again"):
        kdlib.load_dataset()
    assert path.read_bytes() == before


def test_the_small_cifar10_is_read(cifar):
    path, arrays = cifar
    np.savez(path, **arrays)
    dataset = kdlib.load_dataset()
    assert dataset.name == "cifar10" and len(dataset.x_val) == 60 and len(dataset.x_test) == 100
    assert (np.bincount(dataset.y_val) == 6).all()


def test_truncated_file(cifar):
    path, arrays = cifar
    np.savez(path, **arrays)
    path.write_bytes(path.read_bytes()[:100_000])
    refused(path)


def test_flipped_bytes(cifar):
    path, arrays = cifar
    np.savez_compressed(path, **arrays)
    content = bytearray(path.read_bytes())
    content[50_000:50_064] = bytes(64)
    path.write_bytes(content)
    refused(path)


def change(name, index, value):
    def changed(arrays):
        arrays[name] = arrays[name].copy()
        arrays[name][index] = value(arrays[name][index])

    return changed


@pytest.mark.parametrize("spoil", [
    change("x_train", (5, 0, 0, 0), lambda pixel: pixel ^ 1),
    change("y_test", 3, lambda label: (label + 1) % 10),
    lambda arrays: arrays.update(x_test=arrays["x_test"].transpose(0, 3, 1, 2)),
    lambda arrays: arrays.update(x_train=arrays["x_train"] / 255),
    lambda arrays: arrays.update(x_train=arrays["x_train"][1:], y_train=arrays["y_train"][1:]),
    lambda arrays: arrays.pop("y_test"),
])
def test_data_that_are_not_cifar10(cifar, spoil):
    path, arrays = cifar
    spoil(arrays)
    np.savez(path, **arrays)
    refused(path)


def official(arrays, folder):
    """The arrays as the official batches: five to train, one to test, channels first."""
    folder.mkdir()
    names = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
    x = [*np.split(arrays["x_train"], 5), arrays["x_test"]]
    y = [*np.split(arrays["y_train"], 5), arrays["y_test"]]
    for name, images, labels in zip(names, x, y, strict=True):
        flat = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        content = pickle.dumps({b"data": flat, b"labels": labels.tolist()}, protocol=2)
        (folder / name).write_bytes(content)


def test_the_official_archive_packed_and_unpacked(cifar):
    path, arrays = cifar
    np.savez(path, **arrays)
    want = fingerprints.data_digest(kdlib.load_dataset())
    path.unlink()
    folder = path.parent / "cifar-10-batches-py"
    official(arrays, folder)
    assert fingerprints.data_digest(kdlib.load_dataset()) == want
    archive = packed(folder)
    assert fingerprints.data_digest(kdlib.load_dataset()) == want
    archive.write_bytes(archive.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="tar.gz is damaged, or not CIFAR-10.*Fetch it again"):
        kdlib.load_dataset()


def packed(folder):
    """Pack the folder of the batches, as the official archive does, and remove it."""
    archive = folder.parent / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, folder.name)
    shutil.rmtree(folder)
    return archive


class Boom:
    opened = False

    def __reduce__(self):
        return exec, ("import test_data; test_data.Boom.opened = True",)


def test_pickled_objects_are_never_loaded(cifar):
    path, arrays = cifar
    np.savez(path, **{**arrays, "y_train": np.array([Boom()] * 600, dtype=object)})
    refused(path, "allow_pickle|Object arrays")
    path.unlink()
    folder = path.parent / "cifar-10-batches-py"
    official(arrays, folder)
    (folder / "test_batch").write_bytes(pickle.dumps(Boom()))
    for store_as in (lambda folder: folder, packed):
        store_as(folder)
        with pytest.raises(ValueError, match="damaged.*it asks for builtins.exec"):
            kdlib.load_dataset()
    assert not Boom.opened


def test_labels_as_a_column_are_welcome(cifar):
    """Keras's own copy of CIFAR-10 has labels of shape (N, 1)."""
    path, arrays = cifar
    np.savez(path, **{**arrays, "y_train": arrays["y_train"][:, None]})
    assert kdlib.load_dataset("cifar10").y_train.shape == (540,)


def test_a_tilde_is_the_home_folder(cifar, monkeypatch):
    path, arrays = cifar
    np.savez(path, **arrays)
    monkeypatch.setenv("HOME", str(path.parent.parent))
    monkeypatch.setenv("KD_DATA_DIR", f"~/{path.parent.name}")
    assert kdlib.load_dataset("cifar10").name == "cifar10"


@pytest.mark.skipif(not CIFAR10.exists(), reason="no cifar10.npz in KD_DATA_DIR")
def test_the_real_cifar10_and_its_published_split():
    dataset = kdlib.load_dataset("cifar10")
    for y, images in ((dataset.y_train, 4500), (dataset.y_val, 500), (dataset.y_test, 1000)):
        assert (np.bincount(y) == images).all()
    notes = store.read_notes(ROOT / "reference" / "rows" / "cifar10-scratch-seed0.json")
    assert fingerprints.data_digest(dataset) == notes["spec"]["data"]


def no_network(*args, **kwargs):
    raise OSError("no route to host")


@pytest.fixture
def offline(monkeypatch):
    """Nothing set, nothing there, no network."""
    monkeypatch.delenv("KD_DATA_DIR", raising=False)
    monkeypatch.delenv("KD_DATASET", raising=False)
    monkeypatch.setattr(kdlib, "CIFAR10_FILES", ("no-such-file",))
    monkeypatch.setattr(keras.datasets.cifar10, "load_data", no_network)


def test_without_cifar10_digits_come_with_a_notice(offline, capsys):
    assert kdlib.load_dataset().name == "digits"
    said = capsys.readouterr().out
    assert "DIGITS" in said and "no route to host" in said


@pytest.mark.parametrize("error", [TimeoutError(), ValueError("Incomplete or corrupted file")])
def test_whatever_a_download_ends_with(offline, monkeypatch, capsys, error):
    """An error without words, a page of a captive portal in place of the archive."""
    def fail():
        raise error

    monkeypatch.setattr(keras.datasets.cifar10, "load_data", fail)
    assert kdlib.load_dataset().name == "digits"
    assert repr(error) in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="download failed.*KD_DATA_DIR"):
        kdlib.load_dataset("cifar10")


def test_cifar10_asked_for_and_not_there(offline):
    with pytest.raises(FileNotFoundError, match="no route to host.*KD_DATA_DIR"):
        kdlib.load_dataset("cifar10")


@pytest.mark.parametrize("name", [None, "cifar10"])
def test_a_folder_that_is_set_and_wrong(offline, monkeypatch, tmp_path, name):
    """Neither a download nor digits: the value and the folder are named."""
    monkeypatch.setattr(keras.datasets.cifar10, "load_data", lambda: pytest.fail("downloaded"))
    file = tmp_path / "a file"
    file.write_text("no folder")
    for value, folder in ((str(tmp_path), tmp_path), ("~/nothing", f"{tmp_path}/nothing"),
                          (str(file), file)):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("KD_DATA_DIR", value)
        with pytest.raises(FileNotFoundError, match=f"KD_DATA_DIR is '{value}'.*{folder}"):
            kdlib.load_dataset(name)
    assert kdlib.load_dataset("digits").name == "digits"


def test_the_split_does_not_depend_on_the_order_of_the_file(cifar):
    path, arrays = cifar
    np.savez(path, **arrays)
    first = fingerprints.data_digest(kdlib.load_dataset())
    mixed = np.random.default_rng(1).permutation(600)
    np.savez(path, **{**arrays, "x_train": arrays["x_train"][mixed],
                      "y_train": arrays["y_train"][mixed]})
    assert fingerprints.data_digest(kdlib.load_dataset()) == first


# --- a dataset of one's own ---


@pytest.mark.parametrize("part, change, said", [
    ("x_val", lambda x: (x / 255).astype("float32"), "x_val is float32 .*Give raw pixels"),
    ("x_train", lambda x: x[..., 0], "x_train is uint8 .*Give raw"),
    ("x_test", lambda x: x.tolist(), "x_test is .*list"),
    ("y_train", lambda y: y + 1, r"y_train is int32 .*Give 2400 class numbers"),
    ("y_train", lambda y: y - 2, "y_train is int32"),
    ("y_val", lambda y: np.where(y == 3, -1, y), "y_val is .*integers from 0 to 9"),
    ("y_test", lambda y: np.eye(10)[y], "y_test is float64"),
    ("y_test", lambda y: y[:-1], "y_test is int32"),
    ("y_test", lambda y: y.tolist(), "y_test is .*list"),
])
def test_a_dataset_that_does_not_fit_together(digits, part, change, said):
    with pytest.raises(ValueError, match=said):
        replace(digits, **{part: change(getattr(digits, part))})


@settings(deadline=None, derandomize=True)
@given(st.sampled_from(["x_train", "x_val", "y_train", "y_test"]), hnp.arrays(
    st.sampled_from(["uint8", "int8", "int32", "uint16", "float32", "bool", "complex64", "U2"]),
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3)))
def test_any_array_is_taken_or_named(part, array):
    small = {f"x_{name}": np.zeros((2, 4, 4, 3), "uint8") for name in ("train", "val", "test")}
    small |= {f"y_{name}": np.zeros(2, "int32") for name in ("train", "val", "test")}
    try:
        made = kdlib.Dataset("small", list("abc"), **{**small, part: array})
    except ValueError as error:
        assert str(error).startswith((part, "y_" + part[2:])), error
    else:
        assert len(getattr(made, "x" + part[1:])) == len(getattr(made, "y" + part[1:]))


def test_data_sets_are_compared_by_which_they_are(digits):
    """Arrays have no single answer to ``==``: the question whether they are equal would fail."""
    assert (digits == digits) is True and (digits == replace(digits)) is False


def test_an_unknown_training_label_is_welcome(digits):
    replace(digits, y_train=np.full_like(digits.y_train, -1))


# --- views ---


def test_a_view_against_padding_and_cropping():
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3)).astype("uint8")
    codes = kdlib.view_codes(images=40, views=2, shift=4, flip=True)[1]
    got = kdlib.augment(images, codes)
    padded = np.pad(images, [(0, 0), (4, 4), (4, 4), (0, 0)], mode="reflect")
    for k, (dy, dx, mirrored) in enumerate(codes):
        crop = padded[k, 4 + dy : 36 + dy, 4 + dx : 36 + dx]
        np.testing.assert_array_equal(got[k], crop[:, ::-1] if mirrored else crop)


def test_views_are_a_function_of_image_and_number():
    few = kdlib.view_codes(images=50, views=2, shift=4, flip=True)
    many = kdlib.view_codes(images=50, views=5, shift=4, flip=True)
    np.testing.assert_array_equal(few, many[:2])
    assert (many[..., 2].sum(0) >= 2).all()  # flips alternate
    assert many[..., :2].min() == -4 and many[..., :2].max() == 4
    assert not kdlib.view_codes(images=50, views=2, shift=0, flip=False).any()


def test_a_part_without_images_or_of_another_size():
    digits = kdlib.load_dataset("digits")
    for x, y in ((digits.x_val[:0], digits.y_val[:0]), (digits.x_val[:, :16], digits.y_val)):
        with pytest.raises(ValueError, match="x_val is uint8 .*of one size"):
            replace(digits, x_val=x, y_val=y)
