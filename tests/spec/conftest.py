"""A small graph on disk, and a way to load a changed copy of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mlo._errors import SpecError
from mlo.spec import Spec, load

GRAPH = """\
problem: toy
iterations: 10
data: {size: 4}
levels:
  weights:
    variables: {linear: {width: 3}}
    objective: fit
    given: [penalty]
    batch: train
    optimizer: {sgd: {learning_rate: 0.1, momentum: 0.5}}
    hypergradient: {finite_difference: {radius: 0.01}}
  penalty:
    variables: log_penalty
    objective: {validation: {weight: 1.0}}
    subject_to: [weights]
    batch: [validation]
    optimizer: {adam: {learning_rate: 1e-3}}
"""

FIRST = """\
problem: toy
seed: 7
iterations: 3
data: {size: 1, depth: 2}
device: cuda
levels:
  weights: {variables: w, objective: o, optimizer: {sgd: {learning_rate: 1}}}
  penalty: {variables: p, optimizer: none}
"""

Write = Callable[..., str]
Loader = Callable[..., Spec]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write files below an empty working directory; the names come back as they would be typed."""
    monkeypatch.chdir(tmp_path)

    def write(text: str = GRAPH, name: str = "graph.yaml") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return name

    return write


@pytest.fixture
def read(write: Write) -> Loader:
    """Load a graph given as text."""

    def read(text: str = GRAPH, *overrides: str) -> Spec:
        return load(write(text), *overrides, imports=("toy",))

    return read


@pytest.fixture
def refused(read: Loader) -> Callable[..., list[str]]:
    """The lines of the error that a graph given as text ends in."""

    def refused(text: str = GRAPH, *overrides: str) -> list[str]:
        with pytest.raises(SpecError) as caught:
            read(text, *overrides)
        return str(caught.value).split("\n")

    return refused


@pytest.fixture
def graph() -> str:
    """The text of the small graph."""
    return GRAPH


@pytest.fixture
def first() -> str:
    """The text of a graph that the small one can start from."""
    return FIRST
