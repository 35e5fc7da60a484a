"""What becomes of packs, without a cluster: a queue whose packs end as the test says."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pandas as pd
import psutil
import pytest
import torch
import yaml
from command import ROOT, run_python
from omegaconf import OmegaConf
from pydantic import ValidationError
from submitit.helpers import DelayedSubmission

from ablation_sweeps.base import files
from ablation_sweeps.base.errors import UserError
from ablation_sweeps.dispatch import launcher, slurm, supervisor
from ablation_sweeps.dispatch import packs as packs_module
from ablation_sweeps.dispatch.local import Local
from ablation_sweeps.dispatch.packs import Pack, packed
from ablation_sweeps.dispatch.scheduler import PackState
from ablation_sweeps.dispatch.slurm import Slurm, private
from ablation_sweeps.experiment.config import build
from ablation_sweeps.results import progress, run_folder, run_status

OVER = PackState("FAILED", "node1", True, "")


def make(folder: Path, names: str, model: str = "m", dataset: str = "d") -> list:
    """One job for each letter."""
    jobs = []
    for name in names:
        where = folder / "sweep" / name
        jobs.append(SimpleNamespace(folder=where, model=model, dataset=dataset, config={}, results_dir=folder))
    return jobs


# GPUs of this machine


@pytest.mark.parametrize(
    ("visible", "gpus", "parallel", "device_map", "slots"),
    [
        (None, None, None, None, ["0", "1", "2"]),
        (None, None, 2, None, ["0", "1"]),
        (None, [2, 0], None, None, ["2", "0"]),
        ("4,5,7", [0, 2], None, None, ["4", "7"]),
        ("4,5,7", None, None, "auto", ["4,5,7"]),
        (None, [], 2, None, ["", ""]),
    ],
)
def test_each_pack_sees_its_own_gpu(monkeypatch, tmp_path, visible, gpus, parallel, device_map, slots):
    """And a model that is spread over GPUs sees all of them."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    queue = Local(max_jobs_per_pack=None, max_parallel=parallel, max_attempts=1, gpus=gpus).queue(tmp_path)
    given = {"model": {"device_map": device_map}}
    packs = queue.submit([Pack({str(tmp_path / str(i)): given}) for i in range(5)])
    try:
        alive = [one for one in psutil.Process().children() if one.status() != psutil.STATUS_ZOMBIE]
        packs_of_it = [one for one in alive if "ablation_sweeps.dispatch.packs" in one.cmdline()]
        seen = [one.environ()["CUDA_VISIBLE_DEVICES"] for one in packs_of_it]
    finally:
        queue.cancel(list(packs))
    assert sorted(seen) == sorted(slots)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch, tmp_path):
    """CUDA would say nothing, and the model would be computed by the CPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    options = Local(max_jobs_per_pack=None, max_parallel=None, max_attempts=1, gpus=[0, 2])
    with pytest.raises(UserError, match=r"hydra\.launcher\.gpus=\[0, 2\]: there is no GPU 2 here; this machine has 2"):
        options.queue(tmp_path)


# Packs


@dataclass
class FakeQueue:
    """`run` is what each pack does; it returns where the pack is afterwards."""

    survives_launcher: ClassVar[bool] = True

    run: Callable[[Pack], PackState]
    log: Path
    live: dict[str, list[str]] = field(default_factory=dict)
    submissions: list[str] = field(default_factory=list)
    known: dict[str, PackState] = field(default_factory=dict)
    max_packs_per_submission: int = 1000

    def submit(self, packs: list[Pack]) -> dict[str, Pack]:
        self.submissions += ["".join(folder.name for folder in pack.folders) for pack in packs]
        named = {f"pack{len(self.known) + i}": pack for i, pack in enumerate(packs)}
        for name, pack in named.items():
            self.known[name] = self.run(pack)
        return named

    def live_packs(self) -> dict[str, list[str]]:
        return self.live

    def poll(self) -> dict[str, PackState]:
        return self.known

    def cancel(self, packs: list[str]) -> None:
        raise AssertionError("nobody asked for this")

    def log_of(self, pack: str) -> Path:
        return self.log


@pytest.fixture
def work(monkeypatch, tmp_path):
    monkeypatch.setattr(supervisor, "LOOK_SECONDS", 0)

    def start(names: str, run: Callable[[Pack], PackState], max_attempts: int = 2, **queue) -> tuple[FakeQueue, dict]:
        fake = FakeQueue(run, tmp_path / "log", **queue)
        mine = supervisor.Supervisor(fake, max_attempts, {job.folder: job for job in make(tmp_path, names)})
        mine.start(None)
        mine.watch()
        return fake, {folder.name: run_status.read(folder) for folder in mine.jobs}

    return start


def dies_at(bad: str, state: str = "running"):
    """The process dies at these jobs, having finished those before them."""

    def run(pack: Pack) -> PackState:
        for folder in pack.folders:
            run_status.write_state(folder, state if folder.name in bad else "finished")
            if folder.name in bad:
                return OVER
        return PackState("COMPLETED", "node1", True, "")

    return run


@pytest.mark.parametrize(
    "given, minutes",
    [(240, 240), ("240", 240), ("01:00:00", 60), ("1-02:00:00", 1560), ("2-12", 3600), ("0-0:30", 30), ("30:00", 30),
     ("00:00:30", 1), ("24:00:00", 1440), ("36000", 36000)],
)  # fmt: skip
def test_a_time_as_slurm_writes_it(given, minutes):
    assert slurm_with(time=given).time == minutes


@pytest.mark.parametrize("given", ["1:2:3:4", "an hour", "", "0", "00:00:00", "-5", "1.5", 0])
def test_a_time_that_is_none(given):
    with pytest.raises(ValidationError, match="time"):
        slurm_with(time=given)


def test_a_time_in_a_yaml_is_no_number_to_the_base_of_60(tmp_path):
    (tmp_path / "site.yaml").write_text("time: 10:00:00\nmem: 010\nparallel: 1_000\n")
    given = OmegaConf.load(tmp_path / "site.yaml")
    assert slurm_with(time=given.time).time == 600 and (given.mem, given.parallel) == (8, 1000)


def slurm_options() -> dict:
    options = yaml.safe_load((ROOT / "conf" / "hydra" / "launcher" / "slurm.yaml").read_text())
    return {key: value for key, value in options.items() if key not in ("_target_", "to")}


def slurm_with(**given) -> Slurm:
    return Slurm(**slurm_options() | given)


@pytest.mark.parametrize(
    "option",
    ["job_name", "job-name", "array", "output", "error", "open_mode", "signal", "requeue", "no-requeue", "nodes",
     "ntasks", "wait", "wrap", "time", "partition", "cpus-per-task"],
)  # fmt: skip
def test_options_of_sbatch_that_the_launcher_sets(option):
    """They would replace its own in silence, and it would follow packs by another name."""
    with pytest.raises(UserError) as refused:
        build("hydra.launcher", {**slurm_options(), "_target_": "ablation_sweeps.dispatch.slurm.Slurm",
                                 "sbatch": {"reservation": "r", option: "x"}})  # fmt: skip
    said = str(refused.value)
    assert said.startswith("hydra.launcher.sbatch=") and f"hydra.launcher.sbatch.{option}" in said
    assert ("write hydra.launcher." if option in ("time", "partition", "cpus-per-task") else "leave") in said


def test_a_pack_of_an_earlier_version_is_refused_in_one_line(tmp_path):
    """Its class has moved since it was submitted."""
    submission = DelayedSubmission(Pack({"/a": {}}))
    submission.set_timeout(10, 3)
    pickled = pickle.dumps(submission, protocol=0)
    now, then = b"cablation_sweeps.dispatch.packs\nPack\n", b"cablation_sweeps.packs\nPack\n"
    assert now in pickled
    (tmp_path / "7_submitted.pkl").write_bytes(pickled.replace(now, then))
    job = {"SLURM_JOB_ID": "7", "SUBMITIT_EXECUTOR": "slurm", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    ran = run_python("-m", "submitit.core._submit", str(tmp_path), cwd=tmp_path, env=os.environ | job)
    assert "submitted by an earlier version" in ran.error and "type the command of the sweep again" in ran.error


def test_packs_share_model_and_dataset(tmp_path):
    jobs = make(tmp_path, "abc") + make(tmp_path, "de", dataset="other") + make(tmp_path, "f", model="other")
    split = lambda most: ["".join(f.name for f in pack.folders) for pack in packed(jobs, most)]  # noqa: E731
    assert split(None) == ["abc", "de", "f"]
    assert split(2) == ["ab", "c", "de", "f"]
    assert packed(jobs, 1)[0].configs == {str(tmp_path / "sweep" / "a"): {"results_dir": str(tmp_path)}}


@pytest.mark.parametrize("state", ["running", "died"])
def test_the_culprit_is_tried_alone_and_the_rest_goes_on(work, state):
    fake, ended = work("abcd", dies_at("b", state))
    assert fake.submissions == ["abcd", "cd", "b"]
    assert {name: status.state for name, status in ended.items()} == dict(
        a="finished", b="failed", c="finished", d="finished"
    )
    assert "its process died 2 times" in ended["b"].reason


def test_a_pack_that_never_starts_is_given_up(work, tmp_path):
    (tmp_path / "log").write_text("ModuleNotFoundError: No module named 'ablation_sweeps'\n")
    fake, ended = work("ab", lambda pack: OVER)
    assert fake.submissions == ["ab", "a", "b"]
    assert all("No module named" in status.reason for status in ended.values())


def test_a_job_that_was_interrupted_is_not_to_blame(work):
    seen: list[Pack] = []

    def run(pack: Pack) -> PackState:
        seen.append(pack)
        run_status.write_state(pack.folders[0], "interrupted" if len(seen) < 5 else "finished")
        return OVER

    fake, ended = work("a", run)
    assert len(fake.submissions) == 5 and ended["a"].state == "finished"


def test_what_the_admin_cancels_stays_cancelled(work):
    fake, ended = work("ab", lambda pack: PackState("CANCELLED", "", True, ""))
    assert fake.submissions == ["ab"]
    assert all(status.reason.startswith("cancelled") for status in ended.values())


def test_a_pack_that_is_put_into_the_queue_again_is_left_alone(monkeypatch, tmp_path):
    """SLURM says for a moment that it is over."""
    monkeypatch.setattr(supervisor, "LOOK_SECONDS", 0)
    (job,) = make(tmp_path, "a")
    answers = [OVER, PackState("PENDING", "", False, ""), OVER, PackState("RUNNING", "node2", False, "")]

    class Requeued(FakeQueue):
        def poll(self) -> dict[str, PackState]:
            if not answers:
                run_status.write_state(job.folder, "finished")
                return {}
            return {"pack0": answers.pop(0)}

    queue = Requeued(lambda pack: OVER, tmp_path / "log")
    mine = supervisor.Supervisor(queue, 1, {job.folder: job})
    mine.start(None)
    mine.watch()
    assert queue.submissions == ["a"] and run_status.read(job.folder).is_finished


def test_what_an_earlier_launch_submitted_is_not_submitted_again(work, tmp_path):
    running = str(tmp_path / "sweep" / "b")
    left = PackState("RUNNING", "node1", False, "")

    def run(pack: Pack) -> PackState:
        run_status.write_state(Path(running), "finished")  # meanwhile
        return dies_at("")(pack)

    fake, ended = work("abc", run, live={"early": [running]}, known={"early": left})
    assert fake.submissions == ["ac"]
    assert {status.state for status in ended.values()} == {"finished"}


def test_a_second_launch_of_the_sweep_says_so(tmp_path):
    with launcher.exclusive_launch(tmp_path / "mine"):
        by_me = rf"sweep=mine: is being launched already, by process {os.getpid()}"
        with pytest.raises(UserError, match=by_me), launcher.exclusive_launch(tmp_path / "mine"):
            pass
        with launcher.exclusive_launch(tmp_path / "other"):
            pass
    with launcher.exclusive_launch(tmp_path / "mine"):
        pass


def test_nothing_is_unpickled_where_others_can_write(tmp_path):
    folder = private(tmp_path / "mine" / "sweep")
    assert folder.stat().st_mode & 0o777 == 0o700
    (tmp_path / "mine").chmod(0o770)
    with pytest.raises(UserError, match=r"hydra.launcher.folder=.*others may write"):
        private(tmp_path / "mine" / "sweep")


def test_numbers_are_taken_where_slurm_takes_them():
    given = slurm_with(mem=3000, account=17)
    assert (given.mem, given.account) == ("3000", "17")


def test_a_job_that_gets_further_each_time_is_not_to_blame(work):
    """Its process is killed again and again, but for its time limit, say."""

    def run(pack: Pack) -> PackState:
        (folder,) = pack.folders
        number = progress.batches_done(folder)
        run_status.write_state(folder, "running" if number < 6 else "finished")
        (folder / f"progress-{number:06d}-x.parquet").touch()
        return PackState("TIMEOUT", "node1", True, "")

    fake, ended = work("a", run)
    assert len(fake.submissions) == 7 and ended["a"].state == "finished"


def test_preemption_is_nobodys_fault_and_no_lack_of_memory(work, tmp_path):
    (tmp_path / "log").write_text("slurmstepd: error: task 0: Killed\n")
    places = [PackState("PREEMPTED", "node1", True, "")] * 4 + [PackState("TIMEOUT", "node1", True, "")] * 9

    def run(pack: Pack) -> PackState:
        run_status.write_state(pack.folders[0], "running")
        return places.pop(0)

    fake, ended = work("a", run)
    assert len(fake.submissions) == 6
    assert "its process died 2 times: TIMEOUT" in ended["a"].reason and "memory" not in ended["a"].reason


def test_what_failed_in_a_pack_that_still_runs_is_submitted_again(work, tmp_path):
    failed, running = (str(tmp_path / "sweep" / name) for name in "ab")
    run_status.write_state(Path(failed), "failed", "no such luck")

    def run(pack: Pack) -> PackState:
        run_status.write_state(Path(running), "finished")
        return dies_at("")(pack)

    left = PackState("RUNNING", "node1", False, "")
    fake, ended = work("ab", run, live={"early": [failed, running]}, known={"early": left})
    assert fake.submissions == ["a"]
    assert {status.state for status in ended.values()} == {"finished"}


def test_what_finishes_while_the_queue_is_asked_is_left_alone(monkeypatch, tmp_path):
    table = pd.DataFrame({"a": [1]})
    (job,) = make(tmp_path, "a")

    class Slow(FakeQueue):
        def live_packs(self) -> dict[str, list[str]]:
            run_folder.finish(job.folder, table, table, 1.0)  # meanwhile
            return {}

    queue = Slow(lambda pack: OVER, tmp_path / "log")
    mine = supervisor.Supervisor(queue, 1, {job.folder: job})
    mine.start(None)
    assert queue.submissions == [] and run_folder.finished(job.folder)


def test_a_refused_submission_is_said_and_what_is_queued_goes_on(monkeypatch, tmp_path, caplog):
    """More packs than a site allows."""
    monkeypatch.setattr(supervisor, "LOOK_SECONDS", 0)

    class Full(FakeQueue):
        def submit(self, packs: list[Pack]) -> dict[str, Pack]:
            if self.submissions:
                raise UserError("hydra.launcher: sbatch refuses: QOSMaxSubmitJobPerUserLimit")
            return super().submit(packs)

    full = Full(dies_at(""), tmp_path / "log", max_packs_per_submission=2)
    mine = supervisor.Supervisor(full, 1, {job.folder: job for job in make(tmp_path, "abcd")})
    mine.start(1)
    mine.watch()
    ended = {folder.name: run_status.read(folder) for folder in mine.jobs}
    assert [ended[name].state for name in "abcd"] == ["finished", "finished", "failed", "failed"]
    assert "QOSMaxSubmit" in ended["d"].reason and "2 packs already in the queue" in caplog.text


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """A SlurmQueue whose squeue and scontrol print what the files `squeue.out` and `scontrol.out` hold, or fail where
    there is none, and whose sbatch writes its variables down."""
    folder = tmp_path / "bin"
    folder.mkdir()
    unknown = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
    scripts = {
        "squeue": f"env | grep -E '^(SQUEUE|SLURM)_' >>'{tmp_path}/env'; cat '{tmp_path}/squeue.out'",
        "scontrol": f"echo $@ >>'{tmp_path}/scontrol.asked'; cat '{tmp_path}/scontrol.out' || {{ {unknown}; }}",
        "scancel": f"echo $@ >>'{tmp_path}/scancel.out'",
        "sbatch": f"env >'{tmp_path}/sbatch.env'; cat '{tmp_path}/sbatch.err' >&2 && exit 1; echo Batch job 18",
        "srun": "",
    }
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "POLL_SECONDS", 0)

    def make_queue(**own) -> slurm.SlurmScheduler:
        return slurm_with(**{"folder": str(tmp_path / "private"), **own}).queue(tmp_path / "sweep")

    name = make_queue().name
    files.write_json(tmp_path / "sweep" / ".dispatch" / f"{name}-1.json", {"packs": [["/a"], ["/b"]], "job": "17"})
    return make_queue, f"{name}-1"


def test_a_launch_waits_for_squeue_rather_than_submit_twice(asked, tmp_path):
    make_queue, name = asked
    with pytest.raises(UserError, match="squeue does not answer, so it is not known what runs already"):
        make_queue().live_packs()
    (tmp_path / "squeue.out").write_text(f"{name}|1|RUNNING|node1|17|None\n{name}|0|COMPLETED||17|None\n")
    assert make_queue().live_packs() == {f"{name}.1": ["/b"]}


def test_what_was_cancelled_is_not_waited_for(asked, tmp_path):
    """It may take SLURM half a minute to kill it."""
    make_queue, name = asked
    (tmp_path / "squeue.out").write_text(f"{name}|1|COMPLETING|node1|17|None\n{name}|0|RUNNING|node1|17|None\n")
    queue = make_queue()
    assert len(queue.live_packs()) == 2
    queue.cancel([f"{name}.1"])
    assert (tmp_path / "scancel.out").read_text() == "--quiet 17_1\n"
    assert make_queue().live_packs() == {f"{name}.0": ["/a"]}


@pytest.mark.parametrize(
    ("tasks", "name", "live"),
    [
        ("ArrayTaskId=0-1%256 JobName=NAME JobState=PENDING", "NAME", "01"),
        ("ArrayTaskId=0 JobName=NAME JobState=RUNNING\nArrayTaskId=1 JobName=NAME JobState=FAILED", "NAME", "0"),
        ("ArrayTaskId=1 JobName=NAME JobState=RUNNING", "NAME", "1"),
        ("ArrayTaskId=0,1 JobName=another JobState=RUNNING", "NAME", ""),  # SLURM began to count anew
        (None, "NAME", ""),
        ("ArrayTaskId=0,...%256 JobName=NAME JobState=PENDING", "NAME", "01"),  # the list is cut off
        ("ArrayTaskId=0-1...%4 JobName=NAME JobState=PENDING", "NAME", "01"),
        ("ArrayTaskId=0... JobName=NAME JobState=PENDING\nArrayTaskId=1 JobName=NAME JobState=FAILED", "NAME", "0"),
    ],
)
def test_a_pack_that_squeue_leaves_out_is_asked_for_by_its_number(asked, tmp_path, monkeypatch, tasks, name, live):
    """A filter of the user's, or of the site's own squeue, hides them: alone that is no death."""
    make_queue, name = asked
    monkeypatch.setenv("SQUEUE_PARTITION", "another")
    monkeypatch.setenv("SLURM_CLUSTERS", "another")
    monkeypatch.setenv("SLURM_CONF", "/here")
    (tmp_path / "squeue.out").write_text("")
    if tasks is not None:
        (tmp_path / "scontrol.out").write_text(tasks.replace("NAME", name) + "\n")
    queue = make_queue()
    assert "".join(pack[-1] for pack in queue.live_packs()) == live
    assert sorted((tmp_path / "env").read_text().split()) == ["SLURM_BITSTR_LEN=0", "SLURM_CONF=/here"]
    assert (tmp_path / "scontrol.asked").read_text() == "--all --oneliner show job 17\n"
    places = queue.poll()
    assert places is not None and all(places[f"{name}.{i}"].is_over == (str(i) not in live) for i in (0, 1))


def test_without_an_answer_by_number_nothing_is_taken_for_over(asked, tmp_path):
    make_queue, name = asked
    (tmp_path / "squeue.out").write_text(f"{name}|1|RUNNING|node1|17|None\n")
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\necho 'Socket timed out' >&2; exit 1\n")
    queue = make_queue()
    with pytest.raises(UserError, match="it is not known what runs already"):
        queue.live_packs()
    assert queue.poll() is None


def test_what_is_over_is_not_asked_for_again_and_again(asked, tmp_path):
    make_queue, name = asked
    (tmp_path / "squeue.out").write_text(f"{name}|1|RUNNING|node1|17|None\n{name}|0|COMPLETED||17|None\n")
    queue = make_queue()
    queue.live_packs()
    (tmp_path / "squeue.out").write_text(f"{name}|1|RUNNING|node1|17|None\n")
    for _ in range(3):
        places = queue.poll()
        assert places and places[f"{name}.0"].state == "COMPLETED"
    assert not (tmp_path / "scontrol.asked").exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"packs": [["/a"]], "job": 17}', '{"packs": "/a"}'])
def test_a_damaged_record_of_what_still_runs_is_said(asked, tmp_path, content):
    make_queue, name = asked
    (tmp_path / "sweep" / ".dispatch" / f"{name}.json").write_text(content)
    (tmp_path / "sweep" / ".dispatch" / f"{name} (copy).json").write_text(content)
    (tmp_path / "squeue.out").write_text(f"{name}|1|RUNNING|node1|17|None\n")
    with pytest.raises(UserError, match=f"{name}.json: is damaged.*type scancel --name={name}"):
        make_queue().live_packs()
    (tmp_path / "squeue.out").write_text("")
    assert make_queue().live_packs() == {}
    assert list(make_queue().submit([Pack({"/c": {}})])) == [f"{name[:-1]}2.0"]


def test_defaults_of_the_user_for_sbatch_stay_but_for_those_that_an_option_sets(asked, tmp_path, monkeypatch):
    given = {"ACCOUNT": "mine", "PARTITION": "slow", "GRES": "gpu:1", "QOS": "low", "TIMELIMIT": "9", "GPUS": "2",
             "MEM_PER_CPU": "1", "COMMENT": "c", "JOB_NAME": "n", "WAIT": "1", "EXPORT": "NONE",
             "RESERVATION": "r"}  # fmt: skip
    for key, value in given.items():
        monkeypatch.setenv(f"SBATCH_{key}", value)
    monkeypatch.setenv("SLURM_NTASKS", "7")  # of a job in which the launcher runs

    def seen(**options) -> set[str]:
        make_queue, _ = asked
        make_queue(**options).submit([Pack({"/c": {}})])
        lines = (tmp_path / "sbatch.env").read_text().splitlines()
        assert not [line for line in lines if line.startswith("SLURM_")]
        return {line.split("=")[0][7:] for line in lines if line.startswith("SBATCH_")}

    all_of_them = given.keys() - {"TIMELIMIT", "JOB_NAME", "WAIT", "EXPORT"}
    assert seen() == all_of_them
    assert seen(partition="fast", mem="1GB", gres="gpu:2", qos="high", sbatch={"reservation": "s"}) == {
        "ACCOUNT",
        "COMMENT",
    }
    assert seen(account="b") == all_of_them - {"ACCOUNT"}
    assert os.environ["SBATCH_WAIT"] == "1" and os.environ["SLURM_NTASKS"] == "7"


def test_an_array_is_as_long_as_the_site_allows(asked, tmp_path):
    make_queue, _ = asked
    assert make_queue().max_packs_per_submission == 1000
    (tmp_path / "scontrol.out").write_text("MaxArraySize            = 16\nMaxJobCount = 9\n")
    assert make_queue().max_packs_per_submission == 16


@pytest.mark.parametrize(
    "said", ["AssocMaxSubmitJobLimit", "QOSMaxSubmitJobPerUserLimit", "Invalid job array specification"]
)
def test_a_refusal_for_too_many_packs_names_the_remedy(asked, tmp_path, said):
    make_queue, _ = asked
    (tmp_path / "sbatch.err").write_text(f"sbatch: error: Batch job submission failed: {said}\n")
    with pytest.raises(UserError, match=rf"sbatch refuses: .*{said}.*; raise hydra\.launcher\.max_jobs_per_pack"):
        make_queue().submit([Pack({"/c": {}})])
    (tmp_path / "sbatch.err").write_text("sbatch: error: Batch job submission failed: Invalid account\n")
    with pytest.raises(UserError, match="Invalid account") as refused:
        make_queue().submit([Pack({"/c": {}})])
    assert "max_jobs_per_pack" not in str(refused.value)


def test_a_pack_that_gets_nowhere_before_its_time_limit_is_given_up(monkeypatch, tmp_path):
    monkeypatch.setattr(packs_module, "_leaving", threading.Event())  # which others of this process would see
    run_status.write_state(tmp_path / "a", "running")
    (tmp_path / "a" / "progress-000000-x.parquet").touch()
    pack = Pack({str(tmp_path / "a"): {}})
    for stalls in (0, 1, 2):  # the first time, there was a batch
        pack = pack.checkpoint().function
        assert pack.stalls == stalls
    (tmp_path / "a" / "progress-000001-x.parquet").touch()
    assert pack.checkpoint().function.stalls == 0
    pack()
    assert "raise hydra.launcher.time" in run_status.read(tmp_path / "a").reason


def test_retry_runs_nothing_that_others_may_have_written(tmp_path):
    run_folder.queue(tmp_path / "sweep" / "a", {"seed": 0}, survives_launcher=True)
    run_status.write_state(tmp_path / "sweep" / "a", "failed")
    (tmp_path / "sweep" / "a").chmod(0o775)
    with pytest.raises(UserError, match="others may write to it"):
        launcher.retry(tmp_path / "sweep")


def test_retry_of_a_finished_sweep_says_so_and_is_no_error(tmp_path, monkeypatch, capsys):
    run_folder.finish(tmp_path / "sweep" / "a", pd.DataFrame({"value": [1.0]}), pd.DataFrame({"n": [1.0]}), 1.0)
    monkeypatch.setattr(launcher, "launch", lambda *_: pytest.fail("launched"))
    launcher.retry(tmp_path / "sweep")
    assert "none is missing" in capsys.readouterr().out
