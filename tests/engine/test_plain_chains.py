"""A chain of plain layers is run without `nn.Module.__call__`: the same bits, and only where nobody could tell."""

from __future__ import annotations

import subprocess
import sys
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

from mlo._chain import chain_of
from mlo._module import ModuleVariables, Skeleton, numbers


def shared() -> nn.Module:
    layer = nn.Linear(5, 5)
    return nn.Sequential(layer, nn.Tanh(), layer)


def tied() -> nn.Module:
    one, two = nn.Linear(5, 5), nn.Linear(5, 5)
    two.weight = one.weight
    return nn.Sequential(one, nn.Sigmoid(), two)


def frozen() -> nn.Module:
    module = nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 3))
    module[0].requires_grad_(False)
    return module


CHAINS = {
    "nested": lambda: nn.Sequential(nn.Linear(5, 4), nn.Sequential(nn.GELU(), nn.Linear(4, 2)), nn.LogSoftmax(-1)),
    "no bias": lambda: nn.Sequential(nn.Flatten(), nn.Linear(5, 4, bias=False), nn.Dropout(0.5)),
    "one layer": lambda: nn.Linear(5, 2),
    "shared": shared,
    "tied": tied,
    "frozen": frozen,
}


def run(module: nn.Module, x: Tensor, *, training: bool) -> Tensor:
    """What the engine makes of `module`."""
    torch.manual_seed(1)
    return ModuleVariables(Skeleton(module), *numbers(module))(x, training=training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CHAINS)
def test_chain_gives_the_bits_of_its_module(name, training):
    module, x = CHAINS[name](), torch.randn(7, 5)
    assert chain_of(module) is not None
    found = run(module, x, training=training)
    torch.manual_seed(1)
    assert torch.equal(found, module.train(training)(x))


@pytest.mark.parametrize("name", CHAINS)
def test_chain_has_the_derivative_of_its_module(name):
    module, x = CHAINS[name](), torch.randn(7, 5)
    parameters, buffers = numbers(module)
    leaves = {key: tensor.requires_grad_() for key, tensor in parameters.items()}
    module.eval()
    view = ModuleVariables(Skeleton(module), leaves, buffers)
    found = torch.autograd.grad(view(x, training=False).square().sum(), list(leaves.values()))
    expected = functional_call(module, {**leaves, **buffers}, (x,)).square().sum()
    for one, two in zip(found, torch.autograd.grad(expected, list(leaves.values())), strict=True):
        assert torch.equal(one, two)


class Doubled(nn.Linear):
    """Torch's own in all but its forward pass."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def hooked() -> nn.Module:
    module = nn.Sequential(nn.Linear(5, 2), nn.ReLU())
    module[1].register_forward_hook(lambda layer, args, output: output + 1)
    return module


def patched() -> nn.Module:
    module = nn.Sequential(nn.Linear(5, 2), nn.ReLU())
    module[1].forward = lambda x: x.exp()
    return module


OTHERS = {
    "hook": hooked,
    "patched": patched,
    "subclass": lambda: nn.Sequential(Doubled(5, 2)),
    "parametrized": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 2))),
    "batch statistics": lambda: nn.Sequential(nn.Linear(5, 2), nn.BatchNorm1d(2)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_chain_is_called_as_it_is(name):
    module, x = OTHERS[name](), torch.randn(7, 5)
    assert chain_of(module) is None
    assert torch.equal(run(module, x, training=True), deepcopy(module)(x))


def test_hooks_of_all_modules_are_called():
    module, x = CHAINS["nested"](), torch.randn(7, 5)
    seen: list[str] = []

    def note(layer: nn.Module, args: Any, output: Any) -> None:
        seen.append(type(layer).__name__)

    handle = nn.modules.module.register_module_forward_hook(note)
    try:
        watched = run(module, x, training=True)
    finally:
        handle.remove()
    assert seen == ["Linear", "GELU", "Linear", "Sequential", "LogSoftmax", "Sequential"]
    assert torch.equal(watched, run(module, x, training=True))


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (nn.Linear, "forward"),
        (nn.Sequential, "forward"),
        (nn.ReLU, "forward"),
        (nn.Tanh, "forward"),
        (nn.functional, "linear"),
        (nn.Module, "_call_impl"),
        (nn.Module, "__call__"),
    ],
)
def test_a_function_in_place_of_one_of_torchs_is_called(owner, name, monkeypatch):
    """Counters of operations, adapters and quantisation replace them."""
    module, x = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.Tanh()), torch.randn(7, 5)
    usual, called = run(module, x, training=True), getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *arguments: called(*arguments) + 1)
    found = run(module, x, training=True)
    assert not torch.allclose(found, usual)
    assert torch.equal(found, module(x))


def test_a_function_that_was_replaced_before_is_called():
    script = """
import torch
from torch import nn

forward = nn.Linear.forward
nn.Linear.forward = lambda *arguments: forward(*arguments) + 1
from mlo._module import ModuleVariables, Skeleton, numbers

module, x = nn.Linear(3, 2), torch.ones(1, 3)
assert torch.equal(ModuleVariables(Skeleton(module), *numbers(module))(x, training=True), module(x))
"""
    subprocess.run([sys.executable, "-c", script], check=True)
