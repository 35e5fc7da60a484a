"""Shows the effects of single units: a table on the terminal, a sentence, and heat maps for report.html."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ablation_sweeps.base.terminal import encodable
from ablation_sweeps.report.plots import LAYOUT
from ablation_sweeps.results.display import GREY, UNITS, display_order, units_said
from ablation_sweeps.results.heat_map import DOTTED, OPACITY, VEIL, grid, limit
from ablation_sweeps.results.metrics import MAIN, metric_named

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.console import Console

    from ablation_sweeps.results.curves import Study

STRONGEST = 8  # units in a table on the terminal


def units_verdict(study: Study) -> str:
    """Say of each method how many units have a significant effect on the loss, and which one has the largest."""
    said = []
    for method, rows in _by_method(study, "loss").items():
        kind, n_significant = str(rows["unit"].iloc[0]), int(rows["significant"].sum())
        first = rows.iloc[0]
        place = "layer {layer}" if kind == "layer" else f"layer {{layer}}, {UNITS.get(kind, kind)} {{index}}"
        unknown = "; p unknown, from one document" if math.isnan(first["p"]) else ""
        changes = "changes" if n_significant == 1 else "change"
        said.append(
            f"{method}: {n_significant} of {units_said(kind, len(rows))} alone {changes} the loss significantly "
            f"(Holm's p < 0.05); the largest effect is {first['effect']:+.4f} "
            f"[{first['low']:+.4f}, {first['high']:+.4f}], of {place.format(**first)}{unknown}."
        )
    return " ".join(said)


def print_units(studies: Sequence[Study], console: Console) -> None:
    """Print the units with the largest effects on the loss, one table for each study."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    for study in studies:
        kind, loss = str(study.rows["unit"].iloc[0]), metric_named("loss")
        table = Table("method", box=box.SIMPLE_HEAD, pad_edge=False)
        columns = [
            "layer",
            UNITS.get(kind, kind),
            f"effect on {loss.heading_in(study.unit)}",
            "95 % interval",
            "Holm's p",
        ]
        for column in columns:
            table.add_column(column, justify="right")
        for method, rows in _by_method(study, "loss").items():
            for row in rows.head(STRONGEST).to_dict("records"):
                interval = f"[{row['low']:+.4f}, {row['high']:+.4f}]"
                p = "–" if math.isnan(row["p_holm"]) else f"{row['p_holm']:.2g}{'*' * row['significant']}"
                cells = [method, f"{row['layer']}", f"{row['index']}", f"{row['effect']:+.4f}", interval, p]
                table.add_row(*(Text(encodable(cell, console)) for cell in cells))
        console.print(Text(encodable(study.title, console), style="bold"), soft_wrap=True)
        console.print(table)
        note = f"the {STRONGEST} largest effects of each method; all are in units.csv; *: significant"
        console.print(Text(encodable(note, console), style="dim"), soft_wrap=True)
        console.print()


def _by_method(study: Study, metric: str) -> dict[str, DataFrame]:
    """The rows of each method, those with the largest effects first."""
    rows = study.rows.loc[study.rows["metric"] == metric]
    rows = rows.assign(size=np.abs(rows["effect"].to_numpy(float))).sort_values("size", ascending=False, kind="stable")
    return {method: rows[rows["method"] == method] for method in display_order(rows["method"].unique())}


def heat_maps(study: Study) -> dict[str, Any]:
    """Plotly figures as json, under `<metric>|<method>`."""
    found = {}
    for metric in MAIN:
        by_method = _by_method(study, metric)
        if by_method:
            end = limit(np.concatenate([grid(rows).effects.ravel() for rows in by_method.values()]))
            found |= {f"{metric}|{method}": _heat_map(rows, end) for method, rows in by_method.items()}
    return found


def _heat_map(rows: DataFrame, end: float) -> dict[str, Any]:
    import plotly.graph_objects as go

    metric, kind, cells = metric_named(rows["metric"].iloc[0]), str(rows["unit"].iloc[0]), grid(rows)
    name = UNITS.get(kind, kind)
    place = {layer: row for row, layer in enumerate(cells.layers)}
    known = np.full((*cells.effects.shape, 3), math.nan)
    known[rows["layer"].map(place), rows["index"].to_numpy(int)] = rows[["low", "high", "p_holm"]].to_numpy(float)
    known[..., :2] *= metric.scale
    heat = go.Heatmap(
        z=_rounded(cells.effects), y=[str(layer) for layer in cells.layers], zmin=-end, zmax=end,
        customdata=_rounded(known), colorscale="RdBu", reversescale=metric.less_is_better,
        xgap=1 if len(cells.effects[0]) <= DOTTED else 0,
        ygap=1, hoverongaps=False,
        colorbar={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "thickness": 12,
                  "title": {"text": "Effect; red: damage", "side": "bottom"}},
        hovertemplate=f"layer %{{y}}, {name} %{{x}}: %{{z}} [%{{customdata[0]}}, %{{customdata[1]}}]<br>"
        "Holm's p = %{customdata[2]}<extra></extra>",
    )  # fmt: skip
    figure = go.Figure(heat)
    unclear = np.isfinite(cells.effects) & ~cells.significant
    if unclear.shape[1] <= DOTTED:
        y, x = unclear.nonzero()
        figure.add_scatter(x=x.tolist(), y=[str(cells.layers[row]) for row in y], mode="markers", hoverinfo="skip",
                           marker={"size": 4, "color": GREY}, showlegend=False)  # fmt: skip
    else:
        figure.add_heatmap(z=np.where(unclear, 1.0, math.nan).tolist(), y=[str(layer) for layer in cells.layers],
                           colorscale=[[0, VEIL], [1, VEIL]], opacity=OPACITY, showscale=False, hoverinfo="skip",
                           ygap=1)  # fmt: skip
    figure.update_layout(**LAYOUT, yaxis_title="Layer")
    # A title of the axis would be drawn over its numbers, since the bar of colours takes its place.
    figure.add_annotation(text=name.capitalize(), xref="paper", yref="paper", x=0.5, y=0, yshift=-44, showarrow=False)
    figure.update_layout(margin={"b": 135, "r": 40}, height=160 + max(16 * len(cells.layers), 60))
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False, zeroline=False)
    figure.update_xaxes(showgrid=False, zeroline=False, tickformat="d")
    return figure.to_plotly_json()


def _rounded(values: np.ndarray) -> list[Any]:
    """Nested lists of numbers with four digits, which is what is shown: a page may have many thousands of them."""
    return [[_rounded(row) if np.ndim(row) else float(f"{row:.4g}") for row in block] if np.ndim(block) else
            float(f"{block:.4g}") for block in values]  # fmt: skip
