"""What a tracker is given: the record of a run, or of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablation_sweeps.base import hashing
from ablation_sweeps.results import run_folder

if TYPE_CHECKING:
    from pandas import DataFrame

    Rows = DataFrame | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class RunRecord:
    """One finished curve, as W&B shall show it."""

    run_id: str  # W&B's id of the run: signature of the job and the sweep
    sweep: str  # name of the sweep: W&B's group
    model: str
    dataset: str
    site: str
    method: str
    seed: int
    study: str  # runs of one study may be compared
    config: Mapping[str, Any]  # settings of the job, nested or flat: `flatten` makes scalars of them
    rows: Rows  # as they lie in rows.parquet, in any order
    folder: Path  # of the sweep; W&B writes into `wandb/` below it

    @classmethod
    def of(cls, run: Path) -> RunRecord:
        """Read the record from the folder of a finished run."""
        rows, config = run_folder.result(run, "rows.parquet"), run_folder.config(run)
        assert rows is not None
        job = rows["run_id"].iloc[0]
        labels = rows.iloc[0][["model", "dataset", "site", "method", "seed", "study"]].to_dict()
        own = hashing.signature([job, config["sweep"]])[:16]  # two sweeps may hold the same job, and each has its group
        return cls(own, config["sweep"], **labels, config={**config, "run_id": job}, rows=rows, folder=run.parent)

    @property
    def name(self) -> str:
        return f"{self.model}-{self.site}-{self.method}-s{self.seed}"


@dataclass(frozen=True)
class SweepRecord:
    """The record of a sweep that W&B shows beside its curves."""

    run_id: str
    name: str
    tables: Mapping[str, DataFrame]
    statistics: Mapping[str, tuple[Path, Mapping[str, Any]]]  # by signature: the folder, and what they are of
    folder: Path


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Scalars under dotted names, which W&B can filter and group by; a list becomes one string."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple, set, frozenset)):
            flat[f"{prefix}{key}"] = ",".join(str(item) for item in value)
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
    return flat
