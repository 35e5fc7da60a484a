"""A sweep as one page, report.html, that needs no network: verdict, curves, differences, areas, neurons, failures."""

from __future__ import annotations

import html
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np

from ablation_sweeps.comparison import Curve, Estimate, are_too_few, compare, half_gone_at, levels, paired
from ablation_sweeps.console import counted
from ablation_sweeps.figures import GREY, in_order, looks
from ablation_sweeps.metrics import MAIN, over

if TYPE_CHECKING:
    from pandas import DataFrame

    Documents = Mapping[tuple[str, int], DataFrame]

TEMPLATE = Path(__file__).with_suffix(".html")
SYMBOLS = dict(zip("os^DvPX*", ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star"),
                   strict=True))  # fmt: skip
LAYOUT = {
    "template": "none",
    "margin": {"l": 60, "r": 12, "t": 12, "b": 48},
    "hovermode": "closest",
    "modebar": {"orientation": "v"},  # or it lies upon the legend
    "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0},
    "font": {"family": "system-ui, sans-serif", "size": 13},
}


@dataclass(frozen=True)
class Measured:
    """One study: what is shown of it.

    Attributes:
        curves: for each metric and method, over all its seeds, on the same documents.
        levels: their points, with intervals.
        areas: of each metric and method, over the seeds and fractions that all methods have; NaN where there are none,
            or for a method that is left out so that the others have some.
        ranking: the pairs of methods by these areas of the loss (see `comparison.compare`).
        reach: the last fraction of the areas.
    """

    name: str
    title: str
    unit: str
    methods: list[str]
    curves: dict[str, dict[str, Curve]]
    levels: dict[str, dict[str, list[Estimate]]]
    areas: dict[str, dict[str, Estimate]]
    ranking: DataFrame
    reach: float
    comparisons: DataFrame
    chance: dict[str, float]


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
    curves = {metric: _curves(in_turn, metric) for metric in metrics}
    chance = {metric: float(rows.loc[rows["metric"] == metric, "chance"].mean()) for metric in metrics}
    found = {metric: {method: levels(curve, metric) for method, curve in of.items()} for metric, of in curves.items()}
    points = {metric: {method: points for method, (points, _) in of.items()} for metric, of in found.items()}
    areas = {metric: {method: area for method, (_, area) in of.items()} for metric, of in found.items()}
    comparisons = ranking = compare(in_turn, metrics)
    common = _common(in_turn)
    if len(common) < len(in_turn) or any(len(common[key]) < len(table) for key, table in in_turn.items()):
        unknown = {method: UNKNOWN for method in methods}
        areas = {
            metric: unknown | {method: levels(curve, metric)[1] for method, curve in _curves(common, metric).items()}
            for metric in metrics
        }
        ranking = compare(common, ["loss"])
    ranking = ranking.query("metric == 'loss' and fraction != fraction")
    reach = max((float(table["fraction"].max()) for table in common.values()), default=0.0)
    return Measured(name, title, unit, methods, curves, points, areas, ranking, reach, comparisons, chance)


UNKNOWN = Estimate(math.nan, math.nan, math.nan, math.nan)


def _curves(documents: Documents, metric: str) -> dict[str, Curve]:
    """Of each method, over all its seeds."""
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
    shared_seeds = set.intersection(*seeds.values())
    kept = {key: table for key, table in documents.items() if key[1] in shared_seeds}
    fractions = set.intersection(*(set(table["fraction"]) for table in kept.values())) if kept else set()
    if len(fractions) < 2 or are_too_few(fractions, list(kept.values())):
        return {}
    return {key: table.loc[table["fraction"].isin(fractions)] for key, table in kept.items()}


# What is said


def verdict(study: Measured) -> str:
    """One sentence: which method does least damage, by the area under its loss, and whether that may be luck."""
    if len(study.methods) == 1:
        return f"Only {study.methods[0]} is finished: there is nothing to compare it with."
    compared = [method for method in study.methods if not math.isnan(study.areas["loss"][method].value)]
    if not compared:
        return (
            "Not all methods have results on the same seeds and fractions, so that none is called the best; "
            "comparisons.csv has what each two of them share."
        )
    left = [method for method in study.methods if method not in compared]
    are = "is" if len(left) == 1 else "are"
    return _best(study, compared) + (
        f" {_listed(left)} {are} left out, for want of results on the same seeds and fractions." if left else ""
    )


def _best(study: Measured, compared: Sequence[str]) -> str:
    height = {method: study.areas["loss"][method].value for method in compared}
    best, *others = sorted(compared, key=lambda method: height[method])
    pairs = {frozenset((row["method"], row["other"])): row for row in study.ranking.to_dict("records")}
    versus = {other: pairs[frozenset((best, other))] for other in others}
    tied = [other for other, row in versus.items() if row["better"] != best]
    n_seeds, n_documents = int(study.ranking["n_seeds"].min()), int(study.ranking["n_documents"].min())
    loss = "the loss" if study.reach == 1 else f"the loss up to {100 * study.reach:.4g}%"
    basis = f"{counted(n_seeds, 'seed')}, {n_documents} {'images' if study.unit == 'image' else 'documents'}"
    alone = "" if n_seeds > 1 else " One seed: nothing is said about other neurons."
    if tied:
        row = versus[tied[0]]
        rest = [other for other in others if other not in tied]
        beaten = [
            worse for worse in rest if all(pairs[frozenset((one, worse))]["better"] == one for one in (best, *tied))
        ]
        who = "Both" if len(tied) == 1 else "All of these"
        ahead = f" {who} do less damage than {_listed(beaten)}." if beaten else ""
        by_best = [worse for worse in rest if worse not in beaten]
        ahead += f" {best} does less damage than {_listed(by_best)}." if by_best else ""
        return (
            f"{_listed([best, *tied])} cannot be told apart: the area under {loss} of {best} differs from that of "
            f"{tied[0]} by {_interval(row, best)} of the clean loss ({_p(row['p_holm'])}; {basis}).{ahead}{alone}"
        )
    row = versus[others[0]]
    return (
        f"{best} does least damage: the area under {loss} is {height[best]:.3f} of the clean loss, against "
        f"{height[others[0]]:.3f} of {others[0]}, the next; difference {_interval(row, best)} "
        f"({_p(row['p_holm'])}; {basis}).{alone}"
    )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _interval(row: dict[Any, Any], first: str) -> str:
    found = _seen_from(row, first)
    return f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def _seen_from(row: dict[Any, Any], method: str) -> Estimate:
    """Of a row of `compare`: this method minus the other one."""
    sign = 1 if row["method"] == method else -1
    low, high = sorted((sign * row["low"], sign * row["high"]))
    return Estimate(sign * row["difference"], low, high, row["p"])


def _p(value: float) -> str:
    """After Holm's correction."""
    return "p unknown" if math.isnan(value) else "Holm's p < 0.001" if value < 0.001 else f"Holm's p = {value:.3f}"


# What is drawn


def label(metric: str, unit: str) -> str:
    name, _, skip = metric.partition("_skip")
    shown = {"loss": f"Loss (nats per {unit})", "kl": f"KL from clean (nats per {unit})"}.get(name)
    shown = shown or f"Top-{name.removeprefix('top')} accuracy (%)"
    return f"{shown}, without the {skip} most common tokens" if skip else shown


def figures(study: Measured) -> dict[str, Any]:
    """Plotly's json under `<metric>|`, of the curves, and under `<metric>|<method>`, of the differences to it."""
    found = {}
    for metric, curves in study.curves.items():
        scale, y = 100.0 if metric.startswith("top") else 1.0, label(metric, study.unit)
        points = study.levels[metric]
        lines = {method: list(zip(c.fractions, points[method], strict=True)) for method, c in curves.items()}
        clean = next(iter(lines.values()))[0][1].value
        marked = {} if metric == "kl" else {"clean": clean, "chance": study.chance.get(metric, math.nan)}
        found[f"{metric}|"] = _figure(lines, study.methods, scale, y, marked)
        for reference in study.methods if len(study.methods) > 1 else ():
            apart = {method: _apart(study.comparisons, metric, method, reference) for method in study.methods}
            apart = {method: points for method, points in apart.items() if points}
            found[f"{metric}|{reference}"] = _figure(apart, study.methods, scale, f"{y}, minus {reference}'s", {})
    return found


Line = list[tuple[float, Estimate]]


def _apart(comparisons: DataFrame, metric: str, method: str, reference: str) -> Line:
    if method == reference:
        return []
    rows = comparisons.query("metric == @metric and fraction == fraction").to_dict("records")
    of_both = [row for row in rows if {row["method"], row["other"]} == {method, reference}]
    points = [(row["fraction"], _seen_from(row, method)) for row in of_both]
    return [(0.0, Estimate(0.0, 0.0, 0.0, 1.0)), *points] if points else []


def _figure(lines: dict[str, Line], methods: list[str], scale: float, y: str, marked: dict[str, float]) -> Any:
    import plotly.graph_objects as go

    style = looks(methods)
    figure = go.Figure()
    for method, points in lines.items():
        colour, symbol = style[method]["color"], SYMBOLS[style[method]["marker"]]
        x = [100 * fraction for fraction, _ in points]
        middle, low, high = ([scale * getattr(e, at) for _, e in points] for at in ("value", "low", "high"))
        add_line(figure, method, x, middle, low, high, colour, "[%{customdata[0]:.4g}, %{customdata[1]:.4g}]")
        shown = {"name": html.escape(method)}
        figure.update_traces(marker={"size": 7, "symbol": symbol}, selector=shown)
        if style[method]["linestyle"] != "-":
            figure.update_traces(line_dash="dash", selector=shown)
    for name, value in marked.items():
        if not math.isnan(value):
            dashes, side = ("dash", "right") if name == "clean" else ("dot", "left")  # where the curves are not
            figure.add_hline(scale * value, line_color=GREY, line_width=1, line_dash=dashes, annotation_text=name,
                             annotation_font_color=GREY, annotation_position=f"top {side}")  # fmt: skip
    figure.update_layout(**LAYOUT, xaxis_title="Neurons ablated (%)", yaxis_title=y)
    return figure.to_plotly_json()


def add_line(
    figure: Any,
    name: str,
    x: Sequence[float],
    middle: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    colour: str,
    tail: str,
) -> None:
    """A line and its band, which the legend switches on and off together; `tail` ends what hovering shows."""
    name = html.escape(name)  # plotly takes it for markup
    if not any(math.isnan(value) for value in (*low, *high)):
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        pale = f"rgba({red},{green},{blue},0.18)"
        figure.add_scatter(x=[*x, *x[::-1]], y=[*high, *low[::-1]], fill="toself", fillcolor=pale, mode="lines",
                           line_width=0, hoverinfo="skip", legendgroup=name, showlegend=False)  # fmt: skip
    shown = f"<b>{name}</b> at %{{x:.4g}}: %{{y:.4g}} {tail}<extra></extra>"
    figure.add_scatter(x=x, y=middle, name=name, legendgroup=name, mode="lines+markers", line_color=colour,
                       customdata=list(zip(low, high, strict=True)), hovertemplate=shown)  # fmt: skip


def areas(study: Measured) -> list[dict[str, Any]]:
    """A row for each method: the area of each metric with its interval, where half of the accuracy is gone, and how
    many other methods it beats, and is beaten by, in the area under the loss."""
    rows = []
    won = study.ranking
    for method in study.methods:
        row: dict[str, Any] = {"method": method, "colour": looks(study.methods)[method]["color"]}
        row["beats"] = [int((won["better"] == method).sum())]
        mine = (won["method"] == method) | (won["other"] == method)
        row["beaten by"] = [int((mine & (won["better"] != "") & (won["better"] != method)).sum())]
        for metric, curves in study.curves.items():
            found = study.areas[metric][method]
            row[f"area of {metric}"] = [found.value, found.low, found.high]
            if metric == "top1":
                row["half gone"] = [_half_gone(curves[method])]
        rows.append(row)
    return rows


def _half_gone(curve: Curve) -> float:
    """In % of the neurons."""
    all_of_it = np.ones((1, len(curve.totals))), np.ones((1, curve.totals.shape[-1]))
    (shares,) = over(curve.values(*all_of_it), curve.clean(*all_of_it))
    return 100 * half_gone_at(curve.fractions, shares.tolist())


# The page


Shown = tuple[Measured, dict[str, Any] | None, dict[str, Any]]


def render(title: str, studies: list[Shown], failures: list[tuple[str, str, str]]) -> str:
    """The whole page.

    Args:
        studies: each with what is known of its neurons, and with its configuration and environment.
        failures: run, state and reason of all that is not finished.
    """
    from plotly.offline import get_plotlyjs

    content = {
        "studies": [
            {
                "name": study.name, "title": study.title, "verdict": verdict(study), "methods": study.methods,
                "metrics": {metric: label(metric, study.unit) for metric in study.curves},
                "figures": figures(study), "areas": areas(study), "neurons": about, "setup": setup,
                "reach": study.reach,
            }
            for study, about, setup in studies
        ],
        "failures": failures,
    }  # fmt: skip
    text = json.dumps(_plain(content), ensure_ascii=False).replace("<", "\\u003c")  # no tag, and no comment, begins
    return Template(TEMPLATE.read_text()).substitute(title=html.escape(title), plotly=get_plotlyjs(), content=text)


def _plain(content: Any) -> Any:
    """Json has neither arrays nor NaN."""
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple | np.ndarray):
        return [_plain(value) for value in content]
    if isinstance(content, np.generic):
        content = content.item()
    return None if isinstance(content, float) and not math.isfinite(content) else content
