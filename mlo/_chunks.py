"""Products summed over chunks of a batch: the graph of one chunk at a time, built, used and freed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import gcd
from typing import TYPE_CHECKING, Any, NamedTuple, cast, final

import torch

from mlo import _random, _tree
from mlo._autodiff import linearise
from mlo._errors import UserError
from mlo._objective import Record
from mlo._reduction import reduced_trees
from mlo._step import Position, Surroundings, connected, followed, gradient_of_reads

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._level import Level
    from mlo._types import Tree, Upstream


class Chunk(NamedTuple):
    """What one chunk is evaluated on, and its share of the samples."""

    record: Record
    share: float


@final
class Chunks:
    r"""The gradient of an objective that is a mean over n samples, linearised chunk by chunk:

        f = Σ (n_c/n) f_c

    with n_c samples in chunk c. Terms that do not depend on the batch are in every f_c, and count Σ n_c/n = 1 times. Exact
    where a sample does not depend on the others: batch statistics are those of a chunk, and noise that is drawn inside the
    objective is drawn for each chunk. Every use evaluates the gradient of each chunk anew, which costs one gradient of the
    whole batch, and the memory of one chunk.

    The first product also shows what is lost, for which no pass is made: `difference` is

        ‖Σ (n_c/n) ∇f_c − ∇f‖ / Σ (n_c/n) ‖∇f_c‖

    where ∇f is `whole`, and None before. Choices that were made by `values.once` are divided as the batch is. Raises
    `UserError` for a batch or a choice that cannot be divided.
    """

    def __init__(
        self,
        level: Level,
        around: Surroundings,
        at: Position,
        record: Record,
        count: int,
        whole: Tree,
    ) -> None:
        assert around.nest is None, "a total gradient is not divided"
        self._level, self._around, self._at = level, around, at
        self._batch, self._whole = record.batch, whole
        self.difference: Tensor | None = None
        self._chunks = [
            Chunk(Record(batch, _random.key(record.seed, "chunk", number), record.iteration, choices), share)
            for number, (batch, choices, share) in enumerate(
                divided(record.batch, record.choices or {}, count, level.name)
            )
        ]

    def product(self, direction: Tree, towards: tuple[str, ...]) -> Upstream:
        """Σ (n_c/n) (∂²f_c/∂w∂u)ᵀ v for the levels u in `towards`. One product and one gradient, counted elsewhere."""
        total: dict[str, Tree] = {}
        gradient: dict[str, Tree] = {}
        sizes = list["Tensor"]()
        for chunk in self._chunks:
            own, found = self._of_one(chunk, direction, towards)
            total = _added(total, found, chunk.share)
            if self.difference is None:
                gradient = _added(gradient, {"": own}, chunk.share)
                sizes.append(chunk.share * _tree.norm(own))
        if self.difference is None:
            found, (size,) = reduced_trees(gradient, self._batch, self._level.name, [torch.stack(sizes).sum()])
            self.difference = _tree.norm(_tree.subtract(found[""], self._whole)) / (size + (size == 0))
        return total

    def gradient_of_reads(self, variables: Tree) -> Upstream:
        """Σ (n_c/n) ∂f_c/∂u with the level's own variables at `variables`. One gradient."""
        tally = self._around.tally
        before, total = tally.gradients, dict[str, "Tree"]()
        for record, share in self._chunks:
            found = gradient_of_reads(self._level, self._around, variables, self._at, record)
            total = _added(total, found, share)
        tally.gradients = before + 1
        return total

    def _of_one(self, chunk: Chunk, direction: Tree, towards: tuple[str, ...]) -> tuple[Tree, Upstream]:
        """The gradient of one chunk, and its product; with the return of this, its graph is gone."""
        level, around, at = self._level, self._around, self._at
        buffers = {**around.buffers, level.name: at.buffers}

        def gradient(moving: Mapping[str, Tree]) -> tuple[Tree, tuple[()]]:
            values = {**around.values, **moving}
            found, _, _ = followed(level, around, values, moving[level.name], buffers, chunk.record)
            return connected(level, found), ()

        reads = {name: around.values[name] for name in towards if name != level.name}
        found, _, pull = linearise(gradient, {level.name: at.variables, **reads})
        return found, pull(direction, towards)


def _added(total: dict[str, Tree], found: Upstream, share: float) -> dict[str, Tree]:
    """total + share · found; a level that a chunk does not depend on is not in it."""
    parts = {
        name: _tree.add(total[name], tree, scale=share) if name in total else _tree.scale(tree, by=share)
        for name, tree in found.items()
    }
    return {**total, **parts}


def divided(
    batch: Any, choices: Mapping[Any, Any], count: int, level: str
) -> list[tuple[Any, Mapping[Any, Any], float]]:
    """`batch` and `choices` in `count` chunks, as even as they can be, each with its share of the samples.

    The samples are the leading dimension of every tensor in mappings, tuples and lists; numbers, text, None and tensors
    without dimensions belong to every chunk. There are no more chunks than samples. Tensors of n and m samples are divided
    into chunks that hold the same share of each.

    Raises `UserError` for a batch without samples, for tensors that have no such chunks, and for anything else in it.
    """
    tensors = _samples(batch, level, "its batch")
    sizes = set(tensors.values())
    if not sizes or 0 in sizes:
        raise UserError(f"level '{level}': its batch holds no samples that {count} chunks could be made of")
    unit = gcd(*sizes)
    if len(sizes) > 1 and unit < count:
        shown = ", ".join(f"{path or 'the batch'} {number}" for path, number in tensors.items())
        raise UserError(
            f"level '{level}': its batch cannot be divided into {count} chunks with the same share of every tensor, whose "
            f"leading dimensions are {shown}; what is no sample belongs into `variables` or an option of the objective"
        )
    for name, number in _samples(choices, level, "its choices").items():
        if number % unit:
            raise UserError(
                f"level '{level}': its choice '{name}', made by `values.once`, has the leading dimension {number} beside "
                f"{unit} samples, so that no chunk has its own; leave out `chunks`"
            )
    parts = min(count, unit)
    ends = [0]
    for number in range(parts):
        ends.append(ends[-1] + unit // parts + (number < unit % parts))
    return [
        (_part(batch, begin, end, unit), _part(choices, begin, end, unit), (end - begin) / unit)
        for begin, end in pairwise(ends)
    ]


def _samples(batch: Any, level: str, what: str) -> dict[str, int]:
    """The leading dimension of each tensor of `batch`, by its place."""
    found: dict[str, int] = {}

    def look(part: Any, path: str) -> None:
        if isinstance(part, torch.Tensor):
            if part.dim():
                found[path] = part.shape[0]
        elif isinstance(part, Mapping):
            for name, below in cast("Mapping[Any, Any]", part).items():
                look(below, f"{path}.{name}" if path else str(name))
        elif isinstance(part, tuple | list):
            for place, below in enumerate(cast("Sequence[Any]", part)):
                look(below, f"{path}[{place}]")
        elif not (part is None or isinstance(part, str | int | float)):
            where = f"{what}, '{path}'," if path else what
            raise UserError(f"level '{level}': {where} is a {type(part).__name__}, which cannot be divided into chunks")

    look(batch, "")
    return found


def _part(batch: Any, begin: int, end: int, unit: int) -> Any:
    """The samples of `batch` from begin/unit to end/unit of all."""
    if isinstance(batch, torch.Tensor):
        width = batch.shape[0] // unit if batch.dim() else 0
        return batch[begin * width : end * width] if width else batch
    if isinstance(batch, Mapping):
        table = cast("Mapping[Any, Any]", batch)
        return {name: _part(below, begin, end, unit) for name, below in table.items()}
    if isinstance(batch, tuple | list):
        parts = [_part(below, begin, end, unit) for below in cast("Sequence[Any]", batch)]
        kind: Any = type(cast("Any", batch))
        return kind(*parts) if hasattr(kind, "_fields") else kind(parts)
    return batch
