"""Time against number of points, tokens and layers, as lines: python benchmarks/linear.py. A quarter of an hour."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import typer
from bench import GPU, ROOT, TENTHS, Case, evaluate, seconds, shaped_like, text
from matplotlib.figure import Figure

from ablation_sweeps.report.figures import save

ROUNDS = 5
HALF = (0.5,)


def layers(n: int) -> Case:
    """Wide layers and few tokens to choose from, so that what is outside of the layers does not count."""
    from transformers import LlamaConfig

    config = LlamaConfig(vocab_size=4096, hidden_size=512, intermediate_size=1536, num_attention_heads=8,
                         num_hidden_layers=n, tie_word_embeddings=True)  # fmt: skip
    return shaped_like(config, 2_000, 256, "float32")


def works() -> dict[str, dict[int, Callable[[], object]]]:
    """What is timed, by its size."""
    tiny = text("tiny_causal", 8_000, 256)
    some = {part.n: part for part in (tiny.some(len(tiny.batches) // share) for share in (8, 4, 2, 1))}
    small = tiny.some(len(tiny.batches) // 4)
    deep = {n: layers(n) for n in (2, 4, 8, 16)}
    return {
        "passes (points and the clean one)": {
            n + 1: lambda n=n: evaluate(small, [i / 40 for i in range(1, n + 1)]) for n in (5, 10, 20, 40)
        },
        "tokens": {n: lambda part=part: evaluate(part, HALF) for n, part in some.items()},
        "layers": {n: lambda case=case: evaluate(case, TENTHS[:3]) for n, case in deep.items()},
    }


def measured(runs: dict[int, Callable[[], object]]) -> dict[int, list[float]]:
    """Seconds of each size, one after the other in every round."""
    for run in runs.values():
        run()
    rounds = [{size: seconds(run) for size, run in runs.items()} for _ in range(ROUNDS)]
    return {size: [of_round[size] for of_round in rounds] for size in runs}


def line(times: dict[int, list[float]]) -> tuple[Callable[[float], float], float]:
    """The straight line through the medians, and by which share they lie off it at most."""
    median = {size: statistics.median(t) for size, t in times.items()}
    slope, start = statistics.linear_regression(list(median), list(median.values()))
    at = lambda size: start + slope * size  # noqa: E731
    return at, max(abs(at(size) / t - 1) for size, t in median.items())


def draw(found: dict[str, dict[int, list[float]]], path: Path) -> None:
    figure = Figure(figsize=(6.75, 2.2), layout="constrained")
    for axes, (what, times) in zip(figure.subplots(1, 3), found.items(), strict=True):
        at, off = line(times)
        axes.plot([0, max(times)], [at(0), at(max(times))], color="0.7", lw=1, label="straight line")
        for size, t in times.items():
            axes.plot([size] * len(t), t, ".", color="0.4", ms=3)
        medians = [statistics.median(t) for t in times.values()]
        axes.plot(list(times), medians, "o", color="#0072b2", ms=4, label=f"median of {ROUNDS}")
        axes.set(xlabel=what, xlim=(0, None), ylim=(0, None))
        axes.set_title(f"at most {off:.0%} off the line", loc="left", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.label.set_size(8)
    figure.axes[0].set_ylabel("seconds", fontsize=8)
    figure.axes[0].legend(frameon=False, fontsize=7)
    save(figure, path, path.suffix[1:])


def main(out: Path = ROOT / "benchmarks" / "linear.json") -> None:
    """Writes the times, and a figure beside them."""
    found = {}
    for what, runs in works().items():
        found[what] = measured(runs)
        print(f"{what}: at most {line(found[what])[1]:.1%} off a straight line")
    device = torch.cuda.get_device_name() if GPU else "cpu"
    about = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    out.write_text(json.dumps({**about, "seconds": found}, indent=2) + "\n")
    draw(found, out.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
