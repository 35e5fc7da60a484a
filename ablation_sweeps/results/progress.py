"""Progress of an unfinished run: one file for each batch, with its metric sums."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from ablation_sweeps.base import files, hashing
from ablation_sweeps.base.lazy import pd
from ablation_sweeps.base.terminal import counted

log = logging.getLogger(__name__)


def save(folder: Path, number: int, table: pd.DataFrame) -> None:
    """Save the sums of batch `number` in a file whose name contains a checksum of its content, run and batch."""
    content, place = table.to_parquet(index=False), f"progress-{number:06d}"
    files.write_bytes(folder / f"{place}-{hashing.sha256_at(folder / place, content)[:16]}.parquet", content)


def load(
    folder: Path, names: Sequence[Sequence[str]] | None = None, warn: Callable[[str], None] = log.warning
) -> list[pd.DataFrame]:
    """Saved metric sums of the batches of an interrupted run, up to the first gap.

    Args:
        names: names of the documents in each batch as it is now. From the first batch with other documents on (from an
            earlier version's data), all saved sums are discarded. None: not compared.
        warn: called with a warning if sums are discarded.
    """
    tables = []
    parts = _files(folder)
    for number, file in enumerate(parts):
        table = _read(file, number)
        if table is not None and names is not None and not _is_of(table, names[number : number + 1]):
            warn(f"batches from the {number + 1}. on were of other documents before; they are computed again")
            table = None
        if table is None:
            for useless in parts[number:]:
                useless.unlink()
            break
        tables.append(table)
    if tables:
        log.info("%s: continues after %s", folder.name, counted(len(tables), "batch", "es"))
    return tables


def batches_done(folder: Path) -> int:
    """Number of batches of an unfinished run whose results are saved."""
    return len(_files(folder))


def remove(folder: Path) -> None:
    """Delete progress files, which a process leaves behind if it is killed just after the run has finished."""
    for file in _files(folder):
        file.unlink(missing_ok=True)


def _is_of(table: pd.DataFrame, batch: Sequence[Sequence[str]]) -> bool:
    """True if the sums are those of the documents in `batch`, a list of one batch or none."""
    clean = table.loc[table["fraction"] == 0, "name"]
    return [clean.tolist()] == [list(names) for names in batch]


def _read(file: Path, number: int) -> pd.DataFrame | None:
    """Sums of batch `number`; None if the file is from another batch or run or, with a warning, damaged."""
    place, _, sha256 = file.stem.rpartition("-")
    if place != f"progress-{number:06d}":
        return None
    content = file.read_bytes()
    if hashing.sha256_at(file.with_name(place), content).startswith(sha256):
        return pd.read_parquet(io.BytesIO(content))
    return files.read_table(file, sha256)  # from an earlier version: checksum of the content alone


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("progress-*.parquet"))
