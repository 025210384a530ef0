"""The processes that torchrun starts for one run: the first keeps it, the others compute their part of every batch.

The first one says what is to be done next in a store beside the collectives, where nobody has to listen: an error in one
process never finds the others in another collective, and they end when it does.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import pickle
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from importlib import import_module
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, final

import torch
import torch.distributed as distributed

from mlo._errors import StoppedElsewhere, UserError
from mlo._run import _generators, _tensors
from mlo._state import State
from mlo.optimizer import OptimizerState

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
_PATIENCE = 10.0
"""Seconds for which a process that fails waits for the first one to fail alike, and to say so for all."""


@final
class Word(IntEnum):
    """What a process says after an iteration; the largest one counts."""

    GO_ON = 0
    STOP = 1
    FAILED = 2


@final
@dataclass(eq=False)
class Processes:
    """This process among those of the run: the one with `rank` 0 keeps it. Alone, everything here does nothing."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    store: Any = None
    _orders: int = 0

    @property
    def first(self) -> bool:
        """Whether this one keeps the run."""
        return self.rank == 0

    def tell(self, **order: Any) -> None:
        """The first process: what the others shall do next."""
        if self.store is not None:
            self.store.set(f"order/{self._orders}", pickle.dumps(order))
            self._orders += 1

    def told(self) -> dict[str, Any]:
        """The others: what the first one says next."""
        assert self.store is not None
        key = f"order/{self._orders}"
        self._orders += 1

        def hear() -> bytes:
            while not self._appears(key, seconds=1.0):
                pass
            return self.store.get(key)

        return pickle.loads(_with_others(hear))

    def part_ways(self, folder: Path) -> None:
        """The first process, when the run in `folder` has ended well: the others may go, and have heard so."""
        self.tell(do="end", folder=str(folder))
        self.agree(Word.GO_ON)

    def lead(self, do: str, state: State) -> None:
        """The first process: begin something that all do together, from `state` and from its random generators."""
        if self.store is None:
            return
        flat = _tensors.flat(_trees(state))
        self.tell(
            do=do,
            iteration=state.iteration,
            seed=state.seed,
            counts={level: memory.count for level, memory in state.optimizers.items()},
            tensors={path: None if each is None else (each.shape, each.dtype) for path, each in flat.items()},
            generators=_generators.capture(),
            threads=torch.get_num_threads(),
        )
        for tensor in flat.values():
            if tensor is not None:
                self._sent(tensor.contiguous())

    def follow(self, order: Mapping[str, Any]) -> State:
        """The others: the state that the first one leads with."""
        torch.set_num_threads(order["threads"])  # sums of many numbers depend on it
        _generators.restore(order["generators"])
        described = {path: each for path, each in order["tensors"].items() if each is not None}
        found = {
            path: self._sent(torch.empty(shape, dtype=dtype, device=self.device))
            for path, (shape, dtype) in described.items()
        }
        tree = _tensors.nested(found, order["tensors"])
        return State(
            values=tree["values"],
            buffers=tree["buffers"],
            optimizers={
                level: OptimizerState(count, tree["moments"][level]) for level, count in order["counts"].items()
            },
            iteration=order["iteration"],
            seed=order["seed"],
            memory={(upper, level): each for upper, below in tree["memory"].items() for level, each in below.items()},
        )

    def agree(self, word: Word) -> Word:
        """The largest of what all say."""
        if self.store is None:
            return word
        said = torch.tensor(word, device=self.device)
        _with_others(lambda: distributed.all_reduce(said, distributed.ReduceOp.MAX))
        return Word(int(said))

    def compare(self, state: State) -> None:
        """Raise `UserError` in all processes unless they hold the same bits."""
        if self.store is None:
            return
        parts = {
            f"{kind} of level '{level}'": tree for kind, trees in _trees(state).items() for level, tree in trees.items()
        }
        found = torch.tensor([_digest(tree) for tree in parts.values()], device=self.device)
        ends = torch.stack([found, -found])
        _with_others(lambda: distributed.all_reduce(ends, distributed.ReduceOp.MAX))
        for name, most, least in zip(parts, ends[0].tolist(), (-ends[1]).tolist(), strict=True):
            if most != least:
                raise UserError(
                    f"iteration {state.iteration}: the {name} are no longer the same in all processes; does a module or an "
                    "objective keep something of its batch, or depend on which process it is in?"
                )

    def part(self, batch: Any, level: str) -> Any:
        """This process's samples of `batch`: a contiguous part of the leading dimension of each of its tensors.

        Parts differ by one sample at most where all tensors have as many; tensors of other lengths are divided in the same
        proportion. Raises `UserError`, in all processes, where that leaves one without samples.
        """
        if self.size == 1:
            return batch
        rows = sorted({tensor.shape[0] for tensor in _divided(batch)})
        units = gcd(*rows) if rows else self.size
        if units < self.size:
            what = f"draws of {' and '.join(map(str, rows))} samples" if len(rows) > 1 else f"a batch of {rows[0]}"
            how = " in one proportion" if len(rows) > 1 else ""
            raise UserError(f"level '{level}': {what} cannot be divided among {self.size} processes{how}")
        begin, end = units * self.rank // self.size, units * (self.rank + 1) // self.size

        def cut(part: Any) -> Any:
            if isinstance(part, torch.Tensor):
                scale = part.shape[0] // units if part.dim() else 0
                return part[begin * scale : end * scale] if part.dim() else part
            if isinstance(part, Mapping):
                return {name: cut(below) for name, below in part.items()}
            if hasattr(part, "_fields"):
                return type(part)(*(cut(below) for below in part))
            return type(part)(cut(below) for below in part) if isinstance(part, tuple | list) else part

        return cut(batch)

    def account(self, error: BaseException) -> None:
        """Take note that `error` ends this process, and settle which of them speaks of it: see `is_said`."""
        store, shown = self.store, error if isinstance(error, Exception) else None
        if store is None:
            return
        text = f"{type(error).__name__}: {error}"
        with suppress(RuntimeError):  # the store has gone, and with it all others
            if self.first:
                code = 130 if shown is None else getattr(error, "exit_code", 1)
                self.tell(do="fail", what=text.splitlines()[0], code=code)
                store.set("over", text)
                said = False
                time.sleep(0.3)  # the store may be in this process: the others have heard it by then
            elif isinstance(error, StoppedElsewhere):
                said = True
            else:
                said = self._appears("over", seconds=_PATIENCE) and (
                    shown is None or store.get("over").decode() == text
                )
                time.sleep(1.5)  # torchrun kills whoever is left when one ends: the first one speaks now
            error.__dict__[_SAID] = said

    def _appears(self, key: str, *, seconds: float) -> bool:
        assert self.store is not None
        until = time.monotonic() + seconds
        while not self.store.check([key]):
            if time.monotonic() > until:
                return False
            time.sleep(0.02)
        return True

    def _sent(self, tensor: Tensor) -> Tensor:
        """`tensor` as the first process has it."""
        _with_others(lambda: distributed.broadcast(tensor, 0))
        return tensor


_SAID = "said"


def is_said(error: BaseException) -> bool:
    """Whether another process tells the user of `error`: of one outside a run, which all meet alike, the first does."""
    said = error.__dict__.get(_SAID)
    return int(os.environ.get("RANK", 0)) > 0 and _started() if said is None else said


_together: list[Processes] = []
"""The processes of this one's run, from its beginning to the end of this process."""
_inside: list[Processes] = []


@contextmanager
def together(device: str) -> Generator[Processes]:
    """The processes of a run on `device`; inside another run, that one's. Under torchrun they find each other here.

    Raises `UserError` for a device that several processes cannot share.
    """
    if not _together:
        _together.append(_begin(device) if _started() else Processes())
    processes = _together[0]
    outermost = not _inside
    _inside.append(processes)
    try:
        yield processes
    except BaseException as error:
        if outermost:
            processes.account(error)
        raise
    finally:
        _inside.pop()
        if processes.size == 1:
            _together.clear()  # a group may be begun later


def _started() -> bool:
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size() > 1
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def _begin(device: str) -> Processes:
    kind = torch.device(device).type
    size, here = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if kind == "mps":
        raise UserError("device=mps: several processes run on cpu or on cuda")
    if kind == "cuda":
        if device != kind:
            raise UserError(f"device={device}: several processes take a device each; write device=cuda")
        if torch.cuda.device_count() < here:
            raise UserError(
                f"device=cuda: {here} processes on this machine, which has {torch.cuda.device_count()} devices"
            )
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if not distributed.is_initialized():
        import_module("torch.distributed.nn.functional")  # imported later, it would hold the group for good
        distributed.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(hours=6))
        atexit.register(_leave)
    size, rank = distributed.get_world_size(), distributed.get_rank()
    store: Any = distributed.distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage]
    prefixed = distributed.PrefixStore("mlo", store)  # pyright: ignore[reportPrivateImportUsage]
    return Processes(rank, size, kind, prefixed)


def _leave() -> None:
    with suppress(RuntimeError, AssertionError):  # the others may be gone
        distributed.destroy_process_group()


def _with_others(act: Callable[[], T]) -> T:
    try:
        return act()
    except RuntimeError as error:
        raise StoppedElsewhere(str(error).splitlines()[0]) from error


def _trees(state: State) -> dict[str, Mapping[str, Any]]:
    moments = {level: memory.moments for level, memory in state.optimizers.items()}
    remembered: dict[str, dict[str, Any]] = {}
    for (upper, level), trees in state.memory.items():
        remembered.setdefault(upper, {})[level] = trees
    return {"values": state.values, "buffers": state.buffers, "moments": moments, "memory": remembered}


def _digest(tree: Any) -> int:
    """63 bits of a hash of the bytes of all tensors in `tree`."""
    found = hashlib.blake2b(digest_size=8)
    for tensor in _tensors.flat({"": tree}).values():
        if tensor is not None:
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return int.from_bytes(found.digest(), "big") >> 1


def _divided(batch: Any) -> list[Tensor]:
    """The tensors of `batch` that hold samples: those with a dimension."""
    if isinstance(batch, torch.Tensor):
        return [batch] if batch.dim() else []
    if isinstance(batch, Mapping):
        return [tensor for part in batch.values() for tensor in _divided(part)]
    return [tensor for part in batch for tensor in _divided(part)] if isinstance(batch, tuple | list) else []
