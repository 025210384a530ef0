"""Start a level from where another graph's run ended."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlo._errors import MachineError, UserError
from mlo._run import _checkpoint
from mlo._run._files import Refused
from mlo._run._lock import alone
from mlo._run._open import Run, open_run

if TYPE_CHECKING:
    from mlo.spec import Spec

CACHE = Path("runs") / "start"
_FAILED = "failed"
"""Marks a run that went wrong by itself: its folder stays for whoever looks for the reason, and the next begins anew."""


def start_folder(spec: Spec, cache: Path) -> Path:
    """Where the run of a start graph is kept: one folder for each resolved specification."""
    return cache / f"{spec.name}-{spec.hash[:16]}"


def lasting(folder: Path, cache: Path) -> Path:
    """Where a run in `folder` lies once it is finished: one that others start from changes its place."""
    made = folder.name.startswith(".") and folder.absolute().parent == cache.absolute()
    return folder.with_name(folder.name.removeprefix(".")) if made else folder


def start_folders(spec: Spec, cache: Path) -> dict[str, str]:
    """By level, the folder its initial values come from."""
    return {level: str(start_folder(start, cache)) for level, start in spec.starts.items()}


def start_runs(spec: Spec, cache: Path, run: Callable[[Spec, Path], Any], say: Callable[[str], None]) -> dict[str, Run]:
    """By level, the finished run its initial values come from; runs what is missing.

    `run(start, folder)` runs a graph in an empty folder, or goes on with what is in it. A run happens in a folder of its
    own, `.<name>`, and takes its place only when it is finished, so that an interrupted one is never mistaken for a start
    and the next process goes on with it. Of several processes that want the same start one runs it; the others wait.
    """
    found: dict[str, Run] = {}
    made = False
    for folder, (levels, start) in _by_folder(spec, cache).items():
        cached = _is_sound(folder, start, say)
        names = ", ".join(levels)
        say(f"start: {names} from {start.name} ({'cached in' if cached else 'runs first, then kept in'} {folder})")
        if not cached:
            _make(folder, start, run, say)
            made = True
        found |= dict.fromkeys(levels, open_run(folder))
    if made:
        say(f"start finished; now {spec.name}")
    return found


def start_values(runs: Mapping[str, Run]) -> dict[str, Any]:
    """By level, a trained module or tensors: what `Graph.init` takes."""
    values: dict[str, Any] = {}
    for level, run in runs.items():
        state = run.state()
        if level not in state.values:
            raise UserError(f"{run.folder}: has no level '{level}' to start from")
        module = level in state.buffers
        values[level] = run.graph.module(level, state) if module else run.graph.values(state, [level])[level]
    return values


def _by_folder(spec: Spec, cache: Path) -> dict[Path, tuple[list[str], Spec]]:
    grouped: dict[Path, tuple[list[str], Spec]] = {}
    for level, start in spec.starts.items():
        grouped.setdefault(start_folder(start, cache), ([], start))[0].append(level)
    return grouped


def _is_sound(folder: Path, start: Spec, say: Callable[[str], None]) -> bool:
    """Whether `folder` holds the finished run of `start`, in a form that this version reads."""
    if not (folder / "summary.json").is_file():
        return False
    try:
        _checkpoint.load(folder / "checkpoint", "selected", spec_hash=start.hash)
    except Refused as error:
        say(f"start: not used: {error}")
        return False
    return True


def _make(folder: Path, start: Spec, run: Callable[[Spec, Path], Any], say: Callable[[str], None]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    inside = folder.with_name(f".{folder.name}")
    lock = folder.with_name(f".{folder.name}.lock")
    with alone(lock, busy=lambda who: say(f"start: {start.name} is being run by {who}; waiting")):
        if _is_sound(folder, start, lambda _: None):
            return  # by another process, meanwhile
        if (inside / _FAILED).exists():
            shutil.rmtree(inside)
        inside.mkdir(exist_ok=True)
        try:
            run(start, inside)
        except (OSError, MachineError):
            raise
        except Exception:
            (inside / _FAILED).touch()
            raise
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(inside, folder)
