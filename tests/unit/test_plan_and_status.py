"""What dry_run=true says beforehand, and `python -m ablation_sweeps status` afterwards."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from importlib.metadata import version
from pathlib import Path
from socket import gethostname

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from ablation_sweeps.base import files
from ablation_sweeps.cli.commands import app
from ablation_sweeps.dispatch import watch
from ablation_sweeps.dispatch.local import Local
from ablation_sweeps.dispatch.scheduler import PackState
from ablation_sweeps.results import progress, run_folder, run_status


def test_status_is_read_from_the_files(tmp_path):
    run_folder.begin(tmp_path / "one", {})
    run_folder.finish(tmp_path / "one", pd.DataFrame({"value": [1.0]}), pd.DataFrame({"n": [1.0]}), 1.0)
    run_status.write_state(tmp_path / "two", "failed", "its process died 2 times: [red]OUT_OF_MEMORY")
    shown = CliRunner().invoke(app, ["status", str(tmp_path)])
    assert shown.exit_code == 0 and "1 failed, 1 finished" in shown.output
    assert "its process died 2 times: [red]OUT_OF_MEMORY" in shown.output
    nothing = CliRunner().invoke(app, ["status", str(tmp_path / "one")])
    assert "no job was ever launched there" in str(nothing.exception)


def test_a_job_whose_process_was_killed_does_not_run_for_ever(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    now = datetime.now(timezone.utc)
    before_this_process = now - timedelta(days=1)  # so that its number is that of a process which was here before
    for name, pid, host, started in (
        ("here", os.getpid(), gethostname(), now),
        ("recycled", os.getpid(), gethostname(), before_this_process),
        ("killed", ended.pid, gethostname(), now),
        ("elsewhere", ended.pid, "another", now),
    ):
        status = {"state": "running", "host": host, "pid": pid, "started": started.isoformat(timespec="seconds")}
        files.write_json(tmp_path / name / "status.json", status)
    said = CliRunner().invoke(app, ["status", str(tmp_path)]).output
    assert "2 died, 2 running" in said and said.count("its process is gone") == 2


def end_process_of(*runs: Path) -> None:
    """As if the process that wrote their status had ended since."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    for run in runs:
        run_status.write(run, replace(run_status.read(run), pid=ended.pid))


def test_what_waited_for_a_launcher_that_was_killed_waits_no_more(tmp_path):
    run_folder.queue(tmp_path / "here", {}, survives_launcher=False)
    run_folder.queue(tmp_path / "on a cluster", {}, survives_launcher=True)
    assert "2 queued" in CliRunner().invoke(app, ["status", str(tmp_path)]).output
    end_process_of(tmp_path / "here")
    said = CliRunner().invoke(app, ["status", str(tmp_path)]).output
    assert "1 interrupted, 1 queued" in said and "stopped while it waited; the same command runs it" in said


@pytest.mark.parametrize("killed", [False, True])
def test_what_ran_before_it_waited_is_not_told_as_if_it_had_only_waited(tmp_path, killed):
    """Stopped by a signal, launched again, and stopped once more before it was its turn: by Ctrl-C, or killed."""
    ran, waited = tmp_path / "ran", tmp_path / "waited"
    run_folder.begin(ran, {})
    progress.save(ran, 0, pd.DataFrame({"n": [1.0]}))
    run_folder.fail(ran, KeyboardInterrupt())
    assert "by a signal while it ran" in CliRunner().invoke(app, ["status", str(tmp_path)]).output
    for run in (ran, waited):
        run_folder.queue(run, {}, survives_launcher=False)
    if killed:
        end_process_of(ran, waited)
    else:
        run_folder.mark_interrupted([ran, waited])
    said = CliRunner().invoke(app, ["status", str(tmp_path)]).output
    of_ran, of_waited = (
        next(line for line in said.splitlines() if line.strip().startswith(run)) for run in ("ran", "wa")
    )
    assert "interrupted when it had run (1 batch kept)" in of_ran and "stopped while it waited; the same" in of_waited


def test_what_is_cancelled_on_a_cluster_ran_or_waited(tmp_path):
    run_folder.begin(tmp_path / "ran", {})
    run_folder.queue(tmp_path / "waited", {}, survives_launcher=True)
    run_folder.mark_interrupted([tmp_path / "ran", tmp_path / "waited"], killed=True)
    said = CliRunner().invoke(app, ["status", str(tmp_path)]).output
    assert "2 interrupted" in said and "cancelled while it ran" in said and "stopped while it waited" in said


def test_a_zombie_has_ended_and_a_locked_run_has_not(tmp_path):
    """A number stays until somebody asks for the exit status; that of another container is not seen here."""
    ended = subprocess.Popen(["true"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    for name in ("zombie", "locked"):
        status = {"state": "running", "host": gethostname(), "pid": ended.pid, "started": now}
        files.write_json(tmp_path / name / "status.json", status)
    with files.locked(tmp_path / "locked"):
        assert "1 died, 1 running" in CliRunner().invoke(app, ["status", str(tmp_path)]).output
    assert "2 died" in CliRunner().invoke(app, ["status", str(tmp_path)]).output
    ended.wait()


def test_retry_leaves_alone_what_another_process_will_come_to(tmp_path, caplog):
    others = tmp_path / "in order"
    run_folder.queue(others, {}, survives_launcher=False)
    assert CliRunner().invoke(app, ["retry", str(tmp_path)]).exit_code == 0
    assert run_status.read(others).state == "queued" and "1 job left to the process that runs it" in caplog.text
    end_process_of(others)
    tried = CliRunner().invoke(app, ["retry", str(tmp_path)])
    assert "nothing can be retried here" in str(tried.exception)
    assert "in order: left alone: model: must be given" in caplog.text


@pytest.mark.parametrize(
    "n, options, max_concurrent_packs",
    [(4, {}, 4), (4, {"max_parallel": 3}, 3), (2, {"max_parallel": 3}, 2), (4, {"gpus": [1, 2]}, 2), (0, {}, 1),
     (0, {"max_parallel": 3}, 3)],
)  # fmt: skip
def test_a_plan_knows_how_many_packs_a_machine_runs_at_once(monkeypatch, n, options, max_concurrent_packs):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    local = Local(**{"max_jobs_per_pack": None, "max_parallel": None, "max_attempts": 2, "gpus": None, **options})
    assert local.max_concurrent_packs == max_concurrent_packs


def test_the_table_says_how_far_the_running_job_of_a_pack_is(tmp_path):
    from rich.console import Console

    run_status.write_state(tmp_path / "one", "finished")
    started = datetime.now(timezone.utc) - timedelta(seconds=100)
    files.write_json(tmp_path / "two" / "status.json",
                     {"state": "running", "started": started.isoformat(), "batches": 40, "begun_at": 18})  # fmt: skip
    for batch in range(20):
        (tmp_path / "two" / f"progress-{batch:06d}.parquet").touch()
    console = Console(width=150)
    packs = {"p1": ([tmp_path / "one", tmp_path / "two"], PackState("RUNNING", "node3", False, ""))}
    with console.capture() as captured:
        console.print(watch.table(packs))
    (row,) = [line for line in captured.get().splitlines() if "p1" in line]
    assert row.split()[:6] == ["p1", "node3", "running", "1/2", "two", "20/40"]
    assert 990 < int(row.split()[-2]) < 1100 and row.split()[-1] == "s"  # two batches in 100 seconds, 20 to go


def test_the_version_is_that_of_the_package():
    found = CliRunner().invoke(app, ["--version"])
    assert (found.exit_code, found.output) == (0, f"ablation-sweeps {version('ablation-sweeps')}\n")
