"""Settings that are known to be meaningless, recognised by what methods report of their pullbacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

CHUNKS = 1e-3
"""Of `chunk_difference`: in float32 rounding is below it, where gradients of chunks do not cancel to a thousandth."""

FIRST_ORDER = 0.1
"""Of step_size · (terms + 1) · λ_max: below it a series differs from step_size · (terms + 1) · λ by 5 % at most."""


def warnings(entry: Mapping[str, Any], iteration: int) -> Iterator[tuple[str, str, str]]:
    """Of the metrics of an iteration: the level that is pulled back, the kind of the warning, and the warning.

    They go by the numbers that a method reports (`Metrics.reports`), whichever method it is.
    """
    for upper, reports in entry.get("reports", {}).items():
        for level, report in reports.items():
            for kind, text in _found(report):
                where = f"iteration {iteration}, pulling '{level}' back for '{upper}'"
                yield level, kind, f"{where}: {text}"


def _found(report: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    residual, largest = report.get("residual"), report.get("lambda_max")
    size, terms = report.get("step_size"), report.get("terms")
    negative = report.get("negative_curvature", 0) > 0
    diverges = False
    if (difference := report.get("chunk_difference", 0.0)) > CHUNKS:
        yield (
            "chunks",
            f"the gradient summed over chunks of the batch differs from that of the whole by {difference:.2g} of its size: "
            "batch statistics (BatchNorm in training mode) and noise drawn inside the objective are those of a chunk; an "
            "objective without them is no mean over samples, and must not be divided",
        )
    if largest is not None and size is not None and terms is not None:
        diverges = size * largest > 2
        if diverges:
            yield (
                "diverges",
                f"step_size · λ_max is {size * largest:.3g}, above 2 (λ_max at least {largest:.3g}): the series diverges; "
                f"choose step_size: auto, or one below {1 / largest:.2g}",
            )
        elif (reach := size * (terms + 1) * largest) < FIRST_ORDER:
            yield (
                "first_order",
                f"step_size · (terms + 1) · λ_max is {reach:.3g}, far below 1 (λ_max about {largest:.3g} where the "
                "cotangent points): the series is first order, and its products change next to nothing; choose "
                "step_size: auto, or first_order",
            )
    if negative:
        least = report.get("lambda_min")
        found = "" if least is None else f" (curvature {least:.3g} along a direction it went)"
        left = "" if residual is None else f"; the residual is {residual:.3g}"
        yield (
            "negative_curvature",
            f"the Hessian is indefinite{found}, and the method needs it positive{left}; `damping` above its negative "
            "curvature helps",
        )
    if residual is not None and residual > 1 and not diverges and not negative and terms is not None:
        yield (
            "grows",
            f"the series grows: its residual is {residual:.3g} after {terms:.0f} terms, so that step_size is too large or "
            "the Hessian indefinite",
        )
