"""Runs packs on a SLURM cluster: submitit submits them; squeue and scontrol, which need no accounting, track them."""

from __future__ import annotations

import functools
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

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass as validated
from typing_extensions import NotRequired, TypedDict

from ablation_sweeps.base import files
from ablation_sweeps.base.errors import UserError
from ablation_sweeps.dispatch.packs import Pack
from ablation_sweeps.dispatch.scheduler import PackState

log = logging.getLogger(__name__)


POLL_SECONDS = 10.0  # minimum time between two calls of squeue, whatever the number of jobs
TRIES = 6  # calls of squeue and scontrol before a launch gives up, rather than submit again what runs already
FINISHED_STATES = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "PREEMPTED", "RECONFIG_FAIL", "REVOKED", "TIMEOUT",
)  # fmt: skip
GONE = PackState("GONE", "", True, "it left the queue, and SLURM no longer knows it")
NOT_SEEN = PackState("UNKNOWN", "", False, "")
USUAL_ARRAY = 1000  # tasks, if scontrol does not give the site's limit
TOO_MANY = re.compile(r"Submit(Job|Limit)|job submit limit|array|MaxJob|temporarily unable", re.IGNORECASE)

# Variables of the user that SLURM's commands need to find the cluster. Others filter and format the output of squeue.
FINDS_CLUSTER = ("SLURM_CONF", "SLURM_JWT")
COMMANDS = ("SLURM_", "SLURMD_", "SRUN_", "SALLOC_", "SBATCH_", "SQUEUE_", "SINFO_", "SCANCEL_", "SCONTROL_")

# sbatch prefers a variable SBATCH_NAME to the job script. These are ours to set, whatever the user's environment has.
OURS = ("ARRAY_INX", "CLUSTERS", "ERROR", "EXPORT", "EXPORT_FILE", "GET_USER_ENV", "INPUT", "JOB_NAME", "NODES",
        "NO_REQUEUE", "NTASKS", "OPEN_MODE", "OUTPUT", "REQUEUE", "SIGNAL", "WAIT")  # fmt: skip
SET_BY = {
    "time": ("TIMELIMIT",),
    "mem": ("MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU"),
    "gres": ("GRES", "GPUS", "GPUS_PER_NODE", "GPUS_PER_SOCKET", "GPUS_PER_TASK"),
}
SET_BY |= {key: SET_BY["mem"] for key in ("mem_per_cpu", "mem_per_gpu")}
SET_BY |= {key: SET_BY["gres"] for key in ("gpus", "gpus_per_node", "gpus_per_socket", "gpus_per_task")}
Count = Annotated[int, Field(ge=1)]
PLAIN = ("partition", "account", "qos", "gres", "cpus_per_task", "mem", "time", "constraint", "exclude")
# Options of sbatch that the launcher sets, or that would change how it follows packs.
FIXED = ("array", "error", "input", "job_name", "no_requeue", "nodes", "ntasks", "ntasks_per_node", "open_mode",
         "output", "parsable", "quiet", "requeue", "signal", "test_only", "wait", "wrap")  # fmt: skip


class Array(TypedDict):
    """Content of a file in .dispatch: the record of one submission.

    Attributes:
        packs: run folders of the jobs in each pack.
        logs: folder with the output.
        job: SLURM's id of the array; absent if the launcher was killed before it knew that.
        cancelled: indices of cancelled packs.
    """

    packs: list[list[str]]
    logs: NotRequired[str]
    job: NotRequired[str]
    cancelled: NotRequired[list[int]]


def minutes(time: object) -> object:
    """Whole minutes, rounded up, of a time in SLURM's notation: minutes, minutes:seconds, hours:minutes:seconds,
    days-hours, days-hours:minutes or days-hours:minutes:seconds."""
    if not isinstance(time, str):
        return time
    match = re.fullmatch(r"(?:(\d{1,6})-)?(\d{1,9})(?::(\d{1,9}))?(?::(\d{1,9}))?", time.strip())
    if not match:
        raise ValueError("must be minutes, hours:minutes:seconds or days-hours:minutes:seconds")
    days, first, second, third = (int(part or 0) for part in match.groups())
    if match[1] is None and match[4] is None:  # minutes:seconds
        seconds = first * 60 + second
    else:
        seconds = days * 86400 + first * 3600 + second * 60 + third
    return -(-seconds // 60)


def further_options(sbatch: dict[str, Any]) -> dict[str, Any]:
    """Check options of sbatch, which would silently replace those that the launcher passes itself."""
    for key in sbatch:
        name = key.replace("-", "_")
        if name in PLAIN:
            raise ValueError(f"write hydra.launcher.{name} instead of hydra.launcher.sbatch.{key}")
        if name in FIXED:
            raise ValueError(f"{key} is set by the launcher; leave hydra.launcher.sbatch.{key} out")
    return sbatch


@validated(frozen=True, config=ConfigDict(extra="forbid", coerce_numbers_to_str=True))
class Slurm:
    """Options of conf/hydra/launcher/slurm.yaml, which explains each one."""

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
    sbatch: Annotated[dict[str, Any], AfterValidator(further_options)]
    folder: str

    @property
    def max_concurrent_packs(self) -> int:
        """Number of packs that run at the same time."""
        return self.max_parallel

    def queue(self, sweep: Path) -> SlurmScheduler:
        return SlurmScheduler(self, sweep)


@dataclass
class SlurmScheduler:
    """The packs of one sweep. A pack's name consists of the name of its array and its index in that."""

    survives_launcher: ClassVar[bool] = True

    options: Slurm
    sweep: Path

    def __post_init__(self) -> None:
        digest = hashlib.sha256(str(self.sweep).encode()).hexdigest()[:8]
        self.name = f"{re.sub(r'[^A-Za-z0-9._-]+', '_', self.sweep.name)}-{digest}"
        self.private = private(Path(self.options.folder).expanduser().absolute() / self.name)
        self.records = self.sweep / ".dispatch"
        found = self.records.glob(f"{glob.escape(self.name)}-*.json")
        read = {file.stem: files.read_json(file, Array) for file in found if re.search(r"-\d+$", file.stem)}
        self.arrays = {name: array for name, array in read.items() if array is not None}
        self.damaged = read.keys() - self.arrays.keys()
        self.known: dict[str, PackState] = {}
        self.asked = float("-inf")

    @functools.cached_property
    def max_packs_per_submission(self) -> int:
        """Maximum number of packs in one submission: the tasks that the site allows in an array."""
        answer = _command("scontrol", "show", "config")
        match = re.search(r"^MaxArraySize\s*=\s*(\d+)", answer.stdout, re.MULTILINE)
        return max(1, int(match[1])) if match else USUAL_ARRAY

    def submit(self, packs: list[Pack]) -> dict[str, Pack]:
        """Submit packs as one array. They are recorded on disk first, so a launcher that is killed forgets nothing."""
        import submitit
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        names = (*self.arrays, *self.damaged)
        name = f"{self.name}-{1 + max((int(name.rpartition('-')[2]) for name in names), default=0)}"
        record: Array = {"packs": [list(pack.configs) for pack in packs], "logs": str(self.private)}
        files.write_json(self.records / f"{name}.json", record)
        delay = min(10.0, len(packs) / 20)
        try:
            with self._environment():
                executor = submitit.SlurmExecutor(
                    self.private, max_num_timeout=10**6
                )  # packs without progress end themselves
                executor.update_parameters(**self._parameters(name))
                submissions = [Pack(pack.configs, delay) for pack in packs]
                jobs = executor.submit_array(submissions)
        except RuntimeError as error:
            (self.records / f"{name}.json").unlink()
            if isinstance(error, FailedJobError | FailedSubmissionError):
                said = " ".join(dict.fromkeys(str(error).splitlines()))  # sbatch tries again, with the same message
                if TOO_MANY.search(said):
                    said += "; raise hydra.launcher.max_jobs_per_pack, which makes fewer and larger packs"
                raise UserError(f"hydra.launcher: sbatch refuses: {said}") from error
            raise UserError(
                "hydra/launcher=slurm: srun is not installed here; type the command on a machine of the cluster, or "
                "choose hydra/launcher=local"
            ) from error
        except KeyboardInterrupt:  # SLURM may have it already
            _command("scancel", "--quiet", f"--name={name}")
            raise
        record["job"] = jobs[0].job_id.partition("_")[0]
        files.write_json(self.records / f"{name}.json", record)
        self.arrays[name] = record
        self.asked = time.monotonic() - POLL_SECONDS + 2  # soon, but not before SLURM lists it
        return {f"{name}.{index}": pack for index, pack in enumerate(packs)}

    def _parameters(self, name: str) -> dict[str, Any]:
        o = self.options
        given = {key: getattr(o, key) for key in PLAIN if getattr(o, key) is not None}
        return {**given, "job_name": name, "array_parallelism": o.max_parallel, "setup": o.setup or None,
                "additional_parameters": {"requeue": True, **o.sbatch}}  # fmt: skip

    @contextmanager
    def _environment(self) -> Iterator[None]:
        """Context manager: the environment for sbatch.

        The launcher may itself run in a job, whose size would be taken for that of the packs, so its variables are
        removed. The user's own defaults for sbatch are kept, except for those that an option sets.
        """
        from submitit.helpers import clean_env

        o = self.options
        options = {key: getattr(o, key) for key in PLAIN if getattr(o, key) is not None} | o.sbatch
        taken = {f"SBATCH_{name}": "" for name in OURS}
        for key in options:
            for name in SET_BY.get(key.replace("-", "_"), (key.replace("-", "_").upper(),)):
                taken[f"SBATCH_{name}"] = f"hydra.launcher.{'sbatch.' * (key in o.sbatch)}{key}"
        found = {key: value for key, value in os.environ.items() if key.startswith("SBATCH_")}
        if "SLURM_JOB_ID" in os.environ:  # from the job in which the launcher runs
            found = {key: value for key, value in found.items() if not key.startswith(("SBATCH_CPU_B", "SBATCH_MEM_B"))}
        for key in found:
            if taken.get(key):
                log.info("%s=%s is overridden by %s", key, found[key], taken[key])
        kept = {key: value for key, value in found.items() if key not in taken}
        kept |= {key: os.environ[key] for key in FINDS_CLUSTER if key in os.environ}
        with clean_env():
            before = dict(os.environ)
            os.environ.update(kept)
            try:
                yield
            finally:
                for key in kept.keys() - before.keys():
                    del os.environ[key]

    def live_packs(self) -> dict[str, list[str]]:
        """Names of the packs of earlier launches that are queued or running, with the run folders of their jobs."""
        if not self.arrays and not self.damaged:
            return {}
        if not any(self._ask() for _ in range(TRIES)):
            raise UserError(
                "hydra/launcher=slurm: squeue does not answer, so it is not known what runs already, and nothing is "
                "submitted; type the same command when it does"
            )
        live = {pack for pack, place in self.known.items() if not place.is_over}
        live -= {f"{name}.{i}" for name, record in self.arrays.items() for i in record.get("cancelled", [])}
        return {
            f"{name}.{index}": folders
            for name, record in self.arrays.items()
            for index, folders in enumerate(record.get("packs", []))
            if f"{name}.{index}" in live
        }

    def poll(self) -> dict[str, PackState] | None:
        """State of each pack; None while it is too early to ask again, or if SLURM does not answer."""
        if time.monotonic() - self.asked < POLL_SECONDS:
            return None
        return self.known if self._ask() else None

    def _ask(self) -> bool:
        """Update the states with one call of squeue for all packs; True if SLURM has answered.

        A pack that is missing from the answer may be hidden by a filter or a partition, so scontrol is asked for its
        array by id: a pack is only over if SLURM says so.
        """
        time.sleep(max(0.0, self.asked + POLL_SECONDS - time.monotonic()))
        answer = _command("squeue", "--noheader", "--all", "--array", "--states=all", f"--user={os.getuid()}",
                          "--format=%j|%K|%T|%N|%F|%r")  # fmt: skip
        self.asked = time.monotonic()
        if answer.returncode != 0:
            log.warning("squeue does not answer (%s); trying again", answer.stderr.strip())
            return False
        found: dict[str, PackState] = {}
        for line in answer.stdout.splitlines():
            name, index, state, node, job, reason = (line.split("|", 5) + [""] * 5)[:6]
            if name in self.damaged and state not in FINISHED_STATES:
                file = self.records / f"{name}.json"
                raise UserError(
                    f"{file}: is damaged, so it is not known which jobs run in it; type scancel --name={name}, and "
                    "then the same command"
                )
            if name in self.arrays:
                index = index if index.isdigit() else "0"
                waits = reason if state == "PENDING" and reason not in ("None", "Priority", "Resources") else ""
                found[f"{name}.{index}"] = PackState(state, node, state in FINISHED_STATES, waits)
                self.arrays[name].setdefault("job", job)  # in case the launcher was killed before it was recorded
        missing: dict[str, list[str]] = {}
        for name, array in self.arrays.items():
            packs = [f"{name}.{index}" for index in range(len(array["packs"]))]
            lost = [p for p in packs if p not in found and not (p in self.known and self.known[p].is_over)]
            missing |= {name: lost} if lost else {}
        for name, packs in missing.items():
            if (shown := self._show(name)) is None:
                return False
            found |= {pack: shown.get(pack, GONE) for pack in packs}
        self.known |= found
        return True

    def _show(self, name: str) -> dict[str, PackState] | None:
        """States of the packs of an array that SLURM knows by id; None if scontrol does not answer."""
        array = self.arrays[name]
        if "job" not in array:  # the launcher was killed before SLURM had it
            return {}
        answer = _command("scontrol", "--all", "--oneliner", "show", "job", array["job"])
        if answer.returncode != 0 and "Invalid job id" not in answer.stderr + answer.stdout:
            log.warning("scontrol does not answer (%s); trying again", answer.stderr.strip())
            return None
        found, cut_off = {}, False
        for line in answer.stdout.splitlines():
            told = dict(re.findall(r"(?<!\S)(JobName|JobState|ArrayTaskId|NodeList)=(\S+)", line))
            state, node = told.get("JobState", ""), told.get("NodeList", "").replace("(null)", "")
            tasks = told.get("ArrayTaskId", "0") if told.get("JobName") == name else ""
            cut_off |= _is_cut_off(tasks)
            for index in _indices(tasks):
                found[f"{name}.{index}"] = PackState(state, node, state in FINISHED_STATES, "")
        if cut_off:  # packs that are not listed may be in the rest
            found = {f"{name}.{i}": NOT_SEEN for i in range(len(array["packs"]))} | found
        return found

    def cancel(self, packs: list[str]) -> None:
        """Cancel exactly these packs: an array may hold others, of an earlier launch, that are not awaited here."""
        if not packs:
            return
        for pack in packs:  # recorded, since packs may take minutes to end, and a later launch must not wait for them
            name, _, index = pack.rpartition(".")
            self.arrays[name].setdefault("cancelled", []).append(int(index))
        for name in {pack.rpartition(".")[0] for pack in packs}:
            files.write_json(self.records / f"{name}.json", self.arrays[name])
        answer = _command("scancel", "--quiet", *map(self._id, packs))
        if answer.returncode:
            log.error("scancel failed (%s); type it yourself: %s", answer.stderr.strip(), " ".join(answer.args))

    def log_of(self, pack: str) -> Path:
        return self.private / f"{self._id(pack)}_0_log.err"

    def _id(self, pack: str) -> str:
        """SLURM's id of a pack; a single pack is not an array."""
        name, _, index = pack.rpartition(".")
        record = self.arrays[name]
        return f"{record.get('job')}_{index}" if len(record["packs"]) > 1 else str(record.get("job"))


def _command(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of SLURM without the user's variables that filter and format its output."""
    environment = {key: value for key, value in os.environ.items()
                   if key in FINDS_CLUSTER or not key.startswith(COMMANDS)}  # fmt: skip
    environment["SLURM_BITSTR_LEN"] = "0"  # otherwise scontrol cuts lists of tasks at 64 characters
    try:
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def _is_cut_off(tasks: str) -> bool:
    """True if scontrol has cut off a list of tasks."""
    return tasks.partition("%")[0].endswith("...")


def _indices(tasks: str) -> list[int]:
    """Indices of the tasks in scontrol's notation: 3, 0-4%2 or 1,3-7:2."""
    found: list[int] = []
    listed = tasks.partition("%")[0]
    if _is_cut_off(tasks):  # maybe inside a number
        listed = listed.removesuffix("...").rpartition(",")[0]
    for part in listed.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?(?::(\d+))?", part)
        if match:
            first, last, step = match.groups()
            found += range(int(first), int(last or first) + 1, int(step or 1))
    return found


def private(folder: Path) -> Path:
    """Create a folder if it is missing, and check that nobody else can write to it: submitit unpickles files from it.

    Raises:
        UserError: others may write to it, or to a folder above it.
    """
    old = os.umask(0o077)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    finally:
        os.umask(old)
    for path in (folder.resolve(), *folder.resolve().parents):
        if others_may_write(path):
            raise UserError(
                f"hydra.launcher.folder={folder.parent}: others may write to {path}, and so could run code as you; "
                "choose a folder of your own that all nodes see"
            )
    return folder


def others_may_write(path: Path) -> bool:
    """True if others may write to a path, or own it. A folder where nobody may touch others' files (/tmp) is safe."""
    status = path.stat()
    writable = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX
    return bool(writable) or status.st_uid not in (0, os.getuid())
