"""Glob patterns over the names of a level's parameters: `*.bias`, `encoder.*`. Where several match, the first one wins."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from functools import lru_cache


@lru_cache(maxsize=256)
def assigned(patterns: tuple[str, ...], names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """By pattern, the names it wins, in their order; what none matches stands under ''. Empty ones are left out.

    A level that is a single tensor has the name '', which `*` matches.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        winner = next((pattern for pattern in patterns if fnmatchcase(name, pattern)), "")
        found[winner] = (*found.get(winner, ()), name)
    return found


def unmatched(patterns: Iterable[str], names: Collection[str]) -> dict[str, str]:
    """By pattern, what to say of each that matches no name at all."""
    listed = ", ".join(sorted(names)) if any(names) else "none: the level is a single tensor, which only '*' matches"
    return {
        pattern: f"no parameter matches '{pattern}'.\n  Known: {listed}."
        for pattern in patterns
        if not any(fnmatchcase(name, pattern) for name in names)
    }
