"""environment.json tells what the statistics of a run were taken from."""

from __future__ import annotations

import pytest

from ablation_sweeps import store
from ablation_sweeps.job import run_job

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
    environment = store.environment(folder)
    taken, asked = (environment.get(key) for key in ("calibration_positions", "calibration_asked"))
    if recorded[0] is ...:
        assert 300 < taken < 10_000 and asked == recorded[1]
    else:
        assert (taken, asked) == recorded


def few_documents(dataset, split):
    from ablation_sweeps.data import Document

    return [Document(f"{split}{i}", "There is a list of names, and each of them is one word. " * 8) for i in range(4)]
