"""What the engine is compared with: optimizers and responses by hand, and problems whose answers are known.

Nothing here calls `mlo` to find an answer. `mlo` appears only where a graph is put together to be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import exp
from typing import Any

import torch
from torch import Tensor

import mlo

Tensors = dict[str, Tensor]


def normal(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers of a seed of their own, float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def named(tree: Any) -> Tensors:
    """Tensors by name, whether `tree` is one tensor or several."""
    return dict(tree) if isinstance(tree, Mapping) else {"": tree}


def flat(tree: Any) -> Tensor:
    """All numbers of `tree` in the order of the names."""
    return torch.cat([tensor.reshape(-1) for _, tensor in sorted(named(tree).items())])


def relative_error(found: Any, right: Any) -> float:
    """‖found − right‖ / ‖right‖ over all tensors, which must agree in names and shapes."""
    shapes = [{name: tensor.shape for name, tensor in named(tree).items()} for tree in (found, right)]
    assert shapes[0] == shapes[1]
    return ((flat(found) - flat(right)).norm() / flat(right).norm()).item()


def same_bits(found: Any, right: Any) -> bool:
    """Whether two trees agree in names, shapes, types and every number."""
    one, two = named(found), named(right)
    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one
    )


# Optimizers by hand. Each gives new tensors, differentiable in the gradient; `memory` is (count, moments by name).

Memory = tuple[int, dict[str, Tensors]]
HandUpdate = Callable[[Tensors, Tensors, Memory], tuple[Tensors, Memory]]


def sgd_by_hand(rate: float, momentum: float = 0.0, *, nesterov: bool = False) -> HandUpdate:
    """b ← μb + g; w ← w − ηb, or w − η(g + μb). The start is b = 0, which makes the first b the gradient."""

    def update(w: Tensors, g: Tensors, memory: Memory) -> tuple[Tensors, Memory]:
        count, moments = memory
        if not momentum:
            return {name: w[name] - rate * g[name] for name in w}, (count + 1, {})
        b = {name: momentum * moments["momentum"][name] + g[name] for name in w}
        move = {name: g[name] + momentum * b[name] if nesterov else b[name] for name in w}
        return {name: w[name] - rate * move[name] for name in w}, (count + 1, {"momentum": b})

    return update


def adam_by_hand(rate: float, beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8) -> HandUpdate:
    """Kingma and Ba 2015, Alg. 1, with the bias corrections where the paper prints them."""

    def update(w: Tensors, g: Tensors, memory: Memory) -> tuple[Tensors, Memory]:
        count, moments = memory[0] + 1, memory[1]
        m = {name: beta1 * moments["first"][name] + (1 - beta1) * g[name] for name in w}
        v = {name: beta2 * moments["second"][name] + (1 - beta2) * g[name] ** 2 for name in w}
        m_hat = {name: m[name] / (1 - beta1**count) for name in w}
        v_hat = {name: v[name] / (1 - beta2**count) for name in w}
        new = {name: w[name] - rate * m_hat[name] / (v_hat[name].sqrt() + epsilon) for name in w}
        return new, (count, {"first": m, "second": v})

    return update


def adamw_by_hand(rate: float, decay: float, epsilon: float = 1e-8) -> HandUpdate:
    """Loshchilov and Hutter 2019, Alg. 2: Adam's step from variables that have decayed, of a gradient that has not."""
    adam = adam_by_hand(rate, epsilon=epsilon)

    def update(w: Tensors, g: Tensors, memory: Memory) -> tuple[Tensors, Memory]:
        return adam({name: (1 - rate * decay) * w[name] for name in w}, g, memory)

    return update


def rmsprop_by_hand(
    rate: float,
    alpha: float = 0.99,
    epsilon: float = 1e-8,
    momentum: float = 0.0,
    decay: float = 0.0,
    *,
    centered: bool = False,
) -> HandUpdate:
    """v ← αv + (1 − α)g²; w ← w − η g/(√v + ε), with a heavy ball on the quotient, and √(v − ḡ²) where centered."""

    def update(w: Tensors, g: Tensors, memory: Memory) -> tuple[Tensors, Memory]:
        count, moments = memory
        g = {name: g[name] + decay * w[name] for name in w}
        square = {name: alpha * moments["square"][name] + (1 - alpha) * g[name] ** 2 for name in w}
        mean = {name: alpha * moments["mean"][name] + (1 - alpha) * g[name] for name in w}
        spread = {name: square[name] - mean[name] ** 2 if centered else square[name] for name in w}
        b = {name: momentum * moments["momentum"][name] + g[name] / (spread[name].sqrt() + epsilon) for name in w}
        new = {name: w[name] - rate * b[name] for name in w}
        return new, (count + 1, {"square": square, "mean": mean, "momentum": b})

    return update


def no_memory(w: Any) -> Memory:
    """Where every optimizer above begins."""
    zeros = {name: torch.zeros_like(tensor) for name, tensor in named(w).items()}
    return 0, dict.fromkeys(("momentum", "first", "second", "square", "mean"), zeros)


def memory_of(state: mlo.State, level: str) -> Memory:
    """What the optimizer of `level` remembers in `state`, as the optimizers above write it down."""
    remembered = state.optimizers[level]
    return remembered.count, {name: named(moment) for name, moment in remembered.moments.items()}


def respond_by_hand(
    loss: Callable[[Any, int], Tensor], start: Any, update: HandUpdate, steps: int, memory: Memory | None = None
) -> Any:
    """w after `steps` updates of w on `loss(w, step)`, by plain autograd, differentiable in all that `loss` closes over."""
    single = not isinstance(start, Mapping)
    w = {name: tensor.detach().requires_grad_() for name, tensor in named(start).items()}
    memory = memory or no_memory(start)
    for step in range(steps):
        found = torch.autograd.grad(loss(w[""] if single else w, step), list(w.values()), create_graph=True)
        w, memory = update(w, dict(zip(w, found, strict=True)), memory)
    return w[""] if single else w


optimizers = {  # of the engine, and by hand
    "sgd": (mlo.optimizer.SGD(learning_rate=0.1), sgd_by_hand(0.1)),
    "momentum": (mlo.optimizer.SGD(learning_rate=0.05, momentum=0.9), sgd_by_hand(0.05, 0.9)),
    "nesterov": (
        mlo.optimizer.SGD(learning_rate=0.05, momentum=0.9, nesterov=True),
        sgd_by_hand(0.05, 0.9, nesterov=True),
    ),
    "adam": (mlo.optimizer.Adam(learning_rate=0.02), adam_by_hand(0.02)),
    "adamw": (mlo.optimizer.AdamW(learning_rate=0.02, weight_decay=0.3), adamw_by_hand(0.02, 0.3)),
    "rmsprop": (mlo.optimizer.RMSprop(learning_rate=0.02), rmsprop_by_hand(0.02)),
    "centered": (
        mlo.optimizer.RMSprop(learning_rate=0.02, alpha=0.9, momentum=0.5, weight_decay=0.1, centered=True),
        rmsprop_by_hand(0.02, 0.9, momentum=0.5, decay=0.1, centered=True),
    ),
}


# Problems whose hypergradients are known in closed form after k steps of gradient descent.


@dataclass(frozen=True, eq=False)
class ClosedForm:
    """A graph with an upper level `u`, and what its hypergradient is.

    `levels(method, steps)` builds it; `unrolled(steps)` is the derivative through all steps, `one_step(steps)` through
    the last one of every level, earlier ones held fixed.
    """

    name: str
    levels: Callable[[mlo.hypergradient.AbstractHypergradient, int], list[mlo.Level]]
    unrolled: Callable[[int], Tensor]
    one_step: Callable[[int], Tensor]


RATE = 0.1


def _positive(size: int, seed: int) -> Tensor:
    """A symmetric matrix with eigenvalues between 0.5 and 4."""
    vectors, _ = torch.linalg.qr(normal(size, size, seed=seed))
    return vectors @ torch.diag(torch.linspace(0.5, 4.0, size, dtype=torch.float64)) @ vectors.T


def _lower(name: str, objective: Any, start: Tensor, given: list[str], method: Any, steps: int) -> mlo.Level:
    descent = mlo.optimizer.SGD(learning_rate=RATE)
    return mlo.Level(
        name, objective=objective, variables=start, given=given, optimizer=descent, steps=steps, hypergradient=method
    )


def _upper(objective: Any, start: Tensor, subject_to: list[str]) -> mlo.Level:
    descent = mlo.optimizer.SGD(learning_rate=RATE)
    return mlo.Level("u", objective=objective, variables=start, subject_to=subject_to, optimizer=descent)


def quadratic() -> ClosedForm:
    """f = ½wᵀHw − wᵀBu, F = ½‖w − t‖²: with P = I − ηH, w_k = Pᵏw₀ + S Bu where S = (I − Pᵏ)H⁻¹."""
    h, b, w0, u0, t = (
        _positive(4, 1),
        normal(4, 3, seed=2),
        normal(4, seed=3),
        normal(3, seed=4),
        normal(4, seed=5),
    )
    p = torch.eye(4, dtype=torch.float64) - RATE * h

    def reach(steps: int) -> tuple[Tensor, Tensor]:
        power = torch.linalg.matrix_power(p, steps)
        s = (torch.eye(4, dtype=torch.float64) - power) @ torch.linalg.inv(h)
        return s, power @ w0 + s @ b @ u0

    def levels(method: Any, steps: int) -> list[mlo.Level]:
        def inner(values: Any, batch: Any) -> Tensor:
            w = values["w"]
            return 0.5 * w @ h @ w - w @ b @ values["u"]

        def outer(values: Any, batch: Any) -> Tensor:
            return 0.5 * (values["w"] - t).square().sum()

        return [_lower("w", inner, w0, ["u"], method, steps), _upper(outer, u0, ["w"])]

    def unrolled(steps: int) -> Tensor:
        s, w = reach(steps)
        return b.T @ s.T @ (w - t)

    def one_step(steps: int) -> Tensor:
        return RATE * b.T @ (reach(steps)[1] - t)

    return ClosedForm("quadratic", levels, unrolled, one_step)


def penalty() -> ClosedForm:
    """f = ½‖w − a‖² + ½eᵘ‖w‖²: w_k = c + (w₀ − c)ρᵏ with c = a/(1 + eᵘ), ρ = 1 − η(1 + eᵘ); F = ½‖w‖² + ½u²."""
    a, w0, u0 = normal(5, seed=6), normal(5, seed=7), -0.3
    c, rho = a / (1 + exp(u0)), 1 - RATE * (1 + exp(u0))

    def reach(steps: int) -> Tensor:
        return c + (w0 - c) * rho**steps

    def levels(method: Any, steps: int) -> list[mlo.Level]:
        def inner(values: Any, batch: Any) -> Tensor:
            w = values["w"]
            return 0.5 * (w - a).square().sum() + 0.5 * values["u"].exp() * w.square().sum()

        def outer(values: Any, batch: Any) -> Tensor:
            return 0.5 * values["w"].square().sum() + 0.5 * values["u"].square()

        return [_lower("w", inner, w0, ["u"], method, steps), _upper(outer, torch.tensor(u0), ["w"])]

    def unrolled(steps: int) -> Tensor:
        in_c = -a * exp(u0) / (1 + exp(u0)) ** 2
        in_rho = -RATE * exp(u0)
        response = in_c * (1 - rho**steps) + (w0 - c) * steps * rho ** (steps - 1) * in_rho
        return u0 + reach(steps) @ response

    def one_step(steps: int) -> Tensor:
        return u0 + reach(steps) @ (-RATE * exp(u0) * reach(steps - 1))

    return ClosedForm("penalty", levels, unrolled, one_step)


def chain() -> ClosedForm:
    """u → a → b: f_a = ½aᵀHa − aᵀBu, f_b = ½bᵀJb − bᵀCa, F = ½‖b − t‖² + ½‖a‖²."""
    h, j = _positive(3, 8), _positive(2, 9)
    b_matrix, c_matrix = normal(3, 2, seed=10), normal(2, 3, seed=11)
    a0, b0, u0, t = normal(3, seed=12), normal(2, seed=13), normal(2, seed=14), normal(2, seed=15)

    def response(matrix: Tensor, start: Tensor, drive: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        eye = torch.eye(len(matrix), dtype=torch.float64)
        power = torch.linalg.matrix_power(eye - RATE * matrix, steps)
        s = (eye - power) @ torch.linalg.inv(matrix)
        return s, power @ start + s @ drive

    def reach(steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        s_a, a = response(h, a0, b_matrix @ u0, steps)
        s_b, b = response(j, b0, c_matrix @ a, steps)
        return s_a, a, s_b, b

    def levels(method: Any, steps: int) -> list[mlo.Level]:
        def first(values: Any, batch: Any) -> Tensor:
            a = values["a"]
            return 0.5 * a @ h @ a - a @ b_matrix @ values["u"]

        def second(values: Any, batch: Any) -> Tensor:
            b = values["b"]
            return 0.5 * b @ j @ b - b @ c_matrix @ values["a"]

        def outer(values: Any, batch: Any) -> Tensor:
            return 0.5 * (values["b"] - t).square().sum() + 0.5 * values["a"].square().sum()

        return [
            _lower("a", first, a0, ["u"], method, steps),
            _lower("b", second, b0, ["a"], method, steps),
            _upper(outer, u0, ["a", "b"]),
        ]

    def unrolled(steps: int) -> Tensor:
        s_a, a, s_b, b = reach(steps)
        return b_matrix.T @ s_a.T @ (a + c_matrix.T @ s_b.T @ (b - t))

    def one_step(steps: int) -> Tensor:
        _, a, _, b = reach(steps)
        return RATE * b_matrix.T @ (a + RATE * c_matrix.T @ (b - t))

    return ClosedForm("chain", levels, unrolled, one_step)


closed_form_problems = [quadratic(), penalty(), chain()]

methods = [  # method, the answer its theory promises, relative tolerance
    (mlo.hypergradient.Unroll(), "unrolled", 1e-12),
    (
        mlo.hypergradient.FiniteDifference(radius=1e-2),
        "one_step",
        1e-9,
    ),  # exact here: no third derivative, but rounding
]
