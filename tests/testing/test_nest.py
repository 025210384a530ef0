"""The kit's nest: its answers against its own solution, and what the property notices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import pytest
import torch
from hypothesis import given, settings

import mlo
from mlo import _tree
from mlo.hypergradient import AbstractHypergradient, Cost, Exact, Nesting, Tape
from mlo.testing import PROPERTIES, ClosedForm, check_method, problems
from mlo.testing._nest import MIDDLE, UPPER, Nest


@settings(max_examples=8)
@given(problem=problems())
def test_the_hypergradient_of_a_nest_is_the_slope_of_its_solution(problem):
    nest, step = Nest(problem), 1e-5
    u = nest.start[UPPER]
    found = nest.implicit(nest.solved(), torch.linalg.solve, torch.linalg.solve)
    for number, one in enumerate(torch.eye(len(u), dtype=u.dtype)):
        sides = [nest.value(nest.solved(u + sign * step * one)) for sign in (1, -1)]
        assert ((sides[0] - sides[1]) / (2 * step)).item() == pytest.approx(found[number].item(), rel=1e-6, abs=1e-7)


@settings(max_examples=20)
@given(problem=problems(condition=2))
def test_the_jacobian_in_the_middle_suits_the_settings_of_every_method(problem):
    nest = Nest(problem)
    _, (jacobian, _) = nest._total_gradient(nest.solved(), torch.linalg.solve)
    assert (jacobian - jacobian.T).norm() < 1e-14
    eigenvalues = torch.linalg.eigvalsh(jacobian)
    assert eigenvalues.min() >= 0.5
    assert eigenvalues.max() <= 1


@settings(max_examples=8)
@given(problem=problems())
def test_a_long_unroll_is_the_implicit_answer(problem):
    """From the solution for the y it starts with, where Newton's method has nothing to add."""
    nest = Nest(problem)
    low = nest._low(nest.start[MIDDLE], nest.start[UPPER])
    at = {**nest.start, "x": low}
    expected = nest.implicit(at, torch.linalg.solve, torch.linalg.solve)
    assert (nest.unrolled(300, None) - expected).norm() <= 1e-6 * (1 + expected.norm())


@final
@dataclass(frozen=True)
class Refusing(AbstractHypergradient):
    """A first-order method whose pullback cannot be differentiated, and that says so."""

    says_so: bool = True

    def tape(self, steps: int, size: int) -> Tape:
        return Tape(recorded=0, kept=1)

    def cost(self, steps: int, size: int) -> Cost:
        return Cost(gradients=1, products=1)

    def objection(self, optimizer: Any) -> None:
        return None

    def nesting(self, steps: int, size: int) -> Nesting:
        return Nesting(refused="it leaves autograd" if self.says_so else None)

    def pullback(self, response: Any, cotangent: Any) -> Any:
        found = response.linearise().cross(_tree.detach(cotangent))
        return {name: _tree.scale(tree, by=-1.0) for name, tree in found.items()}


def test_a_method_that_refuses_is_asked_in_the_middle_only():
    others = set(PROPERTIES) - {"nested"}
    check_method(Refusing(), answer="first_order", without=others, examples=5)
    with pytest.raises(AssertionError, match="below a level in the middle"):
        check_method(Refusing(says_so=False), answer="first_order", without=others, examples=5)
    layouts = dict.fromkeys("au", (("", (2,)),))
    nest = Nest(ClosedForm(reads={"a": (UPPER,)}, seen=("a",), layouts=layouts))
    with pytest.raises(mlo.GraphError) as caught:
        mlo.Graph(nest.levels(Refusing(), Exact(), 1))
    assert str(caught.value) == (
        "level 'x', hypergradient: it leaves autograd; the total gradient of 'y' is differentiated through it (or nested: "
        "direct)"
    )
