"""A run folder, opened."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from mlo._errors import UserError
from mlo._run import _checkpoint
from mlo._run._record import read_imports
from mlo.spec import load

if TYPE_CHECKING:
    from torch import nn

    from mlo._graph import Graph
    from mlo._state import State
    from mlo.spec import Spec


@final
@dataclass(frozen=True)
class Run:
    """A finished or interrupted run: `folder` and what is in it."""

    folder: Path

    @cached_property
    def spec(self) -> Spec:
        """The resolved specification that was run."""
        return load(self.folder / "spec.yaml", imports=read_imports(self.folder))

    @property
    def finished(self) -> bool:
        """Whether it ran to its end."""
        return (self.folder / "summary.json").is_file()

    @cached_property
    def summary(self) -> Mapping[str, Any]:
        """What `summary.json` says. Raises `UserError` for a run that is not finished."""
        if not self.finished:
            raise UserError(f"{self.folder}: not a finished run, summary.json is missing")
        return json.loads((self.folder / "summary.json").read_text())

    @property
    def metrics(self) -> list[Mapping[str, Any]]:
        """The lines of `metrics.jsonl`, one an iteration or an evaluation."""
        text = (self.folder / "metrics.jsonl").read_text()
        whole = text[: text.rfind("\n") + 1]  # a killed run may leave half a line
        return [json.loads(line) for line in whole.splitlines()]

    @cached_property
    def graph(self) -> Graph:
        """The graph, built anew."""
        return self.spec.build()[0]

    def state(self, which: str = "selected", *, device: str = "cpu") -> State:
        """The state of checkpoint `which`, `selected` or `latest`, on `device`."""
        return _checkpoint.load(self.folder / "checkpoint", which, spec_hash=self.spec.hash, device=device).state

    def module(self, level: str, which: str = "selected") -> nn.Module:
        """The trained module of `level`, a plain `nn.Module` in evaluation mode."""
        return self.graph.module(level, self.state(which)).eval()


def open_run(folder: str | Path) -> Run:
    """The run in `folder`. Raises `UserError` if there is none."""
    path = Path(folder)
    if not (path / "spec.yaml").is_file():
        raise UserError(f"{path}: not a run folder, spec.yaml is missing")
    return Run(path)
