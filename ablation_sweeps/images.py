"""Pictures -> batches of pixels, for image classifiers of transformers and timm."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np
from jaxtyping import Float

from ablation_sweeps.data import NOT_SCORED, Batch, Document, LazyPixels, Picture, Split, UserError
from ablation_sweeps.lazy import torch
from ablation_sweeps.transformer import Budget

ROOM = 1 << 30  # bytes of pixels that stay in memory, of a split


@dataclass(frozen=True)
class ImageEncoder:
    """Implements `transformer.Encoder` and `transformer.OtherInput` with the model's own image transform.

    Attributes:
        transform: picture to pixels, `[channels, height, width]`.
        key: name of the pixels in the model's forward.
        mode: PIL's name of the colours the model sees: "RGB" or "L".
        n_classes: labels are below it.
        tokens: positions of one image inside the model.
        left_out: so many at its beginning (CLS, registers) do not enter the statistics.
    """

    transform: Callable[..., torch.Tensor]
    key: str
    mode: str
    n_classes: int
    tokens: int
    left_out: int = 0

    def __call__(
        self, examples: Iterable[Document | Picture], split: Split, budget: Budget, batch_tokens: int, seed: int
    ) -> list[Batch]:
        """Batches of `batch_tokens` positions; a budget in tokens is met with the last image that exceeds it."""
        counted = self.tokens - (self.left_out if split == "calibration" else 0)  # positions of an image that do
        limits = [budget.examples, None if budget.tokens is None else -(-budget.tokens // counted)]
        limit = min((n for n in limits if n is not None), default=None)
        pictures = [self._checked(example) for example in islice(examples, limit)]
        if not pictures:
            raise UserError(f"dataset: the {split} split has no images; check dataset.path")
        budget.say_if_short(split, len(pictures) * counted)
        size = max(2, batch_tokens // self.tokens)
        starts = range(0, max(1, len(pictures) - 1), size)  # never one alone: resampling needs another example
        n_kept = ROOM // self.pixels(pictures[:1]).nbytes
        return [self._batch(pictures, range(*ends), split, n_kept) for ends in pairwise([*starts, len(pictures)])]

    def pixels(self, pictures: Sequence[Picture]) -> Float[torch.Tensor, "batch channels height width"]:
        return torch.stack(list(_threads().map(self._pixels, pictures)))

    def _pixels(self, picture: Picture) -> torch.Tensor:
        from PIL.ImageOps import exif_transpose

        image = picture.read()
        if image.mode[0] in "IF":  # PIL would cut off what is above 255
            raise UserError(
                f"dataset: the image {picture.name} has more than 8 bits a pixel (PIL's mode {image.mode}), so that it "
                "is not known which value is white; save it with 8 bits"
            )
        return self.transform(exif_transpose(image).convert(self.mode))  # upright, as `datasets` gives them

    def other_input(self, source: str, length: int, seed: int) -> Batch:
        """Random pixels; `length` is of no use, since an image always has the same number of positions."""
        from PIL.Image import fromarray

        if source not in ("random_pixels", "probe"):
            raise UserError(f"method.source={source}: an image classifier takes dataset or random_pixels")
        shape = (256, 256, 3) if self.mode == "RGB" else (256, 256)
        noise = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
        pixels = self.transform(fromarray(noise))[None]
        return Batch({self.key: pixels}, torch.tensor([NOT_SCORED]), None, ("other",), (0,))

    def _checked(self, example: Document | Picture) -> Picture:
        if not isinstance(example, Picture):
            raise UserError("dataset: an image classifier needs images; choose e.g. dataset=digits or image_folder")
        if not 0 <= example.label < self.n_classes:
            raise UserError(
                f"dataset: {example.name} has class {example.label}, but the model knows {self.n_classes} classes; "
                "choose data with the model's classes (of an image_folder, dataset.classes=FILE gives their order)"
            )
        return example

    def _batch(self, pictures: list[Picture], places: range, split: Split, n_kept: int) -> Batch:
        """Args:
        n_kept: of so many pictures, the first ones, the pixels stay in memory.
        """
        some = pictures[places.start : places.stop]
        inputs = {self.key: self.pixels(some)} if places.stop <= n_kept else LazyPixels(self.key, self.pixels, some)
        keep = None
        if self.left_out and split == "calibration":
            keep = (torch.arange(self.tokens) >= self.left_out).expand(len(some), -1)
        labels = torch.tensor([picture.label for picture in some])
        return Batch(inputs, labels, keep, tuple(picture.name for picture in some), tuple(places))


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """They decode and resize without Python's lock. No more of them, since torch gives each as many of its own."""
    return ThreadPoolExecutor(min(8, torch.get_num_threads()))
