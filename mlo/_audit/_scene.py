"""One upper level at one iteration, up to the moment its cotangents have reached every level below it.

This is the one place where an audit touches the engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final

from mlo._engine import Iteration
from mlo._errors import MloError
from mlo._linearisation import Linearisation
from mlo._plan import Plan
from mlo._state import Parts, State, Tally
from mlo.hypergradient import FirstOrder

if TYPE_CHECKING:
    from mlo._level import Level
    from mlo._response import Response
    from mlo._types import Tree
    from mlo.hypergradient import AbstractHypergradient


@final
@dataclass(frozen=True, eq=False)
class Scene:
    """What the levels below `upper` have done, and the cotangent λ that arrives on each, by their own methods.

    - `parts`, `loss`: the hypergradient and the upper loss; None where a method failed, which `failure` tells.
    """

    inside: Iteration
    upper: str
    responses: Mapping[str, Response]
    parts: Parts | None
    loss: float | None
    failure: str | None

    @classmethod
    def of(
        cls, plan: Plan, upper: str, state: State, batches: Mapping[str, Any], moving: Iterable[str] | None = None
    ) -> Scene:
        """Let the levels in `moving` respond, or those alone that `upper` is subject to, and sweep back from `upper`.

        Raises `NumericalError` for a loss that is not finite, `GraphError` for a level that is disconnected. A method that
        fails leaves the levels behind it without a cotangent.
        """
        inside = Iteration.of(plan, state, batches)
        below = plan.differentiated(upper)
        live = (upper, *below)
        if moving is None:
            taken = inside.respond_below(upper, live)
        else:
            run, taken = set(moving), dict[str, "Response"]()
            inner = {lower for name in run & plan.nested for lower in plan.differentiated(name)}  # taken anew above
            for name in (name for name in plan.levels if name in run):
                taken |= inside.retaken(name, () if name in inner else below, live)
        inside.finite.refuse(inside.number)
        responses = {name: taken[name] for name in below}
        try:
            parts, loss, _ = inside.differentiate(upper, responses, 0, whole=True)
        except MloError:
            raise
        except Exception as error:  # an operator without a second derivative, too little memory
            if not inside.tally.pullbacks:
                raise  # the upper objective itself
            at = inside.tally.pullbacks[-1][1]
            return cls(inside, upper, responses, None, None, f"the method of '{at}' fails: {brief(error)}")
        return cls(inside, upper, responses, parts, loss.item(), None)

    @property
    def cotangents(self) -> Mapping[str, Tree]:
        """λ by level, in the order in which levels are reached; a level that nothing has reached is absent."""
        return {level: each for (upper, level), each in self.inside.tally.cotangents.items() if upper == self.upper}

    def level(self, name: str) -> Level:
        """The level as the graph has it."""
        return self.inside.plan.levels[name]

    def respond(self, name: str, **changes: Any) -> Response:
        """The response of level `name` again, with `changes` to the level; its reads stand where they stood for it."""
        plan = self.inside.plan
        levels = {**plan.levels, name: replace(plan.levels[name], **changes)}
        tally = Tally(recalled=self.inside.tally.recalled)
        again = replace(self.inside, plan=Plan(levels, plan.skeletons), now=dict(self.inside.now), tally=tally)
        return again.respond(name, (self.upper, *self.responses))

    def respond_for(self, name: str, method: AbstractHypergradient) -> Response:
        """The response of level `name` with what `method` wants to have kept of its steps."""
        return self.respond(name, hypergradient=method)

    def linearised(self, name: str) -> Linearisation:
        """f of level `name` at its response."""
        return _linearisation(self.respond_for(name, FirstOrder()))

    def linearised_at_start(self, name: str) -> Linearisation:
        """f of level `name` where its steps began, on the draws of the first."""
        return _linearisation(self.respond(name, steps=0, hypergradient=FirstOrder()))


def _linearisation(response: Response) -> Linearisation:
    at = response.linearise()
    assert isinstance(at, Linearisation)
    return at


def brief(error: Exception) -> str:
    """An error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
