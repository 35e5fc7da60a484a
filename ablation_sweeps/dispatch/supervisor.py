"""Follows submitted packs, and resubmits the jobs of processes that died."""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.terminal import counted
from ablation_sweeps.dispatch.packs import Pack, packed
from ablation_sweeps.dispatch.scheduler import PackState, Scheduler
from ablation_sweeps.dispatch.watch import Watcher
from ablation_sweeps.results import progress, run_folder, run_status
from ablation_sweeps.results.run_status import RunState

if TYPE_CHECKING:
    from ablation_sweeps.experiment.job import Job

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0  # between two reads of the jobs' files
NOT_SEEN = PackState("UNKNOWN", "", False, "")  # only the scheduler can say that a pack is over
NOBODYS_FAULT = ("PREEMPTED", "BOOT_FAIL")
NOT_ENDED_BY_ITSELF = (RunState.RUNNING, RunState.DIED, RunState.DAMAGED)
MEMORY = re.compile(r"oom.?kill|out of memory|OutOfMemory|\bKilled\b|SIGKILL|MemoryError", re.IGNORECASE)


@dataclass
class Supervisor:
    """The jobs of a launch, and the packs that hold the unfinished ones.

    Attributes:
        deaths: for each job, how many times its process died without progress.
        reached: for each job, batches done when it was last submitted, or died.
        over: packs that were over when the scheduler was last asked.
        last: states of the packs then.
    """

    scheduler: Scheduler
    max_attempts: int
    jobs: dict[Path, Job]
    packs: dict[str, list[Path]] = field(default_factory=dict)
    deaths: Counter[Path] = field(default_factory=Counter)
    reached: dict[Path, int] = field(default_factory=dict)
    over: set[str] = field(default_factory=set)
    last: dict[str, PackState] = field(default_factory=dict)

    def start(self, most: int | None) -> None:
        """Submit all jobs that are neither finished nor in a pack of an earlier launch."""
        earlier = self.scheduler.live_packs()
        # Only now: jobs that ended while the queue was asked are finished, and in no pack.
        missing = {folder: job for folder, job in self.jobs.items() if not run_folder.finished(folder)}
        self.reached = {folder: progress.batches_done(folder) for folder in missing}
        for pack, folders in earlier.items():
            mine = [Path(folder) for folder in folders if Path(folder) in missing]
            mine = [folder for folder in mine if run_status.read(folder).state != RunState.FAILED]  # it is past these
            if mine:
                self.packs[pack] = mine
        if self.packs:
            log.info("%s of an earlier launch still in the queue", counted(len(self.packs), "pack"))
        queued = {folder for folders in self.packs.values() for folder in folders}
        self._submit(packed([job for folder, job in missing.items() if folder not in queued], most))
        log.info("%s: %d finished, %d in %s", counted(len(self.jobs), "job"), len(self.jobs) - len(missing),
                 len(missing), counted(len(self.packs), "pack"))  # fmt: skip

    def _submit(self, packs: list[Pack]) -> None:
        for start in range(0, len(packs), self.scheduler.max_packs_per_submission):
            some = packs[start : start + self.scheduler.max_packs_per_submission]
            for pack in some:
                for folder, config in pack.configs.items():
                    run_folder.queue(Path(folder), config, self.scheduler.survives_launcher)
            try:
                self.packs |= {name: pack.folders for name, pack in self.scheduler.submit(some).items()}
            except UserError as error:
                for folder in (folder for pack in packs[start:] for folder in pack.folders):
                    run_status.write_state(folder, RunState.FAILED, str(error))
                if not self.packs:
                    raise
                log.error("%s; %s already in the queue", error, counted(len(self.packs), "pack"))
                return

    def watch(self) -> None:
        """Follow the packs until none is left."""
        with Watcher() as watcher:
            while True:
                places, again = self.scheduler.poll(), []
                for pack in list(self.packs):
                    statuses = [run_status.read(folder) for folder in self.packs[pack]]
                    if all(status.has_ended for status in statuses):
                        del self.packs[pack]
                    elif places is not None:
                        place = places.get(pack, NOT_SEEN)
                        again += self._recover(pack, place) if self._is_over(pack, place) else []
                self._submit(again)
                self.last = self.last if places is None else places
                submitted = PackState("SUBMITTED", "", False, "")
                watcher.show({pack: (of, self.last.get(pack, submitted)) for pack, of in self.packs.items()})
                if not self.packs:
                    return
                time.sleep(LOOK_SECONDS)

    def _is_over(self, pack: str, place: PackState) -> bool:
        """True if a pack is over, twice in a row: SLURM may report so just before it requeues a job."""
        before = pack in self.over
        if place.is_over:
            self.over.add(pack)
        else:
            self.over.discard(pack)
        return place.is_over and before

    def _recover(self, pack: str, place: PackState) -> list[Pack]:
        """Packs with the jobs of a dead process: one for the job that was running, and one for the others."""
        statuses = {folder: run_status.read(folder) for folder in self.packs.pop(pack)}
        left = {folder: status for folder, status in statuses.items() if not status.has_ended}
        reason = self._reason(pack, place)
        if place.state == "CANCELLED":
            for folder in left:
                run_status.write_state(
                    folder, RunState.FAILED, "cancelled, not by this launcher; the same command runs it again"
                )
            return []
        culprits = [folder for folder, status in left.items() if status.state in NOT_ENDED_BY_ITSELF]
        if not culprits and all(status.state != RunState.INTERRUPTED for status in left.values()):
            culprits = list(left)  # it died before any job began: is the environment of the nodes right?
        for folder in culprits:
            further = progress.batches_done(folder) > self.reached.get(folder, 0)
            self.reached[folder] = progress.batches_done(folder)
            self.deaths[folder] += not (further or place.state in NOBODYS_FAULT)
        gone = [folder for folder in culprits if self.deaths[folder] >= self.max_attempts]
        for folder in gone:
            died = left[folder].reason if left[folder].state == RunState.DIED else reason
            run_status.write_state(folder, RunState.FAILED, f"its process died {self.deaths[folder]} times: {died}")
            log.error("failed: %s: %s", folder.name, run_status.read(folder).reason)
        alone = [packed([self.jobs[folder]], 1)[0] for folder in culprits if folder not in gone]
        others = packed([self.jobs[folder] for folder in left if folder not in culprits], None)
        if alone or others:
            log.warning("%s ended (%s); its unfinished jobs are submitted again", pack, reason)
        return others + alone

    def _reason(self, pack: str, place: PackState) -> str:
        """Why a pack ended. The state says little: SLURM reports FAILED if the kernel kills a process for memory."""
        try:
            lines = self.scheduler.log_of(pack).read_text(errors="replace").splitlines()[-30:]
        except OSError:
            lines = []
        said = [line.strip() for line in lines if line.strip()]
        found = f"{place.state} {place.reason}".strip() + (f", {place.node}" if place.node else "")
        if place.state == "OUT_OF_MEMORY" or (
            place.state == "FAILED" and MEMORY.search(" ".join([place.reason, *said]))
        ):
            found += ", probably for lack of memory (hydra.launcher.mem, batch_tokens)"
        return found + (
            f"; the last line of its output: {said[-1][:200]}"
            if said
            else f"; no output in {self.scheduler.log_of(pack)}"
        )
