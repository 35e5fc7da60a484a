"""Ours against what people use, on the same tokens, with the same results: python benchmarks/against.py.

The others are plain transformers with a hook, TransformerLens, nnsight, and taker, the library of arXiv:2408.17322.
Each is a script in others/ that runs in an environment of its own, which is made here. On one thread: some 25 minutes;
with --sweeps=1, a whole sweep by the paper's library as well, 15 minutes more. On a GPU: make bench-gpu.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from bench import (
    GPU,
    ROOT,
    TENTHS,
    Case,
    collect,
    composed,
    decoders,
    evaluate,
    masks_of,
    recording,
    save_random,
    seconds,
)
from rich.console import Console
from rich.table import Table

from ablation_sweeps.data.batch import Batch
from ablation_sweeps.experiment.clean_passes import CleanPasses
from ablation_sweeps.experiment.session import Session
from ablation_sweeps.methods.method import Fitting
from ablation_sweeps.models.pretrained import load_tokenizer
from ablation_sweeps.neurons import collect as collect_module
from ablation_sweeps.neurons.collect import NPasses
from ablation_sweeps.neurons.statistics import Statistics

HERE = ROOT / "benchmarks"
FRACTIONS = (0.2, 0.5)
BATCH = 4
METRICS = ("loss", "top1", "top10", "kl")
METHODS = ("zero", "mean", "peak")  # of a sweep
# Script in others/, and the package that its environment needs. Plain transformers runs in our own.
OTHERS = {
    "plain transformers": ("with_plain.py", None),
    "TransformerLens": ("with_transformer_lens.py", "transformer-lens"),
    "nnsight": ("with_nnsight.py", "nnsight"),
    "taker": ("with_taker.py", "taker"),
}

Answer = tuple[float, dict[str, Any]]  # seconds, and what was found


class Skipped(Exception):
    """This one cannot be compared with, and why."""


# Ours, and the others


class Ours:
    def __init__(self, options: Sequence[str], length: int, passes: NPasses = 2, dtype: str = "float32"):
        self.passes: NPasses = passes
        self.dtype = dtype
        job = composed(*options, f"model.max_tokens={length}", f"model.dtype={dtype}", "model.pack=concatenate",
                       f"batch_tokens={BATCH * length}")  # fmt: skip
        session = Session()
        transformer = session.model(job)
        batches = [b for b in session.batches(job, "calibration") if b.labels.shape == (BATCH, length)]
        self.case, self.whole = (Case(job, transformer, some) for some in (batches, joined(batches)))
        self.masks = masks_of(self.case, FRACTIONS)
        self.statistics = collect(self.case, passes)
        self.values = [moments.mean.float() for moments in self.statistics.moments]
        self.methods = {name: composed(f"method={name}").method for name in METHODS}

    def collect(self) -> Answer:
        def run() -> dict[str, Any]:
            found = collect(self.case, self.passes)
            means = torch.stack([m.mean for m in found.moments])
            return {"mean": means.cpu(), "peak": torch.stack(self._values("peak", lambda *_: found)).cpu()}

        return timed(run)

    def points(self) -> Answer:
        took, documents = timed(lambda: evaluate(self.case, FRACTIONS, self.values))
        sums = documents.groupby("fraction")[["n", "loss", "top1", "topk", "kl"]].sum()
        columns = zip(METRICS, ("loss", "top1", "topk", "kl"), strict=True)
        return took, {name: (sums[column] / sums["n"]).tolist() for name, column in columns}

    def sweep(self) -> Answer:
        """All of it but reading and writing files: statistics, and a curve for each method; with batches as large as
        they are by default."""
        case = self.whole

        def run() -> dict[str, Any]:
            passes, found = CleanPasses(case.model), {}
            with tempfile.TemporaryDirectory() as cache:
                collected = partial(
                    collect_module.collect, case.model, case.projections, case.batches, Path(cache),
                    replay=recording(case, Path(cache)),
                )  # fmt: skip

                for name in METHODS:
                    sums = (
                        evaluate(case, TENTHS, self._values(name, collected), passes)
                        .groupby("fraction")[["n", "loss"]]
                        .sum()
                    )
                    found[name] = (sums["loss"] / sums["n"]).tolist()
            return found

        return timed(run)

    def _values(self, method: str, statistics: Callable[..., Statistics]) -> list[torch.Tensor]:
        fitting = Fitting(self.case.model, self.case.projections, statistics, 0, 0)
        return self.methods[method].fit(fitting).values  # type: ignore[attr-defined]

    def export(self, folder: Path) -> None:
        """The model, its tokenizer, and the work, for the others."""
        export(self.case, folder, stacked(self.masks), stacked(masks_of(self.case, TENTHS)), self.values, self.dtype)


def export(
    case: Case,
    folder: Path,
    masks: np.ndarray,
    sweep_masks: np.ndarray,
    values: Sequence[torch.Tensor],
    dtype: str = "float32",
) -> None:
    """Write a model, its tokenizer and the work to a folder, where the scripts of others/ read them.

    Args:
        masks: `[points, layers, neurons]`, of the points to measure.
        sweep_masks: likewise, of a whole sweep.
        values: what is written, `[neurons]` per layer.
    """
    module: Any = case.model.module
    config = copy.deepcopy(module.config)
    if hasattr(config, "quantization_config"):  # read from GGUF, which transformers does not write
        del config.quantization_config
    plain = type(module)(config).to(getattr(torch, dtype))
    plain.load_state_dict(module.state_dict())
    plain.save_pretrained(folder)
    load_tokenizer(case.job.model).save_pretrained(folder)  # type: ignore[arg-type]
    np.savez(
        folder / "work.npz",
        ids=torch.stack([batch.inputs["input_ids"] for batch in case.batches]).numpy(),
        masks=masks,
        sweep_masks=sweep_masks,
        values=torch.stack([*values]).cpu().numpy(),
        dtype=dtype,
    )


def model_options(name: str, folder: Path, length: int) -> list[str]:
    """Of a preset; or of random weights, which are written to the folder."""
    if name not in decoders():
        return [f"model={name}"]
    save_random(folder, decoders()[name], length, "bfloat16")
    return ["model=causal_lm", f"model.path={folder}", f"model.label={name}"]


def joined(batches: Sequence[Batch]) -> list[Batch]:
    """The same rows, in batches of the default size."""
    n = max(1, composed().batch_tokens // batches[0].size)
    return [
        Batch(
            {key: torch.cat([batch.inputs[key] for batch in some]) for key in some[0].inputs},
            torch.cat([batch.labels for batch in some]),
            None,  # no row is padded
            sum((batch.names for batch in some), ()),
            sum((batch.index for batch in some), ()),
        )
        for some in (batches[start : start + n] for start in range(0, len(batches), n))
    ]


def stacked(masks: dict[float, list[torch.Tensor]]) -> np.ndarray:
    """`[fractions, layers, neurons]`"""
    return torch.stack([torch.stack(layers) for layers in masks.values()]).numpy()


class Other:
    """A script of others/ in a process of its own, which waits for commands."""

    def __init__(self, name: str, python: Path, folder: Path):
        self.log = folder / f"{name}.log"
        self.found = folder / f"{name}.npz"
        # The paths of our own environment are none of theirs.
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, HERE / "others" / OTHERS[name][0], folder],
                env=variables | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        self.versions = self._answer()

    def __enter__(self) -> Other:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()

    def collect(self) -> Answer:
        took = self._ask(f"collect {self.found}")["seconds"]
        with np.load(self.found) as arrays:
            return took, {name: torch.from_numpy(arrays[name]) for name in arrays}

    def points(self) -> Answer:
        return self._timed("points")

    def sweep(self) -> Answer:
        return self._timed("sweep")

    def _timed(self, command: str) -> Answer:
        found = self._ask(command)
        return found.pop("seconds"), found

    def _ask(self, command: str) -> dict[str, Any]:
        assert self.process.stdin
        print(command, file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise Skipped(last_line(self.log.read_text()))
        return json.loads(line)


def environment(name: str, envs: Path) -> Path:
    """The python of an environment that has the library, with our own versions of torch and transformers."""
    _, package = OTHERS[name]
    if package is None:
        return Path(sys.executable)
    python = envs / package / "bin" / "python"
    if not python.exists():
        uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
        same = [f"torch=={torch.__version__.partition('+')[0]}", f"transformers=={transformers.__version__}"]
        for line in (["venv", "--python", sys.executable, str(envs / package)],
                     ["pip", "install", "--python", str(python), package, *same]):  # fmt: skip
            try:
                subprocess.run([uv, *line], check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                shutil.rmtree(envs / package, ignore_errors=True)
                raise Skipped(last_line(getattr(error, "stderr", None) or str(error))) from error
    return python


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it says nothing")


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    found: list[Any] = []
    return seconds(lambda: found.append(run())), found[0]


# What is compared


def agreement(ours: Ours, mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Share of neurons whose peaks are within one bin, and the largest difference of each metric over all fractions."""
    peaks_agree = near(mine["peak"], theirs["peak"], ours.statistics)
    found = {"peaks": peaks_agree, "mean": (mine["mean"] - theirs["mean"]).abs().max().item()}
    for metric in METRICS:
        found[metric] = max(abs(a - b) for a, b in zip(mine[metric], theirs[metric], strict=True))
    return found


def in_turns(ours: Ours, others: dict[str, Ours | Other], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each, by command and name, in the order of the rounds."""
    found: dict[str, dict[str, list[float]]] = {"collect": defaultdict(list), "points": defaultdict(list)}
    for _ in range(rounds):
        for name, one in (("ours", ours), *others.items()):
            for command, times in found.items():
                times[name].append(getattr(one, command)()[0])
    return found


def sweeps_in_turns(own: dict[str, Ours], paper: Other, rounds: int) -> dict[str, Any]:
    """A sweep of `METHODS` and ten fractions: the paper's library, `ours`, and what else of ours is given."""
    runs: dict[str, Ours | Other] = {"the paper's library": paper, **own}
    took: dict[str, list[float]] = {name: [] for name in runs}
    losses: dict[str, Any] = {}
    for _ in range(rounds):
        for name, one in runs.items():
            seconds_, losses[name] = one.sweep()
            took[name].append(seconds_)
    apart = {
        name: max(abs(a - b) for m in METHODS for a, b in zip(losses["ours"][m], losses[name][m], strict=True))
        for name in took
        if name != "ours"
    }
    ratios = {
        name: summary([a / b for a, b in zip(took["the paper's library"], took[name], strict=True)]) for name in own
    }
    return {"the paper's library / this": ratios, "seconds": took, "difference of losses to ours": apart}


def summary(values: list[float]) -> dict[str, float]:
    return {"value": statistics.median(values), "from": min(values), "to": max(values)}


def shown(line: dict[str, float], unit: str = "") -> str:
    between = f" ({line['from']:.2f} to {line['to']:.2f})" if line["from"] < line["to"] else ""  # of one round, none
    return f"{line['value']:.2f}{unit}{between}"


def near(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], found: Statistics) -> float:
    """Share of neurons whose peaks are within one bin: others round otherwise."""
    within = [
        ((a - b).abs() <= (m.maximum - m.minimum).cpu() / 100 + 1e-6).float()
        for a, b, m in zip(ours, theirs, found.moments, strict=True)
    ]
    return torch.cat(within).mean().item()


def main(
    names: Annotated[list[str] | None, typer.Argument(help="some of them; all, if none is named")] = None,
    model: Annotated[str, typer.Option(help="of conf/model; or OPT-1.3B, Mistral-7B: random weights")] = "smollm2_135m",
    dataset: str = "python_docs",
    tokens: int = 2048,
    length: int = 256,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, of all of them")] = "float32",
    rounds: int = 5,
    sweeps: Annotated[int, typer.Option(help="rounds of a whole sweep, which takes minutes")] = 0,
    envs: Annotated[Path, typer.Option(help="where the environments are, or are made")] = HERE / ".envs",
    out: Path = HERE / "against.json",
) -> None:
    """Seconds of each, divided by ours of the same round: median and range."""
    skipped: dict[str, str] = {}
    with ExitStack() as stack:
        temporary = lambda: Path(stack.enter_context(tempfile.TemporaryDirectory()))  # noqa: E731
        options = [f"dataset={dataset}", f"statistics.tokens={tokens}", *model_options(model, temporary(), length)]
        ours = Ours(options, length, dtype=dtype)
        others: dict[str, Ours | Other] = {"ours, statistics.passes=1": Ours(options, length, passes=1, dtype=dtype)}
        folder = temporary()
        ours.export(folder)
        results = lambda one: one.collect()[1] | one.points()[1]  # noqa: E731  (which warms up, too)
        mine = results(ours)
        agree = {name: agreement(ours, mine, results(one)) for name, one in others.items()}
        for name in names or OTHERS:
            try:
                other = stack.enter_context(Other(name, environment(name, envs), folder))
                agree[name] = agreement(ours, mine, results(other))
                others[name] = other
            except Skipped as error:
                skipped[name] = str(error)
                print(f"{name} is skipped: {error}")
        times = in_turns(ours, others, rounds)
        whole: dict[str, Any] = {}
        if sweeps and "taker" in others:
            own = {"ours": ours}
            if dtype == "float32":
                own["ours, bfloat16"] = Ours(options, length, dtype="bfloat16")
            try:
                whole = sweeps_in_turns(own, others["taker"], sweeps)  # type: ignore[arg-type]
            except Skipped as error:
                skipped["taker, a sweep"] = str(error)
                print(f"the sweep is skipped: {error}")

    ratios = {
        command: {name: summary([a / b for a, b in zip(by[name], by["ours"], strict=True)]) for name in others}
        for command, by in times.items()
    }
    took = {command: {name: summary(values) for name, values in by.items()} for command, by in times.items()}
    device = torch.cuda.get_device_name() if GPU else "cpu"
    size = {
        "dtype": dtype,
        "tokens": ours.case.n,
        "length": length,
        "batch": BATCH,
        "fractions": FRACTIONS,
        "rounds": rounds,
    }
    found = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__, "model": model, **size,
             "versions": {name: one.versions for name, one in others.items() if isinstance(one, Other)},
             "skipped": skipped,
             "agreement": agree, "ratios": ratios, "seconds": took, "sweep": whole}  # fmt: skip
    out.write_text(json.dumps(found, indent=2) + "\n")
    title = (
        f"time / ours: {model}, {dtype}, {ours.case.n} tokens, {len(FRACTIONS)} fractions, {device}, "
        f"{found['threads']} threads"
    )
    table = Table("", "collect", "points", "peaks", "difference of losses", "of KLs", title=title)
    table.add_row("ours", *(shown(took[command]["ours"], " s") for command in times))
    for name in others:
        compared = agree[name]
        table.add_row(name, *(shown(ratios[command][name]) for command in times), f"{compared['peaks']:.4f}",
                      f"{compared['loss']:.1e}", f"{compared['kl']:.1e}")  # fmt: skip
    console = Console(width=None if os.isatty(1) else 120)
    console.print(table)
    for name, line in whole.get("the paper's library / this", {}).items():
        console.print(f"a sweep, the paper's library in {dtype} / {name}: {shown(line)}")
    for name, apart in whole.get("difference of losses to ours", {}).items():
        # The paper's library rounds its losses to 1e-4.
        console.print(f"losses of {name} and ours: {apart:.1e} apart at most")


if __name__ == "__main__":
    typer.run(main)
