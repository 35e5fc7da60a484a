"""Hooks on projections: reading activations and writing replacements, always unhooked afterwards."""

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
    projections: list[Projection], masks: list[Bool[torch.Tensor, " _neurons"]], values: list[torch.Tensor], batch: int
) -> Iterator[None]:
    """Writes `values` where the masks, one a layer, are True. No neuron masked: the logits are bit-equal to the clean
    ones.

    Raises:
        UserError: the values do not fit.
    """

    def at(layer: int, x: torch.Tensor) -> torch.Tensor:
        # `where`, not a product with the mask: NaN times zero is NaN.
        rows = as_rows(x, batch)
        _check_shape(values[layer], rows)
        value = values[layer].to(rows, non_blocking=True)
        return torch.where(masks[layer].to(x.device, non_blocking=True), value, rows).reshape(x.shape)

    with hooked(projections, at):
        yield


def _check_shape(value: torch.Tensor, rows: Float[torch.Tensor, "batch rows neurons"]) -> None:
    """Two axes would be taken for positions and neurons, also where examples are meant, if there are as many."""
    fits = all(size in (1, full) for size, full in zip(value.shape[:-1], rows.shape, strict=False))
    if value.ndim not in (1, 3) or value.shape[-1] != rows.shape[-1] or not fits:
        raise UserError(
            f"method: gives values of shape {list(value.shape)} where activations are {list(rows.shape)}, examples, "
            "positions and neurons; give these three, of which the first two may be 1, or the neurons alone"
        )


@contextmanager
def reading(projections: list[Projection], batch: int) -> Iterator[list[torch.Tensor]]:
    """Gives a list that holds, after one forward pass, each layer's activations, `[batch, rows, neurons]`."""
    seen: list[torch.Tensor] = []

    def at(layer: int, x: torch.Tensor) -> None:
        seen.append(as_rows(x, batch).clone())

    with hooked(projections, at):
        yield seen


@dataclass(frozen=True)
class Projection:
    """One layer's site. A module that a model calls once a layer (ALBERT) appears once for each call."""

    path: str
    module: torch.nn.Module
    width: int


@contextmanager
def hooked(projections: list[Projection], at: Callable[[int, torch.Tensor], torch.Tensor | None]) -> Iterator[None]:
    """Calls `at(layer, x)` with the input of each projection; a tensor it returns takes the place of `x`.

    Raises:
        AssertionError: on leaving, if the hooks did not all fire in every forward pass.
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
    """One leading axis for the examples and one for their positions.

    OPT flattens both into one before its second MLP layer; Swin splits positions into windows. Both keep the examples
    outermost, so the view is the same.
    """
    return x.reshape(batch, -1, x.shape[-1])


def rows_at_a_time(width: int, device: torch.device) -> int:
    """So few that on a CPU what is computed of them stays in its cache; so many that a GPU has enough to do: it needs
    some 50 µs for an operation on 2^24 numbers, and 5 to begin with it."""
    return max(1, (1 << (18 if device.type == "cpu" else 24)) // width)
