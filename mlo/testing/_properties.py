"""The properties a hypergradient method is held to, from the most telling to the most general."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, final

import torch

from mlo import _tree
from mlo._graph import Graph
from mlo._state import Batches
from mlo.hypergradient import AbstractHypergradient, Unroll
from mlo.testing._case import FLOOR, Case, Violation, contents, copied, counted, same_bits, stopped
from mlo.testing._closed_form import UPPER
from mlo.testing._families import normal
from mlo.testing._layout import flat, with_unused
from mlo.testing._nest import nested
from mlo.testing._network import SAMPLED, WORDS, Noisy, network, sampled, samples, weighted
from mlo.testing._simulated import in_processes

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._types import Tree, Upstream
    from mlo.hypergradient import AbstractResponse, Cost, Tape
    from mlo.optimizer import AbstractOptimizer

ROUNDING = 1e-9
"""What two orders of the same arithmetic may differ by in float64, relatively."""


def cotangents(case: Case, what: str) -> dict[str, Tensor]:
    """A random cotangent on every lower level that the upper objective reads."""
    return {
        name: normal(len(case.problem.start[name]), key=(case.problem.seed, what, name)) for name in case.problem.seen
    }


def zero(case: Case) -> None:
    """A zero cotangent gives exactly zero."""
    found = case.pulled(case.graph(objective=case.linear), {k: 0 * v for k, v in cotangents(case, "zero").items()})
    if bool((found != 0).any()):
        raise Violation("a zero cotangent is not pulled back to zero", torch.zeros_like(found), found)


def still(case: Case) -> None:
    """Where every gradient is exactly zero, a cotangent that is not gives finite numbers, with every optimizer.

    In float64: Adam and RMSprop amplify by learning_rate/epsilon there, a step, and float32 may rightly overflow.
    """
    case = case.on(replace(case.problem, family="quadratic", dtype=torch.float64, at_rest=True))
    found = case.pulled(case.graph(objective=case.linear), cotangents(case, "still"))
    if not bool(found.isfinite().all()):
        raise Violation(
            "gradients that are exactly zero give a hypergradient that is not finite", "finite numbers", found
        )


def loud(case: Case) -> None:
    """A cotangent that is not a number stops the run with `NumericalError`; it is never turned into a number."""
    case = case.on(replace(case.problem, family="quadratic", at_rest=True))

    def cusp(values: Any, batch: Any) -> Tensor:
        own = flat(values[UPPER]).square().sum()
        return own + sum((flat(values[name]).square().sum().sqrt() for name in case.problem.seen), 0 * own)

    graph = case.graph(rule=case.problem.descent, objective=cusp)
    with stopped() as errors:
        graph.step(graph.init())
    if not errors:
        found = graph.parts(UPPER, graph.init()).indirect
        raise Violation("a cotangent that is not a number passes without a word", "NumericalError", found)


def purity(case: Case) -> None:
    """State, buffers, module, batch, cotangent, the response and the RNG are left as they were, bit for bit."""
    watched = replace(case, method=_Watched(case.method))
    for steps in (0, case.steps):
        graph = Graph(case.problem.levels(watched.method, steps=steps, optimizer=case.rule()))
        _leaves_alone(graph, f"{case.problem}; {counted(steps)}")
    for steps in (0, case.steps):
        module = network(case.problem.seed)
        before = copied(dict(module.state_dict()))
        graph = Graph(weighted(module, watched.method, steps, case.problem.seed))
        _leaves_alone(graph, f"{WORDS}; {counted(steps)}, seed {case.problem.seed}")
        if not same_bits(before, dict(module.state_dict())):
            raise Violation("the caller's module was changed", before, dict(module.state_dict()), WORDS)
        alone = Graph(weighted(module, case.method, steps, case.problem.seed, frozen=True))
        left = [contents(each.step(each.init(seed=5))[0]) for each in (alone, graph)]
        for what in ("values", "buffers"):
            expected, found = (each[what]["w"] for each in left)
            if not same_bits(expected, found):
                raise Violation(f"being differentiated changes the lower level's new {what}", expected, found, WORDS)


def _leaves_alone(graph: Graph, on: str | None) -> None:
    state = graph.init(seed=5)
    before, random = copied(contents(state)), torch.random.get_rng_state()
    graph.hypergradient(UPPER, state)
    for what, expected in before.items():
        found = contents(state)[what]
        if not same_bits(expected, found):
            raise Violation(f"the {what} of the state were changed in place", expected, found, on)
    if not torch.equal(random, torch.random.get_rng_state()):
        raise Violation("the global RNG was left in another state", on=on)


@final
@dataclass(frozen=True)
class _Watched(AbstractHypergradient):
    """A method whose arguments are looked at before and after."""

    method: AbstractHypergradient

    def tape(self, steps: int, size: int) -> Tape:
        """See the method."""
        return self.method.tape(steps, size)

    def cost(self, steps: int, size: int) -> Cost:
        """See the method."""
        return self.method.cost(steps, size)

    def objection(self, optimizer: AbstractOptimizer) -> str | None:
        """See the method."""
        return self.method.objection(optimizer)

    def pullback(self, response: AbstractResponse, cotangent: Tree) -> Upstream:
        """See the method. Violated if it changes the cotangent or where a step started."""
        starts = [copied(step.start) for step in response.taken()]
        given = copied(cotangent)
        found = self.method.pullback(response, cotangent)
        if not same_bits(given, cotangent):
            raise Violation("the cotangent was changed in place", given, cotangent)
        for start, step in zip(starts, response.taken(), strict=True):
            if not same_bits(start, step.start):
                raise Violation("the start of a step was changed in place", start, step.start)
        return found


def noise(case: Case) -> None:
    """Every evaluation of a step sees its noise and its choices: the same twice, bit for bit, and as if it were data."""
    seed, problem = case.problem.seed, Noisy()
    on = f"{Noisy.WORDS}; {counted(case.steps)}, seed {seed}"
    graph = Graph(problem.levels(case.method, case.steps, seed, drawn=True))
    batches = {"w": Batches(range(case.steps))}
    first, second = (graph.hypergradient(UPPER, graph.init(seed=seed), batches) for _ in range(2))
    for step, seen in problem.seen.items():
        for other in seen[1:]:
            if not all(map(torch.equal, seen[0], other)):
                raise Violation(f"step {step + 1} was evaluated again with other noise", seen[0], other, on)
    if not same_bits(first, second):
        raise Violation("the same hypergradient, taken twice, differs", first, second, on)
    graph = Graph(problem.levels(case.method, case.steps, seed, drawn=False))
    batches = {"w": Batches([problem.seen[step][0] for step in range(case.steps)])}
    expected = graph.hypergradient(UPPER, graph.init(), batches)
    assert isinstance(first, torch.Tensor)
    assert isinstance(expected, torch.Tensor)
    error = ((first - expected).norm() / expected.norm()).item()
    if not error <= 1e-6:
        raise Violation(f"noise drawn inside and the same noise as data differ by {error:.1e}", expected, first, on)


def linearity(case: Case) -> None:
    """The pullback of aλ + bμ is a times that of λ plus b times that of μ, for large and small a and b."""
    graph = case.graph(objective=case.linear)
    one, two = cotangents(case, "one"), cotangents(case, "two")
    pulled_one, pulled_two = case.pulled(graph, one), case.pulled(graph, two)
    for a, b in ((1.0, 1.0), (1e3, -3e2), (1e-3, 2e-3)):
        found = case.pulled(graph, {name: a * one[name] + b * two[name] for name in one})
        expected = a * pulled_one + b * pulled_two
        size = ((abs(a) * pulled_one.norm() + abs(b) * pulled_two.norm()) / max(a, abs(b))).item()
        what = f"the pullback of {a:g}λ + {b:g}μ differs from {a:g} that of λ + {b:g} that of μ"
        scale = max(a, abs(b))
        try:
            case.compare(what, found / scale, expected / scale, case.allowed, size=size)
        except Violation as violation:
            raise Violation(violation.wrong, expected, found) from None


def another_iteration(case: Case) -> None:
    """A hypergradient is a function of the state: at a second iteration it is that of a graph made anew, bit for bit.

    And at the first, taken again, what it was there.
    """
    graph = case.graph()
    state = graph.init()
    before = graph.hypergradient(UPPER, state)
    moved, _ = graph.step(state)
    found = graph.hypergradient(UPPER, moved)
    fresh = case.graph()
    expected = fresh.hypergradient(UPPER, moved)
    if not same_bits(expected, found):
        what = "after an iteration it differs from that of a graph made anew and started from the same state"
        raise Violation(what, expected, found)
    found = graph.hypergradient(UPPER, state)
    if not same_bits(before, found):
        raise Violation("where it was taken before the iteration it is no longer the same", before, found)


def order(case: Case) -> None:
    """Levels and what they list in another order: the same bits. Tensors in another order: the same to rounding."""
    right = case.graph().hypergradient(UPPER, case.graph().init())
    levels = case.problem.levels(case.method, steps=case.steps, optimizer=case.rule())
    turned = [
        replace(level, given=tuple(reversed(level.given)), subject_to=tuple(reversed(level.subject_to)))
        for level in reversed(levels)
    ]
    graph = Graph(turned)
    found = graph.hypergradient(UPPER, graph.init())
    if not same_bits(right, found):
        what = "levels, and the levels each one reads, declared in reverse give another hypergradient"
        raise Violation(what, right, found)
    layouts = {name: tuple(reversed(layout)) for name, layout in case.problem.layouts.items()}
    other = case.on(replace(case.problem, layouts=layouts))
    found = other.vector(other.graph().hypergradient(UPPER, other.graph().init()))
    allowed = ROUNDING if case.problem.dtype == torch.float64 else case.float32_tolerance
    allowed = max(allowed, case.allowed)
    case.compare("tensors declared in another order change the hypergradient", found, case.vector(right), allowed)


def cost(case: Case) -> None:
    """`Method.cost` predicts at least what is counted."""
    predicted, used = _costs(case)
    if any(least < most for least, most in zip(predicted, used, strict=True)):
        raise Violation("(gradients, products) of an iteration are more than predicted", predicted, used)


def exact_cost(case: Case) -> None:
    """`Method.cost` predicts exactly what is counted: not claimed by methods that stop at a tolerance."""
    predicted, used = _costs(case)
    if predicted != used:
        raise Violation("(gradients, products) of an iteration are not those predicted", predicted, used)


def _costs(case: Case) -> tuple[tuple[int, int], tuple[int, int]]:
    graph = case.graph()
    _, metrics = graph.step(graph.init())
    predicted = graph.cost(1)
    return (predicted.gradients, predicted.products), (metrics.gradients, metrics.products)


def float32(case: Case) -> None:
    """The hypergradient in float32 is that in float64, to `float32_tolerance`."""
    narrow = case.on(replace(case.problem, dtype=torch.float32))
    rule = case.problem.descent
    found = narrow.graph(rule=rule)
    found = narrow.vector(found.hypergradient(UPPER, found.init()))
    wide = case.on(replace(case.problem, dtype=torch.float64))
    right = wide.graph(rule=rule)
    right = wide.vector(right.hypergradient(UPPER, right.init()))
    case.compare("float32 differs from float64", found, right, case.float32_tolerance)


def batched(case: Case) -> None:
    """`torch.func.vmap` of `Graph.hypergradient` over three values of u equals the same one by one."""
    graph = case.graph(rule=case.problem.descent)
    state = graph.init()
    rows = normal(3, len(case.problem.start[UPPER]), key=(case.problem.seed, "rows"))
    trees = [case.problem.tree(UPPER, row) for row in rows]

    def hypergradient(u: Tree) -> Tree:
        return graph.hypergradient(UPPER, replace(state, values={**state.values, UPPER: u}))

    many = _tree.apply(lambda *tensors: torch.stack(tensors), *trees)
    together: Any = torch.func.vmap(hypergradient)(many)
    for index, tree in enumerate(trees):
        own = _tree.apply(partial(torch.select, dim=0, index=index), together)
        expected = case.vector(hypergradient(tree))
        allowed = max(case.allowed, ROUNDING)
        case.compare(
            "under vmap the hypergradient differs from the same by itself", case.vector(own), expected, allowed
        )


def divided(case: Case) -> None:
    """Two processes with 5 and 3 of 8 samples have the hypergradient of one with all, and both the same bits of it.

    The processes are threads that take turns at reductions: the same arithmetic, without the transport.
    """
    seed = case.problem.seed
    graph = Graph(sampled(case.method, case.rule(), case.steps, seed))
    on = f"{SAMPLED}; {counted(case.steps)} of {case.optimizer}, seed {seed}"

    def hypergradient(rows: slice) -> Tensor:
        found = graph.hypergradient(UPPER, graph.init(), samples(seed, rows))
        assert isinstance(found, torch.Tensor)
        return found

    right = hypergradient(slice(None))
    one, two = in_processes(2, lambda rank: hypergradient(slice(5) if rank == 0 else slice(5, None)))
    if not same_bits(one, two):
        raise Violation("two processes have different hypergradients", one, two, on)
    error = ((one - right).norm() / (right.norm() + FLOOR)).item()
    if not error <= ROUNDING:
        raise Violation(
            f"two processes with a part of the samples each differ from one with all by {error:.1e}", right, one, on
        )


def in_chunks(case: Case) -> None:
    """A method with the setting `chunks` has the hypergradient of the whole batch for 3 chunks of 8 samples.

    Nothing for methods without.
    """
    seed, batches = case.problem.seed, samples(case.problem.seed, slice(None))
    on = f"{SAMPLED}; {counted(case.steps)} of {case.optimizer}, seed {seed}"
    found: list[Tensor] = []
    for count in (1, 3):
        method = _with_chunks(case.method, count)
        if method is None:
            return
        graph = Graph(sampled(method, case.rule(), case.steps, seed))
        each = graph.hypergradient(UPPER, graph.init(), batches)
        assert isinstance(each, torch.Tensor)
        found.append(each)
    right, divided = found
    error = ((divided - right).norm() / (right.norm() + FLOOR)).item()
    if not error <= ROUNDING:
        raise Violation(f"3 chunks of the batch differ from the whole by {error:.1e}", right, divided, on)


def _with_chunks(method: Any, count: int) -> AbstractHypergradient | None:
    """`method` with `chunks`, its own setting or that of its inverse; None where it has none."""
    names = [each.name for each in fields(method)] if is_dataclass(method) else []
    value: Any = method
    if "chunks" in names:
        return replace(value, chunks=count)
    inverse = _with_chunks(value.inverse, count) if "inverse" in names and not value.is_joint else None
    return None if inverse is None else replace(value, inverse=inverse)


def unused(case: Case) -> None:
    """Tensors that no objective reads, on every level, have a zero hypergradient and change no other."""
    layouts = {name: with_unused(layout) for name, layout in case.problem.layouts.items()}
    with_more = case.on(replace(case.problem, layouts=layouts))
    graph, more = case.graph(), with_more.graph()
    expected = case.vector(graph.hypergradient(UPPER, graph.init()))
    found = with_more.vector(more.hypergradient(UPPER, more.init()))
    allowed = max(case.allowed, ROUNDING)
    case.compare("tensors that no objective reads change the hypergradient", found, expected, allowed)


def closed_form(case: Case) -> None:
    """What arrives is the promised answer by dense linear algebra: at the solution, or after steps of SGD."""
    problem, promise = case.problem, case.promise
    steps = case.steps - 1 if promise.implicit else case.steps
    graph = Graph(problem.levels(case.method, steps=steps))
    state = graph.init(values=problem.solution) if promise.implicit else graph.init()
    found = case.vector(graph.parts(UPPER, state).indirect)
    where = "at the solution" if promise.implicit else f"after {counted(steps)} of SGD"
    what = f"{where}, it differs from {promise.words}"
    case.compare(what, found, promise.indirect(problem, steps), case.allowed)


def response(case: Case) -> None:
    """An implicit method linearises where the response ended, on the way to a solution too. Nothing for others."""
    inverse = case.promise.inverse
    if inverse is None:
        return
    graph = case.graph(rule=case.problem.descent)
    found = case.vector(graph.parts(UPPER, graph.init()).indirect)
    expected = case.problem.implicit(case.problem.run(case.steps)[0], inverse)
    what = f"after {counted(case.steps)} of SGD, short of the solution, it differs from {case.promise.words}"
    case.compare(what, found, expected, case.allowed)


def replayed(case: Case) -> None:
    """A method that promises a derivative of steps equals them recorded, and replayed one by one, with every optimizer.

    At a second iteration, where moments are not zero. Nothing for implicit methods.
    """
    if case.promise.implicit:
        return
    case = case.on(replace(case.problem, dtype=torch.float64))
    graph = case.graph()
    state, _ = graph.step(graph.init())
    found = case.vector(graph.hypergradient(UPPER, state))
    for replay, how in ((False, "recorded"), (True, "replayed")):
        other = replace(case, method=Unroll(last=case.promise.last, replay=replay)).graph(rule=case.rule())
        expected = case.vector(other.hypergradient(UPPER, state))
        what = f"at a second iteration it differs from {case.promise.words}, {how},"
        case.compare(what, found, expected, max(case.tolerance, ROUNDING))


def central_differences(case: Case) -> None:
    """The slope of the upper objective along a random direction of u, all levels solved anew, or run anew.

    Not for partial answers. Methods that differentiate k steps are run for at most k, since those before are held fixed.
    """
    promise = case.promise
    if not promise.total:
        return
    case = case.on(replace(case.problem, dtype=torch.float64))
    problem, u = case.problem, case.problem.start[UPPER]
    case = replace(case, steps=min(case.steps, promise.last or case.steps))
    direction, step = normal(len(u), key=(problem.seed, "direction")), 1e-5
    direction = direction / direction.norm()
    graph = Graph(problem.levels(case.method, steps=0)) if promise.implicit else case.graph()
    state = graph.init(values=problem.solution) if promise.implicit else graph.init()

    def value(at: Tensor) -> float:
        if promise.implicit:
            return problem.value(problem.solved(at))
        moved = replace(state, values={**state.values, UPPER: problem.tree(UPPER, at)})
        return graph.step(moved)[1].losses[UPPER].item()

    slope = (value(u + step * direction) - value(u - step * direction)) / (2 * step)
    found = case.vector(graph.hypergradient(UPPER, state)) @ direction
    what = "along a direction of u it differs from central differences of the whole solve"
    case.compare(what, found, torch.tensor(slope, dtype=torch.float64), max(10 * case.tolerance, 1e-6))


PROPERTIES: Mapping[str, Callable[[Case], None]] = MappingProxyType(
    {
        "purity": purity,
        "common noise": noise,
        "zero": zero,
        "zero gradients": still,
        "loud": loud,
        "linearity": linearity,
        "another iteration": another_iteration,
        "order": order,
        "cost": cost,
        "exact cost": exact_cost,
        "float32": float32,
        "vmap": batched,
        "two processes": divided,
        "chunks": in_chunks,
        "closed form": closed_form,
        "unused": unused,
        "response": response,
        "replayed = direct": replayed,
        "central differences": central_differences,
        "nested": nested,
    }
)
"""Every property by name, in the order in which `check_method` looks at them; the docstrings say what each one asks."""
