"""One live table while a launcher waits; a line now and then where the output is no terminal."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from ablation_sweeps import store
from ablation_sweeps.queue import Place

log = logging.getLogger(__name__)

LINE_SECONDS = 60.0
Packs = dict[str, tuple[list[Path], Place | None]]


class Watcher:
    def __enter__(self) -> Watcher:
        self.said = time.monotonic()
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def show(self, packs: Packs) -> None:
        if packs and time.monotonic() - self.said > LINE_SECONDS:
            self.said = time.monotonic()
            done = sum(
                store.status(folder)["state"] == "finished" for folders, _ in packs.values() for folder in folders
            )
            n_jobs = sum(len(folders) for folders, _ in packs.values())
            log.info("waiting for %d packs: %d of their %d jobs finished", len(packs), done, n_jobs)
