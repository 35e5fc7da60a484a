"""Hooks on projections that read or replace their input; they are always removed afterwards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from jaxtyping import Bool, Float

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.lazy import torch


@contextmanager
def ablated(
    projections: list[Projection],
    masks: list[Bool[torch.Tensor, " _neurons"]],
    values: list[torch.Tensor],
    batch: int,
    positions: Bool[torch.Tensor, "batch rows"] | None = None,
) -> Iterator[None]:
    """Context manager: in each forward pass, replace the masked neurons with `values`.

    If no neuron is masked, the logits are bit-equal to the clean ones.

    Args:
        masks: True where a neuron is replaced, one mask per layer.
        values: replacement values, one tensor per layer: `[neurons]`, or `[batch, rows, neurons]`, whose first two
            sizes may be 1.
        batch: number of examples in the batch.
        positions: True where values are written; elsewhere the activation stays as the pass computes it. None: at all
            positions.

    Raises:
        UserError: the shape of the values, or of the positions, does not fit.
    """

    def at(layer: int, x: torch.Tensor) -> torch.Tensor:
        # `where`, not a product with the mask: NaN times zero is NaN.
        rows = as_rows(x, batch)
        _check_shape(values[layer], rows)
        value = values[layer].to(rows, non_blocking=True)
        mask = masks[layer].to(x.device, non_blocking=True)
        if positions is not None:
            _check_positions(positions, rows, projections[layer])
            mask = mask & positions.to(x.device, non_blocking=True)[..., None]
        return torch.where(mask, value, rows).reshape(x.shape)

    with hooked(projections, at):
        yield


def _check_shape(value: torch.Tensor, rows: Float[torch.Tensor, "batch rows neurons"]) -> None:
    """Check the shape of replacement values.

    Two axes are refused: `[positions, neurons]` could not be told from `[examples, neurons]` if both sizes agree.
    """
    fits = all(size in (1, full) for size, full in zip(value.shape[:-1], rows.shape, strict=False))
    if value.ndim not in (1, 3) or value.shape[-1] != rows.shape[-1] or not fits:
        raise UserError(
            f"method: gives values of shape {list(value.shape)} where activations are {list(rows.shape)}, examples, "
            "positions and neurons; give these three, of which the first two may be 1, or the neurons alone"
        )


def _check_positions(
    positions: Bool[torch.Tensor, "batch positions"],
    rows: Float[torch.Tensor, "batch rows neurons"],
    projection: Projection,
) -> None:
    if positions.shape != rows.shape[:2]:
        raise UserError(
            f"scope: {projection.path} has {rows.shape[1]} rows where the input has {positions.shape[1]} positions, so "
            "that it is not known which row is which position; use scope=all"
        )


@contextmanager
def reading(projections: list[Projection], batch: int) -> Iterator[list[torch.Tensor]]:
    """Context manager: gives a list of activations, `[batch, rows, neurons]` per layer, filled by one forward pass."""
    seen: list[torch.Tensor] = []

    def at(layer: int, x: torch.Tensor) -> None:
        seen.append(as_rows(x, batch).clone())

    with hooked(projections, at):
        yield seen


@dataclass(frozen=True)
class Projection:
    """The projection of one layer, whose input features are the neurons.

    A module that a model calls once per layer (ALBERT) appears once for each call.

    Attributes:
        path: module path inside the model.
        width: number of neurons.
        site: name of the site that the projection belongs to.
        layer: number of the layer, as in the path; the order of calls where paths do not tell layers apart.
        order: index among the projections of all layers, of which `site.layers` may take only some.
        n_heads: query heads whose outputs the neurons are, one head after another; None if they belong to no heads.
        n_kv_heads: key/value heads that the query heads share; None if unknown.
    """

    path: str
    module: torch.nn.Module
    width: int
    site: str = ""
    layer: int = 0
    order: int = 0
    n_heads: int | None = None
    n_kv_heads: int | None = None


@contextmanager
def hooked(projections: list[Projection], at: Callable[[int, torch.Tensor], torch.Tensor | None]) -> Iterator[None]:
    """Context manager: call `at(layer, x)` with the input of each projection; a returned tensor replaces `x`.

    Raises:
        AssertionError: on exit, if not every hook fired in every forward pass.
    """
    layers: dict[torch.nn.Module, list[int]] = defaultdict(list)
    for layer, projection in enumerate(projections):
        layers[projection.module].append(layer)
    calls = dict.fromkeys(layers, 0)

    def pre_hook(module: torch.nn.Module, args: tuple) -> tuple | None:
        mine = layers[module]
        layer = mine[calls[module] % len(mine)]
        calls[module] += 1
        replaced = at(layer, args[0])
        return None if replaced is None else (replaced, *args[1:])

    handles = [module.register_forward_pre_hook(pre_hook) for module in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    passes = {calls[module] / len(mine) for module, mine in layers.items()}
    assert len(passes) == 1 and passes.pop() >= 1, "a hook never fired, or not in every forward pass"


def as_rows(x: Float[torch.Tensor, "*any neurons"], batch: int) -> Float[torch.Tensor, "batch rows neurons"]:
    """Reshape activations to one leading axis for examples and one for positions.

    OPT flattens both into one axis before its second MLP layer; Swin splits positions into windows. Both keep the
    examples outermost, so reshaping keeps each example's rows together.
    """
    return x.reshape(batch, -1, x.shape[-1])


def rows_at_a_time(width: int, device: torch.device) -> int:
    """Number of rows to process at once: few enough to stay in a CPU's cache, enough to keep a GPU busy.

    A GPU takes about 50 µs for an operation on 2^24 numbers, and 5 µs to launch it.
    """
    return max(1, (1 << (18 if device.type == "cpu" else 24)) // width)
