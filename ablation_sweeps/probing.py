"""Probes of a language model that has just been loaded, so that no score depends on what is passed beside a text.

What a text scores must be the same as if it were passed alone, first, and within the positions that the model has.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

from ablation_sweeps.data import Batch, UserError, together
from ablation_sweeps.lazy import torch
from ablation_sweeps.text import TextEncoder
from ablation_sweeps.transformer import Transformer

log = logging.getLogger(__name__)

SHORT = 8  # tokens of the text whose scores are watched
SMALL = 1 << 20  # elements of a tensor that may be state: weights and masks are larger


def fit_vocabulary(encoder: TextEncoder, module: torch.nn.Module, option: str) -> TextEncoder:
    """The encoder, knowing which token ids the model has.

    Args:
        option: of the model, as the user typed it.

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
    """The model, made such that a text scores what it scores alone, whatever is passed before it or beside it.

    A short text is passed alone, beside a longer one, beside the longest there may be, and alone again. If its scores
    depend on the length of the others, texts of different lengths are passed apart. If the model changes its own state
    from pass to pass, each pass begins with the state that it was loaded with. If it has fewer positions than its
    configuration says, texts are cut to those.

    Raises:
        UserError: its scores depend on something else, or only very short texts pass.
    """
    short, longer, longest = (
        model.other_input("probe", n, seed) for seed, n in enumerate((SHORT // 2, SHORT, encoder.max_tokens))
    )
    if encoder.max_tokens < SHORT:
        return model
    exact = all(p.dtype in (torch.float32, torch.float64) for p in model.module.parameters())
    differ = functools.partial(_differ, exact=exact)
    state = State(model.module)
    alone, again = _scores(model, short), _scores(model, short)
    if alone.isnan().any():  # another error, which names the cause
        return model
    try:
        beside = [_scores(model, short, longer), _scores(model, short, longest)]
    except torch.OutOfMemoryError:
        log.warning("%s: has too little memory to see whether texts in a batch affect each other", option)
        return model
    except Exception:  # whatever a model says when it has no such position
        encoder = dataclasses.replace(encoder, max_tokens=_context(model, encoder.max_tokens, option))
        return isolate(dataclasses.replace(model, encode=encoder), encoder, option)
    depends = any(differ(scores, alone) for scores in beside)
    changes = state.changes()
    if changes and (depends or differ(again, alone) or _remembers(model, encoder.max_tokens, changes, differ)):
        model = dataclasses.replace(
            model, logits=_from_the_start(model.logits, changes), body=_from_the_start(model.body, changes)
        )
    if differ(_scores(model, short), alone):
        raise UserError(
            f"{option}: gives other logits when the same text is passed again, so that no damage can be told from "
            "chance; use another model, or another model.attn_implementation"
        )
    if not depends:
        return model
    if differ(_scores(model, short, model.other_input("probe", SHORT // 2, 2)), alone):
        if exact:
            raise UserError(
                f"{option}: what it says of a text depends on the other texts of its batch, even of the same length; "
                "use another model, or another model.attn_implementation"
            )
        log.warning("%s: what it says of a text depends a little on the others of its batch", option)
    log.info("%s: what it says of a text depends on how long the others are: lengths are passed apart", option)
    return dataclasses.replace(model, encode=dataclasses.replace(encoder, apart=True))


def _context(model: Transformer, fails: int, option: str) -> int:
    """The longest text that passes."""
    works, said = SHORT, fails
    while fails - works > 1:
        middle = (works + fails) // 2
        works, fails = (middle, fails) if _passes(model, middle) else (works, middle)
    if works <= SHORT:
        raise UserError(f"{option}: fails on texts of more than {SHORT} tokens; give model.max_tokens={SHORT - 1}")
    log.warning("%s: has %d positions, not %d as its configuration says: texts are cut to them", option, works, said)
    return works


def _remembers(model: Transformer, longest: int, changes: Changes, differ: Callable[..., bool]) -> bool:
    """Whether a long text scores something else after a longer one."""
    text, longer = (model.other_input("probe", n, seed) for seed, n in enumerate((longest * 3 // 4, longest)))
    restore(changes)
    first = _scores(model, text)
    restore(changes)
    _scores(model, longer)
    return differ(_scores(model, text), first)


def _scores(model: Transformer, text: Batch, *others: Batch) -> torch.Tensor:
    """Log probabilities at all positions of the first text, `[pos, d_vocab]`."""
    n = text.labels.shape[-1]
    with torch.inference_mode(), _checked_lookups():
        logits = model.logits_at(together(text, *others).to(model.device), torch.arange(n, device=model.device))
        return logits.cpu().double().log_softmax(-1)


def _differ(found: torch.Tensor, expected: torch.Tensor, exact: bool) -> bool:
    """Whether two predictions differ by more than rounding. In half precision, rounding may send single positions to
    another expert: most of them must differ."""
    finite = expected.isfinite()  # some models rule classes out
    if not torch.equal(found.isfinite(), finite):
        return True
    a, b = found.where(finite, 0), expected.where(finite, 0)
    spread = (b - b.mean(0)).square().sum(-1).mean().sqrt()  # between positions
    error = (a - b).norm(dim=-1) / spread
    return bool(error.max() > 1e-3 if exact else error.median() > 0.05)


def _passes(model: Transformer, n: int) -> bool:
    """Whether a text of so many tokens passes."""
    try:
        with torch.inference_mode(), _checked_lookups():
            model.body(model.other_input("probe", n, 0).to(model.device))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # as above
        return False
    return True


def _checked_lookups() -> Any:
    """Raises IndexError before a table is read behind its end: a GPU could not be used any more afterwards."""
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
Changes = dict[Place, Any]  # what was there before; ABSENT if nothing was
ABSENT = object()


class State:
    """What a module had beside its weights when this was made: buffers, and plain values such as the longest text."""

    def __init__(self, module: torch.nn.Module):
        self.module = module
        self.values = {place: _copy(value) for place, value in _values(module)}

    def changes(self) -> Changes:
        now = dict(_values(self.module))
        places = {**self.values, **now}
        return {
            place: self.values.get(place, ABSENT)
            for place in places
            if not _equal(self.values.get(place, ABSENT), now.get(place, ABSENT))
        }


def restore(changes: Changes) -> None:
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


def _from_the_start(run: Callable[[Batch], Any], changes: Changes) -> Callable[[Batch], Any]:
    def run_from_the_start(batch: Batch) -> Any:
        restore(changes)
        return run(batch)

    return run_from_the_start
