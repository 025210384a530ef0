"""A spec written out: it loads again, and its hash says what it computes."""
# ruff: noqa: E501 - a case a line

from __future__ import annotations

import pytest

from mlo._errors import SpecError
from mlo.spec import load


@pytest.fixture
def full(write, graph, first):
    """Every kind of field at once."""
    write(first, "gan.yaml")
    return graph + (
        "start: {weights: {graph: gan.yaml, with: {iterations: 5, data: {depth: null}, start: null}}, penalty: gan.yaml}\n"
        "evaluation: {model: [weights], every: {epochs: 1}, select: validation.accuracy, "
        "pictures_at: [3, {epochs: 2, of: train}]}\n"
        "checkpoint: {every: 50}\n"
        "name: '010'\n"
    )


@pytest.mark.parametrize(
    "override", ["seed=2", "levels.weights.batch=[train]", "data={a: '1e-3', b: on, c: {'<<': .inf}, d: []}"]
)
def test_the_resolved_file_loads_to_an_equal_spec(read, write, full, override):
    spec = read(full, override)
    write(spec.to_yaml(), "far/away/resolved.yaml")
    again = load("far/away/resolved.yaml", imports=["toy"])
    assert again == spec
    assert again.hash == spec.hash
    assert again.to_yaml() == spec.to_yaml()
    assert again.starts["weights"] == spec.starts["weights"]


def test_specs_differ_where_they_start_differently(read, full):
    spec = read(full)
    other = read(full, "start.weights.with.iterations=6")
    assert spec != other
    assert spec.hash != other.hash


SAME = [
    "name=other",
    "checkpoint.every=3",
    "checkpoint=null",
    "evaluation.pictures_at=7",
    "evaluation.pictures_at=null",
    "levels.weights.optimizer.sgd.momentum=0.50",
    "data.size=4.0",
    "compile=false",
]
OTHER = [
    "seed=1", "iterations=11", "data.size=5", "dtype=float64", "device=cuda", "evaluation.select=null", "levels.weights.steps=2",
    "levels.weights.batch=[train]", "levels.weights.optimizer.sgd.momentum=0", "start.penalty=null", "start.weights.with.seed=3",
    "levels.weights.freeze=head", "levels.penalty.lookahead=true", "levels.weights.hypergradient=unroll",
    "compile=true",
]  # fmt: skip


def test_the_hash_is_of_what_is_computed(read, full):
    spec = read(full)
    assert len(spec.hash) == 64
    assert {spec.replaced(override).hash for override in SAME} == {spec.hash}
    hashes = [spec.hash, *(spec.replaced(override).hash for override in OTHER)]
    assert len(set(hashes)) == len(hashes)


def test_neither_order_nor_file_changes_the_hash(read, graph, write):
    spec = read(graph)
    first, second = graph.index("  weights:"), graph.index("  penalty:")
    write(graph[:first] + graph[second:] + graph[first:second], "elsewhere/turned.yaml")
    turned = load("elsewhere/turned.yaml", imports=["toy"])
    assert list(turned.levels) != list(spec.levels)
    assert turned.hash == spec.hash
    write("extends: ../graph.yaml\n", "elsewhere/more.yaml")
    assert load("elsewhere/more.yaml", imports=["toy"]).hash == spec.hash


def test_replaced_changes_a_copy(read, full):
    spec = read(full)
    other = spec.replaced("seed=4", "levels.weights.hypergradient=null")
    assert (spec.seed, other.seed, other.starts["penalty"].seed) == (0, 4, 4)
    assert spec.levels["weights"].hypergradient is not None
    assert other.levels["weights"].hypergradient is None
    assert other.replaced("seed=0", "levels.weights.hypergradient.finite_difference.radius=0.01") == spec
    with pytest.raises(SpecError, match=r"^<override sed=4>: sed: unknown key"):
        spec.replaced("sed=4")
