"""Numbers that are handed to tensors as tensors give the same bits, and only where nobody could tell."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import vmap

from mlo import _tree
from mlo._scalar import scalar

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NUMBERS = st.one_of(
    st.floats(allow_nan=False),
    st.sampled_from([0.0, -0.0, 0.9, -0.05, 1 / 3, 1e-45, 1e300, math.inf]),
)
SHAPES = st.sampled_from([(), (1,), (7,), (3, 5), (0,), (33, 9)])


def made(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@given(NUMBERS, st.sampled_from(DTYPES), SHAPES, st.integers(0, 5), st.booleans())
def test_products_have_the_same_bits(number, dtype, shape, seed, named):
    tensor = made(shape, dtype, seed)
    tree: Any = {"a": tensor, "b": tensor.double()} if named else tensor
    with torch.no_grad():
        found = _tree.scale(tree, by=number)
    for one, two in zip(_tree.leaves(found), _tree.leaves(tree), strict=True):
        right = two * number
        assert one.dtype == right.dtype
        assert one.view(torch.uint8).equal(right.view(torch.uint8)) if one.dim() else str(one) == str(right)


@given(NUMBERS.filter(bool), st.sampled_from(DTYPES), st.integers(0, 5))
def test_so_have_quotients_and_sums(number, dtype, seed):
    tensor = made((7,), dtype, seed)
    given = scalar(number, dtype, True, torch.Tensor)
    assert tensor.div(given).view(torch.uint8).equal(tensor.div(number).view(torch.uint8))
    assert tensor.add(given).view(torch.uint8).equal(tensor.add(number).view(torch.uint8))


def test_it_is_a_number_where_a_tensor_is_of_no_use():
    assert isinstance(scalar(0.9, torch.float32, True, torch.Tensor), torch.Tensor)
    for other in [(0.9, torch.bfloat16, True, torch.Tensor), (0.9, torch.float32, False, torch.Tensor),
                  (0.9, torch.float32, True, torch.nn.Parameter)]:  # fmt: skip
        assert scalar(*other) == other[0]
        assert isinstance(scalar(*other), float)


def test_a_number_from_inference_mode_may_be_differentiated_beside():
    with torch.inference_mode():
        number: Any = scalar(0.123, torch.float32, True, torch.Tensor)
    assert not number.is_inference()
    x = torch.ones(3, requires_grad=True)
    (x * number).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((3,), 0.123))


@pytest.mark.parametrize("recorded", [False, True])
def test_inside_transforms_and_recordings_it_is_the_plain_product(recorded, monkeypatch):
    monkeypatch.setattr("mlo._scalar.scalar", None)  # whoever asks fails
    x = torch.randn(4, 3)
    if recorded:
        x.requires_grad_()
        assert _tree.scale({"x": x}, by=0.9)["x"].grad_fn is not None
    else:
        with torch.no_grad():
            assert torch.equal(vmap(lambda row: _tree.scale(row, by=0.9))(x), x * 0.9)


def test_where_somebody_watches_operations_it_is_the_plain_product():
    """A tensor without numbers, made there, would stand for the number ever after."""
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True):
            _tree.scale(torch.ones(3), by=0.0123)
        assert torch.equal(_tree.scale(torch.ones(3), by=0.0123), torch.ones(3) * 0.0123)
