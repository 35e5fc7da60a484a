"""Prints the plan of a sweep: its packs, finished jobs and an estimate of the time."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ablation_sweeps.base.terminal import counted
from ablation_sweeps.dispatch.packs import packed
from ablation_sweeps.results import progress, run_folder

if TYPE_CHECKING:
    from ablation_sweeps.experiment.job import Job


def plan(jobs: Sequence[Job], most: int | None, max_concurrent_packs: int) -> None:
    """Print what would run, and how long it may take, judging by similar jobs that ran before."""
    jobs = [jobs[i] for i in by_model(jobs)]
    missing = {job.folder: job for job in jobs if not run_folder.finished(job.folder)}
    packs = packed(list(missing.values()), most)
    past = {like: seconds_of(job) for like, job in {job.cost_key: job for job in missing.values()}.items()}
    took: list[float | None] = []
    for number, pack in enumerate(packs, start=1):
        job = missing[pack.folders[0]]
        begun = sum(progress.batches_done(folder) > 0 for folder in pack.folders)
        each = past[job.cost_key]
        took.append(each and each * len(pack.folders))
        about = f", about {duration(took[-1])}" if took[-1] else ""
        print(f"pack {number}: {job.model.label} on {job.dataset.label}, {counted(len(pack.folders), 'job')}{about}"
              + (f" ({begun} already started)" if begun else ""))  # fmt: skip
        for folder in pack.folders:
            print(f"    {folder.name}")
    finished = len(jobs) - len(missing)
    print(f"{counted(len(jobs), 'job')}: {finished} finished, {len(missing)} to run in {counted(len(packs), 'pack')}")
    known = [seconds for seconds in took if seconds]
    if known and len(known) == len(took):
        total = sum(known)
        least = duration(max(*known, total / max_concurrent_packs, 0))
        print(f"about {duration(total)} of computing; at least {least}, with "
              f"{counted(min(max_concurrent_packs, len(packs)), 'pack')} at once")  # fmt: skip
    elif packs:
        print("no time estimate: no similar job has run in this results_dir")


def seconds_of(job: Job) -> float | None:
    """Mean duration of earlier jobs in the same results_dir that differ only in method and seed; None if none."""
    name = f"{job.model.label}-{job.dataset.label}-".replace("/", "--")
    earlier = job.results_dir.glob(f"*/{glob.escape(name)}*/environment.json")
    ran = [found for file in earlier if (found := run_folder.environment(file.parent)).get("like") == job.cost_key]
    took = [found["seconds"] for found in ran if "seconds" in found]  # an unfinished run has no duration
    return sum(took) / len(took) if took else None


def duration(seconds: float) -> str:
    """A number of seconds in words: "40 s", "12 min", "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def by_model(jobs: Sequence[Job]) -> list[int]:
    """Order of the jobs in which each model is loaded only once; otherwise, jobs stay in order."""
    model_first = {job.model: i for i, job in reversed(list(enumerate(jobs)))}
    data_first = {(job.model, job.dataset): i for i, job in reversed(list(enumerate(jobs)))}

    def place(i: int) -> tuple[int, int, int]:
        return model_first[jobs[i].model], data_first[jobs[i].model, jobs[i].dataset], i

    return sorted(range(len(jobs)), key=place)
