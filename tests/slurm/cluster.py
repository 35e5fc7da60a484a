"""What the tests of this folder do to their cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path


def control(*command: str) -> str:
    """Runs a command of SLURM, without the variables that the tests set for the launcher to stumble over."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SQUEUE_", "SBATCH_"))}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=60)
    return done.stdout.strip()


def until(condition: Callable[[], object], what: str, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"it never happened: {what}"
        time.sleep(0.3)


def hurry() -> None:
    """SLURM holds what was put into the queue again for two minutes."""
    for job in control("squeue", "--array", "--states=pending", "--noheader", "--format=%i").split():
        subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], capture_output=True)


def restart(cluster: Path) -> None:
    """Stops slurmctld and starts it again; the nodes and the jobs stay."""
    pid = int((cluster / "run" / "slurmctld.pid").read_text())
    assert Path(f"/proc/{pid}/comm").read_text().strip() == "slurmctld"
    os.kill(pid, signal.SIGTERM)
    until(lambda: not Path(f"/proc/{pid}").exists(), "slurmctld ends")
    control("slurmctld", "-f", str(cluster / "slurm.conf"))
    until(lambda: subprocess.run(["squeue"], capture_output=True).returncode == 0, "slurmctld answers")
