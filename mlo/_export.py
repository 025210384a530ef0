"""What a run has trained, for plain PyTorch: a safetensors file a level, and a JSON that says how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import safetensors.torch
from torch import Tensor

from mlo._errors import MachineError, UserError
from mlo._run import Run, open_run
from mlo._run._files import new_folder, write_atomically, write_json
from mlo.spec._frozen import thaw

if TYPE_CHECKING:
    from mlo.spec import LevelSpec

Which: TypeAlias = Literal["selected", "latest"]

FORMAT = 1
ALONE = "tensor"
"""The name, in its file, of what a level holds that is one tensor."""


def export(folder: Path, out: Path | None = None, *, which: Which = "selected") -> Path:
    """Write every level of the run in `folder` to `out` (default: `folder/export`), a new folder; the path of it.

    A module's file holds its state dict: `module.load_state_dict(load_file(…))` fits the module that the problem builds.
    A level's tensors stand under their names. Raises `UserError` for no run, no such checkpoint or a folder in use.
    """
    run = open_run(folder)
    state = run.state(which)
    tensors = {name: _tensors(run, name, state) for name in state.values}
    out = new_folder(folder / "export" if out is None else out, "an export folder")
    levels: dict[str, Any] = {}
    try:
        for name, (kind, table) in tensors.items():
            path = out / f"{name}.safetensors"
            write_atomically(path, safetensors.torch.save(table))
            levels[name] = _described(run.spec.levels[name], path.name, kind, table)
        record = {
            "format": FORMAT,
            "name": run.spec.name,
            "problem": run.spec.problem,
            "spec_hash": run.spec.hash,
            "checkpoint": which,
            "iteration": state.iteration,
            "seed": run.spec.seed,
            "levels": levels,
        }
        write_json(out / "export.json", record)
    except OSError as error:
        raise MachineError(f"{out}: cannot be written: {error.strerror}") from error
    return out


def _tensors(run: Run, name: str, state: Any) -> tuple[str, dict[str, Tensor]]:
    """What kind of variables a level holds, and its tensors as a file keeps them: apart, in order, on the CPU."""
    if name in state.buffers:
        module = run.graph.module(name, state)
        extra = [key for key, value in module.state_dict().items() if not isinstance(value, Tensor)]
        if extra:
            raise UserError(f"level '{name}': {', '.join(extra)} of its state dict is no tensor and cannot be exported")
        return f"{type(module).__module__}.{type(module).__qualname__}", _apart(module.state_dict())
    values = run.graph.values(state, [name])[name]  # as an objective sees them: constraints applied
    return "tensors", _apart(values if isinstance(values, Mapping) else {ALONE: values})


def _apart(table: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in table.items()}


def _described(level: LevelSpec, file: str, kind: str, table: Mapping[str, Tensor]) -> dict[str, Any]:
    load = f"tensors = safetensors.torch.load_file('{file}')"
    module = kind != "tensors"
    return {
        "file": file,
        "variables": thaw(level.variables.yaml()) if level.variables is not None else None,
        "module": kind if module else None,
        "load": f"{load}; module.load_state_dict(tensors)" if module else load,
        "tensors": {
            name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
            for name, tensor in table.items()
        },
    }
