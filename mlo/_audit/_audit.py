"""The way in: a specification or a graph, at a fresh or a trained state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from rich.console import Console

from mlo import _random, _tree
from mlo._audit._level import Options, audit_below
from mlo._audit._report import Audit
from mlo._audit._scene import Scene
from mlo._errors import UserError
from mlo._graph import Graph, plan_of
from mlo._run._open import open_run
from mlo._run._progress import progress_line
from mlo._run._resumable import fitting
from mlo._run._run import fresh_state, source_of
from mlo._run._session import session
from mlo._run._start import CACHE
from mlo._structure import is_due
from mlo.hypergradient import AbstractHypergradient
from mlo.spec._build import Assembly, assemble

if TYPE_CHECKING:
    from mlo._state import State
    from mlo.spec import Spec

Which: TypeAlias = Literal["selected", "latest"]
DENSE = 2_000
"""Up to how many numbers of a level its Hessian is written out, unless told otherwise."""


def audit(
    subject: Spec | Graph,
    *,
    at: str | Path | None = None,
    which: Which = "selected",
    state: State | None = None,
    batches: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    methods: Sequence[AbstractHypergradient] = (),
    draws: int = 1,
    dense: int = DENSE,
    repeats: int = 3,
    cache: str | Path = CACHE,
    console: Console | None = None,
) -> Audit:
    """Hold every hypergradient method that applies against references, on the problem itself.

    For every upper level and every level it is subject to, the cotangent λ that arrives there, by the methods as they are
    set, is pulled back by each method in turn. Two references: the derivative of all steps as they were taken, and the
    implicit derivative −(∂²f/∂w∂u)ᵀ H⁻¹λ at the response, by the whole matrix where it is small and otherwise by
    minimising the residual over a Krylov space. Changes nothing.

    - `subject`: a specification, or a graph with `state` (default, a fresh one) and `batches`, as `Graph.step` takes them,
      or a list of these, one a draw.
    - `at`: a run folder whose checkpoint `which` is audited in place of a fresh state.
    - `methods`: rows beside the usual ones.
    - `draws`: of a specification: on the batches of so many due iterations, which gives means and spreads.
    - `dense`: up to how many numbers of a level its Hessian is written out.
    - `repeats`: how often a pullback is timed, at most.
    - `cache`: where the runs that levels start from are kept.
    - `console`: where it is told what is being done; nowhere if not given.

    Costs the products of all methods together, three to five times; a level with n numbers, n ≤ `dense`, 2n or more.
    Raises `UserError` for a state that does not fit and a graph without upper levels, `NumericalError` where a response is
    not finite. A method that fails is a row with its reason.
    """
    if draws < 1 or dense < 0 or repeats < 1:
        raise UserError(f"expected draws ≥ 1, dense ≥ 0 and repeats ≥ 1, got {draws}, {dense} and {repeats}")
    say = progress_line(console or Console(quiet=True))
    options = Options(methods=tuple(methods), dense=dense, repeats=repeats, say=say)
    if isinstance(subject, Graph):
        if at is not None:
            raise UserError("a run folder goes with a specification; a graph takes its `state`")
        return _of_graph(subject, state, batches, options)
    if state is not None or batches is not None:
        raise UserError("`state` and `batches` go with a graph; a specification takes `at` and `draws`")
    if at is not None:
        subject = _seeded(subject, Path(at))
    with session(subject.seed, subject.threads):
        assembly = assemble(subject)
        start, words = _state(assembly, at, which, Path(cache).absolute(), say, console)
        return _of_assembly(assembly, start, words, draws, options)


def _of_graph(
    graph: Graph, state: State | None, batches: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None, options: Options
) -> Audit:
    begin = state or graph.init()
    given = [batches] if batches is None or isinstance(batches, Mapping) else list(batches)
    plan = plan_of(graph)

    def scenes(upper: str) -> Iterator[Scene]:
        for each in given:
            yield Scene.of(plan, upper, begin, each or {})

    words = "fresh" if state is None else f"given, after iteration {begin.iteration:,}"
    return _audited("graph", graph, begin, words, scenes, len(given), options)


def _of_assembly(assembly: Assembly, start: State, words: str, draws: int, options: Options) -> Audit:
    graph, source = assembly.graph, source_of(assembly)
    plan = plan_of(graph)

    def scenes(upper: str) -> Iterator[Scene]:
        level = graph.levels[upper]
        for iteration in islice((t for t in count(start.iteration + 1) if is_due(level, t)), draws):
            below = plan.differentiated(upper)
            due = {name for name, each in graph.levels.items() if is_due(each, iteration)}
            moving = {name for name in due if name in below or name in plan.nested or not plan.differentiated(name)}
            if upper in plan.nested:  # it is differentiated where it stood
                moving = None
            begin = replace(start, iteration=iteration - 1)
            yield Scene.of(plan, upper, begin, source.batches(graph.levels, iteration), moving)

    return _audited(assembly.spec.name, graph, start, words, scenes, draws, options)


def _audited(
    name: str,
    graph: Graph,
    state: State,
    words: str,
    scenes: Callable[[str], Iterator[Scene]],
    draws: int,
    options: Options,
) -> Audit:
    plan = plan_of(graph)
    uppers = [upper for upper in reversed(graph.order) if plan.differentiated(upper) and not graph.levels[upper].frozen]
    if not uppers:
        raise UserError(f"{name}: no level is subject to another, so there is no hypergradient to audit")
    some = _tree.leaves(state.values[plan.differentiated(uppers[0])[0]])[0]
    with _random.Preserved(), torch.no_grad():
        levels = [each for upper in uppers for each in audit_below(scenes(upper), options)]
    return Audit(
        name=name,
        state=words,
        seed=state.seed,
        device=str(some.device),
        dtype=str(some.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        draws=draws,
        repeats=options.repeats,
        levels=tuple(levels),
    )


def _seeded(spec: Spec, folder: Path) -> Spec:
    """`spec` with the seed of the run, which decides what it was trained on."""
    seed = open_run(folder).spec.seed
    return spec if spec.seed == seed else spec.replaced(f"seed={seed}")


def _state(
    assembly: Assembly,
    at: str | Path | None,
    which: Which,
    cache: Path,
    say: Callable[[str], None],
    console: Console | None,
) -> tuple[State, str]:
    """The state that is audited, and which that is."""
    spec = assembly.spec
    for notice in assembly.notices:
        say(f"notice: {notice}")
    if at is None:
        return fresh_state(assembly, cache, console or Console(quiet=True)), "fresh"
    run = open_run(at)
    path = run.folder / "checkpoint" / f"{which}.json"
    found = run.state(which, device=spec.device)
    declared = assembly.graph.init(seed=spec.seed)
    fitting(declared, found, path, because="it was run with other levels, data or optimizers")
    different = [key for key in type(spec).model_fields if getattr(spec, key) != getattr(run.spec, key)]
    if changed := [key for key in different if key not in ("name", "checkpoint", "device", "threads")]:
        say(f"notice: {run.folder} was run with other {', '.join(changed)}")
    return found, f"{which} of {run.folder}, after iteration {found.iteration:,}"
