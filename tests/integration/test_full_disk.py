"""A real file system with too little room: one line says so, nothing half-written is taken as whole, and it goes on."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import Launch, same_bits, write_texts


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """16 MB; `size` changes that."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only root can make a small file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def size(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)


@pytest.fixture
def options(on_text, tmp_path) -> list[str]:
    """Some twenty batches."""
    texts = write_texts(tmp_path / "many", n=40)
    return [*on_text, f"dataset.path={texts}", "eval.tokens=null", "batch_tokens=64", "method=peak"]


def test_it_says_so_and_goes_on_where_it_was(launch: Launch, options, disk, tmp_path):
    """Where the run begins, where statistics are cached, and where a batch is saved."""
    assert launch(*options, "results_dir=elsewhere").code == 0
    for room, file in (("4k", "environment.json"), ("28k", ".safetensors"), ("100k", "progress-")):
        size(disk, room)
        full = launch(*options, f"results_dir={disk}")
        assert "no space is left on this disk" in full.error and "results_dir=FOLDER" in full.error
        assert file in full.error, full.error
        assert not list(disk.rglob("*.tmp"))
        progress = {path: path.read_bytes() for path in disk.glob("default/*/progress-*")}
        assert bool(progress) == (file == "progress-")
        size(disk, "16m")
        done = launch(*options, f"results_dir={disk}")
        assert done.code == 0, done.err
        assert "damaged" not in done.err and ("continues after" in done.err) == bool(progress)
        same_bits(tmp_path / "elsewhere" / "default", disk / "default")
        launch("dry_run=true")  # and the recorded calibration pass, which has no name there, is closed
        for path in disk.iterdir():
            shutil.rmtree(path)
