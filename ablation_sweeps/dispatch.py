"""Sends the packs of a sweep to where they run, sees to those whose process dies, and collects."""

from __future__ import annotations

import logging
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import TypedDict

from ablation_sweeps import files, store
from ablation_sweeps.config import from_dict
from ablation_sweeps.console import counted
from ablation_sweeps.data import UserError
from ablation_sweeps.launching import Failures, by_model, end_of_sweep
from ablation_sweeps.local import Local
from ablation_sweeps.packs import OVER, Pack, packed
from ablation_sweeps.queue import Place, Queue
from ablation_sweeps.slurm import Slurm, others_may_write
from ablation_sweeps.watching import Watcher

if TYPE_CHECKING:
    from ablation_sweeps.job import Job

log = logging.getLogger(__name__)

LAUNCHERS = {"Slurm": Slurm, "Local": Local}
HOW = "how.json"  # a sweep was launched last; `retry` reads it
LOOK_SECONDS = 2.0  # between two looks at the files of the jobs
UNKNOWN = Place("UNKNOWN", "", False, "")  # that it is over must be said by the queue
NOBODYS_FAULT = ("PREEMPTED", "BOOT_FAIL")
MEMORY = re.compile(r"oom.?kill|out of memory|OutOfMemory|\bKilled\b|SIGKILL|MemoryError", re.IGNORECASE)


def launch(options: Any, jobs: Sequence[Job]) -> None:
    """Runs what is not finished, and reports; or, with wait=false, only submits it."""
    sweep = jobs[0].folder.parent
    jobs = [jobs[i] for i in by_model(jobs)]
    with only_one(sweep):
        queue = options.queue(sweep)
        work = Work(queue, options.max_attempts, {job.folder: job for job in jobs})
        try:
            work.start(options.max_jobs_per_pack)
            how = {"launcher": type(options).__name__, "options": asdict(options), "folder": os.getcwd()}
            files.write_json(sweep / ".dispatch" / HOW, how)
            if not options.wait and work.packs:
                print(f"{counted(len(work.packs), 'pack')} in the queue; the same command later collects the results")
                return
            work.watch()
        except KeyboardInterrupt:
            log.warning("cancelling %s", counted(len(work.packs), "pack"))
            queue.cancel(list(work.packs))
            store.give_up(work.jobs, killed=queue.lasts)  # local packs have said themselves how they ended
            raise
    failures = Failures()
    for folder in work.jobs:
        if (status := store.status(folder))["state"] != "finished":
            failures.reasons.append(f"{folder.name}: {status.get('reason', status['state'])}")
    end_of_sweep(jobs, failures)


def retry(sweep: Path) -> None:
    """Runs what is not finished, in the way in which the sweep was last launched: nothing of that is to be typed again.

    Raises:
        UserError: what is left cannot be run again; or others may write to it.
    """
    runs = [run for run in store.runs(sweep) if not store.finished(run)]
    if not runs:
        print(f"{sweep}: nothing failed there, and nothing is missing")
        return
    for path in (sweep, sweep / ".dispatch", sweep / ".dispatch" / HOW, *runs, *(run / "config.yaml" for run in runs)):
        if path.exists() and others_may_write(path):
            raise UserError(f"{path}: others may write to it, and so run code as you; launch the sweep again instead")
    how = _how(sweep)
    launcher = LAUNCHERS[how["launcher"]]
    if Path(how["folder"]).is_dir():
        os.chdir(how["folder"])  # from where paths were given
    held = [run for run in runs if launcher is Local and store.is_held(run)]  # SLURM is asked
    if held:
        log.warning("%s left to the process that is at it, or will be", counted(len(held), "job"))
    jobs = [job for run in runs if run not in held and (job := _again(run))]
    if not jobs and held:
        return
    if not jobs:
        raise UserError(f"{sweep}: nothing there can be tried again; launch it with its options")
    launch(launcher(**how["options"]), jobs)


class How(TypedDict):
    """How a sweep was launched.

    Attributes:
        launcher: name of a class.
        options: its options.
        folder: where the command was typed.
    """

    launcher: Literal["Slurm", "Local"]
    options: dict[str, Any]
    folder: str


def _how(sweep: Path) -> How:
    """A sweep that ran without a launcher goes on in packs of this machine."""
    file = sweep / ".dispatch" / HOW
    if not file.exists():
        plain = {"max_jobs_per_pack": None, "max_parallel": None, "max_attempts": 2, "gpus": None}
        return {"launcher": "Local", "options": plain, "folder": "."}
    try:
        if (how := files.read_json(file, How)) is not None:
            LAUNCHERS[how["launcher"]](**how["options"])
            return how
    except (TypeError, ValueError):  # no such options
        pass
    raise UserError(f"{file}: is damaged, so that nothing tells how the sweep was launched; launch it with its options")


def _again(run: Path) -> Job | None:
    try:
        job = from_dict({**store.config(run), "results_dir": str(run.parents[1]), "sweep": run.parent.name})
        if job.folder == run:
            return job
        why = "its model, its data or this program were changed since it was launched"
    except UserError as error:
        why = str(error)
    log.warning("%s: left alone: %s", run.name, why)
    return None


@contextmanager
def only_one(sweep: Path) -> Iterator[None]:
    """Two launchers that submit the same jobs would be in each other's way."""
    from filelock import FileLock, Timeout

    (sweep / ".dispatch").mkdir(parents=True, exist_ok=True)
    lock = FileLock(sweep / ".dispatch" / "launch.lock")
    who = sweep / ".dispatch" / "launcher"
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        by = who.read_text(encoding="utf-8", errors="replace").strip() if who.exists() else "another process"
        raise UserError(
            f"sweep={sweep.name}: is being launched already, by {by}; wait for it, or name another sweep=NAME"
        ) from error
    try:
        files.write_text(who, f"process {os.getpid()} on {os.uname().nodename}\n")
        yield
    finally:
        lock.release()


@dataclass
class Work:
    """The jobs of a launch, and the packs that hold those which are not finished."""

    queue: Queue
    max_attempts: int
    jobs: dict[Path, Job]
    packs: dict[str, list[Path]] = field(default_factory=dict)
    deaths: Counter[Path] = field(default_factory=Counter)
    reached: dict[Path, int] = field(default_factory=dict)  # batches of each job when it was last submitted, or died
    over: set[str] = field(default_factory=set)  # of the packs: over when last asked
    last: dict[str, Place] = field(default_factory=dict)  # where they were then

    def start(self, most: int | None) -> None:
        earlier = self.queue.earlier()
        # Only now: what ended while the queue was asked is finished, and in no pack.
        missing = {folder: job for folder, job in self.jobs.items() if not store.finished(folder)}
        self.reached = {folder: store.batches_done(folder) for folder in missing}
        for pack, folders in earlier.items():
            mine = [Path(folder) for folder in folders if Path(folder) in missing]
            mine = [folder for folder in mine if store.status(folder)["state"] != "failed"]  # it is past these
            if mine:
                self.packs[pack] = mine
        if self.packs:
            log.info("%s of an earlier launch in the queue still", counted(len(self.packs), "pack"))
        queued = {folder for folders in self.packs.values() for folder in folders}
        self._submit(packed([job for folder, job in missing.items() if folder not in queued], most))
        log.info("%s: %d finished, %d in %s", counted(len(self.jobs), "job"), len(self.jobs) - len(missing),
                 len(missing), counted(len(self.packs), "pack"))  # fmt: skip

    def _submit(self, packs: list[Pack]) -> None:
        for start in range(0, len(packs), self.queue.most):
            some = packs[start : start + self.queue.most]
            for pack in some:
                for folder, config in pack.configs.items():
                    store.queue(Path(folder), config, self.queue.lasts)
            try:
                self.packs |= {name: pack.folders for name, pack in self.queue.submit(some).items()}
            except UserError as error:
                for folder in (folder for pack in packs[start:] for folder in pack.folders):
                    store.write_status(folder, "failed", str(error))
                if not self.packs:
                    raise
                log.error("%s; %s in the queue already", error, counted(len(self.packs), "pack"))
                return

    def watch(self) -> None:
        """Until nothing is left to wait for."""
        with Watcher() as watcher:
            while True:
                places, again = self.queue.places(), []
                for pack in list(self.packs):
                    states = [store.status(folder)["state"] for folder in self.packs[pack]]
                    if all(state in OVER for state in states):
                        del self.packs[pack]
                    elif places is not None:
                        place = places.get(pack, UNKNOWN)
                        again += self._left_by(pack, place) if self._is_over(pack, place) else []
                self._submit(again)
                self.last = self.last if places is None else places
                submitted = Place("SUBMITTED", "", False, "")
                watcher.show({pack: (of, self.last.get(pack, submitted)) for pack, of in self.packs.items()})
                if not self.packs:
                    return
                time.sleep(LOOK_SECONDS)

    def _is_over(self, pack: str, place: Place) -> bool:
        """SLURM may say that a job is over just before it puts it into the queue again: so it is asked twice."""
        before = pack in self.over
        (self.over.add if place.over else self.over.discard)(pack)
        return place.over and before

    def _left_by(self, pack: str, place: Place) -> list[Pack]:
        """What a dead process left: the job that it was at gets a pack of its own, the others go on without it."""
        left = {folder: store.status(folder)["state"] for folder in self.packs.pop(pack)}
        left = {folder: state for folder, state in left.items() if state not in OVER}
        reason = self._reason(pack, place)
        if place.state == "CANCELLED":
            for folder in left:
                store.write_status(folder, "failed", "cancelled, not by this launcher; the same command runs it again")
            return []
        culprits = [folder for folder, state in left.items() if state in ("running", "died", "damaged")]
        if not culprits and "interrupted" not in left.values():
            culprits = list(left)  # it died before it came to any: is the environment of the nodes the right one?
        for folder in culprits:
            further = store.batches_done(folder) > self.reached.get(folder, 0)
            self.reached[folder] = store.batches_done(folder)
            self.deaths[folder] += not (further or place.state in NOBODYS_FAULT)
        gone = [folder for folder in culprits if self.deaths[folder] >= self.max_attempts]
        for folder in gone:
            died = store.status(folder).get("reason") if left[folder] == "died" else reason
            store.write_status(folder, "failed", f"its process died {self.deaths[folder]} times: {died}")
            log.error("failed: %s: %s", folder.name, store.status(folder).get("reason"))
        alone = [packed([self.jobs[folder]], 1)[0] for folder in culprits if folder not in gone]
        others = packed([self.jobs[folder] for folder in left if folder not in culprits], None)
        if alone or others:
            log.warning("%s is over (%s); what it left is submitted again", pack, reason)
        return others + alone

    def _reason(self, pack: str, place: Place) -> str:
        """The state alone says little: SLURM calls it FAILED when the kernel kills a process for memory."""
        try:
            lines = self.queue.log_of(pack).read_text(errors="replace").splitlines()[-30:]
        except OSError:
            lines = []
        said = [line.strip() for line in lines if line.strip()]
        found = f"{place.state} {place.why}".strip() + (f", {place.node}" if place.node else "")
        if place.state == "OUT_OF_MEMORY" or (place.state == "FAILED" and MEMORY.search(" ".join([place.why, *said]))):
            found += ", probably for lack of memory (hydra.launcher.mem, batch_tokens)"
        return found + (f"; its last words: {said[-1][:200]}" if said else f"; no output in {self.queue.log_of(pack)}")
