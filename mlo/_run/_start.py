"""Start a level from where another graph's run ended."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlo._errors import UserError
from mlo._run._open import Run, open_run

if TYPE_CHECKING:
    from mlo.spec import Spec

CACHE = Path("runs") / "start"


def start_folder(spec: Spec, cache: Path) -> Path:
    """Where the run of a start graph is kept: one folder for each resolved specification."""
    return cache / f"{spec.name}-{spec.hash[:16]}"


def start_runs(spec: Spec, cache: Path, run: Callable[[Spec, Path], Any], say: Callable[[str], None]) -> dict[str, Run]:
    """By level, the finished run its initial values come from; runs what is missing.

    A run happens in a temporary folder that takes its place only when it is finished, so that an interrupted one is
    never mistaken for a start. Where a run fails, its folder is left for whoever looks for the reason.
    """
    found: dict[str, Run] = {}
    for folder, (levels, start) in _by_folder(spec, cache).items():
        cached = (folder / "summary.json").is_file()
        names = ", ".join(levels)
        say(f"start: {names} from {start.name} ({'cached in' if cached else 'runs first, then kept in'} {folder})")
        if not cached:
            _run_into(folder, start, run)
        found |= dict.fromkeys(levels, open_run(folder))
    return found


def start_values(runs: Mapping[str, Run]) -> dict[str, Any]:
    """By level, a trained module or tensors: what `Graph.init` takes."""
    values: dict[str, Any] = {}
    for level, run in runs.items():
        state = run.state()
        if level not in state.values:
            raise UserError(f"{run.folder}: has no level '{level}' to start from")
        values[level] = run.graph.module(level, state) if level in state.buffers else state.values[level]
    return values


def _by_folder(spec: Spec, cache: Path) -> dict[Path, tuple[list[str], Spec]]:
    grouped: dict[Path, tuple[list[str], Spec]] = {}
    for level, start in spec.starts.items():
        grouped.setdefault(start_folder(start, cache), ([], start))[0].append(level)
    return grouped


def _run_into(folder: Path, start: Spec, run: Callable[[Spec, Path], Any]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        run(start, temporary)
        try:
            os.replace(temporary, folder)
        except OSError:
            if not (folder / "summary.json").is_file():  # another process may have finished the same run first
                raise
    except KeyboardInterrupt:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(temporary, ignore_errors=True)
