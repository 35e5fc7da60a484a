"""Renders a sweep as one offline page, report.html: verdict, curves, differences, areas, units, neurons, failures."""

from __future__ import annotations

import html
import json
import math
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np

from ablation_sweeps.report.layers import layer_charts
from ablation_sweeps.report.plots import figures
from ablation_sweeps.report.units import heat_maps, units_verdict
from ablation_sweeps.report.verdict import verdict
from ablation_sweeps.results.display import display_order, method_styles
from ablation_sweeps.results.layers import LayerSweep, layers_verdict
from ablation_sweeps.results.metrics import MAIN, metric_named
from ablation_sweeps.results.study import StudyResult

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ablation_sweeps.results.curves import Study


UNITS_CAPTION = (
    "Each unit is ablated alone; its effect is the metric minus that of the clean model on the same documents. Dotted "
    "or, in wide layers, greyed: not significant (p ≥ 0.05 after Holm's correction over all units). Extreme effects do "
    "not stretch the colours. Pointing at a cell gives the effect, its 95 % interval and the corrected p; units.csv "
    "has all of them."
)
LAYERS_CAPTION = (
    "Each point is a study of its own, in which one layer is ablated. Bands are 95 % intervals over documents or "
    "images and, where there are several, seeds. They are not those of a difference between two layers."
)
TEMPLATE = Path(__file__).with_suffix(".html")


def areas(study: StudyResult) -> list[dict[str, Any]]:
    """Table of areas with one row per method.

    A row has the area of each metric with its interval, the fraction at which half of the accuracy is lost (%), the
    numbers of methods that it beats and is beaten by in the area of the loss, and the methods that it is tied with.
    """
    rows = []
    won = study.ranking
    for method in study.methods:
        row: dict[str, Any] = {"method": method, "colour": method_styles(study.methods)[method]["color"]}
        row["beats"] = [int((won["better"] == method).sum())]
        mine = won[(won["method"] == method) | (won["other"] == method)]
        row["beaten by"] = [int(((mine["better"] != "") & (mine["better"] != method)).sum())]
        tied = mine[mine["better"] == ""]
        row["tied with"] = [display_order({*tied["method"], *tied["other"]} - {method})]
        for metric in study.levels:
            found = study.area(metric, method)
            row[f"area of {metric}"] = [found.value, found.low, found.high]
            if metric == "top1":
                row["half gone"] = [100 * study.half_gone[metric].get(method, math.nan)]
        rows.append(row)
    return rows


# Page


ReportEntry = tuple[StudyResult, dict[str, Any] | None, dict[str, Any]]


def render(
    title: str,
    studies: list[ReportEntry],
    failures: list[tuple[str, str, str]],
    units: Sequence[tuple[Study, dict[str, Any]]] = (),
    layers: Sequence[tuple[LayerSweep, dict[str, Any]]] = (),
) -> str:
    """Render the page.

    Args:
        studies: each with the summary of its neurons, if there is one, and with its configuration and environment.
        failures: run, state and reason of all unfinished runs.
        units: studies of single units, each with its configuration and environment.
        layers: layer sweeps, each with the configuration and environment of one run.
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
        ] + [_units(*entry) for entry in units] + [_layers(*entry) for entry in layers],
        "failures": failures,
    }  # fmt: skip
    text = json.dumps(_plain(content), ensure_ascii=False).replace("<", "\\u003c")  # no tag or comment begins
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(title), plotly=get_plotlyjs(), content=text
    )


def _units(study: Study, setup: dict[str, Any]) -> dict[str, Any]:
    """Content of the page on single units, with a chart for each method."""
    return {
        "name": study.name, "title": study.title, "verdict": units_verdict(study), "charts": heat_maps(study),
        "heading": "Single units", "caption": UNITS_CAPTION, "choice": "method", "setup": setup,
        "choices": [(method, method) for method in display_order(study.rows["method"].unique())],
        "metrics": {metric: metric_named(metric).label_in(study.unit) for metric in MAIN
                    if metric in set(study.rows["metric"])},
    }  # fmt: skip


def _layers(sweep: LayerSweep, setup: dict[str, Any]) -> dict[str, Any]:
    """Content of the page on a layer sweep, with a chart for each fraction."""
    return {
        "name": sweep.name, "title": sweep.title, "verdict": layers_verdict(sweep), "charts": layer_charts(sweep),
        "heading": "Layer by layer", "caption": LAYERS_CAPTION, "choice": "ablated", "setup": setup,
        "choices": [(f"{at:.6g}", f"{100 * at:.4g} % of one layer") for at in sweep.fractions[::-1]],
        "metrics": {metric: metric_named(metric).label_in(sweep.unit) for metric in sweep.metrics},
    }  # fmt: skip


def _plain(content: Any) -> Any:
    """The content with lists for arrays and None for NaN, which json does not have."""
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple | np.ndarray):
        return [_plain(value) for value in content]
    if isinstance(content, np.generic):
        content = content.item()
    return None if isinstance(content, float) and not math.isfinite(content) else content
