"""`extends` and overrides: one rule for both."""
# ruff: noqa: E501 - a case a line

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlo._errors import SpecError
from mlo.spec import Choice, Epochs, load
from mlo.spec._merge import merged, without_nulls
from mlo.spec._nodes import plain
from mlo.spec._yaml import read


def merge(base: str, over: str) -> object:
    """The plain values of `over` on `base`, both YAML."""
    return plain(without_nulls(merged(read(base, "base", ".")[0], read(over, "over", ".")[0])))


def level(text: str) -> str:
    return f"levels: {{x: {text}}}"


RULES = [  # base, over, result
    ("{a: 1, b: 2}", "{b: 3, c: 4}", {"a": 1, "b": 3, "c": 4}),
    ("{a: {b: 1, c: 2}}", "{a: {c: 3}}", {"a": {"b": 1, "c": 3}}),
    ("{a: [1, 2]}", "{a: [3]}", {"a": (3,)}),
    ("{a: {b: 1}}", "{a: 3}", {"a": 3}),
    ("{a: 3}", "{a: {b: 1}}", {"a": {"b": 1}}),
    ("{a: 1, b: 2}", "{a: null}", {"b": 2}),
    ("{a: {b: 1, c: 2}}", "{a: {b: null}}", {"a": {"c": 2}}),
    ("{a: [null]}", "{}", {"a": (None,)}),
    ("{data: {one: {a: 1}}}", "{data: {one: {b: 1}}}", {"data": {"one": {"a": 1, "b": 1}}}),
]

CHOICES = [  # the optimizer in the base, over it, and the result
    ("{sgd: {rate: 1, momentum: 2}}", "{sgd: {rate: 3}}", {"sgd": {"rate": 3, "momentum": 2}}),
    ("{sgd: {rate: 1}}", "{adam: {beta: 3}}", {"adam": {"beta": 3}}),
    ("{sgd: {rate: 1}}", "sgd", {"sgd": {"rate": 1}}),
    ("{sgd: {rate: 1}}", "{sgd: null}", {"sgd": {"rate": 1}}),
    ("{sgd: {rate: 1}}", "{SGD: {momentum: 2}}", {"SGD": {"rate": 1, "momentum": 2}}),
    ("{sgd: {rate: 1}}", "adam", "adam"),
    ("{sgd: {rate: 1}}", "none", "none"),
    ("sgd", "{sgd: {rate: 1}}", {"sgd": {"rate": 1}}),
    ("adam", "{sgd: {rate: 1}}", {"sgd": {"rate": 1}}),
    ("{sgd: {rate: 1, momentum: 2}}", "{sgd: {momentum: null}}", {"sgd": {"rate": 1}}),
    ("{sgd: null}", "{}", "sgd"),
    ("{sgd: {rate: {step: {start: 1, at: [2]}}}}", "{sgd: {rate: {step: {at: [3]}}}}", {"sgd": {"rate": {"step": {"start": 1, "at": (3,)}}}}),
    ("{sgd: {rate: {step: {start: 1}}}}", "{sgd: {rate: {cosine: {start: 2}}}}", {"sgd": {"rate": {"cosine": {"start": 2}}}}),
    ("{sgd: {rate: {step: {start: 1}}}}", "{sgd: {rate: cosine}}", {"sgd": {"rate": "cosine"}}),
    ("{sgd: {rate: {step: {start: 1}}}}", "{sgd: {rate: 0.1}}", {"sgd": {"rate": 0.1}}),
    ("{sgd: {rate: {step: {at: {epochs: [1]}}}}}", "{sgd: {rate: {step: {at: {epochs: [2]}}}}}", {"sgd": {"rate": {"step": {"at": {"epochs": (2,)}}}}}),
    ("{sgd: {rate: {step: {at: {epochs: [1]}}}}}", "{sgd: {rate: {step: {at: {iterations: [2]}}}}}", {"sgd": {"rate": {"step": {"at": {"iterations": (2,)}}}}}),
    ("{sgd: {groups: {a: {d: 0}, b: {d: 0}}}}", "{sgd: {groups: {c: {d: 1}}}}", {"sgd": {"groups": {"a": {"d": 0}, "b": {"d": 0}, "c": {"d": 1}}}}),
    ("{sgd: {groups: {a: {d: 0}, b: {d: 0}}}}", "{sgd: {groups: {a: null}}}", {"sgd": {"groups": {"b": {"d": 0}}}}),
]  # fmt: skip


@pytest.mark.parametrize(("base", "over", "result"), RULES)
def test_mappings_merge_and_the_rest_replaces(base, over, result):
    assert merge(base, over) == result


@pytest.mark.parametrize(("base", "over", "result"), CHOICES)
def test_a_choice_merges_with_its_own_name_only(base, over, result):
    changed = level(f"{{optimizer: {over}}}") if over != "{}" else "{}"
    assert merge(level(f"{{optimizer: {base}}}"), changed) == {"levels": {"x": {"optimizer": result}}}


names = st.sampled_from(["a", "b", "c", "d"])
trees = st.recursive(
    st.integers() | st.text("xyz", max_size=2) | st.lists(st.integers(), max_size=2),
    lambda inner: st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)
tables = st.dictionaries(names, trees, max_size=4)


READS = [  # an option of an optimizer that is read from a level
    ("{level: rates, name: a}", "{cosine: {start: 2}}", {"cosine": {"start": 2}}),
    ("{cosine: {start: 2}}", "{level: rates, name: a}", {"level": "rates", "name": "a"}),
    ("{level: rates}", "0.1", 0.1),
    ("0.1", "{level: rates}", {"level": "rates"}),
    ("{level: rates, name: a}", "{name: b}", {"level": "rates", "name": "b"}),
    ("{level: rates, name: a}", "{name: null}", {"level": "rates"}),
    ("{level: rates, name: a}", "{level: others}", {"level": "others", "name": "a"}),
    ("{level: rates}", "{level: rates, name: b}", {"level": "rates", "name": "b"}),
]


@pytest.mark.parametrize(("base", "over", "result"), READS)
def test_an_option_that_is_read_merges_with_another_only(base, over, result):
    texts = [f"levels: {{a: {{optimizer: {{sgd: {{rate: {text}}}}}}}}}" for text in (base, over)]
    assert merge(*texts) == {"levels": {"a": {"optimizer": {"sgd": {"rate": result}}}}}


def table(value: object):
    """A tree of plain values: JSON is YAML."""
    import json

    return read(json.dumps(value), "f", ".")[0]


@settings(max_examples=100, deadline=None)
@given(tables, tables, tables)
def test_merging_is_associative_and_idempotent(one, two, three):
    one, two, three = table(one), table(two), table(three)
    left, right = merged(merged(one, two), three), merged(one, merged(two, three))
    # A value that is replaced by a mapping forgets what it had; only where all are mappings can the order not matter.
    if not _clash(plain(one), plain(two)) and not _clash(plain(two), plain(three)):
        assert plain(left) == plain(right)
    assert plain(merged(one, one)) == plain(one)
    assert plain(merged(merged(one, two), two)) == plain(merged(one, two))
    assert plain(merged(one, table({}))) == plain(one)
    assert plain(merged(table({}), one)) == plain(one)


def _clash(one: object, two: object) -> bool:
    if isinstance(one, dict) and isinstance(two, dict):
        return any(_clash(one[key], two[key]) for key in one.keys() & two.keys())
    return isinstance(one, dict) != isinstance(two, dict)


@settings(max_examples=50, deadline=None)
@given(tables, names, st.integers())
def test_an_override_changes_its_own_key_only(base, name, value):
    changed = plain(merged(table(base), table({name: value})))
    assert changed == {**plain(table(base)), name: value}


OVERRIDES = [
    ("seed=3", lambda spec: spec.seed == 3),
    ("iterations={epochs: 2}", lambda spec: spec.iterations == Epochs(epochs=2)),
    ("levels.weights.hypergradient=unroll", lambda spec: spec.levels["weights"].hypergradient == Choice(name="unroll")),
    ("levels.weights.hypergradient=null", lambda spec: spec.levels["weights"].hypergradient is None),
    ("levels.weights.hypergradient.finite_difference.radius=1", lambda spec: spec.levels["weights"].hypergradient.options["radius"] == 1),
    ("levels.weights.optimizer.sgd.learning_rate=1e-3", lambda spec: dict(spec.levels["weights"].optimizer.options) == {"learning_rate": 1e-3, "momentum": 0.5}),
    ("levels.weights.optimizer.adam.learning_rate=1e-3", lambda spec: dict(spec.levels["weights"].optimizer.options) == {"learning_rate": 1e-3}),
    ("levels.weights.optimizer=none", lambda spec: spec.levels["weights"].frozen),
    ("levels.weights.batch=[train]", lambda spec: spec.levels["weights"].batch == ("train",)),
    ('data."odd.key"=on', lambda spec: spec.data == {"size": 4, "odd.key": "on"}),
    (" seed = 4", lambda spec: spec.seed == 4),
    ("name=a=b", lambda spec: spec.name == "a=b"),
    ("levels.weights.objective.fit.power=2", lambda spec: spec.levels["weights"].objective == Choice(name="fit", options={"power": 2})),
]  # fmt: skip


@pytest.mark.parametrize(("override", "holds"), OVERRIDES, ids=[override for override, _ in OVERRIDES])
def test_overrides(read, graph, override, holds):
    assert holds(read(graph, override))


def test_a_file_extends_another_and_keeps_places(write, graph):
    write(graph, "base.yaml")
    write(
        "extends: ../base.yaml\nseed: 1\nlevels:\n  weights: {optimizer: {adam: {}}, hypergradient: null}\n",
        "more/mid.yaml",
    )
    write("extends: mid.yaml\nseed: 2\nlevels: {penalty: {optimizer: {adam: {learning_rate: 3}}}}\n", "more/top.yaml")
    spec = load("more/top.yaml", "seed=5", imports=["toy"])
    assert (spec.name, spec.seed) == ("top", 5)
    assert spec.levels["weights"].optimizer == Choice(name="adam")
    assert spec.levels["weights"].hypergradient is None
    assert spec.levels["penalty"].optimizer == Choice(name="adam", options={"learning_rate": 3})
    assert str(spec.place(("seed",))) == "<override seed=5>"
    assert str(spec.place(("levels", "weights", "optimizer"))) == "more/mid.yaml:4:25"
    assert str(spec.place(("levels", "weights", "given"))) == "base.yaml:8:12"
    assert str(spec.place(("levels", "penalty", "optimizer", "adam", "learning_rate"))) == "more/top.yaml:3:54"


EXTENDS = [
    ("3", "graph.yaml:1:10: extends: expected the path of a graph, got 3."),
    ("[a.yaml]", "graph.yaml:1:10: extends: expected the path of a graph, got ['a.yaml']."),
    ("missing.txt", "graph.yaml:1:10: extends: no graph 'missing.txt'."),
    ("graph.yaml", "graph.yaml:1:10: extends: graphs extend each other in a cycle: graph.yaml → graph.yaml."),
]


@pytest.mark.parametrize(("value", "message"), EXTENDS)
def test_a_wrong_extends(refused, value, message):
    assert refused(f"extends: {value}\n")[0] == message


def test_a_cycle_of_files_is_printed(write):
    write("extends: sub/b.yaml", "a.yaml")
    write("extends: c.yaml", "sub/b.yaml")
    write("extends: ../a.yaml", "sub/c.yaml")
    with pytest.raises(SpecError, match=r"^sub/c.yaml:1:10: .*cycle: a.yaml → sub/b.yaml → sub/c.yaml → a.yaml.$"):
        load("a.yaml")
    write("extends: sub/b.yaml", "d.yaml")
    with pytest.raises(SpecError, match=r"cycle: sub/b.yaml → sub/c.yaml → a.yaml → sub/b.yaml.$"):
        load("d.yaml")


def test_a_mistake_points_into_the_file_that_made_it(write, graph):
    write(graph.replace("momentum", "momentun"), "base.yaml")
    write("extends: base.yaml\nsed: 1\n", "top.yaml")
    with pytest.raises(SpecError) as caught:
        load("top.yaml", imports=["toy"])
    assert [line.split(": ")[0] for line in str(caught.value).split("\n")[::2]] == ["base.yaml:10:43", "top.yaml:2:1"]


def test_an_override_can_be_nested_only_so_deep(refused, graph):
    key = ".".join("a" * 2000)
    assert refused(graph, f"data.{key}=1")[0].endswith(": nested deeper than 64.")
