"""How much memory a piece of work needs at its peak."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, final

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Result = TypeVar("Result")


def peak_of(work: Callable[[], Result], device: torch.device) -> tuple[Result, int]:
    """What `work` returns, and the most bytes of tensors that were alive during it beyond those before.

    On CUDA as the allocator counts them. Elsewhere every storage that an operation makes is counted from then until it is
    freed, saved activations and gradients included; not the workspace that an operation uses inside.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        torch.cuda.synchronize(device)
        return result, max(0, torch.cuda.max_memory_allocated(device) - before)
    with _Counter() as counter:
        result = work()
    return result, counter.peak


@final
class _Counter(TorchDispatchMode):
    """Bytes of the storages that operations have made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {key for key, _ in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for key, storage in _storages(result):
            if key not in self._alive and key not in known:  # a view makes none
                size = storage.nbytes()
                self._now += size
                self.peak = max(self.peak, self._now)
                self._alive[key] = weakref.finalize(storage, self._forget, key, size)
        return result

    def _forget(self, key: int, size: int) -> None:
        self._now -= size
        self._alive.pop(key, None)


def _storages(tree: Any) -> Iterator[tuple[int, torch.UntypedStorage]]:
    """The storages of all tensors in `tree`, each with its address."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            storage: Any = leaf.untyped_storage()
            yield storage._cdata, storage
