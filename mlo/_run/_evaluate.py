"""Judge the levels of a run, and remember the best of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

import torch

from mlo import _random
from mlo._errors import UserError, nearest
from mlo._problem import Evaluation, Split

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._state import State
    from mlo.spec._build import Assembly

_SMALLER_IS_BETTER = ("loss", "error", "distance")


def evaluate(
    assembly: Assembly, state: State, totals: Mapping[str, Mapping[str, Tensor]], split: Split, *, complete: bool
) -> Evaluation:
    """The problem's own evaluation, without derivatives, on running statistics, with noise keyed by the seed."""
    judge = assembly.problem.evaluate
    assert judge is not None
    settings = assembly.spec.evaluation
    model = settings.model if settings and settings.model else assembly.graph.order
    values = assembly.graph.values(state)
    with _random.preserved(), torch.no_grad():
        _random.reseed(_random.key(state.seed, "evaluation", split))
        found = judge(values, split, model=model, totals=totals, complete=complete)
    named = {f"{split}.{name}": float(value) for name, value in found.metrics.items()}
    return Evaluation(metrics=named, tables=found.tables, pictures=found.pictures)


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
        return self.metric is not None and self.metric.endswith(_SMALLER_IS_BETTER)

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
