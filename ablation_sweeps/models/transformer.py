"""A loaded model, with the same interface for every kind of model."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float, Int

from ablation_sweeps.base.lazy import torch
from ablation_sweeps.data.batch import Batch, Modality, pad_and_stack
from ablation_sweeps.data.encoder import Encoder, OtherInput
from ablation_sweeps.data.scope import InScope, positions

Kind = Literal["causal_lm", "masked_lm", "image_classifier"]


@dataclass(frozen=True)
class Transformer:
    """A pretrained model, and functions that hide the differences between kinds of models.

    Attributes:
        module: the unmodified model, in eval mode.
        logits: runs one forward pass; returns `[batch, pos, d_vocab]` or `[batch, classes]`.
        body: runs the same pass without the language-model head, for collecting activations.
        encode: turns examples into batches.
        other_input: makes an input that is not from the data; see `OtherInput`.
        n_heads: query heads per layer; None if layers differ.
        special_ids: token ids that carry no text (BOS, CLS, PAD, ...); empty for images.
        in_scope: gives the positions of a batch at which values are written; see `data.scope`.
        head: output embedding of a language model, if it can be applied to some positions alone; set by `with_head`.
            None otherwise.
        class_names: class names of an image classifier in the order of its logits; empty if unknown.
        left_out: one line for each thing in the model's files that the model does not use.
        texts: departures from running all texts together as they are, such as "apart" (texts of different lengths are
            run separately). Empty for most models.
    """

    label: str
    revision: str
    kind: Kind
    module: torch.nn.Module
    logits: Callable[[Batch], torch.Tensor]
    body: Callable[[Batch], object]
    encode: Encoder
    other_input: OtherInput
    n_heads: int | None
    special_ids: frozenset[int]
    in_scope: InScope = positions
    head: torch.nn.Module | None = None
    class_names: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()

    @property
    def modality(self) -> Modality:
        return "image" if self.kind == "image_classifier" else "text"

    @property
    def device(self) -> torch.device:
        """Device of the inputs."""
        return input_device(self.module)

    @property
    def on_cpu(self) -> bool:
        """True if all parameters are on the CPU."""
        return {parameter.device.type for parameter in self.module.parameters()} == {"cpu"}

    @property
    def max_positions_per_pass(self) -> int:
        """Limit on the positions of text, or images, in one pass; larger batches are halved until they fit.

        On a CPU, a batch of 4,096 positions takes up to a fifth longer in one pass (benchmarks/tried.py).
        """
        return 1024 if self.on_cpu else sys.maxsize

    def logits_at(self, batch: Batch, rows: Int[torch.Tensor, " rows"]) -> Float[torch.Tensor, "rows classes"]:
        """Logits at some positions, or of some images.

        If the head is known, it is applied to these positions alone. For a masked language model they are one in six,
        and the head may be most of the work.

        Args:
            rows: indices in the flattened batch.
        """
        return self.pass_at(batch, rows)[0]

    def pass_at(
        self, batch: Batch, rows: Int[torch.Tensor, " rows"]
    ) -> tuple[Float[torch.Tensor, "rows classes"], Float[torch.Tensor, "rows d_model"] | None]:
        """Logits at some positions, and the head's input there, or None if the head was applied to all positions."""
        shown: torch.Tensor | None = None

        def narrow(_: torch.nn.Module, args: tuple) -> tuple | None:
            nonlocal shown
            if not args or args[0].shape[:-1] != batch.labels.shape:
                return None
            shown = x = args[0].flatten(0, -2)[rows.to(args[0].device)]
            return x[None], *args[1:]

        handle = self.head and self.head.register_forward_pre_hook(narrow)
        try:
            logits = self.logits(batch).flatten(0, -2)
        finally:
            if handle:
                handle.remove()
        if shown is None:
            return logits[rows], None
        assert len(logits) == len(rows)
        return logits, shown


def with_head(model: Transformer, head: torch.nn.Module | None) -> Transformer:
    """The model, with `head` set if that can be applied to some positions alone.

    This is tested with a probe, since a model may process its logits in any way. Without a head, all logits are
    computed, which is always right.
    """
    # Unequal lengths in mixed order: a model may sort its examples, or treat padding in its own way.
    lengths = (5, 9, 7)
    probe = pad_and_stack(*(model.other_input("probe", n, seed) for seed, n in enumerate(lengths))).to(model.device)
    rows = torch.tensor([2, 0, 13, 9, 22, 18]).to(model.device)  # none of them is padding
    headed, headless = (dataclasses.replace(model, head=one) for one in (head, None))
    with torch.inference_mode():
        expected = headless.logits_at(probe, rows)
        try:
            found, shown = headed.pass_at(probe, rows)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a model that misses positions may raise anything
            return headless
    return headed if shown is not None and _same_predictions(found, expected) else headless


def _same_predictions(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """True if predictions agree up to rounding, relative to how much they differ between positions."""
    a, b = (logits.cpu().double().log_softmax(-1) for logits in (found, expected))
    finite = b.isfinite()  # some models give -inf for some classes
    if not torch.equal(a.isfinite(), finite):
        return False
    a, b = a.where(finite, 0), b.where(finite, 0)
    return bool((a - b).norm() < 0.05 * (b - b.mean(0)).norm())


def input_device(module: torch.nn.Module) -> torch.device:
    """Device of the inputs. Weights of a model that is split across devices may be on `meta`, waiting elsewhere."""
    devices = (parameter.device for parameter in module.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def query_heads(module: torch.nn.Module) -> int | None:
    """Query heads per layer of a language model; None if layers differ, or there is no attention."""
    config = module.config.get_text_config()  # type: ignore[union-attr,operator]
    heads = getattr(config, "num_attention_heads", None)
    return heads if isinstance(heads, int) and heads > 0 else None
