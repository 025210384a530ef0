"""Consistency between two views: closed forms of the losses, hand-computed thresholds, and which gradients there are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import cosine_similarity, cross_entropy

import mlo
from problems.blocks import consistency
from problems.blocks.consistency import SelfAdaptiveThresholds, Targets, Thresholds, WithThresholds

DISTANCES = ("pcr", "scr", "l1", "l2", "smooth_l1")
distances = pytest.mark.parametrize("name", DISTANCES)


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(dtype)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


def logits_of(*rows: tuple[float, ...]) -> Tensor:
    """Logits whose softmax is these probabilities."""
    return torch.tensor(rows).log()


# features


@distances
def test_equal_features_are_no_distance_apart(name):
    features = normal(5, 7)
    assert getattr(consistency, name)(features, features.clone()).abs() < 1e-12


def test_distances_of_features_are_those_written_out():
    a, b = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[0.0, 4.5], [1.0, 0.0]])
    assert consistency.pcr(a, b) == pytest.approx((9 + 0.25 + 1 + 4) / 2)
    assert consistency.l2(a, b) == consistency.pcr(a, b)
    assert consistency.l1(a, b) == pytest.approx((3 + 0.5 + 1 + 2) / 2)
    assert consistency.smooth_l1(a, b) == pytest.approx((2.5 + 0.125 + 0.5 + 1.5) / 2)
    assert consistency.smooth_l1(a, b, beta=4.0) == pytest.approx((9 + 0.25 + 1 + 4) / 8 / 2)
    assert consistency.scr(a, b) == pytest.approx(1 - (18 / (5 * 4.5) + 0) / 2)


def test_scr_is_torchs_cosine_similarity_and_does_not_see_lengths():
    a, b = normal(6, 3, 2, 2), normal(6, 3, 2, 2, seed=1)
    expected = 1 - cosine_similarity(a.flatten(1), b.flatten(1)).mean()
    assert consistency.scr(a, b) == pytest.approx(expected.item(), rel=1e-10)
    assert consistency.scr(3 * a, 0.5 * b) == pytest.approx(expected.item(), rel=1e-10)
    assert consistency.scr(a, -a) == pytest.approx(2, rel=1e-10)


def test_scr_of_zero_features_has_finite_derivatives_to_second_order():
    a = torch.zeros(2, 3, requires_grad=True)
    (slope,) = torch.autograd.grad(consistency.scr(a, a + normal(2, 3)), a, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), a)
    assert slope.isfinite().all()
    assert curvature.isfinite().all()


@distances
def test_both_views_are_differentiated(name):
    """No gradient is stopped: central differences in either view, and in second order."""
    loss: Callable[[Tensor, Tensor], Tensor] = getattr(consistency, name)
    a, b = normal(3, 4).requires_grad_(), normal(3, 4, seed=1).requires_grad_()
    assert gradcheck(loss, (a, b))
    assert gradgradcheck(loss, (a, b))
    assert all((slope != 0).all() for slope in torch.autograd.grad(loss(a, b), (a, b)))


def test_pcr_gives_the_head_no_gradient_and_the_features_all_of_it():
    """MGR, Eq. 6: with PCR the gradient in ω is that of cross-entropy, bit for bit; with UDA it is not."""
    images, labels, generated = normal(8, 5), torch.arange(8) % 3, normal(6, 5, seed=1)
    transformed = generated + 0.3 * normal(6, 5, seed=2)
    psi, omega = normal(4, 5, seed=3).requires_grad_(), normal(3, 4, seed=4).requires_grad_()

    def features(x: Tensor) -> Tensor:
        return torch.tanh(x @ psi.T)

    supervised = cross_entropy(features(images) @ omega.T, labels)
    regularised = supervised + 0.7 * consistency.pcr(features(transformed), features(generated))
    matched = supervised + 0.7 * consistency.uda(
        features(generated) @ omega.T, features(transformed) @ omega.T, confidence=0.0
    )
    plain, with_pcr, with_uda = (
        torch.autograd.grad(loss, (psi, omega), retain_graph=True) for loss in (supervised, regularised, matched)
    )
    assert torch.equal(with_pcr[1], plain[1])
    assert not torch.equal(with_uda[1], plain[1])
    # ∂/∂ψ ‖tanh ψu − tanh ψv‖², by hand, through both views
    u, v = features(transformed), features(generated)
    by_hand = 2 / 6 * (((u - v) * (1 - u**2)).T @ transformed - ((u - v) * (1 - v**2)).T @ generated)
    assert torch.allclose(with_pcr[0] - plain[0], 0.7 * by_hand, rtol=1e-12, atol=1e-14)


# gaps


def test_gaps_are_those_written_out():
    a, b = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[0.0, 2.0], [3.0, 4.0]])
    assert consistency.paired_gap(a, b) == pytest.approx((1 + 16) / 2)
    assert consistency.batch_mean_gap(a, b) == pytest.approx(0.5**2 + 2**2)
    assert consistency.batch_mean_gap(a, b.repeat(3, 1)) == pytest.approx(0.5**2 + 2**2)


@pytest.mark.parametrize("bandwidth", [None, 1.7])
def test_mmd_is_its_double_sum(bandwidth):
    a, b = normal(5, 3), normal(7, 3, seed=1) + 0.5
    multiples = (0.25, 0.5, 1.0, 2.0, 4.0)
    apart = [math.dist(a[i].tolist(), a[j].tolist()) ** 2 for i in range(5) for j in range(5) if i != j]
    squared = bandwidth**2 if bandwidth else sum(apart) / len(apart)

    def kernel(x: Tensor, y: Tensor) -> float:
        distance = math.dist(x.tolist(), y.tolist()) ** 2
        return sum(math.exp(-distance / (2 * s * squared)) for s in multiples) / len(multiples)

    def mean(left: Tensor, right: Tensor) -> float:
        return sum(kernel(x, y) for x in left for y in right) / (len(left) * len(right))

    expected = mean(a, a) + mean(b, b) - 2 * mean(a, b)
    assert consistency.mmd(a, b, bandwidth=bandwidth) == pytest.approx(expected, rel=1e-10)
    assert expected > 0.01
    assert consistency.mmd(a, a.flip(0), bandwidth=bandwidth).abs() < 1e-14


def test_mmd_of_one_point_to_another_is_in_closed_form():
    """Two batches that are each one point, r apart: 2 − 2 exp(−r²/2σ²)."""
    a, b = torch.zeros(4, 2), torch.tensor([[0.6, 0.8]]).expand(3, 2)
    found = consistency.mmd(a, b, bandwidth=2.0, multiples=(1.0,))
    assert found == pytest.approx(2 - 2 * math.exp(-1 / 8), rel=1e-12)
    assert consistency.mmd(a, b).isfinite()


@pytest.mark.parametrize("name", ["paired_gap", "batch_mean_gap", "mmd"])
def test_gaps_are_differentiated_to_second_order(name):
    gap: Callable[[Tensor, Tensor], Tensor] = getattr(consistency, name)
    a, b = normal(3, 2).requires_grad_(), (normal(3, 2, seed=1) + 1).requires_grad_()
    assert gradcheck(gap, (a, b))
    assert gradgradcheck(gap, (a, b))


# pseudo labels


def test_uda_is_the_cross_entropy_with_sharpened_targets_written_out():
    weak, strong = logits_of((0.9, 0.1), (0.3, 0.7)), logits_of((0.6, 0.4), (0.5, 0.5))
    sharp = [0.9**2.5 / (0.9**2.5 + 0.1**2.5), 0.1**2.5 / (0.9**2.5 + 0.1**2.5)]  # 1/T = 2.5; 0.7 is below 0.8
    expected = -(sharp[0] * math.log(0.6) + sharp[1] * math.log(0.4)) / 2
    assert consistency.uda(weak, strong) == pytest.approx(expected, rel=1e-12)


def test_fixmatch_is_the_cross_entropy_with_the_likeliest_class_written_out():
    weak, strong = logits_of((0.02, 0.98), (0.06, 0.94)), logits_of((0.6, 0.4), (0.5, 0.5))
    assert consistency.fixmatch(weak, strong) == pytest.approx(-math.log(0.4) / 2, rel=1e-12)
    everything = -(math.log(0.4) + math.log(0.5)) / 2
    assert consistency.fixmatch(weak, strong, threshold=0.94 - 1e-12) == pytest.approx(everything, rel=1e-12)


def test_masks_at_their_edges():
    """UDA counts what is above its confidence, FixMatch what reaches its threshold, FreeMatch what is above it."""
    even = torch.zeros(1, 4)  # probabilities of exactly 1/4
    assert consistency.uda_targets(even, confidence=0.25).kept.tolist() == [0]
    assert consistency.uda_targets(even, confidence=math.nextafter(0.25, 0)).kept.tolist() == [1]
    assert consistency.fixmatch_targets(even, threshold=0.25).kept.tolist() == [1]
    assert consistency.fixmatch_targets(even, threshold=math.nextafter(0.25, 1)).kept.tolist() == [0]
    for level, kept in ((0.25, 0), (math.nextafter(0.25, 0), 1)):
        thresholds = Thresholds(torch.full((4,), level), torch.full((4,), 0.25), torch.full((4,), 0.25))
        assert consistency.freematch_targets(even, thresholds).kept.tolist() == [kept]


@pytest.mark.parametrize("temperature", [1e-3, 0.4, 1.0])
def test_the_mask_of_uda_does_not_see_the_sharpening(temperature):
    weak = logits_of((0.79, 0.21), (0.81, 0.19))
    assert consistency.uda_targets(weak, temperature=temperature).kept.tolist() == [0, 1]


def losses() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    thresholds = Thresholds(torch.tensor([0.3, 0.2, 0.1]), torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2]))
    return {
        "uda": lambda weak, strong: consistency.uda(weak, strong, confidence=0.4),
        "fixmatch": lambda weak, strong: consistency.fixmatch(weak, strong, threshold=0.4),
        "freematch": lambda weak, strong: consistency.freematch(weak, strong, thresholds, fairness_weight=0.5),
    }


@pytest.mark.parametrize("name", ["uda", "fixmatch", "freematch"])
def test_targets_get_no_gradient_and_predictions_do(name):
    loss = losses()[name]
    weak, strong = normal(6, 3).requires_grad_(), normal(6, 3, seed=1).requires_grad_()
    none, some = torch.autograd.grad(loss(weak, strong), (weak, strong), allow_unused=True)
    assert none is None
    assert (some != 0).any()
    fixed = weak.detach()
    assert gradcheck(lambda strong: loss(fixed, strong), strong)
    assert gradgradcheck(lambda strong: loss(fixed, strong), strong)


@pytest.mark.parametrize("name", ["uda", "fixmatch", "freematch"])
def test_nothing_confident_is_a_loss_of_zero_with_a_gradient_of_zero(name):
    strong = normal(4, 3).requires_grad_()
    loss = {
        "uda": lambda: consistency.uda(torch.zeros(4, 3), strong),
        "fixmatch": lambda: consistency.fixmatch(torch.zeros(4, 3), strong),
        "freematch": lambda: consistency.freematch(
            torch.zeros(4, 3), strong, Thresholds(torch.ones(3), torch.ones(3) / 3, torch.ones(3) / 3)
        ),
    }[name]()
    assert loss == 0
    (slope,) = torch.autograd.grad(loss, strong)
    assert slope.count_nonzero() == 0


# FreeMatch

BATCHES = [  # probabilities of two samples; then τ, p̃, h̃ and τ(c) by hand with λ = 1/2; who is kept
    (((0.9, 0.1), (0.6, 0.4)), 0.625, (0.625, 0.375), (0.75, 0.25), (0.625, 0.375), [1, 0]),
    (((0.2, 0.8), (0.7, 0.3)), 0.6875, (0.5375, 0.4625), (0.625, 0.375), (0.6875, 0.6875 * 37 / 43), [1, 1]),
    (((0.3, 0.7), (0.1, 0.9)), 0.74375, (0.36875, 0.63125), (0.3125, 0.6875), (0.74375 * 59 / 101, 0.74375), [0, 1]),
]


def test_thresholds_follow_the_sequence_computed_by_hand():
    holder = SelfAdaptiveThresholds(classes=2, decay=0.5)
    assert [holder.confidence.item(), *holder.probabilities, *holder.histogram] == [0.5] * 5
    for rows, tau, probabilities, histogram, local, kept in BATCHES:
        weak = logits_of(*rows).requires_grad_()
        before, held = holder.confidence, holder.confidence.clone()
        thresholds = holder(weak)
        assert holder.confidence.item() == pytest.approx(tau, rel=1e-14)
        assert holder.probabilities.tolist() == pytest.approx(probabilities, rel=1e-14)
        assert holder.histogram.tolist() == pytest.approx(histogram, rel=1e-14)
        assert thresholds.local.tolist() == pytest.approx(local, rel=1e-14)
        assert not any(tensor.requires_grad for tensor in thresholds)
        assert torch.equal(before, held)  # not in place
        assert consistency.freematch_targets(weak, thresholds).kept.tolist() == kept


def test_evaluation_mode_leaves_the_thresholds():
    holder = SelfAdaptiveThresholds(classes=3)
    holder(normal(4, 3))
    left = {name: tensor.clone() for name, tensor in holder.named_buffers()}
    thresholds = holder.eval()(5 * normal(4, 3, seed=1))
    assert all(torch.equal(tensor, left[name]) for name, tensor in holder.named_buffers())
    assert torch.equal(thresholds.histogram, left["histogram"])


def test_fairness_is_its_formula_by_hand():
    _, tau, probabilities, histogram, _, _ = BATCHES[1]
    thresholds = Thresholds(torch.full((2,), tau), torch.tensor(probabilities), torch.tensor(histogram))
    strong = logits_of((0.6, 0.4), (0.3, 0.7))  # p̄ ∝ (0.9, 1.1), each class once
    expected = [0.86 / (0.86 + 37 / 30), (37 / 30) / (0.86 + 37 / 30)]
    by_hand = expected[0] * math.log(0.45) + expected[1] * math.log(0.55)
    kept = Targets(torch.eye(2), torch.ones(2))
    assert consistency.fairness(kept, strong, thresholds) == pytest.approx(by_hand, rel=1e-12)
    unlabelled = consistency.freematch(logits_of((0.2, 0.8), (0.7, 0.3)), strong, thresholds, fairness_weight=0.3)
    cross_entropies = -(math.log(0.4) + math.log(0.3)) / 2
    assert unlabelled == pytest.approx(cross_entropies + 0.3 * by_hand, rel=1e-12)


def test_fairness_leaves_out_classes_that_no_kept_sample_has():
    """Class 1 is left out as its only sample is not kept, class 3 as nobody has it; p̄/h̄ = (0.6, 0.5) of the others."""
    strong = logits_of((0.6, 0.2, 0.1, 0.1), (0.3, 0.1, 0.5, 0.1), (0.2, 0.7, 0.05, 0.05)).requires_grad_()
    thresholds = Thresholds(torch.ones(4), torch.full((4,), 0.25), torch.full((4,), 0.25))
    targets = Targets(torch.eye(4)[:3], torch.tensor([1.0, 1.0, 0.0]))
    found = consistency.fairness(targets, strong, thresholds)
    assert found.item() == pytest.approx((math.log(0.9 / 1.5) + math.log(0.6 / 1.5)) / 4, rel=1e-12)
    (slope,) = torch.autograd.grad(found, strong)
    assert slope.isfinite().all()
    assert slope[2].count_nonzero() == 0


@pytest.mark.parametrize(("classes", "decay", "word"), [(1, 0.9, "classes=1"), (3, 1.0, "decay=1.0")])
def test_settings_out_of_range_are_refused(classes, decay, word):
    with pytest.raises(mlo.UserError, match=word):
        SelfAdaptiveThresholds(classes=classes, decay=decay)


# inside a graph

LABELS = torch.arange(12) % 3


def points_of() -> Tensor:
    return normal(12, 4, seed=5)


def classifier() -> nn.Module:
    network = nn.Linear(4, 3)
    with torch.no_grad():
        network.weight.copy_(normal(3, 4, seed=6))
        network.bias.zero_()
    return network


def graph_of(unlabelled: Callable[[mlo.Values, Tensor], Tensor], network: nn.Module, method: Any) -> mlo.Graph:
    """A shift of the unlabelled points above a classifier that learns from them."""

    def fit(values: mlo.Values, batch: Any) -> Tensor:
        return cross_entropy(values["network"](points_of()), LABELS) + unlabelled(
            values, points_of().flip(0) + values["shift"]
        )

    def judged(values: mlo.Values, batch: Any) -> Tensor:
        return cross_entropy(values["network"](points_of().roll(1, 0), training=False), LABELS)

    lower = mlo.Level(
        "network",
        variables=network,
        objective=fit,
        given=("shift",),
        optimizer=mlo.optimizer.SGD(learning_rate=0.1),
        hypergradient=method,
    )
    upper = mlo.Level(
        "shift",
        variables=normal(4, seed=7),
        objective=judged,
        subject_to=("network",),
        optimizer=mlo.optimizer.SGD(learning_rate=0.1),
    )
    return mlo.Graph([lower, upper])


def test_thresholds_move_on_real_steps_of_their_level_only():
    """Three iterations under central differences, which evaluate the objective again: three updates."""

    def unlabelled(values: mlo.Values, points: Tensor) -> Tensor:
        network = values["network"]
        weak = network(points)
        return consistency.freematch(weak, network(1.3 * points), network(thresholds_of=weak))

    holder = WithThresholds(classifier(), classes=3, decay=0.7)
    graph = graph_of(unlabelled, holder, mlo.hypergradient.FiniteDifference(radius=1e-2))
    state = graph.init()
    expected = SelfAdaptiveThresholds(classes=3, decay=0.7)
    for _ in range(3):
        network = graph.module("network", state)
        assert isinstance(network, WithThresholds)
        expected(network(points_of().flip(0) + shift_of(state)))
        graph.hypergradient("shift", state)
        state, _ = graph.step(state)
        held = {name.removeprefix("thresholds."): tensor for name, tensor in state.buffers["network"].items()}
        for name, tensor in expected.named_buffers():
            assert torch.allclose(held[name], tensor, rtol=1e-12, atol=0)


def shift_of(state: mlo.State) -> Tensor:
    shift = state.values["shift"]
    return shift if isinstance(shift, Tensor) else next(iter(shift.values()))


def test_targets_made_once_give_central_differences_the_exact_cross_product():
    """A target made anew moves with the perturbed weights, which the exact product of a constant does not see."""

    def anew(values: mlo.Values, points: Tensor) -> Tensor:
        return consistency.uda(values["network"](points), values["network"](1.3 * points), confidence=0.0)

    def once(values: mlo.Values, points: Tensor) -> Tensor:
        network = values["network"]
        targets = values.once("targets", lambda: consistency.uda_targets(network(points), confidence=0.0))
        return consistency.matched(targets, network(1.3 * points))

    def hypergradient(unlabelled: Callable[[mlo.Values, Tensor], Tensor], method: Any) -> Tensor:
        graph = graph_of(unlabelled, classifier(), method)
        found = graph.hypergradient("shift", graph.init())
        return found if isinstance(found, Tensor) else next(iter(found.values()))

    differences, unrolled = mlo.hypergradient.FiniteDifference(radius=1e-3), mlo.hypergradient.Unroll(last=1)
    exact = hypergradient(once, unrolled)
    assert torch.allclose(hypergradient(anew, unrolled), exact, rtol=1e-12, atol=0)
    assert torch.allclose(hypergradient(once, differences), exact, rtol=1e-5, atol=1e-9)
    assert (hypergradient(anew, differences) - exact).norm() > 0.05 * exact.norm()


def test_with_thresholds_passes_everything_else_on():
    class Parts(nn.Module):
        def forward(self, x: Tensor, *, part: str = "logits") -> Tensor:
            return x if part == "features" else -x

    module, x = WithThresholds(Parts(), classes=3), normal(2, 3)
    assert torch.equal(module(x), -x)
    assert torch.equal(module(x, part="features"), x)
    assert isinstance(module(thresholds_of=x), Thresholds)


def test_a_class_that_nobody_has_been_taken_for_leaves_fairness_finite():
    """Its h̃ falls as λ^n to nothing, in float32 within 100,000 steps, and p̃/h̃ to infinity: all weight is on that class."""
    strong = logits_of((0.6, 0.3, 0.1), (0.2, 0.7, 0.1)).float().requires_grad_()
    for rarest in (0.0, 1e-44):
        thresholds = Thresholds(
            *(torch.tensor(row).float() for row in ([0.3] * 3, [0.5, 0.4, 0.1], [0.6, 0.4, rarest]))
        )
        found = consistency.fairness(Targets(torch.eye(3)[:2].float(), torch.ones(2)), strong, thresholds)
        (slope,) = torch.autograd.grad(found, strong)
        assert found.abs() < 1e-6  # no sample is taken for it: log n(p̄/h̄) of it is left out
        assert slope.isfinite().all()


def test_running_means_keep_the_share_that_decay_says():
    """λ = 0.9 from 1/2: a tenth of the batch's."""
    holder = SelfAdaptiveThresholds(classes=2, decay=0.9)
    holder(logits_of((0.9, 0.1), (0.6, 0.4)))
    assert holder.confidence.item() == pytest.approx(0.9 * 0.5 + 0.1 * 0.75, rel=1e-14)
    assert holder.probabilities.tolist() == pytest.approx([0.9 * 0.5 + 0.1 * 0.75, 0.9 * 0.5 + 0.1 * 0.25], rel=1e-14)
    assert holder.histogram.tolist() == pytest.approx([0.9 * 0.5 + 0.1, 0.9 * 0.5], rel=1e-14)
