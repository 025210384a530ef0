"""Differentiate through the optimizer's own steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING, Literal, final

from mlo import _tree
from mlo.hypergradient._abstract import AbstractHypergradient, AbstractResponse, AbstractStep, Cost, Nesting, Tape

if TYPE_CHECKING:
    from mlo._types import Tree, Upstream
    from mlo.optimizer import AbstractOptimizer

LARGE = 10_000_000
"""Numbers moved in all steps together above which steps are replayed unless told otherwise."""


@final
@dataclass(frozen=True, kw_only=True)
class Unroll(AbstractHypergradient):
    r"""Reverse-mode differentiation of the k optimizer steps of the iteration, momentum and all.

    With w_{i+1}, s_{i+1} = step(w_i, s_i, u) and the start (w_0, s_0) held fixed, a cotangent λ on w_k becomes

        ū = (dw_k/du)ᵀ λ        (Franceschi et al. 2017, Alg. 1, "reverse-HG")

    Exact for the response as it was computed, up to rounding. Directly, the steps are recorded while they are taken: one
    product (a second-order reverse pass) a step, and memory for one activation set a step. Replayed, only variables and
    moments are kept, and the sweep back evaluates each step again: one gradient and one product a step, memory for one
    activation set in all. Both give the same numbers up to rounding. With checkpoints only about 2√k of the k positions are
    held at a time and the steps between them are taken again: up to one gradient a step more, the same bits as replayed
    (Griewank 1992, with one level of recursion). Under several processes steps are always replayed.

    - `last`: sweep over this many steps at the end and hold the ones before fixed (Shaban et al. 2019, "truncated").
    - `replay`: true or false; by default steps are replayed where steps × variables exceed ten million.
    - `checkpoint`: `sqrt` keeps every √k-th position of steps that are then replayed.

    Raises ValueError for `last` below 1, and for checkpoints of steps that are not replayed.
    """

    last: int | None = None
    replay: bool | None = None
    checkpoint: Literal["sqrt"] | None = None

    def __post_init__(self) -> None:
        if self.last is not None and self.last < 1:
            raise ValueError(f"last must be at least 1, got {self.last}")
        if self.checkpoint not in (None, "sqrt"):
            raise ValueError(f"checkpoint must be sqrt or nothing, got {self.checkpoint}")
        if self.checkpoint and self.replay is False:
            raise ValueError("checkpoint needs steps that are replayed, and replay is false")

    def tape(self, steps: int, size: int) -> Tape:
        """The steps that are swept over, recorded or kept."""
        swept = steps if self.last is None else min(self.last, steps)
        if self.checkpoint:
            return Tape(recorded=0, kept=swept, every=isqrt(max(swept, 1) - 1) + 1)  # the root, rounded up
        replayed = swept * size > LARGE if self.replay is None else self.replay
        return Tape(recorded=0, kept=swept) if replayed else Tape(recorded=swept, kept=0)

    def cost(self, steps: int, size: int) -> Cost:
        """One product a step that is swept over; one gradient where it is replayed, another where it is taken again."""
        tape = self.tape(steps, size)
        retaken = tape.kept - -(-tape.kept // tape.every)
        return Cost(gradients=tape.kept + retaken, products=tape.recorded + tape.kept)

    def nesting(self, steps: int, size: int) -> Nesting:
        """Recorded steps are differentiated as they are; replayed ones are replayed again, and so are their starts."""
        tape = self.tape(steps, size)
        again, retaken = max(0, 2 * tape.kept - 1), tape.kept - -(-tape.kept // tape.every)
        return Nesting(
            follows=self.last is None or self.last >= steps,
            plain=retaken,
            recording=Cost(gradients=-retaken, products=0),  # then every position is kept
            again=Cost(gradients=again, products=again),
        )

    def objection(self, optimizer: AbstractOptimizer) -> str | None:
        """None: every optimizer is differentiable."""
        return None

    @property
    def follows_optimizer(self) -> bool:
        """Yes: its steps are what is differentiated."""
        return True

    def pullback(self, response: AbstractResponse, cotangent: Tree) -> Upstream:
        """See the class. With no steps the response depends on nothing."""
        if response.recorded:
            return response.pull_recorded(cotangent)
        return replayed(response.taken(), cotangent) if response.steps else {}


def replayed(steps: Sequence[AbstractStep], cotangent: Tree) -> Upstream:
    """(∂w*/∂u)ᵀ λ through `steps`, the last of which led to w*, by evaluating each again, the last one first."""
    total: dict[str, Tree] = {}
    moments: Upstream = {}
    for step in reversed(steps):
        cotangent, moments, upstream = step.replay(cotangent, moments)
        for name, tree in upstream.items():
            total[name] = _tree.add(total[name], tree) if name in total else tree
    return total
