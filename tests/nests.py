"""Three levels z > y > x, and what their nest must give: programs written out in autograd, and dense linear algebra.

Nothing here calls `mlo` to find an answer. `mlo` appears only where a graph is put together to be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from helpers import HandUpdate, Memory, no_memory, normal, sgd_by_hand
from torch import Tensor

import mlo
from mlo.hypergradient import AbstractHypergradient
from mlo.optimizer import SGD, AbstractOptimizer

F64 = torch.float64


def _between(low: float, high: float, size: int, seed: int) -> Tensor:
    """A symmetric matrix with eigenvalues from `low` to `high`."""
    vectors, _ = torch.linalg.qr(normal(size, size, seed=seed))
    return vectors @ torch.diag(torch.linspace(low, high, size, dtype=F64)) @ vectors.T


@dataclass(frozen=True, eq=False, kw_only=True)
class Nested:
    r"""f_x = ½‖x − s(Ay) − Bz‖²_H + ¼ε Σ(1.5 + tanh Ay)x⁴, f_y = ½‖y − Dz − c‖²_K + ½κ‖x + Ey − d‖² + ¼ε Σy⁴, and f_z.

    κ is the `coupling`. With ε = `bend` = 0, s is the identity and both are quadratics; otherwise it is tanh. What y
    minimises with the response of x put in stays convex for every κ ≥ 0: its Hessian is K + κ(A + E)ᵀ(A + E) where ε = 0.

    - `free`: of z in f_x, in f_y: how strongly they read it.
    """

    coupling: float = 1.0
    bend: float = 0.0
    free: tuple[float, float] = (1.0, 1.0)

    h = _between(0.7, 1.0, 3, 1)
    k = _between(0.6, 1.0, 3, 2)
    a = _between(0.5, 0.6, 3, 3) + 0.05 * normal(3, 3, seed=4)
    e = _between(0.3, 0.4, 3, 3) + 0.05 * normal(3, 3, seed=5)
    b = 0.3 * normal(3, 2, seed=6)
    d_matrix = 0.5 * normal(3, 2, seed=7)
    c, d, target = normal(3, seed=8), normal(3, seed=9), normal(3, seed=10)
    start: ClassVar[dict[str, Tensor]] = {
        "x": 0.4 * normal(3, seed=11),
        "y": 0.4 * normal(3, seed=12),
        "z": normal(2, seed=13),
    }

    def x(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """f_x."""
        seen = self.a @ y
        r = x - (seen.tanh() if self.bend else seen) - self.free[0] * self.b @ z
        return 0.5 * r @ self.h @ r + 0.25 * self.bend * (x.pow(4) * (1.5 + seen.tanh())).sum()

    def y(self, y: Tensor, x: Tensor, z: Tensor) -> Tensor:
        """f_y."""
        r = y - self.free[1] * self.d_matrix @ z - self.c
        own = 0.5 * r @ self.k @ r + 0.25 * self.bend * y.pow(4).sum()
        return own + 0.5 * self.coupling * (x + self.e @ y - self.d).square().sum()

    def z(self, z: Tensor, y: Tensor, x: Tensor | None) -> Tensor:
        """f_z; without x where z does not list it."""
        own = 0.5 * (y - self.target).square().sum() + 0.05 * z.square().sum() + 0.1 * (y * y.roll(1)).sum()
        return own if x is None else own + 0.3 * x.sum() + 0.2 * x @ y

    @property
    def rate(self) -> float:
        """A step size that suits y."""
        return 1 / (1.1 + 1.1 * self.coupling + 0.5 * self.bend)

    def levels(
        self,
        x: AbstractHypergradient,
        y: AbstractHypergradient,
        steps: tuple[int, int] = (1, 1),
        *,
        rules: tuple[AbstractOptimizer, AbstractOptimizer] | None = None,
        listed: tuple[str, ...] = ("y", "x"),
        nested: Any = "reduced",
        top: dict[str, Any] | None = None,
    ) -> list[mlo.Level]:
        """x with its method and its steps under y with its own; `listed` by z; `top`: other fields of z."""
        of_x, of_y = rules or (SGD(learning_rate=0.5), SGD(learning_rate=self.rate))
        reads = [("z",) if free else () for free in self.free]
        nothing = torch.zeros(2, dtype=F64)

        def f_x(values: Any, batch: Any) -> Tensor:
            return self.x(values["x"], values["y"], values["z"] if reads[0] else nothing)

        def f_y(values: Any, batch: Any) -> Tensor:
            return self.y(values["y"], values["x"], values["z"] if reads[1] else nothing)

        def f_z(values: Any, batch: Any) -> Tensor:
            return self.z(values["z"], values["y"], values["x"] if "x" in listed else None)

        rest = {"optimizer": SGD(learning_rate=0.3), **(top or {})}
        return [
            mlo.Level(
                "x",
                objective=f_x,
                variables=self.start["x"],
                given=("y", *reads[0]),
                optimizer=of_x,
                steps=steps[0],
                hypergradient=x,
            ),
            mlo.Level(
                "y",
                objective=f_y,
                variables=self.start["y"],
                given=reads[1],
                subject_to=("x",),
                optimizer=of_y,
                steps=steps[1],
                hypergradient=y,
                nested=nested,
            ),
            mlo.Level("z", objective=f_z, variables=self.start["z"], subject_to=listed, **rest),
        ]


# The solved nest.


def hessian(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """In the first argument, reverse over reverse."""
    return torch.func.jacrev(torch.func.grad(function))


def solve(gradient: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Where `gradient` vanishes, by Newton's method with the dense Jacobian."""
    w = start
    for _ in range(60):
        g = gradient(w)
        w = w - torch.linalg.solve(torch.func.jacrev(gradient)(w), g)
        if g.norm() < 1e-14:
            break
    assert gradient(w).norm() < 1e-12
    return w.detach()


@dataclass(frozen=True, eq=False)
class Solved:
    """x* and y* for one z, and the derivative of f_z(z, y*, x*(y*, z)) by dense linear algebra."""

    problem: Nested
    z: Tensor
    x: Tensor
    y: Tensor

    def response(self, y: Tensor, z: Tensor) -> Tensor:
        """x*(y, z) near the solution: two steps of Newton's method, whose derivatives are right up to the third order."""
        x = self.x
        for _ in range(2):
            gradient = torch.func.grad(self.problem.x)(x, y, z)
            x = x - torch.linalg.solve(hessian(self.problem.x)(x, y, z), gradient)
        return x

    def middle(self, y: Tensor, z: Tensor) -> Tensor:
        """φ(y, z) = f_y with the response put in."""
        return self.problem.y(y, self.response(y, z), z)

    def hypergradient(self, *, listed: bool = True, direct: bool = False) -> Tensor:
        """∂F/∂z − (∂²φ/∂y∂z)ᵀ (∂²φ/∂y²)⁻¹ ∂F/∂y with F = f_z at x*(y, z), or with f_y for φ: `direct`."""

        def total(y: Tensor, z: Tensor) -> Tensor:
            return self.problem.z(z, y, self.response(y, z) if listed else None)

        def partial(y: Tensor, z: Tensor) -> Tensor:
            return self.problem.y(y, self.x, z)

        phi = partial if direct else self.middle
        in_y, in_z = torch.func.grad(total, (0, 1))(self.y, self.z)
        slope = torch.func.grad(phi)
        h, c = torch.func.jacrev(slope, (0, 1))(self.y, self.z)
        return (in_z - c.T @ torch.linalg.solve(h, in_y)).detach()

    @property
    def values(self) -> dict[str, Tensor]:
        """For `Graph.init`."""
        return {"x": self.x, "y": self.y, "z": self.z}


def solved(problem: Nested) -> Solved:
    """Solves the whole nest: y by Newton's method on the total gradient, x anew at every y."""
    z = problem.start["z"]

    def x_at(y: Tensor) -> Tensor:
        return solve(lambda x: torch.func.grad(problem.x)(x, y, z), torch.zeros(3, dtype=F64))

    y = torch.zeros(3, dtype=F64)
    for _ in range(60):
        near = Solved(problem, z, x_at(y), y)
        gradient = torch.func.grad(near.middle)(y, z)
        y = (y - torch.linalg.solve(hessian(near.middle)(y, z), gradient)).detach()
        if gradient.norm() < 1e-14:
            break
    found = Solved(problem, z, x_at(y), y)
    assert torch.func.grad(found.middle)(y, z).norm() < 1e-11
    return found


def closed_form(problem: Nested) -> Tensor:
    """The hypergradient of the quadratic nest, all three levels listed, by matrices alone.

    x* = Ay + Bz, and y* solves My* = K(Dz + c) + κSᵀ(d − Bz) with S = A + E, M = K + κSᵀS.
    """
    assert not problem.bend
    z, s = problem.start["z"], problem.a + problem.e
    b, d = problem.free[0] * problem.b, problem.free[1] * problem.d_matrix
    m = problem.k + problem.coupling * s.T @ s
    y_of_z = torch.linalg.solve(m, problem.k @ d - problem.coupling * s.T @ b)
    y = torch.linalg.solve(m, problem.k @ (d @ z + problem.c) + problem.coupling * s.T @ (problem.d - b @ z))
    x, x_of_z = problem.a @ y + b @ z, problem.a @ y_of_z + b
    in_y = y - problem.target + 0.1 * (y.roll(1) + y.roll(-1)) + 0.2 * x
    return 0.1 * z + y_of_z.T @ in_y + x_of_z.T @ (0.3 + 0.2 * y)


# The nest as it is computed.

Loss: TypeAlias = Callable[[Tensor, int], Tensor]


HALF = sgd_by_hand(0.5)


@dataclass(frozen=True)
class Steps:
    """How a level steps: `count` times by `update`, of which the `last` are differentiated, from where `memory` says."""

    count: int
    update: HandUpdate = HALF
    last: int | None = None

    def taken(
        self, gradient: Callable[[Tensor, int], Tensor], start: Tensor, memory: Memory | None = None
    ) -> tuple[Tensor, Memory]:
        """Where they lead, as a recorded function of all that `gradient` closes over."""
        w, memory = start.detach(), memory or no_memory(start)
        held = 0 if self.last is None else self.count - self.last
        for step in range(self.count):
            if step <= held:
                w = w.detach().requires_grad_()
                memory = memory[0], {key: {"": m[""].detach()} for key, m in memory[1].items()}
            new, memory = self.update({"": w}, {"": gradient(w, step)}, memory)
            w = new[""]
        return w, memory


def total_gradient(loss: Callable[[Tensor], Tensor], w: Tensor) -> Tensor:
    """By autograd, recorded, through all that `loss` is made of."""
    return torch.autograd.grad(loss(w), w, create_graph=True)[0]


def responses(
    problem: Nested,
    z: Tensor,
    of_x: Steps,
    of_y: Steps,
    *,
    start: dict[str, Tensor] | None = None,
    memories: dict[str, Memory] | None = None,
    direct: bool = False,
) -> tuple[Tensor, Tensor, dict[str, Memory]]:
    """y's steps along its total gradient, x taken anew from `start` at each, and x once more where y ends."""
    start, memories = start or problem.start, memories or {}

    def respond(y: Tensor) -> tuple[Tensor, Memory]:
        return of_x.taken(
            lambda x, _: total_gradient(lambda own: problem.x(own, y, z), x), start["x"], memories.get("x")
        )

    def gradient(y: Tensor, _: int) -> Tensor:
        whole = total_gradient(lambda own: problem.y(own, respond(own)[0], z), y)
        if not direct:
            return whole
        x = respond(y)[0].detach()
        partial = total_gradient(lambda own: problem.y(own, x, z), y)
        return partial + (whole - partial).detach()

    y, after_y = of_y.taken(gradient, start["y"], memories.get("y"))
    x, after_x = respond(y)
    return y, x, {"x": after_x, "y": after_y}


def program(problem: Nested, of_x: Steps, of_y: Steps, *, listed: bool = True, direct: bool = False) -> Tensor:
    """The derivative of f_z in z through the whole program."""
    z = problem.start["z"].clone().requires_grad_()
    y, x, _ = responses(problem, z, of_x, of_y, direct=direct)
    return torch.autograd.grad(problem.z(z, y, x if listed else None), z)[0]
