"""Optimizers write to what they have just made themselves, where nobody can see it, and to nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import normal
from torch import Tensor
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx

from mlo import _tree
from mlo._modes import may_overwrite
from mlo.optimizer import SGD, Adam, AdamW, OptimizerState

OPTIMIZERS: dict[str, Any] = {
    "momentum": SGD(learning_rate=0.1, momentum=0.9),
    "dampened": SGD(learning_rate=0.1, momentum=0.9, dampening=0.4, weight_decay=0.2),
    "nesterov": SGD(learning_rate=0.1, momentum=0.9, nesterov=True),
    "Adam": Adam(learning_rate=0.1),
    "AdamW": AdamW(learning_rate=0.1),
}
W = {"matrix": normal(3, 2, seed=1), "number": normal(seed=2)}
each = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)


def gradient(seed: int) -> dict[str, Tensor]:
    return {name: normal(*tensor.shape, seed=seed + place) for place, (name, tensor) in enumerate(W.items())}


def everything(parameters: Any, state: OptimizerState) -> dict[str, Tensor]:
    return {**parameters, **{f"{key}/{name}": t for key, tree in state.moments.items() for name, t in tree.items()}}


def stepped(optimizer: Any) -> OptimizerState:
    """With moments that are not zero."""
    return optimizer.update(gradient(10), optimizer.init(W), W)[1]


@each
def test_the_same_bits_whether_they_write_or_not(optimizer):
    state = stepped(optimizer)
    found = everything(*optimizer.update(gradient(20), state, W))
    with torch.no_grad():
        assert may_overwrite()
        written = everything(*optimizer.update(gradient(20), state, W))
    assert all(torch.equal(found[name], written[name]) for name in found)


@each
def test_what_is_handed_in_stays_as_it_was(optimizer):
    state, given = stepped(optimizer), gradient(20)
    handed = {**everything(W, state), **{f"gradient/{name}": tensor for name, tensor in given.items()}}
    before = {name: (tensor.clone(), tensor._version) for name, tensor in handed.items()}
    with torch.no_grad():
        after = everything(*optimizer.update(given, state, W))
    for name, (numbers, version) in before.items():
        assert torch.equal(handed[name], numbers)
        assert handed[name]._version == version
    assert not {tensor.data_ptr() for tensor in after.values()} & {tensor.data_ptr() for tensor in handed.values()}


@each
def test_gradients_of_many_with_the_moments_of_one(optimizer):
    """Moments that all have in common cannot hold what is different for each."""
    state = stepped(optimizer)
    many = {name: torch.stack([gradient(seed)[name] for seed in (20, 30, 40)]) for name in W}

    def step(given: dict[str, Tensor]) -> dict[str, Tensor]:
        assert not may_overwrite()
        return everything(*optimizer.update(given, state, W))

    with torch.no_grad():
        found = vmap(step)(many)
        for place in range(3):
            one = everything(*optimizer.update({name: tensor[place] for name, tensor in many.items()}, state, W))
            for name, right in one.items():
                torch.testing.assert_close(found[name][place], right, rtol=1e-14, atol=0)


@each
def test_a_trace_writes_to_nothing(optimizer):
    state = stepped(optimizer)

    def step(given: dict[str, Tensor]) -> list[Tensor]:
        assert not may_overwrite()
        return list(everything(*optimizer.update(given, state, W)).values())

    with torch.no_grad():
        traced = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(gradient(20))
    called = [str(node.target) for node in traced.graph.nodes if node.op == "call_function"]
    assert called
    assert not [name for name in called if name.split(".")[1].endswith("_")]


@pytest.mark.parametrize("scale", [1.0, -0.3, torch.tensor(0.7, dtype=torch.float64)])
@pytest.mark.parametrize("by", [1.0, 0.9, 0.0, torch.tensor(0.7, dtype=torch.float64)])
@pytest.mark.parametrize("make", [lambda: normal(4, seed=3), lambda: {"a": normal(4, seed=3), "b": normal(2, seed=4)}])
def test_a_sum_is_that_of_its_terms_and_leaves_them(make: Callable[[], Any], by: Any, scale: Any):
    tree, other = make(), _tree.scale(make(), by=-2.0)
    right = _tree.leaves(_tree.add(_tree.apply(lambda tensor: tensor * by, tree), other, scale=scale))
    assert all(map(torch.equal, _tree.leaves(_tree.combined(tree, other, by=by, scale=scale)), right))  # it is recorded
    with torch.no_grad():
        assert all(map(torch.equal, _tree.leaves(_tree.combined(tree, other, by=by, scale=scale)), right))
    assert all(map(torch.equal, _tree.leaves(tree), _tree.leaves(make())))


def test_a_tree_and_a_tensor_do_not_add_up():
    with torch.no_grad(), pytest.raises(TypeError):
        _tree.combined({"a": normal(2, seed=1)}, normal(2, seed=1), by=0.9, scale=1.0)
    with torch.no_grad(), pytest.raises(TypeError):
        _tree.combined(normal(2, seed=1), {"a": normal(2, seed=1)}, by=0.9, scale=1.0)


def test_a_wider_number_wins_whether_they_write_or_not():
    """Of zero-dimensional tensors; a weight decay that is read may be one."""
    narrow, wide = torch.tensor(0.5), torch.tensor(0.25, dtype=torch.float64)
    with torch.no_grad():
        found = _tree.combined(narrow, wide, by=2.0, scale=1.0)
    assert found.dtype == torch.float64
    assert found == 1.25
    assert narrow == 0.5
