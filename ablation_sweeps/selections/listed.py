"""Listed selection: units that are given by their layer and number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from jaxtyping import Int
from pydantic import ConfigDict, Field, field_validator
from pydantic.dataclasses import dataclass as validated

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.lazy import torch
from ablation_sweeps.selections.selection import Selecting

Place = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]  # layer, and number of the unit in it


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Listed:
    """Units in the order of a list. A fraction is a share of the listed units, so `fraction=1` ablates all of them.

    Attributes:
        units: pairs of a layer and the number of a unit in it, both from 0, such as [[5,1],[7,2]]; or the path of a
            file with one pair on each line (`5,1`), or with a json list of pairs.
    """

    label: str
    units: Annotated[list[Place], Field(min_length=1)]
    depends_on_seed = False

    @field_validator("units", mode="before")
    @classmethod
    def _read(cls, units: object) -> object:
        return read_units(units) if isinstance(units, str) else units

    def orders(self, selecting: Selecting) -> list[Int[torch.Tensor, " _units"]]:
        """The numbers of the listed units, in one list.

        Raises:
            UserError: a unit does not exist, or is listed twice; or the file cannot be read.
        """
        units, numbers = selecting.units, []
        for layer, index in self.units:
            number = units.number(layer, index)
            if number is None:
                in_layer = int((units.layer == layer).sum())
                there = f"layer {layer} has {in_layer}" if in_layer else f"there is no layer {layer} at this site"
                raise UserError(f"selection.units: there is no {units.kind} {index} in layer {layer}; {there}")
            if number in numbers:
                raise UserError(f"selection.units: [{layer},{index}] is listed twice")
            numbers.append(number)
        return [torch.tensor(numbers)]


def read_units(file: str) -> list[tuple[int, int]]:
    """Read pairs of a layer and a unit's number from a file: one on each line, or a json list of them.

    Raises:
        ValueError: the file cannot be read, or holds no pairs.
    """
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8-sig").strip()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    lines = [line.replace(",", " ").split() for line in text.splitlines() if line.strip()]
    try:
        return [(int(layer), int(index)) for layer, index in (json.loads(text) if text.startswith("[[") else lines)]
    except (ValueError, TypeError):
        raise ValueError(
            f"{file} holds no list of units; give a layer and a number on each line, such as 5,1"
        ) from None
