"""Examples and batches, the plain types that pass from datasets through models to metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.lazy import torch

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


Split = Literal["train", "calibration", "evaluation"]
SPLITS: tuple[Split, ...] = ("calibration", "evaluation")  # splits that every dataset has
Modality = Literal["text", "image"]

NOT_SCORED = -100  # label of a position that is not scored; torch's cross entropy ignores the same


@dataclass(frozen=True)
class Document:
    """One text: the unit that is split, truncated, and resampled for confidence intervals."""

    name: str
    text: str


@dataclass(frozen=True)
class Picture:
    """One labelled image.

    Attributes:
        read: opens and decodes the image; called only when needed, since decoded images take much memory.
    """

    name: str
    read: Callable[[], Image]
    label: int


@dataclass(frozen=True)
class LazyPixels(Mapping[str, "Tensor"]):
    """Inputs of a batch of images, computed at each access, since those of all batches may not fit into memory."""

    key: str
    make: Callable[[Sequence[Picture]], Tensor]
    examples: Sequence[Picture]

    def __getitem__(self, key: str) -> Tensor:
        if key != self.key:
            raise KeyError(key)
        return self.make(self.examples)

    def __iter__(self) -> Iterator[str]:
        return iter((self.key,))

    def __len__(self) -> int:
        return 1

    def __contains__(self, key: object) -> bool:
        return key == self.key


@dataclass(frozen=True)
class Batch:
    """Inputs of a forward pass, which may be run at once or in parts, and the labels to score it against.

    Attributes:
        inputs: keyword arguments of the model's forward, whose first axis is the examples; token ids are called
            `input_ids`.
        labels: `[batch, pos]` token ids, or `[batch]` classes; NOT_SCORED where nothing is scored.
            Already shifted: the logits at a position are scored against the label at that position.
        keep: `[batch, pos]`, True where a position enters the statistics (no padding). None: all of them.
        names: name of the document, piece of a document, or image in each row.
        index: position of each row in the dataset, whatever the batching.
        documents: position in the dataset of each row's document, since pieces of one document are not independent.
            None: each row is a document.
        apart: True if texts of different lengths must be run separately, without padding, since the model's scores
            depend on the length of the longest one.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor
    keep: Tensor | None
    names: tuple[str, ...]
    index: tuple[int, ...]
    documents: tuple[int, ...] | None = None
    apart: bool = False

    @property
    def size(self) -> int:
        """Number of positions, padding included, or of images."""
        return self.labels.numel()

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        return replace(
            self,
            inputs={key: value.to(device) for key, value in self.inputs.items()},
            labels=self.labels.to(device),
            keep=None if self.keep is None else self.keep.to(device),
        )

    def split_in_two(self) -> tuple[Batch, Batch]:
        """Split the batch into its first and its last examples, padded as before.

        With `apart`, the first part has all texts that are as long as the first one, and neither part has more padding
        than it needs.

        Raises:
            UserError: the batch has a single example.
        """
        if len(self.names) < 2:
            positions = self.labels.shape[-1] if self.labels.ndim > 1 else "its"
            raise UserError(
                f"model.device: has too little memory for one example with {positions} positions; try "
                "model.dtype=bfloat16, shorter documents (model.max_tokens), or model.device_map=auto"
            )
        lengths = self._lengths() if self.apart else []
        different = (row for row, n in enumerate(lengths) if n != lengths[0])
        middle = next(different, (len(self.names) + 1) // 2)
        first, last = slice(None, middle), slice(middle, None)
        return self._part(first), self._part(last)

    def fits(self, positions: int) -> bool:
        """True if the batch can be run in one pass.

        It may have at most `positions` positions (or images), unless it is a single example, and no lengths that must
        be run separately.
        """
        if self.apart and len(set(self._lengths())) > 1:
            return False
        return self.size <= positions or len(self.names) == 1

    def split_to(self, positions: int) -> Iterator[Batch]:
        """Split the batch in two, and the parts again, until each fits."""
        if self.fits(positions):
            yield self
        else:
            for half in self.split_in_two():
                yield from half.split_to(positions)

    def _lengths(self) -> list[int]:
        return self.inputs["attention_mask"].sum(1).tolist()

    def _part(self, rows: slice) -> Batch:
        whole = self.inputs
        part = Batch(
            inputs=replace(whole, examples=whole.examples[rows])
            if isinstance(whole, LazyPixels)
            else {key: value[rows] for key, value in whole.items()},
            labels=self.labels[rows],
            keep=None if self.keep is None else self.keep[rows],
            names=self.names[rows],
            index=self.index[rows],
            documents=self.documents and self.documents[rows],
            apart=self.apart,
        )
        if not self.apart:
            return part
        width = max(part._lengths())
        return replace(
            part,
            inputs={key: value[:, :width] for key, value in part.inputs.items()},
            labels=part.labels[:, :width],
            keep=None if part.keep is None else part.keep[:, :width],
        )


def pad_and_stack(*batches: Batch) -> Batch:
    """Join single examples to one batch, for a probe. Shorter texts are padded on the right, with attention mask 0."""
    width = max(batch.labels.shape[-1] for batch in batches)

    def stacked(rows: list[Tensor], value: int = 0) -> Tensor:
        missing = (width - batch.labels.shape[-1] for batch in batches)
        return torch.cat([torch.nn.functional.pad(x, (0, n), value=value) for x, n in zip(rows, missing, strict=True)])

    return Batch(
        {key: stacked([batch.inputs[key] for batch in batches]) for key in batches[0].inputs},
        stacked([batch.labels for batch in batches], NOT_SCORED),
        None,
        tuple(str(i) for i in range(len(batches))),
        tuple(range(len(batches))),
    )


def prefetch_batches(batches: Sequence[Batch]) -> Iterator[Batch]:
    """Iterate over the batches with their inputs ready: a thread makes the inputs of the next batch meanwhile.

    Inputs are made in main memory; the memory of the model's device is left for the computation.
    """
    loader = ThreadPoolExecutor(1)
    made = (loader.submit(lambda batch=batch: replace(batch, inputs=dict(batch.inputs))) for batch in batches)
    try:
        following = next(made, None)
        while following is not None:
            here, following = following, next(made, None)
            yield here.result()
    finally:
        loader.shutdown(cancel_futures=True)
