"""Where the boxes and arrows of a layered drawing go (Sugiyama, Tagawa and Toda 1981), for graphs of some dozen levels.

Layers follow the run order, so that arrows mostly point up or down. An arrow that passes a layer takes a place in it, so
that it does not run through a box. Places within layers are swapped as long as that uncrosses arrows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import TypeAlias, final

from mlo import _structure
from mlo._structure import Declared

Place: TypeAlias = str | tuple[str, str, int]
"""A level, or where the arrows between two levels pass a layer."""

_SWEEPS = 24


@final
@dataclass(frozen=True)
class Layout:
    """`x` of the middle of every place, `layers` from the first to run (the bottom) to the last; `paths` by pair.

    A path leads from the first of a pair to the second through every layer between them; pairs are sorted by name.
    """

    x: Mapping[Place, float]
    layers: Sequence[Sequence[Place]]
    paths: Mapping[tuple[str, str], Sequence[Place]]
    width: float


def layout(levels: Mapping[str, Declared], *, box: float, lane: float, gap: float) -> Layout:
    """Places for boxes of width `box` and passing arrows of width `lane`, at least `gap` apart."""
    layer = _layers(levels)
    rows: list[list[Place]] = [[] for _ in range(max(layer.values()) + 1)]
    for name in sorted(levels):
        rows[layer[name]].append(name)
    paths: dict[tuple[str, str], tuple[Place, ...]] = {}
    for one, two in sorted(
        {_pair(level.name, read) for level in levels.values() for read in _structure.reads(level)[1:]}
    ):
        low, high = sorted((one, two), key=lambda name: layer[name])
        passed: list[Place] = [(one, two, number) for number in range(layer[low] + 1, layer[high])]
        for place, number in zip(passed, range(layer[low] + 1, layer[high]), strict=True):
            rows[number].append(place)
        paths[one, two] = (low, *passed, high) if low == one else (high, *reversed(passed), low)
    links = [link for path in paths.values() for link in pairwise(path)]
    _uncross(rows, links)
    widths = {place: box if isinstance(place, str) else lane for row in rows for place in row}
    x = _positions(rows, links, widths, gap)
    left = min(x[place] - widths[place] / 2 for place in x)
    right = max(x[place] + widths[place] / 2 for place in x)
    return Layout({place: middle - left for place, middle in x.items()}, rows, paths, right - left)


def _pair(one: str, two: str) -> tuple[str, str]:
    return (one, two) if one < two else (two, one)


def _layers(levels: Mapping[str, Declared]) -> dict[str, int]:
    """A level stands above all that it is subject to, and above all it is given that ran before it."""
    order = _structure.run_order(levels.values())
    layer: dict[str, int] = {}
    for name in order:
        level = levels[name]
        below = [layer[read] for read in (*level.given, *level.subject_to) if read in layer]
        layer[name] = max(below, default=-1) + 1
    for name in order:  # an upper level tops all it moves after, listed or not
        if levels[name].subject_to:
            players = {one for low in levels[name].subject_to for one in levels[low].against if one in layer}
            layer[name] = max([layer[name], *(layer[one] + 1 for one in players if one != name)])
    return layer


def _uncross(rows: list[list[Place]], links: Sequence[tuple[Place, Place]]) -> None:
    """Swap two places of a row as long as that improves the drawing."""
    best = _cost(rows, links)
    improved = True
    while improved and best > 0:
        improved = False
        for row in rows:
            for one, two in combinations(range(len(row)), 2):
                row[one], row[two] = row[two], row[one]
                cost = _cost(rows, links)
                if cost < best:
                    best, improved = cost, True
                else:
                    row[one], row[two] = row[two], row[one]


def _cost(rows: Sequence[Sequence[Place]], links: Sequence[tuple[Place, Place]]) -> float:
    """Crossings, boxes between players of one row, and a little for the sideways length of arrows."""
    at = {place: (number, position) for number, row in enumerate(rows) for position, place in enumerate(row)}
    middle = {place: position - (len(rows[number]) - 1) / 2 for place, (number, position) in at.items()}
    ends = [sorted((at[one], at[two])) for one, two in links]
    between = [low for low, high in ends if low[0] == high[0] and high[1] - low[1] > 1]
    return (
        sum(_cross(one, two) for one, two in combinations(ends, 2))
        + len(between)
        + 1e-3 * sum((middle[one] - middle[two]) ** 2 for one, two in links)
    )


def _cross(one: Sequence[tuple[int, int]], two: Sequence[tuple[int, int]]) -> bool:
    (low_one, high_one), (low_two, high_two) = one, two
    rows = (low_one[0], high_one[0]) == (low_two[0], high_two[0]) and low_one[0] != high_one[0]
    return rows and (low_one[1] - low_two[1]) * (high_one[1] - high_two[1]) < 0


def _positions(
    rows: Sequence[Sequence[Place]], links: Sequence[tuple[Place, Place]], widths: Mapping[Place, float], gap: float
) -> dict[Place, float]:
    """Each place near the mean of those it is linked to, in the order of its row and no nearer than it may be."""
    x: dict[Place, float] = {}
    for row in rows:
        x |= _spread(row, [0.0] * len(row), widths, gap)
    for sweep in range(_SWEEPS):
        for row in rows if sweep % 2 else reversed(rows):
            members = set(row)
            wanted: list[float] = []
            for place in row:
                near = [x[other] for other in _linked(place, links) if other not in members]
                wanted.append(sum(near) / len(near) if near else x[place])
            x |= _spread(row, wanted, widths, gap)
    return x


def _linked(place: Place, links: Sequence[tuple[Place, Place]]) -> Iterator[Place]:
    for one, two in links:
        if place in (one, two):
            yield two if place == one else one


def _spread(
    row: Sequence[Place], wanted: Sequence[float], widths: Mapping[Place, float], gap: float
) -> dict[Place, float]:
    """The positions closest to `wanted` (least squares) that keep the order and the distances: pool what collides."""
    offsets, here = list[float](), 0.0
    for number, place in enumerate(row):
        here += (widths[row[number - 1]] + widths[place]) / 2 + gap if number else 0.0
        offsets.append(here)
    blocks: list[tuple[float, int]] = []  # mean of what remains to be wished for, and how many places share it
    for want, offset in zip(wanted, offsets, strict=True):
        blocks.append((want - offset, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (mean, count), (other, more) = blocks[-2:]
            blocks[-2:] = [((mean * count + other * more) / (count + more), count + more)]
    means = [mean for mean, count in blocks for _ in range(count)]
    return {place: mean + offset for place, mean, offset in zip(row, means, offsets, strict=True)}
