"""Decoder language models from transformers, scored on next-token prediction."""

from __future__ import annotations

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as validated

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.lazy import torch
from ablation_sweeps.data.batch import Batch
from ablation_sweeps.data.text import TextEncoder
from ablation_sweeps.models.pretrained import PretrainedText, auto_model, context_length, load_tokenizer
from ablation_sweeps.models.probing import fit_vocabulary, isolate
from ablation_sweeps.models.transformer import Transformer, input_device, query_heads, with_head


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class CausalLM(PretrainedText):
    """Any model of `AutoModelForCausalLM`, or the language model of one of `AutoModelForImageTextToText`."""

    def encoder(self) -> TextEncoder:
        """Encoder of the texts. It only needs the tokenizer, not the weights."""
        longest = min(self.max_tokens, context_length(self))
        return TextEncoder(load_tokenizer(self), longest, None, self.tokens, self.pack)

    def load(self) -> Transformer:
        """Load the model, check that it is causal, and make scores independent of the other texts in a batch."""
        tokenizer, encoder = load_tokenizer(self), self.encoder()
        # An image-text model that is given only text runs only its language model.
        auto = auto_model(self, "causal_lm", "AutoModelForCausalLM", "AutoModelForImageTextToText")
        module, left_out = self.from_pretrained(auto)
        encoder = fit_vocabulary(encoder, module, self.option)

        def other_input(source: str, length: int, seed: int) -> Batch:
            if source == "generated":
                return encoder.other_input(_sample(module, tokenizer, encoder.ordinary_ids(), length, seed))
            if source not in ("random_characters", "random_tokens", "probe"):
                raise UserError(f"method.source={source}: a causal language model has no such input")
            return encoder.other_input(encoder.random_ids(source, length, seed))

        # Some models keep their body under a name that `base_model` does not look for (Gemma 3 in transformers 4).
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
            in_scope=encoder.in_scope,
            left_out=left_out,
        )
        if not _is_causal(model, encoder):
            raise UserError(
                f"{self.option}: its logits depend on later tokens, so that it would be scored on what it has seen; an "
                "encoder is model=masked_lm"
            )
        return isolate(with_head(model, module.get_output_embeddings()), encoder, self.option)  # type: ignore[operator]


def _is_causal(model: Transformer, encoder: TextEncoder) -> bool:
    """True if the logits at earlier positions do not change with the last token."""
    ids = torch.tensor(encoder.random_ids("probe", 16, 0))
    rows = torch.cat([ids[:8].repeat(8, 1), ids[8:, None]], 1)
    batch = Batch({"input_ids": rows, "attention_mask": torch.ones_like(rows)}, rows, None, ("probe",) * 8, (0,) * 8)
    with torch.inference_mode():
        logits = model.logits(batch.to(model.device))[:, :8].float()
    return not (logits - logits[0]).abs().max() > 0.1 * logits.std()  # rounding is far smaller; NaN is reported later


def _sample(module: torch.nn.Module, tokenizer, ordinary_ids, length: int, seed: int) -> list[int]:
    """Token ids sampled from the model at temperature 1, without special tokens, so the text does not end early."""
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
