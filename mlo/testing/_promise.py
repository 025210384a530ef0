"""Which answer a method's theory promises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, final

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from mlo.testing._closed_form import ClosedForm, Inverse

Answer: TypeAlias = (
    "Literal['exact', 'unrolled', 'last_step', 'first_order'] | int | Callable[[Tensor, Tensor], Tensor]"
)
"""The answer a method promises.

- `exact`: q = H⁻¹λ at the response: the exact hypergradient at a solution.
- `first_order`: q = λ.
- a function of the matrix H and the vector λ that gives q: the partial sum of a truncated inverse.
- `unrolled`: the derivative of all steps as they were taken.
- `last_step`: of the last one, those before held fixed; a number k: of the last k.
"""


@final
@dataclass(frozen=True)
class Promise:
    """An `Answer`, read: either an inverse, at the response, or how many of the last steps are differentiated."""

    words: str
    inverse: Inverse | None = None
    last: int | None = None
    total: bool = False
    """Whether it promises the derivative of a whole solve, which central differences can see."""

    @property
    def implicit(self) -> bool:
        """Whether the response is taken for a solution."""
        return self.inverse is not None

    def indirect(self, problem: ClosedForm, steps: int) -> Tensor:
        """What must arrive at u, with the lower levels at the solution, or after `steps` default steps."""
        if self.inverse is not None:
            return problem.implicit(problem.solved(), self.inverse)
        return problem.swept(steps, self.last)


def promise(answer: Answer) -> Promise:
    """`answer`, read. Raises ValueError for one that is none."""
    match answer:
        case "exact":
            return Promise("the exact inverse at the response", torch.linalg.solve, total=True)
        case "first_order":
            return Promise("the identity in place of the inverse", _identity)
        case "unrolled":
            return Promise("the derivative of all steps", total=True)
        case "last_step":
            return Promise("the derivative of the last step", last=1, total=True)
        case int() if not isinstance(answer, bool) and answer >= 1:
            return Promise(f"the derivative of the last {answer} steps", last=answer, total=True)
        case _ if callable(answer):
            return Promise("the given approximate inverse at the response", answer)
        case _:
            pass
    raise ValueError(
        f"answer must be 'exact', 'first_order', 'unrolled', 'last_step', a number of steps or a function of the Hessian "
        f"and the cotangent, got {answer!r}"
    )


def _identity(hessian: Tensor, cotangent: Tensor) -> Tensor:
    return cotangent
