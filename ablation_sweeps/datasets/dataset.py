"""The interface of a dataset."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.data.batch import Document, Modality, Picture, Split


@runtime_checkable
class Dataset(Protocol):
    """A dataset's options, in a frozen dataclass. A class that leaves out a member with a value here has that value.

    Attributes:
        label: name in folders, tables and figures.
        path: local folder with the data, in which no results may lie. None: there is none.
    """

    label: str
    modality: Modality
    path: str | None = None

    @abstractmethod
    def examples(self, split: Split) -> Iterable[Document | Picture]:
        """The examples of a split. Those of calibration and evaluation must not overlap."""
        ...

    def check(self, modality: Modality) -> None:
        """Check what can be known before the data are read.

        Args:
            modality: what the model takes.

        Raises:
            UserError: one line that names the option and the remedy.
        """

    def class_names(self) -> list[str]:
        """Names of the classes of a dataset of images, in the order of its labels."""
        raise UserError(f"dataset={self.label}: its class has no class_names(); see docs/adding.md")

    def identity(self) -> dict[str, Any]:
        """Everything that can change the numbers."""
        return {"fingerprint": self.fingerprint()}

    def fingerprint(self) -> str:
        """Hash of the content, or any text that changes with it."""
        raise UserError(f"dataset={self.label}: its class has no fingerprint(); see docs/adding.md")
