"""Units of ablation: a partition of the neurons into groups that are switched off as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Bool, Int
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as validated

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.lazy import torch
from ablation_sweeps.neurons.hooks import Projection

Kind = Literal["neuron", "head", "kv_group", "layer"]


@dataclass(frozen=True)
class Units:
    """The units of a model, numbered from 0, layer by layer.

    Attributes:
        kind: what a unit is.
        of_neuron: number of the unit that each neuron belongs to, one tensor per projection.
        layer: number of each unit's layer.
        index: number of each unit within its layer: first those of the attention, then those of the MLP.
        group: number of each unit's projection, in which a share of the units is chosen by `within=layer`. A unit that
            is a whole layer has none to share; then all units are in group 0.
    """

    kind: Kind
    of_neuron: list[Int[torch.Tensor, " _neurons"]]
    layer: Int[torch.Tensor, " units"]
    index: Int[torch.Tensor, " units"]
    group: Int[torch.Tensor, " units"]

    def __len__(self) -> int:
        return len(self.layer)

    def masks(self, units: Int[torch.Tensor, " ablated"]) -> list[Bool[torch.Tensor, " _neurons"]]:
        """The mask of these units: True for each of their neurons, one tensor per projection."""
        is_ablated = torch.zeros(len(self), dtype=torch.bool)
        is_ablated[units] = True
        return [is_ablated[unit] for unit in self.of_neuron]

    def number(self, layer: int, index: int) -> int | None:
        """Number of the unit with this place in a layer; None if there is none."""
        found = ((self.layer == layer) & (self.index == index)).nonzero()[:, 0]
        return int(found[0]) if len(found) else None


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Unit:
    """Kind of unit, which is ablated as a whole.

    Attributes:
        name: "neuron"; "head", the neurons of one query head; "kv_group", all query heads that share a key/value head;
            "layer", all neurons of a layer, at both sites with `site=both`.
    """

    name: Kind

    def partition(self, projections: Sequence[Projection]) -> Units:
        """Divide the neurons of the projections into units.

        Raises:
            UserError: the neurons of a projection belong to no heads, or the number of heads is unknown.
        """
        if self.name == "layer":
            layers = sorted({projection.layer for projection in projections})
            of_neuron = [torch.full((p.width,), layers.index(p.layer)) for p in projections]
            nothing = torch.zeros(len(layers), dtype=torch.long)
            return Units(self.name, of_neuron, torch.tensor(layers), nothing, nothing)
        of_neuron, layer, index, group = [], [], [], []
        used: dict[int, int] = {}  # number of units so far in each layer
        for number, projection in enumerate(projections):
            n_units = self._units_in(projection)
            of_neuron.append(len(layer) + torch.arange(projection.width) // (projection.width // n_units))
            start = used.get(projection.layer, 0)
            used[projection.layer] = start + n_units
            layer += [projection.layer] * n_units
            index += range(start, start + n_units)
            group += [number] * n_units
        return Units(self.name, of_neuron, torch.tensor(layer), torch.tensor(index), torch.tensor(group))

    def _units_in(self, projection: Projection) -> int:
        if self.name == "neuron":
            return projection.width
        n_units = projection.n_heads if self.name == "head" else projection.n_kv_heads
        if n_units is None:
            reason = "no attention over heads" if projection.n_heads is None else "an unknown number of key/value heads"
            raise UserError(
                f"unit={self.name}: {projection.path} ends a block with {reason}; use site=attn_pre_out of a "
                "model with such heads, or unit=neuron"
            )
        if projection.width % n_units:
            raise UserError(
                f"unit={self.name}: the {projection.width} neurons of {projection.path} cannot be divided among "
                f"{n_units}; use unit=neuron"
            )
        return n_units
