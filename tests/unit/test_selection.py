"""Masks: exact, nested, the same for every method and every schedule."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import ValidationError

from ablation_sweeps.neurons.selection import Random, Schedule, granularity, masks

CONF = Path(__file__).resolve().parents[2] / "conf" / "fraction"
WIDTHS = [64, 64, 48, 7]
FIRST_OF_SEED_0_LAYER_0_WIDTH_64 = [9, 11, 37, 5, 22]


def orders(seed: int = 0, widths: list[int] = WIDTHS):
    return Random(label="random").orders(widths, seed)


def schedule(name: str) -> list[float]:
    return yaml.safe_load((CONF / f"{name}.yaml").read_text())["values"]


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.1, 0.3, 1 / 3, 0.5, 0.7, 0.95, 0.999, 1.0])
def test_exactly_the_fraction_is_ablated_in_each_layer(fraction):
    assert [int(m.sum()) for m in masks(orders(), fraction)] == [round(fraction * n) for n in WIDTHS]


def test_one_is_all_even_where_a_step_is_no_whole_number():
    assert [int(m.sum()) for m in masks(orders(widths=[576]), 1.0)] == [576]  # the paper's code stops at 570
    assert [int(m.sum()) for m in masks(orders(widths=[576]), 0.1)] == [58]


def test_each_order_names_every_neuron_once():
    for order, width in zip(orders(), WIDTHS, strict=True):
        assert sorted(order.tolist()) == list(range(width))


def test_growing_fractions_are_nested():
    steps = [masks(orders(3), fraction) for fraction in [0.0, *schedule("twentieths")]]
    for smaller, larger in itertools.pairwise(steps):
        assert all((a <= b).all() for a, b in zip(smaller, larger, strict=True))


def test_schedules_agree_where_they_meet():
    tenths, twentieths, half = schedule("tenths"), schedule("twentieths"), schedule("half")
    assert set(half) < set(tenths) < set(twentieths)
    assert tenths == sorted(tenths) and len(tenths) == 10 and tenths[-1] == 1.0
    for i, tenth in enumerate(tenths):
        a, b = masks(orders(), tenth), masks(orders(), twentieths[2 * i + 1])
        assert all(map(torch.equal, a, b))


def test_one_seed_one_mask():
    assert all(map(torch.equal, orders(5), orders(5)))


def test_the_global_random_state_is_neither_used_nor_touched():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = orders(5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert all(map(torch.equal, first, orders(5)))


def test_seeds_and_layers_differ():
    firsts = {tuple(order.tolist()) for seed in range(20) for order in orders(seed, [64, 64, 64])}
    assert len(firsts) == 60


def test_a_layer_does_not_depend_on_the_others():
    assert torch.equal(orders(0, [64, 64])[1], orders(0, [8, 64, 32])[1])


def test_masks_of_different_seeds_are_unrelated():
    """Two random halves of 1000 neurons share 250 on average, with a standard deviation of about 8."""
    halves = [masks(orders(seed, [1000]), 0.5)[0] for seed in range(12)]
    shared = [int((a & b).sum()) for i, a in enumerate(halves) for b in halves[:i]]
    assert min(shared) > 215 and max(shared) < 285
    each = torch.stack(halves).sum(0)
    assert each.min() >= 0 and each.max() <= 12 and abs(each.float().mean() - 6) < 1e-6


def test_golden_masks_never_change_silently():
    assert orders()[0][:5].tolist() == FIRST_OF_SEED_0_LAYER_0_WIDTH_64


def test_a_schedule_is_sorted_without_zero_or_repeats():
    assert Schedule(values=(0.5, 0.1, 0.5, 0, 1)).values == (0.1, 0.5, 1.0)


@pytest.mark.parametrize("value", [-0.1, 1.0001, 10, float("nan"), float("inf")])
def test_a_fraction_outside_of_its_range_is_refused_with_a_hint(value):
    with pytest.raises(ValidationError, match=r"outside \[0, 1\].*0\.5 for half"):
        Schedule(values=(0.5, value))


@pytest.mark.parametrize("values", [(), ("half",), 0.5, None])
def test_what_is_no_list_of_numbers_is_refused(values):
    with pytest.raises(ValidationError):
        Schedule(values=values)


def test_granularity_is_that_of_what_is_ablated():
    by_head = torch.tensor([2, 0, 3, 1])[:, None] * 6 + torch.tensor([5, 0, 1, 4, 2, 3])  # four heads of six neurons
    orders, unordered = [by_head.flatten()] * 2, Random(label="random").orders([24, 24], 0)
    assert granularity(orders, (0.25, 0.5, 1.0), 4) == "head"
    assert granularity(orders, (0.1, 0.5), 4) == "neuron"  # 2 of 24: a part of a head
    assert granularity([*orders, unordered[0]], (0.5,), 4) == granularity(unordered, (0.5, 1.0), 4) == "neuron"
    assert granularity(orders, (0.5,), None) == granularity(orders, (0.5,), 24) == "neuron"
