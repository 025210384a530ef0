"""The meta-gradient of the needs-aware graph against the composed one-step functions of Gala and Xie (2024), App. A.

A small smooth instance: tanh networks, softplus in place of the hinge, three classes. By hand, with plain autograd,

    W1' = step(W1; A),  G' = step(G; A, H),  W2' = step(W2; A, W1', G'),  F = L(W2', A, val) + γ L(W1', A, val)

Every place where A (or W1', which is read twice) enters gets a copy of its own, so that the gradient in each copy is
what arrives along one path, and a path that the engine drops cannot hide in the sum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from helpers import (
    HandUpdate,
    Tensors,
    flat,
    memory_of,
    normal,
    optimizers,
    relative_error,
    respond_by_hand,
    same_bits,
    sgd_by_hand,
)
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

import mlo

CLASSES, PIXELS, WIDTH, LATENT = 3, 4, 3, 2
WEIGHT, GAMMA, TEMPERATURE = 0.7, 1.3, 0.8  # λ of Eq. 5, γ of Eq. 6, T of Eq. 4; none is 1, so that none can be lost


# The networks and the losses of the paper. A is the last two layers, shared by W1, W2 and H.


def logits(encoder: Tensors, meta: Tensors, images: Tensor) -> Tensor:
    features = torch.tanh(images @ encoder["weight"] + encoder["bias"])
    return torch.tanh(features @ meta["hidden"]) @ meta["head"]


def generate(generator: Tensors, z: Tensor, labels: Tensor) -> Tensor:
    return torch.tanh(z @ generator["latent"] + generator["embedding"][labels])


def score(discriminator: Tensors, meta: Tensors, images: Tensor, labels: Tensor) -> Tensor:
    return logits(discriminator, meta, images).gather(1, labels[:, None]).squeeze(1)


def classification(w1: Tensors, meta: Tensors, batch: Any) -> Tensor:
    """Eq. 1."""
    return cross_entropy(logits(w1, meta, batch["images"]), batch["labels"])


def discrimination(h: Tensors, meta: Tensors, generator: Tensors, batch: Any) -> Tensor:
    """H's side of Eq. 2, the hinge made smooth."""
    on_real = score(h, meta, batch["images"], batch["labels"])
    on_fake = score(h, meta, generate(generator, batch["z"], batch["y"]), batch["y"])
    return softplus(1 - on_real).mean() + softplus(1 + on_fake).mean()


def generation(generator: Tensors, meta: Tensors, h: Tensors, batch: Any) -> Tensor:
    """G's side of Eq. 2."""
    return -score(h, meta, generate(generator, batch["z"], batch["y"]), batch["y"]).mean()


def class_need(w1: Tensors, meta: Tensors, validation: Any) -> Tensor:
    """p(s), Eq. 3, [classes]."""
    losses = cross_entropy(logits(w1, meta, validation["images"]), validation["labels"], reduction="none")
    means = torch.stack([losses[validation["labels"] == c].mean() for c in range(CLASSES)])
    return means / means.sum()


def draw_classes(p: Tensor, uniforms: Tensor) -> Tensor:
    """o_m ~ p by inverting its distribution function."""
    return (uniforms[:, None] > p.cumsum(0)[:-1]).sum(1)


def refinement(
    w2: Tensors,
    meta: Tensors,
    w1: Tensors,
    generator: Tensors,
    need_meta: Tensors,
    batch: Any,
    classes: Tensor | None,
    reference: Tensor | None = None,
) -> Tensor:
    """Eqs. 4 and 5. `classes` are those drawn by need; None is the relaxed variant. A enters p by `need_meta`.

    The sampled variant weights by p/stop(p); `reference` stands for stop(p) where p moves and stop(p) must not.
    """
    p = class_need(w1, need_meta, batch["validation"])
    if classes is None:
        classes = batch["y"]
        odds = (p / (1 - p))[classes].log() + batch["gumbel"][:, 0] - batch["gumbel"][:, 1]
        b = torch.sigmoid(odds / TEMPERATURE)
        weights = b / b.mean()
    else:
        weights = p[classes] / (p.detach() if reference is None else reference)[classes]
    generated = generate(generator, batch["z"], classes)
    on_generated = cross_entropy(logits(w2, meta, generated), classes, reduction="none")
    return cross_entropy(logits(w2, meta, batch["images"]), batch["labels"]) + WEIGHT * (weights * on_generated).mean()


def validation(w2: Tensors, w1: Tensors, meta: Tensors, batch: Any) -> Tensor:
    """Eq. 6."""
    return classification(w2, meta, batch) + GAMMA * classification(w1, meta, batch)


# The same as a graph.


def encoder(seed: int) -> Tensors:
    return {"weight": 0.6 * normal(PIXELS, WIDTH, seed=seed), "bias": 0.3 * normal(WIDTH, seed=seed + 1)}


def needs_aware(need: str, optimizer: Any, method: Any, *, second: bool = True) -> mlo.Graph:
    """The five levels of the paper."""

    def drawn(values: Any, batch: Any) -> Tensor | None:
        if need == "relaxed":
            return None
        return values.once(
            "classes",
            lambda: draw_classes(class_need(values["W1"], values["A"], batch["validation"]), batch["uniforms"]),
        )

    def refine(values: Any, batch: Any) -> Tensor:
        meta = values["A"]
        return refinement(values["W2"], meta, values["W1"], values["G"], meta, batch, drawn(values, batch))

    level = {"optimizer": optimizer, "hypergradient": method}
    return mlo.Graph(
        [
            mlo.Level(
                "A",
                objective=lambda values, batch: validation(values["W2"], values["W1"], values["A"], batch),
                variables={
                    "hidden": 0.8 * normal(WIDTH, WIDTH, seed=1),
                    "head": 0.8 * normal(WIDTH, CLASSES, seed=2),
                },
                subject_to=["W1", "W2", "G"],
                optimizer=mlo.optimizer.SGD(learning_rate=0.1),
            ),
            mlo.Level(
                "W1",
                objective=lambda values, batch: classification(values["W1"], values["A"], batch),
                variables=encoder(3),
                given=["A"],
                **level,
            ),
            mlo.Level(
                "G",
                objective=lambda values, batch: generation(values["G"], values["A"], values["H"], batch),
                variables={
                    "latent": normal(LATENT, PIXELS, seed=5),
                    "embedding": normal(CLASSES, PIXELS, seed=6),
                },
                given=["A"],
                against=["H"],
                **level,
            ),
            mlo.Level(
                "H",
                objective=lambda values, batch: discrimination(values["H"], values["A"], values["G"], batch),
                variables=encoder(7),
                given=["A"],
                against=["G"],
                **level,
            ),
            mlo.Level("W2", objective=refine, variables=encoder(9), given=["A", "W1", "G"], **level),
        ]
    )


def batches(iteration: int) -> dict[str, Any]:
    """One draw for all levels, as the streams of a run would give it; real, generated and validation images differ."""

    def labelled(seed: int, labels: list[int]) -> dict[str, Tensor]:
        return {"images": normal(len(labels), PIXELS, seed=seed), "labels": torch.tensor(labels)}

    seed = 1000 * (iteration + 1)
    source = torch.Generator().manual_seed(seed)
    noise = {
        "z": normal(5, LATENT, seed=seed + 1),
        "y": torch.tensor([0, 1, 2, 1, 0]),
        "uniforms": torch.rand(5, generator=source, dtype=torch.float64),
        "gumbel": -(-torch.rand(5, 2, generator=source, dtype=torch.float64).log()).log(),
    }
    train, whole = labelled(seed + 2, [0, 0, 0, 1, 1, 2]), labelled(77, [0, 1, 2, 0, 1, 2, 1])
    return {
        "W1": train,
        "G": noise,
        "H": train | noise,
        "W2": train | noise | {"validation": whole},
        "A": labelled(seed + 3, [2, 1, 0, 1, 2, 0, 1]),
    }


# By hand.


@dataclass(frozen=True)
class ByHand:
    """W1', G', W2'; p and what was drawn by it; F, and its gradient in A along every path."""

    ends: dict[str, Tensors]
    need: Tensor
    classes: Tensor | None
    value: Tensor
    paths: dict[str, Tensors]

    def through(self, name: str) -> Tensors:
        """All paths whose first arrow out of A is the response of `name`."""
        return total(path for key, path in self.paths.items() if key.split(" → ")[0] == name)


def total(trees: Any) -> Tensors:
    """The sum of trees with the same names."""
    trees = list(trees)
    return {name: sum(tree[name] for tree in trees) for name in trees[0]}


PATHS = [
    "W1 → F",  # Eq. 18: γ L(W1', A, val)
    "W1 → weights → W2 → F",  # Eq. 13, first term: through p(s) alone
    "G → images → W2 → F",  # Eq. 13, second term
    "W2 → F",  # ∂W2'/∂A at A in the layers, which Eq. 13 leaves out
    "need → W2 → F",  # ∂W2'/∂A at A in p(s)
    "F",  # explicit in both losses
]


def by_hand(
    state: mlo.State, draws: dict[str, Any], need: str, update: HandUpdate, drawn: ByHand | None = None
) -> ByHand:
    """Eqs. 8–12 written out. A has a copy for every path, on which W1' and G' are computed anew.

    With `drawn`, the classes and stop(p) are those of another solve.
    """
    meta = {
        path: {name: tensor.clone().requires_grad_() for name, tensor in state.values["A"].items()} for path in PATHS
    }
    at = state.values

    def first(a: Tensors) -> Tensors:  # Eq. 8
        return respond_by_hand(
            lambda w1, _: classification(w1, a, draws["W1"]), at["W1"], update, 1, memory_of(state, "W1")
        )

    w1 = {path: first(meta[path]) for path in PATHS if path.startswith("W1")}
    g = respond_by_hand(  # Eq. 9
        lambda g, _: generation(g, meta["G → images → W2 → F"], at["H"], draws["G"]),
        at["G"],
        update,
        1,
        memory_of(state, "G"),
    )
    with torch.no_grad():
        p = drawn.need if drawn else class_need(w1["W1 → F"], at["A"], draws["W2"]["validation"])
        classes = None if need == "relaxed" else draw_classes(p, draws["W2"]["uniforms"])

    def refined(w2: Tensors, _: int) -> Tensor:  # Eq. 11
        own, in_need = meta["W2 → F"], meta["need → W2 → F"]
        return refinement(w2, own, w1["W1 → weights → W2 → F"], g, in_need, draws["W2"], classes, p)

    w2 = respond_by_hand(refined, at["W2"], update, 1, memory_of(state, "W2"))
    value = validation(w2, w1["W1 → F"], meta["F"], draws["A"])  # Eq. 12, with γ
    leaves = [tensor for path in PATHS for tensor in meta[path].values()]
    found = iter(torch.autograd.grad(value, leaves))
    paths = {path: {name: next(found) for name in meta[path]} for path in PATHS}
    return ByHand({"W1": w1["W1 → F"], "G": g, "W2": w2}, p, classes, value, paths)


def parts_by_hand(oracle: ByHand) -> dict[str, Tensors]:
    """As `Graph.parts` names them: by the response that is the last arrow on the way back to A."""
    return {
        "total": total(oracle.paths.values()),
        "direct": oracle.paths["F"],
        "W1": oracle.through("W1"),
        "G": oracle.through("G"),
        "W2": total([oracle.through("W2"), oracle.through("need")]),
    }


def parts_of(graph: mlo.Graph, state: mlo.State, draws: dict[str, Any]) -> dict[str, Tensors]:
    parts = graph.parts("A", state, draws)
    assert set(parts.through) == {"W1", "G", "W2"}
    return {"total": parts.total, "direct": parts.direct, **parts.through}


@cache
def warm_state(need: str, optimizer: str) -> mlo.State:
    """After three iterations, so that momenta are not zero and levels are in general position."""
    graph = needs_aware(need, optimizers[optimizer][0], mlo.hypergradient.Unroll())
    state = graph.init(seed=0)
    for iteration in range(3):
        state, _ = graph.step(state, batches(iteration))
    return state


needs = pytest.mark.parametrize("need", ["sampled", "relaxed"])
inner_optimizers = pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adam"])


@needs
@inner_optimizers
def test_unroll_equals_autograd_through_the_composed_steps(need, optimizer):
    rule, update = optimizers[optimizer]
    state, draws = warm_state(need, optimizer), batches(3)
    oracle = by_hand(state, draws, need, update)
    found = parts_of(needs_aware(need, rule, mlo.hypergradient.Unroll()), state, draws)
    for name, right in parts_by_hand(oracle).items():
        assert relative_error(found[name], right) <= 1e-10, name


@needs
@inner_optimizers
def test_finite_differences_approach_it_at_second_order(need, optimizer):
    rule, update = optimizers[optimizer]
    state, draws = warm_state(need, optimizer), batches(3)
    right = parts_by_hand(by_hand(state, draws, need, update))

    def errors(radius: float) -> dict[str, float]:
        method = mlo.hypergradient.FiniteDifference(radius=radius)
        found = parts_of(needs_aware(need, rule, method), state, draws)
        return {name: relative_error(found[name], right[name]) for name in right}

    wide, middle, narrow = errors(0.02), errors(0.01), errors(0.005)
    assert max(middle.values()) <= 1e-3
    for name in ("total", "W1", "G", "W2"):
        assert 3.5 <= wide[name] / middle[name] <= 4.5, name
        assert 3.5 <= middle[name] / narrow[name] <= 4.5, name
    assert middle["direct"] <= 1e-14


@needs
@inner_optimizers
def test_leaving_out_any_path_would_be_noticed(need, optimizer):
    oracle = by_hand(warm_state(need, optimizer), batches(3), need, optimizers[optimizer][1])
    whole = flat(total(oracle.paths.values())).norm()
    for path, gradient in oracle.paths.items():
        assert flat(gradient).norm() > 1e-6 * whole, path


@needs
@inner_optimizers
def test_the_oracle_agrees_with_a_difference_of_whole_solves(need, optimizer):
    """The sum of the paths is the slope of F where A moves everywhere, and drawn classes and stop(p) stay as they are."""
    update = optimizers[optimizer][1]
    state, draws = warm_state(need, optimizer), batches(3)
    oracle = by_hand(state, draws, need, update)
    direction = {"hidden": normal(WIDTH, WIDTH, seed=20), "head": normal(WIDTH, CLASSES, seed=21)}

    def value(h: float) -> Tensor:
        moved = {name: state.values["A"][name] + h * direction[name] for name in direction}
        return by_hand(replace(state, values={**state.values, "A": moved}), draws, need, update, oracle).value

    slope = (value(1e-5) - value(-1e-5)) / 2e-5
    assert torch.allclose(slope, flat(total(oracle.paths.values())) @ flat(direction), rtol=1e-7)


@needs
@inner_optimizers
def test_one_iteration_is_algorithm_1(need, optimizer):
    """W1', G', H', W2' and A' after `Graph.step`, all by hand; H reads the G that stood when the iteration began."""
    rule, update = optimizers[optimizer]
    state, draws = warm_state(need, optimizer), batches(3)
    oracle = by_hand(state, draws, need, update)
    graph = needs_aware(need, rule, mlo.hypergradient.Unroll())
    after, metrics = graph.step(state, draws)
    at = state.values
    h = respond_by_hand(  # Eq. 10
        lambda h, _: discrimination(h, at["A"], at["G"], draws["H"]), at["H"], update, 1, memory_of(state, "H")
    )
    meta, _ = sgd_by_hand(0.1)(at["A"], total(oracle.paths.values()), (0, {}))  # Eq. 12
    for name, right in {**oracle.ends, "H": h, "A": meta}.items():
        assert relative_error(after.values[name], {key: tensor.detach() for key, tensor in right.items()}) <= 1e-12, (
            name
        )
    right = parts_by_hand(oracle)
    norms = metrics.norms["A"]
    measured = {"total": norms.total, "direct": norms.direct, **norms.through}
    for name, gradient in right.items():
        assert torch.allclose(measured[name], flat(gradient).norm(), rtol=1e-10), name
    indirect = flat(total(right[name] for name in ("W1", "G", "W2"))).norm()
    assert torch.allclose(norms.indirect, indirect, rtol=1e-10)
    assert torch.allclose(metrics.losses["A"], oracle.value, rtol=1e-12)
    assert metrics.pullbacks == (("A", "W2"), ("A", "W1"), ("A", "G"))


@needs
def test_step_and_hypergradient_see_the_same_responses(need):
    rule, _ = optimizers["nesterov"]
    state, draws = warm_state(need, "nesterov"), batches(3)
    graph = needs_aware(need, rule, mlo.hypergradient.FiniteDifference())
    moved = graph.step(state, draws)[0].values["A"]
    gradient = graph.hypergradient("A", state, draws)
    expected = {name: state.values["A"][name] - 0.1 * gradient[name] for name in gradient}
    assert relative_error(moved, expected) <= 1e-15
    assert same_bits(gradient, graph.parts("A", state, draws).total)
