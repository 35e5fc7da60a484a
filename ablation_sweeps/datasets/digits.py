"""1797 handwritten digits of 8 x 8 grey pixels, included in scikit-learn."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cache, partial
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.hashing import unit_hash
from ablation_sweeps.data.batch import Modality, Picture, Split

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Digits:
    """Handwritten digits, divided by a hash into training, calibration and evaluation images."""

    label: str
    modality: ClassVar[Modality] = "image"

    def examples(self, split: Split) -> Iterator[Picture]:
        from PIL import Image

        pixels, labels = arrays()
        names = [f"digits/{i}" for i in range(len(labels))]
        # Ordered by hash, so that the first n are a random sample.
        for i in sorted(range(len(names)), key=lambda i: unit_hash(names[i])):
            if split_of(names[i]) == split:
                yield Picture(names[i], partial(Image.fromarray, pixels[i]), int(labels[i]))  # uint8 [8, 8]: mode "L"

    def fingerprint(self) -> str:
        pixels, labels = arrays()
        return hashlib.sha256(pixels.tobytes() + labels.astype("<i8").tobytes()).hexdigest()

    def class_names(self) -> list[str]:
        return [str(digit) for digit in range(10)]


@cache
def arrays() -> tuple[np.ndarray, np.ndarray]:
    """Pixels, uint8 `[1797, 8, 8]` from 0 to 255, and the digits they show, `[1797]`."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("dataset=digits: needs scikit-learn; pip install scikit-learn") from None
    data: Any = load_digits()
    return (data["images"] * (255 / 16)).round().astype("uint8"), data["target"]  # scikit-learn's values are 0 to 16


def split_of(name: str) -> Split:
    """Split of an image: 70 % train, 10 % calibration, 20 % evaluation."""
    position = unit_hash(name)
    return "train" if position < 0.7 else "calibration" if position < 0.8 else "evaluation"
