"""The statistics of PROTOCOL.md, beside SciPy's and beside the formulas of a balanced layout."""

from reference import evidence  # isort: skip  (first: keeps TensorFlow quiet)
import numpy as np
import pandas as pd
import pytest
import scipy.stats


def some(arms, seeds=5, seed=0):
    rng = np.random.default_rng(seed)
    luck = rng.normal(0, 0.5, (seeds, 1))  # of the seed, the same for all arms
    return pd.DataFrame(88 + luck + rng.normal(0, 0.3, (seeds, len(arms))), columns=list(arms))


def over(baseline, arms):
    return [(arm, baseline) for arm in arms if arm != baseline]


def test_two_arms_are_a_paired_t_test():
    points = some("ab")
    want = scipy.stats.ttest_rel(points.b, points.a)
    found = evidence.compare(points, [("b", "a")]).iloc[0]
    interval = want.confidence_interval()
    np.testing.assert_allclose(
        found[["gain", "low", "high", "p", "holm", "spread"]],
        [(points.b - points.a).mean(), interval.low, interval.high, want.pvalue, want.pvalue,
         (points.b - points.a).std()])


def test_a_balanced_table_has_the_formulas_of_the_two_way_layout():
    points = some("abcd")
    left = points.sub(points.mean(axis=1), axis=0) - points.mean() + points.to_numpy().mean()
    error = np.sqrt(2 / 5 * (left**2).sum().sum() / 12)  # 12 = (5 - 1) (4 - 1)
    gain = (points.mean() - points.a.mean())[["b", "c", "d"]]
    found = evidence.compare(points, over("a", "abcd"))
    np.testing.assert_allclose(found.gain, gain)
    np.testing.assert_allclose(found.high - found.gain, scipy.stats.t.ppf(0.975, 12) * error)
    np.testing.assert_allclose(found.p, 2 * scipy.stats.t.sf(abs(gain) / error, 12))
    np.testing.assert_allclose(found.holm, evidence.holm(found.p))


def test_luck_of_the_seeds_cancels():
    points, pairs = some("abc"), [("a", "b"), ("c", "b"), ("a", "c")]
    shifted = points + np.arange(5)[:, None] * 10.0
    pd.testing.assert_frame_equal(evidence.compare(points, pairs),
                                  evidence.compare(shifted, pairs))


def test_arms_may_have_fewer_seeds():
    points, pairs = some("abc"), over("a", "abc")
    alone = pd.concat([points, pd.DataFrame({"a": [99.0]}, index=[5])])  # a seed with one run
    pd.testing.assert_frame_equal(evidence.compare(points, pairs), evidence.compare(alone, pairs))
    points.loc[3:, "c"] = np.nan
    found = evidence.compare(points, pairs)
    short = found.high - found.low
    assert found.notna().all(axis=None) and short["c", "a"] > short["b", "a"]


def test_an_arm_that_diverged_has_no_verdict_and_counts_in_the_family():
    points, pairs = some("abcd"), over("a", "abcd")
    found = evidence.compare(points.drop(columns="c"), pairs, diverged=["c"])
    alone = evidence.compare(points.drop(columns="c"), over("a", "abd"))
    assert found.loc["c"].isna().all(axis=None)
    kept = found.drop(index="c")
    np.testing.assert_array_equal(kept.drop(columns="holm"), alone.drop(columns="holm"))
    np.testing.assert_allclose(kept.holm, evidence.holm([*alone.p, 1.0])[:2])


def test_what_cannot_be_judged_is_refused():
    points = some("abc")
    with pytest.raises(ValueError, match="questions name .'x'.. points has a, b, c"):
        evidence.compare(points, [("x", "a")])
    for few in (points[:1], points[["a"]], points * 0 + 88, points * 0 + [88, 89, 90]):
        with pytest.raises(ValueError, match="no error to judge by"):
            evidence.compare(few, over("a", few))


def test_weights_that_do_not_sum_to_zero_compare_nothing():
    for weights in ({"a": 1}, {"a": 1, "b": -0.5}):
        with pytest.raises(ValueError, match="weights of mean are .*sum to 0"):
            evidence.contrasts(some("abc"), {"mean": weights})
    with pytest.raises(ValueError, match="have to sum to 0"):
        evidence.compare(some("abc"), [("a", "a")])


def test_arms_that_no_seed_connects_are_not_compared():
    """Least squares would answer all the same."""
    points = some("abcd", seeds=6)
    points.loc[:2, ["c", "d"]] = np.nan
    points.loc[3:, ["a", "b"]] = np.nan
    assert evidence.compare(points, [("b", "a"), ("c", "d")]).notna().all(axis=None)
    with pytest.raises(ValueError, match="no seeds connect the arms of .'c', 'a'."):
        evidence.compare(points, [("b", "a"), ("c", "a")])
    points.loc[0, "c"] = 88.0  # now one does
    assert evidence.compare(points, [("c", "a")]).low.notna().all()


def test_an_interaction_has_the_formula_of_a_contrast():
    """The endpoint of part J."""
    points, weights = some("abcd", seeds=3), {"a": 0.5, "b": -0.5, "c": -0.5, "d": 0.5}
    each = points @ pd.Series(weights)
    left = points.sub(points.mean(axis=1), axis=0) - points.mean() + points.to_numpy().mean()
    error = np.sqrt(sum(w**2 for w in weights.values()) / 3 * (left**2).sum().sum() / 6)
    found = evidence.contrasts(points, {"interaction": weights}).loc["interaction"]
    np.testing.assert_allclose(found[["gain", "spread"]], [each.mean(), each.std()])
    np.testing.assert_allclose(found.high - found.gain, scipy.stats.t.ppf(0.975, 6) * error)


def test_the_interval_holds_what_it_promises():
    """Of 95 % intervals of arms without any gain, 95 % contain zero."""
    found = [evidence.compare(some("abcde", seed=seed), over("a", "abcde"))
             for seed in range(400)]
    inside = np.mean([(each.low < 0) & (each.high > 0) for each in found])
    assert 0.93 < inside < 0.97
    wrong = np.mean([(each.holm < 0.05).any() for each in found])
    assert wrong < 0.07


@pytest.mark.parametrize("p, want", [
    ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),  # 2 x 0.03, which 0.04 may not undercut
    ([0.5, 0.9], [1.0, 1.0]), ([0.02], [0.02])])
def test_holm_by_hand(p, want):
    np.testing.assert_allclose(evidence.holm(p), want)
