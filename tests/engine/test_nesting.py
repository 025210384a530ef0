"""Three and four levels, each subject to those below: the hypergradient is that of the whole nest."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, final

import pytest
import torch
from helpers import adam_by_hand, normal, relative_error, rmsprop_by_hand, sgd_by_hand
from nests import Nested, Steps, closed_form, hessian, program, solved, total_gradient
from torch import Tensor

import mlo
from mlo import _tree
from mlo.hypergradient import (
    AbstractHypergradient,
    AbstractInverse,
    CentralDifference,
    ConjugateGradient,
    Cost,
    Exact,
    FiniteDifference,
    FirstOrder,
    Implicit,
    Neumann,
    Tape,
    Unroll,
)
from mlo.optimizer import SGD, Adam, RMSprop

PROBLEMS = {
    "coupling 0.1": Nested(coupling=0.1),
    "coupling 1": Nested(coupling=1.0),
    "coupling 10": Nested(coupling=10.0),
    "not quadratic": Nested(coupling=1.0, bend=0.3),
}
problems = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=list(PROBLEMS))
solution = cache(solved)


def hypergradient(levels: list[mlo.Level], values: Any = None) -> Any:
    graph = mlo.Graph(levels)
    return graph.hypergradient("z", graph.init(values=values))


# At the solution.


@pytest.mark.parametrize("problem", list(PROBLEMS.values())[:3], ids=list(PROBLEMS)[:3])
def test_the_two_oracles_agree(problem):
    assert relative_error(solution(problem).hypergradient(), closed_form(problem)) < 1e-12


BELOW = {
    "exact": Exact(),
    "cg": ConjugateGradient(iterations=12),
    "neumann": Neumann(terms=20, step_size=1.0),
    "differences": Implicit(inverse=Exact(), cross=CentralDifference(radius=1e-3)),
}


@problems
@pytest.mark.parametrize("above", ["exact", "cg", "neumann"])
@pytest.mark.parametrize("below", BELOW)
def test_implicit_methods_give_the_derivative_of_the_solved_nest(problem, below, above):
    y = {
        "exact": Exact(),
        "cg": ConjugateGradient(iterations=12),
        "neumann": Neumann(terms=25, step_size=problem.rate),
    }[above]
    right = solution(problem).hypergradient()
    heavy = "neumann" in (below, above)
    for steps in (0, 1, 3)[: 2 if heavy else 3]:
        found = hypergradient(problem.levels(BELOW[below], y, (steps, steps)), solution(problem).values)
        assert relative_error(found, right) < (1e-6 if heavy or below == "differences" else 1e-9)


@problems
def test_an_implicit_method_and_a_long_unroll_meet_at_the_solution(problem):
    at, right = solution(problem).values, solution(problem).hypergradient()
    rules = SGD(learning_rate=1.0), SGD(learning_rate=problem.rate)
    for x, y, steps in [(Exact(), Unroll(), (1, 25)), (Unroll(), Exact(), (20, 1)), (Unroll(), Unroll(), (15, 30))]:
        assert relative_error(hypergradient(problem.levels(x, y, steps, rules=rules), at), right) < 1e-6


@problems
def test_central_differences_of_the_whole_solve_agree_with_the_oracle(problem):
    """The oracle itself, against nothing but solutions."""
    z, step = problem.start["z"], 1e-5

    def value(z: Tensor) -> Tensor:
        moved = Nested(coupling=problem.coupling, bend=problem.bend)
        object.__setattr__(moved, "start", {**problem.start, "z": z})
        at = solved(moved)
        return moved.z(z, at.y, at.x)

    slopes = [(value(z + step * one) - value(z - step * one)) / (2 * step) for one in torch.eye(2)]
    assert relative_error(torch.stack(slopes), solution(problem).hypergradient()) < 1e-8


# What is read by whom.


@pytest.mark.parametrize(
    ("free", "listed"),
    [((1.0, 1.0), ("y",)), ((1.0, 0.0), ("y", "x")), ((1.0, 0.0), ("y",)), ((0.0, 1.0), ("y", "x"))],
    ids=["z lists y only", "y does not list z", "y does not list z, z lists y only", "x does not list z"],
)
def test_z_reaches_y_along_every_way(free, listed):
    problem = Nested(coupling=1.0, bend=0.3, free=free)
    at = solution(problem) if free == (1.0, 1.0) else solved(problem)
    right = at.hypergradient(listed="x" in listed)
    assert right.norm() > 0.1
    for x, y in itertools.product((Exact(), ConjugateGradient(iterations=9)), repeat=2):
        assert relative_error(hypergradient(problem.levels(x, y, listed=listed), at.values), right) < 1e-9
    right = program(problem, Steps(2), Steps(2, sgd_by_hand(problem.rate)), listed="x" in listed)
    for x, y in itertools.product((Unroll(), Unroll(replay=True)), repeat=2):
        assert relative_error(hypergradient(problem.levels(x, y, (2, 2), listed=listed)), right) < 1e-12


# As it is computed.

RULES = {  # of x and of y, by the engine and by hand
    "sgd": ((SGD(learning_rate=0.5), SGD(learning_rate=0.2)), (sgd_by_hand(0.5), sgd_by_hand(0.2))),
    "momentum": (
        (SGD(learning_rate=0.3, momentum=0.8), SGD(learning_rate=0.1, momentum=0.9)),
        (sgd_by_hand(0.3, 0.8), sgd_by_hand(0.1, 0.9)),
    ),
    "adam, rmsprop": (
        (Adam(learning_rate=0.1), RMSprop(learning_rate=0.1)),
        (adam_by_hand(0.1), rmsprop_by_hand(0.1)),
    ),
    "rmsprop, adam": (
        (RMSprop(learning_rate=0.1), Adam(learning_rate=0.1)),
        (rmsprop_by_hand(0.1), adam_by_hand(0.1)),
    ),
}
COUNTS = [(1, 1), (2, 1), (3, 2), (2, 4)]
UNROLLS = {
    "direct": Unroll(),
    "replayed": Unroll(replay=True),
    "last": Unroll(last=1),
    "last two, replayed": Unroll(last=2, replay=True),
}


@problems
@pytest.mark.parametrize("rules", RULES)
def test_unrolled_nests_are_autograd_through_the_program(problem, rules):
    ours, by_hand = RULES[rules]
    for count in COUNTS:
        right = program(problem, Steps(count[0], by_hand[0]), Steps(count[1], by_hand[1]))
        for x, y in [(Unroll(), Unroll()), (Unroll(replay=True), Unroll(replay=True))]:
            assert relative_error(hypergradient(problem.levels(x, y, count, rules=ours)), right) < 1e-10


@pytest.mark.parametrize("above", UNROLLS)
@pytest.mark.parametrize("below", UNROLLS)
def test_every_pair_of_unrolls_holds_fixed_what_it_says(below, above):
    problem = PROBLEMS["not quadratic"]
    ours, by_hand = RULES["momentum"]
    x, y = UNROLLS[below], UNROLLS[above]
    for count in ((1, 1), (3, 2), (2, 3)):
        swept = [min(m.last, n) if m.last else None for m, n in zip((x, y), count, strict=True)]
        right = program(problem, Steps(count[0], by_hand[0], swept[0]), Steps(count[1], by_hand[1], swept[1]))
        assert relative_error(hypergradient(problem.levels(x, y, count, rules=ours)), right) < 1e-10


@pytest.mark.parametrize("rules", ["momentum", "adam, rmsprop"])
@pytest.mark.parametrize(
    ("below", "above", "count"),
    [("radius", "unroll", (1, 2)), ("radius", "unroll", (3, 2)), ("unroll", "radius", (3, 2)), ("radius", "radius", (1, 2))],
)  # fmt: skip
def test_finite_differences_in_a_nest_are_off_by_the_radius_squared(below, above, count, rules):
    problem = PROBLEMS["not quadratic"]
    ours, by_hand = RULES[rules]
    last = [1 if method == "radius" else None for method in (below, above)]
    right = program(problem, Steps(count[0], by_hand[0], last[0]), Steps(count[1], by_hand[1], last[1]))
    errors = []
    for radius in (1e-1, 1e-2):
        x, y = (FiniteDifference(radius=radius) if method == "radius" else Unroll() for method in (below, above))
        errors.append(relative_error(hypergradient(problem.levels(x, y, count, rules=ours)), right))
    assert errors[1] < 1e-3
    assert 80 < errors[0] / errors[1] < 125


# Four levels.


@dataclass(frozen=True, eq=False)
class Four:
    """t > z > y > x, quadratics or bent: what is below each is put in, and each is told apart by its own matrix."""

    bend: float = 0.0

    m: ClassVar[dict[str, Tensor]] = {
        key: torch.linalg.qr(normal(2, 2, seed=seed))[0] * 0.5 for seed, key in enumerate(("xy", "yx", "zy", "zx"))
    }
    n: ClassVar[dict[str, Tensor]] = {
        key: 0.4 * normal(2, 2, seed=20 + seed) for seed, key in enumerate(("xz", "xt", "yz", "yt", "zt"))
    }
    start: ClassVar[dict[str, Tensor]] = {name: 0.5 * normal(2, seed=40 + seed) for seed, name in enumerate("xyzt")}

    def x(self, x: Tensor, y: Tensor, z: Tensor, t: Tensor) -> Tensor:
        r = x - self.m["xy"] @ y - self.n["xz"] @ z - self.n["xt"] @ t
        return 0.5 * r.square().sum() + 0.25 * self.bend * x.pow(4).sum()

    def y(self, y: Tensor, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
        r = y - self.n["yz"] @ z - self.n["yt"] @ t - 0.3
        return 0.4 * r.square().sum() + 0.3 * (x + self.m["yx"] @ y).square().sum() + 0.25 * self.bend * y.pow(4).sum()

    def z(self, z: Tensor, y: Tensor, x: Tensor, t: Tensor) -> Tensor:
        r = z - self.n["zt"] @ t + 0.2
        rest = 0.3 * (y + self.m["zy"] @ z - 0.1).square().sum() + 0.2 * (x - self.m["zx"] @ z).square().sum()
        return 0.4 * r.square().sum() + rest + 0.25 * self.bend * z.pow(4).sum()

    def t(self, t: Tensor, z: Tensor, y: Tensor, x: Tensor) -> Tensor:
        return 0.5 * (z - 1).square().sum() + 0.3 * (y + t).square().sum() + x @ y + 0.1 * (x + z).sum()

    def levels(self, methods: Any, steps: int) -> list[mlo.Level]:
        given = {"x": ("y", "z", "t"), "y": ("z", "t"), "z": ("t",), "t": ()}
        below = {"x": (), "y": ("x",), "z": ("y", "x"), "t": ("z", "y", "x")}

        def level(name: str) -> mlo.Level:
            def objective(values: Any, batch: Any) -> Tensor:
                others = below[name] + given[name]
                return getattr(self, name)(values[name], *(values[other] for other in others))

            return mlo.Level(
                name,
                objective=objective,
                variables=self.start[name],
                given=given[name],
                subject_to=below[name],
                optimizer=SGD(learning_rate=0.4),
                steps=1 if name == "t" else steps,
                hypergradient=methods.get(name, Unroll()),
            )

        return [level(name) for name in "xyzt"]


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("replay", [False, True])
def test_four_levels_unrolled_are_autograd_through_the_program(steps, replay):
    nest = Four(bend=0.3)
    graph = mlo.Graph(nest.levels(dict.fromkeys("xyz", Unroll(replay=replay)), steps))
    t = nest.start["t"].clone().requires_grad_()
    each = Steps(steps, sgd_by_hand(0.4))

    def x(y: Tensor, z: Tensor) -> Tensor:
        return each.taken(lambda w, _: total_gradient(lambda own: nest.x(own, y, z, t), w), nest.start["x"])[0]

    def y(z: Tensor) -> Tensor:
        def loss(own: Tensor) -> Tensor:
            return nest.y(own, x(own, z), z, t)

        return each.taken(lambda w, _: total_gradient(loss, w), nest.start["y"])[0]

    def loss(own: Tensor) -> Tensor:
        below = y(own)
        return nest.z(own, below, x(below, own), t)

    z = each.taken(lambda w, _: total_gradient(loss, w), nest.start["z"])[0]
    below = y(z)
    right = torch.autograd.grad(nest.t(t, z, below, x(below, z)), t)[0]
    assert relative_error(graph.hypergradient("t", graph.init()), right) < 1e-10


@pytest.mark.parametrize(
    "methods",
    [
        dict.fromkeys("xyz", Exact()),
        dict.fromkeys("xyz", ConjugateGradient(iterations=6)),
        {"x": FirstOrder(), "y": Neumann(terms=15, step_size=0.9), "z": Neumann(terms=20, step_size=0.7)},
        {"x": Exact(), "y": ConjugateGradient(iterations=6), "z": Neumann(terms=25, step_size=0.7)},
    ],
    ids=["exact", "cg", "neumann", "mixed"],
)
def test_four_levels_at_the_solution_of_quadratics(methods):
    """f_x has the identity for its Hessian: a first-order response of x is exact."""
    nest = Four()

    def x(y: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return nest.m["xy"] @ y + nest.n["xz"] @ z + nest.n["xt"] @ t

    def minimum(function: Any) -> Tensor:
        zero = torch.zeros(2)
        return -torch.linalg.solve(hessian(function)(zero), torch.func.grad(function)(zero))

    def y(z: Tensor, t: Tensor) -> Tensor:
        return minimum(lambda own: nest.y(own, x(own, z, t), z, t))

    def z(t: Tensor) -> Tensor:
        return minimum(lambda own: nest.z(own, y(own, t), x(y(own, t), own, t), t))

    def solution(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        top = z(t)
        return top, y(top, t), x(y(top, t), top, t)

    t = nest.start["t"]
    right = torch.func.grad(lambda t: nest.t(t, *solution(t)))(t)
    graph = mlo.Graph(nest.levels(methods, 1))
    found = graph.hypergradient("t", graph.init(values=dict(zip("zyx", solution(t), strict=True))))
    assert relative_error(found, right) < 1e-6


# The Jacobian of a total gradient.


@final
@dataclass(frozen=True, eq=False)
class Captured(AbstractInverse):
    """Writes down the whole Jacobian it is asked to invert."""

    seen: list[Tensor]

    def products(self, size: int) -> int:
        return size

    def solve(self, at: Any, cotangent: Any) -> Any:
        self.seen.append(torch.stack([at.hessian(row) for row in torch.eye(len(cotangent))]))
        return cotangent


@final
@dataclass(frozen=True)
class Through(AbstractHypergradient):
    """A defect: the inverse is differentiated through its own arithmetic."""

    inverse: AbstractInverse

    def tape(self, steps: int, size: int) -> Tape:
        return self.inverse.tape(steps, size)

    def cost(self, steps: int, size: int) -> Cost:
        return self.inverse.cost(steps, size)

    def objection(self, optimizer: Any) -> None:
        return None

    def pullback(self, response: Any, cotangent: Any) -> Any:
        at = response.linearise()
        found = at.cross(self.inverse.solve(at, cotangent))
        return {name: _tree.scale(tree, by=-1.0) for name, tree in found.items()}


def asymmetry(method: AbstractHypergradient, steps: int = 2) -> float:
    seen: list[Tensor] = []
    hypergradient(PROBLEMS["not quadratic"].levels(method, Captured(seen), (steps, 1)))
    (jacobian,) = seen
    return ((jacobian - jacobian.T).norm() / jacobian.norm()).item()


@pytest.mark.parametrize(
    "method",
    [
        Exact(),
        Neumann(terms=1, step_size=0.5),
        Neumann(terms=7, step_size=0.8),
        FirstOrder(),
        FirstOrder(scale=0.3),
        Unroll(),
        Unroll(replay=True),
        Unroll(last=1),
        Unroll(last=2, replay=True),
        ConjugateGradient(iterations=9),
    ],
    ids=repr,
)
def test_the_jacobian_of_a_total_gradient_is_symmetric(method):
    assert asymmetry(method, steps=3) < (1e-11 if isinstance(method, ConjugateGradient) else 1e-13)


def test_finite_differences_below_are_symmetric_to_the_radius_squared():
    one, two = (asymmetry(FiniteDifference(radius=radius)) for radius in (1e-1, 1e-2))
    assert 80 < one / two < 125


def test_a_series_that_is_differentiated_through_is_not_symmetric():
    assert asymmetry(Through(Neumann(terms=1, step_size=0.5))) > 1e-4
    assert asymmetry(Through(Exact())) < 1e-13, "what is exact has one derivative"
