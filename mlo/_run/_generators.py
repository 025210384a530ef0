"""The global random generators of a process: torch's, numpy's and Python's own.

Nothing in `mlo` draws from them: its draws are keyed. A problem may, in a plain iterable or in its evaluation, so a run
seeds them, keeps them in its checkpoints, and leaves them as it found them.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mlo import _random

if TYPE_CHECKING:
    from torch import Tensor


def capture() -> dict[str, Tensor]:
    """All states, as tensors by name."""
    version, words, gauss = random.getstate()
    states = {
        "torch": torch.default_generator.get_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": _optional(gauss),
    }
    kind, *rest = np.random.get_state(legacy=True)
    if kind == "MT19937":  # anything else is a user's own, who also keeps it
        words, position, has_gauss, gauss = rest
        states["numpy"] = torch.tensor([position, *np.asarray(words).tolist()], dtype=torch.int64)
        states["numpy_gauss"] = _optional(gauss if has_gauss else None)
    if torch.cuda.is_initialized():
        states |= {f"cuda_{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def restore(states: Mapping[str, Tensor]) -> None:
    """Put back what `capture` gave; a generator that is absent, or has no device on this machine, stays as it is."""
    if "torch" in states:
        torch.default_generator.set_state(states["torch"])
    if "python" in states:
        version, *words = states["python"].tolist()
        random.setstate((version, tuple(words), _value(states["python_gauss"])))
    if "numpy" in states:
        position, *words = states["numpy"].tolist()
        gauss = _value(states["numpy_gauss"])
        state: Any = ("MT19937", np.array(words, dtype=np.uint32), position, int(gauss is not None), gauss or 0.0)
        np.random.set_state(state)
    for index in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        if f"cuda_{index}" in states:
            torch.cuda.set_rng_state(states[f"cuda_{index}"], index)


@contextmanager
def seeded(seed: int) -> Generator[None]:
    """Inside, all generators depend on `seed` alone; afterwards they are as they were."""
    before = capture()
    try:
        _random.reseed(_random.key(seed, "run", "torch"))
        random.seed(_random.key(seed, "run", "python"))
        np.random.seed(_random.key(seed, "run", "numpy") % 2**32)
        yield
    finally:
        restore(before)


def _optional(value: Any) -> Tensor:
    return torch.tensor([] if value is None else [value], dtype=torch.float64)


def _value(stored: Tensor) -> float | None:
    return stored.item() if stored.numel() else None
