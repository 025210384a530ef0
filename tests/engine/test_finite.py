"""Numbers that must be finite: who is named, what is held, and that a look changes nothing."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from helpers import normal
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import vmap

import mlo
from mlo._engine import Iteration
from mlo._finite import Finite
from mlo._graph import plan_of
from mlo.optimizer import SGD

NUMBERS = [0.0, -1.5, 3e30, float("inf"), float("-inf"), float("nan")]


@given(
    st.lists(
        st.one_of(st.sampled_from(NUMBERS), st.lists(st.sampled_from(NUMBERS), max_size=3).map(tuple)), max_size=6
    ),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_the_first_that_is_not_finite_is_named(entries, dtype):
    finite, wrong = Finite(), None
    for step, entry in enumerate(entries):
        term = "the loss" if isinstance(entry, float) else "the new value"
        tensor = torch.tensor(entry, dtype=dtype)
        if isinstance(entry, float):
            finite.add("w", step, term, tensor)
        else:
            finite.add_all("w", step, term, {"w": tensor, "b": torch.zeros((), dtype=torch.float64)})
        if wrong is None and not bool(tensor.isfinite().all()):
            wrong = (step, term)
    if wrong is None:
        finite.refuse(7)
        finite.refuse(7)
        return
    with pytest.raises(mlo.NumericalError) as error:
        finite.refuse(7)
    assert (error.value.level, error.value.step, error.value.term, error.value.iteration) == ("w", *wrong, 7)


def test_inside_a_transform_nobody_looks():
    def ratio(x: Tensor) -> Tensor:
        finite = Finite()
        finite.add_all("w", 1, "the new value", x / x)
        finite.refuse(1)
        return x / x

    assert vmap(ratio)(torch.zeros(2, 3)).isnan().all()


def test_values_that_were_left_behind_are_not_held():
    """Of the steps of an upper level: each takes the level below it to another place."""
    seen = list[Any]()

    def inner(values: Any, batch: Any) -> Tensor:
        return (values["w"] - values["u"]).square().sum()

    def outer(values: Any, batch: Any) -> Tensor:
        gc.collect()
        assert [reference() is None for reference in seen[1:-1]] == [True] * (
            len(seen) - 2
        )  # all but the first and the last
        seen.append(weakref.ref(values["w"].untyped_storage()))
        return values["w"].square().sum()

    levels = [
        mlo.Level("w", objective=inner, variables=normal(3, seed=1), given=["u"], optimizer=SGD(learning_rate=0.1)),
        mlo.Level("u", objective=outer, variables=normal(3, seed=2), subject_to=["w"], steps=5,
                  optimizer=SGD(learning_rate=0.1)),
    ]  # fmt: skip
    graph = mlo.Graph(levels)
    graph.step(graph.init())
    assert len(seen) == 5


def test_what_is_noted_of_a_value_is_its_sum():
    graph = mlo.Graph(
        [
            mlo.Level(
                "w",
                objective=lambda values, batch: values["w"].square().sum(),
                variables=normal(3, seed=1),
                optimizer=SGD(learning_rate=0.1),
                steps=2,
            )
        ]
    )
    state = graph.init()
    inside = Iteration.of(plan_of(graph), state, {})
    inside.retake("w", ())
    noted = inside.finite.numbers()
    assert [(level, step, term) for level, step, term, _ in noted] == [
        ("w", 1, "the loss"),
        ("w", 2, "the loss"),
        ("w", 2, "the new value"),
    ]
    torch.testing.assert_close(noted[-1][3], 0.64 * state.values["w"].sum())
    assert [entry[:3] for entry in inside.finite.numbers()] == [entry[:3] for entry in noted]
