"""Metrics against loops over single tokens in float64, and standard errors against resampling."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from examples import COMMON, TOP_K, evaluated, short_of_memory, study_of
from linear import FRACTIONS, VOCABULARY, D, scored_labels

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.data.batch import NOT_SCORED, Batch, Document
from ablation_sweeps.data.encoder import Budget
from ablation_sweeps.experiment.chance import ChanceModel, uniform, unigram
from ablation_sweeps.experiment.evaluate import SUMS, metrics, ratio
from ablation_sweeps.methods.method import Constant
from ablation_sweeps.methods.resample import AnotherExample, OneForEachText
from ablation_sweeps.models.transformer import Transformer
from ablation_sweeps.neurons.schedule import Point

PROBABILITY = torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.1
GUESS = ChanceModel(PROBABILITY / PROBABILITY.sum(), COMMON)


def naive_log_softmax(z: np.ndarray) -> np.ndarray:
    return z - z.max() - math.log(np.exp(z - z.max()).sum())


def naive_tokens(study) -> list[dict]:
    """One entry a scored token and fraction."""
    linear = study["model"].module.layers[0]["attn"]["proj"]
    weight, bias = linear.weight.detach().double().numpy(), linear.bias.detach().double().numpy()
    (replacement,) = study["replacement"].values
    tokens = []
    for batch in study["batches"]:
        for row, document in enumerate(batch.index):
            for position in range(12):
                label = int(batch.labels[row, position])
                if label == NOT_SCORED:
                    continue
                x = batch.inputs["x"][row, position].double().numpy()
                p = naive_log_softmax(weight @ x + bias)
                for fraction in (0.0, *FRACTIONS):
                    mask = study["masks"][Point(fraction)][0].numpy() if fraction else np.zeros(D, dtype=bool)
                    q = naive_log_softmax(weight @ np.where(mask, replacement.double().numpy(), x) + bias)
                    ranked = sorted(range(VOCABULARY), key=lambda token, q=q: -q[token])
                    tokens.append({"fraction": fraction, "document": document, "label": label, "loss": -q[label],
                                   "top1": float(ranked[0] == label), "top3": float(label in ranked[:TOP_K]),
                                   "kl": sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))})  # fmt: skip
    return tokens


def test_every_metric_is_that_of_a_loop_over_tokens(study):
    table = metrics(evaluated(study), GUESS, scored_labels(study), TOP_K).set_index(["fraction", "metric"])
    tokens = naive_tokens(study)
    for fraction in (0.0, *FRACTIONS):
        here = [token for token in tokens if token["fraction"] == fraction]
        rare = [token for token in here if token["label"] not in COMMON.tolist()]
        assert 0 < len(rare) < len(here)
        for metric in ("loss", "top1", "top3", "kl"):
            row = table.loc[fraction, metric]
            assert row["n"] == len(here)
            assert row["value"] == pytest.approx(np.mean([token[metric] for token in here]), rel=1e-5, abs=1e-6)
            if metric != "kl":
                row = table.loc[fraction, f"{metric}_skip3"]
                assert row["n"] == len(rare)
                assert row["value"] == pytest.approx(np.mean([token[metric] for token in rare]), rel=1e-5)
        mean_loss = np.mean([token["loss"] for token in here])
        assert table.loc[fraction, "perplexity"]["value"] == pytest.approx(math.exp(mean_loss), rel=1e-5)
    assert set(table.index.get_level_values("metric")) == {
        "loss", "perplexity", "top1", "top3", "kl", "loss_skip3", "top1_skip3", "top3_skip3"
    }  # fmt: skip
    assert table.loc[0.25, "kl"]["value"] > 0.01


def test_no_skip_metrics_without_common_tokens(study):
    none = torch.empty(0, dtype=torch.long)
    documents = evaluated(study, common=none)
    table = metrics(documents, uniform(VOCABULARY), scored_labels(study), TOP_K)
    assert set(table["metric"]) == {"loss", "perplexity", "top1", "top3", "kl"}


def test_images_are_scored_once_each(tiny, site):
    model = tiny("vit")
    pixels = torch.cat([model.other_input("random_pixels", 1, i).inputs["pixel_values"] for i in range(4)])
    labels = torch.tensor([0, 3, 2, 4])
    study = study_of(model, site, 0, [Batch({"pixel_values": pixels}, labels, None, tuple("abcd"), (0, 1, 2, 3))])
    with torch.inference_mode():
        logits = model.module(pixels).logits.double().numpy()
    table = metrics(evaluated(study, common=torch.empty(0, dtype=torch.long)), uniform(5), labels, TOP_K)
    table = table.set_index(["fraction", "metric"])
    losses = [-naive_log_softmax(z)[label] for z, label in zip(logits, labels, strict=True)]
    assert table.loc[0, "loss"]["value"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert table.loc[0, "top1"]["value"] == np.mean(logits.argmax(1) == labels.numpy())
    assert (table["n"] == 4).all()


# Ties and numbers that are none


@pytest.mark.parametrize("value", [0.0, 12345.0])
def test_a_model_that_gives_all_tokens_the_same_is_not_right(study, value):
    model = study["model"]
    constant = lambda batch: model.logits(batch) * 0 + value  # noqa: E731
    documents = evaluated(study, model=dataclasses.replace(model, logits=constant))
    labels = scored_labels(study)
    clean = documents.query("fraction == 0").sum(numeric_only=True)
    assert clean["top1"] == int((labels == 0).sum())  # always the first token
    assert clean["topk"] == int((labels < TOP_K).sum())
    assert clean["loss"] == pytest.approx(len(labels) * math.log(VOCABULARY), rel=1e-6)


def test_of_two_equal_first_tokens_one_is_right(study):
    def two_first(batch):
        logits = study["model"].logits(batch) * 0
        logits[..., 5] = logits[..., 9] = 3.0
        return logits

    model = dataclasses.replace(study["model"], logits=two_first)
    clean = evaluated(study, model=model, top_k=2).query("fraction == 0").sum(numeric_only=True)
    labels = scored_labels(study)
    assert clean["top1"] == int((labels == 5).sum())
    assert clean["topk"] == int(((labels == 5) | (labels == 9)).sum()) > clean["top1"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error(study, value):
    model = study["model"]
    broken = lambda batch: model.logits(batch).index_fill(-1, torch.tensor([4]), value)  # noqa: E731
    with pytest.raises(UserError, match=r"linear.*before anything is ablated.*model.dtype"):
        evaluated(study, model=dataclasses.replace(model, logits=broken))
    with pytest.raises(UserError, match=r"with 25% of the units ablated"):
        evaluated(study, replacement=Constant([torch.full((D,), value)]))


def test_nan_where_nothing_is_scored_does_not_matter(study):
    batches = []
    for batch in study["batches"]:
        x = batch.inputs["x"].clone()
        x[batch.labels == NOT_SCORED] = math.nan
        batches.append(dataclasses.replace(batch, inputs={"x": x}))
    pd.testing.assert_frame_equal(evaluated(study, batches=batches), evaluated(study))


def test_nothing_scored_is_an_error(study):
    batches = [dataclasses.replace(b, labels=torch.full_like(b.labels, NOT_SCORED)) for b in study["batches"]]
    with pytest.raises(UserError, match="nothing is scored"):
        evaluated(study, batches=batches)


# The order of the data and the size of the batches


@pytest.mark.parametrize("family", ["llama", "opt", "bert", "gpt2", "albert"])
def test_batches_and_padding_change_nothing_but_rounding(tiny, site, family):
    small, large = (evaluated(study_of(tiny(family), site, size)) for size in (1, 1000))
    assert len(study_of(tiny(family), site, 1)["batches"]) > 1 == len(study_of(tiny(family), site, 1000)["batches"])
    assert (small[["fraction", "document", "name", "n"]] == large[["fraction", "document", "name", "n"]]).all(None)
    np.testing.assert_allclose(small[["loss", "kl"]], large[["loss", "kl"]], atol=1e-4, rtol=1e-5)
    np.testing.assert_array_equal(small[["top1", "topk"]], large[["top1", "topk"]])


def test_batches_that_are_done_are_not_run_again_and_give_the_same_table(study):
    saved: list[pd.DataFrame] = []
    whole = evaluated(study, save=lambda number, table: saved.insert(number, table))
    assert len(saved) == 3
    calls = []
    model = study["model"]
    counting = lambda batch: calls.append(batch.names) or model.logits(batch)  # noqa: E731
    rest: list[pd.DataFrame] = []
    again = evaluated(
        study,
        model=dataclasses.replace(model, logits=counting),
        done=saved[:2],
        save=lambda number, table: rest.append(table),
    )
    assert len(calls) == 1 + len(FRACTIONS) and len(rest) == 1
    pd.testing.assert_frame_equal(again, whole)


# Standard errors


@pytest.fixture(scope="module")
def clusters():
    """60 documents of unequal lengths whose tokens resemble each other."""
    rng = np.random.default_rng(0)
    counts = rng.integers(5, 60, 60).astype(float)
    totals = counts * (3 + rng.normal(0, 0.4, 60)) + rng.normal(0, 1, 60) * np.sqrt(counts)
    return totals, counts


def test_stderr_is_the_formula(clusters):
    totals, counts = clusters
    value, stderr = ratio(totals, counts)
    assert value == pytest.approx(totals.sum() / counts.sum(), rel=1e-12)
    d = len(counts)
    squares = sum((t - value * c) ** 2 for t, c in zip(totals, counts, strict=True))
    assert stderr == pytest.approx(math.sqrt(d / (d - 1) * squares) / counts.sum(), rel=1e-12)


def test_stderr_is_near_the_jackknife_and_the_bootstrap(clusters):
    totals, counts = clusters
    _, stderr = ratio(totals, counts)
    d = len(counts)
    without = np.array([np.delete(totals, i).sum() / np.delete(counts, i).sum() for i in range(d)])
    assert stderr == pytest.approx(math.sqrt((d - 1) / d * ((without - without.mean()) ** 2).sum()), rel=0.05)
    draws = np.random.default_rng(1).integers(0, d, (4000, d))
    assert stderr == pytest.approx((totals[draws].sum(1) / counts[draws].sum(1)).std(), rel=0.1)


def test_stderr_of_single_images_is_that_of_a_mean():
    right = np.array([1.0, 0, 1, 1, 0, 1, 1])
    value, stderr = ratio(right, np.ones(7))
    assert value == right.mean()
    assert stderr == pytest.approx(right.std(ddof=1) / math.sqrt(7), rel=1e-12)


def test_documents_without_a_scored_token_do_not_count(clusters):
    totals, counts = clusters
    with_empty = ratio(np.append(totals, [0, 0]), np.append(counts, [0, 0]))
    assert with_empty == pytest.approx(ratio(totals, counts), rel=1e-12)


def test_one_document_has_no_stderr_and_none_has_no_value():
    value, stderr = ratio(np.array([6.0]), np.array([2.0]))
    assert value == 3 and math.isnan(stderr)
    assert all(map(math.isnan, ratio(np.zeros(2), np.zeros(2))))


def test_a_huge_loss_does_not_overflow(study):
    documents = evaluated(study)
    documents["loss"] = documents["n"] * 5000
    table = metrics(documents, GUESS, scored_labels(study), TOP_K)
    assert np.isfinite(table.query("metric == 'perplexity'")["value"]).all()


def test_pieces_of_a_document_are_one_unit(study):
    """As with model.pack=concatenate: their sums are added up, and one document has no standard error."""
    apart = evaluated(study)
    batches = [dataclasses.replace(b, documents=tuple(i // 6 for i in b.index)) for b in study["batches"]]
    together = evaluated(study, batches=batches)
    assert sorted(set(together["document"])) == [0, 1]
    expected = apart.assign(document=apart["document"] // 6).groupby(["fraction", "document"])[list(SUMS)].sum()
    pd.testing.assert_frame_equal(together.set_index(["fraction", "document"])[list(SUMS)], expected)
    a, b = (metrics(table, GUESS, scored_labels(study), TOP_K) for table in (apart, together))
    np.testing.assert_allclose(a["value"], b["value"])
    loss = a["metric"] == "loss"
    assert not np.isclose(a.loc[loss, "stderr"], b.loc[loss, "stderr"], rtol=0.01).any()


def test_the_clean_value_of_a_point_is_that_of_its_own_documents(study):
    """With eval.target_stderr, fractions have different numbers of documents."""
    documents = evaluated(study)
    some = documents[(documents["fraction"] != 0.5) | (documents["document"] < 4)]
    table = metrics(some, GUESS, scored_labels(study), TOP_K).set_index(["fraction", "metric"])
    clean = documents[documents["fraction"] == 0]
    for fraction, of in ((0.0, clean), (0.25, clean), (0.5, clean[clean["document"] < 4])):
        assert table.loc[(fraction, "loss"), "clean"] == of["loss"].sum() / of["n"].sum()
    assert table.loc[(0.5, "loss"), "clean"] != table.loc[(0.0, "loss"), "value"]


# Chance


def test_unigram_is_the_add_one_frequency_of_the_calibration_text(tiny):
    texts = ["aabbbc", "abd"]
    batches = tiny("llama").encode([Document(t, t) for t in texts], "calibration", Budget(None, None), 100, 0)
    guess = unigram(batches, 100, tiny("llama").special_ids, skip=2)
    a = 5  # the first character after five special tokens
    expected = np.ones(100)
    expected[[a, a + 1, a + 2, a + 3]] += [3, 4, 1, 1]
    np.testing.assert_allclose(guess.probability, expected / expected.sum())  # no BOS, no padding
    assert guess.common.tolist() == [a + 1, a]


def test_common_tokens_of_equal_count_are_taken_in_their_order(tiny):
    batches = tiny("llama").encode([Document("x", "cbadd")], "calibration", Budget(None, None), 100, 0)
    assert unigram(batches, 100, tiny("llama").special_ids, skip=3).common.tolist() == [8, 5, 6]
    assert len(unigram(batches, 100, tiny("llama").special_ids, skip=50).common) == 4


def test_what_the_statistics_leave_out_is_guessed_all_the_same(fresh):
    batches = fresh("llama", tokens="no_special").encode(
        [Document("x", "cbadd"), Document("y", "abc")], "calibration", Budget(None, None), 100, 0
    )
    assert not batches[0].keep[:, 0].any()
    assert unigram(batches, 100, frozenset(), skip=0).probability[1] == 3 / 110  # <s>, once in each; no padding


def test_special_tokens_that_are_scored_are_guessed_as_well(tiny):
    """Documents one after the other: `</s>` is a label among others."""
    batches = tiny("llama").encode([Document("x", "cbadd")], "calibration", Budget(None, None), 100, 0)
    batches[0].inputs["input_ids"][0, -1] = 2
    probability = unigram(batches, 100, tiny("llama").special_ids - {2}, skip=0).probability
    assert probability[2] == 2 * probability[1] == 2 / 105


def chance_of(study, guess: ChanceModel) -> dict[str, float]:
    table = metrics(evaluated(study, common=guess.common), guess, scored_labels(study), TOP_K)
    assert (table.groupby("metric")["chance"].nunique(dropna=False) == 1).all()
    return dict(zip(table["metric"], table["chance"], strict=True))


def test_chance_is_what_the_best_blind_guess_gets(study):
    chance = chance_of(study, GUESS)
    labels = scored_labels(study).tolist()
    p = GUESS.probability.tolist()
    ranked = sorted(range(VOCABULARY), key=lambda token: -p[token])
    rare = [label for label in labels if label not in COMMON.tolist()]
    for some, suffix in ((labels, ""), (rare, "_skip3")):
        assert chance[f"loss{suffix}"] == pytest.approx(-np.mean([math.log(p[label]) for label in some]))
        assert chance[f"top1{suffix}"] == pytest.approx(np.mean([label == ranked[0] for label in some]))
        assert chance[f"top3{suffix}"] == pytest.approx(np.mean([label in ranked[:3] for label in some]))
    assert chance["perplexity"] == pytest.approx(math.exp(chance["loss"]))
    assert math.isnan(chance["kl"])


def test_chance_among_equal_classes(study):
    chance = chance_of(study, uniform(VOCABULARY))
    assert chance["loss"] == pytest.approx(math.log(VOCABULARY))
    assert chance["top1"] == pytest.approx(1 / VOCABULARY)
    assert chance["top3"] == pytest.approx(3 / VOCABULARY)


# Memory


@dataclasses.dataclass
class OfTheBatch:
    """What a method of one's own may write, in each shape that broadcasts."""

    shape: tuple[int, ...]
    reads_clean: bool

    def __call__(self, batch, clean):
        (x,) = clean if self.reads_clean else [batch.inputs["x"]]
        over = [i for i, size in enumerate((1,) * (3 - len(self.shape)) + self.shape) if size == 1]
        return [x.mean(over, keepdim=True).reshape(self.shape)]


@dataclasses.dataclass
class Writing:
    values: Any
    reads_clean = False

    def __call__(self, batch, clean):
        return self.values


SHAPES = [(D,), (1, 12, D), (1, 1, D)]
REPLACEMENTS = {
    "constant": None,
    "another example": AnotherExample(),
    "one for each text": OneForEachText([torch.randn(11, D, generator=torch.Generator().manual_seed(3))]),
    **{f"{shape} of the batch, {clean}": OfTheBatch(shape, clean) for shape in SHAPES for clean in (True, False)},
}


@pytest.fixture(params=REPLACEMENTS)
def replacement(request, study):
    return REPLACEMENTS[request.param] or study["replacement"]


def test_a_batch_that_does_not_fit_is_halved_and_gives_the_same(study, replacement):
    notes: list[str] = []
    small = short_of_memory(study["model"], 1)
    found = evaluated(study, model=small, replacement=replacement, note=notes.append)
    expected = evaluated(study, replacement=replacement)
    pd.testing.assert_frame_equal(found, expected, check_exact=False, rtol=1e-6, atol=1e-9)
    assert [note.split()[7] for note in notes] == ["4", "2"]  # once, not for every batch
    assert all("last digit may differ" in note for note in notes)


def test_what_a_cpu_takes_longer_for_at_once_is_passed_in_parts_and_gives_the_same(study, replacement, monkeypatch):
    expected = evaluated(study, replacement=replacement)
    monkeypatch.setattr(Transformer, "max_positions_per_pass", 47)
    passed, notes = [], []
    logits = lambda batch: passed.append(len(batch.names)) or study["model"].logits(batch)  # noqa: E731
    model = dataclasses.replace(study["model"], logits=logits)
    found = evaluated(study, model=model, replacement=replacement, note=notes.append)
    pd.testing.assert_frame_equal(found, expected, check_exact=False, rtol=1e-6, atol=1e-9)
    assert max(passed) == 3 and not notes
    assert sum(passed) == 11 * (1 + len(FRACTIONS))


@pytest.mark.parametrize("shape", [(4, D), (12, D), (1, D), (D + 1,), (1,), (), (3, 12, D), (4, 11, D), (1, 4, 12, D)])
def test_values_that_do_not_fit_are_refused(study, shape):
    """Also where they would broadcast: of two axes, nobody knows whether the first one is the examples'."""
    with pytest.raises(UserError, match=r"method: gives values of shape \[.*give these three"):
        evaluated(study, replacement=Writing([torch.zeros(shape)]))
    with pytest.raises(UserError, match="gives 2 tensors for 1 layers"):
        evaluated(study, replacement=Writing([torch.zeros(D)] * 2))


@pytest.mark.parametrize("values", [None, np.zeros((1, D)), [np.zeros(D)], [0.0], (torch.zeros(D) for _ in range(1))])
def test_values_that_are_no_list_of_tensors_are_refused(study, values):
    with pytest.raises(UserError, match=r"method: gives no list of tensors, but .*give one tensor a layer"):
        evaluated(study, replacement=Writing(values))


def test_values_that_are_not_finite_are_the_methods(study):
    with pytest.raises(UserError, match="method: gives NaN or infinite logits with 25%"):
        evaluated(study, replacement=Constant([torch.full((D,), math.nan)]))


@pytest.mark.parametrize("shape", [(D,), (1, 12, D), (12, 1, D), (12, 12, D)])
def test_only_values_with_a_row_for_each_example_are_taken_apart(study, shape):
    """Here a batch has as many examples as positions."""
    x = torch.cat([batch.inputs["x"] for batch in study["batches"]] * 2)[:12]
    labels = torch.cat([batch.labels for batch in study["batches"]] * 2)[:12]
    batch = Batch({"x": x}, labels, None, tuple("abcdefghijkl"), tuple(range(12)))
    values = Writing([torch.randn(shape, generator=torch.Generator().manual_seed(2))])
    found, expected = (
        evaluated(study, model=model, batches=[batch], replacement=values, note=lambda text: None)
        for model in (short_of_memory(study["model"], 4), study["model"])
    )
    pd.testing.assert_frame_equal(found, expected, check_exact=False, rtol=1e-6, atol=1e-9)


def test_one_example_that_does_not_fit_is_the_users_to_mend(study):
    with pytest.raises(UserError, match="too little memory for one example with 12 positions"):
        evaluated(study, model=short_of_memory(study["model"], 0), note=lambda text: None)
