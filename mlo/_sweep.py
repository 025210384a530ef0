"""Reverse accumulation over responses: the one walk from cotangents on them to what arrives at the levels above."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import TYPE_CHECKING

from mlo import _tree
from mlo._errors import GraphError, Mistake
from mlo._joint import JointResponse
from mlo._step import joined

if TYPE_CHECKING:
    from mlo._response import Response
    from mlo._state import Tally
    from mlo._types import Tree, Upstream


def sweep(
    upper: str,
    responses: Mapping[str, Response],
    cotangents: Upstream,
    tally: Tally | None,
    towards: tuple[str, ...] | None = None,
) -> dict[str, dict[str, Tree]]:
    """What arrives over the response of each level as the last arrow: by that level, and by the level it arrives at.

    `responses` are those that `upper` differentiates through, each after all that its response depends on. They are
    walked in reverse, cotangents are added where arrows meet, one pullback each, noted in `tally`. `towards` are the
    levels asked for, `upper` itself if nothing is said. Raises `GraphError` for a level that nothing reads, or, where
    `upper` itself is asked for, whose response does not reach back.
    """
    targets = (upper,) if towards is None else towards
    arrived = dict(cotangents)
    through: dict[str, dict[str, Tree]] = {}
    idle: set[str] = set()  # pass nothing on: their method costs nothing without steps, and there are none
    for unit in _units(upper, responses):
        if arrived.keys().isdisjoint(unit):
            if any(set(unit) & set(responses[reader].around.live) for reader in idle):
                idle.update(unit)
                continue
            if upper not in targets:
                continue  # what it reaches was asked for before, and found
            reason = f"'{unit[0]}' is read neither by the objective nor by another level that is listed"
            raise GraphError([Mistake(upper, "subject_to", f"{reason}; its part would be a silent zero")])
        if upper not in targets and not {read for player in unit for read in responses[player].around.live} - set(unit):
            continue
        if tally is not None:
            for player in unit:
                tally.pullbacks.append((upper, player))
                if player in arrived:
                    tally.cotangents[upper, player] = arrived[player]
        reached = upper not in targets
        for read, cotangent in _pulled(unit, responses, arrived).items():
            if read in targets:
                through.setdefault("+".join(unit), {})[read] = cotangent
                reached = True
            elif read in responses:
                known = arrived.get(read)
                arrived[read] = cotangent if known is None else _tree.add(known, cotangent)
                reached = True
        first = responses[unit[0]]
        if not first.steps and first.level.hypergradient.cost(0, first.size) == (0, 0):
            idle.update(unit)
        elif not reached:
            reason = (
                f"the response of '{unit[0]}' does not reach back to '{upper}': its objective does not depend on it"
            )
            raise GraphError([Mistake(upper, "subject_to", reason)])
    return through


def _pulled(unit: tuple[str, ...], responses: Mapping[str, Response], arrived: Mapping[str, Tree]) -> Upstream:
    """The pullback of one response, or of those of a game together; a player that nothing reads has no cotangent."""
    method = responses[unit[0]].level.hypergradient
    if len(unit) == 1:
        return method.pullback(responses[unit[0]], arrived[unit[0]])
    players = {name: responses[name] for name in unit}
    ends = {name: response.end.variables for name, response in players.items()}
    weights = {name: arrived[name] if name in arrived else _tree.zeros(end) for name, end in ends.items()}
    return method.pullback(JointResponse(players), joined(weights))


_IS_JOINT = attrgetter("level.hypergradient.is_joint")


def _units(upper: str, responses: Mapping[str, Response]) -> list[tuple[str, ...]]:
    """The responses in the order of the sweep; the players of a game that are pulled back together are one unit."""
    waiting = list(responses)[::-1]
    if not any(map(_IS_JOINT, responses.values())):
        return [(name,) for name in waiting]
    unit_of = {name: _players(name, responses) for name in responses}
    if all(len(unit) == 1 for unit in unit_of.values()):
        return [(name,) for name in waiting]
    found: list[tuple[str, ...]] = []
    while waiting:
        ready = (unit_of[name] for name in waiting if not _read_by_others(unit_of[name], waiting, responses))
        unit = next(ready, None)
        if unit is None:
            reason = f"{', '.join(waiting)}: one player of a game reaches another through a level between them"
            raise GraphError([Mistake(upper, "subject_to", reason)])
        found.append(unit)
        waiting = [name for name in waiting if name not in unit]
    return found


def _players(name: str, responses: Mapping[str, Response]) -> tuple[str, ...]:
    """The level and those it plays against, if they are pulled back together."""
    level = responses[name].level
    if not level.hypergradient.is_joint:
        return (name,)
    met, waiting = {name}, [name]
    while waiting:
        new = [other for other in responses[waiting.pop()].level.against if other in responses and other not in met]
        met.update(new)
        waiting += new
    return tuple(other for other in responses if other in met)


def _read_by_others(unit: tuple[str, ...], waiting: list[str], responses: Mapping[str, Response]) -> bool:
    return any(set(unit) & set(responses[reader].around.live) for reader in waiting if reader not in unit)
