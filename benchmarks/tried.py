"""What was tried to be faster, by itself: python benchmarks/tried.py. A quarter of an hour; torch.compile takes one."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
import typer
from bench import Case, body, evaluate, seconds, text, vision
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from ablation_sweeps.activations import Moments
from ablation_sweeps.transformer import Transformer


def in_turns(*runs: Callable[[], Any], rounds: int = 5) -> list[float]:
    """Median seconds of each."""
    for run in runs:
        run()
    times = [[seconds(run) for run in runs] for _ in range(rounds)]
    return [statistics.median(of_one) for of_one in zip(*times, strict=True)]


def one_batch(dtype: str) -> Case:
    return text("smollm2_135m", 1024, 512, f"model.dtype={dtype}").some(1)


def compiled() -> None:
    case = one_batch("float32")
    fast_body = torch.compile(case.model.module.base_model, dynamic=False)
    run = torch.inference_mode()(lambda: fast_body(**case.batches[0].inputs, use_cache=False))
    first = seconds(run)
    plain, fast = in_turns(lambda: body(case), run)
    print(f"torch.compile, SmolLM2-135M's body: {fast:.2f} s a batch, {plain:.2f} without; the first one {first:.0f} s")


def in_parts() -> None:
    x = torch.randn(2048, 1024)
    whole, parts = in_turns(lambda: Moments.of(x), lambda: [Moments.of(some) for some in x.split(256)], rounds=30)
    per = 1e9 / x.numel()
    print(
        f"moments of 2,048 x 1,024 values: {whole * per:.1f} ns a value at once, {parts * per:.1f} in parts of 256 rows"
    )


def threads() -> None:
    encoder = vision("deit_tiny_patch16_224", 2, "float32").model.encode
    noise = np.random.default_rng(0).integers(0, 256, (32, 256, 341, 3), dtype=np.uint8)
    pictures = [Image.fromarray(pixels) for pixels in noise]

    def two() -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(encoder.transform, pictures))  # type: ignore[attr-defined]

    one, both = in_turns(lambda: [encoder.transform(picture) for picture in pictures], two)  # type: ignore[attr-defined]
    print(f"a picture's transform: {one / 32 * 1000:.1f} ms, by two threads {both / 32 * 1000:.1f}")


def halves() -> None:
    """Seconds of the multiplications of matrices and of attention, in each dtype."""
    for dtype in ("float32", "bfloat16"):
        case = one_batch(dtype)
        body(case)
        with profile(activities=[ProfilerActivity.CPU]) as found:
            took = seconds(partial(body, case))
        own = {event.key: event.self_cpu_time_total / 1e6 for event in found.key_averages()}
        attention = sum(t for key, t in own.items() if "scaled_dot_product" in key)
        matrices = own["aten::mm"]
        print(f"SmolLM2-135M's body in {dtype}: {took:.2f} s, matrices {matrices:.2f}, attention {attention:.2f}")


def parts() -> None:
    """A clean pass and a point of batches of 4,096 positions, by how much of them is in one pass."""

    def at(size: int, case: Case) -> None:
        Transformer.at_once = size  # type: ignore[assignment,method-assign]
        evaluate(case, (0.5,))

    def show(name: str, case: Case, sizes: Sequence[int], rounds: int) -> None:
        took = in_turns(*(partial(at, size, case) for size in sizes), rounds=rounds)
        print(f"{name}: {', '.join(f'{size}: {s:.2f} s' for size, s in zip(sizes, took, strict=True))}")

    for model, tokens, length in (("tiny_causal", 8192, 64), ("tiny_causal", 8192, 256), ("smollm2_135m", 4096, 512)):
        case = text(model, tokens, length, "model.pack=concatenate", "batch_tokens=4096")
        show(f"positions at once, {model}, texts of {length}", case, (512, 1024, 2048, 4096), 3)
    show("images at once, DeiT-Tiny", vision("deit_tiny_patch16_224", 20, "float32", 4096), (5, 10, 20), 5)


def main() -> None:
    for run in (in_parts, threads, halves, parts, compiled):
        run()


if __name__ == "__main__":
    typer.run(main)
