"""What the four scripts share: what they are given, what they measure, and how they answer. See ../against.py."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

N_BINS = 100
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Work:
    """The batches, and which neurons are given which value."""

    ids: Tensor  # [n_batches, batch, pos]
    masks: Tensor  # [n_fractions, layers, neurons]
    sweep_masks: Tensor  # of the fractions of a whole sweep, likewise
    values: Tensor  # [layers, neurons], of the model's dtype

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self.values.dtype

    @classmethod
    def read(cls, file: Path) -> Work:
        with np.load(file) as arrays:
            work = cls(
                *(torch.from_numpy(arrays[name]).to(DEVICE) for name in ("ids", "masks", "sweep_masks", "values"))
            )
            work.values = work.values.to(getattr(torch, str(arrays["dtype"])))
        return work


def means_and_peaks(layers: list[Tensor]) -> dict[str, Tensor]:
    """Of the activations, `[tokens, neurons]` a layer: the mean, and the centre of the fullest bin of each neuron.

    What np.histogram finds in a loop over the neurons, and as fast on a CPU; this works on a GPU, too.
    """
    means, peaks = [], []
    for raw in layers:
        x = raw.float()
        low, high = x.aminmax(dim=0)
        width = high - low
        bins = ((x - low) * N_BINS / torch.where(width > 0, width, 1)).long().clamp_(0, N_BINS - 1)  # [tokens, neurons]
        first = torch.arange(x.shape[1], device=x.device) * N_BINS  # of each neuron
        counts = torch.bincount((bins + first).flatten(), minlength=x.shape[1] * N_BINS).view(-1, N_BINS)
        means.append(x.mean(0))
        peaks.append(low + (counts.argmax(-1) + 0.5) * width / N_BINS)
    return {"mean": torch.stack(means), "peak": torch.stack(peaks)}


def log_probabilities(logits: Tensor) -> Tensor:
    """`[batch, pos, vocabulary]` -> `[batch * (pos - 1), vocabulary]`: nothing follows the last position."""
    return logits[:, :-1].flatten(0, 1).float().log_softmax(-1)


def score(log_q: Tensor, ids: Tensor, log_p: Tensor | None) -> Tensor:
    """Sums over the scored positions: number, loss, top1, top10, KL(clean || ablated); `log_p` is clean, `log_q` not.

    Of the clean pass itself, the last one is 0, and not computed.
    """
    labels = ids[:, 1:].flatten()
    first = log_q.topk(10).indices
    sums = (
        len(labels),
        F.nll_loss(log_q, labels, reduction="sum"),
        (first[:, 0] == labels).sum(),
        (first == labels[:, None]).sum(),
        0 if log_p is None else F.kl_div(log_q, log_p, reduction="sum", log_target=True),
    )
    return torch.tensor([float(value) for value in sums], dtype=torch.float64)


def points(work: Work, clean: Callable[[Tensor], Tensor], ablated: Callable[[Tensor, Tensor], Tensor]) -> dict:
    """The clean pass and one for each fraction, batch after batch.

    Args:
        clean: ids -> logits.
        ablated: ids, the mask of a fraction -> logits.
    """
    sums = torch.zeros(1 + len(work.masks), 5, dtype=torch.float64)
    for ids in work.ids:
        log_p = log_probabilities(clean(ids))
        sums[0] += score(log_p, ids, None)
        for number, mask in enumerate(work.masks, 1):
            sums[number] += score(log_probabilities(ablated(ids, mask)), ids, log_p)
    _, loss, top1, top10, kl = (sums / sums[:, :1]).T.tolist()
    return {"loss": loss, "top1": top1, "top10": top10, "kl": kl}


def serve(library: str, load: Callable[[Path, Work], tuple[Callable, ...]]) -> None:
    """Loads the model, says which versions these are, and answers each line of stdin with one of json.

    `collect FILE` writes means and peaks to the file; `points` answers with the metrics of every fraction, 0 first;
    `sweep` with the losses of a whole sweep, for those that have one. All say how many seconds they took; writing and
    reading files is not among them.

    Args:
        library: the package that is measured.
        load: from the folder and the work, what collects the activations (a tensor a layer), what gives the points,
            and, if there is such a thing, what runs a sweep.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    folder = Path(sys.argv[1])
    collect, *others = load(folder, Work.read(folder / "work.npz"))
    measure = dict(zip(("points", "sweep"), others, strict=False))

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    answer(**{package: version(package) for package in ("torch", "transformers", library)})
    for line in sys.stdin:
        command, _, file = line.strip().partition(" ")
        start = now()
        with torch.inference_mode():
            found = means_and_peaks(collect()) if command == "collect" else measure[command]()
        seconds = now() - start
        if command == "collect":
            np.savez(file, **{name: value.cpu().numpy() for name, value in found.items()})
            found = {}
        answer(seconds=seconds, **found)


def now() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
