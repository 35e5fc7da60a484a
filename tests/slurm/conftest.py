"""The command line, and the cluster that `make test-slurm` started."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from cluster import control, until
from command import faults, launch, on_text, texts  # noqa: F401


@pytest.fixture(scope="session")
def cluster() -> Path:
    """Its folder."""
    folder = os.environ.get("SLURM_TEST_CLUSTER")
    if folder is None:
        pytest.skip("needs a SLURM cluster of its own: make test-slurm starts one")
    assert shutil.which("sacct") is None or "accounting_storage/none" in (Path(folder) / "slurm.conf").read_text()
    return Path(folder)


@pytest.fixture
def slurm(cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Options of a launch; nothing of an earlier test is left on the cluster. The user has settings for squeue of which
    each hides all packs."""
    for key, value in {"PARTITION": "none", "STATES": "SUSPENDED", "NAMES": "none", "FORMAT": "%i"}.items():
        monkeypatch.setenv(f"SQUEUE_{key}", value)
    subprocess.run(["scancel", f"--user={os.environ.get('USER', 'root')}"], check=True)
    until(lambda: not control("squeue", "--noheader"), "the cluster is empty")
    options = (f"hydra.launcher.folder={tmp_path / 'private'}", "hydra.launcher.mem=1300MB")
    return ("-m", "hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", *options)
