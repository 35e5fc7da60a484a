"""The hub: which commit a name stands for, getting its files, and saying clearly what is missing offline."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Literal

from ablation_sweeps.data import UserError

RepoType = Literal["model", "dataset"]
REMEDY = "run the same command with prefetch=true where there is a network, with HF_HOME on a disk that both see"

# Of huggingface_hub, httpx, requests, urllib3 and datasets.
OFFLINE = ("OfflineMode", "LocalEntryNotFound", "Connect", "MaxRetryError")


@functools.cache
def commit(repo: str, revision: str | None, repo_type: RepoType) -> str:
    """The commit that a branch or tag stands for now; offline, the one that was fetched last.

    It goes into the signature, so that a model or dataset that changed on the hub is another one. What is neither
    reached nor kept is told apart by the name of the revision alone.
    """
    import huggingface_hub as hub

    name = revision or "main"
    if re.fullmatch(r"[0-9a-f]{40}", name):
        return name
    if not hub.constants.HF_HUB_OFFLINE:
        try:
            return hub.HfApi().repo_info(repo, revision=name, repo_type=repo_type, timeout=10).sha or name
        except (OSError, ValueError):  # no network, a gated or a missing repository: loading it says which
            pass
    kept = Path(hub.constants.HF_HUB_CACHE) / f"{repo_type}s--{repo.replace('/', '--')}" / "refs" / name
    return kept.read_text().strip() if kept.is_file() else name


def fetch_model(repo: str, revision: str | None, files: list[str]) -> None:
    """All that loading it needs, without loading it."""
    import huggingface_hub as hub

    try:
        hub.snapshot_download(repo, revision=revision, allow_patterns=files, ignore_patterns=["*/*"])
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"model.name={repo}: cannot be fetched: {reason}; check the name, and log in if it is gated "
                        "(hf auth login)") from error  # fmt: skip


def why_not(error: BaseException, of_the_hub: bool) -> str:
    """The reason in one line, with the remedy where the hub was not reached."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    reason = " ".join(str(error).split())[:300]
    return f"{reason}; {REMEDY}" if of_the_hub and (HF_HUB_OFFLINE or unreached(error)) else reason


def unreached(error: BaseException | None) -> bool:
    """The network was off, on purpose or not, somewhere in the chain of what went wrong."""
    while error is not None:
        if type(error).__name__.startswith(OFFLINE) or "couldn't connect" in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False
