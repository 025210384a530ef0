"""Where a run stands after its last finished iteration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, final

from mlo._graph import Cost
from mlo._run._checkpoint import Checkpoint
from mlo._run._evaluate import Selection
from mlo._run._warnings import warnings

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._level import Level
    from mlo._state import Metrics, State


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Standing:
    """One value, replaced as a whole: an interrupt finds the iteration before or the one after, never a part of it.

    - `totals`: what objectives have measured, summed over all steps, by level; what changes its shape, as measurements of
      single samples do, is summed over its entries too.
    - `counts`: what it has cost.
    - `norms`: by upper level, how many updates, and the sums of the norms of its hypergradient's parts.
    - `curvature`: by level, of how many pullbacks its method has reported the curvature, and how often it was negative.
    - `warnings`: by level and kind, the first of each.
    - `selection`: which state is the best, and `best`, that state; None while none is.
    """

    state: State
    selection: Selection
    totals: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict[str, "Mapping[str, Tensor]"])
    counts: Cost = field(default_factory=lambda: Cost(0, 0, 0))
    norms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, "Mapping[str, Any]"])
    curvature: Mapping[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    warnings: Mapping[str, Mapping[str, str]] = field(default_factory=dict[str, "Mapping[str, str]"])
    best: Checkpoint | None = None

    def after(self, state: State, metrics: Metrics, entry: Mapping[str, Any], levels: Mapping[str, Level]) -> Standing:
        """Where it stands one iteration later; `entry` holds the numbers of `metrics`."""
        totals = dict(self.totals)
        for level, measured in metrics.measured.items():
            sums = dict(totals.get(level, {}))
            for name, value in measured.items():
                sums[name] = _sum(sums.get(name), value.double() * levels[level].steps)
            totals[level] = sums
        done = (metrics.gradients, metrics.products, len(metrics.pullbacks))
        counts = Cost(*(before + now for before, now in zip(self.counts, done, strict=True)))
        norms = {**self.norms, **{upper: self._added(upper, seen) for upper, seen in entry["norms"].items()}}
        curvature = dict(self.curvature)
        for reports in entry.get("reports", {}).values():
            for level, report in reports.items():
                if "negative_curvature" in report:
                    seen, negative = curvature.get(level, (0, 0))
                    curvature[level] = (seen + 1, negative + (report["negative_curvature"] > 0))
        given = dict(self.warnings)
        for level, kind, text in warnings(entry, state.iteration):
            known = given.get(level, {})
            given[level] = known if kind in known else {**known, kind: text}
        return replace(
            self, state=state, totals=totals, counts=counts, norms=norms, curvature=curvature, warnings=given
        )

    def warned_since(self, before: Standing) -> list[str]:
        """The warnings that are new."""
        return [
            text
            for level, given in self.warnings.items()
            for kind, text in given.items()
            if kind not in before.warnings.get(level, {})
        ]

    def judged(self, found: Mapping[str, float]) -> Standing:
        """The same, after an evaluation that may have made it the best."""
        selection = replace(self.selection)
        taken = selection.takes(found, self.state.iteration)
        best = Checkpoint(state=self.state, totals=self.totals) if taken else self.best
        return replace(self, selection=selection, best=best)

    def checkpoint(self, generators: Mapping[str, Tensor], **more: Any) -> Checkpoint:
        """All of it but `best`, as it is kept, and `more` of what JSON holds."""
        selection = {"best": self.selection.best, "iteration": self.selection.iteration}
        gathered = {
            "counts": list(self.counts),
            "norms": self.norms,
            "curvature": self.curvature,
            "warnings": self.warnings,
            "selection": selection,
            **more,
        }
        return Checkpoint(state=self.state, totals=self.totals, generators=generators, gathered=gathered)

    @classmethod
    def restored(cls, latest: Checkpoint, best: Checkpoint | None, metric: str | None) -> Standing:
        """The reverse of `checkpoint`."""
        gathered = latest.gathered
        return cls(
            state=latest.state,
            selection=Selection(metric, **gathered["selection"]),
            totals=latest.totals,
            counts=Cost(*gathered["counts"]),
            norms=gathered["norms"],
            curvature={level: (seen, negative) for level, (seen, negative) in gathered.get("curvature", {}).items()},
            warnings=gathered["warnings"],
            best=best,
        )

    def mean_norms(self) -> Mapping[str, Any]:
        """For each upper level, the norms of the parts of its hypergradient, averaged over its updates."""
        return {
            upper: {
                "updates": sums["times"],
                "direct": sums["direct"] / sums["times"],
                "through": {lower: norm / sums["times"] for lower, norm in sorted(sums["through"].items())},
            }
            for upper, sums in self.norms.items()
        }

    def negative_curvature(self) -> Mapping[str, Any]:
        """For each level where a method met negative curvature, in how many of how many pullbacks."""
        return {
            level: {"pullbacks": seen, "negative": negative}
            for level, (seen, negative) in self.curvature.items()
            if negative
        }

    def _added(self, upper: str, seen: Mapping[str, Any]) -> Mapping[str, Any]:
        sums = self.norms.get(upper, {"times": 0, "direct": 0.0, "through": {}})
        through = {name: sums["through"].get(name, 0.0) + norm for name, norm in seen["through"].items()}
        return {
            "times": sums["times"] + 1,
            "direct": sums["direct"] + seen["direct"],
            "through": {**sums["through"], **through},
        }


def _sum(before: Tensor | None, added: Tensor) -> Tensor:
    if before is None:
        return added
    return before + added if before.shape == added.shape else before.sum() + added.sum()
