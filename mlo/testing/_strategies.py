"""Hypothesis strategies for `ClosedForm` problems. They shrink to one quadratic level of one number, seed 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from hypothesis import strategies as st

from mlo.testing._closed_form import UPPER, ClosedForm
from mlo.testing._families import Family

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

    from mlo.testing._layout import Layout

Shape: TypeAlias = Mapping[str, tuple[str, ...]]
"""The lower levels in dependency order, each with the levels it reads."""

_NAMES = "abcdefgh"


def two_levels() -> SearchStrategy[Shape]:
    """`a` reads `u`."""
    return st.just({"a": (UPPER,)})


def chains(longest: int = 3) -> SearchStrategy[Shape]:
    """Each of 2 to `longest` lower levels reads the one below it, the first reads `u`."""
    return st.integers(2, longest).map(lambda n: {_NAMES[i]: (_NAMES[i - 1] if i else UPPER,) for i in range(n)})


def diamonds() -> SearchStrategy[Shape]:
    """`a` and `b` read `u`, `c` reads both."""
    return st.just({"a": (UPPER,), "b": (UPPER,), "c": ("a", "b")})


def ladders(longest: int = 4) -> SearchStrategy[Shape]:
    """Each of 2 to `longest` lower levels reads the two before it: as many paths as Fibonacci's numbers."""
    line = (UPPER, *_NAMES)
    return st.integers(2, longest).map(lambda n: {line[i]: tuple(line[max(0, i - 2) : i]) for i in range(1, n + 1)})


@st.composite
def dags(draw: DrawFn, largest: int = 4) -> Shape:
    """Up to `largest` lower levels, named in any alphabetical order, each reading any of `u` and those before it."""
    names = draw(st.permutations(_NAMES[: draw(st.integers(1, largest))]))
    shape: dict[str, tuple[str, ...]] = {}
    for index, name in enumerate(names):
        before = (UPPER, *names[:index])
        shape[name] = tuple(sorted(draw(st.sets(st.sampled_from(before), min_size=1)), key=before.index))
    return shape


def shapes() -> SearchStrategy[Shape]:
    """All of the above."""
    return st.one_of(two_levels(), chains(), diamonds(), ladders(), dags())


def quadratics(
    dimension: int | None = None, condition: float = 10.0, shape: SearchStrategy[Shape] | None = None, **choices: Any
) -> SearchStrategy[ClosedForm]:
    """f = ½wᵀHw − wᵀH(c + Σ Bv): `problems` of this family, with every level of `dimension` numbers if given."""
    return problems(families=("quadratic",), dimension=dimension, condition=condition, shape=shape, **choices)


def ridge(dimension: int | None = None, condition: float = 10.0, **choices: Any) -> SearchStrategy[ClosedForm]:
    """f = ‖Xw − y‖²/2N + ½ Σ dᵢ(reads) wᵢ²: `problems` of this family."""
    return problems(families=("ridge",), dimension=dimension, condition=condition, **choices)


def logistic(dimension: int | None = None, condition: float = 10.0, **choices: Any) -> SearchStrategy[ClosedForm]:
    """f = mean log(1 + exp(−yᵢxᵢw)) + ½ Σ dᵢ(reads) wᵢ²: `problems` of this family."""
    return problems(families=("logistic",), dimension=dimension, condition=condition, **choices)


@st.composite
def problems(
    draw: DrawFn,
    *,
    families: Sequence[Family] = ("quadratic", "ridge", "logistic"),
    shape: SearchStrategy[Shape] | None = None,
    dimension: int | None = None,
    condition: float = 10.0,
    decays: Sequence[float] = (0.0, 0.2),
    dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32),
) -> ClosedForm:
    """Problems with known hypergradients.

    - `families`: of the lower objectives.
    - `shape`: which level reads which; by default `shapes()`.
    - `dimension`: numbers of every level; by default 1 to 4, each level its own.
    - `condition`: of every Hessian, whose eigenvalues lie in [1/condition, 1]; at least 2.
    - `decays`: the optimizers' L2 weight decay, which moves the spectrum up.
    - `dtypes`: of all tensors.
    """
    if not condition >= 2:
        raise ValueError(f"condition must be at least 2, got {condition}")
    reads = draw(shapes() if shape is None else shape)
    read = {name for of in reads.values() for name in of}
    seen = tuple(name for name in reads if name not in read or draw(st.booleans()))
    return ClosedForm(
        reads=reads,
        seen=seen,
        layouts={name: draw(_layouts(dimension)) for name in (*reads, UPPER)},
        family=draw(st.sampled_from(families)),
        condition=condition,
        decay=draw(st.sampled_from(decays)),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 1000)),
    )


@st.composite
def _layouts(draw: DrawFn, dimension: int | None) -> Layout:
    """One tensor, one zero-dimensional tensor, or a tree; names not in the order of the alphabet."""
    size = dimension or draw(st.integers(1, 4))
    choices: list[Layout] = [(("", (size,)),)]
    if size == 1:
        choices += [(("", ()),), (("only", ()),)]
    if size >= 2:
        choices.append((("slope", (size - 1,)), ("shift", ())))
    if size >= 3:
        choices.append((("weight", (size // 2, 2)), *((("bias", ()),) if size % 2 else ())))
        choices.append((("weight", (1, size - 2)), ("bias", (1,)), ("scale", ())))
    return draw(st.sampled_from(choices))
