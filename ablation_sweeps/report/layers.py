"""Draws layer sweeps: values against the layer that is ablated."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Any

from ablation_sweeps.report.plots import LAYOUT, SYMBOLS, add_line
from ablation_sweeps.results.display import GREY, RC, WIDTH, method_styles
from ablation_sweeps.results.layers import LayerSweep
from ablation_sweeps.results.metrics import MAIN, metric_named

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_layers(sweep: LayerSweep) -> Figure:
    """Loss, top-1 accuracy and KL of each layer at the largest fraction, with 95 % intervals."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    style, at = method_styles(sweep.methods), sweep.fractions[-1]
    metrics = [metric for metric in MAIN if metric in sweep.metrics]
    title = textwrap.fill(f"{sweep.title} · {100 * at:.4g} % of one layer ablated", 100).replace("$", r"\$")
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(WIDTH, 2.9 + 0.14 * title.count("\n")), layout="constrained")
        panels = figure.subplots(1, len(metrics), squeeze=False)[0]
        for axes, name in zip(panels, metrics, strict=True):
            metric = metric_named(name)
            for method, line in sweep.lines(name, at).items():
                x, middle, low, high = _columns(line, metric.scale)
                axes.plot(x, middle, linewidth=1.3, markersize=3.2, markeredgewidth=0, label=method, **style[method])
                axes.fill_between(x, low, high, color=style[method]["color"], alpha=0.18, linewidth=0)
            if metric.is_relative:
                axes.axhline(metric.scale * sweep.clean(name), color=GREY, linewidth=0.8, linestyle="--")
            axes.set_title(metric.label_in(sweep.unit), loc="left")
            axes.set_xlabel("Layer")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.suptitle(title, fontsize=8.5, fontweight="bold")
        handles, labels = panels[0].get_legend_handles_labels()
        labels = [label.replace("$", r"\$") for label in labels]
        note = "dashed: clean · band: 95 % interval"
        figure.legend(handles, labels, loc="outside lower center", frameon=False, ncols=min(len(labels), 6), title=note,
                      title_fontsize=7)  # fmt: skip
    return figure


def layer_charts(sweep: LayerSweep) -> dict[str, Any]:
    """Plotly figures as json, under `<metric>|<fraction>`."""
    import plotly.graph_objects as go

    style, found = method_styles(sweep.methods), {}
    for name in sweep.metrics:
        metric = metric_named(name)
        for at in sweep.fractions:
            figure = go.Figure()
            for method, line in sweep.lines(name, at).items():
                tail = "[%{customdata[0]:.4g}, %{customdata[1]:.4g}]"
                add_line(figure, method, *_columns(line, metric.scale), style[method]["color"], tail)
                figure.update_traces(marker={"size": 7, "symbol": SYMBOLS[style[method]["marker"]]},
                                     selector={"name": method})  # fmt: skip
            if metric.is_relative and not math.isnan(sweep.clean(name)):
                figure.add_hline(metric.scale * sweep.clean(name), line_color=GREY, line_width=1, line_dash="dash",
                                 annotation_text="clean", annotation_font_color=GREY)  # fmt: skip
            figure.update_layout(**LAYOUT, xaxis_title="Layer", yaxis_title=metric.label_in(sweep.unit), height=416)
            figure.update_xaxes(tickformat="d")
            found[f"{name}|{at:.6g}"] = figure.to_plotly_json()
    return found


def _columns(line: list[Any], scale: float) -> tuple[list[float], list[float], list[float], list[float]]:
    """Layers, values, and the ends of the intervals."""
    middle, low, high = ([scale * getattr(value, end) for _, value in line] for end in ("value", "low", "high"))
    return [float(layer) for layer, _ in line], middle, low, high
