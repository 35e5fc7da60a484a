"""Writes the verdict on a study: which method does least damage."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from ablation_sweeps.base.terminal import counted
from ablation_sweeps.results.comparison import seen_from
from ablation_sweeps.results.study import StudyResult, of_calibration

if TYPE_CHECKING:
    pass

SHOWN_GROUPS = 5  # groups of methods that cannot be told apart, named in the verdict
COUNTED_GROUPS = 200  # limit when counting them: there may be millions


# Sentences


def verdict(study: StudyResult) -> str:
    """Say which method does least damage by the area under its loss, which cannot be told apart, and on what basis."""
    return " ".join([_said(study), *caveats(study)])


def _said(study: StudyResult) -> str:
    if len(study.methods) == 1:
        return f"Only {study.methods[0]} is finished: there is nothing to compare it with."
    compared = [method for method in study.methods if not math.isnan(study.area("loss", method).value)]
    if len(compared) < 2:
        return (
            "Not all methods have results on the same seeds and fractions, so that none is called the best; "
            "comparisons.csv compares each pair on what they share."
        )
    left = [method for method in study.methods if method not in compared]
    are = "is" if len(left) == 1 else "are"
    return _best(study, compared) + (
        f" {_listed(left)} {are} left out, for lack of results on the same seeds and fractions." if left else ""
    )


def _best(study: StudyResult, compared: Sequence[str]) -> str:
    height = {method: study.area("loss", method).value for method in compared}
    best, *others = ranked = sorted(compared, key=lambda method: height[method])
    pairs = {frozenset((row["method"], row["other"])): row for row in study.ranking.to_dict("records")}
    undecided = {pair for pair, row in pairs.items() if not row["better"]}
    tied = [other for other in others if {best, other} in undecided]
    closest = pairs[frozenset((best, (tied or others)[0]))]
    n_seeds, n_documents = int(study.ranking["n_seeds"].min()), int(study.ranking["n_documents"].min())
    loss = "the loss" if study.reach == 1 else f"the loss up to {100 * study.reach:.4g}%"
    basis = f"{counted(n_seeds, 'seed')}, {n_documents} {'images' if study.unit == 'image' else 'documents'}"
    alone = "" if n_seeds > 1 else " One seed: this may not hold for other neurons."
    together = [*islice(groups_of_tied(ranked, undecided), COUNTED_GROUPS)]
    if tied:
        return (
            f"{_cannot_be_told_apart(together)}: the area under {loss} of {best} differs from that of {tied[0]} by "
            f"{_interval(closest, best)} of the clean loss ({_p(closest['p_holm'])}; {basis})."
            f"{_who_beats_whom(ranked, pairs, together)}{alone}"
        )
    rest = f" {_cannot_be_told_apart(together)}." if together else ""
    return (
        f"{best} does the least damage: the area under {loss} is {height[best]:.3f} of the clean loss, against "
        f"{height[others[0]]:.3f} of {others[0]}, the next; difference {_interval(closest, best)} "
        f"({_p(closest['p_holm'])}; {basis}).{rest}{alone}"
    )


def _cannot_be_told_apart(groups: Sequence[Sequence[str]]) -> str:
    first, *more = map(_listed, groups[:SHOWN_GROUPS])
    said = f"{first} cannot be told apart" + "".join(f", nor can {group}" for group in more)
    if not (unsaid := len(groups) - SHOWN_GROUPS) > 0:
        return said
    number = f"{unsaid}" if len(groups) < COUNTED_GROUPS else f"{unsaid} or more"
    return f"{said}, nor can the methods of {number} other groups (comparisons.csv has all pairs)"


def groups_of_tied(ranked: Sequence[str], undecided: Collection[frozenset[str]]) -> Iterator[list[str]]:
    """Maximal groups of methods in which no two differ significantly, those of the best methods first.

    A method may be in several groups: two methods that do not differ from a third one may differ from each other.

    There may be very many groups, but each takes about as long to find as the previous one (algorithm of Johnson,
    Yannakakis and Papadimitriou), so stop iterating when you have enough.
    """
    places = range(len(ranked))
    tied = [{o for o in places if frozenset((ranked[place], ranked[o])) in undecided} - {place} for place in places]

    def largest(group: list[int]) -> tuple[int, ...]:
        """The group, extended by the best methods that can be added to it."""
        candidates = set(places).intersection(*(tied[place] for place in group))
        while candidates:
            group = [*group, min(candidates)]
            candidates &= tied[group[-1]]
        return tuple(sorted(group))

    waiting = [largest([])]
    known = set(waiting)
    while waiting:
        group = heapq.heappop(waiting)
        if len(group) > 1:
            yield [ranked[place] for place in group]
        for place in set(places).difference(group):
            better = [other for other in group if other < place]
            kept = [other for other in better if other in tied[place]]
            found = largest([*kept, place])
            # A group that can take in a better method is found from another group.
            if kept != better and [*kept, place] == [o for o in found if o <= place] and found not in known:
                known.add(found)
                heapq.heappush(waiting, found)


def _who_beats_whom(ranked: Sequence[str], pairs: Mapping[frozenset[str], Any], together: list[list[str]]) -> str:
    """Sentences on all significant differences, for the case that the best method is tied with others."""
    beaten: dict[str, tuple[str, ...]] = {}
    for method in ranked:
        versus = {other: pairs[frozenset((method, other))] for other in ranked if other != method}
        beaten[method] = tuple(other for other, row in versus.items() if row["better"] == method)
    said = ""
    for worse in dict.fromkeys(worse for worse in beaten.values() if worse):
        better = [method for method in ranked if beaten[method] == worse]
        who = _listed(better)
        if len(together) == 1 and better == together[0]:
            who = "Both" if len(better) == 2 else "All of these"
        said += f" {who} {'does' if len(better) == 1 else 'do'} less damage than {_listed(worse)}."
    return said


def caveats(study: StudyResult) -> list[str]:
    """Sentences on the limits of the numbers."""
    found = []
    if study.calibration:
        found.append(f"Statistics are {of_calibration(study.calibration)}.")
    if study.missing:
        lacking = ", ".join(f"{metric} ({_listed(methods)})" for metric, methods in study.missing.items())
        found.append(f"Not measured by every run, so compared only on those that have it: {lacking}.")
    return found


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _interval(row: dict[Any, Any], first: str) -> str:
    found = seen_from(row, first)
    return f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def _p(value: float) -> str:
    """The p-value after Holm's correction, in words."""
    return "p unknown" if math.isnan(value) else "Holm's p < 0.001" if value < 0.001 else f"Holm's p = {value:.3f}"
