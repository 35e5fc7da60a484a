"""The second pass over the calibration data is read from disk: the same bits, without the model."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import torch
from examples import CountingBody, assert_equal, batches_of

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.experiment.run import run_job
from ablation_sweeps.experiment.session import Session
from ablation_sweeps.neurons import sites, tensor_cache
from ablation_sweeps.neurons.collect import CalibrationData, collect
from ablation_sweeps.neurons.replay import Replay
from ablation_sweeps.neurons.statistics import Histogram

H = Histogram(100)


@pytest.fixture
def study(tiny, site, tmp_path):
    """`study(recording, *histograms)` collects with nothing kept, and counts how often each batch was passed."""
    model = tiny("llama")
    projections, batches = sites.find(model, site("attn_pre_out"), None), batches_of(model)
    assert len(batches) > 1 and not all(batch.keep.all() for batch in batches)  # there is padding

    def run(recording: Replay | None, *histograms: Histogram, passes: int = 2):
        body = CountingBody(model.body)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        counting = dataclasses.replace(model, body=body)
        found = collect(
            counting, projections, batches, tmp_path / "cache", *histograms, passes=passes, replay=recording
        )
        return found, body.calls / len(batches)

    return run


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, torch.float32) for family in ("llama", "opt", "albert", "vit", "timm_swin")]
    + [("llama", torch.bfloat16)],
)
@pytest.mark.parametrize("name", ["attn_pre_out", "mlp_pre_out"])
def test_what_is_played_is_what_was_seen(fresh, site, tmp_path, family, dtype, name):
    model = fresh(family)
    model.module.to(dtype)
    projections = sites.find(model, site(name), None)
    batches = [model.other_input("probe", 8, seed) for seed in range(3)]
    first, second = [], []
    data = CalibrationData(model, projections, batches, Replay(tmp_path))
    data.run(lambda layer, x: first.append((layer, x.clone())), "")
    data.run(lambda layer, x: second.append((layer, x.clone())), "")
    assert len(first) == len(second) >= len(projections)
    for (layer, x), (other, y) in zip(first, second, strict=True):
        assert layer == other and x.dtype == y.dtype == dtype
        assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def test_two_passes_are_one_of_the_model(study, tmp_path):
    plain, passes = study(None, H, Histogram(7))
    assert passes == 2
    found, passes = study(Replay(tmp_path), H, Histogram(7))
    assert passes == 1
    assert_equal(plain, found, H, Histogram(7))


def test_the_jobs_that_follow_read_it_too(study, tmp_path):
    recording = Replay(tmp_path)
    _, passes = study(recording)  # of a mean: the moments alone
    assert passes == 1
    found, passes = study(recording, H)
    assert passes == 0
    assert_equal(study(None, H)[0], found, H)


# Without room


def test_a_pass_that_failed_is_not_played(tiny, site, tmp_path):
    model = tiny("llama")
    projections, batches = sites.find(model, site("attn_pre_out"), None), batches_of(model)
    recording, seen = Replay(tmp_path), []

    def interrupted(batch):
        if len(seen) == len(projections):
            raise KeyboardInterrupt
        return model.body(batch)

    def see(layer, x):
        seen.append(layer)

    with pytest.raises(KeyboardInterrupt):
        CalibrationData(dataclasses.replace(model, body=interrupted), projections, batches, recording).run(see, "")
    assert seen and not recording.whole
    seen.clear()
    CalibrationData(model, projections, batches, recording).run(see, "")
    n = len(seen)
    CalibrationData(model, projections, batches, recording).run(see, "")
    assert len(seen) == 2 * n == 2 * len(projections) * len(batches)


@pytest.mark.parametrize("how", ["altered", "truncated"])
def test_a_disk_that_gives_back_something_else_is_noticed(study, tmp_path, how):
    recording = Replay(tmp_path)
    study(recording)
    (link,) = (link for link in Path("/proc/self/fd").iterdir() if f"{tmp_path}/" in os.path.realpath(link))
    with open(link, "r+b", buffering=0) as file:  # which has no name
        size = file.seek(0, 2)
        if how == "truncated":
            file.truncate(size - 5)
        else:
            file.seek(size // 2)
            file.write(b"\0\0\0\0")
    with pytest.raises(UserError, match="does not give back"):
        study(recording, H)
    assert study(recording, H)[1] == 1  # from the beginning


# Jobs


FEW = ["model=tiny_causal", "tracking=none", "statistics.tokens=500"]


def test_jobs_share_it_where_they_have_the_same_data(job_of, tmp_path):
    session = Session()

    def recording(*options: str) -> Replay | None:
        one = job_of(*FEW, f"results_dir={tmp_path}", *options)
        return session.replay(one)

    first = recording("method=mean", "seed=0")
    assert recording("method=peak", "seed=1", "eval.tokens=77") is first
    for other in ("dataset=python_code", "statistics.tokens=600", "batch_tokens=999", "site=mlp_pre_out"):
        assert recording(other) is not first
        first = recording("method=mean", "seed=0")
    first = recording()
    session.model(job_of("model=tiny_masked"))
    assert recording() is not first


def test_a_sweep_passes_its_calibration_data_once(job_of, tmp_path, monkeypatch):
    passes, original, session = [], CalibrationData._pass, Session()
    monkeypatch.setattr(CalibrationData, "_pass", lambda *arguments: passes.append(1) or original(*arguments))
    for method in ("zero", "mean", "peak", "median"):
        one = job_of(*FEW, "eval.tokens=300", "fraction.values=[0.5]", f"results_dir={tmp_path}", f"method={method}")
        run_job(one, session)
    assert len(passes) == 1
    (cache,) = (file.parent for file in Path(tmp_path).glob(".cache/*/moments.safetensors"))
    played = {file.name: tensor_cache.load_tensors(file) for file in cache.glob("*-*.safetensors")}
    assert sorted(name.partition("-")[0] for name in played) == ["counts", "medians"]
    shutil.rmtree(cache)
    monkeypatch.setattr(Session, "replay", lambda *_: None)
    for method in ("peak", "median"):
        one = job_of(*FEW, "eval.tokens=300", "fraction.values=[0.5]", f"results_dir={tmp_path}", f"method={method}",
                     "sweep=again")  # fmt: skip
        run_job(one, session)
    assert len(passes) >= 1 + 2 + 2  # peak's, and at least two more of the median
    for name, tensors in played.items():
        again = tensor_cache.load_tensors(cache / name)
        assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items()) and len(again) == len(tensors)
