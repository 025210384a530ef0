"""Reverse accumulation over responses: the one walk from cotangents on them to what arrives at the levels above."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mlo import _tree
from mlo._errors import GraphError, Mistake

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
    for name in reversed(list(responses)):
        response = responses[name]
        if name not in arrived and any(name in responses[reader].around.live for reader in idle):
            idle.add(name)
            continue
        if name not in arrived:
            if upper not in targets:
                continue  # what it reaches was asked for before, and found
            reason = f"'{name}' is read neither by the objective nor by another level that is listed"
            raise GraphError([Mistake(upper, "subject_to", f"{reason}; its part would be a silent zero")])
        if not response.around.live and upper not in targets:
            continue
        if tally is not None:
            tally.pullbacks.append((upper, name))
        upstream = response.level.hypergradient.pullback(response, arrived[name])
        for read, cotangent in upstream.items():
            if read in targets:
                through.setdefault(name, {})[read] = cotangent
            elif read in responses:
                known = arrived.get(read)
                arrived[read] = cotangent if known is None else _tree.add(known, cotangent)
        if not response.steps and response.level.hypergradient.cost(0, response.size) == (0, 0):
            idle.add(name)
        elif upper in targets and not any(read in targets or read in responses for read in upstream):
            reason = f"the response of '{name}' does not reach back to '{upper}': its objective does not depend on it"
            raise GraphError([Mistake(upper, "subject_to", reason)])
    return through
