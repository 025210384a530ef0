"""TensorBoard events, written by the thread that computes: what the disk refuses is an error of the run, at once."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, final

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

# Protocol buffers make their classes while they are imported, where a type checker sees none.
_events: Any = event_pb2
_summaries: Any = summary_pb2


@final
class Events:
    """The scalars of an iteration as one event.

    A run that goes on begins a new file, whose first event tells TensorBoard to forget what earlier files hold from
    `purge` on; files are numbered, for TensorBoard reads them in the order of their names.
    """

    def __init__(self, folder: Path, *, purge: int | None = None) -> None:
        folder.mkdir(exist_ok=True)
        lives = sum(1 for _ in folder.glob("events.out.tfevents.*"))
        name = f"events.out.tfevents.{lives:06d}.{int(time.time())}.{socket.gethostname()}"
        self._file = (folder / name).open("wb")
        self._records = RecordWriter(self._file)
        self._put(_events.Event(wall_time=time.time(), file_version="brain.Event:2"))
        if purge is not None:
            forget = _events.SessionLog(status=_events.SessionLog.START)
            self._put(_events.Event(wall_time=time.time(), step=purge, session_log=forget))

    def write(self, iteration: int, entry: Mapping[str, Any], *, wall_time: float) -> None:
        """Every finite number in `entry`, tagged by the path of its names."""
        values = [_summaries.Summary.Value(tag=tag, simple_value=value) for tag, value in _scalars(entry, "")]
        self._put(_events.Event(wall_time=wall_time, step=iteration, summary=_summaries.Summary(value=values)))

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Let go; what was not flushed may be lost."""
        with suppress(OSError):
            self._file.close()

    def _put(self, event: Any) -> None:
        self._records.write(event.SerializeToString())


def _scalars(entry: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in entry.items():
        if isinstance(value, (int, float)):
            if math.isfinite(value):
                yield prefix + name, value
        elif isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
