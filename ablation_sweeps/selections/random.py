"""Random selection: a random order of the units, the same for every method."""

from __future__ import annotations

import hashlib

from jaxtyping import Int
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as validated

from ablation_sweeps.base.lazy import torch
from ablation_sweeps.selections.selection import Selecting, Within, grouped


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Random:
    """Uniformly random units.

    Attributes:
        within: "layer": the same share of the units in each layer; "model": of all units together. None: "layer", or
            "model" if units are whole layers.
    """

    label: str
    within: Within | None = None
    depends_on_seed = True

    def orders(self, selecting: Selecting) -> list[Int[torch.Tensor, " _units"]]:
        """A permutation of each group of units. It depends only on the seed, the layer and its number of units."""
        units = selecting.units
        groups = grouped(units, self.within)
        if len(groups) == 1 and (self.within == "model" or units.kind == "layer"):
            return [groups[0][_permutation(len(groups[0]), f"{selecting.seed}/model")]]
        return [
            group[_permutation(len(group), f"{selecting.seed}/{projection.order}")]
            for group, projection in zip(groups, selecting.projections, strict=True)
        ]


def _permutation(n: int, key: str) -> Int[torch.Tensor, " n"]:
    digest = hashlib.sha256(key.encode()).digest()  # neighbouring seeds must not give related orders
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(n, generator=generator)
