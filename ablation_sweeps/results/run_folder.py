"""The folder of a run: config.yaml, environment.json, status.json, rows.parquet, documents.parquet, the log, and the
progress of an unfinished run."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from socket import gethostname
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict
from typing_extensions import NotRequired, TypedDict

from ablation_sweeps.base import files, hashing
from ablation_sweeps.base.environment import describe, peak_memory
from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.lazy import pd
from ablation_sweeps.base.terminal import counted, plain

log = logging.getLogger(__name__)


GOES_ON = "the same command goes on where it was"
WAITED = "stopped while it waited; the same command runs it"
TOGETHER = "together"  # how texts are passed to the model, unless environment.json says otherwise
CLOCKS = 5.0  # maximum difference in seconds between the clocks of files and of processes
FILES = ("config.yaml", "environment.json", "documents.parquet", "rows.parquet")  # of a finished run, besides status


def _is_time(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("a time without a zone")
    return text


Time = Annotated[str, AfterValidator(_is_time)]


class Status(TypedDict):
    """Content of status.json.

    Attributes:
        state: "new" and "damaged" are never written: the file does not exist, or its content cannot be true.
        host, pid: process that runs the job, or will run it; absent if a cluster decides that.
        ran: True if the job had begun before it was queued or stopped.
        batches: number of batches in the evaluation split.
        begun_at: number of batches that were done when the process began.
        sha256: checksums of the files of a finished run; for status.json, of the rest of its content.
        run: name of the folder in which the run finished.
    """

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    state: Literal["new", "queued", "running", "interrupted", "died", "failed", "finished", "damaged"]
    reason: NotRequired[str]
    time: NotRequired[Time]
    started: NotRequired[Time]
    host: NotRequired[str]
    pid: NotRequired[int]
    ran: NotRequired[bool]
    batches: NotRequired[int]
    begun_at: NotRequired[int]
    sha256: NotRequired[dict[str, str]]
    run: NotRequired[str]


class Environment(TypedDict, total=False):
    """Content of environment.json, as far as the program reads it.

    Attributes:
        notes: warnings for readers of the results.
        model_left_out: one line for each thing in the model's files that the model does not use.
        data_left_out: for each split, one sentence per reason why examples were left out.
        left_out: one of these two, in runs of earlier versions.
        texts: how texts were passed to the model: "apart" if those of different lengths were never in the same pass;
            absent if together.
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
    if (damage := damaged(folder)) is not None:
        log.warning("%s: %s; a launch computes it again", folder, damage)
        return False
    return status(folder)["state"] == "finished"


def damaged(folder: Path) -> str | None:
    """Description of the first file of a run that is missing or does not match its checksum; None if there is none.

    Files that are not part of a finished run may be absent, but status.json must be readable in any state.
    """
    found = status(folder)
    if found["state"] == "damaged":
        return found.get("reason")
    if found["state"] != "finished":
        return None
    sums = found.get("sha256", {})
    if "status.json" not in sums:
        return _damaged_earlier(folder, sums)
    for name in FILES:
        if name in sums and hashing.sha256_of(folder / name) != sums[name]:
            return _damage(folder / name)
    if _own_sum(found) != sums["status.json"]:
        return _damage(folder / "status.json")
    if found.get("run") != folder.name:
        return f"status.json is that of another run ({found.get('run')})"
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


def _own_sum(status: Status) -> str:
    """sha256 of a finished run's status.json, without this checksum."""
    others = {name: sha256 for name, sha256 in status.get("sha256", {}).items() if name != "status.json"}
    return hashlib.sha256(json.dumps({**status, "sha256": others}, sort_keys=True).encode()).hexdigest()


def _damage(file: Path) -> str:
    return f"{file.name} is {'damaged (truncated or altered)' if file.exists() else 'missing'}"


def result(folder: Path, name: str) -> pd.DataFrame | None:
    """A table of a finished run; None if the run is not finished or, with a warning, if one of its files is damaged."""
    return files.read_table(folder / name, status(folder).get("sha256", {}).get(name)) if _is_whole(folder) else None


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
    by = {} if survives_launcher else _process()
    files.write_json(folder / "status.json", {"state": "queued", "time": _now(), **_ran(folder), **by})


def mark_interrupted(folders: Iterable[Path], killed: bool = False) -> None:
    """Mark queued runs as interrupted.

    Args:
        killed: True if running ones were cancelled, too, and are to be marked. Otherwise they are left alone: they may
            be about to finish.
    """
    with suppress(OSError, UserError):  # a full disk may be the cause
        for folder in folders:
            found = status(folder)
            if found["state"] == "queued":
                write_status(folder, "interrupted", _why_stopped(folder, found))
            elif killed and found["state"] == "running":
                write_status(folder, "interrupted", f"cancelled while it ran; {GOES_ON}")


def _why_stopped(folder: Path, queued: Status) -> str:
    """Why a queued run will not be run. It was waiting, but may have run before."""
    if not queued.get("ran"):
        return WAITED
    done = counted(batches_done(folder), "batch", "es")
    return f"interrupted when it had run ({done} kept), then stopped while it waited to go on; {GOES_ON}"


def _ran(folder: Path) -> dict[str, bool]:
    """Entry of a new status: `ran` is True if the job was begun and not finished."""
    found = status(folder)
    began = found["state"] in ("running", "died") or found.get("ran") or batches_done(folder) > 0
    return {"ran": True} if began and found["state"] != "finished" else {}


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
    if batches_done(folder) and any(before[key] != now[key] for key in before):
        add_warning(folder, f"begun elsewhere ({counted(batches_done(folder), 'batch', 'es')}): {json.dumps(before)}")
    files.write_json(folder / "status.json", _running())


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
    if done := batches_done(folder):
        remove_progress(folder)
        add_warning(folder, f"texts are passed {passed or TOGETHER}, but were passed {before} in "
                     f"{counted(done, 'batch', 'es')} of an earlier launch, computed again")  # fmt: skip
    others = {key: value for key, value in environment(folder).items() if key != "texts"}
    files.write_json(folder / "environment.json", {**others, **({"texts": passed} if passed else {})})


def fail(folder: Path, error: BaseException) -> None:
    """Record that a job failed; or that it was interrupted, if the error is a signal, since it can then be resumed."""
    log.debug("the job stopped", exc_info=error)
    with suppress(OSError, UserError):  # a full disk may be the cause, but the first error counts
        if isinstance(error, Exception):
            write_status(folder, "failed", plain(error))
        else:
            write_status(folder, "interrupted", f"by a signal while it ran; {GOES_ON}")


def write_status(folder: Path, state: str, reason: str | None = None) -> None:
    """Write the state of a job: queued, running, interrupted, died (with its process), failed or finished."""
    why = {"reason": reason} if reason else {}
    files.write_json(folder / "status.json", {"state": state, **why, "time": _now(), **_ran(folder)})


def expect(folder: Path, batches: int) -> None:
    """Record how many batches there are, and how many are done already, so that progress can be shown."""
    found = status(folder)
    running: Status = found if found["state"] == "running" else _running()
    files.write_json(folder / "status.json", {**running, "batches": batches, "begun_at": batches_done(folder)})


def batches_done(folder: Path) -> int:
    """Number of batches of an unfinished run whose results are saved."""
    return len(_progress_files(folder))


def mark_published(folder: Path, place: str) -> None:
    """Record that W&B has the rows of this run, at `place`."""
    rows = status(folder).get("sha256", {}).get("rows.parquet")
    files.write_json(folder / "wandb.json", {"rows": rows, "place": place, "time": _now()})


def published(folder: Path, place: str) -> bool:
    """True if W&B has the present rows of this run, at `place`."""
    marked = files.read_json(folder / "wandb.json", Published) or {}
    rows = status(folder).get("sha256", {}).get("rows.parquet")
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


def status(folder: Path) -> Status:
    """Content of status.json; "damaged" if it cannot be read, or is missing beside results."""
    file = folder / "status.json"
    found = files.read_json(file, Status)
    if found is None and not file.exists() and not (folder / "rows.parquet").exists():
        return {"state": "new"}
    if found is None or found["state"] in ("new", "damaged") or ("host" in found) != ("pid" in found):
        return {"state": "damaged", "reason": _damage(file)}
    return found


def current_status(folder: Path) -> Status:
    """The status, corrected for what a killed process could not write, and for damaged files."""
    found = status(folder)
    if (damage := damaged(folder)) is not None:
        return {**found, "state": "damaged", "reason": f"{damage}; the same command computes it again"}
    pid, since = found.get("pid"), found.get("started") or found.get("time")
    if found.get("host") != gethostname() or pid is None or since is None or not _gone(pid, since):
        return found
    if found["state"] == "running" and files.is_locked(folder):  # by a process that is not visible in this container
        return found
    if found["state"] == "queued":
        return {**found, "state": "interrupted", "reason": _why_stopped(folder, found)}
    return {**found, "state": "died", "reason": f"its process is gone; {GOES_ON}"}


def is_held(folder: Path) -> bool:
    """True if a process on this machine runs the job, or will run it."""
    found = current_status(folder)
    return found["state"] in ("queued", "running") and found.get("host") == gethostname()


def _gone(pid: int, wrote: str) -> bool:
    """True if a process has ended.

    A process that began after the status was written is another one: process ids are reused, in a container even soon.
    """
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:  # killed, but still known to its parent
            return True
        return process.create_time() > datetime.fromisoformat(wrote).timestamp() + CLOCKS
    except psutil.NoSuchProcess:
        return True


def _running() -> Status:
    return {"state": "running", "started": _now(), "host": gethostname(), "pid": os.getpid()}


def _process() -> dict[str, object]:
    return {"host": gethostname(), "pid": os.getpid()}


def finish(folder: Path, rows: pd.DataFrame, documents: pd.DataFrame, seconds: float, like: str = "") -> None:
    """Write the results of a run. The status is written last, so a run counts as finished when all files are complete.

    Args:
        like: cost key: runs with the same one take about equally long.
    """
    tables = {"documents.parquet": documents, "rows.parquet": rows}
    sums = {name: files.write_table(folder / name, table) for name, table in tables.items()}
    update_environment(folder, **peak_memory(), seconds=round(seconds, 2), like=like)
    sums = {name: sha256 for name in FILES if (sha256 := hashing.sha256_of(folder / name))} | sums
    content: Status = {"state": "finished", "time": _now(), "run": folder.name, "sha256": sums}
    sums["status.json"] = _own_sum(content)
    files.write_json(folder / "status.json", content)
    remove_progress(folder)


def remove_progress(folder: Path) -> None:
    """Delete progress files, which a process leaves behind if it is killed just after the run has finished."""
    for file in _progress_files(folder):
        file.unlink(missing_ok=True)


def progress(folder: Path, names: Sequence[Sequence[str]] | None = None) -> list[pd.DataFrame]:
    """Saved metric sums of the batches of an interrupted run, up to the first gap.

    Args:
        names: names of the documents in each batch as it is now. From the first batch with other documents on (from an
            earlier version's data), all saved sums are discarded. None: not compared.
    """
    tables = []
    parts = _progress_files(folder)
    for number, file in enumerate(parts):
        table = _read_progress(file, number)
        if table is not None and names is not None and not _is_of(table, names[number : number + 1]):
            add_warning(
                folder, f"batches from the {number + 1}. on were of other documents before; they are computed again"
            )
            table = None
        if table is None:
            for useless in parts[number:]:
                useless.unlink()
            break
        tables.append(table)
    if tables:
        log.info("%s: continues after %s", folder.name, counted(len(tables), "batch", "es"))
    return tables


def _is_of(table: pd.DataFrame, batch: Sequence[Sequence[str]]) -> bool:
    """True if the sums are those of the documents in `batch`, a list of one batch or none."""
    clean = table.loc[table["fraction"] == 0, "name"]
    return [clean.tolist()] == [list(names) for names in batch]


def save_progress(folder: Path, number: int, table: pd.DataFrame) -> None:
    """Save the sums of batch `number` in a file whose name contains a checksum of its content, run and batch."""
    content, place = table.to_parquet(index=False), f"progress-{number:06d}"
    files.write_bytes(folder / f"{place}-{hashing.sha256_at(folder / place, content)[:16]}.parquet", content)


def _read_progress(file: Path, number: int) -> pd.DataFrame | None:
    """Sums of batch `number`; None if the file is from another batch or run or, with a warning, damaged."""
    place, _, sha256 = file.stem.rpartition("-")
    if place != f"progress-{number:06d}":
        return None
    content = file.read_bytes()
    if hashing.sha256_at(file.with_name(place), content).startswith(sha256):
        return pd.read_parquet(io.BytesIO(content))
    return files.read_table(file, sha256)  # from an earlier version: checksum of the content alone


def _progress_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("progress-*.parquet"))


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
