"""Probes of a language model that has just been loaded: its scores of a text must not depend on other texts.

A text must score the same as if it were run alone, first, and within the positions that the model has.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.lazy import torch
from ablation_sweeps.data.batch import Batch, pad_and_stack
from ablation_sweeps.data.text import TextEncoder
from ablation_sweeps.models.transformer import Transformer

log = logging.getLogger(__name__)


SHORT = 8  # tokens of the longer one of two short texts
FLOORS = 2  # multiples of the rounding error; a larger difference is not rounding
WATCHED = 64  # positions at the end of a text whose scores are compared
SMALL = 1 << 20  # elements of a tensor that may be state; weights and masks are larger


def fit_vocabulary(encoder: TextEncoder, module: torch.nn.Module, option: str) -> TextEncoder:
    """The encoder, limited to the token ids that the model has.

    Args:
        option: option that names the model, as the user typed it.

    Raises:
        UserError: the model has no embedding of the mask token.
    """
    try:
        n_tokens = len(module.get_input_embeddings().weight)  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return encoder
    head = module.get_output_embeddings()  # type: ignore[operator]
    n_tokens = min(n_tokens, getattr(head, "out_features", n_tokens))
    mask = encoder.tokenizer.mask_token_id
    if encoder.masking and isinstance(mask, int) and mask >= n_tokens:
        raise UserError(
            f"{option}: its tokenizer's mask token has the id {mask}, but the model knows {n_tokens} tokens; give a "
            "folder whose tokenizer belongs to the model: model.path=FOLDER"
        )
    return dataclasses.replace(encoder, n_tokens=n_tokens, option=option)


def isolate(model: Transformer, encoder: TextEncoder, option: str) -> Transformer:
    """Change the model and its encoder so that a text scores the same whatever runs before it or beside it.

    A short text is run alone, beside a longer one, beside the longest possible one, and alone again. Longer texts are
    tried as well (see `_length_matters`), as few tokens reveal little about a position encoding. If scores depend on
    the length of the other texts, texts of different lengths are run separately. If the model changes its own state
    between passes, each pass starts from the state in which it was loaded. If it has fewer positions than its
    configuration says, texts are truncated to that number.

    Raises:
        UserError: the scores depend on something else, or the model fails on a text.
    """
    n = min(SHORT, encoder.max_tokens)
    short, longer, longest = (
        model.other_input("probe", n, seed) for seed, n in enumerate((max(2, n // 2), n, encoder.max_tokens))
    )
    exact = all(p.dtype in (torch.float32, torch.float64) for p in model.module.parameters())
    is_other = functools.partial(differ, exact=exact)
    state = State(model.module)
    alone, again = _scores(model, short), _scores(model, short)
    if alone.isnan().any():  # reported later, with its cause
        return model
    try:
        beside = [_scores(model, short, longer), _scores(model, short, longest)]
        changes = state.changes()
        depends = any(is_other(scores, alone) for scores in beside)
        depends = depends or _length_matters(_restored(model, changes), longest, encoder.max_tokens)
        changes = state.changes()
    except torch.OutOfMemoryError:
        log.warning("%s: too little memory to check whether texts in a batch affect each other", option)
        return model
    except Exception as error:
        if not _is_of_length(error) or not _passes(model, n):
            raise _failed(encoder.max_tokens, option, error) from error
        context = _context(model, encoder.max_tokens, option)
        encoder = dataclasses.replace(encoder, max_tokens=context)
        cut = (*model.texts, f"cut to {context} tokens")
        return isolate(dataclasses.replace(model, encode=encoder, texts=cut), encoder, option)
    if changes and (depends or is_other(again, alone) or _remembers(model, encoder.max_tokens, changes)):
        model = _restored(model, changes)
    if is_other(_scores(model, short), alone):
        raise UserError(
            f"{option}: gives different logits when the same text is passed again, so that damage cannot be told from "
            "chance; use another model, or another model.attn_implementation"
        )
    if not depends:
        return model
    if is_other(_scores(model, short, model.other_input("probe", max(2, n // 2), 2)), alone):
        if exact:
            raise UserError(
                f"{option}: the logits of a text depend on the other texts in its batch, even on those of "
                "the same length; use another model, or another model.attn_implementation"
            )
        log.warning("%s: the logits of a text depend slightly on the other texts in its batch", option)
    log.info(
        "%s: the logits of a text depend on the length of others in its batch: each length runs separately", option
    )
    return dataclasses.replace(model, encode=dataclasses.replace(encoder, apart=True), texts=(*model.texts, "apart"))


def _length_matters(model: Transformer, longest: Batch, n: int) -> bool:
    """True if a text scores differently beside the longest one, by more than rounding.

    It tries texts that are half as long as the longest one, a quarter as long and so on, so that one of them is near
    the length at which a position encoding changes. In a causal model they are prefixes of the longest text, which then
    needs a single pass.

    Args:
        n: tokens of the longest text.
    """
    causal = model.kind == "causal_lm"
    lengths = [length for k in range(1, n.bit_length()) if (length := n >> k) > SHORT][:: 1 if causal else 2]
    if not lengths:
        return False
    texts = [_beginning(longest, length) for length in lengths]
    alone = [_scores(model, text) for text in texts]
    if causal:
        beside = _scores_of_beginnings(model, longest, lengths)
    else:
        beside = [_scores(model, text, longest) for text in texts]
    limit = max(_least(model), FLOORS * _floor(model, texts[0], alone[0]))
    return any(_error(found, expected) > limit for found, expected in zip(beside, alone, strict=True))


def _beginning(text: Batch, length: int) -> Batch:
    inputs = {key: x[:, :length] for key, x in text.inputs.items()}
    return dataclasses.replace(text, inputs=inputs, labels=text.labels[:, :length], keep=None)


def _floor(model: Transformer, text: Batch, scores: torch.Tensor) -> float:
    """Error of a text's scores that comes from rounding alone.

    The output of each leaf module is changed at random by as much as its last digit. Comparing passes of different
    shapes instead might show too little, since they may round in the same way.
    """
    generator = torch.Generator().manual_seed(0)  # on the CPU: the same noise for every device

    def perturb(_: torch.nn.Module, __: Any, given: Any) -> Any:
        if not isinstance(given, torch.Tensor) or not given.is_floating_point():
            return given
        chance = torch.rand(given.shape, generator=generator).to(given.device) * 2 - 1
        return (given.float() * (1 + chance * torch.finfo(given.dtype).eps)).to(given.dtype)

    parts = [part for part in model.module.modules() if next(part.children(), None) is None]
    handles = [part.register_forward_hook(perturb) for part in parts]
    try:
        return _error(_scores(model, text), scores)
    finally:
        for handle in handles:
            handle.remove()


def _least(model: Transformer) -> float:
    """Smallest median error that counts as more than rounding, for the coarsest dtype of the weights."""
    types = {p.dtype for p in model.module.parameters() if p.dtype.is_floating_point}
    return max([1e-4, *(2 * torch.finfo(dtype).eps for dtype in types)])


def _failed(n: int, option: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300]
    return UserError(f"{option}: fails on a text of {n} tokens: {type(error).__name__}: {reason}")


def _is_of_length(error: Exception) -> bool:
    """True if a model may raise this error for a position that it does not have."""
    words = ("size", "shape", "length", "position", "index", "dimension", "expand", "broadcast")
    said = str(error).lower()
    return isinstance(error, IndexError) or (
        isinstance(error, RuntimeError | ValueError | AssertionError) and any(word in said for word in words)
    )


def _context(model: Transformer, fails: int, option: str) -> int:
    """Length of the longest text that the model can run, found by bisection."""
    works, said = SHORT, fails
    while fails - works > 1:
        middle = (works + fails) // 2
        works, fails = (middle, fails) if _passes(model, middle) else (works, middle)
    if works <= SHORT:
        raise UserError(f"{option}: fails on texts of more than {SHORT} tokens; give model.max_tokens={SHORT}")
    log.warning(
        "%s: has %d positions, not the %d of its configuration; texts are truncated to that", option, works, said
    )
    return works


def _remembers(model: Transformer, longest: int, changes: Changes) -> bool:
    """True if a long text scores differently after a longer one."""
    text, longer = (model.other_input("probe", n, seed) for seed, n in enumerate((longest * 3 // 4, longest)))
    restore(changes)
    first = _scores(model, text)
    restore(changes)
    _scores(model, longer)
    return _error(_scores(model, text), first) > _least(model)


def _scores(model: Transformer, text: Batch, *others: Batch) -> torch.Tensor:
    """Log probabilities at the last positions of the first text, `[pos, d_vocab]`; the others share its batch."""
    return _scores_of_beginnings(model, text, [text.labels.shape[-1]], *others)[0]


def _scores_of_beginnings(model: Transformer, text: Batch, lengths: list[int], *others: Batch) -> list[torch.Tensor]:
    """Log probabilities at the last positions of each prefix of the first text, from a single pass over it."""
    places = [torch.arange(max(0, length - WATCHED), length) for length in lengths]
    with torch.inference_mode(), _checked_lookups():
        logits = model.logits_at(pad_and_stack(text, *others).to(model.device), torch.cat(places).to(model.device))
        return [of_one.cpu().double().log_softmax(-1) for of_one in logits.split([len(own) for own in places])]


def differ(found: torch.Tensor, expected: torch.Tensor, exact: bool) -> bool:
    """True if two predictions differ by more than rounding.

    In half precision, rounding may send single positions to another expert, so most positions must differ.
    """
    errors = _errors(found, expected)
    return bool(errors.max() > 1e-3 if exact else errors.median() > 0.05)


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Median over positions of the difference between two predictions; see `_errors`."""
    return float(_errors(found, expected).median())


def _errors(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Difference between two predictions at each position, relative to how much positions differ from each other."""
    finite = expected.isfinite()  # some models give -inf for some classes
    if not torch.equal(found.isfinite(), finite):
        return torch.full(expected.shape[:1], torch.inf)
    a, b = found.where(finite, 0), expected.where(finite, 0)
    spread = (b - b.mean(0)).square().sum(-1).mean().sqrt()
    return (a - b).norm(dim=-1) / spread


def _passes(model: Transformer, n: int) -> bool:
    """True if the model can run a text of `n` tokens."""
    try:
        with torch.inference_mode(), _checked_lookups():
            model.body(model.other_input("probe", n, 0).to(model.device))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if not _is_of_length(error):
            raise
        return False
    return True


def _checked_lookups() -> Any:
    """Context manager: raise IndexError before a lookup beyond the end of a table, which would leave a GPU unusable."""
    from torch.overrides import TorchFunctionMode

    class Checked(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.nn.functional.embedding:
                _check_lookup(len(args[1]), args[0])
            elif func in (torch.index_select, torch.Tensor.index_select) and len(args) == 3:
                _check_lookup(args[0].shape[args[1]], args[2])
            elif func is torch.Tensor.__getitem__ and isinstance(args[1], torch.Tensor):
                _check_lookup(len(args[0]), args[1])
            return func(*args, **(kwargs or {}))

    return Checked()


def _check_lookup(n_rows: int, index: Any) -> None:
    whole = isinstance(index, torch.Tensor) and index.dtype in (torch.int32, torch.int64) and index.numel()
    if whole and index.max() >= n_rows:
        raise IndexError(f"index {int(index.max())} of a table of {n_rows} rows")


# State


Place = tuple[Any, str, bool]  # a module, a name, and whether it is a buffer
Changes = dict[Place, Any]  # value before the change; ABSENT if there was none
ABSENT = object()


class State:
    """Snapshot of a module's state other than weights: buffers, and attributes such as the longest length seen."""

    def __init__(self, module: torch.nn.Module):
        self.module = module
        self.values = {place: _copy(value) for place, value in _values(module)}

    def changes(self) -> Changes:
        """Attributes that have changed since the snapshot, with the values that they had then."""
        now = dict(_values(self.module))
        places = {**self.values, **now}
        return {
            place: self.values.get(place, ABSENT)
            for place in places
            if not _equal(self.values.get(place, ABSENT), now.get(place, ABSENT))
        }


def restore(changes: Changes) -> None:
    """Undo the changes."""
    for (module, name, is_buffer), value in changes.items():
        where = module._buffers if is_buffer else module.__dict__
        if value is ABSENT:
            where.pop(name, None)
        else:
            where[name] = _copy(value)


def _values(module: torch.nn.Module) -> list[tuple[Place, Any]]:
    internal = set(torch.nn.Module().__dict__)
    found = []
    for part in module.modules():
        found += [((part, name, True), value) for name, value in part._buffers.items() if _is_state(value)]
        own = {name: value for name, value in part.__dict__.items() if name not in internal}
        found += [((part, name, False), value) for name, value in own.items() if _is_state(value)]
    return found


def _is_state(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() <= SMALL and value.device.type != "meta" and not isinstance(value, torch.nn.Parameter)
    return value is None or isinstance(value, int | float | str)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other.to(one.device))
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return False
    return one is other or one == other


def _restored(model: Transformer, changes: Changes) -> Transformer:
    """The model, but with each pass starting from the state in which it was loaded."""
    if not changes:
        return model
    return dataclasses.replace(
        model,
        logits=_from_the_start(model.logits, changes),
        body=_from_the_start(model.body, changes),
        texts=(*model.texts, "state restored"),
    )


def _from_the_start(run: Callable[[Batch], Any], changes: Changes) -> Callable[[Batch], Any]:
    def run_from_the_start(batch: Batch) -> Any:
        restore(changes)
        return run(batch)

    return run_from_the_start
