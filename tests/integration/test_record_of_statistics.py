"""environment.json tells what the statistics of a run were taken from."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ablation_sweeps.experiment.run import run_job
from ablation_sweeps.experiment.session import Session
from ablation_sweeps.results import run_folder
from ablation_sweeps.results.curves import read_curves

FEW = ("model=tiny_causal", "tracking=none", "eval.documents=2", "fraction.values=[0.5]")


@pytest.mark.parametrize(
    ("method", "options", "recorded"),
    [
        ("mean", ["statistics.tokens=300"], (300, 300)),
        ("peak", ["statistics.tokens=10000000"], (..., 10_000_000)),  # all there are
        ("mean", ["statistics.documents=1", "model.max_tokens=20"], (20, 20)),  # the option that ends it
        ("zero", ["statistics.tokens=300"], (None, None)),  # it has no statistics
    ],
)
def test_positions_taken_and_asked_for_are_recorded(job_of, tmp_path, monkeypatch, method, options, recorded):
    monkeypatch.setattr("ablation_sweeps.datasets.python_docs.PythonDocs.examples", few_documents)
    folder = run_job(job_of(*FEW, f"method={method}", f"results_dir={tmp_path}", *options))
    environment = run_folder.environment(folder)
    taken, asked = (environment.get(key) for key in ("calibration_positions", "calibration_asked"))
    if recorded[0] is ...:
        assert 300 < taken < 10_000 and asked == recorded[1]
    else:
        assert (taken, asked) == recorded


def few_documents(dataset, split):
    from ablation_sweeps.data.batch import Document

    names = [f"{split}{i}" for i in range(4)]
    return [Document(name, f"{name} is a list of names, and each of them is one word. " * 8) for name in names]


def test_a_fragile_method_from_halved_batches_is_a_line_of_its_own(job_of, tmp_path, monkeypatch):
    """One of two seeds had too little memory: rounding may have moved peaks across the range, but no mean by much."""
    monkeypatch.setattr("ablation_sweeps.datasets.python_docs.PythonDocs.examples", few_documents)
    options, session = (*FEW, "statistics.tokens=300", "model.max_tokens=40"), Session()

    def run(method: str, *more: str) -> None:
        folder = tmp_path / more[-1].replace("=", "")  # each with a cache of its own
        run_job(job_of(*options, f"method={method}", f"results_dir={folder}", *more), session)

    methods = ("mean", "peak", "peak method.estimator=grenander", "median")
    for method in methods:
        run(*method.split(), "seed=0")
    model = session.model(job_of(*options))

    def body(batch):
        if len(batch.names) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return model.body(batch)

    session._model = dataclasses.replace(model, body=body)
    session._start_anew()
    for method in methods:
        run(*method.split(), "seed=1")
    found = read_curves(tmp_path).groupby("method")["seed"].agg(set).to_dict()
    assert found == {"mean": {0, 1}, "median": {0, 1}, "peak-grenander": {0, 1},
                     "peak": {0}, "peak statistics=halved": {1}}  # fmt: skip
    for file in tmp_path.rglob("environment.json"):
        noted = any(
            "too little memory for 4 examples" in note for note in run_folder.environment(file.parent).get("notes", [])
        )
        assert noted == ("-s1-" in file.parent.name)
