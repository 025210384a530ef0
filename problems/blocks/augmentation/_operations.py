"""The fourteen operations by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import mlo
from problems.blocks.augmentation import _enhancement, _levels
from problems.blocks.augmentation._geometry import MATRICES, warp

_VALUES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
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

OPERATIONS: tuple[str, ...] = (*MATRICES, *_VALUES)
"""Names in the order of Hataya et al. 2022, §4."""


def apply(name: str, images: Tensor, magnitudes: Tensor, signs: Tensor) -> Tensor:
    """O(x; m) for each image with its own magnitude: 0 is the identity, bit for bit, and 1 the strongest.

    A pure function; `docs/augmentation.md` says what the derivatives of each operation are.

    - `name`: one of `OPERATIONS`.
    - `images`: [n, channels, height, width] in [0, 1], one channel (grey) or three.
    - `magnitudes`: [n] in [0, 1].
    - `signs`: [n] of −1 and 1, the direction of geometric operations and enhancements; others do not use it.

    Raises UserError for an unknown name, or another number of channels.
    """
    if name not in OPERATIONS:
        raise mlo.UserError(f"no operation named {name!r}; known: {', '.join(OPERATIONS)}")
    sizes = [len(images) if name == operation else 0 for operation in OPERATIONS]
    return apply_sorted(images, magnitudes, signs, sizes)


def apply_each(images: Tensor, chosen: Tensor, magnitudes: Tensor, signs: Tensor) -> Tensor:
    """`apply` with an operation for each image, `OPERATIONS[chosen]`, at the cost of one operation an image.

    - `chosen`: whole numbers [n]. The other arguments are those of `apply`.
    """
    order = chosen.argsort(stable=True)
    sizes = chosen.bincount(minlength=len(OPERATIONS)).tolist()
    changed = apply_sorted(images[order], magnitudes[order], signs[order], sizes)
    return changed[order.argsort()]


def apply_sorted(images: Tensor, magnitudes: Tensor, signs: Tensor, sizes: Sequence[int]) -> Tensor:
    """`apply` to images sorted by operation: the first `sizes[0]` get the first one of `OPERATIONS`, and so on.

    All that are moved are resampled together, which on small images costs no more than one operation.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        shape = list(images.shape)
        raise mlo.UserError(f"images to be augmented are [n, 1 or 3 channels, height, width], and these are {shape}")
    split = [tensor.to(images.dtype).split(list(sizes)) for tensor in (images, magnitudes, signs)]
    shares = {name: share for name, *share in zip(OPERATIONS, *split, strict=True) if len(share[0])}
    changed = [_VALUES[name](*share) for name, share in shares.items() if name in _VALUES]
    height, width = images.shape[-2:]
    matrices = [MATRICES[name](mu * sign, height, width) for name, (_, mu, sign) in shares.items() if name in MATRICES]
    if matrices:  # MATRICES come first in OPERATIONS
        changed.insert(0, warp(images[: sum(map(len, matrices))], torch.cat(matrices)))
    return torch.cat(changed) if changed else images
