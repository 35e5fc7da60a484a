"""A loaded model, as the experiment sees every kind of it."""

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

Kind = Literal["causal_lm", "masked_lm", "image_classifier"]


@dataclass(frozen=True)
class Transformer:
    """A pretrained model and the few things that differ between its kinds.

    Attributes:
        module: the unmodified model, in eval mode.
        logits: one forward pass; `[batch, pos, d_vocab]` or `[batch, classes]`.
        body: the same pass without the language-model head, for collecting activations.
        encode: examples to batches.
        other_input: see `OtherInput`.
        n_heads: query heads of a layer; None where the layers differ.
        special_ids: token ids that carry no text (BOS, CLS, PAD, ...); empty for images.
        head: the output embedding of a language model, if it gives the logits of the positions that it is shown: set
            by `with_head`. None where there is none, or it does not.
        class_names: of an image classifier, in the order of its logits, where it knows them.
        left_out: one line for each thing that the model's files hold but the model does not.
        texts: how texts are passed ("apart", say); empty if together, as for most models.
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
    head: torch.nn.Module | None = None
    class_names: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()

    @property
    def modality(self) -> Modality:
        return "image" if self.kind == "image_classifier" else "text"

    @property
    def device(self) -> torch.device:
        return input_device(self.module)

    @property
    def on_cpu(self) -> bool:
        """All of it."""
        return {parameter.device.type for parameter in self.module.parameters()} == {"cpu"}

    @property
    def max_positions_per_pass(self) -> int:
        """Positions of text, or images, that it is passed at once: of a larger batch, a half, or a half of that. A CPU
        takes up to a fifth longer for a batch of 4,096 positions at once (benchmarks/tried.py); of images, nothing."""
        return 1024 if self.on_cpu else sys.maxsize

    def logits_at(self, batch: Batch, rows: Int[torch.Tensor, " rows"]) -> Float[torch.Tensor, "rows classes"]:
        """Logits of some positions, or images. The head is not given the other positions, where there is one that is
        known: of a masked language model these are five of six, and the head may be most of the work.

        Args:
            rows: places in the batch, example after example.
        """
        return self.pass_at(batch, rows)[0]

    def pass_at(
        self, batch: Batch, rows: Int[torch.Tensor, " rows"]
    ) -> tuple[Float[torch.Tensor, "rows classes"], Float[torch.Tensor, "rows d_model"] | None]:
        """The same, and what the head was shown; None where it was shown all positions, or there is none."""
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
    """The model, and its head if the logits of some positions can be asked of it: seen with a probe, since a model may
    do with them what it likes. Without it, all logits are computed, which is always right."""
    # Of unequal lengths, in no order: a model may sort its examples, or treat padding in a way of its own.
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
        except Exception:  # whatever a model says when it misses the positions that it expects
            return headless
    return headed if shown is not None and _same_predictions(found, expected) else headless


def _same_predictions(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """But for rounding. What differs between positions is what counts: the same classes are likely at all of them."""
    a, b = (logits.cpu().double().log_softmax(-1) for logits in (found, expected))
    finite = b.isfinite()  # some models rule classes out
    if not torch.equal(a.isfinite(), finite):
        return False
    a, b = a.where(finite, 0), b.where(finite, 0)
    return bool((a - b).norm() < 0.05 * (b - b.mean(0)).norm())


def input_device(module: torch.nn.Module) -> torch.device:
    """Where inputs go. The weights of a model that is spread over devices may wait elsewhere, as `meta`."""
    devices = (parameter.device for parameter in module.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def query_heads(module: torch.nn.Module) -> int | None:
    """Query heads of each layer of a language model; None where layers differ, or there is no attention."""
    config = module.config.get_text_config()  # type: ignore[union-attr,operator]
    heads = getattr(config, "num_attention_heads", None)
    return heads if isinstance(heads, int) and heads > 0 else None
