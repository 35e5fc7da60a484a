"""Loads pretrained models from the hub or a local folder with transformers, and explains errors in one line."""

from __future__ import annotations

import functools
import importlib.util
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import asdict, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator
from pydantic.dataclasses import dataclass as validated

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.files import read_json
from ablation_sweeps.base.hashing import fingerprint_of_file, names_in, signature
from ablation_sweeps.base.hub import commit, fetch_file, fetch_model, loading_error, require_cached
from ablation_sweeps.base.lazy import torch
from ablation_sweeps.data.batch import Modality
from ablation_sweeps.data.text import Pack
from ablation_sweeps.models.adapters import CONFIG, WEIGHTS, Adapter, no_adapters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


DType = Literal["auto", "float32", "bfloat16", "float16"]

FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # of a model on the hub: weights, tokenizer, options

STRETCHING = ("longrope", "su", "dynamic")  # RoPE scaling that depends on the longest text in a batch


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Pretrained:
    """Where a pretrained model comes from and how it is loaded.

    Attributes:
        label: name in folders, tables and figures.
        name: name on the hub; nothing is read from the hub if `path` is given.
        path: a local folder that holds the model.
        revision: branch, tag or commit on the hub.
        gguf_file: file inside the folder or repository, for models in llama.cpp's format.
        dtype: `auto` is the dtype of the checkpoint.
        device: `auto` is the first GPU if there is one, else the CPU.
        device_map: `auto` and the like split a model across devices, as in transformers and accelerate.
        quantize: load the weights in 8 or 4 bits with bitsandbytes.
        attn_implementation: attention kernel, named as in transformers; None is the model's default.
        use_safetensors: True accepts no other format; None also accepts torch's, read with `weights_only`.
        tokens: positions that enter the statistics: "all", or "no_special": all but BOS, CLS, SEP, registers and such.
        site_paths: module paths or patterns of the projections, for a model in which they are not found by structure.
        adapter: a folder, or a name on the hub, with a peft adapter to merge into the weights.
    """

    label: str
    name: str | None
    path: str | None
    revision: str | None
    gguf_file: str | None
    dtype: DType
    device: str
    device_map: str | None
    quantize: Literal["8bit", "4bit"] | None
    attn_implementation: str | None
    use_safetensors: Literal[True] | None
    trust_remote_code: bool
    site_paths: tuple[str, ...] | None
    tokens: Literal["all", "no_special"]
    adapter: str | None = field(default=None, kw_only=True)

    @model_validator(mode="after")
    def _has_a_source(self) -> Pretrained:
        if not (self.name or self.path):
            raise ValueError("give model.name (a name on the hub) or model.path (a local folder)")
        return self

    @property
    def source(self) -> str:
        """Folder or hub name of the model, as transformers takes it."""
        return self.path or self.name or ""

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: str | None) -> str | None:
        return path and str(Path(path).expanduser().absolute())

    @field_validator("adapter")
    @classmethod
    def _absolute_folder(cls, adapter: str | None) -> str | None:
        path = Path(adapter or "").expanduser()
        return str(path.absolute()) if adapter and path.is_dir() else adapter

    @property
    def option(self) -> str:
        """The option that names the model's source, as the user typed it."""
        return f"model.path={self.path}" if self.path else f"model.name={self.name}"

    def check(self, modality: Modality) -> None:
        """Check what can be known before the model is loaded.

        Raises:
            UserError: one line that names the option and the remedy.
        """
        if self.path and not Path(self.path).is_dir():
            raise UserError(
                f"model.path={self.path}: there is no such folder; give the folder that holds the model's files"
            )
        if self.path and not self.name and not self.gguf_file and not (Path(self.path) / "config.json").is_file():
            if (Path(self.path) / CONFIG).is_file():
                raise UserError(
                    f"model.path={self.path}: holds an adapter alone; give the model that it was trained on as "
                    f"model.path or model.name, and model.adapter={self.path}"
                )
            raise UserError(
                f"model.path={self.path}: there is no config.json in this folder; give the folder of a model as "
                "transformers and timm save them"
            )
        if self.path and self.gguf_file and not (Path(self.path) / self.gguf_file).is_file():
            raise UserError(f"model.gguf_file={self.gguf_file}: there is no such file in {self.path}")
        try:
            if self.device != "auto":
                torch.device(self.device)  # its name; a cluster's nodes may have others
        except RuntimeError as error:
            raise UserError(f"model.device={self.device}: there is no such device; give auto, cpu or cuda") from error
        if self.quantize and importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(f"model.quantize={self.quantize}: needs bitsandbytes; install it: pip install bitsandbytes")
        if self.quantize and self.gguf_file:
            raise UserError(f"model.quantize={self.quantize}: a GGUF file is quantized already; leave one of them out")
        if self.adapter and self.quantize:
            raise UserError(
                f"model.adapter={self.adapter}: is merged into whole weights, so it does not go with "
                f"model.quantize={self.quantize}; leave one of them out"
            )
        if self.adapter:
            Adapter(self.adapter).check()
        if not self.path:
            require_cached(self.option, self.repository, str(self.commit))

    def identity(self) -> dict[str, Any]:
        """Everything that can change the numbers. A folder is identified by its content, not by its location."""
        elsewhere = ("label", "path", "device", "device_map", "adapter")  # where it runs does not change numbers
        named = ("revision", "use_safetensors")  # other names of the same commit and files
        options = {key: value for key, value in asdict(self).items() if key not in (*elsewhere, *named)}
        adapter = {"adapter": Adapter(self.adapter).identity()} if self.adapter else {}
        files = fingerprint(self.path) if self.path else self.commit
        return {**options, **adapter, **self._computed_otherwise(), "files": files}

    def _computed_otherwise(self) -> dict[str, str]:
        """Entries in the signature of models that earlier versions handled otherwise: their results are not reused."""
        found = {}
        if self.file(CONFIG) and not self.adapter:  # earlier versions applied it if peft was installed
            found["adapter"] = "left out"
        config = self.file("config.json")
        if config and _follows_the_longest(read_json(config) or {}, self.longest_text):
            found["texts"] = "apart"
        return found

    @property
    def longest_text(self) -> int:
        """Maximum number of tokens of a text; 0 for images."""
        return 0

    def file(self, name: str) -> Path | None:
        """Path of a small file of the model, downloaded if the model is on the hub; None if there is no such file."""
        found = Path(self.path) / name if self.path else fetch_file(self.repository, str(self.commit), name)
        return found if found and found.is_file() else None

    @property
    def repository(self) -> str:
        """Name of the model's repository on the hub."""
        return str(self.name)

    @property
    def commit(self) -> str | None:
        """Commit on the hub, the same for all files of a model and for its signature; None for a local folder."""
        return None if self.path else commit(self.repository, self.revision, "model")

    @property
    def hub_options(self) -> dict[str, Any]:
        """Keyword arguments of every `from_pretrained`: for the model, its configuration, tokenizer and processor."""
        options = {"revision": self.commit, "gguf_file": self.gguf_file, "trust_remote_code": self.trust_remote_code}
        return {key: value for key, value in options.items() if value is not None}

    def prefetch(self) -> None:
        """Download everything that loading the model needs."""
        if self.adapter:
            Adapter(self.adapter).prefetch()
        if self.path:
            return
        files = [*FILES]
        if self.gguf_file:
            files.append(self.gguf_file)
        if not self.use_safetensors:
            files.append("*.bin")
        if self.trust_remote_code:
            files.append("*.py")
        fetch_model(self.repository, str(self.commit), files)

    def from_pretrained(self, auto_model: Any) -> tuple[torch.nn.Module, tuple[str, ...]]:
        """Load the model with its adapter, if one is given, on its device and in eval mode.

        Returns:
            The model, and one line for each thing in its files that is not used.

        Raises:
            UserError: one line that names the option and the remedy.
        """
        dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        where = device(self.device)  # before the weights are read: it may fail
        options: dict[str, Any] = {"dtype": dtype, "device_map": self.device_map}
        options["attn_implementation"] = self.attn_implementation
        if not self.gguf_file:
            options["use_safetensors"] = self.use_safetensors
        if self.quantize:
            options["quantization_config"] = _bits(self.quantize, dtype)
            options["device_map"] = self.device_map or {"": str(where)}
        with no_adapters():
            module, info = self.guarded(
                lambda: auto_model.from_pretrained(
                    self.source,
                    output_loading_info=True,
                    **self.hub_options,
                    **{key: value for key, value in options.items() if value is not None},
                )
            )
        if info["missing_keys"]:
            raise UserError(
                f"{self.option}: has no weights for {sorted(info['missing_keys'])[0]}, which would be random; "
                "choose the kind of model that it was trained as (model=causal_lm, masked_lm or image_classifier)"
            )
        if getattr(module.config, "attention_type", None) == "block_sparse":
            raise UserError(
                f"{self.option}: has block-sparse attention, which becomes full attention for good at the first short "
                'text; say "attention_type": "original_full" in its config.json, and give its folder: model.path=FOLDER'
            )
        if getattr(module.config, "chunk_size_feed_forward", 0):
            raise UserError(
                f"{self.option}: calls its feed-forward layers several times (chunk_size_feed_forward), so that calls "
                "and layers are not told apart; set it to 0 in its config.json, which changes no result"
            )
        log.debug("attention implementation: %s", getattr(module.config, "_attn_implementation", None))
        module = module if options["device_map"] is not None else module.to(where)
        if self.adapter:
            adapter = Adapter(self.adapter)
            module = self.guarded(lambda: adapter.merge_into(module), adapter.option)
        left_out = self._left_out(sorted(info["unexpected_keys"]), type(module).__name__)
        for what in left_out:
            log.warning("%s", what)
        return module.eval(), left_out

    def _left_out(self, unused: list[str], kind: str) -> tuple[str, ...]:
        """One line for each thing in the model's files that is not in the loaded model.

        Args:
            unused: names of weights for which the model has no parameter.
        """
        said, config = [], self.file("config.json")
        # All files that were fetched from the hub for a model are in one folder.
        folder = Path(self.path) if self.path else config.parent if config else None
        if unused:
            names = [*dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in unused)]
            more = ", ..." if len(names) > 5 else ""
            said.append(
                f"{self.option}: {len(unused)} of its weights are left out, since {kind} has no such: "
                f"{', '.join(names[:5])}{more}"
            )
        if self.file(CONFIG) and self.adapter != self.source:
            said.append(
                f"{self.option}: the adapter beside its weights is left out; model.adapter={self.source} applies it"
            )
        others = [] if self.gguf_file or not folder else _other_weights(folder)
        if others:
            said.append(
                f"{self.option}: its weights are read from other files, so these are left out: {', '.join(others)}"
            )
        return tuple(said)

    def guarded(self, load: Callable[[], Any], option: str | None = None) -> Any:
        """Run `load` without its output, and turn its errors into one line that names the model's source.

        Args:
            option: names the source instead, if it is not the model's own.
        """
        with quiet():
            try:
                return load()
            except UserError:
                raise
            except Exception as error:  # transformers, timm and safetensors raise errors of their own
                remedy = "" if self.path else "; or give a folder that holds it: model.path=FOLDER"
                if option:
                    raise UserError(f"{option}: cannot be loaded: {loading_error(error, False)}") from error
                raise UserError(
                    f"{self.option}: cannot be loaded: {loading_error(error, not self.path)}{remedy}"
                ) from error


@functools.cache
def load_tokenizer(model: Pretrained) -> PreTrainedTokenizerBase:
    """The model's tokenizer, which truncates at the end of a text."""
    from transformers import AutoTokenizer

    tokenizer = model.guarded(lambda: AutoTokenizer.from_pretrained(model.source, **model.hub_options))
    tokenizer.truncation_side = "right"  # the beginning of a document is evaluated
    return tokenizer


def _bits(quantize: str, dtype: Any) -> Any:
    from transformers import BitsAndBytesConfig

    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    computes = torch.bfloat16 if dtype == "auto" else dtype
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computes)


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class PretrainedText(Pretrained):
    """A pretrained model of text.

    Attributes:
        max_tokens: documents are truncated to this length, and to the model's context.
        pack: "documents": a sequence is a document. "concatenate": all documents are joined and cut into sequences of
            `max_tokens`.
    """

    modality: ClassVar[Modality] = "text"

    max_tokens: Annotated[int, Field(ge=2)]
    pack: Pack

    @property
    def longest_text(self) -> int:
        return self.max_tokens


def _follows_the_longest(config: dict[str, Any], max_tokens: int) -> bool:
    """True if the configuration says that the positions of a text depend on the longest text in its batch."""
    config = {**config, **(config.get("text_config") or {})}
    ends = config.get("max_position_embeddings") or max_tokens
    for name in ("rope_scaling", "rope_parameters"):
        rope = config.get(name) or {}
        for scheme in (rope, *rope.values()):  # one per kind of layer in some models
            if isinstance(scheme, dict) and scheme.get("rope_type", scheme.get("type")) in STRETCHING:
                key = "original_max_position_embeddings"
                if min(max_tokens, ends) > (config.get(key) or scheme.get(key) or ends):
                    return True
    return False


def _other_weights(folder: Path) -> list[str]:
    """Weight files that transformers ignores, since it reads the first format that exists."""
    kinds = ("*.safetensors", "*.gguf", "pytorch_model*.bin")
    weights = sorted(file.name for kind in kinds for file in folder.glob(kind))
    names = ("model.safetensors", "pytorch_model.bin")
    for first in (one for name in names for one in (name, f"{name}.index.json")):
        if (folder / first).is_file():
            index = (read_json(folder / first) or {}).get("weight_map", {}) if first.endswith(".json") else {}
            read = {first, *index.values(), WEIGHTS}
            return [name for name in weights if name not in read]
    return []


def fingerprint(path: str) -> str:
    """Hash of the content of all files of a model except its documentation."""
    names = [name for name in names_in(path) if name.suffix not in (".md", ".pyc")]
    return signature([(str(name), fingerprint_of_file(Path(path) / name)) for name in names])


def device(name: str) -> torch.device:
    """The device with this name; `auto` is the first GPU, else the CPU.

    Raises:
        UserError: the device cannot be used here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without it
        reason = " ".join(str(error).split())
        raise UserError(f"model.device={name}: cannot be used here ({reason}); give auto or cpu") from error


@contextmanager
def quiet():
    """Context manager: hide messages of the loaders, but not their errors. Progress bars are shown on a terminal."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    elsewhere = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    try:
        with warnings.catch_warnings(), elsewhere:
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)


@functools.cache
def load_config(model: Pretrained) -> Any:
    """The model's configuration, without its weights."""
    from transformers import AutoConfig

    return model.guarded(lambda: AutoConfig.from_pretrained(model.source, **model.hub_options))


def auto_model(model: Pretrained, kind: str, *names: str) -> Any:
    """The first of these auto classes of transformers that supports the model.

    Args:
        kind: kind of model that the user chose.

    Raises:
        UserError: none of them supports it.
    """
    import transformers

    config, classes = load_config(model), [getattr(transformers, name) for name in names]
    known = [one for one in classes if type(config) in one._model_mapping]
    if known or getattr(config, "auto_map", None):  # auto_map: the model brings its own code
        return (known or classes)[0]
    what = "an encoder-decoder" if getattr(config, "is_encoder_decoder", False) else "a model of another kind"
    raise UserError(
        f"{model.option}: {type(config).__name__} is {what}, which {names[0]} (model={kind}) does not know; take a "
        "decoder (model=causal_lm) or an encoder with a masked-LM head (model=masked_lm)"
    )


def context_length(model: Pretrained) -> int:
    """Number of positions that both the model and its tokenizer support, read from the configuration."""
    config = load_config(model).get_text_config()
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    return min([load_tokenizer(model).model_max_length, *(limit for limit in limits if limit and limit > 0)])


os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # otherwise, transformers asks a bot on the hub to convert
logging.getLogger("transformers.modeling_gguf_pytorch_utils").setLevel(logging.ERROR)
