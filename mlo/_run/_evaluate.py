"""Judge the levels of a run, and remember the best of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import torch

from mlo import _random
from mlo._errors import UserError, nearest
from mlo._problem import Evaluation, Split, smaller_is_better
from mlo._run import _generators
from mlo.spec._faults import Fault, kind_of, unknown

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._state import State
    from mlo.spec._build import Assembly


def evaluate(
    assembly: Assembly, state: State, totals: Mapping[str, Mapping[str, Tensor]], split: Split, *, complete: bool
) -> Evaluation:
    """The problem's own evaluation, without derivatives, on running statistics, with noise keyed by the seed."""
    found = _judged(assembly, state, totals, split, complete=complete)
    named = {f"{split}.{name}": float(value) for name, value in found.metrics.items()}
    return Evaluation(metrics=named, tables=found.tables, pictures=found.pictures)


def try_evaluation(assembly: Assembly, state: State) -> list[str]:
    """Evaluate `state` once, before anything is measured, and forget it: every random generator stays as it was.

    Returns the names of the validation metrics, none where they cannot be known yet. Raises `SpecError` for an evaluation
    that cannot be called, gives something else than an `Evaluation` of numbers, or has no metric of the name that selects:
    later, each of them would end a run that has begun.
    """
    spec, judge = assembly.spec, assembly.problem.evaluate
    if spec.evaluation is None or judge is None:
        return []

    def refuse(message: str, *key: str) -> None:
        spec.fail([Fault(("evaluation", *key), message, not key)])

    try:
        inspect.signature(judge).bind({}, "validation", model=(), totals={}, complete=False)
    except TypeError as error:
        refuse(f"the problem's evaluate(values, split, *, model, totals, complete) cannot be called so: {error}.")
    before = _generators.capture()
    try:
        found: Any = _judged(assembly, state, {}, "validation", complete=False)
    except KeyError:  # perhaps of what nothing has been measured of yet
        return []
    finally:
        _generators.restore(before)
    if not isinstance(found, Evaluation):
        refuse(f"the problem's evaluate must give an mlo.Evaluation, got {kind_of(found)}.")
    if not isinstance(found.metrics, Mapping):
        refuse(f"the problem's evaluate must give metrics by name, got {kind_of(found.metrics)}.")
    for name, value in found.metrics.items():
        try:
            float(value)
        except (TypeError, ValueError, RuntimeError):
            shape = f" of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else ""
            refuse(f"the problem's evaluate must give numbers, and the metric '{name}' is {kind_of(value)}{shape}.")
    metrics = [f"validation.{name}" for name in found.metrics]
    if spec.evaluation.select is not None and spec.evaluation.select not in metrics:
        refuse(unknown("metric", spec.evaluation.select, metrics), "select")
    return metrics


def _judged(
    assembly: Assembly, state: State, totals: Mapping[str, Mapping[str, Tensor]], split: Split, *, complete: bool
) -> Evaluation:
    judge = assembly.problem.evaluate
    assert judge is not None
    settings = assembly.spec.evaluation
    model = settings.model if settings and settings.model else assembly.graph.order
    values = assembly.graph.values(state)
    with _random.Preserved(), torch.no_grad():
        _random.reseed(_random.key(state.seed, "evaluation", split))
        return judge(values, split, model=model, totals=totals, complete=complete)


@final
@dataclass
class Selection:
    """Which of the states evaluated so far is the best by one metric; the later one on a tie.

    A metric named …loss, …error or …distance is minimised, any other maximised.
    """

    metric: str | None
    best: float | None = None
    iteration: int = field(default=0)

    @property
    def smaller_is_better(self) -> bool:
        """Whether the metric is minimised."""
        return self.metric is not None and smaller_is_better(self.metric)

    def line(self, metrics: Mapping[str, float]) -> str:
        """What to show of an evaluation: the metric that selects and the best it has been, or all metrics."""
        if self.metric is None or self.best is None:
            return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        return f"{self.metric} {metrics[self.metric]:.4g} (best {self.best:.4g} at {self.iteration})"

    def takes(self, metrics: Mapping[str, float], iteration: int) -> bool:
        """Whether the state at `iteration` is at least as good as the best so far, which it then replaces."""
        if self.metric is None:
            return False
        if self.metric not in metrics:
            known = ", ".join(sorted(metrics))
            raise UserError(
                f"evaluation.select: no metric named '{self.metric}'.{nearest(self.metric, metrics)}\n  Known: {known}."
            )
        value = metrics[self.metric]
        worse = self.best is not None and (value > self.best if self.smaller_is_better else value < self.best)
        if worse or value != value:
            return False
        self.best, self.iteration = value, iteration
        return True
