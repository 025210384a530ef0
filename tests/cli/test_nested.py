"""Nests through the command line: what `check` and `show` say of a level in the middle, and what they refuse, with its place."""
# ruff: noqa: E501 - a case a line

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SHIPPED = str(ROOT / "graphs" / "nested.yaml")
GRAPH = (ROOT / "graphs" / "nested.yaml").read_text(encoding="utf-8")
FEATURES = "features.hypergradient"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ((), "through classifier (unroll); differentiated: reduced, 2 reverse passes a pullback"),
        (
            ("levels.features.nested=direct",),
            "through classifier (unroll); differentiated: direct, 2 reverse passes a pullback",
        ),
        (
            (f"levels.{FEATURES}={{conjugate_gradient: {{iterations: 3}}}}",),
            "through classifier (unroll); differentiated: reduced, at most 15 reverse passes a pullback",
        ),
    ],
)
def test_check_says_what_a_level_in_the_middle_follows_and_what_it_costs(mlo_command, overrides, said):
    code, out, err = mlo_command("check", SHIPPED, "iterations=1", *overrides)
    assert (code, err) == (0, "")
    assert f"features follows its total gradient {said}" in out.splitlines()
    assert "features holds fixed: nothing" in out.splitlines(), "what is above is held fixed by every level below it"
    assert "penalty differentiates through: features" in out


def test_show_says_so_without_the_cost(mlo_command):
    code, out, err = mlo_command("show", SHIPPED)
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    said = "in the middle follows its total gradient through classifier (unroll); differentiated: reduced"
    assert lines.count(said) == sum(line.startswith("in the middle") for line in lines) == 1
    for form in ("mermaid", "svg"):
        code, out, err = mlo_command("show", SHIPPED, "--format", form)
        assert (code, err) == (0, "")
        assert out.count("total gradient, differentiated: reduced") == 1


COMPARES = (
    "it compares gradients of 'features' at two places, where 'classifier' takes its steps anew; but the method of 'classifier' "
    "is not the derivative of these steps. Take a method with second derivatives here, unroll all steps of 'classifier', or say "
    "nested: direct"
)
SYMMETRY = (
    "conjugate gradients need a symmetric Jacobian, and the total gradient of 'features' has none: those of 'classifier' may stop "
    "before they have converged (fewer iterations than numbers). Take neumann, exact or gmres here, another method for "
    "'classifier', or say nested: direct"
)
OTHER = """\
  other:
    variables: {representation: {width: 16}}
    objective: transfer
    given: [penalty]
    subject_to: [classifier]
    batch: query
    optimizer: {sgd: {learning_rate: 0.3}}
  penalty:
"""
SHARED = (
    "'features' and 'other' are both subject to 'classifier', and others are subject to them: each one's response would depend on "
    "the other's; make them one level, or one of them subject to the other"
)


def changed(*pairs: tuple[str, str]) -> str:
    text = GRAPH
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    return text


BELOW, ABOVE = "hypergradient: unroll\n  features", "hypergradient: unroll\n    nested"
WRONG = {
    "a word": (changed(("reduced  ", "whole")), "23:13: levels.features.nested: expected reduced or direct, got 'whole'."),
    "not in a nest": (
        changed(("steps: 5\n", "steps: 5\n    nested: direct\n")),
        "12:13: levels.classifier.nested: only a level that is subject to others has a total gradient.",
    ),
    "differences": (
        changed((BELOW, "hypergradient: {neumann: {terms: 2, step_size: 0.1}}\n  features"), (ABOVE, "hypergradient: finite_difference\n    nested")),
        f"22:20: levels.features.hypergradient: {COMPARES}",
    ),
    "conjugate gradients": (
        changed(
            (BELOW, "hypergradient: {conjugate_gradient: {iterations: 5}}\n  features"),
            (ABOVE, "hypergradient: {conjugate_gradient: {iterations: 5}}\n    nested"),
        ),
        f"22:21: levels.features.hypergradient: {SYMMETRY}",
    ),
    "two in the middle": (
        changed(("  penalty:\n", OTHER), ("given: [features, penalty]", "given: [features, other, penalty]"), ("subject_to: [features, classifier]", "subject_to: [features, other, classifier]")),
        f"28:17: levels.other.subject_to: {SHARED}.",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "said"), WRONG.values(), ids=list(WRONG))
def test_what_a_nest_cannot_do_is_refused_with_its_place(mlo_command, text, said):
    Path("graph.yaml").write_text(text, encoding="utf-8")
    code, _, err = mlo_command("check", "graph.yaml")
    assert (code, err) == (2, f"graph.yaml:{said}\n")
