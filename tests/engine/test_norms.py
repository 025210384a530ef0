"""Norms of the parts of a hypergradient are Euclidean norms over all entries, however these are laid out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import normal
from torch import Tensor
from torch.func import vmap

from mlo._state import FEW, Norms, Parts

TREES: dict[str, Any] = {
    "one tensor": normal(3, 4, seed=1),
    "one number": normal(seed=2),
    "few": {"a": normal(3, 4, seed=1), "b": normal(seed=2), "c": normal(0, 3, seed=3), "d": normal(4, 3, seed=4).T},
    "many": {"a": normal(FEW, seed=1), "b": normal(2, seed=2)},
    "of two types": {"a": normal(5, seed=1), "b": normal(5, seed=2).float()},
    "zero": {"a": torch.zeros(5), "b": torch.zeros(2, 2)},
}


def entries(tree: Any) -> Tensor:
    tensors = tree.values() if isinstance(tree, dict) else [tree]
    return torch.cat([tensor.double().flatten() for tensor in tensors])


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_they_are_those_of_all_entries(tree):
    norms = Norms.of(Parts(partial=None, through={"w": tree}, like=tree))
    exact = tree["b"].dtype == torch.float64 if isinstance(tree, dict) else True
    for norm in (norms.total, norms.indirect, norms.through["w"]):
        torch.testing.assert_close(norm.double(), entries(tree).norm(), rtol=1e-14 if exact else 1e-6, atol=0)
    assert norms.direct == 0


def test_of_tensors_that_are_sparse():
    table = normal(5, 3, seed=1)
    for sparse in (table.to_sparse(), table.to_sparse(1)):
        tree: Any = {"table": sparse, "other": normal(4, seed=2)}
        norms = Norms.of(Parts(partial=None, through={"w": tree}, like=tree))
        right = entries({"table": table, "other": tree["other"]}).norm()
        torch.testing.assert_close(norms.total, right, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_they_have_the_type_of_what_they_measure(dtype):
    tree = {"a": torch.ones(2, dtype=dtype), "b": torch.ones(2, dtype=dtype)}
    norms = Norms.of(Parts(partial=tree, through={"w": tree}, like=tree))
    assert {norms.total.dtype, norms.direct.dtype, norms.through["w"].dtype} == {dtype}
    assert (norms.total, norms.direct, norms.through["w"]) == (4, 2, 2)


def test_one_by_one_for_each_of_many():
    many = {"a": normal(7, 3, seed=1), "b": normal(7, seed=2)}
    found = vmap(lambda tree: Norms.of(Parts(partial=None, through={"w": tree}, like=tree)).total)(many)
    right = [entries({name: tensor[place] for name, tensor in many.items()}).norm() for place in range(7)]
    torch.testing.assert_close(found, torch.stack(right), rtol=1e-14, atol=0)
