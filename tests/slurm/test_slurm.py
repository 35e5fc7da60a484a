"""Sweeps on a real cluster, which has no accounting, and what happens to them there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from cluster import control, hurry, restart, until
from command import FAULTS, LAUNCH, Launch, last_of_each, same_bits, states

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1500)]


SECRETS = {"WANDB_API_KEY": f"local-{'5ec2e7' * 7}"[:46], "HF_TOKEN": "hf_5ec2e7SHALLNOTSHOW"}


def status_of(sweep: Path, method: str) -> dict:
    (status,) = sweep.glob(f"tiny-*-{method}-s0-*/status.json")
    return json.loads(status.read_text())


def submissions(sweep: Path) -> list[dict]:
    return [json.loads(record.read_text()) for record in sorted((sweep / ".dispatch").glob("default-*.json"))]


def test_the_same_bits_as_in_one_process_whatever_happens_to_others(
    launch: Launch, slurm, on_text, faults, tmp_path, monkeypatch
):
    """One job raises, one poisons its process, one process is killed, one is killed by SLURM for its memory: none of
    that costs another job. The results lie in a folder whose name a shell would take apart, and no file tells a key."""
    for key in SECRETS:
        monkeypatch.setenv(key, SECRETS[key])
    assert launch("-m", *on_text, "method=zero,mean", "results_dir=plain").code == 0
    methods = "method=zero,raises,kills_once,hogs,poisons,mean"
    done = launch(
        *FAULTS, *slurm, *on_text, methods, "results_dir=\"an 'odd' place\"", "hydra.launcher.max_jobs_per_pack=4"
    )
    assert "1 of 6 jobs failed, the others are finished and kept" in done.error
    sweep = tmp_path / "an 'odd' place" / "default"
    same_bits(tmp_path / "plain" / "default", sweep)
    assert status_of(sweep, "raises")["reason"].startswith("ValueError: no such luck (")
    assert sorted(states(sweep).values()) == ["failed", *["finished"] * 5]
    assert "probably for lack of memory" in done.err
    first, *others = submissions(sweep)
    assert [len(pack) for pack in first["packs"]] == [4, 2]  # one array
    assert len(others) in (2, 3)  # for what the three dead processes left; two of them may be seen at once
    scripts = "".join(file.read_text() for file in (tmp_path / "private").rglob("*_submission.sh"))
    assert "#SBATCH --array=0-1%2" in scripts
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 50 and not [p for p in files for key in SECRETS.values() if key.encode() in p.read_bytes()]


def test_ctrl_c_cancels_what_runs_and_keeps_what_is_finished(launch: Launch, slurm, on_text, faults, tmp_path):
    command, said = [*FAULTS, *slurm, *on_text, "method=zero,waits"], []

    def interrupt() -> None:
        until(lambda: list(faults.glob("waits-*")), "the second job runs")
        second = subprocess.run([sys.executable, str(LAUNCH), *command], cwd=tmp_path, capture_output=True, text=True)
        said.append(second.stderr)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    stopped = launch(*command)
    thread.join()
    assert f"sweep=default: is being launched already, by process {os.getpid()}" in said[0]
    assert stopped.code == 130 and "cancelling 1 pack" in stopped.err
    until(lambda: not control("squeue", "--noheader"), "nothing runs any more")
    sweep = tmp_path / "results" / "default"
    assert status_of(sweep, "zero")["state"] == "finished" != status_of(sweep, "waits")["state"]


def test_the_launcher_and_nodes_and_slurmctld_die_and_nothing_is_lost(
    launch: Launch, slurm, on_text, faults, cluster, tmp_path
):
    """One pack is requeued by the admin, one loses its node, one is preempted; slurmctld is restarted; and the launcher
    was killed before. The same command collects, and submits nothing again."""
    options = [*FAULTS, *slurm, "hydra.launcher.cpus_per_task=4", *on_text, "method=waits", "seed=0,1,2"]
    options = [*last_of_each((*options, "hydra.launcher.max_jobs_per_pack=1"))]
    with open(tmp_path / "output", "w") as output:
        launcher = subprocess.Popen([sys.executable, str(LAUNCH), *options], cwd=tmp_path, stdout=output, stderr=output)
    sweep = tmp_path / "results" / "default"
    begun = lambda: len(list(sweep.glob("*/progress-*")))  # noqa: E731
    until(lambda: begun() == 3 or launcher.poll() is not None, "three packs have done a batch")
    assert launcher.poll() is None, (tmp_path / "output").read_text()
    launcher.kill()
    launcher.wait()

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

    until(lambda: hurry() or len(list(faults.iterdir())) == 6, "each of the three was started twice")
    (faults / "go").touch()
    collected = launch(*options)
    assert collected.code == 0, collected.err
    assert len(submissions(sweep)) == 1 and set(states(sweep).values()) == {"finished"}
    assert all("continues after 1 batch" in log.read_text() for log in sweep.glob("*/log"))
    assert launch(*FAULTS, "-m", *on_text, "method=waits", "seed=0,1,2", "results_dir=plain").code == 0
    same_bits(tmp_path / "plain" / "default", sweep)


def test_a_time_limit_costs_nothing_and_what_was_cancelled_can_be_tried_again(
    launch: Launch, slurm, on_text, faults, tmp_path, monkeypatch
):
    """SLURM's limit is three minutes here, and it warns 90 seconds before, or up to a minute earlier: with two minutes,
    the signal could come before Python is up. The other pack is cancelled by the admin."""
    asked = record_squeue(tmp_path / "bin", monkeypatch)
    options = [*FAULTS, *slurm, *on_text, "method=waits", "seed=0,1", "hydra.launcher.max_jobs_per_pack=1"]
    options += ["hydra.launcher.time=3", "hydra.launcher.gres=gpu:1"]
    with open(tmp_path / "output", "w") as output:
        launcher = subprocess.Popen([sys.executable, str(LAUNCH), *options], cwd=tmp_path, stdout=output, stderr=output)
    sweep = tmp_path / "results" / "default"
    until(lambda: len(list(sweep.glob("*/progress-*"))) == 2 or launcher.poll() is not None, "two packs run")
    assert launcher.poll() is None, (tmp_path / "output").read_text()
    (record,) = submissions(sweep)
    control("scancel", f"{record['job']}_1")
    until(lambda: hurry() or len(list(faults.iterdir())) == 3, "the pack that is out of time was started again")
    (faults / "go").touch()
    assert launcher.wait(120) == 1
    said = (tmp_path / "output").read_text()
    assert "1 of 2 jobs failed, the others are finished and kept" in said and "cancelled, not by this launcher" in said
    assert sorted(states(sweep).values()) == ["failed", "finished"]
    assert "continues after 1 batch" in "".join(log.read_text() for log in sweep.glob("*/log"))
    assert len(asked()) > 3 and min(after - before for before, after in pairwise(asked())) > 9.5

    command = [sys.executable, "-m", "ablation_sweeps", "retry", str(sweep)]
    retried = subprocess.run(command, cwd=faults, capture_output=True, text=True)
    assert retried.returncode == 0, retried.stderr
    assert set(states(sweep).values()) == {"finished"}
    scripts = [file.read_text() for file in (tmp_path / "private").rglob("*_submission.sh")]
    assert len(scripts) == 2 and all("#SBATCH --gres=gpu:1" in script for script in scripts)
    assert launch(*FAULTS, "-m", *on_text, "method=waits", "seed=0,1", "results_dir=plain").code == 0
    same_bits(tmp_path / "plain" / "default", sweep)


def record_squeue(folder: Path, monkeypatch) -> Callable[[], list[float]]:
    """Puts a squeue before the real one that writes down when the launcher asked."""
    folder.mkdir()
    (folder / "squeue").write_text(
        f'#!/bin/sh\n[ "$1" = --noheader ] && date +%s.%N >>{folder}/asked\nexec {shutil.which("squeue")} "$@"\n'
    )
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return lambda: [float(line) for line in (folder / "asked").read_text().split()]


def test_what_queues_runs_as_it_was_submitted(launch: Launch, slurm, on_text, cluster, tmp_path, monkeypatch):
    """A site's own yaml holds the jobs back; meanwhile its conf/ is edited. The site allows arrays of four tasks, its
    squeue shows nothing at all, and the user has a default partition for sbatch."""
    conf = tmp_path / "conf"
    for file, text in {
        "hydra/launcher/site.yaml": "defaults: [slurm, _self_]\nwait: false\nsbatch: {hold: true}\n",
        "method/mine.yaml": "_target_: ablation_sweeps.methods.zero.Zero\nlabel: mine\n",
    }.items():
        (conf / file).parent.mkdir(parents=True)
        (conf / file).write_text(text)
    options = ["hydra/launcher=site" if option == "hydra/launcher=slurm" else option for option in slurm]
    options += [*on_text, "hydra.launcher.max_jobs_per_pack=1", "method=mine", "seed=0,1,2,3,4"]
    monkeypatch.setenv("SBATCH_PARTITION", "urgent")
    left = launch("--config-dir", str(conf), *options)
    assert left.code == 0 and "5 packs in the queue" in left.out
    sweep = tmp_path / "results" / "default"
    assert [len(array["packs"]) for array in submissions(sweep)] == [4, 1]
    assert control("squeue", "--noheader", "--array", "--format=%P").split() == ["urgent"] * 5

    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "squeue").chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        again = launch("--config-dir", str(conf), *options)
    assert again.code == 0 and "5 packs of an earlier launch still in the queue" in again.err
    assert len(submissions(sweep)) == 2

    (conf / "method" / "mine.yaml").write_text("_target_: ablation_sweeps.methods.mean.Mean\nlabel: mine\n")
    assert set(states(sweep).values()) == {"queued"}
    control("scontrol", "release", f"{submissions(sweep)[0]['job']}_0")
    until(lambda: sorted(states(sweep).values()) == ["finished", *["queued"] * 4], "the first job is finished")

    assert launch(*on_text, "method=zero", "results_dir=plain").code == 0
    (mine,), (zero,) = (
        folder.glob("default/*-s0-*/documents.parquet") for folder in (sweep.parent, tmp_path / "plain")
    )
    assert mine.read_bytes() == zero.read_bytes()
