"""Files that are edited in the middle of a sweep: nothing is kept under the name of what it was not computed with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from command import Launch, same_bits, states

from ablation_sweeps.base import hashing
from ablation_sweeps.cli.launch import session
from ablation_sweeps.methods.mean import Mean
from ablation_sweeps.results import run_folder

METHOD = """
from pathlib import Path
import torch
from pydantic.dataclasses import dataclass
from ablation_sweeps import Constant

VALUE = 0.0

@dataclass(frozen=True)
class Edited:
    label: str

    def fit(self, fitting):
        Path(__file__).write_text(Path(__file__).read_text().replace("VALUE = 0.0", "VALUE = 5.0"))
        return Constant([torch.full((p.width,), VALUE) for p in fitting.projections])
"""


@pytest.fixture
def copies(saved, texts, tmp_path) -> dict[str, Path]:
    folders = {"model": tmp_path / "model", "dataset": tmp_path / "texts"}
    shutil.copytree(saved("llama"), folders["model"])
    shutil.copytree(texts, folders["dataset"])
    return folders


@pytest.mark.parametrize("edited", ["model", "dataset"])
def test_the_model_or_the_data(launch: Launch, on_text, copies, tmp_path, monkeypatch, edited):
    options = ("-m", *on_text, f"model.path={copies['model']}", f"dataset.path={copies['dataset']}", "method=mean")
    original, name = Mean.fit, {"model": "a.json", "dataset": "a.txt"}[edited]

    def fit(self: Mean, fitting):
        (copies[edited] / name).write_text('"the cat saw a dog and ran far away from it."')
        return original(self, fitting)

    monkeypatch.setattr(Mean, "fit", fit)
    outcome = launch(*options, "seed=0,1")
    assert "2 of 2 jobs failed" in outcome.error and "its files changed" in outcome.error
    assert f"{edited}=" in outcome.error
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    sweep = tmp_path / "results" / "default"
    assert set(states(sweep).values()) == {"failed"} and not list(sweep.glob("*/rows.parquet"))

    session.cache_clear()  # as in a new process
    for where in ("results", "fresh"):
        assert launch(*options, "seed=0,1", f"results_dir={where}").code == 0
    same_bits(tmp_path / "fresh" / "default", sweep)
    assert sorted(states(sweep).values()) == ["failed", "failed", "finished", "finished"]


def test_a_method_of_ones_own(launch: Launch, on_text, tmp_path, monkeypatch):
    """Python has imported it, so all jobs of the sweep are of what it was."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "edited_method.py").write_text(METHOD)
    before = hashing.fingerprint_of_file(tmp_path / "edited_method.py")
    (tmp_path / "conf" / "method").mkdir(parents=True)
    (tmp_path / "conf" / "method" / "edited.yaml").write_text("_target_: edited_method.Edited\nlabel: edited\n")
    assert launch("--config-dir", str(tmp_path / "conf"), "-m", *on_text, "method=edited", "seed=0,1").code == 0
    runs = [pd.read_parquet(path) for path in tmp_path.glob("results/default/*/rows.parquet")]
    assert len(runs) == 2 and "VALUE = 5.0" in (tmp_path / "edited_method.py").read_text()
    kinds = {json.loads(params)["class"] for rows in runs for params in rows["method_params"]}
    assert kinds == {f"Edited@{before[:6]}"}


def test_a_result_of_other_code_is_kept_and_said(launch: Launch, on_text, tmp_path):
    assert "another version" not in launch("-m", *on_text, "method=mean", "seed=0").err
    (run,) = tmp_path.glob("results/default/*-s0-*")
    run_folder.update_environment(run, code="edited since")
    run_folder.finish(run, *(pd.read_parquet(run / f"{name}.parquet") for name in ("rows", "documents")), seconds=1.0)
    again = launch("-m", *on_text, "method=mean", "seed=0,1").err
    assert "1 of 2 jobs finished by another version of this code, whose numbers are taken for equal" in again
    assert f": {run.name}; results_dir=FOLDER computes anew" in again
    shutil.rmtree(run)
    assert "another version" not in launch("-m", *on_text, "method=mean", "seed=0,1").err
