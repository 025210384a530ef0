"""How long things last: passes over a stream, in iterations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, final

from mlo.schedule._epochs import in_iterations
from mlo.spec._faults import Fault, unknown
from mlo.spec._levels import Epochs, LevelSpec
from mlo.spec._nodes import KeyPath
from mlo.stream import AbstractStream

if TYPE_CHECKING:
    from mlo.spec._models import Spec

T = TypeVar("T")


@final
@dataclass
class Durations:
    """Passes over a stream in iterations. A level's own stream is the longest of those its batch is made of."""

    spec: Spec
    streams: Mapping[str, AbstractStream]
    faults: list[Fault]

    def of(self, level: LevelSpec, key: str) -> int:
        """`every` or `warm_up` of a level."""
        return self._iterations(getattr(level, key), level, ("levels", level.name, key))

    def resolve(self, value: T, level: LevelSpec, key: str) -> T:
        """`value`, made from the choice at `key` of a level, with iterations in place of passes over its streams."""
        path = ("levels", level.name, key)
        try:
            return in_iterations(value, lambda passes: self._iterations(Epochs(epochs=passes), level, path))
        except ValueError as error:  # epochs too short to be told apart
            self.faults.append(Fault(path, f"{error}."))
            return value

    def iterations(self) -> int:
        """How long the run is; in passes over the longest stream of any level."""
        return self._iterations(self.spec.iterations, None, ("iterations",))

    def evaluate_every(self) -> int | None:
        """How often it is evaluated."""
        evaluation = self.spec.evaluation
        if evaluation is None or evaluation.every is None:
            return None
        return self._iterations(evaluation.every, None, ("evaluation", "every"))

    def pictures_at(self) -> frozenset[int]:
        """After which iterations pictures are made."""
        asked = self.spec.evaluation.pictures_at if self.spec.evaluation else ()
        places = ("evaluation", "pictures_at")
        return frozenset(self._iterations(each, None, (*places, place)) for place, each in enumerate(asked))

    def checkpoint_every(self) -> int | None:
        """How often a run saves itself, if the graph says so."""
        settings = self.spec.checkpoint
        return None if settings is None else self._iterations(settings.every, None, ("checkpoint", "every"))

    def _iterations(self, duration: int | Epochs, level: LevelSpec | None, path: KeyPath) -> int:
        if isinstance(duration, int):
            return duration
        if duration.of is not None and duration.of not in self.streams:
            self.faults.append(Fault((*path, "of"), unknown("stream", duration.of, self.streams)))
            return 1
        levels = self.spec.levels.values() if level is None or duration.of is not None else [level]
        lengths = [length for each in levels for length in self._lengths(each, duration.of)]
        if not lengths and duration.of is not None and self.streams[duration.of].draws_per_epoch() is not None:
            self.faults.append(Fault((*path, "of"), f"no level's batch is drawn from stream '{duration.of}'."))
            return 1
        if not lengths:
            self.faults.append(Fault(path, "there is no stream with an end to count passes over; give iterations."))
            return 1
        return max(1, math.ceil(duration.epochs * max(lengths)))

    def _lengths(self, level: LevelSpec, of: str | None) -> Iterator[float]:
        """Iterations that one pass over each of the level's streams takes, or over one of them."""
        for name in stream_names(level):
            if of is not None and name != of:
                continue
            draws = self.streams[name].draws_per_epoch() if name in self.streams else None
            if draws is not None:
                yield draws / max(1, level.steps)


def stream_names(level: LevelSpec) -> tuple[str, ...]:
    """The streams that a level's batch is made of."""
    return () if level.batch is None else (level.batch,) if isinstance(level.batch, str) else level.batch
