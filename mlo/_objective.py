"""Evaluate a level's objective on explicit values, buffers and draws."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar, cast, final
from weakref import WeakSet

import torch

from mlo import _random, _tree
from mlo._errors import GraphError, Mistake, UserError, nearest
from mlo._modes import inside_transform, is_traced
from mlo._module import ModuleVariables, Skeleton

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._level import Level
    from mlo._state import Parts
    from mlo._types import Tree

Part = TypeVar("Part", bound="Tree")

Share: TypeAlias = "Callable[[str, Callable[[], Tree]], Tree]"
"""Where a part of an objective comes from, by its name and what computes it."""

_NO_BUFFERS: Mapping[str, Tensor] = {}
_VERSION: Callable[[Tensor], int] = attrgetter("_version")

_SHARING: WeakSet[Level] = WeakSet()
"""Levels whose objective was seen to share a part. It decides when that is computed, and no number."""


class Record(NamedTuple):
    """What a step drew: its batch, the seed of its noise, and the discrete choices made from values; and its iteration.

    Every evaluation that belongs to the step uses the same record. `choices` is None until the step has been evaluated
    for the first time.
    """

    batch: Any
    seed: int
    iteration: int
    choices: Mapping[Any, Any] | None = None

    def with_choices(self, choices: Mapping[Any, Any]) -> Record:
        """This record, closed: the choices were made."""
        return Record(self.batch, self.seed, self.iteration, choices)


class Aftermath(NamedTuple):
    """What an evaluation leaves besides the loss: measurements, the level's own new buffers, the choices it made.

    `parts`: of a level in the middle of a nest, its total gradient by parts; nothing for others.
    """

    measured: dict[str, Tensor]
    buffers: dict[str, Tensor]
    choices: dict[Any, Any]
    parts: tuple[Parts, ...] = ()


@final
class UnlistedLevelError(UserError, KeyError):
    """An objective read a level that its own level does not list."""

    def __str__(self) -> str:
        return str(self.args[0])


@final
class ChangedInPlaceError(UserError):
    """An objective wrote to what other evaluations see."""


@final
class Values(Mapping[str, Any]):
    """The levels an objective may read: `values[name]` is a tensor, tensors by name, or a module that can be called."""

    def __init__(self, reader: str, views: Mapping[str, Any], record: Record, share: Share | None = None) -> None:
        self._reader = reader
        self._views = views
        self._record = record
        self._share = share
        self.choices: dict[Any, Any] = dict(record.choices or {})
        self.parts: dict[str, list[tuple[Tensor, int]]] = {}
        """What is shared, by name: tensors, and how often each was written to when it was handed out."""

    @property
    def iteration(self) -> int:
        """The number of the iteration, counted from 1: what an objective that changes with time depends on."""
        if is_traced():
            reason = "it reads `values.iteration`, which compiled steps would hold fixed"
            raise GraphError([Mistake(self._reader, "objective", reason)])
        return self._record.iteration

    def __getitem__(self, name: str) -> Any:
        try:
            return self._views[name]
        except KeyError:
            listed = ", ".join(self._views)
            raise UnlistedLevelError(
                f"the objective of level '{self._reader}' reads '{name}', which the level does not list; add '{name}' to "
                f"its `given` (held fixed) or `subject_to` (differentiated through).{nearest(name, self._views)}\n"
                f"  Listed: {listed}."
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def once(self, name: str, choose: Callable[[], Any]) -> Any:
        """A discrete choice made from values: `choose()` the first time a step is evaluated, the same ever after.

        A class drawn with probability p must not change when p is perturbed for a derivative. `choose` gives a tensor,
        or tensors in tuples or mappings, which are detached; `name` tells the choices of one objective apart.
        """
        if name not in self.choices:
            if self._record.choices is not None:
                raise UserError(
                    f"the objective of level '{self._reader}' made the choice '{name}' in a re-evaluation only"
                )
            with torch.no_grad():
                self.choices[name] = _constant(choose())
        return self.choices[name]

    def shared(self, name: str, compute: Callable[[], Part]) -> Part:
        """A part of the objective that does not depend on the level's own variables: a tensor, or tensors by name.

        `compute()` is differentiated as if it stood there by itself. Where a step is evaluated with the level's variables
        at several places, as finite differences do, it is computed once, and what arrives at it is pulled back once:
        images of a generator, say, which a classifier is trained on. Its random numbers are its own, the same in every
        evaluation. `name` tells the parts of one objective apart; a part may be made of others. It must not be changed in
        place.

        Raises `UserError` for a name that another part has, for what is no tensor, and where it depends on the level's own
        variables, which would be held fixed without a word.
        """
        if name in self.parts:
            raise UserError(f"the objective of level '{self._reader}' shares two parts as '{name}': call one otherwise")

        def alone() -> Part:
            _random.reseed(_random.key(self._record.seed, name))
            return _tree_of_tensors(compute(), f"what the objective of level '{self._reader}' shares as '{name}'")

        part = alone() if self._share is None else cast("Part", self._share(name, alone))
        _random.reseed(_random.key(self._record.seed, name, "rest"))  # the same, whether it was computed or not
        seen = [] if inside_transform() else [each for each in _tree.leaves(part) if not each.is_inference()]
        self.parts[name] = [(each, each._version) for each in seen]
        return part


def _tree_of_tensors(part: Part, what: str) -> Part:
    """`part`, if it is a tensor or tensors by name. Raises `UserError` if it is not."""
    named = part if isinstance(part, Mapping) else {"": part}
    for name, tensor in named.items():
        if not isinstance(tensor, torch.Tensor):
            where = f", '{name}'" if name else ""
            raise UserError(f"{what}{where}: expected a tensor, or tensors by name, got a {type(tensor).__name__}")
    return part


def _constant(choice: Any) -> Any:
    """`choice` with its tensors detached; whatever is neither tensor nor container stays as it is."""
    if isinstance(choice, torch.Tensor):
        return choice.detach()
    if isinstance(choice, Mapping):
        return {name: _constant(part) for name, part in choice.items()}
    if hasattr(choice, "_fields"):
        return type(choice)(*(_constant(part) for part in choice))
    return type(choice)(_constant(part) for part in choice) if isinstance(choice, (tuple, list)) else choice


def evaluate(
    level: Level,
    skeletons: Mapping[str, Skeleton],
    values: Mapping[str, Tree],
    buffers: Mapping[str, Mapping[str, Tensor]],
    record: Record,
    share: Share | None = None,
) -> tuple[Tensor, Aftermath]:
    """The loss of `level`, a zero-dimensional tensor, and what the evaluation leaves. Pure but for torch's global RNG.

    `share(name, compute)` gives what `Values.shared` does.

    Raises `UserError` for a loss that is not one number, for measurements that are no tensors, and for an objective that
    changes values or its batch in place. What an objective raises itself is told which level and iteration it was.
    """
    views: dict[str, Any] = {}
    tensors: list[Tensor] = []
    for name in level.reads:
        value, skeleton = values[name], skeletons.get(name)
        views[name] = value if skeleton is None else skeleton.view(value, buffers.get(name, _NO_BUFFERS))
        tensors += _tree.leaves(value)
    visible = Values(level.name, views, record, share)
    seen, before = ([], []) if inside_transform() else _with_versions(tensors, record.batch)
    _random.reseed(record.seed)
    assert level.objective is not None
    try:
        answer = level.objective(visible, record.batch)
    except UserError:
        raise
    except Exception as error:
        error.add_note(f"In the objective of level '{level.name}', iteration {record.iteration}{_where(error, level)}.")
        raise
    loss, measured = answer if isinstance(answer, tuple) and len(answer) == 2 else (answer, {})
    if before != list(map(_VERSION, seen)):
        raise ChangedInPlaceError(
            f"the objective of level '{level.name}' changed values or its batch in place; every evaluation of a step sees "
            "the same ones: work on a clone"
        )
    if visible.parts:
        _SHARING.add(level)
        _refuse_changed(visible.parts, level)
    if not (isinstance(loss, torch.Tensor) and loss.dim() == 0 and loss.is_floating_point()):
        raise _no_scalar(level, loss)
    if not isinstance(measured, (dict, Mapping)):
        raise UserError(f"the objective of level '{level.name}' must measure a mapping of numbers, got {measured!r}")
    numbers = {name: _measurement(level, name, value) for name, value in measured.items()} if measured else {}
    own = views[level.name]
    stood = own.buffers if type(own) is ModuleVariables else _NO_BUFFERS
    kept = {name: tensor.detach() for name, tensor in stood.items()} if stood else {}
    return loss, Aftermath(numbers, kept, visible.choices)


def shares(level: Level) -> bool:
    """Whether an evaluation of `level` had a part that is computed by `Values.shared`."""
    return level in _SHARING


def known_to_share(level: Level) -> None:
    """Note of `level` that it shares, as of one that takes the place of another."""
    _SHARING.add(level)


def _with_versions(tensors: list[Tensor], batch: Any) -> tuple[list[Tensor], list[int]]:
    """Those of `tensors` and in `batch` that know when they are written to, and how often that was."""
    waiting = [] if batch is None else [batch]
    while waiting:
        part = waiting.pop()
        if isinstance(part, torch.Tensor):
            tensors.append(part)
        elif isinstance(part, Mapping):
            waiting += part.values()
        elif isinstance(part, tuple | list):
            waiting += part
    try:
        return tensors, list(map(_VERSION, tensors))
    except RuntimeError:  # those of inference mode do not
        tensors = [tensor for tensor in tensors if not tensor.is_inference()]
        return tensors, list(map(_VERSION, tensors))


def _refuse_changed(parts: Mapping[str, Iterable[tuple[Tensor, int]]], level: Level) -> None:
    for name, part in parts.items():
        if any(tensor._version != version for tensor, version in part):
            raise UserError(
                f"the objective of level '{level.name}' changed what it shares as '{name}' in place; other evaluations see "
                "the same: work on a clone"
            )


def _where(error: Exception, level: Level) -> str:
    """Where in the objective's own file an error was raised, as far as that can be told."""
    objective: Any = level.objective
    function: Any = inspect.unwrap(getattr(objective, "function", objective))
    code = getattr(function, "__code__", None)
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if code and frame.filename == code.co_filename
    ]
    return f", {Path(code.co_filename).name}:{lines[-1]}" if code and lines else ""


def _no_scalar(level: Level, loss: Any) -> UserError:
    if isinstance(loss, torch.Tensor):
        shown = f"a {loss.dtype} tensor of shape {tuple(loss.shape)}" + ("; take its `.mean()`" if loss.dim() else "")
    else:
        shown = repr(loss) + ("; return the tensor, without `.item()`" if isinstance(loss, float) else "")
    return UserError(f"the objective of level '{level.name}' must give a scalar loss, got {shown}")


def _measurement(level: Level, name: Any, value: Any) -> Tensor:
    if isinstance(value, torch.Tensor | float | int):
        return torch.as_tensor(value).detach()
    raise UserError(
        f"the objective of level '{level.name}' measured '{name}': expected a tensor or a number, got {value!r}"
    )


def options_of(level: Level, skeletons: Mapping[str, Skeleton], values: Mapping[str, Tree]) -> dict[str, Tree] | None:
    """What the optimizer of `level` reads from other levels, as objectives see it; None where it reads nothing."""
    names = level.read_by_optimizer
    if not names:
        return None
    return {name: skeletons[name].constrained(values[name]) if name in skeletons else values[name] for name in names}
