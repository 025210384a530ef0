"""Modules that need torch, for those that are imported without it.

An import statement in a function is looked up at every call, which takes as long as an operation on a small tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

_SCALARS: list[ModuleType] = []


def scalars() -> ModuleType:
    """`mlo._scalar`."""
    if not _SCALARS:
        from mlo import _scalar

        _SCALARS.append(_scalar)
    return _SCALARS[0]
