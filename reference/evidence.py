"""From accuracies to verdicts: the statistics that PROTOCOL.md announces for its parts."""

import numpy as np
import pandas as pd
import scipy.stats
from kdlib import require


def usual_students(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of results.csv with T = 4 and alpha = 0.1, whatever the length of the training.

    A column more: student ("scratch", "distilled").
    """
    usual = table[table.method.str.fullmatch(r"(scratch|distilled)(-\d+-epochs)?")
                  & table.temperature.isin([np.nan, 4]) & table.alpha.isin([np.nan, 0.1])]
    return usual.assign(student=usual.method.str.split("-").str[0])


def compare(points: pd.DataFrame, pairs, *, diverged=()) -> pd.DataFrame:
    """What one arm gains over another: contrasts() of pairs.

    Args:
        points: as in contrasts().
        pairs: (arm, other) of one family, as announced.
        diverged: as in contrasts().

    Returns a row for each pair, indexed by arm and over.
    """
    found = contrasts(points, {(arm, other): {arm: 1, other: -1} for arm, other in pairs},
                      diverged=diverged)
    return found.set_index(pd.MultiIndex.from_tuples(found.index, names=["arm", "over"]))


def contrasts(points: pd.DataFrame, questions: dict, *, diverged=()) -> pd.DataFrame:
    """Weighted sums of arms, with one error for all arms and seeds as blocks.

    A few pairs say little about the spread of their gains. All arms of a part together say more:
    what is left of the accuracies when arms and seeds are fitted by least squares (two-way layout
    without replication; Fisher 1935, chapter 4). That takes for granted that all arms spread
    alike: look at the column spread.

    Args:
        points: accuracies in points, a row for each seed, a column for each arm; nan where an arm
            has no run with this seed.
        questions: the weights of each question of one family, as {name: {arm: weight}}. They sum
            to 0.
        diverged: arms with a run that diverged. They take no part and have nan, but they count
            in the family.

    Returns a row for each question: gain (the weighted sum), low and high (95 % t interval), p for
    a true gain of zero, holm (p corrected for the family), and spread, the standard deviation of
    the weighted sums of the seeds. Raises ValueError for other weights, for arms that leave no
    error to judge by, or that no seeds connect.
    """
    known = {*points, *diverged}
    for name, weights in questions.items():
        require(weights.keys() <= known, f"questions name {sorted(weights.keys() - known)}. points "
                f"has {', '.join(map(str, points))}.")
        require(abs(sum(weights.values())) < 1e-9, f"the weights of {name} are {weights}. They "
                "have to sum to 0.")
    judged = points.drop(columns=list(diverged), errors="ignore")
    arms, design, fit, error, freedom = _two_way(judged)
    inverse, rows = np.linalg.pinv(design.T @ design), []
    for name, weights in questions.items():
        if set(weights) & set(diverged):
            rows.append(dict.fromkeys(("gain", "low", "high", "p", "spread"), np.nan))
            continue
        row = np.pad([weights.get(arm, 0.0) for arm in arms], (0, len(fit) - len(arms)))
        require(np.allclose(row @ inverse @ design.T @ design, row), f"no seeds connect the arms "
                f"of {name}. Give each arm a seed that another arm has, too.")
        gain, reach = row @ fit, error * np.sqrt(row @ inverse @ row)
        half = scipy.stats.t.ppf(0.975, freedom) * reach
        each = (points[list(weights)] * pd.Series(weights)).sum(axis=1, skipna=False)
        rows.append({"gain": gain, "low": gain - half, "high": gain + half,
                     "p": 2 * scipy.stats.t.sf(abs(gain) / reach, freedom), "spread": each.std()})
    found = pd.DataFrame(rows, pd.Index(list(questions), tupleize_cols=False))
    return found.assign(holm=pd.Series(holm(found.p.fillna(1)), found.index).where(found.p.notna()))


def _two_way(points: pd.DataFrame):
    """The arms, the design (a row for each run; arms, then seeds), what least squares find, and
    the standard deviation of what is left, with its degrees of freedom."""
    long = points.stack().dropna()
    seeds, arms = (pd.get_dummies(long.index.get_level_values(k), dtype=float) for k in (0, 1))
    design = np.column_stack([arms, seeds.to_numpy()[:, 1:]])
    fit, _, rank, _ = np.linalg.lstsq(design, long.to_numpy(), rcond=None)
    squares, freedom = ((long - design @ fit) ** 2).sum(), len(long) - rank
    require(freedom > 0 and squares > 1e-9, f"points leave no error to judge by ({len(long)} runs, "
            f"sum of squares {squares:.1g}). Give at least two arms and two seeds that differ.")
    return arms.columns, design, fit, np.sqrt(squares / freedom), freedom


def holm(p) -> np.ndarray:
    """p values of one family, corrected so that all are judged at one level. Source: Holm 1979."""
    p = np.asarray(p, "float64")
    order, corrected = np.argsort(p), np.empty(len(p))
    steps = p[order] * np.arange(len(p), 0, -1)
    corrected[order] = np.minimum(1, np.maximum.accumulate(steps))
    return corrected
