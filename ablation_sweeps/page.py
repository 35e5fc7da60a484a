"""A sweep as one page, report.html, that needs no network: verdict, curves, differences, areas, neurons, failures."""

from __future__ import annotations

import heapq
import html
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np

from ablation_sweeps.comparison import Estimate
from ablation_sweeps.console import counted
from ablation_sweeps.figures import GREY, in_order, looks
from ablation_sweeps.intervals import Line, Measured, of_calibration
from ablation_sweeps.metrics import metric_named

if TYPE_CHECKING:
    from pandas import DataFrame

TEMPLATE = Path(__file__).with_suffix(".html")
SYMBOLS = dict(zip("os^DvPX*", ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star"),
                   strict=True))  # fmt: skip
SHOWN_GROUPS = 5  # of methods that cannot be told apart, in the verdict
COUNTED_GROUPS = 200  # at most: there may be millions
LAYOUT = {
    "template": "none",
    "margin": {"l": 60, "r": 12, "t": 12, "b": 48},
    "hovermode": "closest",
    "modebar": {"orientation": "v"},  # or it lies upon the legend
    "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0},
    "font": {"family": "system-ui, sans-serif", "size": 13},
}


# What is said


def verdict(study: Measured) -> str:
    """Which method does least damage, by the area under its loss, which cannot be told apart, and on what basis."""
    return " ".join([_said(study), *caveats(study)])


def _said(study: Measured) -> str:
    if len(study.methods) == 1:
        return f"Only {study.methods[0]} is finished: there is nothing to compare it with."
    compared = [method for method in study.methods if not math.isnan(study.area("loss", method).value)]
    if len(compared) < 2:
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
    height = {method: study.area("loss", method).value for method in compared}
    best, *others = ranked = sorted(compared, key=lambda method: height[method])
    pairs = {frozenset((row["method"], row["other"])): row for row in study.ranking.to_dict("records")}
    undecided = {pair for pair, row in pairs.items() if not row["better"]}
    tied = [other for other in others if {best, other} in undecided]
    closest = pairs[frozenset((best, (tied or others)[0]))]
    n_seeds, n_documents = int(study.ranking["n_seeds"].min()), int(study.ranking["n_documents"].min())
    loss = "the loss" if study.reach == 1 else f"the loss up to {100 * study.reach:.4g}%"
    basis = f"{counted(n_seeds, 'seed')}, {n_documents} {'images' if study.unit == 'image' else 'documents'}"
    alone = "" if n_seeds > 1 else " One seed: nothing is said about other neurons."
    together = [*islice(groups_of_tied(ranked, undecided), COUNTED_GROUPS)]
    if tied:
        return (
            f"{_cannot_be_told_apart(together)}: the area under {loss} of {best} differs from that of {tied[0]} by "
            f"{_interval(closest, best)} of the clean loss ({_p(closest['p_holm'])}; {basis})."
            f"{_who_beats_whom(ranked, pairs, together)}{alone}"
        )
    rest = f" {_cannot_be_told_apart(together)}." if together else ""
    return (
        f"{best} does least damage: the area under {loss} is {height[best]:.3f} of the clean loss, against "
        f"{height[others[0]]:.3f} of {others[0]}, the next; difference {_interval(closest, best)} "
        f"({_p(closest['p_holm'])}; {basis}).{rest}{alone}"
    )


def _cannot_be_told_apart(groups: Sequence[Sequence[str]]) -> str:
    first, *more = map(_listed, groups[:SHOWN_GROUPS])
    said = f"{first} cannot be told apart" + "".join(f", nor can {group}" for group in more)
    if not (unsaid := len(groups) - SHOWN_GROUPS) > 0:
        return said
    number = f"{unsaid}" if len(groups) < COUNTED_GROUPS else f"{unsaid} or more"
    return f"{said}, nor can the methods of {number} other groups (comparisons.csv has all pairs)"


def groups_of_tied(ranked: Sequence[str], undecided: Collection[frozenset[str]]) -> Iterator[list[str]]:
    """All largest groups of methods of which no two differ, those of the best methods first. That two methods do not
    differ from a third one does not mean that they do not differ from each other, so a method may be in several.

    There may be very many, but each takes about as long as the one before it (Johnson, Yannakakis and Papadimitriou's
    algorithm): whoever needs no more than some of them asks for no more.
    """
    places = range(len(ranked))
    tied = [{o for o in places if frozenset((ranked[place], ranked[o])) in undecided} - {place} for place in places]

    def largest(group: list[int]) -> tuple[int, ...]:
        """The group, and the best methods that can be added to it."""
        candidates = set(places).intersection(*(tied[place] for place in group))
        while candidates:
            group = [*group, min(candidates)]
            candidates &= tied[group[-1]]
        return tuple(sorted(group))

    waiting = [largest([])]
    known = set(waiting)
    while waiting:
        group = heapq.heappop(waiting)
        if len(group) > 1:
            yield [ranked[place] for place in group]
        for place in set(places).difference(group):
            better = [other for other in group if other < place]
            kept = [other for other in better if other in tied[place]]
            found = largest([*kept, place])
            # One with a better method more in it comes out of another group.
            if kept != better and [*kept, place] == [o for o in found if o <= place] and found not in known:
                known.add(found)
                heapq.heappush(waiting, found)


def _who_beats_whom(ranked: Sequence[str], pairs: Mapping[frozenset[str], Any], together: list[list[str]]) -> str:
    """Where the best one is not alone: all that is decided, a sentence for the methods that beat the same ones."""
    beaten: dict[str, tuple[str, ...]] = {}
    for method in ranked:
        versus = {other: pairs[frozenset((method, other))] for other in ranked if other != method}
        beaten[method] = tuple(other for other, row in versus.items() if row["better"] == method)
    said = ""
    for worse in dict.fromkeys(worse for worse in beaten.values() if worse):
        better = [method for method in ranked if beaten[method] == worse]
        who = _listed(better)
        if len(together) == 1 and better == together[0]:
            who = "Both" if len(better) == 2 else "All of these"
        said += f" {who} {'does' if len(better) == 1 else 'do'} less damage than {_listed(worse)}."
    return said


def caveats(study: Measured) -> list[str]:
    """Sentences on what the numbers lack."""
    found = []
    if study.calibration:
        found.append(f"Statistics are {of_calibration(study.calibration)}.")
    if study.missing:
        lacking = ", ".join(f"{metric} ({_listed(methods)})" for metric, methods in study.missing.items())
        found.append(f"Not measured by every run, and compared on those that have it: {lacking}.")
    return found


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


def figures(study: Measured) -> dict[str, Any]:
    """Plotly's json under `<metric>|`, of the curves, and under `<metric>|<method>`, of the differences to it."""
    found = {}
    for metric, lines in study.levels.items():
        known = metric_named(metric)
        scale, y = known.scale, known.label_in(study.unit)
        clean = next(iter(lines.values()))[0][1].value
        marked = {} if not known.is_relative else {"clean": clean, "chance": study.chance.get(metric, math.nan)}
        found[f"{metric}|"] = _figure(lines, study.methods, scale, y, marked)
        for reference in study.methods if len(study.methods) > 1 else ():
            apart = {method: _apart(study.comparisons, metric, method, reference) for method in study.methods}
            apart = {method: points for method, points in apart.items() if points}
            found[f"{metric}|{reference}"] = _figure(apart, study.methods, scale, f"{y}, minus {reference}'s", {})
    return found


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
    """A row for each method: the area of each metric with its interval, where half of the accuracy is gone (%), how
    many other methods it beats, and is beaten by, in the area under the loss, and which ones it cannot be told from."""
    rows = []
    won = study.ranking
    for method in study.methods:
        row: dict[str, Any] = {"method": method, "colour": looks(study.methods)[method]["color"]}
        row["beats"] = [int((won["better"] == method).sum())]
        mine = won[(won["method"] == method) | (won["other"] == method)]
        row["beaten by"] = [int(((mine["better"] != "") & (mine["better"] != method)).sum())]
        tied = mine[mine["better"] == ""]
        row["tied with"] = [in_order({*tied["method"], *tied["other"]} - {method})]
        for metric in study.levels:
            found = study.area(metric, method)
            row[f"area of {metric}"] = [found.value, found.low, found.high]
            if metric == "top1":
                row["half gone"] = [100 * study.half_gone[metric].get(method, math.nan)]
        rows.append(row)
    return rows


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
                "metrics": {metric: metric_named(metric).label_in(study.unit) for metric in study.levels},
                "figures": figures(study), "areas": areas(study), "neurons": about, "setup": setup,
                "reach": study.reach, "basis": study.basis,
            }
            for study, about, setup in studies
        ],
        "failures": failures,
    }  # fmt: skip
    text = json.dumps(_plain(content), ensure_ascii=False).replace("<", "\\u003c")  # no tag, and no comment, begins
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(title), plotly=get_plotlyjs(), content=text
    )


def _plain(content: Any) -> Any:
    """Json has neither arrays nor NaN."""
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple | np.ndarray):
        return [_plain(value) for value in content]
    if isinstance(content, np.generic):
        content = content.item()
    return None if isinstance(content, float) and not math.isfinite(content) else content
