"""Filters the examples of a dataset: each content counts once, in one split only, and broken images are left out."""

from __future__ import annotations

import functools
import hashlib
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.lazy import torch
from ablation_sweeps.data.batch import SPLITS, Document, Picture, Split

if TYPE_CHECKING:
    from PIL.Image import Image


HELD_BYTES = 1 << 28  # decoded images that wait for their encoder; others are decoded again
N_NAMED = 5  # broken images named in a message

# PIL raises these for damaged files, depending on their format.
DAMAGE = (SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError, struct.error, zlib.error)


Contents = dict[bytes, tuple[str, int] | None]


@dataclass
class Intake:
    """Iterates over the examples of one split in order, and counts those that it leaves out.

    Two examples are equal if their content is, whatever their names and labels: a text without white space at its ends,
    or the upright pixels of an image. The first of equal examples is kept. The contents themselves are not stored.

    Attributes:
        examples: examples from the dataset, read only as they are needed, except for images that threads decode ahead.
        calibrated: `contents` of the calibration data, which are not evaluated.
        threaded: True if threads decode images ahead.
        contents: examples given so far: content hash, and for images name and label.
        copies, calibrated_copies: numbers of examples left out as copies within this split, or of calibration data.
        relabelled: names of each copy with another label than the first of its kind, and of that.
        broken: errors of the images that were left out.
    """

    dataset: str
    split: Split
    examples: Iterable[Document | Picture]
    calibrated: Contents = field(default_factory=dict)
    threaded: bool = True
    contents: Contents = field(default_factory=dict)
    copies: int = 0
    calibrated_copies: int = 0
    relabelled: list[tuple[str, str]] = field(default_factory=list)
    broken: list[BrokenPicture] = field(default_factory=list)

    def __iter__(self) -> Iterator[Document | Picture]:
        """Give the examples that are neither copies nor broken.

        Raises:
            UserError: there are examples, but all of them are left out.
        """
        given = 0
        for example, content in _all_hashed(self.examples, self.threaded):
            if isinstance(content, BrokenPicture):
                self.broken.append(content)
            elif content in self.calibrated:
                self.calibrated_copies += 1
                self._compare_labels(example, self.calibrated[content])
            elif content in self.contents:
                self.copies += 1
                self._compare_labels(example, self.contents[content])
            else:
                if content is not None:
                    self.contents[content] = (example.name, example.label) if isinstance(example, Picture) else None
                given += 1
                yield example
        if not given and self.left_out:
            raise UserError(
                f"dataset={self.dataset}: nothing is left of its {self.split} split: {'; '.join(self.left_out)}; give "
                "other, or more, data"
            )

    @property
    def left_out(self) -> list[str]:
        """Sentences on what was left out, one for each reason."""
        sentences = []
        copies = [
            _counted(
                self.calibrated_copies,
                "example that is also in the calibration data",
                "examples that are also in the calibration data",
            ),
            _counted(self.copies, "copy of an earlier example", "copies of earlier examples"),
        ]
        if self.calibrated_copies or self.copies:
            are = "is" if self.calibrated_copies + self.copies == 1 else "are"
            sentences.append(
                f"{' and '.join(filter(None, copies))} {are} left out (the same content counts once, whatever its name)"
            )
        if self.relabelled:
            pairs = _counted(len(self.relabelled), "pair of equal images has", "pairs of equal images have")
            named = " and ".join(self.relabelled[0])
            sentences.append(f"{pairs} different labels, such as {named}; only the first of a pair is used")
        if self.broken:
            more = f" and {len(self.broken) - N_NAMED} more" if len(self.broken) > N_NAMED else ""
            named = ", ".join("{} ({})".format(*error.args) for error in self.broken[:N_NAMED])
            pictures = _counted(len(self.broken), "unusable image is", "unusable images are")
            sentences.append(f"{pictures} left out: {named}{more}")
        return sentences

    def _compare_labels(self, copy: Document | Picture, first: tuple[str, int] | None) -> None:
        if first is not None and isinstance(copy, Picture) and copy.label != first[1]:
            self.relabelled.append((first[0], copy.name))


def splits_of(dataset: Any, threaded: bool = True) -> Iterator[Intake]:
    """The calibration split, then the evaluation split without what was taken from the first."""
    calibrated: Contents = {}
    for split in SPLITS:
        intake = Intake(dataset.label, split, dataset.examples(split), calibrated, threaded)
        yield intake
        calibrated = intake.contents


def _counted(n: int, one: str, several: str) -> str:
    """The number with its noun; empty for zero."""
    return "" if n == 0 else f"{n:,} {one if n == 1 else several}"


def content_of_text(text: str) -> bytes:
    """sha256 of a text, without white space at its ends."""
    return hashlib.sha256(text.strip().encode(errors="surrogatepass")).digest()


class BrokenPicture(UserError):
    """An image that can never be read: its file is at fault, not a disk or a network. Made of its name and a reason."""

    def __str__(self) -> str:
        name, reason = self.args
        return f"dataset: the image {name} cannot be used: {reason}; repair or remove it"


def upright(picture: Picture) -> Image:
    """The decoded image, turned as its EXIF data say.

    Raises:
        BrokenPicture: it is truncated, too large, not an image, or has more than 8 bits per channel.
    """
    return _upright(picture.name, _decoded(picture))


def _decoded(picture: Picture) -> Image:
    from PIL import Image, UnidentifiedImageError

    try:
        image = picture.read()
        image.load()
    except UnidentifiedImageError as error:
        raise _broken(picture.name, "not an image format that PIL reads") from error
    except Image.DecompressionBombError as error:
        raise _broken(picture.name, "more pixels than PIL decodes") from error
    except OSError as error:
        if error.errno is None:
            raise _broken(picture.name, error) from error
        raise UserError(f"dataset: the image {picture.name} cannot be read: {error}; repair or remove it") from error
    except UserError:
        raise
    except DAMAGE as error:
        raise _broken(picture.name, error) from error
    return image


def _upright(name: str, image: Image) -> Image:
    from PIL.ImageOps import exif_transpose

    if image.mode[0] in "IF":  # PIL would clip values above 255
        raise _broken(name, f"more than 8 bits per pixel and channel (PIL's mode {image.mode}); save it with 8")
    try:
        return exif_transpose(image)
    except (OSError, *DAMAGE) as error:
        raise _broken(name, error) from error


def _broken(name: str, reason: object) -> BrokenPicture:
    return BrokenPicture(name, " ".join(str(reason).split())[:150])


@dataclass
class _Handover:
    """Reads an image. The first call returns the image that was decoded for its hash, unless that was dropped."""

    again: Callable[[], Image]
    image: Image | None

    def __call__(self) -> Image:
        image, self.image = self.image, None
        return self.again() if image is None else image


Hashed = tuple[Document | Picture, bytes | BrokenPicture | None]


def _hashed(example: Document | Picture) -> Hashed:
    """The example and the hash of its content; no hash for blank texts, which encoders leave out."""
    if isinstance(example, Document):
        return example, content_of_text(example.text) if example.text.strip() else None
    if not isinstance(example, Picture):
        return example, None
    try:
        image = _decoded(example)
        pixels = _upright(example.name, image).convert("RGB")
    except BrokenPicture as error:
        return example, error
    content = hashlib.sha256(f"{pixels.size}".encode() + pixels.tobytes()).digest()
    return replace(example, read=_Handover(example.read, image)), content


def _all_hashed(examples: Iterable[Document | Picture], threaded: bool) -> Iterator[Hashed]:
    """Hash all examples. Decoded images are held until they are read, up to HELD_BYTES in total."""
    held: deque[_Handover] = deque()
    try:
        for example, content in _hashed_ahead(examples) if threaded else map(_hashed, examples):
            if isinstance(example, Picture) and isinstance(example.read, _Handover):
                held.append(example.read)
                while sum(map(_n_bytes, held)) > HELD_BYTES:
                    held.popleft().image = None
            yield example, content
    finally:
        for handover in held:
            handover.image = None


def _n_bytes(handover: _Handover) -> int:
    image = handover.image
    return 0 if image is None else image.width * image.height * len(image.getbands())


def _hashed_ahead(examples: Iterable[Document | Picture]) -> Iterator[Hashed]:
    """Hash examples in threads, a few images ahead. Texts are hashed in place, which takes no time.

    An error of a dataset is raised when its example is asked for, which may never happen.
    """
    waiting: deque[Hashed | Future[Hashed]] = deque()
    source: Iterator[Document | Picture] | None = iter(examples)
    failed: Exception | None = None
    while True:
        while source is not None and len(waiting) <= n_threads():
            try:
                example = next(source)
            except StopIteration:
                source = None
            except Exception as error:
                source, failed = None, error
            else:
                if not isinstance(example, Picture):
                    waiting.append(_hashed(example))
                    break
                waiting.append(threads().submit(_hashed, example))
        if not waiting:
            break
        first = waiting.popleft()
        yield first.result() if isinstance(first, Future) else first
    if failed:
        raise failed


def n_threads() -> int:
    """Number of threads: at most as many as torch has, since each may start as many of torch's own."""
    return min(8, torch.get_num_threads())


@functools.cache
def threads() -> ThreadPoolExecutor:
    """Threads that decode and resize images, which does not hold Python's global lock."""
    return ThreadPoolExecutor(n_threads())
