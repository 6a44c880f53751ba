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
    """What one arm gains over another, with one error for all arms and seeds as blocks.

    A few pairs say little about the spread of their gains. All arms of a part together say more:
    what is left of the accuracies when arms and seeds are fitted by least squares (two-way layout
    without replication; Fisher 1935, chapter 4). That takes for granted that all arms spread
    alike: look at the column spread.

    Args:
        points: accuracies in points, a row for each seed, a column for each arm; nan where an arm
            has no run with this seed.
        pairs: (arm, other) of one family, as announced.
        diverged: arms with a run that diverged. They take no part and have nan, but they count
            in the family.

    Returns a row for each pair: gain of arm over other, low and high (95 % t interval), p for a
    true gain of zero, holm (p corrected for the family), and spread, the standard deviation of
    this pair's own gains. Raises ValueError if the arms leave no error to judge by.
    """
    names = {name for pair in pairs for name in pair}
    require(names <= {*points, *diverged}, f"pairs name {sorted(names - {*points, *diverged})}. "
            f"points has {', '.join(map(str, points))}.")
    long = points.drop(columns=list(diverged), errors="ignore").stack().dropna()
    seeds, arms = (pd.get_dummies(long.index.get_level_values(k), dtype=float) for k in (0, 1))
    design = np.column_stack([arms, seeds.to_numpy()[:, 1:]])
    fit, _, rank, _ = np.linalg.lstsq(design, long.to_numpy(), rcond=None)
    squares, freedom = ((long - design @ fit) ** 2).sum(), len(long) - rank
    require(freedom > 0 and squares > 1e-9, f"points leave no error to judge by ({len(long)} runs, "
            f"sum of squares {squares:.1g}). Give at least two arms and two seeds that differ.")
    covariance = np.linalg.pinv(design.T @ design) * squares / freedom
    rows = []
    for arm, other in pairs:
        if arm in diverged or other in diverged:
            rows.append(dict.fromkeys(("gain", "low", "high", "p", "spread"), np.nan))
            continue
        contrast = np.zeros(len(fit))
        contrast[[arms.columns.get_loc(arm), arms.columns.get_loc(other)]] = 1, -1
        gain, error = contrast @ fit, np.sqrt(contrast @ covariance @ contrast)
        half = scipy.stats.t.ppf(0.975, freedom) * error
        rows.append({"gain": gain, "low": gain - half, "high": gain + half,
                     "p": 2 * scipy.stats.t.sf(abs(gain) / error, freedom),
                     "spread": (points[arm] - points[other]).std()})
    found = pd.DataFrame(rows, pd.MultiIndex.from_tuples(pairs, names=["arm", "over"]))
    return found.assign(holm=pd.Series(holm(found.p.fillna(1)), found.index).where(found.p.notna()))


def holm(p) -> np.ndarray:
    """p values of one family, corrected so that all are judged at one level. Source: Holm 1979."""
    p = np.asarray(p, "float64")
    order, corrected = np.argsort(p), np.empty(len(p))
    steps = p[order] * np.arange(len(p), 0, -1)
    corrected[order] = np.minimum(1, np.maximum.accumulate(steps))
    return corrected
