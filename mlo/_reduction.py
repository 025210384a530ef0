"""The one place where gradients and products of several processes become one."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, TypeVar, final, get_args

import torch
import torch.distributed as distributed

from mlo import _tree
from mlo._errors import StoppedElsewhere, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._types import Upstream

Reduction = Literal["mean", "batch"]
F = TypeVar("F", bound=Callable[..., Any])


def reduction(kind: Reduction) -> Callable[[F], F]:
    """Declare what an objective is of its batch: `@mlo.reduction("batch")`.

    - `mean`: a mean over samples, up to terms that do not depend on the batch; what an objective is taken for.
    - `batch`: something else, as a ratio of means or a mean over classes is. Under several processes, which each see a
      part of the batch, a level with such an objective is refused.

    Raises ValueError for another kind.
    """
    if kind not in get_args(Reduction):
        raise ValueError(f"reduction must be {' or '.join(get_args(Reduction))}, got {kind!r}")

    def declare(objective: F) -> F:
        objective.reduction = kind  # pyright: ignore[reportFunctionMemberAccess]
        return objective

    return declare


def reduction_of(objective: Any) -> Reduction:
    """What `objective`, or the function that it binds options to, is declared to be."""
    while objective is not None:
        if getattr(objective, "reduction", None) in get_args(Reduction):
            return objective.reduction
        inner = (getattr(objective, name, None) for name in ("function", "func", "__wrapped__"))
        objective = next((each for each in inner if each is not None), None)
    return "mean"


class AbstractGroup(ABC):
    """Processes that each hold a part of every batch."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """Which of them this is, counted from 0."""

    @property
    @abstractmethod
    def size(self) -> int:
        """How many they are."""

    @abstractmethod
    def total(self, numbers: Tensor) -> Tensor:
        """The sum of `numbers` over all of them, the same bits in each."""


@final
class _Processes(AbstractGroup):
    """The default group of `torch.distributed`."""

    @property
    def rank(self) -> int:
        return distributed.get_rank()

    @property
    def size(self) -> int:
        return distributed.get_world_size()

    def total(self, numbers: Tensor) -> Tensor:
        try:
            distributed.all_reduce(numbers)
        except RuntimeError as error:
            raise StoppedElsewhere(str(error).splitlines()[0]) from error
        return numbers


_AVAILABLE = distributed.is_available()
_PROCESSES = _Processes()


class _Local(threading.local):
    """With a default for every thread: asking for what is not there takes longer than all else that is asked here."""

    group: AbstractGroup | None = None


_local = _Local()


@contextmanager
def acting_in(group: AbstractGroup) -> Generator[None]:
    """Inside, this thread is one of `group` in place of the processes: for tests that need no second process."""
    _local.group = group
    try:
        yield
    finally:
        _local.group = None


def current_group() -> AbstractGroup | None:
    """Those among whom batches are divided; None where this process sees all of every batch."""
    if _local.group is not None:
        return _local.group
    started = _AVAILABLE and distributed.GroupMember.WORLD is not None and distributed.get_world_size() > 1
    return _PROCESSES if started else None


def reduced(tensors: Sequence[Tensor], batch: Any, level: str) -> list[Tensor]:
    r"""The mean of `tensors` over processes, each weighted by the samples n of its part of `batch`; one all-reduce.

        Σ nᵢ tᵢ / Σ nᵢ

    That is the tensor of the whole batch for objectives that are means over samples. The samples of a batch are the leading
    dimension of its floating tensors (of any tensors, if none is floating); a batch without tensors counts the same
    everywhere. All processes raise together: `UserError` for a part without samples, and for a batch whose tensors are not
    divided in one proportion; `StoppedElsewhere` where another process is gone. Without other processes, `tensors`.
    """
    group = current_group()
    if not tensors or group is None:
        return list(tensors)
    sizes = _samples(batch)
    counts = torch.zeros(group.size, len(sizes), dtype=torch.float32, device=tensors[0].device)
    counts[group.rank] = torch.tensor(list(sizes.values()), dtype=torch.float32)
    own = next(iter(sizes.values()))
    flat = torch.cat([*(tensor.reshape(-1).to(counts.device) for tensor in tensors), counts.reshape(-1)])
    lengths = [tensor.numel() for tensor in tensors]
    ends = list(accumulate(lengths))
    flat[: ends[-1]] *= own
    flat = group.total(flat)
    divided = flat[ends[-1] :].view(group.size, -1).long().T.tolist()
    _refuse_uneven(level, dict(zip(sizes, divided, strict=True)))
    parts = (flat[: ends[-1]] / sum(divided[0])).split(lengths)
    return [part.view_as(tensor).to(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def reduced_trees(
    trees: Upstream, batch: Any, level: str, scalars: Sequence[Tensor] = ()
) -> tuple[Upstream, list[Tensor]]:
    """`reduced` for all tensors of `trees` and for `scalars` together."""
    if current_group() is None:
        return trees, list(scalars)
    leaves = [tensor for tree in trees.values() for tensor in _tree.leaves(tree)]
    parts = iter(reduced([*leaves, *scalars], batch, level))
    found = {name: _tree.rebuild(tree, [next(parts) for _ in _tree.leaves(tree)]) for name, tree in trees.items()}
    return found, list(parts)


def _samples(batch: Any) -> dict[str, int]:
    """The leading dimension of each tensor of `batch` that counts its samples, by the tensor's place."""
    found: dict[str, Tensor] = {}

    def look(part: Any, path: str) -> None:
        if isinstance(part, torch.Tensor):
            if part.dim():
                found[path] = part
        elif isinstance(part, Mapping):
            for name, below in part.items():
                look(below, f"{path}.{name}" if path else str(name))
        elif isinstance(part, tuple | list):
            for place, below in enumerate(part):
                look(below, f"{path}[{place}]")

    look(batch, "")
    floating = {path: tensor for path, tensor in found.items() if tensor.is_floating_point()}
    return {path: tensor.shape[0] for path, tensor in (floating or found).items()} or {"": 1}


def _refuse_uneven(level: str, divided: Mapping[str, Sequence[int]]) -> None:
    """`divided`: for each tensor of the batch, its samples in each process."""
    first, counts = next(iter(divided.items()))
    for path, others in divided.items():
        where = f"'{path}'" if path else "its batch"
        if 0 in others:
            raise UserError(
                f"level '{level}': process {others.index(0)} of {len(others)} has no sample of {where}, and a mean over "
                "none is no number; take larger batches or fewer processes"
            )
        if any(one * sum(others) != other * sum(counts) for one, other in zip(counts, others, strict=True)):
            shares = (f"'{name}' {' + '.join(map(str, found))}" for name, found in ((first, counts), (path, others)))
            raise UserError(
                f"level '{level}': the tensors of its batch are divided among processes in different proportions, "
                f"{' and '.join(shares)}; every sample must weigh the same in each"
            )


def refuse_compiling() -> None:
    """Raise if an iteration that is compiled would have to be reduced over processes."""
    if current_group() is not None:
        raise UserError(
            "compile: an iteration under several processes is not one graph: it is reduced between its parts"
        )


def refuse_nesting(level: str) -> None:
    """Raise if the total gradient of `level` would have to be differentiated through an all-reduce."""
    if current_group() is not None:
        reason = "its total gradient would be differentiated through a reduction over processes"
        raise UserError(f"level '{level}' cannot be in the middle of a nest under several processes: {reason}")


def refuse_batch_objective(level: str, objective: Any) -> None:
    """Raise if the objective of `level` is no mean over samples and each process would see a part of them."""
    if current_group() is not None and reduction_of(objective) == "batch":
        raise UserError(
            f"the objective of level '{level}' declares `reduction: batch`: it is no mean over samples, so that the parts "
            "of a batch that several processes see do not add up to it; run it in one process"
        )
