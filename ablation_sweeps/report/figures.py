"""Draws one figure per study: loss, accuracy and KL against the fraction ablated."""

from __future__ import annotations

import logging
import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ablation_sweeps.results.comparison import t_half_width
from ablation_sweeps.results.display import GREY, PLACES, RC, WIDTH, method_styles, units_of
from ablation_sweeps.results.metrics import MAIN, metric_named, pooled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame, Series

PLACES |= {"resample-random_tokens": 5, "resample-random_pixels": 5, "resample-random_characters": 7}
MANY_SEEDS = 3  # with more seeds, their spread is drawn instead of each one


def draw(rows: DataFrame, title: str, unit: str) -> Figure:
    """Loss, top-1 accuracy and KL, side by side, as wide as a page of a paper, with the legend below."""
    import matplotlib
    from matplotlib.figure import Figure

    style = method_styles(rows["method"].unique())
    labels = {metric: metric_named(metric).label_in(unit) for metric in MAIN if metric in set(rows["metric"])}
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(WIDTH, 1))
        panels = figure.subplots(1, len(labels), squeeze=False)[0]
        notes = [_panel(axes, rows.query("metric == @m"), style) for axes, m in zip(panels, labels, strict=True)]
        for axes, label, lines in zip(panels, labels.values(), notes, strict=True):
            axes.set_title(label, loc="left", pad=4 + 9 * len(lines) + 2 * bool(lines))
            axes.annotate("\n".join(lines), (0, 1), (0, 6), "axes fraction", "offset points", color=GREY, fontsize=6.5)
        _arrange(figure, style, textwrap.fill(title, 100).replace("$", r"\$"), max(map(len, notes)), rows)
    return figure


def _arrange(figure: Figure, style: dict[str, dict[str, Any]], title: str, n_notes: int, rows: DataFrame) -> None:
    """Set sizes in inches, from the bottom: legend, label of the x axes, panels, their titles and notes, title."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], label=method.replace("$", r"\$"), markersize=3.5, linewidth=1.3, **look)
        for method, look in style.items()
    ]
    widest, all_of_them = max(map(len, style)), sum(0.52 + 0.061 * len(method) for method in style)
    n_columns = len(style) if all_of_them < WIDTH else max(1, int(WIDTH / (0.6 + 0.062 * widest)))
    legend = 0.08 + 0.165 * math.ceil(len(style) / n_columns)
    bottom, panel, above = legend + 0.48, 1.9, 0.46 + 0.12 * n_notes + 0.14 * title.count("\n")
    height = bottom + panel + above
    figure.set_size_inches(WIDTH, height)
    figure.subplots_adjust(bottom=bottom / height, top=(bottom + panel) / height)  # tick labels depend on it
    right, gap = 0.99 * WIDTH, 0.05 + max(_numbers(axes) for axes in figure.axes)
    of_one = (right - gap * len(figure.axes)) / len(figure.axes)
    figure.subplots_adjust(left=gap / WIDTH, right=right / WIDTH, wspace=gap / of_one)
    figure.text(0.5, 1 - 0.06 / height, title, ha="center", va="top", fontsize=8.5, fontweight="bold")
    figure.text(0.5175, (legend + 0.1) / height, f"{units_of(rows).capitalize()} ablated (%)", ha="center")
    figure.text(0.99, (legend + 0.1) / height, _spread(rows), ha="right", color=GREY, fontsize=6.5)
    figure.legend(handles=handles, loc="lower center", ncols=n_columns, frameon=False, handlelength=2.6, borderpad=0.3)


def _numbers(axes: Axes) -> float:
    """Width in inches of the tick labels left of the y axis."""
    box = axes.yaxis.get_tightbbox()
    return (axes.bbox.x0 - box.x0) / axes.figure.dpi if box else 0.0


def save(figure: Figure, path: Path, suffix: str) -> None:
    """Save the figure without a date: the same rows give the same file."""
    import matplotlib

    logging.getLogger("fontTools").setLevel(logging.WARNING)  # it logs every table of a font that it embeds
    with matplotlib.rc_context(RC):
        undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
        figure.savefig(path, format=suffix, dpi=300, metadata=undated.get(suffix))


def _spread(rows: DataFrame) -> str:
    """Caption that says how the figure shows the spread over seeds: see `_line`."""
    n_seeds = {str(method): of_method["seed"].nunique() for method, of_method in rows.groupby("method")}
    many = rows[rows["method"].map(n_seeds) > MANY_SEEDS].groupby(["method", "fraction"])["seed"].nunique().tolist()
    over = " to ".join(str(n) for n in dict.fromkeys((min(many), max(many)))) if many else ""
    found = [f"band: 95 % t-interval over {over} seeds"] if many else []
    found += ["thin: single seeds"] if any(1 < n <= MANY_SEEDS for n in n_seeds.values()) else []
    return " · ".join(found)


def _panel(axes: Axes, rows: DataFrame, style: dict[str, dict[str, Any]]) -> list[str]:
    """Draw the curves of one metric. Returns notes on what does not fit on the axis."""
    metric = metric_named(str(rows["metric"].iloc[0]))
    rows = rows.assign(value=rows["value"] * metric.scale)
    curves = {
        method: rows[rows["method"] == method].pivot_table(index="fraction", columns="seed", values="value")
        for method in style
    }
    curves = {method: table for method, table in curves.items() if len(table)}
    over_seeds = pooled(rows.assign(clean=math.nan)).pivot(index="fraction", columns="method", values="value")
    means = {method: cast("Series", over_seeds[method].dropna()) for method in curves}
    for method, table in curves.items():
        _line(axes, table, means[method], style[method])
    clean, chance = rows.loc[rows["fraction"] == 0.0, "value"].mean(), rows["chance"].mean() * metric.scale
    peaks = {method: float(mean.max()) for method, mean in means.items()}
    heights = list(peaks.values())
    top = _top(heights, clean, chance) if metric.less_is_better else max(1.12 * max(heights), 1.0)
    lowest = min(clean, *(float(mean.min()) for mean in means.values()))
    low = lowest - 0.13 * (top - lowest) if metric.less_is_better and metric.is_relative else -0.03 * top
    right = max(100 * rows["fraction"].max(), 1.0)
    axes.set(xlim=(-0.03 * right, 1.03 * right), ylim=(low, top))
    if metric.is_relative:
        _level(axes, clean, "clean", "--", "below right" if metric.less_is_better else "above right")
    if low < chance < top:
        _level(axes, chance, "chance", ":", "above left")
    cut = {method: peak for method, peak in peaks.items() if peak > top}
    for method in cut:
        _mark_cut(axes, means[method], top, style[method]["color"])
    reach = ", ".join(f"{method} reaches {peak:.3g}" for method, peak in cut.items())
    notes = textwrap.wrap(f"▲ axis is cut: {reach}", 40) if cut else []
    return [*notes, f"chance ({chance:.3g}) lies above the axis"] if chance >= top else notes


def _line(axes: Axes, curves: DataFrame, over_seeds: Series, look: dict[str, Any]) -> None:
    """Draw the curve over all seeds, and each seed if they are few, or the 95 % t-interval if they are many."""
    x, mean = 100 * curves.index.to_numpy(), over_seeds.to_numpy()
    every = max(1, round(len(x) / 11))
    axes.plot(x, mean, linewidth=1.3, markersize=3.2, markevery=every, markeredgewidth=0, zorder=3, **look)
    n = curves.notna().sum(axis=1).to_numpy()
    if curves.shape[1] > MANY_SEEDS:
        half = t_half_width(curves.std(axis=1, ddof=1).to_numpy() / n**0.5, (n - 1).clip(1))
        axes.fill_between(x, mean - half, mean + half, color=look["color"], alpha=0.18, linewidth=0)
    elif curves.shape[1] > 1:
        axes.plot(x, curves.to_numpy(), color=look["color"], linewidth=0.5, alpha=0.6)


def _top(peaks: list[float], clean: float, chance: float) -> float:
    """Upper end of an axis on which higher is worse, low enough that one terrible method does not hide the others."""
    rises = sorted(max(peak - clean, 1e-3) for peak in peaks)
    usual = rises[(len(rises) - 1) // 2]
    if chance - clean > usual:  # False if chance is NaN
        usual = min(chance - clean, 4 * usual)
    shown = max(rise for rise in rises if rise <= max(4 * usual, rises[0]))
    if shown < chance - clean <= 4 * shown:
        shown = chance - clean
    return clean + 1.1 * shown


def _level(axes: Axes, value: float, text: str, dashes: str, at: str) -> None:
    """Draw a grey horizontal line, with its name at the end where there are no curves."""
    axes.axhline(value, color=GREY, linewidth=0.8, linestyle=dashes, zorder=1.5)
    vertical, horizontal = at.split()
    axes.annotate(
        text,
        (0.015 if horizontal == "left" else 0.985, value),
        xycoords=axes.get_yaxis_transform(),
        xytext=(0, 1.5 if vertical == "above" else -2),
        textcoords="offset points",
        ha=horizontal,
        va="bottom" if vertical == "above" else "top",
        color=GREY,
        fontsize=7,
    )


def _mark_cut(axes: Axes, curve: Series, top: float, colour: str) -> None:
    """Draw a triangle where a curve leaves the axis at the top."""
    x, y = [100 * fraction for fraction in curve.index.tolist()], curve.tolist()
    after = next(i for i, height in enumerate(y) if height > top)
    before = max(after - 1, 0)
    share = (top - y[before]) / (y[after] - y[before]) if before < after else 0.0
    leaves = x[before] + share * (x[after] - x[before])
    axes.plot([leaves], [top], marker="^", markersize=5, color=colour, clip_on=False, zorder=4)
