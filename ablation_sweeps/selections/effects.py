"""Effects of ablating units on the loss of the calibration data: exact, or estimated from gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from jaxtyping import Float, Int
from tqdm import tqdm

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.lazy import torch
from ablation_sweeps.data.batch import NOT_SCORED, Batch
from ablation_sweeps.data.memory import Part, PassLimit, run_in_halves
from ablation_sweeps.models.transformer import Transformer
from ablation_sweeps.neurons.hooks import as_rows, hooked
from ablation_sweeps.neurons.prefix import SharedPrefix
from ablation_sweeps.selections.selection import Selecting

Baseline = Literal["mean", "zero"]


def baseline_values(selecting: Selecting, baseline: Baseline) -> list[Float[torch.Tensor, " _neurons"]]:
    """The values that stand for an ablated neuron: its mean over the calibration data, or zero."""
    if baseline == "zero":
        return [torch.zeros(projection.width) for projection in selecting.projections]
    return [moments.mean.float() for moments in selecting.statistics().moments]


def exact_effects(
    selecting: Selecting, values: list[torch.Tensor], units: Int[torch.Tensor, " n"], tokens: int | None
) -> Float[torch.Tensor, " n"]:
    """Increase of the mean loss, in nats, when each unit alone is ablated.

    Args:
        values: replacement values, `[neurons]` per projection.
        tokens: number of scored positions, or images, to measure it on; the last batch is used whole. None is all.
    """
    model = selecting.model
    masks = {number: selecting.units.masks(unit[None]) for number, unit in enumerate(units)}
    prefix = SharedPrefix(model, selecting.projections)
    depths = prefix.depths(masks)

    def increases(batch: Batch) -> Float[torch.Tensor, " n"]:
        found = torch.zeros(len(units), dtype=torch.float64)
        positions = model.in_scope(batch, selecting.write)
        with torch.inference_mode(), prefix.over_batch({*depths.values()}):
            clean = loss(model, batch)
            for number, mask in masks.items():
                with prefix.ablated(depths[number], mask, values, len(batch.names), positions):
                    found[number] = loss(model, batch) - clean
        return found

    return _mean_over_scored(selecting, increases, tokens, f"{len(units)} exact effects")


def gradient_effects(
    selecting: Selecting, values: list[torch.Tensor], shares: Sequence[float]
) -> Float[torch.Tensor, " units"]:
    """Increase of the mean loss, in nats, when each unit is ablated, estimated from gradients.

    Each unit has a gate z, which writes `value + z (x - value)` in place of an activation x: 1 leaves it alone, and 0
    ablates it. The estimate is minus the derivative of the loss by the gate, averaged over points at which all gates
    have the same value. One pass forwards and one backwards give it for all units.

    Args:
        values: replacement values, `[neurons]` per projection.
        shares: values of the gates at these points. `(1.0,)` is the first-order estimate at the unchanged model; equal
            steps from 0 to 1 give integrated gradients, whose sum over all units is the effect of ablating all.
    """
    model, projections = selecting.model, selecting.projections

    def estimates(batch: Batch) -> Float[torch.Tensor, " units"]:
        positions = model.in_scope(batch, selecting.write)
        found = torch.zeros(len(selecting.units), dtype=torch.float64)
        for share in shares:
            gates = [torch.full((p.width,), share, requires_grad=True) for p in projections]

            def at(layer: int, x: torch.Tensor, gates=gates) -> torch.Tensor:
                rows = as_rows(x, len(batch.names))
                gate, value = gates[layer].to(x.device), values[layer].to(x.device)
                # Exact where the gate is 1: x + 0.
                gated = (rows + (gate - 1) * (rows - value)).to(x.dtype)
                if positions is not None:
                    gated = torch.where(positions.to(x.device)[..., None], gated, rows)
                return gated.reshape(x.shape)

            with torch.enable_grad(), hooked(projections, at):
                gradients = torch.autograd.grad(loss(model, batch), gates)
            for unit_of_neuron, gradient in zip(selecting.units.of_neuron, gradients, strict=True):
                found.index_add_(0, unit_of_neuron, -gradient.double() / len(shares))
        return found

    return _mean_over_scored(selecting, estimates, None, "gradients")


def loss(model: Transformer, batch: Batch) -> Float[torch.Tensor, ""]:
    """Sum of the cross entropy over the scored positions of a batch, in nats, float64."""
    labels = batch.labels.flatten()
    rows = (labels != NOT_SCORED).nonzero()[:, 0]
    logits = model.logits_at(batch, rows).float()
    return torch.nn.functional.cross_entropy(logits, labels[rows], reduction="none").double().sum()


def _mean_over_scored(
    selecting: Selecting, sums_of: Callable[[Batch], torch.Tensor], tokens: int | None, title: str
) -> torch.Tensor:
    """Add up `sums_of` each batch, and divide by the number of scored positions.

    Args:
        tokens: number of scored positions that are enough; None for all.

    Raises:
        UserError: the calibration data have no scored position.
    """
    model, total, n_scored = selecting.model, torch.zeros(()), 0
    limit = PassLimit(model.max_positions_per_pass, selecting.note)
    pieces = [piece for batch in selecting.batches for piece in batch.split_to(model.max_positions_per_pass)]
    for number, piece in enumerate(tqdm(pieces, desc=title, delay=2, leave=False, disable=None)):
        if tokens is not None and n_scored >= tokens:
            break
        whole = Part(piece.to(model.device), (number,))
        total = total + sum(run_in_halves(whole, lambda part: sums_of(part.batch), limit))
        n_scored += int((piece.labels != NOT_SCORED).sum())
    if not n_scored:
        raise UserError("selection: nothing is scored in the calibration data; give longer or more documents")
    return total / n_scored
