"""What every launcher does before the first job and after the last."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from ablation_sweeps import report
from ablation_sweeps.config import to_job
from ablation_sweeps.data import Split, UserError
from ablation_sweeps.messages import plain

if TYPE_CHECKING:
    from ablation_sweeps.job import Job

log = logging.getLogger(__name__)


def check(configs: Sequence[DictConfig]) -> list[Job]:
    """Builds all jobs of a sweep, so that a mistake in the last one is found before the first one runs."""
    from tqdm import tqdm

    jobs = []
    for config in tqdm(configs, desc="checking the jobs", delay=2, leave=False, disable=None):
        job = to_job(config)
        job.check()
        jobs.append(job)
    return jobs


def fetch(jobs: Sequence[Job]) -> None:
    """All that the jobs need from the hub, once each, so that they can then run offline. Nothing is computed."""
    splits: tuple[Split, ...] = ("calibration", "evaluation")
    needed = {(job.model, job.dataset, *map(job.budget, splits)): job for job in jobs}
    for i, job in enumerate(needed.values(), start=1):
        log.info("[%d/%d] fetching %s and %s", i, len(needed), job.model.label, job.dataset.label)
        job.fetch()
    print("all that is needed is on this machine; without prefetch=true, the same command can run offline")


def by_model(jobs: Sequence[Job]) -> list[int]:
    """The order in which each model is loaded once, whatever the order in which the options were typed."""
    model_first = {job.model: i for i, job in reversed(list(enumerate(jobs)))}
    data_first = {(job.model, job.dataset): i for i, job in reversed(list(enumerate(jobs)))}
    place = lambda i: (model_first[jobs[i].model], data_first[jobs[i].model, jobs[i].dataset], i)  # noqa: E731
    return sorted(range(len(jobs)), key=place)


@dataclass
class Failures:
    """Jobs that failed while others went on."""

    reasons: list[str] = field(default_factory=list)
    first: BaseException | None = None  # its traceback is shown where one is wanted

    def add(self, what: str, error: BaseException) -> None:
        self.reasons.append(f"{what}: {plain(error)}")
        self.first = self.first or error
        log.error("failed: %s", self.reasons[-1])


def end_of_sweep(jobs: Sequence[Job], failures: Failures) -> None:
    """Tables and figures of all that is finished in the sweep's folder; then, loudly, what failed.

    Raises:
        UserError: a job failed.
    """
    for folder in dict.fromkeys(job.folder.parent for job in jobs):
        if failures.reasons and not list(folder.glob("*/rows.parquet")):
            continue
        for file in report.write(folder):
            if file.suffix == ".png":
                print(f"figure: {os.path.relpath(file)}")
    if failures.reasons:
        n = len(failures.reasons)
        others = "" if n == len(jobs) else ", the others are finished and kept"
        raise UserError(
            f"{n} of {len(jobs)} jobs failed{others}; the same command runs only what is missing. "
            f"The first: {failures.reasons[0]}"
        ) from failures.first
