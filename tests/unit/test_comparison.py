"""Differences between methods: against scipy, and on simulated data whose difference is known."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from simulated import FRACTIONS, noisy, runs, table

from ablation_sweeps.results import comparison
from ablation_sweeps.results.comparison import Curve, compare, differences, holm
from ablation_sweeps.results.metrics import mean_height, ratio

KNOWN = 0.1  # nats by which b is better than a, where anything is ablated
CLEAN = 3.0


def simulated(n_seeds: int, n_documents: int, of_seeds: float, rng: np.random.Generator) -> tuple[Curve, Curve]:
    """Documents differ in length and difficulty; how much worse `a` is than `b` depends on document, seed and luck."""
    counts = rng.integers(20, 200, n_documents).astype(float)
    clean = CLEAN + rng.normal(0, 0.7, n_documents)
    curves = []
    damage = np.abs(rng.normal(1, 0.3, (n_seeds, 1, n_documents)))
    gap = (KNOWN + rng.normal(0, of_seeds, (n_seeds, 1, 1)) + rng.normal(0, 0.2, (1, 1, n_documents))
           + rng.normal(0, 0.1, (n_seeds, 1, n_documents)))  # fmt: skip
    ablated = np.array([0.0, 1.0, 2.0])[None, :, None]
    for more in (gap, 0 * gap):
        losses = clean + ablated * damage + (ablated > 0) * more
        curves.append(Curve(FRACTIONS, losses * counts, np.broadcast_to(counts, losses.shape)))
    return curves[0], curves[1]


def test_of_one_seed_the_standard_error_is_that_of_scipy(monkeypatch):
    monkeypatch.setattr(comparison, "DRAWS", 20_000)
    a, b = simulated(1, 60, 0.0, np.random.default_rng(0))
    (_, half, _), _ = differences(a, b, "loss")
    x, y, n = a.totals[0, 1], b.totals[0, 1], a.counts[0, 1]
    statistic = lambda x, y, n, axis: (x.sum(axis) - y.sum(axis)) / n.sum(axis)  # noqa: E731
    theirs = stats.bootstrap((x, y, n), statistic, paired=True, n_resamples=20_000, method="percentile",
                             rng=np.random.default_rng(1))  # fmt: skip
    assert half.value == pytest.approx(statistic(x, y, n, 0))
    stderr = (half.high - half.low) / 2 / stats.t.ppf(0.975, 59)
    assert stderr == pytest.approx(theirs.standard_error * math.sqrt(60 / 59), rel=0.03)
    assert stderr == pytest.approx(ratio(x - y, n)[1], rel=0.03)  # the linearised one that points have
    ends = theirs.confidence_interval
    np.testing.assert_allclose([half.low, half.high], [ends.low, ends.high], atol=0.1 * stderr * 1.96)


@pytest.mark.parametrize(("n_seeds", "of_seeds"), [(1, 0.0), (2, 0.05), (5, 0.15)])
def test_intervals_cover_the_known_difference_at_their_nominal_rate(monkeypatch, n_seeds, of_seeds):
    """At half and in the area, 400 times; within three standard deviations of a binomial, a little more above, since
    what document and seed share is in both bootstraps."""
    monkeypatch.setattr(comparison, "DRAWS", 200)
    rng = np.random.default_rng(n_seeds)
    n, covered = 400, np.zeros(2)
    for _ in range(n):
        a, b = simulated(n_seeds, 40, of_seeds, rng)
        (_, half, _), in_area = differences(a, b, "loss", seed=int(rng.integers(1 << 30)))
        clean = float((a.totals[0, 0]).sum() / a.counts[0, 0].sum())
        for i, (found, truth) in enumerate(((half, KNOWN), (in_area, 0.75 * KNOWN / clean))):
            covered[i] += found.low <= truth <= found.high
    assert (covered / n > 0.95 - 3 * math.sqrt(0.95 * 0.05 / n)).all(), covered / n
    assert (covered / n < 0.985).all(), covered / n


def test_where_seeds_alone_differ_the_interval_is_that_of_their_means(monkeypatch):
    monkeypatch.setattr(comparison, "DRAWS", 20_000)
    gaps, counts = np.array([0.1, 0.3, 0.15, 0.4]), np.full((4, 3, 30), 10.0)
    worse, better = (Curve(FRACTIONS, counts * (CLEAN + of_seed), counts) for of_seed in (gaps[:, None, None], 0.0))
    (_, half, _), _ = differences(worse, better, "loss")
    expected = stats.t.interval(0.95, 3, loc=gaps.mean(), scale=stats.sem(gaps))
    assert (half.low, half.high) == pytest.approx(expected, rel=0.03) and half.freedom == pytest.approx(3)


def test_the_p_value_and_the_interval_say_the_same():
    rng = np.random.default_rng(3)
    for _ in range(20):
        at_fractions, in_area = differences(*simulated(3, 30, 0.1, rng), "loss")
        for found in (*at_fractions[1:], in_area):
            assert (found.p < 0.05) == (found.low > 0 or found.high < 0)


def test_the_clean_values_do_not_differ_and_nor_does_a_method_from_itself():
    a, b = simulated(3, 30, 0.1, np.random.default_rng(0))
    (clean, *_), _ = differences(a, b, "loss")
    assert (clean.value, clean.low, clean.high, clean.p) == (0, 0, 0, 1)
    at_fractions, in_area = differences(a, a, "loss")
    assert all((d.value, d.p) == (0, 1) for d in (*at_fractions, in_area))


def test_one_document_tells_nothing_about_luck():
    a, b = simulated(1, 1, 0.0, np.random.default_rng(0))
    (_, half, _), _ = differences(a, b, "loss")
    assert half.value != 0 and math.isnan(half.low) and math.isnan(half.p)


def test_a_model_that_is_never_right_has_no_share_of_its_accuracy(recwarn):
    nothing = np.zeros((1, 3, 5))
    curve = Curve(FRACTIONS, nothing, nothing + 10)
    at_fractions, in_area = comparison.levels(curve, "top1")
    assert [e.value for e in at_fractions] == [0, 0, 0] and math.isnan(in_area.value)
    unscored = Curve(FRACTIONS, nothing, nothing)
    assert math.isnan(comparison.levels(unscored, "loss")[0][0].value) and not recwarn.list


@pytest.mark.parametrize("metric", ["loss", "kl"])
def test_the_area_is_the_mean_height(metric):
    values = np.array([[2.0, 4.0, 8.0], [1.0, 1.0, 1.0]])
    clean = values[:, :1].repeat(3, 1)
    assert mean_height((0.0, 0.5, 1.0), values, clean, "loss").tolist() == [4.5 / 2, 1.0]
    assert mean_height((0.0, 0.5, 1.0), values, clean, "kl").tolist() == [4.5, 1.0]
    assert mean_height((0.0, 0.2, 0.8), values, clean, "kl").tolist() == pytest.approx([(3 * 0.2 + 6 * 0.6) / 0.8, 1.0])


def test_an_area_is_a_share_of_the_clean_value_on_the_documents_of_each_point():
    """Half of them was evaluated at 50 % alone; whatever they are like, nothing is damaged."""
    totals = np.array([[[1.0, 3, 5, 7]] * 3])
    counts = np.ones_like(totals)
    totals[:, 1, 2:] = counts[:, 1, 2:] = 0
    found = comparison.levels(Curve(FRACTIONS, totals, counts), "loss")
    assert [e.value for e in found[0]] == [4, 2, 4] and found[1].value == 1


def of(fractions: dict[float, range]) -> pd.DataFrame:
    return pd.DataFrame([{"fraction": f, "document": d} for f, documents in fractions.items() for d in documents])


def test_documents_that_all_have_and_the_clean_values_of_each_point():
    """Jobs of one fraction each, one of which was precise with fewer documents."""
    one, other = of({0.0: range(8), 0.1: range(8)}), of({0.0: range(4), 0.5: range(4)})
    third = of({0.0: range(6), 0.1: range(6)})
    kept = comparison.shared([one, other, third])
    expected = [of({0.0: range(6), 0.1: range(6)}), other, third]
    for found, wanted in zip(kept, expected, strict=True):
        pd.testing.assert_frame_equal(found.reset_index(drop=True), wanted)


def test_two_points_are_no_curve_unless_there_are_no_more():
    fifths, ends, halves = ({f: range(3) for f in fs} for fs in ((0.0, 0.2, 0.6, 1.0), (0.0, 1.0), (0.0, 0.5, 1.0)))
    assert comparison.are_too_few({0.0, 1.0}, [of(fifths), of(ends)])
    assert not comparison.are_too_few({0.0, 1.0}, [of(ends), of(ends)])
    assert not comparison.are_too_few({0.0, 0.5, 1.0}, [of(halves), of(fifths)])
    assert not comparison.are_too_few({0.0, 0.5}, [of(halves), of({0.0: range(3), 0.5: range(3)})])


def test_holm():
    """The first are those of R's p.adjust(p, "holm")."""
    assert holm([0.01, 0.04, 0.03, 0.02]) == pytest.approx([0.04, 0.06, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    found = holm([0.01, math.nan, 0.02])
    assert found[0] == 0.02 and math.isnan(found[1]) and found[2] == 0.02
    assert holm([]) == []


def test_an_interval_leaves_out_0_exactly_where_holms_p_is_below_5_percent():
    """Whatever the p-values: all, some or none decided, ties, and those that Holm's procedure alone decides."""
    rng, alone = np.random.default_rng(0), 0
    for _ in range(300):
        p = np.concatenate([rng.uniform(0, 0.03, rng.integers(1, 6)), rng.uniform(size=2)])
        p = [*rng.permutation(p).tolist(), 0.011, 0.011, math.nan]
        adjusted = holm(p)
        for own, of_family, level in zip(p, adjusted, comparison.levels_of(p), strict=True):
            if not math.isnan(own):
                assert (own < 1 - level) == (of_family < 0.05)
                alone += of_family < 0.05 <= own * (len(p) - 1)
                assert level >= 1 - 0.05 / (len(p) - 1) - 1e-12 or of_family < 0.05
    assert alone > 50


def test_an_interval_at_another_level_is_that_of_scipy():
    (_, half, _), _ = differences(*simulated(3, 30, 0.1, np.random.default_rng(0)), "loss")
    for level in (0.9, 0.95, 0.999):
        theirs = stats.t.interval(level, half.freedom, loc=half.value, scale=half.stderr)
        assert half.interval(level) == pytest.approx(theirs)
    assert half.interval(0.95) == (half.low, half.high)


def test_a_difference_that_is_the_same_on_all_documents_is_no_luck():
    counts = np.full((1, 3, 8), 8.0)
    always = [Curve(FRACTIONS, counts * right, counts) for right in (1.0, 0.5)]
    (_, half, _), _ = differences(*always, "top1")
    assert (half.value, half.low, half.high, half.p) == (0.5, 0.5, 0.5, 0.0)


# Tables


def test_what_is_better_and_what_cannot_be_told():
    found = compare(runs(), ["loss"]).set_index(["method", "other", "fraction"])
    half = found.loc[("zero", "mean", 0.5)]
    assert half["better"] == "mean" and half["difference"] == pytest.approx(0.5, abs=0.02)
    assert half["low"] < 0.5 < half["high"] and half["n_seeds"] == 3 and half["n_documents"] == 40
    areas = found[found.index.get_level_values("fraction").isna()]
    assert areas["better"].tolist() == ["mean", "same", ""]
    assert (found["p_holm"] >= found["p"]).all() and not found.index.get_level_values("fraction").isin([0.0]).any()


def test_what_is_printed_beside_holms_p_says_the_same():
    """One noisy method and two that differ: at the fractions and in the areas."""
    for documents in (noisy(), noisy(noise=0.4), runs(), runs(n_seeds=1)):
        found = compare(documents, ["loss", "top1"])
        out = (found["low"] > 0) | (found["high"] < 0)
        assert (out == (found["p_holm"] < 0.05)).all() and (out == (found["better"] != "")).all()
        wider = (found["high"] - found["low"]) - (found["high_unadjusted"] - found["low_unadjusted"])
        assert (wider >= -1e-12).all() and ((found["low"] + found["high"]) / 2).to_numpy() == pytest.approx(
            found["difference"].to_numpy(), abs=1e-12
        )
    areas = compare(noisy(), ["loss"]).query("fraction != fraction").set_index(["method", "other"])
    assert areas["better"].to_dict() == {("zero", "mean"): "mean", ("zero", "same"): "", ("mean", "same"): ""}


def test_more_accuracy_is_better():
    accuracy = {"zero": np.array([[0.6], [0.3], [0.1]]), "mean": np.array([[0.6], [0.5], [0.4]])}
    of_documents = {"zero": np.linspace(0, 0.1, 9), "mean": np.linspace(0, 0.11, 9)}
    both = {(method, seed): table(np.full((3, 9), 3.0), accuracy[method] + of_documents[method])
            for method in accuracy for seed in (0, 1)}  # fmt: skip
    found = compare(both, ["top1"])
    assert set(found["better"]) == {"mean"} and (found["difference"] < 0).all()


def test_only_what_all_have_is_compared():
    """A document that one method lacks at a fraction, a seed that one lacks, and a fraction that one lacks."""
    all_of_them = runs()
    short = all_of_them["mean", 0]
    all_of_them["mean", 0] = short[(short["fraction"] < 1) & ((short["fraction"] == 0) | (short["document"] < 20))]
    del all_of_them["mean", 2]
    found = compare(all_of_them, ["loss"]).set_index(["method", "other", "fraction"])
    assert found.loc[("zero", "mean", 0.5), "n_seeds"] == 2 and ("zero", "mean", 1.0) not in found.index
    assert found.loc[("zero", "same", 1.0), "n_seeds"] == 3
    first = [t[t["document"] < 20] for t in (all_of_them["zero", 0], all_of_them["zero", 1])]
    other = [t[t["document"] < 20] for t in (all_of_them["mean", 0], all_of_them["mean", 1])]
    by_hand = [np.mean([t.loc[t["fraction"] == 0.5, "loss"].sum() / 200 for t in of]) for of in (first, other)]
    assert found.loc[("zero", "mean", 0.5), "difference"] == pytest.approx(by_hand[0] - by_hand[1])


def test_documents_that_do_not_count_at_a_fraction_are_none_of_its_number():
    """As with eval.target_stderr."""
    a, b = simulated(1, 60, 0.0, np.random.default_rng(0))
    few = [Curve(c.fractions, c.totals * keep, c.counts * keep) for c in (a, b) for keep in [np.ones((1, 3, 60))]]
    for curve in few:
        curve.totals[:, 1, 8:] = curve.counts[:, 1, 8:] = 0
    assert few[0].n_documents.tolist() == [60, 8, 60]
    (_, half, whole), in_area = differences(*few, "loss")
    assert half.p == pytest.approx(p_of(half, 7)) and whole.p == pytest.approx(p_of(whole, 59))
    assert in_area.p == pytest.approx(p_of(in_area, 7))


def p_of(found: comparison.Estimate, freedom: int) -> float:
    """From its interval, if that is Student's with so many degrees of freedom."""
    stderr = (found.high - found.low) / 2 / stats.t.ppf(0.975, freedom)
    return float(2 * stats.t.sf(abs(found.value) / stderr, freedom))
