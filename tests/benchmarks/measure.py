"""Time and memory of two ways to compute the same thing, and the table they go into.

Time is CPU time of this process, which runs on one thread: what others do on the machine hardly moves it. The two ways
take turns; each pair gives a ratio, and the table shows the median and the quartiles of the ratios.

Memory is what torch's CPU allocator handed out and got back, as its profiler records it: the highest sum, above where it
began. Python's own objects are not in it.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """One line of the table: times in ms, memory in MiB; the quantity that has a goal, and the goal."""

    case: str
    by_hand: float | None
    mlo: float
    measured: float | None = None
    quartiles: tuple[float, float] | None = None
    goal: float | None = None
    unit: str = "ms"


@dataclass(frozen=True)
class Times:
    """Milliseconds, medians, and the quotients of pairs that ran one after the other."""

    by_hand: float
    mlo: float
    ratio: float
    quartiles: tuple[float, float]


def times(by_hand: Run, ours: Run, *, seconds: float = 8.0, pairs: int = 5) -> Times:
    """Run both in turn, changing who is first, for about so many seconds and at least so many pairs."""
    for warm_up in (by_hand, ours):
        warm_up()
    gc.collect()
    hand, own = list[float](), list[float]()
    begin = time.monotonic()
    while len(hand) < pairs or (time.monotonic() - begin < seconds and len(hand) < 1000):
        order = [(by_hand, hand), (ours, own)]
        for run, seen in order if len(hand) % 2 else reversed(order):
            seen.append(cpu_time(run))
    ratios = [one / other for one, other in zip(own, hand, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    middle = statistics.median
    return Times(1e3 * middle(hand), 1e3 * middle(own), middle(ratios), (low, high))


def cpu_time(run: Run) -> float:
    """Seconds of CPU time."""
    begin = time.process_time()
    run()
    return time.process_time() - begin


def peak(run: Run) -> float:
    """MiB above the start."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    results = profiler.profiler.kineto_results  # type: ignore[union-attr]
    changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    held = highest = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        held += change
        highest = max(highest, held)
    return highest / 2**20


def in_words(rows: Iterable[Row]) -> str:
    """The table in Markdown."""
    lines = [
        "| case | | by hand | mlo | ratio | quartiles | goal |",
        "|---|---|---:|---:|---:|---|---|",
    ]
    for row in rows:
        hand = "" if row.by_hand is None else f"{row.by_hand:.3g}"
        ratio = "" if row.measured is None else f"{row.measured:.2f}"
        spread = "" if row.quartiles is None else "–".join(f"{number:.2f}" for number in row.quartiles)
        goal = ""
        if row.goal is not None and row.measured is not None:
            goal = f"≤ {row.goal:g}" + ("" if row.measured <= row.goal else ", missed")
        lines.append(f"| {row.case} | {row.unit} | {hand} | {row.mlo:.3g} | {ratio} | {spread} | {goal} |")
    return "\n".join(lines)


def agree(found: Iterable[torch.Tensor], right: Iterable[torch.Tensor], tolerance: float) -> None:
    """Assert that two hypergradients are the same to a relative `tolerance`, in the Euclidean norm."""
    one = torch.cat([tensor.detach().reshape(-1) for tensor in found])
    two = torch.cat([tensor.detach().reshape(-1) for tensor in right])
    error = ((one - two).norm() / two.norm()).item()
    assert two.norm() > 0
    assert error <= tolerance, f"relative error {error:.1e}"
