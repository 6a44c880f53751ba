"""From accuracies to verdicts: the statistics that PROTOCOL.md announces for its parts."""

import numpy as np
import pandas as pd
import scipy.stats
from kdlib import require


def compare(points: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """What each arm gains over the baseline, with one error for all arms and seeds as blocks.

    A few pairs say little about the spread of their gains. All arms of a part together say more:
    what is left of each accuracy without the mean of its arm and that of its seed (two-way layout
    without replication; Fisher 1935, chapter 4).

    points: accuracies, a row for each seed, a column for each arm. Returns a row for each other
    arm, all in points but the last two: gain, low and high (95 % t interval), p for a true gain
    of zero, and holm, p corrected for all arms. An arm with a run that diverged (nan) takes no
    part and has nan throughout. Raises ValueError if there is nothing to compare with.
    """
    require(baseline in points and points[baseline].notna().all(),
            f"baseline is {baseline!r}. Choose one of {', '.join(map(str, points))} that has all "
            "its runs.")
    whole = points.dropna(axis=1)
    seeds, arms = whole.shape
    require(seeds > 1 and arms > 1, f"points has {seeds} seeds and {arms} arms without a gap. "
            "Give at least two of each.")
    left = whole.sub(whole.mean(axis=1), axis=0) - whole.mean() + whole.to_numpy().mean()
    freedom = (seeds - 1) * (arms - 1)
    error = np.sqrt(2 / seeds * (left.to_numpy() ** 2).sum() / freedom)
    gain = whole.drop(columns=baseline).mean() - whole[baseline].mean()
    p = pd.Series(2 * scipy.stats.t.sf(np.abs(gain) / error, freedom), gain.index)
    half = scipy.stats.t.ppf(0.975, freedom) * error
    found = pd.DataFrame({"gain": gain, "low": gain - half, "high": gain + half, "p": p,
                          "holm": holm(p)})
    return found.reindex(points.columns.drop(baseline))


def holm(p) -> np.ndarray:
    """p values of one family, corrected so that all are judged at one level. Source: Holm 1979."""
    p = np.asarray(p, "float64")
    order, corrected = np.argsort(p), np.empty(len(p))
    steps = p[order] * np.arange(len(p), 0, -1)
    corrected[order] = np.minimum(1, np.maximum.accumulate(steps))
    return corrected
