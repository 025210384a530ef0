"""When levels move, what they see when they do, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import normal, optimizers, relative_error, respond_by_hand, sgd_by_hand
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import mlo
from mlo._graph import plan_of
from mlo._structure import held_fixed

UNROLL, DIFFERENCE = mlo.hypergradient.Unroll(), mlo.hypergradient.FiniteDifference()
UNIT = mlo.optimizer.SGD(learning_rate=1.0)


def counter(name: str, start: Sequence[float] = (0.0,), **timing: Any) -> mlo.Level:
    """A level that falls by one at every step: from 0, its value is minus the number of steps it has taken."""
    return mlo.Level(
        name,
        objective=lambda values, batch: values[name].sum(),
        variables=torch.tensor(start),
        optimizer=UNIT,
        **timing,
    )


def below(name: str, *given: str, **timing: Any) -> mlo.Level:
    """½‖w‖² − wᵀ Σ (what is given), by gradient descent."""

    def objective(values: Any, batch: Any) -> Tensor:
        w = values[name]
        return 0.5 * w @ w - w @ sum(values[other] for other in given)

    start = normal(3, seed=len(name) + ord(name[-1]))
    return mlo.Level(
        name,
        objective=objective,
        variables=start,
        given=given,
        optimizer=mlo.optimizer.SGD(learning_rate=0.1),
        **timing,
    )


def above(name: str, *subject_to: str, **timing: Any) -> mlo.Level:
    """½‖u‖² + Σ ½‖w − 1‖² over the levels it is subject to."""

    def objective(values: Any, batch: Any) -> Tensor:
        return 0.5 * values[name].square().sum() + sum(0.5 * (values[w] - 1).square().sum() for w in subject_to)

    return mlo.Level(
        name,
        objective=objective,
        variables=normal(3, seed=len(name) + ord(name[-1]) + 500),
        subject_to=subject_to,
        optimizer=mlo.optimizer.SGD(learning_rate=0.1),
        **timing,
    )


def due_by_hand(iteration: int, every: int, warm_up: int) -> bool:
    """The surface's words: t > warm_up and (t − warm_up) is a multiple of `every`, counted from 1."""
    return iteration > warm_up and (iteration - warm_up) % every == 0


@given(steps=st.integers(1, 3), every=st.integers(1, 5), warm_up=st.integers(0, 6), iterations=st.integers(1, 14))
def test_a_level_moves_when_it_is_due(steps, every, warm_up, iterations):
    graph = mlo.Graph([counter("w", steps=steps, every=every, warm_up=warm_up)])
    state, taken = graph.init(), 0
    for iteration in range(1, iterations + 1):
        due = due_by_hand(iteration, every, warm_up)
        state, metrics = graph.step(state)
        taken += steps * due
        assert state.values["w"] == -taken
        assert state.optimizers["w"].count == taken
        assert state.iteration == iteration
        assert set(metrics.losses) == ({"w"} if due else set())
        assert metrics.gradients == steps * due
    assert graph.cost(iterations).gradients == taken


@given(timing=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 4)), min_size=1, max_size=4), together=st.booleans())
def test_who_is_due_together(timing, together):
    """`together`: at every iteration, once all have warmed up; the agenda is then always the same one."""
    timing = [(1, warm_up) if together else (every, warm_up) for every, warm_up in timing]
    levels = [counter(f"w{place}", every=every, warm_up=warm_up) for place, (every, warm_up) in enumerate(timing)]
    plan = plan_of(mlo.Graph([*levels, mlo.Level("constant", variables=torch.zeros(2))]))
    for iteration in (*range(1, 12), 1000, 1):
        due = {f"w{place}" for place, each in enumerate(timing) if due_by_hand(iteration, *each)}
        assert plan.agenda(iteration).due == tuple(name for name in plan.levels if name in due)
    assert (plan.agenda(1000) is plan.agenda(999)) or not together


def test_a_level_in_its_warm_up_is_read_as_it_stands():
    graph = mlo.Graph([counter("late", warm_up=3, start=[2.0, 3.0, 5.0]), below("w", "late")])
    state = graph.init()
    w = state.values["w"]
    for _ in range(3):
        state, _ = graph.step(state)
        w = w - 0.1 * (w - torch.tensor([2.0, 3.0, 5.0]))
        assert relative_error(state.values["w"], w) <= 1e-14
    state, _ = graph.step(state)
    assert torch.equal(state.values["late"], torch.tensor([1.0, 2.0, 4.0]))


def test_a_level_reads_what_has_moved_before_it_and_opponents_as_they_stood():
    """x' = x − ηy and y' = y + ηx at once; read in turn, y would see x'."""

    def game(x_reads: dict[str, Any], y_reads: dict[str, Any]) -> mlo.Graph:
        rule = mlo.optimizer.SGD(learning_rate=0.1)
        x = mlo.Level(
            "x", objective=lambda v, b: v["x"] * v["y"], variables=torch.tensor(1.0), optimizer=rule, **x_reads
        )
        y = mlo.Level(
            "y", objective=lambda v, b: -v["x"] * v["y"], variables=torch.tensor(2.0), optimizer=rule, **y_reads
        )
        return mlo.Graph([y, x])

    at_once = game({"against": ["y"]}, {"against": ["x"]})
    state, x, y = at_once.init(), 1.0, 2.0
    for _ in range(3):
        state, _ = at_once.step(state)
        x, y = x - 0.1 * y, y + 0.1 * x
        assert state.values["x"] == pytest.approx(x, rel=1e-15)
        assert state.values["y"] == pytest.approx(y, rel=1e-15)
    opponent = mlo.Graph(
        [
            mlo.Level("x", objective=lambda v, b: v["x"].square(), variables=torch.tensor(1.0), optimizer=UNIT),
            mlo.Level(
                "y",
                objective=lambda v, b: -v["x"] * v["y"],
                variables=torch.tensor(2.0),
                given=["x"],
                optimizer=UNIT,
            ),
        ]
    )
    state, _ = opponent.step(opponent.init())
    assert (state.values["x"], state.values["y"]) == (-1.0, 2.0 - 1.0)


def test_opponents_stand_still_during_each_others_steps():
    """With several steps, each player answers where the other stood when the iteration began."""
    rule = mlo.optimizer.SGD(learning_rate=0.1)
    x = mlo.Level(
        "x",
        objective=lambda v, b: v["x"] * v["y"] + 0.5 * v["x"] ** 2,
        variables=torch.tensor(1.0),
        against=["y"],
        optimizer=rule,
        steps=2,
    )
    y = mlo.Level(
        "y",
        objective=lambda v, b: -v["x"] * v["y"] + 0.5 * v["y"] ** 2,
        variables=torch.tensor(2.0),
        against=["x"],
        optimizer=rule,
        steps=3,
    )
    graph = mlo.Graph([x, y])
    state, _ = graph.step(graph.init())
    x_now, y_now = 1.0, 2.0
    for _ in range(2):
        x_now -= 0.1 * (2.0 + x_now)
    for _ in range(3):
        y_now -= 0.1 * (-1.0 + y_now)
    assert state.values["x"] == pytest.approx(x_now, rel=1e-15)
    assert state.values["y"] == pytest.approx(y_now, rel=1e-15)


# Lookahead: Yamaguchi et al. (MGR), Alg. 1, and DARTS.


def inner_loss(w: Tensor, u: Tensor, batch: Tensor) -> Tensor:
    return (torch.tanh(batch @ w) - batch @ u).square().mean()


def outer_loss(w: Tensor, u: Tensor, batch: Tensor) -> Tensor:
    return (torch.tanh(batch @ w) - 0.3).square().mean() + 1e-2 * u.square().sum()


def algorithm_1(method: Any, **upper: Any) -> mlo.Graph:
    classifier = mlo.Level(
        "classifier",
        objective=lambda values, batch: inner_loss(values["classifier"], values["finder"], batch),
        variables=normal(3, seed=1),
        given=["finder"],
        optimizer=optimizers["nesterov"][0],
        steps=2,
        hypergradient=method,
    )
    finder = mlo.Level(
        "finder",
        objective=lambda values, batch: outer_loss(values["classifier"], values["finder"], batch),
        variables=normal(3, seed=2),
        subject_to=["classifier"],
        optimizer=optimizers["momentum"][0],
        **upper,
    )
    return mlo.Graph([classifier, finder])


@pytest.mark.parametrize("upper_steps", [1, 3])
@pytest.mark.parametrize("lookahead", [False, True])
def test_steps_and_lookahead_by_hand(lookahead, upper_steps):
    """φ moves by dL_val(θ'(φ))/dφ, θ' taken anew for each of its steps from where θ stood when the iteration began.

    Without lookahead the first θ' is kept; with it θ' under the last φ, on the same batches and from the same momentum.
    """
    graph = algorithm_1(UNROLL, lookahead=lookahead, steps=upper_steps)
    state = graph.init()
    sgd, nesterov = optimizers["momentum"][1], optimizers["nesterov"][1]
    theta, phi = normal(3, seed=1), normal(3, seed=2)
    zeros = {"momentum": {"": torch.zeros(3)}}
    theta_memory, phi_memory = (0, zeros), (0, zeros)
    for iteration in range(3):
        train, validation = normal(2, 5, 3, seed=10 + iteration), normal(upper_steps, 6, 3, seed=20 + iteration)
        batches = {"classifier": mlo.Batches(list(train)), "finder": mlo.Batches(list(validation))}
        state, metrics = graph.step(state, batches)

        def take(phi: Tensor, start: Tensor, memory: Any, train: Tensor = train) -> tuple[Tensor, Any]:
            """The response, and the memory its optimizer is left with."""
            w, left = {"": start.detach().requires_grad_()}, memory
            for batch in train:
                (g,) = torch.autograd.grad(inner_loss(w[""], phi, batch), w[""], create_graph=True)
                w, left = nesterov(w, {"": g}, left)
            return w[""], left

        first = take(phi, theta, theta_memory)
        for step in range(upper_steps):
            leaf = phi.clone().requires_grad_()
            end, _ = take(leaf, theta, theta_memory)
            (g,) = torch.autograd.grad(outer_loss(end, leaf, validation[step]), leaf)
            moved, phi_memory = sgd({"": phi}, {"": g}, phi_memory)
            phi = moved[""]
        theta, (count, moments) = take(phi, theta, theta_memory) if lookahead else first
        theta = theta.detach()
        theta_memory = (count, {"momentum": {"": moments["momentum"][""].detach()}})
        assert relative_error(state.values["classifier"], theta) <= 1e-13
        assert relative_error(state.values["finder"], phi) <= 1e-13
        assert (
            relative_error(state.optimizers["classifier"].moments["momentum"], theta_memory[1]["momentum"][""]) <= 1e-13
        )
        assert state.optimizers["classifier"].count == 2 * (iteration + 1)
        assert metrics.gradients == 2 * (upper_steps + lookahead) + upper_steps


def test_lookahead_retakes_a_chain_in_order():
    """b is taken again on the a that was taken again."""
    graph = mlo.Graph([below("a", "u", steps=2), below("b", "a"), above("u", "a", "b", lookahead=True)])
    state, _ = graph.step(graph.init())
    start, u = graph.init().values, state.values["u"]
    a = respond_by_hand(lambda w, _: 0.5 * w @ w - w @ u, start["a"], sgd_by_hand(0.1), 2).detach()
    b = respond_by_hand(lambda w, _: 0.5 * w @ w - w @ a, start["b"], sgd_by_hand(0.1), 1).detach()
    assert relative_error(state.values["a"], a) <= 1e-14
    assert relative_error(state.values["b"], b) <= 1e-14


@pytest.mark.parametrize("lookahead", [False, True])
def test_upper_levels_that_are_due_together_see_the_same_responses(lookahead):
    levels = [below("w", "t", "u"), above("t", "w", lookahead=lookahead), above("u", "w", lookahead=lookahead)]
    graph = mlo.Graph(levels)
    state = graph.init()
    gradients = {name: graph.hypergradient(name, state) for name in ("t", "u")}
    after, metrics = graph.step(state)
    for name, gradient in gradients.items():
        assert relative_error(after.values[name], state.values[name] - 0.1 * gradient) <= 1e-14
    assert metrics.pullbacks == (("t", "w"), ("u", "w"))
    w, seen = state.values["w"], after.values if lookahead else state.values
    assert relative_error(after.values["w"], w - 0.1 * (w - seen["t"] - seen["u"])) <= 1e-14


@pytest.mark.parametrize("lookahead", [False, True])
def test_the_later_steps_of_levels_that_are_due_together_do_not_see_each_other(lookahead):
    """Two players of a symmetric game above `w` end at the same place, whatever they are called."""

    def upper(name: str) -> mlo.Level:
        def objective(values: Any, batch: Any) -> Tensor:
            return (values["w"] - 2).square() + values[name].square()

        start, rule = torch.tensor(0.7), mlo.optimizer.SGD(learning_rate=0.1)
        return mlo.Level(
            name,
            objective=objective,
            variables=start,
            subject_to=["w"],
            optimizer=rule,
            steps=3,
            lookahead=lookahead,
        )

    w = mlo.Level(
        "w",
        objective=lambda values, batch: (values["w"] - values["t"] * values["u"]).square(),
        variables=torch.tensor(1.0),
        given=["t", "u"],
        optimizer=mlo.optimizer.SGD(learning_rate=0.1),
    )
    graph = mlo.Graph([w, upper("t"), upper("u")])
    state, _ = graph.step(graph.init())
    t = 0.7
    for _ in range(3):
        end = 1.0 - 0.2 * (1.0 - t * 0.7)
        t -= 0.1 * (2 * (end - 2) * 0.2 * 0.7 + 2 * t)
    assert state.values["t"] == pytest.approx(t, rel=1e-14)
    assert state.values["u"] == pytest.approx(t, rel=1e-14)
    kept = t * t if lookahead else 0.7 * 0.7
    assert state.values["w"] == pytest.approx(1.0 - 0.2 * (1.0 - kept), rel=1e-14)


# Levels that are not listed, and constants.


def test_a_path_through_an_unlisted_level_is_held_fixed():
    """`u` is not subject to `x`: x moves before u does, its response counts as a constant, and it sees u as it stood."""
    levels = [below("x", "u"), below("w", "u", "x"), above("u", "w")]
    graph = mlo.Graph(levels)
    assert graph.order == ("x", "w", "u")
    assert held_fixed(graph.levels["u"], graph.levels) == (("u", "x", "w"),)
    state, metrics = graph.step(graph.init())
    start = graph.init().values
    x = start["x"] - 0.1 * (start["x"] - start["u"])
    w = start["w"] - 0.1 * (start["w"] - start["u"] - x)
    u = start["u"] - 0.1 * (start["u"] + 0.1 * (w - 1))  # not 0.1 · (1 + 0.1)(w − 1)
    assert relative_error(state.values["x"], x) <= 1e-14
    assert relative_error(state.values["w"], w) <= 1e-14
    assert relative_error(state.values["u"], u) <= 1e-14
    assert metrics.pullbacks == (("u", "w"),)


def test_a_player_that_is_not_listed_moves_before_the_level_above_the_other():
    """The discriminator of a generator that `meta` differentiates through: App. A, Alg. 1, lines 3 and 5."""

    def player(name: str, opponent: str) -> mlo.Level:
        return mlo.Level(
            name,
            objective=lambda values, batch: (values[name] - values[opponent] * values["u"]).square().sum(),
            variables=normal(3, seed=ord(name[0])),
            given=["u"],
            against=[opponent],
            optimizer=mlo.optimizer.SGD(learning_rate=0.1),
        )

    graph = mlo.Graph([player("generator", "z"), player("z", "generator"), above("u", "generator")])
    assert graph.order == ("generator", "z", "u")
    assert held_fixed(graph.levels["u"], graph.levels) == (("u", "z", "generator"),)
    arrows = {(read, reader, kind) for read, reader, kind in graph.network.edges(data="kind")}
    assert arrows == {
        ("u", "generator", "given"),
        ("u", "z", "given"),
        ("z", "generator", "against"),
        ("generator", "z", "against"),
        ("generator", "u", "subject_to"),
    }
    start = graph.init().values
    state, _ = graph.step(graph.init())
    expected = start["z"] - 0.2 * (start["z"] - start["generator"] * start["u"])
    assert relative_error(state.values["z"], expected) <= 1e-14


def test_a_reader_of_the_upper_level_that_nothing_below_reads_runs_after_it():
    graph = mlo.Graph([below("a", "u"), below("w", "u"), above("u", "w")])
    assert graph.order == ("w", "u", "a")
    state, _ = graph.step(graph.init())
    start = graph.init().values["a"]
    assert relative_error(state.values["a"], start - 0.1 * (start - state.values["u"])) <= 1e-14


def test_constants_never_move_and_may_be_listed():
    constant = mlo.Level("c", variables=torch.ones(3))
    levels = [constant, below("w", "u", "c"), above("u", "w", "c", lookahead=True)]
    graph = mlo.Graph(levels)
    state = graph.init()
    assert set(state.optimizers) == {"w", "u"}
    for _ in range(3):
        state, metrics = graph.step(state)
        assert torch.equal(state.values["c"], torch.ones(3))
        assert set(metrics.losses) == {"w", "u"}
        assert metrics.pullbacks == (("u", "w"),)
    assert graph.cost(3) == (9, 3, 3)


def test_a_level_above_that_is_not_due_leaves_the_levels_below_to_themselves():
    graph = mlo.Graph([below("w", "u"), above("u", "w", every=3, lookahead=True)])
    state = graph.init()
    for iteration in range(1, 7):
        state, metrics = graph.step(state)
        due = iteration % 3 == 0
        assert len(metrics.pullbacks) == metrics.products == due
        assert set(metrics.norms) == ({"u"} if due else set())
        assert metrics.gradients == (3 if due else 1)


# The cost is known.


@st.composite
def timings(draw: Any) -> list[mlo.Level]:
    """Two or three lower levels below up to two upper ones, with any timing that is allowed."""
    method = st.sampled_from([UNROLL, DIFFERENCE])
    every, warm_up = draw(st.integers(1, 3)), draw(st.integers(0, 2))

    def timing(multiple: int = 1) -> dict[str, int]:
        late = every * draw(st.integers(0, 2)) if multiple > 1 else 0
        return {"every": every * multiple, "warm_up": warm_up + late, "steps": draw(st.integers(1, 3))}

    lower = {
        "a": below("a", "t", "u", hypergradient=draw(method), **timing()),
        "b": below("b", "a", "u", hypergradient=draw(method), **timing()),
        "c": below("c", "t", hypergradient=draw(method), **timing()),
    }
    listed = {
        "t": draw(st.sampled_from([("a",), ("c",), ("a", "c")])),
        "u": draw(st.sampled_from([("a",), ("b",), ("a", "b")])),
    }
    upper = [
        above(name, *listed[name], lookahead=draw(st.booleans()), **timing(draw(st.integers(1, 3)))) for name in listed
    ]
    alone = counter("z", every=draw(st.integers(1, 3)), steps=draw(st.integers(1, 2)))
    return [*lower.values(), *upper, alone]


@given(levels=timings(), iterations=st.integers(1, 9))
def test_cost_equals_what_is_counted(levels, iterations):
    try:
        graph = mlo.Graph(levels)
    except mlo.GraphError as error:
        assume("must agree" not in str(error))
        raise
    state, gradients, products, pullbacks = graph.init(), 0, 0, 0
    for _ in range(iterations):
        state, metrics = graph.step(state)
        gradients += metrics.gradients
        products += metrics.products
        pullbacks += len(metrics.pullbacks)
    assert graph.cost(iterations) == (gradients, products, pullbacks)


@pytest.mark.parametrize("lookahead", [False, True])
def test_cost_where_an_upper_level_takes_no_step(lookahead):
    graph = mlo.Graph([below("w", "u", steps=2), above("u", "w", steps=0, lookahead=lookahead)])
    _, metrics = graph.step(graph.init())
    assert graph.cost(1) == (metrics.gradients, metrics.products, len(metrics.pullbacks))
