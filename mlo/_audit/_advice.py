"""What an audit has to say in words, with numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from mlo._audit._methods import damping_of
from mlo.hypergradient import FiniteDifference, Implicit, Neumann

if TYPE_CHECKING:
    from mlo._audit._report import LevelAudit, Row, Spectrum
    from mlo.hypergradient import AbstractHypergradient

GOOD = 0.99
"""A cosine from which a direction is called right."""

CLOSE = 0.1
"""A relative error within which a single number is called right."""

SOLVED = 0.01
"""Of the upper loss: a level whose solution would change it by less counts as solved."""

_SHORT = 0.1
"""α(K + 1)λ_max below which a series is called first order."""

_GROWN = 1.1
"""How much the last term of a series may exceed its first before that is worth a word."""

_PRODUCT = 2.5
"""Gradients' worth of one product, for saying which method is cheapest."""


def findings(level: LevelAudit, given: Mapping[str, AbstractHypergradient]) -> Iterator[str]:
    """What is to be known about the curvature and about the settings `given` by the user, by how they are written."""
    spectrum = level.spectrum
    if spectrum is not None:
        yield from _about(spectrum)
        for name, method in given.items():
            series = method.inverse if isinstance(method, Implicit) else method
            if isinstance(series, Neumann) and isinstance(series.step_size, float | int):
                yield from _about_series(name, series, series.step_size, level, spectrum)
    for name, method in given.items():
        if isinstance(method, FiniteDifference):
            yield from _about_differences(name, level)
    if level.reference is not None and not level.reference.converged:
        yield (
            f"the implicit reference is not converged: after {level.reference.products} products its residual is "
            f"{level.reference.residual:.1e}; read the columns held against it with that in mind"
        )


def _about(spectrum: Spectrum) -> Iterator[str]:
    low, high = spectrum.lambda_min, spectrum.lambda_max
    if not spectrum.converged:
        yield (
            f"λ_min and λ_max are not converged to {spectrum.tolerance:g} after {spectrum.products} products: an eigenvalue "
            f"lies within {spectrum.lambda_min_error:.1g} of λ_min and within {spectrum.lambda_max_error:.1g} of λ_max"
        )
    if spectrum.sign < 0:
        damping = damping_of(spectrum)
        yield (
            f"the Hessian is indefinite, λ_min = {low:.3g}: the response is no minimum, a Neumann series grows by "
            f"1 + α·{-low:.3g} a term along that direction, and conjugate gradients stop where they first meet it; "
            f"`damping: {damping:g}` makes it definite, with eigenvalues from {low + damping:.2g} to {high + damping:.3g}"
        )
    elif spectrum.sign == 0:
        yield (
            f"λ_min = {low:.1g} cannot be told from 0 (± {spectrum.lambda_min_error:.1g}): along such directions H⁻¹ has no "
            f"meaning; a `damping` of the size of the curvature that matters, below λ_max = {high:.3g}, bounds it"
        )


def _about_series(name: str, series: Neumann, alpha: float, level: LevelAudit, spectrum: Spectrum) -> Iterator[str]:
    most = spectrum.lambda_max + series.damping
    row = level.row(name)
    reach = alpha * (series.terms + 1) * most
    if alpha * most > 2:
        yield (
            f"{name} diverges: α·λ_max = {alpha:g} · {most:.3g} = {alpha * most:.3g} > 2, so its last term is "
            f"{(alpha * most - 1):.3g}^{series.terms} times its first along the steepest direction; "
            f"α = 1/λ_max = {1 / most:.2g} converges wherever H is positive definite"
        )
    elif reach < _SHORT:
        alike = "" if row.cosine_first_order is None else f" (cosine to first_order: {row.cosine_first_order:.6f})"
        yield (
            f"{name} is first order{alike}: α(J+1)λ_max = {alpha:g} · {series.terms + 1} · {most:.3g} = {reach:.2g} ≪ 1; "
            f"with J = {series.terms} it takes α near 1/λ_max = {1 / most:.2g} to see any curvature"
        )
    least = spectrum.lambda_min + series.damping
    if spectrum.sign < 0 and least < 0 and not alpha * most > 2:
        grown = (1 - alpha * least) ** series.terms
        if grown > _GROWN:
            yield f"{name} has a last term {grown:.3g} times its first along λ_min = {spectrum.lambda_min:.3g}"


def _about_differences(name: str, level: LevelAudit) -> Iterator[str]:
    """They are one step of unrolling up to O(radius²): where they are not, it is for kinks or for rounding."""
    cosine = level.row(name).cosine_unrolled
    if level.steps == 1 and cosine is not None and cosine < GOOD:
        yield (
            f"{name} has cosine {cosine:.3f} to `unroll`, which on a smooth objective it equals up to O(radius²): kinks of "
            "the objective lie within the radius, and a smaller one is then no better, or the differences drown in rounding"
        )


def advice(level: LevelAudit) -> str:
    """One sentence."""
    sides = {what: _sides(level, what) for what in ("unrolled", "implicit")}
    if not any(sides.values()):
        return "Nothing can be said: there is no reference, for the reasons above."
    stands = f"‖∂f/∂w‖ = {level.gradient_norm:.2g} at the response, {level.start_gradient_norm:.2g} before its steps"
    yours = _yours(level)
    if level.agreement is None or level.agreement_error is None:
        return f"With {stands}, {yours}; {_take(level, 'implicit' if sides['implicit'] else 'unrolled')}."
    solve = _take(level, "implicit")
    if _is_right(level, level.agreement, level.agreement_error):
        return f"What was computed and what a solution would give agree here ({stands}; {_apart(level)}): {yours}; {solve}."
    if is_solution(level):
        few = f"the {_steps(level.steps)} from there hold too little of its derivative"
        return f"The response is a solution ({stands}), and {few} ({_apart(level)}): {yours}; {solve}."
    follow = f"to follow the {_steps(level.steps)} taken, {_take(level, 'unrolled')}"
    apart = f"The response is not a solution ({stands}; {_apart(level)})"
    return f"{apart}: {yours}; {follow}; for the implicit derivative, {solve}."


def is_solution(level: LevelAudit) -> bool:
    """Whether the level is a minimum as far as the upper loss can tell."""
    if level.reference is None or level.spectrum is None or level.upper_loss is None:
        return False
    close = level.reference.gap <= SOLVED * abs(level.upper_loss)
    return level.spectrum.sign >= 0 and level.reference.converged and close


def _yours(level: LevelAudit) -> str:
    own = level.own
    if own.failure is not None:
        return f"your {own.method} fails here"
    columns = {
        "unrolled": (own.cosine_unrolled, own.error_unrolled),
        "implicit": (own.cosine_implicit, own.error_implicit),
    }
    told = [
        f"{_closeness(level, cosine, error)} to the {what} derivative"
        for what, (cosine, error) in columns.items()
        if cosine is not None and error is not None
    ]
    return f"your {own.method} has {' and '.join(told)}" if told else f"your {own.method} gives zero"


def _apart(level: LevelAudit) -> str:
    assert level.agreement is not None
    assert level.agreement_error is not None
    return (
        f"the unrolled derivative has {_closeness(level, level.agreement, level.agreement_error)} to the implicit one"
    )


def _closeness(level: LevelAudit, cosine: float, error: float) -> str:
    return f"error {error:.1e}" if _is_scalar(level) else f"cosine {cosine:.3f}"


def _is_scalar(level: LevelAudit) -> bool:
    """Whether a single number is pulled back to: then a cosine tells the sign alone."""
    return sum(level.reads.values()) == 1


def _is_right(level: LevelAudit, cosine: float, error: float) -> bool:
    return error <= CLOSE if _is_scalar(level) else cosine >= GOOD


def _sides(level: LevelAudit, what: str) -> list[tuple[Row, float, float]]:
    """The rows that can be held against a reference, with their cosine and error."""
    found: list[tuple[Row, float, float]] = []
    for row in level.rows:
        cosine = row.cosine_unrolled if what == "unrolled" else row.cosine_implicit
        error = row.error_unrolled if what == "unrolled" else row.error_implicit
        if cosine is not None and error is not None:
            found.append((row, cosine, error))
    return found


def _take(level: LevelAudit, what: str) -> str:
    """The cheapest method that is right, or the nearest one."""
    sides = _sides(level, what)
    mark = f"within {CLOSE:g}" if _is_scalar(level) else f"above {GOOD:g}"
    right = [side for side in sides if _is_right(level, *side[1:])]
    if right:
        row, cosine, error = min(right, key=lambda side: _cost(side[0]))
        if any(each.own for each, *_ in right) and _cost(level.own) <= _cost(row):
            return f"yours is the cheapest {mark}"
        return f"the cheapest {mark} is {row.method} ({_closeness(level, cosine, error)}, {_price(row)})"
    nearest = (lambda side: -side[2]) if _is_scalar(level) else (lambda side: side[1])
    row, cosine, error = max(sides, key=nearest)
    reached = _closeness(level, cosine, error)
    return f"nothing here comes {mark}, and {row.method} comes nearest ({reached}, {_price(row)})"


def _cost(row: Row) -> float:
    return (row.gradients or 0.0) + _PRODUCT * (row.products or 0.0)


def _price(row: Row) -> str:
    counts = {"gradient": row.gradients or 0.0, "product": row.products or 0.0}
    told = [f"{count:,.0f} {what}{'' if count == 1 else 's'}" for what, count in counts.items() if count]
    return " and ".join(told) or "no passes"


def _steps(count: int) -> str:
    return "step" if count == 1 else f"{count:,} steps"
