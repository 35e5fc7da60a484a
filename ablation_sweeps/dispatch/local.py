"""Runs packs on this machine: one process for each GPU, or a few on its cores."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as validated

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.lazy import torch
from ablation_sweeps.dispatch.packs import Pack
from ablation_sweeps.dispatch.scheduler import PackState

Count = Annotated[int, Field(ge=1)]
GRACE_SECONDS = 10.0
MOST_AT_ONCE = 4096  # processes of one machine


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Local:
    """Options of conf/hydra/launcher/local.yaml, which explains each one."""

    max_jobs_per_pack: Count | None
    max_parallel: Annotated[int, Field(ge=1, le=MOST_AT_ONCE)] | None
    max_attempts: Count
    gpus: list[Annotated[int, Field(ge=0)]] | None
    wait: ClassVar[bool] = True

    def queue(self, sweep: Path) -> LocalScheduler:
        return LocalScheduler(sweep / ".dispatch", self._names(), self.max_parallel)

    @property
    def max_concurrent_packs(self) -> int:
        """Number of packs that run at the same time, if no model is split across GPUs."""
        n = len(self._names())
        return min(n, self.max_parallel or n) if n else self.max_parallel or 1

    def _names(self) -> list[str]:
        """Names of the GPUs for CUDA_VISIBLE_DEVICES. If that is set already, only the GPUs in it are counted."""
        n = torch.cuda.device_count()
        names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        names = names[:n] if names[0] else [str(gpu) for gpu in range(n)]
        if self.gpus is None:
            return names
        absent = [gpu for gpu in self.gpus if gpu >= n]
        if absent:
            raise UserError(
                f"hydra.launcher.gpus={self.gpus}: there is no GPU {absent[0]} here; this machine has {n}, counted "
                f"from 0; [] uses none"
            )
        return [names[gpu] for gpu in self.gpus]


@dataclass
class LocalScheduler:
    """Runs packs in processes of this machine, which end with the launcher.

    Attributes:
        slots: slots that are free; see `_slots`.
        waiting, running, ended: packs by name; the process and slot of those that run; exit status of those that ended.
    """

    survives_launcher: ClassVar[bool] = False
    max_packs_per_submission: ClassVar[int] = sys.maxsize

    logs: Path
    gpus: list[str]
    max_parallel: int | None
    slots: list[str] = field(default_factory=list)
    waiting: dict[str, Pack] = field(default_factory=dict)
    running: dict[str, tuple[subprocess.Popen, str]] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)

    def submit(self, packs: list[Pack]) -> dict[str, Pack]:
        first = len(self.waiting) + len(self.running) + len(self.ended)
        if not first:
            self.slots = self._slots(packs)
        named = {f"pack-{first + i}": pack for i, pack in enumerate(packs)}
        self.waiting |= named
        self._start()
        return named

    def _slots(self, packs: list[Pack]) -> list[str]:
        """Slots, each for one pack at a time: the GPUs that it sees (all if a model is split across them), or none."""
        if not self.gpus:
            return [""] * (self.max_parallel or 1)
        spread = any(config["model"].get("device_map") for pack in packs for config in pack.configs.values())
        return [",".join(self.gpus)] if spread else self.gpus[: self.max_parallel]

    def live_packs(self) -> dict[str, list[str]]:
        return {}

    def poll(self) -> dict[str, PackState]:
        for name, (process, slot) in list(self.running.items()):
            if (code := process.poll()) is not None:
                del self.running[name]
                assert process.stdin is not None
                with suppress(BrokenPipeError):
                    process.stdin.close()
                self.ended[name] = code
                self.slots.append(slot)
        self._start()
        return {
            **{name: PackState("PENDING", "", False, "") for name in self.waiting},
            **{name: PackState("RUNNING", _shown(slot), False, "") for name, (_, slot) in self.running.items()},
            **{name: PackState("COMPLETED" if code == 0 else "FAILED", "", True, _ending(code))
               for name, code in self.ended.items()},
        }  # fmt: skip

    def _start(self) -> None:
        while self.slots and self.waiting:
            slot = self.slots.pop(0)
            name = next(iter(self.waiting))
            pack = self.waiting.pop(name)
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": slot}
            self.logs.mkdir(parents=True, exist_ok=True)
            with open(self.log_of(name), "w") as output:
                # In a session of its own, so that only the launcher receives Ctrl-C.
                process = subprocess.Popen(
                    [sys.executable, "-m", "ablation_sweeps.dispatch.packs"], env=environment, text=True,
                    stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True,
                )  # fmt: skip
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # it died at once; `poll` reports it
                process.stdin.write(json.dumps(pack.configs) + "\n")
                process.stdin.flush()  # stdin is left open: when this process ends, so do its packs
            self.running[name] = process, slot

    def cancel(self, packs: list[str]) -> None:
        processes = [self.running[name][0] for name in packs if name in self.running]
        for process in processes:
            process.send_signal(signal.SIGINT)
        until = time.monotonic() + GRACE_SECONDS
        for process in processes:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def log_of(self, pack: str) -> Path:
        return self.logs / f"{pack}.log"


def _shown(slot: str) -> str:
    return f"gpu {slot}" if slot else "cpu"


def _ending(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}" if code else ""
