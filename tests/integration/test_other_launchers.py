"""Launchers and sweepers of other packages, folders that a job changes to, and errors after a job was measured."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml
from command import Launch, Outcome, same_bits, states, write_texts
from hydra.core.plugins import Plugins

from ablation_sweeps.methods.zero import Zero


@pytest.fixture
def optimise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, launch: Launch) -> Launch:
    """Launches with a sweeper that works as Optuna's: it asks for jobs one by one, and is told a number of each."""
    package = tmp_path / "plugin" / "hydra_plugins" / "optuna_like"
    package.mkdir(parents=True)
    (package / "sampler.py").write_text(
        "from hydra.core.plugins import Plugins\nfrom hydra.plugins.sweeper import Sweeper\n\n\n"
        "class Sampler(Sweeper):\n"
        "    def __init__(self, **options):\n        pass\n\n"
        "    def setup(self, **given):\n        self.launcher = Plugins.instance().instantiate_launcher(**given)\n\n"
        "    def sweep(self, arguments):\n"
        "        told = []\n"
        "        for i, fixed in enumerate(('method=zero', 'method=mean')):\n"
        "            (ret,) = self.launcher.launch([[*arguments, fixed]], initial_job_idx=i)\n"
        "            told.append(float(ret.return_value))\n"
        "        open('told', 'w').write(repr(told))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "plugin"))
    module = importlib.import_module("hydra_plugins.optuna_like.sampler")

    def run(*options: str) -> Outcome:
        Plugins.instance().register(module.Sampler)
        return launch("-m", "hydra.sweeper._target_=hydra_plugins.optuna_like.sampler.Sampler", *options)

    return run


def test_an_optimiser_is_told_the_area_of_each_curve(optimise: Launch, on_text, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    options = [*on_text, "fraction=[0.5,1.0]", "hydra/launcher=local"]
    assert "objective" in optimise(*options).error
    assert "objective=auc/less" in optimise(*options, "objective=auc/less").error
    assert "objective=auc/loss: needs" in optimise(*options, "objective=auc/loss", "fraction=half").error
    assert states(tmp_path / "results" / "default") == {}
    outcome = optimise(*options, "objective=auc/loss")
    assert outcome.code == 0, outcome.err
    expected = {}
    for rows in (tmp_path / "results" / "default").glob("*/rows.parquet"):
        table = pd.read_parquet(rows)
        loss = table[table["metric"] == "loss"].set_index("fraction")["value"]
        expected[table["method"].iloc[0]] = (loss[0.0] / 4 + loss[0.5] / 2 + loss[1.0] / 4) / loss[0.0]
    told = yaml.safe_load((tmp_path / "told").read_text())
    assert told == pytest.approx([expected["zero"], expected["mean"]], rel=1e-12) and told[0] != told[1]


def test_an_optimiser_hears_of_a_job_that_fails(optimise: Launch, on_text, tmp_path, monkeypatch):
    monkeypatch.setattr(Zero, "fit", lambda self, fitting: 1 / 0)
    assert "1 of 1 jobs failed" in optimise(*on_text, "objective=at_50/loss").error
    assert not (tmp_path / "told").exists()


def test_an_objective_is_no_part_of_a_result(launch: Launch, on_text, job_of):
    plain, named = job_of("method=zero"), job_of("method=zero", "objective=auc/loss")
    assert (plain.signature, plain.folder, plain.study_key) == (named.signature, named.folder, named.study_key)


@pytest.mark.parametrize(
    ("asked", "sweeper"), [("dry_run=true", "basic"), ("prefetch=true", "composed_by_the_launcher")]
)
def test_another_launcher_computes_nothing_that_was_not_asked_for(
    launch: Launch, on_text, no_weights, tmp_path, asked, sweeper, monkeypatch
):
    monkeypatch.setattr("ablation_sweeps.experiment.job.Job.fetch", lambda self: None)
    outcome = launch("-m", *on_text, "hydra/launcher=basic", f"hydra/sweeper={sweeper}", "method=zero,mean", asked)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("to run" if "dry" in asked else "everything needed") == 2
    assert states(tmp_path / "results" / "default") == {}


def test_another_launcher_gives_the_same_numbers(launch: Launch, on_text, tmp_path):
    assert launch("-m", *on_text, "hydra/launcher=basic", "method=zero,mean").code == 0
    assert launch("-m", *on_text, "results_dir=ours", "method=zero,mean").code == 0
    same_bits(tmp_path / "results" / "default", tmp_path / "ours" / "default")


@pytest.mark.parametrize("multirun", [["-m"], ["-m", "hydra/launcher=basic"]], ids=["sweep", "basic"])
def test_paths_begin_where_the_command_was_typed(launch: Launch, on_text, saved, tmp_path, multirun):
    """Also if Hydra changes the folder for each job."""
    write_texts(tmp_path / "data[1]", n=6)
    write_texts(tmp_path / "more", n=9)
    shutil.copytree(saved("llama"), tmp_path / "model")
    rest = [option for option in on_text if not option.startswith(("dataset.path", "model.path", "model.label"))]
    paths = ["'dataset.path=\"data[1]\"'".strip("'"), "dataset.calibration_path=more/*[678].txt", "model.path=./model"]
    options = [*rest, *(path.replace("*[678]", "[678]") if "more" in path else path for path in paths)]
    options = [option.replace("more/[678].txt", "'more/[678].txt'") for option in options]
    at_rest = launch(*multirun, *options, "method=zero", "sweep=plain")
    assert at_rest.code == 0, at_rest.err
    moved = launch(*multirun, *options, "method=zero", "sweep=moved", "hydra.job.chdir=true")
    assert moved.code == 0, moved.err
    assert len(states(tmp_path / "results" / "moved")) == 1
    assert len(states(tmp_path / "results" / "plain")) == 1
    same_bits(tmp_path / "results" / "plain", tmp_path / "results" / "moved")
    assert {path.name for path in tmp_path.iterdir()} == {"data[1]", "more", "model", "results"}
    assert {path.name for path in (tmp_path / "results").iterdir()} <= {"plain", "moved", ".cache"}


def test_the_largest_seed_there_is(launch: Launch, on_text, tmp_path):
    assert launch(*on_text, "method=resample_random", f"seed={2**63 - 1}").code == 0
    assert list(states(tmp_path / "results" / "default").values()) == ["finished"]


# A message names the option at fault.


def test_the_folder_of_a_launcher_is_not_that_of_the_results(launch: Launch, on_text, tmp_path):
    (tmp_path / "file").write_text("")
    error = launch("-m", *on_text, "hydra/launcher=slurm", f"hydra.launcher.folder={tmp_path / 'file'}").error
    assert "hydra.launcher.folder" in error and "results_dir" not in error
