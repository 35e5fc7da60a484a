"""How far this is from clean forward passes: make bench. README.md says what was found, and what each line means."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import psutil
import torch
import torch.nn.functional as F
import typer
from hydra import compose, initialize_config_dir
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ablation_sweeps.data.batch import NOT_SCORED, Batch, Picture, Split, prefetch_batches
from ablation_sweeps.data.encoder import Budget
from ablation_sweeps.datasets.python_docs import code
from ablation_sweeps.experiment import evaluate as evaluate_module
from ablation_sweeps.experiment.clean_passes import CleanPasses
from ablation_sweeps.experiment.config import to_job
from ablation_sweeps.experiment.job import Job
from ablation_sweeps.experiment.session import Session
from ablation_sweeps.methods.method import Constant
from ablation_sweeps.models.transformer import Transformer
from ablation_sweeps.neurons import collect as collect_module
from ablation_sweeps.neurons import sites
from ablation_sweeps.neurons.collect import NPasses
from ablation_sweeps.neurons.replay import Replay
from ablation_sweeps.neurons.schedule import Fractions, Point
from ablation_sweeps.neurons.statistics import Histogram, Statistics
from ablation_sweeps.neurons.units import Unit
from ablation_sweeps.selections.selection import grouped

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 5
TENTHS = tuple(i / 10 for i in range(1, 11))
RESULTS = ROOT / "benchmarks" / "results.json"
GPU = torch.cuda.is_available()


# Models and their batches


class Case:
    """A model, and batches of the data that it is timed on."""

    def __init__(self, job: Job, model: Transformer, batches: list[Batch]):
        self.job, self.model, self.batches = job, model, batches
        self.projections = sites.find(model, job.site, None)
        self.n = sum(int(batch.keep.sum()) if batch.keep is not None else len(batch.names) for batch in batches)

    def parts(self) -> Iterator[Batch]:
        """What goes through the model at once, as ours has it."""
        for batch in self.batches:
            yield from batch.to(self.model.device).split_to(self.model.max_positions_per_pass)

    def some(self, n: int) -> Case:
        return Case(self.job, self.model, self.batches[:n])


def composed(*overrides: str) -> Job:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return to_job(compose("config", overrides=["tracking=none", *overrides]))


def text(model: str, tokens: int, max_tokens: int, *options: str, split: Split = "calibration") -> Case:
    """Real weights and real text."""
    job = composed(f"model={model}", f"statistics.tokens={tokens}", f"eval.tokens={tokens}",
                   f"model.max_tokens={max_tokens}", "batch_tokens=1024", *options)  # fmt: skip
    session = Session()
    return Case(job, session.model(job), session.batches(job, split))


def decoders() -> dict[str, Any]:
    """The shapes of the paper's."""
    from transformers import MistralConfig, OPTConfig

    return {
        "OPT-1.3B": OPTConfig(
            hidden_size=2048, ffn_dim=8192, num_hidden_layers=24, num_attention_heads=32, word_embed_proj_dim=2048
        ),
        "Mistral-7B": MistralConfig(num_key_value_heads=8, max_position_embeddings=4096),
    }


def save_random(folder: Path, config: Any, max_tokens: int, dtype: str, masked: bool = False) -> None:
    """Random weights; the tokenizer of a tiny model, whose ids are small."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    auto, tokens_of = (AutoModelForMaskedLM, "tiny_masked") if masked else (AutoModelForCausalLM, "tiny_causal")
    auto.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)
    for file in (ROOT / "ablation_sweeps" / "assets" / tokens_of).glob("*token*"):
        shutil.copy(file, folder)
    own = folder / "tokenizer_config.json"
    own.write_text(json.dumps(json.loads(own.read_text()) | {"model_max_length": max_tokens}))


def shaped_like(
    config: Any, tokens: int, max_tokens: int, dtype: str, *options: str, batch_tokens: int = 1024, masked: bool = False
) -> Case:
    with tempfile.TemporaryDirectory() as folder:
        save_random(Path(folder), config, max_tokens, dtype, masked)
        return text("masked_lm" if masked else "causal_lm", tokens, max_tokens, f"model.path={folder}",
                    "model.label=random", f"model.dtype={dtype}", f"batch_tokens={batch_tokens}",
                    *options, split="evaluation" if masked else "calibration")  # fmt: skip


def vision(name: str, images: int, dtype: str, batch_tokens: int = 1600) -> Case:
    """Random weights and pixels: the time does not depend on them."""
    import timm
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        save_file(timm.create_model(name).state_dict(), Path(folder) / "model.safetensors")
        job = composed("model=timm", f"model.name={name}", f"model.path={folder}", "model.label=random",
                       f"model.dtype={dtype}", "dataset=digits")  # fmt: skip
        model = Session().model(job)
    pixels = torch.randint(0, 256, (images, 224, 224, 3), dtype=torch.uint8).numpy()
    pictures = [Picture(str(i), partial(Image.fromarray, image), i % 1000) for i, image in enumerate(pixels)]
    return Case(job, model, model.encode(pictures, "calibration", Budget(None, None), batch_tokens, 0))


# What is timed


@torch.inference_mode()
def body(case: Case) -> None:
    for batch in case.parts():
        case.model.body(batch)


@torch.inference_mode()
def clean(case: Case) -> None:
    """A forward pass and its loss."""
    losses = []
    for batch in case.parts():
        logits = case.model.logits(batch).flatten(0, -2)
        losses.append(F.cross_entropy(logits.float(), batch.labels.flatten(), ignore_index=NOT_SCORED))
    torch.stack(losses).tolist()  # waited for once


def collect(case: Case, passes: NPasses = 2, again: bool = False) -> Statistics:
    """Mean, range and the histogram that peaks are read from: in two passes, exact.

    Args:
        again: both are passes of the model, as on a GPU, or where the disk has no room.
    """
    with tempfile.TemporaryDirectory() as cache:
        return collect_module.collect(
            case.model, case.projections, case.batches, Path(cache), Histogram(100), passes=passes,
            replay=None if again else recording(case, Path(cache)),
        )  # fmt: skip


def recording(case: Case, folder: Path) -> Replay | None:
    """As a job has it."""
    return Replay(folder) if case.model.on_cpu else None


def masks_of(case: Case, fractions: Sequence[float]) -> dict[float, list[Tensor]]:
    """The same share of each layer's neurons at each fraction."""
    units, generator = Unit(name="neuron").partition(case.projections), torch.Generator().manual_seed(0)
    orders = [group[torch.randperm(len(group), generator=generator)] for group in grouped(units, "layer")]
    points = Fractions(values=tuple(fractions)).points(orders, len(units))
    return {point.fraction: units.masks(numbers) for point, numbers in points.items()}


def evaluate(
    case: Case, fractions: Sequence[float], values: list[Tensor] | None = None, kept: CleanPasses | None = None
) -> pd.DataFrame:
    """The clean pass and one for each fraction, with all metrics."""
    constant = Constant(values or [torch.zeros(projection.width) for projection in case.projections])
    masks = {Point(fraction): layers for fraction, layers in masks_of(case, fractions).items()}
    return evaluate_module.evaluate(
        case.model, case.projections, case.batches, masks, constant, torch.arange(50), 10, [],
        lambda *_: None, clean=kept,
    )  # fmt: skip


# How


def seconds(run: Callable[[], Any]) -> float:
    if GPU:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratio(ours: Callable[[], Any], floor: Callable[[], Any], passes: float = 1) -> dict[str, Any]:
    """Both in turns; `ours` does `passes` times the work of `floor`. Median, and the range over the rounds."""
    floor()
    ratios = sorted(1 / passes / seconds(floor) * seconds(ours) for _ in range(ROUNDS))
    return {"value": statistics.median(ratios), "from": ratios[0], "to": ratios[-1]}


def memory(run: Callable[[], Any]) -> float:
    """MB at its peak above what was in use before, of the process; or of the GPU."""
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    resident = lambda: psutil.Process().memory_info().rss  # noqa: E731
    seen, stop = [before := resident()], threading.Event()

    def watch() -> None:
        while not stop.wait(0.005):
            seen.append(resident())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        run()
    finally:
        stop.set()
        thread.join()
    return (max(seen) - before) / 2**20


# python launch.py, which ends where the first batch would go through the model.
TO_THE_FIRST_BATCH = f"""
import os, runpy
from ablation_sweeps.neurons.collect import CalibrationData
CalibrationData.run = lambda *_: os._exit(0)
runpy.run_path("{ROOT / "launch.py"}", run_name="__main__")
os._exit(1)
"""


def command(*options: str, times: int = 3, program: Sequence[str] = (str(ROOT / "launch.py"),)) -> float:
    """Seconds of `python launch.py` in a process of its own, with nothing finished before."""
    line = [sys.executable, *program, "tracking=none", *options]

    def run() -> float:
        with tempfile.TemporaryDirectory() as folder:
            return seconds(lambda: subprocess.run(line, cwd=folder, check=True, capture_output=True))

    return statistics.median(run() for _ in range(times))


# The lines of the table


def timings() -> dict[str, dict[str, Any]]:
    """Of one pass or one point, against a clean pass."""
    from transformers import BertConfig

    smollm2, deit = text("smollm2_135m", 1024, 512), vision("deit_tiny_patch16_224", 64, "float32")
    half = (0.5,)
    found: dict[str, dict[str, Any]] = {}
    for name, case in (("SmolLM2-135M", smollm2), ("DeiT-Tiny", deit)):
        found[f"collect, exact, the second pass from disk / body: {name}"] = ratio(
            lambda c=case: collect(c), lambda c=case: body(c)
        )
        found[f"collect, exact, two passes of the model / body: {name}"] = ratio(
            lambda c=case: collect(c, again=True), lambda c=case: body(c)
        )
        found[f"a point / clean pass with loss: {name}"] = ratio(
            lambda c=case: evaluate(c, TENTHS[:3]), lambda c=case: clean(c), passes=4
        )
    bert = shaped_like(BertConfig(), 1024, 256, "float32", masked=True)  # the head is a fifth of its work
    found["a point / clean pass with loss: BERT-base-shaped, 15 % masked"] = ratio(
        lambda: evaluate(bert, TENTHS[:3]), lambda: clean(bert), passes=4
    )
    brief = text("smollm2_135m", 1024, 512, "model.dtype=bfloat16")
    found["a point in bfloat16 / in float32: SmolLM2-135M"] = ratio(
        lambda: evaluate(brief, half), lambda: evaluate(smollm2, half)
    )
    return found


def one_pass() -> dict[str, dict[str, Any]]:
    """statistics.passes=1: its time, its memory, and how many peaks are those of two passes."""
    case = text("smollm2_135m", 8_000, 512)
    part = case.some(4)  # of 20,000 tokens by default: what is written once must not count too much
    found = {
        f"collect, one pass / body, {part.n} tokens: SmolLM2-135M": ratio(lambda: collect(part, 1), lambda: body(part)),
        f"collect, exact, the second pass from disk / body, {part.n} tokens: SmolLM2-135M": ratio(
            lambda: collect(part), lambda: body(part)
        ),
        "MB while collecting in one pass: SmolLM2-135M": {"value": memory(lambda: collect(part, 1))},
    }
    exact, quick = (collect(case, passes).counts[Histogram(100)] for passes in (2, 1))
    apart = torch.cat([(a.argmax(1) - b.argmax(1)).abs() for a, b in zip(exact, quick, strict=True)])
    for name, within in (("the same bin", 0), ("within one bin", 1)):
        found[f"peaks of one pass in {name}, {case.n} tokens: SmolLM2-135M"] = {
            "value": (apart <= within).float().mean().item()
        }
    return found


def on_a_gpu() -> dict[str, dict[str, Any]]:
    """The shapes of the paper's models, in bfloat16."""
    if not GPU:
        print("on_a_gpu: skipped, there is none")
        return {}
    default = composed().batch_tokens
    found: dict[str, dict[str, Any]] = {}
    for name, config in decoders().items():
        case = shaped_like(config, 50_000, 1000, "bfloat16", "dataset=python_code", batch_tokens=default)
        found |= against_clean(name, case)
    return found | against_clean("ViT-Base", vision("vit_base_patch16_224", 512, "bfloat16", default))


def against_clean(name: str, case: Case) -> dict[str, dict[str, Any]]:
    return {
        f"collect, exact, two passes of the model / body: {name}": ratio(lambda: collect(case), lambda: body(case)),
        f"collect, one pass / body: {name}": ratio(lambda: collect(case, 1), lambda: body(case)),
        f"a point / clean pass with loss: {name}": ratio(
            lambda: evaluate(case, TENTHS[:3]), lambda: clean(case), passes=4
        ),
        f"MB while collecting: {name}": {"value": memory(lambda: collect(case))},
        f"MB of a pass through the body: {name}": {"value": memory(lambda: body(case))},
    }


def pieces(folder: Path) -> list[str]:
    """Enough text for 100,000 tokens in documents of 256: the source code of Python's library in pieces. Options."""
    texts = [document.text for document in code()]
    cut = [text[i : i + 1500] for text in texts for i in range(0, len(text) - 1500, 15_000)]
    for name, some in (("calibration", cut[::5]), ("evaluation", [t for i, t in enumerate(cut) if i % 5])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    return ["dataset=text_files", "dataset.label=pieces", f"dataset.path={folder}/evaluation.jsonl",
            f"dataset.calibration_path={folder}/calibration.jsonl"]  # fmt: skip


def a_sweep() -> dict[str, dict[str, Any]]:
    """As it is typed, all included, against the passes that it cannot do without."""
    tokens, methods = 100_000, "method=zero,mean,resample,peak"
    with tempfile.TemporaryDirectory() as folder:
        options = ["batch_tokens=4096", *pieces(Path(folder))]
        calibration = text("tiny_causal", 20_000, 256, *options)
        evaluated = text("tiny_causal", tokens, 256, *options, split="evaluation")
        floor = lambda: seconds(lambda: body(calibration)) + 41 * seconds(lambda: clean(evaluated))  # noqa: E731
        before = floor()
        took = command("-m", methods, "model.max_tokens=256", "statistics.tokens=20000", f"eval.tokens={tokens}",
                       *options, times=1)  # fmt: skip
        value = took / statistics.mean([before, floor()])
    return {f"sweep of 4 x 10 points, {evaluated.n} tokens each / its passes: tiny_causal": {"value": value}}


def memories() -> dict[str, dict[str, Any]]:
    """First the small, then the large: what was allocated once stays with the process."""
    found: dict[str, dict[str, Any]] = {}
    case = text("tiny_causal", 1_000, 256)
    collect(case)
    for times in (1, 1000):  # the data is small: it is gone through more than once
        long = Case(case.job, case.model, case.batches * times)
        found[f"MB while collecting {long.n} tokens: tiny_causal"] = {"value": memory(lambda c=long: collect(c))}
    few = text("tiny_causal", 2_000, 256)
    evaluate(few, TENTHS[:5])
    five = psutil.Process().memory_info().rss
    for _ in range(20):
        evaluate(few, TENTHS)
    found["memory after 200 points / after 5: tiny_causal"] = {"value": psutil.Process().memory_info().rss / five}
    smollm2 = text("smollm2_135m", 1024, 512)
    body(smollm2)
    found["MB of a pass through the body over 1k tokens: SmolLM2-135M"] = {"value": memory(lambda: body(smollm2))}
    found["MB while collecting them: SmolLM2-135M"] = {"value": memory(lambda: collect(smollm2))}
    deit = vision("deit_tiny_patch16_224", 2, "float32")
    for n in (1_000, 6_000):
        found[f"MB of the pixels of {n} images: DeiT-Tiny"] = {"value": memory(partial(go_through, deit, n))}
    return found


def go_through(case: Case, n: int) -> None:
    """All batches of so many images, without the model."""
    one = Image.fromarray(torch.randint(0, 256, (224, 224, 3), dtype=torch.uint8).numpy())
    pictures = (Picture(str(i), lambda: one, i % 1000) for i in range(n))
    for _ in prefetch_batches(case.model.encode(pictures, "evaluation", Budget(None, None), 4096, 0)):
        pass


def startup() -> dict[str, dict[str, Any]]:
    few = ["statistics.tokens=300", "eval.tokens=300", "fraction=0.5"]
    one, many = (command("-m", f"seed=range({n})", *few, times=1) for n in (1, 301))
    return {
        "s, --help": {"value": command("--help")},
        "s, dry_run=true: tiny_causal": {"value": command("dry_run=true")},
        "s, until the first batch: tiny_causal": {"value": command(program=["-c", TO_THE_FIRST_BATCH])},
        "s, one job of two batches, its figures and page: tiny_causal": {"value": command(*few)},
        "s a job, of 300 more in a sweep, its two passes over 300 tokens included: tiny_causal": {
            "value": (many - one) / 300
        },
    }


GROUPS = {
    "startup": startup,
    "memory": memories,
    "time": timings,
    "one_pass": one_pass,
    "sweep": a_sweep,
    "gpu": on_a_gpu,
}


def main(groups: Annotated[list[str] | None, typer.Argument()] = None, out: Path = RESULTS) -> None:
    """Measures all, or some: startup, memory, time, one_pass, sweep, gpu."""
    device = torch.cuda.get_device_name() if GPU else "cpu"
    found = json.loads(out.read_text()) if out.exists() else {}
    here = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    shown = Table("what", "median", "range", title=f"{device}, {here['threads']} threads")
    for group in groups or GROUPS:
        lines = GROUPS[group]()
        if not lines:
            continue  # what was measured elsewhere stays
        found[group] = {"on": here, "lines": lines}
        for name, line in lines.items():
            between = f"{line['from']:.2f} to {line['to']:.2f}" if "from" in line else ""
            shown.add_row(name, f"{line['value']:.3g}", between)
        out.write_text(json.dumps(found, indent=2) + "\n")
    Console(width=None if os.isatty(1) else 120).print(shown)


if __name__ == "__main__":
    typer.run(main)
