"""eval.target_stderr: a point that is precise enough gets no more documents, and keeps the ones of all others."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest
import torch
from examples import TOP_K, evaluated
from linear import VOCABULARY, D, scored_labels

from ablation_sweeps.data.batch import NOT_SCORED, Batch
from ablation_sweeps.experiment.chance import uniform
from ablation_sweeps.experiment.evaluate import LEAST, metrics, ratio

WINDOWS, PER_WINDOW = 6, (12, 11, 9)


@pytest.fixture
def long_study(study) -> dict:
    """192 documents in windows of 32, which are batched in another order than their own. The first two windows hold
    long ones first, as windows do."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for window in range(WINDOWS):
        places = (window * LEAST + np.random.default_rng(window).permutation(LEAST)).tolist()
        for size in PER_WINDOW:
            index, places = tuple(places[:size]), places[size:]
            x = torch.randn(size, 12, D, generator=generator)
            labels = torch.randint(0, VOCABULARY, (size, 12), generator=generator)
            labels[:, -1] = NOT_SCORED
            batches.append(Batch({"x": x}, labels, torch.ones_like(labels).bool(), tuple(map(str, index)), index))
    return {**study, "batches": batches}


def stderr_of(documents: pd.DataFrame) -> dict[float, float]:
    return {f: ratio(group["loss"].to_numpy(), group["n"].to_numpy())[1] for f, group in documents.groupby("fraction")}


def target_between(documents: pd.DataFrame, n: int) -> float:
    """What some fractions have reached after `n` documents, and others have not."""
    stderr = stderr_of(documents[documents["document"] < n])
    return float(np.mean([stderr[0.25], stderr[1.0]]))


def test_each_point_has_the_first_documents_and_is_as_precise_as_was_asked(long_study):
    whole = evaluated(long_study)
    target = target_between(whole, 2 * LEAST)
    documents = evaluated(long_study, target_stderr=target)
    counts = documents.groupby("fraction").size()
    assert counts[0.0] == counts.max() and counts.min() < counts.max()
    assert all(count % LEAST == 0 for count in counts)
    for fraction, group in documents.groupby("fraction"):
        expected = whole[(whole["fraction"] == fraction) & (whole["document"] < len(group))]
        pd.testing.assert_frame_equal(group.reset_index(drop=True), expected.reset_index(drop=True), check_exact=True)
        if fraction:
            reached = [stderr_of(whole[whole["document"] < n])[fraction] <= target
                       for n in range(LEAST, LEAST * WINDOWS + 1, LEAST)]  # fmt: skip
            assert len(group) == LEAST * (1 + reached.index(True) if any(reached) else WINDOWS)  # and no later


def test_another_method_shares_the_documents_of_the_shorter_curve(long_study):
    other = {**long_study, "replacement": type(long_study["replacement"])([torch.zeros(D)])}
    target = target_between(evaluated(long_study), 2 * LEAST)
    one, two = (evaluated(study_, target_stderr=target) for study_ in (long_study, other))
    sizes = [frame.groupby("fraction").size() for frame in (one, two)]
    assert not sizes[0].equals(sizes[1])  # else nothing is shown
    for fraction in (0.25, 0.5, 1.0):
        names = [set(frame.loc[frame["fraction"] == fraction, "name"]) for frame in (one, two)]
        assert names[0] <= names[1] or names[1] <= names[0]


def test_a_run_that_was_interrupted_anywhere_gives_the_same_bits(long_study):
    target = target_between(evaluated(long_study), 2 * LEAST)
    saved: list[pd.DataFrame] = []
    whole = evaluated(long_study, target_stderr=target, save=lambda number, table: saved.append(table))
    for n in range(len(saved)):
        again: dict[int, pd.DataFrame] = {}
        resumed = evaluated(long_study, target_stderr=target, done=saved[:n], save=again.__setitem__)
        pd.testing.assert_frame_equal(resumed, whole, check_exact=True)
        assert list(again) == list(range(n, len(saved)))


def test_no_pass_is_made_for_a_point_that_is_done(long_study, caplog):
    """And none at all when all are: counted in the model itself."""
    passes = []
    model = long_study["model"]
    handle = model.module.register_forward_hook(lambda *_: passes.append(1))
    with caplog.at_level(logging.INFO):
        documents = evaluated(long_study, target_stderr=1e9)
    handle.remove()
    assert documents["document"].max() + 1 == LEAST
    assert len(passes) == len(PER_WINDOW) * (1 + len(long_study["masks"]))
    assert f"{100 / WINDOWS:.0f} % of the data was enough" in caplog.text


def test_a_precision_that_is_not_reached_is_said(long_study, caplog):
    with caplog.at_level(logging.INFO):
        evaluated(long_study, target_stderr=1e-9)
    points = ", ".join(f"{point.fraction:.0%}" for point in long_study["masks"])
    assert f"100 % of the data was taken, and not enough at {points}" in caplog.text


def test_the_clean_model_alone_has_no_point_that_could_be_precise_enough(long_study, caplog):
    without = {**long_study, "masks": {}}
    with caplog.at_level(logging.INFO):
        documents = evaluated(without, target_stderr=1e9)
    pd.testing.assert_frame_equal(documents, evaluated(without), check_exact=True)
    assert len(documents) == LEAST * WINDOWS and "target_stderr" not in caplog.text


def test_metrics_count_what_was_evaluated(long_study):
    documents = evaluated(long_study, target_stderr=target_between(evaluated(long_study), 2 * LEAST))
    table = metrics(documents, uniform(VOCABULARY), scored_labels(long_study), TOP_K)
    n = table[table["metric"] == "loss"].set_index("fraction")["n"]
    assert n.to_dict() == documents.groupby("fraction")["n"].sum().to_dict()
