"""Reads the effects of single units from all runs with fraction=each, and names their studies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ablation_sweeps.base.lazy import pd
from ablation_sweeps.results import run_folder
from ablation_sweeps.results.curves import STUDY, Study, named, read_runs, seeds_after_the_first
from ablation_sweeps.results.display import units_said
from ablation_sweeps.results.effects import effects
from ablation_sweeps.results.record import is_leave_one_out

if TYPE_CHECKING:
    from pandas import DataFrame

OF_RUN = [*STUDY, "unit", "method", "run_id"]  # columns that the rows of a run share
OF_EFFECT = ["layer", "index", "metric", "value", "clean", "effect", "stderr", "low", "high", "p", "p_holm",
             "significant", "n", "n_documents", "seeds_left_out"]  # fmt: skip


def read_units(*sweeps: str | Path) -> DataFrame:
    """Read the effect of each unit that was ablated alone, from all finished runs with fraction=each in some folders.

    One row per study, method, unit and metric. A unit is the one with number `index` in its `layer`. `effect` is
    `value` minus `clean`, paired over documents, with its standard error, 95 % interval and p-value. `p_holm` is
    corrected over all units of a study, method and metric; `significant` is True where it is below 0.05. Of several
    seeds, only the first is read, since each ablates the same units. Empty if there is no such run.

    Raises:
        UserError: there is no finished run.
    """
    of_seeds: dict[tuple[str, str], dict[int, tuple[Path, DataFrame]]] = {}
    for folder, rows in read_runs(*sweeps).items():
        if is_leave_one_out(rows):
            study, method, seed = rows.iloc[0][["study", "method", "seed"]]
            of_seeds.setdefault((study, method), {}).setdefault(int(seed), (folder, rows))
    tables = [pd.DataFrame(columns=[*OF_RUN, *OF_EFFECT])] if not of_seeds else []
    for runs in of_seeds.values():
        folder, rows = runs[min(runs)]
        documents = run_folder.result(folder, "documents.parquet")
        if documents is not None:
            tables.append(
                effects(rows, documents).assign(
                    **rows.iloc[0][OF_RUN].to_dict(), seeds_left_out=seeds_after_the_first({*runs})
                )
            )
    table = pd.concat(tables, ignore_index=True)
    return table.sort_values(OF_RUN, kind="stable", ignore_index=True).loc[:, [*OF_RUN, *OF_EFFECT]]


def unit_studies(units: DataFrame) -> list[Study]:
    """All studies in a table of `read_units`, each with a name that describes it."""
    return named(units, "-units", _title)


def _title(rows: DataFrame, unit: str) -> str:
    model, dataset, site, kind = rows.iloc[0][["model", "dataset", "site", "unit"]]
    n_units = len(rows[["layer", "index"]].drop_duplicates())
    return f"{model} on {dataset} · {site} · {units_said(kind, n_units)}, each alone · {rows['n'].max():,} {unit}s"
