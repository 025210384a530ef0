"""Run an `nn.Module` on parameters and buffers that are given as data."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from copy import deepcopy
from itertools import chain
from typing import TYPE_CHECKING, Any, final

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.instancenorm import _InstanceNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.parallel import DataParallel, DistributedDataParallel

from mlo._chain import Watched, chain_of, is_observed
from mlo._constraint import Constraints
from mlo._errors import UserError
from mlo._reduction import current_group

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._types import Tree


@final
class Skeleton:
    """What stands between a level's numbers and what objectives see of them: a module's code, constraints, or both.

    The code is kept in one copy in training mode and one in evaluation mode, on the meta device. The caller's module is
    copied and never touched, not even its mode; a parameter that is not handed over cannot be replaced by a stale one,
    since there is none.
    """

    def __init__(self, variables: object, constraints: Constraints | None = None) -> None:
        module = variables if isinstance(variables, nn.Module) else None
        if module:
            refuse_wrapped(module)
        self.runs = module is not None
        self._modes = {mode: deepcopy(module).to("meta").train(mode) for mode in (True, False)} if module else {}
        self.chains = {mode: chain_of(copy) for mode, copy in self._modes.items()}
        """The module by its mode, where it is a chain of layers: what takes its place in calls that nobody watches."""
        self._places = {mode: _places(copy) for mode, copy in self._modes.items()}
        self.written = frozenset(name for name, _ in module.named_buffers()) if module else frozenset[str]()
        """Buffers, which a call may overwrite; frozen parameters, kept beside them, are only read."""
        self.ties = _ties(module) if module else {}
        """Second names of tensors that stand in several places, each with the name they are kept under."""
        self._batch_statistics = {mode: _batch_statistics(each, training=mode) for mode, each in self._modes.items()}
        self._constraints = constraints
        chained = any(chain is not None for chain in self.chains.values())
        self.may_be_watched = chained and constraints is None and not self.ties
        """Whether objectives see the very tensors that the optimizer moves, and a chain may be all that they go into."""

    def constrained(self, variables: Tree) -> Tree:
        """The numbers that objectives see, from those that the optimizer moves."""
        return variables if self._constraints is None else self._constraints.apply(variables)

    def view(self, value: Tree, buffers: Mapping[str, Tensor]) -> Any:
        """What objectives see: numbers, or a module that can be called, at these buffers."""
        if self._constraints is not None:
            value = self._constraints.apply(value)
        if not self.runs:
            return value
        assert isinstance(value, (dict, Mapping))
        return ModuleVariables(self, value, buffers)

    def complete(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """All tensors of the module by name, also by the second names of those that stand in several places."""
        tensors = {**parameters, **buffers} if buffers else parameters
        return {**tensors, **{name: tensors[first] for name, first in self.ties.items()}} if self.ties else tensors

    def __call__(
        self, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any], *, training: bool
    ) -> tuple[Any, Mapping[str, Tensor]]:
        """The module's output at `tensors`, see `complete`, and what these are after the call.

        A buffer may have been written to, or another tensor assigned in its place; torch puts the latter into the mapping
        it was given.
        """
        statistics = self._batch_statistics[training]
        if statistics is not None and current_group() is not None:
            raise UserError(
                f"'{statistics}' takes statistics of the batch, of which each of several processes sees a part: call the "
                "module with training=False, replace the layer (by GroupNorm, say), or run in one process"
            )
        places = self._places[training]
        stood = [(name, *places[name]) for name in tensors]
        before = [table[key] for _, table, key in stood]
        try:
            for name, table, key in stood:
                table[key] = tensors[name]
            output = self._modes[training](*args, **kwargs)
            after = {name: table[key] for name, table, key in stood if table.get(key) is not None}
        finally:
            for (_, table, key), tensor in zip(stood, before, strict=True):
                table[key] = tensor
        return output, {**tensors, **after}


def _places(module: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    """Where each parameter and buffer of `module` stands, by its name: a table and a key.

    Tensors are put there and taken away again around every call. `torch.func.functional_call` does the same and looks the
    places up each time, which costs half as much again as a small network itself.
    """
    places: dict[str, tuple[dict[str, Any], str]] = {}
    for prefix, part in module.named_modules():
        tables: tuple[dict[str, Any], ...] = part._parameters, part._buffers  # pyright: ignore[reportPrivateUsage]
        places |= {f"{prefix}.{key}" if prefix else key: (table, key) for table in tables for key in table}
    return places


def _ties(module: nn.Module) -> dict[str, str]:
    """Second names of tensors that stand in several places, each with the name they are kept under.

    Moving to the meta device unties them, and a kernel of the CPU may read a tensor that was left there without a word.
    """
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for prefix, part in module.named_modules():
        parameters = part.named_parameters(prefix, recurse=False, remove_duplicate=False)
        buffers = part.named_buffers(prefix, recurse=False, remove_duplicate=False)
        for name, tensor in chain(parameters, buffers):
            if (kept := first.setdefault(id(tensor), name)) != name:
                ties[name] = kept
    return ties


def _batch_statistics(module: nn.Module, *, training: bool) -> str | None:
    """The first part of `module`, by name and kind, whose output or buffers are computed from statistics of the batch."""
    for name, part in module.named_modules():
        tracked = getattr(part, "running_mean", None) is not None
        normalises = isinstance(part, _BatchNorm) and (training or not tracked)
        if normalises or (isinstance(part, _InstanceNorm) and training and tracked):
            return f"{name} ({type(part).__name__})" if name else type(part).__name__
    return None


def refuse_wrapped(module: nn.Module) -> None:
    """Raise `UserError` for a module that synchronises processes by itself, where the engine would not see it."""
    sharded = _known("torch.distributed.fsdp", "FullyShardedDataParallel", "FSDPModule")
    for part in module.modules():
        if isinstance(part, DistributedDataParallel | DataParallel):
            kind = type(part).__name__
            raise UserError(
                f"a module wrapped in {kind} would run with gradients that are not reduced: pass module.module"
            )
        kinds = [kind.__name__ for kind in sharded if isinstance(part, kind)]
        held = _known("torch.distributed.tensor", "DTensor")
        kinds += ["DTensor"] if any(isinstance(tensor, held) for tensor in part.parameters(recurse=False)) else []
        if kinds:
            raise UserError(
                f"a module whose parameters are sharded ({kinds[0]}) cannot be a level: every process holds all of them and "
                "a part of every batch; pass the plain module"
            )


def _known(module: str, *names: str) -> tuple[type, ...]:
    """Classes of `module` if anybody has imported it: doing so takes two seconds, and nothing is one of them before."""
    loaded = sys.modules.get(module)
    return tuple(getattr(loaded, name) for name in names if hasattr(loaded, name))


def numbers(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Clones of a module's trained parameters, and of its buffers with the parameters that do not require a gradient."""
    refuse_wrapped(module)
    parameters = {name: tensor.detach().clone() for name, tensor in module.named_parameters() if tensor.requires_grad}
    frozen = {name: tensor.detach().clone() for name, tensor in module.named_parameters() if not tensor.requires_grad}
    buffers = {name: tensor.detach().clone() for name, tensor in module.named_buffers()}
    return parameters, frozen | buffers


@final
class ModuleVariables(Mapping[str, "Tensor"]):
    """What an objective sees of a level whose variables are a module: parameters by name, and a call.

    `variables(x, training=True)` runs the module; further arguments are passed on. In training mode batch statistics are
    used and the buffers it updates are recorded, for the engine to keep if this is a real step of the level; a second
    call continues from the first one's.
    """

    def __init__(self, skeleton: Skeleton, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        self._skeleton = skeleton
        self._parameters = parameters
        self.buffers = buffers
        """The buffers after the calls so far, with the frozen parameters."""
        self._watched = parameters if type(parameters) is Watched else None

    def __getitem__(self, name: str) -> Tensor:
        if self._watched is not None:
            self._watched.elsewhere = True
        return self._parameters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def fixed(self) -> ModuleVariables:
        """The same module at the same numbers, held fixed.

        Derivatives of its calls reach their arguments and not this level, and the buffers they update are not kept.
        """
        parameters, buffers = (
            {name: tensor.detach() for name, tensor in each.items()} for each in (self._parameters, self.buffers)
        )
        return ModuleVariables(self._skeleton, parameters, buffers)

    def __call__(self, *args: Any, training: bool = True, **kwargs: Any) -> Any:
        """The module's output."""
        skeleton = self._skeleton
        chain = skeleton.chains[training]
        if chain is not None and len(args) == 1 and not kwargs and not is_observed():
            alone = not (self.buffers or skeleton.ties)
            tensors = self._parameters if alone else skeleton.complete(self._parameters, self.buffers)
            return chain(tensors, args[0], self._watched)
        if self._watched is not None:
            self._watched.elsewhere = True
        written = skeleton.written
        buffers = {name: tensor.clone() if name in written else tensor for name, tensor in self.buffers.items()}
        output, after = skeleton(skeleton.complete(self._parameters, buffers), args, kwargs, training=training)
        if training:
            self.buffers = {name: after[name] for name in buffers}
        return output
