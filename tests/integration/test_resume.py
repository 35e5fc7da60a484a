"""A process that is killed in the middle of its evaluation loses one batch, and changes no number."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
from command import LAUNCH, Command, Launch, states, write_texts
from typer.testing import CliRunner

from ablation_sweeps.cli.commands import app
from ablation_sweeps.results import progress

WAIT = 180.0  # seconds


@pytest.fixture
def options(saved, tmp_path) -> list[str]:
    """About a dozen batches of two documents, eleven passes each."""
    texts = write_texts(tmp_path / "texts", n=32)
    model = ["model=causal_lm", f"model.path={saved('llama')}", "model.label=tiny"]
    data = ["dataset=text_files", f"dataset.path={texts}", "statistics.tokens=400", "eval.tokens=null"]
    return [*model, *data, "batch_tokens=128", "tracking=none"]


def kill_after_batches(n: int, options: list[str], cwd: Path, how: signal.Signals) -> Path:
    """Starts the command, waits until `n` batches are on disk, and ends it. Returns the run's folder."""
    process = Command(str(LAUNCH), *options, cwd=cwd)
    try:
        until = time.monotonic() + WAIT
        while not (found := list(cwd.glob(f"results/default/*/progress-{n - 1:06d}-*.parquet"))):
            assert process.poll() is None, process.output
            assert time.monotonic() < until, "no batch was saved"
            time.sleep(0.005)
    finally:
        os.kill(process.pid, how)
        process.wait()
    return found[0].parent


@pytest.mark.parametrize(("how", "method"), [(signal.SIGKILL, "resample"), (signal.SIGTERM, "peak")])
def test_a_killed_run_continues_and_gives_the_same_bits(launch: Launch, options, tmp_path, how, method):
    options = [*options, f"method={method}"]
    run = kill_after_batches(2, options, tmp_path, how)
    saved = sorted(run.glob("progress-*.parquet"))
    assert states(run.parent) == {run.name: "running"}
    assert not (run / "rows.parquet").exists()

    continued = launch(*options)
    assert continued.code == 0, continued.err
    n_batches = int(re.search(r"continues after (\d+) batch", continued.err)[1])
    assert n_batches == len(saved) >= 2
    assert states(run.parent) == {run.name: "finished"}
    assert not list(run.glob("progress-*")) and not list(run.glob(".*.tmp"))

    assert launch(*options, "results_dir=whole").code == 0
    (whole,) = (tmp_path / "whole" / "default").glob("*-s0-*")
    assert whole.name == run.name
    for file in ("rows.parquet", "documents.parquet"):
        interrupted, uninterrupted = pd.read_parquet(run / file), pd.read_parquet(whole / file)
        pd.testing.assert_frame_equal(interrupted, uninterrupted, check_exact=True)


def test_progress_that_a_run_no_longer_needs_is_removed(launch: Launch, options, tmp_path):
    """It was killed after the run had finished, and before they were removed."""
    options = [*options, "method=mean"]
    assert launch(*options).code == 0
    (run,) = (tmp_path / "results" / "default").glob("*-mean-*")
    for launcher in ((), ("-m",), ("-m", "hydra/launcher=local", "hydra.launcher.gpus=[]")):
        progress.save(run, 0, pd.DataFrame({"i": [0]}))
        assert launch(*launcher, *options).code == 0
        assert not list(run.glob("progress-*"))


def test_jobs_that_a_killed_sweep_did_not_come_to_are_known(launch: Launch, options, tmp_path, monkeypatch):
    options = [*options, "method=mean"]
    run = kill_after_batches(2, ["-m", *options, "seed=0,1,2"], tmp_path, signal.SIGKILL)
    said = CliRunner().invoke(app, ["status", str(run.parent)]).output
    assert "1 died, 2 interrupted" in said
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["retry", str(run.parent)])
    assert done.exit_code == 0, done.exception
    assert list(states(run.parent).values()) == ["finished"] * 3
    before = {path: path.stat().st_mtime_ns for path in run.parent.glob("*/rows.parquet")}
    assert launch("-m", *options, "seed=0,1,2").code == 0
    assert before == {path: path.stat().st_mtime_ns for path in run.parent.glob("*/rows.parquet")}
