"""Sends a sweep to W&B from its files: each curve once, its tables and statistics, and views of them."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm
from typing_extensions import TypedDict

from ablation_sweeps.base import files, hashing
from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.terminal import counted
from ablation_sweeps.results import heat_map, run_folder
from ablation_sweeps.results.curves import read_curves, summarise
from ablation_sweeps.results.record import RunRecord, SweepRecord
from ablation_sweeps.results.sweep import comparisons, read_studies
from ablation_sweeps.results.units import read_units, unit_studies
from ablation_sweeps.tracking import dashboard
from ablation_sweeps.tracking.wandb import Wandb, online

PROJECT = "ablation-sweeps"  # for runs that were not tracked; also the default of conf/tracking/wandb.yaml


class Sent(NamedTuple):
    """Summary of what was sent to W&B: the number of runs, and whether the tables were."""

    runs: int
    tables: bool

    def __str__(self) -> str:
        return f"{counted(self.runs, 'run')}{' and the tables of the sweep' * self.tables} sent"


def publish(sweep: Path, project: str | None = None, entity: str | None = None, again: bool = False) -> Sent:
    """Send the finished runs that W&B does not have yet, then the tables of the sweep.

    If it is stopped, the same call continues: a run that was sent in part is sent again under the same id, which
    replaces it.

    Args:
        project, entity: destination; None: where the runs would have logged themselves.
        again: True sends everything again.

    Raises:
        UserError: no run is finished, there is no key, or W&B does not take a run.
    """
    runs = _finished(sweep)
    to = {run: _tracking(run, project, entity) for run in runs}
    missing = [run for run in runs if again or not run_folder.published(run, to[run].place)]
    for number, run in enumerate(tqdm(missing, desc="sending", disable=None)):
        try:
            to[run].send(RunRecord.of(run))
        except UserError as error:
            raise UserError(
                f"{error}; {number} of {len(missing)} runs were sent; the same command sends the rest"
            ) from error
        run_folder.mark_published(run, to[run].place)
    return Sent(len(missing), _send_tables(sweep, runs, project, entity, again))


def send_tables(sweep: Path) -> bool:
    """Send one run for the sweep, with points and differences as tables and the statistics as artifacts.

    Nothing is sent if W&B has them as they are now.

    Returns:
        True if they were sent.

    Raises:
        UserError: as for `publish`.
    """
    return _send_tables(sweep, _finished(sweep), None, None, again=False)


def _send_tables(sweep: Path, runs: list[Path], project: str | None, entity: str | None, again: bool) -> bool:
    tracking = _tracking(runs[0], project, entity)
    curves, units, statistics = read_curves(sweep), read_units(sweep), _statistics(runs)
    texts = [table.to_csv() for table in (curves, units) if len(table)]
    content = hashing.signature([*texts, sorted(statistics), tracking.place])
    known = files.read_json(sweep / MARK, Mark) or {}
    if known.get("content") == content and not again:
        return False
    known = {"run_id": secrets.token_hex(8), **known}
    files.write_json(sweep / MARK, known)  # saved first: if sending is stopped, it is repeated under the same id
    found = read_studies(curves, sweep)
    measured = {study.rows["study"].iloc[0]: of_study for study, of_study in found}
    every = {
        "curves": curves,
        "summary": summarise(curves, measured),
        "units": units,
        "comparisons": comparisons(found),
    }
    tables = {name: table for name, table in every.items() if len(table)}
    heat_maps = {study.name: heat_map.draw(study.rows, study.title, study.unit) for study in unit_studies(units)}
    name = run_folder.config(runs[0])["sweep"]
    tracking.send_tables(SweepRecord(known["run_id"], name, tables, statistics, sweep, heat_maps))
    files.write_json(sweep / MARK, {**known, "content": content})
    return True


def save_views(sweep: Path, project: str | None = None, entity: str | None = None) -> dict[str, str]:
    """Save a view for each study, over an earlier one if there is one, and return their addresses by study.

    Args:
        project, entity: as for `publish`.

    Raises:
        UserError: the extra `reports` is not installed, there is no key, or W&B does not take it.
    """
    import wandb

    first = _finished(sweep)[0]
    tracking, known = _tracking(first, project, entity), files.read_json(sweep / MARK, Mark) or {}
    with online():
        owner = tracking.entity or wandb.Api().default_entity
        before = known.get("views", {}) if known.get("viewed") == tracking.place else {}
        views = dashboard.views(sweep, run_folder.config(first)["sweep"], tracking.project, str(owner), before)
    files.write_json(sweep / MARK, {**known, "views": views, "viewed": tracking.place})
    return views


MARK = "wandb.json"  # file in the folder of a sweep that records what W&B has of it


class Mark(TypedDict, total=False):
    """Content of the file MARK.

    Attributes:
        run_id: id of the run that has the tables.
        content: signature of what was sent.
        views: addresses by study, in the project `viewed`.
    """

    run_id: str
    content: str
    views: dict[str, str]
    viewed: str


def _finished(sweep: Path) -> list[Path]:
    if runs := [run for run in run_folder.runs(sweep) if run_folder.finished(run)]:
        return runs
    raise UserError(f"{sweep}: no run is finished there; name the folder of a sweep: results/<sweep>")


def _statistics(runs: list[Path]) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Cached statistics that the runs used: by their signature, the folder and a description."""
    found = {}
    for run in runs:
        if (folder := run_folder.statistics_of(run)) is not None and folder.name not in found:
            of = RunRecord.of(run)
            found[folder.name] = (folder, {"model": of.model, "dataset": of.dataset, "site": of.site})
    return found


def _tracking(run: Path, project: str | None, entity: str | None) -> Wandb:
    own = run_folder.config(run).get("tracking") or {}
    chosen = own.get("project") if own.get("project") != PROJECT else None  # the default counts as no choice
    return Wandb(
        project=project or chosen or os.environ.get("WANDB_PROJECT") or PROJECT,
        entity=entity or own.get("entity") or os.environ.get("WANDB_ENTITY") or None,
        mode="online",
        tags=tuple(own.get("tags") or ()),
        sync=False,
    )
