"""Leaves out the layers below the first ablated one, which compute what they computed in the clean pass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from jaxtyping import Bool

from ablation_sweeps.base.lazy import torch
from ablation_sweeps.data.batch import pad_and_stack
from ablation_sweeps.models.transformer import Transformer
from ablation_sweeps.neurons.hooks import Projection, ablated

K = TypeVar("K", bound=Hashable)


class SharedPrefix:
    """Passes over one batch that share the layers below the first ablated one.

    A layer is the outermost numbered module that holds a projection (`model.layers.5`). The depth of a pass is the
    number of layers that it leaves out: the output of the last of them is recorded in an earlier pass over the same
    batch, and all of them return it instead of computing anything.

    Models in which this is not exact (layers that are called twice, or that hand later layers more than their output)
    are told by a probe: their passes have depth 0, and compute everything.
    """

    def __init__(self, model: Transformer, projections: list[Projection]):
        self._model = model
        self._projections = projections
        self._layers, self._layer_of = _numbered_layers(model.module, projections)
        self._outputs: dict[int, object] = {}  # by depth
        self._first_ablated = len(self._layers)  # in the pass that runs now

    def depths(self, points: Mapping[K, list[Bool[torch.Tensor, " _neurons"]]]) -> dict[K, int]:
        """The depth of the pass at each point: the largest one that is exact, by a probe of this model."""
        wanted = {point: self._layers_left_alone(masks) for point, masks in points.items()}
        exact = self._exact({*wanted.values()} - {0})
        return {point: max((d for d in exact if d <= most), default=0) for point, most in wanted.items()}

    @contextmanager
    def over_batch(self, depths: Collection[int]) -> Iterator[None]:
        """Context manager: record what passes of these depths need, and forget it on exit.

        All passes inside are over the same batch. A clean pass records everything. Without one, the first pass computes
        all its layers and records those that it leaves alone, so passes go from the largest depth to the smallest.
        """
        with ExitStack() as hooks:
            for depth in {*depths} - {0}:
                layer = self._layers[depth - 1]
                hooks.callback(layer.register_forward_hook(self._recorder(depth)).remove)
            try:
                yield
            finally:
                self._outputs.clear()

    @contextmanager
    def ablated(
        self,
        depth: int,
        masks: list[Bool[torch.Tensor, " _neurons"]],
        values: list[torch.Tensor],
        batch: int,
        positions: Bool[torch.Tensor, "batch rows"] | None = None,
    ) -> Iterator[None]:
        """Context manager: as `hooks.ablated`, but leave out the first `depth` layers if their output is recorded.

        Args:
            depth: depth of the pass, as `depths` gives it for these masks.
        """
        skipped = depth if depth in self._outputs else 0
        computed = [i for i, layer in enumerate(self._layer_of) if layer >= skipped]
        projections = [self._projections[i] for i in computed]
        masks, values = [masks[i] for i in computed], [values[i] for i in computed]
        self._first_ablated = depth
        try:
            with self._leaving_out(skipped), ablated(projections, masks, values, batch, positions):
                yield
        finally:
            self._first_ablated = len(self._layers)

    @contextmanager
    def _leaving_out(self, depth: int) -> Iterator[None]:
        def recorded(*_: object, **__: object) -> object:
            return _copied(self._outputs[depth])

        # An attribute of the instance hides the method of the class. Some instances have one (accelerate's hooks).
        layers = self._layers[:depth]
        own = [layer.__dict__.get("forward") for layer in layers]
        try:
            for layer in layers:
                layer.forward = recorded  # type: ignore[method-assign]
            yield
        finally:
            for layer, forward in zip(layers, own, strict=True):
                if forward is not None:
                    layer.forward = forward  # type: ignore[method-assign]
                elif "forward" in layer.__dict__:
                    del layer.forward

    def _recorder(self, depth: int) -> Callable[..., None]:
        def record(_: torch.nn.Module, __: tuple, output: object) -> None:
            if depth not in self._outputs and depth <= self._first_ablated:
                self._outputs[depth] = _copied(output)

        return record

    def _layers_left_alone(self, masks: list[Bool[torch.Tensor, " _neurons"]]) -> int:
        """Number of layers below the first one in which a neuron is ablated."""
        ablated_layers = [layer for layer, mask in zip(self._layer_of, masks, strict=True) if bool(mask.any())]
        return min(ablated_layers, default=0)

    def _exact(self, depths: Collection[int]) -> set[int]:
        """The depths at which the logits of a probe are bit-equal to those of a pass through all layers.

        Layers must be called once each, in the order of their numbers, so that none is called after an ablated one that
        has a larger number. A pass over other texts in between changes whatever layers that are left out have kept from
        their last call: the largest depth is tried first, so that none of them is called again before.
        """
        if not depths:
            return set()
        one, other, third = (self._model.other_input("probe", n, seed) for n, seed in ((5, 0), (8, 1), (8, 2)))
        probe, between = (pad_and_stack(*pair).to(self._model.device) for pair in ((one, other), (other, third)))

        def is_exact(depth: int) -> bool:
            try:
                with self._leaving_out(depth):
                    return torch.equal(self._model.logits(probe), expected)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # a model that misses what its lower layers do may raise anything
                return False

        with torch.inference_mode(), self.over_batch(depths):
            with self._called() as called:
                expected = self._model.logits(probe)
            if called != sorted({*called}):
                return set()
            self._model.logits(between)
            return {depth for depth in sorted(depths, reverse=True) if depth in self._outputs and is_exact(depth)}

    @contextmanager
    def _called(self) -> Iterator[list[int]]:
        """Context manager: gives a list, to which each layer that is called adds its index."""
        called: list[int] = []
        with ExitStack() as hooks:
            for number, layer in enumerate(self._layers):
                note = layer.register_forward_pre_hook(lambda *_, number=number: called.append(number))
                hooks.callback(note.remove)
            yield called


def _numbered_layers(module: torch.nn.Module, projections: list[Projection]) -> tuple[list[torch.nn.Module], list[int]]:
    """The layers in the order of their numbers, and the index of each projection's layer.

    There are no layers, and all indices are 0, if the outermost numbered modules are not numbered in one sequence.
    """
    none: tuple[list[torch.nn.Module], list[int]] = [], [0] * len(projections)
    stems: set[str] = set()
    names: list[str] = []
    for projection in projections:
        parts = projection.path.split(".")
        first = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), None)
        if first is None:
            return none
        stems.add(".".join(parts[:first]))
        names.append(parts[first])
    if len(stems) != 1:
        return none
    children = dict(module.get_submodule(stems.pop()).named_children())
    numbered = sorted((name for name in children if name.isdigit()), key=int)
    if not {*names} <= {*numbered}:
        return none
    return [children[name] for name in numbered], [numbered.index(name) for name in names]


def _copied(output: Any) -> Any:
    """A copy of a layer's output, since a later layer may write into its input."""
    if isinstance(output, torch.Tensor):
        return output.clone()
    if type(output) in (tuple, list):
        return type(output)(map(_copied, output))
    return output
