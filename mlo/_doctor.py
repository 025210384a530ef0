"""What an unhappy user should paste: versions, machine, problems and graphs, with what is wrong with them."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, final

import mlo
from mlo._errors import MachineError, MloError, UserError
from mlo.spec import load, shipped_graphs
from mlo.spec._problems import problem_module, problem_names

_PACKAGES = ("torch", "numpy", "pydantic", "pydantic-core", "PyYAML", "networkx", "safetensors", "scikit-learn")
_MORE = ("torchmetrics", "tensorboard", "typer", "rich", "pillow", "kornia", "optuna")
_ROOM = 200 * 2**20  # bytes: a run of needs_aware with its start keeps some twenty megabytes


class Blame(Enum):
    """What a finding is about; the value is the exit code where it is the worst."""

    NOBODY = 0
    NOTICE = -1
    INSTALLATION = UserError.exit_code
    MACHINE = MachineError.exit_code


@final
@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and whose fault it is if that is not well."""

    what: str
    found: str
    blame: Blame = Blame.NOBODY


def findings(runs: Path = Path("runs")) -> Iterator[Finding]:
    """Everything that is looked at, in the order in which it is told; `runs` is where runs would be kept."""
    yield Finding("mlo", f"{_version('mlo') or 'from a checkout'} in {Path(mlo.__file__).parent}{_commit()}")
    yield Finding("python", f"{platform.python_version()} in {sys.prefix}, {platform.platform()}")
    yield from _packages()
    yield from _torch()
    yield from _torchvision()
    yield from _problems()
    yield from _graphs()
    yield from _room(runs)


def exit_code(found: list[Finding]) -> int:
    """2 where the installation is the problem, 4 where the machine is, 0 where nothing is."""
    blamed = {finding.blame for finding in found}
    worst = next((blame for blame in (Blame.INSTALLATION, Blame.MACHINE) if blame in blamed), Blame.NOBODY)
    return worst.value


def _packages() -> Iterator[Finding]:
    versions = {name: _version(name) for name in (*_PACKAGES, *_MORE)}
    missing = [name for name, version in versions.items() if version is None]
    yield Finding("packages", ", ".join(f"{name} {version}" for name, version in versions.items() if version))
    if missing:
        yield Finding("packages", f"not installed: {', '.join(missing)}", Blame.INSTALLATION)


def _torch() -> Iterator[Finding]:
    import_error = _failure(lambda: importlib.import_module("torch"))
    if import_error is not None:
        yield Finding("torch", f"cannot be imported: {import_error}", Blame.INSTALLATION)
        return
    import torch

    yield Finding("torch", f"{torch.__version__}, built for CUDA {torch.version.cuda or '– (no GPU)'}")
    yield from _devices(torch)
    cores, threads = usable_cores(), torch.get_num_threads()
    yield Finding("cores", f"{cores:g} usable of {os.cpu_count()}, load {_load()}; torch uses {threads} threads")
    if threads > cores:
        advice = "write `threads: 1` in the graph, or set OMP_NUM_THREADS: more threads than cores wait for each other"
        yield Finding("cores", f"{threads} threads on {cores:g} cores; {advice}", Blame.NOTICE)


def _devices(torch: Any) -> Iterator[Finding]:
    names = ["cpu"]
    if torch.cuda.is_available():
        names += [
            f"cuda:{number} ({torch.cuda.get_device_name(number)})" for number in range(torch.cuda.device_count())
        ]
    if torch.backends.mps.is_available():
        names.append("mps")
    yield Finding("devices", ", ".join(names))
    driver = torch.version.cuda is None and shutil.which("nvidia-smi") is not None
    if driver:
        yield Finding("devices", "there is an NVIDIA driver, but this torch is built without CUDA", Blame.NOTICE)
    for name in names[1:]:
        device = name.split(" ")[0]
        failure = _failure(lambda device=device: torch.ones(1, device=device).sum().item())
        if failure is not None:
            yield Finding("devices", f"{device} cannot compute: {failure}", Blame.MACHINE)


def _torchvision() -> Iterator[Finding]:
    version = _version("torchvision")
    if version is None:
        yield Finding("torchvision", "not installed; images from disk need it", Blame.INSTALLATION)
        return
    failure = _failure(lambda: importlib.import_module("torchvision"))
    if failure is None:
        yield Finding("torchvision", version)
        return
    if "torchvision::nms does not exist" in failure:  # what shipped problems do without: they use none of its operators
        found = f"{version} without its operators, which were built for another torch; nothing here needs them"
        yield Finding("torchvision", found, Blame.NOTICE)
        return
    advice = ""
    if "torchvision::" in failure or "undefined symbol" in failure:
        advice = ": it was built for another torch; install both from the same index (cpu beside cpu)"
    yield Finding("torchvision", f"{version} cannot be imported: {failure}{advice}", Blame.INSTALLATION)


def _problems() -> Iterator[Finding]:
    names = problem_names()
    yield Finding("problems", ", ".join(names) or "none")
    for name in names:
        module = problem_module(name)
        failure = _failure(lambda module=module: importlib.import_module(module).build)
        if failure is not None:
            yield Finding("problems", f"{name} ({module}): {failure}", Blame.INSTALLATION)


def _graphs() -> Iterator[Finding]:
    graphs = shipped_graphs()
    broken = {name: failure for name, path in graphs.items() if (failure := _failure(lambda path=path: load(path)))}
    if not graphs:
        yield Finding("graphs", "none found beside or inside the package", Blame.INSTALLATION)
        return
    yield Finding("graphs", f"{len(graphs) - len(broken)} of {len(graphs)} load: {', '.join(graphs)}")
    for name, failure in broken.items():
        yield Finding("graphs", f"{name}: {failure}", Blame.INSTALLATION)


def _room(runs: Path) -> Iterator[Finding]:
    folder = next(folder for folder in (runs.absolute(), *runs.absolute().parents) if folder.exists())
    where = f"{runs}" if runs.exists() else f"{runs} (to be made in {folder})"
    if not folder.is_dir():
        yield Finding("runs", f"{folder} is in the way: it is no folder", Blame.MACHINE)
        return
    trial = folder / f".mlo-doctor-{os.getpid()}"
    failure = _failure(lambda: trial.write_bytes(b"0" * 4096))
    trial.unlink(missing_ok=True)
    if failure is not None:
        yield Finding("runs", f"{where} cannot be written: {failure}", Blame.MACHINE)
        return
    free = shutil.disk_usage(folder).free
    full = Blame.MACHINE if free < _ROOM else Blame.NOBODY
    yield Finding("runs", f"{where} can be written, {free / 2**30:,.1f} GiB free", full)


def usable_cores() -> float:
    """The processors this process may use: its affinity, or what its control group grants it, whichever is less."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return affinity
    return affinity if quota == "max" else min(affinity, int(quota) / int(period))


def _load() -> str:
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def _failure(attempt: Callable[[], object]) -> str | None:
    """The last line of what goes wrong, or None. Whatever a package raises on import is what a user needs to see."""
    try:
        attempt()
    except Exception as error:
        text = " ".join(str(error).split())
        return text if isinstance(error, MloError) else f"{type(error).__name__}: {text}"
    return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    root = Path(mlo.__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except OSError:  # no git on this machine
        return ""
    return f", commit {found.stdout.strip()}" if found.stdout.strip() else ""
