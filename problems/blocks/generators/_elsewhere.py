"""Generators that were trained elsewhere: files of TorchScript or of `torch.export`, and modules of the user's own."""

from __future__ import annotations

import hashlib
import importlib
import os
import warnings
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, one_hot

import mlo
from problems.blocks.generators._abstract import AbstractGenerator

Interval: TypeAlias = Literal["unit", "symmetric"]
"""Where a generator's intensities lie: [0, 1], or [−1, 1] as after a tanh."""

NEAR = 1e-3
"""How far outside the interval an intensity may lie, for rounding."""


@final
@dataclass(frozen=True, kw_only=True)
class Signature:
    """What a program from elsewhere takes and gives.

    - `latent`: the size of z.
    - `labels`: how many labels it has; None if it takes none.
    - `weights`: whether it takes weights of its labels [n, labels], and not whole numbers [n].
    - `channels`, `size`: of the images that are wanted.
    - `drawn`: pixels of each side of the images that it gives; None for `size`. Others are resized.
    - `interval`: where its intensities lie.
    """

    latent: int
    labels: int | None
    weights: bool = False
    channels: int
    size: int
    drawn: int | None = None
    interval: Interval


class AbstractElsewhere(AbstractGenerator):
    """A generator whose images are those of a program, brought to [0, 1] and to the size that is wanted."""

    def __init__(self, signature: Signature) -> None:
        super().__init__(
            latent=signature.latent, labels=signature.labels, channels=signature.channels, size=signature.size
        )
        if signature.weights and signature.labels is None:
            raise ValueError("weights is true, and there are no labels: conditional is false")
        if signature.drawn is not None and signature.drawn < 1:
            raise ValueError(f"size is {signature.drawn}; it must be at least 1 pixel")
        self.signature = signature

    def images(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        """See the base. Raises `UserError` for weights of labels, where the program takes whole numbers.

        Images of another size are resized bilinearly, without aliasing where they shrink: a linear map, and so is its
        derivative.
        """
        images = self.drawn(latents, self._taken(labels, latents.dtype))
        if self.signature.interval == "symmetric":
            images = (images + 1) / 2
        if self.signature.drawn in (None, self.size):
            return images
        return interpolate(images, size=(self.size, self.size), mode="bilinear", antialias=True)

    def _taken(self, labels: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """`labels` as the program takes them."""
        if labels is None or self.labels is None:
            return None
        if self.signature.weights:
            return labels if labels.is_floating_point() else one_hot(labels, self.labels).to(dtype)
        if labels.is_floating_point():
            raise mlo.UserError(
                f"this generator takes labels as whole numbers [n], in which nothing can be differentiated, and not weights "
                f"[n, {self.labels}]; say `weights: true` where its program takes weights"
            )
        return labels

    @abstractmethod
    def drawn(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        """What the program gives."""


@final
class FromFile(AbstractElsewhere):
    """A generator from a file, `program(latents, labels)`, or `program(latents)` without labels; a constant.

    The program keeps its own numbers, in the type they were saved in: they are no variables of a level and are not in
    checkpoints. A fingerprint of the file is, and a run that goes on with another file is refused.
    """

    fingerprint: Tensor

    def __init__(self, program: nn.Module, digest: bytes, signature: Signature) -> None:
        super().__init__(signature)
        self.register_buffer("fingerprint", torch.frombuffer(bytearray(digest), dtype=torch.uint8))
        self._held = _Held(program, self.fingerprint.clone())

    def drawn(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        """See the base."""
        here = self.fingerprint
        if here.device.type == "cpu" and not torch.equal(here, self._held.fingerprint):
            raise mlo.UserError("the generator's file is not the one that this run began with")
        return self._held(latents, labels)


@final
class FromModule(AbstractElsewhere):
    """A module of the user's own, `module(latents, labels)` or `module(latents)` without labels, as variables of a level."""

    def __init__(self, module: nn.Module, signature: Signature) -> None:
        super().__init__(signature)
        self.module = module

    def drawn(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        """See the base."""
        return self.module(latents) if labels is None else self.module(latents, labels)


@final
class _Held:
    """A program outside of the module that uses it: it is shared by copies, and not moved to the meta device with them."""

    def __init__(self, program: nn.Module, fingerprint: Tensor) -> None:
        for parameter in program.parameters():  # one by one: a ScriptModule has no `requires_grad_`
            parameter.requires_grad_(False)
        self._program = program
        self.fingerprint = fingerprint
        tensors = [*program.parameters(), *program.buffers()]
        self._dtype = next((each.dtype for each in tensors if each.is_floating_point()), torch.float32)
        self._device = next((each.device for each in tensors), torch.device("cpu"))

    def __deepcopy__(self, memo: object) -> _Held:
        return self

    def __call__(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        if latents.device != self._device:
            self._program.to(latents.device)
            self._device = latents.device
        z = latents.to(self._dtype)
        if labels is not None and labels.is_floating_point():
            labels = labels.to(self._dtype)
        found = self._program(z) if labels is None else self._program(z, labels)
        return found.to(latents.dtype) if isinstance(found, Tensor) else found


def torchscript(path: str, signature: Signature) -> AbstractGenerator:
    """The generator in a file that `torch.jit.save` wrote.

    Raises ValueError for a file that is missing or cannot be read, and for what `_tried` refuses.
    """

    def load(place: Path) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that TorchScript is being replaced is no news to who has such a file
            return torch.jit.load(str(place), map_location="cpu").eval()

    return _from_file(path, load, "TorchScript, as torch.jit.save writes it", signature)


def exported(path: str, signature: Signature) -> AbstractGenerator:
    """The generator in a file that `torch.export.save` wrote, of a program whose number of images is free.

    Raises ValueError for a file that is missing or cannot be read, and for what `_tried` refuses.
    """

    def load(place: Path) -> nn.Module:
        return torch.export.load(str(place)).module()

    return _from_file(path, load, "an exported program, as torch.export.save writes it", signature)


def imported(module: str, name: str, signature: Signature) -> AbstractGenerator:
    """What `name()` of `module` makes: an nn.Module. `module` is installed, or lies where `--import` finds it.

    Raises ValueError where there is none of them, and for what `_tried` refuses.
    """
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise ValueError(f"module is '{module}', which needs a module '{error.name}' that is not there") from error
        raise ValueError(
            f"module is '{module}', and there is none; say `--import {module}` where the file lies in {Path.cwd()}"
        ) from error
    make = getattr(found, name, None)
    if not callable(make):
        known = [each for each, value in vars(found).items() if callable(value) and not each.startswith("_")]
        near = get_close_matches(name, known, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"name is '{name}', and '{module}' has no such function.{hint} Known: {', '.join(known)}.")
    try:
        made: Any = make()
    except Exception as error:  # it is the user's, and may raise anything
        raise ValueError(f"name is '{name}', and {module}.{name}() fails: {_said(error)}") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"name is '{name}', and {module}.{name}() gives a {type(made).__name__}, not an nn.Module")
    return _tried(FromModule(made, signature), f"name is '{name}'")


def _from_file(path: str, load: Callable[[Path], nn.Module], kind: str, signature: Signature) -> AbstractGenerator:
    place = Path(os.path.expanduser(path))
    if not place.is_file():
        raise ValueError(f"path is '{path}'; there is no such file seen from {Path.cwd()}, and nothing is downloaded")
    try:
        program = load(place)
    except Exception as error:  # torch answers a broken file with whatever its parser meets
        raise ValueError(f"path is '{path}', which cannot be read as {kind}: {_said(error)}") from error
    digest = hashlib.sha256(place.read_bytes()).digest()
    return _tried(FromFile(program, digest, signature), f"path is '{path}'")


def _tried(generator: AbstractElsewhere, where: str) -> AbstractGenerator:
    """`generator`, after two batches of images and derivatives of them in the latents, in evaluation mode.

    Raises ValueError, beginning with `where`, if it cannot be called, for other shapes, intensities outside the interval,
    images that differ from call to call, and where first or second derivatives are missing: in the latents, and in the
    weights of labels if it takes them.
    """
    was_training = generator.training
    generator.eval()
    signature = generator.signature
    for count in (2, 3):
        given = _given(signature, str(count))
        images = _attempt(generator, count, f"{where}; called with {given} it fails")
        side = signature.drawn or signature.size
        wanted = (count, signature.channels, side, side)
        if not isinstance(images, Tensor) or tuple(images.shape) != wanted:
            found = list(images.shape) if isinstance(images, Tensor) else f"a {type(images).__name__}"
            hint = _other_size(found, wanted)
            given = f"{_given(signature, 'n')} with n = {count}"
            raise ValueError(f"{where}; for {given} it gives {found}, and images are {list(wanted)}{hint}")
    latents, labels = _inputs(generator, 2)
    latents.requires_grad_()
    if labels is not None and signature.weights:
        labels.requires_grad_()
    images = generator(latents, labels)
    low, high = (edge.item() for edge in images.detach().aminmax())
    if not (low >= -NEAR and high <= 1 + NEAR):
        raise ValueError(
            f"interval is '{signature.interval}'; {where.replace(' is ', ' ')} so gives intensities from {low:.3g} to "
            f"{high:.3g} and not from 0 to 1: 'unit' is for what lies in [0, 1], 'symmetric' for [−1, 1]"
        )
    if not torch.equal(images.detach(), generator(latents, labels).detach()):
        raise ValueError(f"{where}; it draws random numbers of its own: images of the same latents differ")
    _differentiated(images, latents, "the latents", where)
    if labels is not None and signature.weights:
        _differentiated(generator(latents, labels), labels, "the weights of labels", where)
    generator.train(was_training)
    return generator


def _given(signature: Signature, count: str) -> str:
    """What a program is called with, in words."""
    latents = f"latents [{count}, {signature.latent}]"
    if signature.labels is None:
        return latents
    return latents + (f" and weights [{count}, {signature.labels}]" if signature.weights else f" and labels [{count}]")


def _other_size(found: Any, wanted: tuple[int, ...]) -> str:
    """What to say where only the size differs."""
    fits = isinstance(found, list) and len(found) == 4 and found[:2] == list(wanted[:2]) and found[2] == found[3]
    return f"; say `size: {found[2]}` and they are resized" if fits else ""


def _differentiated(images: Tensor, inputs: Tensor, name: str, where: str) -> None:
    """Raise ValueError unless `images` have a derivative in `inputs` that can be differentiated again."""
    if not images.requires_grad:
        raise ValueError(f"{where}; its images are not differentiable in {name}: was it saved under no_grad?")
    weights = torch.linspace(0.5, 1.5, images.numel(), dtype=images.dtype).reshape(images.shape)
    try:
        (first,) = torch.autograd.grad((weights * images).sum(), inputs, create_graph=True, materialize_grads=True)
        if first.requires_grad:
            torch.autograd.grad(first.square().sum(), inputs, allow_unused=True)
    except RuntimeError as error:
        raise ValueError(f"{where}; it cannot be differentiated twice in {name}: {_said(error)}") from error
    if not first.isfinite().all() or not first.any():
        what = "zero" if first.isfinite().all() else "not finite"
        raise ValueError(f"{where}; the derivative of its images in {name} is {what}")


def _attempt(generator: AbstractElsewhere, count: int, message: str) -> Any:
    try:
        return generator.drawn(*_inputs(generator, count))
    except Exception as error:  # it is the user's, and may raise anything
        raise ValueError(f"{message}: {_said(error)}") from error


def _inputs(generator: AbstractElsewhere, count: int) -> tuple[Tensor, Tensor | None]:
    """Latents, and labels as the program takes them: weights are those of a label mixed with all others."""
    dtype = next((each.dtype for each in generator.parameters()), torch.get_default_dtype())
    draws = torch.Generator().manual_seed(0)
    latents = torch.randn(count, generator.latent, generator=draws, dtype=dtype)
    if generator.labels is None:
        return latents, None
    labels = torch.arange(count) % generator.labels
    if not generator.signature.weights:
        return latents, labels
    return latents, 0.5 * one_hot(labels, generator.labels).to(dtype) + 0.5 / generator.labels


def _said(error: Exception) -> str:
    """The line of an error that tells most: of TorchScript's long ones the last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = lines[-1] if lines and "TorchScript" in lines[0] else (lines or [""])[0]
    return f"{type(error).__name__}: {told[:200]}" if told else type(error).__name__
