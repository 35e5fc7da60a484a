"""The command as a user types it, but in this process (importing torch takes seconds), and the least that it runs on."""

from __future__ import annotations

import json
import logging
import os
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch.py"
SMALL = ("fraction=half", "statistics.tokens=400", "eval.tokens=400", "eval.images=8", "batch_tokens=128")

Launch = Callable[..., "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """What a command left on the terminal."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """Its one line of error; a test fails where there is none, more than one, or anything of Hydra's or Python's."""
        assert self.code not in (0, None), f"exit code {self.code}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.err, self.err
        for noise in ("Error executing job", "HYDRA_FULL_ERROR", "hydra.cc", "full_key:", "object_type="):
            assert noise not in self.out + self.err, self.err
        (line,) = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert self.err.rstrip().endswith(line), f"more comes after the error:\n{self.err}"
        assert len(line) < 700, line
        return line


def launcher(patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path) -> Launch:
    """`launch("-m", "seed=0,1")` runs launch.py's main in `folder`, as `python launch.py -m seed=0,1` would."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.singleton import Singleton

    import ablation_sweeps.config  # its resolvers stay when the state of Hydra is put back

    def launch(*arguments: str) -> Outcome:
        state, handlers = Singleton.get_state(), list(logging.getLogger().handlers)
        full_error = os.environ.get("HYDRA_FULL_ERROR")  # launch.py sets it for Hydra
        GlobalHydra.instance().clear()
        capsys.readouterr()
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(sys, "argv", [str(LAUNCH), *arguments])
            inner.setattr(sys, "path", list(sys.path))
            try:
                runpy.run_path(str(LAUNCH), run_name="__main__")
                code: object = 0
            except SystemExit as left:
                code = left.code
            finally:
                Singleton.set_state(state)
                logging.getLogger().handlers[:] = handlers
                os.environ.pop("HYDRA_FULL_ERROR", None)
                if full_error is not None:
                    os.environ["HYDRA_FULL_ERROR"] = full_error
        out, err = capsys.readouterr()
        if isinstance(code, str):  # what Python itself prints of sys.exit("text")
            code, err = 1, f"{err}{code}\n"
        return Outcome(int(code or 0), out, err)  # type: ignore[call-overload]

    patch.chdir(folder)
    patch.setenv("WANDB_MODE", "disabled")
    patch.delenv("HYDRA_FULL_ERROR", raising=False)
    return launch


def save_tokenizer(folder: Path) -> int:
    """Byte-level BPE with 60 merges; returns its vocabulary's size."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts(20), trainer)
    PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="<s>").save_pretrained(folder)
    return raw.get_vocab_size()


def save_causal(folder: Path, *, seed: int = 0) -> Path:
    """A Llama with grouped-query attention, two layers and random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=save_tokenizer(folder), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_broken(folder: Path) -> Path:
    """The same with a NaN in its weights."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(save_causal(folder) / "model.safetensors")
    weights["model.layers.1.self_attn.v_proj.weight"][:] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def save_vit(folder: Path) -> Path:
    """A timm ViT for 8 x 8 grey pixels and ten classes, with random weights."""
    import timm
    import torch
    from timm.models import save_for_hf

    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 2}
    pretrained = {"input_size": [1, 8, 8], "mean": [0.5], "std": [0.5], "crop_pct": 1.0, "num_classes": 10}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, pretrained_cfg_overlay=pretrained, **sizes)
    save_for_hf(model, str(folder), model_config={"model_args": sizes}, safe_serialization=True)
    return folder


def texts(n: int) -> list[str]:
    words = "the cat sat on a mat and saw the dog run far away over green hills".split()
    return [" ".join(words[(i * 7 + j * (i + 3)) % len(words)] for j in range(30)) + f" {i}." for i in range(n)]


def write_texts(folder: Path, n: int = 12) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts(n)):
        (folder / f"{i}.txt").write_text(text)
    return folder


def write_images(folder: Path, classes: tuple[str, ...] = ("cat", "dog"), n: int = 6) -> Path:
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (len(classes), n, 8, 8), dtype=np.uint8)
    for name, images in zip(classes, pixels, strict=True):
        (folder / name).mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(folder / name / f"{i}.png")
    return folder


def rows_of(folder: Path) -> dict[str, object]:
    """State and reason of the runs in a sweep's folder, by the name of the run."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/status.json"))}
