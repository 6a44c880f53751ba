"""A student leaves the laboratory: the files that it is shipped in, and what they cost.

    python reference/shipping.py     measure the published models, write shipping.csv

Needs ai-edge-litert. Where onnx, tf2onnx and onnxruntime are missing, ONNX is left out.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import re
import socket
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path

if __name__ == "__main__":  # run as a file: the project's folder is not on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from reference import _greetings_held_back as quiet  # isort: skip  (first: quiet)
from reference import fingerprints, measures, runs, store
import kdlib
import keras
import numpy as np
import pandas as pd
import tensorflow as tf
from kdlib import require
from tqdm.auto import tqdm

MODELS = "cifar10-teacher-seed0", "cifar10-distilled-seed0", "cifar10-scratch-seed0"
LITERT = "float32", "float16", "int8-weights", "int8"
COLUMNS = ("model format kib accuracy agreement largest_difference latency_ms low high threads "
           "peak_mib machine versions").split()
CALIBRATION = 200  # training images that show the converter how large the activations are

# --- from Keras to a file -------------------------------------------------------------


def has_onnx() -> bool:
    return all(map(importlib.util.find_spec, ("onnx", "tf2onnx", "onnxruntime")))


def export(model, path, *, kind: str = "float32", class_names, calibration=None) -> Path:
    """Write a LiteRT file: raw pixels in, logits out, the class names inside.

    kind: "float32"; "float16" (weights); "int8-weights" (activations stay float32); "int8"
    (weights, activations, uint8 pixels in and int8 logits out), which needs calibration.
    calibration: training images, uint8 (N, H, W, C). Returns the path. Raises ValueError; warns
    of calibration images that would give pixels another scale.
    """
    path, classes = Path(path), kdlib.check_model("model", model)
    require(classes in (None, len(class_names)), f"class_names are {len(class_names)}, but the "
            f"model has {classes} classes.")
    require(kind in LITERT, f"kind is {kind!r}. Choose one of {', '.join(LITERT)}.")
    require(path.suffix == ".tflite", f"path is {path.name!r}. LiteRT files end with .tflite.")
    inputs = kdlib._inputs(model)
    require(len(inputs) == 1 and None not in inputs[0], f"model takes {inputs}. Give one that "
            "takes images of one size: a distiller's student, not the distiller.")
    settings = {"target_spec": {"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS]}}
    if kind != "float32":
        settings["optimizations"] = [tf.lite.Optimize.DEFAULT]
    if kind == "float16":
        settings["target_spec"]["supported_types"] = [tf.float16]
    if kind == "int8":
        require(calibration is not None and len(calibration), "calibration is missing. kind 'int8' "
                "needs training images, for the ranges of the activations.")
        measures.check_pixels("model", model, calibration)
        low, high = np.min(calibration), np.max(calibration)
        if (low, high) != (0, 255):  # the converter takes this range for that of all pixels
            warnings.warn(f"calibration has pixels from {low} to {high} only. The file would read "
                          f"0 as {low} and 255 as {high}. Give images that have both.",
                          stacklevel=2)
        settings["target_spec"]["supported_ops"] = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        settings |= dict(inference_input_type=tf.uint8, inference_output_type=tf.int8,
                         representative_dataset=lambda: (
                             [image[None].astype("float32")] for image in calibration))
    store.write_whole(path, lambda aside: _convert(model, aside, settings, class_names))
    return path


def _convert(model, path: Path, settings: dict, class_names) -> None:
    failure = None
    with quiet():  # converters and runtimes write to stderr from C++
        try:
            model.export(path, format="litert", verbose=False, **settings)
        except Exception as error:  # the converter has many kinds
            failure = str(error)
    lacking = ", ".join(sorted(set(re.findall(r"\btf\.([A-Z]\w+)", failure or ""))))
    require(failure is None, f"LiteRT cannot run this model: {lacking or str(failure)[:300]}. "
            "Replace that layer, or ship a SavedModel.")
    content = path.read_bytes()
    # A zip at the end of the file, as LiteRT's metadata has it. The runtime does not see it.
    with zipfile.ZipFile(path, "a") as attached:
        attached.writestr("labels.txt", "\n".join(class_names))
        attached.writestr("sha256.txt", hashlib.sha256(content).hexdigest())


class LiteRT:
    """A shipped file, as the LiteRT interpreter runs it.

    It answers raw pixels (N, H, W, C), one image at a time, with logits (N, classes). Raises
    ValueError for a file that is damaged, and for images of another size.
    """

    def __init__(self, path, *, threads: int = 1):
        from ai_edge_litert.interpreter import Interpreter

        path, failure = Path(path), None
        content = path.read_bytes()
        with quiet():
            try:
                with zipfile.ZipFile(path) as attached:
                    content = content[:attached.infolist()[0].header_offset]
                    self.class_names = attached.read("labels.txt").decode().splitlines()
                    want = attached.read("sha256.txt").decode()
                require(hashlib.sha256(content).hexdigest() == want, "some bytes have changed")
                self._runtime = Interpreter(model_content=content, num_threads=threads)
                self._runtime.allocate_tensors()
            except Exception as error:  # whatever a damaged file can do to its reader
                failure = error
        require(failure is None, f"{path.name} is damaged, or was not written by export "
                f"({failure}). Export the student again.")
        (self.input,), (self.output,) = (
            self._runtime.get_input_details(), self._runtime.get_output_details())

    def __call__(self, images) -> np.ndarray:
        images, size = np.asarray(images), tuple(map(int, self.input["shape"][1:]))
        require(images.shape[1:] == size, f"images have shape {images.shape}, but the file takes "
                f"(N, {', '.join(map(str, size))}). Resize them first.")
        require(images.dtype == np.uint8, f"images are {images.dtype}. The file takes raw pixels, "
                "uint8 from 0 to 255.")
        answers = np.concatenate([self._answer(images[k : k + 1]) for k in range(len(images))])
        scale, zero = self.output["quantization"]
        return (answers.astype("float32") - zero) * scale if scale else answers

    def _answer(self, image) -> np.ndarray:
        self._runtime.set_tensor(self.input["index"], image.astype(self.input["dtype"]))
        self._runtime.invoke()
        return self._runtime.get_tensor(self.output["index"])


def export_onnx(model, path) -> Path:
    """Write an ONNX file: float32 pixels in, logits out."""
    kdlib.check_model("model", model)
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    for layer in copy.layers:
        if isinstance(layer, keras.layers.Normalization):
            # tf2onnx makes inputs of the file out of tensors that are no variables.
            layer.mean, layer.variance = map(np.asarray, (layer.mean, layer.variance))
    copy(keras.ops.zeros((1, *kdlib._inputs(copy)[0])))  # Keras wants to have seen a call
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of NumPy, about tf2onnx
        copy.export(path, format="onnx", verbose=False)
    return Path(path)


def load_onnx(path):
    """A function from raw pixels to logits, on ONNX Runtime and one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images.astype("float32")})[0]


def export_saved_model(model, path) -> Path:
    """Write a SavedModel: a folder that TensorFlow runs without Keras."""
    with quiet():
        model.export(path, format="tf_saved_model", verbose=False)
    return Path(path)


def load_saved_model(path):
    """A function from raw pixels to logits."""
    module = tf.saved_model.load(path)
    return lambda images: module.serve(tf.constant(images, "float32")).numpy()


def compiled(model):
    """The Keras model as one graph: a function from raw pixels to logits."""
    graph = tf.function(lambda images: model(images, training=False))
    return lambda images: graph(tf.constant(images, "float32")).numpy()


# --- a server: serve.py ---------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def wait_for(port: int, *, seconds: float = 30.0) -> None:
    """Return as soon as somebody listens there. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection(("localhost", port), timeout=1).close()
        except OSError:
            require(time.monotonic() < end, f"nobody listens on port {port} after {seconds:g} "
                    "seconds. Start the server alone and read what it says.", TimeoutError)
            time.sleep(0.05)


# --- what it costs --------------------------------------------------------------------


def kib(path) -> float:
    """Size of a file or of a folder, in KiB."""
    path = Path(path)
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(each.stat().st_size for each in files) / 1024


def compare(logits, want, labels) -> dict[str, float]:
    """Accuracy, agreement with the wanted logits, largest difference of a logit."""
    return {"accuracy": float(np.mean(logits.argmax(-1) == labels)),
            "agreement": float(np.mean(logits.argmax(-1) == want.argmax(-1))),
            "largest_difference": float(np.abs(logits - want).max())}


def latencies(runners: dict, image, *, bursts: int = 30, calls: int = 20,
              warm_up: int = 20) -> dict[str, tuple[float, float, float]]:
    """Milliseconds an image, batch 1: median, lowest and highest of the medians of bursts.

    The runners take turns, a burst of calls each, so that a slow second of the machine meets
    all of them. The first calls, with whatever is compiled in them, are not counted.
    """
    medians = {name: [] for name in runners}
    for run in runners.values():
        for _ in range(warm_up):
            run(image[None])
    for _ in range(bursts):
        for name, run in runners.items():
            times = []
            for _ in range(calls):
                start = time.perf_counter()
                run(image[None])
                times.append(time.perf_counter() - start)
            medians[name].append(1000 * np.median(times))
    return {name: (float(np.median(each)), min(each), max(each))
            for name, each in medians.items()}


# Each in a process of its own, which imports what this format needs and nothing else.
_ALONE = {
    "litert": """
from ai_edge_litert.interpreter import Interpreter
student = Interpreter(model_path=path, num_threads=1)
student.allocate_tensors()
(pixels,) = student.get_input_details()
for _ in range(10):
    student.set_tensor(pixels["index"], np.zeros((1, 32, 32, 3), pixels["dtype"]))
    student.invoke()""",
    "onnx": """
import onnxruntime
student = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
for _ in range(10):
    student.run(None, {student.get_inputs()[0].name: np.zeros((1, 32, 32, 3), "float32")})""",
    "saved_model": """
import tensorflow as tf
student = tf.saved_model.load(path)
for _ in range(10):
    student.serve(tf.zeros((1, 32, 32, 3)))""",
    "keras": """
import keras
student = keras.saving.load_model(path, compile=False)
for _ in range(10):
    student(np.zeros((1, 32, 32, 3), "float32"))""",
}


def peak_mib(runtime: str, path) -> float:
    """Peak resident memory of a process that loads the file and answers ten images (Linux).

    nan where the system does not say. Python and the runtime are in it.
    """
    if not Path("/proc/self/status").exists():
        return float("nan")
    # Not resource.getrusage: a child begins with its parent's peak.
    code = (f"import numpy as np\npath = {str(path)!r}{_ALONE[runtime]}\n"
            "print(next(s for s in open('/proc/self/status') if s.startswith('VmHWM')))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1]) / 1024


def formats(model, weights: Path, folder: Path, dataset) -> dict[str, tuple]:
    """Every format: the runtime that runs it, its file, and a function from pixels to logits."""
    found = {"keras": ("keras", weights, compiled(model))}
    for kind in LITERT:
        path = export(model, folder / f"{weights.stem}-{kind}.tflite", kind=kind,
                      class_names=dataset.class_names, calibration=dataset.x_train[:CALIBRATION])
        found[f"litert-{kind}"] = "litert", path, LiteRT(path)
    path = export_saved_model(model, folder / weights.stem)
    found["saved_model"] = "saved_model", path, load_saved_model(path)
    if has_onnx():
        path = export_onnx(model, folder / f"{weights.stem}.onnx")
        found["onnx"] = "onnx", path, load_onnx(path)
    return found


def measure(names, *, machine: str, images: int | None = None, bursts: int = 30,
            memory: bool = True):
    """The rows of shipping.csv for these published models, all measured in one run."""
    rows, runners = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for name in tqdm(names, desc="export and compare", unit="model"):
            dataset = kdlib.load_dataset(name.partition("-")[0])
            x, y = dataset.x_test[:images], dataset.y_test[:images]
            weights = runs.REFERENCE / "weights" / f"{name}.keras"
            model = runs.published(name)
            want = runs.predict_logits(model, x)
            shipped = formats(model, weights, Path(folder), dataset)
            for kind, (runtime, path, run) in shipped.items():
                logits = want if kind == "keras" else np.concatenate([run(x[k : k + 1])
                                                                      for k in range(len(x))])
                runners[name, kind] = run
                rows.append({"model": name, "format": kind, "kib": round(kib(path), 1),
                             **compare(logits, want, y), "threads": 1,
                             "peak_mib": round(peak_mib(runtime, path), 1) if memory else None,
                             "machine": machine, "versions": versions()})
        found = latencies(runners, x[0], bursts=bursts)
    for row in rows:
        row |= zip(("latency_ms", "low", "high"), found[row["model"], row["format"]], strict=True)
    return pd.DataFrame(rows)[COLUMNS].round({"accuracy": 4, "agreement": 4, "latency_ms": 4,
                                              "largest_difference": 4, "low": 4, "high": 4})


def versions() -> str:
    from importlib.metadata import version

    more = ["ai-edge-litert", *(["onnxruntime"] if has_onnx() else [])]
    return ", ".join([fingerprints.libraries(), *(f"{name} {version(name)}" for name in more)])


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description="Measure the published models as files.")
    parser.add_argument("name", nargs="*", default=MODELS, help="stems of reference/weights")
    parser.add_argument("--out", type=Path, default=runs.REFERENCE / "shipping.csv")
    options = parser.parse_args(arguments)
    if [*options.name] != [*MODELS] and options.out == parser.get_default("out"):
        parser.error(f"name is {' '.join(options.name)}. shipping.csv compares what was measured "
                     "in one run: give all, or another file with --out")
    for name in options.name:
        if not (runs.REFERENCE / "weights" / f"{name}.keras").exists():
            parser.error(f"{name!r} is not in reference/weights")
    machine = fingerprints.machine()  # before it counts one thread
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    table = measure(options.name, machine=machine)
    store.write_whole(options.out, lambda aside: table.to_csv(aside, index=False))


if __name__ == "__main__":
    main()
