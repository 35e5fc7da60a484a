"""Evaluates every batch at every fraction: metric sums per document, then rows with standard errors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int
from tqdm import tqdm

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.lazy import pd, torch
from ablation_sweeps.data.batch import NOT_SCORED, Batch, prefetch_batches
from ablation_sweeps.data.memory import Part, PassLimit, run_at_once, run_in_halves
from ablation_sweeps.data.scope import Positions
from ablation_sweeps.experiment.chance import _chance
from ablation_sweeps.experiment.clean_passes import CleanPasses
from ablation_sweeps.experiment.score import _clean, _sums, _targets
from ablation_sweeps.methods.method import Replacement, values_of
from ablation_sweeps.models.transformer import Transformer
from ablation_sweeps.neurons.hooks import Projection, reading
from ablation_sweeps.neurons.prefix import SharedPrefix
from ablation_sweeps.neurons.schedule import CLEAN, Point
from ablation_sweeps.results.metrics import SUMS, curve, ratio

if TYPE_CHECKING:
    from ablation_sweeps.experiment.chance import ChanceModel

log = logging.getLogger(__name__)


LEAST = 32  # documents or images needed before a standard error may end the evaluation of a point


def evaluate(
    model: Transformer,
    projections: list[Projection],
    batches: Sequence[Batch],
    masks: dict[Point, list[Bool[torch.Tensor, " _neurons"]]],
    replacement: Replacement,
    common: Int[torch.Tensor, " common"],
    top_k: int,
    done: Sequence[pd.DataFrame],
    save: Callable[[int, pd.DataFrame], None],
    note: Callable[[str], None] = log.warning,
    target_stderr: float | None = None,
    clean: CleanPasses | None = None,
    write: Positions = "all",
) -> pd.DataFrame:
    """Run one clean pass over each batch, then one ablated pass at each point that is not precise enough yet.

    Layers below the first ablated one are left out where that is exact (see `SharedPrefix`).

    Args:
        masks: for each point, one mask per layer; the clean pass needs none.
        common: ids of the most common tokens, which the skip metrics leave out.
        done: the metric sums of each batch that was finished before an interruption; these batches are not run again.
        save: called with the number of each batch and its metric sums, as soon as they are known.
        note: called with a warning if the device has too little memory for a batch, which is then halved.
        target_stderr: standard error of the mean loss, in nats, at which a point needs no more batches. None: every
            point is evaluated on all batches.
        clean: cache of clean logits, which earlier jobs with the same batches may have filled.
        write: positions at which values are written.

    Returns:
        One row per document and point with the columns `SUMS`: sums over the document's scored positions. The column
        `unit` says which unit is ablated alone, where one is; -1 in the clean pass. With a `target_stderr`, a point may
        cover only the first documents, so two curves share those of the shorter one.

    Raises:
        UserError: the model gives logits that are not finite, or no position is scored.
    """
    device = model.device
    prefix = SharedPrefix(model, projections)
    depths = prefix.depths(masks)
    masks = {point: [mask.to(device) for mask in layers] for point, layers in masks.items()}
    target_stderr = target_stderr if masks else None  # it only concerns points with ablated neurons
    clean = clean or CleanPasses(model)
    limit = PassLimit(model.max_positions_per_pass, note)
    passes = Passes(
        model, projections, masks, replacement, common.to(device), top_k, clean, limit, write, prefix, depths
    )
    parts = list(done)
    bar = tqdm(batches, desc=f"{model.label}, {len(masks) + 1} passes a batch", delay=2, leave=False, disable=None)
    to_do = prefetch_batches(batches[len(done) :])
    for number, batch in enumerate(bar):
        if number >= len(done):
            with torch.inference_mode():
                sums = passes.sums(Part(next(to_do).to(device), (number,)))
            _check_finite(sums, model)
            parts.append(_frame(sums, batch))
            save(number, parts[-1])
        if target_stderr is not None and _are_first(batches[: number + 1]):
            passes.masks = _imprecise(passes.masks, parts[: number + 1], target_stderr)
            if not passes.masks:
                break
    pieces = pd.concat(parts, ignore_index=True)
    keys = [key for key in ("fraction", "unit", "document") if key in pieces]
    pieces = pieces.groupby(keys, as_index=False)
    documents = pieces.agg({"name": "first", **dict.fromkeys(SUMS, "sum")})
    if target_stderr is not None:
        scored = sum(int((batch.labels != NOT_SCORED).sum()) for batch in batches)
        share = documents.loc[documents["fraction"] > 0, "n"].sum() / scored / len(masks)
        missed = ", ".join(f"{point.fraction:.0%}" for point in _imprecise(masks, parts, target_stderr))
        result = f"taken, and not enough at {missed}" if missed else "enough"
        log.info("eval.target_stderr=%g: %.0f %% of the data was %s", target_stderr, 100 * share, result)
    if not documents["n"].sum():
        raise UserError("dataset: nothing is scored in the evaluation split; give longer or more documents")
    return documents


def _are_first(batches: Sequence[Batch]) -> bool:
    """True if the batches hold exactly the first documents of the data: a batch of long ones is a biased sample."""
    places = [place for batch in batches for place in batch.index]
    return len(places) >= LEAST and max(places) + 1 == len(places)


def _imprecise(
    masks: dict[Point, list[Bool[torch.Tensor, " _neurons"]]], parts: list[pd.DataFrame], target_stderr: float
) -> dict[Point, list[Bool[torch.Tensor, " _neurons"]]]:
    """The points of a curve whose standard error is not yet at most the target."""
    loss = pd.concat(parts).groupby("fraction")
    stderr = {fraction: ratio(group["loss"].to_numpy(), group["n"].to_numpy())[1] for fraction, group in loss}
    return {point: layers for point, layers in masks.items() if not stderr[point.fraction] <= target_stderr}


ScoreSums = dict[Point, Float[np.ndarray, "batch sums"]]


@dataclass
class Passes:
    """Runs the forward passes over one batch: the clean one, then one at each point. See `evaluate`."""

    model: Transformer
    projections: list[Projection]
    masks: dict[Point, list[Bool[torch.Tensor, " _neurons"]]]
    replacement: Replacement
    common: Int[torch.Tensor, " common"]
    top_k: int
    clean: CleanPasses
    limit: PassLimit
    write: Positions
    prefix: SharedPrefix
    depths: dict[Point, int]

    def sums(self, whole: Part) -> ScoreSums:
        """Metric sums (`SUMS`) of a batch at each point. A batch that is too large for one pass is run in parts."""
        batch = whole.batch
        if self.replacement.reads_clean:
            at_once = run_at_once(batch, lambda: self._sums(whole, None), self.limit)
            if at_once is not None:
                return at_once
            values = self._values(batch.to(torch.device("cpu")), self._clean_activations(whole))
        else:
            values = self._values(batch, [])
        sums = run_in_halves(whole, lambda part: self._sums(part, _values_of_part(values, batch, part)), self.limit)
        return {point: np.concatenate([of_part[point] for of_part in sums]) for point in sums[0]}

    def _values(self, batch: Batch, clean: list[torch.Tensor]) -> list[torch.Tensor]:
        return values_of(self.replacement, batch, clean, len(self.projections))

    def _sums(self, part: Part, values: list[torch.Tensor] | None) -> ScoreSums:
        """Metric sums from one pass at each point.

        Args:
            values: replacement values. None: they are computed from the activations of the clean pass.
        """
        with self.prefix.over_batch({self.depths[point] for point in self.masks}):
            return self._sums_over(part, values)

    def _sums_over(self, part: Part, values: list[torch.Tensor] | None) -> ScoreSums:
        batch = part.batch
        size, targets = len(batch.names), _targets(batch)
        if values is None:
            with reading(self.projections, size) as clean_activations:
                logits = self.model.logits_at(batch, targets.rows)
            values = self._values(batch, clean_activations)
            del clean_activations
        else:
            logits = self.clean.logits(part.key, batch, targets.rows)
        clean = _clean(logits)
        sums = {CLEAN: _sums(logits, clean, targets, self.common, self.top_k)}
        positions = self.model.in_scope(batch, self.write)
        for point in sorted(self.masks, key=lambda point: -self.depths[point]):
            del logits  # there may not be room for two of them
            with self.prefix.ablated(self.depths[point], self.masks[point], values, size, positions):
                logits = self.model.logits_at(batch, targets.rows)
            sums[point] = _sums(logits, clean, targets, self.common, self.top_k)
        # Copy to the CPU only after the last pass: a GPU is idle while its results are waited for.
        points = [CLEAN, *self.masks]
        return dict(zip(points, torch.stack([sums[point] for point in points]).cpu().numpy(), strict=True))

    def _clean_activations(self, whole: Part) -> list[torch.Tensor]:
        """Clean activations of all examples, `[batch, rows, neurons]` per layer, from several passes if necessary.

        They are returned in main memory, since they may be what did not fit.
        """

        def run(part: Part) -> list[torch.Tensor]:
            with reading(self.projections, len(part.batch.names)) as activations:
                if part.key in self.clean.kept:
                    self.model.body(part.batch)
                else:  # the clean logits are needed next
                    self.clean.logits(part.key, part.batch, _targets(part.batch).rows)
            return [x.cpu() for x in activations]

        parts = run_in_halves(whole, run, self.limit)
        return [_stacked(of_layer) for of_layer in zip(*parts, strict=True)]


def _values_of_part(values: list[torch.Tensor], whole: Batch, part: Part) -> list[torch.Tensor]:
    """Select the values of the examples of one part of a batch from the values for the whole batch.

    Values that all examples share are kept whole. Texts that run separately (`apart`) have fewer positions.
    """
    n, width = len(whole.names), part.batch.labels.shape[-1]
    rows = slice(part.start, part.start + len(part.batch.names))
    own = [value[rows] if value.ndim == 3 and len(value) == n else value for value in values]
    return [value[:, :width] if value.ndim == 3 and whole.apart else value for value in own]


def _stacked(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Join the activations of parts of a batch, `[batch, rows, neurons]`, padded where texts ran separately."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, 0, 0, width - part.shape[1])) for part in parts])


def _check_finite(sums: ScoreSums, model: Transformer) -> None:
    for point, values in sums.items():
        if not np.isfinite(values).all():
            if point != CLEAN:
                raise UserError(
                    f"method: gives NaN or infinite logits with {point.fraction:.0%} of the units ablated; check the "
                    "values that it writes, and try model.dtype=float32"
                )
            raise UserError(
                f"model={model.label}: gives NaN or infinite logits before anything is ablated; check its weights and "
                "model.dtype"
            )


def _frame(sums: ScoreSums, batch: Batch) -> pd.DataFrame:
    documents = batch.documents or batch.index
    frames = [
        pd.DataFrame({"fraction": point.fraction, "unit": point.unit, "document": documents, "name": batch.names}).join(
            pd.DataFrame(values, columns=list(SUMS))
        )
        for point, values in sums.items()
    ]
    table = pd.concat(frames, ignore_index=True)
    return table if (table["unit"] >= 0).any() else table.drop(columns="unit")


def metrics(
    documents: pd.DataFrame, guess: ChanceModel, labels: Int[torch.Tensor, " scored"], top_k: int
) -> pd.DataFrame:
    """The metrics at every fraction (see `metrics.curve`), each with its chance level."""
    return curve(documents, top_k, len(guess.common), _chance(guess, labels, top_k))
