"""A pack: jobs that share model and dataset, run one after the other in one process, which loads the model once."""

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
from ablation_sweeps.results import run_folder

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

    from ablation_sweeps.experiment.job import Job
    from ablation_sweeps.experiment.session import Session

log = logging.getLogger(__name__)


_leaving = threading.Event()  # a signal came: what goes wrong from now on is no fault of the job

FINISHED_STATES = ("finished", "failed")
STALLS = 2  # times in a row that a pack may run into its time limit with nothing done
POISONED = 70  # exit status of a process whose device is of no more use


@dataclass(frozen=True)
class Pack:
    """Jobs that are shipped to the process that runs them: plain values, frozen when they were submitted.

    Attributes:
        configs: of each job, composed and resolved, under the folder that its results go to.
        delay: wait up to so many seconds first, so that many packs do not all load, and call W&B, at once.
        reached: jobs, and batches of others, that were done when it was last put into the queue again.
        stalls: times that this happened with nothing done since.
    """

    configs: dict[str, dict[str, Any]]
    delay: float = 0.0
    reached: tuple[int, int] = (0, 0)
    stalls: int = 0

    @property
    def folders(self) -> list[Path]:
        return [Path(folder) for folder in self.configs]

    def __call__(self) -> None:
        _log_to_stderr()
        time.sleep(random.random() * self.delay)
        if self.stalls == STALLS:  # it would go round for ever
            stuck = next(folder for folder in self.folders if run_folder.status(folder)["state"] not in FINISHED_STATES)
            run_folder.write_status(stuck, "failed", f"no batch was done in {STALLS} runs, each up to its time limit: "
                                                "raise hydra.launcher.time")  # fmt: skip
        from ablation_sweeps.experiment.session import Session

        session = Session()
        for number, (folder, config) in enumerate(self.configs.items(), start=1):
            if run_folder.status(Path(folder))["state"] == "failed":  # before this pack was put into the queue again
                continue
            log.info("[%d/%d] %s", number, len(self.configs), Path(folder).name)
            _run(Path(folder), config, session)

    def checkpoint(self) -> DelayedSubmission:
        """The pack that submitit puts into the queue again after a signal. Progress is on disk already."""
        from submitit.helpers import DelayedSubmission

        _leaving.set()
        over = sum(run_folder.status(folder)["state"] in FINISHED_STATES for folder in self.folders)
        reached = over, sum(run_folder.batches_done(folder) for folder in self.folders)
        stalls = self.stalls + 1 if reached == self.reached else 0
        return DelayedSubmission(replace(self, reached=reached, stalls=stalls))


def packed(jobs: Sequence[Job], most: int | None) -> list[Pack]:
    """The jobs in packs of at most `most`."""
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
    return {**job.config, "results_dir": str(job.results_dir)}


def _run(folder: Path, config: dict[str, Any], session: Session) -> None:
    """One job never costs another one its result: only what makes the process useless ends it."""
    from ablation_sweeps.experiment.run import run_job

    try:
        job = from_dict(config)
        if job.folder != folder:
            raise UserError(
                "the model, the data or a method's code was changed after it was submitted; run the same command again"
            )
        run_job(job, session)
    except Exception as error:
        log.exception("failed: %s", folder.name)
        if _leaving.is_set():  # raised by submitit's handler of USR2, in the middle of the job
            if run_folder.status(folder)["state"] != "finished":
                run_folder.write_status(
                    folder, "interrupted", f"out of time, and not put into the queue again: {error}"
                )
            sys.exit(1)
        if poisons(error):
            run_folder.write_status(folder, "died", f"{type(error).__name__}: {error}".splitlines()[0])
            sys.exit(POISONED)
        if run_folder.status(folder)["state"] != "finished":
            run_folder.fail(folder, error)  # an error before or after what run_job looks after


def poisons(error: BaseException) -> bool:
    """After an error of the device itself, but for lack of memory, every later call in the process fails too."""
    return "CUDA error" in str(error) and not isinstance(error, torch.OutOfMemoryError)


def _log_to_stderr() -> None:
    """Log to stderr as on a terminal, with the time; details go to the log of each job."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.INFO)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)
    logging.getLogger("ablation_sweeps").setLevel(logging.DEBUG)


def _end_with_the_launcher() -> None:
    """The launcher holds the other end of stdin for as long as it lives."""
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":  # the local launcher's: the pack comes on stdin, in one line
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell script starts with `&`
    pack = Pack(json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with_the_launcher, daemon=True).start()
    pack()
