"""Reads rows with the library `datasets`: from the hub, from a folder in the hub's layout, or saved to disk."""

from __future__ import annotations

import errno
import functools
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, field_validator, model_validator
from pydantic.dataclasses import dataclass as validated

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.files import check_regular, files_below, read_json, write_bytes, write_json
from ablation_sweeps.base.hashing import (
    fingerprint_of_file,
    fingerprint_of_samples,
    names_in,
    sha256_at,
    signature,
    unit_hash,
)
from ablation_sweeps.base.hub import REMEDY, commit, loading_error
from ablation_sweeps.data.batch import Modality, Split
from ablation_sweeps.datasets.options import Pairs

log = logging.getLogger(__name__)


Row = dict[str, Any]
PART_ROWS, PART_BYTES = 512, 1 << 25  # maximum size of a file of cached rows


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Rows:
    """A dataset that the library `datasets` can read.

    Attributes:
        name: name on the hub; nothing is read from the hub if `path` is given.
        path: a local folder: a copy in the hub's layout, or what `save_to_disk` wrote.
        config: one of the dataset's configurations; None if it has only one.
        revision: commit, tag or branch on the hub.
        data_files: files of each split, if `datasets` cannot tell by itself.
        streaming: True reads rows in the dataset's own order, as many as are needed, and caches them on disk. False
            downloads everything, and takes rows in the order of a hash.
        calibration_split, evaluation_split: if they are the same, the documents are divided by a hash.
        calibration_share: in that case, fraction of the documents used for calibration.
    """

    label: str
    name: str | None
    path: str | None
    config: str | None
    revision: str | None
    data_files: Pairs | None
    streaming: bool
    calibration_split: str
    evaluation_split: str
    calibration_share: Annotated[float, Field(gt=0, lt=1)]

    @model_validator(mode="after")
    def _has_a_source(self) -> Rows:
        if not (self.name or self.path):
            raise ValueError("give dataset.name (a name on the hub) or dataset.path (a local folder)")
        return self

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: str | None) -> str | None:
        return path and str(Path(path).expanduser().absolute())

    @property
    def option(self) -> str:
        return f"dataset.path={self.path}" if self.path else f"dataset.name={self.name}"

    def check(self, modality: Modality) -> None:
        if self.path and not Path(self.path).is_dir():
            raise UserError(f"dataset.path={self.path}: there is no such folder; give a folder that holds a dataset")
        if self.path:
            for file in files_below(Path(self.path), "dataset.path"):  # `datasets` would wait for a pipe
                check_regular(file, "dataset.path")
        if self.data_files and not self.streaming and not self.path:
            raise UserError("dataset.streaming=false: the library `datasets` cannot find downloaded "
                            "dataset.data_files again offline; leave dataset.streaming=true")  # fmt: skip

    def fingerprint(self) -> str:
        """Hash of the commit, or of a folder's files, and of every option that affects which rows are taken in which
        order."""
        options = {key: value for key, value in asdict(self).items() if key not in ("label", "path")}
        return signature([options, self._source()])

    def belongs(self, name: str, split: Split) -> bool:
        if self.part("calibration") != self.part("evaluation"):
            return True
        return (unit_hash(f"split/{name}") < self.calibration_share) == (split == "calibration")

    def part(self, split: Split) -> str:
        is_one = (Path(self.path or "/nowhere") / "state.json").is_file()  # a Dataset saved to disk has no splits
        return self.calibration_split if split == "calibration" and not is_one else self.evaluation_split

    def in_order(self, part: str, columns: tuple[str, ...], wanted: Callable[[Row], bool]) -> Iterator[tuple[str, Row]]:
        """Names and rows in the order of the dataset, with only these columns."""

        def stream(start: int) -> Iterator[tuple[int, Row]]:
            dataset = undecoded(self.load(part)).select_columns(list(dict.fromkeys(columns)))
            rows = dataset.skip(start) if start else dataset
            for number, row in enumerate(rows, start):
                if wanted(row):
                    yield number, _whole(row)

        rows = cached_rows(self._kept(part, columns), stream) if self.streaming and not self._saved() else stream(0)
        with loading_errors_as_user_errors(self):
            for number, row in rows:
                yield f"{part}/{number}", row

    def by_hash(self, part: str, column: str, later: str) -> Iterator[tuple[str, Any, Callable[[], Any]]]:
        """Names, values of `column`, and functions that read `later` from disk, in the order of a hash of the name.

        The first n are a random sample. Not for streams.
        """
        with loading_errors_as_user_errors(self):
            dataset = undecoded(self.load(part))
            now, then = (dataset.select_columns([name]) for name in (column, later))
            for number in sorted(range(len(dataset)), key=lambda number: unit_hash(f"{part}/{number}")):
                yield f"{part}/{number}", now[number][column], lambda number=number: then[number][later]

    def class_names(self, column: str) -> list[str]:
        """Class names in the order of the labels."""
        file = self._kept(self.evaluation_split, (column,)) / "classes.json"
        if self.streaming and (names := _read_names(file)) is not None:
            return names
        names = getattr((self.load(self.evaluation_split).features or {}).get(column), "names", None)
        if names is None:
            raise UserError(f"dataset.label_column={column}: has no class names; give a column of labels")
        if self.streaming:
            write_json(file, {"sha256": sha256_at(file, json.dumps(names)), "names": names})
        return names

    def load(self, part: str) -> Any:
        """The dataset as `datasets` loads it: random access, or a stream."""
        with loading_errors_as_user_errors(self):
            source = self.path or str(self.name)
            data = _load(source, self.config, self.data_files, part, self._commit(), self.streaming, self._saved())
        if self.path or self.streaming or Path(data.cache_files[0]["filename"]).parent.name == self._commit():
            return data
        # Offline, `datasets` uses the revision that it loaded last, whichever is asked for.
        raise UserError(f"{self.option}: its revision {self._commit()} is not on this machine; {REMEDY}")

    def _saved(self) -> bool:
        folder = Path(self.path or "/nowhere")
        return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()

    def _commit(self) -> str | None:
        return None if self.path else commit(str(self.name), self.revision, "dataset")

    def _source(self) -> str | None:
        return content(self.path) if self.path else self._commit()

    def _kept(self, part: str, columns: tuple[str, ...]) -> Path:
        from datasets import config

        options = {
            key: value
            for key, value in asdict(self).items()
            if "split" not in key and key not in ("label", "calibration_share")
        }
        which = signature([options, self._source(), part, columns])[:16]
        return Path(config.HF_DATASETS_CACHE) / "ablation_sweeps" / which


@contextmanager
def loading_errors_as_user_errors(dataset: Rows) -> Iterator[None]:
    """Context manager: turn errors of `datasets` into one line that names the option."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC) and error.filename:
            raise  # the message names the folder in which `datasets` keeps what it reads
        raise UserError(f"{dataset.option}: cannot be loaded: {loading_error(error, not dataset.path)}") from error
    except Exception as error:  # the hub, file formats and the network raise errors of their own
        raise UserError(f"{dataset.option}: cannot be loaded: {loading_error(error, not dataset.path)}") from error


@functools.lru_cache(maxsize=8)
def _load(
    source: str,
    config: str | None,
    data_files: Pairs | None,
    part: str,
    revision: str | None,
    streaming: bool,
    saved: bool,
) -> Any:
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if not saved:
        files = dict(data_files) if data_files else None
        return datasets.load_dataset(
            source, config, data_files=files, split=part, revision=revision, streaming=streaming
        )
    dataset = datasets.load_from_disk(source)
    if not isinstance(dataset, datasets.DatasetDict):
        return dataset
    if part not in dataset:
        known = ", ".join(map(str, dataset))
        remedy = "set dataset.calibration_split and dataset.evaluation_split"
        raise UserError(f"the split {part} is not among {known}; {remedy}")
    return dataset[part]


def undecoded(dataset: Any) -> Any:
    """The dataset with images as undecoded bytes, so that the cache holds what was downloaded."""
    import datasets

    for column, feature in (dataset.features or {}).items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset


def _whole(row: Row) -> Row:
    """The row with the bytes of its images, read now if the dataset only gives their paths."""
    import fsspec

    for column, value in row.items():
        if isinstance(value, dict) and value.get("path") and "bytes" in value and value["bytes"] is None:
            with fsspec.open(value["path"], "rb") as file:
                row = {**row, column: {**value, "bytes": file.read()}}  # type: ignore[union-attr]
    return row


def cached_rows(folder: Path, stream: Callable[[int], Iterator[tuple[int, Row]]]) -> Iterator[tuple[int, Row]]:
    """The rows of a stream, read from the cache if it has them, and otherwise from the stream and then cached.

    A job that needs no more rows than an earlier one, or than a prefetch, needs no network. A file's name has the range
    of rows that it covers and a checksum; two processes that read at the same time write the same files. Damaged files
    are deleted.
    """
    position = 0
    while found := _longest(folder, position):
        part, read = found
        yield from read
        end = part.stem.split("-")[1]
        if end == "end":
            return
        position = int(end)
    rows: list[tuple[int, Row]] = []
    start = position
    try:
        for number, row in stream(position):
            rows.append((number, row))
            position = number + 1
            yield number, row
            if len(rows) >= PART_ROWS or _size(rows) >= PART_BYTES:
                _write(folder / f"{start:09d}-{position:09d}", rows)
                start, rows = position, []
    except BaseException:  # enough rows for now (GeneratorExit), or a network error
        if rows:
            _write(folder / f"{start:09d}-{position:09d}", rows)
        raise
    _write(folder / f"{start:09d}-end", rows)


def _longest(folder: Path, start: int) -> tuple[Path, list[tuple[int, Row]]] | None:
    """The intact file that covers most rows from `start` on, and its rows."""
    for part in sorted(folder.glob(f"{start:09d}-*.parquet"), reverse=True):  # "end" sorts after all numbers
        if (rows := _read(part)) is not None:
            return part, rows
        log.warning("%s is damaged (truncated or altered); its rows are read again from their source", part)
        with suppress(OSError):  # the folder is read-only
            part.unlink()
    return None


def _read(part: Path) -> list[tuple[int, Row]] | None:
    """Rows of a cached file; None if its checksum does not match, or if an earlier version wrote it without one."""
    import pyarrow.parquet

    place, _, sha256 = part.stem.rpartition("-")
    content = part.read_bytes()
    if place.count("-") != 1 or sha256 != sha256_at(part.with_name(place), content)[:16]:
        return None
    table = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
    return [(record["number"], record["row"]) for record in table.to_pylist()]


def _write(place: Path, rows: list[tuple[int, Row]]) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([{"number": number, "row": row} for number, row in rows])
    content = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, content)
    written = content.getvalue().to_pybytes()
    write_bytes(place.with_name(f"{place.name}-{sha256_at(place, written)[:16]}.parquet"), written)


def _read_names(file: Path) -> list[str] | None:
    """Cached class names; None if the file is missing, or its checksum does not match."""
    cached_rows = read_json(file) or {}
    names = cached_rows.get("names")
    return names if names and cached_rows.get("sha256") == sha256_at(file, json.dumps(names)) else None


def _size(rows: list[tuple[int, Row]]) -> int:
    """Bytes of the images in some rows; texts are small."""
    return sum(len(value.get("bytes") or b"") for _, row in rows for value in row.values() if isinstance(value, dict))


def content(path: str) -> str:
    """Hash of a folder's files; of files above 64 MiB, only 64 samples of 64 KiB are read."""
    return signature([(str(name), _of_file(Path(path) / name)) for name in names_in(path)])


def _of_file(file: Path) -> str:
    return fingerprint_of_samples(file, 64, 1 << 16) if file.stat().st_size > 1 << 26 else fingerprint_of_file(file)
