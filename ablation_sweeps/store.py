"""The folder of a run: config.yaml, environment.json, status.json, rows.parquet, documents.parquet, log; and progress,
while it runs."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from socket import gethostname

from ablation_sweeps import files
from ablation_sweeps.console import counted, plain
from ablation_sweeps.data import UserError
from ablation_sweeps.environment import describe, peak_memory
from ablation_sweeps.lazy import pd

log = logging.getLogger(__name__)

GOES_ON = "the same command goes on where it was"
WAITED = "stopped while it waited; the same command runs it"
CLOCKS = 5.0  # seconds by which the times of a file and of a process may differ


class _RunLog(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """The disk is full: whoever writes results will say so, and once is enough."""


@contextmanager
def run_log(folder: Path) -> Iterator[None]:
    """All that is logged meanwhile also goes to the folder's `log`."""
    handler = _RunLog(folder / "log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        with suppress(OSError):  # the disk is full, still
            handler.close()


def finished(folder: Path) -> bool:
    """And its tables are whole."""
    found = status(folder)
    sums = found.get("sha256", {})
    tables = ("rows.parquet", "documents.parquet")  # not parsed: jobs are many
    return found["state"] == "finished" and all(files.read_whole(folder / t, sums.get(t)) is not None for t in tables)


def result(folder: Path, name: str) -> pd.DataFrame | None:
    """A table of a finished run; None where it is not finished, or the table not whole."""
    found = status(folder)
    return files.read_table(folder / name, found.get("sha256", {}).get(name)) if found["state"] == "finished" else None


def runs(sweep: Path) -> list[Path]:
    """The folders of all jobs that were ever started or queued there."""
    return sorted(path.parent for path in sweep.glob("*/status.json"))


def config(folder: Path) -> dict:
    import yaml

    file = folder / "config.yaml"
    return yaml.safe_load(file.read_text()) if file.is_file() else {}


def queue(folder: Path, config: dict, lasts: bool) -> None:
    """Args:
    lasts: it will be run even if this process ends.
    """
    _write_config(folder, config)
    by = {} if lasts else _process()
    files.write_json(folder / "status.json", {"state": "queued", "time": _now(), **by})


def give_up(folders: Iterable[Path]) -> None:
    """Those that wait will not be run; one that runs may be about to finish."""
    with suppress(OSError, UserError):  # a full disk may be the reason for it
        for folder in folders:
            if status(folder)["state"] == "queued":
                write_status(folder, "interrupted", WAITED)


def _write_config(folder: Path, config: dict) -> None:
    import yaml

    files.write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def begin(folder: Path, config: dict) -> None:
    _write_config(folder, config)
    earlier, now = environment(folder), describe()
    notes = {"notes": earlier["notes"]} if "notes" in earlier else {}
    files.write_json(folder / "environment.json", now | notes)
    before = {key: earlier.get(key) for key in ("code", "packages", "device", "threads")}
    if batches_done(folder) and any(before[key] != now[key] for key in before):
        note(folder, f"begun elsewhere ({counted(batches_done(folder), 'batch', 'es')}): {json.dumps(before)}")
    files.write_json(folder / "status.json", {"state": "running", "started": _now(), **_process()})


def note(folder: Path, text: str, level: int = logging.WARNING) -> None:
    """Record what a reader of the numbers should know; the report shows it. A run that is resumed says it once."""
    log.log(level, text)
    notes = environment(folder).get("notes", [])
    if text not in notes:
        remember(folder, notes=[*notes, text])


def remember(folder: Path, **facts: object) -> None:
    """What was found out while it ran, for who reads the results."""
    files.write_json(folder / "environment.json", {**environment(folder), **facts})


def fail(folder: Path, error: BaseException) -> None:
    """A signal to stop is no failure: the job can go on where it was."""
    log.debug("the job stopped", exc_info=error)
    with suppress(OSError, UserError):  # a full disk may be the reason; it is the first error that counts
        if isinstance(error, KeyboardInterrupt):
            write_status(folder, "interrupted", f"by a signal; {GOES_ON}")
        else:
            write_status(folder, "failed" if isinstance(error, Exception) else "interrupted", plain(error))


def write_status(folder: Path, state: str, reason: str | None = None) -> None:
    """The truth about a job: queued, running, interrupted, died (with its process), failed or finished."""
    files.write_json(folder / "status.json", {"state": state, **({"reason": reason} if reason else {}), "time": _now()})


def expect(folder: Path, batches: int) -> None:
    """How many there are to do, for who watches it, and how many are done by now."""
    files.write_json(folder / "status.json", {**status(folder), "batches": batches, "begun_at": batches_done(folder)})


def batches_done(folder: Path) -> int:
    return len(_progress_files(folder))


def mark_published(folder: Path, place: str) -> None:
    """W&B has these rows, there."""
    rows = status(folder).get("sha256", {}).get("rows.parquet")
    files.write_json(folder / "wandb.json", {"rows": rows, "place": place, "time": _now()})


def published(folder: Path, place: str) -> bool:
    marked = files.read_json(folder / "wandb.json") or {}
    rows = status(folder).get("sha256", {}).get("rows.parquet")
    return rows is not None and (marked.get("rows"), marked.get("place")) == (rows, place)


def statistics_of(folder: Path) -> Path | None:
    """Where the statistics lie that a run has used, in the cache beside its sweep; None where they are gone."""
    name = environment(folder).get("statistics")
    cache = folder.parents[1] / ".cache" / str(name)
    return cache if name and cache.is_dir() else None


def environment(folder: Path) -> dict:
    """What it ran on, and what was found out while it ran."""
    return files.read_json(folder / "environment.json") or {}


def status(folder: Path) -> dict:
    return files.read_json(folder / "status.json") or {"state": "new"}


def looked_at(folder: Path) -> dict:
    """Its status; a process of this machine that was killed could not write it."""
    found = status(folder)
    if found.get("host") != gethostname() or not _gone(found["pid"], found.get("started") or found["time"]):
        return found
    if found["state"] == "queued":
        return {**found, "state": "interrupted", "reason": WAITED}
    return {**found, "state": "died", "reason": f"its process is gone; {GOES_ON}"}


def is_held(folder: Path) -> bool:
    """A process of this machine runs it, or will."""
    found = looked_at(folder)
    return found["state"] in ("queued", "running") and found.get("host") == gethostname()


def _gone(pid: int, wrote: str) -> bool:
    """One that began after the status was written is another process: numbers are given again, soon in a container."""
    import psutil

    try:
        return psutil.Process(pid).create_time() > datetime.fromisoformat(wrote).timestamp() + CLOCKS
    except psutil.NoSuchProcess:
        return True


def _process() -> dict[str, object]:
    return {"host": gethostname(), "pid": os.getpid()}


def finish(folder: Path, rows: pd.DataFrame, documents: pd.DataFrame, seconds: float, like: str = "") -> None:
    """The status is written last: a run is finished when all of its files are whole.

    Args:
        like: runs of the same take about as long.
    """
    tables = {"documents.parquet": documents, "rows.parquet": rows}
    sums = {name: files.write_table(folder / name, table) for name, table in tables.items()}
    remember(folder, **peak_memory(), seconds=round(seconds, 2), like=like)
    files.write_json(folder / "status.json", {"state": "finished", "time": _now(), "sha256": sums})
    remove_progress(folder)


def remove_progress(folder: Path) -> None:
    """What a finished run needs no more; a process that is killed just after it has finished leaves it."""
    for file in _progress_files(folder):
        file.unlink(missing_ok=True)


def progress(folder: Path) -> list[pd.DataFrame]:
    """What the batches of an interrupted run gave, as far as they follow each other without a gap."""
    tables = []
    parts = _progress_files(folder)
    for number, file in enumerate(parts):
        table = _read_progress(file, number)
        if table is None:
            for useless in parts[number:]:
                useless.unlink()
            break
        tables.append(table)
    if tables:
        log.info("%s: continues after %s", folder.name, counted(len(tables), "batch", "es"))
    return tables


def save_progress(folder: Path, number: int, table: pd.DataFrame) -> None:
    """Keep the sums of batch `number` in a file whose name tells whether it is whole, and of this run and batch."""
    content, place = table.to_parquet(index=False), f"progress-{number:06d}"
    files.write_bytes(folder / f"{place}-{files.sha256_at(folder / place, content)[:16]}.parquet", content)


def _read_progress(file: Path, number: int) -> pd.DataFrame | None:
    """The sums of batch `number`; None if the file is that of another batch or run, or, with a warning, damaged."""
    place, _, sha256 = file.stem.rpartition("-")
    if place != f"progress-{number:06d}":
        return None
    content = file.read_bytes()
    if files.sha256_at(file.with_name(place), content).startswith(sha256):
        return pd.read_parquet(io.BytesIO(content))
    return files.read_table(file, sha256)  # of an earlier version: the checksum of the content alone


def _progress_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("progress-*.parquet"))


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
