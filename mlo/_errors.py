"""The errors a user can meet, each with the exit code the command line answers with.

    2  `UserError` and its kinds: the specification, the graph or the command is wrong
    3  `NumericalError`: the numbers went wrong
    4  `MachineError`: the machine failed (disk full, unwritable folder, out of memory)

Anything else that escapes is a bug of ours: exit code 1, with its traceback saved.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
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
        super().__init__(
            f"iteration {iteration}: level '{level}', step {step}: {term} is not finite; often a learning rate is too large"
        )
        self.level, self.step, self.term, self.iteration = level, step, term, iteration


@final
class MachineError(MloError):
    """The machine, not the user and not the numbers: a full disk, an unwritable folder, too little memory."""

    exit_code = 4


@final
class StoppedElsewhere(MloError):
    """This process cannot go on, because another one of the same run has stopped."""

    exit_code = 4

    def __init__(self, what: str, exit_code: int = 4) -> None:
        super().__init__(f"another process of this run has stopped: {what}")
        self.exit_code = exit_code


_MACHINE = {
    getattr(errno, name, None)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO", "EMFILE", "ENFILE", "ENOMEM", "ESTALE")
}
_UNREACHABLE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def explained(error: Exception, *own: Path) -> MloError | None:
    """What an error raised below `mlo` means to a user; None if it is a bug of ours or of the problem's.

    Too little memory, a full disk and the like are the machine's. A path that cannot be reached is the machine's inside
    the folders `own`, which `mlo` made, and the user's anywhere else: a file of data that is not there.
    """
    if _out_of_memory(error):
        return MachineError(f"out of memory: {str(error).strip() or type(error).__name__}")
    if not isinstance(error, OSError):
        return None
    if error.errno in _MACHINE:
        return MachineError(f"the machine: {error}")
    if not isinstance(error, _UNREACHABLE):
        return None
    named = isinstance(error.filename, str | Path)
    inside = named and any(Path(error.filename).absolute().is_relative_to(folder.absolute()) for folder in own)
    forbidden = isinstance(error, PermissionError) and not own
    return MachineError(f"the machine: {error}") if inside or forbidden else UserError(str(error))


def _out_of_memory(error: Exception) -> bool:
    """Torch raises errors of its own: on an accelerator by class, on the CPU known by their words alone."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
    return isinstance(error, RuntimeError) and any(each in str(error) for each in words)


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
