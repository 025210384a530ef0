"""Every level below one upper level, on one or several draws."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final

from mlo import _tree
from mlo._audit._advice import advice, findings
from mlo._audit._curvature import Curvature
from mlo._audit._measure import measured
from mlo._audit._methods import Circumstances, tried, written
from mlo._audit._reference import References, implicit_objection
from mlo._audit._report import NUMBERS, LevelAudit, Reference, Row, Spectrum
from mlo._audit._scene import Scene, brief
from mlo._audit._vectors import cosine, relative_error

if TYPE_CHECKING:
    from mlo._types import Tree
    from mlo.hypergradient import AbstractHypergradient


@final
@dataclass(frozen=True, kw_only=True)
class Options:
    """How an audit is made.

    - `methods`: what the user wants to see beside the usual rows.
    - `dense`: up to how many numbers of a level its Hessian is written out.
    - `repeats`: how often a pullback is timed, at most.
    - `say`: told what is being done.
    """

    methods: Sequence[AbstractHypergradient]
    dense: int
    repeats: int
    say: Callable[[str], None]


@final
@dataclass(frozen=True, kw_only=True)
class _Draw:
    """What one draw has shown of one level."""

    facts: Mapping[str, float | None]
    reads: Mapping[str, int]
    spectrum: Spectrum | None
    reference: Reference | None
    missing: tuple[str, ...]
    numbers: Mapping[str, Mapping[str, float | None] | str]


def audit_below(scenes: Iterable[Scene], options: Options) -> list[LevelAudit]:
    """The levels below an upper level in the order in which cotangents reach them; a scene for each draw."""
    draws: dict[str, list[_Draw]] = {}
    tables: dict[str, dict[str, AbstractHypergradient | str]] = {}
    failures: dict[str, str] = {}
    last: Scene | None = None
    iterations: list[int] = []
    for scene in scenes:
        last = scene
        iterations.append(scene.inside.number)
        for name in reversed(list(scene.responses)):
            cotangent = scene.cotangents.get(name)
            reason = _unfit(cotangent, scene)
            if cotangent is None or reason is not None:
                failures[name] = reason or "no cotangent arrives"
                continue
            options.say(f"audit: {name} below {scene.upper}, iteration {scene.inside.number}")
            draws.setdefault(name, []).append(_drawn(scene, name, cotangent, options, tables))
    assert last is not None, "at least one draw"
    return [
        _put_together(last, name, iterations, draws.get(name, []), failures.get(name), tables.get(name, {}), options)
        for name in reversed(list(last.responses))
    ]


def _unfit(cotangent: Tree | None, scene: Scene) -> str | None:
    if cotangent is None:
        return f"no cotangent arrives: {scene.failure or 'a level above it passes nothing on'}"
    length = _tree.norm(cotangent)
    if not bool(length.isfinite()):
        return "the cotangent that arrives is not finite"
    return "the cotangent that arrives is zero" if not length else None


def _drawn(
    scene: Scene,
    name: str,
    cotangent: Tree,
    options: Options,
    tables: dict[str, dict[str, AbstractHypergradient | str]],
) -> _Draw:
    level = scene.level(name)
    missing: list[str] = []
    facts: dict[str, float | None] = {"cotangent_norm": _tree.norm(cotangent).item()}
    facts["upper_loss"] = scene.loss
    if scene.parts is not None:
        facts["direct_norm"] = _tree.norm(scene.parts.direct).item()
        facts["total_norm"] = _tree.norm(scene.parts.total).item()
    curvature: Curvature | None = None
    try:
        at = scene.linearised(name)
        facts["gradient_norm"] = _tree.norm(at.gradient).item()
        facts["start_gradient_norm"] = _tree.norm(scene.linearised_at_start(name).gradient).item()
        if implicit_objection(scene, name) is None:
            curvature = Curvature.of(at, dense=options.dense, seed=scene.inside.begin.seed)
    except Exception as error:
        missing.append(f"the curvature is not known: {brief(error)}")
    references = References.of(scene, name, cotangent, curvature)
    facts["agreement"] = cosine(references.unrolled, references.implicit)
    if references.unrolled is not None:
        facts["agreement_error"] = relative_error(references.unrolled, references.implicit)
    spectrum = curvature.spectrum if curvature else None
    if name not in tables:  # settings that follow from the first draw's spectrum are kept for the others
        at_hand = Circumstances(size=_tree.size(cotangent), dense=options.dense, spectrum=spectrum)
        own = {written(method): method for method in (level.hypergradient, *options.methods)}
        tables[name] = {**own, **{key: each for key, each in tried(at_hand) if key not in own}}
    gc.collect()  # what is left over would be freed while memory is counted
    numbers = {
        key: method
        if isinstance(method, str)
        else measured(scene, name, method, cotangent, references, curvature, repeats=options.repeats)
        for key, method in tables[name].items()
    }
    return _Draw(
        facts=facts,
        reads={read: len(vector) for read, vector in (references.unrolled or references.implicit or {}).items()},
        spectrum=spectrum,
        reference=references.solve,
        missing=(*missing, *references.missing),
        numbers=numbers,
    )


def _put_together(
    scene: Scene,
    name: str,
    iterations: Sequence[int],
    draws: Sequence[_Draw],
    failure: str | None,
    table: Mapping[str, AbstractHypergradient | str],
    options: Options,
) -> LevelAudit:
    level = scene.level(name)
    own = written(level.hypergradient)
    common: dict[str, Any] = {
        "upper": scene.upper,
        "level": name,
        "size": scene.responses[name].size,
        "optimizer": written(level.optimizer),
        "steps": level.steps,
        "iterations": tuple(iterations),
    }
    if not draws:
        return LevelAudit(**common, failure=failure)
    facts: dict[str, Any] = {fact: _mean([draw.facts.get(fact) for draw in draws]) for fact in draws[0].facts}
    found = LevelAudit(
        **common,
        **facts,
        reads=draws[0].reads,
        spectrum=draws[0].spectrum,
        reference=draws[0].reference,
        rows=tuple(_row(key, key == own, [draw.numbers[key] for draw in draws]) for key in table),
    )
    given = {written(method): method for method in (level.hypergradient, *options.methods)}
    missing = dict.fromkeys(each for draw in draws for each in draw.missing)
    if failure is not None:
        missing[f"on {len(iterations) - len(draws)} of {len(iterations)} draws: {failure}"] = None
    found = replace(found, findings=(*missing, *findings(found, given)))
    return replace(found, advice=advice(found))


def _row(method: str, own: bool, numbers: Sequence[Mapping[str, float | None] | str]) -> Row:
    counted = [each for each in numbers if not isinstance(each, str)]
    failures = [each for each in numbers if isinstance(each, str)]
    if failures:
        often = "" if len(numbers) == 1 or not counted else f" (on {len(failures)} of {len(numbers)} draws)"
        return Row(method=method, own=own, failure=f"{failures[0]}{often}")
    columns = {key: [each[key] for each in counted] for key in NUMBERS}
    spread = {key: statistics.stdev(known) for key, column in columns.items() if len(known := _known(column)) > 1}
    means: dict[str, Any] = {key: _mean(column) for key, column in columns.items()}
    return Row(method=method, own=own, **means, spread=spread if len(counted) > 1 else None)


def _known(column: Sequence[float | None]) -> list[float]:
    return [number for number in column if number is not None]


def _mean(column: Sequence[float | None]) -> float | None:
    known = _known(column)
    return statistics.fmean(known) if known else None
