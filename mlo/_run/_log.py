"""What a run writes while it goes: `metrics.jsonl` and TensorBoard events."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from torch.utils.tensorboard.writer import SummaryWriter

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._state import Metrics, Norms


def plain(metrics: Metrics) -> dict[str, Any]:
    """The metrics of an iteration as JSON holds them."""
    return {
        "losses": {name: loss.item() for name, loss in metrics.losses.items()},
        "norms": {name: _norms(norms) for name, norms in metrics.norms.items()},
        "measured": {
            level: {name: value.tolist() for name, value in measured.items()}
            for level, measured in metrics.measured.items()
        },
        "gradients": metrics.gradients,
        "products": metrics.products,
        "pullbacks": len(metrics.pullbacks),
    }


def _norms(norms: Norms) -> dict[str, Any]:
    def number(norm: Tensor) -> float:
        return norm.item()

    return {
        "total": number(norms.total),
        "direct": number(norms.direct),
        "indirect": number(norms.indirect),
        "through": {name: number(norm) for name, norm in norms.through.items()},
    }


@final
class Log:
    """One JSON object a line, and the same numbers as TensorBoard scalars.

    Lines and events are buffered; `flush` puts them on the disk.
    """

    def __init__(self, folder: Path) -> None:
        self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._events = SummaryWriter(str(folder / "tensorboard"), flush_secs=3600)

    def write(self, iteration: int, entry: Mapping[str, Any], *, seconds: float) -> None:
        """Add `entry` at `iteration`; `seconds` since the run began is a clock field, outside what runs agree on."""
        line = {"iteration": iteration, **entry, "seconds": round(seconds, 4)}
        self._file.write(json.dumps(line) + "\n")
        for name, value in _scalars(entry):
            self._events.add_scalar(name, value, iteration)

    def flush(self) -> None:
        """Put everything written so far on the disk."""
        self._file.flush()
        self._events.flush()

    def close(self) -> None:
        """Flush and let go."""
        self._file.close()
        self._events.close()


def _scalars(entry: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in entry.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            yield prefix + name, float(value)
