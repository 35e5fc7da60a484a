"""Documents to batches: what is cut, padded, shifted and masked. A token is a character here, after BOS."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.data.batch import NOT_SCORED, Batch, Document
from ablation_sweeps.data.encoder import Budget
from ablation_sweeps.models.transformer import Transformer

TEXTS = ["The quick brown fox", "", "ab", "Pack my box with five dozen liquor jugs", "x" * 200, "hello", "What?"]
NO_LIMIT = Budget(None, None)
CONTEXT = 64


def documents(texts=TEXTS) -> list[Document]:
    return [Document(f"doc{i}", text) for i, text in enumerate(texts)]


def encoded(model: Transformer, texts=TEXTS, budget=NO_LIMIT, batch_tokens=130, split="evaluation", seed=0):
    return model.encode(documents(texts), split, budget, batch_tokens, seed)


def by_document(batches: list[Batch]) -> dict[str, tuple[list[int], list[int]]]:
    """What is shown and what is scored of each document, without its padding."""
    found = {}
    for batch in batches:
        for row, name in enumerate(batch.names):
            n = int(batch.inputs["attention_mask"][row].sum())
            assert name not in found
            found[name] = batch.inputs["input_ids"][row, :n].tolist(), batch.labels[row, :n].tolist()
    return found


def vocabulary() -> dict[str, int]:
    import string

    characters = string.ascii_letters + string.digits + string.punctuation + " "
    return {character: 5 + i for i, character in enumerate(characters)}


def ids_of(text: str) -> list[int]:
    known = vocabulary()
    return [1, *(known[character] for character in text)]


# Causal models


def test_labels_are_the_next_tokens(tiny):
    found = by_document(encoded(tiny("llama")))
    for i, text in enumerate(TEXTS):
        if not text:
            continue
        ids = ids_of(text)[:CONTEXT]
        assert found[f"doc{i}"] == (ids, [*ids[1:], NOT_SCORED])


def test_a_document_of_less_than_two_tokens_is_left_out(tiny):
    assert sorted(by_document(encoded(tiny("llama")))) == [f"doc{i}" for i in range(7) if i != 1]
    for nothing in (["", ""], []):
        with pytest.raises(UserError, match="has no text, or all documents are shorter than two tokens"):
            encoded(tiny("llama"), nothing)


def test_documents_are_cut_to_the_context_or_less(tiny, fresh):
    assert len(by_document(encoded(tiny("llama")))["doc4"][0]) == CONTEXT
    short = by_document(encoded(fresh("llama", max_tokens=8)))
    assert {name: len(ids) for name, (ids, _) in short.items() if name != "doc2"} == dict.fromkeys(
        ["doc0", "doc3", "doc4"], 8
    ) | {"doc5": 6, "doc6": 6}


@pytest.mark.parametrize("tokens", [22, 30, 63, 65, 100])
def test_a_budget_in_tokens_is_met_exactly(tiny, tokens):
    """19 + 1, 2 + 1, 39 + 1, 64, 6, 6 tokens are there; the documents come in order and the last one is cut."""
    batches = encoded(tiny("llama"), budget=Budget(tokens, None))
    assert sum(int(batch.keep.sum()) for batch in batches) == tokens
    whole = by_document(encoded(tiny("llama")))
    names = list(whole)
    found = by_document(batches)
    assert set(found) == set(sorted(names)[: len(found)])
    cut = [name for name, (ids, _) in found.items() if ids != whole[name][0]]
    assert cut in ([], [max(found)])
    for name in found:
        ids, labels = found[name]
        assert ids == whole[name][0][: len(ids)] and labels == [*ids[1:], NOT_SCORED]


def test_a_rest_of_one_token_is_not_used(tiny):
    """One token has nothing to predict."""
    for tokens, used in ((21, 20), (64, 63)):
        batches = encoded(tiny("llama"), budget=Budget(tokens, None))
        assert sum(int(batch.keep.sum()) for batch in batches) == used


def test_a_budget_in_examples_counts_those_that_are_scored(tiny):
    assert sorted(by_document(encoded(tiny("llama"), budget=Budget(None, 3)))) == ["doc0", "doc2", "doc3"]


@pytest.mark.parametrize(("split", "budget", "said"), [
    ("calibration", Budget(10**6, None), "statistics.tokens=1000000: the calibration data have only 139, and all are "
                                         "used; model.pack=concatenate uses the truncated rest as well"),
    ("calibration", Budget(10**6, 3), ""),  # limited on purpose
    ("calibration", Budget(137, None), ""), ("calibration", Budget(21, None), ""),  # a rest of one token
    ("calibration", NO_LIMIT, ""), ("evaluation", Budget(10**6, None), ""),
])  # fmt: skip
def test_less_calibration_data_than_asked_for_is_said(tiny, caplog, split, budget, said):
    """No number in the results shows it."""
    caplog.set_level("INFO", "ablation_sweeps")
    encoded(tiny("llama"), budget=budget, split=split)
    assert caplog.messages == ([said] if said else [])


# Padding and batching


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_padding_is_at_the_right_and_enters_nothing(tiny, family):
    batches = encoded(tiny(family), batch_tokens=1000)
    assert len(batches) == 1 and not batches[0].keep.all()
    for batch in batches:
        keep = batch.inputs["attention_mask"].bool()
        assert torch.equal(keep, batch.keep)
        lengths = keep.sum(1)
        assert torch.equal(keep, torch.arange(keep.shape[1]) < lengths[:, None])
        assert (batch.labels[~keep] == NOT_SCORED).all()
        assert lengths.max() == keep.shape[1]


@pytest.mark.parametrize("batch_tokens", [1, 10, 64, 65, 100, 128, 130, 192, 200, 1000])
@pytest.mark.parametrize("n", [2, 3, 4, 5, 7])
def test_no_document_is_left_alone(tiny, batch_tokens, n):
    """Resampling from the batch needs another document."""
    texts = ["x" * 80, "a" * 63, "b" * 63, "hello", "world", "of", "words" * 9][:n]
    batches = encoded(tiny("llama"), texts, batch_tokens=batch_tokens)
    assert min(len(batch.names) for batch in batches) >= 2
    assert sorted(index for batch in batches for index in batch.index) == list(range(n))


def test_batches_hold_no_more_than_they_may(tiny):
    for batch_tokens in (200, 400):
        batches = encoded(tiny("llama"), [f"{i}" * (7 * i) for i in range(1, 9)], batch_tokens=batch_tokens)
        assert all(batch.labels.numel() <= batch_tokens for batch in batches[:-1])
        assert batches[-1].labels.numel() <= batch_tokens + batches[-1].labels.shape[1]  # the one not left alone


def test_the_index_is_the_place_in_the_dataset(tiny):
    order = {f"doc{i}": place for place, i in enumerate([0, 2, 3, 4, 5, 6])}
    for batch_tokens in (70, 130, 1000):
        for batch in encoded(tiny("llama"), batch_tokens=batch_tokens):
            assert batch.index == tuple(order[name] for name in batch.names)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_batching_changes_neither_tokens_nor_labels(tiny, family):
    results = [by_document(encoded(tiny(family), batch_tokens=size)) for size in (1, 100, 130, 10_000)]
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("n", [4, 10, 11, 12])
def test_after_each_window_the_documents_done_are_the_first_ones(tiny, n):
    """Of 5, the last one of 6 where one would be left alone; within a window they are batched by length."""
    texts = ["word " * (1 + 7 * i % 11) for i in range(n)]
    windows = encoded(tiny("llama"), texts, Budget(None, None, window=5))
    done: list[int] = []
    ends = []
    for batch in windows:
        lengths = batch.inputs["attention_mask"].sum(1)
        assert len(batch.names) > 1 and (lengths.diff() <= 0).all()
        done += batch.index
        if max(done) + 1 == len(done):
            ends.append(len(done))
    expected = {4: [4], 10: [5, 10], 11: [5, 11], 12: [5, 10, 12]}
    assert [end for end in ends if end % 5 == 0 or end == n] == expected[n]
    assert by_document(windows) == by_document(encoded(tiny("llama"), texts))


# Masked models


@pytest.fixture(scope="module")
def long_texts() -> list[str]:
    rng = np.random.default_rng(0)
    letters = list(vocabulary())
    return ["".join(rng.choice(letters, 100)) for _ in range(300)]


def test_special_tokens_are_never_scored_and_never_changed(tiny):
    model = tiny("bert")
    for seed in range(20):
        for ids, labels in by_document(encoded(model, seed=seed)).values():
            special = {0, 1, 2, 3, 4}
            assert ids[0] == 1 and labels[0] == NOT_SCORED
            assert not special & {label for label in labels if label != NOT_SCORED}


def test_what_is_scored_is_the_original_and_the_rest_is_shown_as_it_is(tiny):
    found = by_document(encoded(tiny("bert"), seed=3))
    for i, text in enumerate(TEXTS):
        original = [*ids_of(text)[: CONTEXT - 1], 2]  # a document that is cut still ends as the model expects
        ids, labels = found[f"doc{i}"]
        for shown, label, token in zip(ids, labels, original, strict=True):
            if label == NOT_SCORED:
                assert shown == token
            else:
                assert label == token


def test_fifteen_percent_are_scored_in_each_document_and_at_least_one(tiny):
    for name, (ids, labels) in by_document(encoded(tiny("bert"))).items():
        expected = 0 if name == "doc1" else max(1, round(0.15 * (len(ids) - 2)))
        assert sum(label != NOT_SCORED for label in labels) == expected


def test_masks_are_those_of_the_seed_whatever_the_other_documents(tiny):
    model = tiny("bert")
    all_of_them = by_document(encoded(model, seed=1))
    assert by_document(encoded(model, seed=1)) == all_of_them
    other = by_document(encoded(model, seed=2))
    assert all(all_of_them[name] != other[name] for name in ("doc0", "doc3", "doc4"))
    backwards = by_document(model.encode(documents()[::-1], "evaluation", NO_LIMIT, 70, 1))
    assert backwards == all_of_them


def test_shares_of_mask_random_and_unchanged(fresh, long_texts):
    """Each share within four standard deviations of a binomial; a random token may be the right one by chance."""
    model = fresh("bert", masked=0.5)
    found = by_document(encoded(model, long_texts))
    pairs = [(shown, label) for ids, labels in found.values() for shown, label in zip(ids, labels, strict=True)
             if label != NOT_SCORED]  # fmt: skip
    n = len(pairs)
    assert n > 9000
    masked = sum(shown == 4 for shown, _ in pairs)
    changed = sum(shown not in (4, label) for shown, label in pairs)
    by_chance = 1 / len(vocabulary())
    for count, share in ((masked, 0.8), (changed, 0.1 * (1 - by_chance))):
        assert abs(count - n * share) < 4 * math.sqrt(n * share * (1 - share))
    random = [shown for shown, label in pairs if shown not in (4, label)]
    assert min(random) > 4 and len(set(random)) > 90


@pytest.mark.parametrize(("mask", "random"), [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_each_share_can_be_all(fresh, mask, random):
    found = by_document(encoded(fresh("bert", replaced_by_mask=mask, replaced_at_random=random), TEXTS[3:5]))
    pairs = [(s, label) for ids, labels in found.values() for s, label in zip(ids, labels, strict=True) if label >= 0]
    assert len(pairs) == 6 + 9
    if mask:
        assert all(shown == 4 for shown, _ in pairs)
    elif random:
        assert all(shown > 4 for shown, _ in pairs) and any(shown != label for shown, label in pairs)
    else:
        assert all(shown == label for shown, label in pairs)


def test_calibration_is_unmasked_and_unscored(tiny):
    found = by_document(encoded(tiny("bert"), split="calibration"))
    for i, text in enumerate(TEXTS):
        ids, labels = found[f"doc{i}"]
        assert ids == [*ids_of(text)[: CONTEXT - 1], 2]
        assert set(labels) == {NOT_SCORED}


def test_a_tokenizer_without_a_mask_token_is_refused(fresh):
    model = fresh("bert")
    model.encode.tokenizer.mask_token = None
    try:
        with pytest.raises(UserError, match="no mask token"):
            encoded(model)
    finally:
        model.encode.tokenizer.mask_token = "<mask>"


# Documents one after the other


def packed(model, texts, **options) -> list[tuple[str, list[int], list[int]]]:
    pieces = [(batch.index[row], batch.names[row], batch.inputs["input_ids"][row], batch.labels[row], batch.keep[row])
              for batch in encoded(model, texts, **options) for row in range(len(batch.names))]  # fmt: skip
    return [(name, ids[keep].tolist(), labels[keep].tolist()) for _, name, ids, labels, keep in sorted(pieces)]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_concatenated_documents_are_the_same_tokens_in_pieces_of_the_context(fresh, family):
    model = fresh(family, max_tokens=20, pack="concatenate")
    texts = ["x" * 50, "", "hello", "y" * 33]
    stream = [token for text in texts for token in [*ids_of(text), 2]]
    pieces = packed(model, texts, split="calibration")
    assert [token for _, ids, _ in pieces for token in ids] == stream
    assert {len(ids) for _, ids, _ in pieces[:-1]} == {20}
    assert len({name for name, _, _ in pieces}) == len(pieces)
    assert pieces[0][0].startswith("doc0") and pieces[-1][0].startswith("doc3")


def test_a_piece_belongs_to_the_document_that_most_of_it_is_from(fresh):
    """52, 2, 7 and 35 tokens, 20 in a piece: the third has 12 of doc0, the fourth the last one of doc2."""
    batches = encoded(fresh("llama", max_tokens=20, pack="concatenate"), ["x" * 50, "", "hello", "y" * 33])
    found = {i: of for b in batches for i, *of in zip(b.index, b.names, b.documents, strict=True)}
    assert [found[i] for i in range(5)] == [["doc0", 0], ["doc0/2", 0], ["doc0/3", 0], ["doc3", 3], ["doc3/5", 3]]
    for batch in batches:
        first, last = batch.split_in_two()
        assert first.documents + last.documents == batch.documents


@pytest.mark.parametrize("positions", [1, 9, 18, 30, 1000])
def test_parts_hold_every_row_once_and_no_more_positions(fresh, positions):
    (batch,) = encoded(fresh("llama"), ["x" * n for n in (3, 4, 5, 6, 7)], batch_tokens=1000)
    longest = batch.labels.shape[1]
    parts = list(batch.split_to(positions))
    assert all(part.size == len(part.names) * longest <= max(positions, longest) for part in parts)
    assert len(parts) == {1: 5, 9: 5, 18: 3, 30: 2, 1000: 1}[positions]
    for name in ("names", "index", "documents"):
        assert sum((getattr(part, name) for part in parts), ()) == getattr(batch, name)
    for key, value in batch.inputs.items():
        assert torch.equal(torch.cat([part.inputs[key] for part in parts]), value)


def test_nobody_has_to_foresee_where_a_text_is_cut(fresh, saved, tmp_path):
    """A tokenizer that ends each text: where it is cut, the end is not there, and is no label."""
    shutil.copytree(saved("llama"), tmp_path, dirs_exist_ok=True)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer["post_processor"]["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (batch,) = encoded(fresh("llama", path=str(tmp_path), max_tokens=8), ["hello", "x" * 50], batch_tokens=100)
    ends = [batch.inputs["input_ids"][row][batch.keep[row]][-1].item() == 2 for row in (0, 1)]
    assert dict(zip(batch.names, ends, strict=True)) == {"doc0": True, "doc1": False}
    assert batch.keep.sum(1).tolist() == [8, 7]


def test_a_piece_is_scored_like_a_document(fresh):
    for _, ids, labels in packed(fresh("llama", max_tokens=20, pack="concatenate"), ["x" * 50, "hello"]):
        assert labels == [*ids[1:], NOT_SCORED]
    for _, _, labels in packed(fresh("bert", max_tokens=20, pack="concatenate"), ["x" * 50, "hello", "z" * 60]):
        scored = [label for label in labels if label != NOT_SCORED]
        assert scored and not {0, 1, 2, 3, 4} & set(scored)


@pytest.mark.parametrize("tokens", [2, 19, 20, 21, 22, 45, 10**6])
def test_a_budget_cuts_the_last_piece(fresh, tokens):
    model = fresh("llama", max_tokens=20, pack="concatenate")
    pieces = packed(model, ["x" * 50, "hello", "y" * 33], budget=Budget(tokens, None))
    n = sum(len(ids) for _, ids, _ in pieces)
    assert n == min(tokens - (tokens % 20 == 1), 52 + 7 + 35)  # a rest of one token has nothing to predict


def test_a_budget_in_documents_counts_documents_not_pieces(fresh):
    pieces = packed(fresh("llama", max_tokens=20, pack="concatenate"), ["x" * 50, "hello", "y"], budget=Budget(None, 2))
    assert sum(len(ids) for _, ids, _ in pieces) == 52 + 7


# Which positions enter the statistics


@pytest.mark.parametrize(("family", "special"), [("llama", {1}), ("bert", {1, 2})])
def test_special_tokens_can_be_left_out_of_the_statistics(fresh, family, special):
    every, some = (encoded(fresh(family, tokens=tokens), split="calibration") for tokens in ("all", "no_special"))
    for a, b in zip(every, some, strict=True):
        ids = a.inputs["input_ids"]
        assert torch.equal(ids, b.inputs["input_ids"])
        assert torch.equal(a.inputs["attention_mask"], b.inputs["attention_mask"]), "the model still sees them"
        left_out = a.keep & ~b.keep
        assert set(ids[left_out].tolist()) == special and not special & set(ids[b.keep].tolist())
        assert not (b.keep & ~a.keep).any()


@pytest.mark.parametrize("pack", ["documents", "concatenate"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_as_many_positions_enter_the_statistics_as_were_asked_for(fresh, family, pack):
    """Special tokens use up no budget; of an encoder, the last document keeps the token that ends it."""
    model = fresh(family, tokens="no_special", pack=pack, max_tokens=12)
    documents = [Document(str(i), "abcdefgh"[: 3 + i % 5]) for i in range(40)]
    for tokens in (2, 3, 13, 50, 61):
        batches = model.encode(documents, "calibration", Budget(tokens, None), 60, 0)
        assert sum(int(batch.keep.sum()) for batch in batches) == tokens
        rows = [(batch.inputs["input_ids"][row], batch.inputs["attention_mask"][row])
                for batch in batches for row in range(len(batch.names))]  # fmt: skip
        assert all(mask.sum() <= 12 for _, mask in rows)
        if pack == "documents":
            assert {int(ids[0]) for ids, _ in rows} == {1}
            assert family != "bert" or {int(ids[mask.sum() - 1]) for ids, mask in rows} == {2}
    every = model.encode(documents, "calibration", Budget(10_000, 30), 60, 0)
    assert {name for batch in every for name in batch.names} <= {str(i) for i in range(30)}


def test_only_signatures_of_no_special_say_how_it_counts(job_of):
    """Its statistics came from fewer positions before; all others are what they were."""
    data = {tokens: job_of(f"model.tokens={tokens}").statistics_key["statistics"] for tokens in ("all", "no_special")}
    assert data["no_special"] == {**data["all"], "no_special": 2}


def test_the_unknown_token_stands_for_a_word(fresh):
    (batch,) = encoded(fresh("llama", tokens="no_special"), ["aéb", "cd"], split="calibration", batch_tokens=100)
    assert 3 in batch.inputs["input_ids"][batch.keep].tolist()


def test_what_is_evaluated_does_not_depend_on_which_positions_enter_the_statistics(fresh):
    every, some = (encoded(fresh("bert", tokens=tokens)) for tokens in ("all", "no_special"))
    for a, b in zip(every, some, strict=True):
        assert torch.equal(a.labels, b.labels) and torch.equal(a.keep, b.keep)
