"""Many trainings at once, on the cores of this machine or on a Ray cluster.

    python reference/experiments.py --workers 2 --cores 1
    python reference/experiments.py --workers 32 --cores 4 --address head-node:6379

Every training is a Ray task, and so is every part of a teacher's answers. The driver alone
writes into ``reference``. Workers write into the runs folder. All machines must see that folder
and this project at the same path. A worker that dies costs at most an epoch.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import shutil
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

from reference import experiments, runs, store  # isort: skip  (first: keeps TensorFlow quiet)
import keras
import tensorflow as tf
from kdlib import require

EXTRA = "pip install -r reference/requirements-cluster.txt"
RETRIES = 5  # of a task whose worker died


def limit_threads(cores: int | None) -> None:
    """Let TensorFlow compute with so many threads. Rounding depends on their number."""
    if cores and tf.config.threading.get_intra_op_parallelism_threads() != cores:
        tf.config.threading.set_intra_op_parallelism_threads(cores)


def needed(module: str, option: str):
    """Import a library that only a cluster needs, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise SystemExit(f"{option} needs {module.capitalize()}, which is not installed. "
                         f"Install it: {EXTRA}") from None


# --- the cluster ----------------------------------------------------------------------


@contextlib.contextmanager
def connected(*, workers: int, cores: int, address: str | None = None):
    """Ray, on a running cluster or on one of its own that is gone afterwards."""
    require(workers >= 1 and cores >= 1, f"workers is {workers}, cores {cores}. Give at least 1.")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = needed("ray", "--workers")
    logs = None if address else tempfile.mkdtemp(prefix="kd-ray-")
    own = {} if address else dict(num_cpus=workers * cores, include_dashboard=False,
                                  _temp_dir=logs)
    settings = {key: value for key, value in os.environ.items() if key.startswith(("KD_", "TF_"))}
    settings |= {"KD_RUNS_DIR": str(runs.runs_folder()), "PYTHONPATH": str(runs.ROOT)}
    try:
        try:
            ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR",
                     runtime_env={"env_vars": settings}, **own)
        except ConnectionError as error:
            raise ConnectionError(
                f"address is {address!r}: {error}. Start a cluster there with ray start --head. If "
                "it asks for a token, as Ray does by default, set RAY_AUTH_MODE=token here, and "
                "copy the head's ~/.ray/auth_token to every machine.") from None
        yield ray
    finally:  # workers of this driver end with it, also after Ctrl-C
        ray.shutdown()
        if logs:
            shutil.rmtree(logs, ignore_errors=True)


@contextlib.contextmanager
def shared_folder():
    """A sign in the runs folder, by which a worker knows that it sees the same folder."""
    sign = runs.runs_folder() / f"cluster-{uuid.uuid4().hex}"
    store.write_whole(sign, lambda aside: aside.touch())
    try:
        yield sign
    finally:
        sign.unlink(missing_ok=True)


def ready(sign: Path, cores: int) -> None:
    """What a worker does before its first task."""
    require(sign.exists(), f"{sign.parent} is not the driver's runs folder on {os.uname().nodename}"
            ". Set KD_RUNS_DIR to a path on a disk that all machines share, or use the workers of "
            "one machine only.", FileNotFoundError)
    limit_threads(cores)


# --- the jobs -------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A training, or a teacher's answers to one part of the images."""

    name: str  # unique; also the title of the process that does it
    stem: str  # the run to train, or one that learns from these answers
    part: str | int | None = None  # of the answers: "val", "test", the number of a view
    needs: tuple[str, ...] = ()


def plan(stems) -> dict[str, Job]:
    """All jobs behind these runs: their teachers first, then the answers, then themselves."""
    jobs = {}

    def add(stem):
        if stem in jobs:
            return
        each, seed = experiments.run_of(stem)
        found = [experiments.run_of(f"{each.dataset}-{name}") for name in each.teachers(seed)]
        teachers = tuple(teacher.stem(number) for teacher, number in found)
        trials = tuple(trial.stem(100) for trial in each.trials()
                       if experiments.notes_of(trial, 100) is None)
        for other in (*teachers, *trials):
            add(other)
        recipe, asked = each.full_recipe(), []
        views = range(min(recipe.views, recipe.epochs))
        for part in ("val", "test", *views) if teachers else ():
            name = (f"{each.dataset}-{each.taught_by(seed)}-shift{recipe.shift}-flip"
                    f"{recipe.flip:d}-answers-{part}").replace(" ", "+")
            jobs.setdefault(name, Job(name, stem, part, teachers))
            asked.append(name)
        jobs[stem] = Job(stem, stem, None, (*teachers, *trials, *asked))

    for stem in stems:
        add(stem)
    return jobs


@functools.cache
def _maker() -> experiments.Maker:
    return experiments.Maker()  # one a process: each dataset is loaded once


def work(job: Job, sign: Path, cores: int, news):
    """What a worker does: train, or ask a teacher. Returns history, row, folder of a training."""
    ready(sign, cores)
    maker, (each, seed) = _maker(), experiments.run_of(job.stem)
    if job.part is None:
        run = maker.make(each, seed, callbacks=[Told(news, job.name)])
        return run.history, run.row, run.folder
    runs.stored_answers(maker.teacher(each, seed), maker.data(each.dataset), job.part,
                        each.full_recipe())


class Told(keras.callbacks.Callback):
    """Tells the driver how many epochs of a run are done."""

    def __init__(self, news, name: str):
        super().__init__()
        self.news, self.name = news, name

    def on_epoch_end(self, epoch, logs=None):
        self.news.put((self.name, epoch + 1))


# --- the driver -----------------------------------------------------------------------


def make(stems, *, workers: int, cores: int = 1, address: str | None = None, bar=None,
         publish=None) -> dict[str, dict]:
    """Make runs with so many workers; returns their rows of results.csv.

    Args:
        stems: names of runs in the table, as ``digits-scratch-seed0``.
        workers: how many tasks at a time; cores: threads of each.
        address: of a running Ray cluster; by default one is started here, and stopped.
        bar: a tqdm bar, which counts estimated seconds.
        publish: called in the driver with (run, experiment) for each of the stems.

    Raises RuntimeError when all else is done, if a run failed.
    """
    jobs, rows, failed, epochs = plan(stems), {}, {}, {}
    with connected(workers=workers, cores=cores, address=address) as ray, shared_folder() as sign:
        news = importlib.import_module("ray.util.queue").Queue(actor_options={"num_cpus": 0})
        task = ray.remote(num_cpus=cores, max_retries=RETRIES)(work)

        def begin(job):
            return task.options(name=job.name).remote(job, sign, cores, news)

        for job, result in _results(ray, list(jobs.values()), begin, workers):
            if isinstance(result, Exception):
                cause = getattr(result, "cause", None)
                failed[job.name] = str(cause or result)
                if publish and job.name in stems and isinstance(cause, FloatingPointError):
                    experiments.publish_divergence(cause, *experiments.run_of(job.name))
            elif job and job.name in stems:
                rows[job.name] = result[1]
                epochs[job.name] = result[1]["epochs"]
                if publish:
                    publish(runs.Run(None, *result[:2], folder=result[2]),
                            experiments.run_of(job.name)[0])
            while not news.empty():
                epochs.update([news.get()])
            _show(bar, epochs, stems)
    sentences = "; ".join(f"{name}: {error}" for name, error in failed.items())
    require(not failed, f"{len(set(stems) - set(rows))} of {len(stems)} runs were not made, the "
            f"others were. {sentences}", RuntimeError)
    return rows


def _results(ray, waiting: list[Job], begin, workers: int):
    """Yield (job, result) as jobs end, an error as the result, and (None, None) between them."""
    running, done = {}, set()
    while True:
        for job in [job for job in waiting if done.issuperset(job.needs)]:
            if len(running) < workers:
                waiting.remove(job)
                running[begin(job)] = job
        if not running:
            return
        for ref in ray.wait(list(running), timeout=0.5)[0]:
            job = running.pop(ref)
            try:
                result = ray.get(ref)
                done.add(job.name)
            except ray.exceptions.RayError as error:
                result = error
                if isinstance(getattr(error, "cause", None), FloatingPointError):
                    done.add(job.name)  # of three trials one may diverge; see plan.chosen_factor
            yield job, result
        yield None, None


def _show(bar, epochs: dict, stems) -> None:
    """Move the bar to the estimated seconds of all epochs that are done."""
    if bar is None:
        return
    rate = _rate()
    past = sum(epochs.get(stem, 0) * rate(experiments.run_of(stem)[0]) for stem in stems)
    busy = [f"{stem} {count}" for stem, count in epochs.items()
            if count < experiments.run_of(stem)[0].full_recipe().epochs]
    bar.set_postfix_str(", ".join(busy)[:80], refresh=False)
    bar.update(past - bar.n)


_rate = functools.cache(experiments.seconds_per_epoch)
