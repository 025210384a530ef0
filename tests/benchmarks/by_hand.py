"""Hypergradients as one writes them by hand: lists of leaf tensors, `torch.autograd.grad`, nothing that is not needed.

The graph of a gradient is kept between the products that use it. Every method gives new inner variables, their momentum
and the hypergradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Tensors = list[Tensor]
Inner = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]  # of w and u
Outer = Callable[[Sequence[Tensor]], Tensor]  # of w
Found = tuple[Tensors, Tensors, Sequence[Tensor]]

grad = torch.autograd.grad


def leaves(tensors: Sequence[Tensor]) -> Tensors:
    return [tensor.detach().requires_grad_() for tensor in tensors]


def sgd(w: Sequence[Tensor], gradient: Sequence[Tensor], momentum: Sequence[Tensor], rate: float, decay: float):
    buffers = [b * decay + g for b, g in zip(momentum, gradient, strict=True)]
    return [x.add(b, alpha=-rate) for x, b in zip(w, buffers, strict=True)], buffers


def plain_steps(inner: Inner, w: Tensors, u: Sequence[Tensor], b: Tensors, rate: float, decay: float, steps: int):
    fixed = [tensor.detach() for tensor in u]
    for _ in range(steps):
        w = leaves(w)
        gradient = grad(inner(w, fixed), w)
        with torch.no_grad():
            w, b = sgd(w, gradient, b, rate, decay)
    return w, b


def unroll(
    inner: Inner, outer: Outer, w: Tensors, u: Sequence[Tensor], b: Tensors, rate: float, decay: float, steps: int
) -> Found:
    w, u = leaves(w), leaves(u)
    for _ in range(steps):
        gradient = grad(inner(w, u), w, create_graph=True)
        w, b = sgd(w, gradient, b, rate, decay)
    found = grad(outer(w), u)
    return [tensor.detach() for tensor in w], [tensor.detach() for tensor in b], found


def replayed(
    inner: Inner, outer: Outer, w: Tensors, u: Sequence[Tensor], b: Tensors, rate: float, decay: float, steps: int
) -> Found:
    """Keeps the variables of every step and sweeps back over the steps, closed form for SGD with momentum."""
    starts = list[Tensors]()
    for _ in range(steps):
        starts.append(w)
        w, b = plain_steps(inner, w, u, b, rate, decay, 1)
    end = leaves(w)
    cotangent = list(grad(outer(end), end))
    behind = [torch.zeros_like(tensor) for tensor in w]
    total = [torch.zeros_like(tensor) for tensor in u]
    for start in reversed(starts):
        start, given = leaves(start), leaves(u)
        gradient = grad(inner(start, given), start, create_graph=True)
        behind = [m.add(c, alpha=-rate) for m, c in zip(behind, cotangent, strict=True)]
        found = grad(gradient, [*start, *given], behind)
        cotangent = [c + p for c, p in zip(cotangent, found[: len(w)], strict=True)]
        total = [t + p for t, p in zip(total, found[len(w) :], strict=True)]
        behind = [m * decay for m in behind]
    return w, b, total


def finite_difference(
    inner: Inner, outer: Outer, w: Tensors, u: Sequence[Tensor], b: Tensors, rate: float, decay: float, radius: float
) -> Found:
    after, b = plain_steps(inner, w, u, b, rate, decay, 1)
    end = leaves(after)
    direction = [-rate * cotangent for cotangent in grad(outer(end), end)]
    epsilon = radius / torch.stack([part.square().sum() for part in direction]).sum().sqrt()
    sides = []
    for sign in (epsilon, -epsilon):
        given = leaves(u)
        moved = [x + sign * d for x, d in zip(w, direction, strict=True)]
        sides.append(grad(inner(moved, given), given))
    return after, b, [(one - two) / (2 * epsilon) for one, two in zip(*sides, strict=True)]


def neumann(
    inner: Inner, outer: Outer, w: Tensors, u: Sequence[Tensor], b: Tensors, rate: float, decay: float, steps: int,
    terms: int, step_size: float,
) -> Found:  # fmt: skip
    w, b = plain_steps(inner, w, u, b, rate, decay, steps)
    end, given = leaves(w), leaves(u)
    cotangent = grad(outer(end), end)
    gradient = grad(inner(end, given), end, create_graph=True)
    term = series = list(cotangent)
    for _ in range(terms):
        image = grad(gradient, end, term, retain_graph=True)
        term = [t.add(h, alpha=-step_size) for t, h in zip(term, image, strict=True)]
        series = [s + t for s, t in zip(series, term, strict=True)]
    found = grad(gradient, given, [-step_size * s for s in series])
    return w, b, found


def conjugate_gradient(
    inner: Inner, outer: Outer, w: Tensors, u: Sequence[Tensor], b: Tensors, rate: float, decay: float, steps: int,
    iterations: int, damping: float,
) -> Found:  # fmt: skip
    w, b = plain_steps(inner, w, u, b, rate, decay, steps)
    end, given = leaves(w), leaves(u)
    residual = direction = list(grad(outer(end), end))
    gradient = grad(inner(end, given), end, create_graph=True)
    solution = [torch.zeros_like(part) for part in residual]
    square = dot(residual, residual)
    for _ in range(iterations):
        image = grad(gradient, end, direction, retain_graph=True)
        image = [h.add(d, alpha=damping) for h, d in zip(image, direction, strict=True)]
        step = square / dot(direction, image)
        solution = [s + step * d for s, d in zip(solution, direction, strict=True)]
        residual = [r - step * h for r, h in zip(residual, image, strict=True)]
        after = dot(residual, residual)
        direction = [r + after / square * d for r, d in zip(residual, direction, strict=True)]
        square = after
    found = grad(gradient, given, [-part for part in solution])
    return w, b, found


def dot(one: Sequence[Tensor], two: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(one, two, strict=True)]).sum()


class Adam:
    """In place, on the outer variables."""

    def __init__(self, u: Sequence[Tensor], rate: float) -> None:
        self.u = [tensor.clone() for tensor in u]
        self.first = [torch.zeros_like(tensor) for tensor in u]
        self.second = [torch.zeros_like(tensor) for tensor in u]
        self.rate, self.count = rate, 0

    def step(self, gradient: Sequence[Tensor]) -> None:
        self.count += 1
        spread = (1 - 0.999**self.count) ** 0.5
        size = self.rate / (1 - 0.9**self.count)
        for u, m, v, g in zip(self.u, self.first, self.second, gradient, strict=True):
            m.lerp_(g, 0.1)
            v.mul_(0.999).addcmul_(g, g, value=0.001)
            u.addcdiv_(m, (v.sqrt() / spread).add_(1e-8), value=-size)
