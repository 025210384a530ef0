"""The one place where gradients and products of several processes become one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as distributed

from mlo import _tree
from mlo._errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from mlo._types import Upstream


def reduced(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The mean of `tensors` over the processes of the default group; without a group, `tensors` themselves.

    Exact for objectives that are means over samples, where every process holds equally many. One all-reduce.
    """
    if not tensors or not _several():
        return list(tensors)
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def reduced_trees(trees: Upstream) -> Upstream:
    """`reduced` for all tensors of `trees` together."""
    if not _several():
        return trees
    parts = iter(reduced([tensor for tree in trees.values() for tensor in _tree.leaves(tree)]))
    return {name: _tree.rebuild(tree, [next(parts) for _ in _tree.leaves(tree)]) for name, tree in trees.items()}


def refuse_recording(level: str) -> None:
    """Raise if steps of `level` would have to be recorded through an all-reduce, which would not be differentiated."""
    if _several():
        reason = "its steps would be recorded through a reduction over processes, which is not differentiated"
        raise UserError(f"level '{level}' cannot be unrolled under several processes: {reason}")


def refuse_nesting(level: str) -> None:
    """Raise if the total gradient of `level` would have to be differentiated through an all-reduce."""
    if _several():
        reason = "its total gradient would be differentiated through a reduction over processes"
        raise UserError(f"level '{level}' cannot be in the middle of a nest under several processes: {reason}")


def refuse_compiling() -> None:
    """Raise if an iteration that is compiled would have to be reduced over processes."""
    if _several():
        raise UserError(
            "compile: an iteration under several processes is not one graph: it is reduced between its parts"
        )


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
