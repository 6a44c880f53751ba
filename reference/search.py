"""Choose the temperature and alpha on validation, with a fixed budget of trials.

    python reference/search.py --dataset digits --trials 12
    python reference/search.py --dataset cifar10 --epochs 5 --trials 26 --workers 2

The study lives in a journal file in the runs folder, or in a database: ``--storage URL``. Begun
again it goes on, also in the middle of a trial. A student below the median of the others at the
same epoch is given up. The test set is not looked at. The trials are written to search.csv.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":  # run as a file: the project's folder is not on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from reference import cluster, digests, fingerprints, plan, runs, store  # isort: skip  (keeps TensorFlow quiet)
import keras
import numpy as np
import pandas as pd
from kdlib import require
from tqdm.auto import tqdm

COLUMNS = "dataset trial temperature alpha state epochs_done epochs val_accuracy machine".split()
SEED = 100  # of every student: seeds from 100 on are for choosing


@dataclass(frozen=True)
class Search:
    """What is searched; the same settings find the same study again."""

    dataset: str = "digits"
    epochs: int | None = None  # by default the published recipe's
    storage: str | None = None  # a database by its URL; by default a journal file
    random_trials: int = 5  # before the sampler learns from what it saw
    temperatures: tuple[float, float] = (1.0, 16.0)  # searched on a logarithmic scale
    alphas: tuple[float, float] = (0.0, 0.9)

    @property
    def recipe(self) -> runs.Recipe:
        recipe = runs.recipe_for(plan._Name(self.dataset), "student")
        return replace(recipe, epochs=self.epochs or recipe.epochs)

    @property
    def name(self) -> str:
        notes = store.read_notes(runs.REFERENCE / "rows" / f"{self.dataset}-teacher-seed0.json")
        known_by = digests.digest(self.recipe.settings(), self.temperatures, self.alphas,
                                       self.random_trials, runs.CODE, notes["model"])
        return f"search-{self.dataset}-{self.recipe.epochs}-epochs-{known_by[:8]}"

    def study(self):
        """The study as it stands, with a sampler for its next trial."""
        optuna = cluster.needed("optuna", "search.py")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = self.storage
        if storage is None:
            runs.runs_folder().mkdir(parents=True, exist_ok=True)
            backend = optuna.storages.journal.JournalFileBackend(
                str(runs.runs_folder() / f"{self.name}.log"))
            storage = optuna.storages.JournalStorage(backend)
        study = optuna.create_study(storage=storage, study_name=self.name, direction="maximize",
                                    load_if_exists=True)
        # The seed depends on how many trials there are: begun again, the search goes on as it
        # would have, and does not draw its first numbers once more.
        study.sampler = optuna.samplers.TPESampler(seed=SEED + len(study.trials),
                                                   n_startup_trials=self.random_trials)
        # Not before half of the epochs: at first all are near chance, and the median is luck.
        study.pruner = optuna.pruners.MedianPruner(n_startup_trials=self.random_trials,
                                                   n_warmup_steps=self.recipe.epochs // 2)
        return study


def begin(search: Search) -> tuple[int, float, float]:
    """Number, temperature and alpha of the next trial: one that was cut off, or a new one."""
    optuna, study = cluster.needed("optuna", "search.py"), search.study()
    trial = study.ask({
        "temperature": optuna.distributions.FloatDistribution(*search.temperatures, log=True),
        "alpha": optuna.distributions.FloatDistribution(*search.alphas)})
    return trial.number, trial.params["temperature"], trial.params["alpha"]


def train(search: Search, number: int, temperature: float, alpha: float, *, sign=None,
          cores: int | None = None) -> None:
    """Train the student of one trial and tell the study, in this process or in a worker."""
    optuna = cluster.needed("optuna", "search.py")
    if sign is not None:
        cluster.ready(sign, cores)
    study = search.study()
    trial = optuna.trial.Trial(study, study.trials[number]._trial_id)
    trial.set_user_attr("machine", fingerprints.machine())  # a worker's threads, not the driver's
    maker = cluster._maker()
    teacher = maker.make(*cluster.experiments.run_of(f"{search.dataset}-teacher-seed0"))
    label = "" if search.epochs is None else f"-{search.recipe.epochs}-epochs"
    try:
        run = runs.train_or_load(
            f"distilled{label}-search", maker.data(search.dataset), teacher=teacher, seed=SEED,
            temperature=temperature, alpha=alpha, recipe=search.recipe,
            callbacks=[Judged(trial)])
    except optuna.TrialPruned:
        study.tell(number, state=optuna.trial.TrialState.PRUNED)
    except FloatingPointError:  # it diverged, and would again
        study.tell(number, state=optuna.trial.TrialState.FAIL)
    else:
        known = study.trials[number].intermediate_values
        for epoch, value in enumerate(run.history["val_accuracy"]):
            if epoch not in known:  # a run that was finished before, and only loaded
                trial.report(value, epoch)
        study.tell(number, run.row["val_accuracy"])


class Judged(keras.callbacks.Callback):
    """Reports each epoch's validation accuracy; gives up a student below the median."""

    def __init__(self, trial):
        super().__init__()
        self.trial = trial

    def on_epoch_end(self, epoch, logs=None):
        with warnings.catch_warnings(action="ignore"):  # an epoch reported before a kill
            self.trial.report(float(logs["val_accuracy"]), epoch)
        if epoch + 1 < self.params["epochs"] and self.trial.should_prune():
            raise cluster.needed("optuna", "search.py").TrialPruned


def run(search: Search, *, trials: int, workers: int = 0, cores: int = 1, address=None,
        bar=None):
    """Go on until so many trials are done, given-up ones counted; returns the study."""
    require(trials >= 1, f"trials is {trials}. Give at least 1.")
    with store.lock(runs.runs_folder() / f"{search.name}.lock"):  # one driver a study
        again = [(t.number, t.params["temperature"], t.params["alpha"])
                 for t in search.study().trials if not t.state.is_finished() and _begun(search, t)]
        if workers:
            _on_workers(search, again, trials, workers, cores, address, bar)
        else:
            while again or len(search.study().trials) < trials:
                train(search, *(again.pop(0) if again else begin(search)))
                _show(bar, search)
    return search.study()


def _begun(search: Search, trial) -> bool:
    """Whether a trial has its settings. A kill may come before: then it has failed."""
    if len(trial.params) < 2:
        optuna = cluster.needed("optuna", "search.py")
        search.study().tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return len(trial.params) == 2


def _on_workers(search, again, trials, workers, cores, address, bar) -> None:
    with cluster.connected(workers=workers, cores=cores, address=address) as ray, \
            cluster.shared_folder() as sign:
        task = ray.remote(num_cpus=cores, max_retries=cluster.RETRIES)(train)
        running = []
        while True:
            while len(running) < workers and (again or len(search.study().trials) < trials):
                number, *point = again.pop(0) if again else begin(search)
                running.append(task.options(name=f"trial-{number}").remote(
                    search, number, *point, sign=sign, cores=cores))
            if not running:
                return
            done, running = ray.wait(running)
            ray.get(done)
            _show(bar, search)


def _show(bar, search: Search) -> None:
    if bar is not None:
        study = search.study()
        bar.update(sum(t.state.is_finished() for t in study.trials) - bar.n)
        done = [t.value for t in study.trials if t.value is not None]
        bar.set_postfix_str(f"best {max(done, default=0):.4f}")


def table(search: Search) -> pd.DataFrame:
    """One row a trial, as in search.csv."""
    rows = [{"dataset": search.dataset, "trial": t.number, **t.params,
             "state": t.state.name.lower(),
             "epochs_done": 0 if t.last_step is None else t.last_step + 1,
             "epochs": search.recipe.epochs, "machine": t.user_attrs.get("machine"),
             "val_accuracy": t.value if t.value is not None else
             max(t.intermediate_values.items(), default=(0, np.nan))[1]}
            for t in search.study().trials if t.state.is_finished()]
    return pd.DataFrame(rows, columns=COLUMNS)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=("cifar10", "digits"), default="digits")
    parser.add_argument("--trials", type=int, default=12, help="in all, given-up ones counted")
    parser.add_argument("--epochs", type=int, help="of each student; by default the recipe's")
    parser.add_argument("--storage", help="URL of a database; by default a journal file")
    parser.add_argument("--workers", type=int, default=0, help="so many at a time, with Ray")
    parser.add_argument("--cores", type=int, default=1, help="threads of one worker")
    parser.add_argument("--address", help="of a running Ray cluster")
    options = parser.parse_args(arguments)
    search = Search(options.dataset, options.epochs, options.storage)
    with tqdm(total=options.trials, unit="trial") as bar:
        study = run(search, trials=options.trials, workers=options.workers,
                    cores=options.cores, address=options.address, bar=bar)
    path, new = runs.REFERENCE / "search.csv", table(search)
    if path.exists():
        old = pd.read_csv(path)
        new = pd.concat([old[(old.dataset != search.dataset)
                             | (old.epochs != search.recipe.epochs)], new])
    store.write_whole(path, lambda aside: new.to_csv(aside, index=False))
    print(f"{search.name}: best {study.best_value:.4f} with {study.best_params}")


if __name__ == "__main__":
    main()
