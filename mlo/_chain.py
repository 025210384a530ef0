"""A chain of plain layers, run as the function of its tensors that it is.

A call of an `nn.Module` looks for hooks and for parameters by name, layer after layer; on a small network that takes twice
as long as the layers. What is a chain of torch's own layers without hooks is therefore called directly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from types import BuiltinFunctionType
from typing import TYPE_CHECKING, Any, TypeAlias, final

import torch
from torch import nn, overrides
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.functional import linear
from torch.nn.modules import module as modules

from mlo._modes import is_traced

if TYPE_CHECKING:
    from torch import Tensor

_FUNCTIONS: dict[type[nn.Module], Callable[[Any], Any]] = {nn.Sigmoid: torch.sigmoid, nn.Tanh: torch.tanh}
"""What these layers do: their own `forward` finds it out at every call."""

_C: Any = torch._C  # pyright: ignore[reportPrivateUsage]
_function_modes: Callable[[], Iterable[object]] = overrides._get_current_function_mode_stack  # pyright: ignore[reportPrivateUsage]
_is_wrapped: Callable[[Any], bool] = _C._functorch.is_functorch_wrapped_tensor
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


Layer: TypeAlias = "tuple[str, str | None, Tensor, Tensor, int, int]"
"""A linear layer as it was run: the names of its weight and bias, what went in, what came out, and their versions then."""

IMAGES = 2
"""How many numbers may come out of the layers that are watched, in copies of the leaves: as many go through them again."""


@final
class Watched(dict[str, "Tensor"]):
    """Leaves by name that learn whether a value depends on them through linear layers of a chain and in no other way.

    Whoever hands one of them out, or uses it otherwise, says so by `elsewhere`.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.elsewhere = False
        self._layers: list[Layer] = []
        self._differentiated: list[bool] = []
        self._hooks: list[dict[int, Any]] = []
        self._closed = False

    def begin(self, x: Any) -> bool:
        """Whether a chain that is run on `x` has to be noted, layer by layer."""
        if self._closed:  # it is run again for what a checkpoint let go of
            return False
        if self.elsewhere or _is_unusual() or not _is_plain(x):
            self._give_up()
        return not self.elsewhere

    def left(self, x: Any, run: list[Layer]) -> Any:
        """What a chain gives in place of `x`, which came out of it after `run`, the layers that are not held fixed.

        If it is differentiated before `close`, the value depends on its layers in other ways. Nobody is given the tensor
        itself that came out of a layer: a hook on it would change what is found there.
        """
        for layer in run:
            weight, bias, _, after, _, _ = layer
            trained = weight in self and (bias is None or bias in self)
            if not (trained and after.requires_grad and (type(after) is torch.Tensor or _is_of_trace(after))):
                self._give_up()
                return x
        self._layers += run
        if not self._layers:
            return x
        seen = self._differentiated  # a hook is out of the sight of Python's collector: it holds nothing else

        def differentiated(gradient: object) -> None:
            seen.append(True)

        last: Any = self._layers[-1][3]
        self._hooks.append({0: differentiated})
        last._backward_hooks = self._hooks[-1]  # as `register_hook` does, without a handle
        last.grad_fn._register_hook_dict(last)
        return x.clone() if x is last else x

    def __deepcopy__(self, memo: dict[int, Any]) -> Watched:
        """Other leaves, which nobody watches."""
        other = Watched(deepcopy(dict(self), memo))
        other._closed = True
        return other

    def close(self) -> list[Layer]:
        """The value is there: the layers it depends on, if there is nothing else and what went through them stayed the same.

        Nothing where more would be held than `IMAGES` copies of the leaves.
        """
        for hooks in self._hooks:
            hooks.clear()
        layers, self._layers, self._hooks, self._closed = self._layers, [], [], True
        if self.elsewhere or self._differentiated or not layers:
            return []
        held = 0
        for _, _, before, after, stood, came in layers:
            if before._version != stood or after._version != came:
                return []
            held += after.numel()
        return layers if held <= IMAGES * sum(map(torch.numel, self.values())) else []

    def _give_up(self) -> None:
        self.elsewhere = True
        self._layers = []


def _is_plain(tensor: Any) -> bool:
    """Whether it is a tensor by itself: of no subclass, inside no transform, dense and real."""
    plain = type(tensor) is torch.Tensor or _is_of_trace(tensor)
    plain = plain and not _is_wrapped(tensor) and not tensor.is_inference()
    return plain and tensor.layout is torch.strided and tensor.is_floating_point()


def _is_unusual() -> bool:
    """Whether layers do more than they seem to.

    Where nothing is recorded, a checkpoint may be about to run them again, and what one would let go of must not be held. In
    forward mode tensors carry tangents past what comes out of a layer; autocast makes others of them; and somebody may stand
    between functions and what they do.
    """
    return (
        not torch.is_grad_enabled()
        or torch.is_inference_mode_enabled()
        or _C._autograd._top_saved_tensors_default_hooks(True) is not None
        or forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage]
        or _C._is_any_autocast_enabled()
        or (_C._len_torch_function_stack() > 0 and not _are_of_trace(_function_modes()))
    )


_TRACING = "torch._subclasses.fake_tensor", "torch.fx.experimental.proxy_tensor"
"""Where the tensors and the function modes of a trace come from. The modes note what is called, and change nothing."""


def _is_of_trace(thing: object) -> bool:
    return type(thing).__module__ in _TRACING and is_traced()


def _are_of_trace(things: Iterable[object]) -> bool:
    return all(map(_is_of_trace, things))


@final
class Chain:
    """The layers of an `nn.Sequential`: each a function, or None and the names of the weight and bias of an `nn.Linear`."""

    def __init__(self, links: tuple[tuple[Callable[[Any], Any] | None, str, str | None], ...]) -> None:
        self._links = links

    def __call__(self, tensors: Mapping[str, Tensor], x: Any, watched: Watched | None = None) -> Any:
        """What the module gives for one positional argument; `watched` learns of the linear layers."""
        run: list[Layer] = []
        noted = watched if watched is not None and watched.begin(x) else None
        for function, weight, bias in self._links:
            if function is not None:
                x = function(x)
                continue
            before, x = x, linear(x, tensors[weight], None if bias is None else tensors[bias])
            if noted is not None and (weight in noted or bias in noted):
                run.append((weight, bias, before, x, before._version, x._version))
        return x if noted is None else noted.left(x, run)


def chain_of(module: nn.Module) -> Chain | None:
    """`module` as a chain; None if it is anything but torch's own layers one after the other, without hooks.

    Layers are `nn.Linear` and those that hold no tensors. The module must not be changed afterwards.
    """
    names = {id(part): f"{prefix}." if prefix else "" for prefix, part in module.named_modules()}
    links: list[tuple[Callable[[Any], Any] | None, str, str | None]] = []
    for layer in _layers(module):
        if layer is None:
            return None
        if type(layer) is nn.Linear:
            has_bias = layer._parameters["bias"] is not None  # pyright: ignore[reportPrivateUsage]
            name = names[id(layer)]
            links.append((None, f"{name}weight", f"{name}bias" if has_bias else None))
        elif type(layer) is nn.ReLU and not layer.inplace:
            links.append((torch.relu, "", None))
        else:
            links.append((_FUNCTIONS.get(type(layer), layer.forward), "", None))
    return Chain(tuple(links))


_FOR_ALL = (
    modules._global_forward_hooks,  # pyright: ignore[reportPrivateUsage]
    modules._global_forward_pre_hooks,  # pyright: ignore[reportPrivateUsage]
    modules._global_backward_hooks,  # pyright: ignore[reportPrivateUsage]
    modules._global_backward_pre_hooks,  # pyright: ignore[reportPrivateUsage]
)
"""Hooks for every module, which are registered here."""


def is_observed() -> bool:
    """Whether somebody watches calls of all modules: hooks for every module, tracing, functions in place of torch's own."""
    return _calls() != _CALLS or any(_FOR_ALL) or _C._get_tracing_state() is not None


def _calls() -> tuple[object, ...]:
    """What stands between a call of a chain and its arithmetic."""
    call: object = nn.Module._call_impl  # pyright: ignore[reportPrivateUsage]
    layers = nn.Sequential.forward, nn.Linear.forward, nn.ReLU.forward, nn.Sigmoid.forward, nn.Tanh.forward
    return (nn.Module.__call__, call, functional.linear, *layers)


def _is_torchs(call: Any) -> bool:
    """Whether it is torch's own function. Who replaced one may have been here before us."""
    home: str = getattr(call, "__globals__", {}).get("__name__", "")
    return isinstance(call, BuiltinFunctionType) or home.partition(".")[0] == "torch"


_CALLS = _calls() if all(map(_is_torchs, _calls())) else None


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
