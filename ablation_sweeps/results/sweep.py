"""Reads all studies of a sweep from its files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ablation_sweeps.base.lazy import pd
from ablation_sweeps.results import run_folder
from ablation_sweeps.results.comparison import shared
from ablation_sweeps.results.curves import Study, studies
from ablation_sweeps.results.study import StudyResult, analyse_study

if TYPE_CHECKING:
    from pandas import DataFrame


def comparisons(found: list[tuple[Study, StudyResult]]) -> DataFrame:
    """Table of all comparisons: hash of the study as in the rows, its name, the options in which it differs,
    and the columns of `comparison.compare`."""
    tables = []
    for study, measured_ in found:
        tables.append(measured_.comparisons.copy())
        tables[-1].insert(0, "study", study.rows["study"].iloc[0])
        tables[-1].insert(1, "name", study.name)
        tables[-1].insert(2, "options", study.rows["options"].iloc[0])
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def read_study(study: Study, runs: dict[str, Path]) -> StudyResult | None:
    """Analyse a study; None if a run has no sums per document, as in earlier versions."""
    parts: dict[tuple[str, int], list[DataFrame]] = {}
    for run in study.rows.drop_duplicates(["method", "seed", "run_id"]).to_dict("records"):
        folder = runs.get(run["run_id"])
        table = folder and run_folder.result(folder, "documents.parquet")
        if table is None:
            return None
        parts.setdefault((run["method"], run["seed"]), []).append(table)
    # A curve may consist of several runs, one per fraction, each with a clean pass.
    whole = [pd.concat(tables).drop_duplicates(["fraction", "document"]) for tables in parts.values()]
    documents = dict(zip(parts, shared(whole), strict=True))
    return analyse_study(study.name, study.title, study.unit, study.rows, documents)


def read_studies(curves: DataFrame, sweep: Path) -> list[tuple[Study, StudyResult]]:
    """The studies of a sweep that have sums per document, with their analyses."""
    folders = folders_by_id(sweep)
    return [(study, found) for study in studies(curves) if (found := read_study(study, runs_of(study, folders)))]


def folders_by_id(*sweeps: Path) -> dict[str, list[Path]]:
    """Folders of all runs by the first 8 characters of their id, with which their names end. Two may have the same."""
    found: dict[str, list[Path]] = {}
    for sweep in sweeps:
        for path in sweep.rglob("documents.parquet"):
            found.setdefault(path.parent.name[-8:], []).append(path.parent)
    return found


def runs_of(study: Study, folders: dict[str, list[Path]]) -> dict[str, Path]:
    """The folder of each run of a study by its id; if several have the same id, one that belongs to this study."""
    own, found = study.rows["study"].iloc[0], {}
    for run_id in study.rows["run_id"].unique():
        of_job = folders.get(run_id[:8], [])
        if len(of_job) > 1:
            of_job = [folder for folder in of_job if _study_of(folder) == own]
        if of_job:
            found[run_id] = of_job[-1]
    return found


def _study_of(folder: Path) -> str | None:
    rows = run_folder.result(folder, "rows.parquet")
    return None if rows is None else rows["study"].iloc[0]
