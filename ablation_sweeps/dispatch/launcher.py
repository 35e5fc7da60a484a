"""Submits the packs of a sweep, recovers the jobs of processes that die, and collects the results."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import TypedDict

from ablation_sweeps.base import files
from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.terminal import counted
from ablation_sweeps.dispatch.local import Local
from ablation_sweeps.dispatch.plan import by_model
from ablation_sweeps.dispatch.slurm import Slurm, others_may_write
from ablation_sweeps.dispatch.supervisor import Supervisor
from ablation_sweeps.dispatch.sweep import Failures, end_of_sweep
from ablation_sweeps.experiment.config import from_dict
from ablation_sweeps.results import run_folder, run_status

if TYPE_CHECKING:
    from ablation_sweeps.experiment.job import Job

log = logging.getLogger(__name__)


LAUNCHERS = {"Slurm": Slurm, "Local": Local}
LAST_LAUNCH = "how.json"  # how the sweep was launched last; read by `retry`


def launch(options: Any, jobs: Sequence[Job]) -> None:
    """Run all unfinished jobs and report; with wait=false, only submit them."""
    sweep = jobs[0].folder.parent
    jobs = [jobs[i] for i in by_model(jobs)]
    with exclusive_launch(sweep):
        queue = options.queue(sweep)
        work = Supervisor(queue, options.max_attempts, {job.folder: job for job in jobs})
        try:
            work.start(options.max_jobs_per_pack)
            how = {"launcher": type(options).__name__, "options": asdict(options), "folder": os.getcwd()}
            files.write_json(sweep / ".dispatch" / LAST_LAUNCH, how)
            if not options.wait and work.packs:
                print(f"{counted(len(work.packs), 'pack')} in the queue; the same command later collects the results")
                return
            work.watch()
        except KeyboardInterrupt:
            log.warning("cancelling %s", counted(len(work.packs), "pack"))
            queue.cancel(list(work.packs))
            run_folder.mark_interrupted(work.jobs, killed=queue.survives_launcher)  # local packs record how they ended
            raise
    failures = Failures()
    for folder in work.jobs:
        if not (status := run_status.read(folder)).is_finished:
            failures.reasons.append(f"{folder.name}: {status.reason or status.state}")
    end_of_sweep(jobs, failures)


def retry(sweep: Path) -> None:
    """Run unfinished jobs again, in the way in which the sweep was last launched.

    Raises:
        UserError: what is left cannot be run again; or others may write to the files that say how.
    """
    runs = [run for run in run_folder.runs(sweep) if not run_folder.finished(run)]
    if not runs:
        print(f"{sweep}: nothing to retry: no job failed, and none is missing")
        return
    for path in (
        sweep,
        sweep / ".dispatch",
        sweep / ".dispatch" / LAST_LAUNCH,
        *runs,
        *(run / "config.yaml" for run in runs),
    ):
        if path.exists() and others_may_write(path):
            raise UserError(
                f"{path}: others may write to it, and so could run code as you; launch the sweep again instead"
            )
    how = _read_last_launch(sweep)
    launcher = LAUNCHERS[how["launcher"]]
    if Path(how["folder"]).is_dir():
        os.chdir(how["folder"])  # relative paths begin there
    held = [run for run in runs if launcher is Local and run_folder.is_held(run)]  # for SLURM, its queue is asked
    if held:
        log.warning("%s left to the process that runs it or will run it", counted(len(held), "job"))
    jobs = [job for run in runs if run not in held and (job := _job_of(run))]
    if not jobs and held:
        return
    if not jobs:
        raise UserError(f"{sweep}: nothing can be retried here; type the command of the sweep again")
    launch(launcher(**how["options"]), jobs)


class LaunchRecord(TypedDict):
    """How a sweep was launched.

    Attributes:
        launcher: name of a class.
        options: options of the launcher.
        folder: where the command was typed.
    """

    launcher: Literal["Slurm", "Local"]
    options: dict[str, Any]
    folder: str


def _read_last_launch(sweep: Path) -> LaunchRecord:
    """Read how a sweep was launched last. One that ran without a launcher continues in packs on this machine."""
    file = sweep / ".dispatch" / LAST_LAUNCH
    if not file.exists():
        plain = {"max_jobs_per_pack": None, "max_parallel": None, "max_attempts": 2, "gpus": None}
        return {"launcher": "Local", "options": plain, "folder": "."}
    try:
        if (how := files.read_json(file, LaunchRecord)) is not None:
            LAUNCHERS[how["launcher"]](**how["options"])
            return how
    except (TypeError, ValueError):  # no such options
        pass
    raise UserError(
        f"{file}: is damaged, so it is not known how the sweep was launched; type the command of the sweep again"
    )


def _job_of(run: Path) -> Job | None:
    try:
        job = from_dict({**run_folder.config(run), "results_dir": str(run.parents[1]), "sweep": run.parent.name})
        if job.folder == run:
            return job
        why = "its model, its data or this program were changed since it was launched"
    except UserError as error:
        why = str(error)
    log.warning("%s: left alone: %s", run.name, why)
    return None


@contextmanager
def exclusive_launch(sweep: Path) -> Iterator[None]:
    """Context manager: refuse a second launcher of the same sweep, which would submit the same jobs again."""
    from filelock import FileLock, Timeout

    (sweep / ".dispatch").mkdir(parents=True, exist_ok=True)
    lock = FileLock(sweep / ".dispatch" / "launch.lock")
    who = sweep / ".dispatch" / "launcher"
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        by = who.read_text(encoding="utf-8", errors="replace").strip() if who.exists() else "another process"
        raise UserError(
            f"sweep={sweep.name}: is being launched already, by {by}; wait until that ends, or choose another "
            f"sweep=NAME"
        ) from error
    try:
        files.write_text(who, f"process {os.getpid()} on {os.uname().nodename}\n")
        yield
    finally:
        lock.release()
