"""A folder, file or glob of text: plain, one json a line, or parquet."""

from __future__ import annotations

import glob
import json
import logging
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as validated

from ablation_sweeps.data import Document, LocalPath, Modality, Pattern, Split, UserError, unit_hash
from ablation_sweeps.files import fingerprint_of_file, signature

log = logging.getLogger(__name__)

SUFFIXES = (".txt", ".jsonl", ".parquet")
REPLACEMENT = "\ufffd"  # what stands for bytes that are no letter


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class TextFiles:
    """Attributes:
    path: a file, a folder (its *.txt, *.jsonl and *.parquet, at any depth), or a glob.
    calibration_path: the same for the calibration documents; None takes a share of those at `path`.
    calibration_share: that share, chosen by a hash of the document's name.
    document_start: of *.txt: regular expression; each line that it matches whole begins a new document. None: a file
        is one.
    column: of *.jsonl and *.parquet: the field that holds the text; a row is a document.
    """

    modality: ClassVar[Modality] = "text"

    label: str
    path: LocalPath | None
    calibration_path: LocalPath | None
    calibration_share: Annotated[float, Field(gt=0, lt=1)]
    document_start: Pattern
    column: str

    def check(self, modality: Modality) -> None:
        for option, path in (("path", self.path), ("calibration_path", self.calibration_path)):
            if path is None:
                continue
            if not any(text.strip() for _, text in self._documents(option, path)):
                raise UserError(f"dataset.{option}={path}: holds no text; give files with text in them")
        if self.path is None:
            raise UserError("dataset.path: is not given; set dataset.path=FOLDER (or a file, or a glob)")
        both = self._resolved("path", self.path) & self._resolved("calibration_path", self.calibration_path)
        if both:
            raise UserError(
                f"dataset.calibration_path={self.calibration_path}: {sorted(both)[0]} would be evaluated as well; give "
                "other files, or none to take a share of those at dataset.path"
            )
        if not (any(True for _ in self.examples("calibration")) and any(True for _ in self.examples("evaluation"))):
            raise UserError(
                f"dataset.path={self.path}: holds too few documents to split them; give dataset.calibration_path, or "
                "dataset.document_start if a file holds several documents"
            )

    def examples(self, split: Split) -> Iterator[Document]:
        """In the order of a hash of their names, so that a budget takes a random sample, the same everywhere."""
        calibrates = split == "calibration"
        if self.calibration_path and calibrates:
            documents = self._documents("calibration_path", self.calibration_path)
        else:
            documents = self._documents("path", self.path)
            if not self.calibration_path:
                documents = [
                    d for d in documents if (unit_hash(f"split/{d[0]}") < self.calibration_share) == calibrates
                ]
        for name, text in sorted(documents, key=lambda document: unit_hash(document[0])):
            if text.strip():
                yield Document(name, text)

    def fingerprint(self) -> str:
        """Of the names and the content of all files, and of how they are cut into documents."""
        paths = {"path": self.path, "calibration_path": self.calibration_path}
        content = {
            option: [(name, fingerprint_of_file(file)) for name, file in _files(option, path)]
            for option, path in paths.items()
            if path
        }
        return signature([content, self.calibration_share, self.document_start, self.column])

    @staticmethod
    def _resolved(option: str, path: str | None) -> set[str]:
        return {str(file.resolve()) for _, file in _files(option, path)} if path else set()

    def _documents(self, option: str, path: str | None) -> list[tuple[str, str]]:
        """Names and texts."""
        if path is None:
            raise UserError("dataset.path: is not given; set dataset.path=FOLDER (or a file, or a glob)")
        documents = []
        for name, file in _files(option, path):
            if file.suffix in (".jsonl", ".parquet"):
                documents += [(f"{name}#{number}", text) for number, text in enumerate(_column(file, self.column))]
                continue
            text = _text(file)
            if self.document_start is None:
                documents.append((name, text))
                continue
            starts = [match.start() for match in re.finditer(f"^(?:{self.document_start})$", text, re.MULTILINE)]
            pieces = zip([0, *starts], [*starts, len(text)], strict=True)
            documents += [(f"{name}#{number}", text[start:end]) for number, (start, end) in enumerate(pieces)]
        return documents


def _text(file: Path) -> str:
    """A damaged letter here and there is let pass, and said; another encoding is refused."""
    text = file.read_text(encoding="utf-8-sig", errors="replace")
    damaged = text.count(REPLACEMENT) + text.count("\0")  # of which UTF-16 is full
    if damaged > len(text) / 100:
        raise UserError(f"dataset.path: {file} is no UTF-8; convert it (iconv -f latin1 -t utf-8), or remove it")
    if damaged:
        _say_once(f"{file}: {damaged} of {len(text):,} letters are no text in UTF-8")
    return text


@cache
def _say_once(message: str) -> None:
    log.warning(message)


def _column(file: Path, column: str) -> list[str]:
    import pyarrow.parquet

    try:
        if file.suffix == ".parquet":
            texts = pyarrow.parquet.read_table(file, columns=[column])[column].to_pylist()
        else:
            with open(file, encoding="utf-8") as lines:
                texts = [json.loads(line)[column] for line in lines if line.strip()]
        if not all(isinstance(text, str | None) for text in texts):
            raise ValueError("it holds other things than text")
        return [text or "" for text in texts]
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"dataset.column={column}: {file} has no such column of text ({reason})") from error


def _files(option: str, path: str) -> list[tuple[str, Path]]:
    """Names relative to the folder, and paths."""
    given = Path(path).expanduser()
    if given.is_dir():
        files = [(str(file.relative_to(given)), file) for file in sorted(given.rglob("*")) if file.suffix in SUFFIXES]
    elif given.is_file():
        files = [(given.name, given)]
    else:
        files = [(Path(found).name, Path(found)) for found in sorted(glob.glob(str(given), recursive=True))]
    if not files and given.is_dir():
        raise UserError(f"dataset.{option}={path}: there are no {', '.join(SUFFIXES)} files in this folder")
    if not files:
        raise UserError(f"dataset.{option}={path}: there is no such file or folder; check the path")
    return files
