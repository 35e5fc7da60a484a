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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from socket import gethostname
from typing import TYPE_CHECKING, TypeVar

from pydantic import TypeAdapter

from ablation_sweeps.console import remedy
from ablation_sweeps.data import UserError
from ablation_sweeps.lazy import pd

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
T = TypeVar("T")

_adapter = functools.cache(TypeAdapter)

SAY_SECONDS = 10.0  # of waiting for a lock, before it is said
LEFT_OVER_SECONDS = 24 * 3600.0  # a temporary file of another host that is older was left by a process that was killed

# pyarrow and safetensors have errors of their own, which say the same.
FULL = re.compile("|".join(re.escape(os.strerror(code)) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)))


def signature(content: object) -> str:
    """sha256 over the canonical json of `content`: equal content, equal name, on every machine."""
    text = json.dumps(content, sort_keys=True, default=str, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint_of_file(path: Path) -> str:
    """Hash of the whole content: a model that differs in one layer, or a text in one letter, is another one."""
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
    """Hash of the length of a file, and of `blocks` of `size` bytes that are spread over it, its ends among them: for
    files that are too large, or too many, to be read whole."""
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


def names_in(folder: str | Path) -> list[Path]:
    """Names of the files below a folder, in order, but for those that Hydra, git or the hub's client leave there."""
    names = [file.relative_to(folder) for file in sorted(Path(folder).rglob("*")) if file.is_file()]
    names = [name for name in names if name.name != "multirun.yaml"]
    return [name for name in names if not any(part.startswith(".") for part in name.parts)]


def files_below(folder: Path, option: str) -> list[Path]:
    """All that is below a folder but folders, sorted.

    Raises:
        UserError: one of its folders cannot be read, so that some files would be missing.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{option}: the folder {error.filename} cannot be read ({error.strerror}); mend or remove it")

    return sorted(Path(place, name) for place, _, names in os.walk(folder, onerror=refuse) for name in names)


def check_regular(file: Path, option: str) -> None:
    """Anything else must not be opened: a pipe waits for ever, and a device may have no end.

    Raises:
        UserError: it is no regular file, nor a link to one.
    """
    try:
        mode = os.stat(file).st_mode
    except OSError as error:  # a link to nothing, or to itself; or a folder that may not be looked into
        raise UserError(f"{option}: {file} cannot be read ({error.strerror}); mend or remove it") from error
    if not stat.S_ISREG(mode):
        raise UserError(f"{option}: {file} is no regular file, but a pipe, a device or a socket; remove it")


def say_others(where: str, others: Iterable[Path]) -> None:
    """Log, once, what kinds of files are passed over in a folder of data. Hidden files are not mentioned."""
    kinds = Counter(file.suffix.lower() or file.name for file in others if not file.name.startswith("."))
    if kinds:
        named = ", ".join(f"{kind} ({n:,})" for kind, n in kinds.most_common(5))
        say_once(f"{where}: files of other kinds are passed over: {named}{', and more' if len(kinds) > 5 else ''}")


@functools.cache
def say_once(message: str) -> None:
    log.warning(message)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`, and moves it there once it is written whole.

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
        temporary.chmod(mode)  # as umask has it; safetensors gives its files to their owner alone
        os.replace(temporary, path)
    except Exception as error:
        if FULL.search(str(error)):
            raise UserError(
                f"{path}: no space is left on this disk, or in your quota; make room, and the same command goes on"
                f"{remedy(str(path))}"
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@functools.cache
def _system() -> str:
    """Names where process ids are unique: this host, or container, since it was started."""
    parts = [gethostname()]
    with suppress(OSError):  # there is no /proc
        parts += [os.readlink("/proc/self/ns/pid"), Path("/proc/sys/kernel/random/boot_id").read_text()]
    return signature(parts)[:8]


@functools.cache
def _remove_left_over(folder: Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote; once for each folder and process."""
    for file in folder.glob(".*.tmp"):
        with suppress(OSError, ValueError, IndexError):  # others may remove it first, and may have files of that name
            if _is_left_over(file):
                file.unlink()


def _is_left_over(file: Path) -> bool:
    """Whether the process that wrote it has ended; elsewhere, that is not known, and a day is enough to write."""
    import psutil

    system, pid, written = file.name.split(".")[-4], int(file.name.split(".")[-3]), file.stat().st_mtime
    if system != _system():
        return time.time() - written > LEFT_OVER_SECONDS
    try:
        return psutil.Process(pid).create_time() > written + 1  # the number was given again
    except psutil.NoSuchProcess:
        return True


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")


def read_json(path: Path, kind: type[T] = dict) -> T | None:  # type: ignore[assignment]
    """The content of a file; None where it is absent, truncated, or not what `kind` says.

    Args:
        kind: what pydantic can check; a TypedDict says which keys there must be, and of which type.
    """
    try:
        return _adapter(kind).validate_json(path.read_bytes(), strict=True)
    except (OSError, ValueError):
        return None


def sha256_of(path: Path) -> str | None:
    """None where the file is absent. Not by `fingerprint_of_file`: a damaged file may have its old size and time."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return None


def write_table(path: Path, table: pd.DataFrame) -> str:
    """Returns the sha256 of the file."""
    content = table.to_parquet(index=False)
    write_bytes(path, content)
    return hashlib.sha256(content).hexdigest()


def write_bytes(path: Path, content: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def read_table(path: Path, sha256: str | None) -> pd.DataFrame | None:
    """None where the file is absent; also, with a warning, where it is not the one that was written.

    Args:
        sha256: the beginning of it, at least.
    """
    content = read_whole(path, sha256)
    return None if content is None else pd.read_parquet(io.BytesIO(content))


def read_whole(path: Path, sha256: str | None) -> bytes | None:
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


def is_locked(folder: Path) -> bool:
    """Whether some process holds the lock of a folder, as far as the file system tells."""
    import fcntl

    try:
        with open(folder / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # and let go at once
            return False
    except BlockingIOError:
        return True
    except OSError:  # there is none, or locks are not to be had
        return False


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file with a checksum of its content and its place, so that a reader knows it is whole and belongs
    there."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"sha256": sha256_at(path, _checksum(tensors))})


def load_tensors(path: Path) -> dict[str, Tensor] | None:
    """None where the file is absent; also, with a warning, where its content is not what was written to this place."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
            content = _checksum(tensors)  # alone, in files of earlier versions
            if (file.metadata() or {}).get("sha256") in (sha256_at(path, content), content):
                return tensors
    except (SafetensorError, OSError, ValueError):
        pass
    log.warning("%s is damaged (truncated or altered), or of another place; a launch computes it again", path)
    return None


def sha256_at(path: Path, content: str | bytes) -> str:
    """Checksum of a cached file that also holds for its place: its folder and its name, which say what it is of.
    A whole file that was copied from another place does not match."""
    content = content if isinstance(content, bytes) else content.encode()
    return hashlib.sha256(f"{path.parent.name}/{path.name}\0".encode() + content).hexdigest()


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
