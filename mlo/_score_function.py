"""A loss that depends on a discrete choice, differentiated in the probabilities of the choice."""

from __future__ import annotations

import torch
from torch import Tensor

from mlo._errors import UserError


def score_function(loss: Tensor, log_probability: Tensor, *, baseline: Tensor | float = 0.0) -> Tensor:
    r"""`loss`, with the derivatives of its expectation over the choice that was made (Foerster et al. 2018, DiCE, Eq. 5).

    For a choice k ~ p(u) and a loss L(k, u), with log p = log p(k, u) and stop(·) held constant,

        □ L + (1 − □) b,    □ = exp(log p − stop(log p)) = 1

    has the value L exactly, and its derivatives of every order are unbiased: E[∇ⁿ(□ L + (1 − □) b)] = ∇ⁿ E[L]. The first is
    ∇L + (L − b) ∇log p (Williams 1992, REINFORCE). Draw the choice with `values.once`, from probabilities of any origin:

        k = values.once("k", lambda: torch.multinomial(p, 1))[0]
        loss = mlo.score_function(losses[k], p.log()[k])

    A level's own step is the same with and without, where the probabilities do not depend on its own variables. Through its
    response, (∂²f/∂w∂u)ᵀ q is unbiased for q and w that do not depend on the choice themselves.

    - `loss`: L, of any shape.
    - `log_probability`: log p of all the choices that an entry of `loss` depends on, so that choices made one after another
      are summed; shaped like `loss`, or zero-dimensional, for all entries. Finite, as it is for what can be drawn.
    - `baseline`: b, a number, or a tensor shaped like `loss`, which must not depend on the choice; it takes variance out of
      (L − b) ∇log p. It may depend on variables, for the derivatives of (1 − □) b have mean zero then too, and
      only then does it touch (∂²f/∂w∂u)ᵀ q. Of losses L_m of M independent choices, (Σ L − L_m)/(M − 1) is one.

    Raises `UserError` for shapes that do not fit. Cost: none to speak of.
    """
    if log_probability.shape not in ((), loss.shape):
        raise UserError(_misfit("log_probability", log_probability, loss))
    if isinstance(baseline, Tensor) and baseline.shape not in ((), loss.shape):
        raise UserError(_misfit("baseline", baseline, loss))
    weight = torch.exp(log_probability - log_probability.detach())
    return weight * loss + (1 - weight) * baseline


def _misfit(name: str, found: Tensor, loss: Tensor) -> str:
    expected = (
        f"expected one number or the shape of the loss, {tuple(loss.shape)}" if loss.dim() else "expected one number"
    )
    return f"score_function: {name} has shape {tuple(found.shape)}; {expected}"
