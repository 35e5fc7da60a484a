"""Text in a folder, file or glob: plain, or rows of jsonl, json, csv, tsv or parquet."""

from __future__ import annotations

import functools
import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as validated

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.files import check_regular, files_below, say_once, say_others
from ablation_sweeps.base.hashing import fingerprint_of_file, signature, unit_hash
from ablation_sweeps.base.paths import LocalPath
from ablation_sweeps.data.batch import SPLITS, Document, Modality, Split
from ablation_sweeps.data.intake import content_of_text
from ablation_sweeps.datasets.file_formats import KINDS, PLAIN, SUPPORTED, NoColumn, kind_of, texts
from ablation_sweeps.datasets.options import Pattern

Texts = list[tuple[str, str]]  # names and texts


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class TextFiles:
    """Text in local files.

    Attributes:
        path: a file, a folder (its files of KINDS, at any depth), or a glob.
        calibration_path: the same for the calibration documents; None takes a fraction of those at `path`.
        calibration_share: that fraction, chosen by a hash of the document's name.
        document_start: for plain text: regular expression; each line that it matches fully begins a new document.
            None: a file is a document.
        column: for other formats: field with the text; each row is a document.
    """

    modality: ClassVar[Modality] = "text"

    label: str
    path: LocalPath | None
    calibration_path: LocalPath | None
    calibration_share: Annotated[float, Field(gt=0, lt=1)]
    document_start: Pattern
    column: str

    def check(self, modality: Modality) -> None:
        read = {option: self._documents(option) for option in self._paths()}
        for option, documents in read.items():
            if not any(text.strip() for _, text in documents):
                raise UserError(
                    f"dataset.{option}={self._paths()[option]}: holds no text; give files with text in them"
                )
        if "path" not in read:
            raise UserError("dataset.path: is not given; set dataset.path=FOLDER (or a file, or a glob)")
        both = self._resolved("path") & self._resolved("calibration_path")
        if both:
            raise UserError(
                f"dataset.calibration_path={self.calibration_path}: {sorted(both)[0]} would be evaluated as well; "
                f"give other files, or leave it out: then some of those at dataset.path are used"
            )
        texts = [text for _, text in read["path"] if text.strip()]
        if len(texts) > 1 and not self.calibration_path and len(set(map(content_of_text, texts))) == 1:
            raise UserError(
                f"dataset.path={self.path}: its {len(texts)} documents are one and the same text, which counts once; "
                "give other documents"
            )
        if not all(any(self._of_split(read.get("calibration_path", read["path"]), split)) for split in SPLITS):
            raise UserError(
                f"dataset.path={self.path}: holds too few documents to split them; give dataset.calibration_path, or "
                "dataset.document_start if a file holds several documents"
            )

    def examples(self, split: Split) -> Iterator[Document]:
        """Documents ordered by a hash of their names, so that a budget takes a random sample, the same everywhere."""
        separate = self.calibration_path and split == "calibration"
        documents = self._of_split(self._documents("calibration_path" if separate else "path"), split)
        return iter(sorted(documents, key=lambda document: unit_hash(document.name)))

    def fingerprint(self) -> str:
        """Signature of the names and content of all files, and of how they are divided into documents."""
        listed = {option: _files(option, path) for option, path in self._paths().items()}
        states = tuple((option, n, str(f), *_state(f)) for option, files in listed.items() for n, f in files)
        return _fingerprint(self, states)

    def _paths(self) -> dict[str, str]:
        paths = {"path": self.path, "calibration_path": self.calibration_path}
        return {option: path for option, path in paths.items() if path}

    def _resolved(self, option: str) -> set[str]:
        path = self._paths().get(option)
        return {os.path.realpath(file) for _, file in _files(option, path)} if path else set()

    def _of_split(self, documents: Texts, split: Split) -> Iterator[Document]:
        calibrates = split == "calibration"
        for name, text in documents:
            taken = self.calibration_path or (unit_hash(f"split/{name}") < self.calibration_share) == calibrates
            if taken and text.strip():
                yield Document(name, text)

    def _documents(self, option: str) -> Texts:
        path = self._paths().get(option)
        if path is None:
            raise UserError("dataset.path: is not given; set dataset.path=FOLDER (or a file, or a glob)")
        return [document for _, _, documents in self._by_file(option, path) for document in documents]

    def _by_file(self, option: str, path: str) -> Iterator[tuple[str, Path, Texts]]:
        """Name, path and documents of each file.

        A folder may hold .json or .csv files for other purposes: those without the column are skipped, with a warning.
        """
        passed_over: NoColumn | None = None
        some = False
        for name, file in _files(option, path):
            try:
                found = texts(file, f"dataset.{option}", self.column)
            except NoColumn as error:
                if kind_of(file) not in (".json", ".csv", ".tsv") or not _is_folder(path):
                    raise
                say_once(f"skipped: {error}")
                passed_over = error
                continue
            some = True
            yield name, file, self._named(name, file, found)
        if passed_over and not some:
            raise passed_over

    def _named(self, name: str, file: Path, found: list[str]) -> Texts:
        if kind_of(file) not in (None, PLAIN):
            return [(f"{name}#{number}", text) for number, text in enumerate(found)]
        (text,) = found
        if self.document_start is None:
            return [(name, text)]
        starts = [match.start() for match in re.finditer(f"^(?:{self.document_start})$", text, re.MULTILINE)]
        pieces = zip([0, *starts], [*starts, len(text)], strict=True)
        return [(f"{name}#{number}", text[start:end]) for number, (start, end) in enumerate(pieces)]


@functools.cache
def _fingerprint(dataset: TextFiles, states: tuple) -> str:
    """Signature of a dataset, cached in this process.

    Args:
        states: size and time of every file: if they change, it is computed again.
    """
    content: dict[str, list] = {}
    seen: set[bytes] = set()
    copies = False
    for option, path in dataset._paths().items():
        content[option] = []
        for name, file, documents in dataset._by_file(option, path):
            content[option].append([name, fingerprint_of_file(file), *_read_anew(file)])
            for found in (content_of_text(text) for _, text in documents if text.strip()):
                copies = copies or found in seen
                seen.add(found)
    # Earlier versions counted copies as documents of their own: their results are not reused.
    later = ["copies count once"] if copies else []
    return signature([content, dataset.calibration_share, dataset.document_start, dataset.column, *later])


def _read_anew(file: Path) -> list[str]:
    """The kind of a file that earlier versions read as another one (mostly as plain text); otherwise empty."""
    once = file.suffix if file.suffix in (".jsonl", ".parquet") else PLAIN
    kind = kind_of(file) or PLAIN
    return [kind] if kind != once else []


def _state(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _is_folder(path: str) -> bool:
    return os.path.isdir(os.path.expanduser(path))


def _files(option: str, path: str) -> list[tuple[str, Path]]:
    """Names, relative to the folder, and paths of the text files; all of them are regular files."""
    given = Path(os.path.expanduser(path))
    asked = f"dataset.{option}"
    if given.is_dir():
        every = files_below(given, asked)
        files = [(str(file.relative_to(given)), file) for file in every if kind_of(file)]
        say_others(f"{asked}={path}", (file for file in every if not kind_of(file)))
    elif os.path.lexists(given):
        files = [(given.name, given)]
    else:
        found = [file for file in map(Path, sorted(glob.glob(str(given), recursive=True))) if not file.is_dir()]
        files = [(file.name, file) for file in found]
    if not files and given.is_dir():
        raise UserError(
            f"{asked}={path}: there are no {', '.join(KINDS)} files in this folder; supported are {SUPPORTED}"
        )
    if not files:
        raise UserError(f"{asked}={path}: there is no such file or folder; check the path")
    for _, file in files:
        check_regular(file, asked)
    return files
