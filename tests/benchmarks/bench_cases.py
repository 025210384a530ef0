"""The cases (A) to (G) of `docs/benchmarks.md`. `make bench` names this file; nothing else collects it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from benchmarks import by_hand, problems
from benchmarks.measure import Row, Times, agree, peak, times
from benchmarks.problems import DECAY, RATE, UPPER_RATE, Problem

from mlo.hypergradient import ConjugateGradient, FiniteDifference, Neumann, Unroll

Run = Callable[[], Any]


def sides(
    problem: Problem, method: Any, hand: Callable[..., by_hand.Found], steps: int, *options: Any, tolerance: float
):
    """A whole iteration by hand and by mlo, once their hypergradients are seen to agree."""
    graph = problem.graph(method, steps)
    state = graph.init()
    w, u = problem.tensors
    momentum = [torch.zeros_like(tensor) for tensor in w]
    adam = by_hand.Adam(u, UPPER_RATE)

    def differentiate() -> by_hand.Found:
        return hand(problem.inner, problem.outer, w, u, momentum, RATE, DECAY, *options)

    def iteration() -> None:
        adam.step(differentiate()[2])

    found = graph.hypergradient("u", state)
    agree(found.values() if isinstance(found, dict) else [found], differentiate()[2], tolerance)
    return iteration, lambda: graph.step(state)


def row(case: str, measured: Times, goal: float | None) -> Row:
    return Row(case, measured.by_hand, measured.mlo, measured.ratio, measured.quartiles, goal)


CASE_A = [
    ("unroll", Unroll(), by_hand.unroll, (1,), 1.12, 1e-5),
    ("finite differences", FiniteDifference(radius=0.01), by_hand.finite_difference, (0.01,), 1.12, 2e-2),
    ("Neumann 5", Neumann(terms=5, step_size=0.05), by_hand.neumann, (1, 5, 0.05), 1.05, 1e-5),
    ("CG 5", ConjugateGradient(iterations=5, damping=1.0), by_hand.conjugate_gradient, (1, 5, 1.0), 1.05, 1e-4),
]


@pytest.mark.parametrize(("name", "method", "hand", "options", "goal", "tolerance"), CASE_A)
def case_a(table, name, method, hand, options, goal, tolerance):
    hand_run, own_run = sides(problems.reweighting(), method, hand, 1, *options, tolerance=tolerance)
    table.append(row(f"A, {name}", times(hand_run, own_run), goal))


@pytest.mark.parametrize("width", [1024, 2048])
def case_a_wide(table, width):
    """One unrolled step of wider layers, in front of the same 128 samples."""
    hand, own = sides(problems.reweighting(width), Unroll(replay=False), by_hand.unroll, 1, 1, tolerance=1e-5)
    table.append(row(f"A, unroll, width {width}", times(hand, own), None))
    most = peak(hand), peak(own)
    table.append(Row(f"A, unroll, width {width}", *most, most[1] / most[0], None, None, "MiB"))


@pytest.mark.parametrize(("name", "method", "hand", "options", "tolerance"), [(*c[:4], c[5]) for c in CASE_A])
def case_a_compiled(table, name, method, hand, options, tolerance):
    """Compiled once before anything is timed."""
    problem = problems.reweighting()
    hand_run, own_run = sides(problem, method, hand, 1, *options, tolerance=tolerance)
    graph = problem.graph(method, 1, compile=True)
    state, _ = graph.step(graph.init())
    graph.step(state)
    table.append(row(f"A, {name}, compiled", times(hand_run, lambda: graph.step(state)), 0.7))
    table.append(row(f"A, {name}, compiled beside not compiled", times(own_run, lambda: graph.step(state)), None))


CASE_B = {"direct": Unroll(replay=False), "replayed": Unroll(replay=True), "checkpoints": Unroll(checkpoint="sqrt")}


@pytest.mark.parametrize("way", CASE_B)
@pytest.mark.parametrize("steps", [5, 20, 100, 1000])
def case_b(table, steps, way):
    """Always beside direct autograd: what replaying saves in memory it costs in time."""
    case = f"B, k = {steps}, {way}"
    hand, own = sides(problems.sample_weights(), CASE_B[way], by_hand.unroll, steps, steps, tolerance=1e-3)
    table.append(row(case, times(hand, own, pairs=3), 1.3 if (way, steps) == ("replayed", 100) else None))
    most = peak(hand), peak(own)
    table.append(Row(case, *most, most[1] / most[0], None, None, "MiB"))


def case_b_replayed_by_hand(table):
    """What the arithmetic of replaying costs, without `mlo`."""
    direct, _ = sides(problems.sample_weights(), CASE_B["direct"], by_hand.unroll, 100, 100, tolerance=1e-3)
    replayed, own = sides(problems.sample_weights(), CASE_B["replayed"], by_hand.replayed, 100, 100, tolerance=1e-3)
    table.append(row("B, k = 100, replayed by hand beside direct by hand", times(direct, replayed), None))
    table.append(row("B, k = 100, replayed beside replayed by hand", times(replayed, own), None))


def case_b_resnet(table):
    hand, own = sides(problems.resnet(), Unroll(replay=True), by_hand.unroll, 100, 100, tolerance=1e-1)
    table.append(row("B, ResNet, k = 100, replayed", times(hand, own, pairs=3), 1.25))
    most = peak(hand), peak(own)
    table.append(Row("B, ResNet, k = 100, replayed", *most, most[1] / most[0], None, 0.25, "MiB"))


CASE_C = [
    ("CG 10", ConjugateGradient(iterations=10, tolerance=0.0), by_hand.conjugate_gradient, (20, 10, 0.0), 1e-3),
    ("Neumann 10", Neumann(terms=10, step_size=0.5), by_hand.neumann, (20, 10, 0.5), 1e-4),
]


@pytest.mark.parametrize(("name", "method", "hand", "options", "tolerance"), CASE_C)
def case_c(table, name, method, hand, options, tolerance):
    hand_run, own_run = sides(problems.penalties(), method, hand, 20, *options, tolerance=tolerance)
    table.append(row(f"C, {name}", times(hand_run, own_run), 1.1))


def case_d(table):
    taken = dict[int, float]()
    for depth in (2, 4, 8, 16, 32):
        graph, hand = problems.ladder(depth)
        state = graph.init()
        agree([graph.hypergradient("u", state)], [hand()], 1e-5)
        measured = times(hand, lambda graph=graph, state=state: graph.hypergradient("u", state), seconds=4)
        table.append(row(f"D, depth {depth}", measured, None))
        taken[depth] = measured.mlo
    table.append(Row("D, depth 32 beside depth 8", taken[8], taken[32], taken[32] / taken[8], None, 6.0))


@pytest.mark.parametrize("steps", [5, 20, 100])
def case_e(table, steps):
    tolerance = {5: 1e-4, 20: 1e-2, 100: 1e-1}[steps]
    hand, own = sides(problems.resnet(), Unroll(replay=False), by_hand.unroll, steps, steps, tolerance=tolerance)
    table.append(row(f"E, k = {steps}", times(hand, own, pairs=3 if steps == 100 else 5, seconds=20), 1.05))


PAPER = Neumann(terms=5, step_size=1e-3)


def case_f(table):
    """Beside plain training with the same augmentation, in place of what is written by hand."""
    problem = problems.madao()
    plain = problem.graph(None)

    def iterations(graph: Any, count: int = 60) -> Any:
        state = graph.init()
        for number in range(count):
            state, _ = graph.step(state, problem.batches[number % 20])
        return state

    trained, (batch, another) = iterations(plain, 59), problem.batches[18:]
    before = {name: getattr(trained, name) for name in ("values", "buffers", "iteration")}
    least = peak(lambda: plain.step(trained, batch))
    found = dict[int, torch.Tensor]()
    for chunks in (1, 2, 4, 8):
        graph = problem.graph(replace(PAPER, chunks=chunks))
        case = "F, whole products" if chunks == 1 else f"F, {chunks} chunks"
        if chunks in (1, 4):
            measured = times(lambda: iterations(plain), lambda graph=graph: iterations(graph), seconds=0, pairs=3)
            table.append(row(f"{case}, 60 iterations", measured, 1.5))
        at = replace(graph.init(), **before)
        most = peak(lambda graph=graph, at=at: graph.step(at, batch))
        table.append(Row(case, least, most, most / least, None, None if chunks == 1 else 1.94, "MiB"))
        found[chunks] = indirect(graph, at, batch)
        other, beside = found[chunks], f"{case} beside whole products"
        if chunks == 1:
            other, beside = indirect(graph, at, another), f"{case} of another batch beside this one's"
        error = ((other - found[1]).norm() / found[1].norm()).item()
        cosine = torch.cosine_similarity(other, found[1], dim=0).item()
        table.append(Row(beside, None, error, cosine, None, None, "relative error, cosine"))


@pytest.mark.parametrize("width", [16, 32, 48, 64])
def case_g(table, width):
    """Finite differences beside the unrolled step, which stands in place of what is written by hand."""
    graphs, batches = problems.mgr(width)

    def iterations(graph: Any) -> Any:
        state = graph.init()
        for each in batches:
            state, _ = graph.step(state, each)
        return state

    unrolled, differences = (
        lambda name=name: iterations(graphs[name]) for name in ("mgr/second_order.yaml", "mgr.yaml")
    )
    table.append(row(f"G, width {width}, 10 iterations", times(unrolled, differences, seconds=20), 0.9))


def indirect(graph: Any, state: Any, batches: Any) -> torch.Tensor:
    """What reaches the policy through the classifier, in one vector."""
    return torch.cat([tensor.flatten() for tensor in graph.parts("policy", state, batches).indirect.values()])
