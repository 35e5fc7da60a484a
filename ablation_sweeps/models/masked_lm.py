"""Encoder language models from transformers, scored on masked tokens."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass as validated

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.data.batch import Batch
from ablation_sweeps.data.text import Masking, TextEncoder
from ablation_sweeps.models.pretrained import PretrainedText, auto_model, context_length, load_tokenizer
from ablation_sweeps.models.probing import fit_vocabulary, isolate
from ablation_sweeps.models.transformer import Transformer, query_heads, with_head


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class MaskedLM(PretrainedText):
    """Any model of `AutoModelForMaskedLM`.

    Attributes:
        masked: fraction of the tokens, special ones excluded, that is scored.
        replaced_by_mask: fraction of the scored tokens that the model sees as the mask token.
        replaced_at_random: fraction of the scored tokens that it sees as a random token; it sees the others unchanged.
    """

    masked: Annotated[float, Field(gt=0, le=1)]
    replaced_by_mask: Annotated[float, Field(ge=0, le=1)]
    replaced_at_random: Annotated[float, Field(ge=0, le=1)]

    @model_validator(mode="after")
    def _shares_fit(self) -> MaskedLM:
        if self.replaced_by_mask + self.replaced_at_random > 1:
            raise ValueError("replaced_by_mask and replaced_at_random must not be more than 1 together")
        return self

    def encoder(self) -> TextEncoder:
        """Encoder of the texts. It only needs the tokenizer, not the weights."""
        masking = Masking(self.masked, self.replaced_by_mask, self.replaced_at_random)
        longest = min(self.max_tokens, context_length(self))
        return TextEncoder(load_tokenizer(self), longest, masking, self.tokens, self.pack)

    def load(self) -> Transformer:
        """Load the model, and make scores independent of the other texts in a batch."""
        tokenizer, encoder = load_tokenizer(self), self.encoder()
        module, left_out = self.from_pretrained(auto_model(self, "masked_lm", "AutoModelForMaskedLM"))
        encoder = fit_vocabulary(encoder, module, self.option)

        def other_input(source: str, length: int, seed: int) -> Batch:
            if source not in ("random_characters", "random_tokens", "probe"):
                raise UserError(
                    f"method.source={source}: a masked language model takes dataset, random_characters or random_tokens"
                )
            return encoder.other_input(encoder.random_ids(source, length, seed))

        model = Transformer(
            label=self.label,
            revision=self.commit or "",
            kind="masked_lm",
            module=module,
            logits=lambda batch: module(**batch.inputs).logits,
            body=lambda batch: module.base_model(**batch.inputs),  # type: ignore[operator]
            encode=encoder,
            other_input=other_input,
            n_heads=query_heads(module),
            special_ids=frozenset(tokenizer.all_special_ids),
            in_scope=encoder.in_scope,
            left_out=left_out,
        )
        return isolate(with_head(model, module.get_output_embeddings()), encoder, self.option)  # type: ignore[operator]
