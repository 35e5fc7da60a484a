"""The status of a run, in status.json: how far it is, in which process, and why it stopped."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from socket import gethostname
from typing import Annotated, Any

from pydantic import AfterValidator

from ablation_sweeps.base import files
from ablation_sweeps.results import progress

CLOCKS = 5.0  # maximum difference in seconds between the clocks of files and of processes


def _is_time(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("a time without a zone")
    return text


Time = Annotated[str, AfterValidator(_is_time)]


class RunState(str, Enum):
    """State of a run. NEW and DAMAGED are never written: there is no status.json, or its content cannot be true."""

    NEW = "new"
    QUEUED = "queued"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    DIED = "died"  # with its process
    FAILED = "failed"
    FINISHED = "finished"
    DAMAGED = "damaged"

    __str__ = str.__str__
    __format__ = str.__format__


@dataclass(frozen=True)
class RunStatus:
    """Content of status.json. What is None or empty is left out of the file.

    Attributes:
        reason: why the run is in this state, in words.
        time: when the status was written.
        started: when the process began to run the job.
        host, pid: process that runs the job, or will run it; None if a cluster decides that.
        ran: True if the job had begun before it was queued or stopped.
        batches: number of batches in the evaluation split.
        begun_at: number of batches that were done when the process began.
        sha256: checksums of the files of a finished run; for status.json, of the rest of its content.
        run: name of the folder in which the run finished.
    """

    state: RunState
    reason: str | None = None
    time: Time | None = None
    started: Time | None = None
    host: str | None = None
    pid: int | None = None
    ran: bool | None = None
    batches: int | None = None
    begun_at: int | None = None
    sha256: dict[str, str] = field(default_factory=dict)
    run: str | None = None

    @property
    def is_finished(self) -> bool:
        """True if the run has finished. Its files may be damaged: see `run_folder.finished`."""
        return self.state == RunState.FINISHED

    @property
    def has_ended(self) -> bool:
        """True if the job has finished or failed, so that there is nothing left to run."""
        return self.state in (RunState.FINISHED, RunState.FAILED)

    def to_dict(self) -> dict[str, Any]:
        """The status as it is written."""
        content = {key: value for key, value in asdict(self).items() if value is not None and value != {}}
        return content | {"state": self.state.value}


def read(folder: Path) -> RunStatus:
    """Content of status.json; DAMAGED if it cannot be read, or is missing beside results."""
    file = folder / "status.json"
    found = files.read_json(file, RunStatus)
    if found is None and not file.exists() and not (folder / "rows.parquet").exists():
        return RunStatus(RunState.NEW)
    if found is None or found.state in (RunState.NEW, RunState.DAMAGED) or (found.host is None) != (found.pid is None):
        return RunStatus(RunState.DAMAGED, f"{file.name} is {damage(file)}")
    return found


def damage(file: Path) -> str:
    """The fault of a file that cannot be read, or does not match its checksum."""
    return "damaged (truncated or altered)" if file.exists() else "missing"


def write(folder: Path, status: RunStatus) -> None:
    """Write status.json."""
    files.write_json(folder / "status.json", status.to_dict())


def write_state(folder: Path, state: str, reason: str | None = None) -> None:
    """Write a state without a process: what the job is doing now, or why it stopped."""
    write(folder, RunStatus(RunState(state), reason, time=now(), ran=has_run(folder)))


def expect(folder: Path, batches: int) -> None:
    """Record how many batches there are, and how many are done already, so that progress can be shown."""
    found = read(folder)
    running = found if found.state == RunState.RUNNING else running_here()
    write(folder, replace(running, batches=batches, begun_at=progress.batches_done(folder)))


def has_run(folder: Path) -> bool | None:
    """True if the job was begun and not finished, None otherwise: the value of `ran` in its next status."""
    found = read(folder)
    began = found.state in (RunState.RUNNING, RunState.DIED) or found.ran or progress.batches_done(folder) > 0
    return True if began and not found.is_finished else None


def running_here() -> RunStatus:
    """Status of a job that this process runs."""
    return RunStatus(RunState.RUNNING, started=now(), host=gethostname(), pid=os.getpid())


def is_gone(status: RunStatus) -> bool:
    """True if the process that a status names was on this machine, and has ended.

    A process that began after the status was written is another one: process ids are reused, in a container even soon.
    """
    import psutil

    wrote = status.started or status.time
    if status.host != gethostname() or status.pid is None or wrote is None:
        return False
    try:
        process = psutil.Process(status.pid)
        if process.status() == psutil.STATUS_ZOMBIE:  # killed, but still known to its parent
            return True
        return process.create_time() > datetime.fromisoformat(wrote).timestamp() + CLOCKS
    except psutil.NoSuchProcess:
        return True


def now() -> str:
    """The present time, in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
