"""The interface of schedulers that run packs, on a cluster or on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from ablation_sweeps.dispatch.packs import Pack


@dataclass(frozen=True)
class PackState:
    """State of a pack.

    Attributes:
        state: in SLURM's terms.
        is_over: True if the pack has ended and will not run again.
        reason: why it does not run, if that is known; or how its process ended.
    """

    state: str
    node: str
    is_over: bool
    reason: str


@runtime_checkable
class Scheduler(Protocol):
    """Runs packs, and reports their states."""

    survives_launcher: bool  # True if queued packs will run even if this process ends

    @property
    def max_packs_per_submission(self) -> int:
        """Maximum number of packs in one call of `submit`."""
        ...

    def submit(self, packs: list[Pack]) -> dict[str, Pack]:
        """Submit packs, at most `max_packs_per_submission`; returns them by their names."""
        ...

    def live_packs(self) -> dict[str, list[str]]:
        """Names of the packs of earlier launches that are queued or running, with the run folders of their jobs."""
        ...

    def poll(self) -> dict[str, PackState] | None:
        """State of each pack, as far as it is known; None if there is nothing new."""
        ...

    def cancel(self, packs: list[str]) -> None: ...

    def log_of(self, pack: str) -> Path:
        """File with the output of the pack's process."""
        ...
