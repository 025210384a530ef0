"""Randomness keyed by what it is for, never by the order in which it is drawn."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, cast, final

import torch

if TYPE_CHECKING:
    from torch import Tensor


def key(*parts: object) -> int:
    """A 63-bit seed that depends on every part: `key(seed, "train", iteration, step)`."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded with `key(*parts)`."""
    return torch.Generator().manual_seed(key(*parts))


def normal(like: Tensor, *parts: object) -> Tensor:
    """Standard normal numbers in the shape, type and place of `like`: the same for the same `parts`, up to its precision.

    Drawn on the CPU in float64, so that neither device nor type chooses them, and outside any `torch.func` transform, in
    which `vmap` would refuse to draw.
    """
    with cast("Any", torch._C)._DisableFuncTorch():  # pyright: ignore[reportPrivateUsage]
        drawn = torch.randn(like.shape, generator=generator(*parts), dtype=torch.float64)
        return drawn.to(device=like.device, dtype=like.dtype)


def reseed(seed: int) -> None:
    """Seed torch's global generators: those of the CPU and, where CUDA is in use, of its devices."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


@final
class Preserved:
    """Leave torch's global generators as they were found, whatever happens inside."""

    def __enter__(self) -> None:
        self._cpu = torch.default_generator.get_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def __exit__(self, *exception: object) -> None:
        torch.default_generator.set_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
