"""Three nested levels with a known hypergradient, and the property that a method holds inside them.

Gradients, Hessians and cross derivatives of the lowest level are written out. The total gradient of the one in the middle
is made of them, and automatic differentiation takes its Jacobian: of explicit matrices, nothing of `mlo`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, final

import torch

from mlo._errors import GraphError
from mlo._graph import Graph
from mlo._level import Level
from mlo.hypergradient import Exact
from mlo.optimizer import SGD
from mlo.testing._case import Case, counted
from mlo.testing._closed_form import UPPER, WEIGHT, ClosedForm
from mlo.testing._families import AbstractTerm, Family, make, normal
from mlo.testing._layout import flat, in_words, shaped, size

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._types import Tree
    from mlo.hypergradient import AbstractHypergradient
    from mlo.testing._closed_form import Inverse
    from mlo.testing._layout import Layout

LOW, MIDDLE = "x", "y"
COUPLING = 0.5
"""κ, how strongly the middle level's objective depends on the lowest one."""


@final
@dataclass(frozen=True, eq=False)
class Nest:
    r"""u > y > x: f_x is a ridge or logistic regression whose penalties are chosen by y and u, so that its Hessian moves,

        f_y = ½ (y − Bu − c)ᵀ K (y − Bu − c) + κ/2 ‖x + Ey − d‖²,    F = ½ ‖y − t‖² + ½ ‖x − s‖² + 0.05 ‖u‖²

    with the eigenvalues of K between 0.6 and 0.7, so that those of the Jacobian of the total gradient lie between ½ and 1 as
    Hessians' may. In float64; sizes, layouts, weight decay and seed are those of `problem`.
    """

    problem: ClosedForm

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} ({in_words(layout)})" for name, layout in self.layouts.items())
        decay = f", weight decay {self.problem.decay:g}" if self.problem.decay else ""
        return f"three nested levels over {self.family} regression, seed {self.problem.seed}{decay}: {sizes}"

    @property
    def family(self) -> Family:
        """A quadratic has one Hessian everywhere: in its place, ridge regression."""
        return "ridge" if self.problem.family == "quadratic" else self.problem.family

    @property
    def layouts(self) -> Mapping[str, Layout]:
        """Those of the first and of the last lower level of the problem, and that of u."""
        names = list(self.problem.reads)
        chosen = {LOW: names[0], MIDDLE: names[-1], UPPER: UPPER}
        return {name: self.problem.layouts[other] for name, other in chosen.items()}

    # The question.

    def levels(self, low: AbstractHypergradient, middle: AbstractHypergradient, steps: int) -> list[Level]:
        """x takes `steps` steps of SGD, y none: it is differentiated where it stands."""

        def f_x(values: Any, batch: Any) -> Tensor:
            return self._term.value(flat(values[LOW]), {name: flat(values[name]) for name in (MIDDLE, UPPER)})

        def f_y(values: Any, batch: Any) -> Tensor:
            return self._middle(*(flat(values[name]) for name in (LOW, MIDDLE, UPPER)))

        def f_u(values: Any, batch: Any) -> Tensor:
            return self._upper(*(flat(values[name]) for name in (LOW, MIDDLE, UPPER)))

        start = {name: shaped(layout, self.start[name]) for name, layout in self.layouts.items()}
        below = Level(
            LOW,
            objective=f_x,
            variables=start[LOW],
            given=(MIDDLE, UPPER),
            optimizer=self.problem.descent,
            steps=steps,
            hypergradient=low,
        )
        between = Level(
            MIDDLE,
            objective=f_y,
            variables=start[MIDDLE],
            given=(UPPER,),
            subject_to=(LOW,),
            optimizer=SGD(learning_rate=0.1),
            steps=0,
            hypergradient=middle,
        )
        rule = SGD(learning_rate=0.1)
        top = Level(UPPER, objective=f_u, variables=start[UPPER], subject_to=(MIDDLE, LOW), optimizer=rule)
        return [below, between, top]

    def trees(self, values: Mapping[str, Tensor]) -> dict[str, Tree]:
        """For `Graph.init(values=…)`."""
        return {name: shaped(self.layouts[name], vector) for name, vector in values.items()}

    # The answers.

    def solved(self, upper: Tensor | None = None) -> dict[str, Tensor]:
        """x and y solved by Newton's method, x anew for every y."""
        u = self.start[UPPER] if upper is None else upper
        values = {LOW: self.start[LOW], MIDDLE: torch.zeros_like(self.start[MIDDLE]), UPPER: u}
        for _ in range(50):
            values[LOW] = self._low(values[MIDDLE], u)
            gradient, (jacobian, _) = self._total_gradient(values, torch.linalg.solve)
            if gradient.norm() <= 1e-13:
                return values
            values[MIDDLE] = values[MIDDLE] - torch.linalg.solve(jacobian, gradient)
        raise AssertionError("Newton's method failed: our bug")

    def value(self, values: Mapping[str, Tensor]) -> Tensor:
        """F."""
        return self._upper(values[LOW], values[MIDDLE], values[UPPER])

    def implicit(self, values: Mapping[str, Tensor], low: Inverse, middle: Inverse) -> Tensor:
        """With q = `low`(H, λ) for x, differentiated as d(Bλ) = B(dλ − dH Bλ), and `middle`(J, λ) for y."""
        in_x, in_y, in_u = torch.func.jacrev(self._upper, (0, 1, 2))(*(values[name] for name in (LOW, MIDDLE, UPPER)))
        q = low(self._hessian(values), in_x)
        in_y = in_y - self._term.cross(values[LOW], values, MIDDLE).T @ q
        in_u = in_u - self._term.cross(values[LOW], values, UPPER).T @ q
        _, (j, k) = self._total_gradient(values, low)
        return in_u - k.T @ middle(j.T, in_y)

    def unrolled(self, steps: int, last: int | None) -> Tensor:
        """Through the `last` of `steps` default steps of x, those before held fixed, and a dense solve for y."""
        y, u = self.start[MIDDLE], self.start[UPPER]
        held = 0 if last is None else max(0, steps - last)
        begun = self._stepped(self.start[LOW], y, u, held)

        def phi(y: Tensor, u: Tensor) -> Tensor:
            return self._middle(self._stepped(begun, y, u, steps - held), y, u)

        def whole(y: Tensor, u: Tensor) -> Tensor:
            return self._upper(self._stepped(begun, y, u, steps - held), y, u)

        in_y, in_u = torch.func.jacrev(whole, (0, 1))(y, u)
        j, k = torch.func.jacrev(torch.func.jacrev(phi), (0, 1))(y, u)
        return in_u - k.T @ torch.linalg.solve(j.T, in_y)

    # What all is made of.

    def _middle(self, x: Tensor, y: Tensor, u: Tensor) -> Tensor:
        own = y - self._made["b"] @ u - self._made["c"]
        rest = x + self._made["e"] @ y - self._made["d"]
        return 0.5 * own @ self._made["k"] @ own + 0.5 * COUPLING * rest.square().sum()

    def _upper(self, x: Tensor, y: Tensor, u: Tensor) -> Tensor:
        own = 0.5 * WEIGHT * u.square().sum()
        return own + 0.5 * (y - self._made["t"]).square().sum() + 0.5 * (x - self._made["s"]).square().sum()

    def _total_gradient(self, values: Mapping[str, Tensor], inverse: Inverse) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """G = ∂f_y/∂y − Cᵀq with q = B ∂f_y/∂x, and its Jacobians in y and u, where dx = −B dg and dq = B(d∂f_y/∂x − dH q).

        B is `inverse` at `values`, a matrix: the path of y and u moves x and q to first order, which is all that is asked.
        """
        x, y, u = (values[name] for name in (LOW, MIDDLE, UPPER))
        h, g = self._hessian(values), self._gradient(x, y, u)
        b = torch.stack([inverse(h, row) for row in torch.eye(len(x), dtype=x.dtype)], dim=1)
        slope = torch.func.jacrev(self._middle, (0, 1))
        first = slope(x, y, u)[0]
        q = b @ first

        def gradient(y: Tensor, u: Tensor) -> Tensor:
            moved = x - b @ (self._gradient(x, y, u) - g)
            at = {LOW: moved, MIDDLE: y, UPPER: u}
            in_x, in_y = slope(moved, y, u)
            solution = q + b @ (in_x - first - (self._hessian(at) - h) @ q)
            return in_y - self._term.cross(moved, at, MIDDLE).T @ solution

        return gradient(y, u), torch.func.jacrev(gradient, (0, 1))(y, u)

    def _low(self, y: Tensor, u: Tensor) -> Tensor:
        x = torch.zeros_like(self.start[LOW])
        for _ in range(50):
            gradient = self._gradient(x, y, u)
            x = x - torch.linalg.solve(self._hessian({LOW: x, MIDDLE: y, UPPER: u}), gradient)
            if gradient.norm() <= 1e-15:
                break
        return x

    def _stepped(self, x: Tensor, y: Tensor, u: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            x = x - self.problem.rate * self._gradient(x, y, u)
        return x

    def _gradient(self, x: Tensor, y: Tensor, u: Tensor) -> Tensor:
        return self._term.gradient(x, {MIDDLE: y, UPPER: u}) + self.problem.decay * x

    def _hessian(self, values: Mapping[str, Tensor]) -> Tensor:
        x = values[LOW]
        return self._term.hessian(x, values) + self.problem.decay * torch.eye(len(x), dtype=x.dtype)

    @cached_property
    def start(self) -> Mapping[str, Tensor]:
        """Where every level begins."""
        return {name: normal(size(layout), key=self._key(name)) for name, layout in self.layouts.items()}

    @cached_property
    def _term(self) -> AbstractTerm:
        sizes = {name: size(self.layouts[name]) for name in (MIDDLE, UPPER)}
        return make(
            self.family,
            size(self.layouts[LOW]),
            sizes,
            condition=self.problem.condition,
            dtype=torch.float64,
            key=self._key("term"),
            centred=False,
        )

    @cached_property
    def _made(self) -> Mapping[str, Tensor]:
        x, y, u = (size(self.layouts[name]) for name in (LOW, MIDDLE, UPPER))
        shapes = {"b": (y, u), "e": (x, y), "c": (y,), "d": (x,), "t": (y,), "s": (x,)}
        made = {name: normal(*shape, key=self._key(name)) for name, shape in shapes.items()}
        vectors, _ = torch.linalg.qr(normal(y, y, key=self._key("k")))
        k = vectors @ torch.linspace(0.6, 0.7, y, dtype=torch.float64).diag() @ vectors.T
        return {**made, "e": 0.3 * made["e"] / max(x, y) ** 0.5, "b": made["b"] / u**0.5, "k": (k + k.T) / 2}

    def _key(self, what: str) -> tuple[object, ...]:
        return (self.problem.seed, "nest", what)


def nested(case: Case) -> None:
    """In a nest u > y > x, the promised answer where the pullback itself is differentiated: the method at x, and at y.

    An implicit method is asked at the solution, where a partial inverse B is differentiated by d(Bλ) = B(dλ − dH Bλ); the
    others after steps of SGD. The level that the method does not hold has `Exact`. Nothing for a method that refuses.
    """
    nest, promise, method = Nest(case.problem), case.promise, case.method
    case = case.on(replace(case.problem, dtype=torch.float64))
    steps = case.steps - 1 if promise.implicit else case.steps
    told = method.nesting(steps, size(nest.layouts[LOW]))
    if told.refused is None and told.symmetric:
        graph = Graph(nest.levels(method, Exact(), steps))
        inverse = promise.inverse
        if inverse is None:
            values, right = nest.start, nest.unrolled(steps, promise.last)
        else:
            values = nest.solved()
            right = nest.implicit(values, inverse, torch.linalg.solve)
        found = case.vector(graph.hypergradient(UPPER, graph.init(values=nest.trees(values))))
        what = f"below a level in the middle, with {counted(steps)}, it differs from {promise.words}, differentiated"
        case.compare(what, found, right, case.allowed, on=str(nest))
    if promise.inverse is None:
        return
    values = nest.solved()
    try:
        graph = Graph(nest.levels(Exact(), method, 0))
    except GraphError:
        return
    found = case.vector(graph.hypergradient(UPPER, graph.init(values=nest.trees(values))))
    right = nest.implicit(values, torch.linalg.solve, promise.inverse)
    case.compare(f"in the middle, it differs from {promise.words}", found, right, case.allowed, on=str(nest))
