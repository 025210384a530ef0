"""What is handed to inductor: the same function, with the products that it had better fuse written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import normal
from torch._inductor import config
from torch.fx.experimental.proxy_tensor import make_fx

import mlo
from mlo._backend import SMALL, compiled, compiler, fuse_products

aten: Any = torch.ops.aten
LONG = SMALL // 4 + 1

CASES = {  # a function, shapes of its arguments, products of two matrices that are left by themselves
    "with a bias": (lambda b, x, w: torch.addmm(b, x, w), [(3,), (5, 4), (4, 3)], 1),
    "with a bias and weights": (lambda b, x, w: torch.addmm(b, x, w, beta=0.5, alpha=2), [(3,), (5, 4), (4, 3)], 0),
    "column and row": (lambda a, b: a @ b, [(5, 1), (1, 3)], 0),
    "column and row with a bias": (lambda b, x, w: torch.addmm(b, x, w), [(3,), (5, 1), (1, 3)], 0),
    "one number": (lambda a, b: a @ b, [(1, 1), (1, 1)], 0),
    "matrix and column": (lambda a, b: a @ b, [(5, 4), (4, 1)], 0),
    "row and matrix": (lambda a, b: a @ b, [(1, 4), (4, 5)], 0),
    "row and column": (lambda a, b: a @ b, [(1, 4), (4, 1)], 0),
    "large matrix and column": (lambda a, b: a @ b, [(4, LONG), (LONG, 1)], 1),
    "row and large matrix": (lambda a, b: a @ b, [(1, LONG), (LONG, 4)], 1),
    "matrices": (lambda a, b: a @ b, [(5, 4), (4, 3)], 1),
    "of a product": (lambda a, b, c: (a @ b) @ c, [(5, 1), (1, 3), (3, 2)], 1),
}


@pytest.mark.parametrize("case", CASES)
def test_products_are_fused_and_stay_what_they_are(case):
    function, shapes, left = CASES[case]
    tensors = [normal(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    module = make_fx(function, tracing_mode="fake")(*tensors)
    fuse_products(module)
    targets = [node.target for node in module.graph.nodes]
    assert targets.count(aten.mm.default) == left
    assert (aten.addmm.default in targets) == (case == "with a bias and weights")
    found, right = module(*tensors), function(*tensors)
    assert found.shape == right.shape
    assert torch.allclose(found, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_products_of_integers_keep_their_type(dtype):
    column, row = torch.arange(5, dtype=dtype)[:, None], torch.arange(4, dtype=dtype)[None]
    tensors = [column, row, column.mT @ column]
    module = make_fx(lambda a, b, c: (a @ b, (a @ b) @ b.mT, a @ c), tracing_mode="fake")(*tensors)
    fuse_products(module)
    right = (column @ row, column @ row @ row.mT, column @ tensors[2])
    for found, expected in zip(module(*tensors), right, strict=True):
        assert found.dtype == dtype
        assert torch.equal(found, expected)


def test_another_backend_is_one_of_torch():
    module = make_fx(lambda a: a + 1, tracing_mode="fake")(normal(3, seed=0))
    assert torch.equal(compiled(module, [normal(3, seed=0)], "aot_eager")(normal(3, seed=1)), normal(3, seed=1) + 1)


@pytest.mark.parametrize("backend", ["inductor", "nonsense"])
def test_what_the_compiler_says_is_told_in_a_line(backend):
    module = make_fx(lambda a: a + 1, tracing_mode="fake")(normal(3, seed=0))
    refused = pytest.raises(mlo.UserError, match=r"^compile: torch\.compile has failed: .+$")
    with config.patch({"cpp.cxx": ("/there/is/none",)}), refused:
        compiled(module, [normal(3, seed=0)], backend)(normal(3, seed=0))


@pytest.mark.skipif(compiler() == "eager", reason="torch finds no C++ compiler")
def test_inductor_computes_what_was_traced():
    def function(b: torch.Tensor, x: torch.Tensor, w: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = torch.addmm(b, x, w).relu()
        return out, out @ c, (out.sum(1, keepdim=True) @ c.mT).sin()

    tensors = [normal(*shape, seed=seed) for seed, shape in enumerate([(6,), (5, 4), (4, 6), (6, 1)])]
    run = compiled(make_fx(function, tracing_mode="fake")(*tensors), tensors, "inductor")
    others = [tensor + 0.3 for tensor in tensors]
    for given in (tensors, others):
        for one, two in zip(run(*given), function(*given), strict=True):
            assert torch.allclose(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(compiler() == "eager", reason="torch finds no C++ compiler")
def test_inductor_keeps_the_factors_of_sums():
    """Inductor's own patterns make a + BC of a + αBC, and a sum of two products of αBC + DE."""

    def function(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            torch.add(a, b @ c, alpha=-0.05),
            torch.add(b @ c, a, alpha=3.0),
            torch.add(b @ c, b.sin() @ c, alpha=-0.5),
            torch.sub(a, b.cos() @ c, alpha=2.0),
            torch.addmm(a, b, c, beta=0.5, alpha=2.0).relu(),
            torch.add(a[0], torch.addmv(a[1], c.mT, b[0], beta=-1.0, alpha=2.0), alpha=0.3),
        )

    tensors = [normal(*shape, seed=seed) for seed, shape in enumerate([(5, 6), (5, 4), (4, 6)])]
    run = compiled(make_fx(function, tracing_mode="fake")(*tensors), tensors, "inductor")
    for one, two in zip(run(*tensors), function(*tensors), strict=True):
        assert torch.allclose(one, two, rtol=1e-12, atol=1e-12)
