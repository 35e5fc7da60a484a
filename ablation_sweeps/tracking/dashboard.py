"""Saves a view in W&B for each study of a sweep: its curves by method, with their spread over seeds, and its areas."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.results.curves import read_curves, studies
from ablation_sweeps.results.display import method_styles
from ablation_sweeps.results.metrics import MAIN, display_rank, metric_named
from ablation_sweeps.tracking.wandb import group_of, job_type

if TYPE_CHECKING:
    from ablation_sweeps.results.curves import Study


def views(sweep: Path, name: str, project: str, entity: str, known: dict[str, str]) -> dict[str, str]:
    """Save a view for each study, and return their addresses by the study's name.

    Args:
        name: name of the sweep, which is the group of its runs unless the environment names another one.
        known: addresses of earlier views, which are overwritten.

    Raises:
        UserError: the extra `reports` is not installed.
    """
    try:
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise UserError("--view needs another package: pip install wandb-workspaces") from error

    found = {}
    for study in studies(read_curves(sweep)):
        view = ws.Workspace(entity=entity, project=project)
        if study.name in known:
            with contextlib.suppress(ValueError):  # somebody has deleted it
                view = ws.Workspace.from_url(known[study.name])
        view.name = f"{name}: {study.name}"
        view.sections = [
            ws.Section(name="Curves", panels=_curves(study), is_open=True),
            ws.Section(name="Areas under the curves: mean of runs", panels=_areas(study), is_open=True),
        ]
        view.settings = ws.WorkspaceSettings(x_axis="fraction", max_runs=100)
        view.runset_settings = _runs(study, name)
        found[study.name] = view.save().url
    return found


def _runs(study: Study, name: str) -> Any:
    """The runs of one study; each method has the same colour as in our own figures."""
    import wandb_workspaces.expr as expr
    import wandb_workspaces.workspaces as ws

    colours: dict[object, object] = {
        method: look["color"] for method, look in method_styles(study.rows["method"].unique()).items()
    }
    return ws.RunsetSettings(
        filters=[
            *_of_seeds(study),
            expr.Metric("Group") == group_of(name),
            expr.Metric("JobType") == job_type(),
            expr.Config("study") == study.rows["study"].iloc[0],
        ],
        groupby=[expr.Config("method"), *(expr.Config(f"method.{key}.value") for key in differing(study))],
        group_colors={} if differing(study) else colours,
    )


def _of_seeds(study: Study) -> list[Any]:
    """Leave out the runs of seeds that ablate the same units: W&B would take them for a sample, without any spread."""
    import wandb_workspaces.expr as expr

    if not study.rows["seeds_left_out"].any():
        return []
    return [expr.Config("run_id").isin(study.rows["run_id"].unique().tolist())]


def differing(study: Study) -> list[str]:
    """Parameters that distinguish methods with the same label; `curves.read_curves` appends them to their names."""
    of_names = study.rows.drop_duplicates("method")[["method", "method_params"]].itertuples(index=False)
    named = [(name.split(" ")[-1].split(","), json.loads(params)) for name, params in of_names if " " in name]
    found = {key for said, params in named for key, value in params.items() if f"{key}={value}" in said}
    return sorted("_target_" if key == "class" else key for key in found)


def _curves(study: Study) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces.reports.v2.interface import Layout

    found = [metric for metric in study.rows["metric"].unique() if metric != "perplexity"]
    return [
        wr.LinePlot(
            title=metric_named(metric).label_in(study.unit).replace(" (%)", ""),  # W&B has fractions, not percent
            x="fraction", y=[f"eval/{metric}"], title_x="Fraction of neurons ablated", range_x=(0, 1),
            groupby=_by(study), aggregate=True, groupby_aggfunc="mean", groupby_rangefunc="stderr",
            smoothing_type="none", layout=Layout(w=8, h=8, x=8 * (i % 3), y=8 * (i // 3)),
        )
        for i, metric in enumerate(sorted(found, key=display_rank))
    ]  # fmt: skip


def _by(study: Study) -> Any:
    """Key by which curves are grouped. None leaves it to the table of runs, which can group by more than one key."""
    import wandb_workspaces.reports.v2 as wr

    return None if differing(study) else wr.Config("method")


def _areas(study: Study) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces.reports.v2.interface import Layout

    return [
        wr.BarPlot(
            title=f"Area of {metric}", metrics=[wr.SummaryMetric(f"auc/{metric}")], groupby=_by(study),
            aggregate=True, groupby_aggfunc="mean", groupby_rangefunc="stderr", layout=Layout(w=8, h=6, x=8 * i),
        )
        for i, metric in enumerate(MAIN)
    ]  # fmt: skip
