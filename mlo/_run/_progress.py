"""What a run shows while it goes: one line that is drawn over, or plain lines where the output is not a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, final

from rich.live import Live
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console

_LINES = 20
"""How many plain lines a whole run prints at least; more when iterations are slow."""
_PATIENCE = 30.0
"""Seconds after which a plain line is due in any case."""


@final
class Progress:
    """Each level's loss, every hypergradient's norm, speed and time left."""

    def __init__(self, console: Console, name: str, iterations: int, *, done: int = 0) -> None:
        self._console = console
        self._name = name
        self._iterations = iterations
        self._done = done
        self._shown_at = self._began = time.monotonic()
        self._losses: dict[str, float] = {}
        self._norms: dict[str, float] = {}
        self._live = Live(console=console, refresh_per_second=8, transient=True) if console.is_terminal else None
        if self._live:
            self._live.start()

    def update(self, iteration: int, entry: Mapping[str, Any]) -> None:
        """Show iteration `iteration`, whose numbers are in `entry`; a level that did not move keeps its last ones."""
        now = time.monotonic()
        wait = 0.1 if self._live else _PATIENCE
        plain_due = (
            not self._live and iteration * _LINES // self._iterations > (iteration - 1) * _LINES // self._iterations
        )
        for name, norms in entry["norms"].items():
            self._norms[name] = norms["total"]
        self._losses |= entry["losses"]
        if not plain_due and now - self._shown_at < wait:
            return
        self._shown_at = now
        line = self.line(iteration, now)
        if self._live:
            self._live.update(Text(line))
        else:
            self.say(line)

    def line(self, iteration: int, now: float) -> str:
        """One line of text."""
        speed = (iteration - self._done) / max(now - self._began, 1e-9)
        left = (self._iterations - iteration) / speed
        losses = "loss " + ", ".join(f"{name} {loss:.3g}" for name, loss in self._losses.items())
        norms = "  ".join(f"‖d {name}‖ {norm:.2g}" for name, norm in self._norms.items())
        where = f"{self._name} {iteration}/{self._iterations}"
        return "  ".join(part for part in (where, f"{speed:.3g}/s", f"{_clock(left)} left", losses, norms) if part)

    def say(self, line: str) -> None:
        """A line that stays."""
        progress_line(self._console)(line)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live:
            self._live.stop()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def progress_line(console: Console) -> Callable[[str], None]:
    """Prints a line as it is: no markup, no colours, no breaks."""
    return lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True)
