"""hydra/launcher=local: packs in processes of their own, on this machine."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command import FAULTS, LAUNCH, Command, Launch, same_bits, states
from typer.testing import CliRunner

from ablation_sweeps.cli.commands import app

LOCAL = ("-m", "hydra/launcher=local", "hydra.launcher.gpus=[]")


def state_of(sweep, method: str) -> dict:
    (status,) = sweep.glob(f"tiny-texts-{method}-s*/status.json")
    return json.loads(status.read_text())


def test_the_same_bits_as_in_one_process_whatever_happens_to_others(launch: Launch, on_text, faults, tmp_path):
    """Of one pack of five jobs, one raises, one poisons its process once, and one kills it always."""
    assert launch("-m", *on_text, "method=zero,mean", "results_dir=plain").code == 0
    methods = "method=raises,zero,kills,poisons,mean"
    done = launch(*FAULTS, *LOCAL, *on_text, methods, "hydra.launcher.max_parallel=2")
    assert "2 of 5 jobs failed, the others are finished and kept" in done.error
    sweep = tmp_path / "results" / "default"
    same_bits(tmp_path / "plain" / "default", sweep)
    assert state_of(sweep, "raises")["reason"].startswith("ValueError: no such luck (")
    assert state_of(sweep, "kills")["state"] == "failed"
    assert "its process died 2 times: FAILED killed by SIGKILL" in state_of(sweep, "kills")["reason"]
    assert "memory" in state_of(sweep, "kills")["reason"]
    for method in ("zero", "poisons", "mean"):
        assert state_of(sweep, method)["state"] == "finished", method
    marks = sorted(mark.name for mark in faults.iterdir())
    assert marks == ["kills-1", "kills-2", "poisons-1", "poisons-2", "raises-1"]

    files = {path: path.stat().st_mtime_ns for path in sweep.glob("*-zero-*/*")}
    again = launch(*FAULTS, *LOCAL, *on_text, "method=zero,mean")
    assert again.code == 0 and "2 jobs: 2 finished, 0 in 0 packs" in again.err
    assert {path: path.stat().st_mtime_ns for path in sweep.glob("*-zero-*/*")} == files
    assert set(states(sweep).values()) == {"finished", "failed"}


def mend(marks: Path) -> None:
    """What makes method=raises fail is over."""
    for i in range(100):
        (marks / f"raises-{i}").touch()


@pytest.mark.parametrize("launcher", [LOCAL, ("-m",)], ids=["local", "in_order"])
def test_retry_does_what_failed_and_nothing_else(launch: Launch, on_text, faults, tmp_path, monkeypatch, launcher):
    """From another folder, with nothing typed again."""
    assert launch(*FAULTS, *launcher, *on_text, "method=zero,raises").code == 1
    sweep = tmp_path / "results" / "default"
    before = {path: path.stat().st_mtime_ns for path in sweep.glob("*-zero-*/*")}
    if launcher is not LOCAL:  # where it takes no process more
        again = CliRunner().invoke(app, ["retry", str(sweep)])
        assert "1 of 1 jobs failed" in str(again.exception) and "no such luck" in str(again.exception)
    mend(faults)
    monkeypatch.chdir(faults)
    done = CliRunner().invoke(app, ["retry", str(sweep)])
    assert done.exit_code == 0, done.exception
    assert set(states(sweep).values()) == {"finished"}
    assert {path: path.stat().st_mtime_ns for path in sweep.glob("*-zero-*/*")} == before
    assert "raises" in (sweep / "summary.csv").read_text()
    nothing = CliRunner().invoke(app, ["retry", str(sweep)])
    assert nothing.exit_code == 0 and "no job failed" in nothing.output


def test_retry_refuses_a_job_that_is_no_longer_the_same(launch: Launch, on_text, faults, tmp_path):
    assert launch(*FAULTS, *on_text, "method=raises").code == 1
    sweep = tmp_path / "results" / "default"
    (config,) = sweep.glob("*/config.yaml")
    config.write_text(config.read_text().replace("seed: 0", "seed: 1"))
    again = CliRunner().invoke(app, ["retry", str(sweep)])
    assert "nothing can be retried here" in str(again.exception)


def test_packs_end_with_their_launcher_and_the_same_command_goes_on(launch: Launch, on_text, faults, tmp_path):
    """Killed, or its connection lost: two processes must not end up at one GPU."""
    command = [*FAULTS, *LOCAL, *on_text, "method=waits"]
    launcher = Command(str(LAUNCH), *command, cwd=tmp_path)
    sweep = tmp_path / "results" / "default"
    until(lambda: list(sweep.glob("*/progress-*")) or launcher.poll() is not None)
    assert launcher.poll() is None, launcher.output
    pid = json.loads(next(sweep.glob("*/status.json")).read_text())["pid"]
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    until(lambda: set(states(sweep).values()) == {"interrupted"})
    until(lambda: not Path(f"/proc/{pid}").exists())
    (faults / "go").touch()
    done = launch(*command)
    assert done.code == 0, done.err
    assert "continues after 1 batch" in next(sweep.glob("*/log")).read_text()


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_launcher_needs_a_sweep(launch: Launch, on_text):
    assert "hydra/launcher=local: works only with -m" in launch("hydra/launcher=local", *on_text).error


def test_what_is_wrong_with_an_option_is_said_in_one_line(launch: Launch, on_text):
    assert "hydra.launcher.max_attempts=0: must be" in launch(*LOCAL, *on_text, "hydra.launcher.max_attempts=0").error
