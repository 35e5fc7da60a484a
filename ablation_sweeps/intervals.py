"""One study: its curves, areas and differences between methods, with all intervals."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ablation_sweeps.comparison import (
    Curve,
    Documents,
    Estimate,
    are_too_few,
    compare,
    half_gone_at,
    levels,
    paired,
)
from ablation_sweeps.figures import in_order
from ablation_sweeps.metrics import MAIN, holds, over

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Measured:
    """One study: what is shown of it.

    Attributes:
        curves: for each metric and method, over all its seeds, on the same documents.
        levels: their points, with intervals.
        areas: for each metric and method, over the seeds and fractions that all methods have; NaN where there are none,
            or for a method that is left out so that the others have some.
        n_seeds, n_documents: numbers that the areas of each metric are taken over.
        fractions: those that the areas span.
        comparisons: all pairs of methods (see `comparison.compare`).
        half_gone: for each accuracy and method, the fraction at which half of the clean value is gone; NaN if never.
        missing: for each metric, the methods of which not every run has measured it.
    """

    name: str
    title: str
    unit: str
    methods: list[str]
    curves: dict[str, dict[str, Curve]]
    levels: dict[str, dict[str, list[Estimate]]]
    areas: dict[str, dict[str, Estimate]]
    n_seeds: dict[str, int]
    n_documents: dict[str, int]
    fractions: tuple[float, ...]
    comparisons: DataFrame
    half_gone: dict[str, dict[str, float]]
    chance: dict[str, float]
    missing: dict[str, list[str]]

    @property
    def reach(self) -> float:
        """The last fraction of the areas; 0 where there are none."""
        return max(self.fractions, default=0.0)

    @property
    def ranking(self) -> DataFrame:
        """The pairs of methods by their areas of the loss."""
        rows = self.comparisons.query("metric == 'loss' and fraction != fraction")
        compared = [method for method in self.methods if not math.isnan(self.area("loss", method).value)]
        return rows.loc[rows["method"].isin(compared) & rows["other"].isin(compared)]

    def area(self, metric: str, method: str) -> Estimate:
        """The area, of which nothing is known where the metric was not measured."""
        return self.areas.get(metric, {}).get(method, UNKNOWN)


def measured(
    name: str, title: str, unit: str, rows: DataFrame, documents: dict[tuple[str, int], DataFrame]
) -> Measured:
    """Computes all intervals of a study.

    Args:
        documents: the sums of each document for every method and seed.
    """
    methods = in_order({method for method, _ in documents})
    known = [metric for metric in dict.fromkeys(rows["metric"]) if metric != "perplexity"]
    metrics = sorted(known, key=lambda name: ("_skip" in name, *(name != first for first in MAIN)))
    in_turn = {(method, seed): table for method in methods for (of, seed), table in documents.items() if of == method}
    chance = {metric: float(rows.loc[rows["metric"] == metric, "chance"].mean()) for metric in metrics}
    has = {metric: _with(in_turn, metric) for metric in (*metrics, "perplexity")}
    curves = {metric: _curves(has[metric], metric) for metric in has}
    found = {metric: {method: levels(curve, metric) for method, curve in of.items()} for metric, of in curves.items()}
    common = _common(in_turn)
    shared_ = {metric: _of_all(_with(common, metric)) for metric in has}
    areas, n_seeds, n_documents = {}, {}, {}
    for metric, documents_ in shared_.items():
        of_common = curves[metric] if _are_same(documents_, has[metric]) else _curves(documents_, metric)
        areas[metric] = {method: UNKNOWN for method in methods} | {
            method: found[metric][method][1] if curve is curves[metric][method] else levels(curve, metric)[1]
            for method, curve in of_common.items()
        }
        n_seeds[metric] = len({seed for _, seed in documents_})
        n_documents[metric] = min((int(curve.n_documents.min()) for curve in of_common.values()), default=0)
    return Measured(
        name, title, unit, methods,
        curves={metric: curves[metric] for metric in metrics},
        levels={metric: {method: points for method, (points, _) in found[metric].items()} for metric in metrics},
        areas=areas, n_seeds=n_seeds, n_documents=n_documents,
        fractions=tuple(sorted({fraction for table in common.values() for fraction in table["fraction"]})),
        comparisons=compare(in_turn, metrics, shared_),
        half_gone={
            metric: {method: _half_gone(curve) for method, curve in curves[metric].items()}
            for metric in metrics if metric.startswith("top")
        },
        chance=chance,
        missing={
            metric: lacking for metric in metrics
            if (lacking := [m for m in methods if any(key[0] == m and key not in has[metric] for key in in_turn)])
        },
    )  # fmt: skip


UNKNOWN = Estimate(math.nan, math.nan, math.nan, math.nan)


def _with(documents: Documents, metric: str) -> Documents:
    """The runs that have measured the metric."""
    return {key: table for key, table in documents.items() if holds(table, metric)}


def _are_same(some: Documents, all_of_them: Documents) -> bool:
    return some.keys() == all_of_them.keys() and all(len(some[key]) == len(all_of_them[key]) for key in some)


def _curves(documents: Documents, metric: str) -> dict[str, Curve]:
    """The curve of each method, over all its seeds."""
    tables: dict[str, list[DataFrame]] = {}
    for (method, _), table in documents.items():
        tables.setdefault(method, []).append(table)
    return {method: paired([of_seeds], metric)[0] for method, of_seeds in tables.items()}


def _common(documents: Documents) -> Documents:
    """What all methods have: areas over other seeds or fractions are not comparable. Where that is nothing, those with
    the fewest points are left out, one after the other; it is empty where no two methods remain."""
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


def _half_gone(curve: Curve) -> float:
    all_of_it = np.ones((1, len(curve.totals))), np.ones((1, curve.totals.shape[-1]))
    (shares,) = over(curve.values(*all_of_it), curve.clean(*all_of_it))
    return half_gone_at(curve.fractions, shares.tolist())
