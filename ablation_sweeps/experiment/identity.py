"""What enters the signature of a result: whatever can change a number."""

from __future__ import annotations

import functools
import inspect
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablation_sweeps.base import hashing
from ablation_sweeps.base.environment import SHIPPED
from ablation_sweeps.base.moved import FORMER

if TYPE_CHECKING:
    from ablation_sweeps.experiment.job import Calibration, Evaluation


RESULTS_VERSION = (
    2  # raise it when the code changes numbers beyond rounding: earlier results are then not taken for new
)


def _numbers(part: Calibration | Evaluation) -> dict[str, Any]:
    """What came later, left at its default, is no part of it: results from before are still valid."""
    later = {"target_stderr": None, "passes": 2}
    return {key: value for key, value in asdict(part).items() if (key, value) not in later.items()}


def _options(part: Any) -> dict[str, Any]:
    """What it computes with; a label is only a name. A class whose values have changed since says so by `numbers`."""
    options = {key: value for key, value in asdict(part).items() if key != "label"}
    numbers = getattr(part, "numbers", None)
    return {"class": _class(part), **options, **({"numbers": numbers} if isinstance(numbers, int) else {})}


@functools.cache
def _content(part: Any) -> dict[str, Any]:
    """Of a model's or dataset's files, when this process first looked at them: what it keeps in memory."""
    return part.identity() if hasattr(part, "identity") else {"fingerprint": part.fingerprint()}


def _class(part: Any) -> str:
    path = f"{type(part).__module__}.{type(part).__qualname__}"
    return " ".join([FORMER.get(path, path), *_edited(type(part))])


@functools.cache
def _edited(kind: type) -> list[str]:
    """What the file of a class held when it was imported, where NUMBERS does not stand for it: it may be changed at any
    time."""
    if kind.__module__ in SHIPPED:
        return []
    return [hashing.fingerprint_of_file(Path(inspect.getfile(kind)))]
