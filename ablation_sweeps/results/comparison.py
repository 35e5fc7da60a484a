"""Compares methods: paired differences, with confidence intervals over documents and seeds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from ablation_sweeps.base.lazy import pd
from ablation_sweeps.results.metrics import mean_height, metric_named, safe_divide

if TYPE_CHECKING:
    from pandas import DataFrame


DRAWS = 2000
MAX_WEIGHTS = 1 << 24  # document weights in memory, 8 bytes each
LEVEL = 0.95

DocumentSums = Float[np.ndarray, "seeds fractions documents"]
Values = Float[np.ndarray, "draws points"]
Weights = Float[np.ndarray, "draws _units"]  # how often each seed, or each document, is drawn


@dataclass(frozen=True)
class Curve:
    """The curve of one method and metric, as sums for every seed, fraction (from 0 on) and document.

    Attributes:
        totals, counts: numerator and denominator of the metric. A document that was not evaluated at a fraction has a
            count of 0 there.
    """

    fractions: tuple[float, ...]
    totals: DocumentSums
    counts: DocumentSums

    @property
    def n_documents(self) -> Int[np.ndarray, " fractions"]:
        """Number of documents evaluated at each fraction."""
        return (self.counts > 0).any(0).sum(1)

    def values(
        self, seeds: Float[np.ndarray, "draws seeds"], documents: Float[np.ndarray, "draws documents"]
    ) -> Values:
        """The curve, `[draws, fractions]`, with seeds and documents weighted as given."""
        return _mean(self.totals, self.counts, seeds, documents)

    def clean(self, seeds: Float[np.ndarray, "draws seeds"], documents: Float[np.ndarray, "draws documents"]) -> Values:
        """Clean values, `[draws, fractions]`, with the same weights; for each point, on the documents of that point."""
        here = self.counts > 0
        if (here == here[:, :1]).all():  # the usual case: all points have the same documents
            return np.repeat(_mean(self.totals[:, :1], self.counts[:, :1], seeds, documents), here.shape[1], 1)
        return _mean(self.totals[:, :1] * here, self.counts[:, :1] * here, seeds, documents)


def _mean(
    totals: DocumentSums,
    counts: DocumentSums,
    seeds: Float[np.ndarray, "draws seeds"],
    documents: Float[np.ndarray, "draws documents"],
) -> Values:
    total, count = (np.einsum("sfr,rs->rf", sums @ documents.T, seeds, optimize=True) for sums in (totals, counts))
    return safe_divide(total, count)


def t_half_width(stderr: Any, freedom: Any, level: float = LEVEL) -> Any:
    """Half of the width of Student's t-interval; element by element for arrays."""
    from scipy.special import stdtrit  # as in scipy.stats, which takes a second to import

    return stdtrit(freedom, (1 + level) / 2) * stderr


@dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval.

    Attributes:
        low, high: ends of the 95 % interval.
        p: two-sided p-value for the value being 0; below 0.05 exactly where the interval excludes 0.
        stderr, freedom: standard error and degrees of freedom of the t-interval.
    """

    value: float
    low: float
    high: float
    p: float
    stderr: float = math.nan
    freedom: float = math.nan

    def interval(self, level: float) -> tuple[float, float]:
        """Ends of the interval at another confidence level."""
        if not self.stderr > 0:
            return self.low, self.high
        half = float(t_half_width(self.stderr, self.freedom, level))
        return self.value - half, self.value + half


def levels(curve: Curve, metric: str, seed: int = 0) -> tuple[list[Estimate], Estimate]:
    """Values of a curve at each fraction, and the area under it (see `metrics.mean_height`), with intervals.

    The variance is the sum of those of two bootstraps, over documents and over seeds. The interval is Student's t with
    Satterthwaite's degrees of freedom, since quantiles of the draws would be too narrow for a few seeds. With one seed,
    it covers the variation between documents only, not between neurons.

    Args:
        seed: random seed of the bootstrap; the draws are the same for all methods.
    """
    return _estimates(lambda *weights: _points_and_area(curve, metric, *weights), curve, seed)


def differences(a: Curve, b: Curve, metric: str, seed: int = 0) -> tuple[list[Estimate], Estimate]:
    """Differences `a - b` between two methods on the same neurons and documents; computed like `levels`."""
    return _estimates(
        lambda *weights: _points_and_area(a, metric, *weights) - _points_and_area(b, metric, *weights), a, seed
    )


def _points_and_area(curve: Curve, metric: str, seeds: Weights, documents: Weights) -> Values:
    ratios = curve.values(seeds, documents), curve.clean(seeds, documents)
    values, clean = (metric_named(metric).of_ratio(x) for x in ratios)
    return np.concatenate([values, mean_height(curve.fractions, values, clean, metric)[:, None]], 1)


def _estimates(statistic: Callable[..., Values], like: Curve, seed: int) -> tuple[list[Estimate], Estimate]:
    """Estimate each point, and the area, with bootstrap intervals.

    Args:
        statistic: computes points and area from weights of the seeds and of the documents, `[draws, seeds]` and
            `[draws, documents]`.
        like: curve that gives the number of seeds and documents.
    """
    n_seeds, _, n_documents = like.totals.shape
    rng = np.random.default_rng(seed)
    of_points = like.n_documents.tolist()
    of_points.append(min(of_points))  # documents of the area
    all_seeds, all_documents = np.ones((1, n_seeds)), np.ones((1, n_documents))
    values = statistic(all_seeds, all_documents)[0]
    over_documents = _variance(n_documents, rng, lambda w: statistic(np.repeat(all_seeds, len(w), 0), w))
    over_seeds = np.zeros_like(values)
    if n_seeds > 1:
        over_seeds = _variance(n_seeds, rng, lambda w: statistic(w, np.repeat(all_documents, len(w), 0)))
    found = [
        with_interval(value, of_documents, of_seeds, n, n_seeds)
        for value, of_documents, of_seeds, n in zip(values, over_documents, over_seeds, of_points, strict=True)
    ]
    return found[:-1], found[-1]


def half_gone_at(fractions: Sequence[float], values: Sequence[float]) -> float:
    """Fraction at which a curve first falls to half of its value at fraction 0, by linear interpolation.

    NaN if it never does, or if the curve does not begin at fraction 0.
    """
    if fractions[0] != 0:
        return math.nan
    target = values[0] / 2
    points = zip(fractions, values, strict=True)
    for (left, above), (right, below) in itertools.pairwise(points):
        if below <= target < above:
            return left + (right - left) * (above - target) / (above - below)
    return math.nan


def _variance(n: int, rng: np.random.Generator, statistic: Callable[..., Values]) -> Float[np.ndarray, " points"]:
    """Bootstrap variance over `n` units, corrected for its bias at small `n`."""
    if n < 2:
        return np.full_like(statistic(np.ones((1, n)))[0], math.nan)
    n_at_a_time = max(1, MAX_WEIGHTS // n)
    sizes = [min(n_at_a_time, DRAWS - start) for start in range(0, DRAWS, n_at_a_time)]
    draws = [statistic(rng.multinomial(n, np.full(n, 1 / n), size).astype(float)) for size in sizes]
    return np.concatenate(draws).var(0, ddof=1) * n / (n - 1)


def with_interval(value: float, of_documents: float, of_seeds: float, n_documents: int, n_seeds: int) -> Estimate:
    """The value with its t-interval, from its variance over documents and that over seeds."""
    from scipy.special import stdtr

    variance = of_documents + of_seeds
    if n_documents < 2 or math.isnan(variance):
        return Estimate(float(value), math.nan, math.nan, 1.0 if value == 0 else math.nan)
    if variance == 0:  # the same at every draw, as the clean values are
        return Estimate(float(value), float(value), float(value), float(value == 0), 0.0, math.inf)
    freedom = variance**2 / (of_documents**2 / (n_documents - 1) + of_seeds**2 / max(n_seeds - 1, 1))
    stderr = math.sqrt(variance)
    found = Estimate(float(value), math.nan, math.nan, float(2 * stdtr(freedom, -abs(value) / stderr)), stderr, freedom)
    low, high = found.interval(LEVEL)
    return replace(found, low=low, high=high)


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p-values for a family of tests (Holm 1979). NaN stays NaN, and is not counted."""
    known = sorted((value, i) for i, value in enumerate(p) if not math.isnan(value))
    adjusted, highest = list(p), 0.0
    for rank, (value, i) in enumerate(known):
        highest = max(highest, min(1.0, value * (len(known) - rank)))
        adjusted[i] = highest
    return adjusted


def levels_of(p: Sequence[float]) -> list[float]:
    """Confidence levels for a family of intervals, so that each excludes 0 exactly where Holm's p is below 0.05.

    They are simultaneous: by Bonferroni, 1 - 0.05/m for m tests, which is wide enough to include 0 wherever Holm's
    procedure does not reject. Where it rejects and Bonferroni's would not, the level is that of Holm's step.
    """
    adjusted, alpha = holm(p), 1 - LEVEL
    known = sorted((i for i, value in enumerate(p) if not math.isnan(value)), key=lambda i: p[i])
    tests = [max(len(known), 1)] * len(p)
    for rank, i in enumerate(known):
        if adjusted[i] < alpha <= p[i] * len(known):
            tests[i] = len(known) - rank
    return [1 - alpha / n for n in tests]


Documents = Mapping[tuple[str, int], "DataFrame"]


def compare(documents: Documents, metrics: Sequence[str], common: Mapping[str, Documents] | None = None) -> DataFrame:
    """Compare all pairs of methods of one study.

    Args:
        documents: metric sums per document (see `metrics.SUMS`) for every method and seed.
        common: for each metric, the tables from which areas are computed, if both methods are among them; other pairs
            use what the two share.

    Returns:
        One row for each metric, pair and fraction, and one for the area, whose `fraction` is NaN: `metric`, `method`,
        `other`, `fraction`, `difference` (method - other), `low`, `high` (its interval at the confidence `level`),
        `p_holm` (adjusted over all pairs of a metric: areas are one family, all fractions another), `better` (the
        better method where p_holm < 0.05, which is where the interval excludes 0; else empty), `n_seeds`,
        `n_documents`; and, not adjusted for other tests: `p`, `low_unadjusted`, `high_unadjusted`.
    """
    methods = list(dict.fromkeys(method for method, _ in documents))
    rows: list[dict[str, Any]] = []
    found: list[Estimate] = []
    for metric, pair in itertools.product(metrics, itertools.combinations(methods, 2)):
        known = {key: table for key, table in documents.items() if key[0] in pair and metric_named(metric).is_in(table)}
        for fraction, estimate, n_seeds, n_documents in _of_pair(known, pair, metric, (common or {}).get(metric, {})):
            labels = dict(zip(("metric", "method", "other"), (metric, *pair), strict=True))
            rows.append({**labels, "fraction": fraction, "n_seeds": n_seeds, "n_documents": n_documents})
            found.append(estimate)
    table = pd.DataFrame(rows, columns=["metric", "method", "other", "fraction", "n_seeds", "n_documents"])
    table["difference"] = [one.value for one in found]
    table["p"] = [one.p for one in found]
    table["low_unadjusted"], table["high_unadjusted"] = [one.low for one in found], [one.high for one in found]
    families = table.groupby(["metric", table["fraction"].isna()])["p"]
    table["p_holm"], table["level"] = (
        families.transform(lambda p, adjust=adjust: adjust(p.tolist())) if len(table) else table["p"]
        for adjust in (holm, levels_of)
    )
    ends = [one.interval(level) for one, level in zip(found, table["level"], strict=True)]
    table["low"], table["high"] = [low for low, _ in ends], [high for _, high in ends]
    first = (table["difference"] < 0) == table["metric"].map(lambda name: metric_named(name).less_is_better)
    table["better"] = table["method"].where(first, table["other"]).where(table["p_holm"] < 1 - LEVEL, "")
    first_columns = ["metric", "method", "other", "fraction", "difference", "low", "high", "level", "p_holm", "better"]
    last_columns = ["n_seeds", "n_documents", "p", "low_unadjusted", "high_unadjusted"]
    return table.loc[:, [*first_columns, *last_columns]]


def _of_pair(
    documents: Documents, pair: tuple[str, str], metric: str, common: Documents
) -> Iterator[tuple[float, Estimate, int, int]]:
    """Give fraction, difference, number of seeds and of documents, for each fraction and the area (fraction NaN)."""
    first, second = pair
    seeds = [seed for method, seed in documents if method == first and (second, seed) in documents]
    if not seeds:
        return
    one, other = paired([[documents[method, seed] for seed in seeds] for method in pair], metric)
    if len(one.fractions) < 2:
        return
    at_fractions, in_area = differences(one, other, metric)
    for fraction, found, n_documents in zip(one.fractions, at_fractions, one.n_documents.tolist(), strict=True):
        if fraction != 0:  # at 0, nothing is ablated: all methods are equal
            yield fraction, found, len(seeds), n_documents
    if {first, second} <= {method for method, _ in common}:
        shared_seeds = [seed for method, seed in common if method == first]
        one, other = paired([[common[method, seed] for seed in shared_seeds] for method in pair], metric)
        _, in_area = differences(one, other, metric)
    elif are_too_few(one.fractions, [documents[method, seed] for method in pair for seed in seeds]):
        return
    yield math.nan, in_area, len(one.totals), int(one.n_documents.min())


def are_too_few(fractions: Collection[float], tables: Sequence[DataFrame]) -> bool:
    """True if the tables share too few fractions for an area.

    A straight line between two points is not the curve of a method that was evaluated between them.
    """
    return len(fractions) < 3 and any(
        (~table["fraction"].isin(fractions) & (table["fraction"] < max(fractions))).any() for table in tables
    )


def shared(tables: Sequence[DataFrame]) -> list[DataFrame]:
    """The tables with only the documents that all of them have, at each fraction.

    At fraction 0, each table also keeps the documents that it keeps at another fraction: its points are relative to
    their clean values.
    """
    common: dict[float, set[int]] = {}
    for table in tables:
        for fraction, documents in table.groupby("fraction")["document"]:
            common[fraction] = common.get(fraction, set(documents)) & set(documents)  # type: ignore[index,arg-type]
    found = []
    for table in tables:
        is_common = np.array([d in common[f] for f, d in zip(table["fraction"], table["document"], strict=True)])
        own = table.loc[is_common & (table["fraction"] > 0), "document"]
        found.append(table.loc[is_common | ((table["fraction"] == 0) & table["document"].isin(own))])
    return found


def paired(of_methods: Sequence[Sequence[DataFrame]], metric: str) -> list[Curve]:
    """Curves of some methods, at the fractions and on the documents that all of their runs have."""
    tables = [table for of_seeds in of_methods for table in of_seeds]
    fractions = sorted(set.intersection(*(set(table["fraction"]) for table in tables)))
    documents = sorted(set.union(*(set(table["document"]) for table in tables)))
    columns = metric_named(metric).total, metric_named(metric).count
    arrays = np.array([
        [
            [table.pivot(index="fraction", columns="document", values=column)
             .reindex(index=fractions, columns=documents).to_numpy() for table in of_seeds]
            for of_seeds in of_methods
        ]
        for column in columns
    ])  # fmt: skip
    missing = np.isnan(arrays).any((0, 1, 2))  # a document that one run lacks at a fraction does not count there
    totals, counts = np.where(missing, 0.0, arrays)
    return [Curve(tuple(fractions), *sums) for sums in zip(totals, counts, strict=True)]


def seen_from(row: dict[Any, Any], method: str) -> Estimate:
    """Difference in a row of `compare` as `method` minus the other one."""
    sign = 1 if row["method"] == method else -1
    low, high = sorted((sign * row["low"], sign * row["high"]))
    return Estimate(sign * row["difference"], low, high, row["p"])
