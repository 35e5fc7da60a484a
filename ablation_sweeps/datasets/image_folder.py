"""A folder of labelled images."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as validated

from ablation_sweeps.data import LocalPath, Modality, Picture, Split, UserError, unit_hash
from ablation_sweeps.files import fingerprint_of_samples, signature

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test"}  # as folders are called
N_CHECKED = 5000  # the first images to be used are opened before a model is loaded: a second, on a local disk


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class ImageFolder:
    """Attributes:
    path: holds the images.
    labels: folder: an image's class is the name of its folder; prefix: what stands before the first `_` of its name.
    classes: text file whose line k begins with the name of class k, in the model's order (ImageNet's wnids, say).
        None: the sorted class names that there are.
    calibration_share: share of the images that statistics are collected on, chosen by a hash of the name.
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
                "its lines must begin with the class names"
            )
        _check_images(tuple(sorted(files, key=lambda file: unit_hash(self._name(file)))[:N_CHECKED]))

    def examples(self, split: Split) -> Iterator[Picture]:
        """In the order of a hash of their names: a prefix is a random sample."""
        files = self._files()
        known = self._classes(files)
        for file in sorted(files, key=lambda file: unit_hash(self._name(file))):
            name = self._name(file)
            if (unit_hash(f"split/{name}") < self.calibration_share) == (split == "calibration"):
                yield Picture(name, partial(_read, file, whole=True), known[self._class_of(file)])

    def fingerprint(self) -> str:
        """Of the names and classes of the images, and of 64 KiB of each."""
        files = self._files()
        known = self._classes(files)
        with ThreadPoolExecutor(8) as threads:  # which wait for the disk
            contents = threads.map(lambda file: fingerprint_of_samples(file, 16, 1 << 12), files)
        images = [(self._name(f), of_f, known[self._class_of(f)]) for f, of_f in zip(files, contents, strict=True)]
        return signature([images, self.calibration_share])

    def class_names(self) -> list[str]:
        """In the order of the labels; those of the list, whether there are images of them or not."""
        return list(self._classes(self._files()))

    def _name(self, file: Path) -> str:
        return str(file.relative_to(Path(self.path or "").expanduser()))

    def _files(self) -> list[Path]:
        if self.path is None:
            raise UserError("dataset.path: is not given; set dataset.path=FOLDER, a folder of images")
        folder = Path(self.path).expanduser()
        if not folder.is_dir():
            raise UserError(f"dataset.path={self.path}: there is no such folder; give a folder of images")
        splits = sorted(file.name for file in folder.iterdir() if file.is_dir() and file.name.lower() in SPLITS)
        if len(splits) > 1:
            unseen = min(splits, key=lambda name: name.lower().startswith("train"))
            raise UserError(
                f"dataset.path={self.path}: holds {', '.join(splits)}, of which a model has seen some in its training; "
                f"give one of them, e.g. dataset.path={folder / unseen}"
            )
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not files:
            raise UserError(f"dataset.path={self.path}: holds no images ({', '.join(sorted(SUFFIXES))})")
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
        listed = Path(self.classes).expanduser()
        if not listed.is_file():
            raise UserError(
                f"dataset.classes={self.classes}: there is no such file; give a text file, one class a line"
            )
        lines = [line for line in listed.read_text().splitlines() if line.strip()]
        return {line.split()[0]: number for number, line in enumerate(lines)}


def _read(file: Path, whole: bool) -> Image:
    import PIL.Image

    try:
        with PIL.Image.open(file) as image:
            return image.copy() if whole else image
    except (OSError, SyntaxError, ValueError) as error:  # what PIL raises of damaged files
        raise UserError(f"dataset.path: {file} is no whole image ({error}); mend or remove it") from error


@cache
def _check_images(files: tuple[Path, ...]) -> None:
    for file in files:
        _read(file, whole=False)
