"""Several processes in one: threads that take turns, each with a part of the samples."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar, final

import torch

from mlo._reduction import AbstractGroup, acting_in

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@final
class _Turns:
    """Who runs, and what has been handed in for the next sum. One thread runs at a time, with a generator of its own."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.turn = 0
        self.changed = threading.Condition()
        self.numbers: list[Tensor | None] = [None] * size
        self.over = [False] * size

    def begin(self, rank: int) -> None:
        """Wait for the turn of `rank`."""
        with self.changed:
            self.changed.wait_for(lambda: self.turn == rank)

    def pass_on(self, rank: int) -> None:
        """Let the next thread that has not ended run."""
        with self.changed:
            following = ((rank + step) % self.size for step in range(1, self.size + 1))
            self.turn = next((other for other in following if not self.over[other]), rank)
            self.changed.notify_all()


@final
class _Simulated(AbstractGroup):
    """One of the threads, as a process."""

    def __init__(self, turns: _Turns, rank: int) -> None:
        self._turns, self._rank = turns, rank

    @property
    def rank(self) -> int:
        """See `AbstractGroup`."""
        return self._rank

    @property
    def size(self) -> int:
        """See `AbstractGroup`."""
        return self._turns.size

    def total(self, numbers: Tensor) -> Tensor:
        """See `AbstractGroup`. Every thread adds in the order of ranks, so that all have the same bits."""
        turns, generator = self._turns, torch.random.get_rng_state()
        turns.numbers[self._rank] = numbers.clone()
        turns.pass_on(self._rank)
        turns.begin(self._rank)
        torch.random.set_rng_state(generator)
        if any(turns.over) or any(part is None or part.shape != numbers.shape for part in turns.numbers):
            raise RuntimeError("the processes do not reduce the same tensors in the same order")
        parts = [part for part in turns.numbers if part is not None]
        total = torch.stack(parts).sum(0)
        turns.pass_on(self._rank)  # until all have added, nobody hands in anew
        turns.begin(self._rank)
        torch.random.set_rng_state(generator)
        return total


def in_processes(size: int, run: Callable[[int], T]) -> list[T]:
    """`run(rank)` for each of `size` processes that reduce with each other, in threads that take turns at reductions.

    Arithmetic, order and number of reductions are those of processes; only the transport is not. Raises what the first of
    them that fails raises.
    """
    turns, found, errors = _Turns(size), dict[int, T](), dict[int, BaseException]()

    def thread(rank: int) -> None:
        turns.begin(rank)
        try:
            with acting_in(_Simulated(turns, rank)):
                found[rank] = run(rank)
        except BaseException as error:
            errors[rank] = error
        finally:
            turns.over[rank] = True
            turns.pass_on(rank)

    generator = torch.random.get_rng_state()
    threads = [threading.Thread(target=thread, args=(rank,), daemon=True) for rank in range(size)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    torch.random.set_rng_state(generator)
    if errors:  # a thread that is left alone raises a RuntimeError, which is not the cause
        raise min(errors.items(), key=lambda item: (type(item[1]) is RuntimeError, item[0]))[1]
    return [found[rank] for rank in range(size)]
