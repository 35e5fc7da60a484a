"""A method that breaks its job in the ways that happen on clusters. Its folder holds how often it did."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ablation_sweeps.ablation import Constant, Fitting


@dataclass(frozen=True)
class Faulty:
    """Attributes:
    times: of its first so many attempts it breaks; then it is like `zero`.
    marks: a folder with one file for each attempt; `wait` waits until there is a file `go`.
    """

    label: str
    times: int
    marks: str

    def fit(self, fitting: Fitting) -> Constant:
        attempt = len(list(Path(self.marks).glob(f"{self.label}-*"))) + 1
        (Path(self.marks) / f"{self.label}-{attempt}").touch()
        if attempt <= self.times:
            getattr(self, self.label.partition("_")[0])()
        return Constant([torch.zeros(p.width) for p in fitting.projections])

    def raises(self) -> None:
        raise ValueError("no such luck")

    def poisons(self) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA")

    def kills(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def hogs(self) -> None:
        self.hoard = [bytearray(os.urandom(1 << 20) * 64) for _ in range(40)]  # 2.5 GB, all of it touched
        time.sleep(60)

    def waits(self) -> None:
        until = time.monotonic() + 300
        while not (Path(self.marks) / "go").exists() and time.monotonic() < until:
            time.sleep(0.1)
