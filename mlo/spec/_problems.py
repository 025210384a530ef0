"""Which problems there are, found without importing any: importing one imports torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import pkgutil
from collections.abc import Sequence

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
