"""The second pass over the calibration data is read from disk: the same bits, without the model."""

from __future__ import annotations

import dataclasses
import resource
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from test_activations import CountingBody, assert_equal, batches_of

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


def test_nor_does_it_matter_how_it_lies_in_memory(tmp_path):
    recording, x = Replay(tmp_path), torch.arange(12.0).reshape(3, 4)
    with recording.record(lambda *_: None) as see:
        for part in (x.T, x[:, ::2], x[:0]):
            see(0, part)
    played = []
    recording.play(lambda _, part: played.append(part))
    assert list(map(torch.equal, played, (x.T, x[:, ::2], x[:0]))) == [True] * 3


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


def test_one_pass_writes_nothing(study, tmp_path):
    recording = Replay(tmp_path)
    _, passes = study(recording, H, passes=1)
    assert passes == 1 and not recording.whole


def test_it_leaves_no_file(study, tmp_path):
    recording = Replay(tmp_path / "here")
    study(recording, H)
    assert recording.whole and not list((tmp_path / "here").iterdir())


# Without room


def on_a_disk_of(monkeypatch, free: int) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10 * free, 9 * free, free))


def test_it_takes_half_of_a_disk_at_the_most(study, tmp_path, monkeypatch):
    expected, _ = study(None, H)
    recording = Replay(tmp_path)
    study(recording, H)
    size = recording._file.seek(0, 2)
    for free, fits in ((0, False), (2 * size - 1, False), (2 * size, True)):
        on_a_disk_of(monkeypatch, free)
        recording.whole = False
        found, passes = study(recording, H)
        assert passes == (1 if fits else 2) and recording.whole == fits
        assert fits or recording._file is None
        assert_equal(expected, found, H)


def test_nor_more_than_its_room(study, tmp_path):
    assert study(Replay(tmp_path, room=10_000), H)[1] == 2
    assert study(Replay(tmp_path, room=10**9), H)[1] == 1


@pytest.mark.parametrize("room", ["two parts", "all but ten bytes"])
def test_a_disk_that_fills_up_costs_no_result(study, tmp_path, monkeypatch, room):
    """The system refuses to write, or writes a part of what it is given."""
    plain, _ = study(None, H)
    recording = Replay(tmp_path)
    study(recording, H)
    sizes = [4 * part.shape.numel() for part in recording._parts]
    size = {"two parts": sum(sizes[:2]), "all but ten bytes": sum(sizes) - 10}[room]
    original, seen = CalibrationData._pass, []

    def with_little_room(*arguments):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            original(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            seen.append(recording._file)

    monkeypatch.setattr(CalibrationData, "_pass", with_little_room)
    recording.whole = False
    found, passes = study(recording, H)
    assert passes == 2 and not recording.whole
    assert seen == [None, None]  # closed, so that others have the room
    assert_equal(plain, found, H)


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
    assert seen and not recording.whole and recording._file is None
    seen.clear()
    CalibrationData(model, projections, batches, recording).run(see, "")
    n = len(seen)
    CalibrationData(model, projections, batches, recording).run(see, "")
    assert len(seen) == 2 * n == 2 * len(projections) * len(batches)


@pytest.mark.parametrize("how", ["altered", "truncated"])
def test_a_disk_that_gives_back_something_else_is_noticed(study, tmp_path, how):
    recording = Replay(tmp_path)
    study(recording)
    size = recording._file.seek(0, 2)
    if how == "truncated":
        recording._file.truncate(size - 5)
    else:
        recording._file.seek(size // 2)
        recording._file.write(b"\0\0\0\0")
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
