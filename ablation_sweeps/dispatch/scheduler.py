"""The interface of schedulers that run packs, on a cluster or on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from ablation_sweeps.dispatch.packs import Pack


@dataclass(frozen=True)
class PackState:
    """Attributes:
    state: in SLURM's words.
    is_over: it runs no more, and will not again.
    reason: it does not run, where that is known; or how its process ended.
    """

    state: str
    node: str
    is_over: bool
    reason: str


@runtime_checkable
class Scheduler(Protocol):
    survives_launcher: bool  # what waits in it is run even if this process ends

    @property
    def max_packs_per_submission(self) -> int:
        """Packs of one submission."""
        ...

    def submit(self, packs: list[Pack]) -> dict[str, Pack]:
        """Each under its name; at most `most`."""
        ...

    def live_packs(self) -> dict[str, list[str]]:
        """The packs of earlier launches that still wait or run, and the folders of their jobs."""
        ...

    def poll(self) -> dict[str, PackState] | None:
        """Where each pack is, as far as that is known; None while nothing new is known."""
        ...

    def cancel(self, packs: list[str]) -> None: ...

    def log_of(self, pack: str) -> Path:
        """File with the output of the pack's process."""
        ...
