"""Graphs that start from other graphs."""
# ruff: noqa: E501 - a case a line

from __future__ import annotations

import pytest

from mlo._errors import SpecError
from mlo.spec import load


@pytest.fixture
def both(write, graph, first):
    """A graph in a folder, and one beside it that it starts from."""

    def both(start: str, other: str = first) -> str:
        write(other, "graphs/first/gan.yaml")
        return write(graph + f"start: {start}\n", "graphs/main.yaml")

    return both


def test_a_start_inherits_what_must_agree(both):
    spec = load(
        both("{weights: first/gan.yaml, penalty: {graph: first/gan.yaml}}"), "seed=3", "dtype=float64", imports=["toy"]
    )
    start = spec.starts["weights"]
    assert start is spec.starts["penalty"]
    assert (start.name, start.seed, start.device, start.dtype) == ("gan", 3, "cpu", "float64")
    assert start.data == {"size": 4, "depth": 2}  # this graph's settings over its own
    assert start.iterations == 3
    assert not start.starts


def test_the_data_of_another_problem_stays_its_own(both, first):
    spec = load(both("{weights: first/gan}", first.replace("toy", "other")), imports=["toy", "other"])
    assert spec.starts["weights"].data == {"size": 1, "depth": 2}


def test_changes_of_a_start(both):
    both_ways = "{weights: {graph: first/gan.yaml, with: {iterations: 9, data: {depth: null}, seed: 1}}, penalty: first/gan.yaml}"
    spec = load(both(both_ways), imports=["toy"])
    assert (spec.starts["weights"].iterations, spec.starts["weights"].seed) == (9, 1)
    assert spec.starts["weights"].data == {"size": 4}
    assert (spec.starts["penalty"].iterations, spec.starts["penalty"].seed) == (3, 0)
    again = load("graphs/main.yaml", "start.penalty.with.iterations=8", "start.weights.with.seed=2", imports=["toy"])
    assert again.starts["penalty"].iterations == 8
    assert (again.starts["weights"].iterations, again.starts["weights"].seed) == (9, 2)


def test_paths_are_relative_to_the_file_that_wrote_them(both, write):
    both("{weights: first/gan.yaml}")
    write("extends: ../main.yaml\nseed: 1", "graphs/variants/far.yaml")
    assert load("graphs/variants/far.yaml", imports=["toy"]).starts["weights"].seed == 1
    spec = load("graphs/variants/far.yaml", "start.penalty=graphs/first/gan.yaml", imports=["toy"])
    assert spec.starts["penalty"] is spec.starts["weights"]


WRONG = [
    ("{weigths: first/gan.yaml}", "graphs/main.yaml:18:9: start.weigths: no level named 'weigths'. Did you mean 'weights'?"),
    ("{weights: first/gam.yaml}", "graphs/main.yaml:18:18: start.weights: no graph 'first/gam.yaml'. Did you mean 'first/gan.yaml'?"),
    ("{weights: first}", "graphs/main.yaml:18:18: start.weights: 'first' is a folder, and a graph is a file."),
    ("{weights: {graf: x}}", "graphs/main.yaml:18:19: start.weights.graf: unknown key. Did you mean 'graph'?"),
    ("{weights: {graph: 3}}", "graphs/main.yaml:18:26: start.weights.graph: expected the path of a graph"),
    ("{weights: {graph: first/gan.yaml, with: 3}}", "graphs/main.yaml:18:48: start.weights.with: expected a mapping of changes"),
    ("{weights: {graph: first/gan.yaml, with: {sed: 1}}}", "graphs/main.yaml:18:49: sed: unknown key. Did you mean 'seed'?"),
]  # fmt: skip


@pytest.mark.parametrize(("start", "message"), WRONG)
def test_a_wrong_start(both, start, message):
    with pytest.raises(SpecError) as caught:
        load(both(start), imports=["toy"])
    assert any(line.startswith(message) for line in str(caught.value).split("\n")), str(caught.value)


def test_the_level_must_exist_in_the_start_too(both, first):
    with pytest.raises(
        SpecError, match=r"main.yaml:18:18: start.weights: graphs/first/gan.yaml: no level named 'weights'. Did you"
    ):
        load(both("{weights: first/gan.yaml}", first.replace("weights", "wheights")), imports=["toy"])


def test_mistakes_of_the_start_come_with_the_others_and_once(both, first):
    with pytest.raises(SpecError) as caught:
        load(
            both("{weights: first/gan.yaml, penalty: first/gan.yaml}", first + "extra: 1\n"), "seed=x", imports=["toy"]
        )
    lines = [line for line in str(caught.value).split("\n") if not line.startswith("  ")]
    assert [line.split(": ")[0] for line in lines] == ["graphs/first/gan.yaml:9:1", "<override seed=x>"]
    with pytest.raises(SpecError, match=r"^graphs/first/gan.yaml:1:5: not valid YAML(.|\n)*<override seed=x>"):
        load(both("{weights: first/gan.yaml}", "a: [\n".replace("\n", "")), "seed=x", imports=["toy"])


def test_a_cycle_of_starts_is_printed(both, first):
    with pytest.raises(
        SpecError, match=r"cycle: graphs/main.yaml → graphs/first/gan.yaml → graphs/main.yaml|cycle: graphs/first"
    ):
        load(both("{weights: first/gan.yaml}", first + "start: {weights: ../main.yaml}\n"), imports=["toy"])
    with pytest.raises(SpecError, match=r"cycle: graphs/first/gan.yaml → graphs/first/gan.yaml"):
        load(both("{weights: first/gan.yaml}", first + "start: {weights: gan.yaml}\n"), imports=["toy"])


def test_a_graph_may_start_from_itself_if_that_ends(both):
    spec = load(both("{weights: {graph: main.yaml, with: {start: null, iterations: 2}}}"), imports=["toy"])
    assert spec.starts["weights"].iterations == 2
    assert not spec.starts["weights"].starts


def test_starts_may_start_from_others(both, write, first):
    write(first, "graphs/first/zero.yaml")
    spec = load(both("{weights: first/gan.yaml}", first + "start: {weights: zero.yaml}\n"), "seed=5", imports=["toy"])
    assert spec.starts["weights"].starts["weights"].seed == 5
    assert spec.starts["weights"].starts["weights"].name == "zero"


def test_a_graph_says_which_data_it_takes_over_from_another_problem(both, first):
    other = first.replace("toy", "other") + "inherits: [depth]\n"
    upper = load(both("{weights: first/gan}", other), "data.depth=7", "data.size=9", imports=["toy", "other"])
    assert upper.starts["weights"].data == {"size": 1, "depth": 7}
    changed = upper.replaced("start.weights.with.data.depth=5")
    assert changed.starts["weights"].data == {"size": 1, "depth": 5}  # what the start changes is on top
    assert load("graphs/first/gan.yaml", imports=["other"]).data == {"size": 1, "depth": 2}


def test_what_is_inherited_does_not_change_what_a_graph_computes(both, first):
    both("{weights: first/gan}", first + "inherits: depth\n")
    spec = load("graphs/first/gan.yaml", imports=["toy"])
    assert spec.inherits == ("depth",)
    assert spec.replaced("inherits=[]").hash == spec.hash
    assert "inherits" in spec.to_yaml()
    assert "inherits" not in spec.replaced("inherits=[]").to_yaml()
