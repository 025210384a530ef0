"""Fused arithmetic where an option is a number, and its plain form where it is a tensor that may be differentiated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Setting: TypeAlias = "float | Tensor"
"""An option as a step sees it: a number, or what was read: zero-dimensional, or shaped like the parameter."""


def is_zero(option: Any) -> bool:
    """Whether `option` is the number 0, and what it weighs can be left out. A tensor has a derivative there, and stays."""
    return isinstance(option, (int, float)) and option == 0


def add(tensor: Tensor, other: Tensor, *, scale: Setting) -> Tensor:
    """tensor + scale · other."""
    return tensor.add(other, alpha=scale) if isinstance(scale, (int, float)) else tensor + scale * other


def add_product(tensor: Tensor, one: Tensor, two: Tensor, *, scale: Setting) -> Tensor:
    """tensor + scale · one · two."""
    return tensor.addcmul(one, two, value=scale) if isinstance(scale, (int, float)) else tensor + scale * one * two


def add_quotient(tensor: Tensor, one: Tensor, two: Tensor, *, scale: Setting) -> Tensor:
    """tensor + scale · one / two."""
    return tensor.addcdiv(one, two, value=scale) if isinstance(scale, (int, float)) else tensor + scale * one / two


def mixed(one: Tensor, two: Tensor, weight: Setting) -> Tensor:
    """one + weight · (two − one)."""
    return one.lerp(two, weight) if isinstance(weight, (int, float)) else one + weight * (two - one)
