"""Recorder for the activations of one calibration pass, so that the next pass need not run the model."""

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

MAX_REPLAY_BYTES = 1 << 32  # maximum size on disk: about 62,000 positions of SmolLM2-135M


@runtime_checkable
class ActivationSink(Protocol):
    """Callback that receives a layer's activations, some positions at a time."""

    def __call__(self, layer: int, x: Float[torch.Tensor, "positions neurons"], /) -> None: ...


class Part(NamedTuple):
    """A recorded chunk: the activations at some positions in one layer."""

    layer: int
    shape: torch.Size
    dtype: torch.dtype
    checksum: int


@dataclass
class Replay:
    """The activations of one pass, recorded on disk and played back in the same order, bit-equal.

    They are stored in an unlinked temporary file, which disappears with the process. If the disk has too little room,
    nothing is recorded.

    Attributes:
        folder: where the file is created. At most half of the free disk space is used: results are written there too.
        room: maximum size in bytes.
        whole: True if a complete pass is recorded.
    """

    folder: Path
    room: int = MAX_REPLAY_BYTES
    whole: bool = False
    _parts: list[Part] = field(default_factory=list)
    _file: FileIO | None = None

    @contextmanager
    def record(self, see: ActivationSink) -> Iterator[ActivationSink]:
        """Context manager: gives a callback to use in place of `see`; it calls `see` and records the activations."""
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
        """Call `see` with the recorded activations, in the order in which they were recorded.

        Raises:
            UserError: the disk returns other bytes than were written.
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
