"""Invert the Hessian by a geometric series."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Literal, final

from mlo import _tree
from mlo.hypergradient._abstract import AbstractLinearisation
from mlo.hypergradient._implicit import AbstractInverse
from mlo.hypergradient._iterative import check_chunks

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._types import Tree

SAFETY = 0.8
"""α · λ̂ where α is chosen: the series converges as long as the estimate λ̂ is above 0.4 λ_max."""

_DIRECTION = "direction"


@final
@dataclass(frozen=True, kw_only=True)
class Neumann(AbstractInverse):
    r"""A truncated Neumann series (Lorraine et al. 2020, Alg. 3; MADAO, Eqs. 5–7).

    For the Hessian H of a level's objective and a cotangent λ on its response,

        q = α Σ_{k=0..K} (I − αH)ᵏ λ  →  H⁻¹λ.

    Needs H ≻ 0 and 0 < α < 2/λ_max; an indefinite Hessian diverges along its negative curvature. If H ⪰ μI and
    α ≤ 1/λ_max: ‖q − H⁻¹λ‖ ≤ (1 − αμ)^{K+1} ‖H⁻¹λ‖. Where α(K+1)λ_max ≪ 1 it is first order. Costs K Hessian products;
    memory does not grow with K.

    With α "auto", α = 0.8/λ̂ for an estimate λ̂ ≤ λ_max by power iterations, v ← Hv/‖Hv‖ and λ̂ = ‖Hv‖ for ‖v‖ = 1 (λ_max is
    the largest |eigenvalue| here). `power_iterations` of them from a random v make the first one; later ones take one more
    from the v that the last iteration of the graph has left in `State.memory`. Each costs a Hessian product, with K = 0 too.
    The series converges where λ̂ > 0.4 λ_max. α does not depend on λ, so that the pullback stays linear.

    It reports, of H + δI: `residual`, ‖λ − Hq'‖/‖λ‖ of the series q' without its last term, above 1 where the series grows;
    `step_size` and `terms`, α and K as they were used; and from the first and the last product of the series and the last
    power iteration, Ht each, `lambda_max`, the largest ‖Ht‖/‖t‖, `lambda_min`, the least tᵀHt/tᵀt, and `negative_curvature`,
    1 where that is below 0. They lie within the spectrum; `lambda_max` is close to its end with "auto" and where the series
    diverges. No product is made for them: with K = 0 and a given α they are absent, but for `measure_curvature`.

    - `terms`: K, the number of terms after the identity, so K + 1 in all. K = 0 is `FirstOrder(scale=step_size)`.
    - `step_size`: α, in units of 1/curvature, or auto.
    - `damping`: δ ≥ 0, inverts H + δI.
    - `tolerance`: stop where the residual is at most this; by default all terms are summed. With one, the pullback is linear
      in λ only as far as that, and the predicted products are an upper bound, as they are with auto.
    - `power_iterations`: how many the first estimate of λ_max takes.
    - `measure_curvature`: make them with a given α too, for `lambda_max` alone, and as many products more.
    - `chunks`: in how many parts of the batch products are taken; see `Implicit`.
    - `compare`: `first_order` reports the cosine with what `first_order` pulls back, for one more cross product.
    """

    terms: int
    step_size: float | Literal["auto"]
    damping: float = 0.0
    tolerance: float | None = None
    power_iterations: int = 8
    measure_curvature: bool = False
    chunks: int = 1
    compare: Literal["first_order"] | None = None

    def __post_init__(self) -> None:
        if self.terms < 0:
            raise ValueError(f"terms must be at least 0, got {self.terms}")
        if isinstance(self.step_size, str):
            if self.step_size != "auto":
                raise ValueError(f"step_size must be a positive number or 'auto', got {self.step_size!r}")
        elif not self.step_size > 0:
            raise ValueError(f"step_size must be positive, got {self.step_size}")
        if not self.damping >= 0:
            raise ValueError(f"damping must be at least 0, got {self.damping}")
        if self.tolerance is not None and not self.tolerance >= 0:
            raise ValueError(f"tolerance must be at least 0, got {self.tolerance}")
        if self.power_iterations < 1:
            raise ValueError(f"power_iterations must be at least 1, got {self.power_iterations}")
        check_chunks(self.chunks)

    @property
    def may_stop(self) -> bool:
        """See `AbstractHypergradient`."""
        return self.tolerance is not None or self._looks_for_curvature

    def products(self, size: int) -> int:
        """K, and the power iterations of a first estimate, fewer later: an upper bound, as it is with a tolerance."""
        return self.terms + (self.power_iterations if self._looks_for_curvature else 0)

    def solve(self, at: AbstractLinearisation, cotangent: Tree) -> Tree:
        """See the class. Stopping is a mask, so that it works under `vmap`; where it can be looked at, work stops too."""
        length, looks = _tree.norm(cotangent), list[_Look]()
        rate = self._rate(at, length, looks)
        term = series = cotangent
        size = length
        used: Tensor = length.new_zeros(())
        for index in range(self.terms):
            step, going = rate, 1.0
            if self.tolerance is not None:
                unsolved = size > self.tolerance * length
                if at.is_false(unsolved):
                    break
                going = unsolved.to(size.dtype)
                step = rate * going
            image = self._image(at, term)
            if index in (0, self.terms - 1):
                known = index == 0 or self.tolerance is not None
                looks.append(_Look.of(term, image, size if known else _tree.norm(term)))
            term = _tree.add(term, image, scale=-step)
            series = _tree.add(series, term, scale=going)
            used = used + going
            if self.tolerance is not None or index == self.terms - 1:
                size = _tree.norm(term)
        at.report("residual", size / (length + (length == 0)))
        at.report("step_size", length.new_full((), rate) if isinstance(rate, (int, float)) else rate)
        at.report("terms", used)
        if looks:
            least = reduce(lambda one, two: one.minimum(two), [look.quotient for look in looks])
            at.report("lambda_max", reduce(lambda one, two: one.maximum(two), [look.size for look in looks]))
            at.report("lambda_min", least)
            at.report("negative_curvature", (least < 0).to(size.dtype))
        return _tree.scale(series, by=rate)

    def _rate(self, at: AbstractLinearisation, length: Tensor, looks: list[_Look]) -> float | Tensor:
        """α, and where λ_max is looked for, the last power iteration added to `looks`."""
        if not self._looks_for_curvature:
            return float(self.step_size)
        direction = at.recall(_DIRECTION)
        count = 1 if direction is not None else self.power_iterations
        direction = at.normal(0) if direction is None else direction
        look: _Look | None = None
        for _ in range(count):
            image = self._image(at, direction)
            look = _Look.of(direction, image, _tree.norm(direction))
            size = _tree.norm(image)
            flat = (size == 0).to(size.dtype)  # no curvature: the direction is as good as any
            direction = _tree.add(_tree.scale(image, by=1 / (size + flat)), direction, scale=flat)
        assert look is not None
        looks.append(look)
        at.remember(_DIRECTION, direction)
        if not isinstance(self.step_size, str):
            return float(self.step_size)
        return (SAFETY / look.size).where(length != 0, 0.0)  # λ = 0 gives 0, where H is zero too

    @property
    def _looks_for_curvature(self) -> bool:
        return self.measure_curvature or self.step_size == "auto"

    def _image(self, at: AbstractLinearisation, direction: Tree) -> Tree:
        image = at.hessian(direction)
        return _tree.add(image, direction, scale=self.damping) if self.damping else image


@final
@dataclass(frozen=True)
class _Look:
    """What one product shows of the curvature: ‖Ht‖/‖t‖ and tᵀHt/tᵀt, 0 for t = 0."""

    size: Tensor
    quotient: Tensor

    @classmethod
    def of(cls, direction: Tree, image: Tree, length: Tensor) -> _Look:
        """Of t = `direction` of that `length`, and Ht = `image`."""
        length = length + (length == 0)
        return cls(_tree.norm(image) / length, _tree.inner(direction, image) / length / length)
