"""The needs-aware problem: its equations, its readings of Eq. 4, and what pretraining must reach."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy, softmax

import mlo
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


@pytest.mark.parametrize("need", ["sampled", "relaxed", "literal"])
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
