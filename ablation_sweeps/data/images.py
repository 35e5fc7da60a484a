"""Turns images into batches of pixels, for image classifiers from transformers and timm."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np
from jaxtyping import Bool, Float

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.lazy import torch
from ablation_sweeps.data.batch import NOT_SCORED, Batch, Document, LazyPixels, Picture, Split
from ablation_sweeps.data.encoder import Budget
from ablation_sweeps.data.intake import threads, upright
from ablation_sweeps.data.scope import Positions

MAX_PIXEL_BYTES = 1 << 30  # pixels of one split that stay in memory


@dataclass(frozen=True)
class ImageEncoder:
    """Implements `Encoder` and `OtherInput` with the model's own image transform.

    Attributes:
        transform: turns an image into pixels, `[channels, height, width]`.
        key: name of the pixels in the model's forward.
        mode: PIL's name of the colours that the model takes: "RGB" or "L".
        n_classes: number of classes; labels are below it.
        tokens: positions per image inside the model.
        n_special: number of positions before the patches (CLS, registers); None if unknown.
        counts_special: False if these do not enter the statistics.
    """

    transform: Callable[..., torch.Tensor]
    key: str
    mode: str
    n_classes: int
    tokens: int
    n_special: int | None = None
    counts_special: bool = True

    def __call__(
        self, examples: Iterable[Document | Picture], split: Split, budget: Budget, batch_tokens: int, seed: int
    ) -> list[Batch]:
        """Batches of at most `batch_tokens` positions, or two images. A budget in tokens is rounded up to an image."""
        counted = self.tokens - (self._left_out(budget.scope) if split == "calibration" else 0)  # positions per image
        limits = [budget.examples, None if budget.tokens is None else -(-budget.tokens // counted)]
        limit = min((n for n in limits if n is not None), default=None)
        pictures: list[Picture] = []
        made: list[Future[torch.Tensor]] = []  # pixels of the first images, which stay in memory
        n_kept = 1
        for example in islice(examples, limit):
            pictures.append(self._checked(example))
            if len(made) < n_kept:
                made.append(threads().submit(self._pixels, pictures[-1]))
            if len(pictures) == 1:
                n_kept = MAX_PIXEL_BYTES // made[0].result().nbytes
        if not pictures:
            raise UserError(f"dataset: the {split} split has no images; check dataset.path")
        budget.say_if_short(split, len(pictures) * counted)
        size = max(2, batch_tokens // self.tokens)
        starts = range(0, max(1, len(pictures) - 1), size)  # never a single one: resampling needs another example
        rest = deque(made[:n_kept])
        del made
        left_out = self._left_out(budget.scope) if split == "calibration" else 0
        return [self._batch(pictures, range(*ends), left_out, rest) for ends in pairwise([*starts, len(pictures)])]

    def _left_out(self, scope: Positions) -> int:
        """Number of positions at the beginning that do not enter the statistics."""
        return max(0 if self.counts_special else self.n_special or 0, self._first(scope))

    def in_scope(self, batch: Batch, scope: Positions) -> Bool[torch.Tensor, "batch pos"] | None:
        """Positions in scope; None if all are.

        Raises:
            UserError: images have no such scope.
        """
        first = self._first(scope)
        at = torch.arange(self.tokens, device=batch.labels.device)
        return (at >= first).expand(len(batch.labels), -1) if first else None

    def _first(self, scope: Positions) -> int:
        """Number of the first position in scope."""
        first = {"all": 0, "not_first": 1, "no_special": self.n_special}.get(scope)
        if first is None:
            raise UserError(
                f"scope={scope}: the positions of an image in this model have no such part; use scope=all or "
                "scope=not_first"
            )
        return first

    def pixels(self, pictures: Sequence[Picture]) -> Float[torch.Tensor, "batch channels height width"]:
        """Pixels of some images, transformed in threads."""
        return _stacked([threads().submit(self._pixels, picture) for picture in pictures])

    def _pixels(self, picture: Picture) -> torch.Tensor:
        return self.transform(upright(picture).convert(self.mode))  # upright, as `datasets` gives them

    def other_input(self, source: str, length: int, seed: int) -> Batch:
        """Random pixels; `length` is ignored, since every image has the same number of positions."""
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
                "choose data with the model's classes (for image_folder, dataset.classes=FILE gives their order)"
            )
        return example

    def _batch(self, pictures: list[Picture], places: range, left_out: int, made: deque[Future[torch.Tensor]]) -> Batch:
        """Batch of the images at `places`.

        Args:
            left_out: number of positions at the beginning that do not enter the statistics.
            made: pixels of the images from here on, as far as they fit into memory; others are made when needed. Those
                of this batch are removed.
        """
        some = pictures[places.start : places.stop]
        if len(made) < len(some):
            made.clear()
        pixels = _stacked([made.popleft() for _ in some]) if made else None
        inputs = LazyPixels(self.key, self.pixels, some) if pixels is None else {self.key: pixels}
        keep = None
        if left_out:
            keep = (torch.arange(self.tokens) >= left_out).expand(len(some), -1)
        labels = torch.tensor([picture.label for picture in some])
        return Batch(inputs, labels, keep, tuple(picture.name for picture in some), tuple(places))


def _stacked(made: Sequence[Future[torch.Tensor]]) -> Float[torch.Tensor, "batch channels height width"]:
    return torch.stack([pixels.result() for pixels in made])
