"""A chain of plain layers, run as the function of its tensors that it is.

A call of an `nn.Module` looks for hooks and for parameters by name, layer after layer; on a small network that takes twice
as long as the layers. What is a chain of torch's own layers without hooks is therefore called directly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, final

import torch
from torch import nn
from torch.nn.functional import linear
from torch.nn.modules import module as modules

if TYPE_CHECKING:
    from torch import Tensor

_FUNCTIONS: dict[type[nn.Module], Callable[[Any], Any]] = {nn.Sigmoid: torch.sigmoid, nn.Tanh: torch.tanh}
"""What these layers do: their own `forward` finds it out at every call."""

_CALL = nn.Module.__call__
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@final
class Chain:
    """The layers of an `nn.Sequential`, each a function, or the names of the weight and the bias of an `nn.Linear`."""

    def __init__(self, links: tuple[Callable[[Any], Any] | tuple[str, str | None], ...]) -> None:
        self._links = links

    def __call__(self, tensors: Mapping[str, Tensor], x: Any) -> Any:
        """What the module gives for one positional argument."""
        for link in self._links:
            if isinstance(link, tuple):
                weight, bias = link
                x = linear(x, tensors[weight], None if bias is None else tensors[bias])
            else:
                x = link(x)
        return x


def chain_of(module: nn.Module) -> Chain | None:
    """`module` as a chain; None if it is anything but torch's own layers one after the other, without hooks.

    Layers are `nn.Linear` and those that hold no tensors. The module must not be changed afterwards.
    """
    names = {id(part): f"{prefix}." if prefix else "" for prefix, part in module.named_modules()}
    links: list[Callable[[Any], Any] | tuple[str, str | None]] = []
    for layer in _layers(module):
        if layer is None:
            return None
        if type(layer) is nn.Linear:
            has_bias = layer._parameters["bias"] is not None  # pyright: ignore[reportPrivateUsage]
            name = names[id(layer)]
            links.append((f"{name}weight", f"{name}bias" if has_bias else None))
        elif type(layer) is nn.ReLU and not layer.inplace:
            links.append(torch.relu)
        else:
            links.append(_FUNCTIONS.get(type(layer), layer.forward))
    return Chain(tuple(links))


def is_observed() -> bool:
    """Whether somebody watches calls of all modules: hooks for every module, tracing, another `nn.Module.__call__`."""
    return bool(
        modules._global_forward_hooks  # pyright: ignore[reportPrivateUsage]
        or modules._global_forward_pre_hooks  # pyright: ignore[reportPrivateUsage]
        or modules._global_backward_hooks  # pyright: ignore[reportPrivateUsage]
        or modules._global_backward_pre_hooks  # pyright: ignore[reportPrivateUsage]
        or nn.Module.__call__ is not _CALL
        or torch._C._get_tracing_state()  # pyright: ignore[reportPrivateUsage]
    )


def _layers(module: nn.Module) -> list[nn.Module | None]:
    """The layers of nested `nn.Sequential`s in order, with None for what has to be called as it is."""
    state = vars(module)
    if any(state.get(hooks) for hooks in _HOOKS) or "forward" in state or state.get("_compiled_call_impl") is not None:
        return [None]
    if type(module) is nn.Sequential:
        return [layer for part in module for layer in _layers(part)]
    own = type(module).__module__.startswith("torch.nn.modules.")
    inside = state["_modules"] or state["_buffers"]
    if own and not inside and (type(module) is nn.Linear or not state["_parameters"]):
        return [module]
    return [None]
