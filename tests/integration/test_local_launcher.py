"""hydra/launcher=local: packs in processes of their own, on this machine."""

from __future__ import annotations

import json

from command import FAULTS, Launch, same_bits, states

LOCAL = ("-m", "hydra/launcher=local", "hydra.launcher.gpus=[]")


def state_of(sweep, method: str) -> dict:
    (status,) = sweep.glob(f"tiny-texts-{method}-s*/status.json")
    return json.loads(status.read_text())


def test_the_same_bits_as_in_one_process_whatever_happens_to_others(launch: Launch, on_text, faults, tmp_path):
    """Of one pack of six jobs, one raises, one poisons its process once, one kills it once and one always."""
    assert launch("-m", *on_text, "method=zero,mean", "results_dir=plain").code == 0
    methods = "method=raises,zero,kills,poisons,kills_once,mean"
    done = launch(*FAULTS, *LOCAL, *on_text, methods, "hydra.launcher.max_parallel=2")
    assert "2 of 6 jobs failed, the others are finished and kept" in done.error
    sweep = tmp_path / "results" / "default"
    same_bits(tmp_path / "plain" / "default", sweep)
    assert state_of(sweep, "raises")["reason"] == "ValueError: no such luck"
    assert state_of(sweep, "kills")["state"] == "failed"
    assert "its process died 2 times: FAILED killed by SIGKILL" in state_of(sweep, "kills")["reason"]
    assert "memory" in state_of(sweep, "kills")["reason"]
    for method in ("zero", "poisons", "kills_once", "mean"):
        assert state_of(sweep, method)["state"] == "finished", method
    marks = sorted(mark.name for mark in faults.iterdir())
    assert marks == ["kills-1", "kills-2", "kills_once-1", "kills_once-2", "poisons-1", "poisons-2", "raises-1"]

    files = {path: path.stat().st_mtime_ns for path in sweep.glob("*-zero-*/*")}
    again = launch(*FAULTS, *LOCAL, *on_text, "method=zero,mean")
    assert again.code == 0 and "2 jobs: 2 finished, 0 in 0 packs" in again.err
    assert {path: path.stat().st_mtime_ns for path in sweep.glob("*-zero-*/*")} == files
    assert set(states(sweep).values()) == {"finished", "failed"}


def test_what_is_wrong_with_an_option_is_said_in_one_line(launch: Launch, on_text):
    assert "hydra.launcher.max_attempts=0: must be" in launch(*LOCAL, *on_text, "hydra.launcher.max_attempts=0").error
