"""Options of an optimizer that are read from a level, and so can be learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, final

from mlo.schedule._abstract import Number

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._types import Tree


@final
@dataclass(frozen=True)
class Read:
    """An option of an optimizer that is read from a level: `SGD(learning_rate=Read("rates", "learning_rate"))`.

    The level that is read stands in the `given` of the one whose optimizer this is. What is read are its constrained values:
    `softplus` keeps a learning rate above 0, `sigmoid` a momentum below 1. They are read at every step, and the steps are
    differentiated in them: `Unroll` through the response of a level pulls a cotangent back to what its optimizer reads. A
    method that does not follow the steps would leave that part out, and is refused.

    - `level`: its name.
    - `name`: the tensor of that level; left out where the level is a single one. It is the option of all parameters. Where
      no tensor is called so, there must be one for each parameter, called `name.<parameter>`, or just like the parameter
      where `name` is left out.

    What is read is zero-dimensional, or shaped like the parameter: an option for each of its entries. `clip_norm` and
    `clip_value` are one zero-dimensional tensor.
    """

    level: str
    name: str | None = None

    def __str__(self) -> str:
        return self.level if self.name is None else f"{self.level}.{self.name}"

    def among(self, names: Sequence[str], parameters: Sequence[str]) -> dict[str, str]:
        """By parameter, the name of the tensor that is its option, of those called `names`; '' is a level's only tensor.

        A parameter that has none is absent.
        """
        only = "" if self.name is None else self.name
        if only in names:
            return dict.fromkeys(parameters, only)
        prefix = "" if self.name is None else f"{self.name}."
        return {parameter: f"{prefix}{parameter}" for parameter in parameters if f"{prefix}{parameter}" in names}


Option: TypeAlias = Number | Read
"""An option of an optimizer: a number, a schedule of one, or where it is read from."""


def options_read(optimizer: Any) -> Iterator[tuple[tuple[str, ...], Read]]:
    """Where the options of `optimizer` that are read stand, `("groups", "*.bias", "momentum")`, and what they read."""
    for name, option in vars(optimizer).items():
        if isinstance(option, Read):
            yield (name,), option
    for pattern, changes in (optimizer.groups or {}).items():
        yield from ((("groups", pattern, name), option) for name, option in changes.items() if isinstance(option, Read))


def tensors_read(read: Read, values: Mapping[str, Tree] | None, parameters: Sequence[str]) -> dict[str, Tensor]:
    """By parameter, the tensor that is its option; `values` are those of the levels that are read, constrained."""
    if values is None or read.level not in values:
        raise TypeError(
            f"an optimizer that reads from '{read.level}' takes steps through mlo.optimizer.updated, with its values"
        )
    tree = values[read.level]
    tensors = tree if isinstance(tree, Mapping) else {"": tree}
    return {parameter: tensors[name] for parameter, name in read.among(tuple(tensors), parameters).items()}
