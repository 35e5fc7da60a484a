"""Decoder language models of transformers, scored on the next token."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as validated

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.lazy import torch
from ablation_sweeps.data.batch import Batch, Modality
from ablation_sweeps.data.text import Pack, TextEncoder
from ablation_sweeps.models.pretrained import Pretrained, auto_model, context_length, load_tokenizer
from ablation_sweeps.models.probing import fit_vocabulary, isolate
from ablation_sweeps.models.transformer import Transformer, input_device, query_heads, with_head


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class CausalLM(Pretrained):
    """Any model of `AutoModelForCausalLM`, or the language model of one of `AutoModelForImageTextToText`.

    Attributes:
        max_tokens: documents are cut to it, and to the model's context.
        pack: documents, or concatenate: one after the other, cut into pieces of `max_tokens`.
    """

    modality: ClassVar[Modality] = "text"

    max_tokens: Annotated[int, Field(ge=2)]
    pack: Pack

    def encoder(self) -> TextEncoder:
        """Needs the tokenizer alone."""
        longest = min(self.max_tokens, context_length(self))
        return TextEncoder(load_tokenizer(self), longest, None, self.tokens, self.pack)

    def load(self) -> Transformer:
        tokenizer, encoder = load_tokenizer(self), self.encoder()
        # The second kind shows its language model nothing but text, if it is given nothing else.
        auto = auto_model(self, "causal_lm", "AutoModelForCausalLM", "AutoModelForImageTextToText")
        module, left_out = self.from_pretrained(auto)
        encoder = fit_vocabulary(encoder, module, self.option)

        def other_input(source: str, length: int, seed: int) -> Batch:
            if source == "generated":
                return encoder.other_input(_sample(module, tokenizer, encoder.ordinary_ids(), length, seed))
            if source not in ("random_characters", "random_tokens", "probe"):
                raise UserError(f"method.source={source}: a causal language model has no such input")
            return encoder.other_input(encoder.random_ids(source, length, seed))

        # Some keep the body under another name than the one that `base_model` looks for (Gemma 3 in transformers 4).
        body = module.base_model if module.base_model is not module else module.get_decoder()  # type: ignore[operator]
        model = Transformer(
            label=self.label,
            revision=self.commit or "",
            kind="causal_lm",
            module=module,
            logits=lambda batch: module(**batch.inputs, use_cache=False).logits,
            body=lambda batch: body(**batch.inputs, use_cache=False),  # type: ignore[operator]
            encode=encoder,
            other_input=other_input,
            n_heads=query_heads(module),
            special_ids=frozenset(tokenizer.all_special_ids),
            left_out=left_out,
        )
        if not _is_causal(model, encoder):
            raise UserError(
                f"{self.option}: its logits depend on later tokens, so that it would be scored on what it has seen; an "
                "encoder is model=masked_lm"
            )
        return isolate(with_head(model, module.get_output_embeddings()), encoder, self.option)  # type: ignore[operator]


def _is_causal(model: Transformer, encoder: TextEncoder) -> bool:
    """Whether logits stay where they are when the last token changes."""
    ids = torch.tensor(encoder.random_ids("probe", 16, 0))
    rows = torch.cat([ids[:8].repeat(8, 1), ids[8:, None]], 1)
    batch = Batch({"input_ids": rows, "attention_mask": torch.ones_like(rows)}, rows, None, ("probe",) * 8, (0,) * 8)
    with torch.inference_mode():
        logits = model.logits(batch.to(model.device))[:, :8].float()
    return not (logits - logits[0]).abs().max() > 0.1 * logits.std()  # rounding is far below; NaN is another error


def _sample(module: torch.nn.Module, tokenizer, ordinary_ids, length: int, seed: int) -> list[int]:
    """The model's own sample, token by token at temperature 1; never a token that ends the text."""
    device = input_device(module)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.from_numpy(ordinary_ids)
    ids = [start if start is not None else int(ordinary_ids[0])]
    past, last = None, torch.tensor([ids], device=device)
    with torch.inference_mode():
        while len(ids) < length:
            out = module(input_ids=last, past_key_values=past, use_cache=True)
            past = out.past_key_values
            probabilities = out.logits[0, -1].float().cpu()[allowed].softmax(-1)
            ids.append(int(allowed[torch.multinomial(probabilities, 1, generator=generator)]))
            last = torch.tensor([ids[-1:]], device=device)
    return ids
