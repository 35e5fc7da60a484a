"""Chance level of every metric: the score of a predictor that does not see the input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float, Int

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.lazy import torch
from ablation_sweeps.base.terminal import counted
from ablation_sweeps.data.batch import Batch
from ablation_sweeps.models.transformer import Transformer

if TYPE_CHECKING:
    from ablation_sweeps.experiment.job import Job


@dataclass(frozen=True)
class ChanceModel:
    """Predictor that does not see the input; its scores are the chance levels.

    Attributes:
        probability: predicted probability of each token (its frequency in the calibration data, add-one smoothed) or of
            each class (uniform).
        common: ids of the most common tokens, which the skip metrics leave out; empty for images.
    """

    probability: Float[torch.Tensor, " classes"]
    common: Int[torch.Tensor, " common"]


def unigram(batches: Sequence[Batch], n_classes: int, special_ids: Iterable[int], skip: int) -> ChanceModel:
    """Token frequencies in the calibration data, without special tokens.

    Args:
        skip: number of most common tokens that the skip metrics leave out.
    """
    counts: Counter[int] = Counter()
    for batch in batches:
        mask = batch.inputs.get("attention_mask", batch.keep)  # a custom kind of model may have no attention mask
        assert mask is not None
        counts.update(batch.inputs["input_ids"][mask.bool()].tolist())
    for special in special_ids:
        counts.pop(special, None)
    frequency = torch.ones(n_classes, dtype=torch.float64)
    for token, count in counts.items():
        frequency[token] += count
    common = sorted(counts, key=lambda token: (-counts[token], token))[:skip]
    return ChanceModel(frequency / frequency.sum(), torch.tensor(common, dtype=torch.long))


def uniform(n_classes: int) -> ChanceModel:
    """Equal probability for every class."""
    return ChanceModel(torch.full((n_classes,), 1 / n_classes, dtype=torch.float64), torch.empty(0, dtype=torch.long))


def _chance(guess: ChanceModel, labels: Int[torch.Tensor, " scored"], top_k: int) -> dict[str, float]:
    order = guess.probability.argsort(descending=True, stable=True)
    first = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))  # rank of each class
    uninformed = bool((guess.probability == guess.probability[0]).all())

    def level(labels: torch.Tensor, suffix: str) -> dict[str, float]:
        if not len(labels):
            return {}
        top = {k: min(1.0, k / len(order)) if uninformed else (first[labels] < k).double().mean().item()
               for k in (1, top_k)}  # fmt: skip
        loss = -guess.probability[labels].log().mean().item()
        return {f"loss{suffix}": loss, f"top1{suffix}": top[1], f"top{top_k}{suffix}": top[top_k]}

    skip = f"_skip{len(guess.common)}"
    return {**level(labels, ""), **level(labels[~torch.isin(labels, guess.common)], skip)}


def chance_model(job: Job, model: Transformer, batches: list[Batch], calibration: list[Batch]) -> ChanceModel:
    """The chance model of a job: token frequencies for text, a uniform distribution for images.

    Raises:
        UserError: the classes of the data are not those of the model.
    """
    with torch.inference_mode():
        n_classes = model.logits(model.other_input("probe", 8, 0).to(model.device)).shape[-1]
    if model.modality == "image":
        names = job.dataset.class_names()
        if len(names) != n_classes:
            raise UserError(
                f"dataset={job.dataset.label}: has {counted(len(names), 'class', 'es')}, but the model knows "
                f"{n_classes}, so labels would be wrong; choose data with the model's classes (for image_folder, "
                f"dataset.classes=FILE gives their order)"
            )
        known = set(model.class_names)
        for number, (name, own) in enumerate(zip(names, model.class_names, strict=False)):  # may be empty
            if name != own and name in known:
                raise UserError(
                    f"dataset={job.dataset.label}: its class {number} is {name}, but the model's is {own}: in another "
                    "order, so that labels would be wrong; for image_folder, dataset.classes=FILE gives the order"
                )
        return uniform(n_classes)
    scored = frozenset(torch.cat([batch.labels.flatten() for batch in batches]).unique().tolist())
    return unigram(calibration, n_classes, model.special_ids - scored, job.eval.skip)
