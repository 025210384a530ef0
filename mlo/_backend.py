"""What runs a traced iteration: inductor, another backend of `torch.compile`, or torch itself, operation by operation.

A trace has no branches, and is made again for inputs of any other form. So it is handed to inductor itself: the guards that
`torch.compile` would check before each call, 0.1 ms of them, have nothing to find. On the CPU the code around the kernels
is C++ as well, and products that libraries of matrix products are slow at are given to it as operations that it fuses.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule, Node

from mlo._errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

EAGER, INDUCTOR = "eager", "inductor"
"""Backends that are not handed to `torch.compile`: with the first, operations are run one by one."""

NO_COMPILER = "compile: torch finds no C++ compiler here: steps are traced, and their operations run one by one"

SMALL = 2**16
"""Products of a matrix with a vector are fused up to so many entries of the matrix: what they wait for is not memory."""

_aten: Any = torch.ops.aten


def compiler() -> str:
    """The backend where none is asked for: inductor, or eager where there is no C++ compiler for it."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return EAGER
    return INDUCTOR


def compiled(module: GraphModule, tensors: Sequence[Tensor], backend: str) -> Callable[..., Sequence[Tensor]]:
    """What computes the same as `module` for inputs like `tensors`, up to rounding. Takes seconds to minutes.

    Raises `UserError` where compiling fails.
    """
    if backend == EAGER:
        return module
    on_cpu = all(tensor.is_cpu for tensor in tensors)
    try:
        if backend != INDUCTOR:
            return _first_run_watched(torch.compile(module, backend=backend, dynamic=False, fullgraph=True))
        if on_cpu:
            fuse_products(module)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, about parts of itself
            from torch._inductor import compile as compile_trace

            # Its patterns take a + αBC for a + BC, without a word (torch 2.13.0), and are no faster here.
            options = {"cpp_wrapper": on_cpu, "pattern_matcher": False}
            run: Any = compile_trace(module, list(tensors), options=options)
    except Exception as error:
        raise _failed(error) from error
    return run


def fuse_products(module: GraphModule) -> None:
    """Write products of `module` that inductor would leave to a library as operations that it fuses with what is around.

        addmm(b, A, B) = AB + b              the sum goes into what follows, in place of a copy of b before the product
        AB = a · b, of a column and a row    entry by entry
        Ab = Σ_j A_j b_j                     where A has at most `SMALL` entries, and likewise aB

    Of traced tensors with two dimensions, as these operations have. Sums are taken in another order.
    """
    graph = module.graph
    for node in graph.find_nodes(op="call_function", target=_aten.addmm.default):
        if len(node.args) == 3 and not node.kwargs:
            bias, one, two = node.args
            with graph.inserting_before(node):
                product = graph.call_function(_aten.mm.default, (one, two))
                product.meta = dict(node.meta)
                _replace(node, graph.call_function(_aten.add.Tensor, (product, bias)))
    for node in graph.find_nodes(op="call_function", target=_aten.mm.default):
        one, two = node.args
        known = [each.meta.get("val") for each in (node, one, two)]
        if not all(isinstance(each, torch.Tensor) and each.is_floating_point() for each in known):
            continue  # sums of integers are of another type, and constants may be sparse
        (rows, inner), (_, columns) = known[1].shape, known[2].shape
        with graph.inserting_before(node):
            if inner == 1:
                _replace(node, graph.call_function(_aten.mul.Tensor, (one, two)))
            elif columns == 1 and rows * inner <= SMALL:
                row = graph.call_function(_aten.t.default, (two,))
                terms = graph.call_function(_aten.mul.Tensor, (one, row))
                _replace(node, graph.call_function(_aten.sum.dim_IntList, (terms, [1], True)))
            elif rows == 1 and inner * columns <= SMALL:
                column = graph.call_function(_aten.t.default, (one,))
                terms = graph.call_function(_aten.mul.Tensor, (column, two))
                _replace(node, graph.call_function(_aten.sum.dim_IntList, (terms, [0], True)))
    module.recompile()


def _replace(node: Node, other: Node) -> None:
    other.meta = dict(node.meta)
    node.replace_all_uses_with(other)
    node.graph.erase_node(node)


def _first_run_watched(run: Callable[..., Any]) -> Callable[..., Sequence[Tensor]]:
    """`run`, which is compiled when it is called for the first time: what goes wrong then is the compiler's."""
    ran = False

    def watched(*tensors: Tensor) -> Sequence[Tensor]:
        nonlocal ran
        if ran:
            return run(*tensors)
        try:
            found = run(*tensors)
        except Exception as error:
            raise _failed(error) from error
        ran = True
        return found

    return watched


def _failed(error: Exception) -> UserError:
    return UserError(f"compile: torch.compile has failed: {first_line(error)}")


def first_line(error: Exception) -> str:
    """What `error` says in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
