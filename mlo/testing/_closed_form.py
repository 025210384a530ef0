"""A problem with a known hypergradient. Nothing here calls `mlo` to find an answer; `Level` only states the question."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias, final

import torch

from mlo._level import Level
from mlo.optimizer import SGD
from mlo.testing._families import AbstractTerm, Family, make, normal, rounded
from mlo.testing._layout import Layout, flat, in_words, shaped, size

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._types import Objective, Tree
    from mlo.hypergradient import AbstractHypergradient
    from mlo.optimizer import AbstractOptimizer

Inverse: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"
"""q from the Hessian H, n × n, and the cotangent λ."""

UPPER = "u"
WEIGHT = 0.1
"""Of the upper objective's own term, WEIGHT/2 ‖u‖²."""


@final
@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class ClosedForm:
    """Lower levels w of one family, an upper level `u` with F = ½ Σ ‖w − t‖² + 0.05 ‖u‖², and its hypergradient.

    Numbers are made from `seed`; answers are dense linear algebra in float64, on data that `dtype` holds exactly. `str` of
    it is the problem in words.

    - `reads`: the lower levels in dependency order, each with the levels it reads.
    - `seen`: the lower levels that F reads.
    - `layouts`: how every level keeps its numbers: names and shapes.
    - `family`: quadratic, ridge or logistic; every Hessian has its eigenvalues in [1/condition, 1].
    - `condition`: at least 2.
    - `decay`: L2 weight decay, which the lower optimizers add to their objectives.
    - `at_rest`: quadratics that start where all gradients are exactly zero, all levels included.
    """

    reads: Mapping[str, tuple[str, ...]]
    seen: tuple[str, ...]
    layouts: Mapping[str, Layout]
    family: Family = "quadratic"
    condition: float = 10.0
    decay: float = 0.0
    dtype: torch.dtype = torch.float64
    seed: int = 0
    at_rest: bool = False

    def __str__(self) -> str:
        levels = ", ".join(
            f"{name} ({in_words(self.layouts[name])}) reads {' and '.join(of)}" for name, of in self.reads.items()
        )
        kind = {"quadratic": "quadratics", "ridge": "ridge regression", "logistic": "logistic regression"}[self.family]
        decay = f", weight decay {self.decay:g}" if self.decay else ""
        rest = ", starting where every gradient is exactly zero" if self.at_rest else ""
        return (
            f"{kind} of condition {self.condition:g} in {str(self.dtype).removeprefix('torch.')}, seed {self.seed}"
            f"{decay}{rest}: {levels}; the objective of u ({in_words(self.layouts[UPPER])}) reads {' and '.join(self.seen)}"
        )

    __repr__ = __str__

    # The question.

    def levels(
        self,
        method: AbstractHypergradient,
        *,
        steps: int,
        optimizer: AbstractOptimizer | None = None,
        objective: Objective | None = None,
    ) -> list[Level]:
        """The levels, the upper one last; `objective` may stand in for F.

        The default optimizer is SGD with `rate`; another one should have the weight decay of this problem.
        """
        optimizer = optimizer or self.descent
        terms, _ = self._terms, self._targets  # made here: random numbers are refused in the middle of a `vmap`

        def lower(name: str) -> Level:
            def own(values: Any, batch: Any) -> Tensor:
                return terms[name].value(flat(values[name]), {of: flat(values[of]) for of in self.reads[name]})

            return Level(
                name,
                objective=own,
                variables=self.tree(name, self._start[name]),
                given=self.reads[name],
                optimizer=optimizer,
                steps=steps,
                hypergradient=method,
            )

        upper = Level(
            UPPER,
            objective=objective or self.objective,
            variables=self.tree(UPPER, self._start[UPPER]),
            subject_to=tuple(self.reads),
            optimizer=SGD(learning_rate=0.1),
        )
        return [*map(lower, self.reads), upper]

    def objective(self, values: Any, batch: Any) -> Tensor:
        """F."""
        own = 0.5 * WEIGHT * flat(values[UPPER]).square().sum()
        for name in self.seen:
            w = flat(values[name])
            own = own + 0.5 * (w - self._targets[name].to(w)).square().sum()
        return own

    @property
    def rate(self) -> float:
        """Of the default optimizer: a contraction on every problem."""
        return 0.5

    @property
    def descent(self) -> SGD:
        """The default optimizer, with the weight decay of this problem."""
        return SGD(learning_rate=self.rate, weight_decay=self.decay)

    def tree(self, name: str, vector: Tensor) -> Tree:
        """A flat vector as the variables of level `name`, in this problem's type."""
        return shaped(self.layouts[name], vector.to(self.dtype))

    # The answers.

    @property
    def solution(self) -> Mapping[str, Tree]:
        """Every level where the lower ones are solved, for `Graph.init(values=…)`."""
        return {name: self.tree(name, vector) for name, vector in self.solved().items()}

    @property
    def hypergradient(self) -> Tree:
        """dF(w*(u), u)/du at the solution."""
        return self.at_solution(torch.linalg.solve)

    def at_solution(self, inverse: Inverse) -> Tree:
        """The hypergradient at the solution with q = `inverse`(H, λ) in place of H⁻¹λ at every lower level."""
        return self.tree(UPPER, self.direct + self.implicit(self.solved(), inverse))

    def unrolled(self, steps: int, *, last: int | None = None) -> Tree:
        """The hypergradient through the `last` of `steps` default steps of every level, those before held fixed."""
        return self.tree(UPPER, self.direct + self.swept(steps, last))

    # The same in flat vectors of float64, and by parts.

    @property
    def start(self) -> Mapping[str, Tensor]:
        """Where every level begins."""
        return self._start

    @property
    def direct(self) -> Tensor:
        """∂F/∂u."""
        return WEIGHT * self._start[UPPER]

    def solved(self, upper: Tensor | None = None) -> Mapping[str, Tensor]:
        """Every level solved by Newton's method, with u at `upper`."""
        values = {UPPER: self._start[UPPER] if upper is None else upper}
        for name in self.reads:
            w = torch.zeros_like(self._start[name])
            for _ in range(50):
                gradient = self._gradient(name, w, values)
                w = w - torch.linalg.solve(self._hessian(name, w, values), gradient)
                if gradient.norm() <= 1e-15:
                    break
            assert self._gradient(name, w, values).norm() <= 1e-12 * (1 + w.norm()), "Newton's method failed: our bug"
            values[name] = w
        return values

    def value(self, values: Mapping[str, Tensor]) -> float:
        """F in float64."""
        return self.objective(values, None).item()

    def cotangents(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """∂F/∂w for the levels that F reads."""
        return {name: values[name] - self._targets[name] for name in self.seen}

    def implicit(
        self, values: Mapping[str, Tensor], inverse: Inverse, cotangents: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The indirect part, −Σ Cᵀ q with q = `inverse`(H, λ), by reverse accumulation over the lower levels."""
        arrived = self._arriving(self.cotangents(values) if cotangents is None else cotangents)
        for name in reversed(list(self.reads)):
            q = inverse(self._hessian(name, values[name], values), arrived[name])
            for read in self.reads[name]:
                arrived[read] = arrived[read] - self._terms[name].cross(values[name], values, read).T @ q
        return arrived[UPPER]

    def run(self, steps: int) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
        """Where `steps` default steps lead, and all places each level was at before its steps."""
        values, passed = {UPPER: self._start[UPPER]}, dict[str, list["Tensor"]]()
        for name in self.reads:
            w, passed[name] = self._start[name], []
            for _ in range(steps):
                passed[name].append(w)
                w = w - self.rate * self._gradient(name, w, values)
            values[name] = w
        return values, passed

    def swept(self, steps: int, last: int | None) -> Tensor:
        """The indirect part of `unrolled`: λ ← (I − ηH)λ and ū ← ū − ηCᵀλ, from the last step back."""
        values, passed = self.run(steps)
        arrived = self._arriving(self.cotangents(values))
        for name in reversed(list(self.reads)):
            swept = passed[name] if last is None else passed[name][-last:]
            cotangent = arrived[name]
            for w in reversed(swept):
                for read in self.reads[name]:
                    arrived[read] = arrived[read] - self.rate * self._terms[name].cross(w, values, read).T @ cotangent
                cotangent = cotangent - self.rate * self._hessian(name, w, values) @ cotangent
        return arrived[UPPER]

    # What all is made of.

    def _arriving(self, cotangents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.zeros_like(vector) for name, vector in self._start.items()} | dict(cotangents)

    def _gradient(self, name: str, w: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        return self._terms[name].gradient(w, values) + self.decay * w

    def _hessian(self, name: str, w: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        return self._terms[name].hessian(w, values) + self.decay * torch.eye(len(w), dtype=w.dtype)

    @cached_property
    def _terms(self) -> dict[str, AbstractTerm]:
        return {
            name: make(
                self.family,
                size(self.layouts[name]),
                {read: size(self.layouts[read]) for read in reads},
                condition=self.condition,
                dtype=self.dtype,
                key=(self.seed, name),
                centred=self.at_rest,
            )
            for name, reads in self.reads.items()
        }

    @cached_property
    def _start(self) -> dict[str, Tensor]:
        return self._drawn("start") if not self.at_rest else {key: 0 * w for key, w in self._drawn("start").items()}

    @cached_property
    def _targets(self) -> dict[str, Tensor]:
        return self._drawn("target")

    def _drawn(self, what: str) -> dict[str, Tensor]:
        names = (*self.reads, UPPER)
        key = (self.seed, what)
        return {name: rounded(normal(size(self.layouts[name]), key=(*key, name)), self.dtype) for name in names}
