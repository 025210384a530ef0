"""What a run writes while it goes: `metrics.jsonl` and TensorBoard events."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, final

from mlo._run._events import Events
from mlo._run._files import Refused

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._state import Metrics

METRICS = "metrics.jsonl"
STEP = "seconds_of_step"
"""The clock field of an iteration alone: its batches, its steps and the numbers that come of them."""
_MANY = 200
"""Lines that are written together at most."""
_PATIENCE = 5.0
"""Seconds after which lines are written in any case, for whoever looks on."""


def plain(metrics: Metrics) -> dict[str, Any]:
    """The metrics of an iteration as JSON holds them."""
    norms = metrics.norms
    tensors = [*metrics.losses.values()]
    for each in norms.values():
        tensors += (each.total, each.direct, each.indirect, *each.through.values())
        tensors += () if each.cosine is None else (each.cosine,)
    for report in metrics.reports.values():
        tensors += report.values()
    number = iter(_numbers(tensors))
    lines: dict[str, Any] = {
        "losses": {name: next(number) for name in metrics.losses},
        "norms": {
            upper: {
                "total": next(number),
                "direct": next(number),
                "indirect": next(number),
                "through": {name: next(number) for name in each.through},
                **({} if each.cosine is None else {"cosine": next(number)}),
            }
            for upper, each in norms.items()
        },
        "measured": {
            level: {name: value.tolist() for name, value in measured.items()}
            for level, measured in metrics.measured.items()
        },
        "gradients": metrics.gradients,
        "products": metrics.products,
        "pullbacks": len(metrics.pullbacks),
    }
    for (upper, level), report in metrics.reports.items():
        lines.setdefault("reports", {}).setdefault(upper, {})[level] = {name: next(number) for name in report}
    return lines


def _numbers(tensors: Sequence[Tensor]) -> list[float]:
    """What zero-dimensional tensors hold: one wait for an accelerator, however many there are."""
    if all(tensor.is_cpu for tensor in tensors):
        return [tensor.item() for tensor in tensors]
    import torch

    together = [tensor.detach().to(tensors[0].device, torch.float64) for tensor in tensors]
    return torch.stack(together).tolist()


@final
class Log:
    """One JSON object a line, and the same numbers as TensorBoard scalars.

    Lines are collected and written many at a time, which costs a third of one at a time.

    - `purge`: for a run that goes on, the first iteration that is still to come.
    """

    def __init__(self, folder: Path, *, purge: int | None = None) -> None:
        self._file = (folder / METRICS).open("ab")
        self._events = Events(folder / "tensorboard", purge=purge)
        self._collected: list[tuple[int, Mapping[str, Any], dict[str, float], float]] = []
        self._written = 0.0
        self._broken: Exception | None = None

    def write(self, iteration: int, entry: Mapping[str, Any], *, seconds: float, step: float | None = None) -> None:
        """Add `entry` at `iteration`, and what is outside of what runs agree on: clocks.

        - `seconds`: since the run began.
        - `step`: seconds that the iteration itself took; None for an evaluation.
        """
        clocks = {"seconds": round(seconds, 4)} | ({} if step is None else {STEP: round(step, 6)})
        self._collected.append((iteration, entry, clocks, time.time()))
        if len(self._collected) >= _MANY or seconds - self._written > _PATIENCE:
            self._written = seconds
            self._write_collected()

    def keep(self) -> int:
        """Put everything added so far on the disk; the length of `metrics.jsonl` in bytes."""
        self._write_collected()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Let go; what was not kept may be lost."""
        with suppress(OSError):
            self._file.close()
        self._events.close()

    def _write_collected(self) -> None:
        """What goes wrong once is raised ever after: part of a line may be on the disk, so nothing may follow it."""
        if self._broken is not None:
            raise self._broken
        try:
            lines = [
                json.dumps({"iteration": iteration, **entry, **clocks})
                for iteration, entry, clocks, _ in self._collected
            ]
            self._file.write("".join(f"{line}\n" for line in lines).encode())
            for iteration, entry, _, wall_time in self._collected:
                self._events.write(iteration, entry, wall_time=wall_time)
            self._collected.clear()
            self._file.flush()
            self._events.flush()
        except Exception as error:
            self._broken = error
            raise


def cut_metrics(folder: Path, *, length: int, iteration: int) -> None:
    """Cut `metrics.jsonl` back to its first `length` bytes, the last of which must belong to `iteration`.

    Raises `Refused` if it is not the file that the checkpoint was written beside.
    """
    path = folder / METRICS
    try:
        kept = path.read_bytes()[:length]
    except FileNotFoundError:
        kept = b""
    last = kept.rstrip(b"\n").rpartition(b"\n")[2]
    try:
        fits = len(kept) == length and (json.loads(last)["iteration"] == iteration if last else iteration == 0)
    except (ValueError, KeyError, TypeError):
        fits = False
    if not fits or not (kept == b"" or kept.endswith(b"\n")):
        raise Refused(
            f"{path}: is not the one that the checkpoint at iteration {iteration} was written beside; "
            "to start over, remove the folder 'checkpoint'"
        )
    if path.exists():
        os.truncate(path, length)


def seconds_per_iteration(folder: Path) -> float | None:
    """The median of what iterations took, without evaluations and what is written; None if no line says it."""
    with (folder / METRICS).open("rb") as file:
        found = [step for line in file if (step := json.loads(line).get(STEP)) is not None]
    return median(found) if found else None
