"""The clean pass that jobs share: the same bits, without the pass."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from examples import evaluated, short_of_memory, study_of
from PIL import Image

from ablation_sweeps.data.batch import Picture
from ablation_sweeps.data.encoder import Budget
from ablation_sweeps.experiment.clean_passes import CleanPasses
from ablation_sweeps.experiment.session import Session
from ablation_sweeps.methods.resample import AnotherExample
from ablation_sweeps.models.transformer import Transformer


def counted(model: Transformer) -> tuple[Transformer, list]:
    passes: list = []
    return dataclasses.replace(model, logits=lambda batch: passes.append(batch.names) or model.logits(batch)), passes


def two_jobs(study: dict) -> tuple[CleanPasses, list, list]:
    """The same curve twice, the second time with the clean passes of the first. Returns what each has passed."""
    model, first = counted(study["model"])
    clean = CleanPasses(model)
    first.clear()  # it has looked at the head, with a short input
    one = evaluated({**study, "model": model}, clean=clean)
    again, second = counted(study["model"])
    clean.model = again
    two = evaluated({**study, "model": again}, clean=clean)
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    pd.testing.assert_frame_equal(one, evaluated(study), check_exact=True)
    return clean, first, second


@pytest.mark.parametrize("family", ["llama", "opt", "bert"])
def test_the_second_job_makes_no_clean_pass(tiny, site, family):
    study = study_of(tiny(family), site, 1)
    n = len(study["batches"])
    clean, first, second = two_jobs(study)
    assert (len(clean.kept), len(first), len(second)) == (n, 2 * n, n) and n > 1
    assert all(x.shape[-1] != study["model"].logits(study["batches"][0]).shape[-1] for x in clean.kept.values())


@pytest.mark.parametrize("method", ["constant", "another example"])
def test_nor_does_it_where_batches_are_passed_in_parts(tiny, site, monkeypatch, method):
    monkeypatch.setattr(Transformer, "max_positions_per_pass", 1)
    study = study_of(tiny("llama"), site, 1)
    if method == "another example":
        study["replacement"] = AnotherExample()
    n = sum(len(batch.names) for batch in study["batches"])
    clean, first, second = two_jobs(study)
    assert (len(clean.kept), len(first), len(second)) == (n, 2 * n, n) and n > len(study["batches"])


@pytest.mark.parametrize("most", [(1, 9), (2, 1)])
def test_the_next_job_may_have_more_memory_or_less(tiny, site, most):
    """What was kept of the halves of a batch is not taken for the batch."""
    study = study_of(tiny("llama"), site, 1)
    assert max(len(batch.names) for batch in study["batches"]) > 2
    clean, expected = CleanPasses(study["model"]), evaluated(study)
    for n in most:
        small = short_of_memory(study["model"], n)
        clean.model = small
        found = evaluated(study, model=small, clean=clean, note=lambda text: None)
        pd.testing.assert_frame_equal(found, expected, rtol=1e-5, atol=1e-6)
    assert len({len(part) for part in clean.kept}) > 1


@pytest.mark.parametrize("family", ["vit", "timm_vit"])
def test_of_an_image_classifier_logits_are_kept(tiny, site, family):
    noise = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    pictures = [Picture(str(i), partial(Image.fromarray, pixels), i % 3) for i, pixels in enumerate(noise)]
    model = tiny(family)
    clean, first, second = two_jobs(
        study_of(model, site, 0, model.encode(pictures, "evaluation", Budget(None, None), 1, 0))
    )
    assert len(clean.kept) == len(second) == len(first) / 2 > 1


def test_logits_that_are_capped_after_the_head_are_computed_again(tiny, site):
    """Keeping what the head takes would give others."""
    study = study_of(tiny("gemma2"), site, 1)
    clean, first, second = two_jobs(study)
    assert not clean.kept and len(second) == len(first)


def test_what_has_no_room_is_computed_again(tiny, site):
    study = study_of(tiny("llama"), site, 1)
    batches = study["batches"]
    clean = CleanPasses(study["model"])
    clean.logits((0,), batches[0], torch.arange(3))
    clean.room = 10
    logits = clean.logits((1,), batches[1], places := torch.tensor([5, 2]))
    assert list(clean.kept) == [(0,)] and torch.equal(logits, study["model"].logits_at(batches[1], places))


@pytest.mark.parametrize(("model", "shared"), [("tiny_causal", True), ("tiny_masked", False)])
def test_seeds_share_the_pass_unless_they_mask_other_tokens(job_of, model, shared):
    one, two = (job_of(f"model={model}", "tracking=none", f"seed={seed}") for seed in (0, 1))
    session = Session()
    assert (session.clean_passes(one) is session.clean_passes(two)) == shared
    batches = [session.batches(job, "evaluation") for job in (one, two)]
    inputs = [torch.cat([batch.inputs["input_ids"].flatten() for batch in of_job]) for of_job in batches]
    assert torch.equal(*inputs) == shared
