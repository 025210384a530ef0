"""What the pullbacks of a level are held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from mlo import _tree
from mlo._audit._scene import brief
from mlo._audit._vectors import flattened, is_finite
from mlo.hypergradient import FirstOrder, Implicit, Unroll

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._audit._curvature import Curvature
    from mlo._audit._report import Reference
    from mlo._audit._scene import Scene
    from mlo._types import Tree, Upstream


@final
@dataclass(frozen=True, eq=False)
class References:
    """What pullbacks are held against, as flat vectors by read; None where there is none, for a reason in `missing`."""

    unrolled: Mapping[str, Tensor] | None
    implicit: Mapping[str, Tensor] | None
    first_order: Mapping[str, Tensor] | None
    solve: Reference | None
    missing: tuple[str, ...]

    @classmethod
    def of(cls, scene: Scene, level: str, cotangent: Tree, curvature: Curvature | None) -> References:
        """The derivative of the steps as they were taken, the implicit one at the response, and q = λ in its place."""
        found: dict[str, Mapping[str, Tensor]] = {}
        missing: list[str] = []

        def attempt(name: str, work: Callable[[], Upstream]) -> None:
            try:
                vectors = flattened(work())
            except Exception as error:
                missing.append(f"no {name} reference: {brief(error)}")
                return
            if vectors and is_finite(vectors):
                found[name] = vectors
            else:
                reason = "it is not finite" if vectors else "it finds that the response depends on nothing"
                missing.append(f"no {name} reference: {reason}")

        solve: list[Reference] = []
        if scene.level(level).steps:
            attempt("unrolled", lambda: Unroll().pullback(scene.respond_for(level, Unroll()), cotangent))
        objection = implicit_objection(scene, level)
        if objection is not None:
            missing.append(f"no implicit reference: {objection}")
        elif curvature is not None:

            def solved() -> Upstream:
                q, how = curvature.solve(cotangent)
                solve.append(how)
                return {name: _tree.scale(part, by=-1.0) for name, part in curvature.at.cross(q).items()}

            attempt("implicit", solved)
            attempt("first-order", lambda: FirstOrder().pullback(scene.respond_for(level, FirstOrder()), cotangent))
        return cls(
            found.get("unrolled"),
            found.get("implicit"),
            found.get("first-order"),
            solve[0] if solve else None,
            tuple(missing),
        )


def implicit_objection(scene: Scene, level: str) -> str | None:
    """Why the level's response cannot be differentiated as a solution, or None."""
    optimizer = scene.level(level).optimizer
    assert optimizer is not None, "a constant has no response"
    return Implicit(inverse=FirstOrder()).objection(optimizer)
