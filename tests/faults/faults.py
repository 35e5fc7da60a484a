"""A method that breaks its job in the ways that happen on clusters. Its folder holds how often it did."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ablation_sweeps.data.batch import Batch
from ablation_sweeps.methods.method import Constant, Fitting, Replacement


@dataclass(frozen=True)
class Faulty:
    """Attributes:
    times: of its first so many attempts it breaks; then it is like `zero`.
    marks: a folder with one file for each attempt; `waits` waits until there is a file `go`.
    """

    label: str
    times: int
    marks: str

    def fit(self, fitting: Fitting) -> Replacement:
        attempt = len(list(Path(self.marks).glob(f"{self.label}-*"))) + 1
        (Path(self.marks) / f"{self.label}-{attempt}").touch()
        what = self.label.partition("_")[0]
        zero = [torch.zeros(p.width) for p in fitting.projections]
        if what == "waits":
            return Waiting(zero, Path(self.marks) / "go")
        if attempt <= self.times:
            getattr(self, what)()
        return Constant(zero)

    def raises(self) -> None:
        raise ValueError("no such luck")

    def poisons(self) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA")

    def kills(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def hogs(self) -> None:
        self.hoard = [bytearray(os.urandom(1 << 20) * 64) for _ in range(40)]  # 2.5 GB, all of it touched
        time.sleep(60)


class Waiting:
    """Zero; but from the second batch on it waits until there is a file `go`."""

    reads_clean = False

    def __init__(self, zero: list[Tensor], go: Path):
        self.zero, self.go, self.first = zero, go, True

    def __call__(self, batch: Batch, clean: list[Tensor]) -> list[Tensor]:
        until = time.monotonic() + 300
        while not self.first and not self.go.exists() and time.monotonic() < until:
            time.sleep(0.1)
        self.first = False
        return self.zero
