"""Reading YAML: the scalars of YAML 1.2, and the traps of 1.1."""
# ruff: noqa: E501 - a case a line

from __future__ import annotations

import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mlo._errors import SpecError
from mlo.spec import load
from mlo.spec._faults import Broken
from mlo.spec._frozen import thaw
from mlo.spec._nodes import plain, walk
from mlo.spec._yaml import Dumper, read

SCALARS = [
    ("1e-3", 1e-3), ("2e-4", 2e-4), ("1E5", 1e5), (".5", 0.5), ("5.", 5.0), ("-0.1", -0.1), ("+3", 3), ("-12", -12), ("0", 0),
    ("0o17", 15), ("0x1F", 31), (".inf", math.inf), ("-.inf", -math.inf), ("1_000", "1_000"), ("12:30", "12:30"),
    ("on", "on"), ("off", "off"), ("yes", "yes"), ("No", "No"), ("y", "y"), ("true", True), ("False", False), ("TRUE", True),
    ("null", None), ("~", None), ("", None), ("2024-01-01", "2024-01-01"), ("'1'", "1"), ('"1e-3"', "1e-3"), ("1e", "1e"),
    ("none", "none"), ("None", "None"), ("=", "="), ("!!str 010", "010"), ("!!float 3", 3.0), ("1e5x", "1e5x"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_scalars_are_those_of_yaml_1_2(text, value):
    tree, lines = read(f"key: {text}\n", "f", ".")
    found = plain(tree)["key"]
    assert not lines
    assert found == value
    assert type(found) is type(value)


WRONG = [  # what the file holds; where and what
    ("a: 010", "f:1:4: 010 is 10 to some readers of YAML and octal to others: write 10 or '010'."),
    ("a: .nan", "f:1:4: .nan is no number that can be computed with."),
    ("a: 1e999", "f:1:4: 1e999 is no number that can be computed with."),
    ("a: " + "9" * 5000, "f:1:4: '9999999999999999999999999999999999999999' is not a whole number that can be read."),
    ("a: 1\nb: 2\na: 3", "f:3:1: the key 'a' is written twice; the first is in line 1."),
    ("1: a", "f:1:1: keys are names, and '1' is not; quote it if it is meant as text."),
    ("a: {true: b}", "f:1:5: keys are names, and 'true' is not; quote it if it is meant as text."),
    ("? [a]\n: b", "f:1:3: keys are names, and a list or mapping is not; quote it if it is meant as text."),
    ("a: &x {b: 1}\nc: {<<: *x}", "f:2:5: merge keys (`<<`) are not supported; use `extends`, or repeat the keys."),
    ("a: !python/object:os.system x", "f:1:4: the tag !python/object:os.system is not supported; write the value without it."),
    ("a: !!python/object:os.system x", "f:1:4: the tag !!python/object:os.system is not supported; write the value without it."),
    ("a: !!set {b}", "f:1:4: the tag !!set is not supported; write the value without it."),
    ("a: !!binary aGk=", "f:1:4: the tag !!binary is not supported; write the value without it."),
    ('a: "\\ud800"', "f:1:4: an escape that is half a character (\\ud800 to \\udfff)."),
    ('"\\ud800": a', "f:1:1: an escape that is half a character (\\ud800 to \\udfff)."),
    ("a: !!int many", "f:1:4: 'many' is not a whole number that can be read."),
    ("a: !!float many", "f:1:4: 'many' is not a number."),
    ("a: !!bool many", "f:1:4: 'many' is not a bool."),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_what_could_be_misread_is_refused(text, message):
    _, lines = read(text, "f", ".")
    assert [str(line) for line in lines] == [message]


BROKEN = [
    ("", "f:1:1: the file is empty: a graph needs at least `problem` and `levels`."),
    ("# only a comment\n", "f:1:1: the file is empty: a graph needs at least `problem` and `levels`."),
    ("- a", "f:1:1: expected a mapping of keys at the top, got a list."),
    ("\n\nwords", "f:3:1: expected a mapping of keys at the top, got a single value."),
    ("a: [1, 2", "f:1:9: not valid YAML: expected ',' or ']', but got '<stream end>' while parsing a flow sequence."),
    ("a: 1\n\tb: 2", "f:2:1: not valid YAML: a tab; YAML indents with spaces."),
    ("a: b: c", "f:1:5: not valid YAML: a second ': ' in one line; quote the text or start a new line."),
    ("a: 1\n---\nb: 2", "f:2:1: not valid YAML: but found another document expected a single document in the stream."),
    ("a: *x", "f:1:4: not valid YAML: found undefined alias 'x'."),
    ("a: &x [*x]", "f:1:4: an alias stands inside the value it names."),
    ("a: \x07", "f:1:4: not valid YAML: the character '\\x07' is not allowed."),
    ("a: 1\nb: c\x00", "f:2:5: not valid YAML: the character '\\x00' is not allowed."),
    ("a: " + "[" * 80 + "]" * 80, "f:1:67: not valid YAML: nested deeper than 64."),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BROKEN)
def test_what_is_no_graph_at_all_is_refused(text, message):
    with pytest.raises(Broken) as caught:
        read(text, "f", ".")
    assert str(caught.value.line) == message


def test_aliases_are_expanded_up_to_a_bound():
    tree, lines = read("a: &x {b: [1, 2]}\nc: *x", "f", ".")
    assert plain(tree) == {"a": {"b": (1, 2)}, "c": {"b": (1, 2)}}
    assert not lines
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    with pytest.raises(Broken, match="more than 50000 values"):
        read(bomb, "f", ".")


def test_files_that_are_no_text_are_refused(write, tmp_path):
    write(name="here.yaml")
    (tmp_path / "latin.yaml").write_bytes("problem: toy\nname: Gr\u00fc\u00dfe".encode("latin-1"))
    with pytest.raises(SpecError, match=r"^latin.yaml:2:9: not valid UTF-8; save the file as UTF-8.$"):
        load("latin.yaml")
    with pytest.raises(
        SpecError, match=r"^no graph 'heer.yaml'. Did you mean 'here.yaml'\?\n  Known: here.yaml, latin.yaml"
    ):
        load("heer.yaml")
    (tmp_path / "folder").mkdir()
    with pytest.raises(SpecError, match=r"^'folder' is a folder, and a graph is a file.$"):
        load("folder")
    (tmp_path / "marked.yaml").write_bytes(b"\xef\xbb\xbfproblem: tog")
    with pytest.raises(SpecError, match=r"marked.yaml:1:10: problem: no problem named 'tog'"):
        load("marked.yaml", imports=["toy"])


words = st.text(st.characters(codec="utf-8", exclude_characters="\x85\u2028\u2029\ufeff"), max_size=12)
tricky = st.sampled_from(
    [text for text, _ in SCALARS] + ["010", "<<", "1e-3", "#", ": ", "- a", "&a", "*a", "!x", "%", "@", "`"]
)
scalars = st.one_of(st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.floats(allow_nan=False), words, tricky)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words | tricky, inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(words | tricky, trees, max_size=4))
def test_what_is_written_is_read_back(value):
    text = yaml.dump(value, Dumper=Dumper, allow_unicode=True, default_flow_style=None)
    tree, lines = read(text or "{}", "f", ".")
    assert not lines
    assert thaw(plain(tree)) == value


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("ab:-[]{},&*!|>'\"#? \n\t1.e%~<"), max_size=40))
def test_any_text_is_read_or_refused_with_a_place(text):
    try:
        tree, lines = read(text, "f", ".")
        places = [node.place for node in walk(tree)] + [line.place for line in lines]
    except Broken as broken:
        places = [broken.line.place]
    assert all(place.line >= 1 and place.column >= 1 for place in places)
