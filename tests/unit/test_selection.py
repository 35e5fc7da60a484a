"""Which units are ablated: exact numbers, nested, the same for every method, and the order that each rule promises."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import yaml
from examples import random_masks, selecting_of
from pydantic import ValidationError
from torch import nn

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.neurons.hooks import Projection
from ablation_sweeps.neurons.schedule import Each, Fractions, Point
from ablation_sweeps.neurons.units import Unit
from ablation_sweeps.selections.listed import Listed
from ablation_sweeps.selections.random import Random

CONF = Path(__file__).resolve().parents[2] / "conf" / "fraction"
WIDTHS = [64, 64, 48, 7]
FIRST_OF_SEED_0_LAYER_0_WIDTH_64 = [9, 11, 37, 5, 22]


def layers(widths: list[int] = WIDTHS, **heads: int) -> list[Projection]:
    return [Projection(f"{i}", nn.Identity(), n, "s", layer=i, order=i, **heads) for i, n in enumerate(widths)]


def masks(fraction: float, seed: int = 0, widths: list[int] = WIDTHS) -> list[torch.Tensor]:
    (found,) = random_masks(layers(widths), [fraction], seed).values()
    return found


def schedule(name: str) -> list[float]:
    return yaml.safe_load((CONF / f"{name}.yaml").read_text())["values"]


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.3, 1 / 3, 0.5, 0.7, 0.95, 0.999, 1.0])
def test_exactly_the_fraction_is_ablated_in_each_layer(fraction):
    assert [int(m.sum()) for m in masks(fraction)] == [round(fraction * n) for n in WIDTHS]


def test_one_is_all_even_where_a_step_is_no_whole_number():
    assert [int(m.sum()) for m in masks(1.0, widths=[576])] == [576]  # the paper's code stops at 570
    assert [int(m.sum()) for m in masks(0.1, widths=[576])] == [58]


def test_growing_fractions_are_nested():
    steps = [masks(fraction, seed=3) for fraction in schedule("twentieths")]
    for smaller, larger in itertools.pairwise(steps):
        assert all((a <= b).all() for a, b in zip(smaller, larger, strict=True))


def test_schedules_agree_where_they_meet():
    tenths, twentieths, half = schedule("tenths"), schedule("twentieths"), schedule("half")
    assert set(half) < set(tenths) < set(twentieths)
    assert tenths == sorted(tenths) and len(tenths) == 10 and tenths[-1] == 1.0


def test_the_global_random_state_is_neither_used_nor_touched():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = masks(0.5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert all(map(torch.equal, first, masks(0.5)))


def test_seeds_and_layers_differ():
    found = {tuple(mask.tolist()) for seed in range(20) for mask in masks(0.5, seed, [64, 64, 64])}
    assert len(found) == 60


def test_a_layer_does_not_depend_on_the_others():
    assert torch.equal(masks(0.5, widths=[64, 64])[1], masks(0.5, widths=[8, 64, 32])[1])
    alone = layers([8, 64])[1:]
    assert torch.equal(masks(0.5, widths=[64, 64])[1], random_masks(alone, [0.5])[Point(0.5)][0])


def test_masks_of_different_seeds_are_unrelated():
    """Two random halves of 1000 neurons share 250 on average, with a standard deviation of about 8."""
    halves = [masks(0.5, seed, [1000])[0] for seed in range(12)]
    shared = [int((a & b).sum()) for i, a in enumerate(halves) for b in halves[:i]]
    assert min(shared) > 215 and max(shared) < 285
    each = torch.stack(halves).sum(0)
    assert each.min() >= 0 and each.max() <= 12 and abs(each.float().mean() - 6) < 1e-6


def test_golden_masks_never_change_silently():
    first_five = [set(masks(n / 64)[0].nonzero()[:, 0].tolist()) for n in range(1, 6)]
    assert first_five == [set(FIRST_OF_SEED_0_LAYER_0_WIDTH_64[:n]) for n in range(1, 6)]


def test_a_schedule_is_sorted_without_zero_or_repeats():
    assert Fractions(values=(0.5, 0.1, 0.5, 0, 1)).values == (0.1, 0.5, 1.0)


@pytest.mark.parametrize("value", [-0.1, 1.0001, 10, float("nan"), float("inf")])
def test_a_fraction_outside_of_its_range_is_refused_with_a_hint(value):
    with pytest.raises(ValidationError, match=r"outside \[0, 1\].*0\.5 for half"):
        Fractions(values=(0.5, value))


@pytest.mark.parametrize("values", [(), ("half",), 0.5, None])
def test_what_is_no_list_of_numbers_is_refused(values):
    with pytest.raises(ValidationError):
        Fractions(values=values)


# Units


def test_heads_and_groups_are_whole_at_every_fraction():
    projections = layers([48, 48], n_heads=8, n_kv_heads=2)
    for name, size in (("head", 6), ("kv_group", 24)):
        units = Unit(name=name).partition(projections)
        assert len(units) == 96 // size
        for fraction in schedule("twentieths"):
            points = Fractions(values=(fraction,)).points(
                Random(label="random").orders(selecting_of(projections, units)), len(units)
            )
            for mask in units.masks(points[Point(fraction)]):
                of_units = mask.view(-1, size)
                assert torch.equal(of_units.all(1), of_units.any(1))
                assert int(of_units.all(1).sum()) == round(fraction * 48 / size)


def test_a_layer_unit_is_both_sites_of_its_layer_and_needs_no_share():
    projections = [*layers([4, 4])]
    projections = [p for pair in zip(projections, layers([6, 6]), strict=True) for p in pair]
    units = Unit(name="layer").partition(projections)
    assert len(units) == 2
    assert [mask.tolist() for mask in units.masks(torch.tensor([1]))] == [
        [False] * 4,
        [False] * 6,
        [True] * 4,
        [True] * 6,
    ]
    with pytest.raises(UserError, match=r"selection\.within=layer"):
        Random(label="random", within="layer").orders(selecting_of(projections, units))
    (order,) = Random(label="random").orders(selecting_of(projections, units))
    assert sorted(order.tolist()) == [0, 1]


def test_units_without_heads_are_refused_in_one_line():
    with pytest.raises(UserError, match=r"unit=head: 0 .*no attention over heads.*unit=neuron"):
        Unit(name="head").partition(layers())
    with pytest.raises(UserError, match=r"unit=kv_group: 0 .*unknown number of key/value heads"):
        Unit(name="kv_group").partition(layers([64], n_heads=4))
    with pytest.raises(UserError, match=r"cannot be divided"):
        Unit(name="head").partition(layers([7], n_heads=4))


def test_within_the_model_layers_may_lose_different_shares():
    projections = layers([40, 40])
    units = Unit(name="neuron").partition(projections)
    (order,) = Random(label="random", within="model").orders(selecting_of(projections, units))
    assert sorted(order.tolist()) == list(range(80))
    lost = [int(mask.sum()) for mask in units.masks(order[:40])]
    assert sum(lost) == 40 and lost != [20, 20]


def test_each_ablates_every_unit_once_and_alone():
    projections = layers([4, 3])
    units = Unit(name="neuron").partition(projections)
    points = Each().points(Random(label="random").orders(selecting_of(projections, units)), len(units))
    assert [point.unit for point in points] == list(range(7)) and {point.fraction for point in points} == {1 / 7}
    assert all(numbers.tolist() == [point.unit] for point, numbers in points.items())


# Lists


def listed(units: object) -> list[int]:
    projections = layers([48, 48], n_heads=8)
    (order,) = Listed(label="listed", units=units).orders(
        selecting_of(projections, Unit(name="head").partition(projections))
    )
    return order.tolist()


def test_listed_units_are_those_of_the_list_in_its_order(tmp_path):
    assert listed([[1, 2], [0, 7], [1, 0]]) == [10, 7, 8]
    for text in ("1,2\n0,7\n1 0\n", "[[1,2],[0,7],[1,0]]"):
        (tmp_path / "units").write_text(text)
        assert listed(str(tmp_path / "units")) == [10, 7, 8]


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([[0, 8]], "no head 8 in layer 0; layer 0 has 8"),
        ([[2, 0]], "there is no layer 2"),
        ([[0, 1], [0, 1]], "listed twice"),
    ],
)
def test_a_unit_that_is_not_there_is_refused(units, message):
    with pytest.raises(UserError, match=message):
        listed(units)


@pytest.mark.parametrize("units", ["nowhere.txt", [], [[0]], [[-1, 0]], [["a", 0]]])
def test_what_lists_no_units_is_refused(units):
    with pytest.raises(ValidationError):
        listed(units)


def test_a_list_in_a_file_enters_the_signature_by_its_content(job_of, tmp_path):
    """A file that is edited gives another result, under another signature."""
    file = tmp_path / "units.txt"
    signatures = []
    for text in ("0,1\n", "0,2\n"):
        file.write_text(text)
        job = job_of("selection=listed", f"selection.units={file}")
        signatures.append(job.signature)
        assert job.config["selection"]["units"] == [[0, int(text[2])]]
    typed = job_of("selection=listed", "selection.units=[[0,2]]")
    assert len({*signatures}) == 2 and typed.signature == signatures[1]
