"""The activations of one pass over the calibration data, on disk, so that the next pass needs no model."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import NamedTuple, Protocol, cast, runtime_checkable

from jaxtyping import Float
from xxhash import xxh3_64_intdigest

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.lazy import torch

MAX_REPLAY_BYTES = 1 << 32  # bytes of disk; of SmolLM2-135M, 62,000 positions


@runtime_checkable
class ActivationSink(Protocol):
    def __call__(self, layer: int, x: Float[torch.Tensor, "positions neurons"], /) -> None: ...


class Part(NamedTuple):
    layer: int
    shape: torch.Size
    dtype: torch.dtype
    checksum: int


@dataclass
class Replay:
    """What one pass shows, layer by layer, to be seen again in the same order and to the bit.

    It lies in a file without a name, which ends with the process. Where there is no room for it, nothing is kept.

    Attributes:
        folder: whose disk is used, half of what is free at the most: results go there as well.
        room: bytes, at the most.
        whole: it can be played.
    """

    folder: Path
    room: int = MAX_REPLAY_BYTES
    whole: bool = False
    _parts: list[Part] = field(default_factory=list)
    _file: FileIO | None = None

    @contextmanager
    def record(self, see: ActivationSink) -> Iterator[ActivationSink]:
        """Gives what is to be called during the pass in the place of `see`, which it calls."""
        self._forget()
        self.folder.mkdir(parents=True, exist_ok=True)
        room = min(self.room, shutil.disk_usage(self.folder).free // 2)

        def see_and_record(layer: int, x: Float[torch.Tensor, "positions neurons"]) -> None:
            see(layer, x)
            if self._file is not None:
                self._append(self._file, room, layer, x)

        try:
            self._file = cast(FileIO, tempfile.TemporaryFile(dir=self.folder, buffering=0))  # noqa: SIM115
            yield see_and_record
            self.whole = self._file is not None
        finally:
            if not self.whole:
                self._forget()

    def play(self, see: ActivationSink) -> None:
        """Raises:
        UserError: the disk does not give back what was written.
        """
        assert self.whole and self._file is not None
        self._file.seek(0)
        for part in self._parts:
            x = torch.empty(part.shape, dtype=part.dtype)
            content = x.view(torch.uint8).numpy().data
            self._file.readinto(content)
            if xxh3_64_intdigest(content) != part.checksum:
                self._forget()
                raise UserError(
                    f"{self.folder}: its disk does not give back the activations that were just written there; check "
                    "it, or set results_dir=FOLDER to another one"
                )
            see(part.layer, x)

    def _append(self, file: FileIO, room: int, layer: int, x: Float[torch.Tensor, "positions neurons"]) -> None:
        content = x.contiguous().view(torch.uint8).numpy().data
        try:
            whole = file.tell() + content.nbytes <= room and file.write(content) == content.nbytes
        except OSError:  # the disk is full
            whole = False
        if whole:
            self._parts.append(Part(layer, x.shape, x.dtype, xxh3_64_intdigest(content)))
        else:
            self._forget()

    def _forget(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self.whole = None, False
        self._parts.clear()
