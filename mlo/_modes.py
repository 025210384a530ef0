"""What surrounds an operation in torch: transforms, tracing, recording, the kernels of attention.

Every step asks a dozen times, so that all of this is as short as torch lets it be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch

if TYPE_CHECKING:
    from torch import Tensor

_C: Any = torch._C  # pyright: ignore[reportPrivateUsage]
_record: Callable[[bool], None] = _C._set_grad_enabled

inside_transform: Callable[[], object] = _C._functorch.peek_interpreter_stack
"""Whether a `torch.func` transform is active around us: the innermost one, or None."""

watchers: Callable[[], int] = _C._len_torch_dispatch_stack
"""How many stand between operations and what they do: tracers, tensors without numbers, counters of operations."""


def is_traced() -> bool:
    """Whether operations are written down for a compiler, and no number can be looked at."""
    return _C._get_dispatch_mode(_C._TorchDispatchModeKey.PROXY) is not None


def known(value: Tensor) -> float | None:
    """The number in a zero-dimensional tensor, where looking needs no waiting: on the CPU, neither inside a transform nor
    traced.
    """
    return value.item() if value.is_cpu and not (inside_transform() or is_traced()) else None


def may_overwrite() -> bool:
    """Whether what an operation gave, and nobody else holds, may be written to by the next one.

    It may not where operations are recorded, traced or watched, nor inside a transform, in which it may be the same for a
    whole batch of what is written.
    """
    return not (torch.is_grad_enabled() or inside_transform() or watchers())


class Recording:
    """Operations are recorded, inside: as `torch.enable_grad` does it, in a third of the time."""

    __slots__ = ("_before",)
    _on: ClassVar = True

    def __enter__(self) -> None:
        self._before = torch.is_grad_enabled()
        _record(self._on)

    def __exit__(self, *exception: object) -> None:
        _record(self._before)


@final
class NotRecording(Recording):
    """No operation is recorded, inside: as `torch.no_grad` does it."""

    __slots__ = ()
    _on: ClassVar = False


@final
class PlainAttention:
    """Attention by its formula alone. `sdpa_kernel(SDPBackend.MATH)` does the same and takes ten times as long."""

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        self._before = _flash_is_on(), _efficient_is_on(), _cudnn_is_on(), _formula_is_on()
        _turn_flash(False)
        _turn_efficient(False)
        _turn_cudnn(False)
        _turn_formula(True)

    def __exit__(self, *exception: object) -> None:
        flash, efficient, cudnn, formula = self._before
        _turn_flash(flash)
        _turn_efficient(efficient)
        _turn_cudnn(cudnn)
        _turn_formula(formula)


_flash_is_on, _turn_flash = _C._get_flash_sdp_enabled, _C._set_sdp_use_flash
_efficient_is_on, _turn_efficient = _C._get_mem_efficient_sdp_enabled, _C._set_sdp_use_mem_efficient
_cudnn_is_on, _turn_cudnn = _C._get_cudnn_sdp_enabled, _C._set_sdp_use_cudnn
_formula_is_on, _turn_formula = _C._get_math_sdp_enabled, _C._set_sdp_use_math
"""Of attention: whether each kernel is on, and what turns it on or off."""
