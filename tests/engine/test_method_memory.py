"""What methods remember from one iteration to the next, and the random numbers they draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from helpers import flat, normal, relative_error, same_bits
from quadratics import DESCENT, SHAPES, SIZE, Quadratics
from torch import Tensor

import mlo
from mlo.hypergradient import AbstractInverse, AbstractLinearisation, ConjugateGradient, Exact, Neumann

WARM = ConjugateGradient(iterations=SIZE, warm_start=True)


@dataclass(frozen=True)
class Spy(AbstractInverse):
    """q = λ, after `look(at, λ)`."""

    look: Callable[[AbstractLinearisation, Any], None] = field(compare=False)

    def products(self, size: int) -> int:
        return 0

    def solve(self, at: AbstractLinearisation, cotangent: Any) -> Any:
        self.look(at, cotangent)
        return cotangent


def solved(
    method: Any, seed: int = 3, condition: float = 20.0, **changes: Any
) -> tuple[mlo.Graph, Quadratics, mlo.State]:
    """Two levels without steps, the lower one at its solution, whose objectives stay as they are while u moves."""
    problem = Quadratics("two", condition, seed)
    lower, upper = problem.levels(method, 0, DESCENT)
    graph = mlo.Graph([lower, replace(upper, **changes)])
    return graph, problem, graph.init(values=problem.solution()[0])


def at_solution(graph: mlo.Graph, problem: Quadratics, state: mlo.State) -> tuple[Tensor, Tensor]:
    """λ and H⁻¹λ at the lower level of `state`."""
    cotangent = state.values["a"] - problem.t["a"]
    return cotangent, torch.linalg.solve(problem.h["a"], cotangent)


# Memory


def test_a_state_begins_with_no_memory_and_a_step_remembers_what_methods_say():
    graph, problem, state = solved(WARM)
    assert state.memory == {}
    after, metrics = graph.step(state)
    assert set(after.memory) == {("u", "a"), ("u", "u")}
    assert state.memory == {}
    solution = after.memory["u", "a"]["solution"]
    assert relative_error(solution, at_solution(graph, problem, state)[1]) <= 1e-9
    assert not solution.requires_grad
    assert metrics.norms["u"].cosine is None


def test_a_warm_start_from_the_solution_takes_no_iteration_and_one_product():
    graph, _, state = solved(WARM)
    after, cold = graph.step(state)
    _, warm = graph.step(after)
    assert cold.reports["u", "a"]["iterations"] == SIZE
    assert warm.reports["u", "a"]["iterations"] == 0
    assert warm.products == 1 + 1  # Hq₋ and the cross product
    assert graph.cost(1).products == SIZE + 1 + 1


def test_asking_for_a_hypergradient_reads_the_memory_and_leaves_it_alone():
    graph, problem, state = solved(ConjugateGradient(iterations=1, warm_start=True))
    _, exact = at_solution(graph, problem, state)
    warm = replace(state, memory={("u", "a"): {"solution": exact.clone()}})
    right = problem.b["a", "u"].T @ exact
    assert relative_error(graph.hypergradient("u", state), right) > 1e-3  # one iteration from 0
    for _ in range(2):
        assert relative_error(graph.hypergradient("u", warm), right) <= 1e-12
        graph.parts("u", warm)
        graph.probe(warm)
        assert set(warm.memory) == {("u", "a")}
        assert same_bits(warm.memory["u", "a"]["solution"], exact)


@pytest.mark.parametrize("seed", range(6))
def test_a_warm_start_is_never_worse_than_a_cold_one_before_it_iterates(seed):
    """‖t q₋ − H⁻¹λ‖_H ≤ ‖H⁻¹λ‖_H for any q₋: seen after one iteration, which makes neither worse."""
    graph, problem, state = solved(ConjugateGradient(iterations=1, warm_start=True), seed=seed, condition=100.0)
    _, exact = at_solution(graph, problem, state)
    h = problem.h["a"]
    guess = 1e3 * normal(SIZE, seed=seed + 1000)
    found = graph.hypergradient("u", replace(state, memory={("u", "a"): {"solution": guess}}))
    error = torch.linalg.solve(problem.b["a", "u"].T, found) - exact
    size = guess @ (h @ exact) / (guess @ h @ guess)
    start = size * guess - exact
    assert error @ h @ error <= start @ h @ start <= exact @ h @ exact


def test_a_warm_start_is_the_same_to_its_tolerance_for_any_guess_and_for_none():
    graph, problem, state = solved(ConjugateGradient(iterations=200, tolerance=1e-6, warm_start=True), condition=1000.0)
    cotangent, _ = at_solution(graph, problem, state)
    for guess in (normal(SIZE, seed=1), -1e6 * normal(SIZE, seed=2), torch.zeros(SIZE)):
        after, metrics = graph.step(replace(state, memory={("u", "a"): {"solution": guess}}))
        residual = (problem.h["a"] @ after.memory["u", "a"]["solution"] - cotangent).norm() / cotangent.norm()
        assert residual <= 1e-6 * (1 + 1e-6)
        torch.testing.assert_close(metrics.reports["u", "a"]["residual"], residual, rtol=1e-3, atol=1e-12)


def test_a_zero_cotangent_gives_zero_however_warm_the_start():
    graph, problem, state = solved(WARM)
    values = {**state.values, "a": problem.t["a"].clone()}
    warm = replace(state, values=values, memory={("u", "a"): {"solution": normal(SIZE, seed=1)}})
    assert same_bits(graph.hypergradient("u", warm), torch.zeros(SIZE))


def test_negative_curvature_of_the_guess_is_reported_and_the_guess_left():
    hessian = torch.diag(torch.tensor([2.0, 1.0, -1.0]))

    def inner(values: Any, batch: Any) -> Tensor:
        return 0.5 * values["w"] @ hessian @ values["w"] - values["w"] @ values["u"]

    def outer(values: Any, batch: Any) -> Tensor:
        return values["w"] @ torch.tensor([1.0, 1.0, 0.0])

    start = torch.zeros(3)
    lower = mlo.Level(
        "w", objective=inner, variables=start, given=("u",), optimizer=DESCENT, steps=0, hypergradient=WARM
    )
    graph = mlo.Graph([lower, mlo.Level("u", objective=outer, variables=start, subject_to=("w",), optimizer=DESCENT)])
    state = replace(graph.init(), memory={("u", "w"): {"solution": torch.tensor([0.0, 0.0, 1.0])}})
    after, metrics = graph.step(state)
    report = metrics.reports["u", "w"]
    assert report["negative_curvature"] == 1
    assert report["lambda_min"] == -1
    assert relative_error(after.memory["u", "w"]["solution"], torch.tensor([0.5, 1.0, 0.0])) <= 1e-12


@pytest.mark.parametrize(
    "strange",
    [torch.ones(SIZE + 1), torch.ones(1, SIZE), torch.ones(SIZE, dtype=torch.float32), {"": torch.ones(SIZE)}],
    ids=["size", "shape", "dtype", "tree"],
)
def test_what_is_shaped_otherwise_is_not_recalled(strange):
    graph, _, state = solved(ConjugateGradient(iterations=1, warm_start=True))
    memory = {("u", "a"): {"solution": strange}, ("u", "u"): {"hypergradient": strange}}
    other = replace(state, memory=memory)
    assert same_bits(graph.hypergradient("u", other), graph.hypergradient("u", state))
    assert graph.step(other)[1].norms["u"].cosine is None


@pytest.mark.parametrize(
    "method", [ConjugateGradient(iterations=1, warm_start=True), Neumann(terms=3, step_size="auto")], ids=repr
)
def test_nothing_is_recalled_inside_a_transform(method):
    graph, _, state = solved(method)
    warm = graph.step(state)[0]
    rows = normal(3, SIZE, seed=5)

    def hypergradient(at: mlo.State) -> Callable[[Tensor], Any]:
        return lambda u: graph.hypergradient("u", replace(at, values={**state.values, "u": u}))

    together = torch.func.vmap(hypergradient(warm))(rows)
    cold = replace(warm, memory={})
    assert relative_error(together, torch.stack([hypergradient(cold)(row) for row in rows])) <= 1e-9
    one = hypergradient(warm)(rows[0])
    assert relative_error(one, together[0]) > 1e-6  # outside, it is recalled


def test_levels_that_rest_keep_their_memory_and_every_upper_level_has_its_own():
    problem = Quadratics("two", 20.0, 3)
    lower, upper = problem.levels(WARM, 1, DESCENT)
    other = replace(upper, name="v", objective=lambda values, batch: values["a"].sum() + values["v"].sum())
    rare = replace(upper, every=2)
    lower = replace(
        lower,
        given=("u", "v"),
        objective=lambda values, batch: (values["a"] - values["u"] * values["v"]).square().sum(),
    )
    graph = mlo.Graph([lower, rare, other])
    states = [graph.init()]
    for _ in range(3):
        states.append(graph.step(states[-1])[0])
    assert set(states[1].memory) == {("v", "a"), ("v", "v")}
    assert set(states[2].memory) == {("v", "a"), ("v", "v"), ("u", "a"), ("u", "u")}
    assert same_bits(states[3].memory["u", "a"]["solution"], states[2].memory["u", "a"]["solution"])
    assert relative_error(states[3].memory["v", "a"]["solution"], torch.full((SIZE,), 0.5)) <= 1e-12
    assert not same_bits(states[2].memory["u", "a"]["solution"], states[2].memory["v", "a"]["solution"])


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_a_warm_start_changes_no_answer_along_a_run(shape):
    problem = Quadratics(shape, 20.0, 5)
    warm, exact = (mlo.Graph(problem.levels(method, 2, DESCENT)) for method in (WARM, Exact()))
    state = warm.init()
    for _ in range(4):
        assert relative_error(warm.hypergradient("u", state), exact.hypergradient("u", state)) <= 1e-8
        state, _ = warm.step(state)


def test_a_method_recalls_what_it_remembered_by_name_and_level():
    seen: list[tuple[Any, Any]] = []

    def look(at: AbstractLinearisation, cotangent: Any) -> None:
        seen.append((at.recall("mine"), at.recall("other")))
        at.remember("mine", cotangent)

    graph, problem, state = solved(Spy(look))
    cotangent, _ = at_solution(graph, problem, state)
    state, _ = graph.step(state)
    assert seen == [(None, None)]
    graph.step(state)
    assert seen[1][1] is None
    assert same_bits(seen[1][0], cotangent)


# The cosine


def test_the_cosine_is_that_of_consecutive_hypergradients():
    problem = Quadratics("two", 20.0, 3)
    graph = mlo.Graph(problem.levels(Exact(), 1, mlo.optimizer.SGD(learning_rate=0.5)))
    state, before = graph.init(), None
    for _ in range(4):
        gradient = graph.hypergradient("u", state)
        state, metrics = graph.step(state)
        found = metrics.norms["u"].cosine
        if before is None:
            assert found is None
        else:
            right = torch.nn.functional.cosine_similarity(gradient, before, dim=0)
            torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-14)
        before = gradient


def test_of_several_upper_steps_the_cosine_is_that_of_the_last_two():
    graph, _, state = solved(Exact(), steps=3)
    gradients, at = [], state
    for _ in range(3):
        gradients.append(graph.hypergradient("u", at))
        at = replace(at, values={**at.values, "u": at.values["u"] - 0.1 * gradients[-1]})
    after, metrics = graph.step(state)
    cosine = torch.nn.functional.cosine_similarity(gradients[2], gradients[1], dim=0)
    torch.testing.assert_close(metrics.norms["u"].cosine, cosine, rtol=1e-12, atol=1e-14)
    assert same_bits(after.memory["u", "u"]["hypergradient"], gradients[2])


@pytest.mark.parametrize("size", [0.0, 1e-200, 1e150])
def test_the_cosine_is_a_number_whatever_the_size_of_a_hypergradient(size):
    graph, _, state = solved(Exact())
    memory = {("u", "u"): {"hypergradient": size * graph.hypergradient("u", state)}}
    cosine = graph.step(replace(state, memory=memory))[1].norms["u"].cosine
    assert cosine is not None
    assert cosine.item() == pytest.approx(float(size == 1e150), abs=1e-12)  # 1e-200 squared is 0, and so is its norm


# Random numbers


def drawn(levels_of: Any, seed: int = 0, indices: tuple[int, ...] = (0,)) -> list[Any]:
    found: list[Any] = []
    method = Spy(lambda at, cotangent: found.extend(at.normal(index) for index in indices))
    graph = mlo.Graph(levels_of(method))
    before = torch.random.get_rng_state()
    graph.step(graph.init(seed=seed))
    assert torch.equal(before, torch.random.get_rng_state())
    return found


def network(names: tuple[str, ...], size: int = 4) -> Callable[[Any], list[mlo.Level]]:
    """A level of several tensors that reads u."""

    def inner(values: Any, batch: Any) -> Tensor:
        return sum((values["w"][name] - values["u"]).square().sum() for name in names)

    def levels(method: Any) -> list[mlo.Level]:
        lower = mlo.Level(
            "w", objective=inner, variables={name: torch.zeros(size, 3) for name in names}, given=("u",),
            optimizer=DESCENT, hypergradient=method,
        )  # fmt: skip
        upper = mlo.Level(
            "u", objective=lambda values, batch: sum(values["w"][name].sum() for name in names),
            variables=torch.tensor(1.0), subject_to=("w",), optimizer=DESCENT,
        )  # fmt: skip
        return [lower, upper]

    return levels


def test_normal_numbers_depend_on_seed_index_and_name_and_on_nothing_else():
    levels = network(("one", "two"))
    first, again, second = drawn(levels, indices=(0, 0, 1))
    assert same_bits(first, again)
    assert first["one"].shape == (4, 3)
    for name in ("one", "two"):
        assert not torch.equal(first[name], second[name])
    assert not torch.equal(first["one"], first["two"])
    assert same_bits(first, drawn(levels)[0])
    assert not torch.equal(drawn(levels, seed=1)[0]["one"], first["one"])
    turned = drawn(network(("two", "one")))[0]
    assert all(torch.equal(turned[name], first[name]) for name in first)


def test_normal_numbers_are_standard_normal():
    numbers = flat(drawn(network(("one", "two"), size=4000))[0])
    assert abs(numbers.mean()) < 4 / len(numbers) ** 0.5
    assert abs(numbers.var() - 1) < 4 * (2 / len(numbers)) ** 0.5
    assert abs((numbers**4).mean() - 3) < 4 * (96 / len(numbers)) ** 0.5
