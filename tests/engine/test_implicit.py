"""Implicit methods, and unrolling in all its forms, against linear algebra written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    adam_by_hand,
    flat,
    memory_of,
    normal,
    optimizers,
    relative_error,
    respond_by_hand,
    same_bits,
    sgd_by_hand,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from quadratics import DESCENT, SHAPES, SIZE, Quadratics
from torch import Tensor, nn

import mlo
from mlo.hypergradient import (
    CentralDifference,
    ConjugateGradient,
    Exact,
    FirstOrder,
    Implicit,
    Neumann,
    Tape,
    Unroll,
)


@settings(max_examples=8)
@given(st.sampled_from(sorted(SHAPES)), st.sampled_from([1.0, 10.0, 100.0]), st.integers(0, 50), st.randoms())
@pytest.mark.parametrize(
    "method",
    [Exact(), ConjugateGradient(iterations=40), Neumann(terms=2500, step_size=1.0)],
    ids=lambda method: type(method).__name__,
)
def test_the_closed_form_is_reached_at_the_solution(method, shape, condition, seed, random):
    problem = Quadratics(shape, condition, seed)
    levels = problem.levels(method, 0, DESCENT)
    random.shuffle(levels)
    values, gradient = problem.solution()
    graph = mlo.Graph(levels)
    assert relative_error(graph.hypergradient("u", graph.init(values=values)), gradient) <= 1e-8


@pytest.mark.parametrize("condition", [10.0, 100.0])
@pytest.mark.parametrize("shape", sorted(SHAPES))
@pytest.mark.parametrize("replay", [False, True])
def test_unrolling_to_the_solution_reaches_the_closed_form(shape, condition, replay):
    problem = Quadratics(shape, condition, 7)
    optimizer = mlo.optimizer.SGD(learning_rate=1.0, momentum=0.8)
    graph = mlo.Graph(problem.levels(Unroll(replay=replay), 400, optimizer))
    _, gradient = problem.solution()
    assert relative_error(graph.hypergradient("u", graph.init()), gradient) <= 1e-8


class Network(nn.Module):
    """Batch statistics, dropout and tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def weighted(method: Any, optimizer: Any, steps: int) -> mlo.Graph:
    """A network on weighted samples, and the weights above it."""
    x, y = normal(8, 4, seed=1), normal(8, 2, seed=2)

    def inner(values: Any, batch: Any) -> Tensor:
        errors = (values["w"](x) - y).square().sum(1)
        return (errors * values["u"].sigmoid()).mean()

    def outer(values: Any, batch: Any) -> Tensor:
        return (values["w"](x) - 2 * y).square().mean()

    torch.manual_seed(3)
    descent = mlo.optimizer.SGD(learning_rate=0.1)
    lower = mlo.Level(
        "w",
        objective=inner,
        variables=Network().double(),
        given=("u",),
        optimizer=optimizer,
        steps=steps,
        hypergradient=method,
    )
    upper = mlo.Level("u", objective=outer, variables=normal(8, seed=4), subject_to=("w",), optimizer=descent)
    return mlo.Graph([lower, upper])


@pytest.mark.parametrize("optimizer", list(optimizers))
@pytest.mark.parametrize("last", [None, 1, 3])
def test_replayed_equals_direct(optimizer, last):
    made = optimizers[optimizer][0]
    direct, replayed = (weighted(Unroll(last=last, replay=replay), made, 6) for replay in (False, True))
    state = direct.init(seed=5)
    for _ in range(2):
        state, _ = direct.step(state)
    assert relative_error(replayed.hypergradient("u", state), direct.hypergradient("u", state)) <= 1e-12
    after, counted = replayed.step(state)
    assert same_bits(after.values["w"], direct.step(state)[0].values["w"])
    assert counted.gradients == 6 + 1 + (6 if last is None else last)
    assert counted.products == (6 if last is None else last)
    assert replayed.cost(1) == (counted.gradients, counted.products, 1)


@pytest.mark.parametrize("last", [1, 2, 5])
@pytest.mark.parametrize("by_hand", ["momentum", "adam"])
def test_the_last_k_steps_are_swept_over_and_the_others_held_fixed(last, by_hand):
    optimizer, update = {
        "momentum": (mlo.optimizer.SGD(learning_rate=0.05, momentum=0.9), sgd_by_hand(0.05, 0.9)),
        "adam": (mlo.optimizer.Adam(learning_rate=0.02), adam_by_hand(0.02)),
    }[by_hand]
    problem = Quadratics("two", 5.0, 11)
    graph = mlo.Graph(problem.levels(Unroll(last=last), 5, optimizer))
    before = mlo.Graph(problem.levels(Unroll(), 5 - last, optimizer)) if last < 5 else None
    state = graph.init()
    halfway = before.step(state)[0] if before else state
    u = problem.u.clone().requires_grad_()

    def loss(w: Any, _: int) -> Tensor:
        return 0.5 * w @ problem.h["a"] @ w - w @ (problem.c["a"] + problem.b["a", "u"] @ u)

    w = respond_by_hand(loss, halfway.values["a"], update, last, memory_of(halfway, "a"))
    (0.5 * (w - problem.t["a"]).square().sum()).backward()
    assert relative_error(graph.hypergradient("u", state), u.grad) <= 1e-12


def test_steps_are_replayed_by_size_and_by_hand():
    assert Unroll().tape(100, 1000).recorded == 100
    assert Unroll().tape(100, 1_000_000).kept == 100
    assert Unroll(last=3).tape(100, 1_000_000) == Tape(recorded=3, kept=0)
    assert Unroll(replay=True).tape(2, 1) == Tape(recorded=0, kept=2)
    assert Unroll(checkpoint="sqrt").tape(101, 1) == Tape(recorded=0, kept=101, every=11)
    with pytest.raises(ValueError, match="last must be at least 1"):
        Unroll(last=0)


# The partial answers that truncated methods promise.


def at_solution(method: Any, condition: float = 20.0, seed: int = 3) -> tuple[Tensor, Quadratics, Tensor]:
    """What arrives at u with `method` in place of the inverse, the problem, and the cotangent on the response."""
    problem = Quadratics("two", condition, seed)
    graph = mlo.Graph(problem.levels(method, 0, DESCENT))
    values, _ = problem.solution()
    return graph.hypergradient("u", graph.init(values=values)), problem, values["a"] - problem.t["a"]


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("terms", [0, 1, 7])
def test_neumann_is_its_partial_sum_and_obeys_its_bound(terms, damping):
    found, problem, cotangent = at_solution(Neumann(terms=terms, step_size=0.7, damping=damping))
    eye = torch.eye(SIZE, dtype=torch.float64)
    h = problem.h["a"] + damping * eye
    q = 0.7 * sum(torch.linalg.matrix_power(eye - 0.7 * h, k) @ cotangent for k in range(terms + 1))
    assert relative_error(found, problem.b["a", "u"].T @ q) <= 1e-12
    exact = torch.linalg.solve(h, cotangent)
    smallest = torch.linalg.eigvalsh(h)[0]
    assert (q - exact).norm() <= (1 - 0.7 * smallest) ** (terms + 1) * exact.norm() * (1 + 1e-12)


def test_first_order_is_the_first_term_of_neumann():
    assert same_bits(at_solution(FirstOrder(scale=0.7))[0], at_solution(Neumann(terms=0, step_size=0.7))[0])


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_conjugate_gradient_keeps_its_last_iterate_the_best_in_its_krylov_space(iterations):
    found, problem, cotangent = at_solution(ConjugateGradient(iterations=iterations))
    h = problem.h["a"]
    krylov = torch.stack([torch.linalg.matrix_power(h, k) @ cotangent for k in range(iterations)], dim=1)
    q = krylov @ torch.linalg.solve(
        krylov.T @ h @ krylov, krylov.T @ cotangent
    )  # minimises ‖q − H⁻¹λ‖_H over the space
    assert relative_error(found, problem.b["a", "u"].T @ q) <= 1e-9


@pytest.mark.parametrize("method", [Exact(damping=0.4), ConjugateGradient(iterations=20, damping=0.4)])
def test_damping_is_added_to_the_hessian(method):
    found, problem, cotangent = at_solution(method)
    h = problem.h["a"] + 0.4 * torch.eye(SIZE, dtype=torch.float64)
    assert relative_error(found, problem.b["a", "u"].T @ torch.linalg.solve(h, cotangent)) <= 1e-10


@pytest.mark.parametrize("inverse", [Exact(), ConjugateGradient(iterations=20), Neumann(terms=5, step_size=0.5)])
def test_an_inverse_and_a_cross_product_compose(inverse):
    exact = at_solution(inverse)[0]
    assert same_bits(at_solution(Implicit(inverse=inverse))[0], exact)
    near = at_solution(Implicit(inverse=inverse, cross=CentralDifference(radius=0.01)))[0]
    assert relative_error(near, exact) <= 1e-9  # no third derivative, but rounding


def one_level(hessian: Tensor, method: Any, target: Tensor) -> mlo.Graph:
    def inner(values: Any, batch: Any) -> Tensor:
        return 0.5 * values["w"] @ hessian @ values["w"] - values["w"] @ values["u"]

    def outer(values: Any, batch: Any) -> Tensor:
        return 0.5 * (values["w"] - target).square().sum()

    start = torch.zeros(len(hessian), dtype=torch.float64)
    lower = mlo.Level(
        "w", objective=inner, variables=start, given=("u",), optimizer=DESCENT, steps=1, hypergradient=method
    )
    return mlo.Graph([lower, mlo.Level("u", objective=outer, variables=start, subject_to=("w",), optimizer=DESCENT)])


def test_conjugate_gradient_solves_the_identity_in_one_iteration_and_reports_it():
    target = normal(4, seed=1)
    graph = one_level(torch.eye(4, dtype=torch.float64), ConjugateGradient(iterations=10), target)
    _, metrics = graph.step(graph.init())
    report = metrics.reports["u", "w"]
    assert report["iterations"] == 1
    assert report["residual"] <= 1e-12
    assert report["negative_curvature"] == 0
    assert metrics.products == 1 + 1  # one Hessian product, one cross product
    assert metrics.products <= graph.cost(1).products
    assert relative_error(graph.hypergradient("u", graph.init()), -target) <= 1e-12


def test_conjugate_gradient_gives_zero_for_a_zero_cotangent():
    graph = one_level(torch.eye(3, dtype=torch.float64), ConjugateGradient(iterations=5), torch.zeros(3))
    gradient = graph.hypergradient("u", graph.init())
    assert same_bits(gradient, torch.zeros(3))


def test_conjugate_gradient_stops_at_negative_curvature_and_says_so():
    hessian = torch.diag(torch.tensor([2.0, 1.0, -1.0]))
    graph = one_level(hessian, ConjugateGradient(iterations=10), torch.tensor([1.0, 1.0, 0.1]))
    state, metrics = graph.step(graph.init())
    assert metrics.reports["u", "w"]["negative_curvature"] == 1
    assert bool(state.values["u"].isfinite().all())
    exact = one_level(hessian, Exact(), torch.tensor([1.0, 1.0, 0.1]))
    assert relative_error(exact.hypergradient("u", exact.init()), torch.tensor([-0.5, -1.0, 0.1])) <= 1e-12


def test_a_tolerance_stops_early_and_the_residual_is_the_true_one():
    condition, tolerance = 1000.0, 1e-3
    problem = Quadratics("two", condition, 3)
    graph = mlo.Graph(problem.levels(ConjugateGradient(iterations=100, tolerance=tolerance), 1, DESCENT))
    state = graph.init()
    _, metrics = graph.step(state)
    report = metrics.reports["u", "a"]
    assert report["iterations"] < 100
    assert report["residual"] <= tolerance
    w = graph.step(state)[0].values["a"]
    exact = torch.linalg.solve(problem.h["a"], w - problem.t["a"])
    found = torch.linalg.solve(problem.b["a", "u"].T, graph.hypergradient("u", state))
    true = (problem.h["a"] @ (found - exact)).norm() / (w - problem.t["a"]).norm()
    torch.testing.assert_close(true, report["residual"], rtol=1e-6, atol=1e-12)


def test_a_singular_hessian_stops_an_exact_solve_loudly():
    graph = one_level(torch.diag(torch.tensor([1.0, 0.0])), Exact(), torch.ones(2))
    with pytest.raises(mlo.NumericalError, match=r"level 'u', step 1: the part of the hypergradient through 'w'"):
        graph.step(graph.init())


# What the optimizer minimises.


@pytest.mark.parametrize("method", [Exact(), ConjugateGradient(iterations=30), Neumann(terms=900, step_size=0.7)])
@pytest.mark.parametrize(
    "optimizer",
    [
        mlo.optimizer.SGD(learning_rate=0.5, weight_decay=0.2),
        mlo.optimizer.Adam(learning_rate=0.5, weight_decay=0.2),
        mlo.optimizer.RMSprop(learning_rate=0.5, weight_decay=0.2),
        mlo.optimizer.SGD(learning_rate=0.5, groups={"*": {"weight_decay": 0.2}}),
    ],
    ids=lambda optimizer: type(optimizer).__name__,
)
def test_the_l2_decay_of_an_optimizer_belongs_to_the_objective(method, optimizer):
    problem = Quadratics("chain", 10.0, 5, decay=0.2)
    graph = mlo.Graph(problem.levels(method, 0, optimizer))
    values, gradient = problem.solution()
    assert relative_error(graph.hypergradient("u", graph.init(values=values)), gradient) <= 1e-8


@pytest.mark.parametrize("method", [Exact(), FirstOrder(), Implicit(inverse=ConjugateGradient(iterations=3))])
def test_a_decoupled_decay_is_refused_with_its_reason(method):
    optimizer = mlo.optimizer.AdamW(learning_rate=0.1, weight_decay=0.1)
    problem = Quadratics("two", 2.0, 1)
    with pytest.raises(mlo.GraphError, match=r"level 'a', hypergradient: AdamW's decoupled weight decay"):
        mlo.Graph(problem.levels(method, 1, optimizer))
    mlo.Graph(problem.levels(method, 1, mlo.optimizer.AdamW(learning_rate=0.1, weight_decay=0.0)))
    mlo.Graph(problem.levels(Unroll(), 1, optimizer))


@pytest.mark.parametrize(
    "method", [Exact(), ConjugateGradient(iterations=12), Neumann(terms=6, step_size=0.5), Unroll(replay=True)]
)
def test_batched_equals_one_by_one(method):
    problem = Quadratics("diamond", 10.0, 9)
    graph = mlo.Graph(problem.levels(method, 2, DESCENT))
    state = graph.init()
    penalties = normal(3, SIZE, seed=77)

    def hypergradient(u: Tensor) -> Any:
        changed = mlo.State(values={**state.values, "u": u}, buffers=state.buffers, optimizers=state.optimizers)
        return graph.hypergradient("u", changed)

    together = torch.func.vmap(hypergradient)(penalties)
    for row, penalty in zip(together, penalties, strict=True):
        assert relative_error(row, hypergradient(penalty)) <= 1e-9


def test_a_network_with_batch_statistics_and_dropout_has_the_same_hessian_in_every_product():
    """Exact through many products equals the dense derivative: one draw, one set of statistics."""
    graph = weighted(Exact(damping=1.0), mlo.optimizer.SGD(learning_rate=0.05), 2)
    state = graph.init(seed=1)
    buffers = {name: tensor.clone() for name, tensor in state.buffers["w"].items()}
    solved = graph.hypergradient("u", state)
    iterated = weighted(ConjugateGradient(iterations=200, damping=1.0), mlo.optimizer.SGD(learning_rate=0.05), 2)
    other = iterated.hypergradient("u", iterated.init(seed=1))
    assert flat(solved).norm() > 0
    assert same_bits(state.buffers["w"], buffers)
    assert relative_error(other, solved) <= 1e-8 or iterated.step(state)[1].reports["u", "w"]["negative_curvature"] == 1


# What a second reader found.


def test_conjugate_gradient_passes_on_what_is_not_a_number():
    def inner(values: Any, batch: Any) -> Tensor:
        return (values["w"].abs() ** 1.5).sum() + (values["w"] * values["u"]).sum()

    def root(values: Any, batch: Any) -> Tensor:
        return (values["w"] ** 2).sum().sqrt()  # no derivative at 0

    def smooth(values: Any, batch: Any) -> Tensor:
        return (values["w"] - 1).square().sum()

    def square(values: Any, batch: Any) -> Tensor:
        return 0.5 * values["w"].square().sum() + (values["w"] * values["u"]).sum()

    for lower, upper in ((square, root), (inner, smooth)):
        zero = torch.zeros(3, dtype=torch.float64)
        method = ConjugateGradient(iterations=5)
        levels = [
            mlo.Level(
                "w", objective=lower, variables=zero, given=("u",), optimizer=DESCENT, steps=0, hypergradient=method
            ),
            mlo.Level("u", objective=upper, variables=zero, subject_to=("w",), optimizer=DESCENT),
        ]
        graph = mlo.Graph(levels)
        with pytest.raises(mlo.NumericalError, match="the part of the hypergradient through 'w'"):
            graph.step(graph.init())


def test_a_choice_is_made_once_for_a_linearisation_at_rest():
    made = []

    def inner(values: Any, batch: Any) -> Tensor:
        sign = values.once("sign", lambda: made.append(1) or (values["w"] > 0).double())
        return 0.5 * (values["w"] - values["u"] * (1 + sign)).square().sum()

    def outer(values: Any, batch: Any) -> Tensor:
        return values["w"].sum()

    method = Implicit(inverse=Exact(), cross=CentralDifference(radius=1.0))
    start = torch.tensor([-0.1, 0.5])
    levels = [
        mlo.Level(
            "w", objective=inner, variables=start, given=("u",), optimizer=DESCENT, steps=0, hypergradient=method
        ),
        mlo.Level("u", objective=outer, variables=torch.ones(2), subject_to=("w",), optimizer=DESCENT),
    ]
    graph = mlo.Graph(levels)
    assert relative_error(graph.hypergradient("u", graph.init()), torch.tensor([1.0, 2.0])) <= 1e-9
    assert len(made) == 1


def test_an_implicit_method_at_rest_that_reaches_nothing_is_an_error():
    def inner(values: Any, batch: Any) -> Tensor:
        return values["w"].square().sum()

    levels = [
        mlo.Level(
            "w",
            objective=inner,
            variables=torch.ones(2),
            given=("u",),
            optimizer=DESCENT,
            steps=0,
            hypergradient=Exact(),
        ),
        mlo.Level("u", objective=inner, variables=torch.ones(2), subject_to=("w",), optimizer=DESCENT),
    ]
    graph = mlo.Graph(levels)
    with pytest.raises(mlo.GraphError, match="does not reach back"):
        graph.hypergradient("u", graph.init())


@pytest.mark.parametrize("method", [mlo.hypergradient.FiniteDifference(), Unroll(), Exact()])
def test_an_objective_in_which_the_levels_do_not_meet_is_found_before_the_first_step(method):
    def inner(values: Any, batch: Any) -> Tensor:
        return values["w"].square().sum() + values["u"].square().sum()

    def outer(values: Any, batch: Any) -> Tensor:
        return values["w"].sum()

    levels = [
        mlo.Level("w", objective=inner, variables=torch.ones(2), given=("u",), optimizer=DESCENT, hypergradient=method),
        mlo.Level("u", objective=outer, variables=torch.ones(2), subject_to=("w",), optimizer=DESCENT),
    ]
    graph = mlo.Graph(levels)
    with pytest.raises(mlo.GraphError, match="does not reach back to 'u'"):
        graph.probe(graph.init())


def test_a_method_that_asks_for_both_finds_its_last_step_and_its_linearisation():
    """A recorded response keeps its last step too, and is linearised on that step's own batch."""
    problem = Quadratics("two", 4.0, 2)
    recorded, plain = (mlo.Graph(problem.levels(method, 3, DESCENT)) for method in (Both(), Exact()))
    assert relative_error(recorded.hypergradient("u", recorded.init()), plain.hypergradient("u", plain.init())) <= 1e-12


class Both(mlo.hypergradient.AbstractHypergradient):
    """Records one step and then asks for everything else."""

    def tape(self, steps: int, size: int) -> mlo.hypergradient.Tape:
        return mlo.hypergradient.Tape(recorded=1, kept=2)

    def cost(self, steps: int, size: int) -> mlo.hypergradient.Cost:
        return mlo.hypergradient.Cost(gradients=1, products=2 + size)

    def objection(self, optimizer: Any) -> None:
        return None

    def pullback(self, response: Any, cotangent: Any) -> Any:
        step = response.taken()[-1]
        replayed = step.replay(cotangent, {})[2]["u"]
        assert relative_error(response.pull_recorded(cotangent)["u"], replayed) <= 1e-12
        return Exact().pullback(response, cotangent)
