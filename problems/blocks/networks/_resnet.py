"""Residual networks of torchvision (He et al. 2016), fresh or with weights from a file."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeAlias, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from problems.blocks.torchvision_door import torchvision

Depth: TypeAlias = Literal[18, 34, 50]
LAST = ("fc.weight", "fc.bias")


def resnet(*, depth: Depth = 18, weights: str | None = None, classes: int = 1000, channels: int = 3) -> nn.Module:
    """ResNet-`depth`: images [batch, channels, height, width], normalised, to logits [batch, classes].

    Parameters with 1000 classes and 3 channels, in millions: 11.7 (18), 21.8 (34), 25.6 (50).

    - `weights`: a file of its parameters and buffers by torchvision's names, `torch.save`d or in safetensors. Where the last
      layer has another number of classes it is left out and starts fresh. Nothing is ever downloaded.

    Raises ValueError for a file that is missing, cannot be read or belongs to another network.
    """
    network = getattr(torchvision("models"), f"resnet{depth}")(num_classes=classes)
    if channels != 3:
        network.conv1 = nn.Conv2d(channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    if weights is not None:
        _load(network, Path(weights), f"ResNet-{depth}")
    return network


def _load(network: nn.Module, path: Path, kind: str) -> None:
    found, wanted = _tensors(path), network.state_dict()
    if all(name in found for name in LAST) and found[LAST[0]].shape[0] != wanted[LAST[0]].shape[0]:
        found = {**found, **{name: wanted[name] for name in LAST}}
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    other = [
        f"{name} is {list(found[name].shape)}, not {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if missing or unexpected or other:
        mistakes = [
            f"{len(names)} {what}: {_some(names)}"
            for names, what in ((missing, "missing"), (unexpected, "unknown"), (other, "of another shape"))
            if names
        ]
        raise ValueError(f"weights is '{path}', which does not hold a {kind} of torchvision: {'; '.join(mistakes)}")
    network.load_state_dict(found)


def _tensors(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise ValueError(
            f"weights is '{path}'; there is no such file seen from {Path.cwd()}, and nothing is downloaded"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found: object = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"weights is '{path}', which cannot be read as saved tensors: {first}") from error
    if not isinstance(found, Mapping) or not all(isinstance(each, Tensor) for each in found.values()):
        raise ValueError(
            f"weights is '{path}', which holds no tensors by name but a {type(found).__name__}; save a state_dict()"
        )
    return cast("Mapping[str, Tensor]", found)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
