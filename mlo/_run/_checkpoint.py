"""Keep the state of a run: tensors in safetensors, everything else in JSON, never half a file, nothing pickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from safetensors import SafetensorError

from mlo._run import _tensors
from mlo._run._files import Refused, remove_parts, write_atomically
from mlo._state import State
from mlo.optimizer import OptimizerState

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._state import Memory

FORMAT = 3
_START_OVER = "to start over, remove the folder 'checkpoint'"


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Checkpoint:
    """A state and what a run has gathered on the way to it.

    - `totals`: what objectives have measured, summed, by level.
    - `generators`: the global random generators.
    - `gathered`: anything else, as JSON holds it.
    """

    state: State
    totals: Mapping[str, Mapping[str, Tensor]]
    generators: Mapping[str, Tensor] = field(default_factory=dict[str, "Tensor"])
    gathered: Mapping[str, Any] = field(default_factory=dict[str, Any])


Record = Mapping[str, Any]
"""The JSON of a checkpoint: what is in its tensors, and how to know them."""


def save(folder: Path, name: str, checkpoint: Checkpoint, *, spec_hash: str, selected: Record | None = None) -> Record:
    """Write the tensors, then the `<name>.json` that points to them: until it is in place the previous ones stay valid.

    `selected` is the record of another checkpoint that belongs to this one; its tensors stay as long as this does.
    Raises OSError if the machine cannot; then, too, the previous checkpoint stays valid.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = checkpoint.state
    flat = _tensors.flat(
        {
            "values": state.values,
            "buffers": state.buffers,
            "optimizers": {level: memory.moments for level, memory in state.optimizers.items()},
            "memory": _by_upper(state.memory),
            "totals": checkpoint.totals,
            "generators": checkpoint.generators,
        }
    )
    data = _tensors.encoded(flat)
    tensors = f"{name}-{state.iteration:08d}.safetensors"
    write_atomically(folder / tensors, data)
    record = {
        "format": FORMAT,
        "spec": spec_hash,
        "iteration": state.iteration,
        "seed": state.seed,
        "updates": {level: memory.count for level, memory in state.optimizers.items()},
        "levels": list(state.values),
        "modules": list(state.buffers),
        "gathered": checkpoint.gathered,
        "tensors": tensors,
        "sha256": hashlib.sha256(data).hexdigest(),
        "order": list(flat),
        "selected": selected,
    }
    record["digest"] = _digest(record)
    write_record(folder, name, record)
    return record


def write_record(folder: Path, name: str, record: Record) -> None:
    """Put `<name>.json` in place."""
    write_atomically(folder / f"{name}.json", json.dumps(record, indent=1).encode())


def remove_all_but(folder: Path, *records: Record | None) -> None:
    """Remove tensors that none of `records` points to, and what was left half written."""
    kept = {record["tensors"] for record in records if record is not None}
    for tensors in folder.glob("*.safetensors"):
        if tensors.name not in kept:
            tensors.unlink(missing_ok=True)
    remove_parts(folder)


def load(folder: Path, name: str, *, spec_hash: str, device: str = "cpu") -> Checkpoint:
    """The checkpoint `name` of `folder`. Raises `Refused` if it is missing, damaged, of another format or another run."""
    return restored(folder, read_record(folder, name, spec_hash=spec_hash), device=device)


def read_record(folder: Path, name: str, *, spec_hash: str) -> Record:
    """The JSON of checkpoint `name`, when it is whole, of this format, and of the run of this specification."""
    path = folder / f"{name}.json"
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise Refused(f"{path}: no such checkpoint") from None
    except ValueError as error:
        raise Refused(f"{path}: damaged: {error}; {_START_OVER}") from None
    if not isinstance(record, dict) or "format" not in record:
        raise Refused(f"{path}: damaged: not the JSON of a checkpoint; {_START_OVER}")
    if record["format"] != FORMAT:
        raise Refused(f"{path}: written in format {record['format']}, this version of mlo reads format {FORMAT}")
    if record.get("digest") != _digest(record):
        raise Refused(f"{path}: damaged: it has changed since it was written; {_START_OVER}")
    if record["spec"] != spec_hash:
        raise Refused(
            f"{path}: belongs to another specification ({record['spec'][:12]}, not {spec_hash[:12]}): "
            "the graph, or one that it starts from, has changed since"
        )
    return record


def restored(folder: Path, record: Record, *, device: str = "cpu") -> Checkpoint:
    """The checkpoint that `record` describes, its tensors on `device`."""
    path = folder / record["tensors"]
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise Refused(f"{path}: missing, though a checkpoint points to it; {_START_OVER}") from None
    if hashlib.sha256(data).hexdigest() != record["sha256"]:
        raise Refused(
            f"{path}: damaged, or of another checkpoint: its contents are not those its JSON describes; {_START_OVER}"
        )
    try:
        tensors = _tensors.decoded(data)
        tree = _tensors.nested(tensors, record["order"])
    except (SafetensorError, KeyError) as error:
        raise Refused(f"{path}: cannot be read: {error}; {_START_OVER}") from None
    moved = {
        kind: tree[kind] if kind == "generators" else _on(device, tree[kind])
        for kind in ("values", "buffers", "optimizers", "memory", "totals", "generators")
    }
    optimizers = {
        level: OptimizerState(count=count, moments=moved["optimizers"][level])
        for level, count in record["updates"].items()
    }
    state = State(
        values={level: moved["values"][level] for level in record["levels"]},
        buffers={level: moved["buffers"][level] for level in record["modules"]},
        optimizers=optimizers,
        iteration=record["iteration"],
        seed=record["seed"],
        memory={(upper, level): trees for upper, below in moved["memory"].items() for level, trees in below.items()},
    )
    return Checkpoint(state=state, totals=moved["totals"], generators=moved["generators"], gathered=record["gathered"])


def iteration_of(folder: Path, name: str = "latest") -> int | None:
    """At which iteration checkpoint `name` stands; None if there is none that can be read."""
    try:
        return int(json.loads((folder / f"{name}.json").read_bytes())["iteration"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _by_upper(memory: Memory) -> dict[str, dict[str, Mapping[str, Any]]]:
    """By the upper level and then by the level, in place of pairs."""
    nested: dict[str, dict[str, Mapping[str, Any]]] = {}
    for (upper, level), trees in memory.items():
        nested.setdefault(upper, {})[level] = trees
    return nested


def _digest(record: Mapping[str, Any]) -> str:
    content = {key: value for key, value in record.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _on(device: str, tree: Any) -> Any:
    return {name: _on(device, part) for name, part in tree.items()} if isinstance(tree, Mapping) else tree.to(device)
