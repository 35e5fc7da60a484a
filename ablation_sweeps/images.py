"""Pictures -> batches of pixels, for image classifiers of transformers and timm."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from ablation_sweeps.data import NOT_SCORED, Batch, Document, Picture, Split, UserError
from ablation_sweeps.lazy import torch
from ablation_sweeps.transformer import Budget


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
        limits = [budget.examples, None if budget.tokens is None else -(-budget.tokens // self.tokens)]
        limit = min((n for n in limits if n is not None), default=None)
        size = max(2, batch_tokens // self.tokens)
        batches: list[Batch] = []
        rows: list[tuple[torch.Tensor, Picture]] = []
        count = 0
        for picture in examples:
            if count == limit:
                break
            if not isinstance(picture, Picture):
                raise UserError("dataset: an image classifier needs images; choose e.g. dataset=digits or image_folder")
            if not 0 <= picture.label < self.n_classes:
                raise UserError(
                    f"dataset: {picture.name} has class {picture.label}, but the model knows {self.n_classes} classes; "
                    "choose data with the model's classes (of an image_folder, dataset.classes=FILE gives their order)"
                )
            rows.append((self.transform(picture.image.convert(self.mode)), picture))
            count += 1
            if len(rows) == size:
                batches.append(self._stack(rows, count, split))
                rows = []
        if rows:
            batches.append(self._stack(rows, count, split))
        if not batches:
            raise UserError(f"dataset: the {split} split has no images; check dataset.path")
        if len(batches) > 1 and len(batches[-1].names) == 1:
            batches[-2:] = [_join(*batches[-2:])]  # never one alone: resampling needs another example
        return batches

    def other_input(self, source: str, length: int, seed: int) -> Batch:
        """Random pixels; `length` is of no use, since an image always has the same number of positions."""
        from PIL.Image import fromarray

        if source not in ("random_pixels", "probe"):
            raise UserError(f"method.source={source}: an image classifier takes dataset or random_pixels")
        shape = (256, 256, 3) if self.mode == "RGB" else (256, 256)
        noise = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
        pixels = self.transform(fromarray(noise))[None]
        return Batch({self.key: pixels}, torch.tensor([NOT_SCORED]), None, ("other",), (0,))

    def _stack(self, rows: list[tuple[torch.Tensor, Picture]], count: int, split: Split) -> Batch:
        keep = None
        if self.left_out and split == "calibration":
            keep = (torch.arange(self.tokens) >= self.left_out).expand(len(rows), -1)
        return Batch(
            {self.key: torch.stack([pixels for pixels, _ in rows])},
            torch.tensor([picture.label for _, picture in rows]),
            keep,
            tuple(picture.name for _, picture in rows),
            tuple(range(count - len(rows), count)),
        )


def _join(a: Batch, b: Batch) -> Batch:
    return Batch(
        {key: torch.cat([a.inputs[key], b.inputs[key]]) for key in a.inputs},
        torch.cat([a.labels, b.labels]), None if a.keep is None or b.keep is None else torch.cat([a.keep, b.keep]),
        a.names + b.names, a.index + b.index,
    )  # fmt: skip
