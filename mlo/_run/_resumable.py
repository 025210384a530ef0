"""Whether a checkpoint can be gone on from, and how exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mlo._run import _tensors
from mlo._run._files import Refused
from mlo._run._record import RunRecord, versions

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._state import State
    from mlo.spec._build import Assembly


def fitting(
    declared: State, found: State, path: Path, *, because: str = "the code of the problem has changed since"
) -> None:
    """Raise `Refused` unless `found` has the variables, shapes and formats of `declared`."""
    expected, given = _described(declared), _described(found)
    for name in {**expected, **given}:
        if expected.get(name) != given.get(name):
            has, wants = given.get(name, "nothing"), expected.get(name, "nothing")
            raise Refused(
                f"{path}: does not fit the graph: it has {has} for '{name}' where the graph has {wants}; {because}"
            )


def unlike(assembly: Assembly, record: RunRecord, begun_on: str, processes: int) -> Iterator[str]:
    """Reasons why the rest of the run will not be, bit for bit, what it would have been."""
    yield from assembly.notices
    if assembly.spec.device != begun_on:
        yield f"begun on {begun_on}, goes on on {assembly.spec.device}: the last bits may differ"
    if processes != record.processes:
        yield f"begun in {record.processes} processes, goes on in {processes}: the last bits may differ"
    for name, version in versions().items():
        if version != record.versions.get(name):
            yield f"begun with {name} {record.versions.get(name)}, goes on with {version}: the last bits may differ"


def _described(state: State) -> Mapping[str, str]:
    trees = {
        "values": state.values,
        "optimizers": {level: memory.moments for level, memory in state.optimizers.items()},
    }
    return {name.replace(":", "."): _shape(tensor) for name, tensor in _tensors.flat(trees).items()}


def _shape(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
