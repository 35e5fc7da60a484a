"""Proves for one model what an ablation changes, and that it changes nothing else.

Each property is a function that returns its evidence, from a few passes over probes of some tokens. It raises `Refuted`
if the property does not hold, or `NotProven` if this cannot be told.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

from jaxtyping import Bool, Float

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.lazy import torch
from ablation_sweeps.base.terminal import counted
from ablation_sweeps.data.batch import NOT_SCORED, Batch, pad_and_stack
from ablation_sweeps.data.scope import Positions, positions
from ablation_sweeps.data.text import TextEncoder
from ablation_sweeps.models.probing import differ
from ablation_sweeps.models.transformer import Transformer
from ablation_sweeps.neurons.heads import changing_attention
from ablation_sweeps.neurons.hooks import Projection, ablated, as_rows, hooked, reading
from ablation_sweeps.neurons.proposals import pattern_of
from ablation_sweeps.neurons.units import Kind, Unit

Outcome = Literal["passed", "failed", "not proven"]

LONG = 8  # positions of a probe
SHORT = 5  # positions of a text that shares a batch with a longer one, and of each of many copies
COPIES = 16  # examples of one pass, each with an intervention of its own


class Refuted(Exception):
    """A property does not hold; the message says what was seen instead."""


class NotProven(Exception):
    """It cannot be told whether a property holds; the message says why."""


@dataclass(frozen=True)
class Verdict:
    """The outcome of the proof of one property, with its evidence."""

    name: str
    outcome: Outcome
    evidence: str

    def __str__(self) -> str:
        return f"{self.name}: {self.evidence}"


@dataclass(frozen=True)
class Certificate:
    """The verdicts on a model's properties at one site."""

    verdicts: tuple[Verdict, ...]

    def as_dict(self) -> dict[str, list[str]]:
        """One sentence per property for each outcome."""
        return {
            outcome.replace(" ", "_"): [str(verdict) for verdict in self.verdicts if verdict.outcome == outcome]
            for outcome in get_args(Outcome)
        }

    def require(self, unit: Kind) -> None:
        """Check that nothing failed, and that heads are proven if they are to be ablated.

        Raises:
            UserError: a property that the unit needs is not there.
        """
        for verdict in self.verdicts:
            if verdict.outcome == "failed":
                raise UserError(
                    f"model: it is not certain what would be ablated, as a property fails: {verdict}; set "
                    "model.site_paths to other modules, or use another model; the command `check` with the same "
                    "options prints all properties"
                )
            if verdict.outcome == "not proven" and verdict.name == "heads" and unit in ("head", "kv_group"):
                raise UserError(f"unit={unit}: not proven for this model: {verdict.evidence}; use unit=neuron")


@dataclass(frozen=True)
class Subject:
    """A model at one site, and its probes.

    Attributes:
        projections: those of all layers.
        write: positions at which values are written.
    """

    model: Transformer
    projections: list[Projection]
    write: Positions

    @functools.cached_property
    def pads(self) -> bool:
        """True if texts of different lengths are run together, with padding that a mask tells apart."""
        return "apart" not in self.model.texts and "attention_mask" in self.probe(LONG, 0).inputs

    @functools.cached_property
    def batch(self) -> Batch:
        """Two examples: texts of which the first is padded, if texts are, and every second position is scored."""
        batch = pad_and_stack(self.probe(SHORT if self.pads else LONG, 0), self.probe(LONG, 1))
        if batch.labels.ndim > 1:
            labels = torch.where(torch.arange(LONG) % 2 == 1, 0, NOT_SCORED).repeat(2, 1)
            labels[0, SHORT if self.pads else LONG :] = NOT_SCORED
            batch = replace(batch, labels=labels)
        return batch.to(self.model.device)

    def probe(self, length: int, seed: int) -> Batch:
        return self.model.other_input("probe", length, seed)

    def copies(self, n: int) -> Batch:
        """A batch of `n` times the same example."""
        return pad_and_stack(*[self.probe(SHORT, 0)] * n).to(self.model.device)

    def logits(self, *examples: Batch) -> torch.Tensor:
        return self.model.logits(pad_and_stack(*examples).to(self.model.device)).cpu()

    @functools.cached_property
    def clean(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits and activations of a clean pass over the batch of two."""
        with reading(self.projections, 2) as activations:
            return self.model.logits(self.batch).cpu(), activations

    @functools.cached_property
    def of_short_text(self) -> torch.Tensor:
        """Logits of a text that is run alone."""
        return self.logits(self.probe(SHORT, 0))

    def everything(self) -> list[torch.Tensor]:
        """The masks of all neurons."""
        return [torch.ones(p.width, dtype=torch.bool) for p in self.projections]

    def ablated(
        self, masks: list[torch.Tensor], values: list[torch.Tensor], where: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits of the batch of two with values written, in the way in which a job writes them."""
        with ablated(self.projections, masks, values, 2, where):
            return self.model.logits(self.batch).cpu()


def certify(model: Transformer, projections: list[Projection], write: Positions) -> Certificate:
    """Prove what an ablation changes.

    Args:
        projections: those of all layers at the site.
        write: positions at which values are written.

    Raises:
        UserError: the model does not know the positions of the scope.
    """
    with torch.inference_mode():
        return _certify(Subject(model, projections, write))


def _certify(subject: Subject) -> Certificate:
    hooks = _verdict("hooks", hooks_fire_once, subject)
    if hooks.outcome == "failed":  # nothing else can be seen without them
        return Certificate((hooks,))
    if subject.clean[0].isnan().any():  # reported by the evaluation, with its cause
        reason = "the model gives NaN before anything is ablated"
        return Certificate((hooks, Verdict("clean values", "not proven", reason)))
    again = subject.logits(subject.batch)
    if not _same_bits(again, subject.clean[0]) and not _differ(subject, again, subject.clean[0]):
        # Kernels of a GPU may add in any order. Most properties compare bits, and would fail for no fault of the model.
        reason = "two passes over one input differ in their last bits, so that equal bits cannot be asked for"
        return Certificate((hooks, Verdict("input", "not proven", reason)))
    return Certificate(
        (
            hooks,
            _verdict("input", logits_are_of_this_input, subject),
            _verdict("clean values", clean_values_change_nothing, subject),
            _verdict("written", only_the_input_of_projections_is_changed, subject),
            _verdict("scope", nothing_is_written_elsewhere, subject),
            _verdict("effect", every_layer_has_an_effect, subject),
            _verdict("heads", slices_are_heads, subject),
            _verdict("padding", padding_changes_nothing, subject),
            _verdict("neighbour", neighbours_change_nothing, subject),
        )
    )


def _verdict(name: str, prove: Callable[[Subject], str], subject: Subject) -> Verdict:
    try:
        return Verdict(name, "passed", prove(subject))
    except Refuted as reason:
        return Verdict(name, "failed", str(reason))
    except NotProven as reason:
        return Verdict(name, "not proven", str(reason))
    except torch.OutOfMemoryError:
        return Verdict(name, "not proven", "the device has too little memory for the probes")


# Hooks


def hooks_fire_once(subject: Subject) -> str:
    """Every hook fires exactly once per layer and pass, with and without the head of a language model."""
    batch, n = subject.batch, len(subject.projections)
    for run in (subject.model.logits, subject.model.body):
        fired: list[tuple[int, torch.Tensor]] = []
        try:
            see = hooked(subject.projections, lambda layer, x, fired=fired: fired.append((layer, x.clone())))
            with see:
                run(batch)
        except AssertionError as error:
            raise Refuted(str(error)) from error
        if [layer for layer, _ in fired] != list(range(n)):
            times = {[layer for layer, _ in fired].count(layer) for layer in range(n)}
            seen = "not in the order of the layers" if times == {1} else f"{' or '.join(map(str, sorted(times)))} times"
            raise Refuted(f"the projections are called {seen} in one pass")
        _check_calls(subject, [x for _, x in fired])
    modules = {projection.module for projection in subject.projections}
    served = counted(n, "layer") if len(modules) == n else f"{counted(len(modules), 'module')} for {n} layers"
    return f"each fires once a pass, in order ({served}: {_paths(subject.projections)})"


def _check_calls(subject: Subject, inputs: list[torch.Tensor]) -> None:
    """Check that a module that is called several times serves as many layers, not one layer in several steps."""
    labels = subject.batch.labels
    modules = [projection.module for projection in subject.projections]
    for number, (module, x) in enumerate(zip(modules, inputs, strict=True)):
        path, times = subject.projections[number].path, modules.count(module)
        if number and module is modules[number - 1] and _same_bits(x, inputs[number - 1]):
            raise Refuted(f"{path} is called twice with the same input in one layer")
        if times > 1 and labels.ndim > 1 and x.numel() // x.shape[-1] * times == labels.numel():
            raise Refuted(f"{path} is called {times} times in one layer, each time for a part of the positions")


def _paths(projections: list[Projection]) -> str:
    return ", ".join(dict.fromkeys(pattern_of(projection.path) for projection in projections))


# Input


def logits_are_of_this_input(subject: Subject) -> str:
    """The logits depend on the input of their own pass: nothing is kept from an earlier one."""
    clean, _ = subject.clean
    if _same_bits(clean[0, :SHORT], clean[1, :SHORT]):
        raise NotProven("the model gives the same logits for all inputs")
    if _same_bits(subject.logits(subject.probe(LONG, 2), subject.probe(LONG, 3)), clean):
        raise Refuted("two different inputs give the same logits")
    if not _same_bits(subject.logits(subject.batch), clean):
        raise Refuted("an input gives other logits after another one")
    return "another input gives other logits, and the first one again the same: bit-equal"


# Values


def clean_values_change_nothing(subject: Subject) -> str:
    """Writing the clean values, or writing nothing, changes no bit of the logits."""
    logits, activations = subject.clean
    if not _same_bits(subject.ablated(subject.everything(), activations), logits):
        raise Refuted("the logits change if the clean values are written in place of themselves")
    nothing = [~mask for mask in subject.everything()]
    nans = [torch.full((p.width,), torch.nan) for p in subject.projections]
    if not _same_bits(subject.ablated(nothing, nans), logits):
        raise Refuted("the logits change although no neuron is masked")
    return "writing them to all neurons, or NaN to none, changes no bit of the logits"


class Seen(NamedTuple):
    """A call of a projection, `[batch, rows, neurons]`.

    Attributes:
        before: the activation as the pass computes it.
        after: the projection's input, with values written.
        is_own_output: True if the projection's output is that of its own forward function on this input.
    """

    before: torch.Tensor
    after: torch.Tensor
    is_own_output: bool


@contextmanager
def _observed(projections: list[Projection], batch: int) -> Iterator[list[Seen]]:
    """Context manager: gives a list of the projections' calls. Values are written by hooks inside of this one."""
    calls: list[Seen] = []
    before: list[torch.Tensor] = []

    def see_before(layer: int, x: torch.Tensor) -> None:
        before.append(as_rows(x, batch).clone())

    def see_after(module: torch.nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        x = args[0]
        is_own_output = _same_bits(module.forward(*args), out)
        calls.append(Seen(before[-1], as_rows(x, batch).clone(), is_own_output))

    with hooked(projections, see_before):
        handles = [m.register_forward_hook(see_after) for m in dict.fromkeys(p.module for p in projections)]
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()


def only_the_input_of_projections_is_changed(subject: Subject) -> str:
    """The projection gets exactly what was written, and its output is that of the projection applied to it."""
    _check_written(subject, None)
    return (
        "with every second neuron replaced, each projection gets that input, and gives what it computes from it: "
        "bit-equal"
    )


def nothing_is_written_elsewhere(subject: Subject) -> str:
    """Outside of the scope, the activations are unchanged at the site."""
    model, batch = subject.model, subject.batch
    where = model.in_scope(batch, subject.write)
    if batch.labels.ndim > 1:
        expected = positions(batch, subject.write, model.special_ids)
        everywhere = torch.ones_like(batch.labels, dtype=torch.bool)
        if not torch.equal(everywhere if where is None else where, everywhere if expected is None else expected):
            raise Refuted(f"the positions of a text that are written to are not those of scope={subject.write}")
    elif (subject.write == "all") != (where is None):
        raise Refuted(f"the positions of an image that are written to are not those of scope={subject.write}")
    if where is None:
        return f"with scope={subject.write}, no position is outside"
    _check_written(subject, where)
    outside, n = int((~where).sum()), where.numel()
    return f"with scope={subject.write}, {outside} of {n} positions of the probe are outside, and unchanged: bit-equal"


def _check_written(subject: Subject, where: Bool[torch.Tensor, "batch rows"] | None) -> None:
    """Check, with every second neuron replaced by that of the other example, what each projection gets and gives."""
    _, activations = subject.clean
    masks = [torch.arange(p.width) % 2 == 0 for p in subject.projections]
    values = [x.flip(0) for x in activations]
    with _observed(subject.projections, 2) as calls:
        subject.ablated(masks, values, where)
    for projection, call, mask, value in zip(subject.projections, calls, masks, values, strict=True):
        is_written = mask.to(value.device)
        if where is not None:
            is_written = is_written & where.to(value.device)[..., None]
        expected = torch.where(is_written, value, call.before)
        if not _same_bits(call.after, expected):
            what = "what was written" if where is None else "what was written at positions of the scope alone"
            raise Refuted(f"the input of {projection.path} is not {what}")
        if not call.is_own_output:
            raise Refuted(f"the output of {projection.path} is not that of the projection: it is changed afterwards")


# Effect


def every_layer_has_an_effect(subject: Subject) -> str:
    """Other values in a layer change the logits of the example that they are written to, and of no other."""
    n = len(subject.projections)
    # One example for each layer, and one that keeps its clean values.
    batch = subject.copies(min(n, COPIES) + 1)
    with reading(subject.projections, len(batch.names)) as clean:
        logits = _at_the_end(subject, batch)
    idle = []
    for start in range(0, n, COPIES):
        layers = range(start, min(start + COPIES, n))
        values = [x.clone() for x in clean]
        for example, layer in enumerate(layers):
            values[layer][example] = _other(clean[layer][example])
        with ablated(subject.projections, subject.everything(), values, len(batch.names)):
            found = _at_the_end(subject, batch)
        if _differ(subject, found[len(layers) :], logits[len(layers) :]):
            raise Refuted("values that are written to one example change the logits of another one")
        idle += [layer for example, layer in enumerate(layers) if _same_bits(found[example], logits[example])]
    for layer in idle:  # alone: what is written to later layers may have hidden it
        if not _has_effect_alone(subject, layer):
            path = subject.projections[layer].path
            raise Refuted(f"the logits do not depend on what is written to the input of {path}")
    return f"other values change the logits, in each of {counted(n, 'layer')}, of no example but their own"


def _at_the_end(subject: Subject, batch: Batch) -> torch.Tensor:
    """Logits of each image, or at the last position of each text."""
    if subject.model.modality == "image":
        return subject.model.logits(batch).cpu()
    last = torch.arange(1, len(batch.names) + 1) * batch.labels.shape[-1] - 1
    return subject.model.logits_at(batch, last.to(subject.model.device)).cpu()


def _has_effect_alone(subject: Subject, layer: int) -> bool:
    """True if other values in a layer change the logits, or if the projection ignores its input (no weights)."""
    logits, activations = subject.clean
    has_weights = False

    def at(number: int, x: torch.Tensor) -> None:
        nonlocal has_weights
        if number == layer:
            project = subject.projections[layer].module.forward
            has_weights = not _same_bits(project(_other(x)), project(x))

    with hooked(subject.projections, at):
        subject.model.body(subject.batch)
    masks = [torch.full((p.width,), number == layer) for number, p in enumerate(subject.projections)]
    return not (has_weights and _same_bits(subject.ablated(masks, [*map(_other, activations)]), logits))


def _other(x: torch.Tensor) -> torch.Tensor:
    """Values that are far from these."""
    return x + 1 + x.abs().max()


# Heads


def slices_are_heads(subject: Subject) -> str:
    """Zeroing the slice of a head equals zeroing that head's output inside the attention."""
    with_heads = [number for number, p in enumerate(subject.projections) if p.n_heads is not None]
    if not with_heads:
        raise NotProven("these neurons belong to no heads, as far as a pass over a probe shows")
    own = [subject.projections[number] for number in with_heads]
    try:
        units = Unit(name="head").partition(own)
    except UserError as error:
        raise NotProven(str(error)) from error
    heads = dict(zip(with_heads, units.of_neuron, strict=True))
    most = max(p.n_heads or 0 for p in own)
    batch = subject.copies(min(most, COPIES))
    attentions, clean = _attentions(subject, batch)
    for start in range(0, most, COPIES):
        silenced = _with_silenced_heads(subject, batch, attentions, clean, start)
        for number, unit_of_neuron in heads.items():
            path = subject.projections[number].path
            for example, unit in enumerate(unit_of_neuron.unique()[start : start + COPIES]):
                mask = (unit_of_neuron == unit).to(clean[number].device)
                x, found = clean[number][example], silenced[number][example]
                if not _same_bits(found, torch.where(mask, 0, x)):
                    _say_what_stands_between(path, start + example, x, found, attentions[number])
    _check_logits(subject, attentions, heads)
    n_heads = " or ".join(map(str, sorted({p.n_heads or 0 for p in own})))
    return (
        f"zeroing the slice of each of the {n_heads} heads, in {counted(len(own), 'layer')}, equals zeroing the head "
        "inside the attention: bit-equal"
    )


class Attention(NamedTuple):
    """The attention that a projection's neurons come from.

    Attributes:
        number: its number among those of the pass, from 0.
        is_projected: True if a linear layer of the width of all heads is applied before the projection.
    """

    number: int
    is_projected: bool


def _attentions(subject: Subject, batch: Batch) -> tuple[dict[int, Attention], list[torch.Tensor]]:
    """The last attention before each projection of heads, by number of the projection; and all activations."""
    from torch.overrides import TorchFunctionMode

    found: dict[int, Attention] = {}
    activations: list[torch.Tensor] = []
    n_seen, widths = 0, set()

    class Linears(TorchFunctionMode):
        def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            if func in (torch.nn.functional.linear, torch.addmm) and len(args) > 1:
                widths.add(args[0 if func is torch.nn.functional.linear else 1].shape[-1])
            return func(*args, **(kwargs or {}))

    def see(attention: torch.Tensor) -> None:
        nonlocal n_seen
        n_seen += 1
        widths.clear()

    def at(layer: int, x: torch.Tensor) -> None:
        activations.append(as_rows(x, len(batch.names)).clone())
        if subject.projections[layer].n_heads is not None:
            found[layer] = Attention(n_seen - 1, subject.projections[layer].width in widths)

    with changing_attention(see), Linears(), hooked(subject.projections, at):
        subject.model.body(batch)
    return found, activations


@contextmanager
def _silencing(
    attentions: dict[int, Attention], heads_of: Callable[[int, int], list[int | None]], examples: int
) -> Iterator[None]:
    """Context manager: zero heads inside the attention.

    Args:
        heads_of: head that is zeroed in each example, given the number of the projection and the number of heads.
    """
    by_number = {attention.number: layer for layer, attention in attentions.items()}
    n_seen = 0

    def change(attention: torch.Tensor) -> torch.Tensor | None:
        nonlocal n_seen
        n_seen += 1
        layer = by_number.get(n_seen - 1)
        if layer is None:
            return None
        if attention.shape[0] % examples:
            raise NotProven("the attention does not keep the examples of a batch apart")
        changed = attention.clone().unflatten(0, (examples, -1))
        for example, head in enumerate(heads_of(layer, attention.shape[1])):
            if head is not None:
                changed[example, :, head] = 0
        return changed.flatten(0, 1)

    with changing_attention(change):
        yield


def _with_silenced_heads(
    subject: Subject, batch: Batch, attentions: dict[int, Attention], clean: list[torch.Tensor], start: int
) -> list[torch.Tensor]:
    """Activations with one head zeroed inside the attention of each layer: another head in each example.

    The clean values are put back at the site, so that each layer is given what it was given in the clean pass.
    """
    seen: list[torch.Tensor] = []
    n = len(batch.names)

    def at(layer: int, x: torch.Tensor) -> torch.Tensor:
        seen.append(as_rows(x, n).clone())
        return clean[layer].reshape(x.shape)

    def heads_of(layer: int, n_heads: int) -> list[int | None]:
        return [head if head < n_heads else None for head in range(start, start + n)]

    with _silencing(attentions, heads_of, n), hooked(subject.projections, at):
        subject.model.body(batch)
    return seen


def _say_what_stands_between(
    path: str, head: int, x: Float[torch.Tensor, "rows neurons"], found: torch.Tensor, attention: Attention
) -> None:
    """Say why zeroing a head inside the attention is not zeroing its slice of the projection's input."""
    changed = (found != x).any(0)
    if bool((found[:, changed] == 0).all()):
        neurons = changed.nonzero()[:, 0].tolist()
        listed = ", ".join(map(str, neurons[:4])) + (", ..." if len(neurons) > 4 else "")
        raise Refuted(f"at {path}, the neurons of head {head} are not a slice in order, but {listed or 'none'}")
    if attention.is_projected:
        raise Refuted(
            f"zeroing head {head} inside the attention changes the neurons of other heads at {path}, since a linear "
            "layer of their width comes before: the site is after the output projection"
        )
    raise NotProven(
        f"between the attention and {path}, something mixes the heads or is added to them (a norm, say): zeroing head "
        f"{head} inside the attention is not zeroing its slice"
    )


def _check_logits(subject: Subject, attentions: dict[int, Attention], heads: dict[int, torch.Tensor]) -> None:
    """Check that the logits are the same, too, with one head of each layer zeroed; not the same head in each layer."""
    batch, n = subject.batch, len(subject.batch.names)

    def heads_of(layer: int, n_heads: int) -> list[int | None]:
        return [layer % n_heads] * n

    with _silencing(attentions, heads_of, n):
        expected = subject.model.logits(batch).cpu()
    masks = [~mask for mask in subject.everything()]
    for number, unit_of_neuron in heads.items():
        units = unit_of_neuron.unique()
        masks[number] = unit_of_neuron == units[number % len(units)]
    zeros = [torch.zeros(p.width) for p in subject.projections]
    if not _same_bits(subject.ablated(masks, zeros), expected):
        raise NotProven("the output of a head is used elsewhere, too: zeroing its slice gives other logits")


# Batches


def padding_changes_nothing(subject: Subject) -> str:
    """A text has the same logits with padding beside it, and nothing is ever written to padding."""
    model, text = subject.model, subject.probe(SHORT, 0)
    if text.labels.ndim == 1:
        return "images have one size: nothing is padded"
    if "apart" in model.texts:
        return "texts of different lengths are run apart: nothing is padded"
    if not subject.pads:
        raise NotProven("the inputs have no attention_mask, which tells padding from text")
    batch = subject.batch.to(torch.device("cpu"))
    is_padding = ~batch.inputs["attention_mask"].bool()
    for scope in get_args(Positions):
        where = model.in_scope(batch, scope)
        if bool((is_padding if where is None else is_padding & where).any()):
            raise Refuted(f"padding is in scope={scope}")
    inputs = {key: x[:1] for key, x in pad_and_stack(text, subject.probe(LONG, 1)).inputs.items()}
    padded = replace(text, inputs=inputs, labels=torch.full((1, LONG), NOT_SCORED))
    if _differ(subject, subject.logits(padded)[:, :SHORT], subject.of_short_text):
        raise Refuted(f"a text has other logits with {LONG - SHORT} positions of padding")
    return f"{LONG - SHORT} positions of padding are in no scope, and leave a text's logits as they are, to rounding"


def neighbours_change_nothing(subject: Subject) -> str:
    """An example has the same logits beside another, longer one in its batch."""
    one, encode = subject.probe(SHORT, 0), subject.model.encode
    if subject.model.modality == "image":
        other = subject.probe(SHORT, 1)
        alone = torch.cat([subject.logits(one), subject.logits(other)])
        if _differ(subject, subject.logits(one, other), alone):
            raise Refuted("an image has other logits beside another one")
        return "an image has the same logits beside another one, to rounding"
    length = min(64, encode.max_tokens) if isinstance(encode, TextEncoder) and subject.pads else SHORT
    batch = pad_and_stack(one, subject.probe(length, 1)).to(subject.model.device)
    beside = subject.model.logits_at(batch, torch.arange(SHORT).to(subject.model.device)).cpu()
    if _differ(subject, beside, subject.of_short_text[0]):
        raise Refuted(f"a text of {SHORT} tokens has other logits beside one of {length}")
    apart = "; other lengths are run apart" if "apart" in subject.model.texts else ""
    return f"a text of {SHORT} tokens has the same logits beside one of {length}, to rounding{apart}"


# Comparisons


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """True if two tensors are equal; NaN equals NaN."""
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def _differ(subject: Subject, found: torch.Tensor, expected: torch.Tensor) -> bool:
    """True if logits differ by more than rounding."""
    exact = all(p.dtype in (torch.float32, torch.float64) for p in subject.model.module.parameters())
    one, other = (logits.double().log_softmax(-1).flatten(0, -2) for logits in (found, expected))
    return differ(one, other, exact)
