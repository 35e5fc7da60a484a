"""Adapters such as LoRA, merged into the weights of a model only if the user names one."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.hashing import fingerprint_of_file, signature
from ablation_sweeps.base.hub import commit, fetch_model, require_cached
from ablation_sweeps.base.lazy import torch

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ASK_FOR_PEFT = ("modeling_utils", "models.auto.auto_factory", "integrations.peft")  # in transformers


@dataclass(frozen=True)
class Adapter:
    """An adapter in the format of peft.

    Attributes:
        source: a folder, or a name on the hub.
    """

    source: str

    @property
    def option(self) -> str:
        """The option that names the adapter, as the user typed it."""
        return f"model.adapter={self.source}"

    @property
    def path(self) -> Path | None:
        """Folder of the adapter; None if it is on the hub."""
        path = Path(self.source).expanduser()
        return path if path.is_dir() else None

    @property
    def commit(self) -> str:
        """Commit on the hub."""
        return commit(self.source, None, "model")

    def check(self) -> None:
        """Check what can be known before anything is loaded.

        Raises:
            UserError: peft is not installed, or the adapter is not there.
        """
        if importlib.util.find_spec("peft") is None:
            raise UserError(f"{self.option}: needs peft; install it: pip install peft")
        if self.path is None:
            if self.source.startswith((".", "/", "~")) or self.source.count("/") != 1:
                raise UserError(f"{self.option}: there is no such folder; give the one that holds {CONFIG}")
            require_cached(self.option, self.source, self.commit)
            return
        for name in (CONFIG, WEIGHTS):
            if not (self.path / name).is_file():
                raise UserError(f"{self.option}: there is no {name} in this folder; give one that peft has saved")

    def identity(self) -> str:
        """Hash of the adapter's files, or its commit on the hub."""
        if self.path is None:
            return self.commit
        return signature([fingerprint_of_file(self.path / name) for name in (CONFIG, WEIGHTS)])

    def prefetch(self) -> None:
        """Download the adapter, if it is on the hub."""
        if self.path is None:
            fetch_model(self.source, self.commit, [CONFIG, WEIGHTS], self.option)

    def merge_into(self, module: torch.nn.Module) -> torch.nn.Module:
        """Merge the adapter into the model's weights; the layers keep their paths.

        Raises:
            UserError: the adapter does not fit the model, or is not a change of weights.
        """
        from peft import PeftModel, get_peft_model_state_dict
        from safetensors import safe_open

        folder = self.path or self._fetched()
        device = str(next(module.parameters()).device)
        adapted = PeftModel.from_pretrained(module, str(folder), torch_device=device)
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            given = set(file.keys())
        own = set(get_peft_model_state_dict(adapted))
        for keys, what in (
            (own - given, "has no weights for"),
            (given - own, "holds weights that the model does not have:"),
        ):
            if keys:
                raise UserError(
                    f"{self.option}: {what} {sorted(keys)[0]}; give an adapter that was trained on this model, not on "
                    f"{json.loads((folder / CONFIG).read_text()).get('base_model_name_or_path') or 'another one'}"
                )
        if not hasattr(adapted.base_model, "merge_and_unload"):
            kind = adapted.peft_config["default"].peft_type
            raise UserError(
                f"{self.option}: {getattr(kind, 'value', kind)} cannot be merged into the weights; use an adapter "
                f"that can, such as LoRA"
            )
        return adapted.merge_and_unload(safe_merge=True)  # type: ignore[operator]

    def _fetched(self) -> Path:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(self.source, revision=self.commit, allow_patterns=[CONFIG, WEIGHTS]))


@contextmanager
def no_adapters() -> Iterator[None]:
    """Context manager: keep transformers from applying an adapter beside the weights, as it does if it finds peft."""
    with ExitStack() as stack:
        for name in ASK_FOR_PEFT:
            if importlib.util.find_spec(f"transformers.{name}"):
                module = importlib.import_module(f"transformers.{name}")
                if hasattr(module, "is_peft_available"):
                    stack.enter_context(mock.patch.object(module, "is_peft_available", lambda *_, **__: False))
        yield
