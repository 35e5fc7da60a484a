"""Labelled images read with the library `datasets`: from the hub, from a local copy, or saved to disk."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict, field_validator
from pydantic.dataclasses import dataclass as validated

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.data.batch import Modality, Picture, Split
from ablation_sweeps.datasets.hub_rows import Rows
from ablation_sweeps.datasets.options import Pairs

if TYPE_CHECKING:
    from PIL.Image import Image


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class HubImages(Rows):
    """Labelled images that the library `datasets` can read.

    Attributes:
        image_column, label_column: columns with the image, and with the number of its class.
        classes: classes to use: a name in `class_sets`, `not_` and such a name, or numbers: "0-9,42". None: all. Labels
            keep their numbers, and the model keeps all its classes.
        class_sets: names for sets of such numbers.
    """

    modality: ClassVar[Modality] = "image"

    image_column: str
    label_column: str
    classes: str | None
    class_sets: Pairs

    @field_validator("classes", mode="before")
    @classmethod
    def _text(cls, classes: Any) -> Any:
        return str(classes) if isinstance(classes, int) else classes

    def check(self, modality: Modality) -> None:
        super().check(modality)
        self.class_names()
        self.labels()

    def labels(self) -> frozenset[int] | None:
        """Labels of the classes to use; None for all."""
        if self.classes is None:
            return None
        sets = dict(self.class_sets)
        if self.classes in sets:
            return self._known(sets[self.classes])
        if self.classes.removeprefix("not_") in sets:
            every = frozenset(range(len(self.class_names())))
            return every - self._known(sets[self.classes.removeprefix("not_")])
        if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", self.classes):
            names = "".join(f"{name}, not_{name}, " for name in sets)
            raise UserError(f"dataset.classes={self.classes}: must be {names}or numbers such as '0-9,42'; null is all")
        return self._known(self.classes)

    def _known(self, ranges: str) -> frozenset[int]:
        """Numbers of the classes in `ranges`, all of which must exist."""
        option = f"dataset.classes={self.classes}"
        for part in ranges.split(","):
            first, _, last = part.partition("-")
            if int(last or first) < int(first):
                raise UserError(
                    f"{option}: {part} is empty, since its end is before its beginning; give {last}-{first}"
                )
        numbers, n = _numbers(ranges), len(self.class_names())
        if max(numbers) >= n:
            raise UserError(f"{option}: there is no class {max(numbers)}; give numbers from 0 to {n - 1}")
        return numbers

    def class_names(self) -> list[str]:  # type: ignore[override]
        return super().class_names(self.label_column)

    def examples(self, split: Split) -> Iterator[Picture]:
        """Images of a stream in its own order, otherwise ordered by a hash of their names. A budget takes the first."""
        taken, part = self.labels(), self.part(split)
        rows = self._stream(part, taken) if self.streaming else self.by_hash(part, self.label_column, self.image_column)
        for name, label, image in rows:
            if (taken is None or label in taken) and self.belongs(name, split):
                yield Picture(name, partial(self._opened, image), int(label))

    def _stream(self, part: str, taken: frozenset[int] | None) -> Iterator[tuple[str, Any, Callable[[], Any]]]:
        """Rows of a stream, in the form of `by_hash`; the files of the images stay in memory."""

        def wanted(row: dict[str, Any]) -> bool:
            return taken is None or row[self.label_column] in taken

        for name, row in self.in_order(part, (self.image_column, self.label_column), wanted):
            yield name, row[self.label_column], partial(row.__getitem__, self.image_column)

    def _opened(self, image: Callable[[], Any]) -> Image:
        import PIL.Image

        value = image()
        if value is None:
            raise ValueError("the row holds none")
        if not isinstance(value, dict):
            raise UserError(
                f"dataset.image_column={self.image_column}: holds {type(value).__name__}s, not images; choose a "
                f"column of images"
            )
        return PIL.Image.open(io.BytesIO(value["bytes"]) if value["bytes"] else value["path"])


def _numbers(ranges: str) -> frozenset[int]:
    """The numbers in a list of ranges: 0, 1, 2, 7 in "0-2,7"."""
    ends = [[int(end) for end in part.split("-")] for part in ranges.split(",")]
    return frozenset(number for first, *last in ends for number in range(first, (last or [first])[0] + 1))
