"""Draw the batches of one iteration: each stream once an inner step, for all levels that name it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import torch

from mlo._errors import UserError
from mlo._run._processes import Processes
from mlo._state import Batches
from mlo._structure import is_due
from mlo.stream import AbstractStream, Draw

if TYPE_CHECKING:
    from mlo._graph import Graph
    from mlo._level import Level
    from mlo._state import State
    from mlo.spec._build import Assembly


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Source:
    """Streams by name, and which of them each level's batch is made of: one, several by name, or none.

    Each of several `processes` draws everything and keeps its part.
    """

    streams: Mapping[str, AbstractStream]
    names: Mapping[str, str | tuple[str, ...] | None]
    seed: int
    device: torch.device
    processes: Processes = field(default_factory=Processes)

    @classmethod
    def of(cls, assembly: Assembly, processes: Processes) -> Source:
        """The streams of `assembly`."""
        return cls(
            streams=assembly.streams,
            names=assembly.batches,
            seed=assembly.spec.seed,
            device=torch.device(assembly.spec.device),
            processes=processes,
        )

    def batches(self, levels: Mapping[str, Level], iteration: int) -> dict[str, Any]:
        """The batches of all levels that are due at `iteration`."""
        return self._drawn((level for level in levels.values() if is_due(level, iteration)), iteration)

    def all_batches(self, levels: Mapping[str, Level], iteration: int) -> dict[str, Any]:
        """The batches at `iteration` of all levels that move at all, due or not."""
        return self._drawn((level for level in levels.values() if not level.frozen), iteration)

    def probe(self, graph: Graph, state: State) -> None:
        """`Graph.probe` on the batches of the first iteration.

        Raises `UserError` too: for an objective that reads a stream by name which its level does not draw.
        """
        batches = self.all_batches(graph.levels, 1)
        try:
            graph.probe(state, batches)
        except KeyError as error:
            name = error.args[0] if error.args else None
            if isinstance(error, UserError) or not isinstance(name, str) or name not in self.streams:
                raise
            told = UserError(
                f"an objective reads stream '{name}' by name, and its batch does not hold it: list all that it reads in the "
                "level's `batch`, as [one, other]; a single stream is given as it is, without its name"
            )
            for note in getattr(error, "__notes__", ()):
                told.add_note(note)
            raise told from error

    def _drawn(self, levels: Iterable[Level], iteration: int) -> dict[str, Any]:
        drawn: dict[tuple[str, int], Any] = {}

        def draw(stream: str, step: int) -> Any:
            if (stream, step) not in drawn:
                batch = self.streams[stream].draw(Draw(self.seed, stream, iteration, step))
                drawn[stream, step] = moved(batch, self.device)
            return drawn[stream, step]

        def batch(names: str | tuple[str, ...], step: int) -> Any:
            return draw(names, step) if isinstance(names, str) else {name: draw(name, step) for name in names}

        found: dict[str, Any] = {}
        for level in levels:
            names = self.names[level.name]
            if names is not None:
                steps = [self.processes.part(batch(names, step), level.name) for step in range(level.steps)]
                found[level.name] = steps[0] if len(steps) == 1 else Batches(steps)
        return found


def moved(batch: Any, device: torch.device) -> Any:
    """`batch` with its tensors on `device`, in the same tuples and mappings."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: moved(part, device) for name, part in batch.items()}
    if hasattr(batch, "_fields"):
        return type(batch)(*(moved(part, device) for part in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(moved(part, device) for part in batch)
    return batch
