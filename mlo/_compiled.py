"""Whole iterations as one graph of operations, traced once for each kind of iteration and handed to a compiler.

`torch.compile` of `Graph.step` itself breaks wherever Python holds something back: pullbacks that outlive their function,
the look at numbers that may not be finite. So an iteration is first traced with `make_fx`, reverse passes and all, on
tensors that have a shape and no numbers: what would have to look at a number cannot be traced, and is refused by name.

A trace holds fixed whatever is no tensor. What changes from one iteration to the next is therefore either

- a tensor that is handed in: variables, buffers, moments, memory, batches, and the numbers of schedules and counts;
- or part of the kind of the iteration, of which each is traced by itself: levels that are due, shapes, numbers in batches;
- or refused: draws inside objectives, objectives that read the number of the iteration.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast, final

import torch
from torch import nn
from torch.fx.graph import CodeGen

from mlo._backend import compiled, first_line
from mlo._engine import Iteration, step, taken
from mlo._errors import GraphError, Mistake, NumericalError, UserError
from mlo._flat import Form, flatten, rebuild
from mlo._objective import known_to_share, shares
from mlo._plan import Plan
from mlo._reduction import refuse_compiling
from mlo._state import Metrics, Norms, State
from mlo._structure import is_due
from mlo._tree import leaves
from mlo.optimizer import OptimizerState
from mlo.schedule import AbstractSchedule

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._level import Level
    from mlo.optimizer import AbstractOptimizer

KINDS = 16
"""More kinds of iterations than this are a mistake: each is compiled for a minute or so."""


@final
@dataclass(frozen=True, eq=False)
class Program:
    """A traced iteration: from the tensors of a state, of batches and of numbers to those of what comes out.

    - `form`: of what comes out.
    - `taken_from`: for each of its tensors, where it stands: among what `run` gives, or, below 0, −1 − its place among what
      went in.
    - `looked_at`: level, step and term of each number that must be finite, in order. `run` gives last of all whether each
      is, and before that whether all are.
    - `shown`: what is the same in every such iteration.
    """

    run: Callable[..., Sequence[Tensor]]
    form: Form
    taken_from: tuple[int, ...]
    looked_at: tuple[tuple[str, int, str], ...]
    shown: Mapping[str, Any]

    def __call__(self, tensors: list[Tensor], iteration: int) -> Any:
        """What comes out. Raises `NumericalError` for a number that is not finite."""
        *found, whole, each = self.run(*tensors)
        if not bool(whole):
            level, step, term = self.looked_at[each.tolist().index(False)]
            raise NumericalError(level=level, step=step, term=term, iteration=iteration)
        return rebuild(self.form, iter([found[at] if at >= 0 else tensors[-1 - at] for at in self.taken_from]))


@final
class Compiler:
    """Steps of a graph by compiled programs, each made when its kind of iteration is met for the first time.

    An iteration in which a level that is due has never moved before is taken as `Graph` takes it otherwise: it happens once,
    and it leaves memory that the next ones begin with. Which those are depends on the state alone, so that a run that is
    resumed takes the same.
    """

    def __init__(self, plan: Plan, backend: str) -> None:
        self._plan, self.backend = plan, backend
        self._programs: dict[Hashable, Program] = {}
        self._traces: dict[Hashable, tuple[torch.fx.GraphModule, Program]] = {}
        """What was traced to see whether it can be, and is not yet compiled."""

    def step(self, state: State, batches: Mapping[str, Any]) -> tuple[State, Metrics]:
        """`mlo._engine.step`, equal to it up to rounding.

        Raises `GraphError` for what cannot be traced; and `UserError` for batches of too many kinds.
        """
        due = _due(self._plan, state)
        if not all(self._has_moved(name, state) for name in due):
            after, metrics = step(self._plan, state, batches)
            self._refuse(self._plan, replace(after, iteration=state.iteration), batches)
            return after, metrics
        form, tensors = _taken_apart(self._plan, state, batches)
        kind = (due, form)
        program = self._programs.get(kind)
        if program is None:
            program = self._programs[kind] = self._made(kind, state, tensors)
        with torch.no_grad():
            found = program(tensors, state.iteration + 1)
        return _put_together(state, found, program.shown)

    def refuse(self, state: State, batches: Mapping[str, Any]) -> None:
        """Raise `GraphError` if an iteration in which every level is due cannot be traced. Changes nothing."""
        levels = {name: replace(level, every=1, warm_up=0) for name, level in self._plan.levels.items()}
        plan = Plan(levels, self._plan.skeletons)
        after, _ = step(plan, state, batches)
        self._refuse(plan, replace(after, iteration=state.iteration), batches)

    def _refuse(self, plan: Plan, state: State, batches: Mapping[str, Any]) -> None:
        """As the iteration of `state` will be traced once its levels have moved."""
        form, tensors = _taken_apart(plan, state, batches)
        kind = (_due(plan, state), form)
        if kind not in self._programs and kind not in self._traces:
            self._traces[kind] = _traced(plan, state, form, tensors)

    def _has_moved(self, name: str, state: State) -> bool:
        return state.optimizers[name].count > 0 and (
            not self._plan.differentiated(name) or (name, name) in state.memory
        )

    def _made(self, kind: tuple[tuple[str, ...], Form], state: State, tensors: list[Tensor]) -> Program:
        if len(self._programs) == KINDS:
            raise UserError(
                f"compile: {KINDS} kinds of iterations are compiled, and this is another one: batches must have few shapes, "
                "and hold what changes in tensors"
            )
        module, program = self._traces.pop(kind, None) or _traced(self._plan, state, kind[1], tensors)
        return replace(program, run=compiled(module, tensors, self.backend))


def _due(plan: Plan, state: State) -> tuple[str, ...]:
    return tuple(name for name, level in plan.levels.items() if is_due(level, state.iteration + 1))


def _taken_apart(plan: Plan, state: State, batches: Mapping[str, Any]) -> tuple[Form, list[Tensor]]:
    """All that goes into an iteration: its form, and its tensors, numbers first."""
    tensors = list["Tensor"]()
    moments = {name: memory.moments for name, memory in state.optimizers.items()}
    numbers = {name: _numbers_of(level, state) for name, level in plan.levels.items() if level.optimizer}
    due = _due(plan, state)
    memory = {pair: trees for pair, trees in state.memory.items() if pair[0] in due}  # of others it is not asked
    parts = numbers, state.values, state.buffers, moments, memory
    try:
        form = flatten((*parts, batches), tensors)
    except TypeError as error:
        raise UserError(f"compile: batches: {error}") from None
    return form, [tensor.detach() if tensor.requires_grad else tensor for tensor in tensors]


def _numbers_of(level: Level, state: State) -> Tensor:
    """The count of updates, and what each schedule of the optimizer gives: what is no tensor and changes."""
    assert level.optimizer is not None
    now = [schedule(state.iteration + 1) for schedule in _schedules(level.optimizer)]
    device = leaves(state.values[level.name])[0].device
    return torch.tensor([state.optimizers[level.name].count, *now], dtype=torch.float64, device=device)


def _put_together(before: State, found: Any, shown: Mapping[str, Any]) -> tuple[State, Metrics]:
    moved: Mapping[str, int] = shown["moved"]
    state = State(
        values=found["values"],
        buffers=found["buffers"],
        optimizers={
            name: OptimizerState(before.optimizers[name].count + moved[name], moments)
            for name, moments in found["moments"].items()
        },
        iteration=before.iteration + 1,
        seed=before.seed,
        memory={**before.memory, **found["memory"]},
    )
    metrics = Metrics(
        losses=found["losses"],
        norms={name: Norms(**norms) for name, norms in found["norms"].items()},
        measured=found["measured"],
        reports=found["reports"],
        **shown["metrics"],
    )
    return state, metrics


def _traced(plan: Plan, state: State, form: Form, tensors: list[Tensor]) -> tuple[torch.fx.GraphModule, Program]:
    """The operations of the iteration that begins with `state` and `tensors`, and what they give.

    Traced again where it is seen only then that an objective shares a part: a run that is resumed takes the same operations.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    refuse_compiling()
    sharing = {name for name, level in plan.levels.items() if shares(level)}
    seen = set(sharing)
    ends = list[tuple[Form, tuple[tuple[str, int, str], ...], dict[str, Any]]]()

    def iteration(given: list[Tensor]) -> list[Tensor]:
        numbers, values, buffers, moments, memory, batches = rebuild(form, iter(given))
        told = {
            name: _numbers_in(level, state, numbers[name]) for name, level in plan.levels.items() if level.optimizer
        }
        optimizers = {name: OptimizerState(count, moments[name]) for name, (count, _) in told.items()}
        begin = replace(state, values=values, buffers=buffers, optimizers=optimizers, memory=memory)
        levels = {
            name: replace(level, objective=_watched(level), optimizer=told[name][1]) if level.optimizer else level
            for name, level in plan.levels.items()
        }
        for name in sharing:
            known_to_share(levels[name])
        with torch.no_grad():
            inside = taken(Plan(levels, plan.skeletons), begin, batches)
            seen.update(name for name, level in levels.items() if shares(level))
            found, looked_at, shown = _come_out(inside)
            out = list["Tensor"]()
            ends.append((flatten(found, out), looked_at, shown))
            finite = torch.stack([number.isfinite() for *_, number in inside.finite.numbers()])
            return [*out, finite.all(), finite]

    try:
        module = make_fx(_with_calls_of_now(iteration), tracing_mode="fake", _allow_non_fake_inputs=True)(tensors)
    except UserError:
        raise
    except Exception as error:
        notes = " ".join(getattr(error, "__notes__", ()))
        raise UserError(f"compile: an iteration cannot be traced: {first_line(error)} {notes}".rstrip()) from error
    if seen != sharing:
        for name in seen - sharing:
            known_to_share(plan.levels[name])
        return _traced(plan, state, form, tensors)
    ((out, looked_at, shown),) = ends
    taken_from = _pruned(module)
    return module, Program(module, out, taken_from, looked_at, shown)


def _with_calls_of_now(iteration: Callable[[list[Tensor]], list[Tensor]]) -> Callable[[list[Tensor]], list[Tensor]]:
    """`iteration` with `nn.Module.__call__` as it stands now, in place of the one that tracers bring along.

    Theirs passes over what a user has put there, and looks like that of a tracer inside an objective.
    """
    now = nn.Module.__call__

    def inside(given: list[Tensor]) -> list[Tensor]:
        tracers, nn.Module.__call__ = nn.Module.__call__, now
        try:
            return iteration(given)
        finally:
            nn.Module.__call__ = tracers

    return inside


def _come_out(inside: Iteration) -> tuple[dict[str, Any], tuple[tuple[str, int, str], ...], dict[str, Any]]:
    """Of a finished iteration: what is made of tensors, what must be finite, and what is the same each time."""
    state, metrics = inside.finish()
    norms = {
        name: {each.name: getattr(norm, each.name) for each in dataclasses.fields(norm)}
        for name, norm in metrics.norms.items()
    }
    found = {
        "values": state.values,
        "buffers": state.buffers,
        "moments": {name: memory.moments for name, memory in state.optimizers.items()},
        "memory": state.memory,
        "losses": metrics.losses,
        "norms": norms,
        "measured": metrics.measured,
        "reports": metrics.reports,
    }
    counts = {name: cast("Any", memory.count).added for name, memory in state.optimizers.items()}
    kept = {"pullbacks": metrics.pullbacks, "gradients": metrics.gradients, "products": metrics.products}
    looked_at = tuple((level, step, term) for level, step, term, _ in inside.finite.numbers())
    return found, looked_at, {"moved": counts, "metrics": kept}


def _numbers_in(level: Level, state: State, numbers: Tensor) -> tuple[Any, AbstractOptimizer]:
    """The count of updates and the optimizer of `level`, its schedules replaced, as tensors in place of numbers."""
    assert level.optimizer is not None
    count, *now = numbers.unbind()
    dtype = leaves(state.values[level.name])[0].dtype
    rest = iter(now)
    return Count(count), _rescheduled(level.optimizer, lambda schedule: _Held(schedule, next(rest).to(dtype)))


@final
@dataclass(frozen=True, eq=False)
class Count:
    """How many updates an optimizer has made: a number above 0 that a trace does not hold fixed.

    It can do what optimizers do with a count: add to it, raise a number to its power, ask whether it is 0.
    """

    start: Tensor
    added: int = 0

    def __add__(self, number: int) -> Count:
        return Count(self.start, self.added + number)

    def __sub__(self, number: int) -> Count:
        return self + -number

    def __rpow__(self, base: Any) -> Tensor:
        return base ** (self.start + self.added)

    def __eq__(self, other: object) -> bool:
        if other != 0 or self.added < 0:
            raise TypeError(
                f"the count of an optimizer's updates is compared with {other!r}, which a trace would hold fixed"
            )
        return False

    __hash__ = None  # pyright: ignore[reportAssignmentType]


@final
@dataclass(frozen=True)
class _Held(AbstractSchedule):
    """A schedule that gives a tensor: what the one in its place gives at this iteration."""

    schedule: AbstractSchedule
    number: Any

    def __call__(self, iteration: int) -> float:
        return self.number

    @property
    def bounds(self) -> tuple[float, float]:
        """See `AbstractSchedule`."""
        return self.schedule.bounds


def _schedules(optimizer: AbstractOptimizer) -> Iterator[AbstractSchedule]:
    """Every schedule among the options of `optimizer`, in the order of `_rescheduled`."""
    groups: Mapping[str, Mapping[str, Any]] = optimizer.groups or {}
    for options in (vars(optimizer), *groups.values()):
        yield from (option for option in options.values() if isinstance(option, AbstractSchedule))


def _rescheduled(
    optimizer: AbstractOptimizer, changed: Callable[[AbstractSchedule], AbstractSchedule]
) -> AbstractOptimizer:
    def of(options: Mapping[str, Any]) -> dict[str, Any]:
        return {name: changed(each) if isinstance(each, AbstractSchedule) else each for name, each in options.items()}

    options = of(vars(optimizer))
    if optimizer.groups:
        options["groups"] = {pattern: of(group) for pattern, group in optimizer.groups.items()}
    return dataclasses.replace(cast("Any", optimizer), **options)


def _watched(level: Level) -> Callable[[Any, Any], Any]:
    """The objective of `level`, refused where it draws: a trace would hold the numbers of one iteration fixed."""
    objective = level.objective
    assert objective is not None

    @functools.wraps(objective)
    def evaluated(values: Any, batch: Any) -> Any:
        from torch.fx.experimental.proxy_tensor import get_proxy_mode

        mode: Any = get_proxy_mode()
        before = len(mode.tracer.graph.nodes)
        answer = objective(values, batch)
        for node in list(mode.tracer.graph.nodes)[before:]:
            if reason := _objection(node):
                raise GraphError([Mistake(level.name, "objective", reason)])
        return answer

    return evaluated


def _objection(node: Any) -> str | None:
    """Why an operation of an objective would not be the same one in the next iteration."""
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return f"it draws random numbers ({node.target}), which compiled steps would hold fixed; draw them in a stream"
    found = node.meta.get("val")
    sizes = found.shape if isinstance(found, torch.Tensor) else [found]
    if any(isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) for size in sizes):
        return (
            f"it takes a number out of a tensor, or a shape ({node.target}), which is not known when steps are compiled"
        )
    return None


def _pruned(module: torch.fx.GraphModule) -> tuple[int, ...]:
    """Take inputs and repetitions out of what `module` gives; see `Program.taken_from`. The last two stay where they are."""
    inputs = {node: place for place, node in enumerate(module.graph.find_nodes(op="placeholder"))}
    (end,) = module.graph.find_nodes(op="output")
    *results, whole, each = cast("list[Any]", end.args[0])
    kept: dict[Any, int] = {}
    places = [-1 - inputs[node] if node in inputs else kept.setdefault(node, len(kept)) for node in results]
    end.args = ((*kept, whole, each),)
    module.graph.set_codegen(CodeGen())  # inputs one by one, not as a tree
    module.recompile()
    return tuple(places)
