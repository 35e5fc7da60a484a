"""The folder of a run: config.yaml, environment.json, status.json, rows.parquet, documents.parquet, the log, and the
progress of an unfinished run."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from socket import gethostname
from typing import Any

from pydantic import ConfigDict
from typing_extensions import TypedDict

from ablation_sweeps.base import files, hashing
from ablation_sweeps.base.environment import describe, peak_memory
from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.lazy import pd
from ablation_sweeps.base.terminal import counted, plain
from ablation_sweeps.results import progress, run_status
from ablation_sweeps.results.run_status import RunState, RunStatus

log = logging.getLogger(__name__)


GOES_ON = "the same command goes on where it was"
WAITED = "stopped while it waited; the same command runs it"
TOGETHER = "together"  # how texts are passed to the model, unless environment.json says otherwise
FILES = ("config.yaml", "environment.json", "documents.parquet", "rows.parquet")  # of a finished run, besides status


class Environment(TypedDict, total=False):
    """Content of environment.json, as far as the program reads it.

    Attributes:
        notes: warnings for readers of the results.
        model_left_out: one line for each thing in the model's files that the model does not use.
        data_left_out: for each split, one sentence per reason why examples were left out.
        left_out: one of these two, in runs of earlier versions.
        texts: how texts were passed to the model: "apart" if those of different lengths were never in the same pass;
            absent if together.
        certificate: what was proven of the model, one sentence per property: passed, failed, not_proven.
        statistics: name of the cache folder of the calibration statistics.
        seconds: duration of the run.
        like: cost key: runs with the same one take about equally long.
    """

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    code: str | None
    packages: dict[str, str | None] | None
    device: str | None
    threads: int | None
    notes: list[str]
    model_left_out: list[str]
    data_left_out: dict[str, list[str]]
    left_out: list[str] | dict[str, list[str]]
    texts: str
    certificate: dict[str, list[str]]
    statistics: str | None
    n_heads: int | None
    model_device: str | None
    seconds: float
    like: str | None


class Published(TypedDict, total=False):
    """Content of wandb.json: the sha256 of the rows that W&B has, and their place there."""

    rows: str | None
    place: str


class _RunLog(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Ignore a full disk: whoever writes results reports it, and once is enough."""


@contextmanager
def run_log(folder: Path) -> Iterator[None]:
    """Context manager: also write everything that is logged to the file `log` in the folder."""
    handler = _RunLog(folder / "log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        with suppress(OSError):  # the disk is still full
            handler.close()


def finished(folder: Path) -> bool:
    """True if the run has finished and its files match their checksums; otherwise a warning names the damaged file."""
    return _is_whole(folder) and (folder / "documents.parquet").exists()  # runs of the first version lack it


def _is_whole(folder: Path) -> bool:
    if (found := damaged(folder)) is not None:
        log.warning("%s: %s; a launch computes it again", folder, found)
        return False
    return run_status.read(folder).is_finished


def damaged(folder: Path) -> str | None:
    """Description of the first file of a run that is missing or does not match its checksum; None if there is none.

    Files that are not part of a finished run may be absent, but status.json must be readable in any state.
    """
    found = run_status.read(folder)
    if found.state == RunState.DAMAGED:
        return found.reason
    if not found.is_finished:
        return None
    sums = found.sha256
    if "status.json" not in sums:
        return _damaged_earlier(folder, sums)
    for name in FILES:
        if name in sums and hashing.sha256_of(folder / name) != sums[name]:
            return _damage(folder / name)
    if status_sum(files.read_json(folder / "status.json") or {}) != sums["status.json"]:
        return _damage(folder / "status.json")
    if found.run != folder.name:
        return f"status.json is that of another run ({found.run})"
    return None


def _damaged_earlier(folder: Path, sums: dict[str, str]) -> str | None:
    """The same for a run of an earlier version, which only has checksums of its tables."""
    if "rows.parquet" not in sums:
        return _damage(folder / "status.json")
    for name in sums:
        if hashing.sha256_of(folder / name) != sums[name]:
            return _damage(folder / name)
    if files.read_json(folder / "environment.json", Environment) is None:
        return _damage(folder / "environment.json")
    try:
        read = config(folder)
        labels = [str(read[part]["label"]) for part in ("model", "dataset", "method")]
        name = f"{'-'.join(labels)}-s{read['seed']}-".replace("/", "--")
    except (UserError, KeyError, TypeError):
        return _damage(folder / "config.yaml")
    return None if folder.name.startswith(name) else f"config.yaml is altered: its folder would be {name}..."


def _damage(file: Path) -> str:
    return f"{file.name} is {run_status.damage(file)}"


def status_sum(status: dict[str, Any]) -> str:
    """sha256 of the content of a finished run's status.json, without this checksum.

    It covers the file as it is: another version may have written more than `RunStatus` knows.
    """
    others = {name: sha256 for name, sha256 in status.get("sha256", {}).items() if name != "status.json"}
    return hashlib.sha256(json.dumps({**status, "sha256": others}, sort_keys=True).encode()).hexdigest()


def result(folder: Path, name: str) -> pd.DataFrame | None:
    """A table of a finished run; None if the run is not finished or, with a warning, if one of its files is damaged."""
    return files.read_table(folder / name, run_status.read(folder).sha256.get(name)) if _is_whole(folder) else None


def runs(sweep: Path) -> list[Path]:
    """Folders of all jobs in a sweep that were ever queued or started."""
    return sorted({path.parent for name in ("status.json", "rows.parquet") for path in sweep.glob(f"*/{name}")})


def config(folder: Path) -> dict:
    """The configuration of a run; empty if there is none.

    Raises:
        UserError: config.yaml is damaged.
    """
    import yaml

    file = folder / "config.yaml"
    if not file.is_file():
        return {}
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{file}: is damaged (truncated or altered); the command that launched it writes it again")
    return content


def queue(folder: Path, config: dict, survives_launcher: bool) -> None:
    """Record that a job is queued.

    Args:
        survives_launcher: True if the job will run even if this process ends.
    """
    _write_config(folder, config)
    queued = RunStatus(RunState.QUEUED, time=run_status.now(), ran=run_status.has_run(folder))
    if not survives_launcher:
        queued = replace(queued, host=gethostname(), pid=os.getpid())
    run_status.write(folder, queued)


def mark_interrupted(folders: Iterable[Path], killed: bool = False) -> None:
    """Mark queued runs as interrupted.

    Args:
        killed: True if running ones were cancelled, too, and are to be marked. Otherwise they are left alone: they may
            be about to finish.
    """
    with suppress(OSError, UserError):  # a full disk may be the cause
        for folder in folders:
            found = run_status.read(folder)
            if found.state == RunState.QUEUED:
                run_status.write_state(folder, RunState.INTERRUPTED, _why_stopped(folder, found))
            elif killed and found.state == RunState.RUNNING:
                run_status.write_state(folder, RunState.INTERRUPTED, f"cancelled while it ran; {GOES_ON}")


def _why_stopped(folder: Path, queued: RunStatus) -> str:
    """Why a queued run will not be run. It was waiting, but may have run before."""
    if not queued.ran:
        return WAITED
    done = counted(progress.batches_done(folder), "batch", "es")
    return f"interrupted when it had run ({done} kept), then stopped while it waited to go on; {GOES_ON}"


def _write_config(folder: Path, config: dict) -> None:
    import yaml

    files.write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def begin(folder: Path, config: dict) -> None:
    """Record that a job is running: write its configuration, environment and status."""
    _write_config(folder, config)
    earlier, now = environment(folder), describe()
    kept = {key: value for key, value in earlier.items() if key in ("notes", "texts")}
    files.write_json(folder / "environment.json", now | kept)
    before = {key: earlier.get(key) for key in ("code", "packages", "device", "threads")}
    if progress.batches_done(folder) and any(before[key] != now[key] for key in before):
        add_warning(
            folder, f"begun elsewhere ({counted(progress.batches_done(folder), 'batch', 'es')}): {json.dumps(before)}"
        )
    run_status.write(folder, run_status.running_here())


def add_warning(folder: Path, text: str, level: int = logging.WARNING) -> None:
    """Log a warning for readers of the results and record it for the report, only once if the run is resumed."""
    log.log(level, text)
    notes = environment(folder).get("notes", [])
    if text not in notes:
        update_environment(folder, notes=[*notes, text])


def left_out(folder: Path) -> list[str]:
    """Sentences on what a run did not use of the files of its model, and of its data."""
    found = environment(folder)
    earlier = found.get("left_out", [])
    of_model = [*found.get("model_left_out", []), *(earlier if isinstance(earlier, list) else [])]
    of_data = {**(earlier if isinstance(earlier, dict) else {}), **found.get("data_left_out", {})}
    return of_model + [f"of the {split} split, {said}" for split, sentences in of_data.items() for said in sentences]


def update_environment(folder: Path, **facts: object) -> None:
    """Add facts that were found during the run to environment.json."""
    files.write_json(folder / "environment.json", {**environment(folder), **facts})


def remember_texts(folder: Path, passed: str) -> None:
    """Record how texts are passed to the model, before the first pass.

    Batches for which they were passed in another way are discarded, and computed again.

    Args:
        passed: "apart" if texts of different lengths are never in the same pass, for instance; empty if together,
            as for most models.
    """
    before = texts_of(folder)
    if (passed or TOGETHER) == before:
        return
    if done := progress.batches_done(folder):
        progress.remove(folder)
        add_warning(folder, f"texts are passed {passed or TOGETHER}, but were passed {before} in "
                     f"{counted(done, 'batch', 'es')} of an earlier launch, computed again")  # fmt: skip
    others = {key: value for key, value in environment(folder).items() if key != "texts"}
    files.write_json(folder / "environment.json", {**others, **({"texts": passed} if passed else {})})


def fail(folder: Path, error: BaseException) -> None:
    """Record that a job failed; or that it was interrupted, if the error is a signal, since it can then be resumed."""
    log.debug("the job stopped", exc_info=error)
    with suppress(OSError, UserError):  # a full disk may be the cause, but the first error counts
        if isinstance(error, Exception):
            run_status.write_state(folder, RunState.FAILED, plain(error))
        else:
            run_status.write_state(folder, RunState.INTERRUPTED, f"by a signal while it ran; {GOES_ON}")


def mark_published(folder: Path, place: str) -> None:
    """Record that W&B has the rows of this run, at `place`."""
    rows = run_status.read(folder).sha256.get("rows.parquet")
    files.write_json(folder / "wandb.json", {"rows": rows, "place": place, "time": run_status.now()})


def published(folder: Path, place: str) -> bool:
    """True if W&B has the present rows of this run, at `place`."""
    marked = files.read_json(folder / "wandb.json", Published) or {}
    rows = run_status.read(folder).sha256.get("rows.parquet")
    return rows is not None and (marked.get("rows"), marked.get("place")) == (rows, place)


def texts_of(folder: Path) -> str:
    """How texts were passed to the model of a run, in words."""
    return environment(folder).get("texts", TOGETHER)


def statistics_of(folder: Path) -> Path | None:
    """Cache folder of the statistics that a run used, beside its sweep; None if it is gone."""
    name = environment(folder).get("statistics")
    cache = folder.parents[1] / ".cache" / str(name)
    return cache if name and cache.is_dir() else None


def environment(folder: Path) -> Environment:
    """Machine, versions and facts recorded for a run; empty if the file is missing or damaged."""
    return files.read_json(folder / "environment.json", Environment) or {}


def current_status(folder: Path) -> RunStatus:
    """The status, corrected for what a killed process could not write, and for damaged files."""
    found = run_status.read(folder)
    if (damage := damaged(folder)) is not None:
        return replace(found, state=RunState.DAMAGED, reason=f"{damage}; the same command computes it again")
    if not run_status.is_gone(found):
        return found
    if found.state == RunState.RUNNING and files.is_locked(folder):  # by a process not visible in this container
        return found
    if found.state == RunState.QUEUED:
        return replace(found, state=RunState.INTERRUPTED, reason=_why_stopped(folder, found))
    return replace(found, state=RunState.DIED, reason=f"its process is gone; {GOES_ON}")


def is_held(folder: Path) -> bool:
    """True if a process on this machine runs the job, or will run it."""
    found = current_status(folder)
    return found.state in (RunState.QUEUED, RunState.RUNNING) and found.host == gethostname()


def finish(folder: Path, rows: pd.DataFrame, documents: pd.DataFrame, seconds: float, like: str = "") -> None:
    """Write the results of a run. The status is written last, so a run counts as finished when all files are complete.

    Args:
        like: cost key: runs with the same one take about equally long.
    """
    tables = {"documents.parquet": documents, "rows.parquet": rows}
    sums = {name: files.write_table(folder / name, table) for name, table in tables.items()}
    update_environment(folder, **peak_memory(), seconds=round(seconds, 2), like=like)
    sums = {name: sha256 for name in FILES if (sha256 := hashing.sha256_of(folder / name))} | sums
    status = RunStatus(RunState.FINISHED, time=run_status.now(), run=folder.name, sha256=sums)
    sums["status.json"] = status_sum(status.to_dict())
    run_status.write(folder, status)
    progress.remove(folder)
