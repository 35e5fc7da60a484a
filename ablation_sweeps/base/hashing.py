"""Hashes of names, content and files."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def unit_hash(name: str) -> float:
    """A number in [0, 1) that depends only on the name, to split and order documents the same way everywhere."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def signature(content: object) -> str:
    """sha256 of the canonical json of `content`: equal content gives an equal signature on every machine."""
    text = json.dumps(content, sort_keys=True, default=str, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint_of_file(path: Path) -> str:
    """Hash of the whole content of a file, so that a change of a single weight or letter changes it."""
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
    """Hash of a file's length, and of `blocks` samples of `size` bytes, spread over it and including its ends.

    For files that are too large, or too many, to be read completely.
    """
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
    """Relative paths of the files below a folder, sorted, without those that Hydra, git or the hub's client create."""
    names = [file.relative_to(folder) for file in sorted(Path(folder).rglob("*")) if file.is_file()]
    names = [name for name in names if name.name != "multirun.yaml"]
    return [name for name in names if not any(part.startswith(".") for part in name.parts)]


def sha256_of(path: Path) -> str | None:
    """sha256 of a file; None if it is missing. Unlike `fingerprint_of_file`, it always reads it, to find damage."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return None


def sha256_at(path: Path, content: str | bytes) -> str:
    """Checksum of a cached file's content and place, i.e. the names of folder and file, which say what it contains.

    A file that was copied from another place does not match.
    """
    content = content if isinstance(content, bytes) else content.encode()
    return hashlib.sha256(f"{path.parent.name}/{path.name}\0".encode() + content).hexdigest()
