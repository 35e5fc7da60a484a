"""How methods are displayed: their order, colours, markers and line styles."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ablation_sweeps.base.terminal import counted

if TYPE_CHECKING:
    from pandas import DataFrame

# The palette of Okabe and Ito, safe for the colour-blind, without its yellow, which is too pale for a line on white.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#8C6D1F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)))
# These methods look the same in all figures. Others get a style by a hash of their name: if possible, one with a
# colour that is not yet in the figure, and not one that readers know as that of another method.
PLACES = {"zero": 0, "mean": 1, "median": 2, "peak": 3, "resample": 4, "resample-random_input": 6}
FAMILIAR = [PLACES[method] for method in ("zero", "mean", "peak", "resample")]
GREY = "#6E6E6E"
WIDTH = 7.2  # inches
RC: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "svg.fonttype": "path",  # looks the same where our font is missing
    "pdf.fonttype": 42,  # TrueType, embedded: publishers refuse Type 3
    "svg.hashsalt": "ablation-sweeps",  # the same rows give the same file
}
UNITS = {"kv_group": "key/value group"}  # names of units for people, where they differ from the option


def scored(kind: str) -> str:
    """The unit that a kind of model is scored on: "token" or "image"."""
    return "image" if kind == "image_classifier" else "token"


def units_of(rows: DataFrame) -> str:
    """The units that are ablated in the rows of a study: "neurons", "heads", ..."""
    kind = str(rows["unit"].iloc[0]) if "unit" in rows else "neuron"
    return f"{UNITS.get(kind, kind)}s"


def units_said(kind: str, number: int) -> str:
    """A number of units, in words: "1 head", "12 key/value groups"."""
    return counted(number, UNITS.get(kind, kind))


def display_order(methods: Iterable[str]) -> list[str]:
    """Sort methods: known ones first, in the order of PLACES, then the others by name."""
    known = list(PLACES)
    return sorted(methods, key=lambda name: (known.index(name) if name in known else len(known), name))


def method_styles(methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line style of each method."""
    free, used, found = list(range(len(COLOURS) * len(DASHES))), Counter[int](), {}
    for method in display_order(methods):
        wanted = PLACES.get(method, int.from_bytes(hashlib.sha256(method.encode()).digest()[:4], "big"))
        place = min(free, key=lambda place: _style_cost(place, wanted, method in PLACES, used))
        if len(free) > 1:
            free.remove(place)
        used[place % len(COLOURS)] += 1
        i, turn = place % len(COLOURS), place // len(COLOURS)
        marker = MARKERS[(i + 3 * turn) % len(MARKERS)]
        found[method] = {"color": COLOURS[i], "marker": marker, "linestyle": DASHES[turn]}
    return found


def _style_cost(place: int, wanted: int, known: bool, used: Counter[int]) -> tuple[int, bool, int]:
    """How badly a style fits a method; the style with the lowest cost is used."""
    colour, distance = place % len(COLOURS), (place - wanted) % (len(COLOURS) * len(DASHES))
    return (0, False, distance) if known else (used[colour], colour in FAMILIAR, distance)
