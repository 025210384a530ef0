"""A network from a file, in whose features images of photographs are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from problems.blocks.image_sets import DEVIATION, MEAN
from problems.blocks.networks import Divided, normalised
from problems.blocks.networks._resnet import Depth, resnet

Judge: TypeAlias = Callable[[Tensor], Tensor]
"""Images [n, 3, height, width] in [0, 1] to features [n, features]: 512 of ResNet-18 and 34, 2,048 of deeper ones."""


def judge_from(path: str, *, depth: Depth, device: torch.device) -> Judge:
    """The features that a residual network of torchvision's gives its last layer, with weights from a file.

    Images are normalised as those of ImageNet are, and everything is float32 in evaluation mode. Distances in these features
    are no FID, which is that of InceptionNet: they compare with no others but those of the same file.

    - `path`, `depth`: see `networks.resnet`; the last layer, whatever its number of classes, is not used.

    Raises ValueError, which begins with `judge is`, for a file that is missing, cannot be read or holds another network.
    """
    try:
        with torch.random.fork_rng(devices=[]):  # it starts from random numbers, which the file replaces
            network = resnet(depth=depth, weights=path)
    except ValueError as error:
        raise ValueError(str(error).replace("weights is", "judge is", 1)) from error
    held = Divided(normalised(network, mean=MEAN, deviation=DEVIATION)).eval().requires_grad_(False)
    held = held.to(device=device, dtype=torch.float32)

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        return held(images.float(), part="features")

    return features
