"""A folder of labelled images."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as validated

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.files import check_regular, files_below, say_others
from ablation_sweeps.base.hashing import fingerprint_of_samples, signature, unit_hash
from ablation_sweeps.base.paths import LocalPath
from ablation_sweeps.data.batch import Modality, Picture, Split

if TYPE_CHECKING:
    from PIL.Image import Image


SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test"}  # usual names of folders of a split


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class ImageFolder:
    """A folder of labelled images.

    Attributes:
        path: folder with the images.
        labels: how to get an image's class. folder: from the name of its folder; prefix: from its file name, the part
            before the first `_`.
        classes: text file whose line k begins with the name of class k, in the model's order (ImageNet's wnids, say).
            None: the names of the classes that are found, sorted.
        calibration_share: fraction of the images used for calibration, chosen by a hash of the name.
    """

    modality: ClassVar[Modality] = "image"

    label: str
    path: LocalPath | None
    labels: Literal["folder", "prefix"]
    classes: LocalPath | None
    calibration_share: Annotated[float, Field(gt=0, lt=1)]

    def check(self, modality: Modality) -> None:
        files = self._files()
        known = self._classes(files)
        unknown = [file for file in files if self._class_of(file) not in known]
        if unknown:
            raise UserError(
                f"dataset.classes={self.classes}: has no class {self._class_of(unknown[0])!r}, of {unknown[0].name}; "
                f"each of its lines must begin with a class name"
            )

    def examples(self, split: Split) -> Iterator[Picture]:
        """Images ordered by a hash of their names, so that the first n are a random sample."""
        files = self._files()
        known = self._classes(files)
        for file in sorted(files, key=lambda file: unit_hash(self._name(file))):
            name = self._name(file)
            if (unit_hash(f"split/{name}") < self.calibration_share) == (split == "calibration"):
                yield Picture(name, partial(_read, file), known[self._class_of(file)])

    def fingerprint(self) -> str:
        """Signature of the names and classes of all images, and of 64 KiB of each."""
        files = self._files()
        known = self._classes(files)
        with ThreadPoolExecutor(8) as threads:  # they wait for the disk
            contents = list(threads.map(lambda file: fingerprint_of_samples(file, 16, 1 << 12), files))
        images = [(self._name(f), of_f, known[self._class_of(f)]) for f, of_f in zip(files, contents, strict=True)]
        # Earlier versions counted copies as images of their own: their results are not reused.
        later = ["copies count once"] if len(set(contents)) < len(contents) else []
        return signature([images, self.calibration_share, *later])

    def class_names(self) -> list[str]:
        """Class names in the order of the labels; with `classes`, all that it lists, with images or without."""
        return list(self._classes(self._files()))

    def _name(self, file: Path) -> str:
        return str(file.relative_to(os.path.expanduser(self.path or "")))

    def _files(self) -> list[Path]:
        if self.path is None:
            raise UserError("dataset.path: is not given; set dataset.path=FOLDER, a folder of images")
        folder = Path(os.path.expanduser(self.path))
        if not folder.is_dir():
            raise UserError(f"dataset.path={self.path}: there is no such folder; give a folder of images")
        every = files_below(folder, "dataset.path")
        splits = sorted(file.name for file in folder.iterdir() if file.is_dir() and file.name.lower() in SPLITS)
        if len(splits) > 1:
            unseen = min(splits, key=lambda name: name.lower().startswith("train"))
            raise UserError(
                f"dataset.path={self.path}: holds {', '.join(splits)}, of which models were trained on some; give "
                f"one of them, e.g. dataset.path={folder / unseen}"
            )
        files = [file for file in every if file.suffix.lower() in SUFFIXES]
        if not files:
            raise UserError(f"dataset.path={self.path}: holds no images ({', '.join(sorted(SUFFIXES))})")
        for file in files:
            check_regular(file, "dataset.path")
        say_others(f"dataset.path={self.path}", set(every).difference(files))
        return files

    def _class_of(self, file: Path) -> str:
        return file.parent.name if self.labels == "folder" else file.name.split("_")[0]

    def _classes(self, files: list[Path]) -> dict[str, int]:
        if self.classes is None:
            names = sorted({self._class_of(file) for file in files})
            if all(name.isdecimal() for name in names) and names != sorted(names, key=int):
                raise UserError(
                    f"dataset.path={self.path}: its classes are numbers, and models differ in whether 10 comes after 9 "
                    "or, as torchvision has it, after 1; give dataset.classes=FILE, the numbers in the model's order"
                )
            return {name: number for number, name in enumerate(names)}
        listed = Path(os.path.expanduser(self.classes))
        if not listed.is_file():
            raise UserError(
                f"dataset.classes={self.classes}: there is no such file; give a text file, one class a line"
            )
        try:
            lines = [line for line in listed.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise UserError(
                f"dataset.classes={self.classes}: cannot be read ({error}); give a text file in UTF-8, one class a line"
            ) from error
        names = [line.split()[0] for line in lines]
        if twice := [name for name, n in Counter(names).items() if n > 1]:
            raise UserError(
                f"dataset.classes={self.classes}: {twice[0]} begins several of its lines, so that labels would be "
                "wrong; each line must begin with the name of another class"
            )
        return {name: number for number, name in enumerate(names)}


def _read(file: Path) -> Image:
    import PIL.Image

    with PIL.Image.open(file) as image:
        return image.copy()
