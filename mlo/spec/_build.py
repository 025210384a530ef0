"""From a specification to a graph and its problem: the stage that knows the problem, and so imports torch."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast, final

import torch
from torch import nn

from mlo import _random, _structure
from mlo._backend import EAGER, NO_COMPILER
from mlo._errors import GraphError, SpecError, UserError
from mlo._graph import Graph, free, misfits, numbers_of, objections, unfit
from mlo._level import Level
from mlo._problem import Context, Problem, Settings
from mlo.hypergradient import Unroll
from mlo.schedule._abstract import AbstractSchedule
from mlo.schedule._epochs import in_iterations
from mlo.spec._faults import Fault, kind_of, unknown
from mlo.spec._levels import Epochs, LevelSpec
from mlo.spec._nodes import KeyPath, fold
from mlo.spec._options import check_options, construct
from mlo.spec._problems import problem_module
from mlo.spec._registry import hypergradient_of, optimizer_of
from mlo.stream import AbstractStream, Iterated

if TYPE_CHECKING:
    from mlo._objective import Values
    from mlo.spec._models import Spec

T = TypeVar("T")


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
    spec.fail(_device_faults(context.device))
    problem = problem_of(spec, context)
    if spec.dtype == "bfloat16":
        cast = {name: _under_autocast(each, context.device.type) for name, each in problem.objectives.items()}
        problem = replace(problem, objectives=cast)
    streams = {
        name: stream if isinstance(stream, AbstractStream) else Iterated(stream)
        for name, stream in problem.streams.items()
    }
    faults: list[Fault] = []
    durations = _Durations(spec, streams, faults)
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
    used = {name for level in spec.levels.values() for name in _stream_names(level)}
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


def context_of(spec: Spec) -> Context:
    """What the problem is built for."""
    dtype: torch.dtype = torch.float32 if spec.dtype == "bfloat16" else getattr(torch, spec.dtype)
    return Context(seed=spec.seed, device=torch.device(spec.device), dtype=dtype)


def problem_of(spec: Spec, context: Context) -> Problem:
    """The problem that `spec` names, built from its `data`. Raises `SpecError` for what it refuses."""
    build = builder_of(spec)
    settings, faults = construct(settings_of(build), spec.data)
    spec.fail(fault.below(("data",)) for fault in faults)
    where = f"{build.__module__}.build"
    try:
        inspect.signature(build).bind(settings, context)
    except TypeError as error:
        spec.fail([Fault(("problem",), f"{where}: must be called build(settings, context): {error}.")])
    try:
        problem = build(settings, context)
    except SpecError:  # has its places
        raise
    except (ValueError, UserError) as error:  # what a problem says of its own settings
        key = _first_name(error)
        spec.fail([Fault(("data", key) if key in spec.data else ("data",), str(error))])
        raise
    spec.fail(Fault(("problem",), f"{where}: {mistake}.") for mistake in _mistakes(problem))
    return problem


def _device_faults(device: torch.device) -> Iterator[Fault]:
    cuda = [f"cuda:{number}" for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    metal = ["mps"] if torch.backends.mps.is_available() else []
    there = {"cpu": True, "mps": bool(metal), "cuda": (device.index or 0) < len(cuda)}
    if not there[device.type]:
        available = ", ".join(["cpu", *cuda, *metal])
        yield Fault(("device",), f"there is no {device} on this machine. Available: {available}.")


def _mistakes(problem: Any) -> Iterator[str]:
    """What a problem's `build` has got wrong before any of it is used."""
    if not isinstance(problem, Problem):
        yield f"must return an mlo.Problem, got {kind_of(problem)}"
        return
    giving = {
        "variables": "giving a module, tensors by name, or a tensor",
        "objectives": "of (values, batch) giving a loss",
        "streams": "",
    }
    for key, gives in giving.items():
        table: Any = getattr(problem, key)
        if not isinstance(table, Mapping):
            yield f"{key} must be a mapping from names, got {kind_of(table)}"
            continue
        for name, each in cast("Mapping[Any, Any]", table).items():
            if key != "streams" and not callable(each):
                gives = "giving a tensor" if isinstance(each, torch.Tensor) else gives
                yield f"{key}['{name}'] must be a function {gives}, got {kind_of(each)}"
            elif key == "streams" and not isinstance(each, AbstractStream | Iterable):
                yield f"streams['{name}'] must be a stream, or something to iterate over, got {kind_of(each)}"
    if problem.evaluate is not None and not callable(problem.evaluate):
        yield f"evaluate must be a function giving an mlo.Evaluation, got {kind_of(problem.evaluate)}"


def settings_of(build: Callable[[Any, Context], Problem]) -> Any:
    """What a problem's `data` becomes: the annotation of `settings`."""
    return typing.get_type_hints(build).get("settings", Settings)


def builder_of(spec: Spec) -> Callable[[Any, Context], Problem]:
    """The function `build` of the problem that `spec` names; imports its module."""
    module = problem_module(spec.problem, spec.imports)
    try:
        build = getattr(importlib.import_module(module), "build", None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # a module that the problem needs
        spec.fail([Fault(("problem",), f"there is no module '{module}' to import it from.")])
        raise
    if build is None:
        spec.fail([Fault(("problem",), f"module '{module}' has no function `build(settings, context)`.")])
    assert build is not None
    return build


def _level(
    level: LevelSpec,
    problem: Problem,
    streams: Mapping[str, AbstractStream],
    context: Context,
    durations: _Durations,
    faults: list[Fault],
) -> Level | None:
    """The level, or None after adding to `faults`."""
    before = len(faults)
    here = ("levels", level.name)
    variables = _bound(problem.variables, level, "variables", faults)
    objective = _objective(problem, level, durations, faults) if level.objective else None
    optimizer = durations.resolve(optimizer_of(level.optimizer), level, "optimizer")
    for position, name in enumerate(_stream_names(level)):
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
        faults.append(_refused(error, variables, level))
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


def _objective(problem: Problem, level: LevelSpec, durations: _Durations, faults: list[Fault]) -> Any:
    """The level's objective with its options bound, those that are schedules taken anew at each iteration."""
    bound = _bound(problem.objectives, level, "objective", faults, schedule=AbstractSchedule)
    if bound is None:
        return None
    options = durations.resolve(bound.options, level, "objective")
    schedules = {name: option for name, option in options.items() if isinstance(option, AbstractSchedule)}
    return _Scheduled(bound.function, options, schedules) if schedules else bound


def _bound(
    table: Mapping[str, Callable[..., Any]],
    level: LevelSpec,
    key: str,
    faults: list[Fault],
    schedule: type[AbstractSchedule] | None = None,
) -> _Bound | None:
    """The function that the level's choice names, with its options bound, or None after adding to `faults`."""
    choice = getattr(level, key)
    here = ("levels", level.name, key)
    found = {fold(name): function for name, function in table.items()}.get(fold(choice.name))
    if found is None:
        faults.append(Fault(here, unknown(key.removesuffix("s") if key == "variables" else key, choice.name, table)))
        return None
    options, wrong = check_options(found, choice.options, schedule=schedule)
    faults += [fault.below((*here, choice.name)) for fault in wrong]
    return None if wrong else _Bound(found, options)


def _first_name(error: Exception) -> str:
    """The setting that a message begins with: `width is 0; …`, `'width': …`, `width=0: …`."""
    found = re.match(r"[`'\"]?(\w+)", str(error))
    return found[1] if found else ""


def _refused(error: ValueError | UserError, variables: _Bound, level: LevelSpec) -> Fault:
    """What a builder of variables says, at the option that its first word names."""
    first = _first_name(error)
    choice = level.variables
    inside = (choice.name, first) if choice is not None and first in variables.options else ()
    return Fault(("levels", level.name, "variables", *inside), f"{error}{'' if str(error).endswith('.') else '.'}")


@final
@dataclass(frozen=True)
class _Bound:
    """A function with its options, printed as the graph writes it."""

    function: Callable[..., Any]
    options: Mapping[str, Any]

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments, **self.options)


@final
@dataclass(frozen=True)
class _Scheduled:
    """An objective some of whose options change from iteration to iteration."""

    function: Callable[..., Any]
    options: Mapping[str, Any]
    schedules: Mapping[str, AbstractSchedule]

    def __call__(self, values: Values, batch: Any) -> Any:
        now = {name: schedule(values.iteration) for name, schedule in self.schedules.items()}
        return self.function(values, batch, **{**self.options, **now})


def _under_autocast(objective: Callable[..., Any], device: str) -> Callable[..., Any]:
    """`objective` with matrix products and convolutions in bfloat16; what it returns is float32 again."""

    @functools.wraps(objective)  # with its options
    def evaluated(*arguments: Any, **options: Any) -> Any:
        # Without the cache: a copy made where no derivative is taken, as `values.once` does, would cut later ones off.
        with torch.autocast(device, dtype=torch.bfloat16, cache_enabled=False):
            answer = objective(*arguments, **options)
        loss, *measured = answer if isinstance(answer, tuple) else (answer,)
        loss = loss.float() if isinstance(loss, torch.Tensor) else loss
        return (loss, *measured) if measured else loss

    return evaluated


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


def _stream_names(level: LevelSpec) -> tuple[str, ...]:
    return () if level.batch is None else (level.batch,) if isinstance(level.batch, str) else level.batch


def _evaluation_faults(spec: Spec, problem: Problem) -> Iterator[Fault]:
    if spec.evaluation is None:
        return
    if problem.evaluate is None:
        yield Fault(("evaluation",), f"problem '{spec.problem}' has nothing to evaluate with.", True)
    for position, name in enumerate(spec.evaluation.model or ()):
        if name not in spec.levels:
            yield Fault(("evaluation", "model", position), unknown("level", name, spec.levels))


@final
@dataclass
class _Durations:
    """Passes over a stream in iterations. A level's own stream is the longest of those its batch is made of."""

    spec: Spec
    streams: Mapping[str, AbstractStream]
    faults: list[Fault]

    def of(self, level: LevelSpec, key: str) -> int:
        """`every` or `warm_up` of a level."""
        return self._iterations(getattr(level, key), level, ("levels", level.name, key))

    def resolve(self, value: T, level: LevelSpec, key: str) -> T:
        """`value`, made from the choice at `key` of a level, with iterations in place of passes over its streams."""
        path = ("levels", level.name, key)
        try:
            return in_iterations(value, lambda passes: self._iterations(Epochs(epochs=passes), level, path))
        except ValueError as error:  # epochs too short to be told apart
            self.faults.append(Fault(path, f"{error}."))
            return value

    def iterations(self) -> int:
        """How long the run is; in passes over the longest stream of any level."""
        return self._iterations(self.spec.iterations, None, ("iterations",))

    def evaluate_every(self) -> int | None:
        """How often it is evaluated."""
        evaluation = self.spec.evaluation
        if evaluation is None or evaluation.every is None:
            return None
        return self._iterations(evaluation.every, None, ("evaluation", "every"))

    def pictures_at(self) -> frozenset[int]:
        """After which iterations pictures are made."""
        asked = self.spec.evaluation.pictures_at if self.spec.evaluation else ()
        places = ("evaluation", "pictures_at")
        return frozenset(self._iterations(each, None, (*places, place)) for place, each in enumerate(asked))

    def checkpoint_every(self) -> int | None:
        """How often a run saves itself, if the graph says so."""
        settings = self.spec.checkpoint
        return None if settings is None else self._iterations(settings.every, None, ("checkpoint", "every"))

    def _iterations(self, duration: int | Epochs, level: LevelSpec | None, path: KeyPath) -> int:
        if isinstance(duration, int):
            return duration
        if duration.of is not None and duration.of not in self.streams:
            self.faults.append(Fault((*path, "of"), unknown("stream", duration.of, self.streams)))
            return 1
        levels = self.spec.levels.values() if level is None or duration.of is not None else [level]
        lengths = [length for each in levels for length in self._lengths(each, duration.of)]
        if not lengths and duration.of is not None and self.streams[duration.of].draws_per_epoch() is not None:
            self.faults.append(Fault((*path, "of"), f"no level's batch is drawn from stream '{duration.of}'."))
            return 1
        if not lengths:
            self.faults.append(Fault(path, "there is no stream with an end to count passes over; give iterations."))
            return 1
        return max(1, math.ceil(duration.epochs * max(lengths)))

    def _lengths(self, level: LevelSpec, of: str | None) -> Iterator[float]:
        """Iterations that one pass over each of the level's streams takes, or over one of them."""
        for name in _stream_names(level):
            if of is not None and name != of:
                continue
            draws = self.streams[name].draws_per_epoch() if name in self.streams else None
            if draws is not None:
                yield draws / max(1, level.steps)
