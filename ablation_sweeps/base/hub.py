"""Access to the Hugging Face Hub: commits, downloads, and clear errors when offline."""

from __future__ import annotations

import functools
import logging
import re
from pathlib import Path
from typing import Literal

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.files import replacing

log = logging.getLogger(__name__)


RepoType = Literal["model", "dataset"]
REMEDY = (
    "run the same command with prefetch=true on a machine with a network, with HF_HOME on a disk that both machines "
    "share"
)

# Beginnings of the names of errors in huggingface_hub, httpx, requests, urllib3 and datasets.
NETWORK_ERRORS = ("OfflineMode", "LocalEntryNotFound", "Connect", "MaxRetryError")


@functools.cache
def commit(repo: str, revision: str | None, repo_type: RepoType) -> str:
    """The commit that a branch or tag stands for now; offline, the one that was fetched last.

    It is loaded, and it enters the signature, so a model or dataset that has changed on the hub counts as another one.
    If the hub is not reached and nothing was fetched, the name of the revision stands in for the commit.
    """
    from huggingface_hub import HfApi, constants

    name = revision or "main"
    if re.fullmatch(r"[0-9a-f]{40}", name):
        return name
    ref = Path(constants.HF_HUB_CACHE) / f"{repo_type}s--{repo.replace('/', '--')}" / "refs" / name
    if not constants.HF_HUB_OFFLINE:
        try:
            found = HfApi().repo_info(repo, revision=name, repo_type=repo_type, timeout=10).sha
            if found and (not ref.is_file() or ref.read_text() != found):  # for nodes that are offline
                with replacing(ref) as temporary:
                    temporary.write_text(found)
            return found or name
        except Exception as error:  # no network, or a gated or missing repository: loading it tells which
            log.debug("the commit of %s is not known from the hub", repo, exc_info=error)
            if is_network_error(error):
                log.warning("the hub cannot be reached; using what was downloaded before")
                constants.HF_HUB_OFFLINE = True  # otherwise every file would be asked for, and waited for
    return ref.read_text().strip() if ref.is_file() else name


def fetch_model(repo: str, commit: str, files: list[str], option: str = "") -> None:
    """Download everything that loading a model needs.

    Args:
        option: option that names the model, for errors; `model.name` by default.
    """
    from huggingface_hub import snapshot_download

    option = option or f"model.name={repo}"
    try:
        folder = snapshot_download(repo, revision=commit, allow_patterns=files, ignore_patterns=["*/*"])
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        remedy = "check the name, and log in if the model is gated (hf auth login)"
        raise UserError(f"{option}: cannot be downloaded: {reason}; {remedy}") from error
    if not _has_weights(Path(folder)):
        raise UserError(
            f"{option}: has no weights in safetensors format; model.use_safetensors=null also reads torch's format"
        )


@functools.cache
def fetch_file(repo: str, commit: str, name: str) -> Path | None:
    """Path of one small file of a model; None if there is none, or if it cannot be reached."""
    from huggingface_hub import constants, hf_hub_download

    try:
        return Path(hf_hub_download(repo, name, revision=commit, local_files_only=constants.HF_HUB_OFFLINE))
    except Exception as error:  # also raised if the model has no such file
        log.debug("%s of %s is not there", name, repo, exc_info=error)
        return None


def require_cached(option: str, repo: str, commit: str) -> None:
    """Offline, refuse a model that was never fetched, before anything runs."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "snapshots" / commit
    if constants.HF_HUB_OFFLINE and not _has_weights(folder):
        path = option.partition("=")[0].replace("name", "path")
        remedy = f"{REMEDY}, or give a folder that holds it: {path}=FOLDER"
        raise UserError(f"{option}: is not on this machine, which is offline; {remedy}")


def _has_weights(folder: Path) -> bool:
    return any(file.suffix in (".safetensors", ".bin", ".gguf") for file in folder.glob("*"))


def loading_error(error: BaseException, of_the_hub: bool) -> str:
    """The reason in one line, with the remedy if the hub was not reached."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    reason = " ".join(str(error).split())[:300]
    return f"{reason}; {REMEDY}" if of_the_hub and (HF_HUB_OFFLINE or is_network_error(error)) else reason


def is_network_error(error: BaseException | None) -> bool:
    """True if there was no network, on purpose or not, according to the error or one of its causes."""
    while error is not None:
        if type(error).__name__.startswith(NETWORK_ERRORS) or "couldn't connect" in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False
