"""Draws the effects of single units as heat maps, layer by unit."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float

from ablation_sweeps.results.display import GREY, RC, UNITS, WIDTH, display_order
from ablation_sweeps.results.metrics import metric_named

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

DOTTED = 64  # units of a layer up to which a cell has room for a dot; narrower ones are greyed
VEIL = "#BFBFBF"  # lies over cells without a significant effect, where they have no dot
OPACITY = 0.65  # of the veil: through it, the larger of these effects can still be told
OUTLIER = 3.0  # effects beyond this multiple of the 95th percentile do not stretch the scale of colours


@dataclass(frozen=True)
class Grid:
    """The effects of all units on one metric, layer by unit.

    Attributes:
        layers: layer of each row.
        effects: effect of each unit, as displayed (in percent for an accuracy); NaN where a layer has no such unit.
        significant: True where the corrected p-value is below 0.05.
    """

    layers: list[int]
    effects: Float[np.ndarray, "layers units"]
    significant: Bool[np.ndarray, "layers units"]


def grid(rows: DataFrame) -> Grid:
    """Arrange the rows of one study, method and metric."""
    layers = sorted(rows["layer"].unique().tolist())
    place = rows["layer"].map({layer: row for row, layer in enumerate(layers)}).to_numpy(int)
    shape = len(layers), int(rows["index"].max()) + 1
    effects, significant = np.full(shape, math.nan), np.zeros(shape, bool)
    at = place, rows["index"].to_numpy(int)
    effects[at] = rows["effect"].to_numpy(float) * metric_named(rows["metric"].iloc[0]).scale
    significant[at] = rows["significant"].to_numpy(bool)
    return Grid(layers, effects, significant)


def limit(effects: Float[np.ndarray, "..."]) -> float:
    """Effect at which the colours end: the largest one, unless a few are far from all others."""
    sizes = np.abs(effects[np.isfinite(effects)])
    usual = OUTLIER * float(np.quantile(sizes, 0.95)) if len(sizes) else 0.0
    largest = float(sizes.max(initial=0.0))
    return (min(largest, usual) if usual > 0 else largest) or 1.0


def draw(rows: DataFrame, title: str, unit: str, metric: str = "loss") -> Figure:
    """Heat maps of one study, one per method, with the same colours: red where ablation does damage.

    Args:
        rows: rows of one study in the table of `units.read_units`.
        unit: what is scored, "token" or "image".
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = rows.loc[rows["metric"] == (metric if (rows["metric"] == metric).any() else rows["metric"].iloc[0])]
    known = metric_named(str(rows["metric"].iloc[0]))
    methods = display_order(rows["method"].unique())
    grids = {method: grid(rows.loc[rows["method"] == method]) for method in methods}
    n_layers, n_units = (max(g.effects.shape[axis] for g in grids.values()) for axis in (0, 1))
    effects = np.concatenate([g.effects.ravel() for g in grids.values()])
    end = limit(effects)
    largest = float(np.nanmax(np.abs(effects)))
    panel_width, panel_height = min(WIDTH - 0.8, max(0.3 * n_units, 1.2)), max(0.16 * n_layers, 0.5)
    n_columns = max(1, min(len(methods), int(WIDTH / (panel_width + 0.6))))
    n_rows = math.ceil(len(methods) / n_columns)
    title = textwrap.fill(title, 100).replace("$", r"\$")
    height = n_rows * (panel_height + 0.55) + 1.15 + 0.14 * title.count("\n")
    with matplotlib.rc_context({**RC, "axes.grid": False, "axes.spines.top": True, "axes.spines.right": True}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        panels = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
        for axes, method in zip(panels, methods, strict=False):
            image = _panel(axes, grids[method], end, "RdBu_r" if known.less_is_better else "RdBu")
            axes.set_title(method.replace("$", r"\$"), loc="left")
            axes.set_xlabel(UNITS.get(kind := str(rows["unit"].iloc[0]), kind).capitalize())
            axes.set_box_aspect(panel_height / panel_width)
        for axes in panels[len(methods) :]:
            axes.set_visible(False)
        for axes in panels[::n_columns]:
            axes.set_ylabel("Layer")
        label = known.label_in(unit)
        beyond = f"; largest effect: {largest:.3g}" if largest > end else ""
        bar = figure.colorbar(image, ax=list(panels), location="bottom", aspect=50, shrink=0.6, pad=0.02,
                              extend="both" if beyond else "neither")  # fmt: skip
        bar.set_label(f"Effect on {label[0].lower() if label[:2] != 'KL' else 'K'}{label[1:]}; red: damage{beyond}")
        bar.locator = MaxNLocator(7)
        bar.update_ticks()
        bar.outline.set_linewidth(0.4)
        figure.suptitle(title, fontsize=8.5, fontweight="bold")
        mark = "dot" if n_units <= DOTTED else "greyed"
        figure.supxlabel(f"{mark}: not significant (p ≥ 0.05 after Holm's correction over all units)",
                         fontsize=7, color=GREY)  # fmt: skip
    return figure


def _panel(axes: Axes, cells: Grid, end: float, colours: str):
    from matplotlib.colors import ListedColormap
    from matplotlib.ticker import MaxNLocator

    n_layers, n_units = cells.effects.shape
    unclear = np.isfinite(cells.effects) & ~cells.significant
    image = axes.imshow(cells.effects, cmap=colours, vmin=-end, vmax=end, aspect="auto", interpolation="nearest")
    if n_units <= DOTTED:
        y, x = unclear.nonzero()
        axes.scatter(x, y, s=2.5, color=GREY, linewidths=0)
    else:
        axes.imshow(
            np.where(unclear, 1.0, np.nan),
            cmap=ListedColormap([VEIL]),
            alpha=OPACITY,
            aspect="auto",
            interpolation="nearest",
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(n_units, 10), min_n_ticks=1))
    step = math.ceil(n_layers / 16)
    axes.set_yticks(range(0, n_layers, step), [str(layer) for layer in cells.layers[::step]])
    axes.set(xlim=(-0.5, n_units - 0.5), ylim=(n_layers - 0.5, -0.5))
    return image
