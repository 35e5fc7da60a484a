"""Former place of `dispatch/packs.py`, which packs that earlier versions have submitted to SLURM name."""

import sys
from typing import NoReturn


def __getattr__(name: str) -> NoReturn:
    """Refuse to unpickle such a pack: its jobs may lack options that were added since."""
    sys.exit(
        "error: this pack was submitted by an earlier version of ablation-sweeps, and cannot run; cancel what is in "
        "the queue, and type the command of the sweep again, which keeps all finished jobs"
    )
