"""Shows the progress of a sweep's jobs, read from their files: live in a launcher, or later."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from ablation_sweeps.dispatch.scheduler import PackState
from ablation_sweeps.results import progress, run_folder, run_status
from ablation_sweeps.results.run_status import RunState, RunStatus

if TYPE_CHECKING:
    from rich.table import Table

log = logging.getLogger(__name__)


LINE_SECONDS = 60.0  # between two lines if there is no terminal
ROWS = 30  # packs shown on a terminal
Packs = dict[str, tuple[list[Path], PackState]]


class Watcher:
    """Table of packs that is redrawn on a terminal; elsewhere, a line a minute while packs are awaited."""

    def __enter__(self) -> Watcher:
        from rich.console import Console
        from rich.live import Live

        console = Console(stderr=True)  # stdout is for results only
        self.live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        if self.live:
            self.live.start()
        self.said = time.monotonic()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live:
            self.live.stop()

    def show(self, packs: Packs) -> None:
        if self.live:
            self.live.update(table(packs), refresh=True)
        elif packs and time.monotonic() - self.said > LINE_SECONDS:
            self.said = time.monotonic()
            states = Counter(place.state.lower() for _, place in packs.values())
            folders = [folder for folders, _ in packs.values() for folder in folders]
            done = sum(run_status.read(folder).is_finished for folder in folders)
            packs_are = ", ".join(f"{n} {state}" for state, n in sorted(states.items()))
            whys = sorted({place.reason for _, place in packs.values() if place.reason and not place.is_over})
            because = f" ({', '.join(whys)})" if whys else ""
            log.info("packs: %s%s; %d of their %d jobs are finished", packs_are, because, done, len(folders))


def table(packs: Packs) -> Table:
    """Table of packs: node, state, and progress of the job that runs."""
    from rich import box
    from rich.table import Table

    shown = Table("pack", "node", "state", "jobs", "at", "left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, (folders, place) in list(packs.items())[:ROWS]:
        statuses = {folder: run_status.read(folder) for folder in folders}
        done = sum(status.has_ended for status in statuses.values())
        running = [folder for folder, status in statuses.items() if status.state == RunState.RUNNING]
        at, left = progress_of(running[0], statuses[running[0]]) if running else (place.reason, "")
        shown.add_row(name, place.node, place.state.lower(), f"{done}/{len(folders)}", at, left)
    if len(packs) > ROWS:
        shown.add_row(f"and {len(packs) - ROWS} more", "", "", "", "", "")
    return shown


def progress_of(folder: Path, status: RunStatus) -> tuple[str, str]:
    """Name of a job with its batches done, and the time left if later batches take as long as those done."""
    total, done = status.batches, progress.batches_done(folder)
    if not total or status.started is None:
        return f"{folder.name} (loading)", ""
    spent = (datetime.now(timezone.utc) - datetime.fromisoformat(status.started)).total_seconds()
    lately = done - (status.begun_at or 0)
    left = f"{spent / lately * (total - done):.0f} s" if lately > 0 else ""
    return f"{folder.name} {done}/{total}", left


def overview(runs: Sequence[Path]) -> Table:
    """Table of jobs: state, machine, and progress or reason."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table("job", "state", "where", "how far, or why", box=box.SIMPLE_HEAD, pad_edge=False)
    for run in runs:
        status = run_folder.current_status(run)
        far = ""
        if status.state == RunState.RUNNING and status.batches:
            far = f"{progress.batches_done(run)}/{status.batches} batches"
        shown.add_row(*map(Text, (run.name, str(status.state), status.host or "", status.reason or far)))
    return shown
