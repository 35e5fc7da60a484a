"""Sweeps on datasets of the hub's formats: prefetch, then offline; experiments and their grids."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pandas as pd
import pytest
import zstandard
from command import SMALL, Launch, text
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ablation_sweeps.data.encoder import Budget
from ablation_sweeps.experiment.config import to_job


@pytest.fixture
def pile(tmp_path: Path) -> Path:
    folder = tmp_path / "pile"
    (folder / "train").mkdir(parents=True)
    lines = [
        json.dumps({"text": text(i), "meta": {"pile_set_name": "Github" if i % 2 else "ArXiv"}}) for i in range(40)
    ]
    for name, part in {"train/00": lines[:20], "test": lines[20:]}.items():
        data = zstandard.ZstdCompressor().compress("\n".join(part).encode())
        (folder / f"{name}.jsonl.zst").write_bytes(data)
    return folder


def test_a_sweep_runs_offline_on_what_was_prefetched(launch: Launch, saved, pile, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home")  # what HF_HOME sets on import
    sweep = ["-m", "model=causal_lm", f"model.path={saved('llama')}", "model.label=tiny", "dataset=pile",
             f"dataset.path={pile}", "tracking=none", *SMALL, "method=zero,mean"]  # fmt: skip
    fetched = launch(*sweep, "prefetch=true")
    assert fetched.code == 0, fetched.err
    assert "everything needed is on this machine" in fetched.out
    assert not list(tmp_path.rglob("rows.parquet")) and not list(tmp_path.rglob("moments.safetensors"))
    kept = sorted((tmp_path / "home").rglob("*.parquet"))
    assert kept
    written = {file: file.stat().st_mtime_ns for file in kept}
    done = launch(*sweep)
    assert done.code == 0, done.err
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "home").rglob("*.parquet")} == written, "read again"
    assert len(list(tmp_path.rglob("rows.parquet"))) == 2


# Experiments


@pytest.fixture
def composed(repo: Path):
    with initialize_config_dir(str(repo / "conf"), version_base="1.3"):
        yield compose


def grid(composed, experiment: str, *overrides: str) -> list[list[str]]:
    """The options of all jobs, as Hydra's own sweeper makes them."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    hydra = composed("config", [f"experiment={experiment}"], return_hydra_config=True).hydra
    params = [f"{key}={value}" for key, value in hydra.sweeper.params.items()]
    parsed = OverridesParser.create().parse_overrides([f"experiment={experiment}", *params, *overrides])
    ((jobs),) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return [[*job] for job in jobs]


def test_the_paper_is_four_models_four_methods_three_seeds(composed):
    given = grid(composed, "paper")
    for seed in (42, 123, 456):
        assert sum(f"seed={seed}" in options for options in given) == len(given) / 3 == 16
    configs = [composed("config", options) for options in given if "seed=123" in options]
    assert not any({"experiment", "study"} & set(config) for config in configs)
    jobs = [to_job(config) for config in configs]
    models = {(job.model.name, job.dataset.name, job.model.dtype, job.budget("evaluation")) for job in jobs}
    tokens = Budget(100_000, None)
    pile = "monology/pile-uncopyrighted"
    assert models == {
        ("facebook/opt-1.3b", pile, "float16", tokens),
        ("mistralai/Mistral-7B-v0.1", pile, "float16", tokens),
        ("FacebookAI/roberta-large", pile, "float16", tokens),
        ("google/vit-base-patch16-224", "ILSVRC/imagenet-1k", "float32", Budget(None, 1000)),
    }
    assert {job.method.label for job in jobs} == {"zero", "mean", "peak", "resample-random_input"}
    assert {job.fraction.values for job in jobs} == {tuple(i / 10 for i in range(1, 11))}
    assert {job.budget("calibration") for job in jobs} == {Budget(10_000, None)}
    assert {job.sweep for job in jobs} == {"paper"}
    assert len({(job.model, job.method.label) for job in jobs}) == 16


def test_every_job_of_the_small_study_composes(composed):
    for options in grid(composed, "paper_small", "seed=42"):
        config = composed("config", options)
        OmegaConf.resolve(config.method)
        assert "experiment" not in config and "study" not in config


def test_the_small_study_runs_from_the_command_line(launch: Launch, tmp_path):
    """Cut down to what takes seconds; smollm2, which is not always there, is left to results/paper_small."""
    outcome = launch("-m", "experiment=paper_small", "study=small_vit", "method=zero,resample_random", "seed=42",
                     "fraction=0.5", "eval.images=8", "statistics.tokens=40", "tracking=none")  # fmt: skip
    assert outcome.code == 0, outcome.err
    rows = pd.concat(pd.read_parquet(file) for file in tmp_path.rglob("rows.parquet"))
    assert set(itertools.product(rows["method"], rows["seed"])) == {("zero", 42), ("resample-random_input", 42)}
