"""Sums of documents -> metrics, with their standard errors."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from ablation_sweeps.base.lazy import pd

if TYPE_CHECKING:
    from pandas import DataFrame


# Over the scored positions of a document: their number, and what is summed up; `_rare`: over those whose label is not
# among the most common tokens.
SUMS = ("n", "loss", "top1", "topk", "kl", "n_rare", "loss_rare", "top1_rare", "topk_rare")


@dataclass(frozen=True)
class Metric:
    """All that is known of a metric: whoever computes, compares or shows metrics asks here.

    Attributes:
        name: as the column `metric` of rows.parquet has it.
        label: for axes; `{unit}` stands for what is scored, a token or an image.
        heading: shorter, for a table on a terminal.
        total, count: the two of `SUMS` whose ratio it is.
        scale: what values are multiplied with where they are shown: 100 for percent.
        digits: decimals in a table.
        less_is_better: True for a loss; False for an accuracy, of which half may be gone.
        is_relative: areas are shares of the clean value; False where that is 0.
        is_exponential: it is the exponential of the ratio.
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
        """The label, with what is scored: "token" or "image"."""
        return self.label.replace("{unit}", unit)

    def heading_in(self, unit: str) -> str:
        return self.heading.replace("{unit}", unit)

    def of_ratio(self, ratio: np.ndarray) -> np.ndarray:
        """The metric, from the ratio of its two sums."""
        return np.exp(np.minimum(ratio, 700)) if self.is_exponential else ratio

    def is_in(self, documents: DataFrame) -> bool:
        """Whether the sums of a run hold this metric, which earlier versions may not have measured."""
        return {self.total, self.count} <= {*documents.columns}


# In the order in which they are shown. `topk` stands for every k.
METRICS = (
    Metric("loss", "Loss (nats per {unit})", "loss (nats/{unit})", "loss"),
    Metric("top1", "Top-1 accuracy (%)", "top-1 (%)", "top1", scale=100.0, digits=1, less_is_better=False),
    Metric("kl", "KL from clean (nats per {unit})", "KL (nats/{unit})", "kl", is_relative=False),
    Metric("perplexity", "Perplexity", "perplexity", "loss", is_exponential=True),
    Metric("topk", "Top-{k} accuracy (%)", "top-{k} (%)", "topk", scale=100.0, digits=1, less_is_better=False),
)
MAIN = ("loss", "top1", "kl")  # drawn in figures, and summed up


@functools.cache
def metric_named(name: str) -> Metric:
    """The metric of a name such as `loss`, `top5` or `top5_skip100`: the last one leaves out the 100 most common
    tokens.

    A metric that is not in the table, as of another version of this code, is taken for the mean of a sum of its name.
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
    """Sorts metrics as they are shown: those over all tokens first, in the order of `METRICS`."""
    base, _, skip = name.partition("_skip")
    order = [metric.name for metric in METRICS]
    return bool(skip), order.index(base) if base in order else len(order), name


def curve(documents: DataFrame, top_k: int, skip: int, chance: Mapping[str, float]) -> DataFrame:
    """The metrics at every fraction, each with its standard error and its chance level.

    loss: cross entropy in nats a token (image); more is worse. perplexity: exp of the mean loss.
    top1, top<k>: fraction of tokens (images) whose label is first, or among the first k; less is worse.
    kl: KL(clean || ablated) in nats a token (image); more is worse.
    ..._skip<n>: the same over the tokens whose label is not among the n most common ones of the calibration data.

    The standard error is that of a ratio of sums over documents, since the tokens of one document are not independent:
    with one document it is NaN.

    Args:
        documents: a row for each fraction and document, with the columns `SUMS`.
        skip: the n of `_skip<n>`; 0 for none.
        chance: of each metric but perplexity, where it is known.
    """
    names = ["loss", "perplexity", "top1", f"top{top_k}", "kl"]
    names += [f"{name}_skip{skip}" for name in ("loss", "top1", f"top{top_k}") if skip]
    levels = {**chance, "perplexity": math.exp(chance.get("loss", math.nan))}
    rows = [
        {"fraction": fraction, "metric": name, **point(*tables, name), "chance": levels.get(name, math.nan)}
        for fraction, tables in with_clean(documents).items()
        for name in dict.fromkeys(names)  # top1 may be there twice
    ]
    return pd.DataFrame(rows)


def with_clean(documents: DataFrame) -> dict[float, tuple[DataFrame, DataFrame]]:
    """The documents at each fraction, and the same ones at fraction 0."""
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
    """Mean over positions, and its standard error with documents as the independent units (linearised)."""
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
    """Mean height of each curve between its first fraction and its last, by the trapezoid rule, as a share of the clean
    value; KL, whose clean value is 0, as it is. NaN of one point.

    Args:
        clean: the clean value on the documents of each point: with `eval.target_stderr`, points differ in these.
    """
    if len(fractions) < 2:
        return np.full(len(values), math.nan)
    heights = safe_divide(values, clean) if metric_named(metric).is_relative else values
    return np.trapezoid(heights, fractions, axis=-1) / (fractions[-1] - fractions[0])


def normalised_auc(fractions: Sequence[float], values: Sequence[float], clean: Sequence[float], metric: str) -> float:
    """The area under one curve; NaN where its fractions (in increasing order) do not reach from 0 to 1, or none lies
    between: with `fraction=0.5,1` each of them is a job, and a line from 0 to 1 is not their curve.

    1.0 is a curve that never leaves the clean value.
    """
    if not is_whole(fractions):
        return math.nan
    return float(mean_height(fractions, np.array([values], float), np.array([clean], float), metric)[0])


def pooled(rows: DataFrame) -> DataFrame:
    """`value` and `clean` of each method, metric and fraction over all of its seeds, whose number is `n_seeds`.

    As areas and intervals have it, a value is the ratio of sums over seeds and documents: the mean over seeds, unless
    these differ in the number of positions that are scored, as those of masked language models do.
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
    """True if a curve at these fractions, in increasing order, has an area: see `auc`."""
    return len(fractions) > 2 and fractions[0] == 0 and fractions[-1] == 1


def safe_divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """NaN where there is nothing to divide by: no scored position, or nothing right before anything is ablated."""
    return np.divide(a, b, out=np.full_like(a, math.nan), where=b > 0)
