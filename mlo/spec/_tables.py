"""What a problem adds to the schema of graph files: it has to be built, and so imports torch."""

from __future__ import annotations

from collections.abc import Sequence

from mlo.spec._instance import builder_of, context_of, problem_of, settings_of
from mlo.spec._models import Origin, Spec
from mlo.spec._schema import Tables


def tables_of(spec: Spec) -> Tables:
    """The names and options of the problem of `spec`. Raises `SpecError` for data that it refuses."""
    problem = problem_of(spec, context_of(spec))
    return Tables(
        problem=spec.problem,
        settings=settings_of(builder_of(spec)),
        variables=problem.variables,
        objectives=problem.objectives,
        streams=tuple(problem.streams),
    )


def bare(problem: str, imports: Sequence[str] = ()) -> Spec:
    """A spec without levels that only names its problem, for looking at what the problem offers by default."""
    data = {"name": problem, "problem": problem, "iterations": 1, "levels": {}}
    return Spec.of(data, Origin(imports=tuple(imports)))
