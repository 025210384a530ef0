"""Randomness keyed by what it is for, never by the order in which it is drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

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


@contextmanager
def preserved() -> Generator[None]:
    """Leave torch's global generators as they were found, whatever happens inside."""
    cpu = torch.default_generator.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        torch.default_generator.set_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
