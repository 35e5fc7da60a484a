"""What was tried to be faster, by itself: python benchmarks/tried.py [some of it]. Half an hour; on a GPU as well, but
for what says CPU."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
import typer
from bench import Case, body, evaluate, masks_of, seconds, text, vision
from PIL import Image
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ablation_sweeps.data.batch import Batch
from ablation_sweeps.models.transformer import Transformer
from ablation_sweeps.neurons.hooks import ablated
from ablation_sweeps.neurons.statistics import Moments


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
        Transformer.max_positions_per_pass = size  # type: ignore[assignment,method-assign]
        evaluate(case, (0.5,))

    def show(name: str, case: Case, sizes: Sequence[int], rounds: int) -> None:
        took = in_turns(*(partial(at, size, case) for size in sizes), rounds=rounds)
        print(f"{name}: {', '.join(f'{size}: {s:.2f} s' for size, s in zip(sizes, took, strict=True))}")

    for model, tokens, length in (("tiny_causal", 8192, 64), ("tiny_causal", 8192, 256), ("smollm2_135m", 4096, 512)):
        case = text(model, tokens, length, "model.pack=concatenate", "batch_tokens=4096")
        show(f"positions at once, {model}, texts of {length}", case, (512, 1024, 2048, 4096), 3)
    show("images at once, DeiT-Tiny", vision("deit_tiny_patch16_224", 20, "float32", 4096), (5, 10, 20), 5)


def folded() -> None:
    """A point whose constants are folded into weight and bias of the projections, against hooks that write them."""
    case = one_batch("float32")
    batch, masks, values = point_of(case)
    changed = copy.deepcopy(case.model.module)
    for projection, mask, value in zip(case.projections, masks, values, strict=True):
        linear = changed.get_submodule(projection.path)
        linear.bias = nn.Parameter(linear.weight[:, mask] @ value[mask], requires_grad=False)
        linear.weight[:, mask] = 0

    def by_hooks() -> Tensor:
        with ablated(case.projections, masks, values, len(batch.names)):
            return case.model.logits(batch)

    def by_weights() -> Tensor:
        return changed(**batch.inputs, use_cache=False).logits

    with torch.inference_mode():
        apart = (by_hooks() - by_weights()).abs().max().item()
        hooks, weights = in_turns(by_hooks, by_weights, rounds=9)
    print(f"a point of SmolLM2-135M: {hooks:.2f} s by hooks, {weights:.2f} folded; logits {apart:.0e} apart at most")


def stacked() -> None:
    """Four points of one text in one pass, whose examples are masked each in its own way, against one by one."""
    for length in (16, 64, 256):
        one_by_one, at_once = four_points(text("smollm2_135m", length, length, "model.pack=concatenate").some(1))
        with torch.inference_mode():
            singly, together = in_turns(one_by_one, at_once, rounds=9)
        print(f"four points of one text of {length} tokens: {singly:.2f} s one by one, {together:.2f} at once")


def four_points(case: Case) -> tuple[Callable[[], None], Callable[[], None]]:
    batch, masks, values = point_of(case)
    four = Batch({key: x.expand(4, -1) for key, x in batch.inputs.items()}, batch.labels.expand(4, -1), None,
                 batch.names * 4, (0,) * 4)  # fmt: skip
    of_four = [torch.stack([mask.roll(i) for i in range(4)])[:, None] for mask in masks]  # [4, 1, neurons] a layer

    def one_by_one() -> None:
        for number in range(4):
            with ablated(case.projections, [mask[number, 0] for mask in of_four], values, 1):
                case.model.logits(batch)

    def at_once() -> None:
        with ablated(case.projections, of_four, values, 4):
            case.model.logits(four)

    return one_by_one, at_once


def point_of(case: Case) -> tuple[Batch, list[Tensor], list[Tensor]]:
    """A batch, half of the neurons, and some values."""
    device = case.model.device
    masks = [mask.to(device) for mask in masks_of(case, (0.5,))[0.5]]
    return case.batches[0].to(device), masks, [torch.full(mask.shape, 0.01, device=device) for mask in masks]


def main(names: Annotated[list[str] | None, typer.Argument(help="some of them; all, if none is named")] = None) -> None:
    for run in (in_parts, threads, halves, parts, folded, stacked, compiled):
        if not names or run.__name__ in names:
            run()


if __name__ == "__main__":
    typer.run(main)
