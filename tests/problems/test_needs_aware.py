"""The needs-aware problem: its equations, its readings of Eq. 4, and what pretraining must reach."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy, softmax

import mlo
from mlo._objective import Record
from problems import needs_aware
from problems.blocks.jitter import Jitter
from problems.blocks.need import class_losses, class_need, relaxed_bernoulli
from problems.blocks.streams import Jittered

ROOT = Path(__file__).parent.parent.parent
NEEDS_AWARE = ROOT / "graphs" / "needs_aware.yaml"


def test_need_is_the_share_of_a_class_in_the_mean_losses_eq_3() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(30, 4, generator=generator, dtype=torch.float64), torch.arange(30) % 3
    losses = class_losses(logits, labels, 4)
    for c in range(3):
        torch.testing.assert_close(losses[c], cross_entropy(logits[labels == c], labels[labels == c]))
    assert losses[3] == 0
    p = class_need(losses)
    torch.testing.assert_close(p[:3], losses[:3] / losses.sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(p.sum(), torch.ones((), dtype=torch.float64))
    assert bool((p > 0).all())


def test_the_relaxed_bernoulli_is_eq_4_and_tends_to_a_draw_with_probability_p() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.full((20000,), 0.3, dtype=torch.float64)
    gumbel = -(-torch.rand(20000, 2, generator=generator, dtype=torch.float64).log()).log()
    for temperature in (0.5, 2.0):
        top = torch.stack([p.log() + gumbel[:, 0], (1 - p).log() + gumbel[:, 1]], 1) / temperature
        torch.testing.assert_close(relaxed_bernoulli(p, gumbel, temperature), softmax(top, 1)[:, 0])
    cold = relaxed_bernoulli(p, gumbel, 1e-3)
    assert abs(cold.mean().item() - 0.3) < 4 * (0.3 * 0.7 / 20000) ** 0.5
    assert relaxed_bernoulli(torch.ones(1), torch.zeros(1, 2), 0.1).isfinite().all()


def assembled(*overrides: str) -> tuple[mlo.Graph, mlo.State, dict]:
    """The graph from fresh values, with the batches of its eighth iteration."""
    spec = mlo.load(NEEDS_AWARE, "start=null", "dtype=float64", "threads=1", *overrides)
    graph, problem = spec.build()

    def batch(names: object) -> object:
        draw = lambda name: problem.streams[name].draw(mlo.stream.Draw(0, name, 8))  # noqa: E731
        return draw(names) if isinstance(names, str) else {name: draw(name) for name in names}

    return graph, graph.init(seed=0), {name: batch(level.batch) for name, level in spec.levels.items()}


@pytest.mark.parametrize("need", ["sampled", "score_function", "relaxed", "literal"])
def test_every_path_to_the_meta_level_carries_something_in_every_reading(need: str) -> None:
    graph, state, batches = assembled(f"levels.refined.objective.refinement.need={need}")
    parts = graph.parts("meta", state, batches)
    assert set(parts.through) == {"classifier", "generator", "refined"}
    for tree in (parts.direct, *parts.through.values()):
        assert sum(tensor.abs().sum().item() for tensor in tree.values()) > 0


def test_the_sampled_reading_draws_by_need_and_weighs_every_image_with_one() -> None:
    graph, state, batches = assembled()
    _, metrics = graph.step(state, batches)
    measured = metrics.measured["refined"]
    assert measured["generated"].sum() == 64
    torch.testing.assert_close(measured["generated"], measured["generated"].round())
    torch.testing.assert_close(metrics.losses["refined"], measured["real_loss"] + measured["generated_loss"])
    torch.testing.assert_close(measured["need"].sum(), torch.ones((), dtype=torch.float64))


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def small_refinement(need: str, uniforms: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor):
    """The objective of W2 on networks without batch statistics, linear but for a tanh, for the classes `uniforms` choose."""
    head, embedding = normal(4, 10, seed=1), normal(10, 6, seed=2)
    views = {
        "classifier": lambda x: torch.tanh(x @ w1),
        "refined": lambda x: torch.tanh(x @ w2),
        "meta": lambda h: h @ head,
        "generator": lambda z, classes: z + embedding[classes],
    }
    batch = {
        "train": {"images": normal(3, 6, seed=3), "labels": torch.arange(3)},
        "validation_set": {"images": normal(20, 6, seed=4), "labels": torch.arange(20) % 10},
        "noise": {"uniforms": uniforms, "z": normal(len(uniforms), 6, seed=5), "gumbel": torch.zeros(len(uniforms), 2)},
    }
    values = mlo.Values("refined", views, Record(batch, 0, 1))
    value, measured = needs_aware.refinement(torch.ones(10, dtype=torch.float64))(values, batch, need=need)
    return value, values.choices["classes"], measured["need"]


def _derivatives(value: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    first = torch.autograd.grad(value, (w1, w2), create_graph=True)
    return torch.stack([*first, torch.autograd.grad((first[1] * q).sum(), w1)[0]]).detach()


def _refined(need: str, uniforms: torch.Tensor, *at: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """∂/∂W1, ∂/∂W2 and (∂²/∂W2∂W1)ᵀ q of the objective, p(s) and the classes."""
    w1, w2 = (each.clone().requires_grad_() for each in at[:2])
    value, classes, p = small_refinement(need, uniforms, w1, w2)
    return _derivatives(value, w1, w2, at[2]), p.detach(), classes


def _expected(*at: torch.Tensor) -> torch.Tensor:
    """The same of the expectation, real loss + Σ_c p(c) L_c, written out."""
    w1, w2 = (each.clone().requires_grad_() for each in at[:2])
    p = small_refinement("sampled", torch.full((2,), 0.5, dtype=torch.float64), w1, w2)[2]
    total = torch.zeros((), dtype=torch.float64)
    head, embedding, z, x = normal(4, 10, seed=1), normal(10, 6, seed=2), normal(2, 6, seed=5), normal(3, 6, seed=3)
    for c in range(10):
        for image in z:
            logits = torch.tanh((image + embedding[c]) @ w2) @ head
            total = total - p[c] * logits.log_softmax(0)[c] / 2
    value = total + cross_entropy(torch.tanh(x @ w2) @ head, torch.arange(3))
    return _derivatives(value, w1, w2, at[2])


@pytest.mark.parametrize("need", ["sampled", "score_function"])
def test_the_gradient_of_the_need_is_unbiased_over_all_classes_two_images_can_have(need: str) -> None:
    w1, w2, q = normal(6, 4, seed=6), normal(6, 4, seed=7), normal(6, 4, seed=8)
    p = _refined(need, torch.tensor([0.5, 0.5]).double(), w1, w2, q)[1]
    centres = (p.cumsum(0) - p / 2) / p.sum()  # a uniform number that chooses each class
    mean = torch.zeros(3, 6, 4, dtype=torch.float64)
    for one in range(10):
        for two in range(10):
            found, _, classes = _refined(need, torch.stack([centres[one], centres[two]]), w1, w2, q)
            assert classes.tolist() == [one, two]
            mean += p[one] * p[two] * found
    exact = _expected(w1, w2, q)
    for found, right in zip(mean, exact, strict=True):  # ∂/∂W1, ∂/∂W2 and (∂²/∂W2∂W1)ᵀ q
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-14)


def test_the_baseline_takes_variance_from_the_gradient_in_w1() -> None:
    """Nine tenths of it here, with 16 images; of the cross product it takes none, whose mean is small beside its spread."""
    at = normal(6, 4, seed=6), normal(6, 4, seed=7), normal(6, 4, seed=8)
    uniforms = torch.rand(50, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spread = {
        need: torch.stack([_refined(need, each, *at)[0] for each in uniforms]).var(0).sum((1, 2))
        for need in ("sampled", "score_function")
    }
    ratio = spread["score_function"] / spread["sampled"]
    assert ratio[0] < 0.2
    assert 0.8 < ratio[2] < 1.25


def test_the_score_function_changes_neither_the_value_nor_the_step_of_w2() -> None:
    graph, state, batches = assembled()
    other = assembled("levels.refined.objective.refinement.need=score_function")[0]
    one, two = (each.step(state, batches) for each in (graph, other))
    assert one[1].losses["refined"] == two[1].losses["refined"]
    for name, tensor in one[0].values["refined"].items():
        torch.testing.assert_close(two[0].values["refined"][name], tensor, rtol=1e-13, atol=1e-16)
    parts = [each.parts("meta", state, batches).through["refined"] for each in (graph, other)]
    assert any(not torch.allclose(parts[0][name], parts[1][name], rtol=1e-6) for name in parts[0])


def test_drawing_follows_the_probabilities() -> None:
    p = torch.tensor([0.1, 0.6, 0.3], dtype=torch.float64)
    uniforms = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert torch.bincount(needs_aware._draw(p, uniforms)).tolist() == [100, 600, 300]


def test_jittered_batches_keep_their_labels_and_are_the_same_every_time() -> None:
    data = {"images": torch.rand(5, 1, 8, 8), "labels": torch.arange(5)}
    stream = mlo.stream.Shuffled(data, size=5)
    jittered = Jittered(stream, Jitter(rotation=15.0, scale=0.1, shift=1.0))
    which = mlo.stream.Draw(0, "jittered", 3)
    first, second = jittered.draw(which), jittered.draw(which)
    assert torch.equal(first["labels"], stream.draw(which)["labels"])
    assert torch.equal(first["images"], second["images"])
    assert not torch.equal(first["images"], stream.draw(which)["images"])
    assert not torch.equal(first["images"], jittered.draw(mlo.stream.Draw(0, "jittered", 4))["images"])


def test_after_pretraining_every_class_is_recognised_and_varied(tmp_path: Path) -> None:
    """At least 90 % of every class recognised, at least half the real ones' mean distance; both kept with a grid."""
    run = mlo.run(mlo.load(ROOT / "graphs" / "needs_aware" / "gan.yaml"), tmp_path / "gan", quiet=True)
    (table,) = run.summary["tables"]
    assert table["columns"] == ["class", "recognised (%)", "mean distance", "of real digits", "ratio"]
    assert [row[0] for row in table["rows"]] == [str(c) for c in range(10)]
    assert min(row[1] for row in table["rows"]) >= 90
    assert min(row[4] for row in table["rows"]) >= 0.5
    assert run.summary["metrics"]["test.recognised"] == min(row[1] for row in table["rows"])
    for name in ("generated", "real"):
        with Image.open(run.folder / "pictures" / f"{name}.png") as picture:
            assert min(picture.size) >= 480
