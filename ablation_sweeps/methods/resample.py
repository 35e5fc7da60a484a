"""Resample ablation: replace a neuron with its activation at the same position of another input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from jaxtyping import Float
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as validated

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.lazy import torch
from ablation_sweeps.data.batch import Batch, Modality
from ablation_sweeps.methods.method import Fitting, Replacement
from ablation_sweeps.neurons.hooks import reading

Source = Literal["dataset", "random_input", "random_characters", "random_tokens", "generated", "random_pixels"]

TEXT_SOURCES = ("dataset", "random_input", "random_characters", "random_tokens", "generated")
IMAGE_SOURCES = ("dataset", "random_input", "random_pixels")
RANDOM_INPUT = {"text": "random_characters", "image": "random_pixels"}


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Resample:
    """Activations of another input, position by position.

    Attributes:
        source: the other input.
            dataset: another example of the same batch, whose clean activations stay in distribution.
            random_characters, random_tokens, generated (sampled from the model itself), random_pixels: one fixed input
                for all examples, as in the paper.
            random_input: random_characters for text, random_pixels for images.
        as_run: reproduce the paper's published runs: text number i gets the activation of position i at all its
            positions, or zero if the other input is shorter than that. Not for source=dataset.
        length: positions of the other input, only with as_run; otherwise it is as long as the longest example.

    Source: arXiv:2408.17322. Departs from it in: source=dataset, and position by position as the default.
    """

    label: str
    source: Source
    as_run: bool
    length: Annotated[int, Field(ge=1)] | None

    def check(self, modality: Modality) -> None:
        """Refuse a source that does not suit the model's inputs, or options that have no effect with it."""
        suits = IMAGE_SOURCES if modality == "image" else TEXT_SOURCES
        if self.source not in suits:
            raise UserError(f"method.source={self.source}: is not for {modality}s; choose one of {', '.join(suits)}")
        if self.source == "dataset" and self.as_run:
            raise UserError("method.as_run=true: has no meaning with method.source=dataset; choose another source")
        if self.length is not None and not self.as_run:
            raise UserError(
                f"method.length={self.length}: changes nothing without method.as_run=true, where the other input is as "
                "long as the longest example; leave it null"
            )

    def fit(self, fitting: Fitting) -> Replacement:
        """Run the other input, if there is a fixed one, and keep its activations."""
        if self.source == "dataset":
            return AnotherExample()
        length = self.length if self.as_run and self.length else fitting.length
        source = RANDOM_INPUT[fitting.model.modality] if self.source == "random_input" else self.source
        batch = fitting.model.other_input(source, length, fitting.seed).to(fitting.model.device)
        with torch.inference_mode(), reading(fitting.projections, 1) as activations:
            fitting.model.body(batch)
        return OneForEachText([x[0] for x in activations]) if self.as_run else PositionByPosition(activations)


@dataclass(frozen=True)
class AnotherExample:
    """Activations of the example before it in the batch (the last one for the first), of another document if possible.

    A shorter example is repeated from its start.
    """

    reads_clean = True

    def __call__(self, batch: Batch, clean: list[torch.Tensor]) -> list[torch.Tensor]:
        size = len(batch.names)
        if size < 2:
            raise UserError("method.source=dataset: needs another example; evaluate two documents or more")
        donor = torch.tensor(_donors(batch.documents or batch.index))
        if batch.keep is None:
            return [x[donor.to(x.device)] for x in clean]
        lengths = batch.keep.sum(1).cpu()[donor]
        position = torch.arange(batch.keep.shape[1]) % lengths[:, None]
        return [x[donor[:, None].to(x.device), position.to(x.device)] for x in clean]


def _donors(documents: Sequence[int]) -> list[int]:
    size = len(documents)
    return [
        next((d for d in range(row - 1, row - size, -1) if documents[d] != document), row - 1) % size
        for row, document in enumerate(documents)
    ]


@dataclass(frozen=True)
class PositionByPosition:
    """Activations of the other input at the same position.

    Attributes:
        other: `[1, rows, neurons]` per layer, with at least as many rows as the examples have positions.
    """

    other: list[Float[torch.Tensor, "1 _rows _neurons"]]
    reads_clean = False

    def __call__(self, batch: Batch, clean: list[torch.Tensor]) -> list[torch.Tensor]:
        if batch.keep is None:
            return self.other
        return [x[:, : batch.keep.shape[1]] for x in self.other]


@dataclass(frozen=True)
class OneForEachText:
    """Replacement of the paper's published runs: one position of the other input serves a whole text."""

    other: list[Float[torch.Tensor, "_rows _neurons"]]
    reads_clean = False

    def __call__(self, batch: Batch, clean: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.stack([_row_or_zero(x, i) for i in batch.index])[:, None] for x in self.other]


def _row_or_zero(x: Float[torch.Tensor, "rows neurons"], i: int) -> Float[torch.Tensor, " neurons"]:
    return x[i] if i < len(x) else torch.zeros_like(x[0])
