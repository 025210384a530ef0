"""The errors a user can meet, each with the exit code the command line answers with.

    2  `UserError` and its kinds: the specification, the graph or the command is wrong
    3  `NumericalError`: the numbers went wrong
    4  `MachineError`: the machine failed (disk full, unwritable folder, out of memory)

Anything else that escapes is a bug of ours: exit code 1, with its traceback saved.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import final


class MloError(Exception):
    """Anything `mlo` raises on purpose. `exit_code` is what the command line exits with."""

    exit_code: int = 1


class UserError(MloError):
    """Something a user wrote cannot be done as it stands."""

    exit_code = 2


@final
class GraphError(UserError):
    """Levels that do not form a graph that can be run; the message lists every mistake, one a line."""

    def __init__(self, mistakes: Sequence[Mistake]) -> None:
        super().__init__("\n".join(str(mistake) for mistake in mistakes))
        self.mistakes = tuple(mistakes)


@final
class SpecError(UserError):
    """Mistakes in a specification, all of one stage at once, each as `file:line:column: path: what is wrong`."""


@final
class NumericalError(MloError):
    """A non-finite number: which level, at which of its steps, in which term, at which iteration."""

    exit_code = 3

    def __init__(self, *, level: str, step: int, term: str, iteration: int) -> None:
        super().__init__(f"iteration {iteration}: level '{level}', step {step}: {term} is not finite")
        self.level, self.step, self.term, self.iteration = level, step, term, iteration


@final
class MachineError(MloError):
    """The machine, not the user and not the numbers: a full disk, an unwritable folder, too little memory."""

    exit_code = 4


@final
@dataclass(frozen=True)
class Mistake:
    """One thing that is wrong with a level: its name, the key that says so, and what to do about it."""

    level: str
    key: str
    message: str

    def __str__(self) -> str:
        return f"level '{self.level}', {self.key}: {self.message}"


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence ` Did you mean 'x'?` naming the known name closest to `name`, or nothing if none is close."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{found[0]}'?" if found else ""
