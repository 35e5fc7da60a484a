"""Steps of every launcher: checks before the first job, and the report after the last."""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from ablation_sweeps.base.environment import code
from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.terminal import counted, plain
from ablation_sweeps.data.batch import Split
from ablation_sweeps.dispatch.plan import plan
from ablation_sweeps.experiment.config import to_job
from ablation_sweeps.report import write
from ablation_sweeps.results import progress, run_folder, run_status
from ablation_sweeps.results.run_status import RunState

if TYPE_CHECKING:
    from ablation_sweeps.experiment.job import Job

log = logging.getLogger(__name__)


def check(configs: Sequence[DictConfig]) -> list[Job]:
    """Build and check all jobs of a sweep, so that a mistake in the last one is found before the first one runs."""
    from tqdm import tqdm

    code()  # hash the code now: files may be edited before the sweep ends
    jobs = []
    for config in tqdm(configs, desc="checking the jobs", delay=2, leave=False, disable=None):
        job = to_job(config)
        job.check()
        jobs.append(job)
    return jobs


def fetch(jobs: Sequence[Job]) -> None:
    """Download all that the jobs need from the hub, once each, so that they can run offline. Compute nothing."""
    splits: tuple[Split, ...] = ("calibration", "evaluation")
    needed = {(job.model, job.dataset, *map(job.budget, splits)): job for job in jobs}
    for i, job in enumerate(needed.values(), start=1):
        log.info("[%d/%d] fetching %s and %s", i, len(needed), job.model.label, job.dataset.label)
        job.fetch()
    print("everything needed is on this machine; the same command without prefetch=true can run offline")


def only_asked(jobs: Sequence[Job], most: int | None, max_concurrent_packs: int) -> bool:
    """Do what prefetch=true or dry_run=true asks for. Returns True if one of them is set: then nothing is to be run."""
    if jobs[0].prefetch:
        fetch(jobs)
    elif jobs[0].dry_run:
        plan(jobs, most, max_concurrent_packs)
    return jobs[0].prefetch or jobs[0].dry_run


@dataclass
class Failures:
    """Jobs that failed while others continued."""

    reasons: list[str] = field(default_factory=list)
    first: BaseException | None = None  # its traceback is shown on request

    def add(self, what: str, error: BaseException) -> None:
        self.reasons.append(f"{what}: {plain(error)}")
        self.first = self.first or error
        log.error("failed: %s", self.reasons[-1])
        chained: BaseException | None = error
        while chained:  # release what its frames hold: a model, whose memory the next one needs
            traceback.clear_frames(chained.__traceback__)
            chained = chained.__cause__ or chained.__context__


NOT_DONE = (RunState.NEW, RunState.INTERRUPTED, RunState.DIED, RunState.DAMAGED)  # and in no other process


@contextmanager
def waiting(jobs: Sequence[Job]) -> Iterator[None]:
    """Context manager: mark the jobs as queued, so that `status` and `retry` list those that never run here."""
    mine = [job for job in jobs if run_folder.current_status(job.folder).state in NOT_DONE]
    for job in mine:
        run_folder.queue(job.folder, job.config, survives_launcher=False)
    try:
        yield
    finally:
        run_folder.mark_interrupted(job.folder for job in mine)


def _say_what_other_code_did(jobs: Sequence[Job]) -> None:
    """Say which results are from another version of this code: editing it does not change the name of a result."""
    finished = [job.folder for job in jobs if run_status.read(job.folder).is_finished]
    other = [folder.name for folder in finished if run_folder.environment(folder).get("code") != code()]
    if other:
        named = ", ".join(other[:3]) + (f" and {len(other) - 3} more" if len(other) > 3 else "")
        log.info(
            "%d of %s finished by another version of this code, whose numbers are taken for equal: %s; "
            "results_dir=FOLDER computes anew", len(other), counted(len(jobs), "job"), named,
        )  # fmt: skip


def end_of_sweep(jobs: Sequence[Job], failures: Failures) -> None:
    """Write tables and figures of all finished runs in the sweep's folder; then raise an error if a job failed.

    Raises:
        UserError: a job failed, or the tracker does not take what it must.
    """
    for job in jobs:
        if run_status.read(job.folder).is_finished:
            progress.remove(job.folder)
    folders = dict.fromkeys(job.folder.parent for job in jobs)
    with_results = [folder for folder in folders if not failures.reasons or list(folder.glob("*/rows.parquet"))]
    for folder in with_results:
        for file in write.write(folder):
            if file.suffix in write.KINDS:
                print(f"{write.KINDS[file.suffix]}: {os.path.relpath(file)}")
    _say_what_other_code_did(jobs)
    for folder in with_results:
        try:
            jobs[0].tracking.log_sweep(folder)
        except UserError as error:
            if not failures.reasons:
                raise
            log.error("%s", error)  # failures come last, where they are seen
    if failures.reasons:
        n = len(failures.reasons)
        done = sum(run_status.read(job.folder).is_finished for job in jobs)
        others = "the others are" if done == len(jobs) - n else f"{done} {'is' if done == 1 else 'are'}"
        others = f", {others} finished and kept" if done else ""
        raise UserError(
            f"{n} of {len(jobs)} jobs failed{others}; the same command runs only what is missing; each run's folder "
            f"has a log. The first: {failures.reasons[0]}"
        ) from failures.first
