"""The runs of trials, where each of them lies, and whether the values that are searched can be run at all."""

from __future__ import annotations

import re
from collections.abc import Callable
from hashlib import sha256
from typing import TYPE_CHECKING
from urllib.parse import quote

from mlo._errors import SpecError, UserError
from mlo._search._asked import Asked
from mlo._search._space import Point, corners
from mlo._table._plan import Cell, Plan

if TYPE_CHECKING:
    from mlo.spec import Spec

_LONGEST = 200
"""Characters of a folder's name; file systems take 255 bytes."""
_OVERRIDE = re.compile(r"<override .*?>: ")


def plan(asked: Asked, points: tuple[Point, ...]) -> Plan:
    """The cells of `points`: all of the first seed, then those of the next. Imports neither torch nor any problem.

    Raises `SpecError` for values that do not fit together.
    """
    base = asked.base()
    cells = tuple(
        Cell(label(point), seed, base.replaced(*point, f"seed={seed}"), asked.out / _folder(point) / f"seed-{seed}")
        for seed in asked.seeds
        for point in points
    )
    return Plan(out=asked.out, graphs=tuple(map(label, points)), seeds=asked.seeds, cells=cells)


def label(point: Point) -> str:
    """What a trial is called: `levels.weights.steps=20, iterations=100`."""
    return ", ".join(point)


def check_space(asked: Asked) -> None:
    """Read the graph with every value of a list and both ends of every range, without torch.

    Raises one `SpecError` with all mistakes.
    """
    _refuse(asked)


def check_problem(asked: Asked) -> None:
    """The same, and whether the problem takes the values and has the metric; imports torch."""
    from mlo._run._evaluate import try_evaluation
    from mlo.spec._build import assemble
    from mlo.spec._faults import unknown

    _refuse(asked, assemble)
    assembly = assemble(asked.base())
    if assembly.problem.evaluate is None:
        raise UserError(f"{asked.graph}: its problem evaluates nothing, so there is nothing to search by")
    metrics = try_evaluation(assembly, assembly.graph.init(seed=assembly.spec.seed))
    if metrics and asked.metric not in metrics:
        raise UserError(f"--metric {asked.metric}: {unknown('metric', asked.metric, metrics)}")


def _refuse(asked: Asked, build: Callable[[Spec], object] | None = None) -> None:
    """Raise one `SpecError` with what is wrong at the corners: an unknown key once, not with each of its values."""
    base = asked.base()
    mistakes: dict[str, str] = {}
    for point in corners(asked.space):
        try:
            spec = base.replaced(*point)
            if build is not None:
                build(spec)
        except UserError as error:
            for mistake in re.split(r"\n(?=\S)", str(error)):
                mistakes.setdefault(_OVERRIDE.sub("", mistake, count=1), mistake)
    if mistakes:
        raise SpecError("\n".join(mistakes.values()))


def _folder(point: Point) -> str:
    """One folder's name, whatever is in the values."""
    name = quote(label(point), safe=" =,")
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 17]}-{sha256(name.encode()).hexdigest()[:16]}"
