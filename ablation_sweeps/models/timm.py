"""Vision transformers from timm."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as validated

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.lazy import torch
from ablation_sweeps.data.batch import Batch, Modality
from ablation_sweeps.data.encoder import Encoder
from ablation_sweeps.data.images import ImageEncoder
from ablation_sweeps.models.pretrained import Pretrained
from ablation_sweeps.models.pretrained import device as device_of
from ablation_sweeps.models.transformer import Transformer, input_device


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Timm(Pretrained):
    """Any classifier of `timm.create_model`, with its own image transform.

    With `path`, the weights are those in `model.safetensors` in that folder. The folder's `config.json` gives the image
    transform, and the architecture unless `name` does.
    """

    modality: ClassVar[Modality] = "image"

    def check(self, modality: Modality) -> None:
        super().check(modality)
        for option in ("attn_implementation", "gguf_file", "device_map", "quantize", "adapter"):
            if getattr(self, option) is not None:
                raise UserError(
                    f"model.{option}={getattr(self, option)}: timm's models have no such option; leave it null"
                )
        if self.dtype == "auto":
            raise UserError("model.dtype=auto: timm's models do not say theirs; give float32, bfloat16 or float16")
        if self.path and not (Path(self.path) / "model.safetensors").is_file():
            raise UserError(f"model.path={self.path}: there is no model.safetensors in this folder")
        if self.path and not self.name and not (Path(self.path) / "config.json").is_file():
            raise UserError(f"model.path={self.path}: there is no config.json in it, so give model.name as well")

    @property
    def repository(self) -> str:
        """Name of the repository on the hub, which timm looks up if `name` is one of its own model names."""
        import timm

        name = str(self.name).removeprefix("hf-hub:")
        if "/" in name:
            return name
        pretrained = self.guarded(lambda: timm.get_pretrained_cfg(name))
        if not (pretrained and pretrained.hf_hub_id):
            raise UserError(
                f"model.name={self.name}: timm has no weights for it; timm.list_pretrained() lists the models with "
                f"weights"
            )
        return pretrained.hf_hub_id

    def encoder(self) -> Encoder:
        """Encoder of the images. It needs the model, which sets the number of positions per image, on any device."""
        return dataclasses.replace(self, device="cpu").load().encode

    def load(self) -> Transformer:
        """Load the model with its image transform."""
        from timm.data.config import resolve_data_config
        from timm.data.transforms_factory import create_transform

        module = self.guarded(self._create).to(device=device_of(self.device), dtype=getattr(torch, self.dtype)).eval()
        config = resolve_data_config({}, model=module)
        to_pixels = create_transform(**config, is_training=False)
        dtype = getattr(torch, self.dtype)
        mode = "L" if config["input_size"][0] == 1 else "RGB"

        def body(batch: Batch) -> Any:
            return module.forward_features(batch.inputs["x"])

        def transform(image) -> torch.Tensor:
            return to_pixels(image).to(dtype)  # type: ignore[union-attr]

        encoder = ImageEncoder(transform, "x", mode, module.num_classes, tokens=1)
        probe = encoder.other_input("probe", 1, 0).to(input_device(module))
        with torch.inference_mode():
            features = body(probe)
        if not isinstance(features, torch.Tensor):
            raise UserError(
                f"{self.option}: gives several feature maps, so that it is not known how many positions an image has; "
                "use another model"
            )
        tokens = features.shape[1:-1].numel()
        heads = {m.num_heads for m in module.modules() if hasattr(m, "num_heads")}
        n_special = getattr(module, "num_prefix_tokens", 0)
        encoder = dataclasses.replace(encoder, tokens=tokens, n_special=n_special, counts_special=self.tokens == "all")
        return Transformer(
            label=self.label,
            revision=self.commit or "",
            kind="image_classifier",
            module=module,
            logits=lambda batch: module(batch.inputs["x"]),
            body=body,
            encode=encoder,
            other_input=encoder.other_input,
            n_heads=heads.pop() if len(heads) == 1 else None,
            special_ids=frozenset(),
            in_scope=encoder.in_scope,
        )

    def _create(self) -> Any:
        import timm
        from safetensors.torch import load_file

        if self.path and self.name:
            config = Path(self.path) / "config.json"
            own = json.loads(config.read_text(encoding="utf-8")).get("pretrained_cfg") if config.is_file() else None
            module = timm.create_model(self.name, pretrained_cfg_overlay=own)
            module.load_state_dict(load_file(Path(self.path) / "model.safetensors"))
            return module
        if self.path:
            module = timm.create_model(f"local-dir:{self.path}", pretrained=True)
            self._check_head(module, load_file(Path(self.path) / "model.safetensors"))
            return module
        return timm.create_model(f"hf-hub:{self.repository}@{self.commit}", pretrained=True)

    def _check_head(self, module: Any, weights: dict[str, torch.Tensor]) -> None:
        """Refuse a random classifier, which timm creates if the weights are for another number of classes."""
        names = module.pretrained_cfg.get("classifier") or ()
        own = module.state_dict()
        for name in (names,) if isinstance(names, str) else names:
            for key in (f"{name}.weight", f"{name}.bias"):
                given = weights.get(key)
                same = given is not None and key in own and given.shape == own[key].shape
                if key in own and not (same and torch.equal(given.to(own[key].dtype), own[key])):  # type: ignore[union-attr]
                    raise UserError(
                        f"{self.option}: its classifier {key} would be random, since its weights are for another "
                        "number of classes; correct num_classes in its config.json"
                    )
