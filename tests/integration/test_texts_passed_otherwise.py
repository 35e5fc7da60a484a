"""Numbers of a model that is passed texts apart are never those of an earlier version, which passed them together."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
from command import Launch, text

from ablation_sweeps.cli.launch import session
from ablation_sweeps.experiment import session as session_module
from ablation_sweeps.models import masked_lm
from ablation_sweeps.neurons.certificate import Certificate
from ablation_sweeps.results import progress
from ablation_sweeps.results.curves import read_curves
from ablation_sweeps.results.sweep import read_studies

WARNING = "texts were passed together, but other runs of this model pass them apart"


@pytest.fixture
def earlier(monkeypatch) -> Iterator[Callable[[bool], None]]:
    """`earlier(True)`: as an earlier version: all texts together, and no certificate to refuse that."""
    isolate, certify = masked_lm.isolate, session_module.certify

    def switch(on: bool) -> None:
        session.cache_clear()
        monkeypatch.setattr(masked_lm, "isolate", (lambda model, *_: model) if on else isolate)
        monkeypatch.setattr(session_module, "certify", (lambda *_: Certificate(())) if on else certify)

    yield switch
    session.cache_clear()


@pytest.fixture
def options(on_text, sees_padding, tmp_path) -> list[str]:
    (tmp_path / "texts").mkdir()
    for i in range(24):
        (tmp_path / "texts" / f"{i}.txt").write_text(text(i)[: 5 + i])
    others = [option for option in on_text if not option.startswith(("model", "dataset.path"))]
    model = ["model=masked_lm", f"model.path={sees_padding}", "model.label=tiny"]
    return [*model, *others, f"dataset.path={tmp_path / 'texts'}", "site=mlp_pre_out", "batch_tokens=400"]


def run_of(sweep: Path, method: str) -> Path:
    (run,) = sweep.glob(f"*-{method}-s0-*")
    return run


def record(run: Path) -> dict:
    return json.loads((run / "environment.json").read_text())


def test_results_of_before_are_neither_compared_nor_left_without_a_word(launch: Launch, options, earlier, tmp_path):
    sweep = tmp_path / "results" / "default"
    earlier(True)
    done = launch("-m", *options, "method=zero,mean")
    assert done.code == 0 and WARNING not in done.out
    before = {path: path.read_bytes() for path in sweep.glob("*/rows.parquet")}
    earlier(False)
    assert launch("-m", *options, "method=zero,mean,resample,peak").out.count(WARNING) == 1
    assert {path: path.read_bytes() for path in before} == before
    texts = {method: record(run_of(sweep, method)).get("texts") for method in ("zero", "mean", "resample", "peak")}
    assert texts == {"zero": None, "mean": None, "resample": "apart", "peak": "apart"}
    summary = pd.read_csv(sweep / "summary.csv")
    studies = summary.groupby("study")["method"].agg(lambda methods: " ".join(sorted({*methods})))
    assert {*studies} == {"mean zero", "peak resample"}
    assert dict(zip(summary["method"], summary["options"], strict=True)) == {
        "zero": "texts passed together", "mean": "texts passed together",
        "resample": "texts passed apart", "peak": "texts passed apart",
    }  # fmt: skip
    assert f"mean, zero: {WARNING}" in (sweep / "report.html").read_text()
    # Statistics of before are not taken either, and what it says to do gives the right numbers.
    anew = tmp_path / "NEW" / "default"
    assert WARNING not in launch("-m", *options, "method=zero,mean,resample,peak", "results_dir=NEW").out
    assert (run_of(anew, "peak") / "rows.parquet").read_bytes() == (run_of(sweep, "peak") / "rows.parquet").read_bytes()
    for run in (run_of(anew, "zero"), run_of(anew, "mean")):
        assert not pd.read_parquet(run / "rows.parquet").equals(pd.read_parquet(sweep / run.name / "rows.parquet"))


def test_a_job_in_both_ways_is_two_studies_each_with_its_own_documents(launch: Launch, options, earlier, tmp_path):
    alone = {}
    for place, on in (("together", True), ("apart", False)):
        earlier(on)
        assert launch(*options, "method=zero", f"results_dir={place}").code == 0
        sweep = tmp_path / place
        ((_, found),) = read_studies(read_curves(sweep), sweep)
        alone[found.area("loss", "zero").value] = place
    one, other = alone
    assert abs(one - other) > 1e-4, "it does matter"
    both = read_studies(read_curves(tmp_path), tmp_path)
    assert {found.area("loss", "zero").value for _, found in both} == set(alone)


def test_batches_that_were_passed_otherwise_are_computed_again(launch: Launch, options, earlier, tmp_path, monkeypatch):
    small = [*options, "method=mean", "batch_tokens=80"]
    assert launch(*small, "results_dir=whole").code == 0
    (whole,) = (tmp_path / "whole" / "default").glob("*-mean-*")
    run, save = tmp_path / "results" / "default" / whole.name, progress.save

    def save_two(folder: Path, number: int, table: pd.DataFrame) -> None:
        save(folder, number, table)
        if number == 1:
            raise KeyboardInterrupt

    said = "texts are passed apart, but were passed together in 2 batches of an earlier launch, computed again"
    for together in (True, False):
        earlier(together)
        with monkeypatch.context() as patch:
            patch.setattr(progress, "save", save_two)
            stopped = launch(*small)
        assert stopped.code and "continues after" not in stopped.err and progress.batches_done(run) == 2
        assert stopped.err.count(said) == (0 if together else 1)
    done = launch(*small)
    assert "continues after 2 batches" in done.err and said not in done.err and said in record(run)["notes"]
    assert (run / "documents.parquet").read_bytes() == (whole / "documents.parquet").read_bytes()
