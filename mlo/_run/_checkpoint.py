"""Keep the state of a run: tensors in safetensors, everything else in JSON, never half a file, nothing pickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import safetensors.torch

from mlo._errors import UserError
from mlo._run._files import write_atomically
from mlo._state import State
from mlo.optimizer import OptimizerState

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._types import Tree

FORMAT = 1
_SEPARATOR = ":"  # never in a level's name, and parameters are named with dots


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Checkpoint:
    """A state and what a run has gathered on the way to it."""

    state: State
    totals: Mapping[str, Mapping[str, Tensor]]
    gathered: Mapping[str, Any] = field(default_factory=dict[str, Any])


def save(folder: Path, name: str, checkpoint: Checkpoint, *, spec_hash: str) -> None:
    """Write `<name>.json` and the tensors it points to; until the JSON is in place the previous ones stay valid.

    Raises OSError if the machine cannot; then, too, the previous checkpoint stays valid.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = checkpoint.state
    data = safetensors.torch.save({key: tensor.contiguous() for key, tensor in _flat(checkpoint).items()})
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
    }
    write_atomically(folder / f"{name}.json", json.dumps(record, indent=2).encode())
    for stale in folder.glob(f"{name}-*.safetensors"):
        if stale.name != tensors:
            stale.unlink()


def load(folder: Path, name: str, *, spec_hash: str) -> Checkpoint:
    """The checkpoint `name` of `folder`. Raises `UserError` if it is missing, damaged, of another format or another run."""
    path = folder / f"{name}.json"
    try:
        record = json.loads(path.read_bytes())
        data = (folder / record["tensors"]).read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such checkpoint") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged: {error}") from None
    if record["format"] != FORMAT:
        raise UserError(f"{path}: written in format {record['format']}, this version reads format {FORMAT}")
    if record["spec"] != spec_hash:
        raise UserError(f"{path}: belongs to another specification ({record['spec'][:12]}, not {spec_hash[:12]})")
    if hashlib.sha256(data).hexdigest() != record["sha256"]:
        raise UserError(f"{folder / record['tensors']}: damaged: its contents are not those that {path.name} describes")
    tensors = _nested(safetensors.torch.load(data))
    optimizers = {
        level: OptimizerState(count=count, moments=tensors.get("optimizers", {}).get(level, {}))
        for level, count in record["updates"].items()
    }
    state = State(
        values={level: tensors["values"][level] for level in record["levels"]},
        buffers={level: tensors.get("buffers", {}).get(level, {}) for level in record["modules"]},
        optimizers=optimizers,
        iteration=record["iteration"],
        seed=record["seed"],
    )
    return Checkpoint(state=state, totals=tensors.get("totals", {}), gathered=record["gathered"])


def _flat(checkpoint: Checkpoint) -> dict[str, Tensor]:
    state, flat = checkpoint.state, dict[str, "Tensor"]()

    def put(tree: Tree | Mapping[str, Any], *path: str) -> None:
        if isinstance(tree, Mapping):
            for name, part in tree.items():
                put(part, *path, name)
        else:
            flat[_SEPARATOR.join(path)] = tree

    put(state.values, "values")
    put(state.buffers, "buffers")
    put({level: memory.moments for level, memory in state.optimizers.items()}, "optimizers")
    put(checkpoint.totals, "totals")
    return flat


def _nested(flat: Mapping[str, Tensor]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, tensor in flat.items():
        *folders, name = path.split(_SEPARATOR)
        here = nested
        for part in folders:
            here = here.setdefault(part, {})
        here[name] = tensor
    return nested
