"""Many trainings at once: rows of a cluster equal those of one process, whatever dies."""

from reference import cluster, experiments, plan, runs, store  # isort: skip  (keeps TensorFlow quiet)
import contextlib
import functools
import importlib.util
import os
import pickle
import queue
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import psutil
import pytest
from test_experiments import SHORT, WILD, make  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
METHODS = "scratch-3-epochs", "distilled-3-epochs"
STEMS = [f"digits-{method}-seed{seed}" for method in METHODS for seed in (0, 1)]
needs_ray = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason=cluster.EXTRA)


def project(folder):
    """A copy of the project in which the rows of METHODS are missing."""
    shutil.copytree(ROOT / "reference", folder / "reference",
                    ignore=shutil.ignore_patterns("cifar10-*", "__pycache__"))
    shutil.copy(ROOT / "kdlib.py", folder)
    for stem in STEMS:
        (folder / "reference" / "rows" / f"{stem}.json").unlink()
    return folder


def start(folder, *options):
    """The command, on a copy of the project, one thread a training."""
    command = [sys.executable, "reference/experiments.py", "--dataset", "digits", "--cores", "1",
               *METHODS, *options]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env={**os.environ, "KD_RUNS_DIR": str(folder / "runs")},
                            # a job in the background of a shell would ignore Ctrl-C
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def finish(process):
    error = process.communicate(timeout=500)[1]
    assert process.returncode == 0, error[-3000:]


def result(folder, stem):
    """Row (but for the seconds), history (also), and digest of the weights."""
    notes = store.read_notes(folder / "reference" / "rows" / f"{stem}.json")
    for part in ("row", "history"):
        notes[part].pop("seconds")
    return notes["row"], notes["history"], notes["weights"], notes["spec"]


def wait_for(condition, process, seconds=400):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert process.poll() is None, process.stderr.read()[-3000:]
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)
    return found


def workers(process, stem):
    """The processes of a driver that train this run now."""
    found = []
    for each in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it may have just ended
            found += [each] if stem in " ".join(each.cmdline()) else []
    return found


def under_way(folder, stem):
    """The run's first epoch is kept, the second is not."""
    states = [path.name for path in folder.glob(f"runs/{stem}-*/state-?.npz")]
    return states == ["state-1.npz"]


@needs_ray
@pytest.mark.slow
def test_a_killed_worker_changes_no_bit(tmp_path):
    """Two workers against one process; one of each method dies in its second epoch."""
    one, many = project(tmp_path / "one"), project(tmp_path / "many")
    finish(start(one))
    process = start(many, "--workers", "2")
    killed = set()
    for stem in (STEMS[0], STEMS[2]):
        wait_for(lambda stem=stem: under_way(many, stem), process)
        for worker in workers(process, stem):
            os.kill(worker.pid, signal.SIGKILL)
            killed.add(stem)
        assert not list(many.glob(f"runs/{stem}-*/model.json"))
    finish(process)
    assert len(killed) == 2
    for stem in STEMS:
        assert result(one, stem) == result(many, stem)
    tables = [(folder / "reference" / "results.csv").read_text() for folder in (one, many)]
    assert len(tables[0].splitlines()) == len(tables[1].splitlines())
    asked = [sorted(path.name for path in folder.glob("runs/answers-*/*"))
             for folder in (one, many)]
    assert asked[0] and asked[0] == asked[1]
    assert not list(many.glob("runs/cluster-*"))


@needs_ray
@pytest.mark.slow
def test_after_an_interrupt_it_goes_on(tmp_path):
    folder = project(tmp_path / "it")
    process = start(folder, "--workers", "2")
    wait_for(lambda: under_way(folder, STEMS[0]), process)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert family and psutil.wait_procs(family, timeout=30)[1] == []
    state = max(folder.glob(f"runs/{STEMS[0]}-*/state-?.npz"))
    written = state.stat().st_mtime_ns
    process = start(folder, "--workers", "2")
    wait_for(lambda: workers(process, STEMS[0]), process)
    assert state.stat().st_mtime_ns == written
    finish(process)
    notes = store.read_notes(folder / "reference" / "rows" / f"{STEMS[0]}.json")
    assert len(notes["history"]["loss"]) == 3


class RayHere:
    """Ray in this process. What comes back was pickled, an error as the cause of Ray's own."""

    exceptions = types.SimpleNamespace(RayError=type("RayError", (Exception,), {}))

    def remote(self, **options):
        return lambda work: types.SimpleNamespace(options=lambda name: types.SimpleNamespace(
            remote=functools.partial(self.begin, work)))

    def begin(self, work, *arguments):
        try:
            result = work(*arguments)
        except Exception as error:
            result = error
        return functools.partial(pickle.loads, pickle.dumps(result))

    def wait(self, running, timeout):
        return running, []

    def get(self, begun):
        if isinstance(result := begun(), Exception):
            error = self.exceptions.RayError()
            error.cause = result
            raise error
        return result


@pytest.mark.slow
def test_a_run_that_diverges_on_a_worker_is_a_row_and_the_others_go_on(make, monkeypatch):  # noqa: F811
    queues = types.SimpleNamespace(Queue=lambda actor_options: queue.SimpleQueue())
    monkeypatch.setitem(sys.modules, "ray.util.queue", queues)
    monkeypatch.setattr(cluster, "connected", lambda **settings: contextlib.nullcontext(RayHere()))
    monkeypatch.setattr(cluster, "limit_threads", lambda cores: None)
    monkeypatch.setattr(cluster, "_maker", experiments.Maker)
    make()  # nothing: the empty folders
    table = (plan.Experiment("scratch-wild", **SHORT | {"recipe": WILD}),
             plan.Experiment("scratch", **SHORT))
    monkeypatch.setattr(experiments, "EXPERIMENTS", table)
    with pytest.raises(RuntimeError, match="1 of 2 runs were not made, .*scratch-wild.*diverged"):
        cluster.make([each.stem(0) for each in table], workers=2, publish=experiments.publish)
    assert experiments.missing(table) == []
    notes = store.read_notes(runs.REFERENCE / "rows" / "digits-scratch-wild-seed0.json")
    assert "diverged" in notes and notes["row"]["val_accuracy"] is None


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(experiments, "missing", lambda chosen: [])
    with pytest.raises(SystemExit, match="pip install -r reference/requirements-cluster.txt"):
        experiments.main(["--workers", "2"])


def test_a_cluster_that_does_not_let_us_in_is_named(monkeypatch):
    """Ray says no more than that it cannot connect, also where a token is missing."""
    def init(**given):
        raise ConnectionError("Failed to connect")

    fake = types.SimpleNamespace(init=init, shutdown=lambda: None)
    monkeypatch.setitem(sys.modules, "ray", fake)
    with pytest.raises(ConnectionError, match="address is 'head:6379': .*RAY_AUTH_MODE=token"):
        with cluster.connected(workers=1, cores=1, address="head:6379"):
            pass


def test_a_worker_that_sees_another_folder_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_RUNS_DIR", str(tmp_path / "here"))
    with cluster.shared_folder() as sign:
        cluster.ready(sign, cores=0)
        elsewhere = tmp_path / "there" / sign.name
        with pytest.raises(FileNotFoundError, match="is not the driver's runs folder"):
            cluster.ready(elsewhere, cores=0)
    assert not sign.exists()


def test_the_plan_asks_a_teacher_once_and_first():
    stems = [stem for stem in STEMS if "distilled" in stem]
    jobs = cluster.plan(stems)
    assert list(jobs)[0] == "digits-teacher-seed0"
    asked = [job.part for job in jobs.values() if job.part is not None]
    assert asked == ["val", "test", 0, 1, 2]
    order = list(jobs)
    for name, job in jobs.items():
        assert all(order.index(need) < order.index(name) for need in job.needs)


def test_the_plan_chooses_a_weight_before_it_is_used(monkeypatch):
    monkeypatch.setattr(experiments, "notes_of", lambda each, seed: None)
    name = "cifar10-distilled-5-epochs-at-kd"
    trials = [f"{name}-x{factor}-seed100" for factor in ("1", "0.1", "10")]
    jobs = cluster.plan([f"{name}-seed3"])
    assert set(trials) <= set(jobs[f"{name}-seed3"].needs) and set(trials) <= set(jobs)


def test_every_run_of_the_table_has_a_name_of_its_own():
    stems = [each.stem(seed) for each in experiments.EXPERIMENTS for seed in each.seeds]
    assert len(stems) == len(set(stems))
    for stem in stems[::17]:
        each, seed = experiments.run_of(stem)
        assert each.stem(seed) == stem
