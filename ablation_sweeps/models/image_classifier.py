"""Image classifiers from transformers."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as validated

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.lazy import torch
from ablation_sweeps.data.batch import Batch, Modality
from ablation_sweeps.data.encoder import Encoder
from ablation_sweeps.data.images import ImageEncoder
from ablation_sweeps.models.pretrained import Pretrained
from ablation_sweeps.models.transformer import Transformer, input_device


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class ImageClassifier(Pretrained):
    """Any model of `AutoModelForImageClassification`, with its own image processor."""

    modality: ClassVar[Modality] = "image"

    def encoder(self) -> Encoder:
        """Encoder of the images. It needs the model, which sets the number of positions per image, on any device."""
        return dataclasses.replace(self, device="cpu", device_map=None, quantize=None).load().encode

    def load(self) -> Transformer:
        """Load the model with its image processor."""
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        processor = self.guarded(lambda: AutoImageProcessor.from_pretrained(self.source, **self.hub_options))
        module, unused = self.from_pretrained(AutoModelForImageClassification)
        config = module.config
        dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())

        def transform(image) -> torch.Tensor:
            return processor(image, return_tensors="pt")["pixel_values"][0].to(dtype)

        # Models with an image and a text tower (CLIP) keep the image tower, and its sizes, under these names.
        tower = module.base_model if module.base_model is not module else module.vision_model
        sizes = getattr(config, "vision_config", config)
        heads = getattr(sizes, "num_attention_heads", None)
        mode = "L" if getattr(sizes, "num_channels", 3) == 1 else "RGB"

        def body(batch: Batch) -> Any:
            return tower(**batch.inputs)  # type: ignore[operator]

        encoder = ImageEncoder(transform, "pixel_values", mode, config.num_labels, tokens=1)  # type: ignore[union-attr,arg-type]
        probe = encoder.other_input("probe", 1, 0).to(input_device(module))
        with torch.inference_mode():
            tokens = body(probe).last_hidden_state.shape[1:-1].numel()
        patches = _patches(probe, sizes)
        if patches is None and self.tokens == "no_special":
            raise UserError(
                "model.tokens=no_special: this model does not say how large its patches are; use model.tokens=all"
            )
        encoder = dataclasses.replace(
            encoder,
            tokens=tokens,
            n_special=None if patches is None else max(0, tokens - patches),
            counts_special=self.tokens == "all",
        )
        return Transformer(
            label=self.label,
            revision=self.commit or "",
            kind="image_classifier",
            module=module,
            logits=lambda batch: module(**batch.inputs).logits,
            body=body,
            encode=encoder,
            other_input=encoder.other_input,
            n_heads=heads if isinstance(heads, int) else None,  # Swin has a list, one number per stage
            special_ids=frozenset(),
            in_scope=encoder.in_scope,
            class_names=tuple(config.id2label.get(i, "") for i in range(config.num_labels)),  # type: ignore[union-attr,index,arg-type]
            left_out=unused,
        )


def _patches(probe: Batch, sizes: Any) -> int | None:
    """Number of positions that are patches, not CLS or register tokens; None if the model does not say."""
    if not isinstance(getattr(sizes, "patch_size", None), int):
        return None
    height, width = probe.inputs["pixel_values"].shape[-2:]
    return (height // sizes.patch_size) * (width // sizes.patch_size)
