"""Steps that are evaluated again: with all positions kept or only some, and the update pulled back in closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import normal, optimizers, relative_error, same_bits
from torch import Tensor, nn

import mlo
from mlo._engine import Iteration
from mlo._step import take
from mlo.hypergradient import FiniteDifference, Unroll
from mlo.optimizer import SGD, Adam, OptimizerState, pulled_back, updated


def noisy_network(method: Any, optimizer: Any, steps: int) -> mlo.Graph:
    """Dropout, batch statistics, a choice made from values, and a batch of its own for every step."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 1))

    def inner(values: Any, batch: Tensor) -> Tensor:
        out = values["w"](batch)[:, 0]
        kept = values.once("kept", lambda: torch.rand(len(out)) < values["u"].sigmoid())
        return (values["u"].sigmoid() * (out - batch.sum(1)).square() * (0.5 + kept)).mean()

    def outer(values: Any, batch: Tensor) -> Tensor:
        return (values["w"](batch)[:, 0] - 1).square().mean()

    w = mlo.Level(
        "w", objective=inner, variables=network, given=["u"], optimizer=optimizer, steps=steps, hypergradient=method
    )
    sgd = SGD(learning_rate=0.1)
    u = mlo.Level("u", objective=outer, variables=normal(4, seed=1), subject_to=["w"], optimizer=sgd)
    return mlo.Graph([w, u])


BATCHES = {"w": mlo.Batches(list(normal(12, 4, 3, seed=2))), "u": normal(4, 3, seed=3)}


@pytest.mark.parametrize("last", [None, 1, 5])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 9, 12])
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_checkpoints_change_no_bit_and_cost_what_is_said(optimizer, steps, last):
    rule = optimizers[optimizer][0]
    found = {}
    for checkpoint in (None, "sqrt"):
        method = Unroll(replay=True, last=last, checkpoint=checkpoint)
        graph = noisy_network(method, rule, steps)
        state = graph.init(seed=4)
        after, metrics = graph.step(state, BATCHES)
        assert graph.cost(1) == (metrics.gradients, metrics.products, len(metrics.pullbacks))
        found[checkpoint] = graph.hypergradient("u", state, BATCHES), after.values["u"], after.values["w"]
    assert found[None][0].norm() > 0
    assert all(same_bits(one, two) for one, two in zip(found[None], found["sqrt"], strict=True))


def test_checkpoints_hold_two_roots_of_the_positions():
    graph = noisy_network(Unroll(checkpoint="sqrt"), optimizers["momentum"][0], 12)
    inside = Iteration.of(graph._plan, graph.init(), BATCHES)
    response = inside.retake("w", ("u", "w"))
    taken: Any = response.taken()
    assert len(taken) == 12
    assert len(taken._starts) == 3
    before = inside.tally.gradients
    steps = list(reversed(taken))
    assert inside.tally.gradients - before == 12 - 3
    assert len(taken._stretch[1]) == 4
    assert same_bits(steps[-1].start, graph.init().values["w"])
    assert taken[-1].start.keys() == steps[0].start.keys()
    assert same_bits(taken[-1].start, steps[0].start)
    assert [same_bits(one.start, two.start) for one, two in zip(taken[9:], steps[2::-1], strict=True)] == [True] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint": "log"}, "checkpoint must be sqrt or nothing, got log"),
        ({"checkpoint": "sqrt", "replay": False}, "checkpoint needs steps that are replayed"),
    ],
)
def test_checkpoints_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Unroll(**options)


@pytest.mark.parametrize(
    "optimizer",
    [
        SGD(learning_rate=0.1),
        SGD(learning_rate=0.1, momentum=0.9),
        SGD(learning_rate=0.1, momentum=0.9, nesterov=True, weight_decay=0.2),
        SGD(learning_rate=0.1, momentum=0.9, dampening=0.3, weight_decay=0.2),
        SGD(learning_rate=mlo.schedule.Cosine(start=0.3, over=9), momentum=0.5),
    ],
    ids=str,
)
@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("with_moments", [True, False])
def test_the_closed_form_of_sgd_is_its_derivative(optimizer, count, with_moments):
    gradient, w, cotangent = (normal(3, seed=seed).requires_grad_() for seed in (10, 11, 12))
    stood = {"momentum": normal(3, seed=13).requires_grad_()} if optimizer.momentum else {}
    moments = {"momentum": normal(3, seed=14)} if optimizer.momentum and with_moments else {}
    after, remembered = updated(optimizer, 2, gradient, OptimizerState(count, stood), w)
    outputs = [after, *(remembered.moments[name] for name in moments)]
    inputs = [gradient, w, *stood.values()]
    right = torch.autograd.grad(outputs, inputs, [cotangent, *moments.values()], materialize_grads=True)
    found = pulled_back(optimizer, 2, OptimizerState(count, stood), cotangent.detach(), moments)
    assert found is not None
    towards_gradient, before, own, none = found
    assert not none
    assert relative_error(towards_gradient, right[0]) <= 1e-15
    assert relative_error(own, right[1]) <= 1e-15
    assert before.keys() == stood.keys()
    assert all(relative_error(before[name], exact) <= 1e-15 for name, exact in zip(before, right[2:], strict=True))


@pytest.mark.parametrize(
    "optimizer",
    [
        Adam(),
        SGD(learning_rate=0.1, clip_norm=1.0),
        SGD(learning_rate=0.1, clip_value=1.0),
        SGD(learning_rate=0.1, groups={"*": {"momentum": 0.5}}),
    ],
    ids=str,
)
def test_other_updates_have_no_closed_form(optimizer):
    w = normal(3, seed=11)
    assert pulled_back(optimizer, 1, OptimizerState(), w, {}) is None


@pytest.mark.parametrize("name", ["momentum", "nesterov"])
def test_any_step_that_was_kept_pulls_its_update_back(name):
    """The gradient of a step before the last is not kept: it is evaluated again, to the same bits."""
    optimizer, rule = optimizers[name]
    graph = noisy_network(Unroll(replay=True), optimizer, 3)
    inside = Iteration.of(graph._plan, graph.init(), BATCHES)
    taken: Any = inside.retake("w", ("u", "w")).taken()
    first, last = taken[0], taken[-1]
    assert first.gradient is None
    assert last.gradient is None  # the closed form does not ask for it
    cotangent = {key: normal(*tensor.shape, seed=20) for key, tensor in first.start.items()}
    assert not first.at.optimizer.moments  # their numbers do not matter
    begin = Iteration.of(graph._plan, graph.init(), BATCHES).now["w"]
    assert same_bits(begin.variables, first.start)
    again = take(first.level, begin, first.around, first.record)[1].gradient
    gradient = {key: tensor.clone().requires_grad_() for key, tensor in again.items()}
    memory = (0, {key: dict(moment) for key, moment in begin.optimizer.moments.items()})
    after, _ = rule(dict(first.start), gradient, memory)
    right = torch.autograd.grad([after[key] for key in cotangent], list(gradient.values()), list(cotangent.values()))
    assert relative_error(first.pull_update(cotangent), dict(zip(gradient, right, strict=True))) <= 1e-12


def test_the_last_step_keeps_its_gradient_for_an_update_without_a_closed_form():
    graph = noisy_network(FiniteDifference(), Adam(learning_rate=0.1), 2)
    inside = Iteration.of(graph._plan, graph.init(), BATCHES)
    last: Any = inside.retake("w", ("u", "w")).taken()[-1]
    again = take(last.level, last.at, last.around, last.record)[1].gradient
    assert same_bits(last.gradient, again)
