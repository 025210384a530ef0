"""Which problems there are, found without importing any: importing one imports torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import pkgutil
from collections.abc import Sequence

from mlo._errors import SpecError
from mlo.spec._faults import unknown
from mlo.spec._nodes import fold

GROUP = "mlo.problems"
_SHARED = "blocks"  # what problems are made of


def problem_names(imports: Sequence[str] = ()) -> list[str]:
    """Modules of `problems`, entry points of the group `mlo.problems`, and the modules in `imports`."""
    spec = importlib.util.find_spec("problems")
    places = spec.submodule_search_locations if spec is not None else None
    modules = [module.name for module in pkgutil.iter_modules(places or [])]
    points = [point.name for point in importlib.metadata.entry_points(group=GROUP)]
    shipped = [name for name in modules if not name.startswith("_") and name != _SHARED]
    return sorted({*shipped, *points, *(module.rpartition(".")[2] for module in imports)})


def problem_named(name: str, imports: Sequence[str] = ()) -> str | None:
    """The problem of that name in its published spelling; a module's full name will do for an import."""
    if name in imports:
        return name.rpartition(".")[2]
    return {fold(known): known for known in problem_names(imports)}.get(fold(name))


def problem_module(name: str, imports: Sequence[str] = ()) -> str:
    """The module that a problem comes from: an import wins over an entry point, and that over `problems`."""
    points = {fold(point.name): point.value for point in importlib.metadata.entry_points(group=GROUP)}
    imported = {fold(module.rpartition(".")[2]): module for module in imports}
    return imported.get(fold(name)) or points.get(fold(name)) or f"problems.{name}"


def known_problem(name: str, imports: Sequence[str] = ()) -> str:
    """The problem of that name in its published spelling. Raises `SpecError` where there is none."""
    found = problem_named(name, imports)
    if found is None:
        raise SpecError(unknown("problem", name, problem_names(imports)))
    return found
