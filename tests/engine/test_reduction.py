"""Two processes, each with half of the samples, against one with all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from engine import two_processes
from helpers import relative_error


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two processes wrote."""
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(two_processes.process, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_two_processes_give_the_numbers_of_one(found):
    """Losses are means over equal shares; gradients, cross products and ε are those of the whole."""
    alone = two_processes.run(0, 1)
    for rank in range(2):
        for name, right in alone.items():
            assert relative_error(found[rank][name].double(), right.double()) <= 1e-12, name


def test_processes_stay_together_bit_for_bit(found):
    one, two = found
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one if isinstance(one[name], torch.Tensor))


@pytest.mark.parametrize("way", ["step", "hypergradient"])
def test_recording_steps_through_a_reduction_is_refused(found, way):
    for rank in range(2):
        assert found[rank][way] == (
            "level 'a' cannot be unrolled under several processes: its steps would be recorded through a reduction over "
            "processes, which is not differentiated"
        )
