"""Reads texts from files: plain, or one per row of jsonl, json, csv, tsv or parquet; also compressed."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.files import say_once

PLAIN = ".txt"
KINDS = (PLAIN, ".jsonl", ".parquet", ".csv", ".tsv", ".json")
SUPPORTED = f"{', '.join(KINDS)} (an array of objects), also compressed as .gz, .bz2, .xz or .zst"
REPLACEMENT = "\ufffd"  # stands for bytes that are not valid UTF-8
DAMAGE = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)  # raised by decompression and pyarrow


class NoColumn(UserError):
    """A file of rows that are not documents: it has no column of text, or no rows at all."""


def kind_of(file: Path) -> str | None:
    """The kind of a file, one of KINDS, by its suffix in any case; None for other files."""
    kind = _suffixes(file)[0]
    return kind if kind in KINDS else None


def stem(file: Path) -> str:
    """The file name without the suffixes of its format and compression."""
    kind, packing = _suffixes(file)
    return file.name[: -len(kind + packing)] if kind in KINDS else file.name


def _suffixes(file: Path) -> tuple[str, str]:
    """The suffixes of a file's format and of its compression, in lower case."""
    suffix = file.suffix.lower()
    return (Path(file.stem).suffix.lower(), suffix) if suffix in OPENERS else (suffix, "")


def texts(file: Path, option: str, column: str) -> list[str]:
    """The text of a plain file, or the text of every row; a null is an empty text.

    Args:
        option: option that named the file, for error messages.
        column: name of the field with the text.

    Raises:
        NoColumn: a file of rows has no such column.
        UserError: anything else is wrong with the file. The message names the row.
    """
    kind = kind_of(file) or PLAIN
    try:
        if kind == ".parquet":
            return [_text(value, column, file, place) for place, value in _of_parquet(file, column)]
        with _opened(file) as content:
            if kind == PLAIN:
                return [_plain(content, option, file)]
            newline = "" if kind in DELIMITERS else None
            lines = io.TextIOWrapper(content, encoding="utf-8-sig", errors="surrogateescape", newline=newline)
            rows = READERS[kind](lines, option, file, column)
            return [_text(value, column, file, place) for place, value in rows]
    except UserError:
        raise
    except DAMAGE as error:
        raise UserError(f"{option}: {file} cannot be read ({_reason(error)}); repair or remove it") from error


def _opened(file: Path) -> io.BufferedReader | io.BytesIO:
    """Open the file, decompressed."""
    unpack = OPENERS.get(_suffixes(file)[1])
    if unpack is None:
        return open(file, "rb")
    with unpack(str(file)) as packed:
        return io.BytesIO(packed.read())


def _unpacked_zst(file: str) -> Any:
    import pyarrow

    return pyarrow.input_stream(file, compression="zstd")


def _plain(content: io.BufferedReader | io.BytesIO, option: str, file: Path) -> str:
    """Read a plain text. A few invalid bytes are replaced, with a warning; another encoding is refused."""
    text = io.TextIOWrapper(content, encoding="utf-8-sig", errors="replace").read()
    damaged = text.count(REPLACEMENT) + text.count("\0")  # UTF-16 is full of NULs
    if damaged > len(text) / 100:
        raise UserError(
            f"{option}: {file} is not UTF-8; convert it (iconv -f latin1 -t utf-8), or remove it; supported are "
            f"{SUPPORTED}"
        )
    if damaged:
        say_once(f"{file}: {damaged} of {len(text):,} characters are not valid UTF-8")
    return text


Rows = Iterator[tuple[str, Any]]  # place of a row in its file, and its text


def _of_jsonl(lines: io.TextIOWrapper, option: str, file: Path, column: str) -> Rows:
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = f"line {number}"
            yield place, _field(_json(line, option, file, place), column, file, place)


def _of_json(lines: io.TextIOWrapper, option: str, file: Path, column: str) -> Rows:
    content = _json(lines.read(), option, file, "")
    if not isinstance(content, list):
        raise NoColumn(
            f"{option}: {file} holds {_kind(content)}, not an array of objects; write it as one, or as one object "
            "a line in a .jsonl"
        )
    for number, row in enumerate(content, 1):
        yield f"entry {number}", _field(row, column, file, f"entry {number}")


def _json(text: str, option: str, file: Path, place: str) -> Any:
    where = f"{file}, {place}," if place else str(file)
    _check_utf8(text, option, where)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = _reason(error).replace("line 1 column", "column") if place else _reason(error)
        raise UserError(f"{option}: {where} is not complete JSON ({reason}); correct or remove it") from error


def _field(row: Any, column: str, file: Path, place: str) -> Any:
    if not isinstance(row, dict):
        raise NoColumn(
            f"dataset.column={column}: {file}, {place}, holds {_kind(row)}, not an object; correct or remove it"
        )
    if column not in row:
        raise NoColumn(
            f"dataset.column={column}: {file}, {place}, has no such field; it has {_listed(row)}; set "
            f"dataset.column=NAME, or correct the row"
        )
    return row[column]


def _of_csv(lines: io.TextIOWrapper, option: str, file: Path, column: str) -> Rows:
    csv.field_size_limit(sys.maxsize)  # a document may be long
    reader = csv.reader(lines, delimiter=DELIMITERS[kind_of(file) or ""], strict=True)
    try:
        header = next(reader, [])
        if column not in header:
            raise NoColumn(
                f"dataset.column={column}: {file} has no such column; it has {_listed(header)}; set dataset.column=NAME"
            )
        for row in reader:
            where = f"line {reader.line_num}"
            if row and len(row) != len(header):
                raise UserError(
                    f"{option}: {file}, {where}, has {len(row)} fields, but the header has {len(header)}; put texts "
                    "in double quotes"
                )
            if row:
                yield where, row[header.index(column)]
    except csv.Error as error:
        raise UserError(f"{option}: {file}, line {reader.line_num}: {_reason(error)}; correct or remove it") from error


def _of_parquet(file: Path, column: str) -> Rows:
    import pyarrow

    with _opened(file) as content:
        table = _parquet(pyarrow.PythonFile(content, "r"), file, column)
    for number, value in enumerate(table.to_pylist(), 1):
        yield f"row {number}", value


def _parquet(content: Any, file: Path, column: str) -> Any:
    import pyarrow.parquet

    try:
        parquet = pyarrow.parquet.ParquetFile(content)
        names = parquet.schema_arrow.names
        if column not in names:
            raise NoColumn(
                f"dataset.column={column}: {file} has no such column; it has {_listed(names)}; set dataset.column=NAME"
            )
        return parquet.read(columns=[column])[column]
    except pyarrow.ArrowException as error:
        raise OSError(_reason(error)) from error


def _text(value: Any, column: str, file: Path, place: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(
            f"dataset.column={column}: {file}, {place}, holds {_kind(value)}, not text; choose a column of text"
        )
    _check_utf8(value, f"dataset.column={column}", f"{file}, {place},")
    return value


def _check_utf8(text: str, option: str, where: str) -> None:
    """Refuse text that is not UTF-8. Invalid bytes were decoded as surrogates, which json escapes may hold as well."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        line = "" if "line" in where else f" in line {text.count(chr(10), 0, error.start) + 1}"
        raise UserError(
            f"{option}: {where} is not UTF-8{line}; convert it (iconv -f latin1 -t utf-8), or remove it"
        ) from error


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), f"a value of type {type(value).__name__}")


def _listed(names: Any) -> str:
    shown = [str(name)[:40] for name in names]
    return f"{', '.join(shown[:8])}{' and more' if len(shown) > 8 else ''}" if shown else "none at all"


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


DELIMITERS = {".csv": ",", ".tsv": "\t"}
READERS: dict[str, Callable[[io.TextIOWrapper, str, Path, str], Rows]] = {
    ".jsonl": _of_jsonl,
    ".json": _of_json,
    ".csv": _of_csv,
    ".tsv": _of_csv,
}
OPENERS: dict[str, Callable[[str], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _unpacked_zst,
}
