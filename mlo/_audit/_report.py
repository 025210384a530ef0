"""What an audit found, as frozen values."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, final


@final
@dataclass(frozen=True, kw_only=True)
class Row:
    """One method at one level. Numbers are means over the draws; None where there is none.

    - `method`: as YAML writes it; `own`: whether it is the level's own setting.
    - `cosine_unrolled`, `error_unrolled`: of its pullback to the derivative of all steps as they were taken; the error is
      ‖found − reference‖ / ‖reference‖.
    - `cosine_implicit`, `error_implicit`: to the implicit derivative at the response.
    - `cosine_first_order`: to `first_order`, q = λ: 1 where the method does no more than that.
    - `residual`: ‖λ − Hq‖/‖λ‖ of the q it takes for H⁻¹λ.
    - `gradients`, `products`: reverse passes of first and of second order of one pullback.
    - `milliseconds`: of one pullback, median; the steps themselves are not in it.
    - `peak_bytes`: of tensors, while the level takes its steps and is pulled back.
    - `failure`: why there are no numbers.
    - `spread`: standard deviations over the draws, by the name of the number; None with one draw.
    """

    method: str
    own: bool = False
    cosine_unrolled: float | None = None
    error_unrolled: float | None = None
    cosine_implicit: float | None = None
    error_implicit: float | None = None
    cosine_first_order: float | None = None
    residual: float | None = None
    gradients: float | None = None
    products: float | None = None
    milliseconds: float | None = None
    peak_bytes: float | None = None
    failure: str | None = None
    spread: Mapping[str, float] | None = None


NUMBERS = (
    "cosine_unrolled",
    "error_unrolled",
    "cosine_implicit",
    "error_implicit",
    "cosine_first_order",
    "residual",
    "gradients",
    "products",
    "milliseconds",
    "peak_bytes",
)
"""The fields of a `Row` that are numbers."""


@final
@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """The ends of the spectrum of H, the Hessian of what the level's optimizer minimises, at the response.

    - `lambda_min`, `lambda_max`, with the distance within which an eigenvalue lies, `…_error`.
    - `how`: `dense` or `lanczos`; `products`: what it took.
    - `tolerance`: what Lanczos' method was to reach, relative to the eigenvalue of largest size; `converged`: if it did.
    """

    lambda_min: float
    lambda_max: float
    lambda_min_error: float
    lambda_max_error: float
    how: str
    products: int
    tolerance: float
    converged: bool

    @property
    def sign(self) -> int:
        """1 where H ≻ 0, −1 where it is indefinite, 0 where λ_min cannot be told from zero."""
        if self.lambda_min > self.lambda_min_error:
            return 1
        return -1 if self.lambda_min < -self.lambda_min_error else 0


@final
@dataclass(frozen=True, kw_only=True)
class Reference:
    """The implicit derivative that rows are held against.

    - `how`: `dense` (the whole matrix, solved in float64) or `minres`; `products`: what it took.
    - `residual`: ‖λ − Hq‖/‖λ‖; `converged`: whether it is at most 1e-3.
    - `gap`: |qᵀ ∂f/∂w|, by how much the upper loss would change, to first order, if the level were solved.
    """

    how: str
    products: int
    residual: float
    converged: bool
    gap: float


@final
@dataclass(frozen=True, kw_only=True)
class LevelAudit:
    """One level below one upper level.

    - `upper`, `level`; `size`: how many numbers the level holds; `optimizer`, `steps`: how it responds.
    - `iterations`: whose batches were drawn, one a draw.
    - `gradient_norm`: ‖∂f/∂w‖ at the response, with the optimizer's weight decay: how far it is from being a solution.
    - `start_gradient_norm`: the same where its steps began.
    - `upper_loss`: the upper level's loss at the responses.
    - `cotangent_norm`: ‖λ‖ as it arrives there; `direct_norm`, `total_norm`: of the upper level's hypergradient.
    - `reads`: the levels that are pulled back to, with how many numbers each holds.
    - `agreement`, `agreement_error`: the cosine of the unrolled to the implicit derivative, and its relative error.
    - `spectrum`, `reference`: of the first draw; None where they cannot be had.
    - `rows`: one for each method; `findings`: what is to be said about settings and curvature; `advice`: what to do.
    - `failure`: why there are no rows.
    """

    upper: str
    level: str
    size: int
    optimizer: str
    steps: int
    iterations: tuple[int, ...]
    reads: Mapping[str, int] = field(default_factory=dict[str, int])
    gradient_norm: float | None = None
    start_gradient_norm: float | None = None
    upper_loss: float | None = None
    cotangent_norm: float | None = None
    direct_norm: float | None = None
    total_norm: float | None = None
    agreement: float | None = None
    agreement_error: float | None = None
    spectrum: Spectrum | None = None
    reference: Reference | None = None
    rows: tuple[Row, ...] = ()
    findings: tuple[str, ...] = ()
    advice: str = ""
    failure: str | None = None

    def row(self, method: str) -> Row:
        """The row of `method` as it is written there; raises KeyError."""
        for each in self.rows:
            if each.method == method:
                return each
        raise KeyError(method)

    @property
    def own(self) -> Row:
        """The row of the level's own setting."""
        return next(each for each in self.rows if each.own)


@final
@dataclass(frozen=True, kw_only=True)
class Audit:
    """What `mlo.audit` found.

    - `name`: of the graph; `state`: which state was audited, in words; `seed`, `device`, `dtype`, `threads`.
    - `draws`: on how many draws of the batches; `repeats`: how often a pullback was timed, at most.
    - `levels`: every level below every upper level, in the order in which cotangents reach them.
    """

    name: str
    state: str
    seed: int
    device: str
    dtype: str
    threads: int
    draws: int
    repeats: int
    levels: tuple[LevelAudit, ...]

    def level(self, level: str, upper: str | None = None) -> LevelAudit:
        """The audit of `level` below `upper`, or below the first upper level that has it; raises KeyError."""
        for each in self.levels:
            if each.level == level and upper in (None, each.upper):
                return each
        raise KeyError(level)

    def to_json(self) -> str:
        """All of it as JSON; what is not finite is null."""
        return json.dumps(_plain(asdict(self)), indent=2, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
