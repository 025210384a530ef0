"""A graph of levels: validated when it is made, then pure functions of its state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import torch
from torch import nn

from mlo import _engine, _random, _reading, _structure, _tree
from mlo._backend import compiler
from mlo._compiled import Compiler
from mlo._constraint import Constraints
from mlo._cost import Cost, of_pullback, predicted, size
from mlo._errors import GraphError, Mistake, UserError, nearest
from mlo._level import Level
from mlo._modes import NotRecording, inside_transform, watchers
from mlo._module import Skeleton, numbers
from mlo._patterns import unmatched
from mlo._plan import Plan
from mlo._reduction import current_group, reduction_of, refuse_batch_objective, refuse_nesting
from mlo._state import Metrics, Parts, State
from mlo.optimizer import initial, options_read

if TYPE_CHECKING:
    import networkx as nx
    from torch import Tensor

    from mlo._types import Tree


@final
class Graph:
    """Levels that read each other, solved together.

        graph = mlo.Graph([inner, outer])
        state = graph.init(seed=0)
        state, metrics = graph.step(state, batches)

    The order in which levels are listed changes nothing.

    With `compile=True`, `step` takes whole iterations through torch's inductor: the same numbers up to rounding, after a
    minute or so at the second step, and again for every other set of levels that are due and every other shape of batches.
    The first iteration of a level is taken without. Where torch finds no C++ compiler, and with `compile="eager"`, the
    traced operations are run one by one; any other name is that of a backend of `torch.compile`. What a trace would hold
    fixed is refused at the first step and by `probe`, with the reason: objectives and methods that draw random numbers,
    objectives that read `values.iteration` or take a number out of a tensor, several processes. What an objective reads
    besides its values and its batch must not change. Methods that stop early run to their full length.

    Raises `GraphError`, with every mistake, if the levels do not
    form a graph: an unknown name, a cycle, a response that does not depend on the level above it, due times that do not
    meet, a nest that its methods cannot differentiate.
    """

    def __init__(self, levels: Iterable[Level], *, compile: bool | str = False) -> None:
        declared = tuple(levels)
        if found := _structure.mistakes(declared, running=False) + unlisted(declared):
            raise GraphError(found)
        by_name = {level.name: level for level in declared}
        self.order: tuple[str, ...] = _structure.run_order(declared)
        self.levels: Mapping[str, Level] = {name: by_name[name] for name in self.order}
        found = [Mistake(name, key, what) for name, level in self.levels.items() for key, _, what in unfit(level)]
        found += objections(self.levels, compiling=bool(compile))
        found += misread(self.levels)
        if found:
            raise GraphError(found)
        skeletons = {
            name: Skeleton(level.variables, Constraints(level.constraints) if level.constraints else None)
            for name, level in self.levels.items()
            if level.constraints or isinstance(level.variables, nn.Module)
        }
        self._plan = Plan(self.levels, skeletons)
        self._compiler = Compiler(self._plan, compiler() if compile is True else compile) if compile else None

    @property
    def compiles_with(self) -> str | None:
        """Inductor or another backend; `eager` where there is no C++ compiler; None where steps are not compiled."""
        return self._compiler and self._compiler.backend

    @property
    def network(self) -> nx.DiGraph[str]:
        """The arrows, from the level that is read to its reader, each with its `kind`: given, subject_to or against."""
        return _structure.network(self.levels.values())

    def init(self, *, values: Mapping[str, Any] | None = None, seed: int = 0) -> State:
        """The state before the first iteration; tensors are cloned.

        `values` starts some levels elsewhere: by name, what `Level.variables` may be, of the same names and shapes.
        `seed` keys all noise drawn inside objectives. Raises `UserError` for variables that cannot be optimised.
        """
        elsewhere = dict(values or {})
        for name in elsewhere:
            if name not in self.levels:
                raise UserError(f"values: no level named '{name}'.{nearest(name, self.levels)}")
        variables: dict[str, Tree] = {}
        buffers: dict[str, Mapping[str, Tensor]] = {}
        for name, level in self.levels.items():
            variables[name], own = numbers_of(name, level.variables)
            if isinstance(level.variables, nn.Module):
                buffers[name] = own
            if name in elsewhere:
                replaced, own = numbers_of(name, elsewhere[name])
                _refuse_other_shape(name, variables[name], replaced)
                variables[name] = replaced
                if own:
                    buffers[name] = own
            variables[name] = free(level, variables[name])
            if level.optimizer and not _tree.leaves(variables[name]):
                raise UserError(f"level '{name}' has an optimizer and no variables, or only frozen ones")
        optimizers = {
            name: initial(level.optimizer, variables[name]) for name, level in self.levels.items() if level.optimizer
        }
        return State(values=variables, buffers=buffers, optimizers=optimizers, seed=seed)

    def step(self, state: State, batches: Mapping[str, Any] | None = None) -> tuple[State, Metrics]:
        """One outer iteration: the state after it and what it showed. `state` and torch's global RNG stay as they are.

        `batches` maps a level's name to its batch, used for each of its steps, or to `mlo.Batches`, one a step.
        Raises `NumericalError` for a loss or a part of a hypergradient that is not finite; `GraphError` for a level that
        turns out to be disconnected.
        """
        with _Undisturbed():
            if self._compiler is not None and not (inside_transform() or watchers()):  # who look for operations
                return self._compiler.step(state, self._checked(batches))
            return _engine.step(self._plan, state, self._checked(batches))

    def hypergradient(self, name: str, state: State, batches: Mapping[str, Any] | None = None) -> Tree:
        """The total derivative of the objective of `name` in its variables, shaped like them. Changes nothing.

        The levels it is subject to take their steps from `state`, everything else stays where `state` has it, and each
        response is pulled back by its level's method. With `steps=0` the state itself counts as the solution.
        """
        return self.parts(name, state, batches).total

    def parts(self, name: str, state: State, batches: Mapping[str, Any] | None = None) -> Parts:
        """`hypergradient` by parts: the direct gradient, and what arrives through each response."""
        if name not in self.levels:
            raise UserError(f"no level named '{name}'.{nearest(name, self.levels)}")
        if self.levels[name].objective is None:
            raise UserError(f"level '{name}' is a constant: it has no objective to differentiate")
        with _Undisturbed():
            return _engine.parts(self._plan, name, state, self._checked(batches))

    def probe(self, state: State, batches: Mapping[str, Any] | None = None) -> None:
        """Take every derivative once, due or not, and keep nothing: what is disconnected is found before the first step.

        Raises `GraphError` with every level that is listed and not read, or whose response does not reach back.
        """
        mistakes: list[Mistake] = []
        with _Undisturbed():
            for name, level in self.levels.items():
                try:
                    if self._plan.differentiated(name):
                        _engine.parts(self._plan, name, state, self._checked(batches))
                        _engine.refuse_separable(self._plan, name, state, self._checked(batches))
                    elif not level.frozen:
                        _engine.Iteration.of(self._plan, state, self._checked(batches)).respond(name)
                except GraphError as error:
                    mistakes += (mistake for mistake in error.mistakes if mistake not in mistakes)
        if mistakes:
            raise GraphError(mistakes)
        if self._compiler is not None:
            with _Undisturbed():
                self._compiler.refuse(state, self._checked(batches))

    def cost(self, iterations: int) -> Cost:
        """What the first `iterations` cost; exact for methods of fixed length, and for nests of three levels."""
        return predicted(self._plan, iterations)

    def cost_of_pullback(self, upper: str, name: str) -> Cost:
        """What one pullback of level `name` costs where `upper` is differentiated, with all that happens below it."""
        return Cost(*of_pullback(self._plan, upper, name), pullbacks=1)

    def module(self, name: str, state: State) -> nn.Module:
        """A copy of level `name`'s module that holds the parameters and buffers of `state`."""
        from copy import deepcopy

        module = self.levels[name].variables
        if not isinstance(module, nn.Module):
            raise UserError(f"level '{name}' holds tensors and no module")
        values = self._plan.skeletons[name].constrained(state.values[name])
        assert isinstance(values, Mapping)
        copy, tensors = deepcopy(module), {**values, **state.buffers[name]}
        with torch.no_grad():  # not through the state dict: it lacks buffers that are not persistent
            for key, tensor in (*copy.named_parameters(), *copy.named_buffers()):
                tensor.copy_(tensors[key])
        return copy

    def values(self, state: State, names: Iterable[str] | None = None) -> Mapping[str, Any]:
        """What an objective sees of the levels in `state`: for evaluating them outside the graph."""
        seen: dict[str, Any] = {}
        for name in self.order if names is None else names:
            value, skeleton = state.values[name], self._plan.skeletons.get(name)
            seen[name] = value if skeleton is None else skeleton.view(value, state.buffers.get(name, {}))
        return seen

    def _checked(self, batches: Mapping[str, Any] | None) -> Mapping[str, Any]:
        for name in batches or {}:
            if name not in self.levels:
                raise UserError(f"batches: no level named '{name}'.{nearest(name, self.levels)}")
        if current_group() is not None:
            self._refuse_division()
        return batches or {}

    def _refuse_division(self) -> None:
        """Raise for what several processes, each with a part of every batch, cannot compute."""
        if inside_transform():
            raise UserError(
                "several processes cannot reduce anything inside a torch.func transform: run it in one process"
            )
        for name, level in self.levels.items():
            refuse_batch_objective(name, level.objective)
            if name in self._plan.nested:
                refuse_nesting(name)


def plan_of(graph: Graph) -> Plan:
    """What the engine is given of `graph`."""
    return graph._plan  # pyright: ignore[reportPrivateUsage]


@final
class _Undisturbed:
    """Torch's global RNG is left as it was found, and nothing is recorded but what the engine records itself."""

    def __enter__(self) -> None:
        if torch.is_inference_mode_enabled():
            raise UserError(
                "nothing can be differentiated inside torch.inference_mode(); torch.no_grad() is no obstacle"
            )
        self._generators = _random.Preserved()
        self._generators.__enter__()
        self._recording = None if inside_transform() else NotRecording()
        if self._recording is not None:
            self._recording.__enter__()

    def __exit__(self, *exception: object) -> None:
        if self._recording is not None:
            self._recording.__exit__()
        self._generators.__exit__()


def objections(levels: Mapping[str, Level], *, compiling: bool = False) -> list[Mistake]:
    """Levels whose response is differentiated by a method that cannot be applied to them, or in their nest."""
    pulled = {lower for level in levels.values() for lower in _structure.differentiated(level, levels)}
    found: list[Mistake] = []
    for name in sorted(pulled):
        optimizer = levels[name].optimizer
        reason = None if optimizer is None else levels[name].hypergradient.objection(optimizer)
        found += [] if reason is None else [Mistake(name, "hypergradient", reason)]
        if levels[name].hypergradient.divides_into > 1:
            found += _chunk_objections(name, levels, compiling=compiling)
    for level in levels.values():
        found += _game_objections(level, levels)
    for name in sorted(_structure.nested(levels)):
        above = levels[name].hypergradient.nesting(levels[name].steps, size(levels[name].variables))
        if levels[name].nested == "reduced":
            found += _nest_objections(name, levels)
        elif above.needs_objective is not None:
            found.append(Mistake(name, "hypergradient", f"{above.needs_objective}; take unroll"))
    return found


def _chunk_objections(name: str, levels: Mapping[str, Level], *, compiling: bool) -> list[Mistake]:
    """Why products of level `name` cannot be summed over chunks of its batch, or would save nothing."""
    reasons: list[str] = []
    if reduction_of(levels[name].objective) == "batch":
        reasons.append(
            "its objective declares `reduction: batch`: it is no mean over samples, and its parts do not add up to it"
        )
    if name in _structure.nested(levels):
        reasons.append("it follows a total gradient, through the responses below it, which is not divided")
    if compiling:
        reasons.append("compiled steps keep what chunks would free: leave out `compile`")
    return [Mistake(name, "hypergradient", f"chunks: {reason}") for reason in reasons]


def _game_objections(upper: Level, levels: Mapping[str, Level]) -> list[Mistake]:
    """Players that are pulled back together, of which the upper level lists some, or which say different things."""
    found: list[Mistake] = []
    below = _structure.differentiated(upper, levels)
    for name in below:
        method = levels[name].hypergradient
        if not method.is_joint:
            continue
        for opponent in levels[name].against:
            if levels[opponent].frozen:
                continue
            if opponent not in below:
                reason = f"'{name}' is differentiated with its opponents, and '{opponent}' is not listed"
                found.append(Mistake(upper.name, "subject_to", reason))
            elif levels[opponent].hypergradient != method:
                reason = f"it is differentiated together with '{opponent}', which has another method"
                found.append(Mistake(name, "hypergradient", reason))
    return found


def _nest_objections(middle: str, levels: Mapping[str, Level]) -> list[Mistake]:
    """Why the total gradient of `middle` cannot be differentiated with the methods that were chosen."""
    upper = levels[middle]
    above = upper.hypergradient.nesting(upper.steps, size(upper.variables))
    found: list[Mistake] = []
    if above.needs_objective is not None:
        found.append(Mistake(middle, "hypergradient", f"{above.needs_objective}; take unroll"))
    for name in _structure.response_order(upper, levels):
        lower = levels[name]
        below = lower.hypergradient.nesting(lower.steps, size(lower.variables))
        if below.refused is not None:
            reason = (
                f"{below.refused}; the total gradient of '{middle}' is differentiated through it (or nested: direct)"
            )
            found.append(Mistake(name, "hypergradient", reason))
        if above.compares and not below.follows:
            reason = (
                f"it compares gradients of '{middle}' at two places, where '{name}' takes its steps anew; but the method of "
                f"'{name}' is not the derivative of these steps. Take a method with second derivatives here, unroll all "
                f"steps of '{name}', or say nested: direct"
            )
            found.append(Mistake(middle, "hypergradient", reason))
        if above.needs_symmetry and not below.symmetric:
            reason = (
                f"conjugate gradients need a symmetric Jacobian, and the total gradient of '{middle}' has none: those of "
                f"'{name}' may stop before they have converged (fewer iterations than numbers). Take neumann, exact or "
                f"gmres here, another method for '{name}', or say nested: direct"
            )
            found.append(Mistake(middle, "hypergradient", reason))
    return found


def unlisted(levels: Sequence[Level]) -> list[Mistake]:
    """Options of optimizers that are read from a level which is not there, or not given."""
    names = [level.name for level in levels]
    return [
        Mistake(level.name, ".".join(("optimizer", *wrong.path)), wrong.message)
        for level in levels
        if level.optimizer
        for wrong in _reading.unlisted(level, level.optimizer, names)
    ]


def misread(levels: Mapping[str, Level]) -> list[Mistake]:
    """Options of optimizers that are read from tensors which do not fit, or not differentiated by the level's method."""
    optimizers = {name: level.optimizer for name, level in levels.items() if level.optimizer}
    found = [Mistake(name, ".".join(("optimizer", *path)), what) for name, path, what in misfits(levels)]
    methods = {name: level.hypergradient for name, level in levels.items()}
    reasons = _reading.left_out(levels, optimizers, methods)
    return found + [Mistake(name, "hypergradient", reason) for name, reason in sorted(reasons.items())]


def misfits(levels: Mapping[str, Level]) -> list[tuple[str, tuple[str, ...], str]]:
    """Options that are read from tensors which are not there or do not fit: the level, the option, the mistake."""
    reading = {name: level.optimizer for name, level in levels.items() if level.optimizer}
    reading = {name: optimizer for name, optimizer in reading.items() if any(options_read(optimizer))}
    shapes = {name: _shapes(level.variables) for name, level in levels.items()} if reading else {}
    return [
        (name, wrong.path, wrong.message)
        for name, optimizer in reading.items()
        for wrong in _reading.misfits(optimizer, shapes[name], shapes)
    ]


def _shapes(variables: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of what is trained of a level, by name."""
    if isinstance(variables, nn.Module):
        return {name: tuple(tensor.shape) for name, tensor in variables.named_parameters() if tensor.requires_grad}
    tensors = variables if isinstance(variables, Mapping) else {"": variables}
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def unfit(level: Level) -> list[tuple[str, str, str]]:
    """Patterns of constraints and of parameter groups that match no variable: the level's key, the pattern, the mistake."""
    variables = level.variables
    if isinstance(variables, nn.Module):
        names = [name for name, tensor in variables.named_parameters() if tensor.requires_grad]
    else:
        names = list(variables) if isinstance(variables, Mapping) else [""]
    tables = {"constraints": level.constraints, "optimizer": level.optimizer and level.optimizer.groups}
    return [
        (key, pattern, message)
        for key, table in tables.items()
        for pattern, message in unmatched(table or (), names).items()
    ]


def free(level: Level, constrained: Tree) -> Tree:
    """The numbers that the optimizer of `level` moves, from those that its objective sees."""
    try:
        return Constraints(level.constraints).inverse(constrained) if level.constraints else constrained
    except ValueError as error:
        raise GraphError([Mistake(level.name, "constraints", str(error))]) from None


def numbers_of(name: str, variables: Any) -> tuple[Tree, dict[str, Tensor]]:
    """Clones of what is trained, and of the buffers. Raises `UserError` for what cannot be optimised."""
    if isinstance(variables, nn.Module):
        trained, buffers = numbers(variables)
        return trained, buffers
    tensors = dict(variables) if isinstance(variables, Mapping) else {"": variables}
    for key, tensor in tensors.items():
        where = f"variables['{key}']" if key else "variables"
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"level '{name}', {where}: expected a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise UserError(f"level '{name}', {where}: expected floating-point numbers to optimise, got {tensor.dtype}")
    return _tree.apply(lambda tensor: tensor.detach().clone(), variables), {}


def _refuse_other_shape(name: str, declared: Tree, given: Tree) -> None:
    if isinstance(declared, Mapping) != isinstance(given, Mapping):
        raise GraphError(
            [Mistake(name, "variables", "started with a tensor in place of tensors by name, or the reverse")]
        )
    pairs = {key: tensor.shape for key, tensor in _tree.named(given).items()}
    for key, tensor in _tree.named(declared).items():
        if pairs.pop(key, None) != tensor.shape:
            other = _tree.named(given).get(key)
            found = "nothing" if other is None else f"shape {tuple(other.shape)}"
            raise GraphError(
                [Mistake(name, "variables", f"'{key}' has shape {tuple(tensor.shape)}, started with {found}")]
            )
    if pairs:
        raise GraphError([Mistake(name, "variables", f"started with unknown tensors: {', '.join(sorted(pairs))}")])
