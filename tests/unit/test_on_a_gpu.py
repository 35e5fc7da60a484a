"""Whole jobs on a pretended GPU: nothing is left on the wrong side, and the numbers are those of the CPU."""

from __future__ import annotations

import dataclasses

import pandas as pd
import pretended_gpu
import pytest
import torch
from pretended_gpu import OnGpu, pretended

from ablation_sweeps.experiment.run import run_job
from ablation_sweeps.experiment.session import Session
from ablation_sweeps.methods.zero import Zero
from ablation_sweeps.neurons import sites
from ablation_sweeps.neurons.collect import collect
from ablation_sweeps.neurons.hooks import ablated
from ablation_sweeps.neurons.statistics import Histogram

FEW = ["tracking=none", "eval.tokens=600", "statistics.tokens=600", "eval.images=8", "fraction.values=[0.5,1.0]"]
JOBS = [
    ["model=tiny_causal", "method=zero"],
    ["model=tiny_causal", "method=resample"],
    ["model=tiny_causal", "method=resample_random"],
    ["model=tiny_causal", "method=peak", "statistics.passes=1", "site=mlp_pre_out"],
    ["model=tiny_causal", "method=mean", "model.pack=concatenate", "model.dtype=bfloat16"],
    ["model=tiny_causal", "method=median", "eval.target_stderr=5", "batch_tokens=1024"],
    ["model=tiny_masked", "method=peak"],
    ["model=tiny_vit", "dataset=digits", "method=peak", "method.estimator=kde"],
    ["model=tiny_vit", "dataset=digits", "method=resample"],
]


@pytest.fixture
def gpu(monkeypatch):
    with pretended(monkeypatch):
        yield


@pytest.fixture
def session() -> Session:
    return Session()


def rows_of(job_of, session, folder, *overrides) -> pd.DataFrame:
    one = job_of(*FEW, f"results_dir={folder}", *overrides)
    return pd.read_parquet(run_job(one, session) / "rows.parquet")


def test_it_is_as_strict_as_a_gpu(gpu):
    x = torch.ones(3, device="cuda")
    assert isinstance(x, OnGpu) and x.device.type == "cuda" and x.is_cuda
    assert type(x.cpu()) is type(x.to("cpu")) is type(x.to(device=torch.device("cpu"))) is torch.Tensor
    assert isinstance(torch.ones(3).to(x), OnGpu) and isinstance(torch.ones(3).to(x.device), OnGpu)
    assert isinstance(torch.nn.Linear(2, 2).to("cuda").weight, OnGpu)
    for wrong in (
        lambda: x + torch.ones(3),
        lambda: torch.ones(3)[x.long()],
        lambda: torch.cat([x, torch.ones(1)]),
        lambda: torch.where(torch.ones(3) > 0, x, x),
        lambda: torch.zeros(3).index_add_(0, torch.arange(3), x),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            wrong()
    with pytest.raises(TypeError):
        x.numpy()
    assert (x + torch.tensor(2.0)).tolist() == [3, 3, 3]
    assert x[torch.tensor([1])].tolist() == [1]


@pytest.mark.parametrize(
    ("family", "name"),
    [("opt", "mlp_pre_out"), ("gemma2", "attn_pre_out"), ("falcon_alibi", "attn_pre_out"), ("albert", "mlp_pre_out"),
     ("modernbert", "attn_pre_out"), ("vit", "attn_pre_out"), ("swin", "mlp_pre_out"), ("timm_swin", "attn_pre_out")],
)  # fmt: skip
def test_every_kind_is_loaded_read_and_ablated_there(fresh, site, tmp_path, gpu, family, name):
    """Rows that are flattened, windowed or padded by the model, and layers that share a module."""
    found = {}
    for device in ("cuda", "cpu"):
        model = fresh(family, device=device)
        batch, projections = model.other_input("probe", 8, 3), sites.find(model, site(name), None)
        statistics = collect(model, projections, [batch], tmp_path / device, Histogram(10))
        masks = [torch.arange(p.width, device=model.device) % 2 == 0 for p in projections]
        with ablated(projections, masks, [m.mean for m in statistics.moments], 1):
            logits = model.logits(batch.to(model.device))
        assert isinstance(logits, OnGpu) == (device == "cuda")
        found[device] = [m.total for m in statistics.moments] + statistics.counts[Histogram(10)] + [logits.cpu()]
    for there, here in zip(found["cuda"], found["cpu"], strict=True):
        assert torch.equal(there, here)


@pytest.mark.parametrize("overrides", JOBS, ids=" ".join)
def test_a_job_gives_the_numbers_of_the_cpu(job_of, session, tmp_path, gpu, overrides):
    there = rows_of(job_of, session, tmp_path / "there", *overrides, "model.device=cuda")
    model = session._model
    assert all(isinstance(parameter, OnGpu) for parameter in model.module.parameters())
    here = rows_of(job_of, session, tmp_path / "here", *overrides, "model.device=cpu")
    pd.testing.assert_frame_equal(there, here, check_exact=True)


@pytest.mark.parametrize("options", [["model=tiny_vit", "dataset=digits"], ["model=tiny_causal", "eval.documents=1"]])
def test_a_point_more_waits_for_nothing_more(job_of, session, tmp_path, gpu, options):
    """While a GPU computes, the next pass is queued."""
    waits = []
    for fractions in ("[0.1]", "[0.5]", "[0.2,0.4,0.6,0.8]"):  # the first loads, and collects
        pretended_gpu.waited.clear()
        rows_of(job_of, session, tmp_path, *options, "method=mean", "model.device=cuda", f"fraction.values={fractions}")
        waits.append(len(pretended_gpu.waited))
    pretended_gpu.waited.clear()
    model = session._model
    model.logits(model.other_input("probe", 8, 0).to(model.device))
    own = len(pretended_gpu.waited)  # transformers looks whether a text is padded
    assert waits[2] - waits[1] == 3 * own
    assert waits[1] > own


class BatchMean:
    reads_clean = True

    def __call__(self, batch, clean):
        return [x[batch.keep].mean(0) for x in clean]


def test_what_does_not_fit_is_halved(job_of, session, tmp_path, gpu, monkeypatch):
    """Where the values to write are those of the whole batch."""
    monkeypatch.setattr(Zero, "fit", lambda *_: BatchMean())  # which has no reason to think of devices
    options = ["model=tiny_causal", "method=zero"]
    here = rows_of(job_of, session, tmp_path / "here", *options)
    rows_of(job_of, session, tmp_path, *options, "model.device=cuda")
    model = session._model

    def small(run):
        def or_not(batch):
            if len(batch.names) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return run(batch)

        return or_not

    session._model = dataclasses.replace(model, logits=small(model.logits), body=small(model.body))
    session._start_anew()
    there = rows_of(job_of, session, tmp_path / "there", *options, "model.device=cuda")
    pd.testing.assert_frame_equal(there, here, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["mean", "resample"])
def test_a_model_may_be_spread_over_two_devices(job_of, session, tmp_path, gpu, method):
    """The first half of the layers on the CPU, the other half on the GPU."""
    from accelerate import dispatch_model

    here = rows_of(job_of, session, tmp_path / "here", "model=tiny_causal", f"method={method}")
    model = session._model
    where = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu",
             "model.layers.2": 0, "model.layers.3": 0, "model.norm": 0, "lm_head": "cpu"}  # fmt: skip
    dispatch_model(model.module, where, main_device=torch.device("cpu"), force_hooks=True)
    assert {type(parameter) for parameter in model.module.parameters()} == {torch.nn.Parameter, OnGpu}
    there = rows_of(job_of, session, tmp_path / "there", "model=tiny_causal", f"method={method}")
    pd.testing.assert_frame_equal(there, here, check_exact=True)
