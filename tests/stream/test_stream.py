"""Draws are keyed by what they are for, never by the order in which they are made."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mlo
from mlo.stream import Balanced, Constant, Draw, Iterated, Noise, Shuffled


class Pair(NamedTuple):
    number: torch.Tensor
    double: torch.Tensor


def pairs(rows: int) -> Pair:
    numbers = torch.arange(rows)
    return Pair(numbers, 2 * numbers)


@given(rows=st.integers(1, 40), size=st.integers(1, 50), step=st.integers(0, 3), seed=st.integers(0, 5))
def test_every_pass_of_a_shuffled_stream_holds_every_sample_once(rows: int, size: int, step: int, seed: int) -> None:
    stream = Shuffled(pairs(rows), size=size)
    draws = [stream.draw(Draw(seed, "train", iteration, step)) for iteration in range(1, 2 * rows // size + 3)]
    assert all(len(draw.number) == size and torch.equal(draw.double, 2 * draw.number) for draw in draws)
    seen = torch.cat([draw.number for draw in draws])
    for start in range(0, len(seen) - rows + 1, rows):
        assert seen[start : start + rows].sort().values.tolist() == list(range(rows))


@given(order=st.permutations(list(range(1, 9))))
def test_the_order_of_drawing_changes_nothing(order: list[int]) -> None:
    noise = Noise(lambda generator: torch.randn(3, generator=generator))
    for make in (
        lambda: Shuffled(pairs(10), size=4),
        lambda: Balanced(pairs(10), torch.arange(10) % 3, size=4),
        lambda: noise,
    ):
        stream, fresh = make(), make()
        expected = {t: stream.draw(Draw(0, "s", t)) for t in range(1, 9)}
        for t in order:
            again = fresh.draw(Draw(0, "s", t))
            for one, two in zip(again, expected[t], strict=True):
                assert torch.equal(one, two)


def test_seed_stream_iteration_and_step_each_give_another_draw() -> None:
    stream = Noise(lambda generator: torch.randn(3, generator=generator))
    base = Draw(0, "noise", 1, 0)
    others = [Draw(1, "noise", 1, 0), Draw(0, "other", 1, 0), Draw(0, "noise", 2, 0), Draw(0, "noise", 1, 1)]
    assert torch.equal(stream.draw(base), stream.draw(Draw(0, "noise", 1, 0)))
    assert not any(torch.equal(stream.draw(base), stream.draw(other)) for other in others)


def test_a_draw_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    for stream in (
        Shuffled(pairs(5), size=2),
        Balanced(pairs(5), torch.arange(5), size=2),
        Noise(lambda g: torch.rand(1, generator=g)),
    ):
        stream.draw(Draw(0, "s", 1))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_balanced_stream_draws_classes_alike_however_rare() -> None:
    labels = torch.tensor([0] * 90 + [3] * 9 + [7])
    stream = Balanced(labels, labels, size=3000)
    counts = torch.bincount(stream.draw(Draw(0, "s", 1)), minlength=8)
    assert counts.nonzero().flatten().tolist() == [0, 3, 7]
    assert ((counts[[0, 3, 7]] - 1000).abs() < 5 * (3000 * 2 / 9) ** 0.5).all()


def test_an_iterable_goes_round_and_an_empty_one_is_refused() -> None:
    stream = Iterated([1, 2])
    assert [stream.draw(Draw(0, "s", t)) for t in range(1, 6)] == [1, 2, 1, 2, 1]
    assert stream.draws_per_epoch() == 2.0
    with pytest.raises(mlo.UserError, match="has run out of batches"):
        Iterated(iter([])).draw(Draw(0, "s", 1))


def test_a_data_loader_is_a_stream() -> None:
    loader = torch.utils.data.DataLoader(torch.arange(6), batch_size=2)
    stream = Iterated(loader)
    assert [stream.draw(Draw(0, "s", t)).tolist() for t in range(1, 5)] == [[0, 1], [2, 3], [4, 5], [0, 1]]


@pytest.mark.parametrize("wrong", [{"a": torch.zeros(3), "b": torch.zeros(4)}, torch.zeros(0), []])
def test_data_without_a_common_number_of_samples_are_refused(wrong: object) -> None:
    with pytest.raises(mlo.UserError, match="one common, positive number"):
        Shuffled(wrong, size=1)


def test_a_constant_is_the_same_every_time() -> None:
    batch = object()
    assert Constant(batch).draw(Draw(0, "s", 9)) is batch


def test_an_iterable_gives_the_draws_of_one_iteration_again() -> None:
    stream = Iterated(iter(range(6)))
    first = [stream.draw(Draw(0, "s", 1, step)) for step in range(2)]
    assert [stream.draw(Draw(0, "s", 1, step)) for step in range(2)] == first == [0, 1]
    assert [stream.draw(Draw(0, "s", t)) for t in (2, 3)] == [2, 3]
