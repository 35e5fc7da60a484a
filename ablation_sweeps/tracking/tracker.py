"""The interface of a tracker, which mirrors results elsewhere."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Protocol, runtime_checkable

from ablation_sweeps.results.record import RunRecord


@runtime_checkable
class Tracker(Protocol):
    """A tracker's options. A class that leaves out a member with a value here has that value.

    Attributes:
        place: where the runs go, if there are several places.
    """

    place: str = ""

    @abstractmethod
    def log_run(self, run: RunRecord) -> bool:
        """Log a finished run. Returns whether that succeeded."""
        ...

    def log_sweep(self, folder: Path) -> None:
        """Log what concerns a whole sweep, after its last run.

        Raises:
            UserError: one line that says what was not logged, and how it can be.
        """
