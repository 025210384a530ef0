"""From a specification to a graph and its problem: the stage that knows the problem, and so imports torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final

from torch import nn

from mlo import _random, _structure
from mlo._backend import EAGER, NO_COMPILER
from mlo._errors import GraphError, UserError
from mlo._graph import Graph, free, misfits, numbers_of, objections, unfit
from mlo._level import Level
from mlo._problem import Context, Problem
from mlo.hypergradient import Unroll
from mlo.spec._bind import bound, objective_of, refused, under_autocast
from mlo.spec._durations import Durations, stream_names
from mlo.spec._faults import Fault, unknown
from mlo.spec._instance import context_of, device_faults, problem_of
from mlo.spec._levels import LevelSpec
from mlo.spec._registry import hypergradient_of, optimizer_of
from mlo.stream import AbstractStream, Iterated

if TYPE_CHECKING:
    from mlo.spec._models import Spec


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Assembly:
    """All a run needs, built from a specification.

    - `iterations`, `evaluate_every`, `checkpoint_every`: durations in iterations; None where nothing is evaluated before
      the end. `pictures_at`: iterations after which pictures are made.
    - `streams`: by name; `batches`: which of them make up each level's batch.
    - `notices`: what a user should know before the run begins.
    """

    spec: Spec
    graph: Graph
    problem: Problem
    iterations: int
    evaluate_every: int | None
    checkpoint_every: int
    pictures_at: frozenset[int]
    streams: Mapping[str, AbstractStream]
    batches: Mapping[str, str | tuple[str, ...] | None]
    notices: tuple[str, ...]


def assemble(spec: Spec) -> Assembly:
    """Build the problem and the graph that `spec` describes. Raises `SpecError` with every mistake of this stage."""
    context = context_of(spec)
    spec.fail(device_faults(context.device))
    problem = problem_of(spec, context)
    if spec.dtype == "bfloat16":
        cast = {name: under_autocast(each, context.device.type) for name, each in problem.objectives.items()}
        problem = replace(problem, objectives=cast)
    streams = {
        name: stream if isinstance(stream, AbstractStream) else Iterated(stream)
        for name, stream in problem.streams.items()
    }
    faults: list[Fault] = []
    durations = Durations(spec, streams, faults)
    levels = [_level(level, problem, streams, context, durations, faults) for level in spec.levels.values()]
    iterations = durations.iterations()
    evaluate_every = durations.evaluate_every()
    checkpoint_every = durations.checkpoint_every() or max(1, iterations // 10)
    pictures_at = durations.pictures_at()
    faults += _evaluation_faults(spec, problem)
    if not faults:
        declared = [level for level in levels if level is not None]
        mistakes = _structure.mistakes(declared) or objections(
            {level.name: level for level in declared}, compiling=bool(spec.compile)
        )
        faults += [Fault(("levels", mistake.level, mistake.key), mistake.message) for mistake in mistakes]
        for name, path, message in misfits({level.name: level for level in declared}):
            chosen = spec.levels[name].optimizer
            here = ("levels", name, "optimizer", chosen.name if chosen else "")
            faults.append(Fault((*here, *path), f"{message}."))
    spec.fail(faults)
    graph = Graph((level for level in levels if level is not None), compile=spec.compile)
    remembering = [name for name, stream in streams.items() if isinstance(stream, Iterated)]
    used = {name for level in spec.levels.values() for name in stream_names(level)}
    notices = tuple(
        f"stream '{name}' is a plain iterable: a resumed run will not see the batches an uninterrupted one does"
        for name in remembering
        if name in used
    )
    notices += tuple(
        f"evaluation.pictures_at: there is no iteration {at}, for the run ends at {iterations}"
        for at in sorted(pictures_at)
        if at > iterations
    )
    if graph.compiles_with == EAGER:
        notices += (NO_COMPILER,)
    return Assembly(
        spec=spec,
        graph=graph,
        problem=problem,
        iterations=iterations,
        evaluate_every=evaluate_every,
        checkpoint_every=checkpoint_every,
        pictures_at=pictures_at,
        streams=streams,
        batches={name: level.batch for name, level in spec.levels.items()},
        notices=notices,
    )


def _level(
    level: LevelSpec,
    problem: Problem,
    streams: Mapping[str, AbstractStream],
    context: Context,
    durations: Durations,
    faults: list[Fault],
) -> Level | None:
    """The level, or None after adding to `faults`."""
    before = len(faults)
    here = ("levels", level.name)
    variables = bound(problem.variables, level, "variables", faults)
    objective = objective_of(problem, level, durations, faults) if level.objective else None
    optimizer = durations.resolve(optimizer_of(level.optimizer), level, "optimizer")
    for position, name in enumerate(stream_names(level)):
        if name not in streams:
            path = (*here, "batch") if isinstance(level.batch, str) else (*here, "batch", position)
            faults.append(Fault(path, unknown("stream", name, streams)))
    every, warm_up = durations.of(level, "every"), durations.of(level, "warm_up")
    if len(faults) > before or variables is None:
        return None
    try:
        with _random.Preserved():
            _random.reseed(_random.key(context.seed, "variables", level.name))
            made = variables()
    except (ValueError, UserError) as error:  # what a builder says of its own options
        faults.append(refused(error, variables, level))
        return None
    made = _placed(made, context)
    _freeze(made, level, faults)
    found = Level(
        level.name,
        variables=made,
        objective=objective,
        given=level.given,
        subject_to=level.subject_to,
        against=level.against,
        constraints=level.constraints,
        optimizer=optimizer,
        steps=level.steps,
        every=every,
        warm_up=warm_up,
        lookahead=level.lookahead,
        hypergradient=hypergradient_of(level.hypergradient) or Unroll(),
        nested=level.nested,
    )
    groups = ("optimizer", level.optimizer.name, "groups") if level.optimizer else ()
    for key, pattern, message in unfit(found):
        faults.append(Fault((*here, *(groups if key == "optimizer" else (key,)), pattern), message, on_key=True))
    try:
        free(found, numbers_of(level.name, made)[0])
    except GraphError as error:
        faults += [Fault((*here, mistake.key), mistake.message) for mistake in error.mistakes]
    return found


def _placed(variables: Any, context: Context) -> Any:
    """`variables` on the device and in the floating-point format of the run."""
    if isinstance(variables, nn.Module):
        return variables.to(device=context.device, dtype=context.dtype)
    if isinstance(variables, Mapping):
        return {name: tensor.to(device=context.device, dtype=context.dtype) for name, tensor in variables.items()}
    return variables.to(device=context.device, dtype=context.dtype)


def _freeze(variables: Any, level: LevelSpec, faults: list[Fault]) -> None:
    """Let the parts of a module that `freeze` names, and everything below them, count as buffers."""
    named = dict(variables.named_parameters()) if isinstance(variables, nn.Module) else {}
    for position, part in enumerate(level.freeze):
        inside = [name for name in named if name == part or name.startswith(f"{part}.")]
        if not inside:
            parts = {".".join(name.split(".")[:depth]) for name in named for depth in range(1, name.count(".") + 2)}
            path = ("levels", level.name, "freeze", position)
            faults.append(Fault(path, unknown("part", part, parts)))
        for name in inside:
            named[name].requires_grad_(False)


def _evaluation_faults(spec: Spec, problem: Problem) -> Iterator[Fault]:
    if spec.evaluation is None:
        return
    if problem.evaluate is None:
        yield Fault(("evaluation",), f"problem '{spec.problem}' has nothing to evaluate with.", True)
    for position, name in enumerate(spec.evaluation.model or ()):
        if name not in spec.levels:
            yield Fault(("evaluation", "model", position), unknown("level", name, spec.levels))
