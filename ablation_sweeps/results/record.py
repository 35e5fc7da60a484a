"""The records of a run and of a sweep that trackers receive."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablation_sweeps.base import hashing
from ablation_sweeps.results import run_folder
from ablation_sweeps.results.effects import effects
from ablation_sweeps.results.metrics import MAIN, normalised_auc

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    Rows = DataFrame | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class RunRecord:
    """One finished curve, as shown in W&B."""

    run_id: str  # W&B's id of the run: hash of the job's signature and the sweep
    sweep: str  # name of the sweep: W&B's group
    model: str
    dataset: str
    site: str
    method: str
    seed: int
    study: str  # runs of one study may be compared
    config: Mapping[str, Any]  # options of the job, nested or flat; see `flatten`
    rows: Rows  # rows of rows.parquet, in any order
    folder: Path  # sweep folder; W&B writes to `wandb/` in it
    units: DataFrame | None = None  # with fraction=each: the effect of each unit (see `units.read_units`)

    @classmethod
    def of(cls, run: Path) -> RunRecord:
        """Read the record from the folder of a finished run."""
        rows, config = run_folder.result(run, "rows.parquet"), run_folder.config(run)
        assert rows is not None
        job = rows["run_id"].iloc[0]
        labels = rows.iloc[0][["model", "dataset", "site", "method", "seed", "study"]].to_dict()
        own = hashing.signature([job, config["sweep"]])[:16]  # the same job in two sweeps is a run in each group
        documents = run_folder.result(run, "documents.parquet") if is_leave_one_out(rows) else None
        of_run = rows.iloc[0][["kind", "unit", "method"]].to_dict()
        units = None if documents is None else effects(rows, documents).assign(**of_run)
        config = {**config, "run_id": job}
        return cls(own, config["sweep"], **labels, config=config, rows=rows, folder=run.parent, units=units)

    @property
    def name(self) -> str:
        """Name of the run in W&B."""
        return f"{self.model}-{self.site}-{self.method}-s{self.seed}"


@dataclass(frozen=True)
class SweepRecord:
    """Tables and statistics of a sweep, shown in W&B beside its curves."""

    run_id: str
    name: str
    tables: Mapping[str, DataFrame]
    statistics: Mapping[str, tuple[Path, Mapping[str, Any]]]  # by signature: cache folder, and a description
    folder: Path
    heat_maps: Mapping[str, Figure] = field(default_factory=dict)  # of single units, by the name of the study


def is_leave_one_out(rows: Rows) -> bool:
    """True for the rows of a run with fraction=each, which is no curve: each point is one unit, ablated alone."""
    return "index" in (rows[0] if isinstance(rows, Sequence) else rows)


def points(rows: Rows) -> list[dict[str, float]]:
    """Values to log at each fraction, in increasing order of fractions, without NaN.

    With fraction=each, that is the clean pass alone: all units have the same fraction.
    """
    by_fraction: dict[float, dict[str, float]] = {}
    for row in _of_a_curve(rows):
        point = by_fraction.setdefault(float(row["fraction"]), {"fraction": float(row["fraction"])})
        point[f"eval/{row['metric']}"] = float(row["value"])
        point[f"eval/{row['metric']}_stderr"] = float(row["stderr"])
    return [{k: v for k, v in point.items() if not math.isnan(v)} for _, point in sorted(by_fraction.items())]


def _of_a_curve(rows: Rows) -> Sequence[Mapping[Any, Any]]:
    records = rows if isinstance(rows, Sequence) else rows.to_dict("records")
    return [row for row in records if row["fraction"] == 0] if is_leave_one_out(rows) else records


def summary(rows: Rows) -> dict[str, float]:
    """One number per curve: `auc/<metric>` (see `metrics.normalised_auc`), `at_50/...`, `clean/...`, where known."""
    found, records = {}, _of_a_curve(rows)
    for metric in MAIN:
        curve = {row["fraction"]: row for row in records if row["metric"] == metric}
        values = {at: float(curve[at]["value"]) for at in sorted(curve)}
        found[f"clean/{metric}"] = first = values.get(0.0, math.nan)
        found[f"at_50/{metric}"] = values.get(0.5, math.nan)
        clean = [float(curve[at].get("clean", first)) for at in values]  # earlier versions did not keep it
        found[f"auc/{metric}"] = normalised_auc(list(values), list(values.values()), clean, metric)
    return {key: value for key, value in found.items() if not math.isnan(value)}


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Scalars under dotted names, by which W&B can filter and group; a list becomes one string."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple, set, frozenset)):
            flat[f"{prefix}{key}"] = ",".join(str(item) for item in value)
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
    return flat
