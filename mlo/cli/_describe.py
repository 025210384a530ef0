"""What `check` and `--dry-run` say about a graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mlo import _structure
from mlo._draw._facts import method, middle
from mlo._run._batches import Source
from mlo.optimizer import options_read

if TYPE_CHECKING:
    from rich.console import Console

    from mlo._graph import Graph
    from mlo.spec import Spec
    from mlo.spec._build import Assembly


def probe(assembly: Assembly) -> None:
    """Take every derivative once from fresh values. Raises `GraphError` for a level that is disconnected."""
    spec, graph = assembly.spec, assembly.graph
    source = Source(streams=assembly.streams, names=assembly.batches, seed=spec.seed, device=torch.device(spec.device))
    source.probe(graph, graph.init(seed=spec.seed))


def describe(assembly: Assembly, console: Console) -> None:
    """Run order, what every upper level differentiates through and holds fixed, where levels start, and the cost."""
    graph = assembly.graph
    lines = [f"{assembly.spec.name}: {len(graph.order)} levels, {assembly.iterations:,} iterations"]
    lines.append(f"run order: {' → '.join(graph.order)}")
    for name in graph.order:
        lines += _upper_lines(assembly.spec, graph, name)
    for name, level in graph.levels.items():
        reads = [f"{path[-1]} ← {read}" for path, read in options_read(level.optimizer)] if level.optimizer else []
        lines += [f"{name}'s optimizer reads: {', '.join(dict.fromkeys(reads))}"] if reads else []
    frozen = [name for name, level in graph.levels.items() if level.frozen]
    if frozen:
        lines.append(f"constant: {', '.join(frozen)}")
    for level, start in assembly.spec.starts.items():
        lines.append(f"{level} starts from {start.name}")
    lines += [f"notice: {notice}" for notice in assembly.notices]
    cost = graph.cost(assembly.iterations)
    most = "at most " if _may_stop_early(graph) else ""
    rebuilt = "at most " if _may_stop_early(graph, divided=True) else ""
    least = "at least " if _is_deep(graph) else ""
    passes = f"{rebuilt or least}{cost.gradients:,} gradients, {most}{cost.products:,} products"
    lines.append(f"cost: {passes}, {cost.pullbacks:,} pullbacks")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _may_stop_early(graph: Graph, *, divided: bool = False) -> bool:
    """Whether a response is pulled back by a method with a tolerance; and `divided` takes a gradient for each product."""
    pulled = {lower for level in graph.levels.values() for lower in _structure.differentiated(level, graph.levels)}
    methods = [graph.levels[name].hypergradient for name in pulled]
    return any(method.may_stop and (method.divides_into > 1 or not divided) for method in methods)


def _is_deep(graph: Graph) -> bool:
    """Whether a nest has more than three levels, of which the cost is known from below only."""
    middle = _structure.nested(graph.levels)
    return any(set(_structure.differentiated(graph.levels[name], graph.levels)) & middle for name in middle)


def _upper_lines(spec: Spec, graph: Graph, name: str) -> list[str]:
    level = graph.levels[name]
    below = [lower for lower in reversed(graph.order) if lower in _structure.differentiated(level, graph.levels)]
    if not below:
        return []
    methods = ", ".join(f"{lower} ({method(spec.levels[lower])})" for lower in below)
    paths = _structure.held_fixed(level, graph.levels)
    held = "; ".join(" → ".join(path) for path in paths) or "nothing"
    follows = middle(spec, name)
    first = f"{name} differentiates through: {methods}"
    if follows is not None:
        first = f"{name} {follows}, {_passes(graph, name)}"
    return [first, f"{name} holds fixed: {held}"]


def _passes(graph: Graph, name: str) -> str:
    """What a pullback of level `name`, in the middle, costs for the level above that makes it most expensive."""
    above = [upper for upper, level in graph.levels.items() if name in _structure.differentiated(level, graph.levels)]
    cost = max((graph.cost_of_pullback(upper, name) for upper in above), key=sum)
    most = "at most " if _may_stop_early(graph) else ""
    return f"{most}{cost.gradients + cost.products:,} reverse passes a pullback"
