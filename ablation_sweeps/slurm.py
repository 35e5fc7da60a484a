"""Packs on a SLURM cluster: submitted by submitit, watched by squeue, which needs no accounting."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import re
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass as validated

from ablation_sweeps import files
from ablation_sweeps.data import UserError
from ablation_sweeps.packs import Pack
from ablation_sweeps.queue import Place

log = logging.getLogger(__name__)

POLL_SECONDS = 10.0  # at least, between two calls of squeue, whatever the number of jobs
TRIES = 6  # of squeue, before a launch gives up: without its answer, what runs already would be submitted again
OVER = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
        "PREEMPTED", "RECONFIG_FAIL", "REVOKED", "TIMEOUT")  # fmt: skip
Count = Annotated[int, Field(ge=1)]


def minutes(time: object) -> object:
    """Whole minutes of a time as SLURM writes it, rounded up: minutes, minutes:seconds, hours:minutes:seconds,
    days-hours, days-hours:minutes or days-hours:minutes:seconds."""
    if not isinstance(time, str):
        return time
    match = re.fullmatch(r"(?:(\d{1,6})-)?(\d{1,9})(?::(\d{1,9}))?(?::(\d{1,9}))?", time.strip())
    if not match:
        raise ValueError("must be minutes, hours:minutes:seconds or days-hours:minutes:seconds")
    days, first, second, third = (int(part) if part else None for part in match.groups())
    if days is None and third is None:  # minutes:seconds
        seconds = first * 60 + (second or 0)
    else:
        seconds = (days or 0) * 86400 + first * 3600 + (second or 0) * 60 + (third or 0)
    return -(-seconds // 60)


@validated(frozen=True, config=ConfigDict(extra="forbid", coerce_numbers_to_str=True))
class Slurm:
    """Options of conf/hydra/launcher/slurm.yaml, which says what each one means."""

    max_jobs_per_pack: Count | None
    max_parallel: Count
    max_attempts: Count
    wait: bool
    partition: str | None
    account: str | None
    qos: str | None
    gres: str | None
    cpus_per_task: Count | None
    mem: str | None
    time: Annotated[Count, BeforeValidator(minutes)]
    constraint: str | None
    exclude: str | None
    setup: list[str]
    sbatch: dict[str, Any]
    folder: str

    @property
    def at_once(self) -> int:
        """Packs."""
        return self.max_parallel

    def queue(self, sweep: Path) -> SlurmQueue:
        return SlurmQueue(self, sweep)


@dataclass
class SlurmQueue:
    """The packs of one sweep, each under the name of its array and its number in it."""

    lasts: ClassVar[bool] = True

    options: Slurm
    sweep: Path

    def __post_init__(self) -> None:
        digest = hashlib.sha256(str(self.sweep).encode()).hexdigest()[:8]
        self.name = f"{re.sub(r'[^A-Za-z0-9._-]+', '_', self.sweep.name)}-{digest}"
        self.private = private(Path(self.options.folder).expanduser().absolute() / self.name)
        self.records = self.sweep / ".dispatch"
        self.arrays = {
            file.stem: files.read_json(file, dict) or {}
            for file in self.records.glob(f"{glob.escape(self.name)}-*.json")
        }
        self.known: dict[str, Place] = {}
        self.asked = float("-inf")

    def submit(self, packs: list[Pack]) -> dict[str, Pack]:
        """One array. What it holds is on disk before SLURM knows of it: a launcher that is killed forgets nothing."""
        import submitit
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        number = 1 + max((int(name.rpartition("-")[2]) for name in self.arrays), default=0)
        name = f"{self.name}-{number}"
        record: dict[str, Any] = {"packs": [list(pack.configs) for pack in packs], "logs": str(self.private)}
        files.write_json(self.records / f"{name}.json", record)
        delay = min(10.0, len(packs) / 20)
        try:
            with _outside_of_a_job():
                executor = submitit.SlurmExecutor(
                    self.private, max_num_timeout=10**6
                )  # a pack that gets nowhere gives up
                executor.update_parameters(**self._parameters(name))
                submissions = [Pack(pack.configs, delay) for pack in packs]
                jobs = executor.submit_array(submissions)
        except RuntimeError as error:
            (self.records / f"{name}.json").unlink()
            if isinstance(error, FailedJobError | FailedSubmissionError):
                said = " ".join(dict.fromkeys(str(error).splitlines()))  # sbatch tries again, and says the same
                raise UserError(f"hydra.launcher: sbatch refuses: {said}") from error
            raise UserError(
                "hydra/launcher=slurm: there is no srun here; type the command on a machine of the cluster, or take "
                "hydra/launcher=local"
            ) from error
        record["job"] = jobs[0].job_id.partition("_")[0]
        files.write_json(self.records / f"{name}.json", record)
        self.arrays[name] = record
        self.asked = time.monotonic() - POLL_SECONDS + 2  # soon, but not before SLURM has seen to it
        return {f"{name}.{index}": pack for index, pack in enumerate(packs)}

    def _parameters(self, name: str) -> dict[str, Any]:
        o = self.options
        plain = ("partition", "account", "qos", "gres", "cpus_per_task", "mem", "time", "constraint", "exclude")
        given = {key: getattr(o, key) for key in plain if getattr(o, key) is not None}
        return {**given, "job_name": name, "array_parallelism": o.max_parallel, "setup": o.setup or None,
                "additional_parameters": {"requeue": True, **o.sbatch}}  # fmt: skip

    def earlier(self) -> dict[str, list[str]]:
        """The packs of earlier launches that still wait or run, and the folders of their jobs."""
        if not self.arrays:
            return {}
        if not any(self._ask() for _ in range(TRIES)):
            raise UserError(
                "hydra/launcher=slurm: squeue does not answer, so it is not known what runs already, and nothing is "
                "submitted; type the same command when it does"
            )
        live = {pack for pack, place in self.known.items() if not place.over}
        live -= {f"{name}.{i}" for name, record in self.arrays.items() for i in record.get("cancelled", [])}
        return {
            f"{name}.{index}": folders
            for name, record in self.arrays.items()
            for index, folders in enumerate(record.get("packs", []))
            if f"{name}.{index}" in live
        }

    def places(self) -> dict[str, Place] | None:
        """Where each pack is; None while it is too early to ask again, or nobody answers."""
        if time.monotonic() - self.asked < POLL_SECONDS:
            return None
        return self.known if self._ask() else None

    def _ask(self) -> bool:
        time.sleep(max(0.0, self.asked + POLL_SECONDS - time.monotonic()))
        command = ["squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}",
                   "--format=%j|%K|%T|%N|%F|%r"]  # fmt: skip
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            answer = subprocess.CompletedProcess(command, 1, "", str(error))
        self.asked = time.monotonic()
        if answer.returncode != 0:
            log.warning("squeue does not answer (%s); it is asked again", answer.stderr.strip())
            return False
        self.known = {}
        for line in answer.stdout.splitlines():
            name, index, state, node, job, reason = line.split("|", 5)
            if name in self.arrays:
                index = index if index.isdigit() else "0"
                waits = reason if state == "PENDING" and reason not in ("None", "Priority", "Resources") else ""
                self.known[f"{name}.{index}"] = Place(state, node, state in OVER, waits)
                self.arrays[name].setdefault("job", job)  # where the launcher was killed before it wrote it down
        return True

    def cancel(self, packs: list[str]) -> None:
        """Exactly these: an array may hold packs of an earlier launch that nobody waits for here."""
        if not packs:
            return
        for pack in packs:  # it may take minutes to end: a launch that comes before that must not wait for it
            name, _, index = pack.rpartition(".")
            self.arrays[name].setdefault("cancelled", []).append(int(index))
        for name in {pack.rpartition(".")[0] for pack in packs}:
            files.write_json(self.records / f"{name}.json", self.arrays[name])
        command = ["scancel", "--quiet", *map(self._id, packs)]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if answer.returncode:
            log.error("scancel failed (%s); type it again: %s", answer.stderr.strip(), " ".join(command))

    def log_of(self, pack: str) -> Path:
        return self.private / f"{self._id(pack)}_0_log.err"

    def _id(self, pack: str) -> str:
        """SLURM's; a single pack is no array."""
        name, _, index = pack.rpartition(".")
        record = self.arrays[name]
        return f"{record.get('job')}_{index}" if len(record["packs"]) > 1 else str(record.get("job"))


@contextmanager
def _outside_of_a_job() -> Iterator[None]:
    """The launcher may itself run in a job, whose size would be taken for that of the packs."""
    from submitit.helpers import clean_env

    conf = os.environ.get("SLURM_CONF")
    with clean_env():
        if conf:  # it is no part of a job: it says where the cluster is
            os.environ["SLURM_CONF"] = conf
        yield


def private(folder: Path) -> Path:
    """Made where it is absent; what submitit unpickles lies in it, so nobody else may be able to put anything there."""
    old = os.umask(0o077)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    finally:
        os.umask(old)
    for path in (folder.resolve(), *folder.resolve().parents):
        if others_may_write(path):
            raise UserError(
                f"hydra.launcher.folder={folder.parent}: others may write to {path}, and so run code as you; name a "
                "folder of your own that all nodes see"
            )
    return folder


def others_may_write(path: Path) -> bool:
    """Or own it; a folder where everybody may write but nobody touch what is another's (/tmp) is none of these."""
    status = path.stat()
    writable = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX
    return bool(writable) or status.st_uid not in (0, os.getuid())
