"""The environment of a run: code, versions, device and memory."""

from __future__ import annotations

import functools
import hashlib
import platform
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ablation_sweeps.base.lazy import torch

PACKAGES = (
    "ablation-sweeps",
    "torch",
    "transformers",
    "tokenizers",
    "timm",
    "datasets",
    "huggingface-hub",
    "numpy",
    "pandas",
    "hydra-core",
    "wandb",
)

# Folders in which users may put models, datasets, methods or selections of their own, and our modules in them.
PLUGINS = {
    "models": (
        *("adapters", "causal_lm", "image_classifier", "masked_lm", "model", "pretrained", "probing", "timm"),
        "transformer",
    ),
    "datasets": (
        *("dataset", "digits", "file_formats", "hub_images", "hub_rows", "hub_text", "image_folder", "options"),
        *("python_docs", "text_files"),
    ),
    "methods": ("mean", "median", "method", "peak", "resample", "zero"),
    "selections": ("attribution", "by_statistic", "effects", "exact", "listed", "random", "scored", "selection"),
}


@functools.cache
def describe() -> dict[str, Any]:
    """Commit, versions and device of this process, and a hash of the code as it was when the process began."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changed": bool(_git("status", "--porcelain")),
        "code": code(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": gpu or platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }


def is_ours(module: str) -> bool:
    """True if a module, given by its dotted name, belongs to this package, and was not put there by a user."""
    package, _, rest = module.partition(".")
    folder, _, name = rest.partition(".")
    return package == "ablation_sweeps" and (folder not in PLUGINS or name in (*PLUGINS[folder], "__init__"))


@functools.cache
def code() -> str:
    """Hash of the sources of this package, in a checkout or not."""
    digest, folder = hashlib.sha256(), Path(__file__).parents[1]
    for file in sorted(folder.rglob("*.py")):
        module = ".".join(file.relative_to(folder.parent).with_suffix("").parts)
        if is_ours(module):
            digest.update(f"{module}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _git(*arguments: str) -> str | None:
    """Output of a git command in the folder of this package; None if that is not a checkout.

    An installed package may lie in the checkout of another project, which does not track it.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True, check=True)
        return subprocess.run([*git, *arguments], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def peak_memory() -> dict[str, int | None]:
    """Peak memory of this process until now, in MB, on the host and on all of its GPUs."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    gpu = round(sum(torch.cuda.max_memory_allocated(number) for number in gpus) / 2**20) if gpus else None
    return {"peak_memory_mb": round(peak / (2**20 if sys.platform == "darwin" else 2**10)), "peak_gpu_memory_mb": gpu}
