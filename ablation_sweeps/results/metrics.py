"""Computes metrics, with standard errors, from sums over documents."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from ablation_sweeps.base.lazy import pd

if TYPE_CHECKING:
    from pandas import DataFrame


# Columns of a document: the number `n` of its scored positions, and sums over them. `_rare`: over the positions whose
# label is not among the most common tokens.
SUMS = ("n", "loss", "top1", "topk", "kl", "n_rare", "loss_rare", "top1_rare", "topk_rare")


@dataclass(frozen=True)
class Metric:
    """Everything that is known about a metric. Code that computes, compares or shows metrics looks it up here.

    Attributes:
        name: value in the column `metric` of rows.parquet.
        label: label of an axis; `{unit}` stands for what is scored, "token" or "image".
        heading: shorter label, for a table on a terminal.
        total, count: columns of `SUMS` whose ratio is the metric.
        scale: factor for display: 100 for percent.
        digits: decimals in a table.
        less_is_better: True for a loss, False for an accuracy.
        is_relative: True if areas are relative to the clean value; False if that is 0.
        is_exponential: True if the metric is the exponential of the ratio.
    """

    name: str
    label: str
    heading: str
    total: str
    count: str = "n"
    scale: float = 1.0
    digits: int = 3
    less_is_better: bool = True
    is_relative: bool = True
    is_exponential: bool = False

    def label_in(self, unit: str) -> str:
        """The label for a unit: "token" or "image"."""
        return self.label.replace("{unit}", unit)

    def heading_in(self, unit: str) -> str:
        """The heading for a unit: "token" or "image"."""
        return self.heading.replace("{unit}", unit)

    def of_ratio(self, ratio: np.ndarray) -> np.ndarray:
        """The value of the metric, given the ratio of its two sums."""
        return np.exp(np.minimum(ratio, 700)) if self.is_exponential else ratio

    def is_in(self, documents: DataFrame) -> bool:
        """True if the table has the sums of this metric, which earlier versions may not have measured."""
        return {self.total, self.count} <= {*documents.columns}


# In the order in which they are shown. `topk` stands for every k.
METRICS = (
    Metric("loss", "Loss (nats per {unit})", "loss (nats/{unit})", "loss"),
    Metric("top1", "Top-1 accuracy (%)", "top-1 (%)", "top1", scale=100.0, digits=1, less_is_better=False),
    Metric("kl", "KL from clean (nats per {unit})", "KL (nats/{unit})", "kl", is_relative=False),
    Metric("perplexity", "Perplexity", "perplexity", "loss", is_exponential=True),
    Metric("topk", "Top-{k} accuracy (%)", "top-{k} (%)", "topk", scale=100.0, digits=1, less_is_better=False),
)
MAIN = ("loss", "top1", "kl")  # shown in figures and summaries


@functools.cache
def metric_named(name: str) -> Metric:
    """The metric with a name such as `loss`, `top5` or `top5_skip100`, which leaves out the 100 most common tokens.

    A name that is not in the table, from another version of this code, is treated as the mean of a sum of that name.
    """
    base, _, skip = name.partition("_skip")
    metric = next((metric for metric in METRICS if metric.name == base), None)
    if metric is None and re.fullmatch(r"top\d+", base):
        topk = next(metric for metric in METRICS if metric.name == "topk")
        k = base.removeprefix("top")
        metric = replace(topk, label=topk.label.replace("{k}", k), heading=topk.heading.replace("{k}", k))
    metric = replace(metric or Metric(name, base, base, base), name=name)
    if not skip:
        return metric
    label = f"{metric.label}, without the {skip} most common tokens"
    return replace(metric, label=label, total=f"{metric.total}_rare", count="n_rare")


def display_rank(name: str) -> tuple[bool, int, str]:
    """Sort key in the order of display: metrics over all tokens first, in the order of `METRICS`."""
    base, _, skip = name.partition("_skip")
    order = [metric.name for metric in METRICS]
    return bool(skip), order.index(base) if base in order else len(order), name


def curve(documents: DataFrame, top_k: int, skip: int, chance: Mapping[str, float]) -> DataFrame:
    """The metrics at every point, each with its standard error and its chance level.

    loss: cross entropy in nats per token (image); higher is worse. perplexity: exp of the mean loss.
    top1, top<k>: fraction of tokens (images) whose label ranks first, or among the first k; lower is worse.
    kl: KL(clean || ablated) in nats per token (image); higher is worse.
    ..._skip<n>: the same over tokens whose label is not among the n most common ones in the calibration data.

    The standard error is that of a ratio of sums over documents, since the tokens of one document are not independent.
    It is NaN for a single document.

    Args:
        documents: one row per point and document, with the columns `SUMS`. A column `unit` holds the number of the unit
            that is ablated alone, and becomes the column `number`.
        skip: the n of `_skip<n>`; 0 for none.
        chance: chance level of each metric but perplexity, where it is known.
    """
    names = ["loss", "perplexity", "top1", f"top{top_k}", "kl"]
    names += [f"{name}_skip{skip}" for name in ("loss", "top1", f"top{top_k}") if skip]
    levels = {**chance, "perplexity": math.exp(chance.get("loss", math.nan))}
    rows = [
        {**at, "metric": name, **point(table, clean, name), "chance": levels.get(name, math.nan)}
        for at, table, clean in _points(documents)
        for name in dict.fromkeys(names)  # top_k may be 1
    ]
    return pd.DataFrame(rows)


def _points(documents: DataFrame) -> Iterator[tuple[dict[str, float], DataFrame, DataFrame]]:
    """For each point its columns, the table of its documents, and the table of the same documents in the clean pass."""
    if "unit" not in documents:
        for fraction, (table, clean) in with_clean(documents).items():
            yield {"fraction": fraction}, table, clean
        return
    clean = documents.loc[documents["unit"] < 0]
    for number, table in documents.groupby("unit"):
        at = {"fraction": float(table["fraction"].iloc[0]), "number": int(number)}  # type: ignore[arg-type]
        yield at, table, clean.loc[clean["document"].isin(table["document"])]


def with_clean(documents: DataFrame) -> dict[float, tuple[DataFrame, DataFrame]]:
    """For each fraction, the table of its documents, and the table of the same documents at fraction 0."""
    tables = {float(fraction): table for fraction, table in documents.groupby("fraction")}  # type: ignore[arg-type]
    clean = tables[0.0]
    return {at: (table, clean.loc[clean["document"].isin(table["document"])]) for at, table in tables.items()}


def point(documents: DataFrame, clean: DataFrame, metric: str) -> dict[str, float]:
    """`value`, `stderr` and `n` of one metric at one fraction, and `clean`: the clean value on the same documents."""
    return {**measure(documents, metric), "clean": measure(clean, metric)["value"]}


def measure(documents: DataFrame, metric: str) -> dict[str, float]:
    """`value`, `stderr` and `n` of one metric at one fraction."""
    total, count = metric_named(metric).total, metric_named(metric).count
    value, stderr = ratio(documents[total].to_numpy(), documents[count].to_numpy())
    if metric_named(metric).is_exponential:
        value = math.exp(min(value, 700))
        stderr *= value
    return {"value": value, "stderr": stderr, "n": int(documents[count].sum())}


def ratio(totals: Float[np.ndarray, " documents"], counts: Float[np.ndarray, " documents"]) -> tuple[float, float]:
    """Mean over positions, and its standard error (linearised) with documents as independent units."""
    n, d = counts.sum(), np.count_nonzero(counts)
    if n == 0:
        return math.nan, math.nan
    value = totals.sum() / n
    residuals = totals - value * counts
    stderr = math.sqrt((residuals**2).sum() * d / (d - 1)) / n if d > 1 else math.nan
    return float(value), float(stderr)


def mean_height(
    fractions: Sequence[float],
    values: Float[np.ndarray, "draws fractions"],
    clean: Float[np.ndarray, "draws fractions"],
    metric: str,
) -> Float[np.ndarray, " draws"]:
    """Mean height of each curve between its first and its last fraction, by the trapezoid rule.

    Heights are relative to the clean value, except for KL, whose clean value is 0. NaN for a single point.

    Args:
        clean: the clean value on the documents of each point; with `eval.target_stderr`, points differ in these.
    """
    if len(fractions) < 2:
        return np.full(len(values), math.nan)
    heights = safe_divide(values, clean) if metric_named(metric).is_relative else values
    return np.trapezoid(heights, fractions, axis=-1) / (fractions[-1] - fractions[0])


def normalised_auc(fractions: Sequence[float], values: Sequence[float], clean: Sequence[float], metric: str) -> float:
    """Area under one curve; 1.0 if it never leaves the clean value.

    NaN unless the fractions, in increasing order, reach from 0 to 1 with at least one between: with `fraction=0.5,1`
    each fraction is a job of its own, and a straight line from 0 to 1 is not its curve.
    """
    if not is_whole(fractions):
        return math.nan
    return float(mean_height(fractions, np.array([values], float), np.array([clean], float), metric)[0])


def pooled(rows: DataFrame) -> DataFrame:
    """`value` and `clean` of each method, metric and fraction, pooled over `n_seeds` seeds.

    As in areas and intervals, a pooled value is the ratio of sums over seeds and documents. That is the mean over
    seeds, unless seeds differ in their number of scored positions, as for masked language models.
    """
    keys, found = ["method", "metric", "fraction"], []
    for key, points in rows.groupby(keys):
        own, n = dict(zip(keys, tuple(key), strict=True)), points["n"].to_numpy(float)  # type: ignore[arg-type]
        row = {name: _pooled(points[name].to_numpy(float), n, str(own["metric"])) for name in ("value", "clean")}
        found.append({**own, **row, "n_seeds": points["seed"].nunique()})
    return pd.DataFrame(found, columns=[*keys, "value", "clean", "n_seeds"])


def _pooled(values: np.ndarray, n: np.ndarray, metric: str) -> float:
    if len(values) == 1 or not n.any():
        return float(values[0])
    weights = n / n.mean()
    if metric_named(metric).is_exponential:
        return math.exp((np.log(np.where(n > 0, values, 1.0)) * weights).mean())
    return float((np.where(n > 0, values, 0.0) * weights).mean())


def is_whole(fractions: Sequence[float]) -> bool:
    """True if a curve at these fractions, in increasing order, has an area: see `normalised_auc`."""
    return len(fractions) > 2 and fractions[0] == 0 and fractions[-1] == 1


def safe_divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Divide; NaN where the divisor is 0: no position is scored, or the clean model gets nothing right."""
    return np.divide(a, b, out=np.full_like(a, math.nan), where=b > 0)
