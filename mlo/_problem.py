"""What a problem hands to the framework: tables from the names used in YAML to functions.

A problem is a module with one function, `build(settings, context) -> mlo.Problem`, whose `settings` are annotated with
its own subclass of `mlo.Settings`: the graph's `data` must fit it. The options of objectives and variables are the
annotated keyword-only parameters of the functions, so that a wrong option is an error with a line and a column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, final

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mlo.stream import AbstractStream

Split: TypeAlias = Literal["validation", "test"]
"""The held-out data that an evaluation is about."""

_SMALLER_IS_BETTER = ("loss", "error", "distance")


def smaller_is_better(metric: str) -> bool:
    """Whether a metric is minimised, as one named …loss, …error or …distance is, or maximised, as any other."""
    return metric.endswith(_SMALLER_IS_BETTER)


class Settings(BaseModel):
    """The `data` section of a graph; a problem declares its own fields in a subclass."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


@final
@dataclass(frozen=True, kw_only=True)
class Context:
    """What a problem is built for: `seed` decides splits, `device` and `dtype` are where and how numbers are kept."""

    seed: int
    device: torch.device
    dtype: torch.dtype


@final
@dataclass(frozen=True, kw_only=True)
class Table:
    """A table a run prints and stores: `rows` hold text or numbers, in the order of `columns`."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | int | float | None, ...], ...]


@final
@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation found: numbers by name, and on demand tables and pictures (uint8, [height, width(, 3)])."""

    metrics: Mapping[str, float]
    tables: tuple[Table, ...] = ()
    pictures: Mapping[str, Tensor] = field(default_factory=dict[str, "Tensor"])


class Evaluate(Protocol):
    """Judges trained levels on one split of the data.

    `values` are seen as an objective sees them; networks are called with `training=False`. `model` lists the levels that
    make up the model, as the graph's `evaluation.model` says. `totals` holds, by level, what objectives have measured,
    summed over all steps so far. `complete` asks for tables and pictures too.
    """

    def __call__(
        self,
        values: Mapping[str, Any],
        split: Split,
        *,
        model: tuple[str, ...],
        totals: Mapping[str, Mapping[str, Tensor]],
        complete: bool,
    ) -> Evaluation:
        """Gives metrics named without their split: `balanced_accuracy`."""
        ...


@final
@dataclass(frozen=True, kw_only=True)
class Problem:
    """Functions by the names that graphs use.

    - `variables`: builders, `builder(*, option: type = default)` giving an `nn.Module`, tensors by name, or one tensor.
    - `objectives`: `objective(values, batch, *, option: type = default)` giving a loss, or a loss and measurements; one
      that is no mean over samples is declared by `@mlo.reduction("batch")`.
    - `streams`: what levels draw batches from; a plain iterable works, but resuming is then not exact.
    - `evaluate`: judges trained levels, see `Evaluate`.
    """

    variables: Mapping[str, Callable[..., Any]]
    objectives: Mapping[str, Callable[..., Any]]
    streams: Mapping[str, AbstractStream | Iterable[Any]] = field(default_factory=dict[str, "AbstractStream"])
    evaluate: Evaluate | None = None
