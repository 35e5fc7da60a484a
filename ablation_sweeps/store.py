"""Files: atomic writes, locks, checked reads. Never pickle."""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import json
import logging
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from socket import gethostname
from typing import TYPE_CHECKING, TypeVar

from ablation_sweeps.data import UserError
from ablation_sweeps.environment import describe, peak_memory
from ablation_sweeps.lazy import pd

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
T = TypeVar("T")

SAY_SECONDS = 10.0  # of waiting for a lock, before it is said

# pyarrow and safetensors have errors of their own, which say the same.
FULL = re.compile("|".join(re.escape(os.strerror(code)) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)))


def signature(content: object) -> str:
    """sha256 over the canonical json of `content`: equal content, equal name, on every machine."""
    text = json.dumps(content, sort_keys=True, default=str, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint_of_file(path: Path) -> str:
    """Of the whole content: a model that differs in one layer, or a text in one letter, is another one."""
    status = path.stat()
    return _hash_of_content(path, status.st_size, status.st_mtime_ns)


@functools.cache
def _hash_of_content(path: Path, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint_of_samples(path: Path, blocks: int, size: int) -> str:
    """Of the length of a file, and of `blocks` of `size` bytes that are spread over it, its ends among them: for files
    that are too large, or too many, to be read whole."""
    status = path.stat()
    return _hash_of_samples(path, status.st_size, status.st_mtime_ns, blocks, size)


@functools.cache
def _hash_of_samples(path: Path, length: int, mtime_ns: int, blocks: int, size: int) -> str:
    digest = hashlib.sha256(str(length).encode())
    with open(path, "rb") as file:
        for block in range(blocks):
            file.seek(max(0, length - size) * block // (blocks - 1))
            digest.update(file.read(size))
    return digest.hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`, and moves it there once it is written whole.

    Raises:
        UserError: the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)  # as umask has it; safetensors gives its files to their owner alone
        os.replace(temporary, path)
    except Exception as error:
        if FULL.search(str(error)):
            raise UserError(
                f"{path}: no space is left on this disk, or in your quota; make room, and the same command goes on, or "
                "set results_dir=FOLDER"
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")


def read_json(path: Path) -> dict | None:
    """None where the file is absent or holds no object of json (a run that was killed before its first write)."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write_table(path: Path, table: pd.DataFrame) -> str:
    """Returns the sha256 of the file."""
    content = table.to_parquet(index=False)
    _write_bytes(path, content)
    return hashlib.sha256(content).hexdigest()


def _write_bytes(path: Path, content: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def read_table(path: Path, sha256: str | None) -> pd.DataFrame | None:
    """None where the file is absent; also, with a warning, where it is not the one that was written.

    Args:
        sha256: the beginning of it, at least.
    """
    content = _read_whole(path, sha256)
    return None if content is None else pd.read_parquet(io.BytesIO(content))


def _read_whole(path: Path, sha256: str | None) -> bytes | None:
    if not path.exists():
        return None
    content = path.read_bytes()
    if sha256 and hashlib.sha256(content).hexdigest().startswith(sha256):
        return content
    log.warning("%s is damaged (truncated or altered); a launch computes it again", path)
    return None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time, on all hosts that share the file system."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=SAY_SECONDS)
    except Timeout:
        log.info("%s: another process is at it; waiting for it", folder.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file that carries a checksum of its content, so that a later reader knows it is whole."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"sha256": _checksum(tensors)})


def load_tensors(path: Path) -> dict[str, Tensor] | None:
    """None where the file is absent; also, with a warning, where its content is not what was written."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
            if (file.metadata() or {}).get("sha256") == _checksum(tensors):
                return tensors
    except (SafetensorError, OSError, ValueError):
        pass
    log.warning("%s is damaged (truncated or altered); a launch computes it again", path)
    return None


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(f"{key}{tuple(tensors[key].shape)}".encode())
        digest.update(tensors[key].contiguous().numpy().tobytes())
    return digest.hexdigest()


def cached(
    path: Path,
    to_tensors: Callable[[T], dict[str, Tensor]],
    from_tensors: Callable[[dict[str, Tensor]], T],
    compute: Callable[[], T],
) -> T:
    """The value kept at `path`, or computed and kept there. Hold the folder's lock."""
    tensors = load_tensors(path)
    if tensors is not None:
        return from_tensors(tensors)
    tensors = to_tensors(compute())
    save_tensors(path, tensors)
    return from_tensors(tensors)  # so that what was computed and what was read lie on the same device


# A run's folder: config.yaml, environment.json, status.json, rows.parquet, documents.parquet, log.


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
    whole = lambda name: _read_whole(folder / name, sums.get(name)) is not None  # noqa: E731  (not parsed: jobs are many)
    return found["state"] == "finished" and whole("rows.parquet") and whole("documents.parquet")


def result(folder: Path, name: str) -> pd.DataFrame | None:
    """A table of a finished run; None where it is not finished, or the table not whole."""
    found = status(folder)
    return read_table(folder / name, found.get("sha256", {}).get(name)) if found["state"] == "finished" else None


def runs(sweep: Path) -> list[Path]:
    """The folders of all jobs that were ever started or queued there."""
    return sorted(path.parent for path in sweep.glob("*/status.json"))


def config(folder: Path) -> dict:
    import yaml

    return yaml.safe_load((folder / "config.yaml").read_text())


def queue(folder: Path, config: dict) -> None:
    _write_config(folder, config)
    write_status(folder, "queued")


def _write_config(folder: Path, config: dict) -> None:
    import yaml

    write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def begin(folder: Path, config: dict) -> None:
    _write_config(folder, config)
    earlier, now = read_json(folder / "environment.json") or {}, describe()
    notes = {"notes": earlier["notes"]} if "notes" in earlier else {}
    write_json(folder / "environment.json", now | notes)
    before = {key: earlier.get(key) for key in ("git_commit", "packages", "device", "threads")}
    if batches_done(folder) and any(before[key] != now[key] for key in before):
        note(folder, f"its first {batches_done(folder)} batches were computed elsewhere: {json.dumps(before)}")
    write_json(
        folder / "status.json", {"state": "running", "started": _now(), "host": gethostname(), "pid": os.getpid()}
    )


def note(folder: Path, text: str) -> None:
    """What a reader of the numbers should know."""
    log.warning(text)
    notes = (read_json(folder / "environment.json") or {}).get("notes", [])
    remember(folder, notes=[*notes, text])


def remember(folder: Path, **facts: object) -> None:
    """What was found out while it ran, for who reads the results."""
    write_json(folder / "environment.json", {**(read_json(folder / "environment.json") or {}), **facts})


def fail(folder: Path, error: BaseException) -> None:
    """A signal to stop is no failure: the job can go on where it was."""
    log.debug("the job stopped", exc_info=error)
    reason = f"{type(error).__name__}: {error}".strip()
    with suppress(OSError, UserError):  # a full disk may be the reason; it is the first error that counts
        write_status(folder, "failed" if isinstance(error, Exception) else "interrupted", reason)


def write_status(folder: Path, state: str, reason: str | None = None) -> None:
    """The truth about a job: queued, running, interrupted, died (with its process), failed or finished."""
    write_json(folder / "status.json", {"state": state, **({"reason": reason} if reason else {}), "time": _now()})


def expect(folder: Path, batches: int) -> None:
    """How many there are to do, for who watches it, and how many are done by now."""
    write_json(folder / "status.json", {**status(folder), "batches": batches, "begun_at": batches_done(folder)})


def batches_done(folder: Path) -> int:
    return len(_progress_files(folder))


def mark_published(folder: Path, place: str) -> None:
    """W&B has these rows, there."""
    rows = status(folder).get("sha256", {}).get("rows.parquet")
    write_json(folder / "wandb.json", {"rows": rows, "place": place, "time": _now()})


def published(folder: Path, place: str) -> bool:
    marked = read_json(folder / "wandb.json") or {}
    rows = status(folder).get("sha256", {}).get("rows.parquet")
    return rows is not None and (marked.get("rows"), marked.get("place")) == (rows, place)


def statistics_of(folder: Path) -> Path | None:
    """Where the statistics lie that a run has used, in the cache beside its sweep; None where they are gone."""
    name = (read_json(folder / "environment.json") or {}).get("statistics")
    cache = folder.parents[1] / ".cache" / str(name)
    return cache if name and cache.is_dir() else None


def status(folder: Path) -> dict:
    return read_json(folder / "status.json") or {"state": "new"}


def finish(folder: Path, rows: pd.DataFrame, documents: pd.DataFrame, seconds: float, like: str = "") -> None:
    """The status is written last: a run is finished when all of its files are whole.

    Args:
        like: runs of the same take about as long.
    """
    environment = {**(read_json(folder / "environment.json") or {}), **peak_memory(), "seconds": round(seconds, 2)}
    environment["like"] = like
    tables = {"documents.parquet": documents, "rows.parquet": rows}
    sums = {name: write_table(folder / name, table) for name, table in tables.items()}
    write_json(folder / "environment.json", environment)
    write_json(folder / "status.json", {"state": "finished", "time": _now(), "sha256": sums})
    for file in _progress_files(folder):
        file.unlink()


def progress(folder: Path) -> list[pd.DataFrame]:
    """What the batches of an interrupted run gave, as far as they follow each other without a gap."""
    tables = []
    files = _progress_files(folder)
    for number, file in enumerate(files):
        place, _, sha256 = file.stem.removeprefix("progress-").partition("-")
        table = read_table(file, sha256) if place == f"{number:06d}" else None
        if table is None:
            for useless in files[number:]:
                useless.unlink()
            break
        tables.append(table)
    if tables:
        log.info("%s: continues after %d batches", folder.name, len(tables))
    return tables


def save_progress(folder: Path, number: int, table: pd.DataFrame) -> None:
    """Of batch `number`, under a name that tells whether it is whole."""
    content = table.to_parquet(index=False)
    sha256 = hashlib.sha256(content).hexdigest()[:16]
    _write_bytes(folder / f"progress-{number:06d}-{sha256}.parquet", content)


def _progress_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("progress-*.parquet"))


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
