"""One worker: it takes a cell that nobody has, runs it or goes on with it, and takes the next."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import final

from mlo import _run
from mlo._errors import MachineError, UserError
from mlo._run import _checkpoint
from mlo._run._files import LOCK, Held
from mlo._run._lock import alone
from mlo._table._cell import FAILED, NUMBERS, Failure, Finished, keep_failure, standing
from mlo._table._plan import Cell, Plan

_PAUSE = 0.5
"""Seconds between two looks at cells that others are working on."""
_BEFORE_IT_BEGAN = {LOCK, "run.json", "traceback.txt", FAILED}
"""What a run leaves that ended, or whose process died, before there was a specification in its folder."""


class Kind(Enum):
    """What may be said of a cell."""

    BEGINS = "begins"
    FINISHED = "finished"
    FAILED = "failed"
    HELD = "held"


@final
@dataclass(frozen=True)
class Event:
    """Something that happened to the cell `graph` with `seed`, in words; HELD says who works on it."""

    kind: Kind
    graph: str
    seed: int
    text: str = ""


Say = Callable[[Event], None]


def work(cells: Iterable[Cell], say: Say, *, wait: bool) -> None:
    """Make all of `cells` finished or failed, or see others do so.

    A cell belongs to whoever holds its lock, which is the kernel's: when its holder dies, however it died, the next one
    goes on from the last checkpoint. Where all that is left belongs to others this waits for them, and takes over what
    they drop; without `wait` it returns.
    """
    every, told = list(cells), set[tuple[str, int, str]]()
    while left := [cell for cell in every if standing(cell) is None]:
        taken = False
        for cell in left:
            try:
                taken |= _attempt(cell, say)
            except Held as held:
                key = (cell.graph, cell.seed, held.who)
                if key not in told:
                    told.add(key)
                    say(Event(Kind.HELD, *key))
        if not taken:
            if not wait:
                return
            time.sleep(_PAUSE)


def forget_failures(plan: Plan) -> None:
    """Let cells be tried again that failed for reasons which may be gone: all but numbers that went wrong."""
    for cell in plan.cells:
        failure = standing(cell)
        if isinstance(failure, Failure) and failure.code != NUMBERS:
            with suppress(Held), alone(cell.lock, busy=_held_by(cell)):
                (cell.folder / FAILED).unlink(missing_ok=True)


def holders(plan: Plan) -> dict[tuple[str, int], str]:
    """By graph and seed, who is working on the cells that are not finished."""
    found: dict[tuple[str, int], str] = {}
    for cell in plan.cells:
        for lock in (cell.lock, cell.folder / LOCK):
            if standing(cell) is None and lock.exists():
                try:
                    with alone(lock, busy=_held_by(cell)):
                        pass
                except Held as held:
                    found[cell.graph, cell.seed] = held.who
    return found


def _attempt(cell: Cell, say: Say) -> bool:
    """Whether there was something to do and it is done now. Raises `Held` if somebody else is doing it."""
    if standing(cell) is not None:
        return False
    try:
        cell.folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"{cell.folder.parent}: cannot be made: {error.strerror}") from None
    with alone(cell.lock, busy=_held_by(cell)):
        if standing(cell) is not None:
            return False
        say(Event(Kind.BEGINS, cell.graph, cell.seed, _from_where(cell.folder)))
        try:
            _run_or_resume(cell)
        except Held:
            raise
        except Exception as error:
            failure = Failure.of(error)
            try:
                keep_failure(cell, failure)
            except OSError as disk:
                raise MachineError(f"{cell}: {failure.reason}\n{cell.folder / FAILED}: {disk.strerror}") from None
            say(Event(Kind.FAILED, cell.graph, cell.seed, failure.reason))
            return True
        finished = standing(cell)
        seconds = f"{finished.seconds:.1f} s" if isinstance(finished, Finished) else ""
        say(Event(Kind.FINISHED, cell.graph, cell.seed, seconds))
    return True


def _run_or_resume(cell: Cell) -> None:
    folder = cell.folder
    if (folder / "spec.yaml").is_file():
        _run.resume(folder, quiet=True)
        return
    if folder.is_dir():
        strange = [each.name for each in folder.iterdir() if each.name not in _BEFORE_IT_BEGAN and not _is_part(each)]
        if strange:
            raise UserError(f"{folder}: no run folder, and not empty: {', '.join(sorted(strange))}")
        with alone(folder / LOCK, busy=_held_by(cell)):
            pass
        shutil.rmtree(folder)
    _run.run(cell.spec, folder, quiet=True)


def _from_where(folder: Path) -> str:
    iteration = _checkpoint.iteration_of(folder / "checkpoint")
    return "begins" if iteration is None else f"goes on from iteration {iteration}"


def _is_part(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".part")


def _held_by(cell: Cell) -> Callable[[str], None]:
    def busy(who: str) -> None:
        raise Held(f"{cell.folder}: this run is still going on, in {who}", who)

    return busy
