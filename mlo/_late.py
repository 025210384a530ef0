"""Modules that need torch, for those that are imported without it.

An import statement in a function is looked up at every call, which takes as long as an operation on a small tensor.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType


@cache
def scalars() -> ModuleType:
    """`mlo._scalar`."""
    from mlo import _scalar

    return _scalar
