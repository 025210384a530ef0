"""What cannot be done is a row with its reason, never a crash."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import normal
from torch import Tensor

import mlo
from mlo.hypergradient import AbstractHypergradient, FiniteDifference, Neumann, Unroll
from mlo.optimizer import SGD, AbstractOptimizer, AdamW


class Refuse(torch.autograd.Function):
    """x ↦ x, whose derivative is an error."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        raise RuntimeError("derivative for aten::refuse is not implemented\nand more lines")


class Once(torch.autograd.Function):
    """x ↦ x², without a second derivative."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return Refuse.apply(2 * x * gradient)


REFUSED = "derivative for aten::refuse is not implemented"


def two(
    method: AbstractHypergradient,
    *,
    optimizer: AbstractOptimizer | None = None,
    square=torch.square,
    upper=lambda values: (values["w"] - 1).square().sum(),
) -> mlo.Graph:
    """w above u: f = Σ (w − u)² / 2, by `square`."""
    lower = mlo.Level(
        "w",
        objective=lambda values, batch: 0.5 * square(values["w"] - values["u"]).sum(),
        variables=normal(4, seed=0),
        given=("u",),
        optimizer=optimizer or SGD(learning_rate=0.3),
        steps=2,
        hypergradient=method,
    )
    top = mlo.Level(
        "u",
        objective=lambda values, batch: upper(values),
        variables=normal(4, seed=1),
        subject_to=("w",),
        optimizer=SGD(learning_rate=0.1),
    )
    return mlo.Graph([lower, top])


def test_an_operator_without_a_second_derivative_leaves_the_methods_that_need_none():
    (level,) = mlo.audit(two(FiniteDifference(), square=Once.apply), repeats=1).levels
    assert level.own.failure is None
    assert (level.own.gradients, level.own.products) == (2, 0)
    assert level.own.cosine_unrolled is None
    for method in ("first_order", "unroll", "exact", "conjugate_gradient {iterations: 10}"):
        assert level.row(method).failure == REFUSED
    assert level.row("neumann").failure == "λ_max is not known"
    assert any("the curvature is not known: " in finding for finding in level.findings)
    assert level.advice == "Nothing can be said: there is no reference, for the reasons above."


def test_where_the_levels_own_method_fails_the_others_are_still_audited():
    (level,) = mlo.audit(two(Unroll(last=1), square=Once.apply), repeats=1).levels
    assert level.own.failure == REFUSED
    assert level.row("finite_difference").failure is None
    assert level.cotangent_norm is not None
    assert level.total_norm is None


def test_a_pullback_that_finds_nothing_is_a_row():
    def cut(x: Tensor) -> Tensor:  # a gradient, and nothing behind it
        return Cut.apply(x)

    (level,) = mlo.audit(two(FiniteDifference(), square=cut), repeats=1).levels
    assert level.own.failure is None
    assert level.row("unroll").failure == "it finds that the response depends on nothing"


class Cut(torch.autograd.Function):
    """x ↦ x², whose gradient is a constant to autograd."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


def test_what_an_optimizer_rules_out_is_told():
    (level,) = mlo.audit(two(Unroll(), optimizer=AdamW(learning_rate=0.1)), repeats=1).levels
    assert "decoupled weight decay" in (level.row("first_order").failure or "")
    assert level.own.error_unrolled == pytest.approx(0.0, abs=1e-12)
    assert level.row("unroll {last: 1}").cosine_unrolled is not None
    assert level.spectrum is None
    assert any("no implicit reference: AdamW" in finding for finding in level.findings)
    assert "yours is the cheapest" in level.advice or "the cheapest above" in level.advice


def test_a_series_that_overflows_is_a_row():
    (level,) = mlo.audit(two(Unroll()), methods=[Neumann(terms=400, step_size=1e3)], repeats=1).levels
    assert level.row("neumann {terms: 400, step_size: 1000}").failure == "its pullback is not finite"
    assert any("diverges: α·λ_max = 1000 · 1 = 1e+03 > 2" in finding for finding in level.findings)


def test_a_cotangent_that_is_zero_is_said():
    (level,) = mlo.audit(two(Unroll(), upper=lambda values: 0 * values["w"].sum()), repeats=1).levels
    assert level.failure == "the cotangent that arrives is zero"
    assert level.rows == ()


def test_a_cotangent_that_is_not_finite_is_said():
    graph = two(Unroll(), upper=lambda values: (values["w"] * math.inf).sum())
    (level,) = mlo.audit(graph, repeats=1).levels
    assert level.failure == "the cotangent that arrives is not finite"


def test_a_loss_that_is_not_finite_stops_it():
    with pytest.raises(mlo.NumericalError, match="level 'w', step 1"):
        mlo.audit(two(Unroll(), square=lambda x: x * math.nan), repeats=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 0}, "got 0, 2000 and 3"),
        ({"repeats": 0}, "repeats ≥ 1"),
        ({"at": "runs/x"}, "a graph takes its `state`"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(mlo.UserError, match=message):
        mlo.audit(two(Unroll()), **options)


def test_a_graph_without_upper_levels_is_refused():
    alone = mlo.Level(
        "w",
        objective=lambda values, _: values["w"].square().sum(),
        variables=normal(2, seed=0),
        optimizer=SGD(learning_rate=1.0),
    )
    with pytest.raises(mlo.UserError, match="no level is subject to another"):
        mlo.audit(mlo.Graph([alone]))
