"""What becomes of packs, without a cluster: a queue whose packs end as the test says."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from command import ROOT

from ablation_sweeps import dispatch, store
from ablation_sweeps.data import UserError
from ablation_sweeps.packs import Pack, packed
from ablation_sweeps.queue import Place
from ablation_sweeps.slurm import Slurm, private

OVER = Place("FAILED", "node1", True, "")


def make(folder: Path, names: str, model: str = "m", dataset: str = "d") -> list:
    """One job for each letter."""
    jobs = []
    for name in names:
        where = folder / "sweep" / name
        jobs.append(SimpleNamespace(folder=where, model=model, dataset=dataset, config={}, results_dir=folder))
    return jobs


@dataclass
class FakeQueue:
    """`run` is what each pack does; it returns where the pack is afterwards."""

    run: Callable[[Pack], Place]
    log: Path
    live: dict[str, list[str]] = field(default_factory=dict)
    submissions: list[str] = field(default_factory=list)
    known: dict[str, Place] = field(default_factory=dict)

    def submit(self, packs: list[Pack]) -> dict[str, Pack]:
        self.submissions += ["".join(folder.name for folder in pack.folders) for pack in packs]
        named = {f"pack{len(self.known) + i}": pack for i, pack in enumerate(packs)}
        for name, pack in named.items():
            self.known[name] = self.run(pack)
        return named

    def earlier(self) -> dict[str, list[str]]:
        return self.live

    def places(self) -> dict[str, Place]:
        return self.known

    def cancel(self, packs: list[str]) -> None:
        raise AssertionError("nobody asked for this")

    def log_of(self, pack: str) -> Path:
        return self.log


@pytest.fixture
def work(monkeypatch, tmp_path):
    monkeypatch.setattr(dispatch, "LOOK_SECONDS", 0)

    def start(names: str, run: Callable[[Pack], Place], max_attempts: int = 2, **queue) -> tuple[FakeQueue, dict]:
        fake = FakeQueue(run, tmp_path / "log", **queue)
        mine = dispatch.Work(fake, max_attempts, {job.folder: job for job in make(tmp_path, names)})
        mine.start(None)
        mine.watch()
        return fake, {folder.name: store.status(folder) for folder in mine.jobs}

    return start


def dies_at(bad: str, state: str = "running"):
    """The process dies at these jobs, having finished those before them."""

    def run(pack: Pack) -> Place:
        for folder in pack.folders:
            store.write_status(folder, state if folder.name in bad else "finished")
            if folder.name in bad:
                return OVER
        return Place("COMPLETED", "node1", True, "")

    return run


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
    assert {name: status["state"] for name, status in ended.items()} == dict(
        a="finished", b="failed", c="finished", d="finished"
    )
    assert "its process died 2 times" in ended["b"]["reason"]


def test_a_pack_that_never_starts_is_given_up(work, tmp_path):
    (tmp_path / "log").write_text("ModuleNotFoundError: No module named 'ablation_sweeps'\n")
    fake, ended = work("ab", lambda pack: OVER)
    assert fake.submissions == ["ab", "a", "b"]
    assert all("No module named" in status["reason"] for status in ended.values())


def test_a_job_that_was_interrupted_is_not_to_blame(work):
    seen: list[Pack] = []

    def run(pack: Pack) -> Place:
        seen.append(pack)
        store.write_status(pack.folders[0], "interrupted" if len(seen) < 5 else "finished")
        return OVER

    fake, ended = work("a", run)
    assert len(fake.submissions) == 5 and ended["a"]["state"] == "finished"


def test_what_the_admin_cancels_stays_cancelled(work):
    fake, ended = work("ab", lambda pack: Place("CANCELLED", "", True, ""))
    assert fake.submissions == ["ab"]
    assert all(status["reason"].startswith("cancelled") for status in ended.values())


def test_a_pack_that_is_put_into_the_queue_again_is_left_alone(monkeypatch, tmp_path):
    """SLURM says for a moment that it is over."""
    monkeypatch.setattr(dispatch, "LOOK_SECONDS", 0)
    (job,) = make(tmp_path, "a")
    answers = [OVER, Place("PENDING", "", False, ""), OVER, Place("RUNNING", "node2", False, "")]

    class Requeued(FakeQueue):
        def places(self) -> dict[str, Place]:
            if not answers:
                store.write_status(job.folder, "finished")
                return {}
            return {"pack0": answers.pop(0)}

    queue = Requeued(lambda pack: OVER, tmp_path / "log")
    mine = dispatch.Work(queue, 1, {job.folder: job})
    mine.start(None)
    mine.watch()
    assert queue.submissions == ["a"] and store.status(job.folder)["state"] == "finished"


def test_what_an_earlier_launch_submitted_is_not_submitted_again(work, tmp_path):
    running = str(tmp_path / "sweep" / "b")
    left = Place("RUNNING", "node1", False, "")

    def run(pack: Pack) -> Place:
        store.write_status(Path(running), "finished")  # meanwhile
        return dies_at("")(pack)

    fake, ended = work("abc", run, live={"early": [running]}, known={"early": left})
    assert fake.submissions == ["ac"]
    assert {status["state"] for status in ended.values()} == {"finished"}


def test_a_second_launch_of_the_sweep_says_so(tmp_path):
    with dispatch.only_one(tmp_path / "mine"):
        by_me = rf"sweep=mine: is being launched already, by process {os.getpid()}"
        with pytest.raises(UserError, match=by_me), dispatch.only_one(tmp_path / "mine"):
            pass
        with dispatch.only_one(tmp_path / "other"):
            pass
    with dispatch.only_one(tmp_path / "mine"):
        pass


def test_nothing_is_unpickled_where_others_can_write(tmp_path):
    folder = private(tmp_path / "mine" / "sweep")
    assert folder.stat().st_mode & 0o777 == 0o700
    (tmp_path / "mine").chmod(0o770)
    with pytest.raises(UserError, match=r"hydra.launcher.folder=.*others may write"):
        private(tmp_path / "mine" / "sweep")


def test_numbers_are_taken_where_slurm_takes_them():

    options = yaml.safe_load((ROOT / "conf" / "hydra" / "launcher" / "slurm.yaml").read_text())
    options = {key: value for key, value in options.items() if key not in ("_target_", "to")}
    given = Slurm(**{**options, "mem": 3000, "account": 17})
    assert (given.mem, given.account) == ("3000", "17")
