"""Finds and checks the projections of a model whose inputs are the neurons."""

from __future__ import annotations

import fnmatch
import logging
import re
from collections import defaultdict
from dataclasses import replace
from typing import Annotated, Literal, NamedTuple

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as validated

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.lazy import torch
from ablation_sweeps.data.batch import Batch, pad_and_stack
from ablation_sweeps.models.transformer import Transformer
from ablation_sweeps.neurons import proposals
from ablation_sweeps.neurons.heads import Heads, watching_heads
from ablation_sweeps.neurons.hooks import Projection, as_rows

log = logging.getLogger(__name__)

Layers = Literal["all"] | Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Site:
    """Location in each layer where neurons are read and replaced: the input of a projection.

    Attributes:
        name: `attn_pre_out` or `mlp_pre_out`, or any name for a pattern of your own.
        projection: regular expression that matches the projection's path inside its layer.
        by_head: True if the neurons belong to attention heads, so that the width must be a multiple of their number.
        layers: numbers of the layers to ablate, from 0, or "all".
    """

    name: str
    projection: str
    by_head: bool
    layers: Layers = "all"

    @property
    def parts(self) -> list[Site]:
        """The sites that are searched one by one: this one."""
        return [self]


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Both:
    """Two sites that are ablated together: the inputs of the attention's and of the MLP's output projection.

    Attributes:
        layers: numbers of the layers to ablate, from 0, or "all".
    """

    name: str
    attention: Site
    mlp: Site
    layers: Layers = "all"

    @property
    def parts(self) -> list[Site]:
        """The sites that are searched one by one."""
        return [self.attention, self.mlp]


def find(model: Transformer, site: Site | Both, paths: tuple[str, ...] | None) -> list[Projection]:
    """Find the projections of a site in all layers, in the order in which a forward pass calls them.

    With two sites, the projections of the attention come before those of the MLP in each layer. See `in_layers` for
    those of some layers.

    Args:
        paths: module paths or patterns such as `model.layers.*.self_attn.o_proj`, used instead of the search.

    Raises:
        UserError: see `_find_one`; or paths are given for two sites.
    """
    if paths and len(site.parts) > 1:
        raise UserError(
            f"site={site.name}: model.site_paths={list(paths)} does not say which paths are the attention's and which "
            "the MLP's; use site=attn_pre_out or site=mlp_pre_out"
        )
    found = [projection for part in site.parts for projection in _find_one(model, part, paths)]
    if len(site.parts) > 1:
        found.sort(key=lambda projection: projection.layer)  # stable: of one layer, the attention is first
    return [replace(projection, order=order) for order, projection in enumerate(found)]


def in_layers(projections: list[Projection], site: Site | Both) -> list[Projection]:
    """The projections of the layers that `site.layers` names.

    Raises:
        UserError: there is no such layer.
    """
    if site.layers == "all":
        return projections
    known = sorted({projection.layer for projection in projections})
    missing = [layer for layer in site.layers if layer not in known]
    if missing:
        raise UserError(
            f"site.layers={list(site.layers)}: there is no layer {missing[0]} with {site.name}, but "
            f"{', '.join(map(str, known))}"
        )
    return [projection for projection in projections if projection.layer in site.layers]


def _find_one(model: Transformer, site: Site, paths: tuple[str, ...] | None) -> list[Projection]:
    """Find one site's projections, one per layer, in the order in which a forward pass calls them.

    They are found by structure and checked with forward passes over a probe: all hooks fire equally often, the width
    fits the heads, and each example has its own rows. A projection that fails a check is an error, never skipped.

    Args:
        paths: module paths or patterns such as `model.layers.*.self_attn.o_proj`, used instead of the search.

    Raises:
        UserError: no projection is found, several towers have one (e.g. text and vision), a hook never fires, or a
            projection's input mixes examples.
    """
    found = _by_path(model.module, paths) if paths else _by_structure(model, site)
    calls = _checked_calls(model, site, found)
    times = len(calls) // len(found)
    if times > 1:
        log.info("%s: one module serves %d layers; its calls are told apart by their order", site.name, times)
    alone = _layers_without(model.module, found)
    if alone:
        patterns = ", ".join(dict.fromkeys(map(proposals.pattern_of, found)))
        log.warning("%s: layers without %s are left alone: %s", site.name, patterns, ", ".join(alone))
    numbers = _layer_numbers([call.path for call in calls])
    return [
        Projection(
            call.path,
            found[call.path],
            call.x.shape[-1],
            site=site.name,
            layer=layer,
            order=order,
            n_heads=call.heads.n_heads if site.by_head and call.heads else None,
            n_kv_heads=call.heads.n_kv_heads if site.by_head and call.heads else None,
        )
        for order, (call, layer) in enumerate(zip(calls, numbers, strict=True))
    ]


def _layer_numbers(paths: list[str]) -> list[int]:
    """Number of each projection's layer: the number in its path that is different in all of them.

    Where there is none (layers in stages, or one module for all layers), projections are numbered in order.
    """
    numbers = [[int(part) for part in path.split(".") if part.isdigit()] for path in paths]
    for column in zip(*numbers, strict=False):
        if len({*column}) == len(paths):
            return list(column)
    return list(range(len(paths)))


class Call(NamedTuple):
    """A call of a projection in a forward pass: its path, its input, and the attention that was computed before it."""

    path: str
    x: torch.Tensor
    heads: Heads | None


def _checked_calls(model: Transformer, site: Site, found: dict[str, torch.nn.Module]) -> list[Call]:
    one, other = _probes(model)
    calls = _calls(model, site, found, pad_and_stack(one, other))
    swapped = _calls(model, site, found, pad_and_stack(other, one))
    _check(found, calls, site, model.n_heads)
    _check_examples(calls, swapped, site)
    return calls


def _probes(model: Transformer) -> list[Batch]:
    return [model.other_input("probe", 8, seed) for seed in (0, 1)]


def _calls(model: Transformer, site: Site, found: dict[str, torch.nn.Module], batch: Batch) -> list[Call]:
    """The calls of the projections in one forward pass, in order."""
    calls: list[Call] = []
    heads: list[Heads] = []
    paths_of = {module: path for path, module in found.items()}

    def note(module: torch.nn.Module, args: tuple) -> None:
        if not args or not isinstance(args[0], torch.Tensor):
            raise UserError(
                f"site={site.name}: {paths_of[module]} is not called with a tensor as its first argument, so it is no "
                "projection; set model.site_paths to the linear layers themselves"
            )
        calls.append(Call(paths_of[module], args[0].clone(), heads[-1] if heads else None))
        heads.clear()

    handles = [module.register_forward_pre_hook(note) for module in found.values()]
    try:
        with torch.inference_mode(), watching_heads() as heads:
            model.body(batch.to(model.device))
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _by_path(module: torch.nn.Module, paths: tuple[str, ...]) -> dict[str, torch.nn.Module]:
    """Modules that match the patterns, each under its first path, since layers may share a module."""
    modules = dict(module.named_modules(remove_duplicate=False))
    found: dict[torch.nn.Module, str] = {}
    for pattern in paths:
        names = fnmatch.filter(modules, pattern)
        if not names:
            near = ", ".join(proposals.near_misses(pattern, module))
            remedy = f"near it: {near}" if near else "print the model to see its paths"
            raise UserError(f"model.site_paths={list(paths)}: no module has the path {pattern}; {remedy}")
        for name in names:
            found.setdefault(modules[name], name)
    return {path: part for part, path in found.items()}


def _by_structure(model: Transformer, site: Site) -> dict[str, torch.nn.Module]:
    """Find projections inside the numbered layers of one tower; a classifier head of the same name is in no layer."""
    pattern = re.compile(site.projection)
    towers: dict[str, dict[str, torch.nn.Module]] = defaultdict(dict)
    for path, candidate in model.module.named_modules():
        layer = re.match(r"(.*\.)?\d+\.(?=\D)", path)
        is_projection = getattr(candidate, "weight", None) is not None and not list(candidate.children())
        if layer and is_projection and pattern.fullmatch(path[layer.end() :]):
            towers[proposals.pattern_of(path)][path] = candidate
    if len(towers) > 1:
        towers = _called(model, site, towers)
    kind = type(model.module).__name__
    if len(towers) > 1:
        remedy = _remedy(model, site, list(towers))
        raise UserError(f"site={site.name}: {kind} has several: {', '.join(towers)}; {remedy}")
    if not towers:
        probe = pad_and_stack(*_probes(model)).to(model.device)
        after = proposals.projections_after(
            "attention" if site.by_head else "activation", model.module, lambda: model.body(probe)
        )
        if site.by_head and after is None:
            raise UserError(
                f"site={site.name}: {kind} has no attention, as far as a pass over a probe shows, and so no projection "
                "of its heads; use a model that has, or name a linear layer of your own choice: model.site_paths=[PATH]"
            )
        raise UserError(
            f"site={site.name}: {kind} has no projection that matches {site.projection!r} inside a numbered layer; "
            f"{_remedy(model, site, after or [])}"
        )
    ((_, found),) = towers.items()
    return found


def _called(
    model: Transformer, site: Site, towers: dict[str, dict[str, torch.nn.Module]]
) -> dict[str, dict[str, torch.nn.Module]]:
    """Towers that a forward pass calls: a text-and-image model may call only one. If none is called, all towers."""
    every = {path: part for tower in towers.values() for path, part in tower.items()}
    calls = {call.path for call in _calls(model, site, every, pad_and_stack(*_probes(model)))}
    called = {name: tower for name, tower in towers.items() if calls & set(tower)}
    return called or towers


def _remedy(model: Transformer, site: Site, patterns: list[str]) -> str:
    """Suggestion for the user: paths in this model that pass the checks, as options that can be pasted."""
    options = [f"'model.site_paths=[{pattern}]'" for pattern in patterns[:8] if _fits(model, site, pattern)]
    if not options:
        return "print the model, and give the paths of its projections: model.site_paths=[PATH,...]"
    return f"give {' or '.join(options)}"


def _fits(model: Transformer, site: Site, pattern: str) -> bool:
    found = _by_path(model.module, (pattern,))
    try:
        return {*map(proposals.pattern_of, found)} == {pattern} and bool(_checked_calls(model, site, found))
    except UserError:
        return False


def _layers_without(module: torch.nn.Module, found: dict[str, torch.nn.Module]) -> list[str]:
    """Paths of layers that have no such projection while others of their kind have one (hybrids with linear attention).

    Layers inside layers (the blocks of a stage) are compared only with layers of the same class.
    """
    projections, alone = set(found.values()), set()
    for path in found:
        outermost, names = True, path.split(".")
        for depth, name in enumerate(names[:-1]):
            stem = name.rstrip("0123456789")
            if stem == name:
                continue
            before = ".".join(names[:depth])
            children = dict(module.get_submodule(before).named_children())
            for sibling, layer in children.items():
                alike = sibling != sibling.rstrip("0123456789") and sibling.rstrip("0123456789") == stem
                of_class = outermost or type(layer) is type(children[name])
                if alike and of_class and not projections & set(layer.modules()):
                    alone.add(f"{before}.{sibling}".removeprefix("."))
            outermost = False
    return proposals.natural_order(alone)


def _check(found: dict[str, torch.nn.Module], calls: list[Call], site: Site, n_heads: int | None) -> None:
    fired = [call.path for call in calls]
    never = [path for path in found if path not in fired]
    if never:
        raise UserError(
            f"site={site.name}: the hook of {never[0]} never fires (its weight is used without calling it), "
            "so nothing would be ablated; set model.site_paths to modules that are called, or use another model"
        )
    times = {fired.count(path) for path in found}
    if len(times) > 1:
        raise UserError(f"site={site.name}: some projections are called more often than others; set model.site_paths")
    wrong = [call.path for call in calls if site.by_head and n_heads and call.x.shape[-1] % n_heads]
    if wrong:
        raise UserError(f"site={site.name}: the width of {wrong[0]} is no multiple of the {n_heads} heads")


def _check_examples(calls: list[Call], swapped: list[Call], site: Site) -> None:
    """Check that swapping two examples swaps their rows: `as_rows` assumes that examples are the outermost axis."""
    for (path, x, _), (_, y, _) in zip(calls, swapped, strict=False):
        rows_fit = x.shape == y.shape and x.numel() % (2 * x.shape[-1]) == 0
        if rows_fit:
            there, back = as_rows(x.float(), 2), as_rows(y.float(), 2).flip(0)
            # Rows of different positions differ by more than the spread, equal rows only by rounding.
            spread = (there - there.mean((0, 1))).norm()
            rows_fit = not (there - back).norm() > 0.5 * spread + 1e-3 * there.norm()  # NaN passes this check
        if not rows_fit:
            raise UserError(
                f"site={site.name}: the rows of {path} are not grouped by example, so what belongs to which example "
                "cannot be told; set model.site_paths to modules that keep the examples outermost"
            )
