"""A pack: jobs with the same model and dataset, run in one process that loads the model once."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.lazy import torch
from ablation_sweeps.experiment.config import from_dict
from ablation_sweeps.results import progress, run_folder, run_status
from ablation_sweeps.results.run_status import RunState

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

    from ablation_sweeps.experiment.job import Job
    from ablation_sweeps.experiment.session import Session

log = logging.getLogger(__name__)


_leaving = threading.Event()  # set by a signal: errors from then on are not the job's fault

STALLS = 2  # limit of successive time-outs of a pack without progress
POISONED = 70  # exit status of a process whose GPU has failed


@dataclass(frozen=True)
class Pack:
    """Jobs for one process, as plain values that are fixed when they are submitted.

    Attributes:
        configs: configuration of each job, composed and resolved, by its run folder.
        delay: maximum seconds of a random wait at the start, so that packs do not all load models and call W&B at once.
        reached: numbers of finished jobs, and of batches done, when the pack was last requeued.
        stalls: number of successive times that it was requeued without progress.
    """

    configs: dict[str, dict[str, Any]]
    delay: float = 0.0
    reached: tuple[int, int] = (0, 0)
    stalls: int = 0

    @property
    def folders(self) -> list[Path]:
        """Run folders of the jobs."""
        return [Path(folder) for folder in self.configs]

    def __call__(self) -> None:
        """Run the jobs in this process, one after another."""
        _log_to_stderr()
        time.sleep(random.random() * self.delay)
        if self.stalls == STALLS:  # otherwise it would be requeued for ever
            stuck = next(folder for folder in self.folders if not run_status.read(folder).has_ended)
            why = f"no batch was done in {STALLS} runs, each up to its time limit: raise hydra.launcher.time"
            run_status.write_state(stuck, RunState.FAILED, why)
        from ablation_sweeps.experiment.session import Session

        session = Session()
        for number, (folder, config) in enumerate(self.configs.items(), start=1):
            if run_status.read(Path(folder)).state == RunState.FAILED:  # before this pack was requeued
                continue
            log.info("[%d/%d] %s", number, len(self.configs), Path(folder).name)
            _run(Path(folder), config, session)

    def checkpoint(self) -> DelayedSubmission:
        """The pack that submitit requeues after a signal. Progress is on disk already."""
        from submitit.helpers import DelayedSubmission

        _leaving.set()
        over = sum(run_status.read(folder).has_ended for folder in self.folders)
        reached = over, sum(progress.batches_done(folder) for folder in self.folders)
        stalls = self.stalls + 1 if reached == self.reached else 0
        return DelayedSubmission(replace(self, reached=reached, stalls=stalls))


def packed(jobs: Sequence[Job], most: int | None) -> list[Pack]:
    """Group jobs with the same model and dataset into packs of at most `most` jobs."""
    groups: dict[Any, list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.model, job.dataset), []).append(job)
    packs = []
    for group in groups.values():
        size = most or len(group)
        for start in range(0, len(group), size):
            packs.append(Pack({str(job.folder): frozen(job) for job in group[start : start + size]}))
    return packs


def frozen(job: Job) -> dict[str, Any]:
    """Configuration of a job with the absolute path of its results."""
    return {**job.config, "results_dir": str(job.results_dir)}


def _run(folder: Path, config: dict[str, Any], session: Session) -> None:
    """Run one job. If it fails, the next jobs still run, unless the process itself has become unusable."""
    from ablation_sweeps.experiment.run import run_job

    try:
        job = from_dict(config)
        if job.folder != folder:
            raise UserError(
                "the model, the data or a method's code was changed after the job was submitted; run the same "
                "command again"
            )
        run_job(job, session)
    except Exception as error:
        log.exception("failed: %s", folder.name)
        if _leaving.is_set():  # the error was raised by submitit's handler of USR2
            if not run_status.read(folder).is_finished:
                why = f"out of time, and could not be requeued: {error}"
                run_status.write_state(folder, RunState.INTERRUPTED, why)
            sys.exit(1)
        if poisons(error):
            run_status.write_state(folder, RunState.DIED, f"{type(error).__name__}: {error}".splitlines()[0])
            sys.exit(POISONED)
        if not run_status.read(folder).is_finished:
            run_folder.fail(folder, error)  # an error outside of what run_job handles


def poisons(error: BaseException) -> bool:
    """True if all later calls in this process will fail, too: after a CUDA error other than a lack of memory."""
    return "CUDA error" in str(error) and not isinstance(error, torch.OutOfMemoryError)


def _log_to_stderr() -> None:
    """Log to stderr as on a terminal, with the time; details go to the log of each run."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.INFO)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)
    logging.getLogger("ablation_sweeps").setLevel(logging.DEBUG)


def _end_with_the_launcher() -> None:
    """Interrupt this process when the launcher ends, which holds the other end of stdin."""
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":  # run by the local launcher, which sends the pack on stdin, in one line
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell script ignores it in what it starts with `&`
    pack = Pack(json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with_the_launcher, daemon=True).start()
    pack()
