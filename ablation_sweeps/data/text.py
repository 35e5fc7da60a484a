"""Turns documents into batches of token ids, for causal and masked language models."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.lazy import torch
from ablation_sweeps.data.batch import NOT_SCORED, Batch, Document, Picture, Split
from ablation_sweeps.data.encoder import Budget
from ablation_sweeps.data.scope import Positions, positions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


Tokens = Literal["all", "no_special"]  # positions that enter the statistics
Pack = Literal["documents", "concatenate"]
T = TypeVar("T")


@dataclass(frozen=True)
class Sequence:
    """One document, or a piece of one, as input of the model: truncated and labelled, not yet padded.

    Attributes:
        document: position of its document in the data.
    """

    name: str
    document: int
    ids: np.ndarray  # [pos]
    labels: np.ndarray  # [pos]


@dataclass(frozen=True)
class Masking:
    """How a masked language model is scored.

    Attributes:
        share: fraction of the tokens that is scored.
        mask_share, random_share: fractions of these that the model sees as the mask token, or as a random token.
    """

    share: float
    mask_share: float
    random_share: float


@dataclass(frozen=True)
class TextEncoder:
    """Implements `Encoder`, and `OtherInput` for text.

    Attributes:
        tokens: calibration positions that enter the statistics: all, or all but BOS, CLS, SEP and the like.
        pack: a sequence is a document, or a piece of all documents joined.
        n_tokens: number of token ids that the model has; None: as many as the tokenizer.
        option: option that names the model, as the user typed it.
        apart: True if texts of different lengths must be run separately: see `Batch.apart`.
    """

    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    masking: Masking | None  # None: a causal model, scored on the next token
    tokens: Tokens
    pack: Pack
    n_tokens: int | None = None
    option: str = "model"
    apart: bool = False

    def __call__(
        self, examples: Iterable[Document | Picture], split: Split, budget: Budget, batch_tokens: int, seed: int
    ) -> list[Batch]:
        """Encode documents, each truncated to the context, until the budget is used; the last one is cut to meet it.

        With `pack` concatenate, documents are joined and cut into pieces as long as the context: nothing of a long
        document is lost, but a piece begins in the middle of one.

        Documents are batched by length, which saves padding. Padding is on the right, is not attended to, and enters
        neither statistics nor scores. Documents shorter than two tokens cannot be scored and are left out.

        Raises:
            UserError: nothing to score, or a token that the model does not have.
        """
        if self.masking and self.tokenizer.mask_token_id is None:
            raise UserError("model: this tokenizer has no mask token; use a causal_lm model, or another tokenizer")
        doubled: list[str] = []
        is_counted = functools.partial(self._is_counted, scope=budget.scope if split == "calibration" else "all")
        every_position_counts = split != "calibration" or (self.tokens == "all" and budget.scope == "all")
        limit = None if every_position_counts else budget.tokens
        whole = budget if limit is None else dataclasses.replace(budget, tokens=None)
        take = self._concatenated if self.pack == "concatenate" else self._documents
        pieces = take(_texts(examples), whole, doubled)
        if limit is not None:
            pieces = self._until(pieces, limit, is_counted)
        sequences = [self._label(name, document, np.array(ids), split, seed) for name, document, ids in pieces]
        if not sequences:
            raise UserError(
                f"dataset: nothing to score in the {split} split: it has no text, or all documents are shorter "
                "than two tokens; give longer or other documents"
            )
        self._check_tokens(sequences)
        if doubled:
            log.warning(
                "%d of the %s texts begin or end with a token of their own that the tokenizer adds as well (%s): the "
                "model is shown both; remove it from the texts", len(doubled), split, doubled[0],
            )  # fmt: skip
        more = "; model.pack=concatenate uses the truncated rest as well" if self.pack == "documents" else ""
        counted = sum(int(is_counted(s.ids).sum()) if limit is not None else len(s.ids) for s in sequences)
        budget.say_if_short(split, counted, more)
        batches = self._batches(sequences, budget.window, batch_tokens)
        return batches if every_position_counts else [self._keeping(batch, budget.scope) for batch in batches]

    def _is_counted(self, ids: list[int] | np.ndarray, scope: Positions) -> np.ndarray:
        """True for each position of a text that enters the statistics, `[pos]`."""
        row = torch.as_tensor(ids)[None]
        labels = torch.full_like(row, NOT_SCORED)
        labels[:, :-1] = 0  # a causal model is scored at all positions but the last
        batch = Batch({"input_ids": row, "attention_mask": torch.ones_like(row)}, labels, None, ("",), (0,))
        return self._keeping(batch, scope).keep[0].numpy()  # type: ignore[index]

    def _keeping(self, batch: Batch, scope: Positions) -> Batch:
        """The batch with `keep`, the positions that enter the statistics, by `tokens` and by the scope."""
        scopes: list[Positions] = ["no_special", scope] if self.tokens == "no_special" else [scope]
        keep = batch.inputs["attention_mask"].bool()
        for one in scopes:
            in_scope = self.in_scope(batch, one)
            keep = keep if in_scope is None else keep & in_scope
        return dataclasses.replace(batch, keep=keep)

    def in_scope(self, batch: Batch, scope: Positions) -> torch.Tensor | None:
        """See `scope.positions`."""
        return positions(batch, scope, self.special_ids())

    def _until(
        self, pieces: Iterable[tuple[str, int, list[int]]], limit: int, is_counted: Callable[[list[int]], np.ndarray]
    ) -> Iterator[tuple[str, int, list[int]]]:
        """Pieces until `limit` of their tokens enter the statistics; the other tokens do not use up the budget.

        The last piece is cut to meet the limit; for an encoder, the special tokens that end a text are kept.
        """
        left = limit
        for name, document, ids in pieces:
            places = np.flatnonzero(is_counted(ids)).tolist()
            is_cut = len(places) > left
            if is_cut:
                end = len(ids) if self.masking is None or not places else places[-1] + 1
                ids = ids[: places[left]] + ids[end:]
            if len(ids) >= 2:
                yield name, document, ids
                left -= min(left, len(places))
            if is_cut or left == 0:
                return

    def _check_tokens(self, sequences: list[Sequence]) -> None:
        """Check that the model has an embedding for every token.

        Raises:
            UserError: it lacks one.
        """
        largest = max(int(sequence.ids.max()) for sequence in sequences)
        if self.n_tokens is not None and largest >= self.n_tokens:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise UserError(
                f"{self.option}: its tokenizer gives token {largest} ({token}), but the model knows {self.n_tokens} "
                "tokens; give a folder whose tokenizer belongs to the model: model.path=FOLDER"
            )

    def _note_doubled(self, name: str, ids: list[int], doubled: list[str]) -> None:
        """Note a text that itself begins or ends with a special token that the tokenizer adds as well."""
        t = self.tokenizer
        first, last = (t.bos_token_id, t.cls_token_id), (t.eos_token_id, t.sep_token_id)
        for pair, tokens in ((ids[:2], first), (ids[-2:], last)):
            if len(ids) > 2 and pair[0] == pair[1] and pair[0] in tokens:
                doubled.append(f"{name}: {t.convert_ids_to_tokens(pair[0])}")  # type: ignore[arg-type]
                return

    def _documents(
        self, documents: Iterable[Document], budget: Budget, doubled: list[str]
    ) -> Iterator[tuple[str, int, list[int]]]:
        used = count = 0
        for document in documents:
            ids = self.ids(document.text, self._room(budget, used))
            self._note_doubled(document.name, ids, doubled)
            if len(ids) >= 2:
                yield document.name, count, ids
                used, count = used + len(ids), count + 1
            if self._room(budget, used) < 2 or count == budget.examples:  # before one document too many is read
                return

    def _concatenated(
        self, documents: Iterable[Document], budget: Budget, doubled: list[str]
    ) -> Iterator[tuple[str, int, list[int]]]:
        """Pieces of all documents joined.

        A piece belongs to the document that most of its tokens come from, and has its name. Further pieces of that
        document have their position among all pieces appended to the name.
        """
        end = self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else self.tokenizer.sep_token_id
        names: list[str] = []
        ids: list[int] = []
        places: list[int] = []  # document of each token
        used, pieces = 0, Counter[int]()
        for document in islice(documents, budget.examples):
            names.append(document.name)
            own = self.ids(document.text)
            self._note_doubled(document.name, own, doubled)
            ids += own
            if end is not None and ids and ids[-1] != end:
                ids.append(int(end))  # type: ignore[arg-type]
            places += [len(names) - 1] * (len(ids) - len(places))
            start = 0
            while len(ids) - start >= (room := self._room(budget, used)) >= 2:
                yield _piece(names, places[start : start + room], ids[start : start + room], pieces)
                start, used = start + room, used + room
            if room < 2:
                return
            ids, places = ids[start:], places[start:]
        if len(ids) >= 2:
            yield _piece(names, places, ids, pieces)

    def _room(self, budget: Budget, used: int) -> int:
        """Maximum length of the next sequence."""
        return self.max_tokens if budget.tokens is None else min(self.max_tokens, budget.tokens - used)

    def ids(self, text: str, limit: int | None = None) -> list[int]:
        """Token ids of a text, truncated to `limit`.

        For an encoder, the tokenizer truncates and keeps the token that ends a text. A causal model must not have to
        predict where a text is cut, so there the end token of some tokenizers is cut off as well.
        """
        if self.masking is None:
            return self.tokenizer(text, verbose=False)["input_ids"][:limit]  # type: ignore[return-value]
        return self.tokenizer(text, truncation=limit is not None, max_length=limit, verbose=False)["input_ids"]  # type: ignore[return-value]

    def other_input(self, ids: list[int]) -> Batch:
        """Batch of one input that is not scored."""
        row = torch.tensor([ids])
        return Batch(
            {"input_ids": row, "attention_mask": torch.ones_like(row)},
            torch.full_like(row, NOT_SCORED), torch.ones_like(row, dtype=torch.bool), ("other",), (0,),
        )  # fmt: skip

    def random_ids(self, source: str, length: int, seed: int) -> list[int]:
        """`length` ids of random characters or of random tokens; for "probe", any tokens."""
        rng = np.random.default_rng(seed)
        if source == "random_characters":
            ids: list[int] = []
            n_characters = length
            while len(ids) < length:  # a token holds one character or more
                alphabet = list(string.ascii_letters + string.digits + string.punctuation + " ")
                ids = self.ids("".join(rng.choice(alphabet, n_characters)))
                n_characters *= 2
            return ids[:length]
        return rng.choice(self.ordinary_ids(), length).tolist()

    def ordinary_ids(self) -> np.ndarray:
        """Ids of all tokens that are not special, and that the model has."""
        ids = np.setdiff1d(np.arange(len(self.tokenizer)), self.tokenizer.all_special_ids)
        return ids if self.n_tokens is None else ids[ids < self.n_tokens]

    def special_ids(self) -> set[int]:
        """Ids of BOS, CLS, SEP and the like, but not of the token for unknown words, which stands for text."""
        t = self.tokenizer
        others = (t.bos_token_id, t.eos_token_id, t.cls_token_id, t.sep_token_id, t.pad_token_id, t.mask_token_id)
        return {token for token in t.all_special_ids if token != t.unk_token_id or token in others}

    def _label(self, name: str, document: int, ids: np.ndarray, split: Split, seed: int) -> Sequence:
        if self.masking is None:
            return Sequence(name, document, ids, np.append(ids[1:], NOT_SCORED))
        if split != "evaluation":  # statistics come from unmasked text
            return Sequence(name, document, ids, np.full_like(ids, NOT_SCORED))
        return Sequence(name, document, *self._masked(name, ids, seed))

    def _masked(self, name: str, ids: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Masked ids and labels. They depend only on seed and name: the same for every method, fraction, batch size."""
        assert self.masking is not None
        rng = np.random.default_rng([seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")])
        candidates = np.flatnonzero(~np.isin(ids, self.tokenizer.all_special_ids))
        n_chosen = min(len(candidates), max(1, round(self.masking.share * len(candidates))))
        chosen = rng.choice(candidates, n_chosen, replace=False)
        labels = np.full_like(ids, NOT_SCORED)
        labels[chosen] = ids[chosen]
        fate = rng.random(n_chosen)
        shown = ids.copy()
        masked = fate < self.masking.mask_share
        shown[chosen[masked]] = self.tokenizer.mask_token_id
        random = ~masked & (fate < self.masking.mask_share + self.masking.random_share)
        shown[chosen[random]] = rng.choice(self.ordinary_ids(), int(random.sum()))
        return shown, labels

    def _batches(self, sequences: list[Sequence], window: int | None, batch_tokens: int) -> list[Batch]:
        batches: list[Batch] = []
        for some in _windows(list(enumerate(sequences)), window):
            by_length = sorted(some, key=lambda pair: (-len(pair[1].ids), pair[0]))
            while by_length:
                size = max(2, batch_tokens // len(by_length[0][1].ids))
                if len(by_length) == size + 1:
                    size += 1  # never a single one: resampling needs another example
                rows, by_length = by_length[:size], by_length[size:]
                batches.append(self._pad([sequence for _, sequence in rows], tuple(index for index, _ in rows)))
        return batches

    def _pad(self, sequences: list[Sequence], index: tuple[int, ...]) -> Batch:
        shape = len(sequences), max(len(s.ids) for s in sequences)
        pad = int(self.tokenizer.pad_token_id or 0)  # type: ignore[arg-type]
        known = self.n_tokens is None or pad < self.n_tokens
        ids = torch.full(shape, pad if known else 0)  # any token: padding is never attended to
        labels = torch.full(shape, NOT_SCORED)
        keep = torch.zeros(shape, dtype=torch.bool)
        for row, sequence in enumerate(sequences):
            n = len(sequence.ids)
            ids[row, :n] = torch.from_numpy(sequence.ids)
            labels[row, :n] = torch.from_numpy(sequence.labels)
            keep[row, :n] = True
        inputs = {"input_ids": ids, "attention_mask": keep.long()}
        documents = tuple(s.document for s in sequences)
        return Batch(inputs, labels, keep, tuple(s.name for s in sequences), index, documents, self.apart)


def _piece(names: list[str], places: list[int], ids: list[int], pieces: Counter[int]) -> tuple[str, int, list[int]]:
    """Name, document and ids of a piece.

    Args:
        pieces: number of pieces of each document so far; this one is added.
    """
    ((document, _),) = Counter(places).most_common(1)
    pieces[document] += 1
    name = names[document] if pieces[document] == 1 else f"{names[document]}/{pieces.total()}"
    return name, document, ids


def _windows(items: list[T], size: int | None) -> Iterator[list[T]]:
    """Windows of `size` consecutive texts; the last may have one more, so that no batch has a single text."""
    start = 0
    while start < len(items):
        end = len(items) if size is None or len(items) - start <= size + 1 else start + size
        yield items[start:end]
        start = end


def _texts(examples: Iterable[Document | Picture]) -> Iterator[Document]:
    for example in examples:
        if not isinstance(example, Document):
            raise UserError("dataset: a language model needs text; choose a text dataset, e.g. dataset=python_docs")
        yield example
