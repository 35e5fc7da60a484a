"""Two methods that stop after different numbers of documents are compared on those that both have."""

from __future__ import annotations

import pandas as pd
from command import Launch

from ablation_sweeps.results.curves import read_curves
from ablation_sweeps.results.metrics import measure, ratio

METHODS = ("zero", "resample-random_input")  # not from the batch: these are put together otherwise
OPTIONS = ("-m", "method=zero,resample_random", "fraction=0.5", "model.max_tokens=64", "statistics.tokens=1000",
           "tracking=none")  # fmt: skip


def documents_of(sweep, method: str) -> pd.DataFrame:
    (file,) = sweep.glob(f"*-{method}-s0-*/documents.parquet")
    return pd.read_parquet(file)


def test_curves_are_compared_on_the_documents_that_all_have(launch: Launch, tmp_path):
    assert launch(*OPTIONS, "sweep=whole").code == 0
    whole = {method: documents_of(tmp_path / "results" / "whole", method) for method in METHODS}
    first = {method: table[(table["document"] < 32) & (table["fraction"] == 0.5)] for method, table in whole.items()}
    stderr = [ratio(table["loss"].to_numpy(), table["n"].to_numpy())[1] for table in first.values()]

    done = launch(*OPTIONS, "sweep=stopped", f"eval.target_stderr={sum(stderr) / 2}")
    assert done.code == 0 and "of the data was enough" in done.err
    stopped = tmp_path / "results" / "stopped"
    sizes = {method: documents_of(stopped, method).groupby("fraction").size()[0.5] for method in METHODS}
    assert sorted(sizes.values()) == [32, len(whole["zero"]) // 2]

    curves = read_curves(stopped)
    for method in METHODS:
        for fraction in (0.0, 0.5):
            table = whole[method]
            table = table[(table["document"] < 32) & (table["fraction"] == fraction)]
            rows = curves[(curves["method"] == method) & (curves["fraction"] == fraction)].set_index("metric")
            for metric in ("loss", "perplexity", "top1", "top10", "kl", "loss_skip50"):
                expected = measure(table, metric)  # batched otherwise, so rounded otherwise
                for key in ("value", "stderr", "n"):
                    assert abs(rows.loc[metric, key] - expected[key]) <= 1e-4 * abs(expected[key]) + 1e-6
