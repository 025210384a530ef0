"""Schedules against `torch.optim.lr_scheduler`, and where the engine takes their numbers from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import adam_by_hand, normal, relative_error, respond_by_hand, same_bits
from hypothesis import given
from hypothesis import strategies as st

import mlo
from mlo.hypergradient import FiniteDifference, Unroll
from mlo.optimizer import SGD, Adam, RMSprop, updated
from mlo.schedule import Constant, Cosine, Epochs, MultiStep, WarmUp
from mlo.schedule._epochs import in_iterations

MILESTONES = (3, 4, 10)
schedulers = torch.optim.lr_scheduler
torch_twins = [  # ours, torch's for a learning rate of 0.3, iterations
    (Constant(value=0.3), lambda opt: schedulers.LambdaLR(opt, lambda n: 1.0), 15),
    (MultiStep(start=0.3, factor=0.2, at=MILESTONES), lambda opt: schedulers.MultiStepLR(opt, MILESTONES, 0.2), 15),
    (Cosine(start=0.3, over=12), lambda opt: schedulers.CosineAnnealingLR(opt, 12), 13),
    (Cosine(start=0.3, end=0.05, over=12), lambda opt: schedulers.CosineAnnealingLR(opt, 12, 0.05), 13),
    (WarmUp(start=0.1, over=5, then=0.3), lambda opt: schedulers.LinearLR(opt, 1 / 3, total_iters=5), 15),
    (
        WarmUp(start=0.03, over=5, then=Cosine(start=0.3, over=10)),
        lambda opt: schedulers.SequentialLR(
            opt, [schedulers.LinearLR(opt, 0.1, total_iters=5), schedulers.CosineAnnealingLR(opt, 10)], [5]
        ),
        15,
    ),
]


@pytest.mark.filterwarnings("ignore:The epoch parameter")  # torch's SequentialLR warns of itself
@pytest.mark.parametrize(("schedule", "twin", "iterations"), torch_twins)
def test_equals_torch(schedule, twin, iterations):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler = twin(optimizer)
    low, high = schedule.bounds
    for iteration in range(1, iterations + 1):
        assert schedule(iteration) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12, abs=1e-17)
        assert low <= schedule(iteration) * (1 + 1e-12)
        assert schedule(iteration) <= high * (1 + 1e-12)
        optimizer.step()
        scheduler.step()


def test_the_end_stays():
    assert Cosine(start=1.0, end=0.2, over=10)(11) == pytest.approx(0.2)
    assert Cosine(start=1.0, end=0.2, over=10)(1000) == pytest.approx(0.2)
    assert MultiStep(start=1.0, factor=0.5, at=(2, 5))(1000) == 0.25


numbers = st.floats(1e-3, 10.0)
schedules = st.one_of(
    st.builds(Constant, value=numbers),
    st.builds(Cosine, start=numbers, end=numbers, over=st.integers(1, 30)),
    st.builds(
        MultiStep,
        start=numbers,
        factor=st.floats(0.1, 2.0),
        at=st.lists(st.integers(1, 30), unique=True).map(lambda times: tuple(sorted(times))),
    ),
)


@given(
    schedule=st.builds(WarmUp, start=numbers, over=st.integers(1, 30), then=schedules | numbers) | schedules,
    iteration=st.integers(1, 100),
)
def test_a_schedule_keeps_to_its_bounds(schedule, iteration):
    low, high = schedule.bounds
    assert low * (1 - 1e-12) <= schedule(iteration) <= high * (1 + 1e-12)


wrong = [
    (lambda: MultiStep(start=1.0, factor=0.0, at=(1,)), "factor must be positive, got 0.0"),
    (lambda: MultiStep(start=1.0, at=(3, 3)), r"at must be increasing durations of at least 1, got \[3, 3\]"),
    (lambda: MultiStep(start=1.0, at=(0,)), r"at must be increasing durations of at least 1, got \[0\]"),
    (lambda: Cosine(start=1.0, over=0), "over must be at least 1, got 0"),
    (lambda: WarmUp(over=Epochs(epochs=(1, 2)), then=1.0), "over must be one duration, got 2"),
    (lambda: Epochs(epochs=0), "epochs must be at least 1, got 0"),
    (lambda: Cosine(start=1.0, over=Epochs(epochs=3))(1), "over: only a graph file knows how long an epoch is"),
    (lambda: SGD(learning_rate=Cosine(start=1.0, end=-0.1, over=3)), "learning_rate must be positive"),
    (lambda: SGD(learning_rate=Constant(value=0.0)), "learning_rate must be positive"),
    (lambda: Adam(beta1=WarmUp(over=3, then=1.0)), "beta1 must be at least 0 and below 1"),
    (lambda: Adam(weight_decay=Cosine(start=0.0, end=-1.0, over=3)), "weight_decay must be at least 0"),
]


@pytest.mark.parametrize(("make", "message"), wrong)
def test_what_is_wrong_is_said_where_it_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_learning_rate_may_come_down_to_zero():
    optimizer = SGD(learning_rate=Cosine(start=0.1, over=4))
    w, g = torch.ones(3), torch.ones(3)
    moved, state = updated(optimizer, 5, g, optimizer.init(w), w)
    assert torch.equal(moved, w)
    assert state.count == 1


def test_an_optimizer_with_schedules_is_not_updated_without_an_iteration():
    optimizer = SGD(learning_rate=Cosine(start=0.1, over=4))
    with pytest.raises(TypeError, match=r"mlo\.optimizer\.updated, which knows the iteration"):
        optimizer.update(torch.ones(3), optimizer.init(torch.ones(3)), torch.ones(3))


def test_epochs_become_iterations_wherever_they_stand():
    inner = Cosine(start=1.0, over=Epochs(epochs=3))
    found = in_iterations(
        SGD(
            learning_rate=WarmUp(over=Epochs(epochs=1), then=inner),
            momentum=MultiStep(start=0.9, at=Epochs(epochs=(1, 2))),
            groups={"b": {"learning_rate": inner}},
        ),
        lambda passes: 10 * passes,
    )
    assert found.learning_rate == WarmUp(over=10, then=Cosine(start=1.0, over=30))
    assert found.momentum == MultiStep(start=0.9, at=(10, 20))
    assert found.groups == {"b": {"learning_rate": Cosine(start=1.0, over=30)}}
    plain = Adam()
    assert in_iterations(plain, lambda passes: passes) is plain


def weighted(values: Any, batch: Any) -> torch.Tensor:
    return (values["w"] * values["u"]).exp().sum() + values["w"].square().sum()


def graph_with(optimizer: Any, method: Any, steps: int = 1, upper: Any = None) -> mlo.Graph:
    lower = mlo.Level(
        "w",
        objective=weighted,
        variables=normal(3, seed=1),
        given=["u"],
        optimizer=optimizer,
        steps=steps,
        hypergradient=method,
    )
    return mlo.Graph(
        [
            lower,
            mlo.Level(
                "u",
                objective=lambda values, batch: values["w"].square().sum(),
                variables=normal(3, seed=2),
                subject_to=["w"],
                optimizer=upper or SGD(learning_rate=0.1),
            ),
        ]
    )


fallen = MultiStep(start=0.2, factor=0.1, at=(2,))
scheduled = [
    (SGD(learning_rate=fallen, momentum=0.9), "learning_rate", fallen),
    (Adam(learning_rate=fallen, epsilon=1e-2), "learning_rate", fallen),
    (RMSprop(learning_rate=fallen, epsilon=1e-2), "learning_rate", fallen),
    (SGD(learning_rate=0.1, weight_decay=fallen), "weight_decay", fallen),
    (SGD(learning_rate=0.1, clip_norm=fallen), "clip_norm", fallen),
]


@pytest.mark.parametrize("method", [Unroll(), FiniteDifference(radius=1e-3)])
@pytest.mark.parametrize(("optimizer", "option", "schedule"), scheduled)
def test_each_iteration_is_that_of_its_own_number(optimizer, option, schedule, method):
    """A run with a schedule is, iteration by iteration, one with the plain number of that iteration."""
    upper = SGD(learning_rate=fallen)
    graph = graph_with(optimizer, method, steps=2, upper=upper)
    state = graph.init()
    for iteration in range(1, 5):
        plain = graph_with(
            replace(optimizer, **{option: schedule(iteration)}),
            method,
            steps=2,
            upper=SGD(learning_rate=fallen(iteration)),
        )
        assert same_bits(graph.hypergradient("u", state), plain.hypergradient("u", state))
        after, _ = plain.step(state)
        state, _ = graph.step(state)
        assert same_bits(state.values["w"], after.values["w"])
        assert same_bits(state.values["u"], after.values["u"])


def test_unrolling_differentiates_the_scheduled_step():
    graph = graph_with(Adam(learning_rate=fallen, epsilon=1e-2), Unroll(), steps=3)
    state = replace(graph.init(), iteration=2)  # the third iteration is next
    u = normal(3, seed=2).requires_grad_()
    end = respond_by_hand(
        lambda w, _: weighted({"w": w, "u": u}, None), normal(3, seed=1), adam_by_hand(0.02, epsilon=1e-2), 3
    )
    (right,) = torch.autograd.grad(end.square().sum(), u)
    assert relative_error(graph.hypergradient("u", state), right) <= 1e-12


def test_an_objective_knows_the_iteration():
    seen: list[int] = []

    def objective(values: Any, batch: Any) -> torch.Tensor:
        seen.append(values.iteration)
        return values["w"].square().sum()

    graph = mlo.Graph(
        [mlo.Level("w", objective=objective, variables=torch.ones(2), optimizer=SGD(learning_rate=0.1), steps=2)]
    )
    state = graph.init()
    for _ in range(3):
        state, _ = graph.step(state)
    assert seen == [1, 1, 2, 2, 3, 3]
