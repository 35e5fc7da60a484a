"""Safetensors files with a checksum."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ablation_sweeps.base.files import replacing
from ablation_sweeps.base.hashing import sha256_at

if TYPE_CHECKING:
    from torch import Tensor

    from ablation_sweeps.base.files import T

log = logging.getLogger(__name__)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Save tensors with a checksum of content and path, so that a reader knows the file is intact and in its place."""
    from safetensors.torch import save

    # `save_file` would write to a temporary file of its own, which stays where a process is killed meanwhile.
    content = save(tensors, metadata={"sha256": sha256_at(path, _checksum(tensors))})
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def load_tensors(path: Path) -> dict[str, Tensor] | None:
    """Load tensors; None if the file is absent or, with a warning, if its checksum does not match."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
            content = _checksum(tensors)  # the checksum of earlier versions, without the path
            if (file.metadata() or {}).get("sha256") in (sha256_at(path, content), content):
                return tensors
    except (SafetensorError, OSError, ValueError):
        pass
    log.warning("%s is damaged (truncated or altered), or of another place; a launch computes it again", path)
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
    """Load the value from `path`, or compute and save it. The caller must hold the folder's lock."""
    tensors = load_tensors(path)
    if tensors is not None:
        return from_tensors(tensors)
    tensors = to_tensors(compute())
    save_tensors(path, tensors)
    return from_tensors(tensors)  # computed and loaded values are then on the same device
