"""Interactive plots of report.html."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ablation_sweeps.results.comparison import Estimate, seen_from
from ablation_sweeps.results.display import GREY, method_styles
from ablation_sweeps.results.metrics import metric_named
from ablation_sweeps.results.study import Line, StudyResult

if TYPE_CHECKING:
    from pandas import DataFrame

SYMBOLS = dict(zip("os^DvPX*", ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star"),
                   strict=True))  # fmt: skip
LAYOUT = {
    "template": "none",
    "margin": {"l": 60, "r": 12, "t": 12, "b": 48},
    "hovermode": "closest",
    "modebar": {"orientation": "v"},  # otherwise it covers the legend
    "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0},
    "font": {"family": "system-ui, sans-serif", "size": 13},
}


# Figures


def figures(study: StudyResult) -> dict[str, Any]:
    """Plotly figures as json: curves under `<metric>|`, differences from a method under `<metric>|<method>`."""
    found, x = {}, f"{study.ablated.capitalize()} ablated (%)"
    for metric, lines in study.levels.items():
        known = metric_named(metric)
        scale, y = known.scale, known.label_in(study.unit)
        clean = next(iter(lines.values()))[0][1].value
        marked = {} if not known.is_relative else {"clean": clean, "chance": study.chance.get(metric, math.nan)}
        found[f"{metric}|"] = _figure(lines, study.methods, scale, x, y, marked)
        for reference in study.methods if len(study.methods) > 1 else ():
            apart = {method: _apart(study.comparisons, metric, method, reference) for method in study.methods}
            apart = {method: points for method, points in apart.items() if points}
            found[f"{metric}|{reference}"] = _figure(apart, study.methods, scale, x, f"{y}, minus {reference}'s", {})
    return found


def _apart(comparisons: DataFrame, metric: str, method: str, reference: str) -> Line:
    if method == reference:
        return []
    rows = comparisons.query("metric == @metric and fraction == fraction").to_dict("records")
    of_both = [row for row in rows if {row["method"], row["other"]} == {method, reference}]
    points = [(row["fraction"], seen_from(row, method)) for row in of_both]
    return [(0.0, Estimate(0.0, 0.0, 0.0, 1.0)), *points] if points else []


def _figure(lines: dict[str, Line], methods: list[str], scale: float, x: str, y: str, marked: dict[str, float]) -> Any:
    import plotly.graph_objects as go

    style = method_styles(methods)
    figure = go.Figure()
    for method, points in lines.items():
        colour, symbol = style[method]["color"], SYMBOLS[style[method]["marker"]]
        percent = [100 * fraction for fraction, _ in points]
        middle, low, high = ([scale * getattr(e, at) for _, e in points] for at in ("value", "low", "high"))
        add_line(figure, method, percent, middle, low, high, colour, "[%{customdata[0]:.4g}, %{customdata[1]:.4g}]")
        shown = {"name": html.escape(method)}
        figure.update_traces(marker={"size": 7, "symbol": symbol}, selector=shown)
        if style[method]["linestyle"] != "-":
            figure.update_traces(line_dash="dash", selector=shown)
    for name, value in marked.items():
        if not math.isnan(value):
            dashes, side = ("dash", "right") if name == "clean" else ("dot", "left")  # away from the curves
            figure.add_hline(scale * value, line_color=GREY, line_width=1, line_dash=dashes, annotation_text=name,
                             annotation_font_color=GREY, annotation_position=f"top {side}")  # fmt: skip
    figure.update_layout(**LAYOUT, xaxis_title=x, yaxis_title=y)
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
    """Draw a line and its band, which the legend switches on and off together; `tail` ends the hover text."""
    name = html.escape(name)  # plotly reads it as markup
    if not any(math.isnan(value) for value in (*low, *high)):
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        pale = f"rgba({red},{green},{blue},0.18)"
        figure.add_scatter(x=[*x, *x[::-1]], y=[*high, *low[::-1]], fill="toself", fillcolor=pale, mode="lines",
                           line_width=0, hoverinfo="skip", legendgroup=name, showlegend=False)  # fmt: skip
    shown = f"<b>{name}</b> at %{{x:.4g}}: %{{y:.4g}} {tail}<extra></extra>"
    figure.add_scatter(x=x, y=middle, name=name, legendgroup=name, mode="lines+markers", line_color=colour,
                       customdata=list(zip(low, high, strict=True)), hovertemplate=shown)  # fmt: skip
