"""Text read with the library `datasets`: from the hub, from a local copy, or saved to disk."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as validated

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.hashing import unit_hash
from ablation_sweeps.data.batch import Document, Modality, Split
from ablation_sweeps.datasets.hub_rows import Row, Rows
from ablation_sweeps.datasets.options import Pattern


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class HubText(Rows):
    """Text that the library `datasets` can read.

    Attributes:
        column: column with the text.
        document_start: regular expression; a row that it matches fully begins a new document, which the next rows
            continue (wikitext: a row is a line). None: a row is a document.
        group: column with the kind of text of a row; `meta.pile_set_name` is a field inside a column.
        only, without: kinds of text to use, or to leave out.
    """

    modality: ClassVar[Modality] = "text"

    column: str
    document_start: Pattern
    group: str | None
    only: tuple[str, ...] | None
    without: tuple[str, ...] | None

    def check(self, modality: Modality) -> None:
        super().check(modality)
        if (self.only or self.without) and not self.group:
            raise UserError("dataset.only and dataset.without: need dataset.group, the column with the kind of text")

    def examples(self, split: Split) -> Iterator[Document]:
        """Documents of a stream in its own order, otherwise ordered by a hash of their names.

        A budget takes the first ones.
        """
        part = self.part(split)
        kind = self.group.split(".")[0] if self.group else self.column
        columns = (self.column,) if kind == self.column else (self.column, kind)
        rows = ((name, self._text(row[self.column])) for name, row in self.in_order(part, columns, self._wanted))
        if self.document_start:
            rows = _joined(rows, re.compile(self.document_start))
        if not self.streaming:
            rows = sorted(rows, key=lambda document: unit_hash(document[0]))
        for name, text in rows:
            if text.strip() and self.belongs(name, split):
                yield Document(name, text)

    def _text(self, value: Any) -> str:
        if isinstance(value, str | None):
            return value or ""
        raise UserError(
            f"dataset.column={self.column}: holds {type(value).__name__}s, not text; choose a column of text"
        )

    def _wanted(self, row: Row) -> bool:
        if self.group is None:
            return True
        kind = functools.reduce(lambda value, key: value[key], self.group.split("."), row)
        return (self.only is None or kind in self.only) and (self.without is None or kind not in self.without)


def _joined(rows: Iterable[tuple[str, Any]], start: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    """Join rows to documents. A document has the name of its first row."""
    name, lines = "", []
    for row_name, text in rows:
        if start.fullmatch(text.rstrip("\n")) and lines:
            yield name, "".join(lines)
            lines = []
        name = row_name if not lines else name
        lines.append(text if text.endswith("\n") else f"{text}\n")
    if lines:
        yield name, "".join(lines)
