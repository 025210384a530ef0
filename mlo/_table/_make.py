"""As many workers as are asked for, each in a process of its own, and this one to listen."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import NoReturn, final

from mlo._errors import MachineError, MloError, SpecError, UserError
from mlo._run._interrupt import stoppable
from mlo._run._lock import name_of
from mlo._table._cell import refuse_others, standing
from mlo._table._plan import Cell, Plan, told
from mlo._table._work import Event, Kind, Say, forget_failures, work
from mlo.spec._build import assemble

_INTERRUPTED = 130
_ENDED_IN_ORDER = (0, _INTERRUPTED, -signal.SIGTERM)


@final
@dataclass(frozen=True)
class _Refused:
    """What a worker raised on purpose: it concerns the whole table."""

    message: str
    code: int


def build_each(missing: Sequence[Cell]) -> None:
    """Build every graph once, so that a mistake in the last one is found before hours are spent on the others.

    Raises `SpecError` with all of them.
    """
    errors: dict[str, list[str]] = {}
    firsts = {cell.graph: cell for cell in reversed(missing)}
    for cell in firsts.values():
        try:
            if assemble(cell.spec).problem.evaluate is None:
                raise UserError(f"{cell.graph}: its problem evaluates nothing, so there is nothing to compare")
        except UserError as error:
            errors.setdefault(str(error), []).append(cell.graph)
    if errors:
        raise SpecError(told(errors, len(firsts)))


def make(
    plan: Callable[[], Plan],
    planned: Plan,
    say: Say,
    *,
    jobs: int = 1,
    patient: bool = True,
    check: Callable[[Sequence[Cell]], None] = build_each,
) -> list[str]:
    """Run what is missing of `planned`; how workers have died whose cells others took over.

    - `plan`: makes `planned` again in another process, to which it is sent.
    - `jobs`: one runs in this process, several in new ones.
    - `patient`: cells that other processes are working on are waited for.
    - `check`: given what is missing, if anything is, raises `SpecError` for what a problem refuses.

    Raises `UserError` for folders that hold other runs, `SpecError` for what a problem refuses, both before
    the first run; KeyboardInterrupt once all workers have kept their checkpoints; `MachineError` if all of them have died.
    """
    refuse_others(planned)
    forget_failures(planned)
    missing = [cell for cell in planned.cells if standing(cell) is None]
    if not missing:
        return []
    check(missing)
    jobs = min(jobs, len(missing))
    if jobs > 1:
        return _work_in_processes(plan, say, jobs=jobs, patient=patient)
    with stoppable():
        work(planned.cells, say, wait=patient)
    return []


def _work_in_processes(plan: Callable[[], Plan], say: Say, *, jobs: int, patient: bool) -> list[str]:
    context = get_context("spawn")
    processes: dict[Connection, BaseProcess] = {}
    with stoppable():
        try:
            for number in range(jobs):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_worker, args=(plan, number, jobs, patient, theirs))
                _start(process)
                theirs.close()
                processes[ours] = process
            _listen(processes, say)
        except BaseException:
            _stop(processes.values())
            raise
    codes = [process.exitcode for process in processes.values()]
    died = [_how(code) for code in codes if code not in _ENDED_IN_ORDER]
    if len(died) == jobs:
        raise MachineError(f"all workers have died ({', '.join(died)}); the same command goes on with what they left")
    return died


def _start(process: BaseProcess) -> None:
    """Ctrl-C reaches every process of a terminal; the workers leave it to this one, which tells them once."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)


def _listen(processes: dict[Connection, BaseProcess], say: Say) -> None:
    """Pass on what the workers say until all have ended."""
    open_ = dict(processes)
    ours = {name_of(process.pid) for process in processes.values() if process.pid is not None}
    while open_:
        ready = wait(list(open_))
        for connection in [each for each in open_ if each in ready]:
            try:
                heard = connection.recv()
            except (EOFError, ConnectionResetError):
                open_.pop(connection).join()
                continue
            if isinstance(heard, _Refused):
                _raise(heard)
            if not (heard.kind is Kind.HELD and heard.text in ours):
                say(heard)


def _raise(refused: _Refused) -> NoReturn:
    kinds: dict[int, type[MloError]] = {UserError.exit_code: UserError, MachineError.exit_code: MachineError}
    raise kinds.get(refused.code, RuntimeError)(refused.message)


def _stop(processes: Iterable[BaseProcess]) -> None:
    """Ask all to stop, which they do at the end of their iterations; every further Ctrl-C asks again."""
    while running := [process for process in processes if process.is_alive()]:
        with suppress(KeyboardInterrupt):
            for process in running:
                process.terminate()
            for process in running:
                process.join()


def _worker(plan: Callable[[], Plan], number: int, jobs: int, patient: bool, heard: Connection) -> None:
    """A process of its own. Each begins with another seed, so that they seldom want the same start run at once."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with stoppable():
            planned = plan()
            first = number * len(planned.seeds) // jobs * len(planned.graphs)

            def say(event: Event) -> None:
                with suppress(OSError):  # nobody listens any more
                    heard.send(event)

            work([*planned.cells[first:], *planned.cells[:first]], say, wait=patient)
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    except MloError as error:
        with suppress(OSError):
            heard.send(_Refused(str(error), error.exit_code))
        sys.exit(error.exit_code)


def _end_with_parent() -> None:
    """Stop in order when the process that listens is gone."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _how(code: int | None) -> str:
    return f"exit code {code}" if code is None or code >= 0 else f"killed by signal {-code}"
