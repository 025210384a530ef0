"""Planted defects, each in one small method, are caught, and the property that is named says what is wrong."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, final
from weakref import WeakKeyDictionary

import pytest
import torch
from helpers import flat

from mlo import _chunks, _linearisation, _step, _tree
from mlo._reduction import reduced
from mlo.hypergradient import (
    AbstractHypergradient,
    AbstractInverse,
    Cost,
    Exact,
    FiniteDifference,
    FirstOrder,
    Implicit,
    Neumann,
    Tape,
    Unroll,
)
from mlo.testing import PROPERTIES, check_method, problems, quadratics, two_levels
from mlo.testing._simulated import in_processes


@final
@dataclass(frozen=True)
class Altered(AbstractHypergradient):
    """`method` with another pullback, or another cost."""

    method: AbstractHypergradient
    pull: Callable[[AbstractHypergradient, Any, Any], Any]
    more: int = 0

    def tape(self, steps: int, size: int) -> Tape:
        return self.method.tape(steps, size)

    def cost(self, steps: int, size: int) -> Cost:
        gradients, products = self.method.cost(steps, size)
        return Cost(gradients, products + self.more)

    def objection(self, optimizer: Any) -> str | None:
        return self.method.objection(optimizer)

    def pullback(self, response: Any, cotangent: Any) -> Any:
        return self.pull(self.method, response, cotangent)


@final
@dataclass(frozen=True)
class Altering(AbstractInverse):
    """An inverse that is given as a function."""

    solution: Callable[[Any, Any], Any]
    count: int = 0

    def products(self, size: int) -> int:
        return self.count

    def solve(self, at: Any, cotangent: Any) -> Any:
        return self.solution(at, cotangent)


def correct(method: Any, response: Any, cotangent: Any) -> Any:
    return method.pullback(response, cotangent)


def scaled(upstream: Any, by: Any) -> Any:
    return {name: _tree.scale(tree, by=by) for name, tree in upstream.items()}


def no_sign(method: Any, response: Any, cotangent: Any) -> Any:
    return scaled(method.pullback(response, cotangent), -1.0)


def drops_the_last_iterate(at: Any, cotangent: Any) -> Any:
    """Conjugate gradients that keep the iterate before the last."""
    before = solution = _tree.zeros(cotangent)
    residual = direction = cotangent
    square = _tree.inner(residual, residual)
    for _ in range(2):
        image = at.hessian(direction)
        curvature = _tree.inner(direction, image)
        step = square / (curvature + (curvature == 0))
        before, solution = solution, _tree.add(solution, direction, scale=step)
        residual = _tree.add(residual, image, scale=-step)
        after = _tree.inner(residual, residual)
        direction = _tree.add(residual, direction, scale=after / (square + (square == 0)))
        square = after
    return before


def krylov_2(h: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
    q = torch.stack([cotangent, h @ cotangent], dim=1)
    return q @ torch.linalg.pinv(q.T @ h @ q) @ (q.T @ cotangent)


def divides_by_the_norm(at: Any, cotangent: Any) -> Any:
    """q = ‖λ‖ · (λ/‖λ‖)."""
    length = _tree.norm(cotangent)
    return _tree.scale(_tree.scale(cotangent, by=1 / length), by=length)


def redraws(method: Any, response: Any, cotangent: Any) -> Any:
    """Central differences whose two sides see other noise than the step did."""
    if not response.steps:
        return {}
    step = response.taken()[-1]
    q, epsilon = step.pull_update(cotangent), 1e-2
    sides = []
    for sign in (1, -1):
        record = step.record._replace(seed=step.record.seed + sign)
        fresh = replace(step, record=record)
        sides.append(fresh.gradient_of_reads(_tree.add(step.start, q, scale=sign * epsilon)))
    above, below = sides
    return {name: _tree.scale(_tree.subtract(above[name], below[name]), by=0.5 / epsilon) for name in above}


def restless(method: Any, response: Any, cotangent: Any, counter: Any = itertools.count(1)) -> Any:  # noqa: B008
    """Not the same twice, by a little."""
    return scaled(method.pullback(response, cotangent), 1 + 1e-13 * next(counter))


def writes_a_buffer(method: Any, response: Any, cotangent: Any) -> Any:
    for tensor in response.end.buffers.values():
        tensor.add_(1)
    return method.pullback(response, cotangent)


def writes_a_parameter(at: Any, cotangent: Any) -> Any:
    """As in-place perturbations do, behind autograd's back, and does not come back."""
    for tensor in _tree.leaves(at.variables):
        tensor.data.add_(0.1)
    return cotangent


def writes_the_cotangent(at: Any, cotangent: Any) -> Any:
    for tensor in _tree.leaves(cotangent):
        tensor.mul_(2)
    return _tree.scale(cotangent, by=0.5)


def ignores_a_tensor(at: Any, cotangent: Any) -> Any:
    if not isinstance(cotangent, Mapping) or len(cotangent) == 1:
        return cotangent
    last = max(cotangent)
    return {name: tensor * (name != last) for name, tensor in cotangent.items()}


def doubles_float32(at: Any, cotangent: Any) -> Any:
    return _tree.scale(cotangent, by=2.0 if _tree.leaves(cotangent)[0].dtype == torch.float32 else 1.0)


def clips(at: Any, cotangent: Any) -> Any:
    return _tree.scale(cotangent, by=(10 / _tree.norm(cotangent)).clamp(max=1))


def follows_the_order_of_a_dict(method: Any, response: Any, cotangent: Any) -> Any:
    """The level that happens to be listed first gets a little more."""
    upstream = method.pullback(response, cotangent)
    first = next(iter(upstream))
    return {name: _tree.scale(tree, by=1 + 1e-6 * (name == first)) for name, tree in upstream.items()}


def hides_what_is_not_a_number(method: Any, response: Any, cotangent: Any) -> Any:
    upstream = method.pullback(response, cotangent)
    return {name: _tree.apply(torch.nan_to_num, tree) for name, tree in upstream.items()}


def drops_a_path(method: Any, response: Any, cotangent: Any) -> Any:
    upstream = method.pullback(response, cotangent)
    return {name: _tree.scale(tree, by=float(name == max(upstream))) for name, tree in upstream.items()}


def linearises_at_the_start(method: Any, response: Any, cotangent: Any) -> Any:
    """The cross product where the last step started."""
    at = response.linearise()
    step = response.taken()[-1] if response.steps else None
    q = cotangent
    start = at.variables if step is None else step.start
    epsilon = 1e-3 / (_tree.norm(q) + 1e-12)
    above, below = (at.gradient_of_reads(_tree.add(start, q, scale=sign * epsilon)) for sign in (1, -1))
    return {name: _tree.scale(_tree.subtract(below[name], above[name]), by=0.5 / epsilon) for name in above}


def ignores_the_optimizer(method: Any, response: Any, cotangent: Any) -> Any:
    """q = −ηλ, which is the update of plain descent alone."""
    if not response.steps:
        return {}
    step, rate, radius = response.taken()[-1], response.level.optimizer.learning_rate, 1e-2
    q = _tree.scale(cotangent, by=-rate)
    length = _tree.norm(q)
    epsilon = radius / (length + (length == 0))
    above, below = (step.gradient_of_reads(_tree.add(step.start, q, scale=sign * epsilon)) for sign in (1, -1))
    return {name: _tree.scale(_tree.subtract(above[name], below[name]), by=0.5 / epsilon) for name in above}


KEPT: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def keeps_its_linearisation(method: Any, response: Any, cotangent: Any) -> Any:
    """A linearisation made once for a level, as if nothing moved between iterations."""
    at = KEPT.setdefault(response.level, response.linearise())
    return scaled(at.cross(cotangent), -1.0)


def forgets_moments(method: Any, response: Any, cotangent: Any) -> Any:
    """A replayed sweep that passes nothing on from moment to moment."""
    total: dict[str, Any] = {}
    for step in reversed(response.taken()):
        cotangent, _, upstream = step.replay(cotangent, {})
        for name, tree in upstream.items():
            total[name] = _tree.add(total[name], tree) if name in total else tree
    return total


def updates_running_statistics(method: Any, response: Any, cotangent: Any) -> Any:
    """What a forward pass in training mode does to the buffers it is handed, once an evaluation."""
    for name, tensor in response.end.buffers.items():
        if name.endswith("running_mean"):
            tensor.mul_(0.9)
        if name.endswith("num_batches_tracked"):
            tensor.add_(1)
    return method.pullback(response, cotangent)


def forgets_the_factor(at: Any, cotangent: Any) -> Any:
    """Σ (I − αH)ᵏ λ, α = 0.5, which is a direction and no solution."""
    term = series = cotangent
    for _ in range(2):
        term = _tree.add(term, at.hessian(term), scale=-0.5)
        series = _tree.add(series, term)
    return series


def holds_q_fixed(method: Any, response: Any, cotangent: Any) -> Any:
    """A pullback whose derivative leaves out that of the inverse, as one made outside of autograd does."""
    at = response.linearise()
    return scaled(at.cross(_tree.detach(at.inverse(method.solve, cotangent))), -1.0)


def differentiates_through(method: Any, response: Any, cotangent: Any) -> Any:
    """A truncated series, differentiated through its own arithmetic."""
    at = response.linearise()
    return scaled(at.cross(method.solve(at, cotangent)), -1.0)


def looks(at: Any, cotangent: Any) -> Any:
    return cotangent if _tree.norm(cotangent) != 0 else _tree.zeros(cotangent)


def counts_wrong(at: Any, cotangent: Any) -> Any:
    at.hessian(cotangent)
    return cotangent


SMOOTH = {"tolerance": 1e-3}
DEFECTS = {  # the method, the answer it claims, the property that must be named, how it is checked otherwise
    "sign": (Altered(Exact(), no_sign), "exact", "closed form", {"without": {"unused"}}),
    "factor α": (
        Altering(forgets_the_factor, 2),
        lambda h, v: 0.5 * (v + (v - 0.5 * h @ v) + (v - h @ v + 0.25 * h @ h @ v)),
        "closed form",
        {},
    ),
    "dropped last CG iterate": (
        Altering(drops_the_last_iterate, 2),
        krylov_2,
        "closed form",
        {"without": {"linearity"}, "tolerance": 1e-5},
    ),
    "NaN at a zero cotangent": (Altering(divides_by_the_norm), "first_order", "zero", {}),
    "fresh noise": (Altered(FiniteDifference(), redraws), "last_step", "common noise", SMOOTH),
    "is not a function": (Altered(Unroll(), restless), "unrolled", "common noise", {}),
    "buffer updated": (Altered(FiniteDifference(), updates_running_statistics), "last_step", "purity", SMOOTH),
    "writes a buffer": (Altered(Unroll(), writes_a_buffer), "unrolled", "purity", {}),
    "writes a parameter": (Altering(writes_a_parameter), "first_order", "purity", {}),
    "writes the cotangent": (Altering(writes_the_cotangent), "first_order", "purity", {}),
    "ignores a tensor of a tree": (Altering(ignores_a_tensor), "first_order", "closed form", {}),
    "doubles in float32": (Altering(doubles_float32), "first_order", "float32", {}),
    "clips": (Altering(clips), "first_order", "linearity", {}),
    "follows the order of a dict": (Altered(FirstOrder(), follows_the_order_of_a_dict), "first_order", "order", {}),
    "counts too little": (Altering(counts_wrong), "first_order", "cost", {}),
    "counts too much": (Altered(FirstOrder(), correct, more=1), "first_order", "exact cost", {}),
    "NaN to zero": (Altered(FirstOrder(), hides_what_is_not_a_number), "first_order", "loud", {}),
    "path dropped": (Altered(Unroll(), drops_a_path), "unrolled", "closed form", {}),
    "stale linearisation": (
        Altered(FirstOrder(), keeps_its_linearisation),
        "first_order",
        "another iteration",
        {},
    ),
    "linearises where the step started": (
        Altered(FirstOrder(), linearises_at_the_start),
        "first_order",
        "response",
        {**SMOOTH, "without": {"cost", "exact cost"}},
    ),
    "momentum ignored": (
        Altered(FiniteDifference(), ignores_the_optimizer),
        "last_step",
        "replayed = direct",
        {**SMOOTH, "without": {"loud"}},
    ),
    "momentum ignored, by an oracle that is not ours": (
        Altered(FiniteDifference(), ignores_the_optimizer),
        "last_step",
        "central differences",
        {**SMOOTH, "without": {"loud", "replayed = direct"}},
    ),
    "momentum ignored between replayed steps": (
        Altered(Unroll(replay=True), forgets_moments),
        "unrolled",
        "replayed = direct",
        {},
    ),
    "looks at a tensor": (Altering(looks), "first_order", "vmap", {}),
    "one term too few": (
        Neumann(terms=1, step_size=0.5),
        lambda h, v: 0.5 * v + 0.5 * v - 0.25 * h @ (v - h @ v),
        "closed form",
        {},
    ),
    "an inverse that does not exist": (Exact(), "exact", "unused", {}),
    "derivative of the inverse dropped in a nest": (
        Altered(Exact(), holds_q_fixed),
        "exact",
        "nested",
        {"without": {"unused"}},
    ),
    "differentiates through a series in a nest": (
        Altered(Neumann(terms=1, step_size=0.5), differentiates_through),
        lambda h, v: 0.5 * v + 0.5 * (v - 0.5 * h @ v),
        "nested",
        {},
    ),
}


@pytest.mark.parametrize(("method", "answer", "named", "options"), DEFECTS.values(), ids=list(DEFECTS))
def test_a_defect_is_caught_and_named(method, answer, named, options):
    with pytest.raises(AssertionError, match=rf"fails '{named}': ") as caught:
        check_method(method, answer=answer, examples=10, **options)
    assert re.search(r"smallest problem: .*\bseed 0\b", str(caught.value)), "shrunk"


@pytest.mark.parametrize("method", [Neumann(terms=3, step_size=0.5), FirstOrder(), Unroll(replay=True)])
def test_an_unreduced_product_is_caught(monkeypatch, method):
    """Planted in the engine, where products are reduced for all methods."""
    place = _step if isinstance(method, Unroll) else _linearisation
    monkeypatch.setattr(place, "reduced_trees", lambda trees, *_: (trees, []))
    claimed = {"two processes"}
    with pytest.raises(AssertionError, match=r"fails 'two processes': two processes have different hypergradients"):
        check_method(method, answer="exact", examples=3, without=set(PROPERTIES) - claimed)
    monkeypatch.undo()
    check_method(method, answer="exact", examples=3, without=set(PROPERTIES) - claimed)


@pytest.mark.parametrize("method", [Neumann(terms=3, step_size=0.5), Implicit(inverse=FirstOrder())])
def test_chunks_that_all_weigh_the_same_are_caught(monkeypatch, method):
    """Planted in the engine: of 8 samples 3, 3 and 2."""
    divided = _chunks.divided

    def evenly(*args):
        found = divided(*args)
        return [(batch, choices, 1 / len(found)) for batch, choices, _ in found]

    monkeypatch.setattr(_chunks, "divided", evenly)
    claimed = {"chunks"}
    with pytest.raises(AssertionError, match=r"fails 'chunks': 3 chunks of the batch differ from the whole by"):
        check_method(method, answer="exact", examples=3, without=set(PROPERTIES) - claimed)
    monkeypatch.undo()
    check_method(method, answer="exact", examples=3, without=set(PROPERTIES) - claimed)


def test_processes_that_reduce_different_things_do_not_wait_for_each_other():
    def reduces(times: int) -> Callable[[int], None]:
        def run(rank: int) -> None:
            for _ in range(1 + rank * times):
                reduced([torch.ones(2)], None, "w")

        return run

    assert in_processes(3, reduces(0)) == [None] * 3
    with pytest.raises(RuntimeError, match="do not reduce the same tensors in the same order"):
        in_processes(2, reduces(1))


def test_the_usual_faults_are_planted():
    """By these names; an unreduced product has a test of its own, `test_an_unreduced_product_is_caught`."""
    usual = {
        "sign",
        "factor α",
        "dropped last CG iterate",
        "NaN to zero",
        "fresh noise",
        "buffer updated",
        "momentum ignored",
        "path dropped",
        "stale linearisation",
        "derivative of the inverse dropped in a nest",
    }
    assert usual <= DEFECTS.keys()


def test_the_message_tells_the_smallest_problem_expected_and_found():
    with pytest.raises(AssertionError) as caught:
        check_method(
            Altered(FirstOrder(), no_sign), answer="first_order", problems=quadratics(shape=two_levels(), decays=[0.0])
        )
    first, problem, expected, found = str(caught.value).splitlines()
    assert "fails 'closed form': at the solution, it differs from the identity in place of the inverse by" in first
    assert problem == (
        "  smallest problem: quadratics of condition 10 in float64, seed 0: a (1 number) reads u; the objective of u "
        "(1 number) reads a (1 step of sgd, where the property asks for no other)"
    )
    numbers = [float(re.findall(r"\[(\S+)\]", line)[0]) for line in (expected, found)]
    assert numbers[0] == -numbers[1] != 0


def test_an_exception_is_told_with_its_problem_and_its_cause():
    def broken(at: Any, cotangent: Any) -> Any:
        raise KeyError("q")

    with pytest.raises(
        AssertionError, match=r"fails 'purity': it raised KeyError: 'q'\n  smallest problem: "
    ) as caught:
        check_method(Altering(broken), answer="first_order")
    assert isinstance(caught.value.__cause__, KeyError)


def test_the_same_problems_are_drawn_at_every_call():
    calls = []
    for _ in range(2):
        seen: list[Any] = []

        def record(at: Any, cotangent: Any, seen: list[Any] = seen) -> Any:
            seen.append(flat(cotangent).sum().item())
            return cotangent

        check_method(
            Altering(record), answer="first_order", examples=2, problems=problems(), without={"vmap", "zero", "loud"}
        )
        calls.append(seen)
    assert calls[0] == calls[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"answer": "exact", "without": ["linear"]}, "no property named 'linear'. Did you mean 'linearity'"),
        ({"answer": "right"}, "answer must be 'exact'"),
        ({"answer": 0}, "answer must be 'exact'"),
        ({"answer": "exact", "problems": quadratics(condition=1)}, "condition must be at least 2"),
    ],
)
def test_a_wrong_question_is_refused(options, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        check_method(FirstOrder(), **options)
