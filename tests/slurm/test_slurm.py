"""Sweeps on a real cluster, which has no accounting, and what happens to them there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from cluster import control, restart, until
from command import FAULTS, LAUNCH, Launch, same_bits, states

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1500)]


def status_of(sweep: Path, method: str) -> dict:
    (status,) = sweep.glob(f"tiny-*-{method}-s0-*/status.json")
    return json.loads(status.read_text())


def submissions(sweep: Path) -> list[dict]:
    return [json.loads(record.read_text()) for record in sorted((sweep / ".dispatch").glob("*.json"))]


def test_the_same_bits_as_in_one_process_whatever_happens_to_others(launch: Launch, slurm, on_text, faults, tmp_path):
    """One job raises, one process is killed, one is killed by SLURM for its memory: none of that costs another job.
    The results lie in a folder whose name a shell would take apart."""
    assert launch("-m", *on_text, "method=zero,mean", "results_dir=plain").code == 0
    methods = "method=zero,raises,kills_once,hogs,mean"
    done = launch(
        *FAULTS, *slurm, *on_text, methods, "results_dir=\"an 'odd' place\"", "hydra.launcher.max_jobs_per_pack=4"
    )
    assert "1 of 5 jobs failed, the others are finished and kept" in done.error
    sweep = tmp_path / "an 'odd' place" / "default"
    same_bits(tmp_path / "plain" / "default", sweep)
    assert status_of(sweep, "raises")["reason"] == "ValueError: no such luck"
    assert sorted(states(sweep).values()) == ["failed", *["finished"] * 4]
    assert "probably for lack of memory" in done.err
    first, *others = submissions(sweep)
    assert [len(pack) for pack in first["packs"]] == [4, 1]  # one array
    assert len(others) == 2  # one for what each of the two dead processes left
    scripts = "".join(file.read_text() for file in (tmp_path / "private").rglob("*_submission.sh"))
    assert "#SBATCH --array=0-1%2" in scripts and "WANDB" not in scripts


def test_ctrl_c_cancels_what_runs_and_keeps_what_is_finished(launch: Launch, slurm, on_text, faults, tmp_path):
    def interrupt() -> None:
        until(lambda: list(faults.glob("waits-*")), "the second job runs")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    stopped = launch(*FAULTS, *slurm, *on_text, "method=zero,waits")
    thread.join()
    assert stopped.code == 130 and "cancelling 1 packs" in stopped.err
    until(lambda: not control("squeue", "--noheader"), "nothing runs any more")
    sweep = tmp_path / "results" / "default"
    assert status_of(sweep, "zero")["state"] == "finished" != status_of(sweep, "waits")["state"]


def test_the_launcher_and_nodes_and_slurmctld_die_and_nothing_is_lost(
    launch: Launch, slurm, on_text, faults, cluster, tmp_path
):
    """One pack is requeued by the admin, one loses its node, one is preempted; slurmctld is restarted; and the launcher
    was killed before. The same command collects, and submits nothing again."""
    options = [*FAULTS, *slurm, "hydra.launcher.cpus_per_task=4", *on_text, "method=waits", "seed=0,1,2"]
    options += ["hydra.launcher.max_jobs_per_pack=1"]
    with open(tmp_path / "output", "w") as output:
        launcher = subprocess.Popen([sys.executable, str(LAUNCH), *options], cwd=tmp_path, stdout=output, stderr=output)
    until(lambda: len(list(faults.iterdir())) == 3 or launcher.poll() is not None, "three packs run")
    assert launcher.poll() is None, (tmp_path / "output").read_text()
    launcher.kill()
    launcher.wait()

    sweep = tmp_path / "results" / "default"
    (record,) = submissions(sweep)
    place = dict(line.split() for line in control("squeue", "--noheader", "--format=%K %N").splitlines())
    assert len(set(place.values())) == 3
    control("scontrol", "requeue", f"{record['job']}_0")
    control("scontrol", "update", f"nodename={place['1']}", "state=down", "reason=test")
    control("sbatch", "--partition=urgent", f"--nodelist={place['2']}", "--cpus-per-task=4", "--mem=4000",
            "--output=/dev/null", "--job-name=urgent", "--wrap=sleep 15")  # fmt: skip
    time.sleep(3)
    restart(cluster)
    # It may have come back with slurmctld.
    subprocess.run(["scontrol", "update", f"nodename={place['1']}", "state=resume"], capture_output=True)
    until(lambda: "urgent" not in control("squeue", "--noheader", "--format=%j", "--states=pending"), "preempted")

    def hurry() -> bool:  # SLURM holds what was requeued for two minutes
        for job in control("squeue", "--noheader", "--array", "--states=pending", "--format=%i").split():
            subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], capture_output=True)
        return len(list(faults.iterdir())) == 6

    until(hurry, "each of the three was started twice")
    (faults / "go").touch()
    collected = launch(*options)
    assert collected.code == 0, collected.err
    assert len(submissions(sweep)) == 1 and set(states(sweep).values()) == {"finished"}
    assert launch(*FAULTS, "-m", *on_text, "method=waits", "seed=0,1,2", "results_dir=plain").code == 0
    same_bits(tmp_path / "plain" / "default", sweep)
