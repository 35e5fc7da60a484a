"""Each head ablated alone, ours against what people use: python benchmarks/leave_one_out.py.

The heads are those of every fifth layer of SmolLM2-135M. "Separate passes" are ours as well, without the shared prefix:
each pass computes all layers. The others are the scripts of others/, as in against.py. Measured is the time of the CPU
that each process takes, so that a machine that is shared disturbs it less. On one thread: some two minutes a round.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from against import HERE, OTHERS, Answer, Other, Skipped, environment, export, shown, stacked, summary, timed
from bench import Case, text

from ablation_sweeps.experiment import evaluate as evaluate_module
from ablation_sweeps.methods.method import Constant
from ablation_sweeps.neurons.hooks import Projection
from ablation_sweeps.neurons.schedule import Each
from ablation_sweeps.neurons.units import Unit

METRICS = ("loss", "kl")


class Ours:
    def __init__(self, case: Case, projections: list[Projection], masks: evaluate_module.Masks):
        self.case, self.projections, self.masks = case, projections, masks
        self.process = psutil.Process()

    def points(self) -> Answer:
        zero = Constant([torch.zeros(projection.width) for projection in self.projections])
        took, documents = timed(
            lambda: evaluate_module.evaluate(
                self.case.model, self.projections, self.case.batches, self.masks, zero, torch.arange(50), 10, [],
                lambda *_: None,
            )
        )  # fmt: skip
        sums = documents.groupby(["fraction", "unit"])[["n", *METRICS]].sum()
        return took, {name: (sums[name] / sums["n"]).tolist() for name in METRICS}


def heads_of(case: Case, layers: list[int], most: int) -> evaluate_module.Masks:
    """For each of the first heads of these layers, the masks that ablate it alone."""
    units = Unit(name="head").partition(case.projections)
    chosen = (torch.isin(units.layer, torch.tensor(layers)) & (units.index < most)).nonzero()[:, 0]
    return {point: units.masks(one) for point, one in Each().points([chosen], len(units)).items()}


def cpu_seconds(one: Ours | Other) -> tuple[float, dict[str, Any]]:
    process = one.process if isinstance(one, Ours) else psutil.Process(one.process.pid)
    before = process.cpu_times()
    _, found = one.points()
    after = process.cpu_times()
    return after.user + after.system - before.user - before.system, found


def main(
    names: Annotated[list[str] | None, typer.Argument(help="some of the others; all, if none is named")] = None,
    tokens: int = 256,
    length: int = 256,
    every: Annotated[int, typer.Option(help="5: the heads of layers 4, 9, 14, ...")] = 5,
    heads: Annotated[int, typer.Option(help="at most so many heads of each of these layers")] = 9,
    rounds: int = 5,
    ours_only: Annotated[bool, typer.Option(help="no other tools")] = False,
    envs: Annotated[Path, typer.Option(help="where the environments are, or are made")] = HERE / ".envs",
    out: Path = HERE / "leave_one_out.json",
) -> None:
    """CPU seconds of each, divided by those of separate passes in the same round: median and range."""
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    case = text("smollm2_135m", tokens, length, "model.pack=concatenate")
    layers = [*range(every - 1, len(case.projections), every)]
    masks = heads_of(case, layers, heads)
    # The same modules under a path without numbers: nothing is known about layers then.
    unknown = [dataclasses.replace(projection, path="projection") for projection in case.projections]
    runs: dict[str, Ours | Other] = {
        "separate passes": Ours(case, unknown, masks),
        "ours": Ours(case, case.projections, masks),
    }
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        values = [torch.zeros(projection.width) for projection in case.projections]
        others = [] if ours_only else names or [name for name in OTHERS if name != "taker"]
        if others:
            export(case, folder, masks=stacked(masks), sweep_masks=stacked(masks), values=values)
        for name in others:
            try:
                runs[name] = stack.enter_context(Other(name, environment(name, envs), folder))
            except Skipped as error:
                print(f"{name}: skipped, {error}")
        took: dict[str, list[float]] = defaultdict(list)
        found: dict[str, dict[str, Any]] = {}
        for _ in range(rounds):
            for name, run in runs.items():
                seconds, found[name] = cpu_seconds(run)
                took[name].append(seconds)
    ratios = {
        name: summary([a / b for a, b in zip(times, took["separate passes"], strict=True)])
        | {
            metric: max(abs(a - b) for a, b in zip(found[name][metric], found["separate passes"][metric], strict=True))
            for metric in METRICS
        }
        for name, times in took.items()
    }
    for name, line in ratios.items():
        print(
            f"{name}: {shown(line)} of separate passes; loss {line['loss']:.1e} and KL {line['kl']:.1e} apart at most"
        )
    work = {
        "tokens": case.n,
        "length": length,
        "layers": layers,
        "heads": heads,
        "points": len(masks),
        "rounds": rounds,
    }
    out.write_text(json.dumps({"work": work, "of separate passes": ratios, "CPU seconds": took}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
