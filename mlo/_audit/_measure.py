"""One method at one level, held against the references."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from mlo import _tree
from mlo._audit._memory import peak_of
from mlo._audit._scene import brief
from mlo._audit._vectors import cosine, flattened, is_finite, relative_error
from mlo.hypergradient import AbstractInverse, ExactCross, Implicit

if TYPE_CHECKING:
    from mlo._audit._curvature import Curvature
    from mlo._audit._reference import References
    from mlo._audit._scene import Scene
    from mlo._types import Tree, Upstream
    from mlo.hypergradient import AbstractCross, AbstractHypergradient, AbstractResponse

_PATIENCE = 1.0
"""Seconds of repeating one pullback after which it is timed no more."""


def measured(
    scene: Scene,
    level: str,
    method: AbstractHypergradient,
    cotangent: Tree,
    references: References,
    curvature: Curvature | None,
    *,
    repeats: int,
) -> Mapping[str, float | None] | str:
    """The numbers of a `Row`, or why there are none."""
    optimizer = scene.level(level).optimizer
    assert optimizer is not None, "a constant has no response"
    objection = method.objection(optimizer)
    if objection is not None:
        return objection
    if method.is_joint and scene.level(level).against:
        return "it pulls the players of a game back together; rows are of one level at a time"
    device = _tree.leaves(cotangent)[0].device
    try:
        (found, q), peak = peak_of(lambda: _pulled(scene.respond_for(level, method), method, cotangent), device)
        response = scene.respond_for(level, method)
        tally = response.around.tally
        gradients, products = tally.gradients, tally.products
        first = _seconds(lambda: method.pullback(response, cotangent), device)
        gradients, products = tally.gradients - gradients, tally.products - products
        times = [first]
        while len(times) < repeats and sum(times) < _PATIENCE:
            times.append(_seconds(lambda: method.pullback(response, cotangent), device))
        vectors = flattened(found)
        residual = curvature.residual(q, cotangent) if q is not None and curvature is not None else None
    except Exception as error:
        return brief(error)
    if not vectors:
        return "it finds that the response depends on nothing"
    if not is_finite(vectors):
        return "its pullback is not finite"
    return {
        "cosine_unrolled": cosine(vectors, references.unrolled),
        "error_unrolled": relative_error(vectors, references.unrolled),
        "cosine_implicit": cosine(vectors, references.implicit),
        "error_implicit": relative_error(vectors, references.implicit),
        "cosine_first_order": cosine(vectors, references.first_order),
        "residual": residual,
        "gradients": float(gradients),
        "products": float(products),
        "milliseconds": 1e3 * statistics.median(times),
        "peak_bytes": float(peak),
    }


def _pulled(response: AbstractResponse, method: AbstractHypergradient, cotangent: Tree) -> tuple[Upstream, Tree | None]:
    """The pullback, and the q that the method takes for H⁻¹λ if that is how it works."""
    pieces = _pieces(method)
    if pieces is None:
        return method.pullback(response, cotangent), None
    inverse, cross = pieces
    at = response.linearise()
    q = inverse.solve(at, cotangent)
    return {name: _tree.scale(part, by=-1.0) for name, part in cross.product(at, q).items()}, q


def _pieces(method: AbstractHypergradient) -> tuple[AbstractInverse, AbstractCross] | None:
    if isinstance(method, Implicit):
        return method.inverse, method.cross
    if isinstance(method, AbstractInverse) and type(method).pullback is AbstractInverse.pullback:
        return method, ExactCross()
    return None


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
