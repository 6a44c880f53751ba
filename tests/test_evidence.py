"""The statistics of PROTOCOL.md, beside SciPy's and beside least squares."""

from reference import evidence  # isort: skip  (first: keeps TensorFlow quiet)
import numpy as np
import pandas as pd
import pytest
import scipy.stats


def some(arms, seeds=5, seed=0):
    rng = np.random.default_rng(seed)
    luck = rng.normal(0, 0.5, (seeds, 1))  # of the seed, the same for all arms
    return pd.DataFrame(88 + luck + rng.normal(0, 0.3, (seeds, len(arms))), columns=list(arms))


def test_two_arms_are_a_paired_t_test():
    points = some("ab")
    want = scipy.stats.ttest_rel(points.b, points.a)
    found = evidence.compare(points, "a").loc["b"]
    interval = want.confidence_interval()
    np.testing.assert_allclose(found[["low", "high", "p", "holm"]].astype(float),
                               [interval.low, interval.high, want.pvalue, want.pvalue])


def test_several_arms_are_least_squares_with_arms_and_seeds():
    points = some("abcd")
    y = points.to_numpy().ravel()
    arm = np.tile(np.eye(4)[:, 1:], (5, 1))  # "a" is the baseline
    design = np.column_stack([np.repeat(np.eye(5), 4, axis=0), arm])
    fit, squares, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    freedom = len(y) - rank
    error = np.sqrt(np.diag(np.linalg.inv(design.T @ design) * squares[0] / freedom))[-3:]
    found = evidence.compare(points, "a")
    np.testing.assert_allclose(found.gain, fit[-3:])
    np.testing.assert_allclose(found.high - found.gain,
                               scipy.stats.t.ppf(0.975, freedom) * error)
    np.testing.assert_allclose(found.p, 2 * scipy.stats.t.sf(abs(fit[-3:]) / error, freedom))


def test_luck_of_the_seeds_cancels():
    points = some("abc")
    shifted = points + np.arange(5)[:, None] * 10.0
    pd.testing.assert_frame_equal(evidence.compare(points, "b"), evidence.compare(shifted, "b"))


def test_an_arm_that_diverged_has_no_verdict_and_takes_no_part():
    points = some("abcd")
    gap = points.assign(c=[np.nan, *points.c[1:]])
    found = evidence.compare(gap, "a")
    assert list(found.index) == ["b", "c", "d"] and found.loc["c"].isna().all()
    pd.testing.assert_frame_equal(found.drop(index="c"),
                                  evidence.compare(points.drop(columns="c"), "a"))
    for baseline in ("c", "x"):
        with pytest.raises(ValueError, match=f"baseline is '{baseline}'"):
            evidence.compare(gap, baseline)
    with pytest.raises(ValueError, match="1 seeds"):
        evidence.compare(points[:1], "a")


def test_the_interval_holds_what_it_promises():
    """Of 95 % intervals of arms without any gain, 95 % contain zero."""
    found = [evidence.compare(some("abcde", seed=seed), "a") for seed in range(400)]
    inside = np.mean([(each.low < 0) & (each.high > 0) for each in found])
    assert 0.93 < inside < 0.97
    wrong = np.mean([(each.holm < 0.05).any() for each in found])
    assert wrong < 0.07


@pytest.mark.parametrize("p, want", [
    ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),  # 3 x, then 2 x 0.03, which 0.04 may not undercut
    ([0.5, 0.9], [1.0, 1.0]), ([0.02], [0.02])])
def test_holm_by_hand(p, want):
    np.testing.assert_allclose(evidence.holm(p), want)
