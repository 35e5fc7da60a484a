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
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from socket import gethostname
from typing import TYPE_CHECKING, TypeVar

from pydantic import TypeAdapter

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.hashing import signature
from ablation_sweeps.base.lazy import pd
from ablation_sweeps.base.terminal import remedy

if TYPE_CHECKING:
    from pandas import DataFrame

log = logging.getLogger(__name__)

T = TypeVar("T")

_adapter = functools.cache(TypeAdapter)

SAY_SECONDS = 10.0  # a longer wait for a lock is logged
LEFT_OVER_SECONDS = 24 * 3600.0  # age at which a temporary file of another host is taken for that of a killed process

# pyarrow and safetensors raise errors of their own with the same text.
FULL = re.compile("|".join(re.escape(os.strerror(code)) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)))


def files_below(folder: Path, option: str) -> list[Path]:
    """All files below a folder, sorted.

    Raises:
        UserError: one of its folders cannot be read, so that some files would be missing.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{option}: the folder {error.filename} cannot be read ({error.strerror}); repair or remove it")

    return sorted(Path(place, name) for place, _, names in os.walk(folder, onerror=refuse) for name in names)


def check_regular(file: Path, option: str) -> None:
    """Refuse a path that must not be opened: a pipe waits for ever, and a device may have no end.

    Raises:
        UserError: it is no regular file, nor a link to one.
    """
    try:
        mode = os.stat(file).st_mode
    except OSError as error:  # a broken or circular link, or a folder without permission
        raise UserError(f"{option}: {file} cannot be read ({error.strerror}); repair or remove it") from error
    if not stat.S_ISREG(mode):
        raise UserError(f"{option}: {file} is no regular file, but a pipe, a device or a socket; remove it")


def say_others(where: str, others: Iterable[Path]) -> None:
    """Warn, once, about the kinds of files that are skipped in a folder of data. Hidden files are not mentioned."""
    kinds = Counter(file.suffix.lower() or file.name for file in others if not file.name.startswith("."))
    if kinds:
        named = ", ".join(f"{kind} ({n:,})" for kind, n in kinds.most_common(5))
        say_once(f"{where}: files of other kinds are skipped: {named}{', and more' if len(kinds) > 5 else ''}")


@functools.cache
def say_once(message: str) -> None:
    """Log a warning the first time that it occurs in this process."""
    log.warning(message)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Context manager: gives a temporary path beside `path`, which replaces `path` once it is written completely.

    Raises:
        UserError: the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{_system()}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_over(path.parent)
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)  # as umask says; safetensors makes its files readable by their owner alone
        os.replace(temporary, path)
    except Exception as error:
        if FULL.search(str(error)):
            raise UserError(
                f"{path}: no space is left on this disk, or in your quota; make room, then run the same command "
                f"again: it continues{remedy(str(path))}"
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@functools.cache
def _system() -> str:
    """Identifies the host or container, since its start: process ids are unique only within it."""
    parts = [gethostname()]
    with suppress(OSError):  # there may be no /proc
        parts += [os.readlink("/proc/self/ns/pid"), Path("/proc/sys/kernel/random/boot_id").read_text()]
    return signature(parts)[:8]


@functools.cache
def _remove_left_over(folder: Path) -> None:
    """Delete temporary files of processes that were killed while writing; once for each folder and process."""
    for file in folder.glob(".*.tmp"):
        with suppress(OSError, ValueError, IndexError):  # others may remove it first, and may have files of that name
            if _is_left_over(file):
                file.unlink()


def _is_left_over(file: Path) -> bool:
    """True if the process that wrote a file has ended. That of another host is taken to have ended after a day."""
    import psutil

    system, pid, written = file.name.split(".")[-4], int(file.name.split(".")[-3]), file.stat().st_mtime
    if system != _system():
        return time.time() - written > LEFT_OVER_SECONDS
    try:
        return psutil.Process(pid).create_time() > written + 1  # the id was reused
    except psutil.NoSuchProcess:
        return True


def write_text(path: Path, text: str) -> None:
    """Write a text atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    """Write json atomically."""
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")


def read_json(path: Path, kind: type[T] = dict) -> T | None:  # type: ignore[assignment]
    """Content of a json file; None if it is missing, truncated, or does not match `kind`.

    Args:
        kind: a type that pydantic can check; a TypedDict says which keys there must be, and their types.
    """
    try:
        return _adapter(kind).validate_json(path.read_bytes(), strict=True)
    except (OSError, ValueError):
        return None


def write_table(path: Path, table: pd.DataFrame) -> str:
    """Write a table as parquet, and return the sha256 of the file."""
    content = table.to_parquet(index=False)
    write_bytes(path, content)
    return hashlib.sha256(content).hexdigest()


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def read_table(path: Path, sha256: str | None) -> pd.DataFrame | None:
    """Read a parquet table; None if it is missing or, with a warning, if its checksum does not match.

    Args:
        sha256: checksum, or its beginning.
    """
    content = read_whole(path, sha256)
    return None if content is None else pd.read_parquet(io.BytesIO(content))


def read_whole(path: Path, sha256: str | None) -> bytes | None:
    """Bytes of a file; None if it is missing or, with a warning, if its checksum does not match."""
    if not path.exists():
        return None
    content = path.read_bytes()
    if sha256 and hashlib.sha256(content).hexdigest().startswith(sha256):
        return content
    log.warning("%s is damaged (truncated or altered); the next launch computes it again", path)
    return None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Context manager: lock a folder for this process, on all hosts that share the file system."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=SAY_SECONDS)
    except Timeout:
        log.info("%s: another process is working there; waiting for it", folder.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def is_locked(folder: Path) -> bool:
    """True if some process holds the lock of a folder, as far as the file system tells."""
    import fcntl

    try:
        with open(folder / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # released at once
            return False
    except BlockingIOError:
        return True
    except OSError:  # no lock file, or a file system without locks
        return False


FORMULA = ("=", "+", "-", "@", "\t", "\r")  # first characters of a formula in a spreadsheet


def write_csv(table: DataFrame, path: Path) -> None:
    """Write a csv. Text that a spreadsheet would take for a formula gets an apostrophe; numbers are unchanged."""

    def safe(cell: object) -> object:
        return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell

    texts = [name for name in table if not pd.api.types.is_numeric_dtype(table[name])]
    with replacing(path) as temporary:
        table.assign(**{name: table[name].map(safe) for name in texts}).to_csv(temporary, index=False)
