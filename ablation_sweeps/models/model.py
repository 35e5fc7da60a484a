"""The interface of a kind of model: what its options load, and what can be known before."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Protocol, runtime_checkable

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.data.batch import Modality
from ablation_sweeps.data.encoder import Encoder
from ablation_sweeps.models.transformer import Transformer


@runtime_checkable
class Model(Protocol):
    """A model's options, in a frozen dataclass. A class that leaves out a member with a value here has that value.

    Attributes:
        label: name in folders, tables and figures.
        site_paths: module paths or patterns of the projections. None: they are found by structure.
        path: local folder with the model's files, in which no results may lie. None: there is none.
        tokens: positions that enter the statistics: "all", or "no_special".
        pack: "concatenate" if documents are joined and cut into sequences, so that the first ones are no fair sample.
    """

    label: str
    modality: Modality
    site_paths: tuple[str, ...] | None = None
    path: str | None = None
    tokens: str = "all"
    pack: str = "documents"

    @abstractmethod
    def load(self) -> Transformer:
        """Load the model."""
        ...

    def check(self, modality: Modality) -> None:
        """Check what can be known before the model is loaded.

        Raises:
            UserError: one line that names the option and the remedy.
        """

    def prefetch(self) -> None:
        """Download everything that loading the model needs."""

    def encoder(self) -> Encoder:
        """Function that turns examples into batches; it may need less than the whole model."""
        return self.load().encode

    def identity(self) -> dict[str, Any]:
        """Everything that can change the numbers."""
        return {"fingerprint": self.fingerprint()}

    def fingerprint(self) -> str:
        """Hash of everything that can change the numbers, for a class without `identity`."""
        raise UserError(f"model={self.label}: its class has no identity(); see docs/adding.md")
