"""Every row of results.csv as data: what it is, which settings, which seeds.

experiments.py makes the rows; those of an accelerator come from accelerated.py. PROTOCOL.md
announces those of _pairs, _controls, _recipe_choice, _evidence, _many_machines, _methods,
_architectures and _best before they are made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from reference import features, fingerprints, runs, store  # isort: skip  (first: keeps TensorFlow quiet)
import kdlib

from reference import accelerated, networks
from reference.controls import TOP

# --- the table ------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """Some rows of results.csv: one training for each seed."""

    method: str  # the name in results.csv
    seeds: tuple[int, ...] = (0,)
    dataset: str = "cifar10"
    teacher: str | None = None  # the runs that teach; "{seed}": the pair's own, "{next}": another
    signal: str | None = None  # how they answer as one: a name in SIGNALS
    control: str | None = None  # what becomes of the teacher's answers: a name in CONTROLS
    temperature: float = 4.0
    alpha: float = 0.1
    recipe: dict = field(default_factory=dict)  # where it differs from the published recipe
    labels: float = 100.0  # per cent of the training labels that are known
    hide: bool = True  # a distilled student sees the images without a label, too
    wrong: float = 0.0  # per cent of the training labels that are wrong
    build: Callable | None = None
    loss: str | None = None  # one more loss: a name in features.METHODS
    factor: float | None = None  # times its authors' weight; None: as chosen on validation
    place: str | None = None  # which layers it compares: a name in PLACES; None: the method's own
    weights: bool = False  # publish the trained model, not only its row
    stored: bool = False  # the teacher's features are read from files, not computed live
    on_accelerator: bool = False  # made by accelerated.py
    choice: bool = False  # only for choosing on validation: the test set is not looked at

    @property
    def distilled(self) -> bool:
        return self.teacher is not None

    def stem(self, seed: int) -> str:
        return runs.stem({
            "dataset": self.dataset, "method": self.method, "seed": seed,
            "temperature": self.temperature if self.distilled else None, "alpha": self.alpha})

    def teachers(self, seed: int) -> list[str]:
        return (self.teacher or "").format(seed=seed, next=(seed + 1) % 6).split()

    def taught_by(self, seed: int) -> str | None:
        """What the column teacher of results.csv says."""
        return "+".join([*self.teachers(seed), *([self.signal] if self.signal else [])]) or None

    def trainer(self) -> features.Trainer | None:
        """What fits the student where there is one more loss."""
        if self.loss is None:
            return None
        method = features.METHODS[self.loss]
        factor = chosen_factor(self) if self.factor is None else self.factor
        student, teacher = PLACES[self.place or method.where]
        kind = features.StoredTrainer if self.stored else features.Trainer
        return kind(self.loss, factor * method.weight, student, teacher)

    def trials(self) -> list[Experiment]:
        """The runs that choose the weight of its loss, all with seed 100."""
        asked = FACTORS if self.loss and self.factor is None else ()
        return [_trial(self.loss, self.alpha, factor) for factor in asked]

    def full_recipe(self) -> runs.Recipe:
        return replace(runs.recipe_for(_Name(self.dataset), self.method), **self.recipe)


@dataclass(frozen=True)
class _Name:
    name: str  # all that recipe_for asks of a dataset


SIX = (0, 1, 2, 3, 4, 5)  # the pairs of notebook 05
PAIRS = SIX[:5]
TRIPLE = SIX[:3]
OWN = "teacher-seed{seed}"  # a teacher for each pair
FIVE, TEN = {"epochs": 5}, {"epochs": 10}
HALF = {"precision": "bfloat16"}  # parts D, G, I, fresh views; see PROTOCOL.md


def _published() -> list[Experiment]:
    """The rows behind notebooks 02 to 08."""
    one = "teacher-seed0"
    table = _pairs() + _controls() + [
        # how long?
        Experiment("scratch-5-epochs", TRIPLE, recipe=FIVE),
        Experiment("scratch-10-epochs", recipe=TEN),
        Experiment("distilled-10-epochs", teacher=one, recipe=TEN),
        Experiment("scratch-40-epochs", recipe={"epochs": 40}),
        Experiment("distilled-40-epochs", teacher=one, recipe={"epochs": 40}),
        Experiment("scratch-100-epochs", TRIPLE, recipe={"epochs": 100}),
        Experiment("distilled-100-epochs", teacher=one, recipe={"epochs": 100}, weights=True),
        # what the gain consists of, after 5 epochs
        Experiment("distilled-5-epochs-smoothing", TRIPLE, teacher=one, control="smoothed",
                   recipe=FIVE),
        Experiment("distilled-5-epochs-shuffled", TRIPLE, teacher=one, control="shuffled",
                   recipe=FIVE),
        Experiment("distilled-5-epochs-twin", TRIPLE, teacher="scratch-seed0", recipe=FIVE),
        # views
        Experiment("distilled-5-epochs-2-views", TRIPLE, teacher=one, recipe=FIVE | {"views": 2}),
        Experiment("distilled-5-epochs-live", TRIPLE, teacher=one, recipe=FIVE | {"views": 0}),
        Experiment("scratch-no-augmentation", recipe={"shift": 0, "flip": False}),
    ]
    table += _map(5)
    table += [Experiment(f"distilled-adam-{rate}", teacher=one, weights=True,
                         recipe=TEN | {"optimizer": "adam", "learning_rate": float(rate)})
              for rate in ("1e-3", "1e-5")]
    for percent in (1, 5, 10, 50):
        name = f"5-epochs-{percent}-percent"
        table += [Experiment(f"scratch-{name}", recipe=FIVE, labels=percent),
                  Experiment(f"distilled-{name}", teacher=one, recipe=FIVE, labels=percent)]
    return table + [replace(each, dataset="digits") for each in _digits()]


def _pairs() -> list[Experiment]:
    """Part B of PROTOCOL.md: pair k has teacher k and seed k.

    Those of one teacher came before it. quantisation.py trains them on.
    """
    return [Experiment("teacher", SIX, weights=True), Experiment("scratch", SIX, weights=True),
            Experiment("distilled", SIX, teacher=OWN, weights=True),
            Experiment("distilled-one-teacher", PAIRS, teacher="teacher-seed0", weights=True)]


def _controls() -> list[Experiment]:
    """Part C of PROTOCOL.md: what the gain consists of."""
    table = [Experiment(f"distilled-{control}", PAIRS, teacher=OWN, control=control)
             for control in ("smoothed", "levelled", "evened", "shuffled")]
    return [*table, Experiment("distilled-twin", PAIRS, teacher="scratch-seed{next}")]


def _map(epochs: int) -> list[Experiment]:
    """Students over temperature and alpha, and over the learning rate."""
    name, one, length = f"distilled-{epochs}-epochs", "teacher-seed0", {"epochs": epochs}
    repeated = {(1.0, 0.5), (4.0, 0.1), (16.0, 0.0)}  # to see the noise of the map
    table = [Experiment(name, TRIPLE if (t, a) in repeated else (0,), teacher=one, temperature=t,
                        alpha=a, recipe=length)
             for t in (1.0, 2.0, 4.0, 8.0, 16.0) for a in (0.0, 0.1, 0.3, 0.5, 0.9)]
    return table + [Experiment(f"{name}-rate-{rate}", teacher=one,
                               recipe=length | {"learning_rate": float(rate)})
                    for rate in ("1e-5", "1e-4", "1e-3", "1e-2", "1e-1")]


def _digits() -> list[Experiment]:
    one = "teacher-seed0"
    table = _pairs() + _controls() + [
        Experiment("distilled-no-labels", teacher=one, alpha=0.0, weights=True),
        Experiment("scratch-sgd", weights=True,
                   recipe={"optimizer": "sgd", "learning_rate": 0.03, "weight_decay": 5e-3}),
        *(Experiment("distilled-out-of-step", teacher=one, control="out_of_step", alpha=alpha,
                     weights=True) for alpha in (0.1, 0.9)),
        Experiment("scratch-90-epochs", TRIPLE, recipe={"epochs": 90}),
    ]
    for epochs in (3, 7, 28):
        table.append(Experiment(f"scratch-{epochs}-epochs", TRIPLE, recipe={"epochs": epochs}))
    table += [Experiment(f"distilled-{epochs}-epochs", TRIPLE, teacher=one,
                         recipe={"epochs": epochs}) for epochs in (3, 28)] + _map(7)
    table += [Experiment(f"distilled-adam-{rate}", teacher=one, weights=True,
                         recipe=TEN | {"optimizer": "adam", "learning_rate": float(rate)})
              for rate in ("1e-3", "1e-5")]
    table += _few_labels(25, epochs=7) + _wrong_labels(40, {})
    return [*table, Experiment("distilled-7-epochs-25-percent", teacher=one, labels=25,
                               recipe={"epochs": 7})]


def _recipe_choice() -> list[Experiment]:
    """Part A of PROTOCOL.md: candidates after 8 epochs, then 20 for what passed."""
    eight, seed = {"epochs": 8}, (100,)
    changes = {"": {}, "-average": {"average": 0.998}, "-rate-3e-2": {"learning_rate": 0.03},
               "-decay-5e-2": {"weight_decay": 0.05}}
    table = [Experiment(f"teacher-8-epochs{name}", seed, recipe=eight | change, choice=True)
             for name, change in changes.items()]
    table.append(Experiment("teacher-8-epochs-residual", seed, recipe=eight, choice=True,
                            build=networks.residual_teacher))
    for name, change in changes.items():
        table += [Experiment(f"scratch-8-epochs{name}", seed, recipe=eight | change, choice=True),
                  Experiment(f"distilled-8-epochs{name}", seed, recipe=eight | change, choice=True,
                             teacher="teacher-seed0")]
    table.append(Experiment("scratch-8-epochs-smoothing", seed, choice=True,
                            recipe=eight | {"smoothing": 0.1}))
    # What passed (+0.36 points) goes on.
    return table + [
        Experiment("scratch-20-epochs", (100, 101), choice=True),
        Experiment("scratch-20-epochs-smoothing", (100, 101), choice=True,
                   recipe={"smoothing": 0.1})]


def _evidence() -> list[Experiment]:
    """Parts D to G of PROTOCOL.md."""
    six = " ".join(f"teacher-seed{k}" for k in SIX)
    table = [
        # D: better teachers, and worse ones
        Experiment("distilled-bfloat16", PAIRS, teacher=OWN, recipe=HALF),
        Experiment("distilled-mirrored", PAIRS, teacher=OWN, signal="mirrored", recipe=HALF),
        Experiment("distilled-six", PAIRS, teacher=six, signal="together", recipe=HALF),
        Experiment("teacher-large", build=networks.large_teacher, recipe=HALF),
        Experiment("distilled-large", PAIRS, teacher="teacher-large-seed0", recipe=HALF),
        Experiment("teacher-5-epochs", PAIRS, recipe=FIVE | HALF),
        Experiment("distilled-early", PAIRS, teacher="teacher-5-epochs-seed{seed}", recipe=HALF),
        Experiment("teacher-smoothing", TRIPLE, recipe={"smoothing": 0.1} | HALF),
        Experiment("distilled-smooth-teacher", TRIPLE, teacher="teacher-smoothing-seed{seed}",
                   recipe=HALF),
    ]
    for epochs in (10, 40, 100):  # E; the others of scratch, and seed 0, are published
        name, recipe = f"{epochs}-epochs", {"epochs": epochs}
        table.append(Experiment(f"distilled-{name}", (1, 2), teacher=OWN, recipe=recipe))
        if epochs < 100:
            table.append(Experiment(f"scratch-{name}", (1, 2), recipe=recipe))
    fresh = {"epochs": 100, "views": 0} | HALF
    table += [Experiment("scratch-100-epochs-fresh", TRIPLE, recipe=fresh),
              Experiment("distilled-100-epochs-fresh", TRIPLE, teacher=OWN, recipe=fresh)]
    table.append(Experiment("scratch-45-epochs-10-percent", TRIPLE, labels=10,  # F
                            recipe={"epochs": 45}))
    for percent in (1, 5, 10, 25):
        table += _few_labels(percent)
    for percent in (20, 40):
        table += _wrong_labels(percent, HALF)
    return [*table, Experiment("scratch-40-wrong-smoothing", TRIPLE, wrong=40,
                               recipe={"smoothing": 0.1} | HALF)]


def _few_labels(percent: int, epochs: int = 5) -> list[Experiment]:
    """Part F of PROTOCOL.md: teacher and students know the same labels."""
    name, known = f"{percent}-percent", {"labels": percent}
    short = {"recipe": {"epochs": epochs}, **known}
    own = {"teacher": f"teacher-10-epochs-{name}-seed{{seed}}", **short}
    seeds = TRIPLE if percent == 25 else (1, 2)  # seed 0 is published
    return [Experiment(f"teacher-10-epochs-{name}", TRIPLE, recipe=TEN, **known),
            Experiment(f"distilled-{epochs}-epochs-{name}-own", TRIPLE, **own),
            Experiment(f"distilled-{epochs}-epochs-{name}-labelled", TRIPLE, hide=False, **own),
            Experiment(f"scratch-{epochs}-epochs-{name}", seeds, **short),
            Experiment(f"scratch-{3 * epochs}-epochs-{name}", TRIPLE,
                       recipe={"epochs": 3 * epochs}, **known)]


def _wrong_labels(percent: int, recipe: dict) -> list[Experiment]:
    """Part G of PROTOCOL.md: teacher and students learn from the same wrong labels."""
    name, wrong = f"{percent}-wrong", {"wrong": percent, "recipe": recipe}
    return [Experiment(f"teacher-{name}", TRIPLE, **wrong),
            Experiment(f"scratch-{name}", TRIPLE, **wrong),
            Experiment(f"distilled-{name}", TRIPLE, teacher=f"teacher-{name}-seed{{seed}}",
                       **wrong)]


def _many_machines() -> list[Experiment]:
    """Notebook 11: answers of which only the likeliest classes were stored."""
    one = "teacher-seed0"
    return [Experiment(f"distilled-{epochs}-epochs-top{k}", TRIPLE, dataset=dataset, teacher=one,
                       control=f"top{k}", recipe={"epochs": epochs})
            for dataset, epochs in (("cifar10", 5), ("digits", 7)) for k in TOP]


# --- other methods, other architectures ------------------------------------------------

# Of the published student and teacher: the layers that a method compares. As in RepDistiller, but
# without its first stage, which this student does not have.
PLACES = {
    "hint": (("relu2_2",), ("relu2_2",)),
    "stages": (("relu1_1", "relu2_2", "relu3_2"), ("relu1_2", "relu2_2", "relu4_1")),
    "before": (("norm1_1", "norm2_2", "norm3_2"), ("norm1_2", "norm2_2", "norm4_1")),
    "last map": (("relu3_2",), ("relu4_1",)),
    "vector": (("pool3",), ("pool4",)),
    "logits": ((), ()),
    "misplaced": (("relu1_1",), ("relu4_1",)),  # the student's first stage, the teacher's last
}
FACTORS = (1.0, 0.1, 10.0)  # three trials for each method: its authors' weight, less and more
TAUGHT = ("fitnet", "at", "rkd", "dkd")  # in notebook 09


def _trial(loss: str, alpha: float, factor: float) -> Experiment:
    kd = "-kd" if alpha < 1 else ""
    return Experiment(f"distilled-5-epochs-{loss}{kd}-x{factor:g}", (100,), loss=loss, alpha=alpha,
                      teacher="teacher-seed0", factor=factor, recipe=FIVE | HALF, stored=True,
                      choice=True)


def chosen_factor(each: Experiment) -> float:
    """The factor of the best trial on validation. Between equals, the authors' own weight."""
    found = {}
    for trial in each.trials():
        path = runs.REFERENCE / "rows" / f"{trial.stem(100)}.json"
        kdlib.require(path.exists(), f"the trial {trial.method} of {each.method} is missing. Make "
                      f"it first: python reference/experiments.py {trial.method}")
        notes = store.read_notes(path)
        found[trial.factor] = -1 if "diverged" in notes else notes["row"]["val_accuracy"]
    kdlib.require(max(found.values()) >= 0, f"all trials of {each.method} diverged.")
    return max(FACTORS, key=found.get)


def _methods() -> list[Experiment]:
    """Part I of PROTOCOL.md: trials; each method with its chosen weight for 5 epochs, five pairs;
    the four of notebook 09 for 20 epochs.

    alpha = 1: hard labels and the method alone. -kd: hard and soft labels as ever, and the method.
    A loss on logits takes the place of the soft labels, so it has no -kd.
    """
    one, short = "teacher-seed0", {"recipe": FIVE | HALF}
    variants = [(loss, alpha) for loss, method in features.METHODS.items()
                for alpha in ((1.0,) if method.on_logits else (1.0, 0.1))]
    table = [Experiment("scratch-5-epochs-bfloat16", PAIRS, **short),
             Experiment("distilled-5-epochs-bfloat16", PAIRS, teacher=one, **short)]
    table += [_trial(*variant, factor) for variant in variants for factor in FACTORS]
    for loss, alpha in variants:
        name = f"{loss}{'-kd' if alpha < 1 else ''}"
        each = Experiment(f"distilled-5-epochs-{name}", PAIRS, teacher=one, loss=loss, alpha=alpha,
                          stored=True, **short)
        table += [each, replace(each, method=f"distilled-3-epochs-{name}", dataset="digits",
                                seeds=(0,), factor=1.0, recipe={"epochs": 3}, stored=False)]
    for loss, alpha in variants:
        if loss not in TAUGHT or alpha == 1 and not features.METHODS[loss].on_logits:
            continue  # after 20 epochs only the four of notebook 09, beside soft labels
        name = f"distilled-{loss}{'-kd' if alpha < 1 else ''}"
        each = Experiment(name, PAIRS, teacher=OWN, loss=loss, alpha=alpha, recipe=HALF)
        table += [replace(each, seeds=(0,), weights=True), replace(each, seeds=PAIRS[1:]),
                  replace(each, dataset="digits", factor=1.0, recipe={})]
    harm = Experiment("distilled-5-epochs-fitnet-misplaced", TRIPLE, teacher=one, loss="fitnet",
                      alpha=1.0, factor=10.0, place="misplaced", stored=True, **short)
    placed = replace(harm, method="distilled-5-epochs-fitnet-placed", place=None)
    return [*table, harm, placed]


def _best() -> list[Experiment]:
    """Part H of PROTOCOL.md: the teacher, the candidates, the best student and its twin."""
    recipe, teacher = vars(accelerated.RECIPE), "teacher-best-seed0"
    more = {"on_accelerator": True}
    table = [Experiment("teacher-best", build=networks.large_teacher, **more,
                        recipe=recipe | {"epochs": accelerated.TEACHER_EPOCHS})]
    length = accelerated.CANDIDATE_EPOCHS
    for name, build in accelerated.CANDIDATES.items():
        trial = dict(seeds=(100,), build=build, recipe=recipe | {"epochs": length}, choice=True)
        table += [Experiment(f"scratch-{name}-{length}-epochs", **trial, **more),
                  Experiment(f"distilled-{name}-{length}-epochs", teacher=teacher, **trial, **more)]
    best = dict(seeds=TRIPLE, build=networks.best_student_pooled, weights=True,  # as chosen
                recipe=recipe | {"epochs": 110})  # as many as fitted
    return [*table, Experiment("best", teacher=teacher, **best, **more),
            Experiment("best-scratch", **best, **more)]


STUDENTS = {"vgg": None, "residual": networks.residual_student,
            "separable": networks.separable_student}
TEACHERS = {"vgg": "teacher-seed0", "residual": "teacher-residual-seed0"}


def _architectures() -> list[Experiment]:
    """Part J of PROTOCOL.md: two teachers times three students, and each student from scratch."""
    table = [Experiment("teacher-residual", weights=True, build=networks.residual_teacher)]
    for student, build in STUDENTS.items():
        if build:
            table.append(Experiment(f"scratch-{student}", TRIPLE, build=build))
        table += [Experiment(f"distilled-{teacher}-to-{student}", TRIPLE, teacher=run, build=build)
                  for teacher, run in TEACHERS.items()]
    return table + [replace(each, dataset="digits") for each in table]


for _name in features.METHODS:  # read now: a file edited later is not what runs
    fingerprints.identity_of(features.Trainer(_name, 1.0))

PUBLISHED = _published() + _many_machines()  # what the notebooks show
PLANNED = _recipe_choice() + _evidence() + _methods() + _architectures() + _best()
EXPERIMENTS = PUBLISHED + PLANNED
