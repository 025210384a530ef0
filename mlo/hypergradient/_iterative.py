"""What inverses share: which settings mean something, and when those that iterate stop unless told."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlo import _tree

if TYPE_CHECKING:
    from mlo._types import Tree


def check_settings(iterations: int, tolerance: float | None, damping: float) -> None:
    """Raise ValueError for settings that mean nothing."""
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}")
    if not damping >= 0:
        raise ValueError(f"damping must be at least 0, got {damping}")


def check_chunks(chunks: int) -> None:
    """Raise ValueError for a number of chunks that means nothing."""
    if chunks < 1:
        raise ValueError(f"chunks must be at least 1, got {chunks}")


def is_wide(cotangent: Tree) -> bool:
    """Whether the numbers are float64."""
    return _tree.leaves(cotangent)[0].element_size() == 8


def default_tolerance(cotangent: Tree) -> float:
    """The relative residual at which a solver stops by itself."""
    return 1e-12 if is_wide(cotangent) else 1e-6
