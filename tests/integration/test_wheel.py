"""The wheel, installed where the repository is not: `ablation-sweeps` in an empty folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import version
from pathlib import Path

import pytest
from command import ROOT, states

BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
SMALL = ("fraction=half", "statistics.tokens=300", "eval.tokens=300", "batch_tokens=150")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the commands of a new environment that holds the wheel. Its dependencies are those of this environment,
    which it finds behind its own packages."""
    for package in ("setuptools", "pip"):
        pytest.importorskip(package, reason=f"{package} is needed to build and install the wheel")
    folder = tmp_path_factory.mktemp("wheel")
    source, environment = folder / "source", folder / "environment"
    outside = (":!results", ":!tests", ":!benchmarks")  # of the wheel
    list_files = ["git", "-C", str(ROOT), "ls-files", "-coz", "--exclude-standard", "--", ".", *outside]
    listed = subprocess.run(list_files, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("this is no checkout of git, which says what belongs to the source")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():  # and not just deleted
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    succeed([sys.executable, "-c", BUILD, str(folder)], cwd=source)
    (wheel,) = folder.glob("*.whl")
    shutil.rmtree(source)
    venv.create(environment)
    for command in (["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "--message=another project"]):
        succeed(["git", "-c", "user.name=x", "-c", "user.email=x@localhost", *command], folder)
    python = environment / "bin" / "python"
    succeed(
        [sys.executable, "-m", "pip", f"--python={python}", "install", "--no-deps", "--no-index", str(wheel)], folder
    )
    (packages,) = environment.glob("lib/python*/site-packages")
    # A path in a .pth file: those that lie there, of the editable install of the repository, are not read.
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
    return environment / "bin"


def succeed(command: list[str], cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HYDRA_FULL_ERROR")}
    environment |= {"WANDB_MODE": "offline", "COLUMNS": "200"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_sweep_in_an_empty_folder(installed: Path, tmp_path: Path):
    command, sweep = str(installed / "ablation-sweeps"), tmp_path / "results" / "default"
    place = "import ablation_sweeps; print(ablation_sweeps.__file__, ablation_sweeps.__version__)"
    file, number = succeed([str(installed / "python"), "-c", place], tmp_path).split()
    assert Path(file).is_relative_to(installed.parent) and number == version("ablation-sweeps")
    assert succeed([command, "--version"], tmp_path) == f"ablation-sweeps {number}\n"

    succeed(
        [command, "-m", "hydra/launcher=local", "method=zero,mean", *SMALL], tmp_path
    )  # the jobs in another process
    assert list(states(sweep).values()) == ["finished", "finished"]
    assert (sweep / "report.html").stat().st_size > 1e6  # with the code of its charts
    for file in sweep.glob("*/environment.json"):  # the checkout around the environment is of another project
        assert json.loads(file.read_text())["git_commit"] is None
    assert "2 finished" in succeed([command, "status", "results/default"], tmp_path)


def test_a_part_of_ones_own_lies_in_the_current_folder(installed: Path, tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from ablation_sweeps import Constant, Fitting\n\n\n"
        "@dataclass(frozen=True)\nclass Largest:\n    label: str\n\n"
        "    def fit(self, fitting: Fitting) -> Constant:\n"
        "        return Constant([moments.maximum for moments in fitting.statistics().moments])\n"
    )
    (tmp_path / "conf" / "method").mkdir(parents=True)
    (tmp_path / "conf" / "method" / "largest.yaml").write_text("_target_: mine.Largest\nlabel: largest\n")
    command = [str(installed / "ablation-sweeps"), "--config-dir", "conf", "method=largest", "dry_run=true"]
    assert "-largest-s0-" in succeed(command, tmp_path)


@pytest.mark.parametrize("typed", [["ablation-sweeps"], ["python", "-m", "ablation_sweeps"]])
def test_messages_name_the_command_as_it_was_typed(installed: Path, tmp_path: Path, typed: list[str]):
    command = [str(installed / typed[0]), *typed[1:]]
    assert f"\n  {' '.join(typed)} -m method=" in succeed([*command, "--help"], tmp_path)
    done = subprocess.run([*command, "method=zero,mean"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.endswith(f"add -m, as in: {' '.join(typed)} -m method=zero,mean\n")
    done = subprocess.run([*command, "statsu"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "status" in done.stderr
