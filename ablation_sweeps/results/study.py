"""Analyses one study: curves, areas and paired comparisons, with intervals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ablation_sweeps.base.terminal import counted
from ablation_sweeps.results.comparison import Documents, Estimate, are_too_few, compare, half_gone_at, levels, paired
from ablation_sweeps.results.display import display_order, units_of
from ablation_sweeps.results.metrics import display_rank, metric_named, safe_divide

if TYPE_CHECKING:
    from pandas import DataFrame


Line = list[tuple[float, Estimate]]  # fractions in increasing order, and values at them


@dataclass(frozen=True)
class StudyResult:
    """Everything that is shown of one study.

    Attributes:
        levels: for each metric and method, its value at each fraction, over the seeds that have that fraction.
        areas: for each metric and method, over the seeds and fractions that all methods have. NaN if there are none, or
            for a method that was left out so that the others have some.
        n_seeds, n_documents: numbers that enter the areas of each metric.
        fractions: fractions that the areas cover.
        comparisons: all pairs of methods (see `comparison.compare`).
        half_gone: for each accuracy and method, the fraction at which half of the clean value is lost; NaN if never.
        chance: chance level of each metric.
        missing: for each metric, the methods with runs that have not measured it.
        calibration: see `thin_calibration`.
        ablated: what is ablated, "neurons", "heads", ...
    """

    name: str
    title: str
    unit: str
    methods: list[str]
    levels: dict[str, dict[str, Line]]
    areas: dict[str, dict[str, Estimate]]
    n_seeds: dict[str, int]
    n_documents: dict[str, int]
    fractions: tuple[float, ...]
    comparisons: DataFrame
    half_gone: dict[str, dict[str, float]]
    chance: dict[str, float]
    missing: dict[str, list[str]]
    calibration: tuple[int, int] | None
    ablated: str = "neurons"

    @property
    def reach(self) -> float:
        """The last fraction that the areas cover; 0 if there are no areas."""
        return max(self.fractions, default=0.0)

    @property
    def basis(self) -> str:
        """Number of seeds and documents that enter the areas of the loss (or of the first metric), in words."""
        metric = "loss" if "loss" in self.levels else next(iter(self.levels))
        documents = "images" if self.unit == "image" else "documents"
        return f"{counted(self.n_seeds[metric], 'seed')} and {self.n_documents[metric]:,} {documents}"

    @property
    def ranking(self) -> DataFrame:
        """Comparisons of all pairs of methods by the area of their loss."""
        rows = self.comparisons.query("metric == 'loss' and fraction != fraction")
        compared = [method for method in self.methods if not math.isnan(self.area("loss", method).value)]
        return rows.loc[rows["method"].isin(compared) & rows["other"].isin(compared)]

    def area(self, metric: str, method: str) -> Estimate:
        """The area of a metric and method; NaN if the metric was not measured."""
        return self.areas.get(metric, {}).get(method, NOT_MEASURED)


def analyse_study(
    name: str, title: str, unit: str, rows: DataFrame, documents: dict[tuple[str, int], DataFrame]
) -> StudyResult:
    """Compute all values and intervals of a study.

    Args:
        documents: metric sums per document for every method and seed.
    """
    methods = display_order({method for method, _ in documents})
    known = [metric for metric in dict.fromkeys(rows["metric"]) if metric != "perplexity"]
    metrics = sorted(known, key=display_rank)
    in_turn = {(method, seed): table for method in methods for (of, seed), table in documents.items() if of == method}
    chance = {metric: float(rows.loc[rows["metric"] == metric, "chance"].mean()) for metric in metrics}
    has = {metric: _with(in_turn, metric) for metric in (*metrics, "perplexity")}
    drawn = {metric: {m: _drawn(tables, metric) for m, tables in _by_method(has[metric]).items()} for metric in has}
    common = _common(in_turn)
    in_common = {metric: _of_all(_with(common, metric)) for metric in has}
    areas, n_seeds, n_documents = {}, {}, {}
    for metric, of_metric in in_common.items():
        curves = {method: paired([tables], metric)[0] for method, tables in _by_method(of_metric).items()}
        is_all = _are_same(of_metric, has[metric])
        areas[metric] = {method: NOT_MEASURED for method in methods} | {
            method: (drawn[metric][method].area if is_all else None) or levels(curve, metric)[1]
            for method, curve in curves.items()
        }
        n_seeds[metric] = len({seed for _, seed in of_metric})
        n_documents[metric] = min((int(curve.n_documents.min()) for curve in curves.values()), default=0)
    return StudyResult(
        name, title, unit, methods,
        levels={metric: {method: found.line for method, found in drawn[metric].items()} for metric in metrics},
        areas=areas, n_seeds=n_seeds, n_documents=n_documents,
        fractions=tuple(sorted({fraction for table in common.values() for fraction in table["fraction"]})),
        comparisons=compare(in_turn, metrics, in_common),
        half_gone={
            metric: {method: half_gone_at([f for f, _ in d.line], d.shares) for method, d in drawn[metric].items()}
            for metric in metrics if not metric_named(metric).less_is_better
        },
        chance=chance,
        missing={
            metric: lacking for metric in metrics
            if (lacking := [m for m in methods if any(key[0] == m and key not in has[metric] for key in in_turn)])
        },
        calibration=thin_calibration(rows),
        ablated=units_of(rows),
    )  # fmt: skip


def thin_calibration(rows: DataFrame) -> tuple[int, int] | None:
    """Smallest number of calibration positions in a study, and the number asked for, if the data held fewer than that.

    None if they held enough, or if an earlier version did not record it.
    """
    if "calibration_positions" not in rows:
        return None
    found = rows[["calibration_positions", "calibration_asked"]].dropna().astype(int)
    thin = found[found["calibration_positions"] < ENOUGH * found["calibration_asked"]]
    return (int(thin.iloc[:, 0].min()), int(thin.iloc[:, 1].max())) if len(thin) else None


def of_calibration(thin: tuple[int, int]) -> str:
    """Words on calibration data that held fewer positions than were asked for."""
    return f"of {thin[0]:,} positions, where {thin[1]:,} were asked for"


ENOUGH = 0.99  # fraction of the positions: the end of a document that is too short to be scored is left out


class Drawn(NamedTuple):
    """Values of one method and metric.

    Attributes:
        line: value at each fraction, with its interval.
        shares: the same values as fractions of the clean value.
        area: None if seeds differ in their fractions.
    """

    line: Line
    shares: list[float]
    area: Estimate | None


def _drawn(tables: Sequence[DataFrame], metric: str) -> Drawn:
    """Compute the values of one method and metric.

    Args:
        tables: metric sums per document, one table per seed.
    """
    seeds_at: dict[float, tuple[int, ...]] = {}
    for place, table in enumerate(tables):
        for fraction in table["fraction"].unique().tolist():
            seeds_at[fraction] = (*seeds_at.get(fraction, ()), place)
    points, areas = [], []
    for places in dict.fromkeys(seeds_at.values()):
        own = {fraction for fraction, seeds in seeds_at.items() if seeds == places}
        parts = [tables[place].loc[tables[place]["fraction"].isin({0.0, *own})] for place in places]
        (curve,) = paired([parts], metric)
        found, in_area = levels(curve, metric)
        all_of_it = np.ones((1, len(curve.totals))), np.ones((1, curve.totals.shape[-1]))
        (shares,) = safe_divide(curve.values(*all_of_it), curve.clean(*all_of_it))
        points += [p for p in zip(curve.fractions, found, shares.tolist(), strict=True) if p[0] in own]
        areas.append(in_area)
    points.sort(key=lambda point: point[0])
    line, shares = [(at, value) for at, value, _ in points], [share for *_, share in points]
    return Drawn(line, shares, areas[0] if len(areas) == 1 else None)


NOT_MEASURED = Estimate(math.nan, math.nan, math.nan, math.nan)


def _with(documents: Documents, metric: str) -> Documents:
    """The runs that have measured a metric."""
    return {key: table for key, table in documents.items() if metric_named(metric).is_in(table)}


def _are_same(some: Documents, all_of_them: Documents) -> bool:
    return some.keys() == all_of_them.keys() and all(len(some[key]) == len(all_of_them[key]) for key in some)


def _by_method(documents: Documents) -> dict[str, list[DataFrame]]:
    tables: dict[str, list[DataFrame]] = {}
    for (method, _), table in documents.items():
        tables.setdefault(method, []).append(table)
    return tables


def _common(documents: Documents) -> Documents:
    """The results that all methods have, since areas over different seeds or fractions are not comparable.

    If they have none in common, methods with the fewest points are left out one by one. Empty if fewer than two remain.
    """
    points = Counter[str]()
    for (method, _), table in documents.items():
        points[method] += table["fraction"].nunique()
    methods = [method for method, _ in points.most_common()]
    for count in range(len(methods), min(len(methods), 2) - 1, -1):
        if found := _of_all({key: table for key, table in documents.items() if key[0] in methods[:count]}):
            return found
    return {}


def _of_all(documents: Documents) -> Documents:
    seeds: dict[str, set[int]] = {}
    for method, seed in documents:
        seeds.setdefault(method, set()).add(seed)
    shared_seeds = set.intersection(*seeds.values()) if seeds else set()
    kept = {key: table for key, table in documents.items() if key[1] in shared_seeds}
    fractions = set.intersection(*(set(table["fraction"]) for table in kept.values())) if kept else set()
    if len(fractions) < 2 or are_too_few(fractions, list(kept.values())):
        return {}
    return {key: table.loc[table["fraction"].isin(fractions)] for key, table in kept.items()}
