"""The fourteen operations by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

import mlo
from problems.blocks.augmentation import _enhancement, _geometry, _levels

_OPERATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "shear_x": _geometry.shear_x,
    "shear_y": _geometry.shear_y,
    "translate_x": _geometry.translate_x,
    "translate_y": _geometry.translate_y,
    "rotate": _geometry.rotate,
    "invert": _levels.invert,
    "autocontrast": _levels.autocontrast,
    "equalize": _levels.equalize,
    "solarize": _levels.solarize,
    "color": _enhancement.color,
    "posterize": _levels.posterize,
    "contrast": _enhancement.contrast,
    "brightness": _enhancement.brightness,
    "sharpness": _enhancement.sharpness,
}

OPERATIONS: tuple[str, ...] = tuple(_OPERATIONS)
"""Names in the order of Hataya et al. 2022, §4."""


def apply(name: str, images: Tensor, magnitudes: Tensor, signs: Tensor) -> Tensor:
    """O(x; m) for each image with its own magnitude: 0 is the identity, bit for bit, and 1 the strongest.

    A pure function, differentiable to every order in images and magnitudes as `docs/augmentation.md` says.

    - `name`: one of `OPERATIONS`.
    - `images`: [n, channels, height, width] in [0, 1], one channel (grey) or three.
    - `magnitudes`: [n] in [0, 1].
    - `signs`: [n] of −1 and 1, the direction of geometric operations and enhancements; others do not use it.

    Raises UserError for an unknown name, or another number of channels.
    """
    if name not in _OPERATIONS:
        raise mlo.UserError(f"no operation named {name!r}; known: {', '.join(OPERATIONS)}")
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        shape = list(images.shape)
        raise mlo.UserError(f"images are [n, 1 or 3 channels, height, width] to be augmented, and these are {shape}")
    return _OPERATIONS[name](images, magnitudes.to(images.dtype), signs.to(images.dtype))
